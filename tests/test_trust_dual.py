"""npdrt.trust.dual: the definition, the singular value decomposition, and the optimizers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from npdrt import optim, trust
from npdrt.errors import Error
from npdrt.optim.muon import orthogonalised
from npdrt.trust.dual import NORMS, dual_direction, dual_norm, steepest_step

SIZES = {
    "frobenius": np.linalg.norm,
    "spectral": lambda x: np.linalg.norm(x.reshape(len(x), -1), 2),
    "max": lambda x: np.max(np.abs(x)),
}
every_norm = pytest.mark.parametrize("norm", NORMS)


def objective(g: np.ndarray, d: np.ndarray, sharpness: float, norm: str) -> float:
    return float(np.sum(g * d) + sharpness / 2 * SIZES[norm](d) ** 2)


@every_norm
@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), rows=st.integers(1, 5), columns=st.integers(1, 5),
       rank=st.integers(1, 5), sharpness=st.floats(0.01, 100.0))  # fmt: skip
def test_no_other_step_is_lower(
    norm: str, seed: int, rows: int, columns: int, rank: int, sharpness: float
) -> None:
    """By the definition: at random steps, near the step, and along it; also for low ranks."""
    rng = np.random.default_rng(seed)
    g = rng.normal(size=(rows, rank)) @ rng.normal(size=(rank, columns))
    best = steepest_step(g, sharpness, norm)
    least = objective(g, best, sharpness, norm)
    assert least == pytest.approx(-(dual_norm(g, norm) ** 2) / (2 * sharpness), rel=1e-9)
    size = SIZES[norm](best)
    for _ in range(20):
        other = rng.normal(size=g.shape)
        for d in (size * other, best + 0.1 * size * other, best + 1e-4 * size * other):
            assert objective(g, d, sharpness, norm) >= least * (1 + 1e-12)
    for factor in (0.9, 1.1):
        assert objective(g, factor * best, sharpness, norm) > least


@pytest.mark.parametrize("shape", [(4, 4), (3, 7), (6, 2), (3, 2, 2)])
def test_the_spectral_step_by_its_singular_values(shape: tuple[int, ...]) -> None:
    g = np.random.default_rng(0).normal(size=shape)
    u, s, v = np.linalg.svd(g.reshape(len(g), -1), full_matrices=False)
    assert dual_norm(g, "spectral") == pytest.approx(s.sum(), rel=1e-13)
    t = dual_direction(g, "spectral")
    np.testing.assert_allclose(t.reshape(len(g), -1), u @ v, atol=1e-13)
    np.testing.assert_allclose(steepest_step(g, 4.0, "spectral"), -s.sum() / 4 * t, atol=1e-13)


def test_the_other_norms_by_their_formulas() -> None:
    g = np.array([[3.0, -4.0], [0.0, 12.0]])
    np.testing.assert_allclose(steepest_step(g, 2.0, "frobenius"), -g / 2)
    np.testing.assert_array_equal(steepest_step(g, 2.0, "max"), [[-9.5, 9.5], [0.0, -9.5]])
    assert [dual_norm(g, norm) for norm in ("frobenius", "max")] == [13.0, 19.0]


@every_norm
def test_a_gradient_of_zero_and_of_rank_one(norm: str) -> None:
    assert not steepest_step(np.zeros((2, 3)), 1.0, norm).any()
    g = np.outer([1.0, 2.0], [2.0, 0.0, -1.0])
    assert SIZES[norm](dual_direction(g, norm)) == pytest.approx(1.0)
    if norm == "spectral":  # nothing is added where g is 0
        np.testing.assert_allclose(dual_direction(g, norm), g / 5, atol=1e-15)


def test_fromage_is_the_frobenius_step_of_relative_size_lr() -> None:
    w, g = (np.random.default_rng(k).normal(size=(3, 4)) for k in range(2))
    rule = optim.fromage(lr=0.125)
    found = rule.update({"w": w}, {"w": g}, rule.init({"w": w}))[0]["w"]
    step = -0.125 * np.linalg.norm(w) * dual_direction(g, "frobenius")
    np.testing.assert_allclose(found, (w + step) / np.sqrt(1 + 0.125**2), rtol=1e-14)


def test_muon_is_near_the_spectral_step() -> None:
    """Its singular values are between 0.68 and 1.21, on the axes of the spectral step."""
    g = np.random.default_rng(3).normal(size=(6, 9))
    x, t = orthogonalised(g), dual_direction(g, "spectral")
    gain = x @ t.T
    np.testing.assert_allclose(gain, gain.T, atol=1e-12)
    values = np.linalg.eigvalsh(gain)
    assert 0.68 < values[0] < values[-1] < 1.21
    assert 0.68 < np.sum(g * x) / dual_norm(g, "spectral") < 1.21


def test_lion_without_momentum_is_the_step_of_the_largest_entry() -> None:
    w, g = (np.random.default_rng(k).normal(size=(3, 4)) for k in range(2))
    rule = optim.lion(lr=0.5, betas=(0.0, 0.0))
    found = rule.update({"w": w}, {"w": g}, rule.init({"w": w}))[0]["w"]
    np.testing.assert_array_equal(found, w - 0.5 * dual_direction(g, "max"))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), relative=st.floats(1e-3, 2.0))
def test_deep_relative_trust_in_the_spectral_norm(seed: int, relative: float) -> None:
    """The bound of docs/theory.md on the change of the function, without a condition number."""
    rng = np.random.default_rng(seed)
    widths = rng.integers(1, 6, 4)
    weights = [rng.normal(size=(a, b)) for a, b in zip(widths[1:], widths[:-1], strict=True)]
    r = relative * rng.uniform(size=len(weights))
    x = rng.normal(size=widths[0])
    moved = [
        w + k * np.linalg.norm(w, 2) * dual_direction(rng.normal(size=w.shape), "spectral")
        for w, k in zip(weights, r, strict=True)
    ]
    outputs = []
    for layers in (weights, moved):
        h = x
        for w in layers:
            z = w @ h
            h = np.maximum(z, 0.1 * z)
        outputs.append(h)
    scale = np.prod([np.linalg.norm(w, 2) for w in weights]) * np.linalg.norm(x)
    bound = scale * trust.deep_relative_trust({str(k): v for k, v in enumerate(r)})
    assert np.linalg.norm(outputs[1] - outputs[0]) <= bound * (1 + 1e-12)


@pytest.mark.parametrize(
    ("g", "sharpness", "norm", "message"),
    [
        (np.ones((2, 2)), 1.0, "nuclear", "norm must be one of frobenius, spectral, max"),
        (np.ones((2, 2)), 0.0, "max", "sharpness must be > 0; got 0.0"),
        (
            np.ones(3),
            1.0,
            "spectral",
            r"expected a matrix or a convolution kernel; got shape \(3,\)",
        ),
    ],
)
def test_what_is_refused(g: np.ndarray, sharpness: float, norm: str, message: str) -> None:
    with pytest.raises(Error, match=message):
        steepest_step(g, sharpness, norm)
