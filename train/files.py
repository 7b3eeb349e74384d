"""The run directory: log, checkpoints, trace and snapshots of a run, and going on from them.

    log.jsonl                    every record, as it happens
    checkpoint.h5                all that decides the next step
    checkpoint.prev.h5           the checkpoint before it
    trace.h5                     the log as tables
    snapshots/step-000240.h5     parameters after a step that the configuration names
    images/step-000240.png       what a generator makes, before the first epoch and after every one

A checkpoint holds parameters, buffers, optimizer state, schedule, the step number (which names the
position in the data order and every random mask) and the sums of the unfinished epoch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

from npdrt import atomic, compute, cudnn, schema, store
from npdrt.arrays import to_device, to_host
from npdrt.data import Expected
from npdrt.errors import Error, FileRefused
from npdrt.optim.schedules import Schedule
from npdrt.store import Checkpoint, lock, log, png, trace
from npdrt.store.digest import digests
from npdrt.store.log import Record, Tally
from npdrt.train.config import RUN_FORMAT, Config, model_digest
from npdrt.train.feed import Feed
from npdrt.train.provenance import blas_in_words, provenance, same_blas
from npdrt.train.rules import rule_digests
from npdrt.train.step import Position, State, epoch_sums

OF_A_RUN = {"log.jsonl", "checkpoint.h5", "checkpoint.prev.h5"}  # one of them is in every run
GROWTH = 1.25  # of the log, after which the trace is written again: that costs the whole history


class RunFiles:
    """The files of a run in the directory `out`."""

    def __init__(self, out: Path, config: Config, feed: Feed):
        self.out, self._config, self._feed = out, config, feed
        self._model_file = model_digest(config)  # now: the file may change while the run goes on
        self._rule_files = rule_digests(config.optimizer, config.groups)
        self._expected = Expected.of(feed.dataset).as_dict()
        self._traced = 0  # bytes of the log when the trace was written last
        self._earlier: list[Any] = []  # BLAS libraries that made steps before this process

    # --- the log -------------------------------------------------------------------------

    @contextmanager
    def logging(self, tally: Tally | None) -> Iterator[None]:
        """Open the log. tally: the counts of the records in it; None for a new run."""
        with log.Log(self.out / "log.jsonl", tally) as self._log:
            yield

    @property
    def begun(self) -> bool:
        """Whether the log holds a record."""
        return bool(self._log.tally.records)

    def write(self, record: Record) -> None:
        """Append a record to the log."""
        self._log.write(record)

    # --- checkpoints ---------------------------------------------------------------------

    def save(self, at: Position, *, ends: bool = False) -> None:
        """Write a checkpoint, and before it the trace if the log has grown by a quarter since the
        last trace or the run ends. The log is synced first, so it always covers both. The
        checkpoint is last, so that a finished run has its whole trace."""
        self._log.sync()
        if ends or self._log.size >= GROWTH * self._traced:
            self.write_trace(at)
        store.save(
            self.out / "checkpoint.h5",
            at.state.params,
            buffers=at.state.buffers,
            state=at.state.optimizer,
            meta=self._meta(self._progress(at) | self._resumable(at)),
            keep_previous=self.out / "checkpoint.prev.h5",
        )

    def certify(self, at: Position) -> None:
        """Append the digests of the arrays to the log of a portable run, for `npdrt verify`."""
        if self._config.arithmetic != "portable":
            return
        state = at.state
        groups = {"params": state.params, "buffers": state.buffers, "state": state.optimizer}
        epoch = at.step // self._feed.epoch
        self.write({"event": "digests", "step": at.step, "epoch": epoch, "arrays": digests(groups)})

    def write_trace(self, at: Position) -> None:
        """Write the log as tables."""
        trace.write(self.out / "trace.h5", log.read(self._log.path), list(at.state.params))
        self._traced = self._log.size

    def snapshot(self, at: Position) -> None:
        """Keep the parameters of a step that the configuration names, for `npdrt perturb`."""
        if at.step not in self._config.snapshots:
            return
        path = self._at_step("snapshots", at, "h5")
        meta = self._meta(self._progress(at))
        store.save(path, at.state.params, buffers=at.state.buffers, meta=meta)

    def picture(self, at: Position, pixels: Any) -> None:
        """Write the picture of a step."""
        atomic.replace(self._at_step("images", at, "png"), png.encode(pixels))

    def _at_step(self, folder: str, at: Position, kind: str) -> Path:
        """The file of a step, in a folder that exists."""
        path = self.out / folder / f"step-{at.step:06d}.{kind}"
        path.parent.mkdir(exist_ok=True)
        return path

    def _progress(self, at: Position) -> dict[str, Any]:
        epoch = at.step / self._feed.epoch
        return {"step": at.step, "steps": self._feed.steps, "epoch": epoch}

    def _resumable(self, at: Position) -> dict[str, Any]:
        """The progress that a run needs to go on, apart from the step."""
        return {
            "loss_sum": float(to_host(at.loss_sum)),
            "right": int(to_host(at.correct)),
            "schedule_memory": at.schedule.memory(),
            "log": self._log.tally.as_dict(),
            "random": "philox4x64-10 keyed by (seed, purpose, step); no other state",
            "sampler": "epoch = step // steps an epoch; order from (seed, data/order, epoch), "
            "that of the text where it is text",
        }

    def _meta(self, progress: dict[str, Any]) -> dict[str, Any]:
        """The metadata of a checkpoint."""
        return {
            "run": RUN_FORMAT,
            "config": self._config.as_dict(),
            "model_file": self._model_file,
            **({"rule_files": self._rule_files} if self._rule_files else {}),
            "data": self._expected,
            "progress": progress,
            "provenance": self.provenance,
        }

    @cached_property
    def provenance(self) -> dict[str, Any]:
        """How the run is made; taken when it begins, when the BLAS threads are set.

        blas_before: the BLAS libraries of earlier processes, in order, if they changed.
        """
        made = provenance(self._feed.device, self._feed.dataset.digests)
        if self._feed.device.kind == "cuda":
            made["precision"] = self._config.precision
            if self._config.convolutions == "cudnn":
                made["cudnn"] = cudnn.version()
        chain = pairwise([*self._earlier, made["blas"]])
        if self._config.arithmetic == "portable":
            made["arithmetic"] = {"name": "portable", "version": compute.VERSION}
        if changed := [blas for blas, after in chain if not same_blas(blas, after)]:
            made["blas_before"] = changed
        return made

    # --- going on ------------------------------------------------------------------------

    def restored(
        self, checkpoint: Checkpoint, path: Path, start: Position, predictions: int
    ) -> Position:
        """The position that a checkpoint at `path` holds, or `FileRefused`.

        start: the position before the first step. predictions: of an epoch.
        """
        progress = checkpoint.meta["progress"]
        schema.check(progress, schema.Resumable, path)
        _check_state(start.state, checkpoint, path, self._config.optimizer)
        _check_progress(checkpoint, path, predictions)
        made = checkpoint.meta["provenance"]
        self._earlier = [*made.get("blas_before", []), made["blas"]]
        device = self._feed.device
        groups = (checkpoint.params, checkpoint.buffers, checkpoint.state)
        return dataclasses.replace(
            start,
            state=State(*({n: to_device(v, device) for n, v in g.items()} for g in groups)),
            schedule=_with_memory(start.schedule, progress, path),
            step=progress["step"],
            **epoch_sums(start.correct, progress["loss_sum"], progress["right"]),
        )

    def kernels_changed(self) -> str | None:
        """A warning if another BLAS library than now made the last steps; else None."""
        now = self.provenance["blas"]
        if self._feed.device.kind != "cpu" or same_blas(self._earlier[-1], now):
            return None
        return (
            f"the steps so far were computed by {blas_in_words(self._earlier[-1])}, the next ones "
            f"will be by {blas_in_words(now)}: the result will differ in its last bits from that "
            "of a run that never stopped; the checkpoint records both. OPENBLAS_CORETYPE chooses "
            "the kernels, OPENBLAS_NUM_THREADS the threads"
        )


class Unwritten(RunFiles):
    """The files of a run for a rank other than 0, which reads but never writes them."""

    begun = True

    @contextmanager
    def logging(self, tally: Tally | None) -> Iterator[None]:
        """No log."""
        yield

    def write(self, record: Record) -> None:
        """Nothing."""

    def save(self, at: Position, *, ends: bool = False) -> None:
        """Nothing."""

    def certify(self, at: Position) -> None:
        """Nothing."""

    def write_trace(self, at: Position) -> None:
        """Nothing."""

    def snapshot(self, at: Position) -> None:
        """Nothing."""

    def picture(self, at: Position, pixels: Any) -> None:
        """Nothing."""

    def kernels_changed(self) -> str | None:
        """Nothing: rank 0 says so."""
        return None


def _check_state(start: State, checkpoint: Checkpoint, path: Path, rule: str) -> None:
    """Refuse arrays unless they have the names, shapes and types of this model and rule."""
    checkpoint.check_shapes({n: tuple(v.shape) for n, v in start.params.items()}, path)
    if start.optimizer.keys() != checkpoint.state.keys():
        raise FileRefused(f"{path}: the state is not that of {rule}")
    if missing := start.buffers.keys() - checkpoint.buffers.keys():
        raise FileRefused(f"{path}: the buffer {min(missing)} of the model is missing")
    found = checkpoint.params | checkpoint.state
    for name, value in (start.params | start.optimizer).items():
        want, got = f"{tuple(value.shape)} {value.dtype}", found[name]
        if want != f"{got.shape} {got.dtype}":
            raise FileRefused(
                f"{path}: {name} is {got.shape} {got.dtype}, in this run it is {want}; use a "
                "checkpoint of this run"
            )


def _check_progress(checkpoint: Checkpoint, path: Path, predictions: int) -> None:
    """Refuse numbers that no run has."""
    progress = checkpoint.meta["progress"]
    sound = {
        "step": progress["step"] == int(checkpoint.state["step"]),
        "loss_sum": progress["loss_sum"] > -1,  # at least 0, but for rounding
        "right": progress["right"] <= predictions,
    }
    for name in (name for name, fits in sound.items() if not fits):
        raise FileRefused(
            f"{path}: {name} = {progress[name]!r} is not that of a run with this state; use a "
            "checkpoint that npdrt wrote"
        )


def _with_memory(schedule: Schedule, progress: Mapping[str, Any], path: Path) -> Schedule:
    """The schedule with the memory in a checkpoint; its counters are at most the steps."""
    memory, fresh = progress["schedule_memory"], schedule.memory()
    counters = [memory.get(name) for name, value in fresh.items() if isinstance(value, int)]
    counted = all(type(n) is int and 0 <= n <= progress["step"] for n in counters)
    if memory.keys() != fresh.keys() or not counted:
        raise FileRefused(f"{path}: the memory of the schedule is not of this schedule")
    return schedule.with_memory(memory)


def rewound_log(out: Path, checkpoint: Checkpoint, path: Path) -> tuple[Tally, float, str | None]:
    """Cut the log in `out` back to the records that the checkpoint at `path` covers.

    Returns their tally, the seconds of training in them, and a warning if the checkpoint, of an
    older npdrt, does not say which records it covers. Raises `FileRefused` for the log of another
    run.
    """
    progress, warning = checkpoint.meta["progress"], None
    covered = progress.get("log")
    if covered is None:
        warning = f"{path} is of an older npdrt; whether the log is its own is unknown"
        covered = log.until(out / "log.jsonl", progress["step"])
    return *log.rewind(out / "log.jsonl", covered), warning


# --- before there is a run -------------------------------------------------------------------


def require_empty(out: Path) -> None:
    """Raise `Error` unless `out` is missing or an empty directory."""
    require_run(out)
    if out.exists() and _names(out):
        raise Error(f"{out} already exists; give --resume to go on with it, or another --out")


def require_run(out: Path) -> None:
    """Raise `Error` if `out` is a file, or a directory that holds files, but none of a run."""
    if out.exists() and not out.is_dir():
        raise Error(f"{out} is not a directory; give another --out")
    if out.exists() and (names := _names(out)) and names.isdisjoint(OF_A_RUN):
        raise Error(f"{out} holds files that are not of a run; give another --out")


def _names(out: Path) -> set[str]:
    return {path.name for path in out.iterdir()} - {lock.NAME}


def not_begun(out: Path) -> bool:
    """Whether `out`, which this process holds, holds no run. The files of a run that was killed
    before its first checkpoint are removed."""
    names = _names(out)
    if names and not {"log.jsonl"} <= names <= {"log.jsonl", "trace.h5"}:
        return False
    if names and any(record["step"] > 0 for record in log.read(out / "log.jsonl")):
        return False  # a history without its checkpoints is not ours to remove
    remove_files(out)
    return True


def remove_files(out: Path) -> None:
    """Remove the files of a run without a step. After each removal it can still resume."""
    of_step = ("snapshots/step-000000.h5", "images/step-000000.png")
    for name in (*of_step, "checkpoint.h5", "trace.h5", "log.jsonl"):
        (out / name).unlink(missing_ok=True)
    for name in of_step:
        with suppress(OSError):
            (out / name).parent.rmdir()
