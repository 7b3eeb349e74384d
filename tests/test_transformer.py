"""The transformer: counts, values and gradients beside PyTorch, dropout, clipping, training."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import backends
import numpy as np
import pytest
from click.testing import CliRunner

from npdrt import Error, check_gradients, data, ops, optim, record, store, value_and_grad
from npdrt.cli import cli
from npdrt.data import sample, text
from npdrt.errors import FileRefused
from npdrt.models import Transformer, weights
from npdrt.models.transformer import sinusoids
from npdrt.optim import norm
from npdrt.optim.clip import clipped
from npdrt.random import Random
from npdrt.store import log
from npdrt.train import Config, resume, train
from npdrt.train.config import build_model
from npdrt.train.loop import Reporter, Trainer
from npdrt.train.step import State, Task, make_step

TINY = {"width": 12, "heads": 3, "hidden": 20, "layers": 3, "identical_layers": False}
KINDS = {
    "post-norm": Transformer(50, **TINY),
    "pre-norm": Transformer(50, pre_norm=True, nonlinearity="gelu", **TINY),
    "tied": Transformer(50, tied=True, **TINY),
}
kinds = pytest.mark.parametrize("kind", KINDS)
SMALL = ("--width", "16", "--set", "hidden=16")


def count(model: Any) -> int:
    """The parameters of a model, from their shapes."""
    return sum(math.prod(shape) for shape in model.shapes().values())


def start(model: Any, dtype: str = "float64") -> Any:
    """Parameters that are all moved from where they start."""
    params = model.init(seed=0, dtype=dtype)
    return {n: v + Random(1, n).normal(v.shape, 0.1).astype(dtype) for n, v in params.items()}


def batch(model: Any, length: int = 7, streams: int = 4) -> tuple[Any, Any]:
    """Tokens and the tokens after them."""
    drawn = Random(0, "tokens").words((length + 1) * streams) % model.vocabulary
    tokens = drawn.astype(np.int64).reshape(length + 1, streams)
    return tokens[:-1], tokens[1:]


def loss_of(model: Any) -> Any:
    return lambda params, x, y: ops.softmax_cross_entropy(model(params, x), y)


# --- counts and names ------------------------------------------------------------------------


def test_parameter_counts() -> None:
    """The published count of the example's network at 33,278 words."""
    assert count(Transformer(33_278)) == 13_828_478
    assert count(Transformer(33_278, tied=True)) == 13_828_478 - 33_278 * 200
    assert count(Transformer(33_278, pre_norm=True)) == 13_828_478 + 400


@kinds
def test_init_makes_the_shapes(kind: str) -> None:
    model = KINDS[kind]
    params = model.init(seed=0)
    assert {name: value.shape for name, value in params.items()} == model.shapes()
    assert list(params) == list(model.shapes())
    again = model.init(seed=0)
    assert all(np.array_equal(again[name], params[name]) for name in params)
    other = model.init(seed=1)
    assert not np.array_equal(other["embedding/weight"], params["embedding/weight"])


def test_the_first_values_are_the_examples() -> None:
    """Bounds and zeros of PyTorch's modules, and layers that begin as copies of one."""
    model = Transformer(500)
    params = model.init(seed=0)
    limits = {
        "embedding/weight": 0.1,
        "decoder/weight": 0.1,
        "layers/00/attention/in/weight": math.sqrt(6 / 800),
        **{f"layers/00/{n}/weight": 1 / math.sqrt(200) for n in ("linear1", "linear2")},
        "layers/00/linear1/bias": 1 / math.sqrt(200),
        "layers/00/attention/out/weight": 1 / math.sqrt(200),
    }
    for name, limit in limits.items():
        assert 0.95 * limit < np.abs(params[name]).max() <= limit, name
    zero = {name for name, value in params.items() if not value.any()}
    assert zero == {
        "decoder/bias",
        *(f"layers/0{n}/attention/{part}/bias" for n in (0, 1) for part in ("in", "out")),
        *(f"layers/0{n}/norm{k}/bias" for n in (0, 1) for k in (1, 2)),
    }
    for name in params:
        if name.startswith("layers/01/"):
            assert np.array_equal(params[name], params[name.replace("01", "00", 1)])
    apart = dataclasses.replace(model, identical_layers=False).init(seed=0)
    assert not np.array_equal(apart["layers/00/linear1/weight"], apart["layers/01/linear1/weight"])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"heads": 3}, "width 200 cannot be cut into 3 heads"),
        ({"width": 7, "heads": 7}, "width must be even"),
        ({"layers": 0}, "layers must be at least 1"),
        ({"dropout": 1.0}, r"in \[0, 1\); got 1\.0"),
        ({"nonlinearity": "step"}, "unknown nonlinearity 'step'; use one of relu"),
    ],
)
def test_impossible_fields_are_refused(fields: Any, message: str) -> None:
    with pytest.raises(Error, match=message):
        Transformer(50, **fields)


def test_sequences_longer_than_the_positions_are_refused() -> None:
    model = Transformer(50, **TINY, positions=6)  # type: ignore[arg-type]
    params = model.init(seed=0)
    assert model(params, np.zeros((6, 2), np.int64)).shape == (6, 2, 50)
    with pytest.raises(Error, match=r"a length of 1 to 6, the positions; got shape \(7, 2\)"):
        model(params, np.zeros((7, 2), np.int64))
    with pytest.raises(Error, match=r"expected tokens \(length, batch\)"):
        model(params, np.zeros(7, np.int64))
    with pytest.raises(Error, match="expected integer tokens; got float64"):
        model(params, np.zeros((6, 2)))


# --- beside PyTorch --------------------------------------------------------------------------


def pytorch_twin(model: Transformer) -> Any:
    """The example's network in PyTorch, float64, without dropout."""
    torch = pytest.importorskip("torch")
    nn = torch.nn

    class Twin(nn.Module):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(
                model.width, model.heads, model.hidden, 0.0,
                activation=model.nonlinearity, norm_first=model.pre_norm,
            )  # fmt: skip
            last = nn.LayerNorm(model.width) if model.pre_norm else None
            self.transformer_encoder = nn.TransformerEncoder(
                layer, model.layers, norm=last, enable_nested_tensor=False
            )
            self.encoder = nn.Embedding(model.vocabulary, model.width)
            self.decoder = nn.Linear(model.width, model.vocabulary)
            if model.tied:
                self.decoder.weight = self.encoder.weight

        def forward(self, x: Any) -> Any:
            length = x.shape[0]
            positions = torch.tensor(sinusoids(length, model.width))[:, None]
            h = self.encoder(x) * math.sqrt(model.width) + positions
            mask = nn.Transformer.generate_square_subsequent_mask(length, dtype=torch.float64)
            return self.decoder(self.transformer_encoder(h, mask))

    return Twin().double()


@kinds
def test_values_and_gradients_are_pytorchs(kind: str) -> None:
    torch = pytest.importorskip("torch")
    model, (x, y) = KINDS[kind], batch(KINDS[kind])
    params, twin, names = start(model), pytorch_twin(model), model.pytorch_names()
    state = {names[n]: torch.tensor(v) for n, v in params.items()}
    twin.load_state_dict(state, strict=not model.tied)
    loss, grads = value_and_grad(loss_of(model))(params, x, y)
    output = twin(torch.tensor(x))
    theirs = torch.nn.functional.cross_entropy(output.reshape(-1, 50), torch.tensor(y).reshape(-1))
    theirs.backward()
    assert abs(loss - theirs.item()) < 1e-12
    assert np.abs(model(params, x) - output.detach().numpy()).max() < 1e-12
    parameters = dict(twin.named_parameters())
    largest = max(np.abs(g).max() for g in grads.values())
    for name, g in grads.items():
        error = np.abs(g - parameters[names[name]].grad.numpy()).max()
        assert error < 1e-9 * largest, name


def test_positions_are_the_examples() -> None:
    """The example's PositionalEncoding, in float64."""
    torch = pytest.importorskip("torch")
    position = torch.arange(0, 40, dtype=torch.float64).unsqueeze(1)
    rates = torch.exp(torch.arange(0, 10, 2, dtype=torch.float64) * (-math.log(10000.0) / 10))
    pe = torch.zeros(40, 10, dtype=torch.float64)
    pe[:, 0::2], pe[:, 1::2] = torch.sin(position * rates), torch.cos(position * rates)
    assert np.abs(sinusoids(40, 10) - pe.numpy()).max() < 1e-14


def test_pre_norm_gradients_by_the_complex_step() -> None:
    model = Transformer(9, 4, 1, 2, 6, pre_norm=True, nonlinearity="gelu")
    x, y = batch(model, 5, 2)
    assert check_gradients(loss_of(model), start(model), x, y).method == "complex step"


def test_no_word_sees_what_comes_after_it() -> None:
    model = KINDS["post-norm"]
    params, (x, _) = start(model), batch(model)
    other = x.copy()
    other[4:] = (other[4:] + 1) % 50
    assert np.array_equal(model(params, x)[:4], model(params, other)[:4])
    assert not np.array_equal(model(params, x)[4:], model(params, other)[4:])


# --- other libraries, dropout, programs ------------------------------------------------------


def test_the_model_on_every_library(backend: backends.Backend) -> None:
    model = KINDS["pre-norm"]
    params, (x, y) = start(model), batch(model)
    on_device = {name: backend.asarray(value) for name, value in params.items()}
    loss, grads = value_and_grad(loss_of(model))(on_device, backend.asarray(x), backend.asarray(y))
    expected, ours = value_and_grad(loss_of(model))(params, x, y)
    assert abs(float(backend.to_host(loss)) - expected) < 1e-12
    for name, g in grads.items():
        assert np.allclose(backend.to_host(g), ours[name], atol=1e-12), name


@kinds
def test_dropout_comes_from_the_step(kind: str) -> None:
    model = KINDS[kind]
    params, (x, _) = start(model), batch(model)

    def output(step: int) -> Any:
        return model.apply(params, {}, x, train=True, random=Random(0, "train", step))[0]

    assert np.array_equal(output(3), output(3))
    assert not np.array_equal(output(3), output(4))
    assert np.array_equal(model.apply(params, {}, x)[0], model(params, x))
    still = dataclasses.replace(model, dropout=0.0)
    assert np.array_equal(still.apply(params, {}, x, train=True)[0], model(params, x))


def test_masks_have_names_of_their_own() -> None:
    """Five places of dropout a layer and one at the embedding: no two streams are one."""
    drawn = []

    class Spy(Random):
        def bernoulli(self, shape: Any, p: float) -> Any:
            drawn.append((self.purpose, tuple(shape)))
            return super().bernoulli(shape, p)

    model = KINDS["post-norm"]
    model.apply(start(model), {}, batch(model)[0], train=True, random=Spy(0, "train", 1))
    assert len(drawn) == len({purpose for purpose, _ in drawn}) == 1 + 4 * model.layers
    assert {shape for _, shape in drawn} == {(4, 7, 12), (4, 3, 7, 7), (4, 7, 20)}


@kinds
@pytest.mark.parametrize("clip", [None, 0.25])
def test_a_recorded_step_has_the_bits_of_an_eager_one(kind: str, clip: float | None) -> None:
    model = KINDS[kind]
    task, optimizer = Task(model, 50, clip=clip), optim.fromage(lr=0.01, norm_bound=1.0)
    params, (x, y) = start(model, "float32"), batch(model)
    step = make_step(task, optimizer)
    state = State(params, {}, optimizer.init(params))
    program = record(step, state, x, y, 0.01, Random(0, "train", 0))
    for number in range(3):
        eager = step(state, x, y, 0.01, Random(0, "train", number))
        replayed = program(state, x, y, 0.01, Random(0, "train", number))
        assert all(np.array_equal(eager.state.params[n], replayed.state.params[n]) for n in params)
        state = eager.state


# --- clipping --------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [0.25, 3.0, 1e9])
def test_clipping_is_pytorchs(limit: float) -> None:
    torch = pytest.importorskip("torch")
    grads = {n: Random(0, n).normal(s) for n, s in {"a": (3, 4), "b": (5,), "c": ()}.items()}
    leaves = [torch.zeros(v.shape, dtype=torch.float64) for v in grads.values()]
    for leaf, value in zip(leaves, grads.values(), strict=True):
        leaf.grad = torch.tensor(value)
    torch.nn.utils.clip_grad_norm_(leaves, limit)
    for leaf, value in zip(leaves, clipped(grads, limit).values(), strict=True):
        assert np.abs(leaf.grad.numpy() - value).max() < 1e-15


def test_small_gradients_are_left_alone_to_the_bit() -> None:
    grads = {"a": np.array([0.3, -0.4], np.float32)}
    assert np.array_equal(clipped(grads, 0.5 + 1e-6)["a"], grads["a"])
    assert float(norm(clipped(grads, 0.1)["a"])) == pytest.approx(0.1, rel=1e-5)


def test_nan_makes_every_clipped_gradient_nan() -> None:
    grads = {"a": np.array([np.nan, 1.0]), "b": np.ones(2)}
    assert all(np.isnan(g).all() for g in clipped(grads, 1.0).values())


@pytest.mark.parametrize("clip", [0.0, -1.0, math.inf, math.nan])
def test_impossible_limits_are_refused(clip: float) -> None:
    with pytest.raises(Error, match="clip must be a finite norm above 0"):
        Config(clip=clip)


# --- training --------------------------------------------------------------------------------


def options(**changes: Any) -> Config:
    """A run on the sample: 26 steps an epoch, the last on 24 rows."""
    settings: dict[str, Any] = {
        "model": "transformer",
        "model_options": {"width": 16, "hidden": 16},
        "data": "sample-text",
        "batch_size": 4,
        "epochs": 2,
        "schedule": "constant",
        "lr": 0.03,
        "trace_every": 0,
    }
    return Config(**(settings | changes))


def test_it_learns_the_sample(tmp_path: Path) -> None:
    """Perplexity falls from 30, the words, towards what is random in it: of the nine words of a
    sentence a place and a thing, of eight each, exp(2 ln 8 / 9) = 1.59."""
    config = options(optimizer="adam", lr=0.01, epochs=3, model_options={"width": 32, "hidden": 32})
    summary = train(config, tmp_path / "run")
    records = [r for r in log.read(tmp_path / "run" / "log.jsonl") if r["event"] == "epoch"]
    assert records[0]["train_perplexity"] > 4 > 2 > records[-1]["valid_perplexity"] > 1.6
    for name in ("train", "valid", "test"):
        assert records[-1][f"{name}_perplexity"] == math.exp(records[-1][f"{name}_loss"])
    assert summary.test_perplexity == records[-1]["test_perplexity"]
    assert summary.test_accuracy is not None
    assert summary.test_accuracy > 0.7


def test_the_mean_is_over_tokens_and_the_last_batch_is_shorter(tmp_path: Path) -> None:
    config = options(
        model_options={"width": 16, "hidden": 16, "dropout": 0.0}, lr=0.0, log_every=1, epochs=1
    )
    train(config, tmp_path / "run")
    records = log.read(tmp_path / "run" / "log.jsonl")
    steps, (epoch,) = ([r for r in records if r["event"] == e] for e in ("step", "epoch"))
    found = data.load("sample-text").as_streams_for(4)
    model = build_model(options(), found)
    params = dataclasses.replace(model, dropout=0.0).init(seed=0)
    last = slice(875, 899)
    expected = ops.softmax_cross_entropy(model(params, found.x[last]), found.y[last])
    assert len(steps) == 26
    assert steps[-1]["loss"] == pytest.approx(float(expected), rel=1e-6)
    assert steps[-1]["perplexity"] == math.exp(steps[-1]["loss"])
    sizes = [35] * 25 + [24]
    losses = [step["loss"] for step in steps]
    assert epoch["train_loss"] == pytest.approx(np.average(losses, weights=sizes), rel=1e-12)
    right = [step["accuracy"] for step in steps]
    assert epoch["train_accuracy"] == pytest.approx(np.average(right, weights=sizes), rel=1e-12)


def test_a_resumed_run_has_the_bits_of_one_that_never_stopped(tmp_path: Path) -> None:
    """Stopped in the middle of an epoch; dropout, clipping and the order go on."""
    config = options(optimizer="sgd", lr=1.0, clip=0.25, epochs=2)
    whole = Trainer(config, data.load("sample-text"), tmp_path / "x", Reporter())
    assert (whole.feed.epoch, whole.feed.steps) == (26, 52)
    train(config, tmp_path / "whole")
    calls = iter(range(100))
    stopped = train(config, tmp_path / "parts", stop=lambda: 15 * (next(calls) == 30))
    assert stopped.step == 31
    resume(tmp_path / "parts")
    a, b = (store.load(tmp_path / run / "checkpoint.h5") for run in ("whole", "parts"))
    assert a.meta["progress"] == b.meta["progress"]
    assert all(np.array_equal(value, b.params[name]) for name, value in a.params.items())
    eager = options(optimizer="sgd", lr=1.0, clip=0.25, epochs=2, eager=True)
    train(eager, tmp_path / "eager")
    logs = [
        [{k: v for k, v in r.items() if k not in ("seconds", "config")} for r in log.read(path)]
        for path in (tmp_path / run / "log.jsonl" for run in ("whole", "parts", "eager"))
    ]
    assert logs[0] == logs[1] == logs[2]


def test_another_vocabulary_is_refused_on_resume(tmp_path: Path) -> None:
    folder = tmp_path / "text"
    folder.mkdir()
    for split in text.SPLITS:
        (folder / f"{split}.txt").write_text(sample.text(split))
    config = options(data=f"text:{folder}", epochs=1)
    train(config, tmp_path / "run", stop=lambda: 15)
    changed = sample.text("train").replace("Oslo", "Bergen")
    (folder / "train.txt").write_text(changed)
    with pytest.raises(Error, match=r"the vocabulary of text:.* has changed .* mean other words"):
        resume(tmp_path / "run")
    (folder / "train.txt").write_text("\n".join(sample.text("train").split("\n")[:-9]) + "\n")
    with pytest.raises(Error, match=r"the data set text:.* has changed since"):
        resume(tmp_path / "run")


def test_tokens_out_of_range_are_refused_on_the_host(tmp_path: Path) -> None:
    found = data.load("sample-text")
    wrong = found.tokens["train"].copy()  # type: ignore[attr-defined]
    wrong[70] = 30
    tokens = {**found.tokens, "train": wrong}  # type: ignore[attr-defined]
    with pytest.raises(Error, match=r"1 token\(s\) are not in \[0, 30\); the first is 30"):
        Trainer(options(), dataclasses.replace(found, tokens=tokens), tmp_path, Reporter())


def test_models_and_data_must_fit() -> None:
    with pytest.raises(Error, match="model transformer needs tokens; the examples of digits"):
        build_model(options(), data.load("digits"))
    with pytest.raises(Error, match="are tokens, but model mlp takes numbers; use a model with"):
        build_model(options(model="mlp", model_options={}), data.load("sample-text"))
    with pytest.raises(Error, match="the model has vocabulary=31, the data set has 30"):
        build_model(options(model_options={"vocabulary": 31}), data.load("sample-text"))


# --- tensors that start at zero under a norm bound -------------------------------------------


def test_zero_tensors_under_a_norm_bound_stay_zero(tmp_path: Path) -> None:
    """Fromage with norm_bound keeps |w| at most norm_bound |w at init|, which is 0 for the biases
    that start there; without a bound their first step is a plain gradient step."""
    zero = {n for n, v in Transformer(30, 16, hidden=16).init(seed=0).items() if not v.any()}
    assert len(zero) == 1 + 2 * 4
    for bound in (1.0, None):
        chosen = {} if bound is None else {"norm_bound": bound}
        trainer = Trainer(
            options(optimizer_options=chosen), data.load("sample-text"), tmp_path, Reporter()
        )
        at = trainer.fresh()
        for _ in range(5):
            x, y = trainer.feed.batch(at.step)
            at, _ = trainer.advanced(at, x, y, at.schedule(at.step))
        frozen = {name for name, value in at.state.params.items() if not value.any()}
        assert frozen == (zero if bound else set())


# --- the command -----------------------------------------------------------------------------


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(cli, list(arguments))


def test_the_command_trains_resumes_shows_and_explains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    common = ("--model", "transformer", "--data", "sample-text", "--batch-size", "20", *SMALL)
    fixed = ("--schedule", "constant", "--norm-bound", "1", "--clip", "0.25")
    done = invoke("train", *common, *fixed, "--epochs", "1", "--out", "run")
    assert done.exit_code == 0, done.output
    assert "perplexity" in done.output
    again = invoke("train", "--out", "run", "--resume", "--epochs", "2", "--json")
    assert again.exit_code == 0, again.output
    summary = json.loads(again.stdout)
    assert summary["step"] == 2 * 6
    assert summary["test_perplexity"] == pytest.approx(math.exp(summary["test_loss"]))
    assert invoke("show", "run").exit_code == 0
    listed = invoke("explain", *common, "--clip", "0.25")
    assert listed.exit_code == 0, listed.output
    assert "int64[35, 20]" in listed.output
    assert invoke("explain", "run").exit_code == 0
    assert "transformer" in invoke("train", "--help").output


USERS = """
from dataclasses import dataclass
from npdrt import ops
from npdrt.random import Random

@dataclass(frozen=True)
class Bigrams:
    vocabulary: int

    def init(self, seed=0, device="cpu", dtype="float32"):
        shape = (self.vocabulary, self.vocabulary)
        return {"weight": Random(seed, "init").normal(shape, 0.01).astype(dtype)}

    def __call__(self, params, x):
        return ops.embedding(params["weight"], x)
"""


def test_a_users_language_model_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(USERS)
    here = ("--model", "mine.py:Bigrams", "--data", "sample-text", "--out", "run", "--json")
    rule = ("--optimizer", "adam", "--lr", "0.1", "--epochs", "3", "--batch-size", "10")
    done = invoke("train", *here, *rule, "--snapshot", "3")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["test_perplexity"] < 5
    sliced = invoke("perturb", "run", "--code", "mine.py")
    assert sliced.exit_code == 2
    assert "slices are over examples, and sample-text is a running text" in sliced.output


# --- weights -----------------------------------------------------------------------------


@kinds
def test_weights_go_to_safetensors_and_back_to_the_bit(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    model, path = KINDS[kind], tmp_path / "model.safetensors"
    params = start(model, "float32")
    weights.save(path, model, params)
    back = weights.load(path, model)
    assert list(back) == list(params)
    assert all(back[name].tobytes() == params[name].tobytes() for name in params)
    with pytest.raises(FileRefused, match=r"missing: transformer_encoder\.layers\.3"):
        weights.load(path, dataclasses.replace(model, layers=4))
    shutil.copy(path, tmp_path / "copy.safetensors")
    with pytest.raises(FileRefused, match=r"encoder\.weight is float32\(50, 12\), the model has"):
        weights.load(tmp_path / "copy.safetensors", dataclasses.replace(model, vocabulary=51))


@pytest.mark.parametrize(
    "kept", [("encoder.weight",), ("decoder.weight",), ("encoder.weight", "decoder.weight")]
)
def test_a_tied_decoder_is_read_under_either_name(kept: tuple[str, ...], tmp_path: Path) -> None:
    """PyTorch's save_model keeps one name of two that share their memory."""
    numpy = pytest.importorskip("safetensors.numpy")
    model = Transformer(50, tied=True, **TINY)
    params, path = model.init(seed=0), tmp_path / "tied.safetensors"
    weights.save(path, model, params)
    held = numpy.load_file(path)
    table = held.pop("encoder.weight")
    numpy.save_file({**held, **dict.fromkeys(kept, table)}, path)
    found = weights.load(path, model)
    assert found.keys() == params.keys()
    assert np.array_equal(found["embedding/weight"], params["embedding/weight"])
    numpy.save_file({**held, "encoder.weight": table, "decoder.weight": table + 1}, path)
    with pytest.raises(FileRefused, match=r"unknown: decoder\.weight"):
        weights.load(path, model)


def test_evaluation_is_without_label_smoothing(tmp_path: Path) -> None:
    """Nobody's perplexity is the exp of a smoothed loss."""
    options = {"width": 2, "heads": 1, "hidden": 2}
    made = {}
    for smoothing in (0.0, 0.5):
        config = Config(model="transformer", model_options=options, data="sample-text", epochs=1,
                        batch_size=20, lr=0.0, log_every=1, label_smoothing=smoothing)  # fmt: skip
        made[smoothing] = train(config, tmp_path / str(smoothing))
    assert made[0.0].test_loss == made[0.5].test_loss
    assert made[0.0].test_perplexity == made[0.5].test_perplexity
    for line in log.read(tmp_path / "0.5" / "log.jsonl"):
        assert "train_perplexity" not in line
        assert "perplexity" not in line
