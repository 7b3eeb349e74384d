"""The Frechet distance of two normal distributions.

    d = |m - m'|^2 + tr S + tr S' - 2 tr (S S')^(1/2)

for means m, m' and covariances S, S' (Dowson and Landau 1982; as a measure of images Heusel et al.
2017). It is the square of the distance that Frechet defined, as usual for images.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from npdrt.errors import Error

ROWS = 4096  # features that are converted to float64 at once

Floats = npt.NDArray[np.float64]


class Statistics(NamedTuple):
    """Of n rows of features: mean (D,) and covariance (D, D), divided by n - 1."""

    n: int
    mean: Floats
    covariance: Floats


def frechet(features_a: Any, features_b: Any) -> float:
    """The Frechet distance of two sets of features, (N, D) and (M, D), N and M at least 2.

    Up to D rows a covariance is singular, and with few rows the distance is too large: state N and
    M with it, and compare only distances of the same N and M.

    >>> import numpy as np
    >>> x = np.random.default_rng(0).standard_normal((1000, 3))
    >>> round(frechet(x, x + [2.0, 0.0, 0.0]), 9)  # the square of the shift
    4.0
    """
    return distance(statistics(features_a), statistics(features_b))


def statistics(features: Any) -> Statistics:
    """Mean and covariance of features (N, D), in float64.

    Raises `Error` for fewer than 2 rows, and for numbers that are not finite.
    """
    features = np.asarray(features)
    if features.ndim != 2 or len(features) < 2 or not features.shape[1]:
        raise Error(
            "a covariance needs features (N, D) of at least 2 images; got shape "
            f"{features.shape}; give more images"
        )
    if not np.isfinite(features).all():
        raise Error("features that are not finite; check the images and the weights")
    count, width = features.shape
    mean = features.mean(0, dtype=np.float64)  # (D,)
    products = np.zeros((width, width))
    for start in range(0, count, ROWS):
        centred = features[start : start + ROWS] - mean  # (rows, D)
        products += centred.T @ centred
    return Statistics(count, mean, products / (count - 1))


def distance(a: Statistics, b: Statistics) -> float:
    """The distance of the normal distributions with these means and covariances; at least 0.

    tr (S S')^(1/2) is the sum of the singular values of R R'^T, if S = R^T R and S' = R'^T R' with
    roots from the eigenvalues of the symmetric S and S'. So no root of a matrix that is not
    symmetric is taken, which has no real value where rounding makes an eigenvalue negative.
    """
    if a.mean.shape != b.mean.shape:
        raise Error(
            f"features of one width; got {a.mean.shape[0]} and {b.mean.shape[0]}; make both with "
            "one network"
        )
    shift = a.mean - b.mean
    traces = np.trace(a.covariance) + np.trace(b.covariance)
    cross = np.linalg.svd(_root(a.covariance) @ _root(b.covariance).T, compute_uv=False)
    return max(0.0, float(shift @ shift + traces - 2.0 * np.sum(cross)))


def _root(covariance: Floats) -> Floats:
    """R (rank, D) with R^T R = S: V^T times the roots of the eigenvalues above rounding."""
    values, vectors = np.linalg.eigh(covariance)  # S = V diag(values) V^T
    kept = values > len(values) * np.finfo(np.float64).eps * values[-1]
    root: Floats = np.sqrt(values[kept])[:, None] * vectors[:, kept].T
    return root
