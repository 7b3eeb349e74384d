"""The processes of a run under `mpiexec`, its ranks, which share out the shards of each batch.

Every rank has the whole model, data and state, and computes the same updates from the same sums.
Rank 0 writes the files and reports. The sum over shards is that of one process, addition by
addition: a rank adds up the subtrees of `npdrt.train.shards.tree` that it holds, then each rank
adds the rest for its share of the elements, and all ranks gather these: two collective calls, in
which a rank sends about 2 (P - 1) / P times the gradients, as in a ring.

Whatever ends one rank ends all, with its message: an error, a signal, its death, or no sign of life
for `SILENCE` beats.
"""

from __future__ import annotations

import hashlib
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np

from npdrt import launch
from npdrt.arrays import Array, Params, device_of, to_device, to_host
from npdrt.errors import Error, known
from npdrt.train.provenance import blas, packages
from npdrt.train.shards import Alone, add, share, tree

BEAT = 1.0  # seconds between two signs of life
SILENCE = 7  # own signs of life without one of the rank before, after which that counts as lost
COMPARED_EVERY = 100  # steps


@cache
def ranks() -> Alone:
    """The ranks that `mpiexec` has started; one alone without it. `Unavailable` without mpi4py."""
    return Alone() if launch.size() < 2 else Ranks(launch.mpi())


class Ranks(Alone):
    """This process among the ranks of `MPI.COMM_WORLD`."""

    def __init__(self, mpi: Any):
        self._mpi, self._watched = mpi, False
        with launch.coming_together():
            self._comm, self._beats = mpi.COMM_WORLD.Dup(), mpi.COMM_WORLD.Dup()
        self.rank, self.size = self._comm.Get_rank(), self._comm.Get_size()

    # --- shards ----------------------------------------------------------------------------

    def mine(self, count: int) -> range:
        """The shards of this rank, of so many: neighbours."""
        return share(self.rank, self.size, count)

    def summed(self, parts: dict[int, dict[str, Any]], count: int) -> dict[str, Any]:
        """The sum over the shards of all ranks, on every rank."""
        like = next((part["bucket"] for part in parts.values()), None)
        device = device_of(like)
        rows = {s: np.asarray(to_host(part["bucket"])) for s, part in parts.items()}
        small = {s: (to_host(part["loss"]), to_host(part["correct"])) for s, part in parts.items()}
        buffers = {n: to_host(b) for n, b in parts[0]["buffers"].items()} if 0 in parts else None
        told = self._comm.allgather((small, buffers, _form(rows)))
        every = {s: pair for part, _, _ in told for s, pair in part.items()}
        found = {"bucket": self._sum(rows, count, next(filter(None, (f for _, _, f in told))))}
        for i, name in enumerate(("loss", "correct")):
            numbers = {s: pair[i] for s, pair in every.items()}
            add(numbers, list(tree(0, count)))
            found[name] = np.asarray(numbers[0])
        moved = {name: to_device(x, device) for name, x in found.items()}
        first = next(buffers for _, buffers, _ in told if buffers is not None)
        return moved | {"buffers": {n: to_device(b, device) for n, b in first.items()}}

    def _sum(self, rows: dict[int, Any], count: int, form: tuple[int, str]) -> Any:
        """The rows of all ranks, added along the tree; (elements,)."""
        (length, dtype), size = form, self.size
        shares = [share(r, size, count) for r in range(size)]
        held = [[a for a in tree(0, count) if r.start <= a[0] and a[2] <= r.stop] for r in shares]
        add(rows, held[self.rank])
        roots = [_roots(r, local) for r, local in zip(shares, held, strict=True)]
        places = [share(r, size, length) for r in range(size)]  # the elements that a rank adds
        own = len(places[self.rank])
        sent = np.concatenate([_rows(rows, place, dtype) for place in places])
        out = [len(rows) * len(place) for place in places]
        came = np.empty(sum(len(r) for r in roots) * own, dtype=dtype)
        self._comm.Alltoallv([sent, out], [came, [len(r) * own for r in roots]])
        order = [s for r in roots for s in r]
        mine = dict(zip(order, came.reshape(len(order), own), strict=True))
        done = {a for local in held for a in local}
        add(mine, [a for a in tree(0, count) if a not in done])
        whole = np.empty(length, dtype=dtype)
        self._comm.Allgatherv(
            np.ascontiguousarray(mine[0]), [whole, [len(place) for place in places]]
        )
        return whole

    # --- agreement ---------------------------------------------------------------------------

    def agreed(self, stop: Callable[[], int]) -> Callable[[], int]:
        """A `stop` that returns the largest signal of any rank, on all."""
        return lambda: int(self._comm.allreduce(stop(), op=self._mpi.MAX))

    def told(self, value: Any) -> Any:
        """The value of rank 0, on all."""
        return self._comm.bcast(value, root=0)

    def require_alike(self, what: Mapping[str, Any]) -> None:
        """Raise `Error` unless all ranks have the same software and these same things."""
        own = {**what, "BLAS": blas(), "packages": packages()}
        every = self._comm.allgather(own)
        for rank, found in enumerate(every):
            for name, value in every[0].items():
                if found[name] != value:
                    raise Error(
                        f"rank {rank} has another {name} than rank 0, so that bits would part: "
                        f"{found[name]}, and {value}; start all ranks in the same environment"
                    )

    def compare(self, step: int, params: Params) -> None:
        """Now and then, raise `Error` if the parameters of the ranks have parted."""
        if step % COMPARED_EVERY:
            return
        own = {name: _digest(value) for name, value in params.items()}
        every = self._comm.allgather(own)
        for rank, found in enumerate(every):
            parted = [name for name, digest in every[0].items() if found[name] != digest]
            if parted:
                raise Error(
                    f"after step {step} {parted[0]} of rank {rank} differs from that of rank 0; "
                    "its memory or processor may be at fault: go on with --resume elsewhere"
                )

    # --- one end for all -----------------------------------------------------------------------

    @contextmanager
    def together(self) -> Iterator[None]:
        """Inside, a rank that fails or falls silent ends all ranks."""
        if self._watched:  # by the caller
            yield
            return
        self._watched, over = True, threading.Event()
        beating = threading.Thread(target=self._watch, args=(over,), daemon=True)
        beating.start()
        try:
            yield
            self._comm.Barrier()  # nobody is watched who has left
        except BaseException as error:
            self._end(error)
        finally:
            self._watched = False
            over.set()
            beating.join()

    def _end(self, error: BaseException) -> None:
        """Say what happened, and end all ranks."""
        if self.rank or isinstance(error, self._mpi.Exception):
            time.sleep(1.0)  # if all fail alike, rank 0 speaks; if a lost rank is why, the launcher
        error = known(error)
        code = 130 if isinstance(error, KeyboardInterrupt) else getattr(error, "exit_code", None)
        if code is None:
            traceback.print_exception(error)
        what = "" if hasattr(error, "exit_code") else f"{type(error).__name__}: "
        self._abort(f"rank {self.rank}: {what}{error}", 1 if code is None else code)

    def _abort(self, text: str, code: int) -> None:
        sys.stderr.write(f"Error: {text}\n")
        launch.abort(self._mpi, code)

    def _watch(self, over: threading.Event) -> None:
        """Send signs of life to the next rank, and wait for those of the one before."""
        after, before = (self.rank + 1) % self.size, (self.rank - 1) % self.size
        mine, came, silent = np.zeros(1), np.zeros(1), 0
        coming = self._beats.Irecv(came, source=before)
        while not over.wait(BEAT):  # counted, not timed: this process may have been stopped, too
            self._beats.Isend(mine, dest=after).Free()
            silent += 1
            while coming.Test():
                silent, coming = 0, self._beats.Irecv(came, source=before)
            if silent > SILENCE:
                text = f"rank {before} gives no sign of life; it was killed, stopped or overloaded"
                self._abort(f"{text} (rank {self.rank} says so)", 1)
        coming.Cancel()
        coming.Wait()


def _roots(shards: range, held: list[Any]) -> list[int]:
    """The rows that a rank is left with after its own additions."""
    gone = {middle for _, middle, _ in held}
    return [s for s in shards if s not in gone]


def _rows(rows: dict[int, Any], place: range, dtype: str) -> Any:
    """Some elements of the rows, one row after another; (rows * elements,)."""
    if not rows:
        return np.empty(0, dtype=dtype)
    return np.concatenate([rows[s][place.start : place.stop] for s in sorted(rows)])


def _form(rows: dict[int, Any]) -> tuple[int, str] | None:
    return next(((len(row), str(row.dtype)) for row in rows.values()), None)


def _digest(value: Array) -> str:
    data = np.ascontiguousarray(to_host(value)).tobytes()
    return hashlib.blake2b(data, digest_size=8).hexdigest()
