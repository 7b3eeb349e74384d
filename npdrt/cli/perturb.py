"""`npdrt perturb`."""

from __future__ import annotations

import shlex
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np

from npdrt.cli.common import (
    cell,
    code_option,
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
from npdrt.train.studies import slices
from npdrt.train.studies.slices import Slices

SHOWN = (0.01, 0.03, 0.099)  # of the grid, in the table


@click.command("perturb")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--step", "steps", type=int, multiple=True, help="A snapshot.  [default: all]")
@click.option(
    "--points", type=click.IntRange(min=2), default=100, help="Points of the grid.  [default: 100]"
)
@click.option(
    "--largest",
    type=click.FloatRange(min=0, min_open=True),
    default=0.099,
    help="Its last eta.  [default: 0.099]",
)
@click.option(
    "--examples", type=click.IntRange(min=1), help="Only the first so many.  [default: all]"
)
@click.option("--threads", type=click.IntRange(min=1), help="BLAS threads.  [default: BLAS's own]")
@click.option("--device", help="cpu, cuda or cuda:N.  [default: the run's]")
@fast_option
@data_dir_option
@code_option
@quiet_option
@json_option
def command(
    run: Path, points: int, largest: float, quiet: bool, as_json: bool, **options: Any
) -> None:
    """Loss and gradient of RUN along its layerwise gradient, at every snapshot (train --snapshot)
    or else at its last checkpoint: W - eta g |W|/|g| for eta from 0 (Bernstein et al. 2020,
    Figure 1). Writes RUN/slices.h5; `npdrt plot` draws it.
    """
    eta = np.linspace(0.0, largest, points).tolist()
    with working(quiet=quiet) as (bars, stop):
        progress = partial(bars.progress, "slices")
        found = slices.slices(run, eta=eta, progress=progress, stop=stop, **options)
        signal = stop()
    if signal:
        notice("stopped; run the same command to continue with the next snapshot")
    rows = _rows(found)
    with unbroken(signal):
        if as_json:
            print_json({"file": str(run / "slices.h5"), "settings": found.settings, "rows": rows})
        else:
            heads = [tuple(rows[0])] if rows else []  # none where a signal came before the first
            echo(table([*heads, *(tuple(map(cell, r.values())) for r in rows)]))
            echo(f"file   {run / 'slices.h5'}")
            echo(f"next: npdrt plot {shlex.quote(str(run / 'slices.h5'))}")


def _rows(found: Slices) -> list[dict[str, float]]:
    """A row a snapshot: the loss at 0, its minimum, and both quantities at SHOWN."""
    columns = {f"{eta:g}": i for eta in SHOWN if (i := _nearest(found.eta, eta)) is not None}
    return [
        {
            "epoch": float(found.epoch[i]),
            "loss": float(found.loss[i, 0]),
            "best eta": float(found.best()[i]),
            "best loss": float(np.nanmin(found.loss[i])),
            **{f"loss at {name}": float(found.loss[i, c]) for name, c in columns.items()},
            **{f"change at {n}": float(found.first_layer[i, c]) for n, c in columns.items()},
        }
        for i in range(len(found.step))
    ]


def _nearest(grid: Any, eta: float) -> int | None:
    """The index of `eta` on the grid, None where it is not on it."""
    i = int(np.argmin(abs(grid - eta)))
    return i if abs(grid[i] - eta) < 1e-9 else None
