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
the 4x4 after another. The functions write to memory that they are given, so that
`npdrt.ops.convolution`, the definition, and `npdrt.ops.blocked`, on NumPy, share one text.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from npdrt.arrays import Array, columns, into, known_below, namespace
from npdrt.ops.window import Pair, Window, blocks, shares, unfold, unfolded_shape

FORMS = ("direct", "winograd")
LEAST = 64  # channels, outputs and tiles: with fewer, additions outweigh the products saved
LARGE = 1 << 14  # channels times outputs: with more, the derivative by the kernel has fewer sums
B = ((0, "subtract", 2), (1, "add", 2), (2, "subtract", 1), (3, "subtract", 1))  # rows of B'
Shape = tuple[int, ...]
Axes = tuple[int, ...] | None
Place = tuple[slice, slice]


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
    return list(blocks(x.shape[1], tiles(window), columns(x) // 2))


def parts(x: Array, window: Window, outputs: int) -> list[list[Place]]:
    """The blocks in parts, each with a sum of its own in the derivative by the kernel: up to 8, or
    2 where such a sum is large."""
    return shares(places(x, window), min(4, max(1, x.shape[0] * outputs // LARGE)))


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


def transform(to: Array, rows: Array, g: Array) -> None:
    """Fill to[b, a, ...] with entry (a, b) of G g G'. g: (3, 3, ...); rows: memory (4, 3, ...)."""
    _transform(rows, g)
    for a in range(4):
        _transform(to[:, a, ...], rows[a, ...])


def _transform(to: Array, g: Array) -> None:
    """to = G g, along the first axis."""
    to[0, ...], to[3, ...] = g[0, ...], g[2, ...]
    plus, minus = to[1, ...], to[2, ...]
    into(plus, "add", g[0, ...], g[2, ...])
    into(minus, "subtract", plus, g[1, ...])
    plus += g[1, ...]
    plus *= 0.5
    minus *= 0.5


def restore(gw: Array, rows: Array, d: Array) -> None:
    """Fill gw (3, 3, ...) with G' d G; d[b, a, ...] is entry (a, b); rows: memory (3, 4, ...)."""
    for b in range(4):
        _restore(rows[:, b, ...], d[b, ...])
    for k in range(3):
        _restore(gw[k, ...], rows[k, ...])


def _restore(to: Array, d: Array) -> None:
    """to = G' d, along the first axis."""
    half, last = to[0, ...], to[2, ...]
    into(half, "add", d[1, ...], d[2, ...])
    half *= 0.5
    into(last, "add", half, d[3, ...])
    half += d[0, ...]
    middle = to[1, ...]
    into(middle, "subtract", d[1, ...], d[2, ...])
    middle *= 0.5


# --- the correlation --------------------------------------------------------------------------


def correlation_shapes(x: Array, outputs: int, window: Window, place: Place) -> list[Shape]:
    """The memory `correlate` needs: for B' d B; products of a column, A' of all, the outputs."""
    one = (outputs, *_block(window, place))
    return [*_input_shapes(x, window, place), (4, *one), (4, 2, *one), (2, 2, *one)]


def _input_shapes(x: Array, window: Window, place: Place) -> list[Shape]:
    """For B' d B of the tiles of a block: pixels, sums of columns, a column of the result."""
    height, width, count = _block(window, place)
    pixels = unfolded_shape(x.shape[0], count, height + 1, _pixels(window))
    return [pixels, (*pixels[1:4], width, count), (4, x.shape[0], height, width, count)]


def _block(window: Window, place: Place) -> tuple[int, int, int]:
    """Rows of tiles, columns and images of a block."""
    images, rows = place
    return rows.stop - rows.start, tiles(window)[1], images.stop - images.start


def correlate(
    y: Array, kernel: Array, scaled: Array | None, x: Array, window: Window, place: Place,
    room: list[Array],
) -> None:  # fmt: skip
    """Fill a block of y (O, N, oh, ow). kernel: (4, 4, O, C), of `transform`; scaled: what it was
    multiplied by, if anything; room: memory of `correlation_shapes`."""
    xp, (images, rows) = namespace(x), place
    *seen, products, summed, made = room
    flat = xp.reshape(products, (4, y.shape[0], -1))
    by_tile = _read(seen[0], x, window, place)
    for b, column in enumerate(_input_columns(seen, by_tile)):
        into(flat, "matmul", kernel[b, ...], xp.reshape(column, (4, x.shape[0], -1)))
        _collect(summed[b, ...], products)
    _collect(made, summed)
    for factor in (by_tile, scaled):
        if factor is not None:
            made /= factor
    for j, i in ((0, 0), (0, 1), (1, 0), (1, 1)):
        down = slice(2 * rows.start + i, min(2 * rows.stop, window.size[0]), 2)
        to = y[:, images, down, j::2]
        to[...] = xp.permute_dims(made[j, i, ...], (0, 3, 1, 2))[..., : to.shape[2], : to.shape[3]]


def _pixels(window: Window) -> Window:
    """Pixels by the parity of row and column: what neighbouring tiles see lies side by side."""
    h, w = tiles(window)
    return Window((1, 2), (2, 2), window.start, (h + 1, w + 1), window.image)


def _read(pixels: Array, x: Array, window: Window, place: Place) -> Array | None:
    """Read the pixels of a block of x; the scales (rows, columns, images) of its tiles, None where
    all are known to be 1."""
    images, rows = place
    unfold(pixels, x[:, images, ...], _pixels(window), rows.start)
    return None if small(pixels) else _near(scale(pixels, (0, 1, 2)))


def _input_columns(room: list[Array], by_tile: Array | None) -> Iterator[Array]:
    """B' d B of the pixels that are read, column by column: (4, C, rows, columns, images); times
    `by_tile`, if that is not None."""
    pixels, sums, found = room
    height, width = found.shape[2:4]
    if by_tile is not None:
        pixels *= 0.25  # sums of four are finite; see below
    for k, across, m in B:
        left, right = (pixels[n % 2, ..., n // 2 : n // 2 + width, :] for n in (k, m))
        into(sums, across, left, right)
        for a, (p, down, q) in enumerate(B):
            upper, lower = (sums[:, n % 2, n // 2 : n // 2 + height, ...] for n in (p, q))
            into(found[a, ...], down, upper, lower)
        if by_tile is not None:
            found *= 4.0 * by_tile
        yield found


def _collect(to: Array, m: Array) -> None:
    """to = A' m, along the first axis."""
    into(to[0, ...], "add", m[1, ...], m[2, ...])
    into(to[1, ...], "subtract", m[1, ...], m[2, ...])
    to += m[::3, ...]


# --- the derivative by the kernel -------------------------------------------------------------


def weight_shapes(g: Array, x: Array, window: Window, place: Place) -> list[Shape]:
    """The memory `correlate_weight` needs: for B' d B; for A g A' as it is, sums of columns, two of
    rows."""
    height, width, count = _block(window, place)
    whole = unfolded_shape(g.shape[0], count, height, _outputs(window))
    sums = (2, g.shape[0], height, width, count)
    return [*_input_shapes(x, window, place), whole, whole[1:], sums]


def correlate_weight(
    total: Array, more: Array | None, g: Array, x: Array, window: Window, place: Place,
    room: list[Array],
) -> None:  # fmt: skip
    """Add what a block is to total[b, a], the derivative (O, C) by entry (a, b) of G g G', or
    assign it, where `more`, memory (O, C), is None. room: of `weight_shapes`."""
    xp, by_tile = namespace(x), _read(room[0], x, window, place)
    by_tile = _read_cotangent(room[3], g, window, place, by_tile)
    seen = _input_columns(room[:3], by_tile)
    for b, ours in enumerate(_cotangent_columns(room[3:])):
        column = next(seen)
        for a, rows in enumerate(ours):
            left = xp.reshape(rows, (g.shape[0], -1))
            right = xp.matrix_transpose(xp.reshape(column[a, ...], (x.shape[0], -1)))
            to = total[b, a, ...]
            into(to if more is None else more, "matmul", left, right)
            if more is not None:
                to += more


def _outputs(window: Window) -> Window:
    """The outputs by the parity of row and column: those of a tile."""
    return Window((1, 2), (2, 2), (0, 0), tiles(window), window.size)


def _read_cotangent(
    whole: Array, g: Array, window: Window, place: Place, by_tile: Array | None
) -> Array | None:
    """Read a block of g, and scale its tiles, by as much as it returns that those of the image,
    whose scales are `by_tile`, are to be divided by and multiplied by."""
    images, rows = place
    unfold(whole, g[:, images, ...], _outputs(window), rows.start)
    if by_tile is None and small(whole):
        return None
    ours = scale(whole, (0, 1, 2))
    balance = (1.0 if by_tile is None else by_tile) / ours
    whole /= balance
    return balance


def _cotangent_columns(room: list[Array]) -> Iterator[list[Array]]:
    """A g A' of the tiles that are read, by columns: 4 arrays (O, rows, columns, images) each."""
    whole, summed, sums = room
    left, right = whole[0, ...], whole[1, ...]
    for b, column in enumerate((left, summed, summed, right)):
        if b in (1, 2):
            into(summed, ("add", "subtract")[b - 1], left, right)
        upper, lower = column[:, 0, ...], column[:, 1, ...]
        into(sums[0, ...], "add", upper, lower)
        into(sums[1, ...], "subtract", upper, lower)
        yield [upper, sums[0, ...], sums[1, ...], lower]
