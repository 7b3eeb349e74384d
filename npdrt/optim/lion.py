"""Lion: the sign of an interpolated momentum (Chen et al. 2023, Algorithm 2)."""

from __future__ import annotations

from functools import partial
from typing import Annotated

from npdrt.arrays import Array, cast, label, namespace
from npdrt.optim.optimizer import Slots
from npdrt.optim.rule import Formula, rule
from npdrt.optim.setting import Decoupled, Setting, below_one_each


@rule(slots={"exp_avg": "the momentum m"})
def lion(
    *,
    lr: float = 1e-4,
    betas: Annotated[
        tuple[float, float],
        Setting("shares of the momentum in the step, and that are kept", below_one_each),
    ] = (0.9, 0.99),
    weight_decay: Decoupled = 0.0,
) -> Formula:
    """Every element moves by `lr`, in the direction of a sign.

        w <- w * (1 - lr * weight_decay)
        w <- w - lr * sign(beta1 * m + (1 - beta1) * g)
        m <- beta2 * m + (1 - beta2) * g

    Slot: "exp_avg" (m), from zero. The sign of zero is 0: an element whose gradients have all been
    0 only decays. The sign of a NaN is NaN, and it stays in its element; an infinite gradient moves
    w by lr, and once m is infinite a gradient of the other infinity makes it NaN.

    Source: Chen et al. 2023, Algorithm 2, with its defaults; it adds weight_decay * w to the sign,
    which is the same but for rounding.
    """
    beta1, beta2 = betas
    return Formula(partial(update, beta1=beta1, beta2=beta2, decay=weight_decay), slots)


def slots(w: Array) -> Slots:
    """The momentum, zero before the first update."""
    return {"exp_avg": namespace(w).zeros_like(w)}


def update(
    w: Array,
    g: Array,
    slots: Slots,
    shared: Slots,
    lr: Array,
    *,
    beta1: float,
    beta2: float,
    decay: float,
) -> tuple[Array, Slots]:
    """Algorithm 2 of Chen et al., one array."""
    m = slots["exp_avg"]
    u = label(namespace(w).sign(beta1 * m + (1.0 - beta1) * g), "u")
    w = w * cast(1.0 - lr * decay, w) if decay else w
    return w - cast(lr, w) * u, {"exp_avg": beta2 * m + (1.0 - beta2) * g}
