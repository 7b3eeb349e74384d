"""Masks drawn on a GPU from the words of `npdrt.random`, with the bits of `Random.bernoulli`.

A kernel reads seed, purpose and step from the device's memory, so that a CUDA graph holds it and
draws another mask in every step. There is only integer arithmetic in it: a thread makes a block of
four words, and an element is True where (word >> 11) < limit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from npdrt.errors import Error

Array = Any

NAME = "npdrt_bernoulli"
THREADS = 256  # of a block; each makes WORDS elements
WORDS = 4  # of a block of Philox4x64
KEY = 3  # numbers that name a stream: seed, purpose and step

SOURCE = r"""
#ifdef __CUDA_ARCH__
#define NPDRT_HIGH(a, b) __umul64hi(a, b)
#else
#define NPDRT_HIGH(a, b) (unsigned long long)(((unsigned __int128)(a) * (b)) >> 64)
#endif
extern "C" __global__ void npdrt_bernoulli(
    const unsigned long long* __restrict__ key, unsigned long long limit, long long size,
    bool* __restrict__ out) {
  typedef unsigned long long u64;
  const long long start = 4 * (blockIdx.x * 256ll + threadIdx.x);
  if (start >= size) return;
  u64 c0 = start / 4 + 1, c1 = 0, c2 = key[2], c3 = 0, k0 = key[0], k1 = key[1];
  for (int round = 0; round < 10; ++round) {
    const u64 h0 = NPDRT_HIGH(0xD2E7470EE14C6C93ull, c0), l0 = 0xD2E7470EE14C6C93ull * c0;
    const u64 h1 = NPDRT_HIGH(0xCA5A826395121157ull, c2), l1 = 0xCA5A826395121157ull * c2;
    c0 = h1 ^ c1 ^ k0; c1 = l1; c2 = h0 ^ c3 ^ k1; c3 = l0;
    k0 += 0x9E3779B97F4A7C15ull; k1 += 0xBB67AE8584CAA73Bull;
  }
  const u64 words[4] = {c0, c1, c2, c3};
  for (int j = 0; j < 4; ++j)
    if (start + j < size) out[start + j] = (words[j] >> 11) < limit;
}
"""


def limit(p: float) -> int:
    """The number below which the upper 53 bits of a word lie with probability `p`."""
    if not 0.0 <= p <= 1.0:
        raise Error(f"a probability lies in [0, 1]; got {p}")
    return math.ceil(p * 2.0**53)


def launch(key: Array, p: float, out: Array) -> tuple[Any, ...]:
    """Grid, block and arguments of the kernel that fills `out`, a C-ordered array of bool.

    key: (3,) uint64 on the device, from `key_of`.
    """
    blocks = -(-out.size // (WORDS * THREADS))
    return (blocks,), (THREADS,), (key, np.uint64(limit(p)), np.int64(out.size), out)


def key_of(streams: Sequence[Any]) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """Seed, purpose and step of streams (`npdrt.random.Random`): (streams, 3)."""
    rows = [(*stream.key, stream.step) for stream in streams]
    return np.array(rows, dtype=np.uint64).reshape(-1, KEY)


def bernoulli(library: Any, stream: Any, shape: tuple[int, ...], p: float) -> Array:
    """`stream.bernoulli(shape, p)` as an array of `library`, CuPy, drawn on the current device."""
    out = library.empty(shape, dtype=np.bool_)
    arguments = launch(library.asarray(key_of([stream])[0]), p, out)
    if out.size:
        _kernel(library)(*arguments)
    return out


@cache
def _kernel(library: Any) -> Any:
    return library.RawKernel(SOURCE, NAME, options=("--fmad=false",))
