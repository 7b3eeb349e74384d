"""Your own rule as a function of one array, and as an optimizer.

    def update(w, g, state, *, lr=0.01, decay=0.0):
        return w - lr * (g + decay * w), state

This is the protocol of the audit (docs/audit-protocol.md), so that the function that is trained is
the one that is audited. `as_rule(update, "update")(lr=0.1)` is its optimizer.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from npdrt.arrays import Array, Params, check_params, namespace, number, phase, quiet, readonly
from npdrt.errors import Error
from npdrt.optim.optimizer import Updater, check_fit, checked_rate, step_count
from npdrt.optim.rule import Rule

OURS = ("lr", "name", "step")  # keywords of the protocol that are not settings
SHARED = "shared"  # where the one state of a function that takes `name` is kept


@dataclass(frozen=True)
class FunctionOptimizer:
    """The optimizer of a function `update(w, g, state, *, lr, ...)` that returns (w, state).

    settings: its keyword arguments, "lr" included. takes: which of "name" (of the parameter) and
    "step" (the steps made before) it is given. A function that takes the name has one state for
    all parameters, any other one for each. The state is {} before the first step. It holds arrays
    and numbers: an array of no dimension comes back as a number of Python.
    """

    name: str
    settings: Mapping[str, Any]
    function: Callable[..., Any]
    takes: frozenset[str] = frozenset()

    def init(self, params: Params) -> dict[str, Array]:
        """The state before the first step: "step" alone."""
        check_params(params)
        return {"step": step_count(params)}

    def started(self, params: Params) -> dict[str, Array]:
        """A state of the names and forms that follow the first step: that of a step on ones."""
        ones = {name: namespace(w).ones_like(w) for name, w in params.items()}
        return self.update(ones, ones, self.init(params))[1]

    def update(
        self, params: Params, grads: Params, state: dict[str, Array], *, lr: Any = None
    ) -> tuple[Params, dict[str, Array]]:
        """New parameters and new state after one step; lr: instead of the setting, for this step.

        Raises `Error` where names, shapes or dtypes of params and grads do not fit, or where the
        function returns anything but (w, state) with a w of the old shape and dtype.
        """
        check_fit(params, grads)
        given = {**self.settings, "lr": checked_rate(self.settings["lr"] if lr is None else lr)}
        if "step" in self.takes:
            given["step"] = _of_python(state["step"], f"{self.name}: step")
        new_params: Params = {}
        new_state: dict[str, Array] = {}
        shared = "name" in self.takes
        with quiet(), phase("update"):
            own = self._slots(state, SHARED)
            for name, w in params.items():
                own = own if shared else self._slots(state, name)
                more = {"name": name} if shared else {}
                result = self.function(readonly(w), readonly(grads[name]), own, **given, **more)
                new_params[name], own = self._checked(result, w, name)
                home, xp = SHARED if shared else name, namespace(w)
                kept = {} if shared else new_state  # one state for all: the last is the newest
                new_state = kept | {f"{home}/{slot}": xp.asarray(x) for slot, x in own.items()}
            steps = state["step"] + 1
        self._check_names(state, new_state, params)
        return new_params, {**new_state, "step": steps}

    def _slots(self, state: Mapping[str, Array], home: str) -> dict[str, Any]:
        """The state that the function is given, under its own names."""
        own = {key[len(home) + 1 :]: x for key, x in state.items() if key.startswith(f"{home}/")}
        return {
            slot: readonly(x) if x.shape else _of_python(x, f"{self.name}: state[{slot!r}]")
            for slot, x in own.items()
            if home == SHARED or "/" not in slot  # else it is of a parameter below this name
        }

    def _checked(self, result: Any, w: Array, name: str) -> tuple[Array, dict[str, Any]]:
        """What a call returned, or `Error` if it breaks the protocol."""
        what = f"{self.name}, {name}"
        match result:
            case (new, dict(slots)):
                pass
            case _:
                raise Error(f"{what}: expected (w, state); got {type(result).__name__}")
        found = (getattr(new, "shape", None), getattr(new, "dtype", None))
        if found != (w.shape, w.dtype):
            got = f"{found[1]}{list(found[0])}" if found[0] is not None else type(new).__name__
            raise Error(f"{what}: expected a w of {w.dtype}{list(w.shape)}; it returned {got}")
        for slot, value in slots.items():
            if not isinstance(slot, str) or ("/" in slot and "name" not in self.takes):
                raise Error(f"{what}: {slot!r} in the state is not a name without /")
            if not isinstance(value, bool | int | float) and not hasattr(value, "dtype"):
                raise Error(
                    f"{what}: state[{slot!r}] is a {type(value).__name__}; a state that is trained "
                    "holds arrays and numbers"
                )
        return new, slots

    def _check_names(
        self, before: Mapping[str, Array], after: Mapping[str, Array], params: Params
    ) -> None:
        """Refuse a state that gets or loses names after the first step: a checkpoint of it could
        not be told from one of another rule."""
        if "name" in self.takes:  # one state: the networks of a step add their names in turn
            odd = sorted({k for k in before if k.startswith(f"{SHARED}/")} - after.keys())
        else:
            own = {key for key in before if key.rpartition("/")[0] in params}
            odd = sorted(own ^ after.keys()) if own else []
        if odd:
            raise Error(f"{self.name}: {', '.join(odd[:3])} is in the state only after some steps; "
                        "return every name from the first step on")  # fmt: skip


def shared_state(state: Mapping[str, Array]) -> dict[str, Array]:
    """What functions that take `name` keep for all parameters: where a step updates several
    networks in turn, each goes on from what the one before left."""
    return {key: x for key, x in state.items() if f"/{SHARED}/" in f"/{key}"}


def _of_python(x: Array, what: str) -> Any:
    """The number in an array of no dimension."""
    try:
        return x.item()
    except Error as error:
        raise Error(f"{what} is a number of Python, and a program keeps no numbers") from error


# --- from what a file has to a rule ---------------------------------------------------------------


@dataclass(frozen=True)
class OwnRule:
    """A rule that somebody else wrote: call it with its settings, as a `Rule`, for its optimizer.

    settings: their names, None if it takes any. default_rate: that of its signature, or None.
    """

    name: str
    make: Callable[..., Any]
    settings: tuple[str, ...] | None
    default_rate: float | None
    relative: bool = False

    def __call__(self, **settings: Any) -> Updater:
        """The optimizer. Raises `Error` if a factory returns anything else."""
        lists = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}
        made = self.make(**lists)
        if not hasattr(made, "init") or not hasattr(made, "update"):
            raise Error(
                f"{self.name}: expected it to return an npdrt.optim.Optimizer; it returned "
                f"{type(made).__name__}. A rule is update(w, g, state, *, lr, ...), or a function "
                "of lr and its settings that returns an Optimizer"
            )
        optimizer: Updater = made
        return optimizer


def as_rule(found: Callable[..., Any], name: str) -> Rule[...] | OwnRule:
    """The rule that a callable is: a `Rule`, a function `update(w, g, state, *, lr, ...)`, or a
    factory, a function of lr and settings that returns an `Optimizer`."""
    if isinstance(found, Rule):
        return found
    if is_factory(found):
        names, every = keywords(found, name, first=0)
        make = found
    else:
        names, every = keywords(found, name)
        make = _maker(found, name, frozenset(names) & {"name", "step"})
    known = None if every else tuple(n for n in names if n not in OURS or is_factory(found))
    settings = None if known is None else tuple(n for n in known if n != "lr")
    return OwnRule(name, make, settings, default_rate(found))


def is_factory(found: Callable[..., Any]) -> bool:
    """Whether a callable is called with lr and settings, and not with w, g and state."""
    if isinstance(found, Rule):
        return True
    try:
        parameters = inspect.signature(found).parameters.values()
    except (TypeError, ValueError):
        return False
    needed = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    several = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    return not several and sum(p.default is p.empty and p.name != "lr" for p in needed) == 0


def default_rate(found: Callable[..., Any]) -> float | None:
    """The default of lr in a signature."""
    parameter = inspect.signature(found).parameters.get("lr")
    value = number(parameter.default) if parameter is not None else None
    return float(value) if isinstance(value, int | float) else None


def _maker(function: Callable[..., Any], name: str, takes: frozenset[str]) -> Callable[..., Any]:
    return lambda **settings: FunctionOptimizer(name, settings, function, takes)


def keywords(update: Any, name: str, *, first: int = 3) -> tuple[dict[str, bool], bool]:
    """Keyword -> whether it has no default, and whether any other is taken too.

    first: how many arguments come before them. Raises `Error` if the callable cannot be called so.
    """
    form = f"{name}(w, g, state, *, lr, ...)" if first else f"{name}(*, lr, ...)"
    try:
        parameters = list(inspect.signature(update).parameters.values())
    except (TypeError, ValueError) as error:
        raise Error(f"{name}: Python cannot tell its arguments; wrap it as {form}") from error
    placed = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    every = any(p.kind is p.VAR_KEYWORD for p in parameters)
    more = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    rest = [p for p in parameters if p.kind is p.KEYWORD_ONLY or p in placed[first:]]
    names = {p.name: p.default is p.empty for p in rest if p.kind is not p.POSITIONAL_ONLY}
    fits = (len(placed) >= first or more) and ("lr" in names or every)
    if not fits or any(
        p.kind is p.POSITIONAL_ONLY and p.default is p.empty for p in placed[first:]
    ):
        shown = inspect.signature(update)
        raise Error(f"{name}{shown} does not fit the protocol: it is called as {form}")
    return names, every
