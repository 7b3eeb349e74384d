"""What the referee knows of Lion."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from npdrt.conform.case import Slots
from npdrt.conform.cases import Draft, Drawer
from npdrt.conform.formats import FORMATS, Format
from npdrt.conform.page import ROUND, Norms, Numbers, minus, mixed, scaled
from npdrt.conform.rules.evaluate import Arithmetic, largest
from npdrt.conform.rules.moments import mask, two_betas
from npdrt.conform.rules.rule import (
    COMMON,
    MAXIMIZED,
    STATE,
    Dialect,
    Generated,
    LibraryOptimizer,
    Rule,
    Settings,
)

# --- the section "lion" of docs/updates.md --------------------------------------------------------


def page(
    w: Numbers, g: Numbers, state: dict[str, Any], lr: float, dtype: str, norms: Norms = None, *,
    betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.0,
) -> Numbers:  # fmt: skip
    """The sequence."""
    fl, (beta1, beta2) = ROUND[dtype], betas
    m = state.get("exp_avg", [0.0] * len(w))
    u = [page_sign(x) for x in mixed(beta1, m, 1.0 - beta1, g, fl)]
    state["exp_avg"] = mixed(beta2, m, 1.0 - beta2, g, fl)
    w = scaled(w, 1.0 - lr * weight_decay, fl) if weight_decay != 0 else w
    return minus(w, lr, u, fl)


def page_sign(x: float) -> float:
    """1, -1, +0 for both zeros, or NaN."""
    return x if math.isnan(x) else float((x > 0.0) - (x < 0.0))


# --- how implementations differ -------------------------------------------------------------------

CLAUSES: dict[str, dict[str, str]] = {
    "sign of": {
        "interpolated momentum": "beta1 m + (1 - beta1) g, with the m of before",
        "new momentum": "beta2 m + (1 - beta2) g (Signum)",
        "momentum of before": "m",
        "gradient": "g (signSGD)",
    },
    "momentum": {
        "mean": "beta2 m + (1 - beta2) g",
        "without g weight": "beta2 m + g",
        "by beta1": "beta1 m + (1 - beta1) g",
    },
    "betas": {
        "as set": "beta1 in the step, beta2 in the momentum",
        "exchanged": "beta2 in the step, beta1 in the momentum",
    },
    "weight decay": {
        "times lr": "w (1 - lr wd) before the step, or wd w added to the sign",
        "without lr": "w (1 - wd)",
        "after the step": "(1 - lr wd) times the new parameter",
        "in the gradient": "g + wd w",
        "opposite sign": "w (1 + lr wd)",
        "ignored": "none",
    },
    "mask": {
        "none": "every element makes its step",
        "cautious": "elements with u g > 0 alone, over their share of the tensor, at least 1e-3",
        "cautious, unscaled": "elements with u g > 0 alone",
    },
    **COMMON,
    **MAXIMIZED,
    **STATE,
}


def step(
    c: dict[str, str], w: Any, g: Any, slots: Slots, h: dict[str, Any], a: Arithmetic
) -> tuple[Any, Slots, Any]:
    """Algorithm 2 of Chen et al. under the choices c."""
    kind, lr, wd, slots = c["weight decay"], h["lr"], h.get("weight_decay", 0), dict(slots)
    shrunk = {"times lr": 1 - lr * wd, "without lr": 1 - wd, "opposite sign": 1 + lr * wd}
    before = shrunk.get(kind, 1)
    x, error = interpolated(c, g + wd * w if kind == "in the gradient" else g, slots, h, a)
    u = np.where(x > 0, 1, np.where(x < 0, -1, x * 0))
    u = a.note("u", u * mask(c, u, g))
    a.change = np.abs(lr * u)
    a.slack = 2 * lr * np.where((np.abs(x) <= error) & (error > 0), 1, 0)
    new = before * w - h["sign"] * lr * u
    new = new * (1 - lr * wd) if kind == "after the step" else new
    # a sign that rounding decides stays in the parameter: 8 ulps at this scale are as large
    slots["unsure"] = slots.get("unsure", w * 0) + a.slack
    return a.note("w", new), slots, largest(w, lr, slots["unsure"] * 2 ** (a.format.precision - 3))


def interpolated(
    c: dict[str, str], g: Any, slots: Slots, h: dict[str, Any], a: Arithmetic
) -> tuple[Any, Any]:
    """What the sign is taken of, and how far rounding may move it; moves the momentum on."""
    beta1, beta2 = h["betas"] if c["betas"] == "as set" else h["betas"][::-1]
    old, before = slots.get("exp_avg", g * 0), slots.get("m error", g * 0)
    kept = beta1 if c["momentum"] == "by beta1" else beta2
    m = kept * old + (g if c["momentum"] == "without g weight" else (1 - kept) * g)
    x = a.note("interpolated", beta1 * old + (1 - beta1) * g)
    slots["exp_avg"], slots["m error"] = a.note("m", m), rounding(kept, old, g, before, a)
    match c["sign of"]:
        case "new momentum":
            return m, slots["m error"]
        case "momentum of before":
            return old, before
        case "gradient":
            return g, g * 0
    return x, rounding(beta1, old, g, before, a)


def rounding(beta: Any, m: Any, g: Any, error: Any, a: Arithmetic) -> Any:
    """The error of beta m + (1 - beta) g: that of m, three roundings of each product, one of
    1 - beta on its own, and of numbers that are subnormal; 0 where m and g are."""
    u = 2.0**-a.format.precision
    sizes = 4 * u * (np.abs(beta * m) + np.abs((1 - beta) * g)) + u * np.abs(g)
    found = beta * error + sizes + 2 * a.format.smallest
    return np.where((m == 0) & (g == 0) & (error == 0), 0, found)


DIALECTS = (
    Dialect(
        "published",
        "Chen et al. 2023, Algorithm 2; google/automl lion/lion_pytorch.py; optax lion",
        {},
    ),
    Dialect(
        "L2",
        "kozistr pytorch_optimizer, lion.py, weight_decouple=False",
        {"weight decay": "in the gradient"},
    ),
    Dialect(
        "cautious",
        "Liang et al. 2024; timm, optim/lion.py, caution=True",
        {"mask": "cautious"},
        scope=False,
    ),
    Dialect("Signum", "Bernstein et al. 2018", {"sign of": "new momentum"}, scope=False),
)

# --- what is asked --------------------------------------------------------------------------------

SETTINGS: tuple[Settings, ...] = (
    {"betas": (0.9, 0.99), "weight_decay": 0.0},
    {"betas": (0.9, 0.99), "weight_decay": 0.1},
    {"betas": (0.5, 0.875), "weight_decay": 0.1},
)


def edges(f: Format, draw: Drawer) -> Iterator[Draft]:
    """Betas at their ends, a momentum against the gradient, and zeros in one of them."""
    w, g = draw("w", 2, 3), draw("g", 2, 3)
    for betas in ((0.0, 0.0), (0.0, 0.99), (0.9, 0.0), (0.9, 0.9999999)):
        draft = Draft(f"betas {betas}", ("BETA",), w, g, settings={"betas": betas})
        yield draft
        yield replace(draft, state=start(draw, 9, 0.3), comment=f"{draft.comment}, from a state")
    zero, state = np.zeros((2, 3)), start(draw, 9, 0.3)
    yield Draft("gradient zero, from a state", ("ZERO_GRADIENT",), w, zero, state=state)
    against = {"exp_avg": f.round(-0.5 * g), "step": 9}
    yield Draft("momentum against the gradient", ("ORDINARY",), w, g, state=against)
    state = start(draw, 3, 0.3)
    state["exp_avg"][0, 0] = np.nan
    yield Draft("NaN in a state", ("NAN",), w, g, state=state, result="acceptable")


def start(draw: Drawer, step: int, size: float) -> Slots:
    """The momentum after `step` updates."""
    return {"exp_avg": draw("m", 2, 3, size=size), "step": step}


RULE = Rule(
    name="lion",
    added=4,
    page=page,
    clauses=CLAUSES,
    step=step,
    dialects=DIALECTS,
    ulps=8.0,
    slots=("exp_avg",),
    remembers=lambda settings: "a momentum",
    scales_by_operands=tuple(FORMATS),
    asked=SETTINGS,
    start=start,
    edges=edges,
    generated=(Generated(SETTINGS[1]), Generated(SETTINGS[0], plainer=True)),
    optimizers=(
        LibraryOptimizer(
            "optax.lion", ("betas", "weight_decay"), arguments=two_betas,
            slots={"exp_avg": "mu"}, mask="mask",
        ),
        LibraryOptimizer("keras.optimizers.Lion", slots={"exp_avg": "momentum"}),
        LibraryOptimizer("timm.optim.Lion"),
        LibraryOptimizer("pytorch_optimizer.Lion"),
    ),
)  # fmt: skip
