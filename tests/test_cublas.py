"""Products by cuBLAS: its arguments mean the product, on a stand-in and on a GPU."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from cupy_standin import HostBlas, StandIn

from npdrt import arrays, cublas, ops
from npdrt.errors import Error, Unavailable

SIZES = [(5, 7, 4), (1, 7, 4), (5, 1, 4), (5, 7, 1), (1, 1, 6), (1, 1, 1), (6, 1, 1), (3, 4, 0)]
STACKS: list[tuple[int, ...]] = [(), (3,), (2, 3), (1, 3)]


@pytest.fixture(params=["stand-in", pytest.param("cupy", marks=pytest.mark.gpu)])
def library(request: pytest.FixtureRequest) -> Any:
    """CuPy, or its stand-in."""
    if request.param == "stand-in":
        return StandIn()
    try:
        return arrays._import_cupy()
    except arrays.Unavailable as error:
        pytest.skip(str(error))


def blas_of(library: Any) -> cublas.Cublas:
    return cublas.Cublas(library, getattr(library, "blas", None))


def host(x: Any) -> Any:
    return np.asarray(arrays.to_host(x))


def layouts(xp: Any, shape: tuple[int, ...], dtype: str, rng: Any) -> Iterator[tuple[str, Any]]:
    """Arrays that broadcast to a shape (..., rows, columns), in many layouts."""
    *stack, r, c = shape

    def made(*shape: int) -> Any:
        return xp.asarray(rng.standard_normal(shape).astype(dtype))

    yield "C", made(*shape)
    yield "transposed", made(*stack, c, r).swapaxes(-1, -2)
    yield "part of the columns", made(*stack, r, c + 3)[..., 1 : 1 + c]
    yield "part of the transposed", made(*stack, c, r + 3).swapaxes(-1, -2)[..., 1 : 1 + r, :]
    yield "every second column", made(*stack, r, 2 * c)[..., ::2]
    yield "upside down", made(*stack, r, c)[..., ::-1, :]
    if stack:
        yield "one for all", made(r, c)
    if len(stack) == 2:
        yield "heads", made(stack[0], r, stack[1], c).transpose(0, 2, 1, 3)
        yield "heads, transposed", made(stack[0], c, stack[1], r).transpose(0, 2, 3, 1)
        yield "one for the last axis", made(stack[0], 1, r, c)
        yield "one for the first axis", made(stack[1], r, c)


@pytest.mark.parametrize("stack", STACKS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_products_are_those_of_numpy(dtype: str, stack: tuple[int, ...], library: Any) -> None:
    rng, blas = np.random.default_rng(0), blas_of(library)
    for m, n, k in SIZES:
        left = layouts(library, (*stack, m, k), dtype, rng)
        right = list(layouts(library, (*stack, k, n), dtype, rng))
        for (name_a, a), (name_b, b) in itertools.product(left, right):
            found, expected = host(blas.matmul(a, b)), host(a) @ host(b)
            assert found.shape == expected.shape
            bound = 4 * k * np.finfo(dtype).eps * np.max(np.abs(host(a)) @ np.abs(host(b)))
            assert np.max(np.abs(found - expected)) <= bound, (name_a, name_b, m, n, k)


def test_products_into_an_array(library: Any) -> None:
    rng, blas = np.random.default_rng(0), blas_of(library)
    a, b = (library.asarray(rng.standard_normal(s)) for s in ((4, 5), (5, 6)))
    whole = library.empty((6, 8), dtype="float64")
    for out in (whole[:4, :6], library.empty((4, 6), dtype="float64"), whole.T[:4, :6]):
        assert blas.matmul(a, b, out) is out
        assert np.allclose(host(out), host(a) @ host(b), rtol=1e-14, atol=1e-14)


def test_other_dtypes_and_vectors_are_left_to_the_library(library: Any) -> None:
    blas = blas_of(library)
    whole = library.asarray(np.arange(6).reshape(2, 3))
    assert (host(blas.matmul(whole, whole.T)) == host(whole) @ host(whole).T).all()
    row = library.asarray(np.arange(3.0))
    assert host(blas.matmul(row, row)) == 5.0


def test_shapes_that_do_not_fit_are_refused(library: Any) -> None:
    blas, a = blas_of(library), library.asarray(np.ones((2, 3)))
    with pytest.raises(Error, match=r"\(2, 3\) @ \(2, 3\) does not fit"):
        blas.matmul(a, a)
    with pytest.raises(Error, match=r"expected \(2, 2\)"):
        blas.matmul(a, a.T, library.empty((3, 3)))


def test_matrices_in_blas_layouts_are_not_copied() -> None:
    """Copies cost time, and in a graph a node."""
    device, rng = StandIn(), np.random.default_rng(0)
    blas = blas_of(device)
    readable = {"C", "transposed", "part of the columns", "part of the transposed", "one for all"}
    for stack in ((), (3,), (2, 3)):
        for name, a in layouts(device, (*stack, 5, 4), "float32", rng):
            b = device.asarray(rng.standard_normal((4, 6)).astype("float32"))
            device.events.clear()
            blas.matmul(a, b)
            ran = [name for _, _, name in device.events]
            assert ran[-1] == "gemm"
            if name in readable or (name == "one for the first axis" and stack[0] == 1):
                assert ran == ["gemm"], (name, stack)


def test_every_stream_gets_the_workspace() -> None:
    device = StandIn()
    blas, a = blas_of(device), device.asarray(np.ones((2, 2)))
    for stream in (device.default, device.cuda.Stream(non_blocking=True), device.default):
        with stream:
            blas.matmul(a, a)  # the stand-in checks stream and workspace
        assert device.blas.stream == stream.ptr


def test_a_failure_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    device = StandIn()
    blas, a = blas_of(device), device.asarray(np.ones((2, 2)))
    monkeypatch.setattr(HostBlas, "cublasGemmEx", lambda *args: 13)
    with pytest.raises(Error, match="cublasGemmEx failed with status 13"):
        blas.matmul(a, a)


def test_without_the_library_the_message_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cublas, "declared", lambda library: library.no_such_function)
    with pytest.raises(Unavailable, match=r'pip install "npdrt\[cuda12\]"'):
        cublas.load.__wrapped__()


@pytest.mark.gpu
def test_gpu_eager_steps_use_the_same_calls() -> None:
    """ops.matmul and ops.linear have the bits of `Cublas`, on any stream."""
    try:
        cupy = arrays._import_cupy()
    except arrays.Unavailable as error:
        pytest.skip(str(error))
    rng, blas = np.random.default_rng(0), cublas.Cublas(cupy)
    a, b = (cupy.asarray(rng.standard_normal(s).astype("float32")) for s in ((33, 65), (65, 17)))
    expected = host(blas.matmul(a, b))
    for stream in (cupy.cuda.get_current_stream(), cupy.cuda.Stream(non_blocking=True)):
        with stream:
            found = ops.matmul(a, b), ops.linear(a, b.T)
            stream.synchronize()
        assert all((host(x) == expected).all() for x in found)
