"""The runs of a sweep on a cluster of Dask: one run a task (extra `dask`).

Workers need the files: a folder that all of them see, and npdrt. A run whose worker is lost goes to
another one, which resumes it from its last checkpoint; the lock of its directory keeps two workers,
or two sweeps, from making one run.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from npdrt.errors import Error, Unavailable

POLL = 0.2  # seconds between looks at the tasks
ASKED_EVERY = 1.0  # seconds between two looks of a worker for a signal
LOSSES = 100  # of workers, with which a run is still tried
GONE = 60.0  # seconds without any worker, after which a local cluster is given up


class Signal:
    """The signal that ended the sweep, as its workers see it: `value`, 0 while there is none."""

    def __init__(self, name: str):
        self._name, self._value, self._asked = name, 0, 0.0

    @property
    def value(self) -> int:
        """The number of the signal."""
        if time.monotonic() - self._asked > ASKED_EVERY:
            from distributed import Event

            self._value, self._asked = 2 * Event(self._name).is_set(), time.monotonic()
        return self._value


@contextmanager
def client_of(address: str, jobs: int) -> Iterator[Any]:
    """A client of the scheduler at `address`, or of `jobs` processes of this machine: "local"."""
    try:
        import dask
        import distributed
    except ImportError as error:
        raise Unavailable(
            'a sweep on Dask needs distributed; install it with pip install "npdrt[dask]"'
        ) from error
    if address == "local":
        losses = {"distributed.scheduler.allowed-failures": LOSSES}
        with (
            dask.config.set(losses),
            _local_cluster(jobs) as cluster,
            distributed.Client(cluster) as client,
        ):
            yield client
        return
    try:
        client = distributed.Client(address, timeout="10s")
    except (OSError, ValueError) as error:
        raise Error(f"no Dask scheduler answers at {address}: {error}; start one with "
                    "`dask scheduler`, or give --dask local") from error  # fmt: skip
    with client:
        yield client


def _local_cluster(jobs: int) -> Any:
    from distributed import LocalCluster

    try:
        return LocalCluster(n_workers=jobs, threads_per_worker=1, dashboard_address=None)
    except RuntimeError as error:
        raise Unavailable(
            f"Dask's local cluster did not start: {error}; give the same command again"
        ) from error


def working(
    task: Callable[..., None],
    todo: Sequence[Any],
    options: Any,
    steps: Any,
    stop: Callable[[], int],
    futures: list[Any],
) -> Iterator[None]:
    """Make all runs; yields now and then until all futures, one for each, are done.

    task: called as `task(index, run, options, name of the signal)` on a worker. steps: is given the
    steps of the finished runs. Waits for the workers to save after a signal.
    """
    from distributed import Event

    name = f"npdrt-{uuid.uuid4().hex}"
    with client_of(options.dask, max(1, min(options.jobs, len(todo)))) as client:
        seen = time.monotonic()
        signalled = Event(name, client=client)
        futures += [
            client.submit(task, i, run, options, name, key=f"{name}-{i}", pure=False)
            for i, run in enumerate(todo)
        ]
        while not all(future.done() for future in futures):
            yield
            time.sleep(POLL)
            for i, future in enumerate(futures):
                steps[i] = todo[i].steps * future.done()
            if stop():
                signalled.set()
            if client.cluster is None or client.cluster.scheduler_info["workers"]:
                seen = time.monotonic()  # a worker that is lost while it starts is not replaced
            if time.monotonic() - seen > GONE:
                raise Error("Dask has lost all local workers; give the same command to go on")
        client.gather(futures, errors="skip")
        ended = [future.exception() if future.status == "error" else None for future in futures]
    futures[:] = [_Ended(error) for error in ended]
    yield


class _Ended:
    """What is left of a future when the cluster has gone."""

    def __init__(self, error: BaseException | None):
        self._error = error

    def exception(self) -> BaseException | None:
        return self._error

    def cancelled(self) -> bool:
        return False
