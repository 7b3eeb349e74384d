"""npdrt's own answers to a case, in the bits of docs/updates.md.

Of small arrays they are those of that page in plain Python (`npdrt.conform.page`), of large ones
those of `npdrt.optim`, which the tests hold to the page.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from npdrt import optim
from npdrt.conform import page
from npdrt.conform.case import Answer, Case

PLAIN = 256  # elements up to which plain Python is the quicker


def answers(case: Case, given: Sequence[Answer] | None = None) -> Iterator[Answer]:
    """The answer to every step. given: parameters from which the steps after the first start."""
    odd = case.format == "bfloat16" or any(step.lr < 0 for step in case.steps)
    return _by_page(case, given) if odd or case.w.size <= PLAIN else _by_npdrt(case, given)


def _by_page(case: Case, given: Sequence[Answer] | None) -> Iterator[Answer]:
    state: dict[str, Any] = {"step": 0}
    w, shape = case.w, case.w.shape
    for k, step in enumerate(case.steps):
        flat, g = w.reshape(-1).tolist(), step.g.reshape(-1).tolist()
        flat = page.step(case.rule, flat, g, state, step.lr, case.format, **case.settings)
        slots = {k: np.reshape(v, shape) for k, v in state.items() if isinstance(v, list)}
        w = np.reshape(flat, shape)
        yield Answer(w, slots)
        w = w if given is None else given[k].w


def _by_npdrt(case: Case, given: Sequence[Answer] | None) -> Iterator[Answer]:
    rule = optim.RULES[case.rule](lr=0.0, **case.settings)
    params = {"w": case.w.astype(case.format)}
    state = rule.init(params)
    for k, step in enumerate(case.steps):
        params, state = rule.update(params, {"w": step.g.astype(case.format)}, state, lr=step.lr)
        slots = {
            name.removeprefix("w/"): np.asarray(value, dtype=np.float64)
            for name, value in state.items()
            if value.shape == case.w.shape
        }
        yield Answer(params["w"].astype(np.float64), slots)
        params = params if given is None else {"w": given[k].w.astype(case.format)}
