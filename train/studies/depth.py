"""Training accuracy against depth, optimizer by optimizer (Figure 3 of the NeurIPS version).

The accuracy is the mean over the last epoch's minibatches, each before its step. The fair number
of an optimizer at a depth is that of its best fixed learning rate. The authors plotted the mean
of the minibatch-wise maximum over the learning rates, which is biased upwards: a net at chance,
0.1124 on MNIST, shows as 0.129.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from npdrt.train.studies.figure import Figure, Line, Panel
from npdrt.train.studies.study import Report, Table, Work, grouped
from npdrt.train.studies.sweep import Run

Cell = tuple[str, str, int]  # optimizer, initialisation, hidden layers
ACCURACY = "train_accuracy"


def report(work: Work) -> Report:
    """Every run, and each optimizer's best at every depth, next to the authors' logs."""
    reference, epochs = work.recipe.reference, work.runs[0].config.epochs
    runs = sorted(work.runs, key=lambda run: (*_cell(run), run.config.lr))
    every = _every(runs, reference, epochs), _best(grouped(runs, _cell), reference)
    tables = every if reference else tuple(map(_ours, every))
    panels = (*_optimizers(runs, reference), *_rates(runs))
    figure = Figure("depth", f"{work.recipe.title}. {epochs} epochs.", panels)
    return Report(tables, figure, tuple(_notes(runs, reference)))


def hidden(run: Run) -> int:
    """The hidden layers of a run, which is how the authors count; the paper's L is one more."""
    return int(run.config.model_options["depth"]) - 1


def _init(run: Run) -> str:
    return str(run.config.model_options["init"])


def _optimizer(run: Run) -> str:
    return run.config.optimizer


def _cell(run: Run) -> Cell:
    return _optimizer(run), _init(run), hidden(run)


def fairest(runs: Sequence[Run]) -> float | None:
    """The accuracy at the best learning rate; None if every run diverged."""
    return max((v for run in runs if (v := run.last(ACCURACY)) is not None), default=None)


def plotted(runs: Sequence[Run]) -> float | None:
    """The authors' number: the mean over the last epoch of the maximum over the runs."""
    finished = [run for run in runs if not run.diverged]
    if not finished:
        return None
    epoch = finished[0].steps // finished[0].config.epochs
    steps = [[r["accuracy"] for r in run.records("step")[-epoch:]] for run in finished]
    return float(np.mean(np.max(steps, axis=0)))


# --- the tables --------------------------------------------------------------------------------


def _logged(reference: Mapping[str, Any], run: Run) -> dict[str, float]:
    """The authors' accuracies of the run's depth and optimizer by learning rate, and "plotted"."""
    same = run.config.data == reference.get("data") and _init(run) == "authors"
    table = reference.get(run.config.optimizer, {}) if same else {}
    for layers, *values in table.get("rows", []):
        if layers == hidden(run):
            names = [*(f"{lr:g}" for lr in table["lr"]), "plotted"]
            return dict(zip(names, values, strict=True))
    return {}


def _every(runs: Sequence[Run], reference: Mapping[str, Any], epochs: int) -> Table:
    """A row a run."""
    rows = []
    for run in runs:
        lr, value = run.config.lr, run.last(ACCURACY)
        theirs = _logged(reference, run).get(f"{lr:g}")
        ours = "diverged" if value is None else value
        rows.append((*_cell(run), lr, run.config.seed, theirs, ours))
    logged = f", {reference['epochs']} epochs" if reference else ""
    columns = ("optimizer", "init", "hidden layers", "lr", "seed", f"authors' log{logged}")
    return Table("Training accuracy of every run", (*columns, f"npdrt, {epochs} epochs"),
                 tuple(rows))  # fmt: skip


def _best(cells: Mapping[Cell, list[Run]], reference: Mapping[str, Any]) -> Table:
    """A row an optimizer, initialisation and depth: the fair number and the plotted one."""
    rows = []
    for cell, runs in cells.items():
        logged = _logged(reference, runs[0])
        shown = logged.pop("plotted", None)
        fair, tried = max(logged.values(), default=None), [f"{run.config.lr:g}" for run in runs]
        rows.append((*cell, fair, shown, ", ".join(tried), fairest(runs), plotted(runs)))
    columns = ("optimizer", "init", "hidden layers", "authors at best lr", "authors plotted")
    ours = ("lr tried", "npdrt at best lr", "npdrt as plotted")
    return Table("At the best fixed learning rate, and as the authors plotted",
                 (*columns, *ours), tuple(rows))  # fmt: skip


def _ours(table: Table) -> Table:
    """Without the authors' columns."""
    kept = [i for i, name in enumerate(table.columns) if not name.startswith("authors")]
    rows = tuple(tuple(row[i] for i in kept) for row in table.rows)
    return Table(table.title, tuple(table.columns[i] for i in kept), rows)


def _notes(runs: Sequence[Run], reference: Mapping[str, Any]) -> Iterator[str]:
    yield (
        "Hidden layers as the authors count them; the number of weight matrices L is one more. "
        '"Plotted" is the mean of the minibatch-wise maximum over the learning rates, which is '
        "biased upwards; with one learning rate it is the same number."
    )
    lost = sum(run.diverged for run in runs)
    if lost:
        theirs = (
            "; the authors' logs show 0.0987 there (argmax of NaN is class 0)" if reference else ""
        )
        yield f"{lost} runs diverged to a loss that is not finite{theirs}."


# --- the figure --------------------------------------------------------------------------------


def _optimizers(runs: Sequence[Run], reference: Mapping[str, Any]) -> Iterator[Panel]:
    """A panel an initialisation: the best fixed learning rate; dashed, the authors'."""
    colours = {name: group for group, name in enumerate(grouped(runs, _optimizer))}
    for init, same in grouped(runs, _init).items():
        lines = []
        for optimizer, group in colours.items():
            mine = grouped((run for run in same if _optimizer(run) == optimizer), hidden)
            ours = [fairest(some) for some in mine.values()]
            lines.append(Line(optimizer, list(mine), ours, "marked", group=group))
            rows = reference.get(optimizer, {}).get("rows", []) if init == "authors" else []
            if rows:
                layers, best = [row[0] for row in rows], [max(row[1:-1]) for row in rows]
                label = f"{optimizer}, authors' log"
                lines.append(Line(label, layers, best, "dashed", group=group))
        yield Panel(f"Best fixed learning rate, init {init}", "hidden layers",
                    "training accuracy", tuple(lines), ylim=(0, 1.02))  # fmt: skip


def _rates(runs: Sequence[Run]) -> Iterator[Panel]:
    """Fromage split by learning rate."""
    fromage = (run for run in runs if run.config.optimizer == "fromage")
    lines = [
        Line(f"lr {lr:g}, {init}", list(map(hidden, mine)), [r.last(ACCURACY) for r in mine],
             "marked")
        for (lr, init), mine in grouped(fromage, lambda run: (run.config.lr, _init(run))).items()
    ]  # fmt: skip
    if lines:
        yield Panel("Fromage by learning rate", "hidden layers", "training accuracy",
                    tuple(lines), ylim=(0, 1.02))  # fmt: skip
