"""The values that a function may take, given its value and slope at one point, under each model of
trust (v1, Figure 1)."""

from __future__ import annotations

import numpy as np
from msgspec import Struct

from npdrt.schema import Depths, Number, Size, Sizes
from npdrt.train.studies.figure import Figure, Line, Panel
from npdrt.train.studies.study import Report, Table, Work
from npdrt.trust import squared_deep_relative_trust

NEEDS_RUNS = False


class Options(Struct):
    """depths: L; x: rows; slope of the line; largest of the figure's axis."""

    depths: Depths
    x: Sizes
    slope: Number
    largest: Size


def report(work: Work) -> Report:
    """Half the width of the region at distance x: x^2, and prod(1 + x^2/L) - 1 at each depth."""
    options = work.recipe.options
    depths = options["depths"]
    rows = [
        (x, x**2, *(width(x, depth) for depth in depths), float(np.expm1(x**2)))
        for x in options["x"]
    ]
    columns = ("x", "Euclidean", *(f"deep, L = {depth}" for depth in depths), "deep, limit")
    x = np.linspace(-options["largest"], options["largest"], 201)
    deep = np.array([width(float(value), depths[-1]) for value in x])
    panels = (
        _panel("Euclidean trust", x, options["slope"], x**2),
        _panel(f"Deep relative trust, L = {depths[-1]}", x, options["slope"], deep),
    )
    table = Table("Half the width of the trust region at distance x", columns, tuple(rows))
    notes = (
        "x^2 is the sum of the squared relative perturbations, spread evenly over the layers. At "
        "L = 1 both models agree; in the limit of large L the region is exp(x^2) - 1 wide.",
    )
    return Report((table,), Figure("regions", work.recipe.title, panels), notes)


def width(x: float, depth: int) -> float:
    """prod_l (1 + x**2 / L) - 1: squared trust at r_l**2 = x**2 / L in every layer."""
    r = {f"{layer:04d}": np.asarray(abs(x) / np.sqrt(depth)) for layer in range(depth)}
    return float(squared_deep_relative_trust(r))


def _panel(title: str, x: np.ndarray, slope: float, half: np.ndarray) -> Panel:
    line = slope * x
    lines = (
        Line("linear model", x, line),
        Line("edge of the region", x, line + half, "dashed", group=1),
        Line("", x, line - half, "dashed", group=1),
        Line("known value and slope", np.zeros(1), np.zeros(1), "points", group=2),
    )
    return Panel(title, "perturbation x", "function", lines, ylim=(-10, 10))
