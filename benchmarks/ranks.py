"""What a second rank gains: the step of a batch in 8 shards on one process and on two ranks, beside
that of the whole batch on two threads, as a table. Needs the extra mpi.

A step's time is that of a run of many steps less that of a run of few, over the steps between, so
that start and end do not count; the ways take turns. Data are random.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import report

NETWORKS = {  # name: words of `npdrt train`, shape of an example
    "perceptron, L = 50, width 784": (
        ["--model", "mlp", "--depth", "50", "--width", "784"],
        (784,),
    ),
    "ResNet-18, width 16": (["--model", "resnet18", "--set", "width=16"], (3, 32, 32)),
}  # fmt: skip
BATCH, STEPS = 256, 4  # examples of a step; steps of an epoch
WAYS = {  # name: ranks, shards, BLAS threads
    "whole batch, 2 threads": (1, 1, 2),
    "8 shards, 1 process": (1, 8, 1),
    "8 shards, 2 ranks": (2, 8, 1),
}


def seconds(network: str, way: str, epochs: int, folder: Path) -> float:
    """The training time of a run."""
    ranks, shards, threads = WAYS[way]
    launcher = next(filter(None, map(shutil.which, ("mpiexec.hydra", "mpiexec"))), "mpiexec")
    words = [launcher, "-n", str(ranks)] if ranks > 1 else []
    words += [sys.executable, "-m", "npdrt", "train", "--json", "-q", *NETWORKS[network][0]]
    words += ["--data", str(folder / f"{len(network)}.npz"), "--batch-size", str(BATCH), "--shards"]
    words += [str(shards), "--threads", str(threads), "--epochs", str(epochs)]
    words += ["--checkpoint-every", "0", "--trace-every", "0", "--device", "cpu"]
    out = folder / "run"
    done = subprocess.run(
        [*words, "--out", str(out)], env=os.environ | {"OPENBLAS_NUM_THREADS": str(threads)},
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    shutil.rmtree(out)
    return float(json.loads(done.stdout)["seconds"])


def measure(network: str, turns: int, folder: Path) -> dict[str, list[float]]:
    """Milliseconds of a step in every turn, by way."""
    rng, shape = np.random.default_rng(0), NETWORKS[network][1]
    x = rng.standard_normal((BATCH * STEPS, *shape)).astype("float32")
    np.savez(folder / f"{len(network)}.npz", x=x, y=np.arange(len(x)) % 10)
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(turns):
        for way, times in found.items():
            few, many = (seconds(network, way, epochs, folder) for epochs in (1, 6))
            times.append(1e3 * (many - few) / (5 * STEPS))
    return found


def row(network: str, found: dict[str, list[float]]) -> list[str]:
    """A line of the table."""
    ms = {way: statistics.median(times) for way, times in found.items()}
    threads, alone, both = ms.values()
    gains = [f"{threads / both:.2f}", f"{alone / both:.2f}"]
    return [network, *(f"{value:.0f}" for value in ms.values()), *gains]


def main(words: list[str] | None = None) -> None:
    """Print the table."""
    options = report.parser(__doc__)
    options.add_argument("--turns", type=int, default=3)
    given = options.parse_args(words)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for network in NETWORKS:
            results[network] = measure(network, given.turns, Path(folder))
    ways = [f"{way}, ms" for way in WAYS]
    head = ["network", *ways, "2 threads / 2 ranks", "1 process / 2 ranks"]
    text = report.table(head, [row(name, found) for name, found in results.items()])
    print(text)
    if given.output:
        Path(f"{given.output}.md").write_text(text + "\n", encoding="utf-8")
        Path(f"{given.output}.json").write_text(json.dumps(results) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
