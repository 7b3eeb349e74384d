"""A figure as data: panels of lines, stored as JSON next to the numbers that it shows.

`npdrt.train.studies.render` makes a picture of one; nothing here needs a plotting library.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from npdrt import schema
from npdrt.arrays import to_host
from npdrt.errors import Error, FileRefused
from npdrt.store.log import finite

STYLES = ("line", "dashed", "marked", "points")
Limits = tuple[float, float]


def _keep_printable(holder: Any, *names: str) -> None:
    """Turn bytes of a name that are not UTF-8 into escapes: no font has them."""
    for name in names:
        text = getattr(holder, name).encode("utf-8", "backslashreplace").decode()
        object.__setattr__(holder, name, text)


@dataclass(frozen=True, eq=False)
class Line:
    """Points (x[i], y[i]) and how they are drawn; values that are not finite leave a gap.

    label: the name in the legend; "" for none. x, y: 1-d, of equal length, converted to float64;
    None is NaN.
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

    xlabel, ylabel: the quantity of each axis, with the unit in words. xlog, ylog: logarithmic axes,
    on which values that are not positive leave a gap. xlim, ylim: (low, high); None fits the data.
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
    """Panels, row by row.

    name: of the study or run, for a file name. caption: a sentence on the content.
    columns: panels a row; None lets the renderer choose.
    """

    name: str
    caption: str
    panels: tuple[Panel, ...]
    columns: int | None = None

    def __post_init__(self) -> None:
        _keep_printable(self, "caption")
        object.__setattr__(self, "panels", tuple(self.panels))


# --- as JSON ---------------------------------------------------------------------------------


def to_json(figure: Figure) -> Any:
    """The figure as UTF-8 JSON in an array of uint8, for `npdrt.store.container`.

    The keys are the fields of `Figure`, `Panel` and `Line`; a value that is not finite is null.
    """
    panels = [
        {
            **vars(panel),
            "lines": [
                {**vars(line), "x": line.x.tolist(), "y": line.y.tolist()} for line in panel.lines
            ],
        }
        for panel in figure.panels
    ]
    text = json.dumps(finite({**vars(figure), "panels": panels}), allow_nan=False)
    return np.frombuffer(text.encode(), np.uint8)


def from_json(data: Any) -> Figure:
    """The figure that `to_json` wrote; `FileRefused` if something is missing or of another form."""
    refused = "the figure is not of the form that npdrt writes"
    about = schema.parse(data.tobytes(), schema.FigureMeta, refused)
    try:
        panels = [
            Panel(**{**panel, "lines": [Line(**line) for line in panel["lines"]]})
            for panel in about["panels"]
        ]
        return Figure(**{**about, "panels": panels})
    except (Error, TypeError) as error:
        raise FileRefused(f"{refused} ({type(error).__name__}: {error})") from error
