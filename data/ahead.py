"""Making the next batches on a thread while a step runs."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, TypeVar

T = TypeVar("T")

AHEAD = 2  # batches


class Ahead(Generic[T]):
    """`make(step)`, while a thread makes the values of the next steps; a context manager.

    make: a pure function of the step, so that its value does not depend on the thread. It is
    called only with steps below `end`. ahead: the most values that wait; 0 means no thread. An
    exception in `make` is raised when its step is asked for. Leaving the context waits for the
    value in progress, drops the others and ends the thread; a later call starts a new one.
    """

    def __init__(self, make: Callable[[int], T], end: int, ahead: int = AHEAD) -> None:
        self.make, self.end, self.ahead = make, end, ahead
        self._pool: ThreadPoolExecutor | None = None
        self._waiting: dict[int, Future[T]] = {}

    def __enter__(self) -> Ahead[T]:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        waiting, self._waiting = self._waiting, {}
        for future in waiting.values():
            future.cancel()
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None

    def __call__(self, step: int) -> T:
        if not self.ahead:
            return self.make(step)
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="npdrt-batches")
        wanted = range(step, max(step + 1, min(step + self.ahead + 1, self.end)))
        for other in self._waiting.keys() - set(wanted):
            self._waiting.pop(other).cancel()
        for number in wanted:
            if number not in self._waiting:
                self._waiting[number] = self._pool.submit(self.make, number)
        return self._waiting.pop(step).result()
