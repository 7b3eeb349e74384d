"""Adam's two moments, which Adam and AdamW share: their sequence, clauses and errors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from npdrt.conform.case import Slots
from npdrt.conform.cases import Drawer
from npdrt.conform.formats import FORMATS, Format, rounding_error
from npdrt.conform.page import Numbers, Rounding, mixed, power, quotient, root
from npdrt.conform.rules.evaluate import Arithmetic, limited
from npdrt.conform.rules.rule import Settings

# --- the sequence -------------------------------------------------------------------------------


def page_moments(
    g: Numbers, state: dict[str, Any], betas: tuple[float, float], eps: float, fl: Rounding
) -> tuple[Numbers, Numbers]:
    """`mh` and `sqrt(vh) + [eps]` of docs/updates.md; moves the moments in `state` on."""
    (beta1, beta2), zeros = betas, [0.0] * len(g)
    b1 = state["beta1_power"] = page_power(state, "beta1_power", beta1)
    b2 = state["beta2_power"] = page_power(state, "beta2_power", beta2)
    squares = [fl(x * x) for x in g]
    m = state["exp_avg"] = mixed(beta1, state.get("exp_avg", zeros), 1.0 - beta1, g, fl)
    v = state["exp_avg_sq"] = mixed(beta2, state.get("exp_avg_sq", zeros), 1.0 - beta2, squares, fl)
    e = fl(eps)
    below = [fl(fl(root(x)) + e) for x in quotient(v, 1.0 - b2, fl)]
    return quotient(m, 1.0 - b1, fl), below


def page_power(state: dict[str, Any], name: str, beta: float) -> float:
    """The running product of this step: from the state, or from "step" if the state has none."""
    before: float = state[name] if name in state else power(beta, state["step"])
    return before * beta


# --- how implementations differ -------------------------------------------------------------------

COUNTS = {
    "t of before": "t counts from 0, first corrected at the second step",
    "t of before, unguarded": "t counts from 0, and the first step divides by 0",
    "t too large": "t counts from 2",
}
MEANS: dict[str, dict[str, str]] = {
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
        **COUNTS,
        **{f"{how} in m": f"for m alone, {text}" for how, text in COUNTS.items()},
        **{f"{how} in v": f"for v alone, {text}" for how, text in COUNTS.items()},
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
        "largest absolute value, eps inside": "max(beta2 v, |g| + eps), no root, no other eps",
        "centred": "beta2 v + (1 - beta2) (g - m)^2 (AdaBelief)",
        "centred, plus eps": "beta2 v + (1 - beta2) (g - m)^2 + eps, and eps outside, too",
        "without g^2 weight": "beta2 v + g^2",
    },
    "first moment": {
        "mean": "beta1 m + (1 - beta1) g",
        "nesterov": "beta1 m + (1 - beta1) g once more (NAdam without its schedule)",
        "without g weight": "beta1 m + g",
        "of before": "the step uses the m of before",
    },
}


def direction(
    c: dict[str, str], g: Any, gross: Any, extra: Any, slots: Slots, h: dict[str, Any],
    a: Arithmetic,
) -> tuple[Any, Any, Any]:  # fmt: skip
    """(m / c1 + extra) over the root, the size of its operands, and its relative error that the
    arithmetic of a profile explains; moves the moments in `slots` on.

    gross: the size of the operands of g.
    """
    beta1, beta2 = h["betas"]
    old_m, old_v = slots.get("exp_avg", g * 0), slots.get("exp_avg_sq", g * 0)
    m = a.note("m", first_moment(c, old_m, g, beta1))
    v = a.note("v", second_moment(c, old_v, g, m, beta2, h["eps"]))
    slots["exp_avg"], slots["exp_avg_sq"] = m, v
    c1, c2 = corrections(c, slots, beta1, beta2, a)
    used = {"nesterov": beta1 * m + (1 - beta1) * g, "of before": old_m}
    m = used.get(c["first moment"], m)
    share = np.abs((1 - beta2) * g * m) / np.where(v > 0, v, v * 0 + 1)  # of a rounding of g in v
    v_hat = (v if c2 else limited(v, a.format)) / c2  # v / 0 is NaN where v underflows
    if c["second moment"] in ("largest mean of squares", "largest corrected"):
        v, v_hat = maximal(c, v, v_hat, c2, slots)
    root = a.note("denominator", denominator(c, v, v_hat, c2, h["eps"], a))
    kept = mask(c, m, g)
    d = a.note("m_hat / denominator", kept * (m / c1 + extra) / root)
    size = (np.abs(beta1 * old_m) + (1 - beta1 + share) * gross) / c1 + np.abs(extra)
    slots["drift"] = drift(slots.get("drift", v * 0), old_v, beta2, a)
    unsure = slots["drift"] / np.where(v > 0, 2 * v, v * 0 + 1)  # of the step, under the root
    return d, kept * size / root, uncertainty(c, slots, (beta1, beta2), a) + unsure


def first_moment(c: dict[str, str], m: Any, g: Any, beta: Any) -> Any:
    """The running mean of the gradient."""
    return beta * m + (g if c["first moment"] == "without g weight" else (1 - beta) * g)


def second_moment(c: dict[str, str], v: Any, g: Any, m: Any, beta: Any, eps: Any) -> Any:
    """The running mean of its square."""
    match c["second moment"]:
        case "largest absolute value":
            return np.maximum(beta * v, np.abs(g))
        case "largest absolute value, eps inside":
            return np.maximum(beta * v, np.abs(g) + eps)
        case "centred":
            return beta * v + (1 - beta) * (g - m) * (g - m)
        case "centred, plus eps":
            return beta * v + (1 - beta) * (g - m) * (g - m) + eps
        case "without g^2 weight":
            return beta * v + g * g
    return beta * v + (1 - beta) * g * g


def mask(c: dict[str, str], m: Any, g: Any) -> Any:
    """The share of each element in the step, by the clause "mask" of a rule that has it."""
    if c.get("mask", "none") == "none":
        return 1
    kept = np.where(m * g > 0, 1, 0)
    mean = np.sum(kept) / max(np.size(kept), 1)
    return kept if c["mask"] == "cautious, unscaled" else kept / max(mean, 1e-3)


def corrections(c: dict[str, str], slots: Slots, beta1: Any, beta2: Any, a: Arithmetic) -> Any:
    """1 - beta1^t and 1 - beta2^t; moves the powers in `slots` on."""
    one = 1 - beta1 * 0
    c1 = 1 - counted(c, "m", "beta1_power", beta1, slots, a)
    c2 = 1 - counted(c, "v", "beta2_power", beta2, slots, a)
    match c["bias correction"]:
        case "none":
            return one, one
        case "first moment only":
            return c1, one
        case "second moment only":
            return one, c2
        case "betas exchanged":
            c1, c2 = c2, c1
    return a.note("1 - beta1^t", c1), a.note("1 - beta2^t", c2)


def counted(
    c: dict[str, str], moment: str, name: str, beta: Any, slots: Slots, a: Arithmetic
) -> Any:
    """beta^t with the t that the clause "bias correction" has for a moment, and in its format;
    moves the power in `slots` on."""
    before = slots.get(name, a.real(1.0))
    now = slots[name] = before * beta
    how, _, alone = c["bias correction"].partition(" in ")
    late = {"t too large": 1, "t of before": -1, "t of before, unguarded": -1}.get(how, 0)
    late = late if alone in ("", moment) else 0
    if late < 0 and slots["step"] == 0:
        return before if how.endswith("unguarded") else beta * 0
    narrow = {"dtype": a.format.name, "float32": "float32"}.get(c["precision"], "float64")
    if narrow != "float64":
        return a.rounded(float(beta), narrow) ** (slots["step"] + 1 + late)
    return {-1: before, 0: now, 1: now * beta}[late]


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
    if c["second moment"] == "largest absolute value, eps inside":
        return v
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


# --- what is asked --------------------------------------------------------------------------------


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


# --- in libraries ---------------------------------------------------------------------------------


def two_betas(settings: Settings) -> Settings:
    """The arguments of optax's forms, which take b1 and b2."""
    rest = dict(settings)
    b1, b2 = rest.pop("betas")
    return {"b1": b1, "b2": b2, **rest}


TORCH = {"exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq", "step": "step"}
OPTAX = {"exp_avg": "mu", "exp_avg_sq": "nu"}
KERAS = {"exp_avg": "momentum", "exp_avg_sq": "velocity"}
ADABELIEF = {"exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_var"}
