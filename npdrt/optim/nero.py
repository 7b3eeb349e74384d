"""Nero: neuronal rotator (Liu, Bernstein, Meister and Yue 2021, Algorithm 1)."""

from __future__ import annotations

import math
from functools import partial
from typing import Annotated

from npdrt.arrays import Array, cast, label, namespace
from npdrt.optim.optimizer import Slots
from npdrt.optim.rule import Formula, rule
from npdrt.optim.setting import Setting, below_one
from npdrt.sums import fold

SMALLEST = 0.01  # the scale of an array of zeros


@rule(slots={"exp_avg_sq": "the mean square v of the neuron's gradient", "scale": "the size s"})
def nero(
    *,
    lr: float = 0.01,
    beta: Annotated[float, Setting("share of the mean square that is kept", below_one)] = 0.999,
) -> Formula:
    """Every neuron turns by about `lr`; t counts from 1.

        v <- beta * v + (1 - beta) * |g|**2
        w <- w - lr * |w| * g / sqrt(v / (1 - beta**t))
        w <- w - mean(w)
        w <- w / |w|

    A neuron is a row (first axis) of an array of two or more dimensions, and |.| the 2-norm of the
    row. In an array of fewer dimensions every element is a neuron of its own; the array's scale s,
    the mean of |w| before the first step, takes the place of |w|, and the last two lines are left
    out. Slots: "exp_avg_sq" (v), from zero, the same for every element of a row; "scale" (s), 0-d
    float64, 0.01 unless it is > 0. The state keeps beta**t as "beta_power".

    A row whose norm is not > 0 takes s for |w|, and is not divided by its norm; so a row of one
    element is 0 after a step. Where v is 0, g is divided by 1. A NaN or inf in a gradient makes its
    row NaN, and leaves the others.

    `init` does not change parameters. The first step takes them as they are, and they have mean 0
    and norm 1 after it; the authors' code makes them so before. Call `projected` for that.

    Source: Liu et al. 2021, Algorithm 1, which has s for biases alone and no bias correction. That,
    s as a mean, and its 0.01 follow the authors' code.
    """
    return Formula(partial(update, beta=beta), slots, {"beta_power": beta})


def slots(w: Array) -> Slots:
    """The mean squares, zero before the first update, and the scale of the array."""
    xp, norms = namespace(w), row_norms(neurons(w))
    s = xp.reshape(fold(xp.reshape(norms, (1, -1)), 1), ()) / max(norms.shape[0], 1)
    return {"exp_avg_sq": xp.zeros_like(w), "scale": xp.where(s > 0, s, SMALLEST)}


def update(
    w: Array, g: Array, slots: Slots, shared: Slots, lr: Array, *, beta: float
) -> tuple[Array, Slots]:
    """Algorithm 1 of Liu et al., one array."""
    xp, x, y, s = namespace(w), neurons(w), neurons(g), slots["scale"]
    v = beta * neurons(slots["exp_avg_sq"]) + (1.0 - beta) * cast(row_squares(y), w)
    v_hat = label(v / cast(1.0 - shared["beta_power"], w), "v_hat")
    u = label(y / xp.sqrt(xp.where(v_hat == 0, 1.0, v_hat)), "u")
    size = known(row_norms(x), s) if w.ndim > 1 else s
    x = x - cast(label(lr * size, "k"), w) * u
    x = projected(x) if w.ndim > 1 else x
    return xp.reshape(x, w.shape), {"exp_avg_sq": xp.reshape(v, w.shape), "scale": s}


def projected(w: Array) -> Array:
    """Every row of an array of two or more dimensions with mean 0 and norm 1; of its shape."""
    x = neurons(w)
    x = x - cast(fold(wide(x), 1) / max(x.shape[1], 1), w)
    return namespace(w).reshape(x / cast(known(row_norms(x), 1.0), w), w.shape)


def known(norms: Array, otherwise: Array) -> Array:
    """The norms that are > 0, and `otherwise` for the others."""
    return namespace(norms).where(norms > 0, norms, otherwise)


# --- rows ---------------------------------------------------------------------------------------


def neurons(x: Array) -> Array:
    """A row for every neuron, (neurons, elements of one)."""
    rows = x.shape[0] if x.ndim > 1 else math.prod(x.shape)
    return namespace(x).reshape(x, (rows, math.prod(x.shape[1:]) if x.ndim > 1 else 1))


def wide(x: Array) -> Array:
    """x as float64."""
    xp = namespace(x)
    return xp.asarray(x, dtype=xp.float64)


def row_norms(x: Array) -> Array:
    """The 2-norm of every row, (rows, 1), float64."""
    return namespace(x).sqrt(row_squares(x))


def row_squares(x: Array) -> Array:
    """The sum of the squares of every row, (rows, 1), float64."""
    x = wide(x)
    return fold(x * x, 1)
