"""RMSprop (Tieleman and Hinton 2012) as PyTorch has it, with centering and momentum as options."""

from __future__ import annotations

from functools import partial
from typing import Annotated

from npdrt.arrays import Array, cast, label, namespace
from npdrt.optim.optimizer import Slots
from npdrt.optim.rule import Formula, rule
from npdrt.optim.setting import Setting, WeightDecay, at_least_zero, below_one, flag


@rule(
    slots={
        "square_avg": "the mean of squares v",
        "grad_avg": "the mean gradient m",
        "momentum": "the velocity b",
    }
)
def rmsprop(
    *,
    lr: float = 0.01,
    alpha: Annotated[float, Setting("share of the mean of squares that is kept", below_one)] = 0.99,
    eps: Annotated[float, Setting("added to the root", at_least_zero)] = 1e-8,
    momentum: Annotated[float, Setting("share of the velocity that is kept", at_least_zero)] = 0.0,
    centered: Annotated[bool, Setting("divide by the deviation from the mean", flag)] = False,
    weight_decay: WeightDecay = 0.0,
) -> Formula:
    """RMSprop with epsilon outside the root and the learning rate outside the velocity.

        d = g + weight_decay * w
        v <- alpha * v + (1 - alpha) * d**2
        m <- alpha * m + (1 - alpha) * d                (centered)
        u = d / (sqrt(v) + eps), or d / (sqrt(v - m**2) + eps) if centered
        b <- momentum * b + u
        w <- w - lr * b, or w - lr * u without momentum

    Slots: "square_avg" (v), "grad_avg" (m) only if centered, "momentum" (b) only where
    momentum > 0; all from zero. There is no bias correction: the first step is
    lr / sqrt(1 - alpha), 10 lr with the defaults, in every element whose gradient is well above
    eps. If v is 0, a zero gradient leaves w as it is, and makes it NaN (0 / 0) if eps is 0. If
    the gradient of an element hardly changes for 1 / (1 - alpha) steps, v - m**2 is near zero,
    and rounding may make it negative: the element becomes NaN, as in PyTorch. A NaN stays in its
    element, and an infinite gradient makes it NaN.

    Source: Tieleman and Hinton 2012, lecture 6e, which has neither eps nor momentum; the place of
    both, the centered form (Graves 2013) and the defaults are those of torch.optim.RMSprop.
    """
    step = partial(update, alpha=alpha, eps=eps, momentum=momentum, centered=centered)
    names = ["square_avg", *["grad_avg"] * centered, *["momentum"] * (momentum > 0)]
    return Formula(partial(step, decay=weight_decay), partial(slots, names=names))


def slots(w: Array, *, names: list[str]) -> Slots:
    """The slots of these names, zero before the first update."""
    return {name: namespace(w).zeros_like(w) for name in names}


def update(
    w: Array,
    g: Array,
    slots: Slots,
    shared: Slots,
    lr: Array,
    *,
    alpha: float,
    eps: float,
    momentum: float,
    centered: bool,
    decay: float,
) -> tuple[Array, Slots]:
    """The step of torch.optim.RMSprop, one array."""
    d = g + decay * w if decay else g
    v = alpha * slots["square_avg"] + (1.0 - alpha) * (d * d)
    new, variance = {"square_avg": v}, v
    if centered:
        m = new["grad_avg"] = alpha * slots["grad_avg"] + (1.0 - alpha) * d
        variance = label(v - m * m, "variance")
    u = label(d / (namespace(w).sqrt(variance) + eps), "u")
    if momentum:
        u = new["momentum"] = momentum * slots["momentum"] + u
    return w - cast(lr, w) * u, new
