"""rmsprop: PyTorch and optax, the page, its edges, what the referee tells apart, and runs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import libraries
import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

import npdrt
from npdrt.cli import cli
from npdrt.conform import canonical, targets
from npdrt.conform.adapters.adapter import double
from npdrt.conform.audit import audit
from npdrt.conform.case import Answer, Case, Failure
from npdrt.conform.identify import Finding, identify
from npdrt.conform.rules import RULES
from npdrt.conform.vectors import load
from npdrt.errors import Error
from npdrt.optim import rmsprop

RULE = RULES["rmsprop"]
RATES = (0.1, 0.03, 0.3, 0.01, 0.1, 0.05) * 5
COMBINATIONS = [
    dict(zip(("alpha", "eps", "momentum", "centered", "weight_decay"), values, strict=True))
    for values in itertools.product((0.99, 0.5), (1e-8, 1e-3), (0.0, 0.9), (False, True), (0, 0.1))
]
each = pytest.mark.parametrize(
    "settings", COMBINATIONS, ids=["-".join(map(str, s.values())) for s in COMBINATIONS]
)


def problem(dtype: str = "float64", steps: int = len(RATES)) -> tuple[Any, Any]:
    """A parameter and a gradient for every step, of several sizes."""
    rng = np.random.default_rng(0)
    w, g = rng.normal(size=7), rng.normal(size=(steps, 7)) * 10.0 ** rng.integers(-3, 3, 7)
    return w.astype(dtype), g.astype(dtype)


def run(settings: dict[str, Any], w: Any, gradients: Any, rates: Any = RATES) -> list[Any]:
    """npdrt's parameter after every step."""
    optimizer, params = rmsprop(**settings), {"w": w}
    state, seen = optimizer.init(params), []
    for g, lr in zip(gradients, rates, strict=False):
        params, state = optimizer.update(params, {"w": g}, state, lr=lr)
        seen.append(params["w"])
    return seen


# --- other implementations ------------------------------------------------------------------------


@each
def test_pytorch_has_the_same_trajectory(settings: dict[str, Any]) -> None:
    torch = pytest.importorskip("torch")
    w, gradients = problem()
    p = torch.tensor(w, requires_grad=True)
    theirs = torch.optim.RMSprop([p], **settings)
    for ours, g, lr in zip(run(settings, w, gradients), gradients, RATES, strict=True):
        theirs.param_groups[0]["lr"], p.grad = lr, torch.tensor(g)
        theirs.step()
        np.testing.assert_allclose(ours, p.detach().numpy(), rtol=1e-10, atol=1e-12)


def test_the_defaults_are_those_of_pytorch() -> None:
    torch = pytest.importorskip("torch")
    theirs = torch.optim.RMSprop([torch.zeros(1)]).defaults
    ours = rmsprop().settings
    assert {name: theirs[name] for name in ours} == ours


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_optax_has_the_same_trajectory(momentum: float, centered: bool) -> None:
    """With epsilon outside the root, and at one rate, since its velocity has the rate inside."""
    optax, jax = pytest.importorskip("optax"), pytest.importorskip("jax")
    w, gradients = problem()
    settings = {"alpha": 0.9, "eps": 1e-3, "momentum": momentum, "centered": centered}
    with double(jax, True):
        rule = optax.rmsprop(
            0.05, decay=0.9, eps=1e-3, momentum=momentum, centered=centered, eps_in_sqrt=False
        )
        p = jax.numpy.asarray(w)
        state = rule.init(p)
        for ours, g in zip(run(settings, w, gradients, [0.05] * 30), gradients, strict=True):
            updates, state = rule.update(jax.numpy.asarray(g), state)
            p = optax.apply_updates(p, updates)
            np.testing.assert_allclose(ours, np.asarray(p), rtol=1e-10, atol=1e-12)


# --- the page -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@each
def test_the_page_gives_the_same_bits(dtype: str, settings: dict[str, Any]) -> None:
    w, gradients = problem(dtype)
    state: dict[str, Any] = {"step": 0}
    page = w.tolist()
    for ours, g, lr in zip(run(settings, w, gradients), gradients, RATES, strict=True):
        page = canonical.step("rmsprop", page, g.tolist(), state, lr, dtype, **settings)
        assert ours.dtype == dtype
        np.testing.assert_array_equal(ours.astype(float), page)


@given(st.data())
def test_the_page_gives_the_same_bits_for_any_numbers(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(["float16", "float32", "float64"]))
    number = st.floats(width=int(dtype[5:]))  # type: ignore[arg-type]
    w, *gradients = data.draw(st.lists(st.lists(number, min_size=3, max_size=3), min_size=3))
    settings = data.draw(st.sampled_from(COMBINATIONS))
    state: dict[str, Any] = {"step": 0}
    page = w
    for ours, g, lr in zip(
        run(settings, np.array(w, dtype), np.array(gradients, dtype)),
        gradients,
        RATES,
        strict=False,
    ):
        page = canonical.step("rmsprop", page, g, state, lr, dtype, **settings)
        np.testing.assert_array_equal(ours.astype(float), page)


# --- edges ----------------------------------------------------------------------------------------


def after(g: list[float], steps: int = 1, **settings: Any) -> Any:
    """[3, 4] after steps at lr 0.1 with the same gradient."""
    return run(settings, np.array([3.0, 4.0]), [np.array(g)] * steps, [0.1] * steps)[-1]


def test_the_first_step_has_the_size_that_the_docs_say() -> None:
    np.testing.assert_allclose(after([0.5, -7.0]), [2.0, 5.0], rtol=1e-6)
    np.testing.assert_allclose(after([0.5, -7.0], alpha=0.75), [2.8, 4.2], rtol=1e-6)


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_zero_gradient(momentum: float, centered: bool) -> None:
    settings = {"momentum": momentum, "centered": centered}
    assert after([0.0, 0.0], 3, **settings).tolist() == [3, 4]
    found = after([0.0, 1.0], 3, eps=0.0, **settings)
    assert np.isnan(found).tolist() == [True, False]


@pytest.mark.parametrize("odd", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_stays_in_its_element(odd: float) -> None:
    for settings in COMBINATIONS:
        found = after([odd, 1.0], 3, **settings)
        assert np.isnan(found).tolist() == [True, False], settings


def test_equal_gradients_make_a_centered_element_nan_as_in_pytorch() -> None:
    torch = pytest.importorskip("torch")
    g = np.random.default_rng(0).normal(size=1000).astype("float32")
    p = torch.zeros(1000, requires_grad=True)
    theirs = torch.optim.RMSprop([p], centered=True)
    p.grad = torch.tensor(g)
    for _ in range(2000):
        theirs.step()
    ours = run({"centered": True}, np.zeros(1000, "float32"), [g] * 2000, [0.01] * 2000)[-1]
    assert np.isnan(ours).any()
    assert np.isnan(p.detach().numpy()).any()
    assert not np.isnan(ours).all()


@pytest.mark.parametrize(
    ("settings", "slots"),
    [
        ({}, ["square_avg"]),
        ({"centered": True}, ["square_avg", "grad_avg"]),
        ({"momentum": 0.9}, ["square_avg", "momentum"]),
        ({"momentum": 0.9, "centered": True}, ["square_avg", "grad_avg", "momentum"]),
    ],
)
def test_only_the_slots_that_are_needed_are_kept(settings: dict[str, Any], slots: Any) -> None:
    optimizer, w = rmsprop(**settings), {"w": np.ones(3, "float32")}
    state = optimizer.init(w)
    assert list(state) == [*(f"w/{slot}" for slot in slots), "step"]
    assert list(optimizer.update(w, w, state)[1]) == list(state)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"alpha": 1.0}, r"alpha must lie in \[0, 1\); got 1.0"),
        ({"eps": -1e-8}, "eps must be a finite number >= 0"),
        ({"momentum": math.nan}, "momentum must be a finite number >= 0"),
        ({"centered": "yes"}, "centered must be true or false"),
        ({"weight_decay": -1}, "weight_decay must be a finite number >= 0"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(Error, match=words):
        rmsprop(**settings)


# --- the referee ----------------------------------------------------------------------------------

PLAIN = """
def update(w, g, state, *, lr, alpha, eps, momentum, centered, weight_decay):
    t = w.dtype.type
    decay, m = t(weight_decay), state.get("grad_avg", 0 * w)
    g = g + decay * w
    v = state.get("square_avg", 0 * w)
    v = t(alpha) * v + t(1 - alpha) * g * g
    m = t(alpha) * m + t(1 - alpha) * g
    x = v - m * m if centered else v
    u = g / (np.sqrt(x) + t(eps))
    b = t(momentum) * state.get("momentum", 0 * w) + u
    w = w - t(lr) * (b if momentum else u)
    return w, {"square_avg": v, "grad_avg": m, "momentum": b, "lr": state.get("lr", lr)}
"""
INSIDE = {"+ u": "+ t(lr) * u", "t(lr) * (b if momentum else u)": "(b if momentum else t(lr) * u)"}
# clause, alternative, {a part of PLAIN: other text}
PLANTED: list[tuple[str, str, dict[str, str]]] = [
    ("epsilon", "inside the root", {"(np.sqrt(x) + t(eps))": "np.sqrt(x + t(eps))"}),
    ("epsilon", "ignored", {" + t(eps)": ""}),
    ("first mean of squares", "one", {'"square_avg", 0 * w': '"square_avg", 0 * w + 1'}),
    ("mean of squares", "without d^2 weight", {"t(1 - alpha) * g * g": "g * g"}),
    ("mean of squares", "of before", {
        "    v = t(alpha) * v": "    old = v\n    v = t(alpha) * v",
        "v - m * m if centered else v": "old - m * m if centered else old",
    }),
    ("centered", "never", {"v - m * m if centered else v": "v"}),
    ("centered", "always", {" if centered else v": ""}),
    ("velocity", "average", {"+ u": "+ t(1 - momentum) * u"}),
    ("velocity", "nesterov", {"(b if momentum else u)": "(u + t(momentum) * b)"}),
    ("weight decay", "subtracted", {"g + decay * w": "g - decay * w"}),
    ("weight decay", "ignored", {"g + decay * w": "g"}),
    ("weight decay", "decoupled", {"g = g + decay * w": "w = w * t(1 - lr * weight_decay)"}),
    ("weight decay", "without lr", {"g = g + decay * w": "w = w * t(1 - weight_decay)"}),
    ("weight decay", "after the step", {
        "    g = g + decay * w\n": "", "return w,": "return w * t(1 - lr * weight_decay),"
    }),
    ("direction", "ascent", {"w - t(lr)": "w + t(lr)"}),
    ("learning rate precision", "float16", {"w - t(lr)": "w - t(np.float16(lr))"}),
    ("learning rate of", "the first step", {"w - t(lr)": 'w - t(state.get("lr", lr))'}),
    ("state", "lost", {"    return w, {": "    return w, {} and {"}),
]  # fmt: skip
BIAS = {
    "v - m * m if centered else v": "(v - m * m / c if centered else v) / c",
    "    v = t(alpha)": (
        '    n = state.get("step", 0) + 1\n    c = t(1 - alpha**n)\n    v = t(alpha)'
    ),
    '"lr": state': '"step": n, "lr": state',
}
ADAGRAD = {"t(alpha) * v + t(1 - alpha) * g * g": "v + g * g"}
DIALECTS: dict[str, dict[str, str]] = {
    "published": {},
    "optax": {**PLANTED[0][2], **INSIDE},
    "optax, eps_in_sqrt=False": INSIDE,
    "TensorFlow 1": {**PLANTED[0][2], **INSIDE, **PLANTED[2][2]},
    "Adagrad": ADAGRAD,
}


def changed(edits: dict[str, str]) -> Callable[..., Any]:
    """PLAIN with texts replaced."""
    source, space = PLAIN, {"np": np}
    for old, new in edits.items():
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    exec(source, space)
    update: Callable[..., Any] = space["update"]
    return update


@cache
def cases() -> list[Case]:
    """The vectors in float32, but the large and long ones."""
    tests = load("rmsprop", ("float32",), large=False)
    return [t.case for t in tests if t.case.result == "valid"]


def answers(update: Callable[..., Any], case: Case) -> tuple[Answer, ...]:
    """What an implementation in NumPy makes of a case."""
    w, given = case.w.astype("float32"), case.state or {}
    state = {k: v if k == "step" else v.astype("float32") for k, v in given.items()}
    found = []
    for step in case.steps:
        w, state = update(w, step.g.astype("float32"), state, lr=step.lr, **case.settings)
        found.append(Answer(np.asarray(w, dtype=float)))
    return tuple(found)


def found(edits: dict[str, str], centered: tuple[bool, ...] = (False, True)) -> Finding:
    """What the referee finds in PLAIN with texts replaced."""
    update = changed(edits)
    asked = [case for case in cases() if case.settings["centered"] in centered]
    with np.errstate(all="ignore"):
        return identify(RULE, [(case, answers(update, case)) for case in asked])


@pytest.mark.parametrize("name", DIALECTS)
def test_dialects_are_found(name: str) -> None:
    finding = found(DIALECTS[name])
    assert finding.dialect is not None
    assert (finding.dialect.name, finding.extra_choices, finding.indistinguishable) == (
        name,
        {},
        (),
    )


def test_every_dialect_has_an_implementation() -> None:
    assert set(DIALECTS) == {d.name for d in RULE.dialects}


@pytest.mark.parametrize(("clause", "how", "edits"), PLANTED, ids=lambda x: str(x)[:24])
def test_planted_faults_are_found(clause: str, how: str, edits: dict[str, str]) -> None:
    assert found(edits).choices == {clause: how}


def test_bias_correction_is_found() -> None:
    """Of an implementation that is not centered: its first variance would be that of rounding."""
    assert found(BIAS, (False,)).choices == {"bias correction": "corrected"}


@pytest.mark.parametrize(
    "edits",
    [
        {"np.sqrt(x) + t(eps)": "np.maximum(np.sqrt(x), t(eps))"},
        {"t(1 - alpha) * g * g": "t(1 - alpha) * np.abs(g)"},
        {"+ t(eps)": "+ t(2 * eps)"},
        {"t(momentum) *": "t(0.99 * momentum) *"},
    ],
)
def test_a_fault_that_no_clause_names_is_refused(edits: dict[str, str]) -> None:
    assert found(edits).kind not in ("published", "dialect")


@pytest.mark.parametrize(
    ("spec", "overrides", "dialect", "beyond"),
    [
        ("torch.optim.RMSprop", {}, "published", {}),
        ("torch.optim.RMSprop", {"foreach": True}, "published", {}),
        ("optax.rmsprop", {}, "optax", {}),
        ("optax.rmsprop", {"eps_in_sqrt": False}, "optax, eps_in_sqrt=False", {}),
        ("optax.rmsprop", {"initial_scale": 1.0}, "TensorFlow 1", {}),
        ("optax.rmsprop", {"nesterov": True}, "optax", {"velocity": "nesterov"}),
    ],
)
def test_libraries(spec: str, overrides: Any, dialect: str, beyond: dict[str, str]) -> None:
    """What `npdrt audit` finds, without the large and the long cases."""
    target = libraries.find(spec, overrides)
    asked = [case for case in cases() if libraries.usual(target, case)]
    pairs = list(zip(asked, libraries.outcomes(target, asked), strict=True))
    lacking = [o for _, o in pairs if isinstance(o, Failure)]
    assert {o.kind for o in lacking} <= {"not offered"}
    assert bool(lacking) == spec.startswith("optax")  # it has no weight decay
    finding = identify(RULE, [(c, o) for c, o in pairs if not isinstance(o, Failure)])
    assert finding.dialect is not None
    assert (finding.dialect.name, finding.extra_choices) == (dialect, beyond)


OURS = """
import numpy as np
from npdrt.optim import rmsprop


def update(w, g, state, *, lr, alpha, eps, momentum, centered, weight_decay):
    rule = rmsprop(alpha=alpha, eps=eps, momentum=momentum, centered=centered,
                   weight_decay=weight_decay)
    given = {k if k == "step" else f"w/{k}": np.asarray(v) for k, v in state.items()}
    params, state = rule.update({"w": w}, {"w": g}, rule.init({"w": w}) | given, lr=lr)
    return params["w"], {k.removeprefix("w/"): v for k, v in state.items()}
"""


def test_npdrt_agrees_to_the_bit(tmp_path: Path) -> None:
    (tmp_path / "ours.py").write_text(OURS)
    target = targets.find(f"{tmp_path / 'ours.py'}:update", rule="rmsprop")
    found = audit(target, ("float16", "float32"), limit=60.0)
    assert found.verdict == "agrees to the bit", found.failures


# --- commands -------------------------------------------------------------------------------------


def call(*words: Any) -> str:
    done = CliRunner().invoke(cli, [*map(str, words)])
    assert done.exit_code == 0, done.output
    return " ".join(done.stdout.split())


def test_a_run_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    rule = ("--optimizer", "rmsprop", "--alpha", 0.9, "--momentum", 0.5, "--centered")
    small = (*rule, "--width", 8, "--schedule", "constant", "--epochs")
    call("train", *small, 2, "--out", tmp_path / "whole")
    call("train", *small, 1, "--out", tmp_path / "parts")
    call("train", *rule, "--epochs", 2, "--out", tmp_path / "parts", "--resume")
    whole, parts = (npdrt.load(tmp_path / run / "checkpoint.h5") for run in ("whole", "parts"))
    for one, other in ((whole.params, parts.params), (whole.state, parts.state)):
        assert {n: v.tobytes() for n, v in one.items()} == {
            n: v.tobytes() for n, v in other.items()
        }
    assert {n.rpartition("/")[2] for n in whole.state} >= set(RULE.slots)
    assert whole.meta["config"]["lr"] == 0.01
    assert "the same" in call("explain", tmp_path / "whole", tmp_path / "parts")


def test_commands_offer_it() -> None:
    assert "rmsprop: share of the mean of squares that is kept. [default: 0.99]" in call(
        "train", "--help"
    )
    assert " sqrt" in call("explain", "--model", "mlp", "--optimizer", "rmsprop")
