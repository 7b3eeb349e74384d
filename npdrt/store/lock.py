"""One process at a time in a run directory."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from npdrt.errors import Error

try:
    import fcntl
except ImportError:  # Windows has no such lock
    fcntl = None  # type: ignore[assignment]

PATIENCE = 10.0  # seconds: a process whose parent was killed saves and ends after its step


@contextmanager
def exclusive(directory: Path) -> Iterator[None]:
    """Hold the directory, waiting PATIENCE for another process to leave it; then `Error`.

    The lock is the system's: it ends with the process, however that ends, and leaves no file. A
    directory that is not there is free.
    """
    if fcntl is None or not directory.is_dir():
        yield
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        _take(handle, directory)
        yield
    finally:
        os.close(handle)


def _take(handle: int, directory: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError as error:
            if time.monotonic() > deadline:
                raise Error(
                    f"{directory} is in use by another process; wait for its end, or stop it"
                ) from error
            time.sleep(0.1)
