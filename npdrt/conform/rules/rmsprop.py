"""What the referee knows of RMSprop: PyTorch's form, and the other forms in use."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from npdrt.conform.case import Slots
from npdrt.conform.cases import Draft, Drawer
from npdrt.conform.formats import Format
from npdrt.conform.page import ROUND, Norms, Numbers, divide, minus, mixed, plus, root, with_decay
from npdrt.conform.rules import sgd
from npdrt.conform.rules.evaluate import Arithmetic, largest, limited
from npdrt.conform.rules.moments import drift
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

# --- the section "rmsprop" of docs/updates.md -----------------------------------------------------


def page(
    w: Numbers, g: Numbers, state: dict[str, Any], lr: float, dtype: str, norms: Norms = None, *,
    alpha: float = 0.99, eps: float = 1e-8, momentum: float = 0.0, centered: bool = False,
    weight_decay: float = 0.0,
) -> Numbers:  # fmt: skip
    """The sequence."""
    fl, zeros = ROUND[dtype], [0.0] * len(w)
    d = with_decay(w, g, weight_decay, fl)
    squares, e = [fl(x * x) for x in d], fl(eps)
    v = mixed(alpha, state.get("square_avg", zeros), 1.0 - alpha, squares, fl)
    state["square_avg"] = variance = v
    if centered:
        m = state["grad_avg"] = mixed(alpha, state.get("grad_avg", zeros), 1.0 - alpha, d, fl)
        variance = [fl(x - fl(y * y)) for x, y in zip(v, m, strict=True)]
    below = [fl(fl(root(x)) + e) for x in variance]
    u = [fl(divide(x, y)) for x, y in zip(d, below, strict=True)]
    if momentum > 0:
        u = state["momentum"] = plus(u, momentum, state.get("momentum", zeros), fl)
    return minus(w, lr, u, fl)


# --- how implementations differ -------------------------------------------------------------------

CLAUSES: dict[str, dict[str, str]] = {
    "epsilon": {
        "outside the root": "sqrt(v) + eps",
        "inside the root": "sqrt(v + eps)",
        "ignored": "sqrt(v)",
    },
    "first mean of squares": {
        "zero": "v = 0 before the first step",
        "one": "v = 1 before the first step",
    },
    "mean of squares": {
        "mean": "alpha v + (1 - alpha) d^2",
        "without d^2 weight": "alpha v + d^2",
        "sum": "v + d^2 (Adagrad)",
        "of before": "the step uses the v of before",
    },
    "centered": {
        "as set": "v - m^2 where centered",
        "never": "v",
        "always": "v - m^2",
    },
    "bias correction": {
        "none": "v and m as they are",
        # if centered, the variance of the first step is 0 but for rounding, so no dialect has it
        "corrected": "v / (1 - alpha^t), m / (1 - alpha^t)",
    },
    "learning rate": {
        "outside the velocity": "b = momentum b + u; w - lr b",
        "inside the velocity": "b = momentum b + lr u; w - b",
    },
    "velocity": {
        "sum": "b = momentum b + u",
        "average": "b = momentum b + (1 - momentum) u",
        "nesterov": "the step is u + momentum b, with the new velocity",
    },
    "weight decay": sgd.CLAUSES["weight decay"],
    **COMMON,
    **MAXIMIZED,
    **STATE,
}


def step(
    c: dict[str, str], w: Any, g: Any, slots: Slots, h: dict[str, Any], a: Arithmetic
) -> tuple[Any, Slots, Any]:
    """w <- w - lr b with b <- momentum b + d / (sqrt(v) + eps), under the choices c."""
    lr, wd, slots = h["lr"], h.get("weight_decay", 0), dict(slots)
    kind = c["weight decay"]
    coupled = {"in the gradient": 1, "subtracted": -1}.get(kind, 0)
    shrunk = {"decoupled": 1 - lr * wd, "without lr": 1 - wd}.get(kind, 1)
    d = a.note("d", g + coupled * wd * w)
    below, gain, unsure = denominator(c, d, slots, h, a)
    u = a.note("u", d / below)
    # a rounding error of d counts twice: in d, and in the mean of its squares
    size = gain * (2 * (np.abs(g) + np.abs(coupled * wd * w)) - np.abs(d)) / below
    error, rate = np.abs(u) * unsure, lr
    if h.get("momentum", 0):
        u, size, error, rate = velocity(c, u, size, error, slots, h)
    new = a.note("w", shrunk * w - h["sign"] * rate * u)
    a.change, a.slack = np.abs(rate * size), np.abs(rate) * error
    scale = largest(w, a.change)
    if kind == "after the step":
        new = (1 - lr * wd) * new
    return new, slots, scale


def denominator(
    c: dict[str, str], d: Any, slots: Slots, h: dict[str, Any], a: Arithmetic
) -> tuple[Any, Any, Any]:
    """The root with epsilon, the amplification of rounding errors by the subtraction under it, and
    the relative error that a rounding of alpha explains; moves the means in `slots` on."""
    alpha, eps = h["alpha"], h["eps"]
    start = 1 if c["first mean of squares"] == "one" else 0
    old_v, old_m = slots.get("square_avg", d * 0 + start), slots.get("grad_avg", d * 0)
    v, m = a.note("v", mean_of_squares(c, old_v, d, alpha)), alpha * old_m + (1 - alpha) * d
    slots["square_avg"], slots["grad_avg"] = v, m
    # the second term: products below the smallest normal number
    before = slots.get("v error", d * 0)
    slots["v error"] = drift(before, old_v, alpha, a) + a.format.smallest
    slots["m error"] = drift(slots.get("m error", d * 0), np.abs(old_m), alpha, a)
    v = old_v if c["mean of squares"] == "of before" else v
    error = slots["v error"] + 2 * np.abs(m) * slots["m error"]
    if c["bias correction"] == "corrected":
        correction = 1 - alpha ** (slots["step"] + 1)
        v, m, error = v / correction, m / correction, error / correction**2
    centered = {"never": False, "always": True}.get(c["centered"], bool(h.get("centered")))
    variance = a.note("variance", v - m * m if centered else v)
    under = variance + eps if c["epsilon"] == "inside the root" else variance
    positive = under > 0
    divisor = np.where(positive, under, 1)
    gain = np.where(positive, (v + m * m) / divisor, 1) if centered else 1
    return root_of(c, under, eps, a), gain, np.where(positive, error / (2 * divisor), 0)


def mean_of_squares(c: dict[str, str], v: Any, d: Any, alpha: Any) -> Any:
    """The running mean of the squares of the gradient."""
    match c["mean of squares"]:
        case "without d^2 weight":
            return alpha * v + d * d
        case "sum":
            return v + d * d
    return alpha * v + (1 - alpha) * d * d


def root_of(c: dict[str, str], under: Any, eps: Any, a: Arithmetic) -> Any:
    """What the gradient is divided by, by the clause "epsilon"."""
    if c["epsilon"] == "outside the root":
        return np.sqrt(under) + eps
    return np.sqrt(limited(under, a.format) if c["epsilon"] == "ignored" else under)


def velocity(
    c: dict[str, str], u: Any, size: Any, error: Any, slots: Slots, h: dict[str, Any]
) -> tuple[Any, Any, Any, Any]:
    """The step before the learning rate, the size of its operands, its error and the rate; moves
    the velocity in `slots` on."""
    lr, m = h["lr"], h["momentum"]
    inside = c["learning rate"] == "inside the velocity"
    gain = (lr if inside else 1) * (1 - m if c["velocity"] == "average" else 1)
    old, before = slots.get("momentum", u * 0), slots.get("velocity error", u * 0)
    b = slots["momentum"] = m * old + gain * u
    size, error = np.abs(m * old) + np.abs(gain) * size, np.abs(gain) * error
    slots["velocity error"] = m * before + error
    if c["velocity"] == "nesterov":
        b, size = gain * u + m * b, np.abs(gain * u) + size
    return b, size, slots["velocity error"] + error, 1 if inside else lr


DIALECTS = (
    Dialect(
        "published",
        "Tieleman and Hinton 2012, lecture 6e, with PyTorch's epsilon and momentum "
        "(torch/optim/rmsprop.py)",
        {},
    ),
    Dialect(
        "optax",
        "optax rmsprop; Keras 3 RMSprop (keras/src/optimizers/rmsprop.py)",
        {"epsilon": "inside the root", "learning rate": "inside the velocity"},
    ),
    Dialect(
        "optax, eps_in_sqrt=False",
        "optax rmsprop, eps_in_sqrt=False",
        {"learning rate": "inside the velocity"},
    ),
    Dialect(
        "TensorFlow 1",
        "tf.compat.v1.train.RMSPropOptimizer; timm RMSpropTF; optax rmsprop, initial_scale=1",
        {
            "epsilon": "inside the root",
            "learning rate": "inside the velocity",
            "first mean of squares": "one",
        },
    ),
    Dialect(
        "Adagrad",
        "Duchi, Hazan and Singer 2011, Figure 1; torch/optim/adagrad.py",
        {"mean of squares": "sum"},
        scope=False,
    ),
)

# --- what is asked --------------------------------------------------------------------------------

NAMES = ("alpha", "eps", "momentum", "centered", "weight_decay")
SETTINGS: tuple[Settings, ...] = tuple(
    dict(zip(NAMES, values, strict=True))
    for values in (
        (0.99, 1e-8, 0.0, False, 0.0),
        (0.99, 1e-8, 0.9, True, 0.1),
        (0.99, 1e-8, 0.9, False, 0.0),
        (0.9, 1e-3, 0.5, True, 0.0),
        (0.99, 1e-8, 0.0, False, 0.1),
        (0.99, 1e-8, 0.0, True, 0.0),
    )
)


def edges(f: Format, draw: Drawer) -> Iterator[Draft]:
    """Alphas and epsilons, and gradients that do not change."""
    w, g = draw("w", 2, 3), draw("g", 2, 3)
    tiny = draw("tiny g", 2, 3, size=2.0**-24 if f.name == "float16" else 1e-6)
    for alpha in (0.0, 0.9999999):
        draft = Draft(f"alpha {alpha}", ("BETA",), w, g, settings={"alpha": alpha})
        yield draft
        yield replace(draft, state=start(draw, 9, 0.3), comment=f"{draft.comment}, from a state")
    for eps in (0.0, 1e-3):
        about = ("EPSILON_ZERO",) if eps == 0 else ("TINY_GRADIENT",)
        yield Draft(f"eps {eps}", about, w, g, settings={"eps": eps})
        yield Draft(f"eps {eps}, small g", about, w, tiny, settings={"eps": eps})
    yield Draft(
        "0 / 0", ("EPSILON_ZERO", "ZERO_GRADIENT"), w, np.zeros((2, 3)),
        settings={"eps": 0.0}, result="acceptable",
    )  # fmt: skip
    yield Draft(
        "equal gradients", ("CANCELLATION", "SEQUENCE"), w, np.stack([g] * 4),
        (0.1, 0.05, 0.03, 0.025), settings={"centered": True},
    )  # fmt: skip
    state = start(draw, 3, 0.3)
    state["square_avg"][0, 0] = np.nan
    yield Draft("NaN in a state", ("NAN",), w, g, state=state, result="acceptable")


def start(draw: Drawer, step: int, size: float) -> Slots:
    """The state after `step` updates: a mean of squares well above the square of the mean."""
    m, s = draw("m", 2, 3, size=size), draw("v", 2, 3, size=size)
    return {
        "square_avg": draw.number.round(m * m + s * s + (size / 2) ** 2),
        "grad_avg": m,
        "momentum": draw("velocity", 2, 3, size=size),
        "step": step,
    }


# --- in libraries ---------------------------------------------------------------------------------


def for_optax(settings: Settings) -> Settings:
    """The arguments of optax.rmsprop."""
    rest = sgd.without_zero(settings)
    return {"decay": rest.pop("alpha"), **rest}


RULE = Rule(
    name="rmsprop",
    added=2,
    page=page,
    clauses=CLAUSES,
    step=step,
    dialects=DIALECTS,
    ulps=16.0,
    slots=("square_avg", "grad_avg", "momentum"),
    remembers=lambda settings: "a mean of squares",
    asked=SETTINGS,
    start=start,
    edges=edges,
    generated=(
        Generated(SETTINGS[1]),
        *(Generated(SETTINGS[k], plainer=True) for k in (3, 2, 0)),
    ),
    optimizers=(
        LibraryOptimizer(
            "torch.optim.RMSprop", NAMES,
            slots={
                "square_avg": "square_avg", "grad_avg": "grad_avg", "momentum": "momentum_buffer",
                "step": "step",
            },
        ),
        LibraryOptimizer(
            "optax.rmsprop", NAMES[:-1], arguments=for_optax,
            slots={"square_avg": "nu", "grad_avg": "mu", "momentum": "trace"},
            velocity=-1.0,  # it points to the new parameter
        ),
        LibraryOptimizer("torch.optim.Adagrad", slots={"square_avg": "sum"}),
        LibraryOptimizer(
            "keras.optimizers.RMSprop",
            slots={
                "square_avg": "velocity", "grad_avg": "average_gradient", "momentum": "momentum",
            },
        ),
        LibraryOptimizer("timm.optim.RMSpropTF"),
    ),
)  # fmt: skip
