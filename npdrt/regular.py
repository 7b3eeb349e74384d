"""Open a regular file for reading. Every reader in npdrt opens its files with this module.

A FIFO would wait for a writer, a device has no end, and a symbolic link may lead anywhere: all are
refused, but links can be allowed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Callable, Iterator
from io import BufferedReader
from pathlib import Path

from npdrt.errors import Error, FileRefused
from npdrt.errors import missing as missing


def open_file(path: Path, *, follow: bool = False) -> BufferedReader:
    """Open a regular file. follow: whether `path` may be a symbolic link to one.

    Raises `FileRefused` if it is something else, `OSError` if it cannot be opened.
    """

    return open(path, "rb", opener=opener(follow=follow))


def require(path: Path, what: str = "") -> None:
    """Raise `Error` if nothing is at `path`. what: "file" or "directory", if it must be one."""
    if not path.exists():
        raise Error(missing(path))
    if not {"file": path.is_file, "directory": path.is_dir, "": path.exists}[what]():
        raise Error(f"{path} is not a {what}; give the path of one")


def opener(*, follow: bool = False) -> Callable[[str, int], int]:
    """The argument `opener` of Python's `open` that refuses anything but a regular file."""
    return lambda name, flags: _descriptor(name, flags, follow)


def contents(path: Path, *, follow: bool = False, limit: int | None = None) -> bytes:
    """All bytes of a regular file; `FileRefused` if it cannot be read or has more than `limit`."""
    with refusing(path), open_file(path, follow=follow) as handle:
        size = os.fstat(handle.fileno()).st_size
        if limit is not None and size > limit:
            raise FileRefused(f"has {size} bytes, more than the limit of {limit}")
        return handle.read()


@contextlib.contextmanager
def refusing(path: object) -> Iterator[None]:
    """Put the path before every `FileRefused`, and turn an `OSError` into one."""
    try:
        yield
    except FileNotFoundError as error:
        raise FileRefused(missing(path)) from error
    except OSError as error:
        reason = error.strerror or error
        raise FileRefused(f"{path}: cannot be read: {reason}; check path and file") from error
    except FileRefused as error:
        named = str(error).startswith((f"{path}: ", missing(path)))
        raise error if named else FileRefused(f"{path}: {error}") from error


def _descriptor(name: str, flags: int, follow: bool) -> int:
    flags |= getattr(os, "O_NONBLOCK", 0)  # or opening a FIFO would wait
    flags |= 0 if follow else getattr(os, "O_NOFOLLOW", 0)
    try:
        descriptor = os.open(name, flags, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise FileRefused(
                f"{name}: is a symbolic link; give the path of the file itself"
            ) from None
        if error.errno == errno.ENXIO:  # a socket
            raise FileRefused(f"{name}: is not a regular file; give the path of a file") from None
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise FileRefused(f"{name}: is not a regular file; give the path of a file")
    return descriptor
