"""Learning-rate grids: the best error over the error at each rate (NeurIPS version, Figure 4)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from msgspec import Struct

from npdrt import optim
from npdrt.train.studies import distances
from npdrt.train.studies.distances import Distance
from npdrt.train.studies.figure import Figure, Line, Panel
from npdrt.train.studies.study import Report, Table, Work, grouped
from npdrt.train.studies.sweep import Run

# The authors' benchmarks: their error is over the last epoch's minibatches, each before its step.
AS_LOGGED = ("resnet18", "transformer")
RULES = tuple(optim.RULES)  # in the order of the tables and colours
Grid = dict[float, float]  # error by learning rate; inf if the run diverged


class Options(Struct):
    """distance: the error of the runs of an adversarial network."""

    distance: Distance | None = None


def report(work: Work) -> Report:
    """The error over each optimizer's grid, and the best error over the error."""
    tables, panels = [], []
    for name, runs in grouped(work.runs, _benchmark).items():
        ours = _grids(work, runs)
        tables.append(_table(f"npdrt: {name}, {_what(work, runs[0])}", ours))
        panels.append(_panel(f"npdrt: {name}", ours))
    for benchmark in work.recipe.reference.get("benchmark", []):
        theirs = _logged(benchmark)
        title = f"Authors: {benchmark['name']}, {benchmark['error']}"
        tables.append(_table(title, theirs))
        panels.append(_panel(f"Authors: {benchmark['name']}", theirs))
    figure = Figure("rates", work.recipe.title, tuple(panels))
    notes = (
        "The figure divides each optimizer's best error by its error at a rate, so 1 is its own "
        "best rate: it shows how sharply an optimizer must be tuned, not which reaches less.",
    )
    return Report(tuple(tables), figure, notes)


def _benchmark(run: Run) -> str:
    return f"{run.config.model} on {run.config.data}"


def _grids(work: Work, runs: Sequence[Run]) -> dict[str, Grid]:
    """The error by optimizer and learning rate."""
    grids: dict[str, Grid] = {}
    for run in runs:
        grids.setdefault(run.config.optimizer, {})[float(run.config.lr)] = _error(work, run)
    return {name: grids[name] for name in RULES if name in grids}


def _what(work: Work, run: Run) -> str:
    epochs = f"{run.config.epochs} epoch{'s' * (run.config.epochs > 1)}"
    if run.config.model == "gan":
        return f"{distances.name(work)}, {epochs}"
    where = "of the minibatches" if run.config.model in AS_LOGGED else "over the whole set"
    return f"training {_measure(run)} {where}, {epochs}"


def _measure(run: Run) -> str:
    return "perplexity" if run.config.model == "transformer" else "loss"


def _error(work: Work, run: Run) -> float:
    """The training loss or perplexity, of the last epoch or after it, or the distance from the
    training images; inf if the run diverged."""
    if run.config.model == "gan" and not run.diverged:
        return distances.distances(work, run)["train_distance"]
    if run.config.model in AS_LOGGED:
        error = run.last(f"train_{_measure(run)}")
        return math.inf if error is None else error
    return float((run.result or {}).get("train_loss", math.inf))


def _logged(benchmark: Mapping[str, Any]) -> dict[str, Grid]:
    rates = benchmark["lr"]
    return {
        name: dict(zip(rates, benchmark[name], strict=True)) for name in RULES if name in benchmark
    }


def normalised(grid: Grid) -> Grid:
    """The best error over the error at each rate; 0 if a run diverged."""
    best = min(grid.values())
    return {lr: best / error if error > 0 else 1.0 for lr, error in grid.items()}


def _table(title: str, grids: Mapping[str, Grid]) -> Table:
    rates = sorted({lr for grid in grids.values() for lr in grid}, reverse=True)
    rows = [
        (name, f"{min(grid, key=lambda lr: grid[lr]):g}", *(_shown(grid.get(lr)) for lr in rates))
        for name, grid in grids.items()
    ]
    return Table(title, ("optimizer", "best lr", *(f"{lr:g}" for lr in rates)), tuple(rows))


def _shown(error: float | None) -> Any:
    return "diverged" if error == math.inf else error


def _panel(title: str, grids: Mapping[str, Grid]) -> Panel:
    lines = []
    for name, grid in grids.items():
        x = sorted(grid)
        scores = normalised(grid)
        y = [scores[lr] for lr in x]
        lines.append(Line(name, x, y, "marked", group=RULES.index(name)))
    return Panel(title, "learning rate", "best error over error", tuple(lines), xlog=True,
                 ylim=(0, 1.05))  # fmt: skip
