"""The report as a web page: one file without scripts that fetches nothing."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape
from itertools import groupby
from typing import Any

from npdrt.conform.report import verdict as report
from npdrt.conform.audit import Audit
from npdrt.conform.cases import FLAGS
from npdrt.conform.judge import Judged
from npdrt.conform.verify import Verification

MOST = 200  # failing tests in a list
FEW = 25  # of them that are shown without being asked for
POLICY = "default-src 'none'; style-src 'unsafe-inline'"  # nothing is fetched, nothing runs
STYLE = """
:root { color-scheme: light dark; --back: #fff; --fore: #1b1b1f; --soft: #5a5a66; --line: #d5d5dc;
  --band: #f3f3f6; --good: #00684a; --bad: #b3261e; --good-back: #e3f4ed; --bad-back: #fbe9e7;
  --mark: #0b62a4; }
@media (prefers-color-scheme: dark) { :root { --back: #16161a; --fore: #e8e8ec; --soft: #a5a5b2;
  --line: #3b3b45; --band: #212127; --good: #6fd6ae; --bad: #ff9d8f; --good-back: #12342a;
  --bad-back: #43201c; --mark: #7cc0f5; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1.25rem 4rem; max-width: 66rem; background: var(--back);
  color: var(--fore); font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 1rem; }
h2 { font-size: 1.3rem; margin: 2.5rem 0 .75rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 2rem 0 .5rem; }
p { margin: .5rem 0; max-width: 46rem; }
.verdict { padding: .75rem 1rem; border-left: .4rem solid; border-radius: .25rem; max-width: none; }
.pass { border-color: var(--good); background: var(--good-back); }
.fail { border-color: var(--bad); background: var(--bad-back); }
.pass strong { color: var(--good); } .fail strong { color: var(--bad); }
.note { color: var(--soft); font-size: .9rem; }
.wide { overflow-x: auto; margin: .5rem 0; }
table { border-collapse: collapse; font-size: .9rem; }
caption { text-align: left; color: var(--soft); padding-bottom: .3rem; }
th, td { text-align: left; vertical-align: top; padding: .25rem .9rem .25rem 0;
  border-bottom: 1px solid var(--line); overflow-wrap: normal; }
td:last-child, th:last-child { padding-right: 0; min-width: 7rem; }
.number:last-child { min-width: 0; }
th { font-weight: 600; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
code, .bits { font-family: ui-monospace, monospace; font-size: .92em; }
.bad { color: var(--bad); font-weight: 600; }
svg { display: block; max-width: none; }
svg text { font: 11px system-ui, sans-serif; fill: var(--soft); }
.band { fill: var(--band); } .axis { stroke: var(--line); }
.limit { fill: none; stroke: var(--bad); stroke-width: 1.3; }
.ok { fill: var(--mark); } .free { fill: none; stroke: var(--mark); stroke-width: 1.3; }
.off { fill: none; stroke: var(--bad); stroke-width: 2; }
summary { cursor: pointer; padding: .25rem 0; }
@media print { body { max-width: none; padding: 0; font-size: 10pt; } .wide { overflow: visible; }
  svg { max-width: 100%; height: auto; } h2, h3 { break-after: avoid; }
  tr, figure { break-inside: avoid; } }
"""


# --- markup ---------------------------------------------------------------------------------------


class Markup(str):
    """Text that is markup already."""

    __slots__ = ()


def tag(element: str, /, *children: object, **attributes: object) -> Markup:
    """An element. Children that are not Markup are escaped; `class_` and `http_equiv` are
    `class` and `http-equiv`; an attribute that is None is left out."""
    given = "".join(
        f' {key.strip("_").replace("_", "-")}="{escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    inner = "".join(c if isinstance(c, Markup) else escape(report.plain(c)) for c in children)
    void = element in ("meta", "br")
    return Markup(f"<{element}{given}>" if void else f"<{element}{given}>{inner}</{element}>")


def joined(parts: Iterable[Markup]) -> Markup:
    """Some markup, one after the other."""
    return Markup("\n".join(parts))


def table(rows: Sequence[Sequence[object]], caption: str, numbers: Sequence[int] = ()) -> Markup:
    """A table whose first row is its head; `numbers`: the columns to set flush right."""

    def line(cells: Sequence[object], name: str) -> Markup:
        scope = "col" if name == "th" else None
        return tag("tr", *(
            tag(name, cell, scope=scope, class_="number" if i in numbers else None)
            for i, cell in enumerate(cells)
        ))  # fmt: skip

    head, *body = rows
    inner = joined(line(row, "td") for row in body)
    made = tag("table", tag("caption", caption), tag("thead", line(head, "th")),
               tag("tbody", inner))  # fmt: skip
    return tag("div", made, class_="wide", tabindex="0", role="region", aria_label=caption)


# --- pages ----------------------------------------------------------------------------------------


def page(title: str, held: bool, sentence: str, sections: Sequence[Markup]) -> bytes:
    """The whole file."""
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", title),
        tag("style", Markup(STYLE)),
    )
    verdict = tag(
        "p", tag("strong", "Passes. " if held else "Does not pass. "), *_worded(f"{sentence}."),
        class_=f"verdict {'pass' if held else 'fail'}",
    )  # fmt: skip
    body = tag("body", tag("main", tag("h1", title), verdict, *sections))
    return f"<!DOCTYPE html>\n{tag('html', head, body, lang='en')}\n".encode()


def _worded(text: str) -> list[Markup]:
    """A text with what is between backquotes as code."""
    parts = report.plain(text).split("`")
    return [tag("code", p) if i % 2 else Markup(escape(p)) for i, p in enumerate(parts)]


def html(audit: Audit, dialect: str | None = None) -> bytes:
    """An audit as a page."""
    title = f"{audit.name} against {audit.rule}"
    held = report.passes(audit, dialect)
    parts = [*_sections(audit, "h2", dialect), _environment(audit.versions)]
    return page(title, held, report.sentence(audit), parts)


def verification_html(found: Verification) -> bytes:
    """A verification as a page."""
    parts: list[Markup] = []
    for audit in found.audits:
        sentence = tag("p", *_worded(f"{report.sentence(audit)}."))
        parts += [tag("h2", audit.rule), sentence, *_sections(audit, "h3", None)]
    parts += [*_checked(found), *_unanswered(found), _environment({})]
    return page(
        f"Response of {found.name}", found.passes, report.verification_sentence(found), parts
    )


def _sections(audit: Audit, h: str, accepted: str | None) -> list[Markup]:
    """Everything about an audit but its sentence, under headings of the level `h`."""
    return [
        *_about_dialect(audit, accepted), *_levels(audit, h), *_clauses(audit, h),
        *_smallest(audit, h), *_failing(audit, h), *_flags(audit, h), *_not_asked(audit, h),
    ]  # fmt: skip


def _about_dialect(audit: Audit, accepted: str | None) -> list[Markup]:
    lines = []
    dialect = audit.finding.dialect
    if accepted:
        lines.append(f"Accepted as the dialect {accepted}.")
    if dialect is not None and dialect.choices and audit.verdict != "no verdict":
        note = f" ({dialect.note})" if dialect.note else ""
        what = "The closest dialect is" if audit.verdict == "deviates" else "The dialect:"
        lines.append(f"{what} {dialect.name}, as in {dialect.source}{note}.")
    if audit.finding.also and audit.verdict != "no verdict":
        lines.append(f"The tests cannot tell it from: {', '.join(audit.finding.also)}.")
    return [tag("p", line, class_="note") for line in lines]


def _levels(audit: Audit, h: str) -> list[Markup]:
    if not audit.gated:
        return []
    rows = report.level_rows(audit)
    made = table(rows, "Gated tests that hold, by level and format", (2, 3))
    parts = [tag(h, "Levels"), made, tag("p", report.LEGEND, class_="note")]
    return [*parts, tag(h, "Error of every test"), *_plots(audit)]


def _clauses(audit: Audit, h: str) -> list[Markup]:
    found = report.clauses(audit)
    if not found or audit.verdict == "no verdict":
        return []
    rows: list[Sequence[object]] = [("clause", "published", "found", "")]
    for c in found:
        what = "arithmetic, not rule" if c.arithmetic else "not of the dialect" if c.beyond else ""
        pair = ((c.published, c.published_text), (c.found, c.found_text))
        rows.append((c.name, *(f"{name}: {text}" for name, text in pair), what))
    return [tag(h, "Clauses"), table(rows, "Where it differs from the published rule")]


def _smallest(audit: Audit, h: str) -> list[Markup]:
    judged = report.smallest(audit)
    found = report.shown(judged) if judged is not None else None
    if found is None:
        return []
    places = [i for i, head in enumerate(found.heads) if head.startswith("bits")]
    rows = [[tag("code", c) if i in places else c for i, c in enumerate(row)] for row in found.rows]
    numbers = [i for i in range(1, len(found.heads)) if i not in places]
    parts = [tag(h, "Smallest disagreeing test"), _list(found.about)]
    parts.append(table([found.heads, *rows], "Its elements, before and after the step", numbers))
    if found.hidden:
        parts.append(tag("p", f"{report.counted(found.hidden, 'element')} more.", class_="note"))
    parting = audit.finding.parting
    if parting is not None:
        parts.append(tag(
            "p", "The first operation in which values part: ", tag("code", parting.label), " is ",
            tag("code", report.values(parting.found)), "; published: ",
            tag("code", report.values(parting.published)), ".",
        ))  # fmt: skip
    return parts


def _list(found: dict[str, str]) -> Markup:
    """Labels with values."""
    rows = (tag("tr", tag("th", k, scope="row"), tag("td", v)) for k, v in found.items())
    return tag("div", tag("table", tag("tbody", joined(rows))), class_="wide")


def _failing(audit: Audit, h: str) -> list[Markup]:
    odd = [j for j in audit.gated if not j.accurate]
    if not odd:
        return []
    more = f"; the first {MOST} are listed" if len(odd) > MOST else ""
    inner = _tests(odd[:MOST], "Gated tests that do not hold", "what is wrong")
    summary = tag("summary", f"{report.counted(len(odd), 'test')}{more}")
    opened = "" if len(odd) <= FEW else None
    return [tag(h, "Failing tests"), tag("details", summary, inner, open_=opened)]


def _flags(audit: Audit, h: str) -> list[Markup]:
    counts: dict[str, list[Judged]] = {}
    for j in audit.gated:
        for flag in j.test.case.flags:
            counts.setdefault(flag, []).append(j)
    if not counts:
        return []
    rows: list[Sequence[object]] = [("flag", "held", "tests", "what the tests have")]
    for flag in sorted(counts, key=_order):
        held = sum(j.accurate for j in counts[flag])
        cell = held if held == len(counts[flag]) else tag("span", held, class_="bad")
        rows.append((flag, cell, len(counts[flag]), FLAGS.get(flag, ("", ""))[1]))
    return [tag(h, "By flag"), table(rows, "Gated tests within the accepted error", (1, 2))]


def _order(flag: str) -> int:
    names = list(FLAGS)
    return names.index(flag) if flag in names else len(names)


def _not_asked(audit: Audit, h: str) -> list[Markup]:
    parts = []
    if audit.skipped:
        reasons = [("tests", "why"), *((str(n), why) for why, n in audit.skipped.items())]
        parts += [tag(h, "Not asked"), table(reasons, "Tests of what it does not offer", (0,))]
    odd = audit.not_gated()
    if odd:
        made = _tests(odd, "Tests that only inform", "what is other than expected")
        summary = tag("summary", report.counted(len(odd), "test"))
        parts += [tag(h, "Not gated"), tag("details", summary, made)]
    return parts


def _tests(judged: Sequence[Judged], caption: str, head: str) -> Markup:
    """A table of tests with what is wrong with each."""
    rows: list[Sequence[object]] = [("test", "format", "flags", "comment", head)]
    for j in judged:
        case, what = j.test.case, report.wrong(j).partition("\n")[0]
        rows.append((case.id, case.format, ", ".join(case.flags), case.comment, what))
    return table(rows, caption, (0,))


def _checked(found: Verification) -> list[Markup]:
    if not found.checked:
        return []
    rows = report.checked_rows(found.checked, each=True)
    parts = [tag("h2", "Norms, primitives, training steps")]
    parts.append(table(rows, "Gated tests within their tolerance", (2, 3)))
    odd = [c for c in found.checked if c.gated and not c.passed]
    if odd:
        items = [tag("li", report.failed(c)) for c in odd[:MOST]]
        more = len(odd) - len(items)
        parts += [tag("h3", "Failing tests"), tag("ul", *items)]
        parts += [tag("p", f"{more} more.", class_="note")] if more else []
    return parts


def _unanswered(found: Verification) -> list[Markup]:
    parts = []
    if found.missing:
        rows = [("test", "group", "comment")]
        rows += [(str(m.id), m.group, m.comment) for m in found.missing[:MOST]]
        made = table(rows, f"{report.counted(len(found.missing), 'test')} without an answer", (0,))
        parts += [tag("h2", "Missing answers"), made]
    if found.not_attempted:
        parts.append(tag("h2", "Not attempted"))
        parts.append(tag("p", f"Tests by group: {', '.join(report.attempts(found))}."))
    return parts


def _environment(versions: dict[str, str]) -> Markup:
    return joined([tag("h2", "Environment"), _list(report.environment(versions))])


# --- the plot -------------------------------------------------------------------------------------

LEFT, TOP, TALL, FOOT = 74, 12, 190, 118  # of the plot area, in pixels
STEP = 6.5  # pixels a test
NARROW = 14  # pixels of a group at least
LEAST, MOST_ULPS = 0.01, 1e9  # what is less is drawn as 0, what is more as the most


def _plots(audit: Audit) -> list[Markup]:
    key = tag(
        "p", "One mark a test, by its first flag; in ulps at the scale of the operands. Filled: "
        "gated and within the accepted error (line). Cross: gated and beyond it. Ring: not "
        "gated. Point at a mark for its test.", class_="note",
    )  # fmt: skip
    forms = dict.fromkeys(j.test.case.format for j in audit.judged)
    return [key, *(_figure(audit, form) for form in forms)]


def _figure(audit: Audit, form: str) -> Markup:
    """The plot of one format."""
    asked = [j for j in audit.judged if j.test.case.format == form]
    answered = [j for j in asked if j.answers and j.test.expected]
    if not answered:
        return tag("p", f"{form}: no answer to plot.")
    ordered = sorted(answered, key=lambda j: (_order(j.test.case.flags[0]), j.test.case.id))
    scale = Scale(ordered)
    groups, x = [], float(LEFT)
    marks: list[Markup] = []
    limit: list[str] = []
    for flag, found in groupby(ordered, key=lambda j: j.test.case.flags[0]):
        tests = list(found)
        width = max(STEP * len(tests), NARROW)
        groups.append((flag, x, width))
        for i, j in enumerate(tests):
            cell = width / len(tests)
            at, high = x + cell * i, scale(j.test.ulps)
            limit.append(f"M{at:.1f} {high:.1f}h{cell:.1f}" if j.gated else "")
            marks.append(_mark(j, at + cell / 2, scale(j.worst.ulps)))
        x += width
    off = sum(j.gated and not j.accurate for j in ordered)
    summary = (
        f"{form}: error of {report.counted(len(ordered), 'test')}; {off} of "
        f"{sum(j.gated for j in ordered)} gated tests beyond the accepted error"
    )
    svg = tag(
        "svg", tag("title", summary), _bands(groups), scale.axis(x),
        tag("path", d="".join(limit), class_="limit"), joined(marks),
        viewBox=f"0 0 {x + 8:.0f} {TOP + TALL + FOOT}", width=f"{x + 8:.0f}",
        height=TOP + TALL + FOOT, role="img", aria_label=summary,
    )  # fmt: skip
    caption = tag("figcaption", summary, class_="note")
    area = tag("div", svg, class_="wide", tabindex="0", role="region", aria_label=f"Plot, {form}")
    return tag("figure", caption, area, style="margin: 1rem 0")


class Scale:
    """ulps -> height: 0 at the bottom, a logarithmic axis, what is not finite at the top."""

    def __init__(self, judged: Sequence[Judged]):
        errors = [x for j in judged for x in (j.worst.ulps, j.test.ulps)]
        finite = [x for x in errors if LEAST <= x < math.inf]
        low, high = min(finite, default=1.0), min(max(finite, default=1.0), MOST_ULPS)
        self.low = min(math.floor(math.log10(low)), 0)
        self.high = max(math.ceil(math.log10(high)), self.low + 3)
        self.clipped = max(finite, default=1.0) > MOST_ULPS
        self.infinite = any(not math.isfinite(x) for x in errors)
        self.bottom, self.top = TOP + TALL - 22, TOP + (26 if self.infinite else 6)

    def __call__(self, ulps: float) -> float:
        """The height of an error."""
        if ulps < LEAST:
            return TOP + TALL - 7
        if not math.isfinite(ulps):
            return TOP + 7
        share = (min(math.log10(ulps), self.high) - self.low) / (self.high - self.low)
        return self.bottom - max(share, 0) * (self.bottom - self.top)

    def axis(self, right: float) -> Markup:
        """Lines and labels."""
        every = max(1, math.ceil((self.high - self.low) / 8))
        decades = range(self.high, self.low - 1, -every)
        ticks = [(10.0**k, _power(k)) for k in decades] + [(0.0, "0")]
        ticks[0] = (ticks[0][0], ticks[0][1] + (" or more" if self.clipped else ""))
        ticks += [(math.inf, "not finite")] if self.infinite else []
        lines = [
            tag("line", x1=LEFT, x2=f"{right:.0f}", y1=f"{y:.1f}", y2=f"{y:.1f}", class_="axis")
            + tag("text", label, x=LEFT - 6, y=f"{y + 4:.1f}", text_anchor="end")
            for y, label in ((self(value), label) for value, label in ticks)
        ]
        return joined([Markup(line) for line in lines])


def _power(k: int) -> str:
    """A power of ten, short."""
    return f"{10.0**k:g}" if -3 <= k <= 3 else f"1e{k}"


def _bands(groups: Sequence[tuple[str, float, float]]) -> Markup:
    """Every other group on a band, with its flag below."""
    parts: list[Any] = []
    for i, (flag, x, width) in enumerate(groups):
        if i % 2 == 0:
            parts.append(tag("rect", x=f"{x:.0f}", y=TOP, width=f"{width:.0f}", height=TALL,
                             class_="band"))  # fmt: skip
        middle, y = x + width / 2 + 4, TOP + TALL + 6
        parts.append(tag("text", flag, x=f"{middle:.1f}", y=y, text_anchor="end",
                         transform=f"rotate(-90 {middle:.1f} {y})"))  # fmt: skip
    return joined(parts)


def _mark(judged: Judged, x: float, y: float) -> Markup:
    """A test, with its number and error as a hint."""
    case = judged.test.case
    error = report.number(judged.worst.ulps)
    hint = tag("title", f"test {case.id}, {case.comment} ({', '.join(case.flags)}): {error} ulps")
    if judged.gated and not judged.accurate:
        d = f"M{x - 3.5:.1f} {y - 3.5:.1f}l7 7m-7 0l7-7"
        return tag("path", hint, d=d, class_="off")
    kind = "ok" if judged.gated else "free"
    return tag("circle", hint, cx=f"{x:.1f}", cy=f"{y:.1f}", r="3", class_=kind)
