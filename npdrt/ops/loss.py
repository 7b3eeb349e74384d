"""Softmax and the losses. Every loss is a mean over the batch and a 0-d value."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from npdrt import compute
from npdrt.arrays import Array, namespace
from npdrt.autodiff import ALL, primitive
from npdrt.compute import has_kernels, total
from npdrt.errors import Error
from npdrt.ops import rows
from npdrt.ops.reduction import axes_of, exponentials, is_alone, softmax_of

__all__ = ["hinge", "log_softmax", "softmax", "softmax_cross_entropy", "squared_error"]

BLOCK = 1 << 19  # logits that `softmax_cross_entropy` works on at once on a CPU, in whole rows


@primitive(computes=ALL)
def softmax(x: Array, *, axis: int = -1) -> Any:
    """exp(x) / sum exp(x) over `axis`, shifted by the maximum. vjp: y (g - sum g y)."""
    axes = axes_of(x, axis)
    if axes == (x.ndim - 1,) and has_kernels(x):
        return rows.softmax(x)
    y = softmax_of(x, axes)
    return y, lambda g: y * (g - total(g * y, axes, keepdims=True))


@primitive(computes=ALL)
def log_softmax(x: Array, *, axis: int = -1) -> Any:
    """x - logsumexp(x) over `axis`, as (x - max) - log sum exp(x - max).

    vjp: g - p sum g, p = softmax(x). Where the maximum's p is near 1, its logarithm is -log1p of
    the sum of the other terms, and 1 - p the others' share, so that both keep their digits.
    Error of value and 1 - p: 8 ulps, and one more for every unit of |x - max|, since the
    difference is rounded before it is an exponent.
    """
    xp, axes = namespace(x), axes_of(x, axis)
    e = exponentials(x, axes)

    def vjp(g: Array) -> Array:
        """For the maximum g (1 - p) - p (sum of the other g), the same with other roundings."""
        weights, at_top = e.z / e.sums, e.at_top()
        rest = total(xp.where(at_top, xp.zeros_like(g), g), axes, keepdims=True)
        plain = g - weights * total(g, axes, keepdims=True)
        return xp.where(at_top, g * e.missing() - weights * rest, plain)

    return e.shifted - e.log_sums(), vjp


@primitive(computes=slice(1))
def softmax_cross_entropy(logits: Array, labels: Array, *, label_smoothing: float = 0.0) -> Any:
    """Mean cross-entropy of integer labels under softmax(logits).

    logits: (N, C), or (..., C). labels: (N,) or (...), integers in [0, C). A label out of range
    chooses no class and raises no error, so check labels on the host where data enters. With
    q = (1 - s) onehot + s / C:  loss = mean_n [logsumexp(z_n) - sum_c q_nc z_nc]  (nats).
    Stable for any finite logits. glogits = (softmax(z) - q) / N. Where the label's softmax p is
    near 1, without smoothing, -log p and p - 1 keep their digits as in `log_softmax`.

    On a GPU it is one kernel, and its derivative another (`npdrt.ops.rows`). On a CPU the rows are
    taken in blocks above BLOCK elements, with the same bits: besides the logits, only their
    derivative needs memory of their size. The backward pass computes the exponentials of a block
    again.
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
    z = xp.reshape(logits, (-1, classes))  # (N, C)
    n = z.shape[0]
    if n == 0:
        raise Error("softmax_cross_entropy: the batch is empty")
    labels = xp.astype(xp.reshape(labels, (-1, 1)), xp.int64)  # (N, 1); uint8 holds few classes
    rule = _whole if n * classes <= BLOCK else _in_blocks
    rule = rows.cross_entropy if has_kernels(z) else rule
    picked, gz = rule(z, labels, label_smoothing)
    return -total(picked, (0,)) / n, (lambda g: xp.reshape(gz(g), logits.shape), None)


def _whole(z: Array, labels: Array, smoothing: float) -> tuple[Array, Callable[[Array], Array]]:
    """sum_c q_c log softmax(z)_c of every row of z, and g -> (softmax(z) - q) g / N."""
    xp, classes = namespace(z), z.shape[1]
    chosen = labels == xp.arange(classes, dtype=xp.int64)
    e = exponentials(z, (1,))
    log_p, weights = e.shifted - e.log_sums(), e.z / e.sums
    picked = total(xp.where(chosen, log_p, xp.zeros((), dtype=z.dtype)), (1,))
    if smoothing:
        even = total(log_p, (1,)) / classes
        picked = (1.0 - smoothing) * picked + smoothing * even

    def gz(g: Array) -> Array:
        q = (1.0 - smoothing) * xp.astype(chosen, z.dtype) + smoothing / classes
        slope = weights - q
        slope = slope if smoothing else _kept(slope, chosen, e.z, e.alone, e.missing())
        return slope * (g / z.shape[0])

    return picked, gz


def _kept(slope: Array, chosen: Array, z: Array, alone: Array, missing: Array) -> Array:
    """p - q; where the label's p is near 1, it is minus the share of the other terms, so that p - 1
    keeps its digits."""
    return namespace(z).where(chosen & (z >= 1) & alone, -missing, slope)


def _in_blocks(z: Array, labels: Array, smoothing: float) -> tuple[Array, Callable[[Array], Array]]:
    """`_whole`, block by block: the same operations on every element, so the same bits."""
    xp, (n, classes) = namespace(z), z.shape
    rows, numbers = max(1, BLOCK // classes), xp.arange(classes, dtype=xp.int64)
    blocks = [slice(start, min(start + rows, n)) for start in range(0, n, rows)]
    found, evens = [], []
    for block in blocks:
        e = exponentials(z[block, :], (1,))
        found.append((e.top, e.sums, e.others, e.log_sums()))
        if smoothing:
            evens.append(total(e.shifted - e.log_sums(), (1,)))
    top, sums, others, log_sums = (xp.concat(parts) for parts in zip(*found, strict=True))
    shifted = _chosen_of(z, labels) - top  # (N, 1)
    inside = (labels >= 0) & (labels < classes)
    picked = xp.where(inside, shifted - log_sums, xp.zeros_like(shifted))[:, 0]
    if smoothing:
        picked = (1.0 - smoothing) * picked + smoothing * (xp.concat(evens) / classes)

    def gz(g: Array) -> Array:
        whole, share = xp.zeros(z.shape, dtype=z.dtype), g / n
        alone, missing = is_alone(sums), others / sums
        for block in blocks:
            chosen, e = labels[block, :] == numbers, compute.exp(z[block, :] - top[block, :])
            q = xp.astype(chosen, z.dtype)
            q = (1.0 - smoothing) * q + smoothing / classes if smoothing else q
            slope = e / sums[block, :] - q
            if not smoothing:
                slope = _kept(slope, chosen, e, alone[block, :], missing[block, :])
            whole[block, :] = slope * share
        return whole

    return picked, gz


def _chosen_of(z: Array, labels: Array) -> Array:
    """The element of every row at its label, (N, 1); any element if the label is out of range."""
    xp, (n, classes) = namespace(z), z.shape
    starts = xp.arange(n, dtype=xp.int64)[:, None] * classes
    places = xp.reshape(starts + xp.clip(labels, 0, classes - 1), (-1,))
    return xp.reshape(xp.take(xp.reshape(z, (-1,)), places), (n, 1))


@primitive(computes=ALL)
def squared_error(prediction: Array, target: Array) -> Any:
    """Mean of (prediction - target)**2 over all elements."""
    if tuple(prediction.shape) != tuple(target.shape):
        raise Error(
            f"squared_error: expected equal shapes; got {tuple(prediction.shape)} and "
            f"{tuple(target.shape)}"
        )
    difference = prediction - target
    n = math.prod(difference.shape)
    if n == 0:
        raise Error("squared_error of no elements is not defined")
    return total(difference * difference, axes_of(difference, None)) / n, (
        lambda g: difference * (2.0 * g / n),
        lambda g: difference * (-2.0 * g / n),
    )


@primitive(computes=ALL, analytic=False)
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
    return total(xp.where(inside, margin, zero), axes_of(margin, None)) / n, (
        lambda g: xp.where(inside, -signs * (g / n), zero),
        None,
    )
