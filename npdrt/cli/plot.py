"""`npdrt plot`."""

from __future__ import annotations

from pathlib import Path

import click

from npdrt.cli.common import Name, echo
from npdrt.errors import Error
from npdrt.store import container
from npdrt.train.studies.load import load
from npdrt.train.studies.render import FORMATS, save


@click.command("plot")
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Picture to write.  [default: beside FILE]",
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
    target = output or _beside(file, form or "png")
    suffix = target.suffix.lower().removeprefix(".")
    if form and suffix != form:
        raise Error(f"--format {form} and --output {target} differ; end its name in .{form}")
    if suffix not in FORMATS:
        raise Error(f"{target}: end the name in .png, .svg or .pdf")
    if target.exists() and not force:
        raise Error(f"{target} already exists; give --force to replace it, or another --output")
    save(load(file), target)
    echo(target)


def _beside(file: Path, form: str) -> Path:
    """run -> run/trace.png; study.h5 -> study.png."""
    return container.within(file, "trace.h5", "study.h5").with_suffix(f".{form}")
