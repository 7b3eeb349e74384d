"""`npdrt data`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import click

from npdrt import data
from npdrt.cli.common import answer, data_dir_option, echo, json_option, table
from npdrt.errors import Diverged
from npdrt.plain import several


@click.group("data")
def command() -> None:
    """List, fetch and verify data sets.

    They are looked for in --data-dir, then $NPDRT_DATA, then the user's cache.
    """


@command.command("list")
@data_dir_option
@json_option
def list_(data_dir: Path | None, as_json: bool) -> None:
    """The data sets npdrt knows, and which are here."""
    entries = data.listing(data_dir)
    rows = [("name", "MB", "here", "what", "licence")]
    for e in entries:
        here = "bundled" if e.bundled else str(e.where or "no")
        here += f" ({e.part})" if e.part else ""
        rows.append((e.name, f"{e.bytes / 1e6:.1f}", here, e.what, e.licence))
    answer(as_json, {"data": [_plain(e) for e in entries]}, lambda: table(rows))


@command.command("fetch")
@click.argument("name")
@data_dir_option
def fetch(name: str, data_dir: Path | None) -> None:
    """Download data set NAME; every file is checked against its published digest."""
    echo(f"{name}: {data.fetch(name, data_dir)}")


@command.command("verify")
@click.argument("name")
@data_dir_option
@json_option
def verify(name: str, data_dir: Path | None, as_json: bool) -> None:
    """Check the files of data set NAME against their published digests; exit code 1 if one differs.

    For folder:PATH every image is decoded instead.
    """
    checks = data.verify(name, data_dir)
    rows = [(c.status, str(c.path or c.file), c.found or c.expected) for c in checks]
    answer(as_json, {"data": name, "files": [_plain(c) for c in checks]}, lambda: table(rows))
    bad = [c.file for c in checks if c.status not in ("ok", "unpacked")]
    if bad:
        cure = "" if name.startswith("folder") else f"; run npdrt data fetch {name}"
        raise Diverged(f"{name}: {several(bad, 10)} missing or wrong{cure}")


def _plain(entry: Any) -> dict[str, Any]:
    """A dataclass as JSON values."""
    values = dataclasses.asdict(entry)
    return {k: str(v) if isinstance(v, Path) else v for k, v in values.items()}
