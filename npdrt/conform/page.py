"""The arithmetic of docs/updates.md in plain Python; every rule's `page` is written in it.

Written from that page alone, with the standard library alone, so that npdrt.optim is judged by it
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


def rounded(code: str, x: float) -> float:
    """`x` rounded to the format that `struct` calls `code`, to nearest even."""
    try:
        value: float = struct.unpack(code, struct.pack(code, x))[0]
    except OverflowError:  # it would round to a number above the largest
        return math.copysign(math.inf, x)
    return value


def float16(x: float) -> float:
    """`x` rounded to float16, to nearest even."""
    return rounded("<e", x)


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
    return rounded("<f", x)


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
    width = 256
    while width > 1 and 2 * len(squares) <= width:  # the other lanes would add zeros
        width //= 2
    total: Numbers = []
    for start in range(0, max(len(squares), 1), 65536):
        chunk = squares[start : start + 65536] or [0.0]
        chunk += [0.0] * (-len(chunk) % width)
        lanes = chunk[:width]
        for row in range(width, len(chunk), width):
            lanes = [a + b for a, b in zip(lanes, chunk[row : row + width], strict=True)]
        total = [a + b for a, b in zip(total, lanes, strict=True)] if total else lanes
    while len(total) > 1:
        half = len(total) // 2
        total = [total[k] + total[k + half] for k in range(half)]
    return math.sqrt(total[0])


def row_sum(values: Numbers) -> float:
    """The section "The sum of a row"."""
    width = 1
    while width < len(values):
        width *= 2
    total = values + [0.0] * (width - len(values))
    while len(total) > 1:
        half = len(total) // 2
        total = [total[k] + total[k + half] for k in range(half)]
    return total[0]


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


# --- products of matrices -------------------------------------------------------------------------

SLICES = {"float32": 2, "float64": 3}
PAIRS = {2: ((0, 0), (0, 1), (1, 0)), 3: ((2, 0), (1, 1), (0, 2), (1, 0), (0, 1), (0, 0))}


def product(rows: list[Numbers], columns: list[Numbers], dtype: str) -> list[Numbers]:
    """The section "The product": the rows of a b, from the rows of a and the columns of b."""
    t = (53 - (len(rows[0]) - 1).bit_length()) // 2
    left, right = ([cut(x, SLICES[dtype], t) for x in lines] for lines in (rows, columns))
    return [[element(a, b, t, ROUND[dtype]) for b in right] for a in left]


def cut(line: Numbers, slices: int, t: int) -> tuple[list[list[int]], int] | None:
    """The slices of a row or column as integers, and the exponent of its scale; None if an element
    is not finite."""
    if not all(map(math.isfinite, line)):
        return None
    largest = max(map(abs, line))
    exponent = math.frexp(largest)[1] - 1 if largest else 0
    rest, found = [math.ldexp(x, -exponent) for x in line], []
    for count in range(1, slices + 1):
        unit = 1 - count * t
        found.append([round(math.ldexp(x, -unit)) for x in rest])
        rest = [x - math.ldexp(n, unit) for x, n in zip(rest, found[-1], strict=True)]
    return found, exponent


def element(a: Any, b: Any, t: int, fl: Rounding) -> float:
    """An element of a product, from a row and a column that are cut."""
    if a is None or b is None:
        return math.nan
    (left, e), (right, f), total = a, b, 0.0
    for i, j in PAIRS[len(left)]:
        whole = sum(x * y for x, y in zip(left[i], right[j], strict=True))
        total += math.ldexp(whole, 2 - (i + j + 2) * t)
    try:
        return fl(math.ldexp(total, e + f))
    except OverflowError:
        return math.copysign(math.inf, total)


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


def with_decay(w: Numbers, g: Numbers, weight_decay: float, fl: Rounding) -> Numbers:
    """g + [weight_decay] * w, or g without weight decay."""
    return plus(g, weight_decay, w, fl) if weight_decay != 0 else g
