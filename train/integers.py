"""Sums of gradients as integers, whose bits do not depend on the order of the additions.

NCCL adds in an order of its own, which depends on the number of GPUs and on the size of a message.
Integers have the same sum in any order. Let G be the largest magnitude of a parameter's gradients
in any shard, 2^(e - 1) <= G < 2^e, and b = 62 - ceil(log2 S) for S shards:

    sum = 2^(e - b) * sum over the shards of round(g * 2^(b - e))

The rounded numbers are below 2^b, so that the sum fits into 64 bits. Each is off by at most half of
2^(e - b), that is G * 2^-b: the sum is more exact than one in float32, and has twice the bytes. It
is rounded to float64, and then to the gradients' dtype. If a gradient is not finite, G is inf, and
the whole sum is NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from npdrt.arrays import Array, Params, namespace
from npdrt.errors import Unavailable
from npdrt.slices import factors_below


def summed(
    parts: Sequence[Params], count: int, like: Params, reduced: Callable[[Array, str], Array]
) -> Params:
    """The sum of the gradients of `count` shards, those of this rank in `parts`.

    like: arrays of their forms. reduced: an all-reduce, "max" or "sum", called once for the largest
    magnitudes and once for the integers of all parameters.
    """
    xp, bits = namespace(*like.values()), 62 - (count - 1).bit_length()
    largest = reduced(xp.stack([_largest(name, parts, like) for name in like]), "max")
    h, k = factors_below(xp.where(xp.isfinite(largest), largest, 1.0))  # (parameters,)
    rows = [_whole(n, parts, like[n], h[i], k[i], 2.0 ** (bits - 1)) for i, n in enumerate(like)]
    bucket, at, found = reduced(xp.concat(rows), "sum"), 0, {}
    for i, (name, w) in enumerate(like.items()):
        size = rows[i].shape[0]
        total = xp.asarray(bucket[at : at + size], dtype=xp.float64) * 2.0 ** (1 - bits)
        total = total * h[i] * k[i]
        total = xp.where(xp.isfinite(largest[i]), total, xp.nan)
        found[name] = xp.asarray(xp.reshape(total, w.shape), dtype=w.dtype)
        at += size
    return found


def _largest(name: str, parts: Sequence[Params], like: Params) -> Array:
    """The largest magnitude of a parameter's gradients on this rank, float64; inf if one is not
    finite, 0 without shards."""
    xp = namespace(like[name])
    top = xp.asarray(0.0, dtype=xp.float64)
    for part in parts if math.prod(like[name].shape) else ():
        found = xp.max(xp.abs(part[name]))
        top = xp.maximum(top, xp.where(xp.isfinite(found), found, xp.inf))
    return top


def _whole(name: str, parts: Sequence[Params], w: Array, h: Array, k: Array, units: float) -> Array:
    """The sum over this rank's shards of round(g / (h k) * units), int64; (elements,)."""
    xp = namespace(w)
    total = xp.zeros(w.shape, dtype=xp.int64)
    for part in parts:
        scaled = xp.asarray(part[name], dtype=xp.float64) / h / k * units
        scaled = xp.where(xp.isfinite(scaled), scaled, 0.0)  # what is not is flagged
        total = total + xp.asarray(xp.round(scaled), dtype=xp.int64)
    return xp.reshape(total, (-1,))


class Nccl:
    """All-reduces of CuPy's arrays by NCCL, among the ranks of a run, each with a GPU of its own.

    Not yet run on a device.
    """

    def __init__(self, cuda: Any, ranks: Any):
        self._cuda, self._nccl = cuda, cuda.nccl
        if not getattr(self._nccl, "available", True):
            raise Unavailable(
                "sums in integers on GPUs need NCCL, and CuPy does not find it; install "
                "nvidia-nccl-cu12 or nvidia-nccl-cu13, as CuPy is, or use --sums tree"
            )
        name = ranks.told(None if ranks.rank else self._nccl.get_unique_id())
        self._comm = self._nccl.NcclCommunicator(ranks.size, name, ranks.rank)

    def __call__(self, x: Array, operation: str) -> Array:
        """The sum or largest of the arrays of all ranks, int64 or float64, in their place."""
        kind = {"int64": self._nccl.NCCL_INT64, "float64": self._nccl.NCCL_FLOAT64}[str(x.dtype)]
        does = {"sum": self._nccl.NCCL_SUM, "max": self._nccl.NCCL_MAX}[operation]
        stream = self._cuda.get_current_stream().ptr
        self._comm.allReduce(x.data.ptr, x.data.ptr, x.size, kind, does, stream)
        return x
