"""Matrices that neither overflow nor vanish, and bounds on the rounding of their products.

A `Scaled` is digits times a power of two, so that products of any depth and scale keep their
digits. Multiplication by a power of two is exact, so no bit differs from plain float64 arithmetic
where that neither over- nor underflows.

u = 2^-53 is the largest relative error of one float64 operation. A sum of n products in any order
is off by at most gamma_n = n u / (1 - n u) times the sum of their sizes (Higham, "Accuracy and
Stability of Numerical Algorithms", 2002, section 3.1); with it norms of products, and so on.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from npdrt.arrays import Array, quiet, to_host
from npdrt.errors import Error
from npdrt.optim.norm import norm

Host = np.ndarray[Any, Any]
UNIT = 2.0**-53  # u
LOGS = 2.0**-50  # error of a logarithm, exponential or sum of logs, relative to the largest of them
SMALLEST = 2.0**-1074
LOG_2 = math.log(2.0)
REACH = 4000  # a power of two that takes any float64 to 0 or inf
NONE = -(2**40)  # the power of a zero: below all others


def gamma(operations: float) -> float:
    """gamma_n; inf where n u >= 1."""
    error = operations * UNIT
    return error / (1.0 - error) if error < 1.0 else math.inf


def log_gamma(operations: float, factor: float = 1.0) -> float:
    """log(1 + gamma_n factor): how far a sum may lie above its true size."""
    return float(np.log1p(gamma(operations) * factor))


def log_loss(error: float) -> float:
    """-log(1 - error): how far a size may lie below its true one; inf where all of it may go."""
    return -math.log1p(-error) if error < 1.0 else math.nan if math.isnan(error) else math.inf


def host(x: Array, name: str) -> Host:
    """x as float64 on the host. Raises `Error` unless it is an array of real numbers."""
    try:
        found = to_host(x)
    except (TypeError, ValueError) as error:
        raise Error(f"{name}: expected an array of real numbers; {error}; convert it") from error
    if found.dtype.kind not in "fiu":
        raise Error(f"{name}: expected an array of real numbers; got {found.dtype}; convert it")
    return np.asarray(found, dtype=np.float64)


class Scaled(NamedTuple):
    """digits * 2**power; the largest digit is in [1/2, 1), except for zeros, inf and NaN."""

    digits: Host
    power: int

    def at(self, power: int) -> Host:
        """The digits of this array for another `power`: 0 or inf where out of range."""
        with quiet():
            return np.ldexp(self.digits, min(max(self.power - power, -REACH), REACH))


def scaled(a: Host, power: int = 0) -> Scaled:
    """a * 2**power."""
    largest = float(np.max(np.abs(a), initial=0.0))
    if largest == 0.0:
        return Scaled(a, NONE)
    if not math.isfinite(largest):
        return Scaled(a, power)
    shift = math.frexp(largest)[1]
    return Scaled(np.ldexp(a, -shift), power + shift)


def product(a: Scaled, b: Scaled) -> Scaled:
    """The matrix product."""
    with quiet():
        return scaled(a.digits @ b.digits, a.power + b.power)


def times(a: Scaled, factors: Host) -> Scaled:
    """The product by elements with ordinary numbers."""
    with quiet():
        return scaled(a.digits * factors, a.power)


def total(*parts: Scaled) -> Scaled:
    """The sum."""
    top = max(part.power for part in parts)
    with quiet():
        found = parts[0].at(top)
        for part in parts[1:]:
            found = found + part.at(top)
        return scaled(found, top)


def log_norm(a: Scaled) -> float:
    """log |a|; -inf for zeros."""
    with quiet():
        return float(np.log(norm(a.digits))) + a.power * LOG_2


class Size(NamedTuple):
    """A number >= 0 and its log, which is finite where the number over- or underflows."""

    value: float
    log: float

    def squared(self) -> Size:
        """Its square."""
        return Size(self.value * self.value, 2.0 * self.log)

    def up(self, log_slack: float) -> Size:
        """A number that is larger by a factor: at least so, also where it rounds to 0."""
        larger = size(self.log + log_slack)
        return Size(larger.value + SMALLEST * (larger.log > -math.inf), larger.log)

    def down(self, log_slack: float) -> Size:
        """A number that is smaller by a factor: at least so, also where it is subnormal."""
        smaller = size(self.log - log_slack)
        return Size(max(smaller.value - SMALLEST, 0.0), smaller.log)


def size(log: float) -> Size:
    """The number of this logarithm."""
    with quiet():
        return Size(float(np.exp(log)), log)


def log_slack(log: float, largest: float, rounding: float) -> float:
    """By how much a right side is rounded up, for the errors of its terms and of the arithmetic. 0
    for a right side that is 0 or infinite."""
    return largest - log + rounding if math.isfinite(log) or log != largest else 0.0


def relative(log_slack: float) -> float:
    """The slack as a part of the number itself."""
    with quiet():
        return float(np.expm1(log_slack))


def ratio(a: Scaled, b: Scaled) -> Size:
    """|a| / |b|: 0 / 0 is NaN, and a / 0 is inf."""
    with quiet():
        quotient = np.divide(norm(a.digits), norm(b.digits))
        power = a.power - b.power if np.any(a.digits) and np.any(b.digits) else 0
        value = float(np.ldexp(quotient, min(max(power, -REACH), REACH)))
        return Size(value, float(np.log(quotient)) + power * LOG_2)


def layer_rounding(kappa: float, shape: tuple[int, ...]) -> float:
    """By how much, in logs, the products of one layer may raise a left side that is measured.

        (1 + gamma sqrt(nbar)) / (1 - gamma sqrt(nbar) kappa) (1 + gamma_8)

    gamma = gamma_(n + 8) for the larger side n: |fl(A y)| <= |A y| + gamma |A| |y| above, where
    |A| <= sqrt(nbar) s_max(A), and |fl(W h)| >= |W h| - gamma |W| |h| below.
    """
    n, root = max(shape) + 8, math.sqrt(min(shape))
    return log_gamma(n, root) + log_loss(gamma(n) * root * kappa) + log_gamma(8)


def log_ratio_error(a: Scaled, b: Scaled) -> float:
    """How far the log in `ratio` may be off: two norms, a quotient and a log."""
    powers = 0.0 if NONE in (a.power, b.power) else abs(a.power - b.power) * LOG_2
    return log_gamma(a.digits.size + b.digits.size + 8) + LOGS * (2.0 + powers)
