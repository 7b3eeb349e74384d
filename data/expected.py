"""What the model of a run expects of new data; a run keeps it in its checkpoints."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from npdrt import schema
from npdrt.data.dataset import Dataset
from npdrt.data.images import Images
from npdrt.data.raw import check_finite
from npdrt.data.scale import Array, Channels, Scale, constants, from_constants
from npdrt.errors import Error


@dataclass(frozen=True)
class Expected:
    """The form of a run's data.

    example: the shape of an example. outputs, classes, image_shape, vocabulary: see `Dataset`.
    scale: the standardisation; without one the values are used as they are.
    """

    example: tuple[int, ...]
    outputs: int
    classes: int | None
    image_shape: tuple[int, int, int] | None
    vocabulary: int | None
    scale: Scale | Channels

    @classmethod
    def of(cls, dataset: Dataset) -> Expected:
        """The form of that data set."""
        same = ("outputs", "classes", "image_shape", "vocabulary")
        known = {name: getattr(dataset, name) for name in same}
        return cls(tuple(dataset.x.shape[1:]), scale=dataset.scale or Scale(), **known)

    def as_dict(self) -> dict[str, Any]:
        """JSON values for a checkpoint."""
        return {**vars(self), "scale": constants(self.scale)}

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any], where: object) -> Expected:
        """What `as_dict` gave. Raises `FileRefused`, which names `where`, for anything else."""
        schema.check(stored, schema.Expected, where)
        image = stored["image_shape"]
        read = {"example": tuple(stored["example"]), "image_shape": image and tuple(image)}
        return cls(**{**stored, **read, "scale": from_constants(**stored["scale"])})

    def unlabelled(self, x: Any) -> Dataset:
        """Examples as a data set, standardised as the run's; its labels mean nothing.

        x: numbers (N, ...) in the units of the run's file, or tokens. Raises `Error` for examples
        of another shape.
        """
        x = np.asarray(x)
        if x.ndim < 2 or not len(x) or x.dtype.kind not in "iuf":
            raise Error(f"expected numbers of shape (examples, ...); got {x.dtype} {x.shape}")
        if self.vocabulary is None:
            x = self._standardised(x)
        y = np.zeros(len(x), np.int64) if self.classes else np.zeros((len(x), self.outputs), "f4")
        return self._known("x", x, y)

    def _standardised(self, x: Array) -> Array:
        size = int(np.prod(self.example))
        if int(np.prod(x.shape[1:])) != size:
            raise Error(f"the run's examples have shape {self.example}; got {x.shape[1:]}")
        check_finite(x, "x")
        scaled = self.scale(x.reshape(len(x), *self.example))
        check_finite(scaled, "x, standardised as the run's data")
        return scaled

    def _known(self, name: str, x: Array | Images, y: Array) -> Dataset:
        about: dict[str, Any] = {"classes": self.classes, "image_shape": self.image_shape}
        return Dataset(name, x, y, vocabulary=self.vocabulary, **about)

    def require(self, dataset: Dataset) -> Dataset:
        """A labelled data set with the run's classes. Raises `Error` for labels that the run does
        not know, or targets in their place."""
        if (dataset.classes is None) != (self.classes is None):
            kinds = ("labels", "targets") if dataset.classes is None else ("targets", "labels")
            raise Error(f"{dataset.name}: the run predicts {kinds[0]}, and its y are {kinds[1]}")
        if (dataset.classes or 0) > (self.classes or 0):
            raise Error(
                f"{dataset.name}: has labels up to {(dataset.classes or 0) - 1}; the run knows 0 "
                f"to {(self.classes or 0) - 1}"
            )
        return dataclasses.replace(dataset, classes=self.classes)
