"""Multilayer parameterised systems: what a loss near its minimum owes to the layers' Jacobians.

A system is a family of layers f_l(theta_l, X), l = 1 .. L, X (d0, N) with a column an example; its
parameter-function map is F(theta) = f_L(theta_L, . ) o ... o f_1(theta_1, X), and a loss is
gamma(F(theta)). sigma(A) is the smallest singular value, lambda(A) = lambda_min(A A^T). J and D as
in `npdrt.trust.layers`; here they come from `npdrt.autodiff`, one vjp an output.

Source: MacDonald, Valmadre, Saratchandran and Lucey 2023; only the appendix is at hand, so that the
wording of the statements is rebuilt from their proofs ([the theory](docs/theory.md)).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from npdrt import ops
from npdrt.arrays import Array, Params, namespace, quiet, to_host
from npdrt.autodiff import Tensor, backward, detach, graph
from npdrt.errors import Error
from npdrt.random import Random
from npdrt.trust.layers import affine_derivative, entry_norm_derivative
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

# --- Jacobians of whole batches ---------------------------------------------------------------


def jacobian(function: Callable[[Params], Any], params: Params) -> Host:
    """The derivative of vec function(params) in vec(params), row by row: (outputs, parameters).

    Columns are those of the arrays in their order, each in C order. One forward pass and one vjp
    an output; float64 on the host at the end, computed in the dtype of the arrays.
    """
    leaves = {name: Tensor(value, name=name) for name, value in params.items()}
    output = function(leaves)
    value = detach(output)
    size, columns = math.prod(value.shape), [math.prod(p.shape) for p in params.values()]
    rows = np.zeros((size, sum(columns)))
    if not isinstance(output, Tensor):
        return rows
    nodes = graph(output)
    edges = [node.edges for node in nodes]
    starts = np.cumsum([0, *columns])
    for i, unit in enumerate(_units(value)):
        found = backward(output, unit)
        for node, kept in zip(nodes, edges, strict=True):  # the walker consumes the graph
            node.edges = kept
        for leaf, start, stop in zip(leaves.values(), starts, starts[1:], strict=False):
            if id(leaf) in found:
                rows[i, start:stop] = to_host(found[id(leaf)]).reshape(-1)
    return rows


def _units(value: Array) -> Iterable[Array]:
    """The cotangents that pick one output each."""
    xp, shape = namespace(value), tuple(value.shape)
    for i in range(math.prod(shape)):
        unit = np.zeros(math.prod(shape))
        unit[i] = 1.0
        yield xp.asarray(unit.reshape(shape), dtype=value.dtype)


def batch_jacobian(function: Callable[[Any], Any], x: Array) -> Host:
    """The Jacobian of a function of a whole batch, (outputs, inputs), the coupling of the
    examples by batch normalisation included; see `jacobian`."""
    return jacobian(lambda p: function(p["x"]), {"x": x})


def gram_spectrum(j: Host) -> Host:
    """The singular values of J (m, n), m <= n, largest first, as roots of the eigenvalues of
    J J^T in float64.

    For the wide Jacobians of batches it costs one product; what is below about 1e-8 of the
    largest is rounding. `singular_values` is exact and slower.
    """
    values = np.linalg.eigvalsh(j @ j.T)
    return np.sqrt(np.maximum(values[::-1], 0.0))


# --- sigma, lambda, and the system ------------------------------------------------------------


def sigma(a: Host) -> float:
    """sigma(A), the smallest of the min(m, n) singular values."""
    return float(singular_values(a)[-1])


def smallest_gram(a: Host) -> float:
    """lambda(A) = lambda_min(A A^T) = sigma(A)^2 where A has at least as many columns as rows,
    else 0."""
    return sigma(a) ** 2 if a.shape[1] >= a.shape[0] else 0.0


class Smallest(NamedTuple):
    """log sigma(A) as computed, and how far its own errors may move it up or down."""

    log: float
    up: float
    down: float


def _smallest(a: Host, error: float = 0.0) -> Smallest:
    """sigma(A) for an A that is off by at most `error` in norm; LAPACK's error comes on top."""
    s = singular_values(a)
    with quiet():
        part = float(np.divide(svd_error(a.shape) * s[0] + error, s[-1]))
        return Smallest(float(np.log(s[-1])), float(np.log1p(part)), log_loss(part))


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
            return Smallest(-math.inf, 0.0, 0.0)
        return _smallest(whole, self._derivative[1])

    @property
    def lambda_size(self) -> Size:
        """`smallest` and its log."""
        return Size(self.smallest, 2.0 * self.log_smallest.log)


# --- the statements ---------------------------------------------------------------------------
#
# They speak of the blocks Jf_l and Df_l as they came out of the layers, in whatever arithmetic
# these have; the slack is for the products, the norms and the singular values made of them here.

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
    """What sums of logs may add."""
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
    return 2.0 * found.log, 2.0 * (found.log + found.up)


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
    slack = log_slack(log, log + factors[0].up + factors[1].up, least.down + _arithmetic(log))
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


# --- Lipschitz constants ----------------------------------------------------------------------


class Bounds(NamedTuple):
    """Of a map of rows: the length of a row of its value, the norm of its derivative, and the
    Lipschitz constant of its derivative (Frobenius to spectral norm)."""

    value: float
    derivative: float
    lipschitz: float


def sphere_bounds(*, eps: float, scale: float = 1.0) -> Bounds:
    """Of `npdrt.trust.layers.sphere`: sqrt(c), eps^(-1/2), (3/2) (4/5)^(5/2) / (sqrt(c) eps).

    c = 1 for weight and, with one entry a row, entry normalisation; c = N for batch
    normalisation. Theorem 4.5 says that they exist; these are the best ones. The last: a symmetric
    trilinear form attains its norm on one vector (Banach), T(h, h, h) = sqrt(c) s^(-3/2)
    (3 u^3 / s - 3 u) with u = <y, h>, |h| = 1, which is largest for h along y, |y|^2 = c eps / 4.
    """
    if not (0 < eps < math.inf and 0 < scale < math.inf):
        raise Error(f"sphere_bounds: expected eps > 0 and scale > 0; got {eps} and {scale}")
    return Bounds(math.sqrt(scale), eps**-0.5, 1.5 * 0.8**2.5 / (math.sqrt(scale) * eps))


def product_lipschitz(bounds: Sequence[float], constants: Sequence[float]) -> float:
    """sum_i c_i prod_{j != i} b_j: the Lipschitz constant of a product of matrix functions that
    are bounded by b_i and Lipschitz with c_i (Lemma A.5)."""
    if len(bounds) != len(constants):
        raise Error(
            f"product_lipschitz: {len(bounds)} bounds and {len(constants)} constants; give one of "
            "each for every function"
        )
    others = (math.prod(b for j, b in enumerate(bounds) if j != i) for i in range(len(bounds)))
    return sum(c * rest for c, rest in zip(constants, others, strict=True))


def loss_lipschitz(derivative: Bounds, gradient: Bounds) -> float:
    """Lip(DF) sup|grad gamma| + sup|DF|^2 Lip(grad gamma), a Lipschitz constant of grad l for
    l = gamma o F (Corollary 4.4, the constant ours).

    derivative: of F, its `derivative` and `lipschitz`; gradient: of gamma, the same two.
    """
    return (
        derivative.lipschitz * gradient.derivative + derivative.derivative**2 * gradient.lipschitz
    )


def lipschitz_estimate(function: Callable[[Host], Host], points: Sequence[Host]) -> float:
    """The largest |f(a) - f(b)|_2 / |a - b|_F over pairs of points that follow each other: a lower
    estimate of the Lipschitz constant. function: to matrices, in the spectral norm."""
    pairs = [(a, b) for a, b in pairwise(points) if np.any(a != b)]
    if not pairs:
        raise Error("lipschitz_estimate: expected at least two points that differ; got none")
    return max(
        float(np.linalg.norm(function(a) - function(b), 2) / np.linalg.norm(a - b))
        for a, b in pairs
    )


# --- the network of Theorem 5.1 ---------------------------------------------------------------


@dataclass(frozen=True)
class NormalisedResidualNet:
    """A weight-normalised residual network to which Theorems 4.7 and 5.1 apply, our instance.

        f_1(w, X) = en(w) X
        f_l(Z) = I_l Z + kappa_l wn(U_l) tanh(wn(V_l) Z + c_l 1^T),    l = 2 .. L

    en entrywise, wn rowwise, both with eps; I_l the first d_l rows of the identity; kappa_l =
    (1 - delta) / sqrt(d_l h): since |wn(U)|_2 < sqrt(d_l), |wn(V)|_2 < sqrt(h) and |tanh'| <= 1,
    |J g_l|_2 < 1 - delta. wn alone would not do: its norm may be as large as sqrt(rows).

    widths: d_0 .. d_L, not growing after d_1. hidden: h, rows of V_l. 0 < delta < 1. The paper's
    definition is not at hand; this one meets every condition that its proof uses.
    """

    widths: tuple[int, ...]
    hidden: int
    eps: float = 0.1
    delta: float = 0.1

    def __post_init__(self) -> None:
        grows = any(below < above for below, above in pairwise(self.widths[1:]))
        if len(self.widths) < 2 or grows or not (self.eps > 0 and 0 < self.delta < 1):
            raise Error(
                "NormalisedResidualNet: expected widths d_0, d_1 >= d_2 >= ... >= d_L, eps > 0 and "
                f"0 < delta < 1; got {self.widths}, {self.eps} and {self.delta}"
            )

    @property
    def system(self) -> System:
        """The layers f_1 .. f_L."""
        return System((self._first, *(self._block for _ in self.widths[2:])))

    def draw(self, random: Random) -> list[Params]:
        """theta_1 .. theta_L of standard normal numbers: {"w"}, then {"u", "v", "c"}."""
        thetas = [{"w": random.of("w").normal((self.widths[1], self.widths[0]))}]
        for layer, (inputs, outputs) in enumerate(pairwise(self.widths[1:]), start=2):
            shapes = {
                "u": (outputs, self.hidden),
                "v": (self.hidden, inputs),
                "c": (self.hidden, 1),
            }
            of_layer = random.of(f"layer {layer}")
            thetas.append({name: of_layer.of(name).normal(s) for name, s in shapes.items()})
        return thetas

    def bound(self, point: Point) -> Inequality:
        """`theorem_4_7` at a point, with DP(w) = D en(w)."""
        first = entry_norm_derivative(detach(point.thetas[0]["w"]), eps=self.eps)
        return theorem_4_7(point, first, delta=self.delta)

    def _first(self, theta: Params, x: Any) -> Any:
        return ops.matmul(ops.entry_norm(theta["w"], eps=self.eps), x)

    def _block(self, theta: Params, z: Any) -> Any:
        outputs = theta["u"].shape[0]
        kappa = (1.0 - self.delta) / math.sqrt(outputs * self.hidden)
        inner = ops.matmul(ops.weight_norm(theta["v"], eps=self.eps), z) + theta["c"]
        branch = ops.matmul(ops.weight_norm(theta["u"], eps=self.eps), ops.tanh(inner))
        return residual(ops.getitem(z, index=slice(0, outputs)), branch * kappa)


def residual(skipped: Any, branch: Any) -> Any:
    """I X + g(X) (23), given both parts; they must have one shape."""
    if tuple(skipped.shape) != tuple(branch.shape):
        raise Error(f"residual: {tuple(skipped.shape)} beside a branch {tuple(branch.shape)}")
    return skipped + branch


# --- two figures' worth of numbers ------------------------------------------------------------


def skip_spectra(a: Host) -> tuple[Host, Host]:
    """The singular values of A and of Id + A, largest first: why a skip connection keeps layer
    Jacobians away from 0. The authors' figure has A uniform on (-1, 1) / sqrt(n), n = 500."""
    return singular_values(a), singular_values(np.eye(*a.shape) + a)


def escaping_radius(steps: int, *, c: float, eps: float, eta: float) -> Host:
    """r_0 = 1, r_{t+1} = r_t + eta c eps r_t^(-3), t < steps: the fastest that a weight of the
    first layer can go to infinity in the proof of Theorem 5.1; (steps + 1,).

    Close to (4 c eps eta t + 1)^(1/4). So sigma(D en) falls like t^(-3/4), whose sum diverges, and
    its square, which Theorem 2.4 asks for, like t^(-3/2), whose sum does not.
    """
    found = [1.0]
    for _ in range(steps):
        found.append(found[-1] + eta * c * eps / found[-1] / found[-1] / found[-1])
    return np.array(found)
