"""lamb: optax, its page, real arithmetic, and what the referee tells apart."""

from __future__ import annotations

import inspect
import itertools
import math
from dataclasses import replace
from typing import Any

import mpmath
import numpy as np
import pytest
from edited import RATES, Edited, answers, named, page_has_the_same_bits, problem, run

from npdrt.conform.adapters.adapter import double
from npdrt.conform.case import Answer, Case
from npdrt.conform.formats import FORMATS
from npdrt.conform.identify import identify
from npdrt.conform.rules import RULES
from npdrt.conform.vectors import load
from npdrt.optim import lamb

COMBINATIONS = [
    dict(zip(("betas", "eps", "weight_decay"), values, strict=True))
    for values in itertools.product(((0.9, 0.999), (0.5, 0.25)), (1e-6, 1e-3), (0.0, 0.3))
]
each = pytest.mark.parametrize("settings", COMBINATIONS, ids=lambda s: str([*s.values()]))


@pytest.mark.parametrize("settings", COMBINATIONS[3::4])
def test_optax_has_the_same_trajectory(settings: dict[str, Any]) -> None:
    optax, jax = pytest.importorskip("optax"), pytest.importorskip("jax")
    w, gradients = problem(steps=12)
    b1, b2 = settings["betas"]
    with double(jax, True):
        rule = optax.lamb(0.05, b1, b2, settings["eps"], weight_decay=settings["weight_decay"])
        p = jax.numpy.asarray(w)
        state = rule.init(p)
        for ours, g in zip(
            run("lamb", settings, w, gradients, [0.05] * 12), gradients, strict=True
        ):
            updates, state = rule.update(jax.numpy.asarray(g), state, p)
            p = optax.apply_updates(p, updates)
            np.testing.assert_allclose(ours, np.asarray(p), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@each
def test_the_page_gives_the_same_bits(dtype: str, settings: dict[str, Any]) -> None:
    w, gradients = problem(dtype)
    w[0], gradients[:, 0], gradients[3:9, 1], gradients[5:, 2] = -0.0, -0.0, 0.0, math.inf
    with np.errstate(all="ignore"):
        page_has_the_same_bits("lamb", settings, w, gradients)


def exactly(w: Any, gradients: Any, betas: Any, eps: float, weight_decay: float) -> Any:
    """Algorithm 2 of You et al. in 60 digits, as it is printed, from w to the last step."""
    mp = mpmath.mp.clone()
    mp.dps = 60
    x = [mp.mpf(float(v)) for v in w]
    b1, b2, eps, decay = map(mp.mpf, (*betas, eps, weight_decay))
    m = v = [mp.mpf(0)] * len(x)
    for t, (g, lr) in enumerate(zip(gradients, RATES, strict=False), 1):
        g = [mp.mpf(float(y)) for y in g]
        m = [b1 * a + (1 - b1) * y for a, y in zip(m, g, strict=True)]
        v = [b2 * a + (1 - b2) * y**2 for a, y in zip(v, g, strict=True)]
        r = [a / (1 - b1**t) / (mp.sqrt(b / (1 - b2**t)) + eps) for a, b in zip(m, v, strict=True)]
        r = [a + decay * y for a, y in zip(r, x, strict=True)]
        k = mp.mpf(lr) * mp.sqrt(sum(y * y for y in x)) / mp.sqrt(sum(a * a for a in r))
        x = [y - k * a for y, a in zip(x, r, strict=True)]
    return np.array([float(y) for y in x])


@pytest.mark.parametrize(("dtype", "ulps"), [("float64", 4), ("float32", 4), ("float16", 4)])
def test_few_ulps_from_the_paper(dtype: str, ulps: float) -> None:
    """Ulps of the largest element, a step."""
    for settings in COMBINATIONS:
        w, gradients = problem(dtype, 8)
        gradients = gradients[:, :4]  # the sizes of the others leave float16
        found = np.asarray(run("lamb", settings, w[:4], gradients)[-1], dtype=float)
        exact = exactly(w[:4], gradients, **settings)
        ulp = FORMATS[dtype].ulp(np.max(np.abs(exact)))
        assert np.max(np.abs(found - exact)) <= 8 * ulps * ulp, settings


def after(w: Any, g: Any, **settings: Any) -> list[float]:
    """An array after one step at lr 0.5, without epsilon."""
    (new,) = run("lamb", {"eps": 0.0, "weight_decay": 0.0, **settings}, np.array(w), [np.array(g)],
                 [0.5])  # fmt: skip
    return new.tolist()


def test_the_step_is_lr_times_the_norm() -> None:
    assert after([3.0, 4.0], [0.01, 50.0]) == pytest.approx([3 - 2.5 / 2**0.5, 4 - 2.5 / 2**0.5])
    assert after([3.0, 4.0], [0.0, 50.0], eps=1e-6) == pytest.approx([3.0, 1.5])
    assert after([0.0, 0.0], [2.0, -3.0]) == [-0.5, 0.5]  # a zero array takes the plain step
    assert after([3.0, 4.0], [0.0, 0.0], eps=1.0) == [3.0, 4.0]
    decayed = after([3.0, 4.0], [0.0, 0.0], eps=1.0, weight_decay=0.5)
    assert decayed == pytest.approx([1.5, 2.0])  # whatever the decay: its length is divided out


def test_nan_and_infinity() -> None:
    assert np.isnan(after([3.0, 4.0], [math.nan, 1.0])).tolist() == [True, False]
    assert after([3.0, 4.0], [math.nan, 1.0])[1] == 3.5
    assert np.isnan(after([3.0, 4.0], [math.inf, 1.0])).tolist() == [True, False]
    assert after([math.inf, 4.0], [1.0, 1.0])[1] == 3.5  # an infinite rate is lr


def test_the_defaults_are_those_of_optax() -> None:
    optax = pytest.importorskip("optax")
    theirs = inspect.signature(optax.lamb).parameters
    ours = lamb().settings
    assert ours["betas"] == (theirs["b1"].default, theirs["b2"].default)
    assert [ours[n] for n in ("eps", "weight_decay")] == [
        theirs[n].default for n in ("eps", "weight_decay")
    ]


# --- the referee ----------------------------------------------------------------------------------

PLAIN = Edited(
    "lamb",
    """
def update(w, g, state, *, lr, betas, eps, weight_decay):
    t, n = w.dtype.type, state.get("step", 0) + 1
    size = lambda x: np.sqrt(np.sum(np.square(x, dtype=float)))
    b1, b2 = betas
    kept = state
    m = t(b1) * state.get("exp_avg", 0 * w) + t(1 - b1) * g
    v = t(b2) * state.get("exp_avg_sq", 0 * w) + t(1 - b2) * g * g
    c1, c2 = t(1 - b1**n), t(1 - b2**n)
    u = (m / c1) / (np.sqrt(v / c2) + t(eps))
    u = u + t(weight_decay) * w
    nw, nu = size(w), size(u)
    r = nw / nu if nw > 0 < nu else 1.0
    w = w - t(lr * r if lr * r < 3e38 else lr) * u
    return w, {"exp_avg": m, "exp_avg_sq": v, "step": n}
""",
)
DECAY = "u = u + t(weight_decay) * w"
RATIO = "r = nw / nu if nw > 0 < nu else 1.0"
GIVEN = "kept = state"
CORRECTED = "c1, c2 = t(1 - b1**n), t(1 - b2**n)"
CLIP = {GIVEN: "g = g / t(max(1, size(g)))"}
APEX = {**CLIP, RATIO: "r = nw / nu if nw > 0 < nu and weight_decay else 1.0"}
OLD = {CORRECTED: "c1 = c2 = t(1)", "nw, nu = size(w)": "nw, nu = min(size(w), 10)"}
DECOUPLED = {DECAY: "w = w * t(1 - lr * weight_decay)"}
ALONE = {**OLD, **DECOUPLED, RATIO: "r = nw / (nu + eps) if nw > 0 < nu else 1.0"}
KOZISTR = {**ALONE, "w = w - ": "lr = lr / (1 - b1**n); w = w - "}
DIALECTS: dict[str, dict[str, str]] = {
    "published": {},
    "NVLAMB": CLIP,
    "apex": APEX,
    "apex, adam_w_mode=False": {
        GIVEN: f"{CLIP[GIVEN]}; g = g + t(weight_decay) * w", DECAY: "", RATIO: APEX[RATIO]
    },
    "apex, grad_averaging=False": {**APEX, "t(1 - b1) * g": "g"},
    "timm, trust_clip": {**APEX, RATIO: f"{APEX[RATIO]}; r = min(r, 1)"},
    "timm, decoupled_decay": {**APEX, **DECOUPLED},
    "Keras": DECOUPLED,
    "jettify": OLD,
    "jettify, debias=True": {
        **OLD, "w = w - ": "lr = lr * np.sqrt(1 - b2**n) / (1 - b1**n); w = w - "
    },
    "cybertronai": {**OLD, RATIO: "r = nw / nu", "lr * r if lr * r < 3e38 else lr": "lr * r"},
    "kozistr": KOZISTR,
    "kozistr, adam_debias=True": ALONE,
}  # fmt: skip


@pytest.mark.parametrize("name", DIALECTS)
def test_dialects_are_found(name: str) -> None:
    assert named(PLAIN.found(DIALECTS[name])) == (name, {}, ())


def test_every_dialect_has_an_implementation() -> None:
    assert set(DIALECTS) == {d.name for d in RULES["lamb"].dialects}


MULTIPLIED = "g = g / t(min(1, 1 / max(size(g), 1e-30)))"


def test_the_clip_of_kozistr_that_multiplies_is_named() -> None:
    """pre_norm=True at commit 00fbae0 divides by the coefficient that it should multiply by."""
    found = PLAIN.found({**KOZISTR, GIVEN: MULTIPLIED})
    assert named(found) == ("kozistr", {"gradient": "divided by the clip"}, ())
    assert found.kind == "deviation"
    assert found.smallest is not None


@pytest.mark.parametrize(
    ("clause", "how", "edits"),
    [
        ("gradient", "divided by the clip", {GIVEN: MULTIPLIED}),
        ("weight decay", "in the gradient", {DECAY: "", GIVEN: "g = g + t(weight_decay) * w"}),
        ("weight decay", "decoupled", DECOUPLED),
        ("weight decay", "decoupled, without lr", {DECAY: "w = w * t(1 - weight_decay)"}),
        ("weight decay", "beside the ratio", {
            DECAY: "d = t(lr * weight_decay) * w", "w = w - ": "w = w - d - "
        }),
        ("weight decay", "only in the ratio", {DECAY: "d = u; u = u + t(weight_decay) * w",
                                               "lr) * u": "lr) * d"}),
        ("weight decay", "subtracted", {DECAY: "u = u - t(weight_decay) * w"}),
        ("weight decay", "ignored", {DECAY: ""}),
        ("weight norm", "at most 10", {"nw, nu = size(w)": "nw, nu = min(size(w), 10)"}),
        ("trust ratio", "with epsilon", {"r = nw / nu": "r = nw / (nu + eps)"}),
        ("trust ratio", "at most 1", {RATIO: f"{RATIO}; r = min(r, 1)"}),
        ("trust ratio", "absent", {RATIO: "r = 1"}),
        ("trust ratio", "of the gradient", {"nu = size(w), size(u)": "nu = size(w), size(g)"}),
        ("trust ratio", "|u| / |w|", {"r = nw / nu": "r = nu / nw"}),
        ("zero norm", "no step", {"else 1.0": "else 0.0"}),
        ("zero norm", "unguarded", {
            RATIO: "r = nw / nu", "lr * r if lr * r < 3e38 else lr": "lr * r"
        }),
        ("adapts", "only with weight decay", {RATIO: APEX[RATIO]}),
        ("adapts", "matrices only", {
            RATIO: f"{RATIO}; r = r if w.ndim > 1 else 1.0", DECAY: f"{DECAY} * (w.ndim > 1)"
        }),
        ("bias correction", "none", {CORRECTED: "c1 = c2 = t(1)"}),
        ("norm of", "1-norm", {"np.sqrt(np.sum(np.square(x, dtype=float)))": "np.sum(np.abs(x))"}),
        ("direction", "ascent", {"w = w - ": "w = w + "}),
        ("state", "lost", {"return w, {": "return w, {} and {"}),
    ],
)  # fmt: skip
def test_planted_faults_are_found(clause: str, how: str, edits: dict[str, str]) -> None:
    assert PLAIN.found(edits).choices == {clause: how}


@pytest.mark.parametrize(
    "edits",
    [
        {"r = nw / nu": "r = 1.01 * nw / nu"},
        pytest.param({"t(weight_decay) * w": "t(2 * weight_decay) * w"}, marks=pytest.mark.soak),
        pytest.param({"+ t(eps)": "+ t(2 * eps)"}, marks=pytest.mark.soak),
        pytest.param({GIVEN: "g = np.clip(g, -1, 1)"}, marks=pytest.mark.soak),
    ],
)
def test_a_fault_that_no_clause_names_is_refused(edits: dict[str, str]) -> None:
    assert PLAIN.found(edits).kind not in ("published", "dialect")


def beside(case: Case, whole: bool) -> tuple[Answer, ...]:
    """The answers of an optimizer that clips to norm 1: all gradients together, or each."""
    assert case.neighbour is not None
    clip, scaled = (lambda x: math.sqrt(float(np.sum(x * x)))), []
    for step, other in zip(case.steps, case.neighbour.g, strict=True):
        size = math.hypot(clip(step.g), clip(other)) if whole else clip(step.g)
        scaled.append(replace(step, g=step.g / max(1, size)))
    return answers(PLAIN.changed({}), replace(case, steps=tuple(scaled)))


@pytest.mark.parametrize(
    ("whole", "how"), [(True, "clipped to norm 1"), (False, "clipped to norm 1, each")]
)
def test_gradients_that_are_clipped_together(whole: bool, how: str) -> None:
    cases = [t.case for t in load("lamb", ("float32",), large=False)]
    cases = [c for c in cases if c.neighbour is not None and c.result == "valid"]
    found = identify(RULES["lamb"], [(c, beside(c, whole)) for c in cases])
    assert found.choices == {"gradient": how}


def test_optax_is_recognised() -> None:
    name, beyond, _ = named(PLAIN.library("optax.lamb", {}))
    assert (name, beyond.keys() - {"norm accumulation"}) == ("published", set())
