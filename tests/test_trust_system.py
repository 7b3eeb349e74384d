"""MacDonald et al. 2023: every formula by the complex step, every bound on the network of Theorem
5.1, the spectrum of the modified shortcut, and the smallest counterexamples.

That gradient descent reaches a global minimum is not asserted: docs/theory.md says why."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import backends
import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from npdrt import Error, ops, trust, value_and_grad
from npdrt.arrays import quiet
from npdrt.autodiff import Tensor, backward
from npdrt.random import Random
from npdrt.trust import Image, NormalisedResidualNet, System

seeds = st.integers(0, 2**32 - 1)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return Random(seed, str(shape)).normal(shape)


def complex_step(function: Callable[[Any], Any], x: np.ndarray) -> np.ndarray:
    """The derivative of vec f(x) in vec(x), both row by row: exact to rounding."""
    columns = []
    for index in np.ndindex(x.shape):
        moved = x.astype(complex)
        moved[index] += 1e-30j
        with quiet():
            columns.append(np.asarray(function(moved)).imag.reshape(-1) / 1e-30)
    return np.stack(columns, axis=1)


def error(ours: Any, reference: Any) -> float:
    """max|difference| / max|reference|."""
    assert np.shape(ours) == np.shape(reference)
    return float(np.max(np.abs(ours - reference)) / np.max(np.abs(reference)))


# --- the formulas, each against the complex step ---------------------------------------------

EPS = (1e-2, 0.3)
A, B, X = normal(3, 4), normal(3), normal(4, 5)


def test_affine() -> None:
    """(16), (17), (18)."""
    np.testing.assert_allclose(trust.affine(A, X, B), A @ X + B[:, None])
    np.testing.assert_array_equal(trust.affine(A, X), A @ X)
    exact = complex_step(lambda x: trust.affine(A, x, B), X)
    assert error(trust.affine_jacobian(A, 5), exact) <= 1e-14
    by_weight = complex_step(lambda a: trust.affine(a, X, B), A)
    by_bias = complex_step(lambda b: trust.affine(A, X, b), B)
    exact = np.hstack((by_weight, by_bias))
    assert error(trust.affine_derivative(X, 3), exact) <= 1e-14
    assert error(trust.affine_derivative(X, 3, bias=False), by_weight) <= 1e-14


@pytest.mark.parametrize("eps", EPS)
def test_parameterised_affine(eps: float) -> None:
    """(19), (20), (21) with both normalisations of the weight."""
    for norm, derivative in (
        (ops.weight_norm, trust.weight_norm_derivative),
        (ops.entry_norm, trust.entry_norm_derivative),
    ):
        p = norm(A, eps=eps)
        exact = complex_step(lambda x, p=p: trust.affine(p, x, B), X)
        assert error(trust.affine_jacobian(p, 5), exact) <= 1e-14
        by_weight = complex_step(lambda a, n=norm: trust.affine(n(a, eps=eps), X, B), A)
        found = trust.affine_derivative(X, 3, derivative(A, eps=eps))
        assert error(found[:, : A.size], by_weight) <= 1e-12
        np.testing.assert_array_equal(found[:, A.size :], np.kron(np.eye(3), np.ones((5, 1))))


@pytest.mark.parametrize("eps", EPS)
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_sphere(eps: float, scale: float) -> None:
    """(25), (27), (28) with c = N = 4; (30), (31) with c = 1."""

    def value(y: Any) -> Any:
        return trust.sphere(y, eps=eps, scale=scale)

    np.testing.assert_allclose(
        value(A), np.sqrt(scale) * A / np.sqrt(scale * eps + (A**2).sum(1, keepdims=True))
    )
    first = trust.sphere_blocks(A, eps=eps, scale=scale)
    assert error(trust.block_diagonal(first), complex_step(value, A)) <= 1e-12
    blocks = complex_step(lambda y: trust.sphere_blocks(y, eps=eps, scale=scale), A)
    second = trust.sphere_second(A, eps=eps, scale=scale)
    for i in range(3):  # the blocks of row i in the entries of row k
        for k in range(3):
            exact = blocks.reshape(3, 4, 4, 3, 4)[i, :, :, k]
            np.testing.assert_allclose(second[i] * (i == k), exact, rtol=0, atol=1e-12 / eps)


@pytest.mark.parametrize("eps", EPS)
def test_weight_norm(eps: float) -> None:
    """wn is the sphere map with c = 1; its D (30) and the smallest singular value of that."""
    np.testing.assert_allclose(ops.weight_norm(A, eps=eps), trust.sphere(A, eps=eps), rtol=1e-14)
    found = trust.weight_norm_derivative(A, eps=eps)
    assert error(found, complex_step(lambda w: ops.weight_norm(w, eps=eps), A)) <= 1e-12
    smallest = np.linalg.svd(found, compute_uv=False)[-1]
    assert trust.weight_norm_smallest(A, eps=eps) == pytest.approx(smallest, rel=1e-10)


@pytest.mark.parametrize("eps", EPS)
def test_entry_norm(eps: float) -> None:
    """(32), (33), (36)."""
    found = trust.entry_norm_derivative(A, eps=eps)
    assert error(found, complex_step(lambda w: ops.entry_norm(w, eps=eps), A)) <= 1e-12
    slopes = complex_step(lambda w: np.diag(trust.entry_norm_derivative(w, eps=eps)), A)
    second = trust.entry_norm_second(A, eps=eps)
    assert error(np.diag(second.reshape(-1)), slopes) <= 1e-12
    smallest = np.linalg.svd(found, compute_uv=False)[-1]
    assert trust.entry_norm_smallest(A, eps=eps) == pytest.approx(smallest, rel=1e-14)


@pytest.mark.parametrize("eps", EPS)
def test_batch_norm(eps: float) -> None:
    """(22), (26), (29), and J bn = Jv Jm; against the primitive's value and its vjp."""
    np.testing.assert_allclose(trust.mean_removal(X), X - X.mean(1, keepdims=True))
    exact = complex_step(trust.mean_removal, X)
    assert error(trust.mean_removal_jacobian(4, 5), exact) <= 1e-14
    composed = trust.sphere(trust.mean_removal(X), eps=eps, scale=5)
    primitive = ops.batch_norm(X, channel_axis=0, eps=eps)
    assert error(primitive, composed) <= 1e-14
    found = trust.batch_norm_jacobian(X, eps=eps)
    exact = complex_step(lambda x: ops.batch_norm(x, channel_axis=0, eps=eps), X)
    assert error(found, exact) <= 1e-12
    by_vjp = trust.batch_jacobian(lambda x: ops.batch_norm(x, channel_axis=0, eps=eps), X)
    assert error(found, by_vjp) <= 1e-12


def test_gain_and_bias_are_a_diagonal_affine_layer() -> None:
    """aff_diag(gain, bias, .) o bn, Example A.3."""
    gain, bias = normal(4, seed=1), normal(4, seed=2)
    normalised = ops.batch_norm(X, channel_axis=0, eps=0.1)
    found = trust.affine(np.diag(gain), normalised, bias)
    assert error(ops.batch_norm(X, gain, bias, channel_axis=0, eps=0.1), found) <= 1e-14


def test_nonlinearity_and_residual() -> None:
    exact = complex_step(np.tanh, X)
    slopes = trust.nonlinearity_jacobian(1 - np.tanh(X) ** 2)
    assert error(slopes, exact) <= 1e-14
    skip, w = np.eye(3, 4), normal(3, 4, seed=3)
    exact = complex_step(lambda x: skip @ x + w @ np.tanh(x), X)
    branch = trust.affine_jacobian(w, 5) @ slopes
    assert error(trust.residual_jacobian(skip, branch, 5), exact) <= 1e-14


CONVOLUTIONS = [
    (Image(2, 4, 5), (3, 2, 2, 3)),
    (Image(2, 5, 5, stride=2, padding=1), (2, 2, 3, 3)),
    (Image(1, 6, 4, stride=3, padding=2), (2, 1, 2, 4)),
]


@pytest.mark.parametrize(("image", "shape"), CONVOLUTIONS, ids=str)
def test_convolution(image: Image, shape: tuple[int, ...]) -> None:
    """P(w) X is the convolution; its J is P(w) (x) Id, its D the patches, and DP is constant."""
    kernel, x = normal(*shape), normal(math.prod(image[:3]), 3)
    matrix = trust.convolution_matrix(kernel, image)
    padded = np.pad(x.T.reshape(3, *image[:3]), ((0, 0), (0, 0), *[(image.padding,) * 2] * 2))
    windows = np.lib.stride_tricks.sliding_window_view(padded, shape[2:], axis=(2, 3))
    windows = windows[:, :, :: image.stride, :: image.stride]
    direct = np.einsum("ncpqab,ocab->opqn", windows, kernel)
    np.testing.assert_allclose(matrix @ x, direct.reshape(-1, 3), atol=1e-13)

    exact = complex_step(lambda k: trust.convolution_matrix(k, image) @ x, kernel)
    found = trust.convolution_derivative(x, shape[0], shape[2:], image)
    assert error(found, exact) <= 1e-14
    dp = complex_step(lambda k: trust.convolution_matrix(k, image), kernel)
    by_chain = trust.affine_derivative(x, len(matrix), dp, bias=False)
    assert error(found, by_chain) <= 1e-14  # (21)
    np.testing.assert_array_equal(
        dp, complex_step(lambda k: trust.convolution_matrix(k, image), 0 * kernel)
    )


# --- bounds that the proofs use ----------------------------------------------------------------


def test_the_norm_of_normalised_weights_is_not_one() -> None:
    """Rows of wn are shorter than 1, so |wn|_2 < sqrt(rows), and equal rows come as near."""
    w = np.tile(normal(1, 5) * 1e6, (7, 1))
    assert np.linalg.norm(ops.weight_norm(w, eps=0.1), 2) == pytest.approx(math.sqrt(7), rel=1e-9)


@given(seed=seeds, eps=st.sampled_from([0.03, 0.1, 1.0]), scale=st.sampled_from([1.0, 6.0]))
@settings(max_examples=60, deadline=None)
def test_sphere_bounds(seed: int, eps: float, scale: float) -> None:
    """Value, derivative and second derivative never pass their bounds."""
    source = np.random.default_rng(seed)
    y = source.normal(size=(1, 3)) * 10 ** source.uniform(-3, 3)
    bounds = trust.sphere_bounds(eps=eps, scale=scale)
    assert np.linalg.norm(trust.sphere(y, eps=eps, scale=scale)) <= bounds.value
    first = trust.sphere_blocks(y, eps=eps, scale=scale)[0]
    assert np.linalg.norm(first, 2) <= bounds.derivative * (1 + 1e-14)
    h, k, j = (v / np.linalg.norm(v) for v in source.normal(size=(3, 3)))
    second = trust.sphere_second(y, eps=eps, scale=scale)[0]
    assert abs(np.einsum("jln,j,l,n", second, h, k, j)) <= bounds.lipschitz * (1 + 1e-12)


@pytest.mark.parametrize("scale", [1.0, 6.0])
def test_sphere_bounds_are_attained(scale: float) -> None:
    bounds, eps = trust.sphere_bounds(eps=0.2, scale=scale), 0.2
    assert np.linalg.norm(trust.sphere(np.array([[1e9]]), eps=eps, scale=scale)) == (
        pytest.approx(bounds.value)
    )
    flat = trust.sphere_blocks(np.zeros((1, 2)), eps=eps, scale=scale)
    np.testing.assert_allclose(flat[0], bounds.derivative * np.eye(2))
    steepest = np.array([[math.sqrt(scale * eps / 4)]])
    second = trust.sphere_second(steepest, eps=eps, scale=scale)
    assert abs(second.item()) == pytest.approx(bounds.lipschitz, rel=1e-14)


def test_lipschitz_of_layers() -> None:
    """Theorem 4.5: sampled lower estimates stay below the constants, and come close to them."""
    eps = 0.2
    bounds = trust.sphere_bounds(eps=eps)
    path = [np.array([[t, 0.3 * t, 0.1], [0.0, t, 0.0]]) for t in np.linspace(-1, 1, 400)]
    for derivative in (trust.weight_norm_derivative, trust.entry_norm_derivative):
        found = trust.lipschitz_estimate(lambda w, d=derivative: d(w, eps=eps), path)
        assert 0.5 * bounds.lipschitz < found <= bounds.lipschitz
    values = trust.lipschitz_estimate(lambda w: ops.entry_norm(w, eps=eps).reshape(1, -1), path)
    assert 0.9 * bounds.derivative < values <= bounds.derivative * (1 + 1e-12)


def test_lipschitz_of_a_product() -> None:
    """Lemma A.5, on sines and cosines."""
    assert trust.product_lipschitz([2.0, 3.0, 5.0], [1.0, 10.0, 100.0]) == 15 + 100 + 600
    times = [np.array([[t]]) for t in np.linspace(0, 3, 500)]
    estimate = trust.lipschitz_estimate(lambda t: 2 * np.sin(t) * 3 * np.cos(2 * t), times)
    assert estimate <= trust.product_lipschitz([2, 3], [2, 6])


def test_lipschitz_of_a_loss() -> None:
    """Corollary 4.4 with its constant, for (en(w) x - y)^2: no second derivative is larger."""
    eps, x, y = 0.2, 3.0, -0.5
    bounds = trust.sphere_bounds(eps=eps)
    of_f = trust.Bounds(x, x * bounds.derivative, x * bounds.lipschitz)
    of_gamma = trust.Bounds(math.inf, 2 * (x + abs(y)), 2.0)
    constant = trust.loss_lipschitz(of_f, of_gamma)
    w = [np.array([[t]]) for t in np.linspace(-3, 3, 3000)]

    def gradient(w: Any) -> Any:
        value, slope = ops.entry_norm(w, eps=eps), eps * (eps + w * w) ** -1.5
        return 2 * (value * x - y) * x * slope

    assert 0.3 * constant < trust.lipschitz_estimate(gradient, w) <= constant


@pytest.mark.parametrize("scale", [1.0, 10.0, 100.0, 1000.0])
def test_batch_norm_needs_a_covariance(scale: float) -> None:
    """J (bn o aff) grows like A where A looks along a direction in which X does not vary, as the
    proof of Theorem 4.5 says; with full covariance it does not."""
    eps, along = 0.1, np.array([[0.6], [0.8]])
    flat = along @ normal(1, 6) + np.array([[1.0], [-2.0]])  # covariance of rank 1
    across = np.array([[-0.8, 0.6]])

    def size(a: Any, x: Any) -> float:
        normalised = trust.batch_norm_jacobian(trust.affine(a, x), eps=eps)
        return float(np.linalg.norm(normalised @ trust.affine_jacobian(a, 6), 2))

    assert size(scale * across, flat) == pytest.approx(scale / math.sqrt(eps), rel=1e-9)
    spread = normal(2, 6)
    assert size(scale * across, spread) < 2.5
    assert size(scale * along.T, flat) < 2.5


# --- Jacobians by vjps -------------------------------------------------------------------------


def test_jacobian_of_several_arrays() -> None:
    """Columns in the order of the arrays; one forward pass serves every output."""
    calls = []

    def function(p: Any) -> Any:
        calls.append(1)
        return ops.tanh(ops.matmul(p["w"], X)) * p["s"] + 0.0 * p["w"][:, :1]

    params = {"s": normal(3, 1), "unused": normal(2), "w": A}
    found = trust.jacobian(function, params)
    assert len(calls) == 1
    assert found.shape == (15, 3 + 2 + 12)
    by_s = complex_step(lambda s: np.tanh(A @ X) * s, params["s"])
    by_w = complex_step(lambda w: np.tanh(w @ X) * params["s"], A)
    assert error(found, np.hstack((by_s, np.zeros((15, 2)), by_w))) <= 1e-14
    np.testing.assert_array_equal(trust.jacobian(lambda p: X, {"w": A}), np.zeros((20, 12)))
    assert trust.jacobian(lambda p: X, {}).shape == (20, 0)


def test_jacobian_on_every_backend(backend: backends.Backend) -> None:
    x = backend.asarray(X.astype("float32"))
    found = trust.batch_jacobian(lambda z: ops.batch_norm(z, channel_axis=0, eps=0.1), x)
    assert isinstance(found, np.ndarray)
    assert error(found, trust.batch_jacobian(
        lambda z: ops.batch_norm(z, channel_axis=0, eps=0.1), X)) <= 1e-5  # fmt: skip


def test_gram_spectrum() -> None:
    j = normal(6, 40)
    np.testing.assert_allclose(trust.gram_spectrum(j), trust.singular_values(j), rtol=1e-12)
    j[5] = j[4]
    found = trust.gram_spectrum(j)
    assert 0 <= found[-1] <= 1e-7 * found[0]


def test_sigma_and_lambda() -> None:
    """lambda(A) is sigma(A)^2 only where A has no more rows than columns."""
    wide, tall = normal(3, 5), normal(5, 3)
    for a in (wide, tall):
        assert trust.smallest_gram(a) == pytest.approx(
            max(np.linalg.eigvalsh(a @ a.T)[0], 0.0), abs=1e-12
        )
    assert trust.sigma(tall) > 0 == trust.smallest_gram(tall)


# --- the network of Theorem 5.1 ----------------------------------------------------------------

NET = NormalisedResidualNet((5, 4, 4, 3), hidden=6, eps=0.1, delta=0.1)


def point(seed: int, net: NormalisedResidualNet = NET, examples: int = 4) -> Any:
    random = Random(seed, "net")
    return net.system.at(net.draw(random), random.of("x").normal((net.widths[0], examples)))


def test_derivative_of_the_whole() -> None:
    """Proposition 4.2, equation (11), beside the derivative of F itself, and the blocks by hand."""
    p = point(0)
    params = {f"{n}/{k}": v for n, theta in enumerate(p.thetas) for k, v in theta.items()}

    def whole(flat: Any) -> Any:
        thetas = [{k: flat[f"{n}/{k}"] for k in theta} for n, theta in enumerate(p.thetas)]
        return NET.system(thetas, p.x)

    assert error(p.derivative, trust.jacobian(whole, params)) <= 1e-13
    assert p.derivative.shape == (3 * 4, 20 + (24 + 24 + 6) + (18 + 24 + 6))
    w = p.thetas[0]["w"]
    by_formula = trust.affine_derivative(
        p.x, 4, trust.entry_norm_derivative(w, eps=0.1), bias=False
    )
    assert error(p.blocks[0].parameters, by_formula) <= 1e-14
    theta, z = p.thetas[2], p.inputs[2]
    u, v = (trust.sphere(theta[name], eps=0.1) for name in "uv")
    slopes = trust.nonlinearity_jacobian(1 - np.tanh(v @ z + theta["c"]) ** 2)
    kappa = 0.9 / math.sqrt(3 * 6)
    branch = kappa * trust.affine_jacobian(u, 4) @ slopes @ trust.affine_jacobian(v, 4)
    by_formula = trust.residual_jacobian(np.eye(3, 4), branch, 4)
    assert error(p.blocks[2].input, by_formula) <= 1e-14


def test_bounds_of_six_nets() -> None:
    """lambda(DF) >= Proposition 4.6 >= our explicit form of Theorem 4.7, with the magnitudes that
    were seen before in six such nets, ten times wider."""
    found = []
    for seed in range(6):
        p = point(seed)
        bound, below = trust.proposition_4_6(p), NET.bound(p)
        assert below.guaranteed
        assert below.lhs <= bound.lhs <= bound.rhs == below.rhs == p.smallest
        first = trust.entry_norm_smallest(p.thetas[0]["w"], eps=0.1)
        x = np.linalg.svd(p.x, compute_uv=False)[-1]
        assert below.lhs == pytest.approx(x**2 * first**2 * 0.1**4, rel=1e-9)
        assert below.slack < 1e-9
        found.append((p.smallest, bound.lhs, below.lhs))
    for values, low, high in zip(
        np.array(found).T, (4.8e-4, 2.0e-5, 4e-13), (0.48, 5.6e-2, 2e-6), strict=True
    ):
        assert low / 30 < np.min(values) <= np.max(values) < 30 * high


@given(seed=seeds, size=st.floats(-3, 3), delta=st.sampled_from([0.05, 0.3, 0.9]))
@settings(max_examples=25, deadline=None)
def test_bounds_hold(seed: int, size: float, delta: float) -> None:
    """At any scale of the parameters: the chain, and Lemmas A.8 and A.9."""
    net = NormalisedResidualNet((4, 3, 2, 2), hidden=3, eps=0.2, delta=delta)
    random = Random(seed, "scaled")
    thetas = [{k: v * 10**size for k, v in theta.items()} for theta in net.draw(random)]
    p = net.system.at(thetas, random.of("x").normal((4, 3)))
    bound, below = trust.proposition_4_6(p), net.bound(p)
    assert below.guaranteed
    assert 0 < below.lhs <= bound.lhs * (1 + 1e-9)
    assert bound.lhs <= bound.rhs * (1 + 1e-9) + 1e-24
    assert all(trust.sigma(block.input) >= delta for block in p.blocks[1:])
    smallest = trust.entry_norm_smallest(thetas[0]["w"], eps=0.2)
    assert trust.sigma(p.blocks[0].parameters) >= trust.sigma(p.x) * smallest * (1 - 1e-9)


def test_more_examples_than_features_promise_nothing() -> None:
    """N > d_0: Df_1 has no full row rank. Later layers may make lambda(DF) positive, not at every
    theta: at 0 their Df_l vanish, and so does lambda(DF)."""
    p = point(1, examples=6)
    assert not NET.bound(p).guaranteed
    assert not NET.bound(p).holds_assumptions["N <= d_0 (not printed)"]
    assert trust.smallest_gram(p.blocks[0].parameters) <= 1e-25
    assert trust.proposition_4_6(p).lhs > 0
    for examples in (4, 6):
        first, *others = point(1, examples=examples).thetas
        flat = [first, *({k: 0 * v for k, v in theta.items()} for theta in others)]
        at_zero = NET.system.at(flat, point(1, examples=examples).x)
        assert (at_zero.smallest > 1e-6) == NET.bound(at_zero).guaranteed == (examples == 4)


@given(seed=seeds, bias=st.booleans())
@settings(max_examples=30, deadline=None)
def test_lemma_a_9_holds_where_both_factors_are_wide(seed: int, bias: bool) -> None:
    source = np.random.default_rng(seed)
    n, outputs = (int(k) for k in source.integers(1, 4, 2))
    features = n + int(source.integers(0, 3))
    dp = source.normal(size=(outputs * features, outputs * features + int(source.integers(0, 3))))
    found = trust.lemma_a_9(source.normal(size=(features, n)), dp, bias=bias)
    assert found.guaranteed
    assert found.lhs <= found.rhs * (1 + 1e-12)


def test_lemma_a_9_fails_as_printed() -> None:
    """P(w) = (0, 0, w) never sees these X: D aff_P has rank 1 with a bias and 0 without; and
    Theorem 4.7 with it, full ranks and all, as L = 1 shows. A convolution of two taps too."""
    x, dp = np.eye(3)[:, :2], np.array([[0.0], [0.0], [1.0]])
    for bias in (True, False):
        found = trust.lemma_a_9(x, dp, bias=bias)
        assert not found.guaranteed
        assert found.lhs == 1 > found.rhs == 0
    system = System((lambda theta, z: ops.matmul(ops.reshape(theta["w"], shape=(1, 1)), z[2:3]),))
    p = system.at([{"w": np.ones(1)}], x)
    assert np.linalg.matrix_rank(x) == 2
    assert np.linalg.matrix_rank(dp) == 1
    assert not trust.theorem_4_7(p, dp, delta=0.5).guaranteed
    assert p.smallest == 0 < trust.theorem_4_7(p, dp, delta=0.5).lhs

    image = Image(1, 1, 4)
    dp = complex_step(lambda k: trust.convolution_matrix(k, image), np.ones((1, 1, 1, 2)))
    flat = np.array([[1.0], [0.0], [0.0], [1.0]]) @ np.ones((1, 1))
    found = trust.lemma_a_9(flat, dp, bias=False)
    assert found.lhs > 2 > found.rhs
    assert not found.guaranteed


def test_an_expanding_layer_is_refused() -> None:
    with pytest.raises(Error, match=r"widths d_0, d_1 >= d_2 >= .* got \(4, 2, 3\), 0.1 and 0.1"):
        NormalisedResidualNet((4, 2, 3), hidden=2)
    with pytest.raises(Error, match=r"0 < delta < 1; got \(4, 2\), 0.1 and 1"):
        NormalisedResidualNet((4, 2), hidden=2, delta=1.0)
    with pytest.raises(Error, match=r"residual: .* got \(2, 3\) and a branch \(3, 2\)"):
        trust.residual(np.ones((2, 3)), np.ones((3, 2)))


def test_without_the_scale_the_branch_does_not_contract() -> None:
    """wn(U) tanh(wn(V) Z) alone: |J g|_2 may be as large as sqrt(d_l h) and sigma(Jf) reach 0."""
    h, d = 6, 4
    v, u = np.zeros((h, d)), np.full((d, h), -1e6)
    v[:, 0], u[1:] = 1e6, np.eye(h)[1:d] * 1e6
    branch = trust.sphere(u, eps=0.1) @ trust.sphere(v, eps=0.1)
    assert np.linalg.norm(branch, 2) > 2 > np.linalg.norm(branch, 2) / math.sqrt(d * h)
    t = 1 / math.sqrt(h)  # somewhere between no branch and this one, Jf is singular
    assert trust.sigma(np.eye(d) + t * branch) < 1e-6
    assert trust.sigma(np.eye(d) + 0.9 / math.sqrt(d * h) * branch) >= 0.1


@given(seed=seeds)
@settings(max_examples=25, deadline=None)
def test_theorem_2_4(seed: int) -> None:
    """The pointwise inequality, for the square loss, whose mu is 4 / n without a factor 1/2; and
    the gradient in it is the gradient."""
    net = NormalisedResidualNet((4, 3, 2), hidden=2, eps=0.3, delta=0.2)
    p = point(seed, net)
    target = Random(seed, "y").normal((2, 4))

    def gamma(z: Any) -> Any:
        return ops.squared_error(z, target)

    found = trust.theorem_2_4(p, gamma, mu=4 / 8)
    assert 0 < found.lhs <= found.rhs
    leaves = [{k: Tensor(v) for k, v in theta.items()} for theta in p.thetas]
    g = backward(gamma(net.system(leaves, p.x)), np.ones(()))
    squares = sum(float((g[id(t)] ** 2).sum()) for theta in leaves for t in theta.values())
    assert found.rhs == pytest.approx(squares, rel=1e-11)


def test_the_convention_of_mu_is_sharp() -> None:
    """For F(theta) = theta Theorem 2.4 is an equality at mu = 4 / n; at 8 / n it fails."""
    system = System((lambda theta, x: theta["z"] + 0.0 * x,))
    p = system.at([{"z": normal(2, 3)}], np.zeros((2, 3)))

    def gamma(z: Any) -> Any:
        return ops.squared_error(z, np.ones((2, 3)))

    found = trust.theorem_2_4(p, gamma, mu=4 / 6)
    assert found.lhs == pytest.approx(found.rhs, rel=1e-12)
    assert trust.theorem_2_4(p, gamma, mu=8 / 6).lhs > found.rhs
    value = float(gamma(p.inputs[-1]))
    half = trust.theorem_2_4(p, gamma, mu=4 / 6, infimum=value / 2)
    assert half.lhs == pytest.approx(found.lhs / 2, rel=1e-12)


def test_descent() -> None:
    """Gradient descent on the instance: every step lowers the loss, and by as much as (37) says
    with the Lipschitz constant seen on the way."""
    net = NormalisedResidualNet((3, 3, 2), hidden=2, eps=0.5, delta=0.2)
    random = Random(3, "descent")
    thetas, x, y = net.draw(random), random.of("x").normal((3, 3)), random.of("y").normal((2, 3))
    names = [(n, k) for n, theta in enumerate(thetas) for k in theta]

    def loss(params: Any) -> Any:
        parts = [{k: params[f"{n}{k}"] for m, k in names if m == n} for n in range(2)]
        return ops.squared_error(net.system(parts, x), y)

    params = {f"{n}{k}": thetas[n][k] for n, k in names}
    eta = 0.2
    value, g = value_and_grad(loss)(params)
    for _ in range(40):
        now = [{k: params[f"{n}{k}"] for m, k in names if m == n} for n in range(2)]
        mu = 4 / 6 * net.system.at(now, x).smallest
        moved = {name: p - eta * g[name] for name, p in params.items()}
        after, next_g = value_and_grad(loss)(moved)
        change = math.sqrt(sum(((next_g[n] - g[n]) ** 2).sum() for n in g))
        beta = 1.5 * change / (eta * math.sqrt(sum((v**2).sum() for v in g.values())))
        assert eta < 2 / beta
        assert 0 < after < value
        assert after <= trust.descent_factor(eta, beta=beta, mu=mu) * value
        params, value, g = moved, after, next_g


def test_descent_factor() -> None:
    assert trust.descent_factor(0.5, beta=2.0, mu=0.25) == 1 - 0.25 * 0.5 * 0.5
    for eta in (0.0, 1.0, -1.0):
        with pytest.raises(Error, match="0 < eta < 2 / beta; got eta"):
            trust.descent_factor(eta, beta=2.0, mu=1.0)


# --- the shortcut, the figure, the envelope ----------------------------------------------------


@pytest.mark.parametrize(
    ("image", "outputs", "before", "ones", "zeros"),
    [
        (Image(4, 8, 8, stride=2), 8, None, 64, 64),
        (Image(3, 4, 4, stride=2), 7, 1, 12, 16),
        (Image(5, 12, 12, stride=3), 20, 7, 80, 240),
        (Image(3, 2, 2), 12, None, 12, 0),
    ],
    ids=["cifar", "uneven", "mnist", "stride 1"],
)
def test_the_modified_shortcut_is_a_partial_isometry(
    image: Image, outputs: int, before: Any, ones: int, zeros: int
) -> None:
    """Channel padding leaves zeros: not "all singular values equal to 1"."""
    e = trust.pooled_shortcut(image, outputs, before=before)
    pixels = math.prod(image[:3])
    assert e.shape == (outputs * pixels // image.channels // image.stride**2, pixels)
    s = np.linalg.svd(e, compute_uv=False)
    assert (int((s > 0.5).sum()), int((s < 0.5).sum())) == (ones, zeros)
    np.testing.assert_allclose(s, [1.0] * ones + [0.0] * zeros, atol=1e-13)
    np.testing.assert_allclose(e @ e.T @ e, e, atol=1e-14)
    if image.stride == 1:
        assert e.shape[0] > e.shape[1]  # it expands: Theorem 4.7 excludes it


def test_the_shortcut_pools_and_pads() -> None:
    x = normal(2 * 4 * 4)
    means = x.reshape(2, 2, 2, 2, 2).mean((2, 4))
    for before, front in ((None, 2), (1, 1)):
        found = trust.pooled_shortcut(Image(2, 4, 4, stride=2), 5, before=before) @ x
        wanted = np.zeros((5, 2, 2))
        wanted[front : front + 2] = 2 * means
        np.testing.assert_allclose(found, wanted.reshape(-1), atol=1e-14)
    with pytest.raises(Error, match="4 zero channels in front of 3 in all"):
        trust.pooled_shortcut(Image(2, 4, 4), 5, before=4)
    with pytest.raises(Error, match=r"a kernel \(5, 5\) does not fit"):
        trust.pooled_shortcut(Image(1, 4, 4, stride=5), 2)


def test_identity_moves_singular_values_from_zero() -> None:
    """The authors' figure, as statistics of one draw: 43 % below 0.4 become 3.4 %."""
    a = (2 * Random(0, "figure").uniform((500, 500)) - 1) / math.sqrt(500)
    plain, shifted = trust.skip_spectra(a)
    assert plain[0] == pytest.approx(2 / math.sqrt(3), abs=0.04)
    assert plain[-1] < 5e-3
    assert np.mean(plain) == pytest.approx(0.490, abs=0.01)
    assert np.mean(plain < 0.4) == pytest.approx(0.43, abs=0.02)
    assert (shifted[-1], shifted[0]) == pytest.approx((0.291, 1.878), abs=0.05)
    assert np.mean(shifted) == pytest.approx(1.084, abs=0.01)
    assert np.mean(shifted < 0.4) == pytest.approx(0.034, abs=0.015)


def test_the_envelope() -> None:
    """r ~ (4 C eps eta t + 1)^(1/4); the sum of sigma grows without end, that of its square, to
    which Theorem 2.4 leads, does not: 2.1, 5.2, 11.0, 21.4 beside .060, .074, .0789, .0804."""
    eps, eta = 0.1, 0.5
    r = trust.escaping_radius(10**5, c=1.0, eps=eps, eta=eta)
    t = np.arange(len(r))
    ratio = r / (4 * eps * eta * t + 1) ** 0.25
    assert np.all((ratio >= 1 - 1e-12) & (ratio <= 1.03))
    assert ratio[-1] == pytest.approx(1, abs=1e-4)
    slopes = eps * (eps + r * r) ** -1.5
    assert slopes[10] == trust.entry_norm_smallest(np.array([[r[10]]]), eps=eps)
    ends = [10**2, 10**3, 10**4, 10**5]
    sums, squares = (np.cumsum(v)[ends] - v[0] for v in (slopes, slopes**2))
    np.testing.assert_allclose(sums, [2.1, 5.2, 11.0, 21.4], rtol=0.03)
    np.testing.assert_allclose(squares, [0.060, 0.074, 0.0789, 0.0804], rtol=0.01)


def test_matrices_are_asked_for() -> None:
    with pytest.raises(Error, match=r"sphere: expected a matrix; got shape \(3,\)"):
        trust.sphere(B, eps=0.1)


# --- the bounds in float64 --------------------------------------------------------------------


def exact(a: np.ndarray) -> Any:
    return mpmath.matrix(a.tolist())


def exact_sigma(a: Any) -> Any:
    """The smallest singular value, at 100 digits."""
    return min(mpmath.svd_r(a if a.rows >= a.cols else a.T, compute_uv=False))


def exact_lambda(a: Any) -> Any:
    return exact_sigma(a) ** 2 if a.cols >= a.rows else mpmath.mpf(0)


@pytest.mark.parametrize("count", [25, pytest.param(2_000, marks=pytest.mark.soak)])
def test_guaranteed_is_guaranteed(count: int) -> None:
    """Of a network of any scale, in float64, and both sides again at 100 digits for the blocks as
    they are."""
    rng, guaranteed = np.random.default_rng(0), 0
    for seed in range(count):
        delta = float(rng.choice([0.05, 0.3, 0.9]))
        net = NormalisedResidualNet((3, 2, 2), hidden=2, eps=0.2, delta=delta)
        random = Random(seed, "rounding")
        sizes = 10.0 ** rng.uniform(-100, 6, size=3)
        thetas = [{k: v * sizes[0] for k, v in theta.items()} for theta in net.draw(random)]
        p = net.system.at(thetas, random.of("x").normal((3, 2)) * sizes[1])
        target = random.of("y").normal((2, 2)) * sizes[2]

        def gamma(z: Any, target: Any = target) -> Any:
            return ops.squared_error(z, target)

        dp = trust.entry_norm_derivative(thetas[0]["w"], eps=0.2)
        found = {
            "4.6": trust.proposition_4_6(p),
            "4.7": net.bound(p),
            "A.9": trust.lemma_a_9(p.x, dp, bias=False),
            "2.4": trust.theorem_2_4(p, gamma, mu=4 / 4),
        }
        for i in found.values():
            if i.guaranteed:
                assert i.lhs <= i.rhs, i
                assert i.log_lhs <= i.log_rhs, i
                guaranteed += 1
        if seed % 20 and count > 100:
            continue
        with mpmath.workdps(100):
            first, second = ([exact(a) for a in block] for block in p.blocks)
            wholes = second[0] * first[1], second[1]
            df = mpmath.matrix(4, wholes[0].cols + wholes[1].cols)
            df[:, : wholes[0].cols], df[:, wholes[0].cols :] = wholes
            right = exact_lambda(df)
            left = exact_lambda(second[1]) + exact_lambda(second[0]) * exact_lambda(first[1])
            factors = exact_sigma(exact(p.x)) * exact_sigma(exact(dp))
            sides = {
                "4.6": (left, right),
                "4.7": ((factors * delta) ** 2, right),
                "A.9": (factors, None),
            }
            for name, (lhs, rhs) in sides.items():
                i = found[name]
                if i.guaranteed:
                    assert i.lhs <= lhs * (1 + mpmath.mpf(10) ** -80), i
                    assert lhs <= i.lhs * (1 + i.slack) ** 2 * (1 + 1e-15) + 1e-300, i
                    assert rhs is None or abs(rhs - i.rhs) <= i.slack * 2 * i.rhs + 1e-300, i
                    assert rhs is None or lhs <= rhs * (1 + 1e-9), i
    assert guaranteed > count


def test_what_is_not_measured_is_not_guaranteed() -> None:
    """NaN, a wrong mu, a wrong infimum, and a sigma of the size of its own rounding error."""
    p = point(0)

    def gamma(z: Any) -> Any:
        return ops.squared_error(z, np.ones((3, 4)))

    assert trust.theorem_2_4(p, gamma, mu=4 / 12).guaranteed
    for mu, infimum in (
        (8 / 12, 0.0),
        (math.nan, 0.0),
        (0.0, 0.0),
        (4 / 12, 1e9),
        (4 / 12, math.nan),
    ):
        assert not trust.theorem_2_4(p, gamma, mu=mu, infimum=infimum).guaranteed
    for delta in (math.nan, 0.0, -1.0, 0.999):
        dp = trust.entry_norm_derivative(p.thetas[0]["w"], eps=0.1)
        assert not trust.theorem_4_7(p, dp, delta=delta).guaranteed
    flat = NET.system.at([{k: 1e9 * v for k, v in t.items()} for t in p.thetas], p.x)
    assert not NET.bound(flat).guaranteed
    bad = NET.system.at(p.thetas, p.x * math.nan)
    with quiet():
        assert not trust.proposition_4_6(bad).guaranteed
        assert not NET.bound(bad).guaranteed
        assert not trust.theorem_2_4(bad, gamma, mu=4 / 12).guaranteed
    x = np.eye(3)[:, :2]
    assert not trust.lemma_a_9(x * math.nan, np.eye(6)).guaranteed
    assert not trust.lemma_a_9(x, np.outer(np.ones(6), np.ones(6)), bias=False).guaranteed


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: trust.sphere_bounds(eps=0.0), "expected eps > 0 and scale > 0; got 0.0 and 1.0"),
        (lambda: trust.sphere_bounds(eps=0.1, scale=-1.0), "got 0.1 and -1.0"),
        (lambda: trust.product_lipschitz([1.0], [1.0, 2.0]), "1 bounds and 2 constants"),
        (lambda: trust.lipschitz_estimate(np.sin, [np.eye(2)]), "two points that differ"),
        (lambda: trust.lipschitz_estimate(np.sin, [np.eye(2)] * 3), "two points that differ"),
        (lambda: trust.descent_factor(0.5, beta=2.0, mu=math.nan), "expected mu >= 0; got nan"),
        (lambda: trust.lemma_a_9(np.eye(3), np.eye(4)), "4 rows, no multiple of the 3 features"),
        (
            lambda: trust.convolution_matrix(np.ones((1, 1, 2, 2)), Image(1, 4, 4, stride=0)),
            "a stride of at least 1",
        ),
        (lambda: trust.pooled_shortcut(Image(1, 4, 4, stride=0), 2), "a stride of at least 1"),
    ],
)
def test_errors(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(Error, match=message):
        call()
    assert np.all(np.isfinite(trust.escaping_radius(3, c=1e200, eps=1.0, eta=1.0)))
