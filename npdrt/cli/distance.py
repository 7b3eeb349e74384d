"""`npdrt distance`."""

from __future__ import annotations

import dataclasses
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from npdrt import data, store
from npdrt.cli.common import echo, json_option, print_json, table
from npdrt.errors import Error
from npdrt.store import Checkpoint, container
from npdrt.trust import compare

TOTALS = {  # function of the relative perturbations -> what it is called here
    "deep_relative_trust": "prod(1 + r) - 1",
    "log_deep_relative_trust": "  its log(1 + .)",
    "squared_deep_relative_trust": "prod(1 + r^2) - 1",
    "log_squared_deep_relative_trust": "  its log(1 + .)",
    "surrogate_trust": "mean r^(2L)",
    "log_surrogate_trust": "  its log",
}


@click.command("distance")
@click.argument("a", metavar="A", type=click.Path(path_type=Path))
@click.argument("b", metavar="B", type=click.Path(path_type=Path))
@click.option("--conditioning", is_flag=True, help="Condition numbers and spectral shift a layer.")
@click.option(
    "--bounds/--no-bounds",
    "bounded",
    default=True,
    help="The theorems' bounds, an SVD or three a layer.  [default: bounds]",
)
@click.option(
    "--samples",
    type=click.IntRange(min=0),
    default=0,
    help="Inputs of A's data to hold the bounds against.  [default: 0]",
)
@click.option(
    "--data-dir",
    type=click.Path(path_type=Path),
    help="Where data sets are.  [default: $NPDRT_DATA, else the cache]",
)
@json_option
def command(
    a: Path,
    b: Path,
    conditioning: bool,
    bounded: bool,
    samples: int,
    data_dir: Path | None,
    as_json: bool,
) -> None:
    """How far B is from A: relative perturbations, deep relative trust, the theorems' bounds.

    A and B are run directories or checkpoints of one model. A layer is an array of two axes or
    more; r is the norm of its change over its norm in A. The bounds are those of multilayer
    perceptrons, each with what it assumes and whether that is so: of the function's relative
    change, and of its input Jacobian's (--json has every layer's). With --samples the largest
    change that was measured stands beside them.
    """
    if samples and not bounded:
        raise click.UsageError(
            "--samples measures against the bounds, which --no-bounds leaves out."
        )
    files = [_file(path) for path in (a, b)]
    before, after = map(store.load, files)
    report = {
        "a": _about(files[0], before),
        "b": _about(files[1], after),
        **compare.weights(before.params, after.params, conditioning=conditioning),
        "bounds": [],
        "no_bounds": "not asked for",
    }
    if bounded:
        report |= _bounds(before, after, samples, data_dir)
    if as_json:
        print_json(report)
    else:
        echo(_text(report))


def _file(path: Path) -> Path:
    file = container.within(path, "checkpoint.h5")
    if not file.exists():
        raise Error(container.missing(path))
    return file


def _about(file: Path, checkpoint: Checkpoint) -> dict[str, Any]:
    progress = checkpoint.meta.get("progress")
    step = progress.get("step") if isinstance(progress, dict) else None
    return {"file": str(file), "step": step}


# --- what is measured ------------------------------------------------------------------------


def _bounds(
    before: Checkpoint, after: Checkpoint, samples: int, data_dir: Path | None
) -> dict[str, Any]:
    """The theorems' bounds, or why there are none."""
    configs = [checkpoint.meta.get("config") for checkpoint in (before, after)]
    pair, reason = compare.perceptrons(before.params, after.params, configs)
    if pair is None:
        if samples:
            raise Error(f"--samples asks for bounds, and there are none: {reason}")
        return {"bounds": [], "no_bounds": reason}
    found = compare.worst_bounds(pair, _inputs(configs[0], samples, data_dir))
    return {"bounds": [dataclasses.asdict(bound) for bound in found], "no_bounds": None}


def _inputs(config: Any, samples: int, data_dir: Path | None) -> Sequence[Any]:
    """The first inputs of the run's test set, or of its training set where it has none."""
    if not samples:
        return [None]
    dataset = data.load(config["data"], data_dir=data_dir, standardise=config["standardise"])
    x = dataset.x if dataset.x_test is None else dataset.x_test
    return [row.reshape(-1) for row in x[:samples]]


# --- for a person ----------------------------------------------------------------------------


def _text(report: dict[str, Any]) -> str:
    lines = [f"{name.upper()}: {_named(report[name])}" for name in "ab"]
    lines += ["", table(_layer_rows(report["layers"]))]
    if "condition_number" in next(iter(report["layers"].values())):
        lines += ["", table(_spectrum_rows(report["layers"]))]
    if report["others"]:
        lines += ["", _wrapped(f"not layers, left out: {', '.join(report['others'])}")]
    count = len(report["layers"])
    rows: list[tuple[str, ...]] = [("deep relative trust", f"L = {count}")]
    rows += [(what, _number(report["totals"][name])) for name, what in TOTALS.items()]
    rows += [("Euclidean, |dW|^2", _number(report["totals"]["euclidean_trust"]))]
    lines += ["", table(rows), "", *_bound_lines(report)]
    return "\n".join(lines)


def _named(about: dict[str, Any]) -> str:
    step = "" if about["step"] is None else f", step {about['step']}"
    return f"{about['file']}{step}"


def _layer_rows(layers: dict[str, Any]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [("layer", "shape", "norm in A", "norm in B", "r")]
    for name, d in layers.items():
        keys = ("norm", "norm_after", "relative_perturbation")
        rows.append((name, "x".join(map(str, d["shape"])), *(_number(d[key]) for key in keys)))
    return rows


def _spectrum_rows(layers: dict[str, Any]) -> list[tuple[str, ...]]:
    head = ("condition numbers", "A", "B", "B - A", "spectral shift")
    rows: list[tuple[str, ...]] = [head]
    keys = ("condition_number", "condition_number_after", "condition_number_of_change")
    for name, d in layers.items():
        rows.append((name, *(_number(d[key]) for key in (*keys, "relative_spectral_shift"))))
    return rows


def _bound_lines(report: dict[str, Any]) -> list[str]:
    """The bounds on the function and on the input's Jacobian, and what they assume."""
    if not report["bounds"]:
        return [_wrapped(f"bounds: none; {report['no_bounds']}")]
    shown = [bound for bound in report["bounds"] if bound["layer"] in (None, 0)]
    rows = [("bound on", "relative change of", "at most", "measured", "guaranteed")]
    for bound in shown:
        what = "f" if bound["layer"] is None else "df/dx"
        what += ", squared" if bound["name"].startswith("v1") else ""
        numbers = (_large(bound["log_value"]), _number(bound["measured"]))
        rows.append((bound["name"], what, *numbers, _yes(bound["guaranteed"])))
    lines, groups = [table(rows), "", "what they assume:"], _by_assumptions(shown)
    for assumed, names in groups.items():
        told = ", ".join(f"{name}: {_yes(holds)}" for name, holds in assumed)
        lines.append(_wrapped(f"{'; '.join(names)} - {told}"))
    return lines


def _by_assumptions(shown: list[dict[str, Any]]) -> dict[tuple[tuple[str, bool], ...], list[str]]:
    """The names of the bounds that assume the same, by what they assume."""
    groups: dict[tuple[tuple[str, bool], ...], list[str]] = {}
    for bound in shown:
        key = tuple(bound["holds_assumptions"].items())
        groups.setdefault(key, []).append(bound["name"])
    return groups


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 80, subsequent_indent="  ")


def _yes(holds: bool) -> str:
    return "yes" if holds else "no"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.5g}"


def _large(log: float) -> str:
    """exp(log), also where it is beyond float64."""
    if abs(log) < 700 or not math.isfinite(log):
        return _number(math.exp(log))
    exponent = math.floor(log / math.log(10))
    return f"{math.exp(log - exponent * math.log(10)):.4f}e{exponent:+d}"
