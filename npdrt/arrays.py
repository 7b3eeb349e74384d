"""Whose array is this, and where does it live: the one file that knows array libraries.

All mathematics in npdrt is written against `xp = namespace(x)`, the array module of its own
arguments, with names that NumPy, CuPy and the Python array API standard share. Every library
check, device and transfer is here; no other file asks.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, partial, wraps
from types import ModuleType
from typing import Any

import numpy as np

from npdrt.errors import Error, Unavailable

Array = Any  # an array of NumPy, CuPy or any library of the array API standard
Params = dict[str, Array]  # name -> array, in definition order; names are HDF5 paths

_SCALARS = {int, float, complex, bool, type(None)}  # exactly: numpy.float64 is a float


@cache
def _library(module: str) -> ModuleType | None:
    """The array module a type of `module` belongs to; CuPy arrays have no `__array_namespace__`."""
    library = module.partition(".")[0]
    return sys.modules[library] if library == "cupy" else None


def _namespace_of(x: Array) -> Any:
    if hasattr(x, "__array_namespace__"):
        return x.__array_namespace__()
    xp = _library(type(x).__module__)
    if xp is None:
        raise Error(
            f"expected an array of NumPy, CuPy or an array API library; got {type(x).__name__}; "
            "convert it first, for example with numpy.asarray"
        )
    return xp


def namespace(*arrays: Array) -> Any:
    """The array module all `arrays` belong to; Python scalars and None are ignored.

    Asks `x.__array_namespace__` first (NumPy, array API libraries), then the array's type (CuPy).

    Raises `Error` where arrays of two libraries meet, naming both, and where nothing is an array.

    >>> import numpy as np
    >>> namespace(np.ones(3), 2.0) is np
    True
    """
    found = None
    for x in arrays:
        if type(x) in _SCALARS:
            continue
        xp = _namespace_of(x)
        if found is None:
            found = xp
        elif xp is not found:
            raise Error(
                f"arrays of two libraries in one operation: {found.__name__} and {xp.__name__}; "
                "move them to one device first with npdrt.arrays.to_device or to_host"
            )
    if found is None:
        raise Error(f"expected at least one array; got {[type(x).__name__ for x in arrays]}")
    return found


def real(x: Array) -> Array:
    """The real part of `x`, `x` itself where it is real: comparisons under a complex step."""
    return getattr(x, "real", x)


def cast(scalar: Array, like: Array) -> Array:
    """A 0-d float64 `scalar` rounded once to the dtype of `like`, ready to meet its elements."""
    return namespace(like).asarray(scalar, dtype=like.dtype)


def scalar(value: Array, like: Array) -> Array:
    """`value` (a number or 0-d array) as a 0-d float64 array in the library of `like`."""
    xp = namespace(like)
    return xp.asarray(value, dtype=xp.float64)


def quiet() -> AbstractContextManager[Any]:
    """IEEE arithmetic without NumPy's warnings on overflow, 0/0 and the like."""
    return np.errstate(all="ignore")


# --- what a program that is being recorded wants to know ------------------------------------

_phase: ContextVar[str] = ContextVar("phase", default="forward")


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Array calls made inside belong to this part of a step: "backward", "update", or another."""
    token = _phase.set(name)
    try:
        yield
    finally:
        _phase.reset(token)


def current_phase() -> str:
    """The part of a step that array calls belong to now; "forward" unless `phase` said more."""
    return _phase.get()


def label(x: Any, name: str) -> Any:
    """`x`, named `name` in the listing of a program that is being recorded; else nothing happens.

    A value keeps the first name it is given.
    """
    if hasattr(x, "label"):
        x.label(name)
    return x


def composite(
    function: Callable[..., Array] | None = None, *, host: Callable[..., Array] | None = None
) -> Callable[..., Any]:
    """Make a function of arrays and settings a single call in programs, where it has a kernel of
    its own. host: its faster twin for NumPy's arrays, with the same bits; the function is the
    definition, and stays as `call.definition`."""
    if function is None:
        return partial(composite, host=host)

    @wraps(function)
    def call(*arrays: Array, **settings: Any) -> Array:
        xp = namespace(*arrays)
        recorded = getattr(xp, "record_composite", None)
        if recorded is not None:
            return recorded(function.__name__, *arrays, **settings)
        return (host if host is not None and xp is np else function)(*arrays, **settings)

    call.definition = function  # type: ignore[attr-defined]
    return call


def owner(x: Array) -> int:
    """A number that two arrays have in common if they share memory."""
    if hasattr(x, "owner"):
        return int(x.owner)  # of an array that is being recorded
    while getattr(x, "base", None) is not None:
        x = x.base
    return id(x)


def writable(x: Array) -> bool:
    """Whether x can be written to, and no element of it is another one too."""
    strides = zip(x.shape, getattr(x, "strides", ()), strict=False)
    return getattr(getattr(x, "flags", None), "writeable", True) and not any(
        n > 1 and stride == 0 for n, stride in strides
    )


def into(to: Array, function: str, a: Array, b: Array) -> None:
    """to[...] = xp.function(a, b), without an array between where the library can write to one."""
    xp = namespace(to)
    if xp.__name__ in ("numpy", "cupy"):
        getattr(xp, function)(a, b, out=to)
    else:
        to[...] = getattr(xp, function)(a, b)


# --- a kernel: the sum of rows in row order ------------------------------------------------


@cache
def _cupy_sum_rows() -> Any:
    import cupy

    return cupy.ElementwiseKernel(
        "raw float64 rows, int64 count, int64 width",
        "float64 total",
        "total = 0; for (long long r = 0; r < count; ++r) total += rows[r * width + i];",
        "npdrt_sum_rows",
        options=("--fmad=false",),
    )


def known_below(x: Array, limit: float) -> bool:
    """Whether every |element| of x is known to be at most `limit`, without waiting for a device and
    without memory: on NumPy. Elsewhere it is not known; nor is it of a NaN."""
    if namespace(x) is not np or x.dtype.kind != "f":
        return False
    return bool(np.max(x, initial=0) <= limit and np.min(x, initial=0) >= -limit)


def columns(x: Array) -> int:
    """How many columns of a product a blocked operation makes at once: few enough for a cache on
    the CPU, many enough to fill a GPU. Bits depend on it."""
    return 1024 if namespace(x).__name__ != "cupy" else 1 << 17


def sum_rows(x: Array) -> Array:
    """Sum of the rows of a float64 (R, K) array, added in row order: ((x0 + x1) + x2) + ...

    R >= 1. The order is part of the definition of `npdrt.optim.norm`. NumPy's reduction over the
    first axis of a C-ordered array of several columns adds row by row (pinned by tests); CuPy's
    does not, so a kernel does; else the rows are added one call at a time: the definition.
    """
    xp = namespace(x)
    if xp is np and x.shape[1] > 1:
        return np.add.reduce(x, axis=0)
    if xp.__name__ == "cupy":
        total = xp.empty(x.shape[1], dtype=xp.float64)
        return _cupy_sum_rows()(x, x.shape[0], x.shape[1], total)
    total = x[0, :]
    for r in range(1, x.shape[0]):
        total = total + x[r, :]
    return total


# --- devices --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Device:
    """Where arrays live. `kind` is "cpu" or "cuda"; `why` says how `auto` came to it."""

    kind: str = "cpu"
    index: int = 0
    why: str = ""

    def __str__(self) -> str:
        return "cpu" if self.kind == "cpu" else f"cuda:{self.index}"


def _import_cupy() -> Any:
    """CuPy with a working device behind it, proven by one allocation, or `Unavailable`."""
    try:
        import cupy
    except Exception as error:
        raise Unavailable(
            f"CuPy cannot be imported ({error}); "
            'install it with pip install "npdrt[cuda12]" or "npdrt[cuda13]"'
        ) from error
    if not cupy.is_available():
        raise Unavailable("CuPy is installed but found no CUDA driver or device")
    try:
        cupy.zeros(1)
    except Exception as error:
        raise Unavailable(f"the CUDA device does not accept work: {error}") from error
    return cupy


def _cuda_device(spec: str) -> Device:
    cupy = _import_cupy()
    index = int(spec.partition(":")[2] or 0)
    count = int(cupy.cuda.runtime.getDeviceCount())
    if index >= count:
        raise Unavailable(
            f"device {spec}: this machine has {count} CUDA device(s), numbered from 0"
        )
    return Device("cuda", index)


def device(spec: str | Device = "cpu") -> Device:
    """The device that `spec` asks for: "auto", "cpu", "cuda" or "cuda:N".

    "auto" takes a working CUDA device, else the CPU, and says in `.why` what it found. "cuda"
    never falls back: without a device it raises `Unavailable` (exit code 4).

    >>> str(device("cpu"))
    'cpu'
    """
    if isinstance(spec, Device):
        return spec
    if spec == "cpu":
        return Device()
    if spec == "auto":
        return _automatic_device()
    if re.fullmatch(r"cuda(:\d+)?", str(spec)):
        return _cuda_device(spec)
    raise Error(f"unknown device {spec!r}; use auto, cpu, cuda or cuda:N")


def _automatic_device() -> Device:
    try:
        _import_cupy()
    except Unavailable as error:
        return Device("cpu", 0, f"no CUDA device: {error}")
    return Device("cuda", 0, "a working CUDA device was found")


def to_device(x: Array, where: str | Device) -> Array:
    """`x`, a host array, on the device `where`; on the CPU the same array."""
    where = device(where)
    if where.kind == "cpu":
        return np.asarray(x)
    import cupy

    with cupy.cuda.Device(where.index):
        return cupy.asarray(x)


def to_host(x: Array) -> np.ndarray[Any, Any]:
    """`x` as a NumPy array. On a GPU this waits for the device: use it at logging points only."""
    return np.asarray(x.get() if hasattr(x, "get") else x)


def on_gpu(x: Any) -> bool:
    """Whether `x` is an array in the memory of a CUDA device."""
    return hasattr(x, "__cuda_array_interface__")


def on(where: Device) -> AbstractContextManager[Any]:
    """A context in which new arrays are made on `where` (CuPy's current device)."""
    if where.kind == "cpu":
        return nullcontext()
    import cupy

    context: AbstractContextManager[Any] = cupy.cuda.Device(where.index)
    return context


def describe_gpus() -> list[dict[str, Any]]:
    """Name, memory (bytes) and compute capability of each CUDA device; `Unavailable` without."""
    cupy = _import_cupy()
    runtime = cupy.cuda.runtime
    properties = [runtime.getDeviceProperties(i) for i in range(runtime.getDeviceCount())]
    return [
        {
            "name": p["name"].decode(),
            "memory": int(p["totalGlobalMem"]),
            "compute_capability": f"{p['major']}.{p['minor']}",
            "driver": int(runtime.driverGetVersion()),
            "runtime": int(runtime.runtimeGetVersion()),
            "cupy": cupy.__version__,
        }
        for p in properties
    ]
