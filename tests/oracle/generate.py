"""Makes the vector files, from the root:

    python -m tests.oracle.generate [FOLDER] [--check] [--rule NAME]

Without a folder it also brings the tables in docs/ up to date (`tests.oracle.tables`). With --rule
only the files of that rule are made; the others keep their lines in SHA256SUMS. The same version
gives the same bytes on any machine. Needs mpmath (extra `test`).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import mpmath
import numpy as np

from npdrt import atomic
from npdrt.conform import generated, page
from npdrt.conform.canonical import step as by_page
from npdrt.conform.case import Answer, Case, Slots
from npdrt.conform.cases import FLAGS
from npdrt.conform.encoding import settings_json
from npdrt.conform.formats import FORMATS, Values
from npdrt.conform.judge import accepted, ulps_away
from npdrt.conform.rules import RULES, run
from npdrt.conform.vectors import (
    FOLDER,
    VERSION,
    Expected,
    Vector,
    sampled,
    sums,
    vector_json,
)
from npdrt.errors import Diverged

from . import norms, primitives, schema, steps, tables
from .cases import cases
from .dual import reals, rounded

BITS = 400  # precision of the exact answers: products of extreme numbers keep 200 good bits
NUMBERS = {"norms": 100_000, "primitives": 200_000, "steps": 300_000}  # first tcId, less one


# --- answers --------------------------------------------------------------------------------------


def mp_context() -> Any:
    """mpmath with a precision of its own.

    Before it leaves a product with an array to the array, mpmath tries to convert the array and
    prints it into the error. That takes longer than all the arithmetic, so arrays are told first.
    """
    context = mpmath.mp.clone()
    context.prec = BITS
    convert = context.npconvert

    def npconvert(x: Any) -> Any:
        if hasattr(x, "__setitem__"):  # as arrays have, and NumPy's numbers have not
            raise TypeError("an array is not a number")
        return convert(x)

    context.npconvert = npconvert
    return context


def exact(case: Case, context: Any) -> list[tuple[Values, Values]]:
    """The parameter after every step, and the scale, in real arithmetic, rounded once."""

    def down(x: Any) -> Values:
        return rounded(np.broadcast_to(np.asarray(x, dtype=object), case.w.shape), case.number)

    found = run(RULES[case.rule], {}, case, partial(reals, context=context))
    return [(down(e.w), down(e.scale)) for e in found]


def sample(case: Case, context: Any) -> dict[str, Any]:
    """The exact elements of a generated case that are stored. Where elements do not know of each
    other, no other is computed."""
    at = generated.sample(case.w.shape, len(case.steps))
    place, few = {i: i for _, i in at}, case
    if not RULES[case.rule].takes_norms:
        part = sorted(place)
        place = {i: k for k, i in enumerate(part)}
        steps = tuple(replace(s, g=s.g.reshape(-1)[part]) for s in case.steps)
        few = replace(case, w=case.w.reshape(-1)[part], steps=steps)
    found = run(RULES[case.rule], {}, few, partial(reals, context=context))
    values = [found[k].w.reshape(-1)[place[i]] for k, i in at]
    return {"at": at, "exact": case.number.bits(rounded(values, case.number))}


def canonical(case: Case) -> Iterator[tuple[Answer, tuple[float, float] | None]]:
    """The answer of docs/updates.md after every step, and the norms before it."""
    state: dict[str, Any] = {"step": 0}
    for name, value in (case.state or {}).items():
        state[name] = value.reshape(-1).tolist() if np.ndim(value) else value
    w = case.w.reshape(-1).tolist()
    for step in case.steps:
        g = step.g.reshape(-1).tolist()
        sizes = (page.norm(w), page.norm(g)) if RULES[case.rule].takes_norms else None
        w = by_page(
            case.rule, w, g, state, step.lr, case.format, shape=case.w.shape, **case.settings
        )
        slots: Slots = {
            k: np.reshape(v, case.w.shape) if isinstance(v, list) else v for k, v in state.items()
        }
        yield Answer(np.reshape(w, case.w.shape), slots), sizes


def answered(case: Case, context: Any) -> Vector:
    """The test of a case. Where the published sequence itself, in this dtype, is further from the
    exact answer than a right implementation may be, the test is acceptable, not gated."""
    if case.generated:
        test = sampled(case, sample(case, context), accepted(case))
        return gated(test, [e.canonical for e in test.expected])
    case = with_scalars(case)
    if case.result == "error":
        return Vector(case, (), 0.0)
    sequence = list(canonical(case))
    try:
        real = exact(case, context)
    except ZeroDivisionError:  # IEEE has an answer, the real numbers have none
        real = [(a.w, np.abs(a.w)) for a, _ in sequence]
        case = replace(case, result="acceptable")
    expected = tuple(
        Expected(w, scale, answer, sizes)
        for (w, scale), (answer, sizes) in zip(real, sequence, strict=True)
    )
    return gated(Vector(case, expected, accepted(case)), [a for a, _ in sequence])


def gated(test: Vector, published: list[Answer]) -> Vector:
    """The test, acceptable where the published answers are too far from the exact ones."""
    if ulps_away(test, published) > test.ulps:
        return replace(test, case=replace(test.case, result="acceptable"))
    return test


def with_scalars(case: Case) -> Case:
    """The case with the scalars that its state has after so many steps."""
    if case.state is None:
        return case
    scalars = RULES[case.rule].scalars(case.state["step"], case.settings)
    return replace(case, state={**case.state, **scalars})


# --- files ----------------------------------------------------------------------------------------


def update_files(only: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """A file a rule and format."""
    context = mp_context()
    files: dict[tuple[str, str], list[Case]] = {}
    for case in chain(cases(), generated.cases()):
        if case.rule in only:
            files.setdefault((case.rule, case.format), []).append(case)
    for (rule, form), found in files.items():
        tests = [answered(case, context) for case in found]
        yield (
            f"{rule}_{form}",
            document(
                f"Updates of {rule} in {form}; rules: docs/updates.md",
                update_groups(rule, form, tests),
                {flag: FLAGS[flag] for flag in sorted({f for t in tests for f in t.case.flags})},
            ),
        )


def update_groups(rule: str, form: str, tests: list[Vector]) -> list[dict[str, Any]]:
    """The tests by their settings."""
    by_settings: dict[str, dict[str, Any]] = {}
    for test in tests:
        settings = settings_json(test.case.settings)
        group = {
            "type": "OptimizerStep",
            "rule": rule,
            "dialect": "published",
            "format": form,
            "settings": settings,
            "scalars": "float64, rounded once to the format",
            "accumulation": "float64",
            "tests": [],
        }
        key = json.dumps(settings)
        by_settings.setdefault(key, group)["tests"].append(vector_json(test))
    return list(by_settings.values())


def document(
    title: str, groups: list[dict[str, Any]], flags: dict[str, tuple[str, str]]
) -> dict[str, Any]:
    """A vector file."""
    return {
        "npdrtVectors": VERSION,
        "title": title,
        "numberOfTests": sum(len(group["tests"]) for group in groups),
        "notes": {f: {"bugType": bug, "description": text} for f, (bug, text) in flags.items()},
        "testGroups": groups,
    }


def numbered(groups: list[dict[str, Any]], first: int) -> list[dict[str, Any]]:
    """The groups with tcIds from first + 1 on."""
    for group in groups:
        for test in group["tests"]:
            first += 1
            test["tcId"] = first
    return groups


def all_files() -> dict[str, bytes]:
    """Every file by its name, SHA256SUMS last."""
    documents = dict(update_files(list(RULES)))
    documents |= {name: of_module(name) for name in ("norms", "primitives", "steps")}
    found = {f"{name}.json": text(content) for name, content in documents.items()}
    return {**found, "SHA256SUMS": listed({n: digest(data) for n, data in found.items()})}


def of_module(name: str) -> dict[str, Any]:
    """The document of the norms, the primitives or the training steps."""
    module: Any = {"norms": norms, "primitives": primitives, "steps": steps}[name]
    return document(str(module.TITLE), numbered(module.groups(), NUMBERS[name]), module.FLAGS)


def files_of(rule: str) -> dict[str, bytes]:
    """The files of one rule, the training steps, which have one of every rule, and SHA256SUMS with
    those of the others as they are."""
    documents = {**dict(update_files([rule])), "steps": of_module("steps")}
    found = {f"{name}.json": text(content) for name, content in documents.items()}
    digests = sums() | {name: digest(data) for name, data in found.items()}
    order = [f"{name}_{form}.json" for name in RULES for form in FORMATS]
    names = sorted(digests, key=lambda n: order.index(n) if n in order else len(order))
    return {**found, "SHA256SUMS": listed({name: digests[name] for name in names})}


def digest(data: bytes) -> str:
    """The SHA-256 of a file."""
    return hashlib.sha256(data).hexdigest()


def listed(digests: dict[str, str]) -> bytes:
    """SHA256SUMS."""
    return "".join(f"{value}  {name}\n" for name, value in digests.items()).encode()


def text(content: dict[str, Any]) -> bytes:
    """JSON with one test a line, so that a change can be read."""
    groups, head = content["testGroups"], {k: v for k, v in content.items() if k != "testGroups"}
    parts = []
    for group in groups:
        bare = json.dumps({k: v for k, v in group.items() if k != "tests"})
        tests = ",\n".join(json.dumps(t, separators=(",", ":")) for t in group["tests"])
        parts.append(f'{bare[:-1]}, "tests": [\n{tests}]}}')
    opening = json.dumps(head, indent=1)[:-2]
    body = ",\n".join(parts)
    return f'{opening},\n "testGroups": [\n{body}]}}\n'.encode()


def main(arguments: Sequence[str]) -> None:
    """Write the files, or with --check compare them with those that are there."""
    parser = argparse.ArgumentParser(prog="python -m tests.oracle.generate", allow_abbrev=False)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--rule", choices=list(RULES))
    given = parser.parse_args(arguments)
    folder, found = given.folder or FOLDER, files_of(given.rule) if given.rule else all_files()
    found |= {schema.NAME: schema.text()}
    pages = (
        {} if given.folder else {tables.DOCS / n: tables.page(n).encode() for n in tables.TABLES}
    )
    found = {folder / name: data for name, data in found.items()} | pages
    if given.check:
        odd = [path.name for path, data in found.items() if not same(path, data)]
        if odd:
            raise Diverged(f"{folder}: not what is generated: {', '.join(odd)}")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        for path, data in found.items():
            atomic.replace(path, data)
    print(f"{folder}: {len(found)} files, {sum(map(len, found.values())):,} bytes")


def same(path: Path, data: bytes) -> bool:
    """Whether the file holds these bytes."""
    return path.is_file() and path.read_bytes() == data


if __name__ == "__main__":
    main(sys.argv[1:])
