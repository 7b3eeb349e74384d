"""EfficientNet-Lite0: a small network for images, of depthwise convolutions.

Source: Tan and Le 2019 ("EfficientNet"), in the form of TensorFlow's efficientnet-lite: no squeeze
and excitation, and relu6 in place of swish.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from npdrt import ops
from npdrt.models.layers import Layer, Network, Pass, Unit

FEATURES = 1280
UNUSED = ("_fc.",)  # arrays of the published file for what follows the features
STAGES = (  # blocks, kernel, stride of the first, expansion, channels
    (1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192), (1, 3, 1, 6, 320),
)  # fmt: skip


def relu6(x: Any) -> Any:
    """max(x, 0), at most 6."""
    return ops.minimum(ops.relu(x), 6.0)


class Same(Unit):
    """A `Unit` whose output has ceil(n / stride) pixels for n, zeros beyond the image: as many
    after it as before, or one more (TensorFlow's padding "SAME")."""

    def __init__(self, name: str, inputs: int, outputs: int, size: int, stride: int, groups: int):
        self.size, self.stride = size, stride
        padding = (size - 1) // 2 if stride == 1 else 0
        settings: dict[str, Any] = {"groups": groups, "activation": relu6}
        super().__init__(name, inputs, outputs, size, stride, padding, **settings)

    def __call__(self, run: Pass, x: Any) -> Any:
        if self.stride > 1:
            x = ops.pad(x, widths=((0, 0), (0, 0), *map(self._sides, x.shape[2:])))
        return super().__call__(run, x)

    def _sides(self, n: int) -> tuple[int, int]:
        """How many zeros before and after n pixels."""
        count = max((-(-n // self.stride) - 1) * self.stride + self.size - n, 0)
        return count // 2, count - count // 2


class Block:
    """More channels, a depthwise convolution, fewer channels; plus x where the shape is the same.

    The last convolution has no activation.
    """

    def __init__(
        self, name: str, inputs: int, outputs: int, size: int, stride: int, expansion: int
    ):
        wide = inputs * expansion
        self.skips = stride == 1 and inputs == outputs
        self.expand = None
        if expansion > 1:
            self.expand = Unit(f"{name}/expand", inputs, wide, 1, activation=relu6)
        self.depthwise = Same(f"{name}/depthwise", 1, wide, size, stride, groups=wide)
        self.project = Unit(f"{name}/project", wide, outputs, 1)
        parts = filter(None, (self.expand, self.depthwise, self.project))
        self.layers = [layer for part in parts for layer in part.layers]

    def __call__(self, run: Pass, x: Any) -> Any:
        h = self.expand(run, x) if self.expand else x  # (wide, N, H, W)
        h = self.project(run, self.depthwise(run, h))
        return h + x if self.skips else h


@dataclass(frozen=True)
class EfficientNetLite0(Network):
    """Images (N, 3, 224, 224), (pixel - 127) / 128 -> the features of the last pool, (N, 1280).

    3,371,008 parameters: "stem/conv/weight", ..., "blocks/03/depthwise/norm/bias", ...,
    "head/norm/bias".
    """

    outputs: int = FEATURES
    image_shape: Any = (3, 224, 224)
    init: Any = "authors"

    @cached_property
    def parts(self) -> Sequence[Any]:
        """Stem, blocks and head."""
        inputs = 32
        parts: list[Any] = [Same("stem", 3, inputs, 3, 2, groups=1)]
        for blocks, size, stride, expansion, outputs in STAGES:
            for k in range(blocks):
                name = f"blocks/{len(parts) - 1:02d}"
                parts.append(Block(name, inputs, outputs, size, 1 if k else stride, expansion))
                inputs = outputs
        return [*parts, Unit("head", inputs, FEATURES, 1, activation=relu6)]

    @property
    def layers(self) -> Sequence[Layer]:
        """Every layer, in definition order."""
        return [layer for part in self.parts for layer in part.layers]

    def forward(self, run: Pass, x: Any) -> Any:
        """Features (N, 1280) for x (3, N, H, W)."""
        for part in self.parts:
            x = part(run, x)
        return ops.transpose(ops.global_average_pool(x))

    def pytorch_names(self) -> dict[str, str]:
        """The name in efficientnet-lite-pytorch of every parameter and buffer."""
        names = [*self.shapes(), *(n for layer in self.layers for n in layer.buffers())]
        return {name: _pytorch_name(name) for name in names}


def _pytorch_name(name: str) -> str:
    *owner, part, kind, array = name.split("/")
    if not owner:
        known = {"stem": ("_conv_stem", "_bn0"), "head": ("_conv_head", "_bn1")}[part]
        return f"{known[kind == 'norm']}.{array}"
    norm = {"expand": "_bn0", "depthwise": "_bn1", "project": "_bn2"}[part]
    return f"_blocks.{int(owner[1])}.{norm if kind == 'norm' else f'_{part}_conv'}.{array}"
