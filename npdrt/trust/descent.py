"""Descent until the gradient breaks down: the lemmas of Bernstein et al. 2020, measured and solved.

W: the parameters, a dict of arrays, each a layer l = 1 .. L. dW: a perturbation, g: the gradient
of the loss at W, both of the same names and shapes. |.| is the Frobenius norm
(`npdrt.optim.norm`); every result is 0-d float64 unless it says otherwise. value_and_gradient maps
parameters to (loss, gradients), as `npdrt.value_and_grad(loss_fn)` does with the data bound.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from npdrt.arrays import Array, Params, cast, namespace, quiet
from npdrt.errors import Error
from npdrt.optim.setting import at_least_zero
from npdrt.trust.distances import (
    check_depth,
    check_same_layers,
    check_same_shapes,
    deep_relative_trust,
    numbers,
    relative_perturbations,
    safe_norm,
    weights,
)

ValueAndGradient = Callable[[Params], tuple[Array, Params]]
POINTS = 16  # of the grid on which a maximum over t in [0, 1] is taken
EPS = 2.0**-52  # of float64, in which products and norms are summed


# --- angles, breakdown, direction -------------------------------------------------------------


def cosines(perturbation: Params, gradient: Params) -> dict[str, Array]:
    """Per layer, the cosine of the angle between dW_l and the negative gradient -g_l.

        cos theta_l = -<dW_l, g_l> / (|dW_l| |g_l|)

    Cut to [-1, 1], which rounding may pass by an ulp; NaN where dW_l or g_l is zero. The product
    is summed in float64 in the library's order.

    Raises `Error` where names or shapes differ. Source: NeurIPS 2020, Lemma 1.
    """
    check_same_shapes(perturbation, gradient)
    with quiet():
        return {name: _cosine(d, gradient[name]) for name, d in perturbation.items()}


def _cosine(d: Array, g: Array) -> Array:
    xp = namespace(d, g)
    return xp.clip(-_unit_dot(d, g), -1.0, 1.0)


def _unit_dot(a: Array, b: Array) -> Array:
    """<a / |a|, b / |b|>; scaled only where a product of the norms over- or underflows."""
    sizes = safe_norm(a), safe_norm(b)
    xp, both = namespace(a, b), sizes[0] * sizes[1]
    a, b = (xp.asarray(x, dtype=xp.float64) for x in (a, b))
    units = dot(a / sizes[0], b / sizes[1])
    return xp.where((both > 1e-250) & (both < 1e250), dot(a, b) / both, units)


def dot(a: Array, b: Array) -> Array:
    """<a, b>: the sum of the products of the elements, in float64, in the library's order; 0-d."""
    xp = namespace(a, b)
    return xp.sum(xp.asarray(a, dtype=xp.float64) * xp.asarray(b, dtype=xp.float64))


def gradient_breakdown(gradient: Params, perturbed: Params) -> dict[str, Array]:
    """Per layer, the relative change of the gradient, |g~_l - g_l| / |g_l|.

    perturbed: the gradient g~ at W + dW. inf where g_l is zero and g~_l is not, NaN where both
    are. Raises `Error` where names or shapes differ. Source: NeurIPS 2020, Eq. (4).
    """
    with quiet():
        changes = changes_of(gradient, perturbed)
        return {name: changes[name] / safe_norm(g) for name, g in gradient.items()}


def changes_of(gradient: Params, perturbed: Params) -> dict[str, Array]:
    """|g~_l - g_l| per layer."""
    check_same_shapes(gradient, perturbed)
    return {name: safe_norm(perturbed[name] - g) for name, g in gradient.items()}


def layerwise_direction(params: Params, gradient: Params) -> Params:
    """The direction that changes every layer by its own norm, against its gradient.

        dW_l = -|W_l| g_l / |g_l|, zero where g_l is zero

    A slice of Figure 1 (NeurIPS 2020) is W + eta dW; the step of Eq. (5) is eta dW. Arrays of the
    dtype of W. Raises `Error` where names or shapes differ.
    """
    check_same_shapes(params, gradient)
    with quiet():
        return {name: _matched(w, gradient[name]) for name, w in params.items()}


def _matched(w: Array, g: Array) -> Array:
    """-|w| g / |g|; the unit vector comes first, so that no ratio of norms overflows."""
    xp, g_norm = namespace(w, g), safe_norm(g)
    divisor = xp.where(g_norm > 0, g_norm, 1.0)
    return -(g / cast(divisor, g)) * cast(safe_norm(w), w)


# --- Lemma 1 ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class DescentBound:
    """Lemma 1 for one perturbation, and the actual change of the loss.

    change: L(W + dW) - L(W). bound: Lemma 1's right side. steepest_bound: that of the author
    response. cosines: cos theta_l. breakdown: max over `grid` of |g_l(W + t dW) - g_l(W)| / |g_l|.
    grid: the values of t. slack: how far rounding may have moved `change` and `bound` apart: 16 eps
    of the dtype of the gradient times |L(W)| + |L(W + dW)|, and for every layer the rounding of
    W + dW and of <g, dW> times the largest |g_l|. The loss and its gradient are taken as right to
    that. lipschitz: the constant that was given, which `bound` allows for between points of the
    grid; None without.
    """

    change: Array
    bound: Array
    steepest_bound: Array
    cosines: dict[str, Array]
    breakdown: dict[str, Array]
    grid: tuple[float, ...]
    slack: Array
    lipschitz: float | None = None

    @property
    def holds(self) -> Array:
        """Whether change <= bound up to the slack; 0-d bool."""
        return self.change <= self.bound + self.slack

    @property
    def steepest_holds(self) -> Array:
        """Whether change <= steepest_bound up to the slack; 0-d bool."""
        return self.change <= self.steepest_bound + self.slack

    @property
    def guarantees_descent(self) -> Array:
        """Whether the loss must fall: the bound is below 0 by more than the slack, and `lipschitz`
        was given. Without it the gradient may do anything between two points of the grid, and this
        is False whatever the bound; 0-d bool."""
        return (self.bound + self.slack < 0) & (self.lipschitz is not None)


def descent_bound(
    value_and_gradient: ValueAndGradient,
    params: Params,
    perturbation: Params,
    *,
    points: int = POINTS,
    lipschitz: float | None = None,
) -> DescentBound:
    """How far a perturbation can raise the loss, from the breakdown of its gradient (Lemma 1).

        L(W + dW) - L(W) <= -sum_l |g_l| |dW_l| [cos theta_l - max_t |g_l(W + t dW) - g_l| / |g_l|]

    computed as sum_l (<g_l, dW_l> + |dW_l| max_t |g_l(W + t dW) - g_l|): with |g_l| multiplied
    in, a zero gradient of a layer does not give 0/0. Also the author response's form, over all
    layers at once: <g, dW> + max_t |g(W + t dW) - g|_2 |dW|_2; neither is always the smaller.

    value_and_gradient: see the module; called points + 1 times. The maximum is over t = 1/points,
    2/points, .., 1 only and so too small by what happens between: nothing where the breakdown is
    largest at t = 1, as it is for a quadratic; up to 4e-3 of it at the kinks of a trained net, with
    16 points; anything at all for a loss about which nothing is known. For a loss with kinks the
    lemma holds with the supremum of the one-sided limits. On a quadratic the change of gradient
    makes up at most half of its bound.

    lipschitz: a constant K with |g(W + s dW) - g(W + t dW)| <= K |s - t| |dW| for all s, t in
    [0, 1], over all layers at once. With it the maxima are raised by the most that may happen
    between two points, K |dW| / (2 points), and `guarantees_descent` may be True.

    Raises `Error` where names or shapes differ, for points < 1 or a negative lipschitz.
    Source: NeurIPS 2020, Lemma 1; author response, to reviewer 2, for the second form.
    """
    check_same_shapes(params, perturbation)
    grid, constant = _grid(points), at_least_zero("lipschitz", lipschitz or 0.0)
    with quiet():
        loss, gradient = value_and_gradient(params)
        after, changes = loss, []
        for t in grid:
            after, moved = value_and_gradient(_along(params, perturbation, t))
            changes.append(changes_of(gradient, moved))
        xp = namespace(loss)
        loss, after = (xp.asarray(x, dtype=xp.float64) for x in (loss, after))
        sizes = {name: safe_norm(d) for name, d in perturbation.items()}
        largest = {n: _largest([change[n] for change in changes]) for n in params}
        eps = float(xp.finfo(next(iter(gradient.values())).dtype).eps)
        rounded = {name: eps * (safe_norm(w) + sizes[name]) for name, w in params.items()}
        whole = _joint(list(sizes.values()))
        unseen = constant * (whole / (2 * points) + sum(rounded.values()))
        slope = sum(dot(g, perturbation[name]) for name, g in gradient.items())
        spread = sum(size * (largest[name] + unseen) for name, size in sizes.items())
        slack = 16 * eps * (abs(loss) + abs(after))
        for name, g in gradient.items():
            terms = rounded[name] + math.prod(g.shape) * EPS * sizes[name]
            slack = slack + terms * (safe_norm(g) + largest[name])
        return DescentBound(
            change=after - loss,
            bound=slope + spread,
            steepest_bound=slope + _steepest(changes, perturbation) + whole * unseen,
            cosines=cosines(perturbation, gradient),
            breakdown={name: largest[name] / safe_norm(g) for name, g in gradient.items()},
            grid=grid,
            slack=slack,
            lipschitz=lipschitz,
        )


def steepest_descent_distance(
    value_and_gradient: ValueAndGradient,
    params: Params,
    perturbation: Params,
    *,
    points: int = POINTS,
) -> Array:
    """The distance under which Lemma 1 reads as steepest descent: over all layers at once,

        max over t of |g(W + t dW) - g(W)|_2 times |dW|_2

    and L(W + dW) <= L(W) + <g, dW> + distance. The maximum is over the grid of `descent_bound`.

    Raises `Error` where names or shapes differ, or points < 1.
    Source: author response, to reviewer 2 (5).
    """
    check_same_shapes(params, perturbation)
    with quiet():
        _, gradient = value_and_gradient(params)
        along = (_along(params, perturbation, t) for t in _grid(points))
        changes = [changes_of(gradient, value_and_gradient(moved)[1]) for moved in along]
        return _steepest(changes, perturbation)


def _steepest(changes: list[dict[str, Array]], perturbation: Params) -> Array:
    """The largest joint change of the gradient times |dW|."""
    size = _joint([safe_norm(d) for d in perturbation.values()])
    return _largest([_joint(list(change.values())) for change in changes]) * size


def _joint(norms: list[Array]) -> Array:
    """The norm of arrays side by side, from the norm of each."""
    return safe_norm(namespace(*norms).stack(norms))


def _largest(values: list[Array]) -> Array:
    xp = namespace(*values)
    return xp.max(xp.stack(values))


def _along(params: Params, perturbation: Params, t: float) -> Params:
    """W + t dW."""
    return {name: w + t * perturbation[name] for name, w in params.items()}


def _grid(points: int) -> tuple[float, ...]:
    if not isinstance(points, int | np.integer) or points < 1:
        raise Error(f"points must be at least 1; got {points}")
    return tuple(k / points for k in range(1, points + 1))


# --- Lemma 2 ----------------------------------------------------------------------------------


def descent_threshold(cosine: Any, depth: int) -> Array:
    """Lemma 2: a relative step below this lowers the loss, if deep relative trust holds.

        eta < (1 + cos theta)**(1/L) - 1

    cosine: the smallest cos theta_l, a number or an array of any shape; depth: L >= 1, the number
    of weight matrices. Not positive where cosine <= 0: no step is promised to descend. At
    cosine = 1 it is 2**(1/L) - 1, about 0.69/L. The lemma needs some |g_l| |dW_l| > 0, and deep
    relative trust at t dW for every t in [0, 1]: a model, which real nets often break (see
    `trust_model_gap`). Written with log1p and expm1, so that no digits are lost at large L.

    Raises `Error` for depth < 1. Source: NeurIPS 2020, Lemma 2. Not sharp: `weaker_threshold`.

    >>> float(descent_threshold(1.0, 1))
    1.0
    """
    check_depth(depth)
    xp, cosine = numbers("descent_threshold", cosine)
    with quiet():
        return xp.expm1(xp.log1p(cosine) / depth)


def weaker_threshold(cosine: float, depth: int) -> float:
    """A larger step than Lemma 2's that still lowers the loss under the same assumption (ours).

    The largest float64 eta with

        h(eta) = ((1 + eta)**(L+1) - 1) / ((L+1) eta) - 1 <= cos theta

    and 0 where cosine <= 0. For every eta below it the loss falls. Proof: as in Lemma 1,

        L(W + dW) - L(W) = -sum_l [ |g_l| |dW_l| cos theta_l - integral of <g_l(W + t dW) - g_l,
        dW_l> dt ] <= -sum_l |g_l| |dW_l| [ cos theta_l - integral of b_l(t) dt ]

    with t over [0, 1] and b_l(t) the relative breakdown, which deep relative trust at t dW bounds
    by (1 + t eta)**L - 1. Its mean over [0, 1] is h(eta); Lemma 2 takes its maximum
    (1 + eta)**L - 1 >= h(eta) instead, so that this threshold is never below Lemma 2's. Sharp at
    L = 1, where it is 2 cos theta (L(w) = w**2 / 2); for large L and cosine 1 it is 1.256/L.

    h is summed as sum_k C(L, k) eta**k / (k + 1), k = 1 .. L: positive terms, no cancellation.
    The root lies between Lemma 2's threshold and 2 cos theta / L (the first term); bisection down
    to neighbouring floats.

    Raises `Error` for depth < 1 or a cosine outside [-1, 1].

    >>> weaker_threshold(1.0, 1)
    2.0
    """
    check_depth(depth)
    _, value = numbers("weaker_threshold", cosine)
    if value.shape or not -1 <= value <= 1:
        raise Error(f"a cosine lies in [-1, 1]; got {cosine}")
    cosine = float(value)
    if cosine <= 0:
        return 0.0
    low, high = float(descent_threshold(cosine, depth)), 2 * cosine / depth
    if _mean_breakdown(high, depth) <= cosine:
        return high
    while low < (middle := low + (high - low) / 2) < high:
        low, high = (middle, high) if _mean_breakdown(middle, depth) <= cosine else (low, middle)
    return low


def _mean_breakdown(eta: float, depth: int) -> float:
    """The mean of (1 + t eta)**depth - 1 over t in [0, 1]."""
    term = total = depth * eta / 2
    for k in range(2, depth + 1):
        term *= (depth - k + 1) * eta / (k + 1)
        total += term
        if term < 1e-18 * total:
            break
    return total


# --- the model --------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrustModelGap:
    """Modelling assumption 1 compared with the actual values.

    measured: per weight matrix, |g_l(W + dW) - g_l| / |g_l|. allowed: prod_k (1 + r_k) - 1, the
    same for all. holds: per weight matrix, measured <= allowed; False where g_l is zero and the
    new gradient is not, or both are.
    """

    measured: dict[str, Array]
    allowed: Array
    holds: dict[str, Array]


def trust_model_gap(
    value_and_gradient: ValueAndGradient, params: Params, perturbation: Params
) -> TrustModelGap:
    """Whether deep relative trust bounds the gradient's breakdown at W + dW, layer by layer.

        |g_l(W + dW) - g_l| / |g_l| <= prod_k (1 + |dW_k| / |W_k|) - 1

    The layers are the weight matrices (two axes or more); what else is in `params` is perturbed
    too but has no part in the product. Not a theorem: the model sets kappa = 1 and alpha = beta
    and leaves the change of the loss's derivative out. Squared error breaks it for most random
    nets; f = wx with w = x = 1, target 1/2, dw = 1/4 has 1/2 > 1/4.

    Raises `Error` where names or shapes differ, and for a weight matrix that is zero.
    Source: NeurIPS 2020, modelling assumption 1.
    """
    check_same_shapes(params, perturbation)
    with quiet():
        after = _along(params, perturbation, 1.0)
        check_same_layers(weights(params), weights(after))
        (_, gradient), (_, moved) = value_and_gradient(params), value_and_gradient(after)
        measured = gradient_breakdown(weights(gradient), weights(moved))
        allowed = deep_relative_trust(relative_perturbations(weights(params), weights(after)))
    return TrustModelGap(measured, allowed, {n: m <= allowed for n, m in measured.items()})
