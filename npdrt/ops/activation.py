"""Nonlinearities, elementwise."""

from __future__ import annotations

from typing import Any

from npdrt import compute
from npdrt.arrays import Array, namespace, real
from npdrt.autodiff import ALL, primitive
from npdrt.ops.elementary import bell, erfc_limit, limited, scaled_erfc

__all__ = ["gelu", "leaky_relu", "relu", "softplus"]

SQRT_HALF = 0.7071067811865476
DENSITY = 0.3989422804014327  # 1 / sqrt(2 pi)


@primitive(computes=ALL, analytic=False)
def relu(x: Array) -> Any:
    """max(x, 0). Subgradient 0 at x = 0."""
    xp = namespace(x)
    y = xp.maximum(x, xp.zeros((), dtype=x.dtype))
    return y, lambda g: g * xp.asarray(y > 0, dtype=g.dtype)


@primitive(computes=ALL, analytic=False)
def leaky_relu(x: Array, *, a: float = 0.01) -> Any:
    """x where x > 0, else a x (Bernstein et al. 2020, section 3). Subgradient a at x = 0."""
    xp = namespace(x)
    positive = x > 0
    return xp.where(positive, x, a * x), lambda g: xp.where(positive, g, a * g)


@primitive(computes=ALL)
def gelu(x: Array) -> Any:
    """x Phi(x) = x (1 + erf(x / sqrt 2)) / 2, the exact form (Hendrycks and Gimpel 2016).

    With a = |x|, e = exp(-a**2 / 2) and h = exp(a**2 / 2) Phi(-a), which does not underflow,

        Phi(-a) = e h,    Phi(a) = 1 - e h,    slope(-a) = e (h - a / sqrt(2 pi)) = 1 - slope(a)

    so that no digit cancels in the tails. Error at most 8 ulps; of the derivative
    Phi(x) + x exp(-x**2 / 2) / sqrt(2 pi) too, but 8 ulps of 1/2 near its zero at -0.7518, and 16
    where it is subnormal.
    """
    xp = namespace(x)
    positive = real(x) > 0
    a = limited(xp.where(positive, x, -x), erfc_limit(x) / SQRT_HALF)
    e, h = bell(a, 0.5), 0.5 * scaled_erfc(a * SQRT_HALF)
    y = xp.where(positive, x * (1.0 - e * h), -(a * h) * e)
    tail = e * (h - a * DENSITY)
    slope = xp.where(positive, 1.0 - tail, tail)
    return y, lambda g: g * slope


@primitive(computes=ALL)
def softplus(x: Array) -> Any:
    """log(1 + e**x) = max(x, 0) + log1p(e**-|x|), so that nothing overflows.

    Derivative: the sigmoid. Error of both at most 4 ulps.
    """
    xp = namespace(x)
    positive = real(x) > 0
    z = compute.exp(xp.where(positive, -x, x))
    y = xp.where(positive, x, xp.zeros_like(x)) + compute.log1p(z)
    return y, lambda g: g * xp.where(positive, 1.0 / (1.0 + z), z / (1.0 + z))
