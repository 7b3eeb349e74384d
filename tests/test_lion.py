"""lion: optax, its page, its edges, and what the referee tells apart."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from edited import Edited, named, page_has_the_same_bits, problem, run

from npdrt.conform.adapters.adapter import double
from npdrt.conform.rules import RULES

COMBINATIONS = [
    dict(zip(("betas", "weight_decay"), values, strict=True))
    for values in itertools.product(((0.9, 0.99), (0.5, 0.25), (0.0, 0.0)), (0.0, 0.3))
]
each = pytest.mark.parametrize("settings", COMBINATIONS, ids=lambda s: str([*s.values()]))


@pytest.mark.parametrize("settings", COMBINATIONS[:2])
def test_optax_has_the_same_trajectory(settings: dict[str, Any]) -> None:
    optax, jax = pytest.importorskip("optax"), pytest.importorskip("jax")
    w, gradients = problem()
    b1, b2 = settings["betas"]
    with double(jax, True):
        rule = optax.lion(0.05, b1=b1, b2=b2, weight_decay=settings["weight_decay"])
        p = jax.numpy.asarray(w)
        state = rule.init(p)
        for ours, g in zip(
            run("lion", settings, w, gradients, [0.05] * 30), gradients, strict=True
        ):
            updates, state = rule.update(jax.numpy.asarray(g), state, p)
            p = optax.apply_updates(p, updates)
            np.testing.assert_allclose(ours, np.asarray(p), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@each
def test_the_page_gives_the_same_bits(dtype: str, settings: dict[str, Any]) -> None:
    w, gradients = problem(dtype)
    w[0], gradients[:, 0], gradients[3:9, 1], gradients[5, 2] = -0.0, -0.0, 0.0, math.inf
    with np.errstate(all="ignore"):
        page_has_the_same_bits("lion", settings, w, gradients)


def after(*g: float, **settings: Any) -> list[float]:
    """[1] after steps at lr 0.25 with these gradients."""
    return [
        float(x[0]) for x in run("lion", settings, np.ones(1), np.array(g)[:, None], [0.25] * 9)
    ]


def test_every_element_moves_by_the_rate() -> None:
    assert after(1e-30, 7.0, 0.1) == [0.75, 0.5, 0.25]
    assert after(0.0, 0.0) == [1.0, 1.0]
    assert after(0.0, weight_decay=0.5) == [0.875]
    assert after(1.0, 0.0, -0.01) == [0.75, 0.5, 0.25]  # the momentum outlives the gradient
    assert after(1.0, -0.5) == [0.75, 1.0]


def test_gradients_that_are_not_finite_stay_in_their_element() -> None:
    assert np.isnan(after(math.nan, 1.0)).all()
    found = after(math.inf, 1.0, -math.inf)
    assert found[:2] == [0.75, 0.5]
    assert math.isnan(found[2])


# --- the referee ----------------------------------------------------------------------------------

PLAIN = Edited(
    "lion",
    """
def update(w, g, state, *, lr, betas, weight_decay):
    t = w.dtype.type
    b1, b2 = betas
    old = state.get("exp_avg", 0 * w)
    w = w * t(1 - lr * weight_decay)
    m = t(b2) * old + t(1 - b2) * g
    u = np.sign(t(b1) * old + t(1 - b1) * g)
    w = w - t(lr) * u
    return w, {"exp_avg": m, "lr": state.get("lr", lr)}
""",
)
DECAY = "w = w * t(1 - lr * weight_decay)"
STEP = "u = np.sign(t(b1) * old + t(1 - b1) * g)"
KEPT = "u = u * (u * g > 0)"
SHARE = "max(np.sum(u * g > 0) / max(g.size, 1), 1e-3)"
DIALECTS: dict[str, dict[str, str]] = {
    "published": {},
    "L2": {DECAY: "g = g + t(weight_decay) * w"},
    "cautious": {STEP: f"{STEP}; s = {SHARE}; {KEPT} / t(s)"},
    "Signum": {STEP: "u = np.sign(m)"},
}


@pytest.mark.parametrize("name", DIALECTS)
def test_dialects_are_found(name: str) -> None:
    assert named(PLAIN.found(DIALECTS[name])) == (name, {}, ())


def test_every_dialect_has_an_implementation() -> None:
    assert set(DIALECTS) == {d.name for d in RULES["lion"].dialects}


@pytest.mark.parametrize(
    ("clause", "how", "edits"),
    [
        ("sign of", "momentum of before", {STEP: "u = np.sign(old)"}),
        ("sign of", "gradient", {STEP: "u = np.sign(g)"}),
        ("momentum", "without g weight", {"t(1 - b2) * g": "g"}),
        ("momentum", "by beta1", {"t(b2) * old + t(1 - b2)": "t(b1) * old + t(1 - b1)"}),
        ("betas", "exchanged", {"b1, b2 = betas": "b2, b1 = betas"}),
        ("weight decay", "ignored", {DECAY: ""}),
        ("weight decay", "without lr", {"lr * weight_decay": "weight_decay"}),
        ("weight decay", "opposite sign", {"1 - lr * weight_decay": "1 + lr * weight_decay"}),
        ("weight decay", "after the step", {
            DECAY: "", "w - t(lr) * u": "(w - t(lr) * u) * t(1 - lr * weight_decay)"
        }),
        ("mask", "cautious, unscaled", {STEP: f"{STEP}; {KEPT}"}),
        ("direction", "ascent", {"w - t(lr)": "w + t(lr)"}),
        ("learning rate of", "the first step", {
            "b1, b2 = betas": 'b1, b2 = betas; lr = state.get("lr", lr)'
        }),
        ("state", "lost", {"return w, {": "return w, {} and {"}),
    ],
)  # fmt: skip
def test_planted_faults_are_found(clause: str, how: str, edits: dict[str, str]) -> None:
    assert PLAIN.found(edits).choices == {clause: how}


@pytest.mark.parametrize(
    "edits",
    [
        {"t(lr) * u": "t(1.01 * lr) * u"},
        {"lr * weight_decay": "lr * 0.99 * weight_decay"},
        {"np.sign(": "np.tanh("},
        {"t(b1) * old + t(1 - b1)": "t(0.5 * b1) * old + t(1 - b1)"},
    ],
)
def test_a_fault_that_no_clause_names_is_refused(edits: dict[str, str]) -> None:
    assert PLAIN.found(edits).kind not in ("published", "dialect")


def test_optax_is_recognised() -> None:
    assert named(PLAIN.library("optax.lion", {}))[:2] == ("published", {})
