"""Multilayer parameterised systems: how a loss near its minimum depends on the layers' Jacobians.

A system is a family of layers f_l(theta_l, X), l = 1 .. L, X (d0, N) with a column an example; its
parameter-function map is F(theta) = f_L(theta_L, . ) o ... o f_1(theta_1, X), and a loss is
gamma(F(theta)). sigma(A) is the smallest singular value, lambda(A) = lambda_min(A A^T). J and D as
in `npdrt.trust.layers`; here they come from `npdrt.autodiff`, one vjp an output.

Source: MacDonald, Valmadre, Saratchandran and Lucey 2023; only the appendix is at hand, so that the
wording of the statements is rebuilt from their proofs ([the theory](docs/theory.md)).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from npdrt.arrays import Array, Params, namespace, quiet, to_host
from npdrt.autodiff import Tensor, backward, detach
from npdrt.errors import Error
from npdrt.trust.jacobians import batch_jacobian, jacobian
from npdrt.trust.layers import affine_derivative
from npdrt.trust.lemmas import Inequality, inequality
from npdrt.trust.scaled import (
    LOGS,
    Host,
    Size,
    host,
    log_loss,
    log_norm,
    log_slack,
    product,
    scaled,
    size,
)
from npdrt.trust.scaled import gamma as sum_error
from npdrt.trust.spectra import matrix, singular_values, svd_error

Layer = Callable[[Params, Any], Any]  # f_l(theta_l, X), made of npdrt.ops


# --- sigma, lambda, and the system ------------------------------------------------------------


def sigma(a: Host) -> float:
    """sigma(A), the smallest of the min(m, n) singular values."""
    return float(singular_values(a)[-1])


def smallest_gram(a: Host) -> float:
    """lambda(A) = lambda_min(A A^T) = sigma(A)^2 where A has at least as many columns as rows,
    else 0."""
    return sigma(a) ** 2 if a.shape[1] >= a.shape[0] else 0.0


class Smallest(NamedTuple):
    """log sigma(A) as computed, the largest that it may be, and how far it may lie below."""

    log: float
    high: float
    down: float

    @property
    def up(self) -> float:
        """How far it may lie above."""
        return self.high - self.log if self.high > self.log else 0.0


def _smallest(a: Host, error: float = 0.0) -> Smallest:
    """sigma(A) for an A that is off by at most `error` in norm; LAPACK's error comes on top."""
    s = singular_values(a)
    with quiet():
        error = svd_error(a.shape) * s[0] + error
        part = float(np.divide(error, s[-1]))
        return Smallest(float(np.log(s[-1])), float(np.log(s[-1] + error)), log_loss(part))


class Blocks(NamedTuple):
    """Jf_l and Df_l of one layer at f_{<l}: (d_l N, d_{l-1} N) and (d_l N, p_l)."""

    input: Host
    parameters: Host


def _blocks(layer: Layer, theta: Params, x: Array) -> Blocks:
    return Blocks(
        batch_jacobian(lambda z: layer(theta, z), x), jacobian(lambda p: layer(p, x), theta)
    )


@dataclass(frozen=True)
class System:
    """f_1 .. f_L; layers[l - 1](theta_l, X) with theta_l a dict of arrays, {} where it has none.

    A layer is any function of npdrt.ops; it must not look at anything but its arguments.
    """

    layers: tuple[Layer, ...]

    def __call__(self, thetas: Sequence[Params], x: Any) -> Any:
        """F(theta), (d_L, N)."""
        for layer, theta in zip(self.layers, thetas, strict=True):
            x = layer(theta, x)
        return x

    def at(self, thetas: Sequence[Params], x: Array) -> Point:
        """The system at one theta and X."""
        return Point(self, tuple(thetas), x)


@dataclass(frozen=True, eq=False)
class Point:
    """A system at one theta and X, with what every statement needs of it, computed once."""

    system: System
    thetas: tuple[Params, ...]
    x: Array

    @cached_property
    def inputs(self) -> list[Array]:
        """f_{<1} = X, f_{<2}, .., f_{<L}, and at the end F(theta)."""
        found = [self.x]
        for layer, theta in zip(self.system.layers, self.thetas, strict=True):
            found.append(detach(layer(theta, found[-1])))
        return found

    @property
    def widths(self) -> list[int]:
        """d_0 .. d_L."""
        return [int(x.shape[0]) for x in self.inputs]

    @cached_property
    def blocks(self) -> list[Blocks]:
        """Jf_l and Df_l, l = 1 .. L."""
        parts = zip(self.system.layers, self.thetas, self.inputs, strict=False)
        return [_blocks(layer, theta, x) for layer, theta, x in parts]

    @cached_property
    def _derivative(self) -> tuple[list[Host], float]:
        """The blocks of DF, and how far the products may be off, in norm, from exact ones of the
        blocks: a running bound."""
        found, total, error = [], 0.0, 0.0
        after = np.eye(len(self.blocks[-1].input))
        for block in reversed(self.blocks):
            part = sum_error(len(block.input) + 8) * float(np.linalg.norm(after)) + error
            found.append(after @ block.parameters)
            total += part * float(np.linalg.norm(block.parameters))
            after, error = after @ block.input, part * float(np.linalg.norm(block.input))
        return found[::-1], total * 1.001

    @property
    def derivative_blocks(self) -> list[Host]:
        """D_{theta_l} F = Jf_L ... Jf_{l+1} Df_l, l = 1 .. L (Proposition 4.2, equation 11)."""
        return self._derivative[0]

    @property
    def derivative(self) -> Host:
        """DF(theta), (d_L N, p_1 + ... + p_L): the row of its blocks. DF DF^T is the tangent
        kernel."""
        return np.hstack(self.derivative_blocks)

    @cached_property
    def smallest(self) -> float:
        """lambda(DF(theta))."""
        return smallest_gram(self.derivative)

    @cached_property
    def log_smallest(self) -> Smallest:
        """log sigma(DF(theta)) with its rounding; -inf where DF has more rows than columns."""
        whole = self.derivative
        if whole.shape[1] < whole.shape[0]:
            return Smallest(-math.inf, -math.inf, 0.0)
        return _smallest(whole, self._derivative[1])

    @property
    def lambda_size(self) -> Size:
        """`smallest` and its log."""
        return Size(self.smallest, 2.0 * self.log_smallest.log)


# --- the statements ---------------------------------------------------------------------------
#
# They are about the blocks Jf_l and Df_l as the layers computed them, in any arithmetic;
# the slack covers the products, norms and singular values that are computed from them here.

NEAR = 1e-6  # by how much, in logs, a condition that is measured may fail: it is added to the slack


def theorem_2_4(
    point: Point, gamma: Callable[[Any], Any], *, mu: float, infimum: float = 0.0
) -> Inequality:
    """mu lambda(DF(theta)) (gamma(F(theta)) - inf) <= |grad l(theta)|^2 for l = gamma o F.

    gamma: a loss of F (d_L, N) made of npdrt.ops, mu-PL over the image of F: |grad gamma|^2 >= mu
    (gamma - inf), **without** a factor 1/2. c |Z - Y|^2 is 4c-PL, so that
    `npdrt.ops.squared_error` over n numbers has mu = 4 / n. infimum: of gamma over the image, or
    any number that gamma is mu-PL with, such as 0 for a square. That gamma is mu-PL is checked at
    F(theta) only, where the statement needs it.

    So where lambda(DF) > 0 every critical point is a global minimum of gamma over the image.
    """
    value = Tensor(point.inputs[-1])
    loss = gamma(value)
    unit = namespace(loss.value).ones((), dtype=loss.dtype)
    g = host(backward(loss, unit)[id(value)], "theorem_2_4").reshape(-1)
    gap = float(to_host(loss.value)) - infimum
    whole, least, slope = point.derivative, point.log_smallest, log_norm(scaled(g))
    with quiet():
        claimed = float(np.log(mu) + np.log(gap))
        missing = max(claimed - 2.0 * slope, 0.0) if gap > 0 else 0.0
        part = sum_error(len(g) + 8) * np.linalg.norm(whole) / np.exp(least.log)
    gradient = size(2.0 * log_norm(product(scaled(whole.T), scaled(g))))
    slack = 4.0 * least.down + 2.0 * log_loss(2.0 * float(part)) + missing + _arithmetic(claimed)
    holds = {
        "gamma is mu-PL at F(theta), as measured": gap == 0 or (gap > 0 and missing < NEAR),
        "mu > 0": mu > 0,
    }
    left = size(claimed + 2.0 * least.log)
    return inequality("Theorem 2.4", left, gradient, slack, holds, lower=True)


def _arithmetic(*logs: float) -> float:
    """The largest rounding error of sums of logs."""
    return 8 * LOGS * (4.0 + sum(abs(a) for a in logs if math.isfinite(a)))


def proposition_4_6(point: Point) -> Inequality:
    """sum_l lambda(Df_l) prod_{j>l} lambda(Jf_j) <= lambda(DF(theta)).

    From DF DF^T = sum_l D_l F D_l F^T and lambda(A B) >= lambda(A) lambda(B). The sum is 0 unless
    some layer has at least as many parameters as outputs and no later layer expands.
    """
    logs = [(_log_lambda(b.input), _log_lambda(b.parameters)) for b in point.blocks]
    total, high, after, after_high = -math.inf, -math.inf, 0.0, 0.0
    for (later, later_high), (own, own_high) in reversed(logs):
        total = float(np.logaddexp(total, after + own))
        high = float(np.logaddexp(high, after_high + own_high))
        after, after_high = after + later, after_high + later_high
    sizes = [a for pair in logs for one in pair for a in one]
    rounding = 2.0 * point.log_smallest.down + len(logs) * _arithmetic(*sizes)
    slack = log_slack(total, high, rounding)
    return inequality("Proposition 4.6", size(total), point.lambda_size, slack, lower=True)


def _log_lambda(a: Host) -> tuple[float, float]:
    """log lambda(A), and the largest that it may be; -inf for more rows than columns."""
    if a.shape[1] < a.shape[0]:
        return -math.inf, -math.inf
    found = _smallest(a)
    return 2.0 * found.log, 2.0 * found.high


def lemma_a_9(x: Array, parameterisation: Array, *, bias: bool = True) -> Inequality:
    """sigma(X) sigma(DP(w)) <= sigma(D aff_P(w, X)) (35).

    x: (d0, N). parameterisation: DP(w) (d1 d0, p). Holds for N <= d0 and d1 d0 <= p, where both
    factors of (21) have at least as many columns as rows. The lemma is printed for all: it fails
    for a tall DP, such as a convolution's or that of P(w) = (0, 0, w).
    """
    x, dp = matrix(x), matrix(parameterisation)
    (features, examples), (rows, columns) = x.shape, dp.shape
    if rows % features:
        raise Error(f"lemma_a_9: DP has {rows} rows, no multiple of the {features} features of X")
    whole = affine_derivative(x, rows // features, dp, bias=bias)
    error = sum_error(rows + 8) * math.sqrt(rows) * np.linalg.norm(x) * np.linalg.norm(dp)
    factors, least = (_smallest(x), _smallest(dp)), _smallest(whole, float(error))
    log = factors[0].log + factors[1].log
    slack = log_slack(log, factors[0].high + factors[1].high, least.down + _arithmetic(log))
    holds = {
        "N <= d_0 (not printed)": examples <= features,
        "DP: columns >= rows (not printed)": columns >= rows,
    }
    right = Size(sigma(whole), least.log)
    return inequality("Lemma A.9", size(log), right, slack, holds, lower=True)


def theorem_4_7(point: Point, parameterisation: Array, *, delta: float) -> Inequality:
    """sigma(X)^2 sigma(DP(w))^2 delta^(2 (L - 1)) <= lambda(DF(theta)), an explicit form of ours.

    For f_1 = P(w) X (+ b 1^T), and f_l = I_l X + g_l for l >= 2 with all singular values of I_l
    equal to 1 and |J g_l|_2 <= 1 - delta: then sigma(Jf_l) >= delta (Lemma A.8, Weyl), and
    sigma(Df_1) >= sigma(X) sigma(DP(w)) (`lemma_a_9`, whose conditions are asked for).
    parameterisation: DP(w) (d1 d0, p). No layer after the first may expand. The theorem says
    lambda(DF) > 0 where X and DP have full rank; the rank must be that of their columns and rows.
    """
    first = lemma_a_9(point.x, parameterisation)
    later, own = (
        [_smallest(b.input) for b in point.blocks[1:]],
        _smallest(point.blocks[0].parameters),
    )
    factors = _smallest(matrix(point.x)), _smallest(matrix(parameterisation))
    product_of_two = factors[0].log + factors[1].log
    with quiet():
        log_delta = float(np.log(delta))
    missing = [max(product_of_two - own.log, 0.0), *(max(log_delta - s.log, 0.0) for s in later)]
    errors = own.down + sum(s.down for s in later) + factors[0].up + factors[1].up
    rounding = 2.0 * (sum(missing) + errors + point.log_smallest.down)
    left = 2.0 * (product_of_two + (len(later) * log_delta if later else 0.0))
    holds = {
        **{k: v for k, v in first.holds_assumptions.items() if "printed" in k},
        "d_{l-1} >= d_l for l >= 2": all(a >= b for a, b in pairwise(point.widths[1:])),
        "delta > 0": delta > 0,
        "sigma(Df_1) >= sigma(X) sigma(DP), as measured": missing[0] < NEAR,
        "sigma(Jf_l) >= delta, as measured": all(m < NEAR for m in missing[1:]),
    }
    slack = log_slack(left, left, rounding + len(missing) * _arithmetic(left, log_delta))
    return inequality("Theorem 4.7", size(left), point.lambda_size, slack, holds, lower=True)


def descent_factor(eta: float, *, beta: float, mu: float) -> float:
    """1 - mu alpha, alpha = eta (1 - beta eta / 2): by how much a step of gradient descent
    shrinks l - inf l at least, where grad l is beta-Lipschitz and |grad l|^2 >= mu (l - inf l)
    (37).

    eta in (0, 2 / beta).
    """
    if not (eta > 0 and 0 < eta * beta < 2):
        raise Error(f"descent_factor: expected 0 < eta < 2 / beta; got eta {eta}, beta {beta}")
    if not mu >= 0:
        raise Error(f"descent_factor: expected mu >= 0; got {mu}")
    return 1.0 - mu * eta * (1.0 - beta * eta / 2.0)
