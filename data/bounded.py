"""Read the files of data sets, packed or not, without trusting the sizes they declare."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import os
import zlib
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import IO, cast

from npdrt import regular
from npdrt.errors import FileRefused

FREE = 1 << 30  # any file may unpack to this many bytes
RATIO = 100  # above FREE: unpacked bytes for each byte on disk; real data need far fewer
_CHUNK = 1 << 20


def check_size(name: str, declared: int, on_disk: int) -> None:
    """Refuse a file that would unpack out of proportion, before anything is unpacked.

    Without this a file of a few kilobytes could fill the memory: deflate packs up to 1032 : 1.
    """
    if declared > max(FREE, RATIO * on_disk):
        raise FileRefused(
            f"{name}: declares {declared} bytes of content in {on_disk} bytes on disk; "
            f"expected at most {FREE} bytes, or {RATIO} times the file"
        )


def take(stream: IO[bytes], n: int) -> bytes:
    """The next `n` bytes, or fewer at the end; takes memory only for bytes that arrive."""
    pieces = []
    while n > 0 and (piece := stream.read(min(n, _CHUNK))):
        pieces.append(piece)
        n -= len(piece)
    return b"".join(pieces)


def contents(path: Path) -> bytes:
    """All bytes of a data set's file; FileRefused if it cannot be read or is not a regular file.

    Links are followed: caches of data sets are made of links.
    """
    return regular.contents(path, follow=True)


@contextlib.contextmanager
def reading(path: Path) -> Iterator[BufferedReader]:
    """A data set's file, open for reading; every `OSError` becomes FileRefused with the path."""
    with regular.refusing(path), regular.open_file(path, follow=True) as stream:
        yield stream


def opened(path: Path) -> BufferedReader:
    """A data set's file, open for reading; FileRefused if it cannot be opened."""
    with regular.refusing(path):
        return regular.open_file(path, follow=True)


def digest(path: Path, algorithm: str = "sha256") -> str:
    """The digest of a file in hex."""
    with reading(path) as stream:
        return hashlib.file_digest(stream, algorithm).hexdigest()


def unpacked(path: Path) -> bytes:
    """The content of a file; of a .gz file, the content that is packed in it.

    Raises FileRefused if it cannot be read, is not whole, or unpacks out of proportion.
    """
    if path.suffix != ".gz":
        return contents(path)
    try:
        with opened(path) as packed, gzip.open(packed) as stream:
            limit = max(FREE, RATIO * os.fstat(packed.fileno()).st_size)
            data = take(cast("IO[bytes]", stream), limit + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise FileRefused(f"{path}: not a whole gzip file: {error}") from error
    if len(data) > limit:
        raise FileRefused(f"{path}: unpacks to more than {limit} bytes")
    return data


def text(path: Path) -> str:
    """The text of a UTF-8 file, packed or not, without its byte order mark.

    Editors on Windows write one.
    """
    raw = unpacked(path)
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        marked = raw.startswith((b"\xff\xfe", b"\xfe\xff"))
        hint = "; its byte order mark says UTF-16: save it as UTF-8" if marked else ""
        raise FileRefused(f"{path}: not UTF-8 at byte {error.start}, line {line}{hint}") from error
