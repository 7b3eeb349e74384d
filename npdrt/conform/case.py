"""What is asked of an implementation, and what it answers: plain records, and their JSON form.

A case is a parameter, a state, and one or more steps, each a gradient with a learning rate. An
answer is the parameter and the state after every step. Arrays are float64 and hold numbers of the
case's format (`npdrt.conform.formats`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from npdrt.conform.formats import FORMATS, Format, Values

Slots = dict[str, Any]  # "momentum", "exp_avg", ... as arrays; "step", "max_norm" ... as numbers


@dataclass(frozen=True)
class Step:
    """One update asked for: the gradient and the learning rate (float64)."""

    g: Values
    lr: float


@dataclass(frozen=True)
class Case:
    """One test.

    id: unique among all vectors. rule: a name in `npdrt.optim.RULES`. format: a name in FORMATS.
    settings: every setting of the rule but lr, by npdrt's names. w: the parameter. state: the
    state before the first step (array slots by npdrt's names, and "step", the number of updates
    made before), or None for the implementation's own start. kind: "weight" or "bias", for
    implementations that treat them differently. result: "valid" (gated), "acceptable" (judged,
    reported, not gated) or "error" (ought to be refused; reported, not gated).
    """

    id: int
    comment: str
    flags: tuple[str, ...]
    rule: str
    format: str
    settings: Mapping[str, Any]
    w: Values
    steps: tuple[Step, ...]
    state: Slots | None = None
    kind: str = "weight"
    result: str = "valid"

    @property
    def number(self) -> Format:
        """The number format."""
        return FORMATS[self.format]


@dataclass(frozen=True)
class Answer:
    """The parameter and the array slots after one step."""

    w: Values
    slots: Slots = field(default_factory=dict)


@dataclass(frozen=True)
class Failure:
    """Why an implementation gave no answer.

    kind: "raised", "shape", "dtype", "mutated", "nondeterministic", "hung", "died", "not offered"
    (it does not have a setting of the case) or "missing". message: one line.
    """

    kind: str
    message: str


Outcome = tuple[Answer, ...] | Failure
