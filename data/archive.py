"""Unpack the published files of a .tar.gz, and nothing else."""

from __future__ import annotations

import tarfile
import zlib
from pathlib import Path

from npdrt.data.bounded import opened, take
from npdrt.data.catalogue import Form
from npdrt.errors import FileRefused

_REST = 1 << 24  # bytes that members other than the published files may take
_CHUNK = 1 << 20
_DAMAGED = (tarfile.TarError, zlib.error, EOFError, ValueError)


def unpack(archive: Path, form: Form, into: Path) -> None:
    """Write the files of `form` to the folder `into`, under the names the catalogue gives them.

    No name, link, mode or owner of the archive reaches the disk, so nothing can be written
    elsewhere; a member must be a plain file of the published size. Raises FileRefused if the
    archive is damaged, lacks a file, or unpacks to much more than the published files.
    """
    wanted = {f"{form.folder}/{file.name}": file for file in form.files}
    left = sum(file.bytes for file in form.files) + _REST
    try:
        with opened(archive) as stream, tarfile.open(fileobj=stream, mode="r|gz") as tar:
            for member in tar:
                left -= member.size
                if left < 0:
                    raise FileRefused(f"{archive.name}: unpacks to more than its published files")
                file = wanted.pop(member.name.removeprefix("./"), None)
                if file is not None:
                    _write(tar, member, file.bytes, into / file.name)
    except _DAMAGED as error:
        raise FileRefused(f"{archive.name}: damaged archive: {error}") from error
    if wanted:
        raise FileRefused(f"{archive.name}: lacks {', '.join(wanted)}")


def _write(tar: tarfile.TarFile, member: tarfile.TarInfo, size: int, path: Path) -> None:
    """One member of the archive as a file of that size."""
    stream = tar.extractfile(member) if member.isreg() else None
    if stream is None or member.size != size:
        raise FileRefused(f"{member.name}: expected a plain file of {size} bytes in the archive")
    with path.open("wb") as out:
        while chunk := take(stream, _CHUNK):
            out.write(chunk)
