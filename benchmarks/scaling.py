"""What a step in shards costs on many ranks: measured on one and two, computed for up to 1,024.

A rank computes its shards, sends what other ranks add, adds its share of the elements, sends the
sum, and makes the whole update:

    seconds = shards of a rank * shard + update + bytes / bandwidth + messages * latency + sums

The shard and the update are measured here, as CPU time of one process, and with mpi4py an exchange
of two ranks; --latency and --bandwidth are those of the network. docs/scaling.md explains the
tables. --cost takes the place of the measurement; SUM is that of two arrays. --figure FILE draws
the efficiency.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import report

from npdrt import record
from npdrt.models import MLP
from npdrt.optim import fromage
from npdrt.program import Memory
from npdrt.random import Random
from npdrt.train.ranks import WINDOW, ranks
from npdrt.train.shards import ALONE, Sharded, roots, schedule, share
from npdrt.train.step import State, Task
from npdrt.train.studies.figure import Figure, Line, Panel
from npdrt.train.studies.render import save

RANKS = (1, 2, 3, 4, 8, 16, 64, 256, 1024)
BYTES = 4  # of an element, float32


@dataclass(frozen=True)
class Cost:
    """Seconds of one shard, of an update, and of adding one element of two arrays."""

    shard: float
    update: float
    addition: float


# --- the model ------------------------------------------------------------------------------


@cache
def kept(count: int, size: int) -> list[int]:
    """How many sums every rank has for the others: one if its shards are a subtree."""
    return [len(roots(share(r, size, count), count)) for r in range(size)]


def sent(elements: int, count: int, size: int) -> list[int]:
    """The bytes of gradients that every rank sends in a step: of each of its sums what others add,
    then its share of the total to all others."""
    own = [len(share(r, size, elements)) for r in range(size)]
    return [
        BYTES * (n * (elements - own[r]) + (size - 1) * own[r])
        for r, n in enumerate(kept(count, size))
    ]


def messages(elements: int, size: int) -> int:
    """The messages that a rank sends in a step: to each of the others, twice a window."""
    return 2 * (size - 1) * math.ceil(math.ceil(elements / size) / WINDOW)


def seconds(
    cost: Cost, elements: int, count: int, size: int, latency: float, bandwidth: float
) -> dict[str, float]:
    """The parts of a step of the slowest rank."""
    most = max(len(share(r, size, count)) for r in range(size))
    rest = sum(kept(count, size)) - 1 if size > 1 else 0  # additions of rows of elements / size
    return {
        "shards": most * cost.shard,
        "update": cost.update,
        "bytes": max(sent(elements, count, size)) / bandwidth,
        "latency": messages(elements, size) * latency,
        "sums": rest * elements / size * cost.addition,
    }


def halving(cost: Cost, elements: int, size: int, latency: float, bandwidth: float) -> float:
    """Seconds of a step of one shard a rank whose sum is an all-reduce by recursive halving and
    doubling: the fewest messages, and other bits for every number of ranks."""
    moved = elements * (1 - 1 / size)
    steps = 2 * math.ceil(math.log2(size))
    sums = moved * cost.addition + steps * latency + 2 * BYTES * moved / bandwidth
    return cost.shard + cost.update + sums


@cache
def waiting(count: int, size: int) -> int:
    """The most sums that a rank has in memory."""
    shares = (share(r, size, count) for r in range(size))
    return 1 + max(level for mine in shares for _, level, _ in schedule(mine, count))


def memory(elements: int, count: int, size: int, slots: int, *, sharded: bool = False) -> float:
    """Bytes of a rank for parameters, sums and optimizer state, slots of it a parameter. sharded:
    each rank keeps the state of its share alone."""
    state = slots / (size if sharded else 1)
    return BYTES * elements * (1 + waiting(count, size) + state)


# --- what is measured -------------------------------------------------------------------------


def measured(model: MLP, batch: int, turns: int) -> Cost:
    """CPU seconds of one process that computes eight shards, medians."""
    task, rule, rng = Task(model, model.outputs), fromage(lr=0.01), np.random.default_rng(0)
    x = rng.standard_normal((8 * batch, model.inputs)).astype("float32")
    y, memory = rng.integers(0, model.outputs, len(x)), Memory()
    times: dict[str, list[float]] = {"_part": [], "_update": []}

    def recorded(function: Any, args: tuple[Any, ...]) -> Any:
        program = record(function, *args, memory=memory)
        memory.adopt({"state": args[0]})
        return timed(program, times[function.func.__name__])

    step, params = Sharded(task, rule, 8, ALONE, recorded), model.init(seed=0)
    state = State(params, {}, rule.init(params))
    del params
    for number in range(turns + 1):
        state = step(state, x, y, 0.01, Random(0, "train", number), traced=False).state
    a, b = np.ones((2, WINDOW), "float32")
    additions: list[float] = []
    add = timed(np.add, additions)
    for _ in range(100):
        add(a, b, a)
    shard, update = (
        statistics.median(found[len(found) // (turns + 1) :]) for found in times.values()
    )
    return Cost(shard, update, statistics.median(additions) / WINDOW)


def timed(function: Any, times: list[float]) -> Any:
    """A function whose CPU seconds are kept."""

    def call(*args: Any) -> Any:
        start = time.process_time()
        try:
            return function(*args)
        finally:
            times.append(time.process_time() - start)

    return call


def exchange(elements: int, turns: int) -> float:
    """Under mpiexec: the shortest time of an exchange, seconds."""
    team, like, times = ranks(), {"w": np.ones(elements, "float32")}, []
    for _ in range(turns + 1):
        sums = {team.rank: {"w": np.ones(elements, "float32")}}
        start = time.perf_counter()
        team.summed(sums, team.size, like)
        times.append(time.perf_counter() - start)
    return min(times)


def two_ranks(elements: int, turns: int) -> float | None:
    """The shortest exchange of two ranks on this machine; None without mpi4py."""
    launcher = next(filter(None, map(shutil.which, ("mpiexec.hydra", "mpiexec"))), None)
    if launcher is None or importlib.util.find_spec("mpi4py") is None:
        return None
    words = [launcher, "-n", "2", sys.executable, __file__, "--exchange", str(elements)]
    done = subprocess.run(
        [*words, "--turns", str(turns)], check=True, capture_output=True, text=True
    )
    return float(done.stdout.split()[0])


# --- the tables -------------------------------------------------------------------------------


def scaling(cost: Cost, elements: int, latency: float, bandwidth: float) -> list[list[str]]:
    """A line for every number of ranks, with one shard each."""
    rows, alone = [], cost.shard + cost.update
    for size in RANKS:
        parts = seconds(cost, elements, size, size, latency, bandwidth)
        whole, other = sum(parts.values()), halving(cost, elements, size, latency, bandwidth)
        bytes_sent = max(sent(elements, size, size))
        times = [1e3 * x for x in (parts["bytes"], parts["latency"], parts["sums"], whole)]
        held = [memory(elements, size, size, 2, sharded=s) for s in (False, True)]
        rows.append([
            str(size), f"{bytes_sent / 1e6:.0f}", str(messages(elements, size)),
            *(f"{x:.1f}" for x in times), f"{alone / whole:.2f}", f"{alone / other:.2f}",
            *(f"{x / 1e6:.0f}" for x in held),
        ])  # fmt: skip
    return rows


def layouts(elements: int) -> list[list[str]]:
    """Eight shards on some ranks: what the busiest rank computes, sends and keeps."""
    rows = []
    for size in (1, 2, 3, 4, 5, 8):
        most = max(len(share(r, size, 8)) for r in range(size))
        ring = 2 * BYTES * elements * (1 - 1 / size)
        found = most, max(kept(8, size)), ring / 1e6, max(sent(elements, 8, size)) / 1e6
        rows.append([str(size), *(f"{x:.0f}" for x in found), str(waiting(8, size))])
    return rows


def first_costly(cost: Cost, elements: int, latency: float, bandwidth: float) -> int:
    """The smallest power of two of ranks at which the fixed tree costs a tenth of a step more than
    recursive halving."""
    size = 1
    while True:
        size *= 2
        other = halving(cost, elements, size, latency, bandwidth)
        if sum(seconds(cost, elements, size, size, latency, bandwidth).values()) > 1.1 * other:
            return size


def draw(cost: Cost, elements: int, networks: dict[str, tuple[float, float]], path: Path) -> None:
    """Efficiency by ranks, for some latencies and bandwidths."""
    sizes, lines = [2**k for k in range(11)], []
    alone = cost.shard + cost.update
    for number, (name, (latency, rate)) in enumerate(networks.items()):
        tree = [alone / sum(seconds(cost, elements, p, p, latency, rate).values()) for p in sizes]
        free = [alone / halving(cost, elements, p, latency, rate) for p in sizes]
        lines += [Line(f"tree, {name}", sizes, tree, "marked", group=number),
                  Line(f"halving, {name}", sizes, free, "dashed", group=number)]  # fmt: skip
    panel = Panel("one shard of 32 examples a rank", "ranks", "efficiency", tuple(lines), xlog=True)
    save(Figure("scaling", "", (panel,)), path)


SCALING = ["ranks", "MB sent", "messages", "bytes, ms", "latency, ms", "sums, ms", "step, ms",
           "efficiency", "by halving", "memory, MB", "state sharded, MB"]  # fmt: skip
LAYOUTS = ["ranks", "shards of a rank", "sums it sends", "ring, MB", "sent, MB", "sums in memory"]
NETWORKS = {"100 Gbit/s, 5 us": (5e-6, 12.5e9), "10 Gbit/s, 30 us": (30e-6, 1.25e9)}


def main(words: list[str] | None = None) -> None:
    """Print the tables."""
    options = report.parser(__doc__)
    options.add_argument("--latency", type=float, default=5e-6, help="seconds a message")
    options.add_argument("--bandwidth", type=float, default=12.5e9, help="bytes a second of a rank")
    words_of_cost = ("SHARD", "UPDATE", "SUM")
    options.add_argument("--cost", type=float, nargs=3, metavar=words_of_cost, help="seconds")
    options.add_argument("--width", type=int, default=784)
    options.add_argument("--depth", type=int, default=50)
    options.add_argument("--turns", type=int, default=3)
    options.add_argument("--figure", type=Path)
    options.add_argument("--exchange", type=int, help=argparse.SUPPRESS)
    given = options.parse_args(words)
    if given.exchange:
        taken = exchange(given.exchange, given.turns)
        if not ranks().rank:
            print(taken)
        return
    model = MLP(depth=given.depth, width=given.width, inputs=given.width, outputs=10)
    elements = (given.depth - 1) * given.width**2 + 10 * given.width
    network, both = (given.latency, given.bandwidth), None
    if given.cost:
        cost = Cost(*given.cost[:2], given.cost[2] / elements)
    else:
        cost, both = measured(model, 32, given.turns), two_ranks(elements, given.turns)
    lines = [
        f"{elements:,} elements; a shard {1e3 * cost.shard:.0f} ms, an update "
        f"{1e3 * cost.update:.0f} ms, a sum of two arrays {1e3 * cost.addition * elements:.1f} ms",
        f"an exchange of two ranks here: {1e3 * both:.0f} ms" if both else "no exchange measured",
        report.table(SCALING, scaling(cost, elements, *network)),
        f"a tenth more than by halving from {first_costly(cost, elements, *network)} ranks on",
        report.table(LAYOUTS, layouts(elements)),
    ]
    text = "\n\n".join(lines)
    print(text)
    if given.output:
        Path(f"{given.output}.md").write_text(text + "\n", encoding="utf-8")
    if given.figure:
        draw(cost, elements, NETWORKS, given.figure)


if __name__ == "__main__":
    main()
