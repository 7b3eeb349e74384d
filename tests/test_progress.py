"""Progress: a bar that fits its terminal, lines in a log, a bar in a notebook."""

from __future__ import annotations

import re
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from npdrt import progress
from npdrt.progress import EVERY, REDRAWN, Bars, bar
from npdrt.train import Config, train
from npdrt.train.shown import numbers

WORDS = numbers({"train_loss": 0.1234, "train_perplexity": 33278.12})


class Written:
    """What Bars wrote, and a clock that moves when it is told to."""

    def __init__(self) -> None:
        self.text, self.now = "", 0.0

    def bars(self, **options: Any) -> Bars:
        return Bars(write=self.write, clock=lambda: self.now, **options)

    def write(self, text: str) -> None:
        self.text += text


@pytest.fixture
def written() -> Written:
    return Written()


def a_terminal(monkeypatch: pytest.MonkeyPatch, columns: Callable[[], int]) -> None:
    monkeypatch.setattr(progress, "drawn", lambda: True)
    monkeypatch.setattr(progress, "columns", columns)


@pytest.mark.parametrize("words", ["", "loss 0.1234", numbers({"loss": 2.0}), WORDS])
@pytest.mark.parametrize("width", [1, 20, 40, 60, 80, 200])
def test_a_bar_fits(width: int, words: str) -> None:
    for done in (0, 1, 59, 119, 120):
        text = bar("training", done, 120, "0:00:09", words, width)
        assert len(text) < width or not text
        if width >= 60:
            assert text.endswith(words)
            assert f"{100 * done // 120}%" in text
        if width >= 80 or (width == 60 and words != WORDS):
            inside = re.search(r"\[(#*)(-*)\]", text)
            assert inside is not None
            size = len(inside[1] + inside[2])
            assert len(inside[1]) == size * done // 120


def test_a_bar_is_one_line_that_is_drawn_over(
    written: Written, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the terminal becomes narrower."""
    widths = iter([80, 80, 50, 50])
    a_terminal(monkeypatch, lambda: next(widths))
    with written.bars() as bars:
        for done in (0, 1, 2, 3):
            bars.progress("training", done, 3, lambda: "loss 1.0")
            written.now += 1.0
    assert written.text.count("\n") == 1
    assert written.text.endswith("\n")
    states = written.text.rstrip("\n").split("\r")[1:]
    assert [re.search(r"(\d+)%", state)[1] for state in states] == ["0", "33", "66", "100"]  # type: ignore[index]
    assert len(states[0]) == len(states[1]) < 80
    assert len(states[2]) == len(states[3]) == 49
    assert "0:00:02" in states[1]  # two steps, a second each
    assert "0:00:00" in states[3]


def test_a_bar_is_drawn_now_and_then_and_at_the_end(
    written: Written, monkeypatch: pytest.MonkeyPatch
) -> None:
    a_terminal(monkeypatch, lambda: 80)
    asked = []
    with written.bars() as bars:
        for done in range(1001):
            bars.progress("training", done, 1000, lambda: asked.append(1) or "")  # type: ignore[func-returns-value]
            written.now += REDRAWN / 100
    states = written.text.count("\r")
    assert 9 <= states <= 13
    assert len(asked) == states
    assert written.text.rstrip().endswith("100% 0:00:00")


def test_a_log_gets_a_line_now_and_then(written: Written) -> None:
    """A short command writes none; a label begins anew."""
    with written.bars() as bars:
        bars.progress("short", 1, 1)
        for done in range(1, 5):
            bars.progress("training", done, 8, lambda: "loss 0.5")
            written.now += EVERY / 2 + 1
        bars.progress("slices", 4, 8)
    assert written.text == "training 3 of 8, 37%, 0:01:20 left, loss 0.5\n"


def test_quiet(written: Written, monkeypatch: pytest.MonkeyPatch) -> None:
    a_terminal(monkeypatch, lambda: 80)
    with written.bars(quiet=True) as bars:
        bars.progress("training", 1, 1)
    assert written.text == ""


def test_a_notebook_gets_a_bar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "blobs.npz", x=np.eye(40), y=np.arange(40) % 3)
    config = Config(data=str(tmp_path / "blobs.npz"), epochs=2)
    train(config, tmp_path / "silent")
    assert capsys.readouterr().err == ""
    shell = types.SimpleNamespace(kernel=object())
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: shell))
    train(config, tmp_path / "told")
    told = capsys.readouterr().err
    assert re.search(r"\rtraining \[#+\] 100% 0:00:00 loss \d\.\d{4}  accuracy \d\.\d{4}$", told)
