"""One process at a time in a directory: a run's, a sweep's or a study's.

    with exclusive(directory, make=True):    # another process waits, or is refused
        ...                                  # look, clean and write

It is a lock of the operating system (flock on the directory): it ends when the process ends, in any
way, and leaves no file. On a file system without such locks, a file `npdrt.lock` that names the
process takes its place. If the process is dead, the next one on the same machine takes over.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from npdrt import atomic, owner, regular
from npdrt.errors import DiskError, Error, FileRefused
from npdrt.owner import Owner

NAME = "npdrt.lock"
PATIENCE = 10.0  # seconds: a process whose parent was killed saves and ends after its step
_POLL = 0.1  # seconds
_UNKNOWN = Owner("", "an unknown machine", 0, 0)


class InUse(Error):
    """Another process holds the directory."""


@contextlib.contextmanager
def exclusive(
    directory: Path, *, make: bool = False, waiting: Callable[[], bool] | None = None
) -> Iterator[None]:
    """Hold the directory; temporary files of killed processes in it are removed at once.

    make: make the directory and its parents if they are missing; those still empty at the end are
    removed again. waiting: called while another process holds the directory; it says whether to
    wait longer, by default for PATIENCE seconds. Raises `InUse` after that, `Error` if there is no
    directory, `DiskError` if the system refuses.
    """
    waiting = waiting or _patience()
    made: list[Path] = []
    with contextlib.ExitStack() as held:
        while not _acquired(directory, make, made, held):
            if not waiting():
                raise InUse(
                    f"{directory} is in use by another process; wait for its end, or stop it"
                )
            time.sleep(_POLL)
        _clean(directory)
        yield


@contextlib.contextmanager
def numbered(parent: Path, stem: str) -> Iterator[Path]:
    """Make the directory PARENT/STEM-N with the first free N; no other process gets the same.

    It is removed again if it is empty at the end.
    """
    number = 1
    while (directory := parent / f"{stem}-{number}") not in (made := _make(directory)):
        number += 1
    try:
        yield directory
    finally:
        _remove_empty(made)


def _patience() -> Callable[[], bool]:
    deadline = time.monotonic() + PATIENCE
    return lambda: time.monotonic() < deadline


def _acquired(directory: Path, make: bool, made: list[Path], held: contextlib.ExitStack) -> bool:
    """Whether this process got the directory; if so, closing `held` gives it back."""
    made += _make(directory) if make else []
    if make and not directory.exists():
        return False  # another process removed it
    with contextlib.ExitStack() as attempt:
        try:
            taken = _flock(directory, attempt)
        except DiskError:
            _remove_empty(made)
            raise
        if taken is None:
            atomic.warn_once(f"this file system has no locks; a file {NAME} takes their place")
        by_file = taken is None or (taken and (directory / NAME).exists())
        if taken is False or (by_file and not _claimed(directory / NAME)):
            return False
        attempt.callback(_remove_empty, made)
        if by_file:
            attempt.callback(_release, directory / NAME)
        held.push(attempt.pop_all())
    return True


def _flock(directory: Path, held: contextlib.ExitStack) -> bool | None:
    """`atomic.lock` of a directory; also False if the path no longer leads to it."""
    if not directory.is_dir():
        raise Error(f"{directory} is not a directory")
    if os.name == "nt":  # directories cannot be opened
        return None
    with atomic.reporting(directory):
        handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        held.callback(os.close, handle)
        taken = atomic.lock(handle)
    return taken if _is_still(directory, handle) else False


def _make(directory: Path) -> list[Path]:
    """Make a directory if it is missing; return those that were made, the innermost first."""
    made: list[Path] = []
    with atomic.reporting(directory):
        missing = [path for path in (directory, *directory.parents) if not path.exists()]
        for path in reversed(missing):
            with contextlib.suppress(FileExistsError):  # another process made it
                if _made(path):
                    made.insert(0, path)
    return made


def _made(path: Path) -> bool:
    """Make a directory; False if another process removed its parent. Some file systems, such as
    /proc, answer in the same words that they make none: then `Error`."""
    try:
        path.mkdir()
    except FileNotFoundError as error:
        if path.parent.exists():
            raise Error(f"{path} cannot be made there; give another place") from error
        return False
    return True


def _remove_empty(directories: list[Path]) -> None:
    """Remove the empty ones, beginning with the innermost."""
    with contextlib.suppress(OSError):
        for directory in directories:
            directory.rmdir()


def _is_still(directory: Path, handle: int) -> bool:
    """Whether the path still leads to the open directory, which another process may remove."""
    try:
        return os.path.samestat(directory.stat(), os.fstat(handle))
    except FileNotFoundError:
        return False


def _clean(directory: Path) -> None:
    for folder in [directory, *filter(_is_folder, directory.iterdir())]:
        atomic.remove_stale(folder)


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


# --- the file that takes the lock's place ----------------------------------------------------


def _claimed(path: Path) -> bool:
    """Whether this process got the lock file; `InUse` if an unknown process has it.

    To remove the file of a dead process, a process must hold PATH.stale, a lock of the same kind,
    and look again. So no process removes the file of a faster one.
    """
    mine = json.dumps(dataclasses.asdict(owner.this())).encode()
    while not atomic.create(path, mine):
        holder = _holder(path)
        if holder is not None and not owner.gone(holder):
            return _wait_for(holder, path)
        if holder is not None and not _removed(path, holder):
            return False
    return True


def _removed(path: Path, holder: Owner) -> bool:
    """Whether the lock file of a dead process was dealt with; False if another process is at it."""
    stale = path.with_name(path.name + ".stale")
    if not _claimed(stale):
        return False
    if _holder(path) == holder:
        path.unlink(missing_ok=True)
    _release(stale)
    return True


def _wait_for(holder: Owner, path: Path) -> bool:
    """False if the holder runs on this machine, so that npdrt sees its end; else raise `InUse`."""
    if owner.here(holder):
        return False
    raise InUse(
        f"{path.parent} is in use by {holder}, says {path}; wait for its end, or stop it. If that "
        "process is gone, remove the file"
    )


def _release(path: Path) -> None:
    if _holder(path) == owner.this():
        path.unlink(missing_ok=True)


def _holder(path: Path) -> Owner | None:
    """The process that is named in a lock file, None if there is no file."""
    try:
        with regular.open_file(path) as handle:
            found = json.loads(handle.read(4096))
        return Owner(
            str(found["place"]), str(found["host"]), int(found["process"]), int(found["start"])
        )
    except FileNotFoundError:
        return None
    except (OSError, FileRefused, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return _UNKNOWN
