"""`npdrt distance`: what it says against plain NumPy and mpmath, and what it refuses."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import mpmath
import numpy as np
import pytest
from click.testing import CliRunner, Result

import npdrt
from npdrt import trust
from npdrt.cli import cli
from npdrt.models import MLP
from npdrt.train import Config, train
from npdrt.trust import Net, Pair

TALL = {"depth": 3, "width": 5, "nonlinearity": "leaky_relu"}  # 3-5-5-6: no layer contracts


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six noisy groups of points in three dimensions, with a test set."""
    path = tmp_path_factory.mktemp("data") / "blobs.npz"
    rng = np.random.default_rng(2)
    y, y_test = np.arange(60) % 6, np.arange(12) % 6
    x, x_test = (rng.normal(size=(len(labels), 3)) for labels in (y, y_test))
    np.savez(path, x=x, y=y, x_test=x_test, y_test=y_test)
    return path


@pytest.fixture(scope="module")
def tall(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two epochs; checkpoint.prev.h5 is of the first."""
    run = tmp_path_factory.mktemp("runs") / "tall"
    train(Config(data=str(data), model_options=TALL, epochs=2), run)
    return run


def distance(*words: Any, code: int = 0) -> Result:
    result = CliRunner().invoke(cli, ["distance", *map(str, words)], prog_name="npdrt")
    assert result.exit_code == code, result.output
    return result


def reported(*words: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(distance(*words, "--json").stdout)
    return found


def saved(path: Path, params: dict[str, Any], **meta: Any) -> Path:
    npdrt.save(path, params, meta=meta)
    return path


def described(model: MLP, data: str = "digits") -> dict[str, Any]:
    """The configuration that a run of `model` would keep."""
    fields = ("depth", "width", "bias", "nonlinearity", "output_nonlinearity", "residual")
    options = {name: getattr(model, name) for name in fields}
    return {"model": "mlp", "model_options": options, "data": data, "standardise": True}


# --- what it says -----------------------------------------------------------------------------


def test_layers_and_totals(tall: Path) -> None:
    """Every number, in plain NumPy and at 60 digits."""
    a, b = (npdrt.load(tall / f"checkpoint{name}.h5").params for name in (".prev", ""))
    found = reported(tall / "checkpoint.prev.h5", tall, "--conditioning")
    assert [found[name]["step"] for name in "ab"] == [2, 4]
    assert found["b"]["file"] == str(tall / "checkpoint.h5")
    assert list(found["layers"]) == list(a)
    assert found["others"] == []
    r = []
    for name, d in found["layers"].items():
        before, after = (p[name].astype(np.float64) for p in (a, b))
        change = after - before
        values = [np.linalg.svd(m, compute_uv=False) for m in (before, after, change)]
        shift = np.linalg.norm(values[1] - values[0]) / np.linalg.norm(before)
        r.append(np.linalg.norm(change) / np.linalg.norm(before))
        assert d.pop("shape") == list(before.shape)
        expected = {
            "norm": np.linalg.norm(before),
            "norm_after": np.linalg.norm(after),
            "relative_perturbation": r[-1],
            "condition_number": values[0][0] / values[0][-1],
            "condition_number_after": values[1][0] / values[1][-1],
            "condition_number_of_change": values[2][0] / values[2][-1],
            "relative_spectral_shift": shift,
        }
        assert d == pytest.approx(expected, rel=1e-9)
        assert shift <= r[-1]
    product, square = (math.prod(1 + v**k for v in map(mpmath.mpf, r)) for k in (1, 2))
    surrogate = sum(mpmath.mpf(v) ** 6 for v in r) / 3
    sizes = [np.sum((b[n].astype(np.float64) - a[n]) ** 2) for n in a]
    totals = {
        "deep_relative_trust": product - 1,
        "log_deep_relative_trust": mpmath.log(product),
        "squared_deep_relative_trust": square - 1,
        "log_squared_deep_relative_trust": mpmath.log(square),
        "surrogate_trust": surrogate,
        "log_surrogate_trust": mpmath.log(surrogate),
        "euclidean_trust": sum(sizes),
    }
    assert found["totals"] == pytest.approx({k: float(v) for k, v in totals.items()}, rel=1e-12)


def test_bounds_of_a_tall_net(tall: Path, data: Path) -> None:
    """All of them, guaranteed, and held against the first inputs of the test set."""
    files = [tall / "checkpoint.prev.h5", tall / "checkpoint.h5"]
    found = reported(*files, "--samples", 4)["bounds"]
    nets = [Net.from_params(npdrt.load(f).params, "leaky_relu") for f in files]
    pair = Pair(*nets)
    plain = reported(*files)["bounds"]
    expected = trust.all_bounds(pair)
    inputs = npdrt.data.load(str(data)).x_test[:4]
    assert len(found) == len(plain) == len(expected) == 4 + 3 * 4
    for told, alone, bound in zip(found, plain, expected, strict=True):
        assert (told["name"], told["layer"]) == (bound.name, bound.layer)
        assert told["value"] == pytest.approx(bound.value, rel=1e-12)
        assert alone["measured"] is None
        assert told["guaranteed"]
        assert told["holds_assumptions"] == alone["holds_assumptions"] == bound.holds_assumptions
        assert told["measured"] <= told["value"]
    changes = []
    for x in inputs:
        before, after = (net(x) for net in nets)
        changes.append(np.linalg.norm(after - before) / np.linalg.norm(before))
    assert max(changes) > changes[0]
    assert found[0]["measured"] == pytest.approx(max(changes), rel=1e-12)
    (v1, *_) = [b for b in found if b["name"] == "v1, Theorem 1"]
    assert v1["measured"] == pytest.approx(max(changes) ** 2, rel=1e-12)


def test_an_input_of_zeros(tmp_path: Path) -> None:
    """f(0) = 0 has no relative change, and the theorem for f does not speak of it."""
    x = np.eye(3)
    np.savez(
        tmp_path / "zero.npz", x=x, y=np.arange(3), x_test=x * [[1], [0], [1]], y_test=[0, 1, 2]
    )
    model = MLP(depth=2, width=3, inputs=3, outputs=3, nonlinearity="leaky_relu")
    config = {**described(model, str(tmp_path / "zero.npz")), "standardise": False}
    files = [
        saved(tmp_path / f"{seed}.h5", model.init(seed=seed), config=config) for seed in (0, 1)
    ]
    for samples, sound in ((1, True), (3, False)):
        told = reported(*files, "--samples", samples)["bounds"][0]
        assert told["guaranteed"] == told["holds_assumptions"]["x is not 0"] == sound
        assert (told["measured"] is not None) == sound


def test_text(tall: Path) -> None:
    """The same for a person, in 80 columns."""
    text = distance(
        tall / "checkpoint.prev.h5", tall, "--conditioning", "--samples", 2
    ).stdout.replace(str(tall), "RUN")
    assert text.startswith("A: RUN/checkpoint.prev.h5, step 2\nB: RUN/checkpoint.h5, step 4\n\n")
    assert "\nlayer             shape  norm in A" in text
    assert "\ncondition numbers  A " in text
    assert "\ndeep relative trust  L = 3\n" in text
    assert "\nbound on                relative change of  at most" in text
    assert "tall (not printed): yes" in " ".join(text.split())
    rows = [line.split() for line in text.splitlines() if line.startswith("v2, Theorem 1 a)")]
    assert rows[0][-1] == "yes"
    assert float(rows[0][-2]) <= float(rows[0][-3])
    assert max(map(len, text.splitlines())) <= 80
    assert text.count("guaranteed") == 1


def test_a_deep_net(tmp_path: Path) -> None:
    """Bounds beyond float64 are told all the same; the table stays narrow."""
    model = MLP(depth=120, width=9, inputs=9, outputs=9, nonlinearity="leaky_relu")
    rng = np.random.default_rng(0)
    before = model.init(seed=0, dtype="float64")
    after = {n: w * rng.uniform(1, 2e3) + rng.normal(size=w.shape) for n, w in before.items()}
    files = [
        saved(tmp_path / name, params, config=described(model))
        for name, params in (("a.h5", before), ("b.h5", after))
    ]
    found = reported(*files)
    assert found["totals"]["deep_relative_trust"] is None  # inf is no JSON
    r = [mpmath.mpf(d["relative_perturbation"]) for d in found["layers"].values()]
    log = mpmath.log(math.prod(1 + v for v in r))
    assert found["totals"]["log_deep_relative_trust"] == pytest.approx(float(log), rel=1e-12)
    first = found["bounds"][0]
    assert (first["name"], first["value"]) == ("v2, Theorem 1 a)", None)
    text = distance(*files).stdout
    (row,) = [line for line in text.splitlines() if line.startswith("v2, Theorem 1 a)  ")]
    shown = next(word for word in row.split() if "e+" in word)
    assert mpmath.log(mpmath.mpf(shown)) == pytest.approx(first["log_value"], rel=1e-6)
    assert "layers/119/weight" in text
    assert max(map(len, text.splitlines())) <= 80


def test_nothing_moved(tall: Path) -> None:
    """Every distance is exactly 0; a change of 0 has no condition number."""
    found = reported(tall, tall, "--conditioning", "--samples", 1)
    assert {d["relative_perturbation"] for d in found["layers"].values()} == {0}
    totals = found["totals"]
    logs = {"log_surrogate_trust": None}  # of 0
    assert {k: v for k, v in totals.items() if k not in logs} == dict.fromkeys(
        (k for k in totals if k not in logs), 0
    )
    assert totals["log_surrogate_trust"] is None
    assert all(d["condition_number_of_change"] is None for d in found["layers"].values())
    assert all(bound["measured"] == 0 for bound in found["bounds"])
    assert " -  " in distance(tall, tall, "--conditioning").stdout


def test_biases_are_no_layers(tmp_path: Path) -> None:
    """They may even be zero; the theorem for f says that there is one."""
    model = MLP(depth=2, width=4, inputs=3, outputs=5, bias=True, nonlinearity="identity")
    before = model.init(seed=0)
    after = {n: w * np.float32(1.1) + np.float32(0.01) for n, w in before.items()}
    files = [
        saved(tmp_path / name, params, config=described(model))
        for name, params in (("a.h5", before), ("b.h5", after))
    ]
    found = reported(*files)
    assert found["others"] == ["layers/00/bias", "layers/01/bias"]
    assert list(found["layers"]) == ["layers/00/weight", "layers/01/weight"]
    assert not found["bounds"][0]["holds_assumptions"]["no bias"]
    assert "not layers, left out: layers/00/bias, layers/01/bias" in distance(*files).stdout


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"nonlinearity": "tanh"}, "the theorems know identity, leaky_relu, relu; this network"),
        ({"residual": True}, "perceptrons without skip connections"),
        ({"model": "mine.py:Mine"}, "these are of another model"),
        ({"config": None}, "the checkpoints do not say what model they are of"),
        ({"config": {"model": "mlp"}}, "the checkpoints do not say what model they are of"),
        ({"other": "identity"}, "A and B differ in one of nonlinearity"),
    ],
)
def test_no_bounds(changes: dict[str, Any], reason: str, tmp_path: Path) -> None:
    """The distances are there all the same, and why the bounds are not."""
    fields = {k: v for k, v in changes.items() if k in ("nonlinearity", "residual")}
    model = MLP(depth=2, width=4, inputs=3, outputs=5, **fields)
    params = model.init(seed=0)
    config = described(model) | {k: v for k, v in changes.items() if k == "model"}
    config = changes.get("config", config)
    a = saved(tmp_path / "a.h5", params, config=config)
    if "other" in changes:
        config = described(MLP(depth=2, width=4, inputs=3, outputs=5, nonlinearity="identity"))
    b = saved(tmp_path / "b.h5", {n: 2 * w for n, w in params.items()}, config=config)
    found = reported(a, b)
    assert found["bounds"] == []
    assert reason in found["no_bounds"]
    assert found["totals"]["deep_relative_trust"] == pytest.approx(3)
    assert reason in " ".join(distance(a, b).stdout.split())
    assert reason in " ".join(distance(a, b, "--samples", 1, code=2).output.split())


def test_bounds_left_out(tall: Path) -> None:
    found = reported(tall, tall, "--no-bounds")
    assert (found["bounds"], found["no_bounds"]) == ([], "not asked for")
    assert "condition_number" not in found["layers"]["layers/00/weight"]
    assert "bounds: none; not asked for" in distance(tall, tall, "--no-bounds").stdout


# --- what it refuses --------------------------------------------------------------------------


def test_errors(tall: Path, tmp_path: Path) -> None:
    weights = {"w": np.ones((2, 2)), "v": np.eye(3)}
    good = saved(tmp_path / "good.h5", weights)
    cases: list[tuple[list[Any], int, str]] = [
        ([tall], 2, "Missing argument 'B'"),
        ([tall, tmp_path / "gone"], 2, f"{tmp_path / 'gone'} does not exist"),
        ([tall, tmp_path], 2, f"{tmp_path} holds no run"),
        ([tall, good], 2, "the layers before and after differ in"),
        ([tall, tall / "trace.h5"], 3, "expected a checkpoint; it holds 'trace'"),
        ([tall, tall, "--samples", 1, "--no-bounds"], 2, "which --no-bounds leaves out"),
    ]
    others: dict[str, dict[str, Any]] = {
        "shape": {**weights, "v": np.eye(4)},
        "name": {"w": weights["w"], "u": weights["v"]},
        "zero": {**weights, "v": np.zeros((3, 3))},
        "flat": {"gain": np.ones(3)},
    }
    files = {name: saved(tmp_path / f"{name}.h5", params) for name, params in others.items()}
    cases += [
        (
            [good, files["shape"]],
            2,
            "v has shape (3, 3) before and (4, 4) after; both must",
        ),
        ([good, files["name"]], 2, "differ in u, v"),
        ([files["zero"], good], 2, "a change relative to v, whose norm is 0"),
        ([files["flat"], files["flat"]], 2, "got no layers"),
    ]
    damaged = tmp_path / "damaged.h5"
    whole = good.read_bytes()
    damaged.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    cases += [([good, damaged], 3, str(damaged)), ([damaged, good], 3, str(damaged))]
    for words, code, message in cases:
        result = distance(*words, code=code)
        assert message in " ".join(result.output.split()), result.output
        assert result.stdout == ""
    assert distance(good, files["zero"]).exit_code == 0  # relative to `good` all is defined
