"""Judging a response: the answers that an implementation wrote to the exported prompts.

Tests come in groups (one rule, format and settings; one operation; ...). A response need not touch
a group. If it does, it must answer every valid test of the group, and so of every group that you
name by rule or format.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from npdrt.conform import vectors
from npdrt.conform.audit import PASSES, Audit, concluded
from npdrt.conform.encoding import Json
from npdrt.conform.judge import judge_arrays
from npdrt.conform.rules import RULES
from npdrt.errors import Error, FileRefused

LEVELS = {"Norm": "C2", "Primitive": "primitives", "TrainingStep": "training steps"}


@dataclass(frozen=True)
class Checked:
    """An answer to a test of a norm, a primitive or a training step.

    kind: a key of LEVELS. group: its format, operation or name. ratio: its error over the
    tolerance. where: the array and the element with that error. error: its reason if it refused.
    """

    id: int
    comment: str
    flags: tuple[str, ...]
    kind: str
    group: str
    passed: bool
    ratio: float
    where: str
    gated: bool
    error: str = ""


@dataclass(frozen=True)
class Missing:
    """A valid test of a touched group that has no answer."""

    id: int
    comment: str
    group: str


@dataclass(frozen=True)
class Verification:
    """Everything found about a response.

    audits: one for each rule, over the groups that were touched. checked: norms, primitives,
    training steps. not_attempted: group -> tests, of groups that were not touched. ignored: the
    number of answers to tests outside the rule and formats that you asked about.
    """

    name: str
    audits: tuple[Audit, ...]
    checked: tuple[Checked, ...]
    missing: tuple[Missing, ...]
    not_attempted: dict[str, int]
    ignored: int = 0

    @property
    def passes(self) -> bool:
        """Whether every rule agrees, all else is within its tolerance, and nothing is missing."""
        rules = all(PASSES[a.verdict] for a in self.audits)
        return rules and not self.missing and all(c.passed for c in self.checked if c.gated)


def verify(path: Path, rule: str | None = None, formats: Sequence[str] = ()) -> Verification:
    """The verdict on a response file.

    rule, formats: the response must answer all updates of this rule, and all tests in these
    formats; other answers are ignored.

    Raises `FileRefused` if the file or an answer is malformed or answers a test that does not
    exist, `Error` if it answers no test that you asked about.
    """
    name, answers = vectors.read_response(path)
    groups = list(all_groups())
    unknown = answers.keys() - {test["tcId"] for group in groups for test in group["tests"]}
    if unknown:
        raise FileRefused(f"{path}: answers test {min(unknown)}, which does not exist")
    asked = [g for g in groups if wanted(g, rule, formats)]
    touched = [g for g in asked if any(test["tcId"] in answers for test in g["tests"])]
    if not touched:
        raise Error(
            f"{path}: has no answer to any test that you asked about; answer the prompts of npdrt "
            "vectors export, with the same --rule and --format"
        )
    owed = asked if rule or formats else touched
    seen = sum(test["tcId"] in answers for group in asked for test in group["tests"])
    left = Counter[str]()
    for group in (g for g in asked if g not in owed):
        left[label(group)] += sum(not vectors.spared(test) for test in group["tests"])
    try:
        judged = tuple(audits(name, touched, answers)), tuple(checked(touched, answers))
    except FileRefused as error:
        raise FileRefused(f"{path}: {error}") from error
    return Verification(
        name, *judged, tuple(missing(owed, answers)), dict(left), len(answers) - seen
    )


# --- groups ---------------------------------------------------------------------------------------


def all_groups() -> Iterator[Json]:
    """Every group of every file; a group with tests of several formats becomes one for each."""
    for name in vectors.sums():
        for group in vectors.read(vectors.FOLDER / name)["testGroups"]:
            if "format" in group:
                yield group
                continue
            for form in dict.fromkeys(format_of(test) for test in group["tests"]):
                tests = [test for test in group["tests"] if format_of(test) == form]
                yield {**group, "format": form, "tests": tests}


def format_of(test: Json) -> str:
    """The format of a primitive or a training step."""
    array = test["cotangent"] if "cotangent" in test else next(iter(test["params"].values()))
    return str(array["dtype"])


def wanted(group: Json, rule: str | None, formats: Sequence[str]) -> bool:
    """Whether a group is of the rule and of one of the formats, if these are given. A group whose
    tests are of several formats is of any."""
    if rule and group.get("rule") != rule:
        return False
    return not formats or group.get("format", formats[0]) in formats


def label(group: Json) -> str:
    """The subject of a group, for a reader: "fromage float32", "primitive exp float64"."""
    match group["type"]:
        case "OptimizerStep":
            return f"{group['rule']} {group['format']}"
        case "Norm":
            return f"norm {group['format']}"
        case "Primitive":
            return f"primitive {group['operation']} {group['format']}"
    return f"training step with {group['optimizer']['rule']} {group['format']}"


# --- judging --------------------------------------------------------------------------------------


def audits(name: str, groups: Sequence[Json], answers: Mapping[int, Any]) -> Iterator[Audit]:
    """The audit of every rule that has answers."""
    for rule in RULES:
        tests = [
            vectors.vector_from(group, test)
            for group in groups
            if group["type"] == "OptimizerStep" and group["rule"] == rule
            for test in group["tests"]
            if not vectors.spared(test) or test["tcId"] in answers
        ]
        if tests:
            outcomes = [vectors.outcome(t.case, answers.get(t.case.id)) for t in tests]
            yield concluded(name, {}, tests, outcomes)


def checked(groups: Sequence[Json], answers: Mapping[int, Any]) -> Iterator[Checked]:
    """The judged answers to norms, primitives and training steps."""
    for group in groups:
        if group["type"] in LEVELS:
            for test in group["tests"]:
                if test["tcId"] in answers:
                    yield check(group, test, answers[test["tcId"]])


def check(group: Json, test: Json, answer: Any) -> Checked:
    """One of them. Raises `FileRefused` if the answer does not have the form asked for."""
    refused = str(answer["error"] or "refused")[:500] if "error" in answer else ""
    ratio, where = (math.inf, "") if refused else judge_arrays(group["type"], test, answer)
    about = test["tcId"], test["comment"], tuple(test["flags"]), group["type"], label(group)
    return Checked(*about, ratio <= 1, ratio, where, test["result"] == "valid", refused)


def missing(groups: Sequence[Json], answers: Mapping[int, Any]) -> Iterator[Missing]:
    """The valid tests without an answer."""
    for group in groups:
        for test in group["tests"]:
            owed = test["result"] == "valid" and not vectors.spared(test)
            if owed and test["tcId"] not in answers:
                yield Missing(test["tcId"], test["comment"], label(group))
