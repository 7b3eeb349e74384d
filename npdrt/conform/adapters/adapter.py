"""What the adapters of optimizers share: their interface, and their checks of answers.

An adapter runs in the child process that `npdrt.conform.targets` starts. It has `info`, which is
known once it is loaded, and `run(case)`, the answers of every step from the case's start.
"""

from __future__ import annotations

import importlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from npdrt.conform.case import Answer, Case, Failure
from npdrt.conform.formats import Values
from npdrt.conform.rules import LibraryOptimizer
from npdrt.errors import Error

NUMPY_FORMATS = ("float16", "float32", "float64")
KINDS = ("weight", "bias")


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
