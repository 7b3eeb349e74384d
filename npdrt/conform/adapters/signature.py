"""How a library's optimizer takes npdrt's settings, read from its signature."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from npdrt.conform.rules import LibraryOptimizer
from npdrt.conform.rules.rule import Settings
from npdrt.errors import Error
from npdrt.optim import RULES

RATES = ("lr", "learning_rate", "step_size")  # what the learning rate is called
# setting -> what it is called elsewhere; of several numbers, one argument each
NAMES: dict[str, tuple[tuple[str, ...], ...]] = {
    "betas": (("betas",), ("b1", "b2"), ("beta1", "beta2"), ("beta_1", "beta_2")),
    "eps": (("eps",), ("epsilon",)),
    "alpha": (("alpha",), ("rho",)),
    "decoupled": (("decoupled",), ("weight_decouple",), ("decoupled_decay",)),
    "trust_coefficient": (("trust_coefficient",), ("trust_coeff",)),
    "norm_bound": (("norm_bound",), ("p_bound",)),
}
SETTINGS = tuple(dict.fromkeys(n for rule in RULES.values() for n in rule.settings if n != "lr"))


@dataclass(frozen=True)
class Signature:
    """The keyword arguments of a function or a class.

    needed: argument -> whether it has no default. every: whether it takes any other, too.
    """

    needed: dict[str, bool]
    every: bool

    @property
    def rate(self) -> str:
        """The name of the learning rate; "" if it takes none."""
        return next((name for name in RATES if name in self.needed), "")


def signature_of(make: Any, first: int = 0) -> Signature:
    """The signature after `first` arguments. A class that takes **others passes them on, so it
    takes what its bases take."""
    if not isinstance(make, type):
        return _of_one(make, first)
    found = Signature({}, True)
    for kind in make.__mro__:
        if not found.every:
            break
        if "__init__" in vars(kind) and kind is not object:
            own = _of_one(vars(kind)["__init__"], first + 1)
            found = Signature({**own.needed, **found.needed}, own.every)
    return found


def _of_one(make: Any, first: int) -> Signature:
    parameters = list(inspect.signature(make).parameters.values())[first:]
    several = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    needed = {p.name: p.default is p.empty for p in parameters if p.kind not in several}
    return Signature(needed, any(p.kind is p.VAR_KEYWORD for p in parameters))


def fitted(
    known: LibraryOptimizer, signature: Signature, overrides: Mapping[str, Any]
) -> LibraryOptimizer:
    """`known` with the settings that the signature has, if it does not say itself which. A setting
    whose argument the user gives is not one of them. Raises `Error` if there is no learning rate,
    or if the user gives an argument that the optimizer lacks."""
    if not signature.rate:
        raise Error(f"{known.name} takes no learning rate; expected one of {', '.join(RATES)}")
    for key in overrides:
        if key not in signature.needed and not signature.every:
            raise Error(f"{known.name} has no {key!r}; it has {', '.join(signature.needed)}")
    if known.offers is not None:
        return known
    free = signature.needed.keys() - overrides.keys()
    ways = {name: NAMES.get(name, ((name,),)) for name in SETTINGS}
    found = {name: way for name in SETTINGS for way in ways[name] if free >= {*way}}

    def arguments(settings: Settings) -> Settings:
        taken: Settings = {}
        for name, value in settings.items():
            way = found[name]
            taken |= {way[0]: value} if len(way) == 1 else dict(zip(way, value, strict=True))
        return taken

    return replace(known, offers=tuple(found), arguments=arguments)


def required(known: LibraryOptimizer, signature: Signature) -> frozenset[str]:
    """The settings that have no default."""
    ways = {name: NAMES.get(name, ((name,),)) for name in known.offers or ()}
    return frozenset(
        name for name, several in ways.items()
        if any(signature.needed.get(argument) for way in several for argument in way)
    )  # fmt: skip
