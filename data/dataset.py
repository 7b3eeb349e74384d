"""Data sets as host arrays: the bundled digits, MNIST, Fashion-MNIST, and the user's own."""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from npdrt.data.catalogue import Source, find, package_file
from npdrt.data.fetch import locate, present
from npdrt.data.idx import read_idx
from npdrt.data.npz import Array, read_npz
from npdrt.data.scale import Floats, Scale, measure
from npdrt.errors import Error, FileRefused

_MOST_CLASSES = 1 << 20  # above it a label is more likely a target, or damage


@dataclass(frozen=True)
class _Raw:
    """What the files hold: arrays by role (x, y, x_test, y_test), how messages call each, and
    the SHA-256 of the files by name."""

    arrays: dict[str, Array]
    names: dict[str, str]
    digests: dict[str, str]


@dataclass(frozen=True, eq=False)
class Dataset:
    """Examples and what to predict from them, as NumPy arrays in host memory.

    x: float32, (N, features) or (N, ...). y: int64 labels (N,), or float32 targets (N,) or
    (N, ...). x_test, y_test: the same for the test set; None where there is none.
    classes: the labels are 0 .. classes-1; None for targets.
    image_shape: (channels, height, width), where an example is an image: x.reshape(-1,
    *image_shape) are the images. digests: SHA-256 of each file read. scale: how x and x_test
    were standardised; None where they hold the values of the file.
    """

    name: str
    x: Floats = field(repr=False)
    y: Array = field(repr=False)
    x_test: Floats | None = field(repr=False)
    y_test: Array | None = field(repr=False)
    classes: int | None
    image_shape: tuple[int, int, int] | None
    digests: dict[str, str] = field(repr=False)
    scale: Scale | None

    @property
    def outputs(self) -> int:
        """What a model must return for one example: a value a class, or a value a target."""
        return self.classes or int(np.prod(self.y.shape[1:], dtype=np.int64))


def load(
    name_or_path: str | Path, *, data_dir: str | Path | None = None, standardise: bool = True
) -> Dataset:
    """A data set: "digits", "mnist", "fashion-mnist", or the path of a FILE.npz.

    data_dir: a folder to look in first (`npdrt.data.fetch.locate`). standardise: subtract one
    mean and divide by one standard deviation, in float64, rounded once to float32. The named
    data sets have fixed constants (sources.toml); a user's file is measured on its x. Without
    it the values of the file are only cast to float32.

    A FILE.npz has arrays x and y, and optionally x_test and y_test: x (N, ...), any integers or
    floats; y labels (N,), integers from 0, or float targets (N, ...). Constant x becomes 0.

    Raises Error for an unknown name or a missing path, Unavailable where the data set has not
    been fetched, FileRefused where a file is damaged or its arrays do not fit together.
    """
    name = str(name_or_path)
    if name.endswith(".npz"):
        return _user_data(Path(name_or_path), standardise)
    source = find(name)
    raw = _bundled(source) if source.bundled else _idx_files(source, data_dir)
    _check(raw, source.classes)
    scale = source.scale if standardise else None
    return _dataset(name, raw, source.classes, source.image, scale)


def _user_data(path: Path, standardise: bool) -> Dataset:
    if not path.is_file():
        raise Error(f"no file {path}")
    raw = _user_file(path)
    classes = _check(raw, None)
    x = raw.arrays["x"]
    scale = measure(x) if standardise else None
    if scale and not np.isfinite([scale.mean, scale.std]).all():
        raise FileRefused(f"{raw.names['x']}: values too large to standardise")
    return _dataset(path.stem, raw, classes, _image_shape(x), scale)


def _dataset(
    name: str,
    raw: _Raw,
    classes: int | None,
    image: tuple[int, int, int] | None,
    scale: Scale | None,
) -> Dataset:
    """The arrays in the form a Dataset promises."""
    as_x, as_y = scale or Scale(), np.int64 if classes else np.float32
    out: dict[str, Any] = {"x_test": None, "y_test": None}
    for role, array in raw.arrays.items():
        with np.errstate(over="ignore"):
            out[role] = array.astype(as_y) if role.startswith("y") else as_x(array)
        if array.dtype.kind == "f":
            _check_finite(out[role], f"{raw.names[role]}, converted to float32")
    return Dataset(
        name, classes=classes, image_shape=image, digests=raw.digests, scale=scale, **out
    )


# Reading


def _user_file(path: Path) -> _Raw:
    try:
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
            arrays = read_npz(stream, str(path))
    except OSError as error:
        raise FileRefused(f"{path}: cannot be read: {error.strerror}") from error
    return _Raw(arrays, {role: f"{path}: array {role}" for role in arrays}, {path.name: digest})


def _bundled(source: Source) -> _Raw:
    (file,) = source.files
    data = package_file(file.name).read_bytes()
    arrays = read_npz(io.BytesIO(data), file.name)
    names = {role: f"{file.name}: array {role}" for role in arrays}
    return _Raw(arrays, names, {file.name: hashlib.sha256(data).hexdigest()})


def _idx_files(source: Source, data_dir: str | Path | None) -> _Raw:
    folder = locate(source.name, data_dir)
    raw = _Raw({}, {}, {})
    for file in source.files:
        path = present(folder, file) or folder / file.name
        read = _labels if file.role.startswith("y") else _images
        raw.arrays[file.role], raw.digests[path.name] = read(path, source)
        raw.names[file.role] = str(path)
    return raw


def _labels(path: Path, source: Source) -> tuple[Array, str]:
    return read_idx(path, axes=1)


def _images(path: Path, source: Source) -> tuple[Array, str]:
    """Images as rows, (N, height * width)."""
    images, digest = read_idx(path, axes=3)
    size = source.image[1:]
    if images.shape[1:] != size:
        raise FileRefused(f"{path}: expected images of {size} pixels; found {images.shape[1:]}")
    return images.reshape(len(images), size[0] * size[1]), digest


def _image_shape(x: Array) -> tuple[int, int, int] | None:
    """(channels, height, width) of x (N, C, H, W) or (N, H, W); else None."""
    shape = x.shape[1:]
    if len(shape) == 2:
        return (1, shape[0], shape[1])
    return (shape[0], shape[1], shape[2]) if len(shape) == 3 else None


# What the arrays must be


def _check(raw: _Raw, classes: int | None) -> int | None:
    """The number of classes, None for targets; FileRefused where the arrays do not fit together.

    classes: that number where it is known.
    """
    for role, array in raw.arrays.items():
        _check_finite(array, raw.names[role])
    _check_pair(raw, "x", "y")
    if "x_test" in raw.arrays:
        _check_pair(raw, "x_test", "y_test")
        _check_alike(raw, "x_test", "x")
        _check_alike(raw, "y_test", "y")
    if raw.arrays["y"].dtype.kind == "f":
        return None
    return max(_check_labels(raw, role, classes) for role in raw.arrays if role.startswith("y"))


def _check_finite(array: Array, name: str) -> None:
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise FileRefused(f"{name}: expected finite values; found NaN or inf")


def _check_pair(raw: _Raw, x: str, y: str) -> None:
    features, answers = raw.arrays[x], raw.arrays[y]
    if features.ndim < 2 or features.size == 0:
        raise FileRefused(
            f"{raw.names[x]}: expected shape (examples, features) with none of them 0; "
            f"found {features.shape}"
        )
    if answers.shape[:1] != features.shape[:1] or answers.size == 0:
        raise FileRefused(
            f"{raw.names[y]}: expected one label or target for each of the {len(features)} "
            f"examples in {raw.names[x]}; found shape {answers.shape}"
        )


def _check_alike(raw: _Raw, test: str, train: str) -> None:
    a, b = raw.arrays[test], raw.arrays[train]
    if a.shape[1:] != b.shape[1:] or (a.dtype.kind == "f") != (b.dtype.kind == "f"):
        raise FileRefused(
            f"{raw.names[test]}: expected examples like those of {raw.names[train]}, {b.dtype} of "
            f"shape {b.shape[1:]}; found {a.dtype} of shape {a.shape[1:]}"
        )


def _check_labels(raw: _Raw, role: str, classes: int | None) -> int:
    """`classes`, or the largest label plus one."""
    y, name, limit = raw.arrays[role], raw.names[role], classes or _MOST_CLASSES
    low, high = int(y.min()), int(y.max())
    if y.ndim != 1:
        raise FileRefused(f"{name}: expected labels of shape (examples,); found {y.shape}")
    if low < 0 or high >= limit:
        raise FileRefused(
            f"{name}: expected labels 0 to {limit - 1}; found {low} to {high} "
            "(targets that are not labels are stored as floats)"
        )
    return classes or high + 1
