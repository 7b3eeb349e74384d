"""Singular values of a layer: its condition number, and how far a perturbation moves them.

W: (n, m), or a convolution kernel (out, in, ...), read as the matrix (out, in * ...). Everything
is computed in float64 on the host and returned as Python floats: on a GPU each call waits for the
device and copies the array.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from npdrt.arrays import Array, quiet
from npdrt.errors import Error
from npdrt.optim.norm import norm
from npdrt.trust.scaled import UNIT, Host, Scaled, gamma, host, log_loss, scaled


def matrix(w: Array) -> Host:
    """W as a float64 matrix on the host."""
    m = host(w, "expected a matrix")
    if m.ndim < 2 or 0 in m.shape:
        raise Error(
            f"expected a matrix or a convolution kernel; got shape {m.shape}; "
            "npdrt.trust.weights picks the matrices of a network"
        )
    return m.reshape(m.shape[0], -1)


def singular_values(w: Array) -> Host:
    """The min(n, m) singular values, largest first; NaN where W is not finite.

    Each is off by at most `svd_error(shape)` times the largest.
    """
    a = scaled(matrix(w))
    with quiet():
        return np.asarray(Scaled(digit_values(a), a.power).at(0))


def digit_values(a: Scaled) -> Host:
    """The singular values of the digits, which do not overflow."""
    if not np.all(np.isfinite(a.digits)):
        return np.full(min(a.digits.shape), np.nan)
    return np.linalg.svd(a.digits, compute_uv=False)


def svd_error(shape: Sequence[int]) -> float:
    """How far LAPACK's singular values may be off, relative to the largest: 8 max(n, m) u.

    LAPACK promises p(n, m) u with p "a modestly growing function"; this p is ours, eight to
    twenty times what tests at 60 digits see. A matrix of one row or column has none.
    """
    return 8.0 * max(shape) * UNIT


def condition_number(w: Array) -> float:
    """kappa(W) = s_1 / s_nbar over the nbar = min(n, m) singular values (v2, Theorem 1).

    inf where W is zero, not finite or, to rounding, rank-deficient: s_nbar <= max(n, m) eps s_1
    with eps = 2^-52, the threshold of `numpy.linalg.matrix_rank`.
    """
    s = digit_values(scaled(matrix(w)))
    if not s[-1] > max(matrix(w).shape) * 2 * UNIT * s[0]:
        return math.inf
    return float(s[0] / s[-1])


def log_condition_error(kappa: float, shape: Sequence[int]) -> float:
    """How far log kappa may lie above the log of `condition_number`; inf where s_nbar may be 0.

    From s_1 (1 + e) / (s_nbar - e s_1), e = `svd_error(shape)`. 0 for one row or column.
    """
    if min(shape) == 1 or kappa == math.inf:
        return 0.0
    return log_loss(svd_error(shape) * (kappa + 1.0))


class SpectralShift(NamedTuple):
    """absolute <= bound + slack and relative <= relative_bound + relative_slack; see
    `spectral_shift`."""

    absolute: float
    bound: float
    relative: float
    relative_bound: float
    slack: float
    relative_slack: float


def spectral_shift(w: Array, dw: Array) -> SpectralShift:
    """How far dW moves the singular values s_i of W, in order, and Mirsky's bound on it.

        absolute = sqrt(sum_i (s_i(W + dW) - s_i(W))^2)  <=  |dW|_F = bound
        relative = absolute / |W|_F                      <=  |dW|_F / |W|_F = relative_bound

    The second line is the first over the root mean square singular value |W|_F / sqrt(nbar), with
    a mean in place of the sum. It is inf or NaN for W = 0. Source: v1, Theorem 3 and what follows
    it; the paper writes relative_bound = eta, which is so for the update without the prefactor of
    Algorithm 1, else pass the exact dW.

    slack: what rounding may add: the error of the singular values and of the sum W + dW, which
    may exceed a small |dW|.
    """
    a, b = matrix(w), matrix(dw)
    if a.shape != b.shape:
        raise Error(f"spectral_shift: W has shape {a.shape} and dW {b.shape}; give them one shape")
    power = max(scaled(a).power, scaled(b).power)
    with quiet():
        a, b = Scaled(a, 0).at(power), Scaled(b, 0).at(power)
        before, after = digit_values(Scaled(a, 0)), digit_values(Scaled(a + b, 0))
        absolute, bound, size = (float(norm(x)) for x in (after - before, b, a))
        error = svd_error(a.shape) * np.sqrt(before.size) * (before[0] + after[0])
        slack = float(error + gamma(2 * a.size + 8) * (absolute + bound)) if np.any(b) else 0.0
        sizes = absolute, bound, slack
        whole = [float(Scaled(np.asarray(x), power).at(0)) for x in sizes]
        parts = [float(np.divide(x, size)) for x in sizes]
    return SpectralShift(whole[0], whole[1], parts[0], parts[1], whole[2], parts[2])
