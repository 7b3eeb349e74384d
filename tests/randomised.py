"""Runs, planted faults and right answers at random, by seed: what the referee makes of them.

Used by tests/test_identify.py and benchmarks/referee.py.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import adaptive
import layerwise
import numpy as np
import planted
import standins
from standins import NARROW, NORMS, OPTIONAL, Standin, Ways

from npdrt.conform import identify as identification
from npdrt.conform import page
from npdrt.conform.audit import PASSES, Audit, concluded
from npdrt.conform.case import Case, Failure, Outcome, Step
from npdrt.conform.formats import FORMATS
from npdrt.conform.identify import Finding, identify
from npdrt.conform.judge import accepted, distances
from npdrt.conform.report import sentence
from npdrt.conform.rules import RULES, run
from npdrt.conform.vectors import Vector, load

STANDINS = [*standins.STANDINS, *adaptive.STANDINS, *layerwise.STANDINS]
RIGHT = {**standins.RIGHT, **adaptive.RIGHT, **layerwise.RIGHT}
STANDIN_RULES = tuple(dict.fromkeys(s.rule for s in STANDINS))
ONE_BY_ONE = {s.name: s for s in STANDINS}
SUMS = tuple(name for name in NORMS if name not in planted.NORMS)  # ways to sum squares rightly


@cache
def vectors(
    rule: str, formats: Sequence[str] = ("float32", "float64"), large: bool = False
) -> list[Vector]:
    """The vectors that an implementation of a rule is held to; the large and long ones if asked."""
    return load(rule, formats, large=large)


def finding(rule: str, cases: Sequence[Case], outcomes: Sequence[Outcome]) -> Finding:
    """What `npdrt audit` finds in outcomes."""
    pairs = zip(cases, outcomes, strict=True)
    answered = [(c, o) for c, o in pairs if not isinstance(o, Failure) and c.result != "error"]
    assert len(answered) > 10
    return identify(RULES[rule], answered)


def expected(standin: Standin, ways: Ways, cases: Sequence[Case]) -> dict[str, str]:
    """The choices of clauses that a stand-in makes, other arithmetic included."""
    rule = RULES[standin.rule]
    dialect = next(d for d in rule.dialects if d.name == standin.dialect)
    choices = dict(rule.differences(dialect.choices))
    single = any(c.format == "float32" for c in cases)
    narrow = ways.norm in NARROW and not ways.wide and "norm accumulation" in rule.clauses
    if narrow and shows_norms(standin, ways, cases):
        choices["norm accumulation"] = "dtype"
    if standin.rule == "muon" and not standin.precise:
        choices["precision"] = "bfloat16"
    elif single and not standin.precise and not ways.wide:
        choices["precision"] = "dtype"
    return choices


def shows_norms(standin: Standin, ways: Ways, cases: Sequence[Case]) -> bool:
    """Whether a first step depends on how squares are summed, beyond rounding."""
    valid = [c for c in cases if c.result == "valid"]
    both = (standins.outcomes(standin, valid, w) for w in (ways, replace(ways, norm="float64")))
    pairs = zip(valid, *both, strict=True)
    return any(not isinstance(a, Failure) and apart(c.w, a[0].w, b[0].w) for c, a, b in pairs)


def apart(w: Any, a: Any, b: Any) -> bool:
    """Whether two steps from w differ by a fifth of their size, and not by rounding alone."""
    with np.errstate(all="ignore"):
        size, before, after = (float(np.linalg.norm(x)) for x in (b - w, w, b))
        least = max(0.2 * min(size, after), 1e-5 * min(before, 1e3))
        return not np.array_equal(a, b, equal_nan=True) and not np.linalg.norm(a - b) <= least


SHAPES = ((), (1,), (3,), (2, 3), (4, 2), (5,), (2, 1, 3), (17,))
MATRICES = ((2, 3), (4, 2), (4, 4), (2, 5), (2, 1, 3))


def settings_at_random(rule: str, pick: random.Random) -> dict[str, Any]:
    """Settings that a case of a rule may have."""
    momentum = pick.choice((0.0, 0.5, 0.9, 0.99))
    decay = pick.choice((0.0, 1e-4, 0.01, 0.1))
    match rule:
        case "sgd":
            dampening = pick.choice((0.0, 0.3)) if momentum else 0.0
            nesterov = bool(momentum and not dampening and pick.random() < 0.5)
            return {
                "momentum": momentum, "dampening": dampening, "nesterov": nesterov,
                "weight_decay": decay,
            }  # fmt: skip
        case "adam":
            return {
                "betas": pick.choice(((0.9, 0.999), (0.5, 0.9), (0.9, 0.95), (0.0, 0.99))),
                "eps": pick.choice((1e-8, 1e-6, 1e-3)),
                "weight_decay": decay,
                "decoupled": pick.random() < 0.5,
            }
        case "lars":
            return {
                "momentum": momentum,
                "weight_decay": decay,
                "trust_coefficient": pick.choice((1e-3, 0.02, 1.0)),
                "eps": pick.choice((0.0, 1e-8, 1e-3)),
            }
        case "fromage":
            return {"norm_bound": pick.choice((None, None, 0.9, 1.0, 3.0))}
        case "adamw" | "lamb" | "lion":
            betas = ((0.9, 0.999), (0.5, 0.9), (0.9, 0.95), (0.0, 0.99))
            eps = {"eps": pick.choice((1e-8, 1e-6, 1e-3))} if rule != "lion" else {}
            return {"betas": pick.choice(betas), **eps, "weight_decay": decay}
        case "rmsprop":
            return {
                "alpha": pick.choice((0.99, 0.9, 0.5)), "eps": pick.choice((1e-8, 1e-6, 1e-3)),
                "momentum": momentum, "centered": pick.random() < 0.3, "weight_decay": decay,
            }  # fmt: skip
        case "nero":
            return {"beta": pick.choice((0.999, 0.9, 0.5, 0.0))}
        case "muon":
            mu = pick.choice((0.0, 0.5, 0.9, 0.95))
            return {"momentum": mu, "nesterov": pick.random() < 0.5, "weight_decay": decay}
    return {}


def state_at_random(case: Case, draw: np.random.Generator, pick: random.Random) -> Case:
    """The case from the middle of a run."""
    number, shape = case.number, case.w.shape

    def normal(size: float) -> Any:
        return number.round(size * draw.normal(size=shape))

    size = 10 ** pick.uniform(-3, 1)
    if case.rule in ("adam", "adamw", "lamb"):
        t, betas = pick.choice((1, 2, 5, 30, 1000)), case.settings["betas"]
        powers = {f"beta{k}_power": page.power(b, t) for k, b in enumerate(betas, 1)}
        v = np.maximum(number.round(normal(size) ** 2), number.round(np.float64(1e-6 * size**2)))
        slots = {"exp_avg": normal(size), "exp_avg_sq": v, "step": t, **powers}
    elif case.rule == "lion":
        slots = {"exp_avg": normal(size), "step": 3}
    elif case.rule == "rmsprop":
        m, s = normal(size), normal(size)
        v = number.round(m * m + s * s + (size / 2) ** 2)
        slots = {"square_avg": v, "grad_avg": m, "momentum": normal(size), "step": 3}
    elif case.rule == "nero":
        t, beta = pick.choice((1, 2, 5, 30, 1000)), case.settings["beta"]
        v = number.round(size**2 * (0.1 + draw.random((*shape[:1], *(1 for _ in shape[1:])))))
        slots = {"exp_avg_sq": np.broadcast_to(v, shape), "scale": size, "step": t,
                 "beta_power": page.power(beta, t)}  # fmt: skip
    elif case.settings.get("momentum"):
        slots = {"momentum": normal(size), "step": 3}
    else:
        return case
    return replace(case, state=slots)


def case_at_random(rule: str, form: str, seed: int, steps: int = 1) -> Case:
    """An ordinary case with values of any usual size."""
    pick, draw, number = random.Random(seed), np.random.default_rng(seed), FORMATS[form]
    shape = pick.choice(MATRICES if RULES[rule].matrices else SHAPES)

    def normal(low: float, high: float) -> Any:
        return number.round(10 ** pick.uniform(low, high) * draw.normal(size=shape))

    w = normal(-2, 2) * (pick.random() > 0.05)
    taken = tuple(
        Step(normal(-4, 2) * (pick.random() > 0.05), 10 ** pick.uniform(-4, 0))
        for _ in range(steps)
    )
    case = Case(
        1_000_000 + seed, "at random", ("ORDINARY",), rule, form, settings_at_random(rule, pick), w,
        taken, kind=pick.choice(("weight", "bias")),
    )  # fmt: skip
    return state_at_random(case, draw, pick) if pick.random() < 0.5 else case


def ways_at_random(pick: random.Random) -> Ways:
    """Any right arithmetic."""
    return Ways(
        pick.choice(SUMS), pick.randrange(1, 10**6), pick.random() < 0.3,
        pick.random() < 0.15,
    )  # fmt: skip


def run_at_random(seed: int) -> tuple[Standin, Ways, list[Case]]:
    """A stand-in, its arithmetic, and what it is asked: most of the vectors, and some of our own.

    It may lack one of its settings.
    """
    pick = random.Random(f"run {seed}")
    rule = pick.choice(list(STANDIN_RULES))
    standin = pick.choice([s for s in STANDINS if s.rule == rule])
    optional = sorted(standin.offers & OPTIONAL.get(standin.rule, set()))
    if optional and pick.random() < 0.4:
        standin = standin.without(pick.choice(optional))
    formats = pick.choice((("float32",), ("float32",), ("float64",), ("float32", "float64")))
    families: dict[Any, list[Case]] = {}
    for v in vectors(standin.rule, formats):
        families.setdefault((v.case.flags[0], v.case.format), []).append(v.case)
    cases = []
    for family in families.values():
        share = pick.uniform(0.6, 1.0)
        cases += pick.sample(family, math.ceil(share * len(family)))
    cases += [
        case_at_random(standin.rule, pick.choice(formats), 1000 * seed + k, pick.choice((1, 1, 3)))
        for k in range(20)
    ]
    return standin, ways_at_random(pick), cases


# Dialects that are one and the same without a setting: (rule, setting) -> groups of them.
ALIKE: dict[tuple[str, str], tuple[set[str], ...]] = {
    ("sgd", "momentum"): ({"published", "tensorflow", "caffe", "decoupled"},),
    ("sgd", "weight_decay"): ({"published", "decoupled"},),
    ("adam", "weight_decay"): ({"published", "AdamW"},),
    ("lars", "weight_decay"): (
        {"published", "optax"},
        {"torchlars", "apex LARC, clip=False"},
        {"lightning-bolts", "timm", "timm, trust_clip"},
    ),
    ("lars", "eps"): ({"optax", "TF model garden"},),
    ("lion", "weight_decay"): ({"published", "L2"},),
    ("rmsprop", "momentum"): ({"published", "optax, eps_in_sqrt=False"},),
    ("lamb", "weight_decay"): (
        {"published", "Keras"},
        {"apex", "apex, adam_w_mode=False", "timm, trust_clip", "timm, decoupled_decay"},
    ),
}


def nearly_decayed(case: Case, pick: random.Random) -> Case:
    """The case with a gradient that weight decay all but cancels."""
    part = 1 + pick.choice((0.0, 1e-7, 1e-5, 1e-3)) * np.ones(case.w.shape)
    g = case.number.round(-case.settings["weight_decay"] * case.w * part)
    return replace(case, steps=(Step(g, case.steps[0].lr),))


# --- what the referee makes of them ---------------------------------------------------------------


def mistake(seed: int) -> str:
    """What is wrong in the finding of a run without a fault; "" if it is right."""
    standin, ways, cases = run_at_random(seed)
    lacking = ONE_BY_ONE[standin.name].offers - standin.offers
    told = f"run {seed}: {standin.name}, {ways}, without {sorted(lacking)}: "
    outcomes = standins.outcomes(standin, cases, ways)
    odd = [o for o in outcomes if isinstance(o, Failure) and o.kind != "not offered"]
    if odd:
        return f"{told}{odd[0]}"
    found = finding(standin.rule, cases, outcomes)
    if found.dialect is None:
        return f"{told}unknown"
    names = {found.dialect.name, standin.dialect}
    alike = [group for setting in lacking for group in ALIKE.get((standin.rule, setting), ())]
    beyond = set(found.extra_choices) - set(identification.PROFILES)
    right = (
        (len(names) == 1 or any(names <= group for group in alike))
        and standin.dialect in (found.dialect.name, *found.indistinguishable)
        and not beyond
        and (lacking or found.choices == expected(standin, ways, cases))
    )
    return "" if right else f"{told}{found.choices}"


def planted_at_random(seed: int) -> tuple[str, str]:
    """What becomes of a fault in a run, and the run in words.

    "named": the verdict has its clause. "refused": it does not pass, and its clause is not named.
    "refused, no clause": it does not pass, and no clause describes it. "accepted": it passes as the
    published rule, or as its dialect.
    """
    pick = random.Random(f"fault {seed}")
    fault = pick.choice(planted.FAULTS)
    fit = [s for s in STANDINS if fault.shows_in(s.rule, s.dialect, s.offers)]
    rule = pick.choice(sorted({s.rule for s in fit}))
    standin, ways = pick.choice([s for s in fit if s.rule == rule]), ways_at_random(pick)
    formats = pick.choice((("float32",), ("float64",), ("float32", "float64")))
    tests = vectors(rule, formats)
    outcomes = planted.outcomes(standin, [v.case for v in tests], ways, fault)
    found = concluded("it", {}, tests, outcomes)
    told = f"fault {seed}: {fault.name} in {standin.name}, {formats}, {ways}: {sentence(found)}"
    if passes_somehow(found):
        return "accepted", told
    clause, how = fault.breaks[rule] or ("", "")
    choices = RULES[rule].full(found.finding.choices or {})
    if not clause:
        return "refused, no clause", told
    explained = found.finding.choices is not None
    return ("named" if explained and choices.get(clause) == how else "refused"), told


def passes_somehow(found: Audit) -> bool:
    """Whether an audit finds nothing but a dialect, in any arithmetic."""
    return PASSES[found.verdict] or found.verdict in ("profile", "dialect", "out of scope")


def alarm(seed: int) -> str:
    """What is wrong in the verdict on one right answer, which is one step; "" if it is right."""
    rules = list(RIGHT)
    pick, rule = random.Random(seed), rules[seed % len(rules)]
    case = case_at_random(rule, "float32" if pick.random() < 0.8 else "float64", seed)
    if case.settings.get("weight_decay") and pick.random() < 0.1:
        case = nearly_decayed(case, pick)
    ways = ways_at_random(pick)
    (answer,) = standins.answers(RIGHT[rule], case, ways)
    (exact,) = run(RULES[rule], {}, case)
    errors = distances(answer.w, exact.w, exact.scale, case.number, exact.slack)
    close = np.max(errors, initial=0.0) <= accepted(case)
    explained = identification.worst_ratio(RULES[rule], {}, case, (answer,)) <= 1
    return "" if close and explained else f"case {seed}: {rule}, {ways}, {case.settings}"
