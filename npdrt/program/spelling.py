"""Portable functions as the array calls that they are made of, for a plan.

A program lists `portable_exp` as one call. A plan has its 60 elementwise calls, which join the
chain around them and run in cache, or as one compiled loop.
"""

from __future__ import annotations

from dataclasses import fields, replace
from functools import lru_cache
from typing import Any

from npdrt import elementary
from npdrt.program.calls import PORTABLE, Call, Ref, Value
from npdrt.program.recorder import Recorder
from npdrt.program.recording import Recording
from npdrt.program.tree import rebuild


def spelled_out(recording: Recording) -> Recording:
    """The recording with the calls of each portable function of a contiguous array in its place.
    The values that it had keep their numbers."""
    values, calls = list(recording.values), []
    for call in recording.calls:
        calls += _body(call, values) if _can_spell(call, values) else [call]
    kept = {field.name: getattr(recording, field.name) for field in fields(Recording)}
    return Recording(**(kept | {"values": values, "calls": calls}))


def _can_spell(call: Call, values: list[Value]) -> bool:
    if call.function not in PORTABLE:
        return False
    given = values[call.refs[0]]
    return given.contiguous and given.shape != ()


def _body(call: Call, values: list[Value]) -> list[Call]:
    """The calls of a portable function, the last of which makes its result; their other values are
    added to `values`."""
    given = values[call.refs[0]]
    new, body = _recorded(call.function, given.shape, given.dtype)
    numbers = {0: call.refs[0], body[-1].result: call.result}
    for i, value in enumerate(new):
        if i not in numbers:
            numbers[i] = len(values)
            values.append(value)

    def renumbered(x: Any) -> Any:
        return Ref(numbers[x.index]) if isinstance(x, Ref) else x

    return [
        replace(c, args=rebuild(c.args, renumbered), result=numbers[c.result],
                phase=call.phase, source=call.source)
        for c in body
    ]  # fmt: skip


@lru_cache(256)
def _recorded(function: str, shape: tuple[int, ...], dtype: str) -> tuple[list[Value], list[Call]]:
    """Values and calls of a portable function; value 0 is its argument."""
    recorder = Recorder()
    getattr(elementary, function.removeprefix("portable_"))(
        recorder.input(shape, dtype, "", "input")
    )
    return recorder.values, recorder.calls
