"""Convolution of images, channel-major: activations are (C, N, H, W), "CNHW", weights OIHW.

With the channels first a convolution is one product, (O, C kh kw) @ (C kh kw, N oh ow), whose
result is channel-major again, and the elements of a channel lie side by side for the statistics of
batch normalisation. A model takes (N, C, H, W) at its boundary and transposes once.

All three products of a step (value, derivative by the input, derivative by the weight) are one
idea. Images are taken in blocks of about `npdrt.arrays.columns` output positions, so that what is
built of a block stays in cache. Of a block only the shifts along a row are copied out, images
innermost (`npdrt.ops.window.unfold`): a shift along a column is then a mere offset, and the product
is a sum of kh products of matrices, each (O, kw C) @ (kw C, positions), in the order of the
kernel's rows.
On NumPy blocks run on several threads (`npdrt.ops.parallel`); they and the order of every addition
depend on the shapes alone, and so do the bits.
"""

from __future__ import annotations

from typing import Any

from npdrt.arrays import Array, columns, composite, namespace
from npdrt.autodiff import primitive
from npdrt.errors import Error
from npdrt.ops import blocked
from npdrt.ops.window import (
    Pair,
    Window,
    backward_windows,
    blocks,
    check_fits,
    check_images,
    chunks,
    cut,
    flat,
    forward_window,
    narrow,
    pair,
    part,
    shares,
    tap,
    unfold,
    unfolded_shape,
    whole,
)


@primitive
def conv2d(
    x: Array,
    weight: Array,
    bias: Array = None,
    *,
    stride: int | Pair = 1,
    padding: int | Pair = 0,
    groups: int = 1,
) -> Any:
    """y[o, n, i, j] = bias[o] + sum over c, k, l of weight[o, c, k, l] x[c, n, s i + k - p, s j + l
    - p]: the cross-correlation that frameworks call convolution, zeros beyond the image.

    x: (C, N, H, W), channel-major. weight: (O, C / groups, kh, kw). bias: (O,) or None. stride s
    and padding p: a number, or a pair for height and width. groups: the channels of input and
    output are cut into so many equal parts, and part g of the output sees part g of the input (a
    loop over the groups: right, but slow for depthwise convolutions).
    Returns (O, N, oh, ow) with oh = (H + 2 p - kh) // s + 1.

    gx is the correlation of g with the flipped weight, one for every offset of the stride; gweight
    the correlation of x with g; gbias the sum of g over images and positions. NumPy uses as many
    threads as its BLAS is set to, with the same bits on any number.

    Raises `Error` for shapes, dtypes and settings that do not fit.
    """
    stride, padding = pair("conv2d: stride", stride, 1), pair("conv2d: padding", padding, 0)
    _check(x, weight, bias, padding, groups)
    xp = namespace(x, weight, bias)
    setting = {"stride": stride, "padding": padding, "groups": groups}
    y = convolve(x, weight, **setting)
    y = y if bias is None else y + xp.reshape(bias, (-1, 1, 1, 1))
    sizes, kernel = tuple(x.shape[2:]), tuple(weight.shape[2:])
    return y, (
        lambda g: convolve_input(g, weight, size=sizes, **setting),
        lambda g: convolve_weight(g, x, size=kernel, **setting),
        lambda g: xp.sum(xp.reshape(g, (g.shape[0], -1)), axis=1),
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


@composite(host=blocked.convolve)
def convolve(x: Array, weight: Array, *, stride: Pair, padding: Pair, groups: int) -> Array:
    """The value of `conv2d` without bias."""
    xp, out = namespace(x, weight), weight.shape[0]
    window = forward_window(x.shape[2:], weight.shape[2:], stride, padding)
    matrix = xp.reshape(xp.permute_dims(weight, (0, 2, 3, 1)), (out, -1))
    found = [
        _correlate(matrix[part(out, groups, g), :], x[part(x.shape[0], groups, g), ...], window)
        for g in range(groups)
    ]
    return found[0] if groups == 1 else xp.concat(found)


@composite(host=blocked.convolve_input)
def convolve_input(
    g: Array, weight: Array, *, size: Pair, stride: Pair, padding: Pair, groups: int
) -> Array:
    """The derivative of `conv2d` by its input of height and width `size`, for the cotangent g:
    the correlation of g with the taps that saw a pixel, flipped."""
    xp, (out, inner, *kernel) = namespace(g, weight), weight.shape
    shape = (inner * groups, g.shape[1], *size)
    gx = xp.zeros(shape, dtype=xp.result_type(g.dtype, weight.dtype))
    for pixels, taps, window in backward_windows(size, tuple(kernel), stride, padding):
        if 0 in window.taps:
            continue
        for k in range(groups):
            ours = part(out, groups, k)
            flipped = weight[ours, :, *taps][:, :, ::-1, ::-1]
            tall = xp.reshape(xp.permute_dims(flipped, (2, 3, 0, 1)), (-1, inner))
            found = _correlate(xp.matrix_transpose(tall), g[ours, ...], window)
            gx[part(shape[0], groups, k), :, *pixels] = found
    return gx


@composite(host=blocked.convolve_weight)
def convolve_weight(
    g: Array, x: Array, *, size: Pair, stride: Pair, padding: Pair, groups: int
) -> Array:
    """The derivative of `conv2d` by its weight of kernel `size`, for the cotangent g: the sum over
    blocks of products (O, positions) @ (positions, kw C), some channels at a time; in order, in
    each of a few parts, then over these."""
    xp, window = namespace(g, x), forward_window(x.shape[2:], size, stride, padding)
    found = []
    for k in range(groups):
        theirs = g[part(g.shape[0], groups, k), ...]
        seen = x[part(x.shape[0], groups, k), ...]
        count = seen.shape[0]
        parts = [_weight(theirs, seen[some, ...], window, count) for some in chunks(count)]
        found.append(xp.concat(parts, axis=1))
    return xp.concat(found)


def _correlate(matrix: Array, x: Array, window: Window) -> Array:
    """The correlation of x (C, N, H, W) with a kernel as a matrix (O, kh kw C): (O, N, oh, ow)."""
    xp, (out, shape) = namespace(matrix, x), (matrix.shape[0], (x.shape[1], *window.size))
    x, window = flat(x, window)
    dtype = xp.result_type(matrix.dtype, x.dtype)
    y = xp.zeros((out, x.shape[1], *window.size), dtype=dtype)
    for images, rows in blocks(x.shape[1], window.size, columns(x)):
        seen = _seen(x, window, images, rows)
        products = (xp.matmul(a, b) for a, b in zip(cut(matrix, len(seen)), seen, strict=True))
        total = _added(products)
        form = (out, rows.stop - rows.start, window.size[1], images.stop - images.start)
        y[:, images, rows, :] = xp.permute_dims(xp.reshape(total, form), (0, 3, 1, 2))
    return xp.reshape(y, (out, *shape))


def _weight(g: Array, x: Array, window: Window, channels: int) -> Array:
    """The derivative (O, C, kh, kw) by the weights of some channels x, out of so many."""
    xp, (kh, kw) = namespace(g, x), window.taps
    x, window = flat(x, window)
    g = xp.reshape(g, (g.shape[0], x.shape[1], *window.size))
    places = list(blocks(x.shape[1], window.size, columns(x)))
    totals = _added(
        _added(_weight_block(g, x, window, *block) for block in share)
        for share in shares(places, channels)
    )
    if not narrow(x.shape[0], window):
        rows = xp.reshape(totals, (kh, g.shape[0], kw, x.shape[0]))
        return xp.permute_dims(rows, (1, 3, 0, 2))
    return xp.permute_dims(xp.reshape(totals, (g.shape[0], kh, kw, x.shape[0])), (0, 3, 1, 2))


def _weight_block(g: Array, x: Array, window: Window, images: slice, rows: slice) -> Array:
    """What a block adds to the derivative by the weight, (number of products, O, taps of each)."""
    xp = namespace(g, x)
    ours = xp.permute_dims(g[:, images, rows, :], (0, 2, 3, 1))
    ours = xp.reshape(ours, (g.shape[0], -1))
    seen = _seen(x, window, images, rows)
    return xp.stack([xp.matmul(ours, xp.matrix_transpose(b)) for b in seen])


def _seen(x: Array, window: Window, images: slice, rows: slice) -> list[Array]:
    """The matrices (taps of a row times C, positions) that a block is to the kernel's rows."""
    xp, height = namespace(x), rows.stop - rows.start
    if window.pointwise:
        return [xp.reshape(x[:, images, rows, :], (x.shape[0], -1))]
    shape = unfolded_shape(x.shape[0], images.stop - images.start, height, window)
    unfolded = xp.zeros(shape, dtype=x.dtype)
    unfold(unfolded, x[:, images, :, :], window, rows.start)
    seen = [tap(unfolded, k, height) for k in range(window.taps[0])]
    return [xp.concat(seen)] if narrow(x.shape[0], window) else seen


def _added(arrays: Any) -> Array:
    """((a0 + a1) + a2) + ..."""
    total = None
    for a in arrays:
        total = a if total is None else total + a
    return total
