"""Numbers, arrays and settings in the JSON of the vectors, and back.

Floats are written as the hex digits of their bits. An array whose shape and format the test states
is a text of them, in C order; any other is {"dtype", "shape", "bits"}, or {"dtype", "shape",
"values"} if it holds integers or booleans.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from npdrt.conform.case import Slots
from npdrt.conform.formats import FORMATS, Format, Values
from npdrt.conform.rules import SLOTS
from npdrt.errors import FileRefused

Json = dict[str, Any]
DOUBLE = FORMATS["float64"]

# --- numbers and arrays ---------------------------------------------------------------------------


def hexed(value: float) -> str:
    """A float64 as 16 hex digits."""
    return DOUBLE.bits(value)


def unhexed(text: Any) -> float:
    """The float64 of 16 hex digits."""
    if not isinstance(text, str) or len(text) != 16:
        raise FileRefused(f"expected a float64 as 16 hex digits; got {text!r}")
    return float(DOUBLE.values(text)[0])


def from_bits(text: Any, shape: Sequence[int], number: Format) -> Values:
    """The array of a text of bit patterns, in C order."""
    if not isinstance(text, str):
        raise FileRefused(f"expected a text of hex digits; got {text!r}")
    values, n = number.values(text), int(np.prod(shape, dtype=int))
    if values.size != n:
        raise FileRefused(f"expected {n} {number.name} numbers; got {values.size}")
    return values.reshape(tuple(shape))


def array(values: Any, number: Format) -> Json:
    """An array with its dtype and shape: int64, bool, or floats that are numbers of the format."""
    shape = list(np.shape(values))
    if getattr(values, "dtype", None) in (np.int64, np.bool_):
        return {"dtype": str(values.dtype), "shape": shape, "values": values.reshape(-1).tolist()}
    return {"dtype": number.name, "shape": shape, "bits": number.bits(values)}


def read_array(record: Any, where: str) -> Any:
    """The array of such a record. Raises `FileRefused`, naming `where`, for anything else."""
    match record:
        case {"dtype": "int64" | "bool" as dtype, "shape": list(shape), "values": list(values)}:
            data = np.array(values, dtype=dtype)
        case {"dtype": "float32" | "float64" as dtype, "shape": list(shape), "bits": str(bits)}:
            data = FORMATS[dtype].values(bits).astype(dtype)
        case _:
            raise FileRefused(f"{where}: expected an array; got {shown(record)}")
    if not all(type(n) is int and n >= 0 for n in shape) or math.prod(shape) != data.size:
        raise FileRefused(f"{where}: {data.size} elements do not fill the shape {shown(shape)}")
    return data.reshape(shape)


def shown(record: Any) -> str:
    """A short form of what arrived, for a message."""
    text = repr(record)
    return text if len(text) <= 60 else f"{text[:60]}..."


# --- settings and states --------------------------------------------------------------------------


def settings_json(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with numbers as bit patterns."""

    def one(value: Any) -> Any:
        if value is None or isinstance(value, bool):
            return value
        return [hexed(x) for x in value] if isinstance(value, tuple) else hexed(value)

    return {name: one(value) for name, value in settings.items()}


def settings_from(found: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of such a text."""

    def one(value: Any) -> Any:
        if value is None or isinstance(value, bool):
            return value
        return tuple(unhexed(x) for x in value) if isinstance(value, list) else unhexed(value)

    return {name: one(value) for name, value in found.items()}


def slots_json(slots: Slots, number: Format) -> dict[str, Any]:
    """A state: arrays in the format, 0-d numbers as float64, the step as an integer."""
    return {
        name: int(value) if name == "step"
        else hexed(value) if np.ndim(value) == 0 and isinstance(value, float)
        else number.bits(value)
        for name, value in slots.items()
    }  # fmt: skip


def slots_from(found: Mapping[str, Any], shape: Sequence[int], number: Format) -> Slots:
    """The state of such a text."""
    return {
        name: value if name == "step"
        else from_bits(value, shape, number) if name in SLOTS
        else unhexed(value)
        for name, value in found.items()
    }  # fmt: skip
