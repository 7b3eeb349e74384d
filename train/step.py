"""One training step, one evaluation, and the measurements of a step, on arrays of any device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from npdrt import ops, value_and_grad
from npdrt.arrays import Array, Params, label, namespace, phase
from npdrt.errors import Error
from npdrt.optim import Optimizer, norm
from npdrt.random import Random


@dataclass(frozen=True)
class State:
    """What one step maps to the next: parameters, buffers and optimizer state."""

    params: Params
    buffers: Params
    optimizer: dict[str, Array]


@dataclass(frozen=True)
class Step:
    """What a step leaves behind, all on the device: the mean loss of the minibatch before the
    step, how many of its samples were classified right, and what `measure` found if asked."""

    state: State
    loss: Array
    correct: Array
    measured: dict[str, list[Array]]


@dataclass(frozen=True)
class Task:
    """A model and its loss: cross-entropy for integer labels, squared error for real targets."""

    model: Any
    classes: int | None
    label_smoothing: float = 0.0

    def loss(self, output: Any, y: Array) -> Any:
        """The mean loss of a batch; 0-d."""
        if self.classes is None:
            return ops.squared_error(output, y)
        if output.shape[-1] < self.classes:  # a label beyond the logits would count as loss 0
            raise Error(f"the model returns {output.shape[-1]} values for {self.classes} classes")
        return ops.softmax_cross_entropy(output, y, label_smoothing=self.label_smoothing)

    def correct(self, output: Array, y: Array) -> Array:
        """How many samples of the batch are classified right; 0 for real targets. 0-d int64."""
        xp = namespace(output)
        if self.classes is None:
            return xp.asarray(0, dtype=xp.int64)
        return xp.sum(xp.argmax(output, axis=-1) == y, dtype=xp.int64)

    def forward(
        self, params: Params, buffers: Params, x: Array, y: Array, random: Random
    ) -> tuple[Any, tuple[Any, Params]]:
        """`(loss, (output, buffers))` in training mode."""
        if hasattr(self.model, "apply"):
            output, buffers = self.model.apply(params, buffers, x, train=True, random=random)
        else:
            output = self.model(params, x)
        return self.loss(output, y), (output, buffers)


def make_step(task: Task, optimizer: Optimizer, *, traced: bool = False) -> Callable[..., Step]:
    """The function `(state, x, y, lr, random) -> Step`; pure, no synchronisation, can be recorded.

    traced: measure the step too.
    """
    differentiated = value_and_grad(task.forward, has_aux=True)

    def step(state: State, x: Array, y: Array, lr: Any, random: Random) -> Step:
        (loss, (output, buffers)), grads = differentiated(state.params, state.buffers, x, y, random)
        correct = task.correct(output, y)
        params, slots = optimizer.update(state.params, grads, state.optimizer, lr=lr)
        with phase("measure"):
            measured = measure(state.params, params, grads) if traced else {}
        return Step(State(params, buffers, slots), loss, correct, measured)

    return step


def evaluate(task: Task, state: State, x: Array, y: Array, batch: int = 1000) -> tuple[Any, Any]:
    """`(mean loss, number right)` over a data set in evaluation mode, as 0-d arrays."""
    xp = namespace(x)
    total = xp.asarray(0.0, dtype=xp.float64)
    right = xp.asarray(0, dtype=xp.int64)
    for start in range(0, x.shape[0], batch):
        part, labels = x[start : start + batch, ...], y[start : start + batch, ...]
        output = task.model(state.params, part)
        loss = xp.asarray(task.loss(output, labels), dtype=xp.float64)
        total = total + loss * part.shape[0]
        right = right + task.correct(output, labels)
    return total / x.shape[0], right


def measure(before: Params, after: Params, grads: Params) -> dict[str, list[Array]]:
    """Per parameter, as 0-d float64 arrays: weight norm, gradient norm, relative update and the
    cosine between the update and the negative gradient; not finite where a divisor is 0."""
    out: dict[str, list[Array]] = {
        "weight_norm": [],
        "gradient_norm": [],
        "relative_update": [],
        "cosine": [],
    }
    for name, w in before.items():
        xp, g = namespace(w), grads[name]
        change = label(after[name] - w, f"change of {name}")
        w_norm, g_norm, size = norm(w), norm(g), norm(change)
        product = xp.sum(xp.asarray(change, dtype=xp.float64) * xp.asarray(g, dtype=xp.float64))
        out["weight_norm"].append(w_norm)
        out["gradient_norm"].append(g_norm)
        out["relative_update"].append(size / w_norm)
        out["cosine"].append(-product / (size * g_norm))
    return out
