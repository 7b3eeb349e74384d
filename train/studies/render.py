"""Pictures of figures: PNG, SVG or PDF, the same bytes for the same figure and libraries.

They are readable in print and without colour vision: categories have the colours of Okabe and Ito
(npdrt.mplstyle) and a marker each, sequences a perceptually uniform map without its light end.
"""

from __future__ import annotations

import io
import math
import textwrap
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from npdrt import atomic
from npdrt.errors import Error, Unavailable
from npdrt.train.studies.figure import Figure, Line, Panel

FORMATS: dict[str, dict[str, Any]] = {  # with the metadata that would differ from run to run
    "png": {"Software": None},
    "svg": {"Date": None, "Creator": None},
    "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
}
WIDTH = 7.0  # inches: the text width of a page
ROW = 2.6  # inches a row of panels
MARKERS = "osD^vPX<>*"
LARGEST = 1e250  # in size; the arithmetic of the axes, whose ends lie further out, overflows
FEW = 4  # legend entries that find room inside a panel
STYLE = Path(__file__).with_name("npdrt.mplstyle")


def save(figure: Figure, path: Path) -> None:
    """Write a picture of `figure` to `path`, whole or not at all; its suffix names the format.

    png (200 dots an inch), svg or pdf, 7 inches wide. A file at `path` is replaced. Values that
    are not finite, or not positive on a logarithmic axis, leave a gap; a panel without any says
    so. Raises `Error` for another suffix and `Unavailable` without Matplotlib.
    """
    form = path.suffix.lower().removeprefix(".")
    if form not in FORMATS:
        raise Error(f"{path}: cannot draw {form or 'without a suffix'}; use .png, .svg or .pdf")
    atomic.replace(path, render(figure, form))


def render(figure: Figure, form: str) -> bytes:
    """The bytes of a picture of `figure` in one of `FORMATS`; no setting of the user matters."""
    try:
        from matplotlib import style
    except ImportError as error:
        raise Unavailable(
            'matplotlib is not installed; install it with pip install "npdrt[plot]"'
        ) from error
    with style.context(STYLE, after_reset=True), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        buffer = io.BytesIO()
        _layout(figure).savefig(buffer, format=form, metadata=FORMATS[form])
        return buffer.getvalue()


def _layout(figure: Figure) -> Any:
    """The panels in rows of two, or one below the other where a legend needs the room."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    narrow = len(figure.panels) == 1 or any(map(_crowded, figure.panels))
    columns = figure.columns or (1 if narrow else 2)
    rows = max(1, math.ceil(len(figure.panels) / columns))
    height = ROW * rows + (1.2 if columns == rows == 1 else 0.3)
    canvas = Canvas(figsize=(WIDTH, height), layout="constrained")
    FigureCanvasAgg(canvas)
    if figure.caption:
        text = textwrap.fill(figure.caption, 100)
        canvas.suptitle(text, x=0.01, ha="left", parse_math=False)
    for number, panel in enumerate(figure.panels, 1):
        _panel(canvas.add_subplot(rows, columns, number), panel, 76 // columns)
    return canvas


# --- one panel -------------------------------------------------------------------------------


def _panel(axes: Any, panel: Panel, width: int) -> None:
    """Draw a panel whose title holds `width` characters a line."""
    _name(axes, panel, width)
    axes.set_xscale("log" if panel.xlog else "linear")
    axes.set_yscale("log" if panel.ylog else "linear")
    handles = [_line(axes, panel, number) for number in range(len(panel.lines))]
    drawn = [(line, h) for line, h in zip(panel.lines, handles, strict=True) if h is not None]
    axes.set_xlim(panel.xlim)
    axes.set_ylim(panel.ylim)
    if not drawn:
        _say_empty(axes)
        return
    _ticks(axes.xaxis, panel.xlog, whole=all(_whole(line.x) for line, _ in drawn))
    _ticks(axes.yaxis, panel.ylog)
    _legend(axes, drawn)


def _name(axes: Any, panel: Panel, width: int) -> None:
    """Title, note in smaller print below it, and the names of the axes."""
    from matplotlib import rcParams

    small = rcParams["legend.fontsize"]  # points
    note = textwrap.fill(panel.note, width + width // 6)
    if note:
        axes.annotate(
            note,
            (0.0, 1.0),
            xytext=(0, 4),
            xycoords="axes fraction",
            textcoords="offset points",
            va="bottom",
            fontsize=small,
            color="0.35",
            parse_math=False,
        )
    pad = 5.0 + (1.45 * small * len(note.splitlines()))
    axes.set_title(textwrap.fill(panel.title, width), pad=pad, parse_math=False)
    axes.set_xlabel(textwrap.fill(panel.xlabel, width + width // 4), parse_math=False)
    axes.set_ylabel(textwrap.fill(panel.ylabel, 34), parse_math=False)


def _say_empty(axes: Any) -> None:
    axes.text(0.5, 0.5, "no finite values", transform=axes.transAxes, ha="center", color="0.4")
    axes.grid(False)
    axes.tick_params(which="both", bottom=False, left=False, labelbottom=False, labelleft=False)


def _whole(x: Any) -> bool:
    return bool((x[np.isfinite(x)] % 1 == 0).all())


def _ticks(axis: Any, log: bool, whole: bool = False) -> None:
    """Whole numbers for counts; plain numbers on a logarithmic axis of few decades."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    low, high = axis.get_view_interval()
    if log and high / low < 200:
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.6g}"))
        axis.set_minor_formatter(NullFormatter())
    elif not log and whole:
        axis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10]))


def _line(axes: Any, panel: Panel, number: int) -> Any:
    """Draw one line; returns its handle for the legend, None if it has no point to draw."""
    line = panel.lines[number]
    x, y = _drawable(line.x, panel.xlog), _drawable(line.y, panel.ylog)
    shown = int((np.isfinite(x) & np.isfinite(y)).sum())
    if not shown:
        return None
    place = number if line.group is None else line.group
    marker = MARKERS[place % len(MARKERS)]
    look: dict[str, Any] = {"color": _colour(line, place)}
    if line.style in ("marked", "points") or shown == 1:
        look |= {"marker": marker}
    elif line.shade is None and len(panel.lines) > 1:
        look |= {"marker": marker, "markevery": _marked(len(x), number)}
    if line.style == "points":
        look |= {"linestyle": "none", "alpha": 0.85}
    elif line.style == "dashed":
        look |= {"linestyle": (0, (4, 1.6))}
    return axes.plot(x, y, **look)[0]


def _drawable(values: Any, log: bool) -> Any:
    """`values`, with NaN for those that cannot be shown."""
    with np.errstate(invalid="ignore"):
        shown = np.abs(values) <= LARGEST
        return np.where(shown & (values >= 1 / LARGEST) if log else shown, values, np.nan)


def _marked(points: int, number: int) -> Any:
    """Which points of a line get a marker: about eight, at other places from line to line."""
    every = max(1, points // 8)
    return (number * every // 3 % every, every)


def _colour(line: Line, place: int) -> Any:
    from matplotlib import colormaps, colors

    if line.shade is None:
        return colors.to_hex(f"C{place}")  # of the style's cycle
    return colormaps["viridis"](0.82 * line.shade)


# --- legends ---------------------------------------------------------------------------------


def _entries(labelled: list[tuple[Line, Any]]) -> list[tuple[Line, Any]]:
    """The entries of a legend: every category; of a long sequence the first, middle and last."""
    labelled = [(line, handle) for line, handle in labelled if line.label]
    shaded = [pair for pair in labelled if pair[0].shade is not None]
    if len(shaded) > FEW:
        shaded.sort(key=lambda pair: pair[0].shade or 0.0)
        kept = [shaded[0], shaded[(len(shaded) - 1) // 2], shaded[-1]]
    else:
        kept = shaded
    return [pair for pair in labelled if pair[0].shade is None] + kept


def _crowded(panel: Panel) -> bool:
    """Whether the legend of a panel must stand next to it."""
    return len(_entries([(line, None) for line in panel.lines])) > FEW


def _legend(axes: Any, drawn: list[tuple[Line, Any]]) -> None:
    entries = _entries(drawn)
    if not entries:
        return
    many = len(entries) > FEW
    place: dict[str, Any] = {"loc": "best"}
    if many:
        place = {"loc": "upper left", "bbox_to_anchor": (1.01, 1.0), "borderaxespad": 0.0}
    legend = axes.legend(
        [handle for _, handle in entries], [_short(line.label) for line, _ in entries], **place
    )
    for text in legend.get_texts():
        text.set_parse_math(False)


def _short(label: str) -> str:
    return textwrap.fill(label, 32)
