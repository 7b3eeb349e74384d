"""Pooling and upsampling of channel-major images (C, N, H, W): see `npdrt.ops.convolution`.

One call handles one place of the window for all windows at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from npdrt.arrays import Array, namespace
from npdrt.autodiff import ALL, primitive
from npdrt.compute import total
from npdrt.errors import Error
from npdrt.ops.window import (
    Pair,
    Place,
    check_fits,
    check_images,
    inside,
    output_size,
    pair,
    whole,
)

__all__ = ["average_pool", "global_average_pool", "max_pool", "upsample"]


@primitive(computes=ALL)
def average_pool(
    x: Array, *, size: int | Pair, stride: int | Pair | None = None, padding: int | Pair = 0
) -> Any:
    """The mean over windows of height and width `size`, one every `stride` pixels.

    x: (C, N, H, W) -> (C, N, oh, ow) with oh = (H + 2 p - k) // s + 1. size, stride, padding: a
    number, or a pair for height and width. stride: `size` unless given. padding: at most half of
    `size`. Zeros outside the image count as elements: every sum is divided by
    kh kw (PyTorch's default, count_include_pad=True). The taps are added in the order of the
    window's rows.

    Derivative: an element gets g / (kh kw) of every window that it is in.
    """
    size, stride, padding = _settings("average_pool", x, size, stride, padding)
    xp, count = namespace(x), math.prod(size)
    output = output_size(x.shape[2:], size, stride, padding)
    total = xp.zeros((*x.shape[:2], *output), dtype=x.dtype)
    for windows, pixels in _taps(x.shape[2:], output, size, stride, padding):
        total[:, :, *windows] = total[:, :, *windows] + x[:, :, *pixels]

    def gx(g: Array) -> Array:
        g, spread = g / count, xp.zeros(x.shape, dtype=g.dtype)
        for windows, pixels in _taps(x.shape[2:], output, size, stride, padding):
            spread[:, :, *pixels] = spread[:, :, *pixels] + g[:, :, *windows]
        return spread

    return total / count, gx


@primitive(computes=ALL, analytic=False)
def max_pool(
    x: Array, *, size: int | Pair, stride: int | Pair | None = None, padding: int | Pair = 0
) -> Any:
    """The maximum over windows of height and width `size`, one every `stride` pixels.

    x: (C, N, H, W) -> (C, N, oh, ow) with oh = (H + 2 p - k) // s + 1. size, stride, padding: as
    in `average_pool`; beyond the image there is nothing to compare with. A NaN in a window is its
    maximum.

    Derivative: the first of a window's largest elements, row by row, gets its whole cotangent (as
    in PyTorch), the first NaN where there is one (there PyTorch takes the last).
    """
    size, stride, padding = _settings("max_pool", x, size, stride, padding)
    xp = namespace(x)
    output = output_size(x.shape[2:], size, stride, padding)
    places = list(_taps(x.shape[2:], output, size, stride, padding))
    top = xp.full((*x.shape[:2], *output), -math.inf, dtype=x.dtype)
    for windows, pixels in places:
        top[:, :, *windows] = xp.maximum(top[:, :, *windows], x[:, :, *pixels])

    def gx(g: Array) -> Array:
        spread = xp.zeros(x.shape, dtype=g.dtype)
        waiting = xp.ones(g.shape, dtype=xp.bool)  # for the first of a window's largest elements
        zero = xp.zeros((), dtype=g.dtype)
        for windows, pixels in places:
            seen = x[:, :, *pixels]
            largest = (seen == top[:, :, *windows]) | (seen != seen)
            first = largest & waiting[:, :, *windows]
            part = xp.where(first, g[:, :, *windows], zero)
            spread[:, :, *pixels] = spread[:, :, *pixels] + part
            waiting[:, :, *windows] = waiting[:, :, *windows] & ~first
        return spread

    return top, gx


@primitive(computes=ALL)
def global_average_pool(x: Array) -> Any:
    """The mean over all pixels: (C, N, H, W) -> (C, N); each gets g / (H W)."""
    check_images("global_average_pool", x)
    xp, count = namespace(x), x.shape[2] * x.shape[3]
    y = total(x, (2, 3)) / count
    return y, lambda g: xp.broadcast_to((g / count)[:, :, None, None], x.shape)


@primitive(computes=ALL)
def upsample(x: Array, *, factor: int = 2) -> Any:
    """Every pixel as a square of factor x factor equal pixels, the nearest-neighbour enlargement.

    (C, N, H, W) -> (C, N, factor H, factor W); a pixel's derivative is the sum over its square.
    """
    check_images("upsample", x)
    if not whole(factor) or factor < 1:
        raise Error(f"upsample: factor must be an integer >= 1; got {factor!r}")
    xp, (c, n, h, w) = namespace(x), x.shape
    wide = xp.reshape(xp.stack([x] * factor, axis=4), (c, n, h, w * factor))
    y = xp.reshape(xp.stack([wide] * factor, axis=3), (c, n, h * factor, w * factor))

    def gx(g: Array) -> Array:
        squares = xp.reshape(g, (c, n, h, factor, w, factor))
        rows = _added([squares[:, :, :, i, :, :] for i in range(factor)])  # (C, N, H, W, factor)
        return _added([rows[..., i] for i in range(factor)])

    return y, gx


def _added(parts: list[Array]) -> Array:
    """The sum of arrays, in order."""
    whole = parts[0]
    for part in parts[1:]:
        whole = whole + part
    return whole


def _settings(name: str, x: Any, size: Any, stride: Any, padding: Any) -> tuple[Pair, Pair, Pair]:
    """Size, stride and padding as pairs that fit x."""
    check_images(name, x)
    size = pair(f"{name}: size", size, 1)
    stride = size if stride is None else pair(f"{name}: stride", stride, 1)
    padding = pair(f"{name}: padding", padding, 0)
    if any(2 * p > k for p, k in zip(padding, size, strict=True)):
        raise Error(
            f"{name}: padding {padding} is more than half of the window {size}, so that a window "
            "could lie outside the image; use less padding"
        )
    check_fits(name, x, size, padding)
    return size, stride, padding


def _taps(
    image: Pair, output: Pair, size: Pair, stride: Pair, padding: Pair
) -> Iterator[tuple[Place, Place]]:
    """For every place in a window, row by row: the windows for which it is inside the image, and
    the pixels there."""
    axes = list(zip(size, stride, padding, output, image, strict=True))
    rows, lines = ([inside(k - p, s, m, n) for k in range(size)] for size, s, p, m, n in axes)
    for windows, pixels in rows:
        for others, across in lines:
            if windows.start < windows.stop and others.start < others.stop:
                yield (windows, others), (pixels, across)
