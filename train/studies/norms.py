"""Norms of rescaling-invariant layers under Fromage and under LARS (Figure 2).

If the loss does not depend on the scale of a layer, the gradient is orthogonal to it. A relative
step of eta then makes its norm grow by sqrt(1 + eta**2) a step without Fromage's prefactor, and by
the prefactor's rounding alone with it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from npdrt import optim, store
from npdrt.store import trace
from npdrt.train.studies.figure import Figure, Line, Panel
from npdrt.train.studies.study import Report, Table, Work
from npdrt.train.studies.sweep import Run
from npdrt.trust.update import growth, prefactor_drift, steps_to_overflow

NOTES = (
    "Overflow beyond the steps of a run is extrapolated with the closed form. A gradient "
    "orthogonal to its weight is proportional to 1/|w|, so the rate eta |w|/|g| grows like |w|^2: "
    "it is the first to overflow, and from that step on npdrt takes the plain step eta g, which "
    "changes nothing any more.",
)
RULES = {"lars_lesion": "LARS (no prefactor)", "fromage": "Fromage"}
NETS = {"gan": "adversarial network, "}
LARGEST = {"float32": float(np.finfo(np.float32).max), "float64": float(np.finfo(np.float64).max)}


def report(work: Work) -> Report:
    """Measured growth next to the closed form, and the overflow that it leads to."""
    stopped = {run: step for run in work.runs if (step := _stopped_at(run))}
    sound = [run for run in work.runs if run not in stopped]
    tables = [_growth(sound), _drift(sound), _overflow(work.runs, stopped)]
    if work.recipe.reference:
        tables.append(_authors(work))
    panels = tuple(map(_panel, work.runs))
    return Report(tuple(tables), Figure("norms", work.recipe.title, panels), NOTES)


def name(run: Run) -> str:
    """The run as the tables call it."""
    return f"{RULES[run.config.optimizer]}, {_net(run)}, eta {run.config.lr:g}"


def _net(run: Run) -> str:
    """The dtype of a perceptron; of another network its name, too."""
    return f"{NETS.get(run.config.model, '')}{run.config.dtype}"


def ratios(run: Run) -> dict[str, float]:
    """The norm of each layer after the last step over that before the first."""
    first, last = _first_norms(run), _norms(store.load_newest(run.path)[0].params)
    return {name: last[name] / first[name] for name in first}


def _first_norms(run: Run) -> dict[str, float]:
    """The norms before the first step, from the snapshot that the recipe asks for."""
    return _norms(store.load(run.path / "snapshots" / "step-000000.h5").params)


def _norms(params: Any) -> dict[str, float]:
    """Of the weights; the biases and gates of an adversarial network are not invariant."""
    return {name: float(optim.norm(value)) for name, value in params.items() if value.ndim > 1}


def _closed(run: Run, steps: int) -> float:
    """The closed form: (1 + eta**2)**(t/2), or with the prefactor its rounding, compounded."""
    eta = float(run.config.lr)
    if run.config.optimizer == "lars_lesion":
        return growth(eta, steps)
    return math.exp(steps * math.log1p(prefactor_drift(eta, run.config.dtype)))


def _growth(runs: list[Run]) -> Table:
    """Growth over the run: closed form, the layer farthest from it, and their difference."""
    rows = []
    for run in runs:
        expected = _closed(run, run.steps)
        worst = max(ratios(run).values(), key=lambda ratio: abs(ratio / expected - 1))
        numbers = (f"{expected:.12g}", f"{worst:.12g}", worst / expected - 1)
        rows.append((name(run), run.steps, *numbers))
    columns = ("run", "steps", "closed form", "measured, worst layer", "relative difference")
    return Table("Growth of the weight norms", columns, tuple(rows))


def _drift(runs: list[Run]) -> Table:
    """Under Fromage: the growth a step that the prefactor's rounding predicts, and the mean."""
    rows = []
    for run in runs:
        if run.config.optimizer == "fromage":
            predicted = prefactor_drift(float(run.config.lr), run.config.dtype)
            mean = np.mean(np.log(list(ratios(run).values()))) / run.steps
            found = math.expm1(mean)
            rows.append((name(run), f"{predicted:.5g}", f"{found:.5g}", found / predicted - 1))
    columns = ("run", "predicted", "measured, mean layer", "relative difference")
    return Table("Growth a step under Fromage", columns, tuple(rows))


def _overflow(runs: Sequence[Run], stopped: Mapping[Run, int]) -> Table:
    """Where norms without the prefactor would overflow, and where growth stopped in a run."""
    rows = []
    for run in runs:
        if run.config.optimizer == "lars_lesion":
            first, eta = max(_first_norms(run).values()), float(run.config.lr)
            largest = LARGEST[run.config.dtype]
            steps = (
                steps_to_overflow(first, eta, limit) for limit in (math.sqrt(largest), largest)
            )
            rows.append((name(run), run.steps, *steps, stopped.get(run, "not in this run")))
    columns = ("run", "steps", "|w|^2 overflows at", "|w| overflows at", "growth stopped at")
    return Table("Overflow, by extrapolation and for real", columns, tuple(rows))


def _stopped_at(run: Run) -> int | None:
    """The first traced step from which on a layer did not change by eta any more. A discriminator
    also has single steps without a gradient."""
    steps, changes = _traced(run, "relative_update")
    lost = ~(changes > float(run.config.lr) / 2).all(axis=1)  # NaN counts as lost
    sound = np.flatnonzero(~lost)
    after = sound[-1] + 1 if len(sound) else 0
    return int(steps[after]) if after < len(steps) else None


def _traced(run: Run, quantity: str) -> tuple[Any, Any]:
    """The measured steps (T,), and a quantity of every weight at each of them (T, weights)."""
    arrays, about = trace.read(run.path / "trace.h5")
    chosen = [about["parameters"].index(name) for name in _first_norms(run)]
    return arrays["layers/step"], arrays[f"layers/{quantity}"][:, chosen]


def _authors(work: Work) -> Table:
    """The authors' logged growth, the closed form in float32, and our runs after as many steps."""
    reference, rows = work.recipe.reference, []
    same = [run for run in work.runs if run.config.lr == reference["lr"]]
    nets = tuple(dict.fromkeys(map(_net, same)))
    for rule in RULES:
        runs = {_net(run): run for run in same if run.config.optimizer == rule}
        for epoch, logged in reference[rule]:
            steps = epoch * reference["steps_per_epoch"]
            closed = [_closed(run, steps) for run in runs.values() if run.config.dtype == "float32"]
            ours = [_at(runs[net], steps) if net in runs else None for net in nets]
            numbers = (logged, *closed[:1], *ours)
            rows.append((RULES[rule], epoch, steps, *(n and f"{n:.6g}" for n in numbers)))
    columns = ("rule", "epoch", "steps", "authors' log", "closed form", *nets)
    return Table("Growth in the authors' adversarial network", columns, tuple(rows))


def _at(run: Run, steps: int) -> float | None:
    """The mean growth after so many steps; None without a snapshot of them."""
    path = run.path / "snapshots" / f"step-{steps:06d}.h5"
    if not path.exists():
        return None
    first, then = _first_norms(run), _norms(store.load(path).params)
    return float(np.mean([then[name] / first[name] for name in first]))


def _panel(run: Run) -> Panel:
    """The norm of every layer over its first, and the closed form."""
    measured, table = _traced(run, "weight_norm")
    steps, first, last = measured - 1, _first_norms(run), max(table.shape[1] - 1, 1)
    lines = [
        Line(layer, steps, table[:, i] / norm, shade=i / last)
        for i, (layer, norm) in enumerate(first.items())
    ]
    expected = np.array([_closed(run, int(t)) for t in steps])
    lines.append(Line("closed form", steps, expected, "dashed", group=1))
    return Panel(name(run), "training step", "norm over its first", tuple(lines),
                 ylog=bool(expected.max() > 100))  # fmt: skip
