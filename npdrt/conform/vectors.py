"""The vector files: JSON with floats as hex bit patterns, read strictly, and the responses to them.

`npdrt/conform/vectors/README.md` describes the format for implementers; `schema.json` there is its
JSON Schema. Exact answers are computed in real arithmetic and rounded once; canonical answers are
the bits of docs/updates.md.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from npdrt import schema
from npdrt.conform import canonical, cases, generated
from npdrt.conform.case import LAYOUTS, Answer, Case, Failure, Neighbour, Outcome, Step
from npdrt.conform.encoding import (
    from_bits,
    hexed,
    settings_from,
    slots_from,
    slots_json,
    unhexed,
)
from npdrt.conform.formats import FORMATS, Values
from npdrt.conform.rules import SLOTS
from npdrt.errors import FileRefused
from npdrt.regular import contents, require

VERSION = 1  # of the format
FOLDER = Path(str(files("npdrt.conform"))) / "vectors"
LIMIT = 64 << 20  # bytes of a response


@dataclass(frozen=True)
class Expected:
    """The answers after one step.

    exact: real arithmetic from the first step on, rounded once. scale: the size of the operands of
    the last sum; ulps are counted there. canonical: the bits of docs/updates.md, with its slots.
    norms: |w| and |g| before the step on the canonical way, or None where the rule takes none.
    slack: the absolute error of recorded steps that the rounding of a setting explains.
    """

    exact: Values
    scale: Values
    canonical: Answer
    norms: tuple[float, float] | None = None
    slack: Any = 0.0


@dataclass(frozen=True)
class Vector:
    """A case with its answers. ulps: the accepted error of a right implementation, level C1."""

    case: Case
    expected: tuple[Expected, ...]
    ulps: float


# --- tests ----------------------------------------------------------------------------------------


def prompt_json(case: Case, *, drawn: bool = False) -> dict[str, Any]:
    """What is asked, without answers. drawn: with the numbers of a generated case, too."""
    number = case.number
    found: dict[str, Any] = {
        "tcId": case.id,
        "comment": case.comment,
        "flags": list(case.flags),
        "result": case.result,
        "kind": case.kind,
        "shape": list(case.w.shape),
    }
    if case.layout != "C":
        found["layout"] = case.layout
    if case.generated and not drawn:
        return {**found, "generated": len(case.steps)}
    found["w"] = number.bits(case.w)
    found["state"] = None if case.state is None else slots_json(case.state, number)
    found["steps"] = [{"lr": hexed(s.lr), "g": number.bits(s.g)} for s in case.steps]
    if case.neighbour is not None:
        g = [number.bits(x) for x in case.neighbour.g]
        found["neighbour"] = {"w": number.bits(case.neighbour.w), "g": g}
    return found


def vector_json(test: Vector) -> dict[str, Any]:
    """What is asked, with the answers."""
    number, found = test.case.number, prompt_json(test.case)
    if test.case.generated:
        at = generated.sample(test.case.w.shape, len(test.case.steps))
        exact = [test.expected[k].exact.reshape(-1)[i] for k, i in at]
        return {**found, "ulps": test.ulps, "sample": {"at": at, "exact": number.bits(exact)}}
    for step, expected in zip(found["steps"], test.expected, strict=False):  # none to "error"
        if expected.norms is not None:
            step["norms"] = [hexed(x) for x in expected.norms]
    found["ulps"] = test.ulps
    found["expected"] = [
        {
            "exact": number.bits(e.exact),
            "scale": number.bits(e.scale),
            "canonical": number.bits(e.canonical.w),
            "slots": slots_json(e.canonical.slots, number),
        }
        for e in test.expected
    ]
    return found


def case_from(group: Mapping[str, Any], found: Mapping[str, Any]) -> Case:
    """The case of a test in its group."""
    number, shape = FORMATS[group["format"]], found["shape"]
    if "generated" in found:
        return _generated(group, found)
    state, beside = found["state"], found.get("neighbour")
    return Case(
        found["tcId"],
        found["comment"],
        tuple(found["flags"]),
        group["rule"],
        number.name,
        settings_from(group["settings"]),
        from_bits(found["w"], shape, number),
        tuple(
            Step(from_bits(s["g"], shape, number), unhexed(s["lr"])) for s in found["steps"]
        ),
        None if state is None else slots_from(state, shape, number),
        found["kind"],
        found["result"],
        found.get("layout", LAYOUTS[0]),
        beside and Neighbour(
            from_bits(beside["w"], shape, number),
            tuple(from_bits(g, shape, number) for g in beside["g"]),
        ),
    )  # fmt: skip


def _generated(group: Mapping[str, Any], found: Mapping[str, Any]) -> Case:
    """The case of a test whose numbers are drawn anew."""
    flags, shape, number = tuple(found["flags"]), tuple(found["shape"]), FORMATS[group["format"]]
    draft = generated.drawn(number.name, flags, shape, found["generated"])
    settings = settings_from(group["settings"])
    case = cases.finished(found["tcId"], group["rule"], number, draft, settings)
    return replace(case, result=found["result"])


def vector_from(group: Mapping[str, Any], found: Mapping[str, Any]) -> Vector:
    """The test of an object in a vector file."""
    number, shape = FORMATS[group["format"]], found["shape"]
    if "generated" in found:
        return sampled(case_from(group, found), found["sample"], found["ulps"])
    expected = []
    for step, e in zip(found["steps"], found["expected"], strict=False):
        norms = tuple(unhexed(x) for x in step["norms"]) if "norms" in step else None
        canonical = Answer(
            from_bits(e["canonical"], shape, number), slots_from(e["slots"], shape, number)
        )
        exact, scale = (from_bits(e[name], shape, number) for name in ("exact", "scale"))
        expected.append(Expected(exact, scale, canonical, norms))  # type: ignore[arg-type]
    return Vector(case_from(group, found), tuple(expected), found["ulps"])


def sampled(case: Case, sample: Mapping[str, Any], ulps: float) -> Vector:
    """A generated test: npdrt's answers, with the exact ones in place of them where these are."""
    given = list(canonical.answers(case))
    exact = [a.w.copy() for a in given]
    for (k, i), value in zip(sample["at"], case.number.values(sample["exact"]), strict=True):
        exact[k].reshape(-1)[i] = value
    expected = zip(exact, generated.scales(case, given), given, strict=True)
    return Vector(case, tuple(Expected(*e) for e in expected), ulps)


# --- files ----------------------------------------------------------------------------------------


def read(path: Path) -> dict[str, Any]:
    """The object in a vector file. Raises `FileRefused` where its digest is not the listed one."""
    data = contents(path, follow=True)
    listed = sums(path.parent).get(path.name)
    if listed != hashlib.sha256(data).hexdigest():
        raise FileRefused(f"{path}: its SHA-256 is not that of SHA256SUMS; install npdrt again")
    found: dict[str, Any] = json.loads(data)
    return found


def sums(folder: Path = FOLDER) -> dict[str, str]:
    """SHA256SUMS: file name -> digest."""
    lines = (folder / "SHA256SUMS").read_text(encoding="ascii").splitlines()
    return {name: digest for digest, name in (line.split("  ") for line in lines)}


def groups(
    kind: str, *, rule: str | None = None, formats: Sequence[str] = tuple(FORMATS)
) -> Iterator[dict[str, Any]]:
    """The groups of a type ("OptimizerStep", "Norm", "Primitive", "TrainingStep")."""
    for name in sums():
        if rule and not name.startswith(f"{rule}_f") and not name.startswith(f"{rule}_b"):
            continue
        for group in read(FOLDER / name)["testGroups"]:
            if group["type"] == kind and group.get("format", formats[0]) in formats:
                yield group


def load(
    rule: str | None = None, formats: Sequence[str] = tuple(FORMATS), *, large: bool = True
) -> list[Vector]:
    """The vectors of updates: of one rule or all, in some formats or all; without the generated
    ones where `large` is false."""
    return [
        vector_from(group, found)
        for group in groups("OptimizerStep", rule=rule, formats=formats)
        for found in group["tests"]
        if not spared(found) and (large or "generated" not in found)
    ]


# --- prompts and responses ------------------------------------------------------------------------

ANSWERS = ("expected", "norms", "ulps", "norm", "tolerance")


def spared(test: Mapping[str, Any]) -> bool:
    """Whether a test is none of the prompts: a generated one that another one stands for."""
    return "PLAINER" in test["flags"]


def prompts(
    kinds: Sequence[str], rule: str | None = None, formats: Sequence[str] = tuple(FORMATS)
) -> dict[str, Any]:
    """Everything that is asked, and no answer: what `npdrt vectors export` writes. The numbers of
    generated tests are in it."""

    def bare(group: Mapping[str, Any], test: Mapping[str, Any]) -> dict[str, Any]:
        if "generated" in test:
            return prompt_json(case_from(group, test), drawn=True)
        kept = {k: v for k, v in test.items() if k not in ANSWERS}
        if "steps" in kept:
            steps = kept["steps"]
            kept["steps"] = [{k: v for k, v in s.items() if k not in ANSWERS} for s in steps]
        return kept

    found = [
        {**group, "tests": tests}
        for kind in kinds
        for group in groups(kind, rule=rule, formats=formats)
        if (tests := [bare(group, test) for test in group["tests"] if not spared(test)])
    ]
    return {"npdrtVectors": VERSION, "testGroups": found}


def read_response(path: Path) -> tuple[str, dict[int, Any]]:
    """The name of an implementation and its answers by tcId, from a response file.

    {"npdrtVectors": 1, "implementation": "...", "answers": [{"tcId": 1, ...}, ...]}

    Raises `FileRefused` where the file is not of that form, or answers a test twice.
    """
    require(path)
    found = schema.parse(contents(path, follow=True, limit=LIMIT), schema.Response, path)
    if found["npdrtVectors"] != VERSION:
        raise FileRefused(f'{path}: expected "npdrtVectors": {VERSION}')
    by_id: dict[int, Any] = {}
    for answer in found["answers"]:
        if answer["tcId"] in by_id:
            raise FileRefused(f"{path}: two answers to test {answer['tcId']}")
        by_id[answer["tcId"]] = answer
    return found.get("implementation", path.stem), by_id


def outcome(case: Case, answer: Any) -> Outcome:
    """The outcome in an answer: {"steps": [{"w": bits, "slots": {name: bits}}, ...]}, or
    {"error": text} where the implementation refused; None where there is no answer.

    Raises `FileRefused` where a bit pattern or a number of elements does not fit.
    """
    if answer is None:
        return Failure("missing", "no answer")
    if "error" in answer:
        return Failure("raised", str(answer["error"])[:500])
    try:
        steps = answer["steps"]
        if len(steps) != len(case.steps):
            raise FileRefused(f"expected {len(case.steps)} steps; got {len(steps)}")
        return tuple(_answer(case, step) for step in steps)
    except KeyError as error:
        raise FileRefused(
            f"test {case.id}: expected steps with w and slots; {error} is missing"
        ) from error
    except (TypeError, AttributeError, RecursionError) as error:
        raise FileRefused(
            f"test {case.id}: expected steps with w and slots; {type(error).__name__}: {error}"
        ) from error
    except FileRefused as error:
        raise FileRefused(f"test {case.id}: {error}") from error


def _answer(case: Case, step: Any) -> Answer:
    shape, number = case.w.shape, case.number
    slots = {k: from_bits(v, shape, number) for k, v in step.get("slots", {}).items() if k in SLOTS}
    return Answer(from_bits(step["w"], shape, number), slots)
