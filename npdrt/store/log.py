"""The log of a run: one JSON object a line, appended and flushed, so that a crash loses nothing.

Every line has "event" and "step". Numbers that are not finite are written as null.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from npdrt import atomic, regular, schema
from npdrt.errors import FileRefused

Record = dict[str, Any]


class Log:
    """An append-only log file; use it as a context manager."""

    def __init__(self, path: Path):
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: Record) -> None:
        """Append one line and hand it to the operating system."""
        self._file.write(json.dumps(finite(record), allow_nan=False) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Force what was written to the disk; called before each checkpoint."""
        os.fsync(self._file.fileno())

    def __enter__(self) -> Log:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()


def finite(value: Any) -> Any:
    """`value` with every float that is not finite, at any depth, as None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def read(path: Path) -> list[Record]:
    """The records of a log; an unfinished last line, as a crash leaves it, is dropped."""
    lines = regular.contents(path).split(b"\n")[:-1]
    return [schema.log_record(line, f"{path}: line {n}") for n, line in enumerate(lines, 1)]


def _records(path: Path) -> Iterator[Record | None]:
    """The record of every finished line, None for a line that holds none."""
    for line in regular.contents(path).split(b"\n")[:-1]:
        try:
            yield schema.log_record(line, path)
        except FileRefused:
            yield None


def cut(path: Path, step: int) -> list[Record]:
    """Drop every record after training step `step` from the file; returns those that stay.

    Damaged lines after them, as a power cut leaves them behind the last `sync`, are dropped too.
    """
    kept: list[Record] = []
    damaged = 0
    for number, record in enumerate(_records(path), 1):
        if record is None:
            damaged = damaged or number
        elif record["step"] <= step:
            if damaged:
                raise FileRefused(f"{path}: line {damaged} is damaged, and sound ones follow it")
            kept.append(record)
    text = "".join(json.dumps(record) + "\n" for record in kept)
    atomic.replace(path, text.encode())
    return kept
