"""Images in one folder for each class: PATH/train/<class>/*.jpeg and PATH/val/<class>/*.jpeg.

This is the layout of ImageNet, and of torchvision's ImageFolder: the classes are the folders of
train, numbered in the order of their sorted names. Folders inside a class are searched too, links
included; files of other kinds are ignored. Pillow (extra `data`) decodes a file when a batch needs
it, and makes it RGB; the orientation in its EXIF data is ignored, as torchvision does. The content
tells JPEG from PNG, not the name: one of ImageNet's .JPEG files is a PNG.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from npdrt import regular
from npdrt.data.augment import AUGMENTS, Words, augmented, random_resized_crop
from npdrt.data.bounded import opened
from npdrt.data.dataset import Dataset
from npdrt.data.images import Images, Scaling
from npdrt.data.scale import Array, Floats, Scale, choose, from_constants, usual_names
from npdrt.errors import Error, FileRefused, Unavailable

SIZE = 224  # pixels of a side, unless the name says otherwise
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # of ImageNet, as in torchvision

_NAME = re.compile(r"folder(?:-([1-9]\d{0,3}))?:(.+)", re.DOTALL)
_SUFFIXES = (".jpeg", ".jpg", ".png")
_FORMATS = ("JPEG", "PNG")
_MOST_PIXELS = 1 << 26  # of one file; ImageNet's largest has 61 million
_MOST_RATIO = 256  # of one side to the other


@dataclass(frozen=True)
class Part:
    """The training or the validation set: its files and labels, and a digest of names and sizes."""

    root: Path
    classes: tuple[str, ...]
    paths: Sequence[str] = field(repr=False)
    labels: Array = field(repr=False)
    digest: str


def named(name: str) -> bool:
    """Whether a data set's name is "folder:PATH" or "folder-SIZE:PATH"."""
    return name.startswith(("folder:", "folder-"))


def parse(name: str) -> tuple[int, Path]:
    """Size and path in such a name; Error if it has another form."""
    match = _NAME.fullmatch(name)
    if match is None:
        raise Error(f"{name}: expected folder:PATH, or folder-64:PATH for images of 64x64")
    return int(match[1] or SIZE), Path(match[2])


def read(name: str) -> dict[str, Part]:
    """The parts of the folder in `name`: "train", and "val" if there is one.

    Lists the files and reads none. Raises Error if there is no such folder, FileRefused if one is
    empty or cannot be listed, train has only one class, or val has a class that train lacks.
    """
    root = parse(name)[1]
    regular.require(root, "directory")
    if not (root / "train").is_dir():
        raise Error(f"{root}: expected a folder with train/<class>/*.jpeg inside")
    pillow()
    parts = {"train": _part(root / "train", None)}
    if len(parts["train"].classes) < 2:
        found = ", ".join(parts["train"].classes) or "none"
        raise FileRefused(f"{root / 'train'}: expected two class folders or more; found {found}")
    if (root / "val").is_dir():
        parts["val"] = _part(root / "val", parts["train"].classes)
    return parts


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
        raise FileRefused(f"{root}: expected class folders with images; found none")
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


# Decoding


def pillow() -> Any:
    """Pillow's module Image; Unavailable if it is not installed."""
    try:
        from PIL import Image
    except ImportError as error:
        raise Unavailable(
            'folders of images need Pillow, of the extra "data": pip install "npdrt[data]"'
        ) from error
    return Image


def decode(path: str) -> Any:
    """The image in a file, as Pillow's RGB image; FileRefused if it is not whole."""
    library = pillow()
    try:
        with opened(Path(path)) as stream, library.open(stream, formats=_FORMATS) as image:
            if image.width * image.height > _MOST_PIXELS:
                raise ValueError(f"{image.width}x{image.height} pixels; at most {_MOST_PIXELS}")
            if max(image.size) > _MOST_RATIO * min(image.size):  # it would grow when resized
                raise ValueError(f"{image.width}x{image.height} pixels; sides 1 to {_MOST_RATIO}")
            return _eight_bits(image).convert("RGB")
    except (MemoryError, FileRefused, Warning):  # a warning, under -W error, is not damage
        raise
    except Exception as error:  # Pillow's decoders raise many kinds for damaged files
        why = getattr(error, "strerror", None) or error
        raise FileRefused(f"{path}: expected a whole JPEG or PNG image: {why}") from error


def _eight_bits(image: Any) -> Any:
    """16-bit grey as 8-bit grey; Pillow's own conversion clips at 255."""
    if not image.mode.startswith("I"):
        return image
    return pillow().fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8))


def refused(paths: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The files that cannot be decoded, each with the reason; reads all of them."""
    for path in paths:
        try:
            decode(path)
        except FileRefused as error:
            yield path, str(error).removeprefix(f"{path}: ")


def middle(image: Any, size: int) -> Any:
    """The image with its short side resized to 8/7 of `size`, then cropped to the middle square.

    For 224 these are torchvision's Resize(256) and CenterCrop(224).
    """
    short, (w, h) = round(size * 8 / 7), image.size
    new = (short, int(short * h / w)) if w <= h else (int(short * w / h), short)
    if new != image.size:
        image = image.resize(new, pillow().Resampling.BILINEAR)
    left, top = round((new[0] - size) / 2.0), round((new[1] - size) / 2.0)
    return image.crop((left, top, left + size, top + size))


def cut(image: Any, size: int, key: int) -> Any:
    """RandomResizedCrop and RandomHorizontalFlip of an image, by its random word."""
    box, flip = random_resized_crop(key, *image.size)
    image = image.crop(box).resize((size, size), pillow().Resampling.BILINEAR)
    return image.transpose(pillow().Transpose.FLIP_LEFT_RIGHT) if flip else image


@dataclass(frozen=True, eq=False)
class Files(Images):
    """Images in files, decoded when they are asked for. size: pixels of a side."""

    paths: Sequence[str] = field(repr=False)
    size: int
    scale: Scaling

    augments = AUGMENTS

    @property
    def shape(self) -> tuple[int, int, int, int]:  # type: ignore[override]
        """(images, channels, height, width)."""
        return len(self.paths), 3, self.size, self.size

    def batch(self, indices: Array, augment: str = "none", keys: Words | None = None) -> Floats:
        """Images `indices`, decoded, cut and standardised."""
        raw = np.empty((len(indices), *self.shape[1:]), np.uint8)
        for row, index in enumerate(indices.tolist()):
            image = decode(self.paths[index])
            if augment == "imagenet" and keys is not None:
                image = cut(image, self.size, int(keys[row]))
            else:
                image = middle(image, self.size)
            raw[row] = np.asarray(image).transpose(2, 0, 1)
        return self.scale(augmented(raw, augment, keys))


# The data set


def load(name: str, standardise: bool | str) -> Dataset:
    """The data set of "folder:PATH"; its images are decoded a batch at a time."""
    usual = from_constants(255.0, MEAN, STD)
    scale = choose(standardise, usual, usual_names(255.0), "a folder")
    size, parts = parse(name)[0], read(name)
    train, val = parts["train"], parts.get("val")
    return Dataset(
        name,
        x=Files(train.paths, size, scale or Scale()),
        y=train.labels,
        x_test=Files(val.paths, size, scale or Scale()) if val else None,
        y_test=val.labels if val else None,
        classes=len(train.classes),
        image_shape=(3, size, size),
        digests={f"{part}/": found.digest for part, found in parts.items()},
        scale=scale,
    )
