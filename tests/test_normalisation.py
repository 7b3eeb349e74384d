"""Batch, layer, group, weight and entry normalisation: against PyTorch, over several steps, in
programs; what they leave unchanged; what they refuse. The table of test_ops holds each alone."""

from __future__ import annotations

import re
import warnings
from typing import Any

import backends
import numpy as np
import pytest
import threadpoolctl
from hypothesis import given, settings
from hypothesis import strategies as st
from test_program import FIXED, check, peak

from npdrt import Error, check_gradients, ops, record, value_and_grad
from npdrt.autodiff import Tensor, backward
from npdrt.ops.normalisation import batch_statistics, running_statistics
from npdrt.ops.spectral import power_iteration
from npdrt.random import Random

DTYPES = ("float32", "float64")
seeds = st.integers(0, 2**32 - 1)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return Random(seed, str(shape)).normal(shape)


def error(ours: Any, reference: Any) -> float:
    """max|difference| / max|reference|."""
    ours, reference = np.asarray(ours, dtype=float), np.asarray(reference, dtype=float)
    assert ours.shape == reference.shape
    return float(np.max(np.abs(ours - reference)) / np.max(np.abs(reference)))


def gradients(y: Tensor, g: Any, *leaves: Tensor) -> list[Any]:
    found = backward(y, g)
    return [found[id(leaf)] for leaf in leaves]


# --- PyTorch's modules, over several steps ---------------------------------------------------


def images(step: int = 0) -> np.ndarray:
    """(C, N, H, W), every channel with a mean and a size of its own."""
    size = np.array([1.0, 30.0, 0.01, 2.0, 1e-3]).reshape(-1, 1, 1, 1)
    return size * (normal(5, 6, 4, 3, seed=step) + np.arange(-2, 3).reshape(-1, 1, 1, 1))


@pytest.mark.parametrize("momentum", [0.1, 0.25])
def test_training_equals_batchnorm2d(momentum: float) -> None:
    """Value, gradients and running statistics; then evaluation with these."""
    torch = pytest.importorskip("torch")
    twin = torch.nn.BatchNorm2d(5, momentum=momentum, dtype=torch.float64)
    gain, bias = normal(5, seed=1), normal(5, seed=2)
    with torch.no_grad():
        twin.weight.copy_(torch.from_numpy(gain))
        twin.bias.copy_(torch.from_numpy(bias))
    mean, variance = np.zeros(5), np.ones(5)
    for step in range(4):
        leaves = [Tensor(a) for a in (images(step), gain, bias)]
        statistics = batch_statistics(leaves[0], channel_axis=0)
        y = ops.batch_norm(*leaves, statistics, channel_axis=0)
        mean, variance = running_statistics(mean, variance, statistics, momentum=momentum)
        g = normal(5, 6, 4, 3, seed=50 + step)

        x = torch.from_numpy(images(step).swapaxes(0, 1).copy()).requires_grad_()
        theirs = twin(x)
        wanted = torch.autograd.grad(
            theirs, (x, twin.weight, twin.bias), torch.from_numpy(g.swapaxes(0, 1).copy())
        )
        assert error(y.value, theirs.detach().numpy().swapaxes(0, 1)) <= 1e-12
        gx, ggain, gbias = gradients(y, g, *leaves)
        for channel in range(5):  # each has its own size
            of_it = wanted[0].numpy()[:, channel]
            assert error(gx[channel], of_it) <= 1e-12 * (1 + 1e2 * (channel == 4))
        assert error(ggain, wanted[1].numpy()) <= 1e-12
        assert error(gbias, wanted[2].numpy()) <= 1e-12
        np.testing.assert_allclose(mean, twin.running_mean.numpy(), rtol=1e-15)
        np.testing.assert_allclose(variance, twin.running_var.numpy(), rtol=1e-15)
    twin.eval()
    y = ops.batch_norm_inference(images(9), mean, variance, gain, bias, channel_axis=0)
    theirs = twin(torch.from_numpy(images(9).swapaxes(0, 1).copy()))
    assert error(y, theirs.detach().numpy().swapaxes(0, 1)) <= 1e-12


def test_features_equal_batchnorm1d() -> None:
    torch = pytest.importorskip("torch")
    twin, x = torch.nn.BatchNorm1d(4, dtype=torch.float64), normal(7, 4)
    statistics = batch_statistics(x, channel_axis=1)
    theirs = twin(torch.from_numpy(x)).detach().numpy()
    assert error(ops.batch_norm(x, None, None, statistics, channel_axis=1), theirs) <= 1e-12
    mean, variance = running_statistics(np.zeros(4), np.ones(4), statistics)
    np.testing.assert_allclose(mean, twin.running_mean.numpy(), rtol=1e-15)
    np.testing.assert_allclose(variance, twin.running_var.numpy(), rtol=1e-15)


def test_a_normalised_kernel_equals_torch() -> None:
    """Spectral normalisation of OIHW kernels as (O, I kh kw): one iteration a training pass."""
    torch = pytest.importorskip("torch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the older of its two, which begins with v as the paper
        twin = torch.nn.utils.spectral_norm(torch.nn.Conv2d(3, 4, (2, 5), dtype=torch.float64))
    w, u = twin.weight_orig.detach().numpy().copy(), twin.weight_u.numpy().copy()
    for _ in range(3):
        leaf = Tensor(w)
        rows = ops.reshape(leaf, shape=(4, -1))
        u, v = power_iteration(rows, u, iterate=True)
        normalised = ops.reshape(ops.spectral_normalise(rows, u, v), shape=w.shape)
        twin(torch.zeros(1, 3, 6, 6, dtype=torch.float64))  # moves u by one iteration
        np.testing.assert_allclose(u, twin.weight_u.numpy(), rtol=0, atol=1e-13)
        assert error(normalised.value, twin.weight.detach().numpy()) <= 1e-12
        g = normal(*w.shape, seed=3)
        (theirs,) = torch.autograd.grad(twin.weight, twin.weight_orig, torch.from_numpy(g))
        assert error(gradients(normalised, g, leaf)[0], theirs.numpy()) <= 1e-12


# --- statistics --------------------------------------------------------------------------------


def test_given_statistics_change_no_bit() -> None:
    for x, axis in ((images(), 0), (images(), 2), (normal(6, 3), -1)):
        gain, g = normal(x.shape[axis]), normal(*x.shape, seed=8)
        results = []
        for statistics in (None, batch_statistics(x, channel_axis=axis)):
            leaves = Tensor(x), Tensor(gain)
            y = ops.batch_norm(*leaves, None, statistics, channel_axis=axis)
            results.append([y.value, *gradients(y, g, *leaves)])
        for one, other in zip(*results, strict=True):
            np.testing.assert_array_equal(one, other)


def test_statistics_are_constants_and_biased() -> None:
    found = batch_statistics(Tensor(images()), channel_axis=0)
    assert not any(isinstance(part, Tensor) for part in found)
    np.testing.assert_allclose(found.mean, images().mean((1, 2, 3)), rtol=1e-13)
    np.testing.assert_allclose(found.variance, images().var((1, 2, 3)), rtol=1e-13)
    assert found.n == 72
    np.testing.assert_array_equal(found.centred.shape, images().shape)


@pytest.mark.parametrize("offset", [0.0, 1e3, 1e6])
def test_a_large_mean_costs_no_digits(offset: float) -> None:
    """The mean goes first: what is left is as exact as x. A sum of squares would lose it all."""
    x = (normal(3, 5, 40) + offset).astype("float32")
    g = normal(3, 5, 40, seed=1).astype("float32")
    leaves = Tensor(x), Tensor(np.ones(3, "float32"))
    exact = Tensor(x.astype("float64")), Tensor(np.ones(3))
    y, wanted = (ops.batch_norm(*a, channel_axis=0) for a in (leaves, exact))
    pairs = zip(gradients(y, g, *leaves), gradients(wanted, g.astype(float), *exact), strict=True)
    slack = 2e-6 + 2e-7 * offset / 4  # of the mean itself, in float32
    assert error(y.value, wanted.value) <= slack
    assert all(error(a, b) <= slack for a, b in pairs)


def test_statistics_on_every_backend(backend: backends.Backend) -> None:
    for dtype in DTYPES:
        x = images().astype(dtype)
        expected = batch_statistics(x, channel_axis=0)
        waits = backends.synchronisations
        found = batch_statistics(backend.asarray(x), channel_axis=0)
        zeros, ones = (backend.asarray(np.full(5, v, dtype)) for v in (0, 1))
        running = running_statistics(zeros, ones, found)
        y = ops.batch_norm(backend.asarray(x), None, None, found, channel_axis=0)
        assert backends.synchronisations == waits
        wanted = running_statistics(np.zeros(5, dtype), np.ones(5, dtype), expected)
        theirs = ops.batch_norm(x, channel_axis=0)
        for a, b in zip((*running, y), (*wanted, theirs), strict=True):
            host = backend.to_host(a)
            assert host.dtype == b.dtype == dtype
            assert error(host, b) <= (0.0 if backend.exact else 1e-5)


# --- what does not matter ----------------------------------------------------------------------


@given(seed=seeds, power=st.integers(-8, 8), shift=st.integers(-64, 64))
@settings(max_examples=40, deadline=None)
def test_scale_and_shift_of_the_input(seed: int, power: int, shift: int) -> None:
    """With eps = 0 neither matters: to the bit for a power of two, the sign aside."""
    x = normal(4, 3, 5, seed=seed)
    for y in (
        lambda a: ops.batch_norm(a, channel_axis=0, eps=0.0),
        lambda a: ops.layer_norm(a, eps=0.0),
        lambda a: ops.group_norm(a, groups=2, channel_axis=0, eps=0.0),
    ):
        np.testing.assert_array_equal(y(x * 2.0**power), y(x))
        np.testing.assert_array_equal(y(-x), -y(x))
        assert error(y(x + shift), y(x)) <= 1e-13
    w = x.reshape(4, -1)
    np.testing.assert_array_equal(ops.weight_norm(w * 2.0**power), ops.weight_norm(w))
    np.testing.assert_array_equal(ops.entry_norm(-w, eps=0.1), -ops.entry_norm(w, eps=0.1))


@given(seed=seeds)
@settings(max_examples=25, deadline=None)
def test_gradients_are_orthogonal_to_what_does_not_matter(seed: int) -> None:
    """sum gx = 0 and, with eps = 0, sum gx x = 0 in every channel; <gw, w> = 0 in every row."""
    x, g = normal(4, 3, 5, seed=seed), normal(4, 3, 5, seed=seed + 1)
    leaf = Tensor(x)
    (gx,) = gradients(ops.batch_norm(leaf, normal(4, seed=seed), channel_axis=0, eps=0.0), g, leaf)
    scale = np.abs(gx).sum()
    assert np.max(np.abs(gx.sum((1, 2)))) <= 1e-14 * scale
    assert np.max(np.abs((gx * x).sum((1, 2)))) <= 1e-13 * scale
    leaf = Tensor(x)
    (gx,) = gradients(ops.layer_norm(leaf, normal(5, seed=seed), eps=0.0), g, leaf)
    assert np.max(np.abs(gx.sum(-1))) <= 1e-13 * np.abs(gx).sum()
    leaf = Tensor(x)
    (gw,) = gradients(ops.weight_norm(leaf, normal(4, seed=seed)), g, leaf)
    assert np.max(np.abs((gw * x).sum((1, 2)))) <= 1e-14 * np.abs(gw).sum()


@given(seed=seeds, eps=st.sampled_from([0.0, 1e-5, 0.5]))
@settings(max_examples=30, deadline=None)
def test_means_and_variances(seed: int, eps: float) -> None:
    """0, and v / (v + eps) where v was the variance."""
    x = 3 * normal(4, 6, 5, seed=seed) - 1
    cases = [
        (ops.batch_norm(x, channel_axis=1, eps=eps), x, (0, 2)),
        (ops.layer_norm(x, axes=(1, 2), eps=eps), x, (1, 2)),
        (ops.layer_norm(x, axes=0, eps=eps), x, (0,)),
        (
            ops.group_norm(x, groups=2, channel_axis=0, eps=eps).reshape(2, 2, 6, 5),
            x.reshape(2, 2, 6, 5),
            (1, 3),
        ),
    ]
    for y, given_x, axes in cases:
        v = given_x.var(axes)
        assert np.max(np.abs(y.mean(axes))) <= 1e-14
        np.testing.assert_allclose(y.var(axes), v / (v + eps), rtol=1e-13)


@given(seed=seeds, eps=st.sampled_from([1e-5, 0.1, 10.0]))
@settings(max_examples=30, deadline=None)
def test_sizes_of_normalised_weights(seed: int, eps: float) -> None:
    """Rows below 1, so that the spectral norm is below sqrt(rows), not 1; entries below 1."""
    w = 10.0 ** (seed % 5 - 2) * normal(7, 3, seed=seed)
    rows = ops.weight_norm(w, eps=eps)
    assert np.max(np.linalg.norm(rows, axis=1)) < 1
    assert np.linalg.norm(rows, 2) < np.sqrt(7)
    assert np.max(np.abs(ops.entry_norm(w, eps=eps))) < 1
    gain = np.abs(normal(7, seed=seed)) + 0.1
    np.testing.assert_allclose(np.linalg.norm(ops.weight_norm(w, gain), axis=1), gain, rtol=1e-14)


def test_every_row_by_itself() -> None:
    """A row of layer norm, and a channel of batch norm, have the same bits beside any others."""
    x = normal(6, 4, 50)
    for rows in (slice(0, 1), slice(2, 5)):
        np.testing.assert_array_equal(ops.layer_norm(x[rows]), ops.layer_norm(x)[rows])
        ours = ops.batch_norm(x[rows], channel_axis=0)
        np.testing.assert_array_equal(ours, ops.batch_norm(x, channel_axis=0)[rows])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [8191, 8192, 20000])
def test_long_rows(n: int, dtype: str) -> None:
    """In pieces: exact, the same bits on any number of threads, and the same replayed."""

    def step(x: Any, gain: Any, g: Any) -> Any:
        leaves = Tensor(x), Tensor(gain)
        y = ops.batch_norm(*leaves, channel_axis=0)
        value = y.value
        return value, gradients(y, g, *leaves)

    args = [normal(3, n).astype(dtype), normal(3).astype(dtype), normal(3, n, seed=1).astype(dtype)]
    found = []
    for threads in (1, 2):
        with threadpoolctl.threadpool_limits(threads):
            check(step, *args)
            found.append(step(*args))
    (y, (gx, ggain)), (other, others) = found
    for a, b in zip((y, gx, ggain), (other, *others), strict=True):
        np.testing.assert_array_equal(a, b)
    x, gain, g = (a.astype(float) for a in args)
    xhat = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5)
    slack = 1e-14 if dtype == "float64" else 5e-7
    assert error(y, xhat * gain[:, None]) <= slack
    assert np.max(np.abs(ggain - (g * xhat).sum(1))) <= slack * n**0.5 * 10


def test_groups() -> None:
    """One group is layer norm of an example, a group a channel normalises each image."""
    x = normal(2, 6, 3, 4)
    one = ops.group_norm(x, groups=1, channel_axis=1)
    assert error(one, ops.layer_norm(x, axes=(1, 2, 3))) <= 1e-14
    each = ops.group_norm(x, groups=6, channel_axis=1)
    assert error(each, ops.layer_norm(x, axes=(2, 3))) <= 1e-14
    turned = ops.group_norm(x.swapaxes(0, 1), groups=3, channel_axis=0)
    assert error(turned.swapaxes(0, 1), ops.group_norm(x, groups=3, channel_axis=1)) <= 1e-14


# --- in networks and programs ------------------------------------------------------------------


def network(params: Any, buffers: Any, x: Any, y: Any) -> Any:
    """(loss, buffers): every layer of this file, channels first, then features."""
    moved = dict(buffers)
    w = ops.weight_norm(params["w"], params["g"])
    h = ops.reshape(ops.matmul(w, ops.reshape(x, shape=(3, -1))), shape=(4, *x.shape[1:]))
    found = batch_statistics(h, channel_axis=0)
    moved["mean"], moved["var"] = running_statistics(buffers["mean"], buffers["var"], found)
    h = ops.tanh(ops.batch_norm(h, params["gain"], params["bias"], found, channel_axis=0))
    h = ops.tanh(ops.group_norm(h, params["gain"], None, groups=2, channel_axis=0))
    h = ops.reshape(ops.transpose(h, axes=(1, 0, 2, 3)), shape=(x.shape[1], -1))
    h = ops.linear(h, ops.entry_norm(params["last"], eps=0.1))
    h = ops.layer_norm(h, params["scale"], params["shift"])
    h = ops.batch_norm_inference(
        h, x[0, :5, 0, 0], x[1, :5, 0, 0] ** 2, params["shift"], params["scale"], channel_axis=1
    )
    return ops.softmax_cross_entropy(ops.batch_norm(h, channel_axis=1), y), moved


def problem(dtype: str, n: int = 5, side: int = 3) -> tuple[Any, Any, Any, Any]:
    shapes = {
        **{"w": (4, 3), "g": (4,), "gain": (4,), "bias": (4,)},
        **{"last": (5, 4 * side * side), "scale": (5,), "shift": (5,)},
    }
    params = {name: normal(*shape, seed=len(name)) for name, shape in shapes.items()}
    buffers = {"mean": np.zeros(4), "var": np.ones(4)}
    x, y = normal(3, n, side, side), np.arange(n) % 5
    convert = {name: a.astype(dtype) for name, a in params.items()}
    return convert, {k: a.astype(dtype) for k, a in buffers.items()}, x.astype(dtype), y


def test_a_network_against_the_complex_step() -> None:
    params, buffers, x, y = problem("float64")
    found = check_gradients(lambda p: network(p, buffers, x, y)[0], params, method="complex")
    assert found.error <= 1e-12


def training(params: Any, buffers: Any, x: Any, y: Any) -> Any:
    (loss, buffers), grads = value_and_grad(network, has_aux=True)(params, buffers, x, y)
    return {name: p - 0.1 * grads[name] for name, p in params.items()}, buffers, loss


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "side"), [(5, 3), (16, 32)])
def test_a_recorded_step_has_the_bits_of_the_eager_one(dtype: str, n: int, side: int) -> None:
    program = check(training, *problem(dtype, n, side))
    params, buffers, x, y = problem(dtype, n, side)
    eager = held = (params, buffers)
    for _ in range(3):
        *eager, loss = training(*eager, x, y)
        *held, found = program(*held, x, y)
        assert found == loss
    for ours, theirs in zip(held, eager, strict=True):
        for name, value in theirs.items():
            np.testing.assert_array_equal(ours[name], value)


def test_a_replay_allocates_nothing_that_grows() -> None:
    args = problem("float64", 16, 48)
    assert args[2].nbytes > FIXED
    assert peak(record(training, *args), args) < FIXED


def test_the_batch_is_summed_once() -> None:
    """A program has one sum over x forward and one over the cotangent backward a batch norm."""

    def step(x: Any, gain: Any, bias: Any, g: Any) -> Any:
        leaves = Tensor(x), Tensor(gain), Tensor(bias)
        found = batch_statistics(leaves[0], channel_axis=0)
        return gradients(ops.batch_norm(*leaves, found, channel_axis=0), g, *leaves)

    args = (images(), normal(5), normal(5), normal(*images().shape, seed=2))
    program = record(step, *args)
    large = [
        c.function
        for c in program.calls
        if c.refs
        and c.kind != "view"
        and max(program.values[i].size for i in (*c.refs, c.result)) == images().size
    ]
    assert sorted(large) == sorted(
        [*["sum", "matmul"] * 2, *["subtract", "multiply", "add"], *["multiply"] * 2,
         *["subtract"] * 2]
    )  # fmt: skip


# --- errors ------------------------------------------------------------------------------------

X = np.ones((3, 4))
OF_ANOTHER = batch_statistics(X.T, channel_axis=0)
ERRORS = {
    r"batch statistics need more than 1 value a channel; got 1 in shape (1, 3), channels in "
    r"axis 1; use a larger batch": lambda: ops.batch_norm(X[:1, :3], channel_axis=1),
    r"more than 1 value a channel; got 0 in shape (3, 0)":
        lambda: ops.batch_norm(X[:, :0], channel_axis=0),
    r"axis 2 is out of range for 2 dimension": lambda: ops.batch_norm(X, channel_axis=2),
    r"batch_norm: expected vectors of 3 channels, axis 0 of x (3, 4); got shape (4,)":
        lambda: ops.batch_norm(X, np.ones(4), channel_axis=0),
    r"batch_norm: expected vectors of 4 channels, axis 1 of x (3, 4); got shape (4, 1)":
        lambda: ops.batch_norm(X, np.ones(4), np.ones((4, 1)), channel_axis=-1),
    r"batch_norm: eps must not be negative; got -1": lambda: ops.batch_norm(
        X, channel_axis=0, eps=-1),
    r"batch_norm: eps must not be negative; got nan": lambda: ops.batch_norm(
        X, channel_axis=0, eps=float("nan")),
    r"batch_norm: expected arrays of one dtype, float32 or float64; got float64, float32":
        lambda: ops.batch_norm(X, np.ones(3, "float32"), channel_axis=0),
    r"batch_norm: expected arrays of one dtype, float32 or float64; got int64":
        lambda: ops.batch_norm(X.astype(int), channel_axis=0),
    r"batch_norm: x has shape (3, 4) and the statistics are of shape (4, 3)":
        lambda: ops.batch_norm(X, None, None, OF_ANOTHER, channel_axis=0),
    r"batch_norm_inference: expected vectors of 4 channels": lambda: ops.batch_norm_inference(
        X, np.ones(4), np.ones(3), channel_axis=1),
    r"batch_norm_inference: expected arrays of one dtype, float32 or float64; got float64, "
    "float64, float32":
        lambda: ops.batch_norm_inference(
            X, np.ones(4), np.ones(4, "float32"), channel_axis=1),
    r"layer_norm: gain has shape (3,); expected (4,), the lengths of axes (1,) of x (3, 4)":
        lambda: ops.layer_norm(X, np.ones(3)),
    r"layer_norm: bias has shape (4, 3); expected (3, 4)":
        lambda: ops.layer_norm(X, None, np.ones((4, 3)), axes=(1, 0)),
    r"layer_norm: no elements in axes (1,) of x (3, 0)": lambda: ops.layer_norm(X[:, :0]),
    r"layer_norm: eps must not be negative": lambda: ops.layer_norm(X, eps=-1e-5),
    r"axis 5 is out of range": lambda: ops.layer_norm(X, axes=5),
    r"group_norm: 4 channels cannot be cut into 3 groups":
        lambda: ops.group_norm(X, groups=3, channel_axis=1),
    r"cannot be cut into 0 groups": lambda: ops.group_norm(X, groups=0, channel_axis=1),
    r"group_norm: expected x (C, N, ...) with channel_axis=0 or (N, C, ...) with 1; got shape "
    r"(3, 4) and channel_axis=2": lambda: ops.group_norm(X, groups=1, channel_axis=2),
    r"group_norm: expected vectors of 4 channels":
        lambda: ops.group_norm(X, np.ones(2), groups=2, channel_axis=1),
    r"weight_norm: expected w (out, ...) and gain (out,); got (3, 4) and (4,)":
        lambda: ops.weight_norm(X, np.ones(4)),
    r"weight_norm: expected w (out, ...) and gain (out,); got (4,) and None":
        lambda: ops.weight_norm(X[0]),
    r"weight_norm: eps must not be negative": lambda: ops.weight_norm(X, eps=-1.0),
    r"entry_norm: eps must be greater than 0": lambda: ops.entry_norm(X, eps=0.0),
    r"entry_norm: eps must not be negative": lambda: ops.entry_norm(X, eps=-0.1),
}  # fmt: skip


@pytest.mark.parametrize("message", ERRORS)
def test_errors(message: str) -> None:
    with pytest.raises(Error, match=re.escape(message)):
        ERRORS[message]()


def test_an_empty_batch_of_layers_is_empty() -> None:
    assert ops.layer_norm(np.ones((0, 4)), np.ones(4), np.ones(4)).shape == (0, 4)
