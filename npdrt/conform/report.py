"""What an audit or a verification found, in words, as JSON and as JUnit XML.

What targets and responses say of themselves (names, messages) is made printable first, so that it
cannot steer a terminal or break a file.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any
from xml.etree import ElementTree as Xml

import numpy as np

import npdrt
from npdrt.conform.audit import PASSES, Audit
from npdrt.conform.case import Answer, Case
from npdrt.conform.encoding import settings_json
from npdrt.conform.formats import Format
from npdrt.conform.judge import Judged, errors_of
from npdrt.conform.rules.rule import PROFILES
from npdrt.conform.vectors import prompt_json
from npdrt.conform.verify import LEVELS, Checked, Verification

LEGEND = (
    "C0: the bits of docs/updates.md. C1: one step, within a few ulps of the exact answer. "
    "C3: many steps, each within a few ulps more."
)
FEW = 12  # elements of an array that are shown
MANY = 256  # elements of a value in JSON
DOES = {  # kind of failure -> what a target does
    "raised": "raises",
    "hung": "gives no answer in time",
    "died": "dies",
    "mutated": "changes its arguments",
    "nondeterministic": "gives two answers",
    "shape": "returns another shape",
    "dtype": "returns another dtype",
}
WHOLE = {"norm": "norms", "primitive": "primitives", "training": "training steps"}
COUNTS = {"tests": "testcase", "failures": "failure", "errors": "error", "skipped": "skipped"}
Row = tuple[str, ...]


# --- small words ----------------------------------------------------------------------------------


def plain(text: object) -> str:
    """A text in one line of printable characters, the others as Python writes them."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text))


def number(value: float) -> str:
    """A count of ulps or a ratio, for a reader."""
    if not math.isfinite(value):
        return "not finite"
    return f"{value:.1e}" if value >= 1e5 else f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def counted(n: int, what: str) -> str:
    """ "1 test", "2 tests"."""
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def decimal(value: float, form: Format) -> str:
    """The shortest decimal that names a number of a format."""
    if form.name == "bfloat16":
        return f"{value:.4g}"
    with np.errstate(all="ignore"):
        return str(np.dtype(form.name).type(value))


def title(case: Case) -> str:
    """Number and comment of a test."""
    return f"test {case.id} ({plain(case.comment)})"


def aligned(rows: Sequence[Row], indent: str = "  ") -> list[str]:
    """Rows as lines with aligned columns."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))] if rows else []
    lines = ("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows)
    return [(indent + line).rstrip() for line in lines]


def environment(versions: dict[str, str]) -> dict[str, str]:
    """The versions of everything that took part."""
    return {**versions, "npdrt": npdrt.__version__, "numpy": np.__version__}


# --- verdicts -------------------------------------------------------------------------------------


def passes(audit: Audit, dialect: str | None = None) -> bool:
    """Whether the verdict is one that passes; with a dialect, whether the answers are its own.

    That is so where the dialect, with clauses of arithmetic besides or not, explains all of them.
    """
    if dialect is None:
        return PASSES[audit.verdict]
    finding = audit.finding
    if dialect == "published" and PASSES[audit.verdict]:
        return True
    if audit.verdict in ("no verdict", "unknown") or finding.dialect is None:
        return False
    beyond = [clause for clause in finding.beyond if clause not in PROFILES]
    return not beyond and dialect in (finding.dialect.name, *finding.also)


def sentence(audit: Audit) -> str:
    """The verdict in words."""
    name, rule, finding = plain(audit.name), audit.rule, audit.finding
    match audit.verdict:
        case "agrees to the bit":
            return f"{name} agrees with {rule} to the bit (C0): {_extent(audit)}{_but(audit)}"
        case "agrees":
            within = f"agrees with {rule} to within {_within(audit)}"
            return f"{name} {within}: {_extent(audit)}{_but(audit)}"
        case "profile":
            return f"{name} is {rule} in other arithmetic: {_clauses(audit)}"
        case "dialect":
            assert finding.dialect is not None
            return (
                f"{name} is the {finding.dialect.name} dialect of {rule}: "
                f"it differs from the published rule in {_clauses(audit)}"
            )
        case "out of scope":
            assert finding.dialect is not None
            return (
                f"{name} is {finding.dialect.name}, another optimizer than {rule}, and out of "
                f"scope: {_clauses(audit)}"
            )
        case "deviates":
            return f"{name} deviates from {rule}: it breaks {_clauses(audit)}"
        case "unknown":
            return f"{name} {_unknown(audit)}"
    return f"{name}: no verdict: {_no_verdict(audit)}"


def _extent(audit: Audit) -> str:
    forms = ", ".join(dict.fromkeys(j.test.case.format for j in audit.gated))
    return f"{counted(len(audit.gated), 'test')} in {forms}"


def _but(audit: Audit) -> str:
    """What an agreement does not hold for."""
    odd = " and ".join(audit.ungated_values())
    return f"; on {odd} it differs (not gated)" if odd else ""


def _within(audit: Audit) -> str:
    """The largest errors of levels C1 and C3."""
    found = []
    for level, what in (("C1", ""), ("C3", " after many steps")):
        errors = [j.worst.ulps for j in audit.gated if j.level == level]
        if errors:
            most = max(errors)
            unit = "ulp" if most == 1 else "ulps"
            found.append(f"{number(most)} {unit}{what} ({level})")
    return ", ".join(found)


@dataclass(frozen=True)
class Clause:
    """A clause in which an implementation is not as published.

    found, published: the names of the alternatives; found_text, published_text: what they mean.
    arithmetic: it is no part of the rule. beyond: the named dialect does not have it either.
    """

    name: str
    found: str
    found_text: str
    published: str
    published_text: str
    arithmetic: bool
    beyond: bool


def clauses(audit: Audit) -> list[Clause]:
    """The clauses in which the implementation is not as published, the rule's first."""
    finding, rule = audit.finding, audit.finding.rule
    published = rule.full({})
    found = [
        Clause(
            name,
            choice,
            rule.clauses[name][choice],
            published[name],
            rule.clauses[name][published[name]],
            name in PROFILES,
            name in finding.beyond,
        )
        for name, choice in (finding.choices or {}).items()
    ]
    return sorted(found, key=lambda clause: clause.arithmetic)


def _clauses(audit: Audit) -> str:
    """What is found in every clause, and what is published; those of arithmetic last."""
    kinds = [
        "; ".join(f"`{c.name}`: {c.found_text} (published: {c.published_text})" for c in some)
        for _, some in groupby(clauses(audit), key=lambda c: c.arithmetic)
    ]
    return "; and in its arithmetic in ".join(kinds)


def _unknown(audit: Audit) -> str:
    if audit.finding.choices is not None:
        far = sum(not j.accurate for j in audit.gated)
        return (
            f"follows {audit.rule}, but less exactly than it should: {far} of "
            f"{counted(len(audit.gated), 'test')} are beyond the accepted error"
        )
    worst = list(audit.failing_flags().items())[:3]
    flags = ", ".join(f"{flag} ({odd} of {total})" for flag, (odd, total) in worst)
    flags = f"it fails most at {flags}" if flags else "its steps one by one are not of the rule"
    bad = sum(not_finite(j) for j in audit.gated)
    note = f"; {counted(bad, 'answer')} not finite where finite ones are expected" if bad else ""
    hint = audit.hint()
    note += f"; {plain(hint)}" if hint else ""
    if audit.finding.stopped:
        note += "; not every known clause was tried, as its steps are many or large"
    if among := audit.finding.among:
        rules = f"is none of the known rules ({', '.join(among)})"
        return f"{rules}; next to {audit.rule}, {flags}{note}"
    return f"follows no known way to write {audit.rule}; {flags}{note}"


def not_finite(judged: Judged) -> bool:
    """Whether an answer has an infinity or NaN where there should be none."""
    pairs = zip(judged.answers, judged.test.expected, strict=False)  # either may be empty
    return any(bool(np.any(~np.isfinite(a.w) & np.isfinite(e.exact))) for a, e in pairs)


def _no_verdict(audit: Audit) -> str:
    total = sum(j.test.case.result == "valid" for j in audit.judged)
    if audit.says_nothing and not audit.failures:
        return audit.says_nothing
    if not audit.failures:
        why = max(audit.skipped, key=lambda reason: audit.skipped[reason], default="")
        return f"no test was answered{': ' + plain(why) if why else ''}"
    parts = [
        f"it {DOES.get(kind, kind)} on {count} of {counted(total, 'test')}"
        for kind, (count, _) in audit.failures.items()
    ]
    first = min((j for _, j in audit.failures.values()), key=lambda j: j.test.case.id)
    return f"{', '.join(parts)}; first: {title(first.test.case)}: {message(first)}"


def message(judged: Judged) -> str:
    """Why there is no answer, or ""."""
    return plain(judged.failure.message) if judged.failure else ""


# --- one test in full -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Shown:
    """One step of a test, element by element.

    about: label -> value, of the test as a whole. rows: elements, under `heads`. hidden: how many
    elements are left out.
    """

    about: dict[str, str]
    heads: Row
    rows: list[Row]
    hidden: int


def smallest(audit: Audit) -> Judged | None:
    """The smallest test that tells the implementation from the published rule, or None."""
    told = audit.finding.smallest
    if told is not None:
        return next(j for j in audit.judged if j.test.case.id == told.id)
    odd = [j for j in audit.gated if not j.accurate and j.answers]
    return min(odd, key=lambda j: (len(j.test.case.steps), j.test.case.w.size, j.test.case.id),
               default=None)  # fmt: skip


def shown(judged: Judged) -> Shown | None:
    """The step of a test at which it first goes wrong, or is furthest off; None without answer."""
    if not (judged.answers and judged.test.expected):
        return None
    errors = list(errors_of(judged.test, judged.answers))
    worst = [float(np.max(e, initial=0.0)) for e in errors]
    limit = judged.test.ulps
    k = next((i for i, most in enumerate(worst) if most > limit), int(np.argmax(worst)))
    kept = sorted(np.argsort(-errors[k], kind="stable")[:FEW].tolist())
    columns = _columns(judged, k, errors[k], kept)
    rows = list(zip(*columns.values(), strict=True))
    return Shown(_about(judged, k), tuple(columns), rows, judged.test.case.w.size - len(rows))


def _columns(judged: Judged, k: int, errors: Any, kept: list[int]) -> dict[str, list[str]]:
    """Head -> cells of some elements: what goes into a step, what should come out and what does."""
    case, form = judged.test.case, judged.test.case.number
    before = (Answer(case.w, case.state or {}), *judged.answers)

    def cells(values: Any) -> list[str]:
        return [decimal(x, form) for x in np.asarray(values).reshape(-1)[kept].tolist()]

    def bits(values: Any) -> list[str]:
        return [form.bits(x) for x in np.asarray(values).reshape(-1)[kept]]

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


def _about(judged: Judged, k: int) -> dict[str, str]:
    case = judged.test.case
    about = {"test": f"{case.id}, {plain(case.comment)} ({', '.join(case.flags)})"}
    if case.kind != "weight":
        about["kind"] = case.kind
    about["format"] = case.format
    about["shape"] = str(list(case.w.shape))
    if case.layout != "C":
        about["layout"] = case.layout
    if case.neighbour is not None:
        about["beside it"] = "another tensor in the same optimizer"
    if case.settings:
        about["settings"] = ", ".join(f"{n} = {v}" for n, v in case.settings.items())
    done = (case.state or {}).get("step", 0) + k
    about["step"] = f"{k + 1} of {len(case.steps)}, {done} before it"
    about["lr"] = repr(case.steps[k].lr)
    about["accepted"] = f"{number(judged.test.ulps)} ulps at the scale of the operands"
    return about


def few(value: Any) -> Any:
    """A named value of an evaluation as numbers; of a large array the first ones."""
    found = np.asarray(value, dtype=np.float64)
    return (found if found.size <= MANY else found.reshape(-1)[:MANY]).tolist()


def values(value: Any) -> str:
    """A named value of an evaluation: a number, or the first few of an array."""
    flat = np.asarray(value, dtype=np.float64).reshape(-1)
    text = ", ".join(f"{x:.9g}" for x in flat[:6])
    return text if np.ndim(value) == 0 else f"[{text}{', ...' if flat.size > 6 else ''}]"


# --- text -----------------------------------------------------------------------------------------


def text(audit: Audit) -> str:
    """The report of an audit for a terminal."""
    lines = [f"{sentence(audit)}.", *_source(audit), ""]
    lines += [*aligned(level_rows(audit)), f"  {LEGEND}"] if audit.gated else []
    lines += [*_smallest_text(audit), *_notes(audit)]
    found = ", ".join(f"{k} {plain(v)}" for k, v in environment(audit.versions).items())
    return "\n".join([*lines, "", found])


def _source(audit: Audit) -> list[str]:
    """Where the dialect is to be read, and which others it may be."""
    finding, lines = audit.finding, []
    if finding.dialect is not None and finding.dialect.choices and audit.verdict != "no verdict":
        closest = f"closest to {finding.dialect.name}; " if audit.verdict == "deviates" else ""
        lines.append(f"{closest}source: {finding.dialect.source}")
    if finding.also and audit.verdict != "no verdict":
        lines.append(f"the tests it was asked cannot tell it from: {', '.join(finding.also)}")
    return lines


def level_rows(audit: Audit) -> list[Row]:
    """The table of levels, with its head."""
    rows: list[Row] = [("level", "format", "passed", "worst, ulps", "at")]
    for row in audit.levels():
        worst = ("", "")
        if row.worst is not None:
            worst = (number(row.worst.worst.ulps), title(row.worst.test.case))
        rows.append((row.level, row.format, f"{row.passed} of {row.total}", *worst))
    return rows


def _smallest_text(audit: Audit) -> list[str]:
    judged = smallest(audit)
    found = shown(judged) if judged is not None else None
    if found is None:
        return []
    about = "; ".join(f"{k} {v}" for k, v in found.about.items() if k not in ("test", "accepted"))
    lines = ["", f"smallest disagreeing test: {found.about['test']}", f"  {about}"]
    lines += aligned([found.heads, *found.rows])
    lines += [f"  ... {counted(found.hidden, 'element')} more"] if found.hidden else []
    parting = audit.finding.parting
    if parting is not None:
        lines.append(
            f"  first difference: {parting.label} is {values(parting.found)}; "
            f"published: {values(parting.published)}"
        )
    return lines


def _notes(audit: Audit) -> list[str]:
    """What was not asked, and what only informs."""
    lines = [f"not asked: {counted(n, 'test')}: {plain(why)}" for why, n in audit.skipped.items()]
    odd = audit.not_gated()
    if odd:
        flags = Counter(" ".join(j.test.case.flags) for j in odd)
        counts = ", ".join(f"{flag} {n}" for flag, n in flags.most_common())
        lines.append(f"not gated, and other than expected: {counted(len(odd), 'test')}: {counts}")
    slots = Counter(slot for j in audit.gated if j.accurate for slot in j.slots)
    if slots and audit.verdict == "agrees to the bit":
        counts = ", ".join(f"{slot} {n}" for slot, n in slots.items())
        lines.append(f"slots of other bits: {counts}")
    return ["", *lines] if lines else []


def verification_sentence(found: Verification) -> str:
    """The verdict on a response in words."""
    parts = [f"{a.rule}: {a.verdict}" for a in found.audits]
    for kind, rows in groupby(found.checked, key=lambda c: c.kind):
        passed = [c.passed for c in rows if c.gated]
        parts.append(f"{LEVELS[kind]}: {sum(passed)} of {len(passed)}")
    if found.missing:
        parts.append(counted(len(found.missing), "missing answer"))
    return f"{plain(found.name)} {'passes' if found.passes else 'fails'}: {', '.join(parts)}"


def checked_rows(checked: Sequence[Checked], *, each: bool) -> list[Row]:
    """A table of the gated answers that are no updates, with its head.

    each: a row for every operation and rule; else one for every kind and format.
    """
    groups: dict[tuple[str, str], list[Checked]] = {}
    for c in (c for c in checked if c.gated):
        word, _, rest = c.group.partition(" ")
        whole = f"{WHOLE[word]} {rest.rpartition(' ')[2]}"
        level = LEVELS[c.kind] if c.kind == "Norm" else ""
        groups.setdefault((level, c.group if each else whole), []).append(c)
    rows: list[Row] = [("level", "group", "passed", "worst, tolerances", "at")]
    for names, some in groups.items():
        worst = max(some, key=lambda c: c.ratio)
        held = f"{sum(c.passed for c in some)} of {len(some)}"
        rows.append((*names, held, number(worst.ratio), f"test {worst.id}"))
    return rows


def verification_text(found: Verification) -> str:
    """The report of a verification for a terminal."""
    lines = [f"{verification_sentence(found)}."]
    for audit in found.audits:
        lines += ["", f"{sentence(audit)}.", *_source(audit), *aligned(level_rows(audit))]
        lines += [*_smallest_text(audit), *_notes(audit)]
    if found.checked:
        lines += ["", *aligned(checked_rows(found.checked, each=False))]
        lines += _worst_checked(found.checked)
    return "\n".join([*lines, *_unanswered(found), "", f"npdrt {npdrt.__version__}"])


def _worst_checked(checked: Sequence[Checked]) -> list[str]:
    odd = [f"  {failed(c)}" for c in checked if c.gated and not c.passed]
    return [*odd[:5], f"  ... {len(odd) - 5} more"] if len(odd) > 5 else odd


def failed(c: Checked) -> str:
    """What is wrong with an answer to a norm, a primitive or a training step."""
    what = f"refused: {plain(c.error)}" if c.error else plain(c.where)
    off = "" if c.error else f", {number(c.ratio)} tolerances"
    return f"{c.group}, test {c.id} ({plain(c.comment)}): {what}{off}"


def _unanswered(found: Verification) -> list[str]:
    lines = []
    if found.missing:
        groups = Counter(m.group for m in found.missing)
        counts = ", ".join(f"{group} {n}" for group, n in groups.items())
        first = found.missing[0]
        lines.append(f"no answer to {counted(len(found.missing), 'test')}: {counts}")
        lines.append(f"  first: test {first.id} ({plain(first.comment)})")
    if found.not_attempted:
        rest = sum(found.not_attempted.values())
        names = ", ".join(attempts(found))
        lines.append(f"not attempted: {counted(rest, 'test')}: {names}")
    if found.ignored:
        lines.append(f"not looked at: {counted(found.ignored, 'answer')} to other tests")
    return ["", *lines] if lines else []


def attempts(found: Verification) -> list[str]:
    """What was not attempted: a whole rule or kind of test in a word, else by format."""
    touched = {m.group.partition(" ")[0] for m in found.missing}
    touched |= {a.rule for a in found.audits} | {c.group.partition(" ")[0] for c in found.checked}
    names = Counter[str]()
    for group, n in found.not_attempted.items():
        kind = group.partition(" ")[0]
        names[group if kind in touched else WHOLE.get(kind, kind)] += n
    return [f"{name} {n}" for name, n in names.items()]


# --- JSON -----------------------------------------------------------------------------------------


def as_json(audit: Audit, dialect: str | None = None) -> dict[str, Any]:
    """The report of an audit as one object; a number that is not finite is the text "inf", "-inf"
    or "nan", and null is what there is not."""
    finding = audit.finding
    named = finding.dialect
    found: dict[str, Any] = spelt({
        "name": plain(audit.name),
        "rule": None if finding.among else audit.rule,
        "verdict": audit.verdict,
        "passes": passes(audit, dialect),
        "sentence": sentence(audit),
        "dialect": None if named is None else {
            "name": named.name, "source": named.source, "in_scope": named.scope,
        },
        "clauses": [vars(clause) for clause in clauses(audit)],
        "also": list(finding.also),
        "levels": [
            {
                "level": row.level, "format": row.format, "passed": row.passed, "total": row.total,
                "worst": row.worst and worst_json(row.worst),
            }
            for row in audit.levels()
        ],
        "smallest": _smallest_json(audit),
        "failing_flags": {f: list(pair) for f, pair in audit.failing_flags().items()},
        "failures": {
            kind: {"tests": n, "tcId": j.test.case.id, "message": message(j)}
            for kind, (n, j) in audit.failures.items()
        },
        "not_asked": {plain(why): n for why, n in audit.skipped.items()},
        "tests": [test_json(j) for j in audit.judged],
        "versions": {k: plain(v) for k, v in environment(audit.versions).items()},
    })  # fmt: skip
    return found


def spelt(value: Any) -> Any:
    """`value` with every float that is not finite, at any depth, as "inf", "-inf" or "nan"."""
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, dict):
        return {key: spelt(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [spelt(item) for item in value]
    return value


def worst_json(judged: Judged) -> dict[str, Any]:
    """Where a test is furthest off."""
    worst = judged.worst
    place = {"tcId": judged.test.case.id, "step": worst.step, "index": worst.index}
    return {**place, "ulps": None if judged.failure else worst.ulps}


def test_json(judged: Judged) -> dict[str, Any]:
    """The verdict on one test."""
    case = judged.test.case
    return {
        **worst_json(judged),
        "comment": plain(case.comment),
        "format": case.format,
        "flags": list(case.flags),
        "result": case.result,
        "level": judged.level,
        "gated": judged.gated,
        "bits": judged.bits,
        "accurate": judged.accurate,
        "accepted": judged.test.ulps,
        "slots": list(judged.slots),
        "failure": judged.failure and {"kind": judged.failure.kind, "message": message(judged)},
    }


def _smallest_json(audit: Audit) -> dict[str, Any] | None:
    judged = smallest(audit)
    if judged is None:
        return None
    case, form, parting = judged.test.case, judged.test.case.number, audit.finding.parting
    answers = [(e.exact, a.w) for e, a in zip(judged.test.expected, judged.answers, strict=False)]
    if case.generated:  # the element alone that is furthest off
        at = judged.worst
        answers = [tuple(x.reshape(-1)[at.index] for x in answers[at.step])]
    return {
        **prompt_json(case),
        "comment": plain(case.comment),
        "rule": case.rule,
        "format": case.format,
        "settings": settings_json(case.settings),
        "expected": [form.bits(exact) for exact, _ in answers],
        "got": [form.bits(got) for _, got in answers],
        "worst": worst_json(judged),
        "parting": None if parting is None else {
            "label": parting.label,
            "published": few(parting.published),
            "found": few(parting.found),
        },
    }  # fmt: skip


def verification_json(found: Verification) -> dict[str, Any]:
    """The report of a verification as one object, numbers as in `as_json`."""
    document: dict[str, Any] = spelt({
        "name": plain(found.name),
        "passes": found.passes,
        "sentence": verification_sentence(found),
        "rules": [as_json(audit) for audit in found.audits],
        "checked": [
            {**vars(c), "error": plain(c.error), "where": plain(c.where)} for c in found.checked
        ],
        "missing": [vars(m) for m in found.missing],
        "not_attempted": found.not_attempted,
        "ignored": found.ignored,
        "versions": environment({}),
    })  # fmt: skip
    return document


# --- JUnit XML ------------------------------------------------------------------------------------


def junit(audit: Audit, dialect: str | None = None) -> bytes:
    """An audit as JUnit XML: a suite a format, a case a test, and one for the verdict.

    dialect: the one that is accepted; a test that its clauses explain does not fail.
    """
    return _document(audit.name, [_suite(audit, dialect)])


def verification_junit(found: Verification) -> bytes:
    """A verification as JUnit XML."""
    suites = [_suite(audit, None) for audit in found.audits]
    other = Xml.Element("testsuite", name="other")
    for c in found.checked:
        made = _case(other, c.kind, f"{c.id} {c.comment}")
        if not c.passed:
            _result(made, "failure" if c.gated else "skipped", failed(c))
    for m in found.missing:
        _result(_case(other, m.group, f"{m.id} {m.comment}"), "failure", "no answer")
    return _document(found.name, [*suites, other] if len(other) else suites)


def _document(name: str, suites: Sequence[Xml.Element]) -> bytes:
    root = Xml.Element("testsuites", name=plain(name))
    root.extend(suites)
    for element in (root, *suites):
        for count, found in COUNTS.items():
            element.set(count, str(len(element.findall(f".//{found}"))))
    del root.attrib["skipped"]  # which only suites have
    Xml.indent(root)
    return bytes(Xml.tostring(root, encoding="utf-8", xml_declaration=True)) + b"\n"


def _suite(audit: Audit, dialect: str | None) -> Xml.Element:
    suite = Xml.Element("testsuite", name=plain(f"{audit.name} against {audit.rule}"))
    properties = Xml.SubElement(suite, "properties")
    skipped = {f"not asked: {why}": n for why, n in audit.skipped.items()}
    about = {"verdict": audit.verdict, **environment(audit.versions), **skipped}
    for name, value in about.items():
        Xml.SubElement(properties, "property", name=plain(name), value=plain(value))
    held = passes(audit, dialect)
    verdict = _case(suite, audit.rule, "verdict")
    if not held:
        _result(verdict, "failure", sentence(audit))
    excused = held and dialect is not None
    for judged in audit.judged:
        case = judged.test.case
        made = _case(suite, f"{case.rule}.{case.format}", f"{case.id} {case.comment}")
        if not judged.accurate:
            kind = "failure" if judged.failure is None else "error"
            _result(made, "skipped" if excused or not judged.gated else kind, wrong(judged))
    return suite


def _case(suite: Xml.Element, group: str, name: str) -> Xml.Element:
    return Xml.SubElement(suite, "testcase", classname=plain(group), name=plain(name))


def _result(made: Xml.Element, kind: str, text: str) -> None:
    first, *rest = text.split("\n")
    Xml.SubElement(made, kind, message=first).text = "\n".join(rest) or None


def wrong(judged: Judged) -> str:
    """What is wrong with a test, in a line, with the elements in those below it."""
    if judged.failure is not None:
        return f"{judged.failure.kind}: {message(judged)}"
    if not judged.test.expected:
        return "it was answered and should have been refused"
    found = shown(judged)
    assert found is not None
    worst, form = judged.worst, judged.test.case.number
    pair = judged.test.expected[worst.step].exact, judged.answers[worst.step].w
    exact, got = (form.bits(np.asarray(a).reshape(-1)[worst.index]) for a in pair)
    return "\n".join(
        [
            f"{number(worst.ulps)}{' ulps' if math.isfinite(worst.ulps) else ''}, accepted "
            f"{number(judged.test.ulps)}: element {worst.index} after step {worst.step + 1}: "
            f"expected bits {exact}, got {got}",
            *(f"{k}: {v}" for k, v in found.about.items()),
            *aligned([found.heads, *found.rows], ""),
        ]
    )
