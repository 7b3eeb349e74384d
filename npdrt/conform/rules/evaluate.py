"""How a rule is evaluated on a case, under any choices and in any numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from npdrt.conform.case import FIRST_GROUP, Answer, Case, Slots, as_if_contiguous, operands
from npdrt.conform.formats import FORMATS, Format
from npdrt.conform.rules.rule import BLOCKS, Choices, Rule, Settings, period

NEAR = 1e-6  # the relative error of a norm of a few elements in float32


@dataclass
class Arithmetic:
    """The numbers a rule is evaluated in, with the norms and limits that its choices ask for.

    real: makes a number or array of them from float64 (numpy.longdouble, or mpmath's).
    """

    real: Callable[[Any], Any]
    format: Format
    choices: Choices
    notes: dict[str, Any] = field(default_factory=dict)
    change: Any = 0.0  # the size of the operands of the step, without w; the rule sets it
    slack: Any = 0.0  # the error that the arithmetic of a profile explains; the rule sets it
    moved: Any = None  # the step itself, if the slack is so large that its size is judged too
    of_norms: Any = 0.0  # the relative error of the norms so far that a narrow format explains

    def note(self, label: str, value: Any) -> Any:
        """`value`, kept under `label` to find the first operation where two evaluations differ."""
        self.notes[label] = value
        return value

    def norm(self, x: Any, error: float = 0.0) -> Any:
        """The norm of x by the clauses "norm of", "norm accumulation" and "norm format"; 0-d or
        broadcastable. error: the relative error of x that a right arithmetic explains."""
        axis, keep = self._axis(x)
        if self.choices["norm of"] in BLOCKS:
            x = x.reshape(-1)[: BLOCKS[self.choices["norm of"]]]
        if self.choices["norm of"] == "1-norm":
            return np.sum(np.abs(x), axis=axis, keepdims=keep)
        form = self.choices.get("norm format")  # a rule may have clauses of norms of its own
        if form == "float16":
            return self._narrow_norm(self._half(x), axis, keep)
        size = np.sqrt(self.in_range(np.sum(self.in_range(x * x), axis=axis, keepdims=keep)))
        return self._ended(size, NEAR + error) if form == "float16, at the end" else size

    def _narrow_norm(self, x: Any, axis: Any, keep: bool) -> Any:
        """The norm of numbers of float16 in float16: squares are rounded, and the rounding errors
        of their sum, in any order, and of the root count in `of_norms`."""
        half, squares = FORMATS["float16"], np.sum(self._half(x * x), axis=axis, keepdims=keep)
        self.of_norms = self.of_norms + (np.size(x) + 2) * 2.0**-half.precision
        return np.sqrt(limited(squares, half))

    def _ended(self, size: Any, near: float) -> Any:
        """A norm rounded to float16. If it is almost half way between two numbers of float16, the
        way it is summed decides which it is; that counts in `of_norms`."""
        low, high = self._half(size * (1 - near)), self._half(size * (1 + near))
        apart = np.where((size > 0) & np.isfinite(high), high - low, 0)
        self.of_norms = self.of_norms + apart / np.where(size > 0, size, 1)
        return self._half(size)

    def _half(self, x: Any) -> Any:
        """x rounded to float16."""
        return self.real(FORMATS["float16"].round(np.asarray(x, dtype=np.float64)))

    def _axis(self, x: Any) -> tuple[Any, bool]:
        if np.ndim(x) < 2 or self.choices["norm of"] not in ("row", "column"):
            return None, False
        row = self.choices["norm of"] == "row"
        return tuple(range(1, x.ndim) if row else range(x.ndim - 1)), True

    def in_range(self, x: Any) -> Any:
        """x by the clause "norm accumulation"."""
        return x if self.choices["norm accumulation"] == "wide" else limited(x, self.format)

    def representable(self, rate: Any, value: Any, otherwise: Any) -> Any:
        """`value` if the rate is a number of the format, else `otherwise`; most implementations
        whose norms overflow do not check it."""
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

    change: the size of the operands of the step that is added to the parameter. slack: the
    absolute error that a choice of arithmetic explains, in addition to that of a right
    implementation. moved: what the step adds to the parameter, with the other sign, if its size is
    judged over all cases.
    """

    w: Any
    slots: Slots
    scale: Any
    notes: dict[str, Any]
    change: Any = 0.0
    slack: Any = 0.0
    moved: Any = None


def run(
    rule: Rule,
    choices: Choices,
    case: Case,
    real: Callable[[Any], Any] = np.longdouble,
    answers: Sequence[Answer] | None = None,
) -> list[Evaluated]:
    """Every step of a case under a rule and choices.

    answers: those of an implementation. Each step then starts from its parameter, so that
    differences do not add up; the slots stay those of the rule. Raises ZeroDivisionError for
    numbers that have no infinity (mpmath's).
    """
    full, settings = rule.full(choices), _settings(case, real)
    read = as_if_contiguous if full["operands"] == "as if contiguous" else None
    w, slots, every = real(case.w), _slots(case, real), period(full.get("state", ""))
    before = slots["step"]
    shares = case.neighbour is not None and full.get("state") == "shared"
    other_w = real(case.neighbour.w) if case.neighbour and shares else None
    steps: list[Evaluated] = []
    with np.errstate(all="ignore"):
        for k in range(len(case.steps)):
            arithmetic = Arithmetic(real, case.number, full)
            h = settings | _rate(case, k, arithmetic) | _beside(case, k, real)
            if every and (before + k) % every == 0:
                slots = _reset(rule, full["state"], slots, case.settings)
            if case.neighbour and shares:
                other_g = real(case.neighbour.g[k])
                its = h | {"gradient beside": real(case.steps[k].g)}
                other_w, slots, _ = rule.step(full, other_w, other_g, slots, its, arithmetic)
                slots["step"] += 1
                arithmetic = Arithmetic(real, case.number, full)
            if k and "MISSING_GRADIENT" in case.flags:
                w, slots = without_gradient(rule, case, w, slots, h, arithmetic)
                arithmetic = Arithmetic(real, case.number, full)
            g = real(case.steps[k].g)
            g = -g if full["direction"] == "of the negated gradient" else g
            w, g = operands(w, g, case.layout, read) if read else (w, g)
            w, slots, scale = rule.step(full, w, g, slots, h, arithmetic)
            slots["step"] += 1
            steps.append(
                Evaluated(
                    w,
                    dict(slots),
                    scale,
                    arithmetic.notes,
                    arithmetic.change,
                    arithmetic.slack,
                    arithmetic.moved,
                )
            )
            w = real(answers[k].w) if answers is not None and k < len(answers) else w
            slots = {"step": 0} if full.get("state") == "lost" else slots
    return steps


def without_gradient(
    rule: Rule, case: Case, w: Any, slots: Slots, h: Settings, arithmetic: Arithmetic
) -> tuple[Any, Slots]:
    """A step in which the tensor has no gradient, by the clause "missing gradient"."""
    full = arithmetic.choices
    made = full.get("missing gradient", "skipped")
    if made == "skipped":
        return w, slots
    moved, after, _ = rule.step(full, w, w * 0, dict(slots), h, arithmetic)
    after["step"] += 1
    if made == "counted":
        counts = {"step", *rule.scalars(0, case.settings)}
        return w, slots | {name: after[name] for name in counts}
    return moved, after


def _reset(rule: Rule, how: str, slots: Slots, settings: Mapping[str, Any]) -> Slots:
    """A state that is forgotten, with its count or without."""
    step = slots["step"] if how.startswith("arrays") else 0
    return {"step": step, **(rule.scalars(step, settings) if step else {})}


def _rate(case: Case, k: int, arithmetic: Arithmetic) -> Settings:
    """The learning rate of step k with its sign, by the clauses "learning rate of", "learning rate
    precision" and "direction"."""
    c = arithmetic.choices
    at = {"the step before": max(k - 1, 0), "the first step": 0}.get(c["learning rate of"], k)
    lr, precision = case.steps[at].lr, c["learning rate precision"]
    if c["learning rate of"] == "the first group" and "GROUPS" in case.flags:
        lr *= FIRST_GROUP
    rate = arithmetic.real(lr) if precision == "float64" else arithmetic.rounded(lr, precision)
    return {"lr": rate, "sign": -1 if c["direction"] == "ascent" else 1}


def _beside(case: Case, k: int, real: Callable[[Any], Any]) -> Settings:
    """The gradient of the neighbour in step k, for rules that clip all gradients together."""
    return {"gradient beside": real(case.neighbour.g[k])} if case.neighbour else {}


def _slots(case: Case, real: Callable[[Any], Any]) -> Slots:
    """The state before the first step; the rule starts the slots that it does not find."""
    given = {"step": 0, **(case.state or {})}
    return {k: v if k == "step" else real(v) for k, v in given.items()}


def _settings(case: Case, real: Callable[[Any], Any]) -> Settings:
    """The settings as numbers of the arithmetic, and the kind of the parameter."""
    h: Settings = {"kind": case.kind}
    for name, value in case.settings.items():
        plain, several = (
            value is None or isinstance(value, bool | str),
            isinstance(value, tuple | list),
        )
        h[name] = value if plain else [real(x) for x in value] if several else real(value)
    return h


def largest(*sizes: Any) -> Any:
    """The elementwise largest of some arrays of sizes."""
    result = np.abs(sizes[0])
    for size in sizes[1:]:
        result = np.maximum(result, np.abs(size))
    return result


def skips(c: dict[str, str], w: Any, h: dict[str, Any]) -> bool:
    """Whether an array takes no ratio of norms and no decay, by the clause "adapts"."""
    match c["adapts"]:
        case "only with weight decay":
            return not h.get("weight_decay", 0)
        case "matrices only":
            return bool(np.ndim(w) <= 1)
        case "no biases":
            return bool(h["kind"] == "bias")
    return False
