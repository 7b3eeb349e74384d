"""Data sets in one NumPy .npz file: arrays x and y, and x_test and y_test where there is a test
set.

NumPy's own reader allocates whatever shape a file declares and can run pickles. That of
`npdrt.store.foreign` takes plain numbers only and bounds what ends up in memory.
"""

from __future__ import annotations

from typing import Any, BinaryIO

import numpy as np

from npdrt.data.bounded import FREE, RATIO
from npdrt.errors import FileRefused
from npdrt.store import foreign

Array = np.ndarray[Any, np.dtype[Any]]

ROLES = ("x", "y", "x_test", "y_test")
BYTES = 4  # a number of the file ends up as a float32


def read_npz(stream: BinaryIO, name: str) -> dict[str, Array]:
    """The arrays of a seekable .npz file by role; `name` stands for the file in messages.

    Raises FileRefused where the file is damaged, declares sizes out of proportion, lacks x or y,
    holds an array of another name, or anything but plain numbers (no objects, no pickles).
    """
    size = stream.seek(0, 2)
    stream.seek(0)
    try:
        return foreign.read_npz(stream, _roles, max(FREE // BYTES, RATIO * size))
    except FileRefused as error:
        raise FileRefused(f"{name}: {error}") from error


def _roles(names: list[str]) -> list[str]:
    """The names in the order of ROLES; refused if they are not one set or two."""
    wanted = "expected arrays x and y, and optionally x_test and y_test"
    if len(set(names)) != len(names) or not {"x", "y"} <= set(names) <= set(ROLES):
        raise FileRefused(f"{wanted}; found {', '.join(sorted(names)) or 'none'}")
    if ("x_test" in names) != ("y_test" in names):
        raise FileRefused(f"{wanted} together; found only one of them")
    return [role for role in ROLES if role in names]
