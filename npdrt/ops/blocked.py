"""Convolutions on NumPy: the products of `npdrt.ops.convolution`, in memory that is there already,
on several threads.

The same blocks, the same products of the same operands and the same order of additions as there,
where they are defined: a test holds them to the same bits. A call writes to `out`, where it is
given, and allocates nothing that grows with the arrays.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from npdrt.arrays import Array, columns
from npdrt.ops import parallel
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

PANEL = 1 << 15  # elements of the weight that are put in another order at a time


def convolve(
    x: Array,
    weight: Array,
    out: Array | None = None,
    *,
    stride: Pair,
    padding: Pair,
    groups: int,
) -> Array:
    """See `npdrt.ops.convolution.convolve`."""
    x, weight = np.ascontiguousarray(x), np.ascontiguousarray(weight)
    window = forward_window(x.shape[2:], weight.shape[2:], stride, padding)
    dtype, count = np.result_type(x, weight), weight.shape[0]
    y = np.empty((count, x.shape[1], *window.size), dtype) if out is None else out
    (ordered,) = scratch(weight.dtype, _shape(weight, (0, 2, 3, 1)), use="caller")
    parallel.run(list(_reorder(ordered, weight, (0, 2, 3, 1), 0)))
    matrix, tasks = ordered.reshape(count, -1), list[Task]()
    for g in range(groups):
        ours, theirs = part(count, groups, g), part(x.shape[0], groups, g)
        tasks += _correlation(y[ours], matrix[ours], x[theirs], window)
    parallel.run(tasks)
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
) -> Array:
    """See `npdrt.ops.convolution.convolve_input`."""
    g, weight = np.ascontiguousarray(g), np.ascontiguousarray(weight)
    count, inner = weight.shape[:2]
    shape, dtype = (inner * groups, g.shape[1], *size), np.result_type(g, weight)
    gx = np.empty(shape, dtype) if out is None else out
    (ordered,) = scratch(weight.dtype, (weight.size,), use="caller")
    orders: list[Task] = []
    tasks: list[Task] = []
    start = 0
    for pixels, taps, window in backward_windows(size, weight.shape[2:], stride, padding):
        if 0 in window.taps:
            gx[:, :, *pixels] = 0
            continue
        flipped = weight[:, :, *taps][:, :, ::-1, ::-1]
        for k in range(groups):
            ours = flipped[part(count, groups, k)]
            tall = ordered[start : start + ours.size].reshape(_shape(ours, (2, 3, 0, 1)))
            start += ours.size
            orders += _reorder(tall, ours, (2, 3, 0, 1), 2)
            to = gx[part(shape[0], groups, k), :, *pixels]
            seen = g[part(count, groups, k)]
            tasks += _correlation(to, tall.reshape(-1, inner).T, seen, window)
    parallel.run(orders)
    parallel.run(tasks)
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
) -> Array:
    """See `npdrt.ops.convolution.convolve_weight`."""
    g, x = np.ascontiguousarray(g), np.ascontiguousarray(x)
    window = forward_window(x.shape[2:], size, stride, padding)
    shape, dtype = (g.shape[0], x.shape[0] // groups, *size), np.result_type(g, x)
    gw = np.empty(shape, dtype) if out is None else out
    turns: list[Task] = []
    tasks: list[Task] = []
    sums: list[Task] = []
    x, window = flat(x, window)
    most = shares(list(blocks(x.shape[1], window.size, columns(x))), shape[1])
    room, totals = scratch(dtype, (g.size,), (len(most) * gw.size,), use="caller")
    for k in range(groups):
        ours, theirs = part(g.shape[0], groups, k), x[part(x.shape[0], groups, k)]
        turned = _turned(room[g.size // groups * k :], g[ours], x.shape[1], window, turns)
        for some in chunks(shape[1]):
            to = gw[ours, some]
            parts = shares(turned, shape[1])
            added = totals[: len(parts) * to.size].reshape(len(parts), *_products(to, window))
            totals = totals[added.size :]
            for total, share in zip(added, parts, strict=True):
                tasks.append(partial(_weight, total, share, theirs[some], window))
            sums.append(partial(_summed, to, added))
    for work in filter(None, (turns, tasks, sums)):
        parallel.run(work)
    return gw


# --- the weight in another order --------------------------------------------------------------


def _shape(x: Array, axes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(x.shape[i] for i in axes)


def _reorder(to: Array, x: Array, axes: tuple[int, ...], axis: int) -> Iterator[Task]:
    """Tasks that copy `x` to `to` with its axes permuted, some of its outputs, which are `axis` of
    `to`, at a time: what they read stays in cache."""
    step = max(1, PANEL * x.shape[0] // max(x.size, 1))
    before = (slice(None),) * axis
    for k in range(0, x.shape[0], step):
        some = slice(k, k + step)
        yield partial(np.copyto, to[(*before, some)], x[some].transpose(axes))


# --- blocks -----------------------------------------------------------------------------------


def _correlation(y: Array, matrix: Array, x: Array, window: Window) -> Iterator[Task]:
    """The tasks that fill y (O, N, oh, ow) with the correlation of x with a kernel as a matrix."""
    x, window = flat(x, window)
    y = y.reshape(y.shape[0], x.shape[1], *window.size) if window.whole else y
    for images, rows in blocks(x.shape[1], window.size, columns(x)):
        yield partial(_correlate, y[:, images, rows], matrix, x[:, images], window, rows)


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
