"""The optimizer: an update rule for one array, applied to every array of a dict."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from npdrt.arrays import Array, Params, check_params, namespace, number, phase, quiet, scalar
from npdrt.errors import Error
from npdrt.optim.setting import at_least_zero

Slots = dict[str, Array]


def no_slots(w: Array) -> Slots:
    """The state of a rule that keeps none for an array."""
    return {}


class Updater(Protocol):
    """What training asks of an optimizer: an `Optimizer`, a function's, or several in groups."""

    @property
    def name(self) -> str:
        """The rule's name."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """Every setting, "lr" included."""

    def init(self, params: Params) -> dict[str, Array]:
        """The state before the first step; "step" in it counts steps."""

    def started(self, params: Params) -> dict[str, Array]:
        """A state of the names and forms that follow the first step."""

    def update(
        self, params: Params, grads: Params, state: dict[str, Array], *, lr: Any = None
    ) -> tuple[Params, dict[str, Array]]:
        """New parameters and new state after one step."""


@dataclass(frozen=True)
class Optimizer:
    """An update rule with its settings. Pure: `init` and `update` never write to arguments.

    name: the rule's name. settings: every setting, "lr" included. rule(w, g, slots, shared, lr)
    returns the new w and its new slots. slots(w) makes the slots of one array before the first
    step. powers: shared 0-d float64 values that start at 1 and are multiplied by their factor
    before every step (Adam's beta powers). `shared` holds them and "step", the number of updates
    made before this one.
    """

    name: str
    settings: Mapping[str, Any]
    rule: Callable[[Array, Array, Slots, Slots, Array], tuple[Array, Slots]]
    slots: Callable[[Array], Slots] = no_slots
    powers: Mapping[str, float] | None = None

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in self.settings.items())
        return f"Optimizer({self.name}: {settings})"

    def init(self, params: Params) -> dict[str, Array]:
        """The state before the first step: flat, "<parameter>/<slot>", and 0-d "step".

        Raises `Error` if params is not a dict, or a parameter is not real floating-point.
        """
        check_params(params)
        state: dict[str, Array] = {}
        for name, w in params.items():
            if not namespace(w).isdtype(w.dtype, "real floating"):
                raise Error(f"{name}: expected a real floating-point parameter; got {w.dtype}")
            with quiet():
                slots = self.slots(w)
            state.update({f"{name}/{slot}": value for slot, value in slots.items()})
        for name in self.powers or {}:
            state[name] = scalar(1.0, first(params))
        state["step"] = step_count(params)
        return state

    def started(self, params: Params) -> dict[str, Array]:
        """A state of the names and forms that follow the first step: those of `init`."""
        return self.init(params)

    def update(
        self, params: Params, grads: Params, state: dict[str, Array], *, lr: Any = None
    ) -> tuple[Params, dict[str, Array]]:
        """New parameters and new state after one step.

        lr: a number or 0-d array that takes the place of the setting for this step. Arithmetic
        follows IEEE without warnings; the docstring of each rule says what a NaN or inf does.

        Raises `Error` where names, shapes or dtypes of params, grads and state do not fit.
        """
        check_fit(params, grads)
        new_params: Params = {}
        new_state: dict[str, Array] = {}
        with quiet(), phase("update"):
            rate = scalar(checked_rate(self.settings["lr"] if lr is None else lr), first(params))
            shared = {n: self._take(state, n) * f for n, f in (self.powers or {}).items()}
            shared["step"] = self._take(state, "step")
            for name, w in params.items():
                slots = {s: self._slot(state, f"{name}/{s}", w) for s in self.slot_shapes}
                new_params[name], slots = self.rule(w, grads[name], slots, shared, rate)
                new_state.update({f"{name}/{s}": value for s, value in slots.items()})
            shared["step"] = shared["step"] + 1
        return new_params, {**new_state, **shared}

    @cached_property
    def slot_shapes(self) -> dict[str, tuple[int, ...]]:
        """Slot -> shape for an array of shape (1,); shape () is a 0-d float64 for any array."""
        return {slot: value.shape for slot, value in self.slots(np.zeros(1)).items()}

    def _slot(self, state: dict[str, Array], name: str, w: Array) -> Array:
        value, per_element = self._take(state, name), self.slot_shapes[name.rpartition("/")[2]]
        shape, dtype = (w.shape, w.dtype) if per_element else ((), namespace(w).float64)
        if tuple(value.shape) != tuple(shape) or value.dtype != dtype:
            expected = f"{dtype}{tuple(shape)}" if per_element else "0-d float64"
            raise Error(
                f"{name}: expected {expected} in the state; got {value.dtype}{tuple(value.shape)}"
            )
        return value

    def _take(self, state: dict[str, Array], name: str) -> Array:
        if name not in state:
            raise Error(f"{self.name}: the state has no {name!r}; make it with init(params)")
        return state[name]


def representable(rate: Array, w: Array, otherwise: Array) -> Array:
    """`rate` where it is not above the largest number of the dtype of `w`, else `otherwise`.

    A gradient so small that the rate which scales it up would be infinite counts as zero.
    """
    xp = namespace(w)
    return xp.where(rate <= float(xp.finfo(w.dtype).max), rate, otherwise)


def step_count(params: Params) -> Array:
    """The number of steps before the first, on the device of the parameters; 0-d int64."""
    xp = namespace(first(params))
    return xp.asarray(0, dtype=xp.int64)


def first(params: Params) -> Array:
    """A parameter, which says where all of them are. Raises `Error` if there is none."""
    if not params:
        raise Error("an optimizer needs at least one parameter; got an empty dict")
    return next(iter(params.values()))


def check_fit(params: Params, grads: Params) -> None:
    """Raise `Error` unless parameters and gradients have the same names, shapes and dtypes."""
    if params.keys() != grads.keys():
        odd = sorted(params.keys() ^ grads.keys())
        raise Error(f"params and grads differ in names: {', '.join(odd[:5])}")
    for name, w in params.items():
        g = grads[name]
        if tuple(w.shape) != tuple(g.shape) or w.dtype != g.dtype:
            raise Error(
                f"{name}: the parameter is {w.dtype}{tuple(w.shape)}, "
                f"its gradient {g.dtype}{tuple(g.shape)}"
            )


def checked_rate(lr: Any) -> Any:
    """A number as `at_least_zero` gives it. Of an array only the shape is checked: its value may be
    on a device, or unknown while a program is recorded."""
    lr = number(lr)
    if not hasattr(lr, "shape"):
        return at_least_zero("lr", lr)
    if tuple(lr.shape) != ():
        raise Error(f"lr must be a number or a 0-d array; got shape {tuple(lr.shape)}")
    return lr
