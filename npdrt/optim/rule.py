"""An update rule and its description: everything that lists rules or settings reads it here.

A rule is one file, `npdrt/optim/<name>.py`, with a function of that name:

    @rule(default_rate=0.1, slots={"momentum": "the velocity"})
    def heavy_ball(
        *, lr: float, momentum: Annotated[float, Setting("share that is kept", below_one)] = 0.9
    ) -> Formula:
        "The equations, what happens at zero and at NaN, the source."
        return Formula(partial(update, momentum=momentum), slots)

The signature is the description: `npdrt.optim.RULES`, the options of the commands and their help,
the names and values that a configuration may have, and the referee's lists all come from it. The
decorator checks every setting, so the function gets numbers of Python in their ranges, and makes an
`Optimizer` of the formula that it returns. A file in `npdrt/optim` is found by itself.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Generic, NamedTuple, ParamSpec, get_args, get_type_hints

from npdrt.arrays import Array
from npdrt.errors import Error
from npdrt.optim.optimizer import Optimizer, Slots, no_slots
from npdrt.optim.setting import Setting, at_least_zero

P = ParamSpec("P")


class Formula(NamedTuple):
    """A rule's arithmetic with its settings filled in: the fields of `Optimizer` of these names.

    rule(w, g, slots, shared, lr) returns the new w and its new slots; slots(w) makes the slots of
    one array; powers: shared values that are multiplied by their factor before every step.
    """

    rule: Callable[[Array, Array, Slots, Slots, Array], tuple[Array, Slots]]
    slots: Callable[[Array], Slots] = no_slots
    powers: Mapping[str, float] | None = None


class Rule(Generic[P]):
    """An update rule: call it with its settings to get an `Optimizer`.

    name: its name in `npdrt.optim.RULES`. settings: name -> `Setting` of every setting but lr, in
    the order of the signature. default_rate: the learning rate that "auto" stands for. slots:
    name -> meaning of the state that the rule can keep for an array; some settings need none.
    layerwise: whether the step of an array depends on its norm. relative: whether lr is the size
    of the step relative to the norm of the array. note: what the rule is, for the help of commands,
    if its name does not say it. defaults: name -> default of `settings`.
    """

    def __init__(
        self, make: Callable[P, Formula], default_rate: float | None, slots: Mapping[str, str],
        *, layerwise: bool, relative: bool, note: str,
    ):  # fmt: skip
        functools.update_wrapper(self, make)
        self._make: Callable[..., Formula] = make
        self.name = make.__name__
        self.slots, self.layerwise, self.relative = dict(slots), layerwise, relative
        self.note = note
        signature = inspect.signature(make)
        self.__signature__ = _plain(signature, get_type_hints(make))
        own = {name: p for name, p in signature.parameters.items() if name != "lr"}
        hints = get_type_hints(make, include_extras=True)
        self.settings = {name: _described(self.name, p, hints[name]) for name, p in own.items()}
        self.defaults = {name: setting.default for name, setting in self.settings.items()}
        rate = signature.parameters["lr"].default
        self._given = {**({} if rate is inspect.Parameter.empty else {"lr": rate}), **self.defaults}
        self.default_rate: float = default_rate or self._given.get("lr", 0.0)
        if not self.default_rate > 0:
            raise Error(f"rule {self.name}: lr has no default; give @rule a default_rate > 0")

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Optimizer:
        """The optimizer with these settings. Raises `Error` for a value outside its range."""
        given: dict[str, Any] = {**self._given, **kwargs}
        settings = {"lr": at_least_zero("lr", given["lr"])} if "lr" in given else {}
        settings |= {name: s.checked(name, given[name]) for name, s in self.settings.items()}
        return Optimizer(self.name, settings, *self._make(*args, **{**given, **settings}))

    def __repr__(self) -> str:
        return f"{self.name}{self.__signature__}"

    def __reduce__(self) -> str:
        return self.name  # pickled by its name, as a function is


def rule(
    *,
    default_rate: float | None = None,
    slots: Mapping[str, str] | None = None,
    layerwise: bool = False,
    relative: bool = False,
    note: str = "",
) -> Callable[[Callable[P, Formula]], Rule[P]]:
    """Make a `Rule` of a function from settings to a `Formula`.

    default_rate: the default of lr in the signature unless given. The others: see `Rule`.
    """
    return lambda make: Rule(
        make, default_rate, slots or {},
        layerwise=layerwise or relative, relative=relative, note=note,
    )  # fmt: skip


def _described(rule: str, parameter: inspect.Parameter, annotation: Any) -> Setting:
    """The `Setting` in `Annotated[type, Setting(...)] = default`, with the type and the default."""
    match get_args(annotation):
        case kind, Setting() as setting if parameter.default is not parameter.empty:
            return replace(setting, type=kind, default=parameter.default)
    raise Error(
        f"rule {rule}: expected `{parameter.name}: Annotated[type, Setting(help, check)] = default`"
        f" in its signature; got `{parameter}`"
    )


def _plain(signature: inspect.Signature, hints: Mapping[str, Any]) -> inspect.Signature:
    """The signature that a reader sees: types without their `Setting`, and what a call returns."""
    parameters = [p.replace(annotation=hints[name]) for name, p in signature.parameters.items()]
    return signature.replace(parameters=parameters, return_annotation=Optimizer)
