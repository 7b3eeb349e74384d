"""What a second rank gains: the step of a batch in 8 shards on one process and on two ranks, beside
that of the whole batch on two threads, as a table. Needs the extra mpi.

A step's time is that of a run of many steps less that of a run of few, over the steps between, so
that start and end do not count; the ways take turns. Data are random. CPU time is that of all
processes and threads, waiting ranks included: one process's tells what a step costs on a busy
machine, too.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
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


def seconds(network: str, way: str, epochs: int, folder: Path) -> np.ndarray[Any, Any]:
    """The training time of a run, and the CPU time of all its processes."""
    ranks, shards, threads = WAYS[way]
    launcher = next(filter(None, map(shutil.which, ("mpiexec.hydra", "mpiexec"))), "mpiexec")
    words = [launcher, "-n", str(ranks)] if ranks > 1 else []
    words += [sys.executable, "-m", "npdrt", "train", "--json", "-q", *NETWORKS[network][0]]
    words += ["--data", str(folder / f"{len(network)}.npz"), "--batch-size", str(BATCH), "--shards"]
    words += [str(shards), "--threads", str(threads), "--epochs", str(epochs)]
    words += ["--checkpoint-every", "0", "--trace-every", "0", "--device", "cpu"]
    out, before = folder / "run", os.times()
    done = subprocess.run(
        [*words, "--out", str(out)], env=os.environ | {"OPENBLAS_NUM_THREADS": str(threads)},
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    shutil.rmtree(out)
    after = os.times()
    cpu = sum(after[2:4]) - sum(before[2:4])  # of processes that have ended
    return np.array([json.loads(done.stdout)["seconds"], cpu])


def measure(network: str, turns: int, folder: Path) -> dict[str, list[list[float]]]:
    """Milliseconds of a step in every turn, by way: wall and CPU time."""
    rng, shape = np.random.default_rng(0), NETWORKS[network][1]
    x = rng.standard_normal((BATCH * STEPS, *shape)).astype("float32")
    np.savez(folder / f"{len(network)}.npz", x=x, y=np.arange(len(x)) % 10)
    found: dict[str, list[list[float]]] = {way: [] for way in WAYS}
    for _ in range(turns):
        for way, times in found.items():
            few, many = (seconds(network, way, epochs, folder) for epochs in (1, 6))
            times.append((1e3 * (many - few) / (5 * STEPS)).tolist())
    return found


def alone(shards: int) -> str:
    """CPU time of a step of the first network in this process, and its peak of memory."""
    from npdrt.train import Config, loop, train

    times: list[float] = []
    step = loop.Trainer.advanced

    def timed(*args: Any) -> Any:
        start = time.process_time()
        done = step(*args)
        times.append(time.process_time() - start)
        return done

    loop.Trainer.advanced = timed  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        x = np.random.default_rng(0).standard_normal((BATCH * STEPS, 784)).astype("float32")
        np.savez(f"{folder}/x.npz", x=x, y=np.arange(len(x)) % 10)
        settings: dict[str, Any] = {"model_options": {"depth": 50, "width": 784}, "epochs": 3}
        settings |= {"checkpoint_every": 0, "trace_every": 0, "data": f"{folder}/x.npz"}
        train(Config(batch_size=BATCH, shards=shards, threads=1, **settings), Path(folder) / "run")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    ms = 1e3 * np.array(times[2:])  # the first two are recorded
    return (
        f"{shards} shards: CPU {np.median(ms):.0f} ms a step, least {ms.min():.0f}; peak {peak} MB"
    )


def row(network: str, found: dict[str, list[list[float]]]) -> list[str]:
    """A line of the table; ratios are medians over the turns, of times of one turn."""
    ms = np.array(list(found.values()))  # (ways, turns, 2)
    cells = [f"{wall:.0f} ({cpu:.0f})" for wall, cpu in np.median(ms, axis=1)]
    gains = np.median(ms[:2, :, 0] / ms[2, :, 0], axis=1)
    return [network, *cells, *(f"{gain:.2f}" for gain in gains)]


def main(words: list[str] | None = None) -> None:
    """Print the table."""
    options = report.parser(__doc__)
    options.add_argument("--turns", type=int, default=3)
    options.add_argument("--network", choices=NETWORKS, action="append")
    options.add_argument("--alone", type=int, metavar="SHARDS", help="CPU time of one process")
    given = options.parse_args(words)
    if given.alone:
        print(alone(given.alone))
        return
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for network in given.network or NETWORKS:
            results[network] = measure(network, given.turns, Path(folder))
    ways = [f"{way}, ms (CPU)" for way in WAYS]
    head = ["network", *ways, "2 threads / 2 ranks", "1 process / 2 ranks"]
    text = report.table(head, [row(name, found) for name, found in results.items()])
    print(text)
    if given.output:
        Path(f"{given.output}.md").write_text(text + "\n", encoding="utf-8")
        Path(f"{given.output}.json").write_text(json.dumps(results) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
