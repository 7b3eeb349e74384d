"""The document of an audit or a verification."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import numpy as np

from npdrt.conform.audit import Audit
from npdrt.conform.case import USES, Answer
from npdrt.conform.cases import FLAGS
from npdrt.conform.formats import Format
from npdrt.conform.judge import Judged, errors_of
from npdrt.conform.report.document import Block, Code, Document, Mark, Plot, Row, Section, Table
from npdrt.conform.report.verdict import (
    Found,
    clauses,
    environment,
    number,
    passes,
    sentence,
    smallest,
    title,
)
from npdrt.conform.verify import LEVELS, Checked, Verification
from npdrt.plain import counted

LEGEND = (
    "C0: the bits of docs/updates.md. C1: one step, within a few ulps of the exact answer. "
    "C3: many steps, each within a few ulps more."
)
KEY = (
    "Each mark is a test, placed by its first flag; the error is in ulps at the scale of the "
    "operands. Filled: gated and within the accepted error (line). Cross: gated and beyond it. "
    "Ring: not gated. Point at a mark to see its test."
)
FEW = 25  # failing tests that a page shows without being asked
SOME = 5  # failing norms, primitives and training steps that are named
ELEMENTS = 12  # elements of an array that are shown
SMALLEST = "Smallest disagreeing test"
WHOLE = {"norm": "norms", "primitive": "primitives", "training": "training steps"}


def report(found: Found, dialect: str | None = None) -> Document:
    """The report as a document; dialect: the one that was asked for."""
    if isinstance(found, Verification):
        return _of_response(found)
    return Document(
        f"{found.name} against {found.rule}",
        _lines(found, dialect),
        sections=[*_sections(found, [LEGEND]), _environment(found.versions)],
        passes=passes(found, dialect),
    )


def _of_response(found: Verification) -> Document:
    rules = [Section(a.rule, _lines(a), sections=_sections(a)) for a in found.audits]
    checked = [_checked(found.checked)] if found.checked else []
    return Document(
        f"Response of {found.name}",
        [f"{sentence(found)}.", *([LEGEND] if rules else [])],
        sections=[*rules, *checked, *_unanswered(found), _environment({})],
        passes=found.passes,
    )


def _environment(versions: dict[str, str]) -> Section:
    found = (f"{name} {version}" for name, version in environment(versions).items())
    return Section("Environment", [", ".join(found)])


# --- an audit -------------------------------------------------------------------------------------


def _lines(audit: Audit, asked: str | None = None) -> list[str]:
    """The verdict, the source of the dialect, and the dialects that it may also be."""
    finding, lines = audit.finding, [f"{sentence(audit)}."]
    dialect = finding.dialect
    if asked and passes(audit, asked):
        lines.append(f"accepted as the dialect that was asked for: {asked}")
    elif asked:
        lines.append(f"it is not the dialect that was asked for: {asked}")
    if dialect is not None and dialect.choices and audit.verdict != "no verdict":
        closest = f"closest to {dialect.name}; " if audit.verdict == "deviates" else ""
        note = f" ({dialect.note})" if dialect.note else ""
        lines.append(f"{closest}source: {dialect.source}{note}")
    if finding.indistinguishable and audit.verdict != "no verdict":
        lines.append(f"these tests cannot tell it from: {', '.join(finding.indistinguishable)}")
    return lines


def _sections(audit: Audit, legend: Sequence[str] = ()) -> list[Section]:
    """The sections about an audit, without those that have nothing to show."""
    makers = (_clauses, _smallest, _failing, _flags, _not_gated)
    gated = [_levels(audit, legend), _errors(audit)] if audit.gated else []
    return [*gated, *(section for make in makers for section in make(audit))]


def _levels(audit: Audit, legend: Sequence[str]) -> Section:
    rows: list[Row] = [("level", "format", "passed", "worst, ulps", "at")]
    for row in audit.levels():
        worst = ("", "")
        if row.worst is not None:
            worst = (number(row.worst.worst.ulps), title(row.worst.test.case))
        rows.append((row.level, row.format, f"{row.passed} of {row.total}", *worst))
    table = Table("Gated tests that pass, by level and format", rows, numbers=(2, 3))
    return Section("Levels", blocks=[table, *legend])


def _errors(audit: Audit) -> Section:
    formats = dict.fromkeys(j.test.case.format for j in audit.judged)
    return Section("Error of every test", more=[KEY, *(_plot(audit, form) for form in formats)])


def _plot(audit: Audit, form: str) -> Block:
    """The errors of all tests of one format."""
    asked = [j for j in audit.judged if j.test.case.format == form]
    answered = [j for j in asked if j.answers and j.test.expected]
    if not answered:
        return f"{form}: no answer to plot."
    ordered = sorted(answered, key=lambda j: (_order(_first_flag(j)), j.test.case.id))
    groups = {flag: [_mark(j) for j in some] for flag, some in groupby(ordered, key=_first_flag)}
    gated = [j for j in ordered if j.gated]
    summary = (
        f"{form}: error of {counted(len(ordered), 'test')}; {sum(not j.accurate for j in gated)} "
        f"of {len(gated)} gated tests beyond the accepted error"
    )
    return Plot(form, summary, groups)


def _mark(j: Judged) -> Mark:
    case, error = j.test.case, j.worst.ulps
    hint = f"test {case.id}, {case.comment} ({', '.join(case.flags)}): {number(error)} ulps"
    return Mark(error, j.test.ulps, j.gated, j.accurate, hint)


def _first_flag(j: Judged) -> str:
    return j.test.case.flags[0]


def _order(flag: str) -> int:
    names = [*FLAGS, *USES]
    return names.index(flag) if flag in names else len(names)


def _clauses(audit: Audit) -> list[Section]:
    found = clauses(audit)
    if not found or audit.verdict == "no verdict":
        return []
    rows: list[Row] = [("clause", "published", "found", "")]
    for c in found:
        note = "arithmetic, not rule" if c.arithmetic else "not of the dialect" if c.beyond else ""
        pair = (f"{c.published}: {c.published_text}", f"{c.found}: {c.found_text}")
        rows.append((c.name, *pair, note))
    return [Section("Clauses", more=[Table("Differences from the published rule", rows)])]


def _smallest(audit: Audit) -> list[Section]:
    judged = smallest(audit)
    blocks = elements(judged) if judged is not None else []
    if judged is None or not blocks:
        return []
    if parting := audit.finding.parting:
        pair = f"{_values(parting.found)}; published: {_values(parting.published)}"
        blocks.append(f"first difference: {parting.label} is {pair}")
    lines = [f"smallest disagreeing test: {named(judged)}"]
    return [Section(SMALLEST, lines, blocks)]


def _failing(audit: Audit) -> list[Section]:
    odd = [j for j in audit.gated if not j.accurate]
    table = _tests(odd, "Gated tests that fail", opened=len(odd) <= FEW)
    return [Section("Failing tests", more=[table])] if odd else []


def _tests(judged: Sequence[Judged], caption: str, opened: bool = False) -> Table:
    """Tests that do not hold, with the fault of each."""
    rows: list[Row] = [("test", "format", "flags", "comment", "found")]
    for j in judged:
        case = j.test.case
        rows.append((case.id, case.format, ", ".join(case.flags), case.comment, wrong(j)))
    return Table(caption, rows, (0,), counted(len(judged), "test"), opened)


def _flags(audit: Audit) -> list[Section]:
    tests: dict[str, list[bool]] = {}  # flag -> whether each of its tests holds
    for j in audit.gated:
        for flag in j.test.case.flags:
            tests.setdefault(flag, []).append(j.accurate)
    rows: list[Row] = [("flag", "held", "tests", "what is tested")]
    for flag in sorted(tests, key=_order):
        held, total = sum(tests[flag]), len(tests[flag])
        rows.append((flag, held, total, ({**FLAGS, **USES}).get(flag, ("", ""))[1]))
    table = Table("Gated tests within the accepted error", rows, (1, 2))
    return [Section("By flag", more=[table])] if tests else []


def _not_gated(audit: Audit) -> list[Section]:
    """Tests that were not asked or not gated, and state that differs from the published one."""
    lines = [f"not asked: {counted(n, 'test')}: {why}" for why, n in audit.skipped.items()]
    odd = audit.not_gated()
    if odd:
        flags = Counter(" ".join(j.test.case.flags) for j in odd)
        counts = ", ".join(f"{flag} {n}" for flag, n in flags.most_common())
        lines.append(f"not gated, and other than expected: {counted(len(odd), 'test')}: {counts}")
    slots = Counter(slot for j in audit.gated if j.accurate for slot in j.slots)
    if slots and audit.verdict == "agrees to the bit":
        counts = ", ".join(f"{slot} {n}" for slot, n in slots.items())
        lines.append(f"the optimizer state differs: {counts}")
    more = [_tests(odd, "Tests that only inform")] if odd else []
    return [Section("Not asked, not gated", lines, more=more)] if lines else []


# --- one test -------------------------------------------------------------------------------------


def named(judged: Judged) -> str:
    """The number, the comment and the flags of a test."""
    case = judged.test.case
    return f"{case.id}, {case.comment} ({', '.join(case.flags)})"


def wrong(judged: Judged) -> str:
    """The fault of a test in one line."""
    if judged.failure is not None:
        return f"{judged.failure.kind}: {judged.failure.message}"
    if not judged.test.expected:
        return "it was answered and should have been refused"
    worst, form = judged.worst, judged.test.case.number
    pair = judged.test.expected[worst.step].exact, judged.answers[worst.step].w
    exact, got = (form.bits(np.asarray(a).reshape(-1)[worst.index]) for a in pair)
    return (
        f"{number(worst.ulps)}{' ulps' if math.isfinite(worst.ulps) else ''}, accepted "
        f"{number(judged.test.ulps)}: element {worst.index} after step {worst.step + 1}: "
        f"expected bits {exact}, got {got}"
    )


def elements(judged: Judged) -> list[str | Table]:
    """The first step of a test that is beyond the accepted error, or else that with the largest
    error: what is known of it, and its elements with the largest errors; [] without an answer."""
    if not (judged.answers and judged.test.expected):
        return []
    errors = errors_of(judged.test, judged.answers)
    worst = [float(np.max(e, initial=0.0)) for e in errors]
    limit = judged.test.ulps
    k = next((i for i, most in enumerate(worst) if most > limit), int(np.argmax(worst)))
    kept = sorted(np.argsort(-errors[k], kind="stable")[:ELEMENTS].tolist())
    columns = _columns(judged, k, errors[k], kept)
    numbers = [i for i, head in enumerate(columns) if i and not head.startswith("bits")]
    rows = [tuple(columns), *zip(*columns.values(), strict=True)]
    table = Table("Its elements, before and after the step", rows, numbers)
    hidden = judged.test.case.w.size - len(kept)
    more = [f"... {counted(hidden, 'element')} more"] if hidden else []
    return [_about(judged, k), table, *more]


def _about(judged: Judged, k: int) -> str:
    """What a reader needs to know to repeat step k."""
    case = judged.test.case
    done = (case.state or {}).get("step", 0) + k
    about = {
        "kind": case.kind if case.kind != "weight" else "",
        "format": case.format,
        "shape": str(list(case.w.shape)),
        "layout": case.layout if case.layout != "C" else "",
        "next to it": "another tensor in the same optimizer" if case.neighbour else "",
        "settings": ", ".join(f"{name} = {value}" for name, value in case.settings.items()),
        "step": f"{k + 1} of {len(case.steps)}, {done} before it",
        "lr": repr(case.steps[k].lr),
        "accepted": f"{number(judged.test.ulps)} ulps at the scale of the operands",
    }
    return "; ".join(f"{name} {value}" for name, value in about.items() if value)


def _columns(judged: Judged, k: int, errors: Any, kept: list[int]) -> dict[str, Sequence[str]]:
    """Head -> cells of some elements: the input of a step, the expected output and the answer."""
    case, form = judged.test.case, judged.test.case.number
    before = (Answer(case.w, case.state or {}), *judged.answers)

    def cells(values: Any) -> list[str]:
        return [_decimal(x, form) for x in np.asarray(values).reshape(-1)[kept].tolist()]

    def bits(values: Any) -> list[Code]:
        return [Code(form.bits(x)) for x in np.asarray(values).reshape(-1)[kept]]

    def place(i: int) -> str:
        return "[" + ",".join(str(int(x)) for x in np.unravel_index(i, case.w.shape)) + "]"

    slots = {
        n: v for n, v in before[k].slots.items() if np.shape(v) == case.w.shape and n != "step"
    }
    exact, got = judged.test.expected[k].exact, judged.answers[k].w
    return {
        "element": [place(i) for i in kept],
        "w": cells(before[k].w),
        "g": cells(case.steps[k].g),
        **{name: cells(value) for name, value in slots.items()},
        "expected": cells(exact),
        "bits expected": bits(exact),
        "got": cells(got),
        "bits got": bits(got),
        "ulps": [number(errors[i]) for i in kept],
    }


def _decimal(value: float, form: Format) -> str:
    """The shortest decimal that names a number of a format."""
    if form.name == "bfloat16":
        return f"{value:.4g}"
    with np.errstate(all="ignore"):
        return str(np.dtype(form.name).type(value))


def _values(value: Any) -> str:
    """A named value of an evaluation: a number, or the first few of an array."""
    flat = np.asarray(value, dtype=np.float64).reshape(-1)
    text = ", ".join(f"{x:.9g}" for x in flat[:6])
    return text if np.ndim(value) == 0 else f"[{text}{', ...' if flat.size > 6 else ''}]"


# --- a verification -------------------------------------------------------------------------------


def _checked(checked: Sequence[Checked]) -> Section:
    """The gated answers to norms, primitives and training steps."""
    gated = [c for c in checked if c.gated]
    odd = [failed(c) for c in gated if not c.passed]
    more = [f"... {len(odd) - SOME} more"] if len(odd) > SOME else []
    caption = "Gated tests within their tolerance"
    return Section(
        "Norms, primitives, training steps",
        blocks=[_groups(gated, caption, each=False), *odd[:SOME], *more],
        more=[_groups(gated, f"{caption}, by operation and rule", each=True)],
    )


def _groups(checked: Sequence[Checked], caption: str, *, each: bool) -> Table:
    """each: a row for every operation and rule; else one for every kind and format."""
    groups: dict[tuple[str, str], list[Checked]] = {}
    for c in checked:
        word, _, rest = c.group.partition(" ")
        whole = f"{WHOLE[word]} {rest.rpartition(' ')[2]}"
        level = LEVELS[c.kind] if c.kind == "Norm" else ""
        groups.setdefault((level, c.group if each else whole), []).append(c)
    rows: list[Row] = [("level", "group", "passed", "worst, tolerances", "at")]
    for names, some in groups.items():
        worst = max(some, key=lambda c: c.ratio)
        held = f"{sum(c.passed for c in some)} of {len(some)}"
        rows.append((*names, held, number(worst.ratio), f"test {worst.id}"))
    return Table(caption, rows, (2, 3))


def failed(c: Checked) -> str:
    """The fault of an answer to a norm, a primitive or a training step."""
    fault = f"refused: {c.error}" if c.error else f"{c.where}, {number(c.ratio)} tolerances"
    return f"{c.group}, test {c.id} ({c.comment}): {fault}"


def _unanswered(found: Verification) -> list[Section]:
    lines, more = [], []
    if found.missing:
        groups = Counter(m.group for m in found.missing)
        counts = ", ".join(f"{group} {n}" for group, n in groups.items())
        tests, first = counted(len(found.missing), "test"), found.missing[0]
        lines.append(f"no answer to {tests}: {counts}; first: test {first.id} ({first.comment})")
        rows = [("test", "group", "comment"), *((m.id, m.group, m.comment) for m in found.missing)]
        more = [Table(f"{tests} without an answer", rows, (0,))]
    if found.not_attempted:
        rest = sum(found.not_attempted.values())
        lines.append(f"not attempted: {counted(rest, 'test')}: {', '.join(_attempts(found))}")
    if found.ignored:
        lines.append(f"not looked at: {counted(found.ignored, 'answer')} to other tests")
    return [Section("Not answered", lines, more=more)] if lines else []


def _attempts(found: Verification) -> list[str]:
    """Names of tests that were not attempted: a whole rule or kind of test, else a format of it."""
    touched = {m.group.partition(" ")[0] for m in found.missing}
    touched |= {a.rule for a in found.audits} | {c.group.partition(" ")[0] for c in found.checked}
    names = Counter[str]()
    for group, n in found.not_attempted.items():
        kind = group.partition(" ")[0]
        names[group if kind in touched else WHOLE.get(kind, kind)] += n
    return [f"{name} {n}" for name, n in names.items()]
