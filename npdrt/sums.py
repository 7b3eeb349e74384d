"""Sums with the same bits on any machine, array library and device.

No library promises the order in which its sums add. These fold an axis in halves, one addition of
arrays a fold, so that the order is a matter of the length of the axis alone.
"""

from __future__ import annotations

import math

from npdrt.arrays import Array, namespace, quiet
from npdrt.errors import Error

Axis = int | tuple[int, ...] | None


def sum(x: Array, axis: Axis = None, keepdims: bool = False) -> Array:
    """Sum of float32 or float64 over `axis` (None for all), added in float64 and rounded once.

    The axes are summed one after another, the last first, each as `fold` says. No element gives
    0, and NaN is `numpy.nan`.

    Error: at most d 2**-53 sum|x|, with d the sum of ceil(log2 n) over the axes, and half an ulp
    more in float32.

    >>> import numpy as np
    >>> float(sum(np.array([1e16, 1.0, -1e16, 1.0])))  # (1e16 - 1e16) + (1 + 1)
    2.0
    """
    axes = _axes(x, axis)
    return _rounded(_total(x, axes), x, axes, keepdims)


def mean(x: Array, axis: Axis = None, keepdims: bool = False) -> Array:
    """`sum` in float64 divided by the number of elements, rounded once. `Error` if there is none.

    >>> import numpy as np
    >>> mean(np.array([[1.0, 2.0], [3.0, 5.0]]), axis=0)
    array([2. , 3.5])
    """
    axes = _axes(x, axis)
    count = math.prod(x.shape[a] for a in axes)
    if count == 0:
        raise Error("mean of no elements is not defined")
    return _rounded(_total(x, axes) / count, x, axes, keepdims)


def _axes(x: Array, axis: Axis) -> set[int]:
    xp = namespace(x)
    if x.dtype not in (xp.float32, xp.float64):
        raise Error(f"sum: expected float32 or float64; got {x.dtype}; convert it first")
    given = range(x.ndim) if axis is None else axis if isinstance(axis, tuple) else (axis,)
    if any(not -x.ndim <= a < x.ndim for a in given):
        raise Error(f"sum: axis {axis} is out of range for {x.ndim} dimension(s)")
    return {a % x.ndim for a in given}


def _total(x: Array, axes: set[int]) -> Array:
    """The sum in float64, with the axes kept."""
    total = namespace(x).astype(x, namespace(x).float64)
    with quiet():
        for axis in sorted(axes, reverse=True):
            total = fold(total, axis)
    return total


def fold(x: Array, axis: int) -> Array:
    """The sum of a float64 array over one axis, which is kept.

    The axis is filled up with zeros to a power of two. Then x[i] <- x[i] + x[i + h] for i < h,
    with h half of the length, half of that, ..., 1. The order is part of the definition of `sum`
    and of the updates.
    """
    xp, before = namespace(x), (slice(None),) * axis
    if x.shape[axis] == 0:
        return xp.zeros((*x.shape[:axis], 1, *x.shape[axis + 1 :]), dtype=x.dtype)
    while (n := x.shape[axis]) > 1:
        h = 1 << (n - 1).bit_length() - 1
        added = x[(*before, slice(0, n - h), ...)] + x[(*before, slice(h, n), ...)]
        rest = x[(*before, slice(n - h, h), ...)]  # meets zeros
        x = added if n == 2 * h else xp.concat((added, rest + 0.0), axis=axis)
    return x


def _rounded(total: Array, x: Array, axes: set[int], keepdims: bool) -> Array:
    """The result in the dtype of x, with one NaN."""
    xp = namespace(x)
    shape = tuple(n for a, n in enumerate(x.shape) if a not in axes)
    with quiet():
        total = xp.astype(xp.where(total == total, total, xp.nan), x.dtype)
    return total if keepdims else xp.reshape(total, shape)
