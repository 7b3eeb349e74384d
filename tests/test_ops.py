"""Every property of an operation on every line of the table in primitives.py; kinks, large numbers
and errors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any
from unittest.mock import MagicMock

import autograd
import autograd.numpy as anp
import backends
import mpmath
import numpy as np
import pytest
from backends import Backend
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from primitives import (
    BROADCASTING,
    CASES,
    ELEMENTWISE,
    SCALAR_SETTINGS,
    Case,
    is_float,
    normal,
    torch,
)

from npdrt import arrays, ops
from npdrt.autodiff import PRIMITIVES, Tensor, backward, undo_broadcast
from npdrt.errors import Error
from npdrt.ops.shape import scatter_add

needs_torch = pytest.mark.skipif(isinstance(torch, MagicMock), reason="PyTorch is not installed")
DTYPES = ("float32", "float64")
every_case = pytest.mark.parametrize("row", CASES, ids=str)


def test_every_operation_has_a_case() -> None:
    tested = {row.operation for row in CASES}
    assert set(PRIMITIVES) <= tested
    assert set(ops.__all__) == tested


# --- comparison ------------------------------------------------------------------------------


def error(ours: Any, reference: Any) -> float:
    """max|difference| / max|reference|; the plain difference where the reference is 0."""
    ours, reference = np.asarray(ours), np.asarray(reference)
    assert ours.shape == reference.shape
    difference = np.max(np.abs(ours - reference), initial=0.0)
    scale = np.max(np.abs(reference), initial=0.0)
    return float(difference / scale if scale else difference)


def values(row: Case, dtype: str = "float64") -> list[Any]:
    """The arguments, floats in `dtype`, locked against writing."""
    converted = [a.astype(dtype) if is_float(a) else a for a in row.arguments]
    for a in converted:
        if isinstance(a, np.ndarray):
            a.flags.writeable = False
    return converted


def as_tensors(row: Case, args: list[Any]) -> list[Any]:
    wanted = row.differentiated()
    return [Tensor(a) if i in wanted else a for i, a in enumerate(args)]


def gradients(row: Case, args: list[Any], cotangent: Any) -> list[Any]:
    """The cotangents of the differentiated arguments."""
    tensors = as_tensors(row, args)
    found = backward(row.call(*tensors), cotangent)
    return [found[id(t)] for t in tensors if isinstance(t, Tensor)]


def cotangent_of(value: Any) -> np.ndarray:
    """A cotangent without symmetry, of the shape and dtype of `value`."""
    n = np.arange(math.prod(value.shape)).reshape(value.shape)
    return (np.cos(n + 0.3) + 0.1 * np.sin(7 * n)).astype(value.dtype)


def shifted(row: Case, position: int, index: tuple[int, ...], step: complex) -> Any:
    """The weighted value with one coordinate of one argument moved by `step`."""
    args = values(row)
    args[position] = args[position].astype(type(step))
    args[position][index] += step
    with arrays.quiet():
        value = row.call(*args)
    return np.sum(value * cotangent_of(value.real))


def difference_quotients(row: Case, quotient: Callable[..., float]) -> list[np.ndarray]:
    return [
        np.array([quotient(i, index) for index in np.ndindex(row.arguments[i].shape)]).reshape(
            row.arguments[i].shape
        )
        for i in row.differentiated()
    ]


def worst(ours: list[Any], reference: list[Any]) -> float:
    return max(error(a, b) for a, b in zip(ours, reference, strict=True))


# --- every property of every row -------------------------------------------------------------


@every_case
def test_value(row: Case) -> None:
    args = values(row)
    assert error(row.call(*args), row.reference(*args)) <= 1e-14


@pytest.mark.parametrize("row", [row for row in CASES if row.analytic()], ids=str)
def test_gradient_against_complex_step(row: Case) -> None:
    args = values(row)
    ours = gradients(row, args, cotangent_of(row.call(*args)))
    step = 1e-30
    exact = difference_quotients(row, lambda i, at: shifted(row, i, at, step * 1j).imag / step)
    assert worst(ours, exact) <= 1e-12


@every_case
def test_gradient_against_central_differences(row: Case) -> None:
    args, h = values(row), 1e-5
    ours = gradients(row, args, cotangent_of(row.call(*args)))
    rough = difference_quotients(
        row, lambda i, at: (shifted(row, i, at, h) - shifted(row, i, at, -h)) / (2 * h)
    )
    assert worst(ours, rough) <= 1e-7


def torch_gradients(row: Case, args: list[Any], cotangent: np.ndarray) -> tuple[Any, list[Any]]:
    tensors = [torch.tensor(a) if isinstance(a, np.ndarray) else a for a in args]
    wanted = [tensors[i].requires_grad_() for i in row.differentiated()]
    value = row.torch(*tensors)
    if not value.requires_grad:  # PyTorch knows that x**0 does not depend on x
        return value.numpy(), [np.zeros(t.shape) for t in wanted]
    found = torch.autograd.grad(value, wanted, torch.tensor(cotangent))
    return value.detach().numpy(), [g.numpy() for g in found]


@needs_torch
@every_case
def test_value_and_gradient_against_torch(row: Case) -> None:
    args = values(row)
    cotangent = cotangent_of(row.call(*args))
    value, theirs = torch_gradients(row, args, cotangent)
    assert error(row.call(*args), value) <= 1e-12
    assert worst(gradients(row, args, cotangent), theirs) <= 1e-9


@every_case
@pytest.mark.parametrize("dtype", DTYPES)
def test_on_every_backend(row: Case, dtype: str, backend: Backend) -> None:
    """Same values and cotangents as NumPy, in the dtype of the arguments, nothing written to,
    nothing fetched to the host."""
    host = values(row, dtype)
    value = row.call(*host)
    cotangent = cotangent_of(value)
    expected = [value, *gradients(row, host, cotangent)]

    args = [backend.asarray(a) if isinstance(a, np.ndarray) else a for a in host]
    g = backend.asarray(cotangent)
    waits = backends.synchronisations
    found = [row.call(*args), *gradients(row, args, g)]
    assert backends.synchronisations == waits
    for ours, theirs in zip(found, expected, strict=True):
        assert arrays.namespace(ours) is backend.xp
        assert_same(backend, ours, theirs, dtype)
    for before, after in zip([*host, cotangent], [*args, g], strict=True):
        if isinstance(before, np.ndarray):
            assert np.array_equal(backend.to_host(after), before)


def assert_same(backend: Backend, ours: Any, expected: Any, dtype: str) -> None:
    host = backend.to_host(ours)
    assert host.dtype == expected.dtype == dtype
    if backend.exact:
        assert np.array_equal(host, expected)
    else:
        assert error(host, expected) <= {"float32": 1e-5, "float64": 1e-13}[dtype]


@every_case
@pytest.mark.parametrize("dtype", DTYPES)
def test_rules_keep_shape_and_dtype(row: Case, dtype: str) -> None:
    """What a rule returns, before the walker sums it back: right dtype, broadcastable shape."""
    value = row.call(*as_tensors(row, values(row, dtype)))
    assert value.dtype == dtype
    for argument, vjp in value.edges:
        part = vjp(cotangent_of(value.value))
        assert part.dtype == dtype
        assert undo_broadcast(part, argument.shape).shape == argument.shape


@every_case
def test_float32_agrees_with_float64(row: Case) -> None:
    single = values(row, "float32")
    double = [a.astype("float64") if is_float(a) else a for a in single]
    cotangent = cotangent_of(row.call(*single))
    assert error(row.call(*single), row.call(*double)) <= 2e-6
    ours = gradients(row, single, cotangent)
    assert worst(ours, gradients(row, double, cotangent.astype("float64"))) <= 3e-6


# --- broadcasting, drawn ---------------------------------------------------------------------


@needs_torch
@pytest.mark.parametrize("row", BROADCASTING, ids=lambda row: row.operation)
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_broadcasting(row: Case, data: st.DataObject) -> None:
    n = len(row.arguments)
    drawn = data.draw(
        hnp.mutually_broadcastable_shapes(num_shapes=n, min_side=0, max_side=3, max_dims=4)
    )
    source = np.random.default_rng(data.draw(st.integers(0, 99)))
    args = [
        np.asarray((source.permutation(math.prod(s)).reshape(s) + 0.3 * i + 0.5) / 8)
        for i, s in enumerate(drawn.input_shapes)
    ]  # positive, no ties
    if row.operation == "where":
        args[0] = np.asarray(args[0] > 1)
    drawn_row = Case(row.operation, row.reference, row.torch, tuple(args))
    value = row.call(*args)
    assert np.shape(value) == drawn.result_shape
    assert error(value, row.reference(*args)) <= 1e-14
    cotangent = cotangent_of(np.asarray(value))
    _, theirs = torch_gradients(drawn_row, args, cotangent)
    assert worst(gradients(drawn_row, args, cotangent), theirs) <= 1e-12


# --- odd shapes ------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (1,), (0,), (2, 0, 3), (1, 1)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("row", [*ELEMENTWISE, *SCALAR_SETTINGS, *BROADCASTING], ids=str)
def test_elementwise_at_odd_shapes(row: Case, dtype: str, shape: Any, backend: Backend) -> None:
    host = [np.full(shape, a.ravel()[0], a.dtype) if isinstance(a, np.ndarray) else a
            for a in values(row, dtype)]  # fmt: skip
    args = [backend.asarray(a) if isinstance(a, np.ndarray) else a for a in host]
    value = row.call(*as_tensors(row, args)).value
    assert tuple(value.shape) == shape
    assert error(backend.to_host(value), row.reference(*host)) <= 1e-6
    for g in gradients(row, args, backend.asarray(np.ones(shape, dtype))):
        assert tuple(g.shape) == shape
        assert g.dtype == value.dtype


@pytest.mark.parametrize(
    ("call", "shapes", "expected"),
    [
        (ops.sum, [(0, 3)], np.zeros(())),
        (lambda x: ops.sum(x, axis=0), [(0, 3)], np.zeros(3)),
        (lambda x: ops.mean(x, axis=0), [(2, 0)], np.zeros(0)),
        (lambda x: ops.max(x, axis=-1), [(0, 3)], np.zeros(0)),
        (lambda x: ops.logsumexp(x, axis=1, keepdims=True), [(0, 3)], np.zeros((0, 1))),
        (lambda x: ops.softmax(x), [(0, 3)], np.zeros((0, 3))),
        (lambda x: ops.log_softmax(x, axis=0), [(2, 0)], np.zeros((2, 0))),
        (ops.matmul, [(2, 0), (0, 3)], np.zeros((2, 3))),
        (ops.matmul, [(0, 4), (4, 3)], np.zeros((0, 3))),
        (ops.linear, [(0, 4), (3, 4), (3,)], np.zeros((0, 3))),
        (ops.linear, [(0, 2, 4), (3, 4), (3,)], np.zeros((0, 2, 3))),
        (ops.concat, [(0, 3), (0, 3)], np.zeros((0, 3))),
        (lambda x: ops.pad(x, widths=((1, 1),)), [(0,)], np.zeros(2)),
        (lambda x: ops.pad(x, widths=()), [()], np.zeros(())),
        (lambda x: ops.getitem(x, index=slice(3, 3)), [(4, 2)], np.zeros((0, 2))),
        (lambda x: ops.transpose(x), [()], np.zeros(())),
        (ops.sum, [()], np.zeros(())),
        (lambda x: ops.max(x, keepdims=True), [()], np.zeros(())),
        (ops.logsumexp, [()], np.zeros(())),
        (ops.squared_error, [(), ()], np.zeros(())),
        (lambda x: ops.hinge(x + 1.0, np.ones(())), [()], np.zeros(())),
    ],
)
def test_empty_and_scalar_arrays(call: Any, shapes: list[Any], expected: Any) -> None:
    tensors = [Tensor(np.zeros(shape)) for shape in shapes]
    y = call(*tensors)
    assert np.array_equal(y.value, expected)
    found = backward(y, np.ones(y.shape))
    assert [found[id(t)].shape for t in tensors] == shapes


# --- kinks and ties, as the docstrings say ---------------------------------------------------


def slope(function: Callable[..., Any], *args: Any) -> list[Any]:
    """The derivative of the sum of `function` by each argument, as lists."""
    tensors = [Tensor(np.asarray(a, dtype=float)) for a in args]
    y = function(*tensors)
    found = backward(y, np.ones(y.shape))
    return [found[id(t)].tolist() for t in tensors]


KINKS = {
    "relu has slope 0 at 0": (ops.relu, ([-1, 0, 1],), [[0, 0, 1]]),
    "leaky_relu has slope a at 0": (lambda x: ops.leaky_relu(x, a=0.25), ([-1, 0, 1],),
                                    [[0.25, 0.25, 1]]),
    "absolute has slope 0 at 0": (ops.absolute, ([-2, 0, 3],), [[-1, 0, 1]]),
    "maximum shares a tie": (ops.maximum, ([1, 2, 3], [2, 2, 2]), [[0, 0.5, 1], [1, 0.5, 0]]),
    "minimum shares a tie": (ops.minimum, ([1, 2, 3], [2, 2, 2]), [[1, 0.5, 0], [0, 0.5, 1]]),
    "max shares a tie": (lambda x: ops.max(x, axis=1), ([[1, 3, 3], [2, 2, 2], [5, 4, 4]],),
                         [[[0, 0.5, 0.5], [1 / 3] * 3, [1, 0, 0]]]),
    "max over all shares a tie": (ops.max, ([[7, 1], [7, 7]],), [[[1 / 3, 0], [1 / 3, 1 / 3]]]),
    "clip has slope 1 on its limits": (lambda x: ops.clip(x, low=-1, high=1),
                                       ([-2, -1, 0, 1, 2],), [[0, 1, 1, 1, 0]]),
    "hinge has slope 0 at its kink": (lambda s: 4 * ops.hinge(s, np.array([1.0, 1, -1, -1])),
                                      ([1, 0.5, -1, 0],), [[0, -1, 0, 1]]),
    "power 0 has slope 0, also at 0": (lambda x: ops.power(x, 0), ([0, 2],), [[0, 0]]),
    "power by an array of 0 too": (lambda x: ops.power(x, np.zeros(2)), ([0, 2],), [[0, 0]]),
    "power 1 at 0": (lambda x: ops.power(x, 1), ([0, 2],), [[1, 1]]),
    "power 2 of negative values": (lambda x: ops.power(x, 2.0), ([-3, 0],), [[-6, 0]]),
    "exponent at base 0": (lambda p: ops.power(np.array([0.0, 1.0]), p), ([2, 2],), [[0, 0]]),
}  # fmt: skip


@pytest.mark.parametrize("name", KINKS)
def test_kinks_and_ties(name: str) -> None:
    function, args, expected = KINKS[name]
    assert slope(function, *args) == expected


def test_singular_points() -> None:
    with arrays.quiet():
        assert slope(ops.sqrt, [0.0]) == [[math.inf]]
        assert slope(ops.log, [0.0]) == [[math.inf]]
        assert np.isnan(slope(lambda p: ops.power(np.array([-2.0]), p), [2.0])).all()
        assert ops.divide(np.array([1.0, -1.0]), np.zeros(2)).tolist() == [math.inf, -math.inf]
        assert np.isnan(ops.divide(np.zeros(1), np.zeros(1))).all()


def test_max_and_hinge_at_infinity() -> None:
    assert slope(ops.max, [-math.inf, -math.inf]) == [[0.5, 0.5]]
    scores = np.array([math.inf, 0.0])
    assert ops.hinge(scores, np.ones(2)) == 0.5
    assert slope(lambda s: ops.hinge(s, np.ones(2)), scores) == [[0, -0.5]]


# --- large magnitudes ------------------------------------------------------------------------


def precisely(function: Callable[..., Any], x: np.ndarray) -> np.ndarray:
    """`function` of each row of x in 60 digits, rounded to float64 at the end."""
    with mpmath.workdps(60):
        return np.array([[float(v) for v in function([mpmath.mpf(float(e)) for e in row])]
                         for row in x])  # fmt: skip


def precise_log_softmax(row: list[Any]) -> list[Any]:
    total = mpmath.log(mpmath.fsum(map(mpmath.exp, row)))
    return [x - total for x in row]


def precise_softmax(row: list[Any]) -> list[Any]:
    total = mpmath.fsum(map(mpmath.exp, row))
    return [mpmath.exp(x) / total for x in row]


def precise_sigmoid(row: list[Any]) -> list[Any]:
    return [1 / (1 + mpmath.exp(-x)) for x in row]


def precise_softplus(row: list[Any]) -> list[Any]:
    return [mpmath.log(1 + mpmath.exp(x)) for x in row]


LARGE = np.array([[1, -1, 0.5], [-1, -1, -1], [1, 1, 0.25], [0, 0, -1]])
TINY = {"float32": 2e-7, "float64": 4e-16}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1.0, 30.0, 1e4, 1e30])
def test_large_magnitudes(dtype: str, scale: float, backend: Backend) -> None:
    """No overflow, no warning, and every element to a few units in the last place."""
    host = (scale * LARGE).astype(dtype)
    x = backend.asarray(host)
    for function, precise, absolute in (
        (ops.softmax, precise_softmax, 0.0),
        (ops.log_softmax, precise_log_softmax, TINY[dtype]),
        (ops.sigmoid, precise_sigmoid, 0.0),
        (ops.softplus, precise_softplus, 0.0),
    ):
        expected = precisely(precise, host)
        np.testing.assert_allclose(
            backend.to_host(function(x)), expected, rtol=8 * TINY[dtype], atol=absolute
        )
        tensor = Tensor(x)
        g = backward(function(tensor), backend.asarray(np.ones_like(host)))[id(tensor)]
        assert np.isfinite(backend.to_host(g)).all()
        if function is ops.softplus:
            slopes = precisely(precise_sigmoid, host)
            np.testing.assert_allclose(backend.to_host(g), slopes, rtol=8 * TINY[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e4, 1e30])
def test_logsumexp_and_cross_entropy_at_large_magnitudes(dtype: str, scale: float) -> None:
    x = (scale * LARGE).astype(dtype)
    expected = precisely(precise_log_softmax, x)
    np.testing.assert_allclose(ops.logsumexp(x, axis=1), (x - expected)[:, 0], rtol=TINY[dtype])
    for label in range(3):
        labels = np.full(len(x), label)
        loss = ops.softmax_cross_entropy(x, labels)
        np.testing.assert_allclose(loss, -expected[:, label].mean(), rtol=4 * TINY[dtype])
        g = slope(lambda z, y=labels: ops.softmax_cross_entropy(z, y), x)[0]
        q = np.eye(3)[labels]
        np.testing.assert_allclose(g, (precisely(precise_softmax, x) - q) / 4, atol=TINY[dtype])


def test_equal_large_logits_lose_nothing() -> None:
    """log C, whatever the size of the logits."""
    for dtype in DTYPES:
        z = np.full((2, 8), 1e30, dtype)
        assert ops.log_softmax(z) == pytest.approx(-math.log(8), rel=1e-7)
        assert ops.softmax_cross_entropy(z, np.zeros(2, int)) == pytest.approx(math.log(8))


def test_infinite_entries() -> None:
    inf = math.inf
    masked = np.array([[0.0, -inf, 0.0], [-inf, 2.0, -inf]])
    assert np.array_equal(ops.softmax(masked), [[0.5, 0, 0.5], [0, 1, 0]])
    assert np.array_equal(ops.logsumexp(masked, axis=1), [math.log(2), 2.0])
    assert np.array_equal(ops.log_softmax(masked)[1], [-inf, 0, -inf])
    assert ops.softmax_cross_entropy(masked, np.array([2, 1])) == math.log(2) / 2
    assert slope(lambda z: ops.logsumexp(z, axis=1), masked) == [[[0.5, 0, 0.5], [0, 1, 0]]]
    assert ops.sigmoid(np.array([-inf, inf])).tolist() == [0, 1]
    assert ops.softplus(np.array([-inf, inf])).tolist() == [0, inf]
    with arrays.quiet():
        assert ops.logsumexp(np.full((2, 3), -inf), axis=1).tolist() == [-inf, -inf]
        assert ops.logsumexp(np.array([inf, 0.0])) == inf


@pytest.mark.parametrize("dtype", DTYPES)
def test_gelu_and_erf_at_large_magnitudes(dtype: str) -> None:
    x = np.array([-1e15, -1e4, -50.0, 50.0, 1e4, 1e15], dtype)
    assert np.array_equal(ops.gelu(x), np.maximum(x, 0))
    assert np.array_equal(ops.erf(x), np.sign(x))
    assert slope(ops.gelu, x) == [[0, 0, 0, 1, 1, 1]]
    assert slope(ops.erf, x) == [[0] * 6]


# --- erf -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "bound"), [("float64", 3e-16), ("float32", 2.5e-7)])
def test_erf_against_mpmath(dtype: str, bound: float, backend: Backend) -> None:
    """The bounds of the docstring, sampled most densely where the error is largest."""
    joint, far = np.linspace(0.468, 0.6, 2000), np.linspace(5.99, 6.01, 100)
    x = np.concatenate([np.linspace(-7, 7, 4001), joint, -joint, far, -far]).astype(dtype)
    exact = np.array([float(mpmath.erf(float(v))) for v in x])
    ours = backend.to_host(ops.erf(backend.asarray(x)))
    assert np.max(np.abs(ours - exact)) <= bound
    assert np.array_equal(ours, -backend.to_host(ops.erf(backend.asarray(-x))))


# --- gather ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("n", "size", "used"), [(1, 1, 1), (4000, 12, 3), (257, 300, 300), (64, 5, 1)]
)
def test_scatter_add(dtype: str, n: int, size: int, used: int, backend: Backend) -> None:
    """The sums of np.add.at: exact for integers, the same bits on every library for floats."""
    source = np.random.default_rng(n)
    indices = source.integers(0, used, n)
    whole = source.integers(-1000, 1000, (n, 3)).astype(dtype)
    expected = np.zeros((size, 3))
    np.add.at(expected, indices, whole)
    found = scatter_add(backend.asarray(whole), backend.asarray(indices), size)
    assert np.array_equal(backend.to_host(found), expected)

    rows = source.standard_normal((n, 3)).astype(dtype)
    expected = np.zeros((size, 3))
    np.add.at(expected, indices, rows.astype("float64"))
    found = backend.to_host(scatter_add(backend.asarray(rows), backend.asarray(indices), size))
    assert found.dtype == dtype
    assert error(found, expected) <= {"float32": 1e-6, "float64": 1e-14}[dtype]
    assert np.array_equal(found, scatter_add(rows, indices, size))


def test_scatter_add_order_is_the_documented_one() -> None:
    """By doubling: ((x0 + x1) + (x2 + x3)) seen from the last element of the run."""
    x = np.array([1e16, 1.0, -1e16, 1.0, 3.0])[:, None]
    total = scatter_add(x, np.zeros(5, dtype=int), 1)[0, 0]
    assert total == ((3.0 + 1.0) + (-1e16 + 1.0)) + 1e16


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", "int32", "int64", "uint16"])
def test_gather_takes_any_integer_dtype(dtype: str, backend: Backend) -> None:
    table = Tensor(backend.asarray(normal(300, 2)))
    indices = np.array([0, 5, 100, 5], dtype)
    y = ops.gather(table, backend.asarray(indices))
    found = backward(y, backend.asarray(np.ones((4, 2))))[id(table)]
    expected = np.zeros((300, 2))
    np.add.at(expected, indices, 1.0)
    assert np.array_equal(backend.to_host(found), expected)


def test_a_cotangent_that_is_not_finite_stays_in_its_row(backend: Backend) -> None:
    rows = backend.asarray(np.array([[1.0], [math.inf], [2.0], [math.nan]]))
    found = backend.to_host(scatter_add(rows, backend.asarray(np.array([0, 1, 0, 3])), 5))
    assert np.array_equal(found[:, 0], [3.0, math.inf, 0.0, math.nan, 0.0], equal_nan=True)


# --- autograd, a second opinion on whole expressions -----------------------------------------


def test_expressions_against_autograd() -> None:
    x, w, b = normal(6, 4), normal(3, 4), normal(3)
    labels = np.array([0, 1, 2, 2, 1, 0])

    def ours(w: Any, b: Any) -> Any:
        y = ops.tanh(ops.linear(x, w, b))
        return ops.sum(ops.exp(y * 0.5) / (1.0 + y**2)) + ops.softmax_cross_entropy(y, labels)

    def theirs(w: Any, b: Any) -> Any:
        y = anp.tanh(anp.dot(x, w.T) + b)
        total = anp.log(anp.sum(anp.exp(y), axis=1))
        loss = anp.mean(total - y[anp.arange(6), labels])
        return anp.sum(anp.exp(y * 0.5) / (1.0 + y**2)) + loss

    tensors = Tensor(w), Tensor(b)
    found = backward(ours(*tensors), np.ones(()))
    expected = autograd.grad(theirs, (0, 1))(w, b)
    assert worst([found[id(t)] for t in tensors], list(expected)) <= 1e-13


# --- errors ----------------------------------------------------------------------------------

X = np.ones((2, 3))
ERRORS: dict[str, Callable[[], Any]] = {
    r"add: operands could not be broadcast.*\(2, 3\), \(2,\)": lambda: ops.add(X, np.ones(2)),
    r"matmul: expected at least 2 dimensions; got shapes \(3,\)": lambda: ops.matmul(X[0], X[0]),
    r"^matmul: (?!matmul).*arguments: \(2, 3\), \(2, 3\)": lambda: ops.matmul(X, X),
    r"reshape: too many positional arguments; call it as reshape\(x, \*, shape\)":
        lambda: ops.reshape(X, (3, 2)),  # type: ignore[call-arg]
    r"batch_norm: missing a required .*'channel_axis'; call it as batch_norm\(x, gain":
        lambda: ops.batch_norm(X, X[0], X[0]),
    r"linear: expected x \(\.\.\., in\) and weight \(out, in\); got \(2, 3\) and \(3, 2\)":
        lambda: ops.linear(X, X.T),
    r"axis 2 is out of range for 2 dimension": lambda: ops.sum(X, axis=2),
    r"axis \(0, -3\) is out of range": lambda: ops.logsumexp(X, axis=(0, -3)),
    r"axis 3 is out of range for 2 dim": lambda: ops.softmax(X, axis=3),
    r"axis -3 is out of range for 2 dim": lambda: ops.log_softmax(X, axis=-3),
    r"axis -1 is out of range for 0 dim": lambda: ops.softmax(np.ones(())),
    r"axis 5 is out of range for 2 dim": lambda: ops.gather(X, np.array([0]), axis=5),
    r"axis 4 is out of range for 2 dim": lambda: ops.split(X, sizes=(1, 1), axis=4),
    r"axis \(2, 1\) is out of range for 2 dim": lambda: ops.transpose(X, axes=(2, 1)),
    r"transpose: axes": lambda: ops.transpose(X, axes=(0,)),
    r"mean of no elements is not defined": lambda: ops.mean(np.ones((0, 3)), axis=0),
    r"max: zero-size array": lambda: ops.max(np.ones(0)),
    r"variance of 1 element\(s\) with correction 1 is not":
        lambda: ops.var(np.ones(1), correction=1),
    r"expected labels of shape \(2,\) for logits \(2, 3\); got \(3,\)":
        lambda: ops.softmax_cross_entropy(X, np.zeros(3, int)),
    r"label_smoothing must lie in \[0, 1\); got 1.0":
        lambda: ops.softmax_cross_entropy(X, np.zeros(2, int), label_smoothing=1.0),
    r"softmax_cross_entropy: expected integer labels; got float64":
        lambda: ops.softmax_cross_entropy(X, np.zeros(2)),
    r"softmax_cross_entropy: the batch is empty":
        lambda: ops.softmax_cross_entropy(np.ones((0, 3)), np.zeros(0, int)),
    r"squared_error: expected equal shapes; got \(2, 3\) and \(3,\)":
        lambda: ops.squared_error(X, X[0]),
    r"squared_error of no elements": lambda: ops.squared_error(np.ones(0), np.ones(0)),
    r"hinge: expected equal shapes; got \(2, 3\) and \(2, 1\)": lambda: ops.hinge(X, X[:, :1]),
    r"hinge of no elements": lambda: ops.hinge(np.ones(0), np.ones(0)),
    r"split: sizes \(1, 3\) do not add up to length 3 of axis 1":
        lambda: ops.split(X, sizes=(1, 3), axis=1),
    r"split: sizes \(4, -1\) do not add up": lambda: ops.split(X, sizes=(4, -1), axis=1),
    r"pad: expected 2 pairs of widths; got 1": lambda: ops.pad(X, widths=((1, 1),)),
    r"pad: widths must not be negative": lambda: ops.pad(X[:1, :1], widths=((0, 0), (-1, 1))),
    r"getitem: basic indices only, got \[0, 1\]": lambda: ops.getitem(X, index=[0, 1]),
    r"getitem: basic indices only": lambda: ops.getitem(X, index=(slice(None), np.array([0]))),
    r"getitem: basic indices only, got True": lambda: ops.getitem(X, index=True),
    r"getitem: index 7 is out of bounds": lambda: ops.getitem(X, index=7),
    r"gather: index 9 is out of bounds": lambda: ops.gather(X, np.array([9])),
    r"reshape: cannot reshape": lambda: ops.reshape(X, shape=(4, 2)),
    r"broadcast_to: .*arguments: \(2, 3\)": lambda: ops.broadcast_to(X, shape=(2, 4)),
    r"concat: ": lambda: ops.concat(X, np.ones((2, 2))),
    r"clip: give low, high or both": lambda: ops.clip(X),
    r"Tensors are compared by value": lambda: Tensor(X) < 1.0,
    r"Tensors are compared by value: write": lambda: Tensor(X) == 1.0,
}  # fmt: skip


@pytest.mark.parametrize("message", ERRORS)
def test_errors(message: str) -> None:
    with pytest.raises(Error, match=message):
        ERRORS[message]()
