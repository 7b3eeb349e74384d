"""Start a training run, or go on with one from its newest checkpoint."""

from __future__ import annotations

import dataclasses
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from npdrt import arrays, atomic, data, store
from npdrt.data import Dataset
from npdrt.errors import Error
from npdrt.store import Checkpoint, log
from npdrt.store.lock import exclusive
from npdrt.train.config import Config, stored
from npdrt.train.loop import Reporter, Summary, Trainer


def never() -> int:
    """A `stop` that never asks for one."""
    return 0


def train(
    config: Config,
    out: Path,
    *,
    data_dir: Path | None = None,
    reporter: Reporter | None = None,
    stop: Callable[[], int] = never,
) -> Summary:
    """Train from the start into the new directory `out`.

    stop: asked after every step; a signal number other than 0 makes the run save and end.
    Raises `Error` if `out` exists with anything in it, `Diverged` at a loss that is not finite.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise Error(f"{out} already exists; give --resume to go on with it, or another --out")
    dataset = data.load(config.data, data_dir=data_dir, standardise=config.standardise)
    trainer = Trainer(config, dataset, out, reporter or Reporter())
    with arrays.on(trainer.device), blame(config):
        start = trainer.fresh()
        out.mkdir(parents=True, exist_ok=True)
        with exclusive(out):
            return trainer.run(start, stop, fresh=True)


def resume(
    out: Path,
    *,
    epochs: int | None = None,
    device: str | None = None,
    eager: bool | None = None,
    fast: bool | None = None,
    code: Sequence[Path] = (),
    data_dir: Path | None = None,
    reporter: Reporter | None = None,
    stop: Callable[[], int] = never,
) -> Summary:
    """Go on with the run in `out` from its newest checkpoint that can be read.

    The result has the bits of a run that never stopped. epochs: a new length of the run (not
    with a linear schedule, which depends on it). device, eager, fast: another way to run it.
    code: the Python file of the run's model, where that is one: the checkpoint alone makes npdrt
    run nothing.
    Raises `Error` where the data or the model file are not those of the run.
    """
    changes = {"epochs": epochs, "device": device, "eager": eager, "fast": fast}
    if eager or fast:
        changes |= {"eager": bool(eager), "fast": bool(fast)}
    with exclusive(out):
        return _go_on(out, changes, code, data_dir, reporter or Reporter(), stop)


def _go_on(
    out: Path,
    changes: dict[str, Any],
    code: Sequence[Path],
    data_dir: Path | None,
    reporter: Reporter,
    stop: Callable[[], int],
) -> Summary:
    """Resume the run in `out`, which this process holds."""
    checkpoint, path, warning = store.load_newest(out)
    atomic.remove_stale(out)
    if warning:
        reporter.warning(warning)
    config = _resumed_config(checkpoint, path, code, changes)
    dataset = data.load(config.data, data_dir=data_dir, standardise=config.standardise)
    _check_data(config, dataset, checkpoint, path)
    trainer = Trainer(config, dataset, out, reporter)
    with arrays.on(trainer.device), blame(config):
        at = trainer.restored(checkpoint, path)
        if at.step > trainer.steps:
            raise Error(
                f"{out} is at step {at.step}, beyond {config.epochs} epochs of "
                f"{trainer.epoch} steps"
            )
        kept = log.cut(out / "log.jsonl", at.step)
        seconds = max((r.get("seconds", 0.0) for r in kept), default=0.0)
        return trainer.run(dataclasses.replace(at, seconds=seconds), stop)


def _check_data(config: Config, dataset: Dataset, checkpoint: Checkpoint, path: Path) -> None:
    """Refuse data that are not those of the run, by their digests."""
    stored, found = checkpoint.meta["provenance"]["data"], dataset.digests
    if found.get("vocabulary") != stored.get("vocabulary"):
        raise Error(
            f"{path}: the vocabulary of {config.data} has changed since the run was started: its "
            "tokens would mean other words; give back the files, or start a new run"
        )
    if found != stored:
        raise Error(f"{path}: the data set {config.data} has changed since the run was started")


@contextmanager
def blame(config: Config) -> Iterator[None]:
    """An exception out of a user's model becomes one line with its place."""
    try:
        yield
    except (Error, OSError, MemoryError):
        raise
    except Exception as error:
        if ":" not in config.model:
            raise
        frames = traceback.extract_tb(error.__traceback__)
        file = config.model.rpartition(":")[0]
        place = ([frame for frame in frames if frame.filename.endswith(file)] or frames)[-1]
        raise Error(
            f"model {config.model} failed: {type(error).__name__}: {error} ({place.filename}, "
            f"line {place.lineno}); a model computes with npdrt.ops"
        ) from error


def _resumed_config(
    checkpoint: Checkpoint, path: Path, code: Sequence[Path], changes: dict[str, Any]
) -> Config:
    config = stored(checkpoint.meta, path, code=code)
    epochs = changes["epochs"]
    if epochs is not None and epochs != config.epochs and config.schedule.startswith("linear"):
        raise Error(
            f"a linear schedule falls over the run's {config.epochs} epochs, which cannot be "
            f"changed to {epochs} on the way"
        )
    return dataclasses.replace(config, **{k: v for k, v in changes.items() if v is not None})
