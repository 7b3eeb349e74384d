"""Stochastic gradient descent with momentum and weight decay."""

from __future__ import annotations

from functools import partial

from npdrt.arrays import Array, cast, namespace, scalar
from npdrt.errors import Error
from npdrt.optim.optimizer import Optimizer, Slots, at_least_zero, no_slots


def sgd(
    *,
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
) -> Optimizer:
    """SGD with the learning rate outside the velocity, as PyTorch has it.

        d = g + weight_decay * w
        v <- momentum * v + (1 - dampening) * d, and v <- d at the first step
        w <- w - lr * d' with d' = d (no momentum), v, or d + momentum * v (Nesterov)

    Slot: "momentum", v, only where momentum > 0. A NaN or inf stays in its element.

    Source: Sutskever et al. 2013 for the momentum forms, with PyTorch's placement of lr and
    dampening.
    """
    settings = {
        "lr": at_least_zero("lr", lr),
        "momentum": (momentum := at_least_zero("momentum", momentum)),
        "dampening": (dampening := at_least_zero("dampening", dampening)),
        "nesterov": nesterov,
        "weight_decay": (decay := at_least_zero("weight_decay", weight_decay)),
    }
    if nesterov and not (momentum > 0 and dampening == 0):
        raise Error("nesterov needs momentum > 0 and dampening = 0")
    if momentum == 0:
        return Optimizer("sgd", settings, partial(plain_update, decay=decay), no_slots)
    rule = partial(update, momentum=momentum, dampening=dampening, nesterov=nesterov, decay=decay)
    return Optimizer("sgd", settings, rule, slots)


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
