"""What the referee knows of Muon.

Some questions on which sources differ are no clauses here, as one tensor with its gradient cannot
answer them: what happens to missing gradients, whether queries, keys and values are one matrix,
where gradients are clipped, and which tensors go to Adam (docs/updates.md).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from npdrt.conform.case import Slots
from npdrt.conform.cases import Draft, Drawer
from npdrt.conform.formats import FORMATS, Format
from npdrt.conform.page import ROUND, Norms, Numbers, minus, mixed, norm, product, scaled
from npdrt.conform.rules.evaluate import Arithmetic, largest
from npdrt.conform.rules.newton_schulz import COEFFICIENTS, Triple, spread
from npdrt.conform.rules.rule import (
    COMMON,
    MAXIMIZED,
    STATE,
    Dialect,
    LibraryOptimizer,
    Rule,
    Settings,
    given_velocity,
    keeps_velocity,
)

# --- the section "muon" of docs/updates.md --------------------------------------------------------


def page(
    w: Numbers, g: Numbers, state: dict[str, Any], lr: float, dtype: str, norms: Norms = None, *,
    shape: tuple[int, ...], momentum: float = 0.95, nesterov: bool = True,
    weight_decay: float = 0.0,
) -> Numbers:  # fmt: skip
    """The sequence."""
    fl, left = ROUND[dtype], 1.0 - momentum
    m = mixed(momentum, state.get("momentum", [0.0] * len(w)), left, g, fl)
    state["momentum"] = m
    d = mixed(momentum, m, left, g, fl) if nesterov else m
    w = scaled(w, 1.0 - lr * weight_decay, fl) if weight_decay != 0 else w
    if not w:
        return w
    rows = shape[0] if len(shape) > 1 else 1
    columns = len(w) // rows
    size = lr * math.sqrt(max(1.0, rows / columns))
    wide = "float64" if dtype == "float64" else "float32"
    x = page_orthogonal(d, rows, columns, wide)
    return minus(w, size, [fl(value) for value in x], fl)


def page_orthogonal(d: Numbers, rows: int, columns: int, dtype: str) -> Numbers:
    """The tensor X after five steps, in C order."""
    fl = ROUND[dtype]
    a, b, c = (fl(k) for k in (3.4445, -4.7750, 2.0315))
    size = fl(norm(d) + 1e-7)
    x = [[fl(value / size) for value in d[k * columns : (k + 1) * columns]] for k in range(rows)]
    x = page_transpose(x) if rows > columns else x
    for _ in range(5):
        gram = product(x, x, dtype)  # the rows of X are the columns of X^T
        pairs = zip(gram, product(gram, page_transpose(gram), dtype), strict=True)
        y = [[fl(fl(b * p) + fl(c * q)) for p, q in zip(*rs, strict=True)] for rs in pairs]
        pairs = zip(x, product(y, page_transpose(x), dtype), strict=True)
        x = [[fl(fl(a * p) + q) for p, q in zip(*rs, strict=True)] for rs in pairs]
    x = page_transpose(x) if rows > columns else x
    return [value for row in x for value in row]


def page_transpose(x: list[Numbers]) -> list[Numbers]:
    """The columns as rows."""
    return [list(column) for column in zip(*x, strict=True)]


# --- how implementations differ -------------------------------------------------------------------

CLAUSES: dict[str, dict[str, str]] = {
    "momentum": {
        "mean": "mu m + (1 - mu) g",
        "sum": "mu m + g, which epsilon alone can tell from a mean",
        "of before": "the step uses the m of before",
    },
    "nesterov": {
        "as set": "mu m + (1 - mu) g if it is on",
        "bias-corrected": "mu m / (1 - mu^(t+1)) + (1 - mu) g / (1 - mu^t), and m / (1 - mu^t)",
        "ignored": "never",
        "always": "also if it is off",
    },
    "precision": {
        "dtype": "the iteration in float32, in float64 for a tensor of float64",
        "bfloat16": "the iteration in bfloat16 for every tensor",
    },
    "normaliser": {
        "1e-7 added": "|d| + 1e-7",
        "1e-7 at least": "max(|d|, 1e-7)",
        "1e-8 added": "|d| + 1e-8",
        "spectral": "the largest singular value, with 1e-7 added",
    },
    "norm accumulation": {
        "wide": "the sum of squares neither overflows nor underflows",
        "dtype": "squares and their sum in the tensor's dtype",
    },
    "coefficients": {
        "Jordan's": "3.4445, -4.7750, 2.0315",
        "cubic": "3/2, -1/2, 0",
        "quintic": "15/8, -10/8, 3/8",
        "of each step": "five triples, from 4.0848, -6.8946, 2.9270 on (modded-nanogpt)",
    },
    "iterations": {"five": "5", "six": "6", "four": "4"},
    "scale": {
        "sqrt(max(1, out/in))": "out rows, in columns",
        "0.2 sqrt(max(out, in))": "the size of Adam's steps (Moonlight)",
        "sqrt(max(out, in))": "Megatron's spectral",
        "sqrt(out/in)": "also below 1",
        "sqrt(max(1, in/out))": "out and in exchanged, as for a layout (in, out)",
        "none": "1",
    },
    "scale of": {
        "the step": "the decay has the raw rate",
        "all": "the decay has the scaled rate, too",
    },
    "more dimensions": {
        "flattened": "a matrix of shape[0] rows",
        "scale of the last two": "flattened, out and in the last two sizes (before Muon#60)",
        "scale of the first two": "flattened, out and in the first two sizes",
        "stack": "the last two axes are a matrix, orthogonalised on its own",
    },
    "weight decay": {
        "times lr": "w (1 - lr wd) before the step",
        "without lr": "w (1 - wd)",
        "after the step": "(1 - lr wd) times the new parameter",
        "in the gradient": "g + wd w",
        "opposite sign": "w (1 + lr wd)",
        "ignored": "none",
    },
    **COMMON,
    **MAXIMIZED,
    **STATE,
}
SERIES: dict[str, tuple[Triple, ...]] = {  # one for each step; the last one for those after it
    "Jordan's": (COEFFICIENTS,),
    "cubic": ((1.5, -0.5, 0.0),),
    "quintic": ((1.875, -1.25, 0.375),),
    "of each step": (
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ),
}
COUNTS = {"five": 5, "six": 6, "four": 4}


def step(
    c: dict[str, str], w: Any, g: Any, slots: Slots, h: dict[str, Any], a: Arithmetic
) -> tuple[Any, Slots, Any]:
    """The rule under the choices c."""
    kind, lr, wd, slots = c["weight decay"], h["lr"], h.get("weight_decay", 0), dict(slots)
    size = scale(c, np.shape(w))
    decayed = lr * size if c["scale of"] == "all" else lr
    factors = {"times lr": 1 - decayed * wd, "without lr": 1 - wd, "opposite sign": 1 + lr * wd}
    d, gross = momentum(c, g + wd * w if kind == "in the gradient" else g, slots, h, a)
    o, error, coarse = orthogonal(c, d, gross, a)
    moved = a.note("step", lr * size * o)
    a.change = np.abs(lr * size * error / ULPS) + 0 * np.abs(d)
    if coarse is not None:
        a.slack, a.moved = np.abs(lr * size * coarse) + 0 * np.abs(d), h["sign"] * moved
    new = factors.get(kind, 1) * w - h["sign"] * moved
    new = new * (1 - lr * wd) if kind == "after the step" else new
    return a.note("w", new), slots, largest(w, moved, a.change)


def momentum(
    c: dict[str, str], g: Any, slots: Slots, h: dict[str, Any], a: Arithmetic
) -> tuple[Any, Any]:
    """What is orthogonalised, and the size of its operands; moves the momentum on."""
    mu, old = h["momentum"], slots.get("momentum", g * 0)
    weight = 1 if c["momentum"] == "sum" else 1 - mu
    m = slots["momentum"] = a.note("m", mu * old + weight * g)
    gross = np.abs(mu * old) + np.abs(weight * g)
    m = old if c["momentum"] == "of before" else m
    ahead = h["nesterov"] if c["nesterov"] == "as set" else c["nesterov"] == "always"
    if c["nesterov"] == "bias-corrected":
        power = slots.get("power", mu ** (slots["step"] + 1))
        slots["power"] = power * mu
        now, after = 1 - power, 1 - power * mu
        first = mu * m / after + weight * g / now if h["nesterov"] else m / now
        return a.note("d", first), mu * gross / after + np.abs(weight * g / now)
    if ahead:
        return a.note("d", mu * m + weight * g), mu * gross + np.abs(weight * g)
    return a.note("d", m), gross


def orthogonal(
    c: dict[str, str], d: Any, gross: Any, a: Arithmetic
) -> tuple[Any, float, float | None]:
    """d with singular values near 1; its error in units of the tensor's format; that of an
    iteration in bfloat16, or None."""
    shape = np.shape(d)
    if 0 in shape:
        return d, 0.0, None
    stack = len(shape) > 2 and c["more dimensions"] == "stack"
    rows = (shape[-2] if stack else shape[0]) if len(shape) > 1 else 1
    every = (math.prod(shape[:-2]), *shape[-2:]) if stack else (1, rows, math.prod(shape) // rows)
    parts = zip(np.reshape(d, every), np.reshape(gross, every), strict=True)
    made = [of_matrix(c, matrix, size, a) for matrix, size in parts]
    o = np.stack([np.asarray(x) for x, _, _ in made]).reshape(shape)
    errors, coarse = (max(m[k] for m in made) for k in (1, 2))
    return o, errors, coarse if c["precision"] == "bfloat16" else None


def of_matrix(c: dict[str, str], d: Any, gross: Any, a: Arithmetic) -> tuple[Any, float, float]:
    """The iteration on one matrix, its error in units of the format, and that in bfloat16."""
    series, count = SERIES[c["coefficients"]], COUNTS[c["iterations"]]
    series = (series + (count - len(series)) * series[-1:])[:count]
    plain = np.asarray(d, dtype=float)
    if not np.isfinite(plain).all():
        return d * np.nan, 0.0, 0.0
    size = normaliser(c, d, plain, a)
    x, s = d / size, np.linalg.svd(plain / float(size), compute_uv=False)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    for first, third, fifth in series:
        gram = x @ x.T
        x = first * x + (third * gram + fifth * (gram @ gram)) @ x
    least = a.format.smallest * 2.0 ** (a.format.precision - 1)  # below it errors are not relative
    start = np.linalg.norm(np.asarray(np.where(gross > 0, gross + least, 0) / size, dtype=float))
    given, own = spread((*s.tolist(),), series, 1.0 + math.sqrt(max(x.shape)))
    finer = 2.0 ** (a.format.precision - (53 if a.format.name == "float64" else 24))
    error = math.hypot(3 * given * start, own * finer)
    coarse = 0.0
    if c["precision"] == "bfloat16":
        coarse = BFLOAT16 * math.hypot(*spread((*s.tolist(),), series, 1.0))
    return (x.T if tall else x), error, coarse


def normaliser(c: dict[str, str], d: Any, plain: Any, a: Arithmetic) -> Any:
    """What d is divided by."""
    length = np.sqrt(a.in_range(np.sum(a.in_range(d * d))))
    match c["normaliser"]:
        case "1e-7 at least":
            return np.maximum(length, 1e-7)
        case "1e-8 added":
            return length + 1e-8
        case "spectral":
            return float(np.linalg.norm(plain, 2)) + 1e-7
    return length + 1e-7


def scale(c: dict[str, str], shape: tuple[int, ...]) -> float:
    """The factor of the step, by the clause "scale"."""
    rows = shape[0] if len(shape) > 1 else 1
    sizes: tuple[int, ...] = rows, math.prod(shape) // max(rows, 1)
    if len(shape) > 2 and c["more dimensions"] != "flattened":
        sizes = shape[:2] if c["more dimensions"] == "scale of the first two" else shape[-2:]
    out, inner = (max(n, 1) for n in sizes)
    return {
        "sqrt(max(1, out/in))": math.sqrt(max(1.0, out / inner)),
        "0.2 sqrt(max(out, in))": 0.2 * math.sqrt(max(out, inner)),
        "sqrt(max(out, in))": math.sqrt(max(out, inner)),
        "sqrt(out/in)": math.sqrt(out / inner),
        "sqrt(max(1, in/out))": math.sqrt(max(1.0, inner / out)),
        "none": 1.0,
    }[c["scale"]]


ULPS = 8.0
BFLOAT16 = 2.0**-9  # about the relative error of a rounding to bfloat16, which is 2**-8 at most

CLAMPED = {"normaliser": "1e-7 at least"}
LARGEST = {"scale": "0.2 sqrt(max(out, in))"}
SUM = {"momentum": "sum"}
DIALECTS = (
    Dialect("published", "KellerJordan/Muon 00ba60d, muon.py, with the iteration in the dtype", {}),
    Dialect(
        "PyTorch",
        "torch.optim.Muon, adjust_lr_fn original; pytorch_optimizer 4.1.0, optimizer/muon/muon.py",
        CLAMPED,
        "PyTorch's documentation prints the sum mu B + g, its code has the mean",
    ),
    Dialect(
        "PyTorch, match_rms_adamw",
        "torch.optim.Muon, adjust_lr_fn match_rms_adamw; pytorch_optimizer 4.1.0, use_adjusted_lr",
        {**CLAMPED, **LARGEST},
    ),
    Dialect(
        "timm",
        "timm 1.0.31, optim/muon.py",
        {**CLAMPED, **LARGEST, "coefficients": "of each step"},
        "it has nesterov=False, unlike the others",
    ),
    Dialect("RMS of Adam", "Keller Jordan's rule with the scale of Moonlight", LARGEST),
    Dialect(
        "Moonlight",
        "MoonshotAI/Moonlight abaa96e, examples/toy_train.py; keras 3.15.1, optimizers/muon.py",
        {**SUM, **LARGEST},
    ),
    Dialect(
        "Keras, at first",
        "keras 019d00d, optimizers/muon.py",
        {**SUM, "iterations": "six"},
    ),
    Dialect(
        "optax",
        "optax 2edbcbe, contrib/_muon.py",
        {
            "nesterov": "bias-corrected",
            "normaliser": "1e-8 added",
            "scale": "sqrt(max(1, in/out))",
        },
        "optax reads a matrix as (in, out), as flax stores it",
    ),
    Dialect("spectral", "Megatron-LM, muon scale spectral", {"scale": "sqrt(max(out, in))"}),
    Dialect("square root of the ratio", "Bernstein and Newhouse 2024", {"scale": "sqrt(out/in)"}),
    Dialect(
        "kernels by their last sizes",
        "KellerJordan/Muon before pull request 60",
        {"more dimensions": "scale of the last two"},
    ),
)

# --- what is asked --------------------------------------------------------------------------------

SETTINGS: tuple[Settings, ...] = (
    {"momentum": 0.95, "nesterov": True, "weight_decay": 0.0},
    {"momentum": 0.95, "nesterov": True, "weight_decay": 0.1},
    {"momentum": 0.5, "nesterov": False, "weight_decay": 0.1},
)
OFFERS = ("momentum", "nesterov", "weight_decay")


def edges(f: Format, draw: Drawer) -> Iterator[Draft]:
    """Tall, wide and square matrices, one of rank 1, and gradients about the size of epsilon."""
    for shape in ((7, 2), (2, 7), (4, 4), (12, 3)):
        w, g = draw(f"w{shape}", *shape), draw(f"g{shape}", *shape)
        yield Draft(f"shape {shape}", ("SHAPE",), w, g)
    w, g = draw("w kernel", 6, 1, 2), draw("g kernel", 6, 1, 2)
    yield Draft("three dimensions, more rows than columns", ("KERNEL",), w, g)
    w, state = draw("w", 4, 3), given_velocity(draw, 9, 0.3)
    rank = f.round(np.outer([1.0, -2.0, 0.5, 1.0], [0.5, 1.0, -0.25]))
    yield Draft("gradient of rank 1", ("ORDINARY",), w, rank)
    if f.precision >= 24:
        for size in (2.0**-22, 2.0**-27):
            g = draw("tiny", 4, 3, size=size)
            yield Draft(f"gradient of about {size:.0e}, 4 x 3", ("TINY_GRADIENT",), w, g)
    w, g = draw("w", 2, 3), draw("g", 2, 3)
    for mu in (0.0, 0.999):
        yield Draft(f"momentum {mu}", ("BETA",), w, g, settings={"momentum": mu}, state=state)


def arguments(settings: Settings) -> Settings:
    """Those of optax, which calls the momentum beta."""
    rest = dict(settings)
    return {"beta": rest.pop("momentum"), **rest}


RULE = Rule(
    name="muon",
    added=7,
    page=page,
    clauses=CLAUSES,
    step=step,
    dialects=DIALECTS,
    ulps=ULPS,
    slots=("momentum",),
    remembers=keeps_velocity,
    scales_by_operands=tuple(FORMATS),
    asked=SETTINGS,
    start=given_velocity,
    edges=edges,
    generated=(),
    shaped=True,
    matrices=True,
    group={"use_muon": True},
    optimizers=(
        LibraryOptimizer(
            "torch.optim.Muon", OFFERS, slots={"momentum": "momentum_buffer"}, dimensions=2
        ),
        LibraryOptimizer(
            "optax.contrib.muon", OFFERS, arguments=arguments, slots={"momentum": "mu"},
            dimensions=2, interpreted=True,
        ),
        LibraryOptimizer("keras.optimizers.Muon", slots={"momentum": "momentum"}, dimensions=2),
        LibraryOptimizer("timm.optim.Muon"),
        LibraryOptimizer("pytorch_optimizer.Muon"),
    ),
)  # fmt: skip
