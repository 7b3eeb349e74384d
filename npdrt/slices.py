"""Slices of float32 matrices, and `npdrt.exact.matmul` on NumPy: the same bits, in memory that is
reused.

These slices keep the scale of their row or column, so that nothing is divided before the products
or multiplied after them: in float64 a power of two changes no digit of a float32. An operand is cut
in pieces that stay in cache, and its slices lie in memory as it does.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from npdrt.arrays import Array, at_once, namespace, quiet, write_result
from npdrt.parallel import scratch

PAIRS = ((0, 0), (0, 1), (1, 0))  # the products of slices that are added, in this order
PIECE = 1 << 14  # elements of an operand that are cut at once: 256 KiB of slices
SUMS = 1 << 20  # elements of a product that are added at once; at least ROWS rows
ROWS = 64
STACKED = 1 << 16  # elements of operands and products of a stack that are multiplied at once
GRID = 3.0 * 2.0**52  # plus a number of at most 2**52: the number rounded to a multiple of 2


class Slices(NamedTuple):
    """Two float64 slices of an operand in its shape, and which of its lines are finite."""

    high: Array
    low: Array
    finite: Array


# --- slices, on any array library ---------------------------------------------------------------


def bits_of(terms: int) -> int:
    """The digits of a slice, t, for sums of so many products."""
    return (53 - (terms - 1).bit_length()) // 2


def largest_of(x: Array, axis: int) -> Array:
    """The largest |element| of each line along `axis`, which is kept; NaN if there is one."""
    xp = namespace(x)
    return xp.max(xp.abs(x), axis=axis, keepdims=True)


def grid_of(largest: Array, bits: int) -> Array:
    """The number, float64, that is added to a line and subtracted again, which leaves its first
    slice. A line that is not finite has that of a line of zeros."""
    xp = namespace(largest)
    usable = xp.isfinite(largest) & (largest > 0)
    largest = xp.astype(xp.where(usable, largest, xp.ones_like(largest)), xp.float64)
    return power_below(largest) * (GRID * 2.0**-bits)


def cut_into(high: Array, low: Array, grid: Array, bits: int) -> None:
    """Cut a float64 matrix, or a stack of them, in `low` into two slices."""
    step = max(1, at_once(low, PIECE) * low.shape[0] // max(1, low.size))
    for i in range(0, low.shape[0], step):
        part = (slice(i, i + step), ...)
        coarse = grid if grid.shape[0] == 1 else grid[part]
        fine, h, rest = coarse * 2.0**-bits, high[part], low[part]
        write_result(h, "add", rest, coarse)
        h -= coarse
        rest -= h
        rest += fine
        rest -= fine


def power_below(x: Array) -> Array:
    """2**floor(log2(x)) of float64 numbers between 2**-1021 and 2**970, as `frexp` gives it,
    which the array API lacks (ufp of Rump, Ogita and Oishi 2008).

    >>> import numpy as np
    >>> power_below(np.array([1.0, 3.0, 0.3]))
    array([1.  , 2.  , 0.25])
    """
    wide = (2.0**52 + 1.0) * x
    return namespace(x).abs(wide - (1.0 - 2.0**-53) * wide)


# --- the product, on NumPy ----------------------------------------------------------------------


def multiply(a: Array, b: Array, out: Array | None = None) -> Array:
    """a @ b of float32 arrays (..., M, K) and (..., K, N); see `npdrt.exact.matmul`."""
    stack, terms = np.broadcast_shapes(a.shape[:-2], b.shape[:-2]), a.shape[-1]
    shape = (*stack, a.shape[-2], b.shape[-1])
    y = np.empty(shape, np.float32) if out is None else out
    if terms == 0 or 0 in shape:
        y[...] = 0
        return y
    a, b = (np.broadcast_to(x, (*stack, *x.shape[-2:])) for x in (a, b))
    with quiet():
        _fill(y, a, b, bits_of(terms))
    return y


def _fill(y: Array, a: Array, b: Array, bits: int) -> None:
    """y = a @ b, a few matrices of a stack or a panel of rows at a time."""
    step = max(1, STACKED * len(y) // (a.size + b.size + y.size))
    if y.ndim > 2 and step < len(y):
        for i in range(0, len(y), step):
            part = slice(i, i + step) if step > 1 else i
            _fill(y[part], a[part], b[part], bits)
        return
    columns = _cut(b, -2, bits, use="columns")
    rows = max(ROWS, SUMS // y.shape[-1]) if y.ndim == 2 else y.shape[-2]
    for r in range(0, y.shape[-2], rows):
        panel = (..., slice(r, r + rows), slice(None))
        _add_up(y[panel], _cut(a[panel], -1, bits, use="rows"), columns)


def _cut(x: Array, axis: int, bits: int, use: str) -> Slices:
    """The slices of x, whose lines along `axis` have a scale each, in scratch memory for `use`."""
    if abs(x.strides[-2]) < abs(x.strides[-1]):
        return Slices(*map(_turned, _cut(_turned(x), -3 - axis, bits, use)))
    largest = largest_of(x, axis)
    high, low = scratch(np.float64, x.shape, x.shape, use=use)
    low[...] = x
    cut_into(high, low, grid_of(largest, bits), bits)
    return Slices(high, low, np.isfinite(largest))


def _add_up(y: Array, a: Slices, b: Slices) -> None:
    """The products of the slices, added in order; a sum of zeros is +0."""
    total, product = scratch(np.float64, y.shape, y.shape, use="sums")
    for number, (i, j) in enumerate(PAIRS):
        np.matmul(a[i], b[j], out=product if number else total)
        if number:
            total += product
    total += 0.0
    y[...] = total
    if not (a.finite.all() and b.finite.all()):
        np.copyto(y, np.nan, where=~(a.finite & b.finite))


def _turned(x: Array) -> Array:
    return np.swapaxes(x, -1, -2)


def factors_below(x: Array) -> tuple[Array, Array]:
    """h and k, powers of two with h k = 2**floor(log2(x)), of float64 numbers x > 0; both are 1 for
    x = 0. They are far from the ends of float64, where 1 / (h k) need not exist."""
    xp = namespace(x)
    x = xp.where(x > 0, x, 1.0)
    h = power_below(xp.sqrt(x))
    return h, power_below(x / h)
