"""LARS: layerwise adaptive rate scaling (You, Gitman and Ginsburg 2017)."""

from __future__ import annotations

from functools import partial

from npdrt.arrays import Array, cast, label, namespace
from npdrt.optim.norm import norm
from npdrt.optim.optimizer import Optimizer, Slots, at_least_zero, representable


def lars(
    *,
    lr: float,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    trust_coefficient: float = 1e-3,
    eps: float = 0.0,
) -> Optimizer:
    """LARS with momentum; tc is the trust coefficient, wd the weight decay.

        r = tc * |w| / (|g| + wd * |w| + eps), and 1 where |w| or |g| is 0
        v <- momentum * v + lr * r * (g + wd * w)
        w <- w - v

    |.| is the 2-norm of the whole array (`npdrt.optim.norm`). Slot: "momentum", v, from zero.
    Every array is a layer; none is skipped. With r = 1 a zero array takes a step without the
    trust coefficient, as most implementations do; the paper does not define the case. A NaN
    norm counts as not > 0, so its elements alone become NaN.

    Source: You et al. 2017, Algorithm 1.
    """
    settings = {
        "lr": at_least_zero("lr", lr),
        "momentum": (momentum := at_least_zero("momentum", momentum)),
        "weight_decay": (decay := at_least_zero("weight_decay", weight_decay)),
        "trust_coefficient": (trust := at_least_zero("trust_coefficient", trust_coefficient)),
        "eps": (eps := at_least_zero("eps", eps)),
    }
    rule = partial(update, momentum=momentum, decay=decay, trust=trust, eps=eps)
    return Optimizer("lars", settings, rule, slots)


def slots(w: Array) -> Slots:
    """The velocity v, zero before the first update."""
    return {"momentum": namespace(w).zeros_like(w)}


def update(
    w: Array,
    g: Array,
    slots: Slots,
    shared: Slots,
    lr: Array,
    *,
    momentum: float,
    decay: float,
    trust: float,
    eps: float,
) -> tuple[Array, Slots]:
    """v <- momentum v + lr r (g + wd w);  w <- w - v, one array."""
    r = trust_ratio(w, g, decay=decay, trust=trust, eps=eps)
    d = g + decay * w if decay else g
    k = label(representable(lr * r, w, lr), "k")
    v = momentum * slots["momentum"] + cast(k, w) * d
    return w - v, {"momentum": v}


def trust_ratio(w: Array, g: Array, *, decay: float, trust: float, eps: float) -> Array:
    """tc |w| / (|g| + wd |w| + eps), or 1 where either norm is not > 0; 0-d float64."""
    xp, w_norm, g_norm = namespace(w, g), norm(w), norm(g)
    usable = label((w_norm > 0) & (g_norm > 0), "usable")
    size = xp.where(usable, g_norm + decay * w_norm + eps, 1.0)
    return label(xp.where(usable, trust * w_norm / size, 1.0), "r")
