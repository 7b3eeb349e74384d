"""Reading compressed files without trusting the sizes they declare."""

from __future__ import annotations

from io import BufferedReader
from pathlib import Path
from typing import IO

from npdrt import regular
from npdrt.errors import FileRefused

FREE = 1 << 30  # bytes that any file may unpack to
RATIO = 100  # above FREE: unpacked bytes for each byte on disk; real data stay far below
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
    """The next `n` bytes, or all there are; memory grows with what arrives, not with `n`."""
    pieces = []
    while n > 0 and (piece := stream.read(min(n, _CHUNK))):
        pieces.append(piece)
        n -= len(piece)
    return b"".join(pieces)


def contents(path: Path) -> bytes:
    """All bytes of a data set's file; FileRefused where it cannot be read or is no regular file.

    A link is followed: caches of data sets are made of links.
    """
    return regular.contents(path, follow=True)


def opened(path: Path) -> BufferedReader:
    """A data set's file, open for reading; the errors of `contents`."""
    try:
        return regular.open_file(path, follow=True)
    except OSError as error:
        raise FileRefused(f"{path}: cannot be read: {error.strerror}") from error


def decoded(path: Path, raw: bytes) -> str:
    """The text of a UTF-8 file without its byte order mark, which editors of Windows write."""
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        marked = raw.startswith((b"\xff\xfe", b"\xfe\xff"))
        hint = "; its byte order mark says UTF-16: save it as UTF-8" if marked else ""
        raise FileRefused(f"{path}: not UTF-8 at byte {error.start}, line {line}{hint}") from error
