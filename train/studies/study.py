"""A study is a module of this package that `npdrt.train.studies.reproduce.STUDIES` names.

report(work: Work) -> Report    tables and a figure of the runs of a recipe
Options                         if it has settings: a Struct of their types; a recipe must have
                                those without a default
NEEDS_RUNS = False              if it computes without runs
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from npdrt import store
from npdrt.data import Dataset
from npdrt.store import Checkpoint
from npdrt.train.config import build_model, load_data
from npdrt.train.studies.figure import Figure
from npdrt.train.studies.recipe import Recipe
from npdrt.train.studies.sweep import Options, Run

Key = TypeVar("Key")


@dataclass(frozen=True)
class Table:
    """Rows of numbers and texts below their columns' names; None is an empty cell."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]


@dataclass(frozen=True)
class Report:
    """The findings of a study: tables, a figure, and sentences about them."""

    tables: tuple[Table, ...]
    figure: Figure
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Work:
    """The input of a study: the recipe, its finished runs, and how to compute more.

    progress: called with a label, the parts done and the parts in all. stop: asked now and then; a
    signal number other than 0 asks to raise `Stopped`. out: the directory of the study, for files
    of its own.
    """

    recipe: Recipe
    runs: Sequence[Run]
    options: Options
    progress: Callable[[str, int, int], None] = lambda label, done, total: None
    stop: Callable[[], int] = lambda: 0
    out: Path = Path()

    def data(self, run: Run) -> Dataset:
        """The data set of a run."""
        config, folder = run.config, self.options.data_dir
        return load_data(config, folder)

    def trained(self, run: Run) -> tuple[Any, Checkpoint]:
        """The model of a run, and its last checkpoint."""
        return build_model(run.config, self.data(run)), store.load_newest(run.path)[0]


class Stopped(Exception):
    """A signal ended a study; what it computed is kept, and the same command goes on."""


def grouped(runs: Iterable[Run], key: Callable[[Run], Key]) -> dict[Key, list[Run]]:
    """The runs by their key, in the order in which the keys first appear."""
    groups: dict[Key, list[Run]] = {}
    for run in runs:
        groups.setdefault(key(run), []).append(run)
    return groups
