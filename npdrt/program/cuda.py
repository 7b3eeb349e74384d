"""Replaying a program on a GPU: CuPy calls into memory that lasts, captured as one CUDA graph.

Every value is an array over one allocation, or a home of an input or output. A chain is one kernel,
and so is any other call of `+ - * / sqrt`, comparisons, selections, copies and casts. The norms of
a batch (`npdrt.program.batches`) are two kernels, and its chains are one. Everything else is the
CuPy call that an eager step makes, with `out`. The first `WARM_UPS` replays run call by call and
put kernels, handles and workspaces in place. The next captures the calls, which runs nothing, and
from then on a replay is one launch, and a copy for every result that replaces no input. No replay
waits for the device. Memory that you let go of is used again in the order of the streams that
replays run on, as in CuPy's own pools: if another stream reads an array, drop the array when that
stream is done.

The kernels (`npdrt.program.kernels`) give the bits of the CPU, except for the sign and payload of a
NaN, and the sign of a zero that `maximum` or `minimum` chooses. Products are made by
`npdrt.cublas`, in eager steps too, without TF32; sums, maxima over axes, exp, log and tanh are
CuPy's, which in float32 take subnormal numbers for zero.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import numpy as np

from npdrt import cublas, exact
from npdrt.arrays import Array, on_gpu, write_result
from npdrt.errors import Error
from npdrt.kernels import KERNELS
from npdrt.ops import convolution
from npdrt.program.arena import Lease
from npdrt.program.batches import Batch, Group
from npdrt.program.calls import Call, Draw, Value
from npdrt.program.chain import read_by
from npdrt.program.compiling import compile_kernels
from npdrt.program.kernels import (
    ARITHMETIC,
    OPTIONS,
    Loop,
    can_compile,
    loop_source,
)
from npdrt.program.launch import Instance, chains, norms
from npdrt.program.masks import Masks
from npdrt.program.memory import Memory
from npdrt.program.nodes import count_nodes
from npdrt.program.operations import Maker, Operation, allocating, copied, run
from npdrt.program.plan import Plan, Target
from npdrt.program.replay import Binding

WARM_UPS = 2  # replays call by call: the first compiles and allocates, the second finds all there


class CudaMemory(Memory):
    """The memory of programs on a GPU.

    device: its number; None for the current one. library, blas: stand-ins for CuPy and cuBLAS.
    side: the stream on which calls run one by one and are captured. launched: the operations that
    are compiled.
    """

    has_kernels = True

    def __init__(self, library: Any = None, blas: Any = None, device: int | None = None) -> None:
        if library is None:
            import cupy

            library = cupy
        self.xp = library
        self.device = library.cuda.Device() if device is None else library.cuda.Device(device)
        with self.device:
            super().__init__()
            self.side = library.cuda.Stream(non_blocking=True)
            self.blas = cublas.Cublas(library, blas)
            self._used = library.cuda.Event(disable_timing=True)
        self.kernels: dict[Any, Any] = {}
        self.launched: set[Any] = set()
        self._user: Any = None  # the stream that used this memory last

    def __reduce__(self) -> Any:
        return type(self), (None, None, self.device.id)

    def on_device(self) -> AbstractContextManager[Any]:
        """Inside, the device of this memory is CuPy's current one."""
        device: AbstractContextManager[Any] = self.xp.cuda.Device(self.device.id)
        return device

    def target(self, fast: bool) -> Target:
        """Chains are kernels, and one launch runs many."""
        return Target(can_compile, batched=True)

    def bind(
        self,
        values: list[Value],
        plan: Plan,
        persistent: dict[int, Array],
        draws: dict[int, Draw],
        fast: bool,
    ) -> CudaBinding:
        """A plan in this memory."""
        return CudaBinding(values, plan, persistent, draws, self)

    def put(self, home: Array, x: Any) -> None:
        """Copy an array of host or device, or a number, into a home, on the current stream.

        You may write to a host array again at once: CUDA copies pageable memory before it returns.
        """
        self.enter()
        if on_gpu(x):
            self.xp.copyto(home, x)
        elif isinstance(x, float | int | np.generic):
            home.fill(x)
        else:
            home.set(np.asarray(x, dtype=home.dtype))
        self.leave()

    def view(self, owner: Array, value: Value, offset: int) -> Array:
        """A value in the memory of an array."""
        return self.xp.ndarray(
            value.shape, value.dtype, memptr=owner.data + offset, strides=value.strides
        )

    def over(self, lease: Lease) -> Array:
        """A fresh array over a lease, which CuPy keeps as the owner of memory that is not its."""
        x, cuda = lease.base, self.xp.cuda
        memory = cuda.UnownedMemory(x.data.ptr, x.nbytes, lease, x.data.device_id)
        pointer = cuda.MemoryPointer(memory, 0)
        return self.xp.ndarray(x.shape, x.dtype, memptr=pointer, strides=x.strides)

    def holds(self, x: Any) -> bool:
        """Whether an array, or what it is a view of, is memory that calls write to."""
        if not on_gpu(x):
            return False
        owners = (self.scratch, *(home.array for home in self.homes.values()))
        return any(o.data.ptr <= x.data.ptr < o.data.ptr + o.nbytes for o in owners)

    def enter(self) -> Any:
        """The current stream, which from now on waits for all that was done to this memory."""
        stream = self.xp.cuda.get_current_stream()
        if self._user is not None and self._user != stream:
            stream.wait_event(self._used)
        self._user = stream
        return stream

    def leave(self) -> None:
        """Note that the work since `enter` has been given to the stream."""
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


# --- calls that CuPy makes in a way of its own ------------------------------------------------


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


def _kernel(cupy: Any, call: Call, args: tuple[Any, ...], out: Array) -> list[Operation]:
    """The kernel that an eager step launches."""
    if call.settings.get("form") == "sliced":
        return copied(cupy, convolution.PRODUCTS[call.function].definition, call, args, out)
    return [(KERNELS[call.function].write, (cupy, out, *args), call.settings)]


def _product(cupy: Any, call: Call, args: tuple[Any, ...], out: Array) -> list[Operation]:
    """By `npdrt.cublas`, as in an eager step."""
    return [(write_result, (out, "matmul", *args), {})]


def _exact(cupy: Any, call: Call, args: tuple[Any, ...], out: Array) -> list[Operation]:
    return copied(cupy, exact.matmul, call, args, out)


def _reduce(cupy: Any, call: Call, args: tuple[Any, ...], out: Array) -> list[Operation]:
    """CuPy gives `out` other strides if it is made of an array that is not in C order, and does not
    add in the dtype of `out` (cupy/cupy#10300)."""
    settings = {**call.settings, "dtype": out.dtype} if call.function in _SUMS else call.settings
    call = replace(call, settings=settings)
    moves = call.function not in _SUMS or args[0].dtype != out.dtype
    if out.ndim > 1 and moves and not args[0].flags.c_contiguous:
        return allocating(cupy, call, args, out)
    return [(getattr(cupy, call.function), args, {**settings, "out": out})]


_SUMS = ("sum", "prod")

CUPY: dict[str, Maker] = {
    **dict.fromkeys(("concat", "stack"), _join),
    **dict.fromkeys(KERNELS, _kernel),
    **dict.fromkeys((*_SUMS, "any", "all", "argmax", "argmin"), _reduce),
    "matmul": _product,
    "exact_matmul": _exact,
    "min": allocating,  # with `out` it raises TypeError (cupy/cupy#9032)
}


# --- a plan on a device -----------------------------------------------------------------------


class CudaBinding(Binding):
    """A plan with a CuPy array for every value; `operations` replay it, or `graph` at once.

    graph: the captured operations, None before. graph_error: why there is none; then every replay
    runs the operations one by one. strides: of every array, as planned. launches: operations in a
    replay without graph.
    pool: what CuPy allocates for itself (workspaces of reductions, copies of odd layouts) comes
    from a pool of this program alone. A graph remembers addresses: in the common pool the blocks
    would be free after the capture, for any array, or handed back to the driver.
    """

    memory: CudaMemory
    own = CUPY

    def __init__(
        self,
        values: list[Value],
        plan: Plan,
        persistent: dict[int, Array],
        draws: dict[int, Draw],
        memory: CudaMemory,
    ):
        self.graph: Any = None
        self.graph_error: Exception | None = None
        self.runs = 0
        self.pool = memory.xp.cuda.MemoryPool()
        on_device = {i: x if on_gpu(x) else memory.xp.asarray(x) for i, x in persistent.items()}
        super().__init__(values, plan, on_device, draws, memory, fast=True)
        self.masks = Masks(draws, self.arrays, memory)
        self.operations = [*self.masks.operations(), *self.operations]
        self.strides = {i: x.strides for i, x in self.arrays.items()}
        compile_kernels(self.operations, memory)

    @property
    def launches(self) -> int:
        """Operations in a replay without graph: one kernel, copy or library call each, or a few."""
        return len(self.operations)

    @property
    def nodes(self) -> int | None:
        """The nodes of the graph; None without one, or if the driver does not say."""
        return None if self.graph is None else count_nodes(self.graph)

    # --- running ---------------------------------------------------------------------------

    def draw(self, streams: dict[int, Any]) -> None:
        """Before a replay, which draws the masks itself: the other inputs that are drawn."""
        super().draw({i: s for i, s in streams.items() if i not in self.masks.chosen})
        self.masks.begin(streams)

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
        if self.runs == 0:
            self._check_strides()
        self.runs += 1
        self.masks.end()
        self.memory.leave()

    @contextmanager
    def _aside(self) -> Iterator[Any]:
        """The side stream: it waits for the current stream's work so far, which then waits for it.

        CuPy's pools keep free blocks by stream: calls that warm up for a capture must run on the
        stream of the capture.
        """
        cuda, side = self.memory.xp.cuda, self.memory.side
        caller = cuda.get_current_stream()
        side.wait_event(caller.record())
        try:
            with side, cuda.using_allocator(self.pool.malloc), cublas.using(self.memory.blas):
                yield side
        finally:
            caller.wait_event(side.record())

    def _check_strides(self) -> None:
        """Raise `Error` if a call has changed the strides of an array that it was to write to:
        other calls would read other elements of it."""
        changed = [i for i, x in self.arrays.items() if x.strides != self.strides.get(i, x.strides)]
        if changed:
            names = (c.function for c in self.plan.calls if c.result in changed)
            raise Error(
                f"CuPy changed the strides of the result of {', '.join(names)}, which a program "
                "must not; run the step eagerly, and report this with the version of CuPy"
            )

    def _capture(self) -> None:
        """Capture the operations. Nothing runs, so the homes keep their numbers.

        In the thread-local mode CUDA refuses calls that cannot be part of a graph (to allocate, to
        wait).
        """
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
            error.__context__ = None  # the frames of the traceback hold the caller's arrays
            self.graph_error = error.with_traceback(None)
            self.memory.side = cuda.Stream(non_blocking=True)  # the old one may be in any state
        finally:
            if collecting:
                gc.enable()

    # --- memory ----------------------------------------------------------------------------

    def _reserve(self) -> None:
        """Scratch memory of the plan, after it whole arrays for the values inside chains that
        cannot be one kernel."""
        whole = self._whole_places()
        end = max((offset + room for offset, room in whole.values()), default=0)
        self.memory.reserve(max(self.plan.scratch_bytes, end))
        self.scratch = self.memory.scratch
        for i, (offset, _) in whole.items():
            self.arrays[i] = self._at(i, offset)

    def _whole_places(self) -> dict[int, tuple[int, int]]:
        """Offset and room (bytes) of every value inside a chain that cannot be one kernel, whose
        calls run one by one on whole arrays. Such chains share their room."""
        places: dict[int, tuple[int, int]] = {}
        for group in self.plan.groups:
            if not self._compiles(self._calls(group)):
                for i, block in group.chain_blocks:
                    size = self.values[i].size * 8  # a block serves values of any dtype
                    places[i] = (self.plan.scratch_bytes + block * size, size)
        return places

    # --- operations ------------------------------------------------------------------------

    def _calls(self, group: Group) -> list[Call]:
        return [self.plan.calls[c] for c in group.calls]

    def _batch(self, batch: Batch) -> list[Operation]:
        """The norms of a batch as two kernels, its chains as one."""
        if len(batch) == 1:
            return super()._batch(batch)
        if not batch[0].chain:
            calls = [self._calls(group)[0] for group in batch]
            return self._norms([(self._filled(c.args)[0], self.array(c.result)) for c in calls])
        return chains(self.memory, [self._instance(group) for group in batch])

    def _instance(self, group: Group) -> Instance:
        calls, inside = self._calls(group), dict(group.chain_blocks)
        kept = [call.result for call in calls if call.result not in inside]
        loop = self._source(calls, kept)
        arrays = tuple(self.arrays[i] for i in (*loop.read, *loop.written))
        return Instance(loop, arrays, self.values[kept[0]].size)

    def _compiles(self, calls: list[Call]) -> bool:
        return all(can_compile(call, self.values) for call in calls)

    def _chain(self, calls: list[Call], blocks: dict[int, int]) -> list[Operation]:
        """The calls of a chain as one kernel, or one by one."""
        if self._compiles(calls):
            return [self._loop(calls, [c.result for c in calls if c.result not in blocks])]
        return [operation for call in calls for operation in self.single(call)]

    def single(self, call: Call) -> list[Operation]:
        """The kernel or the CuPy calls of one call, on whole arrays."""
        if self._compiles([call]):
            return [self._loop([call], [call.result])]
        return super().single(call)

    def _loop(self, calls: list[Call], kept: list[int]) -> Operation:
        """Elementwise calls as one kernel."""
        loop = self._source(calls, kept)
        scalars = [i for i in loop.read if self._is_scalar(i, calls)]
        args = [self.arrays[i].reshape(1) if i in scalars else self.arrays[i] for i in loop.read]
        args += [self.arrays[i] for i in loop.written]
        return self.memory.kernel(loop), tuple(args), {}

    def _source(self, calls: list[Call], kept: list[int]) -> Loop:
        for i in (*read_by(calls), *kept):
            self.array(i)
        return loop_source(calls, self.values, kept, self._place)

    def _is_scalar(self, i: int, calls: list[Call]) -> bool:
        return self.values[i].shape == () != self.values[calls[0].result].shape

    def _place(self, i: int) -> tuple[Any, ...]:
        """Equal for two values that are the same array."""
        x, value = self.arrays[i], self.values[i]
        return x.data.ptr, value.dtype, value.shape, value.strides

    def _norm(self, x: Array, out: Array) -> list[Operation]:
        return self._norms([(x, out)])

    def _norms(self, pairs: list[tuple[Array, Array]]) -> list[Operation]:
        """`npdrt.optim.norm` of several arrays; those of float16 are made wider first."""
        widened: list[Operation] = []
        given = []
        for x, out in pairs:
            if x.dtype == np.float16:
                wide = self.memory.xp.empty(x.shape, dtype=np.float32)
                widened.append((self.memory.xp.copyto, (wide, x), {}))
                x = wide
            given.append((x, out))
        return [*widened, *norms(self.memory, given)]
