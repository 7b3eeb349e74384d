"""The processes of a run under `mpiexec`, its ranks, which share out the shards of each batch.

Every rank has the whole model, data and state, and computes the same updates from the same sums.
Rank 0 writes the files and reports. The sum over shards is that of one process, addition by
addition: a rank adds up the subtrees of `npdrt.train.shards.tree` that it holds, then each rank
adds the rest for its share of the elements, and all ranks gather these: two collective calls for
every window of elements, in which a rank sends 2 (P - 1) / P times the gradients, as in a ring, if
its shards are one subtree (docs/scaling.md).

Whatever ends one rank ends all, with its message: an error, a signal, its death, or no sign of life
for `SILENCE` beats.
"""

from __future__ import annotations

import hashlib
import sys
import threading
import time
import traceback
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import accumulate
from typing import Any

import numpy as np

from npdrt import launch
from npdrt.arrays import Array, Params, cuda, device_of, on_gpu, to_device, to_host
from npdrt.errors import Error, known
from npdrt.train.integers import Nccl
from npdrt.train.provenance import blas, packages
from npdrt.train.shards import Alone, Numbers, add, both_summed, held, roots, share, tree

BEAT = 1.0  # seconds between two signs of life
SILENCE = 7  # own signs of life without one of the rank before, after which that counts as lost
COMPARED_EVERY = 100  # steps
WINDOW = 1 << 18  # elements of a rank's share that are exchanged and added at once, in cache


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
        self._nccl: Nccl | None = None

    # --- shards ----------------------------------------------------------------------------

    def mine(self, count: int) -> range:
        """The shards of this rank, of so many: neighbours."""
        return share(self.rank, self.size, count)

    def summed(self, sums: dict[int, Params], count: int, like: Params) -> Params:
        """The sum of the gradients over the shards of all ranks, on every rank."""
        rows = [{name: np.asarray(to_host(x), order="C") for name, x in row.items()}
                for row in sums.values()]  # fmt: skip
        new = {name: np.empty(w.shape, str(w.dtype)) for name, w in like.items() if not rows}
        whole = rows[0] if rows else new  # without shards, in a short batch
        for dtype in dict.fromkeys(x.dtype for x in whole.values()):
            names = [name for name, x in whole.items() if x.dtype == dtype]
            flat = [Row([row[name] for name in names]) for row in rows]
            self._sum(dict(zip(sums, flat, strict=True)), count, Row([whole[n] for n in names]))
        return {name: to_device(x, device_of(like[name])) for name, x in whole.items()}

    def _sum(self, rows: dict[int, Row], count: int, whole: Row) -> None:
        """Write the sum of the rows of all ranks, added along the tree, to `whole`, which may be
        one of them: a window of every rank's share of the elements at a time."""
        places = [share(r, self.size, whole.size) for r in range(self.size)]
        for start in range(0, max(map(len, places)), WINDOW):
            parts = [place[start : start + WINDOW] for place in places]
            added = self._added(rows, count, parts, whole.dtype)
            total = np.empty(sum(map(len, parts)), dtype=whole.dtype)
            self._comm.Allgatherv(added, [total, [len(part) for part in parts]])
            for part, end in zip(parts, np.cumsum([len(part) for part in parts]), strict=True):
                whole.write(part, total[end - len(part) : end])

    def _added(self, rows: dict[int, Row], count: int, parts: list[range], dtype: Any) -> Any:
        """The elements that this rank adds, of the rows of all ranks; every rank adds a part."""
        shares = [share(r, self.size, count) for r in range(self.size)]
        others = [0 if r == self.rank else len(roots(shares[r], count)) for r in range(self.size)]
        own = parts[self.rank]
        out = [0 if r == self.rank else len(rows) * len(part) for r, part in enumerate(parts)]
        sent = [row.read(parts[r]) for r, n in enumerate(out) if n for row in rows.values()]
        came = np.empty((sum(others), len(own)), dtype=dtype)
        self._comm.Alltoallv(
            [np.concatenate(sent or [came[:0, 0]]), out], [came, [n * len(own) for n in others]]
        )
        away = [s for r in range(self.size) if r != self.rank for s in roots(shares[r], count)]
        found = dict(zip(away, came, strict=True)) | {s: row.read(own) for s, row in rows.items()}
        done = {a for r in shares for a in held(r, count)}
        add(found, [a for a in tree(0, count) if a not in done])
        return found[0]

    def reduced(self, x: Array, operation: str) -> Array:
        """The "sum" or "max" of an array of int64 or float64 over all ranks, by NCCL on a GPU."""
        if on_gpu(x):
            self._nccl = self._nccl or Nccl(cuda(), self)
            return self._nccl(x, operation)
        whole = np.array(x)
        does = self._mpi.MAX if operation == "max" else self._mpi.SUM
        self._comm.Allreduce(self._mpi.IN_PLACE, whole, op=does)
        return whole

    def numbers(
        self, numbers: dict[int, Numbers], count: int, buffers: Params, like: Params
    ) -> tuple[Array, Array, Params]:
        """The sums of loss and correct predictions over the shards of all ranks, and the buffers of
        shard 0, on every rank."""
        own = {s: (to_host(loss), to_host(correct)) for s, (loss, correct) in numbers.items()}
        told = self._comm.allgather((own, {n: to_host(b) for n, b in buffers.items()}))
        every = {s: pair for part, _ in told for s, pair in part.items()}
        device = device_of(next(iter(like.values())))
        loss, correct = (to_device(x, device) for x in both_summed(every, count))
        return loss, correct, {n: to_device(b, device) for n, b in told[0][1].items()}

    # --- agreement ---------------------------------------------------------------------------

    def agreed(self, stop: Callable[[], int]) -> Callable[[], int]:
        """A `stop` that returns the largest signal of any rank, on all."""
        return lambda: int(self._comm.allreduce(stop(), op=self._mpi.MAX))

    def joined(self, found: list[Any]) -> list[Any]:
        """What every rank found, from the first rank to the last, on all; tuples of arrays."""
        own = [tuple(map(to_host, arrays)) for arrays in found]
        return [arrays for every in self._comm.allgather(own) for arrays in every]

    def told(self, value: Any) -> Any:
        """The value of rank 0, on all."""
        return self._comm.bcast(value, root=0)

    def require_alike(self, what: Mapping[str, Any], *, software: bool) -> None:
        """Raise `Error` unless all ranks have these same things, and the same software if asked."""
        own = {**what, **({"BLAS": blas(), "packages": packages()} if software else {})}
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


class Row:
    """Arrays of one dtype as one row of elements, one array after another."""

    def __init__(self, arrays: Sequence[Any]):
        self._flat = [x.reshape(-1) for x in arrays]
        self._ends = list(accumulate(x.size for x in self._flat))
        self.size, self.dtype = self._ends[-1], arrays[0].dtype

    def read(self, part: range) -> Any:
        """A copy of some elements; (elements,)."""
        return np.concatenate(list(self._cut(part)))

    def write(self, part: range, values: Any) -> None:
        """Set some elements; values: (elements,)."""
        for x in self._cut(part):
            x[...], values = values[: x.size], values[x.size :]

    def _cut(self, part: range) -> Iterator[Any]:
        """The parts of the arrays that hold some elements."""
        first, last = bisect_right(self._ends, part.start), bisect_left(self._ends, part.stop)
        for x, end in zip(self._flat[first : last + 1], self._ends[first:], strict=False):
            start = end - x.size
            yield x[max(part.start - start, 0) : max(part.stop - start, 0)]


def _digest(value: Array) -> str:
    data = np.ascontiguousarray(to_host(value)).tobytes()
    return hashlib.blake2b(data, digest_size=8).hexdigest()
