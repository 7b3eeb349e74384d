"""`npdrt convert`."""

from __future__ import annotations

import shutil
from pathlib import Path

import click

from npdrt import atomic, regular
from npdrt.errors import DiskError, Error, FileRefused
from npdrt.store import container, foreign


@click.command("convert")
@click.argument("old", type=click.Path(path_type=Path))
@click.argument("new", type=click.Path(path_type=Path))
def command(old: Path, new: Path) -> None:
    """Write OLD, a checkpoint or trace of format version 1, as NEW in today's format; arrays and
    metadata stay as they are. If OLD is a directory, NEW becomes a copy of it in which every file
    of version 1 is converted.

    The old format is read by HDF5 in a process of its own with limits of memory and time.
    """
    if new.exists() or new.is_symlink():
        raise Error(f"{new} already exists; give a name that is free")
    regular.require(old)
    count = _directory(old, new) if old.is_dir() else _file(old, new)
    click.echo(f"{new}: {count} converted")


def _directory(old: Path, new: Path) -> int:
    """Copy a directory, converted; how many files were. If one is refused, nothing is left."""
    files = [path for path in sorted(old.rglob("*")) if path.is_file() and not path.is_symlink()]
    count = 0
    try:
        for path in files:
            target = new / path.relative_to(old)
            with atomic.reporting(target):
                target.parent.mkdir(parents=True, exist_ok=True)
            if container.version(path) == 1:
                count += _file(path, target)
            else:
                atomic.replace(target, regular.contents(path))
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    return count


def _file(old: Path, new: Path) -> int:
    if container.version(old) == container.FORMAT:
        raise FileRefused(f"{old}: has format version {container.FORMAT} already; use it as it is")
    arrays, meta = foreign.read_version_1(old)
    try:
        container.write(new, arrays, meta)
    except DiskError:
        raise
    except Error as error:  # names that npdrt does not write
        raise FileRefused(f"{old}: {error}") from error
    return 1
