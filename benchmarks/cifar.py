"""ResNet-18 on CIFAR-10, npdrt and PyTorch step by step on the same batches from the same weights.

Both train the pre-activation ResNet-18 with SGD on npdrt's batches (random crops and flips), in
turns. In float64 the losses agree to rounding, until that has grown; in float32 they agree
statistically. The table has the mean training loss of every window of steps, the largest relative
difference of a loss in it, and at the end the test accuracy in evaluation mode on the first images
of the test set.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from resnet import EPS, MOMENTUM, forward
from step import machine

from npdrt import data, ops, optim, record, value_and_grad
from npdrt.data.augment import words
from npdrt.data.sampler import Sampler
from npdrt.models import MODELS

MODEL = MODELS["resnet18"](outputs=10)


def batches(dataset: Any, size: int, dtype: str) -> Iterator[tuple[Any, Any]]:
    """Cropped and flipped images (size, 3, 32, 32), and labels, in the order of npdrt's trainer."""
    images = dataset.images("crop-flip")
    sampler = Sampler(len(images), size, seed=0)
    step = 0
    while True:
        indices = sampler.batch(step)
        keys = words(0, step // sampler.batches_per_epoch, len(images), indices)
        yield images.batch(indices, "crop-flip", keys).astype(dtype), dataset.y[indices]
        step += 1


class Ours:
    """npdrt's step, recorded."""

    def __init__(self, dtype: str, lr: float):
        self.params = MODEL.init(seed=0, dtype=dtype)
        self.buffers, self.optimizer = MODEL.buffers(seed=0, dtype=dtype), optim.sgd(lr=lr)
        self.state, self.programs = self.optimizer.init(self.params), {}

    def step(self, x: Any, y: Any) -> float:
        """The loss before one step."""
        args = self.params, self.buffers, self.state, x, y
        if x.shape not in self.programs:
            self.programs[x.shape] = record(self.whole, *args)
        self.params, self.state, self.buffers, loss = self.programs[x.shape](*args)
        return float(loss)

    def whole(self, params: Any, buffers: Any, state: Any, x: Any, y: Any) -> Any:
        """Forward, backward, update."""

        def loss_fn(params: Any) -> Any:
            logits, moved = MODEL.apply(params, buffers, x, train=True)
            return ops.softmax_cross_entropy(logits, y), moved

        (loss, moved), grads = value_and_grad(loss_fn, has_aux=True)(params)
        return *self.optimizer.update(params, grads, state), moved, loss

    def accuracy(self, x: Any, y: Any) -> float:
        """The share of images classified right, in evaluation mode."""
        logits = [MODEL(self.params, part, buffers=self.buffers) for part in np.split(x, 10)]
        return float(np.mean(np.concatenate(logits).argmax(1) == y))


class Theirs:
    """PyTorch's, eager and channels last."""

    def __init__(self, dtype: str, lr: float):
        import torch

        self.torch, self.training = torch, True
        self.params = {
            name: self.tensor(w).requires_grad_(True)
            for name, w in MODEL.init(seed=0, dtype=dtype).items()
        }
        self.buffers = {k: self.tensor(v) for k, v in MODEL.buffers(seed=0, dtype=dtype).items()}
        self.optimizer = torch.optim.SGD(self.params.values(), lr=lr)

    def tensor(self, x: Any) -> Any:
        """A tensor of an array, channels last where it has four axes."""
        made = self.torch.tensor(x)
        last = self.torch.channels_last
        return made.to(memory_format=last) if made.ndim == 4 else made

    def conv(self, x: Any, w: Any, stride: int, pad: int) -> Any:
        """Convolution."""
        return self.torch.nn.functional.conv2d(x, w, None, stride, pad)

    def relu(self, x: Any) -> Any:
        """Rectifier."""
        return self.torch.relu(x)

    def mean(self, h: Any) -> Any:
        """Global average pooling."""
        return h.mean((2, 3))

    def norm(self, h: Any, name: str, p: Any) -> Any:
        """Batch normalisation."""
        running = (self.buffers[f"{name}/running_{kind}"] for kind in ("mean", "var"))
        affine = p[f"{name}/weight"], p[f"{name}/bias"]
        batch_norm = self.torch.nn.functional.batch_norm
        return batch_norm(h, *running, *affine, self.training, MOMENTUM, EPS)

    def step(self, x: Any, y: Any) -> float:
        """The loss before one step."""
        self.optimizer.zero_grad()
        logits = forward(self, self.params, self.tensor(x))
        loss = self.torch.nn.functional.cross_entropy(logits, self.tensor(y))
        loss.backward()
        self.optimizer.step()
        return float(loss.item())

    def accuracy(self, x: Any, y: Any) -> float:
        """The share of images classified right, in evaluation mode."""
        self.training = False
        with self.torch.no_grad():
            parts = [forward(self, self.params, self.tensor(part)) for part in np.split(x, 10)]
        self.training = True
        return float(np.mean(self.torch.cat(parts).numpy().argmax(1) == y))


def run(given: argparse.Namespace) -> dict[str, Any]:
    """Losses and seconds of every step of both, and the test accuracies."""
    dataset = data.load("cifar-10", data_dir=given.data_dir)
    both = {"npdrt": Ours(given.dtype, given.lr), "PyTorch": Theirs(given.dtype, given.lr)}
    losses: dict[str, list[float]] = {name: [] for name in both}
    seconds: dict[str, list[float]] = {name: [] for name in both}
    start = time.perf_counter()
    for k, (x, y) in enumerate(batches(dataset, given.batch, given.dtype)):
        if k == given.steps or time.perf_counter() - start > 60 * given.minutes:
            break
        for name in sorted(both, reverse=bool(k % 2)):
            before = time.perf_counter()
            losses[name].append(both[name].step(x, y))
            seconds[name].append(time.perf_counter() - before)
    x, y = dataset.x_test[: given.test].astype(given.dtype), dataset.y_test[: given.test]
    accuracy = {name: one.accuracy(x, y) for name, one in both.items()} if given.test else {}
    return {"losses": losses, "seconds": seconds, "accuracy": accuracy}


def table(found: dict[str, Any], window: int) -> str:
    """The losses by window of steps, as Markdown."""
    ours, theirs = found["losses"]["npdrt"], found["losses"]["PyTorch"]
    lines = ["| steps | npdrt | PyTorch | largest relative difference |", "|---|---|---|---|"]
    for start in range(0, len(ours), window):
        a, b = ours[start : start + window], theirs[start : start + window]
        apart = max(abs(p - q) / abs(q) for p, q in zip(a, b, strict=True))
        means = f"{statistics.mean(a):.4f} | {statistics.mean(b):.4f}"
        lines.append(f"| {start + 1}-{start + len(a)} | {means} | {apart:.2g} |")
    for name, value in found["accuracy"].items():
        lines.append(f"\ntest accuracy, {name}: {value:.4f}")
    ms = {name: 1e3 * statistics.median(s) for name, s in found["seconds"].items()}
    lines.append("\n" + ", ".join(f"{name} {value:.0f} ms a step" for name, value in ms.items()))
    return "\n".join(lines)


def main() -> None:
    """Train both."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", choices=["float32", "float64"], default="float32")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--steps", type=int, default=10**9)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--window", type=int, default=50)
    parser.add_argument("--test", type=int, default=2000, help="test images; a multiple of 10")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--output", type=Path, help="write PREFIX.md and PREFIX.json too")
    given = parser.parse_args()
    found = run(given)
    text = table(found, given.window)
    print(text)
    if given.output:
        given.output.with_suffix(".md").write_text(text + "\n")
        whole = json.dumps({"machine": machine(), **found}, indent=1)
        given.output.with_suffix(".json").write_text(whole + "\n")


if __name__ == "__main__":
    main()
