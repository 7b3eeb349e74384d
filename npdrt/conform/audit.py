"""The audit: an implementation's answers, judged and explained, with one verdict."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from npdrt.conform import canonical, targets
from npdrt.conform.case import USES, Answer, Case, Failure, Outcome
from npdrt.conform.identify import (
    AnsweredCase,
    Finding,
    as_format,
    first_odd,
    identify,
    identify_any,
)
from npdrt.conform.judge import Judged, accepted, judge
from npdrt.conform.rules import RULES, run
from npdrt.conform.vectors import Expected, Vector, case_from, groups, vector_from

# Verdicts, and whether the command ends with exit code 0.
PASSES = {
    "agrees to the bit": True,  # C0 on every gated test
    "agrees": True,  # the published rule, C1 on every gated test
    "profile": False,  # the published rule in other arithmetic
    "dialect": False,  # another named rule
    "deviates": False,  # clauses broken that no dialect breaks
    "unknown": False,  # no combination of clauses explains it
    "out of scope": False,  # another optimizer
    "no verdict": False,  # it raised, hung, changed its arguments, ...
}
USED = 10_000_000  # what is added to the number of a test for a use
NOT_ASKED = ("not offered", "not run", "missing")  # failures to put the test to it at all


@dataclass(frozen=True)
class Level:
    """One row of the table of levels: how many tests of a format hold a level."""

    level: str  # C0, C1 or C3
    format: str
    passed: int
    total: int
    worst: Judged | None  # by ulps; None at C0


@dataclass(frozen=True)
class Audit:
    """Everything found about one implementation.

    judged: every test that was asked and offered. skipped: how many were not offered, by reason.
    finding: the rule and the dialect.
    """

    name: str
    versions: dict[str, str]
    judged: tuple[Judged, ...]
    finding: Finding
    skipped: dict[str, int] = field(default_factory=dict)

    @property
    def rule(self) -> str:
        """The name of the rule that it was held to."""
        return self.finding.rule.name

    @property
    def failures(self) -> dict[str, tuple[int, Judged]]:
        """kind of failure -> (how many, the first), on tests that should have been answered."""
        found: dict[str, tuple[int, Judged]] = {}
        for j in self.judged:
            if j.failure is not None and j.test.case.result == "valid":
                count, first = found.get(j.failure.kind, (0, j))
                found[j.failure.kind] = (count + 1, first)
        return found

    @property
    def verdict(self) -> str:
        """A key of PASSES."""
        if self.failures or not self.gated or self.says_nothing:
            return "no verdict"
        if self.finding.kind == "published":
            if self.holds("bits"):
                return "agrees to the bit"
            if self.holds("accurate"):
                return "agrees"
        kinds = {"published": "unknown", "deviation": "deviates"}
        return kinds.get(self.finding.kind, self.finding.kind)

    @property
    def gated(self) -> list[Judged]:
        """The tests that the verdict depends on."""
        return [j for j in self.judged if j.gated]

    @property
    def says_nothing(self) -> str:
        """Why the answers of a recording are no evidence, whatever is found; "" where they are."""
        made = [j for j in self.gated if "RECORDED" in j.test.case.flags]
        numbers = [a.w for j in made for a in j.answers]
        before = [w for j in made for w in (j.test.case.w, *(a.w for a in j.answers[:-1]))]
        if not numbers or self.finding.kind not in ("published", "profile", "dialect"):
            return ""
        if not any(w.size for w in numbers):
            return "the recording has no element"
        if odd := sum(int(np.sum(~np.isfinite(w))) for w in numbers):
            total = sum(w.size for w in numbers)
            return f"{odd} of {total} recorded numbers are not finite; record finite steps alone"
        if all(np.array_equal(a, b) for a, b in zip(before, numbers, strict=True)):
            return "no recorded step changes a parameter"
        return ""

    def holds(self, level: str) -> bool:
        """Whether every gated test has "bits" (C0) or is "accurate" (C1, C3)."""
        return all(getattr(j, level) for j in self.gated)

    def levels(self) -> list[Level]:
        """The table of levels, by format."""
        rows = []
        for form in dict.fromkeys(j.test.case.format for j in self.gated):
            of = [j for j in self.gated if j.test.case.format == form]
            rows.append(Level("C0", form, sum(j.bits for j in of), len(of), None))
            for level in ("C1", "C3"):
                some = [j for j in of if j.level == level]
                if some:
                    worst = max(some, key=lambda j: j.worst.ulps)
                    rows.append(Level(level, form, sum(j.accurate for j in some), len(some), worst))
        return rows

    def hint(self) -> str:
        """What an unexplained audit looks like, where it looks like something common."""
        valid = [j for j in self.judged if j.test.case.result == "valid" and j.failure is None]
        if all("RECORDED" in j.test.case.flags for j in valid):
            settings = dict(valid[0].test.case.settings) if valid else {}
            shown = ", ".join(f"{k} = {v}" for k, v in settings.items()) or "no settings"
            return (
                f"{self.recorded_until(valid)}; it was held to {self.rule} with {shown}: check "
                "that these, and the learning rates, were the run's, and that it was recorded "
                "from the first step"
            )
        layouts = sorted({j.test.case.layout for j in valid if not j.accurate})
        if layouts and "C" not in layouts:
            return f"only operands in layout {', '.join(layouts)} are misread"
        fresh = [j.accurate for j in valid if j.test.case.state is None]
        given = [j.accurate for j in valid if j.test.case.state is not None]
        if (begin := self.first_step_off(valid)) and begin > 2:
            longest = max(len(j.test.case.steps) for j in valid if j.test.case.state is None)
            if not all(fresh) or begin > longest:
                return f"the earliest step that is off is step {begin}: look at what changes there"
        if all(fresh) and given and 2 * sum(given) < len(given):
            slots = sorted({n for j in valid for n in j.test.case.state or ()})
            return (
                "all tests from a fresh start hold and those from a given state do not: does it "
                f"read the state under the names {', '.join(slots)}?"
            )
        return ""

    def first_step_off(self, asked: Sequence[Judged]) -> int | None:
        """The earliest step of a run, from 1, that the published rule does not explain. Runs of
        thousands of steps are looked at where all others are explained."""
        for long in (False, True):
            some = [j for j in asked if (len(j.test.case.steps) > targets.UNIT) == long]
            odd = [(j, first_odd(self.finding.rule, j.test.case, j.answers)) for j in some]
            found = [(j.test.case.state or {}).get("step", 0) + k for j, k in odd if k is not None]
            if found:
                return int(min(found)) + 1
        return None

    def recorded_until(self, made: Sequence[Judged]) -> str:
        """From which step on the recorded tensors are off, and which hold."""
        found = []
        for j in made:
            k = first_odd(self.finding.rule, j.test.case, j.answers)
            state = "holds" if k is None else f"off from step {k + 1} on"
            found.append(f"{j.test.case.comment}: {state}")
        return "; ".join(found[:4]) + ("; ..." if len(found) > 4 else "")

    def ungated_values(self) -> list[str]:
        """What the tests that only inform are about, where an implementation that agrees differs:
        NaN, infinity."""
        flags = {flag for j in self.not_gated() for flag in j.test.case.flags}
        return [what for flag, what in (("NAN", "NaN"), ("INFINITE", "infinity")) if flag in flags]

    def failing_flags(self) -> dict[str, tuple[int, int]]:
        """flag -> (tests that are not accurate, tests), where there are any, worst first."""
        odd: Counter[str] = Counter()
        all_: Counter[str] = Counter()
        for j in self.gated:
            all_.update(j.test.case.flags)
            odd.update(() if j.accurate else j.test.case.flags)
        order = sorted(odd, key=lambda flag: -odd[flag] / all_[flag])
        return {flag: (odd[flag], all_[flag]) for flag in order}

    def not_gated(self) -> list[Judged]:
        """The tests that only inform and did not hold: refused rates, subnormals, NaN ..."""
        return [j for j in self.judged if not j.gated and not j.accurate]


def audit(
    target: targets.Target,
    formats: Sequence[str] = ("float32", "float64"),
    *,
    limit: float = 10.0,
    progress: Callable[[int, int], None] | None = None,
) -> Audit:
    """Run the vectors through a target and judge its answers.

    A target of unknown rule is asked the cases of every rule; the finding with the fewest
    unexplained clauses says which it is, and of that rule it is asked the large and long cases too.
    limit: seconds a case.
    """

    def asked(rules: Sequence[str], *kinds: bool) -> Audit:
        vectors = [v for r in rules for v in asked_of(target, r, formats, kinds)]
        cases = [v.case for v in vectors]
        outcomes = targets.answers(target, cases, limit=limit, progress=progress)
        return concluded(target.name, target.versions, vectors, outcomes)

    if target.rule is not None:
        return asked([target.rule], False, True)
    found = asked(list(RULES), False)
    if found.finding.among or found.failures or not found.gated:
        return found
    return asked([found.rule], False, True)


def asked_of(
    target: targets.Target, rule: str, formats: Sequence[str], kinds: Sequence[bool]
) -> Iterator[Vector]:
    """The tests of a rule that a target is asked: those that are stored where `kinds` has False,
    the large and long ones, which are generated, where it has True.

    Of a large or long one, those with the richest settings that the target has; of thousands of
    steps, those in one format.
    """
    found = groups("OptimizerStep", rule=rule, formats=formats)
    pairs = ((group, test) for group in found for test in group["tests"])
    seen = set()
    for group, test in sorted(pairs, key=lambda pair: pair[1]["tcId"]):  # the richest first
        if (large := "generated" in test) not in kinds:
            continue
        if large:
            case = case_from(group, test)
            form = "" if len(case.steps) > targets.UNIT else case.format
            apart = any(case.settings.get(name) for name in RULES[rule].apart)
            key = (case.w.shape, len(case.steps), form, apart)
            if key in seen or targets.lacks(target, case):
                continue
            seen.add(key)
        vector = vector_from(group, test)
        yield vector
        yield from in_use(vector, target.uses)


def in_use(vector: Vector, uses: Sequence[str]) -> Iterator[Vector]:
    """A test of two tensors again, put to uses that change none of its answers; none of another."""
    case = vector.case
    decays = "weight_decay" in case.settings
    for use in uses if case.neighbour is not None else ():
        if use == "EXCLUSION" and not decays:
            continue
        number = case.id + USED * (1 + list(USES).index(use))
        comment = f"{case.comment}; {USES[use][1]}"
        yield replace(
            vector, case=replace(case, id=number, comment=comment, flags=(use, *case.flags))
        )


def concluded(
    name: str, versions: dict[str, str], vectors: Sequence[Vector], outcomes: Sequence[Outcome]
) -> Audit:
    """The audit of answers: which rule, which dialect, how far away."""
    pairs = list(zip(vectors, outcomes, strict=True))
    answered: dict[str, list[AnsweredCase]] = {}
    for v, o in pairs:
        if not isinstance(o, Failure) and v.case.result != "error":
            answered.setdefault(v.case.rule, []).append((v.case, o))
    rules = list(dict.fromkeys(v.case.rule for v in vectors))
    finding = identify_any(answered) if answered else Finding(RULES[rules[0]], None)
    if len(rules) == 1:  # it was said which
        finding = replace(finding, among=())
    asked, skipped = [], Counter[str]()
    for v, o in pairs:
        if v.case.rule != finding.rule.name:
            continue
        if isinstance(o, Failure) and o.kind in NOT_ASKED:
            skipped[o.message] += 1
        elif isinstance(o, Failure) and o.kind == "raised" and v.case.layout != "C":
            skipped[f"it refuses operands in layout {v.case.layout}: {o.message}"] += 1
        else:
            asked.append(judge(v, o))
    return Audit(name, versions, tuple(asked), finding, dict(skipped))


# --- recorded trajectories ------------------------------------------------------------------------


def audit_recorded(name: str, answered: Sequence[AnsweredCase]) -> Audit:
    """The audit of steps that somebody recorded, all under one rule."""
    finding = identify(RULES[answered[0][0].rule], answered)
    judged = tuple(judge(recorded_vector(case, answers), answers) for case, answers in answered)
    return Audit(name, {}, judged, finding)


def recorded_vector(case: Case, answers: Sequence[Answer]) -> Vector:
    """The published answers to recorded steps, each from the recorded parameter before it."""
    steps, shape = run(RULES[case.rule], {}, case, answers=answers), case.w.shape
    expected = []
    for step, published in zip(steps, canonical.answers(case, answers), strict=True):
        exact = case.number.round(np.broadcast_to(as_format(step.w, case), shape))
        scale = np.broadcast_to(np.asarray(step.scale, dtype=np.float64), shape)
        slack = np.asarray(step.slack, dtype=np.float64)
        expected.append(Expected(exact, scale, Answer(published.w), slack=slack))
    return Vector(case, tuple(expected), accepted(case))
