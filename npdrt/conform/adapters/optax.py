"""Optimizers of optax: its functions, and others that return a `GradientTransformation`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import numpy as np

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


class Optax:
    """A transformation of optax, made again at every step with the step's learning rate.

    Operations run one at a time, not compiled into one. JAX has 64-bit types for float64 cases
    only: with them the bias correction of a float32 parameter is computed in float64.
    """

    def __init__(
        self, make: Any, known: LibraryOptimizer, overrides: Mapping[str, Any], path: str = ""
    ):
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        self.jax, self.jnp, self.optax = library("jax"), library("jax.numpy"), library("optax")
        self.make, self.overrides = make, dict(overrides)
        signature = signature_of(make)
        self.rate, self.known = signature.rate, fitted(known, signature, overrides)
        self.files: tuple[str, ...] = (path,) if path else ()
        uses = ("EXCLUSION",) if self.known.mask else ()
        self.info = Info(self.known.settings, required(self.known, signature), tuple(FORMATS), uses)
        self.jnp.zeros(1).block_until_ready()

    def run(self, case: Case) -> list[Answer]:
        """The answers of a case, through `update` and `apply_updates`."""
        plain = self.jax.disable_jit() if self.known.interpreted else nullcontext()
        with double(self.jax, case.format == "float64"), plain:
            return self.steps(case)

    def steps(self, case: Case) -> list[Answer]:
        """The answers of a case under the present precision."""
        other = case.neighbour
        params = self.tree(case, case.w, None if other is None else other.w)
        with asked_with(case):
            transform = self.transform(case, case.steps[0].lr)
        state = self.start(case, transform.init(params))
        answers = []
        for k, step in enumerate(case.steps):
            transform = self.transform(case, step.lr)
            grads = self.tree(case, step.g, None if other is None else other.g[k])
            updates, state = transform.update(grads, state, params)
            params = self.optax.apply_updates(params, updates)
            w = checked(own(params, case), case.w.shape, case.format, k + 1)
            answers.append(Answer(wide(w), self.slots(state, case)))
        return answers

    def tree(self, case: Case, values: Values, others: Values | None) -> Any:
        """An array, or with a neighbour a dict of two by their kinds."""
        if others is None:
            return self.array(values, case)
        (other,) = {*KINDS} - {case.kind}
        return {other: self.array(others, case), case.kind: self.array(values, case)}

    def array(self, values: Values, case: Case) -> Any:
        """Numbers of the case's format as an array; converted on the host, as XLA's conversion
        makes subnormal numbers zero."""
        return self.jnp.asarray(values.astype(dtype(case.format)))

    def transform(self, case: Case, lr: float) -> Any:
        """The transformation with the case's settings."""
        given = {self.rate: lr, **arguments(case, self.known), **self.overrides}
        if (excluded := exclusion(case, given)) is not None:
            given, decays = excluded
            given[self.known.mask] = {kind: decays == (kind == case.kind) for kind in KINDS}
        return self.make(**given)

    def start(self, case: Case, state: Any) -> Any:
        """`state` with the case's slots in it; the others stay."""
        form = form_of(self.known, case, "optax")
        check_start(case, dict(named(state)), form.slots)
        fields, given = {"step": "count", **form.slots}, turned(case.state or {}, form)
        values = {fields[k]: v for k, v in given.items() if k in fields}

        def put(old: Any, name: str) -> Any:
            if name not in values or not hasattr(old, "dtype"):
                return replaced(old, put)
            return self.jnp.asarray(np.asarray(values[name]).astype(old.dtype))

        return replaced(state, put)

    def slots(self, state: Any, case: Case) -> dict[str, Values]:
        """The array slots by npdrt's names."""
        form = form_of(self.known, case, "optax")
        fields = dict(reversed([*named(state)]))  # the first of a name
        found = {k: wide(own(fields[n], case)) for k, n in form.slots.items() if n in fields}
        return turned(found, form)


def turned(slots: Mapping[str, Any], form: LibraryOptimizer) -> dict[str, Any]:
    """The slots with the velocity from npdrt's direction to the form's, or back."""
    sign = {"momentum": form.velocity}
    return {k: np.asarray(sign[k] * v) if k in sign else v for k, v in slots.items()}


def own(tree: Any, case: Case) -> Any:
    """What a tree made by `tree` has for the tensor of the case."""
    return tree[case.kind] if isinstance(tree, dict) else tree


def replaced(state: Any, put: Callable[[Any, str], Any]) -> Any:
    """A tree of dicts and (named) tuples with every field `name` of value `x` as `put(x, name)`."""
    if isinstance(state, dict):
        return {name: replaced(x, put) for name, x in state.items()}
    if hasattr(state, "_fields"):
        return type(state)(*(put(x, name) for name, x in zip(state._fields, state, strict=True)))
    return tuple(replaced(x, put) for x in state) if isinstance(state, tuple) else state


def named(state: Any) -> Iterator[tuple[str, Any]]:
    """The fields of all named tuples in a tree of dicts and tuples."""
    if isinstance(state, dict):
        state = tuple(state.values())
    if isinstance(state, tuple):
        yield from zip(getattr(state, "_fields", ()), state, strict=False)
        for x in state:
            yield from named(x)
