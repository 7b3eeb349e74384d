"""What the referee knows of LARS: as published, and as written elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from npdrt.conform.case import Slots
from npdrt.conform.cases import Draft, Drawer
from npdrt.conform.formats import Format
from npdrt.conform.page import (
    ROUND,
    Norms,
    Numbers,
    divide,
    mixed,
    representable,
    sizes,
    with_decay,
)
from npdrt.conform.rules.evaluate import Arithmetic, largest, skips
from npdrt.conform.rules.fromage import opposed
from npdrt.conform.rules.rule import (
    ADAPTS,
    COMMON,
    MAXIMIZED,
    NORMS,
    STATE,
    Dialect,
    Generated,
    LibraryOptimizer,
    Rule,
    Settings,
    given_velocity,
    keeps_velocity,
)

# --- the section "lars" of docs/updates.md --------------------------------------------------------


def page(
    w: Numbers, g: Numbers, state: dict[str, Any], lr: float, dtype: str, norms: Norms = None, *,
    momentum: float = 0.9, weight_decay: float = 0.0, trust_coefficient: float = 1e-3,
    eps: float = 0.0,
) -> Numbers:  # fmt: skip
    """The sequence."""
    fl, (nw, ng), r = ROUND[dtype], sizes(w, g, norms), 1.0
    if nw > 0 and ng > 0:
        r = divide(trust_coefficient * nw, (ng + weight_decay * nw) + eps)
    d, k = with_decay(w, g, weight_decay, fl), representable(lr * r, lr, dtype)
    v = mixed(momentum, state.get("momentum", [0.0] * len(w)), k, d, fl)
    state["momentum"] = v
    return [fl(a - b) for a, b in zip(w, v, strict=True)]


# --- how implementations differ -------------------------------------------------------------------

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
    "adapts": ADAPTS,
    **COMMON,
    **MAXIMIZED,
    **NORMS,
    **STATE,
}


def step(
    c: dict[str, str], w: Any, g: Any, slots: Slots, h: dict[str, Any], a: Arithmetic
) -> tuple[Any, Slots, Any]:
    """r = tc |w| / (|g| + wd |w| + eps);  v <- m v + lr r (g + wd w);  w <- w - v."""
    lr, m, wd = h["lr"], h.get("momentum", 0), h.get("weight_decay", 0)
    adapts = not skips(c, w, h)
    wd = wd if adapts else wd * 0
    old, d = start(c, slots, g), g + wd * w
    nw, size, usable = measured(c, w, g, d, m * old + d, wd, h, a)
    r = a.note("r", trust_ratio(c, nw, size, usable, h) if adapts else a.real(1.0))
    kept = np.where(usable, 1, 0) if c["zero norm"] == "ratio 1, no decay" else 1
    decay = kept * wd * w
    k, gain, rate = placed(c, r, lr, a)
    v = a.note("v", m * old + gain * a.note("d", scaled(c, g, decay, k)))
    shrunk = 1 - lr * wd if c["weight decay"] == "decoupled" else 1
    new = a.note("w", shrunk * w - h["sign"] * rate * v)
    moved = np.abs(gain) * (np.abs(k * g) + np.abs(k * decay))
    a.change = np.abs(rate * (np.abs(m * old) + moved))
    error = m * slots.get("v error", moved * 0) + a.of_norms * moved
    a.slack = np.abs(rate) * (error + a.of_norms * np.abs(m * old))
    return new, {**slots, "momentum": v, "v error": error}, largest(w, a.change)


def start(c: dict[str, str], slots: Slots, g: Any) -> Any:
    """The velocity before the step."""
    if "momentum" in slots:
        return slots["momentum"]
    return g if c["velocity starts"] == "at the gradient" else g * 0


def measured(
    c: dict[str, str], w: Any, g: Any, d: Any, v: Any, wd: Any, h: dict[str, Any], a: Arithmetic
) -> tuple[Any, Any, Any]:
    """|w|, what divides it by the clauses "denominator" and "epsilon", and whether both norms are
    above 0. d: g + wd w; v: m v + d."""
    of_velocity = c["denominator"] == "velocity"
    nw, ng = a.note("|w|", a.norm(w)), a.note("|g|", a.norm(v if of_velocity else g))
    eps = h.get("eps", 0)
    match c["epsilon"]:
        case "ignored":
            eps = eps * 0
        case "1e-7 for 0":
            eps = eps if eps else 1e-7
    match c["denominator"]:
        case "norm of the sum":
            ng = a.norm(d)
            size = ng + eps
        case "gradient":
            size = ng
        case "gradient and epsilon" | "velocity":
            size = ng + eps
        case _:
            size = ng + wd * nw + eps
    return nw, size, (nw > 0) & (ng > 0)


def trust_ratio(c: dict[str, str], nw: Any, size: Any, usable: Any, h: dict[str, Any]) -> Any:
    """The trust ratio by the clauses "trust ratio" and "zero norm"."""
    guarded = not c["zero norm"].startswith("unguarded")
    tc = 1 if c["trust ratio"] == "without trust coefficient" else h["trust_coefficient"]
    r = tc * nw / (np.where(usable, size, size * 0 + 1) if guarded else size)
    match c["trust ratio"]:
        case "squared":
            r = r * r
        case "clipped":
            r = np.minimum(r / h["lr"], 1)
    if guarded:
        at_zero = {"trust coefficient": tc, "no step": 0}.get(c["zero norm"], 1)
        r = np.where(usable, r, at_zero)
    return np.minimum(r / h["lr"], 1) if c["trust ratio"] == "clipped at zero norm too" else r


def placed(c: dict[str, str], r: Any, lr: Any, a: Arithmetic) -> tuple[Any, Any, Any]:
    """(k, gain, rate) by the clauses "ratio scales" and "learning rate", for

    v <- m v + gain k (g + wd w);  w <- w - rate v.
    """
    if c["ratio scales"] == "velocity" or c["denominator"] == "velocity":
        return 1, 1, lr * r
    k = r if c["zero norm"] == "unguarded" else a.representable(lr * r, r, 1)
    match c["learning rate"]:
        case "outside the velocity":
            return k, 1, lr
        case "inside, negative":
            return k, -lr, -1
    return k, lr, 1


def scaled(c: dict[str, str], g: Any, decay: Any, k: Any) -> Any:
    """k (g + wd w) by the clause "weight decay"."""
    match c["weight decay"]:
        case "unscaled":
            return k * g + decay
        case "only in the ratio" | "decoupled":
            return k * g
        case "subtracted":
            return k * (g - decay)
    return k * (g + decay)


LARC = {"learning rate": "outside the velocity", "zero norm": "ratio 1, no decay"}
DIALECTS = (
    Dialect("published", "You, Gitman and Ginsburg 2017, Algorithm 1", {}),
    Dialect("optax", "optax/_src/alias.py lars", {"denominator": "norm of the sum"}),
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
        {"learning rate": "outside the velocity", "adapts": "only with weight decay"},
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
        {"denominator": "velocity", "epsilon": "ignored", "learning rate": "outside the velocity"},
    ),
    Dialect(
        "MLPerf TF1", "MLPerf TensorFlow 1 LARSOptimizer, tf.contrib.opt", {"adapts": "no biases"}
    ),
    Dialect(
        "MLPerf TF2",
        "MLPerf TensorFlow 2 LARSOptimizer",
        {"adapts": "no biases", "epsilon": "1e-7 for 0", "learning rate": "inside, negative"},
    ),
)

# --- what is asked --------------------------------------------------------------------------------

SETTINGS: tuple[Settings, ...] = (
    {"momentum": 0.9, "weight_decay": 0.0, "trust_coefficient": 1e-3, "eps": 0.0},
    {"momentum": 0.9, "weight_decay": 0.1, "trust_coefficient": 1e-3, "eps": 1e-8},
    {"momentum": 0.0, "weight_decay": 0.0, "trust_coefficient": 1.0, "eps": 0.0},
    {"momentum": 0.0, "weight_decay": 0.1, "trust_coefficient": 0.02, "eps": 0.0},
    {"momentum": 0.9, "weight_decay": 0.0, "trust_coefficient": 0.02, "eps": 0.125},
)
# large enough for a step to show in float32
LARGER: list[Settings] = [{**settings, "trust_coefficient": 0.1} for settings in SETTINGS]


def edges(f: Format, draw: Drawer) -> Iterator[Draft]:
    """Decay and epsilon, without momentum for implementations that have none."""
    w, g, zero = draw("w", 2, 3), draw("g", 2, 3), np.zeros((2, 3))
    tiny = draw("tiny", 2, 3, size=2.0**-20)
    yield from opposed(f, draw)
    decay = {"momentum": 0.0, "weight_decay": 0.1}
    yield Draft("gradient zero, decay", ("ZERO_GRADIENT",), w, zero, settings=decay)
    yield Draft("parameter zero, decay", ("ZERO_PARAMETER",), zero, g, settings=decay)
    yield Draft("tiny gradient", ("TINY_GRADIENT",), w, tiny, settings={"momentum": 0.0})
    epsilon = {"momentum": 0.0, "eps": 0.125}
    yield Draft("large epsilon", ("ORDINARY",), w, g, settings=epsilon)


RULE = Rule(
    name="lars",
    added=0,
    page=page,
    clauses=CLAUSES,
    step=step,
    dialects=DIALECTS,
    ulps=12.0,
    slots=("momentum",),
    remembers=keeps_velocity,
    asked=SETTINGS,
    start=given_velocity,
    edges=edges,
    generated=(
        Generated(LARGER[1]),
        *(Generated(LARGER[k], plainer=True) for k in (0, 2)),
        Generated(SETTINGS[0], plainer=True, added=1),  # for those who have the defaults built in
    ),
    optimizers=(
        LibraryOptimizer(
            "optax.lars",
            ("momentum", "weight_decay", "trust_coefficient", "eps"),
            slots={"momentum": "trace"},
            mask="weight_decay_mask",
            velocity=-1.0,  # it points to the new parameter
        ),
        LibraryOptimizer("timm.optim.Lars"),
        LibraryOptimizer("pytorch_optimizer.LARS"),
        LibraryOptimizer("torch_optimizer.LARS"),
    ),
)
