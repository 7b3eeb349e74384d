"""Spectral normalisation: a weight divided by an estimate of its largest singular value."""

from __future__ import annotations

import math
from typing import Any

from npdrt.arrays import Array, namespace, real
from npdrt.autodiff import ALL, detach, primitive
from npdrt.compute import product, total
from npdrt.errors import Error

__all__ = ["spectral_normalise"]


def power_iteration(weight: Any, u: Array, *, iterate: bool) -> tuple[Array, Array]:
    """The vectors (u', v) that estimate the largest singular value of weight as u'^T weight v.

        v = weight^T u / |weight^T u|,    u' = weight v / |weight v|

    weight: (out, in), or (out, ...), read as the matrix (out, everything else): a kernel of a
    convolution (O, C, kh, kw) has in = C kh kw. u: (out,), of length 1, the estimate of the left
    singular vector so far. iterate: False keeps u' = u, for evaluation. Returns u' (out,) and
    v (in,), constants in any derivative. One call costs two matrix-vector products (one without
    `iterate`); over many calls with slowly changing weights u converges to the singular vector, at
    the rate (s2 / s1)^2 of the two largest singular values. Where a product is zero, v is zero and
    u' is u.

    Source: Miyato, Kataoka, Koyama and Yoshida 2018, "Spectral Normalization for Generative
    Adversarial Networks", Algorithm 1.
    """
    weight = detach(weight)
    xp = namespace(weight, u)
    if weight.ndim < 2 or tuple(u.shape) != (weight.shape[0],):
        raise Error(
            f"power_iteration: expected weight (out, in) and u (out,); got {tuple(weight.shape)} "
            f"and {tuple(u.shape)}"
        )
    weight = _matrix(weight)
    row = product(xp.reshape(u, (1, -1)), weight)  # (1, in)
    v = _unit(xp.reshape(row, (-1,)), 0.0)
    if iterate:
        u = _unit(_product(weight, v), u)
    return u, v


def _matrix(weight: Array) -> Array:
    """(out, ...) as (out, everything else)."""
    return weight if weight.ndim == 2 else namespace(weight).reshape(weight, (weight.shape[0], -1))


def _shaped(matrix: Array, shape: Any) -> Array:
    """The matrix in the shape of the weight."""
    return matrix if len(shape) == 2 else namespace(matrix).reshape(matrix, shape)


def _product(weight: Array, v: Array) -> Array:
    """weight @ v for a vector, as a product of matrices."""
    xp = namespace(weight)
    return xp.reshape(product(weight, xp.reshape(v, (-1, 1))), (-1,))


def _unit(x: Array, otherwise: Any) -> Array:
    """x / |x|, or `otherwise` where |x| is 0."""
    xp = namespace(x)
    size = xp.sqrt(total(x * x, (0,)))
    zero = real(size) == 0
    return xp.where(zero, otherwise, x / xp.where(zero, 1.0, size))


@primitive(computes=ALL)
def spectral_normalise(weight: Array, u: Array, v: Array) -> Any:
    """weight / sigma with sigma = u^T weight v: (out, in), (out,), (in,) -> (out, in).

    A weight (out, ...) is read as the matrix (out, everything else) and keeps its shape.

        gweight = (g - <g, weight / sigma> u v^T) / sigma

    u and v are constants, so that <gweight, weight> = 0: the result, and with it the loss, does
    not change when weight is multiplied by a positive number. By a power of two it keeps its
    bits. If sigma is 0, as for a zero weight, it counts as 1. Cost: one matrix-vector product and a
    few passes over weight.

    Source: Miyato et al. 2018, equation 8 and the gradient analysis that follows it. Layers so
    normalised are those whose weight norms Bernstein et al. 2020, Figure 2 right, show.
    """
    xp = namespace(weight, u, v)
    sizes = (weight.shape[0], math.prod(weight.shape[1:])) if weight.ndim > 1 else ()
    if not sizes or (*u.shape, *v.shape) != sizes:
        raise Error(
            f"spectral_normalise: expected weight (out, in), u (out,) and v (in,); got "
            f"{tuple(weight.shape)}, {tuple(u.shape)} and {tuple(v.shape)}"
        )
    matrix, shape = _matrix(weight), weight.shape
    sigma = total(u * _product(matrix, v), (0,))
    sigma = xp.where(real(sigma) == 0, 1.0, sigma)
    value = matrix / sigma

    def vjp(g: Array) -> Array:
        g, outer = _matrix(g), xp.reshape(u, (-1, 1)) * xp.reshape(v, (1, -1))  # (out, in)
        return _shaped((g - total(g * value, (0, 1)) * outer) / sigma, shape)

    return _shaped(value, shape), (vjp, None, None)
