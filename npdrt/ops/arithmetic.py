"""Arithmetic with broadcasting, which `backward` undoes; and the operators of `Tensor`."""

from __future__ import annotations

from typing import Any

from npdrt import compute
from npdrt.arrays import Array, namespace
from npdrt.autodiff import ALL, Tensor, primitive
from npdrt.errors import Error

__all__ = ["add", "divide", "multiply", "negative", "power", "subtract"]


@primitive(computes=ALL, numbers=True)
def add(a: Array, b: Array) -> Any:
    """a + b elementwise."""
    return a + b, (lambda g: g, lambda g: g)


@primitive(computes=ALL, numbers=True)
def subtract(a: Array, b: Array) -> Any:
    """a - b elementwise."""
    return a - b, (lambda g: g, lambda g: -g)


@primitive(computes=ALL, numbers=True)
def multiply(a: Array, b: Array) -> Any:
    """a * b elementwise."""
    return a * b, (lambda g: g * b, lambda g: g * a)


@primitive(computes=ALL, numbers=True)
def divide(a: Array, b: Array) -> Any:
    """a / b elementwise; IEEE division, so x / 0 is inf or NaN."""
    y = a / b
    return y, (lambda g: g / b, lambda g: -g * y / b)


@primitive(computes=ALL)
def negative(x: Array) -> Any:
    """-x elementwise."""
    return -x, lambda g: -g


@primitive(computes=ALL, numbers=True)
def power(x: Array, exponent: Array) -> Any:
    """x ** exponent elementwise; the exponent is an array or a real number.

    d/dx = p x**(p-1), taken as 0 where p = 0 (also at x = 0). d/dp = x**p log x, taken as 0 where
    x = 0; NaN for x < 0, where the function is real only at integers.
    """
    xp = namespace(x, exponent)
    y = compute.power(x, exponent)

    def gx(g: Array) -> Array:
        if not hasattr(exponent, "shape"):
            return g * 0.0 if exponent == 0 else g * exponent * compute.power(x, exponent - 1)
        zero = exponent == 0
        slope = exponent * compute.power(x, xp.where(zero, xp.ones_like(exponent), exponent - 1))
        return g * xp.where(zero, xp.zeros_like(slope), slope)

    def gp(g: Array) -> Array:
        base = xp.asarray(x, dtype=y.dtype)
        zero = base == 0
        return g * xp.where(zero, xp.zeros_like(y), y * compute.log(xp.where(zero, 1.0, base)))

    return y, (gx, gp)


def _refuse(self: Tensor, other: Any) -> Any:
    raise Error("Tensors are compared by value: write x.value < y inside a primitive, or ops.where")


def _reversed(operation: Any) -> Any:
    return lambda self, other: operation(other, self)


_BINARY = {"add": add, "sub": subtract, "mul": multiply, "truediv": divide, "pow": power}
for _name, _operation in _BINARY.items():
    setattr(Tensor, f"__{_name}__", _operation)
    setattr(Tensor, f"__r{_name}__", _reversed(_operation))
for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
    setattr(Tensor, f"__{_name}__", _refuse)
setattr(Tensor, "__neg__", negative)  # noqa: B010  (a method known only here)
