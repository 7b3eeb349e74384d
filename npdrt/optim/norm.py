"""The norm that the layerwise rules use, with a defined order of summation."""

from __future__ import annotations

from npdrt.arrays import Array, composite, namespace, sum_rows
from npdrt.errors import Error

LANES = 256
CHUNK = 65536  # elements: 512 KiB in float64, so that a chunk stays in cache


@composite
def norm(x: Array) -> Array:
    """The 2-norm of all elements of a float array, as a 0-d float64: sqrt(sum of squares).

    The order of every addition is part of the definition, so that any machine, thread count,
    SIMD level or device gives the same bits:

    1. The elements in C order are rounded to float64 (exact from float16 and float32), squared,
       and cut into chunks of 65,536; the last is filled up with zeros to a multiple of 256.
    2. Each chunk is read as rows of 256 lanes, and its rows are added in order, lane by lane.
    3. The lanes of the chunks are added in chunk order.
    4. The 256 lanes are folded in halves: s[k] + s[k + 128], then 64, 32, ..., 1.
    5. The square root of the result.

    An empty array has norm 0. Float32 values do not overflow or underflow (the sum is float64);
    float64 values above about 1e154 give inf, below 1e-162 give 0. NaN gives NaN, inf gives inf
    (NaN where both occur). Cost: one pass and two temporaries a chunk. Not BLAS's nrm2 and not
    `linalg.norm`, whose bits change with the kernel.
    """
    xp = namespace(x)
    if not xp.isdtype(x.dtype, "real floating"):
        raise Error(f"norm: expected a real floating-point array; got {x.dtype}")
    flat = xp.reshape(x, (-1,))
    n = flat.shape[0]
    lanes = _chunk_lanes(flat[: min(CHUNK, n)])
    for start in range(CHUNK, n, CHUNK):
        lanes = lanes + _chunk_lanes(flat[start : min(start + CHUNK, n)])
    half = LANES // 2
    while half:
        lanes = lanes[:half] + lanes[half:]
        half //= 2
    return xp.sqrt(xp.reshape(lanes, ()))


def _chunk_lanes(part: Array) -> Array:
    """The 256 sums of squares of one chunk."""
    xp, missing = namespace(part), -part.shape[0] % LANES or LANES * (part.shape[0] == 0)
    wide = xp.asarray(part, dtype=xp.float64)
    if missing:
        wide = xp.concat((wide, xp.zeros(missing, dtype=xp.float64)))
    return sum_rows(xp.reshape(wide * wide, (-1, LANES)))
