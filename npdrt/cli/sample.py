"""`npdrt sample`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from npdrt import arrays, atomic
from npdrt.cli.common import check_outputs, code_option, echo
from npdrt.errors import Error
from npdrt.store import png
from npdrt.train.pictures import COLUMNS, ROWS, generator, grid


class Classes(click.ParamType[tuple[int, ...]]):
    """Numbers with commas between them."""

    name = "0,1,..."

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[int, ...]:
        """The numbers."""
        try:
            return value if isinstance(value, tuple) else tuple(map(int, value.split(",")))
        except ValueError:
            self.fail(f"{value!r} is not a list of classes, such as 0,3.", param, ctx)


@click.command("sample")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--classes", type=Classes(), help="A row for each.  [default: the first ten]")
@click.option(
    "--columns", type=click.IntRange(1, 1000), default=COLUMNS, show_default=True, help="Images."
)
@click.option("--seed", type=click.IntRange(min=0), help="Of the noise.  [default: the run's]")
@click.option(
    "--out", type=click.Path(path_type=Path, dir_okay=False), help="Picture to write, a PNG.",
    default=Path("samples.png"), show_default=True,
)  # fmt: skip
@click.option("--device", default="cpu", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--force", is_flag=True, help="Replace the picture if it exists.")
@code_option
def command(
    run: Path,
    classes: tuple[int, ...] | None,
    columns: int,
    seed: int | None,
    out: Path,
    device: str,
    force: bool,
    code: tuple[Path, ...],
) -> None:
    """Images of the generator in RUN, a run directory, checkpoint or snapshot, as a grid.

    A row has one class. The same seed gives a class the same noise in every grid; with the run's
    own seed, the noise of the pictures that the run made itself.
    """
    check_outputs(force, out)
    where = arrays.device(device)
    with arrays.on(where):
        made = generator(run, where, code)
        known = made.model.outputs
        chosen = tuple(range(min(ROWS, known))) if classes is None else classes
        if wrong := [label for label in chosen if not 0 <= label < known]:
            raise Error(f"{run}: the classes are 0 to {known - 1}; got {wrong[0]}")
        noise = made.seed if seed is None else seed
        pixels = grid(made.model, made.params, made.buffers, chosen, columns, noise)
    atomic.replace(out, png.encode(pixels))
    echo(out)
