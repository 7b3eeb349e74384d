"""A report as one JSON object."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from npdrt.conform.audit import Audit
from npdrt.conform.encoding import settings_json
from npdrt.conform.judge import Judged
from npdrt.conform.report.verdict import (
    Found,
    clauses,
    environment,
    passes,
    sentence,
    smallest,
)
from npdrt.conform.vectors import prompt_json
from npdrt.conform.verify import Verification
from npdrt.plain import line

MANY = 256  # elements of a value


def as_json(found: Found, dialect: str | None = None) -> dict[str, Any]:
    """The report as one object. A number that is not finite is the text "inf", "-inf" or "nan";
    null stands for something that does not exist."""
    report = _of_response(found) if isinstance(found, Verification) else _of_audit(found, dialect)
    return {key: _spelt(value) for key, value in report.items()}


def _of_audit(audit: Audit, dialect: str | None) -> dict[str, Any]:
    finding = audit.finding
    named = finding.dialect
    return {
        "name": line(audit.name),
        "rule": None if finding.among else audit.rule,
        "verdict": audit.verdict,
        "passes": passes(audit, dialect),
        "sentence": sentence(audit),
        "dialect": None if named is None else {
            "name": named.name, "source": named.source, "in_scope": named.scope,
        },
        "clauses": [vars(clause) for clause in clauses(audit)],
        "also": list(finding.indistinguishable),
        "levels": [
            {**vars(row), "worst": row.worst and _worst_json(row.worst)} for row in audit.levels()
        ],
        "smallest": _smallest_json(audit),
        "failing_flags": {f: list(pair) for f, pair in audit.failing_flags().items()},
        "failures": {
            kind: {"tests": n, "tcId": j.test.case.id, "message": _message(j)}
            for kind, (n, j) in audit.failures.items()
        },
        "not_asked": {line(why): n for why, n in audit.skipped.items()},
        "tests": [_test_json(j) for j in audit.judged],
        "versions": {k: line(v) for k, v in environment(audit.versions).items()},
    }  # fmt: skip


def _of_response(found: Verification) -> dict[str, Any]:
    return {
        "name": line(found.name),
        "passes": found.passes,
        "sentence": sentence(found),
        "rules": [_of_audit(audit, None) for audit in found.audits],
        "checked": [
            {**vars(c), "error": line(c.error), "where": line(c.where)} for c in found.checked
        ],
        "missing": [vars(m) for m in found.missing],
        "not_attempted": found.not_attempted,
        "ignored": found.ignored,
        "versions": environment({}),
    }  # fmt: skip


def _spelt(value: Any) -> Any:
    """`value` with every float that is not finite, at any depth, as "inf", "-inf" or "nan"."""
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, dict):
        return {key: _spelt(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_spelt(item) for item in value]
    return value


def _worst_json(judged: Judged) -> dict[str, Any]:
    """The place of the largest error."""
    worst = judged.worst
    place = {"tcId": judged.test.case.id, "step": worst.step, "index": worst.index}
    return {**place, "ulps": None if judged.failure else worst.ulps}


def _test_json(judged: Judged) -> dict[str, Any]:
    """The verdict on one test."""
    case = judged.test.case
    return {
        **_worst_json(judged),
        "comment": line(case.comment),
        "format": case.format,
        "flags": list(case.flags),
        "result": case.result,
        "level": judged.level,
        "gated": judged.gated,
        "bits": judged.bits,
        "accurate": judged.accurate,
        "accepted": judged.test.ulps,
        "slots": list(judged.slots),
        "failure": judged.failure and {"kind": judged.failure.kind, "message": _message(judged)},
    }


def _message(judged: Judged) -> str:
    return line(judged.failure.message) if judged.failure else ""


def _smallest_json(audit: Audit) -> dict[str, Any] | None:
    judged = smallest(audit)
    if judged is None:
        return None
    case, form, parting = judged.test.case, judged.test.case.number, audit.finding.parting
    answers = [(e.exact, a.w) for e, a in zip(judged.test.expected, judged.answers, strict=False)]
    if case.generated:  # only the element with the largest error
        at = judged.worst
        answers = [tuple(x.reshape(-1)[at.index] for x in answers[at.step])]
    return {
        **prompt_json(case),
        "comment": line(case.comment),
        "rule": case.rule,
        "format": case.format,
        "settings": settings_json(case.settings),
        "expected": [form.bits(exact) for exact, _ in answers],
        "got": [form.bits(got) for _, got in answers],
        "worst": _worst_json(judged),
        "parting": None if parting is None else {
            "label": parting.label,
            "published": _few(parting.published),
            "found": _few(parting.found),
        },
    }  # fmt: skip


def _few(value: Any) -> Any:
    """A named value of an evaluation as numbers: the first ones of a large array."""
    found = np.asarray(value, dtype=np.float64)
    return (found if found.size <= MANY else found.reshape(-1)[:MANY]).tolist()
