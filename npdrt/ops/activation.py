"""Nonlinearities, elementwise."""

from __future__ import annotations

from typing import Any

from npdrt.arrays import Array, namespace, real
from npdrt.autodiff import primitive
from npdrt.ops.elementary import TWO_OVER_SQRT_PI, erf_value

SQRT_HALF = 0.7071067811865476


@primitive(analytic=False)
def relu(x: Array) -> Any:
    """max(x, 0). Subgradient 0 at x = 0."""
    xp = namespace(x)
    y = xp.maximum(x, xp.zeros((), dtype=x.dtype))
    return y, lambda g: g * xp.asarray(y > 0, dtype=g.dtype)


@primitive(analytic=False)
def leaky_relu(x: Array, *, a: float = 0.01) -> Any:
    """x where x > 0, else a x (Bernstein et al. 2020, section 3). Subgradient a at x = 0."""
    xp = namespace(x)
    positive = x > 0
    return xp.where(positive, x, a * x), lambda g: xp.where(positive, g, a * g)


@primitive
def gelu(x: Array) -> Any:
    """x Phi(x) = x (1 + erf(x / sqrt 2)) / 2, the exact form (Hendrycks and Gimpel 2016).

    Derivative Phi(x) + x exp(-x**2 / 2) / sqrt(2 pi).
    """
    xp = namespace(x)
    phi = 0.5 * (1.0 + erf_value(x * SQRT_HALF))
    density = 0.5 * TWO_OVER_SQRT_PI * SQRT_HALF
    return x * phi, lambda g: g * (phi + density * x * xp.exp(-0.5 * x * x))


@primitive
def softplus(x: Array) -> Any:
    """log(1 + e**x) = max(x, 0) + log1p(e**-|x|), so that nothing overflows.

    Derivative: the sigmoid.
    """
    xp = namespace(x)
    positive = real(x) > 0
    z = xp.exp(xp.where(positive, -x, x))
    y = xp.where(positive, x, xp.zeros_like(x)) + xp.log1p(z)
    return y, lambda g: g * xp.where(positive, 1.0 / (1.0 + z), z / (1.0 + z))
