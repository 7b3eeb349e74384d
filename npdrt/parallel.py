"""Independent tasks on as many threads as the BLAS has, each with its products on one of them.

A product that the BLAS splits over its threads can round differently from the single-threaded
product. Tasks that are fixed by the shapes give the same bits on any number of threads. On two
cores they are also faster than one split product after another, because everything around a
product, above all the copies, runs on both cores.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from functools import cache
from typing import Any

import numpy as np

Task = Callable[[], None]
ALIGNMENT = 64  # bytes

_turn = threading.Lock()  # the number of the BLAS's threads is one for the whole process


@cache
def _blas() -> Any:
    import threadpoolctl  # only when needed: it searches the libraries of the process

    return threadpoolctl.ThreadpoolController().select(user_api="blas")


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="npdrt")


def _after_fork() -> None:
    """A forked process has none of the threads, and the thread that held the lock is gone."""
    global _turn
    _turn = threading.Lock()
    _pool.cache_clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def run(tasks: Sequence[Task]) -> None:
    """Run every task once, in any order. None may run tasks itself.

    It uses as many threads as NumPy's BLAS is set to use (`OMP_NUM_THREADS`, `npdrt train
    --threads`, threadpoolctl); meanwhile the BLAS uses one thread in every task.
    """
    with _turn:
        before = [(library, library.num_threads) for library in _blas().lib_controllers]
        threads = min([len(tasks), *(n for _, n in before)]) if before else 1
        try:
            for library, n in before:
                if n != 1:
                    library.set_num_threads(1)
            _share(tasks, threads)
        finally:
            for library, n in before:
                if n != 1:
                    library.set_num_threads(n)


def _share(tasks: Sequence[Task], threads: int) -> None:
    """Run the tasks; each is taken by the next free thread, including this one."""
    pending = iter(tasks)

    def work() -> None:
        for task in pending:
            task()

    # NumPy keeps its warning settings in the context, which a thread does not inherit.
    helpers = [_pool(threads - 1).submit(copy_context().run, work) for _ in range(threads - 1)]
    try:
        work()
    finally:
        for helper in helpers:
            helper.exception()
    for helper in helpers:
        helper.result()


class _Memory(threading.local):
    """Bytes that one thread reuses, because fresh pages are slow."""

    def __init__(self) -> None:
        self.blocks: dict[str, Any] = {}


_memory = _Memory()


def scratch(dtype: Any, *shapes: tuple[int, ...], use: str = "task") -> list[Any]:
    """Uninitialised arrays of these shapes, valid until this thread asks again for the same use: in
    a "task", or in the "caller" of tasks."""
    itemsize = np.dtype(dtype).itemsize
    sizes = [-(-math.prod(shape) * itemsize // ALIGNMENT) * ALIGNMENT for shape in shapes]
    block = _memory.blocks.get(use)
    if block is None or block.size < sum(sizes):
        block = _memory.blocks[use] = np.empty(sum(sizes), np.uint8)
    arrays, start = [], 0
    for shape, size in zip(shapes, sizes, strict=True):
        arrays.append(np.ndarray(shape, dtype, block.data, start))
        start += size
    return arrays
