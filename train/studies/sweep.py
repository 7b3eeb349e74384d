"""A sweep: the runs of a recipe in worker processes, one directory each, resumable at any time.

A run's directory is named by the hash of its resolved configuration, its data and its model file;
`result.json` in it, written whole when the run has ended, says that it is finished. Nothing else
is kept: killing a sweep loses the steps since the last checkpoints, and the same command goes on.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from npdrt import atomic, data, schema
from npdrt.data import Dataset
from npdrt.errors import DiskError, Diverged, Error
from npdrt.regular import contents
from npdrt.store import log
from npdrt.store.lock import InUse, exclusive
from npdrt.train.config import Config, model_digest, resolve
from npdrt.train.files import not_begun
from npdrt.train.loop import Reporter
from npdrt.train.rules import rule_digests
from npdrt.train.run import go_on, start
from npdrt.train.studies import cluster
from npdrt.train.studies.cache import Arrays, kept
from npdrt.train.studies.recipe import RUN_OPTIONS, Recipe

POLL = 0.2  # seconds between looks at the workers


@dataclass(frozen=True, eq=False)
class Run:
    """One run of a sweep: its resolved configuration, its directory, and its number of steps."""

    config: Config
    path: Path
    steps: int

    @property
    def result(self) -> dict[str, Any] | None:
        """The result, None until the run is finished; `FileRefused` if the file is damaged."""
        path = self.path / "result.json"
        if not path.exists():
            return None
        result: dict[str, Any] = schema.parse(contents(path), schema.Result, path)
        return result

    @property
    def diverged(self) -> bool:
        """Whether the run ended at a loss that is not finite."""
        return "diverged" in (self.result or {})

    def setting(self, name: str) -> Any:
        """A setting by its name in a recipe, such as "optimizer_options.norm_bound"; None if the
        run does not have it."""
        group, _, option = name.partition(".")
        value = getattr(self.config, group)
        return value.get(option) if option else value

    def last(self, name: str) -> float | None:
        """A number of the last epoch's record, such as "train_loss"; None if the run diverged."""
        return None if self.diverged else float(self.records("epoch")[-1][name])

    def kept(self, name: str, compute: Callable[[], Arrays]) -> Arrays:
        """The arrays that `compute` returns, kept as NAME.h5 in the run's directory."""
        with exclusive(self.path):
            return kept(self.path / f"{name}.h5", {"kind": name}, compute)

    def records(self, event: str) -> list[log.Record]:
        """The records of that event in the run's log."""
        return [r for r in log.read(self.path / "log.jsonl") if r["event"] == event]


@dataclass(frozen=True)
class Options:
    """How to run: worker processes, share of the runs as (i, n), compiled loops, device, data, the
    Python files of users' models that may be run, and the address of Dask's scheduler, or "local";
    "" does without Dask."""

    jobs: int = 1
    shard: tuple[int, int] = (0, 1)
    fast: bool = False
    device: str = "cpu"
    data_dir: Path | None = None
    code: tuple[Path, ...] = ()
    dask: str = ""


def runs(recipe: Recipe, out: Path, options: Options) -> list[Run]:
    """Every run of the recipe, each once, in order."""

    @cache
    def dataset(name: str, standardise: bool | str) -> Dataset:
        return data.load(name, data_dir=options.data_dir, standardise=standardise)

    found = {}
    for config in recipe.configs:
        source = dataset(config.data, config.standardise)
        resolved = resolve(dataclasses.replace(config, device=options.device), source)
        path = out / "runs" / _hash(resolved, source)
        sampler = source.as_streams_for(resolved.batch_size).sampler(
            resolved.batch_size, resolved.seed
        )
        steps = resolved.epochs * sampler.batches_per_epoch
        found[path] = Run(resolved, path, steps)
    return list(found.values())


def _hash(config: Config, source: Dataset) -> str:
    """The first 12 hex digits of the SHA-256 of all that decides the numbers of a run."""
    settings = {k: v for k, v in config.as_dict().items() if k not in RUN_OPTIONS}
    later = {
        "augment": "none", "clip": None, "precision": "ieee", "convolutions": "npdrt", "groups": (),
        "shards": 1, "sums": "tree", "arithmetic": "fast",
    }  # fmt: skip
    for name, default in later.items():
        if settings[name] == default:  # which came later: finished runs keep their names
            del settings[name]
    decides = {"config": settings, "data": source.digests, "model": model_digest(config)}
    if rules := rule_digests(config.optimizer, config.groups):
        decides["rules"] = rules
    return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:12]


def sweep(
    recipe: Recipe,
    out: Path,
    options: Options,
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
    stop: Callable[[], int] = lambda: 0,
) -> list[Run]:
    """Make the runs of `options.shard` that are not finished; returns all runs of the recipe.

    progress: called with steps done and steps in all, of the shard. stop: asked all
    the while; a signal number other than 0 lets every worker save and end.
    Raises Error naming the runs that failed, after the others have ended. A run whose loss is not
    finite is finished: its result says where it diverged.
    """
    every = runs(recipe, out, options)
    with exclusive(out, make=True):
        write(out / "manifest.json", _manifest(recipe, every))
    index, shards = options.shard
    mine = every[index::shards]
    todo = [run for run in mine if run.result is None]
    done = sum(run.steps for run in mine if run not in todo)
    total = sum(run.steps for run in mine)
    steps = multiprocessing.get_context("spawn").Array("q", max(len(todo), 1), lock=False)
    futures: list[Future[None]] = []
    if options.dask:
        ours = [dataclasses.replace(run, path=run.path.absolute()) for run in todo]
        work = cluster.working(_work_elsewhere, ours, options, steps, stop, futures)
    else:
        work = _working(todo, options, steps, stop, futures)
    for _ in work:
        progress(done + sum(steps), total)
    ended = {run: f.exception() for run, f in zip(todo, futures, strict=True) if not f.cancelled()}
    if failed := {run: error for run, error in ended.items() if error}:
        disk = any(isinstance(error, DiskError | OSError) for error in failed.values())
        raise (DiskError if disk else Error)(
            "\n".join(f"run {run.path.name}: {_reason(error)}" for run, error in failed.items())
        )
    return every


def _reason(error: BaseException) -> str:
    if isinstance(error, BrokenProcessPool):
        return "its process was killed; the same command goes on from its last checkpoint"
    return str(error)


def _manifest(recipe: Recipe, every: Sequence[Run]) -> dict[str, Any]:
    """The recipe and the runs of a sweep; the same for every shard and at any time."""
    listed = [{"run": run.path.name, "config": run.config.as_dict()} for run in every]
    return {"recipe": recipe.name, "scale": recipe.scale, "runs": listed}


def _working(
    todo: Sequence[Run],
    options: Options,
    steps: Any,
    stop: Callable[[], int],
    futures: list[Future[None]],
) -> Iterator[None]:
    """Make all runs in a pool; yields now and then until all futures, one for each, are done."""
    context = multiprocessing.get_context("spawn")  # BLAS threads do not survive a fork
    signalled = context.Value("i", 0, lock=False)
    begin = partial(_begin, steps, signalled)
    with ProcessPoolExecutor(max(1, min(options.jobs, len(todo))), context, begin) as pool:
        futures += [pool.submit(_work, i, run, options) for i, run in enumerate(todo)]
        while not all(future.done() for future in futures):
            yield
            time.sleep(POLL)
            if stop() and not signalled.value:
                signalled.value = stop()
                for future in futures:
                    future.cancel()  # those that have not begun
    yield


# --- in a worker process ---------------------------------------------------------------------

_shared: dict[str, Any] = {}
_busy = threading.Lock()  # held while a run is being made


def _begin(steps: Any, signalled: Any) -> None:
    """Set a worker up: it ignores signals, of which the parent tells it through `signalled`."""
    for number in (signal.SIGINT, getattr(signal, "SIGHUP", signal.SIGINT)):
        signal.signal(number, signal.SIG_IGN)
    _shared.update(steps=steps, signalled=signalled)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Stop once the parent has gone, as after SIGTERM: the pool would wait for it for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    _shared["signalled"].value = signal.SIGTERM
    with _busy:  # until the run is saved
        os._exit(128 + signal.SIGTERM)


def _stop() -> int:
    """The number of the signal that the parent got; 0 if there is none."""
    return int(_shared["signalled"].value)


class _Count(Reporter):
    """Tells the parent the step of one run."""

    def __init__(self, index: int):
        self._index = index

    def progress(self, step: int, steps: int, record: log.Record | None) -> None:
        """Called after every step."""
        _shared["steps"][self._index] = step


def _work(index: int, run: Run, options: Options) -> None:
    """Make one run to its end and write its result, unless a signal ends it before."""
    with _busy:
        if not _stop():
            _make(index, run, options)


def _work_elsewhere(index: int, run: Run, options: Options, name: str) -> None:
    """`_work` on a worker of a cluster. name: of the signal that ends the sweep."""
    _shared.update(steps={}, signalled=cluster.Signal(name))
    _work(index, run, options)


def _make(index: int, run: Run, options: Options) -> None:
    """Make one run while holding its directory. Another sweep that holds it is waited for; what it
    finished is not made again."""
    try:
        with exclusive(run.path, make=True, waiting=lambda: not _stop()):
            if run.result is None:
                _finish(index, run, options)
    except InUse:
        if not _stop():
            raise


def _finish(index: int, run: Run, options: Options) -> None:
    how: dict[str, Any] = {"data_dir": options.data_dir, "reporter": _Count(index), "stop": _stop}
    try:
        if not_begun(run.path):
            summary = start(dataclasses.replace(run.config, fast=options.fast), run.path, **how)
        else:
            changes = {"fast": options.fast, "eager": False}
            summary = go_on(run.path, changes, options.code, **how)
    except Diverged as error:
        result = {"diverged": str(error).partition(". ")[0]}
    else:
        if summary.stopped:
            return
        result = {k: v for k, v in dataclasses.asdict(summary).items() if k != "run"}
    write(run.path / "result.json", result)


def write(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON file, whole or not at all; a file that has the content already stays."""
    content = json.dumps(log.finite(value), indent=1) + "\n"
    if path.exists() and path.read_text() == content:
        return
    atomic.replace(path, content.encode())
