"""The first difference of two programs."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from npdrt.program.calls import Call, Fixed, Ref
from npdrt.program.file import encoded
from npdrt.program.listing import form, names, row, table, written_draw
from npdrt.program.recording import Recording
from npdrt.program.tree import Path, leaves

Facts = dict[str, str]  # in the order in which differences are reported
NO_CALL = {"length": "no more calls"}


@dataclass(frozen=True)
class Difference:
    """The first difference of two programs.

    number: of the call; None if the calls are the same and something else differs. what: such as
    "function", "argument 1", "setting axis", "shape", "dtype", "length", "input x", "output 0".
    a, b: what each has there. text: for a person, with the calls before it.
    """

    number: int | None
    what: str
    a: str
    b: str
    text: str

    def __str__(self) -> str:
        return self.text


def compare(a: Recording, b: Recording, *, context: int = 3) -> Difference | None:
    """The first call in which two programs differ, else the first input, draw or output; None if
    they are the same.

    Sources, phases and names of values do not count: an input is known by its place in the
    arguments, the result of a call by the call's number. context: calls shown before it.
    """
    same_a, same_b = _identities(a), _identities(b)
    calls_a, calls_b = ([_facts(p, call, same) for call in p.calls]
                        for p, same in ((a, same_a), (b, same_b)))  # fmt: skip
    for number, both in enumerate(zip_longest(calls_a, calls_b, fillvalue=NO_CALL)):
        if found := _first(*both):
            what, x, y = found
            head = f"the first difference is in call {number}: {what}"
            lines = [head, "", *_context(a, b, number, context), "", f"A  {x}", f"B  {y}"]
            return Difference(number, what, x, y, "\n".join(lines))
    if found := _first(_frame(a, same_a), _frame(b, same_b)):
        what, x, y = found
        text = f"the calls are the same; {what} differs\nA  {x}\nB  {y}"
        return Difference(None, what, x, y, text)
    return None


def _first(x: Facts, y: Facts) -> tuple[str, str, str] | None:
    """The first fact that differs, and what each program has there."""
    pairs = ((key, x.get(key, "nothing"), y.get(key, "nothing")) for key in {**x, **y})
    return next((pair for pair in pairs if pair[1] != pair[2]), None)


def _identities(program: Recording) -> dict[int, str]:
    """A name for each value that means the same in another program."""
    found = {i: _place(program, path) for path, i in program.inputs.items()}
    found |= {i: f"draw {k}" for k, i in enumerate(program.draws)}
    for i, x in program.constants.items():
        found[i] = f"constant {x.dtype} {x.shape} {hashlib.sha256(x.tobytes()).hexdigest()}"
    return found | {call.result: f"%{number}" for number, call in enumerate(program.calls)}


def _place(program: Recording, path: Path) -> str:
    """A path in the arguments, with the number of the parameter in the place of its name."""
    return "/".join((str(program.parameters.index(path[0])), *path[1:]))


def _facts(program: Recording, call: Call, same: dict[int, str]) -> Facts:
    """Everything about a call that counts."""

    def canonical(item: Any) -> str:
        return json.dumps(encoded(item, same.__getitem__), sort_keys=True, default=repr)

    value = program.values[call.result]
    return {
        "length": "a call",
        "function": call.function,
        "number of arguments": str(len(call.args)),
        **{f"argument {k}": canonical(x) for k, x in enumerate(call.args)},
        **{f"setting {key}": canonical(call.settings[key]) for key in sorted(call.settings)},
        "shape": str(list(value.shape)),
        "dtype": value.dtype,
    }


def _frame(program: Recording, same: dict[int, str]) -> Facts:
    """The facts that count apart from the calls: arguments, draws, results."""
    facts = {}
    for path, kept in program.signature.items():
        shown = form(program.values[kept.index]) if isinstance(kept, Ref) else "a stream"
        shown = f"fixed {kept.value!r}" if isinstance(kept, Fixed) else shown
        facts[f"input {_place(program, path)}"] = shown
    for k, (i, draw) in enumerate(program.draws.items()):
        facts[f"draw {k}"] = f"{form(program.values[i])} {written_draw(draw)}"
    for path, x in leaves(program.result):
        facts["output " + "/".join(path)] = same[x.index] if isinstance(x, Ref) else repr(x)
    return facts


def _context(a: Recording, b: Recording, number: int, count: int) -> list[str]:
    """Call `number` of both programs, after the calls before it, which are the same."""
    names_a = names(a)
    rows = [_shown(" ", a, names_a, n) for n in range(max(number - count, 0), number)]
    rows += [_shown("A", a, names_a, number), _shown("B", b, names(b), number)]
    return table(rows, right=(1,), indent="")


def _shown(mark: str, program: Recording, name: dict[int, str], number: int) -> tuple[str, ...]:
    if number >= len(program.calls):
        return mark, "", "", "", "no more calls", ""
    *cells, _, _, source = row(program, name, number)
    return mark, *cells, source if mark.strip() else ""
