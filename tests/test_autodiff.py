"""Reverse mode: the contract of value_and_grad, graphs of every form, memory, and wrong rules."""

from __future__ import annotations

import gc
import operator
import weakref
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import autograd
import autograd.numpy as anp
import numpy as np
import pytest
from backends import Backend

import npdrt
from npdrt import ops, optim, value_and_grad
from npdrt.arrays import namespace
from npdrt.autodiff import PRIMITIVES, Tensor, backward, detach, graph, primitive
from npdrt.errors import Error
from npdrt.models import MLP

RNG = np.random.default_rng(7)


def scalars(**values: float) -> dict[str, np.ndarray]:
    return {name: np.array(value) for name, value in values.items()}


# --- value_and_grad --------------------------------------------------------------------------


def test_gradients_keep_names_order_shapes_and_dtypes(backend: Backend) -> None:
    hosts = {
        "layers/01/weight": np.ones((2, 3), "float32"),
        "layers/00/bias": np.ones(3, "float32"),
        "scale": np.ones((), "float64"),
        "empty": np.ones((0, 2), "float32"),
    }
    params = {name: backend.asarray(a) for name, a in hosts.items()}

    def loss_fn(p: Any) -> Any:
        double = ops.sum(p["scale"] * p["scale"])
        single = ops.sum(p["layers/01/weight"] * p["layers/00/bias"])
        return double * float(backend.to_host(detach(single)))

    loss, grads = value_and_grad(loss_fn)(params)
    assert float(backend.to_host(loss)) == 6.0
    assert list(grads) == list(params)
    for name, g in grads.items():
        assert tuple(g.shape) == hosts[name].shape
        assert g.dtype == params[name].dtype
        expected = 12.0 if name == "scale" else 0.0  # detached, and unused: zeros
        assert np.array_equal(backend.to_host(g), np.full_like(hosts[name], expected))


def test_further_arguments_and_settings_pass_through() -> None:
    def loss_fn(p: Any, x: Any, *, power: int) -> Any:
        return ops.sum((p["w"] * x) ** power)

    loss, grads = value_and_grad(loss_fn)(
        {"w": np.array([1.0, 2.0])}, np.array([3.0, 1.0]), power=3
    )
    assert loss == 35.0
    assert grads["w"].tolist() == [81.0, 12.0]


def test_a_loss_that_depends_on_nothing() -> None:
    for constant in (np.array(4.0), np.float64(4.0)):
        loss, grads = value_and_grad(lambda p, c=constant: c)({"w": np.ones(2)})
        assert loss == 4.0
        assert grads["w"].tolist() == [0.0, 0.0]


def test_a_loss_that_is_a_parameter() -> None:
    _, grads = value_and_grad(lambda p: p["w"])(scalars(w=2.0, unused=3.0))
    assert (float(grads["w"]), float(grads["unused"])) == (1.0, 0.0)


class Pair(NamedTuple):
    logits: Any
    more: Any


def test_aux_comes_back_as_plain_arrays() -> None:
    def loss_fn(p: Any) -> Any:
        y = p["w"] * 2.0
        aux = {"pair": Pair(y, [y, (y, "text")]), "number": 3, "array": np.ones(2), "none": None}
        return ops.sum(y), aux

    (loss, aux), grads = value_and_grad(loss_fn, has_aux=True)({"w": np.array([1.0, 2.0])})
    assert loss == 6.0
    assert grads["w"].tolist() == [2.0, 2.0]
    assert isinstance(aux["pair"], Pair)
    found = [aux["pair"].logits, aux["pair"].more[0], aux["pair"].more[1][0]]
    assert all(type(a) is np.ndarray and a.tolist() == [2.0, 4.0] for a in found)
    assert (aux["pair"].more[1][1], aux["number"], aux["none"]) == ("text", 3, None)


@pytest.mark.parametrize(
    ("loss", "found"),
    [(lambda p: p["w"] * 2.0, r"\(3,\)"), (lambda p: np.ones((1, 1)), r"\(1, 1\)"),
     (lambda p: 3.0, "float"), (lambda p: None, "NoneType"),
     (lambda p: ops.sum(p["w"], keepdims=True), r"\(1,\)")],
)  # fmt: skip
def test_a_loss_that_is_not_a_scalar_is_refused(loss: Any, found: str) -> None:
    with pytest.raises(Error, match=f"expected a scalar loss, a 0-d array; got {found}"):
        value_and_grad(loss)({"w": np.ones(3)})


def test_params_must_be_a_dict() -> None:
    with pytest.raises(Error, match=r"parameters as a dict of name -> array; got ndarray; give"):
        value_and_grad(ops.sum)(np.ones(3))
    with pytest.raises(Error, match=r"parameters as a dict of name -> array; got list; give"):
        optim.sgd(lr=0.1).init([np.ones(3)])  # type: ignore[arg-type]


def test_the_function_sees_tensors_and_the_caller_arrays() -> None:
    seen = []

    def loss_fn(p: Any, x: Any) -> Any:
        seen.extend([p["w"], x])
        return ops.sum(p["w"] * x)

    value_and_grad(loss_fn)({"w": np.ones(2)}, np.ones(2))
    assert isinstance(seen[0], Tensor)
    assert isinstance(seen[1], np.ndarray)
    assert repr(seen[0]) == "Tensor(w, shape=(2,), dtype=float64)"
    assert (seen[0].shape, seen[0].ndim, seen[0].dtype) == ((2,), 1, np.float64)


# --- graphs ----------------------------------------------------------------------------------


def test_a_node_used_many_times() -> None:
    def loss_fn(p: Any) -> Any:
        y = ops.exp(p["x"])
        return y * y + y / y + y - y + (y + y + y)

    _, grads = value_and_grad(loss_fn)(scalars(x=0.5))
    assert grads["x"] == pytest.approx(2 * np.exp(1.0) + 3 * np.exp(0.5), rel=1e-15)


def test_a_tensor_on_both_sides() -> None:
    _, grads = value_and_grad(lambda p: p["x"] * p["x"])(scalars(x=3.0))
    assert grads["x"] == 6.0
    _, grads = value_and_grad(lambda p: p["x"] ** p["x"])(scalars(x=2.0))
    assert grads["x"] == pytest.approx(4 * (np.log(2) + 1), rel=1e-15)


def test_one_parameter_under_two_names() -> None:
    w = np.array([1.0, 2.0])
    _, grads = value_and_grad(lambda p: ops.sum(p["a"] * p["b"] * p["a"]))({"a": w, "b": w})
    assert grads["a"].tolist() == [2.0, 8.0]
    assert grads["b"].tolist() == [1.0, 4.0]


@pytest.mark.parametrize("layers", [1, 5, 60])
def test_diamonds_are_walked_once(layers: int) -> None:
    """x -> x + x, again and again: 2**layers paths, one visit a node."""

    def loss_fn(p: Any) -> Any:
        x = p["x"]
        for _ in range(layers):
            x = x + x
        return x

    _, grads = value_and_grad(loss_fn)(scalars(x=1.0))
    assert grads["x"] == 2.0**layers


def test_graph_lists_inputs_before_uses() -> None:
    x = Tensor(np.ones(2), name="x")
    y = ops.exp(x)
    z = ops.sum(x * y)
    order = graph(z)
    assert order[0] is x
    assert order[-1] is z
    assert [node.name for node in order] == ["x", "exp", "multiply", "sum"]


@pytest.mark.parametrize("length", [10_000, 100_000])
def test_long_chains(length: int) -> None:
    def loss_fn(p: Any) -> Any:
        x = p["x"]
        for _ in range(length):
            x = x * 1.0
        return x

    _, grads = value_and_grad(loss_fn)(scalars(x=1.0))
    assert grads["x"] == 1.0


def test_a_long_chain_that_is_dropped() -> None:
    x = Tensor(np.array(1.0))
    for _ in range(100_000):
        x = -x
    del x  # a recursive release would end the process here


def test_backward_consumes_the_graph() -> None:
    x = Tensor(np.array(3.0))
    y = x * x
    assert backward(y, np.array(1.0))[id(x)] == 6.0
    assert y.edges == ()


# --- memory ----------------------------------------------------------------------------------


@pytest.fixture
def no_collector() -> Iterator[None]:
    """Memory must go by reference counts alone."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collector")
def test_the_graph_does_not_outlive_its_use() -> None:
    watched: list[weakref.ref[Any]] = []

    def loss_fn(p: Any) -> Any:
        hidden = ops.tanh(p["w"] * 2.0)
        watched.append(weakref.ref(hidden.value))
        return ops.sum(hidden * hidden)

    loss, grads = value_and_grad(loss_fn)({"w": np.ones(1000)})
    assert watched[0]() is None
    assert loss.shape == ()
    assert grads["w"].shape == (1000,)


@pytest.mark.usefixtures("no_collector")
def test_the_graph_is_freed_on_the_way() -> None:
    """When the cotangent reaches the first operation, the arrays of the last are gone."""
    last: list[weakref.ref[Any]] = []
    alive_at_first: list[bool] = []

    def watched(x: Any) -> Any:
        def vjp(g: Any) -> Any:
            alive_at_first.append(last[0]() is not None)
            return g

        return x + 0.0, vjp

    with temporary(watched) as first:

        def loss_fn(p: Any) -> Any:
            y = ops.exp(ops.exp(first(p["w"])))
            last.append(weakref.ref(y.value))
            return ops.sum(y)

        value_and_grad(loss_fn)({"w": np.ones(10)})
    assert alive_at_first == [False]


# --- the operators of Tensor -----------------------------------------------------------------


X = np.array([[1.5, -0.5], [2.0, 0.25]])
OTHERS = {"scalar": 3, "float": 0.75, "array": np.array([[2.0, 3.0]]), "0-d": np.array(1.25)}
OPERATORS = [operator.add, operator.sub, operator.mul, operator.truediv]


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("operate", OPERATORS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("left", [True, False], ids=["tensor left", "tensor right"])
def test_operators(operate: Any, other: str, left: bool, backend: Backend) -> None:
    """Tensor with a Python scalar or an array, on either side, against autograd."""
    raw = OTHERS[other]

    def apply(x: Any, y: Any) -> Any:
        return operate(x, y) if left else operate(y, x)

    tensor = Tensor(backend.asarray(X))
    y = apply(tensor, backend.asarray(raw) if isinstance(raw, np.ndarray) else raw)
    assert isinstance(y, Tensor)
    found = backward(y, backend.asarray(np.ones_like(X)))[id(tensor)]
    expected = autograd.elementwise_grad(lambda x: apply(x, raw))(X)
    np.testing.assert_allclose(backend.to_host(y.value), apply(X, raw), rtol=1e-15)
    np.testing.assert_allclose(backend.to_host(found), expected, rtol=1e-15)


def test_the_other_operators() -> None:
    t = Tensor(X)
    assert np.array_equal((-t).value, -X)
    assert np.array_equal((t**2).value, X**2)
    assert np.array_equal((2.0**t).value, 2.0**X)
    assert np.array_equal((np.abs(X) ** t).value, np.abs(X) ** X)
    assert np.array_equal((t @ X).value, X @ X)
    assert np.array_equal((X.T @ t).value, X.T @ X)
    assert np.array_equal(t[0].value, X[0])
    assert np.array_equal(t[..., 1:].value, X[..., 1:])


def test_unpacking_a_tensor() -> None:
    t = Tensor(X)
    first, second = t
    found = backward(ops.sum(first * second), np.ones(()))[id(t)]
    assert np.array_equal(found, X[::-1])


def test_plain_arrays_give_plain_arrays() -> None:
    assert type(ops.exp(X)) is np.ndarray
    assert type(ops.where(X > 0, X, 0.0)) is np.ndarray


def test_an_array_of_higher_precision_is_noticed() -> None:
    """float32 * float64 is float64 in NumPy: refused, not silently carried along."""
    wider = np.full(2, 2.0)
    with pytest.raises(Error, match=r"multiply: expected arrays of one dtype.* float32, float64"):
        value_and_grad(lambda p: ops.sum(p["w"] * wider))({"w": np.ones(2, "float32")})


# --- rules that are wrong --------------------------------------------------------------------


class temporary:
    """A primitive made of `function` for the length of a with block."""

    def __init__(self, function: Callable[..., Any], *, analytic: bool = True) -> None:
        self.name, self.made = function.__name__, primitive(function, analytic=analytic)

    def __enter__(self) -> Callable[..., Any]:
        return self.made

    def __exit__(self, *_: object) -> None:
        del PRIMITIVES[self.name]


def test_a_wrong_dtype_is_refused() -> None:
    def wrong_dtype(x: Any) -> Any:
        return x * x, lambda g: (2 * x * g).astype(np.float32)

    message = "wrong_dtype: the derivative is float32 for an argument of float64; keep the dtype"
    with temporary(wrong_dtype) as planted, pytest.raises(Error, match=message):
        value_and_grad(lambda p: ops.sum(planted(p["x"])))({"x": np.ones(3)})


@pytest.mark.parametrize(
    ("bend", "found"),
    [(lambda g: g.T, r"\(3, 2\)"), (lambda g: g[:, :1], r"\(2, 1\)"), (lambda g: g[0], r"\(3,\)"),
     (lambda g: g.reshape(-1), r"\(6,\)")],
    ids=["transposed", "too few columns", "a row", "flat"],
)  # fmt: skip
def test_a_wrong_shape_is_refused(bend: Any, found: str) -> None:
    def wrong_shape(x: Any) -> Any:
        return x * x, lambda g: bend(2 * x * g)

    message = rf"wrong_shape: the derivative has shape {found} for an argument of shape \(2, 3\)"
    with temporary(wrong_shape) as planted, pytest.raises(Error, match=message):
        value_and_grad(lambda p: ops.sum(planted(p["x"])))({"x": np.ones((2, 3))})


def test_temporary_primitives_are_gone() -> None:
    assert not [name for name in PRIMITIVES if "wrong" in name]


# --- other errors ----------------------------------------------------------------------------


def test_the_truth_of_a_tensor() -> None:
    with pytest.raises(Error, match="the truth of a Tensor is not defined"):
        bool(Tensor(np.array(1.0)))


def test_an_array_given_as_a_setting() -> None:
    bias = Tensor(np.ones(3))
    with pytest.raises(Error, match="linear: arrays are positional arguments"):
        ops.linear(np.ones((5, 4)), np.ones((3, 4)), bias=bias)


def test_an_operation_names_itself_and_its_arguments() -> None:
    with pytest.raises(Error, match=r"multiply: .*arguments: \(2,\), \(3,\)"):
        Tensor(np.ones(2)) * np.ones(3)


# --- a network against two other engines -----------------------------------------------------


WIDTHS = (6, 8, 8, 4)
IMAGES, LABELS = RNG.standard_normal((10, WIDTHS[0])), RNG.integers(0, WIDTHS[-1], 10)


def perceptron(p: Any, linear: Any, nonlinearity: Any) -> Any:
    """Three layers in whatever engine `linear` and `nonlinearity` come from."""
    h = IMAGES
    for i in range(3):
        h = linear(h, p[f"{i:02}/weight"], p[f"{i:02}/bias"])
        h = nonlinearity(h) if i < 2 else h
    return h


def perceptron_gradients() -> tuple[Any, Any, Any]:
    params = {}
    for i, (a, b) in enumerate(pairwise(WIDTHS)):
        params[f"{i:02}/weight"] = RNG.standard_normal((b, a))
        params[f"{i:02}/bias"] = RNG.standard_normal(b)
    loss, grads = value_and_grad(
        lambda p: ops.softmax_cross_entropy(perceptron(p, ops.linear, ops.tanh), LABELS)
    )(params)
    return params, loss, grads


def test_perceptron_against_autograd() -> None:
    def autograds(p: Any) -> Any:
        z = perceptron(p, lambda h, w, b: anp.dot(h, w.T) + b, anp.tanh)
        return anp.mean(anp.log(anp.sum(anp.exp(z), axis=1)) - z[anp.arange(len(z)), LABELS])

    params, loss, grads = perceptron_gradients()
    assert loss == pytest.approx(autograds(params), rel=1e-13)
    expected = autograd.grad(autograds)(params)
    for name, g in grads.items():
        np.testing.assert_allclose(g, expected[name], rtol=1e-9, atol=1e-15)


def test_perceptron_against_torch() -> None:
    torch = pytest.importorskip("torch")
    params, loss, grads = perceptron_gradients()
    tensors = {name: torch.tensor(a, requires_grad=True) for name, a in params.items()}

    def linear(h: Any, w: Any, b: Any) -> Any:
        return torch.nn.functional.linear(torch.as_tensor(h), w, b)

    z = perceptron(tensors, linear, torch.tanh)
    expected = torch.nn.functional.cross_entropy(z, torch.tensor(LABELS))
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-13)
    for name, g in grads.items():
        np.testing.assert_allclose(g, tensors[name].grad.numpy(), rtol=1e-9, atol=1e-15)


# --- whose memory ----------------------------------------------------------------------------


SHARING: dict[str, Any] = {
    "a sum of two": lambda p: ops.sum((p["a"] + p["b"]) ** 2),
    "a difference": lambda p: ops.sum((p["a"] - p["b"]) ** 2) + ops.sum(p["a"] * p["b"]),
    "a sum": lambda p: ops.sum(p["a"]) + ops.sum(p["b"]),
    "a mean of a sum": lambda p: ops.mean(p["a"] + p["b"]),
    "a sum of a transpose and a shape": lambda p: ops.sum(
        (ops.transpose(p["a"]) + ops.reshape(p["b"], shape=(3, 2))) ** 2
    ),
    "parts of one": lambda p: ops.sum(ops.concat(p["a"], p["b"], axis=0) ** 2),
    "numbers": lambda p: p["c"] + p["d"],
    "not at all": lambda p: ops.sum(p["a"] * 0.0),
}


def sharing_params() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(5)
    return {"a": rng.normal(size=(2, 3)), "b": rng.normal(size=(2, 3)), "c": np.array(2.0),
            "d": np.array(3.0)}  # fmt: skip


@pytest.mark.parametrize("name", SHARING)
@pytest.mark.parametrize("recorded", [False, True])
def test_gradients_share_no_memory(name: str, recorded: bool) -> None:
    """Each can be changed in place without another, a parameter or the loss being changed."""
    params = sharing_params()
    function = value_and_grad(SHARING[name])
    loss, grads = npdrt.record(function, params)(params) if recorded else function(params)
    before = {key: np.array(g) for key, g in grads.items()}
    expected = {key: np.array(x) for key, x in params.items()}
    total = float(loss)
    for key in grads:
        grads[key] *= 0.5
        before[key] *= 0.5
        assert all(np.array_equal(grads[other], before[other]) for other in grads)
    assert all(np.array_equal(params[key], x) for key, x in expected.items())
    assert float(loss) == total  # also where the gradient of a number is 1, as the cotangent is


@pytest.mark.parametrize("name", [name for name in SHARING if "transpose" not in name
                                  and "parts" not in name])  # fmt: skip
def test_gradients_can_be_changed_in_a_recorded_step(name: str) -> None:
    """Unless they are views, which the recorder does not let a step write to."""
    params = sharing_params()

    def step(params: Any) -> Any:
        _, grads = value_and_grad(SHARING[name])(params)
        for key in ("a", "c"):
            grads[key] *= 0.5
        return grads

    found, expected = npdrt.record(step, params)(params), step(params)
    assert all(np.array_equal(found[key], g) for key, g in expected.items())


def test_gradients_in_their_own_memory_are_not_copied() -> None:
    """A step of a network has no call more."""
    model = MLP(inputs=4, outputs=3, depth=3, width=5, bias=True)
    params = model.init(seed=0)
    x = np.ones((2, 4), np.float32)
    program = npdrt.record(value_and_grad(lambda p: ops.mean(model(p, x_of(p, x)))), params)
    assert not [call for call in program.calls if call.function == "copy"]


def x_of(params: Any, x: Any) -> Any:
    """x as a constant of a recorded step."""
    return namespace(next(iter(params.values())).value).asarray(x)
