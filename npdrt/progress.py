"""Progress on stderr: a bar on a terminal or in a notebook, in a log a line now and then."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable

EVERY = 30.0  # seconds between two lines of a log
REDRAWN = 0.1  # seconds between two states of a bar
WIDEST = 30  # characters of a bar
NARROWEST = 5
USUAL = 80  # columns where nothing says how many there are


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook."""
    module = sys.modules.get("IPython")
    return getattr(module and module.get_ipython(), "kernel", None) is not None


def drawn() -> bool:
    """Whether stderr takes a bar: a terminal, or a notebook."""
    return sys.stderr is not None and (sys.stderr.isatty() or in_notebook())


def columns() -> int:
    """The width of the terminal that is stderr."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns or USUAL
    except (OSError, ValueError, AttributeError):  # no terminal; no file at all
        return USUAL


def to_stderr(text: str) -> None:
    """Write text at once."""
    sys.stderr.write(text)
    sys.stderr.flush()


class Bars:
    """The progress of work under a label; a context manager.

    quiet: say nothing. write: where texts go. clock: gives seconds.
    """

    def __init__(
        self,
        *,
        quiet: bool = False,
        write: Callable[[str], None] = to_stderr,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._quiet, self._write, self._clock = quiet, write, clock
        self._bar, self._label, self._length = drawn(), "", 0
        self._begun, self._first, self._told = 0.0, 0, 0.0

    def __enter__(self) -> Bars:
        return self

    def __exit__(self, *error: object) -> None:
        self._leave()

    def progress(self, label: str, done: int, total: int, words: Callable[[], str] = str) -> None:
        """Say that `done` of `total` is done under that label; `words` gives the text after it."""
        if self._quiet:
            return
        now, ends = self._clock(), done >= total
        if label != self._label:
            self._leave()
            self._label, self._begun, self._first = label, now, done
            self._told = now - REDRAWN if self._bar else now  # a bar appears at once
        if self._bar and (ends or now - self._told >= REDRAWN):
            self._told = now
            width, left = columns(), self._left(now, done, total)
            self._draw(bar(label, done, total, left, words(), width), width)
        elif not self._bar and now - self._told >= EVERY:
            self._told = now
            left = self._left(now, done, total)
            parts = (f"{label} {done} of {total}, {share(done, total)}%, {left} left", words())
            self._write(", ".join(filter(None, parts)) + "\n")

    def _left(self, now: float, done: int, total: int) -> str:
        """The time that is left, at the speed so far."""
        made = max(done - self._first, 1)
        return clock((now - self._begun) / made * max(total - done, 0))

    def _draw(self, text: str, width: int) -> None:
        """Draw over the state before, but not beyond the terminal."""
        self._write("\r" + text.ljust(min(self._length, width - 1)))
        self._length = len(text)

    def _leave(self) -> None:
        if self._length:
            self._write("\n")
        self._length, self._label = 0, ""


def share(done: int, total: int) -> int:
    """Per cent, 100 only at the end."""
    return 100 * done // max(total, 1)


def clock(seconds: float) -> str:
    """Hours, minutes and seconds.

    >>> clock(3725.4)
    '1:02:05'
    """
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def bar(label: str, done: int, total: int, left: str, words: str, width: int) -> str:
    """A line of at most `width - 1` characters: a terminal may break a line that fills it.

    >>> bar("training", 30, 120, "0:00:09", "loss 0.5", 60)
    'training [######--------------------]  25% 0:00:09 loss 0.5'
    """
    parts = [label, f"{share(done, total):3}%", left, *filter(None, [words])]
    room = width - 1 - sum(len(part) + 1 for part in parts) - 2  # brackets
    if room >= NARROWEST:
        size = min(room, WIDEST)
        filled = size * done // max(total, 1)
        parts.insert(1, f"[{'#' * filled}{'-' * (size - filled)}]")
    return " ".join(parts)[: width - 1]
