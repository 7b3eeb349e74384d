"""A step over a batch in shards: equal parts, whose losses and gradients are added along a tree.

A shard is a part of the batch with a program of its own shape, statistics of its own for batch
normalisation, and random numbers of its own ("shards/<s>"). The gradient of the batch is the sum of
(n_s / n) * gradient of shard s, in the order of one binary tree over the shards. So a step has the
same bits in one process and on any number of ranks (`npdrt.train.ranks`), which share the shards
out among them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from npdrt.arrays import Array, Params, cast, namespace
from npdrt.errors import Error
from npdrt.optim import Updater
from npdrt.random import Random
from npdrt.train.step import State, Step, Task, Turn, make_step

Addition = tuple[int, int, int]  # row `first` += row `middle`: the sum of shards first to end - 1
Recorded = Callable[[Callable[..., Any], tuple[Any, ...]], Callable[..., Any]]
ADDED = ("bucket", "loss", "correct")


def bounds(n: int, shards: int) -> list[tuple[int, int]]:
    """Where the shards of n examples begin and end; sizes differ by at most one, none is empty.

    >>> bounds(10, 4)
    [(0, 2), (2, 5), (5, 7), (7, 10)]
    """
    count = min(n, shards)
    places = (share(s, count, n) for s in range(count))
    return [(place.start, place.stop) for place in places]


def share(part: int, parts: int, n: int) -> range:
    """Which of n things part number `part` of so many has: neighbours, nearly as many each."""
    return range(part * n // parts, (part + 1) * n // parts)


def tree(first: int, end: int) -> Iterator[Addition]:
    """The additions that sum the rows first to end - 1 into row `first`: a node splits at the
    largest power of two below its size.

    >>> list(tree(0, 5))
    [(0, 1, 2), (2, 3, 4), (0, 2, 4), (0, 4, 5)]
    """
    if end - first > 1:
        middle = first + (1 << ((end - first - 1).bit_length() - 1))
        yield from tree(first, middle)
        yield from tree(middle, end)
        yield first, middle, end


def add(rows: dict[int, Any], additions: Sequence[Addition]) -> None:
    """Carry out additions; the rows that are added to others go."""
    for first, middle, _ in additions:
        rows[first] = rows[first] + rows.pop(middle)


class Alone:
    """The one process of a run that is not shared out: rank 0 of 1."""

    rank, size = 0, 1

    def mine(self, count: int) -> range:
        """The shards of this rank, of so many."""
        return range(count)

    def summed(self, parts: dict[int, dict[str, Any]], count: int) -> dict[str, Any]:
        """The sum over all shards of what is added, and the buffers of shard 0."""
        found = {"buffers": parts[0]["buffers"]}
        for name in ADDED:
            rows = {s: part[name] for s, part in parts.items()}
            add(rows, list(tree(0, count)))
            found[name] = namespace(parts[0]["bucket"]).asarray(rows[0])
        return found

    def agreed(self, stop: Callable[[], int]) -> Callable[[], int]:
        """A `stop` that returns the largest signal of any rank, on all."""
        return stop

    def told(self, value: Any) -> Any:
        """The value of rank 0, on all."""
        return value

    def require_alike(self, what: Mapping[str, Any]) -> None:
        """Raise `Error` unless all ranks have the same software and these same things."""

    def compare(self, step: int, params: Params) -> None:
        """Now and then, raise `Error` if the parameters of the ranks have parted."""

    def together(self) -> AbstractContextManager[None]:
        """Inside, a rank that fails or falls silent ends all ranks."""
        return nullcontext()


ALONE = Alone()


class Sharded:
    """The function `(state, x, y, lr, random) -> Step` of `npdrt.train.step.make_step`, for a batch
    in shards.

    recorded: makes a program of a function and its first arguments.
    """

    def __init__(
        self, task: Task, rule: Updater, shards: int, ranks: Alone, recorded: Recorded, traced: bool
    ):
        self._part = part_of(task)
        self._update = make_step(given(task), rule, traced=traced)
        self._shards, self._ranks, self._recorded = shards, ranks, recorded
        self._made: dict[Any, Callable[..., Any]] = {}

    def __call__(self, state: State, x: Array, y: Array, lr: Any, random: Random) -> Step:
        n = x.shape[0]
        places = bounds(n, self._shards)
        parts = {}
        for s in self._ranks.mine(len(places)):
            start, end = places[s]
            inputs = x[start:end, ...], y[start:end, ...]
            share = (end - start) / n
            part = self._run(self._part, state, *inputs, random.of(f"shards/{s}"), share)
            parts[s] = kept(part, with_buffers=s == 0)
        summed = self._ranks.summed(parts, len(places))
        done: Step = self._run(self._update, state, summed, summed["correct"], lr, random)
        return done

    def _run(self, function: Callable[..., Any], *args: Any) -> Any:
        """The function, recorded once for each shape of its second argument."""
        key = function, getattr(args[1], "shape", None)
        if key not in self._made:
            self._made[key] = self._recorded(function, args)
        return self._made[key](*args)


def part_of(task: Task) -> Callable[..., dict[str, Any]]:
    """The function `(state, x, y, random, share) -> part` of a shard: its gradients in one row, its
    loss, float64, both times its share of the batch; its correct predictions; and its buffers."""
    turns = task.turns
    if len(turns) > 1:
        raise Error("shards are for a model with one network; leave --shards out")

    def part(state: State, x: Array, y: Array, random: Random, share: float) -> dict[str, Any]:
        (loss, (output, buffers)), grads = turns[0].gradients(
            state.params, state.buffers, x, y, random
        )
        xp = namespace(loss)
        rows = [xp.reshape(g * cast(share, g), (-1,)) for g in grads.values()]
        return {
            "bucket": xp.concat(rows),  # (elements of all parameters,)
            "loss": xp.asarray(loss, dtype=xp.float64) * share,
            "correct": task.correct(output, y),
            "buffers": buffers,
        }

    return part


def kept(part: Mapping[str, Any], *, with_buffers: bool) -> dict[str, Any]:
    """A copy of a part, which the next shard's program would overwrite."""
    xp = namespace(part["bucket"])
    buffers = part["buffers"] if with_buffers else {}
    return {
        **{name: xp.asarray(part[name], copy=True) for name in ADDED},
        "buffers": {name: xp.asarray(value, copy=True) for name, value in buffers.items()},
    }


def given(task: Task) -> Task:
    """The task whose gradients are there already: its step is given what `Alone.summed` returns in
    place of the examples."""
    return _Given(task.model, task.classes, task.label_smoothing, task.clip)


@dataclass(frozen=True)
class _Given(Task):
    @property
    def turns(self) -> Sequence[Turn]:
        return [_GivenTurn("", self.forward)]

    def correct(self, output: Array, y: Array) -> Array:
        return output


class _GivenTurn(Turn):
    def gradients(
        self, params: Params, buffers: Params, x: Any, y: Array, random: Random
    ) -> tuple[Any, Params]:
        xp, found, at = namespace(x["bucket"]), {}, 0
        for name, w in params.items():
            size = math.prod(w.shape)
            found[name] = xp.reshape(x["bucket"][at : at + size], w.shape)
            at += size
        return (x["loss"], (x["correct"], x["buffers"])), found
