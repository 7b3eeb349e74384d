"""The plan of a program: in which order its calls run, in which groups, and in whose memory.

Calls run in recorded order, but those of the update as soon as their gradient exists, so that
gradients need not all live at once. Elementwise calls on one shape that follow each other form a
chain, which runs block by block in cache; a value only a chain sees has no more than a block.
Every other value has a buffer from its first to its last use, and buffers are used again. A new
parameter lands in the memory of the old one, which it replaces: in place where the old value dies
there, by a copy once nothing reads it any more where it does not.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from npdrt.program.calls import Call, Ref, Value
from npdrt.program.tree import Path

# These may write over an argument: each element of the result depends on that element alone, and
# NumPy makes one pass. (`where` takes several.)
IN_PLACE = (
    *("add", "subtract", "multiply", "divide", "negative", "sqrt", "abs", "maximum", "minimum"),
    *("exp", "log", "log1p", "tanh", "power", "square", "clip"),
)
ALIGNMENT = 64  # bytes
LARGE = 1024  # elements; a shorter array is not worth a chain


@dataclass(frozen=True, slots=True)
class Group:
    """Calls that run together: one call, or a chain of elementwise calls on one shape.

    slots: for every result that lives only inside the chain, the block buffer it uses.
    """

    calls: tuple[int, ...]
    chain: bool = False
    slots: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Plan:
    """What `make_plan` decides.

    calls: those of the program, and the copies that land outputs in the memory of inputs.
    constants: calls whose results never change; they run once. groups: the rest, in the order
    they run. scratch: byte offset of every value that has a buffer in the scratch memory, of
    `scratch_bytes` in all. landed: outputs that a call writes into the memory of an input, and
    which input; returned: these and the outputs that are copied there. slots: block buffers that
    the largest chain needs.
    """

    calls: list[Call]
    constants: list[int]
    groups: list[Group]
    scratch: dict[int, int]
    scratch_bytes: int
    landed: dict[int, int]
    returned: dict[int, int]
    slots: int


def make_plan(
    values: list[Value],
    calls: list[Call],
    inputs: dict[Path, int],
    outputs: dict[Path, int],
    fusable: Iterable[str],
) -> Plan:
    """The plan of a program; fusable: the elementwise functions that may be in a chain."""
    return _Planner(values, calls, inputs, outputs, frozenset(fusable)).plan()


class _Planner:
    """The decisions of `make_plan`, one after another."""

    def __init__(
        self,
        values: list[Value],
        calls: list[Call],
        inputs: dict[Path, int],
        outputs: dict[Path, int],
        fusable: frozenset[str],
    ):
        self.values, self.calls, self.fusable = values, list(calls), fusable
        self.inputs, self.outputs = inputs, outputs
        self.roots = [i if v.base is None else v.base for i, v in enumerate(values)]
        self.output_roots = {self.roots[i] for i in outputs.values()}
        self.needed = self._needed()
        self.constants = self._constants()
        constant = set(self.constants)
        self.running = [c for c in self.needed if c not in constant]
        self.readers: dict[int, list[int]] = defaultdict(list)
        for c in self.running:
            for root in self._reads(c):
                self.readers[root].append(c)

    def _reads(self, c: int) -> set[int]:
        return {self.roots[i] for i in self.calls[c].refs}

    def _made(self, c: int) -> bool:
        """Whether a call makes its result; the copy that lands an output only overwrites one."""
        return self.values[self.calls[c].result].origin == "call"

    def _needed(self) -> list[int]:
        """The calls, views left out, that some output depends on."""
        wanted, needed = set(self.output_roots), []
        for c in reversed(range(len(self.calls))):
            call = self.calls[c]
            if call.kind != "view" and call.result in wanted:
                needed.append(c)
                wanted |= self._reads(c)
        return needed[::-1]

    def _constants(self) -> list[int]:
        """Calls that depend on no input. What an `assign` starts from is made anew every time."""
        started = {self.roots[self.calls[c].refs[0]] for c in self.needed
                   if self.calls[c].function == "assign"}  # fmt: skip
        known = {i for i, v in enumerate(self.values) if v.origin == "constant"}
        constants = []
        for c in self.needed:
            if self._reads(c) <= known and self.calls[c].result not in started:
                known.add(self.calls[c].result)
                constants.append(c)
        return constants

    def plan(self) -> Plan:
        """Everything together."""
        landed, returned, after = self._landings()
        order = self._schedule(after)
        groups = self._grouped(order, landed)
        scratch, scratch_bytes, groups = self._buffers(groups, landed)
        slots = max((1 + slot for g in groups for _, slot in g.slots), default=0)
        return Plan(
            self.calls, self.constants, groups, scratch, scratch_bytes, landed, returned, slots
        )

    # --- outputs in the memory of inputs -----------------------------------------------------

    def _landings(self) -> tuple[dict[int, int], dict[int, int], dict[int, set[int]]]:
        """Which outputs replace inputs in place, and at all; and for calls that write there, the
        calls that must run before because they read the old value."""
        landed: dict[int, int] = {}
        returned: dict[int, int] = {}
        after: dict[int, set[int]] = {}
        writer = {self.calls[c].result: c for c in self.running}
        for output, home in self._pairs():
            if output in returned:
                continue
            c, returned[output] = writer.get(output), home
            others = set(self.readers[home]) - {c}
            if c is not None and self._replaces(c, home, others):
                landed[output], after[c] = home, others
                continue
            copy = len(self.calls)
            self.calls.append(Call("copy", (Ref(output),), home, {}, "update"))
            self.running.append(copy)
            self.readers[self.roots[output]].append(copy)
            after[copy] = set(self.readers[home]) - {copy}
        lasting = {self.roots[i] for i in self.outputs.values() if i not in returned}
        self.output_roots -= returned.keys() - landed.keys() - lasting
        return landed, returned, after

    def _pairs(self) -> list[tuple[int, int]]:
        """(output, input it replaces): the same form, and the same end of the path."""
        pairs, taken = [], set(self.output_roots)
        candidates: dict[tuple[object, ...], list[tuple[Path, int]]] = defaultdict(list)
        for path, i in self.inputs.items():
            value = self.values[i]
            candidates[path[-1:], value.shape, value.dtype].append((path, i))
        for path, i in self.outputs.items():
            value = self.values[i]
            found = [
                (_common_end(path, p), -home, home)
                for p, home in candidates[path[-1:], value.shape, value.dtype]
                if home not in taken
            ]
            if found and value.base is None and value.contiguous and value.origin == "call":
                home = max(found)[2]
                taken.add(home)
                pairs.append((i, home))
        return pairs

    def _replaces(self, c: int, home: int, others: set[int]) -> bool:
        """Whether call c can write its result over the input `home`."""
        call = self.calls[c]
        if any(other > c for other in others):
            return False  # a later call reads the old value, and may need the new one for it
        reads = [i for i in call.refs if self.roots[i] == home]
        return not reads or (call.function in IN_PLACE and set(reads) == {home})

    # --- order -------------------------------------------------------------------------------

    def _schedule(self, after: dict[int, set[int]]) -> list[int]:
        """The order of the calls: as recorded up to the update; the calls of the update, each as
        late as its results need it, and these as early as the gradients allow."""
        writer = {self.calls[c].result: c for c in self.running if self._made(c)}
        needs = {
            c: {writer[root] for root in self._reads(c) if root in writer} | after.get(c, set())
            for c in self.running
        }
        update = (c for c in self.running if self.calls[c].phase == "update")
        first = next(update, len(self.calls))
        ready: dict[int, int] = {}  # after which call of the forward or backward pass it can run
        for c in self.running:
            ready[c] = c if c < first else max((ready[d] for d in needs[c]), default=-1)
        due: dict[int, int] = {}
        for c in reversed(self.running):
            due.setdefault(c, ready[c])
            for d in needs[c]:
                due[d] = min(due.get(d, len(self.calls)), due[c])
        return sorted(self.running, key=lambda c: (c, 0, c) if c < first else (due[c], 1, c))

    # --- chains ------------------------------------------------------------------------------

    def _grouped(self, order: list[int], landed: dict[int, int]) -> list[Group]:
        """Single calls and chains. Calls on scalars move before a chain that does not make them,
        so that it goes on."""
        groups: list[Group] = []
        chain: list[int] = []

        def close() -> None:
            groups.extend(Group(part, chain=True) for part in self._connected(chain, landed))
            chain.clear()

        for c in order:
            results = {self.calls[k].result for k in chain}
            if chain and self._extends(c, chain, results):
                chain.append(c)
            elif chain and self._scalar(c, landed) and not self._reads(c) & results:
                groups.append(Group((c,)))
            else:
                close()
                if self._elementwise(c):
                    chain.append(c)
                else:
                    groups.append(Group((c,)))
        close()
        return groups

    def _connected(self, chain: list[int], landed: dict[int, int]) -> list[tuple[int, ...]]:
        """A chain in parts that have no array in common, read or written over: the updates of two
        parameters, say."""
        leader: dict[int, int] = {}

        def part(i: int) -> int:
            while leader.setdefault(i, i) != i:
                i = leader[i]
            return i

        for c in chain:
            result = self.calls[c].result
            for i in {*self._reads(c), landed.get(result, result)}:
                if self.values[i].shape:
                    leader[part(i)] = part(result)
        parts: dict[int, list[int]] = defaultdict(list)
        for c in chain:
            parts[part(self.calls[c].result)].append(c)
        return [tuple(calls) for calls in parts.values()]

    def _extends(self, c: int, chain: list[int], results: set[int]) -> bool:
        """Whether call c belongs to the chain: the same shape, and what the chain made as it is."""
        first = self.values[self.calls[chain[0]].result]
        if not self._elementwise(c) or self.values[self.calls[c].result].shape != first.shape:
            return False
        return all(self.roots[i] not in results or i in results for i in self.calls[c].refs)

    def _elementwise(self, c: int) -> bool:
        """Whether a call may be in a chain: whole contiguous arrays of one shape, and scalars; no
        element of an array, which an earlier block may have overwritten."""
        call = self.calls[c]
        result = self.values[call.result]
        if call.function not in self.fusable or result.size < LARGE or not result.contiguous:
            return False
        operands = [self.values[i] for i in call.refs]
        alone = all(self.values[self.roots[i]].size == 1 or self.values[i].shape for i in call.refs)
        return (
            alone
            and all(v.shape == () or (v.shape == result.shape and v.contiguous) for v in operands)
            and any(v.shape == result.shape for v in operands)
        )

    def _scalar(self, c: int, landed: dict[int, int]) -> bool:
        """Whether a call makes one number of numbers, and replaces no input."""
        used = (self.calls[c].result, *self.calls[c].refs)
        replaces = self.calls[c].result in landed or not self._made(c)
        return all(self.values[i].size == 1 for i in used) and not replaces

    # --- memory ------------------------------------------------------------------------------

    def _buffers(
        self, groups: list[Group], landed: dict[int, int]
    ) -> tuple[dict[int, int], int, list[Group]]:
        """Offsets in the scratch memory, its size, and the groups with their slots."""
        last = self._last_use(groups)
        space, planned = _Space(), []
        scratch: dict[int, int] = {}
        for number, group in enumerate(groups):
            inside = self._inside(group, number, last)
            group = Group(group.calls, group.chain, self._slots(group, inside))
            planned.append(group)
            dying = [i for i in self._group_reads(group) if last[i] == number and i in scratch]
            for position, c in enumerate(group.calls):
                result = self.calls[c].result
                if result in inside or not self._needs_buffer(result, landed):
                    continue
                heir = self._heir(group, position, dying)
                if heir is not None:
                    dying.remove(heir)
                    scratch[result] = scratch[heir]
                else:
                    scratch[result] = space.take(self.values[result].nbytes)
            for i in dying:
                space.give(scratch[i], self.values[i].nbytes)
        return scratch, space.end, planned

    def _needs_buffer(self, result: int, landed: dict[int, int]) -> bool:
        """Whether a result lives in scratch memory: neither output nor in the place of an input."""
        return (
            result not in self.output_roots
            and result not in landed
            and self.values[result].origin == "call"
        )

    def _group_reads(self, group: Group) -> list[int]:
        """The roots that a group reads, each once, in order."""
        return list(dict.fromkeys(root for c in group.calls for root in sorted(self._reads(c))))

    def _last_use(self, groups: list[Group]) -> dict[int, int]:
        """The group that reads a value last; beyond all groups for outputs."""
        last: dict[int, int] = {}
        for number, group in enumerate(groups):
            for root in self._group_reads(group):
                last[root] = number
        return last | dict.fromkeys(self.output_roots, len(groups))

    def _inside(self, group: Group, number: int, last: dict[int, int]) -> set[int]:
        """The results of a chain that only the chain reads."""
        if not group.chain:
            return set()
        results = {self.calls[c].result for c in group.calls}
        outside = {i for i in results if last.get(i) != number or i in self.output_roots}
        return {i for i in results - outside if self.values[i].origin == "call"}

    def _slots(self, group: Group, inside: set[int]) -> tuple[tuple[int, int], ...]:
        """Which block buffer each result inside a chain uses; a dying argument leaves its own."""
        slots: dict[int, int] = {}
        free: list[int] = []
        used = 0
        for position, c in enumerate(group.calls):
            call = self.calls[c]
            later = {i for k in group.calls[position + 1 :] for i in self.calls[k].refs}
            gone = [i for i in dict.fromkeys(call.refs) if i in slots and i not in later]
            if call.function in IN_PLACE:
                size = self._itemsize(call.result)
                same = [i for i in gone if self._itemsize(i) == size]
                free += [slots[i] for i in same]
                gone = [i for i in gone if i not in same]
            if call.result in inside:
                if free:
                    slots[call.result] = free.pop()
                else:
                    slots[call.result], used = used, used + 1
            free += [slots[i] for i in gone]
        return tuple(slots.items())

    def _itemsize(self, i: int) -> int:
        return np.dtype(self.values[i].dtype).itemsize

    def _heir(self, group: Group, position: int, dying: list[int]) -> int | None:
        """A dying value whose buffer the result of a call can take over."""
        call = self.calls[group.calls[position]]
        result = self.values[call.result]
        later = {i for c in group.calls[position + 1 :] for i in self.calls[c].refs}
        for i in dict.fromkeys(call.refs):
            value = self.values[i]
            fits = (
                i in dying
                and i not in later
                and value.shape == result.shape
                and value.strides == result.strides
                and self._itemsize(i) == self._itemsize(call.result)
                and (call.function in IN_PLACE or (call.function == "assign" and call.refs[0] == i))
            )
            if fits and not self._seen_otherwise(group, i):
                return i
        return None

    def _seen_otherwise(self, group: Group, i: int) -> bool:
        """Whether a group also reads the value i through a view."""
        return any(k != i and self.roots[k] == i for c in group.calls for k in self.calls[c].refs)


def _common_end(a: Path, b: Path) -> int:
    """How many steps two paths share at their end."""
    count = 0
    for x, y in zip(reversed(a), reversed(b), strict=False):
        if x != y:
            break
        count += 1
    return count


class _Space:
    """Offsets in one block of bytes: best fit, neighbours joined when they are given back."""

    def __init__(self) -> None:
        self.end = 0
        self.free: dict[int, int] = {}  # offset -> bytes

    def take(self, nbytes: int) -> int:
        """An offset with room for `nbytes`."""
        size = _rounded(nbytes)
        fitting = [(have, offset) for offset, have in self.free.items() if have >= size]
        if not fitting:
            offset, self.end = self.end, self.end + size
            return offset
        have, offset = min(fitting)
        del self.free[offset]
        if have > size:
            self.free[offset + size] = have - size
        return offset

    def give(self, offset: int, nbytes: int) -> None:
        """Room back."""
        size = _rounded(nbytes)
        if offset + size in self.free:
            size += self.free.pop(offset + size)
        for start, have in self.free.items():
            if start + have == offset:
                self.free[start] = have + size
                return
        self.free[offset] = size


def _rounded(nbytes: int) -> int:
    return max(1, -(-nbytes // ALIGNMENT)) * ALIGNMENT
