"""The layout of a plan's values in memory: decision 5 of `npdrt.program.plan`."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np

from npdrt.program.batches import Batch, Group
from npdrt.program.calls import IN_PLACE, Call
from npdrt.program.recording import Recording

ALIGNMENT = 64  # bytes


class Layout:
    """Places for the results of calls: blocks of chains, and offsets in scratch memory.

    calls, in_place, outputs: those of the plan, and the roots that must outlive a replay. scratch:
    value -> offset, once `place` has run. space: the scratch memory.
    """

    def __init__(
        self, recording: Recording, calls: list[Call], in_place: dict[int, int], outputs: set[int]
    ):
        self.values, self.roots = recording.values, recording.roots
        self.calls, self.in_place, self.outputs = calls, in_place, outputs
        self.scratch: dict[int, int] = {}
        self.space = Space()
        self.last_use: dict[int, int] = {}  # root -> the batch that reads it last

    def place(self, batches: list[Batch]) -> list[Batch]:
        """The batches with the blocks of their chains."""
        for number, batch in enumerate(batches):
            for group in batch:
                self.last_use |= dict.fromkeys(self._group_reads(group), number)
        self.last_use |= dict.fromkeys(self.outputs, len(batches))
        return [self._place_batch(number, batch) for number, batch in enumerate(batches)]

    def _place_batch(self, number: int, batch: Batch) -> Batch:
        """A result may take over the buffer of a value that ends here, if its group alone reads the
        value: the groups of a batch run at once. The others are free after the batch."""
        users = Counter(root for group in batch for root in self._group_reads(group))
        ending = [i for i in users if self.last_use[i] == number and i in self.scratch]
        planned = []
        for group in batch:
            inside = self._only_in_chain(group, number)
            planned.append(replace(group, chain_blocks=self._chain_blocks(group, inside)))
            reads = set(self._group_reads(group))
            self._place_group(group, inside, ending, {i for i in reads if users[i] == 1})
        for i in ending:
            self.space.give(self.scratch[i], self.values[i].nbytes)
        return tuple(planned)

    def _place_group(
        self, group: Group, inside: set[int], ending: list[int], alone: set[int]
    ) -> None:
        """Buffers for the results of a group; those that it takes over are `ending` no more."""
        last_read = self._last_read(group)
        for position, c in enumerate(group.calls):
            result = self.calls[c].result
            if result in inside or not self._needs_buffer(result):
                continue
            reused = self._reusable(c, alone.intersection(ending), last_read, position)
            if reused is None:
                self.scratch[result] = self.space.take(self.values[result].nbytes)
            else:
                ending.remove(reused)
                self.scratch[result] = self.scratch[reused]

    def _reads(self, c: int) -> set[int]:
        return {self.roots[i] for i in self.calls[c].refs}

    def _needs_buffer(self, result: int) -> bool:
        """Whether a result lives in scratch memory: not if it is an output or replaces an input."""
        return (
            result not in self.outputs
            and result not in self.in_place
            and self.values[result].origin == "call"
        )

    def _group_reads(self, group: Group) -> list[int]:
        """The roots that a group reads, each once, in order."""
        return list(dict.fromkeys(root for c in group.calls for root in sorted(self._reads(c))))

    def _last_read(self, group: Group) -> dict[int, int]:
        """Value -> the position in the group of the call that reads it last."""
        return {i: k for k, c in enumerate(group.calls) for i in self.calls[c].refs}

    def _only_in_chain(self, group: Group, number: int) -> set[int]:
        """The results of a chain that only the chain reads."""
        if not group.chain:
            return set()
        results = {self.calls[c].result for c in group.calls}
        outside = {i for i in results if self.last_use.get(i) != number or i in self.outputs}
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
        self, c: int, ending: set[int], last_read: dict[int, int], position: int
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


class Space:
    """Offsets in one block of bytes: best fit, neighbours joined when they are given back.

    end: how many bytes the block needs.
    """

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
