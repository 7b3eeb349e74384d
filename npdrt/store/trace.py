"""trace.h5: the history and the per-layer measurements of a run as HDF5 tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from npdrt import schema
from npdrt.errors import FileRefused
from npdrt.store import container, log
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
# Over the weights, the arrays of two axes or more; r: their relative updates in the step.
NETWORK = {
    "deep_relative_trust": "prod(1 + r) - 1, as in NeurIPS 2020; no unit",
    "log_deep_relative_trust": "log prod(1 + r), finite where the product is not; no unit",
    "squared_deep_relative_trust": "prod(1 + r^2) - 1, as in the first version; no unit",
    "euclidean_trust": "sum of the squared 2-norms of the changes; squared unit of the weights",
    "descent_threshold": "(1 + smallest cosine)^(1/L) - 1, Lemma 2's bound on r; no unit",
}
CONDITIONING = {
    "step": "training steps finished; the start and the end of every epoch",
    "condition_number": "largest over smallest singular value; inf, as NaN, without full rank",
    "jacobian_norm": "2-norm of d output / d input of the weight's layer, root mean square over "
    "the first training inputs; NaN where the model is no plain piecewise-linear perceptron",
}


APART = ("event", "seconds")  # fields of a log record that are not columns, or come last


def history(records: Sequence[Record]) -> dict[str, list[Any]]:
    """The columns of a history from the records of a log: those of HISTORY, others that the epochs
    have, and the seconds of training; None for a number that is missing."""
    epochs = [r for r in records if r["event"] == "epoch"]
    more = [name for name in dict.fromkeys(chain(*epochs)) if name not in (*HISTORY, *APART)]
    return {name: [r.get(name) for r in epochs] for name in (*HISTORY, *more, "seconds")}


def write(path: Path, records: Sequence[Record], parameters: Sequence[str]) -> None:
    """Write trace.h5 from the records of the log, atomically; see `tables`."""
    container.write(path, *tables(records, parameters))


def tables(
    records: Sequence[Record], parameters: Sequence[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arrays and the metadata of a trace, from the records of a log.

    history/<column>: (epochs,). layers/step: (T,). layers/<quantity>: (T, parameters), columns in
    the order of meta["parameters"]. network/<quantity>: (T,); of a model with several networks
    (T, networks), columns in the order of meta["networks"]. If the log has such records,
    conditioning/step: (C,), conditioning/<quantity>: (C, weights), columns in the order of
    meta["weights"]. float64, NaN for missing values. /meta has the unit and meaning of every
    dataset, and the number of records.
    """
    epochs = [r for r in records if r["event"] == "epoch"]
    traces = [r for r in records if r["event"] == "trace"]
    conditioning = [r for r in records if r["event"] == "conditioning"]
    arrays = {f"history/{name}": _column(epochs, name) for name in HISTORY}
    arrays["layers/step"] = _steps(traces)
    arrays |= {f"layers/{name}": _rows(traces, name, parameters) for name in LAYERS}
    networks = _networks(traces, parameters)
    for name in NETWORK:
        found = _rows(traces, name, networks) if networks else _column(traces, name)
        arrays[f"network/{name}"] = found
    about = _about(bool(conditioning), bool(networks))
    meta: dict[str, Any] = {"kind": "trace", "parameters": list(parameters), "datasets": about}
    if networks:
        meta["networks"] = networks
    meta["records"] = len(records)
    if conditioning:
        weights = list(conditioning[0]["condition_number"])
        numbers = [{"numbers": list(r["condition_number"].values())} for r in conditioning]
        arrays["conditioning/step"] = _steps(conditioning)
        arrays["conditioning/condition_number"] = _rows(numbers, "numbers", weights)
        arrays["conditioning/jacobian_norm"] = _rows(conditioning, "jacobian_norm", weights)
        meta["weights"] = weights
    return arrays, meta


def _networks(traces: Sequence[Record], parameters: Sequence[str]) -> list[str]:
    """The networks of a model that has several: the first parts of its parameters' names."""
    if not traces or not isinstance(traces[0].get("deep_relative_trust"), list):
        return []
    return sorted({name.partition("/")[0] for name in parameters})


def _about(conditioning: bool, networks: bool) -> dict[str, dict[str, str]]:
    """Shape and meaning of every dataset."""
    step, *measured = CONDITIONING.items()
    groups = [
        ("history", HISTORY, "(epochs,)"),
        ("layers", {"step": "the step measured, counting from 1"}, "(measurements,)"),
        ("layers", LAYERS, "(measurements, parameters)"),
        ("network", NETWORK, "(measurements, networks)" if networks else "(measurements,)"),
    ]
    if conditioning:
        groups.append(("conditioning", dict([step]), "(checks,)"))
        groups.append(("conditioning", dict(measured), "(checks, weights)"))
    return {
        f"{group}/{name}": {"shape": shape, "what": what}
        for group, members, shape in groups
        for name, what in members.items()
    }


def _steps(records: Sequence[Record]) -> Any:
    return np.array([r["step"] for r in records], dtype=np.int64)


def _rows(records: Sequence[Record], name: str, columns: Sequence[str]) -> Any:
    """(records, columns), from records that hold a list of numbers."""
    rows = [r[name] for r in records]
    if any(len(row) != len(columns) for row in rows):
        raise FileRefused(f"the log has {name} of other than {len(columns)} numbers")
    return np.array(rows, np.float64).reshape(len(rows), len(columns))  # None becomes NaN


def _column(records: Sequence[Record], name: str) -> Any:
    return np.array([r.get(name) for r in records], dtype=np.float64)  # None becomes NaN


def read(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arrays and the metadata of a trace file, or `FileRefused`."""
    arrays, meta = container.read(path)
    if meta.get("kind") != "trace":
        raise FileRefused(f"{path}: expected a trace; it holds {meta.get('kind')!r}")
    check(arrays, meta, path)
    return arrays, meta


def check(arrays: Mapping[str, Any], meta: Mapping[str, Any], path: object) -> None:
    """Raise `FileRefused` unless these are the tables that `write` makes, in matching shapes."""
    schema.check(meta, schema.TraceMeta, path)
    columns = {"layers": len(meta["parameters"]), "conditioning": len(meta.get("weights", ()))}
    if networks := meta.get("networks"):
        columns["network"] = len(networks)
    for name in _about("weights" in meta, bool(networks)):
        group, _, column = name.partition("/")
        counted = "layers" if group == "network" else group  # the group whose steps count its rows
        found, first = arrays.get(name), arrays.get(f"{counted}/step")
        rows = first.shape[:1] if first is not None else ()
        wide = group in columns and column != "step"
        expected = (*rows, columns[group]) if wide else rows
        if found is None or first is None:
            raise FileRefused(f"{path}: it lacks {name if found is None else counted}")
        if found.shape != expected or len(rows) != 1:
            raise FileRefused(f"{path}: expected {name} of shape {expected}; found {found.shape}")


def newest(
    path: Path, arrays: dict[str, Any], meta: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The result of `read`, or the tables of the log next to the file if it has more records.

    A run rewrites trace.h5 only now and then. If a power cut damaged the end of the log, the
    records before the damage count. Raises `FileRefused` if the log belongs to another run.
    """
    log_path, made_of = path.with_name("log.jsonl"), meta.get("records")
    made_of = made_of if type(made_of) is int else 0
    if not log_path.exists() or len(log.lines(log_path)) <= made_of:
        return arrays, meta
    records = log.sound(log_path)
    if len(records) <= made_of:
        return arrays, meta
    try:
        return tables(records, meta["parameters"])
    except (FileRefused, AttributeError, KeyError, TypeError, ValueError) as error:
        raise FileRefused(f"{log_path}: is not the log of {path} ({error})") from error
