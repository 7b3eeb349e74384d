"""`npdrt audit`: its targets, options, exit codes and files. What it finds: tests/test_report.py,
tests/test_vectors.py and the tests of `npdrt.conform`."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as Xml

import numpy as np
import pytest
from click.testing import CliRunner, Result
from oracle import tables

from npdrt import errors
from npdrt.cli import audit as cli_audit
from npdrt.cli import cli
from npdrt.conform import targets
from npdrt.conform.audit import PASSES
from npdrt.conform.rules import KNOWN, RULES
from npdrt.optim import fromage, sgd

ROOT = Path(__file__).parents[1]
MINE = """
import numpy as np

def fromage(w, g, state, *, lr):
    nw, ng = (float(np.sqrt(np.sum(np.square(x, dtype="f8")))) for x in (w, g))
    s = lr * nw / ng if nw > 0 and ng > 0 else lr
    s = s if s <= np.finfo(w.dtype).max else lr
    return ((w - w.dtype.type(s) * g) / w.dtype.type(np.sqrt(1 + lr * lr))).astype(w.dtype), state

def floored(w, g, state, *, lr):
    nw, ng = (max(float(np.sqrt(np.sum(np.square(x, dtype="f8")))), 1e-6) for x in (w, g))
    return np.asarray((w - lr * nw / ng * g) / np.sqrt(1 + lr * lr), w.dtype), state

def lesion(w, g, state, *, lr, factor=1.0):
    nw, ng = (float(np.sqrt(np.sum(np.square(x, dtype="f8")))) for x in (w, g))
    s = lr * nw / ng if nw > 0 and ng > 0 else lr
    return np.asarray(w - factor * s * g, w.dtype), state

def raises(w, g, state, *, lr):
    raise TypeError("no \\x1b[31m luck")

def hangs(w, g, state, *, lr):
    while True:
        pass
"""


def call(*words: Any) -> Result:
    """`npdrt audit words`, in this process."""
    result = CliRunner().invoke(cli, ["audit", *map(str, words)], prog_name="npdrt")
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Targets in a file, and recordings of npdrt's own steps."""
    folder = tmp_path_factory.mktemp("audit")
    (folder / "mine.py").write_text(MINE)
    for name, rule in (("fromage", fromage(lr=0.1)), ("sgd", sgd(lr=0.1, momentum=0.9))):
        params = {"w": np.linspace(-1, 1, 6, dtype="f4").reshape(2, 3)}
        state, weights, gradients = rule.init(params), [params["w"]], []
        for k in range(4):
            gradients.append(np.cos(np.arange(6, dtype="f4") + k).reshape(2, 3))
            params, state = rule.update(params, {"w": gradients[-1]}, state)
            weights.append(params["w"])
        np.savez(folder / f"{name}.npz", weights=weights, gradients=gradients)
    return folder


@pytest.fixture
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """That folder as the current one."""
    monkeypatch.chdir(folder)
    return folder


# --- targets --------------------------------------------------------------------------------------


def test_a_file_that_agrees(here: Path) -> None:
    done = call("mine.py:fromage", "--rule", "fromage", "--format", "float32")
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("mine.py:fromage agrees with fromage to ")
    assert "float64" not in done.stdout.split("\n")[0]
    assert done.stderr == ""


def test_a_file_of_no_stated_rule(here: Path) -> None:
    done = call("mine.py:fromage", "--format", "float32")
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("mine.py:fromage agrees with fromage to ")


def test_a_dialect_and_that_it_is_accepted(here: Path, tmp_path: Path) -> None:
    words = ("mine.py:floored", "--rule", "fromage", "--format", "float32")
    done = call(*words)
    assert done.exit_code == 1
    assert (
        "is the optax dialect of fromage: it differs from the published rule in `zero norm`: "
        "norms are at least 1e-6 (published: lr * g where either norm is not > 0)" in done.stdout
    )
    files = (tmp_path / "r.html", tmp_path / "r.xml")
    done = call(*words, "--dialect", "optax", "--html", files[0], "--junit", files[1])
    assert done.exit_code == 0
    assert "Passes." in files[0].read_text()
    assert Xml.parse(files[1]).getroot().get("failures") == "0"
    assert call(*words, "--dialect", "nfnets").exit_code == 1


def test_overrides(here: Path) -> None:
    words = ("mine.py:lesion", "--rule", "lars_lesion", "--format", "float32")
    assert call(*words).exit_code == 0
    done = call(*words, "--set", "factor=-1")
    assert done.exit_code == 1
    assert "lesion(factor=-1) deviates from lars_lesion: it breaks `direction`" in done.stdout


def test_no_verdict(here: Path) -> None:
    done = call("mine.py:raises", "--rule", "fromage", "--format", "float32")
    assert done.exit_code == 1
    assert re.match(
        r"mine.py:raises: no verdict: it raises on (\d+) of \1 tests; first: test \d+ "
        r"\(one step\): TypeError: no \\x1b\[31m luck \(mine.py:\d+\)\.\n",
        done.stdout,
    )
    done = call("mine.py:hangs", "--rule", "lars_lesion", "--format", "float16", "--limit", "0.2")
    assert done.exit_code == 1
    assert "it gives no answer in time on " in done.stdout


@pytest.mark.parametrize(
    ("name", "expected", "code"),
    [
        ("torch.optim.SGD", "agrees with sgd to within ", 0),
        pytest.param("optax.fromage", "is the optax dialect of fromage: ", 1,
                     marks=pytest.mark.soak),
    ],
)  # fmt: skip
def test_libraries(name: str, expected: str, code: int) -> None:
    pytest.importorskip(name.partition(".")[0])
    done = call(name, "--format", "float32")
    assert (done.exit_code, expected in done.stdout) == (code, True), done.output
    assert f"\n{name.partition('.')[0]} " in done.stdout  # its version


@pytest.mark.soak
def test_amsgrad_is_out_of_scope() -> None:
    pytest.importorskip("torch")
    done = call("torch.optim.Adam", "--set", "amsgrad=True", "--format", "float64")
    assert done.exit_code == 1
    assert "torch.optim.Adam(amsgrad=True) is AMSGrad, another optimizer than adam" in done.stdout


# --- recordings -----------------------------------------------------------------------------------


def test_recordings(here: Path) -> None:
    done = call("fromage.npz", "--rule", "fromage", "--lr", "0.1")
    assert done.exit_code == 0, done.output
    assert "agrees with fromage" in done.stdout
    words = ("sgd.npz", "--rule", "sgd", "--lr", "0.1")
    assert call(*words, "--set", "momentum=0.9").exit_code == 0
    done = call(*words, "--set", "momentum=0.5")
    assert done.exit_code == 1
    assert call("fromage.npz", "--rule", "lars_lesion", "--lr", "0.1").exit_code == 1
    found = json.loads(call(*words, "--set", "momentum=0.9", "--json").stdout)
    assert (found["rule"], found["passes"]) == ("sgd", True)


def test_a_long_recording_is_held_to_every_step(tmp_path: Path) -> None:
    """What is accepted does not grow with the steps: 1 / sqrt(1 + lr^2) at lr 0.01 is seen."""
    rule, rng = fromage(lr=0.01), np.random.default_rng(5)
    params = {"w": rng.normal(size=300).astype("f4")}
    state, weights, gradients = rule.init(params), [params["w"]], []
    for _ in range(100):
        gradients.append(rng.normal(size=300).astype("f4"))
        params, state = rule.update(params, {"w": gradients[-1]}, state)
        weights.append(params["w"])
    np.savez(tmp_path / "long.npz", weights=weights, gradients=gradients, lr=0.01)
    assert call(tmp_path / "long.npz", "--rule", "fromage").exit_code == 0
    done = call(tmp_path / "long.npz", "--rule", "lars_lesion")
    assert done.exit_code == 1
    assert "deviates from lars_lesion: it breaks `prefactor`" in done.stdout


def test_a_recording_that_cannot_be_read(here: Path, tmp_path: Path) -> None:
    (tmp_path / "text.npz").write_text("no arrays")
    done = call(tmp_path / "text.npz", "--rule", "sgd", "--lr", "0.1")
    assert (done.exit_code, done.stdout) == (3, "")


# --- usage ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", "Missing argument 'TARGET'."),
        ("torch.optim.SDG", "did you mean torch.optim.SGD?"),
        ("mine.py", "name the callable in it too"),
        ("mine.py:nothing --rule sgd", "nothing"),
        ("nowhere.py:update", "nowhere.py does not exist"),
        ("nowhere.npz --rule sgd", "nowhere.npz does not exist"),
        ("fromage.npz", "A recording needs --rule."),
        ("fromage.npz --rule fromage", "has no lr"),
        ("fromage.npz --rule fromage --lr 0.1 --format float32", "--format is not for recordings"),
        ("fromage.npz --rule sgd --lr 0.1 --set momentun=1", "did you mean 'momentum'?"),
        ("fromage.npz --rule sgd --lr 0.1 --set momentum=fast", "momentum"),
        ("fromage.npz --rule sgd --lr 0.1 --set momentum", "'momentum' is not NAME=VALUE."),
        ("mine.py:fromage --lr 0.1", "--lr is for recordings"),
        ("mine.py:fromage --parameter w", "--parameter is for recordings"),
        ("mine.py:fromage --rule fromagr", "Did you mean 'fromage'?"),
        ("mine.py:fromage --format float8", "'float8' is unknown."),
        ("mine.py:fromage --dialect optaks", "unknown dialect 'optaks'; did you mean 'optax'?"),
        ("mine.py:fromage --rule sgd --dialect optax", "unknown dialect 'optax' of sgd"),
        ("mine.py:fromage --limit 0", "0.0 is not in the range x>0"),
        ("mine.py:fromage --html mine.py", "mine.py already exists; give --force to replace it"),
        ("mine.py:fromage --junit no/x.xml", "no does not exist"),
    ],
)
def test_usage_errors(words: str, expected: str, here: Path) -> None:
    """Exit code 2, the reason on stderr, nothing on stdout, nothing written."""
    before = sorted(here.rglob("*"))
    done = call(*words.split())
    assert (done.exit_code, done.stdout) == (2, ""), done.output
    assert expected in done.stderr
    assert sorted(here.rglob("*")) == before


def test_a_library_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets.importlib.util, "find_spec", lambda name: None)
    done = call("torch.optim.SGD")
    assert (done.exit_code, done.stdout) == (4, "")
    assert "torch is not installed" in done.stderr
    assert "not installed" in call("--list").stdout


def test_values_of_set() -> None:
    pairs = ("a=1", "b=1e-3", "c=true", "d=True", "e=None", "f=mean", "g=[0.9, 0.99]", "h=x=1")
    found = cli_audit.values((*pairs, "i=1\nj = 2"))
    assert found == {
        "a": 1, "b": 1e-3, "c": True, "d": True, "e": None, "f": "mean", "g": [0.9, 0.99],
        "h": "x=1", "i": "1\nj = 2",
    }  # fmt: skip
    deep = "[" * 10_000
    assert cli_audit.values([f"eps={deep}"]) == {"eps": deep}
    with pytest.raises(errors.Error, match="lars_lesion has no setting 'momentum'; it has none"):
        cli_audit.settings_of("lars_lesion", {"momentum": 1})


# --- files, JSON, the list ------------------------------------------------------------------------


def test_files_and_json(here: Path, tmp_path: Path) -> None:
    page, xml = tmp_path / "report.html", tmp_path / "report.xml"
    words = ("mine.py:fromage", "--rule", "fromage", "--format", "float16", "--json")
    done = call(*words, "--html", page, "--junit", xml)
    assert done.exit_code == 0
    found = json.loads(done.stdout, parse_constant=lambda c: pytest.fail(c))
    assert done.stdout.count("\n") == 1
    assert (found["name"], found["rule"], found["passes"]) == ("mine.py:fromage", "fromage", True)
    assert found["verdict"] in PASSES
    assert {row["format"] for row in found["levels"]} == {"float16"}
    assert page.read_text().startswith("<!DOCTYPE html>")
    assert Xml.parse(xml).getroot().tag == "testsuites"
    before = page.read_bytes()
    page.write_text("kept")
    assert call(*words, "--html", page).exit_code == 2
    assert page.read_text() == "kept"
    assert call(*words, "--html", page, "--force").exit_code == 0
    assert page.read_bytes() == before


def test_list() -> None:
    done = call("--list")
    assert done.exit_code == 0
    assert all(name in done.stdout for name in KNOWN)
    for rule in RULES.values():
        assert all(d.name in done.stdout and d.source in done.stdout for d in rule.dialects)
    found = json.loads(call("--list", "--json").stdout)
    assert [t["target"] for t in found["targets"]] == list(KNOWN)
    assert len(found["dialects"]) == sum(len(rule.dialects) for rule in RULES.values())


# --- the page docs/audit.md -----------------------------------------------------------------------


@pytest.mark.parametrize("name", tables.TABLES)
def test_tables_in_the_docs(name: str) -> None:
    """They are those of the code; `python -m tests.oracle.generate` brings them up to date."""
    assert (tables.DOCS / name).read_text(encoding="utf-8") == tables.page(name)


def test_verdicts_in_the_docs() -> None:
    text = (ROOT / "docs" / "audit.md").read_text()
    found = dict(re.findall(r"^\| ([a-z ]+) \| ([01]) \|", text, re.M))
    assert found == {verdict: str(int(not held)) for verdict, held in PASSES.items()}


# --- hints, and outputs that are refused ----------------------------------------------------------

OWN_NAMES = """
import numpy as np

def update(w, g, state, *, lr, momentum=0.0):
    v = g if "velocity" not in state else w.dtype.type(momentum) * state["velocity"] + g
    return w - w.dtype.type(lr) * v, {"velocity": v}
"""


def test_state_under_other_names_is_guessed(tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    file.write_text(OWN_NAMES)
    result = CliRunner().invoke(cli, ["audit", f"{file}:update", "--rule", "sgd"])
    assert result.exit_code == 1
    assert (
        "those from a given state do not: does it read the state under the names" in result.output
    )


def test_a_forgotten_setting_of_a_recording_is_guessed(tmp_path: Path) -> None:
    rng, w, v = np.random.default_rng(0), np.ones(3, np.float32), np.zeros(3, np.float32)
    weights, gradients = [w], []
    for _ in range(5):
        g = rng.standard_normal(3).astype(np.float32)
        v = np.float32(0.9) * v + g
        w = w - np.float32(0.1) * v
        weights, gradients = [*weights, w], [*gradients, g]
    np.savez(tmp_path / "run.npz", weights=weights, gradients=gradients)
    asked = ["audit", str(tmp_path / "run.npz"), "--rule", "sgd", "--lr", "0.1"]
    result = CliRunner().invoke(cli, asked)
    assert result.exit_code == 1
    assert "held to sgd with momentum = 0.0" in result.output
    assert CliRunner().invoke(cli, [*asked, "--set", "momentum=0.9"]).exit_code == 0
    result = CliRunner().invoke(cli, [*asked[:-1], "-0.1"])
    assert result.exit_code == 2
    assert "lr: expected a finite number >= 0" in result.output


def test_reports_go_into_files_of_their_own(tmp_path: Path) -> None:
    page = str(tmp_path / "r.html")
    result = CliRunner().invoke(cli, ["audit", "x.py:f", "--html", page, "--junit", page])
    assert result.exit_code == 2
    assert "two reports cannot go into one file" in result.output
    os.mkfifo(tmp_path / "pipe")
    asked = ["audit", "x.py:f", "--html", str(tmp_path / "pipe"), "--force"]
    result = CliRunner().invoke(cli, asked)
    assert result.exit_code == 2
    assert "is not a regular file" in result.output
