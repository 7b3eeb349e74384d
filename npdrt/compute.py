"""Products, sums and functions: the operations whose bits an array library does not promise.

    with npdrt.arithmetic("portable"):
        loss, grads = npdrt.value_and_grad(loss_of)(params, x, y)

In "fast" arithmetic, the default, they are those of the array library. In "portable" they are
made of `+ - * /`, comparisons and selections in a defined order (`npdrt.exact`,
`npdrt.elementary`), so that float32 arrays have the same bits with any library, processor, number
of threads and device; see docs/portable.md. Primitives call the functions of this module and no
others for such operations. A program has the arithmetic in which it was recorded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import numpy as np

from npdrt import arrays, elementary, exact, sums
from npdrt.arrays import Array, composite, namespace, quiet
from npdrt.errors import Error

ARITHMETICS = ("fast", "portable")
VERSION = 1  # of the portable arithmetic: another one gives other bits

_chosen: ContextVar[str] = ContextVar("arithmetic", default="fast")


@contextmanager
def arithmetic(name: str) -> Iterator[None]:
    """Inside, primitives compute in that arithmetic, "fast" or "portable"."""
    if name not in ARITHMETICS:
        raise Error(f"unknown arithmetic {name!r}; use one of {', '.join(ARITHMETICS)}")
    token = _chosen.set(name)
    try:
        yield
    finally:
        _chosen.reset(token)


def is_portable() -> bool:
    """Whether primitives compute in portable arithmetic."""
    return _chosen.get() == "portable"


def product(a: Array, b: Array) -> Array:
    """a @ b of matrices or stacks of them; portable: `npdrt.exact.matmul`."""
    if not is_portable():
        return arrays.product(a, b)
    require_float32("matmul", a, b)
    return exact.matmul(a, b)


def total(x: Array, axes: tuple[int, ...], *, keepdims: bool = False) -> Array:
    """The sum of x over `axes` (not negative): `npdrt.arrays.total`; portable:
    `npdrt.sums.sum`."""
    if not is_portable():
        return arrays.total(x, axes, keepdims=keepdims)
    return _portable_sum(x, axis=axes, keepdims=keepdims)


def dots(a: Array, b: Array) -> Array:
    """The inner products of the rows of two matrices, (rows, 1): `npdrt.arrays.dots`; portable:
    `total` of the elementwise products."""
    return total(a * b, (1,), keepdims=True) if is_portable() else arrays.dots(a, b)


def power(x: Array, exponent: Array) -> Array:
    """x**exponent, one of which may be a number; portable: +-exp(exponent log|x|), in float64."""
    if not is_portable():
        return x**exponent
    xp = namespace(x, exponent)
    like = x if hasattr(x, "dtype") else exponent
    x, p = (xp.asarray(a, dtype=xp.float64) for a in (x, exponent))
    with quiet():  # 0 log 0
        y = exp(xp.where(p == 0, xp.zeros_like(p * x), p * log(xp.abs(x))))
        whole, even = p == xp.floor(p), 0.5 * p == xp.floor(0.5 * p)
        y = xp.where((x < 0) & whole & ~even, -y, y)
        y = xp.where((x < 0) & ~whole, xp.nan, y)
        return xp.astype(y, like.dtype)


def has_kernels(x: Array, *others: Array) -> bool:
    """`npdrt.arrays.has_kernels`; portable: no, since kernels have an order of their own."""
    return not is_portable() and arrays.has_kernels(x, *others)


def convolution_form(asked: str, x: Array) -> str:
    """The form of a convolution of x: the one that is asked for; portable: "sliced"."""
    if not is_portable():
        return asked
    require_float32("conv2d", x)
    return "sliced"


def require_float32(name: str, *given: Array) -> None:
    """Refuse float64, for which there is no portable form."""
    if any(x.dtype != namespace(x).float32 for x in given):
        found = ", ".join(str(x.dtype) for x in given)
        raise Error(
            f"{name}: portable arithmetic has products of float32 only; got {found}; convert them, "
            'or compute in npdrt.arithmetic("fast")'
        )


_portable_sum = composite(sums.sum, name="portable_sum", strided=True)


def _function(name: str) -> Callable[[Array], Array]:
    """The array library's function of that name; portable: that of `npdrt.elementary`."""
    portable = composite(getattr(elementary, name), name=f"portable_{name}", strided=True)

    def call(x: Array) -> Array:
        return portable(x) if is_portable() else getattr(namespace(x), name)(x)

    call.__name__, call.__doc__ = name, f"{name}(x), elementwise."
    return call


def exp_of(x: float) -> float:
    """e**x of a number: `math.exp`; portable: `npdrt.elementary.exp`."""
    return float(elementary.exp(np.asarray(x))) if is_portable() else math.exp(x)


exp, expm1, log, log1p = map(_function, ("exp", "expm1", "log", "log1p"))
tanh, sin, cos = map(_function, ("tanh", "sin", "cos"))
