"""What the adapters of optimizers share: their interface, and their checks of answers.

An adapter runs in the child process that `npdrt.conform.targets` starts. It has `info`, which is
known once it is loaded, and `run(case)`, the answers of every step from the case's start.
"""

from __future__ import annotations

import importlib
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from npdrt.conform.case import Answer, Case, Failure
from npdrt.conform.formats import Values
from npdrt.conform.rules import RULES, LibraryOptimizer
from npdrt.errors import Error

NUMPY_FORMATS = ("float16", "float32", "float64")
KINDS = ("weight", "bias")
OTHER_DECAY = 0.5  # the weight decay of another tensor, or what it is larger by
X64 = (
    'JAX has no float64 unless the file sets it, with jax.config.update("jax_enable_x64", True); '
    "set it, or audit with --format float32"
)


@dataclass(frozen=True)
class Info:
    """What an adapter knows of its target.

    offers: the settings that it takes, None for any. required: those without a default.
    formats: the formats it runs. uses: those of `npdrt.conform.case.USES` that it can be put to.
    """

    offers: frozenset[str] | None
    required: frozenset[str]
    formats: tuple[str, ...]
    uses: tuple[str, ...] = ()


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
        narrowed = name == "float64" and type(w).__module__.partition(".")[0] in ("jax", "jaxlib")
        hint = f"; {X64}" if narrowed else ""
        raise Unanswered("dtype", f"step {k}: returned {found} for a w of {name}{hint}")
    return w


def plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with several numbers (betas) as a tuple of Python floats."""
    return {k: tuple(map(float, v)) if isinstance(v, tuple | list) else v
            for k, v in settings.items()}  # fmt: skip


def arguments(case: Case, known: LibraryOptimizer) -> dict[str, Any]:
    """The keyword arguments by which a library's optimizer takes the settings of a case."""
    own = known.offers or ()
    return known.arguments({k: v for k, v in plain(case.settings).items() if k in own})


def exclusion(case: Case, settings: dict[str, Any]) -> tuple[dict[str, Any], bool] | None:
    """If one of two tensors is to be left out of the decay: the arguments with a decay, and whether
    the tensor of the case is the one that decays."""
    if "EXCLUSION" not in case.flags or "weight_decay" not in settings:
        return None
    own = settings["weight_decay"]
    return {**settings, "weight_decay": own or OTHER_DECAY}, own != 0


@contextmanager
def asked_with(case: Case) -> Iterator[None]:
    """Where an optimizer is made: raise `Unanswered` if it refuses the settings of a case that is
    to be answered."""
    try:
        yield
    except ValueError as error:
        if case.result == "error":
            raise
        raise Unanswered("not offered", f"it refuses some settings: {error}") from error


def form_of(known: LibraryOptimizer, case: Case, package: str) -> LibraryOptimizer:
    """Of which form the state of an optimizer is: its own, if npdrt knows its slots, or else that
    of the package's optimizers of the case's rule."""
    others = RULES[case.rule].optimizers
    several = (known, *(other for other in others if other.name.startswith(f"{package}.")))
    return next((other for other in several if other.slots), known)


def check_start(case: Case, kept: Collection[str], names: Mapping[str, str]) -> None:
    """Raise `Unanswered` if a case gives a slot that the optimizer does not keep under its name."""
    for slot in case.state or {}:
        counted = slot == "step" or slot.endswith("_power")
        if not counted and names.get(slot) not in kept:
            raise Unanswered("not offered", f"npdrt does not see where it keeps {slot}")


def accepts(known: Collection[str], name: str, overrides: Mapping[str, Any]) -> None:
    """Raise Error if an override is not a parameter of `name`."""
    for key in overrides:
        if key not in known:
            raise Error(f"{name} has no {key!r}; it has {', '.join(known) or 'none'}")


def double(jax: Any, on: bool) -> Any:
    """A context in which JAX has 64-bit types, or does not."""
    home = jax if hasattr(jax, "enable_x64") else library("jax.experimental")
    return home.enable_x64(on)
