"""The files of CIFAR-10 and CIFAR-100, in the binary and in the Python version.

A record of the binary version is the label's byte (CIFAR-100: the coarse label's, then the fine
one's), then 3072 bytes of pixels: the planes R, G and B of 32 rows. A file of the Python version
is a pickled dict with the same pixels as an array (n, 3072) and a list of labels.
Source: A. Krizhevsky, https://www.cs.toronto.edu/~kriz/cifar.html.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from npdrt.data.bounded import reading, take
from npdrt.data.catalogue import File, Form, Source
from npdrt.data.fetch import files_in
from npdrt.data.raw import Raw
from npdrt.data.scale import Array
from npdrt.data.unpickle import read_pickle
from npdrt.errors import FileRefused

SHAPE = (3, 32, 32)
_PIXELS = 3072
_LABELS: dict[int | None, tuple[tuple[bytes, int], ...]] = {
    10: ((b"labels", 10),),
    100: ((b"coarse_labels", 20), (b"fine_labels", 100)),
}
_PICKLED = 256  # bytes a record may take besides its pixels: labels, file name, opcodes

Batch = tuple[Array, Array, str]  # images (n, 3, 32, 32), labels (n,), SHA-256 of the file


def read(where: Path, form: Form, source: Source) -> Raw:
    """The batches that are in the folder; `notes` says how many are missing."""
    read_file = read_binary if form.reader == "cifar-binary" else read_python
    files = files_in(where, form)
    raw = Raw({}, {}, {}, tuple(_missing(where, form, files, source)), stored=True)
    for role, suffix in (("train", ""), ("test", "_test")):
        batches = {
            file.name: read_file(where / file.name, file, source.classes)
            for file in files
            if file.role == role
        }
        raw.digests.update({name: digest for name, (_, _, digest) in batches.items()})
        for column, array in enumerate("xy"):
            parts = [batch[column] for batch in batches.values()]
            raw.arrays[array + suffix] = np.concatenate(parts)
            raw.names[array + suffix] = f"{where}: {role}"
    return raw


def _missing(where: Path, form: Form, files: Sequence[File], source: Source) -> Iterator[str]:
    """A warning if some files of the training set are missing."""
    if absent := [file.name for file in form.files if file not in files]:
        found, all_ = (
            sum(f.records for f in group if f.role == "train") for group in (files, form.files)
        )
        yield (
            f"{source.name}: {found:,} of {all_:,} training images; {', '.join(absent)} not in "
            f"{where} (npdrt data fetch {source.name})"
        )


def read_binary(path: Path, file: File, classes: int | None) -> Batch:
    """A file of the binary version with `file.records` images of CIFAR-`classes`.

    Raises FileRefused if its length is wrong or a label is not one of its classes.
    """
    kinds = _LABELS[classes]
    size = len(kinds) + _PIXELS
    raw = _contents(path, file.records * size)
    if len(raw) != file.records * size:
        expected = f"{file.records * size} bytes, {file.records} records of {size}"
        raise FileRefused(f"{path}: expected {expected}; found {_found(raw, file.records * size)}")
    records = np.frombuffer(raw, np.uint8).reshape(file.records, size)
    for column, (name, limit) in enumerate(kinds):
        _check_labels(path, name, records[:, column], limit)
    images = np.ascontiguousarray(records[:, len(kinds) :]).reshape(-1, *SHAPE)
    labels = records[:, len(kinds) - 1].astype(np.int64)
    return images, labels, hashlib.sha256(raw).hexdigest()


def read_python(path: Path, file: File, classes: int | None) -> Batch:
    """A file of the Python version with `file.records` images of CIFAR-`classes`.

    The pickle is not run (`npdrt.data.unpickle`). Raises FileRefused if its structure is not the
    published one.
    """
    most = file.records * (_PIXELS + _PICKLED) + (1 << 16)
    raw = _contents(path, most)
    if len(raw) > most or not raw or raw.startswith(b"\x1f\x8b"):
        raise FileRefused(
            f"{path}: expected a pickle of {file.records} images; found {_found(raw, most)}"
        )
    found = read_pickle(raw, str(path))
    images = _pixels(path, found.get(b"data"), file.records)
    for name, limit in _LABELS[classes]:
        labels = _list(path, name, found.get(name), file.records)
        _check_labels(path, name, labels, limit)
    return images, labels, hashlib.sha256(raw).hexdigest()


def _contents(path: Path, most: int) -> bytes:
    """The bytes of a file, at most one more than `most`."""
    with reading(path) as stream:
        return take(stream, most + 1)


def _found(raw: bytes, most: int) -> str:
    size = "more" if len(raw) > most else str(len(raw)) if raw else "an empty file"
    return f"{size}: gzip data, to be unpacked first" if raw.startswith(b"\x1f\x8b") else size


def _pixels(path: Path, data: Any, records: int) -> Array:
    shape = getattr(data, "shape", None)
    if shape != (records, _PIXELS):
        raise FileRefused(
            f"{path}: expected b'data' as bytes of shape {(records, _PIXELS)}; "
            f"found {shape or type(data).__name__}"
        )
    return np.ascontiguousarray(data).reshape(-1, *SHAPE)


def _list(path: Path, name: bytes, labels: Any, records: int) -> Array:
    if type(labels) is not list or any(type(label) is not int for label in labels):
        raise FileRefused(f"{path}: expected {name!r} as a list of integers")
    if len(labels) != records:
        raise FileRefused(f"{path}: expected {records} of {name!r}; found {len(labels)}")
    return np.array([min(max(label, -1), 1 << 20) for label in labels], np.int64)


def _check_labels(path: Path, name: bytes, labels: Array, limit: int) -> None:
    wrong = np.flatnonzero((labels < 0) | (labels >= limit))
    if wrong.size:
        raise FileRefused(
            f"{path}: expected {name.decode().replace('_', ' ')} 0 to {limit - 1}; "
            f"found {labels[wrong[0]]} (record {wrong[0]})"
        )
