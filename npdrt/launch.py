"""Ranks, as `mpiexec` starts them: how many there are, and how they come together.

MPI waits for a rank that does not come for ever. So while ranks come together each one looks
whether another one of its machine was stopped or has ended, and a rank that fails before it has met
the others meets them to end them.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from signal import SIGKILL
from typing import Any

from npdrt.errors import Unavailable

LAUNCHERS = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE")  # MPICH and its kind; Open MPI
LOOK = 1.0  # seconds between two looks at the others
PATIENCE = 60.0  # seconds for which ranks wait for one another
FORWARDED = 0.3  # seconds in which `mpiexec` has read a message


def size() -> int:
    """How many ranks `mpiexec` has started; 1 without it."""
    return max((int(os.environ.get(name, 1)) for name in LAUNCHERS), default=1)


@cache
def mpi() -> Any:
    """The module MPI, once all ranks have come; `Unavailable` without mpi4py or its library."""
    try:
        import mpi4py

        mpi4py.rc.initialize, mpi4py.rc.finalize = False, True
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # there is none, or no library
        raise Unavailable(
            'a run under mpiexec needs mpi4py and MPI; install both with pip install "npdrt[mpi]" '
            f"({str(error).splitlines()[0]})"
        ) from error
    if not MPI.Is_initialized():
        _initialise(MPI)
    if MPI.COMM_WORLD.Get_size() != size():
        name = " ".join(MPI.Get_library_version().split()[:3])
        raise Unavailable(
            f"mpiexec started {size()} ranks, and mpi4py's library ({name}) knows of "
            f"{MPI.COMM_WORLD.Get_size()}: they are of two MPIs; use the mpiexec of that library"
        )
    if MPI.Query_thread() < MPI.THREAD_MULTIPLE:
        raise Unavailable("ranks need an MPI with threads (MPI_THREAD_MULTIPLE); use another one")
    return MPI


def _initialise(MPI: Any) -> None:
    """MPI_Init_thread, but without Python's lock, which mpi4py would hold: `_watch` needs it."""
    got = ctypes.c_int()
    with coming_together():
        ctypes.CDLL(MPI.__file__).MPI_Init_thread(
            None, None, int(MPI.THREAD_MULTIPLE), ctypes.byref(got)
        )
    MPI.COMM_WORLD.Set_errhandler(MPI.ERRORS_RETURN)  # raise, as mpi4py does


def give_up(error: BaseException) -> None:
    """End all ranks, if an error ends this one before it has met the others."""
    code = error.code if isinstance(error, SystemExit) else 1
    if not code or size() < 2 or mpi.cache_info().currsize:
        return
    if not isinstance(error, SystemExit):
        traceback.print_exception(error)
    with suppress(Unavailable):  # then the others see that this one has gone
        abort(mpi(), code if isinstance(code, int) else 1)


def abort(MPI: Any, code: int) -> None:
    """End all ranks, after what they have written."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    time.sleep(FORWARDED)
    MPI.COMM_WORLD.Abort(code)
    os._exit(code)  # an abort may return before the process ends


@contextmanager
def coming_together() -> Iterator[None]:
    """Inside, the launcher ends all ranks if one of this machine was stopped or has ended, or if
    the ranks are not together in a minute."""
    over = threading.Event()
    threading.Thread(target=_watch, args=(over,), daemon=True).start()
    try:
        yield
    finally:
        over.set()


def _watch(over: threading.Event) -> None:
    seen: set[int] = set()
    missed: set[int] = set()
    deadline = time.monotonic() + PATIENCE
    while not over.wait(LOOK):
        states = _states()
        seen |= states.keys()
        lost = {process for process in seen if states.get(process, "Z") in "TZ"}
        speaks = os.getpid() == min(seen - missed, default=os.getpid())  # one ends after it spoke
        if speaks and (found := missed & lost):  # twice: all may have been stopped, and go on
            _end(f"process {min(found)} was stopped or has ended")
        if speaks and time.monotonic() > deadline:
            _end(f"{size()} ranks were not together in {PATIENCE:.0f} s")
        missed = lost


def _end(what: str) -> None:
    """Let the launcher end all ranks: it does if a signal ends one."""
    sys.stderr.write(f"Error: {what}, while the ranks were coming together\n")
    sys.stderr.flush()
    time.sleep(FORWARDED)
    os.kill(os.getpid(), SIGKILL)


def _states() -> dict[int, str]:
    """The state of every rank of this machine, by process: "T" is stopped, "Z" has ended. Only on
    Linux."""
    try:
        parent, mine = os.getppid(), Path("/proc/self/cmdline").read_bytes()
        children = Path(f"/proc/{parent}/task/{parent}/children").read_text(encoding="ascii")
    except OSError:
        return {}
    found = {}
    for process in children.split():
        with suppress(OSError):  # it has just ended
            place = Path("/proc", process)
            if (place / "cmdline").read_bytes() == mine:
                state = (place / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
                found[int(process)] = state
    return found
