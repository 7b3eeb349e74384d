"""AdamW: Adam with decoupled weight decay (Loshchilov and Hutter 2019)."""

from __future__ import annotations

from functools import partial
from typing import Annotated

from npdrt.optim.adam import slots, update
from npdrt.optim.rule import Formula, rule
from npdrt.optim.setting import Betas, Decoupled, Setting, at_least_zero


@rule(slots={"exp_avg": "the first moment m", "exp_avg_sq": "the second moment v"})
def adamw(
    *,
    lr: float = 1e-3,
    betas: Betas = (0.9, 0.999),
    eps: Annotated[float, Setting("added to the root", at_least_zero)] = 1e-8,
    weight_decay: Decoupled = 0.01,
) -> Formula:
    """Adam whose weight decay is not part of the gradient; t counts from 1.

        m <- beta1 * m + (1 - beta1) * g
        v <- beta2 * v + (1 - beta2) * g**2
        w <- w * (1 - lr * weight_decay)
        w <- w - lr * (m / (1 - beta1**t)) / (sqrt(v / (1 - beta2**t)) + eps)

    The bits are those of `adam` with decoupled=True; slots, state, NaN and zero gradients too. A
    zero gradient leaves the decay, and so shrinks w.

    Source: Loshchilov and Hutter 2019, Algorithm 2. There lr is a schedule times a constant, and
    the decay is multiplied by the schedule alone; that it is multiplied by lr, before the step, is
    the form of torch.optim.AdamW, whose defaults these are.
    """
    step = partial(update, beta1=betas[0], beta2=betas[1], eps=eps, decay=weight_decay)
    powers = {"beta1_power": betas[0], "beta2_power": betas[1]}
    return Formula(partial(step, decoupled=True), slots, powers)
