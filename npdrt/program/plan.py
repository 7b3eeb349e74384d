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
5. The memory (`npdrt.program.layout`). A value that only its chain reads has a block
   (`chain_blocks`). Every other value has a buffer in scratch memory (`scratch`) from its first to
   its last use, and buffers are used again.

On a GPU (`Target.batched`) decisions 3 and 4 differ. The order is the recorded one, but an update,
and all that follows the backward pass, runs in batches (`npdrt.program.batches`): the updates of
all parameters are one launch, and all gradients live at once.

A value is named by its index in `values`, a call by its index in `calls`. A value's root is the
value that owns its memory: memory is planned for roots.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from npdrt.program.batches import Batch, Group, connected, make_batches
from npdrt.program.calls import IN_PLACE, Call, Ref, Value
from npdrt.program.layout import Layout
from npdrt.program.recording import Recording
from npdrt.program.tree import rebuild

LARGE = 1024  # elements; on a CPU a shorter array is not worth a chain


@dataclass(frozen=True)
class Target:
    """How a device runs calls.

    can_chain(call, values): whether a call may be in a chain. batched: whether chains of any size
    are one launch each, or one together; they may read arrays that are broadcast or strided.
    """

    can_chain: Callable[[Call, list[Value]], bool]
    batched: bool = False


@dataclass(frozen=True)
class Plan:
    """What `make_plan` decides.

    calls: those of the program, and the copies of outputs back to the inputs that they replace.
    constants: calls whose results never change; they run once. batches: the rest, in the order
    they run; a batch has one group, unless the device runs several at once. scratch: byte offset
    of every value that has a buffer in the scratch memory, of `scratch_bytes` in all. in_place:
    outputs that a call writes into the memory of an input, and which input. chain_blocks: blocks
    that the largest chain needs.
    """

    calls: list[Call]
    constants: list[int]
    batches: list[Batch]
    scratch: dict[int, int]
    scratch_bytes: int
    in_place: dict[int, int]
    chain_blocks: int

    @property
    def groups(self) -> list[Group]:
        """The groups of all batches."""
        return [group for batch in self.batches for group in batch]


def make_plan(recording: Recording, target: Target) -> Plan:
    """The plan of a program for a device."""
    planner = _Planner(recording, target)  # decision 1
    must_run_before = planner.replace_inputs()  # 2
    batches = planner.batches(must_run_before)  # 3, 4
    layout = Layout(recording, planner.calls, planner.in_place, planner.output_roots)
    batches = layout.place(batches)  # 5
    blocks = (block for batch in batches for g in batch for _, block in g.chain_blocks)
    return Plan(
        calls=planner.calls,
        constants=planner.constants,
        batches=batches,
        scratch=layout.scratch,
        scratch_bytes=layout.space.end,
        in_place=planner.in_place,
        chain_blocks=1 + max(blocks, default=-1),
    )


class _Planner:
    """The decisions of `make_plan`, a method each.

    running: the calls that run in every replay, in recorded order. readers: root -> the running
    calls that read it. output_roots: the roots that must outlive a replay, so have no buffer.
    end: the call after the last one of the backward pass. overwritten: inputs that calls outside
    of batches write over.
    """

    def __init__(self, recording: Recording, target: Target):
        self.recording, self.target = recording, target
        self.values, self.calls = recording.values, list(recording.calls)
        self.roots = recording.roots
        self.output_roots = {self.roots[i] for i in recording.outputs.values()}
        self.in_place: dict[int, int] = {}
        self.overwritten: set[int] = set()
        needed = self._needed()
        self.constants = self._constants(needed)
        constants = set(self.constants)
        self.running = [c for c in needed if c not in constants]
        self.end = self._end()
        if target.batched:
            self._merge_scalars()
        self.readers: dict[int, list[int]] = defaultdict(list)
        for c in self.running:
            for root in self._reads(c):
                self.readers[root].append(c)

    def _end(self) -> int:
        """The first call that no call of the backward pass follows, or without any the first of the
        update."""
        phases = [self.calls[c].phase for c in self.running]
        if "backward" in phases:
            return self.running[len(phases) - 1 - phases[::-1].index("backward")] + 1
        return self.running[phases.index("update")] if "update" in phases else len(self.calls)

    def _late(self, c: int) -> bool:
        """Whether a GPU runs a call in a batch: all of an update, and all after the last one of the
        backward pass."""
        return c >= self.end or self.calls[c].phase == "update"

    def _merge_scalars(self) -> None:
        """Leave out calls in batches that make a number again: every parameter asks for lr in its
        dtype. The calls that follow read the first one."""
        firsts: dict[Any, int] = {}
        same: dict[int, int] = {}
        needed = self.output_roots | {v.base for v in self.values}

        def first(x: Any) -> Any:
            return Ref(same.get(x.index, x.index)) if isinstance(x, Ref) else x

        for c in filter(self._late, list(self.running)):
            call = replace(self.calls[c], args=rebuild(self.calls[c].args, first))
            self.calls[c], value = call, self.values[call.result]
            key = call.function, repr(call.args), repr(call.settings), value.dtype
            if call.kind != "elementwise" or value.shape or call.result in needed:
                continue
            if firsts.setdefault(key, call.result) != call.result:
                same[call.result] = firsts[key]
                self.running.remove(c)

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
                self.overwritten |= set() if self._late(c) else {input_root}
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

    def batches(self, must_run_before: dict[int, set[int]]) -> list[Batch]:
        """The groups in the order of a replay."""
        needs = self._needs(must_run_before)
        if not self.target.batched:
            return [(group,) for group in self.groups(self.order(needs))]
        batches: list[Batch] = []
        for late, part in groupby(self.running, self._late):
            if late:
                batches += self._batches(list(part), needs)
            else:
                batches += [(group,) for group in self.groups(list(part))]
        return batches

    def _batches(self, calls: list[int], needs: dict[int, set[int]]) -> list[Batch]:
        """Calls that follow each other, in batches."""
        here, whole = set(calls), {c for c in calls if self._whole(c)}

        def joins(d: int, c: int) -> bool:
            return {d, c} <= whole and self._joins(d, c)

        def kind(c: int) -> Any:
            function = self.calls[c].function
            return "chain" if c in whole else function if function == "norm" else c

        chains = make_batches(calls, {c: needs[c] & here for c in calls}, joins, kind)
        return [tuple(Group(c, chain=c[0] in whole) for c in batch) for batch in chains]

    def _needs(self, must_run_before: dict[int, set[int]]) -> dict[int, set[int]]:
        """The calls that have to run before each call."""
        maker = {self.calls[c].result: c for c in self.running if self._makes(c)}
        return {
            c: {maker[root] for root in self._reads(c) if root in maker}
            | must_run_before.get(c, set())
            for c in self.running
        }

    def _joins(self, d: int, c: int) -> bool:
        """Whether call c can run in the loop of d, which it needs: every element of it needs that
        element alone. A copy has the name of what it overwrites, so it has a loop of its own."""
        made, (first, result) = self.calls[d].result, (self.calls[k].result for k in (d, c))
        shown = any(self.roots[i] == made != i for i in self.calls[c].refs)
        same_shape = self.values[first].shape == self.values[result].shape
        return same_shape and not shown and self._makes(d) and self._makes(c)

    def order(self, needs: dict[int, set[int]]) -> list[int]:
        """The running calls in the order of a replay.

        The forward and backward calls, those before the first call of the update, stay as they are.
        Every later call runs directly behind one of them: a call whose result no other call needs
        as soon as it can, behind the last of those that it depends on; any other as late as the
        calls that need its result allow, so that no result lives longer than it must.
        """
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
        parameters, say."""
        user: dict[int, int] = {}  # array -> the first call that touches it
        edges = []
        for c in chain:
            result = self.calls[c].result
            for i in {*self._reads(c), result, self.in_place.get(result, result)}:
                if self.values[i].shape:  # parts may share scalars
                    edges.append((user.setdefault(i, c), c))
        return connected(chain, edges)

    def _extends(self, c: int, chain: list[int], results: set[int]) -> bool:
        """Whether call c belongs to the chain: it has the same shape, and reads the chain's
        results whole, not through views."""
        first = self.values[self.calls[chain[0]].result]
        if not self._elementwise(c) or self.values[self.calls[c].result].shape != first.shape:
            return False
        return all(self.roots[i] not in results or i in results for i in self.calls[c].refs)

    def _elementwise(self, c: int) -> bool:
        """Whether a call may be in a chain. On a GPU it may read arrays of other forms, but not of
        one that a chain may write over."""
        call = self.calls[c]
        if not self.target.batched:
            return self.values[call.result].size >= LARGE and self._whole(c)
        apart = not any(self.roots[i] in self.overwritten for i in call.refs)
        return self._chains(c) and (apart or self._whole(c))

    def _chains(self, c: int) -> bool:
        call = self.calls[c]
        return self.values[call.result].contiguous and self.target.can_chain(call, self.values)

    def _whole(self, c: int) -> bool:
        """Whether a call may be in a chain and computes on whole contiguous arrays of one shape and
        on scalars; not on an element of an array, which an earlier block may have overwritten."""
        call = self.calls[c]
        shape, operands = self.values[call.result].shape, [self.values[i] for i in call.refs]
        alone = all(self.values[self.roots[i]].size == 1 or self.values[i].shape for i in call.refs)
        return (
            self._chains(c)
            and alone
            and all(v.shape == () or (v.shape == shape and v.contiguous) for v in operands)
            and any(v.shape == shape for v in operands)
        )

    def _scalar(self, c: int) -> bool:
        """Whether a call makes one number from numbers, and replaces no input."""
        used = (self.calls[c].result, *self.calls[c].refs)
        replaces = self.calls[c].result in self.in_place or not self._makes(c)
        return all(self.values[i].size == 1 for i in used) and not replaces
