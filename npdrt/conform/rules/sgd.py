"""SGD with momentum, as PyTorch writes it, and the other forms in use."""

from __future__ import annotations

from typing import Any

import numpy as np

from npdrt.conform.case import Slots
from npdrt.conform.rules.rule import COMMON, STATE, Arithmetic, Dialect, Rule, largest

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
    return 1 if first else 1 - h.get("dampening", 0)


SGD = Rule(
    "sgd",
    CLAUSES,
    step,
    (
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
            "decoupled",
            "SGDW, Loshchilov and Hutter 2019, Algorithm 1",
            {"weight decay": "decoupled"},
        ),
    ),
)
