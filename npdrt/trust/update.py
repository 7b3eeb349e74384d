"""The theory of the update: its form at finite depth, and the growth of the weights."""

from __future__ import annotations

import math
from decimal import Decimal, localcontext
from typing import Any

import numpy as np

from npdrt.arrays import Array, cast, namespace, quiet
from npdrt.errors import Error
from npdrt.optim.setting import at_least_zero
from npdrt.trust.distances import check_depth, safe_norm


def finite_depth_update(w: Array, g: Array, eta: float, depth: int) -> Array:
    """The step that a net of finite depth L asks for: the minimiser over dW of

        <g, dW> + (|dW|**2 / |w|**2)**L / (2 eta L)

        dW = -eta**p (|w| / |g|) (|w| |g|)**p g,   p = 1 / (2L - 1)

    so that |dW|**(2L-1) = eta |g| |w|**(2L). w, g: one layer and its gradient, of any shape;
    eta >= 0; depth: L >= 1. Returns dW in the dtype of w; zero where w or g is zero. At L = 1 it
    is gradient descent, -eta |w|**2 g. As L grows, with eta**p as the new eta, it tends to
    Fromage's -eta |w| g / |g|, slowly: (|w| |g|)**p is 0.70 at L = 20 for |w| |g| = 1e-6.

    The powers are taken as logarithms in float64, so that no product of norms overflows; a power
    function is not portable to the bit, which is why no optimizer uses this.

    Raises `Error` for depth < 1 or a negative eta. Source: first version (2020), section 5, the
    equation before (4); the exact minimiser as printed.
    """
    check_depth(depth)
    eta = at_least_zero("eta", eta)
    xp, w_norm, g_norm = namespace(w, g), safe_norm(w), safe_norm(g)
    usable = (w_norm > 0) & (g_norm > 0) & (eta > 0)
    sizes = [xp.where(usable, n, 1.0) for n in (w_norm, g_norm)]
    bracket = xp.log(sizes[0]) + xp.log(sizes[1]) + math.log(eta or 1.0)
    with quiet():
        size = xp.where(usable, sizes[0] * xp.exp(bracket / (2 * depth - 1)), 0.0)
        return -(g / cast(sizes[1], g)) * cast(size, w)


def log_growth(eta: float, steps: float) -> float:
    """The logarithm of `growth`: (steps / 2) log1p(eta**2). Raises `Error` for negative numbers or
    what is not finite."""
    eta, steps = at_least_zero("eta", eta), at_least_zero("steps", steps)
    log = math.log1p(eta * eta) if eta < 1e150 else 2.0 * math.log(eta)
    return steps / 2 * log


def growth(eta: float, steps: float) -> float:
    """By what factor the norm of a layer grows in `steps` steps orthogonal to it.

        (1 + eta**2)**(steps / 2)

    By Pythagoras: each step has length eta |w|. This holds for a layer whose scale does not change
    the loss (its gradient is orthogonal to it) under LARS without the prefactor; Fromage's
    prefactor undoes it up to `prefactor_drift`. inf where it is too large for float64.

    Source: first version, section 5, after (4); NeurIPS 2020, Figure 2 right.
    """
    try:
        return math.exp(log_growth(eta, steps))
    except OverflowError:
        return math.inf


def steps_to_overflow(norm: float, eta: float, limit: float) -> int:
    """After how many steps of `growth` a layer's norm first passes `limit`; 0 if it has.

    norm, limit: > 0. For the square of the norm in float32 give the root of its largest number.
    From norm 1 in float32 it takes 1,774,546 steps at eta = 0.01.

    Raises `Error` unless all three are > 0 and finite, and for an eta so small that the number of
    steps is beyond float64.
    """
    for name, value in {"norm": norm, "eta": eta, "limit": limit}.items():
        if not (math.isfinite(value) and value > 0):
            raise Error(f"{name} must be a finite number > 0; got {value}")
    if norm > limit:
        return 0
    logs, growing = math.log(limit) - math.log(norm), log_growth(eta, 1)
    if growing <= logs * 1e-300:
        raise Error(f"steps_to_overflow: eta {eta} needs more than 1e300 steps; give a larger eta")
    return max(0, math.floor(logs / growing) + 1)


def prefactor_drift(eta: float, dtype: Any = "float32") -> float:
    """The relative growth a step that is left where Fromage's prefactor is rounded to `dtype`.

        sqrt(1 + eta**2) / fl(sqrt(1 + eta**2)) - 1

    fl: the float64 root, rounded once to the dtype of the weights, as the update does. For a
    layer whose gradient is orthogonal to it, the drift compounds: its norm changes by
    (1 + drift)**t in t steps, on top of elementwise rounding. 5.006e-8 for float32 at eta = 0.01,
    where 1 + 5.0e-5 lies between two float32 numbers 1.19e-7 apart; at eta so small
    that the prefactor rounds to 1 it is all of the growth. The true root is taken to 100 digits.

    Raises `Error` for a negative eta or a dtype that is not floating-point. Ours, not the papers'.
    """
    eta = at_least_zero("eta", eta)
    try:
        dtype = np.dtype(dtype)
    except TypeError as error:
        raise Error(f"prefactor_drift: expected a floating-point dtype; got {dtype!r}") from error
    if dtype.kind != "f":
        raise Error(f"prefactor_drift: expected a floating-point dtype; got {dtype}")
    with quiet():
        rounded = dtype.type(np.sqrt(1.0 + eta * eta))
    if not np.isfinite(rounded):
        raise Error(f"prefactor_drift: the prefactor of eta {eta} is beyond {dtype}")
    with localcontext(prec=100):
        root = (1 + Decimal(eta) ** 2).sqrt()
        return float(root / Decimal(float(rounded)) - 1)
