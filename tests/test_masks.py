"""Masks drawn on a GPU: the kernel against `Random.bernoulli`, programs that draw their masks, and,
where there is a device, a transformer with dropout as one graph."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from cupy_standin import COMPILER, StandIn
from test_program_gpu import gpu, on_device, same  # noqa: F401 - gpu is a fixture

from npdrt import ops, philox, record, value_and_grad
from npdrt.errors import Error
from npdrt.models import Transformer
from npdrt.ops.dropout import keep_mask
from npdrt.program.cuda import WARM_UPS, CudaMemory
from npdrt.random import Random

needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
LARGE = (1 << 64) - 1
STREAMS = [
    Random(0, "train", 0),
    Random(3, "train/layers/00/dropout", 7),
    Random(LARGE, "", LARGE),
    Random(1 << 40, "x", 1 << 33),
]
SIZES = (0, 1, 3, 4, 5, 1023, 1024, 1025, 5000)


@needs_compiler
@pytest.mark.parametrize("stream", STREAMS, ids=str)
def test_the_kernel_draws_the_masks_of_the_host(stream: Random) -> None:
    device = StandIn()
    for n in SIZES:
        for p in (0.0, 0.2, 0.5, 1.0 - 1e-9, 1.0):
            found = philox.bernoulli(device, stream, (n, 1), p)
            assert same(found, stream.bernoulli((n, 1), p)), (n, p)


def test_a_probability_is_checked() -> None:
    for p in (-0.1, 1.1, float("nan")):
        with pytest.raises(Error, match=r"a probability lies in \[0, 1\]"):
            Random(0).bernoulli(3, p)
        with pytest.raises(Error, match=r"a probability lies in \[0, 1\]"):
            philox.bernoulli(StandIn(), Random(0), (3,), p)


def dropped(x: Any, random: Random) -> Any:
    """Three masks, one of them of no element, and numbers that the host draws."""
    masks = [keep_mask(x, random.of(name), rate=r) for name, r in (("a", 0.25), ("b", 0.5))]
    none = keep_mask(x, random.of("none"), rate=0.5, shape=(0, 3))
    y = ops.dropout(ops.dropout(x, masks[0], rate=0.25), masks[1], rate=0.5)
    noise = random.of("noise").uniform(tuple(x.shape))
    return y + noise, *masks, none


def sent(device: StandIn) -> int:
    """How many arrays came from the host since the events were cleared."""
    return sum(entry[-1] == "set" for entry in device.events)


@needs_compiler
def test_a_program_draws_its_masks_in_its_graph() -> None:
    """Nothing is sent while steps follow one another; any other stream gives its own masks."""
    device = StandIn()
    x = np.random.default_rng(0).standard_normal((50, 60))
    follow = [Random(0, "train", k) for k in range(WARM_UPS + 4)]
    others = [Random(0, "train", 3), Random(0, "train", 4), Random(1, "train", 5), Random(1, "", 6)]
    program = record(dropped, x, follow[0], memory=CudaMemory(device, device.blas))
    for k, random in enumerate([*follow, *others, Random(1, "", LARGE), Random(1, "", 0)]):
        device.events.clear()
        found = program(x, random)
        rows = 2 + (k not in (*range(1, len(follow)), len(follow) + 1, len(follow) + 5))
        assert sent(device) == rows, "the array x, the numbers of the host, and perhaps the streams"
        for a, b in zip(found, dropped(x, random), strict=True):
            assert same(a, b), random
    assert program.graph, program.graph_error


@needs_compiler
def test_a_replay_that_failed_does_not_move_the_streams() -> None:
    device = StandIn()
    x = np.ones((4, 5))
    program = record(dropped, x, Random(0), memory=CudaMemory(device, device.blas))
    program(x, Random(0, "", 0))
    operations = program._bound.operations
    program._bound.operations = [(pytest.fail, ("stopped",), {})]
    with pytest.raises(pytest.fail.Exception):
        program(x, Random(0, "", 1))
    program._bound.operations = operations
    random = Random(0, "", 2)
    assert all(same(a, b) for a, b in zip(program(x, random), dropped(x, random), strict=True))


@pytest.mark.gpu
def test_gpu_masks_are_those_of_the_host(gpu: Any) -> None:  # noqa: F811
    like = gpu.ones(3)
    for stream in STREAMS:
        for n in SIZES:
            assert same(keep_mask(like, stream, rate=0.2, shape=(n,)), stream.bernoulli((n,), 0.8))


@pytest.mark.gpu
def test_gpu_a_transformer_with_dropout_is_one_graph(gpu: Any) -> None:  # noqa: F811
    """A replay is the eager step to the bit, with masks that the graph draws."""
    model = Transformer(vocabulary=11, width=8, heads=2, layers=1, hidden=16, dropout=0.3)
    tokens = np.random.default_rng(0).integers(0, 11, (2, 4, 5))

    def step(params: Any, x: Any, y: Any, random: Random) -> Any:
        def loss(p: Any) -> Any:
            output, _ = model.apply(p, {}, x, train=True, random=random)
            return ops.softmax_cross_entropy(output, y)

        value, grads = value_and_grad(loss)(params)
        return {name: w - 0.1 * grads[name] for name, w in params.items()}, value

    found: Any = model.init(seed=0)
    expected, (x, y) = on_device(found), tokens
    program = record(step, found, x, y, Random(0, "train"), memory=CudaMemory())
    assert {draw.method for draw in program.draws.values()} == {"bernoulli"}
    for k in (*range(WARM_UPS + 2), 1, 2):
        random = Random(0, "train", k)
        found, value = program(found, x, y, random)
        expected, loss = step(expected, on_device(x), on_device(y), random)
        assert same(value, loss)
        assert [n for n in expected if not same(found[n], expected[n])] == []
    assert program.graph, program.graph_error
