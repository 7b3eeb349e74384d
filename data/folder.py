"""Images in one folder for each class: PATH/train/<class>/*.jpeg and PATH/val/<class>/*.jpeg.

This is the layout of ImageNet, and of torchvision's ImageFolder: the classes are the folders of
train, numbered in the order of their sorted names. Folders inside a class are searched too, links
included; files of other kinds are ignored. A file is decoded when a batch needs it
(`npdrt.data.decode`).

Some sets have names: imagenet, imagenette and sample-imagenet lie in the folder of that name, next
to other data sets. All of their classes must be there, and the images of val are split as in the
Fromage experiments: those with even numbers are the validation set, the others the test set.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from npdrt import regular
from npdrt.data import decode
from npdrt.data.augment import AUGMENTS, Words, augmented
from npdrt.data.dataset import Dataset
from npdrt.data.decode import Picture, pillow
from npdrt.data.decoders import Decoders
from npdrt.data.images import Images, Scaling
from npdrt.data.scale import (
    Array,
    Floats,
    Scale,
    Standardise,
    choose,
    from_constants,
    usual_names,
)
from npdrt.errors import Error, FileRefused
from npdrt.plain import several

SIZE = 224  # pixels of a side, unless the name says otherwise
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # of ImageNet, as in torchvision
CLASSES = {"imagenet": 1000, "imagenette": 10, "sample-imagenet": 1000}  # of the sets with names

_NAME = re.compile(rf"(folder|{'|'.join(CLASSES)})(?:-([1-9]\d{{0,3}}))?(?::(.+))?", re.DOTALL)
_SUFFIXES = (".jpeg", ".jpg", ".png")


class Name(NamedTuple):
    """The parts of a name: the set, or "" for the user's own folder; pixels of a side; the folder,
    None if it is where data sets lie."""

    set: str
    size: int
    path: Path | None


@dataclass(frozen=True)
class Part:
    """The training or the validation set: its files and labels, and a digest of names and sizes."""

    root: Path
    classes: tuple[str, ...]
    paths: Sequence[str] = field(repr=False)
    labels: Array = field(repr=False)
    digest: str


def named(name: str) -> bool:
    """Whether a data set is a folder of images: "folder:PATH", "folder-64:PATH", "imagenet", ..."""
    return name.startswith(("folder:", "folder-")) or _parts(name) is not None


def parse(name: str) -> Name:
    """The parts of such a name; Error if it has another form."""
    found = _parts(name)
    if found is None:
        raise Error(f"{name}: expected folder:PATH, or folder-64:PATH for images of 64x64")
    return found


def _parts(name: str) -> Name | None:
    match = _NAME.fullmatch(name)
    if match is None or (match[1] == "folder") != bool(match[3]):  # only a folder has a path
        return None
    path = Path(match[3]) if match[3] else None
    return Name("" if path else match[1], int(match[2] or SIZE), path)


def read(name: str, root: Path) -> dict[str, Part]:
    """The parts of the folder `root`: "train", and "val" if there is one.

    Lists the files and reads none. Raises Error if there is no such folder, FileRefused if one is
    empty or cannot be listed, train has only one class, or val has a class that train lacks; for a
    set with a name also if val or a class is missing.
    """
    regular.require(root, "directory")
    if not (root / "train").is_dir():
        raise Error(f"{root}: expected a folder with train/<class>/*.jpeg inside")
    pillow()
    parts = {"train": _part(root / "train", None)}
    classes = parts["train"].classes
    if len(classes) < 2:
        found = ", ".join(classes) or "none"
        raise FileRefused(f"{root / 'train'}: expected two class folders or more; found {found}")
    if (root / "val").is_dir():
        parts["val"] = _part(root / "val", classes)
    if known := parse(name).set:
        _require_whole(root, known, classes)
    return parts


def _require_whole(root: Path, known: str, classes: Sequence[str]) -> None:
    """Refuse a set with a name that lacks val or a class, as after half an unpacking."""
    if len(classes) != CLASSES[known]:
        raise FileRefused(
            f"{root / 'train'}: expected the {CLASSES[known]} class folders of {known}; found "
            f"{len(classes)}; unpack the archive again"
        )
    if not (root / "val").is_dir():
        raise FileRefused(f"{root}: expected a folder val next to train; found none")
    if missing := sorted(set(classes) - set(_classes(root / "val"))):
        raise FileRefused(
            f"{root / 'val'}: expected a folder for each class of train; missing: "
            f"{several(missing, 5)}"
        )


def _part(root: Path, classes: tuple[str, ...] | None) -> Part:
    """One set. classes: those of the training set; None if this is the training set."""
    names = _classes(root)
    if unknown := set(names) - set(classes or names):
        raise FileRefused(
            f"{root / min(unknown)}: expected a class of train; it has no such folder"
        )
    numbers = {name: number for number, name in enumerate(classes or names)}
    paths: list[str] = []
    labels: list[int] = []
    digest = hashlib.sha256()
    for name in names:
        files = files_in(root / name)
        paths += files
        labels += [numbers[name]] * len(files)
        for path in files:
            place = os.path.relpath(path, root).replace(os.sep, "/")
            digest.update(os.fsencode(f"{place}\t{_size(path)}\n"))
    if not paths:
        beside = sum(path.suffix.lower() in _SUFFIXES for path in root.iterdir())
        hint = f"; move its {beside} images into a folder for each class" if beside else ""
        raise FileRefused(f"{root}: expected class folders with images; found none{hint}")
    return Part(root, classes or names, paths, np.array(labels, np.int64), digest.hexdigest())


def _classes(root: Path) -> tuple[str, ...]:
    """The folders of a set, without hidden ones."""
    with regular.refusing(root), os.scandir(root) as entries:
        return tuple(sorted(e.name for e in entries if e.is_dir() and e.name[0] != "."))


def files_in(folder: Path) -> list[str]:
    """The images of a folder, a class, and of the folders in it, without hidden ones.

    They are sorted by folder, then by name. A folder that several links lead to is read once.
    """
    found: list[str] = []
    above: dict[str, tuple[str, ...]] = {}  # folder -> the real paths of it and of those above it
    seen: set[str] = set()
    for place, folders, names in os.walk(folder, onerror=_raise, followlinks=True):
        real = os.path.realpath(place)
        above[place] = (*above.get(str(Path(place).parent), ()), real)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if name[0] != ".")
        for name in folders:
            _refuse_loop(Path(place, name), above[place])
        images = (n for n in names if n[0] != "." and n.lower().endswith(_SUFFIXES))
        found += [f"{place}{os.sep}{name}" for name in sorted(images)]
    if not found:
        raise FileRefused(f"{folder}: expected images ({', '.join(_SUFFIXES)}); found none")
    return found


def _refuse_loop(folder: Path, above: Sequence[str]) -> None:
    """Refuse a link to one of the folders `above` it, or to a folder that has one of them in it."""
    if folder.is_symlink() and any(Path(p).is_relative_to(folder.resolve()) for p in above):
        raise FileRefused(f"{folder}: a link to a folder that it is in; remove it")


def _size(path: str) -> int:
    with regular.refusing(path):
        return Path(path).stat().st_size


def _raise(error: OSError) -> None:
    with regular.refusing(error.filename):
        raise error


@dataclass(frozen=True, eq=False)
class Files(Images):
    """Images in files, decoded when they are asked for. size: pixels of a side. decoded: makes the
    pixels of pictures, bytes (n, 3, size, size)."""

    paths: Sequence[str] = field(repr=False)
    size: int
    scale: Scaling
    decoded: Callable[[Sequence[Picture]], Array] = field(default=decode.here, repr=False)

    augments = AUGMENTS

    @property
    def shape(self) -> tuple[int, int, int, int]:  # type: ignore[override]
        """(images, channels, height, width)."""
        return len(self.paths), 3, self.size, self.size

    def decoded_by(self, decoders: Decoders) -> Files:
        """These images, decoded by some processes."""
        return replace(self, decoded=decoders)

    def batch(self, indices: Array, augment: str = "none", keys: Words | None = None) -> Floats:
        """Images `indices`, decoded, cut and standardised."""
        cut = keys is not None and augment.startswith("imagenet")
        chosen = keys.tolist() if cut and keys is not None else [None] * len(indices)
        jitter = augment == "imagenet-jitter"
        pictures = [
            Picture(self.paths[index], self.size, key, jitter)
            for index, key in zip(indices.tolist(), chosen, strict=True)
        ]
        raw = self.decoded(pictures).reshape(-1, *self.shape[1:])  # no picture has no size
        return self.scale(augmented(raw, augment, keys))


# The data set


def load(name: str, root: Path, standardise: Standardise) -> Dataset:
    """The data set in the folder `root`; its images are decoded a batch at a time."""
    usual = from_constants(255.0, MEAN, STD)
    scale = choose(standardise, usual, usual_names(255.0), "a folder")
    parsed, parts = parse(name), read(name, root)
    train, val = parts["train"], parts.get("val")
    files = Files(train.paths, parsed.size, scale or Scale())
    found = Dataset(
        name,
        x=files,
        y=train.labels,
        classes=len(train.classes),
        image_shape=(3, parsed.size, parsed.size),
        digests={f"{part}/": found.digest for part, found in parts.items()},
        scale=scale,
    )
    if val is None:
        return found
    x, y = replace(files, paths=val.paths), val.labels
    if not parsed.set:
        return replace(found, x_test=x, y_test=y)
    even, odd = slice(0, None, 2), slice(1, None, 2)
    return replace(
        found,
        x_valid=replace(x, paths=x.paths[even]),
        y_valid=y[even],
        x_test=replace(x, paths=x.paths[odd]),
        y_test=y[odd],
    )
