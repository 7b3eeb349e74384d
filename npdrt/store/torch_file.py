"""Read the arrays of a file that `torch.save` wrote (.pt, .pth), without PyTorch and without
running its pickle (`npdrt.store.pickles`).

    arrays = torch_file.read(path)    # name -> array, as in a state dict

There are two formats. The old one, of PyTorch before 1.6, is five pickles (a magic number, a
version, the sizes of C types, the object, the keys of the storages), then for each storage its
number of elements and their bytes. The new one is a zip archive, not compressed: data.pkl, and
data/KEY for every storage. In both a tensor is a place in a storage, its shape and its strides.
Source: PyTorch's documentation ("Serialization semantics") and its files.
"""

from __future__ import annotations

import io
import math
import os
import zipfile
from pathlib import Path
from typing import IO, Any, BinaryIO, NamedTuple

import numpy as np

from npdrt import regular
from npdrt.errors import FileRefused
from npdrt.store.foreign import DAMAGED_ZIP, FREE, MAX_DIRECTORY, MAX_FILE, Array, InPieces, fill
from npdrt.store.pickles import Machine, Name

MAGIC = 0x1950A86A20F9469CFC6C
VERSION = 1001
TENSOR = "torch._utils _rebuild_tensor_v2"
DICT = "collections OrderedDict"
STORAGES = {
    "torch FloatStorage": "<f4", "torch DoubleStorage": "<f8", "torch HalfStorage": "<f2",
    "torch LongStorage": "<i8", "torch IntStorage": "<i4", "torch ShortStorage": "<i2",
    "torch CharStorage": "i1", "torch ByteStorage": "u1", "torch BoolStorage": "?",
}  # fmt: skip


class _Storage(NamedTuple):
    dtype: str
    key: str
    elements: int


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def read(path: Path) -> dict[str, Array]:
    """The arrays of a state dict: name -> array, in the order of the file.

    Raises FileRefused, with path and reason, if the file is damaged or another kind of file, or has
    anything but named tensors in C order; a symbolic link is followed.
    """
    with regular.refusing(path), regular.open_file(path, follow=True) as handle:
        size = os.fstat(handle.fileno()).st_size
        if size > MAX_FILE:
            raise FileRefused(f"{size} bytes; at most {MAX_FILE} are read")
        start = handle.read(2)
        handle.seek(0)
        if start == b"PK":
            return _read_zip(handle, size)
        if start == b"\x80\x02":
            return _read_stream(handle, size)
        raise FileRefused(f"expected a file of torch.save; it begins {start!r}")


class _Machine(Machine):
    names = (DICT, TENSOR, *STORAGES)
    key = str
    holds = "a file of weights holds only named tensors"

    def call(self, function: Any, arguments: Any) -> Any:
        """An empty ordered dict, or a tensor."""
        if function == DICT and arguments == ():
            return {}
        if function == TENSOR and type(arguments) is tuple and len(arguments) in (6, 7):
            storage, offset, shape, strides, *_ = arguments
            if type(storage) is _Storage:
                return _place(storage, offset, shape, strides)
        raise self.refusal("opcode REDUCE with another call than a tensor")

    def build(self, value: Any, state: Any) -> None:
        """The attributes of an ordered dict, versions of modules, are ignored."""
        if type(value) is not dict or type(state) is not dict:
            raise self.refusal("opcode BUILD for another value than a dict")

    def _storage(self, _: Any) -> None:
        """BINPERSID: ("storage", type, key, device, elements), and None in the old format."""
        (found,) = self.last(1)
        mark, kind, key, _, count, *view = found
        fits = type(key) is str and type(count) is int and count >= 0 and view in ([], [None])
        if mark != "storage" or type(kind) is not Name or kind not in STORAGES or not fits:
            raise self.refusal("opcode BINPERSID for another value than a storage")
        self.push(_Storage(STORAGES[kind], key, count))

    more = {"BINUNICODE": Machine.push, "BINPERSID": _storage}  # noqa: RUF012


def _place(storage: _Storage, offset: Any, shape: Any, strides: Any) -> _Tensor:
    """A tensor inside its storage, with no more elements than that."""
    numbers = (offset, *shape, *strides)
    if any(type(n) is not int or n < 0 for n in numbers) or len(shape) != len(strides):
        raise ValueError("expected offset, shape and strides of a tensor as whole numbers")
    last = offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    most = storage.elements
    if math.prod(shape) > most or (0 not in shape and last >= most) or len(shape) > 32:
        raise ValueError(f"a tensor of shape {shape} is not inside its storage of {most} elements")
    return _Tensor(storage, offset, tuple(shape), tuple(strides))


def _read_stream(handle: BinaryIO, size: int) -> dict[str, Array]:
    """The old format."""
    head = io.BytesIO(handle.read(MAX_DIRECTORY))
    magic, version, system, found, keys = (_Machine(handle.name).run(head) for _ in range(5))
    little = type(system) is dict and system.get("little_endian") is True
    if magic != MAGIC or version != VERSION or not little:
        raise FileRefused("expected a file of torch.save on a little-endian machine")
    tensors = _tensors(found)
    storages = {t.storage.key: t.storage for t in tensors.values()}
    if type(keys) is not list or any(type(key) is not str for key in keys):
        raise FileRefused("has no list of storages")
    if sorted(keys) != sorted(storages):
        raise FileRefused("its list of storages is not that of its tensors")
    handle.seek(head.tell())
    read = {}
    for storage in (storages[key] for key in keys):
        if int.from_bytes(handle.read(8), "little") != storage.elements:
            raise FileRefused(f"storage {storage.key} has not its {storage.elements} elements")
        read[storage.key] = _read_storage(handle, storage, size)
    return _arrays(tensors, read, size)


def _read_zip(handle: BinaryIO, size: int) -> dict[str, Array]:
    """The new format."""
    try:
        with zipfile.ZipFile(InPieces(handle)) as archive:
            names = [n for n in archive.namelist() if n.endswith("/data.pkl")]
            if len(names) != 1 or any(i.compress_type for i in archive.infolist()):
                raise FileRefused("expected a zip archive of torch.save, not compressed")
            with archive.open(names[0]) as member:
                head = member.read(MAX_DIRECTORY)
            tensors, folder = _tensors(_Machine(handle.name).run(head)), names[0][: -len(".pkl")]
            read = {}
            for storage in {t.storage for t in tensors.values()}:
                with archive.open(f"{folder}/{storage.key}") as member:
                    read[storage.key] = _read_storage(member, storage, size)
            return _arrays(tensors, read, size)
    except (*DAMAGED_ZIP, KeyError) as error:
        raise FileRefused(f"damaged zip archive: {error}") from error


def _tensors(found: Any) -> dict[str, _Tensor]:
    if type(found) is not dict or not all(type(t) is _Tensor for t in found.values()):
        raise FileRefused("expected a state dict, names and their tensors, and nothing else")
    storages = {t.storage for t in found.values()}
    if len({storage.key for storage in storages}) < len(storages):
        raise FileRefused("a storage has two types or sizes")
    return found


def _read_storage(stream: IO[bytes], storage: _Storage, limit: int) -> Array:
    """The elements of a storage, which has at most `limit` bytes."""
    size = storage.elements * np.dtype(storage.dtype).itemsize
    values = np.empty(storage.elements if size <= limit else 0, storage.dtype)
    if fill(values, stream) != size:
        raise FileRefused(f"storage {storage.key}: expected {size} bytes; the file has fewer")
    return values


def _arrays(tensors: dict[str, _Tensor], storages: dict[str, Array], size: int) -> dict[str, Array]:
    """The tensors as arrays of their own, in C order."""
    count, limit = sum(math.prod(t.shape) for t in tensors.values()), max(FREE, size)
    if count > limit:  # many tensors may be in one storage
        raise FileRefused(f"holds {count} numbers; at most {limit} are read")
    made = {}
    for name, (storage, offset, shape, strides) in tensors.items():
        values = storages[storage.key][offset:]
        steps = [step * values.itemsize for step in strides]
        made[name] = np.lib.stride_tricks.as_strided(values, shape, steps).copy()
    return made
