"""Plain text for a terminal or a file: characters that could steer it are shown as escapes."""

from __future__ import annotations

from collections.abc import Sequence


def printable(text: object, keep: str = "\n") -> str:
    """`text` with an escape for every character that is neither printable nor in `keep`.

    An escape sequence could rewrite what stands on a terminal; a path may hold bytes that no
    encoding has.

    >>> printable("a name\\x1b[2J")
    'a name\\\\x1b[2J'
    """
    return "".join(c if c in keep or c.isprintable() else _escape(c) for c in str(text))


def _escape(c: str) -> str:
    return c.encode("unicode_escape", "surrogatepass").decode("ascii")


def line(text: object) -> str:
    """`text` as one printable line."""
    return printable(text, keep="")


def counted(n: int, what: str) -> str:
    """A number of things.

    >>> counted(1, "thread"), counted(2, "thread")
    ('1 thread', '2 threads')
    """
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def several(names: Sequence[str], most: int = 3) -> str:
    """Names for a message: the first ones, and how many more there are.

    >>> several(["a", "b", "c", "d"])
    'a, b, c and 1 more'
    """
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def table(rows: Sequence[Sequence[object]], indent: str = "") -> str:
    """Rows as lines with aligned columns; a cell is one line, whatever is in it."""
    cells = [[line(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    padded = ("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in cells)
    return "\n".join((indent + row).rstrip() for row in padded)
