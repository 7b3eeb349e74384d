"""Deep relative trust and its surrogate, for one relative size in all layers (v1, Figure 3)."""

from __future__ import annotations

import numpy as np
from msgspec import Struct

from npdrt.schema import Depths, Size, Sizes
from npdrt.train.studies.figure import Figure, Line, Panel
from npdrt.train.studies.study import Report, Table, Work
from npdrt.trust import squared_deep_relative_trust, surrogate_ratio, surrogate_trust

NEEDS_RUNS = False


class Options(Struct):
    """depths: L of each panel; eta: rows of the table; largest of the figure's axis."""

    depths: Depths
    eta: Sizes
    largest: Size


def report(work: Work) -> Report:
    """D, D' and D / D' of the first version's Definitions 2 and 4."""
    options = work.recipe.options
    rows = [
        (depth, eta, *both(eta, depth), float(surrogate_ratio(eta, depth)))
        for depth in options["depths"]
        for eta in options["eta"]
    ]
    columns = ("L", "eta", "deep relative trust D", "surrogate D'", "D / D'")
    panels = tuple(_panel(depth, options["largest"]) for depth in options["depths"])
    table = Table(
        "Trust of a perturbation of relative size eta in every layer", columns, tuple(rows)
    )
    notes = (
        "D is prod(1 + eta^2) - 1 and D' is eta^(2L): they agree for eta^2 much larger than L, and "
        "differ by many orders of magnitude at the sizes that training uses. The paper's caption "
        "says L = 20; the authors' plotting code has L = 10.",
    )
    return Report((table,), Figure("surrogate", work.recipe.title, panels), notes)


def both(eta: float, depth: int) -> tuple[float, float]:
    """(D, D') for `depth` layers with r_l = eta."""
    r = {f"{layer:04d}": np.asarray(eta) for layer in range(depth)}
    return float(squared_deep_relative_trust(r)), float(surrogate_trust(r))


def _panel(depth: int, largest: float) -> Panel:
    eta = np.geomspace(largest / 1000, largest, 200)
    values = np.array([both(float(e), depth) for e in eta])
    lines = (Line("D", eta, values[:, 0]), Line("surrogate D'", eta, values[:, 1], "dashed"))
    return Panel(f"L = {depth}", "relative size eta of every layer's perturbation", "trust",
                 lines, xlog=True, ylog=True, ylim=(1e-8, 1e10))  # fmt: skip
