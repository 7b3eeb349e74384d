"""Lipschitz constants of derivatives: of normalisations, of products, of losses, and measured.

Source: MacDonald, Valmadre, Saratchandran and Lucey 2023, Section 4 and appendix.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from npdrt.errors import Error
from npdrt.trust.scaled import Host


class Bounds(NamedTuple):
    """Of a map of rows: the length of a row of its value, the norm of its derivative, and the
    Lipschitz constant of its derivative (Frobenius to spectral norm)."""

    value: float
    derivative: float
    lipschitz: float


def sphere_bounds(*, eps: float, scale: float = 1.0) -> Bounds:
    """Of `npdrt.trust.layers.sphere`: sqrt(c), eps^(-1/2), (3/2) (4/5)^(5/2) / (sqrt(c) eps).

    c = 1 for weight and, with one entry a row, entry normalisation; c = N for batch
    normalisation. Theorem 4.5 says that they exist; these are the best ones. The last: a symmetric
    trilinear form attains its norm on one vector (Banach), T(h, h, h) = sqrt(c) s^(-3/2)
    (3 u^3 / s - 3 u) with u = <y, h>, |h| = 1, which is largest for h along y, |y|^2 = c eps / 4.
    """
    if not (0 < eps < math.inf and 0 < scale < math.inf):
        raise Error(f"sphere_bounds: expected eps > 0 and scale > 0; got {eps} and {scale}")
    return Bounds(math.sqrt(scale), eps**-0.5, 1.5 * 0.8**2.5 / (math.sqrt(scale) * eps))


def product_lipschitz(bounds: Sequence[float], constants: Sequence[float]) -> float:
    """sum_i c_i prod_{j != i} b_j: the Lipschitz constant of a product of matrix functions that
    are bounded by b_i and Lipschitz with c_i (Lemma A.5)."""
    if len(bounds) != len(constants):
        raise Error(
            f"product_lipschitz: {len(bounds)} bounds and {len(constants)} constants; give one of "
            "each for every function"
        )
    others = (math.prod(b for j, b in enumerate(bounds) if j != i) for i in range(len(bounds)))
    return sum(c * rest for c, rest in zip(constants, others, strict=True))


def loss_lipschitz(derivative: Bounds, gradient: Bounds) -> float:
    """Lip(DF) sup|grad gamma| + sup|DF|^2 Lip(grad gamma), a Lipschitz constant of grad l for
    l = gamma o F (Corollary 4.4, the constant ours).

    derivative: of F, its `derivative` and `lipschitz`; gradient: of gamma, the same two.
    """
    return (
        derivative.lipschitz * gradient.derivative + derivative.derivative**2 * gradient.lipschitz
    )


def lipschitz_estimate(function: Callable[[Host], Host], points: Sequence[Host]) -> float:
    """The largest |f(a) - f(b)|_2 / |a - b|_F over pairs of points that follow each other: a lower
    estimate of the Lipschitz constant. function: to matrices, in the spectral norm."""
    pairs = [(a, b) for a, b in pairwise(points) if np.any(a != b)]
    if not pairs:
        raise Error("lipschitz_estimate: expected at least two points that differ; got none")
    return max(
        float(np.linalg.norm(function(a) - function(b), 2) / np.linalg.norm(a - b))
        for a, b in pairs
    )
