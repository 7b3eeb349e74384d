"""Read arrays from files of other programs: npz, safetensors, HDF5 (and `npdrt.store.torch_file`).

The memory for them is bounded, whatever a file declares: a compressed file of a few kilobytes could
fill the machine. npz and safetensors are read here, without pickles; only plain and deflated
members of a zip are unpacked, piece by piece. `npdrt/store/child.py` reads HDF5 in a process of its
own, with limits of memory and time, because libhdf5 is not built for hostile files.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import math
import os
import struct
import subprocess
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Collection
from pathlib import Path
from typing import IO, Any, BinaryIO

import msgspec
import numpy as np
import numpy.typing as npt

from npdrt import regular
from npdrt.errors import FileRefused, Unavailable
from npdrt.workers import Worker

MAX_FILE = 1 << 30
FREE = 1 << 25  # numbers in any file, 256 MiB of float64; a larger file may have one for each byte
MAX_DIRECTORY = 4 << 20  # bytes of a zip's list of members, and of a header of safetensors
MAX_ANSWER = 64 << 20  # bytes of the child's header, besides those of the file
PATIENCE = 10  # seconds by the clock for each of processor time that the child has
MAX_HEADER = 10_000  # bytes of the header of an npy member, as NumPy allows

Array = npt.NDArray[Any]
Numbers = tuple[str, Array]  # the type in the file; bfloat16 as float32

_CHILD = Path(__file__).with_name("child.py")
_PIECE = 1 << 20
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
DAMAGED_ZIP = (
    zipfile.BadZipFile, zlib.error, struct.error, tokenize.TokenError, EOFError, MemoryError,
    NotImplementedError, OSError, OverflowError, RecursionError, RuntimeError, SyntaxError,
    UnicodeError, ValueError,
)  # fmt: skip
_SAFETENSORS = {
    "BOOL": "?", "I8": "i1", "I16": "<i2", "I32": "<i4", "I64": "<i8", "U8": "u1", "U16": "<u2",
    "U32": "<u4", "U64": "<u8", "F16": "<f2", "F32": "<f4", "F64": "<f8", "BF16": "<u2",
}  # fmt: skip


def read(path: Path, fields: Collection[str] | None = None) -> dict[str, Numbers]:
    """The arrays of an npz, safetensors or HDF5 file; its first bytes tell which kind it is.

    fields: the wanted last parts of names ("weights" in "a/weights"); None for all. A symbolic
    link is followed. Raises FileRefused with path and reason, Unavailable if safetensors is not
    installed.
    """
    with regular.refusing(path), regular.open_file(path, follow=True) as handle:
        size = os.fstat(handle.fileno()).st_size
        if size > MAX_FILE:
            raise FileRefused(f"{size} bytes; at most {MAX_FILE} are read")
        return _reader(handle, size)(handle, fields, max(FREE, size))


def _reader(handle: BinaryIO, size: int) -> Callable[..., dict[str, Numbers]]:
    """The function for a file with these first bytes."""
    start = handle.read(9)
    handle.seek(0)
    if start[:2] == b"PK":
        return _npz
    if start[:8] == b"\x89HDF\r\n\x1a\n":
        return _hdf5
    if start[8:] == b"{" and int.from_bytes(start[:8], "little") <= size:
        return _safetensors
    raise FileRefused(f"expected an npz, safetensors or HDF5 file; it begins {start[:8]!r}")


def _wanted(names: Collection[str], fields: Collection[str] | None) -> list[str]:
    return [n for n in names if fields is None or n.rpartition("/")[2] in fields]


# --- npz ----------------------------------------------------------------------------------------


def read_npz(
    stream: BinaryIO, choose: Callable[[list[str]], Collection[str]], limit: int
) -> dict[str, Array]:
    """Arrays of a seekable npz file, plain numbers only.

    choose: returns the wanted names out of all names (a duplicate member has its name twice).
    limit: the most numbers in all arrays together. No more bytes are unpacked than they need.

    Raises FileRefused if the file is damaged or has anything else; `choose` may raise it too.
    """
    try:
        with zipfile.ZipFile(InPieces(stream)) as archive:
            infos = archive.infolist()
            chosen = choose([info.filename.removesuffix(".npy") for info in infos])
            members = {info.filename.removesuffix(".npy"): info for info in infos}
            found = {}
            for name in chosen:
                found[name] = _member(archive, members[name], f"array {name}", limit)
                limit -= found[name].size
            return found
    except DAMAGED_ZIP as error:
        raise FileRefused(f"damaged .npz file: {_line(error)}") from error


def _npz(handle: BinaryIO, fields: Collection[str] | None, limit: int) -> dict[str, Numbers]:
    found = read_npz(handle, lambda names: dict.fromkeys(_wanted(names, fields)), limit)
    return {name: (value.dtype.name, value) for name, value in found.items()}


class InPieces:
    """A stream that reads at most MAX_DIRECTORY bytes at once.

    zipfile reads the list of members in one piece and makes an object for every entry. Members are
    read in small pieces.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.seek, self.tell, self.seekable = stream.seek, stream.tell, stream.seekable

    def read(self, n: int = -1) -> bytes:
        """The next `n` bytes, all if negative."""
        piece = self._stream.read(n if 0 <= n <= MAX_DIRECTORY else MAX_DIRECTORY + 1)
        if len(piece) > MAX_DIRECTORY:
            raise FileRefused(f"its list of members has more than {MAX_DIRECTORY} bytes")
        return piece


def _member(archive: zipfile.ZipFile, info: zipfile.ZipInfo, where: str, limit: int) -> Array:
    if info.compress_type not in _METHODS:
        raise FileRefused(f"{where}: expected no compression or deflate, as NumPy writes")
    with archive.open(info) as stream:
        start = io.BytesIO(stream.read(MAX_HEADER))
        shape, fortran, dtype = _npy_header(start)
        if dtype.kind not in "biuf" or dtype.itemsize > 8:
            hint = "; pickled objects are not read" if dtype.hasobject else ""
            raise FileRefused(f"{where}: expected integers or floats; found dtype {dtype}{hint}")
        count = math.prod(shape)  # Python integers: nothing wraps around
        if count > limit or min(shape, default=0) < 0:
            raise FileRefused(
                f"{where}: declares the shape {shape}; at most {limit} numbers are read"
            )
        values = np.empty(count, dtype)
        filled = fill(values, start, stream)
        if filled != values.nbytes or start.read(1) or stream.read(1):
            raise FileRefused(
                f"{where}: expected {values.nbytes} bytes for {dtype} of shape {shape}; found "
                f"{'more' if filled == values.nbytes else filled}"
            )
    return values.reshape(shape, order="F" if fortran else "C")


def _npy_header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, Fortran order and dtype from the header of a .npy file, by NumPy's own parser."""
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(stream)
    if version == (2, 0):
        return np.lib.format.read_array_header_2_0(stream)
    raise ValueError(f"expected .npy format 1.0 or 2.0; found {version[0]}.{version[1]}")


def fill(values: Array, *streams: IO[bytes]) -> int:
    """Fill an array with the bytes of the streams, one after another; return the bytes used."""
    target, filled = values.view(np.uint8).data, 0
    for stream in streams:
        while filled < len(target):
            piece = stream.read(min(len(target) - filled, _PIECE))
            if not piece:
                break
            target[filled : filled + len(piece)] = piece
            filled += len(piece)
    return filled


# --- safetensors --------------------------------------------------------------------------------


def read_safetensors(path: Path) -> dict[str, Numbers]:
    """All arrays of a safetensors file; FileRefused if it is another kind of file."""
    safetensors()
    with regular.refusing(path), regular.open_file(path, follow=True) as handle:
        return _safetensors(handle, None, 0)


def _safetensors(
    handle: BinaryIO, fields: Collection[str] | None, limit: int
) -> dict[str, Numbers]:
    """Arrays by the library's parser; together they are not larger than the file."""
    deserialize = safetensors().deserialize
    header = int.from_bytes(handle.read(8), "little")
    handle.seek(0)
    try:
        if header > MAX_DIRECTORY:
            raise ValueError(f"a header of {header} bytes, more than {MAX_DIRECTORY}")
        views = dict(deserialize(handle.read()))
    except Exception as error:  # its exception is not in its interface
        raise FileRefused(
            f"is not a safetensors file that can be read: {_line(error)} (pickles such as "
            "pytorch_model.bin are not read: save them as safetensors, in float32)"
        ) from error
    return {name: _tensor(name, views[name]) for name in _wanted(views, fields)}


def safetensors(module: str = "safetensors") -> Any:
    """The library; Unavailable, with the command to install it, if it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Unavailable(
            'safetensors is not installed; install it with pip install "npdrt[text]"'
        ) from error


def _tensor(name: str, view: Any) -> Numbers:
    kind = view["dtype"]
    if kind not in _SAFETENSORS:
        raise FileRefused(f"{name} is {kind}; expected one of {', '.join(_SAFETENSORS)}")
    values = np.frombuffer(bytearray(view["data"]), _SAFETENSORS[kind])
    if kind == "BF16":  # the upper half of a float32
        return "bfloat16", (values.astype(np.uint32) << 16).view(np.float32).reshape(view["shape"])
    return values.dtype.name, values.reshape(view["shape"])


# --- HDF5, in a child process -------------------------------------------------------------------


class _Answer(msgspec.Struct):
    """The header of what the child writes."""

    arrays: list[tuple[str, str, list[int]]] = []
    meta: Any = None
    refused: str = ""


def _hdf5(handle: BinaryIO, fields: Collection[str] | None, limit: int) -> dict[str, Numbers]:
    job = {"kind": "datasets", "fields": None if fields is None else list(fields)}
    found, _ = _in_child(handle, job, 8 * limit)
    if sum(value.size for value in found.values()) > limit:
        raise FileRefused(f"holds more than {limit} numbers, which are not read")
    return {name: (value.dtype.name, value) for name, value in found.items()}


def read_version_1(path: Path) -> tuple[dict[str, Array], dict[str, Any]]:
    """Arrays and metadata of a container of format version 1, in their order.

    Raises FileRefused if it is another kind of file, is damaged, or was not written by npdrt.
    """
    with regular.refusing(path), regular.open_file(path) as handle:
        size = os.fstat(handle.fileno()).st_size
        found, meta = _in_child(handle, {"kind": "version 1"}, size)
        if not isinstance(meta, dict):
            raise FileRefused("its metadata are not an object")
        return found, meta


def _in_child(handle: BinaryIO, job: dict[str, Any], limit: int) -> tuple[dict[str, Array], Any]:
    """What the child reads from an open file: arrays of at most `limit` bytes, and metadata."""
    os.lseek(handle.fileno(), 0, os.SEEK_SET)  # the child has no part in the handle's buffer
    seconds = min(5 + (os.fstat(handle.fileno()).st_size >> 20), 600)  # 1 MiB a second and more
    words = json.dumps({**job, "bytes": limit, "seconds": seconds})
    worker = Worker(
        *("-P", str(_CHILD), words), stdin=handle, stdout=subprocess.PIPE, env=_environment()
    )
    with contextlib.closing(worker):
        with worker.within(PATIENCE * seconds):  # by the clock; its own limit is of processor time
            found = _answer(worker.process.stdout, limit)
        if found is None:
            raise FileRefused(
                f"its reader gave no answer ({worker.ending() or 'it runs on'}): the file is "
                "damaged or hostile, or there is too little memory"
            )
        return found


def _environment() -> dict[str, str]:
    """No plug-ins for HDF5, and no memory for the threads of a BLAS."""
    kept = {k: v for k, v in os.environ.items() if k != "HDF5_PLUGIN_PATH"}
    threads = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    return {**kept, **threads, "HDF5_PLUGIN_PRELOAD": "::"}


def _answer(stream: Any, limit: int) -> tuple[dict[str, Array], Any] | None:
    """The child's answer, believed no more than the file; None if it is not whole."""
    length = int.from_bytes(stream.read(8), "little")
    text = stream.read(min(length, limit + MAX_ANSWER))
    try:
        answer = msgspec.json.decode(text, type=_Answer)
        if answer.refused:
            raise FileRefused(answer.refused)
        found = {}
        for name, kind, shape in answer.arrays:
            dtype = np.dtype(kind)
            size = math.prod(shape) * dtype.itemsize
            if dtype.kind not in "fiu" or not 0 <= size <= limit:
                return None
            limit -= size
            found[name] = np.empty(math.prod(shape), dtype)
            if fill(found[name], stream) != size:
                return None
            found[name] = found[name].reshape(shape)
        return found, answer.meta
    except (msgspec.MsgspecError, TypeError, ValueError):
        return None


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
