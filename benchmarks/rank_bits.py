"""Whether a run has the same bits on any number of ranks: digests of parameters, buffers, optimizer
state and log of four networks, in 8 shards, eager and replayed, and killed on 4 ranks to go on with
2, as a table. Needs the extra mpi, with MPICH or Open MPI.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import rank_faults
import report

RANKS = (1, 2, 3, 4, 8)
KILLED_AT = 5  # steps; checkpoints are made after 2 and 4
NETWORKS: dict[str, dict[str, Any]] = {
    "perceptron, L = 50": {"model_options": {"depth": 50, "width": 16}, "batch_size": 200},
    "ResNet-18, crop-flip": {
        "model": "resnet18", "model_options": {"width": 2}, "data": "images.npz",
        "augment": "crop-flip", "batch_size": 32, "optimizer": "sgd", "lr": 0.1,
    },
    "transformer, dropout": {
        "model": "transformer", "data": "sample-text", "batch_size": 16,
        "model_options": {"width": 8, "heads": 2, "hidden": 8, "dropout": 0.2},
    },
    "perceptron, spectral": {
        "model_options": {"depth": 3, "width": 16, "normalisation": "spectral"},
        "batch_size": 200, "optimizer": "adam", "lr": 0.01,
    },
}  # fmt: skip
COMMON = {"shards": 8, "epochs": 1, "checkpoint_every": 2, "log_every": 1, "trace_every": 3}


# --- in a rank -------------------------------------------------------------------------------


def in_rank(what: str, names: list[str]) -> None:
    """Train each network in the folder NAME-WHAT; "killed" ends rank 1, "resumed" goes on."""
    from npdrt.train import Config, Reporter, resume, train

    class Ending(Reporter):
        def progress(self, step: int, steps: int, record: Any) -> None:
            assert steps > KILLED_AT, steps
            if what == "killed" and step == KILLED_AT and rank_faults.rank_of_process() == 1:
                os.kill(os.getpid(), signal.SIGKILL)

    for name in names:
        out = Path(f"{name}-{'killed' if what == 'resumed' else what}")
        if what == "resumed":
            resume(out)
        else:
            config = Config(**NETWORKS[name], **COMMON, eager="eager" in what)
            train(config, out, reporter=Ending())


# --- the table -------------------------------------------------------------------------------


def run(ranks: int, what: str, names: list[str], folder: Path) -> int:
    """The exit code of a process, or of several ranks."""
    words = [rank_faults.mpiexec(), "-n", str(ranks)] if ranks > 1 else []
    words += [sys.executable, str(Path(__file__).resolve()), "in-rank", what, *names]
    given = rank_faults.environment() | {"PYTHONHASHSEED": "0"}
    done = subprocess.run(words, cwd=folder, env=given, check=False, stdout=subprocess.DEVNULL)
    return done.returncode


def ways() -> Iterator[tuple[str, int]]:
    """The names of the folders, and the ranks that fill them."""
    for how in ("replayed", "eager"):
        yield from ((f"{how} {ranks}", ranks) for ranks in RANKS)


def digest(run: Path) -> str:
    arrays, log = rank_faults.contents(run)
    found = hashlib.sha256(json.dumps(log).encode())
    for name, (dtype, data) in sorted(arrays.items()):
        found.update(f"{name} {dtype} {len(data)} ".encode() + data)
    return found.hexdigest()[:12]


def write_images(path: Path) -> None:
    import numpy as np

    rng = np.random.default_rng(0)
    x = rng.integers(0, 255, (244, 3, 8, 8)).astype("uint8")
    np.savez(path, x=x[:192], y=np.arange(192) % 5, x_test=x[192:], y_test=np.arange(52) % 5)


def main(words: list[str] | None = None) -> None:
    """Print the table; fail unless all digests of a network agree."""
    given = report.parser(__doc__).parse_args(words)
    names = list(NETWORKS)
    with tempfile.TemporaryDirectory() as where:
        folder = Path(where)
        write_images(folder / "images.npz")
        for what, ranks in ways():
            if code := run(ranks, what, names, folder):
                sys.exit(f"{what}: exit code {code}")
        for name in names:
            assert run(4, "killed", [name], folder)
        if code := run(2, "resumed", names, folder):
            sys.exit(f"resumed: exit code {code}")
        columns = [*(what for what, _ in ways()), "killed"]
        found = {n: [digest(folder / f"{n}-{what}") for what in columns] for n in names}
    head = ["network", *(what for what, _ in ways()), "killed on 4, resumed on 2"]
    text = report.table(head, [[name, *digests] for name, digests in found.items()])
    print(text)
    if given.output:
        Path(f"{given.output}.md").write_text(text + "\n", encoding="utf-8")
    if any(len(set(digests)) > 1 for digests in found.values()):
        sys.exit("the bits differ")


if __name__ == "__main__":
    if sys.argv[1:2] == ["in-rank"]:
        in_rank(sys.argv[2], sys.argv[3:])
    else:
        main()
