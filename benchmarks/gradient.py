"""GFLOP/s of the gradient of a deep perceptron, beside those of its bare matrix products.

Loss and gradient (`value_and_grad`) of an MLP (784 inputs, 10 outputs, ReLU, no bias, softmax
cross-entropy) on one batch of 250 in float32, recorded and replayed with the weights in the
program's own memory; no update. Only its matrix products are counted as operations, so whatever
else it does lowers the rate. The bare products are those of a hidden layer, 250 x 784 x 784 in the
three orientations of a step, one after another into arrays that are there: the same arrays again
and again, which stay in the cache. "Its products alone" are the program's own, on its own arrays,
which do not. All take turns, so that a slow moment of the machine meets them all. The target is
85 % of the bare rate.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import report
from step import machine

from npdrt import ops, record, value_and_grad
from npdrt.errors import Unavailable
from npdrt.models import MLP
from npdrt.program.operations import run
from npdrt.train.bench import batch, products, take_turns, together, typical
from npdrt.train.limits import sgemm_rate

TARGET = 0.85


def gradient(depth: int, width: int, size: int, fast: bool = False) -> dict[str, Any]:
    """The gradient as a program with its own arguments: functions that replay it, and its products
    alone, and the number of their operations."""
    model = MLP(depth=depth, width=width, inputs=width, outputs=10)
    x, y = batch(size, width)
    differentiated = value_and_grad(lambda p, x, y: ops.softmax_cross_entropy(model(p, x), y))

    def step(params: Any, x: Any, y: Any) -> Any:
        return params, x, y, *differentiated(params, x, y)

    given = (model.init(seed=0), x, y)
    replay = record(step, *given, fast=fast)
    mine = replay(*given)[:3]  # the program's own arrays, which the next calls need not copy
    if any(a is not b for a, b in zip(replay(*mine)[1:3], mine[1:], strict=True)):
        raise RuntimeError("the program copied arrays of its own")
    alone = [o for o in replay._bound.operations if o[0] is np.matmul]
    return {
        "replay": partial(replay, *mine),
        "alone": partial(run, alone),
        "operations": products(replay),
    }


def measure(depth: int, width: int, size: int, turns: int) -> dict[str, Any]:
    """Seconds of every gradient, and the bare rates by name."""
    samples: list[dict[str, float]] = []
    plain = gradient(depth, width, size)
    calls: dict[str, Callable[[], object]] = {
        "bare": lambda: samples.append(sgemm_rate([(size, width)], seconds=0)),
        "its products alone": plain["alone"],
        "program": plain["replay"],
    }
    try:
        calls["program, fast"] = gradient(depth, width, size, fast=True)["replay"]
    except Unavailable as error:
        print(f"fast is left out: {error}", file=sys.stderr)
    seconds = take_turns(calls, turns)
    del seconds["bare"]
    shape = {"depth": depth, "width": width, "batch": size, "operations": plain["operations"]}
    return shape | {"seconds": seconds, "rates": typical(samples)}


def text_of(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    bare, rates = together(result["rates"]), result["rates"]
    rows = [(f"bare {name}", "", f"{rate:.0f}", "") for name, rate in rates.items()]
    rows.append(("bare, a step's three together", "", f"{bare:.0f}", "100 %"))
    for name, seconds in result["seconds"].items():
        median = statistics.median(seconds)
        rate = result["operations"] / median / 1e9
        shown = (f"{1e3 * median:.1f}", f"{rate:.0f}", f"{100 * rate / bare:.0f} %")
        rows.append((name, *shown))
    head = f"L = {result['depth']}, {result['operations'] / 1e9:.1f} GFLOP; target {TARGET:.0%}"
    return f"{head}\n\n{report.table(('', 'ms', 'GFLOP/s', 'of bare'), rows)}"


def main() -> None:
    """Measure one depth."""
    parser = report.parser(__doc__)
    parser.add_argument("--depth", type=int, default=50)
    parser.add_argument("--width", type=int, default=784)
    parser.add_argument("--batch-size", type=int, default=250)
    parser.add_argument("--steps", type=int, default=20, help="timed gradients")
    given = parser.parse_args()
    result = measure(given.depth, given.width, given.batch_size, given.steps)
    report.publish(text_of(result), machine(), result, given.output)


if __name__ == "__main__":
    main()
