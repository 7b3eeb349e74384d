"""Slices along the layerwise gradient: against autograd, resumable, and the command."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import autograd
import autograd.numpy as anp
import h5py
import numpy as np
import pytest
from click.testing import CliRunner

from npdrt import data, store
from npdrt.cli import cli
from npdrt.errors import Error, FileRefused
from npdrt.store import container
from npdrt.train import Config, train
from npdrt.train.loop import Reporter
from npdrt.train.studies import slices as machinery
from npdrt.train.studies.figure_of_file import load
from npdrt.train.studies.slices import slices

ETA = (0.0, 0.004, 0.02, 0.1)
OPTIONS = {"depth": 3, "width": 16, "bias": True, "nonlinearity": "tanh"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained perceptron in float64 with snapshots at its start, middle and end."""
    out = tmp_path_factory.mktemp("perturb") / "run"
    train(Config(model_options=OPTIONS, dtype="float64", epochs=2, snapshots=(0, 7, 90)), out)
    return out


def loss(params: Any, x: Any, y: Any) -> Any:
    """The perceptron and its mean cross-entropy, written with autograd's NumPy."""
    h = x
    for layer in range(3):
        z = h @ params[f"layers/{layer:02d}/weight"].T + params[f"layers/{layer:02d}/bias"]
        h = anp.tanh(z) if layer < 2 else z
    shifted = h - anp.max(h, axis=1, keepdims=True)
    logs = shifted - anp.log(anp.sum(anp.exp(shifted), axis=1, keepdims=True))
    return -anp.mean(logs[np.arange(len(y)), y])


def expected(params: Any, x: Any, y: Any) -> dict[str, list[Any]]:
    """Figure 1's slice from its definition, by autograd."""
    gradient = autograd.grad(loss)
    g = gradient(params, x, y)
    found: dict[str, list[Any]] = {"loss": [], "change": [], "distance": []}
    length = np.sqrt(sum(np.sum(w**2) for w in params.values()))
    farthest = 0.0
    for eta in ETA:
        moved = {
            n: w - eta * g[n] * np.linalg.norm(w) / np.linalg.norm(g[n]) for n, w in params.items()
        }
        there = gradient(moved, x, y)
        changes = [np.linalg.norm(there[n] - g[n]) for n in params]
        farthest = max(farthest, np.linalg.norm(changes))
        found["loss"].append(loss(moved, x, y))
        found["change"].append(
            [c / np.linalg.norm(g[n]) for c, n in zip(changes, params, strict=True)]
        )
        found["distance"].append(farthest * eta * length)
    return found


@pytest.mark.parametrize("examples", [None, 700])
def test_a_slice_is_the_definition(run: Path, examples: int | None, tmp_path: Path) -> None:
    found = slices(run, eta=ETA, examples=examples, name=f"{examples}.h5")
    digits = data.load("digits")
    x, y = (part[:examples] for part in (digits.x.astype(np.float64), digits.y))
    assert found.step.tolist() == [0, 7, 90]
    for i, step in enumerate(found.step):
        params = store.load(run / "snapshots" / f"step-{step:06d}.h5").params
        wanted = expected(params, x, y)
        np.testing.assert_allclose(found.loss[i], wanted["loss"], rtol=1e-12)
        np.testing.assert_allclose(
            found.gradient_change[i], wanted["change"], rtol=1e-8, atol=1e-12
        )
        np.testing.assert_allclose(
            found.steepest_descent_distance[i], wanted["distance"], rtol=1e-8, atol=1e-15
        )


def test_the_distance_keeps_the_farthest_on_the_way() -> None:
    """The gradient may come nearer again; the maximum over the way does not."""
    changes = [[0.0, 0.0], [3.0, 4.0], [0.0, 1.0], [8.0, 6.0]]
    assert machinery.farthest(changes).tolist() == [0.0, 5.0, 5.0, 10.0]


def test_the_slope_is_the_derivative_along_the_slice(run: Path) -> None:
    found = slices(run, eta=(0.0, 1e-6), steps=[7], name="slope.h5")
    assert (found.loss[0, 1] - found.loss[0, 0]) / 1e-6 == pytest.approx(found.slope[0], rel=1e-4)


def test_the_bound_of_the_author_response_holds(run: Path) -> None:
    found = slices(run, eta=np.linspace(0, 0.3, 40).tolist(), name="bound.h5")
    assert (found.loss <= found.bound() + 1e-12).all()
    assert (found.bound()[:, 1:] > found.loss[:, 1:]).any()


def test_best_is_the_lowest_loss(run: Path) -> None:
    found = slices(run, eta=ETA, name="best.h5")
    for i, best in enumerate(found.best()):
        assert found.loss[i, ETA.index(best)] == found.loss[i].min()


def test_a_snapshot_beyond_the_run_is_warned_of(tmp_path: Path) -> None:
    warned: list[str] = []

    class Listening(Reporter):
        def warning(self, text: str) -> None:
            warned.append(text)

    config = Config(model_options=OPTIONS, epochs=1, snapshots=(45, 46))
    train(config, tmp_path / "run", reporter=Listening())
    assert warned == ["no snapshot of step 46: the run has 45"]
    assert [path.name for path in (tmp_path / "run" / "snapshots").iterdir()] == ["step-000045.h5"]


def test_a_run_without_snapshots_is_sliced_at_its_end(tmp_path: Path) -> None:
    train(Config(model_options=OPTIONS, epochs=1), tmp_path / "run")
    found = slices(tmp_path / "run", eta=ETA)
    assert found.step.tolist() == [45]
    assert found.epoch.tolist() == [1.0]


def test_a_layer_without_gradient_stays(tmp_path: Path) -> None:
    """Zero weights stop every gradient but the last bias's."""
    train(Config(model_options=OPTIONS, epochs=0), tmp_path / "run")
    checkpoint = store.load(tmp_path / "run" / "checkpoint.h5")
    zero = {name: np.zeros_like(value) for name, value in checkpoint.params.items()}
    store.save(tmp_path / "run" / "checkpoint.h5", zero, meta=checkpoint.meta)
    found = slices(tmp_path / "run", eta=ETA)
    np.testing.assert_allclose(found.loss, np.log(10))
    assert np.isnan(found.gradient_change[0, :, 0]).all()


def test_stopped_slices_go_on(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal ends after the last whole snapshot; what is there is not computed again."""
    points: list[int] = []

    def stop() -> int:
        return 2 * (len(points) == 6)

    part = slices(run, eta=ETA, name="parts.h5", progress=lambda d, t: points.append(d), stop=stop)
    assert part.step.tolist() == [0]
    points.clear()
    slices(run, eta=ETA, name="parts.h5", progress=lambda done, total: points.append(total))
    assert points == [8] * 8
    whole = slices(run, eta=ETA, name="whole.h5")
    parts = machinery.read(run / "parts.h5")
    for name in machinery.DATASETS:
        np.testing.assert_array_equal(getattr(parts, name), getattr(whole, name))


def test_another_grid_begins_anew(run: Path) -> None:
    slices(run, eta=ETA, steps=[7], name="grid.h5")
    assert slices(run, eta=(0.0, 0.5), steps=[7], name="grid.h5").loss.shape == (1, 2)


def test_the_file_is_plain_hdf5(run: Path) -> None:
    found = slices(run, eta=ETA)
    with h5py.File(run / "slices.h5") as file:
        np.testing.assert_array_equal(file["loss"][:], found.loss)
        assert file["gradient_change"].shape == (3, 4, 6)


@pytest.mark.parametrize("eta", [(), (0.1,), (0.0, 0.2, 0.1), (0.0, 0.0)])
def test_a_grid_increases_from_zero(run: Path, eta: tuple[float, ...]) -> None:
    with pytest.raises(Error, match="eta must increase from 0"):
        slices(run, eta=eta)


def test_the_picture_is_that_of_the_arrays(run: Path) -> None:
    """slices.h5 holds no figure: the figure is made of its arrays, so it always fits them."""
    found = slices(run, eta=ETA, name="drawn.h5")
    loss, change = load(run / "drawn.h5").panels
    for i, epoch in enumerate(found.epoch):
        assert loss.lines[i].label == f"epoch {epoch:.3g}"
        np.testing.assert_array_equal(loss.lines[i].x, found.eta)
        np.testing.assert_array_equal(loss.lines[i].y, found.loss[i])
        np.testing.assert_array_equal(change.lines[i].y, found.gradient_change[i, :, 0])


@pytest.mark.parametrize(
    "spoil",
    [
        lambda arrays, meta: meta["settings"].pop("examples"),
        lambda arrays, meta: arrays.update(gradient_change=arrays["gradient_change"][:, :, :0]),
        lambda arrays, meta: arrays.update(loss=arrays["loss"][:, :1]),
        lambda arrays, meta: arrays.pop("slope"),
    ],
)
def test_slices_of_another_form_are_refused(run: Path, tmp_path: Path, spoil: Any) -> None:
    slices(run, eta=ETA, name="whole.h5")
    arrays, meta = container.read(run / "whole.h5")
    spoil(arrays, meta)
    container.write(tmp_path / "spoilt.h5", arrays, meta)
    with pytest.raises(FileRefused, match=r"spoilt\.h5"):
        load(tmp_path / "spoilt.h5")


def test_what_cannot_be_sliced(run: Path, tmp_path: Path) -> None:
    with pytest.raises(Error, match=r"no snapshot at step 5; it has \[0, 7, 90\]"):
        slices(run, steps=[5])
    with pytest.raises(Error, match="expected 1 to 1437"):
        slices(run, examples=2000)
    with pytest.raises(Error, match="none does not exist"):
        slices(tmp_path / "none")
    with pytest.raises(FileRefused, match="expected slices"):
        machinery.read(run / "trace.h5")


def test_the_command(run: Path) -> None:
    arguments = ["perturb", str(run), "--points", "4", "--largest", "0.03", "--step", "7"]
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 0, result.output
    heading, row = (line.split() for line in result.output.splitlines()[:2])
    assert heading[:2] == ["epoch", "loss"]
    assert "0.1556" in row[0]
    found = json.loads(CliRunner().invoke(cli, [*arguments, "--json"]).stdout)
    assert found["rows"][0]["loss at 0.03"] > 0
    assert CliRunner().invoke(cli, ["perturb", str(run / "nowhere")]).exit_code == 2


def test_a_signal_before_the_first_snapshot_is_done(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing to show yet: exit code 130, no traceback."""
    monkeypatch.setattr("npdrt.cli.common.signals", lambda **_: nullcontext(lambda: 2))
    result = CliRunner().invoke(cli, ["perturb", str(run), "--points", "6"])
    assert result.exit_code == 130
    assert isinstance(result.exception, SystemExit)
