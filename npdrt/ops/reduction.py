"""Reductions over `axis` (None for all, an int or a tuple), `keepdims` as in NumPy."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from npdrt import compute
from npdrt.arrays import Array, namespace, real
from npdrt.autodiff import ALL, primitive
from npdrt.compute import total
from npdrt.errors import Error

__all__ = ["logsumexp", "max", "mean", "sum", "var"]

Axis = int | tuple[int, ...] | None


def axes_of(x: Array, axis: Axis) -> tuple[int, ...]:
    """`axis` as a tuple of non-negative ints."""
    if axis is None:
        return tuple(range(x.ndim))
    axes = axis if isinstance(axis, tuple) else (axis,)
    if any(not -x.ndim <= a < x.ndim for a in axes):
        raise Error(f"axis {axis} is out of range for {x.ndim} dimension(s)")
    axes = tuple(a % x.ndim for a in axes)
    if len(set(axes)) < len(axes):
        raise Error(f"axis {axis} names one of {x.ndim} dimension(s) twice")
    return axes


def _spread(g: Array, x: Array, axes: tuple[int, ...]) -> Array:
    """The cotangent of a reduction with its reduced axes back, as length 1."""
    shape = tuple(1 if i in axes else n for i, n in enumerate(x.shape))
    return namespace(g).reshape(g, shape)


def _count(x: Array, axes: tuple[int, ...]) -> int:
    return math.prod(x.shape[a] for a in axes)


@primitive(computes=ALL)
def sum(x: Array, *, axis: Axis = None, keepdims: bool = False) -> Any:
    """Sum over `axis`, in short runs (`npdrt.arrays.total` states the error); of nothing, 0."""
    xp, axes = namespace(x), axes_of(x, axis)
    y = total(x, axes, keepdims=keepdims)
    return y, lambda g: xp.broadcast_to(_spread(g, x, axes), x.shape)


@primitive(computes=ALL)
def mean(x: Array, *, axis: Axis = None, keepdims: bool = False) -> Any:
    """Mean over `axis`: the sum (`npdrt.arrays.total`) divided by the count."""
    xp, axes = namespace(x), axes_of(x, axis)
    n = _count(x, axes)
    if n == 0:
        raise Error("mean of no elements is not defined")
    y = total(x, axes, keepdims=keepdims) / n
    return y, lambda g: xp.broadcast_to(_spread(g / n, x, axes), x.shape)


@primitive(computes=ALL, analytic=False, moves=True)
def max(x: Array, *, axis: Axis = None, keepdims: bool = False) -> Any:
    """Maximum over `axis`; elements that tie for it share the cotangent equally."""
    xp, axes = namespace(x), axes_of(x, axis)
    y = xp.max(x, axis=axes, keepdims=keepdims)

    def gx(g: Array) -> Array:
        winners = xp.asarray(x == _spread(y, x, axes), dtype=x.dtype)
        return winners * (_spread(g, x, axes) / total(winners, axes, keepdims=True))

    return y, gx


@primitive(computes=ALL)
def var(x: Array, *, axis: Axis = None, keepdims: bool = False, correction: float = 0.0) -> Any:
    """Variance over `axis`: sum (x - mean)**2 / (n - correction), two passes.

    correction=0 is the biased variance (batch norm), 1 the unbiased one.
    """
    axes = axes_of(x, axis)
    n = _count(x, axes)
    if n - correction <= 0:
        raise Error(f"variance of {n} element(s) with correction {correction} is not defined")
    centred = x - total(x, axes, keepdims=True) / n
    y = total(centred * centred, axes, keepdims=keepdims) / (n - correction)
    return y, lambda g: _spread(g, x, axes) * (2.0 / (n - correction)) * centred


@primitive(computes=ALL)
def logsumexp(x: Array, *, axis: Axis = None, keepdims: bool = False) -> Any:
    """log sum exp(x) over `axis`, shifted by the maximum so that nothing overflows.

    A slice that is all -inf gives -inf. Derivative: the softmax.
    """
    xp, axes = namespace(x), axes_of(x, axis)
    e = exponentials(x, axes)
    y = e.log_sums() + e.top
    flat = y if keepdims else xp.reshape(y, _reduced(x, axes))
    return flat, lambda g: _spread(g, x, axes) * (e.z / e.sums)


def _reduced(x: Array, axes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(n for i, n in enumerate(x.shape) if i not in axes)


class Exponentials(NamedTuple):
    """The exponentials of a raw array, shifted by its maximum m over some axes, which are kept.

    top: m, 0 where it is not finite. shifted: x - m. z: exp(x - m). sums: the sums of z, over 1
    where m is finite. others: the sums without the maximum's own 1. alone: whether the others
    add up to less than 1, so that log(sums) or 1 - z / sums would lose their digits.
    """

    top: Array
    shifted: Array
    z: Array
    sums: Array
    others: Array
    alone: Array

    def log_sums(self) -> Array:
        """log sum exp(x - m), to 4 ulps of what the z amount to, also near 0."""
        xp = namespace(self.sums)
        return xp.where(self.alone, compute.log1p(self.others), compute.log(self.sums))

    def missing(self) -> Array:
        """1 - softmax of the maximum, where it is alone."""
        return self.others / self.sums

    def at_top(self) -> Array:
        """Where an element is the maximum, and alone."""
        return self.alone & (real(self.shifted) >= 0)


def exponentials(x: Array, axes: tuple[int, ...]) -> Exponentials:
    """exp(x - max x) of a raw array over `axes`, and its sums."""
    xp = namespace(x)
    top, shifted = shifted_by_maximum(x, axes)
    z = compute.exp(shifted)
    sums = total(z, axes, keepdims=True)
    # z lies in [0, 1]: only the maximum loses its 1, and nothing is rounded.
    others = total(z - xp.floor(real(z)), axes, keepdims=True)
    return Exponentials(top, shifted, z, sums, others, is_alone(sums))


def is_alone(sums: Array) -> Array:
    """Whether the terms of `sums` are the maximum's 1 and others that add up to less than 1."""
    return (real(sums) >= 1) & (real(sums) < 2)


def shifted_by_maximum(x: Array, axes: tuple[int, ...]) -> tuple[Array, Array]:
    """The maximum m over `axes`, kept, 0 where it is not finite, and x - m."""
    xp = namespace(x)
    top = xp.max(real(x), axis=axes, keepdims=True)
    top = xp.where(xp.isfinite(top), top, xp.zeros_like(top))
    return top, x - top


def softmax_of(x: Array, axes: tuple[int, ...]) -> Array:
    """exp(x) / sum exp(x) of a raw array."""
    z = compute.exp(shifted_by_maximum(x, axes)[1])
    return z / total(z, axes, keepdims=True)
