"""A convolution and its derivatives as correlations: their arrays, windows and forms.

`npdrt.ops.convolution` computes them one after another, `npdrt.ops.blocked` on several threads of
NumPy. The form of each is a module, `npdrt.ops.direct` or `npdrt.ops.winograd`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from npdrt.arrays import Array, namespace
from npdrt.ops import direct, winograd
from npdrt.ops.window import Pair, Place, Window, backward_windows, flat


class Correlation(NamedTuple):
    """Fill y (O, N, oh, ow) with the correlation of x (C, N, H, W) and the taps (kh, kw, O, C), or
    (kh, kw, C, O) if they are transposed. form: the module that does so."""

    form: Any
    y: Array
    taps: Array
    x: Array
    window: Window
    transposed: bool


def _correlation(
    y: Array, taps: Array, x: Array, window: Window, transposed: bool = False
) -> Correlation:
    form = form_of(window, x.shape[1], x.shape[0], y.shape[0])
    window, (y, x) = flat(window, y, x)
    return Correlation(form, y, taps, x, window, transposed)


def form_of(window: Window, images: int, channels: int, outputs: int) -> Any:
    """The module that makes such a correlation."""
    return winograd if winograd.suits(window, images, channels, outputs) else direct


def forward(
    y: Array, x: Array, weight: Array, window: Window, groups: int
) -> Iterator[Correlation]:
    """The correlations that fill y (O, N, oh, ow), the value for x (C, N, H, W), an OIHW weight."""
    for y_group, x_group, w_group in by_group(groups, y, x, weight):
        taps = namespace(weight).permute_dims(w_group, (2, 3, 0, 1))  # (kh, kw, O, C)
        yield _correlation(y_group, taps, x_group, window)


def backward(
    gx: Array, g: Array, weight: Array, stride: Pair, padding: Pair, groups: int, form: str
) -> Iterator[Correlation]:
    """The correlations that fill gx (C, N, H, W), the derivative by the input: of the cotangent g
    (O, N, oh, ow) with the flipped taps that saw a pixel. Pixels that no tap saw are set to 0."""
    size, kernel = tuple(gx.shape[2:]), tuple(weight.shape[2:])
    for pixels, taps, window in backward_windows(size, kernel, stride, padding, form):
        if 0 in window.taps:
            gx[:, :, *pixels] = 0
            continue
        for gx_group, g_group, w_group in by_group(groups, gx, g, weight):
            flipped = w_group[:, :, *taps][:, :, ::-1, ::-1]  # (O, C, taps)
            flipped = namespace(weight).permute_dims(flipped, (2, 3, 0, 1))  # (taps, O, C)
            target = gx_group[:, :, *pixels]
            yield _correlation(target, flipped, g_group, window, transposed=True)


class KernelDerivative(NamedTuple):
    """Fill gw (O, C, kh, kw), the derivative by some channels of a group's kernel, with the sum of
    the correlations of x with the cotangent over parts of blocks; each block has its cotangent."""

    form: Any
    gw: Array
    x: Array
    window: Window
    parts: list[list[tuple[Place, Array]]]


def kernel_derivatives(
    gw: Array, g: Array, x: Array, window: Window, groups: int
) -> Iterator[KernelDerivative]:
    """The derivatives that fill gw (O, C / groups, kh, kw), for the cotangent g (O, N, oh, ow)."""
    channels, outputs = gw.shape[1], gw.shape[0] // groups
    form = form_of(window, x.shape[1], channels, outputs)
    window, (g, x) = flat(window, g, x)
    parts = form.parts(form.places(x, window), outputs, channels)
    for gw_group, g_group, x_group in by_group(groups, gw, g, x):
        blocks = [[(place, form.cotangent(g_group, place)) for place in part] for part in parts]
        for some in form.channels_at_a_time(channels):
            yield KernelDerivative(form, gw_group[:, some, ...], x_group[some, ...], window, blocks)


def by_group(groups: int, *arrays: Array) -> Iterator[list[Array]]:
    """Each group's part of the first axis of every array."""
    for k in range(groups):
        lengths = (a.shape[0] // groups for a in arrays)
        yield [a[k * n : (k + 1) * n, ...] for a, n in zip(arrays, lengths, strict=True)]
