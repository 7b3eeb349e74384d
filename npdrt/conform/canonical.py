"""npdrt's own answers to a case, in the bits of docs/updates.md.

Those of small arrays are that page in plain Python (`page` of every rule), those of large ones
`npdrt.optim`, which the tests compare with the page.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from npdrt import optim
from npdrt.conform.case import Answer, Case
from npdrt.conform.page import Norms, Numbers
from npdrt.conform.rules import RULES

PLAIN = 256  # elements up to which plain Python is the quicker


def step(
    rule: str, w: Numbers, g: Numbers, state: dict[str, Any], lr: float, dtype: str, *,
    norms: Norms = None, shape: tuple[int, ...] | None = None, **settings: Any,
) -> Numbers:  # fmt: skip
    """The parameter after one step of `rule`; `state` becomes the state after the step.

    w, g: numbers of `dtype`. state: {"step": 0} before the first step; a start in the middle has
    the number of steps made under "step" and the slots of the rule under their names. Scalars that
    it lacks (Adam's powers) are computed from "step". Lists in it are replaced, not written.
    norms: |w| and |g|, taken as given in place of the page's norm, also for a "max_norm" that is
    not in the state; the norm of a new w, for norm_bound, is always the page's. shape: of the
    parameter, (len(w),) if not given; most rules do not depend on it. settings: by the names and
    with the defaults of the page.

    >>> step("lars_lesion", [3.0, 4.0], [0.0, 1.0], {"step": 0}, 0.5, "float32")
    [3.0, 1.5]
    """
    shaped = {"shape": (len(w),) if shape is None else shape} if RULES[rule].shaped else {}
    w = RULES[rule].page(w, g, state, lr, dtype, norms, **shaped, **settings)
    state["step"] += 1
    return w


def answers(case: Case, given: Sequence[Answer] | None = None) -> Iterator[Answer]:
    """The answer to every step. given: parameters from which the steps after the first start."""
    odd = case.format == "bfloat16" or any(step.lr < 0 for step in case.steps)
    return _by_page(case, given) if odd or case.w.size <= PLAIN else _by_npdrt(case, given)


def _by_page(case: Case, given: Sequence[Answer] | None) -> Iterator[Answer]:
    state: dict[str, Any] = {"step": 0}
    w, shape = case.w, case.w.shape
    for k, asked in enumerate(case.steps):
        flat, g = w.reshape(-1).tolist(), asked.g.reshape(-1).tolist()
        flat = step(case.rule, flat, g, state, asked.lr, case.format, shape=shape, **case.settings)
        slots = {k: np.reshape(v, shape) for k, v in state.items() if isinstance(v, list)}
        w = np.reshape(flat, shape)
        yield Answer(w, slots)
        w = w if given is None else given[k].w


def _by_npdrt(case: Case, given: Sequence[Answer] | None) -> Iterator[Answer]:
    rule = optim.RULES[case.rule](lr=0.0, **case.settings)
    params = {"w": case.w.astype(case.format)}
    state = rule.init(params)
    for k, asked in enumerate(case.steps):
        g = asked.g.astype(case.format)
        params, state = rule.update(params, {"w": g}, state, lr=asked.lr)
        slots = {
            name.removeprefix("w/"): np.asarray(value, dtype=np.float64)
            for name, value in state.items()
            if value.shape == case.w.shape
        }
        yield Answer(params["w"].astype(np.float64), slots)
        params = params if given is None else {"w": given[k].w.astype(case.format)}
