"""Normalisation of the rows of a matrix (channels or examples), and its derivative.

`npdrt.ops.rows` has the definitions. The mean comes first, then the squares of x - mean.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from npdrt.kernels.kernel import Array, Kernel, Shape, ceil
from npdrt.kernels.row import CHUNK, SPREAD, launch_rows, need, threads

PARTS, HEIGHT = 128, 64  # sums of columns: at most so many parts, of at least so many rows

NORMS = r"""
__device__ inline T npdrt_inverse(const T* variance, long long r, double eps) {
  return (T)1 / sqrt(variance[r] + (T)eps);
}

extern "C" __global__ void npdrt_row_moments(const T* __restrict__ x, T* __restrict__ out,
    long long rows, long long n) {
  const long long r = blockIdx.x;
  x += r * n;
  T sum = 0;
  EACH(i) sum += x[i];
  const T mean = npdrt_sum(sum) / (T)n;
  sum = 0;
  EACH(i) { const T d = x[i] - mean; sum += d * d; }
  const T variance = npdrt_sum(sum) / (T)n;
  if (threadIdx.x == 0) { out[r] = mean; out[rows + r] = variance; }
}

// gain and bias are read if `affine` has the bit 1 and 2, by row or by column.
extern "C" __global__ void npdrt_row_normal(const T* __restrict__ x, const T* __restrict__ mean,
    const T* __restrict__ variance, const T* __restrict__ gain, const T* __restrict__ bias,
    T* __restrict__ out, long long chunks, long long n, double eps, int affine, int by_row) {
  const long long r = blockIdx.x / chunks, first = blockIdx.x % chunks * CHUNK;
  const long long end = first + CHUNK < n ? first + CHUNK : n;
  const T middle = mean[r], inverse = npdrt_inverse(variance, r, eps);
  for (long long i = first + threadIdx.x; i < end; i += THREADS) {
    T y = (x[r * n + i] - middle) * inverse;
    if (affine & 1) y *= gain[by_row ? r : i];
    if (affine & 2) y += bias[by_row ? r : i];
    out[r * n + i] = y;
  }
}

// The sums of d and of d xhat, with d = g, or g gain where the gain is by column.
extern "C" __global__ void npdrt_row_sums(const T* __restrict__ g, const T* __restrict__ x,
    const T* __restrict__ mean, const T* __restrict__ variance, const T* __restrict__ gain,
    T* __restrict__ out, long long rows, long long n, double eps, int scaled) {
  const long long r = blockIdx.x;
  const T middle = mean[r];
  T sum = 0, inner = 0;
  EACH(i) {
    const T d = scaled ? g[r * n + i] * gain[i] : g[r * n + i];
    sum += d;
    inner += d * (x[r * n + i] - middle);
  }
  sum = npdrt_sum(sum);
  inner = npdrt_sum(inner);
  if (threadIdx.x == 0) { out[r] = sum; out[rows + r] = inner * npdrt_inverse(variance, r, eps); }
}

extern "C" __global__ void npdrt_row_normal_input(const T* __restrict__ g, const T* __restrict__ x,
    const T* __restrict__ mean, const T* __restrict__ variance, const T* __restrict__ sums,
    const T* __restrict__ gain, T* __restrict__ out, long long rows, long long chunks, long long n,
    double eps, int affine, int by_row) {
  const long long r = blockIdx.x / chunks, first = blockIdx.x % chunks * CHUNK;
  const long long end = first + CHUNK < n ? first + CHUNK : n;
  const T middle = mean[r], inverse = npdrt_inverse(variance, r, eps);
  const T scale = affine && by_row ? inverse * gain[r] : inverse;
  const T added = sums[r] / (T)n, along = sums[rows + r] / (T)n * inverse;
  for (long long i = first + threadIdx.x; i < end; i += THREADS) {
    const T d = affine && !by_row ? g[r * n + i] * gain[i] : g[r * n + i];
    out[r * n + i] = (d - (x[r * n + i] - middle) * along - added) * scale;
  }
}

// The sums of g xhat and of g over the rows of a part: a thread a column, row by row.
extern "C" __global__ void npdrt_column_sums(const T* __restrict__ g, const T* __restrict__ x,
    const T* __restrict__ mean, const T* __restrict__ variance, T* __restrict__ out, long long rows,
    long long blocks, long long n, long long height, double eps) {
  const long long part = blockIdx.x / blocks, i = blockIdx.x % blocks * THREADS + threadIdx.x;
  const long long end = (part + 1) * height < rows ? (part + 1) * height : rows;
  if (i >= n) return;
  T sum = 0, inner = 0;
  for (long long r = part * height; r < end; ++r) {
    const T d = g[r * n + i];
    sum += d;
    inner += d * ((x[r * n + i] - mean[r]) * npdrt_inverse(variance, r, eps));
  }
  out[part * 2 * n + i] = inner;
  out[(part * 2 + 1) * n + i] = sum;
}

extern "C" __global__ void npdrt_row_dots(const T* __restrict__ a, const T* __restrict__ b,
    T* __restrict__ out, long long n) {
  const long long r = blockIdx.x;
  T sum = 0;
  EACH(i) sum += a[r * n + i] * b[r * n + i];
  sum = npdrt_sum(sum);
  if (threadIdx.x == 0) out[r] = sum;
}
"""


def _moments(library: Any, out: Array, x: Array, *, length: int) -> None:
    rows = out.shape[1]
    args = (x, out, rows, length)
    launch_rows(library, NORMS, "npdrt_row_moments", rows, threads(length), out, *args)


def _affine(x: Array, affine: tuple[Array, ...], gain: bool, bias: bool) -> tuple[Any, ...]:
    """Gain, bias, and which of them there are; an array that is not read stands for another."""
    both = iter(affine)
    return next(both) if gain else x, next(both) if bias else x, np.int32(gain + 2 * bias)


def _normal(
    library: Any, out: Array, x: Array, mean: Array, variance: Array, *affine: Array,
    eps: float, gain: bool, bias: bool, by_row: bool,
) -> None:  # fmt: skip
    rows = mean.size
    length = x.size // rows
    chunks = ceil(length, CHUNK)
    *vectors, which = _affine(x, affine, gain, bias)
    args = (x, mean, variance, *vectors, out, chunks, length, float(eps), which, by_row)
    launch_rows(library, NORMS, "npdrt_row_normal", rows * chunks, SPREAD, out, *args)


def _sums(
    library: Any,
    out: Array,
    g: Array,
    x: Array,
    mean: Array,
    variance: Array,
    *gain: Array,
    eps: float,
) -> None:
    rows = mean.size
    length = x.size // rows
    args = (g, x, mean, variance, gain[0] if gain else x, out, rows, length, float(eps), bool(gain))
    launch_rows(library, NORMS, "npdrt_row_sums", rows, threads(length), out, *args)


def _normal_input(
    library: Any, out: Array, g: Array, x: Array, mean: Array, variance: Array, sums: Array,
    *gain: Array, eps: float, by_row: bool,
) -> None:  # fmt: skip
    rows = mean.size
    length = x.size // rows
    chunks = ceil(length, CHUNK)
    vector = gain[0] if gain else x
    args = (
        g,
        x,
        mean,
        variance,
        sums,
        vector,
        out,
        rows,
        chunks,
        length,
        float(eps),
        bool(gain),
        by_row,
    )
    launch_rows(library, NORMS, "npdrt_row_normal_input", rows * chunks, SPREAD, out, *args)


def _column_sums(
    library: Any, out: Array, g: Array, x: Array, mean: Array, variance: Array, *, eps: float
) -> None:
    rows, (parts, _, length) = mean.size, out.shape
    blocks = ceil(length, SPREAD)
    args = (g, x, mean, variance, out, rows, blocks, length, height(rows), float(eps))
    launch_rows(library, NORMS, "npdrt_column_sums", parts * blocks, SPREAD, out, *args)


def height(rows: int) -> int:
    """Rows of a part."""
    return max(HEIGHT, ceil(rows, PARTS))


def _dots(library: Any, out: Array, a: Array, b: Array) -> None:
    length = a.shape[-1]
    args = (a, b, out, length)
    launch_rows(library, NORMS, "npdrt_row_dots", out.size, threads(length), out, *args)


# --- shapes -----------------------------------------------------------------------------------


def _moments_shape(x: Any, *, length: int) -> Shape:
    need(type(length) is int and length > 0 and math.prod(x.shape) % length == 0)
    return 2, math.prod(x.shape) // length


def _of_rows(mean: Any, variance: Any, *whole: Any) -> tuple[int, int]:
    """How many rows there are, and their length."""
    rows, size = math.prod(mean.shape), math.prod(whole[0].shape)
    need(mean.shape == variance.shape == (rows,) and 0 < rows <= size and size % rows == 0)
    need(all(x.shape == whole[0].shape for x in whole))
    return rows, size // rows


def _need_vectors(
    vectors: tuple[Any, ...], count: int, rows: int, length: int, by_row: Any
) -> None:
    need(len(vectors) == count and type(by_row) is bool)
    need(all(math.prod(v.shape) == (rows if by_row else length) for v in vectors))


def _normal_shape(
    x: Any, mean: Any, variance: Any, *affine: Any, eps: float, gain: bool, bias: bool, by_row: bool
) -> Shape:
    need(eps >= 0 and type(gain) is type(bias) is bool)
    _need_vectors(affine, gain + bias, *_of_rows(mean, variance, x), by_row)
    return tuple(x.shape)


def _sums_shape(g: Any, x: Any, mean: Any, variance: Any, *gain: Any, eps: float) -> Shape:
    need(eps >= 0 and len(gain) <= 1)
    rows, length = _of_rows(mean, variance, x, g)
    _need_vectors(gain, len(gain), rows, length, False)
    return 2, rows


def _normal_input_shape(
    g: Any, x: Any, mean: Any, variance: Any, sums: Any, *gain: Any, eps: float, by_row: bool
) -> Shape:
    need(eps >= 0 and len(gain) <= 1)
    rows, length = _of_rows(mean, variance, x, g)
    need(sums.shape == (2, rows))
    _need_vectors(gain, len(gain), rows, length, by_row)
    return tuple(x.shape)


def _column_sums_shape(g: Any, x: Any, mean: Any, variance: Any, *, eps: float) -> Shape:
    need(eps >= 0)
    rows, length = _of_rows(mean, variance, x, g)
    return ceil(rows, height(rows)), 2, length


def _dots_shape(a: Any, b: Any) -> Shape:
    need(a.ndim > 0 and a.shape == b.shape and a.shape[-1] > 0)
    return (*a.shape[:-1], 1)


KERNELS = {
    "row_moments": Kernel(_moments_shape, _moments),
    "row_normal": Kernel(_normal_shape, _normal),
    "row_sums": Kernel(_sums_shape, _sums),
    "row_normal_input": Kernel(_normal_input_shape, _normal_input),
    "column_sums": Kernel(_column_sums_shape, _column_sums),
    "row_dots": Kernel(_dots_shape, _dots),
}
