"""One call as an array library makes it: the result is written into memory that is there already.

`SHARED` holds what NumPy and CuPy do alike. Each passes a table of its own for the rest:
`npdrt.program.replay.NUMPY` and `npdrt.program.cuda.CUPY`. A function in neither table is called
with the argument `out`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from npdrt import elementary, sums
from npdrt.program.arena import Array
from npdrt.program.calls import PORTABLE, Call

Operation = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]
Maker = Callable[[Any, Call, tuple[Any, ...], Array], list[Operation]]

NAMES = {"abs": "absolute", "bitwise_invert": "invert"}


def operations(
    library: Any, call: Call, args: tuple[Any, ...], out: Array, own: dict[str, Maker]
) -> list[Operation]:
    """The calls of the library `library`, writing into `out`, that give the bits of `call`.

    args: those of the call, with arrays. own: the functions that this library makes in another way.
    """
    make = own.get(call.function) or SHARED.get(call.function) or _plain
    return make(library, call, args, out)


def run(made: list[Operation]) -> None:
    """Make the calls."""
    for function, args, settings in made:
        function(*args, **settings)


def _plain(library: Any, call: Call, args: tuple[Any, ...], out: Array) -> list[Operation]:
    function = getattr(library, NAMES.get(call.function, call.function))
    settings = {"dtype": out.dtype} if call.function in ("sum", "prod") else {}
    return [(function, args, {**call.settings, **settings, "out": out})]


def _copy(library: Any, call: Call, args: tuple[Any, ...], out: Array) -> list[Operation]:
    return [(library.copyto, (out, args[0]), {"casting": "unsafe"})]


def _clip(library: Any, call: Call, args: tuple[Any, ...], out: Array) -> list[Operation]:
    """By position: CuPy has other names for the bounds than the standard."""
    x, low, high = (*args, None, None)[:3]
    bounds = call.settings.get("min", low), call.settings.get("max", high)
    return [(library.clip, (x, *bounds), {"out": out})]


def _round(library: Any, call: Call, args: tuple[Any, ...], out: Array) -> list[Operation]:
    """To integers, or to decimals."""
    function = library.round if len(args) > 1 or call.settings else library.rint
    return [(function, args, {**call.settings, "out": out})]


def where(library: Any, call: Call, args: tuple[Any, ...], out: Array) -> list[Operation]:
    """Write the second choice everywhere, then the first under the condition."""
    condition, a, b = args
    first = (library.copyto, (out, a), {"casting": "unsafe", "where": condition})
    return [(library.copyto, (out, b), {"casting": "unsafe"}), first]


def _assign(library: Any, call: Call, args: tuple[Any, ...], out: Array) -> list[Operation]:
    base, index, value = args
    copied: list[Operation] = [] if base is out else [(library.copyto, (out, base), {})]
    return [*copied, (library.copyto, (out[index], value), {"casting": "unsafe"})]


def _create(library: Any, call: Call, args: tuple[Any, ...], out: Array) -> list[Operation]:
    if call.function == "arange":
        return [(library.copyto, (out, library.arange(*args, **call.settings)), {})]
    value = {"zeros": 0, "ones": 1}.get(call.function)
    return [(out.fill, (args[1] if value is None else value,), {})]


def take(
    library: Any, call: Call, args: tuple[Any, ...], out: Array, **settings: Any
) -> list[Operation]:
    """With the axis by name, and settings of the library."""
    x, indices, *axis = args
    settings = {"axis": axis[0] if axis else None, **call.settings, **settings}
    return [(library.take, (x, indices), {**settings, "out": out})]


def allocating(library: Any, call: Call, args: tuple[Any, ...], out: Array) -> list[Operation]:
    """A function that has no `out`: its result is copied."""
    return copied(library, getattr(library, call.function), call, args, out)


def copied(
    library: Any, function: Callable[..., Any], call: Call, args: tuple[Any, ...], out: Array
) -> list[Operation]:
    """The result of a function, copied into `out`."""
    return [(_copy_result, (library, function, out, *args), call.settings)]


def _copy_result(library: Any, function: Any, out: Array, *args: Any, **settings: Any) -> None:
    library.copyto(out, function(*args, **settings))


def _portable(library: Any, call: Call, args: tuple[Any, ...], out: Array) -> list[Operation]:
    name = call.function.removeprefix("portable_")
    function = sums.sum if name == "sum" else getattr(elementary, name)
    return copied(library, function, call, args, out)


SHARED: dict[str, Maker] = {
    **dict.fromkeys((*PORTABLE, "portable_sum"), _portable),
    **dict.fromkeys(("astype", "copy"), _copy),
    **dict.fromkeys(("zeros", "ones", "full", "arange"), _create),
    **dict.fromkeys(("argsort", "searchsorted", "sort"), allocating),
    **{"clip": _clip, "round": _round, "where": where, "assign": _assign, "take": take},
}
