"""Data sets as host arrays: the bundled digits, MNIST, CIFAR, folders of images, the user's own."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from npdrt.data import cifar, folder
from npdrt.data.augment import AUGMENTS
from npdrt.data.bounded import opened
from npdrt.data.catalogue import File, Form, Source, find, package_file
from npdrt.data.fetch import here, place, present
from npdrt.data.idx import read_idx
from npdrt.data.images import Images, Stored, as_they_are
from npdrt.data.npz import Array, read_npz
from npdrt.data.sampler import Sampler
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


@dataclass(frozen=True, eq=False)
class Dataset:
    """Examples and what to predict from them, as NumPy arrays in host memory.

    x: float32, (N, features) or (N, ...); for large images `npdrt.data.images.Images`, whose
    slices are such arrays: bytes, or files, that become numbers when they are asked for. y: int64
    labels (N,), or float32 targets (N,) or (N, ...). x_test, y_test: the same for the test set;
    None where there is none.
    classes: the labels are 0 .. classes-1; None for targets.
    image_shape: (channels, height, width), where an example is an image: x.reshape(-1,
    *image_shape) are the images. digests: SHA-256 of each file read. scale: how x and x_test
    were standardised; None where they hold the values of the file. notes: what a user should
    know, such as that a part of the files is missing.

    Where x holds tokens, it is of integers below `vocabulary`. x_valid, y_valid: a third set.
    perplexity: the loss is that of a language model. evaluated: examples evaluated at once.
    """

    name: str
    x: Floats | Images = field(repr=False)
    y: Array = field(repr=False)
    x_test: Floats | Images | None = field(repr=False)
    y_test: Array | None = field(repr=False)
    classes: int | None
    image_shape: tuple[int, int, int] | None
    digests: dict[str, str] = field(repr=False)
    scale: Scale | Channels | None
    notes: tuple[str, ...] = ()
    vocabulary: int | None = None
    x_valid: Array | None = field(default=None, repr=False)
    y_valid: Array | None = field(default=None, repr=False)

    perplexity: ClassVar[bool] = False

    @property
    def evaluated(self) -> int:
        """How many examples are evaluated at once, at most."""
        return 1000

    def arranged(self, batch_size: int) -> Dataset:
        """The data set as batches are taken from it: text is cut into that many streams."""
        return self

    def sampler(self, batch_size: int, seed: int) -> Sampler:
        """Which examples of the arranged data set make up the batch of a step."""
        return Sampler(len(self.x), batch_size, seed)

    @property
    def outputs(self) -> int:
        """What a model must return for one example: a value a class, or a value a target."""
        return self.classes or int(np.prod(self.y.shape[1:], dtype=np.int64))

    def images(self, augment: str = "none") -> Images | None:
        """The training images that are made batch by batch; None where x is used as it lies.

        Raises Error where the examples are not images and `augment` asks for crops.
        """
        if augment not in AUGMENTS:
            raise Error(f"unknown augment {augment!r}; use one of {', '.join(AUGMENTS)}")
        if isinstance(self.x, Images):
            found: Images | None = self.x
        elif augment == "none":
            return None
        elif self.image_shape is None:
            raise Error(f"augment {augment} needs images; the examples of {self.name} are not")
        else:
            found = self._as_images(self.x, self.image_shape)
        if augment == "imagenet" and not isinstance(found, folder.Files):
            raise Error("augment imagenet needs a folder of images; use crop-flip for this data")
        return found

    def _as_images(self, x: Floats, shape: tuple[int, int, int]) -> Images:
        """Standardised rows as images; a padded pixel is what the value 0 of the file became."""
        fill = self.scale(np.zeros((1, 1, 1, 1), np.uint8)).item() if self.scale else 0.0
        return Stored(x.reshape(-1, *shape), as_they_are, fill)


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
    from npdrt.data import squad, text  # which make data sets themselves

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
