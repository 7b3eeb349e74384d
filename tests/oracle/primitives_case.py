"""The rows of the tables of primitives: references, and calls whose float arguments are not yet
drawn."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

import npdrt.ops  # noqa: F401  (registers the primitives)
from npdrt.autodiff import PRIMITIVES
from npdrt.conform.formats import Format
from npdrt.random import Random

SEED = 20200207
INF, NAN = math.inf, math.nan

# --- arguments -------------------------------------------------------------------------------
HOW = ("form",)  # settings that choose an algorithm


@dataclass(frozen=True)
class Draw:
    """A float argument that is not yet drawn: make(stream, format) gives its values, which are then
    rounded to the format."""

    make: Callable[[Random, Format], Any]


def normal(*shape: int) -> Draw:
    """Values of both signs."""
    return Draw(lambda stream, number: stream.normal(shape))


def spread(scale: float, *shape: int) -> Draw:
    """Values of both signs, of standard deviation `scale`."""
    return Draw(lambda stream, number: stream.normal(shape, scale))


def positive(*shape: int) -> Draw:
    """Values in [0.2, 3)."""
    return Draw(lambda stream, number: stream.uniform(shape, 0.2, 3.0))


def apart(*shape: int) -> Draw:
    """Values of both signs, at least 1/8 from each other and 1/16 from 0: no kink, no tie."""
    n = math.prod(shape)
    return Draw(
        lambda stream, number: ((stream.permutation(n) - n // 2) / 8 + 1 / 16).reshape(shape)
    )


def signs(*shape: int) -> Draw:
    """-1 or 1."""
    return Draw(lambda stream, number: np.where(stream.bernoulli(shape, 0.5), 1.0, -1.0))


def fixed(values: Any) -> Draw:
    """These values."""
    return Draw(lambda stream, number: np.asarray(values, dtype=np.float64))


def subnormal(*multiples: float) -> Draw:
    """Multiples of the smallest positive number."""
    return Draw(lambda stream, number: np.array(multiples) * number.smallest)


def largest(*multiples: float) -> Draw:
    """Multiples, of at most 1, of the largest finite number."""
    return Draw(lambda stream, number: np.array(multiples) * number.largest)


def near(centre: float, *steps: int) -> Draw:
    """The neighbours of `centre`: centre + steps * the format's spacing there."""
    return Draw(lambda stream, number: centre + np.array(steps) * number.ulp(centre))


def either(single: Any, double: Any) -> Draw:
    """One list of values for float32, another for float64."""
    return Draw(lambda stream, number: np.array(single if number.width == 32 else double, float))


def whole(values: Any) -> Any:
    """An int64 argument."""
    return np.array(values, dtype=np.int64)


def cotangent_for(shape: tuple[int, ...]) -> Any:
    """Sixteenths of both signs, never 0, without symmetry; exact in every format."""
    n = np.arange(math.prod(shape), dtype=np.int64).reshape(shape)
    return ((7 * n * n + 5 * n + 3) % 23 - 11.5) / 8.0


# --- a primitive -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Reference:
    """The definition of a primitive, and how far an answer may be from it.

    units: the tolerance in eps: npdrt's largest error over the table, in float32 or float64 (NumPy
    2.4, x86-64), times about 4, since the last bits of exp or tanh and the order of a sum are not
    the same everywhere. 0: values are only moved, and the cotangents' sums are exact. The condition
    of the sums in a vjp multiplies it.
    value: the value, of object arrays of Duals.
    """

    units: float
    value: Callable[..., Any]


# --- a case ----------------------------------------------------------------------------------

LENIENT = {"KINK", "TIE", "SUBNORMAL", "CONVENTION"}  # flags that make a test "acceptable"


@dataclass(frozen=True)
class PrimitiveCase:
    """A row of the table: one call, in every format.

    comment: unique among the cases of an operation. arguments: `Draw`s, integer and boolean
    arrays, and numbers. constant: positions that are not differentiated, next to those that are not
    floats. value, vjp: nested lists that replace the values of the reference; the cotangent is
    then 1. units: the tolerance in eps, in place of the operation's. version: of the
    files that had it first.
    """

    operation: str
    comment: str
    arguments: tuple[Any, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    flags: tuple[str, ...] = ()
    constant: tuple[int, ...] = ()
    value: Any = None
    vjp: tuple[Any, ...] | None = None
    units: float | None = None
    version: int = 1

    def flag(self, *flags: str) -> PrimitiveCase:
        """This case with flags."""
        return replace(self, flags=(*self.flags, *flags))

    def fix(self, *positions: int) -> PrimitiveCase:
        """This case with arguments that are not differentiated."""
        return replace(self, constant=positions)

    def gives(self, value: Any, *vjp: Any) -> PrimitiveCase:
        """This case with a stated value and, for each argument (None: not differentiated), the
        stated vjp of the cotangent 1."""
        return replace(self, value=value, vjp=vjp)

    def within(self, units: float) -> PrimitiveCase:
        """This case with a tolerance of its own, in eps."""
        return replace(self, units=units)

    def since(self, version: int) -> PrimitiveCase:
        """This case, new in a version of the files: it is numbered after those of older ones."""
        return replace(self, version=version)

    def full_settings(self) -> dict[str, Any]:
        """Every setting of the operation, also those at their default, except those that choose an
        algorithm: they change no value."""
        parameters = inspect.signature(PRIMITIVES[self.operation]).parameters.values()
        return {
            p.name: self.settings.get(p.name, p.default)
            for p in parameters
            if p.kind is p.KEYWORD_ONLY and p.name not in HOW
        }

    def differentiated(self) -> tuple[int, ...]:
        """The positions of the arguments that have a cotangent."""
        return tuple(
            i
            for i, a in enumerate(self.arguments)
            if isinstance(a, Draw) and i not in self.constant
        )

    def realised(self, number: Format) -> list[Any]:
        """The arguments in a format, floats as float64."""
        stream = Random(SEED, f"vectors/{self.operation}/{self.comment}")
        return [
            number.round(a.make(stream.of(str(i)), number)) if isinstance(a, Draw) else a
            for i, a in enumerate(self.arguments)
        ]


def case(operation: str, comment: str, *arguments: Any, **settings: Any) -> PrimitiveCase:
    """A row of the table."""
    return PrimitiveCase(operation, comment, arguments, settings)
