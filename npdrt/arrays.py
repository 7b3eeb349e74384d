"""The only module that knows NumPy from CuPy: which library an array belongs to, and its device.

All mathematics in npdrt is written against `xp = namespace(x)`, the array module of its own
arguments, with names that NumPy, CuPy and the Python array API standard share. Every check of the
library, every device and every transfer is here.
"""

from __future__ import annotations

import itertools
import math
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, lru_cache, partial, wraps
from types import ModuleType
from typing import Any

import numpy as np

from npdrt import cublas, philox
from npdrt.errors import Error, Unavailable

Array = Any  # an array of NumPy, CuPy or any library of the array API standard
Params = dict[str, Array]  # name -> array, in definition order; names are HDF5 paths

_SCALARS = {int, float, complex, bool, type(None)}  # exactly: numpy.float64 is a float


@cache
def _library(module: str) -> ModuleType | None:
    """The array module a type of `module` belongs to; CuPy arrays have no `__array_namespace__`."""
    library = module.partition(".")[0]
    return sys.modules[library] if library == "cupy" else None


def check_plain(*arrays: Any) -> None:
    """Refuse NumPy's masked arrays and matrices, whose operators mean something else."""
    for x in arrays:
        if type(x) is not np.ndarray and isinstance(x, np.ma.MaskedArray | np.matrix):
            kind, instead = "matrix", "numpy.asarray(x)"
            if isinstance(x, np.ma.MaskedArray):
                kind, instead = "masked array", "x.filled(value)"
            raise Error(f"expected a plain array; got a NumPy {kind}; write {instead} instead of x")


def check_params(params: Params) -> None:
    """Raise `Error` unless the parameters are a dict."""
    if not hasattr(params, "items"):
        raise Error(
            "expected parameters as a dict of name -> array; got "
            f'{type(params).__name__}; give one array a name: {{"w": x}}'
        )


def _namespace_of(x: Array) -> Any:
    check_plain(x)
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

    Raises `Error` if arrays of two libraries meet, naming both, and if there is no array.

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
    """The real part of `x`, or `x` itself if it is real: for comparisons under a complex step."""
    return getattr(x, "real", x)


def cast(scalar: Array, like: Array) -> Array:
    """A 0-d float64 `scalar` rounded once to the dtype of `like`, ready to meet its elements."""
    return namespace(like).asarray(scalar, dtype=like.dtype)


def scalar(value: Array, like: Array) -> Array:
    """`value` (a number or 0-d array) as a 0-d float64 array in the library of `like`."""
    xp = namespace(like)
    return xp.asarray(value, dtype=xp.float64)


def number(x: Any) -> Any:
    """A NumPy scalar, or 0-d array of NumPy, as the Python number that it is; anything else as it
    is. A NumPy number would decide the dtype of the arrays that it meets; a Python number does not.
    """
    if not isinstance(x, np.generic | np.ndarray) or x.shape != () or x.dtype.kind not in "biufc":
        return x
    return float(x) if x.dtype.kind == "f" else x.item()


def plain(setting: Any) -> Any:
    """A setting with Python's numbers for NumPy's, also in its tuples, lists and dicts."""
    if type(setting) in (tuple, list):
        return type(setting)(map(plain, setting))
    if type(setting) is dict:
        return {name: plain(value) for name, value in setting.items()}
    return number(setting)


# --- what an operation computes with ---------------------------------------------------------

_REAL = {"float32": "float32", "float64": "float64", "complex64": "float32",
         "complex128": "float64"}  # fmt: skip
_SMALL = {"bool", "int8", "uint8", "int16", "uint16"}  # float32 holds their numbers
_HELD = {"float32": _SMALL, "float64": _SMALL | {"int32", "uint32", "int64", "uint64"}}


def _dtype_name(x: Array) -> str:
    """ "float32" for the dtype of any library; ">f4" if the bytes are in another order."""
    return _text(type(x.dtype).__module__, x.dtype)


@lru_cache(64)
def _text(library: str, dtype: Any) -> str:
    return str(dtype).rpartition(".")[2]  # without the name of the library


def check_dtypes(name: str, *arrays: Any, moves: bool = False, numbers: bool = False) -> None:
    """Refuse arrays that the operation `name` would not compute with in one floating dtype.

    It accepts either float32 or float64 (complex64 or complex128 in a complex step). moves: the
    operation only moves or selects elements, so that it also accepts arrays that are all of other
    dtypes. numbers: it also accepts booleans and integers that NumPy converts to the dtype of the
    others. Python numbers have no dtype.
    """
    given = [x for x in arrays if hasattr(x, "dtype") and not is_weak(x)]
    if len({x.dtype for x in given}) == 1 and _dtype_name(given[0]) in _REAL:
        return
    found = list(map(_dtype_name, given))
    floats = {_REAL[n] for n in found if n in _REAL}
    others = [n for n in found if n not in _REAL]
    held = _HELD[min(floats)] if numbers and floats else set()
    if not found or (len(floats) == 1 and held.issuperset(others)) or (moves and not floats):
        return
    raise Error(
        f"{name}: expected arrays of one dtype, float32 or float64; got {', '.join(found)}; "
        f'convert first, for example x.astype("{min(floats, default="float32")}"), and write a '
        "NumPy number as a Python number, float(x)"
    )


def differentiable(x: Any) -> bool:
    """Whether `x` is an array of a dtype that npdrt computes derivatives in."""
    return _dtype_name(x) in _REAL


def is_weak(x: Any) -> bool:
    """Whether `x` stands for a Python float in a program that is being recorded."""
    return getattr(x, "weak", False)


# --- sums ------------------------------------------------------------------------------------

RUN = 128  # rows that a sum adds one after another, as in a run of NumPy's pairwise sum
GPU_RUN = 2048  # rows that a sum adds in one call on a GPU, by several threads a column


def total(x: Array, axes: tuple[int, ...], *, keepdims: bool = False) -> Array:
    """The sum of a floating array over `axes` (not negative), added in short runs.

    NumPy adds elements that lie next to each other in memory pairwise, but rows one after
    another: n rows of ones in float32 never give more than 2**24. So if more than RUN rows are to
    be added, every axis is summed in runs of RUN, then the sums of the runs likewise, until one is
    left; fewer are added by `xp.sum` itself. The order depends on shape and strides alone.

    Error: at most k u sum|x|, with u = 2**-24 in float32 and 2**-53 in float64, and k the longest
    way of an element through additions: 19 + log2(m / 128) for m neighbours in memory, and for an
    axis of n rows RUN ceil(log(n) / log(RUN)), so 512 for 2e7 rows. On a GPU a run has GPU_RUN
    rows, which are one launch; CuPy adds at most RUN of them one after another.
    """
    xp, run = namespace(x), GPU_RUN if for_gpu(x) else RUN
    inner = _neighbours(x, axes) if math.prod(x.shape[a] for a in axes) > run else axes
    outer = [a for a in axes if a not in inner and x.shape[a] != 1]
    if math.prod(x.shape[a] for a in outer) <= run:
        return xp.sum(x, axis=axes, keepdims=keepdims)
    shape = tuple(n for a, n in enumerate(x.shape) if a not in axes)
    x = xp.sum(x, axis=inner, keepdims=True) if inner else x
    for axis in sorted(outer, reverse=True):
        x = xp.sum(_in_runs(x, axis, run), axis=axis, keepdims=True)
    return x if keepdims else xp.reshape(x, shape)


def _neighbours(x: Array, axes: tuple[int, ...]) -> tuple[int, ...]:
    """Those of `axes` whose elements lie next to each other in memory: the innermost, without
    gaps. An array without strides, which the standard does not define, counts as C-ordered."""
    strides, step = getattr(x, "strides", None), 1
    if strides is None:
        strides = [math.prod(x.shape[a + 1 :]) for a in range(x.ndim)]
    else:
        step = x.dtype.itemsize
    found = []
    for a in sorted(range(x.ndim), key=lambda a: (strides[a], -a)):
        if x.shape[a] == 1:
            continue
        if a not in axes or strides[a] != step:
            break
        found.append(a)
        step *= x.shape[a]
    return tuple(found)


def _in_runs(x: Array, axis: int, run: int) -> Array:
    """The sums of runs along `axis`, then of runs of these, until at most `run` are left. The last
    run may be shorter."""
    xp, before = namespace(x), (slice(None),) * axis
    while (n := x.shape[axis]) > run:
        whole = n - n % run
        runs = (*x.shape[:axis], whole // run, run, *x.shape[axis + 1 :])
        sums = xp.sum(xp.reshape(x[(*before, slice(0, whole), ...)], runs), axis=axis + 1)
        if whole < n:
            rest = xp.sum(x[(*before, slice(whole, n), ...)], axis=axis, keepdims=True)
            sums = xp.concat((sums, rest), axis=axis)
        x = sums
    return x


def quiet() -> AbstractContextManager[Any]:
    """IEEE arithmetic without NumPy's warnings on overflow, 0/0 and the like."""
    return np.errstate(all="ignore")


# --- what a program that is being recorded asks for -----------------------------------------

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
    """`x`, named `name` in the listing if a program is being recorded.

    A value keeps the first name it is given.
    """
    if hasattr(x, "label"):
        x.label(name)
    return x


def has_kernels(x: Array, *others: Array) -> bool:
    """Whether `npdrt.kernels` computes with x and others: `for_gpu`, if x has elements and all have
    its dtype, float32 or float64."""
    if not for_gpu(x):
        return False
    dtypes = {_dtype_name(a) for a in (x, *others) if a is not None}
    return dtypes in ({"float32"}, {"float64"}) and 0 not in x.shape


def composite(
    function: Callable[..., Array] | None = None,
    *,
    name: str = "",
    host: Callable[..., Array] | None = None,
    kernel: Callable[..., Array] | None = None,
    strided: bool = False,
) -> Callable[..., Any]:
    """Make a function of arrays and settings a single call in programs, which have a kernel for
    it. name: of the call, if it is not that of the function. host: a faster function for NumPy's
    arrays, with the same bits. kernel: one for CuPy's of float32 or float64, of the library and the
    arrays (`npdrt.kernels`). strided: it reads arrays of any strides; a program copies others to C
    order first. The function itself is the definition and stays available as `call.definition`."""
    if function is None:
        return partial(composite, name=name, host=host, kernel=kernel, strided=strided)
    name = name or function.__name__

    @wraps(function)
    def call(*arrays: Array, **settings: Any) -> Array:
        xp = namespace(*arrays)
        recorded = getattr(xp, "record_composite", None)
        if recorded is not None:
            return recorded(name, arrays, settings, strided=strided)
        if kernel is not None and has_kernels(arrays[0]):
            return kernel(xp, *arrays, **settings)
        return (host if host is not None and xp is np else function)(*arrays, **settings)

    call.definition = function  # type: ignore[attr-defined]
    return call


def owner(x: Array) -> int:
    """A number that is equal for two arrays if they share memory."""
    if hasattr(x, "owner"):
        return int(x.owner)  # of an array that is being recorded
    while getattr(x, "base", None) is not None:
        x = x.base
    return id(x)


def writable(x: Array) -> bool:
    """Whether x can be written to, and its elements do not overlap in memory."""
    strides = zip(x.shape, getattr(x, "strides", ()), strict=False)
    return getattr(getattr(x, "flags", None), "writeable", True) and not any(
        n > 1 and stride == 0 for n, stride in strides
    )


def readonly(x: Array) -> Array:
    """`x` so that it refuses to be written, in the libraries that have this."""
    if not isinstance(x, np.ndarray):
        return x
    shown = x.view()
    shown.flags.writeable = False
    return shown


def copied(x: Array) -> Array:
    """A copy in C order, as in a program; NumPy's own copy keeps the order of x."""
    xp = namespace(x)
    if xp.__name__ not in ("numpy", "cupy"):
        return xp.asarray(x, copy=True)
    made = xp.empty(x.shape, dtype=x.dtype)
    made[...] = x
    return made


def product(a: Array, b: Array) -> Array:
    """a @ b of matrices or stacks of them, `xp.matmul`; on CuPy by `npdrt.cublas`."""
    xp = namespace(a, b)
    return cublas.matmul(xp, a, b) if xp.__name__ == "cupy" else xp.matmul(a, b)


DOT = 8192  # elements of one dot product: too few for a BLAS to split it over its threads


def dots(a: Array, b: Array) -> Array:
    """The inner products of the rows of two matrices, (rows, 1): dot products of pieces of DOT
    elements and of the rest, which need no array of the size of a."""
    xp, (r, n) = namespace(a, b), a.shape
    whole = n - n % DOT
    if whole == 0:
        return _dots(a, b)
    pieces = (xp.reshape(x[:, :whole], (r, whole // DOT, DOT)) for x in (a, b))
    sums = total(_dots(*pieces), (1,))  # (r, 1)
    return sums if whole == n else sums + _dots(a[:, whole:], b[:, whole:])


def _dots(a: Array, b: Array) -> Array:
    """The dot products along the last axis, which is kept with length 1."""
    xp, shape, n = namespace(a, b), a.shape[:-1], a.shape[-1]
    rows, columns = xp.reshape(a, (*shape, 1, n)), xp.reshape(b, (*shape, n, 1))
    return xp.reshape(product(rows, columns), (*shape, 1))


def write_result(target: Array, function: str, a: Array, b: Array) -> None:
    """target[...] = xp.function(a, b), without an array between if the library can write to one."""
    xp = namespace(target)
    if function == "matmul" and xp.__name__ == "cupy":
        cublas.matmul(xp, a, b, target)
    elif xp.__name__ in ("numpy", "cupy"):
        getattr(xp, function)(a, b, out=target)
    else:
        target[...] = getattr(xp, function)(a, b)


def shifted_sum(target: Array, x: Array, weight: Array, steps: tuple[int, int]) -> None:
    """target[c, i] = sum over k, m of weight[k, m, c] x[c, i + k steps[0] + m steps[1]].

    target: (C, n). x: (C, more). weight: (kh, kw, C). The terms are added in the order of the
    kernel's rows; if steps[1] is 1, those of each column first, and then the columns.
    """
    columns = weight.shape[1]
    if steps[1] > 1 or columns == 1:
        _sum_taps(target, x, weight, steps)
        return
    part = namespace(target).empty_like(target)
    target[...] = 0
    for m in range(columns):
        _sum_taps(part, x[:, m:], weight[:, m : m + 1, :], steps)
        target += part


def _sum_taps(target: Array, x: Array, weight: Array, steps: tuple[int, int]) -> None:
    """`shifted_sum` in the order of the kernel's rows. NumPy's `einsum` makes one pass for each tap
    if its longest axis alone has a stride of one element."""
    (rows, columns, _), (channels, n) = weight.shape, target.shape
    if namespace(target) is np:
        strides = x.strides[0], *(step * x.itemsize for step in (*steps, 1))
        taps = np.lib.stride_tricks.as_strided(x, (channels, rows, columns, n), strides)
        np.einsum("kmc,ckmi->ci", weight, taps, out=target)
        return
    target[...] = 0
    for k, m in itertools.product(range(rows), range(columns)):
        start = k * steps[0] + m * steps[1]
        target += x[:, start : start + n] * weight[k, m, :, None]


def bernoulli(random: Any, shape: tuple[int, ...], p: float, like: Array) -> Array:
    """`random.bernoulli(shape, p)` of a `Random`, in the library and on the device of `like`; on
    CuPy it is drawn there."""
    xp = namespace(like)
    if xp.__name__ == "cupy":
        return philox.bernoulli(xp, random, shape, p)
    return xp.asarray(random.bernoulli(shape, p))


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
    """Whether every |element| of x is known to be at most `limit`. It is known only on NumPy, where
    asking needs no memory and does not wait for a device; never if there is a NaN."""
    if namespace(x) is not np or x.dtype.kind != "f":
        return False
    forwards = tuple(slice(None, None, -1 if step < 0 else 1) for step in x.strides)
    x = x[forwards]  # NumPy reduces ten times more slowly along negative strides
    return bool(np.max(x, initial=0) <= limit and np.min(x, initial=0) >= -limit)


def block_columns(x: Array) -> int:
    """How many columns of a product a blocked operation computes at once: few enough for the cache
    of a CPU, enough to fill a GPU. Bits depend on it."""
    return 1 << 17 if for_gpu(x) else 1024


def at_once(x: Array, cached: int) -> int:
    """How many elements an operation on blocks of rows or heads computes at once: `cached`, for the
    cache of a CPU, or on a GPU 2**26, 256 MiB in float32, since every block is some launches."""
    return 1 << 26 if for_gpu(x) else cached


BLOCK = 16384  # elements: 128 KiB in float64


def in_blocks(function: Callable[[Array], Array], x: Array) -> Array:
    """function(x) of an elementwise function that makes many calls. On NumPy it is computed block
    by block in cache, and never otherwise: a program and a GPU have their own way."""
    if namespace(x) is not np or x.size <= BLOCK:
        return function(x)
    x = x if x.flags.forc else np.copy(x)
    made = np.empty_like(x)
    source, target = x.ravel(order="K"), made.ravel(order="K")
    for start in range(0, x.size, BLOCK):
        target[start : start + BLOCK] = function(source[start : start + BLOCK])
    return made


def sum_rows(x: Array) -> Array:
    """Sum of the rows of a float64 (R, K) array, added in row order: ((x0 + x1) + x2) + ...

    R >= 1. The order is part of the definition of `npdrt.optim.norm`. NumPy's reduction over the
    first axis of a C-ordered array of several columns adds row by row (tests check it). CuPy's does
    not, so a kernel does. Otherwise the rows are added one call at a time, which is the definition.
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
    """A device for arrays. `kind` is "cpu" or "cuda"; `why` says why `auto` chose it."""

    kind: str = "cpu"
    index: int = 0
    why: str = ""

    def __str__(self) -> str:
        return "cpu" if self.kind == "cpu" else f"cuda:{self.index}"


def _import_cupy() -> Any:
    """CuPy, if one allocation on its device works; else `Unavailable`."""
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

    "auto" chooses a CUDA device if it works, else the CPU, and gives the reason in `.why`. "cuda"
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


def device_of(x: Array) -> Device:
    """The device of an array of CuPy; for any other array the CPU."""
    return Device("cuda", x.data.device_id) if on_gpu(x) else Device()


def to_host(x: Array) -> np.ndarray[Any, Any]:
    """`x` as a NumPy array. On a GPU this waits for the device: use it at logging points only."""
    return np.asarray(x.get() if hasattr(x, "get") else x)


def on_gpu(x: Any) -> bool:
    """Whether `x` is an array in the memory of a CUDA device."""
    return hasattr(x, "__cuda_array_interface__")


def for_gpu(x: Any) -> bool:
    """Whether `x` is on a GPU, or stands for an array of a program that is recorded for one. What
    an operation does at once may depend on it."""
    return on_gpu(x) or getattr(namespace(x), "has_kernels", False)


def on(where: Device) -> AbstractContextManager[Any]:
    """A context in which new arrays are made on `where` (CuPy's current device)."""
    if where.kind == "cpu":
        return nullcontext()
    import cupy

    context: AbstractContextManager[Any] = cupy.cuda.Device(where.index)
    return context


def cuda() -> Any:
    """CuPy's module of streams and libraries of a device, `cupy.cuda`."""
    import cupy

    return cupy.cuda


def wait(where: Device) -> None:
    """Wait until a device has done all that it was asked for."""
    if where.kind == "cuda":
        import cupy

        cupy.cuda.Device(where.index).synchronize()


def describe_gpus() -> list[dict[str, Any]]:
    """Name, memory (bytes) and compute capability of each CUDA device; `Unavailable` without."""
    runtime = _import_cupy().cuda.runtime
    properties = [runtime.getDeviceProperties(i) for i in range(runtime.getDeviceCount())]
    return [
        {
            "name": p["name"].decode(),
            "memory": int(p["totalGlobalMem"]),
            "compute_capability": f"{p['major']}.{p['minor']}",
        }
        for p in properties
    ]


def gpu_software() -> dict[str, str]:
    """The versions of the software that computes on a GPU; `Unavailable` without."""
    cuda, found = (cupy := _import_cupy()).cuda, {}
    for name, number in (
        ("driver", cuda.runtime.driverGetVersion()),
        ("runtime", cuda.runtime.runtimeGetVersion()),
    ):
        found[name] = f"{number // 1000}.{number % 1000 // 10}"
    nvrtc = ".".join(map(str, cuda.nvrtc.getVersion()))
    return {"cupy": cupy.__version__, **found, "cublas": cublas.version(), "nvrtc": nvrtc}
