"""trace.h5: the history and the per-layer measurements of a run as HDF5 tables."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from npdrt.errors import FileRefused
from npdrt.store import container
from npdrt.store.log import Record

HISTORY = {
    "epoch": "epochs finished",
    "step": "training steps finished",
    "lr": "learning rate of the epoch's last step",
    "train_loss": "mean loss of the epoch's minibatches, each before its step (nats)",
    "train_accuracy": "share of the epoch's samples classified right, each before its step",
    "test_loss": "mean loss on the test set (nats)",
    "test_accuracy": "share of the test set classified right",
}
LAYERS = {
    "weight_norm": "2-norm of the parameter before the step",
    "gradient_norm": "2-norm of its gradient",
    "relative_update": "2-norm of the step's change over weight_norm",
    "cosine": "cosine of the angle between the change and the negative gradient",
}


def write(path: Path, records: Sequence[Record], parameters: Sequence[str]) -> None:
    """Write trace.h5 from the records of the log, atomically.

    history/<column>: (epochs,). layers/step: (T,). layers/<quantity>: (T, parameters), columns in
    the order of meta["parameters"]. float64, NaN where a value is missing; the units and the
    meaning of every dataset are in /meta.
    """
    epochs = [r for r in records if r["event"] == "epoch"]
    traces = [r for r in records if r["event"] == "trace"]
    arrays = {f"history/{name}": _column(epochs, name) for name in HISTORY}
    arrays["layers/step"] = np.array([r["step"] for r in traces], dtype=np.int64)
    for name in LAYERS:
        rows = [[_number(v) for v in r[name]] for r in traces]
        arrays[f"layers/{name}"] = np.array(rows, np.float64).reshape(len(rows), len(parameters))
    about = {f"history/{n}": {"shape": "(epochs,)", "what": w} for n, w in HISTORY.items()}
    about["layers/step"] = {
        "shape": "(measurements,)",
        "what": "the step measured, counting from 1",
    }
    about |= {
        f"layers/{n}": {"shape": "(measurements, parameters)", "what": w} for n, w in LAYERS.items()
    }
    container.write(
        path, arrays, {"kind": "trace", "parameters": list(parameters), "datasets": about}
    )


def _column(records: Sequence[Record], name: str) -> Any:
    return np.array([_number(r.get(name)) for r in records], dtype=np.float64)


def _number(value: Any) -> float:
    return np.nan if value is None else float(value)


def read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arrays and the metadata of a trace file, or `FileRefused`."""
    arrays, meta = container.read(path)
    if meta.get("kind") != "trace":
        raise FileRefused(f"{path}: expected a trace; it holds {meta.get('kind')!r}")
    return arrays, meta
