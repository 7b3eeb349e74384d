"""The lemmas under the theorems of Bernstein et al. 2020: both sides, and what each needs.

v2 is the NeurIPS version, v1 the first, whose lemmas have squared norms. |.| is the 2-norm of
all elements, kappa a condition number, nbar the smaller side of a matrix. Matrices are arrays of
any library; the arithmetic is float64 on the host, with logs where numbers over- or underflow.
Proofs, counterexamples and the rounding: docs/theory.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise

import numpy as np

from npdrt.arrays import Array, quiet
from npdrt.errors import Error
from npdrt.trust.bounds import log_excess, theorem_1_v1, v1_log_constant
from npdrt.trust.change import Layer, jacobians
from npdrt.trust.net import Net
from npdrt.trust.pair import Pair, is_valley
from npdrt.trust.scaled import (
    LOG_2,
    LOGS,
    Host,
    Scaled,
    Size,
    host,
    layer_rounding,
    log_gamma,
    log_norm,
    log_ratio_error,
    log_slack,
    product,
    ratio,
    relative,
    scaled,
    size,
    total,
)
from npdrt.trust.spectra import condition_number, log_condition_error, matrix


@dataclass(frozen=True)
class Inequality:
    """lhs <= rhs in float64, where guaranteed: where everything in `holds_assumptions` holds.

    log_lhs, log_rhs: the same in logs, finite where the sides over- or underflow. slack: by how
    much of itself one side was moved away from the other, so that rounding cannot break the
    inequality: the right side up, or the left side down if that has the constant. 0 where the
    inequality is not guaranteed anyway.
    """

    name: str
    lhs: float
    rhs: float
    holds_assumptions: dict[str, bool] = field(default_factory=dict)
    log_lhs: float = math.nan
    log_rhs: float = math.nan
    slack: float = 0.0

    @property
    def guaranteed(self) -> bool:
        """Whether every assumption, printed or not, holds; never with NaN."""
        sides = (self.lhs, self.rhs, self.log_lhs, self.log_rhs)
        return all(self.holds_assumptions.values()) and not any(map(math.isnan, sides))


def inequality(
    name: str,
    lhs: Size,
    rhs: Size,
    slack: float,
    holds: dict[str, bool] | None = None,
    *,
    lower: bool = False,
) -> Inequality:
    """lhs <= rhs with one side moved by `slack`, a log: the right one, the left one if `lower`."""
    holds = {**(holds or {}), "rounding (slack < 1)": relative(slack) < 1.0}
    if not all(holds.values()):
        slack = 0.0
    elif lower:
        lhs = lhs.down(slack)
    else:
        rhs = rhs.up(slack)
    return Inequality(name, lhs.value, rhs.value, holds, lhs.log, rhs.log, relative(slack))


def _logs(*logs: float) -> float:
    """The error of a sum of logs."""
    return 8 * LOGS * (1.0 + sum(abs(a) for a in logs if math.isfinite(a)))


def _norms(*arrays: Scaled) -> float:
    """The error of a product of norms and one measured quotient, as a log."""
    return log_gamma(2 * sum(a.digits.size for a in arrays) + 8)


def _enough_rows(m: Scaled, kappa: float) -> dict[str, bool]:
    rows, columns = m.digits.shape
    return {
        "conditioning (kappa finite)": math.isfinite(kappa),
        "rows >= columns (not printed)": rows >= columns,
    }


def _kappa(a: Scaled) -> tuple[float, float]:
    """The log of the condition number, and the largest that it may be."""
    kappa = condition_number(a.digits)
    return math.log(kappa), math.log(kappa) + log_condition_error(kappa, a.digits.shape)


def _fit(name: str, *pairs: tuple[int, int]) -> None:
    if any(a != b for a, b in pairs):
        raise Error(f"{name}: the shapes do not fit each other: {pairs}; see the docstring")


def lemma_3(m: Array, perturbed: Array, x: Array, y: Array, *, ours: bool = False) -> Inequality:
    """v2, Lemma 3: |M~ X| / |M Y| <= c |M~| |X| / (|M| |Y|) for matrices M, M~ (n, m), Y not 0.

    As printed, c = kappa^2 with kappa the larger condition number of M and M~. ours: the best
    constant, c = sqrt[(1 + (nbar - 1) kappa^2) / (1 + (nbar - 1) / kappa^2)]. Both hold for
    n >= m, which the paper does not say, or for any shape where the columns of Y lie in the row
    space of M; `guaranteed` knows of the first only. X (m, p), Y (m, q).

    Raises `Error` where the shapes do not fit.
    """
    a, b, x, y = (scaled(matrix(z)) for z in (m, perturbed, x, y))
    inner = a.digits.shape[1]
    _fit("lemma_3", *zip(a.digits.shape, b.digits.shape, strict=True))
    _fit("lemma_3", (inner, len(x.digits)), (inner, len(y.digits)))
    both = [_kappa(z) for z in (a, b)]
    kappa, largest = (max(column) for column in zip(*both, strict=True))
    rest = min(a.digits.shape) - 1
    sizes = [log_norm(b), log_norm(x), -log_norm(a), -log_norm(y)]
    plain = _lemma_3_constant(kappa, rest, ours) + sum(sizes)
    high = _lemma_3_constant(largest, rest, ours) + sum(sizes)
    rounding = _products(a, both[0][1]) + _norms(a, b, x, y) + _logs(2 * largest, *sizes)
    lhs = ratio(product(b, x), product(a, y))
    holds = _enough_rows(a, math.exp(kappa)) | {"Y is not 0": bool(np.any(y.digits))}
    name = "ours, Lemma 3 sharp" if ours else "v2, Lemma 3"
    return inequality(name, lhs, size(plain), log_slack(plain, high, rounding), holds)


def _lemma_3_constant(kappa: float, rest: int, ours: bool) -> float:
    """log c, of log kappa and nbar - 1."""
    if not ours or kappa == math.inf:
        return 2.0 * kappa
    if rest == 0:
        return 0.0
    up, down = math.log(rest) + 2.0 * kappa, math.log(rest) - 2.0 * kappa
    return float(np.logaddexp(0.0, up) - np.logaddexp(0.0, down)) / 2.0


def _products(a: Scaled, kappa: float) -> float:
    """`layer_rounding` of a matrix with this log kappa."""
    return layer_rounding(math.exp(kappa), a.digits.shape)


def lemma_1_v1(m: Array, x: Array) -> tuple[Inequality, Inequality]:
    """v1, Lemma 1: `lemma_4_v1` for one vector x (n,)."""
    vector = host(x, "lemma_1_v1")
    if vector.ndim != 1:
        raise Error(f"lemma_1_v1: expected a vector; got shape {vector.shape}; see lemma_4_v1")
    return _lemma_4(m, vector[:, None], "v1, Lemma 1")


def lemma_4_v1(m: Array, x: Array) -> tuple[Inequality, Inequality]:
    """v1, Lemma 4: |M|^2 |X|^2 / (nbar kappa^2) <= |M X|^2 <= |M|^2 |X|^2, M (m, n), X (n, p).

    The second always holds, the first for m >= n, which the paper does not say.

    Raises `Error` where the shapes do not fit.
    """
    return _lemma_4(m, x, "v1, Lemma 4")


def _lemma_4(m: Array, x: Array, name: str) -> tuple[Inequality, Inequality]:
    a, b = scaled(matrix(m)), scaled(matrix(x))
    _fit(name, (a.digits.shape[1], len(b.digits)))
    kappa, largest = _kappa(a)
    sides = log_norm(a), log_norm(b)
    sizes, square = 2.0 * sum(sides), _square(product(a, b))
    small, smallest = (sizes - math.log(min(a.digits.shape)) - 2.0 * k for k in (kappa, largest))
    above = 2.0 * (_norms(a, b) + log_gamma(max(a.digits.shape) + 8) + _logs(*sides, 2.0 * kappa))
    below = log_slack(-small, -smallest, above + 2.0 * _products(a, largest))
    finite = {"finite numbers": _finite(a, b)}
    holds = _enough_rows(a, math.exp(kappa)) | finite
    return (
        inequality(f"{name}, lower", size(small), square, below, holds, lower=True),
        inequality(f"{name}, upper", square, size(sizes), above, finite),
    )


def _finite(*arrays: Scaled) -> bool:
    return all(bool(np.all(np.isfinite(a.digits))) for a in arrays)


def _square(a: Scaled) -> Size:
    """|a|^2."""
    return size(2.0 * log_norm(a))


def lemma_2_v1(pair: Pair, x: Array) -> Inequality:
    """v1, Lemma 2: |h~_L|^2 / |h_L|^2 <= prod_l [2 (beta/alpha) n* kappa^2] prod_l (1 + r_l^2).

    Symbols and assumptions as in `theorem_1_v1`, whose constant this is: tall networks only.
    """
    (h, _), (moved, _) = pair.layers(x), Pair(pair.after, pair.after).layers(x)
    with quiet():
        plain, largest = (
            float(v1_log_constant(pair, terms)[0] + np.sum(np.logaddexp(0.0, 2.0 * terms.change)))
            for terms in (pair.terms, pair.largest_terms)
        )
    slack = log_slack(plain, largest, 2.0 * pair.slacks[0])
    holds = theorem_1_v1(pair, x).holds_assumptions
    lhs = ratio(moved.value, h.value).squared()
    return inequality("v1, Lemma 2", lhs, size(plain), slack, holds)


def lemma_3_v1(matrices: Sequence[Array]) -> Inequality:
    """v1, Lemma 3, "freshman's dream": |sum_i A_i|^2 <= k sum_i |A_i|^2 for k matrices.

    Raises `Error` for no matrices, or several shapes.
    """
    parts = [scaled(matrix(a)) for a in matrices]
    shapes = {a.digits.shape for a in parts}
    if len(shapes) != 1:
        raise Error(f"lemma_3_v1: expected matrices of one shape; got {sorted(shapes)}")
    logs = [2.0 * log_norm(a) for a in parts]
    with quiet():
        sizes = math.log(len(parts)) + float(np.logaddexp.reduce(logs))
    rounding = 2.0 * (log_gamma(len(parts) + 8) + _norms(*parts)) + _logs(*logs)
    slack = log_slack(sizes, sizes, rounding)
    finite = {"finite numbers": _finite(*parts)}
    return inequality("v1, Lemma 3", _square(total(*parts)), size(sizes), slack, finite)


def lemma_5_v1(
    weights: Sequence[Array], perturbations: Sequence[Array], *, ours: bool = False
) -> Inequality:
    """v1, Lemma 5, the relative difference of a product, for squares:

        |prod_l (W_l + dW_l) - prod_l W_l|^2 / |prod_l W_l|^2
            <= 2^L prod_l nbar_l kappa_l^2 [prod_l (1 + r_l^2) - 1]

    W_l (n_l, n_{l-1}), the first layer first; the product is W_L ... W_1. ours: 2^L - 1 in place
    of 2^L, which is attained. Holds where the widths fall, then rise, which the paper does not
    say.

    Raises `Error` where weights and perturbations differ in number or shape.
    """
    net, moved = Net(tuple(weights)), [matrix(d) for d in perturbations]
    if [w.shape for w in net.weights] != [d.shape for d in moved]:
        raise Error("lemma_5_v1: weights and perturbations differ in number or shape")
    before, changes = [scaled(w) for w in net.weights], [scaled(d) for d in moved]
    both = list(zip(changes, before, [np.ones(n) for n in net.widths[1:]], strict=True))
    whole = jacobians([Layer(w, d, ones, ones) for d, w, ones in both])[0]
    kappa, largest = np.array([_kappa(w) for w in before]).T
    r = np.array([ratio(d, w).log for d, w, _ in both])
    errors = [log_ratio_error(d, w) for d, w, _ in both]
    plain, high = _lemma_5(net, kappa, r, ours), _lemma_5(net, largest, r + errors, ours)
    rounding = sum(_products(w, float(k)) for w, k in zip(before, largest, strict=True))
    rounding += len(before) * _logs(*(2 * kappa), *(2 * r), *np.log(net.widths))
    rounding += _norms(whole.value, whole.change)
    holds = {
        "conditioning (kappa finite)": bool(np.all(np.isfinite(kappa))),
        "valley (not printed)": is_valley(net.widths),
        "finite numbers": _finite(*before, *changes),
    }
    name = "ours, Lemma 5 with 2^L - 1" if ours else "v1, Lemma 5"
    lhs = ratio(whole.change, whole.value).squared()
    return inequality(name, lhs, size(plain), log_slack(plain, high, 2.0 * rounding), holds)


def _lemma_5(net: Net, kappa: Host, r: Host, ours: bool) -> float:
    """The log of the right side, of log kappa_l and log r_l."""
    depth, nbar = net.depth, [min(sizes) for sizes in pairwise(net.widths)]
    factor = depth * LOG_2 + (math.log1p(-(2.0**-depth)) if ours else 0.0)
    trust = float(log_excess(2.0 * r)[0])
    constant = factor + float(np.sum(np.log(nbar) + 2.0 * kappa))
    return constant if constant == math.inf else constant + trust


# --- two scalar layers: in rational arithmetic, rounded once a side, which keeps the order -------


def scalar_two_layers(a: float, da: float, b: float, db: float) -> Inequality:
    """v2, Equation 3, f(x) = a b x: |f~ - f| / |f| <= (1 + |da/a|) (1 + |db/b|) - 1. a, b not 0.

    Both sides are exact but for one rounding, so that there is no slack. Raises `Error` for a or
    b 0, and for what is not a finite number.
    """
    u, v = _quotient("da / a", da, a), _quotient("db / b", db, b)
    change, sizes = abs(u + v + u * v), abs(u) + abs(v) + abs(u) * abs(v)
    return _exact("v2, Equation 3", change, sizes)


def scalar_two_layers_v1(a: float, da: float, b: float, db: float) -> Inequality:
    """v1, section 3: (f~ - f)^2 / f^2 <= 3 [(1 + da^2/a^2) (1 + db^2/b^2) - 1]; 3 is attained at
    da/a = db/b = 1. a, b not 0. Exact, with errors as in `scalar_two_layers`.
    """
    u, v = _quotient("da / a", da, a), _quotient("db / b", db, b)
    squares = 3 * (u * u + v * v + u * u * v * v)
    return _exact("v1, two scalar layers", (u + v + u * v) ** 2, squares)


def _quotient(name: str, change: float, size: float) -> Fraction:
    try:
        return Fraction(float(change)) / Fraction(float(size))
    except (TypeError, ValueError, OverflowError, ZeroDivisionError) as error:
        raise Error(
            f"{name}: expected finite numbers, the lower one not 0; got {change!r} and {size!r}"
        ) from error


def _exact(name: str, lhs: Fraction, rhs: Fraction) -> Inequality:
    left, right = _rounded(lhs), _rounded(rhs)
    log_rhs = max(left.log, right.log) if lhs <= rhs else right.log
    return Inequality(name, left.value, right.value, {}, left.log, log_rhs)


def _rounded(value: Fraction) -> Size:
    """The nearest float64, and the log."""
    if value == 0:
        return Size(0.0, -math.inf)
    power = value.numerator.bit_length() - value.denominator.bit_length()
    log = math.log(float(value / Fraction(2) ** power)) + power * LOG_2
    try:
        return Size(float(value), log)
    except OverflowError:
        return Size(math.inf, log)
