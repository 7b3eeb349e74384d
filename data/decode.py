"""From a JPEG or PNG file to the pixels that a network is given, with Pillow (extra `data`).

Whatever is in a file becomes RGB, as in torchvision: grey, CMYK, a palette. The orientation in its
EXIF data is ignored. The content tells JPEG from PNG, not the name: one of ImageNet's .JPEG files
is a PNG. Files are decoded at their full size: Pillow's `draft`, which decodes at a half or a
quarter, would give other pixels than torchvision, and saves little (benchmarks/README.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from npdrt.data.augment import color_jitter, random_resized_crop
from npdrt.data.bounded import opened
from npdrt.data.scale import Array
from npdrt.errors import FileRefused, Unavailable

_FORMATS = ("JPEG", "PNG")
_MOST_PIXELS = 1 << 26  # of one file; ImageNet's largest has 61 million
_MOST_RATIO = 256  # of one side to the other


class Picture(NamedTuple):
    """An image of a batch: its file, the pixels of a side, and how it is cut.

    key: its random word, for a random part that is resized and perhaps mirrored; None for the
    middle. jitter: whether its colours change too, by the same word.
    """

    path: str
    size: int
    key: int | None = None
    jitter: bool = False


def here(pictures: Sequence[Picture]) -> Array:
    """The pixels of some pictures of one size, decoded in this process; bytes (n, 3, size, size).

    Raises `FileRefused` for the first one that is not a whole image.
    """
    size = pictures[0].size if pictures else 0
    out = np.empty((len(pictures), 3, size, size), np.uint8)
    for row, picture in enumerate(pictures):
        out[row] = pixels(picture)
    return out


def pixels(picture: Picture) -> Array:
    """The pixels of a picture; bytes (3, size, size)."""
    image = decode(picture.path)
    if picture.key is None:
        image = middle(image, picture.size)
    else:
        image = cut(image, picture.size, picture.key)
        image = jittered(image, picture.key) if picture.jitter else image
    return np.asarray(image).transpose(2, 0, 1)


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
            image.load()
            return image if image.mode == "RGB" else _eight_bits(image).convert("RGB")
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


def jittered(image: Any, key: int) -> Any:
    """ColorJitter(0.4, 0.4, 0.4, 0.2) of an RGB image, by its random word
    (`npdrt.data.augment.color_jitter`): each change rounds to bytes before the next."""
    for name, amount in color_jitter(key):
        image = CHANGES[name](image, amount)
    return image


def brightness(image: Any, factor: float) -> Any:
    """factor x, clipped to [0, 255] and cut to an integer."""
    return _blended(pillow().new("RGB", image.size), image, factor)


def contrast(image: Any, factor: float) -> Any:
    """m + factor (x - m), where m is the mean of the grey image, rounded."""
    counts = np.array(image.convert("L").histogram())
    mean = int(counts @ np.arange(256) / counts.sum() + 0.5)
    return _blended(pillow().new("RGB", image.size, (mean,) * 3), image, factor)


def saturation(image: Any, factor: float) -> Any:
    """g + factor (x - g), where g = (19595 r + 38470 g + 7471 b + 32768) / 2^16 is grey."""
    return _blended(image.convert("L").convert("RGB"), image, factor)


def hue(image: Any, turns: float) -> Any:
    """The hue in HSV, a byte, plus the whole part of 255 turns, modulo 256."""
    shifted = [(value + int(turns * 255)) % 256 for value in range(256)]
    return image.convert("HSV").point([*shifted, *range(256), *range(256)]).convert("RGB")


def _blended(other: Any, image: Any, factor: float) -> Any:
    return pillow().blend(other, image, factor)


CHANGES = {"brightness": brightness, "contrast": contrast, "saturation": saturation, "hue": hue}
