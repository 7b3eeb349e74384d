"""Time and memory of a training step against depth, from 2 to 1000 layers.

Forward, backward and Fromage of an MLP (ReLU, no bias, softmax cross-entropy, He initialisation)
on one batch in float32, recorded and replayed; every width its own table. The programs of all
depths take turns; a time is the median of the steps. A straight line a + bL is fitted to the times
by least squares: `a` is the cost of a step, `b` of a layer, and R^2 and the largest residual, over
the longest time, say how straight they lie. The ratio of the slopes of the deeper and of the
shallower half is 1 where time grows linearly. "plan" is the time to record and plan the step, which
happens once, and "first" that of the first call, which binds the plan to memory. "MB" is what the
program holds: weights, state and scratch. The losses are of the first and of the last step. BLAS
has one thread where `npdrt train` gives it one.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import report
from step import machine

from npdrt import optim, record
from npdrt.models import MLP
from npdrt.program import Memory
from npdrt.random import Random
from npdrt.train.bench import batch, running, take_turns
from npdrt.train.config import Config, learning_rate
from npdrt.train.loop import blas_threads
from npdrt.train.step import State, Task, make_step

DEPTHS = [2, 5, 10, 20, 50, *range(100, 1001, 100)]
SCRATCH = 2  # times the weights; a guess of what a program holds, for what fits


def build(
    depth: int, width: int, size: int, rule: str, fast: bool
) -> tuple[dict[str, Any], Callable[[], None]]:
    """What recording a step at that depth took, and a function that makes the next step."""
    model = MLP(depth=depth, width=width, inputs=width, outputs=10)
    rate = learning_rate(Config(optimizer=rule), depth)
    optimizer = optim.RULES[rule](lr=rate)
    params = model.init(seed=0)
    state = State(params, {}, optimizer.init(params))
    rest = (*batch(size, width), rate, Random(0, "train", 0))
    memory, begun = Memory(), time.perf_counter()
    program = record(make_step(Task(model, 10), optimizer), state, *rest, memory=memory, fast=fast)
    calls = len(running(program))  # plans
    planned = time.perf_counter()
    memory.adopt({"state": state})  # as npdrt train does: these arrays are the program's now
    done = program(state, *rest)
    row = {
        "depth": depth,
        "parameters": sum(w.size for w in params.values()),
        "calls": calls,
        "plan": planned - begun,
        "first": time.perf_counter() - planned,
        "bytes": memory.nbytes,
        "losses": [float(done.loss)],
    }

    def step() -> None:
        nonlocal done
        done = program(done.state, *rest)
        row["losses"].append(float(done.loss))

    return row, step


def that_fit(depths: list[int], width: int, size: int, gigabytes: float) -> list[int]:
    """The depths whose programs fit together, the least first; says which are left out."""
    fitting, left = [], gigabytes * 1e9
    for depth in sorted(depths):
        left -= 4 * depth * width * (SCRATCH * width + size)
        if left < 0:
            print(f"width {width}: L = {depth} does not fit; see --gigabytes", file=sys.stderr)
        else:
            fitting.append(depth)
    return fitting


def measure(
    depths: list[int], width: int, size: int, steps: int, rule: str = "fromage", fast: bool = False
) -> dict[str, Any]:
    """A row a depth, and the fits of times and memory."""
    with blas_threads(size, {"widest": np.empty((width, width))}):
        built = {depth: build(depth, width, size, rule, fast) for depth in depths}
        seconds = take_turns({str(depth): step for depth, (_, step) in built.items()}, steps)
    rows = [row | {"seconds": seconds[str(depth)]} for depth, (row, _) in built.items()]
    result = {"width": width, "batch": size, "rule": rule, "fast": fast, "rows": rows}
    medians = [statistics.median(row["seconds"]) for row in rows]
    return result | {
        "step": line(depths, medians),
        "plan": line(depths, [row["plan"] for row in rows]),
        "bytes": line(depths, [float(row["bytes"]) for row in rows]),
    }


def line(depths: list[int], values: list[float]) -> dict[str, float]:
    """The straight line through `values` by least squares, and how straight they lie.

    ratio: slope of the depths from the middle of their range up over that of those up to there; NaN
    where one of the halves has fewer than two.
    """
    x, y = np.array(depths, float), np.array(values)
    b, a = np.polyfit(x, y, 1)
    residuals = y - (a + b * x)
    spread = float(((y - y.mean()) ** 2).sum()) or math.nan
    middle, slopes = (x.min() + x.max()) / 2, []
    for half in (x <= middle, x >= middle):
        slopes.append(np.polyfit(x[half], y[half], 1)[0] if half.sum() > 1 else math.nan)
    return {
        "a": float(a),
        "b": float(b),
        "r2": 1 - float((residuals**2).sum()) / spread,
        "residual": float(np.abs(residuals).max() / y.max()),
        "ratio": float(slopes[1] / slopes[0]),
    }


def text_of(results: list[dict[str, Any]]) -> str:
    """The results as Markdown."""
    parts = []
    for r in results:
        rows = []
        for row in r["rows"]:
            ms = 1e3 * statistics.median(row["seconds"])
            losses = f"{row['losses'][0]:.5f} to {row['losses'][-1]:.5f}"
            cells = [str(row["depth"]), f"{row['parameters'] / 1e6:.2f}", str(row["calls"])]
            cells += [f"{ms:.2f}", f"{1e3 * ms / row['depth']:.0f}", f"{1e3 * row['plan']:.0f}"]
            cells += [f"{1e3 * row['first']:.0f}", f"{row['bytes'] / 1e6:.1f}", losses]
            rows.append(cells)
        head = ["L", "10^6 weights", "calls", "ms a step", "us a layer", "plan ms", "first ms"]
        name = f"Width {r['width']}, batch {r['batch']}, {r['rule']}{', fast' * r['fast']}:"
        parts += [name, report.table([*head, "MB", "loss"], rows), lines_of(r)]
    return "\n\n".join(parts)


def lines_of(r: dict[str, Any]) -> str:
    """The fits as Markdown."""
    units = {"step": ("ms", 1e3), "plan": ("ms", 1e3), "bytes": ("MB", 1e-6)}
    rows = []
    for name, (unit, factor) in units.items():
        fit = r[name]
        formula = f"{factor * fit['a']:.3g} + {factor * fit['b']:.4g} L"
        shown = [f"{fit['r2']:.4f}", f"{fit['residual']:.1%}", f"{fit['ratio']:.2f}"]
        rows.append([f"{name}, {unit}", formula, *shown])
    return report.table(["fit", "", "R^2", "largest residual", "slope, deeper / shallower"], rows)


def size_of(text: str) -> tuple[int, int]:
    """WIDTHxBATCH as two numbers."""
    width, _, size = text.partition("x")
    return int(width), int(size)


def main() -> None:
    """Measure every width."""
    parser = report.parser(__doc__)
    parser.add_argument("--depths", type=int, nargs="+", default=DEPTHS)
    parser.add_argument(
        "--sizes", type=size_of, nargs="+", default=[(128, 32)], metavar="WIDTHxBATCH"
    )
    parser.add_argument("--rule", choices=list(optim.RULES), default="fromage")
    parser.add_argument("--fast", action="store_true", help="with compiled loops")
    parser.add_argument("--steps", type=int, default=10, help="timed steps")
    parser.add_argument("--gigabytes", type=float, default=8.0, help="for all programs of a width")
    given = parser.parse_args()
    results = []
    for width, size in given.sizes:
        depths = that_fit(given.depths, width, size, given.gigabytes)
        if len(set(depths)) > 1:
            results.append(measure(depths, width, size, given.steps, given.rule, given.fast))
        else:
            print(f"width {width}: a line needs two depths", file=sys.stderr)
    report.publish(text_of(results), machine(), results, given.output)


if __name__ == "__main__":
    main()
