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
import time
import warnings
from collections.abc import Callable, Iterator
from io import BufferedRandom, FileIO
from pathlib import Path

from npdrt import owner, regular
from npdrt.errors import WRONG_PATH, DiskError, Error, FileRefused

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None  # type: ignore[assignment]

UNSUPPORTED = {
    errno.EPERM, errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL,
    errno.EBADF,
}  # fmt: skip
_TEMPORARY = re.compile(r"\.npdrt-([0-9a-f]{8})-(\d{1,10})-(\d{1,20})-[0-9a-f]{16}\.tmp")
_DAY = 24 * 3600.0
_warned: set[str] = set()


def replace(path: Path, content: bytes) -> None:
    """Put a file with `content` at `path`; `DiskError` if the disk or the system refuses.

    What killed processes left in its directory is removed first (`remove_stale`).
    """
    with contextlib.suppress(OSError):  # a directory that may be written to but not read
        remove_stale(path.parent)
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
    with reporting(path):
        mode = _mode(path)
        with _temporary(path, mode) as handle:
            yield handle
            handle.flush()
            if mode is not None:
                unless_unsupported("keeps no permissions", lambda: os.fchmod(handle.fileno(), mode))
            _sync_file(handle.fileno())
            before()
            Path(handle.name).replace(path)
        sync_directory(path.parent)


def create(path: Path, content: bytes) -> bool:
    """Put a file with `content` at `path` if there is nothing; return whether that was so.

    Of several processes that try, one succeeds. Where the file system has hard links, the file
    appears with its content.
    """
    with reporting(path), _temporary(path) as handle:
        handle.write(content)
        handle.flush()
        try:
            os.link(handle.name, path)
        except FileExistsError:
            return False
        except OSError:
            return _create_in_place(path, content)
        return True


def move(source: Path, target: Path) -> None:
    """Give a finished file, forced to the disk, the name `target` on the same file system."""
    with reporting(target):
        with source.open("rb") as handle:
            _sync_file(handle.fileno())
        source.replace(target)
        sync_directory(target.parent)


def keep(path: Path, other: Path) -> None:
    """Give the file at `path` the name `other` too; a file that was there is replaced.

    A hard link, or a copy on a file system without them.
    """
    temporary = _temporary_name(other)
    try:
        os.link(path, temporary)
        temporary.replace(other)
    except OSError:  # no links here; or Linux, while another process replaces the file
        with regular.open_file(path) as source, replacing(other) as copy:
            shutil.copyfileobj(source, copy)
    finally:  # rename does nothing if both names are already the same file
        temporary.unlink(missing_ok=True)


def appending(path: Path) -> FileIO:
    """Open a regular file at `path` to append to it, unbuffered; it is made if it is missing.

    Raises `FileRefused` if a symbolic link or anything else is there.
    """
    return open(path, "ab", buffering=0, opener=regular.opener())


@contextlib.contextmanager
def reporting(path: Path) -> Iterator[None]:
    """Turn an `OSError` of the system into a `DiskError` that names the file.

    `Error` if the path is wrong: its directory is missing, or it is one.
    """
    try:
        yield
    except FileNotFoundError as error:
        gone = path if path.parent.exists() else path.parent
        raise Error(f"{gone} does not exist; give another path") from error
    except WRONG_PATH as error:
        raise Error(f"{path}: {error.strerror}; give another path") from error
    except OSError as error:
        raise DiskError(
            f"{path}: could not be written ({error.strerror or error}); check the disk's space and "
            "permissions"
        ) from error


def sync(path: Path, descriptor: int) -> None:
    """Force what was written to an open file to the disk; `DiskError` names the file."""
    with reporting(path):
        _sync_file(descriptor)


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
    """Remove the temporary files that killed processes left in `directory`; return their paths.

    A process of this machine is looked up; a file of another one is removed if it is a day old
    and not locked.
    """
    stale = [path for path in sorted(directory.iterdir()) if _is_stale(path)]
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
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        if error.errno not in UNSUPPORTED:
            raise
        return None
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


@contextlib.contextmanager
def _temporary(path: Path, mode: int | None = None) -> Iterator[BufferedRandom]:
    """A new file next to `path`, marked as in use; removed at the end if it is still there."""
    temporary = _temporary_name(path)
    create = 0o666 if mode is None else mode | 0o600  # the system applies the umask
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0)
    try:
        with open(temporary, "w+b", opener=lambda name, _: os.open(name, flags, create)) as handle:
            lock(handle.fileno())  # for processes of another machine; ends with this one
            yield handle
    finally:
        with contextlib.suppress(OSError):  # the usual case: it has another name now
            temporary.unlink()


def _temporary_name(path: Path) -> Path:
    me = owner.this()
    return path.with_name(f".npdrt-{me.place}-{me.process}-{me.start}-{secrets.token_hex(8)}.tmp")


def _create_in_place(path: Path, content: bytes) -> bool:
    try:
        with path.open("xb") as handle, contextlib.ExitStack() as undo:
            undo.callback(path.unlink)
            handle.write(content)
            handle.flush()
            undo.pop_all()
    except FileExistsError:
        return False
    return True


def _sync_file(descriptor: int) -> None:
    unless_unsupported("cannot force files to the disk", lambda: os.fsync(descriptor))


def _mode(path: Path) -> int | None:
    """The permission bits of a regular file at `path`, None if there is none."""
    with contextlib.suppress(FileNotFoundError):
        status = path.lstat()
        return status.st_mode & 0o777 if stat.S_ISREG(status.st_mode) else None
    return None


def _is_stale(path: Path) -> bool:
    """Whether it is a temporary file of a process that is gone."""
    named = _TEMPORARY.fullmatch(path.name)
    if not named or not stat.S_ISREG(path.lstat().st_mode):
        return False
    maker = owner.Owner(named[1], "", int(named[2]), int(named[3]))
    return owner.gone(maker) if owner.here(maker) else _is_old_and_free(path)


def _is_old_and_free(path: Path) -> bool:
    try:
        with regular.open_file(path) as handle:
            old = os.fstat(handle.fileno()).st_mtime < time.time() - _DAY
            return old and lock(handle.fileno()) is True
    except (OSError, FileRefused):
        return False
