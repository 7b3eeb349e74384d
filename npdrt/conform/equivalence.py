"""Two implementations of one rule: do they compute the same, and what shows it?

Both answer the same tests. They are equivalent if the same choice of every clause explains the
answers of each, within the accepted error; clauses of mere arithmetic are reported, and may differ.
The evidence for a clause is the smallest test that excludes its other alternatives.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from npdrt import optim
from npdrt.conform import targets
from npdrt.conform.audit import Audit, audit, concluded
from npdrt.conform.identify import AnsweredCase, costly, worst_ratio
from npdrt.conform.judge import Judged, distances, same_bits
from npdrt.conform.rules import RULES
from npdrt.conform.rules.rule import PROFILES
from npdrt.conform.vectors import sums
from npdrt.errors import Error

EXPLAINED = ("agrees to the bit", "agrees", "profile", "dialect", "deviates", "out of scope")


@dataclass(frozen=True)
class Evidence:
    """What the answers of one implementation show about a clause.

    found: the alternative that explains them. excluded: other alternative -> the smallest test
    that it does not explain. open: the alternatives that these tests cannot tell from `found`.
    """

    found: str
    excluded: dict[str, int]
    open: tuple[str, ...]


@dataclass(frozen=True)
class Distance:
    """The distance of the two implementations on the gated tests of a format that both answered.

    same: tests with the same bits. ulps: the largest distance of two elements, at the scale of
    the operands; at: the test that has it, None if all are the same.
    """

    format: str
    same: int
    total: int
    ulps: float
    at: int | None


@dataclass(frozen=True)
class Equivalence:
    """The comparison of `a`, the alternate implementation, with `b`, the approved one.

    digests: file of vectors -> SHA-256.
    """

    a: Audit
    b: Audit
    digests: dict[str, str]

    @property
    def rule(self) -> str:
        """The name of the rule."""
        return self.b.rule

    @property
    def name(self) -> str:
        """Both names."""
        return f"{self.a.name} and {self.b.name}"

    @property
    def verdict(self) -> str:
        """ "equivalent to the bit", "equivalent", "not equivalent", or "not shown" if the answers
        of one of them show no rule."""
        if not all(found.verdict in EXPLAINED for found in (self.a, self.b)) or not self.pairs:
            return "not shown"
        if self.different:
            return "not equivalent"
        same = all(row.same == row.total for row in self.distances)
        return "equivalent to the bit" if same else "equivalent"

    @property
    def passes(self) -> bool:
        """Whether they are equivalent."""
        return self.verdict.startswith("equivalent")

    @property
    def different(self) -> list[str]:
        """The clauses of the equation of which they have other alternatives."""
        return [clause for clause in self._apart if clause not in PROFILES]

    @property
    def arithmetic(self) -> list[str]:
        """The clauses of which they differ that are arithmetic, and not part of the equation."""
        return [clause for clause in self._apart if clause in PROFILES]

    @property
    def _apart(self) -> list[str]:
        a, b = (RULES[x.rule].full(x.finding.choices or {}) for x in (self.a, self.b))
        return [clause for clause in b if a.get(clause) != b[clause]]

    @cached_property
    def pairs(self) -> list[tuple[Judged, Judged]]:
        """The gated tests that both answered."""
        theirs = {j.test.case.id: j for j in self.b.gated if j.answers}
        mine = (j for j in self.a.gated if j.answers)
        return [(j, theirs[j.test.case.id]) for j in mine if j.test.case.id in theirs]

    @cached_property
    def distances(self) -> list[Distance]:
        """How far they are from each other, by format."""
        rows = []
        for form in dict.fromkeys(a.test.case.format for a, _ in self.pairs):
            of = [(a, b) for a, b in self.pairs if a.test.case.format == form]
            apart = [(_apart(a, b), a.test.case.id) for a, b in of]
            most, at = max(apart)
            same = sum(
                all(same_bits(x.w, y.w) for x, y in zip(a.answers, b.answers, strict=True))
                for a, b in of
            )
            rows.append(Distance(form, same, len(of), most, at if most else None))
        return rows

    @cached_property
    def evidence(self) -> dict[str, tuple[Evidence, Evidence]]:
        """Clause -> what the answers of `a` and of `b` show; empty if one of them shows nothing."""
        if self.verdict == "not shown":
            return {}
        a, b = evidence_of(self.a), evidence_of(self.b)
        return {clause: (a[clause], b[clause]) for clause in b}

    @property
    def equation(self) -> list[str]:
        """The published equation of the rule, line by line."""
        text = inspect.getdoc(optim.RULES[self.rule]) or ""
        blocks = re.findall(r"(?:^ {4}.+\n?)+", text, re.M)
        return [row.strip() for row in blocks[0].splitlines()] if blocks else []


def _apart(a: Judged, b: Judged) -> float:
    """The largest distance of two answers to a test, in ulps at the scale of its operands."""
    found = [
        distances(x.w, y.w, np.broadcast_to(e.scale, x.w.shape), a.test.case.number)
        for x, y, e in zip(a.answers, b.answers, a.test.expected, strict=True)
    ]
    return max((float(np.max(d, initial=0.0)) for d in found), default=0.0)


def evidence_of(found: Audit) -> dict[str, Evidence]:
    """Clause -> what the answers of an implementation that is explained show."""
    rule, choices = RULES[found.rule], RULES[found.rule].full(found.finding.choices or {})
    answered = [(j.test.case, j.answers) for j in found.gated if j.answers]
    small = sorted(
        (pair for pair in answered if not costly(pair[0])),
        key=lambda pair: (len(pair[0].steps), pair[0].w.size, pair[0].id),
    )
    made = {}
    for clause, alternatives in rule.clauses.items():
        others = [name for name in alternatives if name != choices[clause]]
        tests = {name: _excluding(rule, {**choices, clause: name}, small) for name in others}
        excluded = {name: test for name, test in tests.items() if test is not None}
        still = tuple(name for name in others if name not in excluded)
        made[clause] = Evidence(choices[clause], excluded, still)
    return made


def _excluding(rule: Any, choices: Any, answered: Sequence[AnsweredCase]) -> int | None:
    """The first test whose answers the choices do not explain."""
    return next((a[0].id for a in answered if worst_ratio(rule, choices, *a) > 1.0), None)


def compare(
    a: targets.Target,
    b: targets.Target | None,
    formats: Sequence[str],
    *,
    limit: float = 10.0,
    progress: Callable[[int, int], None] | None = None,
) -> Equivalence:
    """Audit two implementations and compare them; b: None for the published rule, in npdrt's bits.

    If neither says which rule it is, that is found by asking `a`. Raises `Error` if they are of two
    rules.
    """
    known = {t.rule for t in (a, b) if t is not None and t.rule is not None}
    if len(known) == 2:
        raise Error(f"{a.spec} and {b and b.spec} are of two rules: {', '.join(sorted(known))}")
    rule = next(iter(known), None)
    first = audit(replace(a, rule=rule), formats, limit=limit, progress=progress)
    rule = rule or first.rule
    if b is None:
        second = published(first, rule)
    else:
        second = audit(replace(b, rule=rule), formats, limit=limit, progress=progress)
    files = {f"{rule}_{form}.json" for form in formats}
    return Equivalence(first, second, {k: v for k, v in sums().items() if k in files})


def published(asked: Audit, rule: str) -> Audit:
    """The audit of npdrt's own answers to the tests that another implementation was asked."""
    vectors = [j.test for j in asked.judged if j.test.expected]
    outcomes = [tuple(e.canonical for e in vector.expected) for vector in vectors]
    return concluded(f"the published {rule}", {}, vectors, outcomes)
