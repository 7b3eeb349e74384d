"""Normalisation, softmax and cross-entropy of rows as a GPU computes them: a few calls, each of
which is a kernel (`npdrt.kernels`).

The functions of array calls are the kernels' definitions; a program that was recorded for a GPU
runs them on the CPU. The primitives of `npdrt.ops` use this file where `npdrt.arrays.has_kernels`;
elsewhere they are array calls of their own, and compute once what two of these compute. x stands
for a matrix with a row for each channel or example; its shape may be another of that size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from npdrt import compute
from npdrt.arrays import Array, composite, namespace
from npdrt.autodiff import once
from npdrt.compute import total
from npdrt.kernels import KERNELS
from npdrt.kernels.norms import height
from npdrt.ops.reduction import exponentials

Vjp = Callable[[Array], Array]


def _kernel(function: Callable[..., Array]) -> Callable[..., Any]:
    """A call of its own, by the kernel of that name."""
    return composite(function, kernel=KERNELS[function.__name__])


def _matrix(x: Array, rows: int) -> Array:
    return namespace(x).reshape(x, (rows, -1))


# --- normalisation ----------------------------------------------------------------------------


@_kernel
def row_moments(x: Array, *, length: int) -> Array:
    """Mean and biased variance of every row of so many elements, (2, rows)."""
    xp, x = namespace(x), namespace(x).reshape(x, (-1, length))
    mean = total(x, (1,), keepdims=True) / length
    centred = x - mean
    variance = total(centred * centred, (1,)) / length
    return xp.stack((mean[:, 0], variance))


def _normal(x: Array, mean: Array, variance: Array, eps: float) -> tuple[Array, Array]:
    """(x - mean) / sqrt(variance + eps) as a matrix, and 1 / sqrt(variance + eps), (rows, 1)."""
    inverse = (1.0 / namespace(x).sqrt(variance + eps))[:, None]
    return (_matrix(x, mean.shape[0]) - mean[:, None]) * inverse, inverse


@_kernel
def row_normal(
    x: Array, mean: Array, variance: Array, *affine: Array,
    eps: float, gain: bool, bias: bool, by_row: bool,
) -> Array:  # fmt: skip
    """gain (x - mean) / sqrt(variance + eps) + bias. affine: gain and bias, those that there are,
    of a number a row or, unless `by_row`, a column."""
    xp, (y, _) = namespace(x), _normal(x, mean, variance, eps)
    shape = (-1, 1) if by_row else (1, -1)
    vectors = [xp.reshape(v, shape) for v in affine]
    y = y * vectors[0] if gain else y
    y = y + vectors[-1] if bias else y
    return xp.reshape(y, x.shape)


@_kernel
def row_sums(g: Array, x: Array, mean: Array, variance: Array, *gain: Array, eps: float) -> Array:
    """The sums of d and of d xhat over every row, (2, rows): xhat is x normalised, d is g, times
    the gain of the column if there is one."""
    normal, _ = _normal(x, mean, variance, eps)
    d = _matrix(g, mean.shape[0])
    d = d * namespace(x).reshape(gain[0], (1, -1)) if gain else d
    return namespace(x).stack((total(d, (1,)), total(d * normal, (1,))))


@_kernel
def row_normal_input(
    g: Array, x: Array, mean: Array, variance: Array, sums: Array, *gain: Array,
    eps: float, by_row: bool,
) -> Array:  # fmt: skip
    """The derivative of `row_normal` by x, which has n elements a row:
    (d - sum d / n - xhat sum(d xhat) / n) / sqrt(variance + eps), d = g gain, by `row_sums`."""
    xp, (normal, inverse) = namespace(x), _normal(x, mean, variance, eps)
    d, n = _matrix(g, mean.shape[0]), normal.shape[1]
    vector = xp.reshape(gain[0], (-1, 1) if by_row else (1, -1)) if gain else None
    d = d * vector if gain and not by_row else d
    gx = (d - normal * (sums[1, :, None] / n) - sums[0, :, None] / n) * inverse
    return xp.reshape(gx * vector if gain and by_row else gx, x.shape)


@_kernel
def column_sums(g: Array, x: Array, mean: Array, variance: Array, *, eps: float) -> Array:
    """The sums of g xhat and of g over the rows of each of a few parts, (parts, 2, columns)."""
    normal, _ = _normal(x, mean, variance, eps)
    g, step = _matrix(g, mean.shape[0]), height(mean.shape[0])
    parts = [slice(k, k + step) for k in range(0, g.shape[0], step)]
    sums = [total(y[part, :], (0,)) for part in parts for y in (g * normal, g)]
    return namespace(x).reshape(namespace(x).stack(sums), (len(parts), 2, -1))


@_kernel
def row_dots(a: Array, b: Array) -> Array:
    """The inner products of the rows (last axes) of two arrays, kept with length 1."""
    return total(a * b, (a.ndim - 1,), keepdims=True)


def batch_norm(
    x: Array, gain: Array, bias: Array, mean: Array, variance: Array, eps: float
) -> tuple[Array, tuple[Vjp, Vjp, Vjp]]:
    """`npdrt.ops.batch_norm` with the channels in the first axis."""
    statistics = x, mean, variance
    y = _normalised(*statistics, gain, bias, eps=eps, by_row=True)

    @once
    def sums(g: Array) -> Array:
        return row_sums(g, *statistics, eps=eps)

    def gx(g: Array) -> Array:
        vectors = () if gain is None else (gain,)
        return row_normal_input(g, *statistics, sums(g), *vectors, eps=eps, by_row=True)

    return y, (gx, lambda g: sums(g)[1, :], lambda g: sums(g)[0, :])


def layer_norm(
    x: Array, gain: Array, bias: Array, length: int, eps: float
) -> tuple[Array, tuple[Vjp, Vjp, Vjp]]:
    """`npdrt.ops.layer_norm` over the last axes, of `length` elements in all."""
    xp, moments = namespace(x), row_moments(x, length=length)
    statistics = x, moments[0, :], moments[1, :]
    y = _normalised(*statistics, gain, bias, eps=eps, by_row=False)
    vectors = () if gain is None else (gain,)

    def gx(g: Array) -> Array:
        sums = row_sums(g, *statistics, *vectors, eps=eps)
        return row_normal_input(g, *statistics, sums, *vectors, eps=eps, by_row=False)

    @once
    def columns(g: Array) -> Array:
        return total(column_sums(g, *statistics, eps=eps), (0,))

    return y, (
        gx,
        lambda g: xp.reshape(columns(g)[0, :], gain.shape),
        lambda g: xp.reshape(columns(g)[1, :], bias.shape),
    )


def _normalised(
    x: Array, mean: Array, variance: Array, gain: Array, bias: Array, *, eps: float, by_row: bool
) -> Array:
    affine = [v for v in (gain, bias) if v is not None]
    given = {"gain": gain is not None, "bias": bias is not None, "by_row": by_row}
    return row_normal(x, mean, variance, *affine, eps=eps, **given)


# --- softmax ----------------------------------------------------------------------------------


@_kernel
def row_softmax(x: Array, *mask: Array, scale: float, causal: bool, empty: bool) -> Array:
    """The softmax of scale x + mask over the last axis.

    causal: row i of a matrix (the last two axes) has no element beyond i. empty: a row without any
    finite element gives zeros, not NaN.
    """
    xp, z, axis = namespace(x), x * scale, (x.ndim - 1,)
    z = z + mask[0] if mask else z
    if causal:
        rows, columns = xp.arange(x.shape[-2])[:, None], xp.arange(x.shape[-1])[None, :]
        z = xp.where(columns <= rows, z, xp.asarray(-xp.inf, dtype=z.dtype))
    e = exponentials(z, axis)
    sums = xp.where(e.sums == 0, xp.ones_like(e.sums), e.sums) if empty else e.sums
    return e.z / sums


@_kernel
def row_softmax_input(g: Array, y: Array, *, scale: float) -> Array:
    """The derivative of `row_softmax` by x, from its value y: scale y (g - sum g y)."""
    return y * (g - total(g * y, (y.ndim - 1,), keepdims=True)) * scale


def softmax(x: Array) -> tuple[Array, Vjp]:
    """`npdrt.ops.softmax` over the last axis."""
    xp = namespace(x)
    y = row_softmax(xp.reshape(x, (-1, x.shape[-1])), scale=1.0, causal=False, empty=False)
    return xp.reshape(y, x.shape), lambda g: xp.reshape(
        row_softmax_input(xp.reshape(g, y.shape), y, scale=1.0), x.shape
    )


@_kernel
def row_cross_entropy(z: Array, labels: Array, *, smoothing: float) -> Array:
    """Of every row of z, (N, C), with its label, (N, 1): sum_c q_c log softmax(z)_c, the maximum,
    and the sums of exp(z - maximum) with and without the maximum's own 1; (4, N)."""
    xp, classes = namespace(z), z.shape[1]
    e = exponentials(z, (1,))
    log_p = e.shifted - e.log_sums()
    chosen = labels == xp.arange(classes, dtype=xp.int64)
    picked = total(xp.where(chosen, log_p, xp.zeros((), dtype=z.dtype)), (1,))
    if smoothing:
        picked = (1.0 - smoothing) * picked + smoothing * (total(log_p, (1,)) / classes)
    return xp.stack((picked, e.top[:, 0], e.sums[:, 0], e.others[:, 0]))


@_kernel
def row_cross_entropy_input(
    g: Array, z: Array, labels: Array, found: Array, *, smoothing: float
) -> Array:
    """(softmax(z) - q) g / N from `row_cross_entropy`; see `npdrt.ops.log_softmax` for a label
    whose softmax is near 1."""
    xp, (n, classes) = namespace(z), z.shape
    top, sums, others = (found[k, :, None] for k in (1, 2, 3))
    chosen, e = labels == xp.arange(classes, dtype=xp.int64), compute.exp(z - top)
    slope = e / sums - ((1.0 - smoothing) * xp.astype(chosen, z.dtype) + smoothing / classes)
    if not smoothing:
        kept = chosen & (e >= 1) & (sums >= 1) & (sums < 2)
        slope = xp.where(kept, -(others / sums), slope)
    return slope * (g / n)


def cross_entropy(z: Array, labels: Array, smoothing: float) -> tuple[Array, Vjp]:
    """sum_c q_c log softmax(z)_c of every row of z, and g -> (softmax(z) - q) g / N."""
    found = row_cross_entropy(z, labels, smoothing=smoothing)
    return found[0, :], lambda g: row_cross_entropy_input(g, z, labels, found, smoothing=smoothing)
