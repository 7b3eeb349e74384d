"""Read an untrusted HDF5 file in a process of its own: a script, run by `npdrt.store.foreign`.

libhdf5 is not built for hostile files: they can make it crash, hang or fill the memory. In this
script that ends this process and nothing else. Its limit of processor time ends it even if its
parent has gone. The limits are not a sandbox: open files of unknown origin as a user who owns
nothing.

    python -P child.py JOB < FILE > ANSWER

JOB: {"kind": "datasets" or "version 1", "fields": the wanted last parts of names, or null for all,
"bytes": the limit for all arrays together, "seconds": the limit of processor time}. ANSWER: the
length of a header (u64, little-endian), the header, then the bytes of the arrays one after another.
The header is JSON: {"arrays": [[name, dtype, shape], ...], "meta": {...}}, or {"refused": why}.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import os
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from h5py import h5d, h5g, h5l, h5o, h5s, h5t

MAX_MEMBERS = 100_000
MAX_DEPTH = 8
ROOM = 128 << 20  # bytes of memory besides the file and two copies of the arrays
_FILTERS = {1, 2, 3}  # deflate, shuffle, checksum; others may load code
_HEADER = struct.Struct("<8sQ32sI")  # of a container of version 1: magic, length, SHA-256, version
_BLOCK = 512

Found = dict[str, Any]


class Refused(Exception):
    """Why the file is not read."""


def main() -> None:
    """Do the job and write the answer."""
    job, data = json.loads(sys.argv[1]), sys.stdin.buffer
    size = os.fstat(data.fileno()).st_size
    _limit(ROOM + size + 2 * job["bytes"], job["seconds"])
    try:
        read = {"datasets": datasets, "version 1": version_1}[job["kind"]]
        found, meta = read(data.read(size), job)
        header = {"arrays": [[n, v.dtype.name, v.shape] for n, v in found.items()], "meta": meta}
    except Exception as error:  # damaged metadata makes h5py raise many kinds
        reason = str(error) if isinstance(error, Refused) else f"damaged HDF5 file: {_line(error)}"
        found, header = {}, {"refused": reason}
    text = json.dumps(header, separators=(",", ":")).encode()
    sys.stdout.buffer.write(len(text).to_bytes(8, "little") + text)
    for value in found.values():
        sys.stdout.buffer.write(value.tobytes())
    sys.stdout.buffer.flush()


def _limit(memory: int, seconds: int) -> None:
    """Bound what this process may use from now on, where the system can do that."""
    try:
        import resource
    except ImportError:  # Windows: the parent's clock is the only limit
        return
    used, now = 1 << 30, resource.getrusage(resource.RUSAGE_SELF)
    with contextlib.suppress(OSError):
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    cpu = math.ceil(now.ru_utime + now.ru_stime) + seconds
    for kind, limit in (("AS", used + memory), ("CPU", cpu), ("CORE", 0)):
        with contextlib.suppress(OSError, ValueError):  # a stricter limit is there already
            resource.setrlimit(getattr(resource, f"RLIMIT_{kind}"), (limit, limit))


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


# --- the datasets of a plain HDF5 file --------------------------------------------------------


def datasets(data: bytes, job: dict[str, Any]) -> tuple[Found, None]:
    """Arrays of numbers that the file itself holds, below hard links, plain or packed by gzip."""
    with h5py.File(io.BytesIO(data), "r") as file:
        chosen = dict(_datasets(file, "", job["fields"], [0]))
        wanted = {name: _plain(name, d, job["bytes"]) for name, d in chosen.items()}
        _bound([math.prod(d.shape) * d.dtype.itemsize for d in wanted.values()], job["bytes"])
        return {name: _little(d[()]) for name, d in wanted.items()}, None


def _datasets(
    group: Any, prefix: str, fields: list[str] | None, count: list[int]
) -> Iterator[tuple[str, Any]]:
    for key in group:
        name = f"{prefix}{key}"
        count[0] += 1
        if count[0] > MAX_MEMBERS or name.count("/") > MAX_DEPTH:
            raise Refused("too many groups and datasets, or too deep")
        hard = isinstance(group.get(key, getlink=True), h5py.HardLink)
        member = group[key] if hard else None
        if isinstance(member, h5py.Group):
            yield from _datasets(member, f"{name}/", fields, count)
        elif fields is None or key in fields:
            yield name, member


def _plain(name: str, dataset: Any, limit: int) -> Any:
    """A dataset of numbers whose bytes are in the file."""
    settings = None if dataset is None else dataset.id.get_create_plist()
    if settings is None or dataset.is_virtual or dataset.external or dataset.shape is None:
        raise Refused(f"{name} is not in the file itself; copy it into one file")
    if math.prod(dataset.chunks or ()) * dataset.dtype.itemsize > limit:
        raise Refused(f"{name} has pieces of more than {limit} bytes, which are not read")
    filters = {settings.get_filter(k)[0] for k in range(settings.get_nfilters())}
    if not filters <= _FILTERS:
        raise Refused(f"{name} is compressed other than by gzip")
    if dataset.dtype.kind not in "fiu" or dataset.dtype.itemsize > 8:
        hint = "; keep bfloat16 in safetensors" if dataset.dtype.kind == "V" else ""
        raise Refused(f"{name} is {dataset.dtype}; expected integers or floats{hint}")
    return dataset


def _bound(sizes: list[int], limit: int) -> None:
    if sum(sizes) > limit:
        raise Refused(f"{len(sizes)} arrays of {sum(sizes)} bytes; at most {limit} are read")


def _little(value: Any) -> Any:
    return np.asarray(value, dtype=value.dtype.newbyteorder("<"))


# --- the container of version 1 -----------------------------------------------------------------
#
# npdrt wrote it until 0.1. It has the header of version 2 without the place of /meta. The digest is
# that of the image, /meta has the order of the arrays, and HDF5 finds the arrays.

_TYPES = [
    (h5t.py_create(np.dtype(name)), np.dtype(name))
    for name in ("<f2", "<f4", "<f8", "i1", "<i2", "<i4", "<i8", "u1", "<u2", "<u4", "<u8")
]


def version_1(data: bytes, job: dict[str, Any]) -> tuple[Found, Any]:
    """Its arrays in the order in which they were given, and the caller's metadata."""
    image = _sealed_image(data)
    with h5py.File(io.BytesIO(image), "r") as file:
        found = dict(_members(image, h5o.open(file.id, b"/")))
    envelope = json.loads(found.pop("meta").tobytes().decode())
    if sorted(envelope["order"]) != sorted(found):
        raise Refused("its order and its members differ")
    return {name: found[name] for name in envelope["order"]}, envelope["meta"]


def _sealed_image(data: bytes) -> bytes:
    magic, length, sha, version = _HEADER.unpack_from(data.ljust(_BLOCK, b"\0"))
    image = data[_BLOCK:]
    if magic != b"NPDRTCK1" or version != 1:
        raise Refused("is not a container of version 1")
    if len(image) != length or hashlib.sha256(image).digest() != sha:
        raise Refused("is damaged: its length or its SHA-256 is not that of its header")
    return image


def _members(image: bytes, root: h5g.GroupID) -> Iterator[tuple[str, Any]]:
    """Yield name and array of each dataset; no more bytes in all than the image has."""
    room = len(image)
    for count, (name, dataset) in enumerate(_walk(root, "", 1)):
        if count >= MAX_MEMBERS:
            raise Refused(f"has more than {MAX_MEMBERS} members")
        array = _array(image, name, dataset, room)
        room -= array.nbytes
        yield name, array


def _walk(group: h5g.GroupID, prefix: str, depth: int) -> Iterator[tuple[str, h5d.DatasetID]]:
    """Yield the datasets below `group`, one link at a time: a path of the file is never followed.

    Every group must hold something, so that the number of datasets bounds the walk.
    """
    links = list(group)
    if (not links and prefix) or depth > MAX_DEPTH:
        raise Refused(f"{prefix!r} is an empty group or deeper than {MAX_DEPTH}")
    for link in links:
        name = prefix + link.decode()
        if group.links.get_info(link).type != h5l.TYPE_HARD:
            raise Refused(f"{name!r} is a soft, external or user-defined link")
        info = h5o.get_info(group, link)
        if info.rc != 1 or info.num_attrs:
            raise Refused(f"{name!r} has attributes or several links")
        node = h5o.open(group, link)
        if isinstance(node, h5g.GroupID):
            yield from _walk(node, name + "/", depth + 1)
        else:
            yield name, node


def _array(image: bytes, name: str, dataset: Any, room: int) -> Any:
    """Copy one dataset out of the image, once it is known to be of the only form allowed.

    The layout comes first: HDF5 may open the sources of a virtual dataset when asked for its
    shape or size.
    """
    creation = dataset.get_create_plist()
    if creation.get_layout() != h5d.CONTIGUOUS or creation.get_external_count():
        raise Refused(f"{name!r} is not stored in one piece in the file itself")
    dtype = next((d for kind, d in _TYPES if kind.equal(dataset.get_type())), None)
    space = dataset.get_space()
    if dtype is None or space.get_simple_extent_type() not in (h5s.SCALAR, h5s.SIMPLE):
        raise Refused(f"{name!r} is not an array of an allowed type")
    shape = space.get_simple_extent_dims()
    size = math.prod(shape) * dtype.itemsize
    if size != dataset.get_storage_size() or size > room:
        raise Refused(f"{name!r} of shape {shape} needs {size} bytes, which are not there")
    if size == 0:
        return np.empty(shape, dtype)
    values = np.frombuffer(image, dtype, math.prod(shape), dataset.get_offset())
    return values.reshape(shape).copy()


if __name__ == "__main__":
    main()
