"""The direct form of a correlation: for every block of the output, one product of matrices for each
row of the kernel, each (O, kw C) @ (kw C, positions), added in the order of the rows.

Of a block's pixels only the shifts along a row are copied out, images innermost
(`npdrt.ops.window.unfold`): a shift along a column is then a mere offset. Where a row of the kernel
has few taps, all rows are one product (`npdrt.ops.window.narrow`).

`npdrt.ops.winograd` has functions of the same names for its form. All write to memory that they are
given, so that `npdrt.ops.convolution`, the definition, and `npdrt.ops.blocked`, on NumPy's threads,
share one text. memory(dtype, *shapes) gives arrays with anything in them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from npdrt.arrays import Array, block_columns, namespace
from npdrt.ops.window import (
    Kernel,
    Memory,
    Place,
    Shape,
    Window,
    add_product,
    blocks,
    narrow,
    shares,
    tap,
    unfold,
    unfolded_shape,
)

CHANNELS = 64  # of the input at a time in the derivative by the kernel


def places(x: Array, window: Window) -> list[Place]:
    """(images, rows) of every block of the output."""
    return list(blocks(x.shape[1], window.size, block_columns(x)))


# --- the kernel -------------------------------------------------------------------------------


def kernel_size(taps: Array) -> int:
    """How many elements `kernel` needs."""
    return int(taps.size)


def kernel(room: Array, taps: Array, transposed: bool) -> Kernel:
    """The kernel in `room`, to be filled, as a matrix (O, kh kw C)."""
    xp = namespace(room)
    if transposed:
        target = xp.reshape(room, taps.shape)  # (kh, kw, C, O)
        rows = xp.reshape(target, (-1, taps.shape[3]))  # (kh kw C, O)
        return Kernel(target, xp.matrix_transpose(rows))
    kh, kw, outputs, channels = taps.shape
    ordered = xp.reshape(room, (outputs, kh, kw, channels))
    matrix = xp.reshape(ordered, (outputs, -1))  # (O, kh kw C)
    return Kernel(xp.permute_dims(ordered, (1, 2, 0, 3)), matrix)


def fill(kernel: Kernel, some: slice, taps: Array, memory: Memory) -> None:
    """Fill some of the third axis of the kernel."""
    kernel.target[:, :, some, :] = taps[:, :, some, :]


# --- the correlation --------------------------------------------------------------------------


def correlate(
    y: Array, kernel: Kernel, x: Array, window: Window, place: Place, memory: Memory
) -> None:
    """Fill a block of y (O, N, oh, ow) with the correlation of x (C, N, H, W)."""
    xp, (images, rows) = namespace(x), place
    shape = (y.shape[0], rows.stop - rows.start, window.size[1], images.stop - images.start)
    products = (y.shape[0], math.prod(shape[1:]))  # (O, positions)
    *room, total, buffer = memory(y.dtype, *operand_shapes(x, window, place), products, products)
    operands = read(room, x, window, place)
    width = kernel.matrix.shape[1] // len(operands)  # taps of a product
    for k, operand in enumerate(operands):
        row = kernel.matrix[:, k * width : (k + 1) * width]  # (O, kw C)
        add_product(total, row, operand, buffer, first=k == 0)
    total = xp.reshape(total, shape)  # (O, rows, ow, images)
    y[:, images, rows, :] = xp.permute_dims(total, (0, 3, 1, 2))


def operand_shapes(x: Array, window: Window, place: Place) -> list[Shape]:
    """The memory that `read` needs."""
    if window.pointwise:
        return []
    (images, rows), (kh, kw) = place, window.taps
    height, count = rows.stop - rows.start, images.stop - images.start
    unfolded = unfolded_shape(x.shape[0], count, height, window)
    one_product = (kh, kw * x.shape[0], height * window.size[1] * count)
    return [unfolded, one_product] if narrow(x.shape[0], window) else [unfolded]


def read(room: list[Array], x: Array, window: Window, place: Place) -> list[Array]:
    """The other factors of the kernel's rows: a matrix (kw C, positions) for each of them,
    or one (kh kw C, positions) for all."""
    xp, (images, rows) = namespace(x), place
    if window.pointwise:
        return [xp.reshape(x[:, images, rows, :], (x.shape[0], -1))]  # (C, positions)
    unfold(room[0], x[:, images, ...], window, rows.start)
    operands = [tap(room[0], k, rows.stop - rows.start) for k in range(window.taps[0])]
    if len(room) == 1:
        return operands
    together = room[1]
    for k, operand in enumerate(operands):
        together[k, ...] = operand
    return [xp.reshape(together, (-1, together.shape[2]))]  # (kh kw C, positions)


# --- the derivative by the kernel -------------------------------------------------------------


def channels_at_a_time(channels: int) -> list[slice]:
    """The channels of the input, `CHANNELS` at a time."""
    return [slice(c, min(c + CHANNELS, channels)) for c in range(0, channels, CHANNELS)]


def parts(order: list[Place], outputs: int, channels: int) -> list[list[Place]]:
    """The blocks, in order, cut into consecutive parts, each with a sum of its own."""
    return shares(order, len(channels_at_a_time(channels)))


def cotangent(g: Array, place: Place) -> Array:
    """A block (O, rows, ow, images) of the cotangent (O, N, oh, ow)."""
    return namespace(g).permute_dims(g[:, place[0], place[1], :], (0, 2, 3, 1))


def total_shape(gw: Array, window: Window) -> Shape:
    """The products of a block: one for every row of the kernel, or one for all."""
    outputs, channels, kh, kw = gw.shape
    if narrow(channels, window):
        return 1, outputs, kh * kw * channels
    return kh, outputs, kw * channels


def total_dtype(gw: Array) -> Any:
    """That of the kernel."""
    return gw.dtype


def add_blocks(
    total: Array, part: Iterable[tuple[Place, Array]], x: Array, window: Window, memory: Memory
) -> None:
    """Fill `total` (products, O, taps of each) with the sum over the blocks of a part, in order;
    each with its `cotangent`."""
    xp = namespace(x)
    for number, (place, g) in enumerate(part):
        *room, buffer = memory(total.dtype, *operand_shapes(x, window, place), total.shape[1:])
        matrix = xp.reshape(g, (g.shape[0], -1))  # (O, positions)
        for k, operand in enumerate(read(room, x, window, place)):
            transposed = xp.matrix_transpose(operand)  # (positions, kw C)
            add_product(total[k, ...], matrix, transposed, buffer, first=number == 0)


def collect(gw: Array, totals: list[Array], memory: Memory) -> None:
    """Fill gw (O, C, kh, kw) with the sum of the parts' totals, in order; totals[0] is changed."""
    xp, (outputs, channels, kh, kw), total = namespace(gw), gw.shape, totals[0]
    for other in totals[1:]:
        total += other
    if total.shape[0] == 1:
        total = xp.reshape(total, (outputs, kh, kw, channels))
        gw[...] = xp.permute_dims(total, (0, 3, 1, 2))
    else:
        total = xp.reshape(total, (kh, outputs, kw, channels))
        gw[...] = xp.permute_dims(total, (1, 3, 0, 2))
