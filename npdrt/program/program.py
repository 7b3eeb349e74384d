"""`record` and `Program`: from a step to its calls, and from the calls to replays."""

from __future__ import annotations

import dataclasses
import inspect
import weakref
from collections.abc import Callable
from pathlib import Path as FilePath
from typing import Any

import numpy as np

from npdrt import arrays
from npdrt.arrays import Array, quiet
from npdrt.compute import arithmetic
from npdrt.errors import Error
from npdrt.program import file, fused
from npdrt.program import listing as text
from npdrt.program.calls import Draw, Fixed, Ref, Stream, Value
from npdrt.program.memory import Home, Memory
from npdrt.program.once import cached
from npdrt.program.plan import Plan, make_plan
from npdrt.program.recorder import Recorded, RecordedRandom, Recorder
from npdrt.program.recording import Recording
from npdrt.program.replay import Binding
from npdrt.program.spelling import spelled_out
from npdrt.program.tree import Path, leaves, rebuild
from npdrt.random import Random


def record(
    step: Callable[..., Any], *args: Any, memory: Memory | None = None, fast: bool = False
) -> Program:
    """Run `step(*args)` once on recording arrays; the program of its array calls.

    args: nested dicts, tuples, lists and dataclasses. Arrays and Python floats in them (a learning
    rate) are inputs, and so is every draw from a `Random` among them (a dropout mask): one program
    serves all steps of the same shapes. Anything else is fixed; a call with another value is
    refused. Nothing is computed, and the arrays are not read. memory: shared with other programs
    that take turns with this one. If it is a GPU's, or arrays are on a GPU and it is None,
    primitives with a kernel (`npdrt.kernels`) are one call each, as in an eager step there.
    fast: replay with loops compiled by numba (extra `fast`), to the same bits.

    Raises `Error` if the step looks at a value on the host, uses an array that is not among
    its arguments, or calls something that cannot be recorded; the message names the line.

    >>> import numpy as np
    >>> from npdrt import ops
    >>> program = record(lambda x, lr: ops.sum(x * x) * lr, np.ones(3), 0.5)
    >>> float(program(np.array([1.0, 2.0, 3.0]), 0.5))
    7.0
    """
    parameters = _parameter_names(step, len(args))
    given = list(leaves(dict(zip(parameters, args, strict=True))))
    on_gpu = any(arrays.on_gpu(leaf) for _, leaf in given)
    recorder = Recorder(has_kernels=on_gpu if memory is None else memory.has_kernels)
    stand_ins = [_stand_in(recorder, path, leaf) for path, leaf in given]
    taken = iter(stand_ins)
    result = step(*rebuild(args, lambda _: next(taken)))
    for path, x in leaves(result):
        if hasattr(x, "edges"):
            raise Error(f"the step returns a Tensor ({'/'.join(path)}); return its .value")
        if getattr(x, "recorder", recorder) is not recorder:
            raise Error(f"the step returns an array of another recording ({'/'.join(path)})")
    signature = {path: _kept(x, path) for (path, _), x in zip(given, stand_ins, strict=True)}
    values = [dataclasses.replace(v, name=recorder.names.get(i, ""))
              for i, v in enumerate(recorder.values)]  # fmt: skip
    return Program(
        values=values,
        calls=recorder.calls,
        parameters=parameters,
        signature=signature,
        draws=recorder.draws,
        constants=recorder.constants,
        result=rebuild(result, lambda x: Ref(x.index) if isinstance(x, Recorded) else x),
        memory=memory,
        fast=fast,
    )


def load(path: str | FilePath, *, memory: Memory | None = None, fast: bool = False) -> Program:
    """The program that `Program.save` wrote; it replays to the same bits.

    Dataclasses in its result have become dicts of their fields, named tuples plain ones. In the
    arguments both serve.

    Raises `FileRefused`, with path and reason, for anything that `save` does not write.
    """
    return Program(**file.read(FilePath(path)), memory=memory, fast=fast)


def memory_on(device: arrays.Device) -> Memory:
    """New memory for programs on a device."""
    if device.kind == "cpu":
        return Memory()
    from npdrt.program import cuda

    return cuda.CudaMemory(device=device.index)


def _parameter_names(step: Callable[..., Any], count: int) -> tuple[str, ...]:
    """The names of the first `count` parameters; numbers if there are fewer."""
    try:
        names = list(inspect.signature(step).parameters)[:count]
    except (TypeError, ValueError):
        names = []
    return (*names, *map(str, range(len(names), count)))


def _stand_in(recorder: Recorder, path: Path, leaf: Any) -> Any:
    """The object that stands for a leaf of the arguments while the step is recorded."""
    if isinstance(leaf, Random):
        return RecordedRandom(recorder, Stream(path))
    if isinstance(leaf, float) or hasattr(leaf, "dtype"):
        dtype = getattr(leaf, "dtype", np.dtype(np.float64))
        weak = not hasattr(leaf, "dtype")
        return recorder.input(getattr(leaf, "shape", ()), dtype, _name(path), "input", weak)
    return leaf


def _name(path: Path) -> str:
    """A leaf's name in the listing: its last key if that is a path of its own, else its path."""
    return path[-1] if "/" in path[-1] else "/".join(path)


def _kept(x: Any, path: Path) -> Ref | Stream | Fixed:
    if isinstance(x, Recorded):
        return Ref(x.index)
    return Stream(path) if isinstance(x, RecordedRandom) else Fixed(x)


class Program(Recording):
    """The straight-line list of array calls of one step, which can be called.

    `program(*args)` replays the step: it gives what `step(*args)` gives, to the bit. A result keeps
    its numbers as long as you hold it, or a view of it, with one exception: a result that replaces
    an input, passed back in its place, is not copied but consumed, and the next result is written
    over it. Other arrays are copied in, and never written.

    Threads may share a program: they take turns. A copy or pickle of it has memory of its own.

    memory: shared with other programs that take turns with this one; None for its own, on the
    device of the arguments of the first call. fast: replay with compiled loops.
    The rest: see `Recording`.
    """

    memory: Memory | None = None  # until the first call, unless one is given

    def __init__(self, *, memory: Memory | None = None, fast: bool = False, **recording: Any):
        super().__init__(**recording)
        if fast:
            fused.numba()  # `Unavailable` now rather than in the first replay
        self.fast = fast
        if memory is not None:
            self.memory = memory
        self._homes: dict[int, Home] = {}  # of the inputs, once the program has been called
        self._bound: Binding | None = None
        self._version = -1

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_homes": {}, "_bound": None}

    @cached
    def plan(self) -> Plan:
        """In which order and in whose memory the calls run."""
        return make_plan(self._spelled, (self.memory or Memory()).target(self.fast))

    @cached
    def _spelled(self) -> Recording:
        return spelled_out(self)

    def __call__(self, *args: Any) -> Any:
        """Replay the step.

        Raises `Error` if an argument has another shape, dtype or fixed value than recorded, or if
        you still hold a result that an earlier call consumed.
        """
        given = self._given(args)
        memory = self._chosen(given)
        with memory.lock, quiet(), memory.on_device(), arithmetic("fast"):  # its calls say more
            memory.refuse_consumed()
            if not self._homes:
                self._homes = {i: memory.home(p, self.values[i]) for p, i in self.inputs.items()}
            moving = self._moving(given)
            self._claim(memory, moving)
            binding = self._binding(memory)
            self._fill(memory, binding, moving, given)
            binding.run()
            return self._results(memory, binding)

    def _chosen(self, given: dict[Path, Any]) -> Memory:
        """The memory; if none was given, new memory on the device of the arguments."""
        if self.memory is None:
            on_gpu = (x for x in given.values() if arrays.on_gpu(x))
            memory = memory_on(arrays.device_of(next(on_gpu, None)))
            vars(self).setdefault("memory", memory)  # another thread may have set it
        assert self.memory is not None
        return self.memory

    @property
    def graph(self) -> bool:
        """Whether a replay is one CUDA graph: on a GPU, from the third call on."""
        return self._bound is not None and self._bound.graph is not None

    @property
    def graph_error(self) -> Exception | None:
        """Why replays on a GPU are not one CUDA graph but many calls, which is several times
        slower; None while that is not known."""
        return self._bound.graph_error if self._bound is not None else None

    @property
    def nodes(self) -> int | None:
        """The nodes of the CUDA graph; None without one, or if the driver does not say."""
        return self._bound.nodes if self._bound is not None else None

    def copy_out(self) -> Any:
        """The result of the last call in arrays of its own."""
        bound = self._bound
        if bound is None:
            raise Error("copy_out: the program has not been called yet")

        def leaf(x: Any) -> Any:
            if not isinstance(x, Ref):
                return x
            return bound.array(self.replaced.get(x.index, x.index)).copy()

        return rebuild(self.result, leaf)

    def _results(self, memory: Memory, binding: Binding) -> Any:
        """The result of a replay, for the caller; one array if the step returns it twice."""
        given: dict[int, Array] = {}
        for path, i in self.outputs.items():
            if i not in given:
                place, value = self.replaced.get(i, i), self.values[i]
                home = self._homes.get(place)
                if home is not None and home.in_place:
                    given[i] = memory.give(home)
                    continue
                pool = memory.pool(path, value) if home is None else home.pool
                given[i] = memory.lend(pool, value, binding.array(place))
                if home is not None:
                    home.handed = weakref.ref(given[i])
        return rebuild(self.result, lambda x: given[x.index] if isinstance(x, Ref) else x)

    def listing(self) -> str:
        """The program as text: numbered calls with names, forms, costs and sources."""
        return text.listing(self)

    def save(self, path: str | FilePath) -> None:
        """Write the program to a file, atomically; see docs/programs.md for the format."""
        file.write(self, FilePath(path))

    # --- memory ------------------------------------------------------------------------------

    def _binding(self, memory: Memory) -> Binding:
        """The plan bound to memory; bound again if a home has moved or another program has enlarged
        the scratch memory."""
        current = self._version == memory.version
        if self._bound is None or self._bound.scratch is not memory.scratch or not current:
            persistent = self._persistent(memory)
            self._bound = memory.bind(
                self._spelled.values, self.plan, persistent, self.draws, self.fast
            )
            self._version = memory.version
        return self._bound

    def _persistent(self, memory: Memory) -> dict[int, Array]:
        """The arrays that outlive a replay: constants, inputs and outputs, by value index."""
        plan, found = self.plan, dict(self.constants)

        def home(path: Path, value: Value) -> Array:
            return memory.home(path, value).array

        found |= {i: home(path, self.values[i]) for path, i in self.inputs.items()}
        for number, i in enumerate(self.draws):
            found[i] = home(("", "random", str(number)), self.values[i])
        found |= {output: found[i] for output, i in plan.in_place.items()}
        constant = {plan.calls[c].result for c in plan.constants}
        for path, i in self.outputs.items():
            root = self.roots[i]
            if i not in self.replaced and root not in found and root not in constant:
                found[root] = home(("", "result", *path), self.values[root])
        return found

    # --- arguments ---------------------------------------------------------------------------

    def _given(self, args: tuple[Any, ...]) -> dict[Path, Any]:
        """The leaves of the arguments by path; the paths are those recorded."""
        if len(args) != len(self.parameters):
            raise Error(
                f"the program takes {len(self.parameters)} arguments "
                f"({', '.join(self.parameters)}); got {len(args)}"
            )
        given = dict(leaves(dict(zip(self.parameters, args, strict=True))))
        if given.keys() != self.signature.keys():
            odd = sorted(map("/".join, given.keys() ^ self.signature.keys()))
            raise Error(f"the arguments differ from those recorded in: {', '.join(odd[:5])}")
        return given

    def _moving(self, given: dict[Path, Any]) -> dict[int, Any]:
        """The arguments that are not in the memory of their inputs yet, by value index."""
        moving = {}
        for path, kept in self.signature.items():
            x = given[path]
            if isinstance(kept, Ref):
                home = self._homes[kept.index]
                if not home.has(x):
                    moving[kept.index] = self._fitting(path, self.values[kept.index], x)
                if not home.in_place and x is home.handed():
                    home.in_place, home.pool = True, []  # it is passed back in from now on
            elif isinstance(kept, Fixed) and not _same(x, kept.value):
                raise Error(
                    f"{'/'.join(path)}: recorded with {kept.value!r}, which is part of the "
                    f"program; got {x!r}; record the step again"
                )
        return moving

    def _claim(self, memory: Memory, moving: dict[int, Any]) -> None:
        """Prepare the homes that this call writes to: see `Memory.overwrite`."""
        replaced = set(self.replaced.values())
        for path, i in self.inputs.items():
            if i in moving or i in replaced:
                memory.overwrite(self._homes[i], path, passed=i not in moving)

    def _fill(
        self, memory: Memory, binding: Binding, moving: dict[int, Any], given: dict[Path, Any]
    ) -> None:
        """The arguments in the memory of the inputs, each read before one is written."""
        apart = {i: x.copy() if memory.holds(x) else x for i, x in moving.items()}
        for i, x in apart.items():
            memory.put(binding.arrays[i], x)
        binding.draw({i: _stream(draw, given) for i, draw in self.draws.items()})

    def _fitting(self, path: Path, value: Value, x: Any) -> Any:
        """An argument of the recorded form."""
        shape, dtype = tuple(getattr(x, "shape", ())), str(getattr(x, "dtype", "float64"))
        if (shape, dtype) != (value.shape, value.dtype) or isinstance(x, int | str | None):
            found = f"{dtype}{list(shape)}" if hasattr(x, "dtype") else repr(x)
            raise Error(
                f"{'/'.join(path)}: recorded as {value.dtype}{list(value.shape)}; got {found}; "
                "a program serves one shape and dtype: record the step again"
            )
        return x


def _stream(draw: Draw, given: dict[Path, Any]) -> Random:
    """The stream of a draw, from the `Random` among the arguments."""
    stream: Random = given[draw.stream.path]
    for method, argument in draw.lineage:
        stream = getattr(stream, method)(argument)
    return stream


def _same(x: Any, kept: Any) -> bool:
    return x is kept or bool(type(x) is type(kept) and x == kept)
