"""A step over a batch in shards: equal parts, whose losses and gradients are added along a tree.

A shard is a part of the batch with a program of its own shape, statistics of its own for batch
normalisation, and random numbers of its own ("shards/<s>"). The gradient of the batch is the sum of
(n_s / n) * gradient of shard s, in the order of one binary tree over the shards. So a step has the
same bits in one process and on any number of ranks (`npdrt.train.ranks`), which share the shards
out among them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

from npdrt.arrays import Array, Params, cast, copied, namespace, phase
from npdrt.optim import Updater
from npdrt.optim.function import shared_state
from npdrt.random import Random
from npdrt.train import integers
from npdrt.train.step import State, Step, Task, Turn, joined, measure

Addition = tuple[int, int, int]  # row `first` += row `middle`: the sum of shards first to end - 1
Recorded = Callable[[Callable[..., Any], tuple[Any, ...]], Callable[..., Any]]
Numbers = tuple[Array, Array]  # of a shard: its share of the loss, and its correct predictions


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


def roots(mine: range, count: int) -> list[int]:
    """The first shards of the largest subtrees of a rank, of so many shards."""
    gone = {middle for _, middle, _ in held(mine, count)}
    return [s for s in mine if s not in gone]


def held(mine: range, count: int) -> list[Addition]:
    """The additions whose shards are all of one rank."""
    return [a for a in tree(0, count) if mine.start <= a[0] and a[2] <= mine.stop]


def schedule(mine: range, count: int) -> Iterator[tuple[int, int, int]]:
    """The shards of a rank in order, each with the number of sums that wait below it on a stack,
    and how many sums on top of these it is added to, the last one first: all that it completes.

    >>> list(schedule(range(4), 4))
    [(0, 0, 0), (1, 0, 1), (2, 1, 0), (3, 0, 2)]
    """
    height, ends = 0, [end for _, _, end in held(mine, count)]
    for s in mine:
        added = ends.count(s + 1)
        height -= added
        yield s, height, added
        height += 1


def add(rows: dict[int, Any], additions: Sequence[Addition]) -> None:
    """Carry out additions; the rows that are added to others go."""
    for first, middle, _ in additions:
        rows[first] = rows[first] + rows.pop(middle)


def both_summed(numbers: dict[int, Numbers], count: int) -> Numbers:
    """Loss and correct predictions of all shards."""
    columns = [{s: pair[i] for s, pair in numbers.items()} for i in (0, 1)]
    for column in columns:
        add(column, list(tree(0, count)))
    return columns[0][0], columns[1][0]


class Alone:
    """The one process of a run that is not shared out: rank 0 of 1."""

    rank, size = 0, 1

    def mine(self, count: int) -> range:
        """The shards of this rank, of so many."""
        return range(count)

    def summed(self, sums: dict[int, Params], count: int, like: Params) -> Params:
        """The sum of the gradients over all of so many shards. sums: those of this rank's subtrees,
        by first shard; they may be written to. like: arrays of their forms and device."""
        return sums[0]

    def reduced(self, x: Array, operation: str) -> Array:
        """The "sum" or "max" of an array of int64 or float64 over all ranks, element by element; it
        may be written to."""
        return x

    def numbers(
        self, numbers: dict[int, Numbers], count: int, buffers: Params, like: Params
    ) -> tuple[Array, Array, Params]:
        """The sums of loss and correct predictions over all shards, and the buffers of shard 0,
        where the arrays `like` are."""
        loss, correct = both_summed(numbers, count)
        return loss, correct, buffers

    def agreed(self, stop: Callable[[], int]) -> Callable[[], int]:
        """A `stop` that returns the largest signal of any rank, on all."""
        return stop

    def joined(self, found: list[Any]) -> list[Any]:
        """What every rank found, from the first rank to the last, on all."""
        return found

    def told(self, value: Any) -> Any:
        """The value of rank 0, on all."""
        return value

    def require_alike(self, what: Mapping[str, Any], *, software: bool) -> None:
        """Raise `Error` unless all ranks have these same things, and the same software if asked."""

    def compare(self, step: int, params: Params) -> None:
        """Now and then, raise `Error` if the parameters of the ranks have parted."""

    def together(self) -> AbstractContextManager[None]:
        """Inside, a rank that fails or falls silent ends all ranks."""
        return nullcontext()


ALONE = Alone()


class Sharded:
    """The function `(state, x, y, lr, random) -> Step` of `npdrt.train.step.make_step`, for a batch
    in shards. Every turn sums its gradients over the shards before it updates; it starts from the
    buffers that shard 0 has after the turn before.

    recorded: makes a program of a function and its first arguments. The program of a shard adds its
    gradients to the sums that they complete: see `schedule`. So of S shards at most log2(S) + 1
    sums are in memory, and no shard's gradients as a whole. sums: "tree", or "integers"
    (`npdrt.train.integers`), for which the gradients of all shards are kept.
    """

    def __init__(
        self, task: Task, rule: Updater, shards: int, ranks: Alone, recorded: Recorded,
        sums: str = "tree",
    ):  # fmt: skip
        self._task, self._rule, self._integers = task, rule, sums == "integers"
        self._shards, self._ranks, self._recorded = shards, ranks, recorded
        self._made: dict[Any, Callable[..., Any]] = {}
        self._sums: dict[tuple[str, str], Params] = {}  # by network and level; memory that lasts

    def __call__(
        self, state: State, x: Array, y: Array, lr: Any, random: Random, *, traced: bool
    ) -> Step:
        turns, names = self._task.turns, (tuple(state.buffers), tuple(state.optimizer), traced)
        new, buffers = State({}, {}, {}), state.buffers
        losses, measured, corrects = {}, {}, []
        for turn in turns:
            now = State(state.params, buffers, {})
            grads, loss, correct, buffers = self._gradients(turn, now, new.params, x, y, random)
            update = partial(_update, self._task, self._rule, turn, turn is turns[-1], traced)
            memory = self._sums.get((turn.network, "0"), {})  # another array is copied elsewhere
            place = "0" if all(memory.get(n) is g for n, g in grads.items()) else "total"
            args = State(state.params, {}, state.optimizer), new, {place: grads}, lr
            key = "update", turn.network, place, *names
            made, measured[turn.network] = self._run(key, update, *args)
            new = State(new.params | dict(made.params), {}, new.optimizer | dict(made.optimizer))
            losses[turn.network] = loss
            corrects.append(correct)
        params = {name: new.params[name] for name in state.params}
        after = State(params, buffers, {**state.optimizer, **new.optimizer})
        loss = losses.pop(turns[0].network)
        return Step(after, loss, corrects[0], joined(measured, params), losses)

    def _gradients(
        self, turn: Turn, state: State, renewed: Params, x: Array, y: Array, random: Random
    ) -> tuple[Params, Array, Array, Params]:
        """Gradients, loss, correct predictions and buffers of the batch."""
        n, own = x.shape[0], turn.own(state.params)
        places = bounds(n, self._shards)
        mine = self._ranks.mine(len(places))
        numbers: dict[int, Numbers] = {}
        buffers: Params = {}
        for s, level, added in self._schedule(mine, len(places)):
            start, end = places[s]
            inputs = x[start:end, ...], y[start:end, ...]
            more = random.of(f"shards/{s}"), (end - start) / n
            found = self._part(turn, level, added, state, renewed, *inputs, *more)
            numbers[s], buffers = found[:2], found[2] if s == 0 else buffers
        grads = self._summed(turn, mine, len(places), own)
        return grads, *self._ranks.numbers(numbers, len(places), buffers, own)

    def _schedule(self, mine: range, count: int) -> Iterable[tuple[int, int, int]]:
        """As `schedule`; for sums in integers every shard's gradients stay where they are."""
        return [(s, i, 0) for i, s in enumerate(mine)] if self._integers else schedule(mine, count)

    def _summed(self, turn: Turn, mine: range, count: int, like: Params) -> Params:
        """The sum of the gradients that the shards have left, and of those of other ranks."""
        firsts = list(mine) if self._integers else roots(mine, count)
        sums = {s: self._sums[turn.network, str(i)] for i, s in enumerate(firsts)}
        if self._integers:
            return integers.summed(list(sums.values()), count, like, self._ranks.reduced)
        return self._ranks.summed(sums, count, like)

    def _part(
        self, turn: Turn, level: int, added: int, state: State, *args: Any
    ) -> tuple[Array, Array, Params]:
        """Loss, correct predictions and buffers of a shard, whose gradients are in `_sums` then."""
        own, levels = turn.own(state.params), [str(level + i) for i in range(max(added, 1))]
        sums = {name: self._sums.get((turn.network, name), own) for name in levels}
        key = "part", turn.network, level, added, args[1].shape, tuple(state.buffers)
        part = self._run(key, partial(_part, self._task, turn, added), state, *args, sums)
        self._sums[turn.network, levels[0]] = part["sums"][levels[0]]
        return part["loss"], part["correct"], dict(part["buffers"])

    def _run(self, key: Any, function: Callable[..., Any], *args: Any) -> Any:
        """The function, recorded once for each key."""
        if key not in self._made:
            self._made[key] = self._recorded(function, args)
        return self._made[key](*args)


def _part(
    task: Task, turn: Turn, added: int, state: State, renewed: Params, x: Array, y: Array,
    random: Random, share: float, sums: dict[str, Params],
) -> dict[str, Any]:  # fmt: skip
    """What a shard comes to: its gradients times its share of the batch, added to so many of
    `sums`, in the place of the first; its loss, float64, times its share; its correct predictions;
    its buffers, as pairs, since they replace nothing yet.

    renewed: the parameters that the turns before have updated.
    """
    (loss, (output, buffers)), grads = turn.gradients(
        {**state.params, **renewed}, state.buffers, x, y, random
    )
    xp, levels, judged = namespace(loss), list(sums), turn.network == task.turns[0].network
    with phase("update"):
        total = {name: _plus(g * cast(share, g), [sums[k][name] for k in levels[:added]])
                 for name, g in grads.items()}  # fmt: skip
    return {
        "sums": {levels[0]: total},
        "loss": xp.asarray(loss, dtype=xp.float64) * share,
        "correct": task.correct(output, y) if judged else xp.asarray(0, dtype=xp.int64),
        "buffers": list(buffers.items()),
    }


def _plus(x: Array, sums: Sequence[Array]) -> Array:
    """first + (... + (last + x)) of the sums."""
    for left in reversed(sums):
        x = left + x
    return x


def _update(
    task: Task, rule: Updater, turn: Turn, last: bool, traced: bool,
    state: State, renewed: State, sums: dict[str, Params], lr: Any,
) -> tuple[State, dict[str, Array]]:  # fmt: skip
    """The state after a turn, given the sums of its gradients, and its measurements. Before the
    last turn it is what is new, in pairs, since that replaces nothing yet."""
    own, [grads] = turn.own(state.params), sums.values()
    before = {**state.optimizer, **shared_state(renewed.optimizer)}
    params, slots = rule.update(own, task.clipped(grads), before, lr=lr)
    with phase("measure"):
        measured = measure(own, params, grads, [turn.network]) if traced else {}
    if not last:
        return State(list(params.items()), {}, list(slots.items())), measured  # type: ignore
    earlier = [{n: copied(a) for n, a in d.items()} for d in (renewed.params, renewed.optimizer)]
    after = {**state.params, **earlier[0], **params}, {**state.optimizer, **earlier[1], **slots}
    return State(after[0], {}, after[1]), measured
