"""The container: named arrays and JSON metadata in one HDF5 file, sealed by a SHA-256.

Layout: a 512-byte header, which HDF5 skips as its user block, then an HDF5 image. Plain h5py,
h5dump and HDFView open the file. Integers are little-endian, offsets count from the start of the
file.

    offset  bytes  field
         0      8  magic, b"NPDRTCK1"
         8      8  length of the image in bytes, u64
        16     32  SHA-256 of the bytes from 48 to the end of the file
        48      4  format version, u32, 2
        52      8  offset of the data of /meta, u64
        60      8  their length in bytes, u64
        68    444  zero
       512         HDF5 image: superblock version 3, groups, contiguous datasets, nothing else

An array is a contiguous dataset under its name ("params/layers/00/weight": groups `params`,
`layers`, `00`). `/meta` is uint8, canonical JSON in UTF-8 (sorted keys, no NaN or infinity):

    {"arrays": [[name, dtype, shape, offset], ...], "format": 2, "meta": {...}}

with the arrays in the caller's order; the offset of an array without elements is 0. The same arrays
and metadata give the same bytes.

Saving never changes a file in place: npdrt writes a temporary file next to it, forces it to the
disk and renames it, so that a reader sees the whole old file or the whole new one. Reading trusts
nothing. libhdf5, which is not built for hostile files, gets no byte: npdrt checks every name, type
and range in the index, takes the arrays by their offsets, and returns them if length and digest are
right. A digest shows that a file is intact, not who wrote it; for that, compare it with a digest
that you got another way (`expect_sha256`). It does not show either that h5py finds the arrays of
the index: a forger can make the two differ.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import math
import os
import re
import struct
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from npdrt import atomic, regular
from npdrt.errors import DiskError, Error, FileRefused

FORMAT = 2
BLOCK = 512  # bytes of the header; HDF5 looks for its image at 0, 512, 1024, ...
MAX_BYTES = 16 << 30
FREE, RATIO = 256 << 20, 100  # a larger file has at most that many bytes for each that is no hole
MAX_INDEX = 16 << 20  # bytes of all of /meta
MAX_META = 4 << 20  # bytes of the caller's part of it
MAX_ARRAYS = 100_000
MAX_DEPTH = 8
DTYPES = tuple(
    map(np.dtype, ("<f2", "<f4", "<f8", "i1", "<i2", "<i4", "<i8", "u1", "<u2", "<u4", "<u8"))
)

Array = npt.NDArray[Any]

_MAGIC = b"NPDRTCK1"
_HEADER = struct.Struct("<8sQ32sIQQ")
_PIECE = 1 << 20
_DIGEST, _COVERED = 16, 48  # where the digest stands, and where the bytes that it covers begin
_KINDS = {dtype.name: dtype for dtype in DTYPES}
_PART = r"(?!\.{1,2}(?:/|\Z))[A-Za-z0-9_.-]{1,128}"  # "." means the group itself to HDF5
_NAME = re.compile(rf"(?!meta(?:/|\Z)){_PART}(?:/{_PART}){{0,{MAX_DEPTH - 1}}}")
_DAMAGED = "the file is damaged: restore a copy or use the previous checkpoint"
_FOREIGN = "npdrt did not write this file: do not use it"

Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]


class _Header(NamedTuple):
    length: int  # bytes of the image
    sha256: bytes
    meta: range  # of the data of /meta in the file


class _Place(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """An array's row in the index: its name, type and shape, and where its bytes are."""

    name: str
    dtype: Literal[tuple(_KINDS)]  # type: ignore[valid-type]  # those of DTYPES
    shape: Annotated[list[Count], msgspec.Meta(max_length=32)]
    offset: Count

    @property
    def size(self) -> int:
        """Number of elements; Python integers, so that nothing wraps around."""
        return math.prod(self.shape)

    @property
    def span(self) -> range:
        """The range of its bytes in the file."""
        return range(self.offset, self.offset + self.size * _KINDS[self.dtype].itemsize)


_decode_places = msgspec.json.Decoder(list[_Place]).decode


def write(
    path: Path,
    arrays: Mapping[str, Array],
    meta: Mapping[str, Any],
    *,
    keep_previous: Path | None = None,
) -> str:
    """Save `arrays` and `meta` at `path`, atomically; return the file's SHA-256 in hex.

    arrays: name -> array of any shape and memory layout, of a dtype in `DTYPES` in either byte
    order. A name has at most 8 parts of 1 to 128 characters A-Z a-z 0-9 _ . - with "/" between;
    no part is "." or ".."; the first is not "meta". meta: JSON values with string keys and finite
    numbers, at most 4 MiB. keep_previous: a path in the same directory that receives the old file
    at `path`, by hard link. The old file is read and its digest checked first (about a quarter of
    the time of a save): a damaged file is not kept, so that it cannot displace a sound one.

    An old file passes on its mode; a new one obeys the umask. After an exception `path` is as it
    was (unless only the last step failed, the sync of the directory), and there is no temporary
    file; a killed process may leave one (`npdrt.atomic.remove_stale`). The arrays go directly to
    the file; only an array that must be converted takes memory. Raises Error for data that cannot
    be stored, DiskError if the file system fails.
    """
    _check_storable(arrays)
    text = _encode(meta)
    try:
        with atomic.replacing(path, before=partial(_keep, path, keep_previous)) as handle:
            return _write(handle, arrays, text)
    except RuntimeError as error:  # from h5py, when the disk fails
        raise DiskError(f"{path}: could not be written ({error}); check the disk") from error


def read(
    path: Path, *, max_bytes: int = MAX_BYTES, expect_sha256: str | None = None
) -> tuple[dict[str, Array], dict[str, Any]]:
    """Read what `write` saved: the arrays, writable, in the order they were given, and `meta`.

    max_bytes: a longer file is refused unread. expect_sha256: the digest that the file must have,
    64 hex digits. Takes memory for the arrays; the file is read once, and hashed meanwhile.

    Raises FileRefused, with path, reason and remedy, if the path is not a regular file (symbolic
    links are not followed), the header, length or digest is wrong, or `/meta` is not the canonical
    JSON of an index whose names are allowed and unique, whose types are in `DTYPES`, and whose
    ranges are in the image and do not overlap. Any values are accepted, NaN too.
    """
    with regular.refusing(path), regular.open_file(path) as handle:
        header = _checked_header(handle, max_bytes, expect_sha256)
        try:
            places, meta, text = _index(handle, header)
        except FileRefused:
            _check_digest(handle, header.sha256)  # if it is damaged, that is the reason
            raise
        return _arrays(handle, header, places, text), meta


def digest(path: Path) -> str:
    """Return the SHA-256 in the header, in hex, without reading the data (see `verify`)."""
    with regular.refusing(path), regular.open_file(path) as handle:
        return _header(handle).sha256.hex()


def verify(path: Path) -> str:
    """Check header, length and digest in constant memory; return the SHA-256 in hex.

    Raises FileRefused. Only `read` checks the content.
    """
    with regular.refusing(path), regular.open_file(path) as handle:
        expected = _header(handle).sha256
        _check_digest(handle, expected)
        return expected.hex()


def version(path: Path) -> int | None:
    """The format version in a file's header; None if the file is not a container."""
    with regular.refusing(path), regular.open_file(path) as handle:
        block = handle.read(BLOCK)
        container = len(block) == BLOCK and block.startswith(_MAGIC)
        return int(_HEADER.unpack_from(block)[3]) if container else None


def within(path: Path, *names: str) -> Path:
    """`path` itself if it is a file; in a directory, the first of `names` that exists.

    If none exists, the path of the first one.
    """
    files = [path / name for name in names] if path.is_dir() else [path]
    return next(filter(Path.exists, files), files[0])


def missing(path: Path, name: str = "checkpoint.h5") -> str:
    """What npdrt says of a path in which `within` found no file of that name."""
    if path.is_dir():
        return f"{path} holds no run: it has no {name}"
    return regular.missing(path)


# What may be stored


def _check_storable(arrays: Mapping[str, Array]) -> None:
    if len(arrays) > MAX_ARRAYS:
        raise Error(f"{len(arrays)} arrays cannot be stored; at most {MAX_ARRAYS}")
    if reason := _unusual_name(arrays):
        raise Error(reason)
    for name, array in arrays.items():
        dtype = array.dtype if isinstance(array, np.ndarray | np.generic) else type(array).__name__
        if not isinstance(dtype, np.dtype) or dtype.newbyteorder("<") not in DTYPES:
            allowed = ", ".join(_KINDS)
            raise Error(f"array {name!r} is {dtype}, which cannot be stored; convert to {allowed}")


def _unusual_name(names: Collection[str]) -> str | None:
    """Why one of the names is not allowed; None if all are."""
    for name in names:
        if not _NAME.fullmatch(name):
            return (
                f"array name {name!r} cannot be stored; use 1 to {MAX_DEPTH} parts of "
                "A-Z a-z 0-9 _ . - with '/' between, the first not 'meta'"
            )
    groups = {name[: slash.start()] for name in names for slash in re.finditer("/", name)}
    if clash := groups.intersection(names):
        return f"array {min(clash)!r} has arrays below it; a name is an array or a group"
    return None


def _canonical(value: Any) -> bytes:
    text = json.dumps(
        value, sort_keys=True, allow_nan=False, ensure_ascii=False, separators=(",", ":")
    )
    return text.encode("utf-8", "backslashreplace")  # a byte of a name that is not UTF-8: \udce9


def _encode(meta: Mapping[str, Any]) -> bytes:
    try:
        text = _canonical(dict(meta))
        _decode(text)  # refuse now what `read` would refuse: too long, or keys 1 and "1"
    except (TypeError, ValueError, RecursionError) as error:
        raise Error(f"meta cannot be stored as JSON ({error}); give plain finite data") from error
    return text


# Writing


def _write(handle: io.BufferedRandom, arrays: Mapping[str, Array], meta: bytes) -> str:
    """Write HDF5 after the place of the header, then the header, which needs the finished bytes."""
    from npdrt.store import hdf5  # not at the top: readers need no h5py

    with hdf5.writing(handle, BLOCK) as put:
        offsets = {name: put(name, arrays[name]) for name in sorted(arrays)}
        text = _encode_index(arrays, offsets, meta)
        where = put("meta", np.frombuffer(text, np.uint8))
    length = handle.seek(0, os.SEEK_END) - BLOCK
    header = _HEADER.pack(_MAGIC, length, bytes(32), FORMAT, where, len(text))
    handle.seek(0)
    handle.write(header.ljust(BLOCK, b"\0"))
    handle.seek(_COVERED)
    sha = hashlib.file_digest(handle, "sha256")
    handle.seek(_DIGEST)
    handle.write(sha.digest())
    return sha.hexdigest()


def _encode_index(arrays: Mapping[str, Array], offsets: Mapping[str, int], meta: bytes) -> bytes:
    places = [_Place(n, a.dtype.name, list(a.shape), offsets[n]) for n, a in arrays.items()]
    text = _join(places, meta)
    if len(text) > MAX_INDEX:
        raise Error(f"{len(text)} bytes of names and meta cannot be stored; at most {MAX_INDEX}")
    return text


def _join(places: list[_Place], meta: bytes) -> bytes:
    return b'{"arrays":%b,"format":2,"meta":%b}' % (msgspec.json.encode(places), meta)


def _keep(path: Path, previous: Path | None) -> None:
    """Give the file at `path` the name `previous` too, if it is sound."""
    if previous is None:
        return
    with contextlib.suppress(FileRefused):
        verify(path)
        atomic.keep(path, previous)


# Reading: the header and the digest


def _header(handle: io.BufferedReader) -> _Header:
    """Check the header against the file."""
    size = os.fstat(handle.fileno()).st_size
    block = handle.read(BLOCK)
    if not block.startswith(_MAGIC):
        raise FileRefused(
            f"starts with {block[:8]!r}, not {_MAGIC!r}; this is not a checkpoint or trace of npdrt"
        )
    if len(block) < BLOCK:
        raise FileRefused(f"has {size} bytes, fewer than the {BLOCK} of its header; {_DAMAGED}")
    _, length, sha, version, start, bytes_of_meta = _HEADER.unpack_from(block)
    if version == 1:
        raise FileRefused("has format version 1; convert it with: npdrt convert OLD NEW")
    if version != FORMAT:
        raise FileRefused(f"has format version {version}, not {FORMAT}; use its writer's npdrt")
    if any(block[_HEADER.size :]):
        raise FileRefused(f"has bytes other than zero in the padding of its header; {_DAMAGED}")
    if size != BLOCK + length:
        raise FileRefused(f"has {size} bytes, but its header says {BLOCK + length}; {_DAMAGED}")
    return _Header(length, sha, range(start, start + bytes_of_meta))


def _checked_header(
    handle: io.BufferedReader, max_bytes: int, expect_sha256: str | None
) -> _Header:
    size = os.fstat(handle.fileno()).st_size
    if size > max_bytes:
        raise FileRefused(f"has {size} bytes, more than the limit of {max_bytes}; raise max_bytes")
    if size > max(FREE, RATIO * (data := _without_holes(handle, size))):
        raise FileRefused(f"has {size} bytes, of which {data} are not holes; copy it without holes")
    header = _header(handle)
    expected = header.sha256.hex()
    if expect_sha256 is not None and expect_sha256.lower() != expected:
        raise FileRefused(
            f"has SHA-256 {expected}, but {expect_sha256} was expected; check the digest that you "
            "gave, or get the file that has it"
        )
    return header


def _without_holes(handle: io.BufferedReader, size: int) -> int:
    """The stored bytes of a file. A hole takes no space on the disk, but would fill the memory."""
    descriptor, data, at = handle.fileno(), 0, 0
    try:
        while at < size:
            start = os.lseek(descriptor, at, os.SEEK_DATA)
            at = os.lseek(descriptor, start, os.SEEK_HOLE)
            data += at - start
    except (OSError, AttributeError) as error:  # holes up to the end; or the system cannot tell
        data = data if getattr(error, "errno", None) == errno.ENXIO else size
    os.lseek(descriptor, 0, os.SEEK_SET)
    return data


def _check_digest(handle: io.BufferedReader, expected: bytes) -> None:
    handle.seek(_COVERED)
    _compare(hashlib.file_digest(handle, "sha256").digest(), expected)


def _compare(found: bytes, expected: bytes) -> None:
    if found != expected:
        raise FileRefused(
            f"has data with SHA-256 {found.hex()}, but its header says {expected.hex()}; {_DAMAGED}"
        )


# Reading: the index


def _index(
    handle: io.BufferedReader, header: _Header
) -> tuple[list[_Place], dict[str, Any], bytes]:
    """The checked rows of the index, the caller's part of /meta, and the whole of /meta."""
    where = header.meta
    _check_spans([where], header.length)
    if len(where) > MAX_INDEX:
        raise FileRefused(f"has a /meta of {len(where)} bytes, more than {MAX_INDEX}; {_FOREIGN}")
    handle.seek(where.start)
    text = handle.read(len(where))
    try:
        rows, _, rest = text.removeprefix(b'{"arrays":').partition(b',"format":2,"meta":')
        places, meta = _decode_places(rows), rest[:-1]
        if _join(places, meta) != text:
            raise ValueError("not the canonical JSON of arrays, format 2 and meta")
        decoded = _decode(meta)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise FileRefused(f"has a /meta of another form ({error}); {_FOREIGN}") from error
    _check_names([place.name for place in places])
    _check_spans([where, *_spans(places)], header.length)
    return places, decoded, text


def _decode(text: bytes) -> dict[str, Any]:
    """Return the meta; ValueError unless the bytes are those of `_canonical`."""
    if len(text) > MAX_META:
        raise ValueError(f"{len(text)} bytes, more than {MAX_META}")
    meta = json.loads(text.decode())
    if not isinstance(meta, dict):
        raise ValueError("meta is not an object")
    if _canonical(meta) != text:  # a key that occurs twice, too
        raise ValueError("JSON that is not canonical")
    return meta


def _check_names(names: list[str]) -> None:
    if len(names) > MAX_ARRAYS:
        raise FileRefused(f"has more than {MAX_ARRAYS} arrays; {_FOREIGN}")
    if len(set(names)) != len(names):
        raise FileRefused(f"has a name twice in its index; {_FOREIGN}")
    if reason := _unusual_name(names):
        raise FileRefused(f"{reason}; {_FOREIGN}")


def _spans(places: Iterable[_Place]) -> Iterator[range]:
    """The range of every array that has elements."""
    for place in places:
        if place.size:
            yield place.span
        elif place.offset:
            raise FileRefused(f"{place.name!r} is empty, but has an offset; {_FOREIGN}")


def _check_spans(spans: Iterable[range], length: int) -> None:
    """Check that each is in the image, which has that length, and overlaps no other."""
    free, end = BLOCK, BLOCK + length
    for span in sorted(spans, key=lambda span: span.start):
        if not free <= span.start <= span.stop <= end:
            raise FileRefused(
                f"bytes {span.start} to {span.stop} of its index overlap others or lie outside the "
                f"image; {_FOREIGN}"
            )
        free = span.stop


# Reading: the arrays


def _arrays(
    handle: io.BufferedReader, header: _Header, places: list[_Place], text: bytes
) -> dict[str, Array]:
    """The arrays, read in the order of the file; the digest covers every byte on the way."""
    try:
        found = {place.name: np.empty(place.shape, _KINDS[place.dtype]) for place in places}
    except (ValueError, MemoryError) as error:  # of a shape that NumPy or the machine cannot hold
        raise FileRefused(f"cannot be read: {error}; check path and file") from error
    pieces = [(place.offset, found[place.name]) for place in places if place.size]
    again = np.empty(len(text), np.uint8)
    sha, at = hashlib.sha256(), _COVERED
    handle.seek(at)
    for offset, array in sorted([*pieces, (header.meta.start, again)], key=lambda piece: piece[0]):
        _skip(handle, offset - at, sha)
        target = array.reshape(-1).view(np.uint8).data
        if handle.readinto(target) != len(target):
            raise FileRefused(f"became shorter while it was read; {_DAMAGED}")
        sha.update(target)
        at = offset + len(target)
    _skip(handle, BLOCK + header.length - at, sha)
    _compare(sha.digest(), header.sha256)
    if again.tobytes() != text:
        raise FileRefused(f"was changed while it was read; {_DAMAGED}")
    return found


def _skip(handle: io.BufferedReader, count: int, sha: Any) -> None:
    """Hash the next bytes, piece by piece."""
    while count > 0 and (piece := handle.read(min(count, _PIECE))):
        sha.update(piece)
        count -= len(piece)
