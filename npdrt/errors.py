"""The errors a user can meet. Each class carries the exit code of the command line."""

from __future__ import annotations

# Errors of the system about a path that was given wrongly; the others are the disk's.
WRONG_PATH = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError)


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
