"""Python files of the user, which a run names as `path/to/file.py:name`: a model, or a rule.

npdrt runs such a file only if the user names it, and a run keeps the file's digest.
"""

from __future__ import annotations

import hashlib
import shlex
import sys
import types
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from npdrt.errors import Error
from npdrt.regular import contents, require


def file_of(name: str) -> str:
    """The file in "path/to/file.py:name"; "" in a name of npdrt's own."""
    return name.rpartition(":")[0]


def found_in(name: str, kind: str) -> Any:
    """What "path/to/file.py:name" names, None if the file has no such name. kind: for messages.

    Cached bytecode is not used: it may be of another source than the one whose digest is stored.
    """
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
    """SHA-256 of the file in "path/to/file.py:name"; None for a name of npdrt's own."""
    file = file_of(name)
    return hashlib.sha256(_source(Path(file))).hexdigest() if file else None


def require_code(names: Iterable[str], kind: str, code: Sequence[Path]) -> None:
    """Raise `Error` where a name is of a Python file that is not one of `code`."""
    allowed = [path.resolve() for path in code]
    for name in names:
        file = file_of(name)
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
