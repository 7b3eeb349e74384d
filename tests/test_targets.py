"""Other people's optimizers are asked in their own words, and nothing they do harms the asker."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import libraries
import numpy as np
import pytest

from npdrt.conform import targets
from npdrt.conform.case import Answer, Case, Failure, Outcome, Step
from npdrt.conform.formats import FORMATS
from npdrt.conform.rules import KNOWN, RULES, run
from npdrt.errors import Error, Unavailable

ROOT = Path(__file__).parent.parent
SETTINGS: dict[str, dict[str, Any]] = {
    "sgd": {"momentum": 0.0, "dampening": 0.0, "nesterov": False, "weight_decay": 0.0},
    "adam": {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "decoupled": False},
    "adamw": {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0},
    "lamb": {"betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.0},
    "lars": {"momentum": 0.9, "weight_decay": 0.0, "trust_coefficient": 0.02, "eps": 0.0},
    "fromage": {"norm_bound": None},
}
W, G = [0.5, -1.25, 3.0], [0.25, 1.0, -0.75]
RATES = (0.1, 0.03, 0.3, 0.01)


def case(
    rule: str,
    form: str = "float32",
    *,
    w: Any = W,
    g: Any = G,
    state: dict[str, Any] | None = None,
    rates: Sequence[float] = RATES,
    **settings: Any,
) -> Case:
    """A case of steps with other gradients and learning rates."""
    f = FORMATS[form]
    steps = tuple(
        Step(f.round(np.array(g) * (1 + k) / (1 - 3 * k)), lr) for k, lr in enumerate(rates)
    )
    return Case(
        1, "", (), rule, form, MappingProxyType({**SETTINGS[rule], **settings}),
        f.round(np.array(w)), steps, state,
    )  # fmt: skip


def middle(rule: str, form: str, step: int, **settings: Any) -> Case:
    """A case that starts after `step` steps."""
    f = FORMATS[form]
    m, v = f.round(np.array([0.3, -0.2, 0.7])), f.round(np.array([0.2, 0.5, 1.5]))
    state: dict[str, Any] = {"step": step, "momentum": m}
    if rule in ("adam", "adamw", "lamb"):
        betas = settings.get("betas", (0.9, 0.999))
        powers = {f"beta{k}_power": np.float64(b) ** step for k, b in enumerate(betas, 1)}
        state = {"step": step, "exp_avg": m, "exp_avg_sq": v, **powers}
    return case(rule, form, state=state, **settings)


def error(case: Case, outcome: Outcome, choices: dict[str, str] | None = None) -> float:
    """The largest distance from a rule in ulps at scale over all steps; that of the slots in ulps
    of their largest value."""
    assert isinstance(outcome, tuple), outcome
    worst = 0.0
    evaluated = run(RULES[case.rule], choices or {}, case, answers=outcome)
    for got, exact in zip(outcome, evaluated, strict=True):
        assert got.w.dtype == np.float64
        ulp = case.number.ulp(exact.scale)
        worst = max(worst, float(np.max(np.abs(got.w - exact.w) / ulp)))
        for name, slot in got.slots.items():
            size = max(float(np.max(np.abs(e.slots[name]))) for e in evaluated)
            distance = np.abs(slot - exact.slots[name]) / case.number.ulp(size)
            worst = max(worst, float(np.max(distance)))
    return worst


# --- PyTorch and optax ----------------------------------------------------------------------------

SGD = [
    {},
    {"momentum": 0.9},
    {"momentum": 0.9, "dampening": 0.3},
    {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
]
DECAY = {"weight_decay": 0.1}
COUPLED = {**DECAY, "decoupled": False}
DECOUPLED = {**DECAY, "decoupled": True}
LARS = {"denominator": "norm of the sum"}
# target -> (settings of the cases, what it lacks, choices, ulps that it may be away)
ASKED: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, str], float]] = {
    "torch.optim.SGD": (SGD, [], {}, 3),
    "torch.optim.Adam": ([{}, COUPLED, {"betas": (0.8, 0.99), "eps": 1e-3}], [DECOUPLED], {}, 8),
    "torch.optim.AdamW": ([{}, DECAY], [], {}, 8),
    "optax.sgd": ([{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}], SGD[2:], {}, 3),
    "optax.adam": ([{}, {"betas": (0.8, 0.99)}], [COUPLED], {"precision": "float32"}, 40),
    "optax.adamw": ([{}, DECAY], [], {"precision": "float32"}, 40),
    "optax.fromage": ([{}], [{"norm_bound": 1.0}], {}, 8),
    "optax.lamb": ([{}, DECAY], [], {}, 40),
    "optax.lars": ([{}, {"momentum": 0.0}, {**DECAY, "eps": 1e-2}], [], LARS, 8),
}


def asked(spec: str) -> tuple[list[Case], list[Case]]:
    """The cases that a target is asked, and those that it lacks something for."""
    does, lacks, _, _ = ASKED[spec]
    rule = KNOWN[spec][0].name
    cases = [case(rule, form, **s) for s in does for form in ("float32", "float64")]
    cases += [case(rule, "bfloat16"), case(rule, "float16", w=W[:2], g=G[:2])]
    if rule != "fromage":
        slots = [s for s in does if rule != "sgd" or s.get("momentum")]
        cases += [middle(rule, "float32", 5, **s) for s in slots]
    return cases, [case(rule, **s) for s in lacks]


IN_A_CHILD = ("torch.optim.Adam", "optax.adam")  # the others in this process: an import is dear


@pytest.fixture(scope="module", params=list(ASKED))
def library(request: pytest.FixtureRequest) -> tuple[str, list[Outcome], list[Outcome]]:
    """A target of a library with what it answers."""
    spec = str(request.param)
    does, lacks = asked(spec)
    target = libraries.find(spec)
    if spec in IN_A_CHILD:
        outcomes = targets.answers(target, does + lacks, limit=60)
    else:
        outcomes = libraries.outcomes(target, does + lacks)
    return spec, outcomes[: len(does)], outcomes[len(does) :]


def test_libraries_give_their_rule(library: tuple[str, list[Outcome], list[Outcome]]) -> None:
    spec, outcomes, _ = library
    _, _, choices, ulps = ASKED[spec]
    for c, outcome in zip(asked(spec)[0], outcomes, strict=True):
        profile = {**choices}
        if c.format == "float64":  # the corrections are in the format of the parameter
            profile.pop("precision", None)
        assert error(c, outcome, profile) <= ulps, (c.format, dict(c.settings), c.state)


@pytest.mark.parametrize("library", ["optax.adam"], indirect=True)
def test_optax_gives_the_bits_that_its_users_get(
    library: tuple[str, list[Outcome], list[Outcome]],
) -> None:
    """A plain loop without 64-bit types. With them optax corrects float32 moments in float64."""
    spec, outcomes, _ = library
    jnp, optax = pytest.importorskip("jax.numpy"), pytest.importorskip("optax")
    c, outcome = asked(spec)[0][0], outcomes[0]
    assert isinstance(outcome, tuple)
    w = jnp.asarray(c.w, dtype="float32")
    state = optax.adam(0.1).init(w)
    for step, answer in zip(c.steps, outcome, strict=True):
        transform = optax.adam(step.lr, b1=0.9, b2=0.999, eps=1e-8)
        updates, state = transform.update(jnp.asarray(step.g, dtype="float32"), state, w)
        w = optax.apply_updates(w, updates)
        assert np.array_equal(np.asarray(w, dtype=np.float64), answer.w)


def test_libraries_show_their_state(library: tuple[str, list[Outcome], list[Outcome]]) -> None:
    """So that the test above has judged it too; and it moves."""
    spec, outcomes, _ = library
    moments = {"exp_avg", "exp_avg_sq"}
    names = {
        "adam": moments,
        "adamw": moments,
        "lamb": moments,
        "lars": {"momentum"},
        "fromage": set(),
    }
    for c, outcome in zip(asked(spec)[0], outcomes, strict=True):
        assert isinstance(outcome, tuple)
        used = {"momentum"} if c.settings.get("momentum") else set()
        assert set(outcome[0].slots) == (names.get(c.rule, used))
        assert len({answer.w.tobytes() for answer in outcome}) > 2


def test_libraries_lack(library: tuple[str, list[Outcome], list[Outcome]]) -> None:
    spec, _, outcomes = library
    assert len(outcomes) == len(ASKED[spec][1])
    assert all(isinstance(o, Failure) and o.kind == "not offered" for o in outcomes)


def test_libraries_say_what_they_are() -> None:
    pytest.importorskip("torch")
    target = targets.find("torch.optim.AdamW")
    assert (target.name, target.kind, target.rule) == ("torch.optim.AdamW", "torch", "adamw")
    assert target.versions["torch"].startswith("2.")
    assert target.formats == tuple(FORMATS)


def test_overrides_reach_the_library() -> None:
    """AMSGrad keeps the largest second moment: another answer once gradients shrink."""
    pytest.importorskip("torch")
    target = targets.find("torch.optim.Adam", {"amsgrad": True, "foreach": True})
    assert target.name == "torch.optim.Adam(amsgrad=True, foreach=True)"
    cases = [case("adam", betas=(0.5, 0.5)), middle("adam", "float32", 5)]
    fresh, injected = targets.answers(target, cases)
    choices = {"second moment": "largest mean of squares"}
    assert error(cases[0], fresh, choices) <= 8
    assert error(cases[0], fresh) > 1000
    assert error(cases[1], injected, choices) <= 8


def test_overrides_that_do_not_fit() -> None:
    pytest.importorskip("torch")
    with pytest.raises(Error, match=r"torch\.optim\.SGD has no 'speed'; it has lr, momentum"):
        targets.find("torch.optim.SGD", {"speed": 2})
    with pytest.raises(Error, match="momentum is set by the cases"):
        targets.find("torch.optim.SGD", {"momentum": 0.5})
    with pytest.raises(Error, match=r"is sgd, not adam"):
        targets.find("torch.optim.SGD", rule="adam")


def test_a_library_that_refuses() -> None:
    pytest.importorskip("torch")
    target = targets.find("torch.optim.SGD")
    outcomes = targets.answers(
        target,
        [
            replace(case("sgd", rates=[-1.0]), result="error"),
            case("sgd"),
            case("sgd", rates=[-1.0]),
        ],
    )
    assert isinstance(outcomes[0], Failure)
    assert outcomes[0].kind == "raised"
    assert re.match(
        r"ValueError: Invalid learning rate: -1\.0 \(sgd\.py:\d+\)", outcomes[0].message
    )
    assert isinstance(outcomes[1], tuple)
    refused = Failure("not offered", "it refuses some settings: Invalid learning rate: -1.0")
    assert outcomes[2] == refused


def test_torch_has_no_limit_of_steps_and_optax_has() -> None:
    pytest.importorskip("optax")
    target = targets.find("optax.adam")
    late = middle("adam", "float32", 2**31)
    found = targets.lacks(target, late)
    assert found == Failure("not offered", "it counts steps up to 2147483647")
    assert targets.lacks(targets.find("torch.optim.Adam"), late) is None


def test_a_library_that_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optax", None)
    with pytest.raises(Unavailable, match="pip install optax"):
        targets.find("optax.sgd")


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (
            "torch.optim.Adan",
            "torch.optim has no Adan; did you mean torch.optim.Adam?",
        ),
        (
            "torch.optim.swa_utils",
            "is no optimizer of PyTorch or Keras, .*path/to/file.py:callable",
        ),
        (
            "no_such_package.optim.SGD",
            "there is no package no_such_package; use a name in a package",
        ),
        ("SGD", "is not a target; use a name in a package, .*protocol"),
        ("missing.py:update", "missing.py does not exist"),
        (f"{ROOT}/README.md", "name the callable"),
    ],
)
def test_unknown_targets(spec: str, words: str) -> None:
    with pytest.raises(Error, match=words):
        targets.find(spec)


# --- files ------------------------------------------------------------------------------------


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], str]:
    """Makes a target of a source, `update` in it."""

    def target(source: str) -> str:
        (tmp_path / "mine.py").write_text("import numpy as np\n" + textwrap.dedent(source))
        return f"{tmp_path / 'mine.py'}:update"

    return target


def page_example() -> str:
    text = (ROOT / "docs" / "audit-protocol.md").read_text()
    found = re.search(r"```python\n(.*?)```", text, re.S)
    assert found is not None
    return found[1]


def test_the_example_of_the_page(write: Callable[[str], str]) -> None:
    target = targets.find(write(page_example()))
    assert target.offers == {"momentum", "weight_decay"}
    assert (target.kind, target.rule, target.required) == ("file", None, frozenset())
    assert target.formats == ("float16", "float32", "float64")
    cases = [case("sgd", form, **s) for form in target.formats for s in (*SGD[:2], DECAY)]
    cases += [middle("sgd", "float32", 5, momentum=0.9), case("sgd", w=1.5, g=0.5)]
    outcomes = targets.answers(target, cases)
    assert max(error(c, o) for c, o in zip(cases, outcomes, strict=True)) <= 3
    assert isinstance(outcomes[1], tuple)
    assert set(outcomes[1][0].slots) == {"momentum"}
    lacking = [case("sgd", **SGD[2]), case("sgd", **SGD[3]), case("sgd", "bfloat16")]
    lacking += [case("adam", eps=1e-3), case("lars", trust_coefficient=0.02)]
    for outcome in targets.answers(target, lacking):
        assert isinstance(outcome, Failure)
        assert outcome.kind == "not offered"


def test_what_a_file_is_given(write: Callable[[str], str], tmp_path: Path) -> None:
    source = f"""
    def update(w, g, state, *, lr, name, step, extra, **settings):
        assert type(lr) is float and name == "bias" and extra == 3
        assert settings == {{"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0,
                            "decoupled": False}}, settings
        assert step >= 5 and w.dtype == g.dtype == "bfloat16"
        if step == 5:
            assert set(state) == {{"step", "exp_avg", "exp_avg_sq", "beta1_power", "beta2_power"}}
            assert state["step"] == 5 and state["exp_avg"].dtype == w.dtype
        else:
            assert state == {{"mine": step}}, state
        open({str(tmp_path / "log")!r}, "a").write(f"{{step}} {{lr}}\\n")
        return w - g, {{"mine": step + 1}}
    update.formats = ("bfloat16",)
    """
    pytest.importorskip("ml_dtypes")
    target = targets.find(write(source), {"extra": 3}, rule="adam")
    assert (target.rule, target.offers, target.formats) == ("adam", None, ("bfloat16",))
    [outcome] = targets.answers(target, [replace(middle("adam", "bfloat16", 5), kind="bias")])
    assert isinstance(outcome, tuple), outcome
    expected = "".join(f"{5 + k} {lr}\n" for k, lr in enumerate(RATES))
    assert (tmp_path / "log").read_text() == 2 * expected  # every case is run twice
    assert not list(tmp_path.glob("**/*.pyc"))


GOOD = "def update(w, g, state, *, lr):\n    return w - w.dtype.type(lr) * g, {}\n"
BAD: dict[str, tuple[str, str, str]] = {  # what it does -> (source, kind, message)
    "raises": (
        "def update(w, g, state, *, lr):\n    return w + 'x', {}",
        "raised", r"UFuncTypeError: .*|.*Error: .* \(mine\.py:3\)",
    ),
    "raises without text": (
        "def update(w, g, state, *, lr):\n    raise KeyError",
        "raised", r"KeyError \(mine\.py:3\)",
    ),
    "raises what cannot be shown": (
        "class E(Exception):\n    def __str__(self): 1 / 0\n"
        "def update(w, g, state, *, lr):\n    raise E",
        "raised", r"E: no message \(mine\.py:5\)",
    ),
    "leaves": (
        "import sys\ndef update(w, g, state, *, lr):\n    sys.exit(3)",
        "raised", r"SystemExit: 3 \(mine\.py:4\)",
    ),
    "interrupts": (
        "def update(w, g, state, *, lr):\n    raise KeyboardInterrupt",
        "raised", r"KeyboardInterrupt \(mine\.py:3\)",
    ),
    "recurses": (
        "def update(w, g, state, *, lr):\n    return update(w, g, state, lr=lr)",
        "raised", r"RecursionError: .*\(mine\.py:3\)",
    ),
    "another shape": (
        "def update(w, g, state, *, lr):\n    return w[:, None], {}",
        "shape", r"step 1: returned shape \(3, 1\) for a w of \(3,\)",
    ),
    "another dtype": (
        "def update(w, g, state, *, lr):\n    return w - np.float64(lr) * g, {}",
        "dtype", "step 1: returned float64 for a w of float32",
    ),
    "a list": (
        "def update(w, g, state, *, lr):\n    return [1.0, 2.0, 3.0], {}",
        "shape", "step 1: returned list as w; expected an array of float32",
    ),
    "nothing": (
        "def update(w, g, state, *, lr):\n    pass",
        "shape", r"step 1: returned NoneType; expected \(w, state\)",
    ),
    "no state": (
        "def update(w, g, state, *, lr):\n    return w",
        "shape", r"step 1: returned ndarray; expected \(w, state\)",
    ),
    "a state that is no dict": (
        "def update(w, g, state, *, lr):\n    return w, None",
        "shape", "step 1: returned NoneType as state, not a dict",
    ),
    "writes w": (
        "def update(w, g, state, *, lr):\n    w -= w.dtype.type(lr) * g\n    return w, {}",
        "mutated", r"w and g may not be changed in place: ValueError: .* \(mine\.py:3\)",
    ),
    "forces w": (
        "def update(w, g, state, *, lr):\n    w.flags.writeable = True\n    w -= g\n"
        "    return w, {}",
        "mutated", "step 1: w was changed in place",
    ),
    "forces g": (
        "def update(w, g, state, *, lr):\n    g.flags.writeable = True\n    g[:] = 0\n"
        "    return w - g, {}",
        "mutated", "step 1: g was changed in place",
    ),
    "writes its state": (
        "def update(w, g, state, *, lr):\n    v = state.setdefault('a', [{'v': 0 * g}])[0]['v']\n"
        "    v += g\n    return w - v, state",
        "mutated", r"step 2: state\['a'\]\[0\]\['v'\] was changed in place",
    ),
    "another answer each time": (
        "r = np.random.default_rng()\ndef update(w, g, state, *, lr):\n"
        "    return w - np.float32(r.random()) * g, {}",
        "nondeterministic", "two runs from the same start differ after step 1: element 0 of w ",
    ),
    "a state of its own": (
        "n = [0]\ndef update(w, g, state, *, lr):\n    n[0] += 1\n"
        "    return w - g, {'momentum': g * n[0]}",
        "nondeterministic", "two runs .* step 1: element 0 of momentum is 0.25 and 1.25",
    ),
    "raises the second time": (
        "n = [0]\ndef update(w, g, state, *, lr):\n    n[0] += 1\n"
        "    if n[0] > 4: raise OSError('gone')\n    return w - g, {}",
        "nondeterministic", r"the second run .* gave no answer: OSError: gone \(mine\.py:5\)",
    ),
    "exits": (
        "import os\ndef update(w, g, state, *, lr):\n    os._exit(7)",
        "died", "exit code 7",
    ),
    "crashes": (
        "import os, signal\ndef update(w, g, state, *, lr):\n"
        "    os.kill(os.getpid(), signal.SIGSEGV)",
        "died", "killed by SIGSEGV",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_bad_files(what: str, write: Callable[[str], str]) -> None:
    source, kind, message = BAD[what]
    [outcome] = targets.answers(targets.find(write(source)), [case("sgd")])
    assert isinstance(outcome, Failure), outcome
    assert outcome.kind == kind
    assert re.match(message, outcome.message), outcome.message
    assert "\n" not in outcome.message


def test_the_ordinary_file(write: Callable[[str], str]) -> None:
    c = case("sgd", w=W)
    [outcome] = targets.answers(targets.find(write(GOOD)), [c])
    assert error(c, outcome) <= 2


def test_values_that_are_not_finite_are_answers(write: Callable[[str], str]) -> None:
    source = (
        "def update(w, g, state, *, lr):\n    return w * np.float32('nan'), {'momentum': w / 0}"
    )
    [outcome] = targets.answers(targets.find(write(source)), [case("sgd")])
    assert isinstance(outcome, tuple)
    assert np.isnan(outcome[-1].w).all()


def test_empty_and_0d(write: Callable[[str], str]) -> None:
    cases = [case("sgd", w=[], g=[]), case("sgd", w=1.0, g=2.0)]
    empty, single = targets.answers(targets.find(write(GOOD)), cases)
    assert isinstance(empty, tuple)
    assert empty[0].w.shape == (0,)
    assert isinstance(single, tuple)
    assert single[0].w.shape == ()


def test_output_goes_nowhere(
    write: Callable[[str], str], capfd: pytest.CaptureFixture[str]
) -> None:
    source = """
    import os, sys, warnings
    print("hello from import")
    def update(w, g, state, *, lr):
        print("x" * 100_000)
        print("y" * 100_000, file=sys.stderr)
        os.write(1, b"z" * 100_000)
        warnings.warn("mind")
        assert sys.stdin.read() == ""
        return w - g, {}
    """
    [outcome] = targets.answers(targets.find(write(source)), [case("sgd")])
    assert isinstance(outcome, tuple), outcome
    assert capfd.readouterr() == ("", "")


HANGS = """
import time
def update(w, g, state, *, lr):
    while w[0] < 0:
        try:
            time.sleep(60)
        except BaseException:
            pass
    return w - g, {}
"""


def test_hanging_files(write: Callable[[str], str]) -> None:
    """One case that hangs costs that case; three cost the rest."""
    seen: list[tuple[int, int]] = []
    good, bad = case("sgd"), case("sgd", w=[-1.0])
    cases = [good, bad, good, bad, good, bad, good, case("adam"), bad]
    start = time.monotonic()
    target = targets.find(write(HANGS), rule="sgd")
    outcomes = targets.answers(target, cases, limit=1.0, progress=lambda k, n: seen.append((k, n)))
    assert time.monotonic() - start < 60
    assert [isinstance(o, tuple) for o in outcomes] == [True, False] * 3 + [False] * 3
    hung = Failure("hung", "no answer within 1 s")
    assert outcomes[1] == outcomes[3] == outcomes[5] == hung
    late = Failure("not run", f"not run after 3 lost processes: {hung.message}")
    assert outcomes[6] == outcomes[8] == late
    assert isinstance(outcomes[7], Failure)
    assert outcomes[7].kind == "not offered"
    assert seen == [(k + 1, 9) for k in range(9)]


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (
            "import no_such_module",
            r"ModuleNotFoundError: No module named 'no_such_module' \(mine.py:2\)",
        ),
        ("def update(w, g", r"SyntaxError: .* was never closed \(mine.py:2\)"),
        ("raise SystemExit(4)", r"SystemExit: 4 \(mine.py:2\)"),
        ("import os; os._exit(0)", "exit code 0"),
        ("x = 1\ndef other(): pass", r"'update' is not there; it has other"),
        ("update = 3", "'update' is not callable"),
        ("update = max", "Python cannot tell its arguments|does not fit the protocol"),
        ("def update(w, g): pass", r"update\(w, g\) does not fit the protocol"),
        ("def update(w, g, state): pass", "does not fit the protocol: it is called as update"),
        ("def update(w, g, state, lr): pass\nupdate.formats = ['f32']", "'f32' is unknown"),
        ("\0", "does not load: .*null bytes"),
    ],
)
def test_files_that_do_not_load(source: str, words: str, write: Callable[[str], str]) -> None:
    with pytest.raises(Error, match=words) as caught:
        targets.find(write(source))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 800


def test_a_case_that_is_not_read(write: Callable[[str], str], tmp_path: Path) -> None:
    """The time limit holds while a case is sent to a process that has stopped reading."""
    source = f"""
    import os
    open({str(tmp_path / "pid")!r}, "w").write(str(os.getpid()))
    def update(w, g, state, *, lr): return w - g, {{}}
    """
    target = targets.find(write(source))
    large = case("sgd", w=np.ones(1 << 20), g=np.ones(1 << 20))

    def stop(done: int, total: int) -> None:
        if done == 1:
            os.kill(int((tmp_path / "pid").read_text()), signal.SIGSTOP)

    first, second, third = targets.answers(
        target, [case("sgd"), large, case("sgd")], limit=5.0, progress=stop
    )
    assert isinstance(first, tuple)
    assert second == Failure("hung", "no answer within 5 s")
    assert isinstance(third, tuple)


def test_import_that_hangs(write: Callable[[str], str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "START", 1.0)
    with pytest.raises(Error, match="does not load: no answer within 1 s"):
        targets.find(write("import time; time.sleep(60)"))


def test_file_that_loads_once(write: Callable[[str], str]) -> None:
    target = targets.find(spec := write(GOOD))
    Path(spec.rpartition(":")[0]).write_text("raise ValueError('changed')")
    first, second = targets.answers(target, [case("sgd")] * 2)
    assert isinstance(first, Failure)
    assert first.kind == "raised"
    assert "ValueError: changed (mine.py:1)" in first.message
    assert isinstance(second, Failure)


def test_signatures(write: Callable[[str], str]) -> None:
    """Settings without a default are needed; overrides and the protocol's own are no settings."""
    spec = write("def update(w, g, state, lr, betas, step, floor, *, eps=0.0): return w, {}")
    with pytest.raises(Error, match="update has no 'speed'; it has lr, betas, step, floor, eps"):
        targets.find(spec, {"speed": 1})
    with pytest.raises(Error, match=r"eps is set by the cases .* name the rule"):
        targets.find(spec, {"eps": 1})
    target = targets.find(spec, {"floor": 1}, rule="fromage")
    assert target.offers == {"betas", "eps"}
    assert target.required == {"betas"}
    found = targets.lacks(target, case("fromage"))
    assert found == Failure("not offered", "it needs betas, which fromage has not")
    assert targets.lacks(replace(target, rule=None), case("adam")) is None


def test_classes_and_partials_are_callables(write: Callable[[str], str]) -> None:
    source = """
    class Mine:
        formats = ("float32",)
        def __call__(self, w, g, state, *, lr): return w - g, {}
    update = Mine()
    """
    target = targets.find(write(source))
    assert target.formats == ("float32",)
    assert isinstance(targets.answers(target, [case("sgd")])[0], tuple)


def test_neighbours_are_imported(write: Callable[[str], str], tmp_path: Path) -> None:
    (tmp_path / "neighbour.py").write_text("def f(w, g): return w - g\n")
    source = "from neighbour import f\ndef update(w, g, state, *, lr): return f(w, g), {}"
    assert isinstance(targets.answers(targets.find(write(source)), [case("sgd")])[0], tuple)


# --- nothing is left behind -----------------------------------------------------------------------


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return text.rpartition(")")[2].split()[0] not in "ZX"


def pids(path: Path, count: int) -> list[int]:
    """The process ids that a target has written, once they are there."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if path.exists() and len(found := path.read_text().split()) >= count:
            return [int(word) for word in found]
        time.sleep(0.02)
    raise AssertionError("the target did not start")


def gone(processes: list[int]) -> bool:
    deadline = time.monotonic() + 60
    while any(map(alive, processes)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not any(map(alive, processes))


FORKS = """
import os, subprocess, sys, time
def update(w, g, state, *, lr):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    open({!r}, "w").write(f"{{os.getpid()}} {{child.pid}}")
    time.sleep(600)
"""


def test_interrupted(write: Callable[[str], str], tmp_path: Path) -> None:
    """Ctrl-C while a target hangs: the exception is ours, the processes are gone."""
    target = targets.find(write(FORKS.format(str(tmp_path / "pids"))))

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    def alarm() -> None:
        pids(tmp_path / "pids", 2)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGALRM)

    before = signal.signal(signal.SIGALRM, interrupt)  # SIGINT is ignored in a background job
    thread = threading.Thread(target=alarm)
    thread.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            targets.answers(target, [case("sgd")], limit=120)
    finally:
        thread.join()
        signal.signal(signal.SIGALRM, before)
    assert gone(pids(tmp_path / "pids", 2))


def test_killed(write: Callable[[str], str], tmp_path: Path) -> None:
    """The child and what it has started do not outlive a parent that cannot clean up."""
    spec = write(FORKS.format(str(tmp_path / "pids")))
    program = f"""
import numpy as np
from npdrt.conform import targets
from npdrt.conform.case import Case, Step
one = np.ones(1)
case = Case(1, "", (), "sgd", "float32", {{}}, one, (Step(one, 0.1),))
targets.answers(targets.find({spec!r}), [case], limit=60)
"""
    parent = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT)
    processes = pids(tmp_path / "pids", 2)
    assert all(map(alive, processes))
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    assert gone(processes)


def test_the_child_of_a_good_target_is_gone(write: Callable[[str], str], tmp_path: Path) -> None:
    source = f"""
    import os
    def update(w, g, state, *, lr):
        open({str(tmp_path / "pids")!r}, "w").write(str(os.getpid()))
        return w - g, {{}}
    """
    [outcome] = targets.answers(targets.find(write(source)), [case("sgd")])
    assert isinstance(outcome, tuple)
    assert isinstance(outcome[0], Answer)
    assert not alive(pids(tmp_path / "pids", 1)[0])
