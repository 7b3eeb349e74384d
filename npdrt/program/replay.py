"""Replaying a program on the CPU: the plan bound to memory, as a list of NumPy calls.

Binding makes every array once: a view into the scratch memory, a home of an input or output, a
constant, a block of a chain. A replay is then a loop over `function(*args, **settings)`, and no
call of it allocates an array.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from npdrt.ops import blocked
from npdrt.optim.norm import CHUNK, LANES
from npdrt.program import fused
from npdrt.program.calls import CONVOLUTIONS, Call, Ref, Value
from npdrt.program.plan import Group, Plan

if TYPE_CHECKING:
    from npdrt.program.memory import Memory

Array = Any
Operation = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]
BLOCK = 1 << 17  # elements of a chain's block; smaller ones cost more calls than they save


class Binding:
    """A plan with an array for every value; `operations` replay it.

    lasting: the arrays of inputs, outputs and constants by value index. fast: run chains and
    norms as compiled loops.
    """

    def __init__(
        self,
        values: list[Value],
        plan: Plan,
        lasting: dict[int, Array],
        memory: Memory,
        fast: bool = False,
    ):
        self.values, self.plan, self.fast = values, plan, fast
        self.arrays = dict(lasting)
        blocks = plan.slots * BLOCK * 8
        memory.reserve(plan.scratch_bytes + blocks)
        for i, offset in plan.scratch.items():
            self.arrays[i] = memory.seen(memory.scratch, values[i], offset)
        self.scratch = memory.scratch
        self.blocks = memory.scratch[plan.scratch_bytes : plan.scratch_bytes + blocks]
        self.norm = Norm()
        for c in plan.constants:
            call = plan.calls[c]
            self.arrays[call.result] = memory.made(values[call.result])
            for operation in self.single(call):
                run([operation])
        self.operations = [o for group in plan.groups for o in self._group(group)]

    def run(self) -> None:
        """Replay."""
        run(self.operations)

    def _group(self, group: Group) -> list[Operation]:
        if not group.chain:
            return self.single(self.plan.calls[group.calls[0]])
        return self._chain(group)

    # --- arrays --------------------------------------------------------------------------

    def array(self, index: int) -> Array:
        """The array of a value; a view is made of its owner's memory."""
        if index not in self.arrays:
            value = self.values[index]
            assert value.base is not None
            self.arrays[index] = _view(self.arrays[value.base], value)
        return self.arrays[index]

    def _filled(self, item: Any) -> Any:
        """An argument with its arrays."""
        if isinstance(item, Ref):
            return self.array(item.index)
        return tuple(map(self._filled, item)) if isinstance(item, tuple) else item

    # --- one call ------------------------------------------------------------------------

    def single(self, call: Call) -> list[Operation]:
        """The NumPy calls of one call, on whole arrays."""
        args = tuple(map(self._filled, call.args))
        if call.function == "norm":
            flat, out = args[0].reshape(-1), self.array(call.result)
            compiled = self.fast and flat.dtype != "float16"  # which numba has not
            return [fused.norm(flat, out) if compiled else (self.norm, (flat, out), {})]
        return operations(call, args, self.array(call.result))

    # --- chains --------------------------------------------------------------------------

    def _chain(self, group: Group) -> list[Operation]:
        """The calls of a chain on every block in turn."""
        calls, slots = [self.plan.calls[c] for c in group.calls], dict(group.slots)
        if self.fast and len(calls) > 1 and all(fused.can_fuse(c, self.values) for c in calls):
            kept = [call.result for call in calls if call.result not in slots]
            return [fused.chain(calls, self.values, kept, self.array)]
        size = self.values[calls[0].result].size
        return [
            operation
            for start in range(0, size, BLOCK)
            for operation in self._block(calls, slots, slice(start, min(start + BLOCK, size)))
        ]

    def _block(self, calls: list[Call], slots: dict[int, int], part: slice) -> list[Operation]:
        def cut(item: Any) -> Any:
            if not isinstance(item, Ref):
                return item
            value = self.values[item.index]
            if item.index in slots:
                start = slots[item.index] * BLOCK * 8
                whole = self.blocks[start : start + BLOCK * 8].view(value.dtype)
                return whole[: part.stop - part.start]
            array = self.array(item.index)
            return array.reshape(-1)[part] if value.shape != () else array

        return [
            operation
            for call in calls
            for operation in operations(call, tuple(map(cut, call.args)), cut(Ref(call.result)))
        ]


def run(operations: list[Operation]) -> None:
    """Make the calls."""
    for function, args, settings in operations:
        function(*args, **settings)


# --- the memory of a value --------------------------------------------------------------------


def _view(owner: Array, value: Value) -> Array:
    flat = owner.ravel(order="K").view(np.uint8) if owner.size else np.empty(1, np.uint8)
    return np.ndarray(value.shape, value.dtype, flat.data, value.offset, value.strides)


# --- one call as NumPy makes it without allocating --------------------------------------------

_UFUNCS = {"abs": np.absolute, "bitwise_invert": np.invert, "round": np.rint}
_REDUCERS: dict[str, Any] = {
    "sum": np.add.reduce,
    "prod": np.multiply.reduce,
    "max": np.maximum.reduce,
    "min": np.minimum.reduce,
    "all": np.logical_and.reduce,
    "any": np.logical_or.reduce,
}


def operations(call: Call, args: tuple[Any, ...], out: Array) -> list[Operation]:
    """The NumPy calls, writing into `out`, that give the bits of `call` on these arguments."""
    special = _SPECIAL.get(call.function)
    if special:
        return special(call, args, out)
    if call.function in _REDUCERS:
        return [_reduce(call, args, out)]
    function = _UFUNCS.get(call.function) or getattr(np, call.function)
    return [(function, args, {"out": out})]


def _reduce(call: Call, args: tuple[Any, ...], out: Array) -> Operation:
    settings = {"axis": None, **call.settings, "out": out}
    if call.function in ("sum", "prod"):
        settings["dtype"] = out.dtype
    if len(args) > 1:
        settings["axis"] = args[1]
    return _REDUCERS[call.function], args[:1], settings


def _copy(call: Call, args: tuple[Any, ...], out: Array) -> list[Operation]:
    return [(np.copyto, (out, args[0]), {"casting": "unsafe"})]


def _where(call: Call, args: tuple[Any, ...], out: Array) -> list[Operation]:
    condition, a, b = args
    if not all(_same_bits(array, out) for array in (a, b)):
        return [(np.copyto, (out, b), {}), (np.copyto, (out, a), {"where": condition})]
    # b ^ (a ^ b) c on the bits: no branch, where a copy with a mask without order takes ten times
    # as long
    whole = f"i{out.itemsize}"
    x, y, z, c = a.view(whole), b.view(whole), out.view(whole), condition.view(np.int8)
    steps = (np.bitwise_xor, (x, y)), (np.multiply, (z, c)), (np.bitwise_xor, (z, y))
    return [(function, both, {"out": z}) for function, both in steps]


def _same_bits(array: Any, out: Array) -> bool:
    """Whether it is an array of the result's dtype, of a size that whole numbers have too."""
    return hasattr(array, "dtype") and bool(array.dtype == out.dtype) and out.itemsize <= 8


def _arg(call: Call, args: tuple[Any, ...], out: Array) -> list[Operation]:
    return [(getattr(np, call.function), args, {**call.settings, "out": out})]


def _assign(call: Call, args: tuple[Any, ...], out: Array) -> list[Operation]:
    base, index, value = args
    copied: list[Operation] = (
        [] if np.may_share_memory(base, out) else [(np.copyto, (out, base), {})]
    )
    return [*copied, (np.copyto, (out[index], value), {})]


def _create(call: Call, args: tuple[Any, ...], out: Array) -> list[Operation]:
    if call.function == "arange":
        return [(np.copyto, (out, np.arange(*args, **call.settings)), {})]
    value = {"zeros": 0, "ones": 1}.get(call.function)
    return [(out.fill, (args[1] if value is None else value,), {})]


def _join(call: Call, args: tuple[Any, ...], out: Array) -> list[Operation]:
    function = np.concatenate if call.function == "concat" else np.stack
    return [(function, args, {**call.settings, "out": out})]


def _convolve(call: Call, args: tuple[Any, ...], out: Array) -> list[Operation]:
    return [(getattr(blocked, call.function), (*args, out), dict(call.settings))]


def _take(call: Call, args: tuple[Any, ...], out: Array) -> list[Operation]:
    # The default mode checks the indices and allocates; they are checked where data enters.
    x, indices, *axis = args
    settings = {"axis": axis[0] if axis else None, **call.settings, "mode": "wrap"}
    return [(np.take, (x, indices), {**settings, "out": out})]


def _sort(call: Call, args: tuple[Any, ...], out: Array) -> list[Operation]:
    return [(np.copyto, (out, args[0]), {}), (out.sort, (), dict(call.settings))]


def _allocating(call: Call, args: tuple[Any, ...], out: Array) -> list[Operation]:
    """A NumPy function that has no `out`: its result is copied."""
    function = getattr(np, call.function)

    def into(*args: Any) -> None:
        np.copyto(out, function(*args, **call.settings))

    return [(into, args, {})]


_SPECIAL: dict[str, Callable[[Call, tuple[Any, ...], Array], list[Operation]]] = {
    "astype": _copy,
    "copy": _copy,
    "where": _where,
    "argmax": _arg,
    "argmin": _arg,
    "assign": _assign,
    "zeros": _create,
    "ones": _create,
    "full": _create,
    "arange": _create,
    **dict.fromkeys(CONVOLUTIONS, _convolve),
    "concat": _join,
    "stack": _join,
    "take": _take,
    "sort": _sort,
    "argsort": _allocating,
    "searchsorted": _allocating,
}


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
        np.add.reduce(wide.reshape(-1, LANES), axis=0, out=lanes)
