"""A convolution and its derivatives as products of matrices one of which is never stored.

One kernel serves all three. A block of 256 threads makes 16 TM x 16 TN elements of the result, a
thread TM x TN of them. It reads STEP terms of both factors into shared memory, those of the images
through the window. Activations are (C, N, H, W), so that the columns of
the result are its positions, next to each other in memory.

| result | rows | columns | terms, in the order in which they are added |
|---|---|---|---|
| value | outputs | positions of the output | channels, then taps |
| by the input | channels | pixels with one offset in the stride | outputs, then taps |
| by the weight | outputs | channels and taps | positions, in parts; then the parts |

Every term is one fused multiply-add, in any tile: an element has the same bits whatever TM and TN.
The parts depend on the shapes alone. In float32 subnormal numbers are zero, as in CuPy's own
functions. With few outputs in a group most of a tile is idle: a depthwise convolution is right, but
slow.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np

from npdrt import cudnn
from npdrt.kernels.kernel import TYPES, Array, Kernel, Shape, ceil, launch

Pair = tuple[int, int]

THREADS, STEP = 256, 8
ENOUGH = 264  # blocks that fill a large GPU: two for each of 132 multiprocessors
FEWEST, MOST = 1024, 4096  # terms of a part of the derivative by the weight
ROOM = 1 << 26  # elements of all parts

SOURCE = r"""
#define ROWS (16 * TM)
#define COLUMNS (16 * TN)
#define STEP 8
#define TAPS (KH * KW)
#define EACH(i, count) _Pragma("unroll") for (int i = 0; i < count; ++i)

// Where element i of a thread's TM or TN lies in its block: 4 next to each other, then 64 further.
__device__ inline int npdrt_place(int lane, int i) { return i / 4 * 64 + lane * 4 + i % 4; }

struct Sizes { int channels, outputs, images, height, width, out_height, out_width, length; };

// Of each factor a thread reads TM / 2 and TN / 2 elements a step. Rows: term t % 8, rows t / 8 +
// 32 j. Columns: term t / 32, columns t % 32 + 32 j; for the weight as for the rows.

struct Forward {  // rows o, columns (n, i, j), terms (c, k, l)
  const T *weight, *x;
  int rows, columns, terms, row, height, width, plane, image[TN / 2], top[TN / 2], left[TN / 2];
  static const bool along = false;
  __device__ Forward(const T* w, const T* a, const Sizes& s, int r, int column, int group, int)
      : weight(w), x(a), rows(s.outputs), columns(s.images * s.out_height * s.out_width),
        terms(s.channels * TAPS), row(r), height(s.height), width(s.width),
        plane(s.images * s.height * s.width) {
    weight += (long long)group * rows * terms;
    x += (long long)group * s.channels * plane;
    EACH(j, TN / 2) {
      const int p = column + threadIdx.x % 32 + 32 * j, q = p / s.out_width;
      image[j] = p < columns ? q / s.out_height * height * width : -1;
      top[j] = q % s.out_height * SH - PH;
      left[j] = p % s.out_width * SW - PW;
    }
  }
  __device__ void read(int k, T* a, T* b) const {
    const int ka = k + threadIdx.x % STEP, kb = k + threadIdx.x / 32;
    EACH(j, TM / 2) {
      const int m = row + threadIdx.x / STEP + 32 * j;
      a[j] = m < rows && ka < terms ? weight[(long long)m * terms + ka] : (T)0;
    }
    const int c = kb / TAPS, down = kb % TAPS / KW, across = kb % KW;
    EACH(j, TN / 2) {
      const int h = top[j] + down, w = left[j] + across;
      const bool seen = 0 <= h && h < height && 0 <= w && w < width;
      b[j] = seen && kb < terms && image[j] >= 0
                 ? x[(long long)c * plane + image[j] + h * width + w]
                 : (T)0;
    }
  }
  __device__ long long target(int group, int m, int p) const {
    return ((long long)group * rows + m) * columns + p;
  }
};

struct Input {  // rows c, columns (n, h, w) at one offset in the stride, terms (o, k, l)
  const T *weight, *g;
  int rows, columns, terms, row, group, images, height, width, plane, whole_height, whole_width;
  int phase_h, phase_w, high, wide, first_h, first_w, taps_w, taps;
  int image[TN / 2], top[TN / 2], left[TN / 2];
  static const bool along = false;
  __device__ Input(const T* w, const T* a, const Sizes& s, int r, int column, int part, int phase)
      : weight(w), g(a), rows(s.channels), row(r), group(part), images(s.images),
        height(s.out_height), width(s.out_width), plane(s.images * s.out_height * s.out_width),
        whole_height(s.height), whole_width(s.width), phase_h(phase / SW), phase_w(phase % SW) {
    high = (s.height - phase_h + SH - 1) / SH;
    wide = (s.width - phase_w + SW - 1) / SW;
    columns = high < 1 || wide < 1 ? 0 : s.images * high * wide;
    first_h = (phase_h + PH) % SH;
    first_w = (phase_w + PW) % SW;
    const int taps_h = first_h < KH ? (KH - first_h + SH - 1) / SH : 0;
    taps_w = first_w < KW ? (KW - first_w + SW - 1) / SW : 0;
    taps = taps_h * taps_w;
    terms = s.outputs * taps;
    weight += (long long)group * s.outputs * rows * TAPS;
    g += (long long)group * s.outputs * plane;
    EACH(j, TN / 2) {
      const int p = column + threadIdx.x % 32 + 32 * j;
      image[j] = p < columns ? p / wide / high * height * width : -1;
      top[j] = p < columns ? p / wide % high + (phase_h + PH) / SH : 0;
      left[j] = p < columns ? p % wide + (phase_w + PW) / SW : 0;
    }
  }
  __device__ void read(int k, T* a, T* b) const {
    const int ka = k + threadIdx.x % STEP, kb = k + threadIdx.x / 32;
    if (ka < terms) {
      const int o = ka / taps, tap = ka % taps;
      const int at = (first_h + tap / taps_w * SH) * KW + first_w + tap % taps_w * SW;
      EACH(j, TM / 2) {
        const int m = row + threadIdx.x / STEP + 32 * j;
        a[j] = m < rows ? weight[((long long)o * rows + m) * TAPS + at] : (T)0;
      }
    } else {
      EACH(j, TM / 2) a[j] = (T)0;
    }
    if (kb < terms) {
      const int o = kb / taps, tap = kb % taps, down = tap / taps_w, across = tap % taps_w;
      EACH(j, TN / 2) {
        const int h = top[j] - down, w = left[j] - across;
        const bool seen = 0 <= h && h < height && 0 <= w && w < width;
        b[j] = seen && image[j] >= 0 ? g[(long long)o * plane + image[j] + h * width + w] : (T)0;
      }
    } else {
      EACH(j, TN / 2) b[j] = (T)0;
    }
  }
  __device__ long long target(int, int m, int p) const {
    const long long image = ((long long)group * rows + m) * images + p / wide / high;
    const int h = p / wide % high * SH + phase_h, w = p % wide * SW + phase_w;
    return (image * whole_height + h) * whole_width + w;
  }
};

struct Weight {  // rows o, columns (c, k, l), terms (n, i, j) of one part
  const T *g, *x;
  int rows, columns, terms, first, row, height, width, plane, out_height, out_width, positions;
  int channel[TN / 2], down[TN / 2], across[TN / 2];
  static const bool along = true;
  __device__ Weight(const T* a, const T* b, const Sizes& s, int r, int column, int group, int part)
      : g(a), x(b), rows(s.outputs), columns(s.channels * TAPS), row(r), height(s.height),
        width(s.width), plane(s.images * s.height * s.width), out_height(s.out_height),
        out_width(s.out_width), positions(s.images * s.out_height * s.out_width) {
    first = part * s.length;
    terms = positions - first < s.length ? positions - first : s.length;
    g += (long long)group * rows * positions;
    x += (long long)group * s.channels * plane;
    EACH(j, TN / 2) {
      const int q = column + threadIdx.x / STEP + 32 * j;
      channel[j] = q < columns ? q / TAPS : -1;
      down[j] = q % TAPS / KW - PH;
      across[j] = q % KW - PW;
    }
  }
  __device__ void read(int k, T* a, T* b) const {
    const int term = k + threadIdx.x % STEP, p = first + term, q = p / out_width;
    const int image = q / out_height * height * width;
    const int top = q % out_height * SH, left = p % out_width * SW;
    EACH(j, TM / 2) {
      const int m = row + threadIdx.x / STEP + 32 * j;
      a[j] = m < rows && term < terms ? g[(long long)m * positions + p] : (T)0;
    }
    EACH(j, TN / 2) {
      const int h = top + down[j], w = left + across[j];
      const bool seen = 0 <= h && h < height && 0 <= w && w < width;
      b[j] = seen && term < terms && channel[j] >= 0
                 ? x[(long long)channel[j] * plane + image + h * width + w]
                 : (T)0;
    }
  }
  __device__ long long target(int group, int m, int p) const {
    return ((long long)group * rows + m) * columns + p;
  }
};

// The elements of a thread: sums over the terms, one after another. The next step is read from
// memory while this one is added.
template <class Factors> __device__ void npdrt_multiply(const Factors& factors, T (&sum)[TM][TN]) {
  __shared__ T a[STEP][ROWS + 4], b[STEP][COLUMNS + 4];
  const int t = threadIdx.x;
  T next_a[TM / 2], next_b[TN / 2];
  EACH(i, TM) EACH(j, TN) sum[i][j] = (T)0;
  factors.read(0, next_a, next_b);
  for (int k = 0; k < factors.terms; k += STEP) {
    EACH(j, TM / 2) a[t % STEP][t / STEP + 32 * j] = next_a[j];
    EACH(j, TN / 2) {
      if (Factors::along) b[t % STEP][t / STEP + 32 * j] = next_b[j];
      else b[t / 32][t % 32 + 32 * j] = next_b[j];
    }
    __syncthreads();
    if (k + STEP < factors.terms) factors.read(k + STEP, next_a, next_b);
    EACH(s, STEP) {
      T left[TM], right[TN];
      EACH(i, TM) left[i] = a[s][npdrt_place(t / 16, i)];
      EACH(j, TN) right[j] = b[s][npdrt_place(t % 16, j)];
      EACH(i, TM) EACH(j, TN) sum[i][j] = fma(left[i], right[j], sum[i][j]);
    }
    __syncthreads();
  }
}

// Blocks: tiles of rows fastest, then tiles of columns, parts (or offsets in the stride), groups.
extern "C" __global__ void npdrt_convolution(
    const T* __restrict__ first, const T* __restrict__ second, T* __restrict__ out, int channels,
    int outputs, int images, int height, int width, int out_height, int out_width, int length,
    int row_tiles, int column_tiles, int parts, int groups) {
  const int rest = blockIdx.x / row_tiles, part = rest / column_tiles % parts;
  const int group = rest / column_tiles / parts;
  const int row = blockIdx.x % row_tiles * ROWS, column = rest % column_tiles * COLUMNS;
  const Sizes sizes = {channels, outputs, images, height, width, out_height, out_width, length};
  const FACTORS factors(first, second, sizes, row, column, group, part);
  if (column >= factors.columns) return;
  T sum[TM][TN];
  npdrt_multiply(factors, sum);
  EACH(i, TM)
    EACH(j, TN) {
      const int m = row + npdrt_place(threadIdx.x / 16, i);
      const int p = column + npdrt_place(threadIdx.x % 16, j);
      if (m < factors.rows && p < factors.columns)
        out[factors.target(part * groups + group, m, p)] = sum[i][j];
    }
}

extern "C" __global__ void npdrt_convolution_sum(
    const T* __restrict__ parts, T* __restrict__ out, int count, long long size) {
  const long long i = blockIdx.x * (long long)256 + threadIdx.x;
  if (i >= size) return;
  T sum = parts[i];
  for (int k = 1; k < count; ++k) sum += parts[k * size + i];
  out[i] = sum;
}
"""


def _tile(rows: int, columns: int, others: int, dtype: str) -> Pair:
    """TM and TN: the largest whose blocks fill half of a large GPU."""
    tiles = ((8, 8), (4, 8), (8, 4)) if dtype == "float32" else ()
    for tm, tn in tiles:
        wasted = tm == 8 and rows <= 64
        if not wasted and 2 * _blocks(rows, columns, (tm, tn)) * others >= ENOUGH:
            return tm, tn
    return 4, 4


def _blocks(rows: int, columns: int, tile: Pair) -> int:
    return ceil(rows, 16 * tile[0]) * ceil(columns, 16 * tile[1])


def _parts(rows: int, columns: int, positions: int, groups: int) -> int:
    """How many parts the derivative by the weight has: enough blocks, and no sum too long."""
    blocks = _blocks(rows, columns, (8, 8) if rows > 64 else (4, 8)) * groups
    wanted = max(ceil(ENOUGH, blocks), ceil(positions, MOST))
    return max(1, min(wanted, ceil(positions, FEWEST), ROOM // (rows * columns * groups)))


def _write(
    function: str, library: Any, out: Array, first: Array, second: Array, **setting: Any
) -> None:
    if cudnn.takes(setting["groups"]):
        cudnn.write(function, library, out, first, second, **setting)
    else:
        _multiply(function, library, out, first, second, **setting)


def _multiply(
    function: str, library: Any, out: Array, first: Array, second: Array, **setting: Any
) -> None:
    """By our kernels."""
    x, w, y = _shapes(function, first.shape, second.shape, setting)
    groups, (down, across) = setting["groups"], setting["stride"]
    rows, channels, taps = w[0] // groups, w[1], w[2] * w[3]
    positions, parts, length = math.prod(y[1:]), 1, 0
    columns = positions
    if function == "convolve_input":
        parts = down * across
        rows, columns = channels, x[1] * ceil(x[2], down) * ceil(x[3], across)
    elif function == "convolve_weight":
        columns = channels * taps
        parts = _parts(rows, columns, positions, groups)
        length = ceil(positions, parts)
        parts = ceil(positions, length)
    tile = _tile(rows, columns, parts * groups, str(out.dtype))
    tiles = ceil(rows, 16 * tile[0]), ceil(columns, 16 * tile[1])
    summed = function == "convolve_weight" and parts > 1
    target = library.empty((parts, *out.shape), dtype=out.dtype) if summed else out
    sizes = channels, w[0] // groups, x[1], *x[2:], *y[2:], length, *tiles, parts, groups
    names = {"T": TYPES[str(out.dtype)], "TM": tile[0], "TN": tile[1], "KH": w[2], "KW": w[3],
             "SH": down, "SW": across, "PH": setting["padding"][0], "PW": setting["padding"][1],
             "FACTORS": FACTORS[function]}  # fmt: skip
    factors = (first, second) if function == "convolve_weight" else (second, first)
    args = (*factors, target, *map(np.int32, sizes))
    blocks = math.prod(tiles) * parts * groups
    launch(library, SOURCE, "npdrt_convolution", blocks, THREADS, args, **names)
    if summed:
        args = (target, out, np.int32(parts), np.int64(out.size))
        launch(
            library,
            SOURCE,
            "npdrt_convolution_sum",
            ceil(out.size, THREADS),
            THREADS,
            args,
            **names,
        )


# --- shapes -----------------------------------------------------------------------------------


def result_shape(function: str, a: Any, b: Any, **setting: Any) -> Shape:
    """Of images (C, N, H, W) and a weight (O, C / groups, kh, kw), or of a cotangent and either."""
    stride, padding, groups = (setting[name] for name in ("stride", "padding", "groups"))
    if a.ndim != 4 or b.ndim != 4 or groups < 1 or min(stride) < 1 or min(padding) < 0:
        raise ValueError("expected two arrays of 4 dimensions, and settings of a convolution")
    x, w, y = _shapes(function, a.shape, b.shape, setting)
    if min(*x, *w, *y) < 1 or x[0] != w[1] * groups or w[0] % groups:
        raise ValueError(f"images {x} and a weight {w} do not fit")
    if function != "convolve" and a.shape != y:
        raise ValueError(f"a cotangent {a.shape}, but the result is {y}")
    return {"convolve": y, "convolve_input": x, "convolve_weight": w}[function]


def _shapes(function: str, a: Shape, b: Shape, setting: Any) -> tuple[Shape, Shape, Shape]:
    """The shapes of images, weight and value."""
    x, w, groups = a, b, setting["groups"]
    if function == "convolve_input":
        x = (b[1] * groups, a[1], *setting["size"])
    elif function == "convolve_weight":
        x, w = b, (a[0], b[0] // groups, *setting["size"])
    axes = zip(x[2:], w[2:], setting["stride"], setting["padding"], strict=True)
    return x, w, (w[0], x[1], *((n + 2 * p - k) // s + 1 for n, k, s, p in axes))


FACTORS = {"convolve": "Forward", "convolve_input": "Input", "convolve_weight": "Weight"}
KERNELS = {name: Kernel(partial(result_shape, name), partial(_write, name)) for name in FACTORS}
