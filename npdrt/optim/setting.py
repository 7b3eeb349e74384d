"""What a rule says about each of its settings, and the checks of their ranges."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

from npdrt.arrays import number
from npdrt.errors import Error


def at_least_zero(name: str, value: float) -> float:
    """`value`, of Python or NumPy, as a float, or `Error` unless it is a finite number >= 0.

    A NumPy number would decide the dtype of the arrays that it meets; a float does not.
    """
    value = number(value)
    if not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise Error(f"{name} must be a finite number >= 0; got {value!r}")
    return float(value)


def below_one(name: str, value: float) -> float:
    """`value`, of Python or NumPy, as a float, or `Error` unless 0 <= value < 1."""
    value = number(value)
    if not isinstance(value, int | float) or not 0 <= value < 1:
        raise Error(f"{name} must lie in [0, 1); got {value!r}")
    return float(value)


def below_one_each(name: str, values: tuple[float, float]) -> tuple[float, float]:
    """Two values that `below_one` accepts; the message names "betas" as beta1 and beta2."""
    if not isinstance(values, tuple | list) or len(values) != 2:
        raise Error(f"{name} must be two numbers in [0, 1); got {values!r}")
    first, second = (below_one(f"{name.removesuffix('s')}{k}", v) for k, v in enumerate(values, 1))
    return first, second


def flag(name: str, value: bool) -> bool:
    """`value`, of Python or NumPy, as a bool, or `Error` for anything else."""
    value = number(value)
    if not isinstance(value, bool):
        raise Error(f"{name} must be true or false; got {value!r}")
    return value


@dataclass(frozen=True)
class Setting:
    """A setting of a rule, written in its signature: `momentum: Annotated[float, Setting(...)]`.

    help: a few words, without a full stop, for the help of the commands. check(name, value): the
    value that the rule computes with, or `Error`. needs: another setting, without which (where
    that one is 0 or false) this one does nothing. type, default: the rest of what the signature
    says; the `Rule` fills them in. A setting whose default is None takes None as it is.
    """

    help: str
    check: Callable[[str, Any], Any]
    needs: str | None = None
    type: Any = None
    default: Any = None

    def checked(self, name: str, value: Any) -> Any:
        """The value that the rule computes with. Raises `Error` outside the range."""
        return None if value is None and self.default is None else self.check(name, value)


WeightDecay = Annotated[
    float, Setting("multiple of the weights that is added to the gradient", at_least_zero)
]
Decoupled = Annotated[
    float, Setting("multiple of the weights that is added to the step", at_least_zero)
]
Betas = Annotated[
    tuple[float, float], Setting("shares of the two moments that are kept", below_one_each)
]
