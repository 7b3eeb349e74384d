"""LARS, as published and as written elsewhere."""

from __future__ import annotations

from typing import Any

import numpy as np

from npdrt.conform.case import Slots
from npdrt.conform.rules.rule import COMMON, NORMS, STATE, Arithmetic, Dialect, Rule, largest

CLAUSES: dict[str, dict[str, str]] = {
    "denominator": {
        "sum of norms": "|g| + wd |w| + eps",
        "norm of the sum": "|g + wd w| + eps",
        "gradient": "|g|, neither decay nor eps",
        "gradient and epsilon": "|g| + eps",
        "velocity": "|m v + g + wd w|",
    },
    "epsilon": {
        "as set": "eps",
        "ignored": "none",
        "1e-7 for 0": "1e-7 where eps is 0",
    },
    "zero norm": {
        "ratio 1": "r = 1, decay kept",
        "ratio 1, no decay": "r = 1, and g without decay",
        "trust coefficient": "r = tc",
        "unguarded": "0/0, or a zero parameter that never moves",
        "unguarded but for overflow": "r = 1 where lr r is not finite",
        "no step": "r = 0",
    },
    "trust ratio": {
        "scaled": "tc |w| / denominator",
        "without trust coefficient": "|w| / denominator",
        "clipped": "min(r / lr, 1) (LARC)",
        "clipped at zero norm too": "the same, with r = 1 at a zero norm clipped as well",
        "squared": "r^2",
    },
    "weight decay": {
        "in the gradient, scaled": "r (g + wd w)",
        "unscaled": "r g + wd w",
        "only in the ratio": "r g",
        "decoupled": "w (1 - lr wd) before the step",
        "subtracted": "r (g - wd w)",
    },
    "learning rate": {
        "inside the velocity": "v = m v + lr r d; w - v",
        "outside the velocity": "v = m v + r d; w - lr v",
        "inside, negative": "v = m v - lr r d; w + v",
    },
    "ratio scales": {
        "gradient": "v = m v + lr r d",
        "velocity": "v = m v + d; w - lr r v",
    },
    "velocity starts": {
        "at zero": "the first velocity is lr r d",
        "at the gradient": "m g + r d, from a copy of the unscaled gradient",
    },
    "adapts": {
        "always": "every array is a layer",
        "only with weight decay": "r = 1 where wd is 0",
        "matrices only": "1-d arrays take r = 1 and no decay",
        "no biases": "arrays named bias take r = 1 and no decay",
    },
    **COMMON,
    **NORMS,
    **STATE,
}


def step(
    c: dict[str, str], w: Any, g: Any, slots: Slots, h: dict[str, Any], a: Arithmetic
) -> tuple[Any, Slots, Any]:
    """r = tc |w| / (|g| + wd |w| + eps);  v <- m v + lr r (g + wd w);  w <- w - v."""
    lr, m, wd = h["lr"], h.get("momentum", 0), h.get("weight_decay", 0)
    skipped = skips(c, w, h)
    wd = wd * 0 if skipped else wd
    old = start(c, slots, g)
    d = g + wd * w
    velocity_scaled = c["ratio scales"] == "velocity" or c["denominator"] == "velocity"
    measured = m * old + d if c["denominator"] == "velocity" else g
    nw, ng, nd = a.note("|w|", a.norm(w)), a.note("|g|", a.norm(measured)), a.norm(d)
    usable = (nw > 0) & ((nd if c["denominator"] == "norm of the sum" else ng) > 0)
    adapts = not skipped and (c["adapts"] != "only with weight decay" or bool(wd))
    r = a.note("r", trust_ratio(c, nw, ng, nd, usable, h) if adapts else a.real(1.0))
    kept = np.where(usable, 1, 0) if c["zero norm"] == "ratio 1, no decay" else 1
    decay = kept * wd * w
    k = 1 if velocity_scaled else r
    if not velocity_scaled and c["zero norm"] != "unguarded":
        k = a.representable(lr * r, r, 1)
    change = a.note("d", scaled(c, g, decay, k))
    shrunk = 1 - lr * wd if c["weight decay"] == "decoupled" else 1
    inside = {"inside the velocity": 1, "inside, negative": -1}.get(c["learning rate"], 0)
    if velocity_scaled:
        inside = 0
    v = a.note("v", m * old + (inside * lr * change if inside else change))
    rate = inside if inside else lr * (r if velocity_scaled else 1)
    size = np.abs(m * old) + (lr if inside else 1) * (np.abs(k * g) + np.abs(k * decay))
    new = a.note("w", shrunk * w - h["sign"] * rate * v)
    a.change = np.abs(rate * size)
    return new, {**slots, "momentum": v}, largest(w, a.change)


def skips(c: dict[str, str], w: Any, h: dict[str, Any]) -> bool:
    """Whether the array is left to plain SGD."""
    match c["adapts"]:
        case "matrices only":
            return bool(np.ndim(w) <= 1)
        case "no biases":
            return bool(h["kind"] == "bias")
    return False


def start(c: dict[str, str], slots: Slots, g: Any) -> Any:
    """The velocity before the step."""
    if "momentum" in slots:
        return slots["momentum"]
    return g if c["velocity starts"] == "at the gradient" else g * 0


def trust_ratio(
    c: dict[str, str], nw: Any, ng: Any, nd: Any, usable: Any, h: dict[str, Any]
) -> Any:
    """The trust ratio with what the clauses say of zero norms."""
    guarded = not c["zero norm"].startswith("unguarded")
    size = denominator(c, nw, ng, nd, h)
    size = np.where(usable, size, size * 0 + 1) if guarded else size
    tc = 1 if c["trust ratio"] == "without trust coefficient" else h["trust_coefficient"]
    r = tc * nw / size
    if c["trust ratio"] == "squared":
        r = r * r
    if c["trust ratio"] == "clipped":
        r = np.minimum(r / h["lr"], 1)
    otherwise = {"trust coefficient": tc, "no step": 0}.get(c["zero norm"], 1)
    r = np.where(usable, r, otherwise) if guarded else r
    return np.minimum(r / h["lr"], 1) if c["trust ratio"] == "clipped at zero norm too" else r


def denominator(c: dict[str, str], nw: Any, ng: Any, nd: Any, h: dict[str, Any]) -> Any:
    """What the parameter's norm is divided by."""
    wd, eps = h.get("weight_decay", 0), h.get("eps", 0)
    if c["epsilon"] == "ignored":
        eps = eps * 0
    elif c["epsilon"] == "1e-7 for 0":
        eps = eps if eps else 1e-7
    match c["denominator"]:
        case "norm of the sum":
            return nd + eps
        case "gradient":
            return ng
        case "gradient and epsilon":
            return ng + eps
        case "velocity":
            return ng + eps
    return ng + wd * nw + eps


def scaled(c: dict[str, str], g: Any, decay: Any, k: Any) -> Any:
    """The gradient and its decay, scaled by k."""
    match c["weight decay"]:
        case "unscaled":
            return k * g + decay
        case "only in the ratio" | "decoupled":
            return k * g
        case "subtracted":
            return k * (g - decay)
    return k * (g + decay)


LARC = {"learning rate": "outside the velocity", "zero norm": "ratio 1, no decay"}

LARS = Rule(
    "lars",
    CLAUSES,
    step,
    (
        Dialect("published", "You, Gitman and Ginsburg 2017, Algorithm 1", {}),
        Dialect(
            "optax",
            "optax/_src/alias.py lars",
            {"denominator": "norm of the sum"},
        ),
        Dialect(
            "kozistr",
            "kozistr pytorch_optimizer, lars.py",
            {
                "denominator": "gradient",
                "learning rate": "outside the velocity",
                "velocity starts": "at the gradient",
                "adapts": "matrices only",
            },
            "its first velocity holds the unscaled gradient",
        ),
        Dialect(
            "apex LARC",
            "NVIDIA apex, parallel/LARC.py, clip=True",
            {**LARC, "trust ratio": "clipped"},
            "wraps SGD",
        ),
        Dialect("apex LARC, clip=False", "NVIDIA apex, parallel/LARC.py, clip=False", LARC),
        Dialect(
            "lightning-bolts",
            "lightning-bolts, optimizers/lars.py",
            {**LARC, "adapts": "only with weight decay"},
            "without weight decay it is SGD",
        ),
        Dialect(
            "timm",
            "timm, optim/lars.py",
            {
                "learning rate": "outside the velocity",
                "adapts": "only with weight decay",
            },
        ),
        Dialect(
            "timm, trust_clip",
            "timm, optim/lars.py, trust_clip=True",
            {
                "learning rate": "outside the velocity",
                "adapts": "only with weight decay",
                "trust ratio": "clipped at zero norm too",
            },
        ),
        Dialect(
            "torchlars",
            "kakaobrain torchlars; timm with always_adapt=True",
            {"learning rate": "outside the velocity"},
        ),
        Dialect(
            "TF model garden",
            "tensorflow/models official, lars_optimizer.py, classic momentum",
            {"denominator": "norm of the sum", "epsilon": "ignored"},
        ),
        Dialect(
            "TF model garden, classic_momentum=False",
            "tensorflow/models official, lars_optimizer.py",
            {
                "denominator": "velocity",
                "epsilon": "ignored",
                "learning rate": "outside the velocity",
            },
        ),
        Dialect(
            "MLPerf TF1",
            "MLPerf TensorFlow 1 LARSOptimizer, tf.contrib.opt",
            {"adapts": "no biases"},
        ),
        Dialect(
            "MLPerf TF2",
            "MLPerf TensorFlow 2 LARSOptimizer",
            {
                "adapts": "no biases",
                "epsilon": "1e-7 for 0",
                "learning rate": "inside, negative",
            },
        ),
    ),
)
