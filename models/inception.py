"""Inception as of 2015-12-05: the network whose features the Frechet Inception distance compares.

Source: Szegedy et al. 2016 ("Rethinking the Inception Architecture for Computer Vision"), in the
form of TensorFlow's graph of 2015-12-05, which differs from the Inception v3 of the libraries in
its pools: means leave out what is beyond the image, and the last block takes maxima.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

from npdrt import ops
from npdrt.arrays import namespace
from npdrt.autodiff import detach
from npdrt.models.layers import Layer, Network, Pass, Unit

FEATURES = 2048
UNUSED = ("fc.", "AuxLogits.")  # arrays of the published file for what follows the features
_unit = partial(Unit, activation=ops.relu)

Part = Any  # Chain, Split, Unit or a pool: called with a Pass and (C, N, H, W)


class Chain:
    """Parts one after another."""

    def __init__(self, *parts: Part):
        self.parts = parts
        self.layers: Sequence[Layer] = [x for part in parts for x in getattr(part, "layers", ())]

    def __call__(self, run: Pass, x: Any) -> Any:
        for part in self.parts:
            x = part(run, x)
        return x


class Split(Chain):
    """Parts side by side: all see x, and their channels are joined."""

    def __call__(self, run: Pass, x: Any) -> Any:
        return ops.concat(*(part(run, x) for part in self.parts), axis=0)


def average(run: Pass, x: Any) -> Any:
    """Means of 3x3 pixels, of those that are inside the image."""
    pixels = ops.average_pool(x, size=3, stride=1, padding=1)
    ones = namespace(detach(x)).ones((1, 1, *x.shape[2:]), dtype=x.dtype)
    return pixels / ops.average_pool(ones, size=3, stride=1, padding=1)


def maximum(run: Pass, x: Any) -> Any:
    """Maxima of 3x3 pixels."""
    return ops.max_pool(x, size=3, stride=1, padding=1)


def halve(run: Pass, x: Any) -> Any:
    """Maxima of 3x3 pixels, one every 2 pixels."""
    return ops.max_pool(x, size=3, stride=2)


# --- the blocks: name, inputs -> a part -------------------------------------------------------


def block_a(name: str, n: int, pool: int) -> Split:
    """Kernels 1x1, 5x5 and twice 3x3: 224 + pool channels."""
    unit = _named(name)
    return Split(
        unit("branch1x1", n, 64, 1),
        Chain(unit("branch5x5_1", n, 48, 1), unit("branch5x5_2", 48, 64, 5, padding=2)),
        Chain(
            unit("branch3x3dbl_1", n, 64, 1),
            unit("branch3x3dbl_2", 64, 96, 3, padding=1),
            unit("branch3x3dbl_3", 96, 96, 3, padding=1),
        ),
        Chain(average, unit("branch_pool", n, pool, 1)),
    )


def block_b(name: str, n: int) -> Split:
    """Half the height and width: 480 + n channels."""
    unit = _named(name)
    return Split(
        unit("branch3x3", n, 384, 3, 2),
        Chain(
            unit("branch3x3dbl_1", n, 64, 1),
            unit("branch3x3dbl_2", 64, 96, 3, padding=1),
            unit("branch3x3dbl_3", 96, 96, 3, 2),
        ),
        halve,
    )


def block_c(name: str, n: int, c: int) -> Split:
    """Kernels of 7 pixels along one axis, `c` channels between them: 768 channels."""
    unit = _named(name)
    row: dict[str, Any] = {"size": (1, 7), "padding": (0, 3)}
    column: dict[str, Any] = {"size": (7, 1), "padding": (3, 0)}
    return Split(
        unit("branch1x1", n, 192, 1),
        Chain(
            unit("branch7x7_1", n, c, 1),
            unit("branch7x7_2", c, c, **row),
            unit("branch7x7_3", c, 192, **column),
        ),
        Chain(
            unit("branch7x7dbl_1", n, c, 1),
            unit("branch7x7dbl_2", c, c, **column),
            unit("branch7x7dbl_3", c, c, **row),
            unit("branch7x7dbl_4", c, c, **column),
            unit("branch7x7dbl_5", c, 192, **row),
        ),
        Chain(average, unit("branch_pool", n, 192, 1)),
    )


def block_d(name: str, n: int) -> Split:
    """Half the height and width: 512 + n channels."""
    unit = _named(name)
    return Split(
        Chain(unit("branch3x3_1", n, 192, 1), unit("branch3x3_2", 192, 320, 3, 2)),
        Chain(
            unit("branch7x7x3_1", n, 192, 1),
            unit("branch7x7x3_2", 192, 192, (1, 7), padding=(0, 3)),
            unit("branch7x7x3_3", 192, 192, (7, 1), padding=(3, 0)),
            unit("branch7x7x3_4", 192, 192, 3, 2),
        ),
        halve,
    )


def block_e(name: str, n: int, pool: Part) -> Split:
    """Pairs of kernels 1x3 and 3x1: 2048 channels."""
    unit = _named(name)

    def both(before: str, last: str) -> Split:
        return Split(
            unit(f"{before}{last}a", 384, 384, (1, 3), padding=(0, 1)),
            unit(f"{before}{last}b", 384, 384, (3, 1), padding=(1, 0)),
        )

    return Split(
        unit("branch1x1", n, 320, 1),
        Chain(unit("branch3x3_1", n, 384, 1), both("branch3x3_", "2")),
        Chain(
            unit("branch3x3dbl_1", n, 448, 1),
            unit("branch3x3dbl_2", 448, 384, 3, padding=1),
            both("branch3x3dbl_", "3"),
        ),
        Chain(pool, unit("branch_pool", n, 192, 1)),
    )


def _named(block: str) -> Callable[..., Unit]:
    """`Unit` with the block's name before its own."""
    return lambda name, *args, **settings: _unit(f"{block}/{name}", *args, **settings)


# --- the network ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Inception(Network):
    """Images (N, 3, 299, 299) in [-1, 1] -> the 2048 features of the last pool, (N, 2048).

    21,785,568 parameters. Their names are those of the port to PyTorch, with "/" for "." and
    "norm" for "bn": "Conv2d_1a_3x3/conv/weight", ..., "Mixed_7c/branch_pool/norm/bias".
    """

    outputs: int = FEATURES
    image_shape: Any = (3, 299, 299)
    init: Any = "authors"

    @cached_property
    def body(self) -> Chain:
        """Everything before the last pool."""
        return Chain(
            _unit("Conv2d_1a_3x3", 3, 32, 3, 2),  # 149 x 149
            _unit("Conv2d_2a_3x3", 32, 32, 3),
            _unit("Conv2d_2b_3x3", 32, 64, 3, padding=1),
            halve,  # 73 x 73
            _unit("Conv2d_3b_1x1", 64, 80, 1),
            _unit("Conv2d_4a_3x3", 80, 192, 3),
            halve,  # 35 x 35
            block_a("Mixed_5b", 192, 32),
            block_a("Mixed_5c", 256, 64),
            block_a("Mixed_5d", 288, 64),
            block_b("Mixed_6a", 288),  # 17 x 17
            block_c("Mixed_6b", 768, 128),
            block_c("Mixed_6c", 768, 160),
            block_c("Mixed_6d", 768, 160),
            block_c("Mixed_6e", 768, 192),
            block_d("Mixed_7a", 768),  # 8 x 8
            block_e("Mixed_7b", 1280, average),
            block_e("Mixed_7c", 2048, maximum),
        )

    @property
    def layers(self) -> Sequence[Layer]:
        """Every layer, in definition order."""
        return self.body.layers

    def forward(self, run: Pass, x: Any) -> Any:
        """Features (N, 2048) for x (3, N, H, W)."""
        return ops.transpose(ops.global_average_pool(self.body(run, x)))

    def pytorch_names(self) -> dict[str, str]:
        """The name in the port to PyTorch of every parameter and buffer."""
        names = [*self.shapes(), *(n for layer in self.layers for n in layer.buffers())]
        return {n: n.replace("/norm/", "/bn/").replace("/", ".") for n in names}
