"""The training runs of the Fromage paper's Figure 1 on MNIST, beside the authors' logs.

Recipe (their code): 784-784-...-10 perceptron with biases, ReLU, PyTorch's default initialisation,
batch 250, Fromage at 0.01 times 0.9 an epoch, 10 epochs; 2 and 16 weight matrices, and 16 with
residual connections. Prints Markdown: the mean training accuracy of each epoch's minibatches.
Runs are kept in --runs and not repeated.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from npdrt.store import log
from npdrt.train import Config, provenance, train

# Per-epoch training accuracy stored by the authors, and the one test accuracy they printed.
LOGGED = {
    "2 layers": [0.8982, 0.9514, 0.9665, 0.9746, 0.9802, 0.9835, 0.9865, 0.9887, 0.9908, 0.9922],
    "16 layers": [0.2853, 0.5334, 0.6849, 0.7781, 0.8465, 0.9510, 0.9251, 0.9673, 0.9749, 0.9551],
    "16 layers, residual": [
        *(0.8882, 0.9781, 0.9880, 0.9923, 0.9951, 0.9965, 0.9972, 0.9979, 0.9988, 0.9989),
    ],
}
LOGGED_TEST = {"2 layers": 0.9803}
NETS = {
    "2 layers": {"depth": 2},
    "16 layers": {"depth": 16},
    "16 layers, residual": {"depth": 16, "residual": True},
}


def config(net: str, seed: int) -> Config:
    """The recipe for one net and seed."""
    return Config(
        model_options={"width": 784, "bias": True, "init": "authors", **NETS[net]},
        data="mnist",
        lr=0.01,
        schedule="exponential:0.9",
        epochs=10,
        batch_size=250,
        seed=seed,
        checkpoint_every=0,
        trace_every=0,
    )


def history(net: str, seed: int, runs: Path) -> list[log.Record]:
    """The records of the ten epochs; the run is made if it is not there."""
    out = runs / f"{net.replace(', ', '-').replace(' ', '-')}-{seed}"
    if not (out / "log.jsonl").exists():
        train(config(net, seed), out)
    return [record for record in log.read(out / "log.jsonl") if record["event"] == "epoch"]


def row(name: str, values: list[float], test: float | None) -> str:
    """One line of the table."""
    shown = [f"{value:.4f}" for value in values] + [f"{test:.4f}" if test else "not stored"]
    return f"| {name} | " + " | ".join(shown) + " |"


def main() -> None:
    """Run what is missing and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=Path("runs/mnist"))
    parser.add_argument("--nets", nargs="+", default=list(NETS), choices=list(NETS))
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    print(provenance.cpu_name())
    for net in given.nets:
        print(f"\n**{net}**\n\n| epoch | " + " | ".join(map(str, range(1, 11))) + " | test |")
        print("|---" * 12 + "|")
        print(row("authors' log", LOGGED[net], LOGGED_TEST.get(net)))
        for seed in range(given.seeds):
            epochs = history(net, seed, given.runs)
            accuracy = [record["train_accuracy"] for record in epochs]
            print(row(f"npdrt, seed {seed}", accuracy, epochs[-1]["test_accuracy"]), flush=True)


if __name__ == "__main__":
    main()
