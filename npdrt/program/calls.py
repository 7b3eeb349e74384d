"""The parts of a program: values, and calls of array functions on them.

A call names a function of the array API standard as NumPy spells it (`add`, `matmul`, `where`),
or one that has no name there: `getitem` (x[index]), `assign` (a copy of x with x[index]
replaced), `norm` (`npdrt.optim.norm`), `exact_matmul` (`npdrt.exact.matmul`), `portable_exp` and
its like (`npdrt.compute`), and the three products of a convolution, `convolve`,
`convolve_input` and `convolve_weight` (`npdrt.ops.convolution`); in a program recorded for a GPU
also the kernels of `npdrt.ops.rows`. `KINDS` says how each is planned.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from npdrt.kernels import KERNELS
from npdrt.program.tree import Leaf

# Only + - * / sqrt, comparisons and selections: the same bits on every machine, also when fused.
EXACT = (
    *("add", "subtract", "multiply", "divide", "negative", "sqrt", "abs", "sign"),
    *("maximum", "minimum", "clip", "where", "astype", "isfinite"),
    *("equal", "not_equal", "less", "less_equal", "greater", "greater_equal"),
    *("bitwise_and", "bitwise_or", "bitwise_xor", "bitwise_invert"),
)
# Also elementwise, but each is a call of its own: its bits are those of the array library.
ROUNDED = (
    *("exp", "expm1", "log", "log1p", "tanh", "sin", "cos", "power", "remainder"),
    *("floor_divide", "reciprocal", "square", "floor", "ceil", "round"),
)
# Portable arithmetic (`npdrt.compute`): functions of `npdrt.elementary`, and its sum.
PORTABLE = tuple(
    f"portable_{name}" for name in ("exp", "expm1", "log", "log1p", "tanh", "sin", "cos")
)
REDUCTIONS = ("sum", "prod", "max", "min", "all", "any", "argmax", "argmin", "norm", "portable_sum")
VIEWS = ("reshape", "permute_dims", "matrix_transpose", "getitem", "broadcast_to", "expand_dims")
CREATIONS = ("zeros", "ones", "full", "arange")
PRODUCTS = ("matmul", "exact_matmul")
CONVOLUTIONS = ("convolve", "convolve_input", "convolve_weight")
ROWS = tuple(name for name in KERNELS if name not in CONVOLUTIONS)
MOVES = ("copy", "assign", "concat", "stack", "take", "argsort", "sort", "searchsorted")

KINDS: dict[str, str] = {
    **dict.fromkeys((*EXACT, *ROUNDED, *PORTABLE), "elementwise"),
    **dict.fromkeys(REDUCTIONS, "reduction"),
    **dict.fromkeys(VIEWS, "view"),
    **dict.fromkeys(CREATIONS, "creation"),
    **dict.fromkeys(MOVES, "move"),
    **dict.fromkeys(PRODUCTS, "product"),
    **dict.fromkeys(CONVOLUTIONS, "convolution"),
    **dict.fromkeys(ROWS, "rows"),
}

# These may write over an argument: each element of the result depends on that element alone, and
# NumPy makes one pass. (`where` takes several.)
IN_PLACE = (
    *("add", "subtract", "multiply", "divide", "negative", "sqrt", "abs", "maximum", "minimum"),
    *("exp", "log", "log1p", "tanh", "power", "square", "clip"),
)


@dataclass(frozen=True, slots=True)
class Ref(Leaf):
    """A value of the program, by its index, as an argument of a call."""

    index: int


class Fixed(NamedTuple):
    """A leaf of the arguments that is part of the program: it must be the same in every call."""

    value: Any


class Stream(NamedTuple):
    """A `Random` among the arguments."""

    path: tuple[str, ...]


class Draw(NamedTuple):
    """An input that is drawn: `stream`, narrowed by the (method, argument) pairs of `lineage`,
    then `method(*args, **settings)`."""

    stream: Stream
    lineage: tuple[tuple[str, Any], ...]
    method: str
    args: tuple[Any, ...]
    settings: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Value:
    """An array of a program.

    shape, dtype, strides (bytes): its form. base, offset: the value whose memory it shows, and
    how many bytes into it, for a view; None for an array of its own. name: "" if nothing named it.
    origin: "call", "input", "random" or "constant".
    """

    shape: tuple[int, ...]
    dtype: str
    strides: tuple[int, ...]
    base: int | None = None
    offset: int = 0
    name: str = ""
    origin: str = "call"

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The bytes of its elements."""
        return self.size * np.dtype(self.dtype).itemsize

    @property
    def extent(self) -> tuple[int, int]:
        """Where its lowest byte lies, from its first element on, and how many bytes it spans."""
        if self.size == 0:
            return 0, 0
        steps = [(n - 1) * stride for n, stride in zip(self.shape, self.strides, strict=True)]
        low = sum(min(step, 0) for step in steps)
        return low, sum(map(abs, steps)) + np.dtype(self.dtype).itemsize

    @property
    def contiguous(self) -> bool:
        """Whether its elements lie in C order without gaps."""
        ordered = zip(self.shape, self.strides, c_strides(self.shape, self.dtype), strict=True)
        return self.size == 0 or all(n == 1 or stride == c for n, stride, c in ordered)


@dataclass(frozen=True, slots=True)
class Call:
    """One call: `values[result] = function(*args, **settings)`.

    args: `Ref`, a number, a shape, or a tuple of these. phase: forward, backward, update, or what
    the step named it. source: the line that asked for it, "npdrt/ops/linear.py:47".
    """

    function: str
    args: tuple[Any, ...]
    result: int
    settings: dict[str, Any] = field(default_factory=dict)
    phase: str = "forward"
    source: str = ""

    @property
    def kind(self) -> str:
        """How it is planned: elementwise, reduction, product, convolution, rows, move, view,
        creation."""
        return KINDS[self.function]

    @property
    def refs(self) -> tuple[int, ...]:
        """The indices of the values it reads."""
        return tuple(_refs(self.args))


def _refs(item: Any) -> list[int]:
    if isinstance(item, Ref):
        return [item.index]
    if isinstance(item, tuple | list):
        return [index for part in item for index in _refs(part)]
    return []


def c_strides(shape: tuple[int, ...], dtype: str) -> tuple[int, ...]:
    """The strides (bytes) of a C-ordered array; those of length-1 axes as NumPy has them."""
    strides, step = [], np.dtype(dtype).itemsize
    for n in reversed(shape):
        strides.append(step)
        step *= max(n, 1)
    return tuple(reversed(strides))


def flops(call: Call, values: list[Value]) -> int:
    """Floating-point operations of a call: 2MNK for a product, and for each of a convolution as one
    product; 2n for a norm, one an element of an elementwise call, a reduction or a kernel of rows;
    none for views, moves, casts and creations."""
    result = values[call.result]
    if call.kind == "product":
        return 2 * result.size * values[call.refs[0]].shape[-1]
    if call.kind == "convolution":
        sizes = {"x": values[call.refs[0]], "w": values[call.refs[1]], "y": result}
        return _convolution_flops(call.function, **sizes)
    if call.function == "norm":
        return 2 * values[call.refs[0]].size
    if call.kind in ("reduction", "rows"):
        return max(values[i].size for i in call.refs)
    if call.kind == "elementwise" and call.function not in ("astype", "where"):
        return result.size
    return 0


def _convolution_flops(function: str, x: Value, w: Value, y: Value) -> int:
    """2 O N oh ow (C / groups) kh kw, of the two arguments and the result."""
    if function == "convolve_input":
        y = x
    elif function == "convolve_weight":
        y, w = x, y
    return 2 * y.size * w.size // max(w.shape[0], 1)


def traffic(call: Call, values: list[Value]) -> int:
    """Bytes that a call reads and writes, each argument and the result once; 0 for a view."""
    if call.kind == "view":
        return 0
    return values[call.result].nbytes + sum(values[i].nbytes for i in set(call.refs))
