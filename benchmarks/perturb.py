"""Perturbation slices beside training steps: microseconds an example, in one run.

A perceptron (784 inputs, 10 outputs, ReLU, biases) is trained with Fromage on random examples in
batches of 250, and sliced on the same examples: a point of a slice is a full-batch loss and
gradient with the changes' norms. A training step and a point each go forward and backward once an
example, so they should cost the same; an update comes with every 250 examples of the one, the
norms with every point of the other. Runs and slices take turns; the table has medians.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from report import parser, publish, table
from step import machine

from npdrt.random import Random
from npdrt.train import Config, Reporter, train
from npdrt.train.studies.slices import slices

POINTS = 4


class Clock(Reporter):
    """Notes when every step ended."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def progress(self, step: int, steps: int, record: dict[str, Any] | None) -> None:
        """The end of a step."""
        self.times.append(time.perf_counter())


def once(depth: int, examples: int, width: int, fast: bool, folder: Path) -> dict[str, float]:
    """Microseconds an example of a training step and of a point."""
    x = Random(0, "benchmark/x").normal((examples, width)).astype(np.float32)
    y = (Random(0, "benchmark/y").words(examples) % 10).astype(np.int64)
    np.savez(folder / "inputs.npz", x=x, y=y)
    options = {"depth": depth, "width": width, "bias": True}
    config = Config(model_options=options, data=str(folder / "inputs.npz"), standardise=False,
                    batch_size=250, epochs=1, trace_every=0, checkpoint_every=0,
                    fast=fast)  # fmt: skip
    clock, points = Clock(), []
    train(config, folder / "run", reporter=clock)
    slices(folder / "run", eta=[i / 1000 for i in range(POINTS + 1)], fast=fast,
           progress=lambda done, total: points.append(time.perf_counter()))  # fmt: skip
    step = statistics.median(np.diff(clock.times).tolist())
    point = statistics.median(np.diff(points).tolist())
    return {"step": 1e6 * step / 250, "point": 1e6 * point / examples}


def main() -> None:
    """Time every depth."""
    options = parser(__doc__)
    options.add_argument("--depths", type=int, nargs="*", default=[2, 16])
    options.add_argument("--width", type=int, default=784)
    options.add_argument("--examples", type=int, default=10_000)
    options.add_argument("--repeats", type=int, default=3)
    options.add_argument("--fast", action="store_true", help="compiled loops (extra fast)")
    given = options.parse_args()
    results: dict[int, list[dict[str, float]]] = {depth: [] for depth in given.depths}
    for _ in range(given.repeats):
        for depth in given.depths:
            with tempfile.TemporaryDirectory() as folder:
                found = once(depth, given.examples, given.width, given.fast, Path(folder))
            results[depth].append(found)
    rows = []
    for depth, found in results.items():
        step, point = (statistics.median(r[name] for r in found) for name in ("step", "point"))
        rows.append([f"{depth}", f"{step:.1f}", f"{point:.1f}", f"{point / step:.2f}"])
    head = ("L", "µs an example, step", "µs an example, point", "point / step")
    publish(table(head, rows), machine(), results, given.output)


if __name__ == "__main__":
    main()
