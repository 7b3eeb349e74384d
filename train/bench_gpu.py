"""Measure a training step and the limits of a GPU: `npdrt bench` on one.

The step is that of `npdrt train` on random data, eager and replayed. A measurement asks for many
steps and then waits for the device, so that its time is the longer of the host's and the device's.
"""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import numpy as np

from npdrt.arrays import (
    Array,
    Device,
    describe_gpus,
    gpu_software,
    namespace,
    on,
    product,
    quiet,
    to_device,
    wait,
)
from npdrt.models import MODELS
from npdrt.program import Memory, Program, memory_on, record
from npdrt.random import Random
from npdrt.train import bench
from npdrt.train.bench import QUICK, Case, Run, Tell

ROUNDS = 16  # of a step's three products in one graph
SQUARE = 4096  # so large that a product runs at its highest rate
AWAY = 1 << 28  # bytes of an array, several times the caches
REPEATS = 10  # steps between two waits
WARM_UP = 3  # calls that compile, and capture the graph


def measure(case: Case, device: Device, tell: Tell = lambda _: None) -> dict[str, Any]:
    """The report of `npdrt bench` on a GPU; its help names the keys. tell: as `bench.measure`."""
    with on(device), quiet():
        args = on_device(case, device)
        tell("recording and compiling")
        memory, start = memory_on(device), time.perf_counter()
        replay = record(bench.step_of(case), *args, memory=memory)
        work = bench.work(replay, args[0].params, args[0].optimizer)  # makes the plan
        recorded = time.perf_counter() - start
        ways = {
            "eager": bench.going_on(bench.step_of(case), args),
            "replay": bench.going_on(replay, args),
        }
        seconds = {name: _seconds(run, device, case.steps) for name, run in ways.items()}
        parameters = sum(math.prod(w.shape) for w in args[0].params.values())
        tell("the limits")
        found = limits(case, device)
        floor = work["gflop"] / found["sgemm"] + work["update_gb"] / found["add"]
        return {
            "gpu": describe_gpus()[device.index],
            "software": gpu_software(),
            "case": asdict(case) | {"parameters": parameters},
            "limits": found,
            "step": work | {"floor_ms": 1e3 * floor} | graph(replay),
            "ways": {n: bench.way(s, work["gflop"], found, floor) for n, s in seconds.items()},
            "host_ms": 1e3 * _asking(ways["replay"], device),
            "record_ms": 1e3 * recorded,
            "memory_mb": memory.nbytes / 1e6,
        }


def on_device(case: Case, device: Device) -> tuple[Any, ...]:
    """The arguments of the first step, with arrays on the device."""
    model: Any = MODELS[case.model]
    state, x, y, *rest = bench.arguments(case, model(case.depth, case.width, case.width, 10))
    groups = (state.params, state.buffers, state.optimizer)
    moved = [{name: to_device(a, device) for name, a in group.items()} for group in groups]
    return (type(state)(*moved), to_device(x, device), to_device(y, device), *rest)


def graph(program: Program) -> dict[str, Any]:
    """Whether replays of a program are one CUDA graph: "graph", "graph_error", "nodes"."""
    error = program.graph_error
    why = None if error is None else f"{type(error).__name__}: {error}"
    return {"graph": program.graph, "graph_error": why, "nodes": program.nodes}


def trial(device: Device) -> dict[str, Any]:
    """Whether a small training step becomes a CUDA graph on the device, as `graph` says it."""
    case = replace(QUICK, depth=2, width=8, batch_size=4, optimizer="sgd")
    with on(device), quiet():
        args = on_device(case, device)
        program = record(bench.step_of(case), *args, memory=memory_on(device))
        run = bench.going_on(program, args)
        for _ in range(WARM_UP):
            run()
        return graph(program)


# --- time ----------------------------------------------------------------------------------------


def _seconds(run: Run, device: Device, turns: int) -> list[float]:
    """Seconds of a call, in each of `turns` measurements of REPEATS calls."""
    for _ in range(WARM_UP):
        run()
    return [_together(run, device) for _ in range(turns)]


def _together(run: Run, device: Device) -> float:
    """Seconds of one of REPEATS calls, the device's work included."""
    wait(device)
    start = time.perf_counter()
    for _ in range(REPEATS):
        run()
    wait(device)
    return (time.perf_counter() - start) / REPEATS


def _asking(run: Run, device: Device) -> float:
    """Seconds that the host takes to ask for one call."""
    wait(device)
    start = time.perf_counter()
    for _ in range(REPEATS):
        run()
    spent = (time.perf_counter() - start) / REPEATS
    wait(device)
    return spent


# --- limits --------------------------------------------------------------------------------------


def limits(case: Case, device: Device) -> dict[str, Any]:
    """The limits of a device, medians.

    sgemm: GFLOP/s of a step's three products at its shapes, in one graph; products: these, and a
    large square one. add: GB/s of x + y over large arrays, which reads two and writes one.
    """
    turns = 3 if case.quick else 7
    square = np.full((64, 64) if case.quick else (SQUARE, SQUARE), 0.5, np.float32)
    large = np.ones((1 << 20 if case.quick else AWAY) // 4, np.float32)
    squares, many = to_device(square, device), to_device(large, device)
    memory = memory_on(device)
    calls: dict[str, tuple[Run, float]] = {
        "at the step's shapes": products(case.batch_size, case.width, memory),
        f"square {square.shape[0]}": (
            partial(product, squares, squares),
            2.0 * square.shape[0] ** 3,
        ),
        "add": (partial(many.__add__, many), 3.0 * large.nbytes),
    }
    rates = {
        name: amount / statistics.median(_seconds(run, device, turns)) / 1e9
        for name, (run, amount) in calls.items()
    }
    bandwidth = rates.pop("add")
    return {"sgemm": rates["at the step's shapes"], "products": rates, "add": bandwidth}


def products(batch: int, width: int, memory: Memory) -> tuple[Run, float]:
    """A call that makes ROUNDS of `g.T @ x`, `x @ W.T` and `g @ W`, and its operations.

    The rows or columns of x and g are orthonormal, so that no number grows.
    """

    def step(x: Array, g: Array) -> tuple[Array, Array]:
        xp = namespace(x)
        for _ in range(ROUNDS):
            w = product(xp.matrix_transpose(g), x)  # (width, width)
            x, g = product(x, xp.matrix_transpose(w)), product(g, w)  # (batch, width)
        return x, g

    given = [_orthonormal(name, batch, width) for name in ("x", "g")]
    program = record(step, *given, memory=memory)
    args = [memory.xp.asarray(a) for a in given]
    return partial(program, *args), ROUNDS * 3 * 2.0 * batch * width**2


def _orthonormal(name: str, rows: int, columns: int) -> Array:
    drawn = Random(0, f"bench/{name}").normal((max(rows, columns), min(rows, columns)))
    found = np.linalg.qr(drawn)[0].astype(np.float32)
    return found if rows >= columns else np.ascontiguousarray(found.T)
