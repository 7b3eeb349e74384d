"""How rounding errors grow in Newton-Schulz steps: the bound by which Muon's answers are judged.

A step X <- a X + b X X^T X + c (X X^T)^2 X applies q(s) = a s + b s^3 + c s^5 to the singular
values of X. A series has one triple (a, b, c) for each step. A small change of X changes f(X), for
any odd f of the singular values, by at most the largest divided difference of f at the points
+-s_i, in the Frobenius norm. So the error of k steps is that of each step, times the divided
difference of the steps that follow.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
Triple = tuple[float, float, float]
Series = tuple[Triple, ...]


@lru_cache(4096)  # the candidates of a search meet the same matrices
def spread(singular: tuple[float, ...], series: Series, many: float) -> tuple[float, float]:
    """How much the result of the steps changes, in the Frobenius norm, for a unit change of the
    start, and for unit roundings of every operation in between.

    singular: the singular values of the start. many: the roundings of an element of a product, 1 if
    its terms are added in a wider format. Rounding errors count as independent, so that they add up
    as squares, and those of a sum of n terms are sqrt(n) times one (Higham and Mary 2019).
    """
    grown, total = np.asarray(singular), 0.0
    before = growth(grown, series)
    for k, triple in enumerate(series, 1):
        error, grown = of_step(grown, triple, many), q(grown, triple)
        total = math.hypot(total, error * growth(grown, series[k:]))
    return before, total


def q(s: Any, triple: Triple) -> Any:
    """The polynomial of a step."""
    a, b, c = triple
    return s * (a + s * s * (b + c * s * s))


def growth(s: Any, series: Series) -> float:
    """The largest divided difference of the steps at the points +-s, and between these and 0: a
    matrix that is not square has directions of singular value 0, but no change between them."""
    points = np.concatenate((s, -s, [0.0]))
    values, slopes = points, np.ones_like(points)
    for a, b, c in series:
        slopes = slopes * (a + values**2 * (3 * b + 5 * c * values**2))
        values = q(values, (a, b, c))
    apart = points[:, None] - points
    near = np.abs(apart) < 1e-6
    found = np.abs(values[:, None] - values) / np.where(near, 1.0, np.abs(apart))
    return float(np.max(np.where(near, np.abs(slopes), found)[:, :-1]))


def of_step(s: Any, triple: Triple, many: float) -> float:
    """The error of a step, for unit roundings of A = X X^T, B = b A + c A A, and a X + B X."""
    (a, b, c), gram = triple, s**2
    bracket, length = b * gram + c * gram**2, np.linalg.norm(s)
    of_gram = many * length**2 * np.max(np.abs(b + c * (gram[:, None] + gram)))
    of_bracket = rms(of_gram, 2 * b * gram, (many + 1) * c * gram**2, bracket)
    return rms(np.max(s) * of_bracket, many * np.linalg.norm(bracket) * length, 2 * a * s,
               q(s, triple))  # fmt: skip


def rms(*errors: Any) -> float:
    """The norm of independent errors, some of them given by singular values."""
    return math.hypot(*(float(np.linalg.norm(e)) for e in errors))
