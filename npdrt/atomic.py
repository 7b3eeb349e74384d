"""Replace a file, whole or not at all. No other module of npdrt writes over a file.

    with atomic.replacing(path) as handle:    # a temporary file in the same directory
        handle.write(content)
    # the file at `path` is now the new one, and it is on the disk

A reader sees the old file or the new one, never a part; so does the machine after a power cut.
File systems without permissions, locks or directories that can be synced (CIFS, vfat, gcsfuse,
some NFS and Lustre) are used as they are, with one warning.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
import stat
import warnings
from collections.abc import Callable, Iterator
from io import BufferedRandom
from pathlib import Path

from npdrt import regular
from npdrt.errors import DiskError, FileRefused

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None  # type: ignore[assignment]

UNSUPPORTED = {
    errno.EPERM, errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL,
    errno.EBADF,
}  # fmt: skip
_TEMPORARY = re.compile(r"\.npdrt-[0-9a-f]{16}\.tmp")
_warned: set[str] = set()


def replace(path: Path, content: bytes) -> None:
    """Put a file with `content` at `path`; `DiskError` if the disk or the system refuses."""
    with replacing(path) as handle:
        handle.write(content)


@contextlib.contextmanager
def replacing(path: Path, *, before: Callable[[], None] = lambda: None) -> Iterator[BufferedRandom]:
    """Yield a new file, open for reading and writing, that takes the place of `path` at the end.

    An old file keeps its permissions; a new one obeys the umask. A symbolic link at `path` is
    replaced, not followed. before: called when the new file is on the disk, before it takes the
    place of the old one.

    If the block raises, `path` is as it was and the temporary file is gone; a killed process may
    leave one (`remove_stale`). `OSError` becomes `DiskError` with the path.
    """
    temporary = path.with_name(f".npdrt-{secrets.token_hex(8)}.tmp")
    with reporting(path), contextlib.ExitStack() as undo:
        mode = _mode(path)
        create = 0o666 if mode is None else mode | 0o600  # the system applies the umask
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0)
        descriptor = os.open(temporary, flags, create)
        undo.callback(temporary.unlink, missing_ok=True)
        with os.fdopen(descriptor, "w+b") as handle:
            lock(handle.fileno())  # marks it as in use; ends with the process
            yield handle
            handle.flush()
            if mode is not None:
                unless_unsupported("keeps no permissions", lambda: os.fchmod(descriptor, mode))
            unless_unsupported("cannot force files to the disk", lambda: os.fsync(descriptor))
            before()
            temporary.replace(path)
        undo.pop_all()
        sync_directory(path.parent)


@contextlib.contextmanager
def reporting(path: Path) -> Iterator[None]:
    """Turn an `OSError` of the system into a `DiskError` that names the file."""
    try:
        yield
    except OSError as error:
        raise DiskError(
            f"{path}: could not be written ({error.strerror or error}); check the disk's space and "
            "permissions"
        ) from error


def keep(path: Path, other: Path) -> None:
    """Give the file at `path` the name `other` too; a file that was there is replaced.

    A hard link, or a copy on a file system without them.
    """
    temporary = other.with_name(f".npdrt-{secrets.token_hex(8)}.tmp")
    try:
        try:
            os.link(path, temporary)
        except OSError:
            shutil.copy2(path, temporary)
        temporary.replace(other)
    finally:  # rename does nothing if both names are already the same file
        temporary.unlink(missing_ok=True)


def sync_directory(directory: Path) -> None:
    """Force the names in a directory to the disk; `OSError` if the disk fails."""
    try:
        descriptor = os.open(directory, os.O_RDONLY)
    except PermissionError:  # Windows, or a directory that may be written to but not read
        return
    try:
        unless_unsupported("cannot force file names to the disk", lambda: os.fsync(descriptor))
    finally:
        os.close(descriptor)


def remove_stale(directory: Path) -> list[Path]:
    """Remove the temporary files that killed processes left in `directory`; return their paths."""
    ours = [path for path in sorted(directory.iterdir()) if _TEMPORARY.fullmatch(path.name)]
    stale = [path for path in ours if _abandoned(path)]
    for path in stale:
        path.unlink(missing_ok=True)
    return stale


def lock(descriptor: int) -> bool | None:
    """Lock a file or directory: True if taken, False if another process has it.

    None if the file system or the system has no locks. The lock ends with the process.
    """
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in (errno.EWOULDBLOCK, errno.EACCES) else None
    return True


def unless_unsupported(what: str, action: Callable[[], None]) -> None:
    """Do it; where the file system has no such operation, warn once that it `what`."""
    try:
        action()
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        warn_once(f"this file system {what} ({error.strerror})")


def warn_once(text: str) -> None:
    """Warn, the first time it is said; never raises, since the work goes on."""
    if text not in _warned:
        _warned.add(text)
        with contextlib.suppress(Warning):
            warnings.warn(text, stacklevel=3)


def _mode(path: Path) -> int | None:
    """The permission bits of a regular file at `path`, None if there is none."""
    with contextlib.suppress(FileNotFoundError):
        status = path.lstat()
        return status.st_mode & 0o777 if stat.S_ISREG(status.st_mode) else None
    return None


def _abandoned(path: Path) -> bool:
    try:
        with regular.open_file(path) as handle:
            return lock(handle.fileno()) is True
    except (OSError, FileRefused):
        return False
