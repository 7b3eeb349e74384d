"""Time of one training step of the perceptron, beside other libraries in the same run.

Forward, backward and update of an MLP of width 784 (784 inputs, 10 outputs, ReLU, no bias,
softmax cross-entropy) on one batch of 250 in float32, all from the same weights. The libraries
take turns, one step each, and start every round with another of them; the table has the median
of the steps in milliseconds. npdrt runs its step three ways, to the same bits: eager, replayed
from its program ("replay") and replayed with compiled loops ("fast"); a second table has the time
of these over the time of every other library. The losses at the end are compared, so that all
have done the same work.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from npdrt import Unavailable, ops, optim, record, value_and_grad
from npdrt.models import MLP
from npdrt.random import Random
from npdrt.train import provenance

WIDTH, BATCH = 784, 250
# So small that rounding does not part the libraries in a few steps; sgd has momentum 0.9.
RATES = {"fromage": 1e-5, "sgd": 1e-5, "adam": 1e-7}
PACKAGES = ("npdrt", "numpy", "numba", "torch", "jax", "jaxlib", "autograd")
Step = Callable[[], float]  # one training step; the loss before it


def updated(xp: Any, rule: str, w: Any, g: Any, slots: Any, t: Any) -> tuple[Any, Any]:
    """One rule on one array, as one would write it by hand; t counts from 1."""
    lr = RATES[rule]
    if rule == "fromage":
        s = lr * xp.linalg.norm(w) / xp.linalg.norm(g)
        return (w - s * g) / math.sqrt(1 + lr * lr), slots
    if rule == "sgd":
        v = 0.9 * slots[0] + g
        return w - lr * v, (v,)
    m = 0.9 * slots[0] + 0.1 * g
    v = 0.999 * slots[1] + 0.001 * g * g
    change = m / (1 - 0.9**t) / (xp.sqrt(v / (1 - 0.999**t)) + 1e-8)
    return w - lr * change, (m, v)


def first_slots(rule: str, weights: list[Any]) -> list[tuple[Any, ...]]:
    """Zeros for the slots of `updated`."""
    count = {"fromage": 0, "sgd": 1, "adam": 2}[rule]
    return [tuple(np.zeros_like(w) for _ in range(count)) for w in weights]


def plain_loss(xp: Any, relu: Any, weights: Any, x: Any, y: Any) -> Any:
    """The mean cross-entropy, as one would write it by hand."""
    h = x
    for w in weights:
        z = xp.dot(h, w.T)
        h = relu(z)
    z = z - xp.max(z, axis=1, keepdims=True)
    return xp.mean(xp.log(xp.sum(xp.exp(z), axis=1)) - z[np.arange(BATCH), y])


def with_npdrt(params: Any, x: Any, y: Any, rule: str, *, mode: str) -> Step:
    """The package itself: mode "eager", "replay" or "fast"."""
    model = MLP(depth=len(params), width=WIDTH, inputs=WIDTH, outputs=10)
    momentum = {"momentum": 0.9} if rule == "sgd" else {}
    optimizer = optim.RULES[rule](lr=RATES[rule], **momentum)
    loss_fn = value_and_grad(lambda p, x, y: ops.softmax_cross_entropy(model(p, x), y))
    state = optimizer.init(params)

    def whole(params: Any, state: Any, x: Any, y: Any, lr: Any) -> Any:
        loss, grads = loss_fn(params, x, y)
        return *optimizer.update(params, grads, state, lr=lr), loss

    run = whole
    if mode != "eager":
        run = record(whole, params, state, x, y, RATES[rule], fast=mode == "fast")

    def step() -> float:
        nonlocal params, state
        params, state, loss = run(params, state, x, y, RATES[rule])
        return float(loss)

    return step


def by_hand(params: Any, x: Any, y: Any, rule: str, differentiated: Any = None) -> Step:
    """NumPy written out, with fresh temporaries: the control."""
    weights, rows, t = list(params.values()), np.arange(BATCH), 0
    slots = first_slots(rule, weights)

    def written_out(weights: Any) -> Any:
        inputs, h = [], x
        for w in weights:
            inputs.append(h)
            z = h @ w.T
            h = np.maximum(z, 0)
        z = z - z.max(axis=1, keepdims=True)
        p = np.exp(z)
        total = p.sum(axis=1, keepdims=True)
        loss = np.mean(np.log(total[:, 0]) - z[rows, y])
        g = p / total
        g[rows, y] -= 1
        g /= BATCH
        grads = [g] * len(weights)
        for k in reversed(range(len(weights))):
            grads[k] = g.T @ inputs[k]
            if k:
                g = (g @ weights[k]) * (inputs[k] > 0)
        return loss, grads

    def step() -> float:
        nonlocal weights, t
        loss, grads = (differentiated or written_out)(weights)
        t += 1
        done = [updated(np, rule, *a, t) for a in zip(weights, grads, slots, strict=True)]
        weights, slots[:] = [w for w, _ in done], [s for _, s in done]
        return float(loss)

    return step


def with_autograd(params: Any, x: Any, y: Any, rule: str) -> Step:
    """autograd for the gradients, the control's updates."""
    import autograd
    import autograd.numpy as anp

    def loss_fn(weights: Any) -> Any:
        return plain_loss(anp, lambda z: anp.maximum(z, 0), weights, x, y)

    return by_hand(params, x, y, rule, autograd.value_and_grad(loss_fn))


def with_torch(params: Any, x: Any, y: Any, rule: str) -> Step:
    """PyTorch, eager: its own SGD and Adam, Fromage by hand."""
    import torch

    lr, weights = RATES[rule], [torch.tensor(w, requires_grad=True) for w in params.values()]
    inputs, labels = torch.tensor(x), torch.tensor(y)

    @torch.no_grad()
    def fromage() -> None:
        for w in weights:
            w.sub_(w.grad * (lr * w.norm() / w.grad.norm())).div_(math.sqrt(1 + lr * lr))

    update: Any = fromage
    if rule == "sgd":
        update = torch.optim.SGD(weights, lr=lr, momentum=0.9).step
    elif rule == "adam":
        update = torch.optim.Adam(weights, lr=lr).step

    def step() -> float:
        h = inputs
        for w in weights:
            w.grad = None
            z = torch.nn.functional.linear(h, w)
            h = torch.relu(z)
        loss = torch.nn.functional.cross_entropy(z, labels)
        loss.backward()
        update()
        return loss.item()

    return step


def with_jax(params: Any, x: Any, y: Any, rule: str) -> Step:
    """JAX: the whole step compiled, weights and slots donated."""
    import jax
    import jax.numpy as jnp

    differentiated = jax.value_and_grad(partial(plain_loss, jnp, jax.nn.relu))

    def whole(weights: Any, slots: Any, t: Any, x: Any, y: Any) -> Any:
        loss, grads = differentiated(weights, x, y)
        done = [updated(jnp, rule, *a, t) for a in zip(weights, grads, slots, strict=True)]
        return loss, [w for w, _ in done], [s for _, s in done]

    t, compiled = 0, jax.jit(whole, donate_argnums=(0, 1))
    host = list(params.values())
    weights, slots, data = jax.tree.map(jnp.array, (host, first_slots(rule, host), (x, y)))

    def step() -> float:
        nonlocal weights, slots, t
        t += 1
        loss, weights, slots = compiled(weights, slots, jnp.float32(t), *data)
        jax.block_until_ready(weights)
        return float(loss)

    return step


LIBRARIES = {
    "npdrt eager": partial(with_npdrt, mode="eager"),
    "npdrt replay": partial(with_npdrt, mode="replay"),
    "npdrt fast": partial(with_npdrt, mode="fast"),
    "NumPy by hand": by_hand,
    "PyTorch": with_torch,
    "JAX jit": with_jax,
    "autograd": with_autograd,
}


def measure(depth: int, rule: str, steps: int, warm_up: int = 3) -> dict[str, Any]:
    """Seconds of every step and the loss before the last, by library."""
    params = MLP(depth=depth, width=WIDTH, inputs=WIDTH, outputs=10).init(seed=0)
    x = Random(0, "benchmark/x").normal((BATCH, WIDTH)).astype(np.float32)
    y = (Random(0, "benchmark/y").words(BATCH) % 10).astype(np.int64)
    ready: list[tuple[str, Step]] = []
    for name, make in LIBRARIES.items():
        try:
            ready.append((name, make(params, x, y, rule)))
        except (ImportError, Unavailable) as error:
            print(f"{name} is left out: {error}", file=sys.stderr)
    seconds: dict[str, list[float]] = {name: [] for name, _ in ready}
    losses: dict[str, float] = {}
    for turn in range(warm_up + steps):
        first = turn % len(ready)
        for name, step in [*ready[first:], *ready[:first]]:
            start = time.perf_counter()
            losses[name] = step()
            if turn >= warm_up:
                seconds[name].append(time.perf_counter() - start)
    if max(losses.values()) - min(losses.values()) > 1e-2 * abs(losses["npdrt eager"]):
        warnings.warn(f"L = {depth}, {rule}: the losses differ: {losses}", stacklevel=1)
    return {"depth": depth, "rule": rule, "seconds": seconds, "loss": losses}


def machine() -> dict[str, Any]:
    """What the times depend on."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    torch = sys.modules.get("torch")
    return {
        "cpu": provenance.cpu_name(),
        "threads": {"BLAS": provenance.blas(), "PyTorch": torch and torch.get_num_threads()},
        "packages": versions,
    }


def table(results: list[dict[str, Any]], about: dict[str, Any]) -> str:
    """The results as Markdown."""
    names = [name for name in LIBRARIES if name in results[0]["seconds"]]
    blas = ", ".join(
        f"{b['library']} {b['version']} ({b['kernel']}, {b['threads']} threads)"
        for b in about["threads"]["BLAS"]
    )
    packages = ", ".join(f"{name} {version}" for name, version in about["packages"].items())
    heads = [f"{about['cpu']}; {blas}; {packages}", ""]
    return "\n".join([*heads, *_times(results, names), "", *_ratios(results, names)])


def _medians(result: dict[str, Any], names: list[str]) -> dict[str, float]:
    return {name: 1e3 * statistics.median(result["seconds"][name]) for name in names}


def _times(results: list[dict[str, Any]], names: list[str]) -> list[str]:
    """Milliseconds of every library."""
    lines = [f"| L | rule | {' | '.join(names)} |", "|---" * (len(names) + 2) + "|"]
    for result in results:
        cells = [f"{ms:.1f}" for ms in _medians(result, names).values()]
        lines.append(f"| {result['depth']} | {result['rule']} | {' | '.join(cells)} |")
    return lines


def _ratios(results: list[dict[str, Any]], names: list[str]) -> list[str]:
    """The time of npdrt's replays over the time of every other library."""
    ours = [name for name in names if name in ("npdrt replay", "npdrt fast")]
    peers = [name for name in names if not name.startswith("npdrt")]
    pairs = [(our, peer) for our in ours for peer in peers]
    heads = " | ".join(f"{our.removeprefix('npdrt ')} / {peer}" for our, peer in pairs)
    lines = [f"| L | rule | {heads} |", "|---" * (len(pairs) + 2) + "|"]
    for result in results:
        ms = _medians(result, names)
        cells = " | ".join(f"{ms[our] / ms[peer]:.2f}" for our, peer in pairs)
        lines.append(f"| {result['depth']} | {result['rule']} | {cells} |")
    return lines


def main() -> None:
    """Run the grid."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--depths", type=int, nargs="+", default=[2, 16, 50])
    parser.add_argument("--rules", nargs="+", choices=list(RATES), default=list(RATES))
    parser.add_argument("--steps", type=int, default=10, help="timed steps, after 3 untimed ones")
    parser.add_argument("--output", type=Path, help="write PREFIX.md and PREFIX.json too")
    given = parser.parse_args()
    results = [measure(depth, rule, given.steps) for depth in given.depths for rule in given.rules]
    about = machine()
    text = table(results, about)
    print(text)
    if given.output:
        given.output.with_suffix(".md").write_text(text + "\n")
        found = json.dumps({"machine": about, "results": results}, indent=1)
        given.output.with_suffix(".json").write_text(found + "\n")


if __name__ == "__main__":
    main()
