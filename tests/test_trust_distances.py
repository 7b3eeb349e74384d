"""Distances between networks, and singular values: beside 50 digits, on every array library."""

from __future__ import annotations

import math
from typing import Any

import backends
import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import npdrt
from npdrt import Error, trust
from npdrt.models import MLP

OF_R = {  # name -> the definition, in mpmath
    "deep_relative_trust": lambda r: mpmath.fprod(1 + x for x in r) - 1,
    "log_deep_relative_trust": lambda r: mpmath.log(mpmath.fprod(1 + x for x in r)),
    "squared_deep_relative_trust": lambda r: mpmath.fprod(1 + x**2 for x in r) - 1,
    "log_squared_deep_relative_trust": lambda r: mpmath.log(mpmath.fprod(1 + x**2 for x in r)),
    "surrogate_trust": lambda r: mpmath.fsum(x ** (2 * len(r)) for x in r) / len(r),
    "log_surrogate_trust": lambda r: mpmath.log(mpmath.fsum(x ** (2 * len(r)) for x in r) / len(r)),
}


def layers(*sizes: float) -> dict[str, Any]:
    """Relative perturbations with these values."""
    return {f"layers/{n:02d}": np.asarray(float(size)) for n, size in enumerate(sizes)}


def networks(seed: int = 0, dtype: str = "float64") -> tuple[dict[str, Any], dict[str, Any]]:
    """Two networks with a matrix, a bias and a convolution kernel."""
    rng = np.random.default_rng(seed)
    shapes = {"0/weight": (3, 4), "0/bias": (3,), "1/weight": (2, 3, 3, 3)}
    before = {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}
    after = {n: w + (0.1 * rng.normal(size=w.shape)).astype(dtype) for n, w in before.items()}
    return before, after


positive = st.floats(1e-12, 1e3)


@pytest.mark.parametrize("name", OF_R)
@settings(deadline=None)
@given(r=st.lists(positive, min_size=1, max_size=8))
def test_against_fifty_digits(name: str, r: list[float]) -> None:
    with mpmath.workdps(250):  # enough for 1 + 1e-192
        exact = OF_R[name]([mpmath.mpf(x) for x in r])
    got = getattr(trust, name)(layers(*r))
    assert got.dtype == np.float64
    assert got.shape == ()
    # a log near 0, and exp of a log of up to 440, cost digits
    assert float(got) == pytest.approx(float(exact), rel=3e-13, abs=1e-14)


@pytest.mark.parametrize("name", OF_R)
def test_nothing_moved(name: str) -> None:
    zero = getattr(trust, name)(layers(0, 0, 0))
    assert zero == (-math.inf if name == "log_surrogate_trust" else 0)


def test_small_perturbations_do_not_cancel() -> None:
    """(1 + 1e-18)^14 - 1, which the product formed in float64 gives as 0."""
    assert trust.squared_deep_relative_trust(layers(*[1e-9] * 14)) == pytest.approx(
        14e-18, rel=1e-14
    )
    assert np.prod(1 + np.full(14, 1e-9) ** 2) - 1 == 0


def test_depth_one_thousand_overflows_without_a_warning() -> None:
    r = layers(*[100.0] * 1000)
    for name in ("deep_relative_trust", "squared_deep_relative_trust", "surrogate_trust"):
        assert getattr(trust, name)(r) == math.inf
        assert 4000 < getattr(trust, f"log_{name}")(r) < 10_000


def test_no_layers_is_an_error() -> None:
    for name in OF_R:
        with pytest.raises(Error, match="got no layers"):
            getattr(trust, name)({})


# --- of two networks --------------------------------------------------------------------------


def test_relative_perturbations(backend: backends.Backend) -> None:
    before, after = networks()
    on_device = [{n: backend.asarray(w) for n, w in p.items()} for p in (before, after)]
    waited = backends.synchronisations
    r = trust.relative_perturbations(*on_device)
    euclidean = trust.euclidean_trust(*on_device)
    distances = {name: getattr(trust, name)(r) for name in OF_R}
    assert backends.synchronisations == waited
    expected = {n: np.linalg.norm(after[n] - w) / np.linalg.norm(w) for n, w in before.items()}
    for name, value in expected.items():
        assert float(backend.to_host(r[name])) == pytest.approx(value, rel=1e-14)
        assert r[name].dtype == backend.xp.float64
    for name, definition in OF_R.items():
        exact = float(definition([mpmath.mpf(x) for x in expected.values()]))
        assert float(backend.to_host(distances[name])) == pytest.approx(exact, rel=1e-13)
    total = sum(np.sum((after[n] - w) ** 2) for n, w in before.items())
    assert float(backend.to_host(euclidean)) == pytest.approx(total, rel=1e-14)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_in_a_recorded_program(dtype: str) -> None:
    def step(before: Any, after: Any) -> Any:
        r = trust.relative_perturbations(before, after)
        distances = [getattr(trust, name)(r) for name in OF_R]
        return (r, trust.euclidean_trust(before, after), *distances)

    before, after = networks(dtype=dtype)
    program = npdrt.record(step, before, after)
    for seed in (0, 1):
        pair = networks(seed, dtype)
        replayed, eager = program(*pair), step(*pair)
        assert replayed[1:] == eager[1:]
        assert replayed[0] == eager[0]


@settings(deadline=None)
@given(hnp.arrays(np.float32, (3, 2), elements=st.floats(-(2.0**100), 2.0**100, width=32)))
def test_exactly_zero_where_nothing_moved(w: np.ndarray) -> None:
    r = trust.relative_perturbations({"w": w}, {"w": w.copy()})
    assert r["w"] == 0
    assert trust.deep_relative_trust(r) == 0
    assert trust.euclidean_trust({"w": w}, {"w": w}) == 0


def test_a_zero_layer() -> None:
    zero, one, odd = np.zeros(2), np.ones(2), np.array([math.nan, 1])
    r = trust.relative_perturbations(
        {"stays": zero, "moves": zero, "nan": odd}, {"stays": zero, "moves": one, "nan": one}
    )
    assert [r["stays"], r["moves"]] == [0, math.inf]
    assert np.isnan(r["nan"])


def test_norms_out_of_range_do_not_warn() -> None:
    before = {"w": np.array([1e200, math.inf, math.nan])}
    r = trust.relative_perturbations(before, {"w": -before["w"]})
    assert np.isnan(r["w"])
    assert not trust.euclidean_trust(before, {"w": np.zeros(3)}) < math.inf


def test_float32_weights_are_subtracted_in_float64() -> None:
    w, moved = np.float32([[1e8]]), np.float32([[-1.0]])
    r = trust.relative_perturbations({"w": w}, {"w": moved})
    assert r["w"] == (1e8 + 1) / 1e8


def test_weights_leaves_vectors_out() -> None:
    assert list(trust.weights(networks()[0])) == ["0/weight", "1/weight"]
    model = MLP(depth=2, width=3, inputs=3, outputs=2, bias=True)
    assert [n[-6:] for n in trust.weights(model.init(seed=0))] == ["weight", "weight"]


BAD_PAIRS = [
    ({}, {}, "got no layers"),
    ({"a": np.ones(2)}, {"b": np.ones(2)}, "differ in a, b; both must be of one model"),
    ({"a": np.ones(2), "b": np.ones(2)}, {"b": np.ones(2), "a": np.ones(2)}, "the order of their"),
    ({"a": np.ones(2)}, {"a": np.ones(3)}, r"a has shape \(2,\) before and \(3,\) after; both"),
]


@pytest.mark.parametrize(("before", "after", "message"), BAD_PAIRS)
def test_different_layers_are_an_error(before: Any, after: Any, message: str) -> None:
    for check in (trust.check_same_shapes, trust.check_same_layers):
        with pytest.raises(Error, match=message):
            check(before, after)


@pytest.mark.parametrize(("value", "shown"), [(0.0, "0"), (math.nan, "nan"), (math.inf, "inf")])
def test_a_layer_that_nothing_is_relative_to(value: float, shown: str) -> None:
    before, after = {"w": np.full((2, 2), value)}, {"w": np.ones((2, 2))}
    trust.check_same_shapes(before, after)
    with pytest.raises(Error, match=f"relative to w, whose norm is {shown}; .* leave this layer"):
        trust.check_same_layers(before, after)
    trust.check_same_layers(after, before)


# --- the surrogate of the first version -------------------------------------------------------


def test_the_surrogate_is_no_bound() -> None:
    squared, surrogate = trust.squared_deep_relative_trust, trust.surrogate_trust
    assert surrogate(layers(2, 0)) == pytest.approx(8)
    assert squared(layers(2, 0)) == pytest.approx(4)
    assert surrogate(layers(1, 1)) == 1
    assert squared(layers(1, 1)) == pytest.approx(3)


@settings(deadline=None)
@given(eta=st.floats(1e-6, 1e6), depth=st.integers(1, 50))
def test_surrogate_ratio(eta: float, depth: int) -> None:
    with mpmath.workdps(700):
        inverse = mpmath.mpf(eta) ** -2
        exact = (1 + inverse) ** depth - inverse**depth
    expected = float(exact) if exact < 1e308 else math.inf
    assert float(trust.surrogate_ratio(eta, depth)) == pytest.approx(expected, rel=1e-12)


def test_surrogate_ratio_is_the_ratio_and_tends_to_one_slowly(backend: backends.Backend) -> None:
    etas = np.array([0.01, 0.5, 10.0, 100.0])
    got = backend.to_host(trust.surrogate_ratio(backend.asarray(etas), 20))
    r = [layers(*[eta] * 20) for eta in etas]
    direct = [trust.squared_deep_relative_trust(x) / trust.surrogate_trust(x) for x in r]
    np.testing.assert_allclose(got, direct, rtol=1e-12)
    np.testing.assert_allclose(got, [2.0e77, 9.5e13, 1.22, 1.002], rtol=2e-2)


@pytest.mark.parametrize("scale", [1e-300, 1e-170, 1e160, 1e300])
def test_distances_at_any_scale(scale: float) -> None:
    """No square over- or underflows; integers and narrow floats are what their values are."""
    before, after = networks()
    plain = {n: float(r) for n, r in trust.relative_perturbations(before, after).items()}
    large = [{n: w * scale for n, w in p.items()} for p in (before, after)]
    found = {n: float(r) for n, r in trust.relative_perturbations(*large).items()}
    assert found == pytest.approx(plain, rel=1e-14)
    trust.check_same_layers(*large)
    assert trust.relative_perturbations({"w": np.array([2])}, {"w": np.array([3])})["w"] == 0.5
    assert trust.log_squared_deep_relative_trust(layers(1e200, 1)) == pytest.approx(
        400 * math.log(10) + math.log(2), rel=1e-15
    )


def test_surrogate_ratio_at_its_ends() -> None:
    assert trust.surrogate_ratio(1e-200, 1) == pytest.approx(1, rel=1e-12)
    assert trust.surrogate_ratio(1e200, 7) == 1
    assert trust.surrogate_ratio(np.float32(0.5), 2) == trust.surrogate_ratio(0.5, 2)
    for eta, depth, message in (
        (0.1, 0, "depth must be at least 1"),
        ("x", 1, "expected a number"),
    ):
        with pytest.raises(Error, match=message):
            trust.surrogate_ratio(eta, depth)


# --- singular values --------------------------------------------------------------------------


def test_condition_number() -> None:
    assert trust.condition_number(np.diag([6.0, 3.0, 2.0])) == pytest.approx(3)
    assert trust.condition_number(np.array([[3.0, 4.0]])) == 1  # one singular value
    kernel = np.random.default_rng(0).normal(size=(3, 2, 3, 3))
    assert trust.condition_number(kernel) == pytest.approx(np.linalg.cond(kernel.reshape(3, 18)))


@pytest.mark.parametrize(
    "w",
    [np.zeros((2, 2)), np.ones((3, 2)), np.outer([0.1, 0.7], [0.3, 1.1]), np.full((2, 2), np.nan)],
)
def test_condition_number_of_a_deficient_matrix_is_infinite(w: np.ndarray) -> None:
    assert trust.condition_number(w) == math.inf


def test_condition_number_on_every_library(backend: backends.Backend) -> None:
    w = backend.asarray(np.diag([4.0, 2.0]).astype(np.float32))
    assert trust.condition_number(w) == 2
    assert trust.spectral_shift(w, w).absolute == pytest.approx(math.sqrt(20))


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_mirsky(seed: int) -> None:
    """Version 1, Theorem 3; equality for dW = c W."""
    rng = np.random.default_rng(seed)
    w = rng.normal(size=rng.integers(1, 6, size=2))
    dw = 10 ** rng.uniform(-6, 2) * rng.normal(size=w.shape)
    shift = trust.spectral_shift(w, dw)
    assert shift.absolute <= shift.bound * (1 + 1e-9)
    assert shift.relative <= shift.relative_bound * (1 + 1e-9)
    assert shift.relative_bound == pytest.approx(np.linalg.norm(dw) / np.linalg.norm(w))
    same = trust.spectral_shift(w, 0.5 * w)
    assert same.absolute == pytest.approx(same.bound)
    assert trust.spectral_shift(w, 0 * w)[:3] == (0, 0, 0)


@pytest.mark.parametrize("scale", [1e-300, 1e-170, 1e160, 1e300])
def test_spectra_at_any_scale(scale: float) -> None:
    w = np.diag([4.0, 2.0])
    assert trust.condition_number(scale * w) == 2
    np.testing.assert_allclose(trust.singular_values(scale * w), [4 * scale, 2 * scale])
    shift = trust.spectral_shift(scale * w, scale * np.eye(2))
    assert shift.relative == pytest.approx(math.sqrt(2 / 20), rel=1e-14)
    assert shift.absolute == pytest.approx(math.sqrt(2) * scale, rel=1e-14)


def test_errors_of_spectra() -> None:
    with pytest.raises(Error, match=r"got shape \(3,\); npdrt.trust.weights picks"):
        trust.condition_number(np.ones(3))
    with pytest.raises(Error, match=r"W has shape \(2, 2\) and dW \(2, 3\)"):
        trust.spectral_shift(np.eye(2), np.ones((2, 3)))
