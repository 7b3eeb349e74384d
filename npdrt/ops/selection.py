"""Selections between values, elementwise, with broadcasting. Ties share the cotangent equally."""

from __future__ import annotations

from typing import Any

from npdrt.arrays import Array, namespace
from npdrt.autodiff import ALL, primitive
from npdrt.errors import Error

__all__ = ["clip", "maximum", "minimum", "where"]


@primitive(computes=slice(1, 3), moves=True, numbers=True)
def where(condition: Array, a: Array, b: Array) -> Any:
    """a where the boolean `condition` holds, else b; the condition has no derivative."""
    xp = namespace(condition, a, b)

    def zero(g: Array) -> Array:
        return xp.zeros((), dtype=g.dtype)

    return xp.where(condition, a, b), (
        None,
        lambda g: xp.where(condition, g, zero(g)),
        lambda g: xp.where(condition, zero(g), g),
    )


@primitive(computes=ALL, analytic=False, moves=True, numbers=True)
def maximum(a: Array, b: Array) -> Any:
    """The larger of a and b; where they are equal each receives half of the cotangent."""
    return namespace(a, b).maximum(a, b), _share(a, b, a > b)


@primitive(computes=ALL, analytic=False, moves=True, numbers=True)
def minimum(a: Array, b: Array) -> Any:
    """The smaller of a and b; where they are equal each receives half of the cotangent."""
    return namespace(a, b).minimum(a, b), _share(a, b, a < b)


def _share(a: Array, b: Array, a_wins: Array) -> Any:
    """The vjps of a selection between a and b: all to the winner, half each at a tie."""
    xp = namespace(a, b)

    def share(g: Array, won: Array) -> Array:
        half, whole = xp.asarray(0.5, dtype=g.dtype), xp.asarray(won, dtype=g.dtype)
        return g * xp.where(a == b, half, whole)

    return (lambda g: share(g, a_wins), lambda g: share(g, ~a_wins))


@primitive(computes=ALL, analytic=False, moves=True)
def clip(x: Array, *, low: float | None = None, high: float | None = None) -> Any:
    """x limited to [low, high]; derivative 1 inside and on the limits, 0 outside."""
    xp = namespace(x)
    if low is None and high is None:
        raise Error("clip: give low, high or both")
    inside = xp.ones(x.shape, dtype=xp.bool)
    inside = inside if low is None else inside & (x >= low)
    inside = inside if high is None else inside & (x <= high)
    return xp.clip(x, low, high), lambda g: g * xp.asarray(inside, dtype=g.dtype)
