"""Processes that decode the images of a batch.

The pixels are those of `decode.here`, whatever the number of processes: which images are in a
batch, and how each is cut, is decided before. The processes send pixels through pipes straight into
the batch, so that they need no shared memory and hold one image each.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from queue import SimpleQueue
from threading import Lock
from types import TracebackType
from typing import Any

import numpy as np

from npdrt.data.decode import Picture, here, pixels
from npdrt.data.scale import Array
from npdrt.errors import Unavailable
from npdrt.workers import Worker

REQUEST = 8  # pictures at a time: a process that is free takes the next ones
_PROGRAM = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from npdrt.data.decoders import serve; serve()"
)


class Decoders:
    """`decode.here` by so many processes, while it is entered; else, and for 0, in this one.

    The processes start with the first call and end with the block. An error of one of them is
    raised here: `FileRefused` for the first picture in order that is refused, `Unavailable` if a
    process ends before it answers.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._entered = False
        self._decoders: list[_Decoder] = []
        self._idle: SimpleQueue[_Decoder] = SimpleQueue()
        self._threads: ThreadPoolExecutor | None = None  # one waits for each process
        self._starting = Lock()  # an evaluation and the next batches ask at the same time

    def __enter__(self) -> Decoders:
        self._entered = True
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._entered = False
        for decoder in self._decoders:
            decoder.close()
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)
        self._threads, self._decoders, self._idle = None, [], SimpleQueue()

    def __call__(self, pictures: Sequence[Picture]) -> Array:
        """The pixels of some pictures of one size; bytes (n, 3, size, size)."""
        if not (self._entered and self.count and pictures):
            return here(pictures)
        size = pictures[0].size
        out = np.empty((len(pictures), 3, size, size), np.uint8)
        with self._starting:
            threads = self._threads or self._start()
        parts = [slice(start, start + REQUEST) for start in range(0, len(pictures), REQUEST)]
        made = [threads.submit(self._fill, pictures[part], out[part]) for part in parts]
        _finish(made)
        return out

    def _start(self) -> ThreadPoolExecutor:
        self._decoders = [_Decoder() for _ in range(self.count)]
        for decoder in self._decoders:
            self._idle.put(decoder)
        self._threads = ThreadPoolExecutor(self.count, thread_name_prefix="npdrt-decoders")
        return self._threads

    def _fill(self, pictures: Sequence[Picture], out: Array) -> None:
        decoder = self._idle.get()
        try:
            decoder.fill(pictures, out)
        finally:
            self._idle.put(decoder)


def _finish(made: Sequence[Future[None]]) -> None:
    """Wait for all requests; if one fails drop the later ones, and raise the first error in their
    order."""
    _, waiting = wait(made, return_when=FIRST_EXCEPTION)
    for future in waiting:
        future.cancel()  # requests are taken in order, so no earlier one waits
    wait(made)
    for future in made:
        if not future.cancelled():
            future.result()


class _Decoder:
    """One process: pictures go to it, and their pixels come back.

    An answer is the length of an error in 4 bytes and the error, which ends a request; or the
    length 0 and the bytes of a picture.
    """

    def __init__(self) -> None:
        words = "-P", "-c", _PROGRAM, json.dumps(sys.path)
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._worker = Worker(*words, **pipes, env={**os.environ, "OPENBLAS_NUM_THREADS": "1"})
        self._to, self._from = self._worker.process.stdin, self._worker.process.stdout

    def fill(self, pictures: Sequence[Picture], out: Array) -> None:
        """Put the pixels of some pictures into `out`, bytes (n, 3, size, size)."""
        try:
            met = self._ask(pictures, out)
        except (OSError, EOFError) as error:
            how = self._worker.ending() or "its pipe is broken"
            raise Unavailable(
                f"a process that decodes images ended ({how}) while it had {pictures[0].path} and "
                f"the {len(pictures) - 1} after it; if memory is short, give fewer --decoders; "
                "--resume goes on from the last checkpoint"
            ) from error
        if met is not None:
            raise met

    def _ask(self, pictures: Sequence[Picture], out: Array) -> Exception | None:
        """The exchange of a request; returns the error that the process met."""
        assert self._to is not None
        pickle.dump([tuple(picture) for picture in pictures], self._to)
        self._to.flush()
        for row in out:
            if length := int.from_bytes(self._take(bytearray(4))):
                error: Exception = pickle.loads(self._take(bytearray(length)))
                return error
            self._take(row.data.cast("B"))
        return None

    def _take(self, into: Any) -> Any:
        """Fill a buffer with the next bytes; `EOFError` if the process ends before that."""
        stream: Any = self._from
        if stream.readinto(into) != len(into):
            raise EOFError
        return into

    def close(self) -> None:
        """End the process."""
        with contextlib.suppress(OSError):  # a request that it did not read
            self._worker.close()


# In such a process


def serve() -> None:
    """Answer requests until there are no more: the parent has closed the pipe, or has gone."""
    while (pictures := _request()) is not None:
        for picture in pictures:
            error, content = _answer(Picture(*picture))
            sys.stdout.buffer.write(len(error).to_bytes(4) + error)
            sys.stdout.buffer.write(content)
            if error:
                break
        sys.stdout.buffer.flush()


def _request() -> Any:
    try:
        return pickle.load(sys.stdin.buffer)
    except EOFError:
        return None


def _answer(picture: Picture) -> tuple[bytes, Any]:
    """The error that decoding meets, or no bytes; and the pixels, or no bytes."""
    try:
        return b"", np.ascontiguousarray(pixels(picture)).data
    except Exception as error:
        return pickle.dumps(error), b""
