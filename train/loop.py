"""The training loop: epochs, evaluation, log, traces, checkpoints, and resuming to the same bits.

A run directory holds checkpoint.h5, checkpoint.prev.h5, trace.h5 and log.jsonl. Everything that
decides the next step is in the checkpoint: parameters, buffers, optimizer state, schedule, the
step number (which names the position in the data order and every random mask) and the sums of
the unfinished epoch. The device is waited for at logging points and checkpoints only.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

from threadpoolctl import threadpool_limits

from npdrt import arrays, optim, schema, store
from npdrt.arrays import Array, quiet, to_device, to_host
from npdrt.data import Ahead, Dataset, Images
from npdrt.data.ahead import AHEAD
from npdrt.data.augment import words
from npdrt.errors import Diverged, Error, FileRefused
from npdrt.ops.embedding import check_tokens
from npdrt.optim.schedules import Schedule
from npdrt.program import compare, memory_on, record
from npdrt.program.fused import numba as require_compiler
from npdrt.random import Random
from npdrt.store import Checkpoint, log, trace
from npdrt.store.log import Record
from npdrt.train.conditioning import conditioning
from npdrt.train.config import (
    RUN_FORMAT,
    Config,
    build_model,
    build_optimizer,
    example_shape,
    model_digest,
    resolve,
)
from npdrt.train.diagnose import first_nonfinite
from npdrt.train.provenance import provenance
from npdrt.train.step import State, Step, Task, evaluate, make_step

LARGEST_EXPONENT = 709.0  # exp(710) is inf
SMALL_PRODUCT = 1e7  # FLOP of a step's largest product; below it a second thread costs more time
WORTH_A_THREAD = 1 << 16  # values of a batch of images; handing over a smaller one costs more
GROWTH = 1.25  # of the log, after which the trace is written again: that costs the whole history


@dataclass(frozen=True)
class Summary:
    """What a run came to. Losses and accuracies are over whole sets, after the last step; None
    where the run was stopped early, or the data have no classes or no test set.

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


@dataclass(frozen=True)
class Position:
    """Where a run stands between two steps; the sums are of the unfinished epoch, on the device.

    The arrays of the state are those of the step's program: the next step writes over them.
    seconds: training time before this process.
    """

    state: State
    schedule: Schedule
    step: int
    loss_sum: Array
    right: Array
    seconds: float = 0.0


@dataclass(frozen=True)
class OnDemand:
    """Images as the loop evaluates them: x[start:stop, ...] is an array on the device."""

    images: Images
    to_model: Callable[[Any], Array]

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the stored images."""
        return self.images.shape

    def __getitem__(self, key: Any) -> Array:
        return self.to_model(self.images[key])


def _remembering(schedule: Schedule, progress: Mapping[str, Any], path: Path) -> Schedule:
    """The schedule with the memory that a checkpoint holds; its counters are at most the steps."""
    memory, fresh = progress["schedule_memory"], schedule.memory()
    counters = [memory.get(name) for name, value in fresh.items() if isinstance(value, int)]
    counted = all(type(n) is int and 0 <= n <= progress["step"] for n in counters)
    if memory.keys() != fresh.keys() or not counted:
        raise FileRefused(f"{path}: the memory of the schedule is not of this schedule")
    return dataclasses.replace(schedule, **memory)


class Reporter:
    """What the loop tells its caller; this one keeps silent."""

    def progress(self, step: int, steps: int, record: Record | None) -> None:
        """Called after every step; `record` is what was logged at it, if anything."""

    def warning(self, text: str) -> None:
        """Something to be read that does not stop the run."""


def _alike(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether the BLAS libraries of two processes are the same; one may have loaded more."""
    return all(library in b for library in a) or all(library in a for library in b)


def _named(blas: Sequence[Mapping[str, Any]]) -> str:
    """BLAS libraries in words."""
    parts = (
        f"{b['library']} {b['version']} ({b['kernel']} kernels, {b['threads']} threads)"
        for b in blas
    )
    return ", ".join(parts) or "no BLAS library that is known"


class Trainer:
    """A resolved configuration with its model, data and files; `run` trains."""

    def __init__(self, config: Config, dataset: Dataset, out: Path, reporter: Reporter):
        self.config = config = resolve(config, dataset)
        dataset = dataset.arranged(config.batch_size)
        self.dataset, self.out, self.reporter = dataset, out, reporter
        self.device = arrays.device(config.device)
        self.model = build_model(config, dataset)
        self.optimizer = build_optimizer(config)
        self.task = Task(self.model, dataset.classes, config.label_smoothing, config.clip)
        self._steps: dict[Any, Callable[..., Step]] = {}  # by shape, buffers, traced or not
        self._memory = memory_on(self.device)
        self._warned = False
        self._traced = 0  # bytes of the log when the trace was written last
        self._earlier: list[Any] = []  # BLAS libraries that made steps before this process
        self.stepped = False  # whether a step was finished
        if config.fast:
            require_compiler()  # now, before a run directory is made
        self.sampler = dataset.sampler(config.batch_size, config.seed)
        self.epoch = self.sampler.batches_per_epoch
        self.steps = config.epochs * self.epoch
        self.model_file = model_digest(config)  # now: the file may change while the run goes on
        self.images = dataset.images(config.augment)
        few = config.batch_size * math.prod(dataset.x.shape[1:]) < WORTH_A_THREAD
        self.made = Ahead(self._make, self.steps, 0 if few else AHEAD)
        self.train_set = self._upload(dataset.x, dataset.y)
        self.valid_set, self.test_set = (
            None if x is None else self._upload(x, y)
            for x, y in ((dataset.x_valid, dataset.y_valid), (dataset.x_test, dataset.y_test))
        )

    def _upload(self, x: Any, y: Any) -> tuple[Array, Array]:
        """A data set on the device, x in the shape the model is given and, but for tokens, the
        run's dtype; images that are made when they are asked for come to the device then."""
        if self.dataset.vocabulary is not None:
            check_tokens(x, self.dataset.vocabulary)
            return to_device(x, self.device), to_device(y, self.device)
        if self.dataset.classes is None:
            y = y.reshape(len(y), -1).astype(self.config.dtype, copy=False)
        x = OnDemand(x, self._shaped) if isinstance(x, Images) else self._shaped(x)
        return x, to_device(y, self.device)

    def _shaped(self, x: Any) -> Array:
        """Host examples on the device, in the model's shape and the run's dtype."""
        return to_device(self._cast(x), self.device)

    def _cast(self, x: Any) -> Any:
        shape = example_shape(self.model, self.dataset)
        return x.reshape(len(x), *shape).astype(self.config.dtype, copy=False)

    def _make(self, step: int) -> Any:
        """The images of a step, on the host: a function of the step alone, run on a thread."""
        assert self.images is not None
        seed, n, indices = self.config.seed, len(self.images), self.sampler.batch(step)
        keys = words(seed, step // self.epoch, n, indices)
        return self._cast(self.images.batch(indices, self.config.augment, keys))

    # --- positions -----------------------------------------------------------------------

    def fresh(self) -> Position:
        """The position before the first step."""
        start = self._first(self.model)
        self._require_last_batch(start.state)
        return start

    def _first(self, model: Any) -> Position:
        config = self.config
        params = model.init(seed=config.seed, device=self.device, dtype=config.dtype)
        schedule = optim.schedule(
            config.schedule, lr=float(config.lr), steps_per_epoch=self.epoch, steps=self.steps
        )
        buffers = self.task.buffers(config.seed, self.device, config.dtype)
        state = State(params, buffers, self.optimizer.init(params))
        return Position(state, schedule, 0, *self._sums(0.0, 0))

    def _require_last_batch(self, state: State) -> None:
        """Refuse at once, and not after an epoch, a last batch of one example with which the model
        can do nothing: a single one may have no batch statistics."""
        n, size = self.sampler.n, self.sampler.batch_size
        if n % size != 1:
            return
        x, y = self.train_set
        random = Random(self.config.seed, "train/last-batch")
        try:
            self.task.forward(state.params, state.buffers, x[:1, ...], y[:1, ...], random)
        except Error as error:
            raise Error(
                f"the last batch of an epoch has 1 of the {n} examples, since the batch size is "
                f"{size}; use another: {error}"
            ) from error

    def _sums(self, loss: float, right: int) -> tuple[Array, Array]:
        xp = arrays.namespace(self.train_set[1])
        return xp.asarray(loss, dtype=xp.float64), xp.asarray(right, dtype=xp.int64)

    def restored(self, checkpoint: Checkpoint, path: Path) -> Position:
        """The position that a checkpoint holds."""
        model = self.model
        if self.config.model == "bert":  # what a file gave it at first is in the checkpoint
            model = dataclasses.replace(model, weights="")
        start, progress = self._first(model), checkpoint.meta["progress"]
        schema.check(progress, schema.Resumable, path)
        self._check_state(start.state, checkpoint, path)
        self._check_progress(checkpoint, path)
        made = checkpoint.meta["provenance"]
        self._earlier = [*made.get("blas_before", []), made["blas"]]
        groups = (checkpoint.params, checkpoint.buffers, checkpoint.state)
        state = State(*({n: to_device(v, self.device) for n, v in g.items()} for g in groups))
        schedule = _remembering(start.schedule, progress, path)
        sums = self._sums(progress["loss_sum"], progress["right"])
        return Position(state, schedule, progress["step"], *sums)

    def _check_state(self, start: State, checkpoint: Checkpoint, path: Path) -> None:
        """Refuse arrays that are not of the names, shapes and types of this model and rule."""
        checkpoint.check_shapes({n: tuple(v.shape) for n, v in start.params.items()}, path)
        if start.optimizer.keys() != checkpoint.state.keys():
            raise FileRefused(f"{path}: the state is not that of {self.optimizer.name}")
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

    def _check_progress(self, checkpoint: Checkpoint, path: Path) -> None:
        """Refuse numbers that no run has."""
        progress = checkpoint.meta["progress"]
        step, loss, right = (progress[name] for name in ("step", "loss_sum", "right"))
        sound = {
            "step": step == int(checkpoint.state["step"]),
            "loss_sum": loss > -1,  # 0, but for rounding
            "right": right <= self.task.count(self.dataset.y),
        }
        for name in (name for name, fits in sound.items() if not fits):
            raise FileRefused(
                f"{path}: {name} = {progress[name]!r} is not that of a run with this state; use a "
                "checkpoint that npdrt wrote"
            )

    @cached_property
    def provenance(self) -> dict[str, Any]:
        """How the run is made; taken when it begins, when the BLAS threads are set.

        blas_before: the BLAS libraries of earlier processes that were others, in their order.
        """
        made = provenance(self.device, self.dataset.digests)
        chain = pairwise([*self._earlier, made["blas"]])
        if changed := [blas for blas, after in chain if not _alike(blas, after)]:
            made["blas_before"] = changed
        return made

    def _warn_of_other_kernels(self) -> None:
        """Warn if the BLAS library that made the last steps is not the one that will go on."""
        now = self.provenance["blas"]
        if self.device.kind == "cpu" and not _alike(self._earlier[-1], now):
            self.reporter.warning(
                f"the steps so far were computed by {_named(self._earlier[-1])}, the next ones "
                f"will be by {_named(now)}: the result will differ in its last bits from that of a "
                "run that never stopped; the checkpoint records both. OPENBLAS_CORETYPE chooses "
                "the kernels, --threads the threads"
            )

    def _save(self, at: Position, journal: log.Log, *, ends: bool = False) -> None:
        """Checkpoint, and the trace if the log has grown by a quarter since the last one or the
        run ends. The log is on the disk first, so it always covers both; the checkpoint is last,
        so that a finished run has its whole trace."""
        self._require_finite(at)
        journal.sync()
        if ends or journal.size >= GROWTH * self._traced:
            self._write_trace(at, journal)
        progress = {
            "step": at.step,
            "steps": self.steps,
            "epoch": at.step / self.epoch,
            "loss_sum": float(to_host(at.loss_sum)),
            "right": int(to_host(at.right)),
            "schedule_memory": at.schedule.memory(),
            "log": journal.tally.as_dict(),
            "random": "philox4x64-10 keyed by (seed, purpose, step); no other state",
            "sampler": "epoch = step // steps an epoch; order from (seed, data/order, epoch), "
            "that of the text where it is text",
        }
        newest, previous = self.out / "checkpoint.h5", self.out / "checkpoint.prev.h5"
        state = at.state
        store.save(
            newest,
            state.params,
            buffers=state.buffers,
            state=state.optimizer,
            meta=self._meta(progress),
            keep_previous=previous,
        )

    def _write_trace(self, at: Position, journal: log.Log) -> None:
        trace.write(self.out / "trace.h5", log.read(journal.path), list(at.state.params))
        self._traced = journal.size

    def _meta(self, progress: dict[str, Any]) -> dict[str, Any]:
        """What a checkpoint says of its run."""
        return {
            "run": RUN_FORMAT,
            "config": self.config.as_dict(),
            "model_file": self.model_file,
            "progress": progress,
            "provenance": self.provenance,
        }

    def _snapshot(self, at: Position) -> None:
        """Keep the parameters of a step that the configuration names, for `npdrt perturb`."""
        if at.step not in self.config.snapshots:
            return
        path = self.out / "snapshots" / f"step-{at.step:06d}.h5"
        path.parent.mkdir(exist_ok=True)
        progress = {"step": at.step, "steps": self.steps, "epoch": at.step / self.epoch}
        store.save(path, at.state.params, buffers=at.state.buffers, meta=self._meta(progress))

    def _beyond(self) -> list[str]:
        """What is to be said of snapshots that the run does not reach."""
        beyond = [str(step) for step in self.config.snapshots if step > self.steps]
        return [f"no snapshot of step {step}: the run has {self.steps}" for step in beyond]

    # --- the loop ------------------------------------------------------------------------

    def run(self, at: Position, journal: log.Log, stop: Callable[[], int]) -> Summary:
        """Train from `at` to the end, or to the step after which `stop` names a signal. journal:
        the log of the run; where it is empty, its first record and checkpoint are written."""
        begun, signal = time.perf_counter() - at.seconds, 0
        for note in (*self.dataset.notes, *self._beyond()):
            self.reporter.warning(note)
        with quiet(), self._threads(at), self.made:
            self._begin(at, journal)
            self._snapshot(at)
            while at.step < self.steps and not signal:
                at, record = self._advance(at, journal, begun)
                self.stepped = True
                self.reporter.progress(at.step, self.steps, record)
                signal = stop()
                self._snapshot(at)
                ends = bool(signal) or at.step == self.steps
                if ends or self._due("checkpoint_every", at.step):
                    self._save(at, journal, ends=ends)
            return self._summary(at, time.perf_counter() - begun, signal)

    def _begin(self, at: Position, journal: log.Log) -> None:
        """The first records and checkpoint of a run, or the trace of one that goes on."""
        if journal.tally.records:
            self._warn_of_other_kernels()
            self._write_trace(at, journal)
            return
        journal.write({"event": "start", "step": 0, "config": self.config.as_dict()})
        self._log_conditioning(at, journal)
        self._save(at, journal)

    def _threads(self, at: Position) -> AbstractContextManager[Any]:
        """BLAS threads for this run; a second one slows small products down, on a busy machine
        by orders of magnitude, and would make their bits depend on the number of cores."""
        largest = max((math.prod(p.shape) for p in at.state.params.values()), default=0)
        small = 2.0 * self.config.batch_size * largest < SMALL_PRODUCT
        threads = self.config.threads or (1 if small else None)
        limits: AbstractContextManager[Any] = threadpool_limits(threads, user_api="blas")
        return limits

    def _due(self, setting: str, step: int) -> bool:
        """Whether something done every so many steps falls on `step`; None is once an epoch."""
        every = getattr(self.config, setting)
        every = self.epoch if every is None else every
        return bool(every) and step % every == 0

    def _advance(
        self, before: Position, journal: log.Log, begun: float
    ) -> tuple[Position, Record | None]:
        """One step, and the records that fall on it."""
        lr = before.schedule(before.step)
        at, done = self._stepped(before)
        record: Record | None = None
        if done.measured:
            journal.write(self._trace_record(at, done))
        if self._due("log_every", at.step):
            record = self._step_record(at, done, lr)
            journal.write(record)
        if at.step % self.epoch == 0:
            record = self._epoch_record(at, lr, begun)
            journal.write(record)
            self._log_conditioning(at, journal)
            at = self._next_epoch(at)
        return at, record

    def _stepped(self, before: Position) -> tuple[Position, Step]:
        """The position after one step, and what the step left behind."""
        x, y = self._batch(before.step)
        lr, xp = before.schedule(before.step), arrays.namespace(x)
        args = (before.state, x, y, lr, self._random(before.step))
        done = self._step(self._due("trace_every", before.step + 1), args)(*args)
        at = dataclasses.replace(
            before,
            state=done.state,
            step=before.step + 1,
            loss_sum=before.loss_sum + xp.asarray(done.loss, dtype=xp.float64) * self.task.count(y),
            right=before.right + done.correct,
        )
        return at, done

    def _step(self, traced: bool, args: tuple[Any, ...]) -> Callable[..., Step]:
        """The step for arguments of these shapes: recorded once, then replayed; or eager."""
        key = (args[1].shape, tuple(args[0].buffers), traced)
        if key not in self._steps:
            step = make_step(self.task, self.optimizer, traced=traced)
            self._steps[key] = step if self.config.eager else self._recorded(step, args)
        return self._steps[key]

    def _recorded(self, step: Callable[..., Step], args: tuple[Any, ...]) -> Callable[..., Step]:
        """The program of a step. A user's model that cannot be recorded runs eagerly."""
        try:
            program = record(step, *args, memory=self._memory, fast=self.config.fast)
            if ":" in self.config.model and (found := compare(program, record(step, *args))):
                raise Error(
                    f"recorded again, it makes other calls (call {found.number}, {found.what}: "
                    f"{found.a} and {found.b}); what differs between steps must be an argument"
                )
        except Exception as error:
            if ":" not in self.config.model:
                raise
            step(*args)  # a model that fails either way says why, without this warning
            self._warn_of_eager(error)
            return step
        self._memory.adopt({"state": args[0]})
        return program

    def _warn_of_eager(self, error: Exception) -> None:
        if not self._warned:
            self.reporter.warning(
                f"the step of {self.config.model} cannot be recorded, so it runs eagerly, call by "
                f"call (--eager does so without this warning): {error}"
            )
        self._warned = True

    def _next_epoch(self, at: Position) -> Position:
        """The position after a whole epoch with the schedule told its loss, the sums begun anew."""
        loss_sum, right = self._sums(0.0, 0)
        schedule = at.schedule.observe(self._mean_loss(at))
        return dataclasses.replace(at, schedule=schedule, loss_sum=loss_sum, right=right)

    def _mean_loss(self, at: Position) -> float:
        return float(to_host(at.loss_sum)) / self.task.count(self.dataset.y)

    def _batch(self, step: int) -> tuple[Array, Array]:
        x, y = self.train_set
        xp, indices = arrays.namespace(y), to_device(self.sampler.batch(step), self.device)
        labels = xp.take(y, indices, axis=0)
        if self.images is not None:
            return to_device(self.made(step), self.device), labels
        return xp.take(x, indices, axis=0), labels

    def _batch_count(self, step: int) -> int:
        """How many predictions the loss of a step is the mean of."""
        return self.task.count(self.dataset.y[self.sampler.batch(step)])

    def _random(self, step: int) -> Random:
        return Random(self.config.seed, "train", step)

    def _trace_record(self, at: Position, done: Step) -> Record:
        rows = {name: to_host(values).tolist() for name, values in done.measured.items()}
        return {"event": "trace", "step": at.step, **rows}

    def _log_conditioning(self, at: Position, journal: log.Log) -> None:
        """Condition numbers and Jacobians, where the configuration asks for them."""
        if self.config.conditioning:
            found = conditioning(self.model, at.state.params, self.train_set[0])
            journal.write({"event": "conditioning", "step": at.step, **found})

    def _step_record(self, at: Position, done: Step, lr: float) -> Record:
        xp = arrays.namespace(done.loss)
        both = [xp.asarray(value, dtype=xp.float64) for value in (done.loss, done.correct)]
        loss, right = to_host(xp.stack(both)).tolist()  # one wait for the device
        if not math.isfinite(loss):
            self._diverge(at)
        record: Record = {"event": "step", "step": at.step, "loss": loss, "lr": lr}
        if self.dataset.classes is not None:
            record["accuracy"] = right / self._batch_count(at.step - 1)
        return record | self._of_minibatches("perplexity", loss)

    def _epoch_record(self, at: Position, lr: float, begun: float) -> Record:
        """The record of a finished epoch."""
        self._require_finite(at)
        record: Record = {"event": "epoch", "epoch": at.step // self.epoch, "step": at.step}
        record |= {"lr": lr, "train_loss": self._mean_loss(at)}
        if self.dataset.classes is not None:
            record["train_accuracy"] = int(to_host(at.right)) / self.task.count(self.dataset.y)
        record |= self._of_minibatches("train_perplexity", record["train_loss"])
        record |= self._evaluation("valid", at.state, self.valid_set)
        record |= self._evaluation("test", at.state, self.test_set)
        record["seconds"] = time.perf_counter() - begun
        return record

    def _evaluation(self, name: str, state: State, part: Any) -> dict[str, float]:
        """Loss, accuracy and perplexity over a whole set; empty where there is none."""
        if part is None:
            return {}
        x, y = part
        loss, right = evaluate(self.task, state, x, y, self.dataset.evaluated)
        result = {f"{name}_loss": float(to_host(loss))}
        if self.dataset.classes is not None:
            result[f"{name}_accuracy"] = int(to_host(right)) / self.task.count(y)
        return result | self._perplexity(f"{name}_perplexity", result[f"{name}_loss"])

    def _of_minibatches(self, name: str, loss: float) -> dict[str, float]:
        """The perplexity of a loss that is trained on; a smoothed one has none."""
        return {} if self.config.label_smoothing else self._perplexity(name, loss)

    def _perplexity(self, name: str, loss: float) -> dict[str, float]:
        """exp(mean loss), by name, of a language model; inf where that overflows."""
        if not self.dataset.perplexity:
            return {}
        return {name: math.exp(loss) if loss < LARGEST_EXPONENT else math.inf}

    def _summary(self, at: Position, seconds: float, signal: int) -> Summary:
        results = {} if signal else self._evaluation("train", at.state, self.train_set)
        results |= {} if signal else self._evaluation("test", at.state, self.test_set)
        return Summary(
            run=str(self.out),
            step=at.step,
            steps=self.steps,
            epochs=self.config.epochs,
            parameters=sum(math.prod(p.shape) for p in at.state.params.values()),
            optimizer=self.optimizer.name,
            lr=float(self.config.lr),
            seconds=seconds,
            stopped=signal,
            **results,
        )

    # --- divergence ----------------------------------------------------------------------

    def _require_finite(self, at: Position) -> None:
        """Raise `Diverged` if the loss or a parameter is not finite; waits for the device once."""
        values = [at.loss_sum, *at.state.params.values()]
        xp = arrays.namespace(*values)
        flags = xp.stack([xp.all(xp.isfinite(value)) for value in values])
        if not bool(to_host(xp.all(flags))):
            self._diverge(at)

    def _diverge(self, at: Position) -> NoReturn:
        """Repeat the run from its last checkpoint, watching every value, and say what was first."""
        checkpoint, path, _ = store.load_newest(self.out)
        self._steps, self._memory = {}, memory_on(self.device)  # the caller holds results of these
        again = self.restored(checkpoint, path)
        advice = f"The last good checkpoint is {path}, step {again.step}. Try a lower --lr."
        while again.step < at.step:
            x, y = self._batch(again.step)
            lr, random = again.schedule(again.step), self._random(again.step)
            found = first_nonfinite(self.task, self.optimizer, again.state, x, y, lr, random)
            if found:
                raise Diverged(f"step {again.step + 1}: {found} is not finite. {advice}")
            again, _ = self._stepped(again)
            again = again if again.step % self.epoch else self._next_epoch(again)
        raise Diverged(f"a loss up to step {at.step} was not finite, but not again. {advice}")
