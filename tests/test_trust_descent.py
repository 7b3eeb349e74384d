"""Descent under deep relative trust: the lemmas on real nets and on families where they are sharp,
against mpmath and plain NumPy, and the counterexamples to what is only a model."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import backends
import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import npdrt
from npdrt import ops, optim, trust
from npdrt.errors import Error
from npdrt.models import MLP

Params = dict[str, Any]
LARGEST = 3.4028234663852886e38  # of float32
mpmath.mp.dps = 60


def scalars(**values: float) -> Params:
    """Layers of one number, as matrices."""
    return {name: np.array([[float(value)]]) for name, value in values.items()}


@cache
def digits() -> tuple[Any, Any]:
    """Thirty real digits."""
    data = npdrt.data.load("digits")
    return data.x[:30].reshape(30, -1).astype(np.float64), data.y[:30]


def network(seed: int, depth: int, nonlinearity: str, bias: bool) -> tuple[Any, Params]:
    """The loss and gradients of a perceptron on the digits as a function of its parameters."""
    model = MLP(depth=depth, width=12, inputs=64, outputs=10, nonlinearity=nonlinearity, bias=bias)
    params = model.init(seed=seed, dtype="float64")
    differentiated = npdrt.value_and_grad(lambda p, x, y: ops.softmax_cross_entropy(model(p, x), y))
    return lambda p: differentiated(p, *digits()), params


def perturbations(seed: int, params: Params, gradient: Params, size: float) -> Params:
    """A random change of every layer that leans towards its negative gradient."""
    rng = np.random.default_rng(seed)
    found = {}
    for name, w in params.items():
        g, noise = gradient[name], rng.normal(size=w.shape)
        lean = rng.uniform(-0.5, 1.5)
        d = noise / np.linalg.norm(noise) - lean * g / max(np.linalg.norm(g), 1e-300)
        found[name] = size * rng.uniform(0.1, 1) * max(np.linalg.norm(w), 0.1) * d
    return found


NETS = st.tuples(
    st.integers(0, 10**6),
    st.integers(1, 5),
    st.sampled_from(["tanh", "softplus", "leaky_relu"]),
    st.booleans(),
)
SIZES = st.floats(-5, 0.5).map(lambda k: 10.0**k)


# --- Lemma 1 ----------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(NETS, SIZES)
def test_lemma_1_on_real_nets(net: tuple[int, int, str, bool], size: float) -> None:
    value_and_gradient, params = network(*net)
    _, gradient = value_and_gradient(params)
    change = perturbations(net[0], params, gradient, size)
    found = trust.descent_bound(value_and_gradient, params, change)
    assert found.holds
    assert found.steepest_holds
    assert found.slack < 1e-11 * max(1.0, found.bound)
    assert not found.guarantees_descent  # a grid alone cannot know


def test_lemma_1_written_out() -> None:
    """Every field against plain NumPy on a two-layer net with a hand-made gradient."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(7, 4)), rng.normal(size=(7, 2))
    params = {"v": rng.normal(size=(3, 4)), "w": rng.normal(size=(2, 3))}
    change = {"v": 0.1 * rng.normal(size=(3, 4)), "w": 0.1 * rng.normal(size=(2, 3))}

    def hand_made(p: Params) -> tuple[Any, Params]:
        h = np.tanh(x @ p["v"].T)
        e = h @ p["w"].T - y
        gh = (e @ p["w"]) * (1 - h * h)
        return 0.5 * np.sum(e * e), {"v": gh.T @ x, "w": e.T @ h}

    loss, g = hand_made(params)
    for name in params:  # the gradient itself, by finite differences
        for index in np.ndindex(params[name].shape):
            step = np.zeros_like(params[name])
            step[index] = 1e-5
            ends = [hand_made({**params, name: params[name] + s * step})[0] for s in (1, -1)]
            assert (ends[0] - ends[1]) / 2e-5 == pytest.approx(g[name][index], rel=1e-6, abs=1e-8)
    moved = [hand_made({n: params[n] + t / 5 * change[n] for n in params})[1] for t in range(1, 6)]
    size = {n: np.sqrt(np.sum(change[n] ** 2)) for n in params}
    slope = {n: np.sqrt(np.sum(g[n] ** 2)) for n in params}
    cosine = {n: -np.sum(change[n] * g[n]) / size[n] / slope[n] for n in params}
    off = {n: [np.sqrt(np.sum((m[n] - g[n]) ** 2)) for m in moved] for n in params}
    breakdown = {n: max(off[n]) / slope[n] for n in params}
    bound = -sum(slope[n] * size[n] * (cosine[n] - breakdown[n]) for n in params)
    distance = max(math.hypot(*both) for both in zip(*off.values(), strict=True))
    distance *= math.hypot(*size.values())
    descent = sum(np.sum(g[n] * change[n]) for n in params)

    found = trust.descent_bound(hand_made, params, change, points=5)
    after = hand_made({n: params[n] + change[n] for n in params})[0]
    assert found.change == pytest.approx(after - loss, rel=1e-12)
    assert found.bound == pytest.approx(bound, rel=1e-12)
    assert found.steepest_bound == pytest.approx(descent + distance, rel=1e-12)
    assert found.cosines == pytest.approx(cosine, rel=1e-12)
    assert found.breakdown == pytest.approx(breakdown, rel=1e-12)
    assert found.grid == (0.2, 0.4, 0.6, 0.8, 1.0)
    assert bound < found.change + distance  # both forms are worth having
    alone = trust.steepest_descent_distance(hand_made, params, change, points=5)
    assert alone == pytest.approx(distance, rel=1e-12)
    measured = trust.gradient_breakdown(g, moved[-1])
    assert measured == pytest.approx({n: off[n][-1] / slope[n] for n in params}, rel=1e-12)


@settings(deadline=None)
@given(st.integers(0, 10**6), st.floats(0.01, 100))
def test_quadratics_use_half_of_the_bound(seed: int, curvature: float) -> None:
    """c |w|^2 / 2: H dW is parallel to dW, and the change of the gradient adds exactly half of what
    Lemma 1 allows for it."""
    rng = np.random.default_rng(seed)
    params, change = ({"w": rng.normal(size=(2, 3))} for _ in range(2))

    def quadratic(p: Params) -> tuple[Any, Params]:
        return curvature / 2 * np.sum(p["w"] ** 2), {"w": curvature * p["w"]}

    found = trust.descent_bound(quadratic, params, change)
    descent = curvature * np.sum(params["w"] * change["w"])
    for bound in (found.bound, found.steepest_bound):
        assert (found.change - descent) / (bound - descent) == pytest.approx(0.5, rel=1e-9)


@settings(deadline=None)
@given(st.integers(0, 10**6), st.booleans())
def test_quadratics_use_at_most_half_of_the_bound(seed: int, aligned: bool) -> None:
    """w'Hw / 2 in two layers: at most half; half where H dW is parallel to dW in each layer."""
    rng = np.random.default_rng(seed)
    h = rng.normal(size=(6, 6))
    h = h @ h.T
    params = {n: rng.normal(size=(1, 3)) for n in "ab"}
    change = {n: rng.normal(size=(1, 3)) for n in "ab"}
    if aligned:
        h = np.diag(np.repeat(rng.uniform(0.1, 5, size=2), 3))

    def quadratic(p: Params) -> tuple[Any, Params]:
        w = np.concatenate([p["a"][0], p["b"][0]])
        g = h @ w
        return w @ g / 2, {"a": g[None, :3], "b": g[None, 3:]}

    found = trust.descent_bound(quadratic, params, change)
    descent = sum(np.sum(g * change[n]) for n, g in quadratic(params)[1].items())
    share = float((found.change - descent) / (found.bound - descent))
    assert share <= 0.5 * (1 + 1e-9)
    assert (abs(share - 0.5) < 1e-9) == aligned


def spiked(p: Params) -> tuple[Any, Params]:
    """-w, but for a rise between two points of the grid of 16: the loss ends higher."""
    w = float(p["w"][0, 0])
    low, high = 0.51, 0.55
    inside = min(max(w - low, 0.0), high - low)
    steep = 200.0 * (low < w < high)
    return np.float64(-w + 200.0 * inside), {"w": np.array([[-1.0 + steep]])}


def test_a_grid_cannot_guarantee_descent() -> None:
    """All 17 gradients agree, the bound is -1, and the loss rises by 7."""
    found = trust.descent_bound(spiked, scalars(w=0.0), scalars(w=1.0))
    assert found.bound == -1
    assert found.change > 6
    assert not found.guarantees_descent
    assert not found.holds
    steep = trust.descent_bound(spiked, scalars(w=0.0), scalars(w=1.0), lipschitz=1e9)
    assert steep.holds
    assert not steep.guarantees_descent


@settings(deadline=None, max_examples=200)
@given(st.integers(0, 10**6), st.floats(0.2, 60), st.floats(-4, 0.5), st.floats(-140, 140))
def test_descent_is_guaranteed_by_a_lipschitz_constant(
    seed: int, frequency: float, size: float, scale: float
) -> None:
    """Waves a cos(k w) / k^2, whose gradient has Lipschitz constant |a|, shorter and longer than
    the grid's step: where descent is guaranteed the loss falls, at any scale of the loss."""
    rng = np.random.default_rng(seed)
    a, k = 10**scale * rng.normal(size=(2, 3)), frequency * rng.uniform(0.1, 1, size=(2, 3))

    def waves(p: Params) -> tuple[Any, Params]:
        angles = [k[n] * p["vw"[n]] for n in (0, 1)]
        values = [np.sum(a[n] * np.cos(angles[n]) / k[n] ** 2) for n in (0, 1)]
        return values[0] + values[1], {"vw"[n]: -a[n] * np.sin(angles[n]) / k[n] for n in (0, 1)}

    params = {n: rng.normal(size=3) for n in "vw"}
    gradient = waves(params)[1]
    step = 10**size / 10**scale
    change = {n: -step * g * rng.uniform(0.5, 1, size=3) for n, g in gradient.items()}
    found = trust.descent_bound(waves, params, change, lipschitz=float(np.max(np.abs(a))))
    assert found.holds
    assert found.steepest_holds
    if found.guarantees_descent:
        assert found.change < 0


def test_descent_is_guaranteed_often_enough() -> None:
    """w^2 / 2 with its constant: small steps against the gradient."""

    def loss(p: Params) -> tuple[Any, Params]:
        return np.sum(p["w"] ** 2) / 2, {"w": p["w"]}

    for eta, falls in ((0.1, True), (0.8, True), (1.1, False)):
        found = trust.descent_bound(loss, scalars(w=3.0), scalars(w=-3 * eta), lipschitz=1.0)
        assert bool(found.guarantees_descent) == falls
    assert not trust.descent_bound(
        loss, scalars(w=math.nan), scalars(w=1.0), lipschitz=1.0
    ).guarantees_descent


def test_lemma_1_is_nearly_sharp() -> None:
    """L' = 1 + w / (w + eps) takes its whole change at once; its grid maximum is at t = 1."""
    eps = 1e-4

    def steep(p: Params) -> tuple[Any, Params]:
        w = float(p["w"][0, 0])
        return np.float64(2 * w - eps * math.log1p(w / eps)), {"w": np.array([[1 + w / (w + eps)]])}

    found = trust.descent_bound(steep, scalars(w=0.0), scalars(w=1.0))
    assert 0.999 < (found.change - 1) / (found.bound - 1) <= 1


def test_a_layer_without_gradient() -> None:
    """g_l = 0 is 0/0 as printed; multiplied in, the layer adds what its gradient became."""

    def loss(p: Params) -> tuple[Any, Params]:
        a, b = p["a"][0, 0], p["b"][0, 0]
        return np.float64(a + b * b / 2), scalars(a=1.0, b=b)

    found = trust.descent_bound(loss, scalars(a=1.0, b=0.0), scalars(a=-1.0, b=0.5))
    assert (found.change, found.bound) == (-0.875, -0.75)
    assert found.holds
    assert not found.guarantees_descent
    assert trust.descent_bound(
        loss, scalars(a=1.0, b=0.0), scalars(a=-1.0, b=0.5), lipschitz=1.0
    ).guarantees_descent
    assert found.cosines["a"] == 1
    assert math.isnan(found.cosines["b"])
    assert found.breakdown == {"a": 0, "b": math.inf}
    still = trust.descent_bound(loss, scalars(a=1.0, b=0.0), scalars(a=0.0, b=0.0))
    assert (still.change, still.bound, bool(still.holds)) == (0, 0, True)
    assert not still.guarantees_descent


def test_a_lipschitz_gradient_allows_the_whole_square() -> None:
    """v1 section 2: a gradient of Lipschitz constant 2/eta gives |dw|^2/eta, not half of it."""
    eta = 1.0

    def loss(p: Params) -> tuple[Any, Params]:
        return np.sum(p["w"] ** 2) / eta, {"w": 2 * p["w"] / eta}

    at, change = scalars(w=0.0), scalars(w=1.0)
    assert trust.steepest_descent_distance(loss, at, change) == 2 / eta
    found = trust.descent_bound(loss, at, change)
    assert found.change == 1 / eta > 1 / (2 * eta)
    assert found.holds


# --- angles and directions --------------------------------------------------------------------


@given(st.integers(0, 10**6))
def test_cosines(seed: int) -> None:
    rng = np.random.default_rng(seed)
    d, g = ({"w": rng.normal(size=(3, 2)) * 10.0 ** rng.integers(-9, 9)} for _ in range(2))
    a, b = (mpmath.matrix(list(map(float, z["w"].ravel()))) for z in (d, g))
    exact = -mpmath.fdot(a, b) / (mpmath.norm(a) * mpmath.norm(b))
    assert trust.cosines(d, g)["w"] == pytest.approx(float(exact), rel=1e-12, abs=1e-15)
    assert 1 - 1e-15 < trust.cosines({"w": -3 * g["w"]}, g)["w"] <= 1
    assert -1 <= trust.cosines({"w": g["w"] / 7}, g)["w"] < -1 + 1e-15


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_layerwise_direction(dtype: str) -> None:
    """As long as the layer, against its gradient; zero without one; no ratio overflows."""
    rng = np.random.default_rng(1)
    params = {name: rng.normal(size=(4, 3)).astype(dtype) for name in "abc"} | {
        "zero": np.zeros((4, 3), dtype)
    }
    gradient = {
        "a": rng.normal(size=(4, 3)).astype(dtype),
        "b": np.zeros((4, 3), dtype),
        "c": np.full((4, 3), 1e-38, dtype),
        "zero": np.ones((4, 3), dtype),
    }
    found = trust.layerwise_direction(params, gradient)
    assert {d.dtype.name for d in found.values()} == {dtype}
    assert not found["b"].any()
    assert not found["zero"].any()
    for name in "ac":
        assert np.linalg.norm(found[name]) == pytest.approx(np.linalg.norm(params[name]), rel=1e-6)
        assert trust.cosines(found, gradient)[name] == pytest.approx(1, abs=1e-6)
    found["a"] *= 0.01  # the step of Eq. (5), which Fromage takes but for its prefactor
    step = optim.fromage(lr=0.01).update(params, gradient, optim.fromage().init(params))[0]["a"]
    assert step * math.sqrt(1.0001) == pytest.approx(params["a"] + found["a"], rel=1e-5, abs=1e-6)


def test_every_library(backend: backends.Backend) -> None:
    """The same numbers from each, and arrays of its own."""
    rng = np.random.default_rng(2)
    host = [{n: rng.normal(size=(3, 2)) for n in "ab"} for _ in range(2)]

    def loss(p: Params) -> tuple[Any, Params]:
        xp = npdrt.arrays.namespace(*p.values())
        return xp.sum(p["a"] * p["a"] * p["b"]), {"a": 2 * p["a"] * p["b"], "b": p["a"] * p["a"]}

    def numbers(params: Params, change: Params) -> list[Any]:
        bound = trust.descent_bound(loss, params, change)
        gap = trust.trust_model_gap(loss, params, change)
        direction = trust.layerwise_direction(params, loss(params)[1])
        step = trust.finite_depth_update(params["a"], change["a"], 0.1, 3)
        worst = trust.descent_threshold(bound.cosines["a"], 5)
        scalars = [bound.change, bound.bound, bound.steepest_bound, bound.slack, gap.allowed]
        flags = [bound.holds, bound.steepest_holds, *gap.holds.values()]
        layers = [*bound.cosines.values(), *bound.breakdown.values(), *gap.measured.values()]
        return [*scalars, *flags, *layers, *direction.values(), step, worst]

    found = numbers(*({n: backend.asarray(a) for n, a in p.items()} for p in host))
    for ours, plain in zip(found, numbers(*host), strict=True):
        assert type(ours) is type(backend.asarray(np.zeros(1)[0:1])) or backend.xp is np
        assert backend.to_host(ours) == pytest.approx(plain, rel=1e-14)


# --- Lemma 2 ----------------------------------------------------------------------------------

COSINES = [1e-12, 0.01, 0.3, 0.9, 1.0]
DEPTHS = [1, 2, 3, 16, 50, 1000, 10**6]


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("cosine", [-1.0, -0.4, 0.0, *COSINES])
def test_descent_threshold(cosine: float, depth: int) -> None:
    exact = (1 + mpmath.mpf(cosine)) ** (mpmath.mpf(1) / depth) - 1
    assert trust.descent_threshold(cosine, depth) == pytest.approx(float(exact), rel=1e-15)


def test_descent_threshold_of_many() -> None:
    found = trust.descent_threshold(np.array([[1.0, 0.5], [0.0, np.nan]]), 1)
    assert found[:, 0].tolist() == [1.0, 0.0]
    assert found[0, 1] == pytest.approx(0.5, rel=1e-15)
    assert math.isnan(found[1, 1])


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("cosine", COSINES)
def test_weaker_threshold(cosine: float, depth: int) -> None:
    """The root at 60 digits, with the mean of the breakdown as an integral."""

    def mean(eta: Any) -> Any:
        return ((1 + eta) ** (depth + 1) - 1) / ((depth + 1) * eta) - 1

    found = trust.weaker_threshold(cosine, depth)
    low, high = trust.descent_threshold(cosine, depth), 2 * cosine / depth
    exact = mpmath.findroot(
        lambda eta: mean(eta) - cosine, (mpmath.mpf(float(low)), mpmath.mpf(high)), solver="ridder",
        tol=1e-60, verify=False,
    ) if depth > 1 else mpmath.mpf(2 * cosine)  # fmt: skip
    assert found == pytest.approx(float(exact), rel=1e-15)
    assert low <= found <= high
    integral = mpmath.quad(lambda t: (1 + t * mpmath.mpf(found)) ** depth - 1, [0, 1])
    assert float(integral) == pytest.approx(cosine, rel=1e-13)


def test_weaker_threshold_at_its_ends() -> None:
    assert [trust.weaker_threshold(c, 3) for c in (-1.0, -0.1, 0.0)] == [0, 0, 0]
    assert [trust.weaker_threshold(c, 1) for c in (0.25, 1.0)] == [0.5, 2.0]
    depth = 10**6  # (e^x - 1) / x = 2 at x = 1.2564
    limit = mpmath.findroot(lambda x: mpmath.expm1(x) / x - 2, 1.2)
    assert trust.weaker_threshold(1.0, depth) * depth == pytest.approx(float(limit), rel=1e-6)


def product(p: Params, c: complex) -> tuple[Any, Params]:
    """Re(c prod w_l), w_l = x + iy as (x, y); a loss that obeys deep relative trust."""
    numbers = {n: complex(*w[0]) for n, w in p.items()}
    others = {n: c * math.prod(v for m, v in numbers.items() if m != n) for n in p}
    whole = c * math.prod(numbers.values())
    return np.float64(whole.real), {n: np.array([[q.real, -q.imag]]) for n, q in others.items()}


@settings(max_examples=300, deadline=None)
@given(
    st.integers(1, 16),
    st.integers(0, 10**6),
    st.floats(0.01, 1.5),
    st.floats(0.05, 0.999),
    st.booleans(),
)
def test_lemma_2(depth: int, seed: int, angle: float, share: float, weaker: bool) -> None:
    """In that family every step below the threshold, ours too, descends; the model is obeyed."""
    rng = np.random.default_rng(seed)
    params = {f"{k:02}": rng.normal(size=(1, 2)) for k in range(depth)}
    c = complex(*rng.normal(size=2))
    cosine = math.cos(angle)
    eta = (
        trust.weaker_threshold(cosine, depth) if weaker else trust.descent_threshold(cosine, depth)
    )
    loss, gradient = product(params, c)
    change = {}
    for name, w in params.items():
        turn = angle * rng.uniform(-1, 1)  # the smallest cosine is what the threshold is of
        g = complex(*gradient[name][0])
        d = -g / abs(g) * complex(math.cos(turn), math.sin(turn)) * np.linalg.norm(w)
        change[name] = float(eta) * share * rng.uniform(0.5, 1) * np.array([[d.real, d.imag]])
    assert min(map(float, trust.cosines(change, gradient).values())) >= cosine - 1e-12
    after, _ = product({n: w + change[n] for n, w in params.items()}, c)
    assert after < loss
    gap = trust.trust_model_gap(lambda p: product(p, c), params, change)
    assert all(float(m) <= float(gap.allowed) * (1 + 1e-9) for m in gap.measured.values())
    assert gap.allowed == pytest.approx(
        math.prod(1 + np.linalg.norm(d) / np.linalg.norm(params[n]) for n, d in change.items()) - 1,
        rel=1e-12,
    )


def test_the_thresholds_at_depth_one() -> None:
    """w^2 / 2 falls up to eta = 2: our threshold, twice Lemma 2's."""

    def loss(p: Params) -> tuple[Any, Params]:
        return np.sum(p["w"] ** 2) / 2, {"w": p["w"]}

    assert (trust.descent_threshold(1.0, 1), trust.weaker_threshold(1.0, 1)) == (1, 2)
    for eta, falls in ((0.999, True), (1.999, True), (2.001, False)):
        assert (trust.descent_bound(loss, scalars(w=1), scalars(w=-eta)).change < 0) == falls


# --- the model is a model ---------------------------------------------------------------------


def squared_error(target: float) -> Callable[[Params], tuple[Any, Params]]:
    """(prod w_l - target)^2 / 2 of scalar layers."""

    def loss(p: Params) -> tuple[Any, Params]:
        w = {n: float(v[0, 0]) for n, v in p.items()}
        e = math.prod(w.values()) - target
        slopes = {n: e * math.prod(v for m, v in w.items() if m != n) for n in w}
        return np.float64(e * e / 2), scalars(**slopes)

    return loss


@pytest.mark.parametrize(
    ("target", "layers", "change", "measured", "allowed"),
    [
        (0.5, {"w": 1}, {"w": 0.25}, 0.5, 0.25),
        (0.375, {"w": 1}, {"w": 0.25}, 0.4, 0.25),
        (0, {"a": 1, "b": 1}, {"a": 1, "b": 1}, 7, 3),
    ],
)
def test_deep_relative_trust_is_no_theorem(
    target: float, layers: Any, change: Any, measured: float, allowed: float
) -> None:
    gap = trust.trust_model_gap(squared_error(target), scalars(**layers), scalars(**change))
    assert [float(m) for m in gap.measured.values()] == pytest.approx([measured] * len(layers))
    assert float(gap.allowed) == pytest.approx(allowed, rel=1e-15)
    assert not any(gap.holds.values())


def test_lemma_2_without_its_assumption() -> None:
    """The loss rises from .005 to .08 by half of the threshold."""
    found = trust.descent_bound(squared_error(0.9), scalars(w=1), scalars(w=-0.5))
    assert found.change == pytest.approx(0.075, rel=1e-12)
    assert found.cosines["w"] == 1
    assert trust.descent_threshold(1.0, 1) > 0.5
    assert found.holds  # Lemma 1 assumes nothing of the kind


def test_the_model_on_a_real_net() -> None:
    """Per weight matrix; biases move, but have no part in the product."""
    value_and_gradient, params = network(3, 3, "tanh", True)
    change = {name: 0.01 * w + 1e-3 for name, w in params.items()}
    gap = trust.trust_model_gap(value_and_gradient, params, change)
    assert list(gap.measured) == [n for n in params if n.endswith("weight")] == list(gap.holds)
    sizes = [np.linalg.norm(change[n]) / np.linalg.norm(params[n]) for n in gap.measured]
    assert gap.allowed == pytest.approx(math.prod(1 + r for r in sizes) - 1, rel=1e-12)
    _, g = value_and_gradient(params)
    _, moved = value_and_gradient({n: w + change[n] for n, w in params.items()})
    for name, ratio in gap.measured.items():
        exact = np.linalg.norm(moved[name] - g[name]) / np.linalg.norm(g[name])
        assert ratio == pytest.approx(exact, rel=1e-12)
        assert gap.holds[name] == (exact <= gap.allowed)


# --- the update at finite depth, and growth ---------------------------------------------------


@settings(deadline=None)
@given(
    st.integers(1, 30), st.integers(0, 10**6), st.floats(-8, 4), st.floats(-8, 4), st.floats(-6, 0)
)
def test_finite_depth_update(depth: int, seed: int, wide: float, steep: float, rate: float) -> None:
    """Stationary at 60 digits, against the gradient, and no other length does better."""
    rng = np.random.default_rng(seed)
    w, g = rng.normal(size=(3, 2)) * 10**wide, rng.normal(size=(3, 2)) * 10**steep
    eta = 10**rate
    d = trust.finite_depth_update(w, g, eta, depth)
    size, slope, width = (mpmath.norm(mpmath.matrix(a.ravel().tolist())) for a in (d, g, w))
    law = mpmath.mpf(eta) * slope * width ** (2 * depth)
    assert float(size ** (2 * depth - 1) / law) == pytest.approx(1, rel=1e-12 * depth)
    assert trust.cosines({"w": d}, {"w": g})["w"] == pytest.approx(1, abs=1e-12)

    def penalised(length: Any) -> Any:
        return -slope * length + (length / width) ** (2 * depth) / (2 * mpmath.mpf(eta) * depth)

    best = penalised(size)
    assert all(penalised(size * f) > best for f in (0.5, 0.99, 1 + 1e-3, 1.5, 10))


def test_finite_depth_update_at_its_ends() -> None:
    w, g = np.array([[3.0, 4.0]]), np.array([[0.0, 2.0]])
    assert trust.finite_depth_update(w, g, 0.1, 1) == pytest.approx(-0.1 * 25 * g, rel=1e-15)
    for args in ((w, 0 * g, 0.1), (0 * w, g, 0.1), (w, g, 0.0)):
        assert not trust.finite_depth_update(*args, 3).any()
    p = 1 / 39  # the bracket of L = 20 for |w| |g| = 1e-6 is far from its limit 1
    unit = np.array([[1e-3]])
    assert -trust.finite_depth_update(unit, unit, 1.0, 20) / 1e-3 == pytest.approx((1e-6) ** p)
    assert (1e-6) ** p == pytest.approx(0.70, abs=5e-3)
    depth = 10**7
    eta = 0.9999999  # eta^(2L-1) of the limit's eta
    limit = trust.finite_depth_update(w, g, eta ** (2 * depth - 1), depth)
    assert limit == pytest.approx(-eta * 5 / 2 * g, rel=1e-6)
    tiny, huge = np.full((1, 1), 1e-150), np.full((1, 1), 1e150)
    assert trust.finite_depth_update(tiny, tiny, 1.0, 2) == pytest.approx(-1e-250, rel=1e-12)
    assert trust.finite_depth_update(huge, tiny, 1.0, 2) == pytest.approx(-1e150, rel=1e-12)
    assert trust.finite_depth_update(w.astype(np.float32), g, 0.1, 2).dtype == np.float64


def test_growth_at_its_ends() -> None:
    """No square overflows."""
    assert trust.log_growth(1e200, 2) == pytest.approx(2 * 200 * math.log(10), rel=1e-15)
    assert trust.growth(1e200, 2) == math.inf
    assert trust.log_growth(np.array(0.5), np.float32(2)) == math.log1p(0.25)


@pytest.mark.parametrize("dtype", ["float16", "float32", "int64"])
def test_thresholds_of_other_dtypes(dtype: str) -> None:
    """In float64, whatever the cosines come in; 0-d arrays and NumPy scalars too."""
    one = np.ones((), dtype)
    for value in (one, one[()], np.ones(2, dtype), [1, 1]):
        found = np.asarray(trust.descent_threshold(value, 50))
        assert found.dtype == np.float64
        assert found.ravel()[0] == trust.descent_threshold(1.0, 50)
    assert trust.weaker_threshold(one, 3) == trust.weaker_threshold(1.0, 3)


@pytest.mark.parametrize("scale", [1e-300, 1e-170, 1.0, 1e160, 1e300])
def test_cosines_and_directions_at_any_scale(scale: float) -> None:
    rng = np.random.default_rng(4)
    d, g = ({"w": rng.normal(size=(3, 2))} for _ in range(2))
    plain, scaled = trust.cosines(d, g), trust.cosines({"w": d["w"] * scale}, {"w": g["w"] * scale})
    assert scaled["w"] == pytest.approx(float(plain["w"]), rel=1e-12)
    changes = trust.gradient_breakdown({"w": g["w"] * scale}, {"w": 2 * g["w"] * scale})
    assert changes["w"] == pytest.approx(1, rel=1e-14)
    found = trust.layerwise_direction({"w": d["w"] * scale}, {"w": g["w"] * scale})["w"]
    expected = trust.layerwise_direction(d, g)["w"] * scale
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_growth() -> None:
    """Simulated: 2000 steps of LARS without prefactor orthogonal to the layer."""
    rng = np.random.default_rng(0)
    w = rng.normal(size=50)
    begun = np.linalg.norm(w)
    for _ in range(2000):
        g = rng.normal(size=50)
        g -= w * (g @ w) / (w @ w)
        w = w - 0.1 * np.linalg.norm(w) / np.linalg.norm(g) * g
    assert np.linalg.norm(w) / begun == pytest.approx(trust.growth(0.1, 2000), rel=1e-10)
    assert trust.growth(0.1, 2000) == pytest.approx(20959.16, abs=5e-3)
    exact = (1 + mpmath.mpf(1e-9) ** 2) ** (mpmath.mpf(10**15) / 2) - 1
    assert trust.growth(1e-9, 10**15) - 1 == pytest.approx(float(exact), rel=1e-9)
    assert trust.log_growth(1e-9, 2) == pytest.approx(1e-18, rel=1e-15)
    assert trust.growth(1.0, 10**6) == math.inf
    assert trust.log_growth(1.0, 10**6) == pytest.approx(5e5 * math.log(2), rel=1e-15)


@pytest.mark.parametrize(
    ("eta", "limit", "steps"),
    [
        (0.01, LARGEST, 1_774_546),
        (0.1, LARGEST, 17_834),
        (0.01, math.sqrt(LARGEST), 887_273),
        (0.1, math.sqrt(LARGEST), 8_917),
    ],
)
def test_steps_to_overflow(eta: float, limit: float, steps: int) -> None:
    assert trust.steps_to_overflow(1.0, eta, limit) == steps
    assert trust.growth(eta, steps) > limit >= trust.growth(eta, steps - 1)
    assert trust.steps_to_overflow(limit * 1.5, eta, limit) == 0


@given(st.floats(0, 2), st.sampled_from(["float16", "float32", "float64"]))
def test_prefactor_drift(eta: float, dtype: str) -> None:
    rounded = float(np.dtype(dtype).type(np.sqrt(1.0 + eta * eta)))
    with mpmath.workdps(150):
        exact = float(mpmath.sqrt(1 + mpmath.mpf(eta) ** 2) / mpmath.mpf(rounded) - 1)
    found = trust.prefactor_drift(eta, dtype)
    assert found == pytest.approx(exact, rel=1e-12, abs=1e-80)
    assert abs(found) <= np.finfo(dtype).eps


def test_prefactor_drift_is_what_fromage_does() -> None:
    """A layer of scale-free loss, so that its gradient is orthogonal to it: 4000 steps."""
    assert trust.prefactor_drift(0.01) == pytest.approx(5.006e-8, abs=5e-12)
    assert trust.prefactor_drift(1e-4) == pytest.approx(math.sqrt(1 + 1e-8) - 1, rel=1e-7)
    steps, eta = 4000, 0.01
    optimizer = optim.fromage(lr=eta)
    growth = {}
    for dtype in ("float32", "float64"):
        w = {"w": np.array([[3.0, 4.0]], dtype)}
        state = optimizer.init(w)
        for _ in range(steps):
            turned = {"w": np.array([[-w["w"][0, 1], w["w"][0, 0]]], dtype)}
            w, state = optimizer.update(w, turned, state)
        growth[dtype] = float(np.linalg.norm(w["w"].astype(np.float64))) / 5 - 1
    assert growth["float32"] == pytest.approx(steps * trust.prefactor_drift(eta), rel=0.05)
    assert abs(growth["float64"]) < 1e-12


# --- errors -----------------------------------------------------------------------------------


def still(p: Params) -> tuple[Any, Params]:
    """A loss that never changes."""
    return np.float64(0), {n: np.zeros_like(w) for n, w in p.items()}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: trust.cosines(scalars(a=1), scalars(b=1)), "differ in a, b"),
        (lambda: trust.gradient_breakdown({}, {}), "got no layers"),
        (
            lambda: trust.layerwise_direction(scalars(a=1), {"a": np.ones(3)}),
            r"a has shape \(1, 1\) before and \(3,\) after",
        ),
        (
            lambda: trust.descent_bound(still, scalars(a=1), scalars(a=1), points=0),
            "points must be at least 1; got 0",
        ),
        (lambda: trust.descent_bound(still, scalars(a=1), scalars(b=1)), "differ in a, b"),
        (
            lambda: trust.steepest_descent_distance(still, scalars(a=1), scalars(b=1)),
            "differ in a, b",
        ),
        (
            lambda: trust.trust_model_gap(still, scalars(a=0), scalars(a=1)),
            "relative to a, whose norm is 0",
        ),
        (lambda: trust.descent_threshold(1.0, 0), "depth must be at least 1"),
        (lambda: trust.weaker_threshold(1.0, 0), "depth must be at least 1"),
        (lambda: trust.weaker_threshold(1.5, 2), r"a cosine lies in \[-1, 1\]; got 1.5"),
        (lambda: trust.weaker_threshold(math.nan, 2), "a cosine lies in"),
        (lambda: trust.finite_depth_update(np.ones(2), np.ones(2), 0.1, 0), "depth must be"),
        (lambda: trust.finite_depth_update(np.ones(2), np.ones(2), -1.0, 1), "eta must be"),
        (lambda: trust.growth(-0.1, 3), "eta must be a finite number >= 0"),
        (lambda: trust.log_growth(0.1, math.inf), "steps must be a finite number >= 0"),
        (lambda: trust.steps_to_overflow(1.0, 1e-200, 2.0), "more than 1e300 steps"),
        (lambda: trust.prefactor_drift(1e6, "float16"), "beyond float16"),
        (lambda: trust.prefactor_drift(0.1, "half a float"), "floating-point dtype; got 'half"),
        (lambda: trust.descent_threshold("x", 1), "expected a number or an array of numbers"),
        (lambda: trust.descent_threshold(1.0, 1.5), "an integer; got 1.5"),
        (lambda: trust.descent_threshold(1.0, "2"), "an integer; got '2'"),
        (lambda: trust.weaker_threshold(np.ones(2), 1), "a cosine lies in"),
        (
            lambda: trust.descent_bound(still, scalars(a=1), scalars(a=1), lipschitz=-1.0),
            "lipschitz must be a finite number >= 0",
        ),
        (lambda: trust.steps_to_overflow(0.0, 0.1, 1.0), "norm must be a finite number > 0"),
        (lambda: trust.steps_to_overflow(1.0, 0.0, 1.0), "eta must be a finite number > 0"),
        (lambda: trust.prefactor_drift(-0.1), "eta must be"),
        (lambda: trust.prefactor_drift(0.1, "int32"), "expected a floating-point dtype; got int32"),
    ],
)
def test_errors(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(Error, match=message):
        call()
