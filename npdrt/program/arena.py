"""Bytes of a device, and the arrays that a program lays out in them."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np

from npdrt.program.calls import Value

Array = Any


class Lease:
    """The owner of an array that a caller was given: it keeps the memory of `base`, and as long as
    it is alive, somebody holds the array. NumPy makes the array from `__array_interface__`."""

    __slots__ = ("__array_interface__", "__weakref__", "base")

    def __init__(self, base: Array):
        self.base = base
        self.__array_interface__ = getattr(base, "__array_interface__", None)


class Arena:
    """Arrays of a device in the layouts of values.

    xp: the array library. scratch: bytes that every replay uses anew.
    """

    xp: Any = np

    def __init__(self) -> None:
        self.scratch = self.xp.empty(0, dtype=np.uint8)

    def on_device(self) -> AbstractContextManager[Any]:
        """A context in which new arrays are on the device of this memory."""
        return nullcontext()

    def reserve(self, nbytes: int) -> None:
        """At least so many bytes of scratch memory."""
        if nbytes > self.scratch.nbytes:
            self.scratch = self.xp.empty(nbytes, dtype=np.uint8)

    def new(self, value: Value) -> Array:
        """A new array in the layout of a value."""
        low, size = value.extent
        return self.view(self.xp.empty(max(size, 1), dtype=np.uint8), value, -low)

    def view(self, owner: Array, value: Value, offset: int) -> Array:
        """A value in the memory of an array without gaps, `offset` bytes from its start."""
        flat = owner.ravel(order="K").view(np.uint8) if owner.size else np.empty(1, np.uint8)
        start = offset if value.size else 0  # an empty array lies nowhere
        return np.ndarray(value.shape, value.dtype, flat.data, start, value.strides)

    def over(self, lease: Lease) -> Array:
        """A fresh array over a lease."""
        return np.asarray(lease)

    def put(self, target: Array, x: Any) -> None:
        """Copy an array or number into an array."""
        target[...] = x
