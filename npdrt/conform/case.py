"""What is asked of an implementation, and what it answers: plain records, and their JSON form.

A case is a parameter, a state, and one or more steps, each a gradient with a learning rate. An
answer is the parameter and the state after every step. Arrays are float64 and hold numbers of the
case's format (`npdrt.conform.formats`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from npdrt.conform.formats import FORMATS, Format, Values

Slots = dict[str, Any]  # "momentum", "exp_avg", ... as arrays; "step", "max_norm" ... as numbers
# Flags of cases with a neighbour, as FLAGS of `npdrt.conform.cases`. They say how the tensor stands
# beside its neighbour in an optimizer, which changes none of its answers.
USES: dict[str, tuple[str, str]] = {
    "GROUPS": (
        "MISSING_STEP",
        "the other tensor is in the first group, with a learning rate and a decay of its own",
    ),
    "MISSING_GRADIENT": (
        "MISSING_STEP",
        "between two steps, the optimizer makes one in which the tensor has no gradient",
    ),
    "EXCLUSION": (
        "MISSING_STEP",
        "one tensor is left out of the decay by its name: the other, or this one if it has none",
    ),
}
FIRST_GROUP = 0.5  # the learning rate of the neighbour's group, over that of the tensor's
LAYOUTS = ("C", "fortran", "fortran gradient", "strided", "reversed")
FILLER = 3.0  # what lies between the elements of a strided operand, and behind a reversed one


@dataclass(frozen=True)
class Step:
    """One update asked for: the gradient and the learning rate (float64)."""

    g: Values
    lr: float


@dataclass(frozen=True)
class Neighbour:
    """A second tensor in the same optimizer, of the same shape and of the other kind.

    It makes its step before the tensor of the case does, with the same learning rate. Its answers
    are not looked at: another case has the two exchanged. g: its gradient at every step.
    """

    w: Values
    g: tuple[Values, ...]


@dataclass(frozen=True)
class Case:
    """One test.

    id: unique among all vectors. rule: a name in `npdrt.optim.RULES`. format: a name in FORMATS.
    settings: every setting of the rule but lr, by npdrt's names. w: the parameter. state: the
    state before the first step (array slots by npdrt's names, and "step", the number of updates
    made before), or None for the implementation's own start. kind: "weight" or "bias", for
    implementations that treat them differently. result: "valid" (gated), "acceptable" (judged,
    reported, not gated) or "error" (ought to be refused; reported, not gated). layout: how w and
    g lie in memory, one of LAYOUTS. neighbour: another tensor in the same optimizer.
    generated: its values are not stored but drawn again (`npdrt.conform.generated`).
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
    layout: str = "C"
    neighbour: Neighbour | None = None
    generated: bool = False

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


# --- memory ---------------------------------------------------------------------------------------


def laid_out(values: Any, layout: str) -> Any:
    """A copy of an array, contiguous in C order ("C") or Fortran's, with every second element of
    its buffer ("strided"), or backwards in it ("reversed"); 0-d arrays have one layout only."""
    values = np.asarray(values)
    if layout.startswith("fortran"):
        return np.array(values, order="F")
    if layout == "C" or values.ndim == 0:
        return np.array(values, order="C")
    n, shape = values.size, values.shape
    buffer = np.full(2 * n, FILLER).astype(values.dtype)
    view = buffer[::2] if layout == "strided" else buffer[:n][::-1]
    view[...] = values.reshape(-1)
    return view.reshape(shape) if values.ndim == 1 else _split(view, shape)


def _split(line: Any, shape: tuple[int, ...]) -> Any:
    """A 1-d view with a shape, as a view: one step along the line is one along the last axis."""
    steps = np.cumprod((1, *shape[:0:-1]))[::-1] * line.strides[0]
    return np.lib.stride_tricks.as_strided(line, shape, steps)


def as_if_contiguous(values: Any, layout: str) -> Any:
    """The elements that are read if the strides of such an array are ignored."""
    view = laid_out(values, layout)
    if layout.startswith("fortran"):
        return view.reshape(-1, order="F").reshape(view.shape)
    if layout == "C" or view.ndim == 0:
        return view
    flat = view.reshape(-1)
    if layout == "strided":
        read = np.full(flat.size, FILLER).astype(view.dtype)
        read[::2] = flat[: (flat.size + 1) // 2]
    else:  # the filler lies behind the first element, which is the last of the buffer's half
        read = np.append(flat[:1], np.full(max(flat.size - 1, 0), FILLER).astype(view.dtype))
    return read.reshape(view.shape)


def operands(w: Any, g: Any, layout: str, make: Any = laid_out) -> tuple[Any, Any]:
    """The parameter and the gradient as `make` lays them out; "fortran gradient" leaves w in C
    order."""
    return make(w, "C" if layout == "fortran gradient" else layout), make(g, layout)
