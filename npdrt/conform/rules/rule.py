"""What the referee knows of a rule, as one record, and the clauses that rules share.

A rule is a list of clauses (the place of epsilon, the step at a zero norm, ...). The first
alternative of a clause is the published one; the others exist somewhere, or are mistakes. A dialect
is a name, a source and the choices in which it differs from the published rule.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from npdrt.conform.case import Slots
from npdrt.conform.cases import Draft, Drawer
from npdrt.conform.formats import Format

Choices = Mapping[str, str]  # clause -> alternative, if it is not the published one
Clauses = Mapping[str, Mapping[str, str]]  # clause -> alternative -> explanation
Settings = dict[str, Any]  # npdrt's settings; those of `step` with "lr", "sign" and "kind"

# Clauses that every rule has. The first alternative of each is the published one.
COMMON: dict[str, dict[str, str]] = {
    "direction": {
        "descent": "the step is subtracted",
        "ascent": "the step is added",
    },
    "learning rate precision": {
        "float64": "rounded once, to the tensor's dtype",
        "float32": "rounded to float32 first",
        "float16": "rounded to float16 first",
        "bfloat16": "rounded to bfloat16 first",
    },
    "learning rate of": {
        "this step": "the rate given with the gradient",
        "the step before": "the rate given with the gradient before; the first step has its own",
        "the first step": "later rates are ignored",
        "the first group": "that of the optimizer's first group, for every group",
    },
    "operands": {
        "by their strides": "element by element, wherever they lie in memory",
        "as if contiguous": "as if the arrays were contiguous in C order",
    },
}
# Of the rules in which the sign of the gradient is not that of the step.
MAXIMIZED: dict[str, dict[str, str]] = {
    "direction": {
        **COMMON["direction"],
        "of the negated gradient": "-g takes the place of g (maximize in PyTorch)",
    },
}


RESETS = ("reset every {} steps", "arrays reset every {} steps")


class States(dict[str, str]):
    """The alternatives of the clause "state"; those of RESETS, for every number of steps, are not
    listed."""

    def __missing__(self, how: str) -> str:
        if not (every := period(how)):
            raise KeyError(how)
        return f"forgotten every {every} steps{', but its count' if how.startswith('a') else ''}"


def period(how: str) -> int:
    """The number of steps of an alternative in RESETS; 0 of another."""
    found = re.fullmatch(r"(?:arrays )?reset every (\d+) steps", how)
    return int(found[1]) if found else 0


# Clauses of the rules that have a state.
STATE: dict[str, dict[str, str]] = {
    "state": States(
        {
            "of each tensor": "kept from step to step, for every tensor apart",
            "shared": "one state for all tensors of an optimizer",
            "lost": "forgotten after every step",
        }
    ),
    "missing gradient": {
        "skipped": "a tensor without a gradient makes no step; its state stays, too",
        "a step of zeros": "as if its gradient were 0",
    },
}
# Clauses of the rules whose steps depend on their number t.
COUNTING: dict[str, dict[str, str]] = {
    **STATE,
    "missing gradient": {
        **STATE["missing gradient"],
        "counted": "the tensor makes no step, but t counts it",
    },
}
# Clauses of the rules that take norms.
ADAPTS: dict[str, str] = {  # which arrays take a ratio of norms (`evaluate.skips`)
    "always": "every array is a layer",
    "only with weight decay": "r = 1 where wd is 0",
    "matrices only": "1-d arrays take r = 1 and no decay",
    "no biases": "arrays named bias take r = 1 and no decay",
}
NORMS: dict[str, dict[str, str]] = {
    "norm of": {
        "tensor": "all elements of the array",
        "row": "each row (first axis) on its own",
        "column": "each column (last axis) on its own",
        "1-norm": "sum of absolute values",
        "first 1024 elements": "the first 1,024 elements of the array",
        "first 65536 elements": "the first 65,536 elements of the array",
    },
    "norm accumulation": {
        "wide": "the sum of squares neither overflows nor underflows",
        "dtype": "squares and their sum in the tensor's dtype",
        "dtype, guarded": "the same, and rates that are not finite are replaced",
    },
    "norm format": {
        "of the tensor or wider": "squares and sums are as wide as the tensor, or wider",
        "float16, at the end": "the norm is rounded to float16",
        "float16": "elements, squares and their sum in float16",
    },
}
PROFILES = ("norm accumulation", "precision")  # arithmetic, not rule
BLOCKS = {"first 1024 elements": 1024, "first 65536 elements": 65536}


@dataclass(frozen=True)
class Dialect:
    """A named way to write a rule.

    source: where you can read it. choices: where it differs from the published rule. scope: false
    if it is another rule, which the referee recognises and does not judge (AMSGrad).
    """

    name: str
    source: str
    choices: Choices
    note: str = ""
    scope: bool = True


@dataclass(frozen=True)
class LibraryOptimizer:
    """An optimizer of a library that is a form of the rule."""

    name: str  # "torch.optim.SGD", "optax.sgd"
    offers: tuple[str, ...] | None = None  # the settings that it takes, by npdrt's names; None if
    # npdrt reads them, with `arguments`, in its signature (npdrt.conform.adapters.signature)
    fixed: Mapping[str, Any] = field(default_factory=dict)  # settings of which it has one value
    arguments: Callable[[Settings], Settings] = dict  # settings -> its keyword arguments
    slots: Mapping[str, str] = field(default_factory=dict)  # slot -> its name
    mask: str = ""  # its argument that says which tensors decay
    velocity: float = 1.0  # -1 if its "momentum" points the other way than npdrt's
    dimensions: int | None = None  # of the tensors that it takes, if not any
    interpreted: bool = False  # JAX runs it call by call: it would compile its loop at every step

    @property
    def settings(self) -> frozenset[str]:
        """The settings of npdrt that it has, including those of one value."""
        return frozenset((*(self.offers or ()), *self.fixed))


@dataclass(frozen=True)
class Generated:
    """Settings for the cases that are too large for the files (`npdrt.conform.generated`)."""

    settings: Settings
    steps: int | None = None  # only the cases of so many steps
    plainer: bool = False  # for implementations that lack a richer setting
    added: int = 0  # the round in which it joined the vectors, if later than its rule


@dataclass(frozen=True)
class Rule:
    """Everything that the referee knows of a rule."""

    name: str  # as in npdrt.optim.RULES
    added: int  # round in which it joined the vectors: tests are numbered round by round, so a
    # new rule takes the next round, and the tests of the others keep their numbers

    # docs/updates.md in plain Python, with the arithmetic of npdrt.conform.page and nothing else:
    # page(w, g, state, lr, dtype, norms, **settings) returns w and changes `state`; that of a rule
    # that is `shaped` also takes shape
    page: Callable[..., list[float]]

    # step(c, w, g, slots, h, a) is one update under the full choices c, in real arithmetic: it
    # returns (w, slots, scale), where scale is the size of the operands of the last sum
    clauses: Clauses
    step: Callable[..., tuple[Any, Slots, Any]]
    dialects: tuple[Dialect, ...]  # the published rule first

    # the accepted error of a step, in ulps at `scale`: one for each operation, in any order; the
    # error of two norms is added to it
    ulps: float

    asked: tuple[Settings, ...]  # settings of the cases: the plainest first, the richest second
    generated: tuple[Generated, ...]  # the richest first

    published: Choices = field(default_factory=dict)  # if not the first alternative of each clause
    slots: tuple[str, ...] = ()  # the array slots
    remembers: Callable[[Mapping[str, Any]], str] = lambda settings: ""  # in words: "a velocity"
    # formats in which rounded scalars count, so that generated cases need the scale of `step`
    scales_by_operands: tuple[str, ...] = ()

    # a state after `step` updates of a parameter of shape (2, 3), zeros if size is 0, and the
    # scalars that belong to it
    start: Callable[[Drawer, int, float], Slots] = lambda draw, step, size: {"step": step}
    scalars: Callable[[int, Mapping[str, Any]], Slots] = lambda step, settings: {}
    edges: Callable[[Format, Drawer], Iterator[Draft]] = lambda number, draw: iter(())  # its own
    later: Callable[[Drawer], Iterator[Draft]] = lambda draw: iter(())  # those added afterwards
    apart: tuple[str, ...] = ()  # settings that exclude the richest: asked in generated cases too

    optimizers: tuple[LibraryOptimizer, ...] = ()
    shaped: bool = False  # a step depends on the shape, and its page takes it
    matrices: bool = False  # sources define it for two dimensions and more alone
    group: Settings = field(default_factory=dict)  # what a group of PyTorch's says to ask for it
    ablation: bool = False  # nobody sets out to write it, so it is suspected last

    @property
    def takes_norms(self) -> bool:
        """Whether a step depends on the norms of the parameter and the gradient."""
        return {"norm of", "norm accumulation"} <= self.clauses.keys()

    def accumulates(self, settings: Mapping[str, Any]) -> bool:
        """Whether a step depends on the gradients before it."""
        return bool(self.slots and self.remembers(settings))

    def full(self, choices: Choices) -> dict[str, str]:
        """Every clause with its alternative; what `choices` leaves out is as published."""
        first = {clause: next(iter(options)) for clause, options in self.clauses.items()}
        return {**first, **self.published, **choices}

    def differences(self, choices: Choices) -> dict[str, str]:
        """The clauses in which `choices` are not the published rule."""
        published = self.full({})
        return {k: v for k, v in self.full(choices).items() if v != published[k]}


# --- rules with a velocity ------------------------------------------------------------------------


def keeps_velocity(settings: Mapping[str, Any]) -> str:
    """`Rule.remembers` of a rule whose one slot is "momentum"."""
    return "a velocity" if settings.get("momentum") else ""


def given_velocity(draw: Drawer, step: int, size: float) -> Slots:
    """`Rule.start` of a rule whose one slot is "momentum"."""
    return {"momentum": draw("velocity", 2, 3, size=size), "step": step}
