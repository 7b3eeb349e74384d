"""Loss and correct predictions over a whole data set."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from npdrt.arrays import Array, namespace
from npdrt.train.shards import ALONE, Alone
from npdrt.train.step import State, Task

EVALUATED = 1 << 22  # values of a batch in an evaluation; 1000 images of CIFAR have 3 million


def unseen(output: Array, labels: Array) -> None:
    """A `see` of `evaluate` that does nothing."""


def evaluate(
    task: Task, state: State, x: Array, y: Array, batch: int = 1000, ranks: Alone = ALONE,
    see: Callable[[Array, Array], None] = unseen,
) -> tuple[Any, Any]:  # fmt: skip
    """`(mean loss, number correct)` over a data set in evaluation mode, as 0-d arrays.

    x, batch: see `batches`. ranks: they share the batches; the sums go from the first batch to the
    last, with the same bits on any number of ranks. see: called with the output and the labels of
    every batch of this rank.
    """
    xp = namespace(y)
    cuts = batches(x, batch)
    mine = ranks.mine(len(cuts))
    found = [
        _of_batch(task, state, x[at, ...], y[at, ...], see) for at in cuts[mine.start : mine.stop]
    ]
    total = xp.asarray(0.0, dtype=xp.float64)
    correct = xp.asarray(0, dtype=xp.int64)
    for loss, right in ranks.joined(found):
        total, correct = total + xp.asarray(loss), correct + xp.asarray(right)
    return total / task.count(y), correct


def batches(x: Any, most: int) -> list[slice]:
    """Slices of x, an array or an object whose slices are arrays: `most` examples each, or fewer if
    they would have more than EVALUATED values."""
    size = max(1, min(most, EVALUATED // math.prod(x.shape[1:])))
    return [slice(start, start + size) for start in range(0, x.shape[0], size)]


def _of_batch(
    task: Task, state: State, x: Array, y: Array, see: Callable[[Array, Array], None]
) -> tuple[Array, Array]:
    """The loss of a batch times its predictions, float64, and its correct ones, int64; 0-d."""
    output = task.predict(state.params, state.buffers, x, y)
    see(output, y)
    loss = namespace(y).asarray(task.loss(output, y, smoothed=False), dtype=namespace(y).float64)
    return loss * task.count(y), task.correct(output, y)
