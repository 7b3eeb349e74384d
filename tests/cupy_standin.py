"""A stand-in for CuPy and cuBLAS that runs on the CPU: its kernels are compiled by g++.

It keeps CUDA's and CuPy's rules for captures, and counts what it is asked for.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import tempfile
import threading
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from npdrt import arrays
from npdrt.program.kernels import parameters

COMPILER = shutil.which("g++")


# --- a compiler in place of NVRTC --------------------------------------------------------------

HOST = """
#include <cmath>
#include <vector>
#include <ucontext.h>
using std::sqrt; using std::fabs; using std::exp; using std::log; using std::log1p;
using std::floor; using std::fma;
#define __device__
#define __global__
#define __shared__ static thread_local
#define __syncthreads() swapcontext(inside, &outside)
struct Place { int x; };
static thread_local Place threadIdx, blockIdx;
static thread_local ucontext_t outside, *inside;  // the threads of a block take turns
static thread_local void** p;
static thread_local bool ended;
"""


@cache
def compiled(source: str) -> Any:
    """The function `launch` of a C++ source."""
    folder = Path(tempfile.mkdtemp(prefix="npdrt-kernel-"))
    (folder / "kernel.cpp").write_text(HOST + source)
    flags = ["-O2", "-std=c++20", "-ffp-contract=off", "-fPIC", "-shared", "-pthread", "-w"]
    command = [str(COMPILER), *flags, "-o", str(folder / "kernel.so"), str(folder / "kernel.cpp")]
    subprocess.run(command, check=True)
    library = ctypes.CDLL(str(folder / "kernel.so"))
    shutil.rmtree(folder)
    return library.launch


def elementwise_source(reads: str, writes: str, body: str, preamble: str) -> str:
    """An elementwise kernel as a loop over contiguous arrays."""
    read, written = parameters(reads), parameters(writes)
    before, inside = [], []
    for k, (raw, kind, name) in enumerate([*read, *written]):
        const = "const " if k < len(read) else ""
        pointer = f"(({const}{kind}*)p[{k}])"
        if raw:
            before.append(f"{const}{kind}* {name} = {pointer};")
        else:
            inside.append(f"{const}{kind} &{name} = {pointer}[i];")
    loop = "\n".join([*inside, body])
    return f"""{preamble}
extern "C" void launch(long long n, void** p) {{
  {" ".join(before)}
  for (long long i = 0; i < n; ++i) {{ {loop} }}
}}"""


def raw_source(code: str, name: str) -> str:
    """A kernel as a loop over its blocks, whose threads wait for each other where they must."""
    signature = re.search(rf"{name}\((.*?)\)", code, re.DOTALL)
    assert signature
    kinds = [k.replace("__restrict__", "").rsplit(" ", 1)[0].strip() for k in
             signature[1].replace("\n", " ").split(",")]  # fmt: skip
    values = [f"({k})p[{i}]" if "*" in k else f"*({k}*)p[{i}]" for i, k in enumerate(kinds)]
    return f"""{code}
static void one_thread() {{ {name}({", ".join(values)}); ended = true; }}
extern "C" void launch(int blocks, int threads, void** given) {{
  p = given;
  std::vector<std::vector<char>> stacks(threads, std::vector<char>(1 << 16));
  std::vector<ucontext_t> contexts(threads);
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) {{
    for (int t = 0; t < threads; ++t) {{
      getcontext(&contexts[t]);
      contexts[t].uc_stack.ss_sp = stacks[t].data();
      contexts[t].uc_stack.ss_size = stacks[t].size();
      contexts[t].uc_link = &outside;
      makecontext(&contexts[t], one_thread, 0);
    }}
    std::vector<char> over(threads);
    for (int left = threads; left;)
      for (int t = 0; t < threads; ++t) if (!over[t]) {{
        threadIdx.x = t; inside = &contexts[t]; ended = false;
        swapcontext(&outside, inside);
        if (ended) {{ over[t] = 1; --left; }}
      }}
  }}
}}"""


def pointers(items: list[Any]) -> Any:
    return (ctypes.c_void_p * len(items))(*(x.ctypes.data for x in items))


# --- a stand-in for CuPy -----------------------------------------------------------------------


class Pointer:
    """An address in the memory of an array, which it keeps."""

    device_id = 0

    def __init__(self, owner: Any, ptr: int):
        self.owner, self.ptr = owner, ptr

    def __add__(self, offset: int) -> Pointer:
        return Pointer(self.owner, self.ptr + offset)


class DeviceArray(np.ndarray):
    """NumPy's array with the manners of CuPy's; `device` is the stand-in, which counts."""

    device: StandIn

    def __array_namespace__(self, api_version: str | None = None) -> Any:
        return self.device

    def __new__(
        cls, shape: Any, dtype: Any = float, memptr: Any = None, strides: Any = None
    ) -> Any:
        dtype = np.dtype(dtype)
        interface = {"data": (memptr.ptr, False), "typestr": dtype.str, "shape": tuple(shape),
                     "strides": strides, "version": 3}  # fmt: skip
        holder = SimpleNamespace(__array_interface__=interface, owner=memptr.owner)
        return np.asarray(holder).view(cls)

    @property
    def data(self) -> Pointer:  # type: ignore[override]
        return Pointer(self, self.ctypes.data)

    @property
    def __cuda_array_interface__(self) -> Any:
        return {}

    def get(self) -> np.ndarray:
        self.device.synchronisations += 1
        return np.array(self.view(np.ndarray))

    def set(self, host: np.ndarray) -> None:
        assert type(host) is np.ndarray
        assert (host.shape, host.dtype) == (self.shape, self.dtype)
        self.device.work("set", np.copyto, self, host.copy())

    def fill(self, value: Any) -> None:
        self.device.work("fill", np.ndarray.fill, self, value)

    def __getitem__(self, index: Any) -> Any:
        """A 0-d array where NumPy has a number."""
        found = np.ndarray.__getitem__(self, index)
        if isinstance(found, np.ndarray):
            return found
        places = index if isinstance(index, tuple) else (index,)
        return np.ndarray.__getitem__(self, (*places, Ellipsis))

    def __setitem__(self, index: Any, value: Any) -> None:
        target = self[index]
        assert isinstance(value, DeviceArray | float | int), "host data in a call on the device"
        self.device.work("setitem", np.copyto, target, value, casting="unsafe")

    def _look(self, *args: Any) -> Any:
        self.device.synchronisations += 1
        raise AssertionError("the host looked at the device")

    __float__ = __int__ = __bool__ = __index__ = item = tolist = _look  # type: ignore[assignment]


def _operator(name: str, kind: str) -> Any:
    """An operator that is work for the stream: kind "" as it is, "r" reflected, "i" in place."""

    def operate(self: Any, *other: Any) -> Any:
        if kind == "i":
            self.device.work(name, getattr(np, name), self, *other, out=self)
            return self
        return getattr(self.device, name)(*((*other, self) if kind == "r" else (self, *other)))

    return operate


_ARITHMETIC = {"add": "add", "sub": "subtract", "mul": "multiply", "truediv": "divide"}
_COMPARISONS = {"lt": "less", "le": "less_equal", "gt": "greater", "ge": "greater_equal"}
for _sign, _name in _ARITHMETIC.items():
    for _kind in ("", "r", "i"):
        setattr(DeviceArray, f"__{_kind}{_sign}__", _operator(_name, _kind))
_OTHERS = {
    **{"eq": "equal", "ne": "not_equal", "neg": "negative", "abs": "absolute", "invert": "invert"},
    **{"and": "bitwise_and", "or": "bitwise_or", "xor": "bitwise_xor"},
}
for _sign, _name in {**_COMPARISONS, **_OTHERS}.items():
    setattr(DeviceArray, f"__{_sign}__", _operator(_name, ""))


class Pool:
    """A memory pool: in a capture it gives only what it had before and got back."""

    def __init__(self, device: StandIn):
        self.device, self.free = device, Counter[int]()

    def malloc(self, nbytes: int, *, captured: bool) -> Any:
        """A function that gives the memory back."""
        if captured and not self.free[nbytes]:
            raise RuntimeError("an allocation in a capture")
        self.free[nbytes] = max(0, self.free[nbytes] - 1)
        return partial(self.free.update, [nbytes])


class HostBlas:
    """cuBLAS of the stand-in: its arguments mean what they mean there, column-major."""

    def __init__(self, device: StandIn):
        self.device, self.stream, self.workspace = device, None, None

    def cublasCreate_v2(self, handle: Any) -> int:
        return 0

    cublasDestroy_v2 = cublasCreate_v2

    def cublasSetStream_v2(self, handle: Any, stream: int) -> int:
        self.stream, self.workspace = stream, None
        return 0

    def cublasSetWorkspace_v2(self, handle: Any, pointer: int, nbytes: int) -> int:
        self.workspace = pointer
        return 0

    def cublasGemmEx(self, handle: Any, *args: Any) -> int:
        *before, a, kind, lda, b, _, ldb, zero, c, _, ldc, compute, algorithm = args
        stacked = (a, kind, lda, 0, b, kind, ldb, 0, zero, c, kind, ldc, 0, 1)
        return self.cublasGemmStridedBatchedEx(handle, *before, *stacked, compute, algorithm)

    def cublasGemmStridedBatchedEx(self, handle: Any, *args: Any) -> int:
        ta, tb, m, n, k, _, *operands, count, compute, algorithm = args
        a, kind, lda, sa, b, _, ldb, sb, _, c, _, ldc, sc = operands
        assert (kind, compute, algorithm) in {(0, 68, -1), (0, 77, -1), (1, 70, -1)}
        assert self.workspace, "cuBLAS would allocate one"
        assert self.stream == self.device.streams[-1].ptr, "products on another stream"
        assert lda >= (k if ta else m)
        assert ldb >= (n if tb else k)
        assert ldc >= m

        def matrices(pointer: int, step: int, rows: int, columns: int, leading: int) -> Any:
            size = 8 if kind else 4
            interface = {
                "data": (pointer, False), "typestr": f"<f{size}", "version": 3,
                "shape": (count, rows, columns), "strides": (step * size, size, leading * size),
            }  # fmt: skip
            return np.asarray(SimpleNamespace(__array_interface__=interface))

        left = matrices(a, sa, *((k, m) if ta else (m, k)), lda)
        right = matrices(b, sb, *((n, k) if tb else (k, n)), ldb)
        left, right = (x.swapaxes(1, 2) if t else x for x, t in ((left, ta), (right, tb)))
        out = matrices(c, sc, m, n, ldc)
        # The bits of NumPy, which is asked for the transposed product.
        right, left, out = (x.swapaxes(1, 2) for x in (right, left, out))
        given = tf32 if compute == 77 else np.asarray
        self.device.work("gemm", lambda: np.copyto(out, np.matmul(given(right), given(left))))
        return 0


def tf32(x: np.ndarray) -> np.ndarray:
    """float32 rounded to 10 bits after the point, the nearest, or the larger of two."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    return ((bits + np.uint32(1 << 12)) & np.uint32(0xFFFFE000)).view(np.float32)


class Stream:
    """A stream that runs work at once, or keeps it while it is captured."""

    def __init__(self, device: StandIn, name: str):
        self.device, self.name, self.captured, self.ptr = device, name, None, id(self)
        self.number = device.devices[-1]

    def on_its_device(self) -> None:
        """Raise CuPy's error if another device is the current one; the default stream is on all."""
        current = self.device.devices[-1]
        if self.name != "default" and self.number != current:
            raise RuntimeError(
                f"The device that the stream is created on ({self.number}) does not match with "
                f"the current device ({current})"
            )

    def record(self) -> Stream:
        self.on_its_device()
        self.device.events.append(("record", self.name))
        return self

    def wait_event(self, event: Any) -> None:
        self.device.events.append(("wait", self.name, event.name))

    def __enter__(self) -> Stream:
        self.on_its_device()
        self.device.streams.append(self)
        return self

    def __exit__(self, *_: Any) -> None:
        self.device.streams.pop()

    def begin_capture(self, mode: Any = None) -> None:
        self.device.events.append(("begin", self.name, mode))
        self.captured: Any = []

    def end_capture(self) -> Any:
        taken, self.captured = self.captured, None
        self.device.events.append(("end", self.name, len(taken)))
        return SimpleNamespace(launch=partial(self._launch, taken), nodes=len(taken))

    def _launch(self, taken: Any, stream: Any) -> None:
        self.device.events.append(("launch", stream.name))
        for function, args, settings in taken:
            function(*args, **settings)


class Event:
    """An event that knows the stream of its last record, and its device."""

    name = ""

    def __init__(self, device: StandIn, block: bool = False, disable_timing: bool = False):
        self.device, self.number = device, device.devices[-1]

    def record(self, stream: Any) -> None:
        assert self.number == self.device.devices[-1], "an event of another device"
        self.name = stream.name


def _plain(item: Any) -> Any:
    """With the addresses of arrays, as in a graph, which does not keep an array from its pool."""
    if isinstance(item, tuple | list):
        return type(item)(map(_plain, item))
    if isinstance(item, dict):
        return {name: _plain(value) for name, value in item.items()}
    if not isinstance(item, DeviceArray):
        return item
    interface = {**item.__array_interface__, "data": (item.ctypes.data, False)}
    return np.asarray(SimpleNamespace(__array_interface__=interface))


def _write(out: Any, function: Any, args: Any, settings: Any) -> None:
    np.copyto(out, function(*args, **settings))


class Device:
    """A device, and the context in which it is the current one of the thread."""

    def __init__(self, standin: StandIn, number: int | None = None):
        self.standin = standin
        self.id = standin.devices[-1] if number is None else number

    def __enter__(self) -> Device:
        self.standin.devices.append(self.id)
        return self

    def __exit__(self, *_: Any) -> None:
        self.standin.devices.pop()


class StandIn:
    """As much of CuPy as the executor needs, on NumPy and g++; refuses to capture `refused`.

    In a capture it refuses what CuPy refuses: products of its own, copies from the host, memory
    that its pool has not got. `out` is refused where CuPy fails or changes its strides.
    """

    __name__ = "cupy"
    newaxis, float32, float64, int64, bool = None, np.float32, np.float64, np.int64, np.bool
    inf, nan = np.inf, np.nan

    def __init__(self, refused: str = ""):
        self.ndarray = type("DeviceArray", (DeviceArray,), {"device": self})
        self.events: list[tuple[Any, ...]] = []
        self.kernels: list[tuple[str, ...]] = []
        self.synchronisations, self.refused = 0, refused
        self.of_thread = threading.local()
        self.default, self.made = Stream(self, "default"), 0
        self.blas = HostBlas(self)
        self.of_graphs: list[Any] = []  # memory that graphs go on using when the pool has it back
        self.cuda = SimpleNamespace(
            Stream=self._stream, Event=partial(Event, self), MemoryPool=partial(Pool, self),
            Device=partial(Device, self),
            get_current_stream=lambda: self.streams[-1], using_allocator=self._using,
            UnownedMemory=lambda ptr, size, owner, device_id: Pointer(owner, ptr),
            MemoryPointer=lambda memory, offset: memory + offset,
            runtime=SimpleNamespace(streamCaptureModeThreadLocal="thread-local"),
            memory=SimpleNamespace(OutOfMemoryError=MemoryError),
        )  # fmt: skip

    @property
    def streams(self) -> list[Stream]:
        """The current stream of this thread, and those around it."""
        return self.of_thread.__dict__.setdefault("streams", [self.default])

    @property
    def devices(self) -> list[int]:
        """The number of the current device of this thread, and those around it."""
        return self.of_thread.__dict__.setdefault("devices", [0])

    @property
    def pools(self) -> list[Any]:
        return self.of_thread.__dict__.setdefault("pools", [])

    @property
    def capturing(self) -> bool:
        return self.streams[-1].captured is not None

    def _stream(self, non_blocking: bool = False) -> Stream:
        assert non_blocking
        self.made += 1
        return Stream(self, f"side {self.made}")

    @contextmanager
    def _using(self, allocator: Any) -> Iterator[None]:
        self.pools.append(allocator)
        yield
        self.pools.pop()

    def work(self, name: str, function: Any, *args: Any, **settings: Any) -> None:
        """Something for the current stream to do."""
        stream = self.streams[-1]
        if stream.captured is None:
            self.events.append(("run", stream.name, name))
            with arrays.quiet():
                function(*args, **settings)
        elif name == self.refused:
            raise RuntimeError(f"{name} cannot be captured")
        else:
            assert self.pools, "captured without a pool of its own"
            stream.captured.append((function, _plain(args), _plain(settings)))

    def empty(self, shape: Any, dtype: Any = float) -> Any:
        memory = np.full(shape, 7, dtype)
        made = memory.view(self.ndarray)
        if self.capturing:
            self.of_graphs.append(memory)
        if self.pools:
            weakref.finalize(made, self.pools[-1](made.nbytes, captured=self.capturing))
        elif self.capturing:
            raise RuntimeError("an allocation in a capture")
        return made

    def asarray(self, x: Any, dtype: Any = None) -> Any:
        if self.capturing:
            raise RuntimeError("the current stream is capturing, so H2D transfers are disallowed")
        return np.array(x, dtype=dtype).view(self.ndarray)

    def arange(self, *args: Any, **settings: Any) -> Any:
        return self.asarray(np.arange(*args, **settings))

    def copyto(self, out: Any, x: Any, casting: str = "same_kind", where: Any = None) -> None:
        settings = {} if where is None else {"where": where}
        assert isinstance(x, self.ndarray | float | int)
        self.work("copyto", np.copyto, out, x, casting=casting, **settings)

    def take(self, x: Any, indices: Any, axis: Any = None, out: Any = None) -> None:
        self.work("take", np.take, x, indices, axis, out=out, mode="wrap")

    def matmul(self, a: Any, b: Any, out: Any = None) -> Any:
        if self.capturing:
            raise NotImplementedError("calling cuBLAS API during stream capture is unsupported")
        return self._call("matmul", a, b, out=out)

    def concat(self, parts: Any, axis: int = 0) -> Any:
        if len(parts) > 8 and self.capturing:
            raise RuntimeError("the current stream is capturing, so H2D transfers are disallowed")
        return self._call("concat", parts, axis=axis)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = getattr(np, name)
        if name in ("result_type", "finfo", "iinfo", "broadcast_shapes", "isdtype"):
            return value
        return partial(self._call, name)

    def _call(self, name: str, *args: Any, out: Any = None, **settings: Any) -> Any:
        function = getattr(np, name)
        if out is None:
            found = function(*args, **settings)
            if any(isinstance(a, np.ndarray) and np.may_share_memory(a, found) for a in args):
                return found  # a view
            out = self.empty(found.shape, found.dtype)
            self.work(name, _write, out, function, args, settings)
            return out
        assert all(isinstance(a, self.ndarray | float | int | tuple | None) for a in args), args
        # CuPy copies an argument that overlaps `out` and is another object.
        near = [a for a in args if isinstance(a, np.ndarray) and np.may_share_memory(a, out)]
        assert all(a is out for a in near), "an argument that would be copied"
        if name == "min":
            raise TypeError("Argument 'out' has incorrect type")
        moves = name in ("any", "all", "argmax", "argmin")
        given = np.asarray(args[0]).view(np.ndarray)
        moves |= name in ("sum", "prod") and given.dtype != out.dtype
        assert not moves or out.ndim < 2 or given.flags.c_contiguous, "out gets other strides"
        self.work(name, function, *args, out=out, **settings)

    def ElementwiseKernel(
        self, reads: str, writes: str, body: str, name: str, *, preamble: str, options: Any
    ) -> Any:
        assert "--fmad=false" in options
        self.kernels.append((reads, writes, body))
        launch = compiled(elementwise_source(reads, writes, body, preamble))
        raw = [r for r, *_ in parameters(reads)]
        count = len(raw)

        def run(*args: Any) -> None:
            out = args[count:]
            made = [o if o.flags.c_contiguous else np.empty(o.shape, o.dtype) for o in out]
            assert all(x.shape == (1,) for x, r in zip(args[:count], raw, strict=True) if r)
            given = [x if r else np.ascontiguousarray(np.broadcast_to(x, out[0].shape))
                     for x, r in zip(args[:count], raw, strict=True)]  # fmt: skip
            launch(ctypes.c_longlong(out[0].size), pointers([*given, *made]))
            for target, written in zip(out, made, strict=True):
                if written is not target:
                    np.copyto(target, written)

        return lambda *args: self.work(name, run, *args)

    def RawKernel(self, code: str, name: str, *, options: Any) -> Any:
        assert "--fmad=false" in options
        launch = compiled(raw_source(code, name))

        def run(grid: Any, block: Any, args: Any) -> None:
            held = [np.asarray(a) for a in args]
            launch(grid[0], block[0], pointers(held))

        return lambda *args: self.work(name, run, *args)
