"""`npdrt export`."""

from __future__ import annotations

import csv
import io
import zipfile
from itertools import chain
from pathlib import Path
from typing import Any

import click
import numpy as np

from npdrt import atomic, regular, store
from npdrt.cli.common import Name, check_outputs, echo
from npdrt.errors import Error
from npdrt.store import container, foreign, log
from npdrt.store.trace import HISTORY

APART = ("event", "seconds")  # fields of a log record that are not columns of the history


@click.command("export")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--to", "form", type=Name(["npz", "safetensors", "csv"]), required=True, help="Form.")
@click.option(
    "--output", type=click.Path(path_type=Path), help="File to write.  [default: RUN.FORM]"
)
@click.option("--force", is_flag=True, help="Replace the file if it exists.")
def command(run: Path, form: str, output: Path | None, force: bool) -> None:
    """Parameters and buffers (running statistics, say) of RUN, a run directory or a checkpoint, as
    npz or safetensors, under their names; or the history of a run directory as CSV, one row per
    epoch.
    """
    target = output or _next_to(run, form)
    check_outputs(force, target)
    content = _history(run) if form == "csv" else _parameters(run, form)
    atomic.replace(target, content)
    echo(target)


def _next_to(run: Path, form: str) -> Path:
    """first -> first.npz; first/checkpoint.h5 -> first/checkpoint.npz."""
    run = run if run.name not in ("", "..") else run.resolve()
    return Path(f"{run.with_suffix('') if run.is_file() else run}.{form}")


def _parameters(run: Path, form: str) -> bytes:
    file = container.within(run, "checkpoint.h5")
    held = store.load(file)
    if twice := held.params.keys() & held.buffers.keys():
        raise Error(
            f"{file} holds a parameter and a buffer named {min(twice)}; export has one name"
        )
    arrays = held.params | held.buffers
    if form == "npz":
        return _npz(arrays)
    save = foreign.safetensors("safetensors.numpy").save
    data: bytes = save({name: np.asarray(value, order="C") for name, value in arrays.items()})
    return data


def _npz(arrays: dict[str, Any]) -> bytes:
    """An .npz file. np.savez takes names as keywords, of which `file` is its own."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, value in arrays.items():
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                np.lib.format.write_array(member, value, allow_pickle=False)
    return buffer.getvalue()


def _history(run: Path) -> bytes:
    path = run / "log.jsonl"
    regular.require(run, "directory")
    if not path.exists():
        raise Error(container.missing(run, path.name))
    epochs = [r for r in log.read(path) if r["event"] == "epoch"]
    text = io.StringIO()
    writer = csv.writer(text)
    more = [name for name in dict.fromkeys(chain(*epochs)) if name not in (*HISTORY, *APART)]
    names = (*HISTORY, *more, "seconds")
    writer.writerow(map(_cell, names))
    writer.writerows([_cell(r.get(name)) for name in names] for r in epochs)
    return text.getvalue().encode("utf-8", "backslashreplace")


def _cell(value: Any) -> str:
    """A number as Python writes it. Text that a spreadsheet would take for a formula is quoted."""
    if isinstance(value, int | float):
        return repr(value)
    text = "" if value is None else str(value)
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text
