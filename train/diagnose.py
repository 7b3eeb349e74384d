"""Find the first value of a step that is not finite."""

from __future__ import annotations

from collections.abc import Iterator

from npdrt.arrays import Array, Params, namespace, to_host
from npdrt.autodiff import Tensor, backward, graph
from npdrt.optim import Updater
from npdrt.random import Random
from npdrt.train.step import State, Task


def first_nonfinite(
    task: Task, optimizer: Updater, state: State, x: Array, y: Array, lr: float, random: Random
) -> str | None:
    """The first value of one step that is not finite, in words; None if all are finite.

    Order: the data, the parameters, every operation of the forward pass, the gradients from the
    last parameter back to the first, the updated parameters.
    """
    for name, value in _values(task, optimizer, state, x, y, lr, random):
        if not _is_finite(value):
            return name
    return None


def _values(
    task: Task, optimizer: Updater, state: State, x: Array, y: Array, lr: float, random: Random
) -> Iterator[tuple[str, Array]]:
    yield "the minibatch", x
    yield from ((f"parameter {name}", value) for name, value in state.params.items())
    params, buffers = state.params, state.buffers
    for turn in task.turns:
        own, of = turn.own(params), f" of the {turn.network}" if turn.network else ""
        leaves = {name: Tensor(value, name=name) for name, value in own.items()}
        loss, (_, buffers) = turn.loss({**params, **leaves}, buffers, x, y, random)
        yield from _forward(loss, leaves, of)
        one = namespace(loss.value).ones((), dtype=loss.value.dtype)
        cotangents = backward(loss, one)
        grads: Params = {
            name: cotangents.get(id(leaf), namespace(leaf.value).zeros_like(leaf.value))
            for name, leaf in leaves.items()
        }
        yield from ((f"the gradient of {name}", grads[name]) for name in reversed(grads))
        updated, _ = optimizer.update(own, task.clipped(grads), state.optimizer, lr=lr)
        yield from ((f"{name} after its update", value) for name, value in updated.items())
        params = {**params, **updated}


def _forward(loss: Tensor, leaves: dict[str, Tensor], of: str) -> Iterator[tuple[str, Array]]:
    """The operations that lead to a loss. of: the network, " of the generator"; or "" """
    operations = [node for node in graph(loss) if node.edges]
    for number, node in enumerate(operations, 1):
        using = [parent.name for parent, _ in node.edges if parent.name in leaves]
        place = f"operation {number} of the forward pass{of}, {node.name}({', '.join(using)})"
        yield place, node.value


def _is_finite(value: Array) -> bool:
    xp = namespace(value)
    return bool(to_host(xp.all(xp.isfinite(value))))
