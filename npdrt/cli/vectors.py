"""`npdrt vectors`."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import click

from npdrt import atomic
from npdrt.cli.audit import html_option, junit_option, rule_name, write
from npdrt.cli.common import Name, answer, check_outputs, echo, json_option, table
from npdrt.conform import report, vectors, verify
from npdrt.conform.formats import FORMATS
from npdrt.errors import Error

KINDS = ("OptimizerStep", "Norm", "Primitive", "TrainingStep")
rule_option = click.option(
    "--rule", type=rule_name, help="Updates of this rule alone.  [default: all]"
)
format_option = click.option(
    "--format",
    "formats",
    type=Name(list(FORMATS)),
    multiple=True,
    help="This number format alone; may be repeated.  [default: all]",
)
force_option = click.option("--force", is_flag=True, help="Replace files that exist.")


@click.group("vectors")
def command() -> None:
    """Conformance vectors: tests with exact answers, for implementations in any language.

    Export the prompts, answer them, verify the response (docs/vectors.md).
    """


# --- list -----------------------------------------------------------------------------------------


@command.command("list")
@json_option
def list_files(as_json: bool) -> None:
    """The vector files: how many tests of what, and whether they are whole.

    Exit code 1 where a file is missing or is not the one that npdrt came with.
    """
    rows = [_described(name, digest) for name, digest in vectors.sums().items()]
    whole = all(row["sha256_ok"] for row in rows)
    total = sum(row["tests"] for row in rows)
    found = {"version": vectors.VERSION, "tests": total, "whole": whole, "files": rows}
    answer(as_json, found, lambda: _listing(rows))
    if not whole:
        raise SystemExit(1)


def _described(name: str, digest: str) -> dict[str, Any]:
    """A file, by what is in it."""
    path = vectors.FOLDER / name
    data = path.read_bytes() if path.is_file() else b""
    row: dict[str, Any] = {"file": name, "sha256": digest}
    row["sha256_ok"] = hashlib.sha256(data).hexdigest() == digest
    groups = json.loads(data)["testGroups"] if row["sha256_ok"] else []
    for key, field in (("types", "type"), ("rules", "rule"), ("formats", "format")):
        row[key] = list(dict.fromkeys(g[field] for g in groups if field in g))
    tests = [(group, test) for group in groups for test in group["tests"]]
    row["tests"] = len(tests)
    row["levels"] = dict(Counter(_level(group["type"], test) for group, test in tests))
    return row


def _level(kind: str, test: dict[str, Any]) -> str:
    """The level that a test is of."""
    if test["result"] != "valid":
        return "informative"
    if kind == "OptimizerStep":
        steps = test["generated"] if "generated" in test else len(test["steps"])
        return "C1" if steps == 1 else "C3"
    return verify.LEVELS[kind]


def _listing(rows: list[dict[str, Any]]) -> str:
    lines = [("file", "tests", "of these", "sha256")]
    for row in rows:
        levels = ", ".join(f"{n} {level}" for level, n in sorted(row["levels"].items()))
        whole = "ok" if row["sha256_ok"] else "missing or changed"
        lines.append((row["file"], str(row["tests"]), levels, whole))
    total = sum(row["tests"] for row in rows)
    return f"{table(lines)}\n\nversion {vectors.VERSION}, {total} tests, {vectors.FOLDER}"


# --- export ---------------------------------------------------------------------------------------


@command.command("export")
@click.argument("out", type=click.Path(path_type=Path))
@rule_option
@format_option
@click.option(
    "--as",
    "form",
    type=Name(["prompt", "full"]),
    default="prompt",
    help="Without answers, or the files as they are.  [default: prompt]",
)
@force_option
def export(out: Path, rule: str | None, formats: tuple[str, ...], form: str, force: bool) -> None:
    """Write the tests to OUT: one file of prompts, or a folder of vector files (--as full).

    The folder has SHA256SUMS of its files and their JSON Schema, schema.json.
    """
    if form == "prompt":
        check_outputs(force, out)
        found = _prompts(rule, formats)
        atomic.replace(out, json.dumps(found).encode())
        count = sum(len(group["tests"]) for group in found["testGroups"])
        echo(f"{out}: {report.counted(count, 'test')}")
    else:
        files = _files(rule, formats)
        check_outputs(force, *(out / name for name in files) if out.exists() else ())
        out.mkdir(exist_ok=True)
        for name, data in files.items():
            atomic.replace(out / name, data)
        echo(f"{out}: {report.counted(len(files), 'file')}")


def _prompts(rule: str | None, formats: tuple[str, ...]) -> dict[str, Any]:
    """The prompts of a rule, or of everything, in some formats, or all."""
    kinds = ("OptimizerStep",) if rule else KINDS
    found = vectors.prompts(kinds, rule, formats or tuple(FORMATS))
    groups = []
    for group in found["testGroups"]:
        if formats and "format" not in group:
            some = [test for test in group["tests"] if verify.format_of(test) in formats]
            group = {**group, "tests": some}
        groups += [group] if group["tests"] else []
    return {**found, "testGroups": groups}


def _files(rule: str | None, formats: tuple[str, ...]) -> dict[str, bytes]:
    """The vector files that hold such tests, with their digests and their schema."""
    listed = {}
    for name, digest in vectors.sums().items():
        groups = vectors.read(vectors.FOLDER / name)["testGroups"]
        if any(verify.wanted(group, rule, formats) for group in groups):
            listed[name] = digest
    if not listed:
        raise Error("no vector file has such tests")
    lines = "".join(f"{digest}  {name}\n" for name, digest in listed.items())
    files = {name: (vectors.FOLDER / name).read_bytes() for name in (*listed, "schema.json")}
    return {**files, "SHA256SUMS": lines.encode()}


# --- verify ---------------------------------------------------------------------------------------


@command.command("verify")
@click.argument("response", type=click.Path(path_type=Path, dir_okay=False))
@rule_option
@format_option
@html_option
@junit_option
@force_option
@json_option
def verify_response(
    response: Path, rule: str | None, formats: tuple[str, ...], html: Path | None,
    junit: Path | None, force: bool, as_json: bool,
) -> None:  # fmt: skip
    """Judge the answers in RESPONSE by level; name the dialect of rules that do not agree.

    A group of tests that it does not touch is not attempted, which is no fault; of a group that
    it touches, every valid test must be answered. With --rule or --format those must be answered
    in full, and other answers are not looked at.

    Exit code 0 where every answer holds and none is missing, 1 where not, 3 where the file or an
    answer is malformed.

    \b
    --json prints one object:
      name, passes, sentence
      rules          a list, one a rule: as npdrt audit --json prints
      checked        a list: norms, primitives and training steps
      missing, not_attempted, ignored, versions
    """
    check_outputs(force, html, junit)
    found = verify.verify(response, rule, formats)
    write(html, lambda: report.html(found))
    write(junit, lambda: report.junit(found))
    answer(as_json, report.as_json(found), lambda: report.text(found))
    if not found.passes:
        raise SystemExit(1)
