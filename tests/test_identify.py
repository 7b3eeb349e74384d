"""Whether the audit names what it is shown: dialects, other arithmetic, planted bugs, riddles."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import libraries
import planted
import pytest
import randomised
import standins
from randomised import expected, finding, vectors
from standins import STANDINS, Standin, Ways

from npdrt.conform import identify as identification
from npdrt.conform import report, targets
from npdrt.conform.audit import Audit, audit, concluded, in_use
from npdrt.conform.candidates import single_changes
from npdrt.conform.case import USES, Answer, Case, Failure
from npdrt.conform.identify import Finding
from npdrt.conform.rules import KNOWN, RULES, run

OTHER_OPTIMIZERS = ("AMSGrad", "AMSGrad, corrected", "Adamax", "AdaBelief")
ONE_BY_ONE = {s.name: s for s in STANDINS}


def asked(standin: Standin, cases: Sequence[Case], ways: Ways = standins.PLAIN) -> Finding:
    """What is found in a stand-in's answers, of which none may be a failure of the stand-in."""
    outcomes = standins.outcomes(standin, cases, ways)
    odd = [o for o in outcomes if isinstance(o, Failure) and o.kind != "not offered"]
    assert not odd, odd[0]
    return finding(standin.rule, cases, outcomes)


# --- stand-ins for public implementations -------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "norm"),
    [
        (name, norm)
        for name, standin in ONE_BY_ONE.items()
        for norm in ("float64", "pairwise")
        if norm == "float64" or RULES[standin.rule].takes_norms
    ],
)
def test_stand_ins_are_what_they_are(name: str, norm: str) -> None:
    standin, ways = ONE_BY_ONE[name], Ways(norm=norm)
    cases = [v.case for v in vectors(standin.rule)]
    found = asked(standin, cases, ways)
    assert found.choices == expected(standin, ways, cases)
    assert found.dialect is not None
    assert (found.dialect.name, found.indistinguishable) == (standin.dialect, ())
    assert (found.kind == "out of scope") == (standin.dialect in OTHER_OPTIMIZERS)
    assert not [c for c in found.extra_choices if c not in identification.PROFILES]
    assert (found.parting is None) == (not found.choices)


OF_EACH = (  # the soak asks all
    *("LARS paper", "optax lars", "apex LARC", "official Fromage", "optax fromage", "lars lesion"),
    *("torch SGD", "SGDW", "torch Adam", "Keras Adam"),
)


@pytest.mark.parametrize(
    "name",
    [
        name if name in OF_EACH else pytest.param(name, marks=pytest.mark.soak)
        for name in ONE_BY_ONE
    ],
)  # fmt: skip
def test_the_rule_of_a_stand_in_is_found_too(name: str) -> None:
    """It is asked the cases of every rule that its settings allow."""
    standin, answered = ONE_BY_ONE[name], {}
    for rule in RULES:
        cases = [v.case for v in vectors(rule, ("float32",)) if v.case.result != "error"]
        outcomes = standins.outcomes(standin, cases, known=False)
        pairs = zip(cases, outcomes, strict=True)
        answered[rule] = [(c, o) for c, o in pairs if not isinstance(o, Failure)]
    found = identification.identify_any(answered)
    if name == "AdamW":  # a dialect of Adam that is a rule of its own
        assert found.rule.name == "adamw"
        return
    assert found.rule.name == standin.rule
    assert found.choices == expected(standin, standins.PLAIN, cases)


# --- runs at random -----------------------------------------------------------------------------


@pytest.mark.parametrize("seeds", [range(60), pytest.param(range(60, 300), marks=pytest.mark.soak)])
def test_random_runs_without_a_mistake(seeds: range) -> None:
    """Any dialect of any rule in any right arithmetic, lacking a setting or not."""
    assert [told for seed in seeds if (told := randomised.mistake(seed))] == []


@pytest.mark.parametrize("seeds", [range(20), pytest.param(range(20, 300), marks=pytest.mark.soak)])
def test_faults_in_any_dialect_and_arithmetic_are_never_accepted(seeds: range) -> None:
    """Nine of ten that a clause describes are named; the others are refused."""
    found = [randomised.planted_at_random(seed) for seed in seeds]
    assert [told for result, told in found if result == "accepted"] == []
    described = [result for result, told in found if result != "refused, no clause"]
    assert described.count("named") >= 0.9 * len(described), found


# --- planted bugs -------------------------------------------------------------------------------

SUM = "r = trust_coefficient * nw / (ng + weight_decay * nw + eps)"
HALF = "lr = float(np.float16(lr))"
NARROW_NORMS = "nw, ng = (np.sqrt(np.sum(x * x)) for x in (w, g))"
# rule, what is replaced, the clause that it breaks, how
BROKEN: list[tuple[str, dict[str, str], str, str]] = [
    ("sgd", {"k =": "k = 1 - dampening"}, "first step", "dampened"),
    ("sgd", {"k =": "k = 1"}, "dampening", "ignored"),
    ("sgd", {"k =": "k = 1 - momentum"}, "dampening", "1 - momentum"),
    ("sgd", {"k =": "k = 1 + dampening if t > 1 else 1"}, "dampening", "1 + dampening"),
    ("sgd", {"d =": "d = weight_decay * w - g"}, "direction", "of the negated gradient"),
    ("sgd", {"t =": "t = state.get('step', 0) + 1\nstate = state if (t - 1) % 7 else {}"},
     "state", "arrays reset every 7 steps"),
    ("adam", {"t =": "t, g = state.get('step', 0) + 1, -g"}, "direction",
     "of the negated gradient"),
    *(
        ("adam", {"c1,": f"c1, c2 = {c1}, {c2}"}, "bias correction", how)
        for c1, c2, how in (
            ("1 - b1**t", "1 - b2 ** max(t - 1, 1e9 * (t == 1))", "t of before in v"),
            ("1 - b1**t", "1 - b2 ** (t - 1)", "t of before, unguarded in v"),
            ("1 - b1**t", "1 - b2 ** (t + 1)", "t too large in v"),
            ("1 - b1 ** max(t - 1, 1e9 * (t == 1))", "1 - b2**t", "t of before in m"),
            ("1 - b1 ** (t - 1)", "1 - b2**t", "t of before, unguarded in m"),
            ("1 - b1 ** (t + 1)", "1 - b2**t", "t too large in m"),
            ("1 - b1 ** (t - 1)", "1 - b2 ** (t - 1)", "t of before, unguarded"),
        )
    ),
    ("lars", {"nw,": "nw, ng = (float(np.sqrt(np.sum(x.astype('f2') ** 2))) for x in (w, g))"},
     "norm format", "float16"),
    ("lars", {"nw,": "nw, ng = (float(np.float16(size_of(x))) for x in (w, g))"},
     "norm format", "float16, at the end"),
    ("sgd", {"u =": "u = v"}, "nesterov", "ignored"),
    ("sgd", {"w =": "w = w + lr * u"}, "direction", "ascent"),
    ("sgd", {"t =": f"t = state.get('step', 0) + 1; {HALF}"}, "learning rate precision", "float16"),
    ("sgd", {"d =": "d = g - weight_decay * w"}, "weight decay", "subtracted"),
    ("sgd", {"d =": "d = g"}, "weight decay", "ignored"),
    ("sgd", {"d =": "d, w = g, w * (1 - weight_decay)"}, "weight decay", "without lr"),
    (
        "sgd", {"d =": "d = g", "w =": "w = (w - lr * u) * (1 - lr * weight_decay)"},
        "weight decay", "after the step",
    ),
    ("adam", {"root =": "root = np.sqrt(v / c2 + eps)"}, "epsilon", "inside the root"),
    (
        "adam", {"root =": "root = np.sqrt((v + eps) / c2)"},
        "epsilon", "inside the root, before correction",
    ),
    ("adam", {"root =": "root = np.sqrt(v / c2)"}, "epsilon", "ignored"),
    ("adam", {"c1,": "c1 = c2 = 1"}, "bias correction", "none"),
    ("adam", {"c1,": "c1, c2 = 1 - b1**t, 1"}, "bias correction", "first moment only"),
    ("adam", {"c1,": "c1, c2 = 1, 1 - b2**t"}, "bias correction", "second moment only"),
    ("adam", {"c1,": "c2, c1 = 1 - b1**t, 1 - b2**t"}, "bias correction", "betas exchanged"),
    ("adam", {"c1,": "c1, c2 = (1 - b ** (t + 1) for b in betas)"}, "bias correction",
     "t too large"),
    (
        "adam", {"c1,": "c1, c2 = (1 - b ** (t - 1) if t > 1 else 1 for b in betas)"},
        "bias correction", "t of before",
    ),
    ("adam", {"m =": "m = b1 * old + g"}, "first moment", "without g weight"),
    ("adam", {"w = w - lr": "w = w - lr * (old / c1) / root"}, "first moment", "of before"),
    (
        "adam", {"w = w - lr": "w = w - lr * ((b1 * m + (1 - b1) * g) / c1) / root"},
        "first moment", "nesterov",
    ),
    ("adam", {"v =": "v = b2 * squares + g**2"}, "second moment", "without g^2 weight"),
    ("adam", {"w = w - lr": "w = w + lr * (m / c1) / root"}, "direction", "ascent"),
    ("adam", {"b1,": f"b1, b2 = betas; {HALF}"}, "learning rate precision", "float16"),
    ("adam", {"if dec": "if False:"}, "weight decay", "always in the gradient"),
    ("adam", {"w = w *": "w = w * (1 - weight_decay)"}, "weight decay", "decoupled, without lr"),
    (
        "adam", {"w = w *": "w = w * (1 + lr * weight_decay)"},
        "weight decay", "opposite sign, decoupled",
    ),
    (
        "adam", {"g =": "g = g - weight_decay * w"},
        "weight decay", "opposite sign in the gradient",
    ),
    (
        "adam",
        {"w = w *": "pass", "w = w - lr": "w = w - lr * (m / c1) / root\n"
                                        "w = w * (1 - lr * weight_decay * decoupled)"},
        "weight decay", "decoupled, after the step",
    ),
    ("lars", {"if nw": "if nw >= 0 and ng >= 0:"}, "zero norm", "unguarded but for overflow"),
    ("lars", {"if nw": "if nw >= 0 <= ng:", "k =": "k = lr * r"}, "zero norm", "unguarded"),
    ("lars", {"r = 1": "r = trust_coefficient"}, "zero norm", "trust coefficient"),
    ("lars", {"r = 1": "r = 0.0"}, "zero norm", "no step"),
    ("lars", {"if nw": "if nw > 0 < ng and weight_decay:"}, "adapts", "only with weight decay"),
    (
        "lars", {"old =": "old = state.get('momentum', w * 0)\n"
                          "weight_decay *= w.ndim > 1",
                 "if nw": "if nw > 0 < ng and w.ndim > 1:"},
        "adapts", "matrices only",
    ),
    ("lars", {"r = trust": SUM.replace("trust_coefficient * ", "")}, "trust ratio",
     "without trust coefficient"),
    ("lars", {"r = trust": f"{SUM}\nr = r * r"}, "trust ratio", "squared"),
    ("lars", {"r = trust": SUM.replace(" + eps", "")}, "epsilon", "ignored"),
    ("lars", {"r = trust": SUM.replace("weight_decay * nw + ", "")}, "denominator",
     "gradient and epsilon"),
    ("lars", {"r = trust": "r = trust_coefficient * nw / ng"}, "denominator", "gradient"),
    ("lars", {"k =": "k = lr * min(r / lr, 1)"}, "trust ratio", "clipped at zero norm too"),
    (
        "lars", {"v =": "v = momentum * old + meet(k, w) * g + meet(lr * weight_decay, w) * w"},
        "weight decay", "unscaled",
    ),
    ("lars", {"d =": "d = g"}, "weight decay", "only in the ratio"),
    ("lars", {"d =": "d = g - weight_decay * w"}, "weight decay", "subtracted"),
    (
        "lars", {"v =": "v = momentum * old + d", "w =": "w = w - meet(lr * r, w) * v"},
        "ratio scales", "velocity",
    ),
    ("lars", {"nw,": "nw, ng = (np.sum(np.abs(x), dtype=float) for x in (w, g))"}, "norm of",
     "1-norm"),
    ("lars", {"old =": f"old = state.get('momentum', w * 0); {HALF}"}, "learning rate precision",
     "float16"),
    ("lars", {"w =": "w = w + v"}, "direction", "ascent"),
    ("fromage", {"if nw": "if nw >= 0 and ng >= 0:"}, "zero norm", "no step"),
    (
        "fromage", {"if nw": "if True:", "s = meet": "s = meet(s, w)"},
        "zero norm", "unguarded",
    ),
    ("fromage", {"s = lr": "s = 0"}, "zero norm", "no step"),
    ("fromage", {"s = lr * nw": "s = lr * nw / (ng + 1e-8)"}, "zero norm", "epsilon 1e-8, guarded"),
    ("fromage", {"p =": "p = 1"}, "prefactor", "absent"),
    ("fromage", {"p =": "p = meet(1 + lr**2, w)"}, "prefactor", "squared"),
    ("fromage", {"p =": "p = meet(1 / np.sqrt(1 + lr**2), w)"}, "prefactor", "multiplied"),
    ("fromage", {"p =": "p = meet(np.sqrt(1 + lr), w)"}, "prefactor", "of lr"),
    (
        "fromage", {"p =": "p = meet(np.sqrt(1 + lr**2) if nw > 0 < ng else 1, w)"},
        "prefactor", "not at zero norm",
    ),
    ("fromage", {"w = (w": "w = w / p - s * g"}, "prefactor", "on the weight"),
    ("fromage", {"w = (w": "w = w - s * g / p"}, "prefactor", "on the step"),
    ("fromage", {"w = (w": "w = (w + s * g) / p"}, "direction", "ascent"),
    ("fromage", {"s = lr * nw": "s = lr * ng / nw"}, "ratio", "|g| / |w|"),
    ("fromage", {"s = lr * nw": "s = lr / ng"}, "ratio", "1 / |g|"),
    ("fromage", {"s = lr * nw": "s = lr * nw"}, "ratio", "|w|"),
    ("fromage", {"s = lr * nw": "s = lr * np.sqrt(nw / ng)"}, "ratio", "sqrt(|w| / |g|)"),
    ("fromage", {"most =": "most = np.inf"}, "norm bound", "ignored"),
    ("fromage", {"most =": "most = np.inf if norm_bound is None else norm_bound"}, "norm bound",
     "absolute"),
    ("fromage", {"most =": "most = np.inf if norm_bound is None else norm_bound * nw"},
     "norm bound", "of this step"),
    ("fromage", {"nw,": f"nw, ng = size_of(w), size_of(g); {HALF}"}, "learning rate precision",
     "float16"),
]  # fmt: skip


def concluded_of(standin: Standin, formats: Sequence[str] = ("float32",)) -> Any:
    """The audit of a stand-in."""
    tests = vectors(standin.rule, formats)
    return concluded("", {}, tests, standins.outcomes(standin, [v.case for v in tests]))


@pytest.mark.parametrize("form", ["float16", "float32", "float64"])
@pytest.mark.parametrize("rule", standins.PLAIN_ONES)
def test_without_a_bug_nothing_is_found(rule: str, form: str) -> None:
    found = concluded_of(standins.changed(rule, {}), (form,))
    assert found.finding.kind == "published"
    assert form == "float16" or found.verdict in ("agrees", "agrees to the bit")


@pytest.mark.parametrize(
    ("rule", "edits", "clause", "how"), BROKEN, ids=[f"{b[0]}-{b[2]}-{b[3]}" for b in BROKEN]
)
def test_planted_bugs_are_named(rule: str, edits: dict[str, str], clause: str, how: str) -> None:
    found = concluded_of(standins.changed(rule, edits))
    assert found.finding.choices == {clause: how}
    assert (found.verdict, found.finding.kind) == ("deviates", "deviation")
    assert found.finding.smallest is not None
    assert found.finding.parting is not None


def test_a_fault_of_a_dialect_is_named_before_its_arithmetic() -> None:
    """The smallest test, the first difference and the first line are about the clause."""
    standin, ways = ONE_BY_ONE["apex LARC, clip=False"], Ways(norm="pairwise")
    fault = next(f for f in planted.FAULTS if f.name == "no trust coefficient")
    tests = vectors("lars", ("float32",))
    found = concluded(
        "it", {}, tests, planted.outcomes(standin, [v.case for v in tests], ways, fault)
    )
    arithmetic = {"norm accumulation": "dtype"}
    assert found.finding.extra_choices == {"trust ratio": "without trust coefficient", **arithmetic}
    first = report.sentence(found)
    assert first.startswith("it deviates from lars: it breaks ")
    assert first.index("`trust ratio`") < first.index("in its arithmetic in `norm accumulation`")
    answers = next(j.answers for j in found.judged if j.test.case is found.finding.smallest)
    case = found.finding.smallest
    assert identification.worst_ratio(RULES["lars"], arithmetic, case, answers) > 1
    assert found.finding.parting.label == "r"


def test_a_fault_in_another_optimizer_is_no_other_optimizer() -> None:
    standin = ONE_BY_ONE["torch AMSGrad"]
    fault = next(f for f in planted.FAULTS if f.name == "state lost")
    tests = vectors("adam", ("float32",))
    outcomes = planted.outcomes(standin, [v.case for v in tests], standins.PLAIN, fault)
    assert concluded("it", {}, tests, outcomes).verdict == "deviates"


@pytest.mark.parametrize(("axis", "how"), [(0, "row"), (-1, "column")])
@pytest.mark.parametrize("rule", ["lars", "fromage"])
def test_norms_of_rows_are_named(rule: str, axis: int, how: str) -> None:
    found = concluded_of(standins.by_rows(rule, axis))
    assert (found.finding.kind, found.finding.choices) == ("deviation", {"norm of": how})


# rule, what is replaced, what it makes: a dialect by name, or a profile by clause
MADE = [
    ("sgd", {"d =": "d, lr = lr * (g + weight_decay * w), 1"}, "caffe", "learning rate"),
    ("sgd", {"d =": "d, w = g, w * (1 - lr * weight_decay)"}, "decoupled", "weight decay"),
    ("adam", {"root =": "root = (np.sqrt(v) + eps) / c2**0.5"}, "epsilon-hat", "epsilon"),
    ("adam", {"if dec": "if True:"}, "AdamW", "weight decay"),
    ("adam", {"v =": "v = b2 * squares + (1 - b2) * (g - m) ** 2"}, "AdaBelief", "second moment"),
    ("lars", {"nw,": "nw, ng = size_of(w), size_of(d)\neps -= weight_decay * nw"}, "optax",
     "denominator"),
    ("lars", {"v =": "v = momentum * old + meet(r, w) * d", "w =": "w = w - lr * v"}, "torchlars",
     "learning rate"),
    ("fromage", {"if nw": "if True:", "s = lr * nw": "s = lr * max(nw, 1e-6) / max(ng, 1e-6)"},
     "optax", "zero norm"),
    ("fromage", {"if nw": "if True:", "s = lr * nw": "s = lr * max(nw, 1e-5) / max(ng, 1e-5)"},
     "nfnets", "zero norm"),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "edits", "dialect", "clause"), MADE, ids=[m[2] for m in MADE])
def test_bugs_that_make_a_dialect(
    rule: str, edits: dict[str, str], dialect: str, clause: str
) -> None:
    found = concluded_of(standins.changed(rule, edits)).finding
    assert found.kind in ("dialect", "out of scope")
    assert found.dialect.name == dialect
    assert list(found.choices) == [clause]


NARROW_POWER = "c1, c2 = (1 - float(f(b**t)) for b in betas)"
PROFILES = [
    # rule, what is replaced, the formats asked, the clause, how
    ("adam", {"c1,": f"f = np.float32\n{NARROW_POWER}"}, ("float32",), "precision", "dtype"),
    ("adam", {"c1,": f"f = w.dtype.type\n{NARROW_POWER}"}, ("float32", "float64"), "precision",
     "dtype"),
    ("adam", {"c1,": "f = w.dtype.type\nc1, c2 = (f(1) - f(b) ** f(t) for b in betas)"},
     ("float32", "float64"), "precision", "dtype"),
    ("adam", {"c1,": f"f = np.float32\n{NARROW_POWER}"}, ("float32", "float64"), "precision",
     "float32"),
    ("adam", {"b1,": "b1, b2 = betas = [float(np.float32(b)) for b in betas]"}, ("float32",),
     "precision", "dtype"),
    ("lars", {"nw,": NARROW_NORMS}, ("float32",), "norm accumulation", "dtype, guarded"),
    ("lars", {"nw,": NARROW_NORMS}, ("float16",), "norm accumulation", "dtype, guarded"),
    ("fromage", {"nw,": NARROW_NORMS}, ("float32",), "norm accumulation", "dtype, guarded"),
    ("fromage", {"nw,": NARROW_NORMS}, ("float16",), "norm accumulation", "dtype, guarded"),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "edits", "formats", "clause", "how"), PROFILES)
def test_other_arithmetic_is_a_profile_not_a_bug(
    rule: str, edits: dict[str, str], formats: tuple[str, ...], clause: str, how: str
) -> None:
    found = concluded_of(standins.changed(rule, edits), formats)
    assert (found.finding.kind, found.finding.choices) == ("profile", {clause: how})
    assert found.verdict == "profile"


# rule, what is replaced, a flag of the cases that fail; no clause has these
RIDDLES: list[tuple[str, dict[str, str], str]] = [
    ("sgd", {"u =": "u = d - momentum * v if nesterov else v"}, "LR_LARGE"),
    ("sgd", {"d =": "d = np.clip(g + weight_decay * w, -1, 1)"}, "ORDINARY"),
    ("sgd", {"w =": "w = w - lr * np.sign(u)"}, "ORDINARY"),
    ("sgd", {"w =": "w = w - lr * abs(lr) * u"}, "LR_PRECISION"),
    ("adam", {"root =": "root = np.sqrt(v) / c2 + eps"}, "FIRST_STEP"),
    ("adam", {"root =": "root = np.sqrt(v / c2) + eps + eps"}, "TINY_GRADIENT"),
    ("adam", {"root =": "root = np.maximum(np.sqrt(v / c2), eps)"}, "TINY_GRADIENT"),
    ("adam", {"b1,": "b2, b1 = betas"}, "SECOND_STEP"),
    ("adam", {"m =": "m = b2 * old + (1 - b2) * g"}, "FIRST_STEP"),
    ("lars", {"nw,": "nw, ng = (np.sum(np.abs(x) ** 1.5) ** (1 / 1.5) for x in (w, g))"},
     "ONE_ROW_LARGE"),
    ("lars", {"nw,": "nw, ng = (np.max(np.abs(x), initial=0) for x in (w, g))"}, "ONE_ROW_LARGE"),
    ("lars", {"k =": "k = lr * min(r, 1)"}, "TINY_GRADIENT"),
    ("fromage", {"nw,": "nw, ng = (np.sum(np.abs(x) ** 1.5) ** (1 / 1.5) for x in (w, g))"},
     "ONE_ROW_LARGE"),
    ("fromage", {"s = lr * nw": "s = lr * (nw / ng) ** 1.5"}, "SMALL_NORM"),
    ("fromage", {"s = lr * nw": "s = min(lr * nw / ng, 1)"}, "TINY_GRADIENT"),
    ("fromage", {"p =": "p = meet(np.sqrt(1 + 2 * lr**2), w)"}, "LR_PRECISION"),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "edits", "flag"), RIDDLES)
def test_what_no_clause_describes_is_unknown(rule: str, edits: dict[str, str], flag: str) -> None:
    found = concluded_of(standins.changed(rule, edits))
    assert (found.finding.kind, found.verdict) == ("unknown", "unknown")
    assert found.finding.choices is None
    wrong, all_ = found.failing_flags()[flag]
    assert wrong >= all_ / 2


# --- no false alarm -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "seeds", [range(2000), pytest.param(range(2000, 10_000), marks=pytest.mark.soak)]
)
def test_right_answers_raise_no_alarm(seeds: range) -> None:
    """Any order of operations within the declared scalars, at level C1."""
    assert [told for seed in seeds if (told := randomised.alarm(seed))] == []


# --- every pair ---------------------------------------------------------------------------------


def candidates() -> Iterator[tuple[str, dict[str, str]]]:
    """All dialects, and all changes of one clause."""
    for name, rule in RULES.items():
        for dialect in rule.dialects:
            yield name, dict(dialect.choices)
        for change in single_changes(rule):
            yield name, dict(change)


def third(every: Iterable[Any]) -> list[Any]:
    """Every third in the suite; the soak asks all."""
    return [case if k % 3 == 0 else pytest.param(*case, marks=pytest.mark.soak)
            for k, case in enumerate(every)]  # fmt: skip


@pytest.mark.parametrize(("name", "choices"), third(candidates()))
def test_every_choice_can_be_told_from_every_other(name: str, choices: dict[str, str]) -> None:
    rule = RULES[name]
    formats = ("float32", "float64") if "precision" in " ".join(choices) else ("float32",)
    stored = vectors(name, formats, large="first" in " ".join(choices.values()))
    found = [v for one in stored for v in (one, *in_use(one, [*USES]))]
    cases = [v.case for v in found if v.case.result == "valid" and len(v.case.steps) <= 8]
    outcomes = [
        tuple(Answer(c.number.round(e.w) + 0 * c.w) for e in run(rule, choices, c)) for c in cases
    ]
    told = finding(name, cases, outcomes)
    assert told.choices in (rule.differences(choices), *SAME.get((name, *choices.items()), ()))


# choices that are another choice in disguise
LARGEST = (
    "largest absolute value",
    "largest absolute value, eps inside",
)  # they need no correction
SAME: dict[Any, tuple[dict[str, str], ...]] = {
    ("adam", ("second moment", largest)): (
        {"second moment": largest, "bias correction": "first moment only"},
    )
    for largest in LARGEST
}
SAME |= {  # of Muon
    ("muon", ("precision", "bfloat16")): ({},),  # asked here without its errors
    ("muon", ("norm accumulation", "dtype")): ({},),  # which in float32 these norms do not show
}

# --- PyTorch and optax --------------------------------------------------------------------------

# target -> kinds, dialect, clauses of rule
REAL: list[tuple[str, dict[str, Any], tuple[str, ...], str]] = [
    ("torch.optim.SGD", {}, ("published",), "published"),
    ("torch.optim.Adam", {}, ("published",), "published"),
    ("torch.optim.Adam", {"amsgrad": True}, ("out of scope",), "AMSGrad"),
    ("torch.optim.AdamW", {}, ("published",), "published"),
    ("optax.sgd", {}, ("published",), "published"),
    ("optax.adam", {}, ("published", "profile"), "published"),
    ("optax.adamw", {}, ("published", "profile"), "published"),
    ("optax.amsgrad", {}, ("out of scope",), "AMSGrad, corrected"),
    ("optax.fromage", {}, ("dialect",), "optax"),
    ("optax.lars", {}, ("dialect",), "optax"),
]


real = pytest.mark.parametrize(("spec", "overrides", "kinds", "dialect"), REAL)


@real
def test_real_optimizers(
    spec: str, overrides: dict[str, Any], kinds: tuple[str, ...], dialect: str
) -> None:
    target = libraries.find(spec, overrides)
    tests = vectors(KNOWN[spec][0].name, ("float32",))
    tests = [v for v in tests if libraries.usual(target, v.case)]
    outcomes = libraries.outcomes(target, [v.case for v in tests])
    is_what_it_is(concluded(spec, {}, tests, outcomes), kinds, dialect)


@pytest.mark.soak
@real
def test_real_audits(
    spec: str, overrides: dict[str, Any], kinds: tuple[str, ...], dialect: str
) -> None:
    """The same in a child, on the large and the long cases too."""
    libraries.find(spec)
    found = audit(targets.find(spec, overrides), ("float32",), limit=60.0)
    is_what_it_is(found, kinds, dialect)


def is_what_it_is(found: Audit, kinds: tuple[str, ...], dialect: str) -> None:
    assert not found.failures
    assert found.finding.kind in kinds
    assert found.finding.dialect is not None
    assert found.finding.dialect.name == dialect
    assert set(found.finding.extra_choices) <= set(identification.PROFILES)
