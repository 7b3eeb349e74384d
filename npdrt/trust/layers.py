"""Layers as maps of whole batches, and their derivatives as matrices: small, float64, on the host.

X is (d0, N): a column an example, a row a feature, as in the paper. vec lays a matrix out row by
row, so that vec(A X) = (A (x) Id_N) vec(X). J is the derivative in the input X, D that in the
parameters; both are matrices between vecs. Values are those of `npdrt.ops` with channel_axis=0.

Source: MacDonald, Valmadre, Saratchandran and Lucey 2023, "On skip connections and normalisation
layers in deep optimisation", appendix A, whose equation numbers are given.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from npdrt.arrays import Array, to_host
from npdrt.errors import Error
from npdrt.trust.scaled import Host


def _host(x: Array, name: str) -> Host:
    """A matrix on the host, complex ones too."""
    found = np.asarray(to_host(x))
    if found.ndim != 2:
        raise Error(f"{name}: expected a matrix; got shape {found.shape}")
    return found


def block_diagonal(blocks: Host) -> Host:
    """The matrix of a map that takes every row by itself: (rows, m, n) -> (rows m, rows n)."""
    rows, m, n = blocks.shape
    whole = np.zeros((rows, m, rows, n), blocks.dtype)
    whole[np.arange(rows), :, np.arange(rows), :] = blocks
    return whole.reshape(rows * m, rows * n)


# --- affine layers ----------------------------------------------------------------------------


def affine(a: Array, x: Array, b: Array | None = None) -> Host:
    """A X + b 1^T (16); A (d1, d0), X (d0, N), b (d1,) or None. With A = P(w) also (19)."""
    y = _host(a, "affine") @ _host(x, "affine")
    return np.asarray(y if b is None else y + np.asarray(to_host(b))[:, None])


def affine_jacobian(a: Array, examples: int) -> Host:
    """J aff = A (x) Id_N (17), and (20) with A = P(w): (d1 N, d0 N)."""
    return np.kron(_host(a, "affine_jacobian"), np.eye(examples))


def affine_derivative(
    x: Array, outputs: int, parameterisation: Array | None = None, *, bias: bool = True
) -> Host:
    """D aff = (Id (x) X^T, Id (x) 1_N) (18); with DP(w), ((Id (x) X^T) DP(w), Id (x) 1_N) (21).

    x: (d0, N). outputs: d1. parameterisation: DP(w) (d1 d0, p), the derivative of vec P(w); None
    for P(w) = w. bias: False leaves the second block out. Shape (d1 N, p + d1) or (d1 N, p).
    """
    x, identity = _host(x, "affine_derivative"), np.eye(outputs)
    weights = np.kron(identity, x.T)
    weights = weights if parameterisation is None else weights @ parameterisation
    return np.hstack((weights, np.kron(identity, np.ones((x.shape[1], 1))))) if bias else weights


# --- the sphere map of rows: weight and batch normalisation -----------------------------------


def sphere(y: Array, *, eps: float, scale: float = 1.0) -> Host:
    """sqrt(c) y / sqrt(c eps + |y|^2) for every row y, c = `scale`.

    c = 1: epsilon-weight-normalisation wn; c = N: v of batch normalisation (25).
    """
    y = _host(y, "sphere")
    return np.asarray(math.sqrt(scale) * y / np.sqrt(_squares(y, eps, scale)))


def _squares(y: Host, eps: float, scale: float) -> Host:
    """s = c eps + |y|^2 of every row, as a column."""
    return np.asarray(scale * eps + np.sum(y * y, axis=1, keepdims=True))


def sphere_blocks(y: Array, *, eps: float, scale: float = 1.0) -> Host:
    """The derivative of `sphere` row by row, (rows, n, n).

        sqrt(c) s^(-1/2) (delta_jl - y_j y_l / s),    s = c eps + |y|^2

    (27) for c = N and (30) for c = 1; `block_diagonal` makes it the whole matrix.
    """
    y = _host(y, "sphere_blocks")
    s = _squares(y, eps, scale)[:, :, None]
    outer = y[:, :, None] * y[:, None, :]
    return np.asarray(math.sqrt(scale) / np.sqrt(s) * (np.eye(y.shape[1]) - outer / s))


def sphere_second(y: Array, *, eps: float, scale: float = 1.0) -> Host:
    """The second derivative of `sphere` row by row, (rows, n, n, n).

        sqrt(c) s^(-3/2) (3 y_j y_l y_n / s - (delta_jl y_n + delta_jn y_l + delta_ln y_j))

    (28) for c = N, (31) for c = 1; symmetric in j, l, n.
    """
    y = _host(y, "sphere_second")
    s = _squares(y, eps, scale)[:, :, None, None]
    identity = np.eye(y.shape[1])
    cubes = np.einsum("ij,il,in->ijln", y, y, y)
    pairs = [np.einsum(f"{k},i{m}->ijln", identity, y) for k, m in (("jl", "n"), ("jn", "l"))]
    crossed = sum(pairs) + np.einsum("ln,ij->ijln", identity, y)
    return np.asarray(math.sqrt(scale) * s**-1.5 * (3.0 * cubes / s - crossed))


def weight_norm_derivative(w: Array, *, eps: float) -> Host:
    """D wn(w) (30), (d1 d0, d1 d0), for wn(w) = w / sqrt(eps + |w|^2), |w| of each row."""
    return block_diagonal(sphere_blocks(w, eps=eps))


def weight_norm_smallest(w: Array, *, eps: float) -> float:
    """sigma(D wn(w)) = min_i eps (eps + |w^i|^2)^(-3/2), in the direction of the row itself."""
    return float(np.min(eps * _squares(_host(w, "weight_norm_smallest"), eps, 1.0) ** -1.5))


# --- entry normalisation ----------------------------------------------------------------------


def entry_norm_derivative(w: Array, *, eps: float) -> Host:
    """D en(w) = diag(eps (eps + w^2)^(-3/2)) (32), for en(w) = w / sqrt(eps + w^2)."""
    w = _host(w, "entry_norm_derivative")
    return np.diag((eps * (eps + w * w) ** -1.5).reshape(-1))


def entry_norm_second(w: Array, *, eps: float) -> Host:
    """d^2 en / dw^2 = -3 eps w (eps + w^2)^(-5/2) (33), entry by entry; all others are 0."""
    w = _host(w, "entry_norm_second")
    return np.asarray(-3.0 * eps * w * (eps + w * w) ** -2.5)


def entry_norm_smallest(w: Array, *, eps: float) -> float:
    """sigma(D en(w)) = min_ij eps (eps + w_ij^2)^(-3/2) (36)."""
    w = _host(w, "entry_norm_smallest")
    return float(np.min(eps * (eps + w * w) ** -1.5))


# --- batch normalisation ----------------------------------------------------------------------


def mean_removal(x: Array) -> Host:
    """m(X) = X - X 1 1^T / N (26); linear, so its second derivatives vanish."""
    x = _host(x, "mean_removal")
    return np.asarray(x - np.sum(x, axis=1, keepdims=True) / x.shape[1])


def mean_removal_jacobian(features: int, examples: int) -> Host:
    """J m = Id (x) (Id_N - 1 1^T / N) (29): a projection."""
    return np.kron(np.eye(features), np.eye(examples) - 1.0 / examples)


def batch_norm_jacobian(x: Array, *, eps: float) -> Host:
    """J bn(X) = J v(m(X)) J m for bn = v o m (22), (25)-(29); X (d, N), eps inside the root."""
    x = _host(x, "batch_norm_jacobian")
    sphere_part = block_diagonal(sphere_blocks(mean_removal(x), eps=eps, scale=x.shape[1]))
    return sphere_part @ mean_removal_jacobian(*x.shape)


# --- nonlinearities and residual blocks -------------------------------------------------------


def nonlinearity_jacobian(slopes: Array) -> Host:
    """J Phi = diag(vec phi'(X)); slopes: phi'(X), of the shape of X (Example A.2)."""
    return np.diag(_host(slopes, "nonlinearity_jacobian").reshape(-1))


def residual_jacobian(skip: Array, branch: Array, examples: int) -> Host:
    """J f = I (x) Id_N + J g (34) for f(X) = I X + g(X) (23): skip I, branch J g."""
    return affine_jacobian(skip, examples) + _host(branch, "residual_jacobian")


# --- convolution ------------------------------------------------------------------------------


class Image(NamedTuple):
    """The input of a convolution: (channels, height, width), with its stride and zero padding."""

    channels: int
    height: int
    width: int
    stride: int = 1
    padding: int = 0


def _taps(image: Image, kernel: tuple[int, int]) -> Host:
    """The input pixel that every tap of every output pixel reads, and one past the last where
    that is padding: (channels, kh, kw, height', width')."""
    c, h, w, s, p = image
    if min(c, h, w, s) < 1 or p < 0:
        raise Error(f"an image with a stride of at least 1, and padding >= 0; got {image}")
    sizes = [(n + 2 * p - k) // s + 1 for n, k in ((h, kernel[0]), (w, kernel[1]))]
    if min(sizes) < 1:
        raise Error(f"a kernel {kernel} does not fit into {image}")
    rows = np.arange(kernel[0])[:, None] + s * np.arange(sizes[0]) - p
    columns = np.arange(kernel[1])[:, None] + s * np.arange(sizes[1]) - p
    y, x = rows[None, :, None, :, None], columns[None, None, :, None, :]
    inside = (y >= 0) & (y < h) & (x >= 0) & (x < w)
    place = (np.arange(c)[:, None, None, None, None] * h + y) * w + x
    return np.where(inside, place, c * h * w)


def convolution_matrix(kernel: Array, image: Image) -> Host:
    """P(w), the Toeplitz matrix of a convolution: (O h' w', I h w) for a kernel (O, I, kh, kw).

    Images are columns of X, (I, h, w) row by row. P is linear in w, so that a convolution is a
    P-parameterised affine layer (19) with constant DP.
    """
    w = np.asarray(to_host(kernel))
    taps = _taps(image, w.shape[2:])
    outputs, pixels = taps.shape[3:], image.channels * image.height * image.width
    whole = np.zeros((w.shape[0], *outputs, pixels + 1), w.dtype)
    at = np.indices(outputs)
    for tap in np.ndindex(taps.shape[:3]):
        whole[:, at[0], at[1], taps[tap]] += w[(slice(None), *tap, None, None)]
    return whole[..., :pixels].reshape(-1, pixels)


def convolution_derivative(x: Array, outputs: int, kernel: tuple[int, int], image: Image) -> Host:
    """D of vec(P(w) X) in vec(w) = (Id (x) X^T) DP(w), first block of (21), without DP: the
    patches of X ("im2col"), once an output channel.

    x: (I h w, N). outputs: O. Shape (O h' w' N, O I kh kw).
    """
    x = _host(x, "convolution_derivative")
    padded = np.vstack((x, np.zeros((1, x.shape[1]))))
    taps = _taps(image, kernel)
    patches = padded[taps.reshape(math.prod(taps.shape[:3]), -1)]
    return np.kron(np.eye(outputs), patches.reshape(len(patches), -1).T)


def pooled_shortcut(image: Image, outputs: int, *, before: int | None = None) -> Host:
    """E(s AvgPool_s), the map added to the shortcut of a residual network: (O h' w', I h w).

    s = image.stride: averages of s x s squares, times s, so that its rows are orthonormal; then
    zero channels, `before` of them in front, half of them rounded up unless given. A partial
    isometry: I h' w' singular values 1, the others 0. Not all are 1 where O > I.

    Source: the authors' public code; their MNIST net puts the larger half behind.
    """
    s = image.stride
    if s < 1:
        raise Error(f"pooled_shortcut: expected a stride of at least 1; got {image}")
    missing = outputs - image.channels
    front = -(-missing // 2) if before is None else before
    if not 0 <= front <= missing:
        raise Error(f"pooled_shortcut: {front} zero channels in front of {missing} in all")
    kernel = np.zeros((outputs, image.channels, s, s))
    kernel[front + np.arange(image.channels), np.arange(image.channels)] = 1.0 / s
    return convolution_matrix(kernel, image)
