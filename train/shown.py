"""The progress of a run for a person."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from npdrt.progress import Bars, in_notebook
from npdrt.store.log import Record
from npdrt.train.loop import Reporter


def _to_stderr(text: str) -> None:
    print(f"Warning: {text}", file=sys.stderr)


class Shown(Reporter):
    """A bar or lines, with time left, loss and accuracy. warn: what is done with a warning."""

    def __init__(self, bars: Bars, warn: Callable[[str], None] = _to_stderr) -> None:
        self._bars, self._warn = bars, warn
        self.moved = False
        """Whether a step was made."""
        self._record: Record = {}

    def progress(self, step: int, steps: int, record: Record | None) -> None:
        """Move the bar; the newest record gives the numbers next to it."""
        self._record, self.moved = record or self._record, True
        self._bars.progress("training", step, steps, partial(numbers, self._record))

    def warning(self, text: str) -> None:
        """Pass a warning on."""
        self._warn(text)


def usual_reporter() -> Reporter:
    """Where nobody gave a reporter: a bar in a notebook, else silence."""
    return Shown(Bars()) if in_notebook() else Reporter()


def numbers(record: dict[str, Any]) -> str:
    """The loss and the accuracy or perplexity of a record."""
    if not record:
        return ""
    loss = record.get("train_loss", record.get("loss"))
    shown = f"loss {loss:.4f}"
    if "train_perplexity" in record:
        shown += f"  perplexity {record['train_perplexity']:.2f}"
    elif "train_accuracy" in record:
        shown += f"  accuracy {record['train_accuracy']:.4f}"
    return shown
