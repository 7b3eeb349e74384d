"""Which examples make up the batch of a step: a pure function of the step."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from npdrt.errors import Error
from npdrt.random import Random

Indices = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class Sampler:
    """Batches of `batch_size` out of `n` examples, in a new order each epoch.

    Epoch e takes the permutation Random(seed, "data/order", e).permutation(n) and cuts it into
    batches in order, so each epoch meets every example once. Nothing but the step must be saved
    to resume. drop_last: leave out the last batch of an epoch where it is smaller. ordered: every
    epoch takes them from the first to the last instead.

    Raises Error where n or batch_size is below 1, or batch_size above n.
    """

    n: int
    batch_size: int
    seed: int = 0
    drop_last: bool = False
    ordered: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.batch_size <= self.n:
            raise Error(
                f"batch size: expected 1 to {self.n}, the number of examples; got {self.batch_size}"
            )
        Random(self.seed)  # refuses a seed out of range here, not at the first batch

    @property
    def batches_per_epoch(self) -> int:
        """Steps in one epoch."""
        return self.n // self.batch_size if self.drop_last else -(-self.n // self.batch_size)

    def batch(self, step: int) -> Indices:
        """Indices of the examples of `step` (0, 1, ...), shape (batch_size,), int64; fewer in the
        last batch of an epoch where batch_size does not divide n and drop_last is off."""
        if step < 0:
            raise Error(f"step: expected 0 or more; got {step}")
        epoch, k = divmod(step, self.batches_per_epoch)
        order = np.arange(self.n) if self.ordered else _order(self.seed, epoch, self.n)
        return order[k * self.batch_size : (k + 1) * self.batch_size].copy()


@lru_cache(maxsize=4)  # the epoch in use, for a few samplers at a time
def _order(seed: int, epoch: int, n: int) -> Indices:
    return Random(seed, "data/order", epoch).permutation(n)
