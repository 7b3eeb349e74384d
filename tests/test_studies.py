"""Studies: every bundled recipe at its smoke scale through the command, and what they compute."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import mpmath
import numpy as np
import pytest
from click.testing import CliRunner

from npdrt import data, frechet, store
from npdrt.cli import cli
from npdrt.data import fetch
from npdrt.errors import Error, FileRefused, Unavailable
from npdrt.models import GAN
from npdrt.random import Random
from npdrt.store import container
from npdrt.train.config import Config
from npdrt.train.studies import (
    depth,
    distances,
    norms,
    rates,
    recipe,
    regions,
    surrogate,
    transmission,
)
from npdrt.train.studies.cache import kept
from npdrt.train.studies.figure_of_file import load
from npdrt.train.studies.reproduce import reproduce as study_of
from npdrt.train.studies.study import Stopped, Work, grouped
from npdrt.train.studies.sweep import Options, Run, runs


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What `npdrt reproduce NAME --scale smoke --json` prints, for every recipe."""
    folder = tmp_path_factory.mktemp("studies")
    fetch("sample-imagenet", folder / "data")
    return {name: reproduce(name, folder / name) for name in recipe.names()}


def reproduce(name: str, out: Path) -> dict[str, Any]:
    pytest.importorskip("matplotlib")
    arguments = ["reproduce", name, "--scale", "smoke", "--out", str(out), "--json", "--jobs", "2"]
    if "imagenet" in Path(f"train/studies/recipes/{name}.toml").read_text(encoding="utf-8"):
        arguments += ["--data-dir", str(out.parents[1] / "data")]
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


@pytest.mark.parametrize("name", recipe.names())
def test_every_study_runs(name: str, made: dict[str, dict[str, Any]]) -> None:
    found = made[name]
    out = Path(found["out"])
    assert (out / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert found["statement"] == recipe.load(name, "smoke").statement
    assert all(len(row) == len(t["columns"]) for t in found["tables"] for row in t["rows"])
    assert any(t["rows"] for t in found["tables"])


@pytest.mark.parametrize("name", recipe.names())
def test_the_study_file_holds_tables_and_figure(name: str, made: dict[str, Any]) -> None:
    path = Path(made[name]["out"]) / "study.h5"
    _, meta = container.read(path)
    assert (meta["kind"], meta["name"], meta["scale"]) == ("study", name, "smoke")
    assert meta["tables"] == made[name]["tables"]
    assert load(path).panels
    shown = CliRunner().invoke(cli, ["show", str(path)])
    assert shown.exit_code == 0
    assert all(table["title"] in shown.output for table in meta["tables"])


def column(found: dict[str, Any], table: int, name: str) -> list[Any]:
    content = found["tables"][table]
    index = content["columns"].index(name)
    return [row[index] for row in content["rows"]]


# --- Figure 2 --------------------------------------------------------------------------------


def test_norms_grow_by_the_closed_form(made: dict[str, Any]) -> None:
    """LARS without the prefactor after 300 steps; the float64 run to rounding, float32 to its."""
    found = made["fromage/figure-2"]
    differences = dict(
        zip(column(found, 0, "run"), column(found, 0, "relative difference"), strict=True)
    )
    assert abs(differences["LARS (no prefactor), float64, eta 0.01"]) < 1e-12
    assert abs(differences["LARS (no prefactor), float32, eta 0.01"]) < 1e-6
    assert abs(differences["Fromage, float64, eta 0.01"]) < 1e-12


def test_the_drift_is_the_rounding_of_the_prefactor(made: dict[str, Any]) -> None:
    found = made["fromage/figure-2"]
    drift = dict(zip(column(found, 1, "run"), column(found, 1, "relative difference"), strict=True))
    assert abs(drift["Fromage, float32, eta 0.01"]) < 0.01
    assert column(found, 1, "predicted")[0] == "5.0055e-08"


def test_overflow_comes_for_real(made: dict[str, Any]) -> None:
    """At eta = 1 the rate, which grows like the square of the norm, overflows first."""
    found = made["fromage/figure-2"]
    rows = dict(zip(column(found, 2, "run"), found["tables"][2]["rows"], strict=True))
    _, steps, squared, single, failed = rows["LARS (no prefactor), float32, eta 1"]
    assert squared < single < steps
    assert 0.8 * squared < failed <= squared
    assert rows["LARS (no prefactor), float32, eta 0.01"][4] == "not in this run"


def test_the_adversarial_network_grows_by_the_closed_form(made: dict[str, Any]) -> None:
    """Its 44 normalised weights, but not its biases and gates, in float32."""
    found = made["fromage/figure-2"]
    (row,) = [row for row in found["tables"][0]["rows"] if "adversarial network" in row[0]]
    assert abs(row[4]) < 1e-6
    panel = load(Path(found["out"]) / "study.h5").panels[0]
    *lines, closed = panel.lines
    assert len(lines) == 44
    assert all("bias" not in line.label and "gate" not in line.label for line in lines)
    for line in lines:
        np.testing.assert_allclose(line.y, closed.y, rtol=1e-6)


def test_growth_of_the_authors_log() -> None:
    """The stored log is the closed form to its six digits."""
    reference = recipe.load("fromage/figure-2").reference
    for epoch, logged in reference["lars_lesion"]:
        steps = epoch * reference["steps_per_epoch"]
        assert norms.growth(reference["lr"], steps) == pytest.approx(logged, abs=1.1e-5)


# --- Figure 3 --------------------------------------------------------------------------------


def test_the_plotted_number_is_never_below_the_fair_one(made: dict[str, Any]) -> None:
    found = made["fromage/figure-3"]
    fair, plotted = column(found, 1, "npdrt at best lr"), column(found, 1, "npdrt as plotted")
    assert all(p >= f for p, f in zip(plotted, fair, strict=True))
    assert any(p > f + 1e-4 for p, f in zip(plotted, fair, strict=True))


def test_the_plotted_number_takes_the_best_of_every_minibatch(tmp_path: Path) -> None:
    """Two runs that are right by turns: each has 1/2, together they show 1."""
    runs = []
    for name, right in (("a", (1.0, 0.0)), ("b", (0.0, 1.0))):
        (tmp_path / name).mkdir()
        both = {"lr": 0.1, "loss": 0.0, "train_loss": 0.0}
        lines = [
            {"event": "step", "step": i + 1, "accuracy": v, **both} for i, v in enumerate(right * 2)
        ]
        lines.append({"event": "epoch", "step": 4, "epoch": 2, "train_accuracy": 0.5, **both})
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / name / "log.jsonl").write_text(text)
        runs.append(Run(Config(epochs=2), tmp_path / name, 4))
    assert depth.plotted(runs) == 1.0
    assert depth.fairest(runs) == 0.5


def test_the_logs_of_figure_3_are_whole() -> None:
    """18 depths and the authors' extra ones; at 50 hidden layers only Fromage is above chance."""
    reference = recipe.load("fromage/figure-3").reference
    last = {rule: reference[rule]["rows"][-1] for rule in ("sgd", "fromage", "adam")}
    assert [row[0] for row in last.values()] == [50] * 3
    assert [max(row[1:4]) for row in last.values()] == [0.1124, 0.6539, 0.1124]
    depths = {c.model_options["depth"] for c in recipe.load("fromage/figure-3").configs}
    assert depths == {2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 16, 21, 26, 31, 36, 41, 46, 51}


# --- Figure 1 --------------------------------------------------------------------------------


def test_figure_1_quotes_the_logs() -> None:
    reference = recipe.load("fromage/figure-1").reference
    nets = {(net["depth"], net["residual"]): net for net in reference["net"]}
    assert nets.keys() == {(2, False), (16, False), (16, True)}
    snapshots = {s["step"]: s for s in nets[16, False]["snapshot"]}
    assert snapshots[240]["loss"][-1] == 1.308e4
    assert snapshots[2160]["best"] == 0.003
    for net in nets.values():
        for s in net["snapshot"]:
            assert len(s["loss"]) == len(s["change"]) == len(net["eta"])


def test_figure_1_slices_a_snapshot_on_all_examples(made: dict[str, Any]) -> None:
    assert "on all 1437 examples" in " ".join(made["fromage/figure-1"]["notes"])


# --- closed forms ----------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [1, 10, 20])
@pytest.mark.parametrize("eta", [1e-4, 0.01, 0.5, 3.0, 50.0])
def test_trust_and_surrogate_against_mpmath(eta: float, layers: int) -> None:
    with mpmath.workdps(60):
        square = mpmath.mpf(eta) ** 2
        exact = ((1 + square) ** layers - 1, square**layers)
    for found, wanted in zip(surrogate.both(eta, layers), exact, strict=True):
        assert found == pytest.approx(float(wanted), rel=1e-12)


@pytest.mark.parametrize("x", [-2.0, 0.0, 0.1, 1.5])
def test_widths_of_trust_regions(x: float) -> None:
    assert regions.width(x, 1) == pytest.approx(x * x, rel=1e-14)
    assert regions.width(x, 7) == pytest.approx((1 + x * x / 7) ** 7 - 1, rel=1e-12)
    assert regions.width(x, 10**4) == pytest.approx(math.expm1(x * x), rel=1e-2)


def test_transmission_of_relu() -> None:
    assert transmission.transmission(np.array([[3.0, -4.0], [1.0, 1.0]])).tolist() == [0.6, 1.0]
    assert np.isnan(transmission.transmission(np.zeros((1, 3)))).all()


def test_transmission_of_normal_vectors(made: dict[str, Any]) -> None:
    """Near 1/sqrt(2) in high dimension, not 1/2: E|relu x|^2 = |x|^2 / 2."""
    found = made["author-response/transmission"]
    means = dict(zip(column(found, 0, "width"), column(found, 0, "mean"), strict=True))
    assert means[784] == pytest.approx(math.sqrt(0.5), abs=0.005)


def test_an_optimizer_has_one_colour(made: dict[str, Any]) -> None:
    """In every panel of Figure 4, ours and the authors'."""
    drawn = load(Path(made["fromage/figure-4"]["out"]) / "study.h5")
    assert len(drawn.panels) > 3
    found = {(line.label, line.group) for panel in drawn.panels for line in panel.lines}
    assert len(found) == len({name for name, _ in found}) == len({group for _, group in found}) == 3


def test_normalised_errors() -> None:
    grid = rates.normalised({1.0: math.inf, 0.1: 0.5, 0.01: 0.25})
    assert grid == {1.0: 0.0, 0.1: 0.5, 0.01: 1.0}


# --- the adversarial network --------------------------------------------------------------------


def work_of(made: dict[str, Any], name: str, **options: Any) -> Work:
    """The input of a study whose runs are finished, with some options changed."""
    found, out = recipe.load(name, "smoke"), Path(made[name]["out"])
    changed = replace(found, options={**found.options, **options})
    return Work(changed, runs(found, out, Options()), Options(), out=out)


def test_the_distance_is_that_of_the_images(made: dict[str, Any]) -> None:
    """The first images of either set next to those of the generator, by its parameters alone."""
    work = work_of(made, "fromage/table-1-gan")
    (run,), digits = work.runs, data.load("digits", standardise="symmetric")
    checkpoint = store.load(run.path / "checkpoint.h5")
    model = GAN(width=4, image_shape=(1, 8, 8))
    z = np.concatenate([model.noise(Random(0, "images", i), 1) for i in range(300)])
    images, _ = model.generate(checkpoint.params, checkpoint.buffers, z, np.arange(300) % 10)

    def features(x: Any) -> Any:
        x = x.reshape(300, 64)
        x = x - x.min(1, keepdims=True)
        top = x.max(1, keepdims=True)
        return x / np.where(top > 0, top, 1.0)  # one colour stays black

    for part, x in (("train", digits.x), ("test", digits.x_test)):
        expected = frechet.frechet(features(images), features(x[:300]))
        found = distances.distances(work, run)[f"{part}_distance"]
        assert found == pytest.approx(expected, rel=0.02)  # of bytes, not floats
        assert column(made["fromage/table-1-gan"], part == "test", "npdrt") == [found]


def test_features_of_pixels_are_means_of_squares() -> None:
    images = np.zeros((2, 3, 16, 16), np.uint8)
    images[1, 2, 2:4, :2] = [[255, 0], [51, 0]]
    found = distances.pixels(images)
    assert found.shape == (2, 192)
    assert np.flatnonzero(found).tolist() == [192 + 128 + 8]
    assert found.max() == pytest.approx(0.3)


def test_what_a_distance_needs(made: dict[str, Any], tmp_path: Path) -> None:
    """Weights that npdrt cannot download, enough images, and the option."""
    name = "fromage/table-1-gan"
    for distance, error, words in (
        ({"features": "inception", "images": 20}, Unavailable, "put .*6726825d.pth there"),
        ({"features": "pixels", "images": 1438}, Error, "digits: it has not 1,438 images"),
    ):
        work = work_of(made, name, distance=distance)
        with pytest.raises(error, match=words):
            distances.distances(work, work.runs[0])
    text = (recipe.RECIPES / f"{name}.toml").read_text()
    kept = [line for line in text.splitlines() if not line.startswith("distance =")]
    path = tmp_path / "mine.toml"
    path.write_text("\n".join(kept))
    with pytest.raises(FileRefused, match="a measure of the distance needs the option distance"):
        study_of(recipe.load(str(path), "smoke"), tmp_path / "out", Options())


def test_figure_5_starts_and_moves_as_the_first_version(made: dict[str, Any]) -> None:
    """Zero biases; the discriminator's Adam has four times the rate of the generator's."""
    work = work_of(made, "fromage-v1/figure-5")
    first, last = (
        store.load(work.runs[0].path / "snapshots" / f"step-00000{step}.h5").params
        for step in (0, 3)
    )
    moved = {}
    for network in ("generator", "discriminator"):
        block = f"{network}/blocks/00/conv1"
        assert not first[f"{block}/bias"].any()
        assert last[f"{block}/bias"].any()
        moved[network] = np.abs(last[f"{block}/weight"] - first[f"{block}/weight"]).max()
    assert moved["discriminator"] == pytest.approx(4 * moved["generator"], rel=0.2)
    rows = made["fromage-v1/figure-5"]["tables"][2]["rows"]
    assert [row[1] for row in rows] == ["generator", "discriminator"]
    for (_, network, _, *numbers), count in zip(rows, (27, 17), strict=True):
        own = [n for n, w in first.items() if n.startswith(network) and w.ndim > 1]
        ratios = [float(np.linalg.norm(last[n]) / np.linalg.norm(first[n])) for n in own]
        expected = [min(ratios), float(np.median(ratios)), max(ratios)]
        assert len(own) == count
        assert [float(n) for n in numbers] == pytest.approx(expected, abs=1e-4)


def test_figure_5_quotes_the_logs() -> None:
    """Every logged epoch has a snapshot at full scale."""
    found = recipe.load("fromage-v1/figure-5")
    steps = {epoch * 196 for rows in found.reference["fid"].values() for epoch, *_ in rows}
    assert steps | {0} == set(found.configs[0].snapshots)
    assert {c.optimizer for c in found.configs} == set(found.reference["fid"])


# --- the frame -------------------------------------------------------------------------------


HEAD = 'title = "t"\nsource = "s"\nstatement = "c"\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('study = "norm"\n[full]\n', "did you mean 'norms'"),
        ('study = "depth"\n[full]\n', "has no runs at scale full"),
        ('study = "surrogate"\n[options]\ndepth = [3]\n[full]\n', "did you mean 'depths'"),
        ('study = "surrogate"\n[options]\neta = [1]\n[full]\n', "needs depths, largest in"),
    ],
)
def test_studies_and_their_options_are_strict(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(HEAD + text)
    with pytest.raises(Error, match=message):
        study_of(recipe.load(str(path)), tmp_path / "out", Options())


def test_computed_arrays_are_kept(tmp_path: Path) -> None:
    """They are computed once for the same settings, and anew for others."""
    computed: list[int] = []

    def compute() -> dict[str, Any]:
        computed.append(len(computed))
        return {"n": len(computed), "x": np.array([0.1, math.nan])}

    path = tmp_path / "new" / "numbers.h5"
    for expected, settings in ((1, {"lr": 1.0}), (1, {"lr": 1.0}), (2, {"lr": 2.0})):
        found = kept(path, settings, compute)
        assert int(found["n"]) == expected
        np.testing.assert_array_equal(found["x"], [0.1, math.nan])
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(FileRefused, match=r"numbers\.h5"):
        kept(path, {"lr": 2.0}, compute)
    assert computed == [0, 1]


def test_runs_are_grouped_in_order() -> None:
    runs = [Run(Config(seed=seed, lr=lr), Path(), 0) for seed, lr in ((3, 0.1), (1, 0.2), (3, 0.3))]
    found = grouped(runs, lambda run: run.config.seed)
    assert list(found) == [3, 1]
    assert [run.setting("lr") for run in found[3]] == [0.1, 0.3]
    assert runs[0].setting("model_options.depth") is None


def test_a_signal_ends_a_study(tmp_path: Path) -> None:
    found = recipe.load("fromage/figure-4", "smoke")
    with pytest.raises(Stopped):
        study_of(found, tmp_path, Options(), stop=lambda: 2)
    assert not (tmp_path / "study.h5").exists()


def test_a_sweep_is_shown_and_drawn(made: dict[str, Any], tmp_path: Path) -> None:
    """Its directory stands for its study."""
    out = Path(made["fromage/figure-4"]["out"])
    shown = CliRunner().invoke(cli, ["show", str(out)])
    assert shown.output == CliRunner().invoke(cli, ["show", str(out / "study.h5")]).output
    picture = tmp_path / "picture.svg"
    drawn = CliRunner().invoke(cli, ["plot", str(out), "--output", str(picture)])
    assert (drawn.exit_code, picture.exists()) == (0, True)


def test_a_study_of_what_is_finished(made: dict[str, Any], tmp_path: Path) -> None:
    """--as-is makes no run, and says which are missing."""
    arguments = ["reproduce", "fromage/figure-4", "--scale", "smoke", "--as-is", "--json", "--out"]
    result = CliRunner().invoke(cli, [*arguments, str(tmp_path)])
    assert result.exit_code == 2
    assert "none of the 10 runs" in result.output
    whole = Path(made["fromage/figure-4"]["out"]) / "runs"
    kept = sorted(whole.iterdir())[:4]
    (tmp_path / "runs").mkdir()
    for run in kept:
        (tmp_path / "runs" / run.name).symlink_to(run)
    found = json.loads(CliRunner().invoke(cli, [*arguments, str(tmp_path)]).stdout)
    assert "6 of 10 runs are not finished" in found["notes"][-1]
    assert len(list((tmp_path / "runs").iterdir())) == 4


def test_a_finished_study_computes_nothing(made: dict[str, Any], monkeypatch: Any) -> None:
    """The same command again gives the same tables from what is there."""
    from npdrt.train.studies import slices, sweep

    for name in ("start", "go_on"):
        monkeypatch.setattr(sweep, name, None)
    monkeypatch.setattr(slices.Slicer, "slice", None)
    for name in ("fromage/figure-1", "fromage/figure-2"):
        again = reproduce(name, Path(made[name]["out"]))
        assert again["tables"] == made[name]["tables"]
