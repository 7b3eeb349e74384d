"""Rules from the user's file: trained, audited, explained and resumed; groups; the page on them."""

from __future__ import annotations

import doctest
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

import npdrt
from npdrt import optim
from npdrt.cli import cli
from npdrt.errors import Error
from npdrt.optim import Groups, as_rule
from npdrt.train import Config, resume, train
from npdrt.train.step import State, Turn, make_step

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "docs/your-own-rule.md"]
RULES = """
import numpy as np

from npdrt.arrays import cast, namespace
from npdrt.optim import adam


def plain(w, g, state, *, lr=0.1):
    return w - lr * g, state


def heavy(w, g, state, *, lr=0.1, momentum=0.9):
    v = momentum * state.get("momentum", np.zeros_like(w)) + g
    return w - lr * v, {"momentum": v}


def slotted_adam(w, g, state, *, lr=0.001, betas=(0.9, 0.999), eps=1e-8):
    t, zeros = state.get("t", 0) + 1, np.zeros_like(w)
    m = betas[0] * state.get("exp_avg", zeros) + (1 - betas[0]) * g
    v = betas[1] * state.get("exp_avg_sq", zeros) + (1 - betas[1]) * (g * g)
    step = lr / (1 - betas[0] ** t) * m / (np.sqrt(v / (1 - betas[1] ** t)) + eps)
    return w - step, {"t": t, "exp_avg": m, "exp_avg_sq": v}


def by_name(w, g, state, *, lr=0.1, name, step):
    assert state or step == 0 or name.endswith("00/weight")
    v = 0.9 * state.get(name.replace("/", "."), np.zeros_like(w)) + g
    return w - lr * v, {**state, name.replace("/", "."): v}


def factory(lr=0.001, eps=1e-8):
    return adam(lr=lr, eps=eps)


def narrow(w, g, state, *, lr=0.1):
    return (w - lr * g).astype("float16"), state


def in_place(w, g, state, *, lr=0.1):
    w -= lr * g
    return w, state


def alone(w, g, state, *, lr=0.1):
    return w - lr * g


def late(w, g, state, *, lr=0.1):
    return w - lr * g, {"a": 1, **({"b": 1} if state else {})}


def broken(w, g, state, *, lr=0.1):
    return w / nothing, state


def no_rate(w, g, state, *, lr):
    return w - lr * g, state


def three(lr=0.1):
    return 3


number = 3
"""


def npdrt_cli(*words: Any) -> Result:
    return CliRunner().invoke(cli, [str(word) for word in words], prog_name="npdrt")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, with rules.py, in which commands run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rules.py").write_text(RULES)
    x = np.random.default_rng(5).normal(size=(40, 6))
    np.savez(tmp_path / "points.npz", x=x, y=(x[:, 0] > 0).astype(int))
    return tmp_path


def settings(**changes: Any) -> Config:
    model = {"depth": 2, "width": 5, "bias": True}
    base = {
        "data": "points.npz",
        "model_options": model,
        "epochs": 2,
        "batch_size": 8,
        "trace_every": 0,
    }
    return Config(**{**base, **changes})


def params_of(config: Config, out: str, **more: Any) -> dict[str, Any]:
    train(config, Path(out), **more)
    return dict(npdrt.load(Path(out) / "checkpoint.h5").params)


def assert_same(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert list(a) == list(b)
    assert all(np.array_equal(a[name], b[name]) for name in a)


# --- training -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "rule", "options"),
    [
        ("plain", "sgd", {}),
        ("heavy", "sgd", {"momentum": 0.9}),
        ("by_name", "sgd", {"momentum": 0.9}),
        ("factory", "adam", {}),
    ],
)
def test_an_own_rule_trains_as_npdrts(
    name: str, rule: str, options: dict[str, Any], here: Path
) -> None:
    """To the bit, recorded and call by call."""
    lr = 0.1 if rule == "sgd" else 0.001
    expected = params_of(settings(optimizer=rule, optimizer_options=options, lr=lr), "a")
    for k, eager in enumerate((False, True)):
        config = settings(optimizer=f"rules.py:{name}", eager=eager)
        assert_same(params_of(config, f"b{k}"), expected)


def test_numbers_in_the_state(here: Path) -> None:
    """A counter in the state counts: Adam's correction, which a frozen 1 would break."""
    expected = params_of(settings(optimizer="adam", dtype="float64"), "a")
    found = params_of(settings(optimizer="rules.py:slotted_adam", dtype="float64"), "b")
    assert all(np.allclose(found[name], w, rtol=1e-9, atol=1e-12) for name, w in expected.items())
    assert npdrt.load("b/checkpoint.h5").state["layers/00/bias/t"] == 10


@pytest.mark.parametrize("name", ["heavy", "by_name", "slotted_adam", "factory"])
def test_an_own_rule_resumes_to_the_same_bits(name: str, here: Path) -> None:
    """A rule with a state, which an optimizer that starts again would lose."""
    config = settings(optimizer=f"rules.py:{name}", groups=("*/00/*:rule=adam,lr=0.01",))
    expected = params_of(config, "whole")
    left = iter(range(4))
    train(config, Path("run"), stop=lambda: 2 if next(left) == 3 else 0)
    with pytest.raises(Error, match=r"the rule is Python code, rules.py:\w+, .*--code rules.py"):
        resume(Path("run"))
    resume(Path("run"), code=[here / "rules.py"])
    assert_same(dict(npdrt.load("run/checkpoint.h5").params), expected)


def test_a_changed_file_is_refused(here: Path) -> None:
    for k, own in enumerate(
        ({"optimizer": "rules.py:heavy"}, {"groups": ("*/bias:rule=rules.py:heavy",)})
    ):
        (here / "rules.py").write_text(RULES)
        train(settings(**own), Path(f"run{k}"), stop=lambda: 2)
        (here / "rules.py").write_text(RULES.replace("0.9", "0.8"))
        with pytest.raises(Error, match=r"rules.py:heavy has changed since the run was started"):
            resume(Path(f"run{k}"), code=[here / "rules.py"])


def test_a_run_of_npdrts_rules_keeps_its_metadata(here: Path) -> None:
    train(settings(epochs=0), Path("run"))
    assert "rule_files" not in npdrt.load("run/checkpoint.h5").meta


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (
            "rules.py:narrow",
            r"narrow, layers/00/weight: expected a w of float32\[5, 6\]; .*float16",
        ),
        ("rules.py:in_place", "read-only|changed in place|writes into an argument"),
        ("rules.py:alone", r"alone, layers/00/weight: expected \(w, state\); got ndarray"),
        ("rules.py:late", r"late: \S+/b, .* only after some steps"),
        ("rules.py:broken", r"rule rules.py:broken failed: NameError: .*rules.py, line \d+\)"),
        ("rules.py:no_rate", "no_rate has no default rate; give --lr"),
        ("rules.py:three", "three: expected it to return an npdrt.optim.Optimizer; .* int"),
        ("rules.py:number", "rules.py has no rule 'number'"),
        ("rules.py:nothing", "rules.py has no rule 'nothing'"),
        ("missing.py:rule", "missing.py does not exist"),
    ],
)
def test_rules_that_are_none(optimizer: str, message: str, here: Path) -> None:
    with pytest.raises(Error, match=message):
        train(settings(optimizer=optimizer), Path("run"))


def test_the_settings_of_an_own_rule(here: Path) -> None:
    short = ["--data", "points.npz", "--epochs", 1, "-q", "--optimizer", "rules.py:heavy"]
    done = npdrt_cli("train", *short, "--rule-set", "momentun=0.5")
    assert (done.exit_code, "'momentun'; did you mean 'momentum'?" in done.stderr) == (2, True)
    done = npdrt_cli("train", *short, "--momentum", 0.5, "--rule-set", "momentum=0.6")
    assert "--rule-set momentum and --momentum name the same field" in done.stderr
    assert npdrt_cli("train", *short, "--rule-set", "momentum=0.5", "--out", "a").exit_code == 0
    options = npdrt.load("a/checkpoint.h5").meta["config"]["optimizer_options"]
    assert options == {"momentum": 0.5}


# --- groups -------------------------------------------------------------------------------------


def random_params(seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    shapes = {"0/weight": (3, 2), "0/bias": (3,), "1/weight": (2, 3), "1/bias": (2,)}
    return {name: rng.normal(size=shape) for name, shape in shapes.items()}


def test_groups_are_their_optimizers_side_by_side() -> None:
    """Each group moves as its optimizer alone would, with a rate that follows the schedule."""
    parts = {"0/*": optim.adam(lr=0.01), "*/bias": optim.sgd(lr=0.2, momentum=0.9)}
    rest = optim.adam(lr=0.1, betas=(0.5, 0.9))
    both, own = Groups(rest, parts), {"0/*": ["0/weight", "0/bias"], "*/bias": ["1/bias"]}
    params, expected = random_params(0), random_params(0)
    state = both.init(params)
    alone: dict[str, Any] = {"": (rest, ["1/weight"])}
    alone |= {pattern: (part, own[pattern]) for pattern, part in parts.items()}
    states = {p: o.init({n: params[n] for n in names}) for p, (o, names) in alone.items()}
    for step, lr in enumerate((0.1, 0.05, 0.025)):
        grads = random_params(step + 1)
        params, state = both.update(params, grads, state, lr=lr)
        for pattern, (optimizer, names) in alone.items():
            given, g = {n: expected[n] for n in names}, {n: grads[n] for n in names}
            rate = optimizer.settings["lr"] * (lr / 0.1)
            made, states[pattern] = optimizer.update(given, g, states[pattern], lr=rate)
            expected |= made
        assert_same(params, expected)
    assert state["beta1_power"] != state["groups/1/beta1_power"]
    assert state.keys() == both.init(params).keys() == both.started(params).keys()


def test_groups_of_a_run(here: Path) -> None:
    """A rate of 0 leaves parameters alone; what a group does not say it has from the run."""
    config = settings(optimizer="sgd", lr=0.1, optimizer_options={"momentum": 0.9})
    start = params_of(settings(epochs=0), "start")
    whole = params_of(config, "whole")
    same = params_of(Config(**{**config.as_dict(), "groups": ["*/bias:lr=0.1"]}), "same")
    assert_same(same, whole)
    left = params_of(Config(**{**config.as_dict(), "groups": ["*/bias:lr=0"]}), "left")
    for name, w in left.items():
        assert np.array_equal(w, start[name]) == name.endswith("bias"), name


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ("*/bias", "expected PATTERN:NAME=VALUE"),
        ("*/bias:lr", "expected PATTERN:NAME=VALUE"),
        (":lr=1", "expected PATTERN:NAME=VALUE"),
        ("*/bias:lr=fast", "lr must be a number; got 'fast'"),
        ("*/gain:lr=1", r"the group '\*/gain' has no parameter.*layers/00/weight"),
        ("*/bias:rule=sdg", "unknown optimizer 'sdg'; did you mean 'sgd'"),
        ("*/bias:rule=sgd,betas=[0.9,0.99]", "unknown setting of sgd: 'betas'"),
        ("*/bias:lr=-1", "lr must be a finite number >= 0"),
        ("*/bias:norm_bound=0", "norm_bound must be above 0 in a run"),
    ],
)
def test_groups_that_are_none(group: str, message: str, here: Path) -> None:
    with pytest.raises(Error, match=message):
        train(settings(groups=(group,)), Path("run"))


def test_a_group_needs_a_rate_to_scale() -> None:
    with pytest.raises(Error, match="lr must be above 0"):
        Groups(optim.sgd(lr=0.0), {"*": optim.sgd(lr=0.1)})


# --- in Python ----------------------------------------------------------------------------------


def own(function: Callable[..., Any], **given: Any) -> Any:
    return as_rule(function, "own")(**{"lr": 0.1, **given})


def test_a_function_is_not_given_arrays_to_write_to() -> None:
    def update(w: Any, g: Any, state: Any, *, lr: float) -> Any:
        g *= 2
        return w - lr * g, state

    params = {"w": np.ones(2)}
    with pytest.raises(ValueError, match="read-only"):
        own(update).update(params, params, own(update).init(params))


def test_a_function_gets_numbers_of_python() -> None:
    """A NumPy number would decide the dtype of the arrays that it meets."""
    seen = []

    def update(w: Any, g: Any, state: Any, *, lr: float, step: int) -> Any:
        seen.append((type(lr), step, {k: type(v) for k, v in state.items()}))
        return w - lr * g, {"x": 0.5, "n": step, "b": True}

    params, opt = {"w": np.ones(2, "float32")}, own(update)
    state = opt.init(params)
    for lr in (None, np.float64(0.1)):
        params, state = opt.update(params, params, state, lr=lr)
    assert seen == [(float, 0, {}), (float, 1, {"x": float, "n": int, "b": bool})]
    assert params["w"].dtype == "float32"


def test_a_parameter_below_another() -> None:
    """The state of "a/b" is not that of "a"."""
    opt = own(lambda w, g, state, *, lr: (w - lr * g, {"m": state.get("m", 0 * w) + g}))
    params = {"a": np.ones(2), "a/b": np.ones(3)}
    state = opt.init(params)
    for _ in range(3):
        params, state = opt.update(params, {n: np.ones_like(w) for n, w in params.items()}, state)
    assert [state[k].tolist() for k in ("a/m", "a/b/m")] == [[3.0] * 2, [3.0] * 3]


@pytest.mark.parametrize("kind", ["heavy", "by_name", "groups"])
def test_networks_that_take_turns(kind: str) -> None:
    """A step that updates one network after the other, with the state of both."""
    scope: dict[str, Any] = {}
    exec(RULES, scope)
    momentum = optim.sgd(lr=0.1, momentum=0.9)
    by_group = Groups(momentum, {"a/*": own(scope["by_name"]), "b/*": own(scope["heavy"])})
    rule = by_group if kind == "groups" else own(scope[kind])

    def loss(params: Any, buffers: Any, x: Any, *_: Any) -> Any:
        total = npdrt.ops.sum(params["a/00/weight"] * params["b/v"] * params["b/v"])
        return total, (x, buffers)

    task: Any = SimpleNamespace(
        turns=[Turn("a", loss), Turn("b", loss)], clipped=dict, correct=lambda *_: np.zeros(())
    )
    ends = []
    for optimizer in (momentum, rule):
        params = {"a/00/weight": np.ones(2), "b/v": np.full(2, 2.0)}
        state, step = State(params, {}, optimizer.init(params)), make_step(task, optimizer)
        for _ in range(3):
            state = step(state, np.ones(1), None, 0.1, None).state
        assert state.optimizer.keys() == optimizer.started(params).keys()
        ends.append(state.params)
    assert_same(*ends)


# --- what pages say -----------------------------------------------------------------------------


def blocks(page: Path) -> list[tuple[str, str]]:
    """(language, content) of every block of a page, in order."""
    return re.findall(r"```(\w+)\n(.*?)```", page.read_text(), re.S)


def own_part(page: Path) -> list[tuple[str, str]]:
    """The blocks about own rules: all of the page on them, a section of the README."""
    if page.name != "README.md":
        return blocks(page)
    section = re.search(r"## Your own rule\n(.*?)\n## ", page.read_text(), re.S)
    assert section is not None
    return re.findall(r"```(\w+)\n(.*?)```", section[1], re.S)


def test_every_example_runs_in_an_empty_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The README's, then those of the page; a command that both have runs once."""
    monkeypatch.chdir(tmp_path)
    ran: dict[tuple[str, ...], str] = {}
    for language, content in (block for page in PAGES for block in own_part(page)):
        if file := re.match(r"# (\w+\.py)\n", content):
            (tmp_path / file[1]).write_text(content)
        lines = content.splitlines() if language == "sh" else ()
        for words in (tuple(shlex.split(line, comments=True)) for line in lines):
            if words not in ran:
                done = npdrt_cli(*words[1:])
                assert done.exit_code == 0, f"{words}: {done.output}"
                assert "Warning" not in done.stderr, done.stderr
                ran[words] = done.stdout
    assert len(ran) >= 10
    audit = ran["npdrt", "audit", "mine.py:fromage", "--rule", "fromage"]
    assert audit.startswith("mine.py:fromage agrees with fromage to the bit")


def test_python_of_the_page() -> None:
    results = doctest.testfile(str(PAGES[1]), module_relative=False)
    assert (results.failed, results.attempted > 20) == (0, True)


def test_a_slip_in_the_example_is_named() -> None:
    """The line that the page changes, and others that a hand may slip on."""
    source, same = (
        next(text for _, text in own_part(page) if text.startswith("# mine.py")) for page in PAGES
    )
    assert source == same
    told = next(text for _, text in blocks(PAGES[1]) if text.startswith("mine.py:fromage deviates"))
    slips = {
        source.splitlines()[-1]: ("    return w - cast(rate, w) * g, state", "`prefactor`"),
        "lr * lr": ("lr", "`prefactor`"),
        "lr * w_norm /": ("lr /", "`ratio`"),
    }
    for line, (slip, clause) in slips.items():
        assert line in source
        scope: dict[str, Any] = {}
        exec(source.replace(line, slip), scope)
        with pytest.raises(npdrt.conform.Disagrees) as caught:
            npdrt.conform.check(scope["fromage"], rule="fromage", formats=["float64"])
        assert clause in str(caught.value).splitlines()[0], str(caught.value)
        if "absent" in clause:
            assert told.strip().removeprefix("mine.py:") in str(caught.value).replace("\n", " ")
