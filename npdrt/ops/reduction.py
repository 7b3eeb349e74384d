"""Reductions over `axis` (None for all, an int or a tuple), `keepdims` as in NumPy."""

from __future__ import annotations

import math
from typing import Any

from npdrt.arrays import Array, namespace, real
from npdrt.autodiff import primitive
from npdrt.errors import Error

Axis = int | tuple[int, ...] | None


def axes_of(x: Array, axis: Axis) -> tuple[int, ...]:
    """`axis` as a tuple of non-negative ints."""
    if axis is None:
        return tuple(range(x.ndim))
    axes = axis if isinstance(axis, tuple) else (axis,)
    if any(not -x.ndim <= a < x.ndim for a in axes):
        raise Error(f"axis {axis} is out of range for {x.ndim} dimension(s)")
    return tuple(a % x.ndim for a in axes)


def _spread(g: Array, x: Array, axes: tuple[int, ...]) -> Array:
    """The cotangent of a reduction with its reduced axes back, as length 1."""
    shape = tuple(1 if i in axes else n for i, n in enumerate(x.shape))
    return namespace(g).reshape(g, shape)


def _count(x: Array, axes: tuple[int, ...]) -> int:
    return math.prod(x.shape[a] for a in axes)


@primitive
def sum(x: Array, *, axis: Axis = None, keepdims: bool = False) -> Any:
    """Sum over `axis`; of nothing, 0."""
    xp, axes = namespace(x), axes_of(x, axis)
    y = xp.sum(x, axis=axes, keepdims=keepdims, dtype=x.dtype)
    return y, lambda g: xp.broadcast_to(_spread(g, x, axes), x.shape)


@primitive
def mean(x: Array, *, axis: Axis = None, keepdims: bool = False) -> Any:
    """Mean over `axis`: the sum divided by the count."""
    xp, axes = namespace(x), axes_of(x, axis)
    n = _count(x, axes)
    if n == 0:
        raise Error("mean of no elements is not defined")
    y = xp.sum(x, axis=axes, keepdims=keepdims, dtype=x.dtype) / n
    return y, lambda g: xp.broadcast_to(_spread(g / n, x, axes), x.shape)


@primitive(analytic=False)
def max(x: Array, *, axis: Axis = None, keepdims: bool = False) -> Any:
    """Maximum over `axis`; elements that tie for it share the cotangent equally."""
    xp, axes = namespace(x), axes_of(x, axis)
    y = xp.max(x, axis=axes, keepdims=keepdims)

    def gx(g: Array) -> Array:
        winners = xp.asarray(x == _spread(y, x, axes), dtype=x.dtype)
        return winners * (_spread(g, x, axes) / xp.sum(winners, axis=axes, keepdims=True))

    return y, gx


@primitive
def var(x: Array, *, axis: Axis = None, keepdims: bool = False, correction: float = 0.0) -> Any:
    """Variance over `axis`: sum (x - mean)**2 / (n - correction), two passes.

    correction=0 is the biased variance (batch norm), 1 the unbiased one.
    """
    xp, axes = namespace(x), axes_of(x, axis)
    n = _count(x, axes)
    if n - correction <= 0:
        raise Error(f"variance of {n} element(s) with correction {correction} is not defined")
    centred = x - xp.sum(x, axis=axes, keepdims=True, dtype=x.dtype) / n
    y = xp.sum(centred * centred, axis=axes, keepdims=keepdims) / (n - correction)
    return y, lambda g: _spread(g, x, axes) * (2.0 / (n - correction)) * centred


@primitive
def logsumexp(x: Array, *, axis: Axis = None, keepdims: bool = False) -> Any:
    """log sum exp(x) over `axis`, shifted by the maximum so that nothing overflows.

    A slice that is all -inf gives -inf. Derivative: the softmax.
    """
    xp, axes = namespace(x), axes_of(x, axis)
    top, _, log_sum, weights = shifted_softmax(x, axes)
    y = log_sum + top
    flat = y if keepdims else xp.reshape(y, _reduced(x, axes))
    return flat, lambda g: _spread(g, x, axes) * weights


def _reduced(x: Array, axes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(n for i, n in enumerate(x.shape) if i not in axes)


def shifted_softmax(x: Array, axes: tuple[int, ...]) -> tuple[Array, Array, Array, Array]:
    """(m, x - m, log sum exp(x - m), softmax) of a raw array, axes kept; m is the maximum.

    x - m - log sum keeps the digits of log softmax where x - (log sum + m) would lose them.
    """
    xp = namespace(x)
    top = xp.max(real(x), axis=axes, keepdims=True)
    top = xp.where(xp.isfinite(top), top, xp.zeros_like(top))
    shifted = x - top
    z = xp.exp(shifted)
    total = xp.sum(z, axis=axes, keepdims=True)
    return top, shifted, xp.log(total), z / total
