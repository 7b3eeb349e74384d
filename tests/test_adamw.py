"""adamw: PyTorch, optax and adam, its page, and what the referee tells apart."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from edited import RATES, Edited, named, page_has_the_same_bits, problem, run

from npdrt.conform.adapters.adapter import double
from npdrt.conform.rules import RULES
from npdrt.optim import adamw

COMBINATIONS = [
    dict(zip(("betas", "eps", "weight_decay"), values, strict=True))
    for values in itertools.product(((0.9, 0.999), (0.5, 0.25)), (1e-8, 1e-3), (0.0, 0.3))
]
each = pytest.mark.parametrize("settings", COMBINATIONS, ids=lambda s: str([*s.values()]))


@each
def test_pytorch_has_the_same_trajectory(settings: dict[str, Any]) -> None:
    torch = pytest.importorskip("torch")
    w, gradients = problem()
    p = torch.tensor(w, requires_grad=True)
    theirs = torch.optim.AdamW([p], **settings)
    for ours, g, lr in zip(run("adamw", settings, w, gradients), gradients, RATES, strict=True):
        theirs.param_groups[0]["lr"], p.grad = lr, torch.tensor(g)
        theirs.step()
        np.testing.assert_allclose(ours, p.detach().numpy(), rtol=1e-10, atol=1e-12)


def test_the_defaults_are_those_of_pytorch() -> None:
    torch = pytest.importorskip("torch")
    theirs = torch.optim.AdamW([torch.zeros(1)]).defaults
    ours = adamw().settings
    assert {name: theirs[name] for name in ours} == ours


def test_optax_has_the_same_trajectory() -> None:
    optax, jax = pytest.importorskip("optax"), pytest.importorskip("jax")
    w, gradients = problem(steps=8)
    settings = {"betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": 0.3}
    with double(jax, True):
        rule = optax.adamw(0.05, b1=0.8, b2=0.9, eps=1e-3, weight_decay=0.3)
        p = jax.numpy.asarray(w)
        state = rule.init(p)
        for ours, g in zip(
            run("adamw", settings, w, gradients, [0.05] * 8), gradients, strict=True
        ):
            updates, state = rule.update(jax.numpy.asarray(g), state, p)
            p = optax.apply_updates(p, updates)
            np.testing.assert_allclose(ours, np.asarray(p), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@each
def test_it_is_adam_with_decoupled_decay_to_the_bit(dtype: str, settings: dict[str, Any]) -> None:
    w, gradients = problem(dtype)
    page_has_the_same_bits("adamw", settings, w, gradients)
    ours = run("adamw", settings, w, gradients)
    theirs = run("adam", {**settings, "decoupled": True}, w, gradients)
    assert [a.tobytes() for a in ours] == [b.tobytes() for b in theirs]


# --- the referee ----------------------------------------------------------------------------------

PLAIN = Edited(
    "adamw",
    """
def update(w, g, state, *, lr, betas, eps, weight_decay):
    t, n = w.dtype.type, state.get("step", 0) + 1
    b1, b2 = betas
    first = state.get("lr", lr)
    w = w * t(1 - lr * weight_decay)
    m = t(b1) * state.get("exp_avg", 0 * w) + t(1 - b1) * g
    v = t(b2) * state.get("exp_avg_sq", 0 * w) + t(1 - b2) * g * g
    c1, c2 = t(1 - b1**n), t(1 - b2**n)
    largest = np.maximum(v, state.get("largest", 0 * w))
    d = (m / c1) / (np.sqrt(v / c2) + t(eps))
    w = w - t(lr) * d
    return w, {"exp_avg": m, "exp_avg_sq": v, "step": n, "lr": first, "largest": largest}
""",
)
DECAY = "w = w * t(1 - lr * weight_decay)"
STEP = "d = (m / c1) / (np.sqrt(v / c2) + t(eps))"
HAT = {"(np.sqrt(v / c2) + t(eps))": "((np.sqrt(v) + t(eps)) / np.sqrt(c2))"}
AFTER = {DECAY: "", "w - t(lr) * d": "(w - t(lr) * d) * t(1 - lr * weight_decay)"}
KEPT = "d = d * (m * g > 0) / t(max(np.sum(m * g > 0) / max(g.size, 1), 1e-3))"
DIALECTS: dict[str, dict[str, str]] = {
    "published": {},
    "paper": {"lr * weight_decay": "weight_decay * (lr / first if first else 0)"},
    "timm, corrected_weight_decay": {
        "lr * weight_decay": "weight_decay * (lr * lr / first if first else 0)"
    },
    "bitsandbytes": AFTER,
    "transformers": {**AFTER, **HAT},
    "TensorFlow Addons": {"lr * weight_decay": "weight_decay", **HAT},
    "L2": {DECAY: "g = g + t(weight_decay) * w"},
    "BERT": {STEP: "d = m / (np.sqrt(v) + t(eps))"},
    "epsilon-hat": HAT,
    "cautious": {STEP: f"{STEP}; {KEPT}"},
    "AMSGrad": {"np.sqrt(v / c2)": "np.sqrt(largest / c2)"},
}


@pytest.mark.parametrize("name", DIALECTS)
def test_dialects_are_found(name: str) -> None:
    assert named(PLAIN.found(DIALECTS[name])) == (name, {}, ())


def test_every_dialect_has_an_implementation() -> None:
    assert set(DIALECTS) == {d.name for d in RULES["adamw"].dialects}


@pytest.mark.parametrize(
    ("clause", "how", "edits"),
    [
        ("weight decay", "ignored", {DECAY: ""}),
        ("weight decay", "without lr", {"lr * weight_decay": "weight_decay"}),
        ("weight decay", "opposite sign", {"1 - lr * weight_decay": "1 + lr * weight_decay"}),
        ("weight decay", "after the moments", {
            DECAY: "", "(m / c1)": "(m / c1 + t(weight_decay) * w)"
        }),
        ("mask", "cautious, unscaled", {STEP: f"{STEP}; d = d * (m * g > 0)"}),
        ("bias correction", "t too large", {'state.get("step", 0) + 1': 'state.get("step", 0) + 2',
                                            '"step": n': '"step": n - 1'}),
        ("direction", "ascent", {"w - t(lr)": "w + t(lr)"}),
        ("state", "lost", {"return w, {": "return w, {} and {"}),
    ],
)  # fmt: skip
def test_planted_faults_are_found(clause: str, how: str, edits: dict[str, str]) -> None:
    assert PLAIN.found(edits).choices == {clause: how}


@pytest.mark.parametrize(
    "edits",
    [
        {"t(lr) * d": "t(1.01 * lr) * d"},
        {"lr * weight_decay": "lr * 0.99 * weight_decay"},
        {"+ t(eps)": "+ t(2 * eps)"},
        {"t(1 - b2) * g * g": "t(1 - b2) * np.abs(g)"},
    ],
)
def test_a_fault_that_no_clause_names_is_refused(edits: dict[str, str]) -> None:
    assert PLAIN.found(edits).kind not in ("published", "dialect")


@pytest.mark.parametrize(
    ("overrides", "dialect", "beyond"),
    [
        ({}, "published", {}),
        ({"foreach": True}, "published", {}),
        ({"amsgrad": True}, "AMSGrad", {}),
        ({"maximize": True}, "published", {"direction": "of the negated gradient"}),
    ],
)
def test_pytorch_is_recognised(overrides: Any, dialect: str, beyond: dict[str, str]) -> None:
    assert named(PLAIN.library("torch.optim.AdamW", overrides))[:2] == (dialect, beyond)


def test_optax_is_recognised() -> None:
    name, beyond, _ = named(PLAIN.library("optax.adamw", {}))
    assert (name, beyond.keys() - {"precision"}) == ("published", set())
