"""What the referee knows of Fromage."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from npdrt.conform.case import Slots
from npdrt.conform.cases import Draft, Drawer
from npdrt.conform.formats import Format
from npdrt.conform.page import (
    ROUND,
    Norms,
    Numbers,
    Rounding,
    divide,
    minus,
    norm,
    quotient,
    representable,
    scaled,
    sizes,
)
from npdrt.conform.rules.evaluate import Arithmetic, largest
from npdrt.conform.rules.rule import (
    COMMON,
    NORMS,
    STATE,
    Dialect,
    Generated,
    LibraryOptimizer,
    Rule,
    Settings,
)

# --- the section "fromage" of docs/updates.md -----------------------------------------------------


def page(
    w: Numbers, g: Numbers, state: dict[str, Any], lr: float, dtype: str, norms: Norms = None, *,
    norm_bound: float | None = None,
) -> Numbers:  # fmt: skip
    """The sequence."""
    fl = ROUND[dtype]
    if norm_bound is not None and "max_norm" not in state:
        state["max_norm"] = norm_bound * sizes(w, g, norms)[0]
    s = page_rate(w, g, lr, dtype, norms)
    w = quotient(minus(w, s, g, fl), math.sqrt(1.0 + lr * lr), fl)
    return w if norm_bound is None else page_bounded(w, state["max_norm"], fl)


def page_rate(w: Numbers, g: Numbers, lr: float, dtype: str, norms: Norms) -> float:
    """`s` of the sections "fromage" and "lars_lesion"."""
    nw, ng = sizes(w, g, norms)
    s = divide(lr * nw, ng) if nw > 0 and ng > 0 else lr
    return representable(s, lr, dtype)


def page_bounded(w: Numbers, limit: float, fl: Rounding) -> Numbers:
    """The last two lines."""
    nw = norm(w)
    return scaled(w, divide(limit, nw) if nw > limit else 1.0, fl)


# --- how implementations differ -------------------------------------------------------------------

CLAUSES: dict[str, dict[str, str]] = {
    "zero norm": {
        "plain step": "lr * g where either norm is not > 0",
        "floor 1e-6": "norms are at least 1e-6",
        "floor 1e-5": "norms are at least 1e-5",
        "epsilon 1e-8": "1e-8 is added to the gradient's norm, nothing is guarded",
        "epsilon 1e-8, guarded": "1e-8 is added to the gradient's norm; the plain step at zero",
        "unguarded": "0/0, or a zero parameter that never moves",
        "no step": "no step where either norm is not > 0",
        "step of length lr": "a ratio of 1 / |g| where the parameter is zero",
    },
    "prefactor": {
        "divided": "(w - s g) / sqrt(1 + lr^2)",
        "absent": "w - s g",
        "squared": "(w - s g) / (1 + lr^2)",
        "multiplied": "(w - s g) * sqrt(1 + lr^2)",
        "on the weight": "w / sqrt(1 + lr^2) - s g",
        "on the step": "w - s g / sqrt(1 + lr^2)",
        "of lr": "(w - s g) / sqrt(1 + lr)",
        "not at zero norm": "absent where either norm is not > 0",
        "first step only": "absent after the first step",
    },
    "ratio": {
        "|w| / |g|": "the norm of the parameter over that of the gradient",
        "|g| / |w|": "upside down",
        "1 / |g|": "without the parameter's norm",
        "|w|": "without the gradient's norm",
        "sqrt(|w| / |g|)": "the root of the ratio",
    },
    "norm bound": {
        "initial norm": "norm_bound * |w| of the first parameter",
        "absolute": "norm_bound itself",
        "ignored": "no bound",
        "of this step": "norm_bound * |w| of the parameter before the step",
        "of the first result": "norm_bound * |w| of the parameter after the first step",
    },
    "state": {k: STATE["state"][k] for k in ("of each tensor", "shared")},  # all it has is a bound
    **COMMON,
    **NORMS,
}
FLOORS = {"floor 1e-6": 1e-6, "floor 1e-5": 1e-5}


def step(
    c: dict[str, str], w: Any, g: Any, slots: Slots, h: dict[str, Any], a: Arithmetic
) -> tuple[Any, Slots, Any]:
    """w <- (w - lr |w| / |g| g) / sqrt(1 + lr^2), then the norm bound."""
    limit = bound(c, w, slots, h, a)
    nw, ng = a.note("|w|", a.norm(w)), a.note("|g|", a.norm(g))
    s = a.note("s", relative_rate(c, nw, ng, h["lr"], a))
    plain = (nw > 0) & (ng > 0)
    first = slots["step"] == 0
    new = a.note("w - s g", prefactored(c, w, h["sign"] * s * g, h["lr"], plain, first))
    a.change = np.abs(s * g)
    a.slack = a.of_norms * a.change
    scale = largest(w, a.change, new)
    if limit is None:
        return new, slots, scale
    size = a.norm(new)
    if c["norm bound"] == "of the first result":
        limit = slots["max_norm"] if "max_norm" in slots else h["norm_bound"] * size
    factor = np.where(size > limit, limit / np.where(size > limit, size, size * 0 + 1), 1)
    a.slack = a.slack + np.where(size > limit, 2 * a.of_norms * np.abs(new), 0)
    a.change = largest(a.change, np.where(factor < 1, new, 0))  # of which two norms have the size
    return new * factor, {**slots, "max_norm": slots.get("max_norm", limit)}, scale


def relative_rate(c: dict[str, str], nw: Any, ng: Any, lr: Any, a: Arithmetic) -> Any:
    """lr |w| / |g|, with what the clauses say of zero norms."""
    usable, one = (nw > 0) & (ng > 0), nw * 0 + 1
    match c["zero norm"]:
        case "floor 1e-6" | "floor 1e-5":
            floor = a.real(FLOORS[c["zero norm"]])
            return lr * ratio(c, np.maximum(nw, floor), np.maximum(ng, floor))
        case "epsilon 1e-8":
            return lr * ratio(c, nw, ng + a.real(1e-8))
        case "unguarded":
            return lr * ratio(c, nw, ng)
        case "epsilon 1e-8, guarded":
            ng = ng + np.where(usable, a.real(1e-8), 0)
    safe = lr * ratio(c, np.where(usable, nw, one), np.where(usable, ng, one))
    match c["zero norm"]:
        case "no step":
            return np.where(usable, safe, safe * 0)
        case "step of length lr":
            other = np.where(ng > 0, lr / np.where(ng > 0, ng, one), lr)
            return np.where(usable, safe, other)
    s = np.where(usable, safe, lr)
    return a.representable(s, s, lr)


def ratio(c: dict[str, str], nw: Any, ng: Any) -> Any:
    """The ratio of the norms."""
    match c["ratio"]:
        case "|g| / |w|":
            return ng / nw
        case "1 / |g|":
            return 1 / ng
        case "|w|":
            return nw
        case "sqrt(|w| / |g|)":
            return np.sqrt(nw / ng)
    return nw / ng


def prefactored(c: dict[str, str], w: Any, change: Any, lr: Any, usable: Any, first: bool) -> Any:
    """(w - change) / sqrt(1 + lr^2), by the clause "prefactor"."""
    p = np.sqrt(1 + lr * lr)
    match c["prefactor"]:
        case "absent":
            return w - change
        case "squared":
            return (w - change) / (1 + lr * lr)
        case "multiplied":
            return (w - change) * p
        case "on the weight":
            return w / p - change
        case "on the step":
            return w - change / p
        case "of lr":
            return (w - change) / np.sqrt(1 + lr)
        case "first step only" if not first:
            return w - change
        case "not at zero norm":
            return (w - change) / np.where(usable, p, p * 0 + 1)
    return (w - change) / p


def bound(c: dict[str, str], w: Any, slots: Slots, h: dict[str, Any], a: Arithmetic) -> Any:
    """The largest norm allowed, or None."""
    setting = h.get("norm_bound")
    if setting is None or c["norm bound"] == "ignored":
        return None
    match c["norm bound"]:
        case "absolute":
            return setting
        case "of this step":
            return setting * a.norm(w)
    return slots["max_norm"] if "max_norm" in slots else setting * a.norm(w)


DIALECTS = (
    Dialect(
        "published",
        "Bernstein et al. 2020, Algorithm 1; zero norms as in the authors' code (jxbz/fromage)",
        {},
        "also kozistr's pytorch_optimizer and NVlabs imaginaire",
    ),
    Dialect(
        "optax",
        "optax/_src/alias.py fromage, optax/_src/transform.py scale_by_trust_ratio",
        {"zero norm": "floor 1e-6"},
        "no norm bound",
    ),
    Dialect(
        "nfnets",
        "deepmind-research nfnets, optim.py Fromage",
        {"zero norm": "floor 1e-5"},
        "its weight decay, inside the normalised gradient, is not asked for",
    ),
)

# --- what is asked --------------------------------------------------------------------------------

SETTINGS: tuple[Settings, ...] = ({"norm_bound": None}, {"norm_bound": 0.99}, {"norm_bound": 0.0})


def keeps_bound(settings: Mapping[str, Any]) -> str:
    """`Rule.remembers`."""
    return "" if settings.get("norm_bound") is None else "a bound"


def opposed(f: Format, draw: Drawer) -> Iterator[Draft]:
    """A gradient that points against the parameter, for every rule that takes norms."""
    w = draw("w", 2, 3)
    yield Draft("g = -w / 2", ("WEIGHT_DECAY",), w, -w / 2)


def edges(f: Format, draw: Drawer) -> Iterator[Draft]:
    """Bounds on the norm."""
    w, g = draw("w", 2, 3), draw("g", 2, 3)
    yield from opposed(f, draw)
    yield Draft("grows", ("NORM_BOUND",), w, -w, settings={"norm_bound": 1.0})
    yield Draft("shrinks", ("NORM_BOUND",), w, w, settings={"norm_bound": 1.0})
    twice = (np.stack([-w, -w, g]), (1.0, 3.0, 0.1))
    yield Draft("grows twice", ("NORM_BOUND",), w, *twice, settings={"norm_bound": 2.0})


RULE = Rule(
    name="fromage",
    added=0,
    page=page,
    clauses=CLAUSES,
    step=step,
    dialects=DIALECTS,
    ulps=12.0,
    remembers=keeps_bound,
    asked=SETTINGS,
    edges=edges,
    generated=(Generated(SETTINGS[1]), Generated(SETTINGS[0], plainer=True)),
    optimizers=(
        LibraryOptimizer("optax.fromage", ()),
        LibraryOptimizer("pytorch_optimizer.Fromage"),
    ),
)
