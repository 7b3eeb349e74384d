"""`npdrt sweep`, and what `npdrt reproduce` shares with it."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import click

from npdrt.cli.common import (
    Name,
    cell,
    code_option,
    combined,
    data_dir_option,
    echo,
    fast_option,
    json_option,
    notice,
    print_json,
    quiet_option,
    table,
    unbroken,
    working,
)
from npdrt.train.studies import recipe as recipes
from npdrt.train.studies import sweep as sweeps
from npdrt.train.studies.recipe import SCALES, Recipe
from npdrt.train.studies.sweep import Options, Run


class Shard(click.ParamType[tuple[int, int]]):
    """I/N as (I, N), 0 <= I < N."""

    name = "i/n"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[int, int]:
        """The pair, from text."""
        if isinstance(value, tuple):
            return value
        index, _, count = value.partition("/")
        if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
            self.fail(f"{value!r} is not I/N with 0 <= I < N, such as 0/2 and 1/2.", param, ctx)
        return int(index), int(count)


CORES = os.cpu_count() or 1
run_options = combined(  # of `sweep` and `reproduce`
    (
        click.option(
            "--out",
            type=click.Path(path_type=Path),
            help="Directory of the runs.  [default: sweeps/RECIPE-SCALE]",
        ),
        click.option(
            "--jobs",
            type=click.IntRange(min=1),
            default=CORES,
            help=f"Runs at a time.  [default: one a core, here {CORES}]",
        ),
        click.option(
            "--dask",
            default="",
            metavar="ADDRESS",
            help="Make the runs on Dask: a scheduler such as tcp://host:8786, or local.  "
            "[default: none]",
        ),
        fast_option,
        click.option("--device", default="cpu", help="cpu, cuda or cuda:N.  [default: cpu]"),
        data_dir_option,
        quiet_option,
        code_option,
        json_option,
    )
)
scale_option = click.option(
    "--scale", type=Name(list(SCALES)), default="full", help="[default: full, as in the paper]"
)


@click.command("sweep")
@click.argument("recipe")
@scale_option
@click.option(
    "--shard",
    type=Shard(),
    default=(0, 1),
    help="Only every N-th run, from run I.  [default: 0/1, all]",
)
@run_options
def command(
    recipe: str, scale: str, out: Path | None, as_json: bool, quiet: bool, **options: Any
) -> None:
    """Make every run of RECIPE: the name of a bundled recipe, or the path of a TOML file.

    Runs that are finished are skipped, others continue from their last checkpoint: after a crash
    or Ctrl-C, run the same command to continue. With --shard, several machines share one directory.
    """
    loaded = recipes.load(recipe, scale, code=options["code"])
    out = out or directory(loaded)
    with working(quiet=quiet) as (bars, stop):
        progress = partial(bars.progress, "sweep")
        runs = sweeps.sweep(loaded, out, Options(**options), progress=progress, stop=stop)
        stopped = stop()
    if stopped:
        notice("stopped; run the same command to continue")
    rows = [row(run) for run in runs]
    with unbroken(stopped):
        if as_json:
            print_json({"recipe": loaded.name, "scale": scale, "out": str(out), "runs": rows})
        else:
            echo(table(as_text(rows)))
            echo(f"runs   {out / 'runs'}")


def directory(recipe: Recipe) -> Path:
    """sweeps/<name>-<scale>, from the current directory."""
    return Path("sweeps") / f"{recipe.name.removesuffix('.toml')}-{recipe.scale}"


def row(run: Run) -> dict[str, Any]:
    """One run for the table: its settings and its result."""
    config, result = run.config, run.result
    shown = {
        "run": run.path.name,
        "model": config.model,
        "depth": config.model_options.get("depth"),
        "init": config.model_options.get("init"),
        "optimizer": config.optimizer,
        "lr": config.lr,
        "seed": config.seed,
        "epochs": config.epochs,
    }
    if result is None:
        return {**shown, "state": "not finished"}
    if "diverged" in result:
        return {**shown, "state": result["diverged"]}
    numbers = ("train_loss", "train_accuracy", "test_loss", "test_accuracy")
    return {**shown, "state": "done", **{name: result.get(name) for name in numbers}}


def as_text(rows: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """The table: a heading, then the runs; columns in which all runs agree are left out."""
    names = list(dict.fromkeys(name for r in rows for name in r))
    shown_columns = [
        n for n in names if len({str(r.get(n)) for r in rows}) > 1 or n in ("run", "state")
    ]
    heading = tuple(name.replace("_", " ") for name in shown_columns)
    return [heading, *(tuple(cell(r.get(name), 5) for name in shown_columns) for r in rows)]
