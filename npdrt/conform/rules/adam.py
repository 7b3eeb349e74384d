"""What the referee knows of Adam and its relatives."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from npdrt.conform.case import Slots
from npdrt.conform.cases import Draft, Drawer
from npdrt.conform.formats import Format
from npdrt.conform.page import ROUND, Norms, Numbers, divide, scaled, with_decay
from npdrt.conform.rules.evaluate import Arithmetic, largest
from npdrt.conform.rules.moments import (
    ADABELIEF,
    MEANS,
    OPTAX,
    TORCH,
    amplification,
    direction,
    moments,
    page_moments,
    powers,
    start,
    two_betas,
)
from npdrt.conform.rules.rule import (
    COMMON,
    COUNTING,
    MAXIMIZED,
    Dialect,
    Generated,
    LibraryOptimizer,
    Rule,
    Settings,
)

# --- the section "adam" of docs/updates.md --------------------------------------------------------


def page(
    w: Numbers, g: Numbers, state: dict[str, Any], lr: float, dtype: str, norms: Norms = None, *,
    betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.0,
    decoupled: bool = False,
) -> Numbers:  # fmt: skip
    """The sequence."""
    fl = ROUND[dtype]
    if decoupled and weight_decay != 0:
        w = scaled(w, 1.0 - lr * weight_decay, fl)
    else:
        g = with_decay(w, g, weight_decay, fl)
    mh, below = page_moments(g, state, betas, eps, fl)
    rate = fl(lr)
    return [fl(a - fl(divide(fl(rate * x), y))) for a, x, y in zip(w, mh, below, strict=True)]


# --- how implementations differ -------------------------------------------------------------------

CLAUSES: dict[str, dict[str, str]] = {
    **MEANS,
    "weight decay": {
        "as set": "g + wd w, or w (1 - lr wd) where decoupled",
        "always in the gradient": "g + wd w",
        "always decoupled": "w (1 - lr wd)",
        "decoupled, after the step": "(1 - lr wd) times the new parameter",
        "decoupled, without lr": "w (1 - wd)",
        "opposite sign in the gradient": "g - wd w",
        "opposite sign, decoupled": "w (1 + lr wd)",
        "after the moments": "m / c1 + wd w over the root",
        "ignored": "none",
    },
    **COMMON,
    **MAXIMIZED,
    **COUNTING,
}


def step(
    c: dict[str, str], w: Any, g: Any, slots: Slots, h: dict[str, Any], a: Arithmetic
) -> tuple[Any, Slots, Any]:
    """Algorithm 1 of Kingma and Ba under the choices c."""
    lr = h["lr"]
    start, shrunk, used_g, after = decayed(c, w, g, h)
    gross, slots = np.abs(g) + np.abs(used_g - g), dict(slots)
    extra = after * w if after else used_g * 0  # w may be infinite
    d, size, doubt = direction(c, used_g, gross, extra, slots, h, a)
    new = start * shrunk - h["sign"] * lr * d
    if c["weight decay"] == "decoupled, after the step":
        new = new * (1 - lr * h.get("weight_decay", 0) * bool(h.get("decoupled")))
    change = largest(lr * size, lr * d)
    a.change, a.slack = amplification(slots, a) * change, doubt * change
    return a.note("w", new), slots, largest(w, a.change)


def decayed(c: dict[str, str], w: Any, g: Any, h: dict[str, Any]) -> tuple[Any, Any, Any, Any]:
    """(parameter, its factor, gradient, share of w in the step) by the clause "weight decay"."""
    wd, lr = h.get("weight_decay", 0), h["lr"]
    decoupled = bool(h.get("decoupled"))
    match c["weight decay"]:
        case "always in the gradient":
            decoupled = False
        case "always decoupled":
            decoupled = True
        case "ignored":
            return w, 1, g, 0
        case "after the moments":
            return w, 1, g, wd
        case "opposite sign in the gradient":
            wd = wd if decoupled else -wd
        case "opposite sign, decoupled":
            wd = -wd if decoupled else wd
        case "decoupled, without lr" if decoupled:
            return w, 1 - wd, g, 0
        case "decoupled, after the step" if decoupled:
            return w, 1, g, 0
    return (w, 1 - lr * wd, g, 0) if decoupled else (w, 1, g + wd * w, 0)


DIALECTS = (
    Dialect(
        "published",
        "Kingma and Ba 2015, Algorithm 1; torch/optim/adam.py, adamw.py; optax adam, adamw",
        {},
    ),
    Dialect(
        "AdamW",
        "Loshchilov and Hutter 2019, Algorithm 2; torch/optim/adamw.py",
        {"weight decay": "always decoupled"},
    ),
    Dialect(
        "epsilon-hat",
        "Kingma and Ba 2015, end of section 2; TensorFlow and Keras Adam; ONNX "
        "ai.onnx.preview.training Adam",
        {"epsilon": "epsilon-hat"},
    ),
    Dialect(
        "AMSGrad",
        "Reddi et al. 2018; torch/optim/adam.py amsgrad=True",
        {"second moment": "largest mean of squares"},
        scope=False,
    ),
    Dialect(
        "AMSGrad, corrected", "optax amsgrad", {"second moment": "largest corrected"}, scope=False
    ),
    Dialect(
        "Adamax",
        "Kingma and Ba 2015, Algorithm 2, with epsilon as in Keras Adamax",
        {"second moment": "largest absolute value", "bias correction": "first moment only"},
        scope=False,
    ),
    Dialect(
        "Adamax, eps inside",
        "torch/optim/adamax.py; optax adamax",
        {
            "second moment": "largest absolute value, eps inside",
            "bias correction": "first moment only",
        },
        scope=False,
    ),
    Dialect("AdaBelief", "Zhuang et al. 2020", {"second moment": "centred"}, scope=False),
    Dialect(
        "AdaBelief, eps in the variance",
        "Zhuang et al. 2020, Algorithm 2; kozistr pytorch_optimizer, adabelief.py",
        {"second moment": "centred, plus eps"},
        scope=False,
    ),
)

# --- what is asked --------------------------------------------------------------------------------

SETTINGS: tuple[Settings, ...] = (
    {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "decoupled": False},
    {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1, "decoupled": True},
    {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1, "decoupled": False},
    {"betas": (0.5, 0.9), "eps": 1e-3, "weight_decay": 0.0, "decoupled": False},
)


def edges(f: Format, draw: Drawer) -> Iterator[Draft]:
    """Counters, betas and epsilons."""
    w, g = draw("w", 2, 3), draw("g", 2, 3)
    tiny = draw("tiny g", 2, 3, size=2.0**-24 if f.name == "float16" else 1e-6)
    for t, flag in ((1, "FIRST_STEP"), (2, "SECOND_STEP"), (1000, "LATE_STEP")):
        for size, gradient in (("", g), (" with a tiny gradient", tiny)):
            state = moments(draw, t - 1, 1.0 if gradient is g else 1e-6)
            flags = (flag, "TINY_GRADIENT") if size else (flag,)
            yield Draft(f"t = {t}{size}", flags, w, gradient, state=state)
    for t in (2**24, 2**24 + 1, 2**53):
        state = moments(draw, t - 1)
        gate = "valid" if t < 2**31 else "acceptable"
        yield Draft(f"t = {t}", ("COUNTER",), w, g, state=state, result=gate)
    for betas in ((0.0, 0.0), (0.0, 0.99), (0.9, 0.9999999), (0.9999999, 0.999)):
        draft = Draft(f"betas {betas}", ("BETA",), w, g, settings={"betas": betas})
        yield draft
        yield replace(draft, state=moments(draw, 999), comment=draft.comment + ", t = 1000")
    for eps in (0.0, 1e-3):
        about = ("EPSILON_ZERO",) if eps == 0 else ("TINY_GRADIENT",)
        yield Draft(f"eps {eps}", about, w, g, settings={"eps": eps})
        lost = eps == 0 and f.name == "float16"  # the squares are 0, and so is every divisor
        yield Draft(
            f"eps {eps}, small g", about, w, tiny, settings={"eps": eps},
            result="acceptable" if lost else "valid",
        )  # fmt: skip
    yield Draft(
        "0 / 0", ("EPSILON_ZERO", "ZERO_GRADIENT"), w, np.zeros((2, 3)),
        settings={"eps": 0.0}, result="acceptable", plain=True,
    )  # fmt: skip
    state = moments(draw, 3)
    state["exp_avg_sq"][0, 0] = np.nan
    yield Draft("NaN in a state", ("NAN",), w, g, state=state, result="acceptable")


def later(draw: Drawer) -> Iterator[Draft]:
    """The steps at which a counter in bfloat16 or float16 stops counting."""
    for t in (258, 2050):
        yield Draft(
            f"t = {t}", ("COUNTER",), draw("w", 2, 3), draw("g", 2, 3),
            state=moments(draw, t - 1), plain=True,
        )  # fmt: skip


# --- in libraries ---------------------------------------------------------------------------------


MOMENTS = ("betas", "eps")

RULE = Rule(
    name="adam",
    added=0,
    page=page,
    clauses=CLAUSES,
    step=step,
    dialects=DIALECTS,
    ulps=16.0,
    slots=("exp_avg", "exp_avg_sq"),
    remembers=lambda settings: "moments",
    scales_by_operands=("float64",),  # where the rounding of 1 - beta^t counts
    asked=SETTINGS,
    start=start,
    scalars=powers,
    edges=edges,
    later=later,
    generated=(
        Generated(SETTINGS[1]),
        *(Generated(SETTINGS[k], plainer=True) for k in (2, 0)),
    ),
    optimizers=(
        LibraryOptimizer("torch.optim.Adam", (*MOMENTS, "weight_decay"), slots=TORCH),
        LibraryOptimizer("optax.adam", MOMENTS, arguments=two_betas, slots=OPTAX),
        LibraryOptimizer("optax.amsgrad", MOMENTS, arguments=two_betas, slots=OPTAX),
        LibraryOptimizer("torch.optim.Adamax", slots={"exp_avg_sq": "exp_inf"}),
        LibraryOptimizer("optax.adamax", slots=OPTAX),
        LibraryOptimizer("optax.adabelief", slots=OPTAX),
        LibraryOptimizer(
            "keras.optimizers.Adamax", slots={"exp_avg": "momentum", "exp_avg_sq": "norm"}
        ),
        LibraryOptimizer("timm.optim.AdaBelief", slots=ADABELIEF),
        LibraryOptimizer("pytorch_optimizer.AdaBelief", slots=ADABELIEF),
        LibraryOptimizer("torch_optimizer.AdaBelief", slots=ADABELIEF),
    ),
)
