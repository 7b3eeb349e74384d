"""What the referee knows of SGD with momentum: PyTorch's form, and the other forms in use."""

from __future__ import annotations

from typing import Any

import numpy as np

from npdrt.conform.case import Slots
from npdrt.conform.page import ROUND, Norms, Numbers, minus, mixed, plus, with_decay
from npdrt.conform.rules.evaluate import Arithmetic, largest
from npdrt.conform.rules.rule import (
    COMMON,
    MAXIMIZED,
    STATE,
    Dialect,
    Generated,
    LibraryOptimizer,
    Rule,
    Settings,
    given_velocity,
    keeps_velocity,
)

# --- the section "sgd" of docs/updates.md ---------------------------------------------------------


def page(
    w: Numbers, g: Numbers, state: dict[str, Any], lr: float, dtype: str, norms: Norms = None, *,
    momentum: float = 0.0, dampening: float = 0.0, nesterov: bool = False,
    weight_decay: float = 0.0,
) -> Numbers:  # fmt: skip
    """The sequence."""
    fl = ROUND[dtype]
    d = with_decay(w, g, weight_decay, fl)
    if momentum == 0:
        return minus(w, lr, d, fl)
    k = 1.0 if state["step"] == 0 else 1.0 - dampening
    v = mixed(momentum, state.get("momentum", [0.0] * len(w)), k, d, fl)
    state["momentum"] = v
    return minus(w, lr, plus(d, momentum, v, fl) if nesterov else v, fl)


# --- how implementations differ -------------------------------------------------------------------

CLAUSES: dict[str, dict[str, str]] = {
    "learning rate": {
        "outside the velocity": "v = m v + d; w - lr v",
        "inside the velocity": "v = m v + lr d; w - v",
        "inside, negative": "v = m v - lr d; w + v",
    },
    "first step": {
        "undampened": "v = d",
        "dampened": "v = (1 - dampening) d, as at every step",
    },
    "dampening": {
        "1 - dampening": "of the new gradient",
        "ignored": "none",
        "1 - momentum": "an average: v = m v + (1 - m) d",
        "1 + dampening": "of the other sign: v = m v + (1 + dampening) d",
    },
    "nesterov": {
        "d + m v": "with the new velocity",
        "ignored": "v",
    },
    "weight decay": {
        "in the gradient": "d = g + wd w",
        "decoupled": "w (1 - lr wd) before the step; or wd w added to the step",
        "after the step": "(1 - lr wd) times the new parameter",
        "subtracted": "d = g - wd w",
        "without lr": "w (1 - wd) before the step",
        "ignored": "none",
    },
    **COMMON,
    **MAXIMIZED,
    **STATE,
}


def step(
    c: dict[str, str], w: Any, g: Any, slots: Slots, h: dict[str, Any], a: Arithmetic
) -> tuple[Any, Slots, Any]:
    """v <- m v + (1 - dampening) d;  w <- w - lr v, or d + m v (Nesterov)."""
    lr, wd, m = h["lr"], h.get("weight_decay", 0), h.get("momentum", 0)
    kind = c["weight decay"]
    coupled = {"in the gradient": 1, "subtracted": -1}.get(kind, 0)
    d = a.note("d", g + coupled * wd * w)
    size = np.abs(g) + np.abs(wd * w)
    shrunk = {"decoupled": 1 - lr * wd, "without lr": 1 - wd}.get(kind, 1)
    u, v, slots = d, None, dict(slots)
    rate = lr
    if m:
        u, v, size, rate = velocity(c, d, slots, h, a, size)
        slots["momentum"] = a.note("v", v)
    change = h["sign"] * rate * u
    new = a.note("w", shrunk * w - change)
    a.change = np.abs(rate * size)
    scale = largest(w, a.change)
    if kind == "after the step":
        new = (1 - lr * wd) * new
    return new, slots, scale


def velocity(
    c: dict[str, str], d: Any, slots: Slots, h: dict[str, Any], a: Arithmetic, size: Any
) -> tuple[Any, Any, Any, Any]:
    """The step before the learning rate, the new velocity, the size of both and the rate."""
    lr, m, old = h["lr"], h["momentum"], slots.get("momentum", d * 0)
    inside = {"inside the velocity": 1, "inside, negative": -1}.get(c["learning rate"], 0)
    gain = inside * lr if inside else 1
    keep = kept(c, slots, h)
    v = m * old + gain * keep * d
    size = np.abs(m * old) + np.abs(gain * keep) * size
    u = v
    if h.get("nesterov") and c["nesterov"] != "ignored":
        u, size = gain * d + m * v, np.abs(gain * d) + size
    return u, v, size, (inside if inside else lr)


def kept(c: dict[str, str], slots: Slots, h: dict[str, Any]) -> Any:
    """The share of the new gradient in the velocity."""
    if c["dampening"] == "1 - momentum":
        return 1 - h["momentum"]
    if c["dampening"] == "ignored":
        return 1
    first = slots["step"] == 0 and c["first step"] == "undampened"
    sign = -1 if c["dampening"] == "1 + dampening" else 1
    return 1 if first else 1 - sign * h.get("dampening", 0)


DIALECTS = (
    Dialect(
        "published",
        "Sutskever et al. 2013 with PyTorch's placement of lr and dampening "
        "(torch/optim/sgd.py); optax sgd",
        {},
    ),
    Dialect(
        "tensorflow",
        "Keras SGD (keras/src/optimizers/sgd.py): m v - lr g",
        {"learning rate": "inside, negative"},
    ),
    Dialect(
        "caffe",
        "Caffe SGDSolver; Sutskever et al. 2013 with the sign turned: m v + lr g",
        {"learning rate": "inside the velocity"},
    ),
    Dialect(
        "decoupled", "SGDW, Loshchilov and Hutter 2019, Algorithm 1", {"weight decay": "decoupled"}
    ),
)

# --- what is asked --------------------------------------------------------------------------------

SETTINGS: tuple[Settings, ...] = (
    {"momentum": 0.0, "dampening": 0.0, "nesterov": False, "weight_decay": 0.0},
    {"momentum": 0.9, "dampening": 0.0, "nesterov": True, "weight_decay": 0.1},
    {"momentum": 0.9, "dampening": 0.0, "nesterov": False, "weight_decay": 0.0},
    {"momentum": 0.9, "dampening": 0.3, "nesterov": False, "weight_decay": 0.0},
    {"momentum": 0.9, "dampening": 0.3, "nesterov": False, "weight_decay": 0.1},
    {"momentum": 0.9, "dampening": 0.0, "nesterov": True, "weight_decay": 0.0},
    {"momentum": 0.0, "dampening": 0.0, "nesterov": False, "weight_decay": 0.1},
    {"momentum": 0.9, "dampening": 0.0, "nesterov": False, "weight_decay": 0.1},
)


def without_zero(settings: Settings) -> Settings:
    """The arguments of optax, which keeps no velocity if momentum is None."""
    return {**settings, "momentum": settings["momentum"] or None}


RULE = Rule(
    name="sgd",
    added=0,
    page=page,
    clauses=CLAUSES,
    step=step,
    dialects=DIALECTS,
    ulps=8.0,
    slots=("momentum",),
    remembers=keeps_velocity,
    asked=SETTINGS,
    apart=("dampening",),
    start=given_velocity,
    generated=(
        Generated(SETTINGS[1]),
        *(Generated(SETTINGS[k], plainer=True) for k in (7, 2, 0)),
        Generated(SETTINGS[4], steps=330, added=1),
    ),
    optimizers=(
        LibraryOptimizer(
            "torch.optim.SGD",
            ("momentum", "dampening", "nesterov", "weight_decay"),
            slots={"momentum": "momentum_buffer"},
        ),
        LibraryOptimizer(
            "optax.sgd", ("momentum", "nesterov"), arguments=without_zero,
            slots={"momentum": "trace"},
        ),
        LibraryOptimizer("keras.optimizers.SGD", slots={"momentum": "momentum"}),
        LibraryOptimizer("timm.optim.SGDW"),
        LibraryOptimizer("pytorch_optimizer.SGDW"),
        LibraryOptimizer("torch_optimizer.SGDW"),
    ),
)  # fmt: skip
