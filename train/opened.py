"""A run that is used: its predictions, its loss on other data, its history.

run = npdrt.open_run("first")
logits = run.predict(x)                 # x in the units of the run's file
found = run.evaluate("more.npz")        # loss, accuracy, confusion table
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from npdrt import arrays, data, store
from npdrt.arrays import Array, Params, quiet, to_device, to_host
from npdrt.data import Dataset, Expected
from npdrt.errors import Error
from npdrt.models import Model
from npdrt.store import Checkpoint, container, log, trace
from npdrt.train.adversarial import make_task
from npdrt.train.config import Config, build_model, load_data, stored, stored_model
from npdrt.train.evaluation import batches
from npdrt.train.feed import Feed
from npdrt.train.history import History
from npdrt.train.loop import blas_threads
from npdrt.train.run import blame, check_data, computing, resume
from npdrt.train.step import State

PARTS = ("train", "valid", "test")
MOST_CLASSES = 1000  # of a confusion table


@dataclass(frozen=True)
class Evaluation:
    """The result of a run on a set, in evaluation mode and without label smoothing.

    part: "train", "valid" or "test". loss: a mean in nats, or the mean squared error. accuracy: a
    share. confusion: (classes, classes) counts, a row for each label and a column for each
    prediction; None without one label an example, or for more than 1000 classes.
    """

    data: str
    part: str
    examples: int
    loss: float
    accuracy: float | None = None
    perplexity: float | None = None
    confusion: Any = field(default=None, repr=False)


@dataclass(frozen=True, repr=False)
class Run:
    """A training run, as its newest checkpoint has it; `open_run` makes one.

    model: called as `model(params, x)` with standardised x. params, buffers: arrays on the device.
    config: every setting. checkpoint: what `npdrt.load` returns, at `file`. options: those of
    `open_run` that `resume` needs again.
    """

    path: Path
    file: Path
    checkpoint: Checkpoint
    config: Config
    model: Model
    params: Params
    buffers: Params
    options: dict[str, Any]

    def __repr__(self) -> str:
        progress = self.checkpoint.meta["progress"]
        count = sum(p.size for p in self.params.values())
        return (
            f"Run {self.path}: {self.config.model} of {count:,} parameters on {self.config.data}, "
            f"{self.config.optimizer} lr {self.config.lr:g}, "
            f"step {progress['step']} of {progress['steps']}"
        )

    @property
    def history(self) -> Any:
        """The numbers of every epoch by column: a frame if pandas is installed, else a dict of
        float64 arrays. The columns are those of `npdrt export --to csv`; NaN where there is no
        number."""
        table = trace.history(log.read(self.file.parent / "log.jsonl"))
        columns = {name: np.array(values, np.float64) for name, values in table.items()}
        try:
            import pandas
        except ImportError:
            return columns
        return pandas.DataFrame(columns)

    @property
    def expected(self) -> Expected:
        """What the model expects of data. The checkpoint of an older npdrt does not say it, so that
        the run's data are read."""
        kept = self.checkpoint.meta.get("data")
        if kept is not None:
            return Expected.from_dict(kept, self.file)
        try:
            return Expected.of(self._own_data(None))
        except Error as error:
            raise type(error)(
                f"{self.file} is of an older npdrt and lacks the standardisation, for which the "
                f"run's data are needed: {error}"
            ) from error

    def predict(self, x: Any) -> Array:
        """The model's output for examples x, on the host: logits (N, classes) or targets (N,
        outputs).

        x: (N, ...) in the units of the run's file, which the run's own standardisation takes, or
        tokens, of which all are given to the model in one batch. Raises `Error` for examples of
        another shape.
        """
        dataset = self.expected.unlabelled(x)
        return self._outputs(dataset, "train", None if dataset.vocabulary is None else len(x))

    def predictions(
        self, name: str | Path, *, part: str | None = None, data_dir: Path | None = None
    ) -> Array:
        """`predict` for a FILE.npz, whose x is enough, or for a set of a data set.

        part: see `evaluate`.
        """
        if data.npz.named(str(name)) and part is None:
            return self.predict(data.npz.read_x(Path(name)))
        dataset = self._data(name, data_dir)
        return self._outputs(dataset, _part(dataset, part), None)

    def _outputs(self, dataset: Dataset, part: str, size: int | None) -> Array:
        if hasattr(self.model, "discriminate"):
            raise Error(f"{self.path}: {self.config.model} makes images; use npdrt sample")
        if dataset.perplexity:
            raise Error(f"{dataset.name}: a prediction for every token of a text has no use; "
                        "use npdrt eval for its perplexity")  # fmt: skip
        with self._task_on(dataset) as (history, state):
            x, y = getattr(history.feed, part)
            cuts = batches(x, size or dataset.evaluation_batch_size)
            found = (
                history.task.predict(state.params, state.buffers, x[at, ...], y[at, ...])
                for at in cuts
            )
            return np.concatenate([to_host(output) for output in found])

    def evaluate(
        self,
        name: str | Path | None = None,
        *,
        part: str | None = None,
        data_dir: Path | None = None,
    ) -> Evaluation:
        """The loss and accuracy on the run's data, or on others, standardised as the run's.

        name: a data set (`npdrt.data.load`); None is the run's. part: "train", "valid" or "test";
        None is the test set, or all examples of a file without one. Raises `Error` for labels or
        tokens that the run does not know.
        """
        dataset = self._own_data(data_dir) if name is None else self._data(name, data_dir)
        part = _part(dataset, part)
        with self._task_on(dataset) as (history, state):
            count = Confusion(history.feed.dataset)
            numbers = history.evaluation(part, state, count)
            examples = int(getattr(history.feed, part)[1].shape[0])
        short = {key.removeprefix(f"{part}_"): value for key, value in numbers.items()}
        return Evaluation(dataset.name, part, examples, confusion=count.table, **short)

    def resume(self, **changes: Any) -> Run:
        """Go on with the run as `npdrt.train.resume` does with these arguments, and open it again:
        `run = run.resume()`."""
        resume(self.path, **{**self.options, **changes})
        return open_run(self.path, **self.options)

    def _own_data(self, data_dir: Path | None) -> Dataset:
        dataset = load_data(self.config, data_dir)
        check_data(self.config, dataset, self.checkpoint, self.file)
        return dataset

    def _data(self, name: str | Path, data_dir: Path | None) -> Dataset:
        """A data set, standardised as the run's."""
        expected = self.expected
        dataset = data.load(name, data_dir=data_dir, standardise=expected.scale)
        known = self.checkpoint.meta["provenance"]["data"].get("vocabulary")
        if dataset.digests.get("vocabulary") != known:
            raise Error(f"{name}: its words are not those of the run's data, {self.config.data}: "
                        "its tokens mean other words")  # fmt: skip
        return expected.require(dataset)

    @contextmanager
    def _task_on(self, dataset: Dataset) -> Iterator[tuple[History, State]]:
        """The task of the run with these data, and the state; computed as the run does it."""
        config = self.config
        dataset = dataset.as_streams_for(config.batch_size)
        model = build_model(config, dataset)  # it refuses data of another shape
        size = min(config.batch_size, len(dataset.x))  # of no batch that an evaluation makes
        loaded = dataclasses.replace(config, batch_size=size, shards=1)
        feed = Feed(loaded, dataset, model, arrays.device(config.device))
        threads = blas_threads(config.batch_size, self.params, config.threads, config.shards)
        with computing(config), quiet(), threads, blame(config):
            history = History(make_task(config, model, dataset), feed)
            yield history, State(self.params, self.buffers, {})


class Confusion:
    """Counts of predictions by label."""

    def __init__(self, dataset: Dataset) -> None:
        classes = dataset.classes
        one = bool(classes) and dataset.y.ndim == 1 and (classes or 0) <= MOST_CLASSES
        self.table = np.zeros((classes or 0, classes or 0), np.int64) if one else None

    def __call__(self, output: Array, labels: Array) -> None:
        """Count a batch; outputs that are not one row of logits a label are left out."""
        if self.table is None or output.ndim != 2 or len(output) != len(labels):
            self.table = None
            return
        np.add.at(self.table, (to_host(labels), to_host(output).argmax(-1)), 1)


def _part(dataset: Dataset, part: str | None) -> str:
    """The set of that name; None is the test set, or else x and y."""
    held = {"train": dataset.x, "valid": dataset.x_valid, "test": dataset.x_test}
    if part is None:
        return "train" if held["test"] is None else "test"
    if held.get(part) is None:
        known = ", ".join(name for name, x in held.items() if x is not None)
        raise Error(f"{dataset.name} has no {part} set; use one of {known}")
    return part


def open_run(
    path: str | Path,
    *,
    model: type | None = None,
    code: Sequence[str | Path] = (),
    device: str = "cpu",
) -> Run:
    """Open a run directory, or one of its checkpoints or snapshots, to use its model.

    >>> run = open_run("first")                                              # doctest: +SKIP
    >>> run.predict(x).argmax(-1)                                            # doctest: +SKIP
    >>> run.history["test_accuracy"]                                         # doctest: +SKIP

    model: the class of the run's model, if that is your own; or code: its Python file. npdrt runs
    no code because a run names it. device: where predictions are made.

    Raises `Error` if there is no run, or its model is your own and not given or has changed;
    `FileRefused` for a damaged checkpoint.
    """
    path = Path(path)
    checkpoint, file = _newest(path)
    allowed = [Path(one) for one in code]
    config = stored(checkpoint.meta, file, code=allowed, model=model)
    config = dataclasses.replace(config, device=str(arrays.device(device)))
    where = arrays.device(config.device)
    params, buffers = (
        {name: to_device(value, where) for name, value in group.items()}
        for group in (checkpoint.params, checkpoint.buffers)
    )
    options = {"model": model, "code": allowed, "device": device}
    made = stored_model(config)
    return Run(path, file, checkpoint, config, made, params, buffers, options)


def _newest(path: Path) -> tuple[Checkpoint, Path]:
    """The checkpoint at a path, and its file; a warning if it is not the newest of a run."""
    if not path.is_dir():
        if not path.exists():
            raise Error(container.missing(path))
        return store.load(path), path
    checkpoint, file, warning = store.load_newest(path)
    if warning:
        warnings.warn(warning.replace("Resuming from", "Using"), stacklevel=3)
    return checkpoint, file
