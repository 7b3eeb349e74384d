"""An epoch of WikiText-2 with PyTorch, beside runs of `npdrt train` of the same recipe.

Every run is a directory of

    npdrt train --model transformer --data wikitext-2 --batch-size 20 --epochs 1 \\
        --schedule constant --log-every 1 --optimizer sgd --lr 1 --clip 0.25 --seed 1111 --out RUN

PyTorch's is its example word_language_model, nn.TransformerEncoder, from the run's initial weights
and on its batches, in its order, with its own masks of dropout, clipping and SGD or Adam; Fromage
is written here. Its losses are kept as RUN/pytorch.json; a run that has them is not trained again.
The table has the training perplexity of every window of steps and of the whole epoch, exp of the
mean loss over the minibatches, each before its step and with dropout, as PyTorch's example prints
it. With --table nothing is trained.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from step import machine
from transformer import torch_model

from npdrt import data
from npdrt.models import MODELS

Config = dict[str, Any]


class Fromage:
    """Bernstein et al. 2020, Algorithm 1, with the authors' norm bound:

    p <- (p - lr g |p|/|g|) / sqrt(1 + lr^2), with lr g where a norm is 0; then p no longer than
    `norm_bound` times its first norm.
    """

    def __init__(self, parameters: Any, lr: float, norm_bound: float):
        self.params, self.lr = list(parameters), lr
        self.limits = [norm_bound * float(p.detach().norm()) for p in self.params]

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for p in self.params:
            p.grad = None

    def step(self) -> None:
        """One update."""
        for p, limit in zip(self.params, self.limits, strict=True):
            w, g = p.data, p.grad
            size, other = float(w.norm()), float(g.norm())
            relative = size / other if size > 0 and other > 0 else 1.0
            w.sub_(g, alpha=self.lr * relative).div_(math.sqrt(1 + self.lr**2))
            norm = float(w.norm())
            if norm > limit:
                w.mul_(limit / norm)


def optimizer(config: Config, parameters: Any) -> Any:
    """PyTorch's rule for a run's; Fromage from here."""
    import torch

    rules = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "fromage": Fromage}
    return rules[config["optimizer"]](parameters, lr=config["lr"], **config["optimizer_options"])


def batches(x: Any, y: Any, length: int) -> Iterator[tuple[Any, Any]]:
    """Tokens (length, streams) in order, and those after them; the last may be shorter."""
    for start in range(0, len(x), length):
        yield x[start : start + length], y[start : start + length]


def pytorch(config: Config, dataset: Any, steps: int) -> Config:
    """Losses of every step of the epoch, and the mean loss over the test split."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    torch.manual_seed(config["seed"])
    model = torch_model(MODELS["transformer"](**config["model_options"]).init(config["seed"]))
    rule, start = optimizer(config, model.parameters()), time.perf_counter()

    def loss_of(x: Any, y: Any) -> Any:
        logits = model(torch.tensor(x))
        return F.cross_entropy(logits.flatten(0, 1), torch.tensor(y).flatten())

    def step(x: Any, y: Any) -> float:
        rule.zero_grad()
        loss = loss_of(x, y)
        loss.backward()
        if config["clip"]:
            nn.utils.clip_grad_norm_(model.parameters(), config["clip"])
        rule.step()
        return loss.item()

    train = batches(dataset.x, dataset.y, dataset.length)
    losses = [step(x, y) for _, (x, y) in zip(range(steps), train, strict=False)]
    seconds = time.perf_counter() - start
    model.eval()
    with torch.no_grad():
        test = batches(dataset.x_test, dataset.y_test, dataset.length)
        sums = [float(loss_of(x, y)) * y.size for x, y in test]
    test_loss = sum(sums) / dataset.y_test.size
    return {"losses": losses, "test_loss": test_loss, "seconds": seconds, "machine": machine()}


def run(place: Path, *, steps: int, table: bool, data_dir: Path | None) -> Config | None:
    """A run's configuration, losses and test loss, and PyTorch's."""
    records = [json.loads(line) for line in (place / "log.jsonl").read_text().splitlines()]
    config, kept = records[0]["config"], place / "pytorch.json"
    if not kept.exists():
        if table:
            return None
        dataset = data.load(config["data"], data_dir=data_dir).as_streams_for(config["batch_size"])
        kept.write_text(json.dumps(pytorch(config, dataset, steps)) + "\n")
    ours = {
        "losses": [r["loss"] for r in records if r["event"] == "step"],
        "test_loss": next((r["test_loss"] for r in records if r["event"] == "epoch"), None),
    }
    return {"config": config, "npdrt": ours, "PyTorch": json.loads(kept.read_text())}


def lines(found: list[Config], window: int) -> Iterator[str]:
    """The Markdown table: a column a run and library."""
    columns = {
        f"{name}, {r['config']['optimizer']}, seed {r['config']['seed']}": r[name]
        for r in found
        for name in ("npdrt", "PyTorch")
    }
    yield f"| steps | {' | '.join(columns)} |"
    yield "|---" * (len(columns) + 1) + "|"
    most = max(len(column["losses"]) for column in columns.values())
    rows: list[tuple[str, Callable[[Config], float | None]]] = [
        (f"{start + 1}-{min(start + window, most)}", _mean(start, min(start + window, most)))
        for start in range(0, most, window)
    ]
    rows += [("all", _mean(0, most)), ("test", lambda column: column["test_loss"])]
    for label, loss in rows:
        values = (loss(column) for column in columns.values())
        shown = ("" if v is None else f"{math.exp(v):.2f}" for v in values)
        yield f"| {label} | {' | '.join(shown)} |"


def _mean(start: int, stop: int) -> Callable[[Config], float | None]:
    """The mean loss of those steps, where a column has them all."""
    return lambda column: (
        statistics.mean(column["losses"][start:stop]) if stop <= len(column["losses"]) else None
    )


def main() -> None:
    """Train what is missing, print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--steps", type=int, default=10**9, help="of PyTorch, at most an epoch")
    parser.add_argument("--window", type=int, default=500)
    parser.add_argument("--table", action="store_true", help="train nothing")
    parser.add_argument("--data-dir", type=Path)
    given = parser.parse_args()
    how = {"steps": given.steps, "table": given.table, "data_dir": given.data_dir}
    found = [one for place in given.runs if (one := run(place, **how)) is not None]
    print(*lines(found, given.window), sep="\n")


if __name__ == "__main__":
    main()
