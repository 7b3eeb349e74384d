"""What the referee knows of LAMB: as published, and as written elsewhere."""

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
    minus,
    norm,
    plus,
    representable,
)
from npdrt.conform.rules import adam
from npdrt.conform.rules.evaluate import Arithmetic, largest, skips
from npdrt.conform.rules.fromage import opposed
from npdrt.conform.rules.moments import (
    KERAS,
    MEANS,
    OPTAX,
    amplification,
    direction,
    page_moments,
    powers,
    start,
    two_betas,
    uncertainty,
)
from npdrt.conform.rules.rule import (
    ADAPTS,
    COMMON,
    COUNTING,
    MAXIMIZED,
    NORMS,
    Dialect,
    Generated,
    LibraryOptimizer,
    Rule,
    Settings,
)

# --- the section "lamb" of docs/updates.md --------------------------------------------------------


def page(
    w: Numbers, g: Numbers, state: dict[str, Any], lr: float, dtype: str, norms: Norms = None, *,
    betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-6, weight_decay: float = 0.0,
) -> Numbers:  # fmt: skip
    """The sequence."""
    fl = ROUND[dtype]
    mh, below = page_moments(g, state, betas, eps, fl)
    u = [fl(divide(x, y)) for x, y in zip(mh, below, strict=True)]
    u = plus(u, weight_decay, w, fl) if weight_decay != 0 else u
    nw, nu = norm(w) if norms is None else norms[0], norm(u)
    r = divide(nw, nu) if nw > 0 and nu > 0 else 1.0
    return minus(w, representable(lr * r, lr, dtype), u, fl)


# --- how implementations differ -------------------------------------------------------------------

CLAUSES: dict[str, dict[str, str]] = {
    "gradient": {
        "as given": "g",
        "clipped to norm 1": "g / max(1, |g|), with the norm of all tensors' gradients",
        "divided by the clip": "g / min(1, 1 / |g|), with the norm of all tensors' gradients",
        "clipped to norm 1, each": "g / max(1, |g|), with the norm of this tensor's gradient",
    },
    # not "precision": it is a factor of all of u, which the ratio divides out
    "epsilon": MEANS["epsilon"],
    "first moment": MEANS["first moment"],
    "bias correction": {
        **MEANS["bias correction"],
        "of the rate": "lr sqrt(1 - beta2^t) / (1 - beta1^t), with m and v as they are",
        "of the rate, by beta1": "lr / (1 - beta1^t), with m and v as they are",
    },
    "second moment": {
        k: MEANS["second moment"][k] for k in ("mean of squares", "without g^2 weight")
    },
    "weight decay": {
        "in the direction": "d + wd w, in the norm too",
        "in the gradient": "g + wd w",
        "decoupled": "w (1 - lr wd) before the step",
        "decoupled, without lr": "w (1 - wd) before the step",
        "beside the ratio": "r d + wd w, where |d| divides",
        "only in the ratio": "r d, where |d + wd w| divides",
        "subtracted": "d - wd w",
        "ignored": "none",
    },
    "weight norm": {
        "free": "|w|",
        "at most 10": "min(|w|, 10)",
    },
    "trust ratio": {
        "|w| / |u|": "the norm of the parameter over that of the direction",
        "with epsilon": "|w| / (|u| + eps)",
        "at most 1": "min(|w| / |u|, 1)",
        "absent": "1",
        "of the gradient": "|w| / |g|",
        "|u| / |w|": "upside down",
    },
    "zero norm": {
        "ratio 1": "r = 1 where either norm is not > 0",
        "unguarded": "0/0, or a zero parameter that never moves",
        "no step": "r = 0 where either norm is not > 0",
    },
    "adapts": ADAPTS,
    **COMMON,
    **MAXIMIZED,
    **NORMS,
    **COUNTING,
}


def step(
    c: dict[str, str], w: Any, g: Any, slots: Slots, h: dict[str, Any], a: Arithmetic
) -> tuple[Any, Slots, Any]:
    """w <- w - lr |w| / |u| u, with u = m_hat / (sqrt(v_hat) + eps) + wd w."""
    adapts, slots, kind = not skips(c, w, h), dict(slots), c["weight decay"]
    wd = h["weight_decay"] if adapts else 0
    shrunk = {"decoupled": 1 - h["lr"] * wd, "decoupled, without lr": 1 - wd}.get(kind, 1)
    inside = wd * w if kind == "in the gradient" else 0 * w
    added = {"in the direction": wd, "only in the ratio": wd, "subtracted": -wd}.get(kind, 0) * w
    beside = wd * w if kind == "beside the ratio" else 0 * w
    w, g = shrunk * w, a.note("g", clipped(c, g, h))
    in_rate, means = "of the rate" in c["bias correction"], {**c, "precision": "float64"}
    means = {**means, "bias correction": "none"} if in_rate else means
    d, size, doubt = direction(means, g + inside, np.abs(g) + np.abs(inside), 0, slots, h, a)
    u, lr = a.note("u", d + added), corrected_rate(c, slots, h) if in_rate else h["lr"]
    narrow = uncertainty({"precision": "dtype"}, slots, h["betas"], a)  # in 1 - beta^t
    r = a.note("r", trust_ratio(c, w, u, g, h, a, narrow) if adapts else a.real(1.0))
    k = lr * r if c["zero norm"] == "unguarded" else a.representable(lr * r, lr * r, lr)
    used = d if kind == "only in the ratio" else u
    new = a.note("w", w - h["sign"] * (k * used + lr * beside))
    gross, unsure = size + np.abs(added), doubt * size
    change = np.abs(k) * largest(gross, of_norm(u, gross), used) + np.abs(lr * beside)
    divides = adapts and np.any(w != 0) and "float16" not in c["norm format"]
    common = narrow * (across(u, d) if divides else d)
    a.change = amplification(slots, a) * change
    a.slack = np.abs(k) * (unsure + of_norm(u, unsure) + np.abs(common) + a.of_norms * np.abs(used))
    return new, slots, largest(w, a.change)


def of_norm(u: Any, x: Any) -> Any:
    """The error of u / |u| times |u| that comes by way of the norm, for errors x of u."""
    squares = np.sum(u * u)
    return np.abs(u) * (np.sum(np.abs(u) * x) / squares) if squares > 0 else u * 0


def across(u: Any, d: Any) -> Any:
    """d without its part along u."""
    squares = np.sum(u * u)
    return d - u * (np.sum(u * d) / squares) if squares > 0 else d


def corrected_rate(c: dict[str, str], slots: Slots, h: dict[str, Any]) -> Any:
    """The rate that takes the place of corrected moments; the powers are those after the step."""
    rate = h["lr"] / (1 - slots["beta1_power"])
    by_one = c["bias correction"] == "of the rate, by beta1"
    return rate if by_one else rate * np.sqrt(1 - slots["beta2_power"])


def clipped(c: dict[str, str], g: Any, h: dict[str, Any]) -> Any:
    """The gradient that the moments see, by the clause "gradient"."""
    if c["gradient"] == "as given":
        return g
    squares, beside = np.sum(g * g), h.get("gradient beside", g * 0)
    if c["gradient"] != "clipped to norm 1, each":
        squares = squares + np.sum(beside * beside)
    size = np.maximum(np.sqrt(squares), 1)
    return g * size if c["gradient"] == "divided by the clip" else g / size


def trust_ratio(
    c: dict[str, str], w: Any, u: Any, g: Any, h: dict[str, Any], a: Arithmetic, narrow: float
) -> Any:
    """|w| / |u|, by the clauses "weight norm", "trust ratio" and "zero norm"; narrow: the relative
    error of u that a narrow bias correction explains."""
    nw, nu = a.note("|w|", a.norm(w)), a.note("|u|", a.norm(u, narrow))
    nw = np.minimum(nw, 10) if c["weight norm"] == "at most 10" else nw
    guarded, one = c["zero norm"] != "unguarded", a.real(1.0)
    above, below = nw, a.norm(g) if c["trust ratio"] == "of the gradient" else nu
    usable = (nw > 0) & (below > 0)
    match c["trust ratio"]:
        case "absent":
            return one
        case "|u| / |w|":
            above, below = below, above
        case "with epsilon":
            below = below + h["eps"]
    r = above / (np.where(usable, below, one) if guarded else below)
    if guarded:
        r = np.where(usable, r, 0 if c["zero norm"] == "no step" else 1)
    return np.minimum(r, 1) if c["trust ratio"] == "at most 1" else r


PAPER = "You et al. 2020, Algorithm 2"
CLIPS = {"gradient": "clipped to norm 1"}
FUSED = {**CLIPS, "adapts": "only with weight decay"}
OLD = {"bias correction": "none", "weight norm": "at most 10"}
KOZISTR = {**OLD, "weight decay": "decoupled", "trust ratio": "with epsilon"}
APEX = "NVIDIA apex, optimizers/fused_lamb.py (16fadfe), csrc/multi_tensor_lamb.cu (06a83ce)"
TIMM = "timm 1.0.31, optim/lamb.py"
JETTIFY = "torch_optimizer 0.3.0, lamb.py"
OF_KOZISTR = "pytorch_optimizer 4.1.0, optimizer/lamb.py"
DIALECTS = (
    Dialect(
        "published",
        f"{PAPER}, with the identity for phi; optax 0.2.8 lamb; TensorFlow Addons 00beec0, "
        "optimizers/lamb.py",
        {},
    ),
    Dialect("NVLAMB", f"{APEX}, use_nvlamb=True; {TIMM}, always_adapt=True", CLIPS),
    Dialect("apex", f"{APEX}; {TIMM}", FUSED,
            "its docstring names other defaults than the code has (apex issue 1186)"),
    Dialect("apex, adam_w_mode=False", APEX, {**FUSED, "weight decay": "in the gradient"}),
    Dialect("apex, grad_averaging=False", f"{APEX}; {TIMM}",
            {**FUSED, "first moment": "without g weight"}),
    Dialect("timm, trust_clip", f"{TIMM}, trust_clip=True", {**FUSED, "trust ratio": "at most 1"}),
    Dialect("timm, decoupled_decay", f"{TIMM}, decoupled_decay=True",
            {**FUSED, "weight decay": "decoupled"}),
    Dialect("Keras", "keras 3.15.1, optimizers/lamb.py", {"weight decay": "decoupled"}),
    Dialect("jettify", JETTIFY, OLD),
    Dialect("jettify, debias=True", f"{JETTIFY}, debias=True",
            {**OLD, "bias correction": "of the rate"}),
    Dialect("cybertronai", "cybertronai/pytorch-lamb 207f672, pytorch_lamb/lamb.py",
            {**OLD, "zero norm": "unguarded"}),
    Dialect("kozistr", OF_KOZISTR, {**KOZISTR, "bias correction": "of the rate, by beta1"}),
    Dialect("kozistr, adam_debias=True", f"{OF_KOZISTR}, adam_debias=True", KOZISTR),
)  # fmt: skip

# --- what is asked --------------------------------------------------------------------------------

SETTINGS: tuple[Settings, ...] = (
    {"betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.0},
    {"betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.1},
    {"betas": (0.5, 0.9), "eps": 1e-3, "weight_decay": 0.01},
)


def edges(f: Format, draw: Drawer) -> Iterator[Draft]:
    """Those of Adam; norms and gradients on either side of where others clip, and zeros."""
    w, g, zero = draw("w", 2, 3), draw("g", 2, 3), np.zeros((2, 3))
    yield from adam.edges(f, draw)
    yield from opposed(f, draw)
    yield Draft("a norm above 10", ("ORDINARY",), 16 * w, g)
    for size in (0.125, 16.0):
        state = start(draw, 9, 0.3)
        yield Draft(f"{size} times the gradient", ("ORDINARY",), w, size * g, state=state)
    yield Draft("gradient zero, from a state", ("ZERO_GRADIENT",), w, zero,
                state=start(draw, 9, 0.3))  # fmt: skip
    state = start(draw, 9, 0.3)
    yield Draft("parameter zero, from a state", ("ZERO_PARAMETER",), zero, g, state=state)


RULE = Rule(
    name="lamb",
    added=5,
    page=page,
    clauses=CLAUSES,
    step=step,
    dialects=DIALECTS,
    ulps=20.0,
    slots=("exp_avg", "exp_avg_sq"),
    remembers=lambda settings: "moments",
    scales_by_operands=("float64",),
    asked=SETTINGS,
    start=start,
    scalars=powers,
    edges=edges,
    later=adam.later,
    generated=(Generated(SETTINGS[1]), Generated(SETTINGS[0], plainer=True)),
    optimizers=(
        LibraryOptimizer(
            "optax.lamb",
            ("betas", "eps", "weight_decay"),
            arguments=two_betas,
            slots=OPTAX,
            mask="mask",
        ),
        LibraryOptimizer("keras.optimizers.Lamb", slots=KERAS),
        LibraryOptimizer("timm.optim.Lamb"),
        LibraryOptimizer("pytorch_optimizer.Lamb"),
        LibraryOptimizer("torch_optimizer.Lamb"),
    ),
)
