"""`npdrt doctor`."""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path
from typing import Any

import click

from npdrt import __version__, arrays, data
from npdrt.cli.common import json_option, print_json, table
from npdrt.errors import Unavailable
from npdrt.train import provenance

EXTRAS = {  # extra -> the package it brings
    "cuda12": "cupy-cuda12x",
    "cuda13": "cupy-cuda13x",
    "data": "pooch",
    "text": "safetensors",
    "audit": "autograd",
}
WIDE_KERNELS = ("SkylakeX", "Cooperlake", "SapphireRapids")  # those that use AVX-512


@click.command("doctor")
@click.option("--data-dir", type=click.Path(path_type=Path), help="Where data sets are.")
@json_option
def command(data_dir: Path | None, as_json: bool) -> None:
    """What npdrt found on this machine, and what to change."""
    found = {
        "npdrt": __version__,
        "python": sys.version.split()[0],
        "packages": provenance.packages(),
        "cpu": provenance.cpu_name(),
        "cpu_features": provenance.cpu_features(),
        "blas": provenance.blas(),
        "gpu": _gpu(),
        "extras": {name: _version(package) for name, package in EXTRAS.items()},
        "data": [
            {"name": e.name, "where": str(e.where) if e.where else None}
            for e in data.listing(data_dir)
        ],
    }
    found["advice"] = advice(found)
    if as_json:
        print_json(found)
    else:
        click.echo(_text(found))


def _gpu() -> dict[str, Any]:
    try:
        return {"devices": arrays.describe_gpus()}
    except Unavailable as error:
        return {"devices": [], "why": str(error)}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def advice(found: dict[str, Any]) -> list[str]:
    """What could be better, a sentence each: the BLAS, and its kernel against the processor."""
    wide = any("AVX512" in f or f == "X86_V4" for f in found["cpu_features"])
    advice = [
        f"OpenBLAS runs its {b['kernel']} kernels although the processor has AVX-512: set "
        "OPENBLAS_CORETYPE=SkylakeX before Python starts and compare; results change in their "
        "last bits."
        for b in found["blas"]
        if b["library"] == "openblas" and wide and b["kernel"] not in WIDE_KERNELS
    ]
    if not found["blas"]:
        advice.append("NumPy has no BLAS that threadpoolctl knows; matrix products may be slow.")
    return advice


def _text(found: dict[str, Any]) -> str:
    packages = ", ".join(f"{k} {v}" for k, v in found["packages"].items())
    rows = [
        ("npdrt", f"{found['npdrt']} on Python {found['python']}; {packages}"),
        ("cpu", f"{found['cpu']} ({' '.join(found['cpu_features'])})"),
    ]
    rows += [
        ("blas", f"{b['library']} {b['version']}, {b['kernel']} kernels, {b['threads']} threads")
        for b in found["blas"]
    ]
    gpus = found["gpu"]["devices"]
    rows += [("gpu", f"{g['name']}, {g['memory'] / 2**30:.0f} GiB") for g in gpus]
    rows += [] if gpus else [("gpu", found["gpu"]["why"])]
    for name, version in found["extras"].items():
        rows.append((f"extra {name}", f"{EXTRAS[name]} {version or 'not installed'}"))
    for d in found["data"]:
        rows.append((f"data {d['name']}", d["where"] or f"not here: npdrt data fetch {d['name']}"))
    rows += [("advice", text) for text in found["advice"] or ["nothing to change"]]
    return table(rows)
