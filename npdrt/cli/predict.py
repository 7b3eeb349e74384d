"""`npdrt predict`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from npdrt import atomic
from npdrt.cli.common import check_outputs, code_option, csv_bytes, data_dir_option, echo, npz_bytes
from npdrt.cli.eval import device_option, part_option
from npdrt.errors import Error
from npdrt.train.opened import open_run

FORMS = (".npz", ".csv")


@click.command("predict")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--data", "name", metavar="NAME", required=True, help="FILE.npz, or a data set.")
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    required=True,
    help="File to write, .npz or .csv.",
)
@click.option("--force", is_flag=True, help="Replace the file if it exists.")
@part_option
@device_option
@data_dir_option
@code_option
def command(
    run: Path,
    name: str,
    out: Path,
    force: bool,
    part: str | None,
    device: str,
    data_dir: Path | None,
    code: tuple[Path, ...],
) -> None:
    """What the model of RUN, a run directory, checkpoint or snapshot, predicts for new examples.

    Of a FILE.npz it takes the array x, standardised as the run's data; y is not needed. --part
    names x_test in its place. The result has a row for each example: y, the predicted label, and
    logits; or y, the predicted targets.
    """
    if out.suffix not in FORMS:
        raise Error(f"{out}: end the name in .npz or .csv")
    check_outputs(force, out)
    opened = open_run(run, code=code, device=device)
    output = opened.predictions(name, part=part, data_dir=data_dir)
    found = {"y": output}
    if opened.expected.classes:
        found = {"y": output.argmax(-1), "logits": output}
    atomic.replace(out, npz_bytes(found) if out.suffix == ".npz" else csv_bytes(_rows(found, out)))
    echo(out)


def _rows(found: dict[str, Any], out: Path) -> Iterator[list[Any]]:
    """The columns y, logits_0, ...; or y_0, ..."""
    if any(array.ndim > 2 for array in found.values()):
        raise Error(f"{out}: the model has several predictions an example; write a .npz")
    names = ([name] if a.ndim == 1 else [f"{name}_{i}" for i in range(a.shape[1])]
             for name, a in found.items())  # fmt: skip
    yield [name for group in names for name in group]
    columns = [column for a in found.values() for column in (a[:, None] if a.ndim == 1 else a).T]
    yield from zip(*(column.tolist() for column in columns), strict=True)
