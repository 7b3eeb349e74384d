"""Elementwise functions over their whole range: the relative error in ulps, held against mpmath.

An error in ulps is |found - exact| over the distance of two numbers of the dtype at the exact
value, subnormal ones too. The bounds are those of the docstrings.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mpmath as m
import numpy as np
import pytest
from backends import Backend

import npdrt
from npdrt import ops

DTYPES = ("float32", "float64")
LIMITS = {"float32": 120.0, "float64": 800.0}  # beyond, every function is 0, 1 or x


@dataclass(frozen=True)
class Function:
    """An operation, its value and derivative in mpmath, and their bounds in ulps."""

    operation: Callable[..., Any]
    exact: Callable[[Any], Any]
    slope: Callable[[Any], Any]
    bound: float
    slope_bound: float


def gelu_slope(x: Any) -> Any:
    return m.ncdf(x) + x * m.npdf(x)


def logistic(x: Any) -> Any:
    return 1 / (1 + m.exp(-x))


FUNCTIONS = {
    "gelu": Function(ops.gelu, lambda x: x * m.ncdf(x), gelu_slope, 8, 8),
    "sigmoid": Function(ops.sigmoid, logistic, lambda x: logistic(x) * logistic(-x), 4, 8),
    "tanh": Function(ops.tanh, m.tanh, lambda x: m.sech(x) ** 2, 4, 8),
    "softplus": Function(ops.softplus, lambda x: m.log1p(m.exp(x)), logistic, 4, 4),
    "erf": Function(ops.erf, m.erf, lambda x: 2 / m.sqrt(m.pi) * m.exp(-x * x), 4, 8),
}


def points(dtype: str) -> np.ndarray:
    """Both signs, from the smallest normal number to the limit, densest from 0.01 to it."""
    rng, info = np.random.default_rng(7), np.finfo(dtype)
    sizes = [
        np.exp(rng.uniform(math.log(info.tiny), math.log(0.01), 60)),
        np.exp(rng.uniform(math.log(0.01), math.log(LIMITS[dtype]), 900)),
        rng.uniform(0.4, 6.5, 500),  # around joints and clamps
        rng.uniform(0.0, 45.0, 500),
    ]
    x = np.concatenate(sizes).astype(dtype)
    return np.concatenate((x, -x))


def ulps(found: Any, exact: list[Any], dtype: str) -> np.ndarray:
    """The error of every element in units of the last place."""
    rounded = np.array([float(r) for r in exact]).astype(dtype)
    spacing = np.spacing(np.abs(rounded)).astype(float)
    difference = [abs(m.mpf(float(y)) - r) for y, r in zip(found, exact, strict=True)]
    return np.array([float(d / s) for d, s in zip(difference, spacing, strict=True)])


def slopes(operation: Callable[..., Any], x: np.ndarray) -> np.ndarray:
    return npdrt.value_and_grad(lambda p: ops.sum(operation(p["x"])))({"x": x})[1]["x"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_relative_error_over_the_whole_range(name: str, dtype: str) -> None:
    """Of value and derivative. Near the derivative's zero, gelu's at -0.7518, the error counts in
    ulps of 1/2; where it is subnormal half as much."""
    function, x = FUNCTIONS[name], points(dtype)
    with m.workdps(60):
        wide = [m.mpf(float(v)) for v in x]
        error = ulps(function.operation(x), list(map(function.exact, wide)), dtype)
        assert error.max() <= function.bound, (x[error.argmax()], error.max())
        exact = list(map(function.slope, wide))
        error = ulps(slopes(function.operation, x), exact, dtype)
        if name == "gelu":
            near = np.abs(x + 0.75179) < 0.35
            error[near] *= np.spacing(np.abs(np.array(exact, float)[near]).astype(dtype))
            error[near] /= np.finfo(dtype).eps / 2
            error[np.abs(np.array(exact, float)) < np.finfo(dtype).tiny] /= 2
        assert error.max() <= function.slope_bound, (x[error.argmax()], error.max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [*FUNCTIONS, "log_softmax", "logsumexp", "softmax"])
def test_replayed_with_the_same_bits(name: str, dtype: str) -> None:
    """Value and derivative, over the whole range and at the infinities."""
    operation = getattr(ops, name)
    ends = [0.0, -0.0, 1e-40, 88.0, -88.0, 1e30, -1e30, 0.46875]
    x = np.concatenate((points(dtype)[:4000], np.array(ends, dtype))).reshape(-1, 8)

    def step(p: dict[str, Any]) -> Any:
        y, cotangent = operation(p["x"]), {"logsumexp": 1.0}.get(name, 0.5)
        return npdrt.value_and_grad(lambda p: ops.sum(operation(p["x"]) * cotangent))(p)[1], y

    expected, y = step({"x": x})
    found, z = npdrt.record(step, {"x": x})({"x": x})
    assert np.asarray(z).tobytes() == np.asarray(y).tobytes()
    assert found["x"].tobytes() == expected["x"].tobytes()


ENDS = {
    "gelu": ([0.0, math.inf], [0.0, 1.0]),
    "sigmoid": ([0.0, 1.0], [0.0, 0.0]),
    "tanh": ([-1.0, 1.0], [0.0, 0.0]),
    "softplus": ([0.0, math.inf], [0.0, 1.0]),
    "erf": ([-1.0, 1.0], [0.0, 0.0]),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ENDS)
def test_infinities_and_nan(name: str, dtype: str, backend: Backend) -> None:
    """The limits, exactly, also at the largest numbers; a NaN stays one. No warning."""
    values, derivatives = ENDS[name]
    operation, largest = FUNCTIONS[name].operation, float(np.finfo(dtype).max)
    for x in ([-math.inf, math.inf], [-largest, largest]):
        found = backend.to_host(operation(backend.asarray(np.array(x, dtype))))
        expected = [largest if abs(v) == math.inf and x[1] == largest else v for v in values]
        assert found.tolist() == expected
        assert found.dtype == dtype
        assert slopes(operation, np.array(x, dtype)).tolist() == derivatives
    nan = np.array([math.nan], dtype)
    assert np.isnan(operation(nan)).all()
    assert np.isnan(slopes(operation, nan)).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("axis", [0, 1])
def test_log_softmax_near_zero(dtype: str, axis: int) -> None:
    """The maximum's value is -log1p of the other terms, however small they are, and its derivative
    by itself their share; so is the cross-entropy, and its derivative."""
    rng, worst = np.random.default_rng(3), {"float32": 80, "float64": 700}[dtype]
    gaps = np.concatenate((np.linspace(0, 2, 40), np.linspace(2, worst, 200)))
    x = np.stack([rng.uniform(-1, 1, 240), *(gaps + rng.uniform(0, 1, 240) for _ in range(2))])
    x = np.where(np.arange(3)[:, None] == 0, x, -x).astype(dtype)
    x = x if axis == 0 else np.ascontiguousarray(x.T)
    top = np.zeros_like(x)
    top[(0,) if axis == 0 else (slice(None), 0)] = 1
    y = ops.log_softmax(x, axis=axis)

    def by_itself(p: dict[str, Any]) -> Any:
        return ops.sum(ops.log_softmax(p["x"], axis=axis) * top)

    _, grads = npdrt.value_and_grad(by_itself)({"x": x})
    with m.workdps(60):
        rows = x.T if axis == 0 else x
        columns = [[m.mpf(float(v)) for v in row] for row in rows]
        others = [m.fsum(m.exp(v - row[0]) for v in row[1:]) for row in columns]
        both = list(zip(columns, others, strict=True))
        exact = [[v - row[0] - m.log1p(rest) for v in row] for row, rest in both]
        share = [
            [(rest if i == 0 else -m.exp(v - row[0])) / (1 + rest) for i, v in enumerate(row)]
            for row, rest in both
        ]
        slack = 8 + np.abs(rows[:, :1] - rows)
        for found, right in ((y, exact), (grads["x"], share)):
            found = found.T if axis == 0 else found
            for i in range(3):
                error = ulps(found[:, i], [row[i] for row in right], dtype)
                assert (error <= slack.max(axis=1)).all(), (i, error.max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [3, 600])
def test_cross_entropy_of_confident_logits(dtype: str, rows: int) -> None:
    """A loss of e**-30 is that and not 0, and so is its derivative; in one piece and in blocks."""
    classes = 2000 if rows == 600 else 4
    logits = np.zeros((rows, classes), dtype)
    logits[:, 1] = 30
    labels = np.ones(rows, int)
    loss, grads = npdrt.value_and_grad(lambda p: ops.softmax_cross_entropy(p["z"], labels))(
        {"z": logits}
    )
    others = (classes - 1) * math.exp(-30)
    eps = np.finfo(dtype).eps
    assert abs(float(loss) / math.log1p(others) - 1) < 20 * eps
    assert abs(grads["z"][:, 1] * rows / (-others / (1 + others)) - 1).max() < 20 * eps
    assert abs(grads["z"][:, 0] * rows / (math.exp(-30) / (1 + others)) - 1).max() < 20 * eps
