"""The form of a call's result - shape, dtype, memory layout - without computing it.

A view is taken on a stand-in: an array of the right form over memory that is never read. Dtype
and layout of everything else come from NumPy itself, run on arrays of at most two elements a
side; the shape follows from the arguments' shapes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from npdrt.errors import Error
from npdrt.kernels import KERNELS
from npdrt.program.calls import KINDS, PRODUCTS, Ref, Value, c_strides

_ORIGIN = np.zeros(16, dtype=np.uint8)  # stand-ins point to it, and nobody reads it through them


@dataclass(frozen=True, slots=True)
class Form:
    """Shape, dtype and strides (bytes); base is True and offset (bytes) set for a view."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    strides: tuple[int, ...]
    base: bool | None = None
    offset: int = 0

    @property
    def ndim(self) -> int:
        """The number of dimensions."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)


def empty(shape: tuple[int, ...], dtype: Any) -> Form:
    """A C-ordered array of its own."""
    dtype = np.dtype(dtype)
    return Form(tuple(shape), dtype, c_strides(tuple(shape), dtype.name))


def order(strides: tuple[int, ...]) -> tuple[int, ...]:
    """The axes from the longest stride to the shortest."""
    return tuple(sorted(range(len(strides)), key=lambda i: (-abs(strides[i]), i)))


def basic_index(index: Any) -> tuple[Any, ...]:
    """An index as a tuple of ints, slices, None and `...`; index arrays are refused."""
    items = index if isinstance(index, tuple) else (index,)
    if not all(i is None or i is ... or type(i) in (int, slice) for i in items):
        raise Error(
            f"basic indices only while a step is recorded; got {type(index).__name__}; use take "
            "for indices and where for masks"
        )
    return items if ... in items else (*items, ...)


def with_forms(item: Any, forms: list[Form]) -> Any:
    """`item` with every `Ref` replaced by the form it names."""
    if isinstance(item, Ref):
        return forms[item.index]
    return tuple(with_forms(part, forms) for part in item) if isinstance(item, tuple) else item


def place(values: list[Value], args: tuple[Any, ...], form: Form) -> tuple[int | None, int]:
    """The value that owns the memory of a call's result, and the offset in it: for a view."""
    if form.base is None:
        return None, 0
    viewed = values[args[0].index]
    return (args[0].index if viewed.base is None else viewed.base), viewed.offset + form.offset


def result(function: str, args: tuple[Any, ...], settings: dict[str, Any]) -> Form:
    """The form of `function(*args, **settings)`; raises `Error` if NumPy would."""
    kind = KINDS[function]
    try:
        if kind == "view":
            return _view(function, args, settings)
        if kind == "creation":
            return _created(function, args, settings)
        if kind == "elementwise":
            return _elementwise(function, args, settings)
        return _SPECIAL.get(function, _reduction)(function, args, settings)
    except (ValueError, TypeError, IndexError) as error:
        shapes = ", ".join(str(a.shape) if isinstance(a, Form) else repr(a) for a in args)
        raise Error(f"{function}({shapes}): {error}") from error


def _numpy(function: str) -> Any:
    return getattr(np, function.removeprefix("portable_"))


def _created(function: str, args: tuple[Any, ...], settings: dict[str, Any]) -> Form:
    if function == "arange":
        made = np.arange(*args, **settings)
        return empty(made.shape, made.dtype)
    shape = args[0] if isinstance(args[0], tuple) else (args[0],)
    return empty(shape, _numpy(function)((), *map(_tiny, args[1:]), **settings).dtype)


# --- views ----------------------------------------------------------------------------------


def _view(function: str, args: tuple[Any, ...], settings: dict[str, Any]) -> Form:
    stand_in = _stand_in(args[0])
    if function == "getitem":
        seen = stand_in[tuple(args[1])]
    elif function == "reshape":
        try:
            seen = np.reshape(stand_in, *args[1:], copy=False, **settings)
        except ValueError:
            math.prod(np.reshape(np.empty(args[0].shape, np.bool), args[1]).shape)  # or raise
            return Form(args[0].shape, args[0].dtype, args[0].strides)  # needs a copy first
    else:
        seen = _numpy(function)(stand_in, *args[1:], **settings)
    return Form(seen.shape, seen.dtype, seen.strides, True, _address(seen) - _address(stand_in))


def _stand_in(form: Form) -> np.ndarray[Any, Any]:
    start = np.frombuffer(_ORIGIN, form.dtype, 1)
    return np.lib.stride_tricks.as_strided(start, form.shape, form.strides)


def _address(x: np.ndarray[Any, Any]) -> int:
    return int(x.__array_interface__["data"][0])


# --- everything else ------------------------------------------------------------------------


def _tiny(x: Any) -> Any:
    """An array of at most two elements a side with the order of axes of `x`, or `x` itself."""
    if isinstance(x, tuple):
        return tuple(map(_tiny, x))
    if not isinstance(x, Form):
        return x
    axes = order(x.strides)
    shape = [min(x.shape[i], 2) for i in axes]
    small = np.ones(shape, x.dtype).transpose(np.argsort(axes)) if axes else np.ones((), x.dtype)
    repeated = [i for i in range(x.ndim) if x.strides[i] == 0 and x.shape[i] > 1]
    first = tuple(slice(0, 1) if i in repeated else slice(None) for i in range(x.ndim))
    return np.broadcast_to(small[first], small.shape) if repeated else small


def _laid_out(small: Any, shape: tuple[int, ...]) -> Form:
    """A new array of `shape` with dtype and order of axes of `small`."""
    small = np.asarray(small)
    strides, step = [0] * small.ndim, small.dtype.itemsize
    for i in reversed(order(small.strides)):
        strides[i] = step
        step *= max(shape[i], 1)
    return Form(tuple(shape), small.dtype, tuple(strides))


def _elementwise(function: str, args: tuple[Any, ...], settings: dict[str, Any]) -> Form:
    shape = np.broadcast_shapes(*(a.shape for a in args if isinstance(a, Form)))
    if function == "where" and isinstance(args[0], Form) and args[0].dtype != np.bool:
        raise TypeError(f"expected a boolean condition; got {args[0].dtype}")
    with np.errstate(all="ignore"):
        return _laid_out(_numpy(function)(*map(_tiny, args), **settings), shape)


def _reduction(function: str, args: tuple[Any, ...], settings: dict[str, Any]) -> Form:
    x, axis = args[0], settings.get("axis", args[1] if len(args) > 1 else None)
    small = _numpy(function)(_tiny(x), *args[1:], **settings)
    named = range(x.ndim) if axis is None else axis if isinstance(axis, tuple) else (axis,)
    axes = {a % x.ndim for a in named}
    if settings.get("keepdims"):
        return _laid_out(small, tuple(1 if i in axes else n for i, n in enumerate(x.shape)))
    return _laid_out(small, tuple(n for i, n in enumerate(x.shape) if i not in axes))


def _norm(function: str, args: tuple[Any, ...], settings: dict[str, Any]) -> Form:
    if args[0].dtype.kind != "f":
        raise TypeError(f"expected a real floating-point array; got {args[0].dtype}")
    return empty((), np.float64)


def _matmul(function: str, args: tuple[Any, ...], settings: dict[str, Any]) -> Form:
    a, b = args
    if a.ndim < 2 or b.ndim < 2 or a.shape[-1] != b.shape[-2]:
        raise ValueError("expected (..., M, K) and (..., K, N)")
    if function == "exact_matmul" and {a.dtype.name, b.dtype.name} != {"float32"}:
        raise ValueError("expected two arrays of float32")
    stack = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    return empty((*stack, a.shape[-2], b.shape[-1]), np.result_type(a.dtype, b.dtype))


def _of_kernel(function: str, args: tuple[Any, ...], settings: dict[str, Any]) -> Form:
    """What a kernel fills: the dtype is that of all floating arguments."""
    kinds = {a.dtype for a in args if a.dtype.kind not in "iu"}
    if len(kinds) != 1 or args[0].dtype not in kinds:
        raise ValueError("expected arrays of one dtype")
    return empty(KERNELS[function].shape(*args, **settings), args[0].dtype)


def _joined(function: str, args: tuple[Any, ...], settings: dict[str, Any]) -> Form:
    parts, axis = args[0], settings.get("axis", 0)
    small = _numpy(function)(_tiny(parts), axis=axis)
    axis %= small.ndim
    shape = list(parts[0].shape)
    if function == "stack":
        return _laid_out(small, (*shape[:axis], len(parts), *shape[axis:]))
    shape[axis] = sum(p.shape[axis] for p in parts)
    for p in parts:
        if any(n != m for i, (n, m) in enumerate(zip(p.shape, shape, strict=True)) if i != axis):
            raise ValueError("the shapes differ on other axes than the joined one")
    return _laid_out(small, tuple(shape))


def _take(function: str, args: tuple[Any, ...], settings: dict[str, Any]) -> Form:
    x, indices = args[:2]
    axis = settings.get("axis", args[2] if len(args) > 2 else None)
    if axis is None:
        if x.ndim != 1:
            raise ValueError("take needs an axis if x has several")
        axis = 0
    return empty((*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]), x.dtype)


def _copied(function: str, args: tuple[Any, ...], settings: dict[str, Any]) -> Form:
    return empty(args[0].shape, args[0].dtype)


def _assigned(function: str, args: tuple[Any, ...], settings: dict[str, Any]) -> Form:
    x, index, value = args
    np.broadcast_to(np.empty(getattr(value, "shape", ()), np.bool), _stand_in(x)[index].shape)
    return _laid_out(_tiny(x), x.shape)


def _sorted(function: str, args: tuple[Any, ...], settings: dict[str, Any]) -> Form:
    return _laid_out(_numpy(function)(_tiny(args[0]), **settings), args[0].shape)


def _places(function: str, args: tuple[Any, ...], settings: dict[str, Any]) -> Form:
    return empty(getattr(args[1], "shape", ()), np.intp)


_SPECIAL = {
    "norm": _norm,
    **dict.fromkeys(PRODUCTS, _matmul),
    **dict.fromkeys(KERNELS, _of_kernel),
    "concat": _joined,
    "stack": _joined,
    "take": _take,
    "copy": _copied,
    "assign": _assigned,
    "sort": _sorted,
    "argsort": _sorted,
    "searchsorted": _places,
}
