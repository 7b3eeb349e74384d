"""Convolution of images, channel-major: activations are (C, N, H, W), "CNHW", weights OIHW.

With the channels first a convolution is one product, (O, C kh kw) @ (C kh kw, N oh ow), whose
result is channel-major again, and the elements of a channel lie side by side for the statistics of
batch normalisation. A model takes (N, C, H, W) at its boundary and transposes once.

Of 3x3 kernels of stride 1, `npdrt.ops.winograd` saves a third to more than half of the
multiplications, if you ask for it; all else is direct.

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

from npdrt.arrays import Array, columns, composite, namespace, total
from npdrt.autodiff import ALL, primitive
from npdrt.errors import Error
from npdrt.ops import blocked, winograd
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
    output are cut into so many equal parts, and part g of the output sees part g of the input (a
    loop over the groups: right, but slow for depthwise convolutions).
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
    xp = namespace(x, weight, bias)
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


@composite(host=blocked.convolve)
def convolve(
    x: Array, weight: Array, *, stride: Pair, padding: Pair, groups: int, form: str = "direct"
) -> Array:
    """The value of `conv2d` without bias."""
    xp, out = namespace(x, weight), weight.shape[0]
    window = forward_window(x.shape[2:], weight.shape[2:], stride, padding, form)
    taps = xp.permute_dims(weight, (2, 3, 0, 1))
    found = [
        _correlate(taps[:, :, part(out, groups, g), :], x[part(x.shape[0], groups, g), ...], window)
        for g in range(groups)
    ]
    return found[0] if groups == 1 else xp.concat(found)


@composite(host=blocked.convolve_input)
def convolve_input(
    g: Array, weight: Array, *, size: Pair, stride: Pair, padding: Pair, groups: int,
    form: str = "direct",
) -> Array:  # fmt: skip
    """The derivative of `conv2d` by its input of height and width `size`, for the cotangent g:
    the correlation of g with the taps that saw a pixel, flipped."""
    xp, (out, inner, *kernel) = namespace(g, weight), weight.shape
    shape = (inner * groups, g.shape[1], *size)
    gx = xp.zeros(shape, dtype=xp.result_type(g.dtype, weight.dtype))
    for pixels, taps, window in backward_windows(size, tuple(kernel), stride, padding, form):
        if 0 in window.taps:
            continue
        for k in range(groups):
            ours = part(out, groups, k)
            flipped = xp.permute_dims(weight[ours, :, *taps][:, :, ::-1, ::-1], (2, 3, 0, 1))
            found = _correlate(flipped, g[ours, ...], window, transposed=True)
            gx[part(shape[0], groups, k), :, *pixels] = found
    return gx


@composite(host=blocked.convolve_weight)
def convolve_weight(
    g: Array, x: Array, *, size: Pair, stride: Pair, padding: Pair, groups: int,
    form: str = "direct",
) -> Array:  # fmt: skip
    """The derivative of `conv2d` by its weight of kernel `size`, for the cotangent g: the sum over
    blocks of products (O, positions) @ (positions, kw C), some channels at a time; in order, in
    each of a few parts, then over these."""
    xp, window = namespace(g, x), forward_window(x.shape[2:], size, stride, padding, form)
    found = []
    for k in range(groups):
        theirs = g[part(g.shape[0], groups, k), ...]
        seen = x[part(x.shape[0], groups, k), ...]
        count = seen.shape[0]
        if winograd.suits(window, seen.shape[1], count, theirs.shape[0]):
            found.append(_weight_by_tiles(theirs, seen, window))
            continue
        some = chunks(count)
        parts = [_weight(theirs, seen[s, ...], window, len(some)) for s in some]
        found.append(xp.concat(parts, axis=1))
    return xp.concat(found)


def _correlate(taps: Array, x: Array, window: Window, *, transposed: bool = False) -> Array:
    """The correlation of x (C, N, H, W) with a kernel (kh, kw, O, C), or (kh, kw, C, O) where it is
    transposed: (O, N, oh, ow)."""
    if winograd.suits(window, x.shape[1], *taps.shape[2:]):
        return _by_tiles(taps, x, window, transposed)
    xp = namespace(taps, x)
    if transposed:
        matrix = xp.matrix_transpose(xp.reshape(taps, (-1, taps.shape[3])))
    else:
        matrix = xp.reshape(xp.permute_dims(taps, (2, 0, 1, 3)), (taps.shape[2], -1))
    out, shape = matrix.shape[0], (matrix.shape[0], x.shape[1], *window.size)
    x, window = flat(x, window)
    dtype = xp.result_type(matrix.dtype, x.dtype)
    y = xp.zeros((out, x.shape[1], *window.size), dtype=dtype)
    for images, rows in blocks(x.shape[1], window.size, columns(x)):
        seen = _seen(x, window, images, rows)
        products = (xp.matmul(a, b) for a, b in zip(cut(matrix, len(seen)), seen, strict=True))
        total = _added(products)
        form = (out, rows.stop - rows.start, window.size[1], images.stop - images.start)
        y[:, images, rows, :] = xp.permute_dims(xp.reshape(total, form), (0, 3, 1, 2))
    return xp.reshape(y, shape)


def _by_tiles(taps: Array, x: Array, window: Window, transposed: bool) -> Array:
    """The correlation in Winograd's form."""
    xp, one = namespace(taps, x), tuple(taps.shape[2:])
    kernel, rows = (xp.zeros((4, n, *one), dtype=taps.dtype) for n in (4, 3))
    scaled = None if winograd.small(taps) else winograd.scale(taps, None)
    winograd.transform(kernel, rows, taps if scaled is None else taps * scaled)
    kernel = xp.matrix_transpose(kernel) if transposed else kernel
    out, dtype = kernel.shape[2], xp.result_type(taps.dtype, x.dtype)
    y = xp.zeros((out, x.shape[1], *window.size), dtype=dtype)
    for place in winograd.places(x, window):
        forms = winograd.correlation_shapes(x, out, window, place)
        room = [xp.zeros(form, dtype=dtype) for form in forms]
        winograd.correlate(y, kernel, scaled, x, window, place, room)
    return y


def _weight(g: Array, x: Array, window: Window, pieces: int) -> Array:
    """The derivative (O, C, kh, kw) by the weights of some channels x, one of so many pieces."""
    xp, (kh, kw) = namespace(g, x), window.taps
    x, window = flat(x, window)
    g = xp.reshape(g, (g.shape[0], x.shape[1], *window.size))
    places = list(blocks(x.shape[1], window.size, columns(x)))
    totals = _added(
        _added(_weight_block(g, x, window, *block) for block in share)
        for share in shares(places, pieces)
    )
    if not narrow(x.shape[0], window):
        rows = xp.reshape(totals, (kh, g.shape[0], kw, x.shape[0]))
        return xp.permute_dims(rows, (1, 3, 0, 2))
    return xp.permute_dims(xp.reshape(totals, (g.shape[0], kh, kw, x.shape[0])), (0, 3, 1, 2))


def _weight_by_tiles(g: Array, x: Array, window: Window) -> Array:
    """The derivative (O, C, 3, 3) by the weights, in Winograd's form."""
    xp, one = namespace(g, x), (g.shape[0], x.shape[0])
    dtype = xp.result_type(g.dtype, x.dtype)
    totals = []
    for share in winograd.parts(x, window, g.shape[0]):
        total, more = (xp.zeros((*some, *one), dtype=dtype) for some in ((4, 4), ()))
        for number, place in enumerate(share):
            forms = winograd.weight_shapes(g, x, window, place)
            room = [xp.zeros(form, dtype=dtype) for form in forms]
            to = more if number else None
            winograd.correlate_weight(total, to, g, x, window, place, room)
        totals.append(total)
    gw, rows = (xp.zeros((3, n, *one), dtype=dtype) for n in (3, 4))
    winograd.restore(gw, rows, _added(totals))
    return xp.permute_dims(gw, (2, 3, 0, 1))


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
