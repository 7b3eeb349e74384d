"""Several optimizers in one: each has the parameters whose names match its pattern."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from npdrt.arrays import Array, Params
from npdrt.errors import Error
from npdrt.optim.optimizer import Updater, check_fit, step_count


@dataclass(frozen=True)
class Groups:
    """The optimizer `rest`, but for the parameters that a pattern of `groups` names.

    The first pattern that matches decides; in a pattern, * stands for any text ("*/bias"). A rate
    that is given to `update` is that of `rest`; another group's is scaled by the same factor, so
    that one schedule moves all. The state is that of all optimizers; what the k-th group, from 1,
    shares among its parameters is under "groups/k/".
    """

    rest: Updater
    groups: Mapping[str, Updater]

    def __post_init__(self) -> None:
        rates = {float(part.settings["lr"]) for part in self.groups.values()}
        if not self.settings["lr"] and rates != {0.0}:
            raise Error("a group has a rate of its own, so lr must be above 0: rates are scaled "
                        "with it")  # fmt: skip

    @property
    def name(self) -> str:
        """The name of the rule of `rest`."""
        return self.rest.name

    @property
    def settings(self) -> Mapping[str, Any]:
        """The settings of `rest`."""
        return self.rest.settings

    def init(self, params: Params) -> dict[str, Array]:
        """The state before the first step. Raises `Error` if a pattern matches no parameter."""
        return self._states(params, "init")

    def started(self, params: Params) -> dict[str, Array]:
        """A state of the names and forms that follow the first step."""
        return self._states(params, "started")

    def update(
        self, params: Params, grads: Params, state: dict[str, Array], *, lr: Any = None
    ) -> tuple[Params, dict[str, Array]]:
        """New parameters and new state after one step; lr: that of `rest`, for this step."""
        check_fit(params, grads)
        new_params: Params = {}
        new_state: dict[str, Array] = {}
        for part, mark, own in self._parts(params):
            rate = lr if lr is None else self._rate(part, lr)
            given = _of_part(state, mark, own, params)
            made, kept = part.update(own, {name: grads[name] for name in own}, given, lr=rate)
            new_params |= made
            new_state |= _marked(kept, mark, own)
        return {name: new_params[name] for name in params}, new_state

    def _states(self, params: Params, make: str) -> dict[str, Array]:
        found: dict[str, Array] = {"step": step_count(params)}
        for part, mark, own in self._parts(params, whole=True):
            found |= _marked(getattr(part, make)(own), mark, own)
        return found

    def _rate(self, part: Updater, lr: Any) -> Any:
        """The rate of a part while that of `rest` is lr."""
        own, base = part.settings["lr"], self.settings["lr"]
        return lr if own == base else own * (lr / base) if base else own

    def _parts(self, params: Params, *, whole: bool = False) -> list[tuple[Updater, str, Params]]:
        """(optimizer, where its shared values are, its parameters); none without parameters.

        whole: these are all parameters, and not those of one network of a step.
        """
        chosen: dict[str, Params] = {pattern: {} for pattern in self.groups}
        rest: Params = {}
        for name, w in params.items():
            pattern = next((p for p in self.groups if fnmatchcase(name, p)), None)
            (rest if pattern is None else chosen[pattern])[name] = w
        for pattern, own in chosen.items():
            if whole and not own:
                raise Error(
                    f"the group {pattern!r} has no parameter, or an earlier group has them all; "
                    f"the parameters are {', '.join([*params][:8])}{', ...' * (len(params) > 8)}"
                )
        parts = [(self.rest, "", rest)]
        parts += [
            (self.groups[p], f"groups/{k}/", own) for k, (p, own) in enumerate(chosen.items(), 1)
        ]
        return [part for part in parts if part[2]]


def _of_part(
    state: Mapping[str, Array], mark: str, own: Params, params: Params
) -> dict[str, Array]:
    """The state of one part: the slots of its parameters, the values that they share, "step"."""
    found = {"step": state["step"]} if "step" in state else {}
    for key, value in state.items():
        name = _parameter(key, params)
        if name in own:
            found[key] = value
        elif not name and key.startswith(mark) and (mark or not key.startswith("groups/")):
            found[key.removeprefix(mark)] = value
    return found


def _marked(state: Mapping[str, Array], mark: str, own: Params) -> dict[str, Array]:
    """The state of one part as `Groups` keeps it."""
    plain = {key: key == "step" or _parameter(key, own) != "" for key in state}
    return {key if plain[key] else mark + key: value for key, value in state.items()}


def _parameter(key: str, params: Params) -> str:
    """The parameter that a slot belongs to; "" for a value that all share."""
    name = key.rpartition("/")[0]
    return name if name in params else ""
