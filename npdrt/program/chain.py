"""A chain of elementwise calls as the expressions of a loop, for two compilers.

`npdrt.program.fused` writes them for numba, `npdrt.program.kernels` for CUDA. Both compute what
NumPy computes, call by call, on one element.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from npdrt.program.calls import Call, Ref, Value


class Language(NamedTuple):
    """How a compiler's language writes a call.

    cast(name, dtype, wanted): a variable of a dtype in another, or in the same. literal(number,
    wanted): a Python number. apply(function, operands, dtype): a function of operands of a dtype.
    """

    cast: Callable[[str, str, str], str]
    literal: Callable[[Any, str], str]
    apply: Callable[[str, list[str], str], str]


def read_by(calls: list[Call]) -> list[int]:
    """The values a chain reads and does not make."""
    made = {call.result for call in calls}
    return list(dict.fromkeys(i for call in calls for i in call.refs if i not in made))


def computed_in(call: Call, values: list[Value]) -> str:
    """The dtype of a call's operands; a Python number takes that of the arrays."""
    if call.function in ("astype", "copy", "where"):
        return values[call.result].dtype
    operands = (np.dtype(values[x.index].dtype) if isinstance(x, Ref) else x for x in call.args)
    return str(np.result_type(*operands).name)


def expression(call: Call, values: list[Value], names: dict[int, str], language: Language) -> str:
    """A call on one element, every operand in the dtype that NumPy computes in."""
    dtype = computed_in(call, values)

    def operand(x: Any, wanted: str) -> str:
        if isinstance(x, Ref):
            return language.cast(names[x.index], values[x.index].dtype, wanted)
        return language.literal(x, wanted)

    if call.function in ("astype", "copy"):
        return operand(call.args[0], dtype)
    wanted = ["bool", dtype, dtype] if call.function == "where" else [dtype] * len(call.args)
    operands = [operand(x, w) for x, w in zip(call.args, wanted, strict=True)]
    return language.apply(call.function, operands, dtype)
