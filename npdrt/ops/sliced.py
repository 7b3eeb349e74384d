"""The sliced form of a correlation, that of portable arithmetic: its products are those of
`npdrt.exact.matmul`, whose bits depend on no order.

With the columns of a block, the pixels that its positions see, as a matrix (kh kw C, positions):

    y = (O, kh kw C) @ columns
    derivative by the kernel = g (O, all positions) @ transpose of (kh kw C, all positions)

so every position has a scale of its own, and in the derivative every tap of a channel. A sum over
blocks of products of slices is exact: it does not matter where blocks begin.

The functions have the names and arguments of those of `npdrt.ops.direct`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from npdrt import exact, slices
from npdrt.arrays import Array, namespace, quiet
from npdrt.ops.direct import fill, kernel, kernel_size, places, read
from npdrt.ops.window import (
    Kernel,
    Memory,
    Place,
    Shape,
    Window,
    add_product,
    unfolded_shape,
)

__all__ = ["fill", "kernel", "kernel_size", "places"]

CHANNELS = 32  # of the input at a time in the derivative by the kernel


def correlate(
    y: Array, kernel: Kernel, x: Array, window: Window, place: Place, memory: Memory
) -> None:
    """Fill a block of y (O, N, oh, ow) with the correlation of x (C, N, H, W)."""
    xp, (images, rows) = namespace(x), place
    shape = (y.shape[0], rows.stop - rows.start, window.size[1], images.stop - images.start)
    total = exact.matmul(kernel.matrix, _columns(memory(y.dtype, *_rooms(x, window, place)),
                                                 x, window, place))  # fmt: skip
    y[:, images, rows, :] = xp.permute_dims(xp.reshape(total, shape), (0, 3, 1, 2))


def _rooms(x: Array, window: Window, place: Place) -> list[Shape]:
    """The memory that `_columns` needs: the pixels in the order of the taps, and all taps."""
    if window.pointwise:
        return []
    (images, rows), (kh, kw) = place, window.taps
    height, count = rows.stop - rows.start, images.stop - images.start
    together = (kh, kw * x.shape[0], height * window.size[1] * count)
    return [unfolded_shape(x.shape[0], count, height, window), together]


def _columns(room: list[Array], x: Array, window: Window, place: Place) -> Array:
    """What the positions of a block see: (kh kw C, positions)."""
    (columns,) = read(room, x, window, place)
    return columns


# --- the derivative by the kernel -------------------------------------------------------------


def channels_at_a_time(channels: int) -> list[slice]:
    """The channels of the input, `CHANNELS` at a time."""
    return [slice(c, min(c + CHANNELS, channels)) for c in range(0, channels, CHANNELS)]


def parts(order: list[Place], outputs: int, channels: int) -> list[list[Place]]:
    """One: the scale of a line is that of all blocks."""
    return [order]


def cotangent(g: Array, place: Place) -> Array:
    """A block (O, rows, ow, images) of the cotangent (O, N, oh, ow)."""
    return namespace(g).permute_dims(g[:, place[0], place[1], :], (0, 2, 3, 1))


def total_shape(gw: Array, window: Window) -> Shape:
    """The three products of slices."""
    outputs, channels, kh, kw = gw.shape
    return 3, outputs, kh * kw * channels


def total_dtype(gw: Array) -> Any:
    """float64, in which sums of slices are exact."""
    return namespace(gw).float64


def add_blocks(
    total: Array, part: Iterable[tuple[Place, Array]], x: Array, window: Window, memory: Memory
) -> None:
    """Fill `total` (3, O, kh kw C) with the sums over all blocks, each with its `cotangent`, of
    the products of slices; NaN where a line is not finite."""
    xp, blocks = namespace(x), list(part)
    terms = sum(math.prod(g.shape[1:]) for _, g in blocks)
    bits, tops = slices.bits_of(terms), _largest(blocks, x, window, memory)
    grids = [slices.grid_of(top, bits) for top in tops]
    for number, (place, g) in enumerate(blocks):
        ours, theirs, buffer = _operands(g, x, window, place, memory, total.shape[1:])
        with quiet():  # infinity - infinity
            for (high, low), grid in zip((ours, theirs), grids, strict=True):
                slices.cut_into(high, low, grid, bits)
            for k, (i, j) in enumerate(slices.PAIRS):
                turned = xp.matrix_transpose(theirs[j])  # (positions, kh kw C)
                add_product(total[k, ...], ours[i], turned, buffer, first=number == 0)
    finite = xp.isfinite(tops[0]) & xp.matrix_transpose(xp.isfinite(tops[1]))  # (O, kh kw C)
    total[...] = xp.where(finite, total, xp.nan)


def _operands(
    g: Array, x: Array, window: Window, place: Place, memory: Memory, product: Shape
) -> tuple[list[Array], list[Array], Array]:
    """A block of the cotangent and what it saw, float64 matrices (lines, positions), each in the
    second of two arrays; and an array for a product."""
    xp, n = namespace(x), math.prod(g.shape[1:])
    rooms = _rooms(x, window, place)
    shapes = (*[(g.shape[0], n)] * 2, *[(product[1], n)] * 2, product)
    *room, g_high, g_low, x_high, x_low, buffer = memory(xp.float64, *rooms[:1], *shapes)
    g_low[...] = xp.reshape(g, (g.shape[0], n))
    if rooms:
        _columns([room[0], xp.reshape(x_low, rooms[1])], x, window, place)
    else:
        x_low[...] = _columns([], x, window, place)
    return [g_high, g_low], [x_high, x_low], buffer


def _largest(
    blocks: list[tuple[Place, Array]], x: Array, window: Window, memory: Memory
) -> list[Array]:
    """The largest |element| of every line over all blocks, (O, 1) and (kh kw C, 1)."""
    xp, found = namespace(x), []
    for place, g in blocks:
        matrix = xp.reshape(g, (g.shape[0], -1))
        seen = _columns(memory(x.dtype, *_rooms(x, window, place)), x, window, place)
        found.append([slices.largest_of(m, 1) for m in (matrix, seen)])
    return [slices.largest_of(xp.concat(column, axis=1), 1) for column in zip(*found, strict=True)]


def collect(gw: Array, totals: list[Array], memory: Memory) -> None:
    """Fill gw (O, C, kh, kw) with the three sums, added in order; a sum of zeros is +0."""
    xp, (outputs, channels, kh, kw) = namespace(gw), gw.shape
    (high, first, second) = (totals[0][k, ...] for k in range(3))
    value = ((high + first) + second) + 0.0
    value = xp.astype(xp.where(value == value, value, xp.nan), gw.dtype)
    gw[...] = xp.permute_dims(xp.reshape(value, (outputs, kh, kw, channels)), (0, 3, 1, 2))
