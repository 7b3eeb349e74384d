"""Layers with names, of which the image networks are made.

Activations are channel-major, (C, N, H, W); models take and give (N, ...). A layer knows the names
and shapes of its parameters, draws them, and computes with those of a `Pass`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from npdrt import ops
from npdrt.arrays import Array, Device, Params, label, to_device
from npdrt.errors import Error
from npdrt.models import initialisation
from npdrt.models.initialisation import Initialiser
from npdrt.ops.normalisation import Statistics, batch_statistics, running_statistics
from npdrt.ops.window import Pair, pair
from npdrt.random import Random

Shapes = dict[str, tuple[int, ...]]
Draws = Iterator[tuple[str, Any]]


@dataclass(frozen=True)
class Pass:
    """One forward pass: parameters by name, buffers, which layers replace, and the mode."""

    params: Mapping[str, Any]
    buffers: dict[str, Array]
    train: bool


class Layer(Protocol):
    """The methods of a layer that a network uses, besides its call."""

    def shapes(self) -> Shapes:
        """The name and shape of every parameter."""

    def draw(self, scheme: str, stream: Random) -> Draws:
        """Every parameter by the initialisation of that name."""

    def buffers(self) -> Params:
        """The first buffers, float64."""


@dataclass(frozen=True)
class Affine:
    """The parameters of `Convolution` and `Linear`: weight (outputs, inputs, ...), bias (outputs,).

    A kernel of size k is drawn as the matrix (outputs, inputs k k): its fan-in is PyTorch's, its
    fan-out, which only xavier asks for, is `outputs`.
    """

    name: str
    inputs: int
    outputs: int

    def shapes(self) -> Shapes:
        """The name and shape of every parameter."""
        weight = {f"{self.name}/weight": (self.outputs, self.inputs, *self.kernel)}
        return {**weight, f"{self.name}/bias": (self.outputs,)} if self.has_bias else weight

    @property
    def kernel(self) -> tuple[int, ...]:
        """The axes of a weight after the first two."""
        return ()

    @property
    def has_bias(self) -> bool:
        """Whether a bias is added."""
        return True

    def draw(self, scheme: str, stream: Random) -> Draws:
        """Weight and bias of fan-in inputs k k, each from its name."""
        matrix = (self.outputs, self.inputs * int(np.prod(self.kernel)))
        for name, shape in self.shapes().items():
            if scheme == "torchvision" and self.kernel and name.endswith("weight"):
                yield name, initialisation.he_out(stream.of(name), shape)
                continue
            rule = initialisation.weight if name.endswith("weight") else initialisation.bias
            yield name, rule(scheme, stream.of(name), matrix).reshape(shape)

    def buffers(self) -> Params:
        """None."""
        return {}


@dataclass(frozen=True)
class Linear(Affine):
    """x W^T + b: (N, inputs) -> (N, outputs)."""

    def __call__(self, run: Pass, x: Any) -> Any:
        weight, bias = run.params[f"{self.name}/weight"], run.params[f"{self.name}/bias"]
        return label(ops.linear(x, weight, bias), f"{self.name}/output")


@dataclass(frozen=True)
class Convolution(Affine):
    """Cross-correlation with kernels (outputs, inputs, size, size), on (inputs groups, N, H, W).

    inputs: those of one group. size, padding: a number, or a pair for height and width. form,
    groups: see `npdrt.ops.conv2d`.
    """

    size: int | Pair = 3
    stride: int = 1
    padding: int | Pair = 0
    bias: bool = False
    form: str = "direct"
    groups: int = 1

    @property
    def kernel(self) -> tuple[int, ...]:
        """The axes of a weight after the first two."""
        return pair("size", self.size, 1)

    @property
    def has_bias(self) -> bool:
        """Whether a bias is added."""
        return self.bias

    def __call__(self, run: Pass, x: Any) -> Any:
        weight, bias = run.params[f"{self.name}/weight"], run.params.get(f"{self.name}/bias")
        setting = {"stride": self.stride, "padding": self.padding, "form": self.form}
        y = ops.conv2d(x, weight, bias, groups=self.groups, **setting)
        return label(y, f"{self.name}/output")


@dataclass(frozen=True)
class BatchNorm:
    """Batch normalisation of every channel, the first axis; unless given, eps is 1e-5 and momentum
    0.1, PyTorch's.

    Parameters: "weight", the gain, 1 at first, and "bias", 0. Buffers: "running_mean", 0 at first,
    and "running_var", 1, which evaluation mode normalises with and training mode moves.
    """

    name: str
    channels: int
    eps: float = 1e-5
    momentum: float = 0.1

    def shapes(self) -> Shapes:
        """The name and shape of every parameter."""
        return {f"{self.name}/weight": (self.channels,), f"{self.name}/bias": (self.channels,)}

    def draw(self, scheme: str, stream: Random) -> Draws:
        """Ones and zeros, for every scheme."""
        yield f"{self.name}/weight", np.ones(self.channels)
        yield f"{self.name}/bias", np.zeros(self.channels)

    def buffers(self) -> Params:
        """The running mean and variance of no batch."""
        mean, variance = np.zeros(self.channels), np.ones(self.channels)
        return {f"{self.name}/running_mean": mean, f"{self.name}/running_var": variance}

    def __call__(self, run: Pass, x: Any) -> Any:
        gain, bias = run.params[f"{self.name}/weight"], run.params[f"{self.name}/bias"]
        if run.train:
            found = self.moved(run, x)
            y = ops.batch_norm(x, gain, bias, found, channel_axis=0, eps=self.eps)
        else:
            given = *self.running(run), gain, bias
            y = ops.batch_norm_inference(x, *given, channel_axis=0, eps=self.eps)
        return label(y, f"{self.name}/output")

    def running(self, run: Pass) -> tuple[Array, Array]:
        """The running mean and variance."""
        return self._buffer(run, "running_mean"), self._buffer(run, "running_var")

    def moved(self, run: Pass, x: Any) -> Statistics:
        """The statistics of a batch, which move the running ones."""
        mean, variance = self.running(run)
        found = batch_statistics(x, channel_axis=0)
        moved = running_statistics(mean, variance, found, momentum=self.momentum)
        run.buffers[f"{self.name}/running_mean"] = moved[0]
        run.buffers[f"{self.name}/running_var"] = moved[1]
        return found

    def _buffer(self, run: Pass, name: str) -> Array:
        if f"{self.name}/{name}" not in run.buffers:
            raise Error(
                f"batch normalisation needs the buffer {self.name}/{name}; start from "
                "model.buffers(seed) and pass buffers= to the model"
            )
        return run.buffers[f"{self.name}/{name}"]


class Unit:
    """A convolution without bias, "NAME/conv", and its batch normalisation, "NAME/norm", of eps
    1e-3 as in TensorFlow's networks; then `activation`, if one is given.

    inputs: the channels of one group. The other settings are those of `Convolution`.
    """

    def __init__(
        self, name: str, inputs: int, outputs: int, size: int | Pair, stride: int = 1,
        padding: int | Pair = 0, *, groups: int = 1, activation: Any = None,
    ):  # fmt: skip
        self.convolution = Convolution(
            *(f"{name}/conv", inputs, outputs, size, stride, padding),
            form="winograd",
            groups=groups,
        )
        self.norm = BatchNorm(f"{name}/norm", outputs, eps=1e-3)
        self.activation = activation
        self.layers: Sequence[Layer] = (self.convolution, self.norm)

    def __call__(self, run: Pass, x: Any) -> Any:
        y = self.norm(run, self.convolution(run, x))
        return y if self.activation is None else self.activation(y)


class Network:
    """The methods of a model of images that is made of layers; a frozen dataclass below it has
    the fields `outputs`, `image_shape` (channels, height, width) and `init`."""

    outputs: int
    image_shape: Any
    init: Any

    def __post_init__(self) -> None:
        object.__setattr__(self, "image_shape", tuple(self.image_shape))
        self._check()
        object.__setattr__(self, "init", Initialiser(self.init, self._draw))

    def _check(self) -> None:
        image = self.image_shape
        if len(image) != 3 or min(image) < 1 or self.outputs < 1:
            raise Error(
                f"{type(self).__name__}: expected image_shape (channels, height, width) and "
                f"outputs of at least 1; got {image} and {self.outputs}"
            )

    @property
    def layers(self) -> Sequence[Layer]:
        """Every layer, in definition order."""
        raise NotImplementedError

    def forward(self, run: Pass, x: Any) -> Any:
        """Logits (N, outputs) for x (C, N, H, W)."""
        raise NotImplementedError

    def shapes(self) -> Shapes:
        """The name and shape of every parameter, in definition order."""
        return {name: s for layer in self.layers for name, s in layer.shapes().items()}

    def _draw(self, stream: Random) -> Draws:
        for layer in self.layers:
            yield from layer.draw(self.init, stream)

    def buffers(
        self, seed: int = 0, device: str | Device = "cpu", dtype: str = "float32"
    ) -> Params:
        """The first buffers: running means of 0 and variances of 1, for every seed."""
        first = {name: v for layer in self.layers for name, v in layer.buffers().items()}
        return {name: to_device(value.astype(dtype), device) for name, value in first.items()}

    def __call__(self, params: Params, x: Array, *, buffers: Params | None = None) -> Array:
        """Logits (N, outputs) in evaluation mode, with the running statistics in `buffers`.

        x: images (N, channels, height, width), or as rows (N, channels height width).
        """
        return self.apply(params, buffers or {}, x)[0]

    def apply(
        self,
        params: Params,
        buffers: Params,
        x: Array,
        *,
        train: bool = False,
        random: Random | None = None,
    ) -> tuple[Array, Params]:
        """`(logits, buffers)`: training mode normalises with the statistics of the batch, and
        moves the running ones."""
        run = Pass(params, dict(buffers), train)
        return self.forward(run, self.channels_first(x)), run.buffers

    def channels_first(self, x: Any) -> Any:
        """Images (N, C, H, W), or rows of them, as (C, N, H, W)."""
        if x.ndim == 2 and x.shape[1] == int(np.prod(self.image_shape)):
            x = ops.reshape(x, shape=(x.shape[0], *self.image_shape))
        if x.ndim != 4 or x.shape[1] != self.image_shape[0]:
            raise Error(
                f"{type(self).__name__}: expected images (N, {self.image_shape[0]}, height, "
                f"width), or rows of {self.image_shape}; got shape {tuple(x.shape)}"
            )
        return ops.transpose(x, axes=(1, 0, 2, 3))  # (C, N, H, W)


def unit_map(x: Any, *, channels: int, stride: int, before: int) -> Any:
    """E(s AvgPool_s(x)), (C, N, H, W) -> (channels, N, H/s, W/s): a partial isometry.

    s: `stride`. s times the mean of s x s numbers has orthonormal rows; E puts `before` channels
    of zeros before the C and the rest after, so that all singular values are 0 or 1.

    Source: MacDonald et al. 2023, section 6, from the authors' code.
    """
    if x.shape[2] % stride or x.shape[3] % stride:
        raise Error(
            f"modified shortcut: expected a height and a width that {stride} divides; got "
            f"{x.shape[2]} and {x.shape[3]}"
        )
    y = x if stride == 1 else ops.average_pool(x, size=stride) * float(stride)  # (C, N, H/s, W/s)
    after = channels - x.shape[0] - before
    return ops.pad(y, widths=((before, after), (0, 0), (0, 0), (0, 0)))
