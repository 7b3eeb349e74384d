"""Windows over channel-major images: settings, the pixels they read, and blocks as matrices.

`npdrt.ops.direct` and `npdrt.ops.winograd` are made of these; `npdrt.ops.pooling` shares the
settings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import Any, NamedTuple

import numpy as np

from npdrt.arrays import Array, namespace, write_result
from npdrt.errors import Error

Pair = tuple[int, int]
Shape = tuple[int, ...]
Place = tuple[slice, slice]  # (images, rows) of a block
Memory = Callable[..., list[Array]]  # memory(dtype, *shapes): arrays with anything in them
SHARES = 8  # of its work
NARROW = 128  # rows of a product: with fewer, the products of the kernel's rows become one


# --- settings ---------------------------------------------------------------------------------


def pair(name: str, value: Any, least: int) -> Pair:
    """A setting for height and width: one integer for both, or two."""
    items = value if isinstance(value, tuple | list) else (value, value)
    if len(items) != 2 or not all(whole(n) and n >= least for n in items):
        raise Error(f"{name} must be an integer >= {least} or a pair of them; got {value!r}")
    return int(items[0]), int(items[1])


def whole(n: Any) -> bool:
    """Whether n is an integer of Python or NumPy, not a bool."""
    return isinstance(n, int | np.integer) and not isinstance(n, bool)


def check_images(name: str, x: Any) -> None:
    """Refuse anything but a batch of channel-major images."""
    namespace(x)
    if getattr(x, "ndim", None) != 4:
        raise Error(
            f"{name}: expected images (C, N, H, W), channel-major; got shape "
            f"{getattr(x, 'shape', ())}; transpose (N, C, H, W) by axes=(1, 0, 2, 3)"
        )
    if 0 in x.shape:
        raise Error(
            f"{name}: images of shape {tuple(x.shape)} (C, N, H, W) have no elements; "
            "give at least one image of one pixel"
        )
    if not namespace(x).isdtype(x.dtype, ("real floating", "complex floating")):
        raise Error(f"{name}: expected floating-point images; got {x.dtype}; convert them first")


def check_fits(name: str, x: Array, kernel: Pair, padding: Pair) -> None:
    """Refuse a window larger than the padded image."""
    padded = tuple(n + 2 * p for n, p in zip(x.shape[2:], padding, strict=True))
    if any(k > n for k, n in zip(kernel, padded, strict=True)):
        raise Error(
            f"{name}: a window of {kernel} is larger than the padded image of {padded} "
            f"({tuple(x.shape[2:])} with padding {padding}); use a smaller one or more padding"
        )


# --- geometry ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Window:
    """Where a correlation reads: output (i, j) at tap (k, l) sees the image at
    (step i + k + start, step j + l + start), 0 where that is outside."""

    taps: Pair
    step: Pair
    start: Pair
    size: Pair  # of the output
    image: Pair  # the size of the input
    whole: bool = True  # the output is an array of its own, not every second pixel of one, say
    form: str = "direct"  # or "winograd", where that suits, or "depthwise"

    @property
    def pointwise(self) -> bool:
        """Whether output (i, j) is made of pixel (i, j), in the same order."""
        reads = (self.taps, self.step, self.start, self.size)
        return self.whole and reads == ((1, 1), (1, 1), (0, 0), self.image)


def output_size(size: Pair, kernel: Pair, stride: Pair, padding: Pair) -> Pair:
    """The height and width of a convolution's or a pool's result."""
    h, w = ((n + 2 * p - k) // s + 1
            for n, k, s, p in zip(size, kernel, stride, padding, strict=True))  # fmt: skip
    return h, w


def forward_window(
    size: Pair, kernel: Pair, stride: Pair, padding: Pair, form: str = "direct"
) -> Window:
    """The window of the convolution itself, of images of height and width `size`."""
    output = output_size(size, kernel, stride, padding)
    start = (-padding[0], -padding[1])
    return Window(tuple(kernel), stride, start, output, tuple(size), form=form)  # type: ignore[arg-type]


class Phase(NamedTuple):
    """Pixels offset, offset + step, offset + 2 step, ... along one axis, in the derivative by the
    input: all see the taps first, first + step, ... (`taps` of them), in descending order, from
    place `start` of the output on."""

    offset: int
    first: int
    taps: int
    start: int


def phases(kernel: int, step: int, padding: int, size: int) -> list[Phase]:
    """One for every offset below the step."""
    found = []
    for offset in range(min(step, size)):
        first = (offset + padding) % step
        taps = len(range(first, kernel, step))
        found.append(Phase(offset, first, taps, (offset + padding) // step - taps + 1))
    return found


def backward_windows(
    size: Pair, kernel: Pair, stride: Pair, padding: Pair, form: str = "direct"
) -> Iterator[tuple[Place, Place, Window]]:
    """For every offset of the stride: the pixels, the taps (before they are flipped), and the
    correlation with the cotangent; it has no taps if the output does not depend on these pixels."""
    axes = zip(kernel, stride, padding, size, strict=True)
    image, whole = output_size(size, kernel, stride, padding), stride == (1, 1)
    (down, across), (height, width) = stride, size
    for i, j in product(*(phases(*axis) for axis in axes)):
        pixels = slice(i.offset, None, down), slice(j.offset, None, across)
        taps = slice(i.first, None, down), slice(j.first, None, across)
        output = len(range(i.offset, height, down)), len(range(j.offset, width, across))
        window = Window((i.taps, j.taps), (1, 1), (i.start, j.start), output, image, whole, form)
        yield pixels, taps, window


def blocks(images: int, size: Pair, limit: int) -> Iterator[Place]:
    """(images, rows of the output) of every block: rows of one image, or several whole images, of
    about `limit` positions and nearly equal size.

    Copies run along the images of a block, so it has 8 of them even if only 4 are within the limit;
    two images or more are at least two blocks, for two threads.
    """
    area = size[0] * size[1]
    if 2 * area > limit:
        count, height = 1, _ceil(size[0], max(1, round(area / limit)))
    else:
        most = max(limit // area, min(8, 2 * limit // area))
        number = _ceil(images, min(most, _ceil(images, 2)))  # of blocks
        count, height = _ceil(images, number), size[0]
    for n in range(0, images, count):
        for r in range(0, size[0], height):
            yield slice(n, min(n + count, images)), slice(r, min(r + height, size[0]))


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def unfolded_shape(channels: int, images: int, rows: int, window: Window) -> Shape:
    """(kw, C, step, q, ow, images): `unfold`."""
    reach = rows + (window.taps[0] - 1) // window.step[0]
    return window.taps[1], channels, window.step[0], reach, window.size[1], images


def unfold(target: Array, x: Array, window: Window, first: int) -> None:
    """Fill target[l, c, a, q, j, n] = x[c, n, step (first + q) + a + start, step j + l + start].

    x: (C, n, H, W), the images of a block; first: its first row. The image's rows are sorted by
    their offset `a` in the stride, so that for every tap k of a column the rows that it reads
    follow each other: `tap`.
    """
    x = namespace(x).permute_dims(x, (0, 2, 3, 1))  # (C, H, W, n)
    for place, source in copies(window, first, target.shape[3]):
        target[place] = 0 if source is None else x[source]


@cache
def copies(window: Window, first: int, reach: int) -> tuple[tuple[Any, Any], ...]:
    """The copies that `unfold` makes: (place in the target, place in the image, None for zeros)."""
    step, start, width, every = window.step, window.start, window.size[1], slice(None)
    copied = []
    for shift, a in product(range(window.taps[1]), range(step[0])):
        rows, down = inside(first * step[0] + a + start[0], step[0], reach, window.image[0])
        columns, across = inside(shift + start[1], step[1], width, window.image[1])
        parts = (
            (slice(0, rows.start), slice(0, width), None),  # above the image
            (slice(rows.stop, reach), slice(0, width), None),  # below
            (rows, slice(0, columns.start), None),  # left
            (rows, slice(columns.stop, width), None),  # right
            (rows, columns, (every, down, across, every)),
        )
        for q, j, source in parts:
            if q.start < q.stop and j.start < j.stop:
                copied.append(((shift, every, a, q, j, every), source))
    return tuple(copied)


def inside(first: int, step: int, count: int, size: int) -> tuple[slice, slice]:
    """Of the places first, first + step, ... (count of them) those in [0, size): which of them, and
    the places themselves."""
    low = min(count, max(0, -(first // step)))
    high = max(low, min(count, -((first - size) // step)))
    if low == high:
        return slice(low, low), slice(0, 0)
    begin = first + step * low
    return slice(low, high), slice(begin, begin + step * (high - low - 1) + 1, step)


def tap(unfolded: Array, k: int, rows: int) -> Array:
    """The pixels under tap k of a column for a block of so many rows, (kw C, rows ow n): a view."""
    kw, channels, step, reach, width, images = unfolded.shape
    flat = namespace(unfolded).reshape(unfolded, (kw * channels, step * reach * width * images))
    start = ((k % step) * reach + k // step) * width * images
    return flat[:, start : start + rows * width * images]


def flat(window: Window, *arrays: Array) -> tuple[Window, list[Array]]:
    """A pointwise correlation of arrays (channels, N, H, W) as one of a single image of one column,
    whose blocks need no copies; any other as it is."""
    if not window.pointwise:
        return window, list(arrays)
    column = [namespace(a).reshape(a, (a.shape[0], 1, -1, 1)) for a in arrays]
    size = (column[0].shape[2], 1)
    return replace(window, size=size, image=size), column


def narrow(channels: int, window: Window) -> bool:
    """Whether the products of the kernel's rows are one."""
    return window.taps[0] > 1 and window.taps[1] * channels < NARROW


def shares(order: list[Place], pieces: int) -> list[list[Place]]:
    """Blocks in consecutive parts; up to `SHARES`, counted with the pieces that each part is cut
    into."""
    count = min(len(order), max(1, SHARES // pieces))
    return [order[len(order) * k // count : len(order) * (k + 1) // count] for k in range(count)]


# --- shared by the two forms --------------------------------------------------------------------


class Kernel(NamedTuple):
    """A kernel as its form multiplies by it.

    target: where `fill` writes, with the last two axes of the taps. matrix: the same memory as the
    products need it. scaled: the power of 2 that it was multiplied by, None for 1.
    """

    target: Array
    matrix: Array
    scaled: Array | None = None


def add_product(total: Array, a: Array, b: Array, buffer: Array, *, first: bool) -> None:
    """total = a @ b if it is the first product, else total += a @ b by way of `buffer`."""
    write_result(total if first else buffer, "matmul", a, b)
    if not first:
        total += buffer
