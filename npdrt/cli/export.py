"""`npdrt export`."""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np

from npdrt import atomic, regular, store
from npdrt.cli.common import Name, check_outputs, csv_bytes, echo, npz_bytes
from npdrt.errors import Error
from npdrt.store import container, foreign, log, trace

FORMS = ["npz", "safetensors", "csv", "tensorboard"]
SUFFIXES = {"tensorboard": "tfevents"}  # of a form that is not its own


@click.command("export")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--to", "form", type=Name(FORMS), required=True, help="Form.")
@click.option(
    "--output", type=click.Path(path_type=Path), help="File to write.  [default: RUN.FORM]"
)
@click.option("--force", is_flag=True, help="Replace the file if it exists.")
def command(run: Path, form: str, output: Path | None, force: bool) -> None:
    """Parameters and buffers (running statistics, say) of RUN, a run directory or a checkpoint, as
    npz or safetensors, under their names; or the history of a run directory: as CSV, one row per
    epoch, or as a file that TensorBoard shows, with logged steps and the trace (extra tensorboard).
    """
    target = output or _next_to(run, SUFFIXES.get(form, form))
    check_outputs(force, target)
    made = {"csv": _history, "tensorboard": _events}.get(form)
    atomic.replace(target, made(run) if made else _parameters(run, form))
    echo(target)


def _next_to(run: Path, suffix: str) -> Path:
    """first -> first.npz; first/checkpoint.h5 -> first/checkpoint.npz."""
    run = run if run.name not in ("", "..") else run.resolve()
    return Path(f"{run.with_suffix('') if run.is_file() else run}.{suffix}")


def _parameters(run: Path, form: str) -> bytes:
    file = container.within(run, "checkpoint.h5")
    if not file.exists():
        raise Error(container.missing(run))
    held = store.load(file)
    if twice := held.params.keys() & held.buffers.keys():
        raise Error(
            f"{file} holds a parameter and a buffer named {min(twice)}; export has one name"
        )
    arrays = held.params | held.buffers
    if form == "npz":
        return npz_bytes(arrays)
    save = foreign.safetensors("safetensors.numpy").save
    data: bytes = save({name: np.asarray(value, order="C") for name, value in arrays.items()})
    return data


def _records(run: Path) -> list[log.Record]:
    path = run / "log.jsonl"
    regular.require(run, "directory")
    if not path.exists():
        raise Error(container.missing(run, path.name))
    return log.read(path)


def _events(run: Path) -> bytes:
    from npdrt.store import tensorboard  # here: an extra

    records, path = _records(run), run / "trace.h5"
    return tensorboard.event_file(records, *trace.newest(path, *trace.read(path)))


def _history(run: Path) -> bytes:
    table = trace.history(_records(run))
    return csv_bytes([list(table), *zip(*table.values(), strict=True)])
