"""npdrt: NumPy deep relative trust, a neural-network engine on plain arrays.

Submodules load when first used, so that `import npdrt` stays quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from npdrt.errors import DiskError, Diverged, Error, FileRefused, Unavailable

if TYPE_CHECKING:
    from npdrt import (
        arrays,
        autodiff,
        conform,
        data,
        models,
        ops,
        optim,
        program,
        random,
        store,
        train,
        trust,
    )
    from npdrt.autodiff import value_and_grad
    from npdrt.check import check_gradients
    from npdrt.compute import arithmetic
    from npdrt.program import Program, record
    from npdrt.store import Checkpoint, load, save
    from npdrt.train import open_run

__version__ = "0.1.0"

_MODULES = {
    *(
        "arrays",
        "autodiff",
        "conform",
        "data",
        "models",
        "ops",
        "optim",
        "program",
        "random",
        "store",
    ),
    *("train", "trust"),
}
_HOMES = {
    "Checkpoint": "store",
    "Program": "program",
    "arithmetic": "compute",
    "check_gradients": "check",
    "load": "store",
    "open_run": "train",
    "record": "program",
    "save": "store",
    "value_and_grad": "autodiff",
}
_ERRORS = {"DiskError", "Diverged", "Error", "FileRefused", "Unavailable"}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"npdrt.{name}")
    if name in _HOMES:
        return getattr(importlib.import_module(f"npdrt.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'npdrt' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *_MODULES})


__all__ = sorted({*_MODULES, *_HOMES, *_ERRORS, "__version__"})
