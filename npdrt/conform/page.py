"""docs/updates.md in plain Python: the bits that an implementation of that page gives.

Written from the page alone, with the standard library alone, so that npdrt.optim is judged by it
like any other implementation. It gives the canonical answers of the conformance vectors.

A tensor is a list of floats, all numbers of the tensor's dtype. An operation on them is computed
in float64 and rounded once more, which gives the correctly rounded result of `+ - * / sqrt` in a
format of q bits where 53 >= 2 q + 2 (float16: q = 11, bfloat16: 8, float32: 24), subnormal
results included: no operation on two numbers of these formats leaves float64's normal range.
"""

from __future__ import annotations

import math
import struct
import sys
from collections.abc import Callable
from typing import Any

Numbers = list[float]
Rounding = Callable[[float], float]
Norms = tuple[float, float] | None

# --- IEEE arithmetic ------------------------------------------------------------------------


def stored(code: str, x: float) -> float:
    """`x` rounded to the format that `struct` calls `code`, to nearest even."""
    try:
        value: float = struct.unpack(code, struct.pack(code, x))[0]
    except OverflowError:  # it would round to a number above the largest
        return math.copysign(math.inf, x)
    return value


def float16(x: float) -> float:
    """`x` rounded to float16, to nearest even."""
    return stored("<e", x)


def bfloat16(x: float) -> float:
    """`x` rounded to bfloat16, to nearest even; not by way of float32, which would round twice."""
    if x == 0.0 or not math.isfinite(x):
        return x
    if abs(x) >= 2.0**128:
        return math.copysign(math.inf, x)
    spacing = max(math.frexp(x)[1] - 8, -133)  # 2**-133 is the smallest subnormal number
    nearest = math.ldexp(round(math.ldexp(x, -spacing)), spacing)
    return math.copysign(math.inf if abs(nearest) > LARGEST["bfloat16"] else nearest, x)


def float32(x: float) -> float:
    """`x` rounded to float32, to nearest even."""
    return stored("<f", x)


ROUND: dict[str, Rounding] = {
    "float16": float16,
    "bfloat16": bfloat16,
    "float32": float32,
    "float64": float,
}
LARGEST: dict[str, float] = {
    "float16": 65504.0,
    "bfloat16": (2.0 - 2.0**-7) * 2.0**127,
    "float32": (2.0 - 2.0**-23) * 2.0**127,
    "float64": sys.float_info.max,
}


def divide(a: float, b: float) -> float:
    """a / b in float64, with the infinities and NaN that Python refuses."""
    if b != 0.0:
        return a / b
    if a == 0.0 or math.isnan(a):
        return math.nan
    return math.copysign(math.inf, a) * math.copysign(1.0, b)


def root(x: float) -> float:
    """The square root in float64, NaN below zero, where Python refuses."""
    return math.nan if x < 0.0 else math.sqrt(x)


# --- scalars and norms ------------------------------------------------------------------------


def norm(values: Numbers) -> float:
    """The section "The norm"."""
    squares = [x * x for x in values]
    total: Numbers = []
    for start in range(0, max(len(squares), 1), 65536):
        chunk = squares[start : start + 65536] or [0.0]
        chunk += [0.0] * (-len(chunk) % 256)
        lanes = chunk[:256]
        for row in range(256, len(chunk), 256):
            lanes = [a + b for a, b in zip(lanes, chunk[row : row + 256], strict=True)]
        total = [a + b for a, b in zip(total, lanes, strict=True)] if total else lanes
    for half in (128, 64, 32, 16, 8, 4, 2, 1):
        total = [total[k] + total[k + half] for k in range(half)]
    return math.sqrt(total[0])


def sizes(w: Numbers, g: Numbers, norms: Norms) -> tuple[float, float]:
    """|w| and |g|: as given, or by the page."""
    return (norm(w), norm(g)) if norms is None else norms


def power(beta: float, t: int) -> float:
    """Adam's `b` after t steps: 1 multiplied t times by `beta`, every product rounded.

    It stops at a product that `beta` no longer changes: 0, or a subnormal number that rounding
    gives back. So at most about 745 / (1 - beta) products are made, whatever t.
    """
    product = 1.0
    for _ in range(t):
        if product * beta == product:
            break
        product *= beta
    return product


def representable(rate: float, lr: float, dtype: str) -> float:
    """`rate`, or `lr` unless the rate is at most the largest number of the dtype."""
    return rate if rate <= LARGEST[dtype] else lr


def relative_rate(w: Numbers, g: Numbers, lr: float, dtype: str, norms: Norms) -> float:
    """`s` of the sections "fromage" and "lars_lesion"."""
    nw, ng = sizes(w, g, norms)
    s = divide(lr * nw, ng) if nw > 0 and ng > 0 else lr
    return representable(s, lr, dtype)


# --- tensor operations --------------------------------------------------------------------------


def plus(x: Numbers, c: float, y: Numbers, fl: Rounding) -> Numbers:
    """x + [c] * y."""
    c = fl(c)
    return [fl(a + fl(c * b)) for a, b in zip(x, y, strict=True)]


def minus(x: Numbers, c: float, y: Numbers, fl: Rounding) -> Numbers:
    """x - [c] * y."""
    c = fl(c)
    return [fl(a - fl(c * b)) for a, b in zip(x, y, strict=True)]


def mixed(c: float, x: Numbers, k: float, y: Numbers, fl: Rounding) -> Numbers:
    """[c] * x + [k] * y."""
    c, k = fl(c), fl(k)
    return [fl(fl(c * a) + fl(k * b)) for a, b in zip(x, y, strict=True)]


def scaled(x: Numbers, c: float, fl: Rounding) -> Numbers:
    """x * [c]."""
    c = fl(c)
    return [fl(a * c) for a in x]


def quotient(x: Numbers, c: float, fl: Rounding) -> Numbers:
    """x / [c]."""
    c = fl(c)
    return [fl(divide(a, c)) for a in x]


def decayed(w: Numbers, g: Numbers, weight_decay: float, fl: Rounding) -> Numbers:
    """g + [weight_decay] * w, or g without weight decay."""
    return plus(g, weight_decay, w, fl) if weight_decay != 0 else g


# --- the rules ------------------------------------------------------------------------------------


def sgd(
    w: Numbers, g: Numbers, state: dict[str, Any], lr: float, dtype: str, norms: Norms = None, *,
    momentum: float = 0.0, dampening: float = 0.0, nesterov: bool = False,
    weight_decay: float = 0.0,
) -> Numbers:  # fmt: skip
    """The section "sgd"."""
    fl = ROUND[dtype]
    d = decayed(w, g, weight_decay, fl)
    if momentum == 0:
        return minus(w, lr, d, fl)
    k = 1.0 if state["step"] == 0 else 1.0 - dampening
    v = mixed(momentum, state.get("momentum", [0.0] * len(w)), k, d, fl)
    state["momentum"] = v
    return minus(w, lr, plus(d, momentum, v, fl) if nesterov else v, fl)


def adam(
    w: Numbers, g: Numbers, state: dict[str, Any], lr: float, dtype: str, norms: Norms = None, *,
    betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.0,
    decoupled: bool = False,
) -> Numbers:  # fmt: skip
    """The section "adam"."""
    fl, (beta1, beta2), zeros = ROUND[dtype], betas, [0.0] * len(w)
    b1 = state["beta1_power"] = next_power(state, "beta1_power", beta1)
    b2 = state["beta2_power"] = next_power(state, "beta2_power", beta2)
    if decoupled and weight_decay != 0:
        w = scaled(w, 1.0 - lr * weight_decay, fl)
    else:
        g = decayed(w, g, weight_decay, fl)
    squares = [fl(x * x) for x in g]
    m = state["exp_avg"] = mixed(beta1, state.get("exp_avg", zeros), 1.0 - beta1, g, fl)
    v = state["exp_avg_sq"] = mixed(beta2, state.get("exp_avg_sq", zeros), 1.0 - beta2, squares, fl)
    mh, vh = quotient(m, 1.0 - b1, fl), quotient(v, 1.0 - b2, fl)
    rate, e = fl(lr), fl(eps)
    below = [fl(fl(root(x)) + e) for x in vh]
    return [fl(a - fl(divide(fl(rate * x), y))) for a, x, y in zip(w, mh, below, strict=True)]


def next_power(state: dict[str, Any], name: str, beta: float) -> float:
    """The running product of this step, from the state, or anew where the state has none."""
    before: float = state[name] if name in state else power(beta, state["step"])
    return before * beta


def lars(
    w: Numbers, g: Numbers, state: dict[str, Any], lr: float, dtype: str, norms: Norms = None, *,
    momentum: float = 0.9, weight_decay: float = 0.0, trust_coefficient: float = 1e-3,
    eps: float = 0.0,
) -> Numbers:  # fmt: skip
    """The section "lars"."""
    fl, (nw, ng), r = ROUND[dtype], sizes(w, g, norms), 1.0
    if nw > 0 and ng > 0:
        r = divide(trust_coefficient * nw, (ng + weight_decay * nw) + eps)
    d, k = decayed(w, g, weight_decay, fl), representable(lr * r, lr, dtype)
    v = mixed(momentum, state.get("momentum", [0.0] * len(w)), k, d, fl)
    state["momentum"] = v
    return [fl(a - b) for a, b in zip(w, v, strict=True)]


def fromage(
    w: Numbers, g: Numbers, state: dict[str, Any], lr: float, dtype: str, norms: Norms = None, *,
    norm_bound: float | None = None,
) -> Numbers:  # fmt: skip
    """The section "fromage"."""
    fl = ROUND[dtype]
    if norm_bound is not None and "max_norm" not in state:
        state["max_norm"] = norm_bound * sizes(w, g, norms)[0]
    s = relative_rate(w, g, lr, dtype, norms)
    w = quotient(minus(w, s, g, fl), math.sqrt(1.0 + lr * lr), fl)
    return w if norm_bound is None else bounded(w, state["max_norm"], fl)


def bounded(w: Numbers, limit: float, fl: Rounding) -> Numbers:
    """The last two lines of the section "fromage"."""
    nw = norm(w)
    return scaled(w, divide(limit, nw) if nw > limit else 1.0, fl)


def lars_lesion(
    w: Numbers, g: Numbers, state: dict[str, Any], lr: float, dtype: str, norms: Norms = None
) -> Numbers:
    """The section "lars_lesion"."""
    return minus(w, relative_rate(w, g, lr, dtype, norms), g, ROUND[dtype])


PAGE: dict[str, Callable[..., Numbers]] = {
    "sgd": sgd,
    "adam": adam,
    "lars": lars,
    "lars_lesion": lars_lesion,
    "fromage": fromage,
}


def step(
    rule: str, w: Numbers, g: Numbers, state: dict[str, Any], lr: float, dtype: str, *,
    norms: Norms = None, **settings: Any,
) -> Numbers:  # fmt: skip
    """The parameter after one step of `rule`; `state` becomes the state after the step.

    w, g: numbers of `dtype`. state: {"step": 0} before the first step; a start in the middle has
    the number of steps made under "step" and the slots of the rule under their names, with
    Adam's powers or without, and then they are made anew. Lists in it are replaced, not written.
    norms: |w| and |g|, taken as given in place of the page's norm, also for a "max_norm" that is
    not in the state; the norm of a new w, for norm_bound, is always the page's. settings: by the
    names and with the defaults of the page.

    >>> step("lars_lesion", [3.0, 4.0], [0.0, 1.0], {"step": 0}, 0.5, "float32")
    [3.0, 1.5]
    """
    w = PAGE[rule](w, g, state, lr, dtype, norms, **settings)
    state["step"] += 1
    return w
