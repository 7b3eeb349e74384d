"""Other people's optimizers behind one interface: a case in, its answers or a failure out.

This module runs in the child process that `npdrt.conform.targets` starts, so that an optimizer
which prints, changes, breaks or never finishes something does it there. An adapter has `info`,
which is known once it is loaded, and `run(case)`, the answers of every step from the case's start.
"""

from __future__ import annotations

import importlib
import inspect
import os
import signal
import sys
import types
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from traceback import walk_tb
from typing import Any, Protocol

import numpy as np

from npdrt.conform.case import (
    FILLER,
    Answer,
    Case,
    Failure,
    Neighbour,
    Outcome,
    laid_out,
    operands,
)
from npdrt.conform.formats import FORMATS, Values
from npdrt.conform.rules import KNOWN, SLOTS, LibraryOptimizer
from npdrt.errors import Error
from npdrt.regular import contents
from npdrt.workers import end_with

NUMPY_FORMATS = ("float16", "float32", "float64")
LONGEST = 300  # characters of a message
LONG = 500  # steps above which a case is run once
KINDS = ("weight", "bias")
OURS = ("lr", "name", "step")  # keywords of the protocol that are not settings


@dataclass(frozen=True)
class Info:
    """What an adapter knows of its target.

    offers: the settings that it takes, None for any. required: those without a default.
    formats: the formats it runs.
    """

    offers: frozenset[str] | None
    required: frozenset[str]
    formats: tuple[str, ...]


class Adapter(Protocol):
    """What `serve` asks."""

    info: Info
    files: tuple[str, ...]  # whose lines are the target's own; empty: the innermost line is named

    def run(self, case: Case) -> list[Answer]:
        """The answers of a case. Raises `Unanswered`, or whatever the target raises."""
        ...


class Unanswered(Exception):
    """No answer, or one that breaks the protocol; `failure` takes its place."""

    def __init__(self, kind: str, message: str):
        super().__init__(message)
        self.failure = Failure(kind, message)


# --- the child's loop -------------------------------------------------------------------------


def serve(descriptor: int, parent: int) -> None:
    """Answer requests on a connection until it closes; end with the parent, whatever happens.

    The first request is (kind, source, overrides); its reply is ("ready", Info) or ("error",
    message). Every other is (number, Case), and its reply (number, Outcome).
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when to stop
    end_with(parent)
    connection: Connection[Any, Any] = Connection(descriptor)
    adapter = load(connection)
    while adapter is not None:
        try:
            number, case = connection.recv()
        except EOFError:
            return
        connection.send((number, outcome(adapter, case)))


def load(connection: Connection[Any, Any]) -> Adapter | None:
    """The adapter that the first request names; None, after sending the reason, if it fails."""
    kind, source, overrides = connection.recv()
    try:
        adapter = ADAPTERS[kind](source, overrides)
    except Error as error:
        connection.send(("error", str(error)))
    except BaseException as error:  # a target that is imported may raise anything
        path = source.rpartition(":")[0]
        connection.send(("error", f"{source}: {described(error, (path,))}"))
    else:
        connection.send(("ready", adapter.info))
        return adapter
    return None


def outcome(adapter: Adapter, case: Case) -> Outcome:
    """The outcome of a case. The target runs it twice, a long case once."""
    first = attempt(adapter, case)
    if isinstance(first, Failure) or len(case.steps) > LONG:
        return first
    second = attempt(adapter, case)
    if isinstance(second, Failure):
        why = f"the second run from the same start gave no answer: {second.message}"
        return Failure("nondeterministic", why)
    where = difference(first, second)
    return Failure("nondeterministic", where) if where else first


def attempt(adapter: Adapter, case: Case) -> tuple[Answer, ...] | Failure:
    """The answers, or a failure in place of every exception, SystemExit included."""
    try:
        return tuple(adapter.run(case))
    except Unanswered as reason:
        return reason.failure
    except BaseException as error:
        message = described(error, adapter.files)
        if isinstance(error, ValueError) and "read-only" in str(error):
            return Failure("mutated", f"w and g may not be changed in place: {message}")
        return Failure("raised", message)


def described(error: BaseException, files: Sequence[str]) -> str:
    """Type, message and place of an exception in one line. The place is the innermost in `files`,
    or the innermost of all if `files` is empty."""
    places = []
    for frame, line in walk_tb(error.__traceback__):
        name = frame.f_code.co_filename
        if not files or name in files:
            places.append(f"{Path(name).name}:{line}")
    if isinstance(error, SyntaxError) and error.filename in files:
        places.append(f"{Path(error.filename or '').name}:{error.lineno}")
        error = type(error)(error.msg)  # without the place that it would add itself
    try:
        text = " ".join(str(error).split())
    except Exception:  # its own __str__ may raise
        text = "no message"
    text = text if len(text) <= LONGEST else text[:LONGEST] + "..."
    where = f" ({places[-1]})" if places else ""
    return f"{type(error).__name__}{': ' if text else ''}{text}{where}"


def difference(first: Sequence[Answer], second: Sequence[Answer]) -> str:
    """Where two runs of a case differ, or ""."""
    for k, (a, b) in enumerate(zip(first, second, strict=True), 1):
        if a.slots.keys() != b.slots.keys():
            return f"two runs from the same start differ in the slots they have after step {k}"
        pairs = {"w": (a.w, b.w)} | {name: (a.slots[name], b.slots[name]) for name in a.slots}
        for name, (x, y) in pairs.items():
            same = (x.view(np.uint64) == y.view(np.uint64)) | (np.isnan(x) & np.isnan(y))
            if not same.all():
                at = int(np.argmin(same.reshape(-1)))
                values = f"{x.reshape(-1)[at]!s} and {y.reshape(-1)[at]!s}"
                return (
                    f"two runs from the same start differ after step {k}: element {at} of {name} "
                    f"is {values}"
                )
    return ""


# --- what adapters share ----------------------------------------------------------------------


def library(name: str) -> Any:
    """A module, as Any so that no type checker reads it."""
    return importlib.import_module(name)


def dtype(name: str) -> Any:
    """NumPy's dtype of a format; that of ml_dtypes for bfloat16, which NumPy lacks."""
    return library("ml_dtypes").bfloat16 if name == "bfloat16" else np.dtype(name)


def wide(array: Any) -> Values:
    """A copy of an array on the host as float64, in C order."""
    return np.array(array, order="C").astype(np.float64)


def checked(w: Any, shape: tuple[int, ...], name: str, k: int) -> Any:
    """`w`, if it is an array of that shape and dtype."""
    if not hasattr(w, "dtype") or not hasattr(w, "shape"):
        raise Unanswered(
            "shape", f"step {k}: returned {type(w).__name__} as w; expected an array of {name}"
        )
    if tuple(w.shape) != shape:
        raise Unanswered("shape", f"step {k}: returned shape {tuple(w.shape)} for a w of {shape}")
    found = str(getattr(w.dtype, "name", w.dtype)).removeprefix("torch.")
    if found != name:
        raise Unanswered("dtype", f"step {k}: returned {found} for a w of {name}")
    return w


def plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with several numbers (betas) as a tuple of Python floats."""
    return {k: tuple(map(float, v)) if isinstance(v, tuple | list) else v
            for k, v in settings.items()}  # fmt: skip


def arguments(case: Case, known: LibraryOptimizer) -> dict[str, Any]:
    """The keyword arguments by which a library's optimizer takes the settings of a case."""
    return known.arguments({k: v for k, v in plain(case.settings).items() if k in known.offers})


def accepts(known: Collection[str], name: str, overrides: Mapping[str, Any]) -> None:
    """Raise Error if an override is not a parameter of `name`."""
    for key in overrides:
        if key not in known:
            raise Error(f"{name} has no {key!r}; it has {', '.join(known) or 'none'}")


def double(jax: Any, on: bool) -> Any:
    """A context in which JAX has 64-bit types, or does not."""
    home = jax if hasattr(jax, "enable_x64") else library("jax.experimental")
    return home.enable_x64(on)


# --- torch.optim ------------------------------------------------------------------------------


class Torch:
    """A class of torch.optim, stepped on a parameter of its own, on the CPU."""

    files: tuple[str, ...] = ()

    def __init__(self, source: str, overrides: Mapping[str, Any]):
        self.torch, (_, self.known) = library("torch"), KNOWN[source]
        self.make = getattr(self.torch.optim, source.rpartition(".")[2])
        accepts(inspect.signature(self.make).parameters, source, overrides)
        self.overrides = dict(overrides)
        self.info = Info(self.known.settings, frozenset(), tuple(FORMATS))
        one = self.torch.zeros(1, requires_grad=True)  # the first step imports half of torch
        self.torch.optim.SGD([one], lr=0.0).step()

    def run(self, case: Case) -> list[Answer]:
        """The answers of a case, through `step()` with the learning rate set in the group."""
        w = self.operands(case, case.w, case.w)[0].requires_grad_()
        settings = {**arguments(case, self.known), **self.overrides}
        other: Any = None
        if case.neighbour is not None:
            other = self.tensor(case.neighbour.w, case).requires_grad_()
        tensors = [w] if other is None else [other, w]
        optimizer = self.make(tensors, lr=case.steps[0].lr, **settings)
        if state := self.state(case):
            optimizer.state[w] = state
        answers = []
        for k, step in enumerate(case.steps, 1):
            optimizer.param_groups[0]["lr"] = step.lr
            if case.neighbour is not None:
                other.grad = self.tensor(case.neighbour.g[k - 1], case)
            w.grad = self.operands(case, case.w, step.g)[1]
            optimizer.step()
            checked(w, case.w.shape, case.format, k)
            answers.append(Answer(self.values(w), self.slots(optimizer.state.get(w, {}))))
        return answers

    def tensor(self, values: Values, case: Case) -> Any:
        """Numbers of the case's format, exactly, as a tensor."""
        return self.torch.tensor(values).to(getattr(self.torch, case.format))

    def operands(self, case: Case, w: Values, g: Values) -> tuple[Any, Any]:
        """The parameter and the gradient as tensors in the layout of the case; torch has no
        negative strides."""
        return operands(self.tensor(w, case), self.tensor(g, case), case.layout, self.laid_out)

    def laid_out(self, tensor: Any, layout: str) -> Any:
        """A copy of a tensor in a layout."""
        if layout.startswith("fortran"):
            backwards = tuple(reversed(range(tensor.dim())))
            return tensor.permute(backwards).contiguous().permute(backwards)
        if layout != "strided":
            return tensor
        buffer = tensor.new_full((2 * tensor.numel(),), FILLER)
        return buffer.as_strided(tensor.shape, [2 * s for s in tensor.stride()]).copy_(tensor)

    def values(self, tensor: Any) -> Values:
        """A copy of a tensor as float64."""
        return wide(tensor.detach().to(self.torch.float64).numpy())

    def state(self, case: Case) -> dict[str, Any]:
        """The state of the parameter at the case's start; {} if the optimizer makes it itself."""
        given, slots = case.state or {}, dict(self.known.slots)
        if not given.get("step", 0) and not given.keys() & SLOTS:
            return {}
        state, zero = {}, np.zeros_like(case.w)
        if name := slots.pop("step", ""):
            state[name] = self.torch.tensor(float(given.get("step", 0)), dtype=self.torch.float32)
        for slot, name in slots.items():
            state[name] = self.tensor(given.get(slot, zero), case)
        for argument, name in self.known.adds.items():
            if self.overrides.get(argument):  # no case has it: it is as at the start
                state[name] = self.tensor(zero, case)
        return state

    def slots(self, state: Mapping[str, Any]) -> dict[str, Values]:
        """The array slots by npdrt's names."""
        own = {k: state.get(name) for k, name in self.known.slots.items() if k in SLOTS}
        return {k: self.values(value) for k, value in own.items() if value is not None}


# --- optax ------------------------------------------------------------------------------------


class Optax:
    """A transformation of optax, made again at every step with the step's learning rate.

    Operations run one at a time, not compiled into one. JAX has 64-bit types for float64 cases
    only: with them the bias correction of a float32 parameter is computed in float64.
    """

    files: tuple[str, ...] = ()

    def __init__(self, source: str, overrides: Mapping[str, Any]):
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        self.jax, self.jnp, self.optax = library("jax"), library("jax.numpy"), library("optax")
        self.known = KNOWN[source][1]
        self.make = getattr(self.optax, source.rpartition(".")[2])
        accepts(inspect.signature(self.make).parameters, source, overrides)
        self.overrides = dict(overrides)
        self.info = Info(self.known.settings, frozenset(), tuple(FORMATS))
        self.jnp.zeros(1).block_until_ready()

    def run(self, case: Case) -> list[Answer]:
        """The answers of a case, through `update` and `apply_updates`."""
        with double(self.jax, case.format == "float64"):
            return self.steps(case)

    def steps(self, case: Case) -> list[Answer]:
        """The answers of a case under the present precision."""
        other = case.neighbour
        params = self.tree(case, case.w, None if other is None else other.w)
        state = self.start(case, self.transform(case, case.steps[0].lr).init(params))
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
        return self.make(lr, **{**arguments(case, self.known), **self.overrides})

    def start(self, case: Case, state: Any) -> Any:
        """`state` with the case's slots in it; the others stay."""
        fields = {"step": "count", **self.known.slots}
        given = self.turned(case.state or {})
        values = {fields[k]: v for k, v in given.items() if k in fields}

        def put(old: Any, name: str) -> Any:
            if name not in values:
                return replaced(old, put)
            return self.jnp.asarray(np.asarray(values[name]).astype(old.dtype))

        return replaced(state, put)

    def slots(self, state: Any, case: Case) -> dict[str, Values]:
        """The array slots by npdrt's names."""
        fields, slots = dict(named(state)), self.known.slots
        return self.turned({k: wide(own(fields[n], case)) for k, n in slots.items() if n in fields})

    def turned(self, slots: Mapping[str, Any]) -> dict[str, Any]:
        """The slots with the velocity from npdrt's direction to optax's, or back."""
        sign = {"momentum": self.known.velocity}
        return {k: np.asarray(sign[k] * v) if k in sign else v for k, v in slots.items()}


def own(tree: Any, case: Case) -> Any:
    """What a tree made by `tree` has for the tensor of the case."""
    return tree[case.kind] if isinstance(tree, dict) else tree


def replaced(state: Any, put: Callable[[Any, str], Any]) -> Any:
    """A tree of (named) tuples with every field `name` of value `x` as `put(x, name)`."""
    if hasattr(state, "_fields"):
        return type(state)(*(put(x, name) for name, x in zip(state._fields, state, strict=True)))
    return tuple(replaced(x, put) for x in state) if isinstance(state, tuple) else state


def named(state: Any) -> Iterator[tuple[str, Any]]:
    """The fields of all named tuples in a tree of tuples."""
    if isinstance(state, tuple):
        yield from zip(getattr(state, "_fields", ()), state, strict=False)
        for x in state:
            yield from named(x)


# --- the file protocol ------------------------------------------------------------------------


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


# --- tables -----------------------------------------------------------------------------------

ADAPTERS: dict[str, Callable[[str, Mapping[str, Any]], Adapter]] = {
    "torch": Torch,
    "optax": Optax,
    "file": File,
}
