"""How an adversarial network's weights, and the distance of its images from real ones, change in a
run (first version, Figure 5). Both are taken from the snapshots of every run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from msgspec import Struct

from npdrt import optim, store
from npdrt.train.studies import distances
from npdrt.train.studies.distances import Distance
from npdrt.train.studies.figure import Figure, Line, Panel
from npdrt.train.studies.study import Report, Table, Work, grouped
from npdrt.train.studies.sweep import Run

NETWORKS = ("generator", "discriminator")
Curves = dict[int, list[float]]  # of every trial, by the step


class Options(Struct):
    """distance: of which features, and of how many images."""

    distance: Distance


def report(work: Work) -> Report:
    """Tables of the distance and of the growth of the weights; panels of both."""
    groups = grouped(
        (run for run in work.runs if not run.diverged), lambda run: run.config.optimizer
    )
    curves = {rule: _curves(work, runs) for rule, runs in groups.items()}
    panels = [_norms_panel(rule, runs[0]) for rule, runs in groups.items()]
    ours = {rule: _means(curve) for rule, curve in curves.items()}
    panels.append(_panel(f"npdrt: {distances.name(work)}", ours))
    logged = _logged(work)
    theirs = {rule: {t: both[0] for t, both in logged[rule]} for rule in groups if rule in logged}
    panels.append(_panel("Authors: FID, 10,000 images", theirs))
    notes = (
        "Mean and population standard deviation over the trials; the generators' norms are those "
        "of the first.",
        f"The distance from the training set: {distances.name(work)}. The authors' is the FID.",
    )
    tables = (_distances(curves), _authors(work), _growth(work, groups))
    return Report(tables, Figure("generators", work.recipe.title, tuple(panels)), notes)


def _curves(work: Work, runs: Sequence[Run]) -> Curves:
    """The distances from the training set at every snapshot."""
    return {
        step: [distances.distances(work, run, step)["train_distance"] for run in runs]
        for step in _steps(runs[0])
    }


def _steps(run: Run) -> list[int]:
    """The steps of the snapshots that the run has reached."""
    return [step for step in run.config.snapshots if step <= run.steps]


def _norms(run: Run, step: int) -> dict[str, float]:
    """The Frobenius norm of every weight."""
    params = store.load(run.path / "snapshots" / f"step-{step:06d}.h5").params
    return {name: float(optim.norm(value)) for name, value in params.items() if value.ndim > 1}


def _means(curve: Curves) -> dict[int, float]:
    return {step: float(np.mean(values)) for step, values in curve.items()}


def _panel(title: str, means: Mapping[str, Mapping[int, float]]) -> Panel:
    """The distance from the training set by the step."""
    lines = [
        Line(rule, list(curve), list(curve.values()), "marked", group=place)
        for place, (rule, curve) in enumerate(means.items())
    ]
    return Panel(title, "training step", "distance from the training set", tuple(lines), ylog=True)


def _norms_panel(rule: str, run: Run) -> Panel:
    """The norms of the generator's weights at every snapshot."""
    steps = _steps(run)
    found = [_norms(run, step) for step in steps]
    names = [name for name in found[0] if name.startswith("generator/")]
    last = max(len(names) - 1, 1)
    lines = [
        Line(name.removeprefix("generator/"), steps, [norms[name] for norms in found],
             shade=place / last)
        for place, name in enumerate(names)
    ]  # fmt: skip
    top = 1.4 * max(line.y.max() for line in lines)  # room for the legend
    return Panel(f"{rule}, generator", "training step", "norm of the weight", tuple(lines),
                 ylim=(0, top))  # fmt: skip


def _distances(curves: Mapping[str, Curves]) -> Table:
    """A row a rule and snapshot."""
    rows = [
        (rule, step, float(np.mean(v)), float(np.std(v)) if len(v) > 1 else None, len(v))
        for rule, curve in curves.items()
        for step, v in curve.items()
    ]
    columns = ("optimizer", "steps", "distance", "+-", "trials")
    return Table("npdrt: distance from the training set", columns, tuple(rows))


def _authors(work: Work) -> Table:
    """The authors' means and deviations, after as many steps."""
    rows = [(rule, step, *both) for rule, logged in _logged(work).items() for step, both in logged]
    return Table("Authors: FID to the training set", ("optimizer", "steps", "FID", "+-"),
                 tuple(rows))  # fmt: skip


def _logged(work: Work) -> dict[str, list[tuple[int, list[float]]]]:
    """By the rule: the step, and the authors' FID with its deviation."""
    reference = work.recipe.reference
    return {
        rule: [(epoch * reference["steps_per_epoch"], both) for epoch, *both in rows]
        for rule, rows in reference.get("fid", {}).items()
    }


def _growth(work: Work, groups: Mapping[str, Sequence[Run]]) -> Table:
    """The norm after the last snapshot over that before the first step, over weights and trials."""
    theirs, rows = work.recipe.reference.get("growth", {}), []
    for rule, runs in groups.items():
        ratios = [_ratios(run) for run in runs]
        for network in NETWORKS:
            own = [r for found in ratios for name, r in found.items() if name.startswith(network)]
            ours = (f"{part(own):.4f}" for part in (np.min, np.median, np.max))
            rows.append((rule, network, theirs.get(rule, {}).get(network), *ours))
    columns = ("optimizer", "network", "authors: least / median / most", "least", "median", "most")
    return Table("Norm of the weights, end over start", columns, tuple(rows))


def _ratios(run: Run) -> dict[str, float]:
    steps = _steps(run)
    first, last = _norms(run, steps[0]), _norms(run, steps[-1])
    return {name: last[name] / first[name] for name in first}
