"""What the referee knows of every rule of `npdrt.optim`: one file a rule, of the same name.

A rule without a file here can be trained with, but not audited: it is in none of the referee's
lists, and asking for it raises `Error`.
"""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from npdrt import optim
from npdrt.conform.rules.evaluate import run
from npdrt.conform.rules.rule import Choices, Dialect, LibraryOptimizer, Rule
from npdrt.errors import Error

LIBRARIES = ("torch", "optax", "keras", "timm", "pytorch_optimizer", "torch_optimizer")


class Rules(dict[str, Rule]):
    """Rules by name."""

    def __missing__(self, name: str) -> Rule:
        raise Error(f"the referee does not know the rule {name}: npdrt/conform/rules/{name}.py is "
                    "missing (CONTRIBUTING.md, \"How to add an optimizer\")")  # fmt: skip


_files = {module.name for module in iter_modules(__path__)}
UNKNOWN = tuple(name for name in optim.RULES if name not in _files)  # rules without a file
_found = [import_module(f"{__name__}.{name}").RULE for name in optim.RULES if name in _files]
RULES = Rules({rule.name: rule for rule in sorted(_found, key=lambda rule: rule.added)})
# the array slots of all rules, and the optimizers of libraries with their rule, library by library
SLOTS = tuple(dict.fromkeys(slot for rule in RULES.values() for slot in rule.slots))
KNOWN: dict[str, tuple[Rule, LibraryOptimizer]] = {
    known.name: (rule, known)
    for library in LIBRARIES
    for rule in RULES.values()
    for known in rule.optimizers
    if known.name.startswith(f"{library}.")
}

__all__ = [
    "KNOWN",
    "RULES",
    "SLOTS",
    "UNKNOWN",
    "Choices",
    "Dialect",
    "LibraryOptimizer",
    "Rule",
    "run",
]
