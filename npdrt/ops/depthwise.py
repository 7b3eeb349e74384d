"""The depthwise form of a correlation: every output channel sees one channel of the input.

    y[c] = sum over k, l of w[c, k, l] x[c] shifted by (k, l)

A product of matrices would have one row for each channel, so this form multiplies and adds shifted
images. Of a block's pixels each is copied once, with the zeros around them, sorted by its offset in
the stride, images innermost (`npdrt.ops.window.unfold`). A shift is then a mere offset in a
channel's memory, and one call (`npdrt.arrays.shifted_sum`) sums all taps of one offset in the
stride for all outputs of a block, with a few columns between the rows that nobody reads.

`npdrt.ops.correlation` cuts the channels into pieces of about `ELEMENTS` outputs, which stay in
cache. The functions have the names and arguments of those of `npdrt.ops.direct`.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product
from typing import Any

from npdrt.arrays import Array, block_columns, namespace, shifted_sum, write_result
from npdrt.compute import total
from npdrt.ops.window import (
    Kernel,
    Memory,
    Place,
    Shape,
    Window,
    blocks,
    shares,
    unfold,
    unfolded_shape,
)

ELEMENTS = 128  # of a block, times `block_columns`: on NumPy 512 KiB of float32


def suits(weight: Shape, groups: int) -> bool:
    """Whether a convolution with such a weight (O, C / groups, kh, kw) is depthwise, with one
    output for each channel. A single channel is left to the other forms."""
    return groups > 1 and tuple(weight[:2]) == (groups, 1)


def some_channels(x: Array, window: Window) -> list[slice]:
    """The channels of x (C, N, H, W) in pieces that each make about one block, or several."""
    size = x.shape[1] * window.size[0] * window.size[1]
    step = max(1, _elements(x) // size)
    return [slice(c, min(c + step, x.shape[0])) for c in range(0, x.shape[0], step)]


def places(x: Array, window: Window) -> list[Place]:
    """(images, rows) of every block of the output."""
    return list(blocks(x.shape[1], window.size, max(1, _elements(x) // x.shape[0])))


def _elements(x: Array) -> int:
    return ELEMENTS * block_columns(x)


# --- the kernel -------------------------------------------------------------------------------


def kernel_size(taps: Array) -> int:
    """How many elements `kernel` needs."""
    return int(taps.size)


def kernel(room: Array, taps: Array, transposed: bool) -> Kernel:
    """The kernel in `room`, to be filled, as a matrix (kh kw, C). Taps have one input each, so that
    nothing is transposed."""
    xp = namespace(room)
    return Kernel(xp.reshape(room, taps.shape), xp.reshape(room, (-1, taps.shape[2])))


def fill(kernel: Kernel, some: slice, taps: Array, memory: Memory) -> None:
    """Fill some of the third axis of the kernel."""
    kernel.target[:, :, some, :] = taps[:, :, some, :]


# --- the correlation --------------------------------------------------------------------------


def correlate(
    y: Array, kernel: Kernel, x: Array, window: Window, place: Place, memory: Memory
) -> None:
    """Fill a block of y (C, N, oh, ow) with the correlation of x (C, N, H, W)."""
    xp, (images, rows) = namespace(x), place
    shape = _padded(x.shape[0], window, place)  # (C, rows, width, images)
    pixels, outputs, buffer = memory(y.dtype, _pixels_shape(x, window, place), shape, shape)
    unfold(pixels, x[:, images, ...], _pixels(window), rows.start)
    made, term = (_used(a, window) for a in (outputs, buffer))  # (C, used)
    taps, (down, across) = kernel.target[..., 0], window.step  # (kh, kw, C)
    steps = shape[2] * shape[3], shape[3]  # from a row of pixels to the next, from a column
    offsets = product(range(min(down, taps.shape[0])), range(pixels.shape[0]))
    for number, (k, m) in enumerate(offsets):
        offset = xp.reshape(pixels[m, :, k, ...], (x.shape[0], -1))  # (C, pixels)
        shifted_sum(term if number else made, offset, taps[k::down, m::across, :], steps)
        if number:
            made += term
    y[:, images, rows, :] = xp.permute_dims(outputs[:, :, : window.size[1], :], (0, 3, 1, 2))


def _pixels(window: Window) -> Window:
    """Pixels by their offset in the stride, with as many columns as the taps see."""
    across, step = window.taps[1], window.step[1]
    width = window.size[1] + (across - 1) // step
    taps = window.taps[0], min(across, step)
    return Window(taps, window.step, window.start, (window.size[0], width), window.image)


def _pixels_shape(x: Array, window: Window, place: Place) -> Shape:
    """(offsets of columns, C, offsets of rows, height, width, images)."""
    images, rows = place
    count, height = images.stop - images.start, rows.stop - rows.start
    return unfolded_shape(x.shape[0], count, height, _pixels(window))


def _padded(channels: int, window: Window, place: Place) -> Shape:
    """(C, rows, width of the pixels, images): the outputs of a block, and columns without use."""
    images, rows = place
    width = _pixels(window).size[1]
    return channels, rows.stop - rows.start, width, images.stop - images.start


def _used(outputs: Array, window: Window) -> Array:
    """Outputs in such an array as rows (C, used): without the last columns that have no use."""
    channels, rows, width, images = outputs.shape
    used = ((rows - 1) * width + window.size[1]) * images
    return namespace(outputs).reshape(outputs, (channels, -1))[:, :used]


# --- the derivative by the kernel -------------------------------------------------------------


def channels_at_a_time(channels: int) -> list[slice]:
    """All: a piece's channels are few."""
    return [slice(None)]


def parts(order: list[Place], outputs: int, channels: int) -> list[list[Place]]:
    """The blocks, in order, cut into consecutive parts, each with a sum of its own."""
    return shares(order, 1)


def cotangent(g: Array, place: Place) -> Array:
    """A block (C, rows, ow, images) of the cotangent (C, N, oh, ow)."""
    return namespace(g).permute_dims(g[:, place[0], place[1], :], (0, 2, 3, 1))


def total_shape(gw: Array, window: Window) -> Shape:
    """(C, taps)."""
    return gw.shape[0], window.taps[0] * window.taps[1]


def total_dtype(gw: Array) -> Any:
    """That of the kernel."""
    return gw.dtype


def add_blocks(
    sums: Array, part: Iterable[tuple[Place, Array]], x: Array, window: Window, memory: Memory
) -> None:
    """Fill `sums` (C, taps) with the sum over the blocks of a part, in order; each with its
    `cotangent`. A column without use is not multiplied: 0 times an infinity is no 0."""
    sums[...] = 0
    down, across = window.step
    for place, g in part:
        pixels, products = memory(sums.dtype, _pixels_shape(x, window, place), g.shape)
        unfold(pixels, x[:, place[0], ...], _pixels(window), place[1].start)
        for number, (k, m) in enumerate(product(*map(range, window.taps))):
            rows = slice(k // down, k // down + g.shape[1])
            columns = slice(m // across, m // across + g.shape[2])
            seen = pixels[m % across, :, k % down, rows, columns, :]  # (C, rows, ow, images)
            write_result(products, "multiply", seen, g)
            sums[:, number] += total(products, (1, 2, 3))


def collect(gw: Array, totals: list[Array], memory: Memory) -> None:
    """Fill gw (C, 1, kh, kw) with the sum of the parts' totals, in order; totals[0] is changed."""
    for other in totals[1:]:
        totals[0] += other
    gw[...] = namespace(gw).reshape(totals[0], gw.shape)
