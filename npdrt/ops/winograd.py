"""Winograd's form of a 3x3 correlation of stride 1: F(2x2, 3x3) (Lavin and Gray 2016, equation 8).

A tile d of 4x4 pixels and a kernel g make 2x2 outputs by 16 products in place of 36:

    Y = A' [(G g G') * (B' d B)] A,    A' = 1  1  1  0    B' = 1  0 -1  0    G =  1    0    0
                                            0  1 -1  1         0  1  1  0        1/2  1/2  1/2
                                                               0 -1  1  0        1/2 -1/2  1/2
                                                               0 -1  0  1         0    0    1

with ' for the transpose and * element by element (the paper's last rows of A' and B' have the other
sign). Over channels, each of the 16 is a product of matrices (O, C) @ (C, tiles). The derivative by
the kernel is that of this formula, term by term; that by the input is a correlation of its own.

Rounding. With u half an ulp of 1, an output is off by at most

    81 (C + 10) u sum over c of (largest |g| of channel c) (largest |d| of channel c in the tile)

which is relative to all that the tile sees, and not, as that of the direct form (9 C u times the
sum of |g| |d|), to the pixels that an output sees. So a pixel under a zero of the kernel, or one
that only the other outputs of its tile see, changes an output by rounding; a sum of products >= 0
can be below 0; and of an infinity most results are NaN. On data of one scale the error is about
twice the direct form's (benchmarks/README.md).

Sums of large numbers do not overflow: `scale` makes every tile and the kernel small by powers of
2, which cost no bits. In the derivative by the kernel what the tile of the image loses the tile of
the cotangent gains, as both are summed over the tiles: it is finite while the sum over the tiles of
(largest |g|) (largest |d|) is at most 1/64 of the largest number.

Tiles are taken in blocks, as `npdrt.ops.convolution` takes positions, and of a block one column of
the 4x4 after another. The functions have the names and arguments of those of `npdrt.ops.direct`;
`correlate` and `add_blocks` also take their passes over memory, of which `npdrt.program.tiles` has
compiled ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from npdrt.arrays import Array, block_columns, known_below, namespace, write_result
from npdrt.ops.window import (
    Kernel,
    Memory,
    Pair,
    Place,
    Shape,
    Window,
    add_product,
    blocks,
    shares,
    unfold,
    unfolded_shape,
)

FORMS = ("direct", "winograd")
LEAST = 64  # channels, outputs and tiles: with fewer, additions outweigh the products saved
LARGE = 1 << 14  # channels times outputs: with more, the derivative by the kernel has fewer sums
B = ((0, "subtract", 2), (1, "add", 2), (2, "subtract", 1), (3, "subtract", 1))  # rows of B'
Axes = tuple[int, ...] | None


def suits(window: Window, images: int, channels: int, outputs: int) -> bool:
    """Whether a correlation for which this form is asked is made in it: 3x3, stride 1, enough of
    everything, and whole tiles that take at most 2/3 of the direct form's multiplications."""
    if window.form != "winograd":
        return False
    (h, w), (height, width) = tiles(window), window.size
    fits = (window.taps, window.step) == ((3, 3), (1, 1)) and 24 * h * w <= 9 * height * width
    return fits and min(images * h * w, channels, outputs) >= LEAST


def tiles(window: Window) -> Pair:
    """How many tiles an image is high and wide."""
    return -(-window.size[0] // 2), -(-window.size[1] // 2)


def places(x: Array, window: Window) -> list[Place]:
    """(images, rows of tiles) of every block."""
    return list(blocks(x.shape[1], tiles(window), block_columns(x) // 2))


# --- scales -----------------------------------------------------------------------------------


def limits(x: Array) -> tuple[float, float]:
    """Up to which number nothing is scaled, and the power of 2 by which larger ones are made small,
    once or twice: 2^48 and 2^40 in float32."""
    bits = round(math.log2(namespace(x).finfo(x.dtype).max))
    return 2.0 ** (bits * 3 // 8), 2.0 ** (bits * 5 // 16)


def small(x: Array) -> bool:
    """Whether it is known that nothing in x is to be scaled."""
    return known_below(x, limits(x)[0])


def scale(x: Array, axis: Axes) -> Array:
    """The powers of 2 that bring the largest |x| along the axes below the limit; 1 if it is."""
    xp, (limit, step) = namespace(x), limits(x)
    largest = xp.max(xp.abs(x), axis=axis)
    one = xp.ones(largest.shape, dtype=largest.dtype)
    once = xp.where(largest > limit, one / step, one)
    return xp.where(largest > limit * step, one / step / step, once)


def _near(m: Array) -> Array:
    """The least of each 2x2 of the last axes but one, of scales by pixel: those by tile."""
    xp = namespace(m)
    rows = xp.minimum(m[:-1, ...], m[1:, ...])
    return xp.minimum(rows[:, :-1, ...], rows[:, 1:, ...])


# --- the kernel -------------------------------------------------------------------------------


def kernel_size(taps: Array) -> int:
    """How many elements `kernel` needs: 16 for every 9 taps."""
    return int(taps.size) // 9 * 16


def kernel(room: Array, taps: Array, transposed: bool) -> Kernel:
    """The kernel in `room`, to be filled: 4x4 matrices (O, C)."""
    xp, scaled = namespace(room), None if small(taps) else scale(taps, None)
    target = xp.reshape(room, (4, 4, *taps.shape[2:]))
    return Kernel(target, xp.matrix_transpose(target) if transposed else target, scaled)


def fill(kernel: Kernel, some: slice, taps: Array, memory: Memory) -> None:
    """Transform some of the third axis of the kernel, scaled."""
    taps, target = taps[:, :, some, :], kernel.target[:, :, some, :]
    rows, ordered = memory(target.dtype, (4, *taps.shape[1:]), taps.shape)
    ordered[...] = taps
    if kernel.scaled is not None:
        ordered *= kernel.scaled
    transform(target, rows, ordered)


def transform(target: Array, rows: Array, g: Array) -> None:
    """Fill target[b, a, ...] with entry (a, b) of G g G'. g: (3, 3, ...); rows: memory (4, 3,
    ...)."""
    _transform(rows, g)
    for a in range(4):
        _transform(target[:, a, ...], rows[a, ...])


def _transform(target: Array, g: Array) -> None:
    """target = G g, along the first axis."""
    target[0, ...], target[3, ...] = g[0, ...], g[2, ...]
    plus, minus = target[1, ...], target[2, ...]
    write_result(plus, "add", g[0, ...], g[2, ...])
    write_result(minus, "subtract", plus, g[1, ...])
    plus += g[1, ...]
    plus *= 0.5
    minus *= 0.5


def restore(gw: Array, rows: Array, d: Array) -> None:
    """Fill gw (3, 3, ...) with G' d G; d[b, a, ...] is entry (a, b); rows: memory (3, 4, ...)."""
    for b in range(4):
        _restore(rows[:, b, ...], d[b, ...])
    for k in range(3):
        _restore(gw[k, ...], rows[k, ...])


def _restore(target: Array, d: Array) -> None:
    """target = G' d, along the first axis."""
    half, last = target[0, ...], target[2, ...]
    write_result(half, "add", d[1, ...], d[2, ...])
    half *= 0.5
    write_result(last, "add", half, d[3, ...])
    half += d[0, ...]
    middle = target[1, ...]
    write_result(middle, "subtract", d[1, ...], d[2, ...])
    middle *= 0.5


# --- passes over memory -----------------------------------------------------------------------


class Passes(NamedTuple):
    """The passes over memory of a block: those of this module (`PLAIN`), or others with the same
    bits."""

    column: Callable[..., None]
    collect: Callable[..., None]


def input_column(result: Array, sums: Array, pixels: Array, b: int) -> None:
    """Column b of B' d B of the pixels that are read: (4, C, rows, columns, images). sums: memory
    for column b of d B."""
    (height, width), (k, across, m) = result.shape[2:4], B[b]
    left, right = (pixels[n % 2, ..., n // 2 : n // 2 + width, :] for n in (k, m))
    write_result(sums, across, left, right)
    for a, (p, down, q) in enumerate(B):
        upper, lower = (sums[:, n % 2, n // 2 : n // 2 + height, ...] for n in (p, q))
        write_result(result[a, ...], down, upper, lower)


def output_column(target: Array, m: Array) -> None:
    """target = A' m, along the first axis."""
    write_result(target[0, ...], "add", m[1, ...], m[2, ...])
    write_result(target[1, ...], "subtract", m[1, ...], m[2, ...])
    target += m[::3, ...]


PLAIN = Passes(input_column, output_column)


# --- the correlation --------------------------------------------------------------------------


def correlate(
    y: Array,
    kernel: Kernel,
    x: Array,
    window: Window,
    place: Place,
    memory: Memory,
    passes: Passes = PLAIN,
) -> None:
    """Fill a block of y (O, N, oh, ow) with the correlation of x (C, N, H, W)."""
    xp, (images, rows) = namespace(x), place
    tiles_shape = (y.shape[0], *_block(window, place))
    *room, products, summed, outputs = memory(
        y.dtype, *_input_shapes(x, window, place), (4, *tiles_shape), (4, 2, *tiles_shape),
        (2, 2, *tiles_shape),
    )  # fmt: skip
    as_matrices = xp.reshape(products, (4, y.shape[0], -1))  # (4, O, tiles)
    by_tile = _read(room[0], x, window, place)
    for b, column in enumerate(_input_columns(room, by_tile, passes)):
        column = xp.reshape(column, (4, x.shape[0], -1))  # (4, C, tiles)
        write_result(as_matrices, "matmul", kernel.matrix[b, ...], column)
        passes.collect(summed[b, ...], products)  # A' from the left: (2, O, tiles) of column b
    passes.collect(outputs, summed)  # A from the right: (2, 2, O, tiles)
    for factor in (by_tile, kernel.scaled):
        if factor is not None:
            outputs /= factor
    for j, i in ((0, 0), (0, 1), (1, 0), (1, 1)):
        down = slice(2 * rows.start + i, min(2 * rows.stop, window.size[0]), 2)
        target = y[:, images, down, j::2]  # a tile's output (i, j)
        values = xp.permute_dims(outputs[j, i, ...], (0, 3, 1, 2))  # (O, images, rows, columns)
        target[...] = values[..., : target.shape[2], : target.shape[3]]


def _input_shapes(x: Array, window: Window, place: Place) -> list[Shape]:
    """The memory for B' d B of the tiles of a block: pixels, sums of columns, a column of the
    result."""
    height, width, count = _block(window, place)
    pixels = unfolded_shape(x.shape[0], count, height + 1, _pixels(window))
    return [pixels, (*pixels[1:4], width, count), (4, x.shape[0], height, width, count)]


def _block(window: Window, place: Place) -> tuple[int, int, int]:
    """Rows of tiles, columns and images of a block."""
    images, rows = place
    return rows.stop - rows.start, tiles(window)[1], images.stop - images.start


def _pixels(window: Window) -> Window:
    """Pixels by the parity of row and column: what neighbouring tiles see lies side by side."""
    h, w = tiles(window)
    return Window((1, 2), (2, 2), window.start, (h + 1, w + 1), window.image)


def _read(pixels: Array, x: Array, window: Window, place: Place) -> Array | None:
    """Read the pixels of a block of x; returns the scales (rows, columns, images) of its tiles, or
    None if all are known to be 1."""
    images, rows = place
    unfold(pixels, x[:, images, ...], _pixels(window), rows.start)
    return None if small(pixels) else _near(scale(pixels, (0, 1, 2)))


def _input_columns(room: list[Array], by_tile: Array | None, passes: Passes) -> Iterator[Array]:
    """B' d B of the pixels that are read, column by column: (4, C, rows, columns, images); times
    `by_tile`, if that is not None."""
    pixels, sums, result = room
    if by_tile is not None:
        pixels *= 0.25  # sums of four are finite; see below
    for b in range(4):
        passes.column(result, sums, pixels, b)
        if by_tile is not None:
            result *= 4.0 * by_tile
        yield result


# --- the derivative by the kernel -------------------------------------------------------------


def channels_at_a_time(channels: int) -> list[slice]:
    """All channels."""
    return [slice(0, channels)]


def parts(order: list[Place], outputs: int, channels: int) -> list[list[Place]]:
    """The blocks in parts, each with a sum of its own: up to 8, or 2 where such a sum is large."""
    return shares(order, min(4, max(1, channels * outputs // LARGE)))


def cotangent(g: Array, place: Place) -> Array:
    """All of the cotangent: `add_blocks` reads its block."""
    return g


def total_shape(gw: Array, window: Window) -> Shape:
    """4x4 matrices (O, C)."""
    return 4, 4, *gw.shape[:2]


def total_dtype(gw: Array) -> Any:
    """That of the kernel."""
    return gw.dtype


def add_blocks(
    total: Array,
    part: Iterable[tuple[Place, Array]],
    x: Array,
    window: Window,
    memory: Memory,
    passes: Passes = PLAIN,
) -> None:
    """Fill total[b, a] with the derivative (O, C) by entry (a, b) of G g G', the sum over the
    blocks of a part, in order; each with its `cotangent`."""
    xp = namespace(x)
    for number, (place, g) in enumerate(part):
        shapes = (*_input_shapes(x, window, place), *_cotangent_shapes(g, window, place))
        *room, buffer = memory(total.dtype, *shapes, total.shape[2:])
        by_tile = _read(room[0], x, window, place)
        by_tile = _read_cotangent(room[3], g, window, place, by_tile)
        columns = _cotangent_columns(room[3:]), _input_columns(room[:3], by_tile, passes)
        for b, (g_column, x_column) in enumerate(zip(*columns, strict=True)):
            for a, entries in enumerate(g_column):
                left = xp.reshape(entries, (g.shape[0], -1))  # (O, tiles)
                right = xp.reshape(x_column[a, ...], (x.shape[0], -1))  # (C, tiles)
                right = xp.matrix_transpose(right)  # (tiles, C)
                add_product(total[b, a, ...], left, right, buffer, first=number == 0)


def collect(gw: Array, totals: list[Array], memory: Memory) -> None:
    """Fill gw (O, C, 3, 3) from the sum of the parts' totals, in order."""
    size = gw.shape[:2]
    ordered, rows, total = memory(gw.dtype, (3, 3, *size), (3, 4, *size), (4, 4, *size))
    total[...] = totals[0]
    for other in totals[1:]:
        total += other
    restore(ordered, rows, total)
    gw[...] = namespace(gw).permute_dims(ordered, (2, 3, 0, 1))


def _cotangent_shapes(g: Array, window: Window, place: Place) -> list[Shape]:
    """The memory for A g A' of the tiles of a block: all outputs, sums of columns, two of rows."""
    height, width, count = _block(window, place)
    outputs = unfolded_shape(g.shape[0], count, height, _outputs(window))
    return [outputs, outputs[1:], (2, g.shape[0], height, width, count)]


def _outputs(window: Window) -> Window:
    """The outputs by the parity of row and column: those of a tile."""
    return Window((1, 2), (2, 2), (0, 0), tiles(window), window.size)


def _read_cotangent(
    outputs: Array, g: Array, window: Window, place: Place, by_tile: Array | None
) -> Array | None:
    """Read a block of g and divide its tiles by a balance, which is returned: the tiles of the
    image, whose scales are `by_tile`, are to be multiplied by it."""
    images, rows = place
    unfold(outputs, g[:, images, ...], _outputs(window), rows.start)
    if by_tile is None and small(outputs):
        return None
    balance = (1.0 if by_tile is None else by_tile) / scale(outputs, (0, 1, 2))
    outputs /= balance
    return balance


def _cotangent_columns(room: list[Array]) -> Iterator[list[Array]]:
    """A g A' of the tiles that are read, by columns: 4 arrays (O, rows, columns, images) each."""
    outputs, summed, sums = room
    left, right = outputs[0, ...], outputs[1, ...]
    for b, column in enumerate((left, summed, summed, right)):
        if b in (1, 2):
            write_result(summed, ("add", "subtract")[b - 1], left, right)
        upper, lower = column[:, 0, ...], column[:, 1, ...]
        write_result(sums[0, ...], "add", upper, lower)
        write_result(sums[1, ...], "subtract", upper, lower)
        yield [upper, sums[0, ...], sums[1, ...], lower]
