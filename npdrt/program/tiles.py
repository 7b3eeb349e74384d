"""Winograd's form with its passes over memory as compiled loops (extra `fast`, numba).

A loop makes the additions of the pass of its name in `npdrt.ops.winograd`, in the same order,
without contraction or reassociation, and the products stay NumPy's: the bits are the same. Inner
loops write to one array and read at most four, because the compiler does not vectorise loops over
more arrays that could overlap. The last pass, which puts tiles into images, stays NumPy's too: it
is not faster as a loop (benchmarks/README.md).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

from npdrt.arrays import Array
from npdrt.ops import winograd
from npdrt.program.fused import numba

Loop = Callable[..., None]


@cache
def _loops(dtype: str) -> SimpleNamespace:
    """The loops for float32 or float64."""

    def loop(*types: str) -> Callable[[Loop], Loop]:
        """Compile for arguments of these types, those of arrays without their dtype."""
        signature = f"void({', '.join(t.replace('[', f'{dtype}[', 1) for t in types)})"
        compiler: Callable[[Loop], Loop] = numba().njit(
            signature, nogil=True, error_model="numpy", fastmath=False
        )
        return compiler

    @loop("[:,:,:,::1]", "[:,:,:,:,::1]", "int64", "int64", dtype)
    def column(result: Any, pixels: Any, k: Any, m: Any, sign: Any) -> None:
        """(4, C, rows, n), (2, C, 2, rows + 1, more), columns and images in one axis: B' (x + sign
        y) for the columns x and y that begin at k // 2 and m // 2 of their parity."""
        _, channels, rows, n = result.shape
        for c in range(channels):
            for r in range(rows):
                x0, y0 = pixels[k % 2, c, 0, r, k // 2 :], pixels[m % 2, c, 0, r, m // 2 :]
                x1, y1 = pixels[k % 2, c, 1, r, k // 2 :], pixels[m % 2, c, 1, r, m // 2 :]
                x2, y2 = pixels[k % 2, c, 0, r + 1, k // 2 :], pixels[m % 2, c, 0, r + 1, m // 2 :]
                x3, y3 = pixels[k % 2, c, 1, r + 1, k // 2 :], pixels[m % 2, c, 1, r + 1, m // 2 :]
                target = result[0, c, r]
                for i in range(n):
                    target[i] = (x0[i] + sign * y0[i]) - (x2[i] + sign * y2[i])
                target = result[1, c, r]
                for i in range(n):
                    target[i] = (x1[i] + sign * y1[i]) + (x2[i] + sign * y2[i])
                target = result[2, c, r]
                for i in range(n):
                    target[i] = (x2[i] + sign * y2[i]) - (x1[i] + sign * y1[i])
                target = result[3, c, r]
                for i in range(n):
                    target[i] = (x3[i] + sign * y3[i]) - (x1[i] + sign * y1[i])

    @loop("[:,::1]", "[:,::1]")
    def collect(target: Any, m: Any) -> None:  # (2, n), (4, n)
        upper, lower, m0, m1, m2, m3 = target[0], target[1], m[0], m[1], m[2], m[3]
        for i in range(upper.size):
            upper[i] = (m1[i] + m2[i]) + m0[i]
        for i in range(lower.size):
            lower[i] = (m1[i] - m2[i]) + m3[i]

    return SimpleNamespace(column=column, collect=collect)


def _column(result: Array, sums: Array, pixels: Array, b: int) -> None:
    images, (k, across, m) = result.shape[4], winograd.B[b]
    begin = (n % 2 + n // 2 * 2 * images for n in (k, m))
    sign = result.dtype.type(1 if across == "add" else -1)
    flat = result.reshape(*result.shape[:3], -1), pixels.reshape(*pixels.shape[:4], -1)
    _loops(result.dtype.name).column(*flat, *begin, sign)


def _collect(target: Array, m: Array) -> None:
    _loops(m.dtype.name).collect(target.reshape(2, -1), m.reshape(4, -1))


PASSES = winograd.Passes(_column, _collect)
CHANGED = {
    name: partial(getattr(winograd, name), passes=PASSES) for name in ("correlate", "add_blocks")
}
FORM = SimpleNamespace(**{**vars(winograd), **CHANGED})


def compiled(form: Any, dtype: str) -> Any:
    """The form with compiled passes, if there are any for it and for arrays of that dtype."""
    if form is not winograd or dtype not in ("float32", "float64"):
        return form
    _loops(dtype)  # here, and not on several threads
    return FORM
