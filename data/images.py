"""Images that become floats when they are asked for, and not before."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from npdrt.data.augment import Words, augmented
from npdrt.data.decoders import Decoders
from npdrt.data.scale import Array, Floats
from npdrt.errors import Error

Scaling = Callable[[Array], Floats]


class Images(ABC):
    """Images (N, C, H, W) that are read, cropped and standardised a batch at a time.

    An index (a number, a slice or an array of numbers) gives float32 arrays as evaluation uses
    them; `batch` also gives augmented ones, for training. augments: the possible augmentations.
    """

    shape: tuple[int, int, int, int]
    augments: ClassVar[tuple[str, ...]] = ("none", "flip", "crop-flip")
    dtype = np.dtype(np.float32)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any) -> Floats:
        chosen, *rest = key if isinstance(key, tuple) else (key,)
        if chosen is ... or any(part is not ... for part in rest):
            raise Error(f"images: expected an index of the first axis alone; got {key}")
        rows = np.arange(len(self))[chosen]
        out = self.batch(np.atleast_1d(rows))
        return out if rows.ndim else out[0]

    def check(self, augment: str) -> None:
        """Raise Error unless these images can be augmented in this way."""
        if augment not in self.augments:
            raise Error(f"augment {augment} needs a folder of images; use crop-flip for this data")

    def decoded_by(self, decoders: Decoders) -> Images:
        """These images, whose files `decoders` decode; those in memory have none."""
        return self

    @abstractmethod
    def batch(self, indices: Array, augment: str = "none", keys: Words | None = None) -> Floats:
        """The images `indices`; keys: their random words (`npdrt.data.augment`)."""


@dataclass(frozen=True, eq=False)
class Stored(Images):
    """Images in memory, as the file stores them: one byte for each value instead of four.

    scale: applied to the values of a batch. fill: the stored value of a padded pixel.
    """

    raw: Array = field(repr=False)
    scale: Scaling
    fill: float = 0.0

    @property
    def shape(self) -> tuple[int, int, int, int]:  # type: ignore[override]
        """(images, channels, height, width)."""
        n, channels, height, width = self.raw.shape
        return n, channels, height, width

    def batch(self, indices: Array, augment: str = "none", keys: Words | None = None) -> Floats:
        """Images `indices`, standardised; augment: none, flip or crop-flip."""
        self.check(augment)
        return self.scale(augmented(self.raw[indices], augment, keys, self.fill))


def unscaled(x: Array) -> Floats:
    """The scale of values that are already standardised."""
    return x
