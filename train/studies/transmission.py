"""How much of its input relu transmits: |relu(x)| / |x| (author response to reviewer 1)."""

from __future__ import annotations

from typing import Any

import numpy as np
from msgspec import Struct

from npdrt import ops
from npdrt.arrays import Array
from npdrt.random import Random
from npdrt.schema import Positive
from npdrt.train.studies.figure import Figure, Line, Panel
from npdrt.train.studies.study import Report, Table, Work
from npdrt.train.studies.sweep import Run

MOST = 1 << 28  # numbers of the normal vectors of one width


class Options(Struct):
    """widths, samples: of the normal vectors."""

    widths: list[Positive]
    samples: Positive

    def __post_init__(self) -> None:
        if max(self.widths, default=0) * self.samples > MOST:
            raise ValueError(f"a width times the samples is at most {MOST:,}")


def report(work: Work) -> Report:
    """Mean and spread over normal vectors, and over the layers of trained nets."""
    options = work.recipe.options
    normal = [_row(width, _normal(width, options["samples"])) for width in options["widths"]]
    layers = [(run, *_layers(run, work)) for run in work.runs]
    rows = [(_name(run), *row) for run, names, values in layers for row in _by_layer(names, values)]
    statistics = ("mean", "smallest", "largest")
    tables = (
        Table("Standard normal vectors", ("width", *statistics), tuple(normal)),
        Table("Test images, by layer", ("net", "layer", *statistics), tuple(rows)),
    )
    lines = tuple(
        Line(_name(run), range(1, len(values) + 1), [float(np.mean(v)) for v in values], "marked")
        for run, _, values in layers
    )
    panel = Panel("relu", "layer", "mean of |relu(x)| / |x| over images", lines, ylim=(0, 1.02))
    notes = (
        "The response models |relu(x)| = |x|/2. For a vector of symmetric entries the mean of the "
        "square is 1/2, so the ratio itself is near 1/sqrt(2) = 0.7071: 1/2 is the first version's "
        "alpha and beta, which are of squared norms. Only beta/alpha enters the bounds.",
    )
    return Report(tables, Figure("transmission", work.recipe.title, (panel,)), notes)


def transmission(x: Array) -> Any:
    """|relu(x)| / |x| of every row of x (samples, width); nan for a row of zeros."""
    x = np.asarray(x, dtype=np.float64)
    with np.errstate(invalid="ignore"):
        return np.linalg.norm(ops.relu(x), axis=1) / np.linalg.norm(x, axis=1)


def _normal(width: int, samples: int) -> Any:
    return transmission(Random(0, "transmission", width).normal((samples, width)))


def _row(first: Any, values: Any) -> tuple[Any, ...]:
    return first, float(np.nanmean(values)), float(np.nanmin(values)), float(np.nanmax(values))


def _by_layer(names: list[str], values: list[Any]) -> list[tuple[Any, ...]]:
    return [_row(name, ratios) for name, ratios in zip(names, values, strict=True)]


def _name(run: Run) -> str:
    options = run.config.model_options
    return f"{options['depth']} layers, {options['init']}, {run.config.epochs} epochs"


def _layers(run: Run, work: Work) -> tuple[list[str], list[Any]]:
    """The transmission of every relu of a run's last checkpoint, on its test images."""
    source, (model, checkpoint) = work.data(run), work.trained(run)
    params = checkpoint.params
    x = source.x if source.x_test is None else source.x_test
    h, names, values = x[:].reshape(len(x), -1), [], []
    weights = [name for name in params if name.endswith("weight")]
    for name in weights[: model.depth - 1]:
        z = ops.linear(h, params[name], params.get(name.replace("weight", "bias")))
        names.append(name.removesuffix("/weight"))
        values.append(transmission(z))
        h = ops.relu(z)
    return names, values
