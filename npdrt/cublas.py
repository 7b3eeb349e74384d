"""Products of CuPy's matrices, by cuBLAS itself.

CuPy does not call cuBLAS while a stream is captured, so that its own products cannot be part of a
CUDA graph (cupy/cupy#6290). These can, and they do not copy a transposed matrix, a part of one, or
a stack whose matrices lie at equal distances; CuPy copies most of these.

The compute types are `CUBLAS_COMPUTE_32F` and `64F`: no TF32, whatever `CUPY_TF32` says, unless you
ask for it (`precision`). A product has the same bits in an eager step, call by call in a program,
and in a graph: algorithm and size of the workspace are fixed, and the arguments depend on shapes
and strides alone.
"""

from __future__ import annotations

import ctypes
import math
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from npdrt.errors import Error, Unavailable

Array = Any
Shape = tuple[int, ...]

WORKSPACE = 32 << 20  # bytes; NVIDIA's advice for a Hopper GPU
ALGORITHM = -1  # CUBLAS_GEMM_DEFAULT: by shapes, alignment and workspace
TYPES = {  # dtype: (cudaDataType, cublasComputeType_t, the type of the factors 1 and 0)
    "float32": (0, 68, ctypes.c_float),
    "float64": (1, 70, ctypes.c_double),
}
TF32 = (
    77  # CUBLAS_COMPUTE_32F_FAST_TF32: operands rounded to 10 bits after the point, sums in float32
)
PRECISIONS = ("ieee", "tf32")


class Form(NamedTuple):
    """How cuBLAS reads a matrix: whether it is transposed, and the elements from a row to the next,
    or from a column to the next if it is."""

    transposed: bool
    leading: int


class Cublas:
    """A handle of cuBLAS on the current device, with a workspace: its products must run one after
    another, on one stream or on streams that wait for each other.

    xp: CuPy. library: cuBLAS; None finds it.
    """

    def __init__(self, xp: Any, library: Any = None):
        self.xp, self.library = xp, load() if library is None else library
        self.handle, self.stream = ctypes.c_void_p(), None
        self._call("cublasCreate_v2", ctypes.byref(self.handle))
        weakref.finalize(self, self.library.cublasDestroy_v2, self.handle).atexit = False
        self.workspace = xp.empty(WORKSPACE, dtype=np.uint8)

    def matmul(self, a: Array, b: Array, out: Array = None) -> Array:
        """a @ b on the current stream: (..., M, K) @ (..., K, N) -> (..., M, N), as `xp.matmul`.

        Other dtypes than float32 and float64, and vectors, are left to CuPy.
        """
        dtype = str(a.dtype)
        if dtype not in TYPES or b.dtype != a.dtype or min(a.ndim, b.ndim) < 2:
            return self.xp.matmul(a, b) if out is None else self.xp.matmul(a, b, out=out)
        stack = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
        shape = (*stack, a.shape[-2], b.shape[-1])
        if a.shape[-1] != b.shape[-2] or (out is not None and out.shape != shape):
            raise Error(f"matmul: {a.shape} @ {b.shape} does not fit; expected {shape}")
        fits = out is not None and out.flags.c_contiguous and out.dtype == a.dtype
        target = out if fits else self.xp.empty(shape, dtype=dtype)
        if a.shape[-1] == 0:
            target.fill(0)
        elif math.prod(shape):
            self._multiply(self._readable(a, stack), self._readable(b, stack), target, dtype)
        if out is None:
            return target
        if target is not out:
            self.xp.copyto(out, target)
        return out

    def _readable(self, x: Array, stack: Shape) -> Array:
        """x, or a copy of it that cuBLAS can read; x may lack leading axes of the stack."""
        if form(x) is not None and distance(x, stack) is not None:
            return x
        copy = self.xp.empty(x.shape, dtype=x.dtype)
        if distance(copy, stack) is None:
            copy = self.xp.empty((*stack, *x.shape[-2:]), dtype=x.dtype)
        self.xp.copyto(copy, x)
        return copy

    def _multiply(self, a: Array, b: Array, out: Array, dtype: str) -> None:
        """cuBLAS counts by columns: it is asked for out^T = b^T @ a^T, which are the same bytes."""
        self._use_current_stream()
        left, right = form(b), form(a)
        assert left is not None
        assert right is not None
        kind, compute, number = TYPES[dtype]
        compute = TF32 if dtype == "float32" and takes_tf32() else compute
        stack, (m, n), k = out.shape[:-2], out.shape[-2:], a.shape[-1]
        count = math.prod(stack)
        name = "cublasGemmEx" if count == 1 else "cublasGemmStridedBatchedEx"

        def matrix(x: Array, leading: int) -> tuple[Any, ...]:
            one = (x.data.ptr, kind, leading)
            return one if count == 1 else (*one, distance(x, stack))

        self._call(
            name, self.handle, int(left.transposed), int(right.transposed), n, m, k,
            ctypes.byref(number(1)), *matrix(b, left.leading), *matrix(a, right.leading),
            ctypes.byref(number(0)), *matrix(out, n),
            *(() if count == 1 else (count,)), compute, ALGORITHM,
        )  # fmt: skip

    def _use_current_stream(self) -> None:
        """Set the stream, if it has changed; that takes the workspace away, so it is set again."""
        stream = self.xp.cuda.get_current_stream().ptr
        if stream != self.stream:
            self._call("cublasSetStream_v2", self.handle, stream)
            pointer = self.workspace.data.ptr
            self._call("cublasSetWorkspace_v2", self.handle, pointer, WORKSPACE)
            self.stream = stream

    def _call(self, name: str, *args: Any) -> None:
        status = getattr(self.library, name)(*args)
        if status:
            raise Error(f"cuBLAS: {name} failed with status {status}")


def form(x: Array) -> Form | None:
    """How cuBLAS reads the last two axes; None if neither rows nor columns lie without gaps. It
    does not depend on the strides of axes of length 1."""
    (rows, columns), size = x.shape[-2:], x.itemsize
    down, across = x.strides[-2] // size, x.strides[-1] // size
    if (across == 1 or columns == 1) and (down >= columns or rows == 1):
        return Form(False, max(columns if rows == 1 else down, columns, 1))
    if (down == 1 or rows == 1) and (across >= rows or columns == 1):
        return Form(True, max(across, rows, 1))
    return None


def distance(x: Array, stack: Shape) -> int | None:
    """Elements from a matrix of a stack to the next, 0 if all are the same one, None if the
    distances differ. x is broadcast to the stack."""
    missing = (0,) * (len(stack) - x.ndim + 2)
    lead = zip(x.shape[:-2], x.strides, strict=False)
    strides = (*missing, *(s if n > 1 else 0 for n, s in lead))
    first = expected = None
    for n, stride in reversed(list(zip(stack, strides, strict=True))):
        if n > 1:
            first = stride if first is None else first
            if stride < 0 or stride != (stride if expected is None else expected):
                return None
            expected = stride * n
    return (first or 0) // int(x.itemsize)


@cache
def load() -> Any:
    """cuBLAS, which the package that CuPy uses for it finds."""
    try:
        from cuda.pathfinder import load_nvidia_dynamic_lib

        return declared(ctypes.CDLL(load_nvidia_dynamic_lib("cublas").abs_path))
    except Exception as error:
        raise Unavailable(
            f'cuBLAS cannot be loaded ({error}); install it with pip install "npdrt[cuda12]" or '
            '"npdrt[cuda13]"'
        ) from error


def version() -> str:
    """The version of cuBLAS: "12.9.1"."""
    library, part, parts = load(), ctypes.c_int(), []
    for number in range(3):
        library.cublasGetProperty(number, ctypes.byref(part))
        parts.append(str(part.value))
    return ".".join(parts)


def declared(library: Any) -> Any:
    """The library with the types of the arguments of its functions."""
    whole, long, pointer = ctypes.c_int, ctypes.c_longlong, ctypes.c_void_p
    sizes, ending, matrix = [whole] * 5, [whole, whole], [pointer, whole, whole]
    stacked = [*matrix, long]
    arguments = {
        "cublasCreate_v2": [pointer],
        "cublasDestroy_v2": [pointer],
        "cublasSetStream_v2": [pointer, pointer],
        "cublasSetWorkspace_v2": [pointer, pointer, ctypes.c_size_t],
        "cublasGemmEx": [pointer, *sizes, pointer, *matrix, *matrix, pointer, *matrix, *ending],
        "cublasGemmStridedBatchedEx": [
            pointer, *sizes, pointer, *stacked, *stacked, pointer, *stacked, whole, *ending,
        ],
    }  # fmt: skip
    for name, types in arguments.items():
        getattr(library, name).argtypes = types
    return library


# --- which handle ------------------------------------------------------------------------------

_of_thread = threading.local()


@contextmanager
def using(blas: Any) -> Iterator[None]:
    """Inside, this thread's products are made by `blas.matmul`."""
    before = getattr(_of_thread, "chosen", None)
    _of_thread.chosen = blas
    try:
        yield
    finally:
        _of_thread.chosen = before


@contextmanager
def precision(name: str) -> Iterator[None]:
    """Inside, float32 products of this thread are of that precision.

    name: "ieee", the default, or "tf32": faster, with errors near 2**-11 relative to the operands.
    A CUDA graph keeps the precision in which its program was captured.
    """
    if name not in PRECISIONS:
        raise Error(f"unknown precision {name!r}; use one of {', '.join(PRECISIONS)}")
    before = takes_tf32()
    _of_thread.tf32 = name == "tf32"
    try:
        yield
    finally:
        _of_thread.tf32 = before


def takes_tf32() -> bool:
    """Whether float32 products of this thread are rounded to TF32."""
    return getattr(_of_thread, "tf32", False)


def matmul(library: Any, a: Array, b: Array, out: Array = None) -> Array:
    """a @ b of CuPy's arrays by the handle in use, or by one for this thread and stream."""
    blas = getattr(_of_thread, "chosen", None)
    if blas is None:
        handles = _of_thread.__dict__.setdefault("handles", {})
        stream = library.cuda.get_current_stream()
        key = library.cuda.Device().id, stream.ptr
        if key not in handles:
            handles[key] = Cublas(library)
        blas = handles[key]
    return blas.matmul(a, b, out)
