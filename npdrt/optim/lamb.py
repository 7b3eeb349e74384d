"""LAMB: layerwise adaptive moments (You et al. 2020, Algorithm 2)."""

from __future__ import annotations

from functools import partial
from typing import Annotated

from npdrt.arrays import Array, cast, label, namespace
from npdrt.optim.adam import corrected, slots
from npdrt.optim.norm import norm
from npdrt.optim.optimizer import Slots, representable
from npdrt.optim.rule import Formula, rule
from npdrt.optim.setting import Betas, Setting, at_least_zero


@rule(slots={"exp_avg": "the first moment m", "exp_avg_sq": "the second moment v"}, layerwise=True)
def lamb(
    *,
    lr: float = 1e-3,
    betas: Betas = (0.9, 0.999),
    eps: Annotated[float, Setting("added to the root", at_least_zero)] = 1e-6,
    weight_decay: Annotated[
        float, Setting("multiple of the weights that is added to the direction", at_least_zero)
    ] = 0.0,
) -> Formula:
    """Adam's direction with weight decay, made `lr` times as long as the array; t counts from 1.

        m <- beta1 * m + (1 - beta1) * g
        v <- beta2 * v + (1 - beta2) * g**2
        u = (m / (1 - beta1**t)) / (sqrt(v / (1 - beta2**t)) + eps) + weight_decay * w
        w <- w - lr * |w| / |u| * u

    |.| is the 2-norm of the whole array (`npdrt.optim.norm`). Every array is a layer; none is
    skipped. Slots and state are those of `adam`. If |w| or |u| is not > 0 (zero or NaN), or
    lr * |w| / |u| overflows the dtype of w, the step is w <- w - lr * u, as most implementations
    have it; the paper does not define these cases. A NaN stays in its element, and the others take
    that step.

    Source: You et al. 2020, Algorithm 2, with the identity for phi. The betas and eps are those of
    its runs of BERT, which have weight_decay 0.01; optax has these defaults too.
    """
    beta1, beta2 = betas
    step = partial(update, beta1=beta1, beta2=beta2, eps=eps, decay=weight_decay)
    return Formula(step, slots, {"beta1_power": beta1, "beta2_power": beta2})


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
) -> tuple[Array, Slots]:
    """w <- w - lr |w| / |u| u, one array."""
    m_hat, v_hat, slots = corrected(g, slots, shared, beta1, beta2)
    xp = namespace(w)
    u = m_hat / (xp.sqrt(v_hat) + eps)
    u = label(u + decay * w if decay else u, "u")
    k = label(representable(lr * trust_ratio(w, u), w, lr), "k")
    return w - cast(k, w) * u, slots


def trust_ratio(w: Array, u: Array) -> Array:
    """|w| / |u|, or 1 where either norm is not > 0; 0-d float64."""
    xp, w_norm, u_norm = namespace(w, u), norm(w), norm(u)
    usable = label((w_norm > 0) & (u_norm > 0), "usable")
    return label(xp.where(usable, w_norm / xp.where(usable, u_norm, 1.0), 1.0), "r")
