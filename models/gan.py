"""The class-conditional adversarial network of Bernstein et al. 2020.

A residual generator and a projection discriminator, each with one non-local block. Every weight of
a convolution, a linear layer or a table of classes is spectrally normalised: it is divided by an
estimate of its largest singular value, which one power iteration in every training forward pass
moves.

Source: Bernstein, Vahdat, Yue and Liu 2020, section 5 and appendix, with the settings of their
experiments; Miyato et al. 2018 (spectral normalisation), Miyato and Koyama 2018 (projection), Zhang
et al. 2019 (non-local blocks), Brock, Donahue and Simonyan 2019 (a chunk of the noise a block).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, ClassVar

import numpy as np

from npdrt import ops
from npdrt.arrays import Array, Device, Params, label, namespace
from npdrt.autodiff import detach
from npdrt.errors import Error
from npdrt.models.initialisation import draw, orthogonal
from npdrt.models.layers import BatchNorm, Convolution, Linear, Pass, Shapes
from npdrt.models.spectral import first_vector, normalised, vector_of
from npdrt.random import Random

NOISE = 20  # numbers of a chunk of the noise: one for the stem and one for each block
CHUNKS = 4
TABLE = 1000  # rows of a table of classes, of which the data use the first
EMBEDDED = 80
SIZES = 8  # the side of an image is a multiple of it; 32 in the paper
HEAD = 10.0  # the discriminator's scores are multiplied by it
BIAS = 0.01  # the standard deviation of the first biases
STARTS = ("v2", "v1")  # of biases and gates
_conv = partial(Convolution, bias=True)
_conv3 = partial(_conv, size=3, padding=1, form="winograd")


class ConditionalNorm(BatchNorm):
    """Batch normalisation whose gain 1 + G c and bias B c are linear in the condition c of an
    example. The running statistics move by a thousandth a batch."""

    def __init__(self, name: str, channels: int):
        super().__init__(name, channels, momentum=0.001)

    @property
    def linears(self) -> tuple[Linear, Linear]:
        """Of the gain less 1, and of the bias."""
        inputs = EMBEDDED + NOISE
        return (Linear(f"{self.name}/gain", inputs, self.channels),
                Linear(f"{self.name}/shift", inputs, self.channels))  # fmt: skip

    def shapes(self) -> Shapes:
        """The name and shape of every parameter."""
        return {name: s for linear in self.linears for name, s in linear.shapes().items()}

    def given(self, run: Pass, x: Any, condition: Any) -> Any:
        """x (C, N, H, W), normalised for the condition (N, 100)."""
        gain, bias = (ops.transpose(linear(run, condition)) for linear in self.linears)  # (C, N)
        gain = gain + 1.0
        if run.train:
            y = ops.conditional_batch_norm(x, gain, bias, self.moved(run, x))
        else:
            y = ops.batch_norm_inference(x, *self.running(run), channel_axis=0)
            y = y * gain[:, :, None, None] + bias[:, :, None, None]
        return label(y, f"{self.name}/output")


class NonLocal:
    """x + gate conv(softmax(q^T k) v): every pixel attends to the maxima of squares of 2x2 pixels.

    Queries and keys have an eighth of the channels, values half; the softmax, over the keys, is not
    scaled. The gate is one number, 1 at first.
    """

    def __init__(self, name: str, channels: int):
        self.name, self.channels = name, channels
        self.query = _conv(f"{name}/query", channels, channels // 8, 1)
        self.key = _conv(f"{name}/key", channels, channels // 8, 1)
        self.value = _conv(f"{name}/value", channels, channels // 2, 1)
        self.output = _conv(f"{name}/output", channels // 2, channels, 1)
        self.layers = (self.query, self.key, self.value, self.output)

    def shapes(self) -> Shapes:
        """The name and shape of every parameter."""
        inner = {name: s for layer in self.layers for name, s in layer.shapes().items()}
        return {**inner, f"{self.name}/gate": (1,)}

    def buffers(self) -> Params:
        """None."""
        return {}

    def __call__(self, run: Pass, x: Any) -> Any:
        q = _positions(self.query(run, x))  # (N, H W, C / 8)
        k = _positions(ops.max_pool(self.key(run, x), size=2))  # (N, H W / 4, C / 8)
        v = _positions(ops.max_pool(self.value(run, x), size=2))  # (N, H W / 4, C / 2)
        y = ops.transpose(ops.attention(q, k, v, scale=1.0), axes=(2, 0, 1))  # (C / 2, N, H W)
        y = self.output(run, ops.reshape(y, shape=(y.shape[0], *x.shape[1:])))
        return label(x + run.params[f"{self.name}/gate"] * y, f"{self.name}/result")


def _positions(x: Any) -> Any:
    """(C, N, H, W) -> (N, H W, C)."""
    return ops.transpose(ops.reshape(x, shape=(*x.shape[:2], -1)), axes=(1, 2, 0))


class GeneratorBlock:
    """conv(relu(norm2(conv(up(relu(norm1(x))))))) + up(x, or its 1x1 convolution if the channels
    change); norms are given the condition, up makes every pixel 2x2."""

    def __init__(self, name: str, inputs: int, outputs: int):
        self.norm1 = ConditionalNorm(f"{name}/norm1", inputs)
        self.conv1 = _conv3(f"{name}/conv1", inputs, outputs)
        self.norm2 = ConditionalNorm(f"{name}/norm2", outputs)
        self.conv2 = _conv3(f"{name}/conv2", outputs, outputs)
        changes = inputs != outputs
        self.skip = _conv(f"{name}/skip", inputs, outputs, 1) if changes else None
        self.layers = (*(self.norm1, self.conv1, self.norm2, self.conv2),
                       *((self.skip,) if self.skip else ()))  # fmt: skip

    def __call__(self, run: Pass, x: Any, condition: Any) -> Any:
        h = ops.upsample(ops.relu(self.norm1.given(run, x, condition)))  # (inputs, N, 2H, 2W)
        h = self.conv1(run, h)  # (outputs, N, 2H, 2W)
        h = self.conv2(run, ops.relu(self.norm2.given(run, h, condition)))
        skip = self.skip(run, x) if self.skip else x  # before up, which commutes: a quarter of it
        return h + ops.upsample(skip)


class Generator:
    """Images (channels, N, 8s, 8s) in [-1, 1] for noise (N, 80) and classes (N,).

    The noise is cut into four: the first part makes 4w x s x s numbers, and each block's norms are
    given the embedded class and one of the others. w: the width.
    """

    def __init__(self, name: str, width: int, channels: int, side: int):
        w, block, self.first = width, f"{name}/blocks", side // SIZES
        self.classes = Linear(f"{name}/classes", TABLE, EMBEDDED)
        self.stem = Linear(f"{name}/stem", NOISE, 4 * w * self.first**2)
        self.block1 = GeneratorBlock(f"{block}/00", 4 * w, 4 * w)  # 2s x 2s
        self.block2 = GeneratorBlock(f"{block}/01", 4 * w, 2 * w)  # 4s x 4s
        self.attention = NonLocal(f"{name}/attention", 2 * w)
        self.block3 = GeneratorBlock(f"{block}/02", 2 * w, w)  # 8s x 8s
        self.norm = BatchNorm(f"{name}/norm", w)
        self.head = _conv3(f"{name}/head", w, channels)
        self.layers: Sequence[Any] = (
            *(self.classes, self.stem, *self.block1.layers, *self.block2.layers),
            *(self.attention, *self.block3.layers, self.norm, self.head),
        )

    def __call__(self, run: Pass, noise: Array, labels: Array) -> Any:
        z = ops.split(noise, sizes=(NOISE,) * CHUNKS, axis=1)
        e = self._embedded(run, labels)  # (N, 80)
        conditions = [ops.concat(e, part, axis=1) for part in z[1:]]  # (N, 100) each
        s = self.first
        h = ops.reshape(self.stem(run, z[0]), shape=(noise.shape[0], -1, s, s))
        h = ops.transpose(h, axes=(1, 0, 2, 3))  # (4w, N, s, s)
        h = self.block1(run, h, conditions[0])  # (4w, N, 2s, 2s)
        h = self.block2(run, h, conditions[1])  # (2w, N, 4s, 4s)
        h = self.block3(run, self.attention(run, h), conditions[2])  # (w, N, 8s, 8s)
        return ops.tanh(self.head(run, ops.relu(self.norm(run, h))))  # (channels, N, 8s, 8s)

    def _embedded(self, run: Pass, labels: Array) -> Any:
        """The linear layer of one-hot rows: the columns of its weight."""
        name = self.classes.name
        columns = ops.gather(run.params[f"{name}/weight"], labels, axis=1)  # (80, N)
        return ops.transpose(columns) + run.params[f"{name}/bias"]


class DiscriminatorBlock:
    """conv(relu(conv(relu(x)))) + (x, or its 1x1 convolution), both averaged over 2x2 pixels if it
    is `down`. first: x itself is an image, and is not rectified."""

    def __init__(self, name: str, inputs: int, outputs: int, *, down: bool, first: bool = False):
        self.first, self.down = first, down
        self.conv1 = _conv3(f"{name}/conv1", inputs, outputs)
        self.conv2 = _conv3(f"{name}/conv2", outputs, outputs)
        changes = down or inputs != outputs
        self.skip = _conv(f"{name}/skip", inputs, outputs, 1) if changes else None
        self.layers = (self.conv1, self.conv2, *((self.skip,) if self.skip else ()))

    def __call__(self, run: Pass, x: Any) -> Any:
        h = self.conv1(run, x if self.first else ops.relu(x))
        h = self._smaller(self.conv2(run, ops.relu(h)))
        skip = self._smaller(x)  # before the convolution, which commutes: a quarter of it
        return h + (self.skip(run, skip) if self.skip else skip)

    def _smaller(self, x: Any) -> Any:
        return ops.average_pool(x, size=2) if self.down else x


class Discriminator:
    """Scores (N,) for images (channels, N, 8s, 8s) and classes (N,): 10 (w h + b + <h, E[class]>),
    h the mean over the pixels of the last block's rectified values. A real image should score 1 or
    more, a generated one -1 or less."""

    def __init__(self, name: str, width: int, channels: int):
        w, block = width, f"{name}/blocks"
        self.block0 = DiscriminatorBlock(f"{block}/00", channels, w, down=True, first=True)
        self.block1 = DiscriminatorBlock(f"{block}/01", w, 2 * w, down=True)
        self.attention = NonLocal(f"{name}/attention", 2 * w)
        self.block2 = DiscriminatorBlock(f"{block}/02", 2 * w, 4 * w, down=True)
        self.block3 = DiscriminatorBlock(f"{block}/03", 4 * w, 4 * w, down=False)
        self.linear = Linear(f"{name}/linear", 4 * w, 1)
        self.classes = Table(f"{name}/classes", TABLE, 4 * w)
        self.layers: Sequence[Any] = (
            *(*self.block0.layers, *self.block1.layers, self.attention, *self.block2.layers),
            *(*self.block3.layers, self.linear, self.classes),
        )

    def __call__(self, run: Pass, images: Any, labels: Array) -> Any:
        h = self.block1(run, self.block0(run, images))  # (2w, N, 2s, 2s)
        h = self.block2(run, self.attention(run, h))  # (4w, N, s, s)
        h = ops.relu(self.block3(run, h))
        h = ops.transpose(ops.global_average_pool(h))  # (N, 4w)
        score = ops.reshape(self.linear(run, h), shape=(-1,))
        return (score + ops.sum(h * self.classes(run, labels), axis=1)) * HEAD


@dataclass(frozen=True)
class Table:
    """A row of features for every class: (N,) -> (N, features)."""

    name: str
    rows: int
    features: int

    def shapes(self) -> Shapes:
        """The name and shape of its parameter."""
        return {f"{self.name}/weight": (self.rows, self.features)}

    def buffers(self) -> Params:
        """None."""
        return {}

    def __call__(self, run: Pass, labels: Array) -> Any:
        return ops.embedding(run.params[f"{self.name}/weight"], labels)


@dataclass(frozen=True)
class GAN:
    """A generator and a discriminator of square images, both given a class.

    outputs: classes, at most 1000. image_shape: (channels, side, side), the side a multiple of 8.
    width: channels of the last block of the generator and of the first of the discriminator, a
    multiple of 4; a small one is for tests and small machines. 2,183,092 parameters of the
    generator and 2,644,130 of the discriminator for images of (3, 32, 32) at width 64, for any
    number of classes.

    Weights are orthogonal at first, so that all their singular values are 1. With start "v2"
    biases are normal with standard deviation 0.01, and gates are 1; with "v1", of the first version
    of the paper, both are 0. The gain of the last batch normalisation is 1. Training needs
    images in [-1, 1]: `standardise` names that scale.

    Parameters: "generator/stem/weight", ..., "discriminator/classes/weight". Buffers: a singular
    vector "generator/stem/u" for each of the 44 normalised weights, and running means and variances
    of the generator's norms.

    >>> model = GAN(width=4)
    >>> params, buffers = model.init(seed=0), model.buffers(seed=0)
    >>> images, _ = model.generate(params, buffers, model.noise(Random(0), 2), np.array([3, 7]))
    >>> images.shape
    (2, 3, 32, 32)
    """

    outputs: int = 10
    image_shape: Any = (3, 32, 32)
    width: int = 64
    start: str = "v2"

    networks: ClassVar[tuple[str, ...]] = ("discriminator", "generator")  # in the order of a step
    standardise: ClassVar[str] = "symmetric"

    def __post_init__(self) -> None:
        object.__setattr__(self, "image_shape", tuple(self.image_shape))
        _, *sides = self.image_shape if len(self.image_shape) == 3 else (0, 0)
        if len(set(sides)) != 1 or sides[0] < SIZES or sides[0] % SIZES:
            raise Error(
                "GAN: expected square images, (channels, side, side), whose side is a multiple of "
                f"{SIZES}; got {self.image_shape}; resize them, or use folder-32:PATH"
            )
        if self.start not in STARTS:
            raise Error(f"GAN: start must be one of {', '.join(STARTS)}; got {self.start!r}")
        if not 1 <= self.outputs <= TABLE:
            raise Error(f"GAN: expected 1 to {TABLE} classes; got {self.outputs}")
        if self.width < 4 or self.width % 4:
            raise Error(f"GAN: width must be a multiple of 4, at least 4; got {self.width}")

    @cached_property
    def generator(self) -> Generator:
        """The layers of the generator."""
        channels, side, _ = self.image_shape
        return Generator("generator", self.width, channels, side)

    @cached_property
    def discriminator(self) -> Discriminator:
        """The layers of the discriminator."""
        return Discriminator("discriminator", self.width, self.image_shape[0])

    @property
    def layers(self) -> Iterator[Any]:
        """Every layer, those of the generator first."""
        yield from (*self.generator.layers, *self.discriminator.layers)

    def shapes(self) -> Shapes:
        """The name and shape of every parameter, in definition order."""
        return {name: s for layer in self.layers for name, s in layer.shapes().items()}

    @cached_property
    def normalised(self) -> tuple[str, ...]:
        """The names of the spectrally normalised weights: all but vectors."""
        return tuple(name for name, shape in self.shapes().items() if len(shape) > 1)

    def init(self, seed: int = 0, device: str | Device = "cpu", dtype: str = "float32") -> Params:
        """The initial parameters, drawn in float64 from (seed, name) and rounded once."""
        return draw(self._draw, seed, device, dtype)

    def _draw(self, stream: Random) -> Iterator[tuple[str, Any]]:
        for name, shape in self.shapes().items():
            if len(shape) > 1:
                matrix = orthogonal(stream.of(name), (shape[0], math.prod(shape[1:])))
                yield name, matrix.reshape(shape)
            elif self.start == "v1" and not name.endswith("/weight"):
                yield name, np.zeros(shape)
            elif name.endswith("/bias"):
                yield name, stream.of(name).normal(shape, BIAS)
            else:
                yield name, np.ones(shape)

    def buffers(
        self, seed: int = 0, device: str | Device = "cpu", dtype: str = "float32"
    ) -> Params:
        """The first buffers: random singular vectors, running means of 0 and variances of 1."""
        return draw(self._draw_buffers, seed, device, dtype)

    def _draw_buffers(self, stream: Random) -> Iterator[tuple[str, Any]]:
        for name in self.normalised:
            yield vector_of(name), first_vector(stream, name, self.shapes()[name][0])
        for layer in self.layers:
            yield from layer.buffers().items()

    def noise(self, random: Random, n: int) -> Any:
        """Noise for n images, (n, 80) standard normals in float64, of a stream."""
        return random.normal((n, NOISE * CHUNKS))

    def generate(
        self, params: Params, buffers: Params, noise: Array, labels: Array, *, train: bool = False
    ) -> tuple[Any, Params]:
        """`(images, buffers)`: images (N, *image_shape) of noise (N, 80) and classes (N,).

        Training mode normalises with the statistics of the batch, and moves the running ones and
        the generator's singular vectors.
        """
        run = self._pass("generator", params, buffers, train)
        images = self.generator(run, _as(noise, params), labels)  # (channels, N, side, side)
        return label(ops.transpose(images, axes=(1, 0, 2, 3)), "images"), run.buffers

    def discriminate(
        self, params: Params, buffers: Params, images: Any, labels: Array, *, train: bool = False
    ) -> tuple[Any, Params]:
        """`(scores, buffers)`: scores (N,) of images (N, *image_shape) and their classes (N,).

        Training mode moves the discriminator's singular vectors.
        """
        if tuple(images.shape[1:]) != self.image_shape:
            raise Error(
                f"GAN: expected images (N, {', '.join(map(str, self.image_shape))}); got shape "
                f"{tuple(images.shape)}"
            )
        run = self._pass("discriminator", params, buffers, train)
        scores = self.discriminator(run, ops.transpose(images, axes=(1, 0, 2, 3)), labels)
        return label(scores, "scores"), run.buffers

    def _pass(self, network: str, params: Params, buffers: Params, train: bool) -> Pass:
        """A forward pass of one network, with its weights normalised."""
        own, moved = dict(params), dict(buffers)
        for name in self.normalised:
            if name.startswith(f"{network}/"):
                own[name] = normalised(name, params[name], moved, train=train)
        return Pass(own, moved, train)

    def __call__(
        self, params: Params, x: Array, *, labels: Array = None, buffers: Params | None = None
    ) -> Any:
        """Images of noise x (N, 80) in evaluation mode; without labels, of classes 0, 1, ... in
        turn."""
        if labels is None:
            labels = namespace(x).arange(x.shape[0]) % self.outputs
        return self.generate(params, buffers or {}, x, labels)[0]


def _as(noise: Array, params: Params) -> Array:
    """Noise in the library and the dtype of the parameters."""
    like = detach(next(iter(params.values())))
    xp = namespace(like)
    return xp.astype(xp.asarray(noise), like.dtype)
