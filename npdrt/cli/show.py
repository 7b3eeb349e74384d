"""`npdrt show`."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import click
import numpy as np

from npdrt import schema
from npdrt.arrays import quiet
from npdrt.cli.common import answer, cell, echo, json_option, listed, table
from npdrt.errors import Error, FileRefused
from npdrt.plain import counted
from npdrt.store import container, log, trace
from npdrt.store.digest import digest


class Digest(click.ParamType[str]):
    """A SHA-256 in hex."""

    name = "hex"

    def convert(self, value: Any, param: Any, ctx: Any) -> str:
        """The text, if it is one."""
        if not re.fullmatch("[0-9A-Fa-f]{64}", value):
            self.fail(f"{value!r} is not a SHA-256, 64 hex digits.", param, ctx)
        return str(value)


RUN = {"run", "config", "progress", "provenance"}  # what a training run writes


@click.command("show")
@click.argument("path", type=click.Path(path_type=Path))
@click.option(
    "--sha256",
    type=Digest(),
    help="Refuse the file unless its HDF5 image has this digest.  [default: any]",
)
@click.option(
    "--digest",
    "only_digest",
    is_flag=True,
    help="Of a run: one digest of settings, data, arrays and losses; see npdrt verify.",
)
@click.option("--as-toml", is_flag=True, help="The settings of a run, for npdrt train CONFIG.")
@json_option
def command(
    path: Path, sha256: str | None, only_digest: bool, as_toml: bool, as_json: bool
) -> None:
    """What is in a checkpoint, trace or run directory, and how it was made; or the runs in a
    directory of runs, with the losses and accuracies of their last epochs.

    A study shows its tables. Other files list every array with dtype, shape, norm, smallest and
    largest value; --json adds the SHA-256 of its bytes (C order, little-endian).
    """
    if only_digest:
        from npdrt.train.certificate import certificate  # here: it imports all of training

        found = certificate(path)
        return answer(as_json, found, lambda: found["digest"])
    file = container.within(path, "checkpoint.h5", "study.h5")
    if as_toml and not file.exists():
        raise Error(container.missing(path))
    if not file.exists():
        runs = _runs_in(path)
        answer(as_json, {"runs": runs}, lambda: f"{listed([*map(_shown, runs)])}\n{NOTE}")
        return
    arrays, meta = container.read(file, expect_sha256=sha256)
    _check(arrays, meta, file)
    if as_toml:
        echo(_settings(meta, file))
        return
    stored = meta
    if meta.get("kind") == "trace" and sha256 is None:
        arrays, meta = trace.newest(file, arrays, meta)
    report = {
        "file": str(file),
        "sha256": container.digest(file),
        "newer_log": meta is not stored,
        "meta": meta,
        "last_epoch": _last_epoch(file, meta),
        "arrays": {name: _describe(value) for name, value in arrays.items()},
    }
    study = meta.get("kind") == "study"
    answer(as_json, report, lambda: _study(meta) if study else _text(report, arrays))
    if not as_json and path.is_dir() and (path / "trace.h5").exists():
        echo(f"\nhistory: npdrt show {shlex.quote(str(path / 'trace.h5'))}")


def _check(arrays: dict[str, Any], meta: dict[str, Any], file: Path) -> None:
    """Refuse metadata of another form than their kind has."""
    match meta.get("kind"):
        case "trace":
            trace.check(arrays, meta, file)
        case "study":
            schema.check(meta, schema.StudyMeta, file)
        case "checkpoint":
            schema.check(meta, schema.CheckpointMeta, file)
            if meta["user"].keys() >= RUN:
                schema.check(meta["user"], schema.RunMeta, file)


def _describe(value: Any) -> dict[str, Any]:
    wide = value.astype(np.float64)
    with quiet():
        norm = float(np.sqrt(np.sum(wide * wide)))
    return {
        "dtype": str(value.dtype),
        "shape": list(value.shape),
        "norm": norm,
        "min": float(wide.min()) if value.size else None,
        "max": float(wide.max()) if value.size else None,
        "sha256": digest(value),
    }


def _settings(meta: dict[str, Any], file: Path) -> str:
    """The settings in the checkpoint of a run as TOML."""
    if meta.get("user", {}).keys() < RUN:
        raise FileRefused(f"{file}: expected the checkpoint of a run; it has no settings")
    from npdrt.train.settings_file import as_toml  # here: it imports all of training

    return as_toml(meta["user"]["config"])


def _study(meta: dict[str, Any]) -> str:
    from npdrt.cli.reproduce import text  # here: it imports all of training

    return text(meta)


def _text(report: dict[str, Any], arrays: dict[str, Any]) -> str:
    meta = report["meta"]
    lines = [f"{report['file']}: {meta.get('kind', 'unknown kind')}, sha256 {report['sha256']}"]
    lines += _run(meta.get("user", {}), report["last_epoch"])
    if report["newer_log"]:
        lines.append("the log has more records: this is what it gives")
    if meta.get("kind") == "trace":
        lines += ["", _history(arrays)]
    rows = [("array", "dtype", "shape", "norm", "min", "max")]
    for name, d in report["arrays"].items():
        shape = "x".join(map(str, d["shape"])) or "0-d"
        numbers = ["" if d[k] is None else f"{d[k]:.6g}" for k in ("norm", "min", "max")]
        rows.append((name, d["dtype"], shape, *numbers))
    return "\n".join([*lines, "", table(rows)])


def _run(user: dict[str, Any], last: dict[str, Any]) -> list[str]:
    """Configuration, progress and provenance of a training run, one line each."""
    if not user.keys() >= RUN:
        return [f"meta: {user}"] if user else []
    progress, made = user["progress"], user["provenance"]
    settings = {k: v for k, v in user["config"].items() if v not in (None, {}, [])}
    state = "finished" if progress["step"] == progress["steps"] else "not finished"
    return [
        f"step {progress['step']} of {progress['steps']}, epoch {progress['epoch']:g}: {state}",
        *_numbers(last),
        "config: " + ", ".join(f"{k} {_short(v)}" for k, v in settings.items()),
        f"made by: npdrt {made['npdrt']}, Python {made['python']}, "
        + ", ".join(f"{k} {v}" for k, v in made["packages"].items()),
        f"on: {made['cpu']}, {made['cores']} cores, device {made['device']}; "
        + ", ".join(_blas(b) for b in made["blas"]),
        "command: " + " ".join(made["argv"]),
        *([f"steps: {made['graph']}"] if made.get("graph") else []),
    ]


NUMBERS = [f"{part}_{name}" for part in ("train", "test") for name in ("loss", "accuracy")]
NOTE = "loss, accuracy: training minibatches of the last epoch/test set after it"
SETS = {"train": "mean of the last epoch's minibatches", "valid": "after it", "test": "after it"}


def _last_epoch(file: Path, meta: dict[str, Any]) -> dict[str, Any]:
    """The last epoch's record in the log next to a checkpoint, up to its step; {} without one."""
    path, progress = file.with_name("log.jsonl"), meta.get("user", {}).get("progress")
    if not progress or not path.exists():
        return {}
    done = (r for r in log.sound(path) if r["event"] == "epoch" and r["step"] <= progress["step"])
    return max(done, key=lambda record: int(record["step"]), default={})


def _numbers(last: dict[str, Any]) -> list[str]:
    """The numbers of the last epoch, a line a set."""
    lines = []
    for part, note in SETS.items():
        names = ("loss", "accuracy", "perplexity")
        known = {name: last.get(f"{part}_{name}") for name in names}
        found = [f"{name} {value:.4g}" for name, value in known.items() if value is not None]
        lines += [f"{part}: {', '.join(found)} ({note})"] if found else []
    return lines


def _runs_in(path: Path) -> list[dict[str, Any]]:
    """A row for each run in a directory, or in the directory `runs` of a sweep."""
    if not path.is_dir():
        raise Error(container.missing(path))
    files = sorted(path.glob("*/checkpoint.h5")) or sorted(path.glob("runs/*/checkpoint.h5"))
    if not files:
        raise Error(f"{container.missing(path)}, and no directory in it has one")
    return [row for file in files if (row := _row(file))]


def _row(file: Path) -> dict[str, Any]:
    """A run for the list; of one that cannot be read, why."""
    try:
        user = schema.check(container.read(file)[1]["user"], schema.RunMeta, file)
    except (FileRefused, KeyError) as error:
        return {"run": str(file.parent), "state": str(error).removeprefix(f"{file}: ")}
    config, progress = user["config"], user["progress"]
    last = _last_epoch(file, {"user": user})
    return {
        "run": str(file.parent),
        **{name: config.get(name) for name in ("model", "data", "optimizer", "lr")},
        "depth": config.get("model_options", {}).get("depth"),
        "steps": progress["step"],
        "of": progress["steps"],
        **{name: last.get(name) for name in (*NUMBERS, "seconds")},
    }


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    """A row of the list for a person: train and test in one column."""
    if "state" in row:
        return row
    whole = row["steps"] if row["steps"] == row["of"] else f"{row['steps']} of {row['of']}"
    pairs = {name: _pair(row, name) for name in ("loss", "accuracy")}
    named = " ".join(str(row[name]) for name in ("model", "depth") if row[name])
    rule = {"rule": row["optimizer"], "lr": row["lr"], "steps": whole}
    about = {"run": row["run"], "model": named, "data": row["data"], **rule}
    return {**about, **pairs,
            "seconds": row["seconds"]}  # fmt: skip


def _pair(row: dict[str, Any], name: str) -> str | None:
    both = [row[f"{part}_{name}"] for part in ("train", "test")]
    digits = 3 if name == "loss" else 4
    return "/".join(cell(v, digits) or "-" for v in both) if both != [None, None] else None


def _blas(b: dict[str, Any]) -> str:
    threads = counted(b["threads"], "thread")
    return f"{b['library']} {b['version']}, {b['kernel']} kernels, {threads}"


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return "(" + " ".join(f"{k}={v}" for k, v in value.items()) + ")"
    return str(value)


def _history(arrays: dict[str, Any]) -> str:
    columns = {n.partition("/")[2]: v for n, v in arrays.items() if n.startswith("history/")}
    rows = [tuple(columns)]
    rows += [tuple(f"{v[i]:.6g}" for v in columns.values()) for i in range(len(columns["epoch"]))]
    return table(rows)
