"""Elementary functions with the same bits on any machine, array library and device.

NumPy's exp, log and tanh change their bits with the SIMD level of the machine and with NumPy's
version. These are made of `+ - * /`, `sqrt`, comparisons and selections alone, which IEEE 754
defines to the last bit. docs/portable.md lists the operations of each in their order.

float32 is computed in float64 and rounded once. The result is the float32 next to the exact value
(for every argument of exp and tanh, and all but 5 of log), unless that is too near to the middle of
two for float64. The error of float64 is with each function. A NaN of the result is `numpy.nan`,
whatever NaN came in. Zeros, infinities and subnormal numbers give what NumPy gives.

>>> import numpy as np
>>> exp(np.array([0.0, 1.0]))
array([1.        , 2.71828183])
"""

from __future__ import annotations

from collections.abc import Callable

from npdrt.arrays import Array, in_blocks, namespace, quiet
from npdrt.errors import Error
from npdrt.slices import power_below

LN2 = 0.6931471805599453
LN2_HIGH, LN2_LOW = 0.6931471803691238, 1.9082149292705877e-10  # 33 bits, and the rest
LOG2_E = 1.4426950408889634
SQRT2 = 1.4142135623730951
# pi / 2 in 33 bits, the next 33, and the rest
QUARTER = 1.5707963267341256, 6.077100506303966e-11, 2.0222662487959506e-21
TURNS = 0.6366197723675814  # 2 / pi
WHOLE = 1.5 * 2.0**52  # x + WHOLE has no digit behind the point

# h coth(h) = 1 + h**2 / 3 - ...: 4**n B(2 n) / (2 n)! for n = 6, ..., 1
_COTH = (-1382 / 638512875, 2 / 93555, -1 / 4725, 2 / 945, -1 / 45, 1 / 3)
# 2 atanh(s) = 2 s + s (s**2 2 / 3 + s**4 2 / 5 + ...): 2 / (2 n + 1) for n = 10, ..., 1
_ATANH = tuple(2 / (2 * n + 1) for n in range(10, 0, -1))
# sin(r) / r and cos(r) in r**2: (-1)**n / (2 n + 1)! and (-1)**n / (2 n)!, n = 8, ..., 1
_SIN = (1 / 355687428096000, -1 / 1307674368000, 1 / 6227020800, -1 / 39916800,
        1 / 362880, -1 / 5040, 1 / 120, -1 / 6)  # fmt: skip
_COS = (1 / 20922789888000, -1 / 87178291200, 1 / 479001600, -1 / 3628800,
        1 / 40320, -1 / 720, 1 / 24, -1 / 2)  # fmt: skip
# log2((1 + u) / (1 - u)) / u in u**2, to 0.0003 / |u| for |u| < 0.67
_ROUGH_LOG2 = (0.9582219, 0.3956369, 0.9792026, 2.885143)


def exp(x: Array) -> Array:
    """e**x = 2**k e**r with k = round(x / ln 2) and |r| <= 0.35. float64: at most 0.9 ulp."""
    return _apply(_exp, x)


def expm1(x: Array) -> Array:
    """e**x - 1 without cancellation. float64: at most 1.1 ulps."""
    return _apply(_expm1, x)


def log(x: Array) -> Array:
    """Natural logarithm: k ln 2 + 2 atanh((m - 1) / (m + 1)) with x = 2**k m and m within
    sqrt(2) of 1. -inf at 0, NaN below. float64: at most 0.9 ulp."""
    return _apply(_log, x)


def log1p(x: Array) -> Array:
    """log(1 + x) without cancellation. -inf at -1, NaN below. float64: at most 1.2 ulps."""
    return _apply(_log1p, x)


def tanh(x: Array) -> Array:
    """Hyperbolic tangent (2**k (H + h) - (H - h)) / (2**k (H + h) + (H - h)), from
    x = k ln 2 / 2 + h and e**(2 h) = (H + h) / (H - h) with H = h coth(h). float64: at most
    3 ulps. tanh(-x) is -tanh(x)."""
    return _apply(_tanh, x)


def sin(x: Array) -> Array:
    """Sine of |x| <= 2**20 radians; NaN beyond. float64: at most 2.5 ulps, and 2**-98 more."""
    return _apply(_sin, x)


def cos(x: Array) -> Array:
    """Cosine of |x| <= 2**20 radians; NaN beyond. float64: at most 2.5 ulps, and 2**-98 more."""
    return _apply(_cos, x)


# --- float32 and float64, blocks, NaN ---------------------------------------------------------


def _apply(function: Callable[[Array, bool], Array], x: Array) -> Array:
    """`function(x, narrow)` in float64, rounded to the dtype of x. narrow: x was float32, so that
    it and the result are far from the ends of float64."""
    xp = namespace(x)
    if x.dtype not in (xp.float32, xp.float64):
        raise Error(
            f"{function.__name__[1:]}: expected float32 or float64; got {x.dtype}; convert it "
            'first, for example with x.astype("float32")'
        )
    narrow = bool(x.dtype == xp.float32)

    def block(part: Array) -> Array:
        return xp.astype(function(xp.astype(part, xp.float64), narrow), x.dtype)

    with quiet():
        if x.shape == ():
            return xp.reshape(block(xp.reshape(x, (1,))), ())
        return in_blocks(block, x)


def _clamp(x: Array, low: float, high: float) -> Array:
    xp = namespace(x)
    x = xp.where(x > high, high, x)
    return xp.where(x < low, low, x)


def _number(x: Array, y: Array) -> Array:
    """y, but NaN where x is: every processor has bits of its own for it."""
    return namespace(x).where(x != x, namespace(x).nan, y)


def _round(x: Array) -> Array:
    """The nearest integer, and the even one of two, for |x| < 2**51."""
    return (x + WHOLE) - WHOLE


def _horner(x: Array, coefficients: tuple[float, ...]) -> Array:
    total = coefficients[0] * x + coefficients[1]
    for c in coefficients[2:]:
        total = total * x + c
    return total


# --- powers of two ----------------------------------------------------------------------------


def power_of_two(k: Array, squarings: int = 13) -> Array:
    """2**k of whole float64 numbers, |k| <= 600; with 10 squarings |k| <= 152, with 8 |k| <= 60.

    It is the power of two below 2**(k + 1/2), so that a rough value of the latter is enough:
    (1 + z + z**2 / 2)**(2**n) with z = (k + 1/2) ln 2 / 2**n, n squarings, is within 20 %.
    """
    z = k * (LN2 / 2**squarings) + LN2 / 2 ** (squarings + 1)
    y = (0.5 * z + 1.0) * z + 1.0
    for _ in range(squarings):
        y = y * y
    return power_below(y)


def _halves(k: Array) -> tuple[Array, Array]:
    """(2**h, c) with 2**k = 2**h 2**h c and c = 1 or 2."""
    h = _round(0.5 * k - 0.25)
    return power_of_two(h), (k - h) - h + 1.0


def _logarithm(s: Array, narrow: bool) -> Array:
    """k of s = 2**k between 2**-1021 and 2**970; narrow: between 2**-150 and 2**150.

    log2 s = 2**n log2 s**(1 / 2**n), of which rounding leaves k if the error is below 1/2.
    """
    xp = namespace(s)
    roots = 1 if narrow else 4
    for _ in range(roots):
        s = xp.sqrt(s)
    s = xp.astype(s, xp.float32)
    for _ in range(5):
        s = xp.sqrt(s)
    u = (s - 1.0) / (s + 1.0)
    rough = u * _horner(u * u, _ROUGH_LOG2)
    return _round(xp.astype(rough, xp.float64) * 2.0 ** (roots + 5))


# --- exp --------------------------------------------------------------------------------------


def _reduced(x: Array) -> tuple[Array, Array, Array]:
    """k = round(x / ln 2), and x - k ln 2 as high - low: high is exact, low far below it."""
    k = _round(x * LOG2_E)
    return k, x - k * LN2_HIGH, k * LN2_LOW


def _coth(h: Array) -> Array:
    """h coth(h) - 1, of |h| < 0.18."""
    t = h * h
    return t * _horner(t, _COTH)


def _growth(high: Array, low: Array) -> Array:
    """e**r - 1 - high of r = high - low = 2 h, from e**r - 1 = r + r d / (1 - d) with
    d = h - (h coth(h) - 1). Its error is below 2**-56."""
    r = high - low
    h = 0.5 * r
    d = h - _coth(h)
    return r * d / (1.0 - d) - low


def _exp(x: Array, narrow: bool) -> Array:
    k, high, low = _reduced(_clamp(x, -104.0, 89.0) if narrow else _clamp(x, -746.0, 710.0))
    y = _growth(high, low) + high + 1.0
    if narrow:
        y = y * power_of_two(k, 10)
    else:
        s, c = _halves(k)
        y = y * c * s * s
    return _number(x, y)


def _expm1(x: Array, narrow: bool) -> Array:
    """s (e**r - 1) + (s - 1) for s = 2**k, computed for s / 2, which does not overflow. The
    rounding error of the sum s high + (s - 1) is added to it."""
    xp = namespace(x)
    k, high, low = _reduced(_clamp(x, -50.0, 89.0 if narrow else 710.0))
    if narrow:
        s = power_of_two(k - 1.0, 10)
    else:
        h, c = _halves(k - 1.0)
        s = h * h * c
    start, step = s - 0.5, s * high
    sum = start + step
    rest = step - (sum - start)
    y = 2.0 * (sum + (rest + s * _growth(high, low)))
    return _number(x, xp.where(xp.abs(x) < 2.0**-54, x, y))


def _tanh(x: Array, narrow: bool) -> Array:
    y = _clamp(x, -20.0, 20.0)
    k = _round(y * (2.0 * LOG2_E))
    h = (y - k * (0.5 * LN2_HIGH)) - k * (0.5 * LN2_LOW)
    s, q = power_of_two(k, 8), _coth(h)
    more, less = s * (q + h), q - h
    y = ((s - 1.0) + (more - less)) / ((s + 1.0) + (more + less))
    return _number(x, namespace(x).where(x == 0, x, y))


# --- log --------------------------------------------------------------------------------------


def _log(x: Array, narrow: bool) -> Array:
    xp = namespace(x)
    if narrow:
        y = _log_near(*_split(x, narrow))
    else:  # away from the ends of float64
        f, k = _split(xp.where(x > 1.0, x * 2.0**-60, x * 2.0**60), narrow)
        y = _log_near(f, xp.where(x > 1.0, k + 60.0, k - 60.0))
    return _edges(x, x, y)


def _log1p(x: Array, narrow: bool) -> Array:
    xp = namespace(x)
    large = x > 2.0**900
    y = x if narrow else xp.where(large, x * 2.0**-100, x)
    u = 1.0 + y
    v = u - 1.0
    rest = (1.0 - (u - v)) + (y - v)  # 1 + y = u + rest
    s = power_below(SQRT2 * u)
    k = _logarithm(s, narrow)
    k = k if narrow else xp.where(large, k + 100.0, k)
    y = _log_near((u / s - 1.0) + rest / s, k)
    return xp.where(xp.abs(x) < 2.0**-54, x, _edges(x, u, y))


def _split(x: Array, narrow: bool) -> tuple[Array, Array]:
    """(f, k) with x = 2**k (1 + f) and 1 + f within sqrt(2) of 1."""
    s = power_below(SQRT2 * x)
    return x / s - 1.0, _logarithm(s, narrow)


def _log_near(f: Array, k: Array) -> Array:
    """log(2**k (1 + f)), from log(1 + f) = 2 atanh(s) = f - (f**2 / 2 - s (f**2 / 2 + R)) with
    s = f / (2 + f) and R = s**2 2 / 3 + s**4 2 / 5 + ..."""
    s = f / (2.0 + f)
    z = s * s
    half = 0.5 * f * f
    rest = half - (s * (half + z * _horner(z, _ATANH)) + k * LN2_LOW)
    return k * LN2_HIGH - (rest - f)


def _edges(x: Array, argument: Array, y: Array) -> Array:
    """y, but what a logarithm is where its argument is not positive or x is infinite."""
    xp = namespace(x)
    y = xp.where(argument >= 0, y, xp.nan)
    y = xp.where(argument == 0, -xp.inf, y)
    return xp.where(x == xp.inf, xp.inf, y)


# --- sin and cos ------------------------------------------------------------------------------


def _sin(x: Array, narrow: bool) -> Array:
    return namespace(x).where(x == 0, x, _wave(x, 0.0))


def _cos(x: Array, narrow: bool) -> Array:
    return _wave(x, 1.0)


def _wave(x: Array, quarters: float) -> Array:
    """sin(x + quarters pi / 2), from sin and cos of r = x - k pi / 2, |r| <= pi / 4."""
    xp = namespace(x)
    k = _round(x * TURNS)
    r = ((x - k * QUARTER[0]) - k * QUARTER[1]) - k * QUARTER[2]
    k = k + quarters
    k = k - 4.0 * _round(0.25 * k - 0.375)  # 0, 1, 2 or 3
    odd = k - 2.0 * _round(0.5 * k - 0.25)
    t = r * r
    sine, cosine = r + r * (t * _horner(t, _SIN)), 1.0 + t * _horner(t, _COS)
    y = (sine * (1.0 - odd) + cosine * odd) * (1.0 - (k - odd))
    return xp.where(xp.abs(x) <= 2.0**20, y, xp.nan)
