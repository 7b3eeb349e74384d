"""Vectors of every primitive: its value and its vjp, from references that share none of its code.

A new primitive needs its line in REFERENCES of `primitives_elementwise`, `primitives_arrays` or
`primitives_layers`, and cases in CASES there, each `.since` the coming version of the files.

A reference is the definition of the value in 400 digits; the derivative follows from it by
`oracle.dual` and both are rounded once. At a kink or tie the reference states the subgradient that
npdrt documents, and the test is "acceptable" (reported, not gated), since another choice is not an
error. A test whose answer changes if subnormals are flushed to zero is acceptable too. The table
states values and derivatives that are not finite, except a NaN that passes through sums, products
or exp, which mpmath computes.

JSON. An array: {"dtype", "shape", "bits"}, or {"dtype", "shape", "values"} for int64 and bool. A
number: {"scalar": bits of a float64}. Settings: as Python's keyword arguments, each present;
tuples are lists, a float is a scalar, a slice {"slice": [start, stop, step]}, an ellipsis "...".
"""

from __future__ import annotations

import itertools
import math
import types
from collections.abc import Iterable
from typing import Any

import mpmath
import numpy as np

from npdrt.arrays import quiet
from npdrt.autodiff import PRIMITIVES, Tensor, backward
from npdrt.conform.encoding import DOUBLE, Json, array, read_array
from npdrt.conform.formats import FORMATS, Format

from . import primitives_arrays, primitives_elementwise, primitives_layers
from .dual import DIGITS, constants, pull_back, rounded, variables
from .primitives_case import (
    INF,
    LENIENT,
    PrimitiveCase,
    cotangent_for,
)

TITLE = "Primitives: value and vjp"
# flag -> (kind of mistake it is after, what the test has)
FLAGS = {
    "ORDINARY": ("BASIC", "values near 1"),
    "ZERO": ("EDGE_CASE", "zeros among the arguments, or as the value"),
    "KINK": ("DEFINED", "the subgradient that npdrt documents"),
    "TIE": ("DEFINED", "equal candidates share; max_pool takes the first"),
    "CONVENTION": ("DEFINED", "where formulas of one function differ"),
    "INF": ("EDGE_CASE", "infinite elements"),
    "NAN": ("EDGE_CASE", "NaN among the arguments, or as the value"),
    "OVERFLOW": ("EDGE_CASE", "a value or an intermediate overflows"),
    "UNDERFLOW": ("EDGE_CASE", "a value rounds to zero, or nearly"),
    "SUBNORMAL": ("EDGE_CASE", "subnormals, flushed by some hardware"),
    "LARGE_LOGITS": ("MISSING_STEP", "exp overflows without a shift"),
    "EMPTY": ("EDGE_CASE", "an array without elements"),
    "SCALAR": ("EDGE_CASE", "a 0-d array or a number"),
    "BROADCAST": ("FUNCTIONALITY", "the vjp sums over stretched axes"),
    "CANCELLATION": ("EDGE_CASE", "leading digits cancel"),
}
DTYPES = ("float32", "float64")

# --- the tables ------------------------------------------------------------------------------

TABLES = (primitives_elementwise, primitives_arrays, primitives_layers)
REFERENCES = {name: reference for table in TABLES for name, reference in table.REFERENCES.items()}


def ordered(tables: Iterable[Any]) -> list[PrimitiveCase]:
    """The cases of tables, version by version, so that new ones leave the old ones' numbers."""
    return sorted((row for table in tables for row in table.CASES), key=lambda row: row.version)


CASES = ordered(TABLES)

# --- generation ------------------------------------------------------------------------------


def groups(operations: set[str] | None = None) -> list[Json]:
    """The groups of the table, one an operation with its settings; those of `operations` if given.

    tcId counts from 1 over the whole table, an id for each dtype.
    """
    found: dict[str, Json] = {}
    ids = itertools.count(1)
    for row in CASES:
        numbers = [(next(ids), FORMATS[dtype]) for dtype in DTYPES]
        if operations is not None and row.operation not in operations:
            continue
        settings = {name: encode(value) for name, value in row.full_settings().items()}
        group = found.setdefault(
            f"{row.operation} {settings}",
            {"type": "Primitive", "operation": row.operation, "settings": settings, "tests": []},
        )
        group["tests"] += [_test(row, identity, number) for identity, number in numbers]
    return list(found.values())


def _test(row: PrimitiveCase, identity: int, number: Format) -> Json:
    arguments = row.realised(number)
    cotangent, value, vjp, condition = expected(row, arguments, number)
    wanted = row.differentiated()
    units = REFERENCES[row.operation].units if row.units is None else row.units
    return {
        "tcId": identity,
        "comment": row.comment,
        "flags": list(row.flags) or ["ORDINARY"],
        "result": "acceptable" if LENIENT & set(row.flags) else "valid",
        "arguments": [_argument(a, number) for a in arguments],
        "constant": [i for i in range(len(arguments)) if i not in wanted],
        "cotangent": array(cotangent, number),
        "expected": {
            "value": array(value, number),
            "vjp": [None if g is None else array(g, number) for g in vjp],
        },
        "tolerance": math.ceil(units * condition) * number.ulp(1.0).item(),
    }


def expected(
    row: PrimitiveCase, arguments: list[Any], number: Format
) -> tuple[Any, Any, list[Any], float]:
    """The cotangent; the value and the vjp of every argument (None where there is none), rounded;
    and the largest condition of the sums of a vjp (1 where it is stated).

    Values stated in the table replace those of the reference.
    """
    wanted, condition = row.differentiated(), 1.0
    with mpmath.workdps(DIGITS):
        if row.value is not None and row.vjp is not None:
            value, cotangent, vjp = row.value, np.ones(np.shape(row.value)), list(row.vjp)
        else:
            output = _reference(row, arguments, wanted)
            value, vjp = output, [None] * len(arguments)
            cotangent = cotangent_for(output.shape)
            for i in wanted:
                vjp[i], found = pull_back(output, cotangent, i, arguments[i].shape)
                condition = max(condition, float(found)) if found < INF else condition
        parts = [None if g is None else rounded(g, number) for g in vjp]
        return cotangent, rounded(value, number), parts, condition


def _reference(row: PrimitiveCase, arguments: list[Any], wanted: tuple[int, ...]) -> Any:
    exact = [
        variables(a, i) if i in wanted else a if _is_discrete(a) else constants(a)
        for i, a in enumerate(arguments)
    ]
    output = REFERENCES[row.operation].value(*exact, **row.full_settings())
    return np.asarray(output, dtype=object)


def _is_discrete(a: Any) -> bool:
    return getattr(a, "dtype", None) in (np.dtype(np.int64), np.dtype(np.bool_))


def _argument(a: Any, number: Format) -> Json:
    return scalar(a) if isinstance(a, float) else array(a, number)


def scalar(value: float) -> Json:
    """The JSON form of a number."""
    return {"scalar": DOUBLE.bits(value)}


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
            return DOUBLE.values(bits).item()
        case {"slice": [start, stop, step]}:
            return slice(start, stop, step)
        case list():
            return tuple(decode(item) for item in setting)
        case "...":
            return ...
    return setting


# --- answering -------------------------------------------------------------------------------


def answer(group: Json, test: Json) -> Json:
    """npdrt's own answer: {"value": array, "vjp": [array or None, ...]}."""
    arguments = [_read_argument(a) for a in test["arguments"]]
    leaves = [a if i in test["constant"] else Tensor(a) for i, a in enumerate(arguments)]
    settings = {name: decode(value) for name, value in group["settings"].items()}
    with quiet():
        output = PRIMITIVES[group["operation"]](*leaves, **settings)
        found = backward(output, read_array(test["cotangent"], "cotangent"))
    number = FORMATS[str(output.dtype)]
    return {
        "value": array(output.value, number),
        "vjp": [
            array(found[id(leaf)], number) if isinstance(leaf, Tensor) else None for leaf in leaves
        ],
    }


def _read_argument(record: Json) -> Any:
    return decode(record) if "scalar" in record else read_array(record, "arguments")
