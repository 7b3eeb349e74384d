"""What users of other command lines expect: defaults in the help, settings in files, other names of
options, quoted paths, short reprs."""

from __future__ import annotations

import math
import re
import shlex
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import hypothesis
import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

import npdrt
from npdrt import ops, value_and_grad
from npdrt.cli import COMMANDS, cli
from npdrt.train import Config, train
from npdrt.train.settings_file import as_toml, merged


def call(*words: object, code: int = 0) -> str:
    """What `npdrt words` prints."""
    result = CliRunner().invoke(cli, [str(word) for word in words], prog_name="npdrt")
    assert result.exit_code == code, result.output
    return result.stdout if code == 0 else result.stderr


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A small data set in the current folder."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    np.savez("blobs.npz", x=rng.normal(size=(40, 4)), y=rng.integers(0, 3, 40))
    return "blobs.npz"


# --- help -------------------------------------------------------------------------------------


def options() -> Iterator[tuple[str, click.Option]]:
    """Every option with the words that call its command."""
    for name in COMMANDS:
        command = cli.get_command(click.Context(cli), name)
        inner = command.commands.items() if isinstance(command, click.Group) else [("", command)]
        for word, one in inner:
            assert one is not None
            found = (p for p in one.params if isinstance(p, click.Option))
            yield from ((f"{name} {word}".strip(), option) for option in found)


def test_every_default_is_in_the_help() -> None:
    """Apart from options that must be given, and switches, which are off."""
    for command, option in options():
        switch = option.is_flag and not option.secondary_opts
        shown = option.show_default or "[default: " in (option.help or "")
        assert switch or option.required or shown, (command, option.opts)


# --- other names ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("other", "usual"),
    [
        ("--learning-rate 0.5", "--lr 0.5"),
        ("--batch 8", "--batch-size 8"),
        ("--optimiser adam --betas 0.8,0.9", "--optimizer adam --betas 0.8,0.9"),
        ("--normalization spectral", "--normalisation spectral"),
        ("--no-standardize", "--no-standardise"),
        ("--optimizer rmsprop --centred", "--optimizer rmsprop --centered"),
    ],
)
def test_options_have_two_names(other: str, usual: str, data: str) -> None:
    words = ["train", "--data", data, "--epochs", "0", "-q", "--out"]
    for number, options in enumerate((other, usual)):
        call(*words, f"run{number}", *options.split())
    first, second = (npdrt.load(f"run{n}/checkpoint.h5").meta["config"] for n in (0, 1))
    assert first == second
    assert first != npdrt.train.Config(data=data, epochs=0).as_dict()


# --- settings in files ------------------------------------------------------------------------


def test_a_run_from_its_own_settings_has_the_same_bits(data: str) -> None:
    words = ["--optimizer", "adam", "--betas", "0.8,0.9", "--group", "*/00/*:lr=0.1", "--depth", 3]
    call("train", "--data", data, *words, "--epochs", 2, "--snapshot", 1, "--out", "first", "-q")
    Path("run.toml").write_text(call("show", "first", "--as-toml"))
    call("train", "run.toml", "--out", "again", "-q")
    first, again = (npdrt.load(f"{name}/checkpoint.h5") for name in ("first", "again"))
    assert first.meta["config"] == again.meta["config"]
    assert all(np.array_equal(w, again.params[n]) for n, w in first.params.items())
    assert npdrt.load("again/snapshots/step-000001.h5").params.keys() == first.params.keys()


def test_options_go_before_the_file(data: str) -> None:
    Path("c.toml").write_text(
        'model = "mlp"\noptimizer = "adam"\nepochs = 1\ndata = "blobs.npz"\n'
        "[model_options]\nwidth = 7\ndepth = 3\n[optimizer_options]\neps = 0.5\n"
    )
    call("train", "c.toml", "--depth", 2, "--epochs", 0, "--out", "a", "-q")
    config = npdrt.open_run("a").config
    assert (config.epochs, config.optimizer, config.optimizer_options) == (0, "adam", {"eps": 0.5})
    assert [config.model_options[name] for name in ("depth", "width")] == [2, 7]
    call("train", "c.toml", "--optimizer", "sgd", "--epochs", 0, "--out", "b", "-q")
    assert npdrt.open_run("b").config.optimizer_options == {}


@pytest.mark.parametrize(
    ("text", "says", "code"),
    [
        ("epoch = 1", "c.toml: unknown setting 'epoch'; did you mean 'epochs'?", 2),
        ("epochs = 'one'", "c.toml: a setting is of the wrong type", 3),
        ("epochs = ", "c.toml is not TOML", 3),
        ("model = 'm.py:M'", "repeat it: --code m.py", 2),
        ("[model_options]\nwidht = 2", "unknown option of model mlp: 'widht'", 2),
    ],
)
def test_files_with_mistakes(text: str, says: str, code: int, data: str) -> None:
    Path("c.toml").write_text(text)
    assert says in call("train", "c.toml", "--data", data, "--out", "run", code=code)
    assert not Path("run").exists()


def test_what_has_no_settings(data: str) -> None:
    npdrt.save("own.h5", {"w": np.ones(2)})
    assert "expected the checkpoint of a run" in call("show", "own.h5", "--as-toml", code=3)
    assert "does not exist" in call("show", "nowhere", "--as-toml", code=2)


TEXTS = st.text(st.sampled_from("aZ0_-. '\"\\[]=#\n\t\0\x1f\x7f\x85é€\U0001f600"), max_size=6)
VALUES = st.recursive(
    st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXTS,
    lambda inner: (
        st.lists(inner, min_size=1, max_size=3)
        | st.dictionaries(TEXTS, inner, min_size=1, max_size=3)
    ),
    max_leaves=5,
)


@hypothesis.settings(deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
@given(st.dictionaries(TEXTS, VALUES, max_size=4))
def test_settings_survive_toml(settings: dict[str, Any]) -> None:
    assert tomllib.loads(as_toml({**settings, "none": None})) == settings


def test_merged() -> None:
    file = {"model": "mlp", "model_options": {"depth": 3, "width": 2}, "lr": 1.0}
    assert merged(file, {"model_options": {"depth": 4}})["model_options"] == {
        "depth": 4,
        "width": 2,
    }
    assert merged(file, {"model": "mlp"})["model_options"] == {"depth": 3, "width": 2}
    assert merged(file, {"model": "gan", "lr": 2.0}) == {"model": "gan", "lr": 2.0}


# --- what a command says ----------------------------------------------------------------------


def test_paths_of_the_next_command_are_quoted(data: str) -> None:
    call("train", "--data", data, "--epochs", 1, "--out", "a run", "-q")
    said = call("train", "--data", data, "--epochs", 1, "--out", "another run", "-q")
    (line,) = re.findall("^next: npdrt (.+)$", said, re.M)
    assert shlex.split(line) == ["show", "another run"]
    assert "history: npdrt show 'another run/trace.h5'" in call(*shlex.split(line))


# --- in Python --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda h: h.T, r"no \.T; write npdrt\.ops\.transpose\(x\)"),
        (lambda h: h.mean(), r"no \.mean; write npdrt\.ops\.mean\(x\)"),
        (lambda h: h.reshape(-1), r"no \.reshape; write npdrt\.ops\.reshape\(x, shape="),
        (lambda h: h.shpae, r"no \.shpae; compute with npdrt\.ops"),
        (lambda h: ops.reshape(h, (-1,)), r"call it as reshape\(x, \*, shape\)"),
    ],
)
def test_what_an_array_has_names_the_call(wrong: Callable[[Any], Any], says: str) -> None:
    with pytest.raises((AttributeError, npdrt.Error), match=says):
        value_and_grad(lambda p: wrong(p["x"]))({"x": np.ones((2, 3))})


def test_the_calls_that_are_named_exist() -> None:
    params = {"x": np.arange(6.0).reshape(2, 3)}

    def loss(p: Any) -> Any:
        x = p["x"]
        flat = ops.reshape(ops.transpose(x), shape=(-1,))
        return ops.mean(flat) * math.prod(x.shape)

    value, grads = value_and_grad(loss)(params)
    assert value.item() == 15.0
    np.testing.assert_array_equal(grads["x"], np.ones((2, 3)))


def test_reprs_are_short(data: str) -> None:
    model = npdrt.models.MLP(depth=2, width=3, inputs=4, outputs=2)
    params = model.init()

    def step(params: Any, x: Any) -> Any:
        return model(params, x)

    program = npdrt.record(step, params, np.ones((5, 4), "f4"))
    train(Config(data=data, epochs=1), "run")
    shown = {
        repr(npdrt.optim.adam(lr=0.1)): "Optimizer(adam: lr=0.1, betas=(0.9, 0.999), eps=1e-08",
        repr(program): f"Program(params, x): {len(program.calls)} array calls, 3 inputs, 1 outputs",
        repr(
            npdrt.load("run/checkpoint.h5")
        ): "Checkpoint(2 params, 1 state; 896 parameter values;",
    }
    for text, begins in shown.items():
        assert text.startswith(begins), text
        assert len(text) < 300
