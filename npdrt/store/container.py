"""The container: named arrays and JSON metadata in one HDF5 file, sealed by a SHA-256.

Layout: a 512-byte header, which HDF5 skips as its user block, then an HDF5 image. Plain h5py,
h5dump and HDFView open the file. Integers are little-endian.

    offset  bytes  field
         0      8  magic, b"NPDRTCK1"
         8      8  length of the image in bytes, u64
        16     32  SHA-256 of the image
        48      4  format version, u32
        52    460  zero
       512         HDF5 image: superblock version 3, groups, contiguous datasets, nothing else

An array is a contiguous dataset under its name ("params/layers/00/weight": groups `params`,
`layers`, `00`). `/meta` is uint8, canonical JSON in UTF-8 (sorted keys, no NaN or infinity):
{"format": 1, "meta": {...}, "order": [...]}. HDF5 lists members by name, so `order` keeps the
order in which the arrays were given. The same arrays and metadata give the same bytes.

Saving never changes a file in place: a temporary file beside it is written, forced to the disk
and renamed, so that a reader sees the old file or the new one, whole. Reading trusts nothing:
libhdf5 is not built for hostile files, so it sees a byte only after length and digest agree,
then its parse of the metadata is held against a list of what `write` makes, link by link, and
the data are taken from the checked bytes by offset, so that no HDF5 read, filter, conversion or
lookup of another file ever runs. A digest shows that a file is intact, not who wrote it; for
that, compare with a digest that came by another way (`expect_sha256`).
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import os
import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
from h5py import h5d, h5f, h5fd, h5g, h5l, h5o, h5p, h5s, h5t

from npdrt import atomic, regular
from npdrt.errors import DiskError, Error, FileRefused

FORMAT = 1
BLOCK = 512  # bytes of the header; HDF5 looks for its image at 0, 512, 1024, ...
MAX_BYTES = 16 << 30
MAX_META = 1 << 20
MAX_ARRAYS = 100_000
MAX_DEPTH = 8
DTYPES = tuple(
    map(np.dtype, ("<f2", "<f4", "<f8", "i1", "<i2", "<i4", "<i8", "u1", "<u2", "<u4", "<u8"))
)

Array = npt.NDArray[Any]

_MAGIC = b"NPDRTCK1"
_HEADER = struct.Struct("<8sQ32sI")
_SUPERBLOCK = struct.Struct("<8s4B3Q")  # up to the end-of-file address
_SUPERBLOCK_START = [b"\x89HDF\r\n\x1a\n", 3, 8, 8, 0]  # version, bytes of offset, of length, flags
_UNDEFINED = 2**64 - 1
_HDF5_TYPES = [(h5t.py_create(dtype), dtype) for dtype in DTYPES]
_NAME = re.compile(r"(?!\.{1,2}$)[A-Za-z0-9_.-]{1,128}")  # "." means the group itself to HDF5
_DAMAGED = "the file is damaged: restore a copy or use the previous checkpoint"
_FOREIGN = "npdrt did not write this file: do not use it"


def write(
    path: Path,
    arrays: Mapping[str, Array],
    meta: Mapping[str, Any],
    *,
    keep_previous: Path | None = None,
) -> str:
    """Save `arrays` and `meta` at `path`, atomically; return the SHA-256 of the image in hex.

    arrays: name -> array of any shape and memory layout, of a dtype in `DTYPES` in either byte
    order. A name is at most 8 parts of 1 to 128 characters A-Z a-z 0-9 _ . - with "/" between;
    no part is "." or ".."; the first is not "meta". meta: what JSON holds, keys strings, numbers
    finite; with `order` at most 1 MiB. keep_previous: a path in the same directory that receives
    the file now at `path`, by hard link; a damaged file is not kept, so that it cannot displace
    a sound one.

    A file that was there keeps its mode; a new one obeys the umask. On any exception `path` is
    as it was (unless only the last step failed, the sync of the directory) and no temporary file
    is left; a killed process may leave one (`npdrt.atomic.remove_stale`). The arrays go straight
    to the file, so that memory is needed only for one that must be converted. Raises
    Error for what cannot be stored and for a failure of the file system.
    """
    for name, array in arrays.items():
        _check_storable(name, array, arrays)
    envelope = {"format": FORMAT, "meta": dict(meta), "order": list(arrays)}
    members = {**arrays, "meta": np.frombuffer(_encode(envelope), np.uint8)}
    try:
        with atomic.replacing(path, before=partial(_keep, path, keep_previous)) as handle:
            return _write(handle, members)
    except RuntimeError as error:  # from h5py, when the disk fails
        raise DiskError(f"{path}: could not be written ({error}); check the disk") from error


def read(
    path: Path, *, max_bytes: int = MAX_BYTES, expect_sha256: str | None = None
) -> tuple[dict[str, Array], dict[str, Any]]:
    """Read what `write` saved: the arrays, writable, in the order they were given, and `meta`.

    max_bytes: a longer file is refused unread. expect_sha256: 64 hex digits that the image must
    have. Takes memory for the file and for the arrays.

    Raises FileRefused, with path, reason and remedy, if the path is not a regular file (a
    symbolic link is not followed), the header, length or digest is wrong, or the file holds
    anything that `write` does not make: links other than one hard link an object, attributes,
    other storage, types, names, depths or sizes, members missing from `order` or from the file,
    metadata that are not canonical JSON. Values are not judged; NaN is a value.
    """
    with _refusing(path):
        with regular.open_file(path) as handle:
            image = _checked_image(handle, max_bytes, expect_sha256)
        _check_superblock(image)
        with h5py.File(io.BytesIO(image), "r") as file:  # the bytes checked, with no path to lock
            found = dict(_members(image, h5o.open(file.id, b"/")))
        order, meta = _envelope(found.pop("meta", None))
        if strays := sorted(set(order) ^ set(found)):
            raise FileRefused(f"order and members differ, first in {strays[0]!r}; {_FOREIGN}")
        return {name: found[name] for name in order}, meta


def digest(path: Path) -> str:
    """Return the SHA-256 stated in the header, in hex; the data are not read (see `verify`)."""
    with _refusing(path), regular.open_file(path) as handle:
        return _header(handle)[1].hex()


def verify(path: Path) -> str:
    """Check header, length and digest in constant memory; return the SHA-256 in hex.

    Raises FileRefused. What is inside is judged by `read` alone.
    """
    with _refusing(path), regular.open_file(path) as handle:
        expected = _header(handle)[1]
        _check_digest(hashlib.file_digest(handle, "sha256").digest(), expected)
        return expected.hex()


def within(path: Path, *names: str) -> Path:
    """A file as it is; of a directory the first of those files that is there, or else the first."""
    files = [path / name for name in names] if path.is_dir() else [path]
    return next(filter(Path.exists, files), files[0])


# What may be stored


def _check_storable(name: str, array: Array, arrays: Mapping[str, Array]) -> None:
    parts = name.split("/")
    if len(parts) > MAX_DEPTH or not all(map(_NAME.fullmatch, parts)) or parts[0] == "meta":
        raise Error(
            f"array name {name!r} cannot be stored; use 1 to {MAX_DEPTH} parts of A-Z a-z 0-9 _ . -"
            " with '/' between, the first not 'meta'"
        )
    if any(group in arrays for group in _groups(name)):
        raise Error(f"array {name!r} lies below another array; a name is an array or a group")
    dtype = array.dtype if isinstance(array, np.ndarray | np.generic) else type(array).__name__
    if not isinstance(dtype, np.dtype) or dtype.newbyteorder("<") not in DTYPES:
        allowed = ", ".join(allowed.name for allowed in DTYPES)
        raise Error(f"array {name!r} is {dtype}, which cannot be stored; convert to {allowed}")
    if len(arrays) >= MAX_ARRAYS:
        raise Error(f"{len(arrays)} arrays cannot be stored; at most {MAX_ARRAYS - 1}")


def _groups(name: str) -> list[str]:
    """Return "a", "a/b" for "a/b/c"."""
    return [name[: slash.start()] for slash in re.finditer("/", name)]


def _canonical(value: Any) -> bytes:
    text = json.dumps(
        value, sort_keys=True, allow_nan=False, ensure_ascii=False, separators=(",", ":")
    )
    return text.encode("utf-8", "backslashreplace")  # a byte of a name that is not UTF-8: \udce9


def _encode(envelope: dict[str, Any]) -> bytes:
    try:
        raw = _canonical(envelope)
        _decode(raw)  # what could not be read is not written: too long, keys 1 and "1"
    except (TypeError, ValueError, RecursionError) as error:
        raise Error(f"meta cannot be stored as JSON ({error}); give plain finite data") from error
    return raw


# Writing


def _write(handle: io.BufferedRandom, members: Mapping[str, Array]) -> str:
    """Write HDF5 behind the header's place, then the header, which needs the finished bytes."""
    with _new_file(handle) as file:
        _make_groups(file, members)
        for name in sorted(members):  # by name and without times: equal input, equal bytes
            array = members[name]
            data = np.asarray(array, dtype=array.dtype.newbyteorder("<"))
            file.create_dataset(name, data=data, track_times=False)
    handle.seek(BLOCK)
    sha = hashlib.file_digest(handle, "sha256")
    length = handle.tell() - BLOCK
    handle.seek(0)
    handle.write(_HEADER.pack(_MAGIC, length, sha.digest(), FORMAT).ljust(BLOCK, b"\0"))
    return sha.hexdigest()


def _new_file(handle: io.BufferedRandom) -> h5py.File:
    """Return an empty HDF5 file that writes through `handle`; the defaults of h5py have times."""
    creation, access = h5p.create(h5p.FILE_CREATE), h5p.create(h5p.FILE_ACCESS)
    creation.set_userblock(BLOCK)
    creation.set_obj_track_times(False)
    access.set_libver_bounds(h5f.LIBVER_V110, h5f.LIBVER_V110)  # the first with checksums
    access.set_fclose_degree(h5f.CLOSE_STRONG)
    access.set_fileobj_driver(h5fd.fileobj_driver, handle)
    return h5py.File(h5f.create(b"container", h5f.ACC_TRUNC, creation, access))


def _make_groups(file: h5py.File, names: Iterable[str]) -> None:
    creation = h5p.create(h5p.GROUP_CREATE)
    creation.set_obj_track_times(False)
    for group in sorted({above for name in names for above in _groups(name)}):
        h5g.create(file.id, group.encode(), gcpl=creation)


def _keep(path: Path, previous: Path | None) -> None:
    """Give the file at `path` the name `previous` too, if it is sound."""
    if previous is None:
        return
    with contextlib.suppress(FileRefused):
        verify(path)
        atomic.keep(path, previous)


# Reading: the file, its header and its digest


@contextlib.contextmanager
def _refusing(path: Path) -> Iterator[None]:
    """Put the path before a refusal, and turn what the system or HDF5 raises into one."""
    try:
        yield
    except FileRefused as refusal:
        named = str(refusal).startswith(f"{path}: ")
        raise refusal if named else FileRefused(f"{path}: {refusal}") from None
    except Exception as error:  # damaged metadata make h5py raise OverflowError too
        raise FileRefused(f"{path}: cannot be read ({error}); check path and file") from error


def _header(handle: io.BufferedReader) -> tuple[int, bytes]:
    """Check the header against the file; return length (bytes) and SHA-256 of the image."""
    size = os.fstat(handle.fileno()).st_size
    block = handle.read(BLOCK)
    if not block.startswith(_MAGIC):
        raise FileRefused(
            f"starts with {block[:8]!r}, not {_MAGIC!r}; this is no checkpoint or trace of npdrt"
        )
    if len(block) < BLOCK:
        raise FileRefused(f"has {size} bytes, fewer than the {BLOCK} of its header; {_DAMAGED}")
    _, length, sha, version = _HEADER.unpack_from(block)
    if version != FORMAT:
        raise FileRefused(f"has format version {version}, not {FORMAT}; use its writer's npdrt")
    if any(block[_HEADER.size :]):
        raise FileRefused(f"has bytes other than zero in the padding of its header; {_DAMAGED}")
    if size != BLOCK + length:
        raise FileRefused(f"has {size} bytes, but its header says {BLOCK + length}; {_DAMAGED}")
    return length, sha


def _checked_image(handle: io.BufferedReader, max_bytes: int, expect_sha256: str | None) -> bytes:
    size = os.fstat(handle.fileno()).st_size
    if size > max_bytes:
        raise FileRefused(f"has {size} bytes, more than the limit of {max_bytes}; raise max_bytes")
    length, expected = _header(handle)
    if expect_sha256 is not None and expect_sha256.lower() != expected.hex():
        raise FileRefused(
            f"has SHA-256 {expected.hex()}, but {expect_sha256} was expected; get that file"
        )
    image = handle.read(length)
    _check_digest(hashlib.sha256(image).digest(), expected)
    return image


def _check_digest(found: bytes, expected: bytes) -> None:
    if found != expected:
        raise FileRefused(
            f"has data with SHA-256 {found.hex()}, but its header says {expected.hex()}; {_DAMAGED}"
        )


# Reading: the image, held against what `write` makes


def _check_superblock(image: bytes) -> None:
    """Allow the superblock `write` makes: no extension with shared messages or a driver."""
    if len(image) < _SUPERBLOCK.size:
        raise FileRefused(f"has no HDF5 superblock; {_FOREIGN}")
    *start, base, extension, end = _SUPERBLOCK.unpack_from(image)
    plain = start == _SUPERBLOCK_START and extension == _UNDEFINED
    if not plain or base != BLOCK or end != BLOCK + len(image):
        raise FileRefused(f"has an HDF5 superblock of another form; {_FOREIGN}")


def _members(image: bytes, root: h5g.GroupID) -> Iterator[tuple[str, Array]]:
    """Yield name and array of each dataset; no more bytes in all than the image has."""
    room = len(image)
    _check_object("/", h5o.get_info(root))
    for count, (name, dataset) in enumerate(_walk(root, "", 1)):
        if count >= MAX_ARRAYS:
            raise FileRefused(f"has more than {MAX_ARRAYS} members; {_FOREIGN}")
        array = _array(image, name, dataset, room)
        room -= array.nbytes
        yield name, array


def _walk(group: h5g.GroupID, prefix: str, depth: int) -> Iterator[tuple[str, h5d.DatasetID]]:
    """Yield the datasets below `group`, one link at a time: a path of the file is never followed.

    Every group must hold something, so that the number of datasets bounds the walk.
    """
    links = list(group)
    if (not links and prefix) or depth > MAX_DEPTH:
        raise FileRefused(f"{prefix!r} is an empty group or deeper than {MAX_DEPTH}; {_FOREIGN}")
    for link in links:
        part = link.decode("utf-8", "backslashreplace")
        name = prefix + part
        if not _NAME.fullmatch(part):
            raise FileRefused(f"{name!r} is not an allowed name; {_FOREIGN}")
        if group.links.get_info(link).type != h5l.TYPE_HARD:
            raise FileRefused(f"{name!r} is a soft, external or user-defined link; {_FOREIGN}")
        _check_object(name, h5o.get_info(group, link))
        node = h5o.open(group, link)
        if isinstance(node, h5g.GroupID):
            yield from _walk(node, name + "/", depth + 1)
        else:
            yield name, node


def _check_object(name: str, info: h5o.ObjInfo) -> None:
    if info.type not in (h5o.TYPE_GROUP, h5o.TYPE_DATASET):
        raise FileRefused(f"{name!r} is neither a group nor a dataset; {_FOREIGN}")
    if info.rc != 1:
        raise FileRefused(f"{name!r} has {info.rc} hard links, not 1; {_FOREIGN}")
    if info.num_attrs:
        raise FileRefused(f"{name!r} has attributes; {_FOREIGN}")


def _array(image: bytes, name: str, dataset: h5d.DatasetID, room: int) -> Array:
    """Copy one dataset out of the image, once it is known to be of the only form allowed."""
    if reason := _unusual_storage(dataset):
        raise FileRefused(f"{name!r} {reason}; {_FOREIGN}")
    dtype = next((d for kind, d in _HDF5_TYPES if kind.equal(dataset.get_type())), None)
    space = dataset.get_space()
    if dtype is None or space.get_simple_extent_type() not in (h5s.SCALAR, h5s.SIMPLE):
        raise FileRefused(f"{name!r} is not an array of an allowed type; {_FOREIGN}")
    shape = space.get_simple_extent_dims()
    size = math.prod(shape) * dtype.itemsize  # Python integers: nothing wraps around
    stored = dataset.get_storage_size()
    if size != stored or size > room:
        raise FileRefused(
            f"{name!r} of shape {shape} needs {size} bytes, but {stored} are stored and {room} left"
            f" in the image; {_FOREIGN}"
        )
    if size == 0:
        return np.empty(shape, dtype)
    values = np.frombuffer(image, dtype, math.prod(shape), dataset.get_offset())
    return values.reshape(shape).copy()


def _unusual_storage(dataset: h5d.DatasetID) -> str | None:
    """Say how the storage differs from what `write` makes.

    The layout comes first: HDF5 may open the sources of a virtual dataset when asked for its
    shape or size.
    """
    creation = dataset.get_create_plist()
    if creation.get_layout() != h5d.CONTIGUOUS:
        return "is not stored contiguously (chunked, compact or virtual)"
    if creation.get_external_count():
        return "has its data in another file"
    if creation.get_nfilters():
        return "passes through a filter"
    if dataset.get_type().committed():
        return "has a named type"
    return None


# Reading: the metadata


def _envelope(meta: Array | None) -> tuple[list[str], dict[str, Any]]:
    if meta is None or meta.dtype != np.uint8 or meta.ndim != 1:
        raise FileRefused(f"has no /meta of uint8 in one dimension; {_FOREIGN}")
    try:
        return _decode(meta.tobytes())
    except (ValueError, RecursionError) as error:
        raise FileRefused(f"has a /meta of another form ({error}); {_FOREIGN}") from error


def _decode(raw: bytes) -> tuple[list[str], dict[str, Any]]:
    """Return order and meta; ValueError for any bytes but those `_canonical` makes of them."""
    if len(raw) > MAX_META:
        raise ValueError(f"{len(raw)} bytes with the order, more than {MAX_META}")
    envelope = json.loads(raw.decode(), object_pairs_hook=_unique, parse_constant=_no_constant)
    if _canonical(envelope) != raw:
        raise ValueError("JSON that is not canonical")
    if not isinstance(envelope, dict) or envelope.keys() != {"format", "meta", "order"}:
        raise ValueError("not exactly the keys format, meta, order")
    order, meta = envelope["order"], envelope["meta"]
    if envelope["format"] != FORMAT or not isinstance(meta, dict) or not _all_strings(order):
        raise ValueError("format, order or meta of the wrong kind")
    if len(set(order)) != len(order):
        raise ValueError("a name twice in the order")
    return order, meta


def _all_strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        raise ValueError("a key occurs twice")
    return unique


def _no_constant(literal: str) -> Any:
    raise ValueError(f"{literal} is not a number of JSON")
