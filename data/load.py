"""Data sets as host arrays: the bundled digits, MNIST, CIFAR, folders of images, the user's own."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from npdrt.data import cifar, folder, squad, text
from npdrt.data.bounded import opened
from npdrt.data.catalogue import File, Form, Source, find, package_file
from npdrt.data.dataset import Dataset
from npdrt.data.fetch import here, place, present
from npdrt.data.idx import read_idx
from npdrt.data.images import Images, Stored
from npdrt.data.npz import Array, read_npz
from npdrt.data.scale import Channels, Floats, Scale, from_constants, measure
from npdrt.errors import Error, FileRefused

_MOST_CLASSES = 1 << 20  # above it a label is more likely a target, or damage


@dataclass(frozen=True)
class _Raw:
    """What the files hold: arrays by role (x, y, x_test, y_test), how messages call each, the
    SHA-256 of the files by name, and what a user should know of them. stored: x stays bytes."""

    arrays: dict[str, Array]
    names: dict[str, str]
    digests: dict[str, str]
    notes: tuple[str, ...] = ()
    stored: bool = False


def load(
    name_or_path: str | Path,
    *,
    data_dir: str | Path | None = None,
    standardise: bool | str = True,
    catalogue: Path | None = None,
) -> Dataset:
    """A data set: "digits", "mnist", "fashion-mnist", "cifar-10", "cifar-100", "folder:PATH", text
    ("wikitext-2", "text:PATH", see `npdrt.data.text`; "squad:PATH"), or the path of a FILE.npz.

    data_dir: a folder to look in first (`npdrt.data.fetch.locate`). standardise: subtract a mean
    and divide by a standard deviation, in float64, rounded once to float32. The named data sets
    have fixed constants (sources.toml), of all pixels or of each channel; a user's file is
    measured on its x. Without it the values of the file are only cast to float32. The name of
    another standardisation: "unit" is [0, 1], "symmetric" is [-1, 1], and cifar-10 has "fromage".
    catalogue: another sources.toml.

    CIFAR is read in its binary or its Python version, without running the latter. Where some of
    its training batches are missing, those that are there are the training set, and `notes` says
    so. Its images, and those of a folder (`npdrt.data.folder`; 224x224, or "folder-64:PATH" for
    64x64), become numbers a batch at a time.

    A FILE.npz has arrays x and y, and optionally x_test and y_test: x (N, ...), any integers or
    floats; y labels (N,), integers from 0, or float targets (N, ...). Constant x becomes 0.

    Raises Error for an unknown name or a missing path, Unavailable where the data set has not
    been fetched, FileRefused where a file is damaged or its arrays do not fit together.
    """
    name = str(name_or_path)
    if folder.named(name):
        return _folder(name, standardise)
    if text.named(name):
        return text.load(name, data_dir)
    if squad.named(name):
        return squad.load(name, data_dir)
    if name.endswith(".npz"):
        return _user_data(Path(name_or_path), standardise)
    source = find(name, catalogue)
    scale = source.scaling(standardise)
    where, form = place(source, data_dir)
    raw = READERS[form.reader](where, form, source)
    _check(raw, source.classes)
    return _dataset(name, raw, source.classes, source.image, scale)


def _folder(name: str, standardise: bool | str) -> Dataset:
    """A folder of images; see `npdrt.data.folder`."""
    scale = _folder_scale(standardise)
    size, parts = folder.parse(name)[0], folder.read(name)
    train, val = parts["train"], parts.get("val")
    as_x = scale or Scale()
    return Dataset(
        name,
        x=folder.Files(train.paths, size, as_x),
        y=train.labels,
        x_test=folder.Files(val.paths, size, as_x) if val else None,
        y_test=val.labels if val else None,
        classes=len(train.classes),
        image_shape=(3, size, size),
        digests={f"{part}/": found.digest for part, found in parts.items()},
        scale=scale,
    )


def _folder_scale(standardise: bool | str) -> Scale | Channels | None:
    scales = {"unit": Scale(255.0), "symmetric": Scale(255.0, 0.5, 0.5)}
    if not isinstance(standardise, str):
        return from_constants(255.0, folder.MEAN, folder.STD) if standardise else None
    if standardise not in scales:
        raise Error(f"a folder has no standardisation {standardise!r}; use true, false or unit")
    return scales[standardise]


def _user_data(path: Path, standardise: bool | str) -> Dataset:
    if isinstance(standardise, str):
        raise Error(f"{path} is standardised by its own mean or not at all; got {standardise!r}")
    if not path.exists():
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
    scale: Scale | Channels | None,
) -> Dataset:
    """The arrays in the form a Dataset promises."""
    as_x: Callable[[Array], Floats | Images] = scale or Scale()
    if raw.stored:
        as_x = partial(Stored, scale=scale or Scale())
    as_y = np.int64 if classes else np.float32
    out: dict[str, Any] = {"x_test": None, "y_test": None}
    for role, array in raw.arrays.items():
        with np.errstate(over="ignore"):
            out[role] = array.astype(as_y) if role.startswith("y") else as_x(array)
        if array.dtype.kind == "f":
            _check_finite(out[role], f"{raw.names[role]}, converted to float32")
    about: dict[str, Any] = {"digests": raw.digests, "notes": raw.notes, "scale": scale}
    return Dataset(name, classes=classes, image_shape=image, **about, **out)


# Reading


def _user_file(path: Path) -> _Raw:
    try:
        with opened(path) as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
            arrays = read_npz(stream, str(path))
    except OSError as error:
        raise FileRefused(f"{path}: cannot be read: {error.strerror}") from error
    return _Raw(arrays, {role: f"{path}: array {role}" for role in arrays}, {path.name: digest})


def _bundled(_: Path, form: Form, source: Source) -> _Raw:
    (file,) = form.files
    data = package_file(file.name).read_bytes()
    arrays = read_npz(io.BytesIO(data), file.name)
    names = {role: f"{file.name}: array {role}" for role in arrays}
    return _Raw(arrays, names, {file.name: hashlib.sha256(data).hexdigest()})


def _idx_files(where: Path, form: Form, source: Source) -> _Raw:
    raw = _Raw({}, {}, {})
    for file in form.files:
        path = present(where, file) or where / file.name
        read = _labels if file.role.startswith("y") else _images
        raw.arrays[file.role], raw.digests[path.name] = read(path, source)
        raw.names[file.role] = str(path)
    return raw


def _cifar_files(where: Path, form: Form, source: Source) -> _Raw:
    """The batches that are there; how much is missing is noted."""
    read = cifar.read_binary if form.reader == "cifar-binary" else cifar.read_python
    files = here(where, form)
    arrays, names, digests = {}, {}, {}
    for role, suffix in (("train", ""), ("test", "_test")):
        batches = [
            (file, read(where / file.name, file, source.classes))
            for file in files
            if file.role == role
        ]
        digests.update({file.name: digest for file, (_, _, digest) in batches})
        for n, array in enumerate("xy"):
            arrays[array + suffix] = np.concatenate([batch[n] for _, batch in batches])
            names[array + suffix] = f"{where}: {role}"
    return _Raw(arrays, names, digests, tuple(_missing(where, form, files, source)), stored=True)


def _missing(where: Path, form: Form, files: Sequence[File], source: Source) -> Iterator[str]:
    """What to say of a training set that is not whole."""
    absent = [file for file in form.files if file not in files]
    if absent:
        all_, some = (
            sum(f.records for f in group if f.role == "train") for group in (form.files, files)
        )
        names = ", ".join(file.name for file in absent)
        yield (
            f"{source.name}: {some:,} of {all_:,} training images; {names} not in {where} "
            f"(npdrt data fetch {source.name})"
        )


READERS: dict[str, Callable[[Path, Form, Source], _Raw]] = {
    "npz": _bundled,
    "idx": _idx_files,
    "cifar-binary": _cifar_files,
    "cifar-python": _cifar_files,
}


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
