"""A document as a web page: one file without scripts that fetches nothing."""

from __future__ import annotations

import math
from collections.abc import Iterable
from html import escape
from pathlib import Path
from string import Template

from npdrt.conform.report.document import Block, Code, Document, Mark, Plot, Row, Section, Table
from npdrt.plain import line

TEMPLATE = Path(__file__).with_name("page.html")
MOST = 200  # rows of a table


class Markup(str):
    """Text that is markup already."""

    __slots__ = ()


def tag(element: str, /, *children: object, **attributes: object) -> Markup:
    """An element. Children that are not Markup are escaped; `class_` stands for `class`, and
    `text_anchor` for `text-anchor`; an attribute that is None is left out."""
    given = "".join(
        f' {key.strip("_").replace("_", "-")}="{escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    inner = "".join(c if isinstance(c, Markup) else escape(line(c)) for c in children)
    return Markup(f"<{element}{given}>{inner}</{element}>")


def joined(parts: Iterable[Markup]) -> Markup:
    """Pieces of markup, one after the other."""
    return Markup("\n".join(parts))


def page(document: Document) -> bytes:
    """The whole file."""
    sentence, *notes = document.lines
    passes = tag("strong", "Passes. " if document.passes else "Does not pass. ")
    kind = "pass" if document.passes else "fail"
    verdict = tag("p", passes, *_worded(sentence), class_=f"verdict {kind}")
    below = [_section(section, 2) for section in document.sections]
    body = joined([verdict, *map(_block, notes), *below])
    template = Template(TEMPLATE.read_text(encoding="utf-8"))
    return template.substitute(title=escape(line(document.title)), body=body).encode()


def _section(section: Section, level: int) -> Markup:
    """A section under a heading of a level, and the sections in it one level below."""
    parts = [tag(f"h{level}", section.title)]
    parts += [tag("p", *_worded(line)) for line in section.lines]
    parts += [_block(block) for block in (*section.blocks, *section.more)]
    return joined([*parts, *(_section(below, level + 1) for below in section.sections)])


def _worded(text: str) -> list[Markup]:
    """A text with the parts between backquotes as code."""
    parts = line(text).split("`")
    return [tag("code", p) if i % 2 else Markup(escape(p)) for i, p in enumerate(parts)]


def _block(block: Block) -> Markup:
    if isinstance(block, str):
        return tag("p", block, class_="note")
    if isinstance(block, Plot):
        return _figure(block)
    shown = _table(block)
    if not block.summary:
        return shown
    summary = tag("summary", block.summary)
    return tag("details", summary, shown, open_="" if block.opened else None)


# --- tables ---------------------------------------------------------------------------------------


def _table(table: Table) -> Markup:
    """A table in a region that scrolls sideways and takes the keyboard's focus."""
    head, *rows = table.rows
    made = tag(
        "table",
        tag("caption", table.caption),
        tag("thead", _row(head, table, "th")),
        tag("tbody", joined(_row(row, table, "td") for row in rows[:MOST])),
    )
    more = [_block(f"... {len(rows) - MOST} more")] if len(rows) > MOST else []
    return joined([_wide(made, table.caption), *more])


def _row(cells: Row, table: Table, element: str) -> Markup:
    scope = "col" if element == "th" else None
    return tag("tr", *(
        tag(element, tag("code", cell) if isinstance(cell, Code) else cell,
            scope=scope, class_="number" if i in table.numbers else None)
        for i, cell in enumerate(cells)
    ))  # fmt: skip


def _wide(content: Markup, label: str) -> Markup:
    return tag("div", content, class_="wide", tabindex="0", role="region", aria_label=label)


# --- plots: errors on a logarithmic axis, in groups side by side ----------------------------------

LEFT, TOP, TALL, FOOT = 74, 12, 190, 118  # of the plot area, in pixels
HEIGHT = TOP + TALL + FOOT
STEP = 6.5  # pixels for a test
NARROW = 14  # the least pixels of a group
LOW, HIGH = -2, 6  # decades of the axis; smaller errors are drawn as 0, larger ones at the end
TICKS = {
    math.inf: "not finite",
    1e6: "1e6 or more",
    **{10.0**k: f"{10.0**k:g}" for k in range(LOW, HIGH, 2)},
    0.0: "0",
}


def _figure(plot: Plot) -> Markup:
    """The plot with its summary."""
    bands, limit, drawn, x = [], [], [], float(LEFT)
    for i, (name, marks) in enumerate(plot.groups.items()):
        width = max(STEP * len(marks), NARROW)
        bands.append(_band(name, x, width, filled=i % 2 == 0))
        cell = width / len(marks)
        for k, mark in enumerate(marks):
            left = x + cell * k
            limit.append(f"M{left:.1f} {_y(mark.accepted):.1f}h{cell:.1f}" if mark.gated else "")
            drawn.append(_mark(mark, left + cell / 2, _y(mark.error)))
        x += width
    line = tag("path", d="".join(limit), class_="limit")
    parts = joined([*bands, *_axis(x), line, *drawn])
    size = {"viewBox": f"0 0 {x + 8:.0f} {HEIGHT}", "width": f"{x + 8:.0f}", "height": HEIGHT}
    title = tag("title", plot.summary)
    svg = tag("svg", title, parts, **size, role="img", aria_label=plot.summary)
    return tag("figure", tag("figcaption", plot.summary), _wide(svg, f"Plot, {plot.name}"))


def _y(ulps: float) -> float:
    """The height of an error: 0 at the bottom, infinity and NaN at the top."""
    if not math.isfinite(ulps):
        return TOP + 7
    if ulps < 10.0**LOW:
        return TOP + TALL - 7
    share = (min(math.log10(ulps), HIGH) - LOW) / (HIGH - LOW)
    bottom, top = TOP + TALL - 22, TOP + 26
    return bottom - share * (bottom - top)


def _axis(right: float) -> list[Markup]:
    """Lines and labels."""
    parts = []
    for ulps, label in TICKS.items():
        y = _y(ulps)
        parts += [
            tag("line", x1=LEFT, x2=f"{right:.0f}", y1=f"{y:.1f}", y2=f"{y:.1f}", class_="axis"),
            tag("text", label, x=LEFT - 6, y=f"{y + 4:.1f}", text_anchor="end"),
        ]
    return parts


def _band(name: str, x: float, width: float, *, filled: bool) -> Markup:
    """The name of a group below the plot; filled: a band behind the group."""
    middle, y = x + width / 2 + 4, TOP + TALL + 6
    band = tag("rect", x=f"{x:.0f}", y=TOP, width=f"{width:.0f}", height=TALL, class_="band")
    turned = f"rotate(-90 {middle:.1f} {y})"
    label = tag("text", name, x=f"{middle:.1f}", y=y, text_anchor="end", transform=turned)
    return joined([band, label] if filled else [label])


def _mark(mark: Mark, x: float, y: float) -> Markup:
    hint = tag("title", mark.hint)
    if mark.gated and not mark.holds:
        return tag("path", hint, d=f"M{x - 3.5:.1f} {y - 3.5:.1f}l7 7m-7 0l7-7", class_="off")
    kind = "ok" if mark.gated else "free"
    return tag("circle", hint, cx=f"{x:.1f}", cy=f"{y:.1f}", r="3", class_=kind)
