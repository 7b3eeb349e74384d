"""Matrix products. The orientation of every GEMM is fixed here."""

from __future__ import annotations

from typing import Any

from npdrt.arrays import Array, namespace
from npdrt.autodiff import ALL, Tensor, primitive
from npdrt.compute import product, total
from npdrt.errors import Error

__all__ = ["linear", "matmul"]


@primitive(computes=ALL)
def matmul(a: Array, b: Array) -> Any:
    """a @ b for stacks of matrices: (..., M, K) @ (..., K, N) -> (..., M, N).

    ga = g @ b^T, gb = a^T @ g; leading axes broadcast.
    """
    xp = namespace(a, b)
    if a.ndim < 2 or b.ndim < 2:
        raise Error(
            f"matmul: expected at least 2 dimensions; got shapes {a.shape} and {b.shape}; "
            "reshape a vector to a row or column first"
        )
    return product(a, b), (
        lambda g: product(g, xp.matrix_transpose(b)),
        lambda g: product(xp.matrix_transpose(a), g),
    )


@primitive(computes=ALL)
def linear(x: Array, weight: Array, bias: Array = None) -> Any:
    """x @ weight^T + bias: (..., in), (out, in), (out,) or None -> (..., out).

    gx = g @ weight, gweight = g^T @ x, gbias = sum of g over all but the last axis.
    """
    xp = namespace(x, weight, bias)
    if weight.ndim != 2 or x.ndim < 2 or x.shape[-1] != weight.shape[1]:
        raise Error(
            f"linear: expected x (..., in) and weight (out, in); got {tuple(x.shape)} and "
            f"{tuple(weight.shape)}"
        )
    rows = x if x.ndim == 2 else xp.reshape(x, (-1, x.shape[-1]))  # (rows, in)
    y = product(rows, xp.matrix_transpose(weight))  # (rows, out)
    y = y if bias is None else y + bias
    y = y if x.ndim == 2 else xp.reshape(y, (*x.shape[:-1], weight.shape[0]))

    def flat(g: Array) -> Array:
        return g if g.ndim == 2 else xp.reshape(g, (-1, g.shape[-1]))

    return y, (
        lambda g: xp.reshape(product(flat(g), weight), x.shape),
        lambda g: product(xp.matrix_transpose(flat(g)), rows),
        lambda g: total(flat(g), (0,)),
    )


setattr(Tensor, "__matmul__", matmul)  # noqa: B010  (a method known only here)
setattr(Tensor, "__rmatmul__", lambda self, other: matmul(other, self))  # noqa: B010
