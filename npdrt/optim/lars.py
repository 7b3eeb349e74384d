"""LARS: layerwise adaptive rate scaling (You, Gitman and Ginsburg 2017)."""

from __future__ import annotations

from functools import partial
from typing import Annotated

from npdrt.arrays import Array, cast, label, namespace
from npdrt.optim.norm import norm
from npdrt.optim.optimizer import Slots, representable
from npdrt.optim.rule import Formula, rule
from npdrt.optim.setting import Setting, WeightDecay, at_least_zero


@rule(default_rate=1.0, slots={"momentum": "the velocity v"}, layerwise=True)
def lars(
    *,
    lr: float,
    momentum: Annotated[float, Setting("share of the velocity that is kept", at_least_zero)] = 0.9,
    weight_decay: WeightDecay = 0.0,
    trust_coefficient: Annotated[float, Setting("multiple of |w|/|g|", at_least_zero)] = 1e-3,
    eps: Annotated[float, Setting("added to the norm", at_least_zero)] = 0.0,
) -> Formula:
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
    step = partial(update, momentum=momentum, decay=weight_decay, trust=trust_coefficient, eps=eps)
    return Formula(step, slots)


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
