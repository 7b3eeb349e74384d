"""Data sets in one NumPy .npz file: arrays x and y, and x_test and y_test where there is a test
set.

NumPy's own reader allocates whatever shape a file declares and can run pickles. This one takes
plain numbers only and checks every size before it reads.
"""

from __future__ import annotations

import math
import struct
import tokenize
import zipfile
import zlib
from typing import IO, Any, BinaryIO

import numpy as np

from npdrt.data.bounded import check_size, take
from npdrt.errors import FileRefused

Array = np.ndarray[Any, np.dtype[Any]]

ROLES = ("x", "y", "x_test", "y_test")
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_DAMAGED = (
    zipfile.BadZipFile, zlib.error, struct.error, tokenize.TokenError,
    EOFError, OSError, RuntimeError, SyntaxError, ValueError,
)  # fmt: skip


def read_npz(stream: BinaryIO, name: str) -> dict[str, Array]:
    """The arrays of a seekable .npz file by role; `name` stands for the file in messages.

    Raises FileRefused where the file is damaged, declares sizes out of proportion, lacks x or y,
    holds an array of another name, or anything but plain numbers (no objects, no pickles).
    """
    size = stream.seek(0, 2)
    stream.seek(0)
    try:
        with zipfile.ZipFile(stream) as archive:
            members = _members(archive, name)
            check_size(name, sum(info.file_size for info in members.values()), size)
            roles = [role for role in ROLES if role in members]
            return {role: _member(archive, members[role], name) for role in roles}
    except _DAMAGED as error:
        raise FileRefused(f"{name}: damaged .npz file: {error}") from error


def _members(archive: zipfile.ZipFile, name: str) -> dict[str, zipfile.ZipInfo]:
    infos = archive.infolist()
    members = {info.filename.removesuffix(".npy"): info for info in infos}
    wanted = "expected arrays x and y, and optionally x_test and y_test"
    if len(members) != len(infos) or not {"x", "y"} <= members.keys() <= set(ROLES):
        found = ", ".join(sorted(info.filename.removesuffix(".npy") for info in infos)) or "none"
        raise FileRefused(f"{name}: {wanted}; found {found}")
    if ("x_test" in members) != ("y_test" in members):
        raise FileRefused(f"{name}: {wanted} together; found only one of them")
    return members


def _member(archive: zipfile.ZipFile, info: zipfile.ZipInfo, name: str) -> Array:
    where = f"{name}: array {info.filename.removesuffix('.npy')}"
    if info.compress_type not in _METHODS:
        raise FileRefused(f"{where}: expected no compression or deflate, as NumPy writes")
    with archive.open(info) as stream:
        shape, fortran, dtype = _header(stream)
        if dtype.kind not in "biuf" or dtype.itemsize > 8:
            raise FileRefused(f"{where}: expected integers or floats; found dtype {dtype}")
        expected = math.prod(shape) * dtype.itemsize
        body = take(stream, expected + 1)
    if len(body) != expected:
        found = "more" if len(body) > expected else len(body)
        raise FileRefused(
            f"{where}: expected {expected} bytes for {dtype} of shape {shape}; found {found}"
        )
    return np.frombuffer(body, dtype).reshape(shape, order="F" if fortran else "C")


def _header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, Fortran order and dtype from the header of a .npy file, by NumPy's own parser."""
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(stream)
    if version == (2, 0):
        return np.lib.format.read_array_header_2_0(stream)
    raise ValueError(f"expected .npy format 1.0 or 2.0; found {version[0]}.{version[1]}")
