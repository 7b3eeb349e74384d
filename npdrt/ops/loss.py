"""Softmax and the losses. Every loss is a mean over the batch and a 0-d value."""

from __future__ import annotations

import math
from typing import Any

from npdrt.arrays import Array, namespace
from npdrt.autodiff import primitive
from npdrt.errors import Error
from npdrt.ops.reduction import axes_of, shifted_softmax


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
    chosen = labels == xp.arange(classes, dtype=xp.int64)
    _, shifted, log_sum, weights = shifted_softmax(z, (1,))
    log_p = shifted - log_sum
    picked = xp.sum(xp.where(chosen, log_p, xp.zeros((), dtype=z.dtype)), axis=1)
    if label_smoothing:
        even = xp.sum(log_p, axis=1) / classes
        picked = (1.0 - label_smoothing) * picked + label_smoothing * even

    def gz(g: Array) -> Array:
        q = (1.0 - label_smoothing) * xp.astype(chosen, z.dtype) + label_smoothing / classes
        return xp.reshape((weights - q) * (g / n), logits.shape)

    return -xp.sum(picked) / n, (gz, None)


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
