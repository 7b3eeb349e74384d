"""Convolutions on NumPy: the products of `npdrt.ops.convolution`, in memory that is there already,
on several threads.

The same blocks, the same products of the same operands and the same order of additions as there,
where they are defined: a test holds them to the same bits. A call writes to `out`, where it is
given, and allocates nothing that grows with the arrays.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from npdrt.arrays import Array, columns
from npdrt.ops import parallel, winograd
from npdrt.ops.parallel import Task, scratch
from npdrt.ops.window import (
    Pair,
    Window,
    backward_windows,
    blocks,
    chunks,
    cut,
    flat,
    forward_window,
    narrow,
    part,
    shares,
    tap,
    unfold,
    unfolded_shape,
)

PANEL = 1 << 17  # elements of the weight that a task puts in another order or transforms


def convolve(
    x: Array,
    weight: Array,
    out: Array | None = None,
    *,
    stride: Pair,
    padding: Pair,
    groups: int,
    form: str = "direct",
) -> Array:
    """See `npdrt.ops.convolution.convolve`."""
    x, weight = np.ascontiguousarray(x), np.ascontiguousarray(weight)
    window = forward_window(x.shape[2:], weight.shape[2:], stride, padding, form)
    dtype, count = np.result_type(x, weight), weight.shape[0]
    y = np.empty((count, x.shape[1], *window.size), dtype) if out is None else out
    taps, found = weight.transpose(2, 3, 0, 1), []
    for g in range(groups):
        ours, theirs = part(count, groups, g), part(x.shape[0], groups, g)
        found.append(_Correlation(y[ours], taps[:, :, ours], x[theirs], window))
    _run(found)
    return y


def convolve_input(
    g: Array,
    weight: Array,
    out: Array | None = None,
    *,
    size: Pair,
    stride: Pair,
    padding: Pair,
    groups: int,
    form: str = "direct",
) -> Array:
    """See `npdrt.ops.convolution.convolve_input`."""
    g, weight = np.ascontiguousarray(g), np.ascontiguousarray(weight)
    count, inner = weight.shape[:2]
    shape, dtype = (inner * groups, g.shape[1], *size), np.result_type(g, weight)
    gx = np.empty(shape, dtype) if out is None else out
    found = []
    for pixels, taps, window in backward_windows(size, weight.shape[2:], stride, padding, form):
        if 0 in window.taps:
            gx[:, :, *pixels] = 0
            continue
        flipped = weight[:, :, *taps][:, :, ::-1, ::-1].transpose(2, 3, 0, 1)
        for k in range(groups):
            ours = part(count, groups, k)
            to = gx[part(shape[0], groups, k), :, *pixels]
            found.append(_Correlation(to, flipped[:, :, ours], g[ours], window, transposed=True))
    _run(found)
    return gx


def convolve_weight(
    g: Array,
    x: Array,
    out: Array | None = None,
    *,
    size: Pair,
    stride: Pair,
    padding: Pair,
    groups: int,
    form: str = "direct",
) -> Array:
    """See `npdrt.ops.convolution.convolve_weight`."""
    g, x = np.ascontiguousarray(g), np.ascontiguousarray(x)
    window = forward_window(x.shape[2:], size, stride, padding, form)
    shape, dtype = (g.shape[0], x.shape[0] // groups, *size), np.result_type(g, x)
    gw = np.empty(shape, dtype) if out is None else out
    if winograd.suits(window, g.shape[1], shape[1], shape[0] // groups):
        _weight_by_tiles(gw, g, x, window, groups)
        return gw
    turns: list[Task] = []
    tasks: list[Task] = []
    sums: list[Task] = []
    x, window = flat(x, window)
    most = shares(list(blocks(x.shape[1], window.size, columns(x))), len(chunks(shape[1])))
    room, totals = scratch(dtype, (g.size,), (len(most) * gw.size,), use="caller")
    for k in range(groups):
        ours, theirs = part(g.shape[0], groups, k), x[part(x.shape[0], groups, k)]
        turned = _turned(room[g.size // groups * k :], g[ours], x.shape[1], window, turns)
        for some in chunks(shape[1]):
            to = gw[ours, some]
            parts = shares(turned, len(chunks(shape[1])))
            added = totals[: len(parts) * to.size].reshape(len(parts), *_products(to, window))
            totals = totals[added.size :]
            for total, share in zip(added, parts, strict=True):
                tasks.append(partial(_weight, total, share, theirs[some], window))
            sums.append(partial(_summed, to, added))
    for work in filter(None, (turns, tasks, sums)):
        parallel.run(work)
    return gw


# --- correlations -----------------------------------------------------------------------------


_Stages = tuple[Sequence[Task], Sequence[Task]]  # what is run first, what then


class _Correlation(NamedTuple):
    """y (O, N, oh, ow) is to be the correlation of x with a kernel (kh, kw, O, C), or transposed:
    (kh, kw, C, O)."""

    y: Array
    taps: Array
    x: Array
    window: Window
    transposed: bool = False

    @property
    def by_tiles(self) -> bool:
        """Whether it is made in Winograd's form."""
        return winograd.suits(self.window, self.x.shape[1], self.x.shape[0], self.y.shape[0])

    @property
    def size(self) -> int:
        """Elements of what its products take for the kernel."""
        size = int(self.taps.size)
        return size // 9 * 16 if self.by_tiles else size


def _run(found: list[_Correlation]) -> None:
    """Make the correlations: first what their products take for the kernels, then the products."""
    if not found:
        return
    room = scratch(found[0].taps.dtype, *((c.size,) for c in found), use="caller")
    orders: list[Task] = []
    tasks: list[Task] = []
    for correlation, memory in zip(found, room, strict=True):
        make = _by_tiles if correlation.by_tiles else _directly
        before, after = make(correlation, memory)
        orders += before
        tasks += after
    parallel.run(orders)
    parallel.run(tasks)


def _some(count: int, size: int) -> list[slice]:
    """The third axis of a kernel of so many elements, some at a time: what a task makes stays in
    cache."""
    step = max(1, PANEL * count // size)
    return [slice(k, k + step) for k in range(0, count, step)]


def _directly(of: _Correlation, memory: Array) -> _Stages:
    """The tasks that put the kernel in order as a matrix, and those that correlate with it."""
    if of.transposed:
        to = memory.reshape(of.taps.shape)
        matrix = to.reshape(-1, to.shape[3]).T
    else:
        ordered = memory.reshape([of.taps.shape[i] for i in (2, 0, 1, 3)])
        to, matrix = ordered.transpose(1, 2, 0, 3), ordered.reshape(len(ordered), -1)
    orders = [
        partial(np.copyto, to[:, :, s], of.taps[:, :, s])
        for s in _some(of.taps.shape[2], of.taps.size)
    ]
    x, window = flat(of.x, of.window)
    y = of.y.reshape(len(of.y), x.shape[1], *window.size) if window.whole else of.y
    tasks = [
        partial(_correlate, y[:, images, rows], matrix, x[:, images], window, rows)
        for images, rows in blocks(x.shape[1], window.size, columns(x))
    ]
    return orders, tasks


def _by_tiles(of: _Correlation, memory: Array) -> _Stages:
    """The tasks that transform the kernel, and those that correlate with it, in Winograd's form."""
    to = memory.reshape(4, 4, *of.taps.shape[2:])
    kernel = to.swapaxes(2, 3) if of.transposed else to
    scaled = None if winograd.small(of.taps) else winograd.scale(of.taps, None)
    orders = [
        partial(_transform, to[:, :, s], of.taps[:, :, s], scaled)
        for s in _some(of.taps.shape[2], of.taps.size)
    ]
    tasks = [
        partial(_correlate_tiles, of.y, kernel, scaled, of.x, of.window, place)
        for place in winograd.places(of.x, of.window)
    ]
    return orders, tasks


def _transform(to: Array, taps: Array, scaled: Array | None) -> None:
    """Some outputs or channels of the transformed kernel, which is scaled."""
    rows, ordered = scratch(to.dtype, (4, 3, *taps.shape[2:]), taps.shape)
    np.multiply(taps, 1 if scaled is None else scaled, out=ordered)
    winograd.transform(to, rows, ordered)


def _correlate_tiles(
    y: Array, kernel: Array, scaled: Array | None, x: Array, window: Window, place: Any
) -> None:
    """One block in Winograd's form."""
    room = scratch(y.dtype, *winograd.correlation_shapes(x, len(y), window, place))
    winograd.correlate(y, kernel, scaled, x, window, place, room)


def _correlate(y: Array, matrix: Array, x: Array, window: Window, rows: slice) -> None:
    """One block: y (O, n, rows, ow)."""
    count, images, height, width = y.shape
    block = (count, height * width * images)
    *room, total, more = scratch(y.dtype, *_forms(x, window, height), block, block)
    seen = _seen(room, x, window, rows)
    for k, (a, b) in enumerate(zip(cut(matrix, len(seen)), seen, strict=True)):
        np.matmul(a, b, out=more if k else total)
        if k:
            np.add(total, more, out=total)
    y[...] = total.reshape(count, height, width, images).transpose(0, 3, 1, 2)


def _turned(
    room: Array, g: Array, images: int, window: Window, turns: list[Task]
) -> list[tuple[slice, slice, Array]]:
    """(images, rows, matrix (O, positions) with the images innermost) of every block of a
    cotangent: a view where it is of one image, else in `room`, which `turns` will fill."""
    g, start, found = g.reshape(g.shape[0], images, *window.size), 0, []
    for some, rows in blocks(images, window.size, columns(g)):
        ours = g[:, some, rows]
        if ours.shape[1] == 1:
            found.append((some, rows, ours.reshape(g.shape[0], -1)))
            continue
        ours = ours.transpose(0, 2, 3, 1)
        turned = room[start : start + ours.size].reshape(ours.shape)
        turns.append(partial(np.copyto, turned, ours))
        found.append((some, rows, turned.reshape(g.shape[0], -1)))
        start += ours.size
    return found


def _weight(
    total: Array, share: list[tuple[slice, slice, Array]], x: Array, window: Window
) -> None:
    """Fill `total` (number of products, O, taps of each) with what a part of the blocks adds to the
    derivative by the weights of some channels x."""
    images, rows, _ = max(share, key=lambda block: block[2].shape[1])
    forms = _forms(x[:, images], window, rows.stop - rows.start)
    *room, more = scratch(total.dtype, *forms, total.shape)
    for number, (images, rows, g) in enumerate(share):
        to = more if number else total
        for k, matrix in enumerate(_seen(room, x[:, images], window, rows)):
            np.matmul(g, matrix.T, out=to[k])
        if number:
            np.add(total, more, out=total)


def _weight_by_tiles(gw: Array, g: Array, x: Array, window: Window, groups: int) -> None:
    """Fill gw, in Winograd's form."""
    one = (gw.shape[0] // groups, gw.shape[1])
    found = winograd.parts(x[: one[1]], window, one[0])
    (totals,) = scratch(gw.dtype, (groups, len(found), 4, 4, *one), use="caller")
    tasks: list[Task] = []
    sums: list[Task] = []
    for k, added in enumerate(totals):
        ours, theirs = part(g.shape[0], groups, k), part(x.shape[0], groups, k)
        for total, share in zip(added, found, strict=True):
            tasks.append(partial(_weight_tiles, total, share, g[ours], x[theirs], window))
        for some in _some(one[0], gw.size // groups):
            sums.append(partial(_summed_tiles, gw[ours][some], added[..., some, :]))
    parallel.run(tasks)
    parallel.run(sums)


def _weight_tiles(total: Array, share: list[Any], g: Array, x: Array, window: Window) -> None:
    """Fill `total` (4, 4, O, C) with what a part of the blocks is."""
    for number, place in enumerate(share):
        forms = winograd.weight_shapes(g, x, window, place)
        *room, more = scratch(total.dtype, *forms, total.shape[2:])
        to = more if number else None
        winograd.correlate_weight(total, to, g, x, window, place, room)


def _summed_tiles(gw: Array, totals: Array) -> None:
    """Fill gw (O, C, 3, 3) with what the parts of the blocks come to."""
    one = gw.shape[:2]
    ordered, rows, total = scratch(gw.dtype, (3, 3, *one), (3, 4, *one), (4, 4, *one))
    total[...] = totals[0]
    for more in totals[1:]:
        np.add(total, more, out=total)
    winograd.restore(ordered, rows, total)
    gw[...] = ordered.transpose(2, 3, 0, 1)


def _products(gw: Array, window: Window) -> tuple[int, int, int]:
    """The form of the products for the derivative gw (O, C, kh, kw): one of each row, or one."""
    count, channels, kh, kw = gw.shape
    if narrow(channels, window):
        return 1, count, kh * kw * channels
    return kh, count, kw * channels


def _summed(gw: Array, totals: Array) -> None:
    """Fill gw (O, C, kh, kw) with the sum, in order, of what the parts of the blocks add to it."""
    (count, channels, kh, kw), total = gw.shape, totals[0]
    for more in totals[1:]:
        np.add(total, more, out=total)
    if len(total) == 1:
        gw[...] = total.reshape(count, kh, kw, channels).transpose(0, 3, 1, 2)
    else:
        gw[...] = total.reshape(kh, count, kw, channels).transpose(1, 3, 0, 2)


def _forms(x: Array, window: Window, height: int) -> list[tuple[int, ...]]:
    """The arrays that `_seen` of a block needs room for."""
    if window.pointwise:
        return []
    shape = unfolded_shape(x.shape[0], x.shape[1], height, window)
    if not narrow(x.shape[0], window):
        return [shape]
    positions = height * window.size[1] * x.shape[1]
    return [shape, (window.taps[0], window.taps[1] * x.shape[0], positions)]


def _seen(room: list[Any], x: Array, window: Window, rows: slice) -> list[Array]:
    """See `npdrt.ops.convolution._seen`; room: arrays of `_forms` of this block or a larger one."""
    height = rows.stop - rows.start
    if window.pointwise:
        return [x[:, 0, rows, 0]]
    fitted = [
        to.reshape(-1)[: int(np.prod(form))].reshape(form)
        for to, form in zip(room, _forms(x, window, height), strict=True)
    ]
    unfold(fitted[0], x, window, rows.start)
    seen = [tap(fitted[0], k, height) for k in range(window.taps[0])]
    if len(fitted) == 1:
        return seen
    for to, matrix in zip(fitted[1], seen, strict=True):
        to[...] = matrix
    return [fitted[1].reshape(-1, fitted[1].shape[2])]
