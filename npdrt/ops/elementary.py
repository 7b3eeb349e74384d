"""Elementary functions, elementwise. Derivatives reuse the value where it is at hand."""

from __future__ import annotations

from typing import Any

from npdrt.arrays import Array, namespace, real
from npdrt.autodiff import primitive

TWO_OVER_SQRT_PI = 1.1283791670955126

# Cody (1969), rational Chebyshev approximations of erf and erfc; from the highest power down.
_ERF_NEAR = (
    (1.85777706184603153e-1, 3.16112374387056560e0, 1.13864154151050156e2,
     3.77485237685302021e2, 3.20937758913846947e3),
    (1.0, 2.36012909523441209e1, 2.44024637934444173e2, 1.28261652607737228e3,
     2.84423683343917062e3),
)  # fmt: skip
_ERFC_FAR = (
    (2.15311535474403846e-8, 5.64188496988670089e-1, 8.88314979438837594e0,
     6.61191906371416295e1, 2.98635138197400131e2, 8.81952221241769090e2,
     1.71204761263407058e3, 2.05107837782607147e3, 1.23033935479799725e3),
    (1.0, 1.57449261107098347e1, 1.17693950891312499e2, 5.37181101862009858e2,
     1.62138957456669019e3, 3.29079923573345963e3, 4.36261909014324716e3,
     3.43936767414372164e3, 1.23033935480374942e3),
)  # fmt: skip


@primitive
def exp(x: Array) -> Any:
    """e ** x. Derivative: the value itself."""
    y = namespace(x).exp(x)
    return y, lambda g: g * y


@primitive
def log(x: Array) -> Any:
    """Natural logarithm. Derivative 1 / x."""
    return namespace(x).log(x), lambda g: g / x


@primitive
def sqrt(x: Array) -> Any:
    """Square root. Derivative 1 / (2 sqrt x): infinite at 0."""
    y = namespace(x).sqrt(x)
    return y, lambda g: g / (2.0 * y)


@primitive
def tanh(x: Array) -> Any:
    """Hyperbolic tangent. Derivative 1 - tanh(x)**2."""
    y = namespace(x).tanh(x)
    return y, lambda g: g * (1.0 - y * y)


@primitive
def sigmoid(x: Array) -> Any:
    """1 / (1 + e**-x), from e**-|x| so that nothing overflows. Derivative s (1 - s)."""
    xp = namespace(x)
    positive = real(x) >= 0
    z = xp.exp(xp.where(positive, -x, x))
    y = xp.where(positive, 1.0 / (1.0 + z), z / (1.0 + z))
    return y, lambda g: g * y * (1.0 - y)


@primitive(analytic=False)
def absolute(x: Array) -> Any:
    """|x|. Subgradient 0 at x = 0."""
    xp = namespace(x)
    return xp.abs(x), lambda g: g * xp.sign(x)


@primitive
def erf(x: Array) -> Any:
    """Error function (2 / sqrt pi) * integral of exp(-t**2) from 0 to x.

    Rational approximations of Cody (1969): x R(x**2) for |x| <= 0.46875, beyond it
    sign(x) (1 - exp(-x**2) S(|x|)), one for |x| >= 6. The absolute error stays below 3e-16 in
    float64 and 2.5e-7 in float32 (tests/test_ops.py; measured 2.8e-16 and, over every float32,
    2.1e-7, both just above the joint at 0.46875). The same form runs on every array library.
    Derivative (2 / sqrt pi) exp(-x**2).
    """
    xp = namespace(x)
    return erf_value(x), lambda g: g * (TWO_OVER_SQRT_PI * xp.exp(-x * x))


def erf_value(x: Array) -> Array:
    """`erf` of a raw array, shared with `gelu`."""
    xp = namespace(x)
    negative = real(x) < 0
    size = xp.where(negative, -x, x)
    near = real(size) <= 0.46875
    far = xp.where(real(size) > 6.0, xp.asarray(6.0, dtype=x.dtype), size)
    tail = 1.0 - xp.exp(-far * far) * _ratio(xp.where(near, xp.ones_like(x), far), _ERFC_FAR)
    small = xp.where(near, x, xp.zeros_like(x))
    return xp.where(near, x * _ratio(small * small, _ERF_NEAR), xp.where(negative, -tail, tail))


def _ratio(x: Array, fraction: tuple[tuple[float, ...], tuple[float, ...]]) -> Array:
    return _horner(x, fraction[0]) / _horner(x, fraction[1])


def _horner(x: Array, coefficients: tuple[float, ...]) -> Array:
    total = coefficients[0] * x + coefficients[1]
    for c in coefficients[2:]:
        total = total * x + c
    return total
