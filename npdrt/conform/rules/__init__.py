"""Dialects: how implementations of one rule differ, as choices between named alternatives.

A rule is a list of clauses (where epsilon stands, what a zero norm does, ...). Each clause has the
published alternative first and others that exist, or that are mistakes. A dialect is a name, a
source and the choices in which it differs from the published rule. `run` evaluates a rule with
any choices, in extended precision or in mpmath numbers, so that one text serves every dialect.
"""

from __future__ import annotations

from npdrt.conform.rules.adam import ADAM
from npdrt.conform.rules.fromage import FROMAGE, LARS_LESION
from npdrt.conform.rules.lars import LARS
from npdrt.conform.rules.rule import Arithmetic, Choices, Dialect, Evaluated, Rule, run
from npdrt.conform.rules.sgd import SGD

RULES: dict[str, Rule] = {rule.name: rule for rule in (SGD, ADAM, LARS, LARS_LESION, FROMAGE)}

__all__ = ["RULES", "Arithmetic", "Choices", "Dialect", "Evaluated", "Rule", "run"]
