"""Functions to 200 bits, and the number of a dtype next to them, by mpmath."""

from __future__ import annotations

from typing import Any

import mpmath
import numpy as np


def exact(name: str, x: np.floating) -> Any:
    """mpmath's function of the number x."""
    with mpmath.workprec(200):
        return getattr(mpmath, name)(mpmath.mpf(float(x)))


def ulp(value: Any, dtype: str) -> Any:
    """The distance of the numbers of the dtype around `value`."""
    info = np.finfo(dtype)
    _, exponent = mpmath.frexp(value)
    return mpmath.mpf(2) ** (max(exponent - 1, int(info.minexp)) - int(info.nmant))


def nearest(value: Any, dtype: str) -> np.floating:
    """`value` rounded to the dtype once, ties to even."""
    if not mpmath.isfinite(value) or value == 0:
        return np.dtype(dtype).type(float(value))
    with mpmath.workprec(200), np.errstate(over="ignore"):
        step = ulp(value, dtype)
        return np.dtype(dtype).type(float(mpmath.nint(value / step) * step))


def error(y: np.floating, value: Any, dtype: str) -> float:
    """|y - value| in ulps of the dtype."""
    with mpmath.workprec(200):
        return float(abs(mpmath.mpf(float(y)) - value) / ulp(value, dtype))
