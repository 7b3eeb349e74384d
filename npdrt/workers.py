"""Fresh interpreters for work that may crash or hang; nothing of them is left behind.

The optimizers that an audit asks and the reader of HDF5 files run in one each. A sweep has a pool
of the standard library, whose workers know when their parent has gone.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any


class Worker:
    """A Python process in a session of its own, until `close`.

    Ctrl-C does not reach it, and the processes that it starts end with it. arguments: those of
    `python`. streams: keyword arguments of `subprocess.Popen`.
    """

    def __init__(self, *arguments: str, **streams: Any):
        self.late = False  # a time limit has passed
        self.process = subprocess.Popen(
            [sys.executable, *arguments],
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            **streams,
        )

    @contextmanager
    def within(self, seconds: float) -> Iterator[None]:
        """Kill the worker if the block takes longer: a pipe to it or from it then breaks."""
        timer = threading.Timer(seconds, self._expire)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
            timer.join()  # so that it has passed or will not

    def _expire(self) -> None:
        self.late = True
        self._kill()

    def _kill(self) -> None:
        """End the process and those that it has started."""
        with suppress(ProcessLookupError, PermissionError, AttributeError):  # Windows: no groups
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()

    def ending(self) -> str:
        """How the process ended: "exit code 1", "killed by SIGSEGV"; "" if it is still running."""
        try:
            code = self.process.wait(1)
        except subprocess.TimeoutExpired:
            return ""
        name = f"signal {-code}"
        with suppress(ValueError):  # real-time signals have no names
            name = signal.Signals(-code).name
        return f"killed by {name}" if code < 0 else f"exit code {code}"

    def close(self) -> None:
        """End the process and those that it has started."""
        with self.process:  # which closes its streams and waits for it
            self._kill()


def end_with(parent: int) -> None:
    """Kill this process, a worker, and those that it has started once its parent has gone.

    A thread looks for that: only Linux would send a signal (prctl), and only to this process.
    """
    threading.Thread(target=_watch, args=(parent,), daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.2)
    os.killpg(0, signal.SIGKILL)
