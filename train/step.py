"""One training step and its measurements, on any device."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from npdrt import ops, value_and_grad
from npdrt.arrays import Array, Params, label, namespace, phase
from npdrt.errors import Error
from npdrt.models import Model
from npdrt.optim import Updater, norm
from npdrt.optim.clip import clipped
from npdrt.optim.function import shared_state
from npdrt.optim.schedules import Schedule
from npdrt.random import Random
from npdrt.trust.descent import descent_threshold, dot
from npdrt.trust.distances import (
    log_deep_relative_trust,
    squared_deep_relative_trust,
    weights,
)


@dataclass(frozen=True)
class State:
    """The state that a step maps to the next: parameters, buffers and optimizer state."""

    params: Params
    buffers: Params
    optimizer: dict[str, Array]


@dataclass(frozen=True)
class Step:
    """The results of a step, on the device: the new state, the mean loss of the minibatch before
    the step, how many of its samples were classified correctly, and the results of `measure` if it
    is traced. others: the losses of the networks after the first, by name."""

    state: State
    loss: Array
    correct: Array
    measured: dict[str, Array]
    others: dict[str, Array]


@dataclass(frozen=True)
class Position:
    """The state of a run between two steps. The next step overwrites the arrays of `state`, which
    belong to the step's program.

    step: steps done. loss_sum, correct: over the predictions of the unfinished epoch, 0-d float64
    and int64 on the device. seconds: training time of earlier processes.
    """

    state: State
    schedule: Schedule
    step: int
    loss_sum: Array
    correct: Array
    seconds: float = 0.0


def epoch_sums(like: Array, loss: float = 0.0, correct: int = 0) -> dict[str, Array]:
    """`loss_sum` and `correct` of a `Position`, on the device of the array `like`."""
    xp = namespace(like)
    return {
        "loss_sum": xp.asarray(loss, dtype=xp.float64),
        "correct": xp.asarray(correct, dtype=xp.int64),
    }


Forward = Callable[[Params, Params, Array, Array, Random], tuple[Any, tuple[Any, Params]]]


@dataclass(frozen=True)
class Turn:
    """A part of a step: the loss of one network, after which its parameters are updated.

    network: the parameters are those below "NETWORK/"; "" stands for all of them. The turns of
    several networks come in the order of their names, as the columns of a trace do. loss: a
    function `(params, buffers, x, y, random) -> (loss, (output, buffers))` of all parameters, in
    training mode.
    """

    network: str
    loss: Forward

    def own(self, params: Params) -> Params:
        """The parameters that the turn updates."""
        return of_network(self.network, params)

    def gradients(
        self, params: Params, buffers: Params, x: Array, y: Array, random: Random
    ) -> tuple[Any, Params]:
        """`((loss, (output, buffers)), gradients)` by its own parameters; others are constants."""

        def loss(own: Params) -> Any:
            return self.loss({**params, **own}, buffers, x, y, random)

        found: tuple[Any, Params] = value_and_grad(loss, has_aux=True)(self.own(params))
        return found


def of_network(network: str, params: Mapping[str, Any]) -> dict[str, Any]:
    """What is below "NETWORK/" by name; everything if `network` is ""."""
    return {n: w for n, w in params.items() if not network or n.startswith(f"{network}/")}


@dataclass(frozen=True)
class Task:
    """A model and its loss: cross-entropy for integer labels, squared error for real targets.

    clip: the largest norm of all gradients together (`npdrt.optim.clip`); None leaves them alone.
    """

    model: Model
    classes: int | None
    label_smoothing: float = 0.0
    clip: float | None = None

    @property
    def turns(self) -> Sequence[Turn]:
        """The parts of a step, in order: one, of all parameters."""
        return [Turn("", self.forward)]

    def loss(self, output: Any, y: Array, *, smoothed: bool) -> Any:
        """The mean loss of a batch; 0-d. smoothed: with label smoothing, as it is trained."""
        if self.classes is None:
            return ops.squared_error(output, y)
        if output.shape[-1] < self.classes:  # a label beyond the logits would count as loss 0
            raise Error(f"the model returns {output.shape[-1]} values for {self.classes} classes")
        smoothing = self.label_smoothing if smoothed else 0.0
        return ops.softmax_cross_entropy(output, y, label_smoothing=smoothing)

    def count(self, y: Array) -> int:
        """The number of predictions in the mean loss of a batch: one an example, or one a label if
        an example has several (the next word of every token, both ends of an answer)."""
        return int(y.shape[0]) if self.classes is None else math.prod(y.shape)

    def picture(self, state: State, seed: int) -> Any:
        """Pixels that show what the model makes, (height, width, channels); None for most tasks."""
        return None

    def clipped(self, grads: Params) -> Params:
        """The gradients as the rule is given them."""
        return grads if self.clip is None else clipped(grads, self.clip)

    def correct(self, output: Array, y: Array) -> Array:
        """How many predictions of the batch are correct; 0 for real targets. 0-d int64."""
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
        return self.loss(output, y, smoothed=True), (output, buffers)

    def predict(self, params: Params, buffers: Params, x: Array, y: Array) -> Array:
        """The output in evaluation mode; a model that makes buffers is given them, if any. y: the
        labels or targets, which this task does not need."""
        given = {"buffers": buffers} if buffers and self._make_buffers else {}
        return self.model(params, x, **given)

    def buffers(self, seed: int, device: Any, dtype: str) -> Params:
        """The model's first buffers, from its method `buffers`; {} if it has none."""
        make = self._make_buffers
        return dict(make(seed=seed, device=device, dtype=dtype)) if make else {}

    @property
    def _make_buffers(self) -> Callable[..., Params] | None:
        """The model's method `buffers`, if it has one."""
        found = getattr(self.model, "buffers", None)
        return found if callable(found) else None


def make_step(task: Task, optimizer: Updater, *, traced: bool = False) -> Callable[..., Step]:
    """The function `(state, x, y, lr, random) -> Step`; pure, no synchronisation, can be recorded.

    traced: measure the step too. A turn sees the parameters and buffers that the turns before it
    left. All start from the same optimizer state: it holds the slots of every parameter, and the
    step count and powers, which are the same for all networks. Only a state that all parameters
    share (`npdrt.optim.function`) goes from turn to turn.
    """
    turns = task.turns
    networks = [turn.network for turn in turns]

    def step(state: State, x: Array, y: Array, lr: Any, random: Random) -> Step:
        params, buffers, slots = state.params, state.buffers, dict(state.optimizer)
        grads: Params = {}
        losses: list[Array] = []
        correct: Array = None
        for turn in turns:
            (loss, (output, buffers)), found = turn.gradients(params, buffers, x, y, random)
            correct = task.correct(output, y) if correct is None else correct
            given = task.clipped(found)
            before = {**state.optimizer, **shared_state(slots)}
            new, made = optimizer.update(turn.own(params), given, before, lr=lr)
            params, grads = {**params, **new}, {**grads, **found}
            slots.update(made)
            losses.append(loss)
        with phase("measure"):
            measured = measure(state.params, params, grads, networks) if traced else {}
        others = dict(zip(networks[1:], losses[1:], strict=True))
        return Step(State(params, buffers, slots), losses[0], correct, measured, others)

    return step


def measure(
    before: Params, after: Params, grads: Params, networks: Sequence[str] = ("",)
) -> dict[str, Array]:
    """The measurements of a step for a trace, float64, on the device.

    Per parameter, (parameters,): weight norm, gradient norm, relative update, and the cosine
    between the update and the negative gradient; not finite if a divisor is 0. Over the weights of
    each network: see `network`; 0-d, or if there are several networks (networks,). Every array is
    read once for each of its norms and once for the product; the rest is arithmetic on the norms.
    """
    found: list[tuple[Array, ...]] = []
    for name, w in before.items():
        change, g = label(after[name] - w, f"change of {name}"), grads[name]
        found.append((norm(w), norm(g), norm(change), dot(change, g)))
    xp = namespace(*before.values())
    w_norm, g_norm, size, product = (xp.stack(list(column)) for column in zip(*found, strict=True))
    layers = {
        "weight_norm": w_norm,
        "gradient_norm": g_norm,
        "relative_update": size / w_norm,
        "cosine": xp.clip(-product / (size * g_norm), -1.0, 1.0),
    }
    totals = []
    for name in networks:
        members = weights(of_network(name, before))
        chosen = [i for i, parameter in enumerate(before) if parameter in members]
        totals.append(network(layers, size, chosen))
    if len(totals) == 1:
        return layers | totals[0]
    return layers | {name: xp.stack([t[name] for t in totals]) for name in totals[0]}


def joined(measured: Mapping[str, dict[str, Array]], params: Params) -> dict[str, Array]:
    """The measurements of several networks, by name and each by `measure`, as those of all."""
    if len(measured) == 1:
        return next(iter(measured.values()))
    names = [name for network in measured for name in of_network(network, params)]
    order, found = [names.index(name) for name in params], {}
    for name, first in next(iter(measured.values())).items():
        xp, column = namespace(first), [m[name] for m in measured.values()]
        found[name] = xp.concat(column)[xp.asarray(order)] if first.shape else xp.stack(column)
    return found


def network(layers: dict[str, Array], size: Array, chosen: list[int]) -> dict[str, Array]:
    """The papers' distances of a step over the weights; empty if there are none.

    layers: the measurements of all parameters; size: the norms of their changes; chosen: which
    are weights. The threshold is Lemma 2's at the smallest cosine, with as many layers as there
    are weights.
    """
    if not chosen:
        return {}
    xp, relative = namespace(size), layers["relative_update"]
    r = {str(i): relative[i, ...] for i in chosen}
    log, sizes = log_deep_relative_trust(r), _chosen(size, chosen)
    worst = xp.min(_chosen(layers["cosine"], chosen))
    return {
        "deep_relative_trust": xp.expm1(log),
        "log_deep_relative_trust": log,
        "squared_deep_relative_trust": squared_deep_relative_trust(r),
        "euclidean_trust": xp.sum(sizes * sizes),
        "descent_threshold": descent_threshold(worst, len(chosen)),
    }


def _chosen(column: Array, chosen: list[int]) -> Array:
    """Some of the numbers of a column."""
    if len(chosen) == column.shape[0]:
        return column
    return namespace(column).stack([column[i, ...] for i in chosen])
