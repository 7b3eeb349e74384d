"""Dropout: the masks come from npdrt's random streams and are arguments like any other array.

In training mode a model gets a `Random` (the training loop makes one for each step) and draws every
mask from a stream with its own name, because each draw starts at the beginning of its stream, so
that two draws from one stream are equal:

    keep = keep_mask(h, random.of("layers/00/dropout"), rate=0.2)
    h = ops.dropout(h, keep, rate=0.2)

When a step is recorded, the draw becomes an input of the program: every replay draws it again from
the `Random` it gets; on a GPU by a kernel of its own (`npdrt.philox`). The bits are the same on any
device and after any resumption.
"""

from __future__ import annotations

from typing import Any

from npdrt.arrays import Array, bernoulli, namespace
from npdrt.autodiff import detach, primitive
from npdrt.errors import Error
from npdrt.random import Random

__all__ = ["dropout"]


@primitive(computes=slice(1))
def dropout(x: Array, keep: Array = None, *, rate: float) -> Any:
    """x keep / (1 - rate): elements where `keep` is false become 0, the others grow.

    x: any shape. keep: bool or uint8 (of 0 and 1), of the shape of x or one that broadcasts to it
    (a length-1 axis drops whole rows), from `keep_mask`; None keeps everything, as in evaluation.
    rate: the probability of dropping, in [0, 1). The factor 1 / (1 - rate) is rounded once to the
    dtype of x, as PyTorch does. NaN and infinity times 0 are NaN. gx = g keep / (1 - rate).

    Source: Srivastava et al. 2014, "Dropout"; scaled while training, so that evaluation is x.
    """
    check_rate("dropout", rate)
    if keep is None:
        return x, lambda g: g
    xp = namespace(x, keep)
    check_keep("dropout", keep, tuple(x.shape))

    def dropped(g: Array) -> Array:
        return g * (xp.astype(keep, g.dtype) * (1.0 / (1.0 - rate)))

    return dropped(x), (dropped, None)


def keep_mask(
    like: Any, random: Random | None, *, rate: float, shape: tuple[int, ...] | None = None
) -> Array | None:
    """A mask for `dropout`: True with probability 1 - rate, in the library and on the device of
    `like` (an array or a Tensor), of its shape or of `shape`.

    None, which keeps everything, if rate is 0 or random is None (evaluation). The numbers are
    those of `random.bernoulli(shape, 1 - rate)`: equal streams give equal masks, so name a stream
    for every mask.
    """
    check_rate("keep_mask", rate)
    if random is None or rate == 0:
        return None
    like = detach(like)
    return bernoulli(random, tuple(like.shape) if shape is None else shape, 1.0 - rate, like)


def check_rate(name: str, rate: float) -> None:
    """Refuse a rate that is not in [0, 1)."""
    if not 0.0 <= rate < 1.0:
        raise Error(f"{name}: rate is the probability of dropping, in [0, 1); got {rate}")


def check_keep(name: str, keep: Array, shape: tuple[int, ...]) -> None:
    """Refuse a mask that is neither bool nor uint8, or does not broadcast to `shape`."""
    xp = namespace(keep)
    if keep.dtype not in (xp.bool, xp.uint8):
        raise Error(f"{name}: expected a mask keep of bool or uint8; got {keep.dtype}")
    if not broadcasts(tuple(keep.shape), shape):
        raise Error(
            f"{name}: the mask keep has shape {tuple(keep.shape)}, which does not broadcast to "
            f"{shape}"
        )


def broadcasts(shape: tuple[int, ...], target: tuple[int, ...]) -> bool:
    """Whether an array of `shape` broadcasts to exactly `target`."""
    tail = target[len(target) - len(shape) :] if len(shape) <= len(target) else ()
    return len(tail) == len(shape) and all(n in (1, m) for n, m in zip(shape, tail, strict=True))
