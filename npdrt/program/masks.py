"""Masks that a program draws on the device, in its graph.

The streams of the masks, a row each of seed, purpose and step, lie in the device's memory. The
program draws the masks first and then adds 1 to every step, so that a run whose steps follow one
another sends nothing from the host. Rows are sent only if a call has other streams than these.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from npdrt import philox
from npdrt.program.arena import Array
from npdrt.program.calls import Draw
from npdrt.program.operations import Operation

Host = np.ndarray[Any, np.dtype[np.uint64]]


class Masks:
    """The draws of a program that a kernel makes: `Random.bernoulli`, also of no element.

    draws: those of the program, by value index. arrays: of its values. memory: `CudaMemory`.
    chosen: the indices of the draws that are made here.
    """

    def __init__(self, draws: dict[int, Draw], arrays: dict[int, Array], memory: Any):
        self.chosen = [i for i, draw in draws.items() if draw.method == "bernoulli"]
        self._arrays, self._draws, self._memory = arrays, draws, memory
        self._keys = memory.xp.empty((len(self.chosen), philox.KEY), dtype=np.uint64)
        self._next: Host | None = None  # the streams on the device after the last replay, if known
        self._given: Host | None = None

    def operations(self) -> list[Operation]:
        """The calls that draw every mask, and advance the steps."""
        kernel = self._memory.raw_kernel(philox.NAME, philox.SOURCE)
        made: list[Operation] = []
        for row, i in enumerate(self.chosen):
            if self._arrays[i].size:
                p = probability(*self._draws[i].args, **self._draws[i].settings)
                made.append((kernel, philox.launch(self._keys[row], p, self._arrays[i]), {}))
        steps = self._keys[:, 2]
        return [*made, (self._memory.xp.add, (steps, 1), {"out": steps})] if made else []

    def begin(self, streams: dict[int, Any]) -> None:
        """Before a replay: have the device know the streams (`Random`), by value index."""
        if not self.chosen:
            return
        given = philox.key_of([streams[i] for i in self.chosen])
        if self._next is None or not np.array_equal(given, self._next):
            self._memory.put(self._keys, given)
        self._given, self._next = given, None  # until the replay has been asked for

    def end(self) -> None:
        """After a replay: the device has advanced every step."""
        if self._given is not None:
            self._next = self._given + np.array([0, 0, 1], dtype=np.uint64)


def probability(shape: Any, p: float) -> float:
    """The second argument of `Random.bernoulli`."""
    return p
