"""Peak resident memory of a training run, beside other libraries; every run a process of its own.

10 steps (forward, backward, update) of an MLP of 50 layers and width 784 (784 inputs, 10 outputs,
ReLU, no bias, softmax cross-entropy) on a batch of 250 in float32, from the library's import to the
last step; each run makes its own weights and data. npdrt runs its training step as a program, with
the initial arrays given up to it as `npdrt train` does; as a program with compiled loops; and
eagerly. "npdrt train" is the whole trainer: 2,500 samples, checkpoints, trace, evaluation. PyTorch
is eager (its own SGD and Adam, Fromage by hand); JAX compiles the step with weights and slots
donated.

The peak is the one the system keeps: VmHWM of /proc/self/status under Linux, else `ru_maxrss`. It
counts the library's code as well, so what is resident after the imports is given in brackets; the
last column is npdrt's program over the smallest peer. The target is 0.65.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Only the standard library up here: a child imports what its run needs and nothing else.

RULES = ("fromage", "sgd", "adam")
RATES = {"fromage": 1e-4, "sgd": 1e-4, "adam": 1e-6}
TARGET = 0.65
Losses = list[float]
Run = Callable[[str, argparse.Namespace], Losses]


def peak() -> int:
    """The largest number of bytes of this process that were resident at once."""
    try:
        for row in Path("/proc/self/status").read_text().splitlines():
            if row.startswith("VmHWM:"):
                return 1024 * int(row.split()[1])
    except OSError:
        pass
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


def imported() -> None:
    """Note the peak after the imports."""
    print(json.dumps({"imports": peak()}))


# --- npdrt -------------------------------------------------------------------------------------


def npdrt_program(rule: str, sizes: argparse.Namespace, fast: bool = False) -> Losses:
    """The training step recorded, the first arrays given up to the program."""
    from npdrt import record
    from npdrt.program import Memory

    step, args = npdrt_step(rule, sizes)
    memory = Memory()
    program = record(step, *args, memory=memory, fast=fast)
    memory.adopt({"state": args[0]})
    return npdrt_run(program, args, sizes.steps)


def npdrt_fast(rule: str, sizes: argparse.Namespace) -> Losses:
    """That with compiled loops."""
    return npdrt_program(rule, sizes, fast=True)


def npdrt_eager(rule: str, sizes: argparse.Namespace) -> Losses:
    """The training step, one array call after another."""
    step, args = npdrt_step(rule, sizes)
    return npdrt_run(step, args, sizes.steps)


def npdrt_step(rule: str, sizes: argparse.Namespace) -> tuple[Any, list[Any]]:
    """The training step of `npdrt train` and its first arguments."""
    from npdrt import optim
    from npdrt.models import MLP
    from npdrt.random import Random
    from npdrt.train.bench import batch
    from npdrt.train.step import State, Task, make_step

    imported()
    model = MLP(depth=sizes.depth, width=sizes.width, inputs=sizes.width, outputs=10)
    momentum = {"momentum": 0.9} if rule == "sgd" else {}
    optimizer = optim.RULES[rule](lr=RATES[rule], **momentum)
    params = model.init(seed=0)
    state = State(params, {}, optimizer.init(params))
    x, y = batch(sizes.batch_size, sizes.width)
    step = make_step(Task(model, 10), optimizer)
    return step, [state, x, y, RATES[rule], Random(0, "train", 0)]


def npdrt_run(step: Any, args: list[Any], steps: int) -> Losses:
    """The losses of some steps; `args` is emptied, so that nobody else keeps the arrays."""
    state, *rest = args
    args.clear()
    losses = []
    for _ in range(steps):
        done = step(state, *rest)
        state = done.state
        losses.append(float(done.loss))
    return losses


def npdrt_train(rule: str, sizes: argparse.Namespace) -> Losses:
    """The whole trainer, as the command runs it."""
    import numpy as np

    from npdrt.train import Config, train
    from npdrt.train.bench import batch

    imported()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "data.npz"
        x, y = batch(sizes.batch_size * sizes.steps, sizes.width)
        y[:10] = range(10)
        np.savez(file, x=x, y=y)
        del x, y
        config = Config(
            model_options={"depth": sizes.depth, "width": sizes.width},
            data=str(file),
            standardise=False,
            optimizer=rule,
            optimizer_options={"momentum": 0.9} if rule == "sgd" else {},
            lr=RATES[rule],
            epochs=1,
            batch_size=sizes.batch_size,
        )
        summary = train(config, Path(folder) / "run")
    return [float(summary.train_loss or math.nan)]


# --- peers -------------------------------------------------------------------------------------


def first_weights(sizes: argparse.Namespace) -> list[Any]:
    """Weights as in npdrt's `he`, by NumPy's generator, each a float32 array."""
    import numpy as np

    draw = np.random.default_rng(0)
    shapes = [(sizes.width, sizes.width)] * (sizes.depth - 1) + [(10, sizes.width)]
    spread = np.float32(math.sqrt(2 / sizes.width))
    return [draw.standard_normal(shape, dtype=np.float32) * spread for shape in shapes]


def first_batch(sizes: argparse.Namespace) -> tuple[Any, Any]:
    """Random inputs and labels."""
    import numpy as np

    draw = np.random.default_rng(1)
    x = draw.standard_normal((sizes.batch_size, sizes.width), dtype=np.float32)
    return x, draw.integers(0, 10, sizes.batch_size)


def with_torch(rule: str, sizes: argparse.Namespace) -> Losses:
    """PyTorch, eager: its own SGD and Adam, Fromage by hand."""
    import torch

    imported()
    lr = RATES[rule]
    weights = [torch.from_numpy(w).requires_grad_() for w in first_weights(sizes)]
    x, y = map(torch.from_numpy, first_batch(sizes))

    @torch.no_grad()
    def fromage() -> None:
        for w in weights:
            w.sub_(w.grad * (lr * w.norm() / w.grad.norm())).div_(math.sqrt(1 + lr * lr))

    update: Any = fromage
    if rule == "sgd":
        update = torch.optim.SGD(weights, lr=lr, momentum=0.9).step
    elif rule == "adam":
        update = torch.optim.Adam(weights, lr=lr).step
    losses = []
    for _ in range(sizes.steps):
        h = x
        for w in weights:
            w.grad = None
            z = torch.nn.functional.linear(h, w)
            h = torch.relu(z)
        loss = torch.nn.functional.cross_entropy(z, y)
        loss.backward()
        update()
        losses.append(loss.item())
    return losses


def with_jax(rule: str, sizes: argparse.Namespace) -> Losses:
    """JAX: the whole step compiled, weights and slots donated."""
    import jax
    import jax.numpy as jnp

    imported()
    lr = RATES[rule]

    def loss_of(weights: Any, x: Any, y: Any) -> Any:
        h = x
        for w in weights:
            z = h @ w.T
            h = jax.nn.relu(z)
        picked = jnp.take_along_axis(jax.nn.log_softmax(z), y[:, None], axis=1)
        return -jnp.mean(picked)

    def updated(w: Any, g: Any, slots: Any, t: Any) -> Any:
        if rule == "fromage":
            s = lr * jnp.linalg.norm(w) / jnp.linalg.norm(g)
            return (w - s * g) / math.sqrt(1 + lr * lr), slots
        if rule == "sgd":
            v = 0.9 * slots[0] + g
            return w - lr * v, (v,)
        m, v = 0.9 * slots[0] + 0.1 * g, 0.999 * slots[1] + 0.001 * g * g
        return w - lr * m / (1 - 0.9**t) / (jnp.sqrt(v / (1 - 0.999**t)) + 1e-8), (m, v)

    def whole(weights: Any, slots: Any, t: Any, x: Any, y: Any) -> Any:
        loss, grads = jax.value_and_grad(loss_of)(weights, x, y)
        done = [updated(*a, t) for a in zip(weights, grads, slots, strict=True)]
        return loss, [w for w, _ in done], [s for _, s in done]

    weights = first_weights(sizes)
    for k, w in enumerate(weights):  # so that no array is there twice for long
        weights[k] = jnp.array(w)
    slots = [tuple(jnp.zeros_like(w) for _ in range(RULES.index(rule))) for w in weights]
    run, data, losses = jax.jit(whole, donate_argnums=(0, 1)), first_batch(sizes), []
    for t in range(1, sizes.steps + 1):
        loss, weights, slots = run(weights, slots, jnp.float32(t), *data)
        losses.append(float(loss))
    jax.block_until_ready(weights)
    return losses


RUNS: dict[str, Run] = {
    "npdrt program": npdrt_program,
    "npdrt fast": npdrt_fast,
    "npdrt eager": npdrt_eager,
    "npdrt train": npdrt_train,
    "PyTorch": with_torch,
    "JAX jit": with_jax,
}
PEERS = ("PyTorch", "JAX jit")


# --- parent and child --------------------------------------------------------------------------


def in_child(name: str, rule: str, sizes: argparse.Namespace) -> dict[str, Any] | None:
    """What a run in a new process comes to; None, with a word on stderr, where it fails."""
    options = [f"--{key.replace('_', '-')}={value}" for key, value in vars(sizes).items()]
    command = [sys.executable, __file__, f"--child={name}", f"--rules={rule}", *options]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        why = done.stderr.strip().splitlines()
        print(f"{rule}: {name} is left out: {why[-1:]}", file=sys.stderr)
        return None
    found: dict[str, Any] = {"run": name, "rule": rule}
    for row in done.stdout.splitlines():
        found |= json.loads(row)
    return found


def measure(
    rules: list[str], names: list[str], sizes: argparse.Namespace, repeats: int
) -> list[dict[str, Any]]:
    """Every run of every rule `repeats` times; `peak` is the median, `peaks` are all."""
    results = []
    for rule in rules:
        for name in names:
            tries = [in_child(name, rule, sizes) for _ in range(repeats)]
            found = [one for one in tries if one]
            if found:
                peaks = [one["peak"] for one in found]
                results.append(found[0] | {"peaks": peaks, "peak": statistics.median(peaks)})
    return results


def text_of(results: list[dict[str, Any]]) -> str:
    """The results as Markdown."""
    import report

    names = [name for name in RUNS if any(r["run"] == name for r in results)]
    rows = []
    for rule in dict.fromkeys(r["rule"] for r in results):
        mine = {r["run"]: r for r in results if r["rule"] == rule}
        shown = [f"{r['peak'] / 1e6:.0f} ({r['imports'] / 1e6:.0f})" for r in mine.values()]
        cells = dict(zip(mine, shown, strict=True))
        peers = [mine[name]["peak"] for name in PEERS if name in mine]
        both = peers and "npdrt program" in mine
        ratio = f"{mine['npdrt program']['peak'] / min(peers):.2f}" if both else ""
        rows.append([rule, *(cells.get(name, "") for name in names), ratio])
    return report.table(["rule", *names, f"program / best peer (target {TARGET})"], rows)


def main() -> None:
    """Measure everything; or be a child."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, metavar="PREFIX", help="write PREFIX.md, .json too")
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES))
    parser.add_argument("--runs", nargs="+", choices=list(RUNS), default=list(RUNS))
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--depth", type=int, default=50)
    parser.add_argument("--width", type=int, default=784)
    parser.add_argument("--batch-size", type=int, default=250)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--child", choices=list(RUNS), help=argparse.SUPPRESS)
    given = parser.parse_args()
    keys = ("depth", "width", "batch_size", "steps")
    sizes = argparse.Namespace(**{key: getattr(given, key) for key in keys})
    if given.child:
        losses = RUNS[given.child](given.rules[0], sizes)
        print(json.dumps({"peak": peak(), "losses": losses}))
        return
    results = measure(given.rules, given.runs, sizes, given.repeats)
    import report
    from step import machine

    report.publish(text_of(results), machine(), results, given.output)


if __name__ == "__main__":
    main()
