"""Optimizers: one file a rule, each a pure function on one array that reads as its equation."""

from typing import Any

from npdrt.optim.adam import adam
from npdrt.optim.fromage import fromage
from npdrt.optim.lars import lars
from npdrt.optim.lars_lesion import lars_lesion
from npdrt.optim.norm import norm
from npdrt.optim.optimizer import Optimizer
from npdrt.optim.schedules import schedule
from npdrt.optim.sgd import sgd

RULES: dict[str, Any] = {
    "sgd": sgd,
    "adam": adam,
    "lars": lars,
    "lars_lesion": lars_lesion,
    "fromage": fromage,
}

__all__ = [
    "RULES",
    "Optimizer",
    "adam",
    "fromage",
    "lars",
    "lars_lesion",
    "norm",
    "schedule",
    "sgd",
]
