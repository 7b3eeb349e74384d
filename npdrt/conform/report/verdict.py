"""The verdict on an implementation, in words."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from itertools import groupby

import numpy as np

import npdrt
from npdrt.conform.audit import PASSES, Audit
from npdrt.conform.case import Case
from npdrt.conform.judge import Judged
from npdrt.conform.rules.rule import PROFILES
from npdrt.conform.verify import LEVELS, Verification
from npdrt.plain import counted, line

DOES = {  # kind of failure -> what a target does
    "raised": "raises",
    "hung": "gives no answer in time",
    "died": "dies",
    "mutated": "changes its arguments",
    "nondeterministic": "gives two answers",
    "shape": "returns no (w, state), or a w of another shape,",
    "dtype": "returns another dtype",
}
Found = Audit | Verification


# --- small words ----------------------------------------------------------------------------------


def number(value: float) -> str:
    """A count of ulps or a ratio, for a reader."""
    if not math.isfinite(value):
        return "not finite"
    return f"{value:.1e}" if value >= 1e5 else f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def title(case: Case) -> str:
    """Number and comment of a test."""
    return f"test {case.id} ({case.comment})"


def environment(versions: dict[str, str]) -> dict[str, str]:
    """The versions of everything that took part."""
    return {**versions, "npdrt": npdrt.__version__, "numpy": np.__version__}


# --- verdicts -------------------------------------------------------------------------------------


def passes(found: Found, dialect: str | None = None) -> bool:
    """Whether the verdict passes; with a dialect, whether it explains all answers, alone or with
    other arithmetic."""
    if isinstance(found, Verification):
        return found.passes
    finding, published = found.finding, PASSES[found.verdict]
    if dialect is None or (dialect == "published" and published):
        return published
    if found.verdict in ("no verdict", "unknown") or finding.dialect is None:
        return False
    beyond = [clause for clause in finding.extra_choices if clause not in PROFILES]
    return not beyond and dialect in (finding.dialect.name, *finding.indistinguishable)


def sentence(found: Found) -> str:
    """The verdict in words, in one printable line without a full stop."""
    words = _on_response(found) if isinstance(found, Verification) else _on_rule(found)
    return line(f"{found.name}{words}")


def _on_response(found: Verification) -> str:
    parts = [f"{a.rule}: {a.verdict}" for a in found.audits]
    for kind, rows in groupby(found.checked, key=lambda c: c.kind):
        passed = [c.passed for c in rows if c.gated]
        parts.append(f"{LEVELS[kind]}: {sum(passed)} of {len(passed)}")
    if found.missing:
        parts.append(counted(len(found.missing), "missing answer"))
    return f" {'passes' if found.passes else 'fails'}: {', '.join(parts)}"


def _on_rule(audit: Audit) -> str:
    rule, dialect = audit.rule, audit.finding.dialect
    named = dialect.name if dialect else ""
    match audit.verdict:
        case "agrees to the bit":
            return f" agrees with {rule} to the bit (C0): {_extent(audit)}"
        case "agrees":
            return f" agrees with {rule} to within {_within(audit)}: {_extent(audit)}"
        case "profile":
            return f" is {rule} in other arithmetic: {_clauses(audit)}"
        case "dialect":
            differs = f"it differs from the published rule in {_clauses(audit)}"
            return f" is the {named} dialect of {rule}: {differs}"
        case "out of scope":
            other = f"another optimizer than {rule}, and out of scope"
            return f" is {named}, {other}: {_clauses(audit)}"
        case "deviates":
            return f" deviates from {rule}: it breaks {_clauses(audit)}"
        case "unknown":
            return _unknown(audit)
    return f": no verdict: {_no_verdict(audit)}"


def _extent(audit: Audit) -> str:
    """The tests for which an agreement holds, and the values for which it does not."""
    forms = ", ".join(dict.fromkeys(j.test.case.format for j in audit.gated))
    odd = " and ".join(audit.ungated_values())
    but = f"; on {odd} it differs (not gated)" if odd else ""
    return f"{counted(len(audit.gated), 'test')} in {forms}{but}"


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
    """A clause in which an implementation differs from the published rule.

    found, published: the names of the alternatives; found_text, published_text: their meaning.
    arithmetic: it is not part of the rule. beyond: the named dialect does not have it either.
    """

    name: str
    found: str
    found_text: str
    published: str
    published_text: str
    arithmetic: bool
    beyond: bool


def clauses(audit: Audit) -> list[Clause]:
    """The clauses in which the implementation differs, those of the rule first."""
    finding, published, found = audit.finding, audit.finding.rule.full({}), []
    for name, choice in (finding.choices or {}).items():
        usual, texts = published[name], finding.rule.clauses[name]
        about = (name, choice, texts[choice], usual, texts[usual])
        found.append(Clause(*about, name in PROFILES, name in finding.extra_choices))
    return sorted(found, key=lambda clause: clause.arithmetic)


def _clauses(audit: Audit) -> str:
    """The meaning of every clause, found and published; those of arithmetic last."""
    kinds = [
        "; ".join(f"`{c.name}`: {c.found_text} (published: {c.published_text})" for c in some)
        for _, some in groupby(clauses(audit), key=lambda c: c.arithmetic)
    ]
    return "; and in its arithmetic in ".join(kinds)


def _unknown(audit: Audit) -> str:
    if audit.finding.choices is not None:
        far = sum(not j.accurate for j in audit.gated)
        return (
            f" follows {audit.rule}, but less exactly than it should: {far} of "
            f"{counted(len(audit.gated), 'test')} are beyond the accepted error"
        )
    worst = list(audit.failing_flags().items())[:3]
    flags = ", ".join(f"{flag} ({odd} of {total})" for flag, (odd, total) in worst)
    flags = f"it fails most at {flags}" if flags else "single steps do not follow the rule"
    bad = sum(not_finite(j) for j in audit.gated)
    note = f"; {counted(bad, 'answer')} not finite where finite ones are expected" if bad else ""
    hint = audit.hint()
    note += f"; {hint}" if hint else ""
    if audit.finding.stopped:
        note += "; not every known clause was tried, as its steps are many or large"
    if among := audit.finding.among:
        known = f"no published rule for {class_name(audit.name)} here; known: {', '.join(among)}"
        return f": {known}; next to {audit.rule}, {flags}{note}"
    return f" follows no known way to write {audit.rule}; {flags}{note}"


def class_name(name: str) -> str:
    """The last name of a target: Adagrad of "torch.optim.Adagrad(lr_decay=0.1)"."""
    return re.split(r"[.:]", name.partition("(")[0])[-1] or name


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
        return f"no test was answered{': ' + why if why else ''}"
    parts = [
        f"it {DOES.get(kind, kind)} on {count} of {counted(total, 'test')}"
        for kind, (count, _) in audit.failures.items()
    ]
    first = min((j for _, j in audit.failures.values()), key=lambda j: j.test.case.id)
    message = first.failure.message if first.failure else ""
    return f"{', '.join(parts)}; first: {title(first.test.case)}: {message}"


def smallest(audit: Audit) -> Judged | None:
    """The smallest test that tells the implementation from the published rule, or None."""
    told = audit.finding.smallest
    if told is not None:
        return next(j for j in audit.judged if j.test.case.id == told.id)
    odd = [j for j in audit.gated if not j.accurate and j.answers]
    return min(odd, key=lambda j: (len(j.test.case.steps), j.test.case.w.size, j.test.case.id),
               default=None)  # fmt: skip
