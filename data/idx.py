"""The IDX format of MNIST and Fashion-MNIST, gzipped or not.

A file has two zero bytes, a type code, the number of axes, the length of each axis as a big-endian
32-bit integer, then the elements in C order. Both data sets hold unsigned bytes (type code 0x08).
Source: Y. LeCun, C. Cortes, C. Burges, "The MNIST database of handwritten digits".
"""

from __future__ import annotations

import gzip
import hashlib
import io
import math
import struct
import zlib
from pathlib import Path
from typing import IO, Any

import numpy as np

from npdrt.data.bounded import check_size, contents, take
from npdrt.data.catalogue import Form, Source
from npdrt.data.fetch import find_file
from npdrt.data.raw import Raw
from npdrt.errors import FileRefused

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


def read(where: Path, form: Form, source: Source) -> Raw:
    """A data set in four IDX files; images become rows, (N, height * width)."""
    raw, size = Raw({}, {}, {}), (source.image or ())[1:]
    for file in form.files:
        path = find_file(where, file) or where / file.name
        labels = file.role.startswith("y")
        array, raw.digests[path.name] = read_idx(path, axes=1 if labels else 3)
        raw.arrays[file.role] = array if labels else _as_rows(array, size, path)
        raw.names[file.role] = str(path)
    return raw


def _as_rows(images: Bytes, size: tuple[int, ...], path: Path) -> Bytes:
    if images.shape[1:] != size:
        raise FileRefused(f"{path}: expected images of {size} pixels; found {images.shape[1:]}")
    return images.reshape(len(images), math.prod(size))


def read_idx(path: Path, axes: int) -> tuple[Bytes, str]:
    """The unsigned bytes in an IDX file with `axes` axes, and the SHA-256 of the file.

    Images have 3 axes (count, height, width), labels 1 (count). Raises FileRefused if the file has
    another type or number of axes, fewer or more bytes than it declares, damaged gzip data, or
    content out of proportion to its size.
    """
    raw = contents(path)
    try:
        with _unpacked(raw) as stream:
            shape = _shape(stream, axes, path)
            check_size(str(path), math.prod(shape), len(raw))
            # One byte more than declared: finds a longer file and makes gzip check its sum.
            body = take(stream, math.prod(shape) + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise FileRefused(f"{path}: damaged gzip data: {error}") from error
    if len(body) != math.prod(shape):
        found = "more" if len(body) > math.prod(shape) else len(body)
        expected = f"{math.prod(shape)} bytes for shape {shape}"
        raise FileRefused(f"{path}: expected {expected} after the header; found {found}")
    return np.frombuffer(body, np.uint8).reshape(shape), hashlib.sha256(raw).hexdigest()


def _unpacked(raw: bytes) -> IO[bytes]:
    stream = io.BytesIO(raw)
    return gzip.open(stream) if raw.startswith(b"\x1f\x8b") else stream  # type: ignore[return-value]


def _shape(stream: IO[bytes], axes: int, path: Path) -> tuple[int, ...]:
    """The axis lengths, after the magic number has been checked."""
    magic, expected = take(stream, 4), bytes((0, 0, 0x08, axes))
    if magic != expected:
        raise FileRefused(
            f"{path}: expected IDX magic {expected.hex()} (unsigned bytes, axes: {axes}); "
            f"found {magic.hex() or 'nothing'}"
        )
    lengths = take(stream, 4 * axes)
    if len(lengths) != 4 * axes:
        raise FileRefused(f"{path}: expected {axes} axis lengths; the file ends inside them")
    return struct.unpack(f">{axes}I", lengths)
