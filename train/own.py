"""Code of the user: Python files that a run names as `path/to/file.py:name`, a model or a rule, and
models that are given as a class.

npdrt runs such a file only if the user names it. A run keeps a digest of the code.
"""

from __future__ import annotations

import hashlib
import inspect
import shlex
import sys
import types
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from npdrt.errors import Error
from npdrt.regular import contents, require

AS_CLASS = "class"  # in place of the file, in the name of a model that was given as a class


class GivenClass(str):
    """The name of a model that was given as a class, with the class: a text for JSON."""

    found: Any


def given_class(found: Any, name: str = "") -> GivenClass:
    """The name of a class of the user; `name` is the one that a run has stored."""
    made = GivenClass(name or f"{AS_CLASS}:{found.__module__}.{found.__qualname__}")
    made.found = found
    return made


def given_for(name: str, found: Any) -> GivenClass:
    """A class that the user gives for the model that a run names. Raises `Error` for another."""
    if not file_of(name):
        raise Error(f"the run's model is npdrt's own {name}; leave out model={found.__name__}")
    if name.rpartition(":")[2].rpartition(".")[2] != found.__name__:
        raise Error(f"the run's model is {name}; got model={found.__name__}")
    return given_class(found, name)


def file_of(name: str) -> str:
    """The file in "path/to/file.py:name"; AS_CLASS of a class; "" in a name of npdrt's own."""
    return name.rpartition(":")[0]


def source_of(name: str) -> str:
    """The end of the name of the source file, as a traceback has it."""
    if isinstance(name, GivenClass):
        return str(name.found.__call__.__code__.co_filename)
    return file_of(name)


def found_in(name: str, kind: str) -> Any:
    """What "path/to/file.py:name" names, None if the file has no such name. kind: for messages.

    Cached bytecode is not used: it may be of another source than the one whose digest is stored.
    """
    if isinstance(name, GivenClass):
        return name.found
    file, _, attribute = name.rpartition(":")
    path = Path(file)
    source = _source(path)
    module = types.ModuleType(f"npdrt_user_{kind}_{path.stem}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # dataclasses look their module up by name
    try:
        exec(compile(source, str(path), "exec"), module.__dict__)
    except Exception as error:
        raise Error(f"{kind} file {path} does not run: {type(error).__name__}: {error}") from error
    return getattr(module, attribute, None)


def digest(name: str) -> str | None:
    """SHA-256 of the file in "path/to/file.py:name", or of the source of the methods of a class;
    None for a name of npdrt's own."""
    file = file_of(name)
    if not file:
        return None
    if isinstance(name, GivenClass) and file == AS_CLASS:
        source = _methods(name.found)
    else:
        source = _source(Path(source_of(name)))
    return hashlib.sha256(source).hexdigest()


def _methods(found: Any) -> bytes:
    """The source of a class's methods, without those that `dataclass` makes."""
    written = []
    for method in vars(found).values():
        with suppress(OSError, TypeError):  # a field, or a method without source
            written.append(inspect.getsource(method))
    return "".join(written).encode()


def require_code(names: Iterable[str], kind: str, code: Sequence[Path]) -> None:
    """Raise `Error` where a name is of a Python file that is not one of `code`."""
    allowed = [path.resolve() for path in code]
    for name in names:
        file = "" if isinstance(name, GivenClass) else file_of(name)
        if file == AS_CLASS:
            raise Error(
                f"the {kind} is a class, {name.rpartition(':')[2]}, that was given in Python; give "
                "it again, as in npdrt.open_run(RUN, model=Class)"
            )
        if file and Path(file).resolve() not in allowed:
            raise Error(
                f"the {kind} is Python code, {name}, and npdrt runs no code because a data file "
                f"names it; if you trust that file, repeat it: --code {shlex.quote(file)}"
            )


def _source(path: Path) -> bytes:
    require(path)
    return contents(path, follow=True)


def check_names(kind: str, given: Mapping[str, Any], known: list[str]) -> None:
    """Raise `Error`, with a suggestion, for a key of `given` that is not among `known`."""
    for name in given:
        if name not in known:
            close = get_close_matches(name, known, 1)
            every = f"known: {', '.join(known) or 'none'}"
            hint = f"did you mean {close[0]!r}?" if close else every
            raise Error(f"unknown {kind} {name!r}; {hint}")
