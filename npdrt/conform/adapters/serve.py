"""The loop of the child process that `npdrt.conform.targets` starts: a case in, an outcome out.

An optimizer that prints, changes, breaks or never finishes something does it there.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from traceback import walk_tb
from typing import Any

import numpy as np

from npdrt.conform.adapters.adapter import Adapter, Unanswered
from npdrt.conform.adapters.load import load
from npdrt.conform.case import Answer, Case, Failure, Outcome
from npdrt.errors import Error
from npdrt.workers import end_with

LONGEST = 300  # characters of a message
LONG = 500  # steps above which a case is run once


def serve(descriptor: int, parent: int) -> None:
    """Answer requests on a connection until it closes; end with the parent, whatever happens.

    The first request is (source, overrides); its reply is ("ready", Info) or ("error",
    message). Every other is (number, Case), and its reply (number, Outcome).
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when to stop
    end_with(parent)
    connection: Connection[Any, Any] = Connection(descriptor)
    adapter = loaded(connection)
    while adapter is not None:
        try:
            number, case = connection.recv()
        except EOFError:
            return
        connection.send((number, outcome(adapter, case)))


def loaded(connection: Connection[Any, Any]) -> Adapter | None:
    """The adapter that the first request names; None, after sending the reason, if it fails."""
    source, overrides = connection.recv()
    try:
        adapter = load(source, overrides)
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
