"""Images that a trained generator makes, in grids and one by one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from npdrt import store
from npdrt.arrays import Device, Params, namespace, quiet, to_device, to_host
from npdrt.errors import Error
from npdrt.random import Random
from npdrt.store import container
from npdrt.train.config import stored, stored_model

COLUMNS = 10  # images of a class in the grids of a run
ROWS = 10  # classes, the first


@dataclass(frozen=True)
class Generator:
    """A model with `generate`, its arrays on a device, and the seed of its run."""

    model: Any
    params: Params
    buffers: Params
    seed: int

    def images(self, numbers: Sequence[int]) -> Any:
        """Images by number in evaluation mode, bytes (n, C, S, S). The classes take turns; the
        noise of an image depends on the run's seed and the number alone."""
        noise = [to_host(self.model.noise(Random(self.seed, "images", i), 1)) for i in numbers]
        labels = np.asarray([i % self.model.outputs for i in numbers], np.int64)
        xp = namespace(*self.params.values())
        given = xp.asarray(np.concatenate(noise)), xp.asarray(labels)
        return _generated(self.model, self.params, self.buffers, *given)


def generator(run: Path, device: Device, code: Sequence[Path] = ()) -> Generator:
    """The generator in a run directory, checkpoint or snapshot. Raises `Error` if there is none.

    code: files of the user's that may be run, for the model of a run that has its own.
    """
    file = container.within(run, "checkpoint.h5")
    if not file.exists():
        raise Error(f"{file} does not exist; give a run directory, a checkpoint or a snapshot")
    checkpoint = store.load(file)
    config = stored(checkpoint.meta, file, code=code)
    model = stored_model(config)
    if not hasattr(model, "generate"):
        raise Error(f"{file}: {config.model} makes no images; give a run of a model like gan")
    params, buffers = (
        {name: to_device(value, device) for name, value in group.items()}
        for group in (checkpoint.params, checkpoint.buffers)
    )
    return Generator(model, params, buffers, config.seed)


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
        rows.append(_generated(model, params, buffers, noise, labels))  # (columns, C, S, S)
    tiles = np.stack(rows).transpose(0, 3, 1, 4, 2)  # (rows, S, columns, S, C)
    return tiles.reshape(tiles.shape[0] * tiles.shape[1], -1, tiles.shape[-1])


def _generated(model: Any, params: Params, buffers: Params, noise: Any, labels: Any) -> Any:
    """Images in evaluation mode on the host, bytes (N, C, S, S)."""
    with quiet():
        images, _ = model.generate(params, buffers, noise, labels)
    return as_bytes(to_host(images))


def as_bytes(images: Any) -> Any:
    """Images as bytes: [-1, 1] becomes 0 to 255."""
    return np.rint((np.clip(images, -1.0, 1.0) + 1.0) * 127.5).astype(np.uint8)
