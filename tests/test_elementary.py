"""Portable functions and sums: error against mpmath, edges, and bits: on every array library, in
programs, with NumPy's SIMD levels off, and in a C program written from docs/portable.md."""

from __future__ import annotations

import ctypes
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from backends import Backend
from precise import error, exact, nearest

import npdrt
from npdrt import elementary, ops, sums

ROOT = Path(__file__).parents[1]
DTYPES = ("float32", "float64")
# the error in float64 that the docstrings state, ulps
ULPS = {"exp": 0.9, "expm1": 1.1, "log": 0.9, "log1p": 1.2, "tanh": 3.0, "sin": 2.5, "cos": 2.5}
LIMIT = 2.0**20  # of sin and cos


def function(name: str) -> Any:
    return getattr(elementary, name)


# --- error --------------------------------------------------------------------------------------


def of_exponents(dtype: str, count: int) -> np.ndarray:
    """Numbers of both signs in every binade of a dtype, subnormals too."""
    low, high = (-149, 128) if dtype == "float32" else (-1074, 1024)
    rng = np.random.default_rng(21)
    mantissas = rng.uniform(0.5, 1, (high - low, count)) * rng.choice((-1, 1), (high - low, count))
    return np.ldexp(mantissas, np.arange(low + 1, high + 1)[:, None]).ravel().astype(dtype)


def arguments(name: str, dtype: str) -> np.ndarray:
    """Every binade, where the function bends, and both sides of where its form changes."""
    rng = np.random.default_rng(3)
    x = [of_exponents(dtype, 2), rng.uniform(-2, 2, 500), rng.uniform(-100, 89, 500)]
    if name in ("exp", "expm1", "tanh"):  # where k changes
        steps = (np.arange(-150, 128) + 0.5) * math.log(2) / (2 if name == "tanh" else 1)
        x += [steps, np.nextafter(steps, 0), np.nextafter(steps, 99)]
        x += [rng.uniform(-745, 709, 500)] if dtype == "float64" else []
    if name in ("log", "log1p"):
        x += [math.sqrt(2) * 2.0 ** np.arange(-100, 100), 1 + rng.uniform(-1e-3, 1e-3, 500)]
    if name in ("sin", "cos"):
        x += [np.arange(-300, 300) * np.pi / 4, rng.uniform(-LIMIT, LIMIT, 500)]
    x = np.concatenate(x).astype(dtype)
    limit = LIMIT if name in ("sin", "cos") else np.inf
    lowest = {"log": 0, "log1p": -1}.get(name, -np.inf)
    return x[(np.abs(x) <= limit) & (x > lowest)]


@pytest.mark.parametrize("name", ULPS)
def test_float32_is_rounded_right(name: str) -> None:
    x = arguments(name, "float32")
    y = function(name)(x)
    assert y.dtype == np.float32
    assert y.tolist() == [nearest(exact(name, v), "float32") for v in x]


@pytest.mark.parametrize("name", ULPS)
def test_float64_is_within_its_ulps(name: str) -> None:
    x = arguments(name, "float64")
    for v, y in zip(x, function(name)(x), strict=True):
        true = exact(name, v)
        if not np.isfinite(nearest(true, "float64")) or true == 0:
            assert y == float(true)
        else:
            assert error(y, true, "float64") <= ULPS[name], v


@pytest.mark.parametrize("name", ["exp", "expm1", "log", "log1p", "tanh"])
def test_float32_never_falls_where_the_function_rises(name: str) -> None:
    """From each number to the next, about powers of two and where k changes."""
    places = np.array([1e-8, 0.17328679, 0.34657359, 0.5, 0.70710678, 1.0, 1.41421356, 8.0, 88.0])
    bits = places.astype("float32").view(np.int32)[:, None] + np.arange(-2000, 2000)
    x = bits.astype(np.int32).view(np.float32)
    for sign in (1,) if name == "log" else (1, -1):
        with np.errstate(all="ignore"):
            y = function(name)(sign * x[x < 1] if name == "log1p" and sign < 0 else sign * x)
        rises = sign * np.diff(y) >= 0
        rises[~np.isfinite(y[..., 1:])] = True
        assert rises.all()


def test_tanh_is_odd() -> None:
    for dtype in DTYPES:
        x = np.concatenate((arguments("tanh", dtype), np.linspace(-25, 25, 5001).astype(dtype)))
        assert elementary.tanh(-x).tobytes() == (-elementary.tanh(x)).tobytes()


def test_powers_of_two() -> None:
    for limit, squarings in ((600, 13), (152, 10), (60, 8)):
        k = np.arange(-limit, limit + 1.0)
        assert (elementary.power_of_two(k, squarings) == np.exp2(k)).all()
    for low, high, narrow in ((-1021, 970, False), (-150, 150, True)):
        k = np.arange(low, high + 1.0)
        assert (elementary._logarithm(np.exp2(k), narrow) == k).all()


EDGES = (
    *(0.0, np.inf, np.nan, 1.0, 2.0, 5e-324, 1e-310, 1e-45, 1e-20, 3.4e38, 1.7e308),
    *(88.72, 88.73, 103.97, 103.98, 709.78, 709.79, 745.13, 745.14),
)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ULPS)
def test_edges_are_numpys(name: str, dtype: str, backend: Backend) -> None:
    """Zeros with their sign; infinities; one NaN; results that overflow or are subnormal."""
    with np.errstate(all="ignore"):
        x = np.array([*EDGES, *np.negative(EDGES)]).astype(dtype)
        if name in ("sin", "cos"):
            x[np.abs(x) > LIMIT] = np.inf  # both are NaN there
        expected = getattr(np, name)(x.astype(float)).astype(dtype)
    expected[np.isnan(expected)] = np.nan
    y = backend.to_host(function(name)(backend.asarray(x)))
    bits = f"i{x.itemsize}"
    assert (np.abs(y.view(bits) - expected.view(bits)) <= (0 if dtype == "float32" else 2)).all()


def test_what_is_refused() -> None:
    with pytest.raises(npdrt.Error, match=r"exp: expected float32 or float64; got int64"):
        elementary.exp(np.arange(3))
    with pytest.raises(npdrt.Error, match="sum: expected float32 or float64; got bool"):
        sums.sum(np.zeros(3, bool))
    with pytest.raises(npdrt.Error, match=r"axis 2 is out of range for 2 dimension\(s\)"):
        sums.sum(np.zeros((3, 3)), axis=2)
    with pytest.raises(npdrt.Error, match="mean of no elements is not defined"):
        sums.mean(np.zeros((0, 3)), axis=0)


# --- the same bits ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ULPS)
def test_the_same_bits_on_every_library(name: str, dtype: str, backend: Backend) -> None:
    x = arguments(name, dtype)
    y = backend.to_host(function(name)(backend.asarray(x)))
    assert y.tobytes() == function(name)(x).tobytes()


@pytest.mark.parametrize("name", ULPS)
def test_the_same_bits_replayed_in_blocks_and_in_any_layout(name: str) -> None:
    x = arguments(name, "float32")
    y = function(name)(x)
    assert np.asarray(npdrt.record(function(name), x)(x)).tobytes() == y.tobytes()
    tall, expected = np.resize(x, (3, 9000)), np.resize(y, (3, 9000))
    assert function(name)(tall).tobytes() == expected.tobytes()
    assert function(name)(tall.T).T.tobytes() == expected.tobytes()
    assert function(name)(tall[::-1, ::-1]).tobytes() == expected[::-1, ::-1].tobytes()
    assert function(name)(np.asarray(x[5])).tobytes() == y[5].tobytes()
    assert function(name)(x[:0]).shape == (0,)


def scaled_tanh(x: Any) -> Any:
    return ops.tanh(x * 0.5) + 1.0


@pytest.mark.parametrize("fast", [False, True], ids=["replayed", "compiled"])
def test_a_program_lists_one_call_and_runs_one_chain(fast: bool) -> None:
    if fast:
        pytest.importorskip("numba", reason="numba is not installed")
    x = arguments("tanh", "float32")
    with npdrt.arithmetic("portable"):
        expected = scaled_tanh(x)
        program = npdrt.record(scaled_tanh, x, fast=fast)
    assert [c.function for c in program.calls] == ["multiply", "portable_tanh", "add"]
    assert len(program.plan.groups) == 1
    assert np.asarray(program(x)).tobytes() == expected.tobytes()


def test_a_program_of_a_number_and_of_columns() -> None:
    """Calls that no chain takes."""
    with npdrt.arithmetic("portable"):
        for x in (np.float32(0.7), np.linspace(-3, 3, 6000, dtype="float32").reshape(3, -1).T):
            program = npdrt.record(scaled_tanh, np.asarray(x))
            assert np.asarray(program(np.asarray(x))).tobytes() == scaled_tanh(x).tobytes()


def scattered(dtype: str, count: int) -> np.ndarray:
    """Numbers of all bits: NaN of many kinds, infinities and subnormals among them."""
    if dtype == "float32":
        return (np.arange(count, dtype=np.uint32) * np.uint32(2654435761)).view(np.float32)
    return (np.arange(count, dtype=np.uint64) * np.uint64(11400714819323198485)).view(np.float64)


def usual(dtype: str, count: int) -> np.ndarray:
    """Numbers between -2**k and 2**k for k = -7, ..., 10."""
    parts = np.arange(count) * 2654435761 % 2**32 / 2**31 - 1.0
    return np.ldexp(parts, np.arange(count) % 18 - 7).astype(dtype)


def digests() -> dict[str, str]:
    """Function and dtype -> the first digits of SHA-256 of its results."""
    found = {}
    for dtype in DTYPES:
        x = np.concatenate((scattered(dtype, 50_000), usual(dtype, 50_000)))
        results = {name: function(name)(x) for name in ULPS}
        shaped = np.reshape(usual(dtype, 30 * 31 * 32), (30, 31, 32))
        axes = (None, 0, 1, 2, (0, 2))
        results["sum"] = np.concatenate([sums.sum(shaped, axis=a).ravel() for a in axes])
        results["mean"] = sums.mean(shaped, axis=(0, 1))
        found |= {f"{name} {dtype}": digest(y) for name, y in results.items()}
    return found


def digest(y: np.ndarray) -> str:
    return hashlib.sha256(y.tobytes()).hexdigest()[:12]


KNOWN = {
    "exp float32": "4308e192a956",
    "expm1 float32": "312082a4713c",
    "log float32": "9690a95423b5",
    "log1p float32": "ad88d781d39e",
    "tanh float32": "470f8f9ca55e",
    "sin float32": "3563a698d48d",
    "cos float32": "eae19d8019c3",
    "sum float32": "c28c425e2da8",
    "mean float32": "def4c2a57ff6",
    "exp float64": "709690c40f54",
    "expm1 float64": "e85f689993c1",
    "log float64": "6c1be9374e37",
    "log1p float64": "b1fdec45cf6f",
    "tanh float64": "4028f2a8a812",
    "sin float64": "ab3029386cec",
    "cos float64": "f7e4f3be0b4a",
    "sum float64": "d8d3466d8e5a",
    "mean float64": "f35cb90f7d71",
}


def test_known_digests() -> None:
    assert digests() == KNOWN


def test_known_digests_at_the_lowest_simd_level() -> None:
    core = np._core._multiarray_umath
    used = [name for name in core.__cpu_dispatch__ if core.__cpu_features__[name]]
    if not used:
        pytest.skip("this processor has no instruction sets to disable")
    setting = {"NPY_DISABLE_CPU_FEATURES": " ".join(used), "OPENBLAS_CORETYPE": "Prescott"}
    done = subprocess.run(
        [sys.executable, __file__],
        env={**os.environ, **setting, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert not set(used) & set(found["features"])
    assert found["digests"] == KNOWN


# --- a C program from the page ------------------------------------------------------------------


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """tests/portable.c."""
    if shutil.which("gcc") is None:
        pytest.skip("gcc is not installed")
    made = tmp_path_factory.mktemp("portable") / "portable.so"
    flags = ("-O2", "-std=c11", "-Wall", "-Werror", "-ffp-contract=off", "-shared", "-fPIC")
    source = Path(__file__).with_name("portable.c")
    subprocess.run(["gcc", *flags, str(source), "-o", str(made), "-lm"], check=True)
    return ctypes.CDLL(str(made))


def address(x: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.ctypes.data)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ULPS)
def test_functions_in_c(name: str, dtype: str, library: ctypes.CDLL) -> None:
    parts = (scattered(dtype, 100_000), usual(dtype, 100_000), arguments(name, dtype))
    x = np.concatenate(parts)
    y = np.empty_like(x)
    getattr(library, f"{name}_{dtype}")(address(x), address(y), ctypes.c_long(x.size))
    assert function(name)(x).tobytes() == y.tobytes()


def sum_in_c(library: ctypes.CDLL, x: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    total = np.ascontiguousarray(x, np.float64)
    for axis in sorted(axes, reverse=True):
        before, n, after = (
            math.prod(p)
            for p in (total.shape[:axis], total.shape[axis : axis + 1], total.shape[axis + 1 :])
        )
        made = np.empty((*total.shape[:axis], *total.shape[axis + 1 :]))
        library.sum_float64(address(total), address(made), *map(ctypes.c_long, (before, n, after)))
        total = made
    return total.astype(x.dtype)


SUMS: list[tuple[tuple[int, ...], tuple[int, ...]]] = [
    *(((n,), (0,)) for n in (0, 1, 2, 3, 5, 31, 32, 33, 1000)),
    *(((0, 3), (0,)), ((3, 0), (0,)), ((0, 3), (0, 1)), ((5, 1), (1,)), ((4, 64), (1,))),
    *(((3, 33, 5), (0, 2)), ((2, 3, 4, 5), (0, 2, 3)), ((1000, 3), (0,)), ((7, 9), ())),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", SUMS, ids=str)
def test_sums(case: Any, dtype: str, backend: Backend, library: ctypes.CDLL) -> None:
    shape, axes = case
    x = np.random.default_rng(1).standard_normal(shape).astype(dtype)
    x.ravel()[1:3] = -0.0
    y = backend.to_host(sums.sum(backend.asarray(x), axis=axes))
    wide = x.astype(float)
    assert (y.dtype, y.shape) == (x.dtype, wide.sum(axis=axes).shape)
    assert y.tobytes() == sum_in_c(library, x, axes).tobytes()
    bound = 12 * 2.0**-53 * np.abs(wide).sum(axis=axes)
    half = np.spacing(np.abs(y)) / 2 if dtype == "float32" else 0
    assert (np.abs(y - wide.sum(axis=axes)) <= 2 * bound + half).all()
    kept = backend.to_host(sums.sum(backend.asarray(x), axis=axes, keepdims=True))
    assert kept.shape == wide.sum(axis=axes, keepdims=True).shape
    assert kept.tobytes() == y.tobytes()


def test_sums_replayed() -> None:
    for shape, axes in (((3, 0), (0,)), ((33,), (0,)), ((3, 33, 5), (0, 2))):
        x = np.random.default_rng(1).standard_normal(shape).astype("float32")
        program = npdrt.record(sums.sum, x, axes)
        assert np.asarray(program(x, axes)).tobytes() == sums.sum(x, axes).tobytes()


def test_sums_of_nan_and_infinity(library: ctypes.CDLL) -> None:
    x = np.array([[np.inf, -np.inf, 1.0], [np.inf, 1.0, 2.0], [-np.nan, 1.0, 2.0]])
    assert sums.sum(x, axis=1).tobytes() == np.array([np.nan, np.inf, np.nan]).tobytes()
    assert (
        sums.sum(x.astype("float32"), axis=1).tobytes()
        == sum_in_c(library, x.astype("float32"), (1,)).tobytes()
    )
    largest = np.full(3, 3e38, "float32")
    assert (sums.sum(largest), sums.mean(largest)) == (np.inf, np.float32(3e38))


def test_sums_of_negative_zeros(library: ctypes.CDLL) -> None:
    """-0 only if no zero fills the axis up."""
    for n in range(1, 6):
        x = np.full(n, -0.0)
        assert sums.sum(x).tobytes() == sum_in_c(library, x, (0,)).tobytes()
        assert bool(np.signbit(sums.sum(x))) == (n in (1, 2, 4))


def test_means() -> None:
    x = np.random.default_rng(2).standard_normal((31, 7, 5)).astype("float32")
    for axis in (None, 0, -1, (0, 2), (-3, 1)):
        found = sums.mean(x, axis=axis)
        true = x.astype(float).mean(axis=axis)
        assert np.array_equal(found, true.astype("float32"))
        assert (
            sums.mean(x, axis=axis, keepdims=True).shape == x.mean(axis=axis, keepdims=True).shape
        )


if __name__ == "__main__":
    core = np._core._multiarray_umath
    features = [name for name, on in core.__cpu_features__.items() if on]
    print(json.dumps({"features": features, "digests": digests()}))
