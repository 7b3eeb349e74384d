"""Residual networks: ResNet-18 for small images, ResNet-50 for those of ImageNet.

Source: He, Zhang, Ren and Sun 2016a ("Deep Residual Learning for Image Recognition") and 2016b
("Identity Mappings in Deep Residual Networks", pre-activation), in the forms that the papers'
authors used; MacDonald et al. 2023, section 6 (the modified shortcut).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

from npdrt import ops
from npdrt.arrays import label
from npdrt.errors import Error
from npdrt.models.layers import BatchNorm, Convolution, Layer, Linear, Network, Pass, unit_map

SHORTCUTS = ("convolution", "modified")
# A step takes about a sixth less time than with direct convolutions; see `npdrt.ops.conv2d`.
_convolution = partial(Convolution, form="winograd")


@dataclass(frozen=True)
class Stage:
    """Blocks of equal width, the first of which has the stride."""

    blocks: int
    channels: int
    stride: int


class Shortcut:
    """Where a block changes the shape: a 1x1 convolution of its stride, then `norm` if it is
    post-activated; modified, plus the partial isometry E(s AvgPool_s(x)).

    E puts ceil((outputs - inputs) / 2) channels of zeros before. The paper modifies pre-activated
    nets only; with a norm the isometry is added after it, so that its singular values stay 1.
    """

    def __init__(self, name: str, inputs: int, outputs: int, stride: int, norm: bool, kind: str):
        self.convolution = _convolution(name, inputs, outputs, 1, stride)
        self.norm = BatchNorm(f"{name}/norm", outputs) if norm else None
        self.modified = kind == "modified"
        self.before = (outputs - inputs + 1) // 2
        self.layers: Sequence[Layer] = (self.convolution, *filter(None, [self.norm]))

    def __call__(self, run: Pass, x: Any) -> Any:
        y = self.convolution(run, x)
        y = self.norm(run, y) if self.norm else y
        if not self.modified:
            return y
        channels, stride = self.convolution.outputs, self.convolution.stride
        return y + unit_map(x, channels=channels, stride=stride, before=self.before)


class PreActivation:
    """y = conv2(relu(norm2(conv1(a)))) + (x, or shortcut(a)), a = relu(norm1(x)); 3x3 kernels."""

    def __init__(self, name: str, inputs: int, channels: int, stride: int, kind: str):
        self.outputs = channels
        self.norm1 = BatchNorm(f"{name}/norm1", inputs)
        self.conv1 = _convolution(f"{name}/conv1", inputs, channels, 3, stride, 1)
        self.norm2 = BatchNorm(f"{name}/norm2", channels)
        self.conv2 = _convolution(f"{name}/conv2", channels, channels, 3, 1, 1)
        self.shortcut = _shortcut(name, inputs, channels, stride, norm=False, kind=kind)
        self.layers: Sequence[Layer] = (
            *(self.norm1, self.conv1, self.norm2, self.conv2),
            *(self.shortcut.layers if self.shortcut else ()),
        )

    def __call__(self, run: Pass, x: Any) -> Any:
        a = ops.relu(self.norm1(run, x))  # (inputs, N, h, w)
        skip = self.shortcut(run, a) if self.shortcut else x
        h = self.conv1(run, a)  # (channels, N, h / stride, w / stride)
        h = self.conv2(run, ops.relu(self.norm2(run, h)))
        return h + skip


class PostActivation:
    """y = relu(branch(x) + (x, or shortcut(x))): in the branch every convolution is followed by its
    norm, and all norms but the last by relu.

    kernels: size, outputs and stride of each convolution of the branch.
    """

    def __init__(self, name: str, inputs: int, kernels: Sequence[tuple[int, int, int]], kind: str):
        self.outputs, stride, n = kernels[-1][1], max(s for _, _, s in kernels), inputs
        self.branch: list[tuple[Convolution, BatchNorm]] = []
        for i, (size, outputs, step) in enumerate(kernels, start=1):
            conv = _convolution(f"{name}/conv{i}", n, outputs, size, step, size // 2)
            self.branch.append((conv, BatchNorm(f"{name}/norm{i}", outputs)))
            n = outputs
        self.shortcut = _shortcut(name, inputs, self.outputs, stride, norm=True, kind=kind)
        self.layers: Sequence[Layer] = (
            *(layer for pair in self.branch for layer in pair),
            *(self.shortcut.layers if self.shortcut else ()),
        )

    def __call__(self, run: Pass, x: Any) -> Any:
        skip, h = self.shortcut(run, x) if self.shortcut else x, x
        for i, (conv, norm) in enumerate(self.branch):
            h = norm(run, conv(run, ops.relu(h) if i else h))
        return ops.relu(h + skip)


Block = PreActivation | PostActivation
Make = Callable[[str, int, int, int], Block]  # of name, inputs, channels of the stage and stride


def _shortcut(
    name: str, inputs: int, outputs: int, stride: int, *, norm: bool, kind: str
) -> Shortcut | None:
    """None where the shape does not change."""
    if stride == 1 and inputs == outputs:
        return None
    return Shortcut(f"{name}/shortcut", inputs, outputs, stride, norm, kind)


def _blocks(stages: Sequence[Stage], inputs: int, make: Make) -> Iterator[Block]:
    """The blocks of all stages, in order; the first has `inputs` channels."""
    for s, stage in enumerate(stages):
        for b in range(stage.blocks):
            name = f"stages/{s:02d}/blocks/{b:02d}"
            block = make(name, inputs, stage.channels, stage.stride if b == 0 else 1)
            yield block
            inputs = block.outputs


class ResNet(Network):
    """The common part of the residual networks: stem, blocks, mean over each channel, linear."""

    shortcut: str
    width: int

    def _check(self) -> None:
        super()._check()
        if self.shortcut not in SHORTCUTS:
            known = ", ".join(SHORTCUTS)
            raise Error(f"unknown shortcut {self.shortcut!r}; use one of {known}")
        if self.width < 1:
            raise Error(f"{type(self).__name__}: width must be at least 1; got {self.width}")

    @property
    def stem(self) -> Convolution:
        """The first convolution."""
        raise NotImplementedError

    @property
    def norm(self) -> BatchNorm | None:
        """The norm after the stem, if there is one."""
        raise NotImplementedError

    @property
    def blocks(self) -> Sequence[Block]:
        """The blocks of all stages, in order."""
        raise NotImplementedError

    @cached_property
    def linear(self) -> Linear:
        """The last layer."""
        return Linear("linear", self.blocks[-1].outputs, self.outputs)

    @cached_property
    def layers(self) -> Sequence[Layer]:
        """Every layer, in definition order."""
        inner = [layer for block in self.blocks for layer in block.layers]
        return [self.stem, *filter(None, [self.norm]), *inner, self.linear]

    def forward(self, run: Pass, x: Any) -> Any:
        """Logits (N, outputs) for x (C, N, H, W)."""
        h = self.stem(run, x)  # (width, N, h, w)
        h = ops.relu(self.norm(run, h)) if self.norm else h
        h = self.pool(h)
        for block in self.blocks:
            h = block(run, h)  # (channels, N, h, w)
        features = label(ops.global_average_pool(h), "features")  # (channels, N)
        return self.linear(run, ops.transpose(features))  # (N, outputs)

    def pool(self, h: Any) -> Any:
        """The pooling between the stem and the blocks; none here."""
        return h


@dataclass(frozen=True)
class ResNet18(ResNet):
    """ResNet-18 for images of 32x32: a 3x3 stem of stride 1 and no pooling before the blocks.

    outputs: classes. image_shape: (channels, height, width). width: channels of the first of four
    stages, which double at each of the next. pre_activation: BN-ReLU-conv blocks, with **no** BN or
    ReLU after the last block, as the papers' authors used it (PreActResNet18 of
    kuangliu/pytorch-cifar); False gives the original conv-BN-ReLU blocks, with BN and ReLU after
    the stem. shortcut: "convolution" or "modified" (`Shortcut`). init: "authors" is PyTorch's
    default, uniform within 1 / sqrt(fan-in); torchvision, as torchvision's ResNets start; or he,
    orthogonal, xavier.

    11,171,146 parameters with 10 classes and 11,217,316 with 100; post-activated 11,173,962. Where
    the authors take means of 4x4 pixels, all there are at 32x32, this takes the mean of all.

    Parameters: "stem/weight", "stages/00/blocks/00/norm1/weight", ..., "linear/weight",
    "linear/bias". Buffers: "stages/00/blocks/00/norm1/running_mean", ...
    """

    outputs: int = 10
    image_shape: Any = (3, 32, 32)
    width: int = 64
    pre_activation: bool = True
    shortcut: str = "convolution"
    init: Any = "authors"

    @cached_property
    def stem(self) -> Convolution:
        """The first convolution."""
        return _convolution("stem", self.image_shape[0], self.width, 3, 1, 1)

    @cached_property
    def norm(self) -> BatchNorm | None:
        """After the stem; none in the pre-activated net."""
        return None if self.pre_activation else BatchNorm("norm", self.width)

    @cached_property
    def blocks(self) -> Sequence[Block]:
        """Two in each of four stages."""
        w = self.width
        stages = [Stage(2, w, 1), Stage(2, 2 * w, 2), Stage(2, 4 * w, 2), Stage(2, 8 * w, 2)]
        return list(_blocks(stages, w, self._block))

    def _block(self, name: str, inputs: int, channels: int, stride: int) -> Block:
        if self.pre_activation:
            return PreActivation(name, inputs, channels, stride, self.shortcut)
        kernels = [(3, channels, stride), (3, channels, 1)]
        return PostActivation(name, inputs, kernels, self.shortcut)


@dataclass(frozen=True)
class ResNet50(ResNet):
    """ResNet-50 for images of 224x224, "v1.5": a bottleneck's stride is in its 3x3 convolution.

    7x7 stem of stride 2, BN, ReLU, 3x3 max pooling of stride 2; 3, 4, 6 and 3 bottlenecks (1x1,
    3x3, 1x1 with four times the channels). Fields as `ResNet18`. 25,557,032 parameters with 1000
    classes, as torchvision's, which the Fromage experiments used.
    """

    outputs: int = 1000
    image_shape: Any = (3, 224, 224)
    width: int = 64
    shortcut: str = "convolution"
    init: Any = "authors"

    @cached_property
    def stem(self) -> Convolution:
        """The first convolution."""
        return _convolution("stem", self.image_shape[0], self.width, 7, 2, 3)

    @cached_property
    def norm(self) -> BatchNorm | None:
        """After the stem."""
        return BatchNorm("norm", self.width)

    @cached_property
    def blocks(self) -> Sequence[Block]:
        """Sixteen bottlenecks in four stages."""
        w = self.width
        stages = [Stage(3, w, 1), Stage(4, 2 * w, 2), Stage(6, 4 * w, 2), Stage(3, 8 * w, 2)]
        return list(_blocks(stages, w, self._block))

    def _block(self, name: str, inputs: int, channels: int, stride: int) -> Block:
        kernels = [(1, channels, 1), (3, channels, stride), (1, 4 * channels, 1)]
        return PostActivation(name, inputs, kernels, self.shortcut)

    def pool(self, h: Any) -> Any:
        """3x3 maxima of stride 2."""
        return ops.max_pool(h, size=3, stride=2, padding=1)
