"""Softmax and cross-entropy of the rows of a matrix, and their derivatives.

`npdrt.ops.rows` has the definitions.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from npdrt.kernels.kernel import Array, Kernel, Shape, ceil
from npdrt.kernels.row import CHUNK, SPREAD, launch_rows, need, threads

SOFTMAX = r"""
// The maximum of a row, 0 where it is not finite. A NaN is no maximum, but stays in its terms.
#define TOP(top, value) \
  T top = (T)lowest; \
  EACH(i) { const T v = value; if (v > top) top = v; } \
  top = npdrt_largest(top); \
  if (!FINITE(top)) top = 0;

// Scores are scale x, and the mask where there is one; if `causal`, -inf beyond the diagonal. The
// mask has steps in elements for two axes of heads, for the query, and along the row.
extern "C" __global__ void npdrt_row_softmax(const T* __restrict__ x, const T* __restrict__ mask,
    T* __restrict__ out, long long n, double scale, int masked, int causal, int empty,
    long long inner, long long queries, long long outer_step, long long inner_step,
    long long query_step, long long step, double lowest) {
  const long long r = blockIdx.x, q = r % queries, h = r / queries % inner, b = r / queries / inner;
  const long long at = b * outer_step + h * inner_step + q * query_step;
  x += r * n;
  out += r * n;
#define SCORE (causal && i > q ? (T)lowest \
               : masked ? x[i] * (T)scale + mask[at + i * step] : x[i] * (T)scale)
  TOP(top, SCORE)
  T sum = 0;
  EACH(i) { const T e = exp(SCORE - top); out[i] = e; sum += e; }
  sum = npdrt_sum(sum);
  if (empty && sum == 0) sum = 1;
  EACH(i) out[i] /= sum;
}

extern "C" __global__ void npdrt_row_softmax_input(const T* __restrict__ g,
    const T* __restrict__ y, T* __restrict__ out, long long n, double scale) {
  const long long r = blockIdx.x;
  T sum = 0;
  EACH(i) sum += g[r * n + i] * y[r * n + i];
  sum = npdrt_sum(sum);
  EACH(i) out[r * n + i] = y[r * n + i] * (g[r * n + i] - sum) * (T)scale;
}

#define LABEL(i) (labels[r] == (i))
#define ALONE (sums >= 1 && sums < 2)

// What a row's label has of the log softmax, smoothed; the maximum of the row, the sum of exp(z -
// maximum), and that sum without the maximum's own 1.
extern "C" __global__ void npdrt_row_cross_entropy(const T* __restrict__ z,
    const long long* __restrict__ labels, T* __restrict__ out, long long rows, long long n,
    double smoothing, double lowest) {
  const long long r = blockIdx.x;
  z += r * n;
  TOP(top, z[i])
  T sums = 0, others = 0, chosen = 0, even = 0;
  EACH(i) {
    const T e = exp(z[i] - top);
    sums += e;
    others += e - floor(e);
  }
  sums = npdrt_sum(sums);
  others = npdrt_sum(others);
  const T log_sums = ALONE ? log1p(others) : log(sums);
  EACH(i) {
    const T log_p = z[i] - top - log_sums;
    if (LABEL(i)) chosen += log_p;
    even += log_p;
  }
  chosen = npdrt_sum(chosen);
  if (smoothing > 0)
    chosen = (T)(1 - smoothing) * chosen + (T)smoothing * (npdrt_sum(even) / (T)n);
  if (threadIdx.x == 0) {
    out[r] = chosen;
    out[rows + r] = top;
    out[2 * rows + r] = sums;
    out[3 * rows + r] = others;
  }
}

extern "C" __global__ void npdrt_row_cross_entropy_input(const T* __restrict__ g,
    const T* __restrict__ z, const long long* __restrict__ labels, const T* __restrict__ found,
    T* __restrict__ out, long long rows, long long chunks, long long n, double smoothing) {
  const long long r = blockIdx.x / chunks, first = blockIdx.x % chunks * CHUNK;
  const long long end = first + CHUNK < n ? first + CHUNK : n;
  const T top = found[rows + r], sums = found[2 * rows + r], others = found[3 * rows + r];
  const T share = g[0] / (T)rows, even = (T)(smoothing / n);
  for (long long i = first + threadIdx.x; i < end; i += THREADS) {
    const T e = exp(z[r * n + i] - top), q = (LABEL(i) ? (T)(1 - smoothing) : (T)0) + even;
    const bool kept = smoothing == 0 && LABEL(i) && e >= 1 && ALONE;
    out[r * n + i] = (kept ? -(others / sums) : e / sums - q) * share;
  }
}
"""


def _softmax(
    library: Any, out: Array, x: Array, *mask: Array, scale: float, causal: bool, empty: bool
) -> None:
    length = x.shape[-1]
    lead = (1,) * (4 - x.ndim) + x.shape[:-1]  # (outer, inner, queries); the last axis is apart
    steps = _steps(mask[0]) if mask else (0, 0, 0, 0)
    *_, inner, queries = lead
    args = (x, mask[0] if mask else x, out, length, float(scale), bool(mask), causal, empty, inner,
            queries, *steps, -np.inf)  # fmt: skip
    launch_rows(
        library, SOFTMAX, "npdrt_row_softmax", out.size // length, threads(length), out, *args
    )


def _steps(mask: Array) -> tuple[int, ...]:
    """The elements from one place to the next along the last four axes; 0 along one of length 1."""
    shape, steps, step = (1,) * (4 - mask.ndim) + mask.shape, [], 1
    for n in reversed(shape):
        steps.append(step if n > 1 else 0)
        step *= n
    return tuple(reversed(steps))


def _softmax_input(library: Any, out: Array, g: Array, y: Array, *, scale: float) -> None:
    length = y.shape[-1]
    args = (g, y, out, length, float(scale))
    launch_rows(
        library, SOFTMAX, "npdrt_row_softmax_input", out.size // length, threads(length), out, *args
    )


def _cross_entropy(library: Any, out: Array, z: Array, labels: Array, *, smoothing: float) -> None:
    rows, length = z.shape
    args = (z, labels, out, rows, length, float(smoothing), -np.inf)
    launch_rows(library, SOFTMAX, "npdrt_row_cross_entropy", rows, threads(length), out, *args)


def _cross_entropy_input(
    library: Any, out: Array, g: Array, z: Array, labels: Array, found: Array, *, smoothing: float
) -> None:
    rows, length = z.shape
    chunks = ceil(length, CHUNK)
    args = (g, z, labels, found, out, rows, chunks, length, float(smoothing))
    launch_rows(
        library, SOFTMAX, "npdrt_row_cross_entropy_input", rows * chunks, SPREAD, out, *args
    )


# --- shapes -----------------------------------------------------------------------------------


def _softmax_shape(x: Any, *mask: Any, scale: float, causal: bool, empty: bool) -> Shape:
    need(0 < x.ndim <= 4 and x.shape[-1] > 0 and type(causal) is type(empty) is bool)
    need(len(mask) <= 1 and all(m.ndim == x.ndim for m in mask))
    need(all(n in (1, k) for m in mask for n, k in zip(m.shape, x.shape, strict=True)))
    return tuple(x.shape)


def _softmax_input_shape(g: Any, y: Any, *, scale: float) -> Shape:
    need(y.ndim > 0 and g.shape == y.shape and y.shape[-1] > 0)
    return tuple(y.shape)


def _need_labels(z: Any, labels: Any, smoothing: float) -> None:
    need(z.ndim == 2 and z.shape[1] > 0 and 0 <= smoothing < 1)
    need(labels.shape == (z.shape[0], 1) and str(labels.dtype) == "int64")


def _cross_entropy_shape(z: Any, labels: Any, *, smoothing: float) -> Shape:
    _need_labels(z, labels, smoothing)
    return 4, z.shape[0]


def _cross_entropy_input_shape(
    g: Any, z: Any, labels: Any, found: Any, *, smoothing: float
) -> Shape:
    _need_labels(z, labels, smoothing)
    need(g.shape == () and found.shape == (4, z.shape[0]))
    return tuple(z.shape)


KERNELS = {
    "row_softmax": Kernel(_softmax_shape, _softmax),
    "row_softmax_input": Kernel(_softmax_input_shape, _softmax_input),
    "row_cross_entropy": Kernel(_cross_entropy_shape, _cross_entropy),
    "row_cross_entropy_input": Kernel(_cross_entropy_input_shape, _cross_entropy_input),
}
