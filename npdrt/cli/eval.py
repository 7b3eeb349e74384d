"""`npdrt eval`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import numpy as np

from npdrt import plain
from npdrt.cli import common
from npdrt.cli.common import (
    answer,
    code_option,
    data_dir_option,
    json_option,
    table,
)
from npdrt.train.opened import PARTS, Evaluation, open_run

MOST_PAIRS = 10  # of a label and another prediction, where the whole table is too wide

data_option = click.option(
    "--data", "name", metavar="NAME", help="A data set, as of npdrt train.  [default: the run's]"
)
part_option = click.option(
    "--part",
    type=click.Choice(PARTS),
    help="Which set.  [default: test, or all examples of a file without one]",
)
device_option = click.option(
    "--device", default="cpu", show_default=True, help="auto, cpu, cuda or cuda:N."
)


@click.command("eval")
@click.argument("run", type=click.Path(path_type=Path))
@data_option
@part_option
@device_option
@data_dir_option
@code_option
@json_option
def command(
    run: Path,
    name: str | None,
    part: str | None,
    device: str,
    data_dir: Path | None,
    code: tuple[Path, ...],
    as_json: bool,
) -> None:
    """Loss, accuracy or perplexity, and the confusion table, of RUN, a run directory, checkpoint or
    snapshot.

    Other data than the run's are standardised as those of the run, with the constants in its
    checkpoint. A FILE.npz needs x and y.
    """
    found = open_run(run, code=code, device=device).evaluate(name, part=part, data_dir=data_dir)
    as_dict = asdict(found)
    if found.confusion is not None:
        as_dict["confusion"] = found.confusion.tolist()
    answer(as_json, {"run": str(run), **as_dict}, lambda: _text(run, found))


def _text(run: Path, found: Evaluation) -> str:
    numbers = ((name, getattr(found, name)) for name in ("loss", "accuracy", "perplexity"))
    rows = [(name, f"{value:.6g}") for name, value in numbers if value is not None]
    lines = [f"{run} on {found.data}, {found.part} set: {found.examples:,} examples", table(rows)]
    if found.confusion is not None:
        lines += ["", *_confusion(found.confusion)]
    return "\n".join(lines)


def _confusion(counts: Any) -> list[str]:
    """The table, or its largest numbers off the diagonal if it is wider than the terminal."""
    names = range(len(counts))
    rows = [("label", *names), *((label, *counts[label]) for label in names)]
    whole = plain.table(rows)
    if max(map(len, whole.splitlines())) <= common.terminal_width():
        return ["predictions by label", whole]
    wrong = counts * (1 - np.eye(len(counts), dtype=counts.dtype))
    order = np.argsort(-wrong, axis=None, kind="stable")[:MOST_PAIRS]
    pairs = [(*divmod(int(at), len(counts)), wrong.flat[at]) for at in order if wrong.flat[at]]
    title = "the most frequent mistakes (--json has the whole table)"
    return [title, table([("label", "prediction", "examples"), *pairs])]
