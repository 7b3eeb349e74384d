"""`npdrt verify`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import click

from npdrt.cli.common import (
    answer,
    code_option,
    data_dir_option,
    json_option,
    quiet_option,
    table,
    unbroken,
    warn,
    working,
)
from npdrt.train.certificate import Difference, Verdict, repeat_published, verify
from npdrt.train.shown import Shown


@click.command("verify")
@click.argument("run", type=click.Path(path_type=Path), required=False)
@click.option("--epochs", type=click.IntRange(min=0), help="Repeat only so many.  [default: all]")
@click.option("--device", default="cpu", show_default=True, help="auto, cpu, cuda or cuda:N.")
@code_option
@data_dir_option
@quiet_option
@json_option
def command(
    run: Path | None,
    epochs: int | None,
    device: str,
    code: tuple[Path, ...],
    data_dir: Path | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Repeat a portable run here, and say whether every bit is the same.

    RUN is the directory of a run of `npdrt train --arithmetic portable`. The first epoch, array and
    element that differ are named. Without RUN, six small runs are repeated whose digests come with
    npdrt. The exit code is 1 if anything differs.
    """
    if run is None and epochs is not None:
        raise click.UsageError("--epochs needs RUN.")
    with working(quiet=quiet) as (bars, stop):
        progress = Shown(bars, warn)
        if run is None:
            rows = repeat_published(device=device, reporter=progress, stop=stop)
            same = all(row["same"] for row in rows)
            stopped, value, text = stop(), {"same": same, "runs": rows}, _rows(rows)
        else:
            found = verify(
                run, epochs=epochs, device=device, code=code, data_dir=data_dir, reporter=progress,
                stop=stop,
            )  # fmt: skip
            stopped, same, text = found.stopped, not found.difference, _text(found)
            value = {"same": same, **dataclasses.asdict(found)}
    with unbroken(stopped):
        answer(as_json, value, lambda: text)
    if not same:
        raise SystemExit(1)


def _text(found: Verdict) -> str:
    lines = [f"{found.run}: the same bits up to step {found.step}, epoch {found.epoch:g}"]
    if found.difference:
        lines = [*(lines if found.step else []), _parting(found.run, found.difference)]
    if found.digest:
        lines.append(f"digest {found.digest}")
    return "\n".join(lines)


def _parting(run: str, at: Difference) -> str:
    others = f" and {at.names - 1} more" if at.names > 1 else ""
    text = f"{run}: differs at epoch {at.epoch:g}, step {at.step}, in {at.name}{others}"
    if at.element is None or at.values is None:
        return text
    there, here = at.values
    return f"{text}; first at element {list(at.element)}: {there!r} in the run, {here!r} here"


def _rows(rows: list[dict[str, Any]]) -> str:
    head = [("run", "", "digest")]
    return table(
        head + [(r["name"], "same" if r["same"] else "differs", r["digest"]) for r in rows]
    )
