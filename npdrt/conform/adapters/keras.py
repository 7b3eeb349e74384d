"""Optimizers of Keras 3, on its backend for PyTorch or for JAX."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

from npdrt.conform.adapters.adapter import (
    KINDS,
    Info,
    arguments,
    asked_with,
    check_start,
    checked,
    double,
    dtype,
    exclusion,
    form_of,
    library,
    wide,
)
from npdrt.conform.adapters.signature import fitted, required, signature_of
from npdrt.conform.case import Answer, Case
from npdrt.conform.formats import FORMATS, Values
from npdrt.conform.rules import LibraryOptimizer


def choose_backend() -> str:
    """The backend that Keras is to use: the user's, or else PyTorch, or else JAX."""
    installed = [b for b in ("torch", "jax") if importlib.util.find_spec(b) is not None]
    return os.environ.setdefault("KERAS_BACKEND", installed[0] if installed else "tensorflow")


class Keras:
    """A class of optimizers, stepped with `apply`; its learning rate is set before every step.

    Keras keeps the learning rate in its default dtype, which is float64 in float64 cases.
    """

    uses = ("MISSING_GRADIENT", "EXCLUSION")

    def __init__(
        self, make: Any, known: LibraryOptimizer, overrides: Mapping[str, Any], path: str = ""
    ):
        self.keras, self.make, self.overrides = library("keras"), make, dict(overrides)
        signature = signature_of(make)
        self.known = fitted(known, signature, overrides)
        self.files: tuple[str, ...] = (path,) if path else ()
        self.info = Info(
            self.known.settings, required(self.known, signature), tuple(FORMATS), self.uses
        )

    def run(self, case: Case) -> list[Answer]:
        """The answers of a case."""
        wide_types = case.format == "float64"
        self.keras.config.set_floatx("float64" if wide_types else "float32")
        jax = self.keras.backend.backend() == "jax"
        with double(library("jax"), wide_types) if jax else nullcontext():
            return self.steps(case)

    def steps(self, case: Case) -> list[Answer]:
        """The answers of a case under the present precision."""
        w, beside = self.variable(case, case.w, case.kind), []
        if case.neighbour is not None:
            (kind,) = {*KINDS} - {case.kind}
            beside = [self.variable(case, case.neighbour.w, kind)]
        settings = {**arguments(case, self.known), **self.overrides}
        excluded = exclusion(case, settings)
        settings, decays = excluded or (settings, True)
        with asked_with(case):
            optimizer = self.make(learning_rate=case.steps[0].lr, **settings)
        if excluded:
            optimizer.exclude_from_weight_decay(var_list=beside if decays else [w])
        optimizer.build([*beside, w])
        self.start(case, optimizer)
        answers = []
        for k, step in enumerate(case.steps):
            optimizer.learning_rate = step.lr
            given = [self.array(case, case.neighbour.g[k])] if case.neighbour else []
            if "MISSING_GRADIENT" in case.flags and k:
                optimizer.apply([*given, None], [*beside, w])
            optimizer.apply([*given, self.array(case, step.g)], [*beside, w])
            checked(w, case.w.shape, case.format, k + 1)
            answers.append(Answer(self.values(w), self.slots(case, optimizer)))
        return answers

    def variable(self, case: Case, values: Values, name: str) -> Any:
        """A variable of the case's format."""
        return self.keras.Variable(self.array(case, values), dtype=case.format, name=name)

    def array(self, case: Case, values: Values) -> Any:
        """Numbers of the case's format as a tensor of the backend."""
        return self.keras.ops.convert_to_tensor(values.astype(dtype(case.format)), case.format)

    def values(self, variable: Any) -> Values:
        """A copy of a variable as float64."""
        return wide(self.keras.ops.convert_to_numpy(variable))

    def kept(self, case: Case, optimizer: Any) -> dict[str, Any]:
        """The variables that the optimizer keeps for the tensor of the case, by their names."""
        names = {v.path.rpartition("/")[2]: v for v in optimizer.variables}
        mark = f"{case.kind}_"
        return {n.removeprefix(mark): v for n, v in names.items() if n.startswith(mark)}

    def start(self, case: Case, optimizer: Any) -> None:
        """Give the optimizer the state of a case that starts in the middle."""
        kept, names = self.kept(case, optimizer), form_of(self.known, case, "keras").slots
        check_start(case, kept, names)
        for slot, value in (case.state or {}).items():
            if slot == "step":
                optimizer.iterations.assign(value)
            elif slot in names:
                kept[names[slot]].assign(self.array(case, value))

    def slots(self, case: Case, optimizer: Any) -> dict[str, Values]:
        """The array slots by npdrt's names."""
        kept, names = self.kept(case, optimizer), form_of(self.known, case, "keras").slots
        return {slot: self.values(kept[n]) for slot, n in names.items() if n in kept}
