"""Learning-rate schedules: frozen values, called as `schedule(step) -> float`.

`schedule.observe(metric)` returns the schedule after an evaluation; only `ReduceOnPlateau` changes
there, and what it remembers are its own fields, so a checkpoint stores the schedule by its fields.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from npdrt.arrays import plain
from npdrt.errors import Error
from npdrt.optim.setting import at_least_zero


@dataclass(frozen=True)
class Schedule:
    """A constant learning rate, and the base of the other schedules.

    lr: the rate at step 0. Steps count from 0.
    """

    lr: float

    def __post_init__(self) -> None:
        for field in fields(self):  # a rate is a float, whatever the settings are
            object.__setattr__(self, field.name, plain(getattr(self, field.name)))
        at_least_zero("lr", self.lr)

    def __call__(self, step: int) -> float:
        """The learning rate of training step `step`."""
        return self.lr

    def observe(self, metric: float) -> Schedule:
        """The schedule after an evaluation whose loss was `metric`."""
        return self

    def memory(self) -> dict[str, float | None]:
        """The fields that `observe` changes, for a checkpoint."""
        return {}

    def with_memory(self, memory: Mapping[str, Any]) -> Schedule:
        """The schedule with the fields that `memory` gave."""
        return replace(self, **memory)


@dataclass(frozen=True)
class Exponential(Schedule):
    """lr * factor**epoch with epoch = step // steps_per_epoch.

    A product, not a power function, whose last bit is not the same everywhere.
    """

    factor: float
    steps_per_epoch: int

    def __call__(self, step: int) -> float:
        """The learning rate of training step `step`."""
        return math.prod([self.factor] * (step // self.steps_per_epoch), start=self.lr)


@dataclass(frozen=True)
class Milestones(Schedule):
    """lr times `factor` once for every milestone (a step number) reached."""

    factor: float
    milestones: tuple[int, ...]

    def __call__(self, step: int) -> float:
        """The learning rate of training step `step`."""
        reached = sum(step >= m for m in self.milestones)
        return math.prod([self.factor] * reached, start=self.lr)


@dataclass(frozen=True)
class Linear(Schedule):
    """A straight line from lr at step 0 to `end` at step `steps`, then `end`."""

    steps: int
    end: float = 0.0

    def __call__(self, step: int) -> float:
        """The learning rate of training step `step`."""
        return self.lr + (self.end - self.lr) * (min(step, self.steps) / self.steps)


@dataclass(frozen=True)
class Cosine(Schedule):
    """Half a cosine from lr at step 0 to `end` at step `steps`, then `end`.

    end + (lr - end) (1 + cos(pi step / steps)) / 2, without restarts (Loshchilov and Hutter 2017,
    Equation 5). The cosine has 12 decimals, since its last bit is not the same everywhere.
    """

    steps: int
    end: float = 0.0

    def __call__(self, step: int) -> float:
        """The learning rate of training step `step`."""
        height = round(0.5 + 0.5 * math.cos(math.pi * min(step, self.steps) / self.steps), 12)
        return self.end + (self.lr - self.end) * height


@dataclass(frozen=True)
class Warmup(Schedule):
    """The rate of `then`, times (step + 1) / steps before step `steps` (Goyal et al. 2017)."""

    steps: int
    then: Schedule

    def __call__(self, step: int) -> float:
        """The learning rate of training step `step`."""
        return self.then(step) * min(1.0, (step + 1) / self.steps)

    def observe(self, metric: float) -> Warmup:
        """The schedule after an evaluation whose loss was `metric`."""
        return replace(self, then=self.then.observe(metric))

    def memory(self) -> dict[str, float | None]:
        """The fields that `observe` changes, for a checkpoint."""
        return self.then.memory()

    def with_memory(self, memory: Mapping[str, Any]) -> Warmup:
        """The schedule with the fields that `memory` gave."""
        return replace(self, then=self.then.with_memory(memory))


@dataclass(frozen=True)
class ReduceOnPlateau(Schedule):
    """lr times `factor` once more than `patience` evaluations in a row brought no lower loss.

    A loss counts as lower below best * (1 - threshold); NaN and inf never do. This is the
    counting of PyTorch's ReduceLROnPlateau, without its `eps`, below which it leaves a rate alone.
    best, waited and reductions are the memory.
    """

    factor: float = 0.1
    patience: int = 10
    threshold: float = 1e-4
    best: float | None = None
    waited: int = 0
    reductions: int = 0

    def __call__(self, step: int) -> float:
        """The learning rate of training step `step`."""
        return math.prod([self.factor] * self.reductions, start=self.lr)

    def observe(self, metric: float) -> ReduceOnPlateau:
        """The schedule after an evaluation whose loss was `metric`."""
        best = math.inf if self.best is None else self.best
        if metric < best * (1.0 - self.threshold):
            return replace(self, best=metric, waited=0)
        if self.waited >= self.patience:
            return replace(self, waited=0, reductions=self.reductions + 1)
        return replace(self, waited=self.waited + 1)

    def memory(self) -> dict[str, float | None]:
        """The fields that `observe` changes, for a checkpoint."""
        return {"best": self.best, "waited": self.waited, "reductions": self.reductions}


FORMS = (
    "constant | exponential:FACTOR | milestones:EPOCH,EPOCH,...:FACTOR | linear[:END] "
    "| cosine[:END] | plateau[:FACTOR[:PATIENCE]] | warmup:STEPS:FORM"
)


def schedule(form: str, *, lr: float, steps_per_epoch: int, steps: int) -> Schedule:
    """The schedule that a text such as "exponential:0.98" names; epochs are turned into steps.

    form: one of `FORMS`. steps: the length of the run, for "linear" and "cosine".

    >>> schedule("exponential:0.5", lr=1.0, steps_per_epoch=10, steps=100)(25)
    0.25
    """
    kind, *values = form.split(":")
    try:
        match kind, values:
            case "constant", []:
                return Schedule(lr)
            case "exponential", [factor]:
                return Exponential(lr, _positive(factor), steps_per_epoch)
            case "milestones", [epochs, factor]:
                at = tuple(int(epoch) * steps_per_epoch for epoch in epochs.split(","))
                return Milestones(lr, _positive(factor), at)
            case "linear", ([] | [_]) as end:
                ends = (at_least_zero("the end of a line", float(value)) for value in end)
                return Linear(lr, max(steps, 1), *ends)
            case "cosine", ([] | [_]) as end:
                ends = (at_least_zero("the end of a cosine", float(value)) for value in end)
                return Cosine(lr, max(steps, 1), *ends)
            case "warmup", [rise, name, *_] if name != "warmup":
                then = form.split(":", 2)[2]
                made = schedule(then, lr=lr, steps_per_epoch=steps_per_epoch, steps=steps)
                return Warmup(lr, _whole(rise), made)
            case "plateau", []:
                return ReduceOnPlateau(lr)
            case "plateau", [factor]:
                return ReduceOnPlateau(lr, _positive(factor))
            case "plateau", [factor, patience]:
                waits = int(at_least_zero("patience", int(patience)))
                return ReduceOnPlateau(lr, _positive(factor), waits)
    except ValueError as error:
        raise Error(f"schedule {form!r}: {error}; expected {FORMS}") from error
    raise Error(f"unknown schedule {form!r}; expected {FORMS}")


def _whole(text: str) -> int:
    if int(text) < 1:
        raise ValueError(f"a warm-up must be at least 1 step, got {text}")
    return int(text)


def _positive(text: str) -> float:
    value = float(text)
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"a factor must be a finite number > 0, got {text}")
    return value
