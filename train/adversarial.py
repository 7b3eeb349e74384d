"""The task of two networks that are trained against each other: a discriminator and a generator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from npdrt import ops
from npdrt.arrays import Array, Params, namespace
from npdrt.autodiff import detach
from npdrt.data import Dataset
from npdrt.errors import Error
from npdrt.models import Model
from npdrt.random import Random
from npdrt.train.config import Config
from npdrt.train.pictures import COLUMNS, ROWS, grid
from npdrt.train.step import State, Task, Turn


def make_task(config: Config, model: Model, dataset: Dataset) -> Task:
    """What a run of that model computes: `Adversarial` if the model has two networks."""
    kind = Adversarial if hasattr(model, "discriminate") else Task
    return kind(model, dataset.classes, config.label_smoothing, config.clip)


@dataclass(frozen=True)
class Adversarial(Task):
    """A model with `generate` and `discriminate`; a step updates the discriminator, then the
    generator, each with new noise and the labels of the batch.

        discriminator: mean max(0, 1 + D(G(z))) + mean max(0, 1 - D(x))
        generator:     -mean D(G(z))

    The loss and the accuracy of a run are those of the discriminator, which has two predictions an
    image: that the real one scores above 0, and the generated one below. In a step the generator
    makes images twice, and the discriminator judges three batches: the generated images, the real
    ones, and after its update the generator's new ones. Each of these passes moves the buffers.

    Source: Lim and Ye 2017, "Geometric GAN" (the hinge loss); Bernstein et al. 2020, whose code
    subtracts the constant 2 from the discriminator's loss.
    """

    def __post_init__(self) -> None:
        if self.classes is None:
            raise Error(
                "a conditional adversarial network needs labels, and the examples have targets; "
                "use data whose y are integers from 0, such as cifar-10"
            )
        if self.label_smoothing:
            raise Error("label smoothing is for cross-entropy; an adversarial network has none")

    @property
    def turns(self) -> Sequence[Turn]:
        """The discriminator's, then the generator's."""
        return [Turn("discriminator", self.judged), Turn("generator", self.fooled)]

    def judged(
        self, params: Params, buffers: Params, x: Array, y: Array, random: Random
    ) -> tuple[Any, tuple[Any, Params]]:
        """`(loss, (scores, buffers))` of the discriminator in training mode: `scores`."""
        noise = random.of("noise/discriminator")
        scores, buffers = self.scores(params, buffers, x, y, noise, train=True)
        return self.loss(scores, y, smoothed=True), (scores, buffers)

    def fooled(
        self, params: Params, buffers: Params, x: Array, y: Array, random: Random
    ) -> tuple[Any, tuple[Any, Params]]:
        """`(loss, (scores, buffers))` of the generator in training mode, scores (N,)."""
        model: Any = self.model
        noise = model.noise(random.of("noise/generator"), y.shape[0])
        fakes, buffers = model.generate(params, buffers, noise, y, train=True)
        scores, buffers = model.discriminate(params, buffers, fakes, y, train=True)
        return -ops.mean(scores), (scores, buffers)

    def scores(
        self, params: Params, buffers: Params, x: Array, y: Array, random: Random, *, train: bool
    ) -> tuple[Any, Params]:
        """`(scores, buffers)`: scores (2N,) of generated images, then of the N images x."""
        model: Any = self.model
        noise = model.noise(random, y.shape[0])
        fakes, buffers = model.generate(params, buffers, noise, y, train=train)
        fake, buffers = model.discriminate(params, buffers, fakes, y, train=train)
        true, buffers = model.discriminate(params, buffers, x, y, train=train)
        return ops.concat(fake, true), buffers

    def loss(self, output: Any, y: Array, *, smoothed: bool) -> Any:
        """The discriminator's loss for scores (2N,); 0-d."""
        signs = _signs(detach(output))
        return 2.0 * ops.hinge(output, signs)  # twice the mean over 2N is the sum of both means

    def count(self, y: Array) -> int:
        """Two predictions an image."""
        return 2 * int(y.shape[0])

    def correct(self, output: Array, y: Array) -> Array:
        """How many of the scores (2N,) have the right sign; 0-d int64."""
        xp = namespace(output)
        return xp.sum(output * _signs(output) > 0, dtype=xp.int64)

    def picture(self, state: State, seed: int) -> Any:
        """The first ten images of the first ten classes."""
        model: Any = self.model
        classes = range(min(ROWS, model.outputs))
        return grid(model, state.params, state.buffers, classes, COLUMNS, seed)

    def predict(self, params: Params, buffers: Params, x: Array, y: Array) -> Array:
        """Scores (2N,) in evaluation mode, with the same noise at every evaluation."""
        return self.scores(params, buffers, x, y, Random(0, "evaluation"), train=False)[0]


def _signs(scores: Array) -> Array:
    """-1 for the first half, generated images, and 1 for the second."""
    xp, n = namespace(scores), scores.shape[0] // 2
    one = xp.ones((n,), dtype=scores.dtype)
    return xp.concat((-one, one))
