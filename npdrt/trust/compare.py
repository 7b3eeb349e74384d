"""Two networks compared, as dicts of plain numbers: what `npdrt distance` prints."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from msgspec import Struct

from npdrt import schema
from npdrt.arrays import Array, Params, to_host
from npdrt.errors import FileRefused
from npdrt.trust import distances
from npdrt.trust.bounds import Bound, all_bounds
from npdrt.trust.net import SLOPES, Net
from npdrt.trust.pair import Pair
from npdrt.trust.spectra import condition_number, matrix, spectral_shift

TOTALS = (  # functions of the relative perturbations
    "deep_relative_trust",
    "log_deep_relative_trust",
    "squared_deep_relative_trust",
    "log_squared_deep_relative_trust",
    "surrogate_trust",
    "log_surrogate_trust",
)


# The fields of a perceptron that decide its function, with their defaults.
PLAIN = {
    "nonlinearity": "relu",
    "output_nonlinearity": False,
    "residual": False,
    "normalisation": "none",
}


def weights(before: Params, after: Params, *, conditioning: bool) -> dict[str, Any]:
    """`layers` and `totals` of all layers of two networks; "others" are the names of the rest.

    Raises `Error` unless both have arrays of the same names and shapes.
    """
    distances.check_same_shapes(before, after)
    old, new = distances.weights(before), distances.weights(after)
    distances.check_same_layers(old, new)
    return {
        "layers": layers(old, new, conditioning=conditioning),
        "others": [name for name in before if name not in old],
        "totals": totals(old, new),
    }


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


# --- bounds -----------------------------------------------------------------------------------


class Fields(Struct):
    """The fields of `PLAIN` that a configuration names."""

    nonlinearity: str = ""
    output_nonlinearity: bool = False
    residual: bool = False
    normalisation: str = ""


class Described(Struct):
    """The parts of a run's configuration that the bounds need."""

    model: str
    model_options: Fields
    data: str
    standardise: bool | str


def perceptrons(before: Params, after: Params, configs: Sequence[Any]) -> tuple[Pair | None, str]:
    """Two trained networks as a `Pair`; or None, and why no theorem applies to them.

    configs: the configuration of the run of each.
    """
    options, reason = _perceptron(configs)
    if reason:
        return None, reason
    kind, last = options["nonlinearity"], options["output_nonlinearity"]
    nets = [Net.from_params(p, kind, output_nonlinearity=last) for p in (before, after)]
    return Pair(*nets), ""


def _perceptron(configs: Sequence[Any]) -> tuple[dict[str, Any], str]:
    """The model's fields, and why no theorem applies to it, "" if they do."""
    try:
        for config in configs:
            schema.check(config, Described, "config")
    except FileRefused as error:
        return {}, f"the checkpoints do not say what model they are of ({error})"
    if {config["model"] for config in configs} != {"mlp"}:
        return {}, "the theorems speak of multilayer perceptrons; these are of another model"
    options, other = ({**PLAIN, **config["model_options"]} for config in configs)
    if any(options[name] != other[name] for name in PLAIN):
        return {}, f"A and B differ in one of {', '.join(PLAIN)}"
    if options["residual"] or options["normalisation"] != "none":
        return {}, "the theorems speak of perceptrons without skip connections or normalisation"
    if options["nonlinearity"] not in SLOPES:
        known = ", ".join(SLOPES)
        return {}, f"the theorems know {known}; this network has {options['nonlinearity']}"
    return options, ""


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
