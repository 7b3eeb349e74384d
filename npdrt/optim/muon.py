"""Muon: momentum, orthogonalised by Newton-Schulz steps (Jordan et al. 2024)."""

from __future__ import annotations

import math
from functools import partial
from typing import Annotated

from npdrt.arrays import Array, cast, label, namespace
from npdrt.exact import matmul
from npdrt.optim.norm import norm
from npdrt.optim.optimizer import Slots
from npdrt.optim.rule import Formula, rule
from npdrt.optim.setting import Decoupled, Setting, below_one, flag

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 5
EPSILON = 1e-7


@rule(slots={"momentum": "the mean gradient m"}, layerwise=True)
def muon(
    *,
    lr: float = 0.02,
    momentum: Annotated[
        float, Setting("share of the mean gradient that is kept", below_one)
    ] = 0.95,
    nesterov: Annotated[bool, Setting("Nesterov's form", flag, needs="momentum")] = True,
    weight_decay: Decoupled = 0.0,
) -> Formula:
    """The step of a matrix is its momentum with all singular values near 1.

        m <- momentum * m + (1 - momentum) * g
        d = momentum * m + (1 - momentum) * g, or m without nesterov
        X = d / (|d| + 1e-7), then five times
            A = X X^T;  X <- 3.4445 X + (-4.7750 A + 2.0315 A A) X
        w <- w * (1 - lr * weight_decay)
        w <- w - lr * sqrt(max(1, rows / columns)) * X

    A singular value s of d / |d| becomes q(q(q(q(q(s))))) with q(s) = 3.4445 s - 4.775 s^3 +
    2.0315 s^5: between 0.68 and 1.21 for s >= 0.003, and 485 s for small s. The iteration runs in
    float32, or float64 for a float64 parameter, with the products of `npdrt.exact`, and X is
    rounded to the dtype of w at its end. It runs on the transpose of X if that has fewer rows.

    More than two dimensions: a matrix of w.shape[0] rows. Fewer: a matrix of one row, so that the
    step is the momentum over its 2-norm, times 0.696. Most users give such parameters, and the
    first and last layer, to Adam: `--optimizer muon --group '*/bias:rule=adam,lr=0.001'`.

    Slot: "momentum" (m), from zero. A NaN or inf in d makes all of w NaN. A zero gradient from
    zero leaves the decay. In float64, |d| overflows above 1e154, and w only decays.

    Source: Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks", and its
    code, KellerJordan/Muon 00ba60d, which runs the iteration in bfloat16.
    """
    step = partial(update, momentum=momentum, nesterov=nesterov, decay=weight_decay)
    return Formula(step, slots)


def slots(w: Array) -> Slots:
    """The mean gradient, zero before the first update."""
    return {"momentum": namespace(w).zeros_like(w)}


def update(
    w: Array,
    g: Array,
    slots: Slots,
    shared: Slots,
    lr: Array,
    *,
    momentum: float,
    nesterov: bool,
    decay: float,
) -> tuple[Array, Slots]:
    """One array."""
    rows, columns = sides(tuple(w.shape))
    m = momentum * slots["momentum"] + (1.0 - momentum) * g
    d = momentum * m + (1.0 - momentum) * g if nesterov else m
    w = w * cast(1.0 - lr * decay, w) if decay else w
    if 0 in w.shape:
        return w - d, {"momentum": m}
    size = label(lr * math.sqrt(max(1.0, rows / columns)), "size")
    return w - cast(size, w) * orthogonalised(d), {"momentum": m}


def sides(shape: tuple[int, ...]) -> tuple[int, int]:
    """The rows and columns of the matrix that an array is to Muon."""
    rows = shape[0] if len(shape) > 1 else 1
    return rows, math.prod(shape) // max(rows, 1)


def orthogonalised(d: Array) -> Array:
    """d, read as a matrix, with singular values near 1: five Newton-Schulz steps."""
    xp, (rows, columns), (a, b, c) = namespace(d), sides(tuple(d.shape)), COEFFICIENTS
    turn = xp.matrix_transpose if rows > columns else lambda x: x
    x = xp.astype(turn(xp.reshape(d, (rows, columns))), iterated(d))
    x = x / cast(norm(d) + EPSILON, x)
    for _ in range(STEPS):
        gram = matmul(x, xp.matrix_transpose(x))
        x = a * x + matmul(b * gram + c * matmul(gram, gram), x)
    return label(xp.reshape(xp.astype(turn(x), d.dtype), d.shape), "orthogonalised")


def iterated(d: Array) -> Array:
    """The dtype of the iteration."""
    xp = namespace(d)
    return xp.float64 if d.dtype == xp.float64 else xp.float32
