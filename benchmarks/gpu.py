"""Time of one training step of the perceptron on a GPU: npdrt in three ways, beside PyTorch.

Forward, backward and update of an MLP of width 784 (784 inputs, 10 outputs, ReLU, no bias, softmax
cross-entropy) on one batch of 250 in float32, TF32 off, all from the same weights, which lie on
the device with the data. The medians of the steps in milliseconds, each from an event before it to
an event after it on an idle device, so that what the host takes to ask for the work counts. Exit
code 4 without a GPU.

Launches: a replay without graph makes so many calls; times the cost of one, measured by asking for
a kernel on one number, it is what the host spends on them. The graph is asked for once.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from npdrt import arrays, ops, optim, record, value_and_grad
from npdrt.errors import Error, Unavailable
from npdrt.models import MLP
from npdrt.random import Random

WIDTH, BATCH = 784, 250
# So small that rounding does not part the libraries in a few steps; sgd has momentum 0.9.
RATES = {"fromage": 1e-5, "sgd": 1e-5, "adam": 1e-7}
WARM_UP = 5  # untimed steps: compilation, and the capture in the third of a program
Step = Callable[[], Any]  # one training step; the loss before it, on the device


def start(depth: int) -> tuple[dict[str, Any], Any, Any]:
    """Weights and a batch, on the host."""
    params = MLP(depth=depth, width=WIDTH, inputs=WIDTH, outputs=10).init(seed=0)
    x = Random(0, "benchmark/x").normal((BATCH, WIDTH)).astype(np.float32)
    y = (Random(0, "benchmark/y").words(BATCH) % 10).astype(np.int64)
    return params, x, y


def npdrt_step(depth: int, rule: str) -> tuple[Any, list[Any]]:
    """The pure step, and its first arguments on the device."""
    model = MLP(depth=depth, width=WIDTH, inputs=WIDTH, outputs=10)
    momentum = {"momentum": 0.9} if rule == "sgd" else {}
    optimizer = optim.RULES[rule](lr=RATES[rule], **momentum)
    params, x, y = start(depth)
    params = {name: arrays.to_device(w, "cuda") for name, w in params.items()}

    def step(params: Any, state: Any, x: Any, y: Any) -> Any:
        loss_fn = value_and_grad(lambda p: ops.softmax_cross_entropy(model(p, x), y))
        loss, grads = loss_fn(params)
        params, state = optimizer.update(params, grads, state)
        return params, state, loss

    data = [arrays.to_device(a, "cuda") for a in (x, y)]
    return step, [params, optimizer.init(params), *data]


def repeated(function: Any, args: list[Any]) -> Step:
    """A step that goes on from the last."""
    state, data = args[:2], args[2:]

    def step() -> Any:
        state[0], state[1], loss = function(*state, *data)
        return loss

    return step


def eager(depth: int, rule: str) -> tuple[Step, Any]:
    """npdrt, every array call from Python."""
    return repeated(*npdrt_step(depth, rule)), None


def replayed(depth: int, rule: str, graph: bool) -> tuple[Step, Any]:
    """npdrt, the recorded program."""
    function, args = npdrt_step(depth, rule)
    program = record(function, *args)
    step = repeated(program, list(args))
    step()
    if not graph:
        program._bound.graph_error = Error("not wanted")
    return step, program


def torch_step(depth: int, rule: str, compiled: bool) -> tuple[Step, Any]:
    """PyTorch: its own SGD and fused Adam, Fromage by hand; compiled: the loss and the update."""
    import torch

    torch.set_float32_matmul_precision("highest")
    params, x, y = start(depth)
    weights = [torch.tensor(w, device="cuda", requires_grad=True) for w in params.values()]
    inputs, labels = torch.tensor(x, device="cuda"), torch.tensor(y, device="cuda")
    update = torch_update(torch, weights, rule)

    def loss_fn() -> Any:
        h = inputs
        for w in weights:
            z = torch.nn.functional.linear(h, w)
            h = torch.relu(z)
        return torch.nn.functional.cross_entropy(z, labels)

    if compiled:
        loss_fn, update = torch.compile(loss_fn, mode="reduce-overhead"), torch.compile(update)

    def step() -> Any:
        if compiled:
            torch.compiler.cudagraph_mark_step_begin()
        for w in weights:
            w.grad = None
        loss = loss_fn()
        loss.backward()
        update()
        return loss.detach()

    return step, None


def torch_update(torch: Any, weights: list[Any], rule: str) -> Any:
    """The update of all weights."""
    lr = RATES[rule]
    if rule == "sgd":
        return torch.optim.SGD(weights, lr=lr, momentum=0.9).step
    if rule == "adam":
        return torch.optim.Adam(weights, lr=lr, fused=True).step

    @torch.no_grad()
    def fromage() -> None:
        for w in weights:
            w.sub_(w.grad * (lr * w.norm() / w.grad.norm())).div_(math.sqrt(1 + lr * lr))

    return fromage


WAYS: dict[str, Callable[[int, str], tuple[Step, Any]]] = {
    "npdrt eager": eager,
    "npdrt replay": lambda depth, rule: replayed(depth, rule, graph=False),
    "npdrt graph": lambda depth, rule: replayed(depth, rule, graph=True),
    "PyTorch eager": lambda depth, rule: torch_step(depth, rule, compiled=False),
    "PyTorch compiled": lambda depth, rule: torch_step(depth, rule, compiled=True),
}


class CupyClock:
    """Milliseconds of a step on CuPy's current stream."""

    def __init__(self, cupy: Any):
        self.cuda = cupy.cuda

    def __call__(self, step: Step) -> float:
        """One step."""
        self.cuda.Device().synchronize()
        before, after = self.cuda.Event(), self.cuda.Event()
        before.record()
        step()
        after.record()
        after.synchronize()
        return float(self.cuda.get_elapsed_time(before, after))


class TorchClock:
    """Milliseconds of a step on PyTorch's current stream."""

    def __call__(self, step: Step) -> float:
        """One step."""
        import torch

        torch.cuda.synchronize()
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        step()
        after.record()
        after.synchronize()
        return float(before.elapsed_time(after))


def host_microseconds(cupy: Any, work: Callable[[], Any], times: int) -> float:
    """What one call costs the host, the device being left to itself."""
    cupy.cuda.Device().synchronize()
    begun = time.perf_counter()
    for _ in range(times):
        work()
    spent = time.perf_counter() - begun
    cupy.cuda.Device().synchronize()
    return 1e6 * spent / times


def launches(cupy: Any, program: Any) -> dict[str, Any]:
    """What the host spends to ask for a replay, with the graph and without."""
    one, binding = cupy.zeros(()), program._bound
    cost = host_microseconds(cupy, lambda: cupy.add(one, 1.0, out=one), 1000)
    found = {"launches": binding.launches, "us_a_launch": cost}
    found["us_without_graph"] = binding.launches * cost
    if binding.graph is not None:
        stream = cupy.cuda.get_current_stream()
        found["us_graph"] = host_microseconds(cupy, lambda: binding.graph.launch(stream), 10)
    return found


def measure(cupy: Any, depth: int, rule: str, steps: int) -> dict[str, Any]:
    """Milliseconds of every step, the last loss, and the launches, by way."""
    found: dict[str, Any] = {"depth": depth, "rule": rule, "ms": {}, "loss": {}, "left_out": {}}
    for name, make in WAYS.items():
        clock: Any = TorchClock() if name.startswith("PyTorch") else CupyClock(cupy)
        try:
            step, program = make(depth, rule)
            for _ in range(WARM_UP):
                loss = step()
            found["ms"][name] = [clock(step) for _ in range(steps)]
            found["loss"][name] = float(loss)
        except Exception as error:  # a peer that is missing or fails must not end the run
            found["left_out"][name] = f"{type(error).__name__}: {error}"
            print(f"{name}, {rule}: left out: {error}", file=sys.stderr)
            continue
        if name == "npdrt graph":
            why = program._bound.graph_error
            found["graph_error"] = None if why is None else f"{type(why).__name__}: {why}"
            found["host"] = launches(cupy, program)
        del step, program
    return found


def table(results: list[dict[str, Any]], about: dict[str, Any]) -> str:
    """The results as Markdown."""
    packages = ", ".join(f"{name} {version}" for name, version in about["packages"].items())
    lines = [f"{about['device']['name']}; {packages}; {about['compute_type']}", ""]
    lines += [f"| L | rule | {' | '.join(WAYS)} |", "|---" * (len(WAYS) + 2) + "|"]
    for r in results:
        ms = {name: statistics.median(times) for name, times in r["ms"].items()}
        cells = [f"{ms[name]:.2f}" if name in ms else "" for name in WAYS]
        lines.append(f"| {r['depth']} | {r['rule']} | {' | '.join(cells)} |")
    lines += [
        "",
        "| L | rule | calls | us a call | us without graph | us the graph |",
        "|---" * 6 + "|",
    ]
    for r in results:
        host = r.get("host", {})
        names = ("launches", "us_a_launch", "us_without_graph", "us_graph")
        cells = [f"{host[name]:.4g}" if name in host else "" for name in names]
        lines.append(f"| {r['depth']} | {r['rule']} | {' | '.join(cells)} |")
    lines += [
        f"\n{r['rule']}: no graph: {r['graph_error']}" for r in results if r.get("graph_error")
    ]
    return "\n".join(lines)


def machine(cupy: Any) -> dict[str, Any]:
    """What the times depend on."""
    packages = {"numpy": np.__version__, "cupy": cupy.__version__}
    if "torch" in sys.modules:
        packages["torch"] = sys.modules["torch"].__version__
    return {
        "device": arrays.describe_gpus()[cupy.cuda.Device().id],
        "packages": packages,
        "compute_type": "CUBLAS_COMPUTE_32F",
    }


def main() -> None:
    """Run the grid."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--depths", type=int, nargs="+", default=[50])
    parser.add_argument("--rules", nargs="+", choices=list(RATES), default=list(RATES))
    parser.add_argument("--steps", type=int, default=20, help="timed steps, at least 10")
    parser.add_argument("--output", type=Path, default=Path("gpu"), help="PREFIX.md, PREFIX.json")
    given = parser.parse_args()
    try:
        cupy = arrays._import_cupy()
    except Unavailable as error:
        print(f"this benchmark needs a GPU: {error}", file=sys.stderr)
        sys.exit(4)
    steps = max(10, given.steps)
    results = [measure(cupy, depth, rule, steps) for depth in given.depths for rule in given.rules]
    about = machine(cupy)
    text = table(results, about)
    print(text)
    given.output.with_suffix(".md").write_text(text + "\n")
    found = json.dumps({"machine": about, "results": results}, indent=1)
    given.output.with_suffix(".json").write_text(found + "\n")


if __name__ == "__main__":
    main()
