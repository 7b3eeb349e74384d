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
from npdrt.train.studies.study import Report, Table, Work
from npdrt.train.studies.sweep import Run

Cell = tuple[str, str, int]  # optimizer, initialisation, hidden layers


def report(work: Work) -> Report:
    """Every run, and each optimizer's best at every depth, beside the authors' logs."""
    reference = work.recipe.reference
    cells: dict[Cell, list[Run]] = {}
    for run in sorted(work.runs, key=_order):
        cells.setdefault(_cell(run), []).append(run)
    tables = (_every(work, reference), _best(cells, reference))
    panels = (*_optimizers(cells, reference), *_rates(cells))
    caption = f"{work.recipe.title}. {work.runs[0].config.epochs} epochs."
    return Report(tables, Figure("depth", caption, panels), tuple(_notes(work)))


def hidden(run: Run) -> int:
    """The hidden layers of a run, which is how the authors count; the paper's L is one more."""
    return int(run.config.model_options["depth"]) - 1


def _cell(run: Run) -> Cell:
    return run.config.optimizer, run.config.model_options["init"], hidden(run)


def _order(run: Run) -> tuple[Any, ...]:
    optimizer, init, layers = _cell(run)
    return optimizer, init, layers, run.config.lr


def accuracy(run: Run) -> float | None:
    """The training accuracy of the last epoch; None where the run diverged."""
    if "diverged" in (run.result or {}):
        return None
    return float(run.records("epoch")[-1]["train_accuracy"])


def _plotted(runs: Sequence[Run]) -> float | None:
    """The authors' number: the mean over the last epoch of the maximum over the runs."""
    finished = [run for run in runs if accuracy(run) is not None]
    if not finished:
        return None
    epoch = finished[0].steps // finished[0].config.epochs
    steps = [[r["accuracy"] for r in run.records("step")[-epoch:]] for run in finished]
    return float(np.mean(np.max(steps, axis=0)))


# --- the authors' logs -------------------------------------------------------------------------


def _logged(reference: Mapping[str, Any], run: Run) -> dict[str, float]:
    """The authors' accuracies of the run's depth and optimizer by learning rate, and "plotted"."""
    same = (
        run.config.data == reference.get("data") and run.config.model_options["init"] == "authors"
    )
    table = reference.get(run.config.optimizer, {}) if same else {}
    for layers, *values in table.get("rows", []):
        if layers == hidden(run):
            names = [*(f"{lr:g}" for lr in table["lr"]), "plotted"]
            return dict(zip(names, values, strict=True))
    return {}


def _fair(logged: Mapping[str, float]) -> float | None:
    return max((v for name, v in logged.items() if name != "plotted"), default=None)


def _every(work: Work, reference: Mapping[str, Any]) -> Table:
    """A row a run."""
    rows = [
        (
            run.config.optimizer,
            run.config.model_options["init"],
            hidden(run),
            run.config.lr,
            run.config.seed,
            _logged(reference, run).get(f"{run.config.lr:g}"),
            value if (value := accuracy(run)) is not None else "diverged",
        )
        for run in sorted(work.runs, key=_order)
    ]
    epochs = work.runs[0].config.epochs
    columns = ("optimizer", "init", "hidden layers", "lr", "seed")
    logged = f", {reference['epochs']} epochs" if reference else ""
    theirs, ours = f"authors' log{logged}", f"npdrt, {epochs} epochs"
    return Table("Training accuracy of every run", (*columns, theirs, ours), tuple(rows))


def _best(cells: Mapping[Cell, list[Run]], reference: Mapping[str, Any]) -> Table:
    """A row an optimizer, initialisation and depth: the fair number and the one plotted."""
    rows = []
    for cell, runs in cells.items():
        logged = _logged(reference, runs[0])
        tried = ", ".join(f"{run.config.lr:g}" for run in runs)
        rows.append(
            (*cell, _fair(logged), logged.get("plotted"), tried, _fairest(runs), _plotted(runs))
        )
    columns = ("optimizer", "init", "hidden layers", "authors at best lr", "authors plotted")
    ours = ("lr tried", "npdrt at best lr", "npdrt as plotted")
    return Table("At the best fixed learning rate, and as the authors plotted",
                 (*columns, *ours), tuple(rows))  # fmt: skip


def _fairest(runs: Sequence[Run]) -> float | None:
    return max((v for run in runs if (v := accuracy(run)) is not None), default=None)


def _notes(work: Work) -> Iterator[str]:
    yield (
        "Hidden layers as the authors count them; the number of weight matrices L is one more. "
        '"Plotted" is the mean of the minibatch-wise maximum over the learning rates, which is '
        "biased upwards; with one learning rate it is the same number."
    )
    lost = sum(accuracy(run) is None for run in work.runs)
    if lost:
        yield (
            f"{lost} runs diverged to a loss that is not finite; the authors' logs show 0.0987 "
            "there (argmax of NaN is class 0)."
        )


# --- the figure --------------------------------------------------------------------------------


def _optimizers(cells: Mapping[Cell, list[Run]], reference: Mapping[str, Any]) -> Iterator[Panel]:
    """A panel an initialisation: the best fixed learning rate, the authors' dashed."""
    for init in dict.fromkeys(cell[1] for cell in cells):
        lines = []
        for group, optimizer in enumerate(dict.fromkeys(cell[0] for cell in cells)):
            mine = {c[2]: runs for c, runs in cells.items() if c[:2] == (optimizer, init)}
            ours = [_or_nan(_fairest(runs)) for runs in mine.values()]
            lines.append(Line(optimizer, list(mine), ours, "marked", group=group))
            theirs = reference.get(optimizer, {}).get("rows", []) if init == "authors" else []
            if theirs:
                best = [max(row[1:-1]) for row in theirs]
                layers = [row[0] for row in theirs]
                label = f"{optimizer}, authors' log"
                lines.append(Line(label, layers, best, "dashed", group=group))
        yield Panel(f"Best fixed learning rate, init {init}", "hidden layers",
                    "training accuracy", tuple(lines), ylim=(0, 1.02))  # fmt: skip


def _rates(cells: Mapping[Cell, list[Run]]) -> Iterator[Panel]:
    """Fromage split by learning rate."""
    runs = [run for cell, runs in cells.items() for run in runs if cell[0] == "fromage"]
    lines = []
    for lr, init in dict.fromkeys((r.config.lr, r.config.model_options["init"]) for r in runs):
        mine = [r for r in runs if (r.config.lr, r.config.model_options["init"]) == (lr, init)]
        x, y = [hidden(run) for run in mine], [_or_nan(accuracy(run)) for run in mine]
        lines.append(Line(f"lr {lr:g}, {init}", x, y, "marked"))
    if lines:
        yield Panel("Fromage by learning rate", "hidden layers", "training accuracy",
                    tuple(lines), ylim=(0, 1.02))  # fmt: skip


def _or_nan(value: float | None) -> float:
    return float("nan") if value is None else value
