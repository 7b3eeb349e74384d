"""Answers of PyTorch's and optax's optimizers in this process.

They are what the child process of `npdrt audit` answers, without the seconds in which each child
imports a library. Children: tests/test_targets.py.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest

from npdrt.conform import targets
from npdrt.conform.adapters.load import load
from npdrt.conform.adapters.serve import outcome
from npdrt.conform.case import Case, Outcome
from npdrt.conform.targets import Target, lacks


def find(spec: str, overrides: dict[str, Any] | None = None) -> Target:
    """A target in a library; the test is skipped if that is not installed."""
    for package in targets.PACKAGES[spec.partition(".")[0]]:
        pytest.importorskip(package, exc_type=ImportError)
    return replace(targets.find(spec), overrides=overrides or {})


def usual(target: Target, case: Case) -> bool:
    """Whether a target is to be asked a case: JAX compiles anew for every shape."""
    return target.kind != "optax" or case.w.shape in ((2, 3), (3,))


def outcomes(target: Target, cases: Iterable[Case]) -> list[Outcome]:
    """What a target makes of cases, each of which it runs twice."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as in the child
        adapter = load(target.source, target.overrides)
        return [lacks(target, case) or outcome(adapter, case) for case in cases]
