"""Optimizers: one file a rule, each a pure function on one array that reads as its equation.

The dialects of a rule (the other forms that libraries have) are in npdrt/conform/rules/NAME.py,
with all else that the referee knows of it.
"""

from importlib import import_module
from pkgutil import iter_modules

from npdrt.optim.adam import adam
from npdrt.optim.fromage import fromage
from npdrt.optim.function import FunctionOptimizer, OwnRule, as_rule
from npdrt.optim.groups import Groups
from npdrt.optim.lars import lars
from npdrt.optim.lars_lesion import lars_lesion
from npdrt.optim.norm import norm
from npdrt.optim.optimizer import Optimizer, Updater
from npdrt.optim.rule import Formula, Rule, rule
from npdrt.optim.schedules import schedule
from npdrt.optim.setting import Setting
from npdrt.optim.sgd import sgd


def _rules() -> dict[str, Rule[...]]:
    """Every rule by its name: those of the papers first, then any other file's, by name."""
    found: dict[str, Rule[...]] = {r.name: r for r in (sgd, adam, lars, lars_lesion, fromage)}
    for module in iter_modules(__path__):
        made = getattr(import_module(f"{__name__}.{module.name}"), module.name, None)
        if isinstance(made, Rule):
            found.setdefault(made.name, made)
    return found


RULES = _rules()
globals().update(RULES)  # npdrt.optim.<name> is the rule, not its module

__all__ = [
    "RULES",
    "Formula",
    "FunctionOptimizer",
    "Groups",
    "Optimizer",
    "OwnRule",
    "Rule",
    "Setting",
    "Updater",
    "adam",
    "as_rule",
    "fromage",
    "lars",
    "lars_lesion",
    "norm",
    "rule",
    "schedule",
    "sgd",
]
