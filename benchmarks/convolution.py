"""GFLOP/s of the convolutions of a ResNet, beside PyTorch's in both of its layouts.

The last three layers are depthwise convolutions of EfficientNet-Lite0.

The three products of a convolution in a training step, float32: its value ("forward"), the
derivative by its input and that by its weight. npdrt's are those that a program replays, into
memory that is there; PyTorch's are called without its autograd. 2 O (C / groups) kh kw N oh ow
operations each, for all libraries, however they go about it. All take turns, one call each, so that
a slow moment of the machine meets them all; the table has the operations over the median time,
npdrt's share of PyTorch's better rate in brackets, and the rate of a plain product of 2048 x 2048
in the same turns. The target is 0.65 of PyTorch's.

--errors measures no time, but the float32 results: max|difference| / max|reference| to float64's.

On a machine that others use too, `--one-thread` gives steadier numbers: every library on one
thread, and the least CPU time of it in all turns, which leaves out when others had the core.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import report
from step import machine

from npdrt.ops import blocked
from npdrt.ops.window import output_size
from npdrt.random import Random
from npdrt.train.bench import take_turns

TARGET = 0.65
SQUARE = 2048
PASSES = ("forward", "d input", "d weight")
Calls = dict[str, Callable[[], Any]]


class Layer(NamedTuple):
    """A convolution of C channels of size x size pixels to `out` channels."""

    channels: int
    out: int
    size: int
    kernel: int = 3
    stride: int = 1
    groups: int = 1

    @property
    def settings(self) -> dict[str, Any]:
        """Those of the convolution."""
        padding = self.kernel // 2
        return {"stride": (self.stride,) * 2, "padding": (padding, padding), "groups": self.groups}

    @property
    def made(self) -> tuple[int, int]:
        """The size of the result."""
        kernel, padding = (self.kernel,) * 2, (self.kernel // 2,) * 2
        return output_size((self.size,) * 2, kernel, (self.stride,) * 2, padding)

    def operations(self, batch: int) -> int:
        """Of each of the three products."""
        area = self.made[0] * self.made[1]
        return 2 * self.out * self.channels // self.groups * self.kernel**2 * batch * area

    def __str__(self) -> str:
        step = f" / {self.stride}" if self.stride > 1 else ""
        kernel = f"{self.kernel}x{self.kernel}{step}"
        groups = f", {self.groups} groups" if self.groups > 1 else ""
        return f"{self.channels} -> {self.out}, {kernel}, {self.size}x{self.size}{groups}"


LAYERS = (  # those of ResNet-18 for CIFAR, a bottleneck's 1x1, and depthwise ones
    *(Layer(3, 64, 32), Layer(64, 64, 32), Layer(64, 128, 32, 3, 2), Layer(64, 128, 32, 1, 2)),
    *(Layer(128, 128, 16), Layer(128, 256, 16, 3, 2), Layer(256, 256, 8)),
    *(Layer(256, 512, 8, 3, 2), Layer(512, 512, 4), Layer(256, 64, 32, 1)),
    *(Layer(144, 144, 56, 3, 1, 144), Layer(144, 144, 56, 5, 2, 144)),
    Layer(672, 672, 14, 5, 1, 672),
)


def arrays(layer: Layer, batch: int) -> tuple[Any, Any, Any]:
    """Images, weight and cotangent, channel-major."""
    source = Random(0, "benchmark/convolution")
    x = source.of("x").normal((layer.channels, batch, layer.size, layer.size))
    w = source.of("w").normal((layer.out, layer.channels // layer.groups, *(layer.kernel,) * 2))
    g = source.of("g").normal((layer.out, batch, *layer.made))
    return tuple(a.astype(np.float32) for a in (x, w, g))  # type: ignore[return-value]


def ours(layer: Layer, x: Any, w: Any, g: Any) -> Calls:
    """What a program replays."""
    kept = [np.empty_like(a) for a in (g, x, w)]
    sizes = {"size": x.shape[2:]}, {"size": w.shape[2:]}
    return {
        "forward": partial(blocked.convolve, x, w, kept[0], **layer.settings),
        "d input": partial(blocked.convolve_input, g, w, kept[1], **sizes[0], **layer.settings),
        "d weight": partial(blocked.convolve_weight, g, x, kept[2], **sizes[1], **layer.settings),
    }


def torchs(layer: Layer, x: Any, w: Any, g: Any, layout: str) -> Calls:
    """PyTorch, on images (N, C, H, W) in one of its memory layouts."""
    import torch

    form = {"memory_format": getattr(torch, f"{layout}_format", None) or getattr(torch, layout)}
    images, cotangent = (torch.tensor(a).permute(1, 0, 2, 3).contiguous(**form) for a in (x, g))
    weight, same = torch.tensor(w).contiguous(**form), layer.settings

    def backward(*wanted: bool) -> Any:
        return torch.ops.aten.convolution_backward(
            cotangent, images, weight, None, same["stride"], same["padding"], (1, 1), False, (0, 0),
            layer.groups, wanted,
        )  # fmt: skip

    return {
        "forward": lambda: torch.nn.functional.conv2d(
            images, weight, None, same["stride"], same["padding"], groups=layer.groups
        ),
        "d input": partial(backward, True, False, False),
        "d weight": partial(backward, False, True, False),
    }


def least_cpu_time(calls: Calls, turns: int) -> dict[str, list[float]]:
    """The least CPU time of this thread in each call, on one thread, after a turn untimed."""
    import threadpoolctl

    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    least = dict.fromkeys(calls, float("inf"))
    with threadpoolctl.threadpool_limits(1):
        for turn in range(turns + 1):
            for name, call in calls.items():
                start = time.thread_time()
                call()
                if turn:
                    least[name] = min(least[name], time.thread_time() - start)
    return {name: [seconds] for name, seconds in least.items()}


def measure(layer: Layer, batch: int, turns: int, timed: Any = take_turns) -> dict[str, Any]:
    """Seconds of every call by library and product, and of the plain one; timed: as `take_turns`
    does."""
    given = arrays(layer, batch)
    libraries = {"npdrt": ours(layer, *given)}
    try:
        for layout in ("contiguous", "channels_last"):
            libraries[f"PyTorch {layout}"] = torchs(layer, *given, layout)
    except ImportError as error:
        print(f"PyTorch is left out: {error}", file=sys.stderr)
    square = np.linspace(-1, 1, SQUARE**2, dtype=np.float32).reshape(SQUARE, SQUARE)
    plain = partial(np.matmul, square, square.copy(), out=np.empty_like(square))
    calls = {f"{name}: {p}": call for name, made in libraries.items() for p, call in made.items()}
    seconds = timed({**calls, "SGEMM": plain}, turns)
    return {"layer": str(layer), "operations": layer.operations(batch), "seconds": seconds}


def rates(result: dict[str, Any]) -> dict[str, float]:
    """GFLOP/s of every call."""
    found = {}
    for name, seconds in result["seconds"].items():
        operations = 2 * SQUARE**3 if name == "SGEMM" else result["operations"]
        found[name] = operations / statistics.median(seconds) / 1e9
    return found


def text_of(results: list[dict[str, Any]]) -> str:
    """The results as Markdown."""
    peers = [f"PyTorch {layout}" for layout in ("contiguous", "channels_last")]
    heads = ("layer", *(f"npdrt {p}" for p in PASSES), *peers, "SGEMM 2048")
    rows = []
    for result in results:
        found, cells = rates(result), []
        for p in PASSES:
            best = max((found[f"{peer}: {p}"] for peer in peers if f"{peer}: {p}" in found),
                       default=None)  # fmt: skip
            mine = found[f"npdrt: {p}"]
            cells.append(f"{mine:.0f}" + (f" ({mine / best:.2f})" if best else ""))
        for peer in peers:
            known = [found[f"{peer}: {p}"] for p in PASSES if f"{peer}: {p}" in found]
            cells.append(" / ".join(f"{rate:.0f}" for rate in known))
        rows.append((result["layer"], *cells, f"{found['SGEMM']:.0f}"))
    return report.table(heads, rows)


def errors(layer: Layer, batch: int) -> tuple[str, ...]:
    """A row: the float32 errors of every library's three products."""
    single = arrays(layer, batch)
    exact = ours(layer, *(a.astype(np.float64) for a in single))
    reference = {p: call() for p, call in exact.items()}
    cells = [_errors(ours(layer, *single), reference, lambda a: a)]
    for layout in ("contiguous", "channels_last"):
        cells.append(_errors(torchs(layer, *single, layout), reference, _from_torch))
    return str(layer), *cells


def _errors(calls: Calls, reference: dict[str, Any], array: Callable[[Any], Any]) -> str:
    found = {p: array(call()) for p, call in calls.items()}
    sizes = {p: np.abs(found[p] - y).max() / np.abs(y).max() for p, y in reference.items()}
    return " / ".join(f"{size:.1e}" for size in sizes.values())


def _from_torch(found: Any) -> Any:
    """An image or weight, in npdrt's order of axes."""
    if isinstance(found, tuple):
        images, weight, _ = found
        return weight.numpy() if images is None else images.permute(1, 0, 2, 3).numpy()
    return found.permute(1, 0, 2, 3).numpy()


def main() -> None:
    """Measure every layer."""
    parser = report.parser(__doc__)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--turns", type=int, default=7, help="timed calls of each")
    parser.add_argument("--layers", type=int, nargs="+", help="which, by number from 0; else all")
    parser.add_argument("--one-thread", action="store_true", help="CPU time of one thread")
    parser.add_argument("--errors", action="store_true", help="of float32, in place of the rates")
    given = parser.parse_args()
    chosen = [LAYERS[k] for k in given.layers] if given.layers else LAYERS
    if given.errors:
        heads = ("layer", "npdrt", "PyTorch contiguous", "PyTorch channels_last")
        rows = [errors(layer, given.batch_size) for layer in chosen]
        report.publish(report.table(heads, rows), machine(), rows, given.output)
        return
    timed = least_cpu_time if given.one_thread else take_turns
    results = [measure(layer, given.batch_size, given.turns, timed) for layer in chosen]
    report.publish(text_of(results), machine(), results, given.output)


if __name__ == "__main__":
    main()
