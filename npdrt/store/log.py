"""The log of a run: one JSON object a line, handed to the system at once, so that a crash loses
nothing.

Every line has "event" and "step". Numbers that are not finite are written as null. A checkpoint
holds the `Tally` of the records that it covers, so that a log that was cut, emptied or exchanged
is seen when the run is resumed.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from npdrt import atomic, regular, schema
from npdrt.errors import FileRefused

Record = dict[str, Any]
OWN = "seconds"  # the only value that differs between a resumed run and one that never stopped


class Tally:
    """Count and SHA-256 of the lines of a log, without their `OWN` value."""

    def __init__(self, lines: Sequence[bytes] = ()) -> None:
        self.records = 0
        self._sha = hashlib.sha256()
        for line in lines:
            self.add(line)

    def add(self, line: bytes) -> None:
        """Count one line, without its end."""
        self.records += 1
        self._sha.update(_without_own(line) + b"\n")

    def as_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"records": self.records, "sha256": self._sha.hexdigest()}


def _without_own(line: bytes) -> bytes:
    record = _parsed(line) if OWN.encode() in line else None
    if not isinstance(record, dict):
        return line
    return json.dumps({name: value for name, value in record.items() if name != OWN}).encode()


class Log:
    """An append-only log file; use it as a context manager.

    tally: of the lines in it, kept up to date. size: bytes written to it and found in it.
    """

    def __init__(self, path: Path, tally: Tally | None = None):
        self.path, self.tally = path, tally or Tally()
        with atomic.reporting(path):
            self._file = atomic.appending(path)
            self.size = self._file.tell()

    def write(self, record: Record) -> None:
        """Append one line and hand it to the operating system; `DiskError` if it has no room."""
        line = json.dumps(finite(record), allow_nan=False).encode()
        left = memoryview(line + b"\n")
        with atomic.reporting(self.path):
            while left:
                left = left[self._file.write(left) :]
        self.tally.add(line)
        self.size += len(line) + 1

    def sync(self) -> None:
        """Force what was written to the disk; called before each checkpoint."""
        atomic.sync(self.path, self._file.fileno())

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
    return (_record(line, path) for line in lines(path))


def lines(path: Path) -> list[bytes]:
    """Every finished line of a log, without its end."""
    return regular.contents(path).split(b"\n")[:-1]


def _record(line: bytes, path: Path) -> Record | None:
    try:
        found: Record = schema.log_record(line, path)
    except FileRefused:
        return None
    return found


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def sound(path: Path) -> list[Record]:
    """The records before the first line that is damaged, as a power cut leaves it."""
    found = []
    for record in _records(path):
        if record is None:
            break
        found.append(record)
    return found


def rewind(path: Path, covered: Mapping[str, Any]) -> tuple[Tally, float]:
    """Take a log back to the records that a checkpoint covers; return their tally, and `seconds`.

    covered: `Tally.as_dict` at the checkpoint. Raises `FileRefused`, and changes nothing, unless
    the log begins with exactly these records. The file is replaced, so that one with which it
    shared its content (a hard link) stays as it is.
    """
    kept = lines(path)[: covered["records"]]
    tally = Tally(kept)
    if tally.as_dict() != covered:
        raise FileRefused(
            f"{path}: does not begin with the {covered['records']} records that the checkpoint "
            "covers, so it is damaged or of another run; restore the log that belongs to the "
            "checkpoint, or start a new run"
        )
    atomic.replace(path, b"".join(line + b"\n" for line in kept))
    own = [record.get(OWN, 0.0) for line in kept if (record := _record(line, path))]
    return tally, max(own, default=0.0)


def until(path: Path, step: int) -> dict[str, Any]:
    """The tally of the records up to a step, for a checkpoint that has none (of an older npdrt).

    Raises `FileRefused` if a line between them is damaged.
    """
    found = lines(path)
    records = [_record(line, path) for line in found]
    within = [record is not None and record["step"] <= step for record in records]
    count = within.index(False) if False in within else len(within)
    if any(within[count:]):
        raise FileRefused(f"{path}: line {count + 1} is damaged, and sound ones follow it")
    return Tally(found[:count]).as_dict()
