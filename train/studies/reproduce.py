"""Reproduce a recipe: make its runs, and compare them with the paper's numbers."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from npdrt import arrays, schema
from npdrt.errors import Error
from npdrt.store import container
from npdrt.store.lock import exclusive
from npdrt.store.log import finite
from npdrt.train.config import Config
from npdrt.train.own import check_names
from npdrt.train.provenance import provenance
from npdrt.train.studies import sweep
from npdrt.train.studies.figure import to_json
from npdrt.train.studies.recipe import Recipe
from npdrt.train.studies.study import Report, Stopped, Work
from npdrt.train.studies.sweep import Options, Run

STUDIES = {  # by the name in a recipe, the module
    **{name: name for name in ("depth", "generators", "norms", "random_matrix", "rates")},
    **{
        name: name for name in ("regions", "singular_values", "surrogate", "transmission", "trials")
    },
    "slices": "along_gradient",
}


def reproduce(
    recipe: Recipe,
    out: Path,
    options: Options,
    *,
    as_is: bool = False,
    progress: Callable[[str, int, int], None] = lambda label, done, total: None,
    stop: Callable[[], int] = lambda: 0,
) -> Report:
    """Make the runs of a recipe in OUT/runs, study them, and write OUT/study.h5.

    as_is: make no run, and study those that are finished; a note says which are missing.
    Raises `Stopped` after a signal; the same call then continues. Raises `Error` if there is
    nothing to study.
    """
    check_names("study", {recipe.study: None}, list(STUDIES))
    study = importlib.import_module(f"npdrt.train.studies.{STUDIES[recipe.study]}")
    check_options(recipe, getattr(study, "Options", NoOptions))
    if as_is:
        runs = sweep.runs(recipe, out, options)
    else:
        told = partial(progress, "runs")
        runs = sweep.sweep(recipe, out, options, stop=stop, progress=told)
    if stop():
        raise Stopped
    finished = [run for run in runs if run.result is not None]
    if not runs and getattr(study, "NEEDS_RUNS", True):
        raise Error(f"{recipe.name} has no runs at scale {recipe.scale}; give it a grid")
    if runs and not finished:
        raise Error(f"none of the {len(runs)} runs in {out / 'runs'} is finished")
    with exclusive(out, make=True):
        report = _studied(study, Work(recipe, finished, options, progress, stop, out))
        report = replace(report, notes=(*report.notes, *_missing(runs)))
        _write(out / "study.h5", recipe, report, options)
    return report


def _studied(study: Any, work: Work) -> Report:
    """The study's report. A user's recipe may give it runs or references that it cannot use: that
    is an `Error`, not a fault of npdrt."""
    try:
        report: Report = study.report(work)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise Error(
            f"{work.recipe.name}: the study {work.recipe.study} cannot use its runs or its "
            f"[reference] ({type(error).__name__}: {error}); see the recipes that come with npdrt"
        ) from error
    return report


class NoOptions(Struct):
    """Of a study without settings."""


def check_options(recipe: Recipe, kind: type[Struct]) -> None:
    """Refuse unknown options, values of another type, and a recipe without a needed option."""
    known = msgspec.structs.fields(kind)
    check_names(f"option of study {recipe.study}:", recipe.options, [f.name for f in known])
    missing = [f.name for f in known if f.required and f.name not in recipe.options]
    if missing:
        raise Error(
            f"{recipe.name}: study {recipe.study} needs {', '.join(missing)} in [options]; see "
            "the recipes that come with npdrt"
        )
    schema.check(dict(recipe.options), kind, f"{recipe.name}, [options]")


def _missing(runs: Sequence[Run]) -> list[str]:
    """A note on the runs that are not finished; none if all are."""
    missing = [run for run in runs if run.result is None]
    named = "; ".join(_named(run.config) for run in missing)
    return [f"{len(missing)} of {len(runs)} runs are not finished: {named}."] if missing else []


def _named(config: Config) -> str:
    model = config.model_options
    net = f"{model['depth']} matrices" if "depth" in model else config.model
    return (
        f"{config.optimizer} lr {config.lr:g}, {net}, init {model.get('init')}, "
        f"batch {config.batch_size}, seed {config.seed}"
    )


def summary(recipe: Recipe, report: Report) -> dict[str, Any]:
    """The claim of the recipe and the findings of the study, as JSON values."""
    about = ("name", "scale", "title", "source", "statement", "note")
    tables = [
        {"title": t.title, "columns": list(t.columns), "rows": finite(t.rows)}
        for t in report.tables
    ]
    found = {"tables": tables, "notes": list(report.notes)}
    return {**{name: getattr(recipe, name) for name in about}, **found}


def _write(path: Path, recipe: Recipe, report: Report, options: Options) -> None:
    made = provenance(arrays.device(options.device), {})
    envelope = {"kind": "study", **summary(recipe, report), "provenance": made}
    container.write(path, {"figure": to_json(report.figure)}, envelope)
