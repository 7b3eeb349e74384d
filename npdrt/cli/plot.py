"""`npdrt plot`."""

from __future__ import annotations

from pathlib import Path

import click

from npdrt.cli.common import Name, check_outputs, echo
from npdrt.errors import Error
from npdrt.store import container
from npdrt.train.studies.figure_of_file import load
from npdrt.train.studies.render import FORMATS, save


@click.command("plot")
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Picture to write.  [default: next to FILE]",
)
@click.option(
    "--format", "form", type=Name(list(FORMATS)), help="Form.  [default: that of --output, or png]"
)
@click.option("--force", is_flag=True, help="Replace the picture if it exists.")
def command(file: Path, output: Path | None, form: str | None, force: bool) -> None:
    """A picture of FILE: a run directory or its trace, a study or its sweep, or slices.

    A run becomes its loss, accuracy and learning rate by epoch; by step the norm, relative update
    and direction of every layer, the deep relative trust, and what --conditioning measured. Needs
    Matplotlib (extra `plot`).
    """
    target = output or _next_to(file, form or "png")
    suffix = target.suffix.lower().removeprefix(".")
    if form and suffix != form:
        raise Error(f"--format {form} and --output {target} differ; end its name in .{form}")
    if suffix not in FORMATS:
        raise Error(f"{target}: end the name in .png, .svg or .pdf")
    check_outputs(force, target)
    save(load(file), target)
    echo(target)


def _next_to(file: Path, form: str) -> Path:
    """run -> run/trace.png; study.h5 -> study.png."""
    return container.within(file, "trace.h5", "study.h5").with_suffix(f".{form}")
