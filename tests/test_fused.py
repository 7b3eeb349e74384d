"""Compiled loops (extra `fast`) give the bits of the plain replay, which is the definition."""

from __future__ import annotations

import builtins
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import npdrt
from npdrt import Unavailable, ops, optim
from npdrt.models import MLP
from npdrt.optim import norm
from npdrt.program import fused, plan, tiles
from npdrt.program.calls import Call, Ref, Value, c_strides

pytest.importorskip("numba", reason="the extra fast is not installed")

OPTIMIZERS: dict[str, Callable[[], Any]] = {
    "sgd": lambda: optim.sgd(lr=0.1, weight_decay=0.01),
    "sgd nesterov": lambda: optim.sgd(lr=0.1, momentum=0.9, nesterov=True),
    "adam": lambda: optim.adam(lr=1e-3, weight_decay=0.01),
    "adamw": lambda: optim.adam(lr=1e-3, weight_decay=0.01, decoupled=True),
    "lars": lambda: optim.lars(lr=1.0, weight_decay=0.01),
    "lars_lesion": lambda: optim.lars_lesion(lr=0.01),
    "fromage": lambda: optim.fromage(lr=0.01),
    "fromage bounded": lambda: optim.fromage(lr=0.01, norm_bound=1.0),
}


def same_bits(a: Any, b: Any) -> bool:
    """Whether two arrays have the same form and bits; a NaN's sign and payload are free."""
    a, b = np.asarray(a), np.asarray(b)
    nan = np.isnan(a) & np.isnan(b) if a.dtype.kind == "f" else np.zeros(a.shape, bool)
    bits = f"u{a.dtype.itemsize}"
    equal = np.ascontiguousarray(a).view(bits) == np.ascontiguousarray(b).view(bits)
    return a.shape == b.shape and a.dtype == b.dtype and bool(np.all(equal | nan))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_fifty_steps(name: str, dtype: str) -> None:
    """Parameters, state and loss."""
    model, optimizer = MLP(depth=3, width=48, inputs=40, outputs=3), OPTIMIZERS[name]()
    loss_and_grads = npdrt.value_and_grad(lambda p, x, y: ops.softmax_cross_entropy(model(p, x), y))

    def step(params: Any, state: Any, x: Any, y: Any, lr: float) -> Any:
        loss, grads = loss_and_grads(params, x, y)
        return *optimizer.update(params, grads, state, lr=lr), loss

    params = model.init(seed=0, dtype=dtype)
    x = npdrt.random.Random(0, "x").normal((20, 40)).astype(dtype)
    y = np.arange(20) % 3
    eager = replayed = (params, optimizer.init(params))
    program = npdrt.record(step, *eager, x, y, 0.1, fast=True)
    for k in range(50):
        *eager, loss = step(*eager, x, y, 0.01 / (k + 1))
        *replayed, found = program(*replayed, x, y, 0.01 / (k + 1))
        assert same_bits(loss, found)
    for group, other in zip(eager, replayed, strict=True):
        assert [name for name in group if not same_bits(group[name], other[name])] == []
    compiled = [g for g in program.plan.groups if g.chain and len(g.calls) > 1]
    assert len(compiled) >= 2  # the updates of the larger layers at least


# --- Winograd's form ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("size", "largest"), [((9, 7), 1.0), ((8, 8), 1.0), ((8, 8), 1e30)])
def test_a_convolution(
    monkeypatch: pytest.MonkeyPatch, dtype: str, size: tuple[int, int], largest: float
) -> None:
    """Value and derivatives, with blocks of one image and of several, and with scaled tiles."""
    stream, counts = npdrt.random.Random(0, "convolution"), []

    def counted(dtype: str, loops: Any = tiles._loops) -> Any:
        counts.append(dtype)
        return loops(dtype)

    def step(params: Any, g: Any) -> Any:
        def loss(p: Any) -> Any:
            y = ops.conv2d(p["x"], p["w"], padding=1, form="winograd")
            return ops.sum(y * g), y

        return npdrt.value_and_grad(loss, has_aux=True)(params)

    params = {
        "x": stream.of("x").normal((64, 9, *size)).astype(dtype),
        "w": stream.of("w").normal((64, 64, 3, 3)).astype(dtype),
    }
    params["x"][:, 3] *= largest
    g = stream.of("g").normal((64, 9, *size)).astype(dtype)
    monkeypatch.setattr(tiles, "_loops", counted)
    (_, y), grads = step(params, g)
    assert not counts
    (_, found), others = npdrt.record(step, params, g, fast=True)(params, g)
    assert len(counts) > 10
    assert same_bits(y, found)
    assert [name for name in grads if not same_bits(grads[name], others[name])] == []


# --- chains ------------------------------------------------------------------------------------

SPECIAL = [0.0, -0.0, 1.0, -1.5, np.inf, -np.inf, np.nan, 1e-40, -3e38, 1e300, 5e-324, 2.5]
BINARY = ["add", "subtract", "multiply", "divide"]
COMPARISONS = ["equal", "not_equal", "less", "less_equal", "greater", "greater_equal"]
LINES = st.tuples(
    st.sampled_from(
        [*BINARY, *COMPARISONS, "negative", "sqrt", "abs", "where", "astype", "number"]
    ),
    *[st.integers(0, 99)] * 3,
)


def chain_step(lines: list[Any]) -> Callable[..., Any]:
    """A step that makes one elementwise call a line, of values made before."""

    def step(x: Any, y: Any, d: Any, s: Any) -> Any:
        xp = npdrt.arrays.namespace(x)
        made, flags = [x, y, d], [x > y]
        for function, i, j, k in lines:
            a, b = made[i % len(made)], made[j % len(made)]
            if function in BINARY:
                made.append(getattr(xp, function)(a, s if k % 4 == 0 else b))
            elif function == "number":
                made.append(xp.multiply(a, (0.1, 3, -2.5)[k % 3]))
            elif function in COMPARISONS:
                flags.append(getattr(xp, function)(a, b))
            elif function == "where":
                made.append(xp.where(flags[k % len(flags)], a, b))
            elif function == "astype":
                made.append(xp.astype(flags[k % len(flags)] if k % 2 else a, xp.float32))
            else:
                made.append(getattr(xp, function)(a))
        return made[-1], made[len(made) // 2], flags[-1]

    return step


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(lines=st.lists(LINES, min_size=3, max_size=9), seed=st.integers(0, 99))
def test_random_chains(lines: list[Any], seed: int) -> None:
    """Float32, float64, booleans, a 0-d float64, numbers, and every special value."""
    size = plan.LARGE + 37
    stream = npdrt.random.Random(seed, "chain")
    special = np.resize(SPECIAL, size)
    x, y, d = (
        np.where(stream.of(f"{n}/which").bernoulli(size, 0.3), special, stream.of(n).normal(size))
        for n in "xyd"
    )
    with np.errstate(all="ignore"):
        args = (x.astype(np.float32), y.astype(np.float32), d, np.asarray(0.7))
        expected = chain_step(lines)(*args)
    found = npdrt.record(chain_step(lines), *args, fast=True)(*args)
    assert [same_bits(a, b) for a, b in zip(expected, found, strict=True)] == [True] * 3


def test_a_loop_reads_as_the_chain() -> None:
    def value(shape: tuple[int, ...], dtype: str) -> Value:
        return Value(shape, dtype, c_strides(shape, dtype))

    values = [value((9,), "float32"), value((), "float32"), value((9,), "float32"),
              value((9,), "float32")]  # fmt: skip
    calls = [Call("multiply", (Ref(1), Ref(0)), 2), Call("subtract", (Ref(0), Ref(2)), 3)]
    assert fused.loop_source(calls, values, [3], {0: 0, 1: 1, 3: 0}) == "\n".join([
        "def loop(a0, a1):",
        "    x0 = a1[()]",
        "    for i in range(a0.size):",
        "        x1 = a0[i]",
        "        x2 = (np.float32(x0) * np.float32(x1))",
        "        x3 = (np.float32(x1) - np.float32(x2))",
        "        a0[i] = x3",
    ])  # fmt: skip


@pytest.mark.parametrize("function", ["maximum", "minimum", "exp", "clip", "power"])
def test_what_stays_with_numpy(function: str) -> None:
    assert function not in fused.FUSABLE


def test_integers_stay_with_numpy() -> None:
    step = lambda i, x: (i + i, x * 2.0 + x)  # noqa: E731
    args = (np.arange(3000), np.arange(3000.0))
    found = npdrt.record(step, *args, fast=True)(*args)
    assert all(map(same_bits, found, step(*args)))


# --- the norm ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    "size", [0, 1, 255, 256, 257, 65_535, 65_536, 65_537, 131_072, 131_073, 200_001]
)
def test_norm(size: int, dtype: str) -> None:
    """Whole and ragged rows and chunks."""
    x = npdrt.random.Random(size, "norm").normal(size).astype(dtype)
    assert same_bits(npdrt.record(norm, x, fast=True)(x), norm(x))


@pytest.mark.parametrize("value", [np.inf, np.nan, 1e200, 1e-300])
def test_norm_of_special_values(value: float) -> None:
    x = np.full(70_000, 1.0)
    x[::777] = value
    with np.errstate(all="ignore"):
        assert same_bits(npdrt.record(norm, x, fast=True)(x), norm(x))


def test_without_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **settings: Any) -> Any:
        if name == "numba":
            raise ImportError("No module named 'numba'")
        return real(name, *args, **settings)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(Unavailable, match=r"compiled loops need numba .*npdrt\[fast\]"):
        npdrt.record(lambda x: x + x, np.ones(3), fast=True)
