"""Shapes, basic indexing and gathering."""

from __future__ import annotations

import math
from types import EllipsisType
from typing import Any

from npdrt.arrays import Array, namespace
from npdrt.autodiff import ALL, Tensor, primitive
from npdrt.errors import Error
from npdrt.ops.reduction import axes_of

__all__ = ["broadcast_to", "concat", "gather", "getitem", "pad", "reshape", "split", "transpose"]

Index = int | slice | EllipsisType | None


@primitive(computes=ALL, moves=True)
def reshape(x: Array, *, shape: tuple[int, ...]) -> Any:
    """x in C order with another shape; one length may be -1."""
    xp = namespace(x)
    return xp.reshape(x, shape), lambda g: xp.reshape(g, x.shape)


@primitive(computes=ALL, moves=True)
def transpose(x: Array, *, axes: tuple[int, ...] | None = None) -> Any:
    """Axes permuted; without `axes`, reversed."""
    xp = namespace(x)
    axes = tuple(reversed(range(x.ndim))) if axes is None else axes_of(x, axes)
    if sorted(axes) != list(range(x.ndim)):
        raise Error(f"transpose: axes {axes} do not name each of {x.ndim} dimensions once")
    inverse = tuple(sorted(range(x.ndim), key=axes.__getitem__))
    return xp.permute_dims(x, axes), lambda g: xp.permute_dims(g, inverse)


@primitive(computes=ALL, moves=True)
def broadcast_to(x: Array, *, shape: tuple[int, ...]) -> Any:
    """x repeated along new or length-1 axes; `backward` sums the cotangent back."""
    return namespace(x).broadcast_to(x, shape), lambda g: g


@primitive(computes=ALL, moves=True)
def concat(*xs: Array, axis: int = 0) -> Any:
    """Arrays joined along an existing axis."""
    y = namespace(*xs).concat(xs, axis=axis)
    vjps, start = [], 0
    for x in xs:
        stop = start + x.shape[axis]
        vjps.append(_slicer(y.ndim, axis, start, stop))
        start = stop
    return y, tuple(vjps)


def _slicer(ndim: int, axis: int, start: int, stop: int) -> Any:
    index = [slice(None)] * ndim
    index[axis] = slice(start, stop)
    return lambda g: g[tuple(index)]


def split(x: Any, *, sizes: tuple[int, ...], axis: int = 0) -> list[Any]:
    """x cut along `axis` into consecutive parts of the given sizes."""
    (axis,) = axes_of(x, axis)
    total = x.shape[axis]
    if sum(sizes) != total or min(sizes, default=0) < 0:
        raise Error(f"split: sizes {sizes} do not add up to length {total} of axis {axis}")
    parts, start = [], 0
    for size in sizes:
        index: list[Any] = [slice(None)] * x.ndim
        index[axis] = slice(start, start + size)
        parts.append(getitem(x, index=tuple(index)))
        start += size
    return parts


@primitive(computes=ALL, moves=True)
def pad(x: Array, *, widths: tuple[tuple[int, int], ...], value: float = 0.0) -> Any:
    """x with `widths[i] = (before, after)` constant elements around each axis."""
    xp = namespace(x)
    if len(widths) != x.ndim:
        raise Error(f"pad: expected {x.ndim} pairs of widths; got {len(widths)}")
    if any(width < 0 for pair in widths for width in pair):
        raise Error(f"pad: widths must not be negative; got {widths}")
    if not _holds(x, value):
        raise Error(f"pad: {x.dtype} does not hold the value {value}; convert x or choose another")
    shape = tuple(n + a + b for n, (a, b) in zip(x.shape, widths, strict=True))
    inner = tuple(slice(a, a + n) for n, (a, _) in zip(x.shape, widths, strict=True))
    y = xp.full(shape, value, dtype=x.dtype)
    y[inner] = x
    return y, lambda g: g[inner]


def _holds(x: Array, value: float) -> bool:
    """Whether the dtype of x holds a number; a floating-point dtype may round it."""
    xp = namespace(x)
    if xp.isdtype(x.dtype, "bool"):
        return value in (0, 1)
    if not xp.isdtype(x.dtype, "integral"):
        return True
    info = xp.iinfo(x.dtype)
    return bool(info.min <= value <= info.max and value == int(value))


@primitive(computes=ALL, moves=True)
def getitem(x: Array, *, index: Index | tuple[Index, ...]) -> Any:
    """Basic indexing: ints, slices, None and `...`; for index arrays use `gather`."""
    xp = namespace(x)
    items = index if isinstance(index, tuple) else (index,)
    if not all(i is None or i is ... or type(i) in (int, slice) for i in items):
        raise Error(f"getitem: basic indices only, got {index!r}; use gather for index arrays")
    items = items if ... in items else (*items, ...)

    def gx(g: Array) -> Array:
        z = xp.zeros(x.shape, dtype=g.dtype)
        z[items] = g
        return z

    return x[items], gx


@primitive(computes=slice(1), moves=True)
def gather(x: Array, indices: Array, *, axis: int = 0) -> Any:
    """Slices of x along `axis` at integer `indices`: y[..., j, ...] = x[..., indices[j], ...].

    The indices' shape replaces the axis; negative ones count from the end. For an index outside
    x NumPy raises an error and CuPy wraps around, so check on the host where data enters. The
    derivative adds the cotangents of equal indices in a fixed order (no atomics): `scatter_add`.
    """
    xp = namespace(x, indices)
    (axis,), flat = axes_of(x, axis), xp.reshape(indices, (-1,))
    front = (axis, *(i for i in range(x.ndim) if i != axis))
    back = tuple(sorted(range(x.ndim), key=front.__getitem__))
    middle = (*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :])
    y = xp.reshape(xp.take(x, flat, axis=axis), middle)

    def gx(g: Array) -> Array:
        n, size = flat.shape[0], x.shape[axis]
        g = xp.reshape(g, (*x.shape[:axis], n, *x.shape[axis + 1 :]))
        width = math.prod(x.shape[i] for i in front[1:])
        rows = xp.reshape(xp.permute_dims(g, front), (n, width))
        totals = scatter_add(rows, flat, size)  # (size, width)
        return xp.permute_dims(xp.reshape(totals, tuple(x.shape[i] for i in front)), back)

    return y, (gx, None)


def scatter_add(rows: Array, indices: Array, size: int) -> Array:
    """The (size, K) array whose row v is the sum of `rows[j]` over indices[j] = v, in a fixed
    order that no thread count or device changes. rows: (n, K); indices: (n,).

    Sorted by index, equal indices are runs. In pass p every row gets the sum of the last 2**p rows
    of its run up to itself (a scan by doubling), so that the last row of a run ends with its total.
    """
    xp, n = namespace(rows, indices), rows.shape[0]
    if n == 0:
        return xp.zeros((size, rows.shape[1]), dtype=rows.dtype)
    keys = xp.astype(indices, xp.int64) % size  # (n,); negative ones count from the end
    order = xp.argsort(keys * n + xp.arange(n, dtype=xp.int64))  # no ties: any sort is stable
    # Row n is zeros, with a key of its own: it is added where there is nothing to add.
    keys = xp.concat((xp.take(keys, order), xp.full((1,), size, dtype=xp.int64)))  # (n + 1,)
    sums = xp.concat(
        (xp.take(rows, order, axis=0), xp.zeros((1, rows.shape[1]), dtype=rows.dtype))
    )  # (n + 1, K)
    places, zeros_row, reach = xp.arange(n + 1, dtype=xp.int64), xp.full((), n, dtype=xp.int64), 1
    while reach < n:
        before = xp.maximum(places - reach, -1)  # (n + 1,); -1 is the row of zeros
        in_run = xp.take(keys, before % (n + 1)) == keys
        sums = sums + xp.take(sums, xp.where(in_run, before % (n + 1), zeros_row), axis=0)
        reach *= 2
    wanted = xp.arange(size, dtype=xp.int64)
    last = (xp.searchsorted(keys, wanted, side="right") - 1) % (n + 1)  # (size,), of each run
    has_run = xp.take(keys, last) == wanted
    return xp.take(sums, xp.where(has_run, last, zeros_row), axis=0)  # (size, K)


def _tensor_getitem(self: Tensor, index: Any) -> Any:
    return getitem(self, index=index)


setattr(Tensor, "__getitem__", _tensor_getitem)  # noqa: B010  (a method known only here)
