"""What the kernels of rows share: one block of threads a row, in a fixed order.

Thread t of a block adds the elements t, t + THREADS, ... of a row, in order; then the threads are
folded in halves. THREADS depends on the length of the row alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from npdrt.kernels.kernel import TYPES, Array, launch

FEWEST, MOST = 32, 512  # threads of a row's block
CHUNK = 4096  # elements of a row that a block takes where it adds nothing, with
SPREAD = 256  # threads

COMMON = r"""
// What all threads of the block have, folded in halves.
#define NPDRT_FOLD(name, both) \
  __device__ T npdrt_##name(T value) { \
    __shared__ T folded[THREADS]; \
    const int t = threadIdx.x; \
    folded[t] = value; \
    __syncthreads(); \
    for (int half = THREADS / 2; half; half /= 2) { \
      if (t < half) { const T a = folded[t], b = folded[t + half]; folded[t] = both; } \
      __syncthreads(); \
    } \
    const T found = folded[0]; \
    __syncthreads(); \
    return found; \
  }
NPDRT_FOLD(sum, a + b)
NPDRT_FOLD(largest, b > a ? b : a)

// Unrolled, so that several elements are on their way from memory; the order stays.
#define EACH(i) _Pragma("unroll 8") for (long long i = threadIdx.x; i < n; i += THREADS)
#define FINITE(x) ((x) - (x) == (T)0)
"""


def launch_rows(
    library: Any, source: str, name: str, blocks: int, threads: int, out: Array, *args: Any
) -> None:
    """Python's numbers are doubles and long longs of the kernel, bools its ints."""
    kinds = {float: np.float64, int: np.int64, bool: np.int32}
    given = tuple(kinds[type(a)](a) if type(a) in kinds else a for a in args)
    names = {"T": TYPES[str(out.dtype)], "THREADS": threads, "CHUNK": CHUNK}
    launch(library, COMMON + source, name, blocks, threads, given, **names)


def threads(length: int) -> int:
    """Threads of the block of a row: a power of two."""
    return min(MOST, max(FEWEST, 1 << (max(length, 8) // 8 - 1).bit_length()))


def need(fits: bool) -> None:
    """Raise `ValueError` unless the shapes fit."""
    if not fits:
        raise ValueError("the shapes do not fit")
