"""Final training accuracy of Fromage over shares of Lemma 2's bound, by depth.

The rate is share * (2**(1/L) - 1), falling linearly to 0; the net and the data are those of
`npdrt train --model mlp --depth L`. Prints a Markdown table: the lowest accuracy over the seeds.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from npdrt.train import Config, provenance, train


def accuracy(depth: int, share: float, seed: int, epochs: int) -> float:
    """Training accuracy at the end of one run."""
    config = Config(
        model_options={"depth": depth},
        lr=share * (2 ** (1 / depth) - 1),
        seed=seed,
        epochs=epochs,
        trace_every=0,
        checkpoint_every=0,
    )
    with tempfile.TemporaryDirectory() as folder:
        return train(config, Path(folder) / "run").train_accuracy or 0.0


def main() -> None:
    """Run the grid."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--depths", type=int, nargs="+", default=[2, 5, 10, 16, 30, 50])
    parser.add_argument(
        "--shares", type=float, nargs="+", default=[0.02, 0.04, 0.06, 0.08, 0.12, 0.2]
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=40)
    given = parser.parse_args()
    print(f"{provenance.cpu_name()}; {given.epochs} epochs, lowest of {given.seeds} seeds\n")
    print("| L | bound | " + " | ".join(f"share {s:g}" for s in given.shares) + " |")
    print("|---" * (len(given.shares) + 2) + "|")
    for depth in given.depths:
        cells = []
        for share in given.shares:
            runs = [accuracy(depth, share, seed, given.epochs) for seed in range(given.seeds)]
            cells.append(f"{min(runs):.3f}")
        bound = 2 ** (1 / depth) - 1
        print(f"| {depth} | {bound:.4f} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
