"""A made-up folder in the layout of ImageNet: 1,000 classes of a few small JPEG files each.

An image has stripes of two colours; the digits of the class decide their colours, distance and
direction, and random numbers their place, the size of the image and its noise. As in ImageNet, a
few files are grey, one is CMYK, and one .JPEG file is a PNG. With one version of Pillow every
machine draws the same bytes.
"""

from __future__ import annotations

import io
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from npdrt.data.decode import pillow
from npdrt.data.scale import Array
from npdrt.random import Random

NAME = "sample-imagenet"
CLASSES = 1000
IMAGES = {"train": 2, "val": 2}  # of a class
QUALITY = 80
GREY, CMYK, PNG = 100, 1, 2  # every 100th class has a grey image; the classes of the other two
SIDES = 40, 24  # the least side in pixels, and how many sizes there are


def make(root: Path) -> None:
    """Draw the folder `root`: 4,000 files, 24 MB on the disk. It appears whole or not at all."""
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=root.parent) as work:
        whole = Path(work) / "whole"
        for part, count in IMAGES.items():
            for label in range(CLASSES):
                _draw_class(whole / part / f"n{label:08d}", part, label, count)
        try:
            whole.rename(root)
        except OSError:
            if not (root / "train").is_dir():  # else another process has drawn it meanwhile
                raise


def _draw_class(folder: Path, part: str, label: int, count: int) -> None:
    folder.mkdir(parents=True)
    for number in range(count):
        random = Random(label, f"sample/images/{part}", number)
        content = encoded(pixels(label, random), label if part == "train" and not number else -1)
        (folder / f"{folder.name}_{number}.JPEG").write_bytes(content)


def pixels(label: int, random: Random) -> Array:
    """An image of a class, bytes (height, width, 3)."""
    drawn = random.of("shape").words(4)
    sizes = np.uint64(SIDES[0]) + drawn[:2] % np.uint64(SIDES[1])
    height, width = sizes.tolist()
    y, x = np.mgrid[:height, :width] + drawn[2:].astype(np.int64).reshape(2, 1, 1) % 64
    hundreds, tens, units = label // 100, label // 10 % 10, label % 10
    along = x * (units - 4) + y * (9 - units)  # the direction of the stripes
    stripe = along // (10 + 8 * (tens % 5)) % 2  # (height, width)
    colours = np.array([_colour(hundreds), _colour(hundreds + 3 + tens // 5)])
    noise = random.of("noise").words(height * width).view(np.uint8)[: height * width * 3] % 32
    out: Array = (colours[stripe] + noise.reshape(height, width, 3)).astype(np.uint8)
    return out


def _colour(number: int) -> tuple[int, int, int]:
    """One of ten colours that stay apart when their hue and brightness change a little."""
    return 20 + number * 67 % 200, 20 + number * 113 % 200, 20 + number * 29 % 200


def encoded(image: Array, label: int) -> bytes:
    """The file of an image. label: of a class whose first image may be of another kind, else -1."""
    picture: Any = pillow().fromarray(image)
    if label == CMYK or (label >= 0 and label % GREY == 0):
        picture = picture.convert("CMYK" if label == CMYK else "L")
    out = io.BytesIO()
    picture.save(out, "PNG" if label == PNG else "JPEG", quality=QUALITY)
    return out.getvalue()
