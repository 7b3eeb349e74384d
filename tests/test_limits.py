"""The machine's limits: that they time what they say, all of it, and count it right."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import pytest

from npdrt.train import limits

ROWS, WIDTH = 3, 5
OPERATIONS = ("x @ W.T", "g @ W", "g.T @ x")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "SQUARE", 32)


def test_every_shape_has_a_rate() -> None:
    rates = limits.sgemm_rate([(ROWS, WIDTH), (8, 16)], seconds=0)
    shapes = ("batch 3, width 5", "batch 8, width 16")
    assert set(rates) == {"square 32", *(f"{o}, {s}" for o in OPERATIONS for s in shapes)}
    assert all(0 < rate < 1e6 for rate in rates.values())
    assert set(limits.sgemm_rate([], seconds=0)) == {"square 32"}


def test_operations_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """At a second for each product a rate is its number of operations."""
    monkeypatch.setattr(limits, "_medians", lambda calls, seconds: dict.fromkeys(calls, 1.0))
    rates = limits.sgemm_rate([(ROWS, WIDTH)])
    assert rates.pop("square 32") * 1e9 == pytest.approx(2 * 32**3)
    assert [rate * 1e9 for rate in rates.values()] == pytest.approx([2 * 3 * 5 * 5] * 3)


def test_products_of_a_step() -> None:
    """Operands, orientation and results; the transposes are views, as in a step."""
    x = g = np.linspace(-1, 1, ROWS * WIDTH, dtype=np.float32).reshape(ROWS, WIDTH)
    w = np.linspace(-1, 1, WIDTH**2, dtype=np.float32).reshape(WIDTH, WIDTH)
    calls = limits._products(ROWS, WIDTH)
    for operation, expected in zip(OPERATIONS, (x @ w.T, g @ w, g.T @ x), strict=True):
        call: Any = calls[f"{operation}, batch 3, width 5"]
        result = call()
        assert result is call.keywords["out"]
        assert result.dtype == np.float32
        np.testing.assert_allclose(result, expected, rtol=1e-6)
        left, right = call.args
        transposed = (left.flags.f_contiguous, right.flags.f_contiguous)
        assert transposed == (operation.startswith("g.T"), operation.endswith("W.T"))


def test_calls_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three rounds at least, each call in each, and the median of what each took."""
    monkeypatch.setattr(limits, "_repeats", lambda call: 1)
    log: list[str] = []
    taken = {"a": iter([9.0, 1.0, 2.0]), "b": iter([5.0, 3.0, 4.0])}

    def fake(call: Callable[[], object], repeats: int) -> float:
        call()
        return next(taken[log[-1]])

    monkeypatch.setattr(limits, "_time", fake)
    calls: dict[str, limits.Call] = {name: partial(log.append, name) for name in "ab"}
    assert limits._medians(calls, seconds=0) == {"a": 2.0, "b": 4.0}
    assert log == ["a", "b"] * 3


def test_short_calls_are_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 0.0003, 1.0, 1.4])
    monkeypatch.setattr(limits.time, "perf_counter", lambda: next(clock))
    log: list[int] = []
    assert limits._repeats(partial(log.append, 1)) == 4  # of 0.3 ms each, to last 1 ms
    assert len(log) == 2
    assert limits._time(partial(log.append, 1), 4) == pytest.approx(0.1)
    assert len(log) == 6


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 7, limits.BLOCK, 2 * limits.BLOCK + 3])
def test_a_pass_covers_every_element(size: int, threads: int) -> None:
    a, b, c = (np.full(size, value, np.float32) for value in (0, 1, 2))
    parts = zip(*(np.array_split(v, threads) for v in (a, b, c)), strict=True)
    with ThreadPoolExecutor(threads) as pool:
        limits._together(pool, [limits._triad(*part) for part in parts])
    assert (a == 7).all()
    assert (b == 1).all()
    assert (c == 2).all()


def test_a_failure_in_a_thread_is_not_a_fast_pass() -> None:
    def fail() -> None:
        raise ValueError("in a thread")

    with ThreadPoolExecutor(1) as pool, pytest.raises(ValueError, match="in a thread"):
        limits._together(pool, [fail])


def test_bandwidth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "cores", lambda: 2)
    found = limits.triad_bandwidth(size=1 << 20, passes=1)
    assert 0 < found.rate < 1e6
    assert found.threads in (1, 2)


def test_bytes_are_counted_and_the_best_pass_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three arrays a pass; with two threads the passes here are the faster ones."""
    asked: list[int] = []
    taken = iter([8.0, 4.0, 8.0, 2.0, 1.0, 8.0])

    def fake(call: Any, repeats: int) -> float:
        asked.append(len(call.args[1]))
        return next(taken)

    monkeypatch.setattr(limits, "cores", lambda: 2)
    monkeypatch.setattr(limits, "_time", fake)
    assert limits.triad_bandwidth(size=4000, passes=2) == (3 * 4000 / 1e9, 2)
    assert asked == [1, 1, 1, 2, 2, 2]


def test_cores() -> None:
    assert limits.cores() >= 1
