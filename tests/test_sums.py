"""Sums over any axes of any layout: the stated error, in float32 past 2**24 rows too, and the same
bits when a program is replayed."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from backends import Backend
from hypothesis import given, settings
from hypothesis import strategies as st

import npdrt
from npdrt import ops
from npdrt.arrays import RUN, total
from npdrt.autodiff import undo_broadcast
from npdrt.ops.normalisation import batch_statistics

RNG = np.random.default_rng(14)
ROWS = 20_000_000  # more than 2**24


def bound(x: np.ndarray, axes: tuple[int, ...]) -> float:
    """k of `total`'s docstring: pairs along neighbours in memory, runs along all other axes."""
    lengths = [x.shape[a] for a in axes if x.shape[a] > 1]
    runs = sum(RUN * math.ceil(math.log(n, RUN)) for n in lengths)
    return 19 + math.log2(max(1, math.prod(lengths) / 128)) + runs


@st.composite
def layouts(draw: Any) -> tuple[np.ndarray, tuple[int, ...]]:
    """A float32 array with some axes long, permuted, strided or repeated, and axes to sum."""
    ndim = draw(st.integers(1, 4))
    longest = {1: 60_000, 2: 2000, 3: 300, 4: 40}[ndim]
    lengths = st.one_of(st.integers(1, 5), st.integers(100, 300), st.integers(1, longest))
    shape = [draw(lengths) for _ in range(ndim)]
    while math.prod(shape) > 400_000:
        shape[shape.index(max(shape))] = 2
    x = RNG.standard_normal([2 * n for n in shape] if draw(st.booleans()) else shape)
    x = x.astype("float32")[tuple(slice(None, None, k // n) for k, n in zip(x.shape, shape))]  # noqa: B905
    x = x.transpose(draw(st.permutations(range(ndim))))
    if draw(st.booleans()):
        x = np.broadcast_to(x[:, None], (x.shape[0], 3, *x.shape[1:]))
    axes = draw(st.sets(st.integers(0, x.ndim - 1), min_size=1))
    return x, tuple(sorted(axes))


@given(layouts())
@settings(max_examples=150, deadline=None)
def test_the_stated_error(case: tuple[np.ndarray, tuple[int, ...]]) -> None:
    """And the shape, with and without the axes kept."""
    x, axes = case
    found, wide = total(x, axes), x.astype(np.float64)
    exact, size = wide.sum(axis=axes), np.abs(wide).sum(axis=axes)
    assert found.shape == exact.shape
    assert found.dtype == np.float32
    assert (np.abs(found - exact) <= bound(x, axes) * 2.0**-24 * size).all()
    kept = total(x, axes, keepdims=True)
    assert kept.shape == wide.sum(axis=axes, keepdims=True).shape
    assert kept.tobytes() == np.asarray(found).tobytes()


SHAPES: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]] = {
    "rows": ((1000, 7), (0, 1), (0,)),
    "exactly a run": ((RUN, 7), (0, 1), (0,)),
    "one more": ((RUN + 1, 7), (0, 1), (0,)),
    "two levels": ((RUN * RUN + 3, 2), (0, 1), (0,)),
    "columns of a transpose": ((1000, 7), (1, 0), (1,)),
    "channels last": ((9, 20, 20, 3), (0, 1, 2, 3), (0, 1, 2)),
    "channels in the middle": ((300, 3, 5), (0, 1, 2), (0, 2)),
    "everything": ((300, 3, 50), (2, 0, 1), (0, 1, 2)),
}


@pytest.mark.parametrize("name", SHAPES)
def test_the_same_on_every_library_and_replayed(name: str, backend: Backend) -> None:
    shape, order, axes = SHAPES[name]
    host = RNG.standard_normal(shape).astype("float32")
    expected = total(np.transpose(host, order), axes)
    xp = backend.xp
    found = backend.to_host(total(xp.permute_dims(backend.asarray(host), order), axes))
    if backend.exact:
        assert found.tobytes() == np.asarray(expected).tobytes()
    exact = np.transpose(host, order).astype(float).sum(axis=axes)
    assert np.abs(found - exact).max() <= 1e-4
    program = npdrt.record(lambda x: total(np.transpose(x, order), axes), host)
    assert np.asarray(program(host)).tobytes() == np.asarray(expected).tobytes()


def test_fewer_rows_than_a_run_are_added_as_numpy_does() -> None:
    """So that steps on small batches keep their bits."""
    x = RNG.standard_normal((RUN, 50)).astype("float32")
    assert total(x, (0,)).tobytes() == np.sum(x, axis=0).tobytes()
    x = RNG.standard_normal((3, 100_000)).astype("float32")
    assert total(x, (1,)).tobytes() == np.sum(x, axis=1).tobytes()
    assert total(x, (0, 1)).tobytes() == np.sum(x).tobytes()


# --- what a leading axis of 2e7 ones lost ------------------------------------------------------


@pytest.fixture(scope="module")
def ones() -> np.ndarray:
    """More rows of ones than float32 can count, without their memory."""
    return np.broadcast_to(np.float32(1), (ROWS, 2))


def test_sum_and_mean_of_more_rows_than_float32_counts() -> None:
    rows = np.ones((ROWS, 2), "float32")
    assert np.sum(rows[:, :2], axis=0).tolist() == [2**24, 2**24]  # what this is about
    assert ops.sum(rows, axis=0).tolist() == [ROWS, ROWS]
    assert ops.mean(rows, axis=0).tolist() == [1, 1]
    assert float(ops.mean(rows)) == 1
    assert float(ops.mean(rows[:, :1])) == 1  # strided


def test_variance_of_many_rows(ones: np.ndarray) -> None:
    x = np.empty((ROWS // 4, 2), "float32")
    x[::2], x[1::2] = 3, 5
    assert ops.var(x, axis=0).tolist() == [1, 1]


def test_a_bias_gradient_beyond_2_24(ones: np.ndarray) -> None:
    """Of `linear`, and of a bias that was broadcast."""
    params = {"weight": np.zeros((2, 1), "float32"), "bias": np.zeros(2, "float32")}
    x = np.zeros((ROWS, 1), "float32")
    _, grads = npdrt.value_and_grad(
        lambda p: ops.sum(ops.linear(x, p["weight"], p["bias"]))
    )(params)  # fmt: skip
    assert grads["bias"].tolist() == [ROWS, ROWS]
    assert undo_broadcast(ones, (2,)).tolist() == [ROWS, ROWS]
    assert undo_broadcast(ones, (1, 1)).tolist() == [[2 * ROWS]]


@pytest.mark.parametrize("layout", [(0, 1, 2, 3), (3, 0, 1, 2)], ids=["channels last", "strided"])
def test_batch_statistics_channels_last(layout: tuple[int, ...]) -> None:
    """Mean, variance, and the gradients of gain and bias, over 1e6 values a channel."""
    x = (np.random.default_rng(5).random((100, 100, 100, 3)) + 0.25).astype("float32")
    x = np.ascontiguousarray(x.transpose(layout)).transpose(np.argsort(layout))
    wide = x.reshape(-1, 3).astype(float)
    found = batch_statistics(x, channel_axis=3)
    assert np.abs(found.mean / wide.mean(axis=0) - 1).max() < 1e-6
    assert np.abs(found.variance / wide.var(axis=0) - 1).max() < 1e-6
    params = {"gain": np.ones(3, "float32"), "bias": np.zeros(3, "float32")}

    def loss(p: dict[str, Any]) -> Any:
        y = ops.batch_norm(x, p["gain"], p["bias"], channel_axis=3, eps=0.0)
        return ops.sum(y * y)

    _, grads = npdrt.value_and_grad(loss)(params)
    assert np.abs(grads["gain"] / 2e6 - 1).max() < 1e-5  # 2 sum xhat**2
    # 2 sum xhat is 0; its terms add up to 1.7e6, and the mean is rounded to 3e-8.
    assert np.abs(grads["bias"]).max() < 4


def test_gain_and_bias_of_layer_norm_over_many_rows() -> None:
    x = RNG.standard_normal((300_000, 3)).astype("float32")
    params = {"gain": np.ones(3, "float32"), "bias": np.ones(3, "float32")}

    def loss(p: dict[str, Any]) -> Any:
        return ops.sum(ops.layer_norm(x, p["gain"], p["bias"]) * 0.125)

    _, grads = npdrt.value_and_grad(loss)(params)
    assert grads["bias"].tolist() == [37_500] * 3


def test_ties_are_counted_beyond_2_24() -> None:
    """The maximum's derivative is shared by all of its places."""
    x = np.ones((2, ROWS // 2), "float32").T
    _, grads = npdrt.value_and_grad(lambda p: ops.max(p["x"]))({"x": x})
    assert grads["x"][0, 0] == np.float32(1 / ROWS)
