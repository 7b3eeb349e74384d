"""Portable arithmetic: what it costs, how accurate its products are, and whether its bits are the
same everywhere.

    python benchmarks/portable.py cost [NAMES] [--turns N]
    python benchmarks/portable.py accuracy [--cases N]
    python benchmarks/portable.py bits [NAMES]

cost: CPU seconds of a replayed step in portable over one in fast arithmetic, with one BLAS thread;
the two take turns, and the ratio is the median of the turns' ratios. accuracy: the largest error
of products over the bound of docs/portable.md, against correctly rounded sums (`math.fsum`). bits:
short training runs in processes of their own, with other kernels of OpenBLAS, numbers of threads
and SIMD levels; eager, compiled, and stopped and resumed. Each must give the same parameters,
optimizer state, buffers and losses. Exit code 1 if not.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from step import machine

import npdrt
from npdrt import exact, optim
from npdrt.models import MLP, MODELS
from npdrt.program import Memory
from npdrt.random import Random
from npdrt.slices import bits_of
from npdrt.train import Config, resume, train
from npdrt.train.step import State, Task, make_step

# --- cost -----------------------------------------------------------------------------------------


def steps() -> dict[str, Callable[[], tuple[Any, Any, Any, int, str]]]:
    """Model, batch, number of classes and rule of every step that is timed."""
    rng = np.random.default_rng(0)

    def rows(n: int, width: int) -> Any:
        return rng.normal(size=(n, width)).astype(np.float32), rng.integers(0, 10, n)

    def perceptron(width: int, batch: int, phi: str) -> Any:
        return (MLP(50, width, width, 10, nonlinearity=phi), *rows(batch, width), 10, "fromage")

    def resnet() -> Any:
        images = rng.normal(size=(16, 3, 32, 32)).astype(np.float32)
        return MODELS["resnet18"](outputs=10), images, rng.integers(0, 10, 16), 10, "fromage"

    def transformer() -> Any:
        words = rng.integers(0, 33_278, (2, 35, 20))
        return MODELS["transformer"](vocabulary=33_278), words[0], words[1], 33_278, "sgd"

    return {
        "perceptron L=50, width 784, batch 250, relu": lambda: perceptron(784, 250, "relu"),
        "perceptron L=50, width 784, batch 250, tanh": lambda: perceptron(784, 250, "tanh"),
        "perceptron L=50, width 128, batch 32, tanh": lambda: perceptron(128, 32, "tanh"),
        "ResNet-18, batch 16": resnet,
        "transformer, 20 streams of 35 words": transformer,
    }


def timed(model: Any, x: Any, y: Any, classes: int, rule: str) -> Callable[[str], float]:
    """The CPU seconds of one replayed step in an arithmetic."""
    optimizer = getattr(optim, rule)(lr=1e-4)
    step, random = make_step(Task(model, classes), optimizer), Random(0, "benchmark")
    states, programs = {}, {}
    for name in npdrt.compute.ARITHMETICS:
        params = model.init(seed=0)
        buffers = model.buffers(seed=0) if hasattr(model, "buffers") else {}
        states[name] = State(params, buffers, optimizer.init(params))
        with npdrt.arithmetic(name):
            programs[name] = npdrt.record(step, states[name], x, y, 1e-4, random, memory=Memory())

    def run(name: str) -> float:
        start = time.process_time()
        states[name] = programs[name](states[name], x, y, 1e-4, random).state
        return time.process_time() - start

    return run


def cost(names: list[str], turns: int) -> None:
    print(machine(), "\n\n| step | fast, s | portable, s | ratio |\n|---|---|---|---|")
    for name, make in chosen(steps(), names):
        run = timed(*make())
        pairs = [(run("fast"), run("portable")) for _ in range(turns + 1)][1:]
        fast, portable = (statistics.median(column) for column in zip(*pairs, strict=True))
        ratio = statistics.median(b / a for a, b in pairs)
        print(f"| {name} | {fast:.4g} | {portable:.4g} | {ratio:.1f} |", flush=True)


def chosen(table: dict[str, Any], names: list[str]) -> Iterator[tuple[str, Any]]:
    """The entries whose names contain one of `names`; all without."""
    for name, entry in table.items():
        if not names or any(part in name for part in names):
            yield name, entry


# --- accuracy -------------------------------------------------------------------------------------


def operands(kind: str, rng: Any, count: int, k: int) -> tuple[Any, Any]:
    """`count` rows and as many columns, (count, 1, K) and (count, K, 1)."""
    a, b = rng.normal(size=(2, count, k))
    if kind == "rows of a huge range":
        a, b = (x * 10.0 ** rng.integers(-19, 19, x.shape) for x in (a, b))
    if kind == "cancellation":
        b[:, k // 2 :] = -b[:, : k - k // 2] * (1 + 1e-6 * rng.normal(size=(count, k - k // 2)))
        a[:, k // 2 :] = a[:, : k - k // 2]
    if kind == "subnormal":
        a *= 10.0 ** rng.integers(-46, -30, (count, 1))
        b *= 10.0 ** rng.integers(-10, 5, (count, 1))
    if kind == "ends of slices":
        t = bits_of(k)
        ends = np.array([2.0 - 2.0**-23, 1.0, 1.0 + 2.0**-t, 2.0 - 2.0**-t, 1.5 + 2.0 ** (1 - t)])
        a, b = (rng.choice(ends, size=(count, k)) * rng.choice([-1, 1], (count, k)) for _ in "ab")
    a, b = (x.astype(np.float32) for x in (a, b))
    return a[:, None, :], b[:, :, None]


KINDS = ("normal", "rows of a huge range", "cancellation", "subnormal", "ends of slices")


def exponent(x: Any, axis: int) -> Any:
    """e with |x| < 2**e, of each line."""
    return np.frexp(np.abs(x).max(axis).astype(np.float64))[1].reshape(-1)


def errors(kind: str, rng: Any, count: int, k: int) -> tuple[float, float]:
    """The largest error over its bound, and over an ulp of |a| |b|."""
    a, b = operands(kind, rng, count, k)
    found = exact.matmul(a, b).reshape(-1).astype(np.float64)
    terms = (a[:, 0, :].astype(np.float64) * b[:, :, 0]).tolist()  # exact
    true = np.array([math.fsum(row) for row in terms])
    sizes = np.array([math.fsum(map(abs, row)) for row in terms])
    t = bits_of(k)
    largest = np.ldexp(1.25 * k, exponent(a, 2) + exponent(b, 1) - 2 * t) * (1 + 2.0 ** (2 - t))
    half = 0.5 * np.spacing(np.abs(true).astype(np.float32)).astype(np.float64)
    rounding = 3 * 2.0**-53 * 1.01 * np.ldexp(float(k), exponent(a, 2) + exponent(b, 1))
    bound = largest + half * (1 + 1e-9) + rounding + 2.0**-150
    off = np.abs(found - true)
    ulps = off / np.maximum(np.spacing(sizes.astype(np.float32)).astype(np.float64), 2.0**-149)
    return float((off / bound).max()), float(ulps.max())


def accuracy(cases: int) -> int:
    print("| operands | K | cases | largest error / bound | ulps of abs(a) abs(b) |")
    print("|---|---|---|---|---|")
    rng, worst, lengths = np.random.default_rng(0), 0.0, (1, 3, 8, 33, 100)
    each = cases // (len(KINDS) * len(lengths))
    for kind in KINDS:
        for k in lengths:
            parts = [errors(kind, rng, min(each, 10_000), k) for _ in range(-(-each // 10_000))]
            share, ulps = (max(column) for column in zip(*parts, strict=True))
            worst = max(worst, share)
            done = len(parts) * min(each, 10_000)
            print(f"| {kind} | {k} | {done:,} | {share:.3f} | {ulps:.3g} |", flush=True)
    return int(worst > 1)


# --- bits -----------------------------------------------------------------------------------------

TEXT = "npdrt trains the same network to the same bits on every machine that adds as IEEE 754 says"


def runs(folder: Path) -> dict[str, Config]:
    """The training runs."""
    text = folder / "text"
    text.mkdir(exist_ok=True)
    for name, seed in (("train", 0), ("valid", 1), ("test", 2)):
        order = np.random.default_rng(seed).integers(0, len(TEXT.split()), 600)
        (text / f"{name}.txt").write_text(" ".join(TEXT.split()[i] for i in order) + "\n")
    deep = {"depth": 50, "width": 32, "nonlinearity": "tanh", "init": "xavier"}
    spectral = {"depth": 4, "width": 32, "normalisation": "spectral", "init": "orthogonal"}
    language = {"width": 16, "heads": 2, "hidden": 24}
    words: dict[str, Any] = {"model": "transformer", "data": f"text:{text}", "batch_size": 4,
                             "lr": 0.1, "optimizer": "adam"}  # fmt: skip
    digits: dict[str, Any] = {"batch_size": 250}
    made = {
        "perceptron, fromage": {**digits, "model_options": deep},
        "perceptron, adam": {**digits, "model_options": deep, "optimizer": "adam"},
        "resnet18": {**digits, "model": "resnet18", "model_options": {"width": 4}, "epochs": 1},
        "transformer": {**words, "model_options": {**language, "dropout": 0.0}},
        "dropout": {**words, "model_options": {**language, "dropout": 0.2}},
        "spectral": {**digits, "model_options": spectral},
    }
    return {
        name: Config(**({"epochs": 2, "arithmetic": "portable", "trace_every": 0} | settings))
        for name, settings in made.items()
    }


def digest(out: Path, losses: tuple[Any, ...]) -> str:
    """Of everything in a run's checkpoint but how it was made, and of its last losses."""
    checkpoint = npdrt.load(out / "checkpoint.h5")
    found = hashlib.sha256(repr(losses).encode())
    for part in (checkpoint.params, checkpoint.state, checkpoint.buffers):
        for name in sorted(part):
            found.update(name.encode() + np.asarray(part[name]).tobytes())
    return found.hexdigest()[:16]


def child(way: str, names: list[str]) -> None:
    """Print the digest of every run, made in that way."""
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, config) in enumerate(chosen(runs(Path(folder)), names)):
            out = Path(folder) / str(number)
            stops = iter([0, 0, 15] if way == "resumed" else [])  # SIGTERM after the third step
            settings = {**vars(config), "eager": way == "eager", "fast": way == "compiled"}
            done = train(Config(**settings), out, stop=partial(next, stops, 0))
            if way == "resumed":
                done = resume(out, eager=True)
            print(json.dumps([name, digest(out, (done.train_loss, done.test_loss))]), flush=True)


def environments() -> dict[str, tuple[str, dict[str, str]]]:
    """Ways to run, and what to set for them."""
    umath: Any = np._core._multiarray_umath
    used = [name for name in umath.__cpu_dispatch__ if umath.__cpu_features__[name]]
    plain = {"OPENBLAS_NUM_THREADS": "1"}
    found = {
        f"{kernels}, {threads} threads": (
            "replayed", {"OPENBLAS_CORETYPE": kernels, "OPENBLAS_NUM_THREADS": str(threads)},
        )
        for kernels in ("Haswell", "SkylakeX", "Prescott", "Zen")
        for threads in (1, 2)
    }  # fmt: skip
    lowest = {**plain, "NPY_DISABLE_CPU_FEATURES": " ".join(used)}
    return {
        **found,
        "the lowest SIMD level": ("replayed", lowest),
        "eager": ("eager", plain),
        "compiled loops": ("compiled", plain),
        "stopped and resumed": ("resumed", plain),
    }


def bits(names: list[str]) -> int:
    print(machine(), flush=True)
    first: dict[str, str] = {}
    parted = 0
    for name, (way, setting) in environments().items():
        command = [sys.executable, __file__, "child", way, *names]
        done = subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, **setting}
        )
        if done.returncode:
            raise SystemExit(done.stderr)
        found = dict(map(json.loads, done.stdout.splitlines()))
        first = first or found
        odd = [run for run in found if found[run] != first[run]]
        parted += bool(odd)
        print(f"{name}: {', '.join(odd) + ' differ' if odd else 'equal'}", flush=True)
    for run, value in first.items():
        print(f"{run}: {value}")
    return int(parted > 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["cost", "accuracy", "bits", "child"])
    parser.add_argument("names", nargs="*")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--cases", type=int, default=1_000_000)
    given = parser.parse_args()
    if given.what == "child":
        child(given.names[0], given.names[1:])
    elif given.what == "cost":
        from threadpoolctl import threadpool_limits

        with threadpool_limits(1, user_api="blas"), np.errstate(all="ignore"):
            cost(given.names, given.turns)
    else:
        return accuracy(given.cases) if given.what == "accuracy" else bits(given.names)
    return 0


if __name__ == "__main__":
    sys.exit(main())
