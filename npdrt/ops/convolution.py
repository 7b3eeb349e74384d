"""Convolution of images, channel-major: activations are (C, N, H, W), "CNHW", weights OIHW.

With the channels first a convolution is one product, (O, C kh kw) @ (C kh kw, N oh ow), whose
result is channel-major again, and the elements of a channel lie side by side for the statistics of
batch normalisation. A model takes (N, C, H, W) at its boundary and transposes once.

With form="winograd", 3x3 kernels of stride 1 need a third to more than half fewer multiplications;
everything else is direct.

All three products of a step (value, derivative by the input, derivative by the weight) are
correlations (`npdrt.ops.correlation`), which take the images in blocks of about
`npdrt.arrays.block_columns` output positions, so that the arrays of a block stay in cache. The
blocks are made by `npdrt.ops.direct`, `npdrt.ops.winograd` or `npdrt.ops.depthwise`. On NumPy they
run on several threads (`npdrt.ops.blocked`); they and the order of every addition depend on the
shapes alone, and so do the bits. On a GPU each product is a kernel of `npdrt.kernels.convolution`,
direct in either form.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from npdrt import compute
from npdrt.arrays import Array, composite, namespace
from npdrt.autodiff import ALL, primitive
from npdrt.compute import total
from npdrt.errors import Error
from npdrt.kernels import KERNELS
from npdrt.ops import blocked, winograd
from npdrt.ops.correlation import (
    Correlation,
    KernelDerivative,
    backward,
    forward,
    kernel_derivatives,
)
from npdrt.ops.window import Pair, Shape, check_fits, check_images, forward_window, pair, whole

__all__ = ["conv2d"]


@primitive(computes=ALL)
def conv2d(
    x: Array,
    weight: Array,
    bias: Array = None,
    *,
    stride: int | Pair = 1,
    padding: int | Pair = 0,
    groups: int = 1,
    form: str = "direct",
) -> Any:
    """y[o, n, i, j] = bias[o] + sum over c, k, l of weight[o, c, k, l] x[c, n, s i + k - p, s j + l
    - p]: the cross-correlation that frameworks call convolution, zeros beyond the image.

    x: (C, N, H, W), channel-major. weight: (O, C / groups, kh, kw). bias: (O,) or None. stride s
    and padding p: a number, or a pair for height and width. groups: the channels of input and
    output are cut into so many equal parts, and part g of the output sees part g of the input: a
    loop over the groups, but a depthwise convolution with one output for each channel, groups = C =
    O, is made of multiplications and additions (`npdrt.ops.depthwise`).
    Returns (O, N, oh, ow) with oh = (H + 2 p - kh) // s + 1.

    gx is the correlation of g with the flipped weight, one for every offset of the stride; gweight
    the correlation of x with g; gbias the sum of g over images and positions. NumPy uses as many
    threads as its BLAS is set to, with the same bits on any number.

    form: "direct", or "winograd", with which 3x3 kernels of stride 1 with 64 channels, outputs and
    tiles of 2x2 or more take 16 products in place of 36 (Lavin and Gray 2016, equation 8). The
    rounding error of an output is then relative to the largest values of its tile of 4x4 pixels,
    also those that the output does not see (bound: `npdrt.ops.winograd`); of the direct form, to
    what the output is the sum of: |error| <= 9 C u sum of |weight| |x|, u = 2^-24 in float32. So
    only the direct form keeps masks, and signs of sums of numbers >= 0, and makes an infinity of an
    infinity.

    Raises `Error` for shapes, dtypes and settings that do not fit.
    """
    stride, padding = pair("conv2d: stride", stride, 1), pair("conv2d: padding", padding, 0)
    _check(x, weight, bias, padding, groups)
    if form not in winograd.FORMS:
        raise Error(f"conv2d: form must be one of {', '.join(winograd.FORMS)}; got {form!r}")
    xp, form = namespace(x, weight, bias), compute.convolution_form(form, x)
    setting = {"stride": stride, "padding": padding, "groups": groups, "form": form}
    y = convolve(x, weight, **setting)
    y = y if bias is None else y + xp.reshape(bias, (-1, 1, 1, 1))
    sizes, kernel = tuple(x.shape[2:]), tuple(weight.shape[2:])
    return y, (
        lambda g: convolve_input(g, weight, size=sizes, **setting),
        lambda g: convolve_weight(g, x, size=kernel, **setting),
        lambda g: total(g, (1, 2, 3)),
    )


def _check(x: Any, weight: Any, bias: Any, padding: Pair, groups: Any) -> None:
    check_images("conv2d", x)
    if getattr(weight, "ndim", None) != 4 or 0 in weight.shape:
        raise Error(
            "conv2d: expected a weight (out, in / groups, kh, kw) without empty axes; got shape "
            f"{getattr(weight, 'shape', weight)}"
        )
    out, inner = weight.shape[:2]
    if not whole(groups) or groups < 1 or x.shape[0] % groups or out % groups:
        raise Error(
            f"conv2d: groups must divide the {x.shape[0]} channels of x (axis 0) and the {out} "
            f"outputs of the weight; got {groups!r}"
        )
    if inner * groups != x.shape[0]:
        raise Error(
            f"conv2d: x has {x.shape[0]} channels (axis 0 of {tuple(x.shape)}) and the weight "
            f"{tuple(weight.shape)} takes {inner} x {groups} groups; channels come first"
        )
    _check_bias(bias, out)
    _check_dtypes(x, weight, bias)
    check_fits("conv2d", x, tuple(weight.shape[2:]), padding)


def _check_bias(bias: Any, out: int) -> None:
    if bias is not None and tuple(getattr(bias, "shape", ())) != (out,):
        found = getattr(bias, "shape", bias)
        raise Error(f"conv2d: expected a bias of shape ({out},) or None; got {found}")


def _check_dtypes(x: Array, weight: Array, bias: Array) -> None:
    """All real parts in one dtype: a complex step has complex arrays among real ones."""
    dtypes = [a.dtype for a in (x, weight, bias) if a is not None]
    if len({str(d).replace("complex128", "float64").replace("complex64", "float32")
            for d in dtypes}) > 1:  # fmt: skip
        names = ", ".join(map(str, dtypes))
        raise Error(f"conv2d: x, weight and bias are {names}; convert them to one dtype")


# --- the definition, on any array library -----------------------------------------------------


def _on_gpu(name: str, library: Any, *arrays: Array, **setting: Any) -> Array:
    """By a kernel, which has an order of its own: the sliced form is made by its definition."""
    if setting.get("form") == "sliced":
        return PRODUCTS[name].definition(*arrays, **setting)
    return KERNELS[name](library, *arrays, **setting)


@composite(host=blocked.convolve, kernel=partial(_on_gpu, "convolve"))
def convolve(
    x: Array, weight: Array, *, stride: Pair, padding: Pair, groups: int, form: str = "direct"
) -> Array:
    """The value of `conv2d` without bias."""
    xp = namespace(x, weight)
    window = forward_window(x.shape[2:], weight.shape[2:], stride, padding, form)
    shape = (weight.shape[0], x.shape[1], *window.size)
    y = xp.empty(shape, dtype=xp.result_type(x.dtype, weight.dtype))
    for correlation in forward(y, x, weight, window, groups):
        _correlate(correlation)
    return y


@composite(host=blocked.convolve_input, kernel=partial(_on_gpu, "convolve_input"))
def convolve_input(
    g: Array, weight: Array, *, size: Pair, stride: Pair, padding: Pair, groups: int,
    form: str = "direct",
) -> Array:  # fmt: skip
    """The derivative of `conv2d` by its input of height and width `size`, for the cotangent g:
    the correlation of g with the taps that saw a pixel, flipped."""
    xp, shape = namespace(g, weight), (weight.shape[1] * groups, g.shape[1], *size)
    gx = xp.empty(shape, dtype=xp.result_type(g.dtype, weight.dtype))
    for correlation in backward(gx, g, weight, stride, padding, groups, form):
        _correlate(correlation)
    return gx


@composite(host=blocked.convolve_weight, kernel=partial(_on_gpu, "convolve_weight"))
def convolve_weight(
    g: Array, x: Array, *, size: Pair, stride: Pair, padding: Pair, groups: int,
    form: str = "direct",
) -> Array:  # fmt: skip
    """The derivative of `conv2d` by its weight of kernel `size`, for the cotangent g: the sum over
    blocks of products (O, positions) @ (positions, kw C), some channels at a time; in order, in
    each of a few parts, then over these."""
    xp, window = namespace(g, x), forward_window(x.shape[2:], size, stride, padding, form)
    shape = (g.shape[0], x.shape[0] // groups, *size)
    gw = xp.empty(shape, dtype=xp.result_type(g.dtype, x.dtype))
    for derivative in kernel_derivatives(gw, g, x, window, groups):
        _differentiate(derivative)
    return gw


PRODUCTS = {f.__name__: f for f in (convolve, convolve_input, convolve_weight)}


def _correlate(c: Correlation) -> None:
    """Fill y: prepare the kernel, then one block after another."""
    memory = partial(_new_arrays, namespace(c.x))
    (room,) = memory(c.taps.dtype, (c.form.kernel_size(c.taps),))
    kernel = c.form.kernel(room, c.taps, c.transposed)
    c.form.fill(kernel, slice(None), c.taps, memory)
    for place in c.form.places(c.x, c.window):
        c.form.correlate(c.y, kernel, c.x, c.window, place, memory)


def _differentiate(d: KernelDerivative) -> None:
    """Fill gw: add up the blocks of every part, then the parts."""
    memory = partial(_new_arrays, namespace(d.x))
    totals = memory(d.form.total_dtype(d.gw), *[d.form.total_shape(d.gw, d.window)] * len(d.parts))
    for sum_of_part, part in zip(totals, d.parts, strict=True):
        d.form.add_blocks(sum_of_part, part, d.x, d.window, memory)
    d.form.collect(d.gw, totals, memory)


def _new_arrays(xp: Any, dtype: Any, *shapes: Shape) -> list[Array]:
    return [xp.empty(shape, dtype=dtype) for shape in shapes]
