"""Measure a training step and the limits of the machine, on the CPU: `npdrt bench`.

The step is that of `npdrt train` (`make_step`) on random data: eager, replayed, and replayed with
compiled loops. Times are medians of steps that take turns, so that a slow moment of the machine
affects all of them.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np

from npdrt import optim
from npdrt.arrays import Array, Params, quiet
from npdrt.errors import Unavailable
from npdrt.models import MODELS
from npdrt.program import Memory, Program, record
from npdrt.program.calls import Call, flops
from npdrt.random import Random
from npdrt.train import limits, provenance
from npdrt.train.loop import blas_threads
from npdrt.train.step import State, Task, make_step

CLASSES = 10
RATE = 1e-6  # the learning rate: so small that no rule diverges
WARM_UP = 2  # untimed turns
TINY = 8  # elements of the arrays whose calls measure the cost of a call

Run = Callable[[], object]
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Case:
    """The network, the rule and how often to measure.

    model: a name in `npdrt.models.MODELS`, of `depth` weight matrices, `width` inputs and 10
    outputs. steps: timed steps each way. fast: also replay with compiled loops; None: if numba is
    installed. quick: measure the limits roughly, in a second or two.
    """

    model: str = "mlp"
    depth: int = 16
    width: int = 784
    batch_size: int = 250
    optimizer: str = "fromage"
    dtype: str = "float32"
    steps: int = 7
    fast: bool | None = None
    quick: bool = False


QUICK = Case(depth=3, width=64, batch_size=16, steps=3, quick=True)


def measure(case: Case, tell: Tell = lambda _: None) -> dict[str, Any]:
    """The report of `npdrt bench`; its help names the keys. tell: called with the next activity.

    BLAS has one thread if `npdrt train` would give it one, for the limits too.

    Raises `Unavailable` if compiled loops are asked for and numba is missing.
    """
    model: Any = MODELS[case.model]
    args = arguments(case, model(case.depth, case.width, case.width, CLASSES))
    params = args[0].params
    with blas_threads(case.batch_size, params), quiet():
        tell("recording")
        programs, memory, recorded = _programs(case, args)
        tell(f"the limits, and {case.steps} steps each way")
        seconds, found = _step_times(case, args, programs)
        tell("the cost of a call")
        overhead = call_overhead(turns=5 if case.quick else 30)
        report = {
            "cpu": provenance.cpu_name(),
            "blas": provenance.blas(),
            "case": asdict(case) | {"parameters": sum(math.prod(w.shape) for w in params.values())},
        }
    done = work(programs["replay"], params, args[0].optimizer)
    floor = done["gflop"] / found["sgemm"] + done["update_gb"] / found["triad"]
    return report | {
        "limits": found,
        "step": done | {"floor_ms": 1e3 * floor},
        "ways": {name: way(taken, done["gflop"], found, floor) for name, taken in seconds.items()},
        "record_ms": 1e3 * recorded,
        "call_overhead_us": 1e6 * overhead,
        "memory_mb": memory.nbytes / 1e6,
    }


def way(seconds: list[float], gflop: float, found: dict[str, Any], floor: float) -> dict[str, Any]:
    """The results of one way to run the step."""
    median = statistics.median(seconds)
    rate = gflop / median
    shares = {"share_of_sgemm": rate / found["sgemm"], "share_of_floor": floor / median}
    return {"ms": 1e3 * median, "gflops": rate, **shares}


# --- the step --------------------------------------------------------------------------------


def arguments(case: Case, model: Any) -> tuple[Any, ...]:
    """The arguments of the first step."""
    params = model.init(seed=0, dtype=case.dtype)
    state = State(params, {}, _optimizer(case).init(params))
    x, y = batch(case.batch_size, case.width, case.dtype)
    return state, x, y, RATE, Random(0, "train", 0)


def _optimizer(case: Case) -> optim.Optimizer:
    return optim.RULES[case.optimizer](lr=RATE)


def batch(size: int, inputs: int, dtype: str = "float32") -> tuple[Array, Array]:
    """Random inputs (size, inputs), normal, and labels (size,) of 10 classes."""
    x = Random(0, "bench/x").normal((size, inputs)).astype(dtype)
    y = (Random(0, "bench/y").words(size) % CLASSES).astype(np.int64)
    return x, y


def step_of(case: Case) -> Callable[..., Any]:
    """The step that is measured."""
    model: Any = MODELS[case.model]
    task = Task(model(case.depth, case.width, case.width, CLASSES), CLASSES)
    return make_step(task, _optimizer(case))


def _programs(case: Case, args: tuple[Any, ...]) -> tuple[dict[str, Program], Memory, float]:
    """The programs by way, the memory of the plain one, and the seconds to record and plan it."""
    memory, start = Memory(), time.perf_counter()
    replay = record(step_of(case), *args, memory=memory)
    len(replay.plan.groups)  # makes the plan
    taken, programs = time.perf_counter() - start, {"replay": replay}
    replay(*args)
    if case.fast is not False:
        try:
            fast = record(step_of(case), *args, fast=True)
            fast(*args)  # compiles
            programs["fast"] = fast
        except Unavailable:
            if case.fast:
                raise
    return programs, memory, taken


def _step_times(
    case: Case, args: tuple[Any, ...], programs: dict[str, Program]
) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Seconds of every timed step by way, each going on from its own state; and the limits, which
    take turns with the steps (quick: once)."""
    ways: dict[str, Callable[..., Any]] = {"eager": step_of(case), **programs}
    runs = {name: going_on(step, args) for name, step in ways.items()}
    samples: list[dict[str, Any]] = []

    def sample() -> None:
        if not (case.quick and samples):
            samples.append(limits_now([(case.batch_size, case.width)], case.quick))

    seconds = take_turns({"limits": sample, **runs}, case.steps)
    del seconds["limits"]
    return seconds, typical(samples)


def going_on(step: Callable[..., Any], args: tuple[Any, ...]) -> Run:
    """One step after another."""
    state, *rest = args

    def run() -> None:
        nonlocal state
        state = step(state, *rest).state

    return run


def take_turns(
    calls: Mapping[str, Run], turns: int, warm_up: int = WARM_UP
) -> dict[str, list[float]]:
    """Seconds of each call in each turn; turns begin with another call each, `warm_up` untimed."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls.items())
    for turn in range(warm_up + turns):
        first = turn % len(order)
        for name, call in [*order[first:], *order[:first]]:
            start = time.perf_counter()
            call()
            if turn >= warm_up:
                seconds[name].append(time.perf_counter() - start)
    return seconds


# --- the work of a step ------------------------------------------------------------------------


def work(program: Program, params: Params, state: Mapping[str, Array]) -> dict[str, Any]:
    """The work of a step: array calls, 10^9 operations of products, 10^9 bytes of the update."""
    return {
        "calls": len(running(program)),
        "gflop": products(program) / 1e9,
        "update_gb": update_bytes(params, state) / 1e9,
    }


def running(program: Program) -> list[Call]:
    """The calls of a replay."""
    plan = program.plan
    return [plan.calls[c] for group in plan.groups for c in group.calls]


def products(program: Program) -> int:
    """Floating-point operations of the matrix products of a replay."""
    return sum(flops(call, program.values) for call in running(program) if call.kind == "product")


def update_bytes(params: Params, state: Mapping[str, Array]) -> int:
    """The least bytes that an update moves: every parameter and slot read and written once, every
    gradient read once. A rule that needs a norm first reads a large array twice; that is not
    counted."""
    weights = sum(w.nbytes for w in params.values())
    slots = sum(value.nbytes for value in state.values())
    return int(3 * weights + 2 * slots)


# --- limits ------------------------------------------------------------------------------------


def limits_now(shapes: Iterable[tuple[int, int]], quick: bool = False) -> dict[str, Any]:
    """One sample of the limits, to be taken in turn with the steps.

    shapes: pairs of batch and width. sgemm: GFLOP/s of the products of these shapes after one
    another, products: one by one. triad: GB/s with triad_threads threads.
    """
    rates = limits.sgemm_rate(shapes, seconds=0)
    triad = limits.triad_bandwidth(size=2**23 if quick else 2**26, passes=2)
    found = {"sgemm": together(rates), "products": rates}
    return found | {"triad": triad.rate, "triad_threads": triad.threads}


def typical(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """The median of every number of several samples, also in dicts; the lower of two."""
    first = samples[0]
    columns = {key: [sample[key] for sample in samples] for key in first}
    return {
        key: typical(column) if isinstance(first[key], dict) else statistics.median_low(column)
        for key, column in columns.items()
    }


def together(rates: Mapping[str, float]) -> float:
    """GFLOP/s of a step's three kinds of product after one another, from `limits.sgemm_rate`."""
    return statistics.harmonic_mean([r for name, r in rates.items() if "square" not in name])


def call_overhead(arrays: int = 100, calls: int = 10, turns: int = 30) -> float:
    """Seconds that a call of a replay takes beyond the bare NumPy call.

    It compares a replayed program of `calls` additions on each of `arrays` arrays of 8 elements
    with a hand-written loop of the same additions. Like a training step, the program has an
    argument for every few calls, and handling it is counted. The least of `turns` of each.
    """
    addend = np.ones(TINY, np.float32)
    start = {str(i): np.zeros(TINY, np.float32) for i in range(arrays)}

    def step(params: Params, addend: Array) -> Params:
        new = {}
        for name, x in params.items():
            for _ in range(calls):
                x = x + addend
            new[name] = x
        return new

    def bare(xs: list[Array]) -> None:
        add = np.add
        for x in xs:
            for _ in range(calls):
                add(x, addend, out=x)

    program = record(step, start, addend)
    params = program(start, addend)

    def replay() -> None:
        nonlocal params
        params = program(params, addend)

    runs: dict[str, Run] = {"replay": replay, "bare": partial(bare, list(start.values()))}
    least = {name: min(taken) for name, taken in take_turns(runs, turns).items()}
    return (least["replay"] - least["bare"]) / (arrays * calls)
