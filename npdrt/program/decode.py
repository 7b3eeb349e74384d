"""The bytes of a program's file, read without trust.

Every function is one of `npdrt.program.calls.KINDS`, and the form of every result - shape, dtype,
memory layout, and for a view its place in its owner's memory - is worked out anew from the call
and must be the one in the file. What a file makes this process hold or do is bounded before it is
done: its bytes, its items, how deep they nest, and the dtypes that NumPy is asked for.
"""

from __future__ import annotations

import base64
import json
from typing import Any, NoReturn

import numpy as np

from npdrt.errors import FileRefused
from npdrt.ops.winograd import FORMS
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
MAX_DIMENSIONS = 8
MAX_READ = 1 << 14  # values that a call reads
MAX_ARANGE = 1 << 24  # elements; NumPy makes them to tell their dtype
DTYPES = (
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float16", "float32", "float64"),
)
SETTINGS = (
    *("axis", "keepdims", "dtype", "stable", "side", "min", "max"),
    *("size", "stride", "padding", "groups", "form"),
)
TEXTS = (*DTYPES, *FORMS, "left", "right")  # arguments of calls
DRAW_SETTINGS = ("low", "high", "scale", "p")


def decode(data: bytes) -> dict[str, Any]:
    """The arguments of `Program` in the bytes of a file; `FileRefused` says what is wrong."""
    try:
        return _decoded(_json(data))
    except FileRefused:
        raise
    except Exception as error:  # of values of another type or size than any that is written
        reason = f"it holds what no program does ({type(error).__name__}: {error})"
        raise FileRefused(reason[:500]) from None


def _decoded(content: Any) -> dict[str, Any]:
    if not isinstance(content, dict) or content.get("kind") != KIND:
        _refuse("not a saved program")
    if content.get("format") != FORMAT:
        found = content.get("format")
        found = found if type(found) is int and 0 < found < MAX_NUMBER else "unknown"
        _refuse(f"format {found}; this npdrt reads format {FORMAT}: record and save the step again")
    parts = ("parameters", "signature", "draws", "constants", "values", "calls")
    _fields(content, ("kind", "format", *parts, "result"), "the program")
    for part in parts:
        _need(isinstance(content[part], list), f"{part} is no list")
    values = [_value(x, f"value {i}") for i, x in enumerate(content["values"])]
    calls = [_call(x, f"call {i}", len(values)) for i, x in enumerate(content["calls"])]
    _check_forms(values, calls)
    parameters = tuple(_text(x, "a parameter") for x in content["parameters"])
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


def _json(data: bytes) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        _need(len(found) == len(pairs), "a key stands twice in one object")
        return found

    def constant(text: str) -> NoReturn:
        _refuse(f"{text} is no number of JSON")

    items = sum(map(data.count, (b"[", b"{", b",")))
    if len(data) > MAX_BYTES or items > MAX_ITEMS:
        _refuse(f"more than {MAX_BYTES:,} bytes or {MAX_ITEMS:,} items")
    try:
        return json.loads(data.decode(), object_pairs_hook=unique, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        reason = f"not JSON in UTF-8 ({error})"
        raise FileRefused(f"{reason}; it is another kind of file, or damaged") from None


def _refuse(reason: str) -> NoReturn:
    raise FileRefused(reason)


def _need(condition: Any, reason: str) -> None:
    if not condition:
        _refuse(reason)


def _fields(x: Any, names: tuple[str, ...], what: str) -> None:
    if not isinstance(x, dict) or set(x) != set(names):
        _refuse(f"{what}: expected an object of {', '.join(names)}")


def _text(x: Any, what: str) -> str:
    """A string that a terminal can show."""
    _need(isinstance(x, str) and x.isprintable(), f"{what} is no printable text")
    return str(x)


def _integer(x: Any, what: str, least: int = 0, below: int = MAX_NUMBER) -> int:
    if type(x) is not int or not least <= x < below:
        _refuse(f"{what} is no integer from {least} to {below - 1}: {x!r}"[:200])
    return int(x)


def _integers(x: Any, what: str, least: int = 0) -> tuple[int, ...]:
    _need(isinstance(x, list), f"{what} is no list")
    return tuple(_integer(n, what, least) for n in x)


def _path(x: Any, what: str) -> Path:
    _need(isinstance(x, list), f"{what}: the path is no list")
    return tuple(_text(part, f"{what}: a step of the path") for part in x)


# --- reading: values and calls ----------------------------------------------------------------


def _value(x: Any, what: str) -> Value:
    _fields(x, ("shape", "dtype", "strides", "base", "offset", "name", "origin"), what)
    shape, strides = _integers(x["shape"], what), _integers(x["strides"], what, -MAX_NUMBER)
    _need(len(shape) == len(strides) <= MAX_DIMENSIONS, f"{what}: shape and strides do not fit")
    _need(x["dtype"] in DTYPES, f"{what}: dtype {x['dtype']!r} is none of {', '.join(DTYPES)}")
    origins = ("call", "input", "random", "constant")
    _need(x["origin"] in origins, f"{what}: origin is none of {', '.join(origins)}")
    base = None if x["base"] is None else _integer(x["base"], f"{what}: base")
    offset, name = _integer(x["offset"], f"{what}: offset"), _text(x["name"], f"{what}: name")
    value = Value(shape, x["dtype"], strides, base, offset, name, x["origin"])
    _need(value.nbytes <= MAX_VALUE, f"{what} is too large")
    return value


def _call(x: Any, what: str, count: int) -> Call:
    _fields(x, ("function", "args", "settings", "result", "phase", "source"), what)
    if not isinstance(x["function"], str) or x["function"] not in KINDS:
        _refuse(f"{what}: unknown function {x['function']!r}; nothing else may be called")
    settings = x["settings"]
    if not isinstance(settings, dict) or not set(settings) <= set(SETTINGS):
        _refuse(f"{what}: settings other than {', '.join(SETTINGS)}")
    args = _argument(x["args"], what, count)
    _need(isinstance(args, tuple), f"{what}: args is no list")
    made = Call(
        x["function"],
        args,
        _integer(x["result"], f"{what}: result", 0, count),
        {name: _argument(item, what, 0) for name, item in settings.items()},
        _text(x["phase"], f"{what}: phase"),
        _text(x["source"], f"{what}: source"),
    )
    _need(len(made.refs) <= MAX_READ, f"{what}: reads more than {MAX_READ} values")
    return made


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
        return _text(x, what) if isinstance(x, str) else x
    return _bound(x, f"{what}: an argument")


def _bound(x: Any, what: str) -> int:
    return _integer(x, what, -(1 << 63), 1 << 64)


def _check_forms(values: list[Value], calls: list[Call]) -> None:
    """Every result is made once, of values before it, and has the form its call gives it."""
    forms: list[infer.Form] = []
    made = iter(enumerate(calls))
    for i, value in enumerate(values):
        base, offset = None, 0
        form = infer.empty(value.shape, value.dtype)
        if value.origin == "call":
            number, call = next(made, (0, None))
            if call is None or call.result != i or any(r >= i for r in call.refs):
                _refuse(f"value {i}: made by no call, or of values that come later")
            form = _form(call, f"call {number}", forms, values)
            if form.base is not None:
                base, offset = _owner(call, values, form)
        found = Value(form.shape, str(form.dtype), form.strides, base, offset)
        expected = (value.shape, value.dtype, value.strides, value.base, value.offset)
        if (found.shape, found.dtype, found.strides, found.base, found.offset) != expected:
            _refuse(f"value {i}: its shape, dtype or place is not what its call makes")
        _need(base is None or _inside(value, values[base]), f"value {i} leaves its owner's memory")
        forms.append(form)
    _need(next(made, None) is None, "a call makes no value")


def _form(call: Call, what: str, forms: list[infer.Form], values: list[Value]) -> infer.Form:
    """The form of a call's result; `FileRefused` where the call cannot be made."""
    _check_arguments(call, what, values)
    try:
        form = infer.result(call.function, infer.with_forms(call.args, forms), call.settings)
    except Exception as error:  # whatever NumPy raises for arguments that nobody would give it
        raise FileRefused(f"{what}: {error}") from None
    _need((call.kind == "view") == (form.base is not None), f"{what}: not a view")
    return form


def _check_arguments(call: Call, what: str, values: list[Value]) -> None:
    """What NumPy would accept, but a recorded call never has."""
    args = call.args
    if call.function != "arange" and call.kind != "creation" and not call.refs:
        _refuse(f"{what}: {call.function} of no value")
    if call.kind == "view" or call.function in ("norm", "assign"):
        _need(isinstance(args[0], Ref), f"{what}: the first argument is no value")
    if call.kind == "elementwise":
        _need(not any(isinstance(x, tuple | slice) for x in args), f"{what}: a list as argument")
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
    """Two whole values, and the settings of that function, of which there are no others."""
    names = {"stride", "padding", "groups", "form"}
    names |= {"size"} if call.function != "convolve" else set()
    whole = len(call.args) == 2 and all(isinstance(x, Ref) for x in call.args)
    _need(whole and all(values[i].contiguous for i in call.refs), f"{what}: not of two arrays")
    _need(set(call.settings) == names, f"{what}: settings other than {', '.join(sorted(names))}")
    _need(call.settings["form"] in FORMS, f"{what}: form is none of {', '.join(FORMS)}")
    for name, x in call.settings.items():
        if name == "form":
            continue
        numbers = (x,) if name == "groups" else x
        pair = isinstance(numbers, tuple) and len(numbers) == (1 if name == "groups" else 2)
        _need(pair and all(type(n) is int for n in numbers), f"{what}: {name} {x!r}"[:200])


def _owner(call: Call, values: list[Value], form: infer.Form) -> tuple[int, int]:
    """The value whose memory a view shows, and the view's offset in it."""
    viewed = call.args[0].index
    parent = values[viewed]
    return (viewed if parent.base is None else parent.base), parent.offset + form.offset


def _inside(view: Value, owner: Value) -> bool:
    """Whether every element of a view lies in the memory of its owner."""
    low, size = view.extent
    return view.size == 0 or 0 <= view.offset + low <= owner.nbytes - size


# --- reading: what is around the calls --------------------------------------------------------


def _signature(
    entries: list[Any], parameters: tuple[str, ...], values: list[Value]
) -> dict[Path, Ref | Stream | Fixed]:
    """Path in the arguments -> what stands there; every input once."""
    found: dict[Path, Ref | Stream | Fixed] = {}
    for entry in entries:
        what = "signature"
        _need(isinstance(entry, dict) and len(entry) == 2 and "path" in entry, f"{what}: an entry")
        path = _path(entry["path"], what)
        _need(path and path[0] in parameters and path not in found, f"{what}: path {path}")
        if "value" in entry:
            found[path] = Ref(_integer(entry["value"], what, 0, len(values)))
        elif entry.get("stream") is True:
            found[path] = Stream(path)
        else:
            _need("fixed" in entry, f"{what}: {'/'.join(path)} is neither value nor fixed")
            found[path] = Fixed(_scalar(entry["fixed"], what))
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


def _draw(x: Any, signature: dict[Path, Ref | Stream | Fixed], count: int) -> tuple[int, Draw]:
    _fields(x, ("value", "stream", "lineage", "method", "args", "settings"), "a draw")
    i, path = _integer(x["value"], "a draw", 0, count), _path(x["stream"], "a draw")
    _need(isinstance(signature.get(path), Stream), "a draw from something that is no stream")
    _need(x["method"] in tuple(DRAWN), f"a draw by {x['method']!r}")
    _need(isinstance(x["lineage"], list), "a draw: lineage is no list")
    lineage = tuple(map(_narrowed, x["lineage"]))
    _need(isinstance(x["args"], list) and x["args"], "a draw of no shape")
    size, *more = x["args"]
    size = _integers(size, "a draw") if isinstance(size, list) else _integer(size, "a draw")
    args = (size, *(_argument(item, "a draw", 0) for item in more))
    known = isinstance(x["settings"], dict) and set(x["settings"]) <= set(DRAW_SETTINGS)
    _need(known, "a draw with other settings")
    settings = {name: _argument(item, "a draw", 0) for name, item in x["settings"].items()}
    numbers = all(type(n) in (int, float) for n in (*args[1:], *settings.values()))
    _need(numbers, "a draw with other than numbers")
    return i, Draw(Stream(path), lineage, x["method"], args, settings)


def _narrowed(step: Any) -> tuple[str, Any]:
    match step:
        case ["of", str(purpose)]:
            return "of", _text(purpose, "a draw: a purpose")
        case ["at", int(number)]:
            return "at", _integer(number, "a draw: a step", 0, 1 << 64)
    _refuse("a draw: lineage is made of [of, text] and [at, number]")


def _constants(entries: list[Any], values: list[Value]) -> dict[int, Any]:
    found = {}
    for entry in entries:
        _fields(entry, ("value", "base64"), "a constant")
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
        return {
            _text(k, "result: a key"): _result(part, count, depth + 1) for k, part in item.items()
        }
    if kind in ("tuple", "list") and isinstance(item, list):
        parts = (_result(part, count, depth + 1) for part in item)
        return tuple(parts) if kind == "tuple" else list(parts)
    if kind == "value":
        return Ref(_integer(item, "result", 0, count))
    _need(kind == "fixed", f"result: unknown {kind!r}"[:200])
    return _scalar(item, "result")
