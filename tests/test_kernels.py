"""The kernels of `npdrt.kernels`: each against its definition, and the primitives that are made of
them against those of the CPU. On the stand-in for CuPy, and where there is a device."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cupy_standin import COMPILER, StandIn

from npdrt import arrays, ops, optim, record, value_and_grad
from npdrt.errors import FileRefused
from npdrt.kernels import KERNELS, convolution
from npdrt.models import BERT, ResNet18, Transformer
from npdrt.ops import convolution as products
from npdrt.ops import rows
from npdrt.ops.normalisation import batch_statistics, running_statistics
from npdrt.program import load
from npdrt.program.cuda import WARM_UPS, CudaMemory
from npdrt.program.memory import Memory
from npdrt.random import Random

needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
BOUNDS = {"float32": 1e-5, "float64": 1e-12}
Case = tuple[tuple[Any, ...], dict[str, Any]]  # the arrays and settings of a call


def normal(*shape: int, dtype: str, seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def error(found: Any, expected: Any) -> float:
    """The largest error, relative to the largest number."""
    found, expected = np.asarray(arrays.to_host(found), "d"), np.asarray(expected, "d")
    assert found.shape == expected.shape
    scale = max(np.max(np.abs(expected), initial=0.0), 1e-30)
    return float(np.max(np.abs(found - expected), initial=0.0)) / scale


# --- each kernel against its definition --------------------------------------------------------


def functions(name: str) -> Any:
    return getattr(products if name in convolution.KERNELS else rows, name)


def convolutions(
    image: tuple[int, ...],
    kernel: tuple[int, ...],
    stride: Any,
    padding: Any,
    groups: int,
    dtype: str,
) -> Iterator[tuple[str, Case]]:
    """The three products of a convolution of images (C, N, H, W) and a kernel (O, kh, kw)."""
    x, w = (
        normal(*image, dtype=dtype),
        normal(kernel[0], image[0] // groups, *kernel[1:], dtype=dtype),
    )
    setting = {"stride": stride, "padding": padding, "groups": groups}
    g = normal(*products.convolve(x, w, **setting).shape, dtype=dtype, seed=1)
    yield "convolve", ((x, w), setting)
    yield "convolve_input", ((g, w), {**setting, "size": image[2:]})
    yield "convolve_weight", ((g, x), {**setting, "size": kernel[1:]})


def norms(count: int, length: int, dtype: str) -> Iterator[tuple[str, Case]]:
    """Of a matrix with so many rows."""
    x, g = 2 + normal(count, length, dtype=dtype), normal(count, length, dtype=dtype, seed=1)
    mean, variance = rows.row_moments(x, length=length)
    by_row, by_column = (normal(n, dtype=dtype, seed=2) for n in (count, length))
    of_x, eps = (x, mean, variance), {"eps": 1e-5}
    yield "row_moments", ((x,), {"length": length})
    yield "row_dots", ((x, g), {})
    yield "column_sums", ((g, *of_x), eps)
    for row, vector in ((True, by_row), (False, by_column)):
        affine = {**eps, "bias": row, "by_row": row}
        yield "row_normal", ((*of_x, vector), {**affine, "gain": not row})
        yield "row_normal", ((*of_x, *[vector] * (1 + row)), {**affine, "gain": True})
        given = () if row else (vector,)
        sums = rows.row_sums(g, *of_x, *given, **eps)
        yield "row_sums", ((g, *of_x, *given), eps)
        yield "row_normal_input", ((g, *of_x, sums, vector), {**eps, "by_row": row})
        yield "row_normal_input", ((g, *of_x, sums), {**eps, "by_row": row})


def softmaxes(count: int, length: int, dtype: str) -> Iterator[tuple[str, Case]]:
    """Of a matrix with so many rows, and of scores of two heads."""
    z, g = 4 * normal(count, length, dtype=dtype), normal(count, length, dtype=dtype, seed=1)
    labels = np.random.default_rng(2).integers(-1, length + 1, (count, 1))  # some out of range
    z[0, min(max(labels[0, 0], 0), length - 1)] = 50.0  # a label whose softmax is near 1
    settings = {"scale": 0.7, "causal": False, "empty": False}
    yield "row_softmax", ((z,), settings)
    yield "row_softmax_input", ((g, rows.row_softmax(z, **settings)), {"scale": 0.7})
    scores = normal(3, 2, count, length, dtype=dtype)
    for shape in ((1, 2, 1, length), (3, 1, count, 1), (3, 2, count, length)):
        mask = np.where(normal(*shape, dtype=dtype) > 0.5, -np.inf, 0.1).astype(dtype)
        yield "row_softmax", ((scores, mask), {"scale": 0.7, "causal": True, "empty": True})
    for smoothing in (0.0, 0.1):
        found = rows.row_cross_entropy(z, labels, smoothing=smoothing)
        yield "row_cross_entropy", ((z, labels), {"smoothing": smoothing})
        arguments = (np.asarray(0.3, dtype), z, labels, found)
        yield "row_cross_entropy_input", (arguments, {"smoothing": smoothing})


def small(dtype: str) -> list[tuple[str, Case]]:
    """A few cases of every kernel."""
    geometry = (4, 2, 5, 7), (6, 3, 2), (2, 3), (1, 1), 2
    return [*convolutions(*geometry, dtype), *norms(3, 40, dtype), *softmaxes(3, 40, dtype)]


def many(dtype: str) -> list[tuple[str, Case]]:
    """More sizes: long rows, many rows, and windows of all sorts."""
    found = small(dtype)
    for sizes in ((2, 9001), (300, 7), (130, 33), (1, 1)):
        found += [*norms(*sizes, dtype), *softmaxes(*sizes, dtype)]
    for geometry in (
        ((3, 2, 8, 8), (5, 3, 3), (1, 1), (1, 1), 1),
        ((4, 3, 9, 8), (6, 1, 1), (3, 2), (2, 1), 1),  # pixels that no tap sees
        ((6, 2, 5, 6), (6, 3, 3), (2, 3), (2, 2), 6),
        ((2, 1, 11, 12), (3, 7, 7), (2, 2), (3, 3), 1),
        ((2, 3, 30, 33), (3, 3, 3), (1, 1), (1, 1), 1),  # the derivative by the weight in parts
        ((70, 2, 6, 6), (66, 3, 3), (1, 1), (1, 1), 1),
    ):
        found += convolutions(*geometry, dtype)
    return found


@pytest.mark.parametrize("dtype", BOUNDS)
def test_a_definition_has_the_form_of_its_kernel(dtype: str) -> None:
    cases = small(dtype)
    assert {name for name, _ in cases} == set(KERNELS)
    for name, (given, settings) in cases:
        y = functions(name)(*given, **settings)
        assert (y.shape, y.dtype) == (KERNELS[name].shape(*given, **settings), dtype), name


def compute(name: str, case: Case, device: Any) -> Any:
    """A kernel on a device, from copies that are filled anew."""
    given, settings = case
    return functions(name)(*map(device, given), **settings)


@needs_compiler
def test_kernels_are_their_definitions() -> None:
    device = StandIn()
    for name, case in small("float32"):
        found = compute(name, case, device.asarray)
        assert error(found, functions(name)(*case[0], **case[1])) <= 1e-5, name
    ran = {name for kind, *_, name in device.events if kind == "run"}
    assert len(ran) == len(KERNELS) - 2, "one kernel for three convolutions"


@needs_compiler
def test_an_array_that_is_not_contiguous_is_copied() -> None:
    x, device = normal(6, 40, dtype="float32"), StandIn()
    found = rows.row_dots(device.asarray(x)[::2, :], device.asarray(x)[1::2, :])
    assert error(found, rows.row_dots(x[::2], x[1::2])) <= 1e-6
    assert found.flags.c_contiguous


MISFITS: dict[str, list[Callable[[Any], Any]]] = {
    "row_moments": [lambda x: ((x,), {"length": 7}), lambda x: ((x,), {"length": 0})],
    "row_dots": [lambda x: ((x, x[:2]), {})],
    "column_sums": [lambda x: ((x, x[:2], x[:, 0], x[:, 0]), {"eps": 0.0})],
    "row_sums": [
        lambda x: ((x, x, x[:, 0], x[0, :]), {"eps": 0.0}),
        lambda x: ((x, x, x[:, 0], x[:, 0], x[:, 0]), {"eps": 0.0}),
    ],
    "row_normal": [
        lambda x: (
            (x, x[:, 0], x[:, 0], x[:, 0]),
            {"eps": 0.0, "gain": True, "bias": True, "by_row": True},
        ),
    ],
    "row_normal_input": [lambda x: ((x, x, x[:, 0], x[:, 0], x[:3]), {"eps": 0.0, "by_row": True})],
    "row_softmax": [
        lambda x: ((x, x[:2]), {"scale": 1.0, "causal": False, "empty": False}),
        lambda x: ((x, x[0]), {"scale": 1.0, "causal": False, "empty": False}),
    ],
    "row_softmax_input": [lambda x: ((x, x[:2]), {"scale": 1.0})],
    "row_cross_entropy": [
        lambda x: ((x, np.zeros((2, 1), np.int64)), {"smoothing": 0.0}),
        lambda x: ((x, np.zeros((4, 1), np.int32)), {"smoothing": 0.0}),
    ],
    "row_cross_entropy_input": [
        lambda x: ((x[0, 0], x, np.zeros((4, 1), np.int64), x[:3]), {"smoothing": 0.0})
    ],
    "convolve": [
        lambda x: ((x[None], x[None]), {"stride": (1, 1), "padding": (0, 0), "groups": 1})
    ],
}


@pytest.mark.parametrize("name", MISFITS)
def test_shapes_that_do_not_fit_are_refused(name: str) -> None:
    """A kernel would read beyond its arrays: so it is asked before it is launched, and so are the
    calls of a file."""
    for misfit in MISFITS[name]:
        given, settings = misfit(normal(4, 5, dtype="float32"))
        with pytest.raises((ValueError, TypeError)):
            KERNELS[name].shape(*given, **settings)


@pytest.fixture
def gpu() -> Any:
    try:
        return arrays._import_cupy()
    except arrays.Unavailable as unavailable:
        pytest.skip(str(unavailable))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", BOUNDS)
def test_gpu_kernels_are_their_definitions(dtype: str, gpu: Any) -> None:
    for name, case in many(dtype):
        found, again = (compute(name, case, gpu.asarray) for _ in range(2))
        shapes = [x.shape for x in case[0]], case[1]
        assert found.tobytes() == again.tobytes(), (name, shapes)
        assert error(found, functions(name)(*case[0], **case[1])) <= BOUNDS[dtype], (name, shapes)


@pytest.mark.gpu
def test_gpu_tiles_have_the_same_bits(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    geometry = (70, 2, 6, 6), (66, 3, 3), (1, 1), (1, 1), 1
    for name, case in convolutions(*geometry, "float32"):
        results = set()
        for tile in ((4, 4), (4, 8), (8, 4), (8, 8)):
            monkeypatch.setattr(convolution, "_tile", lambda *_, tile=tile: tile)
            results.add(compute(name, case, gpu.asarray).tobytes())
        assert len(results) == 1, name


# --- the primitives ----------------------------------------------------------------------------


def primitives(dtype: str) -> dict[str, tuple[Any, dict[str, Any]]]:
    """Functions of parameters, with their parameters."""
    make = partial(normal, dtype=dtype)
    image = {"x": make(5, 7, 9, 8) + 2, "g": make(5), "b": make(5)}
    heads = {"q": make(2, 3, 5, 8), "k": make(2, 3, 6, 8), "v": make(2, 3, 6, 4)}
    labels, keep = np.array([3, 0, 9, 4]), normal(2, 3, 5, 6, dtype="float64") > -0.5
    padding = np.arange(6)[None, None, None, :] < np.array([4, 0])[:, None, None, None]
    attend: Any = lambda p, *given, **settings: ops.attention(  # noqa: E731
        p["q"], p["k"], p["v"], *[None if a is None else like(p["q"], a) for a in given], **settings
    )
    return {
        "layer_norm": (
            lambda p: ops.layer_norm(p["x"], p["g"], p["b"]),
            {"x": make(70, 5, 33) + 3, "g": make(33), "b": make(33)},
        ),
        "layer_norm of two axes": (
            lambda p: ops.layer_norm(p["x"], p["g"], axes=(1, 2)),
            {"x": make(7, 5, 33), "g": make(5, 33)},
        ),
        "batch_norm": (lambda p: ops.batch_norm(p["x"], p["g"], p["b"], channel_axis=0), image),
        "batch_norm of columns": (
            lambda p: ops.batch_norm(p["x"], p["g"], channel_axis=1),
            {"x": make(9, 5), "g": make(5)},
        ),
        "batch_norm with statistics": (_with_statistics, image),
        "group_norm": (
            lambda p: ops.group_norm(p["x"], p["g"], groups=2, channel_axis=1),
            {"x": make(5, 4, 6, 6), "g": make(4)},
        ),
        "weight_norm": (
            lambda p: ops.weight_norm(p["x"], p["g"]),
            {"x": make(5, 7, 9), "g": make(5)},
        ),
        "softmax": (lambda p: ops.softmax(p["x"]), {"x": 4 * make(2, 1, 5, 2, 77)}),
        "cross_entropy": (
            lambda p: ops.softmax_cross_entropy(p["x"], like(p["x"], labels)),
            {"x": 9 * make(4, 10)},
        ),
        "smoothed cross_entropy": (
            lambda p: ops.softmax_cross_entropy(
                p["x"], like(p["x"], labels.astype("uint8")), label_smoothing=0.1
            ),
            {"x": make(4, 1000)},
        ),
        "attention": (attend, heads),
        "causal attention": (partial(attend, causal=True, scale=0.3), heads),
        "padded attention": (lambda p: attend(p, padding), heads),
        "attention with dropout": (lambda p: attend(p, None, keep, rate=0.3), heads),
        "attention with a bias": (
            lambda p: ops.attention(p["q"], p["k"], p["v"], p["mask"]),
            {**heads, "mask": make(3, 1, 6)},
        ),
        "conv2d": (
            lambda p: ops.conv2d(p["x"], p["w"], p["b"], stride=2, padding=1),
            {**image, "w": make(4, 5, 3, 3), "b": make(4)},
        ),
    }


def _with_statistics(p: Any) -> Any:
    found = batch_statistics(p["x"], channel_axis=0)
    mean, variance = running_statistics(found.mean, found.variance, found)
    y = ops.batch_norm(p["x"], p["g"], p["b"], found, channel_axis=0)
    return y + arrays.namespace(mean).reshape(mean * variance, (-1, 1, 1, 1))


def like(x: Any, host: Any) -> Any:
    """A host array in the library of the array or Tensor x."""
    return arrays.namespace(getattr(x, "value", x)).asarray(host)


def step_of(function: Any) -> Any:
    """The value of a function and the gradient of a weighted sum of it."""

    def loss(p: Any) -> Any:
        y = function(p)
        weights = np.cos(np.arange(max(1, int(np.prod(y.shape))))).reshape(y.shape)
        return ops.sum(y * like(y, weights.astype(str(y.dtype)))), y

    def step(params: Any) -> Any:
        (_, y), grads = value_and_grad(loss, has_aux=True)(params)
        return {"y": y, **grads}

    return step


NAMES = list(primitives("float64"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("name", NAMES)
def test_gpu_primitives_are_those_of_the_cpu(name: str, dtype: str, gpu: Any) -> None:
    """Eager, and to the bit the same in a program and its graph."""
    function, params = primitives(dtype)[name]
    step, given = step_of(function), {n: gpu.asarray(x) for n, x in params.items()}
    eager, expected, program = step(given), step(params), record(step, given)
    errors = {n: error(eager[n], x) for n, x in expected.items()}
    assert max(errors.values()) <= BOUNDS[dtype], errors
    for _ in range(WARM_UPS + 2):
        found = program(given)
        assert [n for n in eager if found[n].tobytes() != eager[n].tobytes()] == []
    assert program.graph, program.graph_error


# --- programs ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_program_for_a_gpu_runs_on_the_cpu(name: str, tmp_path: Path) -> None:
    """It has the kernels' calls, a program for the CPU has none; saved, it is the same program."""
    function, params = primitives("float64")[name]
    step, device = step_of(function), StandIn()
    program = record(step, params, memory=CudaMemory(device, device.blas))
    plain, called = record(step, params), {call.function for call in program.calls}
    own = called & set(KERNELS)
    assert own or "columns" in name
    assert not {call.function for call in plain.calls} & (set(KERNELS) - set(convolution.KERNELS))
    program.save(tmp_path / "step.json")
    read, expected = load(tmp_path / "step.json"), step(params)
    assert read.listing() == program.listing()
    found = read(params)
    assert {n: error(found[n], x) for n, x in expected.items() if error(found[n], x) > 1e-12} == {}


def test_attention_for_a_gpu_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the scores are too many, two heads at a time, and the probabilities are made again."""
    module = sys.modules["npdrt.ops.attention"]
    device, counts = StandIn(), []
    for at_once in (1 << 26, 60):
        monkeypatch.setattr(module, "at_once", lambda x, cached, n=at_once: n)
        monkeypatch.setattr(module, "KEPT", 0)
        for name in ("attention with dropout", "attention with a bias"):
            function, params = primitives("float64")[name]
            step, expected = step_of(function), step_of(function)(params)
            program = record(step, params, memory=CudaMemory(device, device.blas))
            counts.append([call.function for call in program.calls].count("row_softmax"))
            program.memory = Memory()
            found = program(params)
            assert max(error(found[n], x) for n, x in expected.items()) <= 1e-12
    assert counts == [1, 1, 8, 12], "4 blocks forward, backward, and for the bias"


def test_a_file_with_a_call_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    function, params = primitives("float64")["layer_norm"]
    device, path = StandIn(), tmp_path / "step.json"
    program = record(step_of(function), params, memory=CudaMemory(device, device.blas))
    program.save(path)
    text = path.read_text()
    assert '"length": 33' in text
    for wrong in ('"length": 11', '"length": "left"', '"length": 33.0', '"length": 33, "eps": 0.0'):
        path.write_text(text.replace('"length": 33', wrong))
        with pytest.raises(FileRefused):
            load(path)


class Counted(StandIn):
    """A stand-in that counts kernels and does not compile them."""

    def ElementwiseKernel(self, reads: str, writes: str, body: str, name: str, **_: Any) -> Any:
        return lambda *args, **settings: self.work(name, lambda *_, **__: None, *args)

    def RawKernel(self, code: str, name: str, **_: Any) -> Any:
        return lambda grid, block, args: self.work(name, lambda *_: None, *args)


def resnet(width: int, images: int, size: int = 8) -> tuple[Any, tuple[Any, ...]]:
    """A step of ResNet-18 with SGD, and its arguments."""
    model = ResNet18(outputs=10, image_shape=(3, size, size), width=width)
    rule, params = optim.sgd(lr=0.1), model.init(seed=0)
    x, y = normal(images, 3, size, size, dtype="float32"), np.arange(images) % 10

    def step(params: Any, buffers: Any, state: Any, x: Any, y: Any, lr: Any) -> Any:
        def loss(p: Any) -> Any:
            logits, moved = model.apply(p, buffers, x, train=True)
            return ops.softmax_cross_entropy(logits, y), moved

        (value, moved), grads = value_and_grad(loss, has_aux=True)(params)
        params, state = rule.update(params, grads, state, lr=lr)
        return params, moved, state, value

    return step, (params, model.buffers(0), rule.init(params), x, y, 0.1)


def test_resnet_18_is_at_most_700_nodes() -> None:
    """For a small width and batch: with 128 images of 32x32 and 64 channels the derivative by the
    weight of each of the 20 convolutions has one node more, which adds up its parts."""
    step, args = resnet(4, 2)
    device = Counted()
    program = record(step, *args, memory=CudaMemory(device, device.blas))
    result = args
    for _ in range(WARM_UPS + 1):
        result = (*program(*result[:3], *args[3:])[:3], *args[3:])
    assert program.graph, program.graph_error
    assert 3 * 20 + 4 * 16 <= program._bound.graph.nodes + 20 <= 700


@pytest.mark.parametrize(("rows_", "columns", "positions"), [
    (64, 27, 131_072), (64, 576, 131_072), (128, 1152, 32_768), (512, 4608, 2048), (8, 8, 16),
])  # fmt: skip
def test_the_parts_of_a_derivative_are_neither_long_nor_many(
    rows_: int, columns: int, positions: int
) -> None:
    parts = convolution._parts(rows_, columns, positions, 1)
    assert parts == 1 or positions / parts >= convolution.FEWEST / 2
    assert positions / parts <= convolution.MOST
    assert parts * rows_ * columns <= convolution.ROOM


# --- models on a device ------------------------------------------------------------------------


def language(model: Any, x: Any, y: Any) -> tuple[Any, tuple[Any, ...]]:
    """A step of a model of tokens with SGD, and its arguments."""
    rule, params = optim.sgd(lr=0.1), model.init(seed=0)

    def step(params: Any, state: Any, x: Any, y: Any, stream: Any) -> Any:
        def loss(p: Any) -> Any:
            return ops.softmax_cross_entropy(model.apply(p, {}, x, train=True, random=stream)[0], y)

        value, grads = value_and_grad(loss)(params)
        params, state = rule.update(params, grads, state, lr=0.1)
        return params, state, value

    return step, (params, rule.init(params), x, y, Random(0, "train", 0))


def models() -> dict[str, Callable[[], tuple[Any, tuple[Any, ...]]]]:
    tokens = np.random.default_rng(0).integers(1, 20, (2, 7))
    types = np.stack((tokens, tokens % 2, tokens > 3), axis=1).astype(np.int64)
    bert = BERT(vocabulary=20, width=8, layers=1, heads=2, hidden=16, positions=12)
    transformer = Transformer(vocabulary=20, width=8, layers=1, heads=2, hidden=16)
    return {
        "resnet18": lambda: resnet(4, 2),
        "bert": lambda: language(bert, types, np.array([[1, 2], [0, 3]])),
        "transformer": lambda: language(transformer, tokens, tokens),
    }


@pytest.mark.gpu
@pytest.mark.parametrize("name", list(models()))
def test_gpu_models_are_one_graph(name: str, gpu: Any) -> None:
    """A replay has the bits of the eager step, and is close to the CPU's."""
    step, args = models()[name]()
    program, given = record(step, *args, memory=CudaMemory()), on_device(args)
    eager, expected = step(*given), step(*args)
    for _ in range(WARM_UPS + 2):
        found = program(*given)
        for a, b, c in zip(found, eager, expected, strict=True):
            for n, want in c.items() if isinstance(c, dict) else [(None, c)]:
                x, y = (a, b) if n is None else (a[n], b[n])
                assert x.tobytes() == y.tobytes(), n
                assert np.max(np.abs(arrays.to_host(x) - want)) <= 1e-4 * (1 + np.max(want)), n
    assert program.graph, program.graph_error


def on_device(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {name: on_device(x) for name, x in tree.items()}
    if isinstance(tree, tuple):
        return tuple(map(on_device, tree))
    return arrays.to_device(tree, "cuda") if hasattr(tree, "dtype") else tree
