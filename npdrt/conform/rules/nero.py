"""What the referee knows of Nero."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from npdrt.conform.case import Slots
from npdrt.conform.cases import Draft, Drawer
from npdrt.conform.formats import FORMATS, Format
from npdrt.conform.page import (
    ROUND,
    Norms,
    Numbers,
    Rounding,
    divide,
    minus,
    mixed,
    power,
    quotient,
    root,
    row_sum,
)
from npdrt.conform.rules.evaluate import Arithmetic, largest
from npdrt.conform.rules.moments import drift, page_power
from npdrt.conform.rules.rule import (
    COMMON,
    COUNTING,
    NORMS,
    Dialect,
    Generated,
    LibraryOptimizer,
    Rule,
    Settings,
)

# --- the section "nero" of docs/updates.md --------------------------------------------------------


def page(
    w: Numbers, g: Numbers, state: dict[str, Any], lr: float, dtype: str, norms: Norms = None, *,
    shape: tuple[int, ...], beta: float = 0.999,
) -> Numbers:  # fmt: skip
    """The sequence."""
    rows = shape[0] if len(shape) > 1 else None
    fl, n = ROUND[dtype], max(len(w) // (rows or 1), 1) if rows is not None else 1
    s = state.setdefault("scale", page_scale(w, n))
    b = state["beta_power"] = page_power(state, "beta_power", beta)
    q = [row_sum([x * x for x in row]) for row in page_rows(g, n) for _ in row]
    v = mixed(beta, state.get("exp_avg_sq", [0.0] * len(w)), 1.0 - beta, [fl(x) for x in q], fl)
    state["exp_avg_sq"] = v
    below = [1.0 if x == 0.0 else x for x in quotient(v, 1.0 - b, fl)]
    u = [fl(divide(x, fl(root(y)))) for x, y in zip(g, below, strict=True)]
    found: Numbers = []
    for row, step in zip(page_rows(w, n), page_rows(u, n), strict=True):
        size = page_norm(row) if rows is not None else s
        row = minus(row, lr * (size if size > 0 else s), step, fl)
        found += row if rows is None else page_projected(row, fl)
    return found


def page_rows(x: Numbers, n: int) -> list[Numbers]:
    """The rows, of n elements each."""
    return [x[k : k + n] for k in range(0, len(x), n)]


def page_norm(row: Numbers) -> float:
    """`|x|` of a row."""
    return root(row_sum([x * x for x in row]))


def page_scale(w: Numbers, n: int) -> float:
    """`s` before the first step."""
    sizes = [page_norm(row) for row in page_rows(w, n)]
    s = row_sum(sizes) / max(len(sizes), 1)
    return s if s > 0 else 0.01


def page_projected(row: Numbers, fl: Rounding) -> Numbers:
    """The last three lines."""
    mean = fl(row_sum(row) / len(row))
    row = [fl(x - mean) for x in row]
    size = page_norm(row)
    return quotient(row, size if size > 0 else 1.0, fl)


# --- how implementations differ -------------------------------------------------------------------

CLAUSES: dict[str, dict[str, str]] = {
    "mean": {
        "of squares": "beta v + (1 - beta) |g|^2, and its root",
        "of norms": "beta v + (1 - beta) |g|, without a root",
        "of squares, without weight": "beta v + |g|^2, and its root",
    },
    "bias correction": {
        "of the mean": "v / (1 - beta^t)",
        "none": "v",
        "t of before": "t counts from 0, first corrected at the second step",
    },
    "size": {
        "of the neuron": "|w| of each row; the initial mean in 1-d arrays",
        "initial": "the initial mean of |w|, in every array",
        "one": "1",
    },
    "zero size": {
        "0.01": "an initial mean of 0 counts as 0.01",
        "zero": "an initial mean of 0 is 0, so that the array stays",
        "one": "an initial mean of 0 counts as 1",
    },
    "projection": {
        "centred, then normal": "w - mean(w), then w / |w|, row by row",
        "normal": "w / |w|",
        "centred": "w - mean(w)",
        "normal, then centred": "the other way round",
        "none": "w",
    },
    "first parameter": {
        "as given": "the first step starts from it",
        "projected": "the first step starts from its projection",
    },
    "vectors": {
        "each element a neuron": "|g| of each element of a 1-d array",
        "one neuron": "|g| of the whole 1-d array",
    },
    "epsilon": {
        "none": "sqrt(v)",
        "1e-8": "sqrt(v) + 1e-8",
        "1e-8, in the projection too": "sqrt(v) + 1e-8, and |w| + 1e-8",
    },
    "guards": {
        "both divisions": "g / 1 where v is 0; a row of zeros stays",
        "none": "g / 0, of which NaN counts as 0; a row of zeros becomes NaN",
    },
    **COMMON,
    "norm of": {
        "row": "each row (first axis) on its own",
        "tensor": "all elements of the array",
        "column": "each column (last axis) on its own",
    },
    "norm accumulation": {k: NORMS["norm accumulation"][k] for k in ("wide", "dtype")},
    **COUNTING,
}
AT_ZERO = {"0.01": 0.01, "zero": 0.0, "one": 1.0}


def step(
    c: dict[str, str], w: Any, g: Any, slots: Slots, h: dict[str, Any], a: Arithmetic
) -> tuple[Any, Slots, Any]:
    """Algorithm 1 of Liu et al. under the choices c."""
    if not np.size(w):
        return w, slots, w
    matrix, slots = np.ndim(w) > 1, dict(slots)
    first = slots["step"] == 0 and matrix and c["first parameter"] == "projected"
    w = projected(c, w, a)[0] if first else w
    slots["scale"] = s = slots.get("scale", initial(c, w, a))
    d, unsure = direction(c, g, slots, h, a)
    size = a.norm(w) if matrix else s
    k = h["lr"] * a.note("size", sized(c, size, s))
    x = a.note("w - k u", w - h["sign"] * k * d)
    new, carry = projected(c, x, a) if matrix else (x, np.abs)
    a.note("w", new)
    change = np.abs(k * d) * condition(slots, a)
    scale = largest(carry(np.abs(w) + change), new)
    a.change, a.slack = scale, carry(np.abs(k * d) * unsure)
    return new, slots, scale


def direction(
    c: dict[str, str], g: Any, slots: Slots, h: dict[str, Any], a: Arithmetic
) -> tuple[Any, Any]:
    """g / sqrt(v_hat), and its relative error that a rounded beta explains; moves `slots` on."""
    beta, old = h["beta"], slots.get("exp_avg_sq", g * 0)
    ng = a.note("|g|", norm(c, g, a))
    new = ng if c["mean"] == "of norms" else ng * ng
    v = beta * old + (new if c["mean"] == "of squares, without weight" else (1 - beta) * new)
    slots["exp_avg_sq"] = v = a.note("v", v)
    before = slots.get("beta_power", a.real(1.0))
    slots["beta_power"] = before * beta
    others = {"none": beta * 0, "t of before": before if slots["step"] else beta * 0}
    b: Any = others.get(c["bias correction"], slots["beta_power"])
    v_hat = v / (1 - b)
    root = v_hat if c["mean"] == "of norms" else np.sqrt(v_hat)
    unguarded, epsilon = c["guards"] == "none", 0 if c["epsilon"] == "none" else 1e-8
    below = np.where((v_hat == 0) & ~unguarded & (epsilon == 0), 1, root) + epsilon
    u = np.where(unguarded & (g == 0), g, g / below)
    slots["drift"] = drift(slots.get("drift", v * 0), old, beta, a)
    return a.note("u", u), slots["drift"] / np.where(v > 0, v, v * 0 + 1)


def norm(c: dict[str, str], x: Any, a: Arithmetic) -> Any:
    """|x| of every neuron."""
    each = np.ndim(x) < 2 and c["vectors"] == "each element a neuron"
    return np.abs(x) if each else a.norm(x)


def initial(c: dict[str, str], w: Any, a: Arithmetic) -> Any:
    """The scale of an array: the mean size of its neurons before the first step."""
    sizes = np.abs(w) if np.ndim(w) < 2 else a.norm(w)
    s = np.sum(sizes) / max(np.size(sizes), 1)
    known = s != 0 if c["guards"] == "none" else s > 0  # NaN is known
    return np.where(known, s, a.real(AT_ZERO[c["zero size"]]))[()]


def sized(c: dict[str, str], size: Any, s: Any) -> Any:
    """The size that a step is relative to, by the clause "size"."""
    if c["size"] == "one":
        return s * 0 + 1
    return s if c["size"] == "initial" else np.where(size > 0, size, s)


def projected(c: dict[str, str], x: Any, a: Arithmetic) -> tuple[Any, Any]:
    """The rows of a matrix by the clause "projection"; and what it makes of errors of x."""
    kind, axes = c["projection"], tuple(range(1, np.ndim(x)))
    n = max(np.size(x) // max(np.shape(x)[0], 1), 1)

    def mean(y: Any) -> Any:
        return np.sum(y, axis=axes, keepdims=True) / n

    def length(y: Any) -> Any:
        found = np.sqrt(a.in_range(n * mean(a.in_range(y * y))))
        found = found + (1e-8 if c["epsilon"].endswith("too") else 0)
        return found if c["guards"] == "none" else np.where(found > 0, found, found * 0 + 1)

    centres, last = "centred" in kind, kind == "normal, then centred"
    y = x - mean(x) if centres and not last else x
    size = length(y) if "normal" in kind else 1
    new = y / size
    new = new - mean(new) if last else new

    def carry(e: Any) -> Any:
        e = e / size + (mean(e) / size if centres else 0)
        return e + np.abs(new) * n * mean(np.abs(new) * e) if "normal" in kind else e

    return new, carry


def condition(slots: Slots, a: Arithmetic) -> float:
    """The error of a step over that of its roundings, as `amplification` of Adam's moments."""
    p = min(float(slots["beta_power"]), 1 - 2.0**-a.format.precision)
    return 1.0 + (p / (1 - p) if a.format.name == "float64" else 0.0)


AUTHORS = "jxbz/nero 2122665, nero.py"
DIALECTS = (
    Dialect("published", "Liu et al. 2021, Algorithm 1, with the bias correction of its code", {}),
    Dialect(
        "jxbz/nero",
        AUTHORS,
        {"first parameter": "projected", "size": "initial", "guards": "none"},
        "it projects the parameters when it is made",
    ),
    Dialect(
        "constraints=False",
        f"{AUTHORS}, constraints=False",
        {"projection": "none", "size": "initial", "guards": "none"},
    ),
    Dialect(
        "kozistr",
        "pytorch_optimizer 4.1.0, optimizer/nero.py",
        {
            "first parameter": "projected",
            "size": "initial",
            "epsilon": "1e-8, in the projection too",
        },
    ),
)

# --- what is asked --------------------------------------------------------------------------------

SETTINGS: tuple[Settings, ...] = ({"beta": 0.999}, {"beta": 0.5})


def edges(f: Format, draw: Drawer) -> Iterator[Draft]:
    """Betas at their ends, rows of unlike size, and rows that are zero or have one number."""
    w, g, zero = draw("w", 2, 3), draw("g", 2, 3), np.zeros((2, 3))
    for beta in (0.0, 0.9999999):
        draft = Draft(f"beta {beta}", ("BETA",), w, g, settings={"beta": beta})
        yield draft
        yield replace(draft, state=start(draw, 9, 0.3), comment=f"{draft.comment}, from a state")
    yield Draft("gradient zero, from a state", ("ZERO_GRADIENT",), w, zero,
                state=start(draw, 9, 0.3))  # fmt: skip
    rows = np.array([[1.0], [0.0]])
    yield Draft("a row of zeros", ("ZERO_PARAMETER",), w * rows, g)
    yield Draft("a gradient for one row", ("ZERO_GRADIENT",), w, g * rows)
    yield Draft("a row far from zero", ("CANCELLATION",), w + 64 * rows, g)
    yield Draft("a vector", ("ORDINARY",), draw("w", 6), draw("g", 6), state=vector(draw))
    state = start(draw, 3, 0.3)
    state["exp_avg_sq"][0] = np.nan
    yield Draft("NaN in a state", ("NAN",), w, g, state=state, result="acceptable")


def start(draw: Drawer, step: int, size: float) -> Slots:
    """The mean squares after `step` updates, one number a row, and a scale."""
    v = np.repeat(draw("v", 2, 1, size=size), 3, axis=1)
    return {"exp_avg_sq": draw.number.round(v * v), "scale": 0.5, "step": step}


def vector(draw: Drawer) -> Slots:
    """The state of six neurons of one element."""
    v = draw("v", 6, size=0.5)
    return {"exp_avg_sq": draw.number.round(v * v), "scale": 0.5, "step": 9}


def powers(step: int, settings: Mapping[str, Any]) -> Slots:
    """The power of beta after `step` updates."""
    return {"beta_power": power(settings["beta"], step)}


RULE = Rule(
    name="nero",
    added=6,
    page=page,
    shaped=True,
    clauses=CLAUSES,
    step=step,
    dialects=DIALECTS,
    ulps=16.0,
    slots=("exp_avg_sq",),
    remembers=lambda settings: "a mean square",
    scales_by_operands=tuple(FORMATS),
    asked=SETTINGS,
    start=start,
    scalars=powers,
    edges=edges,
    generated=(Generated(SETTINGS[0]),),
    optimizers=(LibraryOptimizer("pytorch_optimizer.Nero"),),
)
