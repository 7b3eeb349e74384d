"""The array libraries the tests run on, and a double of CuPy that needs no GPU.

`BACKENDS` maps a name to a `Backend`: the module `xp`, `asarray` from a host array, `to_host` back.

The double is NumPy behind the manners of CuPy. An array of it refuses every implicit way to the
host (float, bool, int, iteration, `np.asarray`, NumPy functions) and every operation with a NumPy
array or a list; `.get()` is the one way out, and `synchronisations` counts its uses and those of
operations that make a GPU wait. Reductions give 0-d arrays, indices out of range wrap silently,
and nothing warns.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from npdrt import arrays

synchronisations = 0  # how often the host has waited for the double

_TO_HOST = (
    *("__array__", "__bool__", "__complex__", "__float__", "__index__", "__int__", "__iter__"),
    *("__len__", "__array_function__", "__array_ufunc__", "item", "tobytes", "tolist"),
)
_UNARY = ("abs", "invert", "neg", "pos")
_BINARY = (
    *("add", "and", "floordiv", "lshift", "matmul", "mod", "mul", "or", "pow", "rshift", "sub"),
    *("truediv", "xor"),
)
_COMPARISONS = ("eq", "ge", "gt", "le", "lt", "ne")
_SHAPED_BY_DATA = {"nonzero", "unique", "unique_values", "flatnonzero", "argwhere", "extract"}


class DoubleArray:
    """An array "on the device": a NumPy array that only the double's own functions may read."""

    def __init__(self, host: Any) -> None:
        self.__dict__["_host"] = np.asarray(host)

    def __array_namespace__(self, api_version: str | None = None) -> ModuleType:
        return cupy_double

    def get(self) -> np.ndarray[Any, Any]:
        """A copy on the host."""
        _count_synchronisation()
        return self._host.copy()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("ctypes", "data", "flat"):
            raise AttributeError(f"cupy_double.ndarray has no attribute {name!r}")
        value = getattr(self._host, name)
        return _on_device(value, name) if callable(value) else _wrap(value)

    def __getitem__(self, index: Any) -> DoubleArray:
        return _wrap(self._host[_index(index, self.shape)])

    def __setitem__(self, index: Any, value: Any) -> None:
        self._host[_index(index, self.shape)] = _unwrap(value)

    def __repr__(self) -> str:
        return f"cupy_double.ndarray(shape={self.shape}, dtype={self.dtype})"

    __hash__ = None  # type: ignore[assignment]


def _count_synchronisation() -> None:
    global synchronisations
    synchronisations += 1


def _wrap(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        return DoubleArray(value)
    return type(value)(map(_wrap, value)) if type(value) in (tuple, list) else value


def _unwrap(value: Any) -> Any:
    if isinstance(value, DoubleArray):
        return value._host
    if isinstance(value, np.ndarray):
        raise TypeError("cupy_double: a NumPy array in an operation on the device; upload it first")
    return type(value)(map(_unwrap, value)) if type(value) in (tuple, list) else value


def _index(index: Any, shape: tuple[int, ...]) -> Any:
    """The host index: integer arrays wrap around, boolean arrays make the GPU wait."""
    items = index if isinstance(index, tuple) else (index,)
    if any(isinstance(i, DoubleArray) and i.dtype == bool for i in items):
        _count_synchronisation()
    elif any(isinstance(i, DoubleArray) for i in items):
        items = tuple(
            i._host % n if isinstance(i, DoubleArray) else i
            for i, n in zip(items, shape, strict=False)
        )
    return tuple(map(_unwrap, items)) if isinstance(index, tuple) else _unwrap(items[0])


def _on_device(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """A NumPy function (or method) that takes and gives arrays of the double."""
    elementwise = isinstance(function, np.ufunc) or name in ("where", "clip")

    @wraps(function, updated=())
    def on_device(*args: Any, **settings: Any) -> Any:
        if elementwise and any(isinstance(a, list | tuple) for a in args):
            raise TypeError(f"cupy_double.{name}: a list or tuple in an operation on arrays")
        if name in _SHAPED_BY_DATA or (name == "where" and len(args) == 1):
            _count_synchronisation()
        if name == "take":
            settings = {"mode": "wrap", **settings}
        upload = name in ("array", "asarray") and isinstance(args[0], np.ndarray)
        args = (args[0].copy(), *args[1:]) if upload else tuple(map(_unwrap, args))
        with np.errstate(all="ignore"):
            return _wrap(function(*args, **{k: _unwrap(v) for k, v in settings.items()}))

    return on_device


def _refusal(name: str) -> Callable[..., Any]:
    def refuse(self: DoubleArray, *args: Any, **settings: Any) -> Any:
        raise TypeError(f"cupy_double: implicit conversion to the host by {name}; use .get()")

    return refuse


def _operator(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    def operate(*operands: Any) -> Any:
        if any(getattr(x, "__array_ufunc__", 0) is None for x in operands):
            return NotImplemented  # as CuPy does for a type that opts out, such as Tensor
        if any(isinstance(x, np.ndarray | list | tuple) for x in operands):
            raise TypeError(f"cupy_double: {name} of a device array and host data")
        return _on_device(function, name)(*operands)

    return operate


def _in_place(function: Callable[..., Any]) -> Callable[..., Any]:
    def operate(self: DoubleArray, other: Any) -> DoubleArray:
        function(self._host, _unwrap(other))
        return self

    return operate


def _reversed(operate: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, other: operate(other, self)


for _name in _TO_HOST:
    setattr(DoubleArray, _name, _refusal(_name))
for _name in (*_UNARY, *_BINARY, *_COMPARISONS):
    _function = getattr(operator, f"__{_name}__")
    setattr(DoubleArray, f"__{_name}__", _operator(_function, _name))
    if _name in _BINARY:
        setattr(DoubleArray, f"__r{_name}__", _reversed(_operator(_function, _name)))
        setattr(DoubleArray, f"__i{_name}__", _in_place(getattr(operator, f"__i{_name}__")))


class _DoubleModule(ModuleType):
    ndarray = DoubleArray

    def __getattr__(self, name: str) -> Any:
        value = getattr(np, name)
        return _on_device(value, name) if callable(value) and not isinstance(value, type) else value


cupy_double = _DoubleModule("cupy_double")


@dataclass(frozen=True)
class Backend:
    """An array library under test. exact: its results are NumPy's to the bit."""

    name: str
    xp: Any
    exact: bool = True

    def asarray(self, host: Any) -> Any:
        """A copy of host data in the library."""
        return self.xp.asarray(np.array(host))

    def to_host(self, x: Any) -> np.ndarray[Any, Any]:
        """The NumPy array of `x`, as the package itself fetches it."""
        return arrays.to_host(x)


def _numpy() -> Backend:
    return Backend("numpy", np)


def _strict() -> Backend:
    strict = pytest.importorskip("array_api_strict")  # it turns Python scalars into arrays
    return Backend("array_api_strict", strict, exact=False)


def _double() -> Backend:
    return Backend("cupy_double", cupy_double)


def _cupy() -> Backend:
    try:
        return Backend("cupy", arrays._import_cupy(), exact=False)
    except arrays.Unavailable as error:
        pytest.skip(str(error))


BACKENDS: dict[str, Callable[[], Backend]] = {
    "numpy": _numpy,
    "array_api_strict": _strict,
    "cupy_double": _double,
    "cupy": _cupy,
}
