"""Softmax and the losses. Every loss is a mean over the batch and a 0-d value."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from npdrt.arrays import Array, namespace, real
from npdrt.autodiff import primitive
from npdrt.errors import Error
from npdrt.ops.reduction import axes_of, shifted_softmax

BLOCK = 1 << 19  # logits above which `softmax_cross_entropy` takes their rows in blocks of so many


@primitive
def softmax(x: Array, *, axis: int = -1) -> Any:
    """exp(x) / sum exp(x) over `axis`, shifted by the maximum. vjp: y (g - sum g y)."""
    xp = namespace(x)
    *_, y = shifted_softmax(x, axes_of(x, axis))
    return y, lambda g: y * (g - xp.sum(g * y, axis=axis, keepdims=True))


@primitive
def log_softmax(x: Array, *, axis: int = -1) -> Any:
    """x - logsumexp(x) over `axis`, as (x - max) - log sum exp(x - max).

    vjp: g - softmax(x) sum g.
    """
    xp = namespace(x)
    _, shifted, log_sum, weights = shifted_softmax(x, axes_of(x, axis))
    return shifted - log_sum, lambda g: g - weights * xp.sum(g, axis=axis, keepdims=True)


@primitive
def softmax_cross_entropy(logits: Array, labels: Array, *, label_smoothing: float = 0.0) -> Any:
    """Mean cross-entropy of integer labels under softmax(logits).

    logits: (N, C), or (..., C). labels: (N,) or (...), integers in [0, C); out of range they
    choose no class and are not noticed, so check them on the host where data enters. With
    q = (1 - s) onehot + s / C:  loss = mean_n [logsumexp(z_n) - sum_c q_nc z_nc]  (nats).
    Stable for any finite logits. glogits = (softmax(z) - q) / N.

    Above BLOCK elements the rows are taken in blocks, to the same bits: beside the logits nothing
    of their size is held but, in the end, their derivative. The backward pass makes the
    exponentials of a block anew.
    """
    xp, classes = namespace(logits, labels), logits.shape[-1]
    if tuple(labels.shape) != tuple(logits.shape[:-1]):
        raise Error(
            f"softmax_cross_entropy: expected labels of shape {tuple(logits.shape[:-1])} for "
            f"logits {tuple(logits.shape)}; got {tuple(labels.shape)}"
        )
    if not xp.isdtype(labels.dtype, "integral"):
        raise Error(f"softmax_cross_entropy: expected integer labels; got {labels.dtype}")
    if not 0.0 <= label_smoothing < 1.0:
        raise Error(f"label_smoothing must lie in [0, 1); got {label_smoothing}")
    z = xp.reshape(logits, (-1, classes))
    n = z.shape[0]
    if n == 0:
        raise Error("softmax_cross_entropy: the batch is empty")
    labels = xp.astype(xp.reshape(labels, (-1, 1)), xp.int64)  # all classes fit, also from uint8
    rule = _whole if n * classes <= BLOCK else _in_blocks
    picked, gz = rule(z, labels, label_smoothing)
    return -xp.sum(picked) / n, (lambda g: xp.reshape(gz(g), logits.shape), None)


def _whole(z: Array, labels: Array, smoothing: float) -> tuple[Array, Callable[[Array], Array]]:
    """sum_c q_c log softmax(z)_c of every row of z, and g -> (softmax(z) - q) g / N."""
    xp, classes = namespace(z), z.shape[1]
    chosen = labels == xp.arange(classes, dtype=xp.int64)
    _, shifted, log_sum, weights = shifted_softmax(z, (1,))
    log_p = shifted - log_sum
    picked = xp.sum(xp.where(chosen, log_p, xp.zeros((), dtype=z.dtype)), axis=1)
    if smoothing:
        even = xp.sum(log_p, axis=1) / classes
        picked = (1.0 - smoothing) * picked + smoothing * even

    def gz(g: Array) -> Array:
        q = (1.0 - smoothing) * xp.astype(chosen, z.dtype) + smoothing / classes
        return (weights - q) * (g / z.shape[0])

    return picked, gz


def _in_blocks(z: Array, labels: Array, smoothing: float) -> tuple[Array, Callable[[Array], Array]]:
    """`_whole`, block by block: the same operations on every element, so the same bits."""
    xp, (n, classes) = namespace(z), z.shape
    rows, numbers = max(1, BLOCK // classes), xp.arange(classes, dtype=xp.int64)
    blocks = [slice(start, min(start + rows, n)) for start in range(0, n, rows)]
    tops, totals, evens = [], [], []
    for block in blocks:
        top, shifted, total = _shifted(z[block, :])
        tops.append(top)
        totals.append(total)
        if smoothing:
            evens.append(xp.sum(shifted - xp.log(total), axis=1))
    picked = (_chosen_of(z, labels) - xp.concat(tops)) - xp.log(xp.concat(totals))
    inside = (labels >= 0) & (labels < classes)
    picked = xp.where(inside, picked, xp.zeros_like(picked))[:, 0]
    if smoothing:
        picked = (1.0 - smoothing) * picked + smoothing * (xp.concat(evens) / classes)

    def gz(g: Array) -> Array:
        whole, share = xp.zeros(z.shape, dtype=z.dtype), g / n
        for block, top, total in zip(blocks, tops, totals, strict=True):
            q = xp.astype(labels[block, :] == numbers, z.dtype)
            q = (1.0 - smoothing) * q + smoothing / classes if smoothing else q
            whole[block, :] = (xp.exp(z[block, :] - top) / total - q) * share
        return whole

    return picked, gz


def _shifted(z: Array) -> tuple[Array, Array, Array]:
    """The maximum m of every row (0 where it is not finite), z - m, and the sums of exp(z - m)."""
    xp = namespace(z)
    top = xp.max(real(z), axis=1, keepdims=True)
    top = xp.where(xp.isfinite(top), top, xp.zeros_like(top))
    shifted = z - top
    return top, shifted, xp.sum(xp.exp(shifted), axis=1, keepdims=True)


def _chosen_of(z: Array, labels: Array) -> Array:
    """The element of every row that its label chooses, (N, 1); any, where none does."""
    xp, (n, classes) = namespace(z), z.shape
    starts = xp.arange(n, dtype=xp.int64)[:, None] * classes
    places = xp.reshape(starts + xp.clip(labels, 0, classes - 1), (-1,))
    return xp.reshape(xp.take(xp.reshape(z, (-1,)), places), (n, 1))


@primitive
def squared_error(prediction: Array, target: Array) -> Any:
    """Mean of (prediction - target)**2 over all elements."""
    xp = namespace(prediction, target)
    if tuple(prediction.shape) != tuple(target.shape):
        raise Error(
            f"squared_error: expected equal shapes; got {tuple(prediction.shape)} and "
            f"{tuple(target.shape)}"
        )
    difference = prediction - target
    n = math.prod(difference.shape)
    if n == 0:
        raise Error("squared_error of no elements is not defined")
    return xp.sum(difference * difference) / n, (
        lambda g: difference * (2.0 * g / n),
        lambda g: difference * (-2.0 * g / n),
    )


@primitive(analytic=False)
def hinge(scores: Array, signs: Array) -> Any:
    """Mean of max(0, 1 - sign * score), signs of -1 or +1 in the dtype of the scores.

    Subgradient 0 at the kink sign * score = 1.
    """
    xp = namespace(scores, signs)
    if tuple(scores.shape) != tuple(signs.shape):
        raise Error(
            f"hinge: expected equal shapes; got {tuple(scores.shape)} and {tuple(signs.shape)}"
        )
    n = math.prod(scores.shape)
    if n == 0:
        raise Error("hinge of no elements is not defined")
    margin = 1.0 - signs * scores
    inside, zero = margin > 0, xp.zeros((), dtype=scores.dtype)
    return xp.sum(xp.where(inside, margin, zero)) / n, (
        lambda g: xp.where(inside, -signs * (g / n), zero),
        None,
    )
