"""A program as text and as JSON values.

Every value has a unique name: the one it was given, `w'` for the value that replaces `w`, `|w|` and
`w.T` for a norm and a transpose, `s%68` for the `s` that call 68 makes if several values are called
`s`, else `%68`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
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
        while not name or name in used:  # a second time only if a label looks like a number
            name += f"%{number}"
        used.add(name)
        found[call.result] = name
    return found


def _derived_name(call: Call, found: dict[int, str]) -> str:
    """The name of a norm or transpose of a named value, or ""."""
    of = found[call.refs[0]] if call.function in DERIVED else "%"
    return "" if "%" in of else DERIVED[call.function].format(of)


def _given_names(program: Recording) -> dict[int, str]:
    """Names of inputs, draws and constants: the whole path if the last key is not unique."""
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
    """A draw as the listing shows it: "random.of(dropout).bernoulli((2, 3), 0.5)"."""
    parts = [written(x, str) for x in draw.args]
    parts += [f"{key}={written(x, str)}" for key, x in draw.settings.items()]
    steps = [f"{method}({argument})" for method, argument in draw.lineage]
    return ".".join(["/".join(draw.stream.path), *steps, f"{draw.method}({', '.join(parts)})"])


# --- totals -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Total:
    """The cost of some calls: their number, floating-point operations, bytes read and written."""

    calls: int = 0
    flops: int = 0
    bytes: int = 0

    def __add__(self, other: Total) -> Total:
        sums = self.calls + other.calls, self.flops + other.flops, self.bytes + other.bytes
        return Total(*sums)


def totals(program: Recording) -> dict[str, Total]:
    """By phase, in order of appearance, then of "all"; see `npdrt.program.calls`."""
    found: dict[str, Total] = {}
    for call in program.calls:
        one = Total(1, flops(call, program.values), traffic(call, program.values))
        found[call.phase] = found.get(call.phase, Total()) + one
    return {**found, "all": sum(found.values(), Total())}


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
    """Inputs, draws, constants and fixed leaves."""
    values = program.values
    rows = [(name[i], form(values[i]), "") for i in program.inputs.values()]
    rows += [(name[i], form(values[i]), written_draw(d)) for i, d in program.draws.items()]
    for i, x in program.constants.items():
        known = str(x.tolist()) if x.size <= 8 else "too long to be shown"
        rows.append((name[i], form(values[i]), f"constant: {known}"))
    for path, kept in program.signature.items():
        if isinstance(kept, Fixed):
            rows.append(("/".join(path), "fixed", repr(kept.value)))
    return "inputs\n" + "\n".join(table(rows))


def _phases(program: Recording, name: dict[int, str]) -> Iterator[str]:
    """A block of calls for every run of calls of one phase."""
    rows = [row(program, name, number) for number in range(len(program.calls))]
    lines = iter(table(rows, right=(0, 4, 5), limit=CALL_WIDTH))
    for phase, calls in groupby(program.calls, key=lambda call: call.phase):
        yield "\n".join([phase, *(next(lines) for _ in calls)])


def row(program: Recording, name: dict[int, str], number: int) -> tuple[str, ...]:
    """The cells of a call: number, name, form, call, FLOP, bytes, source."""
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
    """Path in the result, value, form; a leaf that is not an array as it is."""
    rows = []
    for path, x in leaves(program.result):
        if isinstance(x, Ref):
            cells = f"= {name[x.index]}", form(program.values[x.index])
        else:
            cells = f"= {x!r}", "fixed"
        rows.append(("/".join(path) or "result", *cells))
    return "outputs\n" + "\n".join(table(rows)) if rows else ""


def _totals(program: Recording) -> str:
    rows = [("totals", "calls", "FLOP", "bytes")]
    for phase, t in totals(program).items():
        rows.append((f"  {phase}", f"{t.calls:,}", f"{t.flops:,}", f"{t.bytes:,}"))
    return "\n".join(table(rows, right=(1, 2, 3), indent=""))


def table(
    rows: Sequence[tuple[str, ...]],
    right: tuple[int, ...] = (),
    indent: str = "  ",
    limit: int | None = None,
) -> list[str]:
    """Rows of cells as lines of aligned columns.

    right: the columns that end at the right. limit: the largest width of a column; a longer cell
    moves the rest of its line to the right.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        sides = (str.rjust if k in right else str.ljust for k in range(len(row)))
        cells = (side(cell, min(width, limit or width))
                 for side, cell, width in zip(sides, row, widths, strict=True))  # fmt: skip
        lines.append((indent + "  ".join(cells)).rstrip())
    return lines


# --- JSON -------------------------------------------------------------------------------------


def as_json(program: Recording) -> dict[str, Any]:
    """The listing as JSON values: those of the program's file, with names and costs.

    Every value has its unique name, a call its costs; `replaced` pairs outputs with the inputs that
    they replace. docs/programs.md describes them.
    """
    found, name = content(program), names(program)
    for i, value in enumerate(found["values"]):
        value["name"] = name[i]
    for call, stored in zip(program.calls, found["calls"], strict=True):
        stored["flops"] = flops(call, program.values)
        stored["bytes"] = traffic(call, program.values)
    return {
        "listing": FORMAT,
        **found,
        "replaced": [list(pair) for pair in program.replaced.items()],
        "totals": {phase: vars(total) for phase, total in totals(program).items()},
    }
