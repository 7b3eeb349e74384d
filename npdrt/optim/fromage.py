"""Fromage: Frobenius matched gradient descent (Bernstein et al. 2020, Algorithm 1)."""

from __future__ import annotations

from functools import partial
from typing import Annotated

from npdrt.arrays import Array, cast, label, namespace
from npdrt.optim.norm import norm
from npdrt.optim.optimizer import Slots, representable
from npdrt.optim.rule import Formula, rule
from npdrt.optim.setting import Setting, at_least_zero


@rule(slots={"max_norm": "the largest norm allowed"}, relative=True)
def fromage(
    *,
    lr: float = 0.01,
    norm_bound: Annotated[
        float | None, Setting("largest norm over the initial norm", at_least_zero)
    ] = None,
) -> Formula:
    """Fromage with learning rate `lr`; each array changes by `lr` of its own norm a step.

        w <- (w - lr * |w| / |g| * g) / sqrt(1 + lr**2)

    |.| is the 2-norm of the whole array (`npdrt.optim.norm`). Every array is a layer: weights,
    biases and gains alike. norm_bound, if given, then projects w onto the ball of radius
    norm_bound * |w at init| around 0 (the authors' remedy against overfitting, from their code;
    not in Algorithm 1).

    If |w| or |g| is not > 0 (zero or NaN), or lr * |w| / |g| overflows the dtype of w, the step is
    w <- (w - lr * g) / sqrt(1 + lr**2). Algorithm 1 does not define these cases; the authors' code
    treats the norms in the same way and does not guard against the overflow. As a result, a zero
    weight starts with a plain gradient step, a zero gradient shrinks w by the prefactor, an array
    of zeros under a norm_bound stays zero, and a one-element array never changes sign for lr < 1.
    A NaN or inf in g makes those elements NaN (an inf makes them inf if w is zero); if |g| is inf,
    the others only shrink by the prefactor.

    Source: Bernstein, Vahdat, Yue, Liu, NeurIPS 2020, Algorithm 1. docs/updates.md has the
    sequence of operations.
    """
    if norm_bound is None:
        return Formula(update)
    return Formula(bounded_update, partial(slots, norm_bound=norm_bound))


def update(w: Array, g: Array, slots: Slots, shared: Slots, lr: Array) -> tuple[Array, Slots]:
    """w <- (w - lr |w|/|g| g) / sqrt(1 + lr**2), one array."""
    xp = namespace(w)
    s = relative_rate(w, g, lr)
    prefactor = label(xp.sqrt(1.0 + lr * lr), "prefactor")
    return (w - cast(s, w) * g) / cast(prefactor, w), slots


def relative_rate(w: Array, g: Array, lr: Array) -> Array:
    """lr * |w| / |g|; lr where either norm is not > 0 or the rate overflows; 0-d float64.

    `lars_lesion` uses it too; `page_rate` in conform/rules/fromage.py says the same. LARS has its
    own, `trust_ratio`.
    """
    xp, w_norm, g_norm = namespace(w, g), norm(w), norm(g)
    usable = label((w_norm > 0) & (g_norm > 0), "usable")
    s = xp.where(usable, lr * w_norm / xp.where(usable, g_norm, 1.0), lr)
    return label(representable(s, w, lr), "s")


def slots(w: Array, *, norm_bound: float) -> Slots:
    """The largest norm allowed, measured before the first update; 0-d float64."""
    return {"max_norm": norm_bound * norm(w)}


def bounded_update(
    w: Array, g: Array, slots: Slots, shared: Slots, lr: Array
) -> tuple[Array, Slots]:
    """`update`, then w <- w * max_norm / |w| where |w| > max_norm."""
    xp = namespace(w)
    w, _ = update(w, g, slots, shared, lr)
    w_norm, limit = norm(w), slots["max_norm"]
    above = w_norm > limit
    return w * cast(xp.where(above, limit / xp.where(above, w_norm, 1.0), 1.0), w), slots
