"""Gradients against autograd, PyTorch and JAX: agreement, planted faults, absent oracles."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from npdrt import data, ops
from npdrt.autodiff import PRIMITIVES, detach, primitive
from npdrt.cli import cli
from npdrt.conform import gradients
from npdrt.conform.gradients import ORACLES, TOLERANCES, Problem, audit, compare, relative
from npdrt.errors import Error, Unavailable
from npdrt.models import MLP, ResNet18, Transformer
from npdrt.models.mlp import NONLINEARITIES

RNG = np.random.default_rng(7)
X, Y = RNG.standard_normal((6, 5)), RNG.integers(0, 3, 6)
INSTALLED = [name for name in ORACLES if find_spec(name)]
oracles = pytest.mark.parametrize(
    "oracle",
    [
        pytest.param(
            name, marks=pytest.mark.skipif(name not in INSTALLED, reason=f"{name} is not installed")
        )
        for name in ORACLES
    ],
)
some_oracle = pytest.mark.skipif(not INSTALLED, reason="no oracle is installed")
OPTIONS: list[dict[str, Any]] = [
    *({"nonlinearity": name} for name in NONLINEARITIES),
    {"bias": True},
    {"bias": True, "init": "authors", "output_nonlinearity": True},
    {"residual": True, "nonlinearity": "tanh"},
    {"residual": True, "bias": True, "init": "authors", "output_nonlinearity": True},
    {"normalisation": "spectral", "nonlinearity": "softplus"},
    {"normalisation": "spectral", "bias": True, "residual": True, "init": "authors"},
    {"depth": 1, "bias": True},
]


def problem(dtype: str = "float64", x: Any = X, y: Any = Y, **options: Any) -> Problem:
    """A small net, as wide as its inputs so that the first layer may be skipped too."""
    sizes = {"depth": 4, "width": x.shape[1], "inputs": x.shape[1], "outputs": 3}
    model = MLP(**{**sizes, **options})
    params, buffers = model.init(seed=3, dtype=dtype), model.buffers(seed=3, dtype=dtype)
    return Problem(model, params, buffers, x.astype(dtype), y)


def call(*arguments: str) -> Result:
    result = CliRunner().invoke(cli, ["audit-gradients", *arguments], prog_name="npdrt")
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def hide(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    """Make these modules look as if they were not installed."""
    for name in names:
        monkeypatch.setitem(sys.modules, name, None)


def plant(monkeypatch: pytest.MonkeyPatch, share: float = 1e-9) -> None:
    """A tanh whose derivative is wrong by that share."""
    monkeypatch.setitem(PRIMITIVES, "tanh", PRIMITIVES["tanh"])  # to be put back

    @primitive
    def tanh(x: Any) -> Any:
        y = np.tanh(x)
        return y, lambda g: g * (1.0 - y * y) * (1.0 + share)

    monkeypatch.setitem(NONLINEARITIES, "tanh", tanh)


# --- agreement ------------------------------------------------------------------------------


@oracles
@pytest.mark.parametrize("nonlinearity", ["relu", "tanh"])
def test_fifty_layers(oracle: str, nonlinearity: str) -> None:
    """The project's promise: 1e-12 over 50 layers, in every array and over all."""
    digits = data.load("digits")
    model = MLP(depth=50, width=128, inputs=64, outputs=10, nonlinearity=nonlinearity)
    x, y = digits.x[:32].astype("float64"), digits.y[:32]
    found = audit(Problem(model, model.init(dtype="float64"), {}, x, y), against=[oracle])
    (comparison,) = found.comparisons
    assert (found.tolerance, found.zero) == (1e-12, ())
    assert list(comparison.errors) == list(model.shapes())
    assert 0 < comparison.error <= 1e-12
    assert comparison.overall <= comparison.error
    assert comparison.loss_error <= 1e-12
    assert found.agrees


@oracles
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_option(oracle: str, options: dict[str, Any]) -> None:
    found = audit(problem(**options), against=[oracle])
    assert found.comparisons[0].error <= 1e-12
    assert found.agrees
    assert found.spread is None


TEXT = {"vocabulary": 11, "width": 8, "heads": 2, "layers": 2, "hidden": 6}
IMAGES = {"outputs": 3, "width": 2, "image_shape": (2, 8, 8)}
LATER: dict[str, Any] = {
    "transformer": Transformer(**TEXT),
    "transformer, norms first": Transformer(**TEXT, pre_norm=True, tied=True, nonlinearity="gelu"),
    "resnet18": ResNet18(**IMAGES),
    "resnet18, norms last": ResNet18(**IMAGES, pre_activation=False, shortcut="modified"),
}


def later(name: str) -> Problem:
    """A model of LATER on random tokens or images."""
    model, start = LATER[name], {"seed": 3, "dtype": "float64"}
    if isinstance(model, Transformer):
        x, y = np.random.default_rng(1).integers(0, 11, (2, 5, 3))
        return Problem(model, model.init(**start), {}, x, y)
    x = np.random.default_rng(1).standard_normal((6, 2, 8, 8))
    return Problem(model, model.init(**start), model.buffers(**start), x, Y)


COMPILED = ("transformer, norms first", "resnet18")  # one of a kind: JAX compiles for seconds


@some_oracle
@pytest.mark.parametrize("name", LATER)
def test_later_models(name: str) -> None:
    against = [oracle for oracle in INSTALLED if oracle != "jax" or name in COMPILED]
    found = audit(later(name), against=against or INSTALLED)
    for comparison in found.comparisons:
        assert comparison.error <= 1e-12
        assert list(comparison.errors) == list(LATER[name].shapes())
    assert found.agrees
    assert found.zero == ()


@some_oracle
def test_a_wrong_convolution_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    conv2d = ops.conv2d
    monkeypatch.setattr(
        ops, "conv2d", lambda x, w, b=None, **s: conv2d(x, w + 1e-9 * (w - detach(w)), b, **s)
    )
    found = audit(later("resnet18"), against=INSTALLED[:1])
    assert "stages/01/blocks/00/shortcut/weight" in found.comparisons[0].beyond(1e-12)
    assert "linear/weight" not in found.comparisons[0].beyond(1e-12)


@oracles
@pytest.mark.parametrize("nonlinearity", ["relu", "leaky_relu"])
def test_subgradients_at_the_kink(oracle: str, nonlinearity: str) -> None:
    """Inputs of 0 put every argument on the kink, where the libraries have conventions."""
    found = audit(
        problem(x=0.0 * X, bias=True, nonlinearity=nonlinearity, depth=3), against=[oracle]
    )
    assert found.agrees
    assert "layers/02/bias" not in found.zero


@oracles
def test_large_arguments(oracle: str) -> None:
    """Softplus and the loss where e**x overflows, and logits that saturate."""
    for name in ("softplus", "sigmoid", "gelu"):
        found = audit(problem(x=300.0 * X, nonlinearity=name), against=[oracle])
        assert found.agrees, found


@oracles
def test_float32_is_held_against_float64(oracle: str) -> None:
    found = audit(problem("float32", nonlinearity="tanh"), against=[oracle])
    assert found.tolerance == TOLERANCES["float32"]
    assert 1e-9 < found.comparisons[0].error < 1e-5
    assert found.agrees
    assert not audit(problem("float32"), against=[oracle], tolerance=1e-12).agrees


@some_oracle
def test_all_at_once() -> None:
    found = audit(problem(nonlinearity="gelu"))
    assert [c.oracle for c in found.comparisons] == INSTALLED
    assert list(found.absent) == [name for name in ORACLES if name not in INSTALLED]
    assert all(c.version for c in found.comparisons)
    if len(INSTALLED) > 1:
        assert found.spread is not None
        assert 0 < found.spread <= 1e-12


@oracles
def test_nothing_is_changed(oracle: str) -> None:
    """The arguments, NumPy's error handling, warnings' filters, and the libraries' dtypes."""
    given = problem(normalisation="spectral")
    for array in (*given.params.values(), *given.buffers.values(), given.x, given.y):
        array.setflags(write=False)
    before = np.geterr(), list(warnings.filters)
    assert audit(given, against=[oracle]).agrees
    assert (np.geterr(), list(warnings.filters)) == before
    library = pytest.importorskip(oracle)
    if oracle == "jax":
        assert library.numpy.ones(1).dtype == "float32"
    if oracle == "torch":
        assert library.get_default_dtype() == library.float32
        assert library.is_grad_enabled()
        with library.no_grad():
            assert audit(given, against=["torch"]).agrees


def test_oracles_are_imported_when_asked() -> None:
    code = (
        "import sys, npdrt.conform.gradients, npdrt.cli.audit_gradients\n"
        "print({'autograd', 'torch', 'jax'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr


# --- faults ---------------------------------------------------------------------------------


@oracles
def test_a_wrong_derivative_is_seen(oracle: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong by 1e-9 in tanh: the arrays before one differ, the last layer's does not."""
    plant(monkeypatch)
    found = audit(problem(nonlinearity="tanh"), against=[oracle])
    (comparison,) = found.comparisons
    assert not found.agrees
    assert comparison.beyond(1e-12) == ["layers/00/weight", "layers/01/weight", "layers/02/weight"]
    assert comparison.error == pytest.approx(3e-9, rel=1e-3)  # three of them above the first
    assert comparison.worst == "layers/00/weight"
    assert comparison.loss_error <= 1e-12


@some_oracle
def test_a_wrong_array_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    linear = ops.linear

    def wrong(x: Any, weight: Any, bias: Any) -> Any:
        layer = int(bias.name.split("/")[1])
        return linear(x, weight, bias) + (1e-6 * (bias - bias.value) if layer == 1 else 0.0)

    monkeypatch.setattr(ops, "linear", wrong)
    found = audit(problem(bias=True))
    assert [c.beyond(1e-12) for c in found.comparisons] == [["layers/01/bias"]] * len(INSTALLED)


@some_oracle
def test_a_wrong_loss_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A constant in the loss has no gradient, and differs all the same."""
    loss = ops.softmax_cross_entropy
    monkeypatch.setattr(ops, "softmax_cross_entropy", lambda z, y: loss(z, y) + 1e-9)
    found = audit(problem())
    assert not found.agrees
    assert not any(c.beyond(1e-12) for c in found.comparisons)
    assert "differs in the loss" in call("--depth", "1").output


def test_relative() -> None:
    assert relative([1.0, -4.5], [1.0, -5.0]) == pytest.approx(0.1)
    assert relative(0.0, 0.0) == 0.0
    assert relative([1e-300], [0.0]) == math.inf
    assert relative([0.0], [1e-300]) == 1.0
    assert relative(np.ones((2, 3)), np.ones(3)) == math.inf
    assert math.isnan(relative([math.nan, 1.0], [1.0, 1.0]))
    assert relative([math.nan], [0.0]) == math.inf


def test_nan_is_the_worst() -> None:
    theirs = {"a": np.ones(2), "b": np.ones(2), "c": np.ones(2)}
    found = compare(
        "torch", (1.0, {**theirs, "a": 3 * np.ones(2), "b": theirs["b"] * np.nan}), (1.0, theirs)
    )
    assert found.worst == "b"
    assert found.beyond(1.0) == ["a", "b"]
    assert not found.agrees(1e300)


@pytest.mark.parametrize("tolerance", [-1e-12, math.nan, math.inf])
def test_refused_tolerances(tolerance: float) -> None:
    with pytest.raises(Error, match="tolerance: expected a number from 0"):
        audit(problem(), tolerance=tolerance)


def test_refused_models_and_names() -> None:
    class Own(MLP):
        """Might compute anything."""

    given = problem()
    own = Own(4, 5, 5, 3)
    with pytest.raises(Error, match="forward pass of Own; they have MLP"):
        audit(Problem(own, given.params, {}, X, Y))
    with pytest.raises(Error, match="unknown oracle 'tensorflow'; use one of autograd, torch, jax"):
        audit(given, against=["tensorflow"])


# --- absent oracles -------------------------------------------------------------------------


@oracles
def test_an_absent_oracle_is_a_row(oracle: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if len(INSTALLED) < 2:
        pytest.skip("the report needs another oracle")
    hide(monkeypatch, oracle)
    result = call("--depth", "2", "--width", "8")
    assert result.exit_code == 0, result.output
    (row,) = (line for line in result.output.splitlines() if line.startswith(f"{oracle} "))
    assert row.split(maxsplit=1)[1] == f"not installed: {gradients.INSTALL[oracle]}"
    result = call("--against", oracle)
    assert result.exit_code == 4
    assert result.output == f"Error: {oracle}: not installed: {gradients.INSTALL[oracle]}\n"


def test_no_oracle(monkeypatch: pytest.MonkeyPatch) -> None:
    hide(monkeypatch, *ORACLES)
    result = call("--json")
    assert result.exit_code == 4
    assert result.stdout == ""
    for command in ('pip install "npdrt[audit]"', "pip install torch", "pip install jax"):
        assert command in result.stderr
    with pytest.raises(Unavailable, match="torch: not installed: pip install torch"):
        gradients.ask("torch", problem())


@pytest.mark.parametrize("error", ["OSError('libtorch.so\\nis missing')", "import no_such_module"])
def test_a_broken_oracle_is_not_called_absent(
    error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torch.py").write_text(error if error.startswith("import") else f"raise {error}")
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    why = gradients.absence("torch")
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    assert why in (
        "does not import: OSError: libtorch.so",
        "does not import: No module named 'no_such_module'",
    )


# --- the command ----------------------------------------------------------------------------


@some_oracle
def test_the_report() -> None:
    result = call("--model", "mlp", "--depth", "50", "--width", "32", "--batch", "8")
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[0].startswith("mlp, depth 50, width 32, inputs 64, outputs 10, nonlinearity relu")
    assert lines[0].endswith("8 examples of digits, float64, seed 0")
    assert lines[1].endswith("tolerance 1e-12")
    heads = ["oracle", "version", "loss", "overall", "worst", "parameter", "verdict"]
    assert lines[3].split() == heads
    rows = {line.split()[0]: line.split() for line in lines[4:7]}
    assert list(rows) == list(ORACLES)
    for name in INSTALLED:
        assert float(rows[name][4]) <= 1e-12
        assert rows[name][5].startswith("layers/")
        assert rows[name][6] == "agrees"
    assert max(map(len, lines[2:])) <= 100


@some_oracle
def test_the_report_of_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    options = ("--nonlinearity", "tanh", "--depth", "3", "--width", "8")
    result = call(*options)
    assert result.exit_code == 1
    verdict = "layers/00/weight  differs in 2 of 3 arrays; layers/01/weight is one"
    assert result.output.count(verdict) == len(INSTALLED)
    result = call(*options, "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["agrees"] is False
    assert call(*options, "--tolerance", "1e-8").exit_code == 0


@some_oracle
def test_text_and_images() -> None:
    one = ("--against", INSTALLED[0])
    words = ("--model", "transformer", "--data", "sample-text", "--width", "4", "--batch", "3")
    result = call(*words, "--set", "layers=1", "--set", "hidden=4", *one)
    assert result.exit_code == 0, result.output
    assert "heads 2, hidden 4" in result.output
    assert "3 streams of sample-text" in result.output
    result = call("--model", "resnet18", "--width", "2", "--batch", "4", *one)
    assert result.exit_code == 0, result.output
    assert "4 examples of digits" in result.output


@some_oracle
def test_json() -> None:
    result = call("--depth", "3", "--width", "8", "--bias", "--seed", "4", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    settings = {"model": "mlp", "data": "digits", "seed": 4, "dtype": "float64", "batch_size": 32}
    assert settings.items() <= found.items()
    assert found["model_options"]["depth"] == 3
    assert found["model_options"]["bias"] is True
    assert (found["tolerance"], found["zero"], found["agrees"]) == (1e-12, [], True)
    assert [oracle["oracle"] for oracle in found["oracles"]] == INSTALLED
    for oracle in found["oracles"]:
        assert oracle["loss"] == pytest.approx(found["loss"], rel=1e-12)
        assert len(oracle["errors"]) == 6
        assert oracle["error"] == max(oracle["errors"].values())
        assert oracle["errors"][oracle["worst"]] == oracle["error"]
        assert oracle["agrees"] is True


@some_oracle
def test_what_a_reader_is_told() -> None:
    """A net that overflows, and one whose gradients are zero, are not passed over in silence."""
    one = ("--against", INSTALLED[0])
    result = call("--residual", "--depth", "1500", "--width", "20", "--batch", "2", *one)
    assert result.exit_code == 1
    assert "npdrt's loss is not finite: try less depth, or another --init" in result.output
    result = call("--depth", "50", "--width", "2", *one)
    assert result.exit_code == 0
    assert "50 of 50 gradients are zero throughout" in result.output


@some_oracle
def test_data_of_ones_own(tmp_path: Path) -> None:
    labels, targets = tmp_path / "labels.npz", tmp_path / "targets.npz"
    np.savez(labels, x=RNG.standard_normal((9, 2, 4)), y=np.arange(9) % 4)
    np.savez(targets, x=RNG.standard_normal((9, 4)), y=RNG.standard_normal(9))
    result = call("--data", str(labels), "--batch-size", "9")
    assert result.exit_code == 0, result.output
    assert "inputs 8, outputs 4" in result.output
    result = call("--data", str(targets), "--batch-size", "9")
    assert result.exit_code == 2
    assert "y holds targets; the audited loss needs integer labels" in result.output
    result = call("--data", str(labels))
    assert result.exit_code == 2
    assert "batch size: expected 1 to 9, the number of examples; got 32" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--against", "tourch"], "'tourch' is unknown. Did you mean 'torch'?"),
        (["--model", "mpl"], "'mpl' is unknown. Did you mean 'mlp'?"),
        (["--nonlinearity", "swish"], "'swish' is unknown."),
        (["--normalisation", "batch"], "'batch' is unknown."),
        (["--dtype", "float16"], "'float16' is unknown."),
        (["--depth", "0"], "0 is not in the range x>=1"),
        (["--batch", "0"], "0 is not in the range x>=1"),
        (["--tolerance", "-1"], "tolerance: expected a number from 0; got -1.0"),
        (["--tolerance", "nan"], "tolerance: expected a number from 0; got nan"),
        (["--data", "digit"], "unknown data set 'digit'; did you mean 'digits'?"),
        (["extra"], "unexpected extra argument"),
    ],
)
def test_usage(arguments: list[str], message: str) -> None:
    result = call(*arguments)
    assert result.exit_code == 2
    assert message in result.output


OWN = """
from dataclasses import dataclass
from npdrt.models import MLP
@dataclass(frozen=True)
class Own(MLP):
    width: int = 8
    inputs: int = 0
    outputs: int = 0
"""


def test_a_model_of_ones_own_has_no_oracle(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN)
    result = call("--model", f"{tmp_path / 'own.py'}:Own", "--depth", "2")
    assert result.exit_code == 2
    assert "no oracle has the forward pass of Own; they have MLP" in result.output


@some_oracle
def test_a_process() -> None:
    """As a user runs it: nothing on stderr, also where warnings are errors."""
    words = [sys.executable, "-W", "error", "-m", "npdrt", "audit-gradients", "--depth", "3"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count(" agrees") == len(INSTALLED)
