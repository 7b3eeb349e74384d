"""Runs that are used: evaluated, asked for predictions, opened in Python."""

from __future__ import annotations

import dataclasses
import inspect
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from click.testing import CliRunner

import npdrt
from npdrt import ops, store
from npdrt.cli import cli, common
from npdrt.data import Expected
from npdrt.data.scale import Channels, Scale
from npdrt.errors import Error, FileRefused
from npdrt.models import MLP
from npdrt.random import Random
from npdrt.train import Config, Summary, resume, train

RNG = np.random.default_rng(5)
X = (RNG.normal(size=(90, 6)) * 7 + 40).round(2)
Y = RNG.integers(0, 3, 90)
NEW = X[:25] * 1.5 - 3  # of another mean and deviation than X


def call(*words: object) -> str:
    """What `npdrt words` prints; it must succeed."""
    result = CliRunner().invoke(cli, [str(word) for word in words], prog_name="npdrt")
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(*words: object) -> tuple[int, str]:
    """Exit code and message of `npdrt words`."""
    result = CliRunner().invoke(cli, [str(word) for word in words], prog_name="npdrt")
    return result.exit_code, result.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data sets and runs of labels and of targets; tests leave them as they are."""
    folder = tmp_path_factory.mktemp("opened")
    np.savez(folder / "labels.npz", x=X, y=Y, x_test=X[:40] + 1, y_test=Y[:40])
    np.savez(folder / "targets.npz", x=X, y=np.stack([X[:, 0], X[:, 1] ** 2 / 50], 1))
    np.savez(folder / "new.npz", x=NEW)
    np.savez(folder / "known.npz", x=NEW, y=Y[:25])
    for name in ("labels", "targets"):
        config = Config(
            data=str(folder / f"{name}.npz"), epochs=2, model_options={"depth": 3, "width": 8}
        )
        summary = train(config, str(folder / name))
        (folder / f"{name}.json").write_text(json.dumps(dataclasses.asdict(summary)))
    return folder


def summary(folder: Path, name: str) -> Summary:
    return Summary(**json.loads((folder / f"{name}.json").read_text()))


def by_hand(run: Path, x: Any) -> Any:
    """The output of a perceptron for x, from the file alone and in float64."""
    mean, std = X.mean(), X.std()
    with h5py.File(run / "checkpoint.h5") as file:
        weights = [file[f"params/layers/{n:02}/weight"][...].astype("f8") for n in range(3)]
    h = (x - mean) / std
    for weight in weights[:-1]:
        h = np.maximum(h @ weight.T, 0)
    return h @ weights[-1].T


# --- predictions ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["labels", "targets"])
def test_predictions_are_those_of_the_arrays_in_the_file(folder: Path, name: str) -> None:
    """New examples are standardised by the run's data, not by their own mean."""
    run = npdrt.open_run(str(folder / name))
    found = run.predict(NEW)
    np.testing.assert_allclose(found, by_hand(folder / name, NEW), rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(run.predict(NEW.reshape(25, 2, 3)), found)
    np.testing.assert_array_equal(run.predictions(folder / "new.npz"), found)


def test_predictions_in_files(folder: Path, tmp_path: Path) -> None:
    logits = npdrt.open_run(folder / "labels").predict(NEW)
    words = ["predict", folder / "labels", "--data", folder / "new.npz", "--out"]
    assert call(*words, tmp_path / "y.npz") == f"{tmp_path / 'y.npz'}\n"
    with np.load(tmp_path / "y.npz") as file:
        assert sorted(file) == ["logits", "y"]
        np.testing.assert_array_equal(file["logits"], logits)
        np.testing.assert_array_equal(file["y"], logits.argmax(1))
    call(*words, tmp_path / "y.csv")
    head, *rows = (tmp_path / "y.csv").read_text().splitlines()
    assert head == "y,logits_0,logits_1,logits_2"
    table = np.array([list(map(float, row.split(","))) for row in rows])
    np.testing.assert_array_equal(table, np.c_[logits.argmax(1), logits])
    call("predict", folder / "targets", *words[2:], tmp_path / "targets.csv")
    assert (tmp_path / "targets.csv").read_text().startswith("y_0,y_1\n")
    call(*words[:2], "--data", folder / "labels.npz", "--part", "test", "--out", tmp_path / "t.npz")
    with np.load(tmp_path / "t.npz") as file:
        expected = npdrt.open_run(folder / "labels").predict(X[:40] + 1)
        np.testing.assert_array_equal(file["logits"], expected)


# --- evaluation -------------------------------------------------------------------------------


def test_evaluation_is_that_of_the_run(folder: Path) -> None:
    """The numbers are those of the run's summary, to the bit."""
    for name in ("labels", "targets"):
        run, said = npdrt.open_run(folder / name), summary(folder, name)
        for part in ("train", "test") if name == "labels" else ("train",):
            found = run.evaluate(part=part)
            assert found.loss == getattr(said, f"{part}_loss")
            assert found.accuracy == getattr(said, f"{part}_accuracy")
            assert found.perplexity is None


def test_evaluation_on_other_data(folder: Path) -> None:
    logits, labels = by_hand(folder / "labels", NEW), Y[:25]
    expected = np.zeros((3, 3), int)
    for label, prediction in zip(labels, logits.argmax(1), strict=True):
        expected[label, prediction] += 1
    shifted = logits - logits.max(1, keepdims=True)
    log_share = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    found = json.loads(call("eval", folder / "labels", "--data", folder / "known.npz", "--json"))
    assert found["confusion"] == expected.tolist()
    assert found["accuracy"] == np.trace(expected) / 25
    assert found["loss"] == pytest.approx(-log_share[np.arange(25), labels].mean(), rel=1e-4)
    assert (found["examples"], found["part"], found["data"]) == (25, "train", "known")
    text = call("eval", folder / "labels", "--data", folder / "known.npz")
    assert f"accuracy  {found['accuracy']:.6g}" in text
    rows = [list(map(int, line.split())) for line in text.splitlines()[-3:]]
    assert rows == [[label, *row] for label, row in enumerate(expected.tolist())]


def test_a_confusion_table_fits_the_terminal(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the table is wider, its largest numbers off the diagonal are listed."""
    monkeypatch.setattr(common, "terminal_width", lambda: 12)
    counts = npdrt.open_run(folder / "labels").evaluate().confusion
    lines = call("eval", folder / "labels").splitlines()
    rows = [tuple(map(int, line.split())) for line in lines[lines.index("") + 3 :]]
    assert sorted(n for _, _, n in rows) == sorted(
        counts[i, j] for i in range(3) for j in range(3) if i != j and counts[i, j]
    )
    assert all(counts[i, j] == n for i, j, n in rows)
    assert [n for _, _, n in rows] == sorted((n for _, _, n in rows), reverse=True)


def test_data_that_do_not_fit(folder: Path, tmp_path: Path) -> None:
    run = npdrt.open_run(folder / "labels")
    for x, says in {
        "a row": (X[0], "expected numbers of shape (examples, ...)"),
        "another size": (X[:, :5], "the run's examples have shape (6,); got (5,)"),
        "not finite": (np.where(X > 40, np.nan, X), "expected finite values"),
    }.values():
        with pytest.raises(Error) as error:
            run.predict(x)
        assert says in str(error.value)
    np.savez(tmp_path / "more.npz", x=NEW, y=np.arange(25))
    np.savez(tmp_path / "wide.npz", x=np.c_[NEW, NEW], y=Y[:25])
    for data, says in {
        "more.npz": "more: has labels up to 24; the run knows 0 to 2",
        "wide.npz": "the model has inputs=6, the data set has 12",
        folder / "targets.npz": "the run predicts labels, and its y are targets",
    }.items():
        code, message = refused("eval", folder / "labels", "--data", tmp_path / data)
        assert (code, says in message) == (2, True), message
    assert refused("eval", folder / "nowhere")[0] == 2
    assert refused("eval", folder)[0] == 2
    code, message = refused("eval", folder / "targets", "--part", "test")
    assert (code, message) == (2, "Error: targets has no test set; use one of train\n")
    code, message = refused(
        "predict", folder / "labels", "--data", folder / "known.npz", "--out", tmp_path / "y.txt"
    )
    assert (code, "end the name in .npz or .csv" in message) == (2, True)


def test_text(tmp_path: Path) -> None:
    """A run of text has a perplexity; other words are other tokens, and are refused."""
    small = {"width": 8, "heads": 2, "hidden": 8, "layers": 1}
    config = Config(model="transformer", data="sample-text", model_options=small, epochs=1, lr=0.01)
    said = train(config, tmp_path / "text")
    found = npdrt.open_run(tmp_path / "text").evaluate()
    assert (found.loss, found.perplexity) == (said.test_loss, said.test_perplexity)
    assert found.confusion is None
    (tmp_path / "other").mkdir()
    for part in ("train", "valid", "test"):
        (tmp_path / "other" / f"{part}.txt").write_text("two words\n" * 100)
    code, message = refused("eval", tmp_path / "text", "--data", f"text:{tmp_path / 'other'}")
    assert (code, "its words are not those of the run's data" in message) == (2, True)
    code, message = refused(
        "predict", tmp_path / "text", "--data", "sample-text", "--out", tmp_path / "y.npz"
    )
    assert (code, "use npdrt eval" in message) == (2, True)
    tokens = np.arange(12).reshape(6, 2)
    assert npdrt.open_run(tmp_path / "text").predict(tokens).shape[:2] == (6, 2)


def test_two_networks_are_evaluated_but_predict_nothing(tmp_path: Path) -> None:
    config = Config(model="gan", model_options={"width": 4}, epochs=0, lr=0.01)
    train(config, tmp_path / "gan")
    found = npdrt.open_run(tmp_path / "gan").evaluate(part="test")
    assert found.confusion is None
    assert 0 <= (found.accuracy or 0) <= 1
    with pytest.raises(Error, match=r"gan makes images; use npdrt sample"):
        npdrt.open_run(tmp_path / "gan").predict(np.zeros((2, 64)))


# --- the standardisation in the checkpoint ----------------------------------------------------


@pytest.mark.parametrize(
    "scale",
    [
        Scale(),
        Scale(16.0, 0.1, 1 / 3),
        Channels((Scale(255.0, 0.1, 0.2), Scale(255.0, 0.3, 1e-7))),
    ],
)
def test_the_form_of_the_data_survives_json(scale: Scale | Channels) -> None:
    expected = Expected((2, 4, 4), 5, 5, (2, 4, 4), None, scale)
    kept = json.loads(json.dumps(expected.as_dict()))
    assert Expected.from_dict(kept, "file") == expected
    with pytest.raises(FileRefused, match=r"file: .*\$\.scale\.std"):
        Expected.from_dict({**kept, "scale": {**kept["scale"], "std": 0.0}}, "file")


def test_checkpoints_of_an_older_npdrt(folder: Path, tmp_path: Path) -> None:
    """They lack the standardisation; it comes from the run's data, which must be there."""
    train(Config(data=str(folder / "labels.npz"), epochs=1), tmp_path / "old")
    file = tmp_path / "old" / "checkpoint.h5"
    before = npdrt.open_run(tmp_path / "old").predict(NEW)
    _without_the_form(file)
    np.testing.assert_array_equal(npdrt.open_run(tmp_path / "old").predict(NEW), before)
    _without_the_form(file, data=str(tmp_path / "gone.npz"))
    with pytest.raises(Error, match=r"lacks the standardisation, for which .*gone.npz does not ex"):
        npdrt.open_run(tmp_path / "old").predict(NEW)


def _without_the_form(file: Path, **settings: Any) -> None:
    kept = npdrt.load(file)
    meta = {name: value for name, value in kept.meta.items() if name != "data"}
    meta["config"] = {**meta["config"], **settings}
    store.save(file, kept.params, buffers=kept.buffers, state=kept.state, meta=meta)


# --- in Python --------------------------------------------------------------------------------


def test_what_an_opened_run_has(folder: Path) -> None:
    run, kept = npdrt.open_run(folder / "labels"), npdrt.load(folder / "labels" / "checkpoint.h5")
    assert run.model == MLP(depth=3, width=8, inputs=6, outputs=3)
    assert run.config.epochs == 2
    assert list(run.params) == list(kept.params)
    assert all(np.array_equal(run.params[name], kept.params[name]) for name in run.params)
    assert list(run.history["epoch"]) == [1, 2]
    assert run.history["test_loss"][1] == summary(folder, "labels").test_loss
    assert np.isnan(npdrt.open_run(folder / "targets").history["test_loss"]).all()
    assert repr(run).endswith("labels.npz, fromage lr 0.01, step 6 of 6")
    with pytest.raises(Error, match=r"labels is a directory; npdrt.open_run opens a run"):
        npdrt.load(folder / "labels")


def test_resuming_an_opened_run(folder: Path, tmp_path: Path) -> None:
    config = Config(data=str(folder / "labels.npz"), epochs=2, schedule="constant")
    train(config, tmp_path / "whole")
    steps = iter([0, 0, 15])
    train(config, tmp_path / "parts", stop=lambda: next(steps))
    run = npdrt.open_run(tmp_path / "parts")
    assert run.checkpoint.meta["progress"]["step"] == 3
    again, whole = run.resume(), npdrt.open_run(tmp_path / "whole")
    assert all(np.array_equal(again.params[n], w) for n, w in whole.params.items())
    assert len(again.resume(epochs=3).history["epoch"]) == 3


# --- models of the user -----------------------------------------------------------------------

SOURCE = """
from dataclasses import dataclass
from npdrt import ops
from npdrt.random import Random

@dataclass(frozen=True)
class Flat:
    inputs: int
    outputs: int
    def init(self, seed=0, device="cpu", dtype="float32"):
        shape = (self.outputs, self.inputs)
        return {"w": Random(seed, "init").of("w").normal(shape, 0.1).astype(dtype)}
    def __call__(self, params, x):
        return ops.linear(x, params["w"])
"""


@dataclass(frozen=True)
class Flat:
    """A model that is given as a class."""

    inputs: int
    outputs: int

    def init(self, seed: int = 0, device: Any = "cpu", dtype: str = "float32") -> Any:
        shape = (self.outputs, self.inputs)
        return {"w": Random(seed, "init").of("w").normal(shape, 0.1).astype(dtype)}

    def __call__(self, params: Any, x: Any) -> Any:
        return ops.linear(x, params["w"])


def test_a_model_that_is_a_class(folder: Path, tmp_path: Path) -> None:
    """It is trained, opened and resumed with the class, and never without."""
    given: Any = Flat
    config = Config(model=given, data=str(folder / "labels.npz"), epochs=1, schedule="constant")
    assert config.as_dict()["model"] == f"class:{__name__}.Flat"
    train(config, tmp_path / "run")
    with pytest.raises(Error, match=r"is a class, .*\.Flat, that was given in Python; give it ag"):
        npdrt.open_run(tmp_path / "run")
    run = npdrt.open_run(tmp_path / "run", model=Flat)
    scaled = (NEW - X.mean()) / X.std()
    np.testing.assert_allclose(run.predict(NEW), scaled @ run.params["w"].T, rtol=1e-4, atol=1e-5)
    assert len(run.resume(epochs=2).history["epoch"]) == 2
    assert resume(tmp_path / "run", model=Flat, epochs=2).step == 6
    for other, says in {MLP: "the run's model is class:", _changed(): "has changed since"}.items():
        with pytest.raises(Error, match=says):
            npdrt.open_run(tmp_path / "run", model=other)
    with pytest.raises(Error, match=r"npdrt's own mlp; leave out model=Flat"):
        npdrt.open_run(folder / "labels", model=Flat)


def _changed() -> type:
    """A class of the same name with another forward pass, which fails."""

    @dataclass(frozen=True)
    class Flat:
        """Another."""

        inputs: int
        outputs: int

        def init(self, seed: int = 0, device: Any = "cpu", dtype: str = "float32") -> Any:
            return {"w": np.ones((2, 2), "f4")}

        def __call__(self, params: Any, x: Any) -> Any:
            raise ValueError("no")

    return Flat


def test_a_model_in_a_file(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "flat.py"
    file.write_text(SOURCE)
    config = Config(model=f"{file}:Flat", data=str(folder / "labels.npz"), epochs=1)
    train(config, tmp_path / "run")
    code, message = refused("eval", tmp_path / "run")
    assert (code, f"--code {file}" in message) == (2, True)
    call("eval", tmp_path / "run", "--code", file)
    by_file = npdrt.open_run(tmp_path / "run", code=[str(file)]).predict(NEW)
    by_class = npdrt.open_run(tmp_path / "run", model=_imported(file)).predict(NEW)
    np.testing.assert_array_equal(by_file, by_class)
    with pytest.raises(Error, match=r"flat.py:Flat has changed since"):
        npdrt.open_run(tmp_path / "run", model=Flat)


def _imported(file: Path) -> type:
    space: dict[str, Any] = {"__name__": "flat"}
    exec(compile(file.read_text(), str(file), "exec", dont_inherit=True), space)
    found: type = space["Flat"]
    return found


def test_a_failing_class_is_named_with_its_line(folder: Path, tmp_path: Path) -> None:
    given: Any = _changed()
    config = Config(model=given, data=str(folder / "labels.npz"), epochs=1)
    line = inspect.getsourcelines(given.__call__)[1] + 1
    with pytest.raises(Error, match=rf"Flat failed: ValueError: no \(.*opened.py, line {line}\)"):
        train(config, tmp_path / "run")
