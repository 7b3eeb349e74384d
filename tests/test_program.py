"""Programs: a replay gives the bits of the eager step, in the program's own memory."""

from __future__ import annotations

import itertools
import math
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import threadpoolctl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_ops import CASES, Case, values

from npdrt import ops, optim, record, value_and_grad
from npdrt.arrays import label, namespace, phase, quiet
from npdrt.autodiff import Tensor
from npdrt.errors import Error
from npdrt.models import MLP
from npdrt.models.mlp import NONLINEARITIES
from npdrt.optim import RULES, adam, fromage, lars, norm, sgd
from npdrt.program import Memory, infer, layout, plan, replay
from npdrt.program.calls import KINDS, c_strides
from npdrt.program.infer import Form
from npdrt.program.tree import leaves, rebuild
from npdrt.random import Random

HERE = Path(__file__).name
RNG = np.random.default_rng(1971)
DTYPES = ("float32", "float64")


# --- comparison ------------------------------------------------------------------------------


def assert_same(found: Any, expected: Any) -> None:
    """The same tree, shapes, dtypes and bits (of a NaN, only that it is one)."""
    ours, theirs = dict(leaves(found)), dict(leaves(expected))
    assert ours.keys() == theirs.keys()
    for path, x in theirs.items():
        a, b = np.asarray(ours[path]), np.asarray(x)
        assert (path, a.shape, a.dtype) == (path, b.shape, b.dtype)
        if a.dtype.kind == "f":
            nan = np.isnan(b)
            assert np.array_equal(np.isnan(a), nan), path
            a, b = np.where(nan, 0, a), np.where(nan, 0, b)
        assert a.tobytes() == b.tobytes(), path


def assert_laid_out(found: Any, expected: Any) -> None:
    """The same memory layout: the strides of every axis that has several elements."""
    for (path, a), (_, b) in zip(leaves(found), leaves(expected), strict=True):
        b = np.asarray(b)
        if b.size > 1:
            assert (path, steps(a)) == (path, steps(b))


def steps(x: Any) -> tuple[int, ...]:
    return tuple(s for n, s in zip(x.shape, x.strides, strict=True) if n > 1)


def frozen(tree: Any) -> Any:
    """Copies of the arrays in a tree, locked: a program that writes to an argument fails."""
    return rebuild(tree, lambda x: locked(np.array(x)) if hasattr(x, "dtype") else x)


def locked(x: np.ndarray) -> np.ndarray:
    x.flags.writeable = False
    return x


def copied(tree: Any) -> Any:
    """Copies in C order, as arguments are in a program."""
    return rebuild(tree, lambda x: np.array(x, order="C") if hasattr(x, "dtype") else x)


def check(step: Callable[..., Any], *args: Any) -> Any:
    """The program of a step, after two replays that agree with the eager step."""
    args = frozen(args)
    program = record(step, *args)
    with quiet():
        expected = step(*args)
    for _ in range(2):
        found = program(*args)
        assert_same(found, expected)
        assert_laid_out(found, expected)
    return program


@contextmanager
def small_blocks(large: int = 8, block: int = 16) -> Iterator[None]:
    """Chains from `large` elements on, in blocks of `block`."""
    with mock.patch.object(plan, "LARGE", large), mock.patch.object(replay, "BLOCK", block):
        yield


def chains(program: Any) -> list[plan.Group]:
    """The chains of several calls."""
    return [g for g in program.plan.groups if g.chain and len(g.calls) > 1]


def longest_chain(program: Any) -> int:
    """The most elements that a chain of several calls runs over."""
    calls, sizes = program.plan.calls, [v.size for v in program.values]
    return max((sizes[calls[g.calls[0]].result] for g in chains(program)), default=0)


# --- training --------------------------------------------------------------------------------

OPTIMIZERS = {
    **{name: rule(lr=rule.default_rate) for name, rule in RULES.items()},
    "fromage": fromage(lr=0.01),
    "fromage bounded": fromage(lr=0.01, norm_bound=1.0),
    "lars": lars(lr=0.1, trust_coefficient=0.1),
    "lars decay": lars(lr=0.1, weight_decay=0.01, momentum=0.5, eps=1e-9),
    "sgd": sgd(lr=0.1),
    "sgd decay": sgd(lr=0.1, weight_decay=0.01),
    "sgd momentum": sgd(lr=0.1, momentum=0.9, dampening=0.5),
    "sgd nesterov": sgd(lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adam": adam(lr=0.001),
    "adam decay": adam(lr=0.001, weight_decay=0.01),
    "adamw": adam(lr=0.001, weight_decay=0.01, decoupled=True),
}


def make_step(model: MLP, optimizer: Any) -> Callable[..., Any]:
    """One training step on a batch: forward, backward, update."""

    def loss_fn(params: Any, x: Any, y: Any) -> Any:
        return ops.softmax_cross_entropy(model(params, x), y)

    def step(params: Any, state: Any, x: Any, y: Any, lr: Any) -> Any:
        loss, grads = value_and_grad(loss_fn)(params, x, y)
        params, state = optimizer.update(params, grads, state, lr=lr)
        return params, state, loss

    return step


def start(model: MLP, optimizer: Any, dtype: str) -> tuple[Any, Any]:
    params = model.init(seed=0, dtype=dtype)
    return params, optimizer.init(params)


def batch(model: MLP, n: int, dtype: str, seed: int) -> tuple[Any, Any]:
    source = np.random.default_rng(seed)
    x = source.standard_normal((n, model.inputs)).astype(dtype)
    return x, source.integers(0, model.outputs, n)


def train(model: MLP, optimizer: Any, dtype: str, *, count: int, n: int = 12) -> Any:
    """Eager and replayed training side by side; returns the program."""
    step = make_step(model, optimizer)
    params, state = eager = start(model, optimizer, dtype)
    program = record(step, params, state, *batch(model, n, dtype, 0), 0.1)
    held = frozen(eager)
    for i in range(count):
        x, y = frozen(batch(model, n, dtype, i))
        lr = 0.02 / (1 + i % 7)
        *eager, loss = step(*eager, x, y, lr)
        *held, found = program(*held, x, y, lr)
        assert_same((held, found), (eager, loss))
    assert np.isfinite(loss)
    return program


SMALL = MLP(depth=3, width=36, inputs=30, outputs=5, bias=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_fifty_steps_are_the_eager_ones(name: str, dtype: str) -> None:
    program = train(SMALL, OPTIMIZERS[name], dtype, count=50)
    assert longest_chain(program) == 36 * 36 > plan.LARGE


@pytest.mark.parametrize("output_nonlinearity", [False, True])
@pytest.mark.parametrize(("bias", "residual"), [(False, True), (True, False), (True, True)])
@pytest.mark.parametrize("nonlinearity", NONLINEARITIES)
def test_every_perceptron(
    nonlinearity: str, bias: bool, residual: bool, output_nonlinearity: bool
) -> None:
    """The batch makes the activations large enough for chains."""
    model = MLP(depth=4, width=20, inputs=20, outputs=20, bias=bias, residual=residual,
                nonlinearity=nonlinearity, output_nonlinearity=output_nonlinearity)  # fmt: skip
    train(model, OPTIMIZERS["fromage"], "float32", count=4, n=60)


@pytest.mark.parametrize("name", ["fromage bounded", "sgd nesterov", "adamw", "lars decay"])
def test_chains_of_several_blocks(name: str) -> None:
    """The last of three blocks is ragged."""
    width = math.isqrt(5 * replay.BLOCK // 2)
    model = MLP(depth=3, width=width, inputs=7, outputs=3, bias=True, nonlinearity="gelu")
    program = train(model, OPTIMIZERS[name], "float32", count=3, n=width // 2)
    assert longest_chain(program) == width * width
    assert width * width // replay.BLOCK == 2
    assert width * width % replay.BLOCK


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_many_small_blocks(name: str, dtype: str) -> None:
    with small_blocks():
        model = MLP(depth=3, width=7, inputs=6, outputs=4, bias=True, nonlinearity="softplus")
        program = train(model, OPTIMIZERS[name], dtype, count=8, n=9)
    assert longest_chain(program) == 9 * 7


# --- every primitive -------------------------------------------------------------------------

LAYOUTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "C": lambda a: a,
    "Fortran": lambda a: np.array(a, order="F"),
    "strided": lambda a: np.repeat(a, 2, axis=-1)[..., ::2] if a.ndim else a,
    "reversed": lambda a: np.ascontiguousarray(a[::-1])[::-1] if a.ndim else a,
}


def differentiate(row: Case) -> Callable[..., Any]:
    """The step of a case: value, and gradient of a weighted sum of it. Settings and numbers are
    part of the step."""
    wanted = row.differentiated()

    def step(params: Any, others: Any, weights: Any) -> Any:
        def loss(params: Any) -> Any:
            args = [params.get(str(i), others.get(str(i), a)) for i, a in enumerate(row.arguments)]
            value = row.call(*args)
            return ops.sum(value * weights), value

        return value_and_grad(loss, has_aux=True)(params)

    assert wanted
    return step


def arguments(row: Case, dtype: str) -> tuple[Any, Any, Any]:
    args = values(row, dtype)
    wanted = row.differentiated()
    given = {str(i): a for i, a in enumerate(args) if isinstance(a, np.ndarray)}
    params = {i: a for i, a in given.items() if int(i) in wanted}
    others = {i: a for i, a in given.items() if int(i) not in wanted}
    shape = np.shape(row.call(*args))
    weights = np.cos(np.arange(math.prod(shape))).reshape(shape)
    return params, others, np.asarray(weights, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("row", CASES, ids=str)
def test_every_primitive(row: Case, dtype: str) -> None:
    args = arguments(row, dtype)
    step = differentiate(row)
    with small_blocks():
        program = check(step, *args)
        expected = step(*args)
        for layout in LAYOUTS.values():
            assert_same(program(*rebuild(args, layout)), expected)


def permuting(x: Any, w: Any) -> Any:
    """Results in the order of axes of their arguments, and what reads them in that order."""
    t = ops.transpose(x, axes=(2, 0, 1))
    y = t * 2.0 + ops.tanh(t)
    rows = ops.reshape(y, shape=(y.shape[0], -1))
    return {
        "permuted": y,
        "viewed": y[1],
        "back": ops.transpose(y, axes=(1, 2, 0)),
        "summed": ops.sum(y, axis=1),
        "all": ops.sum(y),
        "var": ops.var(y, axis=(0, 2), keepdims=True),
        "product": ops.matmul(ops.transpose(rows), w),
        "gemm": ops.matmul(ops.transpose(w), rows),
        "log": ops.log_softmax(y, axis=1),
        "joined": ops.concat(y, y * 3.0, axis=1),
        "flat": rows,
        "max": ops.max(y, axis=2),
    }


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_layout_of_results_is_numpys(dtype: str) -> None:
    x, w = RNG.standard_normal((9, 11, 13)).astype(dtype), RNG.standard_normal((13, 4))
    check(permuting, x, w.astype(dtype))

    def step(params: Any, w: Any) -> Any:
        def loss(p: Any) -> Any:
            found = permuting(p["x"], w)
            return sum(ops.sum(y * y) for y in found.values())

        return value_and_grad(loss)(params)

    check(step, {"x": x}, w.astype(dtype))


# --- the form of a result, against NumPy -----------------------------------------------------

SIDES = st.sampled_from([0, 1, 1, 2, 3, 5])
SHAPES = st.lists(SIDES, max_size=4).map(tuple)


@st.composite
def laid_out(draw: Any, shape: Any = SHAPES, dtypes: Any = ("float32", "float64")) -> np.ndarray:
    """An array of any order of axes, with gaps, reversed axes or repeated ones."""
    shape = draw(shape) if isinstance(shape, st.SearchStrategy) else shape
    order = draw(st.permutations(range(len(shape))))
    gaps = [draw(st.sampled_from([1, 1, 1, 2, -1])) for _ in shape]
    repeated = [draw(st.integers(0, 9)) == 0 for _ in shape]
    owned = [1 if repeated[i] else shape[i] * abs(gaps[i]) for i in order]
    x = np.arange(math.prod(owned)).reshape(owned).transpose(np.argsort(order))
    x = x.astype(draw(st.sampled_from(dtypes)), order="K")
    seen = tuple(
        slice(None) if r else slice(None, None, g) for g, r in zip(gaps, repeated, strict=True)
    )
    return np.broadcast_to(x[seen], shape)


def form(x: Any) -> Any:
    if isinstance(x, tuple) and any(isinstance(a, np.ndarray) for a in x):
        return tuple(map(form, x))
    return Form(x.shape, x.dtype, x.strides) if isinstance(x, np.ndarray) else x


def address(x: np.ndarray) -> int:
    return int(x.__array_interface__["data"][0])


def assert_inferred(function: str, args: tuple[Any, ...], settings: dict[str, Any]) -> None:
    """`infer.result` against what NumPy makes of real arrays."""
    name = "rint" if function == "round" else function.removeprefix("portable_")
    if function == "getitem":
        made = args[0][args[1]]
    else:
        with quiet():
            made = np.asarray(getattr(np, name)(*args, **settings))
    found = infer.result(function, form(args), settings)
    if KINDS[function] == "view" and not found.base:  # needs a copy first
        assert not np.may_share_memory(made, args[0])
        return
    assert (found.shape, found.dtype) == (made.shape, made.dtype)
    if made.size > 1:
        assert steps(found) == steps(made)
    if KINDS[function] == "view" and made.size:
        assert np.may_share_memory(made, args[0])
        assert found.offset == address(made) - address(args[0])


inferred = settings(max_examples=150, deadline=None)
ELEMENTWISE = sorted(
    name for name, kind in KINDS.items()
    if kind == "elementwise" and not name.startswith("bitwise") and name not in ("where", "astype")
)  # fmt: skip
TWO = {"add", "subtract", "multiply", "divide", "maximum", "minimum", "power", "remainder",
       "floor_divide", "equal", "not_equal", "less", "less_equal", "greater",
       "greater_equal"}  # fmt: skip


@st.composite
def broadcastable(draw: Any, count: int) -> list[np.ndarray]:
    """Arrays that broadcast, each in a layout of its own."""
    shape = draw(SHAPES)
    parts = []
    for _ in range(count):
        own = tuple(draw(st.sampled_from([n, n, n, 1])) for n in shape)
        parts.append(draw(laid_out(own[draw(st.integers(0, max(0, len(own) - 1))) // 2 :])))
    return parts


@inferred
@given(function=st.sampled_from([*ELEMENTWISE, "where", "astype"]), data=st.data())
def test_form_of_elementwise_results(function: str, data: Any) -> None:
    if function == "where":
        c, a, b = data.draw(broadcastable(3))
        assert_inferred(function, (c > 2, a, b), {})
    elif function == "astype":
        dtype = data.draw(st.sampled_from(["float32", "float64", "int64", "bool"]))
        assert_inferred(function, (data.draw(laid_out()), dtype), {})
    elif function in TWO:
        a, b = data.draw(broadcastable(2))
        assert_inferred(function, data.draw(st.sampled_from([(a, b), (a, 2.0), (3, b)])), {})
    else:
        x = data.draw(laid_out())
        assert_inferred(function, (x, 0.5, None) if function == "clip" else (x,), {})


@inferred
@given(
    function=st.sampled_from(["sum", "prod", "max", "min", "all", "any", "argmax", "argmin"]),
    x=laid_out(shape=st.lists(st.sampled_from([1, 2, 3, 5]), max_size=4).map(tuple)),
    keepdims=st.booleans(),
    data=st.data(),
)
def test_form_of_reductions(function: str, x: np.ndarray, keepdims: bool, data: Any) -> None:
    axes = st.sampled_from(range(-x.ndim, x.ndim)) if x.ndim else st.none()
    axis = data.draw(st.none() | axes)
    if not function.startswith("arg") and x.ndim and data.draw(st.booleans()):
        count = data.draw(st.integers(0, x.ndim))
        axis = tuple(data.draw(st.permutations(range(x.ndim)))[:count])
    assert_inferred(function, (x,), {"axis": axis, "keepdims": keepdims})


@inferred
@given(x=laid_out(), data=st.data())
def test_form_of_views(x: np.ndarray, data: Any) -> None:
    assert_inferred("permute_dims", (x, data.draw(st.permutations(range(x.ndim)).map(tuple))), {})
    if x.ndim >= 2:
        assert_inferred("matrix_transpose", (x,), {})
    assert_inferred("expand_dims", (x,), {"axis": data.draw(st.integers(0, x.ndim))})
    assert_inferred("broadcast_to", (x, (2, *x.shape)), {})
    index = tuple(
        data.draw(st.sampled_from([slice(None), slice(1, None), slice(None, None, -2), 0, -1]))
        for n in x.shape if n
    )  # fmt: skip
    if all(x.shape):
        assert_inferred("getitem", (x, (*index, ..., None)), {})
    split = data.draw(st.integers(0, x.ndim))
    folded = (math.prod(x.shape[:split]), math.prod(x.shape[split:]))
    assert_inferred("reshape", (x, data.draw(st.sampled_from([folded, (x.size,), x.shape]))), {})


@inferred
@given(data=st.data(), function=st.sampled_from(["concat", "stack"]))
def test_form_of_joined_arrays(data: Any, function: str) -> None:
    shape = data.draw(st.lists(SIDES, min_size=1, max_size=3).map(tuple))
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    lengths = st.sampled_from([0, 1, 4]) if function == "concat" else st.just(shape[axis])
    parts = []
    for _ in range(data.draw(st.integers(1, 3))):
        own = list(shape)
        own[axis] = data.draw(lengths)
        parts.append(data.draw(laid_out(tuple(own))))
    assert_inferred(function, (tuple(parts),), {"axis": axis})


@inferred
@given(data=st.data())
def test_form_of_products_and_gathered_arrays(data: Any) -> None:
    m, k, n = (data.draw(SIDES) for _ in range(3))
    stack = data.draw(st.sampled_from([(), (2,), (3, 1)]))
    a, b = data.draw(laid_out((*stack, m, k))), data.draw(laid_out((k, n)))
    assert_inferred("matmul", (a, b), {})
    x = data.draw(laid_out((3, 4, 2)))
    places = data.draw(laid_out(SHAPES, ("int64",))) % 2
    assert_inferred("take", (x, places), {"axis": data.draw(st.integers(0, 2))})
    axis = data.draw(st.integers(-3, 2))
    assert_inferred("sort", (x,), {"axis": axis})
    assert_inferred("argsort", (x,), {"axis": axis})
    assert_inferred("searchsorted", (np.arange(4.0), x), {"side": "right"})


def test_forms_of_creations() -> None:
    for function, args in {"zeros": ((2, 3),), "ones": (4,), "full": ((2,), 7), "arange": (3, 9, 2)
                           }.items():  # fmt: skip
        assert_inferred(function, args, {})
        assert_inferred(function, args, {"dtype": "float32"})
    assert infer.empty((2, 3), "float32").strides == c_strides((2, 3), "float32") == (12, 4)


# --- random programs -------------------------------------------------------------------------


@dataclass(frozen=True)
class Drawn:
    """A random program as data, so that it runs eagerly and recorded alike.

    lines: (what, numbers that choose operands and variants). update: from which line on calls
    belong to the update. outputs: (name, which value). Every choice depends on shapes and dtypes
    alone.
    """

    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]
    lines: tuple[tuple[str, tuple[int, ...]], ...]
    update: int
    outputs: tuple[tuple[str, int], ...]

    def inputs(self, seed: int) -> dict[str, np.ndarray]:
        source = np.random.default_rng(seed)
        return {
            f"x{i}": np.asarray(source.standard_normal(shape)).astype(dtype)
            for i, (shape, dtype) in enumerate(zip(self.shapes, self.dtypes, strict=True))
        }

    def __call__(self, inputs: dict[str, Any]) -> dict[str, Any]:
        made = list(inputs.values())
        for number, (what, chosen) in enumerate(self.lines):
            with phase("update" if number >= self.update else "forward"):
                made += [y for y in LINES[what](made, *chosen) if y.size]
        return {name: made[i % len(made)] for name, i in self.outputs}


def pick(made: list[Any], i: int, wanted: Callable[[Any], bool] = lambda x: True) -> Any:
    """The i-th value, counted around from the newest, or the next that is wanted; None if none."""
    ordered = [x for x in reversed(made) if x.dtype.kind == "f" and wanted(x)]
    return ordered[i % len(ordered)] if ordered else None


def like(x: Any) -> Callable[[Any], bool]:
    """Whether another value can meet x elementwise without growing either."""
    return lambda y: y.shape in (x.shape, (), x.shape[-1:])


UNARY = ("negative", "abs", "tanh", "exp", "square", "sqrt", "sign", "log1p", "floor", "sin",
         "expm1", "reciprocal")  # fmt: skip
BINARY = ("add", "subtract", "multiply", "divide", "maximum", "minimum", "remainder")


def line_unary(made: list[Any], i: int, f: int, *_: int) -> list[Any]:
    x = pick(made, i)
    xp, name = namespace(x), UNARY[f % len(UNARY)]
    if name == "sqrt":
        return [xp.sqrt(xp.abs(x))]
    return [getattr(xp, name)(xp.tanh(x) if name in ("exp", "square", "expm1") else x)]


def line_binary(made: list[Any], i: int, f: int, j: int, *_: int) -> list[Any]:
    x = pick(made, i)
    y = pick(made, j, like(x))
    a, b = (y, x) if f % 2 else (x, y)
    return [getattr(namespace(x), BINARY[f // 2 % len(BINARY)])(a, b)]


def line_number(made: list[Any], i: int, f: int, *_: int) -> list[Any]:
    x = pick(made, i)
    return [(x * 0.7, 1.5 - x, x / 3.0, x + x, -x, x**2, namespace(x).clip(x, -0.5, 0.5))[f % 7]]


def line_where(made: list[Any], i: int, j: int, k: int, *_: int) -> list[Any]:
    x = pick(made, i)
    a, b = pick(made, j, like(x)), pick(made, k, like(x))
    xp = namespace(x)
    return [xp.where((x > 0) | ~(a <= b), a, b if j % 2 else 0.25)]


def line_cast(made: list[Any], i: int, *_: int) -> list[Any]:
    x = pick(made, i)
    xp = namespace(x)
    return [xp.astype(x, xp.float64 if x.dtype == np.float32 else xp.float32)]


def line_reduction(made: list[Any], i: int, f: int, axis: int, *_: int) -> list[Any]:
    x = pick(made, i)
    xp, name = namespace(x), ("sum", "max", "min", "prod")[f % 4]
    where = None if axis % 3 == 0 or not x.ndim else axis % x.ndim
    return [getattr(xp, name)(x, axis=where, keepdims=bool(f // 4 % 2))]


def line_argmax(made: list[Any], i: int, axis: int, *_: int) -> list[Any]:
    x = pick(made, i, lambda x: x.ndim > 0)
    if x is None:
        return []
    xp, axis = namespace(x), axis % x.ndim
    places = xp.argmax(x, axis=axis)
    rows = xp.argsort(xp.reshape(x, (-1,))) if i % 2 else xp.searchsorted(xp.arange(4.0), x)
    return [xp.astype(places, xp.float32), xp.sort(x, axis=axis), rows * 0.5]


def line_norm(made: list[Any], i: int, *_: int) -> list[Any]:
    return [norm(pick(made, i))]


def line_matmul(made: list[Any], i: int, j: int, *_: int) -> list[Any]:
    x = pick(made, i, lambda x: x.ndim == 2)
    if x is None:
        return []
    xp = namespace(x)
    y = pick(made, j, lambda y: y.ndim == 2 and x.shape[1] in y.shape)
    return [xp.matmul(x, y if y.shape[0] == x.shape[1] else xp.matrix_transpose(y)) * 0.1]


def line_view(made: list[Any], i: int, f: int, *_: int) -> list[Any]:
    x = pick(made, i, lambda x: x.ndim > 0)
    if x is None:
        return []
    xp = namespace(x)
    return [
        (
            lambda: xp.permute_dims(x, tuple(reversed(range(x.ndim)))),
            lambda: xp.reshape(x, (-1,)),
            lambda: xp.reshape(x, (x.shape[-1], -1)),
            lambda: x[::-1],
            lambda: x[..., ::2],
            lambda: x[0, ...],
            lambda: x[(0,) * x.ndim],
            lambda: x[-1:],
            lambda: xp.expand_dims(x, axis=0),
            lambda: xp.broadcast_to(x[..., :1], x.shape),
        )[f % 10]()
    ]


def line_assign(made: list[Any], i: int, f: int, j: int, *_: int) -> list[Any]:
    x = pick(made, i, lambda x: x.ndim > 0)
    if x is None:
        return []
    xp, old = namespace(x), pick(made, j)
    y = (x * 0.5, xp.zeros(x.shape, dtype=x.dtype), xp.full(x.shape, 2.0, dtype=x.dtype))[f % 3]
    index = ((0, ...), slice(None, None, 2), (..., slice(1)), ...)[f // 3 % 4]
    whole = x * 0.3 if f % 2 else x
    y[index] = whole[index] if f // 12 % 2 else xp.astype(xp.sum(old), x.dtype)
    if f // 12 % 4 == 3:
        y[...] = whole - 1.0
    kept = y * 1.0 if f // 24 % 2 else None
    if f // 48 % 2:
        y += x
    return [y] if kept is None else [kept, y]


def line_join(made: list[Any], i: int, f: int, j: int, *_: int) -> list[Any]:
    x = pick(made, i, lambda x: 0 < x.ndim < 4)
    if x is None:
        return []
    xp, y = namespace(x), pick(made, j, lambda y: y.shape == x.shape)
    return [(xp.concat if f % 2 else xp.stack)((x, y), axis=f // 2 % x.ndim)[:9]]


def line_take(made: list[Any], i: int, f: int, *_: int) -> list[Any]:
    x = pick(made, i, lambda x: x.ndim > 0)
    if x is None:
        return []
    xp, axis = namespace(x), f % x.ndim
    places = np.arange(f % 5, f % 5 + x.shape[axis]) % x.shape[axis]
    return [xp.take(x, xp.asarray(places), axis=axis)]


def line_constant(made: list[Any], i: int, f: int, *_: int) -> list[Any]:
    x = pick(made, i)
    xp = namespace(x)
    held = np.arange(max(x.size, 1), dtype=x.dtype).reshape(x.shape) / 8
    fixed = xp.asarray(held) if f % 2 else xp.ones(x.shape, dtype=x.dtype) * 0.25
    return [fixed, xp.sqrt(fixed) + fixed]


def line_first(made: list[Any], i: int, j: int, *_: int) -> list[Any]:
    """Elements of an array beside whole ones: blocks must not see a new one for an old one."""
    x = pick(made, i, lambda x: x.ndim > 0)
    return [] if x is None else [x * x[(0,) * x.ndim] + 1.0, x + x[(-1,) * x.ndim]]


LINES = {name[5:]: f for name, f in list(globals().items()) if name.startswith("line_")}
OFTEN = ("binary", "binary", "binary", "number", "unary", "where", "view", "matmul")


@st.composite
def drawn_programs(draw: Any, shapes: tuple[tuple[int, ...], ...]) -> Drawn:
    count = draw(st.integers(1, 5))
    names = [f"x{i}" for i in range(count)]
    number = st.integers(0, 95)
    what = st.sampled_from((*LINES, *OFTEN, *OFTEN))
    lines = draw(st.lists(st.tuples(what, st.tuples(*[number] * 4)), min_size=5, max_size=24))
    outputs = draw(st.dictionaries(st.sampled_from([*names, *names, "y", "z"]), number, min_size=1))
    return Drawn(
        tuple(draw(st.lists(st.sampled_from(shapes), min_size=count, max_size=count))),
        tuple(draw(st.lists(st.sampled_from(DTYPES), min_size=count, max_size=count))),
        tuple(lines),
        draw(st.integers(0, len(lines))),
        tuple(outputs.items()),
    )


def hold_to_eager(drawn: Drawn, calls: int = 4) -> None:
    """Replays on fresh arrays, then on what came back where it fits, even under other names."""
    program = record(drawn, drawn.inputs(0))
    held: dict[str, Any] = frozen(drawn.inputs(0))
    for seed in range(calls):
        safe = copied(held)
        with quiet():
            expected = drawn(safe)
        before = {n: x.tobytes() for n, x in held.items() if not x.flags.writeable}
        found = program(held)
        assert_same(found, expected)
        assert_laid_out(found, expected)
        assert before == {n: held[n].tobytes() for n in before}
        held = fed_back(drawn, found, seed)


def fed_back(drawn: Drawn, found: dict[str, Any], seed: int) -> dict[str, Any]:
    """The next arguments: returned arrays where they fit, in turn under their own names, under
    any name, and not at all."""
    fresh: dict[str, Any] = frozen(drawn.inputs(seed + 1))
    if seed % 3 == 2:
        return fresh
    for name, x in fresh.items():
        returned = [found[name]] if seed % 3 == 0 and name in found else list(found.values())
        for y in returned:
            if (y.shape, y.dtype) == (x.shape, x.dtype):
                fresh[name] = y
    return fresh


slow = (HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much)


@settings(max_examples=350, deadline=None, suppress_health_check=slow)
@given(drawn=drawn_programs(((), (6,), (6, 6), (6, 6), (6, 6), (4, 6), (1, 6), (40,))))
def test_random_programs(drawn: Drawn) -> None:
    """With chains from 8 elements on, in blocks of 7."""
    with small_blocks(block=7):
        hold_to_eager(drawn)


@settings(max_examples=25, deadline=None, suppress_health_check=slow)
@given(drawn=drawn_programs(((), (60,), (60, 60), (60, 60), (190, 190), (190,))))
def test_random_programs_of_real_sizes(drawn: Drawn) -> None:
    hold_to_eager(drawn, calls=2)


# --- what the planner must keep apart --------------------------------------------------------


def test_an_element_of_an_argument_that_a_chain_replaces() -> None:
    """The second block needs the old element, which the first block has overwritten."""

    def step(w: Any) -> Any:
        return {"w": w["w"] * w["w"][3] + 1.0}

    with small_blocks():
        check(step, {"w": RNG.standard_normal(40)})


@pytest.mark.parametrize("chained", [False, True])
def test_an_old_value_is_read_before_it_is_replaced(chained: bool) -> None:
    """The update is ready before the forward pass has read the old value for the last time."""

    def step(state: Any, x: Any) -> Any:
        with phase("update"):
            new = state["w"] * 0.5
        late = ops.sum(state["w"] * x)
        with phase("update"):
            moved = state["v"] + late
        return {"v": moved, "w": new, "twice": new * moved, "old": state["w"] - new}

    state = {"v": RNG.standard_normal(40), "w": RNG.standard_normal(40)}
    with small_blocks(large=8 if chained else 10**6):
        check(step, state, RNG.standard_normal(40))


def test_an_element_of_what_a_chain_makes() -> None:
    """A number is computed before a chain that does not make it, never before one that does."""

    def step(x: Any) -> Any:
        y = x * 2.0 + 1.0
        return y[1, 2] * 3.0, (y - 1.0) * 0.5

    with small_blocks():
        check(step, RNG.standard_normal((6, 6)))


def test_a_buffer_is_not_handed_on_while_the_chain_reads_it() -> None:
    """The product dies in the chain, but not in the first call whose result could have its room."""

    def step(x: Any) -> Any:
        product = x @ x
        doubled = product * 2.0
        together = product + doubled
        return doubled @ x, together @ x

    with small_blocks():
        check(step, RNG.standard_normal((8, 8)))


@pytest.mark.parametrize("size", [4, 8])
def test_an_array_is_assigned_whole(size: int) -> None:
    """The new elements die in the assignment, and are not overwritten by the old ones first."""

    def step(x: Any) -> Any:
        old, new = x @ x, x @ (x + 1.0)
        old[...] = new
        tail = x @ (x - 1.0)
        tail[1:] = (x @ (x * 3.0))[1:]
        return old @ x, tail @ x

    with small_blocks():
        check(step, RNG.standard_normal((size, size)))


def test_a_result_in_another_order_does_not_land_in_its_argument() -> None:
    def step(state: Any) -> Any:
        turned = ops.transpose(state["b"]) * 2.0
        return {"a": turned, "sum": ops.sum(turned, axis=0), "row": turned[1]}

    check(step, {"a": RNG.standard_normal((9, 9)), "b": RNG.standard_normal((9, 9))})


def test_casts_keep_their_room_apart() -> None:
    """Single and double precision, in chains and out of them."""

    def step(x: Any) -> Any:
        xp = namespace(x)
        double = xp.astype(x * 1.5, "float64")
        single = xp.astype(double / 3.0, "float32")
        mixed = single * double + single
        flags = (mixed > 0) & (double < 1.0)
        return xp.where(flags, mixed, single) @ double, single @ x, xp.astype(flags, "float32")

    for large in (8, 1000):
        with small_blocks(large=large):
            check(step, RNG.standard_normal((9, 9)).astype("float32"))


def test_two_results_that_change_places() -> None:
    def step(state: Any) -> Any:
        a, b = state["a"], state["b"]
        return {"a": b, "b": a}

    def crossed(state: Any) -> Any:
        a, b = state["a"], state["b"]
        return {"a": b * 2.0, "b": a * 3.0}

    state = {"a": RNG.standard_normal(20), "b": RNG.standard_normal(20)}
    for function in (step, crossed):
        program = record(function, state)
        held, eager = state, state
        for _ in range(3):
            held, eager = program(held), function(eager)
            assert_same(held, eager)


def test_an_output_that_is_no_call() -> None:
    """Arguments, constants, numbers and views of all of them."""
    table = np.arange(6.0).reshape(2, 3)

    def step(x: Any) -> Any:
        fixed = namespace(x).asarray(table)
        y = x * 2.0
        return x, fixed, fixed[0], x[:, 1], y, y, ops.transpose(y), fixed * 2.0, "text", 3, None

    check(step, RNG.standard_normal((4, 3)))


def test_where_and_assign_do_not_write_over_what_they_read() -> None:
    def step(x: Any) -> Any:
        xp, a, b = namespace(x), x + 1.0, x - 1.0
        picked = xp.where(a > 1.0, b, a)
        y = picked * 1.0
        before = y + 0.0
        y[::2] = picked[1::2]
        return picked * 2.0 + b, before, y

    with small_blocks():
        check(step, RNG.standard_normal(40))


@pytest.mark.parametrize("dtype", ["bool", "int16", "float32", "int64", "float64", "complex64"])
@pytest.mark.parametrize("shapes", [((8, 9),) * 3, ((9,), (8, 1), (8, 9)), ((8, 9), (), (9,))])
def test_where_keeps_every_bit(dtype: str, shapes: Any) -> None:
    """Payloads of NaN, signed zeros and infinities, of arrays that are broadcast or strided."""
    rng = np.random.default_rng(0)
    masks, *sources = (rng.integers(0, 256, (*shape, 16), dtype=np.uint8) for shape in shapes)
    special = np.array([-0.0, np.inf, np.nan], dtype=np.float64).view(np.uint8)
    a, b = (np.where(s % 7 == 0, np.resize(special, s.shape), s) for s in sources)
    if dtype == "bool":
        a, b = a % 2, b % 2
    a, b = (x.view(dtype)[..., 1] for x in (a, b))  # not contiguous

    def step(mask: Any, a: Any, b: Any) -> Any:
        return namespace(mask).where(mask, a, b)

    mask = masks[..., 0] % 2 == 0
    program = record(step, mask, a, b)
    assert program(mask, a, b).tobytes() == np.where(mask, a, b).tobytes()
    assert program(~mask, a, b).tobytes() == np.where(~mask, a, b).tobytes()


def test_a_constant_is_not_written_to() -> None:
    """What an assignment starts from is made anew in every replay."""

    def step(x: Any) -> Any:
        xp = namespace(x)
        y = xp.zeros(x.shape, dtype=x.dtype)
        y[1:3] = x[1:3]
        return y * 1.0, xp.zeros(x.shape, dtype=x.dtype) + 1.0

    check(step, RNG.standard_normal(6))


def test_constants_are_quiet_too() -> None:
    """What depends on no argument is computed once, without NumPy's warnings."""
    program = record(lambda x: x + 1.0 / namespace(x).zeros(3), np.ones(3))
    assert program(np.ones(3)).tolist() == [math.inf] * 3


# --- whose memory ----------------------------------------------------------------------------


def mean_and_scale(state: Any, x: Any) -> Any:
    """A step with two outputs that replace inputs, and one that does not."""
    a = state["a"] * 0.5 + x
    return {"a": a, "b": state["b"] - a}, ops.sum(a)


def state_of(*shape: int) -> dict[str, np.ndarray]:
    return {"a": RNG.standard_normal(shape), "b": RNG.standard_normal(shape)}


def test_returned_arrays_pass_back_without_a_copy() -> None:
    """The results are in the memory of the arguments they replace."""
    x, state = RNG.standard_normal((5, 6)), state_of(5, 6)
    program = record(mean_and_scale, state, x)
    first, _ = program(frozen(state), frozen(x))
    with mock.patch.object(program.memory, "put", wraps=program.memory.put) as put:
        again, _ = program(first, frozen(x))
    assert put.call_count == 2  # x in, the sum out
    assert all(np.shares_memory(again[name], first[name]) for name in first)
    expected, _ = mean_and_scale(mean_and_scale(state, x)[0], x)
    assert_same(again, expected)
    assert sorted(program.plan.in_place.values()) == sorted(
        i for path, i in program.inputs.items() if path[0] == "state"
    )


def test_copy_out_gives_arrays_of_their_own() -> None:
    x, state = RNG.standard_normal((5, 6)), state_of(5, 6)
    program = record(mean_and_scale, state, x)
    found, total = program(state, x)
    mine = program.copy_out()
    kept = copied((found, total))
    assert_same((found, total), kept)
    assert_same(mine, kept)
    program(found, x + 1.0)
    assert not np.array_equal(found["a"], kept[0]["a"])
    assert_same(mine, kept)
    assert not any(program.memory.holds(y) for _, y in leaves(mine))


def test_copy_out_needs_a_call() -> None:
    with pytest.raises(Error, match="copy_out: the program has not been called yet"):
        record(mean_and_scale, state_of(2), np.ones(2)).copy_out()


def test_arrays_of_the_program_under_other_names() -> None:
    """Swapped, the same one twice, and views: each argument is read before one is written."""
    x, state = RNG.standard_normal((6, 6)), state_of(6, 6)
    program = record(mean_and_scale, state, x)
    changes: list[Callable[[Any], Any]] = [
        lambda s: {"a": s["b"], "b": s["a"]},
        lambda s: {"a": s["a"], "b": s["a"]},
        lambda s: {"a": s["b"].T, "b": s["b"][::-1]},
        lambda s: {"a": s["a"][:], "b": s["a"].reshape(6, 6)[:, ::-1]},
        lambda s: {"a": np.asarray(memoryview(s["b"])), "b": s["a"].view()},
    ]
    held, eager = state, state
    for change in (*changes, *changes):
        held, _ = program(change(held), x)
        eager, _ = mean_and_scale(change(eager), x)
        assert_same(held, eager)
    held, _ = program(held, held["b"].T)
    eager, _ = mean_and_scale(eager, eager["b"].T)
    assert_same(held, eager)


def test_arguments_are_copied_in_and_never_written() -> None:
    """Also arrays that cannot be written, of other strides, and the same array twice."""
    x = locked(np.arange(36.0).reshape(6, 6).T)
    state = {"a": x, "b": x}
    program = record(mean_and_scale, state, x)
    expected = mean_and_scale(state, x)
    for _ in range(3):
        found = program(state, x)
        assert_same(found, expected)
        assert not any(np.may_share_memory(y, x) for _, y in leaves(found))


def test_arguments_named_as_the_program_names_its_own() -> None:
    """`result` and `random` are ordinary names."""

    def step(result: Any, random: Any, stream: Any) -> Any:
        drawn = stream.uniform(result[0].shape)
        total = ops.sum(result[0] * random[0])
        return result[0] * total + drawn, random[0] + result[0][::-1], random[0][::-1] * total

    x, y = RNG.standard_normal(5), RNG.standard_normal(5)
    check(step, [x], [y], Random(3, "test"))


def test_writing_keeps_the_order_of_axes() -> None:
    def step(x: Any) -> Any:
        xp = namespace(x)
        y = xp.permute_dims(x, (2, 0, 1)) * 2.0
        y[0] = 1.0
        return y, xp.sum(y * 0.3, axis=1), xp.sum(y / 3.0)

    check(step, RNG.standard_normal((5, 6, 7)).astype("float32"))


def test_a_chain_is_not_parted_from_one_that_writes_over_what_it_reads() -> None:
    """x lands in the memory of w, which the call before it reads."""

    def step(w: Any, x: Any) -> Any:
        with phase("update"):
            y = x * -1.0
            z = -w
            return {"w": -y, "z": z}

    big = [RNG.standard_normal(plan.LARGE) for _ in range(2)]
    check(lambda args: step(args["w"], args["x"]), {"w": big[0], "x": big[1]})


def test_an_argument_named_result() -> None:
    """It has other memory than the results, also where these are views of arrays of its form."""

    def step(result: Any) -> Any:
        y = result[0] * 2.0
        z = result[0] + 1.0
        return y[0], z[0]

    check(step, [RNG.standard_normal((3, 4))])


def test_indices_from_the_end() -> None:
    check(lambda x, i: namespace(x).take(x, i, axis=0), RNG.standard_normal((5, 2)),
          np.array([-1, 0, -5, 4]))  # fmt: skip


def test_programs_of_one_memory_have_one_scratch() -> None:
    """The smaller one moves into the memory that the larger one has taken."""
    memory = Memory()
    step = lambda x: ops.sum(ops.matmul(ops.tanh(x), x))  # noqa: E731
    sizes = [RNG.standard_normal((n, n)) for n in (40, 80)]
    small, large = (record(step, x, memory=memory) for x in sizes)
    for _ in range(2):
        assert small(sizes[0]) == step(sizes[0])
        assert large(sizes[1]) == step(sizes[1])
    small(sizes[0])
    assert small._bound is not None
    assert small._bound.scratch is memory.scratch


@pytest.mark.parametrize("order", [(8, 16), (16, 8)])
def test_two_programs_in_one_memory(order: tuple[int, int]) -> None:
    """The last batch of an epoch is shorter: two programs train the same parameters in turn."""
    model, optimizer = SMALL, OPTIMIZERS["adam"]
    step, memory = make_step(model, optimizer), Memory()
    held = eager = start(model, optimizer, "float32")
    programs = {
        n: record(step, *eager, *batch(model, n, "float32", 0), 0.1, memory=memory) for n in order
    }
    homes = 0
    for i in range(20):
        n = order[i // 2 % 2]
        x, y = batch(model, n, "float32", i)
        *eager, loss = step(*eager, x, y, 0.01)
        *held, found = programs[n](*held, x, y, 0.01)
        assert_same((held, found), (eager, loss))
        if i == 4:
            homes = memory.nbytes
    assert memory.nbytes == homes
    assert programs[8].memory is programs[16].memory is memory


# --- refusals --------------------------------------------------------------------------------

X = np.ones((2, 3))
HELD = np.arange(3.0)
other_recording: list[Any] = []


def mixed(x: Any) -> Any:
    return x + other_recording[0]


def write_view(x: Any) -> Any:
    y = x * 2.0
    row = y[0]
    row[...] = 1.0
    return y


def write_viewed(x: Any) -> Any:
    y = x * 2.0
    row = y[0]
    y[0] = 1.0
    return row


def write_argument(x: Any) -> Any:
    x[0] = 1.0
    return x


def add_to_argument(x: Any) -> Any:
    x += 1.0
    return x


LOOKS = r"the step looks at the value of a float64\[.*\] array on the host \({}\) while it is rec"
UNRECORDED: dict[str, tuple[Callable[..., Any], str]] = {
    "float": (lambda x: x * float(ops.sum(x)), LOOKS.format(r"float\(\)")),
    "if": (lambda x: x if ops.sum(x) > 0 else -x, "array on the host .if, while, and, or."),
    "not": (lambda x: not ops.sum(x), LOOKS.format("if, while, and, or")),
    "and": (lambda x: (x > 1) and x, "a bool.2, 3. array on the host .if, while, and, or."),
    "int": (lambda x: x * int(ops.sum(x)), LOOKS.format(r"int\(\)")),
    "complex": (lambda x: complex(x[0, 0]), LOOKS.format(r"complex\(\)")),
    "index": (lambda x: HELD[ops.sum(x)], LOOKS.format(r"array\(\)")),
    "range": (lambda x: range(x[0, 0]), LOOKS.format(r"index\(\)")),
    "item": (lambda x: x * x[0, 0].item(), LOOKS.format(r"item\(\)")),
    "tolist": (lambda x: x.tolist(), LOOKS.format(r"tolist\(\)")),
    "asarray": (lambda x: np.asarray(x), LOOKS.format(r"array\(\)")),
    "sum": (lambda x: np.sum(np.array(x)), LOOKS.format(r"array\(\)")),
    "in": (lambda x: 1.0 in x, "array on the host .if, while, and, or."),
    "numpy.mean": (lambda x: np.mean(x), r"test_program.py:\d+: numpy.mean cannot be recorded"),
    "numpy.sinh": (lambda x: np.sinh(x), r"test_program.py:\d+: numpy.sinh cannot be recorded so"),
    "numpy.add.reduce": (lambda x: np.add.reduce(x), "numpy.add cannot be recorded so"),
    "method": (lambda x: x.sum(), r"test_program.py:\d+: a recorded array has no .sum; with"),
    "index array": (lambda x: x[[0, 1]], r"test_program.py:\d+: basic indices .* got list; use t"),
    "closure": (
        lambda x: x * HELD,
        r"uses a float64\[3\] array that is not among its arguments; pass it as one",
    ),
    "closure first": (lambda x: HELD * x, r"uses a float64\[3\] array that is not among its arg"),
    "closure in a primitive": (
        lambda x: ops.multiply(x, HELD), r"ops/arithmetic.py:\d+: the step uses a float64\[3\]"
    ),
    "another recording": (mixed, "an array of another recording"),
    "unknown function": (
        lambda x: namespace(x).linalg.norm(x), "linalg cannot be recorded; a step computes with"
    ),
    "cumsum": (lambda x: namespace(x).cumsum(x), "cumsum cannot be recorded; a step computes with"),
    "keyword": (
        lambda x: namespace(x).clip(x, min=x), "clip: give arrays by position, not by keyword"
    ),
    "shapes": (lambda x: x + x[:, :2], r"add\(\(2, 3\), \(2, 2\)\): .*broadcast"),
    "product": (lambda x: x @ x, r"matmul\(\(2, 3\), \(2, 3\)\): expected \(..., M, K\)"),
    "axis": (lambda x: namespace(x).sum(x, axis=2), r"sum\(\(2, 3\)\): axis 2 is out of bounds"),
    "condition": (
        lambda x: namespace(x).where(x, x, x), "where.*: expected a boolean condition; got float64"
    ),
    "concat": (lambda x: namespace(x).concat((x, x[:, :2])), "concat.*: the shapes differ on"),
    "take": (
        lambda x: namespace(x).take(x, namespace(x).arange(2)), "take.*: take needs an axis if"
    ),
    "norm of integers": (
        lambda x: norm(namespace(x).astype(x, "int64")), "norm.*expected a real floating-point"
    ),
    "assigned shape": (
        lambda x: (x * 1.0).__setitem__(0, x), r"assign\(\(2, 3\), \(0, Ellipsis\), \(2, 3\)\): "
    ),
    "write to a view": (write_view, "writes into memory that a view shows; only an array that it"),
    "write under a view": (write_viewed, "writes into memory that a view shows; only an array"),
    "write to an argument": (write_argument, "the step writes into an argument; only an array"),
    "add to an argument": (add_to_argument, "the step writes into an argument; only an array"),
}  # fmt: skip


def line_of(step: Callable[..., Any]) -> tuple[int, int]:
    """The first and last line of a step."""
    lines = [n for *_, n in step.__code__.co_lines() if n]
    return min(lines), max(lines)


@pytest.mark.parametrize("name", UNRECORDED)
def test_what_cannot_be_recorded(name: str) -> None:
    """The message says what, and which line of the step asked for it."""
    step, message = UNRECORDED[name]
    record(lambda x: other_recording.append(x) or x, X)
    with pytest.raises(Error, match=message) as raised:
        record(step, X)
    if name != "closure in a primitive":
        first, last = line_of(step)
        file, line = str(raised.value).split(": ")[0].split(":")
        assert file == HERE
        assert first <= int(line) <= last


@pytest.mark.parametrize("index", [True, [0, 1], np.array([0]), X > 0, np.int64(1)], ids=str)
def test_index_arrays_are_refused(index: Any) -> None:
    with pytest.raises(Error, match=r"(?s)basic indices only .* recorded; got .*use take"):
        record(lambda x: x[index], X)


def test_allowed_in_a_step() -> None:
    """Iteration, host constants through asarray, NumPy numbers, len, dtypes and operators."""

    def step(x: Any) -> Any:
        xp = namespace(x)
        a, b = x
        rows = [row * 2.0 for row in x]
        fixed = xp.asarray(HELD, dtype=x.dtype)
        assert (len(x), x.ndim, x.size, x.shape, x.dtype) == (2, 2, 6, (2, 3), np.float32)
        assert xp.isdtype(x.dtype, "real floating")
        y = np.float32(2.0) * x + fixed - len(x) * np.pi
        return a + b, rows, y, 2.0**x, x % 0.3, x // 0.3, 1 / (x + 3), abs(x), y @ xp.asarray(
            np.ones((3, 1), "float32")), xp.full((2,), x[0, 0]), xp.finfo(x.dtype).max  # fmt: skip

    check(step, RNG.standard_normal((2, 3)).astype("float32"))


def test_functions_of_numpy() -> None:
    """Called by their own names, as a step for NumPy alone has them."""

    def step(x: Any, lr: float) -> Any:
        y = np.exp(x) + np.float32(2.0) * np.abs(x) - np.multiply(lr, x)
        return np.where(y > 1.0, y, x), np.sum(y, axis=0), np.concat((x, y)), np.invert(x > 0)

    check(step, RNG.standard_normal((2, 3)).astype("float32"), 0.3)


KEPT_SETTINGS: dict[str, Callable[[Any, Any], Any]] = {
    "clip": lambda xp, x: xp.clip(x, min=-0.5, max=0.25),
    "clip below": lambda xp, x: xp.clip(x, min=-0.5),
    "clip above": lambda xp, x: xp.clip(x, max=0.25),
    "clip by position": lambda xp, x: xp.clip(x, -0.5, 0.25),
    "round": lambda xp, x: xp.round(x),
    "round to decimals": lambda xp, x: xp.round(x, decimals=1),
    "round by position": lambda xp, x: xp.round(x, 1),
}


@pytest.mark.parametrize("size", [9, plan.LARGE])
@pytest.mark.parametrize("name", KEPT_SETTINGS)
def test_settings_of_elementwise_calls_are_kept(name: str, size: int) -> None:
    """Given by keyword or by position, alone or in a chain."""
    x = Random(0, "settings").normal(size)
    step = lambda x: KEPT_SETTINGS[name](namespace(x), x * 2.0) + 1.0  # noqa: E731
    assert_same(record(step, x)(x), step(x))


def test_numbers_written_into_integers_are_cut() -> None:
    """As NumPy does, whose copyto would refuse them."""

    def step(n: Any) -> Any:
        made = namespace(n).zeros(4, dtype=n.dtype)
        made[1:] = n * 1.5
        made[0] = 2.75
        return made

    n = np.arange(3)
    assert_same(record(step, n)(n), step(n))


def test_iteration_over_a_closed_array_keeps_a_copy() -> None:
    """A constant is what the host array was when the step was recorded."""
    table = np.arange(3.0)
    program = record(lambda x: x + namespace(x).asarray(table), np.ones(3))
    table += 100.0
    assert program(np.ones(3)).tolist() == [1.0, 2.0, 3.0]


def test_adding_in_place() -> None:
    """`y += x` writes into y, whoever else has it, and keeps its dtype."""

    def step(x: Any) -> Any:
        y = x * 1.0
        same = y
        y += namespace(x).astype(x, "float64") * math.pi
        y *= 2.0
        return y, same, same + 1.0

    check(step, RNG.standard_normal(6).astype("float32"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_float_takes_the_dtype_of_the_arrays_it_meets(dtype: str) -> None:
    """A learning rate is a Python float in the eager step, and does not promote arrays."""

    def step(w: Any, n: Any, lr: float) -> Any:
        xp = namespace(w)
        half = -(lr * 0.5) + abs(lr)
        strong = xp.asarray(lr, dtype=xp.float64)
        return (w - lr * w, half * w, w * (1.0 - lr * half), xp.where(w > lr, lr, w), n * lr,
                xp.maximum(w, lr), strong * w, strong * lr, xp.sum(w) * lr)  # fmt: skip

    args = RNG.standard_normal((3, 4)).astype(dtype), np.arange(4), 0.1
    program = record(step, *args)
    for lr in (0.1, 1e-7, 3.0):
        assert_same(program(*args[:2], lr), step(*args[:2], lr))


def fit(params: Any, x: Any, lr: float, depth: int, name: str) -> Any:
    return {k: w * lr + x for k, w in params.items()}, depth, name


CALLS: dict[str, tuple[Callable[[], tuple[Any, ...]], str]] = {
    "shape": (lambda: ({"w": X[:1]}, X, 0.1, 3, "n"),
              r"params/w: recorded as float64\[2, 3\]; got float64\[1, 3\]; a program serves one"),
    "dtype": (lambda: ({"w": X.astype("float32")}, X, 0.1, 3, "n"),
              r"params/w: recorded as float64\[2, 3\]; got float32\[2, 3\]"),
    "order of bytes": (lambda: ({"w": X}, X.astype(">f8"), 0.1, 3, "n"), "x: recorded as float64"),
    "number for an array": (lambda: ({"w": 1.0}, X, 0.1, 3, "n"), r"params/w: .*; got 1.0"),
    "array for a number": (lambda: ({"w": X}, X, X, 3, "n"), r"lr: recorded as float64\[\]; got f"),
    "None": (lambda: ({"w": X}, None, 0.1, 3, "n"), r"x: recorded as float64\[2, 3\]; got None"),
    "int for a float": (lambda: ({"w": X}, X, 1, 3, "n"), r"lr: recorded as float64\[\]; got 1;"),
    "bool for a float": (lambda: ({"w": X}, X, True, 3, "n"), r"lr: recorded as .*; got True;"),
    "missing": (lambda: ({}, X, 0.1, 3, "n"), "differ from those recorded in: params/w"),
    "extra": (lambda: ({"w": X, "v": X}, X, 0.1, 3, "n"), "from those recorded in: params/v"),
    "renamed": (lambda: ({"v": X}, X, 0.1, 3, "n"), "recorded in: params/v, params/w"),
    "list for array": (lambda: ({"w": X}, [X], 0.1, 3, "n"), "recorded in: x, x/0"),
    "too few": (lambda: ({"w": X}, X, 0.1, 3),
                r"takes 5 arguments \(params, x, lr, depth, name\); got 4"),
    "too many": (lambda: ({"w": X}, X, 0.1, 3, "n", 1), "takes 5 arguments .*; got 6"),
    "fixed": (lambda: ({"w": X}, X, 0.1, 4, "n"),
              "depth: recorded with 3, which is part of the program; got 4; record the step again"),
    "fixed type": (lambda: ({"w": X}, X, 0.1, 3.0, "n"), "depth: recorded with 3, .*got 3.0"),
    "fixed text": (lambda: ({"w": X}, X, 0.1, 3, "m"), "name: recorded with 'n', .*got 'm'"),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_calls_that_do_not_fit(name: str) -> None:
    """Refused before anything is written."""
    make, message = CALLS[name]
    good = ({"w": X}, X, 0.1, 3, "n")
    program = record(fit, *good)
    kept = copied(program(*good))
    with pytest.raises(Error, match=message):
        program(*make())
    assert_same(program.copy_out(), kept)
    assert_same(program(*good), fit(*good))


# --- random numbers --------------------------------------------------------------------------


def dropout(x: Any, random: Any) -> Any:
    mask = random.of("dropout").bernoulli(x.shape, 0.7)
    noise = random.of("noise").at(4).normal(x.shape, scale=0.5)
    order = random.permutation(x.shape[0])
    xp = namespace(mask, x)
    kept = xp.where(mask, x / 0.7, xp.zeros((), dtype=x.dtype)) + noise
    return ops.gather(kept, order) * random.uniform(3, low=-1.0), random.words(2)


def test_every_draw_is_an_input() -> None:
    """Another seed, purpose or step is the same program; of equal draws, each has its memory."""

    def step(x: Any, random: Any) -> Any:
        if isinstance(random, Random):  # a drawn host array beside a recorded x
            return dropout(x, random)
        return dropout(x, random)

    x = RNG.standard_normal((5, 3))
    program = record(step, x, Random(0, "train"))
    streams = [Random(0, "train", 1), Random(0, "train", 2), Random(9, "other"), Random(0, "train")]
    results = [copied(program(x, stream)) for stream in streams]
    for found, stream in zip(results, streams, strict=True):
        assert_same(found, step(x, stream))
    assert not np.array_equal(results[0][0], results[1][0])
    assert len(program.draws) == 5


def test_results_of_another_kind_are_refused() -> None:
    kept: list[Any] = []
    record(lambda x: kept.append(x) or x, X)
    with pytest.raises(Error, match=r"returns an array of another recording \(1\)"):
        record(lambda x: (x, kept[0]), X)
    with pytest.raises(Error, match=r"returns a Tensor \(loss\); return its .value"):
        record(lambda x: {"loss": ops.sum(Tensor(x), axis=None) * Tensor(x)}, X)


def test_a_stream_cannot_be_read() -> None:
    for look in ("step", "seed", "purpose", "choice"):
        with pytest.raises(Error, match=rf"{HERE}:\d+: {look} of a random stream differs from"):
            record(lambda random, look=look: getattr(random, look), Random(0, "a"))


# --- no allocation ---------------------------------------------------------------------------

FIXED = 300_000  # bytes that a replay may allocate, whatever the size


def peak(program: Any, args: tuple[Any, ...]) -> int:
    """Bytes at the highest point of a replay, above what was there before."""
    for _ in range(2):
        program(*args)
    tracemalloc.start()
    try:
        tracemalloc.reset_peak()
        before, _ = tracemalloc.get_traced_memory()
        program(*args)
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("width", [300, 600])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_training_step_allocates_nothing(name: str, width: int) -> None:
    model = MLP(depth=3, width=width, inputs=width, outputs=10, bias=True)
    step, optimizer = make_step(model, OPTIMIZERS[name]), OPTIMIZERS[name]
    args = (*start(model, optimizer, "float64"), *batch(model, width, "float64", 0), 0.01)
    assert width * width * 8 > FIXED
    assert peak(record(step, *args), args) < FIXED


def selecting(x: Any) -> Any:
    xp, turned = namespace(x), ops.transpose(x)
    y = xp.where(x > 0, x, 0.5) + xp.take(x, xp.asarray(np.arange(x.shape[0])[::-1]), axis=0)
    y[1:3] = x[:2]
    both = xp.concat((turned, y), axis=1)
    return (ops.softmax(both), ops.var(y, axis=0), ops.clip(x, low=-1.0), ops.pad(x, widths=((1, 1),
            (0, 2))), ops.log_softmax(turned * 2.0, axis=0), xp.stack((x, y)), norm(turned),
            ops.gelu(x), xp.argmax(x, axis=-1), xp.astype(xp.astype(x, "float32"), "int64"),
            xp.sort(x), ops.mean(x, axis=1), xp.all(x > 0, axis=0))  # fmt: skip


@pytest.mark.parametrize("width", [300, 600])
def test_other_calls_allocate_nothing(width: int) -> None:
    args = (RNG.standard_normal((width, width)),)
    assert peak(check(selecting, *args), args) < FIXED


def test_an_array_and_its_view_in_one_call_allocate_nothing() -> None:
    """In place NumPy would have to copy one of them; the result goes elsewhere instead."""

    def step(state: Any) -> Any:
        x = state["a"]
        product, turned = x @ x, ops.transpose(x) * 2.0
        even = product + ops.transpose(product)
        mixed = (turned + x) @ x
        return {"even": even @ x, "mixed": mixed, "a": x + ops.transpose(x)}

    state = {"a": RNG.standard_normal((300, 300))}
    assert peak(check(step, state), (state,)) < FIXED


# --- size ------------------------------------------------------------------------------------


def counts(depth: int) -> tuple[int, int, int]:
    """Calls, groups and operations of a perceptron step; the replay is the eager step."""
    model = MLP(depth=depth, width=3, inputs=3, outputs=3)
    step = make_step(model, OPTIMIZERS["sgd"])
    params, state = start(model, OPTIMIZERS["sgd"], "float32")
    x, y = batch(model, 2, "float32", 0)
    program = record(step, params, state, x, y, 0.01)
    with quiet():
        assert_same(program(params, state, x, y, 0.01), step(params, state, x, y, 0.01))
    return len(program.calls), len(program.plan.groups), len(program._bound.operations)


def test_a_thousand_layers() -> None:
    """Everything grows by the same number with every layer."""
    quarter, half, whole = (np.array(counts(depth)) for depth in (250, 500, 1000))
    assert (whole - half == 2 * (half - quarter)).all()


@pytest.mark.parametrize("name", ["fromage", "sgd momentum", "adam"])
def test_gradients_do_not_live_at_once(name: str) -> None:
    """With the depth, scratch memory grows by the activations; of gradients a few are alive."""
    width, n, optimizer = 64, 8, OPTIMIZERS[name]

    def scratch(depth: int) -> int:
        model = MLP(depth=depth, width=width, inputs=width, outputs=width)
        args = (*start(model, optimizer, "float32"), *batch(model, n, "float32", 0), 0.01)
        return int(record(make_step(model, optimizer), *args).plan.scratch_bytes)

    activation, gradient = n * width * 4, width * width * 4
    shallow, deep = scratch(10), scratch(20)
    small = 2 * layout.ALIGNMENT  # scalars
    assert deep - shallow <= 10 * (activation + small)
    assert deep <= 20 * (activation + small) + 3 * gradient


# --- phases, names, lines --------------------------------------------------------------------


def test_phases_and_names() -> None:
    model, optimizer = MLP(depth=2, width=3, inputs=3, outputs=3), OPTIMIZERS["fromage"]
    step = make_step(model, optimizer)

    def measured(params: Any, state: Any, x: Any, y: Any, lr: float) -> Any:
        after, state, loss = step(params, state, x, y, lr)
        with phase("measure"):
            size = norm(label(after["layers/00/weight"] - params["layers/00/weight"], "change"))
        return after, state, loss, size

    args = (*start(model, optimizer, "float32"), *batch(model, 4, "float32", 0), 0.01)
    program = record(measured, *args)
    phases = [call.phase for call in program.calls]
    assert [p for p, _ in itertools.groupby(phases)] == ["forward", "backward", "update", "measure"]
    assert [c.function for c in program.calls if c.phase == "forward"].count("matmul") == 2
    assert [c.function for c in program.calls if c.phase == "backward"].count("matmul") == 4 - 1
    assert {c.function for c in program.calls if c.phase == "update"} >= {"norm", "sqrt", "divide"}

    names = {v.name for v in program.values}
    assert names >= {
        *("layers/00/weight", "layers/01/weight", "state/step", "x", "y", "lr"),
        *("layers/00/linear", "layers/00/output", "layers/01/linear"),
        *("d layers/00/weight", "d layers/01/weight", "d layers/00/output", "change"),
    }
    gradient = next(c for c in program.calls
                    if program.values[c.result].name == "d layers/01/weight")  # fmt: skip
    assert (gradient.function, gradient.phase) == ("matmul", "backward")
    assert gradient.source.startswith("npdrt/ops/linear.py:")


def source_lines(path: str) -> list[str]:
    root = Path(__file__).parents[1]
    return (root / path).read_text(encoding="utf-8").splitlines()


def test_sources_name_the_line_that_asked() -> None:
    model, optimizer = MLP(depth=2, width=3, inputs=3, outputs=3), OPTIMIZERS["adam"]
    args = (*start(model, optimizer, "float32"), *batch(model, 4, "float32", 0), 0.01)
    program = record(make_step(model, optimizer), *args)
    sources = {call.source.rpartition(":")[0] for call in program.calls}
    assert sources <= {
        *("npdrt/ops/linear.py", "npdrt/ops/activation.py", "npdrt/ops/loss.py"),
        *("npdrt/ops/reduction.py", "npdrt/optim/adam.py", "npdrt/autodiff.py"),
        HERE,  # the sharing of the optimizer is the step's affair
    }
    for call in program.calls:
        file, _, line = call.source.rpartition(":")
        if file == HERE:
            continue
        text = source_lines(file)[int(line) - 1]
        if call.function in ("matmul", "sqrt", "exp", "log"):
            asked = {"matmul": "product(", "sqrt": "xp.sqrt("}
            assert asked.get(call.function, f"compute.{call.function}(") in text


def test_a_line_of_the_step_itself() -> None:
    def step(x: Any) -> Any:
        y = x * 2.0
        return namespace(y).exp(y)

    first, last = line_of(step)
    assert [c.source for c in record(step, X).calls] == [f"{HERE}:{last - 1}", f"{HERE}:{last}"]
    assert first < last


# --- threads ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fromage bounded", "lars decay", "adam"])
def test_an_update_does_not_depend_on_threads(name: str) -> None:
    optimizer, source = OPTIMIZERS[name], np.random.default_rng(5)
    params = {"w": source.standard_normal((300, 257)).astype("float32"), "b": np.ones(5, "float32")}
    grads = {k: source.standard_normal(w.shape).astype("float32") for k, w in params.items()}
    args = (params, grads, optimizer.init(params))
    results = []
    for threads in (1, 2):
        with threadpoolctl.threadpool_limits(threads):
            results.append(copied(record(optimizer.update, *args)(*args)))
    assert_same(results[0], results[1])
    assert_same(results[0], optimizer.update(*args))


def test_a_norm_asked_for_twice_is_taken_once() -> None:
    """A trace measures the norms that Fromage's update has taken already."""

    def step(x: Any, y: Any) -> Any:
        return optim.norm(x) + optim.norm(y), optim.norm(x) * 2.0

    given = (np.arange(6.0).reshape(2, 3), np.ones(4))
    program = record(step, *given)
    assert [call.function for call in program.calls].count("norm") == 2
    for found, expected in zip(program(*given), step(*given), strict=True):
        assert found.tobytes() == expected.tobytes()
