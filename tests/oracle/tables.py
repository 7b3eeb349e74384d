"""The tables in docs/ of what the referee knows: its dialects and the libraries' optimizers."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from npdrt.conform.rules import KNOWN, RULES

DOCS = Path(__file__).parents[2] / "docs"


def dialects() -> Iterator[str]:
    """The table of docs/audit.md."""
    yield "| rule | dialect | differs in | source |"
    yield "|---|---|---|---|"
    for rule in RULES.values():
        for d in rule.dialects:
            choices = "; ".join(f"`{k}`: {v}" for k, v in d.choices.items()).replace("|", "\\|")
            name = d.name if d.scope else f"{d.name} (out of scope)"
            yield f"| {rule.name} | {name} | {choices} | {d.source} |"


def optimizers() -> Iterator[str]:
    """The table of docs/audit-protocol.md, but for its last row, that of a file."""
    yield "| target | rule | settings |"
    yield "|---|---|---|"
    for name, (rule, known) in KNOWN.items():
        fixed = (f"{key} = {str(value).lower()}" for key, value in known.fixed.items())
        offers = ("those in its signature",) if known.offers is None else known.offers
        yield f"| `{name}` | {rule.name} | {', '.join((*offers, *fixed)) or 'none'} |"


TABLES = {"audit.md": dialects, "audit-protocol.md": optimizers}


def page(name: str) -> str:
    """A page of docs/ with its table brought up to date: its rows from the heading on, up to a
    row that no rule makes (`path/to/file.py`) or the end of the table."""
    rows = list(TABLES[name]())
    found = (DOCS / name).read_text(encoding="utf-8")
    old = re.escape("\n".join(rows[:2])) + r"\n(\| (?!`path).*\n)*"
    new, count = re.subn(old, lambda _: "\n".join(rows) + "\n", found)
    assert count == 1, f"{name} has no table of {rows[0]}"
    return new
