"""The bytes of a program's file, read without trust.

The types below declare what a file holds. Every function is one of `npdrt.program.calls.KINDS`, and
the form of every result (shape, dtype, memory layout, and for a view its place in its owner's
memory) is worked out anew from the call and must be the one in the file. The work and
memory that a file can cost are bounded first: its bytes, its items, how deep they nest, and the
dtypes that NumPy is asked for.
"""

from __future__ import annotations

import base64
from typing import Annotated, Any, Literal, NoReturn, get_args

import numpy as np
from msgspec import UNSET, Meta, Struct, UnsetType

from npdrt import schema
from npdrt.errors import FileRefused
from npdrt.ops.correlation import FORMS
from npdrt.program import infer
from npdrt.program.calls import KINDS, Call, Draw, Fixed, Ref, Stream, Value
from npdrt.program.recorder import DRAWN
from npdrt.program.tree import Path

KIND, FORMAT = "npdrt program", 2
MAX_BYTES = 1 << 28  # of a file
MAX_ITEMS = 1 << 21  # of its lists and objects; ResNet-18 has 2 % of that
MAX_DEPTH = 50  # of arguments and results
MAX_NUMBER = 1 << 62  # of a size, stride or index
MAX_VALUE = 1 << 40  # bytes of a value
MAX_READ = 1 << 14  # values that a call reads
MAX_ARANGE = 1 << 24  # elements; NumPy makes them to tell their dtype

# --- what a file holds ------------------------------------------------------------------------

Dtype = Literal[
    "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64",
    "float16", "float32", "float64",
]  # fmt: skip
Setting = Literal[
    "axis", "keepdims", "dtype", "stable", "side", "min", "max",
    "size", "stride", "padding", "groups", "form",
    "length", "eps", "gain", "bias", "by_row", "scale", "causal", "empty", "smoothing",
]  # fmt: skip
TEXTS = (*get_args(Dtype), *FORMS, "left", "right")  # arguments of calls
Size = Annotated[int, Meta(ge=0, lt=MAX_NUMBER)]
Stride = Annotated[int, Meta(gt=-MAX_NUMBER, lt=MAX_NUMBER)]


class _Record(Struct, forbid_unknown_fields=True):
    """An object of a file: these fields and no other."""


class _Leaf(_Record):
    """A leaf of the arguments: the number of an input, a `Random`, or a fixed value."""

    path: Annotated[list[str], Meta(min_length=1)]
    value: Size | UnsetType = UNSET
    stream: bool | UnsetType = UNSET
    fixed: Any = UNSET


class _Draw(_Record):
    value: Size
    stream: list[str]
    lineage: list[Any]
    method: str
    args: Annotated[list[Any], Meta(min_length=1)]
    settings: dict[Literal["low", "high", "scale", "p"], Any]


class _Constant(_Record):
    value: Size
    base64: str


class _Value(_Record):
    shape: Annotated[list[Size], Meta(max_length=8)]
    dtype: Dtype
    strides: list[Stride]
    base: Size | None
    offset: Size
    name: str
    origin: Literal["call", "input", "random", "constant"]


class _Call(_Record):
    function: str
    args: list[Any]
    settings: dict[Setting, Any]
    result: Size
    phase: str
    source: str


class _Program(_Record):
    kind: str
    format: int
    parameters: list[str]
    signature: list[_Leaf]
    draws: list[_Draw]
    constants: list[_Constant]
    values: list[_Value]
    calls: list[_Call]
    result: Any


# --- reading: values and calls ----------------------------------------------------------------


def decode(data: bytes) -> dict[str, Any]:
    """The arguments of `Program` in the bytes of a file; `FileRefused` names the fault."""
    try:
        return _decoded(_content(data))
    except FileRefused:
        raise
    except Exception as error:  # for values of another type or size than any that is written
        reason = f"no program holds this ({type(error).__name__}: {error})"
        raise FileRefused(reason[:500]) from None


def _content(data: bytes) -> dict[str, Any]:
    items = sum(map(data.count, (b"[", b"{", b",")))
    if len(data) > MAX_BYTES or items > MAX_ITEMS:
        _refuse(f"more than {MAX_BYTES:,} bytes or {MAX_ITEMS:,} items")
    content = schema.parse(data, Any, "malformed")
    if not isinstance(content, dict) or content.get("kind") != KIND:
        _refuse("not a saved program")
    if content.get("format") != FORMAT:
        found = content.get("format")
        found = found if type(found) is int and 0 < found < MAX_NUMBER else "unknown"
        _refuse(f"format {found}; this npdrt reads format {FORMAT}: record and save the step again")
    _need(_printable(content), "a text that is not printable")
    checked: dict[str, Any] = schema.check(content, _Program, "malformed")
    return checked


def _printable(x: Any) -> bool:
    """Whether a terminal can show all texts of a JSON value."""
    if isinstance(x, str):
        return x.isprintable()
    parts = (*x, *x.values()) if isinstance(x, dict) else x if isinstance(x, list) else ()
    return all(map(_printable, parts))


def _decoded(content: dict[str, Any]) -> dict[str, Any]:
    values = [_value(x, i) for i, x in enumerate(content["values"])]
    calls = [_call(x, f"call {i}", len(values)) for i, x in enumerate(content["calls"])]
    _check_forms(values, calls)
    parameters = tuple(content["parameters"])
    signature = _signature(content["signature"], parameters, values)
    return {
        "values": values,
        "calls": calls,
        "parameters": parameters,
        "signature": signature,
        "draws": _draws(content["draws"], signature, values),
        "constants": _constants(content["constants"], values),
        "result": _result(content["result"], len(values)),
    }


def _refuse(reason: str) -> NoReturn:
    raise FileRefused(reason)


def _need(condition: Any, reason: str) -> None:
    if not condition:
        _refuse(reason)


def _integer(x: Any, what: str, least: int = 0, below: int = MAX_NUMBER) -> int:
    if type(x) is not int or not least <= x < below:
        _refuse(f"{what} is not an integer from {least} to {below - 1}: {x!r}"[:200])
    return int(x)


def _value(x: dict[str, Any], i: int) -> Value:
    value = Value(**{**x, "shape": tuple(x["shape"]), "strides": tuple(x["strides"])})
    _need(len(value.shape) == len(value.strides), f"value {i}: shape and strides do not fit")
    _need(value.nbytes <= MAX_VALUE, f"value {i} is too large")
    return value


def _call(x: dict[str, Any], what: str, count: int) -> Call:
    if x["function"] not in KINDS:
        _refuse(f"{what}: unknown function {x['function']!r}; nothing else may be called")
    settings = {name: _argument(item, what, 0) for name, item in x["settings"].items()}
    _integer(x["result"], f"{what}: result", 0, count)
    call = Call(**{**x, "args": _argument(x["args"], what, count), "settings": settings})
    _need(len(call.refs) <= MAX_READ, f"{what}: reads more than {MAX_READ} values")
    return call


def _argument(x: Any, what: str, count: int, depth: int = 0) -> Any:
    """An argument; its values are below `count`."""
    _need(depth < MAX_DEPTH, f"{what}: arguments nested deeper than {MAX_DEPTH}")
    if isinstance(x, list):
        return tuple(_argument(item, what, count, depth + 1) for item in x)
    if isinstance(x, dict) and len(x) == 1:
        ((kind, item),) = x.items()
        if kind == "value":
            return Ref(_integer(item, f"{what}: a value", 0, count))
        if kind == "slice" and isinstance(item, list) and len(item) == 3:
            return slice(*(None if n is None else _bound(n, what) for n in item))
        if kind == "ellipsis" and item is True:
            return ...
        if kind == "float" and item in ("inf", "-inf", "nan"):
            return float(item)
    _need(not isinstance(x, str) or x in TEXTS, f"{what}: a text that no call has")
    return _scalar(x, what)


def _scalar(x: Any, what: str) -> Any:
    if x is None or type(x) in (bool, str) or (type(x) is float and x - x == 0):
        return x
    return _bound(x, f"{what}: an argument")


def _bound(x: Any, what: str) -> int:
    return _integer(x, what, -(1 << 63), 1 << 64)


def _check_forms(values: list[Value], calls: list[Call]) -> None:
    """Every result is made once, from values before it, and has the form its call gives it."""
    forms: list[infer.Form] = []
    made = iter(enumerate(calls))
    for i, value in enumerate(values):
        args: tuple[Any, ...] = ()
        form = infer.empty(value.shape, value.dtype)
        if value.origin == "call":
            number, call = next(made, (0, None))
            if call is None or call.result != i or any(r >= i for r in call.refs):
                _refuse(f"value {i}: no call produces it, or its call reads a later value")
            args, form = call.args, _form(call, f"call {number}", forms, values)
        base, offset = infer.place(values, args, form)
        labels = value.name, value.origin
        expected = Value(form.shape, form.dtype.name, form.strides, base, offset, *labels)
        _need(value == expected, f"value {i}: its shape, dtype or place is not what its call makes")
        whole = value.base is None or _inside(value, values[value.base])
        _need(whole, f"value {i} leaves its owner's memory")
        forms.append(form)
    _need(next(made, None) is None, "a call makes no value")


def _form(call: Call, what: str, forms: list[infer.Form], values: list[Value]) -> infer.Form:
    """The form of a call's result; `FileRefused` if the call cannot be made."""
    _check_arguments(call, what, values)
    try:
        form = infer.result(call.function, infer.with_forms(call.args, forms), call.settings)
    except Exception as error:  # whatever NumPy raises for arguments that nobody would give it
        raise FileRefused(f"{what}: {error}") from None
    _need((call.kind == "view") == (form.base is not None), f"{what}: not a view")
    return form


def _check_arguments(call: Call, what: str, values: list[Value]) -> None:
    """Refuse arguments that NumPy would accept but no recorded call has."""
    args = call.args
    if call.function != "arange" and call.kind != "creation" and not call.refs:
        _refuse(f"{what}: {call.function} of no value")
    if call.kind == "view" or call.function in ("norm", "assign"):
        _need(isinstance(args[0], Ref), f"{what}: the first argument is not a value")
    if call.kind == "elementwise":
        _need(not any(isinstance(x, tuple | slice) for x in args), f"{what}: a list as argument")
    if call.kind in ("convolution", "rows"):
        whole = all(isinstance(x, Ref) for x in args)
        _need(whole and all(values[i].contiguous for i in call.refs), f"{what}: not whole arrays")
    if call.kind == "convolution":
        _check_convolution(call, what, values)
    if call.function == "norm":
        _need(len(args) == 1 and values[call.refs[0]].contiguous, f"{what}: norm of a layout")
    if call.function in ("getitem", "assign"):
        index = args[1] if len(args) > 1 and isinstance(args[1], tuple) else (None, "")
        plain = all(i is None or i is ... or type(i) in (int, slice) for i in index)
        _need(plain and ... in index, f"{what}: not a basic index")
    if call.function == "arange":
        n = values[call.result].shape
        least = all(type(x) is int for x in args) and 1 <= len(args) <= 3 and len(n) == 1
        least = least and (len(args) < 3 or args[2] != 0)
        _need(
            least and len(range(*args)) == n[0] <= MAX_ARANGE,
            f"{what}: arange of other than integers, or too long",
        )


def _check_convolution(call: Call, what: str, values: list[Value]) -> None:
    """Refuse other arguments than two whole values, and other settings than the function has."""
    names = {"stride", "padding", "groups", "form"}
    names |= {"size"} if call.function != "convolve" else set()
    _need(len(call.args) == 2, f"{what}: not of two arrays")
    _need(set(call.settings) == names, f"{what}: settings other than {', '.join(sorted(names))}")
    _need(call.settings["form"] in FORMS, f"{what}: form is none of {', '.join(FORMS)}")
    for name, x in call.settings.items():
        if name == "form":
            continue
        numbers = (x,) if name == "groups" else x
        pair = isinstance(numbers, tuple) and len(numbers) == (1 if name == "groups" else 2)
        _need(pair and all(type(n) is int for n in numbers), f"{what}: {name} {x!r}"[:200])


def _inside(view: Value, owner: Value) -> bool:
    """Whether every element of a view lies in the memory of its owner."""
    low, size = view.extent
    return view.size == 0 or 0 <= view.offset + low <= owner.nbytes - size


# --- reading: the rest ------------------------------------------------------------------------


def _signature(
    entries: list[dict[str, Any]], parameters: tuple[str, ...], values: list[Value]
) -> dict[Path, Ref | Stream | Fixed]:
    """Path in the arguments -> its leaf; every input occurs once."""
    found: dict[Path, Ref | Stream | Fixed] = {}
    for entry in entries:
        path = tuple(entry["path"])
        _need(path[0] in parameters and path not in found, f"signature: path {path}")
        _need(len(entry) == 2, f"signature: {'/'.join(path)} is not one of value, stream and fixed")
        if "value" in entry:
            found[path] = Ref(_integer(entry["value"], "signature", 0, len(values)))
        elif "fixed" in entry:
            found[path] = Fixed(_scalar(entry["fixed"], "signature"))
        else:
            _need(entry["stream"], f"signature: {'/'.join(path)}: stream is not true")
            found[path] = Stream(path)
    _check_origin("input", [x.index for x in found.values() if isinstance(x, Ref)], values)
    return found


def _check_origin(origin: str, given: list[int], values: list[Value]) -> None:
    """Each value of that origin stands once among the entries for it."""
    if sorted(given) != [i for i, value in enumerate(values) if value.origin == origin]:
        _refuse(f"the values of origin {origin} are not those that the file lists")


def _draws(
    entries: list[Any], signature: dict[Path, Ref | Stream | Fixed], values: list[Value]
) -> dict[int, Draw]:
    found = {}
    for entry in entries:
        i, draw = _draw(entry, signature, len(values))
        size = draw.args[0]
        shape = (size,) if isinstance(size, int) else tuple(size)
        fits = (values[i].shape, values[i].dtype) == (shape, DRAWN[draw.method])
        _need(fits and i not in found, f"a draw: value {i} is not what is drawn")
        found[i] = draw
    _check_origin("random", list(found), values)
    return found


def _draw(
    x: dict[str, Any], signature: dict[Path, Ref | Stream | Fixed], count: int
) -> tuple[int, Draw]:
    i, path = _integer(x["value"], "a draw", 0, count), tuple(x["stream"])
    _need(isinstance(signature.get(path), Stream), "a draw from something that is not a stream")
    _need(x["method"] in tuple(DRAWN), f"a draw by {x['method']!r}")
    size, *more = x["args"]
    sizes = size if isinstance(size, list) else [size]
    shape = tuple(_integer(n, "a draw") for n in sizes)
    more = [_argument(item, "a draw", 0) for item in more]
    settings = {name: _argument(item, "a draw", 0) for name, item in x["settings"].items()}
    numbers = all(type(n) in (int, float) for n in (*more, *settings.values()))
    _need(numbers, "a draw with other than numbers")
    args = (shape if isinstance(size, list) else size, *more)
    return i, Draw(Stream(path), tuple(map(_narrowed, x["lineage"])), x["method"], args, settings)


def _narrowed(step: Any) -> tuple[str, Any]:
    match step:
        case ["of", str(purpose)]:
            return "of", purpose
        case ["at", int(number)]:
            return "at", _integer(number, "a draw: a step", 0, 1 << 64)
    _refuse("a draw: lineage is made of [of, text] and [at, number]")


def _constants(entries: list[Any], values: list[Value]) -> dict[int, Any]:
    found = {}
    for entry in entries:
        i = _integer(entry["value"], "a constant", 0, len(values))
        try:
            raw = base64.b64decode(entry["base64"], validate=True)
        except (ValueError, TypeError) as error:
            raise FileRefused(f"constant {i}: not base64 ({error})") from None
        _need(len(raw) == values[i].nbytes and i not in found, f"constant {i}: wrong length")
        stored = np.frombuffer(raw, np.dtype(values[i].dtype).newbyteorder("<"))
        found[i] = stored.astype(values[i].dtype).reshape(values[i].shape)
    _check_origin("constant", list(found), values)
    return found


def _result(x: Any, count: int, depth: int = 0) -> Any:
    """The nested result with `Ref`s for arrays."""
    _need(depth < MAX_DEPTH, f"result: nested deeper than {MAX_DEPTH}")
    if not isinstance(x, dict) or len(x) != 1:
        _refuse("result: expected one of dict, tuple, list, value, fixed")
    ((kind, item),) = x.items()
    if kind == "dict" and isinstance(item, dict):
        return {key: _result(part, count, depth + 1) for key, part in item.items()}
    if kind in ("tuple", "list") and isinstance(item, list):
        parts = (_result(part, count, depth + 1) for part in item)
        return tuple(parts) if kind == "tuple" else list(parts)
    if kind == "value":
        return Ref(_integer(item, "result", 0, count))
    _need(kind == "fixed", f"result: unknown {kind!r}"[:200])
    return _scalar(item, "result")
