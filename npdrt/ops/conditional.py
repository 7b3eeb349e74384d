"""Batch normalisation with a gain and a bias for every example."""

from __future__ import annotations

from typing import Any

from npdrt.arrays import Array, namespace
from npdrt.autodiff import once, primitive
from npdrt.compute import total
from npdrt.errors import Error
from npdrt.ops.normalisation import Statistics, batch_statistics, summed_products

__all__ = ["conditional_batch_norm"]


@primitive(computes=slice(3))
def conditional_batch_norm(
    x: Array, gain: Array, bias: Array, statistics: Statistics | None = None, *, eps: float = 1e-5
) -> Any:
    """gain (x - mean) / sqrt(var + eps) + bias with a gain and a bias for each channel and example.

    x: (C, N, ...), channel-major. gain, bias: (C, N); mean and variance are those of a channel over
    the batch. statistics: `batch_statistics(x, channel_axis=0)` if the caller has them, else
    computed here. With xhat = (x - mean) / sqrt(var + eps), sums over the pixels of an example and
    means over a channel,

        ggain = sum(g xhat),    gbias = sum g
        gx = (gain g - mean(gain gbias) - xhat mean(gain ggain)) / sqrt(var + eps)

    where the means are of n values a channel: sum over the examples, divided by n.

    Source: Dumoulin, Shlens and Kudlur 2017, "A Learned Representation For Artistic Style",
    equation 5; de Vries et al. 2017, "Modulating early visual processing by language", section 3.
    """
    xp = namespace(x, gain, bias)
    if x.ndim < 3 or not tuple(gain.shape) == tuple(bias.shape) == tuple(x.shape[:2]):
        raise Error(
            "conditional_batch_norm: expected x (C, N, ...) and a gain and a bias (C, N); got "
            f"{tuple(x.shape)}, {tuple(gain.shape)} and {tuple(bias.shape)}"
        )
    if not eps >= 0:
        raise Error(f"conditional_batch_norm: eps must not be negative; got {eps}")
    found = batch_statistics(x, channel_axis=0) if statistics is None else statistics
    c, n = gain.shape
    centred = xp.reshape(found.centred, (c, n, -1))  # (C, N, pixels)
    inverse = xp.reshape(1.0 / xp.sqrt(found.variance + eps), (c, 1))
    scale = inverse * gain  # (C, N)
    y = centred * scale[:, :, None] + bias[:, :, None]

    @once
    def sums(g: Array) -> tuple[Array, Array]:
        """ggain and gbias, (C, N)."""
        rows = xp.reshape(g, (c * n, -1))
        inner = xp.reshape(summed_products(rows, xp.reshape(centred, rows.shape), (1,)), (c, n))
        return inner * inverse, xp.reshape(total(rows, (1,)), (c, n))

    def gx(g: Array) -> Array:
        ggain, gbias = sums(g)
        shift = total(scale * gbias, (1,), keepdims=True) / found.n  # (C, 1)
        slope = total(scale * ggain, (1,), keepdims=True) * inverse / found.n
        g = xp.reshape(g, centred.shape) * scale[:, :, None]
        return xp.reshape(g - centred * slope[:, :, None] - shift[:, :, None], x.shape)

    return xp.reshape(y, x.shape), (gx, lambda g: sums(g)[0], lambda g: sums(g)[1])
