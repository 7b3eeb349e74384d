"""Loss and correct predictions over a whole data set."""

from __future__ import annotations

import math
from typing import Any

from npdrt.arrays import Array, namespace
from npdrt.train.shards import ALONE, Alone
from npdrt.train.step import State, Task

EVALUATED = 1 << 22  # values of a batch in an evaluation; 1000 images of CIFAR have 3 million


def evaluate(
    task: Task, state: State, x: Array, y: Array, batch: int = 1000, ranks: Alone = ALONE
) -> tuple[Any, Any]:
    """`(mean loss, number correct)` over a data set in evaluation mode, as 0-d arrays.

    x: an array, or an object whose slices are arrays. batch: examples at a time, fewer if they
    would have more than EVALUATED values. ranks: they share the batches; the sums go from the first
    batch to the last, with the same bits on any number of ranks.
    """
    xp = namespace(y)
    batch = max(1, min(batch, EVALUATED // math.prod(x.shape[1:])))
    starts = range(0, x.shape[0], batch)
    mine = ranks.mine(len(starts))
    found = [
        _of_batch(task, state, x[start : start + batch, ...], y[start : start + batch, ...])
        for start in starts[mine.start : mine.stop]
    ]
    total = xp.asarray(0.0, dtype=xp.float64)
    correct = xp.asarray(0, dtype=xp.int64)
    for loss, right in ranks.joined(found):
        total, correct = total + xp.asarray(loss), correct + xp.asarray(right)
    return total / task.count(y), correct


def _of_batch(task: Task, state: State, x: Array, y: Array) -> tuple[Array, Array]:
    """The loss of a batch times its predictions, float64, and its correct ones, int64; 0-d."""
    output = task.predict(state.params, state.buffers, x, y)
    loss = namespace(y).asarray(task.loss(output, y, smoothed=False), dtype=namespace(y).float64)
    return loss * task.count(y), task.correct(output, y)
