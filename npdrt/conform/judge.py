"""The judge: how far answers are from the vectors, by level.

C0: the bits of docs/updates.md. C1: at most k ulps from the exact answer, counted at the scale of
the operands. C2: norms. C3: many steps, from the exact sequence. Primitives and training steps
have no level.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from npdrt.arrays import quiet
from npdrt.conform.case import Answer, Case, Failure, Outcome
from npdrt.conform.encoding import DOUBLE, Json, array, read_array, shown, unhexed
from npdrt.conform.formats import FORMATS, Format, Values
from npdrt.conform.rules import RULES
from npdrt.conform.vectors import Vector
from npdrt.errors import FileRefused

MEMORY = 10  # steps whose errors a state still holds
ORDERED = 64  # elements up to which a norm may be added in any order; sums of more are blocked


def accepted(case: Case) -> float:
    """The accepted error of a case in ulps at scale.

    Of a sequence that of all its steps. Of recorded steps, each judged from the recorded parameter
    before it, that of one step, or of as many as the rule's state remembers.
    """
    recorded = "RECORDED" in case.flags
    return of_step(case) * (remembered(case) if recorded else len(case.steps))


def of_step(case: Case) -> float:
    """The accepted error of one step in ulps at scale: the rule's, and that of two norms."""
    n, rule = case.w.size, RULES[case.rule]
    return rule.ulps + (min(n, ORDERED + math.isqrt(n)) + 2 if rule.takes_norms else 0)


def remembered(case: Case) -> int:
    """Of how many steps a step has the errors, if it starts from the parameter that was given."""
    return min(len(case.steps), MEMORY) if RULES[case.rule].accumulates(case.settings) else 1


@dataclass(frozen=True)
class Worst:
    """Where an answer is furthest from the exact one. ulps: inf where one is not finite and the
    other is not the same. step, index: from 0; index into the flattened array."""

    ulps: float
    step: int = 0
    index: int = 0


@dataclass(frozen=True)
class Judged:
    """One test with its verdict.

    bits: level C0 holds (parameter alone). accurate: C1 (C3 where there are several steps) holds.
    worst: the largest error.
    """

    test: Vector
    outcome: Outcome
    bits: bool
    accurate: bool
    worst: Worst
    slots: tuple[str, ...] = ()  # of other bits than the canonical ones

    @property
    def failure(self) -> Failure | None:
        """Why there was no answer."""
        return self.outcome if isinstance(self.outcome, Failure) else None

    @property
    def answers(self) -> tuple[Answer, ...]:
        """The answers; none where there is a failure."""
        return () if isinstance(self.outcome, Failure) else self.outcome

    @property
    def gated(self) -> bool:
        """Whether the verdict depends on it."""
        return self.test.case.result == "valid"

    @property
    def level(self) -> str:
        """C1 or C3: which level its accuracy belongs to. Recorded steps are judged each from the
        recorded parameter before it."""
        case = self.test.case
        return "C1" if len(case.steps) == 1 or "RECORDED" in case.flags else "C3"


def judge(test: Vector, outcome: Outcome) -> Judged:
    """The verdict on one outcome. A test whose result is "error" holds where it was refused."""
    if isinstance(outcome, Failure):
        refused = test.case.result == "error" and outcome.kind == "raised"
        return Judged(test, outcome, refused, refused, Worst(math.inf))
    if test.case.result == "error":
        return Judged(test, outcome, False, False, Worst(math.inf))
    worst = furthest(test, outcome)
    same = all(same_bits(a.w, e.canonical.w) for a, e in zip(outcome, test.expected, strict=True))
    return Judged(test, outcome, same, worst.ulps <= test.ulps, worst, odd_slots(test, outcome))


def odd_slots(test: Vector, outcome: Sequence[Answer]) -> tuple[str, ...]:
    """The slots whose bits are not the canonical ones after some step."""
    odd = {
        name
        for answer, expected in zip(outcome, test.expected, strict=True)
        for name, value in answer.slots.items()
        if name in expected.canonical.slots and not same_bits(value, expected.canonical.slots[name])
    }
    return tuple(sorted(odd))


def same_bits(a: Any, b: Any) -> bool:
    """Equal numbers, zeros of one sign, NaN at the same places."""
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    nan = np.isnan(a) & np.isnan(b)
    return bool(np.all(nan | ((a == b) & (np.signbit(a) == np.signbit(b)))))


def ulps_away(test: Vector, answers: Sequence[Answer]) -> float:
    """The largest error of answers in ulps at scale."""
    return furthest(test, answers).ulps


def furthest(test: Vector, answers: Sequence[Answer]) -> Worst:
    """The largest error of answers, and where."""
    errors = errors_of(test, answers)
    if not errors.any():
        return Worst(0.0)
    step, at = np.unravel_index(np.argmax(errors), errors.shape)
    return Worst(float(errors[step, at]), int(step), int(at))


def errors_of(test: Vector, answers: Sequence[Answer]) -> Values:
    """The errors of all elements after every step, in ulps: (steps, elements).

    The errors of a sequence add up from its first step on, so they are counted at the largest scale
    so far; recorded steps, each judged from the parameter before it, at their own.
    """
    pairs = zip(answers, test.expected, strict=True)
    parts = [(a.w, e.exact, e.scale, np.broadcast_to(e.slack, a.w.shape)) for a, e in pairs]
    got, exact, scale, slack = (np.stack(part) for part in zip(*parts, strict=True))
    if "RECORDED" not in test.case.flags:
        before = np.maximum.accumulate(np.where(np.isfinite(scale), scale, 0.0))
        scale[1:] = np.maximum(before[:-1], scale[1:])
    errors = distances(got, exact, scale, test.case.number, slack)
    return errors.reshape(len(answers), test.case.w.size)


def distances(got: Any, exact: Any, scale: Any, number: Format, slack: Any = 0.0) -> Values:
    """|got - exact|, less the slack, / ulp(scale) of every element, flattened; 0 where both are NaN
    or the same infinity, inf where only one is. An exact answer within k ulps of overflow may be
    infinite."""
    got, exact = np.asarray(got, np.longdouble), np.asarray(exact, np.longdouble)
    with np.errstate(all="ignore"):
        steps = np.maximum(np.abs(got - exact) - slack, 0) / number.ulp(scale)
        same = (got == exact) | (np.isnan(got) & np.isnan(exact))
        finite = np.isfinite(got) & np.isfinite(exact) & np.isfinite(scale)
        ulps = np.where(same, 0.0, np.where(finite, steps, np.inf)).astype(np.float64)
    return ulps.reshape(-1)


# --- norms, primitives and training steps --------------------------------------------------------

Pairs = dict[str, tuple[Any, Json]]  # name -> the array that arrived, and the one expected


def judge_arrays(kind: str, test: Json, answer: Any) -> tuple[float, str]:
    """The largest error of an answer over the tolerance of the test, so that up to 1 it passes; and
    the array and element that has it.

    kind: a key of PAIRS. Raises `FileRefused` if the answer does not have the form asked for.
    """
    name = f"test {test['tcId']}"
    try:
        pairs, tolerance = PAIRS[kind](test, answer), test["tolerance"]
        limit = unhexed(tolerance) if isinstance(tolerance, str) else tolerance
        errors = [difference(*pair, f"{name}, {part}") for part, pair in pairs.items()]
    except (ValueError, TypeError, OverflowError, LookupError, AttributeError,
            RecursionError) as error:  # fmt: skip
        raise FileRefused(f"{name}: {type(error).__name__}: {error}") from error
    worst, where = max(errors, key=lambda found: found[0])
    return worst / limit if worst and limit else worst and math.inf, where


def _norm(test: Json, answer: Any) -> Pairs:
    """Of an answer {"norm": 16 hex digits}."""
    if "norm" not in answer:
        raise FileRefused(f"test {test['tcId']}: expected a norm; got {sorted(answer)}")
    got, expected = (array(unhexed(text), DOUBLE) for text in (answer["norm"], test["norm"]))
    return {"norm": (got, expected)}


def _primitive(test: Json, answer: Any) -> Pairs:
    """Of an answer {"value": array, "vjp": [array or None, ...]}."""
    expected = test["expected"]
    match answer:
        case {"value": value, "vjp": list(vjp)} if len(vjp) == len(test["arguments"]):
            pairs = {"value": (value, expected["value"])}
        case _:
            raise FileRefused(
                f"test {test['tcId']}: expected a value and {len(test['arguments'])} vjps; "
                f"got {shown(answer)}"
            )
    for k, (got, wanted) in enumerate(zip(vjp, expected["vjp"], strict=True)):
        if wanted is not None:
            pairs[f"vjp {k}"] = (got, wanted)
    return pairs


def _training_step(test: Json, answer: Any) -> Pairs:
    """Of an answer {"loss": array, "grads": {name: array}, "params": {name: array}}, with "buffers"
    where the test has some."""
    expected = test["expected"]
    match answer:
        case {"loss": loss, "grads": dict(), "params": dict()}:
            pairs = {"loss": (loss, expected["loss"])}
        case _:
            raise FileRefused(
                f"test {test['tcId']}: expected a loss, grads and params; got {shown(answer)}"
            )
    for part in (name for name in expected if name != "loss"):
        wanted, found = expected[part], answer.get(part)
        if not isinstance(found, dict):
            raise FileRefused(f"test {test['tcId']}: expected {part}; got {shown(found)}")
        if found.keys() != wanted.keys():
            names = ", ".join(map(str, found))
            raise FileRefused(
                f"test {test['tcId']}: expected {part} of {', '.join(wanted)}; got {names}"
            )
        pairs.update({f"{part} {name}": (found[name], wanted[name]) for name in wanted})
    return pairs


PAIRS = {"Norm": _norm, "Primitive": _primitive, "TrainingStep": _training_step}


def difference(got: Any, wanted: Json, where: str) -> tuple[float, str]:
    """max|got - wanted| / max(max|wanted|, smallest normal) over the finite elements, and where it
    is; inf where shape, dtype or an element that is not finite differ.

    NaN matches NaN; an inf matches one of its sign; the sign of a zero is not looked at.
    """
    ours, theirs = read_array(got, where), read_array(wanted, where)
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return math.inf, f"{where}: {ours.dtype}{ours.shape} for {theirs.dtype}{theirs.shape}"
    if not theirs.size:
        return 0.0, where
    ours, theirs = ours.astype(np.float64).reshape(-1), theirs.astype(np.float64).reshape(-1)
    finite = np.isfinite(theirs)
    size = np.max(np.abs(theirs), where=finite, initial=FORMATS[wanted["dtype"]].smallest_normal)
    with quiet():
        error = np.abs(ours - theirs) / size
    same = (ours == theirs) | (np.isnan(ours) & np.isnan(theirs))
    error = np.where(same, 0.0, np.where(finite & np.isfinite(ours), error, math.inf))
    worst = int(np.argmax(error))
    index = [int(i) for i in np.unravel_index(worst, wanted["shape"])]
    return float(error[worst]), f"{where}{index}: {ours[worst]!r} for {theirs[worst]!r}"
