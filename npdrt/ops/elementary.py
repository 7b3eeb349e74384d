"""Elementary functions, elementwise. Derivatives reuse the value if they need it."""

from __future__ import annotations

from typing import Any

from npdrt import compute
from npdrt.arrays import Array, namespace, real
from npdrt.autodiff import ALL, primitive

__all__ = ["absolute", "erf", "exp", "log", "sigmoid", "sqrt", "tanh"]

TWO_OVER_SQRT_PI = 1.1283791670955126

# Cody (1969), rational Chebyshev approximation of erf(x) / x near 0; from the highest power down.
_ERF_NEAR = (
    (1.85777706184603153e-1, 3.16112374387056560e0, 1.13864154151050156e2,
     3.77485237685302021e2, 3.20937758913846947e3),
    (1.0, 2.36012909523441209e1, 2.44024637934444173e2, 1.28261652607737228e3,
     2.84423683343917062e3),
)  # fmt: skip

# (1 + 2 t) exp(t**2) erfc(t) as a polynomial in (t - k) / (t + k), the form of Shepherd and
# Laframboise (1981); interpolated at Chebyshev's nodes in 60 digits. K, coefficients from the
# highest power down, and the largest t: exp(-t**2) is 0 there. Relative error 2**-28 in float32
# (_NARROW), 2**-56 in float64.
_NARROW = (3.0, (
    -0.00027128949206434123, -0.0007819309803969896, 0.0020059255339607354, 0.002574971053234887,
    -0.023797386719958243, 0.06829284568737248, -0.11927143820922761, 0.12964679068637122,
    -0.047562344583533214, -0.13562115240367345, 1.2530080583662773,
), 10.75)  # fmt: skip
_WIDE = (4.0, (
    -1.857394701795606e-09, -1.378979324370449e-08, -7.747345734139106e-09,
    1.1561626187794266e-07, 6.293925025912932e-08, -8.353902701847264e-07,
    3.01036503845739e-07, 5.717968778199187e-06, -1.1224578636524388e-05,
    -2.440316832011165e-05, 0.00015062216193162362, -0.00019925551826854835,
    -0.0007577733219903303, 0.005031969759638894, -0.01619773406189106,
    0.03716751556189665, -0.06633036581130201, 0.09373283499684072,
    -0.10103906603636162, 0.06809705425473575, 0.015379652102620897,
    -0.1396211168405629, 1.2329951186255526,
), 27.7)  # fmt: skip


@primitive(computes=ALL)
def exp(x: Array) -> Any:
    """e ** x. Derivative: the value itself."""
    y = compute.exp(x)
    return y, lambda g: g * y


@primitive(computes=ALL)
def log(x: Array) -> Any:
    """Natural logarithm. Derivative 1 / x."""
    return compute.log(x), lambda g: g / x


@primitive(computes=ALL)
def sqrt(x: Array) -> Any:
    """Square root. Derivative 1 / (2 sqrt x): infinite at 0."""
    y = namespace(x).sqrt(x)
    return y, lambda g: g / (2.0 * y)


@primitive(computes=ALL)
def tanh(x: Array) -> Any:
    """Hyperbolic tangent, to 4 ulps. Derivative 4 z / (1 + z)**2 with z = e**-2|x|, to 8 ulps,
    also for large |x|, where 1 - tanh(x)**2 would lose all digits."""
    xp = namespace(x)

    def vjp(g: Array) -> Array:
        z = compute.exp(-2.0 * xp.minimum(xp.abs(x), 400.0))
        return g * (4.0 * z / ((1.0 + z) * (1.0 + z)))

    return compute.tanh(x), vjp


@primitive(computes=ALL)
def sigmoid(x: Array) -> Any:
    """1 / (1 + e**-x), from z = e**-|x| so that nothing overflows, to 4 ulps. Derivative
    z / (1 + z)**2, to 8 ulps, also where 1 - sigmoid(x) has no digits left."""
    xp = namespace(x)
    positive = real(x) >= 0
    z = compute.exp(xp.where(positive, -x, x))
    y = xp.where(positive, 1.0 / (1.0 + z), z / (1.0 + z))
    return y, lambda g: g * (z / ((1.0 + z) * (1.0 + z)))


@primitive(computes=ALL, analytic=False)
def absolute(x: Array) -> Any:
    """|x|. Subgradient 0 at x = 0."""
    xp = namespace(x)
    return xp.abs(x), lambda g: g * xp.sign(x)


@primitive(computes=ALL)
def erf(x: Array) -> Any:
    """Error function (2 / sqrt pi) * integral of exp(-t**2) from 0 to x.

    x R(x**2) for |x| <= 0.46875 (Cody 1969), beyond it sign(x) (1 - exp(-x**2) S(|x|)), S from
    `scaled_erfc`. Error at most 4 ulps. The same form runs on every array library.
    Derivative (2 / sqrt pi) exp(-x**2), to 8 ulps.
    """
    xp = namespace(x)
    size = xp.where(real(x) < 0, -x, x)
    near, far = real(size) <= 0.46875, limited(size, erfc_limit(x))
    e = bell(far, 1.0)
    tail = 1.0 - e * scaled_erfc(far)
    small = xp.where(near, x, xp.zeros_like(x))
    y = xp.where(near, small * _ratio(small * small, _ERF_NEAR), xp.where(real(x) < 0, -tail, tail))
    return y, lambda g: g * (TWO_OVER_SQRT_PI * e)


def bell(x: Array, scale: float) -> Array:
    """exp(-scale x**2) of a raw array, scale a power of two and |x| below 64.

    x**2 rounded to the dtype would cost x**2 / 2 ulps. So x = r + d, r of few digits, and
    x**2 = r**2 + (x - r) (x + r), of which r**2 is exact and the rest small.
    """
    xp = namespace(x)
    r = xp.round(real(x) * 64.0) * 0.015625
    return compute.exp((-scale * r) * r) * compute.exp(-scale * ((x - r) * (x + r)))


def scaled_erfc(t: Array) -> Array:
    """exp(t**2) erfc(t) of a raw array, for 0 <= t <= `erfc_limit`: relative error 4 ulps."""
    k, coefficients, _ = _form(t)
    return _horner((t - k) / (t + k), coefficients) / (1.0 + 2.0 * t)


def erfc_limit(x: Array) -> float:
    """The largest argument of `scaled_erfc` in the dtype of x; erfc is 0 there."""
    return _form(x)[2]


def limited(size: Array, limit: float) -> Array:
    """`size`, which is not negative, or `limit` if it is larger; a NaN stays."""
    xp = namespace(size)
    return xp.where(real(size) > limit, xp.asarray(limit, dtype=size.dtype), size)


def _form(x: Array) -> tuple[float, tuple[float, ...], float]:
    return _NARROW if namespace(x).finfo(x.dtype).bits == 32 else _WIDE


def _ratio(x: Array, fraction: tuple[tuple[float, ...], tuple[float, ...]]) -> Array:
    return _horner(x, fraction[0]) / _horner(x, fraction[1])


def _horner(x: Array, coefficients: tuple[float, ...]) -> Array:
    total = coefficients[0] * x + coefficients[1]
    for c in coefficients[2:]:
        total = total * x + c
    return total
