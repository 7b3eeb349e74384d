"""A rule is described once, in its file: everything that lists rules or settings reads it there."""

from __future__ import annotations

import ast
import copy
import dataclasses
import functools
import inspect
import itertools
import math
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import click
import numpy as np
import pytest

import npdrt
from npdrt import optim
from npdrt.cli import options, train
from npdrt.errors import Error
from npdrt.optim import Rule, Setting
from npdrt.optim.setting import below_one
from npdrt.train import Config

DOCS = Path(__file__).parents[1] / "docs" / "updates.md"
every_rule = pytest.mark.parametrize("rule", optim.RULES.values(), ids=list(optim.RULES))
VALUES: dict[Any, list[Any]] = {  # of every type of a setting, values that all rules accept
    float: [0.0, 0.25, 0.5],
    bool: [False, True],
    tuple[float, float]: [(0.5, 0.75), (0.0, 0.25)],
    float | None: [None, 0.5],
}


def choices(rule: Rule[...]) -> list[dict[str, Any]]:
    """Settings of a rule, all combinations of VALUES that it accepts."""
    values = [VALUES[setting.type] for setting in rule.settings.values()]
    drawn = (dict(zip(rule.settings, row, strict=True)) for row in itertools.product(*values))
    return [given for given in drawn if accepted(rule, given)]


def accepted(rule: Rule[...], given: dict[str, Any]) -> bool:
    try:
        rule(lr=0.1, **given)
    except Error:
        return False
    return True


# --- the description ------------------------------------------------------------------------------


def test_the_rules_of_the_papers_come_first_and_are_all_there() -> None:
    sources = {path.stem: path.read_text("utf-8") for path in Path(optim.__path__[0]).glob("*.py")}
    assert set(optim.RULES) == {name for name, text in sources.items() if "\n@rule(" in text}
    assert list(optim.RULES)[:5] == ["sgd", "adam", "lars", "lars_lesion", "fromage"]
    for name, rule in optim.RULES.items():
        assert (rule.name, getattr(npdrt.optim, name)) == (name, rule)


@every_rule
def test_a_description_is_whole(rule: Rule[...]) -> None:
    assert 0 < rule.default_rate < math.inf
    assert rule.layerwise or not rule.relative
    assert len(str(rule.__doc__)) > 100
    for name, setting in rule.settings.items():
        assert setting.help.strip(" .") == setting.help != "", name
        assert setting.needs is None or setting.needs in rule.settings, name
        assert setting.checked(name, setting.default) == setting.default, name
        assert setting.type in VALUES, name


@every_rule
def test_a_rule_looks_like_a_function(rule: Rule[...]) -> None:
    signature = inspect.signature(rule)
    assert list(signature.parameters) == ["lr", *rule.settings]
    for name, setting in rule.settings.items():
        parameter = signature.parameters[name]
        assert (parameter.default, parameter.annotation) == (setting.default, setting.type)
        assert parameter.kind is inspect.Parameter.KEYWORD_ONLY
    assert signature.return_annotation is optim.Optimizer
    assert repr(rule).startswith(f"{rule.name}(*, lr: float")
    assert pickle.loads(pickle.dumps(rule)) is rule
    assert copy.deepcopy(rule) is rule
    with pytest.raises(TypeError, match=rf"{rule.name}\(\) got an unexpected keyword argument 'x'"):
        rule(lr=0.1, x=1)
    with pytest.raises(TypeError, match="positional"):
        rule(0.1)


def test_a_rule_without_a_rate_asks_for_it() -> None:
    with pytest.raises(TypeError, match="missing 1 required keyword-only argument: 'lr'"):
        optim.sgd()  # type: ignore[call-arg]
    assert optim.adam().settings["lr"] == optim.adam.default_rate == 1e-3


@every_rule
def test_optimizers_have_every_setting_in_order(rule: Rule[...]) -> None:
    made = rule(lr=0.5)
    assert dict(made.settings) == {"lr": 0.5, **rule.defaults}
    assert list(made.settings) == ["lr", *rule.settings]
    assert made.name == rule.name


@every_rule
def test_slots_are_those_that_some_settings_need(rule: Rule[...]) -> None:
    found = {slot for given in choices(rule) for slot in rule(lr=0.1, **given).slot_shapes}
    assert found == set(rule.slots)


@every_rule
def test_a_setting_does_nothing_without_the_one_it_needs(rule: Rule[...]) -> None:
    """And something with it, or with every other setting if it needs none."""
    w = {"w": np.array([[1.0, -2.0], [0.5, 3.0]]), "v": np.array([0.25, -1.0])}
    grads = [{name: np.cos(value + k) for name, value in w.items()} for k in range(3)]

    @functools.cache
    def after(*values: Any) -> list[bytes]:
        optimizer = rule(lr=0.125, **dict(zip(rule.settings, values, strict=True)))
        params, state = w, optimizer.init(w)
        for g in grads:
            params, state = optimizer.update(params, g, state)
        return [value.tobytes() for value in params.values()]

    for name, setting in rule.settings.items():
        changed = {True: 0, False: 0}  # whether it can act -> pairs that differ
        for given in choices(rule):
            acts = setting.needs is None or bool(given[setting.needs])
            for value in VALUES[setting.type]:
                if accepted(rule, other := {**given, name: value}) and other != given:
                    changed[acts] += after(*other.values()) != after(*given.values())
        assert changed[False] == 0, name
        assert changed[True] > 0, name


def test_layerwise_rules_are_those_that_read_the_norm() -> None:
    """Scaling one element's gradient changes the step of another only where a norm is taken."""
    w, g = {"w": np.array([1.0, 2.0])}, np.array([0.5, 0.25])
    for rule in optim.RULES.values():
        optimizer = rule(lr=0.125)
        steps = [
            optimizer.update(w, {"w": g * scale}, optimizer.init(w))[0]["w"][0]
            for scale in (np.array([1.0, 1.0]), np.array([1.0, 8.0]))
        ]
        assert (steps[0] != steps[1]) == rule.layerwise, rule.name


def test_the_docs_have_the_settings_and_slots() -> None:
    """The table of docs/updates.md has every rule, its settings with defaults, its slots."""
    words = {"none": None, "true": True, "false": False}
    lines = [
        line.split("|")[1:4] for line in DOCS.read_text("utf-8").splitlines() if "`lr`" in line
    ]
    table = {row[0].strip(): row[1:] for row in lines if len(row) == 3}
    assert set(table) == set(optim.RULES)
    for name, (settings, slots) in table.items():
        found = dict(re.findall(r"`(\w+)` = (\([^)]*\)|[^ ,]+)", settings))
        defaults = {k: words[v] if v in words else ast.literal_eval(v) for k, v in found.items()}
        defaults.pop("lr", None)
        assert defaults == optim.RULES[name].defaults, name
        assert set(re.findall(r"`(\w+)`: ", slots)) == set(optim.RULES[name].slots), name


@pytest.mark.parametrize(
    ("kind", "default", "message"),
    [
        (float, 0.5, "rule toy: expected `beta: Annotated"),
        (Annotated[float, "kept"], 0.5, "rule toy: expected `beta: Annotated"),
        (Annotated[float, Setting("kept", below_one)], inspect.Parameter.empty, "= default`"),
        (Annotated[float, Setting("kept", below_one)], 0.5, "lr has no default; give @rule a"),
    ],
)
def test_a_rule_that_is_not_described(kind: Any, default: Any, message: str) -> None:
    def toy(*, lr: float, beta: Any = None) -> optim.Formula:
        raise AssertionError(lr, beta)

    beta = inspect.Parameter("beta", inspect.Parameter.KEYWORD_ONLY, default=default)
    lr = inspect.Parameter("lr", inspect.Parameter.KEYWORD_ONLY)
    toy.__signature__ = inspect.Signature([lr, beta])  # type: ignore[attr-defined]
    toy.__annotations__["beta"] = kind
    with pytest.raises(Error, match=re.escape(message)):
        optim.rule()(toy)


# --- what settings are refused --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "given", "message"),
    [
        (optim.adam, {"betas": 0.9}, r"betas must be two numbers in \[0, 1\); got 0.9"),
        (optim.adam, {"betas": [0.9]}, r"betas must be two numbers in \[0, 1\); got \[0.9\]"),
        (optim.adam, {"betas": "ab"}, "betas must be two numbers"),
        (optim.adam, {"decoupled": "no"}, "decoupled must be true or false; got 'no'"),
        (optim.sgd, {"nesterov": 1, "momentum": 0.9}, "nesterov must be true or false; got 1"),
        (optim.sgd, {"momentum": None}, "momentum must be a finite number >= 0; got None"),
        (optim.fromage, {"lr": None}, "lr must be a finite number >= 0; got None"),
    ],
)
def test_settings_of_another_kind(rule: Any, given: dict[str, Any], message: str) -> None:
    with pytest.raises(Error, match=message):
        rule(**{"lr": 0.1, **given})


def test_flags_of_numpy_and_lists_are_taken() -> None:
    assert optim.adam(decoupled=np.bool_(True)).settings["decoupled"] is True  # type: ignore[arg-type]
    assert optim.adam(betas=[0.5, np.float32(0.75)]).settings["betas"] == (0.5, 0.75)  # type: ignore[arg-type]


# --- the command line -----------------------------------------------------------------------------


def test_one_option_serves_every_rule_that_has_the_setting() -> None:
    """So the type is the same, and no field of `Config` or of a model has the name."""
    fields = {f.name for f in dataclasses.fields(Config)} | set(options.MODEL)
    for name in options.SETTINGS:
        kinds = {str(r.settings[name].type) for r in optim.RULES.values() if name in r.settings}
        assert len(kinds) == 1, name
        assert name not in fields


def test_every_field_and_setting_has_an_option_of_its_type() -> None:
    """With None for "not given", and with the default of `Config` in the help."""
    made = {str(option.name): option for option in train.command.params}
    settings = {s: r.defaults[s] for r in optim.RULES.values() for s in r.settings}
    fields = {f.name: f.default for f in dataclasses.fields(Config) if f.metadata}
    assert {*settings, *fields, *options.MODEL} <= set(made)
    nothing = train.command.make_context("train", [])
    for name, default in {**settings, **fields}.items():
        option = made[name]
        assert isinstance(option, click.Option)
        assert nothing.params[name] in (None, ()), name
        assert bool(option.secondary_opts) == isinstance(default, bool), name
        if isinstance(default, int | str) and not isinstance(default, bool):
            shown = {"device": "auto", "log_every": "0, never"}.get(name, default)
            assert str(option.help).endswith(f"[default: {shown}]"), name


TOY = '''
"""Signs of the gradient, as in Bernstein et al. 2018; a toy."""

from functools import partial
from typing import Annotated

from npdrt.arrays import cast, namespace
from npdrt.optim.rule import Formula, rule
from npdrt.optim.setting import Setting, below_one, flag


@rule(default_rate=0.002, slots={"average": "the mean gradient"})
def toy(
    *,
    lr: float,
    kept: Annotated[float, Setting("share of the mean that is kept", below_one)] = 0.5,
    ahead: Annotated[bool, Setting("look ahead", flag, needs="kept")] = False,
) -> Formula:
    """w <- w - lr * sign(m) with m <- kept * m + (1 - kept) * g."""
    return Formula(partial(update, kept=kept, ahead=ahead), slots)


def slots(w):
    return {"average": namespace(w).zeros_like(w)}


def update(w, g, slots, shared, lr, *, kept, ahead):
    m = kept * slots["average"] + (1.0 - kept) * g
    seen = kept * m + (1.0 - kept) * g if ahead else m
    return w - cast(lr, w) * namespace(w).sign(seen), {"average": m}
'''
WITH_TOY = """
import sys
from pathlib import Path
from click.testing import CliRunner
from npdrt import optim
optim.__path__.append(sys.argv[1])
optim.RULES.update(optim._rules())
from npdrt.cli import cli
for number, words in enumerate(sys.stdin.read().splitlines()):
    done = CliRunner().invoke(cli, words.split(), prog_name="npdrt")
    assert done.exit_code == 0, (words, done.output)
    Path(f"{number}.txt").write_text(" ".join(done.stdout.split()), encoding="utf-8")
"""
COMMANDS = """\
train --help
train --optimizer toy --kept 0.75 --ahead --width 8 --schedule constant --epochs 2 --out whole
train --optimizer toy --kept 0.75 --ahead --width 8 --schedule constant --epochs 1 --out parts
train --optimizer toy --kept 0.75 --ahead --epochs 2 --out parts --resume
explain --model mlp --optimizer toy --ahead
explain whole parts
bench --help
"""


def test_a_rule_is_one_file(tmp_path: Path) -> None:
    """It gives --optimizer, the options and their help, training, resuming, explain."""
    (tmp_path / "toys").mkdir()
    (tmp_path / "toys" / "toy.py").write_text(TOY)
    command = [sys.executable, "-c", WITH_TOY, str(tmp_path / "toys")]
    given = {"cwd": tmp_path, "input": COMMANDS, "text": True, "timeout": 300}
    done = subprocess.run(command, capture_output=True, **given)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stderr
    answers = [(tmp_path / f"{k}.txt").read_text("utf-8") for k in range(7)]
    assert f"One of {', '.join([*optim.RULES, 'toy'])}." in answers[0]
    assert "--kept FLOAT toy: share of the mean that is kept. [default: 0.5]" in answers[0]
    assert "--ahead / --no-ahead toy: look ahead, with --kept." in answers[0]
    whole, parts = (npdrt.load(tmp_path / run / "checkpoint.h5") for run in ("whole", "parts"))
    assert {n: v.tobytes() for n, v in whole.state.items()} == {
        n: v.tobytes() for n, v in parts.state.items()
    }
    assert "layers/00/weight/average" in whole.state
    assert whole.meta["config"]["lr"] == 0.002
    assert " sign" in answers[4]
    assert answers[5].startswith("the same")
    assert ", toy." in answers[6]


# --- a rule that the referee does not know --------------------------------------------------------

UNJUDGED = """
import sys
from click.testing import CliRunner
from npdrt import optim
optim.__path__.append(sys.argv[1])
optim.RULES.update(optim._rules())
from npdrt.cli import cli
for words in sys.stdin.read().splitlines():
    done = CliRunner().invoke(cli, words.split(), prog_name="npdrt")
    print(done.exit_code, " ".join(done.output.split()))
"""
ASKED = """\
audit --list
vectors list
audit {file} --rule sgd --format float32
audit {file} --rule toy
audit steps.npz --rule toy
vectors export prompts.json --rule toy
"""
SGD = "def update(w, g, state, *, lr):\n    return w - w.dtype.type(lr) * g, {}\n"


def test_a_rule_may_be_unknown_to_the_referee(tmp_path: Path) -> None:
    """It is left out, with the reason; the audits of other rules do not need its file."""
    (tmp_path / "toys").mkdir()
    (tmp_path / "toys" / "toy.py").write_text(TOY)
    (tmp_path / "own.py").write_text(SGD)
    asked = ASKED.format(file=f"{tmp_path / 'own.py'}:update")
    done = subprocess.run(
        [sys.executable, "-c", UNJUDGED, str(tmp_path / "toys")],
        cwd=tmp_path, input=asked, text=True, capture_output=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    listed, vectors, other, *refused = done.stdout.splitlines()
    assert listed.startswith("0 target")
    assert "toy: not audited, npdrt/conform/rules/toy.py is missing" in listed
    assert vectors.startswith("0 file")
    assert other.startswith("0 ")
    missing = "2 Error: the referee does not know the rule toy: npdrt/conform/rules/toy.py is"
    assert [line.startswith(missing) for line in refused] == [True] * 3, refused
