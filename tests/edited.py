"""A right implementation as text, with planted faults, and what the referee finds in each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import libraries
import numpy as np

from npdrt import optim
from npdrt.conform import canonical
from npdrt.conform.case import Answer, Case, Failure
from npdrt.conform.identify import Finding, identify
from npdrt.conform.rules import RULES
from npdrt.conform.vectors import load

Edits = dict[str, str]
RATES = (0.1, 0.03, 0.3, 0.01, 0.1, 0.05) * 5


def problem(dtype: str = "float64", steps: int = len(RATES)) -> tuple[Any, Any]:
    """A parameter and a gradient for every step, of several sizes."""
    rng = np.random.default_rng(0)
    w, g = rng.normal(size=7), rng.normal(size=(steps, 7)) * 10.0 ** rng.integers(-3, 3, 7)
    return w.astype(dtype), g.astype(dtype)


def run(rule: str, settings: dict[str, Any], w: Any, gradients: Any, rates: Any = RATES) -> Any:
    """npdrt's parameter after every step."""
    optimizer, params = optim.RULES[rule](lr=0.0, **settings), {"w": w}
    state, seen = optimizer.init(params), []
    for g, lr in zip(gradients, rates, strict=False):
        params, state = optimizer.update(params, {"w": g}, state, lr=lr)
        seen.append(params["w"])
    return seen


def page_has_the_same_bits(rule: str, settings: dict[str, Any], w: Any, gradients: Any) -> None:
    """Assert it for every step."""
    state: dict[str, Any] = {"step": 0}
    page, dtype = w.tolist(), w.dtype.name
    ours = run(rule, settings, w, gradients)
    for found, g, lr in zip(ours, gradients, RATES, strict=False):
        page = canonical.step(rule, page, g.tolist(), state, lr, dtype, **settings)
        assert found.dtype == dtype
        np.testing.assert_array_equal(found.astype(float), page)


@dataclass(frozen=True)
class Edited:
    """The source of `update(w, g, state, *, lr, **settings)` in NumPy, and its rule."""

    rule: str
    source: str

    @cached_property
    def cases(self) -> list[Case]:
        """The vectors in float32, but the large and long ones, and those of two tensors: the
        functions here know of one."""
        cases = [t.case for t in load(self.rule, ("float32",), large=False)]
        assert cases, self.rule
        return [c for c in cases if c.result == "valid" and c.neighbour is None]

    def found(self, edits: Edits) -> Finding:
        """What the referee finds in the source with texts replaced."""
        update = self.changed(edits)
        with np.errstate(all="ignore"):
            return identify(RULES[self.rule], [(c, answers(update, c)) for c in self.cases])

    def changed(self, edits: Edits) -> Callable[..., Any]:
        """The source with texts replaced, each of which it has once."""
        source, space = self.source, {"np": np}
        for old, new in edits.items():
            assert source.count(old) == 1, old
            source = source.replace(old, new)
        exec(source, space)
        update: Callable[..., Any] = space["update"]
        return update

    def library(self, spec: str, overrides: dict[str, Any]) -> Finding:
        """What `npdrt audit` finds, without the large and the long cases."""
        target = libraries.find(spec, overrides)
        asked = [case for case in self.cases if libraries.usual(target, case)]
        pairs = list(zip(asked, libraries.outcomes(target, asked), strict=True))
        assert {o.kind for _, o in pairs if isinstance(o, Failure)} <= {"not offered"}
        answered = [(c, o) for c, o in pairs if not isinstance(o, Failure)]
        assert len(answered) > 5
        return identify(RULES[self.rule], answered)


def answers(update: Callable[..., Any], case: Case) -> tuple[Answer, ...]:
    """What an implementation in NumPy makes of a case."""
    w, given = case.w.astype("float32"), case.state or {}
    state = {k: v.astype("float32") if np.ndim(v) else v for k, v in given.items()}
    found = []
    for step in case.steps:
        w, state = update(w, step.g.astype("float32"), state, lr=step.lr, **case.settings)
        found.append(Answer(np.asarray(w, dtype=float)))
    return tuple(found)


def named(finding: Finding) -> tuple[str, dict[str, str], tuple[str, ...]]:
    """The dialect that was found, what it lacks, and the dialects that explain as much."""
    assert finding.dialect is not None, finding.kind
    return finding.dialect.name, dict(finding.extra_choices), finding.indistinguishable
