"""The memory of programs, and who holds it: nothing that a caller holds is overwritten.

An input has a home, memory that lasts. A result that replaces an input stays in that home; any
other is copied into pooled memory. Either way the caller gets a fresh array over a `Lease`, of
which the memory keeps a weak reference: as long as the array, a view, a memoryview or a DLPack
capsule of it is alive, so is the lease, and its memory is not used again. The exception is an array
that is passed back in its place: it is consumed, and its memory gets the next result.
"""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np

from npdrt.errors import Error
from npdrt.program import fused
from npdrt.program.arena import Arena, Array, Lease
from npdrt.program.calls import EXACT, PORTABLE, ROUNDED, Draw, Value
from npdrt.program.plan import Plan, Target
from npdrt.program.replay import Binding
from npdrt.program.tree import Path, leaves

GLANCES, GLANCE = 100, 0.01  # how often, seconds
POOLED = 2  # arrays kept for a result: a loop that assigns it to one name needs two


def _nobody() -> None:
    """A weak reference to nothing."""


class Home:
    """Memory for one array.

    lease: of the array over it that the caller was last given. handed: a weak reference to the last
    array that the caller was given, here or in pooled memory. in_place: whether a result that
    replaces the input is left here for the caller; if not, it is copied into `pool`.
    """

    def __init__(self, array: Array):
        self.array, self.in_place = array, True
        self.lease: Callable[[], Lease | None] = _nobody
        self.handed: Callable[[], Array] = _nobody
        self.pool: list[Home] = []

    def has(self, x: Any) -> bool:
        """Whether x is the array that lies here, and not just another one with its memory."""
        return x is self.array or (self.lease() is not None and x is self.handed())


class Memory(Arena):
    """The memory of one program, or of several that take turns, such as those of a training loop.

    homes: arrays that persist, of inputs and outputs, by name and form. version: changes when a
    home moves. lock: held by the thread whose call uses the memory. A copy or pickle is new, empty
    memory.
    """

    has_kernels = False  # whether programs recorded for it are made of `npdrt.kernels`

    def __init__(self) -> None:
        super().__init__()
        self.homes: dict[tuple[Any, ...], Home] = {}
        self.pools: dict[tuple[Any, ...], list[Home]] = {}
        self.version = 0
        self.lock = threading.RLock()
        self._consumed: list[tuple[Callable[[], Lease | None], str, int]] = []

    def __reduce__(self) -> Any:
        return type(self), ()

    # --- homes -----------------------------------------------------------------------------

    def home(self, name: Path, value: Value) -> Home:
        """The home of that name and form."""
        key = _key(name, value)
        if key not in self.homes:
            self.homes[key] = Home(self.new(value))
        return self.homes[key]

    def adopt(self, tree: Any) -> None:
        """Take arrays that the caller gives up as the homes of their names, without a copy.

        Those that cannot be written to, do not own their memory or are in this one are left alone.
        """
        for name, x in leaves(tree):
            key = (name, tuple(x.shape), str(x.dtype), ())
            whole = x.flags.owndata and x.flags.c_contiguous and getattr(x.flags, "writeable", True)
            if whole and key not in self.homes and not self.holds(x):
                self.homes[key] = Home(x)

    def overwrite(self, home: Home, name: Path, passed: bool) -> None:
        """Prepare a home for a call that writes to it. If the caller holds the array there, it is
        consumed if it was passed back in; otherwise it keeps the memory, and the home moves."""
        lease = home.lease()
        if lease is None:
            return
        if passed:
            self._consumed.append((home.lease, "/".join(name), threading.get_ident()))
        else:
            home.array = self.xp.empty(home.array.shape, dtype=home.array.dtype)
            home.in_place = False
            self.version += 1
        home.lease = _nobody

    def refuse_consumed(self) -> None:
        """Raise `Error` if this thread still holds an array that an earlier call consumed."""
        if self._held():
            gc.collect()  # arrays that only a circle of references holds are held by nobody
        for _ in range(GLANCES):  # of a thread that looks at our frames for a moment: a profiler
            if threading.active_count() == 1 or not self._held():
                break
            time.sleep(GLANCE)
        if held := self._held():
            raise Error(
                f"{', '.join(held[:5])}: an earlier result, which was passed back to the program, "
                "is still held, itself or a view of it; its memory holds newer numbers now. Keep a "
                "copy (x.copy()) instead, made before you pass the array back, and drop this one"
            )

    def _held(self) -> list[str]:
        """The names of the consumed arrays that this thread still holds."""
        self._consumed = [entry for entry in self._consumed if entry[0]() is not None]
        return [name for _, name, thread in self._consumed if thread == threading.get_ident()]

    # --- results ---------------------------------------------------------------------------

    def give(self, home: Home) -> Array:
        """The array in a home, for the caller."""
        lease, x = home.lease(), home.handed()
        if lease is None:
            lease, x = Lease(home.array), None
        if x is None:
            x = self.over(lease)
        home.lease, home.handed = weakref.ref(lease), weakref.ref(x)
        return x

    def pool(self, name: Path, value: Value) -> list[Home]:
        """The pool for a result of that name and form that replaces no input."""
        return self.pools.setdefault(_key(name, value), [])

    def lend(self, pool: list[Home], value: Value, source: Array) -> Array:
        """A copy of a result for the caller, in pooled memory that nobody holds, or in new."""
        free = next((home for home in pool if home.lease() is None), None)
        if free is None:
            free = Home(self.new(value))
            pool.append(free)
            del pool[:-POOLED]
        self.put(free.array, source)
        return self.give(free)

    # --- contents ----------------------------------------------------------------------------

    def holds(self, x: Any) -> bool:
        """Whether an array, or what it is a view of, is memory that calls write to."""
        owners = [self.scratch, *(home.array for home in self.homes.values())]
        if getattr(x, "base", None) is None:
            return any(x is owner for owner in owners)
        return any(np.may_share_memory(x, owner) for owner in owners)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        pools = [*self.pools.values(), *(home.pool for home in self.homes.values())]
        kept = [*self.homes.values(), *(home for pool in pools for home in pool)]
        return int(self.scratch.nbytes + sum(home.array.nbytes for home in kept))

    # --- programs --------------------------------------------------------------------------

    def target(self, fast: bool) -> Target:
        """What a plan for this memory knows of its device."""
        functions = fused.FUSABLE if fast else (*EXACT, *ROUNDED, *PORTABLE)
        return Target(lambda call, values: call.function in functions)

    def bind(
        self,
        values: list[Value],
        plan: Plan,
        persistent: dict[int, Array],
        draws: dict[int, Draw],
        fast: bool,
    ) -> Binding:
        """A plan in this memory."""
        return Binding(values, plan, persistent, draws, self, fast)


def _key(name: Path, value: Value) -> tuple[Any, ...]:
    return name, value.shape, value.dtype, () if value.contiguous else value.strides
