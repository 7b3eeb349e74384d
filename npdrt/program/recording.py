"""A recorded step as data: listings show it, files hold it, plans order it."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from npdrt.arrays import Array
from npdrt.program.calls import Call, Draw, Fixed, Ref, Stream, Value
from npdrt.program.once import cached
from npdrt.program.tree import Leaf, Path, leaves


@dataclass(eq=False, repr=False, kw_only=True)
class Recording(Leaf):
    """The straight-line list of array calls of one step.

    values, calls: see `npdrt.program.calls`. parameters: the names of the step's arguments.
    signature: path of every leaf of the arguments -> `Ref` of an input, `Stream`, or `Fixed`.
    draws: the inputs that are drawn, by value index. constants: arrays that never change, by value
    index. result: the step's result with `Ref`s for arrays.
    """

    values: list[Value]
    calls: list[Call]
    parameters: tuple[str, ...]
    signature: dict[Path, Ref | Stream | Fixed]
    draws: dict[int, Draw]
    constants: dict[int, Array]
    result: Any

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({', '.join(self.parameters)}): {len(self.calls)} array calls, "
            f"{len(self.inputs)} inputs, {len(self.outputs)} outputs"
        )

    @cached
    def inputs(self) -> dict[Path, int]:
        """Path in the arguments -> value index, of every array and float."""
        return {path: x.index for path, x in self.signature.items() if isinstance(x, Ref)}

    @cached
    def outputs(self) -> dict[Path, int]:
        """Path in the result -> value index."""
        return {path: x.index for path, x in leaves(self.result) if isinstance(x, Ref)}

    @cached
    def roots(self) -> list[int]:
        """For every value the one that owns its memory: itself, or for a view its base."""
        return [i if v.base is None else v.base for i, v in enumerate(self.values)]

    @cached
    def replaced(self) -> dict[int, int]:
        """Output -> the input that it replaces, as a new weight replaces the old one.

        They have the same shape, dtype and last key of the path ("layers/00/weight"). Of several
        such inputs it is the one whose path has the longest end in common, and of these the first.
        No input is replaced twice.
        """
        alike: dict[tuple[Any, ...], list[tuple[Path, int]]] = defaultdict(list)
        for path, i in self.inputs.items():
            alike[path[-1:], self.values[i].shape, self.values[i].dtype].append((path, i))
        taken = {self.roots[i] for i in self.outputs.values()}  # an input that is itself returned
        found: dict[int, int] = {}
        for path, i in self.outputs.items():
            value = self.values[i]
            free = [
                (_common_end(path, other), -k, k)
                for other, k in alike[path[-1:], value.shape, value.dtype]
                if k not in taken
            ]
            if free and value.base is None and value.contiguous and value.origin == "call":
                *_, k = max(free)
                taken.add(k)
                found.setdefault(i, k)
        return found


def _common_end(a: Path, b: Path) -> int:
    """How many steps two paths share at their end."""
    count = 0
    for x, y in zip(reversed(a), reversed(b), strict=False):
        if x != y:
            break
        count += 1
    return count
