"""Convolution on NumPy: on several threads, in memory that is reused.

The blocks, their products and the order of all additions are those of npdrt/ops/convolution.py: a
test demands equal bits. A call writes to `out` if it is given, and allocates nothing that grows
with the arrays. With `compiled`, its forms take the place of those of `npdrt.ops`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np

from npdrt import parallel
from npdrt.arrays import Array
from npdrt.ops.correlation import (
    Correlation,
    KernelDerivative,
    backward,
    forward,
    kernel_derivatives,
)
from npdrt.ops.window import Pair, forward_window
from npdrt.parallel import scratch

Compiled = Callable[[Any, str], Any]  # `npdrt.program.tiles.compiled`
PANEL = 1 << 17  # elements of a kernel that one task puts in another order or transforms


def convolve(
    x: Array,
    weight: Array,
    out: Array | None = None,
    *,
    stride: Pair,
    padding: Pair,
    groups: int,
    form: str = "direct",
    compiled: Compiled | None = None,
) -> Array:
    """See `npdrt.ops.convolution.convolve`."""
    x, weight = np.ascontiguousarray(x), np.ascontiguousarray(weight)
    window = forward_window(x.shape[2:], weight.shape[2:], stride, padding, form)
    shape = (weight.shape[0], x.shape[1], *window.size)
    y = np.empty(shape, np.result_type(x, weight)) if out is None else out
    _correlate(_with(compiled, forward(y, x, weight, window, groups)))
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
    compiled: Compiled | None = None,
) -> Array:
    """See `npdrt.ops.convolution.convolve_input`."""
    g, weight = np.ascontiguousarray(g), np.ascontiguousarray(weight)
    shape = (weight.shape[1] * groups, g.shape[1], *size)
    gx = np.empty(shape, np.result_type(g, weight)) if out is None else out
    _correlate(_with(compiled, backward(gx, g, weight, stride, padding, groups, form)))
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
    compiled: Compiled | None = None,
) -> Array:
    """See `npdrt.ops.convolution.convolve_weight`."""
    g, x = np.ascontiguousarray(g), np.ascontiguousarray(x)
    window = forward_window(x.shape[2:], size, stride, padding, form)
    shape = (g.shape[0], x.shape[0] // groups, *size)
    gw = np.empty(shape, np.result_type(g, x)) if out is None else out
    _differentiate(_with(compiled, kernel_derivatives(gw, g, x, window, groups)))
    return gw


def _with(compiled: Compiled | None, products: Iterable[Any]) -> list[Any]:
    """`Correlation`s or `KernelDerivative`s, in their compiled forms."""
    if compiled is None:
        return list(products)
    return [p._replace(form=compiled(p.form, p.x.dtype.name)) for p in products]


def _correlate(correlations: list[Correlation]) -> None:
    """Prepare all kernels, then fill all blocks."""
    if not correlations:
        return
    sizes = ((c.form.kernel_size(c.taps),) for c in correlations)
    # use="caller": this thread may run tasks too, whose own scratch arrays must not overwrite these
    buffers = scratch(correlations[0].taps.dtype, *sizes, use="caller")
    fill_tasks, blocks = [], []
    for c, buffer in zip(correlations, buffers, strict=True):
        kernel = c.form.kernel(buffer, c.taps, c.transposed)
        fill_tasks += [
            partial(c.form.fill, kernel, panel, c.taps, scratch)
            for panel in _panels(c.taps.shape[2], c.taps.size)
        ]
        blocks += [
            partial(c.form.correlate, c.y, kernel, c.x, c.window, place, scratch)
            for place in c.form.places(c.x, c.window)
        ]
    parallel.run(fill_tasks)
    parallel.run(blocks)


def _differentiate(derivatives: list[KernelDerivative]) -> None:
    """Copy the cotangent's blocks, then add up the blocks of every part, then the parts."""
    blocks = {
        id(b): b for d in derivatives for part in d.parts for _, b in part if not _is_matrix(b)
    }
    shapes = [b.shape for b in blocks.values()]
    buffers = scratch(derivatives[0].gw.dtype, *shapes, use="caller")  # as in _correlate
    shapes = [(len(d.parts), *d.form.total_shape(d.gw, d.window)) for d in derivatives]
    dtype = derivatives[0].form.total_dtype(derivatives[0].gw)
    sums = scratch(dtype, *shapes, use="totals")
    copies = dict(zip(blocks, buffers, strict=True))
    fill_tasks = [partial(np.copyto, copies[key], block) for key, block in blocks.items()]
    sum_tasks, collect_tasks = [], []
    for d, totals in zip(derivatives, sums, strict=True):
        for total, part in zip(totals, d.parts, strict=True):
            copied = [(place, copies.get(id(block), block)) for place, block in part]
            sum_tasks.append(partial(d.form.add_blocks, total, copied, d.x, d.window, scratch))
        for panel in _panels(len(d.gw), d.gw.size):
            outputs = totals[..., panel, :]
            collect_tasks.append(partial(d.form.collect, d.gw[panel], outputs, scratch))
    for tasks in filter(None, (fill_tasks, sum_tasks, collect_tasks)):
        parallel.run(tasks)


def _is_matrix(block: Array) -> bool:
    """Whether a cotangent's block (O, rows, ow, images) lies in memory as (O, positions)."""
    return bool(block.shape[-1] == 1 or block.flags.c_contiguous)


def _panels(count: int, size: int) -> list[slice]:
    """An axis of `count` of an array of `size` elements, in slices of about PANEL elements, so
    that the arrays of a task stay in cache."""
    step = max(1, PANEL * count // size)
    return [slice(k, k + step) for k in range(0, count, step)]
