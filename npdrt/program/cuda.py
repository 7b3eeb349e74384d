"""Replaying a program on a GPU: CuPy calls into memory that lasts, captured as one CUDA graph.

The plan is that of the CPU (`npdrt.program.plan`). Every value is an array over one allocation, or
a home of an input or output. A chain is one kernel, and so is any other call of `+ - * / sqrt`,
comparisons, selections and casts between floats; everything else is the CuPy call that an eager
step makes, with `out`. The first `WARM_UPS` replays run call by call and put kernels, handles and
workspaces in place. The next captures the calls, which runs nothing, and from then on a replay is
one launch. No replay waits for the device.

Bits. The kernels are written in PTX operations that round once (`add.rn.f32`), so that no compiler
flag changes them: CuPy passes `-ftz=true` to its compiler after any other option, and so CuPy's own
float32 functions take subnormal numbers for zero; these kernels do not, as NumPy does not. What
they compute has the bits of the CPU; of a NaN, that it is one. Products are those of cuBLAS
with compute type `CUBLAS_COMPUTE_32F` or `64F`, no TF32; sums, maxima, exp, log and tanh are
CuPy's.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

from npdrt.arrays import Array, on_gpu
from npdrt.errors import Error
from npdrt.optim.norm import CHUNK, LANES
from npdrt.program.calls import Call, Ref, Value
from npdrt.program.fused import FUSABLE, can_fuse, read_by
from npdrt.program.plan import Group, Plan
from npdrt.program.replay import Binding, Memory, Operation, run

WARM_UPS = 2  # replays call by call: the first compiles and allocates, the second finds all there
OPTIONS = ("--fmad=false", "--prec-div=true", "--prec-sqrt=true")
# They may wait for the device or copy from the host, which a graph would repeat from freed memory.
NOT_CAPTURED = ("argsort", "searchsorted", "sort")


class CudaMemory(Memory):
    """The memory of programs on a GPU: the current device.

    library: a stand-in for CuPy. side: the stream on which calls run one by one and are captured.
    Raises `Error` where float32 products would round their factors (`CUPY_TF32`).
    """

    def __init__(self, library: Any = None) -> None:
        if library is None:
            import cupy as library
        self.xp = library
        if "TF32" in compute_type(library):
            raise Error(
                "CuPy is set to TF32, which rounds the factors of float32 products to 10 bits; "
                "leave CUPY_TF32 unset"
            )
        super().__init__()
        self.side = library.cuda.Stream(non_blocking=True)
        self.kernels: dict[Any, Any] = {}
        self._user: Any = None  # the stream that used this memory last
        self._used = library.cuda.Event(disable_timing=True)

    def fusable(self, fast: bool) -> tuple[str, ...]:
        """The functions of kernels; chains are always compiled."""
        return FUSABLE

    def bind(
        self, values: list[Value], plan: Plan, lasting: dict[int, Array], fast: bool
    ) -> CudaBinding:
        """A plan in this memory."""
        return CudaBinding(values, plan, lasting, self)

    def put(self, home: Array, x: Any) -> None:
        """Copy an array of host or device, or a number, into a home, on the current stream.

        A host array may be written to again at once: CUDA takes pageable memory before it returns.
        """
        self.enter()
        if on_gpu(x):
            self.xp.copyto(home, x)
        elif isinstance(x, float | int | np.generic):
            home.fill(x)
        else:
            home.set(np.asarray(x, dtype=home.dtype))
        self.leave()

    def holds(self, x: Any) -> bool:
        """Whether an array lies in this memory, also as a view."""
        if not on_gpu(x):
            return False
        owners = (self.scratch, *self.homes.values())
        return any(o.data.ptr <= x.data.ptr < o.data.ptr + o.nbytes for o in owners)

    def enter(self) -> Any:
        """The current stream, which now comes after all that was done to this memory."""
        stream = self.xp.cuda.get_current_stream()
        if self._user is not None and self._user != stream:
            stream.wait_event(self._used)
        self._user = stream
        return stream

    def leave(self) -> None:
        """What was done since `enter` is on its way."""
        self._used.record(self._user)

    def kernel(self, loop: Loop) -> Any:
        """The elementwise kernel of a loop; loops of the same source share it."""
        key = loop[:3]
        if key not in self.kernels:
            reads, writes, body = key
            self.kernels[key] = self.xp.ElementwiseKernel(
                reads, writes, body, "npdrt_chain", preamble=ARITHMETIC, options=OPTIONS
            )
        return self.kernels[key]

    def raw_kernel(self, name: str, source: str) -> Any:
        """The kernel of that name."""
        if source not in self.kernels:
            self.kernels[source] = self.xp.RawKernel(ARITHMETIC + source, name, options=OPTIONS)
        return self.kernels[source]


def compute_type(library: Any) -> str:
    """How CuPy asks cuBLAS to compute float32 products, by CuPy's name."""
    kind = library._core.get_compute_type(np.float32)
    return str(library._core._routines_linalg.compute_type_to_str(kind))


class CudaBinding(Binding):
    """A plan with a CuPy array for every value; `operations` replay it, or `graph` at once.

    graph: the captured operations, None before. graph_error: why there is none; then every replay
    runs the operations one by one. launches: operations in a replay without graph.
    """

    def __init__(
        self, values: list[Value], plan: Plan, lasting: dict[int, Array], memory: CudaMemory
    ):
        self.values, self.plan, self.memory, self.fast = values, plan, memory, True
        self.graph: Any = None
        self.graph_error: Exception | None = None
        self.runs = 0
        cupy = memory.xp
        # What CuPy allocates for itself (workspaces of reductions, copies of odd layouts) comes
        # from a pool of this program alone. A graph remembers addresses: in the common pool the
        # blocks would be free after the capture, for any array, or handed back to the driver.
        self.pool = cupy.cuda.MemoryPool()
        self.arrays = {i: x if on_gpu(x) else cupy.asarray(x) for i, x in lasting.items()}
        self._placed: dict[tuple[Any, ...], Array] = {}
        apart = self._apart()
        extra = max((end for _, end in apart.values()), default=0)
        memory.reserve(plan.scratch_bytes + extra)
        self.scratch = memory.scratch
        for i, offset in plan.scratch.items():
            self.arrays[i] = self._at(i, offset)
        for i, (start, _) in apart.items():
            self.arrays[i] = self._at(i, plan.scratch_bytes + start)
        self.lanes = cupy.empty(self._lanes(), dtype=np.float64)
        for c in plan.constants:
            call = plan.calls[c]
            value = values[call.result]
            owner = cupy.empty(max(value.nbytes, 1), dtype=np.uint8)
            self.arrays[call.result] = self._seen(owner, value, 0)
            run(self.single(call))
        self.operations = [o for group in plan.groups for o in self._group(group)]

    @property
    def launches(self) -> int:
        """Operations in a replay without graph: one kernel, copy or library call each, or a few."""
        return len(self.operations)

    # --- running ---------------------------------------------------------------------------

    def run(self) -> None:
        """Replay on the current stream; it does not wait for the device."""
        stream = self.memory.enter()
        if self.runs >= WARM_UPS and self.graph is None and self.graph_error is None:
            self._capture()
        if self.graph is not None:
            self.graph.launch(stream)
        else:
            with self._aside():
                run(self.operations)
        self.runs += 1
        self.memory.leave()

    @contextmanager
    def _aside(self) -> Iterator[Any]:
        """The side stream, after what the current stream has to do and before what it gets next.

        CuPy's pools keep free blocks by stream: calls that warm up for a capture must run on the
        stream of the capture.
        """
        cuda, side = self.memory.xp.cuda, self.memory.side
        caller = cuda.get_current_stream()
        side.wait_event(caller.record())
        try:
            with side, cuda.using_allocator(self.pool.malloc):
                yield side
        finally:
            caller.wait_event(side.record())

    def _capture(self) -> None:
        """Capture the operations; nothing runs, so that the homes keep what they have.

        In the thread-local mode CUDA refuses what would not be in the graph: to allocate, to wait.
        So does a program with calls of `NOT_CAPTURED`.
        """
        barred = {self.plan.calls[c].function for g in self.plan.groups for c in g.calls}
        barred &= set(NOT_CAPTURED)
        if barred:
            self.graph_error = Error(f"{', '.join(sorted(barred))} cannot be part of a CUDA graph")
            return
        cuda, collecting = self.memory.xp.cuda, gc.isenabled()
        gc.disable()  # a collection might free memory of the device, which ends a capture
        try:
            with self._aside() as side:
                side.begin_capture(mode=cuda.runtime.streamCaptureModeThreadLocal)
                try:
                    run(self.operations)
                finally:
                    graph = side.end_capture()
            self.graph = graph
        except Exception as error:
            self.graph_error = error
            self.memory.side = cuda.Stream(non_blocking=True)  # the old one may be in any state
        finally:
            if collecting:
                gc.enable()

    # --- arrays ----------------------------------------------------------------------------

    def array(self, index: int) -> Array:
        """The array of a value; a view is made of its owner's memory."""
        if index not in self.arrays:
            value = self.values[index]
            assert value.base is not None
            self.arrays[index] = self._seen(self.arrays[value.base], value, value.offset)
        return self.arrays[index]

    def _at(self, i: int, offset: int) -> Array:
        """A value in scratch memory. Where it takes the place of another of its form it is the
        same object: CuPy copies arguments that overlap `out` and are another object."""
        value = self.values[i]
        key = (offset, value.shape, value.dtype, value.strides)
        if key not in self._placed:
            self._placed[key] = self._seen(self.scratch, value, offset)
        return self._placed[key]

    def _seen(self, owner: Array, value: Value, offset: int) -> Array:
        memory = owner.data + offset
        return self.memory.xp.ndarray(
            value.shape, value.dtype, memptr=memory, strides=value.strides
        )

    def _apart(self) -> dict[int, tuple[int, int]]:
        """Start and end, beyond the scratch memory of the plan, of the values inside chains that
        cannot be one kernel: their calls run one by one on whole arrays."""
        places: dict[int, tuple[int, int]] = {}
        for group in self.plan.groups:
            if not self._compiles(group):
                for i, slot in group.slots:
                    room = self.values[i].size * 8  # slots serve values of any dtype
                    places[i] = (slot * room, (slot + 1) * room)
        return places

    # --- operations ------------------------------------------------------------------------

    def _compiles(self, group: Group) -> bool:
        return all(can_compile(self.plan.calls[c], self.values) for c in group.calls)

    def _group(self, group: Group) -> list[Operation]:
        calls = [self.plan.calls[c] for c in group.calls]
        if group.chain and self._compiles(group):
            inside = dict(group.slots)
            return [self._loop(calls, [c.result for c in calls if c.result not in inside])]
        return [operation for call in calls for operation in self.single(call)]

    def single(self, call: Call) -> list[Operation]:
        """The CuPy calls of one call, on whole arrays."""
        if can_compile(call, self.values):
            return [self._loop([call], [call.result])]
        args, out = tuple(map(self._filled, call.args)), self.array(call.result)
        if call.function == "norm":
            return self._norm(args[0], out)
        return operations(self.memory.xp, call, args, out)

    def _loop(self, calls: list[Call], kept: list[int]) -> Operation:
        """Elementwise calls as one kernel."""
        for i in (*read_by(calls), *kept):
            self.array(i)
        loop = loop_source(calls, self.values, kept, self._place)
        scalars = [i for i in loop.read if self._is_scalar(i, calls)]
        args = [self.arrays[i].reshape(1) if i in scalars else self.arrays[i] for i in loop.read]
        args += [self.arrays[i] for i in loop.written]
        return self.memory.kernel(loop), tuple(args), {}

    def _is_scalar(self, i: int, calls: list[Call]) -> bool:
        return self.values[i].shape == () != self.values[calls[0].result].shape

    def _place(self, i: int) -> tuple[Any, ...]:
        """What two values have in common that are the same array."""
        x, value = self.arrays[i], self.values[i]
        return x.data.ptr, value.dtype, value.shape, value.strides

    # --- the norm --------------------------------------------------------------------------

    def _lanes(self) -> int:
        """The numbers that the largest norm keeps between its two kernels. Norms run one after
        another, so that all share them."""
        calls = [self.plan.calls[c] for g in self.plan.groups for c in g.calls]
        calls += [self.plan.calls[c] for c in self.plan.constants]
        sizes = [self.values[c.refs[0]].size for c in calls if c.function == "norm"]
        return LANES * max(map(_chunks, sizes), default=0)

    def _norm(self, x: Array, out: Array) -> list[Operation]:
        """`npdrt.optim.norm`: a block of threads a chunk, a thread a lane; then one block."""
        widened: list[Operation] = []
        if x.dtype == np.float16:
            wide = self.memory.xp.empty(x.shape, dtype=np.float32)
            widened, x = [(self.memory.xp.copyto, (wide, x), {})], wide
        chunks, source = _chunks(x.size), NORM_LANES.replace("TYPE", _TYPES[str(x.dtype)])
        lanes = self.memory.raw_kernel("npdrt_norm_lanes", source)
        fold = self.memory.raw_kernel("npdrt_norm_fold", NORM_FOLD)
        return [
            *widened,
            (lanes, ((chunks,), (LANES,), (x, np.int64(x.size), self.lanes)), {}),
            (fold, ((1,), (LANES,), (self.lanes, np.int64(chunks), out)), {}),
        ]


def _chunks(size: int) -> int:
    return max(1, -(-size // CHUNK))


# --- kernels ----------------------------------------------------------------------------------

_TYPES = {"bool": "bool", "float32": "float", "float64": "double"}
_BITWISE = {"bitwise_and": "&", "bitwise_or": "|", "bitwise_xor": "^"}

# On the device each operation is the PTX instruction that rounds once and keeps subnormals, whatever
# the compiler was told; elsewhere, in the tests, the operator of C.
ARITHMETIC = r"""
#ifdef __CUDA_ARCH__
#define NPDRT_TWO(name, ptx, sign) \
  __device__ inline float npdrt_##name(float a, float b) { \
    float r; asm(ptx ".f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b)); return r; } \
  __device__ inline double npdrt_##name(double a, double b) { \
    double r; asm(ptx ".f64 %0, %1, %2;" : "=d"(r) : "d"(a), "d"(b)); return r; }
#define NPDRT_ONE(name, ptx, c) \
  __device__ inline float npdrt_##name(float a) { \
    float r; asm(ptx ".f32 %0, %1;" : "=f"(r) : "f"(a)); return r; } \
  __device__ inline double npdrt_##name(double a) { \
    double r; asm(ptx ".f64 %0, %1;" : "=d"(r) : "d"(a)); return r; }
#define NPDRT_IS(name, ptx, sign) \
  __device__ inline bool npdrt_##name(float a, float b) { int r; \
    asm("{.reg .pred p; setp." ptx ".f32 p, %1, %2; selp.s32 %0, 1, 0, p;}" \
        : "=r"(r) : "f"(a), "f"(b)); return r != 0; } \
  __device__ inline bool npdrt_##name(double a, double b) { int r; \
    asm("{.reg .pred p; setp." ptx ".f64 p, %1, %2; selp.s32 %0, 1, 0, p;}" \
        : "=r"(r) : "d"(a), "d"(b)); return r != 0; }
__device__ inline double npdrt_double(float a) {
  double r; asm("cvt.f64.f32 %0, %1;" : "=d"(r) : "f"(a)); return r; }
__device__ inline float npdrt_float(double a) {
  float r; asm("cvt.rn.f32.f64 %0, %1;" : "=f"(r) : "d"(a)); return r; }
__device__ inline float npdrt_bits(unsigned int a) { return __uint_as_float(a); }
__device__ inline double npdrt_bits(unsigned long long a) {
  return __longlong_as_double((long long)a); }
#else
#define NPDRT_TWO(name, ptx, sign) \
  __device__ inline float npdrt_##name(float a, float b) { return a sign b; } \
  __device__ inline double npdrt_##name(double a, double b) { return a sign b; }
#define NPDRT_ONE(name, ptx, c) \
  __device__ inline float npdrt_##name(float a) { return c(a); } \
  __device__ inline double npdrt_##name(double a) { return c(a); }
#define NPDRT_IS(name, ptx, sign) \
  __device__ inline bool npdrt_##name(float a, float b) { return a sign b; } \
  __device__ inline bool npdrt_##name(double a, double b) { return a sign b; }
__device__ inline double npdrt_double(float a) { return (double)a; }
__device__ inline float npdrt_float(double a) { return (float)a; }
__device__ inline float npdrt_bits(unsigned int a) { union { unsigned int i; float f; } u; u.i = a; return u.f; }
__device__ inline double npdrt_bits(unsigned long long a) { union { unsigned long long i; double f; } u; u.i = a; return u.f; }
#endif
__device__ inline double npdrt_double(double a) { return a; }
NPDRT_TWO(add, "add.rn", +)
NPDRT_TWO(subtract, "sub.rn", -)
NPDRT_TWO(multiply, "mul.rn", *)
NPDRT_TWO(divide, "div.rn", /)
NPDRT_ONE(sqrt, "sqrt.rn", sqrt)
NPDRT_ONE(negative, "neg", -)
NPDRT_ONE(abs, "abs", fabs)
NPDRT_IS(equal, "eq", ==)
NPDRT_IS(not_equal, "neu", !=)
NPDRT_IS(less, "lt", <)
NPDRT_IS(less_equal, "le", <=)
NPDRT_IS(greater, "gt", >)
NPDRT_IS(greater_equal, "ge", >=)
"""

NORM_LANES = f"""
extern "C" __global__ void npdrt_norm_lanes(
    const TYPE* __restrict__ x, long long size, double* __restrict__ lanes) {{
  const long long start = (long long)blockIdx.x * {CHUNK};
  const long long end = start + {CHUNK} < size ? start + {CHUNK} : size;
  double total = 0.0;
  #pragma unroll 16
  for (long long i = start + threadIdx.x; i < end; i += {LANES}) {{
    const double v = npdrt_double(x[i]);
    total = npdrt_add(total, npdrt_multiply(v, v));
  }}
  lanes[(long long)blockIdx.x * {LANES} + threadIdx.x] = total;
}}
"""
NORM_FOLD = f"""
extern "C" __global__ void npdrt_norm_fold(
    const double* __restrict__ lanes, long long chunks, double* __restrict__ out) {{
  __shared__ double folded[{LANES}];
  const int k = threadIdx.x;
  double total = lanes[k];
  #pragma unroll 16
  for (long long c = 1; c < chunks; ++c) total = npdrt_add(total, lanes[c * {LANES} + k]);
  folded[k] = total;
  __syncthreads();
  for (int half = {LANES // 2}; half; half /= 2) {{
    if (k < half) folded[k] = npdrt_add(folded[k], folded[k + half]);
    __syncthreads();
  }}
  if (k == 0) out[0] = npdrt_sqrt(folded[0]);
}}
"""


class Loop(NamedTuple):
    """The source of an elementwise kernel, and the values its parameters are, in their order."""

    reads: str
    writes: str
    body: str
    read: tuple[int, ...]
    written: tuple[int, ...]


def can_compile(call: Call, values: list[Value]) -> bool:
    """Whether a call is a kernel of its own or in a chain: one whose bits NumPy defines, on
    float32, float64 and bool."""
    if not can_fuse(call, values):
        return False
    if call.function in ("astype", "where"):
        return all(isinstance(x, Ref | float | int | bool | str) for x in call.args)
    kind = _computed_in(call, values).kind
    return kind == ("b" if call.function in _BITWISE else "f")


def loop_source(
    calls: list[Call], values: list[Value], kept: list[int], place: Callable[[int], Any]
) -> Loop:
    """Elementwise calls as the body of a kernel for one element.

    kept: the results it writes. place(i): equal for values that are the same array. Everything is
    read before anything is written, and an array that is also written is a parameter once, so a
    result may replace an argument. 0-d arrays are read where they are, on the device. Names count
    from 0: the same calls of another layer have the same source.
    """
    shape = values[calls[0].result].shape
    read, written = {}, {place(i): (f"o{k}", i) for k, i in enumerate(kept)}
    names: dict[int, str] = {}
    reads, body = [], []
    for i in read_by(calls):
        key, value, scalar = place(i), values[i], values[i].shape == () != shape
        if key not in written and key not in read:
            read[key] = (f"a{len(read)}", i)
            reads.append(f"{'raw ' if scalar else ''}{value.dtype} {read[key][0]}")
        source = (written.get(key) or read[key])[0] + ("[0]" if scalar else "")
        names[i] = f"x{len(names)}"
        body.append(f"const {_TYPES[value.dtype]} {names[i]} = {source};")
    for call in calls:
        names[call.result] = f"x{len(names)}"
        kind = _TYPES[values[call.result].dtype]
        body.append(f"const {kind} {names[call.result]} = {_expression(call, values, names)};")
    body += [f"{written[place(i)][0]} = {names[i]};" for i in kept]
    writes = ", ".join(f"{values[i].dtype} {name}" for name, i in written.values())
    order = (tuple(i for _, i in read.values()), tuple(i for _, i in written.values()))
    return Loop(", ".join(reads), writes, "\n".join(body), *order)


def _expression(call: Call, values: list[Value], names: dict[int, str]) -> str:
    """A call on one element, every operand in the dtype that NumPy computes in."""
    result = values[call.result].dtype
    if call.function == "astype":
        return _operand(call.args[0], result, values, names)
    if call.function == "where":
        chosen = [_operand(x, result, values, names) for x in call.args[1:]]
        return f"{_operand(call.args[0], 'bool', values, names)} ? {chosen[0]} : {chosen[1]}"
    dtype = _computed_in(call, values).name
    operands = [_operand(x, dtype, values, names) for x in call.args]
    if call.function in _BITWISE:
        return f"{operands[0]} {_BITWISE[call.function]} {operands[1]}"
    if call.function == "isfinite":
        return f"npdrt_less(npdrt_abs({operands[0]}), {_literal(math.inf, dtype)})"
    return f"npdrt_{call.function}({', '.join(operands)})"


def _computed_in(call: Call, values: list[Value]) -> np.dtype[Any]:
    """The dtype of the operands; a Python number takes that of the arrays."""
    operands = (np.dtype(values[x.index].dtype) if isinstance(x, Ref) else x for x in call.args)
    return np.result_type(*operands)


def _operand(x: Any, dtype: str, values: list[Value], names: dict[int, str]) -> str:
    if not isinstance(x, Ref):
        return _literal(x, dtype)
    given, name = values[x.index].dtype, names[x.index]
    if given == dtype:
        return name
    if dtype == "bool":
        return f"npdrt_not_equal({name}, {_literal(0.0, given)})"
    return f"({_TYPES[dtype]}){name}" if given == "bool" else f"npdrt_{_TYPES[dtype]}({name})"


def _literal(x: float, dtype: str) -> str:
    """A Python number rounded to a dtype, in C; by its bits where a compiler might lose some."""
    if dtype == "bool":
        return "true" if x else "false"
    with np.errstate(all="ignore"):
        value = np.dtype(dtype).type(x)
    if np.isfinite(value) and (value == 0 or abs(value) >= np.finfo(dtype).tiny):
        return f"({_TYPES[dtype]})({float(value)!r})"
    bits, suffix = ("uint32", "u") if dtype == "float32" else ("uint64", "ull")
    return f"npdrt_bits({int(value.view(bits)):#x}{suffix})"


# --- one call as CuPy makes it ----------------------------------------------------------------

_NAMES = {"abs": "absolute", "bitwise_invert": "invert", "round": "rint"}


def operations(cupy: Any, call: Call, args: tuple[Any, ...], out: Array) -> list[Operation]:
    """The CuPy calls, writing into `out`, that give what `call` gives on these arguments."""
    special = _SPECIAL.get(call.function)
    if special:
        return special(cupy, call, args, out)
    function = getattr(cupy, _NAMES.get(call.function, call.function))
    settings = dict(call.settings)
    if call.function in ("sum", "prod"):
        settings["dtype"] = out.dtype
    return [(function, args, {**settings, "out": out})]


def _copy(cupy: Any, call: Call, args: tuple[Any, ...], out: Array) -> list[Operation]:
    return [(cupy.copyto, (out, args[0]), {"casting": "unsafe"})]


def _where(cupy: Any, call: Call, args: tuple[Any, ...], out: Array) -> list[Operation]:
    condition, a, b = args  # cupy.where has no `out`
    fill = [(cupy.copyto, (out, x), {"casting": "unsafe"}) for x in (b, a)]
    return [fill[0], (*fill[1][:2], {"casting": "unsafe", "where": condition})]


def _assign(cupy: Any, call: Call, args: tuple[Any, ...], out: Array) -> list[Operation]:
    base, index, value = args
    same = base.data.ptr == out.data.ptr
    copied: list[Operation] = [] if same else [(cupy.copyto, (out, base), {})]
    return [*copied, (cupy.copyto, (out[index], value), {"casting": "unsafe"})]


def _create(cupy: Any, call: Call, args: tuple[Any, ...], out: Array) -> list[Operation]:
    if call.function == "arange":
        return [(cupy.copyto, (out, cupy.arange(*args, **call.settings)), {})]
    value = {"zeros": 0, "ones": 1}.get(call.function)
    return [(out.fill, (args[1] if value is None else value,), {})]


def _join(cupy: Any, call: Call, args: tuple[Any, ...], out: Array) -> list[Operation]:
    """Part by part: CuPy's own functions send a list of addresses from the host."""
    axis = call.settings.get("axis", args[1] if len(args) > 1 else 0) % out.ndim
    before, made, start = (slice(None),) * axis, [], 0
    for part in args[0]:
        length = 1 if call.function == "stack" else part.shape[axis]
        place = start if call.function == "stack" else slice(start, start + length)
        made.append((cupy.copyto, (out[(*before, place)], part), {"casting": "unsafe"}))
        start += length
    return made


def _take(cupy: Any, call: Call, args: tuple[Any, ...], out: Array) -> list[Operation]:
    x, indices, *axis = args
    settings = {"axis": axis[0] if axis else None, **call.settings}
    return [(cupy.take, (x, indices), {**settings, "out": out})]


def _allocating(cupy: Any, call: Call, args: tuple[Any, ...], out: Array) -> list[Operation]:
    """A CuPy function that has no `out`: its result is copied."""
    function = getattr(cupy, call.function)

    def into(*args: Any) -> None:
        cupy.copyto(out, function(*args, **call.settings))

    return [(into, args, {})]


_SPECIAL: dict[str, Callable[[Any, Call, tuple[Any, ...], Array], list[Operation]]] = {
    **dict.fromkeys(("astype", "copy"), _copy),
    **dict.fromkeys(("zeros", "ones", "full", "arange"), _create),
    **dict.fromkeys(("concat", "stack"), _join),
    **dict.fromkeys(NOT_CAPTURED, _allocating),
    **{"where": _where, "assign": _assign, "take": _take},
}
