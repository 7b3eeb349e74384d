"""The optimizer of a run: a rule of npdrt or of the user's file, alone or in groups.

A group is a text, "PATTERN:NAME=VALUE,...", as in "*/bias:rule=sgd,lr=0.1": the parameters that it
is for, and what is different for them. `rule` names another rule; without it the group has the
run's rule and settings. `lr` is the group's rate before the schedule, else that of the run.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from npdrt import optim
from npdrt.errors import Error
from npdrt.optim import Groups, OwnRule, Rule, Updater, as_rule
from npdrt.schema import toml_value
from npdrt.train.own import check_names, digest, file_of, found_in

USER_RULE = "path/to/file.py:rule"
GROUP = "PATTERN:NAME=VALUE,..."


def rule_named(name: str) -> Rule[...] | OwnRule:
    """The rule of that name, or in "path/to/file.py:rule"."""
    if not file_of(name):
        check_names("optimizer", {name: None}, [*optim.RULES, USER_RULE])
        return optim.RULES[name]
    found = found_in(name, "rule")
    if not callable(found):
        raise Error(f"{file_of(name)} has no rule {name.rpartition(':')[2]!r}: no callable has "
                    "that name")  # fmt: skip
    return as_rule(found, name.rpartition("/")[2])


def build(rule: str, lr: float, settings: Mapping[str, Any], groups: Sequence[str]) -> Updater:
    """The optimizer of a run with that rule, rate, settings and groups."""
    parts = {}
    for text in groups:
        pattern, own = parsed(text)
        known = {"lr": lr} if "rule" in own else {"lr": lr, **settings}
        parts[pattern] = _made(own.get("rule", rule), {**known, **own})
    rest = _made(rule, {"lr": lr, **settings})
    return Groups(rest, parts) if parts else rest


def _made(name: str, settings: Mapping[str, Any]) -> Updater:
    rule = rule_named(name)
    given = {key: value for key, value in settings.items() if key not in ("rule", "lr")}
    if rule.settings is not None:
        check_names(f"setting of {rule.name}:", given, list(rule.settings))
    return rule(lr=settings["lr"], **given)


def parsed(group: str) -> tuple[str, dict[str, Any]]:
    """The pattern and the settings in the text of a group. Raises `Error` if it is none."""
    pattern, _, pairs = group.partition(":")
    settings: dict[str, Any] = {}
    for pair in re.split(r",(?=\s*\w+=)", pairs):
        name, equals, value = pair.strip().partition("=")
        if not (pattern and name and equals and value):
            raise Error(f"group {group!r}: expected {GROUP}, as in '*/bias:rule=sgd,lr=0.1'")
        settings[name] = toml_value(value)
    lr = settings.get("lr", 0.0)
    if isinstance(lr, bool) or not isinstance(lr, int | float):
        raise Error(f"group {group!r}: lr must be a number; got {lr!r}")
    return pattern, settings


def own_rules(rule: str, groups: Sequence[str]) -> list[str]:
    """Every "path/to/file.py:rule" that an optimizer and its groups name, once."""
    names = [rule, *(str(parsed(text)[1].get("rule", "")) for text in groups)]
    return [name for name in dict.fromkeys(names) if file_of(name)]


def rule_digests(rule: str, groups: Sequence[str]) -> dict[str, str | None]:
    """Name -> SHA-256 of its file, for every rule of the user."""
    return {name: digest(name) for name in own_rules(rule, groups)}
