"""Chains and norms as compiled loops, one pass over memory (extra `fast`, numba).

Only `+ - * / sqrt`, comparisons and selections are compiled, in the order and the dtypes of the
plain calls, without contraction or reassociation: the bits are those of NumPy, which stays the
definition (`npdrt.program.replay`) and the oracle of the tests. `maximum` and `minimum` are not
compiled, because only NumPy knows which zero it returns for 0.0 and -0.0; nor are casts to
integers. Loops run on one thread, which nearly fills the memory's bandwidth (benchmarks/README.md).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from npdrt.errors import Unavailable
from npdrt.optim.norm import CHUNK, LANES
from npdrt.program.calls import Call, Value
from npdrt.program.chain import Language, expression, read_by

_INFIX = {
    **{"add": "+", "subtract": "-", "multiply": "*", "divide": "/"},
    **{"equal": "==", "not_equal": "!=", "less": "<", "less_equal": "<="},
    **{"greater": ">", "greater_equal": ">="},
    **{"bitwise_and": "&", "bitwise_or": "|", "bitwise_xor": "^"},
}
_PREFIX = {
    **{"negative": "-{}", "sqrt": "np.sqrt({})", "abs": "abs({})"},
    "isfinite": "np.isfinite({})",
}
FUSABLE = (*_INFIX, *_PREFIX, "where", "astype")


def numba() -> Any:
    """The compiler; `Unavailable` without it."""
    try:
        import numba
    except ImportError as error:
        raise Unavailable(
            f'compiled loops need numba ({error}); install it with pip install "npdrt[fast]", '
            "or leave --fast out"
        ) from error
    return numba


# --- chains -----------------------------------------------------------------------------------


def loop_source(
    calls: list[Call], values: list[Value], kept: list[int], memory: dict[int, int]
) -> str:
    """A chain as the source of one loop over all elements.

    kept: the results it writes. memory: for every value it reads or writes, the number of the
    array, which is an argument of the loop. A result that replaces a value has its array, so that
    the compiler knows; and the loop counts from 0, so that no index is negative: both let it
    vectorise. Names are numbered as they come, so that equal chains have one loop.
    """
    read = read_by(calls)
    names = {i: f"x{k}" for k, i in enumerate([*read, *(call.result for call in calls)])}
    before = [f"{names[i]} = a{memory[i]}[()]" for i in read if values[i].shape == ()]
    inside = [f"{names[i]} = a{memory[i]}[i]" for i in read if values[i].shape != ()]
    inside += [
        f"{names[call.result]} = {expression(call, values, names, PYTHON)}" for call in calls
    ]
    inside += [f"a{memory[i]}[i] = {names[i]}" for i in kept]
    arguments = ", ".join(f"a{k}" for k in range(len(set(memory.values()))))
    lines = [f"def loop({arguments}):", *(f"    {line}" for line in before)]
    lines += [
        f"    for i in range(a{memory[kept[0]]}.size):",
        *(f"        {line}" for line in inside),
    ]
    return "\n".join(lines)


def _cast(name: str, given: str, wanted: str) -> str:
    return f"np.{'bool_' if wanted == 'bool' else wanted}({name})"


def _apply(function: str, operands: list[str], dtype: str) -> str:
    if function == "where":
        return f"{operands[1]} if {operands[0]} else {operands[2]}"
    if function in _PREFIX:
        return _PREFIX[function].format(operands[0])
    return f"({operands[0]} {_INFIX[function]} {operands[1]})"


PYTHON = Language(
    cast=_cast, literal=lambda x, wanted: _cast(repr(x), wanted, wanted), apply=_apply
)


@cache
def _compiled(source: str, signature: str) -> Callable[..., None]:
    scope: dict[str, Any] = {"np": np, "inf": np.inf, "nan": np.nan}
    exec(source, scope)
    compiled: Callable[..., None] = numba().njit(
        signature, nogil=True, error_model="numpy", fastmath=False
    )(scope["loop"])
    return compiled


def can_fuse(call: Call, values: list[Value]) -> bool:
    """Whether a call of `FUSABLE` keeps its bits in a compiled loop."""
    dtypes = [values[i].dtype for i in (*call.refs, call.result)]
    plain = all(np.dtype(d).kind in "fb" and d != "float16" for d in dtypes)
    return call.function in FUSABLE and plain


def chain(
    calls: list[Call], values: list[Value], kept: list[int], array: Callable[[int], Any]
) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    """The operation that runs a chain; array(i): the memory of a value."""
    numbers: dict[tuple[int, str, bool], int] = {}
    memory: dict[int, int] = {}
    used: list[Any] = []
    for i in (*read_by(calls), *kept):
        x = array(i)
        key = (x.__array_interface__["data"][0], values[i].dtype, x.shape == ())
        if key not in numbers:
            numbers[key] = len(used)
            used.append(x)
        memory[i] = numbers[key]
    types = [f"{x.dtype}[::1]" if x.shape else f"Array({x.dtype}, 0, 'C')" for x in used]
    loop = _compiled(loop_source(calls, values, kept, memory), f"void({', '.join(types)})")
    return loop, tuple(x.reshape(-1) if x.shape else x for x in used), {}


# --- the norm ---------------------------------------------------------------------------------

_NORM = f"""
def loop(rows, rest, total, chunk, out):
    height = {CHUNK // LANES}
    total[:] = 0.0
    for first in range(0, max(rows.shape[0], 1), height):
        chunk[:] = 0.0
        for r in range(first, min(first + height, rows.shape[0])):
            row = rows[r]
            for k in range({LANES}):
                v = np.float64(row[k])
                chunk[k] += v * v
        if first + height > rows.shape[0]:
            for k in range(rest.size):
                v = np.float64(rest[k])
                chunk[k] += v * v
        for k in range({LANES}):
            total[k] += chunk[k]
    if rest.size and rows.shape[0] and rows.shape[0] % height == 0:
        for k in range(rest.size):
            v = np.float64(rest[k])
            total[k] += v * v
    half = {LANES // 2}
    while half:
        for k in range(half):
            total[k] += total[k + half]
        half //= 2
    out[()] = np.sqrt(total[0])
"""


def norm(x: Any, out: Any) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    """The operation that puts `npdrt.optim.norm` of the flat array `x` into the 0-d `out`."""
    whole = x.size // LANES * LANES
    kind, lanes = x.dtype, np.empty((2, LANES))
    types = f"{kind}[:, ::1], {kind}[::1], float64[::1], float64[::1], Array(float64, 0, 'C')"
    rows = x[:whole].reshape(-1, LANES)  # (rows, LANES); the rest of x is shorter than a row
    arrays = (rows, x[whole:], lanes[0], lanes[1], out)
    return _compiled(_NORM, f"void({types})"), arrays, {}
