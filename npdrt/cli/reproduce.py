"""`npdrt reproduce`."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from npdrt.cli.common import (
    Name,
    cell,
    echo,
    notice,
    print_json,
    printable,
    table,
    warn,
    working,
)
from npdrt.cli.sweep import directory, run_options, scale_option
from npdrt.errors import Unavailable
from npdrt.train.studies import recipe as recipes
from npdrt.train.studies.render import save
from npdrt.train.studies.reproduce import reproduce, summary
from npdrt.train.studies.study import Report, Stopped
from npdrt.train.studies.sweep import Options

Row = tuple[str, ...]


@click.command("reproduce", epilog="Recipes: " + ", ".join(recipes.names()) + ".")
@click.argument("name", type=Name(recipes.names(), "."), metavar="NAME")
@scale_option
@click.option("--as-is", is_flag=True, help="Make no run; study those that are finished.")
@click.option("--markdown", is_flag=True, help="Tables in Markdown.")
@run_options
def command(
    name: str,
    scale: str,
    out: Path | None,
    as_is: bool,
    as_json: bool,
    markdown: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Make the runs of a figure, then print the paper's statement and the authors' logged numbers
    next to ours. The numbers go to OUT/study.h5, the figure to OUT/figure.png.

    NAME is a bundled recipe or the path of a TOML file. Finished runs are not repeated: after a
    crash or Ctrl-C, run the same command to continue. full is the paper's size, quick takes
    minutes to hours on two cores, smoke seconds.
    """
    recipe = recipes.load(name, scale, code=options["code"])
    out = out or directory(recipe)
    with working(quiet=quiet) as (bars, stop):
        try:
            report = reproduce(
                recipe, out, Options(**options), as_is=as_is, progress=bars.progress, stop=stop
            )
        except Stopped:
            notice("stopped; run the same command to continue")
            raise SystemExit(128 + stop()) from None
    picture, found = _draw(report, out / "figure.png"), summary(recipe, report)
    if as_json:
        print_json({"out": str(out), **found})
    else:
        echo(text(found, markdown_table if markdown else table))
        echo(f"\nstudy  {out / 'study.h5'}" + (f"\nfigure {picture}" if picture else ""))


def _draw(report: Report, path: Path) -> Path | None:
    try:
        save(report.figure, path)
    except Unavailable as error:
        warn(f"no figure: {error}")
        return None
    return path


def text(found: Mapping[str, Any], form: Callable[[list[Row]], str] = table) -> str:
    """A study for a person, from its `summary`."""
    head = f"{found['name']}: {found['title']}\n{found['source']}"
    paragraphs = [f"The paper: {found['statement']}"]
    paragraphs += [f"Scale {found['scale']}: {found['note']}"] if found["note"] else []
    filled = [textwrap.fill(p, 88, break_on_hyphens=False) for p in paragraphs]
    tables = [f"{t['title']}\n{form(_cells(t))}" for t in found["tables"]]
    notes = [textwrap.fill(f"* {note}", 88, subsequent_indent="  ") for note in found["notes"]]
    return "\n\n".join([head, *filled, *tables, *notes])


def _cells(content: Mapping[str, Any]) -> list[Row]:
    return [tuple(content["columns"]), *(tuple(map(cell, row)) for row in content["rows"])]


def markdown_table(rows: list[Row]) -> str:
    """The rows as a Markdown table, the first as its head."""
    rows = [tuple(printable(cell, keep="") for cell in row) for row in rows]
    lines = ["| " + " | ".join(c.replace("|", "\\|") for c in row) + " |" for row in rows]
    return "\n".join(["", lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])
