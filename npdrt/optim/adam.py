"""Adam (Kingma and Ba 2015, Algorithm 1), with decoupled weight decay as an option."""

from __future__ import annotations

from functools import partial
from typing import Annotated

from npdrt.arrays import Array, cast, label, namespace
from npdrt.optim.optimizer import Slots
from npdrt.optim.rule import Formula, rule
from npdrt.optim.setting import Betas, Setting, WeightDecay, at_least_zero, flag


@rule(slots={"exp_avg": "the first moment m", "exp_avg_sq": "the second moment v"})
def adam(
    *,
    lr: float = 1e-3,
    betas: Betas = (0.9, 0.999),
    eps: Annotated[float, Setting("added to the root", at_least_zero)] = 1e-8,
    weight_decay: WeightDecay = 0.0,
    decoupled: Annotated[bool, Setting("decay as in AdamW", flag, needs="weight_decay")] = False,
) -> Formula:
    """Adam with bias correction; t counts from 1.

        m <- beta1 * m + (1 - beta1) * g
        v <- beta2 * v + (1 - beta2) * g**2
        w <- w - lr * (m / (1 - beta1**t)) / (sqrt(v / (1 - beta2**t)) + eps)

    weight_decay adds weight_decay * w to g; with decoupled=True it multiplies w by
    1 - lr * weight_decay before the step instead (AdamW, Loshchilov and Hutter 2019). Slots:
    "exp_avg" (m), "exp_avg_sq" (v), from zero. The state keeps beta1**t and beta2**t as
    "beta1_power" and "beta2_power", one float64 product a step, since a power function's last
    bit is not the same everywhere. A NaN or inf stays in its element.

    Source: Kingma and Ba 2015, Algorithm 1; eps is added to the corrected root, not the
    "epsilon-hat" form at the end of their section 2.
    """
    beta1, beta2 = betas
    step = partial(update, beta1=beta1, beta2=beta2, eps=eps, decay=weight_decay)
    powers = {"beta1_power": beta1, "beta2_power": beta2}
    return Formula(partial(step, decoupled=decoupled), slots, powers)


def slots(w: Array) -> Slots:
    """The first and second moments, zero before the first update."""
    xp = namespace(w)
    return {"exp_avg": xp.zeros_like(w), "exp_avg_sq": xp.zeros_like(w)}


def update(
    w: Array,
    g: Array,
    slots: Slots,
    shared: Slots,
    lr: Array,
    *,
    beta1: float,
    beta2: float,
    eps: float,
    decay: float,
    decoupled: bool,
) -> tuple[Array, Slots]:
    """Algorithm 1 of Kingma and Ba, one array."""
    if decay and decoupled:
        w = w * cast(1.0 - lr * decay, w)
    elif decay:
        g = g + decay * w
    m_hat, v_hat, slots = corrected(g, slots, shared, beta1, beta2)
    xp = namespace(w)
    w = w - cast(lr, w) * m_hat / (xp.sqrt(v_hat) + eps)
    return w, slots


def corrected(
    g: Array, slots: Slots, shared: Slots, beta1: float, beta2: float
) -> tuple[Array, Array, Slots]:
    """m / (1 - beta1**t), v / (1 - beta2**t) and the slots m and v, after the gradient g."""
    m = beta1 * slots["exp_avg"] + (1.0 - beta1) * g
    v = beta2 * slots["exp_avg_sq"] + (1.0 - beta2) * (g * g)
    m_hat = label(m / cast(1.0 - shared["beta1_power"], g), "m_hat")
    v_hat = label(v / cast(1.0 - shared["beta2_power"], g), "v_hat")
    return m_hat, v_hat, {"exp_avg": m, "exp_avg_sq": v}
