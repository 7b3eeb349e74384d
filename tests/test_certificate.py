"""Certificates of portable runs: what they depend on, and repetitions that find what differs."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from npdrt import compute, elementary, store
from npdrt.cli import cli
from npdrt.errors import Error
from npdrt.train import Config, resume, train
from npdrt.train.certificate import NO_BITS, certificate, published, verify

CONFIG = Config(
    model="mlp", model_options={"depth": 3, "width": 8}, lr=0.01, epochs=3, batch_size=500,
    arithmetic="portable",
)  # fmt: skip
STEPS = 3  # of an epoch


def run_of(folder: Path, config: Config = CONFIG, **more: Any) -> Path:
    train(dataclasses.replace(config, **more), folder / "run")
    return folder / "run"


def stopped_after(steps: int, out: Path, config: Config = CONFIG) -> Path:
    asked = iter([0] * (steps - 1) + [15])
    train(config, out, stop=lambda: next(asked))
    return out


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_of(tmp_path_factory.mktemp("made"))


def npdrt(*words: object) -> Any:
    return CliRunner().invoke(cli, [str(word) for word in words])


# --- the certificate --------------------------------------------------------------------------


@pytest.mark.parametrize("change", [{"eager": True}, {"log_every": 1, "trace_every": 2},
                                    {"checkpoint_every": 1, "snapshots": (2,)}])  # fmt: skip
def test_the_digest_leaves_out_how_a_run_is_made(made: Path, tmp_path: Path, change: Any) -> None:
    assert certificate(run_of(tmp_path, **change)) == certificate(made)


def test_the_digest_of_a_resumed_run_is_the_same(made: Path, tmp_path: Path) -> None:
    out = stopped_after(4, tmp_path / "run")
    assert certificate(out)["digest"] != certificate(made)["digest"]
    resume(out)
    assert certificate(out) == certificate(made)


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"lr": 0.02}, {"arithmetic": "fast"}, {"label_smoothing": 0.1}]
)
def test_the_digest_covers_every_setting_with_bits(made: Path, tmp_path: Path, change: Any) -> None:
    assert certificate(run_of(tmp_path, **change))["digest"] != certificate(made)["digest"]


def test_settings_without_bits_are_settings() -> None:
    assert {field.name for field in dataclasses.fields(Config)} >= NO_BITS


def test_the_digest_covers_what_differs_from_the_defaults(made: Path) -> None:
    """So it is the same in an npdrt with more settings."""
    assert certificate(made)["settings"] == {
        "model_options": {"depth": 3, "width": 8, "inputs": 64, "outputs": 10},
        "lr": 0.01, "epochs": 3, "batch_size": 500,
        "arithmetic": "portable",
    }  # fmt: skip


def test_the_digest_covers_losses_and_arrays(made: Path) -> None:
    found = certificate(made)
    assert len(found["losses"]) == 3
    assert {"train_loss", "test_loss"} == found["losses"][0].keys()
    checkpoint = store.load(made / "checkpoint.h5")
    assert len(found["arrays"]) == len(checkpoint.params) + len(checkpoint.state)


def test_the_command_prints_the_digest(made: Path) -> None:
    assert npdrt("show", made, "--digest").stdout == certificate(made)["digest"] + "\n"
    assert json.loads(npdrt("show", made, "--digest", "--json").stdout) == certificate(made)


def test_a_checkpoint_of_no_run_has_no_certificate(tmp_path: Path) -> None:
    store.save(tmp_path / "checkpoint.h5", {"w": np.ones(2)})
    found = npdrt("show", tmp_path, "--digest")
    assert found.exit_code == 3
    assert "no training run made it" in found.stderr


# --- repetitions ------------------------------------------------------------------------------


def test_a_repetition_has_the_same_bits(made: Path) -> None:
    found = verify(made)
    assert found.difference is None
    assert (found.step, found.epoch, found.digest) == (9, 3, certificate(made)["digest"])


@pytest.mark.parametrize("epochs", [0, 1, 9])
def test_the_first_epochs_alone(made: Path, epochs: int) -> None:
    found = verify(made, epochs=epochs)
    last = min(epochs, 3)
    assert (found.step, found.epoch, found.difference) == (last * STEPS, last, None)
    assert (found.digest is None) == (last < 3)


def test_another_exponential_is_found_in_the_first_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(elementary, "_COTH", (0.0, *elementary._COTH[1:-1], 0.1667))
        run = run_of(tmp_path)
    found = npdrt("verify", run, "-q", "--json")
    assert found.exit_code == 1
    told = json.loads(found.stdout)
    assert (told["same"], told["step"], told["digest"]) == (False, 0, None)
    assert (told["difference"]["epoch"], told["difference"]["step"]) == (1, STEPS)


def test_one_bit_of_a_checkpoint_is_found_with_its_element(tmp_path: Path) -> None:
    run = stopped_after(4, tmp_path / "run")  # within an epoch
    held = store.load(run / "checkpoint.h5")
    weight = held.params["layers/01/weight"].copy()
    before = float(weight[2, 3])
    weight[2, 3] = np.nextafter(weight[2, 3], np.float32(1))
    store.save(
        run / "checkpoint.h5", held.params | {"layers/01/weight": weight}, buffers=held.buffers,
        state=held.state, meta=held.meta,
    )  # fmt: skip
    found = npdrt("verify", run, "-q")
    assert found.exit_code == 1
    assert "the same bits up to step 3, epoch 1" in found.stdout
    where = f"params/layers/01/weight; first at element [2, 3]: {float(weight[2, 3])!r} in the run"
    assert f"{where}, {before!r} here" in found.stdout


def test_a_loss_alone_is_found(tmp_path: Path) -> None:
    run = run_of(tmp_path)
    text = (run / "log.jsonl").read_text()
    (run / "log.jsonl").write_text(re.sub(r'"test_loss": (\d)', r'"test_loss": 1\1', text))
    found = verify(run).difference
    assert found is not None
    assert (found.name, found.names, found.epoch, found.element) == ("test_loss", 1, 1, None)


def test_a_run_in_fast_arithmetic_is_refused(tmp_path: Path) -> None:
    found = npdrt("verify", run_of(tmp_path, arithmetic="fast"))
    assert found.exit_code == 2
    assert "--arithmetic portable" in found.stderr


def test_another_version_is_refused(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compute, "VERSION", 99)
    with pytest.raises(Error, match="made in version 1 of portable arithmetic, and this npdrt has"):
        verify(made)


def test_another_data_set_is_refused(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(20, 4)).astype("float32"), np.arange(20) % 2
    np.savez(tmp_path / "d.npz", x=x, y=y)
    run = run_of(tmp_path, data=str(tmp_path / "d.npz"), batch_size=10)
    assert verify(run).difference is None
    np.savez(tmp_path / "d.npz", x=x + 1, y=y)
    with pytest.raises(Error, match="has changed"):
        verify(run)


def test_an_own_rule_needs_its_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("def step(w, g, state, *, lr):\n    return w - lr * g, state\n")
    run = run_of(tmp_path, optimizer=f"{file}:step")
    assert npdrt("verify", run).exit_code == 2
    assert npdrt("verify", run, "--code", file).exit_code == 0


def test_it_can_be_stopped(made: Path) -> None:
    found = verify(made, stop=lambda: 2)
    assert (found.stopped, found.digest, found.difference) == (2, None, None)


def test_the_runs_that_come_with_npdrt() -> None:
    """The machine, its BLAS and the number of threads do not matter."""
    found = npdrt("verify", "-q", "--json")
    told = json.loads(found.stdout)
    assert [row["name"] for row in told["runs"] if not row["same"]] == []
    assert [row["name"] for row in told["runs"]] == list(published())
    assert found.exit_code == 0
