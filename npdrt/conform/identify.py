"""Which dialect an implementation follows: the choices of clauses that explain its answers.

Every candidate (the published rule, the named dialects, and each of these with one more clause
changed) is evaluated in extended precision on the same cases, from the implementation's own
parameter at every step. A candidate explains the answers if all are within the accepted error:

    SLACK (ROUNDINGS ulp(w) + k ulp(what is added to w)) + what its arithmetic explains

where k is the accepted error of a step, or of the steps that the state remembers. The parameter
takes part in the last operations alone, so a small step is not judged at the scale of a large w.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations, takewhile
from typing import Any

import numpy as np

from npdrt.conform.case import Answer, Case
from npdrt.conform.formats import Values
from npdrt.conform.judge import of_step, remembered
from npdrt.conform.rules import RULES, Choices, Dialect, Rule, run
from npdrt.conform.rules.rule import PROFILES

AnsweredCase = tuple[Case, tuple[Answer, ...]]
SLACK = 2.0  # a candidate is accepted within this many times the error of a right implementation
ROUNDINGS = 4.0  # ulps at the scale of the parameter that the last operations of a step may cost
SHORT = 8  # steps of a case that is worth trying on every candidate
FIRST = 16  # steps of a longer case that are tried before the rest
WORK = 30_000  # steps, of arrays of 2,000 elements at most, that are spent on candidates
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
    (or the closest, with `beyond` the clauses added to it). also: other dialects that the cases
    cannot tell apart from it. smallest: the smallest case that tells it from the published rule.
    parting: the first operation in it whose values differ. among: the rules that were tried, if
    the rule was not given and none of them fits; `rule` is then the closest. stopped: not every
    candidate was tried, since the cases are long or large.
    """

    rule: Rule
    choices: Choices | None
    dialect: Dialect | None = None
    beyond: Choices = field(default_factory=dict)
    also: tuple[str, ...] = ()
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
        if self.dialect is not None and not self.dialect.scope:
            return "out of scope"
        rules = [clause for clause in self.beyond if clause not in PROFILES]
        if rules:
            return "deviation"
        if not self.choices:
            return "published"
        return "profile" if all(c in PROFILES for c in self.choices) else "dialect"


def identify(rule: Rule, answered: Sequence[AnsweredCase]) -> Finding:
    """The candidate with the fewest changes that explains the answers to a rule's valid cases."""
    valid = [a for a in answered if a[0].result == "valid"]
    cases = sorted((a for a in valid if not costly(a[0])), key=refutes_soonest)
    rest = sorted((a for a in valid if costly(a[0])), key=refutes_soonest)
    work = Work()
    tried = takewhile(lambda _: work.left > 0, candidates(rule))
    found = next(
        (c for c in tried if all(explains(rule, c[0], some, work) for some in (cases, rest))), None
    )
    if found is None:
        return Finding(rule, None, stopped=work.left <= 0)
    choices, dialect, beyond = found
    differences = rule.differences(choices)
    case, parting = first_disagreement(rule, differences, [*cases, *rest])
    also = equivalent_dialects(rule, differences, dialect, cases, rest)
    return Finding(rule, differences, dialect, beyond, also, case, parting)


def costly(case: Case) -> bool:
    """Whether a case has many elements or steps."""
    return any(flag in COSTLY for flag in case.flags)


def refutes_soonest(answered: AnsweredCase) -> tuple[bool, int, int]:
    """Edges and sequences first, long ones last."""
    case = answered[0]
    ordinary = "ORDINARY" in case.flags or "TRAJECTORY" in case.flags
    return ordinary, len(case.steps) * case.w.size if costly(case) else 0, case.id


Candidate = tuple[Choices, Dialect, Choices]


def candidates(rule: Rule) -> Iterator[Candidate]:
    """Choices to try, the likeliest first: (choices, dialect, clauses beyond the dialect)."""
    published = rule.dialects[0]
    changes = list(single_changes(rule))
    profiles: list[Choices] = [{}, *(c for c in changes if next(iter(c)) in PROFILES)]
    changes = [c for c in changes if next(iter(c)) not in PROFILES]
    pairs = [{**a, **b} for a, b in combinations(changes, 2) if not a.keys() & b.keys()]
    for dialect in rule.dialects:
        yield from in_any_arithmetic(dialect, {}, profiles)
    for change in changes:
        yield from in_any_arithmetic(published, change, profiles)
    for dialect in rule.dialects[1:]:
        for change in changes:
            if not change.keys() & dialect.choices.keys():
                yield from in_any_arithmetic(dialect, change, profiles)
    for pair in pairs:
        yield pair, published, pair


def in_any_arithmetic(
    dialect: Dialect, change: Choices, profiles: Sequence[Choices]
) -> Iterator[Candidate]:
    """A dialect with clauses changed, in published arithmetic and in every other."""
    for profile in profiles:
        beyond = {**change, **profile}
        yield {**dialect.choices, **beyond}, dialect, beyond


def single_changes(rule: Rule) -> Iterator[Choices]:
    """Every change of one clause of the published rule."""
    published = rule.full({})
    for clause, alternatives in rule.clauses.items():
        for alternative in alternatives:
            if alternative != published[clause]:
                yield {clause: alternative}


@dataclass
class Work:
    """What a search may still spend, so that its time has a bound."""

    left: float = WORK

    def spend(self, case: Case) -> None:
        """Pay for an evaluation of a case."""
        self.left -= len(case.steps) * max(1.0, case.w.size / 2000)


def explains(rule: Rule, choices: Choices, answered: list[AnsweredCase], work: Work) -> bool:
    """Whether every answer is what the rule gives under the choices, within rounding. A case that
    refutes them moves to the front, if it is short: it may refute the next candidate too."""
    for k, (case, answers) in enumerate(answered):
        several = prefix_and_whole(case, answers, work)
        if not all(excess(rule, choices, *part) <= 1.0 for part in several):
            if len(case.steps) <= SHORT:
                answered.insert(0, answered.pop(k))
            return False
    return True


def prefix_and_whole(
    case: Case, answers: Sequence[Answer], work: Work
) -> Iterator[tuple[Case, Sequence[Answer]]]:
    """The first steps of a long case, and the whole of it."""
    if len(case.steps) > 2 * FIRST:
        few = replace(case, steps=case.steps[:FIRST])
        work.spend(few)
        yield few, answers[:FIRST]
    work.spend(case)
    yield case, answers


def first_odd(rule: Rule, case: Case, answers: Sequence[Answer]) -> int | None:
    """The first step, from 0, that the published rule does not explain, or None."""
    found = errors(rule, {}, case, answers).reshape(len(case.steps), -1)
    odd = ~(np.max(found, axis=1, initial=0.0) <= 1.0)
    return int(np.argmax(odd)) if odd.any() else None


def excess(rule: Rule, choices: Choices, case: Case, answers: Sequence[Answer]) -> float:
    """The largest error of the answers under the choices, over the accepted one."""
    return float(np.max(errors(rule, choices, case, answers), initial=0.0))


def errors(rule: Rule, choices: Choices, case: Case, answers: Sequence[Answer]) -> Values:
    """The error of every element after every step under the choices, over the accepted one."""
    steps = run(rule, choices, case, answers=answers)
    shape = (len(steps), *case.w.shape)
    found, scale, change, slack = np.empty((4, *shape), np.longdouble)
    for k, step in enumerate(steps):
        found[k], scale[k], change[k], slack[k] = step.w, step.scale, step.change, step.slack
    got, exact = np.asarray([a.w for a in answers]), as_format(found, case)
    return ratios(case, got, exact, scale, change, slack)


def ratios(case: Case, got: Any, exact: Any, scale: Any, change: Any, slack: Any) -> Values:
    """|got - exact| over the accepted error; 0 if they are the same, inf if one is not finite and
    the other is not the same."""
    with np.errstate(all="ignore"):
        rounding, of_change = case.number.ulp(scale), case.number.ulp(change)
        ulps = ROUNDINGS * rounding + of_step(case) * remembered(case) * of_change
        away = np.abs(got - exact) / (SLACK * ulps + slack)
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
    """The smallest case that tells the choices from the published rule, and the first value."""
    if not differences:
        return None, None
    for case, answers in sorted(answered, key=lambda a: (len(a[0].steps), a[0].w.size, a[0].id)):
        if excess(rule, {}, case, answers) > 1.0:
            parting = first_difference(rule, differences, case, answers)
            if parting:
                return case, parting
    return None, None


def first_difference(
    rule: Rule, differences: Choices, case: Case, answers: Sequence[Answer]
) -> Divergence | None:
    """The first named value that differs between the published rule and the choices."""
    pair = (run(rule, c, case, answers=answers) for c in ({}, differences))
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
        if all(explains(rule, {**d.choices, **profile}, cases, Work()) for cases in answered)
    )


def identify_any(answered: Mapping[str, Sequence[AnsweredCase]]) -> Finding:
    """The finding for an implementation of unknown rule: answers by rule name.

    The rule with the fewest unexplained clauses wins. Among equals an ablation
    comes last, since nobody sets out to write one. Then the rule with the most answers comes
    first: the implementation has its settings. If no rule explains the answers, the finding has no
    choices, and its rule is the one with the largest share of tests that hold.
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
    held = [excess(rule, {}, *a) <= 1.0 for a in answered if a[0].result == "valid"]
    return sum(held) / max(len(held), 1)
