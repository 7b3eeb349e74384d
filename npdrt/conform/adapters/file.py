"""A callable in a Python file that follows docs/audit-protocol.md."""

from __future__ import annotations

import inspect
import sys
import types
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
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
from npdrt.regular import contents

OURS = ("lr", "name", "step")  # keywords of the protocol that are not settings


class File:
    """A callable in a Python file that follows docs/audit-protocol.md."""

    def __init__(self, source: str, overrides: Mapping[str, Any]):
        path, _, name = source.rpartition(":")
        self.files: tuple[str, ...] = (path,)
        self.update = imported(Path(path), name)
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
        watched = [(label, x, bits(x)) for label, x in arrays({"w": w, "g": g, "state": state})]
        result = self.update(w, g, state, **self.keywords(case, lr, t - 1))
        for label, x, held in watched:
            if bits(x) != held:
                raise Unanswered("mutated", f"step {k}: {label} was changed in place")
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


def imported(path: Path, name: str) -> Any:
    """The callable of that name in a file, which is run; no bytecode is read or left behind."""
    sys.dont_write_bytecode = True
    sys.path.insert(0, str(path.parent))  # as `python file.py` has it
    module = types.ModuleType("npdrt_audit_target")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module
    exec(compile(contents(path, follow=True), str(path), "exec"), module.__dict__)
    found = getattr(module, name, None)
    if not callable(found):
        have = [k for k, v in vars(module).items() if callable(v) and not k.startswith("_")]
        what = "is not callable" if hasattr(module, name) else "is not there"
        raise Error(f"{path}: {name!r} {what}; it has {', '.join(have) or 'no callable'}")
    return found


def keywords(update: Any, name: str) -> tuple[dict[str, bool], bool]:
    """Keyword -> whether it has no default, and whether any other is taken too."""
    form = f"{name}(w, g, state, *, lr, ...)"
    try:
        parameters = list(inspect.signature(update).parameters.values())
    except (TypeError, ValueError) as error:
        raise Error(f"{name}: Python cannot tell its arguments; wrap it as {form}") from error
    first = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    every = any(p.kind is p.VAR_KEYWORD for p in parameters)
    more = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    rest = [p for p in parameters if p.kind is p.KEYWORD_ONLY or p in first[3:]]
    names = {p.name: p.default is p.empty for p in rest if p.kind is not p.POSITIONAL_ONLY}
    fits = (len(first) >= 3 or more) and ("lr" in names or every)
    if not fits or any(p.kind is p.POSITIONAL_ONLY and p.default is p.empty for p in first[3:]):
        shown = inspect.signature(update)
        raise Error(f"{name}{shown} does not fit the protocol: it is called as {form}")
    return names, every


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
