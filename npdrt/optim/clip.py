"""Clipping of gradients by their norm."""

from __future__ import annotations

from npdrt.arrays import Params, cast, label, namespace
from npdrt.optim.norm import norm

EPS = 1e-6  # PyTorch's, added to the norm


def clipped(grads: Params, limit: float) -> Params:
    """Every gradient times min(1, limit / (total + 1e-6)), total = sqrt(sum_l |g_l|^2).

    The sum over arrays is in their order, of float64 norms (`npdrt.optim.norm`), and the factor is
    rounded once to each dtype: the same bits on every machine. PyTorch's `clip_grad_norm_` differs
    only in that its norms have the gradients' own dtype. A NaN makes every gradient NaN. If the
    total is infinite, finite elements become 0 and infinite ones NaN.

    Source: Pascanu et al. 2013, section 3.2; the 1e-6 is PyTorch's.
    """
    first = next(iter(grads.values()))
    xp = namespace(first)
    squares = xp.zeros((), dtype=xp.float64)
    for g in grads.values():
        size = norm(g)
        squares = squares + size * size
    factor = label(xp.minimum(limit / (xp.sqrt(squares) + EPS), xp.ones_like(squares)), "clip")
    return {name: g * cast(factor, g) for name, g in grads.items()}
