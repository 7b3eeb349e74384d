"""Slices of the loss along the layerwise gradient: Bernstein et al. 2020, Figure 1.

At a snapshot with parameters W and full-batch gradient g, and for eta on a grid,

    W_l(eta) = W_l - eta * g_l |W_l|_F / |g_l|_F      for every array W_l, biases included,

the loss L(W(eta)) and the gradient there. Arrays with |g_l| = 0 stay.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from npdrt import arrays, schema, store, value_and_grad
from npdrt.arrays import Array, Params, cast, namespace, quiet, to_device, to_host
from npdrt.errors import Error, FileRefused
from npdrt.optim import norm
from npdrt.program import Program, memory_on, record
from npdrt.regular import require
from npdrt.store import container
from npdrt.store.lock import exclusive
from npdrt.train.adversarial import make_task
from npdrt.train.cautions import of_threads
from npdrt.train.config import build_model, load_data, stored
from npdrt.train.feed import Feed
from npdrt.train.studies.figure import Figure, Line, Panel
from npdrt.trust.descent import changes_of, layerwise_direction

AUTHORS_GRID = tuple(i / 1000 for i in range(100))  # 0, 0.001, ..., 0.099
CHUNK = 1000  # examples of one forward and backward pass
ROW = ("loss", "slope", "gradient_change", "steepest_descent_distance")  # the arrays of one slice
DATASETS = {
    "step": ("(snapshots,)", "training steps finished at the snapshot"),
    "epoch": ("(snapshots,)", "epochs finished at the snapshot"),
    "eta": ("(points,)", "size of the perturbation of every array, relative to its norm"),
    "loss": ("(snapshots, points)", "mean loss over the examples (nats)"),
    "slope": ("(snapshots,)", "dL/deta at 0: minus the sum of |g_l| |W_l| (nats)"),
    "gradient_change": (
        "(snapshots, points, parameters)",
        "2-norm of g(eta) - g(0) over that of g(0), each array; NaN where g(0) is 0",
    ),
    "steepest_descent_distance": (
        "(snapshots, points)",
        "max over the grid up to eta of |g(W + t dW) - g(W)|, times |dW| (author response)",
    ),
}


@dataclass(frozen=True, eq=False)
class Slices:
    """The slices of a run. Shapes and meaning of the arrays: DATASETS.

    settings: what they depend on; "examples" of the "train_examples" are used.
    """

    settings: Mapping[str, Any]
    step: Any
    epoch: Any
    eta: Any
    loss: Any
    slope: Any
    gradient_change: Any
    steepest_descent_distance: Any

    @property
    def first_layer(self) -> Any:
        """gradient_change of the first array, a weight; (snapshots, points)."""
        return self.gradient_change[:, :, 0]

    def bound(self) -> Any:
        """The author response's upper bound on the loss, L + g.dW + distance; (snapshots, points).
        The maximum in the distance is over the grid, so it may be a little low."""
        first_order = self.loss[:, :1] + self.eta * self.slope[:, None]
        return first_order + self.steepest_descent_distance

    def best(self) -> Any:
        """The eta of the lowest loss; (snapshots,)."""
        return self.eta[np.argmin(np.where(np.isfinite(self.loss), self.loss, np.inf), axis=1)]


def slices(
    run: Path,
    *,
    eta: Sequence[float] = AUTHORS_GRID,
    steps: Sequence[int] | None = None,
    examples: int | None = None,
    threads: int | None = None,
    fast: bool = False,
    device: str | None = None,
    data_dir: Path | None = None,
    code: Sequence[Path] = (),
    name: str = "slices.h5",
    progress: Callable[[int, int], None] = lambda done, total: None,
    stop: Callable[[], int] = lambda: 0,
) -> Slices:
    """Slice a run at its snapshots (its last checkpoint if it has none) into RUN/`name`.

    eta: the grid, increasing from 0. steps: which snapshots; None is all. examples: only the
    first so many of the training set. code: the file of a user's model. threads: of
    BLAS; None is its own number. progress: called with points done and points in all. stop:
    asked after every point; a signal number other than 0 ends after the last whole snapshot. The
    file is written after every snapshot. Snapshots in it of the same grid and examples are not
    computed again.

    Raises Error if there is no such snapshot, for a grid that does not begin with 0, and if the
    data or the model file are not those of the run.
    """
    eta = tuple(float(value) for value in eta)
    if eta[:1] != (0.0,) or list(eta) != sorted(set(eta)):
        raise Error(f"eta must increase from 0; got {', '.join(f'{e:g}' for e in eta[:5])} ...")
    require(run, "directory")
    with exclusive(run):
        chosen = _snapshots(run, steps)
        slicer = Slicer(run, chosen, eta, examples, fast, device, data_dir, code)
        rows = _stored(run / name, slicer.settings)
        todo = {step: path for step, path in chosen.items() if step not in rows}
        done = itertools.count(1)

        def tick() -> None:
            progress(next(done), len(eta) * len(todo))
            if stop():
                raise _Stopped

        with threadpool_limits(threads, user_api="blas"), suppress(_Stopped):
            for caution in of_threads(threads):
                warnings.warn(caution, stacklevel=2)
            for step, path in todo.items():
                rows[step] = slicer.slice(path, tick)
                _write(run / name, _gather(rows, slicer.settings))
    return _gather({step: rows[step] for step in chosen if step in rows}, slicer.settings)


class _Stopped(Exception):
    """A signal came between two points."""


class Slicer:
    """A run's model and data, and one slice at a time; a slice depends on `settings`."""

    def __init__(
        self,
        run: Path,
        snapshots: Mapping[int, Path],
        eta: Sequence[float],
        examples: int | None,
        fast: bool,
        device: str | None,
        data_dir: Path | None,
        code: Sequence[Path],
    ):
        first = next(iter(snapshots.values()))
        meta = store.load(first).meta
        config = stored(meta, first, code=code)
        config = dataclasses.replace(config, device=device or config.device)
        dataset = load_data(config, data_dir)
        if dataset.digests != meta["provenance"]["data"]:
            raise Error(f"{run}: the data set {config.data} is not the one of the run")
        if dataset.perplexity:
            raise Error(f"{run}: slices are over examples, and {config.data} is a running text")
        dataset = dataset.as_streams_for(config.batch_size)
        self.device, model = arrays.device(config.device), build_model(config, dataset)
        self._task = make_task(dataclasses.replace(config, clip=None), model, dataset)
        if len(self._task.turns) > 1:
            raise Error(f"{run}: slices are of one loss; its two networks have a loss each")
        n = len(dataset.x)
        if examples is not None and not 1 <= examples <= n:
            raise Error(
                f"examples: expected 1 to {n}, the size of the training set; got {examples}"
            )
        feed = Feed(config, dataset, model, self.device)
        self._set = tuple(part[: examples or n, ...] for part in feed.train)
        self._fast = fast
        self._programs: dict[Any, Program] = {}
        self._memory = memory_on(self.device)
        self._gradient = value_and_grad(self._loss)
        self.settings = {
            "data": config.data,
            "examples": examples or n,
            "train_examples": n,
            "eta": list(eta),
            "config": config.as_dict(),
            "provenance": meta["provenance"]["data"],
        }

    def slice(self, path: Path, tick: Callable[[], None]) -> dict[str, Any]:
        """The row of DATASETS for one snapshot; `tick` is called after every point."""
        checkpoint = store.load(path)
        schema.check(checkpoint.meta, schema.RunMeta, path)
        with arrays.on(self.device), quiet():
            params, buffers = (
                {name: to_device(value, self.device) for name, value in group.items()}
                for group in (checkpoint.params, checkpoint.buffers)
            )
            return {
                **self._slice(params, buffers, tick),
                "epoch": checkpoint.meta["progress"]["epoch"],
            }

    def _slice(self, params: Params, buffers: Params, tick: Callable[[], None]) -> dict[str, Any]:
        xp = namespace(*params.values())
        _, found = self.full_batch(params, buffers)
        gradient = {name: xp.asarray(g, copy=True) for name, g in found.items()}
        del found
        direction = layerwise_direction(params, gradient)
        length = math.sqrt(sum(float(to_host(norm(d))) ** 2 for d in direction.values()))
        sizes = np.array([float(to_host(norm(g))) for g in gradient.values()])
        slope = -sum(
            size * float(to_host(norm(w))) for size, w in zip(sizes, params.values(), strict=True)
        )
        losses, changes = [], []
        for eta in self.settings["eta"]:
            moved = {name: w + cast(eta, w) * direction[name] for name, w in params.items()}
            loss, there = self.full_batch(moved, buffers)
            losses.append(float(to_host(loss)))
            change = self._replay("change", change_norms, gradient, there)
            del there  # the next gradient can have its memory
            changes.append(to_host(change))
            tick()
        moved_by = np.array(self.settings["eta"]) * length
        return {
            "loss": losses,
            "slope": slope,
            "gradient_change": np.array(changes) / sizes,
            "steepest_descent_distance": farthest(changes) * moved_by,
        }

    def full_batch(self, params: Params, buffers: Params) -> tuple[Array, Params]:
        """The mean loss over all examples, 0-d float64, and its gradient; in evaluation mode.
        Chunks are weighted by their share and added in order."""
        x, y = self._set
        xp, n = namespace(x), x.shape[0]
        loss = xp.asarray(0.0, dtype=xp.float64)
        total = {name: xp.zeros_like(p) for name, p in params.items()}
        for start in range(0, n, CHUNK):
            part = (x[start : start + CHUNK, ...], y[start : start + CHUNK, ...])
            share = part[0].shape[0] / n
            args = (params, buffers, *part, share, loss, total)
            loss, total = self._replay(part[0].shape[0], self._add, *args)
        return loss, total

    def _replay(self, key: Any, step: Callable[..., Any], *args: Any) -> Any:
        """`step(*args)`, recorded once for each key."""
        if key not in self._programs:
            self._programs[key] = record(step, *args, memory=self._memory, fast=self._fast)
        return self._programs[key](*args)

    def _loss(self, params: Params, buffers: Params, x: Array, y: Array) -> Any:
        output = self._task.predict(params, buffers, x, y)
        return self._task.loss(output, y, smoothed=True)

    def _add(
        self, params: Params, buffers: Params, x: Array, y: Array, share: Any, loss: Any, total: Any
    ) -> tuple[Any, Params]:
        value, grads = self._gradient(params, buffers, x, y)
        loss = loss + share * namespace(x).asarray(value, dtype=namespace(x).float64)
        return loss, {name: total[name] + cast(share, g) * g for name, g in grads.items()}


def farthest(changes: Sequence[Any]) -> Any:
    """The largest |g(W + t dW) - g(W)| so far, (points,), from its parts (points, parameters)."""
    return np.maximum.accumulate(np.linalg.norm(np.array(changes), axis=1))


def change_norms(before: Params, after: Params) -> Array:
    """|after - before| of every array; (parameters,), float64."""
    changes = list(changes_of(before, after).values())
    return namespace(*changes).stack(changes)


def _snapshots(run: Path, steps: Sequence[int] | None) -> dict[int, Path]:
    """The files of the snapshots by step; the last checkpoint if there are none."""
    files = sorted((run / "snapshots").glob("step-*.h5"))
    numbered = ((path.stem.removeprefix("step-"), path) for path in files)
    found = {int(number): path for number, path in numbered if re.fullmatch("[0-9]{1,16}", number)}
    if not found:
        checkpoint, path, _ = store.load_newest(run)
        schema.check(checkpoint.meta, schema.RunMeta, path)
        found = {checkpoint.meta["progress"]["step"]: path}
    missing = sorted(set(steps or ()) - set(found))
    if missing:
        raise Error(f"{run} has no snapshot at step {missing[0]}; it has {sorted(found)}")
    return {step: path for step, path in found.items() if not steps or step in steps}


# --- the file ----------------------------------------------------------------------------------


def _gather(rows: Mapping[int, dict[str, Any]], settings: Mapping[str, Any]) -> Slices:
    """The rows in the order of their steps, as one."""
    steps = sorted(rows)
    columns = {name: np.array([rows[step][name] for step in steps]) for name in (*ROW, "epoch")}
    return Slices(
        settings=settings,
        step=np.array(steps, dtype=np.int64),
        eta=np.array(settings["eta"]),
        **columns,
    )


def _write(path: Path, found: Slices) -> None:
    """RUN/slices.h5, atomically."""
    about = {name: {"shape": shape, "what": what} for name, (shape, what) in DATASETS.items()}
    envelope = {"kind": "slices", "settings": found.settings, "datasets": about}
    container.write(path, {name: getattr(found, name) for name in DATASETS}, envelope)


def read(path: Path) -> Slices:
    """The slices in a file, or `FileRefused`."""
    found, meta = container.read(path)
    if meta.get("kind") != "slices":
        raise FileRefused(f"{path}: expected slices; it holds {meta.get('kind')!r}")
    schema.check(meta, schema.SlicesMeta, path)
    if missing := DATASETS.keys() - found.keys():
        raise FileRefused(f"{path}: lacks the dataset {min(missing)}")
    return _fitting(Slices(meta["settings"], **{name: found[name] for name in DATASETS}), path)


def _fitting(found: Slices, path: Path) -> Slices:
    """Slices whose arrays have the shapes of DATASETS; else `FileRefused`."""
    parameters = found.gradient_change.shape[-1:]
    if parameters == (0,):
        raise FileRefused(f"{path}: gradient_change has no parameters")
    sizes = {"snapshots": found.step.shape, "points": found.eta.shape, "parameters": parameters}
    for name, (shape, _) in DATASETS.items():
        axes = [sizes[axis] for axis in shape.strip("(),").split(", ")]
        expected = tuple(n for axis in axes for n in axis)
        if getattr(found, name).shape != expected or len(expected) != len(axes):
            raise FileRefused(f"{path}: expected {name} of shape {shape}")
    return found


def _stored(path: Path, settings: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    """The rows that the file holds, if they are of the same settings."""
    if not path.exists() or (found := read(path)).settings != json.loads(json.dumps(settings)):
        return {}
    steps = enumerate(found.step.tolist())
    return {step: {name: getattr(found, name)[i] for name in (*ROW, "epoch")} for i, step in steps}


def as_figure(found: Slices) -> Figure:
    """The loss and the first layer's gradient change along every slice, on log axes."""
    panels = []
    for title, values in (("loss (nats)", found.loss), ("gradient change", found.first_layer)):
        lines = [
            Line(f"epoch {epoch:.3g}", found.eta, row, shade=i / max(len(values) - 1, 1))
            for i, (epoch, row) in enumerate(zip(found.epoch, values, strict=True))
        ]
        panels.append(Panel(title, "relative perturbation eta", title, tuple(lines), ylog=True))
    return Figure("slices", f"{found.settings['examples']} training examples", tuple(panels))
