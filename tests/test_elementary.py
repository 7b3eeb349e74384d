"""Portable functions and sums: error against mpmath, edges, and bits."""

from __future__ import annotations

from typing import Any

import mpmath
import numpy as np
import pytest
from backends import Backend

import npdrt
from npdrt import elementary, sums

NAMES = ("exp", "expm1", "log", "log1p", "tanh", "sin", "cos")
ULPS = {"exp": 0.9, "expm1": 1.1, "log": 0.9, "log1p": 1.2, "tanh": 3.0, "sin": 2.5, "cos": 2.5}


def function(name: str) -> Any:
    return getattr(elementary, name)


def of_exponents(dtype: str, count: int) -> np.ndarray:
    """Numbers of both signs in every binade of a dtype, subnormals too."""
    low, high = (-149, 128) if dtype == "float32" else (-1074, 1024)
    rng = np.random.default_rng(21)
    mantissas = rng.uniform(0.5, 1, (high - low, count)) * rng.choice((-1, 1), (high - low, count))
    return np.ldexp(mantissas, np.arange(low + 1, high + 1)[:, None]).ravel().astype(dtype)


def arguments(name: str, dtype: str) -> np.ndarray:
    """Where the function is neither 0, constant nor infinite, and where it is."""
    rng = np.random.default_rng(3)
    x = [of_exponents(dtype, 2), rng.uniform(-2, 2, 500), rng.uniform(-100, 89, 500)]
    if name in ("exp", "expm1"):
        steps = (np.arange(-150, 128) + 0.5) * np.log(2)  # where k changes
        x += [steps, np.nextafter(steps, 0), np.nextafter(steps, 99)]
        x += [rng.uniform(-745, 709, 500)] if dtype == "float64" else []
    if name in ("log", "log1p"):
        x += [np.sqrt(2) * 2.0 ** np.arange(-100, 100), 1 + rng.uniform(-1e-3, 1e-3, 500)]
    if name in ("sin", "cos"):
        x += [np.arange(-300, 300) * np.pi / 4, rng.uniform(-(2**20), 2**20, 500)]
    x = np.concatenate(x).astype(dtype)
    limit = 2**20 if name in ("sin", "cos") else np.inf
    lowest = {"log": 0, "log1p": -1}.get(name, -np.inf)
    return x[(np.abs(x) <= limit) & (x > lowest)]


def exact(name: str, x: np.floating) -> Any:
    with mpmath.workprec(200):
        return getattr(mpmath, name)(mpmath.mpf(float(x)))


@pytest.mark.parametrize("name", NAMES)
def test_float32_is_rounded_right(name: str) -> None:
    x = arguments(name, "float32")
    y = function(name)(x)
    assert y.dtype == np.float32
    with np.errstate(over="ignore"):
        expected = np.array([np.float32(exact(name, v)) for v in x])
    assert y.tolist() == expected.tolist()


@pytest.mark.parametrize("name", NAMES)
def test_float64_is_within_its_ulps(name: str) -> None:
    x = arguments(name, "float64")
    for v, y in zip(x, function(name)(x), strict=True):
        true = exact(name, v)
        if not np.isfinite(float(true)):
            assert y == float(true)
            continue
        ulp = np.spacing(abs(float(true)))
        assert abs(float((mpmath.mpf(float(y)) - true) / mpmath.mpf(float(ulp)))) <= ULPS[name], v


EDGES = (
    *(0.0, np.inf, np.nan, 1.0, 2.0, 5e-324, 1e-310, 1e-45, 1e-20, 3.4e38, 1.7e308),
    *(88.72, 88.73, 103.97, 103.98, 709.78, 709.79, 745.13, 745.14),
)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", NAMES)
def test_edges_are_numpys(name: str, dtype: str, backend: Backend) -> None:
    """Zeros with their sign; infinities; one NaN; results that overflow or are subnormal."""
    with np.errstate(all="ignore"):
        x = np.array([*EDGES, *np.negative(EDGES)]).astype(dtype)
        if name in ("sin", "cos"):
            x[np.abs(x) > 2**20] = np.inf  # both are NaN there
        expected = getattr(np, name)(x.astype(float)).astype(dtype)
    expected[np.isnan(expected)] = np.nan
    y = backend.to_host(function(name)(backend.asarray(x)))
    bits = f"i{x.itemsize}"
    assert (np.abs(y.view(bits) - expected.view(bits)) <= (0 if dtype == "float32" else 2)).all()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", NAMES)
def test_the_same_bits_everywhere(name: str, dtype: str, backend: Backend) -> None:
    """On every library, in blocks, transposed, and replayed."""
    x = arguments(name, dtype)
    y = function(name)(x)
    assert backend.to_host(function(name)(backend.asarray(x))).tobytes() == y.tobytes()
    assert np.asarray(npdrt.record(function(name), x)(x)).tobytes() == y.tobytes()
    tall = np.resize(x, (3, 5000))
    assert np.array_equal(function(name)(tall.T).T, np.resize(y, (3, 5000)), equal_nan=True)
    assert np.array_equal(function(name)(tall[:, ::2]), np.resize(y, (3, 5000))[:, ::2])
    assert function(name)(np.asarray(x[5])).tobytes() == y[5].tobytes()


def test_powers_of_two() -> None:
    for limit, squarings in ((600, 13), (152, 10), (60, 8)):
        k = np.arange(-limit, limit + 1.0)
        assert (elementary.power_of_two(k, squarings) == np.exp2(k)).all()
    for low, high, narrow in ((-1021, 970, False), (-150, 150, True)):
        k = np.arange(low, high + 1.0)
        assert (elementary._logarithm(np.exp2(k), narrow) == k).all()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    ("shape", "axis"),
    [((7,), None), ((0, 3), 0), ((0, 3), None), ((5, 1), 1), ((4, 64), -1), ((3, 33, 5), (0, 2)),
     ((), None), ((2, 3, 4, 5), (0, 2, 3)), ((1000, 3), 0)],
)  # fmt: skip
def test_sums(shape: tuple[int, ...], axis: Any, dtype: str, backend: Backend) -> None:
    x = np.random.default_rng(1).standard_normal(shape).astype(dtype)
    y = backend.to_host(sums.sum(backend.asarray(x), axis=axis))
    assert (y.dtype, y.shape) == (x.dtype, np.sum(x, axis=axis).shape)
    assert np.allclose(
        y, np.sum(x.astype(float), axis=axis), rtol=1e-7 if dtype == "float32" else 1e-14
    )
    assert sums.sum(x, axis=axis).tobytes() == y.tobytes()
    kept = sums.sum(x, axis=axis, keepdims=True)
    assert kept.shape == np.sum(x, axis=axis, keepdims=True).shape
    assert kept.tobytes() == y.tobytes()
