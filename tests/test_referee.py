"""Implementations that npdrt has never seen, each right or wrong in one way: the right ones pass,
none of the wrong ones does, and the mistake is named where it has a name.

They are files of the audit protocol, run in this process; tests/test_targets.py has the child.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from npdrt import optim
from npdrt.conform import (
    canonical,
    identify,
    recorded,
    report,
    targets,
    vectors,
    verify,
)
from npdrt.conform.adapters import serve
from npdrt.conform.adapters.load import load
from npdrt.conform.audit import PASSES, Audit, asked_of, audit_recorded, concluded
from npdrt.conform.case import Answer, Case, Step
from npdrt.conform.formats import FORMATS
from npdrt.conform.identify import identify_any
from npdrt.conform.rules import RULES

HEAD = """
import numpy as np

def size(x):
    x = np.asarray(x, np.float64)
    return float(np.sqrt(np.sum(x * x)))

def rate(w, g, lr):
    a, b = size(w), size(g)
    s = lr * a / b if a > 0 and b > 0 else lr
    return s if s <= np.finfo(w.dtype).max else lr

"""


@cache
def asked(
    rule: str, formats: tuple[str, ...], offers: frozenset[str] | None, runs: tuple[str, ...]
) -> list[vectors.Vector]:
    """The tests that a target is asked which has these settings."""
    target = targets.Target("", "mine", "file", rule, offers, runs, {})
    return list(asked_of(target, rule, formats, (False, True)))


def audited(source: str, folder: Path, rule: str, formats: Sequence[str] = ("float32",)) -> Audit:
    """The audit of `update` in a source of a file, under a rule."""
    path = folder / "mine.py"
    path.write_text(HEAD + textwrap.dedent(source))
    adapter = load(f"{path}:update", {})
    info = adapter.info
    target = targets.Target(
        "", "mine", "file", rule, info.offers, info.formats, {}, required=info.required
    )
    found = asked(rule, tuple(formats), info.offers, info.formats)
    with np.errstate(all="ignore"):
        outcomes = [targets.lacks(target, v.case) or serve.outcome(adapter, v.case)
                    for v in found]  # fmt: skip
    return concluded("mine", {}, found, outcomes)


# --- right ones -----------------------------------------------------------------------------------

SGD = """
def update(w, g, state, *, lr, momentum=0.0, dampening=0.0, nesterov=False, weight_decay=0.0
           {extra}):
    t = w.dtype.type
    {first}
    d = g + t(weight_decay) * w if weight_decay else g
    if not momentum:
        return w - t(lr) * d, {{{kept}}}
    k = 1.0 if "momentum" not in state else 1 - dampening
    v = t(momentum) * state.get("momentum", np.zeros_like(w)) + t(k) * d
    {before}
    u = d + t(momentum) * v if nesterov else v
    return w - t(lr) * u, {{"momentum": v, {kept}}}
{last}
"""


def sgd(first: str = "", before: str = "", kept: str = "", extra: str = "", last: str = "") -> str:
    """SGD in the sequence of docs/updates.md, with lines put in."""
    parts = {"first": first or "pass", "before": before or "pass"}
    return SGD.format(**parts, kept=kept, extra=extra, last=last)


ADAM = """
def update(w, g, state, *, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, decoupled=False):
    t, (b1, b2) = w.dtype.type, betas
    n = state.get("step", 0) + 1
    {first}
    m, v = (state.get(k, np.zeros_like(w)) for k in ("exp_avg", "exp_avg_sq"))
    if decoupled:
        w = w * t(1 - lr * weight_decay)
    else:
        g = g + t(weight_decay) * w
    m = t(b1) * m + t(1 - b1) * g
    v = t(b2) * v + t(1 - b2) * (g * g)
    u = (m / t(1 - b1**n)) / (np.sqrt(v / t(1 - b2**n)) + t(eps))
    {last}
    return w - t(lr) * u, {{"exp_avg": m, "exp_avg_sq": v, "step": n}}
"""


def adam(first: str = "pass", last: str = "pass") -> str:
    """Adam, with lines put in."""
    return ADAM.format(first=first, last=last)


FROMAGE = """
def update(w, g, state, *, lr, norm_bound=None):
    t = w.dtype.type
    limit = state.get("max_norm")
    if norm_bound is not None and limit is None:
        limit = norm_bound * size(w)
    new = (w - t(rate(w, g, lr)) * g) / t(np.sqrt(1 + lr * lr))
    if limit is None:
        return new, {{}}
    n = size(new)
    return new * t(limit / n if n > limit else 1), {{"max_norm": limit}}
"""

BARE = """
def update(w, g, state, *, lr):
    t, n = w.dtype.type, state.get("step", 0) + 1
    m, v = (state.get(k, np.zeros_like(w)) for k in ("exp_avg", "exp_avg_sq"))
    m = t(0.9) * m + t(1 - 0.9) * g
    v = t(0.999) * v + t(1 - 0.999) * (g * g)
    u = (m / t(1 - 0.9**n)) / (np.sqrt(v / t(1 - 0.999**n)) + t(1e-8))
    return w - t(lr) * u, {"exp_avg": m, "exp_avg_sq": v, "step": n}
"""

RIGHT_ONES: dict[str, tuple[str, str]] = {
    "adam with the published defaults built in": ("adam", BARE),
    "adam with the published epsilon built in": (
        "adam",
        adam().replace("eps=1e-8, ", "").replace("t(eps)", "t(1e-8)"),
    ),
    "lars with the published defaults built in": (
        "lars",
        """
        def update(w, g, state, *, lr):
            t, a, b = w.dtype.type, size(w), size(g)
            k = lr * (1e-3 * a / b) if a > 0 and b > 0 else lr
            k = k if k <= np.finfo(w.dtype).max else lr
            v = t(0.9) * state.get("momentum", np.zeros_like(w)) + t(k) * g
            return w - v, {"momentum": v}
        """,
    ),
    "sgd by the page": ("sgd", sgd()),
    "sgd in a wider format, rounded at the end": (
        "sgd",
        """
        def update(w, g, state, *, lr, momentum=0.0, dampening=0.0, nesterov=False,
                   weight_decay=0.0):
            wide = np.longdouble
            a, d = w.astype(wide), g.astype(wide) + wide(weight_decay) * w.astype(wide)
            if momentum:
                old = state.get("momentum")
                v = d if old is None else momentum * old.astype(wide) + (1 - dampening) * d
                state = {"momentum": np.asarray(v, w.dtype)}
                d = d + momentum * v if nesterov else v
            return np.asarray(a - lr * d, w.dtype), state
        """,
    ),
    "sgd that tells its tensors apart": (
        "sgd",
        """
        def update(w, g, state, *, lr, name, momentum=0.0):
            t, own = w.dtype.type, f"{name}/v"
            if not momentum:
                return w - t(lr) * g, state
            old = state.get(own, state.get("momentum"))
            v = g.copy() if old is None else t(momentum) * old + g
            return w - t(lr) * v, {**state, own: v}
        """,
    ),
    "sgd that refuses what is not contiguous": (
        "sgd",
        """
        def update(w, g, state, *, lr):
            if not (w.flags.c_contiguous and g.flags.c_contiguous):
                raise ValueError("contiguous arrays, please")
            return w - w.dtype.type(lr) * g, state
        """,
    ),
    "adam with running products": (
        "adam",
        """
        def update(w, g, state, *, lr, betas=(0.9, 0.999), eps=1e-8):
            t, (b1, b2) = w.dtype.type, betas
            n = state.get("step", 0)
            p1 = state.get("beta1_power", b1**n) * b1
            p2 = state.get("beta2_power", b2**n) * b2
            m, v = (state.get(k, np.zeros_like(w)) for k in ("exp_avg", "exp_avg_sq"))
            m = m + t(1 - b1) * (g - m)
            v = t(b2) * v + t(1 - b2) * g * g
            step = t(lr / (1 - p1)) * m / (np.sqrt(v) / t(np.sqrt(1 - p2)) + t(eps))
            return w - step, {"exp_avg": m, "exp_avg_sq": v, "step": n + 1,
                              "beta1_power": p1, "beta2_power": p2}
        """,
    ),
    "fromage by the page": ("fromage", FROMAGE.format()),
    "fromage element by element": (
        "fromage",
        """
        import math

        def update(w, g, state, *, lr):
            s, p = rate(w, g, lr), math.sqrt(1 + lr * lr)
            new = [(float(a) - s * float(b)) / p for a, b in zip(w.flat, g.flat)]
            return np.array(new, dtype=w.dtype).reshape(w.shape), state
        """,
    ),
    "lars with the norms of BLAS in float64": (
        "lars",
        """
        def update(w, g, state, *, lr, momentum=0.9, weight_decay=0.0, trust_coefficient=1e-3,
                   eps=0.0):
            t, a, b = w.dtype.type, size(w), size(g)
            r = trust_coefficient * a / (b + weight_decay * a + eps) if a > 0 and b > 0 else 1.0
            k = lr * r if lr * r <= np.finfo(w.dtype).max else lr
            v = t(momentum) * state.get("momentum", np.zeros_like(w))
            v = v + t(k) * g + t(k) * (t(weight_decay) * w)
            return w - v, {"momentum": v}
        """,
    ),
}


@pytest.mark.parametrize("form", ["float32", pytest.param("float64", marks=pytest.mark.soak)])
@pytest.mark.parametrize("name", RIGHT_ONES)
def test_right_ones_pass(name: str, form: str, tmp_path: Path) -> None:
    rule, source = RIGHT_ONES[name]
    found = audited(source, tmp_path, rule, (form,))
    assert found.verdict in ("agrees", "agrees to the bit"), report.sentence(found)
    flags = {flag for j in found.gated for flag in j.test.case.flags}
    assert flags >= {"LARGE", "LONG", "NEIGHBOUR", "KERNEL"}


def test_one_that_refuses_a_layout_is_not_asked_it(tmp_path: Path) -> None:
    rule, source = RIGHT_ONES["sgd that refuses what is not contiguous"]
    found = audited(source, tmp_path, rule)
    assert sum("layout" in why for why in found.skipped) == 4
    assert not [j for j in found.judged if j.test.case.layout != "C"]


# --- wrong ones -----------------------------------------------------------------------------------

# name -> rule, source, formats, the clause and how it is broken, or none
WRONG_ONES: dict[str, tuple[str, str, str, dict[str, str] | None]] = {
    "a velocity that is never kept, single steps to the bit": (
        "sgd", sgd(before='return w - t(lr) * (d + t(momentum) * v if nesterov else v), {}'),
        "float32", {"state": "lost"},
    ),
    "the same in float16": (
        "sgd", sgd(before='return w - t(lr) * (d + t(momentum) * v if nesterov else v), {}'),
        "float16", {"state": "lost"},
    ),
    "the rate of the step before, single steps to the bit": (
        "sgd", sgd(first='lr, used = state.get("rate", lr), lr', kept='"rate": used'), "float32",
        {"learning rate of": "the step before"},
    ),
    "the rate of the first step": (
        "sgd", sgd(first='lr = state.get("rate", lr)', kept='"rate": lr'), "float64",
        {"learning rate of": "the first step"},
    ),
    "a prefactor in the first step alone": (
        "fromage",
        """
        def update(w, g, state, *, lr):
            t = w.dtype.type
            new = w - t(rate(w, g, lr)) * g
            return (new if state else new / t(np.sqrt(1 + lr * lr))), {"made": True}
        """,
        "float32", {"prefactor": "first step only"},
    ),
    "updates clipped at 20": ("adam", adam(last="u = np.clip(u, -20, 20)"), "float32", None),
    "updates clipped at 2": ("adam", adam(last="u = np.clip(u, -2, 2)"), "float32", None),
    "an epsilon of 1e-3": ("adam", adam(first="eps = max(eps, 1e-3)"), "float32", None),
    "a rate that is 1 % too large": ("adam", adam(first="lr = 1.01 * lr"), "float32", None),
    "a counter in float16": (
        "adam", adam(first="n = float(np.float16(np.float16(n - 1) + np.float16(1)))"), "float32",
        None,
    ),
    "a counter with 8 bits": ("adam", adam(first="n = min(n, 256)"), "float32", None),
    "a counter with 12 bits": ("adam", adam(first="n = min(n, 4096)"), "float32", None),
    "norms of the first 1,024 elements": (
        "fromage",
        """
        def update(w, g, state, *, lr):
            t, a, b = w.dtype.type, size(w.reshape(-1)[:1024]), size(g.reshape(-1)[:1024])
            s = lr * a / b if a > 0 and b > 0 else lr
            s = s if s <= np.finfo(w.dtype).max else lr
            return (w - t(s) * g) / t(np.sqrt(1 + lr * lr)), state
        """,
        "float32", {"norm of": "first 1024 elements"},
    ),
    "norms of the first 65,536 elements": (
        "lars",
        """
        def update(w, g, state, *, lr, momentum=0.9, weight_decay=0.0, trust_coefficient=1e-3,
                   eps=0.0):
            t, a, b = w.dtype.type, size(w.reshape(-1)[:65536]), size(g.reshape(-1)[:65536])
            r = trust_coefficient * a / (b + weight_decay * a + eps) if a > 0 and b > 0 else 1.0
            k = lr * r if lr * r <= np.finfo(w.dtype).max else lr
            v = t(momentum) * state.get("momentum", np.zeros_like(w))
            v = v + t(k) * (g + t(weight_decay) * w)
            return w - v, {"momentum": v}
        """,
        "float64", {"norm of": "first 65536 elements"},
    ),
    "a tail of a block that stays": (
        "sgd",
        """
        def update(w, g, state, *, lr):
            new = w.copy().reshape(-1)
            whole = new.size // 256 * 256 if new.size > 256 else new.size
            new[:whole] -= (w.dtype.type(lr) * g).reshape(-1)[:whole]
            return new.reshape(w.shape), state
        """,
        "float32", None,
    ),
    "a velocity that is forgotten every 256 steps": (
        "sgd",
        sgd(first='state = state if step % 256 else {}', extra=", step"), "float32",
        {"state": "reset every 256 steps"},
    ),
    "a velocity that is forgotten every 4,096 steps": (
        "sgd",
        sgd(first='state = state if step % 4096 or not step else {}', extra=", step"), "float32",
        None,
    ),
    "a velocity by shape, in a global": (
        "sgd",
        """
        HELD = {}

        def update(w, g, state, *, lr, momentum=0.0, step):
            t = w.dtype.type
            if not momentum:
                return w - t(lr) * g, state
            key, fresh = (w.shape, w.dtype.name), "momentum" not in state
            old = (HELD.get(key) if step else None) if fresh else state["momentum"]
            if not fresh:
                state = {}
            HELD[key] = g if old is None else t(momentum) * old + g
            return w - t(lr) * HELD[key], {"step": step + 1}
        """,
        "float32", None,
    ),
    "one state for all tensors": (
        "adam", adam().replace("decoupled=False)", "decoupled=False, name)"), "float32",
        {"state": "shared"},
    ),
    "a bound for all tensors": (
        "fromage", FROMAGE.format().replace("norm_bound=None)", "norm_bound=None, name)"),
        "float32", {"state": "shared"},
    ),
    "memory order": (
        "sgd",
        """
        def update(w, g, state, *, lr):
            flat = w.ravel(order="K") - w.dtype.type(lr) * g.ravel(order="K")
            return flat.reshape(w.shape), state
        """,
        "float32", None,
    ),
    "the gradient in memory order": (
        "lars_lesion",
        """
        def update(w, g, state, *, lr):
            s = w.dtype.type(rate(w, g, lr))
            return w - s * g.ravel(order="K").reshape(g.shape), state
        """,
        "float32", None,
    ),
    "norms of the filters of a kernel": (
        "fromage",
        """
        def update(w, g, state, *, lr):
            t, p = w.dtype.type, np.sqrt(1 + lr * lr)
            if w.ndim < 4:
                return (w - t(rate(w, g, lr)) * g) / t(p), state
            new = [a - t(rate(a, b, lr)) * b for a, b in zip(w, g)]
            return np.stack(new) / t(p), state
        """,
        "float32", None,
    ),
    "no decay in four dimensions": (
        "sgd", sgd(first="weight_decay = 0.0 if w.ndim == 4 else weight_decay"), "float32", None,
    ),
    "warming up for a thousand steps": (
        "sgd", sgd(first="lr = lr if step < 1000 else lr / 2", extra=", step"), "float32", None,
    ),
    "Keras' epsilon built in": ("adam", BARE.replace("1e-8", "1e-7"), "float32", None),
    "a momentum of 0.8 built in": (
        "lars", RIGHT_ONES["lars with the published defaults built in"][1].replace("0.9", "0.8"),
        "float32", None,
    ),
    "a velocity of zeros is taken for none": (
        "sgd", sgd(first='state = state if np.any(state.get("momentum", 0)) else {}'), "float32",
        None,
    ),
    "nothing is done at rate 0": (
        "sgd", sgd(first="if lr == 0: return w.copy(), state"), "float32", None,
    ),
    "nothing is done at rate 0, by adam": (
        "adam", adam(first="if lr == 0: return w.copy(), state"), "float32", None,
    ),
    "matrices of one row or column are biases": (
        "fromage",
        """
        def update(w, g, state, *, lr):
            t = w.dtype.type
            s = lr if w.ndim == 2 and 1 in w.shape and w.size > 1 else rate(w, g, lr)
            return (w - t(s) * g) / t(np.sqrt(1 + lr * lr)), state
        """,
        "float32", None,
    ),
    "decay with the slices transposed where they are square": (
        "sgd",
        sgd(first="square = w.ndim == 3 and w.shape[1] == w.shape[2]").replace(
            "t(weight_decay) * w", "t(weight_decay) * (w.swapaxes(1, 2) if square else w)"
        ),
        "float32", None,
    ),
    "dampening for 300 steps, counted by itself": (
        "sgd",
        sgd(
            first='c = state.get("c", 0); dampening = dampening if c < 300 else 0',
            kept='"c": c + 1',
        ),
        "float32", None,
    ),
    "dampening for 300 steps": (
        "sgd", sgd(first="dampening = dampening if step < 300 else 0", extra=", step"), "float32",
        None,
    ),
    "bias correction for 5,000 steps": (
        "adam", adam(first="n = n if n <= 5000 else 10**9"), "float32", None,
    ),
}  # fmt: skip


def half(names: Iterable[str]) -> list[Any]:
    """Every second name; the soak asks all."""
    return [name if k % 2 == 0 else pytest.param(name, marks=pytest.mark.soak)
            for k, name in enumerate(names)]  # fmt: skip


@pytest.mark.parametrize("name", half(WRONG_ONES))
def test_wrong_ones_do_not_pass(name: str, tmp_path: Path) -> None:
    rule, source, form, clause = WRONG_ONES[name]
    found = audited(source, tmp_path, rule, (form,))
    assert not PASSES[found.verdict], report.sentence(found)
    assert not report.passes(found, "published"), report.sentence(found)
    assert found.verdict in ("deviates", "unknown"), report.sentence(found)
    if clause is not None:
        assert found.finding.choices == clause, report.sentence(found)
    assert report.text(found)
    assert report.as_json(found)["smallest"] is not None


def test_the_step_at_which_failures_begin_is_named(tmp_path: Path) -> None:
    found = audited(adam(first="n = min(n, 100)"), tmp_path, "adam")
    assert "the earliest step that is off is step 101" in report.sentence(found)
    late = sgd(first="dampening = dampening if step < 300 else 0", extra=", step")
    found = audited(late, tmp_path, "sgd")
    assert "the earliest step that is off is step 301" in report.sentence(found)


def test_operands_that_are_misread_are_named(tmp_path: Path) -> None:
    found = audited(WRONG_ONES["memory order"][1], tmp_path, "sgd")
    assert "only operands in layout fortran, fortran gradient are misread" in report.sentence(found)


def test_agreement_on_finite_numbers_says_so(tmp_path: Path) -> None:
    found = audited(sgd(first="g = np.nan_to_num(g)"), tmp_path, "sgd")
    assert PASSES[found.verdict]
    assert report.sentence(found).endswith("; on NaN and infinity it differs (not gated)")
    found = audited(sgd(), tmp_path, "sgd", ("float64",))
    assert "NaN" not in report.sentence(found)


# --- of no stated rule ------------------------------------------------------------------------


def of_any_rule(update: Any) -> Audit:
    """The audit of a function w, g, lr -> w that says neither its rule nor any setting."""
    answered, found, outcomes = {}, [], []
    target = targets.Target("", "mine", "file", None, frozenset(), tuple(FORMATS), {})
    for rule in RULES:
        for v in asked_of(target, rule, ("float32",), (False,)):
            if v.case.result == "error" or targets.lacks(target, v.case):
                continue
            w, answers = v.case.w.astype("f4"), []
            with np.errstate(all="ignore"):
                for step in v.case.steps:
                    w = np.asarray(update(w, step.g.astype("f4"), step.lr), "f4")
                    answers.append(Answer(w.astype("f8")))
            found.append(v)
            outcomes.append(tuple(answers))
            answered.setdefault(rule, []).append((v.case, tuple(answers)))
    assert set(answered) == set(RULES)
    audited = concluded("mine", {}, found, outcomes)
    assert identify_any(answered).choices == audited.finding.choices
    return audited


def norm(x: Any) -> Any:
    return np.sqrt(np.sum(np.asarray(x, "f8") ** 2))


def relative(w: Any, g: Any, lr: float) -> Any:
    s = lr * norm(w) / norm(g) if norm(w) > 0 < norm(g) else lr
    return np.float32(s if s <= np.finfo("f4").max else lr) * g


def test_ties_go_to_the_rule_of_the_paper() -> None:
    found = of_any_rule(lambda w, g, lr: (w - relative(w, g, lr)) / np.float32(1 + lr * lr))
    assert (found.rule, found.finding.choices) == ("fromage", {"prefactor": "squared"})
    found = of_any_rule(lambda w, g, lr: w - relative(w, g, lr))
    assert (found.rule, PASSES[found.verdict]) == ("lars_lesion", True)


@pytest.mark.soak
def test_plain_descent_is_sgd() -> None:
    found = of_any_rule(lambda w, g, lr: w - np.float32(lr) * g)
    assert (found.rule, PASSES[found.verdict]) == ("sgd", True)


def test_none_of_the_known_rules() -> None:
    found = of_any_rule(lambda w, g, lr: w - np.float32(lr) * np.cbrt(g))
    assert found.verdict == "unknown"
    assert found.finding.among == tuple(RULES)
    known = f"mine: no published rule for mine here; known: {', '.join(RULES)}; next to "
    assert report.sentence(found).startswith(known)
    shown = report.as_json(found)
    assert (shown["rule"], shown["passes"]) == (None, False)


# --- libraries ------------------------------------------------------------------------------------

TORCH = """
import torch

def update(w, g, state, *, lr, momentum=0.0, weight_decay=0.0):
    p = torch.tensor(w)
    d = torch.tensor(g) + weight_decay * p
    v = momentum * torch.tensor(state["momentum"]) + d if "momentum" in state else d
    {line}
    new = p - lr * v
    return new.numpy(), {{"momentum": v.numpy()}} if momentum else {{}}
"""


@pytest.mark.parametrize(
    ("line", "verdict"),
    [
        ("pass", "agrees"),
        ("v = v.clamp(-1, 1)", "unknown"),
        ("v = v if v.numel() <= 4096 else torch.cat([v.flatten()[:4096], d.flatten()[4096:]])"
         ".reshape(v.shape)", "unknown"),
        ("v = v.half().float() if v.dtype == torch.float32 else v", "unknown"),
    ],
)  # fmt: skip
def test_torch_in_a_file(line: str, verdict: str, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    found = audited(TORCH.format(line=line), tmp_path, "sgd")
    assert found.verdict.removesuffix(" to the bit") == verdict, report.sentence(found)


OPTAX = """
import jax, jax.numpy as jnp, optax

def update(w, g, state, *, lr, betas=(0.9, 0.999), eps=1e-8):
    own = optax.scale_by_adam(*betas, eps{options})
    old = own.init(jnp.asarray(w))
    if state:
        old = old._replace(count=jnp.asarray(state["step"], jnp.int32),
                           mu=jnp.asarray(state["exp_avg"]), nu=jnp.asarray(state["exp_avg_sq"]))
    u, new = own.update(jnp.asarray(g), old)
    state = {{"step": int(new.count), "exp_avg": np.asarray(new.mu),
             "exp_avg_sq": np.asarray(new.nu)}}
    return np.asarray(w - np.float32(lr) * np.asarray(u)), state
"""


@pytest.mark.parametrize(
    ("options", "verdicts"),
    [("", ("profile", "agrees")), (", eps_root=1e-6", ("unknown",)),
     (", nesterov=True", ("unknown", "deviates"))],
)  # fmt: skip
def test_optax_in_a_file(
    options: str, verdicts: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("optax")
    monkeypatch.setattr(serve, "LONG", 50)  # a thousand calls of JAX take seconds
    path = tmp_path / "mine.py"
    path.write_text(HEAD + OPTAX.format(options=options))
    adapter = load(f"{path}:update", {})
    target = targets.Target("", "mine", "file", "adam", adapter.info.offers, ("float32",), {})
    found = [v for v in asked_of(target, "adam", ("float32",), (False,)) if len(v.case.steps) < 50]
    outcomes = [targets.lacks(target, v.case) or serve.outcome(adapter, v.case) for v in found]
    told = concluded("mine", {}, found, outcomes)
    assert told.verdict in verdicts, report.sentence(told)


# --- recordings -----------------------------------------------------------------------------------


def recording(
    rule: str,
    steps: int = 100,
    lr: float = 1e-3,
    form: str = "float32",
    n: int = 6,
    **settings: Any,
) -> recorded.Recording:
    """Steps of npdrt's own rule, with gradients of size 1."""
    draw, f = np.random.default_rng(steps), FORMATS[form]
    g = f.round(draw.normal(size=(steps, n)))
    w = f.round(draw.normal(size=n))
    taken = tuple(Step(x, lr) for x in g)
    full = {k: v for k, v in optim.RULES[rule](lr=lr, **settings).settings.items() if k != "lr"}
    case = Case(1, "", (), rule, form, full, w, taken)
    after = np.array([a.w for a in canonical.answers(case)]).reshape(steps, n)
    before = np.concatenate([w[None], after[:-1]])
    return recorded.Recording("", form, before, g, after, np.full(steps, lr))


def held(found: recorded.Recording, rule: str, **settings: Any) -> Audit:
    """The audit of a recording."""
    full = optim.RULES[rule](lr=0.0, **settings).settings
    given = {k: v for k, v in full.items() if k != "lr"}
    return audit_recorded("r", recorded.cases(found, rule, given))


@pytest.mark.parametrize("form", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize(
    ("rule", "settings"),
    [
        ("sgd", {"momentum": 0.9, "nesterov": True}), ("adam", {}), ("lars", {"weight_decay": 0.1}),
        ("fromage", {"norm_bound": 1.5}), ("lars_lesion", {}),
    ],
)  # fmt: skip
def test_recordings_of_npdrt_agree(rule: str, settings: Any, form: str) -> None:
    for lr, n, steps in ((0.1, 6, 20), (0.01, 300, 5), (1e-4, 6, 20)):
        if form == "bfloat16" and n > 256:
            continue
        if form.endswith("16") and (rule == "adam" or lr < 1e-3):
            continue  # eps is 0 in float16; or the steps are lost in the parameter
        found = held(recording(rule, steps, lr, form, n, **settings), rule, **settings)
        assert PASSES[found.verdict], (lr, n, report.sentence(found))


def test_recordings_of_other_rules_do_not() -> None:
    found = held(replace(recording("adam", lr=1.01e-3), lr=np.full(100, 1e-3)), "adam")
    assert found.verdict == "unknown"
    found = held(recording("adam", eps=1e-3), "adam")
    assert found.verdict == "unknown"
    found = held(recording("sgd", momentum=0.9), "sgd", momentum=0.89)
    assert not PASSES[found.verdict]
    found = held(recording("fromage", lr=0.01), "lars_lesion")
    assert found.finding.choices == {"prefactor": "divided"}


def rounded_betas(steps: int, off: float = 1.0) -> recorded.Recording:
    """Adam whose scalars are float32, beta2 among them, while the gradients become smaller; its
    rates are `off` times those that are recorded."""
    draw, f = np.random.default_rng(steps), np.float32
    g = (draw.normal(size=(steps, 5)) * np.linspace(3, 0.1, steps)[:, None]).astype(f)
    w = [draw.normal(size=5).astype(f)]
    m = v = np.zeros(5, f)
    for k in range(steps):
        m = f(0.9) * m + f(1 - 0.9) * g[k]
        v = f(0.999) * v + f(1 - 0.999) * (g[k] * g[k])
        corrected = m / f(1 - 0.9 ** (k + 1)), v / f(1 - 0.999 ** (k + 1))
        w.append(w[-1] - f(1e-3 * off) * corrected[0] / (np.sqrt(corrected[1]) + f(1e-8)))
    path = np.asarray(w, np.float64)
    rates = np.full(steps, 1e-3)
    return recorded.Recording("", "float32", path[:-1], g.astype(float), path[1:], rates)


def test_long_recordings_with_scalars_in_float32_agree() -> None:
    found = held(rounded_betas(3000), "adam")
    assert PASSES[found.verdict], report.sentence(found)
    assert held(rounded_betas(3000, 1.001), "adam").verdict == "unknown"


def test_the_search_in_long_recordings_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    late = recording("sgd", 600, momentum=0.9)
    late.after[500] += 0.01
    late.before[501] = late.after[500]
    steps = []
    run = identify.run
    monkeypatch.setattr(
        identify,
        "run",
        lambda r, c, case, **kw: steps.append(len(case.steps)) or run(r, c, case, **kw),
    )
    found = held(late, "sgd", momentum=0.9)
    assert found.verdict == "unknown"
    assert found.finding.stopped
    assert sum(steps) < identify.BUDGET + 5 * 600
    text = report.sentence(found)
    assert "off from step 501 on" in text
    assert "not every known clause was tried" in text


def test_recordings_that_say_nothing() -> None:
    nan = recording("sgd", 4)
    nan.after[:] = nan.before[:] = np.nan
    found = held(nan, "sgd")
    assert found.verdict == "no verdict"
    assert "24 of 24 recorded numbers are not finite" in report.sentence(found)
    late = recording("sgd", 4)
    late.gradients[2, 0] = late.after[2:, 0] = late.before[3:, 0] = np.nan
    found = held(late, "sgd")
    assert "2 of 24 recorded numbers are not finite" in report.sentence(found)
    found = held(recording("sgd", 4, n=0), "sgd")
    assert (found.verdict, "no element" in report.sentence(found)) == ("no verdict", True)
    found = held(recording("sgd", 4, lr=0.0), "sgd")
    assert "no recorded step changes a parameter" in report.sentence(found)
    for odd in (held(nan, "sgd"), found):
        assert report.text(odd)
        assert report.as_json(odd)["passes"] is False


# --- responses ------------------------------------------------------------------------------------


def response(group: Mapping[str, Any], *, stale: bool) -> list[dict[str, Any]]:
    """Answers to the tests of a group with npdrt's bits, or with the rate of the step before."""
    answers = []
    for test in group["tests"]:
        if vectors.spared(test) or test["result"] == "error":
            continue
        vector = vectors.vector_from(group, test)
        case, given = vector.case, [e.canonical for e in vector.expected]
        if stale and case.state is None and len(case.steps) > 1:
            rates = [s.lr for s in (case.steps[0], *case.steps[:-1])]
            steps = tuple(Step(s.g, lr) for s, lr in zip(case.steps, rates, strict=True))
            given = list(canonical.answers(replace(case, steps=steps)))
        bits = [{"w": case.number.bits(a.w)} for a in given]
        answers.append({"tcId": case.id, "steps": bits})
    return answers


@pytest.mark.parametrize("stale", [False, True])
def test_responses_in_float32_alone(stale: bool, tmp_path: Path) -> None:
    """Single steps to the bit are no agreement where sequences are wrong."""
    found = vectors.groups("OptimizerStep", rule="sgd", formats=["float32"])
    answers = [a for group in found for a in response(group, stale=stale)]
    path = tmp_path / "response.json"
    path.write_text(json.dumps({"npdrtVectors": 1, "answers": answers}))
    told = verify.verify(path)
    assert not told.missing
    assert told.passes is not stale
    assert told.audits[0].verdict == ("deviates" if stale else "agrees to the bit")
