"""The training loop: batch, step, log, save.

`npdrt.train.feed` makes the batches, `step` computes the step, `history` makes the records of the
log, and `files` writes the run directory. The loop waits for the device only to log and to save.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from threadpoolctl import threadpool_limits

import npdrt
from npdrt import arrays, cudnn, optim, store
from npdrt.arrays import Array, Params, quiet, to_host
from npdrt.data import Dataset
from npdrt.errors import Diverged, Error, Unavailable
from npdrt.models import Model
from npdrt.program.fused import numba as require_compiler
from npdrt.random import Random
from npdrt.store import Checkpoint
from npdrt.store.log import Record, Tally
from npdrt.train.adversarial import make_task
from npdrt.train.cautions import cautions
from npdrt.train.config import Config, build_model, build_optimizer, resolve
from npdrt.train.diagnose import first_nonfinite
from npdrt.train.feed import Feed
from npdrt.train.files import RunFiles, Unwritten
from npdrt.train.history import History
from npdrt.train.shards import ALONE, Alone, bounds
from npdrt.train.step import Position, State, Step, epoch_sums
from npdrt.train.steps import Steps

LOWER_RATE = "Try a lower --lr."
LOOK_AT_DATA = "No rate was used yet: look at the data and the initial weights."
SMALL_PRODUCT = 1e7  # FLOP of a step's largest product; below it a second thread costs more time


@dataclass(frozen=True)
class Summary:
    """The result of a run. Losses and accuracies are over whole sets, after the last step; None
    if the run was stopped early, or the data have no classes or no test set.

    stopped: the number of the signal that ended it early, 0 if it ran to its end.
    """

    run: str
    step: int
    steps: int
    epochs: int
    parameters: int
    optimizer: str
    lr: float
    seconds: float
    stopped: int = 0
    train_loss: float | None = None
    train_accuracy: float | None = None
    test_loss: float | None = None
    test_accuracy: float | None = None
    train_perplexity: float | None = None  # exp(loss), of language models
    test_perplexity: float | None = None


class Reporter:
    """Receives the progress and the warnings of a run; this one ignores them."""

    def progress(self, step: int, steps: int, record: Record | None) -> None:
        """Called after every step; `record` is the last one logged at it, if any."""

    def warning(self, text: str) -> None:
        """Called with a text for the user; the run goes on."""


def blas_threads(
    batch_size: int, params: Params, asked: int | None = None, shards: int = 1
) -> AbstractContextManager[Any]:
    """BLAS threads of a run: `asked`, else one if its products are small. A second thread slows
    small products down, on a busy machine by orders of magnitude, and would make their bits depend
    on the number of cores. Shards take one each, so that all ranks make the same bits."""
    largest = max((math.prod(p.shape) for p in params.values()), default=0)
    small = 2.0 * batch_size * largest < SMALL_PRODUCT
    threads = asked or (1 if small or shards > 1 else None)
    limits: AbstractContextManager[Any] = threadpool_limits(threads, user_api="blas")
    return limits


class Trainer:
    """A resolved configuration with its model, data and files; `run` trains."""

    def __init__(
        self, config: Config, dataset: Dataset, out: Path, reporter: Reporter,
        ranks: Alone = ALONE,
    ):  # fmt: skip
        self.config = config = resolve(config, dataset)
        self.ranks = ranks
        _check_ranks(config, ranks)
        dataset = dataset.as_streams_for(config.batch_size)
        self.reporter = reporter
        self.device = arrays.device(config.device)
        self.model = build_model(config, dataset)
        self.optimizer = build_optimizer(config)
        self.task = make_task(config, self.model, dataset)
        self.stepped = False  # whether this process finished a step
        if config.fast:
            require_compiler()  # now, before a run directory is made
        _check_device(config, self.device)
        self.feed = Feed(config, dataset, self.model, self.device, ranks)
        self.step = Steps(self.task, self.optimizer, config, self.device, reporter.warning, ranks)
        self.history = History(self.task, self.feed, ranks)
        self.files = (Unwritten if ranks.rank else RunFiles)(out, config, self.feed)

    # --- the loop ------------------------------------------------------------------------

    def run(self, at: Position, stop: Callable[[], int], tally: Tally | None = None) -> Summary:
        """Train from `at` to the end, or to the step after which `stop` returns a signal.

        stop: returns the number of the signal that should end the run, 0 while there is none.
        tally: the counts of the log that is continued; None for a new run.
        """
        start_time, signal = time.perf_counter() - at.seconds, 0
        config, stop = self.config, self.ranks.agreed(stop)
        threads = blas_threads(
            config.batch_size, at.state.params, config.threads, shards=config.shards
        )
        with self.files.logging(tally), quiet(), threads, self.feed.reading():
            self._begin(at)
            while at.step < self.feed.steps and not signal:
                lr = at.schedule(at.step)
                at, done = self.advanced(at, *self.feed.batch(at.step), lr)  # no batch outlives it
                self.stepped = True
                self.ranks.compare(at.step, at.state.params)
                at, record = self._logged(at, done, lr, start_time)
                self.reporter.progress(at.step, self.feed.steps, record)
                signal = stop()
                self._save(at, ends=bool(signal) or at.step == self.feed.steps)
            return self._summary(at, time.perf_counter() - start_time, signal)

    def _begin(self, at: Position) -> None:
        """Warn, and write the first files: record and checkpoint of a new run, else the trace."""
        steps = self.feed.steps
        beyond = (step for step in self.config.snapshots if step > steps)
        missed = (f"no snapshot of step {step}: the run has {steps}" for step in beyond)
        for warning in (*cautions(self.config), *self.feed.dataset.notes, *missed):
            self.reporter.warning(warning)
        if self.files.begun:
            if changed := self.files.kernels_changed():
                self.reporter.warning(changed)
            self.files.write_trace(at)
        else:
            self.files.write({"event": "start", "step": 0, "config": self.config.as_dict()})
            self.files.certify(at)
            self._log_conditioning(at)
            self._checkpoint(at)
        self.files.snapshot(at)
        self._picture(at)

    def advanced(self, at: Position, x: Array, y: Array, lr: float) -> tuple[Position, Step]:
        """The position after one step, and the results of the step."""
        random = Random(self.config.seed, "train", at.step)
        traced = self._due("trace_every", at.step + 1)
        done = self.step(at.state, x, y, lr, random, traced=traced)
        xp = arrays.namespace(x)
        loss = xp.asarray(done.loss, dtype=xp.float64) * self.task.count(y)
        return dataclasses.replace(
            at,
            state=done.state,
            step=at.step + 1,
            loss_sum=at.loss_sum + loss,
            correct=at.correct + done.correct,
        ), done

    def _logged(
        self, at: Position, done: Step, lr: float, start_time: float
    ) -> tuple[Position, Record | None]:
        """Write the records that are due after a step. Returns the last of them, and the position:
        that of the next epoch if the step ends one."""
        record: Record | None = None
        if done.measured:
            self.files.write(self.history.trace(at, done))
        if self._due("log_every", at.step):
            record = self.history.step(at, done, lr)
            if not math.isfinite(record["loss"]):
                self._explain_divergence(at)
            self.files.write(record)
        if at.step % self.feed.epoch == 0:
            self._require_finite(at)
            record = self.history.epoch(at, lr, start_time)
            self.files.write(record)
            self.files.certify(at)
            self._picture(at)
            self._log_conditioning(at)
            at = self._next_epoch(at)
        return at, record

    def _picture(self, at: Position) -> None:
        """Write what the model makes between two epochs, if it makes pictures."""
        if at.step % self.feed.epoch == 0:
            pixels = self.task.picture(at.state, self.config.seed)
            if pixels is not None:
                self.files.picture(at, pixels)

    def _log_conditioning(self, at: Position) -> None:
        if self.config.conditioning:
            self.files.write(self.history.conditioning(at))

    def _next_epoch(self, at: Position) -> Position:
        """The position after a whole epoch: the schedule knows its loss, the sums are 0."""
        schedule = at.schedule.observe(self.history.mean_loss(at))
        return dataclasses.replace(at, schedule=schedule, **epoch_sums(at.correct))

    def _save(self, at: Position, *, ends: bool) -> None:
        """Write the snapshot and the checkpoint that fall on a step."""
        self.files.snapshot(at)
        if ends or self._due("checkpoint_every", at.step):
            self._checkpoint(at, ends=ends)

    def _checkpoint(self, at: Position, *, ends: bool = False) -> None:
        self._require_finite(at)
        if self.step.graph:
            self.files.provenance["graph"] = self.step.graph
        self.files.save(at, ends=ends)

    def _due(self, setting: str, step: int) -> bool:
        """Whether `step` is a multiple of a setting such as log_every; None is once an epoch."""
        every = getattr(self.config, setting)
        every = self.feed.epoch if every is None else every
        return bool(every) and step % every == 0

    def _summary(self, at: Position, seconds: float, signal: int) -> Summary:
        parts = () if signal else ("train", "test")
        results = [self.history.evaluation(part, at.state) for part in parts]
        return Summary(
            run=str(self.files.out),
            step=at.step,
            steps=self.feed.steps,
            epochs=self.config.epochs,
            parameters=sum(math.prod(p.shape) for p in at.state.params.values()),
            optimizer=self.optimizer.name,
            lr=float(self.config.lr),
            seconds=seconds,
            stopped=signal,
            **{name: value for result in results for name, value in result.items()},
        )

    # --- where a run begins ----------------------------------------------------------------

    def fresh(self) -> Position:
        """The position before the first step."""
        start = self._initial_position(self.model)
        self._require_last_batch(start.state)
        return start

    def restored(self, checkpoint: Checkpoint, path: Path) -> Position:
        """The position in the checkpoint at `path`."""
        model = self.model
        if field := getattr(model, "first_values", ""):  # a file; the checkpoint has its values
            model = dataclasses.replace(model, **{field: ""})
        at = self._initial_position(model)
        if checkpoint.state.get("step", 0) > 0:
            kept = self.optimizer.started(at.state.params)
            at = dataclasses.replace(at, state=dataclasses.replace(at.state, optimizer=kept))
        return self.files.restored(checkpoint, path, at, self.history.predictions)

    def _initial_position(self, model: Model) -> Position:
        config = self.config
        params = model.init(seed=config.seed, device=self.device, dtype=config.dtype)
        schedule = optim.schedule(
            config.schedule,
            lr=float(config.lr),
            steps_per_epoch=self.feed.epoch,
            steps=self.feed.steps,
        )
        buffers = self.task.buffers(config.seed, self.device, config.dtype)
        state = State(params, buffers, self.optimizer.init(params))
        return Position(state, schedule, 0, **epoch_sums(self.feed.train[1]))

    def _require_last_batch(self, state: State) -> None:
        """Refuse at once, and not after an epoch, a last batch or a shard of one example that the
        model cannot use: a single example may have no batch statistics."""
        n, size = self.feed.sampler.n, self.feed.sampler.batch_size
        batches = [batch for batch in (min(n, size), n % size) if batch]
        ones = [b for b in batches if any(e - s == 1 for s, e in bounds(b, self.config.shards))]
        if not ones:
            return
        x, y = self.feed.train
        random = Random(self.config.seed, "train/last-batch")
        try:
            for turn in self.task.turns:
                turn.loss(state.params, state.buffers, x[:1, ...], y[:1, ...], random)
        except Error as error:
            raise Error(
                f"the last batch of an epoch has 1 of the {n} examples, since the batch size is "
                f"{size}; use another: {error}"
                if self.config.shards == 1
                else f"a shard of the batch of {ones[-1]} examples has 1 of them; use fewer shards "
                f"or another batch size: {error}"
            ) from error

    # --- divergence ----------------------------------------------------------------------

    def _require_finite(self, at: Position) -> None:
        """Raise `Diverged` if the loss or a parameter is not finite; waits for the device once."""
        values = [at.loss_sum, *at.state.params.values()]
        xp = arrays.namespace(*values)
        flags = xp.stack([xp.all(xp.isfinite(value)) for value in values])
        if not bool(to_host(xp.all(flags))):
            self._explain_divergence(at)

    def _explain_divergence(self, at: Position) -> NoReturn:
        """Repeat the run from its last checkpoint, and name the first value that is not finite."""
        if self.ranks.rank:
            self.ranks.told(None)  # rank 0 repeats it alone, to the same bits, and ends all ranks
        self.step = Steps(
            self.task, self.optimizer, self.config, self.device, self.reporter.warning
        )
        checkpoint, path, _ = store.load_newest(self.files.out)
        again = self.restored(checkpoint, path)
        good = f"The last good checkpoint is {path}, step {again.step}."
        while again.step < at.step:
            x, y = self.feed.whole_batch(again.step)
            lr, random = again.schedule(again.step), Random(self.config.seed, "train", again.step)
            found = first_nonfinite(self.task, self.optimizer, again.state, x, y, lr, random)
            if found:
                untried = not again.step and "after its update" not in found
                advice = LOOK_AT_DATA if untried else LOWER_RATE
                raise Diverged(f"step {again.step + 1}: {found} is not finite. {good} {advice}")
            again, _ = self.advanced(again, x, y, lr)
            again = again if again.step % self.feed.epoch else self._next_epoch(again)
        raise Diverged(
            f"a loss up to step {at.step} was not finite, but the replay did not reproduce it. "
            f"{good} {LOWER_RATE}"
        )


def _check_ranks(config: Config, ranks: Alone) -> None:
    """Raise `Error` for more ranks than shards, and for ranks that differ."""
    if ranks.size > config.shards:
        raise Error(
            f"{ranks.size} ranks need as many shards of a batch; give --shards {ranks.size} or "
            f"more, or start fewer ranks (shards: {config.shards})"
        )
    alike = {"configuration": config.as_dict(), "version": npdrt.__version__}
    ranks.require_alike(alike, software=config.arithmetic == "fast")


def _check_device(config: Config, device: arrays.Device) -> None:
    """Raise `Unavailable` for settings of a GPU that this device, or its software, lacks."""
    for name in ("precision", "convolutions"):
        value = getattr(config, name)
        if value != getattr(Config, name) and device.kind == "cpu":
            raise Unavailable(
                f"{name} {value} needs a GPU, and the device is cpu; leave it out, or choose a GPU "
                "with --device cuda"
            )
    if config.convolutions == "cudnn":
        cudnn.load()
