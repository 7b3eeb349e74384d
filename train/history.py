"""The records of a log: of a minibatch, an epoch, the measurements of a step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from npdrt import compute
from npdrt.arrays import Array, namespace, to_host
from npdrt.store.log import Record
from npdrt.train.conditioning import conditioning
from npdrt.train.evaluation import evaluate, unseen
from npdrt.train.feed import Feed
from npdrt.train.shards import ALONE, Alone
from npdrt.train.step import Position, State, Step, Task

LARGEST_EXPONENT = 709.0  # exp(710) is inf


@dataclass(frozen=True)
class History:
    """The records of a run with this task and these data; each method makes one."""

    task: Task
    feed: Feed
    ranks: Alone = ALONE

    def trace(self, at: Position, done: Step) -> Record:
        """The measurements of a step."""
        rows = {name: to_host(values).tolist() for name, values in done.measured.items()}
        return {"event": "trace", "step": at.step, **rows}

    def conditioning(self, at: Position) -> Record:
        """Condition numbers and Jacobians; expensive, so only if the configuration asks."""
        found = conditioning(self.task.model, at.state.params, self.feed.train[0])
        return {"event": "conditioning", "step": at.step, **found}

    def step(self, at: Position, done: Step, lr: float) -> Record:
        """Loss and accuracy of a minibatch before its step."""
        xp = namespace(done.loss)
        both = [xp.asarray(value, dtype=xp.float64) for value in (done.loss, done.correct)]
        loss, correct = to_host(xp.stack(both)).tolist()  # one wait for the device
        record: Record = {"event": "step", "step": at.step, "loss": loss, "lr": lr}
        record |= {f"{name}_loss": float(to_host(value)) for name, value in done.others.items()}
        if self.feed.dataset.classes is not None:
            record["accuracy"] = correct / self.task.count(self.feed.labels(at.step - 1))
        return record | self._of_minibatches("perplexity", loss)

    def epoch(self, at: Position, lr: float, start_time: float) -> Record:
        """The means of a finished epoch, and an evaluation. start_time: when the run began, by
        `time.perf_counter`."""
        record: Record = {"event": "epoch", "epoch": at.step // self.feed.epoch, "step": at.step}
        record |= {"lr": lr, "train_loss": self.mean_loss(at)}
        if self.feed.dataset.classes is not None:
            record["train_accuracy"] = int(to_host(at.correct)) / self.predictions
        record |= self._of_minibatches("train_perplexity", record["train_loss"])
        record |= self.evaluation("valid", at.state)
        record |= self.evaluation("test", at.state)
        record["seconds"] = time.perf_counter() - start_time
        return record

    @property
    def predictions(self) -> int:
        """Predictions of an epoch."""
        return self.task.count(self.feed.dataset.y)

    def mean_loss(self, at: Position) -> float:
        """The mean loss of a finished epoch."""
        return float(to_host(at.loss_sum)) / self.predictions

    def evaluation(
        self, name: str, state: State, see: Callable[[Array, Array], None] = unseen
    ) -> dict[str, float]:
        """Loss, accuracy and perplexity over a whole set, "train", "valid" or "test"; empty if the
        data have none. see: see `evaluate`."""
        part: tuple[Any, Any] | None = getattr(self.feed, name)
        if part is None:
            return {}
        x, y = part
        batch = self.feed.dataset.evaluation_batch_size
        loss, correct = evaluate(self.task, state, x, y, batch, self.ranks, see)
        result = {f"{name}_loss": float(to_host(loss))}
        if self.feed.dataset.classes is not None:
            result[f"{name}_accuracy"] = int(to_host(correct)) / self.task.count(y)
        return result | self._perplexity(f"{name}_perplexity", result[f"{name}_loss"])

    def _of_minibatches(self, name: str, loss: float) -> dict[str, float]:
        """The perplexity of a training loss; a smoothed loss has none."""
        return {} if self.task.label_smoothing else self._perplexity(name, loss)

    def _perplexity(self, name: str, loss: float) -> dict[str, float]:
        """exp(mean loss), by name, of a language model; inf if that overflows."""
        if not self.feed.dataset.perplexity:
            return {}
        return {name: compute.exp_of(loss) if loss < LARGEST_EXPONENT else math.inf}
