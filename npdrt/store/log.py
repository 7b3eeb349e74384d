"""The log of a run: one JSON object on each line, written at once, so that a crash loses nothing.

Every line has "event" and "step". Numbers that are not finite are written as null. A checkpoint
holds the `Tally` of the records that it covers, so that a resumed run sees whether its log was cut,
emptied or exchanged.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
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
    try:
        record = json.loads(line) if OWN.encode() in line else None
    except (ValueError, RecursionError):
        return line
    if not isinstance(record, dict):
        return line
    return json.dumps({name: value for name, value in record.items() if name != OWN}).encode()


class Log:
    """An append-only log file; use it as a context manager.

    tally: the tally of its lines, kept up to date. size: its size in bytes.
    """

    def __init__(self, path: Path, tally: Tally | None = None):
        self.path, self.tally = path, tally or Tally()
        with atomic.reporting(path):
            self._file = atomic.appending(path)
            self.size = self._file.tell()

    def write(self, record: Record) -> None:
        """Append one line and pass it to the operating system; `DiskError` if it has no room."""
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
    """The records of a log, without the unfinished last line that a crash may leave."""
    numbered = enumerate(lines(path), 1)
    return [schema.log_record(line, f"{path}: line {n}") for n, line in numbered]


def lines(path: Path) -> list[bytes]:
    """Every finished line of a log, without its end."""
    return regular.contents(path).split(b"\n")[:-1]


def _record(line: bytes, path: Path) -> Record | None:
    """The record on a line, None if the line is damaged."""
    try:
        found: Record = schema.log_record(line, path)
    except FileRefused:
        return None
    return found


def sound(path: Path) -> list[Record]:
    """The records before the first damaged line; a power cut may damage the end of a log."""
    found: list[Record] = []
    for line in lines(path):
        if (record := _record(line, path)) is None:
            break
        found.append(record)
    return found


def rewind(path: Path, covered: Mapping[str, Any]) -> tuple[Tally, float]:
    """Cut a log back to the records that a checkpoint covers; return their tally and `seconds`.

    covered: `Tally.as_dict` at the checkpoint. Raises `FileRefused`, and changes nothing, unless
    the log begins with exactly these records. The file is replaced, so that other hard links to it
    keep its old content.
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
    """The tally of the records up to a step, for a checkpoint of an older npdrt, which has none.

    Raises `FileRefused` if a line between them is damaged.
    """
    found = lines(path)
    records = [_record(line, path) for line in found]
    within = [record is not None and record["step"] <= step for record in records]
    count = within.index(False) if False in within else len(within)
    if any(within[count:]):
        raise FileRefused(f"{path}: line {count + 1} is damaged, and sound ones follow it")
    return Tally(found[:count]).as_dict()
