"""The data of a run on its device, and the minibatch of any step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from npdrt.arrays import Array, Device, namespace, to_device
from npdrt.data import Ahead, Dataset, Decoders, Images
from npdrt.data.ahead import AHEAD
from npdrt.data.augment import crop_flip_by_index, words
from npdrt.models import Model
from npdrt.ops.embedding import check_tokens
from npdrt.train.config import Config, example_shape
from npdrt.train.limits import cores
from npdrt.train.shards import ALONE, Alone, bounds

WORTH_A_THREAD = 1 << 16  # values of a batch of images; handing over a smaller one costs more


@dataclass(frozen=True)
class OnDemand:
    """Images that are read on demand: x[start:stop, ...] is an array on the device."""

    images: Images
    to_model: Callable[[Any], Array]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the stored images."""
        return self.images.shape

    def __getitem__(self, key: Any) -> Array:
        return self.to_model(self.images[key])


class Feed:
    """The data of a run: `batch(step)` depends on the configuration and the step alone.

    train, valid, test: `(x, y)` on the device, None if the data set lacks the part. sampler: the
    order of the examples. epoch: steps an epoch. steps: steps of the run. ranks: those that share
    a batch; each makes the images of its own shards. Enter `reading()` to make images on a thread
    and in processes while a step runs.
    """

    def __init__(
        self, config: Config, dataset: Dataset, model: Model, device: Device, ranks: Alone = ALONE
    ):
        self._config, self.dataset, self.device = config, dataset, device
        self._ranks = ranks
        self._shape = example_shape(model, dataset)
        self.sampler = dataset.sampler(config.batch_size, config.seed)
        self.epoch = self.sampler.batches_per_epoch
        self.steps = config.epochs * self.epoch
        small = config.batch_size * math.prod(dataset.x.shape[1:]) < WORTH_A_THREAD
        self._decoders = Decoders(self._processes(small))
        images = dataset.images(config.augment)
        self._images = images.decoded_by(self._decoders) if images is not None else None
        self._ahead = Ahead(self._augmented, self.steps, 0 if small else AHEAD)
        self.train = self._upload(dataset.x, dataset.y)
        self.valid, self.test = (
            None if x is None else self._upload(x, y)
            for x, y in ((dataset.x_valid, dataset.y_valid), (dataset.x_test, dataset.y_test))
        )

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Inside, a thread and processes make the images of the next steps."""
        with self._decoders, self._ahead:
            yield

    def batch(self, step: int) -> tuple[Array, Array]:
        """The examples and labels of a step, on the device; the images of other ranks are 0."""
        x, y = self.train
        xp, indices = namespace(y), to_device(self.sampler.batch(step), self.device)
        labels = xp.take(y, indices, axis=0)  # (batch, ...)
        if self._crops_on_device():
            return self._cropped(x, indices, step), labels
        if self._images is not None:
            return to_device(self._ahead(step), self.device), labels
        return xp.take(x, indices, axis=0), labels  # (batch, *example)

    def whole_batch(self, step: int) -> tuple[Array, Array]:
        """The examples and labels of a step, with the images of all ranks."""
        if self._images is None or self._ranks.size == 1:
            return self.batch(step)
        return to_device(self._made(step, slice(None)), self.device), self.batch(step)[1]

    def labels(self, step: int) -> Any:
        """The labels of a step, on the host."""
        return self.dataset.y[self.sampler.batch(step)]

    def _augmented(self, step: int) -> Any:
        """The images of a step on the host, made on a thread; depends on the step alone."""
        n = len(self.sampler.batch(step))
        if self._ranks.size == 1:
            return self._made(step, slice(None))
        out, own = np.zeros((n, *self._shape), self._config.dtype), self._own(n)
        out[own] = self._made(step, own)
        return out

    def _own(self, n: int) -> slice:
        """The examples, out of n of a batch, in the shards of this rank."""
        places = bounds(n, self._config.shards)
        mine = self._ranks.mine(len(places))
        return slice(places[mine.start][0], places[mine.stop - 1][1]) if mine else slice(0)

    def _made(self, step: int, rows: slice) -> Any:
        """Some of the images of a step, augmented; (rows, *example)."""
        assert self._images is not None
        indices, keys = self.sampler.batch(step)[rows], self._keys(step)[rows]
        return self._cast(self._images.batch(indices, self._config.augment, keys))

    def _processes(self, small: bool) -> int:
        """How many processes decode images: as many as asked, else all cores over all ranks."""
        if self._config.decoders is not None:
            return self._config.decoders
        return 0 if small else max(1, cores() // self._ranks.size)

    def _keys(self, step: int) -> Any:
        """The random words of the examples of a step."""
        n, indices = len(self.dataset.x), self.sampler.batch(step)
        return words(self._config.seed, step // self.epoch, n, indices)  # (batch,)

    def _crops_on_device(self) -> bool:
        """Whether images are cropped on a GPU: those that lie there already."""
        whole = self._images is not None and not isinstance(self.dataset.x, Images)
        crops = self._config.augment == "crop-flip"
        return whole and crops and self.device.kind == "cuda"

    def _cropped(self, x: Array, indices: Array, step: int) -> Array:
        """The augmented images of a step, made on the device with the bits of the host."""
        assert self.dataset.image_shape is not None
        xp, keys = namespace(x), to_device(self._keys(step), self.device)
        images = xp.reshape(x, (-1, *self.dataset.image_shape))
        found = crop_flip_by_index(images, indices, keys, self.dataset.border)
        return xp.reshape(found, (-1, *self._shape))

    def _upload(self, x: Any, y: Any) -> tuple[Array, Array]:
        """A part of the data on the device. x: tokens as they are; other examples in the model's
        shape and the run's dtype. Images that are read on demand are uploaded when read."""
        if self.dataset.vocabulary is not None:
            check_tokens(x, self.dataset.vocabulary)
            return to_device(x, self.device), to_device(y, self.device)
        if self.dataset.classes is None:
            y = y.reshape(len(y), -1).astype(self._config.dtype, copy=False)  # (n, outputs)
        if isinstance(x, Images):
            x = OnDemand(x.decoded_by(self._decoders), self._shaped)
        else:
            x = self._shaped(x)
        return x, to_device(y, self.device)

    def _shaped(self, x: Any) -> Array:
        return to_device(self._cast(x), self.device)

    def _cast(self, x: Any) -> Any:
        """Host examples in the model's shape and the run's dtype."""
        return x.reshape(len(x), *self._shape).astype(self._config.dtype, copy=False)
