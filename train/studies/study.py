"""What a study is: a module with `report(work)` and, if it has settings, `Options`, their types.

A recipe of the study must have the options without a default.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from npdrt.train.studies.figure import Figure
from npdrt.train.studies.recipe import Recipe
from npdrt.train.studies.sweep import Options, Run


@dataclass(frozen=True)
class Table:
    """Rows of numbers and texts below their columns' names; None is an empty cell."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]


@dataclass(frozen=True)
class Report:
    """What a study found: tables, a figure, and sentences about them."""

    tables: tuple[Table, ...]
    figure: Figure
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Work:
    """What a study is given: the recipe, its finished runs, and how to run what is left to do.

    progress: called with a label, and what is done of how much. stop: asked now and then; a
    signal number other than 0 asks to raise `Stopped`. out: the directory of the study, for what
    it computes itself and finds again.
    """

    recipe: Recipe
    runs: Sequence[Run]
    options: Options
    progress: Callable[[str, int, int], None] = lambda label, done, total: None
    stop: Callable[[], int] = lambda: 0
    out: Path = Path()


class Stopped(Exception):
    """A signal ended a study; what it computed is kept, and the same command goes on."""
