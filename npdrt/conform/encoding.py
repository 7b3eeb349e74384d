"""The JSON form of arrays, numbers and settings of primitives and training steps."""

from __future__ import annotations

import math
import types
from typing import Any

import numpy as np

from npdrt.conform.formats import FORMATS, Format
from npdrt.errors import FileRefused

Json = dict[str, Any]


def array(values: Any, number: Format) -> Json:
    """The JSON form of a float array whose values are numbers of the format."""
    shape = list(np.shape(values))
    return {"dtype": number.name, "shape": shape, "bits": number.bits(values)}


def scalar(value: float) -> Json:
    """The JSON form of a number."""
    return {"scalar": FORMATS["float64"].bits(value)}


def encode(setting: Any) -> Any:
    """The JSON form of a setting."""
    match setting:
        case None | bool() | int() | str():
            return setting
        case float():
            return scalar(setting)
        case tuple():
            return [encode(item) for item in setting]
        case slice():
            return {"slice": [setting.start, setting.stop, setting.step]}
        case types.EllipsisType():
            return "..."
    raise TypeError(f"no JSON form for a setting {setting!r}")


def decode(setting: Any) -> Any:
    """A setting from its JSON form."""
    match setting:
        case {"scalar": bits}:
            return FORMATS["float64"].values(bits).item()
        case {"slice": [start, stop, step]}:
            return slice(start, stop, step)
        case list():
            return tuple(decode(item) for item in setting)
        case "...":
            return ...
    return setting


def read_array(record: Any, where: str) -> Any:
    """An array from its JSON form. Raises `FileRefused`, naming `where`, for another."""
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
