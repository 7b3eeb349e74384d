"""Which dialect an implementation follows: the choices of clauses that explain its answers.

Every candidate (the published rule, the named dialects, and each of these with one more clause
changed) is evaluated in extended precision on the same cases, from the implementation's own
parameter at every step. A candidate explains the answers if all are within the accepted error.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np

from npdrt.conform.case import Answer, Case
from npdrt.conform.dialects import RULES, Choices, Dialect, Rule, run
from npdrt.conform.dialects.rule import PROFILES
from npdrt.conform.judge import accepted, distances

Answered = tuple[Case, tuple[Answer, ...]]
EASE = 2.0  # a candidate is accepted within this many times the error of a right implementation


@dataclass(frozen=True)
class Parting:
    """The first named value in which the rule that is followed differs from the published one."""

    label: str
    published: Any
    found: Any


@dataclass(frozen=True)
class Finding:
    """What an implementation is.

    rule: the rule it was held to. choices: the clauses in which it differs from the published
    rule; None where no candidate explains it. dialect: the named dialect with these choices (or
    the closest, with `beyond` the clauses added to it). also: other dialects that the cases
    cannot tell apart from it. parting: the first operation where the values part, in `smallest`,
    the smallest case that tells it from the published rule.
    """

    rule: Rule
    choices: Choices | None
    dialect: Dialect | None = None
    beyond: Choices = field(default_factory=dict)
    also: tuple[str, ...] = ()
    smallest: Case | None = None
    parting: Parting | None = None

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


def identify(rule: Rule, answered: Sequence[Answered]) -> Finding:
    """The candidate with the fewest changes that explains the answers to a rule's valid cases."""
    cases = sorted((a for a in answered if a[0].result == "valid"), key=telling)
    found = next((c for c in candidates(rule) if explains(rule, c[0], cases)), None)
    if found is None:
        return Finding(rule, None)
    choices, dialect, beyond = found
    differences = rule.differences(choices)
    case, parting = parts(rule, differences, cases)
    also = twins(rule, differences, dialect, cases)
    return Finding(rule, differences, dialect, beyond, also, case, parting)


def telling(answered: Answered) -> tuple[bool, int]:
    """Edges and sequences first: they refute a candidate soonest."""
    case = answered[0]
    return "ORDINARY" in case.flags or "TRAJECTORY" in case.flags, case.id


Candidate = tuple[Choices, Dialect, Choices]


def candidates(rule: Rule) -> Iterator[Candidate]:
    """Choices to try, the likeliest first: (choices, dialect, clauses beyond the dialect)."""
    published = rule.dialects[0]
    changes = list(single_changes(rule))
    profiles = [c for c in changes if next(iter(c)) in PROFILES]
    for dialect in rule.dialects:
        yield dialect.choices, dialect, {}
        for profile in profiles:
            yield {**dialect.choices, **profile}, dialect, profile
    for change in changes:
        yield change, published, change
    for dialect in rule.dialects[1:]:
        for change in changes:
            if not change.keys() & dialect.choices.keys():
                yield {**dialect.choices, **change}, dialect, change
    for one, other in combinations(changes, 2):
        if not one.keys() & other.keys():
            yield {**one, **other}, published, {**one, **other}


def single_changes(rule: Rule) -> Iterator[Choices]:
    """Every change of one clause of the published rule."""
    published = rule.full({})
    for clause, alternatives in rule.clauses.items():
        for alternative in alternatives:
            if alternative != published[clause]:
                yield {clause: alternative}


def explains(rule: Rule, choices: Choices, answered: list[Answered]) -> bool:
    """Whether every answer is what the rule gives under the choices, within rounding. A case that
    refutes them moves to the front: it may refute the next candidate too."""
    for k, (case, answers) in enumerate(answered):
        if not error(rule, choices, case, answers) <= 1.0:
            answered.insert(0, answered.pop(k))
            return False
    return True


def error(rule: Rule, choices: Choices, case: Case, answers: Sequence[Answer]) -> float:
    """The largest error of the answers under the choices, over the accepted one."""
    steps = run(rule, choices, case, answers=answers)
    shape = (len(steps), *case.w.shape)
    found, scale = np.empty(shape, np.longdouble), np.empty(shape, np.longdouble)
    for k, step in enumerate(steps):
        found[k], scale[k] = step.w, step.scale
    away = distances([a.w for a in answers], as_format(found, case), scale, case.number)
    return float(np.max(away, initial=0.0)) / (EASE * accepted(case))


def as_format(w: Any, case: Case) -> Any:
    """w, infinite where the format has no such number."""
    with np.errstate(all="ignore"):
        over = np.abs(w) > case.number.largest * (1 + 2.0**-case.number.precision)
        return np.where(over, np.copysign(np.inf, w), w)


def parts(
    rule: Rule, differences: Choices, answered: Sequence[Answered]
) -> tuple[Case | None, Parting | None]:
    """The smallest case that tells the choices from the published rule, and the first value."""
    if not differences:
        return None, None
    for case, answers in sorted(answered, key=lambda a: (len(a[0].steps), a[0].w.size, a[0].id)):
        if error(rule, {}, case, answers) > 1.0:
            parting = first_difference(rule, differences, case, answers)
            if parting:
                return case, parting
    return None, None


def first_difference(
    rule: Rule, differences: Choices, case: Case, answers: Sequence[Answer]
) -> Parting | None:
    """The first named value that differs between the published rule and the choices."""
    pair = (run(rule, c, case, answers=answers) for c in ({}, differences))
    for published, found in zip(*pair, strict=True):
        for label, value in published.notes.items():
            other = found.notes.get(label)
            if other is not None and not close(value, other):
                return Parting(label, value, other)
        if not close(published.w, found.w):
            return Parting("w", published.w, found.w)
    return None


def close(a: Any, b: Any) -> bool:
    """Equal but for rounding."""
    with np.errstate(all="ignore"):
        same = np.isclose(np.asarray(a, float), np.asarray(b, float), 1e-7, 0.0, equal_nan=True)
    return bool(np.all(same))


def twins(
    rule: Rule, differences: Choices, dialect: Dialect, answered: list[Answered]
) -> tuple[str, ...]:
    """The other named dialects that explain the same answers, in the same arithmetic."""
    profile = {k: v for k, v in differences.items() if k in PROFILES}
    others = (d for d in rule.dialects if d is not dialect)
    return tuple(d.name for d in others if explains(rule, {**d.choices, **profile}, answered))


def identify_any(answered: Mapping[str, Sequence[Answered]]) -> Finding:
    """The finding for an implementation of unknown rule: answers by rule name.

    The rule with the fewest unexplained clauses wins; one that explains nothing comes last. Among
    equals it is the rule of which most was answered: whose settings the implementation has.
    """
    found = [(identify(RULES[n], cases), len(cases)) for n, cases in answered.items() if cases]
    order = ("published", "profile", "dialect", "out of scope", "deviation", "unknown")
    return min(found, key=lambda f: (order.index(f[0].kind), len(f[0].choices or ()), -f[1]))[0]
