"""A report as a document of sections, and its text for a terminal.

The texts in a document are as targets and responses gave them. A renderer makes them printable, so
that they cannot steer a terminal or break a file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from npdrt.plain import line, table

Row = Sequence[object]


class Code(str):
    """The text of a cell, set in a fixed font."""

    __slots__ = ()


@dataclass(frozen=True)
class Table:
    """Rows, the first of which is the head.

    numbers: the columns to set flush right. summary: the line under which a page hides the table
    until it is clicked, "" for a table that is always shown; opened: whether it is shown at first.
    """

    caption: str
    rows: Sequence[Row]
    numbers: Sequence[int] = ()
    summary: str = ""
    opened: bool = False


@dataclass(frozen=True)
class Mark:
    """One test in a plot: its error and the accepted one, in ulps, and a hint for the reader."""

    error: float
    accepted: float
    gated: bool
    holds: bool
    hint: str


@dataclass(frozen=True)
class Plot:
    """The errors of tests, by group."""

    name: str
    summary: str
    groups: Mapping[str, Sequence[Mark]]


Block = str | Table | Plot  # a text is a paragraph


@dataclass(frozen=True)
class Section:
    """A part of a report.

    lines: sentences that need no heading, so that a terminal shows them without `title`. blocks:
    shown by every renderer. more: tables and plots for which only a page has room.
    """

    title: str
    lines: Sequence[str] = ()
    blocks: Sequence[str | Table] = ()
    more: Sequence[Block] = ()
    sections: Sequence[Section] = ()


@dataclass(frozen=True)
class Document(Section):
    """A whole report. The first of its lines is the verdict."""

    passes: bool = False


def text(section: Section) -> str:
    """A section for a terminal, its blocks indented, and the sections in it below empty lines."""
    blocks = (
        f"  {line(block)}" if isinstance(block, str) else table(block.rows, indent="  ")
        for block in section.blocks
    )
    own = "\n".join([*map(line, section.lines), *blocks])
    return "\n\n".join(filter(None, [own, *map(text, section.sections)]))


def markdown(section: Section, level: int = 1) -> str:
    """A section in Markdown, under a heading of a level; plots are left out."""
    parts = [f"{'#' * level} {_escaped(section.title)}", *map(_escaped, section.lines)]
    blocks = [*section.blocks, *(block for block in section.more if isinstance(block, Table))]
    for block in blocks:
        parts.append(_escaped(block) if isinstance(block, str) else _rows(block))
    return "\n\n".join([*parts, *(markdown(part, level + 1) for part in section.sections)])


def _rows(table: Table) -> str:
    """A table in Markdown."""
    head, *rows = table.rows
    marks = ["---:" if i in table.numbers else "---" for i, _ in enumerate(head)]
    lines = [map(_cell, head), marks, *(map(_cell, row) for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _cell(value: object) -> str:
    return f"`{line(value)}`".replace("|", "\\|") if isinstance(value, Code) else _escaped(value)


def _escaped(value: object) -> str:
    """A text of one line; what Markdown would read as markup, but for backquotes, is escaped."""
    text = line(value)
    return "".join(f"\\{c}" if c in "\\*_[]<>|#" else c for c in text)
