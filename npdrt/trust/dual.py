"""Steepest descent under a norm, for one layer: the step by which a norm explains an optimizer.

The gradient and the step are matrices (out, in), or kernels read as (out, in * ...); for the norms
of entries any shape. Everything is computed in float64 on the host.
"""

from __future__ import annotations

import numpy as np

from npdrt.arrays import Array
from npdrt.errors import Error
from npdrt.trust.scaled import Host, host
from npdrt.trust.spectra import matrix, svd_error

NORMS = ("frobenius", "spectral", "max")


def steepest_step(g: Array, sharpness: float, norm: str) -> Host:
    """The step d that minimises <g, d> + sharpness / 2 |d|^2:

        d = -(|g|' / sharpness) t,  |g|' = max over |t| = 1 of <g, t>

    |g|' is `dual_norm`, t is `dual_direction`; the minimum is -|g|'^2 / (2 sharpness). norm:

        "frobenius"   the root of the sum of squares     d = -g / sharpness
        "spectral"    the largest singular value         d = -(sum of s_i) U V^T / sharpness
        "max"         the largest |entry|                d = -(sum of |g_ij|) sign(g) / sharpness

    where g = U diag(s) V^T. They are the directions of gradient descent, of Muon and of Lion
    without momentum; Fromage is the first with the size lr |W|. The shape is that of g.

    Raises `Error` for another norm, a sharpness that is not > 0, or for "spectral" a vector.
    Source: Bernstein and Newhouse 2024, "Old Optimizer, New Norm: An Anthology", Proposition 1.
    """
    if not sharpness > 0:
        raise Error(f"sharpness must be > 0; got {sharpness!r}")
    return -dual_norm(g, norm) / sharpness * dual_direction(g, norm)


def dual_norm(g: Array, norm: str) -> float:
    """max over |t| = 1 of <g, t>: the Frobenius norm of g for "frobenius", the sum of its singular
    values (nuclear norm) for "spectral", the sum of its |entries| for "max"."""
    return float(np.sum(host(g, "g") * dual_direction(g, norm)))


def dual_direction(g: Array, norm: str) -> Host:
    """The t of norm 1 with <g, t> = |g|' that has the least entries: g / |g|, U V^T over the
    singular values above 0 (above `svd_error` of the largest), or sign(g). Zero for g = 0."""
    x = host(g, "g")
    if norm == "spectral":
        u, s, v = np.linalg.svd(matrix(g), full_matrices=False)
        kept = s > svd_error((u.shape[0], v.shape[1])) * s[0]
        return np.asarray(u[:, kept] @ v[kept]).reshape(x.shape)
    if norm == "max":
        return np.sign(x)
    if norm == "frobenius":
        size = float(np.linalg.norm(x))
        return x / size if size else x
    raise Error(f"norm must be one of {', '.join(NORMS)}; got {norm!r}")
