"""Which process made a lock or a temporary file, and whether that process is gone."""

from __future__ import annotations

import hashlib
import os
import platform
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path


@dataclass(frozen=True)
class Owner:
    """A process, for other processes on this machine and elsewhere.

    place: 8 hex digits that tell machines, their starts and their process namespaces apart; a
    process number means something in one place only. host: the machine's name. start: when the
    process began, in the system's ticks, 0 where the system does not say: numbers are used again.
    """

    place: str
    host: str
    process: int
    start: int

    def __str__(self) -> str:
        return f"process {self.process} on {self.host}"


def this() -> Owner:
    """The running process."""
    process = os.getpid()
    return Owner(_place(), platform.node(), process, _started(process))


def here(owner: Owner) -> bool:
    """Whether it belongs to this place, so that `gone` can tell."""
    return owner.place == _place()


def gone(owner: Owner) -> bool:
    """Whether the process has certainly ended; False where that cannot be known from here."""
    if not here(owner) or sys.platform == "win32":  # there, signal 0 would be sent
        return False
    try:
        os.kill(owner.process, 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):  # another user's process, or no process number
        return False
    started = _started(owner.process)
    return bool(started and owner.start and started != owner.start) or _is_zombie(owner.process)


@cache
def _place() -> str:
    parts = [platform.node(), _text(Path("/proc/sys/kernel/random/boot_id"))]
    try:
        parts.append(str(Path("/proc/self/ns/pid").readlink()))
    except OSError:
        parts.append("")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:8]


def _started(process: int) -> int:
    fields = _status(process)
    return int(fields[19]) if len(fields) > 19 else 0


def _is_zombie(process: int) -> bool:
    """It has ended, and its parent has not asked for its exit code."""
    return _status(process)[:1] in (["Z"], ["X"])


def _status(process: int) -> list[str]:
    """The fields of /proc/PID/stat from the state on, the third; [] where there are none."""
    return _text(Path(f"/proc/{process}/stat")).rpartition(")")[2].split()


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
