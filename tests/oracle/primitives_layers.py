"""Primitives of layers, from normalisation to pooling: cases, references and tolerances."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from .dual import Dual, constants, dual, each, exp, fill, mean, sqrt, total
from .primitives_case import (
    INF,
    NAN,
    Draw,
    PrimitiveCase,
    Reference,
    apart,
    case,
    fixed,
    near,
    normal,
    positive,
)

# --- cases -------------------------------------------------------------------------------

LARGE_MEAN = fixed([[4096.5, 4097.25, 4098.75, 4095.5], [-8191, -8192.5, -8190.5, -8194]])


def booleans(values: Any) -> Any:
    """A mask of 0 and 1."""
    return np.array(values, dtype=np.bool_)


NORMALISATION = [
    case("batch_norm", "channels first", normal(2, 3, 2, 2), positive(2), normal(2), channel_axis=0)
    .flag("BROADCAST"),
    case("batch_norm", "channels last", normal(4, 3), positive(3), normal(3), channel_axis=-1)
    .flag("BROADCAST"),
    case("batch_norm", "channels between", normal(3, 2, 2), positive(2), normal(2), channel_axis=1)
    .flag("BROADCAST"),
    case("batch_norm", "neither gain nor bias", normal(2, 5), channel_axis=0),
    case("batch_norm", "a gain alone", normal(5, 2), normal(2), channel_axis=1).flag("BROADCAST"),
    case("batch_norm", "a large eps", normal(2, 5), positive(2), normal(2), channel_axis=0, eps=0.5)
    .flag("BROADCAST"),
    case("batch_norm", "a small eps", normal(2, 5), positive(2), normal(2), channel_axis=0,
         eps=1e-8).flag("BROADCAST"),
    case("batch_norm", "two values a channel", normal(3, 2), positive(3), normal(3), channel_axis=0,
         eps=0.5),
    case("batch_norm", "long sums", normal(2, 24), positive(2), normal(2), channel_axis=0),
    case("batch_norm", "a large mean loses nothing", LARGE_MEAN, positive(2), normal(2),
         channel_axis=0).flag("CANCELLATION"),
    case("batch_norm", "equal values", fixed([[2, 2, 2], [0, 0, 0]]), positive(2), normal(2),
         channel_axis=0).flag("ZERO"),
    case("batch_norm", "squares that underflow beside eps", fixed([[1e-25, -3e-25, 2e-25]]),
         channel_axis=0).flag("UNDERFLOW"),
    case("batch_norm", "a gain of 0", normal(2, 4), fixed([0, 2]), normal(2), channel_axis=0)
    .flag("ZERO"),
    case("batch_norm", "a NaN stays in its channel", fixed([[NAN, 1, 2], [1, 2, 4]]), positive(2),
         normal(2), channel_axis=0).flag("NAN"),
    case("batch_norm_inference", "channels first", normal(2, 3, 2, 2), normal(2), positive(2),
         positive(2), normal(2), channel_axis=0).fix(1, 2).flag("BROADCAST"),
    case("batch_norm_inference", "channels last", normal(4, 3), normal(3), positive(3), positive(3),
         normal(3), channel_axis=-1).fix(1, 2).flag("BROADCAST"),
    case("batch_norm_inference", "neither gain nor bias", normal(2, 5), normal(2), positive(2),
         channel_axis=0).fix(1, 2),
    case("batch_norm_inference", "a batch of one", normal(1, 3), normal(3), positive(3),
         positive(3), normal(3), channel_axis=1).fix(1, 2),
    case("batch_norm_inference", "a large eps", normal(2, 5), normal(2), positive(2), normal(2),
         channel_axis=0, eps=0.5).fix(1, 2),
    case("batch_norm_inference", "zero variance", normal(2, 3), normal(2), fixed([0, 0]),
         positive(2), normal(2), channel_axis=0).fix(1, 2).flag("ZERO"),
    case("batch_norm_inference", "near its mean", near(1.0, 1, -3, 2, 5), fixed([1, 1, 1, 1]),
         positive(4), positive(4), channel_axis=0).fix(1, 2).flag("CANCELLATION"),
    case("batch_norm_inference", "a NaN stays where it is", fixed([[NAN, 1], [1, 2]]), normal(2),
         positive(2), positive(2), normal(2), channel_axis=0).fix(1, 2).flag("NAN"),
    case("batch_norm_inference", "no batch", normal(2, 0, 3), normal(2), positive(2), positive(2),
         normal(2), channel_axis=0).fix(1, 2).flag("EMPTY"),
    case("layer_norm", "gain and bias", normal(3, 4), positive(4), normal(4)).flag("BROADCAST"),
    case("layer_norm", "neither gain nor bias", normal(3, 4)),
    case("layer_norm", "a gain alone", normal(3, 4), normal(4)).flag("BROADCAST"),
    case("layer_norm", "two batch axes", normal(2, 2, 3), positive(3), normal(3))
    .flag("BROADCAST"),
    case("layer_norm", "two axes", normal(2, 2, 3), positive(2, 3), normal(2, 3), axes=(1, 2))
    .flag("BROADCAST"),
    case("layer_norm", "axes that are not the last", normal(2, 3, 2), positive(2, 3), normal(2, 3),
         axes=(0, 1)).flag("BROADCAST"),
    case("layer_norm", "axes apart", normal(2, 3, 2), positive(2, 2), normal(2, 2), axes=(-1, 0))
    .flag("BROADCAST"),
    case("layer_norm", "one row", normal(5), positive(5), normal(5)),
    case("layer_norm", "a large eps", normal(2, 4), positive(4), normal(4), eps=0.5),
    case("layer_norm", "long sums", normal(2, 24), positive(24), normal(24)),
    case("layer_norm", "rows nearly constant", LARGE_MEAN, positive(4), normal(4))
    .flag("CANCELLATION"),
    case("layer_norm", "equal values", fixed([[2, 2, 2], [0, 0, 0]]), positive(3), normal(3))
    .flag("ZERO"),
    case("layer_norm", "one feature: the bias", normal(3, 1), positive(1), normal(1)).fix(0, 1)
    .flag("ZERO"),
    case("layer_norm", "squares that underflow beside eps", fixed([[1e-25, -3e-25, 2e-25]]))
    .flag("UNDERFLOW"),
    case("layer_norm", "a NaN stays in its row", fixed([[NAN, 1, 2], [1, 2, 4]])).flag("NAN"),
    case("layer_norm", "a NaN reaches the gain", fixed([[NAN, 1, 2], [1, 2, 4]]), positive(3),
         normal(3)).flag("NAN"),
    case("layer_norm", "no rows", normal(0, 3), positive(3), normal(3)).flag("EMPTY"),
    case("weight_norm", "rows", normal(3, 4)),
    case("weight_norm", "rows and gain", normal(3, 4), normal(3)),
    case("weight_norm", "kernels", normal(2, 2, 2, 2), positive(2)),
    case("weight_norm", "an eps shortens", normal(3, 4), positive(3), eps=0.1),
    case("weight_norm", "one element: its sign", fixed([[-2.0], [0.5]]), positive(2), eps=0.25),
    case("weight_norm", "long rows", normal(2, 24), normal(2)),
    case("weight_norm", "large and small rows", fixed([[3e15, -4e15], [3e-15, 4e-15]]), normal(2)),
    case("weight_norm", "zero rows beside eps", fixed([[0, 0], [3, 4]]), positive(2), eps=0.1)
    .flag("ZERO"),
    case("weight_norm", "a zero row without eps", fixed([[0, 0], [3, 4]]))
    .flag("ZERO", "NAN", "CONVENTION")
    .gives([[NAN, NAN], [0.6, 0.8]], [[NAN, NAN], [0.032, -0.024]]).within(32),
    case("weight_norm", "a gain of 0", normal(2, 3), fixed([0, 2])).flag("ZERO"),
    case("weight_norm", "a NaN stays in its row", fixed([[NAN, 1], [3, 4]]), normal(2))
    .flag("NAN"),
    case("weight_norm", "no rows", normal(0, 3), normal(0)).flag("EMPTY"),
    case("entry_norm", "ordinary values", normal(3, 4), eps=0.1),
    case("entry_norm", "a small eps", normal(3, 4), eps=1e-5),
    case("entry_norm", "0-d", fixed(0.75), eps=0.25).flag("SCALAR"),
    case("entry_norm", "zero and small", fixed([0, 1e-3, -1e-3, 2.0**-20]), eps=0.1).flag("ZERO"),
    case("entry_norm", "large", fixed([-1e6, 300, 1e4]), eps=0.1),
    case("entry_norm", "squares that underflow beside eps", fixed([1e-25, -3e-25]), eps=0.1)
    .flag("UNDERFLOW"),
    case("entry_norm", "NaN", fixed([NAN, 1]), eps=0.25).flag("NAN"),
    case("entry_norm", "no elements", normal(0, 3), eps=0.1).flag("EMPTY"),
]  # fmt: skip

KEEP = booleans([[1, 0, 1, 1], [0, 1, 1, 0], [1, 1, 0, 1]])

DROPOUT = [
    case("dropout", "half", normal(3, 4), KEEP, rate=0.5),
    case("dropout", "a fifth", normal(3, 4), KEEP, rate=0.2),
    case("dropout", "a factor that is rounded", normal(3, 4), KEEP, rate=0.1),
    case("dropout", "whole rows", normal(3, 4), booleans([[1], [0], [1]]), rate=0.25),
    case("dropout", "one row of the mask for all", normal(2, 3), booleans([1, 0, 1]), rate=0.25),
    case("dropout", "no mask: evaluation", normal(2, 3), rate=0.5),
    case("dropout", "a rate of 0", normal(2, 2), booleans([[1, 1], [1, 1]]), rate=0.0).flag("ZERO"),
    case("dropout", "all dropped", normal(2, 2), booleans([[0, 0], [0, 0]]), rate=0.5).flag("ZERO"),
    case("dropout", "0-d", fixed(2.5), booleans(True), rate=0.5).flag("SCALAR"),
    case("dropout", "NaN and inf times 0", fixed([NAN, INF, NAN, -INF]), booleans([0, 0, 1, 1]),
         rate=0.5).flag("NAN", "INF", "CONVENTION")
    .gives([NAN, NAN, NAN, -INF], [0, 0, 2, 2], None),
    case("dropout", "no elements", normal(0, 3), np.zeros((0, 3), dtype=np.bool_), rate=0.5)
    .flag("EMPTY"),
]  # fmt: skip

Q, K, V = normal(2, 3, 2), normal(2, 4, 2), normal(2, 4, 2)
MASK = booleans([[1, 0, 1, 1], [0, 1, 0, 0], [1, 1, 1, 0]])
DROPPED = booleans([[[1, 0, 1, 1], [1, 1, 0, 1], [0, 1, 1, 1]],
                    [[1, 1, 1, 1], [0, 0, 1, 0], [1, 1, 0, 1]]])  # fmt: skip
ONE = (normal(1, 2), normal(3, 2), normal(3, 3))

ATTENTION = [
    case("attention", "two heads", Q, K, V),
    case("attention", "batch and heads", normal(2, 2, 2, 2), normal(2, 2, 2, 2),
         normal(2, 2, 2, 1)),
    case("attention", "no leading axis, one query", *ONE),
    case("attention", "one key", normal(3, 2), normal(1, 2), normal(1, 1)),
    case("attention", "another scale", normal(3, 2), normal(2, 2), normal(2, 2), scale=2.5),
    case("attention", "causal", normal(2, 3, 2), normal(2, 3, 2), normal(2, 3, 2), causal=True),
    case("attention", "causal, more queries than keys", normal(4, 2), normal(2, 2), normal(2, 2),
         causal=True),
    case("attention", "causal, more keys than queries", normal(2, 2), normal(4, 2), normal(4, 2),
         causal=True),
    case("attention", "a boolean mask", Q, K, V, MASK).flag("BROADCAST"),
    case("attention", "a mask of padding", normal(2, 2, 2, 2), normal(2, 2, 3, 2),
         normal(2, 2, 3, 1), booleans([[[[1, 1, 0]]], [[[1, 0, 0]]]])).flag("BROADCAST"),
    case("attention", "a boolean mask, causal", normal(3, 2), normal(4, 2), normal(4, 2), MASK,
         causal=True),
    case("attention", "an additive mask", Q, K, V, normal(2, 3, 4)),
    case("attention", "an additive mask for all heads", Q, K, V, normal(3, 4)).flag("BROADCAST"),
    case("attention", "an additive mask of keys", Q, K, V, normal(2, 1, 4)).flag("BROADCAST"),
    case("attention", "an additive mask with -inf", normal(2, 2), normal(3, 2), normal(3, 2),
         fixed([[0, -INF, 1], [-INF, 2, -INF]])).flag("INF"),
    case("attention", "a query that may attend to nothing", normal(3, 2), normal(4, 2),
         normal(4, 2), booleans([[1, 0, 1, 1], [0, 0, 0, 0], [1, 1, 1, 0]]))
    .flag("ZERO", "CONVENTION"),
    case("attention", "a query with a row of -inf", normal(2, 2), normal(2, 2), normal(2, 2),
         fixed([[-INF, -INF], [0, 1]])).flag("ZERO", "INF", "CONVENTION"),
    case("attention", "causal, and the first key masked", normal(2, 2), normal(2, 2), normal(2, 2),
         booleans([[0, 1], [0, 1]]), causal=True).flag("ZERO", "CONVENTION"),
    case("attention", "dropout", Q, K, V, booleans([[1, 1, 1, 1]]), DROPPED, rate=0.25),
    case("attention", "dropout and causal", Q, K, V, booleans([[1, 1, 1, 1]]), DROPPED,
         causal=True, rate=0.5),
    case("attention", "dropout of all keys", normal(1, 2), normal(2, 2), normal(2, 2),
         booleans([[1, 1]]), booleans([[0, 0]]), rate=0.5).flag("ZERO"),
    case("attention", "large scores", fixed([[1024, 0]]),
         fixed([[8, 1], [-8, 2], [8 - 2.0**-11, 3]]), normal(3, 2), scale=1.0).flag("LARGE_LOGITS"),
    case("attention", "large and equal scores", fixed([[1024, 0]]), fixed([[8, 1], [8, -1]]),
         normal(2, 2), scale=1.0).flag("LARGE_LOGITS"),
    case("attention", "zeros: the mean of the values", fixed(np.zeros((2, 2))), normal(3, 2),
         normal(3, 2)).flag("ZERO"),
    case("attention", "a NaN in a query", fixed([[NAN, 1], [1, 2]]), normal(3, 2), normal(3, 2))
    .flag("NAN"),
    case("attention", "no queries", normal(2, 0, 2), normal(2, 3, 2), normal(2, 3, 2))
    .flag("EMPTY"),
    case("attention", "no heads", normal(0, 3, 2), normal(0, 3, 2), normal(0, 3, 2))
    .flag("EMPTY"),
]  # fmt: skip

IMAGE = normal(2, 2, 4, 4)  # channels, images, height, width
GREY = normal(1, 1, 4, 4)

CONVOLUTIONS = [
    case("conv2d", "3x3", IMAGE, normal(2, 2, 3, 3), normal(2)),
    case("conv2d", "3x3, padded", normal(2, 1, 4, 4), normal(2, 2, 3, 3), normal(2), padding=1),
    case("conv2d", "3x3, stride 2, padded", normal(2, 1, 4, 4), normal(2, 2, 3, 3), stride=2,
         padding=1),
    case("conv2d", "3x3, stride 2: a pixel that none sees", normal(1, 2, 4, 4), normal(2, 1, 3, 3),
         stride=2),
    case("conv2d", "1x1", normal(3, 2, 2, 2), normal(2, 3, 1, 1), normal(2)),
    case("conv2d", "1x1, stride 2", IMAGE, normal(3, 2, 1, 1), stride=2),
    case("conv2d", "2x3, of another stride and padding each way", normal(1, 2, 3, 4),
         normal(2, 1, 2, 3), normal(2), stride=(1, 2), padding=(0, 1)),
    case("conv2d", "even kernels", normal(1, 2, 3, 3), normal(2, 1, 2, 2), padding=1),
    case("conv2d", "a stride beyond the kernel", normal(1, 1, 5, 5), normal(1, 1, 2, 2), stride=3),
    case("conv2d", "a padding as large as the kernel", normal(1, 1, 2, 2), normal(1, 1, 2, 2),
         padding=2),
    case("conv2d", "the kernel is the image", normal(2, 2, 3, 3), normal(2, 2, 3, 3), normal(2)),
    case("conv2d", "groups", normal(4, 1, 3, 3), normal(2, 2, 2, 2), normal(2), groups=2),
    case("conv2d", "depthwise, two outputs a channel", normal(2, 1, 3, 3), normal(4, 1, 3, 3),
         padding=1, groups=2),
    case("conv2d", "zero images", fixed(np.zeros((1, 1, 3, 3))), normal(1, 1, 2, 2), normal(1))
    .flag("ZERO"),
    case("conv2d", "the bias cancels the product", fixed([[[[1, 0.5], [2, 3]]]]),
         fixed([[[[3, 2], [1, 1]]]]), near(-9.0, 1)).flag("CANCELLATION"),
    case("conv2d", "a NaN reaches the windows that see it",
         fixed([[[[NAN, 1, 2], [3, 4, 5], [6, 7, 8]]]]), fixed([[[[1, 2], [3, 4]]]])).flag("NAN")
    .gives([[[[NAN, 37], [57, 67]]]], [[[[1, 3, 2], [4, 10, 6], [3, 7, 4]]]],
           [[[[NAN, 12], [20, 24]]]]),
    case("conv2d", "an infinity", fixed([[[[INF, 1], [2, 3]]]]), fixed([[[[2]]]])).flag("INF")
    .gives([[[[INF, 2], [4, 6]]]], [[[[2, 2], [2, 2]]]], [[[[INF]]]]),
]  # fmt: skip


def poolings() -> Iterator[PrimitiveCase]:
    """Windows of every kind, for the mean and the maximum."""
    makes: dict[str, Callable[..., Draw]] = {"average_pool": normal, "max_pool": apart}
    for name, make in makes.items():
        yield case(name, "2x2", make(2, 2, 4, 4), size=2)
        yield case(name, "3x3, stride 2, padded", make(1, 2, 4, 4), size=3, stride=2, padding=1)
        yield case(name, "windows that overlap", make(1, 1, 4, 4), size=3, stride=1)
        yield case(name, "pixels that none sees", make(1, 1, 5, 5), size=2, stride=3)
        yield case(name, "2x3, of another stride and padding each way", make(1, 2, 4, 5),
                   size=(2, 3), stride=(1, 2), padding=(1, 0))  # fmt: skip
        yield case(name, "the window is the image", make(2, 1, 2, 3), size=(2, 3))
        yield case(name, "1x1", make(1, 2, 2, 2), size=1)
        yield case(name, "a NaN reaches its window", fixed([[[[NAN, 1, 2, 3]]]]), size=(1, 2)).flag(
            "NAN"
        ).gives([[[[NAN, 2.5 if make is normal else 3]]]],
                [[[[0.5, 0.5, 0.5, 0.5]]]] if make is normal else [[[[1, 0, 0, 1]]]])  # fmt: skip


POOLING = [
    *poolings(),
    case("average_pool", "zeros beyond the image count", fixed(np.ones((1, 1, 2, 2))), size=2,
         padding=1),
    case("average_pool", "neighbours cancel", fixed([[[[1, -1, 4096.5, -4096]]]]), size=(1, 2))
    .flag("CANCELLATION"),
    case("average_pool", "zeros", fixed(np.zeros((1, 1, 2, 2))), size=2).flag("ZERO"),
    case("average_pool", "infinite", fixed([[[[INF, 1, INF, -INF]]]]), size=(1, 2))
    .flag("INF", "NAN").gives([[[[INF, NAN]]]], [[[[0.5, 0.5, 0.5, 0.5]]]]),
    case("max_pool", "tie: the first takes all", fixed([[[[1, 3, 2, 2], [3, 3, 2, 2]]]]), size=2)
    .flag("TIE"),
    case("max_pool", "tie in windows that overlap", fixed([[[[7, 7, 7], [1, 7, 7], [7, 0, 7]]]]),
         size=2, stride=1).flag("TIE"),
    case("max_pool", "zeros beyond the image do not count", fixed([[[[-1, -2], [-3, -4]]]]), size=2,
         padding=1),
    case("max_pool", "infinite", fixed([[[[INF, 1, -INF, 0]]]]), size=(1, 2)).flag("INF")
    .gives([[[[INF, 0]]]], [[[[1, 0, 0, 1]]]]),
    case("max_pool", "nothing but -inf", fixed([[[[-INF, -INF]]]]), size=(1, 2))
    .flag("INF", "TIE").gives([[[[-INF]]]], [[[[1, 0]]]]),
    case("max_pool", "a window of NaN: the first", fixed([[[[NAN, NAN]]]]), size=(1, 2))
    .flag("NAN", "CONVENTION").gives([[[[NAN]]]], [[[[1, 0]]]]),
    case("global_average_pool", "ordinary values", normal(2, 2, 3, 2)),
    case("global_average_pool", "one pixel", normal(3, 2, 1, 1)),
    case("global_average_pool", "long", positive(1, 1, 4, 6)),
    case("global_average_pool", "zeros", fixed(np.zeros((1, 2, 2, 2)))).flag("ZERO"),
    case("global_average_pool", "a NaN stays in its image",
         fixed([[[[NAN, 1]], [[2, 3]]]])).flag("NAN")
    .gives([[NAN, 2.5]], [[[[0.5, 0.5]], [[0.5, 0.5]]]]),
]  # fmt: skip

CASES = (*NORMALISATION, *DROPOUT, *ATTENTION, *CONVOLUTIONS, *POOLING)

# --- references ------------------------------------------------------------------------------


def _standardised(row: list[Dual], eps: float) -> list[Dual]:
    """(x - mean) / sqrt(variance + eps)."""
    centre = mean(row)
    centred = [x - centre for x in row]
    size = sqrt(total([c * c for c in centred]) / len(row) + eps)
    return [c / size for c in centred]


def _along(x: Any, axes: list[int], function: Callable[[list[Dual]], list[Dual]]) -> Any:
    """`function` of the elements in `axes`, for every place in the others."""
    kept = [a for a in range(x.ndim) if a not in axes]
    out = np.empty(x.shape, dtype=object).transpose(kept + axes)
    inner = out.shape[len(kept) :]
    for place in np.ndindex(out.shape[: len(kept)]):
        row = x.transpose(kept + axes)[place].reshape(-1).tolist()
        out[place] = fill(inner, function(row))
    return out.transpose(np.argsort(kept + axes).tolist())


def _scaled(x: Any, axes: list[int], gain: Any, bias: Any) -> Any:
    """gain x + bias, whose axes are `axes` of x."""
    shape = [n if a in axes else 1 for a, n in enumerate(x.shape)]
    x = x if gain is None else x * gain.reshape(shape)
    return x if bias is None else x + bias.reshape(shape)


def batch_norm(
    x: Any, gain: Any = None, bias: Any = None, *, channel_axis: int, eps: float = 1e-5
) -> Any:
    """gain (x - mean) / sqrt(variance + eps) + bias, of each channel over all else."""
    channel = channel_axis % x.ndim
    others = [a for a in range(x.ndim) if a != channel]
    normal = _along(x, others, lambda row: _standardised(row, eps))
    return _scaled(normal, [channel], gain, bias)


def _batch_norm_inference(
    x: Any,
    mean: Any,
    variance: Any,
    gain: Any = None,
    bias: Any = None,
    *,
    channel_axis: int,
    eps: float,
) -> Any:
    channel = [channel_axis % x.ndim]
    inverse = each(lambda v: 1 / sqrt(v + eps), variance)
    normal = _scaled(_scaled(x, channel, None, -mean), channel, inverse, None)
    return _scaled(normal, channel, gain, bias)


def layer_norm(
    x: Any, gain: Any = None, bias: Any = None, *, axes: Any = -1, eps: float = 1e-5
) -> Any:
    """gain (x - mean) / sqrt(variance + eps) + bias, over `axes` of each x."""
    chosen = sorted(a % x.ndim for a in ([axes] if isinstance(axes, int) else axes))
    normal = _along(x, chosen, lambda row: _standardised(row, eps))
    return _scaled(normal, chosen, gain, bias)


def weight_norm(w: Any, gain: Any = None, *, eps: float = 0.0) -> Any:
    """gain w / sqrt(eps + |w|^2), of each row."""

    def unit(row: list[Dual]) -> list[Dual]:
        size = sqrt(total([x * x for x in row]) + eps)
        return [x / size for x in row]

    return _scaled(_along(w, list(range(1, w.ndim)), unit), [0], gain, None)


def entry_norm(w: Any, *, eps: float) -> Any:
    """w / sqrt(eps + w^2), of each entry."""
    return each(lambda x: x / sqrt(x * x + eps), w)


def _dropout(x: Any, keep: Any = None, *, rate: float) -> Any:
    return x if keep is None else x * constants(keep) / (1 - Dual(rate))


def attention(
    q: Any,
    k: Any,
    v: Any,
    mask: Any = None,
    keep: Any = None,
    *,
    causal: bool = False,
    scale: float | None = None,
    rate: float = 0.0,
) -> Any:
    """For every query the mean of the values, weighted by exp(scale q k + mask); zeros where it
    may attend to no key."""
    (*lead, queries, width), keys = q.shape, k.shape[-2]
    shape = (*lead, queries, keys)
    factor = 1 / sqrt(Dual(width)) if scale is None else Dual(scale)
    added = np.broadcast_to(constants(0.0) if mask is None else _additive(mask), shape)
    kept = np.broadcast_to(True if keep is None else keep, shape)
    out = np.empty((*lead, queries, v.shape[-1]), dtype=object)
    for *head, i in np.ndindex((*lead, queries)):
        h = tuple(head)
        open_ = [
            j for j in range(keys)
            if added[(*h, i, j)].value != -INF and (j <= i or not causal)
        ]  # fmt: skip
        weights = {
            j: exp(total(list(q[(*h, i)] * k[(*h, j)])) * factor + added[(*h, i, j)]) for j in open_
        }
        whole = total(list(weights.values()))
        seen = [j for j in open_ if kept[(*h, i, j)]]
        for e in range(v.shape[-1]):
            mixed = [weights[j] / whole * v[(*h, j, e)] for j in seen]
            out[(*h, i, e)] = total(mixed) / (1 - Dual(rate))
    return out


def _additive(mask: Any) -> Any:
    """-inf where a boolean mask is false."""
    return constants(np.where(mask, 0.0, -INF)) if mask.dtype == np.bool_ else mask


def _pair(n: Any) -> tuple[int, int]:
    return (n, n) if isinstance(n, int) else tuple(n)


Windows = Iterator[tuple[tuple[int, int], list[tuple[tuple[int, int], tuple[int, int]]]]]


def _windows(image: Any, size: Any, stride: Any, padding: Any) -> Windows:
    """Every place of a window, with its (places in it, pixels) inside of the image."""
    (kh, kw), (sh, sw), (ph, pw) = (_pair(n) for n in (size, stride, padding))
    height, width = image
    rows, columns = (height + 2 * ph - kh) // sh + 1, (width + 2 * pw - kw) // sw + 1
    for i, j in itertools.product(range(rows), range(columns)):
        taps = (((a, b), (i * sh + a - ph, j * sw + b - pw)) for a in range(kh) for b in range(kw))
        yield (i, j), [(t, (y, x)) for t, (y, x) in taps if 0 <= y < height and 0 <= x < width]


def _of_windows(out: int, x: Any, windows: Windows, value: Callable[..., Dual]) -> Any:
    """(out, N, rows, columns) of value(output channel, image, the window's places)."""
    places = list(windows)
    shape = (out, x.shape[1], *(1 + n for n in places[-1][0]))
    channels = itertools.product(range(out), range(x.shape[1]))
    return fill(shape, [value(o, n, seen) for o, n in channels for _, seen in places])


def conv2d(
    x: Any, weight: Any, bias: Any = None, *, stride: Any = 1, padding: Any = 0, groups: int = 1
) -> Any:
    """The cross-correlation of images (C, N, H, W) with (O, C / groups, kh, kw)."""
    out, inner, *kernel = weight.shape

    def value(o: int, n: int, seen: Any) -> Dual:
        first = o // (out // groups) * inner
        products = [
            weight[o, c, *tap] * x[first + c, n, *pixel]
            for c in range(inner)
            for tap, pixel in seen
        ]
        return total(products) + (0 if bias is None else bias[o])

    return _of_windows(out, x, _windows(x.shape[2:], tuple(kernel), stride, padding), value)


def _average_pool(x: Any, *, size: Any, stride: Any, padding: Any) -> Any:
    """Zeros beyond the image count."""
    count = math.prod(_pair(size))

    def averaged(c: int, n: int, seen: Any) -> Dual:
        return total([x[c, n, *pixel] for _, pixel in seen]) / count

    windows = _windows(x.shape[2:], size, size if stride is None else stride, padding)
    return _of_windows(x.shape[0], x, windows, averaged)


def _max_pool(x: Any, *, size: Any, stride: Any, padding: Any) -> Any:
    """The first of the largest, row by row."""

    def largest(c: int, n: int, seen: Any) -> Dual:
        return max((dual(x[c, n, *pixel]) for _, pixel in seen), key=lambda v: v.value)

    windows = _windows(x.shape[2:], size, size if stride is None else stride, padding)
    return _of_windows(x.shape[0], x, windows, largest)


REFERENCES = {
    "attention": Reference(32, attention),
    "average_pool": Reference(4, _average_pool),
    "batch_norm": Reference(4, batch_norm),
    "batch_norm_inference": Reference(4, _batch_norm_inference),
    "conv2d": Reference(4, conv2d),
    "dropout": Reference(4, _dropout),
    "entry_norm": Reference(8, entry_norm),
    "global_average_pool": Reference(
        4, lambda x: np.sum(x, axis=(2, 3)) / (x.shape[2] * x.shape[3])
    ),
    "layer_norm": Reference(16, layer_norm),
    "max_pool": Reference(0, _max_pool),
    "weight_norm": Reference(12, weight_norm),
}
