"""What the referee knows of Adam and its relatives."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from npdrt.conform.case import Slots
from npdrt.conform.cases import Draft, Drawer
from npdrt.conform.formats import FORMATS, Format, rounding_error
from npdrt.conform.page import (
    ROUND,
    Norms,
    Numbers,
    divide,
    mixed,
    power,
    quotient,
    root,
    scaled,
    with_decay,
)
from npdrt.conform.rules.evaluate import Arithmetic, largest, limited
from npdrt.conform.rules.rule import (
    COMMON,
    STATE,
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
    fl, (beta1, beta2), zeros = ROUND[dtype], betas, [0.0] * len(w)
    b1 = state["beta1_power"] = page_power(state, "beta1_power", beta1)
    b2 = state["beta2_power"] = page_power(state, "beta2_power", beta2)
    if decoupled and weight_decay != 0:
        w = scaled(w, 1.0 - lr * weight_decay, fl)
    else:
        g = with_decay(w, g, weight_decay, fl)
    squares = [fl(x * x) for x in g]
    m = state["exp_avg"] = mixed(beta1, state.get("exp_avg", zeros), 1.0 - beta1, g, fl)
    v = state["exp_avg_sq"] = mixed(beta2, state.get("exp_avg_sq", zeros), 1.0 - beta2, squares, fl)
    mh, vh = quotient(m, 1.0 - b1, fl), quotient(v, 1.0 - b2, fl)
    rate, e = fl(lr), fl(eps)
    below = [fl(fl(root(x)) + e) for x in vh]
    return [fl(a - fl(divide(fl(rate * x), y))) for a, x, y in zip(w, mh, below, strict=True)]


def page_power(state: dict[str, Any], name: str, beta: float) -> float:
    """The running product of this step: from the state, or from "step" if the state has none."""
    before: float = state[name] if name in state else power(beta, state["step"])
    return before * beta


# --- how implementations differ -------------------------------------------------------------------

CLAUSES: dict[str, dict[str, str]] = {
    "epsilon": {
        "after the corrected root": "sqrt(v / (1 - beta2^t)) + eps",
        "epsilon-hat": "sqrt(v) + eps, with lr sqrt(1 - beta2^t) / (1 - beta1^t)",
        "inside the root": "sqrt(v / (1 - beta2^t) + eps)",
        "inside the root, before correction": "sqrt((v + eps) / (1 - beta2^t))",
        "ignored": "sqrt(v / (1 - beta2^t))",
    },
    "bias correction": {
        "both moments": "m / (1 - beta1^t), v / (1 - beta2^t)",
        "none": "m and v as they are",
        "first moment only": "v as it is",
        "second moment only": "m as it is",
        "t of before": "t counts from 0, first corrected at the second step",
        "t too large": "t counts from 2",
        "betas exchanged": "m / (1 - beta2^t), v / (1 - beta1^t)",
    },
    "precision": {
        "float64": "1 - beta^t in float64",
        "dtype": "1 - beta^t in the tensor's dtype",
        "float32": "1 - beta^t in float32 for every tensor",
    },
    "second moment": {
        "mean of squares": "beta2 v + (1 - beta2) g^2",
        "largest mean of squares": "the largest v so far (AMSGrad)",
        "largest corrected": "the largest v / (1 - beta2^t) so far (AMSGrad in optax)",
        "largest absolute value": "max(beta2 v, |g|), no root (Adamax)",
        "centred": "beta2 v + (1 - beta2) (g - m)^2 (AdaBelief)",
        "without g^2 weight": "beta2 v + g^2",
    },
    "first moment": {
        "mean": "beta1 m + (1 - beta1) g",
        "nesterov": "beta1 m + (1 - beta1) g once more (NAdam without its schedule)",
        "without g weight": "beta1 m + g",
        "of before": "the step uses the m of before",
    },
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
    **STATE,
}


def step(
    c: dict[str, str], w: Any, g: Any, slots: Slots, h: dict[str, Any], a: Arithmetic
) -> tuple[Any, Slots, Any]:
    """Algorithm 1 of Kingma and Ba under the choices c."""
    lr, (beta1, beta2) = h["lr"], h["betas"]
    start, shrunk, used_g, after = decayed(c, w, g, h)
    gross, g = np.abs(g) + np.abs(used_g - g), used_g
    slots = dict(slots)
    old_m, old_v = slots.get("exp_avg", g * 0), slots.get("exp_avg_sq", g * 0)
    m = a.note("m", first_moment(c, old_m, g, beta1))
    v = a.note("v", second_moment(c, old_v, g, m, beta2))
    slots["exp_avg"], slots["exp_avg_sq"] = m, v
    c1, c2 = corrections(c, slots, beta1, beta2, a)
    used = {"nesterov": beta1 * m + (1 - beta1) * g, "of before": old_m}
    m = used.get(c["first moment"], m)
    v_hat = v / c2
    if c["second moment"] in ("largest mean of squares", "largest corrected"):
        v, v_hat = maximal(c, v, v_hat, c2, slots)
    root = a.note("denominator", denominator(c, v, v_hat, c2, h["eps"], a))
    d = a.note("m_hat / denominator", (m / c1 + after * w) / root)
    new = start * shrunk - h["sign"] * lr * d
    if c["weight decay"] == "decoupled, after the step":
        new = new * (1 - lr * h.get("weight_decay", 0) * bool(h.get("decoupled")))
    share = np.abs((1 - beta2) * g * m) / np.where(v > 0, v, v * 0 + 1)  # of a rounding of g in v
    size = (np.abs(beta1 * old_m) + (1 - beta1 + share) * gross) / c1 + np.abs(after * w)
    step = largest(lr * size / root, lr * d)
    a.change = amplification(slots, a) * step
    slots["drift"] = drift(slots.get("drift", v * 0), old_v, beta2, a)
    unsure = slots["drift"] / np.where(v > 0, 2 * v, v * 0 + 1)  # of the step, under the root
    a.slack = (uncertainty(c, slots, (beta1, beta2), a) + unsure) * step
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


def first_moment(c: dict[str, str], m: Any, g: Any, beta: Any) -> Any:
    """The running mean of the gradient."""
    return beta * m + (g if c["first moment"] == "without g weight" else (1 - beta) * g)


def second_moment(c: dict[str, str], v: Any, g: Any, m: Any, beta: Any) -> Any:
    """The running mean of its square."""
    match c["second moment"]:
        case "largest absolute value":
            return np.maximum(beta * v, np.abs(g))
        case "centred":
            return beta * v + (1 - beta) * (g - m) * (g - m)
        case "without g^2 weight":
            return beta * v + g * g
    return beta * v + (1 - beta) * g * g


def corrections(c: dict[str, str], slots: Slots, beta1: Any, beta2: Any, a: Arithmetic) -> Any:
    """1 - beta1^t and 1 - beta2^t; moves the powers in `slots` on."""
    before = [slots.get("beta1_power", a.real(1.0)), slots.get("beta2_power", a.real(1.0))]
    now = [before[0] * beta1, before[1] * beta2]
    slots["beta1_power"], slots["beta2_power"] = now
    match c["bias correction"]:
        case "t of before":
            now = before if slots["step"] else [beta1 * 0, beta2 * 0]
        case "t too large":
            now = [now[0] * beta1, now[1] * beta2]
        case "betas exchanged":
            now = now[::-1]
    narrow = {"dtype": a.format.name, "float32": "float32"}.get(c["precision"], "float64")
    if narrow != "float64":
        now = [a.rounded(float(b), narrow) ** (slots["step"] + 1) for b in (beta1, beta2)]
    one = 1 - beta1 * 0
    c1, c2 = 1 - now[0], 1 - now[1]
    match c["bias correction"]:
        case "none":
            return one, one
        case "first moment only":
            return c1, one
        case "second moment only":
            return one, c2
    return a.note("1 - beta1^t", c1), a.note("1 - beta2^t", c2)


def maximal(c: dict[str, str], v: Any, v_hat: Any, c2: Any, slots: Slots) -> tuple[Any, Any]:
    """AMSGrad's largest second moment, and the same corrected."""
    if c["second moment"] == "largest mean of squares":
        slots["largest"] = np.maximum(v, slots.get("largest", v * 0))
        return slots["largest"], slots["largest"] / c2
    slots["largest"] = np.maximum(v_hat, slots.get("largest", v * 0))
    return slots["largest"] * c2, slots["largest"]


def denominator(c: dict[str, str], v: Any, v_hat: Any, c2: Any, eps: Any, a: Arithmetic) -> Any:
    """The corrected root with epsilon, by the clause "epsilon"."""
    if c["second moment"] == "largest absolute value":
        return v + eps
    match c["epsilon"]:
        case "epsilon-hat":
            return (np.sqrt(v) + eps) / np.sqrt(c2)
        case "inside the root":
            return np.sqrt(v_hat + eps)
        case "inside the root, before correction":
            return np.sqrt((v + eps) / c2)
        case "ignored":
            return np.sqrt(limited(v_hat, a.format))
    return np.sqrt(v_hat) + eps


def amplification(slots: Slots, a: Arithmetic) -> float:
    """The error of a step over that of its roundings in the tensor's dtype, if 1 - beta^t is
    computed in float64.

    A relative error u of beta^t is an error u beta^t / (1 - beta^t) of the difference. It does not
    count if float64 is wider than the tensor's format.
    """
    return 1.0 + (sum(conditions(slots, a.format)) if a.format.name == "float64" else 0.0)


def drift(before: Any, v: Any, beta: Any, a: Arithmetic) -> Any:
    """The error of the second moment, after a step, that the rounding of beta2 explains.

    An implementation whose scalars have the tensor's dtype multiplies v by (1 + d) beta2, at every
    step, where d is the rounding error of beta2. The error e of v follows e <- beta2 (e + |d| v).
    It builds up over 1 / (1 - beta2) steps: to 1.3e-5 of v in float32 with beta2 = 0.999.
    """
    return beta * (before + rounding_error(a.format, float(beta)) * v)


def uncertainty(c: dict[str, str], slots: Slots, betas: tuple[Any, Any], a: Arithmetic) -> float:
    """The relative error of a step that a bias correction in a narrow format explains.

    Implementations round beta, or beta^t, or every product on the way to it. With u the rounding
    of the format and d that of beta, the relative error of beta^t is t d and 2 u (1 + sqrt(t)), for
    the roundings of t products, which do not all point one way. In 1 - beta^t it is
    beta^t / (1 - beta^t) times as large; of the second moment's, under the root, half counts.
    """
    if c["precision"] == "float64":
        return 0.0
    narrow = FORMATS["float32"] if c["precision"] == "float32" else a.format
    t, u = slots["step"] + 1, 2.0**-narrow.precision
    shifts = [rounding_error(narrow, float(beta)) for beta in betas]
    first, second = (
        float(k * (t * d + 2 * u * (1 + t**0.5)))
        for k, d in zip(conditions(slots, narrow), shifts, strict=True)
    )
    return first + second / 2


def conditions(slots: Slots, narrow: Format) -> list[float]:
    """beta^t / (1 - beta^t) of both betas, with beta^t at least one unit away from 1."""
    powers = (min(float(slots[f"beta{k}_power"]), 1 - 2.0**-narrow.precision) for k in (1, 2))
    return [p / (1 - p) for p in powers]


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
        "Kingma and Ba 2015, Algorithm 2",
        {"second moment": "largest absolute value", "bias correction": "first moment only"},
        scope=False,
    ),
    Dialect("AdaBelief", "Zhuang et al. 2020", {"second moment": "centred"}, scope=False),
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


def moments(draw: Drawer, step: int, size: float = 1.0) -> Slots:
    """Adam's state after `step` updates."""
    m, v = draw("m", 2, 3, size=0.3 * size), draw("v", 2, 3, size=0.5 * size)
    f = draw.number
    fresh = step == 0
    v = np.maximum(f.round(v * v), f.smallest_normal if not fresh else 0.0)
    return {
        "exp_avg": m * (not fresh),
        "exp_avg_sq": f.round(v) * (not fresh),
        "step": step,
    }


def start(draw: Drawer, step: int, size: float) -> Slots:
    """`moments`, or zeros."""
    found = moments(draw, step)
    return {k: v if k == "step" or size else 0 * v for k, v in found.items()}


def powers(step: int, settings: Mapping[str, Any]) -> Slots:
    """The beta powers after `step` updates."""
    return {f"beta{k}_power": power(beta, step) for k, beta in enumerate(settings["betas"], 1)}


def later(draw: Drawer) -> Iterator[Draft]:
    """The steps at which a counter in bfloat16 or float16 stops counting."""
    for t in (258, 2050):
        yield Draft(
            f"t = {t}", ("COUNTER",), draw("w", 2, 3), draw("g", 2, 3),
            state=moments(draw, t - 1), plain=True,
        )  # fmt: skip


# --- in libraries ---------------------------------------------------------------------------------


def two_betas(settings: Settings) -> Settings:
    """The arguments of optax's forms, which take b1 and b2."""
    rest = dict(settings)
    b1, b2 = rest.pop("betas")
    return {"b1": b1, "b2": b2, **rest}


MOMENTS = ("betas", "eps")
DECAYED = (*MOMENTS, "weight_decay")
TORCH = {"exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq", "step": "step"}
OPTAX = {"exp_avg": "mu", "exp_avg_sq": "nu"}
AMSGRAD = {"amsgrad": "max_exp_avg_sq"}
DECOUPLED = {"decoupled": True}

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
        LibraryOptimizer("torch.optim.Adam", DECAYED, slots=TORCH, adds=AMSGRAD),
        LibraryOptimizer("torch.optim.AdamW", DECAYED, DECOUPLED, slots=TORCH, adds=AMSGRAD),
        LibraryOptimizer("optax.adam", MOMENTS, arguments=two_betas, slots=OPTAX),
        LibraryOptimizer("optax.adamw", DECAYED, DECOUPLED, two_betas, slots=OPTAX),
        LibraryOptimizer("optax.amsgrad", MOMENTS, arguments=two_betas, slots=OPTAX),
    ),
)
