"""Read the pickles of CIFAR's Python version without running them.

A pickle is a program for a stack machine that may call any function. The machine in this module
knows the instructions of the published files and two calls: an array of unsigned bytes, and its
dtype. It makes numbers, byte strings, tuples, lists, dicts whose keys are byte strings, and such
arrays; it refuses any other instruction, name or call before anything happens. The standard
library's `pickletools.genops` splits the file into instructions, and executes nothing.
"""

from __future__ import annotations

import pickletools
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from npdrt.data.scale import Array
from npdrt.errors import FileRefused

_ARRAYS = ("numpy.core.multiarray _reconstruct", "numpy._core.multiarray _reconstruct")
_NAMES = (*_ARRAYS, "numpy ndarray", "numpy dtype")
_DTYPE = (b"u1", 0, 1)
_DTYPE_STATE = (3, b"|", None, None, None, -1, -1, 0)
_DAMAGE = (ValueError, TypeError, IndexError, KeyError, OverflowError, RecursionError)


class _Mark:
    """The start of a list, tuple or dict that is being collected."""


class _Name(str):
    """The name in a GLOBAL instruction: one of _NAMES."""


class _Bytes:
    """The dtype of unsigned bytes."""


class _Array:
    """An array of unsigned bytes; `value` once BUILD has given it its elements."""

    value: Array | None = None


def read_pickle(raw: bytes, name: str) -> dict[bytes, Any]:
    """The dict in a pickle, with NumPy arrays; `name` is what messages call the file.

    Raises FileRefused for any opcode, name or call that the published files do not have, and for a
    damaged pickle.
    """
    machine = _Machine(name)
    try:
        with warnings.catch_warnings():  # of escapes in strings, which Python reads nevertheless
            warnings.simplefilter("ignore")
            for opcode, argument, place in pickletools.genops(raw):
                machine.step(opcode.name, argument, place or 0)
        found = machine.result()
    except _DAMAGE as error:
        raise FileRefused(f"{name}: damaged pickle: {error}") from error
    return {k: v.value if isinstance(v, _Array) else v for k, v in found.items()}


class _Machine:
    """The stack, the memo, and the effect of each instruction on them."""

    def __init__(self, name: str) -> None:
        self.name, self.place = name, 0
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def step(self, opcode: str, argument: Any, place: int) -> None:
        """Carry out one instruction."""
        self.place = place
        action = _ACTIONS.get(opcode)
        if action is None:
            raise self.refusal(f"opcode {opcode}")
        action(self, argument)

    def refusal(self, what: str) -> FileRefused:
        """The error that refuses the file."""
        return FileRefused(
            f"{self.name}: {what} at byte {self.place}; the CIFAR files hold only numbers, names "
            "and arrays of bytes, and nothing of this file was run"
        )

    def result(self) -> dict[bytes, Any]:
        """The one value that is on the stack at the end."""
        (found,) = self.stack
        if type(found) is not dict:
            raise ValueError(f"expected a dict; found {type(found).__name__}")
        return found

    def since_mark(self) -> list[Any]:
        """Take the values above the last mark off the stack, and the mark."""
        for n in range(len(self.stack) - 1, -1, -1):
            if type(self.stack[n]) is _Mark:
                taken = self.stack[n + 1 :]
                del self.stack[n:]
                return taken
        raise ValueError("a mark is missing")

    def last(self, n: int) -> list[Any]:
        """Take the last n values off the stack."""
        if len(self.stack) < n:
            raise ValueError("the stack is empty")
        taken = self.stack[len(self.stack) - n :]
        del self.stack[len(self.stack) - n :]
        return taken

    def extend(self, items: list[Any]) -> None:
        """Put items into the list on the stack."""
        if type(self.stack[-1]) is not list:
            raise ValueError("items for a value that is not a list")
        self.stack[-1].extend(items)

    def fill(self, items: list[Any]) -> None:
        """Put keys and values into the dict on the stack."""
        keys, values = items[::2], items[1::2]
        if type(self.stack[-1]) is not dict or any(type(key) is not bytes for key in keys):
            raise ValueError("entries without a dict, or keys that are not byte strings")
        self.stack[-1].update(zip(keys, values, strict=True))

    def proto(self, version: int) -> None:
        """PROTO: the published files are of protocol 2."""
        if version > 2:
            raise self.refusal(f"opcode PROTO {version}")

    def text(self, value: str) -> None:
        """A byte string, which genops decodes as Latin-1."""
        self.stack.append(value.encode("latin-1"))

    def named(self, value: str) -> None:
        """GLOBAL."""
        if value not in _NAMES:
            raise self.refusal(f"opcode GLOBAL naming {value[:80]!r}")
        self.stack.append(_Name(value))

    def reduce(self, _: Any) -> None:
        """REDUCE: an empty array, or the dtype of unsigned bytes."""
        function, arguments = self.last(2)
        if function in _ARRAYS and arguments == ("numpy ndarray", (0,), b"b"):
            self.stack.append(_Array())
        elif function == "numpy dtype" and arguments == _DTYPE:
            self.stack.append(_Bytes())
        else:
            raise self.refusal("opcode REDUCE with another call than an array of bytes")

    def build(self, _: Any) -> None:
        """BUILD: the elements of an array, or the rest of its dtype."""
        (state,) = self.last(1)
        built = self.stack[-1]
        if type(built) is _Array:
            built.value = _elements(state)
        elif type(built) is not _Bytes or state != _DTYPE_STATE:
            raise self.refusal("opcode BUILD for another value than an array of bytes")


def _elements(state: Any) -> Array:
    """The array of NumPy's pickled state."""
    version, shape, dtype, fortran, data = state
    whole = type(shape) is tuple and all(type(n) is int and n >= 0 for n in shape)
    if version != 1 or not whole or type(dtype) is not _Bytes or type(data) is not bytes:
        raise ValueError("expected the state of an array of unsigned bytes")
    return np.frombuffer(data, np.uint8).reshape(shape, order="F" if fortran else "C")


def _push(machine: _Machine, value: Any) -> None:
    machine.stack.append(value)


def _put(machine: _Machine, key: int) -> None:
    machine.memo[key] = machine.stack[-1]


def _dict(machine: _Machine, _: Any) -> None:
    items = machine.since_mark()
    machine.stack.append({})
    machine.fill(items)


_Action = Callable[[_Machine, Any], None]
_ACTIONS: dict[str, _Action] = {
    "PROTO": _Machine.proto,
    "STOP": lambda m, _: None,
    "MARK": lambda m, _: _push(m, _Mark()),
    "GLOBAL": _Machine.named,
    "REDUCE": _Machine.reduce,
    "BUILD": _Machine.build,
    "NONE": _push,
    "NEWTRUE": lambda m, _: _push(m, True),
    "NEWFALSE": lambda m, _: _push(m, False),
    "EMPTY_DICT": lambda m, _: _push(m, {}),
    "EMPTY_LIST": lambda m, _: _push(m, []),
    "EMPTY_TUPLE": lambda m, _: _push(m, ()),
    "DICT": _dict,
    "LIST": lambda m, _: _push(m, m.since_mark()),
    "TUPLE": lambda m, _: _push(m, tuple(m.since_mark())),
    "APPEND": lambda m, _: m.extend(m.last(1)),
    "APPENDS": lambda m, _: m.extend(m.since_mark()),
    "SETITEM": lambda m, _: m.fill(m.last(2)),
    "SETITEMS": lambda m, _: m.fill(m.since_mark()),
    **{f"TUPLE{n}": lambda m, _, n=n: _push(m, tuple(m.last(n))) for n in (1, 2, 3)},  # type: ignore[misc]
    **dict.fromkeys(("INT", "LONG", "LONG1", "BININT", "BININT1", "BININT2"), _push),
    **dict.fromkeys(("STRING", "BINSTRING", "SHORT_BINSTRING"), _Machine.text),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), _put),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), lambda m, key: _push(m, m.memo[key])),
}
