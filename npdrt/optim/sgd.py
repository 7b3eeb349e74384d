"""Stochastic gradient descent with momentum and weight decay."""

from __future__ import annotations

from functools import partial
from typing import Annotated

from npdrt.arrays import Array, cast, namespace, scalar
from npdrt.errors import Error
from npdrt.optim.optimizer import Slots
from npdrt.optim.rule import Formula, rule
from npdrt.optim.setting import Setting, WeightDecay, at_least_zero, flag


@rule(default_rate=0.1, slots={"momentum": "the velocity v"})
def sgd(
    *,
    lr: float,
    momentum: Annotated[float, Setting("share of the velocity that is kept", at_least_zero)] = 0.0,
    dampening: Annotated[
        float, Setting("share of the gradient that is left out", at_least_zero, needs="momentum")
    ] = 0.0,
    nesterov: Annotated[bool, Setting("Nesterov's form", flag, needs="momentum")] = False,
    weight_decay: WeightDecay = 0.0,
) -> Formula:
    """SGD with the learning rate outside the velocity, as PyTorch has it.

        d = g + weight_decay * w
        v <- momentum * v + (1 - dampening) * d, and v <- d at the first step
        w <- w - lr * d' with d' = d (no momentum), v, or d + momentum * v (Nesterov)

    Slot: "momentum", v, only where momentum > 0. A NaN or inf stays in its element.

    Source: Sutskever et al. 2013 for the momentum forms, with PyTorch's placement of lr and
    dampening.
    """
    if nesterov and not (momentum > 0 and dampening == 0):
        raise Error(
            "nesterov needs momentum > 0 and dampening = 0; "
            f"got momentum = {momentum}, dampening = {dampening}"
        )
    if momentum == 0:
        return Formula(partial(plain_update, decay=weight_decay))
    heavy = partial(update, momentum=momentum, dampening=dampening, nesterov=nesterov)
    return Formula(partial(heavy, decay=weight_decay), slots)


def slots(w: Array) -> Slots:
    """The velocity v, zero before the first update."""
    return {"momentum": namespace(w).zeros_like(w)}


def plain_update(
    w: Array, g: Array, slots: Slots, shared: Slots, lr: Array, *, decay: float
) -> tuple[Array, Slots]:
    """w <- w - lr (g + wd w), one array."""
    d = g + decay * w if decay else g
    return w - cast(lr, w) * d, slots


def update(
    w: Array,
    g: Array,
    slots: Slots,
    shared: Slots,
    lr: Array,
    *,
    momentum: float,
    dampening: float,
    nesterov: bool,
    decay: float,
) -> tuple[Array, Slots]:
    """v <- momentum v + (1 - dampening) d;  w <- w - lr v (or d + momentum v), one array."""
    xp = namespace(w)
    d = g + decay * w if decay else g
    keep = xp.where(shared["step"] == 0, scalar(1.0, w), scalar(1.0 - dampening, w))
    v = momentum * slots["momentum"] + cast(keep, w) * d
    return w - cast(lr, w) * (d + momentum * v if nesterov else v), {"momentum": v}
