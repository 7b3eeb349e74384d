"""Start a training run, or resume one from its newest checkpoint."""

from __future__ import annotations

import dataclasses
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from npdrt import arrays, cublas, cudnn, store
from npdrt.compute import arithmetic
from npdrt.data import Dataset
from npdrt.errors import Diverged, Error
from npdrt.regular import require
from npdrt.store import Checkpoint
from npdrt.store.lock import exclusive
from npdrt.train.cautions import require_learning
from npdrt.train.config import Config, load_data, stored
from npdrt.train.files import not_begun, remove_files, require_empty, require_run, rewound_log
from npdrt.train.loop import Reporter, Summary, Trainer
from npdrt.train.own import file_of, source_of
from npdrt.train.ranks import ranks
from npdrt.train.rules import own_rules
from npdrt.train.shards import ALONE, Alone
from npdrt.train.shown import usual_reporter


def never() -> int:
    """A `stop` that never asks for one."""
    return 0


def anything(settings: Mapping[str, Any]) -> None:
    """An `accept` that refuses no settings."""


def train(
    config: Config,
    out: str | Path,
    *,
    data_dir: Path | None = None,
    reporter: Reporter | None = None,
    stop: Callable[[], int] = never,
) -> Summary:
    """Train from the start into the new directory `out`.

    reporter: receives progress and warnings; None draws a bar in a notebook, and is silent
    elsewhere. stop: asked after every step; a signal number other than 0 makes the run save and
    end.
    Raises `Error` if `out` exists with anything in it, `Diverged` at a loss that is not finite. If
    anything else fails before the first step is done, `out` is left as it was.
    """
    team, out = ranks(), Path(out)
    with team.together():
        if not team.rank:
            require_empty(out)  # a quick answer; only the one below is certain
        with _held(team, out, make=True):
            if not team.rank:
                require_empty(out)
            return start(config, out, data_dir, reporter or usual_reporter(), stop, team)


def resume(
    out: str | Path,
    *,
    epochs: int | None = None,
    device: str | None = None,
    eager: bool | None = None,
    fast: bool | None = None,
    decoders: int | None = None,
    code: Sequence[Path] = (),
    model: type | None = None,
    data_dir: Path | None = None,
    reporter: Reporter | None = None,
    stop: Callable[[], int] = never,
    begin: Callable[[], Config] | None = None,
    accept: Callable[[Mapping[str, Any]], None] = anything,
) -> Summary:
    """Go on with the run in `out` from its newest checkpoint that can be read.

    The result has the bits of a run that never stopped. epochs: a new length of the run (not
    with a linear schedule, which depends on it). device, eager, fast, decoders: another way to run
    it.
    code: the Python files of the run's model and rules, if it has any: npdrt runs no code because
    a checkpoint names it. model: the class of the model, in place of its file.
    begin: the configuration to start with if `out` holds no run yet, or one that was killed before
    its first checkpoint. accept: called with the settings of the run; it raises to refuse them.
    Raises `Error` if the data or the model file are not those of the run.
    """
    changes: dict[str, Any] = {"epochs": epochs, "device": device, "eager": eager, "fast": fast}
    changes |= {"decoders": decoders}
    if eager or fast:
        changes |= {"eager": bool(eager), "fast": bool(fast)}
    team, reporter, out = ranks(), reporter or usual_reporter(), Path(out)
    with team.together():
        if begin is None:
            require(out)
        with _held(team, out, make=begin is not None):
            require_run(out)
            fresh = begin is not None and team.told(not team.rank and not_begun(out))
            if begin is not None and fresh:
                return start(begin(), out, data_dir, reporter, stop, team)
            return go_on(out, changes, code, data_dir, reporter, stop, accept, team, model)


def start(
    config: Config,
    out: Path,
    data_dir: Path | None,
    reporter: Reporter,
    stop: Callable[[], int],
    team: Alone = ALONE,
) -> Summary:
    """Train from the start into `out`, which is empty and held by this process."""
    require_learning(config)
    dataset = load_data(config, data_dir)
    trainer = Trainer(config, dataset, out, reporter, team)
    with computing(trainer.config), blame(config), _undone(trainer):
        return trainer.run(trainer.fresh(), stop)


@contextmanager
def _held(team: Alone, out: Path, *, make: bool) -> Iterator[None]:
    """Rank 0 holds the directory; the others wait until it does."""
    with nullcontext() if team.rank else exclusive(out, make=make):
        team.told(None)
        yield


@contextmanager
def computing(config: Config) -> Iterator[None]:
    """On the device of a run, in its arithmetic and precision, with its convolutions."""
    with (
        arrays.on(arrays.device(config.device)),
        arithmetic(config.arithmetic),
        cublas.precision(config.precision),
        cudnn.convolutions(config.convolutions),
    ):
        yield


@contextmanager
def _undone(trainer: Trainer) -> Iterator[None]:
    """Remove a run whose first step failed, unless it diverged: that can be looked into."""
    try:
        yield
    except Diverged:
        raise
    except Exception:
        if not trainer.stepped and not trainer.ranks.rank:
            remove_files(trainer.files.out)
        raise


def go_on(
    out: Path,
    changes: dict[str, Any],
    code: Sequence[Path],
    data_dir: Path | None,
    reporter: Reporter,
    stop: Callable[[], int],
    accept: Callable[[Mapping[str, Any]], None] = anything,
    team: Alone = ALONE,
    model: type | None = None,
) -> Summary:
    """Resume the run in `out`, which this process holds."""
    checkpoint, path, warning = store.load_newest(out)
    if warning:
        reporter.warning(warning)
    config = _resumed_config(checkpoint, path, code, changes, model)
    accept(checkpoint.meta["config"])
    dataset = load_data(config, data_dir)
    check_data(config, dataset, checkpoint, path)
    trainer = Trainer(config, dataset, out, reporter, team)
    with computing(trainer.config), blame(config):
        at = trainer.restored(checkpoint, path)
        if at.step > trainer.feed.steps:
            raise Error(
                f"{out} is at step {at.step}, beyond {config.epochs} epochs of "
                f"{trainer.feed.epoch} steps"
            )
        mine = (None, 0.0, None) if team.rank else rewound_log(out, checkpoint, path)
        tally, seconds, unknown = mine
        if unknown:
            reporter.warning(unknown)
        return trainer.run(dataclasses.replace(at, seconds=seconds), stop, tally)


def check_data(config: Config, dataset: Dataset, checkpoint: Checkpoint, path: Path) -> None:
    """Refuse data whose digests are not those of the run."""
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
    """Turn an exception from a user's model or rule into one line that names its place."""
    try:
        yield
    except (Error, OSError, MemoryError):
        raise
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        guilty = next(_in_own_files(config, frames), None)
        if guilty is None:
            raise
        what, place = guilty
        raise Error(
            f"{what} failed: {type(error).__name__}: {error} ({place.filename}, "
            f"line {place.lineno}){'; a model computes with npdrt.ops' * what.startswith('model')}"
        ) from error


def _in_own_files(
    config: Config, frames: Sequence[traceback.FrameSummary]
) -> Iterator[tuple[str, traceback.FrameSummary]]:
    """The user's rules and model that the frames pass through, each with its innermost frame; the
    model, if it is the user's, also without a frame of its file."""
    for name in own_rules(config.optimizer, config.groups):
        own = [frame for frame in frames if frame.filename.endswith(file_of(name))]
        yield from ((f"rule {name}", frame) for frame in own[-1:])
    if file_of(config.model):
        own = [f for f in frames if f.filename.endswith(source_of(config.model))]
        yield f"model {config.model}", (own or frames)[-1]


def _resumed_config(
    checkpoint: Checkpoint,
    path: Path,
    code: Sequence[Path],
    changes: dict[str, Any],
    model: type | None,
) -> Config:
    config = stored(checkpoint.meta, path, code=code, model=model)
    epochs = changes.get("epochs")
    form = next((form for form in ("linear", "cosine") if form in config.schedule), "")
    if epochs is not None and epochs != config.epochs and form:
        raise Error(
            f"a {form} schedule falls over the run's {config.epochs} epochs, so a resumed run "
            f"cannot change them to {epochs}; leave out --epochs, or start a new run"
        )
    return dataclasses.replace(config, **{k: v for k, v in changes.items() if v is not None})
