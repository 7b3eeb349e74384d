"""Time and memory of one training step of ResNet-18 on CIFAR's sizes, beside other libraries.

Forward, backward, running statistics and one SGD update of the pre-activation ResNet-18 (32x32
images, 10 classes) in float32, all from the same weights and batch. The libraries take turns, one
step each, and start every round with another of them; the table has the medians. With --memory
every library runs alone in a process of its own, and its peak resident memory is taken.

The losses of the last steps are compared, so that all have done the same work.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from memory import peak
from step import machine

from npdrt import Unavailable, ops, optim, record, value_and_grad
from npdrt.models import MODELS
from npdrt.program import Memory
from npdrt.random import Random

LR = 1e-3  # so small that rounding does not part the libraries in a few steps
EPS, MOMENTUM = 1e-5, 0.1  # of batch normalisation
Step = Callable[[], float]
Clock = Callable[[], float]
Libraries = dict[str, Callable[[int], Step]]  # by name: from a batch size to a step


def data(batch: int) -> tuple[Any, Any]:
    """Images (batch, 3, 32, 32) and labels."""
    x = Random(0, "benchmark/x").normal((batch, 3, 32, 32)).astype(np.float32)
    return x, (Random(0, "benchmark/y").words(batch) % 10).astype(np.int64)


def with_npdrt(batch: int, *, mode: str) -> Step:
    """The package itself: mode "eager", "replay" or "fast"."""
    model, optimizer = MODELS["resnet18"](outputs=10), optim.sgd(lr=LR)
    params, buffers = model.init(seed=0), model.buffers(seed=0)
    x, y = data(batch)

    def loss_fn(params: Any, buffers: Any, x: Any, y: Any) -> Any:
        logits, buffers = model.apply(params, buffers, x, train=True)
        return ops.softmax_cross_entropy(logits, y), buffers

    differentiated = value_and_grad(loss_fn, has_aux=True)

    def whole(params: Any, buffers: Any, state: Any, x: Any, y: Any, lr: Any) -> Any:
        (loss, buffers), grads = differentiated(params, buffers, x, y)
        return *optimizer.update(params, grads, state, lr=lr), buffers, loss

    state, run = optimizer.init(params), whole
    if mode != "eager":
        memory = Memory()
        run = record(whole, params, buffers, state, x, y, LR, fast=mode == "fast", memory=memory)  # type: ignore[assignment]
        memory.adopt({"params": params, "buffers": buffers})

    def step() -> float:
        nonlocal params, state, buffers
        params, state, buffers, loss = run(params, buffers, state, x, y, LR)
        return float(loss)

    return step


def forward(f: Any, p: Any, x: Any) -> Any:
    """The pre-activation ResNet-18 in another library's operations f, from npdrt's names."""
    h = f.conv(x, p["stem/weight"], 1, 1)
    for stage in range(4):
        for block in range(2):
            name = f"stages/{stage:02d}/blocks/{block:02d}"
            stride = 2 if stage and not block else 1
            a = f.relu(f.norm(h, f"{name}/norm1", p))
            shortcut = p.get(f"{name}/shortcut/weight")
            skip = h if shortcut is None else f.conv(a, shortcut, stride, 0)
            h = f.conv(a, p[f"{name}/conv1/weight"], stride, 1)
            h = f.relu(f.norm(h, f"{name}/norm2", p))
            h = f.conv(h, p[f"{name}/conv2/weight"], 1, 1) + skip
    return f.mean(h) @ p["linear/weight"].T + p["linear/bias"]


def with_torch(batch: int, *, channels_last: bool) -> Step:
    """PyTorch, eager, with its own batch normalisation and SGD."""
    import torch
    from torch.nn import functional as F

    form = torch.channels_last if channels_last else torch.contiguous_format
    model = MODELS["resnet18"](outputs=10)
    buffers = {k: torch.tensor(v) for k, v in model.buffers(seed=0).items()}
    params = {}
    for name, w in model.init(seed=0).items():
        tensor = torch.tensor(w)
        tensor = tensor.to(memory_format=form) if tensor.ndim == 4 else tensor
        params[name] = tensor.requires_grad_(True)
    x, y = (torch.tensor(a) for a in data(batch))
    x = x.to(memory_format=form)
    optimizer = torch.optim.SGD(params.values(), lr=LR)

    class Operations:
        conv = staticmethod(lambda x, w, stride, pad: F.conv2d(x, w, None, stride, pad))
        relu = staticmethod(torch.relu)
        mean = staticmethod(lambda h: h.mean((2, 3)))

        @staticmethod
        def norm(h: Any, name: str, p: Any) -> Any:
            mean, var = buffers[f"{name}/running_mean"], buffers[f"{name}/running_var"]
            gain, bias = p[f"{name}/weight"], p[f"{name}/bias"]
            return F.batch_norm(h, mean, var, gain, bias, True, MOMENTUM, EPS)

    def step() -> float:
        optimizer.zero_grad()
        loss = F.cross_entropy(forward(Operations, params, x), y)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def with_jax(batch: int) -> Step:
    """JAX: the whole step compiled, weights and running statistics donated."""
    import jax
    import jax.numpy as jnp

    model, (x, y) = MODELS["resnet18"](outputs=10), data(batch)

    def conv(x: Any, w: Any, stride: int, pad: int) -> Any:
        dims = ("NHWC", "OIHW", "NHWC")
        pads = [(pad, pad)] * 2
        return jax.lax.conv_general_dilated(x, w, (stride, stride), pads, dimension_numbers=dims)

    def loss_fn(params: Any, buffers: Any, x: Any, y: Any) -> Any:
        moved: dict[str, Any] = {}

        class Operations:
            relu = staticmethod(jax.nn.relu)
            mean = staticmethod(lambda h: h.mean((1, 2)))

            @staticmethod
            def norm(h: Any, name: str, p: Any) -> Any:
                mean, var, n = h.mean((0, 1, 2)), h.var((0, 1, 2)), h.size / h.shape[-1]
                for key, new in (("mean", mean), ("var", var * n / (n - 1))):
                    old = buffers[f"{name}/running_{key}"]
                    moved[f"{name}/running_{key}"] = (1 - MOMENTUM) * old + MOMENTUM * new
                scale = p[f"{name}/weight"] / jnp.sqrt(var + EPS)
                return (h - mean) * scale + p[f"{name}/bias"]

        Operations.conv = staticmethod(conv)  # type: ignore[attr-defined]
        logits = forward(Operations, params, x)
        losses = jax.nn.logsumexp(logits, axis=1) - logits[jnp.arange(batch), y]
        return losses.mean(), moved

    def whole(params: Any, buffers: Any, x: Any, y: Any) -> Any:
        (loss, moved), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, buffers, x, y)
        return {k: w - LR * grads[k] for k, w in params.items()}, moved, loss

    compiled = jax.jit(whole, donate_argnums=(0, 1))
    host = model.init(seed=0), model.buffers(seed=0), x.transpose(0, 2, 3, 1).copy(), y
    params, buffers, x, y = jax.tree.map(jnp.array, host)

    def step() -> float:
        nonlocal params, buffers
        params, buffers, loss = compiled(params, buffers, x, y)
        return float(jax.block_until_ready(loss))

    return step


LIBRARIES: Libraries = {
    "npdrt eager": partial(with_npdrt, mode="eager"),
    "npdrt replay": partial(with_npdrt, mode="replay"),
    "npdrt fast": partial(with_npdrt, mode="fast"),
    "PyTorch": partial(with_torch, channels_last=False),
    "PyTorch channels last": partial(with_torch, channels_last=True),
    "JAX jit": with_jax,
}


def times(
    libraries: Libraries, batch: int, steps: int, warm_up: int = 2, clock: Clock = time.perf_counter
) -> dict[str, Any]:
    """Seconds of every step and the last loss, by library."""
    ready = [(name, make(batch)) for name, make in libraries.items()]
    seconds: dict[str, list[float]] = {name: [] for name in libraries}
    losses: dict[str, float] = {}
    for turn in range(warm_up + steps):
        first = turn % len(ready)
        for name, step in [*ready[first:], *ready[:first]]:
            start = clock()
            losses[name] = step()
            if turn >= warm_up:
                seconds[name].append(clock() - start)
    if max(losses.values()) - min(losses.values()) > 1e-2 * max(losses.values()):
        warnings.warn(f"the losses differ: {losses}", stacklevel=1)
    return {"seconds": seconds, "loss": losses}


def peak_of(name: str, batch: int, steps: int) -> int:
    """Peak resident bytes of a process of this script that makes some steps with one library."""
    command = [sys.executable, sys.argv[0], "--child", name, "--batch", str(batch), "--steps"]
    done = subprocess.run([*command, str(steps)], capture_output=True, text=True, env=os.environ)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return int(json.loads(done.stdout.splitlines()[-1])["peak"])


def available(libraries: Libraries) -> Libraries:
    """Those that are installed."""
    found = {}
    for name, make in libraries.items():
        try:
            make(2)
        except (ImportError, Unavailable) as error:
            print(f"{name} is left out: {error}", file=sys.stderr)
        else:
            found[name] = make
    return found


def table(found: dict[str, Any], memory: dict[str, int]) -> str:
    """The results as Markdown: medians, and npdrt's replay over every library."""
    ms = {name: 1e3 * statistics.median(s) for name, s in found["seconds"].items()}
    lines = ["| library | ms a step | npdrt replay / this library | peak MB |", "|---|---|---|---|"]
    for name, value in ms.items():
        ratio = ms["npdrt replay"] / value
        lines.append(f"| {name} | {value:.0f} | {ratio:.2f} | {memory.get(name, 0) / 1e6:.0f} |")
    return "\n".join(lines)


def arguments(description: str | None, batch: int) -> argparse.ArgumentParser:
    """The options of `measure`."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--batch", type=int, default=batch)
    parser.add_argument("--steps", type=int, default=10, help="timed steps, after 2 untimed ones")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--processor", action="store_true",
                        help="processor time, for a machine that others use too")  # fmt: skip
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help="write PREFIX.md and PREFIX.json too")
    return parser


def measure(libraries: Libraries, given: argparse.Namespace) -> None:
    """Time, and with --memory the peaks; or be a child."""
    if given.child:
        step = libraries[given.child](given.batch)
        for _ in range(given.steps):
            step()
        print(json.dumps({"peak": peak()}))
        return
    libraries = available(libraries)
    memory = {name: peak_of(name, given.batch, 3) for name in libraries} if given.memory else {}
    clock = time.process_time if given.processor else time.perf_counter
    found = times(libraries, given.batch, given.steps, clock=clock)
    text = table(found, memory)
    print(text)
    if given.output:
        given.output.with_suffix(".md").write_text(text + "\n")
        whole = json.dumps({"machine": machine(), "memory": memory, **found}, indent=1)
        given.output.with_suffix(".json").write_text(whole + "\n")


if __name__ == "__main__":
    measure(LIBRARIES, arguments(__doc__, batch=64).parse_args())
