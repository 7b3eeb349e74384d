"""The figure of a file: of a run's trace, of slices, or of a study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from npdrt.errors import Error, FileRefused
from npdrt.store import container, trace
from npdrt.train.studies import slices
from npdrt.train.studies.figure import Figure, Line, Panel, from_json


def load(path: Path) -> Figure:
    """The figure of a run directory, its trace.h5, a study, slices, or a sweep's directory, which
    stands for its study.

    Raises `Error` if there is no such file and `FileRefused` if it is damaged or holds something
    else.
    """
    file = container.within(path, "trace.h5", "study.h5")
    if not file.exists():
        told = container.missing(path, file.name)
        raise Error(f"{told}; give a run directory, a trace, a study or slices")
    arrays, meta = container.read(file)
    if meta.get("kind") == "slices":
        return slices.as_figure(slices.read(file))
    if meta.get("kind") == "trace":
        arrays, meta = trace.newest(file, arrays, meta)
    try:
        if meta.get("kind") == "trace":
            trace.check(arrays, meta, "the trace is not of the form that npdrt writes")
            return from_trace(arrays, meta, name=file.resolve().parent.name)
        if "figure" in arrays:
            return from_json(arrays["figure"])
    except FileRefused as error:
        raise FileRefused(f"{file}: {error}") from error
    raise FileRefused(
        f"{file}: expected a trace, a study or slices; it holds {_what(meta)}; give the "
        "run directory to see how a run went"
    )


def overlay(paths: Sequence[Path]) -> Figure:
    """Several runs in one picture: a colour for each, its training minibatches as a line and its
    test set dashed."""
    names = _names(paths)
    runs = [_trace(path) for path in paths]
    unit = "mean loss (nats)" if all(map(_classified, runs)) else "mean loss"
    loss = _compared(runs, names, "loss")
    positive = all((line.y[np.isfinite(line.y)] > 0).all() for line in loss)
    panels = [Panel("Loss", "epoch", unit, loss, ylog=positive)]
    if accuracy := _compared(runs, names, "accuracy"):
        share = "accuracy (share of samples)"
        panels.append(Panel("Accuracy", "epoch", share, accuracy, ylim=(0, 1.02)))
    rates = [
        Line(name, run["history/epoch"], run["history/lr"], _style(run), group=group)
        for group, (name, run) in enumerate(zip(names, runs, strict=True))
    ]
    panels.append(Panel("Learning rate", "epoch", "learning rate", tuple(rates)))
    return Figure("runs", f"Training runs {', '.join(names)}; test sets dashed", tuple(panels))


def _names(paths: Sequence[Path]) -> list[str]:
    """The names of runs: those of their directories, or the whole paths if these do not differ."""
    short = [container.within(path, "trace.h5").resolve().parent.name for path in paths]
    return short if len(set(short)) == len(short) else list(map(str, paths))


def _trace(path: Path) -> Mapping[str, Any]:
    """The tables of a run."""
    file = container.within(path, "trace.h5")
    if not file.exists():
        raise Error(f"{container.missing(path, file.name)}; several are drawn only of runs")
    return trace.newest(file, *trace.read(file))[0]


def _classified(run: Mapping[str, Any]) -> bool:
    return bool(np.isfinite(run["history/train_accuracy"]).any())


def _style(run: Mapping[str, Any]) -> str:
    return "line" if len(run["history/epoch"]) > 1 else "points"


def _compared(
    runs: Sequence[Mapping[str, Any]], names: Sequence[str], quantity: str
) -> tuple[Line, ...]:
    """A line a run of the training minibatches, and one of the test set."""
    lines = []
    for group, (name, run) in enumerate(zip(names, runs, strict=True)):
        for part, label in (("train", name), ("test", "")):
            y = run[f"history/{part}_{quantity}"]
            dashed = "dashed" if part == "test" and _style(run) == "line" else _style(run)
            if np.isfinite(y).any():
                lines.append(Line(label, run["history/epoch"], y, dashed, group=group))
    return tuple(lines)


def _what(meta: Mapping[str, Any]) -> str:
    if "figure" in meta:
        return "a study of an older npdrt, which the same `npdrt reproduce` writes again"
    return repr(meta["kind"]) if "kind" in meta else "a checkpoint or arrays, and no figure"


def from_trace(arrays: Mapping[str, Any], meta: Mapping[str, Any], *, name: str = "run") -> Figure:
    """How a run went, from its trace (`npdrt.store.trace`): loss, accuracy and learning rate
    against the epoch; norm, relative update and cosine of every weight and the deep relative trust
    of the network against the step; condition numbers and Jacobian norms if they were taken."""
    try:
        panels = [*_history_panels(arrays), *_layer_panels(arrays, meta["parameters"])]
        panels += [
            *_network_panels(arrays, meta.get("networks")),
            *_conditioning_panels(arrays, meta.get("weights")),
        ]
    except (Error, KeyError, TypeError, ValueError, IndexError) as error:
        raise FileRefused(
            f"the trace is not of the form that npdrt writes ({type(error).__name__}: {error})"
        ) from error
    return Figure(name, f"Training run {name}", tuple(panels))


def _history_panels(arrays: Mapping[str, Any]) -> list[Panel]:
    epoch = arrays["history/epoch"]
    style = "line" if len(epoch) > 1 else "points"

    def lines(quantity: str) -> list[Line]:
        named = {"train": "training minibatches", "test": "test set"}
        columns = {label: arrays[f"history/{part}_{quantity}"] for part, label in named.items()}
        return [Line(k, epoch, v, style) for k, v in columns.items() if np.isfinite(v).any()]

    accuracy, loss = lines("accuracy"), lines("loss")
    unit = "mean loss (nats)" if accuracy else "mean squared error"
    positive = all((line.y[np.isfinite(line.y)] > 0).all() for line in loss)
    panels = [Panel("Loss", "epoch", unit, tuple(loss), ylog=positive)]
    if accuracy:
        share = "accuracy (share of samples)"
        panels.append(Panel("Accuracy", "epoch", share, tuple(accuracy), ylim=(0, 1.02)))
    rate = Line("", epoch, arrays["history/lr"], style)
    return [*panels, Panel("Learning rate", "epoch", "learning rate", (rate,))]


def _layer_panels(arrays: Mapping[str, Any], parameters: list[str]) -> list[Panel]:
    """The weights by the step; nothing if none was traced."""
    if not len(arrays["layers/step"]):
        return []
    shown = [name for name in parameters if name.endswith("weight")] or parameters

    def lines(quantity: str) -> tuple[Line, ...]:
        return _by_layer(arrays, f"layers/{quantity}", parameters, shown)

    cosine, x = lines("cosine"), "training step"
    low = -1.05 if any((line.y < 0).any() for line in cosine) else 0.0
    return [
        Panel("Weight norm", x, "2-norm of the weight", lines("weight_norm"), ylog=True),
        Panel("Relative update", x, "norm of the change over norm of the weight",
              lines("relative_update"), ylog=True),
        Panel("Direction", x, "cosine of change and negative gradient", cosine, ylim=(low, 1.05)),
    ]  # fmt: skip


def _by_layer(
    arrays: Mapping[str, Any], table: str, names: list[str], shown: list[str]
) -> tuple[Line, ...]:
    """A line a column of the table that is shown, shaded from the first to the last."""
    step, last = arrays[f"{table.partition('/')[0]}/step"], max(len(shown) - 1, 1)
    style = "line" if len(step) > 1 else "points"
    return tuple(
        Line(name, step, arrays[table][:, names.index(name)], style, shade=place / last)
        for place, name in enumerate(shown)
    )


def _network_panels(arrays: Mapping[str, Any], networks: list[str] | None) -> list[Panel]:
    """The distance of each measured step, a line a network; nothing if none was measured."""
    step, distance = arrays["layers/step"], arrays["network/log_deep_relative_trust"]
    if not np.isfinite(distance).any():
        return []
    style, columns = "line" if len(step) > 1 else "points", distance.reshape(len(step), -1).T
    names = networks or [""]
    lines = tuple(Line(n, step, y, style) for n, y in zip(names, columns, strict=True))
    trust = "log prod(1 + r), r the relative updates"
    return [Panel("Deep relative trust", "training step", trust, lines, ylog=True)]


def _conditioning_panels(arrays: Mapping[str, Any], weights: list[str] | None) -> list[Panel]:
    """Condition numbers of `npdrt train --conditioning`, and Jacobians if the model has them."""
    if not weights:
        return []
    titles = {
        "condition_number": ("Condition number", "largest over smallest singular value"),
        "jacobian_norm": ("Layer Jacobian", "norm of d output / d input of the layer"),
    }
    return [
        Panel(
            *(title, "training step", unit), _by_layer(arrays, table, weights, weights), ylog=True
        )
        for quantity, (title, unit) in titles.items()
        if np.isfinite(arrays[table := f"conditioning/{quantity}"]).any()
    ]
