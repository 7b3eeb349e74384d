"""Singular values of a small residual network's Jacobian while it trains, with three shortcuts.

Before a step, the derivative of the logits of a whole batch in the batch after the first layers,
the coupling of its images by batch normalisation included: with 32 images of MNIST 320 x 23,040.
It is the product of the Jacobians of all layers but the first, which bounds the constant of the
Polyak-Lojasiewicz inequality from below (MacDonald et al. 2023, Proposition 4.6).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from msgspec import Struct

from npdrt import data, optim
from npdrt.arrays import Array, Params
from npdrt.models import MNISTResNet
from npdrt.models.mnist_resnet import VARIANTS
from npdrt.random import Random
from npdrt.schema import Positive, Size
from npdrt.train.step import State, Task, make_step
from npdrt.train.studies.cache import kept
from npdrt.train.studies.figure import Figure, Line, Panel
from npdrt.train.studies.study import Report, Stopped, Table, Work
from npdrt.trust import batch_jacobian, gram_spectrum

NEEDS_RUNS = False  # it trains its own networks
CLASSES, SIDE = 10, 28
LETTERS = dict(zip(VARIANTS, "abc", strict=True))  # as the paper's figure calls them
QUANTILES = {"smallest": 0.0, "at 1/20": 0.05, "at 1/10": 0.1, "at 1/4": 0.25, "median": 0.5,
             "at 3/4": 0.75, "largest": 1.0}  # fmt: skip


class Options(Struct):
    """averaged: Jacobians of a mean; bins of [0, largest]; losses: steps shown."""

    data: str
    examples: Positive
    trials: Positive
    steps: Positive
    jacobians: Positive
    lr: Size
    averaged: Positive
    bins: Positive
    largest: Size
    losses: list[Positive]


@dataclass(frozen=True, eq=False)
class Trial:
    """spectra: (jacobians, values), ascending; losses: (steps,), each before its step."""

    spectra: Any
    losses: Any


def report(work: Work) -> Report:
    """Spectra of the first Jacobians and losses, means over the trials, a variant a column."""
    options = work.recipe.options
    x, y = _images(work)
    trials = _trials(work, x, y)
    spectra = {name: _mean_spectra(t, options["averaged"]) for name, t in trials.items()}
    means = {name: s.mean(0) for name, s in spectra.items()}
    losses = {name: np.mean([t.losses for t in found], 0) for name, found in trials.items()}
    tables = (_spectra_table(means), _loss_table(losses, options["losses"]))
    panels = (_histograms(spectra, options), _sorted(means), _loss_panel(losses))
    notes = (_ordering(spectra), _ordering_by_trial(spectra), *_remarks(options))
    return Report(tables, Figure("singular_values", work.recipe.title, panels), notes)


# --- the trials ------------------------------------------------------------------------------


def _images(work: Work) -> tuple[Array, Array]:
    """The images of all trials in [0, 1], a random part of the training set, and their labels."""
    options = work.recipe.options
    source = data.load(options["data"], data_dir=work.options.data_dir, standardise=False)
    chosen = np.sort(Random(0, "singular-values").permutation(len(source.x))[: options["examples"]])
    rows = np.asarray(source.x[:])
    images = (rows[chosen] / rows.max()).reshape(len(chosen), *(source.image_shape or ()))
    return _enlarged(images).astype(np.float32), source.y[chosen]


def _enlarged(images: Array) -> Array:
    """Images of SIDE pixels: each pixel of a smaller one repeated, then a border of zeros."""
    times = SIDE // images.shape[-1]
    images = images.repeat(times, axis=2).repeat(times, axis=3)
    border = (SIDE - images.shape[-1]) // 2
    return np.pad(images, ((0, 0), (0, 0), (border, border), (border, border)))


def _trials(work: Work, x: Array, y: Array) -> dict[str, list[Trial]]:
    """The trials of every variant; each is kept in OUT/trials when it is done."""
    found: dict[str, list[Trial]] = {name: [] for name in VARIANTS}
    todo = [(seed, name) for seed in range(work.recipe.options["trials"]) for name in VARIANTS]
    for done, (seed, name) in enumerate(todo):
        work.progress("trials", done, len(todo))
        found[name].append(_made(work, name, seed, x, y))
    return found


def _made(work: Work, variant: str, seed: int, x: Array, y: Array) -> Trial:
    """A trial, made or found in OUT/trials."""
    o = {k: work.recipe.options[k] for k in ("data", "examples", "steps", "jacobians", "lr")}
    found = kept(
        work.out / "trials" / f"{variant}-{seed:02d}.h5",
        {"kind": "trial", "variant": variant, "seed": seed, **o},
        lambda: vars(
            trial(
                MNISTResNet(variant=variant),
                *(seed, x, y, o["lr"], o["steps"], o["jacobians"]),
                stop=work.stop,
            )
        ),
    )
    return Trial(found["spectra"], found["losses"])


def trial(
    model: MNISTResNet,
    seed: int,
    x: Array,
    y: Array,
    lr: float,
    steps: int,
    jacobians: int,
    stop: Any = lambda: 0,
) -> Trial:
    """Plain gradient descent on one batch, and the spectrum before each of the first steps."""
    optimizer = optim.sgd(lr=lr)
    params, buffers = model.init(seed=seed), model.buffers(seed=seed)
    state = State(params, buffers, optimizer.init(params))
    step, spectra, losses = make_step(Task(model, CLASSES), optimizer), [], []
    for number in range(steps):
        if stop():
            raise Stopped
        if number < jacobians:
            spectra.append(spectrum(model, state.params, state.buffers, x))
        done = step(state, x, y, lr, Random(seed, "train", number))
        state = done.state
        losses.append(float(done.loss))
    return Trial(np.array(spectra), np.array(losses))


def spectrum(model: MNISTResNet, params: Params, buffers: Params, x: Array) -> Any:
    """The singular values, ascending, of the logits' derivative in the batch after the first
    convolution and pooling, in training mode and float64."""
    params = {name: value.astype(np.float64) for name, value in params.items()}
    buffers = {name: value.astype(np.float64) for name, value in buffers.items()}
    h = model.first(params, x.astype(np.float64))
    j = batch_jacobian(lambda z: model.rest(params, buffers, z, train=True)[0], h)
    return gram_spectrum(j)[::-1]


# --- tables ----------------------------------------------------------------------------------


def _mean_spectra(trials: list[Trial], averaged: int) -> Any:
    """(trials, values): the sorted values, averaged over the first Jacobians."""
    return np.array([t.spectra[:averaged].mean(0) for t in trials])


def _spectra_table(means: Mapping[str, Any]) -> Table:
    rows = []
    for name, share in QUANTILES.items():
        rows.append((name, *(float(v[round(share * (len(v) - 1))]) for v in means.values())))
    rows.append(("mean", *(float(v.mean()) for v in means.values())))
    return Table("Singular values, averaged in their order", ("value", *_columns()), tuple(rows))


def _columns() -> tuple[str, ...]:
    return tuple(f"({LETTERS[name]}) {name}" for name in VARIANTS)


def _loss_table(losses: Mapping[str, Any], shown: list[int]) -> Table:
    """The mean loss before each of some steps, counted from 1."""
    count = len(next(iter(losses.values())))
    rows = [
        (step, *(float(v[step - 1]) for v in losses.values())) for step in shown if step <= count
    ]
    return Table("Mean training loss before a step", ("step", *_columns()), tuple(rows))


# --- the order near 0 ------------------------------------------------------------------------


def _ordering(spectra: Mapping[str, Any]) -> str:
    """Whether (a) < (b) < (c) holds near 0, value by value of the averages."""
    a, b, c = (spectra[name].mean(0) for name in VARIANTS)
    near = max(len(a) // 4, 1)
    pairs = ((a < b)[:near].sum(), (b < c)[:near].sum(), ((a < b) & (b < c))[:near].sum())
    seen = "is" if pairs[2] == near else "is not" if pairs[2] == 0 else "is partly"
    return (
        f"The order (a) < (b) < (c) near 0 {seen} seen: of the smallest quarter of the averaged "
        f"values, {near} in all, {pairs[0]} have (a) < (b), {pairs[1]} have (b) < (c), "
        f"{pairs[2]} both."
    )


def _ordering_by_trial(spectra: Mapping[str, Any]) -> str:
    """In how many trials the mean of the smallest quarter is in that order, and by how much."""
    near = max(next(iter(spectra.values())).shape[1] // 4, 1)
    a, b, c = (spectra[name][:, :near].mean(1) for name in VARIANTS)
    counts = ((a < b).sum(), (b < c).sum(), ((a < b) & (b < c)).sum())
    return (
        f"The mean of the smallest quarter, trial by trial: (a) < (b) in {counts[0]} of {len(a)}, "
        f"(b) < (c) in {counts[1]}, both in {counts[2]}; (b) - (a) is {_paired(b - a)} and "
        f"(c) - (b) is {_paired(c - b)}, mean and standard error over the trials."
    )


def _paired(differences: Any) -> str:
    count = len(differences)
    error = f"{differences.std(ddof=1) / math.sqrt(count):.2g}" if count > 1 else "unknown"
    return f"{differences.mean():.3g} +- {error}"


def _remarks(options: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        "The paper prints a figure and no numbers; the order is what its hypothesis predicts. "
        f"Averages are over the trials and the first {options['averaged']} iterations. The three "
        "variants of a trial start from the same weights; the images are not standardised, as in "
        "the authors' code.",
    )


# --- the figure ------------------------------------------------------------------------------


def _histograms(spectra: Mapping[str, Any], options: Mapping[str, Any]) -> Panel:
    """As the paper: the averaged values in bins of [0, largest]."""
    lines = []
    for label, values in zip(_columns(), spectra.values(), strict=True):
        mean = values.mean(0)
        counts, edges = np.histogram(mean, options["bins"], (0.0, options["largest"]))
        lines.append(Line(label, (edges[1:] + edges[:-1]) / 2, counts, "marked"))
    return Panel("Singular values", "singular value", "number in a bin", tuple(lines))


def _sorted(means: Mapping[str, Any]) -> Panel:
    lines = tuple(
        Line(label, range(1, len(v) + 1), v)
        for label, v in zip(_columns(), means.values(), strict=True)
    )
    return Panel("Sorted", "place from the smallest", "singular value", lines, ylog=True)


def _loss_panel(losses: Mapping[str, Any]) -> Panel:
    lines = tuple(
        Line(label, range(1, len(v) + 1), v, "marked" if len(v) < 3 else "line")
        for label, v in zip(_columns(), losses.values(), strict=True)
    )
    return Panel("Loss", "step", "mean training loss (nats)", lines, ylog=True)
