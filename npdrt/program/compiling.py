"""Compile the kernels of a program before its first replay, several at once.

CuPy compiles a kernel in its first launch, one after another: half a minute for a large network.
Here every operation is launched once on memory of its own, from several threads; the compiler does
not hold Python's lock. CuPy keeps the kernels in the folder CUPY_CACHE_DIR.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from npdrt import cublas
from npdrt.arrays import on_gpu
from npdrt.program.arena import Arena, Array
from npdrt.program.calls import Value
from npdrt.program.operations import Operation

THREADS = 16
LARGEST = 1 << 26  # bytes of an operation's arrays; one of larger arrays compiles when it is run


class NoProducts:
    """Takes the place of cuBLAS, which compiles nothing."""

    def __init__(self, xp: Any):
        self.xp = xp

    def matmul(self, a: Array, b: Array, out: Array = None) -> Array:
        """An array of the form of a product, with anything in it."""
        if out is not None:
            return out
        stack = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
        return self.xp.empty((*stack, a.shape[-2], b.shape[-1]), dtype=a.dtype)


def compile_kernels(operations: list[Operation], memory: Any) -> None:
    """Launch every operation of a form that this memory has not launched yet.

    memory: `npdrt.program.cuda.CudaMemory`; its device is the current one.
    """
    movable = (o for o in operations if not on_gpu(getattr(o[0], "__self__", None)))
    forms = {_form(operation): operation for operation in movable}
    fresh = {form: o for form, o in forms.items() if form not in memory.launched}
    memory.launched.update(fresh)
    threads = min(THREADS, os.cpu_count() or 1, len(fresh))
    if threads < 2:
        return  # the first replay compiles as fast
    cuda, pool = memory.xp.cuda, memory.xp.cuda.MemoryPool()
    stream = cuda.Stream(non_blocking=True)

    def launch(operation: Operation) -> None:
        allocator = cuda.using_allocator(pool.malloc)
        with memory.on_device(), stream, allocator, cublas.using(NoProducts(memory.xp)):
            _launch(operation, memory)

    with ThreadPoolExecutor(threads) as workers:
        list(workers.map(launch, fresh.values()))


def _form(item: Any) -> Any:
    """Equal for operations that are the same kernels."""
    if on_gpu(item):
        return item.shape, str(item.dtype), item.strides
    if isinstance(item, tuple | list):
        return tuple(map(_form, item))
    if isinstance(item, dict):
        return tuple((name, _form(value)) for name, value in item.items())
    return repr(item)


def _launch(operation: Operation, memory: Any) -> None:
    """The operation on arrays of zeros, of the same forms."""
    function, args, settings = operation
    arrays: dict[int, Array] = {}
    _collect((args, settings), arrays)
    values = {i: Value(x.shape, str(x.dtype), x.strides) for i, x in arrays.items()}
    if sum(value.extent[1] for value in values.values()) > LARGEST:
        return
    try:
        made = {i: _zeros(value, memory) for i, value in values.items()}
        function(*_replaced(args, made), **_replaced(settings, made))
    except memory.xp.cuda.memory.OutOfMemoryError:
        return  # the first replay needs less


def _collect(item: Any, found: dict[int, Array]) -> None:
    if on_gpu(item):
        found[id(item)] = item
    elif isinstance(item, tuple | list):
        for part in item:
            _collect(part, found)
    elif isinstance(item, dict):
        _collect(list(item.values()), found)


def _replaced(item: Any, made: dict[int, Array]) -> Any:
    if on_gpu(item):
        return made[id(item)]
    if isinstance(item, dict):
        return {name: _replaced(value, made) for name, value in item.items()}
    return tuple(_replaced(x, made) for x in item) if isinstance(item, tuple | list) else item


def _zeros(value: Value, memory: Arena) -> Array:
    low, size = value.extent
    owner = memory.xp.empty(max(size, 1), dtype="uint8")
    owner.fill(0)
    return memory.view(owner, value, -low)
