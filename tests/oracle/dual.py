"""Exact derivatives for references: numbers that carry their partial derivatives, in mpmath.

A `Dual` is a real number of `DIGITS` digits with its partial derivative to every variable it
depends on. A reference is then a value only, written over NumPy object arrays of such numbers;
its derivative follows from the sum, product and chain rule, with no step size and no code of
`npdrt.ops`. Results are rounded once, to nearest even, to the format of a vector.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import mpmath
import numpy as np

from npdrt.conform.formats import Format, Values

DIGITS = 400  # decimal digits: what cancels exactly is 0 in every format, float64 too

Slopes = Mapping[Any, Any]  # the partial derivatives, by variable


class Dual:
    """A number and its partial derivatives. value: an mpf. slopes: mpf by variable, sparse."""

    __slots__ = ("slopes", "value")

    def __init__(self, value: Any, slopes: Slopes | None = None):
        self.value, self.slopes = mpmath.mpf(value), slopes or {}

    def chain(self, value: Any, slope: Any) -> Dual:
        """A function of this number: its value, and its derivative here."""
        return Dual(value, {key: slope * s for key, s in self.slopes.items()})

    def __add__(self, other: Any) -> Dual:
        b = dual(other)
        slopes = dict(self.slopes)
        for key, s in b.slopes.items():
            slopes[key] = slopes[key] + s if key in slopes else s
        return Dual(self.value + b.value, slopes)

    def __neg__(self) -> Dual:
        return self.chain(-self.value, -1)

    def __sub__(self, other: Any) -> Dual:
        return self + -dual(other)

    def __rsub__(self, other: Any) -> Dual:
        return dual(other) - self

    def __mul__(self, other: Any) -> Dual:
        b = dual(other)
        by_self, by_other = self.chain(0, b.value), b.chain(0, self.value)
        return Dual(self.value * b.value, (by_self + by_other).slopes)

    def __truediv__(self, other: Any) -> Dual:
        b = dual(other)
        return self * b.chain(1 / b.value, -1 / b.value**2)

    def __rtruediv__(self, other: Any) -> Dual:
        return dual(other) / self

    __radd__ = __add__
    __rmul__ = __mul__


def dual(x: Any) -> Dual:
    """`x` as a Dual; a plain number is a constant."""
    return x if isinstance(x, Dual) else Dual(x)


def constants(values: Any) -> Any:
    """An object array of constants, of the shape of `values`."""
    values = np.asarray(values)
    return fill(values.shape, [Dual(v) for v in values.reshape(-1).tolist()])


def reals(values: Any, context: Any = mpmath.mp) -> Any:
    """A number of mpmath, or an object array of them, in a context of mpmath."""
    flat = [context.mpf(v) for v in np.asarray(values).reshape(-1).tolist()]
    return fill(np.shape(values), flat)[()]


def variables(values: Any, name: Any) -> Any:
    """An object array of variables; element i, in C order, has the key (name, i)."""
    values = np.asarray(values)
    one = mpmath.mpf(1)
    flat = [Dual(v, {(name, i): one}) for i, v in enumerate(values.reshape(-1).tolist())]
    return fill(values.shape, flat)


def fill(shape: tuple[int, ...], flat: list[Any]) -> Any:
    """The object array of `shape` with the elements `flat` in C order."""
    out = np.empty(len(flat), dtype=object)
    out[:] = flat
    return out.reshape(shape)


def each(function: Callable[..., Dual], *arrays: Any) -> Any:
    """`function` of Duals applied element by element, with broadcasting."""
    spread = np.broadcast_arrays(*arrays)
    rows = zip(*(a.reshape(-1).tolist() for a in spread), strict=True)
    return fill(spread[0].shape, [function(*map(dual, row)) for row in rows])


def elementwise(value: Callable[[Any], Any], slope: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The map over arrays of a function of an mpf, given with its derivative."""
    return lambda array: each(lambda x: x.chain(value(x.value), slope(x.value)), array)


def exp(x: Dual) -> Dual:
    """e**x."""
    y = mpmath.exp(x.value)
    return x.chain(y, y)


def sqrt(x: Dual) -> Dual:
    """The root of a positive number."""
    y = mpmath.sqrt(x.value)
    return x.chain(y, 1 / (2 * y))


def log(x: Dual) -> Dual:
    """The natural logarithm; its slope at 0 is infinite."""
    return x.chain(mpmath.log(x.value), math.inf if x.value == 0 else 1 / x.value)


def total(row: list[Dual]) -> Dual:
    """The sum of the elements."""
    return sum(row, Dual(0))


def mean(row: list[Dual]) -> Dual:
    """The mean of the elements."""
    return total(row) / len(row)


def pull_back(output: Any, cotangent: Any, name: Any, shape: tuple[int, ...]) -> tuple[Any, Any]:
    """sum_i cotangent_i * d output_i / d variable for every variable of an array, as mpf; and the
    condition of these sums: the largest sum of absolute terms over the largest absolute sum.

    output: object array. cotangent: numbers, of its shape. shape: of the array called `name`.
    """
    zero = mpmath.mpf(0)
    sums, absolute = ([zero] * math.prod(shape) for _ in range(2))
    pairs = zip(output.reshape(-1), np.asarray(cotangent).reshape(-1).tolist(), strict=True)
    for y, g in pairs:
        for (owner, i), slope in dual(y).slopes.items():
            if owner == name:
                sums[i] += g * slope
                absolute[i] += abs(g * slope)
    largest = max(map(abs, sums), default=zero)
    return fill(shape, sums), max(absolute) / largest if largest else mpmath.mpf(1)


def rounded(numbers: Any, number: Format) -> Values:
    """Duals, mpf of any precision, or plain numbers, rounded once, to nearest even, to a format."""
    numbers = np.asarray(numbers, dtype=object)
    flat = [_round(x, number) for x in numbers.reshape(-1)]
    return np.asarray(flat, dtype=np.float64).reshape(numbers.shape)


def _round(x: Any, number: Format) -> float:
    x = x.value if isinstance(x, Dual) else x
    m = getattr(x, "context", mpmath)  # where a number has one, its precision is enough
    if m.isnan(x):
        return math.copysign(math.nan, -1)  # the bits that inf / inf has on x86, everywhere
    if not x or not m.isfinite(x):
        return float(x) + 0.0  # without a negative zero
    exponent = max(m.mag(x) - 1, 1 - number.emax)  # 2**(mag - 1) <= |x|
    unit = exponent - (number.precision - 1)
    digits = int(m.nint(m.ldexp(x, -unit)))  # at most 2**precision, a tie to even
    if exponent > number.emax or m.ldexp(abs(digits), unit) > number.largest:
        return math.copysign(math.inf, digits)
    return math.ldexp(digits, unit)
