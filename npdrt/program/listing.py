"""A program as text, as JSON values, and beside another one.

Every value has a name that is its alone: the one it was given, `w'` for what replaces `w`, `|w|`
and `w.T` for a norm and a transpose, `s%68` for the `s` that call 68 makes where several are
called so, else `%68`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from npdrt.program.calls import Call, Draw, Fixed, Ref, Value, flops, traffic
from npdrt.program.recording import Recording
from npdrt.program.tree import leaves

FORMAT = 1  # of `as_json`
DERIVED = {"norm": "|{}|", "matrix_transpose": "{}.T"}  # names of results with none of their own
CALL_WIDTH = 72  # columns of a call, before the numbers move to the right


# --- names ------------------------------------------------------------------------------------


def names(program: Recording) -> dict[int, str]:
    """A name for every value, by index; no two are equal."""
    found = _given_names(program)
    used, homes = set(found.values()), program.replaced
    wanted = {i: f"{found[home]}'" for i, home in homes.items()}
    for call in program.calls:
        if program.values[call.result].name:
            wanted.setdefault(call.result, program.values[call.result].name)
    shared = Counter([*used, *wanted.values()])
    for number, call in enumerate(program.calls):
        name = wanted.get(call.result, "")
        if name and shared[name] > 1:
            name += f"%{number}"
        elif not name and call.function in DERIVED:
            of = found[call.refs[0]]
            name = "" if "%" in of else DERIVED[call.function].format(of)
        while not name or name in used:  # the second time only where a label looks like a number
            name += f"%{number}"
        used.add(name)
        found[call.result] = name
    return found


def _given_names(program: Recording) -> dict[int, str]:
    """Names of inputs, draws and constants: the whole path where the last key is not enough."""
    values, found = program.values, {}
    count = Counter(values[i].name for i in (*program.inputs.values(), *program.draws))
    for path, i in program.inputs.items():
        name = values[i].name
        found[i] = name if name and count[name] == 1 else "/".join(path)
    for i in program.draws:
        name = values[i].name
        found[i] = name if count[name] == 1 else f"{name}#{i}"
    for number, i in enumerate(program.constants):
        found[i] = f"${number}"
    twice = {name for name, n in Counter(found.values()).items() if n > 1}
    return {i: f"{name}#{i}" if name in twice else name for i, name in found.items()}


def form(value: Value) -> str:
    """A value's dtype and shape: "float32[4, 3]"."""
    return f"{value.dtype}{list(value.shape)}"


def written(item: Any, name: Callable[[int], str]) -> str:
    """An argument as the listing shows it."""
    if isinstance(item, Ref):
        return name(item.index)
    if isinstance(item, slice):
        step = "" if item.step is None else f":{item.step}"
        return ":".join("" if x is None else str(x) for x in (item.start, item.stop)) + step
    if isinstance(item, tuple | list):
        inner = ", ".join(written(part, name) for part in item)
        return f"({inner},)" if len(item) == 1 else f"({inner})"
    return item if isinstance(item, str) else "..." if item is ... else repr(item)


def _written_call(call: Call, name: Callable[[int], str]) -> str:
    parts = [written(x, name) for x in call.args]
    parts += [f"{key}={written(x, name)}" for key, x in call.settings.items()]
    return f"{call.function}({', '.join(parts)})"


def _written_draw(draw: Draw) -> str:
    parts = [written(x, str) for x in draw.args]
    parts += [f"{key}={written(x, str)}" for key, x in draw.settings.items()]
    steps = [f"{method}({argument})" for method, argument in draw.lineage]
    return ".".join(["/".join(draw.stream.path), *steps, f"{draw.method}({', '.join(parts)})"])


# --- totals -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Total:
    """What some calls come to: how many, floating-point operations, bytes read and written."""

    calls: int = 0
    flops: int = 0
    bytes: int = 0

    def __add__(self, other: Total) -> Total:
        sums = self.calls + other.calls, self.flops + other.flops, self.bytes + other.bytes
        return Total(*sums)


def totals(program: Recording) -> dict[str, Total]:
    """By phase, in order of appearance; see `npdrt.program.calls.flops` and `traffic`."""
    found: dict[str, Total] = {}
    for call in program.calls:
        one = Total(1, flops(call, program.values), traffic(call, program.values))
        found[call.phase] = found.get(call.phase, Total()) + one
    return found


# --- text -------------------------------------------------------------------------------------


def listing(program: Recording) -> str:
    """The program as text: inputs, numbered calls by phase, outputs, totals.

    A call reads `name  dtype[shape]  call(arguments)  FLOP  bytes  source`. A view has 0 bytes.
    """
    name = names(program)
    blocks = [_inputs(program, name), *_phases(program, name)]
    blocks += [_outputs(program, name), _totals(program)]
    return "\n\n".join(block for block in blocks if block)


def _inputs(program: Recording, name: dict[int, str]) -> str:
    """Inputs, draws and constants, and what is fixed."""
    values = program.values
    rows = [(name[i], form(values[i]), "") for i in program.inputs.values()]
    rows += [(name[i], form(values[i]), _written_draw(d)) for i, d in program.draws.items()]
    for i, x in program.constants.items():
        known = str(x.tolist()) if x.size <= 8 else "too long to be shown"
        rows.append((name[i], form(values[i]), f"constant: {known}"))
    for path, kept in program.signature.items():
        if isinstance(kept, Fixed):
            rows.append(("/".join(path), "fixed", repr(kept.value)))
    return "inputs\n" + _table(rows)


def _phases(program: Recording, name: dict[int, str]) -> Iterator[str]:
    """A block of calls for every run of calls of one phase."""
    rows = [_row(program, name, number) for number in range(len(program.calls))]
    widths = [min(max(map(len, column)), CALL_WIDTH) for column in zip(*rows, strict=True)]
    start = 0
    for number, call in enumerate(program.calls, 1):
        if number == len(program.calls) or program.calls[number].phase != call.phase:
            lines = [_aligned(row, widths, right=(0, 4, 5)) for row in rows[start:number]]
            yield "\n".join([call.phase, *lines])
            start = number


def _row(program: Recording, name: dict[int, str], number: int) -> tuple[str, ...]:
    call, values = program.calls[number], program.values
    return (
        str(number),
        name[call.result],
        form(values[call.result]),
        _written_call(call, name.__getitem__),
        f"{flops(call, values):,} FLOP",
        f"{traffic(call, values):,} B",
        call.source,
    )


def _outputs(program: Recording, name: dict[int, str]) -> str:
    """Path in the result, value, form; what is no array as it is."""
    rows = []
    for path, x in leaves(program.result):
        if isinstance(x, Ref):
            rows.append(("/".join(path) or "result", f"= {name[x.index]}", _form(program, x)))
        else:
            rows.append(("/".join(path) or "result", f"= {x!r}", "fixed"))
    return "outputs\n" + _table(rows) if rows else ""


def _form(program: Recording, x: Ref) -> str:
    return form(program.values[x.index])


def _totals(program: Recording) -> str:
    by_phase = totals(program)
    rows = [("totals", "calls", "FLOP", "bytes")]
    for phase, t in {**by_phase, "all": sum(by_phase.values(), Total())}.items():
        rows.append((f"  {phase}", f"{t.calls:,}", f"{t.flops:,}", f"{t.bytes:,}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(_aligned(row, widths, (1, 2, 3), indent="") for row in rows)


def _table(rows: list[tuple[str, str, str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(_aligned(row, widths) for row in rows)


def _aligned(
    row: tuple[str, ...], widths: list[int], right: tuple[int, ...] = (), indent: str = "  "
) -> str:
    cells = [
        cell.rjust(width) if i in right else cell.ljust(width)
        for i, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]
    return (indent + "  ".join(cells)).rstrip()


# --- JSON -------------------------------------------------------------------------------------


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


def as_json(program: Recording) -> dict[str, Any]:
    """What `listing` says, as JSON values; docs/programs.md describes them."""
    name, by_phase = names(program), totals(program)
    everything = {**by_phase, "all": sum(by_phase.values(), Total())}
    homes = program.replaced
    return {
        "listing": FORMAT,
        "inputs": list(_json_inputs(program, name)),
        "calls": [_json_call(program, name, n) for n in range(len(program.calls))],
        "outputs": [
            {
                "path": list(path),
                **_json_value(program, name, i),
                "replaces": name[homes[i]] if i in homes else None,
            }
            for path, i in program.outputs.items()
        ],
        "totals": {phase: vars(total) for phase, total in everything.items()},
    }


def _json_value(program: Recording, name: dict[int, str], i: int) -> dict[str, Any]:
    value = program.values[i]
    return {"name": name[i], "dtype": value.dtype, "shape": list(value.shape)}


def _json_inputs(program: Recording, name: dict[int, str]) -> Iterator[dict[str, Any]]:
    for path, i in program.inputs.items():
        yield {**_json_value(program, name, i), "origin": "input", "path": list(path)}
    for i, draw in program.draws.items():
        more = {"origin": "random", "drawn": _written_draw(draw)}
        yield {**_json_value(program, name, i), **more}
    for i in program.constants:
        yield {**_json_value(program, name, i), "origin": "constant"}


def _json_call(program: Recording, name: dict[int, str], number: int) -> dict[str, Any]:
    call, values = program.calls[number], program.values
    base = values[call.result].base
    return {
        "number": number,
        **_json_value(program, name, call.result),
        "function": call.function,
        "arguments": encoded(call.args, name.__getitem__),
        "settings": {key: encoded(x, name.__getitem__) for key, x in call.settings.items()},
        "view_of": None if base is None else name[base],
        "phase": call.phase,
        "flops": flops(call, values),
        "bytes": traffic(call, values),
        "source": call.source,
    }


# --- two programs -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """The first difference of two programs.

    number: of the call, None where the calls are the same and something else differs. what: as in
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
    """The first call in which two programs differ, else the first input, draw or output; None
    where they are the same.

    Sources, phases and names of values do not count: an input is known by its place in the
    arguments, the result of a call by the call's number. context: calls shown before it.
    """
    same_a, same_b = _identities(a), _identities(b)
    for number, (x, y) in enumerate(zip_longest(a.calls, b.calls)):
        found = _call_difference(_facts(a, x, same_a), _facts(b, y, same_b))
        if found:
            return _explained(a, b, number, found, context)
    for key, x, y in _paired(_frame(a, same_a), _frame(b, same_b)):
        if x != y:
            text = f"the calls are the same; {key} differs\nA  {x}\nB  {y}"
            return Difference(None, key, x, y, text)
    return None


def _identities(program: Recording) -> dict[int, str]:
    """What a value is, in words that mean the same in another program."""
    place = {name: str(k) for k, name in enumerate(program.parameters)}
    found = {i: "/".join((place[p[0]], *p[1:])) for p, i in program.inputs.items()}
    found |= {i: f"draw {k}" for k, i in enumerate(program.draws)}
    for i, x in program.constants.items():
        found[i] = f"constant {x.dtype} {x.shape} {x.tobytes().hex()}"
    return found | {call.result: f"%{number}" for number, call in enumerate(program.calls)}


def _facts(program: Recording, call: Call | None, same: dict[int, str]) -> dict[str, str]:
    """Everything about a call that counts, in the order in which differences are reported."""
    if call is None:
        return {}
    value = program.values[call.result]
    facts = {"function": call.function, "number of arguments": str(len(call.args))}
    for k, x in enumerate(call.args):
        facts[f"argument {k}"] = _canonical(x, same)
    for key in sorted(call.settings):
        facts[f"setting {key}"] = _canonical(call.settings[key], same)
    return {**facts, "shape": str(list(value.shape)), "dtype": value.dtype}


def _canonical(item: Any, same: dict[int, str]) -> str:
    return json.dumps(encoded(item, same.__getitem__), sort_keys=True, default=repr)


def _paired(x: dict[str, str], y: dict[str, str]) -> Iterator[tuple[str, str, str]]:
    for key in dict.fromkeys((*x, *y)):
        yield key, x.get(key, "nothing"), y.get(key, "nothing")


def _call_difference(x: dict[str, str], y: dict[str, str]) -> tuple[str, str, str] | None:
    if not (x and y):
        return "length", "a call" if x else "no more calls", "a call" if y else "no more calls"
    return next((found for found in _paired(x, y) if found[1] != found[2]), None)


def _frame(program: Recording, same: dict[int, str]) -> dict[str, str]:
    """What counts beside the calls: arguments, draws, results."""
    facts = {}
    place = {name: str(k) for k, name in enumerate(program.parameters)}
    for path, kept in program.signature.items():
        key = "input " + "/".join((place[path[0]], *path[1:]))
        facts[key] = form(program.values[kept.index]) if isinstance(kept, Ref) else "a stream"
        facts[key] = f"fixed {kept.value!r}" if isinstance(kept, Fixed) else facts[key]
    for k, (i, draw) in enumerate(program.draws.items()):
        facts[f"draw {k}"] = f"{form(program.values[i])} {_written_draw(draw)}"
    for path, x in leaves(program.result):
        key = "output " + "/".join(path)
        facts[key] = same[x.index] if isinstance(x, Ref) else repr(x)
    return facts


def _explained(
    a: Recording, b: Recording, number: int, found: tuple[str, str, str], context: int
) -> Difference:
    """A difference of calls with the calls before it, as A names them."""
    start = max(number - context, 0)
    names_a, names_b = names(a), names(b)
    rows = [(" ", *_row(a, names_a, n)[:4]) for n in range(start, number)]
    here = []
    for mark, program, name in (("A", a, names_a), ("B", b, names_b)):
        end = number >= len(program.calls)
        row = ("", "", "", "no more calls") if end else _row(program, name, number)
        here.append((mark, *(row[:4]), "" if end else row[6]))
    rows_all = [*((*row, "") for row in rows), *here]
    widths = [max(map(len, column)) for column in zip(*rows_all, strict=True)]
    lines = [_aligned(row, widths, right=(1,), indent="") for row in rows_all]
    what, x, y = found
    head = f"the first difference is in call {number}: {what}"
    return Difference(number, what, x, y, "\n".join([head, "", *lines, "", f"A  {x}", f"B  {y}"]))
