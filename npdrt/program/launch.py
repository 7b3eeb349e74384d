"""One launch for many arrays: tables of addresses, made when a program is bound.

The tables lie on the device before the first replay, so that a replay copies nothing from the
host. Their addresses are those of memory that lasts as long as the binding.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from npdrt.optim.norm import CHUNK, LANES
from npdrt.program.arena import Array
from npdrt.program.kernels import (
    NORM_FOLD,
    NORM_LANES,
    THREADS,
    Loop,
    batch_source,
)
from npdrt.program.operations import Operation

ELEMENTS = 2048  # of an array, for a block of threads


class Instance(NamedTuple):
    """A loop, its arrays in the order of its parameters, and the elements that it runs over."""

    loop: Loop
    arrays: tuple[Array, ...]
    size: int


def chains(memory: Any, instances: list[Instance]) -> list[Operation]:
    """Elementwise loops, each on arrays of its own, as one kernel.

    memory: `npdrt.program.cuda.CudaMemory`.
    """
    sources = {instance.loop[:3]: instance.loop for instance in instances}
    number = {source: k for k, source in enumerate(sources)}
    work: list[tuple[int, ...]] = []
    places: list[int] = []
    for loop, arrays, size in instances:
        work += [(number[loop[:3]], len(places), *part) for part in _parts(size, ELEMENTS)]
        places += [_address(x) for x in arrays]
    kernel = memory.raw_kernel("npdrt_batch", batch_source(list(sources.values())))
    return [
        (kernel, ((len(work),), (THREADS,), (_table(memory, work), _table(memory, places))), {})
    ]


def norms(memory: Any, pairs: list[tuple[Array, Array]]) -> list[Operation]:
    """`npdrt.optim.norm` of contiguous arrays of float32 or float64 into 0-d ones, as two kernels:
    a block of threads a chunk, a thread a lane; then a block an array."""
    work: list[tuple[int, ...]] = []
    folds = []
    for x, out in pairs:
        wide, first = int(x.dtype == np.float64), len(work)
        work += [(wide, _address(x), *part) for part in _parts(x.size, CHUNK)]
        folds.append((_address(out), first, len(work)))
    lanes = memory.xp.empty((len(work), LANES), dtype=np.float64)
    add = memory.raw_kernel("npdrt_norm_lanes", NORM_LANES)
    fold = memory.raw_kernel("npdrt_norm_fold", NORM_FOLD)
    return [
        (add, ((len(work),), (LANES,), (_table(memory, work), lanes)), {}),
        (fold, ((len(folds),), (LANES,), (_table(memory, folds), lanes)), {}),
    ]


def _parts(size: int, most: int) -> list[tuple[int, int]]:
    """Start and end of the parts of an array; an empty one has one part."""
    return [(start, min(start + most, size)) for start in range(0, max(size, 1), most)]


def _address(x: Array) -> int:
    return int(x.data.ptr)


def _table(memory: Any, rows: Any) -> Array:
    return memory.xp.asarray(np.array(rows, dtype=np.int64))
