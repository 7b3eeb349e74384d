"""npdrt.exact: against rational arithmetic, and the same bits under every kernel of OpenBLAS.

Run as a script, this file prints digests of its products and of plain ones.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import backends
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import npdrt
from npdrt import exact, slices
from npdrt.arrays import namespace
from npdrt.errors import Error

ROOT = Path(__file__).parents[1]
DTYPES = ["float32", "float64"]
KS = [1, 2, 3, 4, 5, 8, 9, 64, 65, 512, 513]
each = pytest.mark.parametrize("dtype", DTYPES)


def digits(dtype: str) -> int:
    return 24 if dtype == "float32" else 53


# --- the definition in integers -------------------------------------------------------------------


def line(values: list[float], slices: int, t: int) -> tuple[list[list[int]], Fraction]:
    """The slices of a row or column as integers, each in the unit of its slice, and its scale."""
    largest = max(map(abs, values))
    s = Fraction(2) ** (math.frexp(largest)[1] - 1) if largest else Fraction(1)
    rest, found = [Fraction(v) / s for v in values], []
    for count in range(1, slices + 1):
        unit = Fraction(2) ** (1 - count * t)
        found.append([round(x / unit) for x in rest])  # to the even one, as IEEE rounds
        rest = [x - n * unit for x, n in zip(rest, found[-1], strict=True)]
    return found, s


def by_integers(row: list[float], column: list[float], dtype: str, times: int = 1) -> float:
    """An element of a product of lines that are repeated: integer sums of slices, then the
    additions that round."""
    slices, t = (2 if dtype == "float32" else 3), (53 - (len(row) * times - 1).bit_length()) // 2
    (a, s), (b, r) = line(row, slices, t), line(column, slices, t)
    assert all(abs(n) <= 2**t for n in a[0])
    assert all(abs(n) <= 2 ** (t - 1) for n in a[1])
    total = 0.0
    for i, j in ((0, 0), (0, 1), (1, 0)) if slices == 2 else exact.PAIRS[3]:
        whole = times * sum(x * y for x, y in zip(a[i], b[j], strict=True))
        assert times * sum(abs(x * y) for x, y in zip(a[i], b[j], strict=True)) <= 2**53
        total += float(whole * Fraction(2) ** (2 - (i + j + 2) * t))
    try:
        scaled = float(Fraction(total) * s * r)
    except OverflowError:
        scaled = math.copysign(math.inf, total)
    with np.errstate(all="ignore"):
        return float(np.asarray(scaled).astype(dtype))


def product_of(row: list[float], column: list[float]) -> Fraction:
    return sum((Fraction(x) * Fraction(y) for x, y in zip(row, column, strict=True)), Fraction())


def bound(row: list[float], column: list[float], dtype: str) -> Fraction:
    """The error that the docstring of `matmul` allows."""
    n, p, k = (2 if dtype == "float32" else 3), digits(dtype), len(row)
    t = (53 - (k - 1).bit_length()) // 2
    s = line(row, n, t)[1] * line(column, n, t)[1]
    own = abs(product_of(row, column)) / 2**p
    smallest = Fraction(2) ** (-150 if dtype == "float32" else -1075)
    v = Fraction(1, 2**t) if n == 3 else 1
    return own + (2 * n + 2) * k * s / 2 ** (n * t) + Fraction(1, 2**50) * v * k * s + smallest


def operands(k: int, dtype: str, m: int = 2, n: int = 2) -> tuple[Any, Any]:
    """Normal numbers, with rows of several sizes and elements far below the largest of their row,
    and one column orthogonal to the first row but for rounding."""
    rng = np.random.default_rng(k)
    a = rng.normal(size=(m, k)) * 10.0 ** rng.integers(-8, 9, (m, 1))
    b = rng.normal(size=(k, n)) * 10.0 ** -rng.integers(0, 9, (k, 1))
    b[:, -1] -= a[0] * (a[0] @ b[:, -1]) / (a[0] @ a[0])
    return a.astype(dtype), b.astype(dtype)


@each
@pytest.mark.parametrize("k", KS)
def test_products_are_those_of_integers(k: int, dtype: str) -> None:
    a, b = operands(k, dtype)
    found = exact.matmul(a, b)
    assert found.dtype == dtype
    for i, j in np.ndindex(2, 2):
        row, column = a[i].tolist(), b[:, j].tolist()
        assert found[i, j] == by_integers(row, column, dtype)
        assert abs(Fraction(float(found[i, j])) - product_of(row, column)) <= bound(
            row, column, dtype
        )


@each
@pytest.mark.parametrize(("n", "times"), [(4, 2**14), (5, 26215)])
def test_many_terms_of_the_largest_slices(n: int, times: int, dtype: str) -> None:
    """Partial sums are as large as they can be; ties at the last bit of each slice."""
    t = (53 - (n * times - 1).bit_length()) // 2
    a = np.full(n, 2.0 - 2.0**-23).astype(dtype)
    b = np.full(n, 2.0 - 2.0 ** (-23 if dtype == "float32" else -52)).astype(dtype)
    a[-1], b[1] = 1.5 + 2.0**-t, 1.25 + 3 * 2.0**-t
    found = exact.matmul(np.tile(a, times)[None], np.tile(b, times)[:, None])
    assert found[0, 0] == by_integers(a.tolist(), b.tolist(), dtype, times)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_finite_numbers(data: st.DataObject) -> None:
    """Subnormal numbers, the largest ones and zeros of both signs among them."""
    dtype = data.draw(st.sampled_from(DTYPES))
    numbers = st.floats(width=32 if dtype == "float32" else 64, allow_nan=False,
                        allow_infinity=False)  # fmt: skip
    k = data.draw(st.integers(1, 6))
    row, column = (data.draw(st.lists(numbers, min_size=k, max_size=k)) for _ in range(2))
    a, b = np.array([row], dtype=dtype), np.array(column, dtype=dtype)[:, None]
    found, expected = float(exact.matmul(a, b)[0, 0]), by_integers(row, column, dtype)
    assert found == expected
    if abs(product_of(row, column)) + bound(row, column, dtype) < float(np.finfo(dtype).max):
        assert abs(Fraction(found) - product_of(row, column)) <= bound(row, column, dtype)


@each
def test_ends_of_the_range(dtype: str) -> None:
    """No step on the way over- or underflows if the result does not."""
    info = np.finfo(dtype)
    big, tiny = float(info.max), float(info.smallest_subnormal)
    a = np.array([[big, big], [tiny, 3 * tiny], [0.0, 0.0]], dtype=dtype)
    b = np.array([[tiny, big, 0.5], [-tiny, big, -0.5]], dtype=dtype)
    b[0, 0] = 2 * tiny
    found = exact.matmul(a, b)
    assert found[0].tolist() == [float(np.asarray(big * tiny, dtype=dtype)), math.inf, 0.0]
    assert found[1].tolist() == [0.0, 4 * (big * tiny), -tiny]
    assert found[2].tolist() == [0.0, 0.0, 0.0]


@each
def test_no_zero_is_negative(dtype: str) -> None:
    a = np.array([[-0.0, 0.0], [0.0, -1.0], [1.0, 1.0]], dtype=dtype)
    b = np.array([[-1.0, -0.0, 1.0], [0.0, -0.0, -1.0]], dtype=dtype)
    found = exact.matmul(a, b)
    assert not np.signbit(found[found == 0]).any()
    assert found.tolist() == [[0, 0, 0], [0, 0, 1], [-1, 0, 0]]


@each
def test_rows_and_columns_that_are_not_finite(dtype: str) -> None:
    a, b = operands(5, dtype, 4, 3)
    clean = exact.matmul(a, b)
    a[1, 2], a[2, 4], b[0, 1] = np.nan, -np.inf, np.inf
    found = exact.matmul(a, b)
    odd = np.zeros((4, 3), dtype=bool)
    odd[1:3], odd[:, 1] = True, True
    np.testing.assert_array_equal(np.isnan(found), odd)
    assert found[~odd].tobytes() == clean[~odd].tobytes()
    assert found[odd].tobytes() == np.full(odd.sum(), np.nan, dtype=dtype).tobytes()


@each
def test_stacks(dtype: str) -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 3, 4, 5)).astype(dtype), rng.normal(size=(3, 5, 2)).astype(dtype)
    found = exact.matmul(a, b)
    assert found.shape == (2, 3, 4, 2)
    for i, j in np.ndindex(2, 3):
        assert found[i, j].tobytes() == exact.matmul(a[i, j], b[j]).tobytes()


@each
@pytest.mark.parametrize("shapes", [((2, 0), (0, 3)), ((0, 2), (2, 3)), ((0, 2, 2), (2, 0))])
def test_empty_operands(shapes: Any, dtype: str) -> None:
    a, b = (np.zeros(shape, dtype=dtype) for shape in shapes)
    found = exact.matmul(a, b)
    assert (found.shape, found.dtype, found.any()) == ((a @ b).shape, dtype, False)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (np.ones((2, 3), "f4"), np.ones((3, 2)), "float32 and float64; convert one first"),
        (np.ones((2, 3), "f2"), np.ones((3, 2), "f2"), "expected two arrays of float32 or two"),
        (np.ones((2, 3), int), np.ones((3, 2), int), "got int64 and int64"),
        (np.ones(3), np.ones((3, 2)), r"got \(3,\) and \(3, 2\); make a vector a matrix"),
        (np.ones((2, 3)), np.ones((2, 3)), r"got \(2, 3\) and \(2, 3\)"),
    ],
)
def test_what_is_refused(a: Any, b: Any, message: str) -> None:
    with pytest.raises(Error, match=message):
        exact.matmul(a, b)


def test_the_power_of_two_below() -> None:
    exponents = np.repeat(np.arange(-1021, 970), 4)
    x = np.ldexp(np.tile([1.0, 1 + 2.0**-52, 1.5, 2 - 2.0**-52], 1991), exponents)
    assert slices.power_below(x).tolist() == np.ldexp(1.0, exponents).tolist()


# --- the same bits everywhere ---------------------------------------------------------------------


def cases() -> list[tuple[str, Any, Any]]:
    """Shapes that different kernels of a BLAS serve: thin, wide, transposed, square, and stacks."""
    rng, found = np.random.default_rng(1), []
    for dtype in DTYPES:
        for m, k, n in ((130, 300, 70), (3, 4097, 5), (64, 64, 64), (1, 511, 257), (257, 33, 1)):
            a = (rng.normal(size=(m, k)) * 10.0 ** rng.integers(-3, 3, (1, k))).astype(dtype)
            found.append((f"{dtype} {m} {k} {n}", a, rng.normal(size=(n, k)).astype(dtype).T))
        a, b = rng.uniform(1, 2, size=(2, 9, 4096)).astype(dtype)  # sums near 2**53 units
        found.append((f"{dtype} of one sign", a, b.T))
        stack = rng.normal(size=(3, 17, 40)).astype(dtype)
        found.append((f"{dtype} stack", stack, np.swapaxes(stack, 1, 2)))
        found.append((f"{dtype} its transpose", stack[0], stack[0].T))
    return found


def digests() -> dict[str, Any]:
    """Case -> the digest of its product; and one of all plain products."""
    plain, found = hashlib.sha256(), {}
    for name, a, b in cases():
        found[name] = hashlib.sha256(exact.matmul(a, b).tobytes()).hexdigest()
        plain.update((a @ b).tobytes())
    return {"exact": found, "plain": plain.hexdigest()}


@pytest.fixture(scope="module")
def here() -> dict[str, Any]:
    return digests()


@pytest.fixture(scope="module")
def elsewhere() -> dict[str, Any]:
    """The digests under other kernels of OpenBLAS, by their name and number of threads."""
    found = {}
    for kernels, threads in (("Haswell", 1), ("SkylakeX", 2), ("Prescott", 1), ("Nehalem", 2)):
        chosen = {"OPENBLAS_CORETYPE": kernels, "OPENBLAS_NUM_THREADS": str(threads)}
        done = subprocess.run(
            [sys.executable, __file__], capture_output=True, text=True,
            env={**os.environ, **chosen, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        found[f"{kernels} {threads}"] = json.loads(done.stdout)
    return found


def test_every_kernel_gives_the_same_bits(here: dict[str, Any], elsewhere: dict[str, Any]) -> None:
    for name, found in elsewhere.items():
        assert found["exact"] == here["exact"], name


def test_the_kernels_differ(elsewhere: dict[str, Any]) -> None:
    """Else the test above would show nothing: plain products have other bits under most."""
    assert len({found["plain"] for found in elsewhere.values()}) >= 3


@each
def test_every_backend(dtype: str, backend: backends.Backend) -> None:
    a, b = operands(33, dtype, 5, 4)
    a[0, 0], b[:, 1] = np.nan, 0.0
    on_it = exact.matmul(backend.asarray(a), backend.asarray(b))
    assert namespace(on_it) is backend.xp
    assert backend.to_host(on_it).tobytes() == exact.matmul(a, b).tobytes()


@each
def test_a_program_has_the_same_bits(dtype: str) -> None:
    a, b = operands(1025, dtype, 9, 7)
    program = npdrt.record(exact.matmul, a, b)
    a, b = b.T[:, ::-1].repeat(2, 0)[:9].copy(), a.T.copy()[:, :7]
    a[1, 1], a[2] = np.inf, 0.0
    program(a, b)
    assert program.copy_out().tobytes() == exact.matmul(a, b).tobytes()


if __name__ == "__main__":
    print(json.dumps(digests()))
