"""Random crops and flips, from npdrt's own random numbers.

Every example has one random word in each epoch: word number i of Random(seed, "data/augment",
epoch) for example i. The image that a network sees depends on that word and the stored image only:
not on the batch size, the device, the number of ranks, a resumed run, or batches made ahead.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np

from npdrt.arrays import namespace
from npdrt.data.scale import Array
from npdrt.random import Random

AUGMENTS = ("none", "flip", "crop-flip", "imagenet", "imagenet-jitter")
PAD = 4

Words = np.ndarray[Any, np.dtype[np.uint64]]
Box = tuple[int, int, int, int]  # left, top, right, bottom

_SHIFTS = 2 * PAD + 1
_ATTEMPTS = 10
_AREA = (0.08, 1.0)
_LOG_RATIO = 0.28768207245178093  # log(4/3): the sides' ratio lies between 3/4 and 4/3
JITTER = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.2}


def words(seed: int, epoch: int, n: int, indices: Array) -> Words:
    """The random words of examples `indices`, out of `n`, in an epoch."""
    return _epoch(seed, epoch, n)[indices]  # (indices,)


@lru_cache(maxsize=4)
def _epoch(seed: int, epoch: int, n: int) -> Words:
    return Random(seed, "data/augment", epoch).words(n)


def crop_flip(images: Array, keys: Words, fill: float = 0.0) -> Array:
    """Images (N, C, H, W), padded, cropped at a random place, and mirrored with probability 1/2.

    The border has PAD pixels of value `fill`; an image keeps its size. keys: one random word for
    each image. Its upper 32 bits, times 162 and shifted down by 32, number the 81 places and the 2
    flips; no probability differs from 1/162 by more than 2**-32. The same as torchvision's
    RandomCrop(size, padding=4) and RandomHorizontalFlip, but with other random numbers.
    """
    n, channels, height, width = images.shape
    choice = (keys >> np.uint64(32)) * np.uint64(2 * _SHIFTS**2) >> np.uint64(32)
    place, flip = np.divmod(choice.astype(np.int64), 2)  # (n,)
    down, right = np.divmod(place, _SHIFTS)
    padded = np.full((n, channels, height + 2 * PAD, width + 2 * PAD), fill, images.dtype)
    padded[:, :, PAD:-PAD, PAD:-PAD] = images
    windows = np.lib.stride_tricks.sliding_window_view(padded, (height, width), (2, 3))
    out: Array = windows[np.arange(n), :, down, right]  # (n, channels, height, width)
    mirrored = flip.astype(bool)
    out[mirrored] = out[mirrored, :, :, ::-1]
    return out


def augmented(images: Array, augment: str, keys: Words | None, fill: float = 0.0) -> Array:
    """Images as flip or crop-flip changes them; as they are without keys, or by another name."""
    if keys is None or augment not in ("flip", "crop-flip"):
        return images
    return flip(images, keys) if augment == "flip" else crop_flip(images, keys, fill)


def flip(images: Array, keys: Words) -> Array:
    """Images (N, C, H, W), each mirrored with probability 1/2: where the highest bit of its random
    word is set. The same as torchvision's RandomHorizontalFlip, with other random numbers."""
    mirrored = (keys >> np.uint64(63)).astype(bool)  # (N,)
    out = images.copy()
    out[mirrored] = images[mirrored, :, :, ::-1]
    return out


def crop_flip_by_index(images: Any, indices: Any, keys: Any, fill: float = 0.0) -> Any:
    """`crop_flip(images[indices], keys, fill)`, bit for bit, by array calls that CuPy has too.

    images (N, C, H, W), indices (n,) and keys (n,) belong to one library and device; no number is
    read on the host. For NumPy `crop_flip` is faster.
    """
    xp, (_, channels, height, width) = namespace(images, indices, keys), images.shape
    choice = xp.astype((keys >> 32) * (2 * _SHIFTS**2) >> 32, xp.int64)
    place, flip = xp.reshape(choice // 2, (-1, 1)), xp.reshape(choice % 2 == 1, (-1, 1))
    column = xp.reshape(xp.arange(width, dtype=xp.int64), (1, -1))
    column = xp.where(flip, width - 1 - column, column) + place % _SHIFTS - PAD  # (n, W)
    row = xp.reshape(xp.arange(height, dtype=xp.int64), (1, -1)) + place // _SHIFTS - PAD  # (n, H)
    row, column = row[:, None, :, None], column[:, None, None, :]
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)  # (n, 1, H, W)
    plane = xp.reshape(indices, (-1, 1)) * channels + xp.arange(channels, dtype=xp.int64)  # (n, C)
    start = (plane * (height * width))[:, :, None, None]
    pixel = xp.clip(row, 0, height - 1) * width + xp.clip(column, 0, width - 1)
    values = xp.take(xp.reshape(images, (-1,)), xp.reshape(start + pixel, (-1,)), axis=0)
    values = xp.reshape(values, (-1, channels, height, width))
    return xp.where(inside, values, xp.full((), fill, dtype=images.dtype))


def random_resized_crop(key: int, width: int, height: int) -> tuple[Box, bool]:
    """The box to cut out of an image before it is resized, and whether to mirror it.

    The box has 0.08 to 1 of the area, a ratio of its sides between 3/4 and 4/3 (uniform on a
    logarithmic scale), and lies anywhere in the image; after ten boxes that do not fit, it is the
    largest one in the middle. The same as torchvision's RandomResizedCrop, but with the numbers of
    the stream of `key`: the first is the flip, then area, ratio, top and left of each attempt. It
    uses only + - * / and sqrt, so that the box is the same on every machine.
    """
    numbers = Random(key, "data/augment/imagenet").uniform(1 + 4 * _ATTEMPTS)
    flip = bool(numbers[0] < 0.5)
    for area, ratio, top, left in numbers[1:].reshape(_ATTEMPTS, 4).tolist():
        target = width * height * (_AREA[0] + (_AREA[1] - _AREA[0]) * area)
        aspect = _exp((2.0 * ratio - 1.0) * _LOG_RATIO)
        w, h = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if 0 < w <= width and 0 < h <= height:
            x, y = int(left * (width - w + 1)), int(top * (height - h + 1))
            return (x, y, x + w, y + h), flip
    return _middle(width, height), flip


def color_jitter(key: int) -> list[tuple[str, float]]:
    """The changes of colour of an image, in their random order, and the amount of each.

    Brightness, contrast and saturation change by a factor within 1 - 0.4 and 1 + 0.4, the hue by
    -0.2 to 0.2 turns, all uniform. The same as torchvision's ColorJitter(0.4, 0.4, 0.4, 0.2), which
    draws an order of the four and an amount of each; but with the numbers of the stream of `key`:
    first the four amounts, then four numbers whose order is that of the changes.
    """
    numbers = Random(key, "data/augment/jitter").uniform(2 * len(JITTER))
    amounts, places = numbers.reshape(2, -1)
    changes = [
        (name, most * (2.0 * u - 1.0) + (name != "hue"))
        for (name, most), u in zip(JITTER.items(), amounts.tolist(), strict=True)
    ]
    return [changes[i] for i in np.argsort(places, kind="stable")]


def _middle(width: int, height: int) -> Box:
    """The largest part in the middle with a ratio between 3/4 and 4/3."""
    w, h = width, height
    if width / height < 3 / 4:
        h = round(width / (3 / 4))
    elif width / height > 4 / 3:
        w = round(height * (4 / 3))
    x, y = (width - w) // 2, (height - h) // 2
    return x, y, x + w, y + h


def _exp(x: float) -> float:
    """exp x for |x| <= 0.3, to about 2**-52: the series up to x**13 / 13!."""
    total = 1.0
    for n in range(13, 0, -1):
        total = 1.0 + x / n * total
    return total
