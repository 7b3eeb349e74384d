"""BERT: counts, values and gradients beside transformers, weights both ways, and its training."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import backends
import numpy as np
import pytest
from click.testing import CliRunner

from npdrt import Error, check_gradients, data, ops, optim, record, store, value_and_grad
from npdrt.cli import cli
from npdrt.data import squad
from npdrt.errors import FileRefused, Unavailable
from npdrt.models import BERT, weights
from npdrt.random import Random
from npdrt.train import Config, resume, train
from npdrt.train.config import build_model
from npdrt.train.step import State, Task, make_step
from npdrt.train.studies import answers

MODEL = BERT(vocabulary=40, width=24, layers=3, heads=4, hidden=48, positions=20)
DEV = Path(os.environ.get("NPDRT_DATA", "")) / "squad" / "dev-v1.1.json.gz"


def start(model: BERT = MODEL, dtype: str = "float64") -> Any:
    """Parameters that are all moved from where they start."""
    params = model.init(seed=0, dtype=dtype)
    return {n: v + Random(1, n).normal(v.shape, 0.3).astype(dtype) for n, v in params.items()}


def batch() -> tuple[Any, Any]:
    """Five sequences, two of them padded, and their answers."""
    x = np.zeros((5, 3, 16), np.int64)
    x[:, 0] = 1 + (Random(0, "tokens").words(80) % 39).astype(np.int64).reshape(5, 16)
    x[:, 1, 8:], x[:, 2] = 1, 1
    x[1, :, 12:], x[3, :, 7:] = 0, 0
    return x, np.array([[3, 5], [1, 1], [0, 0], [15, 15], [2, 9]])


def loss_of(model: BERT) -> Any:
    return lambda params, x, y: ops.softmax_cross_entropy(model(params, x), y)


# --- counts and refusals ---------------------------------------------------------------------


def test_bert_base_has_its_parameters() -> None:
    """Cased and uncased, without the pooler: 107,721,218 and 108,893,186."""
    counts = [
        sum(math.prod(shape) for shape in model.shapes().values())
        for model in (BERT(), BERT(vocabulary=30_522))
    ]
    assert counts == [107_721_218, 108_893_186]


def test_init_makes_the_shapes() -> None:
    params = MODEL.init(seed=0)
    assert {name: value.shape for name, value in params.items()} == MODEL.shapes()
    assert np.std(params["layers/00/linear1/weight"]) == pytest.approx(0.02, rel=0.1)
    assert not params["embeddings/word/weight"][0].any()
    assert params["embeddings/word/weight"][1:].all()
    assert (params["layers/01/norm1/weight"] == 1).all()
    assert not any(v.any() for n, v in params.items() if n.endswith("bias"))


def test_impossible_fields_are_refused() -> None:
    with pytest.raises(Error, match="width 24 cannot be cut into 5 heads"):
        dataclasses.replace(MODEL, heads=5)
    with pytest.raises(Error, match="token_types must be at least 2; got 1"):
        BERT(token_types=1)
    with pytest.raises(Error, match="layers must be at least 1"):
        dataclasses.replace(MODEL, layers=0)
    with pytest.raises(Error, match="the probability of dropping"):
        dataclasses.replace(MODEL, dropout=-0.1)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (
            np.zeros((2, 3, 21), np.int64),
            r"a length of 1 to 20, the positions; got .* \(2, 3, 21\)",
        ),
        (np.zeros((2, 2, 9), np.int64), r"expected integers \(batch, 3, length\)"),
        (np.zeros((3, 9), np.int64), r"expected integers \(batch, 3, length\)"),
        (np.zeros((2, 3, 9)), "expected integer tokens; got float64"),
    ],
)
def test_other_inputs_are_refused(x: Any, message: str) -> None:
    with pytest.raises(Error, match=message):
        MODEL(MODEL.init(seed=0), x)


# --- beside transformers ---------------------------------------------------------------------


def twin(model: BERT = MODEL, dtype: str = "float64") -> Any:
    """Hugging Face's model of the same sizes, with weights of its own, without dropout."""
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=model.vocabulary,
        hidden_size=model.width,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        intermediate_size=model.hidden,
        max_position_embeddings=model.positions,
    )
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    made = transformers.BertForQuestionAnswering(config).eval()
    return made.double() if dtype == "float64" else made


def test_values_and_gradients_are_those_of_transformers() -> None:
    """Hidden states, logits, loss, and every gradient, with padding; float64."""
    theirs, names, (x, y), params = twin(), MODEL.pytorch_names(), batch(), start()
    torch = pytest.importorskip("torch")
    assert set(names.values()) == set(theirs.state_dict())
    theirs.load_state_dict({names[n]: torch.tensor(v) for n, v in params.items()})
    loss, grads = value_and_grad(loss_of(MODEL))(params, x, y)
    given = {"input_ids": x[:, 0], "token_type_ids": x[:, 1], "attention_mask": x[:, 2]}
    given |= {"start_positions": y[:, 0], "end_positions": y[:, 1]}
    output = theirs(**{n: torch.tensor(v) for n, v in given.items()}, output_hidden_states=True)
    output.loss.backward()
    assert abs(loss - output.loss.item()) < 1e-12
    hidden = output.hidden_states[-1].detach().numpy()
    assert np.abs(hidden - MODEL.encode(params, x)).max() < 1e-12
    logits = torch.stack([output.start_logits, output.end_logits], 1).detach().numpy()
    assert np.abs(logits - MODEL(params, x)).max() < 1e-12
    parameters = dict(theirs.named_parameters())
    largest = max(np.abs(g).max() for g in grads.values())
    for name, g in grads.items():
        error = np.abs(g - parameters[names[name]].grad.numpy()).max()
        assert error < 1e-9 * largest, name


def test_gradients_by_the_complex_step() -> None:
    """But for the padding token's embedding, which by design gets none; so no token is padding."""
    model = BERT(vocabulary=6, width=4, layers=1, heads=2, hidden=4, positions=5)
    x = np.ones((2, 3, 5), np.int64)
    x[:, 0] = [[1, 2, 3, 4, 5], [5, 5, 1, 2, 3]]
    x[1, 2, 3:] = 0
    found = check_gradients(loss_of(model), start(model), x, np.array([[1, 2], [0, 0]]))
    assert found.method == "complex step"


def test_padding_changes_nothing_before_it() -> None:
    params, (x, _) = start(), batch()
    longer = np.concatenate([x, np.zeros((5, 3, 4), np.int64)], axis=2)
    assert np.abs(MODEL(params, longer)[:, :, :16] - MODEL(params, x)).max() < 1e-12


# --- other libraries, dropout, programs ------------------------------------------------------


def test_the_model_on_every_library(backend: backends.Backend) -> None:
    params, (x, y) = start(), batch()
    on_device = {name: backend.asarray(value) for name, value in params.items()}
    given = (backend.asarray(x), backend.asarray(y))
    loss, grads = value_and_grad(loss_of(MODEL))(on_device, *given)
    expected, ours = value_and_grad(loss_of(MODEL))(params, x, y)
    assert abs(float(backend.to_host(loss)) - expected) < 1e-12
    for name, g in grads.items():
        assert np.allclose(backend.to_host(g), ours[name], atol=1e-12), name


def test_a_recorded_step_has_the_bits_of_an_eager_one() -> None:
    """With dropout, and with the int32 of features."""
    (x, y), params, optimizer = batch(), start(dtype="float32"), optim.fromage(lr=0.01)
    step = make_step(Task(MODEL, 16, clip=1.0), optimizer)
    state, x = State(params, {}, optimizer.init(params)), x.astype(np.int32)
    program = record(step, state, x, y, 0.01, Random(0, "train", 0))
    for number in range(3):
        eager = step(state, x, y, 0.01, Random(0, "train", number))
        replayed = program(state, x, y, 0.01, Random(0, "train", number))
        assert all(np.array_equal(eager.state.params[n], replayed.state.params[n]) for n in params)
        state = eager.state
    still = MODEL.apply(params, {}, x, train=True)[0]
    assert np.array_equal(still, MODEL(params, x))
    assert not np.array_equal(MODEL.apply(params, {}, x, train=True, random=Random(0))[0], still)


# --- weights ---------------------------------------------------------------------------------


def test_weights_of_transformers_are_read_and_given_back(tmp_path: Path) -> None:
    """What its save_pretrained wrote, in, out, and into its from_pretrained: to the bit."""
    transformers = pytest.importorskip("transformers")
    theirs = twin(dtype="float32")
    theirs.save_pretrained(tmp_path / "theirs")
    params = weights.load(tmp_path / "theirs" / "model.safetensors", MODEL)
    assert list(params) == list(MODEL.shapes())
    held = {name: value.numpy() for name, value in theirs.state_dict().items()}
    names = MODEL.pytorch_names()
    assert all(params[n].tobytes() == held[names[n]].tobytes() for n in params)
    ours = tmp_path / "ours"
    theirs.config.save_pretrained(ours)
    weights.save(ours / "model.safetensors", MODEL, params)
    back = transformers.BertForQuestionAnswering.from_pretrained(ours)
    for name, value in back.state_dict().items():
        assert value.numpy().tobytes() == held[name].tobytes(), name


def test_a_pretrained_encoder_starts_a_fine_tuning(tmp_path: Path) -> None:
    """Old names of norms, other heads and buffers, no span head: the encoder is read, the head
    drawn."""
    pytest.importorskip("safetensors")
    from safetensors.numpy import save_file

    params, names = start(dtype="float32"), MODEL.pytorch_names()
    file = {names[n]: v for n, v in params.items() if not n.startswith("span/")}
    old = {
        n.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): v
        for n, v in file.items()
    }
    old |= {n: np.ones(3, np.float32) for n in ("bert.pooler.dense.bias", "cls.predictions.bias")}
    old["bert.embeddings.position_ids"] = np.arange(20)
    save_file(old, tmp_path / "old.safetensors")
    bare = {name.removeprefix("bert."): value for name, value in file.items()}
    save_file(bare, tmp_path / "bare.safetensors")
    for name in ("old", "bare"):
        model = dataclasses.replace(MODEL, weights=str(tmp_path / f"{name}.safetensors"))
        first, drawn = model.init(seed=3), MODEL.init(seed=3)
        for n, value in first.items():
            expected = drawn[n] if n.startswith("span/") else params[n]
            assert np.array_equal(value, expected), n


def spoiled(tmp_path: Path, **changes: Any) -> Path:
    """A file with arrays by our name taken away (None), added or replaced."""
    pytest.importorskip("safetensors")
    from safetensors.numpy import save_file

    names = MODEL.pytorch_names()
    file = {names[n]: v for n, v in start(dtype="float32").items()}
    for name, value in changes.items():
        name = names.get(name.replace("__", "/"), name)
        file.pop(name, None)
        if value is not None:
            file[name] = value
    save_file(file, tmp_path / "spoiled.safetensors")
    return tmp_path / "spoiled.safetensors"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"span__bias": None, "layers__00__norm1__weight": None, "stray": np.ones(2)},
            r"missing: bert\.encoder\.layer\.0\.attention\.output\.LayerNorm\.weight, "
            r"qa_outputs\.bias; unknown: stray; use the file of a model with the same fields",
        ),
        (
            {"span__bias": np.ones(3, np.float32)},
            r"shapes: qa_outputs\.bias is float32\(3,\), the model has floats \(2,\)",
        ),
        ({"span__bias": np.ones(2, np.int32)}, r"qa_outputs\.bias is int32\(2,\), the model has"),
        ({"span__bias": np.array([1, np.nan], np.float32)}, r"not finite: qa_outputs\.bias"),
    ],
)
def test_files_that_do_not_fit_are_refused(tmp_path: Path, changes: Any, message: str) -> None:
    with pytest.raises(FileRefused, match=message):
        weights.load(spoiled(tmp_path, **changes), MODEL)


def test_a_long_list_of_names_is_cut(tmp_path: Path) -> None:
    deeper = dataclasses.replace(MODEL, layers=5)
    with pytest.raises(FileRefused, match=r"missing: bert\.encoder\.layer\.3\..* and 24 more;"):
        weights.load(spoiled(tmp_path), deeper)


@pytest.mark.parametrize("damage", [b"", b"\x80\x02}q\x00.", b"\xff" * 100, b"cut"])
def test_what_is_no_safetensors_is_refused(tmp_path: Path, damage: bytes) -> None:
    """Empty, a pickle, noise, and a file that was cut off."""
    path = spoiled(tmp_path)
    path.write_bytes(path.read_bytes()[:-100] if damage == b"cut" else damage)
    with pytest.raises(FileRefused, match="not a safetensors file that can be read"):
        weights.load(path, MODEL)


def test_missing_files_and_libraries_are_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("safetensors")
    with pytest.raises(FileRefused, match="does not exist"):
        dataclasses.replace(MODEL, weights=str(tmp_path / "none")).init(seed=0)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(Unavailable, match=r'pip install "npdrt\[text\]"'):
        weights.load(tmp_path / "none", MODEL)


# --- training --------------------------------------------------------------------------------


def options(**changes: Any) -> Config:
    """A run on the sample of questions."""
    sizes = {"width": 16, "hidden": 32, "heads": 2, "layers": 1, "positions": 48}
    settings: dict[str, Any] = {
        "model": "bert",
        "model_options": sizes,
        "data": "sample-squad",
        "batch_size": 8,
        "epochs": 2,
        "clip": 1.0,
        "trace_every": 0,
    }
    return Config(**(settings | changes))


def scores(model: BERT, params: Any, found: squad.Squad) -> dict[str, float]:
    """Exact match and F1 on the development questions."""
    logits = answers.logits(model, params, found.x_test, 32, "cpu")
    return squad.score(found.questions, squad.answers(found.questions, found.found, logits))


def fit(found: squad.Squad, model: BERT, steps: int, lr: float) -> tuple[list[float], Any]:
    """Full-batch Adam without dropout, as one recorded program: losses and parameters."""
    optimizer = optim.adam(lr=lr)
    params = model.init(seed=0)
    state = State(params, {}, optimizer.init(params))
    step = make_step(Task(model, found.classes, clip=1.0), optimizer)
    args = (found.x, found.y, lr, Random(0, "train", 0))
    program, losses = record(step, state, *args), []
    for _ in range(steps):
        done = program(state, *args)
        state = done.state
        losses.append(float(done.loss))
    return losses, {name: value.copy() for name, value in state.params.items()}


@pytest.mark.skipif(not DEV.is_file(), reason="SQuAD is not on this machine")
def test_a_tiny_bert_learns_real_paragraphs(tmp_path: Path) -> None:
    """Ten real questions: the loss falls, and exact match and F1 on them rise. One answer, "2" of
    the word "2½" in the text, is a part of a token and cannot be cut out."""
    tokenizers = pytest.importorskip("tokenizers")
    chosen = [q for q in squad.read(DEV) if len(q.context) < 420][:10]
    trained = tokenizers.BertWordPieceTokenizer(lowercase=True)
    spoken = [text for q in chosen for text in (q.context, q.question)]
    trained.train_from_iterator(
        spoken, vocab_size=1000, show_progress=False, special_tokens=list(squad.SPECIAL)
    )
    pieces = sorted(trained.get_vocab().keys() - set(squad.SPECIAL))
    tokenizer = squad.tokeniser({t: n for n, t in enumerate((*squad.SPECIAL, *pieces))})
    parts = {"train": chosen, "dev": chosen}
    found = squad.make_dataset("ten", parts, tokenizer, {}, length=96, stride=48, query=24)
    model = BERT(found.vocabulary or 0, 32, 1, 2, 64, positions=96, dropout=0.0)
    before = scores(model, model.init(seed=0), found)
    losses, params = fit(found, model, 100, 3e-3)
    after = scores(model, params, found)
    assert losses[0] > 4 > 0.2 > losses[-1]
    assert before["exact_match"] < 20
    assert after["exact_match"] >= 80
    assert after["f1"] >= 80


def test_runs_resume_to_the_same_bits(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    train(options(), tmp_path / "whole")
    calls = iter(range(100))
    stopped = train(options(), tmp_path / "parts", stop=lambda: 15 * (next(calls) == 7))
    assert stopped.step == 8
    summary = resume(tmp_path / "parts")
    assert summary.test_perplexity is None
    a, b = (store.load(tmp_path / run / "checkpoint.h5") for run in ("whole", "parts"))
    assert a.meta["progress"] == b.meta["progress"]
    assert all(np.array_equal(value, b.params[name]) for name, value in a.params.items())


def test_a_run_resumes_without_the_file_of_its_first_weights(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    found, path = data.load("sample-squad"), tmp_path / "first.safetensors"
    config = options(epochs=1)
    model = build_model(config, found)
    weights.save(path, model, model.init(seed=3))
    config = dataclasses.replace(
        config, model_options={**config.model_options, "weights": str(path)}
    )
    whole = train(config, tmp_path / "whole")
    calls = iter(range(100))
    train(config, tmp_path / "parts", stop=lambda: 15 * (next(calls) == 1))
    path.unlink()
    assert resume(tmp_path / "parts").train_loss == whole.train_loss


def test_the_accuracy_is_over_both_ends(tmp_path: Path) -> None:
    """A model that always points at one place is right as often as that is the place."""
    pytest.importorskip("tokenizers")
    summary = train(options(epochs=0), tmp_path / "run")
    found = data.load("sample-squad")
    assert summary.test_accuracy is not None
    assert summary.test_accuracy * found.y_test.size == pytest.approx(  # type: ignore[union-attr]
        round(summary.test_accuracy * 24)
    )
    model = build_model(options(), found)
    params = model.init(seed=0)
    expected = ops.softmax_cross_entropy(model(params, found.x_test), found.y_test)
    assert summary.test_loss == pytest.approx(float(expected), rel=1e-6)


def test_the_command_trains_and_explains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tokenizers")
    monkeypatch.chdir(tmp_path)
    fields = ("width=16", "hidden=16", "heads=2", "layers=1", "positions=48")
    sizes = [part for field in fields for part in ("--set", field)]
    arguments = ["train", "--model", "bert", "--data", "sample-squad", "--epochs", "1", "--clip=1"]
    here = ("--batch-size", "8", "--out", "run", "--json")
    done = CliRunner().invoke(cli, [*arguments, *sizes, *here])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["step"] == 6
    refused = CliRunner().invoke(cli, [*arguments, *sizes, "--set", "positions=40"])
    assert refused.exit_code == 2
    assert "a length of 1 to 40, the positions" in refused.output
    explained = CliRunner().invoke(cli, ["explain", "run"])
    assert explained.exit_code == 0, explained.output
    assert "int32[8, 3, 48]" in explained.output
