"""The report of an equivalence, as a document and as JSON.

Its words are those of the MLPerf Training rules, section "Hyperparameters": whoever uses an
alternate implementation of an optimizer describes its equation and demonstrates its equivalence
with an approved one.
"""

from __future__ import annotations

from typing import Any

from npdrt.conform.audit import Audit
from npdrt.conform.equivalence import Equivalence, Evidence
from npdrt.conform.report.document import Code, Document, Row, Section, Table
from npdrt.conform.report.verdict import environment, number, sentence
from npdrt.conform.rules import RULES
from npdrt.plain import counted, line

SHOWN = 6  # excluded alternatives that a cell names


def document(found: Equivalence) -> Document:
    """The report as a document."""
    lines = [f"{verdict(found)}.", f"{sentence(found.a)}.", f"{sentence(found.b)}."]
    parts = [_equation(found)]
    if found.pairs:
        parts.append(_distances(found))
    if found.evidence:
        parts.append(_clauses(found))
    parts += [_asked(found), _environment(found)]
    return Document(f"Equivalence of {found.name}", lines, sections=parts, passes=found.passes)


def verdict(found: Equivalence) -> str:
    """The verdict in one line without a full stop."""
    a, b = line(found.a.name), line(found.b.name)
    tests = counted(len(found.pairs), "test")
    match found.verdict:
        case "equivalent to the bit":
            return f"Equivalence of {a} with {b} is demonstrated, to the bit: {tests}"
        case "equivalent":
            most = max(row.ulps for row in found.distances)
            odd = ", ".join(map(_code, found.arithmetic))
            return (
                f"Equivalence of {a} with {b} is demonstrated: one equation explains the answers "
                f"of both to {tests}; they are at most {number(most)} ulps apart"
                f"{'; their arithmetic differs in ' + odd if odd else ''}"
            )
        case "not equivalent":
            odd = ", ".join(map(_code, found.different))
            return f"{a} is not equivalent to {b}: they differ in {odd}"
    return f"Equivalence of {a} with {b} is not shown: no rule explains the answers of both"


def _code(name: str) -> str:
    return f"`{name}`"


def _equation(found: Equivalence) -> Section:
    """The published equation, and where the implementations differ from it."""
    rows: list[Row] = [("the published equation",), *((Code(row),) for row in found.equation)]
    source = RULES[found.rule].dialects[0].source
    return Section("Equation", [f"The optimizer's equation, of {found.rule}. Source: {source}"],
                   [Table("The published equation", rows)])  # fmt: skip


def _distances(found: Equivalence) -> Section:
    rows: list[Row] = [("format", "tests", "same bits", "most apart, ulps", "at")]
    for row in found.distances:
        at = "" if row.at is None else f"test {row.at}"
        rows.append((row.format, row.total, row.same, number(row.ulps), at))
    caption = "Tests that both answered, and their distance from each other"
    note = "Distances are in ulps at the scale of the operands of the last sum."
    return Section("Answers", blocks=[Table(caption, rows, (1, 2, 3)), note])


def _clauses(found: Equivalence) -> Section:
    """Every clause with its evidence."""
    texts = RULES[found.rule].clauses
    rows: list[Row] = [("clause", "alternate", "approved", "meaning", "excludes, by test", "open")]
    for clause, (a, b) in found.evidence.items():
        shared = a.found == b.found
        meaning = texts[clause][a.found] + ("" if shared else f"; {texts[clause][b.found]}")
        open_ = ", ".join(dict.fromkeys((*a.open, *b.open)))
        rows.append((clause, a.found, b.found, meaning, _excluded(a, b), open_))
    caption = "Clauses of the equation, and the smallest test that excludes each other alternative"
    notes = [
        "alternate: the implementation that is compared; approved: the one to compare it with.",
        "open: alternatives that these tests cannot tell from the one found, for one of the two.",
    ]
    return Section("Clauses", blocks=[Table(caption, rows), *notes])


def _excluded(a: Evidence, b: Evidence) -> str:
    """The alternatives that the answers of both exclude, with the smallest test for each."""
    both = [(name, test) for name, test in a.excluded.items() if name in b.excluded]
    shown = [f"{name}: {test}" for name, test in both[:SHOWN]]
    return "; ".join(shown) + (f"; {len(both) - SHOWN} more" if len(both) > SHOWN else "")


def _asked(found: Equivalence) -> Section:
    lines = []
    for audit in (found.a, found.b):
        for why, n in audit.skipped.items():
            lines.append(f"not asked of {audit.name}: {counted(n, 'test')}: {why}")
    only = len(found.a.gated) + len(found.b.gated) - 2 * len(found.pairs)
    lines.append(f"answered by one of the two only: {counted(only, 'test')}")
    return Section("Not compared", lines)


def _environment(found: Equivalence) -> Section:
    rows: list[Row] = [("file of vectors", "SHA-256")]
    rows += [(name, Code(digest)) for name, digest in found.digests.items()]
    versions = (f"{name} {version}" for name, version in _versions(found).items())
    table = Table("Digests of the vectors", rows)
    return Section("Versions and vectors", [", ".join(versions)], [table])


def _versions(found: Equivalence) -> dict[str, str]:
    return environment({**found.a.versions, **found.b.versions})


def as_json(found: Equivalence) -> dict[str, Any]:
    """The report as one object; the clauses with every alternative that the tests exclude."""
    return {
        "name": line(found.name),
        "rule": found.rule,
        "verdict": found.verdict,
        "passes": found.passes,
        "sentence": verdict(found),
        "equation": found.equation,
        "implementations": [_of(found.a), _of(found.b)],
        "different": found.different,
        "arithmetic": found.arithmetic,
        "clauses": {
            clause: [{**vars(side), "open": list(side.open)} for side in both]
            for clause, both in found.evidence.items()
        },
        "answers": [vars(row) for row in found.distances],
        "vectors": found.digests,
        "versions": {k: line(v) for k, v in _versions(found).items()},
    }


def _of(audit: Audit) -> dict[str, Any]:
    return {
        "name": line(audit.name),
        "verdict": audit.verdict,
        "sentence": sentence(audit),
        "choices": dict(audit.finding.choices or {}),
        "tests": len(audit.gated),
        "not_asked": {line(why): n for why, n in audit.skipped.items()},
    }
