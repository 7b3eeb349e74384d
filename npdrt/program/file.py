"""A program as a file: one JSON object, described in docs/programs.md.

Writing is atomic, and the same program gives the same bytes. `npdrt.program.decode` checks what is
read.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np

from npdrt import atomic, regular
from npdrt.errors import Error, FileRefused
from npdrt.program.calls import Call, Draw, Fixed, Ref, Stream
from npdrt.program.decode import FORMAT, KIND, MAX_BYTES, decode
from npdrt.program.recording import Recording
from npdrt.program.tree import Leaf
from npdrt.program.tree import Path as Place

# --- writing ----------------------------------------------------------------------------------


def write(program: Recording, path: Path) -> None:
    """Save a program at `path`, atomically; an old file is there until the new one is whole.

    Raises `Error` if a part of the program is not plain data, and `DiskError` for a failure of the
    file system.
    """
    data = encode(program)
    try:
        decode(data)  # a file that could not be read is not written
    except FileRefused as error:
        raise Error(f"the program cannot be saved: {error}") from error
    atomic.replace(path, data)


def encode(program: Recording) -> bytes:
    """The bytes of a program's file: JSON in UTF-8, a value or call a line."""
    try:
        return _lines(content(program)).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise Error(f"the program cannot be saved: {error}") from error


def content(program: Recording) -> dict[str, Any]:
    """A program as JSON values; docs/programs.md describes them."""
    return {
        "kind": KIND,
        "format": FORMAT,
        "parameters": list(program.parameters),
        "signature": [_signed(path, x) for path, x in program.signature.items()],
        "draws": [_drawn(i, draw) for i, draw in program.draws.items()],
        "constants": [_constant(i, x) for i, x in program.constants.items()],
        "values": [asdict(value) for value in program.values],
        "calls": [_called(call) for call in program.calls],
        "result": _tree(program.result),
    }


def _lines(content: dict[str, Any]) -> str:
    parts = []
    for key, value in content.items():
        text = _dumps(value)
        if isinstance(value, list) and value:
            text = "[\n" + ",\n".join(f"  {_dumps(item)}" for item in value) + "\n ]"
        parts.append(f" {_dumps(key)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _dumps(value: Any) -> str:
    return json.dumps(value, allow_nan=False, ensure_ascii=False)


def _signed(path: Place, x: Ref | Stream | Fixed) -> dict[str, Any]:
    if isinstance(x, Ref):
        return {"path": list(path), "value": x.index}
    if isinstance(x, Stream):
        return {"path": list(path), "stream": True}
    return {"path": list(path), "fixed": encoded(x.value)}


def _drawn(i: int, draw: Draw) -> dict[str, Any]:
    return {
        "value": i,
        "stream": list(draw.stream.path),
        "lineage": [list(step) for step in draw.lineage],
        "method": draw.method,
        "args": encoded(draw.args),
        "settings": {name: encoded(x) for name, x in draw.settings.items()},
    }


def _constant(i: int, x: Any) -> dict[str, Any]:
    little = np.ascontiguousarray(x, dtype=x.dtype.newbyteorder("<"))
    return {"value": i, "base64": base64.b64encode(little.tobytes()).decode()}


def encoded(item: Any, reference: Callable[[int], Any] = lambda i: i) -> Any:
    """An argument as JSON: {"value": ...} for a value, {"slice": [start, stop, step]},
    {"ellipsis": true}, {"float": "inf"}; a tuple is a list, anything else itself."""
    if isinstance(item, Ref):
        return {"value": reference(item.index)}
    if isinstance(item, tuple | list):
        return [encoded(part, reference) for part in item]
    if isinstance(item, slice):
        return {"slice": [item.start, item.stop, item.step]}
    if item is ...:
        return {"ellipsis": True}
    if isinstance(item, float) and (item != item or item in (float("inf"), float("-inf"))):
        return {"float": repr(item)}
    return item


def _called(call: Call) -> dict[str, Any]:
    return {
        "function": call.function,
        "args": encoded(call.args),
        "settings": {name: encoded(x) for name, x in call.settings.items()},
        "result": call.result,
        "phase": call.phase,
        "source": call.source,
    }


def _tree(x: Any) -> Any:
    """A result: {"dict": ...}, {"tuple": ...}, {"list": ...}, {"value": i} or {"fixed": ...}."""
    if isinstance(x, Ref):
        return {"value": x.index}
    if isinstance(x, dict):
        if not all(isinstance(key, str) for key in x):
            raise TypeError("a dict in its result has keys that are not strings")
        return {"dict": {key: _tree(item) for key, item in x.items()}}
    if isinstance(x, tuple | list):
        kind = "tuple" if isinstance(x, tuple) else "list"
        return {kind: [_tree(item) for item in x]}
    if is_dataclass(x) and not isinstance(x, type | Leaf):
        return {"dict": {f.name: _tree(getattr(x, f.name)) for f in fields(x)}}
    return {"fixed": encoded(x)}


# --- reading ----------------------------------------------------------------------------------


def read(path: Path) -> dict[str, Any]:
    """The arguments of `Program` that a file holds.

    Raises `FileRefused`, with path and reason, for anything that `write` does not make.
    """
    data = regular.contents(path, follow=True, limit=MAX_BYTES)
    try:
        return decode(data)
    except FileRefused as refusal:
        raise FileRefused(f"{path}: {refusal}") from None
