"""The step of a run: recorded once for each shape of its arguments, then replayed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from npdrt.arrays import Device
from npdrt.errors import Error
from npdrt.optim import Updater
from npdrt.program import Program, compare, memory_on, record
from npdrt.train.config import Config
from npdrt.train.own import file_of
from npdrt.train.rules import own_rules
from npdrt.train.shards import ALONE, Alone, Sharded
from npdrt.train.step import Step, Task, make_step

Warn = Callable[[str], None]


class Steps:
    """The step of a run: recorded once for each shape of its arguments, then replayed.

    It runs eagerly if the configuration says so, or if a user's model or rule cannot be recorded;
    `warn` is called with the reason, once.
    """

    def __init__(
        self, task: Task, rule: Updater, config: Config, device: Device, warn: Warn,
        ranks: Alone = ALONE,
    ):  # fmt: skip
        self._task, self._rule, self._config = task, rule, config
        self._device, self._warn = device, warn
        self._warned = self._graph_warned = False
        self._made: dict[Any, Callable[..., Step]] = {}  # by shape, names of state, traced
        self._open: set[Any] = set()  # those of which is not known yet whether they are a graph
        self._memory = memory_on(device)
        self._sharded = Sharded(task, rule, config.shards, ranks, self._replayed, config.sums)

    def __call__(self, *args: Any, traced: bool) -> Step:
        """`make_step`'s function of `(state, x, y, lr, random)`."""
        state, x = args[:2]
        key = (x.shape, tuple(state.buffers), tuple(state.optimizer), traced)
        if key not in self._made:
            self._made[key] = self._new(args, traced)
            self._open |= {key} if self._device.kind == "cuda" else set()
        done = self._made[key](*args)
        if key in self._open:
            self._warn_without_graph(key)
        return done

    def _new(self, args: tuple[Any, ...], traced: bool) -> Callable[..., Step]:
        if self._config.shards > 1:
            return partial(self._sharded, traced=traced)
        return self._replayed(make_step(self._task, self._rule, traced=traced), args)

    def _replayed(self, step: Callable[..., Any], args: tuple[Any, ...]) -> Callable[..., Any]:
        return step if self._config.eager else self._recorded(step, args)

    @property
    def graph(self) -> str:
        """How steps run on a GPU: "one CUDA graph", "call by call: REASON"; "" if that is not known
        yet, and on a CPU."""
        programs = [made for made in self._made.values() if isinstance(made, Program)]
        if error := next((p.graph_error for p in programs if p.graph_error), None):
            return f"call by call: {error}"
        return "one CUDA graph" if any(p.graph for p in programs) else ""

    def _warn_without_graph(self, key: Any) -> None:
        program = self._made[key]
        if not isinstance(program, Program) or program.graph or program.graph_error:
            self._open.remove(key)
        if not self._graph_warned and self.graph.startswith("call by call"):
            self._graph_warned = True
            self._warn(
                f"the step does not become a CUDA graph; it runs several times slower, {self.graph}"
            )

    def _recorded(self, step: Callable[..., Any], args: tuple[Any, ...]) -> Callable[..., Any]:
        """The program of a step; the step itself if a user's model or rule cannot be recorded."""
        own = self._own
        try:
            program = record(step, *args, memory=self._memory, fast=self._config.fast)
            if own and (found := compare(program, record(step, *args))):
                raise Error(
                    f"recorded again, it makes other calls (call {found.number}, {found.what}: "
                    f"{found.a} and {found.b}); what differs between steps must be an argument"
                )
        except Exception as error:
            if not own:
                raise
            step(*args)  # a model that fails either way says why, without this warning
            self._warn_of_eager(error)
            return step
        self._memory.adopt({"state": args[0]})
        return program

    @property
    def _own(self) -> str:
        """What the step runs of the user's files."""
        config = self._config
        names = [config.model, *own_rules(config.optimizer, config.groups)]
        return ", ".join(filter(file_of, names))

    def _warn_of_eager(self, error: Exception) -> None:
        if not self._warned:
            self._warn(
                f"the step of {self._own} cannot be recorded, so it runs eagerly, call by "
                f"call (--eager does so without this warning): {error}"
            )
        self._warned = True
