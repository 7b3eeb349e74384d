"""Two networks side by side: what `npdrt distance` tells of them, as dicts of plain numbers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from npdrt.arrays import Array, Params, to_host
from npdrt.trust import distances
from npdrt.trust.bounds import Bound, Pair, all_bounds
from npdrt.trust.spectra import condition_number, matrix, spectral_shift

TOTALS = (  # functions of the relative perturbations
    "deep_relative_trust",
    "log_deep_relative_trust",
    "squared_deep_relative_trust",
    "log_squared_deep_relative_trust",
    "surrogate_trust",
    "log_surrogate_trust",
)


def layers(before: Params, after: Params, *, conditioning: bool) -> dict[str, dict[str, Any]]:
    """Norms and relative change of every layer; condition numbers and spectral shift if asked for.

    before, after: arrays of the same names and shapes, matrices or kernels with `conditioning`.
    """
    relative = distances.relative_perturbations(before, after)
    found = {}
    for name, w in before.items():
        found[name] = {
            "shape": list(w.shape),
            "norm": float(to_host(distances.safe_norm(w))),
            "norm_after": float(to_host(distances.safe_norm(after[name]))),
            "relative_perturbation": float(to_host(relative[name])),
        }
        if conditioning:
            found[name] |= _spectrum(w, after[name])
    return found


def _spectrum(before: Array, after: Array) -> dict[str, float | None]:
    """Condition numbers of W, W~ and dW, which has none where it is zero, and spectral shift."""
    change = matrix(after) - matrix(before)
    return {
        "condition_number": condition_number(before),
        "condition_number_after": condition_number(after),
        "condition_number_of_change": condition_number(change) if np.any(change) else None,
        "relative_spectral_shift": spectral_shift(matrix(before), change).relative,
    }


def totals(before: Params, after: Params) -> dict[str, float]:
    """The distances over all layers: `TOTALS` and the Euclidean one."""
    r = distances.relative_perturbations(before, after)
    found = {name: float(to_host(getattr(distances, name)(r))) for name in TOTALS}
    return found | {"euclidean_trust": float(to_host(distances.euclidean_trust(before, after)))}


def worst_bounds(pair: Pair, inputs: Sequence[Array | None]) -> list[Bound]:
    """`all_bounds` over several inputs: the largest change measured, what holds for all of them.

    inputs: at least one; None is no input.
    """
    found = [all_bounds(pair, x) for x in inputs]
    return [_worst(same) for same in zip(*found, strict=True)]


def _worst(same: Sequence[Bound]) -> Bound:
    """One bound over several inputs. NaN counts as the largest change."""
    assumptions = [bound.holds_assumptions for bound in same]
    largest = max(same, key=_change)
    return dataclasses.replace(
        largest,
        holds_assumptions={name: all(h[name] for h in assumptions) for name in assumptions[0]},
        guaranteed=all(bound.guaranteed for bound in same),
    )


def _change(bound: Bound) -> float:
    """The log of what was measured, for comparing; NaN above all."""
    log = -math.inf if bound.log_measured is None else bound.log_measured
    return math.inf if math.isnan(log) else log
