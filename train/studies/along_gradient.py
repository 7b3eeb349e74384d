"""Loss and gradient along the layerwise gradient at snapshots of training (Figure 1)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from msgspec import Struct

from npdrt.schema import Count, Number, Positive
from npdrt.train.studies import slices
from npdrt.train.studies.figure import Figure, Line, Panel
from npdrt.train.studies.slices import Slices
from npdrt.train.studies.study import Report, Stopped, Table, Work, grouped
from npdrt.train.studies.sweep import Run

SHOWN = (0.0, 0.01, 0.03, 0.099)


class Whole(Struct):
    """A step of a run that is sliced on all examples; the other keys are the run's settings."""

    step: Count


class Options(Struct):
    """eta: the grid; examples of a slice; whole: steps sliced on all examples."""

    eta: list[Number] | None = None
    examples: Positive | None = None
    whole: list[Whole] = []


def report(work: Work) -> Report:
    """Slice every run: loss, gradient change and the best eta, next to the authors' logs."""
    sliced = {run: _slices(work, run, i) for i, run in enumerate(work.runs)}
    tables: list[Table] = []
    panels: list[Panel] = []
    notes: list[str] = []
    for name, runs in _nets(work).items():
        found = {run: sliced[run] for run in runs}
        logged = _logged(work, runs[0])
        tables += [_accuracies(name, runs, logged), _values(name, found, logged)]
        panels += _panels(name, runs[0], sliced[runs[0]])
        notes += [_whole(work, run, name) for run in runs if _steps(work, run)]
    caption = f"{work.recipe.title}. Slices over {_size(sliced)} training examples."
    return Report(
        tuple(tables), Figure("slices", caption, _comparable(panels), columns=3), tuple(notes)
    )


def _slices(work: Work, run: Run, index: int) -> Slices:
    options = work.recipe.options
    return _sliced(work, run, f"slices {index + 1}/{len(work.runs)}", options.get("examples"))


def _sliced(work: Work, run: Run, label: str, examples: int | None, **more: Any) -> Slices:
    found = slices.slices(
        run.path,
        eta=work.recipe.options.get("eta", slices.AUTHORS_GRID),
        examples=examples,
        fast=work.options.fast,
        data_dir=work.options.data_dir,
        code=work.options.code,
        progress=lambda done, total: work.progress(label, done, total),
        stop=work.stop,
        **more,
    )
    if work.stop():
        raise Stopped
    return found


def _nets(work: Work) -> dict[str, list[Run]]:
    """The runs of each net, which differ in their seeds."""

    def name(run: Run) -> str:
        options = run.config.model_options
        return f"{options['depth']} layers" + (", residual" if options["residual"] else "")

    return grouped(work.runs, name)


def _logged(work: Work, run: Run) -> Mapping[str, Any]:
    """The authors' log of the run's net; {} if there is none."""
    options = run.config.model_options
    for net in work.recipe.reference.get("net", []):
        same = (net["depth"], net["residual"]) == (options["depth"], options["residual"])
        if same and run.config.data == work.recipe.reference["data"]:
            return dict(net)
    return {}


def _accuracies(name: str, runs: list[Run], logged: Mapping[str, Any]) -> Table:
    """Training accuracy of each epoch's minibatches, each before its step; test at the end."""
    rows = []
    theirs = list(logged.get("accuracy", []))
    if theirs:
        rows.append(("authors' log", *theirs, logged.get("test_accuracy")))
    for run in runs:
        epochs = run.records("epoch")
        mine = [record["train_accuracy"] for record in epochs]
        rows.append((f"npdrt, seed {run.config.seed}", *mine, epochs[-1]["test_accuracy"]))
    count = len(rows[-1]) - 2
    columns = ("training accuracy, epoch", *map(str, range(1, count + 1)), "test")
    return Table(name, columns, tuple(rows))


def _values(name: str, found: Mapping[Run, Slices], logged: Mapping[str, Any]) -> Table:
    """The best eta, the loss and the first layer's gradient change at SHOWN, at each snapshot.

    The last column is the ratio of the runs' geometric mean to the authors' number.
    """
    first = next(iter(found.values()))
    rows: list[tuple[Any, ...]] = []
    for i, epoch in enumerate(first.epoch):
        theirs = _snapshot(logged, int(first.step[i]))
        columns = [_quantities(s, i) for s in found.values()]
        for what in columns[0]:
            values = [column[what] for column in columns]
            reference = theirs.get(what)
            rows.append(
                (round(float(epoch), 2), what, reference, *values, _ratio(values, reference))
            )
    seeds = (f"seed {run.config.seed}" for run in found)
    return Table(name, ("epoch", "quantity", "authors' log", *seeds, "ratio"), tuple(rows))


def _quantities(found: Slices, i: int) -> dict[str, float]:
    """The rows of the table for one snapshot."""
    at = {eta: k for eta in SHOWN for k in np.flatnonzero(np.isclose(found.eta, eta, atol=1e-9))}
    values = {"best eta": float(found.best()[i])}
    values |= {f"loss at {eta:g}": float(found.loss[i, k]) for eta, k in at.items()}
    changes = {eta: float(found.first_layer[i, k]) for eta, k in at.items() if eta}
    values |= {f"gradient change at {eta:g}": value for eta, value in changes.items()}
    bounds = {eta: float(found.bound()[i, k]) for eta, k in at.items() if eta}
    return values | {f"bound on the loss at {eta:g}": value for eta, value in bounds.items()}


def _snapshot(logged: Mapping[str, Any], step: int) -> dict[str, float]:
    """The authors' numbers at one snapshot, named as `_quantities` names them."""
    for snapshot in logged.get("snapshot", []):
        if snapshot["step"] == step:
            eta, loss, change = logged["eta"], snapshot["loss"], snapshot["change"]
            values = {"best eta": snapshot["best"]}
            values |= {f"loss at {e:g}": v for e, v in zip(eta, loss, strict=True)}
            changes = zip(eta, change, strict=True)
            return values | {f"gradient change at {e:g}": v for e, v in changes}
    return {}


def _ratio(values: list[float], reference: float | None) -> float | None:
    if not reference or min(values) <= 0:
        return None
    return math.exp(sum(math.log(value) for value in values) / len(values)) / reference


def _panels(name: str, run: Run, found: Slices) -> Iterator[Panel]:
    """The paper's column for one net: training accuracy, loss, gradient change."""
    steps = run.records("step")
    accuracy = np.array([record["accuracy"] for record in steps])
    x = np.array([record["step"] for record in steps]) / (run.steps / run.config.epochs)
    smooth = np.convolve(accuracy, np.ones(5), "same") / np.convolve(
        np.ones_like(accuracy), np.ones(5), "same"
    )
    yield Panel(
        name, "epoch", "training accuracy", (Line("", x, smooth),), note="mean of 5 minibatches"
    )
    for panel in slices.as_figure(found).panels:
        yield Panel(name, panel.xlabel, panel.ylabel, panel.lines, ylog=True)


def _comparable(panels: Sequence[Panel]) -> tuple[Panel, ...]:
    """The panels with one y axis for each quantity, so that the nets can be compared."""
    limits = {}
    for name in {panel.ylabel for panel in panels if panel.ylog}:
        values = np.concatenate([line.y for p in panels if p.ylabel == name for line in p.lines])
        values = values[np.isfinite(values) & (values > 0)]
        limits[name] = (values.min() / 1.5, values.max() * 1.5)
    return tuple(dataclasses.replace(p, ylim=limits.get(p.ylabel)) for p in panels)


# --- snapshots on all examples ---------------------------------------------------------------


def _steps(work: Work, run: Run) -> list[int]:
    """The snapshots of a run to be sliced on all examples too."""
    settings = {"seed": run.config.seed, **run.config.model_options}
    return [
        whole["step"]
        for whole in work.recipe.options.get("whole", [])
        if all(settings[name] == value for name, value in whole.items() if name != "step")
    ]


def _whole(work: Work, run: Run, name: str) -> str:
    """A sentence on how far a slice on all examples is from the one on some."""
    part = slices.read(run.path / "slices.h5")
    found = _sliced(work, run, "whole set", None, steps=_steps(work, run), name="slices-whole.h5")
    i = int(np.flatnonzero(part.step == found.step[0])[0])
    loss = np.nanmax(abs(np.log10(found.loss[0] / part.loss[i])))
    change = np.nanmax(abs(np.log10(found.first_layer[0, 1:] / part.first_layer[i, 1:])))
    return (
        f"{name}, epoch {found.epoch[0]:g}, on all {found.settings['examples']} examples: best "
        f"eta {found.best()[0]:g} ({part.best()[i]:g} on {part.settings['examples']}); along the "
        f"slice the loss differs by at most a factor {10**loss:.3g}, the gradient change by "
        f"{10**change:.3g}"
    )


def _size(sliced: Mapping[Run, Slices]) -> str:
    return " or ".join(sorted({str(found.settings["examples"]) for found in sliced.values()}))
