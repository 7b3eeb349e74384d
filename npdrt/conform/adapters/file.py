"""A callable in a Python file that follows docs/audit-protocol.md."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from npdrt.conform.adapters.adapter import (
    KINDS,
    NUMPY_FORMATS,
    Info,
    Unanswered,
    accepts,
    checked,
    dtype,
    plain,
    wide,
)
from npdrt.conform.case import Answer, Case, Neighbour, laid_out, operands
from npdrt.conform.formats import FORMATS, Values
from npdrt.conform.rules import SLOTS
from npdrt.errors import Error
from npdrt.optim import Optimizer
from npdrt.optim.function import OURS, keywords


class Function:
    """A function that follows docs/audit-protocol.md, in the file at `path`."""

    def __init__(self, update: Any, name: str, overrides: Mapping[str, Any], path: str):
        self.files: tuple[str, ...] = (path,) if path else ()
        self.update = update
        self.overrides = dict(overrides)
        names, self.any = keywords(self.update, name)
        self.named = frozenset(names)
        if not self.any:
            accepts(names, name, overrides)
        own = {n: needed for n, needed in names.items() if n not in (*OURS, *overrides)}
        self.info = Info(
            None if self.any else frozenset(own),
            frozenset(n for n, needed in own.items() if needed),
            formats(self.update, name),
        )

    def run(self, case: Case) -> list[Answer]:
        """The answers of a case; each call is given arrays of its own."""
        w, state = case.w, start(case)
        other, its_state = (case.neighbour.w, {}) if case.neighbour else (w, state)
        before = int((case.state or {}).get("step", 0))
        answers = []
        for k in range(1, len(case.steps) + 1):
            if case.neighbour is not None:
                other, its_state = self.step(second(case, case.neighbour), k, other, its_state, k)
                state = its_state if "name" in self.named else state
            w, state = self.step(case, k, w, state, before + k)
            answers.append(Answer(w, slots(state, w.shape)))
            its_state = state if "name" in self.named else its_state
        return answers

    def step(
        self, case: Case, k: int, w: Values, state: dict[str, Any], t: int
    ) -> tuple[Values, dict[str, Any]]:
        """One call for step k of a case, in which t counts the steps that the state has seen."""
        given, lr = case.steps[k - 1].g, case.steps[k - 1].lr
        w, g = operands(w, given, case.layout, partial(readonly, name=case.format))
        with unchanged(k, w=w, g=g, state=state):
            result = self.update(w, g, state, **self.keywords(case, lr, t - 1))
        new, state = pair(result, k)
        return wide(checked(new, case.w.shape, case.format, k)), state

    def keywords(self, case: Case, lr: float, step: int) -> dict[str, Any]:
        """The keyword arguments of a call."""
        wanted = self.info.offers
        settings = plain(case.settings)
        given = {k: v for k, v in settings.items() if wanted is None or k in wanted}
        ours = {"name": case.kind, "step": step}
        given |= {k: v for k, v in ours.items() if k in self.named}
        return {"lr": float(lr), **given, **self.overrides}


class Factory:
    """A function of lr and settings that returns an `npdrt.optim.Optimizer`, in a file."""

    def __init__(self, make: Any, name: str, overrides: Mapping[str, Any], path: str):
        self.files: tuple[str, ...] = (path,) if path else ()
        self.make, self.name, self.overrides = make, name, dict(overrides)
        names, every = keywords(make, name, first=0)
        if not every:
            accepts(names, name, overrides)
        own = {n: needed for n, needed in names.items() if n not in ("lr", *overrides)}
        self.info = Info(
            None if every else frozenset(own),
            frozenset(n for n, needed in own.items() if needed),
            formats(make, name),
        )

    def run(self, case: Case) -> list[Answer]:
        """The answers of a case; the optimizer has its parameter and, if any, its neighbour."""
        own = {k: v for k, v in plain(case.settings).items()
               if self.info.offers is None or k in self.info.offers}  # fmt: skip
        optimizer = self.make(lr=float(case.steps[0].lr), **own, **self.overrides)
        if not isinstance(optimizer, Optimizer):
            raise Unanswered("shape", f"it returned {type(optimizer).__name__}, not an Optimizer")
        w, other = case.w, case.neighbour.w if case.neighbour else None
        state = self.start(optimizer.init(self.tree(case, w, other)), case)
        answers = []
        for k, step in enumerate(case.steps, 1):
            params = self.tree(case, w, other)
            beside = case.neighbour.g[k - 1] if case.neighbour else None
            grads = self.tree(case, step.g, beside, of_g=True)
            with unchanged(k, w=params, g=grads, state=state):
                params, state = optimizer.update(params, grads, state, lr=float(step.lr))
            found = {n: wide(checked(x, case.w.shape, case.format, k)) for n, x in params.items()}
            *others, w = found.values()
            other = others[0] if others else None
            own = {n.removeprefix(f"{case.kind}/"): x for n, x in state.items()}
            answers.append(Answer(w, slots(own, w.shape)))
        return answers

    def tree(
        self, case: Case, own: Values, other: Values | None, of_g: bool = False
    ) -> dict[str, Any]:
        """Read-only arrays by name, those of the case last, in its layout."""
        (neighbour,) = {*KINDS} - {case.kind}
        values = {case.kind: own} if other is None else {neighbour: other, case.kind: own}
        layout = "C" if case.layout == "fortran gradient" and not of_g else case.layout
        return {name: readonly(x, layout, name=case.format) for name, x in values.items()}

    def start(self, state: dict[str, Any], case: Case) -> dict[str, Any]:
        """The optimizer's own state, with what the case gives in its place."""
        known = {name.removeprefix(f"{case.kind}/"): name for name in state}
        given = {known[n]: v for n, v in (case.state or {}).items() if n in known}
        return state | {n: np.asarray(v).astype(state[n].dtype) for n, v in given.items()}


@contextmanager
def unchanged(k: int, **given: Any) -> Iterator[None]:
    """Raise `Unanswered` if an array in the arguments of step k is another one afterwards."""
    watched = [(label, x, bits(x)) for label, x in arrays(given)]
    yield
    for label, x, held in watched:
        if bits(x) != held:
            raise Unanswered("mutated", f"step {k}: {label} was changed in place")


def formats(update: Any, name: str) -> tuple[str, ...]:
    """The formats that a callable says it runs in its attribute `formats`."""
    found = tuple(getattr(update, "formats", NUMPY_FORMATS))
    for form in found:
        if form not in FORMATS:
            raise Error(f"{name}.formats: {form!r} is unknown; use {', '.join(FORMATS)}")
    if "bfloat16" in found:
        try:
            dtype("bfloat16")
        except ImportError:
            return tuple(form for form in found if form != "bfloat16")
    return found


def readonly(values: Values, layout: str, *, name: str) -> Any:
    """A copy of numbers of a format in NumPy's dtype, that refuses to be written."""
    array = laid_out(values.astype(dtype(name)), layout)
    array.flags.writeable = False
    return array


def second(case: Case, other: Neighbour) -> Case:
    """The neighbour of a case as a case of its own."""
    (kind,) = {*KINDS} - {case.kind}
    steps = tuple(replace(s, g=g) for s, g in zip(case.steps, other.g, strict=True))
    return replace(case, w=other.w, steps=steps, kind=kind)


def start(case: Case) -> dict[str, Any]:
    """The state before the first step: {}, or the case's with its arrays in the case's dtype."""
    given = case.state or {}
    return {
        k: np.asarray(v).astype(dtype(case.format)) if k in SLOTS else v for k, v in given.items()
    }


def arrays(value: Any, label: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """The arrays in nested dicts, lists and tuples, each with where it is."""
    items: Any = ()
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        yield label, value
    elif isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    if depth < 8:  # a state may hold itself
        for key, item in list(items):
            yield from arrays(item, f"{label}[{key!r}]" if label else str(key), depth + 1)


def bits(array: Any) -> bytes:
    """The bytes of an array; none if NumPy cannot read it."""
    with suppress(Exception):
        return np.asarray(array).tobytes()
    return b""


def pair(result: Any, k: int) -> tuple[Any, dict[str, Any]]:
    """(w, state), if a call returned these."""
    if not isinstance(result, tuple | list) or len(result) != 2:
        many = f" of {len(result)}" if isinstance(result, tuple | list) else ""
        found = f"{type(result).__name__}{many}"
        raise Unanswered("shape", f"step {k}: returned {found}; expected (w, state)")
    w, state = result
    if not isinstance(state, dict):
        raise Unanswered("shape", f"step {k}: returned {type(state).__name__} as state, not a dict")
    return w, state


def slots(state: Mapping[str, Any], shape: tuple[int, ...]) -> dict[str, Values]:
    """The array slots of a state that have npdrt's names and the parameter's shape."""
    found = {}
    for name in SLOTS:
        if getattr(state.get(name), "shape", None) == shape:
            with suppress(TypeError, ValueError):
                found[name] = wide(state[name])
    return found
