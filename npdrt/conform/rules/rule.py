"""What a rule and a dialect are, and how they are evaluated on a case."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from npdrt.conform.case import Answer, Case, Slots, as_if_contiguous, operands
from npdrt.conform.formats import FORMATS, Format

Choices = Mapping[str, str]  # clause -> alternative, where it is not the published one
Settings = dict[str, Any]  # npdrt's settings, with "lr", "kind" (weight or bias)

# Clauses that every rule has. The first alternative of each is the published one.
COMMON: dict[str, dict[str, str]] = {
    "direction": {
        "descent": "the step is subtracted",
        "ascent": "the step is added",
    },
    "learning rate precision": {
        "float64": "rounded once, to the tensor's dtype",
        "float32": "rounded to float32 first",
        "float16": "rounded to float16 first",
        "bfloat16": "rounded to bfloat16 first",
    },
    "learning rate of": {
        "this step": "the rate given with the gradient",
        "the step before": "the rate given with the gradient before; the first step has its own",
        "the first step": "later rates are ignored",
    },
    "operands": {
        "by their strides": "element by element, wherever they lie in memory",
        "as if contiguous": "as if the arrays were contiguous in C order",
    },
}
# Clauses of the rules that remember something.
STATE: dict[str, dict[str, str]] = {
    "state": {
        "of each tensor": "kept from step to step, for every tensor apart",
        "shared": "one state for all tensors of an optimizer",
        "lost": "forgotten after every step",
    },
}
# Clauses of the rules that take norms.
NORMS: dict[str, dict[str, str]] = {
    "norm of": {
        "tensor": "all elements of the array",
        "row": "each row (first axis) on its own",
        "column": "each column (last axis) on its own",
        "1-norm": "sum of absolute values",
        "first 1024 elements": "the first 1,024 elements of the array",
        "first 65536 elements": "the first 65,536 elements of the array",
    },
    "norm accumulation": {
        "wide": "the sum of squares neither overflows nor underflows",
        "dtype": "squares and their sum in the tensor's dtype",
        "dtype, guarded": "the same, and rates that are not finite are replaced",
    },
}
PROFILES = ("norm accumulation", "precision")  # arithmetic, not rule
BLOCKS = {"first 1024 elements": 1024, "first 65536 elements": 65536}


@dataclass(frozen=True)
class Dialect:
    """A named way to write a rule. source: where it is to be read. scope: whether the referee
    holds implementations to it at all (AMSGrad is recognised, and is another rule)."""

    name: str
    source: str
    choices: Choices
    note: str = ""
    scope: bool = True


@dataclass(frozen=True)
class Rule:
    """A rule with its clauses.

    name: as in `npdrt.optim.RULES`. clauses: clause -> alternative -> explanation, the published
    alternative first. step(c, w, g, slots, h, a) returns (w, slots, scale): one update under the
    full choices c; scale is the size of the operands of the last sum, where ulps are counted.
    published: choices in which the published rule differs from the first alternatives.
    """

    name: str
    clauses: Mapping[str, Mapping[str, str]]
    step: Callable[..., tuple[Any, Slots, Any]]
    dialects: tuple[Dialect, ...]
    published: Choices = field(default_factory=dict)

    def full(self, choices: Choices) -> dict[str, str]:
        """Every clause with its alternative; what `choices` leaves out is as published."""
        first = {clause: next(iter(options)) for clause, options in self.clauses.items()}
        return {**first, **self.published, **choices}

    def differences(self, choices: Choices) -> dict[str, str]:
        """The clauses in which `choices` are not the published rule."""
        published = self.full({})
        return {k: v for k, v in self.full(choices).items() if v != published[k]}


@dataclass
class Arithmetic:
    """The numbers a rule is evaluated in, with the norms and limits that its choices ask for.

    real: makes a number or array of them from float64 (numpy.longdouble, or mpmath's).
    """

    real: Callable[[Any], Any]
    format: Format
    choices: Choices
    notes: dict[str, Any] = field(default_factory=dict)
    change: Any = 0.0  # the size of what is added to the parameter, set by the rule
    slack: Any = 0.0  # the error that the arithmetic of a profile explains; set by the rule

    def note(self, label: str, value: Any) -> Any:
        """`value`, kept under `label` for the question where two evaluations part."""
        self.notes[label] = value
        return value

    def norm(self, x: Any) -> Any:
        """The norm of x by the clauses "norm of" and "norm accumulation"; 0-d or broadcastable."""
        axis, keep = self._axis(x)
        if self.choices["norm of"] in BLOCKS:
            x = x.reshape(-1)[: BLOCKS[self.choices["norm of"]]]
        if self.choices["norm of"] == "1-norm":
            return np.sum(np.abs(x), axis=axis, keepdims=keep)
        return np.sqrt(self._limited(np.sum(self._limited(x * x), axis=axis, keepdims=keep)))

    def _axis(self, x: Any) -> tuple[Any, bool]:
        if np.ndim(x) < 2 or self.choices["norm of"] not in ("row", "column"):
            return None, False
        row = self.choices["norm of"] == "row"
        return tuple(range(1, x.ndim) if row else range(x.ndim - 1)), True

    def _limited(self, x: Any) -> Any:
        return x if self.choices["norm accumulation"] == "wide" else limited(x, self.format)

    def representable(self, rate: Any, value: Any, otherwise: Any) -> Any:
        """`value` where the rate is a number of the format, else `otherwise`; most
        implementations whose norms overflow do not look."""
        guarded = self.choices["norm accumulation"] != "dtype"
        return np.where(rate <= self.format.largest, value, otherwise) if guarded else value

    def rounded(self, value: float, name: str) -> Any:
        """A scalar rounded to the format of that name."""
        return self.real(float(FORMATS[name].round(np.float64(value))))


def limited(x: Any, bounds: Format) -> Any:
    """x with the range, not the precision, of a format: too large is inf, too small is 0."""
    x = np.where(np.abs(x) > bounds.largest, np.inf * np.sign(x), x)
    return np.where(np.abs(x) < bounds.smallest / 2, x * 0, x)


@dataclass(frozen=True)
class Evaluated:
    """One step of a rule: new parameter, slots, the scale of its operands, named values.

    change: the size of what is added to the parameter. slack: the absolute error that a choice of
    arithmetic explains, besides that of a right implementation.
    """

    w: Any
    slots: Slots
    scale: Any
    notes: dict[str, Any]
    change: Any = 0.0
    slack: Any = 0.0


def run(
    rule: Rule,
    choices: Choices,
    case: Case,
    real: Callable[[Any], Any] = np.longdouble,
    answers: Sequence[Answer] | None = None,
) -> list[Evaluated]:
    """Every step of a case under a rule and choices.

    answers: what an implementation gave; each step then starts from its parameter, so that
    differences do not add up, while the slots go their own way. Raises ZeroDivisionError in
    numbers that have no infinity.
    """
    full = rule.full(choices)
    read = as_if_contiguous if full["operands"] == "as if contiguous" else None
    w, slots = real(case.w), _slots(case, real)
    beside = real(case.neighbour.w) if case.neighbour and full.get("state") == "shared" else None
    steps: list[Evaluated] = []
    with np.errstate(all="ignore"):
        for k in range(len(case.steps)):
            arithmetic = Arithmetic(real, case.number, full)
            h = _settings(case, _rate(case, k, full), arithmetic)
            if beside is not None and case.neighbour is not None:
                other = case.neighbour.g[k]
                beside, slots, _ = rule.step(full, beside, real(other), slots, h, arithmetic)
                slots["step"] += 1
                arithmetic = Arithmetic(real, case.number, full)
            g = real(case.steps[k].g)
            w, g = operands(w, g, case.layout, read) if read else (w, g)
            w, slots, scale = rule.step(full, w, g, slots, h, arithmetic)
            slots["step"] += 1
            steps.append(
                Evaluated(
                    w, dict(slots), scale, arithmetic.notes, arithmetic.change, arithmetic.slack
                )
            )
            w = real(answers[k].w) if answers is not None and k < len(answers) else w
            slots = {"step": 0} if full.get("state") == "lost" else slots
    return steps


def _rate(case: Case, k: int, full: Choices) -> float:
    """The learning rate of step k by the clause "learning rate of"."""
    at = {"the step before": max(k - 1, 0), "the first step": 0}.get(full["learning rate of"], k)
    return case.steps[at].lr


def _slots(case: Case, real: Callable[[Any], Any]) -> Slots:
    """The state before the first step; the slots a rule finds missing are its own start."""
    given = {"step": 0, **(case.state or {})}
    return {k: v if k == "step" else real(v) for k, v in given.items()}


def _settings(case: Case, lr: float, arithmetic: Arithmetic) -> Settings:
    """The settings as numbers of the arithmetic, the learning rate with sign and precision."""
    c, real = arithmetic.choices, arithmetic.real
    exact = c["learning rate precision"] == "float64"
    rate = real(lr) if exact else arithmetic.rounded(lr, c["learning rate precision"])
    h: Settings = {"lr": rate, "kind": case.kind, "sign": -1 if c["direction"] == "ascent" else 1}
    for name, value in case.settings.items():
        plain = value is None or isinstance(value, bool | str)
        h[name] = value if plain else [real(x) for x in value] if name == "betas" else real(value)
    return h


def largest(*sizes: Any) -> Any:
    """The elementwise largest of some arrays of sizes."""
    result = np.abs(sizes[0])
    for size in sizes[1:]:
        result = np.maximum(result, np.abs(size))
    return result
