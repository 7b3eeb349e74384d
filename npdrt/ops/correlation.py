"""A convolution and its derivatives as correlations: their arrays, windows and forms.

`npdrt.ops.convolution` computes them one after another, `npdrt.ops.blocked` on several threads of
NumPy. The form of each is a module: `npdrt.ops.direct`, `npdrt.ops.winograd` or
`npdrt.ops.depthwise`, or `npdrt.ops.sliced` for all in portable arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

from npdrt.arrays import Array, namespace
from npdrt.ops import depthwise, direct, sliced, winograd
from npdrt.ops.window import Pair, Place, Window, backward_windows, flat

FORMS = (*winograd.FORMS, "sliced")  # of a call


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
    if window.form in ("depthwise", "sliced"):
        return depthwise if window.form == "depthwise" else sliced
    return winograd if winograd.suits(window, images, channels, outputs) else direct


def forward(
    y: Array, x: Array, weight: Array, window: Window, groups: int
) -> Iterator[Correlation]:
    """The correlations that fill y (O, N, oh, ow), the value for x (C, N, H, W), an OIHW weight."""
    window = _depthwise(window, weight, groups)
    for y_part, x_part, w_part in _parts(window, groups, y, x, weight):
        taps = namespace(weight).permute_dims(w_part, (2, 3, 0, 1))  # (kh, kw, O, C)
        yield _correlation(y_part, taps, x_part, window)


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
        window = _depthwise(window, weight, groups)
        for gx_part, g_part, w_part in _parts(window, groups, gx, g, weight):
            flipped = w_part[:, :, *taps][:, :, ::-1, ::-1]  # (O, C, taps)
            flipped = namespace(weight).permute_dims(flipped, (2, 3, 0, 1))  # (taps, O, C)
            target = gx_part[:, :, *pixels]
            yield _correlation(target, flipped, g_part, window, transposed=True)


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
    window, (g, x) = flat(_depthwise(window, gw, groups), g, x)
    for gw_part, g_part, x_part in _parts(window, groups, gw, g, x):
        outputs, channels = gw_part.shape[:2]
        form = form_of(window, x.shape[1], channels, outputs)
        parts = form.parts(form.places(x_part, window), outputs, channels)
        blocks = [[(place, form.cotangent(g_part, place)) for place in part] for part in parts]
        for some in form.channels_at_a_time(channels):
            yield KernelDerivative(form, gw_part[:, some, ...], x_part[some, ...], window, blocks)


def _depthwise(window: Window, weight: Array, groups: int) -> Window:
    """The window, with the depthwise form if the weight (O, C / groups, kh, kw) is depthwise."""
    suits = window.form != "sliced" and depthwise.suits(weight.shape, groups)
    return replace(window, form="depthwise") if suits else window


def _parts(window: Window, groups: int, *arrays: Array) -> Iterator[list[Array]]:
    """The first axis of every array, cut at the same places: into the groups, or for a depthwise
    convolution into pieces of a few channels."""
    if window.form == "depthwise":
        pieces = depthwise.some_channels(arrays[1], window)
        yield from ([a[some, ...] for a in arrays] for some in pieces)
        return
    for k in range(groups):
        lengths = (a.shape[0] // groups for a in arrays)
        yield [a[k * n : (k + 1) * n, ...] for a, n in zip(arrays, lengths, strict=True)]
