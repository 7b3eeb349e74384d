"""Models of images in training runs, and the studies of tables and singular values."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from npdrt import Error, data, store
from npdrt.cli import cli
from npdrt.models import MNISTResNet
from npdrt.random import Random
from npdrt.train import Config, resume, train
from npdrt.train.config import build_model, resolve
from npdrt.train.studies import random_matrix, rates, recipe, singular_values, trials
from npdrt.train.studies.reproduce import reproduce
from npdrt.train.studies.study import Stopped, Work, grouped
from npdrt.train.studies.sweep import Options, Run

SMOKE = Config(model="resnet18", model_options={"width": 2}, batch_size=256, epochs=2, lr=0.01)
OFFICIAL = ("fromage/cifar-10", "fromage-v1/figure-8", "skips/table-1", "skips/table-2")


# --- training runs ---------------------------------------------------------------------------


def test_models_take_shape_and_classes_from_the_data(tmp_path: Path) -> None:
    """And neither depth nor width from the perceptron's defaults."""
    x = Random(0).normal((6, 3, 8, 8)).astype("float32")
    np.savez(tmp_path / "images.npz", x=x, y=np.arange(6))
    source = data.load(tmp_path / "images.npz")
    resolved = resolve(Config(model="resnet18", data=str(tmp_path / "images.npz")), source)
    assert resolved.model_options["width"] == 64
    assert resolved.model_options["outputs"] == 6
    assert resolved.lr == 0.01
    assert resolve(Config(), data.load("digits")).model_options["width"] == 128


def test_models_of_images_refuse_rows_and_other_options(tmp_path: Path) -> None:
    np.savez(tmp_path / "rows.npz", x=np.ones((4, 5)), y=np.arange(4))
    with pytest.raises(Error, match="model resnet18 needs images"):
        resolve(Config(model="resnet18"), data.load(tmp_path / "rows.npz"))
    with pytest.raises(Error, match="unknown option of model resnet18: 'depth'"):
        resolve(Config(model="resnet18", model_options={"depth": 3}), data.load("digits"))
    with pytest.raises(Error, match=r"MNISTResNet: expected images of \(1, 28, 28\)"):
        resolve(Config(model="mnist-resnet"), data.load("digits"))


def test_the_command_trains_a_residual_network(tmp_path: Path) -> None:
    options = ["--set", "width=2", "--set", "shortcut=modified", "--augment", "crop-flip"]
    arguments = ["train", "--model", "resnet18", *options, "--optimizer", "fromage", "--norm-bound"]
    run = ["1", "--epochs", "1", "--batch-size", "256", "--out", str(tmp_path / "run"), "--json"]
    result = CliRunner().invoke(cli, [*arguments, *run])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["lr"] == 0.01
    checkpoint = store.load(tmp_path / "run" / "checkpoint.h5")
    assert "stages/03/blocks/01/norm2/running_var" in checkpoint.buffers
    assert checkpoint.meta["config"]["model_options"]["shortcut"] == "modified"


def test_the_network_of_theorem_5_1_trains(tmp_path: Path) -> None:
    config = Config(model="skipnet", optimizer="sgd", lr=0.5, epochs=3)
    summary = train(config, tmp_path / "run")
    assert summary.train_accuracy is not None
    assert summary.train_accuracy > 0.5


def test_a_resumed_run_has_the_same_bits(tmp_path: Path) -> None:
    """Running statistics and crops included."""
    config = Config(**{**SMOKE.as_dict(), "augment": "crop-flip", "schedule": "constant"})
    train(config, tmp_path / "whole")
    count = iter(range(100))
    train(config, tmp_path / "cut", stop=lambda: 15 if next(count) == 7 else 0)
    resume(tmp_path / "cut")
    whole, cut = (store.load(tmp_path / name / "checkpoint.h5") for name in ("whole", "cut"))
    for group in ("params", "buffers", "state"):
        found, expected = getattr(cut, group), getattr(whole, group)
        assert list(found) == list(expected)
        assert all(found[name].tobytes() == expected[name].tobytes() for name in expected)


# --- recipes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OFFICIAL)
def test_every_row_of_the_authors_has_its_runs(name: str) -> None:
    """And every measure that they have is one that the study makes."""
    found = recipe.load(name)
    by = found.options["by"]
    keys = {tuple(Run(c, Path(), 0).setting(setting) for setting in by) for c in found.configs}
    shorts = [setting.rpartition(".")[2] for setting in by]
    rows = found.reference["row"]
    without = {key for key in keys if key[0] == "lars_lesion"}  # of which they have no number
    assert {tuple(row.get(short) for short in shorts) for row in rows} == keys - without
    for row in rows:
        assert set(row) <= {*shorts, *found.options["measures"]}


def test_sizes_of_the_full_recipes() -> None:
    counts = {name: len(recipe.load(name).configs) for name in OFFICIAL}
    assert counts == dict(zip(OFFICIAL, (15, 15, 80, 80), strict=True))
    assert len([c for c in recipe.load("fromage/figure-4").configs if c.model == "resnet18"]) == 15
    for name in OFFICIAL:
        for config in recipe.load(name).configs:
            assert config.model_options["init"] == "authors"
            assert config.augment == "crop-flip"


def test_the_tables_quote_the_paper() -> None:
    rows = recipe.load("skips/table-1").reference["row"]
    at = {(row["lr"], row["shortcut"]): row for row in rows}
    assert at[0.1, "convolution"]["batch test_accuracy"] == {"mean": 0.9164, "std": 0.0024}
    assert at[0.02, "modified"]["train_loss"] == {"mean": 0.0125, "std": 0.0004}
    eight = recipe.load("fromage-v1/figure-8")
    assert "no rule for it is published" in " ".join(eight.options["remarks"])


# --- means over trials -----------------------------------------------------------------------


def finished(path: Path, config: Config, result: dict[str, Any], *epochs: dict[str, Any]) -> Run:
    path.mkdir(parents=True)
    (path / "result.json").write_text(json.dumps(result))
    lines = [
        {"event": "epoch", "step": i, "epoch": i, "lr": 0.1, "train_loss": 0.0, **record}
        for i, record in enumerate(epochs, start=1)
    ]
    (path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return Run(config, path, len(epochs))


def test_means_and_deviations(tmp_path: Path) -> None:
    """Two trials, one that diverged, and the authors' row beside them."""
    found = recipe.load("skips/table-1", "smoke")
    options = {**found.options, "measures": ["train_loss", "train_loss@1", "max test_accuracy"]}
    row = {"lr": 0.1, "shortcut": "modified", "train_loss": {"mean": 0.1, "std": 0.2}}
    reference = {"data": "digits", "row": [row]}
    work_recipe = recipe.Recipe(
        **{**vars(found), "options": options, "reference": reference, "configs": ()}
    )
    config = Config(model_options={"shortcut": "modified"}, lr=0.1)
    epochs = [
        [{"train_loss": 2.0, "test_accuracy": 0.5}, {"train_loss": 1.0, "test_accuracy": 0.25}],
        [{"train_loss": 4.0, "test_accuracy": 0.5}, {"train_loss": 3.0, "test_accuracy": 0.75}],
    ]
    runs = [finished(tmp_path / str(i), config, {}, *e) for i, e in enumerate(epochs)]
    runs.append(finished(tmp_path / "lost", config, {"diverged": "step 3"}, epochs[0][0]))
    report = trials.report(Work(work_recipe, runs, Options()))
    rows = [table.rows for table in report.tables]
    assert rows[0] == (("0.1", "modified", 0.1, 0.2, 2.0, 1.0, 3, 1),)
    assert rows[1] == (("0.1", "modified", None, None, 3.0, 1.0, 3, 1),)
    assert rows[2][0][4:6] == (0.625, 0.125)
    assert [row[-1] for row in rows[3]] == ["", "", "diverged"]
    curve = report.figure.panels[0].lines[0]
    assert list(curve.y) == [3.0, 2.0]
    elsewhere = recipe.Recipe(**{**vars(work_recipe), "reference": {**reference, "data": "mnist"}})
    assert trials.report(Work(elsewhere, runs, Options())).tables[0].rows[0][2:4] == (None, None)


def test_test_accuracy_with_the_statistics_of_the_batch(tmp_path: Path) -> None:
    """It is that of training mode, in parts of the size asked for, and is computed once."""
    resolved = resolve(SMOKE, data.load("digits"))
    train(resolved, tmp_path / "run")
    run, work = (
        Run(resolved, tmp_path / "run", 0),
        Work(recipe.load("skips/table-1"), (), Options()),
    )
    source, checkpoint = data.load("digits"), store.load(tmp_path / "run" / "checkpoint.h5")
    model, right = build_model(resolved, source), 0
    assert source.x_test is not None
    for start in (0, 200):
        part = slice(start, start + 200)
        args = (checkpoint.params, checkpoint.buffers, source.x_test[part])
        logits, _ = model.apply(*args, train=True)
        right += int((logits.argmax(1) == source.y_test[part]).sum())  # type: ignore[index]
    found = trials.with_batch_statistics(work, run, 200)
    assert found == right / len(source.x_test)
    (tmp_path / "run" / "checkpoint.h5").unlink()
    (tmp_path / "run" / "checkpoint.prev.h5").unlink()
    assert trials.with_batch_statistics(work, run, 200) == found


def test_grids_stand_apart_by_benchmark(tmp_path: Path) -> None:
    """Of a residual network the minibatches' loss, as the authors; else that of the whole set."""
    net = Config(model="resnet18", optimizer="sgd", lr=0.1)
    runs = [
        finished(tmp_path / "a", net, {"train_loss": 7.0}, {"train_loss": 0.5}),
        finished(tmp_path / "b", Config(optimizer="sgd", lr=0.1), {"train_loss": 2.0}),
        finished(tmp_path / "c", net, {"diverged": "step 1"}),
    ]
    found = grouped(runs, rates._benchmark)
    assert list(found) == ["resnet18 on digits", "mlp on digits"]
    work = Work(recipe.load("fromage/figure-4", "smoke"), runs, Options())
    assert [rates._error(work, run) for run in runs] == [0.5, 2.0, math.inf]


# --- singular values -------------------------------------------------------------------------


def test_the_spectrum_is_that_of_the_jacobian() -> None:
    """Differences along a random direction stay within the singular values, and a left singular
    vector's product has the length of its value."""
    model = MNISTResNet(variant="modified")
    params, buffers = model.init(seed=0, dtype="float64"), model.buffers(dtype="float64")
    x = Random(0, "x").uniform((3, 1, 28, 28))
    values = singular_values.spectrum(model, params, buffers, x)
    assert values.shape == (30,)
    assert (np.diff(values) >= 0).all()
    h = model.first(params, x)
    direction = Random(1).normal(h.shape)
    direction /= np.linalg.norm(direction)
    ends = (model.rest(params, buffers, h + t * direction, train=True)[0] for t in (1e-6, -1e-6))
    slope = np.linalg.norm(np.subtract(*ends)) / 2e-6
    assert 0 < slope <= values[-1]
    np.testing.assert_array_equal(
        model.rest(params, buffers, h)[0], model(params, x, buffers=buffers)
    )


def test_trials_are_kept(tmp_path: Path, monkeypatch: Any) -> None:
    """A second report computes none again, and a trial with other settings is made anew."""
    found = recipe.load("skips/mnist-singular-values", "smoke")
    work = Work(found, (), Options(), out=tmp_path)
    first = singular_values.report(work)
    assert len(list((tmp_path / "trials").iterdir())) == 3
    monkeypatch.setattr(singular_values, "trial", None)
    assert singular_values.report(work).tables == first.tables
    other = recipe.Recipe(**{**vars(found), "options": {**found.options, "lr": 0.2}})
    with pytest.raises(TypeError):
        singular_values.report(Work(other, (), Options(), out=tmp_path))


def test_a_signal_ends_the_trials(tmp_path: Path) -> None:
    found = recipe.load("skips/mnist-singular-values", "smoke")
    with pytest.raises(Stopped):
        reproduce(found, tmp_path, Options(), stop=lambda: 2)
    with pytest.raises(Stopped):
        singular_values.report(Work(found, (), Options(), stop=lambda: 2, out=tmp_path))


@pytest.mark.parametrize(("offsets", "seen"), [((0, 1, 2), "is seen"), ((2, 1, 0), "is not seen")])
def test_the_ordering_is_said(offsets: tuple[int, ...], seen: str) -> None:
    base = np.linspace(1, 2, 8)[None].repeat(3, 0)
    spectra = {
        name: base + shift
        for name, shift in zip(("chain", "residual", "modified"), offsets, strict=True)
    }
    assert f"near 0 {seen}: of the smallest quarter" in singular_values._ordering(spectra)
    both = 3 if seen == "is seen" else 0
    by_trial = singular_values._ordering_by_trial(spectra)
    assert f"both in {both}; (b) - (a) is {offsets[1] - offsets[0]} +- " in by_trial


def test_random_matrices_follow_the_quarter_circle() -> None:
    """And an identity beside them leaves few values near 0 (MacDonald et al. 2023)."""
    a, shifted = random_matrix._spectra(300, 0)
    limit = random_matrix._limit(0.4)
    np.testing.assert_allclose(random_matrix._row(a, 0.4), limit, atol=0.02)
    assert random_matrix._row(shifted, 0.4)[3] < 0.1
    x = np.linspace(0, 0.4, 100001)
    density = np.sqrt(4 / 3 - x * x) * 3 / math.pi
    assert limit[3] == pytest.approx(np.trapezoid(density, x), abs=1e-9)
