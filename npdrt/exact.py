"""Matrix products with the same bits under any BLAS, thread count and device.

Floating-point sums depend on their order, which no library promises. These products leave nothing
to it: operands are cut into slices of few bits on a common grid, so that a product of slices is a
sum of integers that float64 holds exactly. Any order of additions, with or without fused ones,
gives that sum. Only the few additions of such products round, and their order is written here
(Ozaki, Ogita, Oishi, Rump 2012, "Error-free transformations of matrix multiplication").
"""

from __future__ import annotations

from npdrt import slices
from npdrt.arrays import Array, composite, namespace, product, quiet
from npdrt.errors import Error
from npdrt.slices import factors_below

DIGITS = 53  # of a float64
# the products of slices that are added, by the number of slices, in this order
PAIRS = {
    2: slices.PAIRS,
    3: ((2, 0), (1, 1), (0, 2), (1, 0), (0, 1), (0, 0)),
}


def matmul(a: Array, b: Array) -> Array:
    """a @ b of float32 or float64 matrices, or stacks of them: (..., M, K) @ (..., K, N).

    With K terms, c = ceil(log2 K) and t = floor((53 - c) / 2):

        a = s (a0 + a1 + ...)     s: the power of two at or below the largest |element| of the row
        b = (b0 + b1 + ...) s'    s': that of the column
        a @ b = s (a0 @ b0 + a0 @ b1 + a1 @ b0 + ...) s'

    a0 is a / s rounded to a multiple of 2**(1 - t), and so at most 2**t such units; a1 is the rest
    rounded to a multiple of 2**(1 - 2 t), at most 2**(t - 1) units; a2 in the same way. A product
    of slices is then an integer of at most K 2**(2 t) <= 2**53 units, and so is every partial sum.

    float32 has two slices and three products, (a0 b0 + a0 b1) + a1 b0. float64 has three slices and
    six products, added from the smallest to the largest. The sum is rounded to the dtype once.

    Error of an element, with u = 2**-24 in float32, 2**-53 in float64, and n = 2 or 3 slices:

        |error| <= u |a @ b| + (2 n + 2) K s s' 2**(-n t) + 2**-50 v K s s'

    with v = 1 in float32, 2**-t in float64, and half of the smallest number more where the result
    is subnormal. A number is 0 in all slices if it is below 2**(-n t) of s: 2**-42 in float32 and
    2**-63 in float64 for K = 1,000.

    Nothing over- or underflows on the way: the result is infinite, or subnormal, if the sum is. A
    row of a, or column of b, that has an element which is not finite gives NaN in all its products,
    with the same bits everywhere. No result is -0, unless it underflows.

    It costs 3 or 6 products of float64 and a dozen passes over a and b. Raises `Error` for another
    dtype, a vector, and shapes that do not fit.

    >>> import numpy as np
    >>> matmul(np.array([[1.0, 2.0]]), np.array([[3.0], [4.0]]))
    array([[11.]])
    """
    _check(a, b)
    whole = a.dtype == namespace(a).float32
    return product_of_slices(a, b) if whole else product_of_slices.definition(a, b)


@composite(name="exact_matmul", host=slices.multiply, strided=True)
def product_of_slices(a: Array, b: Array) -> Array:
    """`matmul` of operands that fit; of float32 one call in programs, and faster on NumPy."""
    xp, terms = namespace(a, b), a.shape[-1]
    if terms == 0:
        return product(a, b)  # zeros
    count = 2 if a.dtype == xp.float32 else 3
    bits = slices.bits_of(terms)
    with quiet():
        a_parts, a_scale, a_finite = _cut(a, -1, count, bits)
        b_parts, b_scale, b_finite = _cut(b, -2, count, bits)
        total = 0.0  # and the sum of zeros is +0, whatever their signs
        for i, j in PAIRS[count]:
            total = total + product(a_parts[i], b_parts[j])
        for s, t in zip(a_scale, b_scale, strict=True):
            total = total * s * t
        total = xp.where(a_finite & b_finite, total, xp.nan)
        return xp.astype(total, a.dtype)


def _check(a: Array, b: Array) -> None:
    """Refuse all but matrices, or stacks of them, that fit."""
    xp = namespace(a, b)
    if a.dtype != b.dtype or a.dtype not in (xp.float32, xp.float64):
        raise Error(
            "exact.matmul: expected two arrays of float32 or two of float64; got "
            f"{a.dtype} and {b.dtype}; convert one first"
        )
    if min(a.ndim, b.ndim) < 2 or a.shape[-1] != b.shape[-2]:
        raise Error(
            "exact.matmul: expected shapes (..., M, K) and (..., K, N); got "
            f"{tuple(a.shape)} and {tuple(b.shape)}; make a vector a matrix of one row or column"
        )


def _cut(
    x: Array, axis: int, count: int, bits: int
) -> tuple[list[Array], tuple[Array, Array], Array]:
    """The slices of x over the scale of its lines along `axis`, the two factors of that scale,
    `factors_below` the largest |element|, and which lines are finite."""
    xp = namespace(x)
    x = xp.astype(x, xp.float64)
    largest = slices.largest_of(x, axis)
    finite = xp.isfinite(largest)
    h, k = factors_below(xp.where(finite, largest, 1.0))
    rest, parts = x / h / k, []
    for number in range(1, count + 1):
        grid = 3.0 * 2.0 ** (DIGITS - 1 - number * bits)  # its last bit is 2**(1 - number * bits)
        parts.append((rest + grid) - grid)
        rest = rest - parts[-1]
    return parts, (h, k), finite
