"""`npdrt plot`."""

from __future__ import annotations

from pathlib import Path

import click

from npdrt.cli.common import Name, check_outputs, echo
from npdrt.errors import Error
from npdrt.store import container
from npdrt.train.studies.figure_of_file import load, overlay
from npdrt.train.studies.render import FORMATS, save


@click.command("plot")
@click.argument(
    "files", metavar="FILES...", nargs=-1, required=True, type=click.Path(path_type=Path)
)
@click.option(
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Picture to write.  [default: next to the file; of several runs, runs.png here]",
)
@click.option(
    "--format", "form", type=Name(list(FORMATS)), help="Form.  [default: that of --output, or png]"
)
@click.option("--force", is_flag=True, help="Replace the picture if it exists.")
def command(files: tuple[Path, ...], output: Path | None, form: str | None, force: bool) -> None:
    """A picture of FILES: a run directory or its trace, a study or its sweep, or slices. Several
    runs go into one picture: loss, accuracy and learning rate by epoch.

    A run becomes its loss, accuracy and learning rate by epoch; by step the norm, relative update
    and direction of every layer, the deep relative trust, and what --conditioning measured. Needs
    Matplotlib (extra `plot`).
    """
    target = output or _default(files, form or "png")
    suffix = target.suffix.lower().removeprefix(".")
    if form and suffix != form:
        raise Error(f"--format {form} and --output {target} differ; end its name in .{form}")
    if suffix not in FORMATS:
        raise Error(f"{target}: end the name in .png, .svg or .pdf")
    check_outputs(force, target)
    save(load(files[0]) if len(files) == 1 else overlay(files), target)
    echo(target)


def _default(files: tuple[Path, ...], form: str) -> Path:
    """run -> run/trace.png; study.h5 -> study.png; several runs -> runs.png."""
    if len(files) > 1:
        return Path(f"runs.{form}")
    file = files[0]
    return container.within(file, "trace.h5", "study.h5").with_suffix(f".{form}")
