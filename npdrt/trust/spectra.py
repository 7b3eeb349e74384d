"""Singular values of a layer: its condition number, and how far a perturbation moves them.

W: (n, m), or a convolution kernel (out, in, ...), read as the matrix (out, in * ...). Everything
is computed in float64 on the host and returned as Python floats: on a GPU each call waits for the
device and copies the array.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from npdrt.arrays import Array, quiet, to_host
from npdrt.errors import Error

Host = np.ndarray[Any, Any]


def matrix(w: Array) -> Host:
    """W as a float64 matrix on the host."""
    if len(w.shape) < 2 or 0 in w.shape:
        raise Error(
            f"expected a matrix or a convolution kernel; got shape {tuple(w.shape)}; "
            "npdrt.trust.weights picks the matrices of a network"
        )
    return np.asarray(to_host(w), dtype=np.float64).reshape(w.shape[0], -1)


def singular_values(w: Array) -> Host:
    """The min(n, m) singular values, largest first; NaN where W is not finite."""
    m = matrix(w)
    if not np.all(np.isfinite(m)):
        return np.full(min(m.shape), np.nan)
    return np.linalg.svd(m, compute_uv=False)


def condition_number(w: Array) -> float:
    """kappa(W) = s_1 / s_nbar over the nbar = min(n, m) singular values (v2, Theorem 1).

    inf where W is zero, not finite or, to rounding, rank-deficient: s_nbar <= max(n, m) eps s_1
    with eps = 2^-52, the threshold of `numpy.linalg.matrix_rank`.
    """
    s = singular_values(w)
    if not s[-1] > max(matrix(w).shape) * np.finfo(np.float64).eps * s[0]:
        return float("inf")
    return float(s[0] / s[-1])


class SpectralShift(NamedTuple):
    """absolute <= bound and relative <= relative_bound; see `spectral_shift`."""

    absolute: float
    bound: float
    relative: float
    relative_bound: float


def spectral_shift(w: Array, dw: Array) -> SpectralShift:
    """How far dW moves the singular values s_i of W, in order, and Mirsky's bound on it.

        absolute = sqrt(sum_i (s_i(W + dW) - s_i(W))^2)  <=  |dW|_F = bound
        relative = absolute / |W|_F                      <=  |dW|_F / |W|_F = relative_bound

    The second line is the first over the root mean square singular value |W|_F / sqrt(nbar), with
    a mean in place of the sum. It is inf or NaN for W = 0. Source: v1, Theorem 3 and what follows
    it; the paper writes relative_bound = eta, which is so for the update without the prefactor of
    Algorithm 1, else pass the exact dW.
    """
    a, b = matrix(w), matrix(dw)
    if a.shape != b.shape:
        raise Error(f"spectral_shift: W has shape {a.shape} and dW {b.shape}; give them one shape")
    absolute = np.linalg.norm(singular_values(a + b) - singular_values(a))
    bound, size = np.linalg.norm(b), np.linalg.norm(a)
    with quiet():
        return SpectralShift(*map(float, (absolute, bound, absolute / size, bound / size)))
