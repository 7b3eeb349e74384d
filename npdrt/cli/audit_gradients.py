"""`npdrt audit-gradients`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import click

from npdrt import data
from npdrt.cli.common import Name, answer, json_option, table
from npdrt.cli.options import config_options, configuration, settings_of
from npdrt.conform.gradients import ORACLES, TOLERANCES, Comparison, GradientAudit, Problem, audit
from npdrt.data import text
from npdrt.data.text import Text
from npdrt.errors import Error
from npdrt.models import Model
from npdrt.train.config import Config, build_model, example_shape, load_data, resolve
from npdrt.train.step import Task

# The fields of `Config` that decide the loss; batch size and dtype have other defaults here.
DECISIVE = ("model", "model_options", "data", "standardise", "seed")


@click.command("audit-gradients")
@config_options(*DECISIVE)
@click.option(
    "--batch-size",
    "--batch",
    type=click.IntRange(min=1),
    help="The first so many examples; of text, streams.  [default: 32]",
)
@click.option(
    "--dtype",
    type=Name(list(TOLERANCES)),
    default="float64",
    help="Of npdrt's pass.  [default: float64]",
)
@click.option(
    "--tolerance",
    type=float,
    help="Largest accepted error.  [default: "
    + ", ".join(f"{limit:g} in {dtype}" for dtype, limit in TOLERANCES.items())
    + "]",
)
@click.option(
    "--against",
    type=Name(list(ORACLES)),
    multiple=True,
    help="An oracle that must be there; may be repeated.  [default: those installed]",
)
@json_option
def command(
    tolerance: float | None,
    against: tuple[str, ...],
    as_json: bool,
    data_dir: Path | None,
    **given: Any,
) -> None:
    """npdrt's gradients against those of autograd, PyTorch and JAX.

    The loss is the softmax cross-entropy of the network that the options describe (mlp, resnet18 or
    transformer, without dropout), at its first weights, on a batch of --data. Each oracle repeats
    the forward pass in its own operations and computes in float64 on the same values. An error is
    max|ours - oracle| / max|oracle|, of the loss and of every parameter's gradient. Exit code 0 if
    all are within the tolerance, 1 if one is not, 4 if no oracle is installed.

    In float32 the errors are those of npdrt's rounding. Two kinds exceed the tolerance and are not
    faults: a relu whose argument rounds to the other side of 0, and derivatives below float32's
    range, as under 50 layers of sigmoid.

    \b
    --json prints one object:
      model, model_options, data, batch_size, seed, dtype: what was audited
      tolerance, loss       the limit; npdrt's loss
      zero                  parameters whose gradient is zero throughout
      oracles               a list: oracle, version, loss, loss_error, errors
                            (by parameter), overall (all as one vector), error
                            and worst (the largest and whose it is), agrees
      absent                oracles that were not asked, with the reason
      spread                the largest error between two oracles, or null
      agrees                whether all do
    """
    config, dataset, model = _described(given, data_dir)
    found = audit(_problem(config, dataset, model), tolerance=tolerance, against=against)
    answer(as_json, _as_json(found, config), lambda: _text(found, config))
    if not found.agrees:
        raise SystemExit(1)


def _described(given: dict[str, Any], data_dir: Path | None) -> tuple[Config, data.Dataset, Any]:
    """The configuration with every default filled in, the data set and the model."""
    config = configuration(settings_of(given))
    dataset = load_data(config, data_dir)
    config = resolve(config, dataset)
    return config, dataset, build_model(config, dataset)


def _problem(config: Config, dataset: data.Dataset, model: Model) -> Problem:
    """The loss of the model at its first weights, on the first examples."""
    if hasattr(model, "discriminate"):
        raise Error(f"model {config.model} has two networks with a loss each; audit one with one")
    x, y = _first(dataset, config.batch_size)
    if dataset.classes is None:
        raise Error(f"{config.data}: y holds targets; the audited loss needs integer labels")
    if dataset.vocabulary is None:
        x = x.reshape(len(x), *example_shape(model, dataset)).astype(config.dtype)
    params = model.init(seed=config.seed, dtype=config.dtype)
    buffers = Task(model, dataset.classes).buffers(config.seed, "cpu", config.dtype)
    return Problem(model, params, buffers, x, y)


def _first(dataset: data.Dataset, count: int) -> tuple[Any, Any]:
    """The first examples; of text, the first sequence of so many streams."""
    if isinstance(dataset, Text):
        streams = dataset.as_streams_for(count)
        return streams.x[: streams.length], streams.y[: streams.length]
    if count > len(dataset.x):
        most = len(dataset.x)
        raise Error(f"batch size: expected 1 to {most}, the number of examples; got {count}")
    return dataset.x[:count], dataset.y[:count]


# --- the report -------------------------------------------------------------------------------


def _as_json(found: GradientAudit, config: Config) -> dict[str, Any]:
    settings = {name: getattr(config, name) for name in ("model", "data", "seed", "dtype")}
    return {
        **settings,
        "model_options": dict(config.model_options),
        "batch_size": config.batch_size,
        "tolerance": found.tolerance,
        "loss": found.loss,
        "zero": found.zero,
        "oracles": [_oracle_json(c, found.tolerance) for c in found.comparisons],
        "absent": found.absent,
        "spread": found.spread,
        "agrees": found.agrees,
    }


def _oracle_json(c: Comparison, tolerance: float) -> dict[str, Any]:
    """The comparison's fields, and what follows from them."""
    return {**vars(c), "error": c.error, "worst": c.worst, "agrees": c.agrees(tolerance)}


def _text(found: GradientAudit, config: Config) -> str:
    """The report for a person."""
    heads = ("oracle", "version", "loss", "overall", "worst", "parameter", "verdict")
    rows = [heads, *(_row(c, found.tolerance) for c in found.comparisons)]
    rows += [(name, *[""] * 5, why) for name, why in found.absent.items()]
    lines = [_subject(config), f"loss {found.loss:.6g}, tolerance {found.tolerance:g}", ""]
    lines += [table(rows), "", "max|ours - oracle| / max|oracle|: of the loss, of all gradients"]
    lines += ["together (overall), of each parameter's gradient (worst)"]
    return "\n".join([*lines, *_notes(found)])


def _subject(config: Config) -> str:
    """What is differentiated, in words."""
    options = {n: v for n, v in config.model_options.items() if v not in (False, "none")}
    words = [name if value is True else f"{name} {value}" for name, value in options.items()]
    examples = "streams" if text.named(config.data) else "examples"
    batch = f"{config.batch_size} {examples} of {config.data}"
    return ", ".join([config.model, *words, batch, config.dtype, f"seed {config.seed}"])


def _row(c: Comparison, tolerance: float) -> tuple[str, ...]:
    errors = (f"{error:.1e}" for error in (c.loss_error, c.overall, c.error))
    return (c.oracle, c.version, *errors, c.worst, _verdict(c, tolerance))


def _verdict(c: Comparison, tolerance: float) -> str:
    """Agreement, or where it ends: a wrong derivative shows in its own and all earlier layers."""
    beyond = c.beyond(tolerance)
    if beyond:
        return f"differs in {len(beyond)} of {len(c.errors)} arrays; {beyond[-1]} is one"
    return "agrees" if c.agrees(tolerance) else "differs in the loss"


def _notes(found: GradientAudit) -> list[str]:
    """What a reader should know of these numbers."""
    notes = []
    if found.spread is not None:
        notes.append(f"the oracles differ among themselves by at most {found.spread:.1e}")
        if not found.spread <= found.tolerance:
            notes[0] += ": rounding alone exceeds the tolerance here"
    if not math.isfinite(found.loss):
        notes.append("npdrt's loss is not finite: try less depth, or another --init")
    if found.zero:
        count = f"{len(found.zero)} of {len(found.comparisons[0].errors)}"
        notes.append(f"{count} gradients are zero throughout, where agreement says nothing")
    return notes
