"""The limits of this machine: the rate of float32 matrix products, and the bandwidth of its memory.

A step takes at least the time of its operations at that rate and of its bytes at that bandwidth.
Both are measured as a step uses them: through NumPy, into allocated memory, with the shapes of a
step.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from math import ceil
from typing import Any, NamedTuple

import numpy as np

SQUARE = 2048  # large enough that a product runs at its highest rate
LEAST_TIME = 1e-3  # seconds; a shorter product is repeated within one measurement
LEAST_ROUNDS = 3
BLOCK = 32768  # elements of a triad's block: its temporary, 128 KiB, stays in a core's cache
SCALE = np.float32(3)

Array = np.ndarray[Any, np.dtype[np.float32]]
Call = Callable[[], object]


class Bandwidth(NamedTuple):
    """A memory bandwidth and how it was reached."""

    rate: float
    """10^9 bytes a second."""
    threads: int
    """Threads at that rate."""


def sgemm_rate(shapes: Iterable[tuple[int, int]], seconds: float = 2.0) -> dict[str, float]:
    """GFLOP/s of the float32 matrix products of a perceptron's step, and of a large square one.

    shapes: pairs of batch and width. seconds: for all products together; each has three rounds at
    least. Returns by name, "g @ W, batch 250, width 784", for each shape: `x @ W.T` (forward),
    `g @ W` (gradient of the inputs), `g.T @ x` (gradient of the weights); and "square 2048".

    A product of (m, k) and (k, n) counts 2mkn operations. Operands and results are allocated
    before; BLAS keeps the threads of the caller. The products take turns, so that a slow moment of
    the machine affects them all; the median of each is returned.
    """
    square = _matrix(SQUARE, SQUARE)
    calls: dict[str, Call] = {}
    counts: dict[str, int] = {}
    for batch, width in shapes:
        found = _products(batch, width)
        calls |= found
        counts |= dict.fromkeys(found, 2 * batch * width**2)
    name = f"square {SQUARE}"
    calls[name] = partial(np.matmul, square, square.copy(), out=np.empty_like(square))
    counts[name] = 2 * SQUARE**3
    taken = _medians(calls, seconds)
    return {name: counts[name] / taken[name] / 1e9 for name in calls}


def _products(batch: int, width: int) -> dict[str, Call]:
    """The three products of a layer's step, each into an allocated array."""
    x, g, w = _matrix(batch, width), _matrix(batch, width), _matrix(width, width)
    layer, weight = np.empty_like(x), np.empty_like(w)
    shape = f"batch {batch}, width {width}"
    return {
        f"x @ W.T, {shape}": partial(np.matmul, x, w.T, out=layer),
        f"g @ W, {shape}": partial(np.matmul, g, w, out=layer),
        f"g.T @ x, {shape}": partial(np.matmul, g.T, x, out=weight),
    }


def _matrix(rows: int, columns: int) -> Array:
    return np.linspace(-1, 1, rows * columns, dtype=np.float32).reshape(rows, columns)


def _medians(calls: dict[str, Call], seconds: float) -> dict[str, float]:
    """The median time of each call in seconds; the calls take turns until `seconds` are over."""
    end = time.perf_counter() + seconds
    repeats = {name: _repeats(call) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    while time.perf_counter() < end or min(map(len, times.values())) < LEAST_ROUNDS:
        for name, call in calls.items():
            times[name].append(_time(call, repeats[name]))
    return {name: statistics.median(found) for name, found in times.items()}


def _repeats(call: Call) -> int:
    """How often to repeat a call so that it can be timed; the slow first call is not timed."""
    call()
    return ceil(LEAST_TIME / _time(call, 1))


def _time(call: Call, repeats: int) -> float:
    """Seconds of one of `repeats` calls in a row."""
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def triad_bandwidth(size: int = 64 * 2**20, passes: int = 10) -> Bandwidth:
    """The bandwidth of memory, as a = b + 3c over three float32 arrays of `size` bytes reaches it.

    The arrays should be several times the size of the last cache. Each thread has its own part of
    them and goes through it in blocks of 32,768 elements, in two calls into allocated memory: 3c
    into a temporary that stays in the cache, then its sum with b into a. So memory sees the three
    arrays once a pass, and 3 * `size` bytes are counted. As in the STREAM benchmark, the reads that
    a processor makes before it writes a are not. Returns the best of `passes` passes with one
    thread and as many with one for each core.
    """
    a, b, c = (np.full(size // 4, value, np.float32) for value in (0, 1, 2))
    found = [Bandwidth(_triad_rate(a, b, c, n, passes), n) for n in sorted({1, cores()})]
    return max(found)


def _triad_rate(a: Array, b: Array, c: Array, threads: int, passes: int) -> float:
    """GB/s of the best pass with that many threads."""
    parts = [
        _triad(*part) for part in zip(*(np.array_split(v, threads) for v in (a, b, c)), strict=True)
    ]
    with ThreadPoolExecutor(threads) as pool:
        call = partial(_together, pool, parts)
        taken = min(_time(call, 1) for _ in range(passes + 1))
    return 3 * a.nbytes / taken / 1e9


def _together(pool: ThreadPoolExecutor, parts: list[Call]) -> None:
    """Make all calls at once, each in a thread; NumPy releases the interpreter in its loops."""
    for done in [pool.submit(part) for part in parts]:
        done.result()


def _triad(a: Array, b: Array, c: Array) -> Call:
    """A pass of a = b + SCALE * c, block after block."""
    temporary = np.empty(BLOCK, np.float32)
    blocks = [np.array_split(v, range(BLOCK, v.size, BLOCK)) for v in (a, b, c)]
    work = [(x, y, z, temporary[: x.size]) for x, y, z in zip(*blocks, strict=True)]

    def run() -> None:
        for x, y, z, t in work:
            np.multiply(z, SCALE, out=t)
            np.add(y, t, out=x)

    return run


def cores() -> int:
    """The cores that this process may use, if the system says; else those of the machine."""
    allowed = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))
    return len(allowed(0))
