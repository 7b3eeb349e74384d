"""Figures as data, and their pictures."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import sys
import warnings
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from click.testing import CliRunner, Result

from npdrt.cli import cli
from npdrt.errors import DiskError, Error, FileRefused, Unavailable
from npdrt.store import container, trace
from npdrt.train.studies import figure
from npdrt.train.studies.figure import Figure, Line, Panel
from npdrt.train.studies.figure_of_file import load

T = np.arange(40.0)


def shaded(count: int = 10) -> tuple[Line, ...]:
    """Lines from 1e-2 up to 1e6, as the slices of a deep network are."""
    return tuple(
        Line(f"epoch {10 * i}", T / 20, 0.01 * np.exp(9.2 * (i + 1) / count * T / 20),
             shade=i / max(count - 1, 1))
        for i in range(count)
    )  # fmt: skip


def categories(count: int, **changes: Any) -> tuple[Line, ...]:
    return tuple(Line(f"rule {i}", T, np.exp(-T / (5 + i)), **changes) for i in range(count))


SLICES = Figure(
    "slices",
    "Loss along the gradient",
    (
        Panel("Depth 16", "strength", "loss (nats)", shaded(), ylog=True, ylim=(1e-2, 1e6)),
        Panel("Depth 2", "strength", "loss (nats)", categories(3), note="of ten checkpoints"),
        Panel("All", "depth", "accuracy", categories(3, style="points"), xlim=(0, 50)),
    ),
)


def as_data(value: Figure) -> Any:
    """A figure in a form that can be compared."""
    return json.loads(figure.to_json(value).tobytes())


def write(path: Path, value: Figure, **beside: Any) -> Path:
    """A container as a study writes it."""
    container.write(path, {"figure": figure.to_json(value), **beside}, {"kind": "study"})
    return path


def write_trace(
    path: Path, epochs: int = 6, layers: int = 5, classes: bool = True, conditioning: bool = False,
    jacobian: bool = True,
) -> Path:  # fmt: skip
    """The trace of a run with weights and biases; one value is missing."""
    records: list[dict[str, Any]] = []
    for e in range(1, epochs + 1):
        about = {"epoch": e, "step": 7 * e, "lr": 0.1 / e, "train_loss": 1 / e, "test_loss": 2 / e}
        if classes:
            about |= {"train_accuracy": 1 - 1 / e, "test_accuracy": None if e == 2 else 0.5}
        records.append({"event": "epoch", **about})
        row = [0.5 + 0.1 * k for k in range(2 * layers)]
        whole = {"log_deep_relative_trust": 0.1 / e} if layers else {}
        records.append(
            {"event": "trace", "step": 7 * e, **dict.fromkeys(trace.LAYERS, row), **whole}
        )
    names = [f"layers/0{k}/{array}" for k in range(layers) for array in ("weight", "bias")]
    for step in (0, 42) if conditioning else ():
        numbers = dict.fromkeys(names[::2], 3.0 + step)
        jacobians = [1.0 + k if jacobian else None for k in range(layers)]
        about = {"step": step, "condition_number": numbers, "jacobian_norm": jacobians}
        records.append({"event": "conditioning", **about})
    trace.write(path, records, names)
    return path


def plot(*words: object) -> Result:
    result = CliRunner().invoke(cli, ["plot", *map(str, words)], prog_name="npdrt")
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


# --- a figure is data ------------------------------------------------------------------------


def test_a_figure_survives_the_container(tmp_path: Path) -> None:
    """Next to other arrays, which do not matter; every bit of its lines."""
    path = write(tmp_path / "study.h5", SLICES, **{"results/accuracy": np.ones(3)})
    found = load(path)
    assert as_data(found) == as_data(SLICES)
    for panel, expected in zip(found.panels, SLICES.panels, strict=True):
        for line, wanted in zip(panel.lines, expected.lines, strict=True):
            assert (line.x.tobytes(), line.y.tobytes()) == (wanted.x.tobytes(), wanted.y.tobytes())


def test_plain_h5py_reads_the_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "study.h5", SLICES)
    with h5py.File(path) as file:
        found = json.loads(bytes(file["figure"][:]))
    assert found["panels"][1]["lines"][2]["y"] == SLICES.panels[1].lines[2].y.tolist()


def test_odd_lines_survive(tmp_path: Path) -> None:
    """Nothing at all, values that are not finite, settings of every kind."""
    lines = (
        Line("", [], []),
        Line("Ω", [1, 2, 3], [math.nan, math.inf, -math.inf], "dashed", group=4),
        Line("x", np.float32([0.1]), [1], "marked", shade=1.0),
    )
    value = Figure("", "", (Panel("", "", "", lines, xlim=(1, 2)), Panel("", "", "", ())))
    found = load(write(tmp_path / "odd.h5", value))
    assert np.isnan(found.panels[0].lines[1].y).all()  # each is a gap in the picture
    assert found.panels[0].lines[2].x[0] == float(np.float32(0.1))
    assert as_data(found) == as_data(value)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Line("a", [1, 2], [1]), r"line 'a': .* got shapes \(2,\) and \(1,\)"),
        (lambda: Line("a", [[1]], [[1]]), r"expected x and y of one length"),
        (lambda: Line("a", [], [], "dotted"), "unknown style 'dotted' of a line; use one of line"),
        (lambda: Line("a", [], [], shade=1.1), "line 'a': shade lies from 0 to 1; got 1.1"),
        (lambda: Line("a", [], [], shade=math.nan), "shade lies from 0 to 1; got nan"),
        (lambda: Line("a", [], [], group=-1), "group counts from 0; got -1"),
        (lambda: Panel("p", "", "", (), xlim=(2, 1)), "panel 'p': xlim needs low < high; got 2.0"),
        (lambda: Panel("p", "", "", (), ylim=(0, 1), ylog=True), "ylim needs 0 < low < high"),
        (lambda: Panel("p", "", "", (), ylim=(0, math.inf)), "ylim needs low < high; got 0.0, inf"),
    ],
)
def test_what_cannot_be_a_figure(make: Any, says: str) -> None:
    with pytest.raises(Error, match=says):
        make()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda meta: meta["panels"][0]["lines"][3].pop("x"),
        lambda meta: meta["panels"][0]["lines"][3].update(x=[1.0]),
        lambda meta: meta["panels"][0]["lines"][3].update(x=["1"] * 40),
        lambda meta: meta.pop("caption"),
        lambda meta: meta.update(panels=7),
        lambda meta: meta.update(colour="red"),
        lambda meta: meta["panels"][1].update(colour="red"),
        lambda meta: meta["panels"][1].update(ylim=[1]),
        lambda meta: meta["panels"][1].update(ylim="ab"),
        lambda meta: meta["panels"][0]["lines"][0].update(colour="red"),
        lambda meta: meta["panels"][0]["lines"][0].update(style=["line"]),
        lambda meta: meta["panels"][0]["lines"][0].update(shade="dark"),
        lambda meta: meta["panels"][0].update(lines=[3]),
    ],
)
def test_damaged_figures_are_refused(tmp_path: Path, spoil: Any) -> None:
    meta = as_data(SLICES)
    spoil(meta)
    refuse_figure(tmp_path / "bad.h5", np.frombuffer(json.dumps(meta).encode(), np.uint8))


@pytest.mark.parametrize("data", [np.ones(3), np.zeros(0, np.uint8), np.float64(1)])
def test_arrays_that_are_no_figure_are_refused(tmp_path: Path, data: Any) -> None:
    refuse_figure(tmp_path / "bad.h5", np.asarray(data))


def refuse_figure(path: Path, data: Any) -> None:
    container.write(path, {"figure": data}, {"kind": "study"})
    with pytest.raises(FileRefused, match=r"bad.h5: the figure is not of the form that npdrt"):
        load(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    container.write(tmp_path / "a.h5", {"x": np.ones(2)}, {})
    container.write(tmp_path / "b.h5", {"x": np.ones(2)}, {"kind": "study"})
    container.write(tmp_path / "old.h5", {"x": np.ones(2)}, {"kind": "study", "figure": {}})
    container.write(tmp_path / "c.h5", {"x": np.ones(2)}, {"kind": "trace", "parameters": []})
    (tmp_path / "d.h5").write_bytes(b"text")
    expected = {
        "a.h5": "expected a trace, a study or slices; it holds a checkpoint or arrays, and no",
        "b.h5": "expected a trace, a study or slices; it holds 'study'",
        "old.h5": "it holds a study of an older npdrt, which the same `npdrt reproduce` writes",
        "c.h5": "the trace is not of the form that npdrt writes",
        "d.h5": "this is not a checkpoint or trace of npdrt",
    }
    for name, says in expected.items():
        with pytest.raises(FileRefused, match=f"{name}.*{says}"):
            load(tmp_path / name)
    with pytest.raises(Error, match=r"holds no run: it has no trace.h5; give a run directory"):
        load(tmp_path)


# --- the figure of a run ---------------------------------------------------------------------


def test_a_run_becomes_a_figure(tmp_path: Path) -> None:
    write_trace(tmp_path / "trace.h5")
    found = load(tmp_path)
    assert found.name == tmp_path.name
    titles = ["Loss", "Accuracy", "Learning rate", "Weight norm", "Relative update", "Direction"]
    assert [panel.title for panel in found.panels] == [*titles, "Deep relative trust"]
    np.testing.assert_array_equal(found.panels[-1].lines[0].y, 0.1 / np.arange(1.0, 7))
    loss, accuracy = found.panels[:2]
    assert [line.label for line in loss.lines] == ["training minibatches", "test set"]
    np.testing.assert_array_equal(loss.lines[0].y, 1 / np.arange(1.0, 7))
    assert (loss.ylog, loss.ylabel) == (True, "mean loss (nats)")
    assert np.isnan(accuracy.lines[1].y[1])
    layers = found.panels[3].lines
    assert [line.label for line in layers] == [f"layers/0{k}/weight" for k in range(5)]
    assert [line.shade for line in layers] == [0, 0.25, 0.5, 0.75, 1]
    assert layers[2].x.tolist() == [7, 14, 21, 28, 35, 42]
    assert (layers[2].y == 0.5 + 0.1 * 4).all()


def test_conditioning_becomes_panels(tmp_path: Path) -> None:
    found = load(write_trace(tmp_path / "trace.h5", conditioning=True))
    numbers, jacobians = found.panels[-2:]
    assert (numbers.title, jacobians.title) == ("Condition number", "Layer Jacobian")
    assert [line.label for line in numbers.lines] == [f"layers/0{k}/weight" for k in range(5)]
    assert (numbers.lines[4].x.tolist(), numbers.lines[4].y.tolist()) == ([0, 42], [3, 45])
    assert jacobians.lines[4].y.tolist() == [5, 5]
    write_trace(tmp_path / "trace.h5", conditioning=True, jacobian=False)
    assert load(tmp_path).panels[-1].title == "Condition number"


def test_runs_without_classes_or_measurements(tmp_path: Path) -> None:
    found = load(write_trace(tmp_path / "trace.h5", epochs=1, layers=0, classes=False))
    assert [p.title for p in found.panels[:2]] == ["Loss", "Learning rate"]
    assert found.panels[0].ylabel == "mean squared error"
    assert found.panels[0].lines[0].style == "points"
    trace.write(tmp_path / "none.h5", [], ["first", "second"])
    empty = load(tmp_path / "none.h5")
    assert [p.title for p in empty.panels] == ["Loss", "Learning rate"]


# --- pictures --------------------------------------------------------------------------------

matplotlib = pytest.importorskip("matplotlib")
render = importlib.import_module("npdrt.train.studies.render")
ODD = Figure(
    "odd",
    "a caption with $math_{ and 漢字",
    (
        Panel(*("long title " * 12, "x " * 60, "$y^{ " * 20), categories(2)),
        Panel(*("labels", "x", "y"), (Line("_a", T, T), Line("$a_{", T, T), Line("漢字 😀", T, T))),
        Panel("huge", "x", "y", (Line("", [1, 2, 3], [1e308, -1e308, 0]),)),
        Panel("wide", "x", "y", (Line("", [1e-249, 1], [1e-320, 1e249]),), xlog=True, ylog=True),
        Panel("one point", "epoch", "y", (Line("a", [5], [0.3]),), ylog=True),
        Panel("constant", "epoch", "y", (Line("a", [1, 2], [3, 3]),), ylog=True, note="n " * 60),
        Panel("narrow", "epoch", "y", (Line("a", [1, 2], [15.91, 16.02]),), ylog=True),
        Panel("not positive", "x", "y", (Line("a", T, -T), Line("b", T, T)), ylog=True),
    ),
)


def figures() -> dict[str, Figure]:
    empty = (Line("a", [1, 2], [math.nan, math.inf]), Line("b", [], []), Line("c", [1], [-1]))
    return {
        "slices": SLICES,
        "odd": ODD,
        "one panel": Figure("", "", SLICES.panels[2:]),
        "crowded": Figure("", "", (Panel("", "x", "y", categories(12)), SLICES.panels[0])),
        "no finite values": Figure("", "", (Panel("e", "x", "y", empty, xlog=True, ylog=True),)),
        "no lines": Figure("", "", (Panel("e", "x", "y", ()),)),
        "no panels": Figure("", "nothing", ()),
    }


@pytest.mark.parametrize("name", figures())
def test_no_warning_whatever_the_figure(name: str) -> None:
    """Warnings are errors in these tests."""
    assert render.render(figures()[name], "png").startswith(b"\x89PNG\r\n\x1a\n")


@pytest.mark.parametrize(
    ("form", "magic"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")]
)
def test_the_same_bytes_again(form: str, magic: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without dates, and whatever the user has set for other pictures."""
    value = Figure("", "all", SLICES.panels[:1])
    first = render.render(value, form)
    assert first.startswith(magic)
    monkeypatch.setitem(matplotlib.rcParams, "font.size", 20.0)
    monkeypatch.setitem(matplotlib.rcParams, "lines.linewidth", 9.0)
    assert render.render(value, form) == first
    assert matplotlib.rcParams["font.size"] == 20.0
    assert b"Date" not in first
    assert b"dc:date" not in first


def test_width_of_a_picture() -> None:
    width = int.from_bytes(render.render(SLICES, "png")[16:20], "big")
    assert width == pytest.approx(7 * 200, rel=0.02)


def laid_out(value: Figure) -> Any:
    """Matplotlib's figure after its layout."""
    with matplotlib.style.context(render.STYLE, after_reset=True), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")
        canvas = render._layout(value)
        canvas.draw_without_rendering()
        return canvas


def legend(axes: Any) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_long_sequences_name_first_middle_and_last() -> None:
    value = Figure("", "", (SLICES.panels[0], Panel("", "", "", shaded(4))))
    canvas = laid_out(value)
    assert legend(canvas.axes[0]) == ["epoch 0", "epoch 40", "epoch 90"]
    assert legend(canvas.axes[1]) == ["epoch 0", "epoch 10", "epoch 20", "epoch 30"]


def luminance(colour: Any) -> float:
    """Relative luminance, 0 black to 1 white (WCAG 2)."""
    rgb = np.array(matplotlib.colors.to_rgb(colour))
    return float(np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
                 @ [0.2126, 0.7152, 0.0722])  # fmt: skip


def test_shades_get_lighter_and_none_is_too_light_for_print() -> None:
    lines = laid_out(Figure("", "", SLICES.panels[:1])).axes[0].get_lines()
    light = [luminance(line.get_color()) for line in lines]
    assert light == sorted(light)
    assert light[-1] < 0.6
    rules = laid_out(Figure("", "", (Panel("", "", "", categories(7)),))).axes[0].get_lines()
    assert len({line.get_color() for line in rules}) == 7
    assert all(luminance(line.get_color()) < 0.5 for line in rules)


def test_rulesdiffer_in_colour_and_marker() -> None:
    lines = laid_out(Figure("", "", (Panel("", "", "", categories(12)),))).axes[0].get_lines()
    looks = {(line.get_color(), line.get_marker()) for line in lines}
    assert len(looks) == 12
    assert len({line.get_marker() for line in lines[:10]}) == 10


def test_lines_of_a_group_share_colour_and_marker() -> None:
    lines = tuple(
        Line(f"{rule} {part}", T, T + i, style, group=i)
        for i, rule in enumerate("ab")
        for part, style in (("training", "marked"), ("test", "dashed"))
    )
    found = laid_out(Figure("", "", (Panel("", "", "", lines),))).axes[0].get_lines()
    looks = [(line.get_color(), line.get_marker()) for line in found]
    assert looks[0] == looks[1] != looks[2] == looks[3]
    assert found[0].get_linestyle() == "-" != found[1].get_linestyle()


def test_values_that_cannot_be_shown_leave_gaps() -> None:
    y = [1.0, math.nan, math.inf, -1.0, 0.0, 2.0]
    axes = laid_out(Figure("", "", (Panel("", "", "", (Line("", range(6), y),), ylog=True),))).axes
    shown = axes[0].get_lines()[0].get_ydata()
    np.testing.assert_array_equal(shown, [1.0, *[math.nan] * 4, 2.0])


def test_an_empty_panel_says_so() -> None:
    axes = laid_out(figures()["no finite values"]).axes[0]
    assert [text.get_text() for text in axes.texts] == ["no finite values"]
    assert axes.get_legend() is None


@pytest.mark.parametrize("name", ["slices", "one panel", "crowded"])
def test_nothing_lies_outside_the_picture_or_another_panel(name: str) -> None:
    canvas = laid_out(figures()[name])
    whole = canvas.bbox.padded(1)
    boxes = [axes.get_tightbbox() for axes in canvas.axes]
    for box in boxes:
        assert whole.containsx(box.x0)
        assert whole.containsx(box.x1)
        assert whole.containsy(box.y0)
        assert whole.containsy(box.y1)
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:i])


def test_logarithmic_axes_of_few_decades_have_plain_numbers() -> None:
    depth = Line("", [2, 4, 8, 16, 32, 50], [1e-3, 1, 1, 1, 1, 1e4])
    axes = laid_out(Figure("", "", (Panel("", "", "", (depth,), xlog=True, ylog=True),))).axes[0]
    shown = {tick.get_text() for tick in axes.get_xticklabels()}
    assert {"2", "5", "10", "20", "50"} <= shown
    assert any("10^{" in tick.get_text() for tick in axes.get_yticklabels())


# --- files and the command -------------------------------------------------------------------


def test_drawing_is_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "a.svg"
    target.write_text("old")

    def fail(self: Path, target: Path) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(DiskError, match="disk full"):
        render.save(figures()["no lines"], target)
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_drawing_in_another_format(tmp_path: Path) -> None:
    for name, says in (("a.jpg", "cannot draw jpg"), ("a", "cannot draw without a suffix")):
        with pytest.raises(Error, match=f"{says}; use .png, .svg or .pdf"):
            render.save(SLICES, tmp_path / name)


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(Unavailable, match=r'pip install "npdrt\[plot\]"'):
        render.save(SLICES, tmp_path / "a.png")
    write_trace(tmp_path / "trace.h5")
    result = plot(tmp_path)
    assert result.exit_code == 4
    assert 'matplotlib is not installed; install it with pip install "npdrt[plot]"' in result.output
    assert list(tmp_path.iterdir()) == [tmp_path / "trace.h5"]


def test_plot_of_a_run(tmp_path: Path) -> None:
    write_trace(tmp_path / "trace.h5")
    result = plot(tmp_path)
    assert (result.exit_code, result.output) == (0, f"{tmp_path / 'trace.png'}\n")
    first = (tmp_path / "trace.png").read_bytes()
    again = plot(tmp_path / "trace.h5")
    assert again.exit_code == 2
    assert "trace.png already exists; give --force to replace it" in again.output
    assert plot(tmp_path, "--force").exit_code == 0
    assert (tmp_path / "trace.png").read_bytes() == first


def test_plot_into_formats_and_places(tmp_path: Path) -> None:
    study = write(tmp_path / "study.h5", Figure("", "", SLICES.panels[2:]))
    for words, name in (
        (("--format", "svg"), "study.svg"),
        (("--output", tmp_path / "b.pdf"), "b.pdf"),
        (("--output", tmp_path / "c.PNG", "--format", "png"), "c.PNG"),
    ):
        result = plot(study, *words)
        assert (result.exit_code, result.output) == (0, f"{tmp_path / name}\n")
        assert (tmp_path / name).stat().st_size > 1000


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (("--format", "gif"), 2, "'gif' is unknown. Use one of png, svg, pdf."),
        (("--output", "a.gif"), 2, "a.gif: end the name in .png, .svg or .pdf"),
        (("--output", "a"), 2, "a: end the name in .png, .svg or .pdf"),
        (("--output", "a.png", "--format", "svg"), 2, "--format svg and --output a.png differ"),
        ((), 2, "nowhere.h5 does not exist; give a run directory"),
    ],
)
def test_plot_usage(words: tuple[str, ...], code: int, says: str, tmp_path: Path,
                    monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    result = plot("nowhere.h5", *words)
    assert (result.exit_code, list(tmp_path.iterdir())) == (code, [])
    assert says in " ".join(result.output.split())


def test_plot_refuses_a_checkpoint(tmp_path: Path) -> None:
    container.write(tmp_path / "checkpoint.h5", {"params/w": np.ones(2)}, {"user": {}})
    result = plot(tmp_path / "checkpoint.h5")
    assert result.exit_code == 3
    assert "expected a trace, a study or slices" in result.output
    assert list(tmp_path.iterdir()) == [tmp_path / "checkpoint.h5"]


def test_figures_are_values() -> None:
    changed = dataclasses.replace(SLICES, panels=SLICES.panels[:1])
    assert len(changed.panels) == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        changed.name = "x"  # type: ignore[misc]
