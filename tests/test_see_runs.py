"""Runs side by side: in a list, in one picture, in TensorBoard; tables that fit a terminal."""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from npdrt.cli import cli, common
from npdrt.cli.common import listed, table
from npdrt.errors import Error
from npdrt.store import log, trace
from npdrt.train import Config, train
from npdrt.train.studies.figure_of_file import overlay

RNG = np.random.default_rng(2)


def call(*words: object, code: int = 0) -> str:
    """What `npdrt words` prints."""
    result = CliRunner().invoke(cli, [str(word) for word in words], prog_name="npdrt")
    assert result.exit_code == code, result.output
    return result.stdout if code == 0 else result.stderr


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of labels, one of targets and one that stopped."""
    folder = tmp_path_factory.mktemp("runs")
    x, y = RNG.normal(size=(60, 4)), RNG.integers(0, 3, 60)
    np.savez(folder / "labels.npz", x=x, y=y, x_test=x[:20] + 0.1, y_test=y[:20])
    np.savez(folder / "targets.npz", x=x, y=x[:, 0])
    labels, targets = (
        {"data": str(folder / f"{n}.npz"), "epochs": 3} for n in ("labels", "targets")
    )
    train(Config(**labels, model_options={"depth": 3, "width": 8}, log_every=1), folder / "a")
    train(Config(**targets, optimizer="adam"), folder / "b")
    steps = iter([0, 0, 0, 15])
    train(Config(**labels, lr=0.001), folder / "c", stop=lambda: next(steps))
    return folder


def epochs(run: Path) -> list[log.Record]:
    return [r for r in log.read(run / "log.jsonl") if r["event"] == "epoch"]


# --- show -------------------------------------------------------------------------------------


def test_a_list_of_runs(runs: Path) -> None:
    found = json.loads(call("show", runs, "--json"))["runs"]
    assert [Path(row["run"]).name for row in found] == ["a", "b", "c"]
    a, b, c = found
    last = epochs(runs / "a")[-1]
    for name in ("train_loss", "train_accuracy", "test_loss", "test_accuracy", "seconds"):
        assert a[name] == last[name]
    assert (a["model"], a["depth"], a["optimizer"], a["lr"]) == ("mlp", 3, "fromage", 0.01)
    assert (b["optimizer"], b["test_loss"], b["train_accuracy"]) == ("adam", None, None)
    assert (a["steps"], a["of"], c["steps"], c["of"]) == (6, 6, 4, 6)
    heads, *rows = call("show", runs).splitlines()[:4]
    at = heads.index("steps")
    assert [row[at:].split("  ")[0] for row in rows] == ["6", "6", "4 of 6"]
    assert f"{last['train_accuracy']:.4g}/{last['test_accuracy']:.4g}" in call("show", runs)


def test_a_list_says_what_cannot_be_read(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "good").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "good" / "checkpoint.h5").write_bytes((runs / "a" / "checkpoint.h5").read_bytes())
    (tmp_path / "bad" / "checkpoint.h5").write_bytes(b"no")
    bad, good = json.loads(call("show", tmp_path, "--json"))["runs"]
    assert "state" in bad
    assert (good["steps"], good["train_loss"]) == (6, None)  # it has no log
    assert bad["state"] in call("show", tmp_path)
    (tmp_path / "none").mkdir()
    assert "holds no run" in call("show", tmp_path / "none", code=2)


def test_a_run_has_its_last_numbers(runs: Path) -> None:
    last = epochs(runs / "a")[-1]
    text = call("show", runs / "a")
    expected = f"loss {last['test_loss']:.4g}, accuracy {last['test_accuracy']:.4g} (after it)"
    assert f"test: {expected}\n" in text
    assert "train: loss " in text
    lines = call("show", runs / "b").splitlines()
    assert [line for line in lines if line.startswith(("train:", "test:"))] == [
        f"train: loss {epochs(runs / 'b')[-1]['train_loss']:.4g} (mean of the last epoch's "
        "minibatches)"
    ]
    assert json.loads(call("show", runs / "c", "--json"))["last_epoch"] == epochs(runs / "c")[-1]


# --- tables -----------------------------------------------------------------------------------

ROWS = [
    {"run": "runs/mlp-50-1", "model": "mlp", "data": "digits", "lr": 0.01, "loss": 0.5},
    {"run": "runs/mlp-50-2", "model": "mlp", "data": "digits", "lr": 0.02, "loss": None},
]


@pytest.mark.parametrize("width", [200, 30, 24])
def test_tables_fit_the_terminal(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "terminal_width", lambda: width)
    lines = listed(ROWS).splitlines()
    assert max(map(len, lines[:3])) <= width
    assert (lines[-1] == "all: model mlp, data digits") == (width < 200)
    assert [row.split()[0][-4:] for row in lines[1:3]] == ["50-1", "50-2"]
    wrapped = table([("advice", "words " * 20), ("cpu", "one")]).splitlines()
    assert max(map(len, wrapped)) <= width
    assert " ".join(line[8:].strip() for line in wrapped[:-1]).split() == ["words"] * 20


def test_tables_in_a_file_are_whole() -> None:
    """Not cut where nothing is a terminal."""
    text = table([("x" * 300, "y", "z")])
    assert text == f"{'x' * 300}  y  z"
    assert listed(ROWS[:1]).splitlines()[0].split() == ["run", "model", "data", "lr", "loss"]


# --- plot -------------------------------------------------------------------------------------


def test_runs_in_one_picture(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = overlay([runs / "a", runs / "c" / "trace.h5"])
    loss, accuracy, rate = figure.panels
    assert [(line.label, line.style, line.group) for line in loss.lines] == [
        ("a", "line", 0), ("", "dashed", 0), ("c", "line", 1), ("", "dashed", 1)
    ]  # fmt: skip
    for line, name in zip(accuracy.lines, ("train_accuracy", "test_accuracy"), strict=False):
        np.testing.assert_array_equal(line.y, [r[name] for r in epochs(runs / "a")])
    assert [line.label for line in rate.lines] == ["a", "c"]
    assert loss.ylabel == "mean loss (nats)"
    mixed = overlay([runs / "a", runs / "b"])
    assert mixed.panels[0].ylabel == "mean loss"
    assert [line.label for line in mixed.panels[1].lines] == ["a", ""]
    with pytest.raises(Error, match="several are drawn only of runs"):
        overlay([runs / "a", runs / "nowhere"])
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    assert call("plot", runs / "a", runs / "b", runs / "c") == "runs.png\n"
    assert (tmp_path / "runs.png").read_bytes().startswith(b"\x89PNG")


def test_runs_of_one_name_have_their_paths(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(runs / "a")
    labels = [line.label for line in overlay([runs / "a", tmp_path / "a"]).panels[2].lines]
    assert labels == [str(runs / "a"), str(tmp_path / "a")]


# --- TensorBoard ------------------------------------------------------------------------------


def crc32c(data: bytes) -> int:
    """Castagnoli's CRC, bit by bit: polynomial 0x1EDC6F41, reflected."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def masked(data: bytes) -> int:
    crc = crc32c(data)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def tf_records(data: bytes) -> Iterator[bytes]:
    """The records of a TFRecord file: length, its CRC, content, its CRC; little-endian."""
    at = 0
    while at < len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        (crc,) = struct.unpack_from("<I", data, at + 8)
        assert crc == masked(data[at : at + 8])
        content = data[at + 12 : at + 12 + length]
        assert struct.unpack_from("<I", data, at + 12 + length) == (masked(content),)
        yield content
        at += 16 + length
    assert at == len(data)


def test_the_crc_is_the_one_of_rfc_3720() -> None:
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(bytes(32)) == 0x8A9136AA


def test_tensorboard_reads_what_is_exported(runs: Path, tmp_path: Path) -> None:
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    file = tmp_path / "a.tfevents"
    call("export", runs / "a", "--to", "tensorboard", "--output", file)
    first, *events = (event_pb2.Event.FromString(raw) for raw in tf_records(file.read_bytes()))
    assert first.file_version == "brain.Event:2"
    found: dict[str, dict[int, float]] = {}
    for event in events:
        for value in event.summary.value:
            found.setdefault(value.tag, {})[event.step] = value.simple_value
    for name in ("train_loss", "test_accuracy", "lr"):
        expected = {r["step"]: pytest.approx(r[name], rel=1e-6) for r in epochs(runs / "a")}
        assert found[f"history/{name}"] == expected
    steps = [r for r in log.read(runs / "a" / "log.jsonl") if r["event"] == "step"]
    assert found["step/loss"] == {r["step"]: pytest.approx(r["loss"], rel=1e-6) for r in steps}
    arrays, meta = trace.read(runs / "a" / "trace.h5")
    for column, name in enumerate(meta["parameters"]):
        norms = arrays["layers/weight_norm"][:, column].tolist()
        expected = dict(zip(arrays["layers/step"].tolist(), norms, strict=True))
        assert found[f"layers/weight_norm/{name}"] == pytest.approx(expected, rel=1e-6)
    assert len(found["network/deep_relative_trust"]) == len(arrays["layers/step"])
    times = [event.wall_time for event in events]
    assert times == sorted(times)
    assert times[-1] == epochs(runs / "a")[-1]["seconds"]
    call("export", runs / "b", "--to", "tensorboard", "--output", tmp_path / "b.tfevents")


def test_without_tensorboardx(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboardX.proto", None)
    words: tuple[Any, ...] = ("export", runs / "a", "--to", "tensorboard")
    told = call(*words, "--output", tmp_path / "a.tfevents", code=4)
    assert 'pip install "npdrt[tensorboard]"' in told
    assert list(tmp_path.iterdir()) == []
