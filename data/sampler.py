"""Which examples are in the batch of a step: a pure function of the step."""

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

    Epoch e cuts the permutation Random(seed, "data/order", e).permutation(n) into batches, so that
    each epoch has every example once. To resume, only the step must be saved. drop_last: leave out
    the last batch of an epoch if it is smaller. ordered: every epoch goes from the first example to
    the last instead.

    Raises Error if n or batch_size is below 1, or batch_size is above n.
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
        """Indices of the examples of `step` (0, 1, ...), shape (batch_size,), int64.

        The last batch of an epoch is smaller if batch_size does not divide n, without drop_last.
        """
        if step < 0:
            raise Error(f"step: expected 0 or more; got {step}")
        epoch, k = divmod(step, self.batches_per_epoch)
        order = np.arange(self.n) if self.ordered else _order(self.seed, epoch, self.n)
        return order[k * self.batch_size : (k + 1) * self.batch_size].copy()


@lru_cache(maxsize=4)  # the epoch in use, for a few samplers at a time
def _order(seed: int, epoch: int, n: int) -> Indices:
    return Random(seed, "data/order", epoch).permutation(n)
