"""The plan of a program: in which order its calls run, in which groups, and in whose memory.

`make_plan` takes five decisions, one after another:

1. Which calls run. A view is only another way to look at memory, and a call that no output depends
   on is left out. A call that depends on no input runs once (`constants`).
2. Where an output goes that replaces an input (`Recording.replaced`: the new weight, the old one).
   Its call writes over the input if nothing needs the old value later (`in_place`). If something
   does, the output has memory of its own, and a call that the plan adds copies it back.
3. The order. The forward and backward calls stay as recorded. Each call of the update moves up
   to the forward or backward call after which it can run, so that a gradient lives only until its
   parameter is updated: gradients need not all live at once.
4. The groups. Elementwise calls on one shape that follow each other form a chain, which runs block
   by block in cache.
5. The memory. A value that only its chain reads has a block (`slots`). Every other value has a
   buffer in scratch memory (`scratch`) from its first to its last use, and buffers are used again.

A value is named by its index in `values`, a call by its index in `calls`. A value's root is the
value that owns its memory: memory is planned for roots.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from npdrt.program.calls import Call, Ref
from npdrt.program.recording import Recording

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

    slots: for every result that lives only inside the chain, the block that it uses.
    """

    calls: tuple[int, ...]
    chain: bool = False
    slots: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Plan:
    """What `make_plan` decides.

    calls: those of the program, and the copies of outputs back to the inputs that they replace.
    constants: calls whose results never change; they run once. groups: the rest, in the order
    they run. scratch: byte offset of every value that has a buffer in the scratch memory, of
    `scratch_bytes` in all. in_place: outputs that a call writes into the memory of an input, and
    which input. slots: blocks that the largest chain needs.
    """

    calls: list[Call]
    constants: list[int]
    groups: list[Group]
    scratch: dict[int, int]
    scratch_bytes: int
    in_place: dict[int, int]
    slots: int


def make_plan(recording: Recording, fusable: Iterable[str]) -> Plan:
    """The plan of a program. fusable: the elementwise functions that may be in a chain."""
    planner = _Planner(recording, frozenset(fusable))  # decision 1
    must_run_before = planner.replace_inputs()  # 2
    order = planner.order(must_run_before)  # 3
    groups = planner.groups(order)  # 4
    groups, scratch, scratch_bytes = planner.memory(groups)  # 5
    return Plan(
        calls=planner.calls,
        constants=planner.constants,
        groups=groups,
        scratch=scratch,
        scratch_bytes=scratch_bytes,
        in_place=planner.in_place,
        slots=max((1 + slot for group in groups for _, slot in group.slots), default=0),
    )


class _Planner:
    """The decisions of `make_plan`, a method each.

    running: the calls that run in every replay, in recorded order. readers: root -> the running
    calls that read it. output_roots: the roots that must outlive a replay, so have no buffer.
    """

    def __init__(self, recording: Recording, fusable: frozenset[str]):
        self.recording, self.fusable = recording, fusable
        self.values, self.calls = recording.values, list(recording.calls)
        self.roots = recording.roots
        self.output_roots = {self.roots[i] for i in recording.outputs.values()}
        self.in_place: dict[int, int] = {}
        needed = self._needed()
        self.constants = self._constants(needed)
        constants = set(self.constants)
        self.running = [c for c in needed if c not in constants]
        self.readers: dict[int, list[int]] = defaultdict(list)
        for c in self.running:
            for root in self._reads(c):
                self.readers[root].append(c)

    def _reads(self, c: int) -> set[int]:
        return {self.roots[i] for i in self.calls[c].refs}

    def _makes(self, c: int) -> bool:
        """Whether a call makes a value; a copy back to an input only overwrites one."""
        return self.values[self.calls[c].result].origin == "call"

    # --- 1. which calls run ------------------------------------------------------------------

    def _needed(self) -> list[int]:
        """The calls, views left out, that some output depends on."""
        wanted, needed = set(self.output_roots), []
        for c in reversed(range(len(self.calls))):
            call = self.calls[c]
            if call.kind != "view" and call.result in wanted:
                needed.append(c)
                wanted |= self._reads(c)
        return needed[::-1]

    def _constants(self, needed: list[int]) -> list[int]:
        """Calls that depend on no input. An array that an `assign` writes into is made anew in
        every replay."""
        written = {self.roots[self.calls[c].refs[0]] for c in needed
                   if self.calls[c].function == "assign"}  # fmt: skip
        known = {i for i, v in enumerate(self.values) if v.origin == "constant"}
        constants = []
        for c in needed:
            if self._reads(c) <= known and self.calls[c].result not in written:
                known.add(self.calls[c].result)
                constants.append(c)
        return constants

    # --- 2. outputs that replace inputs ------------------------------------------------------

    def replace_inputs(self) -> dict[int, set[int]]:
        """Decide for every output that replaces an input how it gets there, in place or copied.

        Returns, for each call that writes over an input, the calls that have to run before it
        because they read the old value.
        """
        must_run_before: dict[int, set[int]] = {}
        writer = {self.calls[c].result: c for c in self.running}
        replaced = self.recording.replaced
        for output, input_root in replaced.items():
            c = writer.get(output)
            others = set(self.readers[input_root]) - {c}
            if c is not None and self._can_overwrite(c, input_root, others):
                self.in_place[output] = input_root
            else:
                c = self._copy_back(output, input_root)
            must_run_before[c] = set(self.readers[input_root]) - {c}
        outputs = self.recording.outputs.values()
        copied_back = replaced.keys() - self.in_place.keys()
        # A buffer may hold an output that is copied back, unless it is also returned as a view.
        self.output_roots -= copied_back - {self.roots[i] for i in outputs if i not in replaced}
        return must_run_before

    def _can_overwrite(self, c: int, input_root: int, others: set[int]) -> bool:
        """Whether call c can write its result over an input that `others` read too."""
        call = self.calls[c]
        if any(other > c for other in others):
            return False  # a later call reads the old value, and may need the new one for it
        reads = [i for i in call.refs if self.roots[i] == input_root]
        return not reads or (call.function in IN_PLACE and set(reads) == {input_root})

    def _copy_back(self, output: int, input_root: int) -> int:
        """Add a call that copies an output to the input that it replaces."""
        c = len(self.calls)
        self.calls.append(Call("copy", (Ref(output),), input_root, {}, "update"))
        self.running.append(c)
        self.readers[self.roots[output]].append(c)
        return c

    # --- 3. the order ------------------------------------------------------------------------

    def order(self, must_run_before: dict[int, set[int]]) -> list[int]:
        """The running calls in the order of a replay.

        The forward and backward calls, those before the first call of the update, stay as they are.
        Every later call runs directly behind one of them: a call whose result no other call needs
        as soon as it can, behind the last of those that it depends on; any other as late as the
        calls that need its result allow, so that no result lives longer than it must.
        """
        maker = {self.calls[c].result: c for c in self.running if self._makes(c)}
        needs = {
            c: {maker[root] for root in self._reads(c) if root in maker}
            | must_run_before.get(c, set())
            for c in self.running
        }
        update = (c for c in self.running if self.calls[c].phase == "update")
        first = next(update, len(self.calls))

        soonest: dict[int, int] = {}  # the last forward or backward call that it needs; -1: none
        for c in self.running:
            soonest[c] = c if c < first else max((soonest[d] for d in needs[c]), default=-1)
        behind: dict[int, int] = {}  # the call behind which it runs
        for c in reversed(self.running):
            behind.setdefault(c, soonest[c])  # if no later call needs its result
            for d in needs[c]:  # as late as the first call that needs it allows
                behind[d] = min(behind.get(d, len(self.calls)), behind[c])
        return sorted(self.running, key=lambda c: (c, 0, c) if c < first else (behind[c], 1, c))

    # --- 4. the groups -----------------------------------------------------------------------

    def groups(self, order: list[int]) -> list[Group]:
        """Single calls and chains. A scalar call that needs no result of the chain runs before it,
        so it does not end the chain."""
        groups: list[Group] = []
        chain: list[int] = []

        def close() -> None:
            groups.extend(Group(part, chain=True) for part in self._parts(chain))
            chain.clear()

        for c in order:
            results = {self.calls[k].result for k in chain}
            if chain and self._extends(c, chain, results):
                chain.append(c)
            elif chain and self._scalar(c) and not self._reads(c) & results:
                groups.append(Group((c,)))
            else:
                close()
                if self._elementwise(c):
                    chain.append(c)
                else:
                    groups.append(Group((c,)))
        close()
        return groups

    def _parts(self, chain: list[int]) -> list[tuple[int, ...]]:
        """A chain in parts that have no array in common, read or written over: the updates of two
        parameters, say.

        These are the connected components of a graph whose nodes are arrays and whose edges join
        the result of a call to what it touches, found by union-find: `parent` leads from an array
        to another one of its component, in the end to the one that stands for all.
        """
        parent: dict[int, int] = {}

        def component(i: int) -> int:
            while parent.setdefault(i, i) != i:
                i = parent[i]
            return i

        for c in chain:
            result = self.calls[c].result
            for i in {*self._reads(c), self.in_place.get(result, result)}:
                if self.values[i].shape:  # parts may share scalars
                    parent[component(i)] = component(result)
        parts: dict[int, list[int]] = defaultdict(list)
        for c in chain:
            parts[component(self.calls[c].result)].append(c)
        return [tuple(calls) for calls in parts.values()]

    def _extends(self, c: int, chain: list[int], results: set[int]) -> bool:
        """Whether call c belongs to the chain: it has the same shape, and reads the chain's
        results whole, not through views."""
        first = self.values[self.calls[chain[0]].result]
        if not self._elementwise(c) or self.values[self.calls[c].result].shape != first.shape:
            return False
        return all(self.roots[i] not in results or i in results for i in self.calls[c].refs)

    def _elementwise(self, c: int) -> bool:
        """Whether a call may be in a chain: it computes on whole contiguous arrays of one shape and
        on scalars; not on an element of an array, which an earlier block may have overwritten."""
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

    def _scalar(self, c: int) -> bool:
        """Whether a call makes one number from numbers, and replaces no input."""
        used = (self.calls[c].result, *self.calls[c].refs)
        replaces = self.calls[c].result in self.in_place or not self._makes(c)
        return all(self.values[i].size == 1 for i in used) and not replaces

    # --- 5. the memory -----------------------------------------------------------------------

    def memory(self, groups: list[Group]) -> tuple[list[Group], dict[int, int], int]:
        """The groups with their slots, offsets in the scratch memory, and its size in bytes."""
        last_use = self._last_use(groups)
        space, planned = _Space(), []
        scratch: dict[int, int] = {}
        for number, group in enumerate(groups):
            only_in_chain = self._only_in_chain(group, number, last_use)
            planned.append(replace(group, slots=self._chain_blocks(group, only_in_chain)))
            # buffers that are free after this group; a result of it can take one over
            ending = [i for i in self._group_reads(group) if last_use[i] == number and i in scratch]
            last_read = self._last_read(group)
            for position, c in enumerate(group.calls):
                result = self.calls[c].result
                if result in only_in_chain or not self._needs_buffer(result):
                    continue
                reused = self._reusable(c, ending, last_read, position)
                if reused is None:
                    scratch[result] = space.take(self.values[result].nbytes)
                else:
                    ending.remove(reused)
                    scratch[result] = scratch[reused]
            for i in ending:
                space.give(scratch[i], self.values[i].nbytes)
        return planned, scratch, space.end

    def _needs_buffer(self, result: int) -> bool:
        """Whether a result lives in scratch memory: not if it is an output or replaces an input."""
        return (
            result not in self.output_roots
            and result not in self.in_place
            and self.values[result].origin == "call"
        )

    def _group_reads(self, group: Group) -> list[int]:
        """The roots that a group reads, each once, in order."""
        return list(dict.fromkeys(root for c in group.calls for root in sorted(self._reads(c))))

    def _last_use(self, groups: list[Group]) -> dict[int, int]:
        """Root -> the group that reads it last; for an output a number beyond all groups."""
        last: dict[int, int] = {}
        for number, group in enumerate(groups):
            for root in self._group_reads(group):
                last[root] = number
        return last | dict.fromkeys(self.output_roots, len(groups))

    def _last_read(self, group: Group) -> dict[int, int]:
        """Value -> the position in the group of the call that reads it last."""
        return {i: k for k, c in enumerate(group.calls) for i in self.calls[c].refs}

    def _only_in_chain(self, group: Group, number: int, last_use: dict[int, int]) -> set[int]:
        """The results of a chain that only the chain reads."""
        if not group.chain:
            return set()
        results = {self.calls[c].result for c in group.calls}
        outside = {i for i in results if last_use.get(i) != number or i in self.output_roots}
        return {i for i in results - outside if self.values[i].origin == "call"}

    def _chain_blocks(self, group: Group, only_in_chain: set[int]) -> tuple[tuple[int, int], ...]:
        """The block of each result that lives only inside the chain.

        A value's block is free after the call that reads the value last; already for the result of
        that call if the call may write over its argument.
        """
        blocks: dict[int, int] = {}
        free: list[int] = []
        used, last_read = 0, self._last_read(group)
        for position, c in enumerate(group.calls):
            call = self.calls[c]
            ending = [i for i in dict.fromkeys(call.refs)
                      if i in blocks and last_read[i] == position]  # fmt: skip
            overwritten = [i for i in ending if self._may_overwrite(call, i)]
            free += [blocks[i] for i in overwritten]
            if call.result in only_in_chain:
                if free:
                    blocks[call.result] = free.pop()
                else:
                    blocks[call.result], used = used, used + 1
            free += [blocks[i] for i in ending if i not in overwritten]
        return tuple(blocks.items())

    def _may_overwrite(self, call: Call, i: int) -> bool:
        """Whether the result of a call, element by element, may be written over its argument i."""
        sizes = {np.dtype(self.values[k].dtype).itemsize for k in (i, call.result)}
        return call.function in IN_PLACE and len(sizes) == 1

    def _reusable(
        self, c: int, ending: list[int], last_read: dict[int, int], position: int
    ) -> int | None:
        """An argument of call c whose buffer the result can take over, or None: its last reader
        is this call, and the result has its form and may be written over it."""
        call = self.calls[c]
        result = self.values[call.result]
        for i in dict.fromkeys(call.refs):
            value = self.values[i]
            same_form = (value.shape, value.strides) == (result.shape, result.strides)
            assigned = call.function == "assign" and call.refs[0] == i
            if (
                i in ending
                and last_read[i] == position
                and same_form
                and (assigned or self._may_overwrite(call, i))
                and not any(k != i and self.roots[k] == i for k in last_read)  # also as a view
            ):
                return i
        return None


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
