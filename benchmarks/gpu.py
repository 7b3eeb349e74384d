"""Time of one training step on a GPU: npdrt beside PyTorch, each in two ways, in one run.

Perceptrons of width 784 on a batch of 250, ResNet-18 on 128 images of CIFAR's sizes, and the
WikiText-2 transformer with dropout, in float32, all from the same weights, which lie on the device
with the batch. npdrt runs the step of `npdrt train`, call by call and as one CUDA graph; PyTorch
runs eagerly, and with loss and update under torch.compile(mode="reduce-overhead").

The ways take turns. A turn asks for 10 steps and then waits for the device, so that the time of a
step is the longer of the host's and the device's; the table has the medians in milliseconds. TF32
is off unless --precision tf32 asks for it, in both libraries. What fails is left out and says why.
Without a GPU the exit code is 4.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from gpu_networks import RATES, Network, language_model, perceptron, resnet18, torch_update
from report import parser, table

from npdrt import arrays, cublas, cudnn, record
from npdrt.errors import Error, Unavailable
from npdrt.random import Random
from npdrt.train.bench import take_turns

BURST = 10  # steps of a turn
CAPTURED = 4  # steps after which a program is a graph, and PyTorch has compiled
Step = Callable[[], Any]  # one training step; the loss before it, on the device


# --- ways to run a step -------------------------------------------------------------------------


def with_npdrt(network: Network, *, graph: bool) -> tuple[Step, Any]:
    """A step that goes on from the last, and its program if it is recorded."""
    function, (state, *batch, lr) = network.step()
    random, count = Random(0, "train"), 0
    program = record(function, state, *batch, lr, random) if graph else None

    def step() -> Any:
        nonlocal state, count
        done = (program or function)(state, *batch, lr, random.at(count))
        state, count = done.state, count + 1
        return done.loss

    return step, program


def with_torch(network: Network, *, compiled: bool) -> tuple[Step, None]:
    """The same in PyTorch."""
    import torch

    if not torch.cuda.is_available():
        raise Unavailable("this PyTorch has no CUDA device")
    weights, loss_fn = network.in_torch(torch)
    update = torch_update(torch, weights, network)
    if compiled:
        loss_fn = torch.compile(loss_fn, mode="reduce-overhead")
        update = torch.compile(update)

    def step() -> Any:
        if compiled:
            torch.compiler.cudagraph_mark_step_begin()
        for w in weights:
            w.grad = None
        loss = loss_fn()
        loss.backward()
        update()
        return loss.detach().clone()

    return step, None


WAYS: dict[str, Callable[[Network], tuple[Step, Any]]] = {
    "npdrt eager": partial(with_npdrt, graph=False),
    "npdrt graph": partial(with_npdrt, graph=True),
    "PyTorch eager": partial(with_torch, compiled=False),
    "PyTorch compiled": partial(with_torch, compiled=True),
}


@contextmanager
def in_precision(name: str) -> Iterator[None]:
    """Both libraries' products are of that precision."""
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
        torch.backends.cudnn.allow_tf32 = name == "tf32"
    with cublas.precision(name):
        yield


# --- measuring ----------------------------------------------------------------------------------


def burst(step: Step, device: arrays.Device) -> None:
    """The steps of a turn, and their end on the device."""
    for _ in range(BURST):
        step()
    arrays.wait(device)


def host_microseconds(step: Step, device: arrays.Device) -> float:
    """The time that the host takes to ask for a step."""
    arrays.wait(device)
    start = time.perf_counter()
    for _ in range(BURST):
        step()
    spent = time.perf_counter() - start
    arrays.wait(device)
    return 1e6 * spent / BURST


def measure(network: Network, turns: int) -> dict[str, Any]:
    """Milliseconds of a step in every turn, the host's microseconds and the last loss, by way; and
    the graph of npdrt's step: whether there is one, why not, its nodes, its array calls."""
    device, left_out, steps = arrays.device("cuda"), {}, {}
    found: dict[str, Any] = {"network": network.name, "rule": network.rule}
    for name, make in WAYS.items():
        try:
            step, program = make(network)
            for _ in range(CAPTURED):
                step()
        except Exception as error:  # a way that fails must not end the run
            left_out[name] = f"{type(error).__name__}: {error}"
            print(f"{network.name}, {name}: left out: {error}", file=sys.stderr)
            continue
        steps[name] = step
        if program is not None:
            why = program.graph_error
            found["graph"] = program.graph
            found["graph_error"] = None if why is None else f"{type(why).__name__}: {why}"
            found["nodes"], found["calls"] = program.nodes, len(program.calls)
    runs = {name: partial(burst, step, device) for name, step in steps.items()}
    seconds = take_turns(runs, turns, warm_up=1) if runs else {}
    found["ms"] = {name: [1e3 * s / BURST for s in taken] for name, taken in seconds.items()}
    found["host_us"] = {name: host_microseconds(step, device) for name, step in steps.items()}
    found["loss"] = {name: float(step()) for name, step in steps.items()}
    return found | {"left_out": left_out}


def networks(given: Any) -> Iterator[Network]:
    """Those of the command line, one after another: each is released before the next."""
    if "perceptron" in given.networks:
        for depth in given.depths:
            for rule in given.rules:
                yield perceptron(depth, rule)
    if "resnet18" in given.networks:
        yield resnet18()
    if "transformer" in given.networks:
        yield language_model()


# --- the report ---------------------------------------------------------------------------------


def machine(given: Any) -> dict[str, Any]:
    """What the times depend on."""
    torch = sys.modules.get("torch")
    found = {"gpu": arrays.describe_gpus()[0], "software": arrays.gpu_software()}
    chosen = {"precision": given.precision, "convolutions": given.convolutions}
    return {**found, "torch": torch and torch.__version__, **chosen}


def text_of(results: list[dict[str, Any]], about: dict[str, Any]) -> str:
    """The results as Markdown."""
    software = ", ".join(f"{name} {version}" for name, version in about["software"].items())
    torch = f"; PyTorch {about['torch']}" if about["torch"] else ""
    line = f"{about['gpu']['name']}; {software}{torch}; precision {about['precision']}"
    line += f"; convolutions by {about['convolutions']}"
    head = ["network", "rule", *WAYS, "graph / compiled", "nodes", "host us, graph"]
    notes = [
        f"{r['network']}: no graph: {r['graph_error']}" for r in results if r.get("graph_error")
    ]
    notes += [
        f"{r['network']}, {way}: {why}" for r in results for way, why in r["left_out"].items()
    ]
    return "\n\n".join([line, table(head, map(_row, results)), *notes])


def _row(r: dict[str, Any]) -> list[str]:
    ms = {name: statistics.median(times) for name, times in r["ms"].items()}
    graph, compiled = ms.get("npdrt graph"), ms.get("PyTorch compiled")
    ratio = f"{graph / compiled:.2f}" if graph and compiled else ""
    host = r["host_us"].get("npdrt graph")
    cells = [f"{ms[name]:.2f}" if name in ms else "" for name in WAYS]
    nodes = "" if r.get("nodes") is None else str(r["nodes"])
    return [r["network"], r["rule"], *cells, ratio, nodes, "" if host is None else f"{host:.0f}"]


def main(words: list[str] | None = None) -> None:
    """Run the networks; the files are written anew after each."""
    options = parser(__doc__)
    every = ["perceptron", "resnet18", "transformer"]
    options.add_argument("--networks", nargs="+", choices=every, default=every)
    options.add_argument("--depths", type=int, nargs="+", default=[2, 16, 50, 200])
    options.add_argument("--rules", nargs="+", choices=list(RATES), default=["fromage"])
    options.add_argument("--turns", type=int, default=11, help="timed turns of 10 steps")
    options.add_argument("--precision", choices=cublas.PRECISIONS, default="ieee")
    options.add_argument("--convolutions", choices=cudnn.CONVOLUTIONS, default="npdrt")
    given = options.parse_args(words)
    try:
        arrays.device("cuda")
    except Error as error:
        print(f"this benchmark needs a GPU: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    results: list[dict[str, Any]] = []
    for network in networks(given):
        with in_precision(given.precision), cudnn.convolutions(given.convolutions):
            results.append(measure(network, given.turns))
        about = machine(given)
        text = text_of(results, about)
        if given.output:
            found = json.dumps({"machine": about, "results": results}, indent=1)
            Path(f"{given.output}.md").write_text(text + "\n", encoding="utf-8")
            Path(f"{given.output}.json").write_text(found + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
