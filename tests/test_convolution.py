"""Convolution and pooling: against PyTorch, the complex step, explicit matrices and their twins."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import backends
import images
import numpy as np
import pytest
import threadpoolctl
from backends import Backend
from hypothesis import given, settings
from hypothesis import strategies as st

import npdrt
from npdrt import arrays, ops, optim, parallel, record, value_and_grad
from npdrt.autodiff import Tensor, backward
from npdrt.check import check_gradients
from npdrt.errors import Error, FileRefused
from npdrt.ops import blocked, convolution, depthwise, direct, window, winograd
from npdrt.program.calls import flops

try:
    import torch
except ImportError:  # a second opinion, not a requirement
    torch = MagicMock()

F = torch.nn.functional
needs_torch = pytest.mark.skipif(isinstance(torch, MagicMock), reason="PyTorch is not installed")
RNG = np.random.default_rng(1958)
RUNNER = Path(__file__).parents[1] / "docs" / "run_program.py"
FIXED = 600_000  # bytes: what a replay may allocate, whatever its arrays' size
Shape = tuple[int, ...]


@pytest.fixture(autouse=True, scope="module")
def one_thread_of_torch() -> Any:
    """Its threads would wait for each other longer than they work."""
    if isinstance(torch, MagicMock):
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape)


def error(ours: Any, reference: Any) -> float:
    """max|difference| / max|reference|."""
    assert ours.shape == reference.shape
    return float(np.max(np.abs(ours - reference)) / max(np.max(np.abs(reference)), 1e-300))


def locked(*given: np.ndarray) -> list[np.ndarray]:
    """Copies that nothing may write to."""
    copies = [np.array(a) for a in given]
    for a in copies:
        a.flags.writeable = False
    return copies


def differentiated(
    operation: Callable[..., Any], given: list[np.ndarray], cotangent: np.ndarray, **chosen: Any
) -> list[Any]:
    """The value, and the cotangents of the arguments."""
    tensors = [Tensor(a) for a in given]
    y = operation(*tensors, **chosen)
    assert y.shape == cotangent.shape
    found = backward(y, cotangent)
    return [y.value, *(found[id(t)] for t in tensors)]


def by_torch(function: Any, given: list[np.ndarray], cotangent: Callable[[Shape], Any]) -> Any:
    """The value, the cotangent drawn for it, and what PyTorch makes of it."""
    tensors = [torch.tensor(np.array(a), requires_grad=True) for a in given]
    y = images.turned(function)(*tensors)
    g = cotangent(tuple(y.shape))
    found = torch.autograd.grad(y, tensors, torch.tensor(g))
    return g, [y.detach().numpy(), *(a.numpy() for a in found)]


# --- against PyTorch --------------------------------------------------------------------------

KERNELS = ((1, 1), (2, 2), (3, 3), (5, 5), (7, 7), (1, 3), (4, 2))
STRIDES = (1, 2, 3, (2, 1))


@needs_torch
@pytest.mark.parametrize("groups", [1, 2, 4, 8])
@pytest.mark.parametrize("kernel", KERNELS, ids=str)
@pytest.mark.parametrize("padding", [0, 1, 2, (0, 3)], ids=str)
@pytest.mark.parametrize("stride", STRIDES, ids=str)
def test_convolution_against_torch(stride: Any, padding: Any, kernel: Shape, groups: int) -> None:
    for count, height, width in ((3, 9, 8), (1, 7, 11), (5, 7, 7)):
        channels = max(4, groups)  # 8 groups: depthwise
        shape = 8, channels // groups, *kernel
        given = locked(normal(channels, count, height, width), normal(*shape), normal(8))
        chosen = {"stride": stride, "padding": padding, "groups": groups}
        g, expected = by_torch(partial(F.conv2d, **chosen), given, lambda shape: normal(*shape))
        found = differentiated(ops.conv2d, given, g, **chosen)
        assert max(map(error, found, expected)) <= 1e-12


@needs_torch
@pytest.mark.parametrize("size", [1, 2, 3, 5, (3, 2)], ids=str)
@pytest.mark.parametrize("stride", [None, *STRIDES], ids=str)
@pytest.mark.parametrize("padding", [0, 1, 2, (1, 0)], ids=str)
@pytest.mark.parametrize("name", ["average_pool", "max_pool"])
def test_pools_against_torch(name: str, padding: Any, stride: Any, size: Any) -> None:
    """Rounded values have ties, which PyTorch decides as we do."""
    if any(2 * p > k for p, k in zip(images.two(padding), images.two(size), strict=True)):
        return
    theirs = {"average_pool": F.avg_pool2d, "max_pool": F.max_pool2d}[name]
    for count, height, width in ((3, 9, 8), (1, 7, 11)):
        given = locked(np.round(2 * normal(3, count, height, width)) / 2)
        g, expected = by_torch(
            lambda x: theirs(x, size, stride, padding), given, lambda shape: normal(*shape)
        )
        chosen = {"size": size, "stride": stride, "padding": padding}
        found = differentiated(getattr(ops, name), given, g, **chosen)
        assert max(map(error, found, expected)) <= 1e-14


LAYERS = (  # channels, images, height and width, outputs, kernel, stride, padding
    *((64, 5, (32, 32), 64, 3, 1, 1), (128, 9, (16, 16), 128, 3, 1, 1)),
    *((256, 7, (8, 8), 96, 3, 1, 1), (160, 33, (4, 4), 512, 3, 1, 1)),
    *((64, 4, (32, 32), 128, 3, 2, 1), (128, 5, (16, 16), 64, 1, 2, 0)),
    *((3, 2, (64, 64), 64, 7, 2, 3), (70, 3, (56, 56), 70, 3, 1, 1)),
    *((130, 3, (28, 28), 40, 1, 1, 0), (2, 1, (300, 40), 5, (5, 1), 1, (2, 0))),
)


@needs_torch
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_layers_of_real_networks(layer: Any) -> None:
    """Of several blocks, with ragged last ones. Float32 has the error of a float32 product: a few
    roundings of the sum of magnitudes' root."""
    channels, count, size, outputs, kernel, stride, padding = layer
    given = locked(normal(channels, count, *size), normal(outputs, channels, *images.two(kernel)))
    chosen = {"stride": stride, "padding": padding}
    g, expected = by_torch(partial(F.conv2d, **chosen), given, lambda shape: normal(*shape))
    assert max(map(error, differentiated(ops.conv2d, given, g, **chosen), expected)) <= 1e-12
    single = [a.astype("float32") for a in given]
    found = differentiated(ops.conv2d, single, g.astype("float32"), **chosen)
    assert {a.dtype for a in found} == {np.dtype("float32")}
    assert max(map(error, found, expected)) <= 2e-6


# --- what it is -------------------------------------------------------------------------------

SMALL = [
    *itertools.product([(3, 2, 5, 4), (2, 1, 4, 7)], [(3, 3), (1, 1), (2, 4)], [1, 2, (1, 3)],
                       [0, 1, (2, 0)])
]  # fmt: skip


def toeplitz(w: np.ndarray, shape: Shape, stride: Any, padding: Any) -> np.ndarray:
    """A convolution as a matrix, made entry by entry from its formula."""
    (_, count, *size), (s, t), (p, q) = shape, images.two(stride), images.two(padding)
    made = [(n + 2 * a - k) // b + 1 for n, a, b, k in
            zip(size, (p, q), (s, t), w.shape[2:], strict=True)]  # fmt: skip
    matrix = np.zeros((w.shape[0], count, *made, *shape))
    for o, c, k, m in np.ndindex(*w.shape):
        for n, i, j in np.ndindex(count, *made):
            y, z = s * i + k - p, t * j + m - q
            if 0 <= y < size[0] and 0 <= z < size[1]:
                matrix[o, n, i, j, c, n, y, z] += w[o, c, k, m]
    return matrix.reshape(w.shape[0] * count * math.prod(made), -1)


@pytest.mark.parametrize(("shape", "kernel", "stride", "padding"), SMALL, ids=str)
def test_a_convolution_is_its_toeplitz_matrix(
    shape: Shape, kernel: Shape, stride: Any, padding: Any
) -> None:
    """And its derivative by the input is the transpose."""
    x, w = normal(*shape), normal(3, shape[0], *kernel)
    matrix = toeplitz(w, shape, stride, padding)
    y = ops.conv2d(x, w, stride=stride, padding=padding)
    assert error(y.reshape(-1), matrix @ x.reshape(-1)) <= 1e-14
    g = normal(*y.shape)
    _, gx, _ = differentiated(ops.conv2d, [x, w], g, stride=stride, padding=padding)
    assert error(gx.reshape(-1), matrix.T @ g.reshape(-1)) <= 1e-14


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_the_derivatives_are_adjoints(data: Any) -> None:
    """<conv(x, w), g> = <x, gx> = <w, gw>, on drawn shapes."""
    draw = data.draw
    groups, stride = draw(st.sampled_from([1, 1, 2, 3])), draw(st.tuples(*[st.integers(1, 4)] * 2))
    kernel, padding = (
        draw(st.tuples(*[st.integers(1, 5)] * 2)),
        draw(st.tuples(*[st.integers(0, 4)] * 2)),
    )
    least = [max(1, k - 2 * p) for k, p in zip(kernel, padding, strict=True)]
    size = [draw(st.integers(n, n + 9)) for n in least]
    x = normal(groups * draw(st.integers(1, 3)), draw(st.integers(1, 4)), *size)
    w = normal(groups * draw(st.integers(1, 3)), x.shape[0] // groups, *kernel)
    chosen = {"stride": stride, "padding": padding, "groups": groups}
    expected = images.convolved(x, w, **chosen)
    g = normal(*expected.shape)
    y, gx, gw = differentiated(ops.conv2d, [x, w], g, **chosen)
    assert error(y, expected) <= 1e-13
    inner, scale = np.vdot(y, g), np.linalg.norm(y) * np.linalg.norm(g)
    assert abs(np.vdot(x, gx) - inner) <= 1e-13 * scale
    assert abs(np.vdot(w, gw) - inner) <= 1e-13 * scale


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("stride", [1, 2, (3, 1)], ids=str)
@pytest.mark.parametrize("kernel", [(3, 3), (1, 1), (2, 5)], ids=str)
def test_convolution_against_the_complex_step(kernel: Shape, stride: Any, groups: int) -> None:
    x, w, b = normal(4, 2, 5, 6), normal(2, 4 // groups, *kernel), normal(2)
    weights = normal(*ops.conv2d(x, w, stride=stride, padding=1, groups=groups).shape)

    def loss(params: Any) -> Any:
        y = ops.conv2d(*params.values(), stride=stride, padding=1, groups=groups)
        return ops.sum(y * y * weights)

    found = check_gradients(loss, {"x": x, "w": w, "b": b}, tolerance=1e-12)
    assert found.method == "complex step"


@pytest.mark.parametrize("padding", [0, 1])
def test_pools_against_other_derivatives(padding: int) -> None:
    x, weights = normal(2, 2, 5, 6), normal(2, 2)

    def loss(params: Any, pool: Any) -> Any:
        y = pool(params["x"], size=3, stride=2, padding=padding)
        return ops.sum(ops.global_average_pool(y * y) * weights)

    smooth = check_gradients(lambda p: loss(p, ops.average_pool), {"x": x}, tolerance=1e-12)
    kinked = check_gradients(lambda p: loss(p, ops.max_pool), {"x": x})
    assert (smooth.method, kinked.method) == ("complex step", "central differences")


def test_ties_infinities_and_nans_of_a_maximum() -> None:
    x = np.array([[1, 2, 2, 1], [2, 0, 1, 2]])[None, None].astype(float)
    y, gx = differentiated(ops.max_pool, [x], np.array([[[[3.0, 5.0]]]]), size=2)
    assert y.tolist() == [[[[2, 2]]]]
    assert gx.tolist() == [[[[0, 3, 5, 0], [0, 0, 0, 0]]]]  # the first, row by row
    low = np.full((1, 1, 2, 2), -math.inf)
    y, gx = differentiated(ops.max_pool, [low], np.ones((1, 1, 2, 2)), size=2, padding=1, stride=2)
    assert (y == -math.inf).all()
    assert (gx == 1).all()  # an element gets it, and no place beyond the image
    x[0, 0, 1, 1] = x[0, 0, 1, 0] = math.nan
    y, gx = differentiated(ops.max_pool, [x], np.array([[[[3.0, 5.0]]]]), size=2)
    assert np.isnan(y).tolist() == [[[[True, False]]]]
    assert gx.tolist() == [[[[0, 0, 5, 0], [3, 0, 0, 0]]]]


def test_a_window_without_padding_sees_no_edge() -> None:
    """A product with a zero of the padding would make NaN of inf."""
    x, w = np.full((1, 1, 3, 3), math.inf), np.ones((1, 1, 3, 3))
    assert (ops.conv2d(x, w, padding=1) == math.inf).all()
    with arrays.quiet():
        assert np.isnan(ops.conv2d(np.full((1, 1, 1, 1), math.nan), w, padding=1)).all()


# --- two twins, to the bit ----------------------------------------------------------------------

TWINS = [
    *itertools.product([(6, 3, 9, 7), (130, 5, 6, 6)], [1, 2, (2, 3)], [(1, 1), (3, 3), (2, 5)],
                       [0, 1], [1, 2]),
    *(((64, 3, 32, 32), 1, (3, 3), 1, 1), ((64, 2, 50, 40), 2, (3, 3), 1, 1)),
    *(((16, 7, 30, 20), 1, (1, 1), 0, 1), ((160, 70, 4, 4), 1, (3, 3), 1, 1)),
]  # fmt: skip
DEPTHWISE = [  # several blocks of images, of rows of one image, of channels
    *(((12, 5, 9, 8), stride, (3, 3), 1, 12) for stride in (1, 2, 3)),
    *(((3, 1, 300, 260), 2, (5, 5), 2, 3), ((2, 40, 33, 32), 1, (3, 3), 0, 2)),
    *(((70, 90, 7, 7), 1, (5, 5), 2, 70), ((6, 3, 20, 11), 1, (1, 1), 0, 6)),
]  # fmt: skip
TILED = [  # in Winograd's form: odd sizes, ragged blocks, parts of the batch, every offset of 2
    *itertools.product([(64, 21, 8, 8), (70, 3, 7, 34)], [1], [(3, 3)], [0, 1, 2], [1]),
    *(((128, 5, 8, 8), 1, (3, 3), 1, 2), ((64, 2, 52, 56), 1, (3, 3), 3, 1)),
    *(((64, 3, 20, 21), 2, (6, 6), 2, 1), ((80, 35, 4, 4), 1, (3, 3), 1, 1)),
    ((64, 1, 17, 20), 1, (3, 3), 1, 1),
]  # fmt: skip


def twins(shape: Shape, stride: Any, kernel: Shape, padding: int, groups: int, dtype: str,
          outputs: int = 4, form: str = "winograd") -> Any:  # fmt: skip
    """Calls of both twins: (definition, fast, arguments, settings) for each of the products."""
    x = normal(*shape).astype(dtype)
    w = normal(outputs * groups, shape[0] // groups, *kernel).astype(dtype)
    chosen = {"stride": images.two(stride), "padding": (padding, padding), "groups": groups,
              "form": form}  # fmt: skip
    made = window.output_size(shape[2:], kernel, chosen["stride"], chosen["padding"])
    g = normal(len(w), shape[1], *made).astype(dtype)
    for function, pair, size in (
        (convolution.convolve, (x, w), None),
        (convolution.convolve_input, (g, w), shape[2:]),
        (convolution.convolve_weight, (g, x), kernel),
    ):
        sized = chosen if size is None else {**chosen, "size": size}
        yield function.definition, getattr(blocked, function.__name__), locked(*pair), sized


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    ("case", "outputs"),
    [
        *((case, 4) for case in TWINS),
        *((case, 66) for case in TILED),
        *((case, 1) for case in DEPTHWISE),
    ],
    ids=str,
)
def test_the_fast_twin_has_the_bits_of_the_definition(case: Any, outputs: int, dtype: str) -> None:
    """On one thread of the BLAS and on several; into `out` too, whatever is in it."""
    for definition, fast, pair, chosen in twins(*case, dtype, outputs):
        with threadpoolctl.threadpool_limits(1, user_api="blas"):
            expected = definition(*pair, **chosen)
            assert fast(*pair, **chosen).tobytes() == expected.tobytes()
        out = np.full(expected.shape, np.nan, dtype)
        with threadpoolctl.threadpool_limits(3, user_api="blas"):
            assert fast(*pair, out, **chosen) is out
        assert out.tobytes() == expected.tobytes()


@pytest.mark.parametrize("layout", [lambda a: np.array(a, order="F"), lambda a: a[::-1][::-1],
                                    lambda a: np.repeat(a, 2, axis=3)[..., ::2]])  # fmt: skip
def test_layouts_of_arguments_change_no_bit(layout: Any) -> None:
    for kernel in ((3, 3), (1, 1)):
        for _, fast, pair, chosen in twins((6, 3, 9, 7), 1, kernel, 0, 1, "float32"):
            expected = fast(*pair, **chosen)
            assert fast(*map(layout, pair), **chosen).tobytes() == expected.tobytes()


def test_complex_arguments_too() -> None:
    x, w = normal(3, 2, 5, 6) + 1j * normal(3, 2, 5, 6), normal(2, 3, 3, 3)
    for a, b in ((x, w), (x.real, w + 1j * normal(*w.shape)), (x, w + 0j)):
        assert error(ops.conv2d(a, b, padding=1), images.convolved(a, b, padding=1)) <= 1e-14


# --- the depthwise form -------------------------------------------------------------------------


@pytest.mark.parametrize("case", DEPTHWISE, ids=str)
def test_depthwise_against_the_groups_one_by_one(case: Any) -> None:
    """The same sums in another order; the form is taken, and only for one output a channel."""
    for definition, fast, (a, b), chosen in twins(*case, "float64", 1):
        groups = chosen["groups"]
        pairs = zip(np.split(a, groups), np.split(b, groups), strict=True)
        each = [definition(*pair, **{**chosen, "groups": 1}) for pair in pairs]
        found = fast(a, b, **chosen)
        assert error(found, np.concatenate(each)) <= 1e-14
    assert depthwise.suits((case[-1], 1, 3, 3), case[-1])
    assert not depthwise.suits((2 * case[-1], 1, 3, 3), case[-1])
    assert not depthwise.suits((1, 1, 3, 3), 1)


def test_depthwise_keeps_signs_masks_and_infinities() -> None:
    """Columns that nobody reads change no result, in any block."""
    x, w = np.abs(normal(6, 5, 7, 8)), np.abs(normal(6, 1, 3, 3)) + 1
    x[2, 1, 3, 7] = np.inf  # the last column: its neighbour in memory is in the next row
    chosen: dict[str, Any] = {"stride": (1, 1), "padding": (1, 1), "groups": 6}
    y = blocked.convolve(x, w, **chosen)
    assert np.array_equal(np.argwhere(np.isinf(y)),
                          [(2, 1, i, j) for i in (2, 3, 4) for j in (6, 7)])  # fmt: skip
    assert np.isfinite(y).sum() == y.size - 6
    g = np.ones_like(y)
    g[:, :, :, 6:] = 0
    with np.errstate(invalid="ignore"):
        gw = blocked.convolve_weight(g, x, size=(3, 3), **chosen)
    assert np.isfinite(np.delete(gw, 2, axis=0)).all()
    assert np.isfinite(gw[2, 0, :, :1]).all()


# --- Winograd's form ----------------------------------------------------------------------------


@pytest.mark.parametrize("case", TILED, ids=str)
def test_tiles_against_the_direct_form(case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same sums in another order: as near as their magnitudes allow."""
    calls = list(twins(*case, "float64", 66))
    tiled = [fast(*pair, **chosen) for _, fast, pair, chosen in calls]
    monkeypatch.setattr(winograd, "LEAST", 1 << 30)
    direct = [fast(*pair, **chosen) for _, fast, pair, chosen in calls]
    assert max(map(error, tiled, direct)) <= 1e-14
    same = [np.array_equal(*both) for both in zip(tiled, direct, strict=True)]
    assert same == ([False] * 3 if case[1] == 1 else [True, False, True])


def test_where_tiles_save_nothing_the_form_is_direct() -> None:
    def suits(
        size: int, kernel: int = 3, stride: int = 1, channels: int = 64, count: int = 64
    ) -> bool:
        sizes = (size, size), (kernel, kernel), (stride, stride), (1, 1)
        assert not winograd.suits(window.forward_window(*sizes), count, channels, 64)
        return winograd.suits(window.forward_window(*sizes, "winograd"), count, channels, 64)

    assert [n for n in range(1, 12) if not suits(n)] == [1, 3]
    assert not suits(8, kernel=5)
    assert not suits(8, stride=2)
    assert not suits(8, channels=63)
    assert [n for n in range(1, 9) if suits(8, count=n)] == [4, 5, 6, 7, 8]


def test_the_form_is_one_of_two() -> None:
    with pytest.raises(Error, match="form must be one of direct, winograd; got 'tiles'"):
        ops.conv2d(normal(2, 1, 4, 4), normal(2, 2, 3, 3), form="tiles")


def three(x: Any, w: Any, g: Any, form: str) -> list[Any]:
    """A convolution of padding 1, and its derivatives by image and kernel."""
    chosen: dict[str, Any] = {"stride": (1, 1), "padding": (1, 1), "groups": 1, "form": form}
    return [
        convolution.convolve(x, w, **chosen),
        convolution.convolve_input(g, w, size=x.shape[2:], **chosen),
        convolution.convolve_weight(g, x, size=w.shape[2:], **chosen),
    ]


def sparse(*shape: int, dtype: str) -> np.ndarray:
    """Few numbers > 0."""
    return (np.abs(normal(*shape)) * (RNG.random(shape) < 0.05)).astype(dtype)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_direct_form_keeps_signs_masks_and_infinities(dtype: str) -> None:
    """The default: no result depends on what it is not made of."""
    x, w = sparse(64, 8, 8, 8, dtype=dtype), sparse(64, 64, 3, 3, dtype=dtype)
    assert ops.conv2d(x, w, padding=1).min() >= 0
    x, w = normal(64, 8, 8, 8).astype(dtype), normal(64, 64, 3, 3).astype(dtype)
    w[:, :, 2], w[:, :, 1, 1:] = 0, 0
    before = ops.conv2d(x, w, padding=1)
    x[:, :, 5] += 1e4
    assert np.array_equal(ops.conv2d(x, w, padding=1)[:, :, :5], before[:, :, :5])
    x[3, 2, 4, 4] = np.inf
    with np.errstate(invalid="ignore"):
        found = ops.conv2d(x, np.abs(w) + 1, padding=1)
    assert np.isinf(found[:, 2, 3:6, 3:6]).all()
    assert np.isfinite(np.delete(found, 2, axis=1)).all()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("seed", range(6))
def test_the_bound_of_tiles(dtype: str, seed: int) -> None:
    """81 (C + 10) u sum of (largest |g|) (largest |d| of the tile), on numbers of all sizes."""
    rng, shape = np.random.default_rng(seed), (64, 4, 8, 8)
    spread = 10.0 ** rng.uniform(-seed, seed, shape)
    x = (rng.normal(size=shape) * spread).astype(dtype)
    w = (rng.normal(size=(66, 64, 3, 3)) * (rng.random((66, 64, 3, 3)) < 0.5)).astype(dtype)
    found = ops.conv2d(x, w, padding=1, form="winograd")
    exact = images.convolved(x.astype("longdouble"), w.astype("longdouble"), padding=1)
    tile = images.largest(np.abs(x), size=4, stride=2, padding=1)  # (C, N, 4, 4)
    most = np.einsum("oc,cnij->onij", np.abs(w).max((2, 3)), tile)
    bound = 81 * 74 * np.finfo(dtype).eps / 2 * most.repeat(2, 2).repeat(2, 3)
    assert (np.abs(found - exact) <= bound).all()
    assert not np.array_equal(found, ops.conv2d(x, w, padding=1))


BIG = {"float32": 2e38, "float64": 1.5e308}


@pytest.mark.parametrize("dtype", BIG)
@pytest.mark.parametrize("large", ["x", "w", "g", "x and g", "one x", "one g", "one tap"])
def test_tiles_of_large_numbers_do_not_overflow(dtype: str, large: str) -> None:
    """Where no product or sum of the direct form comes near the largest number."""
    most = BIG[dtype]
    x, w, g = normal(64, 8, 8, 8), normal(64, 64, 3, 3), normal(64, 8, 8, 8)
    if large == "x":
        x, w, g = most * (1 - 0.1 * np.abs(np.tanh(x))), w * 1e-7, g * 1e-7
    elif large == "w":
        x, w, g = x * 1e-7, most * (1 - 0.1 * np.abs(np.tanh(w))), g * 1e-7
    elif large == "g":
        x, w, g = x * 1e-7, w * 1e-7, most * (1 - 0.1 * np.abs(np.tanh(g)))
    elif large == "x and g":  # in tiles that do not meet
        x[:, 0], g[:, 1] = most, most
        x[:, 1], g[:, 0], w = x[:, 1] * 1e-7, g[:, 0] * 1e-7, w * 1e-7
    elif large == "one x":
        x[3, 2, 5, 5], w, g = most, w * 1e-7, g * 1e-7
    elif large == "one g":
        g[3, 2, 5, 5], w, x = most, w * 1e-7, x * 1e-7
    else:
        w[3, 2, 1, 1], x, g = most, x * 1e-7, g * 1e-7
    arguments = [a.astype(dtype) for a in (x, w, g)]
    tiled, direct = (three(*arguments, form) for form in ("winograd", "direct"))
    for a, b in zip(tiled, direct, strict=True):
        assert np.isfinite(b).all()
        assert np.isfinite(a).all()
        assert np.abs(a / most - b / most).max() <= 1e-5 * np.abs(b / most).max()


@pytest.mark.parametrize("dtype", BIG)
def test_scales_change_no_bit(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles that are scaled beside those that are not; the twins, and plain NumPy."""
    x, w, g = (normal(*s).astype(dtype) for s in ((64, 8, 8, 8), (66, 64, 3, 3), (66, 8, 8, 8)))
    expected = three(x, w, g, "winograd")
    monkeypatch.setattr(winograd, "limits", lambda x: (0.5, 4.0))
    found = three(x, w, g, "winograd")
    assert all(map(np.array_equal, found, expected))


@pytest.mark.parametrize("which", [0, 1, 2])
def test_the_twins_scale_alike(which: int, tmp_path: Path) -> None:
    """So does docs/run_program.py."""
    case = ((64, 5, 8, 8), 1, (3, 3), 1, 1)
    (_, _, (x, w), chosen), (_, _, (g, _), _), _ = twins(*case, "float32", 66)
    arrays = [np.array(a) for a in (x, w, g)]
    arrays[which][:, ::2] *= np.float32(1e20 if which == 1 else 1e36)
    x, w, g = (a * np.float32(1 if i == which else 1e-3) for i, a in enumerate(arrays))
    calls = [(convolution.convolve, (x, w), {}),
             (convolution.convolve_input, (g, w), {"size": x.shape[2:]}),
             (convolution.convolve_weight, (g, x), {"size": w.shape[2:]})]  # fmt: skip
    with threadpoolctl.threadpool_limits(1, user_api="blas"):
        expected = [f(*pair, **chosen, **size) for f, pair, size in calls]
        for (f, pair, size), a in zip(calls, expected, strict=True):
            assert np.array_equal(f.definition(*pair, **chosen, **size), a)
    program = record(lambda x, w, g: three(x, w, g, "winograd"), x, w, g)
    found = run_plainly(tmp_path, program, x=x, w=w, g=g)
    assert all(np.array_equal(found[str(i)], a) for i, a in enumerate(expected))
    assert all(np.isfinite(a).all() for a in expected)


def test_a_large_kernel_has_fewer_sums() -> None:
    """Each is a kernel's size; two at least, for two threads."""
    x = np.empty((512, 16, 34, 34), np.int8)
    of = window.forward_window((34, 34), (3, 3), (1, 1), (1, 1))
    for channels, outputs, count in ((64, 64, 8), (128, 128, 8), (256, 128, 4), (512, 512, 2)):
        places = winograd.places(x, of)
        found = winograd.parts(places, outputs, channels)
        assert len(found) == count
        assert [place for part in found for place in part] == places


def test_the_formula_of_a_tile() -> None:
    """The docstring's matrices: exact on integers, and the direct form's on one tile."""
    g, d = RNG.integers(-4, 5, (3, 3)), RNG.integers(-9, 10, (4, 4))
    over = np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])
    inner = np.array([[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, -1, 0, 1]])
    outer = np.array([[1, 1, 1, 0], [0, 1, -1, 1]])
    transformed, rows = np.empty((4, 4)), np.empty((4, 3))
    winograd.transform(transformed, rows, g)
    assert np.array_equal(transformed.T, over @ g @ over.T)
    restored, rows = np.empty((3, 3)), np.empty((3, 4))
    winograd.restore(restored, rows, 4.0 * d)
    assert np.array_equal(restored, over.T @ (4 * d).T @ over)
    y = outer @ ((over @ g @ over.T) * (inner @ d @ inner.T)) @ outer.T
    direct = [[np.sum(g * d[i : i + 3, j : j + 3]) for j in (0, 1)] for i in (0, 1)]
    assert np.array_equal(y, direct)


@pytest.mark.parametrize("groups", [1, 2])
def test_tiles_of_complex_arguments(groups: int) -> None:
    """Each product is linear in its arguments."""
    case = ((64 * groups, 4, 8, 8), 1, (3, 3), 1, groups, "float64", 64)
    others = [pair for _, _, pair, _ in twins(*case)]
    for (_, fast, (a, b), chosen), (c, d) in zip(twins(*case), others, strict=True):
        parts = [[fast(x, y, **chosen) for y in (b, d)] for x in (a, c)]
        assert error(fast(a + 1j * c, b, **chosen), parts[0][0] + 1j * parts[1][0]) <= 1e-14
        assert error(fast(a, b + 1j * d, **chosen), parts[0][0] + 1j * parts[0][1]) <= 1e-14
        whole = parts[0][0] - parts[1][1] + 1j * (parts[0][1] + parts[1][0])
        assert error(fast(a + 1j * c, b + 1j * d, **chosen), whole) <= 1e-14


# --- threads ------------------------------------------------------------------------------------


def blas_threads() -> set[int]:
    """Of NumPy's BLAS; what other libraries of the process bring with them is theirs."""
    return {library.num_threads for library in parallel._blas().lib_controllers}


def test_the_threads_of_the_blas_are_given_back() -> None:
    during: list[set[int]] = []
    with threadpoolctl.threadpool_limits(2, user_api="blas"):
        parallel.run([lambda: during.append(blas_threads())] * 5)
        assert during == [{1}] * 5
        with pytest.raises(ZeroDivisionError):
            parallel.run([lambda: None, lambda: 1 / 0, lambda: None])
        assert blas_threads() == {2}
        parallel.run([])


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_every_task_runs_once_whoever_it_is(threads: int) -> None:
    done: list[int] = []
    with threadpoolctl.threadpool_limits(threads, user_api="blas"):
        parallel.run([partial(done.append, k) for k in range(50)])
    assert sorted(done) == list(range(50))


def test_scratch_arrays_are_apart_and_used_again() -> None:
    a, b = parallel.scratch("float32", (3, 5), (7,))
    a[...], b[...] = 1, 2
    assert (a == 1).all()
    (c,) = parallel.scratch("float64", (2,), use="caller")
    assert not np.may_share_memory(a, c)
    (d,) = parallel.scratch("float32", (3, 5))
    assert a.__array_interface__["data"] == d.__array_interface__["data"]
    assert a.__array_interface__["data"][0] % 8 == 0


def test_convolutions_on_two_threads_of_the_user() -> None:
    x, w = normal(8, 4, 16, 16), normal(8, 8, 3, 3)
    expected, found = ops.conv2d(x, w, padding=1), []
    users = [threading.Thread(target=lambda: found.append(ops.conv2d(x, w, padding=1)))
             for _ in range(4)]  # fmt: skip
    for user in users:
        user.start()
    for user in users:
        user.join()
    assert len(found) == 4
    assert all(np.array_equal(y, expected) for y in found)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_process_convolves() -> None:
    script = (
        "import numpy as np, os, sys, threadpoolctl\n"
        "from npdrt import ops\n"
        "x, w = np.ones((8, 4, 16, 16)), np.ones((8, 8, 3, 3))\n"
        "with threadpoolctl.threadpool_limits(2):\n"
        "    y = ops.conv2d(x, w)\n"
        "    child = os.fork()\n"
        "    if not child:\n"
        "        os._exit(not np.array_equal(ops.conv2d(x, w), y))\n"
        "    sys.exit(os.waitpid(child, 0)[1])\n"
    )
    flags = ["-W", "ignore::DeprecationWarning"]
    subprocess.run([sys.executable, *flags, "-c", script], check=True, timeout=60)


# --- programs -------------------------------------------------------------------------------------


def network(params: Any, x: Any, y: Any) -> Any:
    """A small residual network on images (N, C, H, W), with everything of this file."""
    h = ops.transpose(x, axes=(1, 0, 2, 3))
    h = ops.relu(ops.conv2d(h, params["first"], params["bias"], padding=1))
    h = ops.max_pool(h, size=3, stride=2, padding=1)
    skip = ops.conv2d(h, params["skip"], stride=2)
    h = ops.relu(ops.conv2d(h, params["grouped"], stride=2, padding=1, groups=2)) + skip
    h = ops.average_pool(ops.conv2d(h, params["pointwise"]), size=2, stride=1)
    logits = ops.linear(ops.transpose(ops.global_average_pool(h)), params["last"])
    return ops.softmax_cross_entropy(logits, y)


def step(params: Any, state: Any, x: Any, y: Any, lr: Any) -> Any:
    loss, grads = value_and_grad(network)(params, x, y)
    return *optim.fromage(lr=0.01).update(params, grads, state, lr=lr), loss


def start(dtype: str, count: int, size: int, scale: int = 1) -> Any:
    shapes = {
        "first": (8 * scale, 3, 3, 3), "bias": (8 * scale,), "grouped": (12, 4 * scale, 3, 3),
        "skip": (12, 8 * scale, 1, 1), "pointwise": (10, 12, 1, 1), "last": (5, 10),
    }  # fmt: skip
    params = {name: (0.3 * normal(*shape)).astype(dtype) for name, shape in shapes.items()}
    x = normal(count, 3, size, size - 1).astype(dtype)
    return params, optim.fromage(lr=0.01).init(params), x, RNG.integers(0, 5, count), 0.01


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_replayed_step_has_the_bits_of_the_eager_one(dtype: str, fast: bool) -> None:
    given = start(dtype, count=6, size=17)
    program = record(step, *given, fast=fast)
    eager = held = given[:2]
    for _ in range(3):
        *eager, loss = step(*eager, *given[2:])
        *held, found = program(*held, *given[2:])
        assert found.tobytes() == loss.tobytes()
        for name, x in eager[0].items():
            assert held[0][name].tobytes() == x.tobytes(), name


def peak(program: Any, given: Any) -> int:
    """Bytes at the highest point of a replay, above what was there before."""
    for _ in range(2):
        program(*given)
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        program(*given)
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("size", [32, 64])
def test_a_replay_allocates_nothing_that_grows(size: int) -> None:
    given = start("float64", count=16, size=size, scale=2)
    program = record(step, *given)
    assert 16 * 16 * size * size * 8 > 3 * FIXED
    assert peak(program, given) < FIXED


@pytest.mark.parametrize("size", [16, 32])
def test_a_replay_of_tiles_allocates_nothing_that_grows(size: int) -> None:
    x, w = normal(64, 16, size, size), normal(64, 64, 3, 3)

    def products(x: Any, w: Any) -> Any:
        chosen: dict[str, Any] = {"stride": (1, 1), "padding": (1, 1), "groups": 1,
                                  "form": "winograd"}  # fmt: skip
        y = convolution.convolve(x, w, **chosen)
        gx = convolution.convolve_input(y, w, size=(size, size), **chosen)
        return gx, convolution.convolve_weight(y, x, size=(3, 3), **chosen)

    assert x.nbytes > 3 * FIXED
    assert peak(record(products, x, w), (x, w)) < FIXED


def test_a_program_lists_its_convolutions() -> None:
    given = start("float32", count=6, size=17)
    program = record(step, *given)
    found = {(c.function, flops(c, program.values)) for c in program.calls
             if c.kind == "convolution"}  # fmt: skip
    first = 2 * 8 * 3 * 9 * 6 * 17 * 16
    assert {("convolve", first), ("convolve_weight", first)} <= found
    assert ("convolve_input", 2 * 12 * 4 * 9 * 6 * 5 * 4) in found
    assert "convolve(" in program.listing()


def run_plainly(folder: Path, program: Any, **inputs: np.ndarray) -> dict[str, np.ndarray]:
    """What docs/run_program.py makes of a program; its products have the BLAS's threads: one."""
    program.save(folder / "step.json")
    np.savez(folder / "in.npz", **inputs)
    files = [str(folder / name) for name in ("step.json", "in.npz", "out.npz")]
    alone = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
    subprocess.run([sys.executable, str(RUNNER), *files], check=True, env=alone)
    with np.load(folder / "out.npz") as found:
        return dict(found)


def test_a_saved_program_runs_here_and_with_plain_numpy(tmp_path: Path) -> None:
    given = start("float32", count=6, size=17)
    expected, (params, state, x, y, lr) = step(*given), given
    named = {f"params/{k}": a for k, a in params.items()} | {"x": x, "y": y, "lr": np.asarray(lr)}
    plain = run_plainly(
        tmp_path, record(step, *given), **named, **{f"state/{k}": a for k, a in state.items()}
    )
    found = npdrt.program.load(tmp_path / "step.json")(*given)
    for name, a in expected[0].items():
        assert np.array_equal(found[0][name], a), name
        assert np.array_equal(plain[f"0/{name}"], a), name


MANY = ((520, 5, 33, 34), 1, (3, 3), 1, 1)  # of which the weight's derivative has 4 sums, not 5


@pytest.mark.parametrize("case", [*TILED, MANY], ids=str)
def test_plain_numpy_makes_the_tiles_to_the_bit(case: Any, tmp_path: Path) -> None:
    (_, _, (x, w), chosen), (_, _, (g, _), _), _ = twins(*case, "float32", 66)

    def products(x: Any, w: Any, g: Any) -> Any:
        return {
            "y": convolution.convolve(x, w, **chosen),
            "gx": convolution.convolve_input(g, w, size=x.shape[2:], **chosen),
            "gw": convolution.convolve_weight(g, x, size=w.shape[2:], **chosen),
        }

    with threadpoolctl.threadpool_limits(1, user_api="blas"):
        expected = products(x, w, g)
    found = run_plainly(tmp_path, record(products, x, w, g), x=x, w=w, g=g)
    assert all(np.array_equal(found[name], a) for name, a in expected.items())


@pytest.mark.parametrize(
    ("key", "value"),
    [("stride", [0, 1]), ("stride", 1), ("stride", [1.5, 1]), ("padding", [-1, 0]), ("groups", 0),
     ("groups", 3), ("groups", [1]), ("padding", [[1], 1]), ("size", [2, 2]), ("groups", None),
     ("stride", [1, 1, 1]), ("padding", [1 << 40, 1]), ("groups", True), ("form", "fft"),
     ("form", None), ("form", ["direct"]), ("form", 1)],
)  # fmt: skip
def test_files_with_wrong_settings_are_refused(tmp_path: Path, key: str, value: Any) -> None:
    path = tmp_path / "step.json"
    record(lambda x, w: ops.conv2d(x, w), normal(2, 1, 4, 4), normal(2, 2, 3, 3)).save(path)
    content = json.loads(path.read_text())
    content["calls"][0]["settings"][key] = value
    path.write_text(json.dumps(content))
    with pytest.raises(FileRefused):
        npdrt.program.load(path)


# --- other array libraries ------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [1024, 20])
def test_on_every_backend(backend: Backend, limit: int, monkeypatch: Any) -> None:
    """Also in blocks of other sizes; nothing is fetched to the host."""
    params, _, x, y, _ = start("float64", count=3, size=9)
    loss, grads = value_and_grad(network)(params, x, y)
    monkeypatch.setattr(direct, "block_columns", lambda x: limit)
    theirs = {name: backend.asarray(a) for name, a in params.items()}
    waits = backends.synchronisations
    found, derivatives = value_and_grad(network)(theirs, backend.asarray(x), backend.asarray(y))
    assert backends.synchronisations == waits
    assert error(backend.to_host(found), loss) <= 1e-12
    for name, g in grads.items():
        assert error(backend.to_host(derivatives[name]), g) <= 1e-12


@pytest.mark.parametrize("case", TILED, ids=str)
def test_tiles_on_every_backend(backend: Backend, case: Any) -> None:
    for definition, fast, pair, chosen in twins(*case, "float64", 66):
        waits = backends.synchronisations
        found = definition(*map(backend.asarray, pair), **chosen)
        assert backends.synchronisations == waits
        assert error(backend.to_host(found), fast(*pair, **chosen)) <= 1e-14


@pytest.mark.parametrize("count", [1, 2, 3, 64])
@pytest.mark.parametrize("size", [(1, 1), (4, 4), (7, 5), (16, 16), (33, 70), (200, 9), (3000, 1)])
def test_blocks_cover_every_output_once(count: int, size: tuple[int, int]) -> None:
    seen = np.zeros((count, *size), int)
    for some, rows in window.blocks(count, size, 1024):
        seen[some, rows] += 1
        assert seen[some, rows].size <= 2100
    assert (seen == 1).all()


# --- what is refused ------------------------------------------------------------------------------

X, W = np.ones((4, 2, 6, 5)), np.ones((6, 4, 3, 3))
CALLS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "conv2d": (ops.conv2d, {"x": X, "weight": W, "bias": None, "stride": 1, "padding": 0,
                            "groups": 1}),
    "average_pool": (ops.average_pool, {"x": X, "size": 2, "stride": 2, "padding": 0}),
    "max_pool": (ops.max_pool, {"x": X, "size": 2, "stride": 2, "padding": 0}),
    "global_average_pool": (ops.global_average_pool, {"x": X}),
}  # fmt: skip
NOT_IMAGES = [np.ones((4, 2, 6)), np.ones((2, 4, 2, 6, 5)), np.ones(()), np.ones((4, 0, 6, 5)),
              np.ones((0, 2, 6, 5)), np.ones((4, 2, 0, 5)), np.ones((4, 2, 6, 5), int), 3, 2.0,
              np.ones((4, 2, 6, 5), bool), "x", None, [[1.0]]]  # fmt: skip
NOT_PAIRS = ["2", 1.5, None, (1,), (1, 2, 3), (1, 1.5), (), True, (True, 1), -1, (1, -1), math.nan,
             np.ones(2), np.float64(1), {}, [1, None], 1j]  # fmt: skip
WRONG: dict[str, dict[str, list[Any]]] = {
    "conv2d": {
        "x": [*NOT_IMAGES, np.ones((3, 2, 6, 5)), np.ones((8, 2, 6, 5)), np.ones((4, 2, 2, 5)),
              np.ones((4, 2, 6, 2)), np.ones((4, 2, 6, 5), np.float32)],
        "weight": [*NOT_IMAGES, np.ones((6, 3, 3, 3)), np.ones((6, 4, 7, 3)), np.ones((6, 4, 3, 6)),
                   np.ones((6, 4, 3, 3), np.float32), np.ones((6, 4, 0, 3))],
        "bias": [np.ones(5), np.ones((6, 1)), np.ones(()), 1.0, "b", np.ones(6, np.float32),
                 [0.0] * 6, np.ones(6, int)],
        "stride": [*NOT_PAIRS, 0, (0, 1)],
        "padding": [*NOT_PAIRS],
        "groups": ["1", None, 0, -1, 3, 5, 2, 1.0, (1, 1), True, math.inf],
    },
    **{
        name: {
            "x": [*NOT_IMAGES, np.ones((4, 2, 1, 5)), np.ones((4, 2, 6, 1))],
            "size": [*NOT_PAIRS, 0, (0, 1), 7, (2, 6), 100],
            "stride": [s for s in NOT_PAIRS if s is not None] + [0, (0, 1)],
            "padding": [*NOT_PAIRS, 2, (0, 2), 100],
        }
        for name in ("average_pool", "max_pool")
    },
    "global_average_pool": {"x": NOT_IMAGES},
}  # fmt: skip
MALFORMED = [(name, key, value) for name, wrong in WRONG.items() for key, values in wrong.items()
             for value in values]  # fmt: skip


def called(name: str, **changed: Any) -> Any:
    function, given = CALLS[name]
    given = given | changed
    positions = [given.pop(key) for key in ("x", "weight", "bias") if key in given]
    return function(*positions, **given)


@pytest.mark.parametrize(("name", "key", "value"), MALFORMED, ids=lambda x: str(x)[:30])
def test_malformed_calls_are_refused(name: str, key: str, value: Any) -> None:
    """With an `Error` that names the operation, and in a step that is recorded too."""
    called(name)
    with pytest.raises(Error, match=rf"{name}|expected an array|two libraries|expected at least"):
        called(name, **{key: value})
    if isinstance(value, int | float | str | tuple):
        with pytest.raises(Error):
            record(lambda x: called(name, **{"x": x, key: value}), X)


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_several_wrongs_at_once_are_refused(data: Any) -> None:
    name = data.draw(st.sampled_from(sorted(WRONG)))
    keys = data.draw(st.lists(st.sampled_from(sorted(WRONG[name])), min_size=1, unique=True))
    changed = {key: data.draw(st.sampled_from(WRONG[name][key])) for key in keys}
    if len(keys) == 1:
        with pytest.raises(Error):
            called(name, **changed)
        return
    with contextlib.suppress(Error):  # two wrongs can make a right
        called(name, **changed)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": np.ones((3, 2, 6, 5))}, r"conv2d: x has 3 channels \(axis 0 of \(3, 2, 6, 5\)\) and "
                                       r"the weight \(6, 4, 3, 3\) takes 4 x 1"),
        ({"padding": -1}, r"conv2d: padding must be an integer >= 0 or a pair of them; got -1"),
        ({"stride": 0}, r"conv2d: stride must be an integer >= 1"),
        ({"groups": 3}, r"conv2d: groups must divide the 4 channels of x \(axis 0\) and the 6"),
        ({"x": np.ones((4, 0, 6, 5))}, r"have no elements; give at least one image"),
        ({"x": np.ones((4, 2, 6))}, r"expected images \(C, N, H, W\), channel-major; got shape"),
        ({"x": np.ones((4, 2, 2, 5))}, r"a window of \(3, 3\) is larger than the padded image of "
                                       r"\(2, 5\)"),
        ({"weight": W.astype("float32")}, r"arrays of one dtype, .* got float64, float32; convert"),
        ({"bias": np.ones(5)}, r"expected a bias of shape \(6,\) or None; got \(5,\)"),
    ],
)  # fmt: skip
def test_messages_say_what_to_do(changed: Any, message: str) -> None:
    with pytest.raises(Error, match=message):
        called("conv2d", **changed)


def test_settings_of_numpy_are_integers_too() -> None:
    one = np.int64(1)
    y = called("conv2d", stride=(one, np.uint8(2)), padding=[one, 0], groups=np.int32(1))
    assert np.array_equal(y, called("conv2d", stride=(1, 2), padding=(1, 0)))
