"""The type of every data set: examples and what to predict from them, in host memory."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from npdrt.data.augment import AUGMENTS
from npdrt.data.images import Images, Stored, unscaled
from npdrt.data.sampler import Sampler
from npdrt.data.scale import Array, Channels, Floats, Scale
from npdrt.errors import Error


@dataclass(frozen=True, eq=False)
class Dataset:
    """Examples and what to predict from them, as NumPy arrays in host memory.

    x: float32, (N, features) or (N, ...). For large images it is `npdrt.data.images.Images`, which
    holds bytes or names of files, and whose slices are such arrays. If x holds tokens, they are
    integers below `vocabulary`. y: int64 labels (N,), or float32 targets (N,) or (N, ...). x_test,
    y_test: the test set, or None. x_valid, y_valid: the validation set, or None.
    classes: the labels are 0 .. classes-1; None for targets. image_shape: (channels, height,
    width) if an example is an image: x.reshape(-1, *image_shape) are the images. digests: SHA-256
    of each file that was read. scale: the standardisation of x and x_test; None if they have the
    values of the file. notes: warnings for the user, for example that some files are missing.
    perplexity: whether the log has exp(loss) too, as for language models.
    """

    name: str
    x: Floats | Images = field(repr=False)
    y: Array = field(repr=False)
    x_test: Floats | Images | None = field(default=None, repr=False)
    y_test: Array | None = field(default=None, repr=False)
    classes: int | None = None
    image_shape: tuple[int, int, int] | None = None
    digests: dict[str, str] = field(default_factory=dict, repr=False)
    scale: Scale | Channels | None = None
    notes: tuple[str, ...] = ()
    vocabulary: int | None = None
    x_valid: Array | Images | None = field(default=None, repr=False)
    y_valid: Array | None = field(default=None, repr=False)

    perplexity: ClassVar[bool] = False

    @property
    def evaluation_batch_size(self) -> int:
        """The largest number of examples in a batch of an evaluation."""
        return 1000

    def as_streams_for(self, batch_size: int) -> Dataset:
        """The data set as batches of this size are taken from it: text in `batch_size` streams, any
        other data set as it is."""
        return self

    def sampler(self, batch_size: int, seed: int) -> Sampler:
        """Which examples are in the batch of a step; call it on what `as_streams_for` returns."""
        return Sampler(len(self.x), batch_size, seed)

    @property
    def outputs(self) -> int:
        """The size of a model's output for one example: one value for each class or target."""
        return self.classes or int(np.prod(self.y.shape[1:], dtype=np.int64))

    def images(self, augment: str = "none") -> Images | None:
        """The training images if they are made batch by batch; None if x is used as it is.

        Raises Error if `augment` asks for crops and the examples are not images.
        """
        if augment not in AUGMENTS:
            raise Error(f"unknown augment {augment!r}; use one of {', '.join(AUGMENTS)}")
        if isinstance(self.x, Images):
            found = self.x
        elif augment == "none":
            return None
        elif self.image_shape is None:
            raise Error(f"augment {augment} needs images; the examples of {self.name} are not")
        else:
            found = Stored(self.x.reshape(-1, *self.image_shape), unscaled, self.border)
        found.check(augment)
        return found

    @property
    def border(self) -> float:
        """The value of a pixel beyond the border of an image in x: the standardised value 0."""
        return self.scale(np.zeros((1, 1, 1, 1), np.uint8)).item() if self.scale else 0.0
