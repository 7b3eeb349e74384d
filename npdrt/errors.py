"""The errors a user can meet. Each class carries the exit code of the command line."""

from __future__ import annotations

import errno
import os

# Errors of the system about a path that was given wrongly; the others are the disk's.
WRONG_PATH = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError)
LACKS = (errno.ENOMEM, errno.EMFILE, errno.ENFILE)  # memory, open files


class Error(Exception):
    """Base of every error npdrt raises on purpose: what was asked, what arrived, what to do."""

    exit_code = 2


class Diverged(Error):
    """Training met a value that is not finite, or a check failed (exit code 1)."""

    exit_code = 1


class FileRefused(Error):
    """A file is damaged, truncated, mislabelled or not of an allowed form (exit code 3)."""

    exit_code = 3


class Unavailable(Error):
    """The environment lacks something: a GPU, an extra, a data set (exit code 4)."""

    exit_code = 4


class DiskError(Error):
    """The disk is full, cannot be written to, or failed (exit code 5)."""

    exit_code = 5


def missing(path: object) -> str:
    """What npdrt says of a path with nothing there."""
    return f"{path} does not exist"


def known(error: BaseException) -> BaseException:
    """The npdrt error for one of the system or of memory; any other as it is."""
    if isinstance(error, OSError):
        return of_the_system(error)
    if isinstance(error, MemoryError | OverflowError):
        return Unavailable(f"not enough memory: {error}")
    return error


def of_the_system(error: OSError) -> Error:
    """The npdrt error for an error of the system that no module has named."""
    text = error.strerror or str(error)
    if error.errno in LACKS:
        return Unavailable(f"the system is out of something: {text}")
    if error.filename is None:
        return DiskError(f"reading or writing failed: {text}; check where the output goes")
    if isinstance(error, FileNotFoundError):
        return Error(missing(os.fsdecode(error.filename)))
    kind = Error if isinstance(error, WRONG_PATH) else DiskError
    return kind(f"{os.fsdecode(error.filename)}: {text}")
