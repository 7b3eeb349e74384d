"""A figure as data: panels of lines, kept in a container beside the numbers they come from.

`npdrt.train.studies.render` makes a picture of one; nothing here needs a plotting library.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from npdrt import schema
from npdrt.arrays import to_host
from npdrt.errors import Error, FileRefused
from npdrt.store import container, trace

STYLES = ("line", "dashed", "marked", "points")
Limits = tuple[float, float]


def _keep_printable(holder: Any, *names: str) -> None:
    """Bytes of a name that are not UTF-8 become escapes: no font has them."""
    for name in names:
        text = getattr(holder, name).encode("utf-8", "backslashreplace").decode()
        object.__setattr__(holder, name, text)


@dataclass(frozen=True, eq=False)
class Line:
    """Points (x[i], y[i]) and how they are drawn; values that are not finite leave a gap.

    label: the name in the legend; "" for none. x, y: of equal length, 1-d, kept as float64.
    style: "line", "dashed", "marked" (a line with a marker at every point) or "points" (markers
    alone). shade: None, or a position from 0 to 1 in a sequence (an epoch, a depth), shown as a
    colour of a sequential map. group: lines of one group share colour and marker, for example
    training (line) and test (dashed) with one optimizer; None is the line's place in its panel.
    """

    label: str
    x: Any
    y: Any
    style: str = "line"
    shade: float | None = None
    group: int | None = None

    def __post_init__(self) -> None:
        _keep_printable(self, "label")
        for axis in ("x", "y"):
            object.__setattr__(self, axis, np.asarray(to_host(getattr(self, axis)), np.float64))
        if self.x.ndim != 1 or self.x.shape != self.y.shape:
            raise Error(
                f"line {self.label!r}: expected x and y of one length; got shapes {self.x.shape} "
                f"and {self.y.shape}"
            )
        if self.style not in STYLES:
            raise Error(f"unknown style {self.style!r} of a line; use one of {', '.join(STYLES)}")
        if self.shade is not None and not 0 <= self.shade <= 1:
            raise Error(f"line {self.label!r}: shade lies from 0 to 1; got {self.shade}")
        if self.group is not None and self.group < 0:
            raise Error(f"line {self.label!r}: group counts from 0; got {self.group}")


@dataclass(frozen=True)
class Panel:
    """Lines on one pair of axes.

    xlabel, ylabel: what the axes show, with the unit in words. xlog, ylog: logarithmic axes, on
    which values that are not positive leave a gap. xlim, ylim: (low, high); None fits the data.
    note: a remark below the title.
    """

    title: str
    xlabel: str
    ylabel: str
    lines: tuple[Line, ...]
    xlog: bool = False
    ylog: bool = False
    xlim: Limits | None = None
    ylim: Limits | None = None
    note: str = ""

    def __post_init__(self) -> None:
        _keep_printable(self, "title", "xlabel", "ylabel", "note")
        object.__setattr__(self, "lines", tuple(self.lines))
        for name, log in (("xlim", self.xlog), ("ylim", self.ylog)):
            limits = getattr(self, name)
            if limits is None:
                continue
            low, high = map(float, limits)
            object.__setattr__(self, name, (low, high))
            if not -math.inf < low < high < math.inf or (log and low <= 0):
                needed = "0 < low < high" if log else "low < high"
                raise Error(f"panel {self.title!r}: {name} needs {needed}; got {low}, {high}")


@dataclass(frozen=True)
class Figure:
    """Panels, row by row. name: of the study or run, for a file name. caption: what it shows.

    columns: panels a row; None lets the renderer choose.
    """

    name: str
    caption: str
    panels: tuple[Panel, ...]
    columns: int | None = None

    def __post_init__(self) -> None:
        _keep_printable(self, "caption")
        object.__setattr__(self, "panels", tuple(self.panels))


# --- in a container --------------------------------------------------------------------------


def to_arrays(figure: Figure) -> tuple[dict[str, Any], dict[str, Any]]:
    """The figure as `(arrays, meta)`, for `npdrt.store.container`.

    arrays: "figure/00/03/x" and ".../y", float64, of line 3 of panel 0. meta: JSON, everything
    else; it goes into the container's metadata under the key "figure":

        arrays, meta = to_arrays(figure)
        container.write(path, arrays, {"kind": "study", "figure": meta})
    """
    arrays = {
        f"{place}/{axis}": getattr(line, axis)
        for p, panel in enumerate(figure.panels)
        for place, line in _places(figure, p, panel.lines)
        for axis in ("x", "y")
    }
    return arrays, {
        "name": figure.name,
        "caption": figure.caption,
        "columns": figure.columns,
        "panels": [_panel_meta(panel) for panel in figure.panels],
    }


def _places(figure: Any, p: int, lines: Any) -> list[tuple[str, Any]]:
    """Where each line of panel p is kept; numbers have two digits at least, and equal many."""
    panels = figure.panels if isinstance(figure, Figure) else figure["panels"]
    above = f"figure/{p:0{max(2, len(str(len(panels) - 1)))}d}"
    digits = max(2, len(str(len(lines) - 1)))
    return [(f"{above}/{i:0{digits}d}", line) for i, line in enumerate(lines)]


def _panel_meta(panel: Panel) -> dict[str, Any]:
    names = ("title", "xlabel", "ylabel", "xlog", "ylog", "note")
    lines = [
        {name: getattr(line, name) for name in ("label", "style", "shade", "group")}
        for line in panel.lines
    ]
    limits = {n: None if (v := getattr(panel, n)) is None else list(v) for n in ("xlim", "ylim")}
    return {**{name: getattr(panel, name) for name in names}, **limits, "lines": lines}


def from_arrays(arrays: Mapping[str, Any], meta: Mapping[str, Any]) -> Figure:
    """The figure that `to_arrays` took apart; other arrays beside it do not matter.

    Raises `FileRefused` where something of it is missing or of another form.
    """
    schema.check(meta, schema.FigureMeta, "the figure is not of the form that npdrt writes")
    try:
        panels = []
        for p, about in enumerate(meta["panels"]):
            lines = tuple(
                Line(x=arrays[f"{place}/x"], y=arrays[f"{place}/y"], **settings)
                for place, settings in _places(meta, p, about["lines"])
            )
            panels.append(Panel(**{**about, "lines": lines}))
        name, caption = str(meta["name"]), str(meta["caption"])
        return Figure(name, caption, tuple(panels), meta["columns"])
    except (Error, KeyError, TypeError, ValueError, AttributeError) as error:
        raise FileRefused(
            f"the figure is not of the form that npdrt writes ({type(error).__name__}: {error})"
        ) from error


# --- from a file -----------------------------------------------------------------------------


def load(path: Path) -> Figure:
    """The figure of a run directory, its trace.h5, or a file that holds one (a study, slices); of
    a sweep's directory, its study.

    Raises `Error` where there is no such file and `FileRefused` where it is damaged or holds
    something else.
    """
    file = container.within(path, "trace.h5", "study.h5")
    if not file.exists():
        raise Error(f"{file} does not exist; give a run directory, a trace, a study or slices")
    arrays, meta = container.read(file)
    if meta.get("kind") == "trace":
        arrays, meta = trace.newest(file, arrays, meta)
    try:
        if meta.get("kind") == "trace":
            trace.check(arrays, meta, "the trace is not of the form that npdrt writes")
            return from_trace(arrays, meta, name=file.resolve().parent.name)
        if isinstance(meta.get("figure"), dict):
            return from_arrays(arrays, meta["figure"])
    except FileRefused as error:
        raise FileRefused(f"{file}: {error}") from error
    raise FileRefused(
        f"{file}: expected a trace, a study or slices; it holds {_what(meta)}; give the "
        "run directory to see how a run went"
    )


def _what(meta: Mapping[str, Any]) -> str:
    return repr(meta["kind"]) if "kind" in meta else "a checkpoint or arrays, and no figure"


def from_trace(arrays: Mapping[str, Any], meta: Mapping[str, Any], *, name: str = "run") -> Figure:
    """How a run went, from its trace (`npdrt.store.trace`): loss, accuracy and learning rate
    against the epoch; norm, relative update and cosine of every weight and the deep relative trust
    of the network against the step; condition numbers and Jacobian norms where they were taken."""
    try:
        panels = [*_history_panels(arrays), *_layer_panels(arrays, meta["parameters"])]
        panels += [*_network_panels(arrays), *_conditioning_panels(arrays, meta.get("weights"))]
    except (Error, KeyError, TypeError, ValueError, IndexError) as error:
        raise FileRefused(
            f"the trace is not of the form that npdrt writes ({type(error).__name__}: {error})"
        ) from error
    return Figure(name, f"Training run {name}", tuple(panels))


def _history_panels(arrays: Mapping[str, Any]) -> list[Panel]:
    epoch = arrays["history/epoch"]
    style = "line" if len(epoch) > 1 else "points"

    def lines(quantity: str) -> list[Line]:
        named = {"train": "training minibatches", "test": "test set"}
        columns = {label: arrays[f"history/{part}_{quantity}"] for part, label in named.items()}
        return [Line(k, epoch, v, style) for k, v in columns.items() if np.isfinite(v).any()]

    accuracy, loss = lines("accuracy"), lines("loss")
    unit = "mean loss (nats)" if accuracy else "mean squared error"
    positive = all((line.y[np.isfinite(line.y)] > 0).all() for line in loss)
    panels = [Panel("Loss", "epoch", unit, tuple(loss), ylog=positive)]
    if accuracy:
        share = "accuracy (share of samples)"
        panels.append(Panel("Accuracy", "epoch", share, tuple(accuracy), ylim=(0, 1.02)))
    rate = Line("", epoch, arrays["history/lr"], style)
    return [*panels, Panel("Learning rate", "epoch", "learning rate", (rate,))]


def _layer_panels(arrays: Mapping[str, Any], parameters: list[str]) -> list[Panel]:
    """The weights by the step; nothing where none was traced."""
    if not len(arrays["layers/step"]):
        return []
    shown = [name for name in parameters if name.endswith("weight")] or parameters

    def lines(quantity: str) -> tuple[Line, ...]:
        return _by_layer(arrays, f"layers/{quantity}", parameters, shown)

    cosine, x = lines("cosine"), "training step"
    low = -1.05 if any((line.y < 0).any() for line in cosine) else 0.0
    return [
        Panel("Weight norm", x, "2-norm of the weight", lines("weight_norm"), ylog=True),
        Panel("Relative update", x, "norm of the change over norm of the weight",
              lines("relative_update"), ylog=True),
        Panel("Direction", x, "cosine of change and negative gradient", cosine, ylim=(low, 1.05)),
    ]  # fmt: skip


def _by_layer(
    arrays: Mapping[str, Any], table: str, names: list[str], shown: list[str]
) -> tuple[Line, ...]:
    """A line a column of the table that is shown, shaded from the first to the last."""
    step, last = arrays[f"{table.partition('/')[0]}/step"], max(len(shown) - 1, 1)
    style = "line" if len(step) > 1 else "points"
    return tuple(
        Line(name, step, arrays[table][:, names.index(name)], style, shade=place / last)
        for place, name in enumerate(shown)
    )


def _network_panels(arrays: Mapping[str, Any]) -> list[Panel]:
    """The distance of each measured step; nothing where none was."""
    step, distance = arrays["layers/step"], arrays["network/log_deep_relative_trust"]
    if not np.isfinite(distance).any():
        return []
    line = Line("", step, distance, "line" if len(step) > 1 else "points")
    trust = "log prod(1 + r), r the relative updates"
    return [Panel("Deep relative trust", "training step", trust, (line,), ylog=True)]


def _conditioning_panels(arrays: Mapping[str, Any], weights: list[str] | None) -> list[Panel]:
    """What `npdrt train --conditioning` measures; of the Jacobians, where the model has them."""
    if not weights:
        return []
    titles = {
        "condition_number": ("Condition number", "largest over smallest singular value"),
        "jacobian_norm": ("Layer Jacobian", "norm of d output / d input of the layer"),
    }
    return [
        Panel(
            *(title, "training step", unit), _by_layer(arrays, table, weights, weights), ylog=True
        )
        for quantity, (title, unit) in titles.items()
        if np.isfinite(arrays[table := f"conditioning/{quantity}"]).any()
    ]
