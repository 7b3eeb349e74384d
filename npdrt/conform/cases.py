"""The flags of the cases of the updates, and how a draft becomes a case."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from npdrt.conform.case import Case, Neighbour, Slots, Step
from npdrt.conform.formats import Format, Values
from npdrt.optim import RULES
from npdrt.random import Random

# flag -> (kind of mistake it is after, what the case has)
FLAGS: dict[str, tuple[str, str]] = {
    "ORDINARY": ("BASIC", "values near 1, a fresh state or one given"),
    "SEQUENCE": ("BASIC", "several steps with changing learning rates and gradient sizes"),
    "TRAJECTORY": ("BASIC", "many steps from a fresh state; rounding errors add up"),
    "SHAPE": ("EDGE_CASE", "0-d, empty, one element, or three dimensions"),
    "ONE_ROW_LARGE": ("MISSING_STEP", "rows of very different norms: the norm is the tensor's"),
    "BIAS": ("MODIFIED_PARAMETER", "an array named bias; the published rules treat all alike"),
    "ZERO_PARAMETER": ("EDGE_CASE", "w = 0"),
    "ZERO_GRADIENT": ("EDGE_CASE", "g = 0"),
    "TINY_GRADIENT": ("EDGE_CASE", "a gradient about the size of the usual epsilons"),
    "SMALL_NORM": ("EDGE_CASE", "a norm below the usual floors"),
    "NORM_OVERFLOW": ("EDGE_CASE", "the sum of squares is above the dtype's largest number"),
    "NORM_UNDERFLOW": ("EDGE_CASE", "the squares are below the dtype's smallest number"),
    "RATE_OVERFLOW": ("DEFINED", "lr |w| / |g| is above the dtype's largest number"),
    "INFINITE": ("EDGE_CASE", "one element is infinite"),
    "NAN": ("EDGE_CASE", "one element is NaN"),
    "SIGNED_ZERO": ("EDGE_CASE", "negative zeros"),
    "SUBNORMAL": ("EDGE_CASE", "subnormal numbers, which some hardware flushes to zero"),
    "LARGEST": ("EDGE_CASE", "elements near the largest finite number"),
    "CANCELLATION": ("EDGE_CASE", "the step takes w to zero, or nearly"),
    "LR_ZERO": ("EDGE_CASE", "lr = 0"),
    "LR_LARGE": ("EDGE_CASE", "lr of 1 and above"),
    "LR_HUGE": ("EDGE_CASE", "lr = 1e30"),
    "LR_TINY": ("EDGE_CASE", "lr subnormal in float32"),
    "LR_PRECISION": ("MODIFIED_PARAMETER", "lr has more digits than half precision"),
    "LR_REFUSED": ("DEFINED", "lr that is negative, infinite or NaN should be refused"),
    "FIRST_STEP": ("MISSING_STEP", "t = 1"),
    "SECOND_STEP": ("MISSING_STEP", "t = 2, where 1 - beta^t is small and inexact"),
    "LATE_STEP": ("BASIC", "t of 401 and above, from a state that is given"),
    "ZERO_STATE": ("EDGE_CASE", "a state of zeros in the middle of a run"),
    "COUNTER": ("EDGE_CASE", "t where counters of 8 to 24 bits or more stop counting"),
    "BETA": ("EDGE_CASE", "beta of 0, or so near 1 that half precision makes it 1"),
    "EPSILON_ZERO": ("EDGE_CASE", "eps = 0; with v = 0 it is 0 / 0"),
    "WEIGHT_DECAY": ("MODIFIED_PARAMETER", "where decay enters"),
    "NORM_BOUND": ("MODIFIED_PARAMETER", "the bound on the parameter's norm"),
    "LAYOUT": ("EDGE_CASE", "operands that do not lie in C order, one element after another"),
    "KERNEL": ("EDGE_CASE", "four dimensions, as a convolution's weight has"),
    "NEIGHBOUR": ("MISSING_STEP", "two tensors in one optimizer, each with a state of its own"),
    "LARGE": ("BASIC", "more elements than the blocks in which kernels work"),
    "LONG": ("BASIC", "hundreds or thousands of steps"),
    "PLAINER": (
        "BASIC",
        "with fewer settings, for implementations that lack one; npdrt audit asks "
        "it where it is needed, and prompts leave it out",
    ),
}


@dataclass(frozen=True)
class Draft:
    """A case before it has a rule, a format and a number: what an edge is about."""

    comment: str
    flags: tuple[str, ...]
    w: Any
    g: Any
    lr: Any = 0.1
    settings: dict[str, Any] = field(default_factory=dict)
    state: Slots | None = None
    kind: str = "weight"
    result: str = "valid"
    plain: bool = False  # with the plainest settings only
    layout: str = "C"
    neighbour: Neighbour | None = None
    generated: bool = False


class Drawer:
    """Normal numbers of a format, a new stream for every name."""

    def __init__(self, number: Format):
        self.number = number

    def __call__(self, name: str, *shape: int, size: float = 1.0) -> Values:
        values = Random(2020, "vectors").of(f"{self.number.name} {name}").normal(shape)
        return self.number.round(size * np.asarray(values))


def finished(number: int, rule: str, f: Format, draft: Draft, settings: dict[str, Any]) -> Case:
    """The case of a draft."""
    w = f.round(np.asarray(draft.w, dtype=float))
    rates = draft.lr if isinstance(draft.lr, tuple) else (draft.lr,)
    gradients = f.round(np.asarray(draft.g, dtype=float)).reshape((len(rates), *w.shape))
    steps = tuple(Step(g, float(lr)) for g, lr in zip(gradients, rates, strict=True))
    state = None if draft.state is None else kept(rule, settings, draft.state)
    return Case(
        number, draft.comment, draft.flags, rule, f.name, settings, w, steps,
        state=state, kind=draft.kind, result=draft.result, layout=draft.layout,
        neighbour=draft.neighbour, generated=draft.generated,
    )  # fmt: skip


def kept(rule: str, settings: dict[str, Any], state: Slots) -> Slots:
    """What the rule keeps of a state under these settings."""
    slots = {"step", *RULES[rule](lr=0.0, **settings).slot_shapes}
    return {name: value for name, value in state.items() if name in slots}
