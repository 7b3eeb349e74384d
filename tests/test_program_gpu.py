"""Programs on a GPU: the kernels as C++ against NumPy, the executor on a stand-in for CuPy that
runs on the CPU, and, where there is a device, the real thing."""

from __future__ import annotations

import ast
import inspect
import re
import shutil
import subprocess
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cupy_standin import COMPILER, StandIn, Stream

from npdrt import arrays, ops, optim, record, value_and_grad
from npdrt.errors import Error
from npdrt.models import MLP
from npdrt.program import compiling, cuda, kernels, operations
from npdrt.program.calls import CREATIONS, KINDS
from npdrt.program.cuda import WARM_UPS, CudaMemory
from npdrt.random import Random
from npdrt.train.config import Config
from npdrt.train.step import State, Task
from npdrt.train.steps import Steps

NVCC = shutil.which("nvcc")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")

OPTIMIZERS = {
    "sgd": partial(optim.sgd, lr=0.1, momentum=0.9, weight_decay=1e-4, nesterov=True),
    "adam": partial(optim.adam, weight_decay=1e-2),
    "adamw": partial(optim.adam, weight_decay=1e-2, decoupled=True),
    "lars": partial(optim.lars, lr=0.1, weight_decay=1e-4),
    "lars_lesion": partial(optim.lars_lesion, lr=0.1),
    "fromage": partial(optim.fromage),
    "fromage bounded": partial(optim.fromage, norm_bound=1.0),
    "rmsprop": partial(optim.rmsprop, momentum=0.9, centered=True, weight_decay=1e-4),
}


@pytest.fixture
def device() -> StandIn:
    return StandIn()


def same(a: Any, b: Any) -> bool:
    """Equal bits, and NaN where the other is."""
    a, b = np.asarray(arrays.to_host(a)), np.asarray(arrays.to_host(b))
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    if a.dtype.kind != "f":
        return bool((a == b).all())
    nan = np.isnan(a)
    bits = f"u{a.dtype.itemsize}"
    return bool((nan == np.isnan(b)).all()) and np.array_equal(
        np.where(nan, 0, a).astype(a.dtype).view(bits),
        np.where(nan, 0, b).astype(b.dtype).view(bits),
    )


def network(name: str, dtype: str = "float32", width: int = 64) -> tuple[Any, tuple[Any, ...]]:
    """A step of a perceptron under an optimizer, and its first arguments. It has no primitive with
    a kernel (`npdrt.kernels`), whose bits are not the CPU's."""
    model = MLP(depth=3, width=width, inputs=width, outputs=10, bias=True)
    optimizer = OPTIMIZERS[name]()
    params = model.init(seed=0, dtype=dtype)
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((32, width)).astype(dtype), rng.integers(0, 10, 32)

    def step(params: Any, state: Any, x: Any, y: Any, lr: Any) -> Any:
        xp = arrays.namespace(x)
        chosen = xp.astype(y[:, None] == xp.arange(10), x.dtype) / -float(y.shape[0])
        loss_fn = value_and_grad(lambda p: ops.sum(ops.log_softmax(model(p, x)) * chosen))
        loss, grads = loss_fn(params)
        params, state = optimizer.update(params, grads, state, lr=lr)
        return params, state, loss

    return step, (params, optimizer.init(params), x, y, 0.01)


def assert_same(a: Any, b: Any) -> None:
    (params, state, loss), (params_b, state_b, loss_b) = a, b
    assert same(loss, loss_b)
    for found, expected in ((params, params_b), (state, state_b)):
        wrong = [name for name in expected if not same(found[name], expected[name])]
        assert not wrong, wrong


# --- the kernels against NumPy -----------------------------------------------------------------

EXTREME = [
    0.0,
    -0.0,
    1e-45,
    -1e-40,
    1.2e-38,
    3e38,
    -3e38,
    np.inf,
    -np.inf,
    np.nan,
    1.0,
    -1.5,
    1e-20,
]


def extreme(dtype: str, seed: int, size: int = 2048) -> Any:
    """Numbers of all sizes, subnormal ones among them."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(size) * 10.0 ** rng.integers(-44, 30, size)
    x[: len(EXTREME) ** 2] = (np.repeat if seed % 2 else np.tile)(EXTREME, len(EXTREME))
    with np.errstate(all="ignore"):
        return x.astype(dtype)


def everything(x: Any, y: Any, wide: Any, s: Any) -> Any:
    """Every function of the kernels, on both floats, mixed, with 0-d arrays and numbers."""
    xp = arrays.namespace(x)
    out = [x + y, x - y, x * y, x / y, -x, xp.sqrt(xp.abs(y)), x + wide, x * s, xp.sqrt(x)]
    out += [x == y, x != y, x < y, x <= y, x > y, x >= y, wide < x, x < 0.5, wide >= s]
    out += [xp.astype(wide, xp.float32), xp.astype(x, xp.float64), xp.astype(x > y, x.dtype)]
    out += [xp.where(x > y, x, 0.0), xp.where(x > 0, wide, x), xp.isfinite(x), xp.isfinite(wide)]
    out += [(x > 0) & (y > 0), (x > 0) | (y > 0), (x > 0) ^ (y > 0), 0.1 * x, x * 3, 1e-42 * y]
    out += [xp.where(x > y, x, float("inf")), x - 1e300, xp.astype(x, xp.bool), s / y, s + 0.25]
    out += [xp.astype(s, xp.float32), xp.where(s > 1, s, 0.5), x[:5] * y[:5]]
    out += [xp.maximum(x, y) + 0.0, xp.minimum(x, wide) + 0.0, xp.maximum(s, 0.5)]  # one zero
    n = xp.astype(x > y, xp.int64) * -3 + 1
    out += [n, n - n * n, n == 1, n < -1, xp.astype(n, xp.float32), n * wide, xp.where(n > 0, n, 7)]
    rows, column = xp.reshape(x, (-1, 64)), xp.reshape(y[:32], (32, 1))
    out += [(rows + y[:64]) * column - column, xp.matrix_transpose(rows) * 2.0 + 1.0]
    return out


@needs_compiler
def test_kernels_have_the_bits_of_numpy(device: StandIn) -> None:
    args = (extreme("float32", 0), extreme("float32", 1), extreme("float64", 1), np.float64(0.3))
    args = (*args[:3], np.asarray(args[3]))
    with np.errstate(all="ignore"):
        expected = everything(*args)
    program = record(everything, *args, memory=CudaMemory(device, device.blas))
    found = program(*args)
    assert [k for k, (a, b) in enumerate(zip(found, expected, strict=True)) if not same(a, b)] == []
    ran = {name for kind, *_, name in device.events if kind == "run"}
    assert ran <= {"npdrt_chain", "set", "copyto", "fill"}


@needs_compiler
@pytest.mark.parametrize("dtype", ["float32", pytest.param("float64", marks=pytest.mark.soak)])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_updates_have_the_bits_of_numpy(name: str, dtype: str, device: StandIn) -> None:
    """On numbers of all sizes, one update after another, as kernels."""
    optimizer = OPTIMIZERS[name]()

    def tidy(seed: int) -> Any:
        x = extreme(dtype, seed)
        return np.where(np.abs(x) < 1e10, x, 1.0).astype(dtype)

    params = {
        "a": tidy(0),
        "b": tidy(1)[:100],
        "c": extreme(dtype, 3),
        "zero": np.zeros(2000, dtype),
    }
    grads = {"a": tidy(2), "b": tidy(3)[:100], "c": extreme(dtype, 4), "zero": tidy(5)[:2000]}
    state = optimizer.init(params)
    args = params, grads, state, 0.01
    program = record(_update(optimizer), *args, memory=CudaMemory(device, device.blas))
    given, expected = (params, state), (params, state)
    for _ in range(5):
        given = program(given[0], grads, given[1], 0.01)
        expected = _update(optimizer)(expected[0], grads, expected[1], 0.01)
        for found, wanted in zip(given, expected, strict=True):
            assert [n for n in wanted if not same(found[n], wanted[n])] == []
    ran = {name for kind, *_, name in device.events if kind == "run"}
    own = {"npdrt_chain", "npdrt_batch", "npdrt_norm_lanes", "npdrt_norm_fold"}
    assert ran <= own | {"set", "copyto", "fill"}, "nothing of CuPy's own"


def _update(optimizer: Any) -> Callable[..., Any]:
    return lambda params, grads, state, lr: optimizer.update(params, grads, state, lr=lr)


@needs_compiler
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("size", [0, 1, 255, 256, 257, 65_535, 65_536, 65_537, 200_001])
def test_norm_kernels_add_in_the_order_of_the_definition(
    size: int, dtype: str, device: StandIn
) -> None:
    x = (np.random.default_rng(size).standard_normal(size) * 3).astype(dtype)
    program = record(optim.norm, x, memory=CudaMemory(device, device.blas))
    assert same(program(x), optim.norm(x))
    for k in range(4):
        scaled = x * x.dtype.type(0.37**k)
        assert same(program(scaled), optim.norm(scaled))


@needs_compiler
def test_norm_kernels_add_chunks_in_order(device: StandIn) -> None:
    xs = [np.random.default_rng(k).standard_normal(1_310_000) for k in range(6)]
    program = record(optim.norm, xs[0], memory=CudaMemory(device, device.blas))
    assert all(same(program(x), optim.norm(x)) for x in xs)


@needs_compiler
def test_layers_share_kernels(device: StandIn) -> None:
    step, args = network("adam")
    memory = CudaMemory(device, device.blas)
    record(step, *args, memory=memory)(*args)
    assert len(device.kernels) == len(set(device.kernels))
    big = [source for source in memory.kernels if "npdrt_batch(" in source]
    assert [source.count("case ") for source in big] == [4, 1], "lr, two powers and the step first"
    assert big[1].count("npdrt_sqrt(") == 1, "one loop a parameter, the same for all"


@pytest.mark.skipif(NVCC is None, reason="no nvcc")
def test_no_flag_of_the_compiler_changes_an_operation(device: StandIn, tmp_path: Path) -> None:
    """CuPy passes -ftz=true after our options; and nothing may be contracted."""
    sources = [kernels.ARITHMETIC, kernels.NORM_LANES, kernels.NORM_FOLD]
    for name in ("adam", "fromage", "lars"):
        step, args = network(name)
        record(step, *args, memory=CudaMemory(device, device.blas))(*args)
    for k, (reads, writes, body) in enumerate(device.kernels):
        every = list(enumerate([*kernels.parameters(reads), *kernels.parameters(writes)]))
        given = [f"{kind}* p{j}" for j, (_, kind, _) in every]
        names = [
            f"{kind}* {n} = p{j};" if raw else f"{kind}& {n} = p{j}[threadIdx.x];"
            for j, (raw, kind, n) in every
        ]
        sources.append(
            f'extern "C" __global__ void k{k}({", ".join(given)}) {{ {" ".join(names)} {body} }}'
        )
    (tmp_path / "k.cu").write_text("\n".join(sources))
    command = [str(NVCC), "-ptx", "-arch=sm_90", "--fmad=false", "-ftz=true", "-w"]
    subprocess.run([*command, "-o", str(tmp_path / "k.ptx"), str(tmp_path / "k.cu")], check=True)
    ptx = (tmp_path / "k.ptx").read_text()
    assert "mul.rn.f32" in ptx
    assert "sqrt.rn.f64" in ptx
    assert not re.findall(r"\bfma\.|\.ftz|\.approx", ptx)
    assert not re.findall(r"\b(?:add|sub|mul|div)\.f(?:32|64)", ptx), "ptxas may contract these"


# --- the executor on the stand-in --------------------------------------------------------------


@needs_compiler
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_is_that_of_the_cpu(name: str, dtype: str, device: StandIn) -> None:
    """Call by call, in the first launch of the graph, and after it."""
    step, args = network(name, dtype)
    program = record(step, *args, memory=CudaMemory(device, device.blas))
    data, found, expected = args[2:4], args[:2], args[:2]
    for k in range(WARM_UPS + 3):
        lr = 0.01 / (k + 1)
        found = program(*found[:2], *data, lr)
        assert device.synchronisations == 0
        expected = step(*expected[:2], *data, lr)
        assert_same(found, expected)
        device.synchronisations = 0  # those of the comparison
    binding = program._bound
    assert binding.graph_error is None
    assert binding.graph.nodes >= 20


@needs_compiler
def test_a_replay_is_one_launch_on_the_stream_of_the_caller(device: StandIn) -> None:
    step, args = network("fromage")
    program = record(step, *args, memory=CudaMemory(device, device.blas))
    result = program(*args)
    for _ in range(WARM_UPS - 1):
        result = program(*result[:2], *args[2:])
    assert not any(entry[0] in ("begin", "launch") for entry in device.events)
    warm = [entry for entry in device.events if entry[:2] == ("run", "side 1")]
    assert len(warm) >= WARM_UPS * 20
    device.events.clear()
    result = program(*result[:2], *args[2:])
    assert device.events == [
        ("run", "default", "set"), ("run", "default", "set"), ("run", "default", "fill"),
        ("record", "default"), ("wait", "side 1", "default"),
        ("begin", "side 1", "thread-local"), ("end", "side 1", program._bound.graph.nodes),
        ("record", "side 1"), ("wait", "default", "side 1"), ("launch", "default"),
        ("run", "default", "copyto"),  # of the loss, which replaces no input
    ]  # fmt: skip
    device.events.clear()
    program(*result[:2], *args[2:])
    assert [entry[0] for entry in device.events] == ["run", "run", "run", "launch", "run"]


@needs_compiler
def test_warm_ups_run_between_what_the_caller_did_and_does(device: StandIn) -> None:
    step, args = network("sgd")
    record(step, *args, memory=CudaMemory(device, device.blas))(*args)
    first = device.events.index(("wait", "side 1", "default"))
    last = device.events.index(("wait", "default", "side 1"))
    side = [k for k, entry in enumerate(device.events) if entry[:2] == ("run", "side 1")]
    assert first < side[0]
    assert side[-1] < last
    assert device.events[first - 1] == ("record", "default")
    assert device.events[last - 1] == ("record", "side 1")


@needs_compiler
def test_another_stream_waits_for_the_last(device: StandIn) -> None:
    step, args = network("sgd")
    program = record(step, *args, memory=CudaMemory(device, device.blas))
    result = program(*args)
    device.events.clear()
    other = Stream(device, "other")
    with other:
        program(*result[:2], *args[2:])
    assert device.events[0] == ("wait", "other", "default")
    assert device.events[1][:2] == ("run", "other")


@needs_compiler
def test_what_cannot_be_captured_runs_call_by_call() -> None:
    device = StandIn(refused="exp")
    step, args = network("fromage")
    program = record(step, *args, memory=CudaMemory(device, device.blas))
    found, expected = args, args
    for _ in range(WARM_UPS + 3):
        found = (*program(*found[:2], *args[2:])[:2], *args[2:])
        expected = (*step(*expected[:2], *args[2:])[:2], *args[2:])
        for a, b in zip(found[:2], expected[:2], strict=True):
            assert all(same(a[name], b[name]) for name in b)
    binding = program._bound
    assert binding.graph is None
    assert "exp cannot be captured" in str(binding.graph_error)
    assert sum(entry[0] == "begin" for entry in device.events) == 1, "tried once"
    assert program._bound.memory.side.name == f"side {device.made}", "in place of the broken one"


@needs_compiler
def test_functions_without_out_are_captured(device: StandIn) -> None:
    """In memory of the program's own pool, which the warm-ups have filled."""

    def step(x: Any) -> Any:
        xp = arrays.namespace(x)
        lowest = xp.min(x, axis=0), xp.argmax(xp.matrix_transpose(x), axis=0)
        return xp.sort(x * 2.0), lowest, xp.searchsorted(xp.sort(x[0, :]), x[1, :])

    x = np.random.default_rng(0).standard_normal((40, 50))
    program = record(step, x, memory=CudaMemory(device, device.blas))
    for _ in range(WARM_UPS + 2):
        for a, b in zip(flat(program(x)), flat(step(x)), strict=True):
            assert same(a, b)
    assert program.graph_error is None
    assert program.graph


def flat(tree: Any) -> list[Any]:
    return [x for part in tree for x in flat(part)] if isinstance(tree, tuple) else [tree]


@needs_compiler
def test_a_memory_is_on_its_device_whatever_is_current(device: StandIn) -> None:
    """Streams and events of another device than the current one are refused."""
    memory = CudaMemory(device, device.blas, 1)
    assert device.devices == [0]
    step, args = network("sgd")
    program, expected = record(step, *args, memory=memory), args[:2]
    found: Any = args[:2]
    for _ in range(WARM_UPS + 2):
        found, expected = program(*found[:2], *args[2:]), step(*expected[:2], *args[2:])
        assert_same(found, expected)
    assert program.graph
    assert memory.__reduce__()[1] == (None, None, 1)


def test_changed_strides_are_refused(device: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls that read the array by the planned strides would read other elements."""

    def step(x: Any) -> Any:
        return arrays.namespace(x).max(x, axis=0)

    x = np.random.default_rng(0).standard_normal((4, 5, 6))
    program = record(step, x, memory=CudaMemory(device, device.blas))
    monkeypatch.setattr(device.ndarray, "strides", property(moved), raising=False)
    with pytest.raises(Error, match="changed the strides of the result of max"):
        program(x)


def moved(x: Any) -> Any:
    """The strides of an array, in Fortran's order once `max` has run."""
    strides = np.ndarray.strides.__get__(x)
    ran = any(entry[:2] == ("run", "side 1") for entry in x.device.events)
    return strides[::-1] if ran and x.shape == (5, 6) else strides


@needs_compiler
@pytest.mark.parametrize("function", ["any", "all", "argmax", "argmin", "sum", "prod"])
def test_out_is_given_only_where_its_strides_stay(function: str, device: StandIn) -> None:
    """The stand-in refuses `out` where CuPy would change it."""

    def step(x: Any) -> Any:
        xp = arrays.namespace(x)
        reduce, turned = getattr(xp, function), xp.permute_dims(x, (2, 1, 0))
        return tuple(reduce(y, axis=0) for y in (x > 0.0, turned > 0.0, x, turned))

    x = np.random.default_rng(0).standard_normal((4, 5, 6))
    program = record(step, x, memory=CudaMemory(device, device.blas))
    for _ in range(WARM_UPS + 2):
        found, expected = program(x), step(x)
        assert [a.dtype for a in found] == [b.dtype for b in expected]
        assert all(
            np.allclose(a.get(), b, rtol=1e-14) for a, b in zip(found, expected, strict=True)
        )
    assert program.graph


@needs_compiler
@pytest.mark.parametrize(("channels", "groups", "form"), [
    (12, 1, "direct"), (18, 9, "direct"), (12, 1, "winograd"), (20, 20, "direct"),
])  # fmt: skip
def test_convolutions_are_captured(channels: int, groups: int, form: str, device: StandIn) -> None:
    """The kernels, whatever the form: their derivatives too, many groups, and depthwise."""

    def step(x: Any, w: Any) -> Any:
        convolved = value_and_grad(
            lambda p: ops.sum(ops.conv2d(p["x"], p["w"], padding=1, groups=groups, form=form) ** 2)
        )
        return convolved({"x": x, "w": w})

    rng = np.random.default_rng(0)
    x = rng.standard_normal((channels, 4, 8, 8))
    w = rng.standard_normal((20 if groups == 1 else groups, channels // groups, 3, 3))
    program = record(step, x, w, memory=CudaMemory(device, device.blas))
    (_, expected) = step(x, w)
    for _ in range(WARM_UPS + 2):
        _, found = program(x, w)
        for name, want in expected.items():
            assert np.max(np.abs(found[name].get() - want)) <= 1e-12 * np.max(np.abs(want))
    assert program.graph, program.graph_error


@needs_compiler
def test_kernels_compile_in_threads_on_memory_of_their_own(
    device: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiling.os, "cpu_count", lambda: 4)
    threads: set[str] = set()
    work = StandIn.work

    def noted(self: Any, name: str, *args: Any, **settings: Any) -> None:
        threads.add(threading.current_thread().name)
        work(self, name, *args, **settings)

    monkeypatch.setattr(StandIn, "work", noted)
    step, args = network("adam")
    memory = CudaMemory(device, device.blas)
    program = record(step, *args, memory=memory)
    assert_same(program(*args), step(*args))
    assert len(threads) >= 3, threads
    launched, streams = set(memory.launched), device.made
    record(step, *args, memory=memory)(*args)
    assert memory.launched == launched
    assert device.made == streams, "nothing was left to compile"


@needs_compiler
@pytest.mark.parametrize("refused", ["", "npdrt_row_cross_entropy"])
def test_a_run_warns_once_if_its_step_is_not_a_graph(
    refused: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    device, warnings = StandIn(refused=refused), list[str]()
    memory = CudaMemory(device, device.blas)
    monkeypatch.setattr("npdrt.train.steps.memory_on", lambda where: memory)
    model = MLP(depth=2, width=32, inputs=32, outputs=10)
    rule, task, gpu = OPTIMIZERS["sgd"](), Task(model, 10), arrays.Device("cuda")
    steps = Steps(task, rule, Config(data="digits"), gpu, warnings.append)
    params, rng = model.init(seed=0), np.random.default_rng(0)
    params = {name: device.asarray(w) for name, w in params.items()}
    slots = {name: device.asarray(s) for name, s in rule.init(model.init(seed=0)).items()}
    state = State(params, {}, slots)
    x, y = rng.standard_normal((8, 32)).astype("float32"), rng.integers(0, 10, 8)
    for k in range(3 * WARM_UPS + 6):
        assert steps.graph == "" or k > WARM_UPS
        state = steps(state, x, y, 0.1, Random(0, "train", k), traced=k % 3 == 2).state
    monkeypatch.setattr(Steps, "_warn_without_graph", None)  # it is known, and not asked again
    steps(state, x, y, 0.1, Random(0, "train", 99), traced=False)
    if refused:
        assert [w for w in warnings if "does not become a CUDA graph" in w] == warnings
        assert len(warnings) == 1
        assert f"{refused} cannot be captured" in warnings[0]
        assert steps.graph == f"call by call: {refused} cannot be captured"
    else:
        assert (warnings, steps.graph) == ([], "one CUDA graph")


@needs_compiler
def test_two_programs_take_turns_in_one_memory(device: StandIn) -> None:
    memory = CudaMemory(device, device.blas)
    step, args = network("adam")
    small = (*args[:2], args[2][:7], args[3][:7], args[4])
    programs = [record(step, *a, memory=memory) for a in (small, args)]
    found, expected = args[:2], args[:2]
    for k in range(2 * WARM_UPS + 4):
        data = (small, args)[k % 2][2:]
        found = programs[k % 2](*found[:2], *data)
        expected = step(*expected[:2], *data)
        assert_same(found, expected)
    assert all(p._bound.graph is not None for p in programs)
    assert all(p._bound.scratch is memory.scratch for p in programs)


@needs_compiler
def test_chains_that_are_no_kernel_run_whole(device: StandIn) -> None:
    """Integers are CuPy's; a plan made for the CPU has exp inside its chains."""

    def step(x: Any, n: Any) -> Any:
        xp = arrays.namespace(x)
        a, b = xp.exp(-x * x), xp.exp(x * 0.5)
        return (a + b) * (a - b) + x, (n + 1) * (n - 3) + (n + 2) * (n - 1)

    x, n = np.random.default_rng(0).standard_normal(5000), np.arange(5000)
    for looked in (False, True):
        program = record(step, x, n)
        if looked:
            assert program.plan
        program.memory = CudaMemory(device, device.blas)
        for _ in range(WARM_UPS + 2):
            found = program(x, n)
            assert all(same(a, b) for a, b in zip(found, step(x, n), strict=True))


@needs_compiler
def test_shapes_moves_and_views(device: StandIn) -> None:
    def step(x: Any, i: Any) -> Any:
        xp = arrays.namespace(x)
        joined = xp.concat((x, x[::-1, :], x * 2.0), axis=0)
        filled = xp.zeros((4, 60), dtype=x.dtype)
        filled[1, :] = x[0, :]
        filled[2:, 5] = 3.0
        both = xp.stack((x, x + 1.0), axis=1)
        part = xp.take(x, i, axis=1)
        best = (xp.argmax(x, axis=-1), xp.max(x, axis=0, keepdims=True), xp.any(x > 2.0, axis=1))
        mixed = xp.where(x > 0, xp.arange(60, dtype=x.dtype), xp.full((40, 1), 2.0, dtype=x.dtype))
        return joined, filled, both, part, best, mixed, xp.matmul(x, xp.matrix_transpose(x[:3, :]))

    x = np.random.default_rng(0).standard_normal((40, 60))
    i = np.array([3, 1, 59, 3])
    program = record(step, x, i, memory=CudaMemory(device, device.blas))
    for _ in range(WARM_UPS + 2):
        found, expected = program(x, i), step(x, i)
        for a, b in zip(found, expected, strict=True):
            for c, d in zip(a, b, strict=True) if isinstance(a, tuple) else [(a, b)]:
                assert same(c, d)
    assert program._bound.graph is not None


@needs_compiler
def test_arrays_of_the_program_and_of_others(device: StandIn) -> None:
    memory = CudaMemory(device, device.blas)
    step, args = network("sgd")
    program = record(step, *args, memory=memory)
    params, state, _ = program(*args)
    assert all(memory.holds(w) for w in params.values())
    assert memory.holds(next(iter(params.values()))[1])
    assert not memory.holds(device.asarray(args[2]))
    assert not memory.holds(args[2])
    device.events.clear()
    program(params, state, device.asarray(args[2]), device.asarray(args[3]), 0.5)
    assert [entry[2] for entry in device.events if entry[:2] == ("run", "default")] == [
        "copyto", "copyto", "fill", "copyto"
    ]  # fmt: skip


# --- the names of CuPy -------------------------------------------------------------------------


def real_cupy() -> Any:
    return pytest.importorskip("cupy", reason="CuPy is not installed", exc_type=ImportError)


def resolve(library: Any, name: str) -> Any:
    value = library
    for part in name.split("."):
        value = getattr(value, part, None)
    return value


def names_in_use() -> dict[str, set[str]]:
    """What the executor takes from CuPy, and the keywords it calls it with."""
    found: dict[str, set[str]] = {}
    sources = map(inspect.getsource, (cuda, operations))
    for node in (node for text in sources for node in ast.walk(ast.parse(text))):
        call = node if isinstance(node, ast.Call) else None
        text = ast.unparse(call.func if call else node) if isinstance(node, ast.expr) else ""
        match = re.fullmatch(r"(?:cupy|library|(?:self\.)?(?:memory\.)?xp)\.([\w.]+)", text)
        match = match or re.fullmatch(r"(cuda\.[\w.]+)", text)
        if match:
            keywords = {k.arg for k in call.keywords if k.arg} if call else set()
            found.setdefault(match[1], set()).update(keywords)
    return found


def accepts(function: Any, keywords: set[str]) -> bool:
    if not keywords or isinstance(function, type) or "ufunc" in type(function).__name__.lower():
        return True  # classes are checked by construction below; ufuncs take `out`
    try:
        known = inspect.signature(function).parameters
    except ValueError:
        return True  # of Cython, without a signature
    return all(k in known for k in keywords)


def test_cupy_has_every_name_and_keyword() -> None:
    cupy, used = real_cupy(), names_in_use()
    assert {"ElementwiseKernel", "cuda.MemoryPool", "cuda.Stream", "copyto", "rint"} <= set(used)
    assert [n for n in used if resolve(cupy, n) is None] == []
    assert [n for n, keywords in used.items() if not accepts(resolve(cupy, n), keywords)] == []
    assert resolve(cupy, "no_such_function") is None
    assert not accepts(cupy.take, {"mode"})


def test_cupy_has_every_function_with_out() -> None:
    cupy = real_cupy()
    reducers = ("max", "min", "all", "any", "argmax", "argmin")
    settings = {name: {"axis", "keepdims"} for name in reducers}
    settings |= {name: {"axis", "keepdims", "dtype"} for name in ("sum", "prod")}
    plain = [f for f, kind in KINDS.items() if kind != "view" and f not in (*CREATIONS, "norm")]
    plain = [f for f in plain if f not in cuda.CUPY | operations.SHARED]
    for name in plain:
        function = getattr(cupy, operations.NAMES.get(name, name))
        assert accepts(function, {"out", *settings.get(name, set())}), name
    assert all(callable(getattr(cupy, name)) for name in CREATIONS)


def test_methods_of_streams_events_and_arrays() -> None:
    cupy = real_cupy()
    Stream = cupy.cuda.Stream
    assert accepts(Stream.begin_capture, {"mode"})
    assert accepts(Stream.__init__, {"non_blocking"})
    assert accepts(cupy.cuda.Event.__init__, {"disable_timing"})
    methods = {
        Stream: ("end_capture", "wait_event", "record", "__enter__", "__exit__", "__eq__"),
        cupy.cuda.graph.Graph: ("launch",),
        cupy.cuda.MemoryPool: ("malloc", "total_bytes"),
        cupy.ndarray: ("set", "fill", "get", "reshape", "copy", "__cuda_array_interface__"),
    }
    assert [n for owner, names in methods.items() for n in names if not hasattr(owner, n)] == []


def test_cupy_takes_the_views_of_a_binding() -> None:
    """Views as a binding makes them, of memory that never was on a device."""
    cupy = real_cupy()
    host = np.arange(64.0, dtype=np.float32)
    memory = cupy.cuda.UnownedMemory(host.ctypes.data, host.nbytes, host, 0)
    start = cupy.cuda.MemoryPointer(memory, 0)
    x = cupy.ndarray((2, 3), "float32", memptr=start + 8, strides=(16, 4))
    assert (x.shape, x.strides, x.data.ptr) == ((2, 3), (16, 4), host.ctypes.data + 8)
    assert cupy.ndarray((4, 4), "float32", memptr=start, strides=(16, 4)).flags.c_contiguous
    scalar = cupy.ndarray((), "float64", memptr=start, strides=())
    assert scalar.reshape(1).data.ptr == scalar.data.ptr


@needs_compiler
def test_cupy_takes_the_kernels(device: StandIn) -> None:
    cupy = real_cupy()
    for name in OPTIMIZERS:
        step, args = network(name)
        record(step, *args, memory=CudaMemory(device, device.blas))(*args)
    for reads, writes, body in device.kernels:
        made = cupy.ElementwiseKernel(
            reads, writes, body, "npdrt_chain", preamble=kernels.ARITHMETIC, options=kernels.OPTIONS
        )
        assert made.nin == len(kernels.parameters(reads))
        assert made.nout == len(kernels.parameters(writes))
    code = kernels.ARITHMETIC + kernels.NORM_FOLD
    assert (
        cupy.RawKernel(code, "npdrt_norm_fold", options=kernels.OPTIONS).name == "npdrt_norm_fold"
    )


# --- on a device -------------------------------------------------------------------------------


@pytest.fixture
def gpu() -> Any:
    try:
        return arrays._import_cupy()
    except arrays.Unavailable as error:
        pytest.skip(str(error))


def on_device(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {name: on_device(x) for name, x in tree.items()}
    return arrays.to_device(tree, "cuda") if hasattr(tree, "dtype") else tree


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_gpu_updates_have_the_bits_of_the_cpu(name: str, dtype: str, gpu: Any) -> None:
    optimizer = OPTIMIZERS[name]()
    rng = np.random.default_rng(0)
    sizes = {"a": (784, 784), "b": (10,), "c": (300, 1000)}
    params = {n: rng.standard_normal(s).astype(dtype) for n, s in sizes.items()}
    params["tiny"] = extreme(dtype, 1)
    params["tiny"][~(np.abs(params["tiny"]) < 1e-20)] = 1e-30
    state = optimizer.init(params)
    found, expected = (on_device(params), on_device(state)), (params, state)
    grads = {n: (1e-20 * rng.standard_normal(w.shape)).astype(dtype) for n, w in params.items()}
    program = record(_update(optimizer), *found[:1], on_device(grads), found[1], 0.01)
    for k in range(WARM_UPS + 4):
        scale = np.dtype(dtype).type(10.0**k)
        grads = {n: g * scale for n, g in grads.items()}
        found = program(found[0], on_device(grads), found[1], 0.01)
        expected = _update(optimizer)(expected[0], grads, expected[1], 0.01)
        for a, b in zip(found, expected, strict=True):
            assert [n for n in b if not same(a[n], b[n])] == []
    assert program._bound.graph is not None, program._bound.graph_error


@pytest.mark.gpu
def test_gpu_kernels_have_the_bits_of_numpy(gpu: Any) -> None:
    args = (extreme("float32", 0), extreme("float32", 1), extreme("float64", 1), np.asarray(0.3))
    with np.errstate(all="ignore"):
        expected = everything(*args)
    found = record(everything, *args, memory=CudaMemory())(*args)
    assert [k for k, (a, b) in enumerate(zip(found, expected, strict=True)) if not same(a, b)] == []


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_gpu_norms_have_the_bits_of_the_cpu(dtype: str, gpu: Any) -> None:
    for size in (0, 1, 257, 65_536, 65_537, 3_000_001):
        x = (np.random.default_rng(size).standard_normal(size) * 3).astype(dtype)
        program = record(optim.norm, x, memory=CudaMemory())
        for _ in range(WARM_UPS + 2):
            assert same(program(x), optim.norm(x))


@pytest.mark.gpu
def test_gpu_sums_add_short_runs(gpu: Any) -> None:
    """After 2**24 in float32, ones that are added one by one are lost: at most 127 of them."""
    x = gpu.ones((arrays.GPU_RUN, 40), dtype="float32")
    x[0, :] = 2.0**24
    missing = 2.0**24 + arrays.GPU_RUN - arrays.total(x, (0,)).get().astype(float)
    assert missing.max() <= arrays.RUN
    long = arrays.total(gpu.ones((3 * arrays.GPU_RUN + 5, 7), dtype="float32"), (0,))
    assert (long.get() == 3 * arrays.GPU_RUN + 5).all()


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-5), ("float64", 1e-12)])
def test_gpu_gradients_are_those_of_the_cpu(dtype: str, bound: float, gpu: Any) -> None:
    step, args = network("sgd", dtype, width=256)
    found = record(step, *args, memory=CudaMemory())(*args)
    for a, b in zip(found[:2], step(*args)[:2], strict=True):
        for name in b:
            x, y = arrays.to_host(a[name]).astype(float), b[name].astype(float)
            assert np.max(np.abs(x - y)) <= bound * max(np.max(np.abs(y)), 1e-30), name


@pytest.mark.gpu
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_gpu_replay_is_the_eager_step(name: str, gpu: Any) -> None:
    """To the bit, 50 steps, with memory taken and given back in between."""
    step, args = network(name, width=256)
    program = record(step, *args, memory=CudaMemory())
    data = on_device(dict(enumerate(args[2:4])))
    found = expected = tuple(map(on_device, args[:2]))
    for k in range(50):
        lr = 0.01 / (k + 1)
        found = program(*found[:2], *args[2:4], lr)
        expected = step(*expected[:2], *data.values(), lr)
        rubbish = gpu.full((1 << 16,), float("nan"))
        del rubbish
        if k == 10:
            gpu.get_default_memory_pool().free_all_blocks()
        assert_same(found, expected)
    assert program._bound.graph is not None, program._bound.graph_error
    assert float(found[2]) == float(expected[2])


@pytest.mark.gpu
def test_gpu_replays_take_no_memory(gpu: Any) -> None:
    step, args = network("adam", width=256)
    program, pool = record(step, *args, memory=CudaMemory()), gpu.get_default_memory_pool()
    result = program(*args)
    for _ in range(WARM_UPS):
        result = program(*result[:2], *args[2:])
    before = pool.used_bytes(), pool.total_bytes(), program._bound.pool.total_bytes()
    for _ in range(10):
        result = program(*result[:2], *args[2:])
    after = pool.used_bytes(), pool.total_bytes(), program._bound.pool.total_bytes()
    assert after == before
    assert result[2].shape == ()
    assert np.isfinite(float(result[2]))


@pytest.mark.gpu
def test_gpu_programs_of_two_shapes_share_memory(gpu: Any) -> None:
    memory = CudaMemory()
    step, args = network("fromage", width=256)
    small = (*args[:2], args[2][:7], args[3][:7], args[4])
    programs = [record(step, *a, memory=memory) for a in (small, args)]
    found = expected = tuple(map(on_device, args[:2]))
    for k in range(2 * WARM_UPS + 6):
        data = (small, args)[k % 2][2:]
        found = programs[k % 2](*found[:2], *data)
        expected = step(*expected[:2], *map(on_device, data))
        assert_same(found, expected)
    assert all(p._bound.graph is not None for p in programs)


@pytest.mark.gpu
def test_gpu_steps_of_convolutions_are_the_eager_steps(gpu: Any) -> None:
    """With more than 512 channels in a group, and with more than 8 groups; Winograd's form too."""

    def step(x: Any, w: Any, v: Any) -> Any:
        def loss(p: Any) -> Any:
            y = ops.conv2d(p["x"], p["w"], padding=1)
            return ops.sum(ops.conv2d(y, p["v"], groups=12, padding=1) ** 2) * 1e-3

        return value_and_grad(loss)({"x": x, "w": w, "v": v})

    rng = np.random.default_rng(0)
    shapes = (600, 2, 5, 5), (24, 600, 3, 3), (24, 2, 3, 3)
    args = [rng.standard_normal(s).astype("float32") for s in shapes]
    program = record(step, *args, memory=CudaMemory())
    loss, grads = step(*map(on_device, args))
    for _ in range(WARM_UPS + 2):
        found, found_grads = program(*args)
        assert same(found, loss)
        assert [n for n in grads if not same(found_grads[n], grads[n])] == []
    assert program.graph, program.graph_error


@pytest.mark.gpu
def test_gpu_sorts_and_reductions_are_captured(gpu: Any) -> None:
    def step(x: Any, i: Any) -> Any:
        xp = arrays.namespace(x)
        turned = xp.permute_dims(x, (2, 1, 0))
        found = [xp.sort(i), xp.argsort(i), xp.searchsorted(xp.sort(i), i)]
        for name in ("min", "max", "argmin", "argmax", "any", "all", "sum"):
            given = (x, turned) if name[0] != "a" or "arg" in name else (x > 1.0, turned > 1.0)
            found += [getattr(xp, name)(y, axis=a) for y in given for a in (None, 0, 1, (2))]
        return (*found, *(xp.sum(y > 0.0, axis=0) for y in (x, turned)))

    rng = np.random.default_rng(0)
    program = None
    for k in range(WARM_UPS + 4):
        args = rng.standard_normal((2, 3, 300)), rng.permutation(4000) * (1 << 30)
        program = program or record(step, *args, memory=CudaMemory())
        for a, b in zip(program(*args), step(*args), strict=True):
            assert a.shape == b.shape
            assert np.allclose(a.get(), b, rtol=1e-12, atol=1e-12), k
    assert program is not None
    assert program.graph, program.graph_error


@pytest.mark.gpu
def test_gpu_changed_strides_are_refused(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With `out` for every function, CuPy changes the strides of this one."""
    monkeypatch.delitem(cuda.CUPY, "argmax")
    x = np.random.default_rng(0).standard_normal((2, 3, 300))

    def step(x: Any) -> Any:
        xp = arrays.namespace(x)
        return xp.argmax(xp.permute_dims(x, (2, 1, 0)), axis=0)

    with pytest.raises(Error, match="changed the strides of the result of argmax"):
        record(step, x, memory=CudaMemory())(x)


@pytest.mark.gpu
def test_gpu_programs_run_on_any_device(gpu: Any) -> None:
    if gpu.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("one device")
    step, args = network("fromage")
    results = []
    for number in (0, 1):
        given = [arrays.to_device(a, f"cuda:{number}") for a in args[2:4]]
        program = record(step, *args)  # memory where the arrays are
        found: Any = args[:2]
        for _ in range(WARM_UPS + 2):
            found = program(*found[:2], *given, args[4])
        assert program.graph, program.graph_error
        assert arrays.device_of(found[2]) == arrays.Device("cuda", number)
        results.append(found)
    assert_same(*results)
