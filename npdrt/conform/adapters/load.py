"""From what the user names to an adapter: a callable in a file, or an optimizer of a package."""

from __future__ import annotations

import inspect
import sys
import types
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from npdrt.conform.adapters.adapter import Adapter, library
from npdrt.conform.adapters.file import Factory, Function
from npdrt.conform.adapters.keras import Keras, choose_backend
from npdrt.conform.adapters.optax import Optax
from npdrt.conform.adapters.signature import signature_of
from npdrt.conform.adapters.torch import Torch
from npdrt.conform.rules import KNOWN, LibraryOptimizer
from npdrt.errors import Error
from npdrt.optim.function import is_factory
from npdrt.regular import contents


def load(source: str, overrides: Mapping[str, Any]) -> Adapter:
    """The adapter of "path/to/file.py:callable", or of a name in a package ("torch.optim.SGD")."""
    path, colon, name = source.rpartition(":")
    choose_backend()
    if colon:
        return adapted(imported(Path(path), name), name, overrides, path)
    module, _, name = source.rpartition(".")
    home = library(module)
    if not hasattr(home, name):
        close = get_close_matches(name, [n for n in dir(home) if not n.startswith("_")], 1)
        raise Error(
            f"{module} has no {name}{f'; did you mean {module}.{close[0]}?' if close else ''}"
        )
    return adapted(getattr(home, name), source, overrides)


def adapted(found: Any, name: str, overrides: Mapping[str, Any], path: str = "") -> Adapter:
    """The adapter of a class of optimizers of PyTorch or Keras, of a function that makes a
    transformation of optax or an `npdrt.optim.Optimizer`, or of a function of the protocol."""
    known = KNOWN[name][1] if name in KNOWN else LibraryOptimizer(name)
    if derives(found, "torch.optim", "Optimizer"):
        return Torch(found, known, overrides, path)
    if derives(found, "keras", "Optimizer"):
        return Keras(found, known, overrides, path)
    if name in KNOWN or makes_transformation(found):
        return Optax(found, known, overrides, path)
    if not path and "." in name:
        raise Error(f"{name} is no optimizer of PyTorch or Keras, and makes none of optax; write a "
                    "file, path/to/file.py:callable")  # fmt: skip
    return (Factory if is_factory(found) else Function)(found, name, overrides, path)


def derives(found: Any, module: str, name: str) -> bool:
    """Whether something is a class that derives from one of a package, if that is imported."""
    base = getattr(sys.modules.get(module), name, None)
    if module == "keras":
        base = getattr(getattr(sys.modules.get(module), "optimizers", None), name, None)
    return base is not None and isinstance(found, type) and issubclass(found, base)


def makes_transformation(found: Any) -> bool:
    """Whether a callable returns a transformation of optax, if that is imported, when it is called
    with a learning rate."""
    if "optax" not in sys.modules:
        return False
    try:
        given = {signature_of(found).rate: 0.1}
        inspect.signature(found).bind(**given)
    except (TypeError, ValueError):
        return False
    return isinstance(found(**given), sys.modules["optax"].GradientTransformation)


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
