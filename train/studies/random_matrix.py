"""Singular values of a random matrix, and of the same matrix plus the identity."""

from __future__ import annotations

import math
from typing import Annotated, Any

import numpy as np
from msgspec import Meta, Struct

from npdrt.random import Random
from npdrt.schema import Positive, Size
from npdrt.train.studies.figure import Figure, Line, Panel
from npdrt.train.studies.study import Report, Table, Work
from npdrt.trust import skip_spectra

NEEDS_RUNS = False


class Options(Struct):
    """bins of [0, largest]; near: values below it are near 0."""

    size: Annotated[int, Meta(ge=1, le=10_000)]
    draws: Positive
    bins: Positive
    largest: Size
    near: Size


def report(work: Work) -> Report:
    """Smallest, mean and largest singular value and how many are near 0, a row a draw."""
    options = work.recipe.options
    found = [_spectra(options["size"], seed) for seed in range(options["draws"])]
    rows = [
        (seed, name, *_row(values, options["near"]))
        for seed, pair in enumerate(found)
        for name, values in zip(("A", "Id + A"), pair, strict=True)
    ]
    rows.append(("limit", "A", *_limit(options["near"])))
    below = f"share below {options['near']:g}"
    columns = ("draw", "matrix", "smallest", "mean", "largest", below)
    table = Table(f"Singular values, {options['size']} x {options['size']}", columns, tuple(rows))
    lines = tuple(
        _histogram(name, np.concatenate([pair[i] for pair in found]), options)
        for i, name in enumerate(("A", "Id + A"))
    )
    label = "share of singular values in a bin"
    panel = Panel("All draws", "singular value", label, lines)
    notes = (
        "The paper has a picture and no numbers. The limit is the quarter-circle law: density "
        "sqrt(4 s^2 - x^2) / (pi s^2) on [0, 2 s], s = 1/sqrt(3) the deviation of the entries "
        "times sqrt(size).",
    )
    return Report((table,), Figure("random_matrix", work.recipe.title, (panel,)), notes)


def _spectra(size: int, seed: int) -> tuple[Any, Any]:
    """A uniform on (-1, 1) / sqrt(size)."""
    a = Random(seed, "random-matrix").uniform((size, size), -1.0, 1.0) / math.sqrt(size)
    return skip_spectra(a)


def _row(values: Any, near: float) -> tuple[float, ...]:
    sizes = (values.min(), values.mean(), values.max(), (values < near).mean())
    return tuple(map(float, sizes))


def _limit(near: float) -> tuple[float, ...]:
    """The quarter-circle law of deviation s = 1/sqrt(3): 0, 8 s / (3 pi), 2 s, and its share."""
    s = 1.0 / math.sqrt(3.0)
    u = min(near / (2.0 * s), 1.0)
    share = 2.0 / math.pi * (u * math.sqrt(1.0 - u * u) + math.asin(u))
    return 0.0, 8.0 * s / (3.0 * math.pi), 2.0 * s, share


def _histogram(name: str, values: Any, options: Any) -> Line:
    counts, edges = np.histogram(values, bins=options["bins"], range=(0.0, options["largest"]))
    return Line(name, (edges[1:] + edges[:-1]) / 2, counts / len(values), "marked")
