"""A program as text and as JSON values.

Every value has a name that is its alone: the one it was given, `w'` for what replaces `w`, `|w|`
and `w.T` for a norm and a transpose, `s%68` for the `s` that call 68 makes where several are
called so, else `%68`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from npdrt.program.calls import Call, Draw, Fixed, Ref, Value, flops, traffic
from npdrt.program.file import content
from npdrt.program.recording import Recording
from npdrt.program.tree import leaves

FORMAT = 2  # of `as_json`
DERIVED = {"norm": "|{}|", "matrix_transpose": "{}.T"}  # names of results with none of their own
CALL_WIDTH = 72  # columns of a call, before the numbers move to the right


# --- names ------------------------------------------------------------------------------------


def names(program: Recording) -> dict[int, str]:
    """A name for every value, by index; no two are equal.

    The result of a call has the first name of these: "w'" if it replaces the input w, the label
    that the source gave it, what its call makes of a named value ("|w|"), none. If another value
    has that name too, or there is none, the number of the call is added.
    """
    found = _given_names(program)
    labels = {call.result: program.values[call.result].name for call in program.calls}
    labels |= {new: f"{found[old]}'" for new, old in program.replaced.items()}
    count = Counter([*found.values(), *labels.values()])
    used = set(found.values())
    for number, call in enumerate(program.calls):
        name = labels[call.result] or _derived_name(call, found)
        if count[name] > 1:
            name += f"%{number}"
        while not name or name in used:  # the second time only where a label looks like a number
            name += f"%{number}"
        used.add(name)
        found[call.result] = name
    return found


def _derived_name(call: Call, found: dict[int, str]) -> str:
    """The name of a norm or transpose of a named value, or ""."""
    of = found[call.refs[0]] if call.function in DERIVED else "%"
    return "" if "%" in of else DERIVED[call.function].format(of)


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


def written_draw(draw: Draw) -> str:
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
    rows += [(name[i], form(values[i]), written_draw(d)) for i, d in program.draws.items()]
    for i, x in program.constants.items():
        known = str(x.tolist()) if x.size <= 8 else "too long to be shown"
        rows.append((name[i], form(values[i]), f"constant: {known}"))
    for path, kept in program.signature.items():
        if isinstance(kept, Fixed):
            rows.append(("/".join(path), "fixed", repr(kept.value)))
    return "inputs\n" + _table(rows)


def _phases(program: Recording, name: dict[int, str]) -> Iterator[str]:
    """A block of calls for every run of calls of one phase."""
    rows = [row(program, name, number) for number in range(len(program.calls))]
    widths = [min(max(map(len, column)), CALL_WIDTH) for column in zip(*rows, strict=True)]
    start = 0
    for number, call in enumerate(program.calls, 1):
        if number == len(program.calls) or program.calls[number].phase != call.phase:
            lines = [aligned(row, widths, right=(0, 4, 5)) for row in rows[start:number]]
            yield "\n".join([call.phase, *lines])
            start = number


def row(program: Recording, name: dict[int, str], number: int) -> tuple[str, ...]:
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
    return "\n".join(aligned(row, widths, (1, 2, 3), indent="") for row in rows)


def _table(rows: list[tuple[str, str, str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(aligned(row, widths) for row in rows)


def aligned(
    row: tuple[str, ...], widths: list[int], right: tuple[int, ...] = (), indent: str = "  "
) -> str:
    cells = [
        cell.rjust(width) if i in right else cell.ljust(width)
        for i, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]
    return (indent + "  ".join(cells)).rstrip()


# --- JSON -------------------------------------------------------------------------------------


def as_json(program: Recording) -> dict[str, Any]:
    """What `listing` says, as JSON values: those of the program's file, and what a listing adds.

    Every value has its unique name, a call its costs; `replaced` pairs outputs with the inputs that
    they replace. docs/programs.md describes them.
    """
    found, name, by_phase = content(program), names(program), totals(program)
    for i, value in enumerate(found["values"]):
        value["name"] = name[i]
    for call, stored in zip(program.calls, found["calls"], strict=True):
        stored["flops"] = flops(call, program.values)
        stored["bytes"] = traffic(call, program.values)
    everything = {**by_phase, "all": sum(by_phase.values(), Total())}
    return {
        "listing": FORMAT,
        **found,
        "replaced": [list(pair) for pair in program.replaced.items()],
        "totals": {phase: vars(total) for phase, total in everything.items()},
    }
