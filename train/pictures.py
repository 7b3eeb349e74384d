"""Grids of images that a generator makes of fixed noise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from npdrt.arrays import Params, namespace, quiet, to_host
from npdrt.random import Random

COLUMNS = 10  # images of a class in the grids of a run
ROWS = 10  # classes, the first


def grid(
    model: Any, params: Params, buffers: Params, classes: Sequence[int], columns: int, seed: int
) -> Any:
    """Images in evaluation mode as uint8 pixels (height, width, channels), a row for each class.

    The noise of a row depends on the seed and the class alone, so that a row is the same in every
    grid of a checkpoint, and rows of two checkpoints can be compared.
    """
    xp, rows = namespace(*params.values()), []
    for label in classes:
        noise = model.noise(Random(seed, "samples", label), columns)
        labels = xp.asarray(np.full(columns, label, np.int64))
        with quiet():
            images, _ = model.generate(params, buffers, noise, labels)  # (columns, C, S, S)
        rows.append(_bytes(to_host(images)))
    tiles = np.stack(rows).transpose(0, 3, 1, 4, 2)  # (rows, S, columns, S, C)
    return tiles.reshape(tiles.shape[0] * tiles.shape[1], -1, tiles.shape[-1])


def _bytes(images: Any) -> Any:
    """Values in [-1, 1] as 0 to 255."""
    return np.rint((np.clip(images, -1.0, 1.0) + 1.0) * 127.5).astype(np.uint8)
