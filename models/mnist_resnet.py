"""The small residual network of MacDonald et al. 2023, section 6, for MNIST."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from npdrt import ops
from npdrt.arrays import Array, Params
from npdrt.errors import Error
from npdrt.models.layers import BatchNorm, Convolution, Layer, Linear, Network, Pass, unit_map

VARIANTS = ("chain", "residual", "modified")
BEFORE = 7  # channels of zeros before the 5 of the unit map, 8 after: as in the authors' code


@dataclass(frozen=True)
class MNISTResNet(Network):
    """Two pre-activated blocks between a convolution and a linear layer; 9,970 parameters.

        conv 5x5 (1 to 5), AvgPool 2                                     5 x 12 x 12
        block 1   BN-ReLU-conv 5x5-BN-ReLU-conv 5x5                      5 x 12 x 12
        block 2   a = BN-ReLU, conv 3x3 stride 2-BN-ReLU-conv 3x3 of a   20 x 4 x 4
        BN-ReLU of all 320 numbers, linear                               10

    variant: "chain" has no skip connection; "residual" adds block 1's input to its output, and a
    1x1 convolution of a with stride 3 to block 2; "modified" also adds 3 AvgPool_3(a) between 7
    and 8 channels of zeros (`npdrt.models.layers.unit_map`). All three have the same parameters,
    and from one seed the same first ones: the chain has its shortcut, and does not use it.
    Fields otherwise as `npdrt.models.ResNet18`; image_shape: one channel of 28 x 28.

    Parameters: "stem/weight", "stem/bias", "blocks/00/norm1/weight", ..., "linear/bias".
    """

    outputs: int = 10
    image_shape: Any = (1, 28, 28)
    variant: str = "residual"
    init: Any = "authors"

    stem = Convolution("stem", 1, 5, 5, bias=True)
    norm11 = BatchNorm("blocks/00/norm1", 5)
    conv11 = Convolution("blocks/00/conv1", 5, 5, 5, 1, 2, bias=True)
    norm12 = BatchNorm("blocks/00/norm2", 5)
    conv12 = Convolution("blocks/00/conv2", 5, 5, 5, 1, 2, bias=True)
    norm21 = BatchNorm("blocks/01/norm1", 5)
    conv21 = Convolution("blocks/01/conv1", 5, 20, 3, 2, 1, bias=True)
    norm22 = BatchNorm("blocks/01/norm2", 20)
    conv22 = Convolution("blocks/01/conv2", 20, 20, 3, 1, 0, bias=True)
    shortcut = Convolution("blocks/01/shortcut", 5, 20, 1, 3, bias=True)
    norm = BatchNorm("norm", 320)

    def _check(self) -> None:
        super()._check()
        if self.variant not in VARIANTS:
            raise Error(f"unknown variant {self.variant!r}; use one of {', '.join(VARIANTS)}")
        if self.image_shape != (1, 28, 28):
            raise Error(f"MNISTResNet: expected images of (1, 28, 28); got {self.image_shape}")

    @cached_property
    def linear(self) -> Linear:
        """The last layer."""
        return Linear("linear", 320, self.outputs)

    @property
    def layers(self) -> Sequence[Layer]:
        """Every layer, in definition order."""
        return (
            *(self.stem, self.norm11, self.conv11, self.norm12, self.conv12),
            *(self.norm21, self.conv21, self.norm22, self.conv22, self.shortcut),
            *(self.norm, self.linear),
        )

    def forward(self, run: Pass, x: Any) -> Any:
        """Logits (N, outputs) for x (1, N, 28, 28)."""
        return self._rest(run, self._first(run, x))

    def first(self, params: Params, x: Array) -> Array:
        """Convolution and pooling of images (N, 1, 28, 28): (5, N, 12, 12), the input of `rest`."""
        return self._first(Pass(params, {}, True), self.channels_first(x))

    def rest(
        self, params: Params, buffers: Params, h: Array, *, train: bool = False
    ) -> tuple[Array, Params]:
        """`(logits, buffers)` from what `first` gives: the blocks and all that follows, whose
        Jacobian the paper shows."""
        run = Pass(params, dict(buffers), train)
        return self._rest(run, h), run.buffers

    def _first(self, run: Pass, x: Any) -> Any:
        h = self.stem(run, x)  # (5, N, 24, 24)
        return ops.average_pool(h, size=2)  # (5, N, 12, 12)

    def _rest(self, run: Pass, h: Any) -> Any:
        h = self._block2(run, self._block1(run, h))  # (20, N, 4, 4)
        pixels = ops.transpose(h, axes=(0, 2, 3, 1))  # (20, 4, 4, N)
        features = ops.reshape(pixels, shape=(320, h.shape[1]))  # (320, N)
        return self.linear(run, ops.transpose(ops.relu(self.norm(run, features))))  # (N, outputs)

    def _block1(self, run: Pass, x: Any) -> Any:
        h = self.conv11(run, ops.relu(self.norm11(run, x)))
        h = self.conv12(run, ops.relu(self.norm12(run, h)))
        return h if self.variant == "chain" else h + x

    def _block2(self, run: Pass, x: Any) -> Any:
        a = ops.relu(self.norm21(run, x))
        h = self.conv21(run, a)  # (20, N, 6, 6)
        h = self.conv22(run, ops.relu(self.norm22(run, h)))  # (20, N, 4, 4)
        if self.variant != "chain":
            h = h + self.shortcut(run, a)
        if self.variant == "modified":
            h = h + unit_map(a, channels=20, stride=3, before=BEFORE)
        return h
