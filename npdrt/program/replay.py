"""Replaying a program on the CPU: the plan bound to memory, as a list of NumPy calls.

Binding makes every array once: a view into the scratch memory, a home of an input or output, a
constant, a block of a chain. A replay is then a loop over `function(*args, **settings)`, and none
of these calls allocates an array.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from npdrt import slices
from npdrt.ops import blocked, rows
from npdrt.optim.norm import CHUNK, LANES
from npdrt.program import fused, tiles
from npdrt.program.arena import Arena, Array
from npdrt.program.batches import Batch, Group
from npdrt.program.calls import CONVOLUTIONS, ROWS, Call, Draw, Ref, Value
from npdrt.program.operations import Maker, Operation, copied, operations, run, take, where
from npdrt.program.plan import Plan

BLOCK = 1 << 17  # elements of a chain's block; smaller ones cost more calls than they save


# --- calls that NumPy makes in a way of its own, without allocating ---------------------------

_REDUCERS: dict[str, Any] = {
    "sum": np.add.reduce,
    "prod": np.multiply.reduce,
    "max": np.maximum.reduce,
    "min": np.minimum.reduce,
    "all": np.logical_and.reduce,
    "any": np.logical_or.reduce,
}


def _reduce(library: Any, call: Call, args: tuple[Any, ...], out: Array) -> list[Operation]:
    settings = {"axis": None, **call.settings, "out": out}
    if call.function in ("sum", "prod"):
        settings["dtype"] = out.dtype
    if len(args) > 1:
        settings["axis"] = args[1]
    return [(_REDUCERS[call.function], args[:1], settings)]


def _where(library: Any, call: Call, args: tuple[Any, ...], out: Array) -> list[Operation]:
    condition, a, b = args
    if not all(_same_bits(array, out) for array in (a, b)):
        return where(library, call, args, out)
    # b ^ (a ^ b) c on the bits: no branch. A copy with a random mask takes ten times as long.
    whole = f"i{out.itemsize}"
    x, y, z, c = a.view(whole), b.view(whole), out.view(whole), condition.view(np.int8)
    steps = (np.bitwise_xor, (x, y)), (np.multiply, (z, c)), (np.bitwise_xor, (z, y))
    return [(function, both, {"out": z}) for function, both in steps]


def _same_bits(array: Any, out: Array) -> bool:
    """Whether it is an array of the result's dtype, and an integer of that size exists."""
    return hasattr(array, "dtype") and bool(array.dtype == out.dtype) and out.itemsize <= 8


def _convolve(library: Any, call: Call, args: tuple[Any, ...], out: Array) -> list[Operation]:
    return [(getattr(blocked, call.function), (*args, out), dict(call.settings))]


def _exact(library: Any, call: Call, args: tuple[Any, ...], out: Array) -> list[Operation]:
    return [(slices.multiply, (*args, out), {})]


def _convolve_compiled(
    library: Any, call: Call, args: tuple[Any, ...], out: Array
) -> list[Operation]:
    settings = {**call.settings, "compiled": tiles.compiled}
    return [(getattr(blocked, call.function), (*args, out), settings)]


def _rows(library: Any, call: Call, args: tuple[Any, ...], out: Array) -> list[Operation]:
    """The definition of a GPU's kernel."""
    return copied(library, getattr(rows, call.function).definition, call, args, out)


def _sort(library: Any, call: Call, args: tuple[Any, ...], out: Array) -> list[Operation]:
    return [(np.copyto, (out, args[0]), {}), (out.sort, (), dict(call.settings))]


NUMPY: dict[str, Maker] = {
    **dict.fromkeys(_REDUCERS, _reduce),
    **dict.fromkeys(CONVOLUTIONS, _convolve),
    **dict.fromkeys(ROWS, _rows),
    "exact_matmul": _exact,
    # The default mode checks the indices and allocates. The readers of data have checked them.
    "take": partial(take, mode="wrap"),
    **{"where": _where, "sort": _sort},
}
COMPILED = {**NUMPY, **dict.fromkeys(CONVOLUTIONS, _convolve_compiled)}


# --- a plan in memory ---------------------------------------------------------------------------


class Binding:
    """A plan with an array for every value; `operations` replay it.

    persistent: the arrays of inputs, outputs and constants by value index. draws: the inputs that
    are drawn. fast: run chains and norms as compiled loops. scratch: the memory of all other
    values, the arena's when bound.
    own: the calls that the array library makes in a way of its own. graph, graph_error: see
    `npdrt.program.cuda`; None on the CPU.
    """

    own = NUMPY
    graph: Any = None
    graph_error: Exception | None = None

    def __init__(
        self,
        values: list[Value],
        plan: Plan,
        persistent: dict[int, Array],
        draws: dict[int, Draw],
        memory: Arena,
        fast: bool = False,
    ):
        self.values, self.plan, self.memory, self.fast = values, plan, memory, fast
        self.draws = draws
        if fast and self.own is NUMPY:
            self.own = COMPILED
        self.arrays = dict(persistent)
        self._placed: dict[tuple[Any, ...], Array] = {}
        self._reserve()
        for i, offset in plan.scratch.items():
            self.arrays[i] = self._at(i, offset)
        for c in plan.constants:
            call = plan.calls[c]
            self.arrays[call.result] = memory.new(values[call.result])
            run(self.single(call))
        self.operations = [o for batch in plan.batches for o in self._batch(batch)]

    @property
    def nodes(self) -> int | None:
        """The nodes of the CUDA graph; on the CPU None."""
        return None

    def draw(self, streams: dict[int, Any]) -> None:
        """Before a replay: the inputs that are drawn, from streams (`Random`) by value index."""
        for i, stream in streams.items():
            draw = self.draws[i]
            drawn = getattr(stream, draw.method)(*draw.args, **draw.settings)
            self.memory.put(self.arrays[i], drawn)

    def run(self) -> None:
        """Replay."""
        run(self.operations)

    # --- arrays --------------------------------------------------------------------------

    def _reserve(self) -> None:
        """Scratch memory of the plan, and after it the blocks of chains."""
        size = self.plan.chain_blocks * BLOCK * 8  # a block serves values of any dtype
        self.memory.reserve(self.plan.scratch_bytes + size)
        self.scratch = self.memory.scratch
        self.blocks = self.scratch[self.plan.scratch_bytes :][:size]
        self.norm = Norm()

    def _at(self, i: int, offset: int) -> Array:
        """A value in scratch memory; the same object as another of its form in that place."""
        value = self.values[i]
        key = (offset, value.shape, value.dtype, value.strides)
        if key not in self._placed:
            self._placed[key] = self.memory.view(self.scratch, value, offset)
        return self._placed[key]

    def array(self, index: int) -> Array:
        """The array of a value; a view is made of its owner's memory."""
        if index not in self.arrays:
            value = self.values[index]
            assert value.base is not None
            self.arrays[index] = self.memory.view(self.arrays[value.base], value, value.offset)
        return self.arrays[index]

    def _filled(self, item: Any) -> Any:
        """An argument with its arrays."""
        if isinstance(item, Ref):
            return self.array(item.index)
        return tuple(map(self._filled, item)) if isinstance(item, tuple) else item

    # --- one call ------------------------------------------------------------------------

    def single(self, call: Call) -> list[Operation]:
        """The library's calls of one call, on whole arrays."""
        args, out = self._filled(call.args), self.array(call.result)
        if call.function == "norm":
            return self._norm(args[0], out)
        return operations(self.memory.xp, call, args, out, self.own)

    def _norm(self, x: Array, out: Array) -> list[Operation]:
        x = x.reshape(-1)
        compiled = self.fast and x.dtype != "float16"  # numba has no float16
        return [fused.norm(x, out) if compiled else (self.norm, (x, out), {})]

    # --- chains --------------------------------------------------------------------------

    def _batch(self, batch: Batch) -> list[Operation]:
        """The calls of a batch, one group after another."""
        return [operation for group in batch for operation in self._group(group)]

    def _group(self, group: Group) -> list[Operation]:
        calls = [self.plan.calls[c] for c in group.calls]
        if not group.chain:
            return self.single(calls[0])
        return self._chain(calls, dict(group.chain_blocks))

    def _chain(self, calls: list[Call], blocks: dict[int, int]) -> list[Operation]:
        """The calls of a chain as one compiled loop, or as NumPy calls on every block in turn."""
        if self.fast and len(calls) > 1 and all(fused.can_fuse(c, self.values) for c in calls):
            kept = [call.result for call in calls if call.result not in blocks]
            return [fused.chain(calls, self.values, kept, self.array)]
        size = self.values[calls[0].result].size
        return [
            operation
            for start in range(0, size, BLOCK)
            for operation in self._block(calls, blocks, slice(start, min(start + BLOCK, size)))
        ]

    def _block(self, calls: list[Call], blocks: dict[int, int], part: slice) -> list[Operation]:
        """The calls on elements `part` of the flat arrays: slices of them, and block buffers."""

        def cut(item: Any) -> Any:
            if not isinstance(item, Ref):
                return item
            value = self.values[item.index]
            if item.index in blocks:
                start = blocks[item.index] * BLOCK * 8
                block = self.blocks[start : start + BLOCK * 8].view(value.dtype)
                return block[: part.stop - part.start]
            array = self.array(item.index)
            return array.reshape(-1)[part] if value.shape != () else array

        return [
            operation
            for call in calls
            for operation in operations(
                np, call, tuple(map(cut, call.args)), cut(Ref(call.result)), self.own
            )
        ]


class Norm:
    """`npdrt.optim.norm` of a flat array into a 0-d one, with the same bits and no allocation.

    The same additions in the same order (docs/updates.md): squares in float64 by chunks, rows of
    256 lanes added in order, chunks in order, lanes folded in halves.
    """

    def __init__(self) -> None:
        self.wide = np.empty(CHUNK)
        self.lanes, self.chunk = np.empty(LANES), np.empty(LANES)

    def __call__(self, x: Array, out: Array) -> None:
        self._add_rows(x[:CHUNK], self.lanes)
        for start in range(CHUNK, x.size, CHUNK):
            self._add_rows(x[start : start + CHUNK], self.chunk)
            np.add(self.lanes, self.chunk, out=self.lanes)
        half = LANES // 2
        while half:
            np.add(self.lanes[:half], self.lanes[half : 2 * half], out=self.lanes[:half])
            half //= 2
        np.sqrt(self.lanes[0], out=out)

    def _add_rows(self, part: Array, lanes: Array) -> None:
        """The 256 sums of squares of one chunk, zeros filling its last row."""
        size = max(LANES, -(-part.size // LANES) * LANES)
        wide = self.wide[:size]
        wide[part.size :] = 0.0
        squares = wide[: part.size]
        np.copyto(squares, part)
        np.multiply(squares, squares, out=squares)
        np.add.reduce(wide.reshape(-1, LANES), axis=0, out=lanes)  # (rows, LANES) -> (LANES,)
