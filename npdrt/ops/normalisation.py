"""Normalisation of activations (batch, layer, group) and of weights (rows, entries).

All of them keep eps inside the root: x / sqrt(eps + mean square). Variances are biased, from two
passes: first the mean, then the squares of x - mean.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from npdrt.arrays import Array, check_dtypes, namespace, number
from npdrt.autodiff import ALL, detach, once, primitive
from npdrt.compute import dots, has_kernels, total
from npdrt.errors import Error
from npdrt.ops import rows as by_rows
from npdrt.ops.arithmetic import add, multiply
from npdrt.ops.reduction import Axis, axes_of
from npdrt.ops.shape import reshape

__all__ = [
    "batch_norm",
    "batch_norm_inference",
    "entry_norm",
    "group_norm",
    "layer_norm",
    "weight_norm",
]


class Statistics(NamedTuple):
    """The statistics of a batch, constants in any derivative.

    mean, variance (biased): (channels,). centred: x - mean, of the shape of x. n: how many
    values a channel has.
    """

    mean: Array
    variance: Array
    centred: Array
    n: int


def batch_statistics(x: Any, *, channel_axis: int) -> Statistics:
    """Mean and biased variance over all axes of x but `channel_axis`; x an array or a Tensor.

    Pass the result to `batch_norm`, which then does not compute it again, and to
    `running_statistics`. One value per channel is refused, as in PyTorch, since its variance is 0.
    """
    x = detach(x)
    check_dtypes("batch_statistics", x)
    xp, axes = namespace(x), _others(x, channel_axis)
    rows, over, n = _rows(x, axes)
    if n < 2:
        raise Error(
            f"batch statistics need more than 1 value a channel; got {n} in shape "
            f"{tuple(x.shape)}, channels in axis {channel_axis}; use a larger batch, or "
            "batch_norm_inference for evaluation"
        )
    flat = (x.shape[channel_axis],)
    if _by_rows(x, axes):
        moments = by_rows.row_moments(x, length=n)
        mean, variance = moments[0, :], moments[1, :]
        centred = rows - mean[:, None]
    else:
        mean, centred = _centre(rows, over, n)
        variance = summed_products(centred, centred, over) / n
    centred = xp.reshape(centred, x.shape)
    return Statistics(xp.reshape(mean, flat), xp.reshape(variance, flat), centred, n)


def running_statistics(
    mean: Array, variance: Array, statistics: Statistics, *, momentum: float = 0.1
) -> tuple[Array, Array]:
    """The running mean and variance (channels,) after one more batch of n values a channel.

        mean' = (1 - momentum) mean + momentum batch mean
        variance' = (1 - momentum) variance + momentum batch variance n / (n - 1)

    The running variance is the unbiased one, though the batch was normalised with the biased, and
    momentum is the weight of the new batch: both as in PyTorch.
    """
    momentum = number(momentum)
    n, kept = statistics.n, 1.0 - momentum
    return (
        kept * mean + momentum * statistics.mean,
        kept * variance + momentum * (statistics.variance * (n / (n - 1))),
    )


@primitive(computes=ALL)
def batch_norm(
    x: Array,
    gain: Array = None,
    bias: Array = None,
    statistics: Statistics | None = None,
    *,
    channel_axis: int,
    eps: float = 1e-5,
) -> Any:
    """gain (x - mean) / sqrt(var + eps) + bias with the statistics of the batch: training mode.

    x: (..., channels, ...) with the channels in `channel_axis`, for images (C, N, H, W) axis 0.
    gain, bias: (channels,) or None. statistics: `batch_statistics(x)` if the caller has them,
    else computed here; in both cases the derivative includes their dependence on x. With
    xhat = (x - mean) / sqrt(var + eps), n values a channel and sums over a channel

        gx = gain / sqrt(var + eps) (g - sum g / n - xhat sum(g xhat) / n)
        ggain = sum(g xhat),    gbias = sum g

    Cost: five passes forward and six backward, if the channels come first; it keeps x - mean, not
    x. Sums of products are then dot products of the BLAS, with equal bits on any number of threads.

    Source: Ioffe and Szegedy 2015, Algorithm 1; without gain and bias MacDonald et al. 2023,
    equation 22, with features in rows: channel_axis=0.
    """
    _check_eps("batch_norm", eps)
    _check_channels("batch_norm", x, channel_axis, gain, bias)
    xp, axes = namespace(x, gain, bias), _others(x, channel_axis)
    found = batch_statistics(x, channel_axis=channel_axis) if statistics is None else statistics
    if tuple(found.centred.shape) != tuple(x.shape):
        raise Error(
            f"batch_norm: x has shape {tuple(x.shape)} and the statistics are of shape "
            f"{tuple(found.centred.shape)}; give batch_statistics(x) of the same x"
        )
    if _by_rows(x, axes, gain, bias):
        return by_rows.batch_norm(x, gain, bias, found.mean, found.variance, eps)
    centred, over, n = _rows(found.centred, axes)
    shape = _kept(centred, over)
    inverse = 1.0 / xp.sqrt(xp.reshape(found.variance, shape) + eps)
    scale = inverse if gain is None else inverse * xp.reshape(gain, shape)
    y = centred * scale
    y = y if bias is None else y + xp.reshape(bias, shape)

    @once
    def sums(g: Array) -> tuple[Array, Array]:
        """sum g and sum(g (x - mean)) of every channel."""
        g = xp.reshape(g, centred.shape)
        return total(g, over, keepdims=True), summed_products(g, centred, over)

    def gx(g: Array) -> Array:
        added, inner = sums(g)
        along = centred * (inner * (inverse * inverse / n))
        return xp.reshape((xp.reshape(g, centred.shape) - along - added / n) * scale, x.shape)

    return xp.reshape(y, x.shape), (
        gx,
        lambda g: xp.reshape(sums(g)[1] * inverse, (-1,)),
        lambda g: xp.reshape(sums(g)[0], (-1,)),
    )


@primitive(computes=ALL)
def batch_norm_inference(
    x: Array,
    mean: Array,
    variance: Array,
    gain: Array = None,
    bias: Array = None,
    *,
    channel_axis: int,
    eps: float = 1e-5,
) -> Any:
    """gain (x - mean) / sqrt(variance + eps) + bias with given statistics: evaluation mode.

    x: (..., channels, ...); the others (channels,). mean and variance, the running ones, are
    constants: gx = g gain / sqrt(variance + eps), ggain = sum(g xhat), gbias = sum g.
    """
    _check_eps("batch_norm_inference", eps)
    _check_channels("batch_norm_inference", x, channel_axis, mean, variance, gain, bias)
    xp, axes = namespace(x, mean, variance, gain, bias), _others(x, channel_axis)
    shape = _kept(x, axes)
    inverse = 1.0 / xp.sqrt(xp.reshape(variance, shape) + eps)
    scale = inverse if gain is None else inverse * xp.reshape(gain, shape)
    centred = x - xp.reshape(mean, shape)
    y = centred * scale
    y = y if bias is None else y + xp.reshape(bias, shape)

    def ggain(g: Array) -> Array:
        rows, over, _ = _rows(centred, axes)
        products = summed_products(xp.reshape(g, rows.shape), rows, over)
        return xp.reshape(products, (-1,)) * xp.reshape(inverse, (-1,))

    return y, (
        lambda g: g * scale,
        None,
        None,
        ggain,
        lambda g: total(g, axes),
    )


@primitive(computes=ALL)
def layer_norm(
    x: Array, gain: Array = None, bias: Array = None, *, axes: Axis = -1, eps: float = 1e-5
) -> Any:
    """gain (x - mean) / sqrt(var + eps) + bias, mean and biased variance over `axes` of each x.

    gain, bias: of the lengths of `axes`, in the order they have in x; or None. With
    xhat = (x - mean) / sqrt(var + eps), d = g gain and means over `axes`

        gx = (d - mean d - xhat mean(d xhat)) / sqrt(var + eps)
        ggain = sum(g xhat),    gbias = sum g,    over the other axes

    Source: Ba, Kiros and Hinton 2016, "Layer Normalization", equations 3 and 4.
    """
    _check_eps("layer_norm", eps)
    xp, chosen = namespace(x, gain, bias), tuple(sorted(axes_of(x, axes)))
    lengths = tuple(x.shape[a] for a in chosen)
    for name, part in (("gain", gain), ("bias", bias)):
        if part is not None and tuple(part.shape) != lengths:
            raise Error(
                f"layer_norm: {name} has shape {tuple(part.shape)}; expected {lengths}, the "
                f"lengths of axes {chosen} of x {tuple(x.shape)}"
            )
    rows, over, n = _rows(x, chosen)
    if n == 0:
        raise Error(f"layer_norm: no elements in axes {chosen} of x {tuple(x.shape)}")
    if _by_rows(x, chosen, gain, bias):
        return by_rows.layer_norm(x, gain, bias, n, eps)
    shape = tuple(length if a in over else 1 for a, length in enumerate(rows.shape))
    _, centred = _centre(rows, over, n)
    inverse = 1.0 / xp.sqrt(summed_products(centred, centred, over) / n + eps)
    normal = centred * inverse
    y = normal if gain is None else normal * xp.reshape(gain, shape)
    y = y if bias is None else y + xp.reshape(bias, shape)

    def gx(g: Array) -> Array:
        d = xp.reshape(g, rows.shape)
        d = d if gain is None else d * xp.reshape(gain, shape)
        mean = total(d, over, keepdims=True) / n
        along = normal * (summed_products(d, normal, over) / n)
        return xp.reshape((d - along - mean) * inverse, x.shape)

    def summed(part: Array) -> Array:
        """The sum over the axes that are not normalised."""
        others = tuple(a for a in range(part.ndim) if a not in over)
        return xp.reshape(total(part, others), lengths)

    return xp.reshape(y, x.shape), (
        gx,
        lambda g: summed(xp.reshape(g, rows.shape) * normal),
        lambda g: summed(xp.reshape(g, rows.shape)),
    )


def group_norm(
    x: Any, gain: Any = None, bias: Any = None, *, groups: int, channel_axis: int, eps: float = 1e-5
) -> Any:
    """gain (x - mean) / sqrt(var + eps) + bias, one mean and variance an example and group.

    x: (C, N, ...) with channel_axis=0 or (N, C, ...) with channel_axis=1, C a multiple of
    `groups`; consecutive channels are a group. gain, bias: (C,) or None. Made of `layer_norm`.

    Source: Wu and He 2018, "Group Normalization", equation 7.
    """
    if x.ndim < 2 or channel_axis not in (0, 1):
        raise Error(
            f"group_norm: expected x (C, N, ...) with channel_axis=0 or (N, C, ...) with 1; got "
            f"shape {tuple(x.shape)} and channel_axis={channel_axis}"
        )
    channels = x.shape[channel_axis]
    if groups < 1 or channels % groups:
        raise Error(f"group_norm: {channels} channels cannot be cut into {groups} groups")
    _check_channels("group_norm", x, channel_axis, gain, bias)
    cut = (*x.shape[:channel_axis], groups, channels // groups, *x.shape[channel_axis + 1 :])
    over = (1, *range(3, x.ndim + 1)) if channel_axis == 0 else tuple(range(2, x.ndim + 1))
    y = reshape(layer_norm(reshape(x, shape=cut), axes=over, eps=eps), shape=x.shape)
    shape = tuple(channels if a == channel_axis else 1 for a in range(x.ndim))
    y = y if gain is None else multiply(y, reshape(gain, shape=shape))
    return y if bias is None else add(y, reshape(bias, shape=shape))


@primitive(computes=ALL)
def weight_norm(w: Array, gain: Array = None, *, eps: float = 0.0) -> Any:
    """gain w / sqrt(eps + |w|^2), |w| the norm of each row: (out, ...), (out,) or None.

    With u = w / sqrt(eps + |w|^2), d = g gain and the inner product of each row

        gw = (d - <d, u> u) / sqrt(eps + |w|^2),    ggain = <g, u>

    Rows of the result are shorter than their gain if eps > 0, and exactly as long if eps = 0;
    then a zero row gives NaN. A square must not overflow.

    Source: Salimans and Kingma 2016, "Weight Normalization", equations 2 and 3 (eps = 0 and a
    gain); MacDonald et al. 2023, Example A.1 and equation 30 (eps > 0, no gain).
    """
    _check_eps("weight_norm", eps)
    if w.ndim < 2 or (gain is not None and tuple(gain.shape) != (w.shape[0],)):
        raise Error(
            f"weight_norm: expected w (out, ...) and gain (out,); got {tuple(w.shape)} and "
            f"{None if gain is None else tuple(gain.shape)}"
        )
    xp = namespace(w, gain)
    rows, over, _ = _rows(w, tuple(range(1, w.ndim)))
    inverse = 1.0 / xp.sqrt(summed_products(rows, rows, over) + eps)
    unit = rows * inverse
    column = None if gain is None else xp.reshape(gain, (-1, 1))
    y = unit if column is None else unit * column

    def gw(g: Array) -> Array:
        d = xp.reshape(g, rows.shape)
        d = d if column is None else d * column
        return xp.reshape((d - unit * summed_products(d, unit, over)) * inverse, w.shape)

    return xp.reshape(y, w.shape), (
        gw,
        lambda g: xp.reshape(summed_products(xp.reshape(g, rows.shape), unit, over), (-1,)),
    )


@primitive(computes=ALL)
def entry_norm(w: Array, *, eps: float) -> Any:
    """w / sqrt(eps + w^2), elementwise, between -1 and 1; eps > 0.

        gw = g eps (eps + w^2)^(-3/2)

    A square must not overflow. Source: MacDonald et al. 2023, Example A.1 and equation 32.
    """
    _check_eps("entry_norm", eps)
    if eps == 0:
        raise Error("entry_norm: eps must be greater than 0; at 0 it is the sign of w")
    inverse = 1.0 / namespace(w).sqrt(w * w + eps)
    return w * inverse, lambda g: g * (eps * (inverse * inverse * inverse))


# --- shared parts -----------------------------------------------------------------------------


def _others(x: Array, channel_axis: int) -> tuple[int, ...]:
    """Every axis except that of the channels."""
    (channel,) = axes_of(x, channel_axis)
    return tuple(a for a in range(x.ndim) if a != channel)


def _kept(x: Array, axes: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of x with `axes` of length 1."""
    return tuple(1 if a in axes else n for a, n in enumerate(x.shape))


def _rows(x: Array, axes: tuple[int, ...]) -> tuple[Array, tuple[int, ...], int]:
    """x, its `axes` to sum over and the number of elements in them. If they are the last axes, x
    becomes a matrix whose rows hold them, so that every sum runs along memory."""
    first, n = x.ndim - len(axes), math.prod(x.shape[a] for a in axes)
    if axes == tuple(range(first, x.ndim)):
        return namespace(x).reshape(x, (math.prod(x.shape[:first]), n)), (1,), n
    return x, axes, n


def _by_rows(x: Array, axes: tuple[int, ...], *others: Array) -> bool:
    """Whether kernels normalise over `axes`: on a GPU, if these are the last."""
    return axes == tuple(range(x.ndim - len(axes), x.ndim)) and has_kernels(x, *others)


def _centre(x: Array, axes: tuple[int, ...], n: int) -> tuple[Array, Array]:
    """The mean over `axes`, kept with length 1, and x - mean."""
    mean = total(x, axes, keepdims=True) / n
    return mean, x - mean


def summed_products(a: Array, b: Array, axes: tuple[int, ...]) -> Array:
    """sum(a b) over `axes`, kept with length 1. Rows of matrices are `npdrt.compute.dots`."""
    if axes == (a.ndim - 1,) and has_kernels(a, b):
        return by_rows.row_dots(a, b)
    if a.ndim != 2 or axes != (1,):
        return total(a * b, axes, keepdims=True)
    return dots(a, b)


def _check_eps(name: str, eps: float) -> None:
    if not eps >= 0:
        raise Error(f"{name}: eps must not be negative; got {eps}")


def _check_channels(name: str, x: Array, channel_axis: int, *parts: Array) -> None:
    """Refuse vectors that are not one number a channel."""
    (channel,) = axes_of(x, channel_axis)
    expected = (x.shape[channel],)
    for part in parts:
        if part is not None and tuple(part.shape) != expected:
            raise Error(
                f"{name}: expected vectors of {expected[0]} channels, axis {channel} of x "
                f"{tuple(x.shape)}; got shape {tuple(part.shape)}"
            )
