"""What the referee knows of every rule of `npdrt.optim`: one file a rule, of the same name."""

from __future__ import annotations

from importlib import import_module

from npdrt import optim
from npdrt.conform.rules.evaluate import run
from npdrt.conform.rules.rule import Choices, Dialect, LibraryOptimizer, Rule

LIBRARIES = ("torch", "optax")
_found: list[Rule] = [import_module(f"{__name__}.{name}").RULE for name in optim.RULES]
RULES = {rule.name: rule for rule in sorted(_found, key=lambda rule: rule.added)}
# the array slots of all rules, and the optimizers of libraries with their rule, library by library
SLOTS = tuple(dict.fromkeys(slot for rule in RULES.values() for slot in rule.slots))
KNOWN: dict[str, tuple[Rule, LibraryOptimizer]] = {
    known.name: (rule, known)
    for library in LIBRARIES
    for rule in RULES.values()
    for known in rule.optimizers
    if known.name.startswith(f"{library}.")
}

__all__ = ["KNOWN", "RULES", "SLOTS", "Choices", "Dialect", "LibraryOptimizer", "Rule", "run"]
