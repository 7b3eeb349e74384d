"""The spectrally normalised perceptron: values and gradients, rescaling, recording, resuming."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import backends
import numpy as np
import pytest
from test_program import check
from test_train import contents, fingerprints, settings, stop_after, write_blobs

from npdrt import Error, check_gradients, data, ops, optim, record, store, value_and_grad
from npdrt.arrays import to_host
from npdrt.autodiff import Tensor
from npdrt.errors import FileRefused
from npdrt.models import MLP
from npdrt.ops.spectral import power_iteration
from npdrt.random import Random
from npdrt.train import Reporter, resume, train
from npdrt.train.evaluation import evaluate
from npdrt.train.loop import Trainer
from npdrt.train.step import State, Task, make_step

OPTIONS: dict[str, Any] = {"depth": 3, "width": 6, "inputs": 5, "outputs": 4, "bias": True}
MODEL = MLP(**OPTIONS, nonlinearity="tanh", init="authors", normalisation="spectral")
X = Random(0, "inputs").normal((9, 5))
LABELS = Random(0, "labels").words(9).astype(np.int64) % 4


def start(dtype: str = "float64") -> tuple[Any, Any]:
    """Parameters and buffers of `MODEL`."""
    return MODEL.init(seed=1, dtype=dtype), MODEL.buffers(seed=1, dtype=dtype)


def training_loss(params: Any, buffers: Any, x: Any = X, y: Any = LABELS) -> Any:
    """`(loss, (logits, buffers))` of a forward pass in training mode."""
    logits, buffers = MODEL.apply(params, buffers, x, train=True)
    return ops.softmax_cross_entropy(logits, y), (logits, buffers)


def evaluation_loss(params: Any, buffers: Any) -> Any:
    return ops.softmax_cross_entropy(MODEL(params, X, buffers=buffers), LABELS)


def weights(params: Any) -> list[str]:
    return [name for name in params if name.endswith("weight")]


# --- the estimate ----------------------------------------------------------------------------


def test_power_iteration_is_its_formula() -> None:
    w, u = Random(3).normal((4, 7)), np.array([0.5, 0.5, -0.5, 0.5])
    v = w.T @ u / math.sqrt((w.T @ u) @ (w.T @ u))
    moved = w @ v / math.sqrt((w @ v) @ (w @ v))
    for iterate, left in ((True, moved), (False, u)):
        found_u, found_v = power_iteration(w, u, iterate=iterate)
        np.testing.assert_allclose(found_u, left, rtol=0, atol=1e-15)
        np.testing.assert_allclose(found_v, v, rtol=0, atol=1e-15)
    normalised = ops.spectral_normalise(w, moved, v)
    np.testing.assert_allclose(normalised, w / np.linalg.norm(w @ v), rtol=1e-14)


def test_iterations_find_the_singular_value() -> None:
    w = Random(4).normal((6, 9))
    u = np.eye(6)[0]
    for _ in range(300):
        u, v = power_iteration(w, u, iterate=True)
    largest = np.linalg.svd(ops.spectral_normalise(w, u, v), compute_uv=False)[0]
    assert abs(largest - 1) < 1e-12


def test_a_zero_weight_stays_zero_and_keeps_u() -> None:
    u, w = np.array([0.6, 0.8]), np.zeros((2, 3))
    moved, v = power_iteration(w, u, iterate=True)
    np.testing.assert_array_equal(moved, u)
    np.testing.assert_array_equal(ops.spectral_normalise(w, moved, v), w)
    _, grads = value_and_grad(lambda p: ops.sum(ops.spectral_normalise(p["w"], u, v)))({"w": w})
    np.testing.assert_array_equal(grads["w"], np.ones((2, 3)))


def test_shapes_that_do_not_fit() -> None:
    w, u = np.ones((2, 3)), np.ones(3)
    with pytest.raises(Error, match=r"power_iteration: .* got \(2, 3\) and \(3,\)"):
        power_iteration(w, u, iterate=True)
    with pytest.raises(Error, match=r"spectral_normalise: .* got \(2, 3\), \(3,\) and \(3,\)"):
        ops.spectral_normalise(w, u, u)


# --- values and gradients --------------------------------------------------------------------


def test_only_the_weights_are_normalised() -> None:
    """The logits are those of a plain perceptron whose weights were normalised beforehand."""
    params, buffers = start()
    plain = MLP(**OPTIONS, nonlinearity="tanh", init="authors")
    by_hand = dict(params)
    for name in weights(params):
        u, v = power_iteration(params[name], buffers[name.replace("weight", "u")], iterate=False)
        by_hand[name] = params[name] / (u @ params[name] @ v)
    found = MODEL(params, X, buffers=buffers)
    np.testing.assert_allclose(found, plain(by_hand, X), rtol=1e-13)
    assert plain.buffers(seed=1) == {}
    assert list(plain.init(seed=1)) == list(params)


def test_modes() -> None:
    """Training mode moves every u by one iteration; evaluation mode moves none."""
    params, buffers = start()
    _, moved = MODEL.apply(params, buffers, X, train=True)
    for name in weights(params):
        u = name.replace("weight", "u")
        np.testing.assert_array_equal(
            moved[u], power_iteration(params[name], buffers[u], iterate=True)[0]
        )
    logits, kept = MODEL.apply(params, moved, X, train=False)
    assert all(kept[name] is moved[name] for name in moved)
    np.testing.assert_array_equal(logits, MODEL(params, X, buffers=moved))


@pytest.mark.parametrize("directions", [None, 3])
def test_gradients_equal_the_complex_step(directions: int | None) -> None:
    """With u held, d|W^T u| = u^T dW v: the rule is the whole derivative in evaluation mode."""
    params, buffers = start()
    found = check_gradients(
        lambda p: evaluation_loss(p, buffers), params, directions=directions, method="complex"
    )
    assert found.error < 1e-12


def torch_twin(torch: Any, params: Any, buffers: Any) -> Any:
    """The perceptron in PyTorch. Its iteration begins with v, so it gets the transposed roles."""
    from torch.nn.utils.parametrizations import spectral_norm

    layers: list[Any] = []
    for name in weights(params):
        n_out, n_in = params[name].shape
        layer = torch.nn.Linear(n_in, n_out, dtype=torch.float64)
        layer.weight.data = torch.from_numpy(params[name].copy())
        layer.bias.data = torch.from_numpy(params[name.replace("weight", "bias")].copy())
        layer = spectral_norm(layer, dim=1)
        u = buffers[name.replace("weight", "u")]
        layer.parametrizations.weight[0]._v.copy_(torch.from_numpy(u.copy()))
        layers += [layer, torch.nn.Tanh()]
    return torch.nn.Sequential(*layers[:-1]).train()


def test_equals_pytorch() -> None:
    """Logits, gradients and u over three passes in training mode."""
    torch = pytest.importorskip("torch")
    params, buffers = start()
    twin = torch_twin(torch, params, buffers)
    for _ in range(3):
        (_, (logits, buffers)), grads = value_and_grad(training_loss, has_aux=True)(params, buffers)
        twin.zero_grad()
        theirs = twin(torch.from_numpy(X))
        torch.nn.functional.cross_entropy(theirs, torch.from_numpy(LABELS)).backward()
        np.testing.assert_allclose(logits, theirs.detach().numpy(), rtol=1e-11)
        for layer, name in zip(twin[::2], weights(params), strict=True):
            g = layer.parametrizations.weight.original.grad.numpy()
            np.testing.assert_allclose(grads[name], g, rtol=0, atol=1e-12 * np.abs(g).max())
            u = layer.parametrizations.weight[0]._v.numpy()
            np.testing.assert_allclose(buffers[name.replace("weight", "u")], u, atol=1e-13)


def test_every_backend(backend: backends.Backend) -> None:
    params, buffers = start()
    expected, grads = value_and_grad(training_loss, has_aux=True)(params, buffers)
    on_it = ({n: backend.asarray(a) for n, a in d.items()} for d in (params, buffers))
    x, y = backend.asarray(X), backend.asarray(LABELS)
    (loss, (_, moved)), found = value_and_grad(training_loss, has_aux=True)(*on_it, x, y)
    assert abs(float(backend.to_host(loss)) - float(expected[0])) < 1e-12
    for ours, theirs in ((found, grads), (moved, expected[1][1])):
        for name, value in theirs.items():
            np.testing.assert_allclose(backend.to_host(ours[name]), value, atol=1e-12)


# --- rescaling -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_gradient_is_orthogonal_to_the_weight(dtype: str) -> None:
    params, buffers = start(dtype)
    x, tiny = X.astype(dtype), np.finfo(dtype).eps
    for _ in range(3):
        (_, (_, buffers)), grads = value_and_grad(training_loss, has_aux=True)(params, buffers, x)
        for name in weights(params):
            g, w = grads[name].astype(float), params[name].astype(float)
            assert np.linalg.norm(g) > 1e-3
            assert abs((g * w).sum()) <= 4 * tiny * np.linalg.norm(g) * np.linalg.norm(w)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("train", [False, True])
def test_doubled_weights_change_no_bit(dtype: str, train: bool) -> None:
    params, buffers = start(dtype)
    doubled = {name: w * 2 if name.endswith("weight") else w for name, w in params.items()}
    x = X.astype(dtype)
    expected = MODEL.apply(params, buffers, x, train=train)
    found = MODEL.apply(doubled, buffers, x, train=train)
    assert found[0].dtype == dtype
    assert found[0].tobytes() == expected[0].tobytes()
    assert fingerprints(found[1]) == fingerprints(expected[1])


def test_the_lesion_grows_and_fromage_does_not() -> None:
    """Orthogonal gradients: LARS's lesion multiplies each norm by sqrt(1 + lr^2) a step, and the
    prefactor of Fromage keeps it (Bernstein et al. 2020, Figure 2 right)."""
    task = Task(MODEL, 4)
    for rule, growth in ((optim.lars_lesion, math.sqrt(1 + 0.1**2)), (optim.fromage, 1.0)):
        optimizer = rule(lr=0.1)
        params, buffers = start()
        state = State(params, buffers, optimizer.init(params))
        step = make_step(task, optimizer)
        for number in range(20):
            state = step(state, X, LABELS, 0.1, Random(0, "train", number)).state
        for name in weights(params):
            grown = np.linalg.norm(state.params[name]) / np.linalg.norm(params[name])
            assert grown == pytest.approx(growth**20, rel=1e-12)


# --- buffers ---------------------------------------------------------------------------------


def test_first_buffers() -> None:
    """Unit vectors from (seed, name), rounded once; a layer keeps its own in a deeper net."""
    wide, narrow = MODEL.buffers(seed=5, dtype="float64"), MODEL.buffers(seed=5)
    assert {n: u.shape for n, u in wide.items()} == {
        "layers/00/u": (6,), "layers/01/u": (6,), "layers/02/u": (4,)
    }  # fmt: skip
    for name, u in wide.items():
        assert abs(np.linalg.norm(u) - 1) < 1e-15
        assert narrow[name].dtype == np.float32
        np.testing.assert_array_equal(narrow[name], u.astype(np.float32))
    drawn = Random(5, "init").of("layers/01/u").normal(6)
    np.testing.assert_allclose(wide["layers/01/u"], drawn / np.linalg.norm(drawn), rtol=1e-15)
    deep = MLP(**{**OPTIONS, "depth": 7}, normalisation="spectral").buffers(seed=5, dtype="float64")
    np.testing.assert_array_equal(deep["layers/01/u"], wide["layers/01/u"])


def test_missing_buffers() -> None:
    params, _ = start()
    says = re.escape("needs the buffer layers/00/u; start from model.buffers(seed)")
    with pytest.raises(Error, match=says):
        MODEL(params, X)
    with pytest.raises(Error, match=says):
        MODEL.apply(params, {}, X, train=True)


def test_arguments_are_not_written_to() -> None:
    params, buffers = start()
    given, before = dict(buffers), fingerprints(buffers)
    for array in (*params.values(), *buffers.values()):
        array.setflags(write=False)
    MODEL.apply(params, given, X, train=True)
    assert fingerprints(given) == before


def test_vectors_are_constants() -> None:
    """Nothing flows to u and v, nor through the iteration."""
    w = Tensor(Random(1).normal((3, 2)))
    u, v = power_iteration(w, np.array([1.0, 0.0, 0.0]), iterate=True)
    assert not isinstance(u, Tensor)
    assert not isinstance(v, Tensor)
    assert [parent for parent, _ in ops.spectral_normalise(w, u, v).edges] == [w]


# --- programs and training -------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("rule", [optim.fromage, optim.adam], ids=["fromage", "adam"])
def test_a_recorded_step_has_the_bits_of_the_eager_one(dtype: str, rule: Any) -> None:
    optimizer = rule(lr=0.01)
    params, buffers = start(dtype)
    step = make_step(Task(MODEL, 4), optimizer, traced=True)

    def training(state: Any, x: Any, y: Any, lr: Any) -> Any:
        done = step(State(*state), x, y, lr, Random(0, "train"))
        after = done.state
        return (after.params, after.buffers, after.optimizer), done.loss, done.measured

    program = check(
        training, (params, buffers, optimizer.init(params)), X.astype(dtype), LABELS, 0.01
    )
    assert "layers/01/normalised" in program.listing()


def spectral(blobs: Path, **changes: Any) -> Any:
    options = {"depth": 3, "width": 5, "normalisation": "spectral"}
    return settings(blobs, model_options=options, **changes)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a data set and a whole run."""
    folder = tmp_path_factory.mktemp("spectral")
    train(spectral(write_blobs(folder / "blobs.npz")), folder / "whole")
    return folder


def test_resuming_gives_the_same_bits(runs: Path, tmp_path: Path) -> None:
    train(spectral(runs / "blobs.npz"), tmp_path / "parts", stop=stop_after(3))
    resume(tmp_path / "parts", stop=stop_after(9))
    resume(tmp_path / "parts")
    assert contents(tmp_path / "parts") == contents(runs / "whole")


def test_eager_training_gives_the_same_bits(runs: Path, tmp_path: Path) -> None:
    train(spectral(runs / "blobs.npz", eager=True), tmp_path / "eager")
    found, expected = contents(tmp_path / "eager"), contents(runs / "whole")
    assert [found[k] for k in ("params", "buffers")] == [expected[k] for k in ("params", "buffers")]


def test_training_moves_the_buffers_and_evaluates_with_them(runs: Path) -> None:
    checkpoint = store.load(runs / "whole" / "checkpoint.h5")
    config = spectral(runs / "blobs.npz")
    dataset = data.load(config.data, standardise=config.standardise)
    trainer = Trainer(config, dataset, runs / "whole", Reporter())
    first = trainer.fresh().state
    assert list(checkpoint.buffers) == list(first.buffers) == [f"layers/0{i}/u" for i in range(3)]
    assert not np.array_equal(checkpoint.buffers["layers/01/u"], first.buffers["layers/01/u"])
    state = State(checkpoint.params, checkpoint.buffers, {})
    loss, _ = evaluate(trainer.task, state, *trainer.feed.train)
    logits = trainer.model(checkpoint.params, trainer.feed.train[0], buffers=checkpoint.buffers)
    expected = ops.softmax_cross_entropy(logits, trainer.feed.train[1])
    assert float(to_host(loss)) == pytest.approx(float(expected), rel=1e-6)


def test_a_checkpoint_without_the_buffers_is_refused(runs: Path, tmp_path: Path) -> None:
    train(spectral(runs / "blobs.npz"), tmp_path / "run", stop=stop_after(3))
    path = tmp_path / "run" / "checkpoint.h5"
    found = store.load(path)
    (tmp_path / "run" / "checkpoint.prev.h5").unlink()
    store.save(path, found.params, buffers={}, state=found.state, meta=found.meta)
    with pytest.raises(FileRefused, match="the buffer layers/00/u of the model is missing"):
        resume(tmp_path / "run")


@pytest.mark.parametrize("fast", [False, True])
def test_a_wider_net_replays_to_the_same_bits(fast: bool) -> None:
    """Products large enough for the kernels of BLAS, with compiled loops and without."""
    if fast:
        pytest.importorskip("numba")
    model = MLP(depth=2, width=130, inputs=70, outputs=10, normalisation="spectral")

    def loss(params: Any, buffers: Any, x: Any, y: Any) -> Any:
        logits, moved = model.apply(params, buffers, x, train=True)
        return ops.softmax_cross_entropy(logits, y), moved

    step = value_and_grad(loss, has_aux=True)
    x, y = Random(2).normal((32, 70)).astype("float32"), np.arange(32) % 10
    args = model.init(seed=0), model.buffers(seed=0), x, y
    (expected_loss, expected_moved), expected = step(*args)
    (found_loss, moved), grads = record(step, *args, fast=fast)(*args)
    assert float(found_loss) == float(expected_loss)
    assert fingerprints(grads) == fingerprints(expected)
    assert fingerprints(moved) == fingerprints(expected_moved)
