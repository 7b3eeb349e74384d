"""Read the pickles of CIFAR's Python version without running them: `npdrt.store.pickles`.

Besides numbers, byte strings, tuples, lists and dicts whose keys are byte strings, they have two
calls: an array of unsigned bytes, and its dtype.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from npdrt.data.scale import Array
from npdrt.errors import FileRefused
from npdrt.store.pickles import Machine

_ARRAYS = ("numpy.core.multiarray _reconstruct", "numpy._core.multiarray _reconstruct")
_DTYPE = (b"u1", 0, 1)
_DTYPE_STATE = (3, b"|", None, None, None, -1, -1, 0)


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
    found = _Machine(name).run(raw)
    if type(found) is not dict:
        raise FileRefused(f"{name}: damaged pickle: expected a dict; found {type(found).__name__}")
    return {k: v.value if isinstance(v, _Array) else v for k, v in found.items()}


class _Machine(Machine):
    names = (*_ARRAYS, "numpy ndarray", "numpy dtype")
    key = bytes
    holds = "the CIFAR files hold only numbers, names and arrays of bytes"

    def call(self, function: Any, arguments: Any) -> Any:
        """An empty array, or the dtype of unsigned bytes."""
        if function in _ARRAYS and arguments == ("numpy ndarray", (0,), b"b"):
            return _Array()
        if function == "numpy dtype" and arguments == _DTYPE:
            return _Bytes()
        raise self.refusal("opcode REDUCE with another call than an array of bytes")

    def build(self, value: Any, state: Any) -> None:
        """The elements of an array, or the rest of its dtype."""
        if type(value) is _Array:
            value.value = _elements(state)
        elif type(value) is not _Bytes or state != _DTYPE_STATE:
            raise self.refusal("opcode BUILD for another value than an array of bytes")

    def _text(self, value: str) -> None:
        """A byte string, which genops decodes as Latin-1."""
        self.push(value.encode("latin-1"))

    more = dict.fromkeys(("STRING", "BINSTRING", "SHORT_BINSTRING"), _text)


def _elements(state: Any) -> Array:
    """The array of NumPy's pickled state."""
    version, shape, dtype, fortran, data = state
    whole = type(shape) is tuple and all(type(n) is int and n >= 0 for n in shape)
    if version != 1 or not whole or type(dtype) is not _Bytes or type(data) is not bytes:
        raise ValueError("expected the state of an array of unsigned bytes")
    return np.frombuffer(data, np.uint8).reshape(shape, order="F" if fortran else "C")
