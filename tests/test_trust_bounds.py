"""Every statement of both papers where it is true, with its constants as printed, on inputs chosen
against it; the smallest counterexample where it is not; and wrong constants, which must fail."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from fractions import Fraction
from itertools import pairwise
from typing import Any

import autograd
import autograd.numpy as anp
import backends
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from npdrt import Error, trust
from npdrt.models import MLP
from npdrt.trust import Bound, Net, Pair

seeds = st.integers(0, 2**32 - 1)
SLOPES = (0.01, 0.1, 0.2, 0.5, 0.9, 1.0, 2.0)


def pair(
    weights: list[Any], changes: list[Any], slope: float = 1.0, above: float = 1.0, **options: Any
) -> Pair:
    """Two networks, from W_1 .. W_L and dW_1 .. dW_L."""
    before = [np.array(w, dtype=float, ndmin=2) for w in weights]
    after = [w + np.array(d, dtype=float, ndmin=2) for w, d in zip(before, changes, strict=True)]
    nets = [Net(tuple(w), slope, above, **options) for w in (before, after)]
    return Pair(nets[0], nets[1])


# --- networks and inputs chosen against the statements ---------------------------------------


def isometry(rng: Any, n: int, m: int) -> np.ndarray:
    """All singular values 1."""
    q = np.linalg.qr(rng.normal(size=(max(n, m), min(n, m))))[0]
    return q if n >= m else q.T


def conditioned(rng: Any, n: int, m: int) -> np.ndarray:
    """Singular values 1 .. kappa, one or all but one of them large: where Lemma 3 is sharp."""
    k, kappa = min(n, m), 10 ** rng.uniform(0, 3)
    s = np.where(np.arange(k) < rng.integers(1, k + 1), kappa, 1.0)
    return isometry(rng, n, k) * s @ isometry(rng, k, m)


def conformal(rng: Any, n: int, m: int) -> np.ndarray:
    """A rotation and scaling of the plane where n = m = 2: kappa = 1, and closed under sums."""
    a, b = rng.normal(size=2)
    return np.array([[a, -b], [b, a]]) if n == m == 2 else isometry(rng, n, m)


def gaussian(rng: Any, n: int, m: int) -> np.ndarray:
    """Independent normal numbers."""
    return rng.normal(size=(n, m))


def rank_one(rng: Any, n: int, m: int) -> np.ndarray:
    """As the gradient of one example."""
    return np.outer(rng.normal(size=n), rng.normal(size=m))


FAMILIES = (gaussian, conditioned, isometry, conformal)


def change(rng: Any, w: np.ndarray, kind: Any) -> np.ndarray:
    """dW of a relative size between 1e-6 and 100: of a family, none, along W, or large where W is
    small and the other way round."""
    if kind in ("along", "none"):
        d = w * (kind == "along") * rng.choice([-1, 1])
    elif kind == "against":
        u, s, v = np.linalg.svd(w, full_matrices=False)
        d = u * np.where(np.arange(len(s)) == len(s) - 1, s[0], s[-1]) @ v
    else:
        d = kind(rng, *w.shape)
    size = 10 ** rng.uniform(-6, 2)
    return d * (size * np.linalg.norm(w) / (np.linalg.norm(d) or 1))


def widths(rng: Any, shape: str) -> list[int]:
    """n_0 .. n_L, L = 1 .. 5, widths 1 .. 6."""
    sizes = sorted(rng.integers(1, rng.choice([3, 7]), size=rng.integers(2, 7)).tolist())
    if shape == "tall":
        return sizes
    left = [n for n in sizes[1:] if shape == "wide" or rng.random() < 0.5]
    right = list(sizes)
    for n in left:
        right.remove(n)
    return [*right, *left[::-1]] if shape == "mountain" else [*left[::-1], *right]


KINDS = (*FAMILIES, rank_one, "along", "against", "none")


def random_pair(rng: Any, shape: str, only: Any = None) -> Pair:
    """Two networks; every layer of one family, and dW of one. One in four is where Lemma 3 is
    nearly sharp.
    """
    sizes, family = widths(rng, shape), only or FAMILIES[rng.integers(4)]
    kind = only or KINDS[rng.integers(len(KINDS))]
    if not only and rng.random() < 0.25:
        family, kind = conditioned, "against"
    weights = [family(rng, n, m) for m, n in pairwise(sizes)]
    changes = [change(rng, w, kind) for w in weights]
    output = bool(rng.random() < 0.7)
    sign = rng.choice([-1.0, 1.0])  # minus leaky relu is transmitted too
    slope = rng.choice(SLOPES)
    return pair(weights, changes, sign * slope, sign, output_nonlinearity=output)


def inputs(rng: Any, p: Pair) -> list[np.ndarray]:
    """A generic input, the weakest direction of W_1, and the two of the whole network."""
    x = rng.normal(size=p.widths[0])
    jacobian = p.before.jacobians(x)[0]
    weakest = np.linalg.svd(p.before.weights[0])[2][-1]
    v = np.linalg.svd(jacobian)[2][-1]
    return [x, weakest, v, -v]


# --- where a statement is guaranteed it holds -------------------------------------------------


def exact_measure(p: Pair, x: np.ndarray, bound: Bound) -> float:
    """What `measured` is, in rational arithmetic on the same float64 numbers."""
    f, j = zip(*(exact_net(net, x) for net in (p.before, p.after)), strict=True)
    a, b = f if bound.layer is None else (j[0][bound.layer], j[1][bound.layer])
    ratio = sum(((b - a) ** 2).ravel()) / sum((a**2).ravel())
    return float(ratio) if bound.name.startswith("v1") else math.sqrt(ratio)


def exact_net(net: Net, x: np.ndarray) -> tuple[Any, list[Any]]:
    """f(x) and J_0 .. J_L in fractions."""
    rational = np.vectorize(Fraction, otypes=[object])
    h, jacobians = rational(x), []
    for layer, w in enumerate(net.weights, start=1):
        linear = layer == net.depth and not net.output_nonlinearity
        slopes = (1.0, 1.0) if linear else (net.slope, net.slope_above)
        z = rational(w).dot(h)
        d = rational(np.where(z > 0, slopes[1], slopes[0]))
        h = d * z
        jacobians = [
            (d[:, None] * rational(w)).dot(j) for j in [*jacobians, rational(np.eye(w.shape[1]))]
        ]
    return h, [*jacobians, rational(np.eye(net.widths[-1]))]


def check(p: Pair, x: np.ndarray) -> int:
    """How many bounds are guaranteed; each of them holds, in exact arithmetic where it is close."""
    guaranteed = [b for b in trust.all_bounds(p, x) if b.guaranteed]
    for bound in guaranteed:
        measured = bound.measured
        assert measured is not None
        if measured > bound.value * (1 - 1e-7) > 0:
            measured = exact_measure(p, x, bound)
        assert measured <= bound.value * (1 + 1e-11), (bound, p.before, p.after, x)
    return len(guaranteed)


@settings(max_examples=200, deadline=None)
@given(seeds, st.sampled_from(["tall", "wide", "valley"]))
def test_guaranteed_bounds_hold(seed: int, shape: str) -> None:
    rng = np.random.default_rng(seed)
    p = random_pair(rng, shape)
    for x in inputs(rng, p):
        counted = check(p, x)
        assert counted >= 2 * p.before.depth  # version 1's Theorem 2 and our recursion ask least


def test_what_is_guaranteed() -> None:
    """Tall networks have every bound; others only those of part b)."""
    rng = np.random.default_rng(1)
    for sizes, functions, jacobians in (
        ((2, 2, 3), 4, 9),  # tall
        ((3, 2, 2), 0, 9),  # wide
        ((3, 2, 3), 0, 9),  # valley
        ((2, 3, 2), 0, 6),  # mountain: from l = 1 on it is wide
    ):
        shapes = [(n, m) for m, n in pairwise(sizes)]
        p = pair([rng.normal(size=s) for s in shapes], [rng.normal(size=s) for s in shapes], 0.5)
        bounds = [b for b in trust.all_bounds(p, rng.normal(size=sizes[0])) if b.guaranteed]
        assert len([b for b in bounds if b.layer is None]) == functions
        assert len([b for b in bounds if b.layer is not None]) == jacobians


@settings(max_examples=150, deadline=None)
@given(seeds, st.sampled_from(["tall", "wide", "valley"]))
def test_ours_are_never_above_the_printed(seed: int, shape: str) -> None:
    p = random_pair(np.random.default_rng(seed), shape)
    assert trust.without_perturbed(p).log_value <= trust.theorem_1a(p).log_value + 1e-12
    b = math.exp(p.gain[0]) if p.before.output_nonlinearity else 1.0
    for ours, printed in zip(trust.jacobian_recursion(p), trust.theorem_1b(p), strict=True):
        assert ours.value <= printed.value / b * (1 + 1e-9)


@pytest.mark.parametrize(("shape", "part"), [("wide", "a"), ("mountain", "a"), ("mountain", "b")])
def test_the_inputs_find_failures_where_there_are_some(shape: str, part: str) -> None:
    """The same networks and inputs break the printed statements outside their regime."""
    rng, broken = np.random.default_rng(1), 0
    for _ in range(150):
        p = random_pair(rng, shape, isometry)
        for x in inputs(rng, p):
            bounds = [trust.theorem_1a(p, x)] if part == "a" else trust.theorem_1b(p, x)
            broken += any((b.measured or 0) > b.value * (1 + 1e-9) for b in bounds)
            assert all(b.measured <= b.value * (1 + 1e-9) for b in bounds if b.guaranteed)
    assert broken > 3


@settings(max_examples=100, deadline=None)
@given(seeds)
def test_part_b_does_not_mind_biases(seed: int) -> None:
    rng = np.random.default_rng(seed)
    p = random_pair(rng, "valley")
    biases = [tuple(rng.normal(size=n) for n in p.widths[1:]) for _ in range(2)]
    nets = [
        dataclasses.replace(n, biases=b) for n, b in zip((p.before, p.after), biases, strict=True)
    ]
    biased, x = Pair(nets[0], nets[1]), rng.normal(size=p.widths[0])
    bounds = [b for b in trust.all_bounds(biased, x) if b.guaranteed]
    assert bounds
    assert all(b.layer is not None for b in bounds)
    assert all(b.measured <= b.value * (1 + 1e-9) for b in bounds if b.measured is not None)


@pytest.mark.parametrize("slope", [0.2, 1.0])
def test_attained(slope: float) -> None:
    """Version 2, Theorem 1 a) at equality, with a slope below 1 too."""
    b = trust.theorem_1a(pair([np.eye(2)], [[[0, 0.1], [-0.1, 0]]], slope), np.array([-1.0, 0]))
    assert b.guaranteed
    assert b.measured == pytest.approx(b.value)
    assert b.value == pytest.approx(0.1 / slope)


# --- the smallest counterexamples -------------------------------------------------------------

E1, E2, I2 = np.array([[1.0], [0]]), np.array([[0.0], [1]]), np.eye(2)
TALL, VALLEY = "tall (not printed)", "valley (not printed)"
MOUNTAIN = pair([E2, [1, 1]], [E2, [0, 1]])  # widths 1-2-1, dW_1 = W_1
FAILS: dict[str, tuple[Pair, Any, Callable[..., Any], float, float, str]] = {
    # name -> networks, x, statement, left side, right side, what is missing
    "1a 2-1": (pair([[1, 1]], [[1, 0]]), [1, 0], trust.theorem_1a, 1, math.sqrt(0.5), TALL),
    "1a 2-1 slope": (
        *(pair([[0, 1]], [[-1, -1]], 0.5), [-1, -1], trust.theorem_1a),
        *(3, math.sqrt(8), TALL),
    ),
    "ours, a) is for tall networks": (
        *(pair([[1, 1]], [[1, 0]]), [1, 0], trust.unconditional),
        *(1, math.sqrt(0.5), TALL),
    ),
    "v1 theorem 1": (pair([[0, 1]], [[1, 0]]), [2, -1], trust.theorem_1_v1, 4, 2, TALL),
    "v1 theorem 1, n* of 2": (
        *(pair([[1, 2]], [[-1, 0]]), [-1, 0], trust.theorem_1_v1),
        *(1, 0.4, TALL),
    ),
    "1b mountain": (MOUNTAIN, [1], trust.theorem_1b, 3, 1 + math.sqrt(2), VALLEY),
    "v1 theorem 2": (
        *(pair([[[1], [1]], [13, -12]], [0 * E1, [0, 12]]), [1], trust.theorem_2_v1),
        *(144, 16**2 * 144 / 313, VALLEY),
    ),
    "1a needs phi(0) = 0": (
        *(pair([1], [1], biases=([1.0],)), [-1.1], trust.theorem_1a),
        *(11, 1, "no bias"),
    ),
    "relu as alpha = beta": (
        *(pair([I2], [[[0, -0.1], [0.1, 0]]], 0.0), [0.1, -1], trust.theorem_1a),
        *(1, math.inf, "transmission (alpha > 0)"),
    ),
    "abs": (pair([1], [-3], -1.0), [1], trust.theorem_1a, 1, math.inf, "transmission (alpha > 0)"),
    "rank-one dW": (
        *(pair([I2], [[[1, 0], [0, 0]]]), [1, 0], trust.theorem_1a),
        *(1, math.inf, "conditioning (kappa finite)"),
    ),
    "rank-one dW above": (
        *(pair([E1, I2], [0 * E1, [[1, 0], [0, 0]]]), [1], trust.theorem_1a),
        *(1, math.inf, "conditioning (kappa finite)"),
    ),
}


@pytest.mark.parametrize("name", FAILS)
def test_counterexample(name: str) -> None:
    """The left side exceeds the right one, or the right one is infinite, and the flag says why."""
    p, x, statement, lhs, rhs, missing = FAILS[name]
    bound = statement(p, np.array(x, dtype=float))
    bound = bound if isinstance(bound, Bound) else bound[0]
    assert bound.measured == pytest.approx(lhs)
    assert bound.value == pytest.approx(rhs)
    assert bound.measured > bound.value or rhs == math.inf
    assert [k for k, v in bound.holds_assumptions.items() if not v] == [missing]
    assert not bound.guaranteed


def test_an_input_in_the_null_space() -> None:
    bound = trust.theorem_1a(pair([[1, 1]], [[1, 0]]), np.array([1.0, -1]))
    assert bound.measured == math.inf  # f(x) = 0
    assert not bound.guaranteed
    assert math.isnan(trust.theorem_1a(pair([[1, 1]], [[0, 0]]), np.array([1.0, -1])).measured or 0)
    at_zero = trust.theorem_1a(pair([1], [1]), np.zeros(1))
    assert [k for k, v in at_zero.holds_assumptions.items() if not v] == ["x is not 0"]


def test_part_b_is_not_zero_without_a_perturbation() -> None:
    """At dW = 0, slope 0.2, m = 2 layers: b^2 (b^2 - 1) = 600 for v2; for v1 it is positive too."""
    p = pair([I2, I2], [0 * I2, 0 * I2], 0.2)
    assert trust.theorem_1b(p)[0].value == pytest.approx(600)
    assert trust.theorem_2_v1(p)[0].value > 0
    assert trust.jacobian_recursion(p)[0].value == pytest.approx(4 * 5 + 5 * 4)
    assert trust.theorem_1a(p).value == 0
    assert [b[2].value for b in (trust.theorem_1b(p), trust.theorem_2_v1(p))] == [0, 0]


def test_one_half_is_a_model_of_relu_and_not_relu() -> None:
    """Only beta / alpha enters: phi(x) = x / 2 has the bounds of the identity; -x has alpha = 1."""
    d = [[0, -0.1], [0.1, 0]]
    half, whole = (pair([I2], [d], s, s) for s in (0.5, 1.0))
    assert trust.theorem_1a(half).value == trust.theorem_1a(whole).value == pytest.approx(0.1)
    relu = trust.theorem_1a(pair([I2], [d], 0.0), np.array([0.1, -1])).measured
    assert relu == pytest.approx(1)  # ten times that bound
    assert Net((I2,), -1.0, -1.0).transmission(1) == (1, 1)  # though phi' = -1 is below alpha
    assert Net((I2,), -1.0, 1.0).transmission(1) == (0, 1)


# --- wrong constants would be seen ------------------------------------------------------------


def test_kappa_must_be_squared() -> None:
    """M = diag(kappa, .., kappa, 1), dW along diag(1, .., 1, kappa), x = e_m."""
    w, d = np.diag([3.0] * 5 + [1]), 0.1 * np.diag([1.0] * 5 + [3])
    for statement in (trust.theorem_1a, trust.without_perturbed):
        bound = statement(pair([w], [d]), np.eye(6)[5])
        assert bound.guaranteed
        assert bound.measured is not None
        assert bound.value / 3 < bound.measured < bound.value


def test_the_square_root_of_nbar_must_stay() -> None:
    bound = trust.unconditional(pair([I2], [[[1, 0], [0, 0]]]), np.array([1.0, 0]))
    assert bound.guaranteed
    assert bound.measured == pytest.approx(bound.value) == 1  # without sqrt(2): 0.7071


def test_alpha_and_beta_of_version_one_are_squares() -> None:
    bound = trust.theorem_1_v1(pair([1], [-11], 0.1), np.array([-1.0]))
    assert bound.guaranteed
    assert bound.measured == pytest.approx(10201)
    assert bound.value == pytest.approx(24200)  # with alpha = 0.1: 2420


def test_kappa_of_version_two_is_over_the_changes_too() -> None:
    """A reflection, kappa(W) = kappa(W~) = 1, would give 1.4142 below 2."""
    reflection = pair([I2], [np.diag([-2, 0])])
    assert reflection.kappa[:2].tolist() == [[1], [1]]
    for d, bound in ((0, math.inf), (1e-3, 4e6 * math.sqrt(2))):
        for statement in (trust.theorem_1a, trust.without_perturbed):
            got = statement(pair([I2], [np.diag([-2, d])]), np.array([1.0, 0]))
            assert got.guaranteed == (d > 0)
            assert (got.measured, got.value) == pytest.approx((2, bound), rel=1e-5)
    assert trust.deep_relative_trust({"w": reflection.relative}) == pytest.approx(math.sqrt(2))


def test_the_perturbed_matrix_needs_no_condition_number() -> None:
    """W~ = 0, of no finite kappa: ours is attained where the printed bound is infinite."""
    p = pair([I2], [-I2])
    ours = trust.without_perturbed(p, np.ones(2))
    assert ours.guaranteed
    assert ours.measured == pytest.approx(ours.value) == 1
    assert trust.theorem_1a(p).value == math.inf


def test_an_unchanged_layer_has_no_condition_number() -> None:
    p = pair([I2, I2], [0 * I2, 0.1 * I2])
    assert trust.theorem_1a(p).value == pytest.approx(0.1)
    assert trust.theorem_1a(p).guaranteed


def test_part_b_speaks_of_the_layers_above() -> None:
    """A deficient or wide first layer spoils l = 0, and leaves l = 1 as it was."""
    p = pair([np.ones((2, 3)), np.diag([2, 1])], [np.ones((2, 3)), 0.1 * np.diag([2, 1])], 0.5)
    for bounds in (trust.theorem_1b(p), trust.theorem_2_v1(p), trust.jacobian_recursion(p)):
        assert [b.guaranteed for b in bounds] == [False, True, True]
        assert bounds[0].value == math.inf
    assert trust.theorem_1b(p)[1].value == pytest.approx(2 * 4 * (2 * 1.1 - 1))
    assert trust.theorem_2_v1(p)[1].value == pytest.approx(16**2 * (2 * 1.01 - 1))
    assert trust.jacobian_recursion(p)[1].value == pytest.approx(math.sqrt(2) * 2 * 1.2)


def test_the_largest_width_of_version_one_leaves_the_input_out() -> None:
    """Widths 2-1: n* = 1 in both theorems."""
    p = pair([np.eye(1, 2)], [0.1 * np.eye(1, 2)])
    assert trust.theorem_1_v1(p).value == pytest.approx(2 * 0.01)
    assert trust.theorem_2_v1(p)[0].value == pytest.approx(2**2 * 0.01)


def test_networks_on_every_library(backend: backends.Backend) -> None:
    rng = np.random.default_rng(0)
    params, x = (
        {"0/weight": rng.normal(size=(3, 2)), "0/bias": rng.normal(size=3)},
        rng.normal(size=2),
    )
    on_device = {name: backend.asarray(p) for name, p in params.items()}
    nets = [Net.from_params(p, "leaky_relu") for p in (params, on_device)]
    bound = trust.theorem_1a(Pair(nets[0], nets[1]), backend.asarray(x))
    assert (bound.measured, bound.value) == (0, 0)


@pytest.mark.parametrize("scale", [1e-250, 1e-150, 1e150, 1e250])
def test_scale_does_not_matter(scale: float) -> None:
    w, d = np.diag([3.0, 1]), np.diag([0.1, 0.2])
    bounds = [trust.all_bounds(pair([s * w], [s * d]), np.ones(2)) for s in (1.0, scale)]
    for one, other in zip(*bounds, strict=True):
        assert (other.measured, other.value) == pytest.approx((one.measured, one.value))


def test_networks_whose_numbers_overflow() -> None:
    """f(x) is 1e600, its relative change 7 all the same; infinite weights do not warn."""
    p = pair([1e200 * I2] * 3, [1e200 * I2] * 3)
    assert [b.measured for b in trust.all_bounds(p, np.ones(2))[:4]] == pytest.approx([7, 7, 7, 49])
    p = pair([np.full((2, 2), math.inf)], [I2], biases=(np.ones(2),))
    assert not any(b.guaranteed for b in trust.all_bounds(p, np.ones(2)) if b.layer != 1)


def test_the_recursion_starts_where_the_network_is_narrowest() -> None:
    """In a wide network the innermost layer is the last: another order gives another number."""
    wide = pair([np.eye(2, 3), np.eye(1, 2)], [2 * np.eye(2, 3), 0 * np.eye(1, 2)], 0.5)
    # D = b - 1 = 1 for W_2, then 2 [(2 (1 + 2) - 1) 2 + 2 1 ...] with c = 1
    assert trust.jacobian_recursion(wide)[0].value == pytest.approx(5 * 2 + 2 * 1)
    tall = pair([np.eye(2, 1), np.eye(3, 2)], [0 * np.eye(2, 1), 2 * np.eye(3, 2)], 0.5)
    assert trust.jacobian_recursion(tall)[0].value == pytest.approx(5 * 2 + 2 * 1)


def test_the_recursion_is_attained_by_a_rank_one_change() -> None:
    """W_2 = I becomes a reflection: c_2 = sqrt(2), where kappa(W_2) = 1 would give 1.4142 < 2."""
    bound = trust.jacobian_recursion(pair([E1, I2], [0 * E1, np.diag([-2, 0])]), np.ones(1))[0]
    assert bound.guaranteed
    assert (bound.measured, bound.value) == pytest.approx((2, 2))


# --- Proposition 1 and the network ------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(seeds, st.sampled_from(["tall", "wide", "valley"]))
def test_jacobians(seed: int, shape: str) -> None:
    """Proposition 1 beside autograd and the complex step, from every layer."""
    rng = np.random.default_rng(seed)
    p = random_pair(rng, shape)
    net = dataclasses.replace(p.before, biases=tuple(rng.normal(size=n) for n in p.widths[1:]))
    h, jacobians = rng.normal(size=p.widths[0]), net.jacobians
    for layer, got in enumerate(jacobians(x := h)):
        size = np.linalg.norm(got)
        by_autograd = autograd.jacobian(lambda h, layer=layer: rest(net, layer, h, anp))(h)
        steps = [rest(net, layer, h + 1e-30j * e, np).imag / 1e-30 for e in np.eye(len(h))]
        np.testing.assert_allclose(got, by_autograd, atol=1e-13 * size)
        np.testing.assert_allclose(got, np.stack(steps, axis=1), atol=1e-13 * size)
        h = rest(net, layer, h, np, layers=1)
    np.testing.assert_allclose(net(x), rest(net, 0, x, np), rtol=1e-13)


def rest(net: Net, layer: int, h: Any, xp: Any, layers: int | None = None) -> Any:
    """The layers above `layer`, all or some, written out."""
    stop = net.depth if layers is None else min(layer + layers, net.depth)
    for k in range(layer, stop):
        z = xp.dot(net.weights[k], h) + net.biases[k]
        linear = k == net.depth - 1 and not net.output_nonlinearity
        h = z if linear else xp.where(xp.real(z) > 0, net.slope_above * z, net.slope * z)
    return h


@pytest.mark.parametrize("nonlinearity", ["identity", "leaky_relu", "relu"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("output", [False, True])
def test_net_from_the_parameters_of_a_model(nonlinearity: str, bias: bool, output: bool) -> None:
    model = MLP(3, 5, 4, 2, bias, nonlinearity, output)
    params = model.init(seed=3, dtype="float64")
    params = {n: p + 0.1 for n, p in params.items()}  # biases start at zero
    net = Net.from_params(params, nonlinearity, output_nonlinearity=output)
    x = np.random.default_rng(0).normal(size=4)
    np.testing.assert_allclose(net(x), model(params, x[None])[0], rtol=1e-13)
    assert net.widths == (4, 5, 5, 2)


def test_errors() -> None:
    ok = {"0/weight": np.eye(2)}
    for params, name, message in (
        (ok, "tanh", "nonlinearity 'tanh'; the theorems know identity, leaky_relu, relu"),
        ({**ok, "0/gain": np.ones(2)}, "relu", "expected matrices NAME/weight .* multilayer"),
        ({"0/weight": np.ones((2, 2, 3, 3))}, "relu", "expected matrices NAME/weight"),
        ({}, "relu", "got no weights"),
        ({**ok, "1/weight": np.ones((2, 3))}, "relu", "layer 1 has 2 outputs and layer 2 takes 3"),
        ({**ok, "0/bias": np.ones(3)}, "relu", "one bias of n_l numbers for every layer, or none"),
    ):
        with pytest.raises(Error, match=message):
            Net.from_params(params, name)
    with pytest.raises(Error, match=r"an input of shape \(3,\); expected one example \(2,\)"):
        Net((I2,))(np.ones(3))
    with pytest.raises(Error, match=r"widths \(2, 2\) and \(1, 2\); give two networks"):
        Pair(Net((I2,)), Net((E1,)))
    with pytest.raises(Error, match=r"nonlinearities \(1.0, 1.0, True\) and \(0.5, 1.0, True\)"):
        Pair(Net((I2,)), Net((I2,), 0.5))


def test_depth_one_thousand() -> None:
    """Constants of 10^2000 and more overflow in `value`, not in `log_value`, and never to NaN."""
    deep = pair([np.diag([3.0, 1])] * 1000, [0.1 * np.diag([3.0, 1])] * 1000, 0.1)
    for bound in trust.all_bounds(deep):
        assert bound.measured is None
        assert bound.guaranteed
        assert not math.isnan(bound.value)
        if bound.layer is None or bound.layer < 500:
            assert 1000 < bound.log_value < 1e5
            assert bound.value == math.inf


def test_infinite_constants_never_give_nan() -> None:
    for weights, changes, slope in (
        ([I2 * 0, I2], [I2, 0 * I2], 0.5),
        ([np.ones((2, 2))] * 2, [0 * I2] * 2, 0.5),
        ([I2] * 2, [0 * I2] * 2, 0.0),
        ([I2 * np.nan, I2], [I2, I2], 0.5),
    ):
        bounds = trust.all_bounds(pair(weights, changes, slope))
        assert not any(math.isnan(b.value) for b in bounds)
        assert not any(b.guaranteed and b.value == math.inf for b in bounds)


# --- lemmas -----------------------------------------------------------------------------------


def holds(inequality: trust.Inequality) -> bool:
    return inequality.lhs <= inequality.rhs * (1 + 1e-9)


def two_matrices(rng: Any, tall: bool) -> tuple[np.ndarray, np.ndarray]:
    n, m = sorted(rng.integers(1, 7, size=2).tolist(), reverse=tall)
    family = FAMILIES[rng.integers(4)]
    return family(rng, n, m), family(rng, n, m)


@settings(max_examples=150, deadline=None)
@given(seeds, st.booleans())
def test_lemma_3(seed: int, tall: bool) -> None:
    """Version 2, with the printed and the best constant; any shape for Y in the row space of M."""
    rng = np.random.default_rng(seed)
    a, b = two_matrices(rng, tall)
    left, right = np.linalg.svd(b)[2][0][:, None], np.linalg.svd(a, full_matrices=False)[2]
    for x, y in (
        (left, right[-1:].T),
        (rng.normal(size=left.shape), right.T @ rng.normal(size=(len(right), 2))),
    ):
        printed, ours = (trust.lemma_3(a, b, x, y, ours=flag) for flag in (False, True))
        assert printed.guaranteed == tall or a.shape[0] == a.shape[1]
        assert holds(printed)
        assert holds(ours)
        assert ours.rhs <= printed.rhs * (1 + 1e-12)


def test_lemma_3_best_constant_and_counterexample() -> None:
    a, b = np.diag([3.0, 3, 3, 1]), np.diag([3.0, 1, 1, 1])
    ours = trust.lemma_3(a, b, np.eye(4)[:, :1], np.eye(4)[:, 3:], ours=True)
    assert ours.lhs == pytest.approx(ours.rhs)
    assert ours.rhs < trust.lemma_3(a, b, np.eye(4)[:, :1], np.eye(4)[:, 3:]).rhs
    m, x, y = np.array([[1.0, 0]]), E1, np.ones((2, 1))
    wide = trust.lemma_3(m, m, x, y)
    assert (wide.lhs, wide.rhs) == pytest.approx((1, math.sqrt(0.5)))
    assert not wide.guaranteed
    assert trust.lemma_3(m, m, x, E2).lhs == math.inf


@settings(max_examples=100, deadline=None)
@given(seeds, st.booleans())
def test_lemmas_1_3_and_4_of_version_one(seed: int, tall: bool) -> None:
    rng = np.random.default_rng(seed)
    a, b = two_matrices(rng, tall)
    assert holds(trust.lemma_3_v1([a, b, a]))
    equal = trust.lemma_3_v1([a, a])
    assert equal.lhs == pytest.approx(equal.rhs)
    weakest = np.linalg.svd(a)[2][-1]
    lower, upper = trust.lemma_1_v1(a, weakest)
    lower_4, upper_4 = trust.lemma_4_v1(a, rng.normal(size=(a.shape[1], 3)))
    assert holds(upper)
    assert holds(upper_4)
    assert lower.guaranteed == lower_4.guaranteed == (a.shape[0] >= a.shape[1])
    assert holds(lower) or not lower.guaranteed
    assert holds(lower_4) or not lower_4.guaranteed


def test_lemmas_1_and_4_need_rows() -> None:
    for lower, _ in (
        trust.lemma_1_v1(np.array([[1.0, 0]]), E2[:, 0]),
        trust.lemma_4_v1(np.array([[1.0, 0]]), E2),
    ):
        assert (lower.lhs, lower.rhs, lower.guaranteed) == (1, 0, False)


@settings(max_examples=100, deadline=None)
@given(seeds, st.sampled_from(["tall", "wide", "valley"]))
def test_lemmas_2_and_5_of_version_one(seed: int, shape: str) -> None:
    rng = np.random.default_rng(seed)
    p = random_pair(rng, shape)
    for ours in (False, True):
        product = trust.lemma_5_v1(p.before.weights, p.changes, ours=ours)
        assert product.guaranteed or np.max(p.kappa[0]) == math.inf
        assert holds(product)
    for x in inputs(rng, p):
        magnitude = trust.lemma_2_v1(p, x)
        assert holds(magnitude) or not magnitude.guaranteed


def test_lemmas_2_and_5_attained_and_counterexamples() -> None:
    once = trust.lemma_5_v1([np.eye(1)] * 3, [np.eye(1)] * 3, ours=True)
    assert once.lhs == pytest.approx(once.rhs)  # dW = W: (2^L - 1)^2
    w = np.diag([2.0, 1])
    printed = trust.lemma_5_v1([w], [0.1 * w])
    assert printed.rhs == pytest.approx(2 * 2 * 4 * 0.01)  # 2^L nbar kappa^2 r^2
    doubled = trust.lemma_2_v1(pair([1, 1], [1, 1]), np.ones(1))
    assert doubled.lhs == pytest.approx(doubled.rhs) == 16
    mountain = trust.lemma_5_v1(MOUNTAIN.before.weights, MOUNTAIN.changes)
    assert (mountain.lhs, mountain.rhs) == pytest.approx((9, 8))
    assert not mountain.guaranteed
    with pytest.raises(Error, match="differ in number or shape"):
        trust.lemma_5_v1([I2], [E1])


sizes = st.floats(1e-3, 1e3) | st.floats(-1e3, -1e-3)


@settings(deadline=None)
@given(sizes, sizes, sizes, sizes)
def test_scalar_networks(a: float, da: float, b: float, db: float) -> None:
    """Equation 3 of version 2, and the factor 3 of version 1."""
    assert holds(trust.scalar_two_layers(a, da, b, db))
    assert holds(trust.scalar_two_layers_v1(a, da, b, db))
    direct = abs((a + da) * (b + db) - a * b) / abs(a * b)
    assert trust.scalar_two_layers(a, da, b, db).lhs == pytest.approx(direct, abs=1e-6)


def test_scalar_networks_attained() -> None:
    up, three = trust.scalar_two_layers(2, 1, 3, 6), trust.scalar_two_layers_v1(2, 2, -3, -3)
    assert up.lhs == up.rhs == 3.5
    assert three.lhs == three.rhs == 9
