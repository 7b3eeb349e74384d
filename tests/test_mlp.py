"""The perceptron: names and counts, values and gradients beside other frameworks, first weights."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import math
import pickle
from collections.abc import Callable
from typing import Any

import backends
import numpy as np
import pytest

from npdrt import Error, check_gradients, ops, value_and_grad
from npdrt.models import MLP
from npdrt.models.initialisation import SCHEMES
from npdrt.models.mlp import NONLINEARITIES
from npdrt.random import Random
from npdrt.train.step import Task

SMALL: dict[str, int] = {"depth": 3, "width": 6, "inputs": 5, "outputs": 4}
X = Random(0, "inputs").normal((9, 5))
LABELS = Random(0, "labels").words(9).astype(np.int64) % 4


# --- names, shapes, counts -----------------------------------------------------------------------


def test_names_shapes_and_order() -> None:
    model = MLP(depth=3, width=6, inputs=5, outputs=4, bias=True)
    assert list(model.shapes().items()) == [
        ("layers/00/weight", (6, 5)),
        ("layers/00/bias", (6,)),
        ("layers/01/weight", (6, 6)),
        ("layers/01/bias", (6,)),
        ("layers/02/weight", (4, 6)),
        ("layers/02/bias", (4,)),
    ]
    params = model.init(seed=0)
    assert [(name, w.shape) for name, w in params.items()] == list(model.shapes().items())
    assert list(MLP(**SMALL).shapes()) == [f"layers/0{layer}/weight" for layer in range(3)]
    assert MLP(depth=1, width=6, inputs=5, outputs=4).shapes() == {"layers/00/weight": (4, 5)}


@pytest.mark.parametrize(("depth", "last"), [(10, "09"), (100, "99"), (101, "100"), (1001, "1000")])
def test_indices_are_padded_alike(depth: int, last: str) -> None:
    """Two digits at least, and as many as the last layer needs: sorting gives the layers' order."""
    names = list(MLP(depth=depth, width=1, inputs=1, outputs=1).shapes())
    assert names[0] == f"layers/{'0' * len(last)}/weight"
    assert names[-1] == f"layers/{last}/weight"
    assert sorted(names) == names


@pytest.mark.parametrize(("depth", "count"), [(2, 623_290), (16, 9_239_450), (51, 30_779_850)])
def test_parameter_counts_of_the_authors(depth: int, count: int) -> None:
    """Their layer counts 1, 15 and 50 leave the output layer out."""
    model = MLP(depth=depth, width=784, inputs=784, outputs=10, bias=True)
    assert sum(math.prod(shape) for shape in model.shapes().values()) == count


# --- values and gradients ------------------------------------------------------------------------


def reference(model: MLP, params: Any, x: Any, linear: Any, phi: Any) -> Any:
    """Definition 1 and the residual variant, written for any framework."""
    h = x
    for layer, name in enumerate(n for n in model.shapes() if n.endswith("weight")):
        z = linear(h, params[name], params.get(name.replace("weight", "bias")))
        last = layer == model.depth - 1
        out = z if last and not model.output_nonlinearity else phi(z)
        square = params[name].shape[0] == params[name].shape[1]
        h = h + out if model.residual and square and not last else out
    return h


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "residual": {"residual": True, "bias": True},
    "residual, inputs as wide": {"residual": True, "width": 5},
    "residual, outputs as wide": {"residual": True, "width": 4},
    "output nonlinearity": {"output_nonlinearity": True, "bias": True},
    "one layer": {"depth": 1, "residual": True},
}
CASES = [
    *({"nonlinearity": phi, "bias": True, "residual": True} for phi in NONLINEARITIES),
    *({"nonlinearity": "tanh", **options} for options in VARIANTS.values()),
    *({"nonlinearity": "relu", **options} for options in VARIANTS.values()),
]
cases = pytest.mark.parametrize("options", CASES, ids=str)


def small(options: dict[str, Any]) -> tuple[MLP, dict[str, np.ndarray]]:
    """A model and float64 parameters whose biases are not zero."""
    model = MLP(**{**SMALL, "init": "authors", **options})
    return model, model.init(seed=1, dtype="float64")


def ours(model: MLP, params: Any) -> tuple[Any, Any, Any]:
    """Logits, loss and gradients by npdrt."""
    loss = value_and_grad(lambda p: ops.softmax_cross_entropy(model(p, X), LABELS))
    return model(params, X), *loss(params)


def assert_close(found: Any, expected: Any) -> None:
    """Logits, loss and every gradient, to 1e-9 of the largest element of each."""
    (logits, loss, grads), (their_logits, their_loss, their_grads) = found, expected
    pairs = [(logits, their_logits), (loss, their_loss)]
    for a, b in [*pairs, *((grads[name], their_grads[name]) for name in their_grads)]:
        assert np.shape(a) == np.shape(b)
        assert np.abs(a - b).max() <= 1e-9 * np.abs(b).max()
    assert list(grads) == list(their_grads)


@cases
def test_equals_pytorch(options: dict[str, Any]) -> None:
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional
    model, start = small(options)
    phi: Callable[[Any], Any] = {"tanh": torch.tanh, "sigmoid": torch.sigmoid}.get(
        model.nonlinearity, getattr(functional, model.nonlinearity, lambda h: h)
    )
    params = {name: torch.from_numpy(w.copy()).requires_grad_() for name, w in start.items()}
    logits = reference(model, params, torch.from_numpy(X), functional.linear, phi)
    loss = functional.cross_entropy(logits, torch.from_numpy(LABELS))
    loss.backward()
    theirs = logits.detach().numpy(), loss.item(), {n: w.grad.numpy() for n, w in params.items()}
    assert_close(ours(model, start), theirs)


@cases
def test_equals_autograd(options: dict[str, Any]) -> None:
    autograd = pytest.importorskip("autograd")
    anp = pytest.importorskip("autograd.numpy")
    erf = pytest.importorskip("autograd.scipy.special").erf
    phi = {
        "relu": lambda h: anp.where(h > 0, h, 0.0),
        "leaky_relu": lambda h: anp.where(h > 0, h, 0.01 * h),
        "tanh": anp.tanh,
        "sigmoid": lambda h: 1 / (1 + anp.exp(-h)),
        "gelu": lambda h: h * (1 + erf(h / math.sqrt(2))) / 2,
        "softplus": lambda h: anp.log(1 + anp.exp(h)),
        "identity": lambda h: h,
    }
    model, params = small(options)

    def logits(p: Any) -> Any:
        def linear(h: Any, w: Any, b: Any) -> Any:
            return anp.dot(h, w.T) + (0.0 if b is None else b)

        return reference(model, p, X, linear, phi[model.nonlinearity])

    def loss(p: Any) -> Any:
        z = logits(p)
        return anp.mean(anp.log(anp.sum(anp.exp(z), axis=1)) - z[np.arange(len(X)), LABELS])

    theirs = logits(params), loss(params), autograd.grad(loss)(params)
    assert_close(ours(model, params), theirs)


@cases
def test_gradients_equal_differences(options: dict[str, Any]) -> None:
    """npdrt's own check: every coordinate, by the complex step where it is defined."""
    model, params = small(options)
    check_gradients(lambda p: ops.softmax_cross_entropy(model(p, X), LABELS), params)


def test_every_backend(backend: backends.Backend) -> None:
    """Logits and gradients of the same model on every array library."""
    model, params = small({"nonlinearity": "tanh", "bias": True, "residual": True})
    on_it = {name: backend.asarray(w) for name, w in params.items()}
    x, labels = backend.asarray(X), backend.asarray(LABELS)
    loss = value_and_grad(lambda p: ops.softmax_cross_entropy(model(p, x), labels))
    value, grads = loss(on_it)
    found = backend.to_host(model(on_it, x)), backend.to_host(value)
    assert_close((*found, {n: backend.to_host(g) for n, g in grads.items()}), ours(model, params))


def test_apply_is_the_same_function() -> None:
    model, params = small({"bias": True})
    for train in (False, True):
        logits, buffers = model.apply(params, {}, X, train=train, random=Random(0))
        np.testing.assert_array_equal(logits, model(params, X))
        assert buffers == {} == model.buffers(seed=0)


def test_arguments_are_not_written_to() -> None:
    model, params = small({"bias": True, "residual": True})
    x = X.copy()
    for array in (x, *params.values()):
        array.setflags(write=False)
    value_and_grad(lambda p: ops.softmax_cross_entropy(model(p, x), LABELS))(params)


# --- first weights -------------------------------------------------------------------------------

# SHA-256 of names and float64 values (little-endian) of seed 7; orthogonal needs LAPACK.
DIGESTS = {
    "he": "234a80e5f30a702c7887e971e0ac83329075ec3c943dd5d05526f31ede38830a",
    "xavier": "3db1a3eee69a6b122eae74228142f4bd6da1191d75b3befce3ac76df0e1fc6ec",
    "authors": "b457585e35cae06fb17416c77083f063a47377dd54b2b98fb3a7cc0a87dfb84e",
}
every_scheme = pytest.mark.parametrize("scheme", SCHEMES)


@pytest.mark.parametrize("scheme", DIGESTS)
def test_first_weights_are_the_same_everywhere(scheme: str) -> None:
    model = MLP(depth=3, width=5, inputs=4, outputs=2, bias=True, init=scheme)
    total = hashlib.sha256()
    for name, w in model.init(seed=7, dtype="float64").items():
        total.update(name.encode() + w.astype("<f8").tobytes())
    assert total.hexdigest() == DIGESTS[scheme]


def first(scheme: str, **options: Any) -> dict[str, np.ndarray]:
    """Large first weights of a net with biases, float64."""
    options = {"depth": 2, "width": 400, "inputs": 300, "outputs": 500, "bias": True} | options
    return MLP(**options, init=scheme).init(seed=3, dtype="float64")


@pytest.mark.parametrize(
    ("scheme", "deviation", "bound"),
    [
        ("he", lambda n_in, n_out: math.sqrt(2 / n_in), None),
        ("xavier", lambda n_in, n_out: math.sqrt(2 / (n_in + n_out)), math.sqrt(3)),
        ("authors", lambda n_in, n_out: math.sqrt(1 / (3 * n_in)), math.sqrt(3)),
    ],
)
def test_statistics_of_first_weights(scheme: str, deviation: Any, bound: Any) -> None:
    """Mean, variance and fourth moment within about five standard errors; uniform ones bounded."""
    for w in (w for name, w in first(scheme).items() if name.endswith("weight")):
        z = w / deviation(w.shape[1], w.shape[0])
        assert abs(z.mean()) < 5 / math.sqrt(z.size)
        assert abs((z**2).mean() - 1) < 5 * math.sqrt(2 / z.size)
        assert abs((z**4).mean() - (1.8 if bound else 3)) < 5 * math.sqrt(96 / z.size)
        assert 3.9 < np.abs(z).max() < 6 if bound is None else 1.73 < np.abs(z).max() <= bound
        correlation = np.corrcoef(z[:, :-1].ravel(), z[:, 1:].ravel())[0, 1]
        assert abs(correlation) < 5 / math.sqrt(z.size)


@pytest.mark.parametrize("shape", [(400, 300), (300, 400), (7, 7), (1, 5), (5, 1)])
def test_orthogonal(shape: tuple[int, int]) -> None:
    """Orthonormal rows of a wide matrix, columns of a tall one."""
    rows, columns = shape
    params = MLP(depth=1, width=1, inputs=columns, outputs=rows, init="orthogonal").init(
        seed=0, dtype="float64"
    )
    w = params["layers/00/weight"]
    product = w @ w.T if rows <= columns else w.T @ w
    assert np.abs(product - np.eye(min(shape))).max() <= 1e-12


def test_orthogonal_has_no_preferred_sign() -> None:
    """Haar distribution: the sign of a diagonal element is positive half of the time."""
    model = MLP(depth=1, width=1, inputs=3, outputs=3, init="orthogonal")
    drawn = [model.init(seed=seed)["layers/00/weight"] for seed in range(300)]
    assert 100 < sum(w[0, 0] > 0 for w in drawn) < 200
    assert 100 < sum(np.linalg.det(w) > 0 for w in drawn) < 200


@every_scheme
def test_biases_start(scheme: str) -> None:
    """At zero, but for the authors' networks: uniform within 1/sqrt(in), as their weights."""
    for name, n_in in (("layers/00/bias", 300), ("layers/01/bias", 400)):
        b = first(scheme)[name]
        if scheme not in ("authors", "torchvision"):
            assert not b.any()
            continue
        assert 0.9 < np.abs(b).max() * math.sqrt(n_in) <= 1
        assert abs(b.mean()) < 5 / math.sqrt(3 * n_in * b.size)
        assert not np.isin(b, first(scheme)[name.replace("bias", "weight")]).any()


@every_scheme
def test_float32_is_float64_rounded_once(scheme: str) -> None:
    model = MLP(**SMALL, bias=True, init=scheme)
    wide, narrow = model.init(seed=0, dtype="float64"), model.init(seed=0)
    for name, w in wide.items():
        assert (w.dtype, narrow[name].dtype) == (np.float64, np.float32)
        np.testing.assert_array_equal(narrow[name], w.astype(np.float32))


@every_scheme
def test_first_weights_depend_on_seed_and_name_alone(scheme: str) -> None:
    """A layer keeps its weights when the net gets deeper; names of 3 digits are other names."""
    shallow, deep = first(scheme, depth=3), first(scheme, depth=5)
    for name in ("layers/00/weight", "layers/00/bias", "layers/01/weight"):
        np.testing.assert_array_equal(shallow[name], deep[name])
        assert not np.array_equal(deep["layers/01/weight"], deep["layers/02/weight"])
    model = MLP(**SMALL, init=scheme)
    assert not np.array_equal(*(model.init(seed=s)["layers/00/weight"] for s in (0, 1)))
    np.testing.assert_array_equal(*(model.init(seed=2)["layers/00/weight"] for _ in range(2)))


# --- the model as a value ------------------------------------------------------------------------


def same_weights(a: MLP, b: MLP) -> bool:
    first, second = a.init(seed=0), b.init(seed=0)
    return list(first) == list(second) and all(np.array_equal(first[n], second[n]) for n in first)


def test_init_is_a_name_and_a_function() -> None:
    model = MLP(**SMALL, init="xavier")
    assert model.init == "xavier"
    assert dataclasses.asdict(model)["init"] == "xavier"
    assert f"{model.init}" == "xavier"
    assert "init='xavier'" in repr(model)
    assert model == MLP(**SMALL, init="xavier") != MLP(**SMALL)
    assert hash(model) == hash(MLP(**SMALL, init="xavier"))


@pytest.mark.parametrize(
    "again",
    [
        copy.copy,
        copy.deepcopy,
        lambda model: pickle.loads(pickle.dumps(model)),
        lambda model: dataclasses.replace(model),
        lambda model: MLP(**dataclasses.asdict(model)),
    ],
    ids=["copy", "deepcopy", "pickle", "replace", "asdict"],
)
def test_copies_of_a_model(again: Callable[[MLP], MLP]) -> None:
    model = MLP(**SMALL, bias=True, init="authors")
    other = again(model)
    assert other == model
    assert same_weights(other, model)


def test_replace_draws_for_the_new_model() -> None:
    wider = dataclasses.replace(MLP(**SMALL), width=9, init="xavier")
    assert wider.init == "xavier"
    assert wider.init(seed=0)["layers/01/weight"].shape == (9, 9)
    assert same_weights(wider, MLP(**{**SMALL, "width": 9}, init="xavier"))
    with pytest.raises(dataclasses.FrozenInstanceError):
        wider.width = 3  # type: ignore[misc]


@pytest.mark.parametrize("field", ["depth", "width", "inputs", "outputs"])
def test_bad_sizes(field: str) -> None:
    with pytest.raises(Error, match=f"MLP: {field} must be at least 1; got 0"):
        MLP(**{**SMALL, field: 0})


def test_unknown_names() -> None:
    with pytest.raises(Error, match="unknown nonlinearity 'step'; use one of relu, leaky_relu"):
        MLP(**SMALL, nonlinearity="step")
    with pytest.raises(Error, match="unknown normalisation 'batch'; use one of none, spectral"):
        MLP(**SMALL, normalisation="batch")
    with pytest.raises(Error, match="unknown initialisation 'zeros'; use one of he, orthogonal"):
        MLP(**SMALL, init="zeros")
    with pytest.raises(Error, match="unknown dtype 'float16'; use float32 or float64"):
        MLP(**SMALL).init(seed=0, dtype="float16")
    with pytest.raises(Error, match="unknown device 'tpu'; use auto, cpu, cuda or cuda:N"):
        MLP(**SMALL).init(seed=0, device="tpu")
    with pytest.raises(Error, match="seed must lie in"):
        MLP(**SMALL).init(seed=-1)


def test_inputs_that_do_not_fit() -> None:
    model, params = small({"bias": True})
    with pytest.raises(Error, match=r"linear: expected x .* got \(9, 4\) and \(6, 5\)"):
        model(params, X[:, :4])
    with pytest.raises(KeyError, match="layers/02/bias"):
        model({n: w for n, w in params.items() if n != "layers/02/bias"}, X)


def test_a_subclass_trains_with_its_own_forward_pass() -> None:
    """Without buffers a model is called as `model(params, x)`, in both modes."""

    @dataclasses.dataclass(frozen=True)
    class Doubled(MLP):
        def __call__(self, params: Any, x: Any) -> Any:  # type: ignore[override]
            return 2 * super().__call__(params, x)

    model = Doubled(**SMALL)
    params, task = model.init(seed=0, dtype="float64"), Task(model, 4)
    expected = 2 * MLP(**SMALL)(params, X)
    np.testing.assert_array_equal(task.predict(params, {}, X, LABELS), expected)
    _, (logits, _) = task.forward(params, {}, X, LABELS, Random(0))
    np.testing.assert_array_equal(logits, expected)
