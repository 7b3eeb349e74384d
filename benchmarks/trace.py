"""What traces cost: a run that measures every tenth step beside one that never does.

Whole training runs through the loop of `npdrt train`, log and all, one after the other: without
traces, with them, without, and so on. The time between two steps is taken where the progress bar
would be drawn; the first round of steps, which records the programs, is left out. The time of a
step of a run is the median over its steps, with traces the median of the measured and that of the
others in their proportion, so that a slow moment of the machine does not count. A repeat's ratio
is that with traces over that of its neighbour without; the table has the medians of the times and
of the ratios, and how much longer one measured step is than one that is not. The nets: a
perceptron of depth 16 and width 784 on batches of 250 random inputs of size 784, and the default
of `npdrt train --model mlp --depth 50` on the bundled digits; --depths and --width make other ones
of the first kind.
"""

from __future__ import annotations

import argparse
import os
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


class Clock(Reporter):
    """Notes when every step ended."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def progress(self, step: int, steps: int, record: dict[str, Any] | None) -> None:
        """The end of a step."""
        self.times.append(time.perf_counter())


def write_inputs(path: Path, given: argparse.Namespace) -> str:
    """Random inputs and labels, as many as the runs need."""
    samples = given.batch * (given.steps + given.every + 1)
    x = Random(0, "benchmark/x").normal((samples, given.width)).astype(np.float32)
    y = (Random(0, "benchmark/y").words(samples) % 10).astype(np.int64)
    np.savez(path, x=x, y=y)
    return str(path)


def seconds_of_steps(config: Config, every: int) -> list[float]:
    """How long every step of a run took, without the first round."""
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        train(config, Path(folder) / "run", reporter=clock)
    return list(np.diff(clock.times)[every - 1 :])


def compare(config: dict[str, Any], given: argparse.Namespace) -> dict[str, Any]:
    """Seconds of the steps of every run with traces and without."""
    common = {**config, "checkpoint_every": 0, "schedule": "constant"}
    runs: dict[str, list[list[float]]] = {"without": [], "with": []}
    for _ in range(given.repeats):
        for name, every in (("without", 0), ("with", given.every)):
            steps = seconds_of_steps(Config(**common, trace_every=every), given.every)
            rounds = min(given.steps, len(steps)) // given.every
            runs[name].append(steps[: rounds * given.every])
    return runs


def typical(steps: list[float], every: int) -> float:
    """Seconds of a step of which each `every`-th is measured."""
    traced, plain = steps[every - 1 :: every], [s for i, s in enumerate(steps) if (i + 1) % every]
    return (statistics.median(traced) + (every - 1) * statistics.median(plain)) / every


def row(name: str, runs: dict[str, list[list[float]]], every: int) -> list[str]:
    """Medians over the repeats as cells."""
    times = {
        "without": [statistics.median(steps) for steps in runs["without"]],
        "with": [typical(steps, every) for steps in runs["with"]],
    }
    ratios = [a / b for a, b in zip(times["with"], times["without"], strict=True)]
    traced = [s for steps in runs["with"] for s in steps[every - 1 :: every]]
    plain = [s for steps in runs["with"] for i, s in enumerate(steps) if (i + 1) % every]
    return [
        name,
        f"{1e3 * statistics.median(times['without']):.2f}",
        f"{1e3 * statistics.median(times['with']):.2f}",
        f"{statistics.median(ratios):.3f}",
        f"{min(ratios):.3f} to {max(ratios):.3f}",
        f"{statistics.median(traced) / statistics.median(plain):.2f}",
    ]


def nets(given: argparse.Namespace, inputs: str) -> dict[str, dict[str, Any]]:
    """What is trained, by name."""
    fast = {"fast": given.fast}
    wide = {
        f"L = {depth}, width {given.width}, batch {given.batch}": {
            "model_options": {"depth": depth, "width": given.width},
            **{"data": inputs, "batch_size": given.batch, "standardise": False, "epochs": 1},
            **fast,
        }
        for depth in given.depths
    }
    epochs = -(-(given.steps + given.every) // 45)  # of 45 steps
    digits = {"model_options": {"depth": given.digits}, "epochs": epochs, **fast}
    return {**wide, f"digits, L = {given.digits}": digits}


def main() -> None:
    """Run both nets."""
    options = parser(__doc__)
    options.add_argument("--depths", type=int, nargs="*", default=[16], help="of the wide nets")
    options.add_argument("--width", type=int, default=784)
    options.add_argument("--batch", type=int, default=250)
    options.add_argument("--digits", type=int, default=50, help="depth of the net on the digits")
    options.add_argument("--every", type=int, default=10, help="steps between traces")
    options.add_argument("--steps", type=int, default=40, help="timed steps of a run")
    options.add_argument("--repeats", type=int, default=5, help="pairs of runs")
    options.add_argument("--fast", action="store_true", help="compiled loops (extra fast)")
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        inputs = write_inputs(Path(folder) / "inputs.npz", given)
        results = {name: compare(config, given) for name, config in nets(given, inputs).items()}
    head = ("net", "ms without", "ms with", "ratio", "lowest to highest", "traced / plain step")
    text = table(head, [row(name, runs, given.every) for name, runs in results.items()])
    about = machine() | {"load": os.getloadavg()}
    publish(f"A trace every {given.every} steps.\n\n{text}", about, results, given.output)


if __name__ == "__main__":
    main()
