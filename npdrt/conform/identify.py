"""Which dialect an implementation follows: the choices of clauses that explain its answers.

Every candidate (the published rule, the named dialects, and each of these with one more clause
changed) is evaluated in extended precision on the same cases, from the implementation's own
parameter at every step. A candidate explains the answers if all are within the accepted error:

    MARGIN (ROUNDINGS ulp(w) + k ulp(what is added to w)) + arithmetic_error

where arithmetic_error is what the arithmetic of a profile explains, and k is the accepted error of
a step, or of the steps that the state remembers. The parameter takes part in the last operations
alone, so a small step is not judged at the scale of a large w.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, combinations, groupby, takewhile
from types import MappingProxyType
from typing import Any

import numpy as np

from npdrt.conform.candidates import (
    Candidate,
    arithmetics,
    candidates,
    distinct,
    faults,
    in_any_arithmetic,
)
from npdrt.conform.case import Answer, Case
from npdrt.conform.formats import Values
from npdrt.conform.judge import of_step, remembered
from npdrt.conform.rules import RULES, Choices, Dialect, Rule, run
from npdrt.conform.rules.rule import PROFILES, RESETS

AnsweredCase = tuple[Case, tuple[Answer, ...]]
MARGIN = 2.0  # a candidate is accepted within this many times the error of a right implementation
PROPORTION = 0.005  # by how much the size of steps may be off, if that of each may be off by more
LEAST = 2.0**-11  # of a step, the error of which a last rounding to bfloat16 is several times
SCATTER = 0.1  # the same for one element, whose error is independent of others
ROUNDINGS = 4.0  # ulps at the scale of the parameter that the last operations of a step may cost
SHORT = 8  # steps of a case that is worth trying on every candidate
LONGEST = 500  # steps of a case in which a state that is reset is looked for
LATE = 5  # steps, less one, that may pass until a state that was forgotten shows
FIRST = 16  # steps of a longer case that are tried before the rest
BUDGET = 30_000  # steps, of arrays of 2,000 elements at most, that are spent on candidates
COSTLY = ("LARGE", "LONG")  # flags of cases on which only a candidate is tried that explains others


@dataclass(frozen=True)
class Divergence:
    """The first named value in which the rule that is followed differs from the published one."""

    label: str
    published: Any
    found: Any


@dataclass(frozen=True)
class Finding:
    """What an implementation is.

    rule: the rule it was compared with. choices: the clauses in which it differs from the
    published rule; None if no candidate explains it. dialect: the named dialect with these choices
    (or the closest, with `extra_choices` the clauses added to it). indistinguishable: other
    dialects that the cases cannot tell from it. smallest: the smallest case that tells it from the
    published rule. parting: the first operation in it whose values differ. among: the rules that
    were tried, if the rule was not given and none of them fits; `rule` is then the closest.
    stopped: not every candidate was tried, because the cases are long or large.
    """

    rule: Rule
    choices: Choices | None
    dialect: Dialect | None = None
    extra_choices: Choices = field(default_factory=dict)
    indistinguishable: tuple[str, ...] = ()
    smallest: Case | None = None
    parting: Divergence | None = None
    among: tuple[str, ...] = ()
    stopped: bool = False

    @property
    def kind(self) -> str:
        """ "published", "profile" (other arithmetic, same rule), "dialect", "out of scope",
        "deviation" (clauses that no dialect has) or "unknown"."""
        if self.choices is None:
            return "unknown"
        rules = [clause for clause in self.extra_choices if clause not in PROFILES]
        if rules:
            return "deviation"
        if self.dialect is not None and not self.dialect.scope:
            return "out of scope"
        if not self.choices:
            return "published"
        return "profile" if all(c in PROFILES for c in self.choices) else "dialect"


def identify(rule: Rule, answered: Sequence[AnsweredCase]) -> Finding:
    """The candidate with the fewest changes that explains the answers to a rule's valid cases."""
    valid = [a for a in answered if a[0].result == "valid"]
    cases = sorted((a for a in valid if not costly(a[0])), key=refutes_soonest)
    rest = sorted((a for a in valid if costly(a[0])), key=refutes_soonest)
    budget, parts = Budget(), (cases, rest)
    every = chain(candidates(rule), resets(rule, *parts, budget), pairs(rule, cases, budget))
    tried = takewhile(lambda _: budget.left > 0, distinct(rule, every))
    fitting = (c for c in tried if all(explains(rule, c.choices, p, budget) for p in parts))
    found = next(fitting, None)
    if found is None:
        return Finding(rule, None, stopped=budget.left <= 0)
    dialect, differences = found.dialect, rule.differences(found.choices)
    case, parting = first_disagreement(rule, differences, [*cases, *rest])
    indistinguishable = equivalent_dialects(rule, differences, dialect, cases, rest)
    return Finding(
        rule, differences, dialect, found.extra_choices, indistinguishable, case, parting
    )


def costly(case: Case) -> bool:
    """Whether a case has many elements or steps."""
    return any(flag in COSTLY for flag in case.flags)


def refutes_soonest(answered: AnsweredCase) -> tuple[bool, int, int]:
    """Edges and sequences first, long ones last."""
    case = answered[0]
    ordinary = "ORDINARY" in case.flags or "TRAJECTORY" in case.flags
    return ordinary, len(case.steps) * case.w.size if costly(case) else 0, case.id


def resets(
    rule: Rule, cases: Sequence[AnsweredCase], rest: Sequence[AnsweredCase], budget: Budget
) -> Iterator[Candidate]:
    """The dialects in any arithmetic with a state that is forgotten every N steps, where N is the
    number of steps that they explain from a fresh start, or a little less."""
    if "lost" not in rule.clauses.get("state", {}):
        return
    for dialect in rule.dialects:
        for candidate in in_any_arithmetic(dialect, {}, arithmetics(rule)):
            odd = steps_explained(rule, candidate.choices, [*cases, *rest], budget)
            for every in range(odd, max(odd - LATE, 1), -1):
                for how in RESETS:
                    change = {"state": how.format(every)}
                    extra_choices = {**candidate.extra_choices, **change}
                    yield Candidate({**candidate.choices, **change}, dialect, extra_choices)


def steps_explained(
    rule: Rule, choices: Choices, answered: Sequence[AnsweredCase], budget: Budget
) -> int:
    """The number of steps that choices explain in runs from a fresh start, those of the shortest
    length of which some run is not explained; 0 if they do not explain a first step, or explain
    all steps."""
    fresh = [a for a in answered if a[0].state is None and 1 < len(a[0].steps) <= LONGEST]
    for _, runs in groupby(sorted(fresh, key=length), key=length):
        found = []
        for case, answers in runs:
            budget.spend(case)
            odd = first_odd(rule, case, answers, choices)
            if odd == 0:
                return 0
            found += [odd] if odd else []
        if found:
            return min(found)
    return 0


def length(answered: AnsweredCase) -> int:
    """The number of steps of a case."""
    return len(answered[0].steps)


def pairs(rule: Rule, cases: Sequence[AnsweredCase], budget: Budget) -> Iterator[Candidate]:
    """The published rule with two clauses changed, in every likely arithmetic."""
    published, profiles = rule.dialects[0], likely_arithmetics(rule, cases, budget)
    for a, b in combinations(faults(rule, published), 2):
        if not a.keys() & b.keys():
            yield from in_any_arithmetic(published, {**a, **b}, profiles)


def likely_arithmetics(
    rule: Rule, answered: Sequence[AnsweredCase], budget: Budget
) -> list[Choices]:
    """The published arithmetic, and those in which the published rule explains more cases."""
    short = [a for a in answered if len(a[0].steps) <= SHORT]
    held = []
    for profile in arithmetics(rule):
        for case, _ in short:
            budget.spend(case)
        held.append(sum(worst_ratio(rule, profile, *a) <= 1.0 for a in short))
    return [p for p, n in zip(arithmetics(rule), held, strict=True) if not p or n > held[0]]


@dataclass
class Budget:
    """The work that a search may still do, so that its time has a bound."""

    left: float = BUDGET

    def spend(self, case: Case) -> None:
        """Pay for an evaluation of a case."""
        self.left -= len(case.steps) * max(1.0, case.w.size / 2000)


def explains(rule: Rule, choices: Choices, answered: list[AnsweredCase], budget: Budget) -> bool:
    """Whether every answer is what the rule gives under the choices, within rounding. A case that
    refutes them moves to the front, if it is short: it may refute the next candidate too."""
    for k, (case, answers) in enumerate(answered):
        several = prefix_and_whole(case, answers, budget)
        if not all(worst_ratio(rule, choices, *part) <= 1.0 for part in several):
            if len(case.steps) <= SHORT:
                answered.insert(0, answered.pop(k))
            return False
    return in_proportion(rule, choices, answered)


def in_proportion(rule: Rule, choices: Choices, answered: Sequence[AnsweredCase]) -> bool:
    """Whether steps that are judged by a wide bound have the right size on average: over all
    elements of all directions, <step, expected> / <expected, expected> is near 1. And whether they
    have the errors that the bound is for: at most a fifth of them is nearer than LEAST.

    Steps below 2**-8 of the parameter do not count, since its rounding is part of them.
    """
    excess: dict[bytes, tuple[int, float]] = {}
    sizes: list[float] = []
    for case, answers in answered:
        for step, answer in zip(run(rule, choices, case, answers=answers), answers, strict=True):
            if step.moved is None:
                return True
            moved, error = (np.asarray(x, float) for x in (step.moved, step.w - answer.w))
            square = float(np.sum(moved * moved))
            if square > 2.0**-16 * np.sum(answer.w * answer.w) and np.isfinite(square):
                direction = np.round(moved / np.sqrt(square), 3) + 0.0  # the same for the same g
                share = float(np.sum(error * moved)) / square
                excess[direction.tobytes()] = moved.size, moved.size * share
                sizes.append(float(np.sum(error * error)) / square)
    elements, total = (sum(column) for column in zip((1, 0.0), *excess.values(), strict=True))
    coarse = not sizes or float(np.quantile(sizes, 0.2)) >= LEAST**2
    return coarse and bool(abs(total / elements) <= max(PROPORTION, SCATTER / elements**0.5))


def prefix_and_whole(
    case: Case, answers: Sequence[Answer], budget: Budget
) -> Iterator[tuple[Case, Sequence[Answer]]]:
    """The first steps of a long case, and the whole of it."""
    if len(case.steps) > 2 * FIRST:
        few = replace(case, steps=case.steps[:FIRST])
        budget.spend(few)
        yield few, answers[:FIRST]
    budget.spend(case)
    yield case, answers


def first_odd(
    rule: Rule, case: Case, answers: Sequence[Answer], choices: Choices = MappingProxyType({})
) -> int | None:
    """The first step, from 0, that the choices do not explain, or None."""
    found = ratios_of_steps(rule, choices, case, answers).reshape(len(case.steps), -1)
    odd = ~(np.max(found, axis=1, initial=0.0) <= 1.0)
    return int(np.argmax(odd)) if odd.any() else None


def worst_ratio(rule: Rule, choices: Choices, case: Case, answers: Sequence[Answer]) -> float:
    """The largest error of the answers under the choices, over the accepted one."""
    return float(np.max(ratios_of_steps(rule, choices, case, answers), initial=0.0))


def ratios_of_steps(rule: Rule, choices: Choices, case: Case, answers: Sequence[Answer]) -> Values:
    """The error of every element after every step under the choices, over the accepted one."""
    steps = run(rule, choices, case, answers=answers)
    shape = (len(steps), *case.w.shape)
    w, scale, change, arithmetic_error = np.empty((4, *shape), np.longdouble)
    for k, step in enumerate(steps):
        w[k], scale[k], change[k] = step.w, step.scale, step.change
        arithmetic_error[k] = step.slack
    got, exact = np.asarray([a.w for a in answers]), as_format(w, case)
    return ratio(case, got, exact, scale, change, arithmetic_error)


def ratio(
    case: Case, got: Any, exact: Any, scale: Any, change: Any, arithmetic_error: Any
) -> Values:
    """|got - exact| over the accepted error; 0 if they are the same, inf if one is not finite and
    the other is not the same."""
    with np.errstate(all="ignore"):
        rounding, of_change = case.number.ulp(scale), case.number.ulp(change)
        ulps = ROUNDINGS * rounding + of_step(case) * remembered(case) * of_change
        away = np.abs(got - exact) / (MARGIN * ulps + arithmetic_error)
        same = (got == exact) | (np.isnan(got) & np.isnan(exact))
        finite = np.isfinite(got) & np.isfinite(exact) & np.isfinite(scale)
        return np.where(same, 0.0, np.where(finite, away, np.inf)).astype(np.float64)


def as_format(w: Any, case: Case) -> Any:
    """w, infinite if it is too large for the format."""
    with np.errstate(all="ignore"):
        over = np.abs(w) > case.number.largest * (1 + 2.0**-case.number.precision)
        return np.where(over, np.copysign(np.inf, w), w)


def first_disagreement(
    rule: Rule, differences: Choices, answered: Sequence[AnsweredCase]
) -> tuple[Case | None, Divergence | None]:
    """The smallest case that tells the choices from the published rule, and the first value. If
    they break clauses of the rule, both are told from the published rule in the same arithmetic."""
    if not differences:
        return None, None
    arithmetic = {k: v for k, v in differences.items() if k in PROFILES}
    usual = {} if arithmetic == differences else arithmetic
    for case, answers in sorted(answered, key=lambda a: (len(a[0].steps), a[0].w.size, a[0].id)):
        if worst_ratio(rule, usual, case, answers) > 1.0:
            parting = first_difference(rule, usual, differences, case, answers)
            if parting:
                return case, parting
    return None, None


def first_difference(
    rule: Rule, usual: Choices, differences: Choices, case: Case, answers: Sequence[Answer]
) -> Divergence | None:
    """The first named value that differs between two choices of clauses."""
    pair = (run(rule, c, case, answers=answers) for c in (usual, differences))
    for published, found in zip(*pair, strict=True):
        for label, value in published.notes.items():
            other = found.notes.get(label)
            if other is not None and not close(value, other):
                return Divergence(label, value, other)
        if not close(published.w, found.w):
            return Divergence("w", published.w, found.w)
    return None


def close(a: Any, b: Any) -> bool:
    """Equal but for rounding."""
    with np.errstate(all="ignore"):
        same = np.isclose(np.asarray(a, float), np.asarray(b, float), 1e-7, 0.0, equal_nan=True)
    return bool(np.all(same))


def equivalent_dialects(
    rule: Rule, differences: Choices, dialect: Dialect, *answered: list[AnsweredCase]
) -> tuple[str, ...]:
    """The other named dialects that explain the same answers, in the same arithmetic."""
    profile = {k: v for k, v in differences.items() if k in PROFILES}
    others = (d for d in rule.dialects if d is not dialect)
    return tuple(
        d.name
        for d in others
        if all(explains(rule, {**d.choices, **profile}, cases, Budget()) for cases in answered)
    )


def identify_any(answered: Mapping[str, Sequence[AnsweredCase]]) -> Finding:
    """The finding for an implementation of unknown rule: answers by rule name.

    The rule with the best kind of finding wins, in the order "published", "profile", "dialect",
    "out of scope", "deviation", "unknown". Among equals the one with the fewest clauses that
    differ wins; then one that is not an ablation, since nobody sets out to write one; then the one
    with the most answers: the implementation has its settings. If no rule explains the answers,
    the finding has no choices, and its rule is the one with the largest share of tests that hold.
    """
    tried = {n: cases for n, cases in answered.items() if cases}
    found = {n: identify(RULES[n], cases) for n, cases in tried.items()}
    order = ("published", "profile", "dialect", "out of scope", "deviation", "unknown")

    def rank(n: str) -> tuple[Any, ...]:
        finding = found[n]
        odd = -share(RULES[n], tried[n]) if finding.choices is None else 0.0
        clauses = len(finding.choices or ())
        return order.index(finding.kind), odd, clauses, RULES[n].ablation, -len(tried[n])

    best = found[min(found, key=rank)]
    return replace(best, among=tuple(found)) if best.choices is None else best


def share(rule: Rule, answered: Sequence[AnsweredCase]) -> float:
    """The share of the valid cases that the published rule explains."""
    held = [worst_ratio(rule, {}, *a) <= 1.0 for a in answered if a[0].result == "valid"]
    return sum(held) / max(len(held), 1)
