"""Portable arithmetic: training has the same bits under any BLAS, thread count, SIMD level and way
of running it.

Run as a script, this file prints digests of the runs below.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from backends import Backend
from cupy_standin import COMPILER, StandIn
from test_random import disabled

import npdrt
from npdrt import compute, exact, ops, slices
from npdrt.errors import Error
from npdrt.models import MLP, ResNet18, Transformer, initialisation
from npdrt.ops import convolution
from npdrt.program.cuda import WARM_UPS, CudaMemory
from npdrt.random import Random
from npdrt.train import Config, resume, train
from npdrt.train.step import State, Step, Task, make_step

ROOT = Path(__file__).parents[1]
STEPS = 3

# --- small runs -----------------------------------------------------------------------------------

Case = tuple[Any, Any, Any, Any, str]  # model, x, y, classes, rule


def cases() -> dict[str, Case]:
    """Model, batch, classes and rule of every run."""
    rng = np.random.default_rng(0)
    rows, labels = rng.normal(size=(32, 20)).astype("float32"), rng.integers(0, 10, 32)
    images = rng.normal(size=(6, 1, 9, 9)).astype("float32")
    words = rng.integers(0, 30, (7, 4))
    deep = MLP(50, 16, 20, 10, bias=True, nonlinearity="tanh")
    spectral = MLP(3, 16, 20, 10, init="orthogonal", nonlinearity="gelu", normalisation="spectral")
    language = Transformer(30, width=8, heads=2, hidden=12, dropout=0.2)
    return {
        "deep fromage": (deep, rows, labels, 10, "fromage"),
        "deep adam": (MLP(50, 16, 20, 10, nonlinearity="sigmoid"), rows, labels, 10, "adam"),
        "spectral": (spectral, rows, labels, 10, "sgd"),
        "resnet18": (ResNet18(10, (1, 9, 9), width=4), images, labels[:6], 10, "fromage"),
        "transformer with dropout": (language, words, words[::-1].copy(), 30, "adam"),
        "softplus, squared error": (MLP(2, 9, 20, 3, nonlinearity="softplus"), rows,
                                    rows[:, :3].copy(), None, "lars"),
    }  # fmt: skip


def step_of(case: Case) -> Callable[..., Step]:
    model, _, _, classes, rule = case
    return make_step(Task(model, classes), getattr(npdrt.optim, rule)(lr=0.01))


def start(case: Case) -> State:
    model, *_, rule = case
    params = model.init(seed=0)
    buffers = model.buffers(seed=0) if hasattr(model, "buffers") else {}
    return State(params, buffers, getattr(npdrt.optim, rule)(lr=0.01).init(params))


def run(case: Case, way: str) -> str:
    """The digest of parameters, buffers, optimizer state and losses after a few steps."""
    _, x, y, _, _ = case
    step, state, found = step_of(case), start(case), hashlib.sha256()
    if way != "eager":
        step = npdrt.record(step, state, x, y, 0.01, Random(0, "train"), fast=way == "fast")
    for number in range(STEPS):
        done = step(state, x, y, 0.01, Random(0, "train").at(number))
        state = done.state
        found.update(np.asarray(done.loss).tobytes())
    for part in (state.params, state.buffers, state.optimizer):
        for name, value in part.items():
            found.update(name.encode() + np.asarray(value).tobytes())
    return found.hexdigest()


def digests(way: str) -> dict[str, str]:
    with npdrt.arithmetic("portable"):
        return {name: run(case, way) for name, case in cases().items()}


@pytest.fixture(scope="module")
def here() -> dict[str, str]:
    return digests("replayed")


def test_eager_steps_are_the_same(here: dict[str, str]) -> None:
    assert digests("eager") == here


def test_compiled_loops_are_the_same(here: dict[str, str]) -> None:
    pytest.importorskip("numba")
    assert digests("fast") == here


ENVIRONMENTS = {
    "Haswell, two threads, no AVX-512": {
        "OPENBLAS_CORETYPE": "Haswell", "OPENBLAS_NUM_THREADS": "2",
        "NPY_DISABLE_CPU_FEATURES": disabled("AVX512", "X86_V4"),
    },
    "Prescott, one thread, the lowest SIMD level": {
        "OPENBLAS_CORETYPE": "Prescott", "OPENBLAS_NUM_THREADS": "1",
        "NPY_DISABLE_CPU_FEATURES": disabled(""),
    },
}  # fmt: skip


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_other_processes(name: str, here: dict[str, str]) -> None:
    environment = {**os.environ, **ENVIRONMENTS[name]}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    done = subprocess.run(
        [sys.executable, __file__], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["portable"] == here
    assert found["plain"] != plain_digest()  # the environment does change other products


def plain_digest() -> str:
    """Of a plain product and plain exponentials, whose bits depend on the environment."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 150, 150)).astype("float32")
    return hashlib.sha256((a @ b).tobytes() + np.exp(a).tobytes()).hexdigest()


# --- the switch -----------------------------------------------------------------------------------


def test_the_switch() -> None:
    a = np.random.default_rng(0).normal(size=(30, 30)).astype("float32")
    plain, portable = a @ a, exact.matmul(a, a)
    assert plain.tobytes() != portable.tobytes()
    assert ops.matmul(a, a).tobytes() == plain.tobytes()
    with npdrt.arithmetic("portable"):
        assert ops.matmul(a, a).tobytes() == portable.tobytes()
        with npdrt.arithmetic("fast"):
            assert ops.matmul(a, a).tobytes() == plain.tobytes()
        assert compute.is_portable()
    assert not compute.is_portable()
    with (
        pytest.raises(Error, match="unknown arithmetic 'exact'; use one of fast, portable"),
        npdrt.arithmetic("exact"),
    ):
        pass


def test_float64_is_refused() -> None:
    a, x = np.ones((2, 2)), np.ones((1, 1, 3, 3))
    with npdrt.arithmetic("portable"):
        with pytest.raises(Error, match="matmul: portable arithmetic has products of float32 only"):
            ops.matmul(a, a)
        with pytest.raises(Error, match="conv2d: portable arithmetic has products of float32"):
            ops.conv2d(x, x)


def test_a_program_keeps_its_arithmetic(tmp_path: Path) -> None:
    """Also in a file, whatever the arithmetic is where it is replayed."""
    rng = np.random.default_rng(0)
    a, x = rng.normal(size=(20, 20)).astype("float32"), rng.normal(size=(2, 3, 8, 8))
    args = (a, x.astype("float32"), rng.normal(size=(4, 2, 3, 3)).astype("float32"))

    def step(a: Any, x: Any, w: Any) -> Any:
        h = ops.softmax(ops.tanh(ops.matmul(a, a)))
        return ops.sum(h, axis=0), ops.conv2d(x, w, padding=1)

    found = {}
    for name in compute.ARITHMETICS:
        with npdrt.arithmetic(name):
            program = npdrt.record(step, *args)
            expected = b"".join(y.tobytes() for y in step(*args))
        program.save(tmp_path / f"{name}.json")
        read = npdrt.program.load(tmp_path / f"{name}.json")
        for other in compute.ARITHMETICS:
            with npdrt.arithmetic(other):
                for p in (program, read):
                    assert b"".join(y.tobytes() for y in p(*args)) == expected
        found[name] = (tmp_path / f"{name}.json").read_text()
    for text in ("exact_matmul", "portable_tanh", "portable_sum", '"form": "sliced"'):
        assert (text in found["portable"], text in found["fast"]) == (True, False)


EDGES = [0.0, 1.0, -1.5, 2.0, 1e-40, 3e38, np.inf, -2.0, 0.3, -np.inf, np.nan, -1e-20]


@pytest.mark.parametrize("p", [2.0, 3.0, 0.0, -1.0, 0.5, 2.5, 1.0, 7])
def test_powers(p: float) -> None:
    """Rounded once; NaN where a number below 0 has no real power."""
    x = np.array(EDGES, dtype="float32")
    with np.errstate(all="ignore"):
        expected = (x.astype("float64") ** p).astype("float32")
    expected[(x < 0) & (p % 1 != 0)] = np.nan  # NumPy's of -inf depends on p
    with npdrt.arithmetic("portable"):
        np.testing.assert_array_equal(ops.power(x, p), expected)
        np.testing.assert_array_equal(ops.power(x, np.full_like(x, p)), expected)


def test_sums_of_products_of_rows() -> None:
    a, b = np.random.default_rng(0).normal(size=(2, 3, 20_000)).astype("float32")
    exactly = (a.astype("float64") * b).sum(axis=1, keepdims=True)
    scale = np.abs(a * b).sum(axis=1, keepdims=True)
    with npdrt.arithmetic("portable"):
        assert (np.abs(compute.dots(a, b) - exactly) <= 2.0**-22 * scale).all()


# --- products, and their gradients ----------------------------------------------------------------


def test_gradients_of_a_deep_network_are_near_those_of_float64() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(32, 64)).astype("float32"), rng.integers(0, 10, 32)
    model = MLP(50, 128, 64, 10, bias=True, nonlinearity="tanh", init="xavier")
    params = model.init(seed=0)

    def gradients(dtype: str) -> Any:
        given = {name: w.astype(dtype) for name, w in params.items()}

        def loss(p: Any) -> Any:
            return ops.softmax_cross_entropy(model(p, x.astype(dtype)), y)

        return npdrt.value_and_grad(loss)(given)[1]

    def error(found: Any) -> float:
        return max(
            float(np.linalg.norm(g - wide[name]) / np.linalg.norm(wide[name]))
            for name, g in found.items()
        )

    wide, fast = gradients("float64"), gradients("float32")
    with npdrt.arithmetic("portable"):
        portable = gradients("float32")
    assert error(portable) < 1e-6 < error(fast)


def operands(shape: tuple[int, ...], seed: int) -> Any:
    """Numbers of many sizes, some lines with zeros or a number that is not finite."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=shape) * 10.0 ** rng.integers(-20, 18, (*shape[:-1], 1))
    x[..., 0] *= rng.integers(0, 2, shape[:-1])
    x[(0,) * (len(shape) - 1)] = 0.0
    return x.astype("float32")


SHAPES = [
    ((3, 5), (5, 7)), ((1, 70), (70, 1)), ((70, 30), (30, 20_000)), ((40, 1), (1, 9)),
    ((2, 3, 4, 5), (2, 3, 5, 6)), ((5, 4, 6), (6, 2)), ((3, 90, 200), (3, 200, 80)),
    ((3, 2, 90, 200), (200, 80)),
]  # fmt: skip


@pytest.mark.parametrize("shapes", SHAPES)
def test_the_form_of_numpy_is_the_definition(shapes: Any) -> None:
    """In panels, in stacks, of transposed operands, into given memory."""
    a, b = (operands(shape, seed) for seed, shape in enumerate(shapes))
    a[..., -1, 0], b[..., 0, -1] = np.inf, np.nan
    if a.shape[-2] == 1:
        a[..., -1, 0] = 1
    expected = exact.product_of_slices.definition(a, b)
    assert np.isfinite(expected).any() or b.shape[-1] == 1
    turned = [np.swapaxes(np.ascontiguousarray(np.swapaxes(x, -1, -2)), -1, -2) for x in (a, b)]
    wide = np.empty((*expected.shape[:-1], 2 * expected.shape[-1]), "float32")
    for x, y, out in ((a, b, None), (*turned, None), (a, turned[1], wide[..., ::2])):
        assert slices.multiply(x, y, out).tobytes() == expected.tobytes()


SETTINGS = [  # channels, outputs, size, kernel, stride, padding, groups
    (3, 5, (9, 8), 3, 1, 1, 1), (4, 6, (9, 9), 3, 2, 1, 2), (8, 4, (7, 7), 1, 1, 0, 1),
    (8, 4, (7, 7), 1, 2, 0, 1), (6, 6, (8, 8), 3, 1, 1, 6), (40, 3, (31, 33), 5, 3, 2, 1),
    (64, 64, (12, 12), 3, 1, 1, 1),
]  # fmt: skip


@pytest.mark.parametrize("setting", SETTINGS)
def test_products_of_convolutions(setting: Any) -> None:
    """Those of `exact.matmul` of the unfolded images; blocks and threads change nothing."""
    c, o, size, k, s, p, groups = setting
    x, w = operands((c, 3, *size), 0), operands((o, c // groups, k, k), 1)
    with npdrt.arithmetic("portable"):
        y, (gx, gw) = value_and_vjps(x, w, stride=s, padding=p, groups=groups)
    given = {"stride": (s, s), "padding": (p, p), "groups": groups, "form": "sliced"}
    g = operands(y.shape, 2)
    expected = convolution.convolve.definition(x, w, **given)
    assert y.tobytes() == expected.tobytes()
    of_x = convolution.convolve_input.definition(g, w, size=size, **given)
    of_w = convolution.convolve_weight.definition(g, x, size=(k, k), **given)
    assert gx(g).tobytes() == of_x.tobytes()
    assert gw(g).tobytes() == of_w.tobytes()
    if groups == 1:
        seen = unfolded(x, k, s, p)  # (C k k, positions)
        assert exact.matmul(w.reshape(o, -1), seen).tobytes() == y.tobytes()
        assert exact.matmul(g.reshape(o, -1), seen.T).tobytes() == of_w.tobytes()


def value_and_vjps(x: Any, w: Any, **setting: Any) -> Any:
    """The value of `conv2d`, and its derivatives by input and weight."""
    inputs = npdrt.autodiff.Tensor(x), npdrt.autodiff.Tensor(w)
    made = ops.conv2d(*inputs, **setting)
    return made.value, [vjp for _, vjp in made.edges]


def unfolded(x: Any, k: int, s: int, p: int) -> Any:
    padded = np.pad(x, ((0, 0), (0, 0), (p, p), (p, p)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (k, k), (2, 3))[:, :, ::s, ::s]
    moved = windows.transpose(0, 4, 5, 1, 2, 3)  # (C, k, k, N, oh, ow)
    return np.ascontiguousarray(moved).reshape(len(x) * k * k, -1)


def test_a_channel_that_is_not_finite() -> None:
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(3, 2, 6, 6)), rng.normal(size=(4, 3, 3, 3))
    x[1, 0, 3, 3] = np.inf
    with npdrt.arithmetic("portable"):
        y, (_, gw) = value_and_vjps(x.astype("float32"), w.astype("float32"), padding=1)
        found = gw(np.ones_like(y))
    assert np.isnan(y[:, 0, 2:5, 2:5]).all()
    assert np.isnan(y).sum() == 4 * 9
    assert np.isnan(found[:, 1]).all()
    assert np.isfinite(np.delete(found, 1, axis=1)).all()


# --- other libraries ------------------------------------------------------------------------------


def test_other_array_libraries(backend: Backend) -> None:
    _, x, y, _, _ = cases()["deep fromage"]
    model = MLP(4, 16, 20, 10, bias=True, nonlinearity="tanh", normalisation="spectral")
    params, buffers = model.init(seed=0), model.buffers(seed=0)

    def loss(p: Any, b: Any, x: Any, y: Any) -> Any:
        return ops.softmax_cross_entropy(model.apply(p, b, x, train=True)[0], y)

    def moved(tree: Any) -> Any:
        return {n: backend.asarray(v) for n, v in tree.items()}

    differentiated = npdrt.value_and_grad(loss)
    with npdrt.arithmetic("portable"):
        expected = differentiated(params, buffers, x, y)
        found = differentiated(
            moved(params), moved(buffers), backend.asarray(x), backend.asarray(y)
        )
    assert backend.to_host(found[0]).tobytes() == np.asarray(expected[0]).tobytes()
    for n, g in expected[1].items():
        assert backend.to_host(found[1][n]).tobytes() == g.tobytes()


def of_everything(p: Any, b: Any, x: Any, images: Any, y: Any) -> Any:
    model = MLP(3, 8, 20, 5, bias=True, nonlinearity="tanh", normalisation="spectral")
    logits, _ = model.apply(p, b, x, train=True)
    h = ops.batch_norm(ops.conv2d(images, p["w"], padding=1), channel_axis=0)
    return ops.softmax_cross_entropy(logits, y) + ops.mean(ops.gelu(h))


def of_a_few(p: Any, b: Any, x: Any, images: Any, y: Any) -> Any:
    h = ops.matmul(x, ops.transpose(p["layers/00/weight"]))
    return ops.squared_error(h, x[:, :8]) + ops.mean(ops.conv2d(images, p["w"], padding=1))


@pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")
@pytest.mark.parametrize("loss", [of_a_few, pytest.param(of_everything, marks=pytest.mark.soak)])
def test_a_gpu(loss: Any) -> None:
    """CuPy's stand-in: call by call and as a graph, the bits of a CPU."""
    rng = np.random.default_rng(0)
    x, images = (rng.normal(size=s).astype("float32") for s in ((9, 20), (2, 3, 6, 5)))
    model = MLP(3, 8, 20, 5, bias=True, normalisation="spectral")
    params, buffers = model.init(seed=0), model.buffers(seed=0)
    params["w"] = rng.normal(size=(3, 2, 3, 3)).astype("float32")
    device, step = StandIn(), npdrt.value_and_grad(loss)
    args = (params, buffers, x, images, np.arange(9) % 5)
    with npdrt.arithmetic("portable"):
        expected = npdrt.record(step, *args)(*args)
        program = npdrt.record(step, *args, memory=CudaMemory(device, device.blas))
    for _ in range(WARM_UPS + 2):
        found = program(*args)
        assert found[0].get().tobytes() == expected[0].tobytes()
        wrong = [n for n, g in expected[1].items() if found[1][n].get().tobytes() != g.tobytes()]
        assert not wrong
    assert program.graph, program.graph_error


# --- initial values -------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(7, 7), (9, 4), (4, 9), (5, 1), (1, 1)])
def test_orthogonal_weights(shape: tuple[int, int]) -> None:
    """Those of LAPACK but for rounding; the signs make the factorisation unique."""
    expected = initialisation.orthogonal(Random(0, "w"), shape)
    with npdrt.arithmetic("portable"):
        found = initialisation.orthogonal(Random(0, "w"), shape)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-14)


# --- whole runs -----------------------------------------------------------------------------------


def small(**more: Any) -> Config:
    options = {"depth": 3, "width": 12, "nonlinearity": "tanh"}
    given = {"epochs": 2, "batch_size": 300, "arithmetic": "portable", "model_options": options}
    return Config(**(given | more))


def parameters(out: Path) -> dict[str, bytes]:
    return {n: w.tobytes() for n, w in npdrt.load(out / "checkpoint.h5").params.items()}


def test_a_run_that_was_stopped(tmp_path: Path) -> None:
    """A run, and one that is stopped and goes on eagerly: the same parameters. Its checkpoint says
    the arithmetic, and it goes on in no other."""
    train(small(), tmp_path / "whole")
    stops = iter([0, 0, 15])
    train(small(), tmp_path / "parts", stop=lambda: next(stops))
    resume(tmp_path / "parts", eager=True)
    assert parameters(tmp_path / "parts") == parameters(tmp_path / "whole")
    meta = npdrt.load(tmp_path / "whole" / "checkpoint.h5").meta
    assert meta["config"]["arithmetic"] == "portable"
    assert meta["provenance"]["arithmetic"] == {"name": "portable", "version": compute.VERSION}
    train(small(arithmetic="fast"), tmp_path / "fast")
    assert "arithmetic" not in npdrt.load(tmp_path / "fast" / "checkpoint.h5").meta["provenance"]
    assert parameters(tmp_path / "fast") != parameters(tmp_path / "whole")


def test_what_a_configuration_refuses() -> None:
    for name, value in (("dtype", "float64"), ("precision", "tf32"), ("convolutions", "cudnn")):
        with pytest.raises(Error, match=f"arithmetic portable needs {name} .*; got {value}"):
            Config(arithmetic="portable", **{name: value})
    with pytest.raises(Error, match="unknown arithmetic 'exact'"):
        Config(arithmetic="exact")


if __name__ == "__main__":
    print(json.dumps({"portable": digests("replayed"), "plain": plain_digest()}))
