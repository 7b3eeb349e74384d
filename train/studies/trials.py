"""Runs that differ in their seeds, as means and deviations next to the authors' (the tables).

A run's training loss and accuracy are means over an epoch's minibatches, each before its step; its
test numbers are over the whole set after the epoch, with running statistics. Some authors measured
the test accuracy in training mode. The measure "batch test_accuracy" does too: it normalises every
part of the test set, of as many images as the option `batch_statistics` says, with its own
statistics.

The measures "train_distance" and "test_distance", of a model that makes images, are those of
`npdrt.train.studies.distances`, in the features that the option `distance` says.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, cast

import numpy as np
from msgspec import Meta, Struct

from npdrt import arrays
from npdrt.arrays import to_device, to_host
from npdrt.data import Dataset
from npdrt.schema import Positive
from npdrt.train.config import example_shape
from npdrt.train.step import Task
from npdrt.train.studies import answers, distances
from npdrt.train.studies.distances import Distance
from npdrt.train.studies.figure import Figure, Line, Panel
from npdrt.train.studies.study import Report, Stopped, Table, Work, grouped
from npdrt.train.studies.sweep import Run

Groups = dict[tuple[Any, ...], list[Run]]  # runs by the values of the settings in `by`
LABELS = {"train_loss": "training loss", "train_accuracy": "training accuracy",
          "test_loss": "test loss", "test_accuracy": "test accuracy",
          "train_perplexity": "training perplexity",
          "test_perplexity": "test perplexity",
          "train_distance": "distance from the training set",
          "test_distance": "distance from the test set"}  # fmt: skip


BATCH = "batch test_accuracy"
_OF = "(train|valid|test)_(loss|accuracy|perplexity)"  # of an epoch's record
_FORMS = (
    BATCH,
    *answers.MEASURES,
    *distances.MEASURES,
    f"(max )?{_OF}(@[1-9][0-9]{{0,6}})?",
    f"{_OF} at least {_OF}",
)
Measure = Annotated[str, Meta(pattern="^({})$".format("|".join(_FORMS)))]


class Options(Struct):
    """by: settings that tell groups of runs apart. remarks: sentences that are printed. measures:
    "train_loss", "train_loss@50" (after 50 epochs), "max test_accuracy", "batch test_accuracy",
    "test_perplexity at least valid_loss" (at the epoch of the least valid_loss), "f1"."""

    by: list[str]
    measures: list[Measure]
    batch_statistics: Positive | None = None
    distance: Distance | None = None
    remarks: list[str] = []

    def __post_init__(self) -> None:
        if BATCH in self.measures and self.batch_statistics is None:
            raise ValueError(f"the measure {BATCH!r} needs the option batch_statistics")
        if set(distances.MEASURES) & set(self.measures) and self.distance is None:
            raise ValueError("a measure of the distance needs the option distance")


def report(work: Work) -> Report:
    """A table a measure, all runs, and the curves of each group's mean."""
    options, groups = work.recipe.options, _groups(work)
    found = {run: _measures(work, run, i) for i, run in enumerate(work.runs)}
    tables = [_table(work, groups, found, name) for name in options["measures"]]
    panels = tuple(_panels(options["by"], groups))
    notes = ["Mean and population standard deviation over the trials."]
    if "distance" in options:
        notes.append(f"The distance: {distances.name(work)}.")
    return Report(
        (*tables, _every(work, groups, found)),
        Figure("trials", work.recipe.title, panels, columns=2),
        (*notes, *options.get("remarks", ())),
    )


def _groups(work: Work) -> Groups:
    by = work.recipe.options["by"]
    return grouped(work.runs, lambda run: tuple(run.setting(name) for name in by))


# --- measures --------------------------------------------------------------------------------


def _measures(work: Work, run: Run, index: int) -> dict[str, float]:
    """Every measure that a run has; none if it diverged."""
    if work.stop():
        raise Stopped
    work.progress("measures", index + 1, len(work.runs))
    if run.diverged:
        return {}
    history = run.records("epoch")
    values = {name: _measure(work, run, history, name) for name in work.recipe.options["measures"]}
    return {name: value for name, value in values.items() if value is not None}


def _measure(work: Work, run: Run, history: Sequence[Any], name: str) -> float | None:
    if name == BATCH:
        return with_batch_statistics(work, run, work.recipe.options["batch_statistics"])
    if name in answers.MEASURES:
        return answers.scores(work, run)[name]
    if name in distances.MEASURES:
        return distances.distances(work, run).get(name)
    if " at least " in name:
        what, least = name.split(" at least ")
        known = [r for r in history if r.get(least) is not None and r.get(what) is not None]
        return float(min(known, key=lambda record: record[least])[what]) if known else None
    what, _, epoch = name.removeprefix("max ").partition("@")
    series = [record.get(what) for record in history]
    if None in series or int(epoch or 1) > len(series):
        return None
    if name.startswith("max "):
        return float(max(series))
    return float(series[int(epoch or 0) - 1])


def with_batch_statistics(work: Work, run: Run, size: int) -> float | None:
    """The test accuracy of a run's last checkpoint in training mode, in parts of `size` images;
    None without a test set. Kept in the run's directory."""
    source = work.data(run)
    if source.x_test is None:
        return None
    found = run.kept(
        f"batch-statistics-{size}", lambda: {"right": _right_in_training(work, run, source, size)}
    )
    return int(found["right"]) / len(source.x_test)


def _right_in_training(work: Work, run: Run, source: Dataset, size: int) -> int:
    """How many test images are classified right in training mode."""
    config, where = run.config, arrays.device(work.options.device)
    model, checkpoint = work.trained(run)
    task, shape, right = Task(model, source.classes), example_shape(model, source), 0
    with arrays.on(where):
        params, buffers = (
            {name: to_device(value, where) for name, value in group.items()}
            for group in (checkpoint.params, checkpoint.buffers)
        )
        x_test, y_test = cast(Any, source.x_test), cast(Any, source.y_test)  # it has a test set
        for start in range(0, len(x_test), size):
            x = x_test[start : start + size]  # (size, features)
            x = to_device(x.reshape(len(x), *shape).astype(config.dtype), where)  # (size, *shape)
            y = to_device(y_test[start : start + size], where)  # (size,)
            right += int(to_host(task.correct(model.apply(params, buffers, x, train=True)[0], y)))
    return right


# --- tables ----------------------------------------------------------------------------------


def _table(work: Work, groups: Groups, found: Mapping[Run, Any], name: str) -> Table:
    """A row a group: the authors' number of a measure, and our mean and deviation."""
    by, rows = work.recipe.options["by"], []
    for key, runs in groups.items():
        values = [found[run][name] for run in runs if name in found[run]]
        lost = sum(run.diverged for run in runs)
        theirs = _spread(_authors(work, key).get(name))
        rows.append((*map(_cell, key), *theirs, *_spread(values), len(runs), lost))
    columns = ("authors", "+-", "npdrt", "+-", "trials", "diverged")
    return Table(_title(name), (*map(_short, by), *columns), tuple(rows))


def _authors(work: Work, key: tuple[Any, ...]) -> Mapping[str, Any]:
    """The row of the recipe's reference with the values of a group; {} if there is none, or the
    runs have other data."""
    by, reference = [_short(name) for name in work.recipe.options["by"]], work.recipe.reference
    same = reference.get("data") == work.runs[0].config.data
    for row in reference.get("row", []) if same else []:
        if all(row.get(name) == value for name, value in zip(by, key, strict=True)):
            return dict(row)
    return {}


def _spread(values: Any) -> tuple[float | None, float | None]:
    """Mean and population deviation of some trials, or those printed as {mean, std}."""
    if isinstance(values, Mapping):
        return values["mean"], values.get("std")
    if not values:
        return None, None
    return float(np.mean(values)), float(np.std(values)) if len(values) > 1 else None


def _every(work: Work, groups: Groups, found: Mapping[Run, Any]) -> Table:
    """A row a run."""
    options, rows = work.recipe.options, []
    for key, runs in groups.items():
        for run in runs:
            numbers = (found[run].get(name) for name in options["measures"])
            state = "diverged" if run.diverged else ""
            rows.append((*map(_cell, key), run.config.seed, *numbers, state))
    columns = (*map(_short, options["by"]), "seed", *map(_title, options["measures"]), "")
    return Table("Every run", columns, tuple(rows))


def _short(name: str) -> str:
    return name.rpartition(".")[2]


def _cell(value: Any) -> Any:
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else value


def _title(name: str) -> str:
    """The measure in words."""
    if " at least " in name:
        what, least = name.split(" at least ")
        return f"{LABELS.get(what, what)} at the least {least}"
    largest, batch = name.startswith("max "), name.startswith("batch ")
    what, _, epoch = name.removeprefix("max ").removeprefix("batch ").partition("@")
    words = LABELS.get(what, what)
    words = f"largest {words}" if largest else words
    return words + (f" after {epoch} epochs" if epoch else ", batch statistics" if batch else "")


# --- the figure ------------------------------------------------------------------------------


def _panels(by: Sequence[str], groups: Groups) -> Iterator[Panel]:
    """The mean over each group's trials of loss and accuracy against the epoch."""
    for what, words in LABELS.items():
        lines = tuple(_lines(by, groups, what))
        if lines:
            positive = "loss" in what and all((line.y > 0).all() for line in lines)
            yield Panel(words, "epoch", words, lines, ylog=positive)


def _lines(by: Sequence[str], groups: Groups, what: str) -> Iterator[Line]:
    for group, (key, runs) in enumerate(groups.items()):
        finished = [run for run in runs if not run.diverged]
        curves = [[r[what] for r in run.records("epoch") if what in r] for run in finished]
        if curves and curves[0]:
            mean = np.mean(curves, axis=0)
            names = (f"{_short(name)} {_cell(v)}" for name, v in zip(by, key, strict=True))
            style = "line" if len(mean) > 1 else "points"
            yield Line(", ".join(names), range(1, len(mean) + 1), mean, style, group=group)
