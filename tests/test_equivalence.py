"""`npdrt audit A --against B`: the report of equivalence."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from npdrt.cli import cli
from npdrt.conform import report, targets
from npdrt.conform.equivalence import Equivalence, compare
from npdrt.conform.rules import RULES
from npdrt.conform.vectors import FOLDER

RULES_FILE = """
import numpy as np
from npdrt.optim import norm


def fromage(w, g, state, *, lr=0.01):
    wn, gn = norm(w), norm(g)
    rate = lr * wn / gn if wn > 0 and gn > 0 else lr
    return (w - w.dtype.type(rate) * g) / w.dtype.type(np.sqrt(1 + lr * lr)), state


def other(w, g, state, *, lr=0.01):
    wn, gn = norm(w), norm(g)
    rate = lr * wn / gn if wn > 0 and gn > 0 else lr
    shrunk = w / w.dtype.type(np.sqrt(1 + lr * lr))
    return shrunk - w.dtype.type(rate / np.sqrt(1 + lr * lr)) * g, state


def slip(w, g, state, *, lr=0.01):
    wn, gn = norm(w), norm(g)
    rate = lr * wn / gn if wn > 0 and gn > 0 else lr
    return w - w.dtype.type(rate) * g, state


def nothing(w, g, state, *, lr=0.01):
    return w * 3, state


def raises(w, g, state, *, lr=0.01):
    raise ValueError("no")


def sgd(w, g, state, *, lr=0.01):
    return w - lr * g, state
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("targets") / "mine.py"
    path.write_text(RULES_FILE)
    return str(path)


def compared(file: str, a: str, b: str | None) -> Equivalence:
    mine, theirs = (n and targets.find(f"{file}:{n}", None, "fromage") for n in (a, b))
    assert mine
    return compare(mine, theirs or None, ["float64"])


@pytest.fixture(scope="module")
def found(file: str) -> Equivalence:
    return compared(file, "other", "fromage")


def npdrt_cli(*words: Any) -> Result:
    return CliRunner().invoke(cli, [str(word) for word in words], prog_name="npdrt")


def test_two_ways_to_write_a_rule_are_equivalent(found: Equivalence) -> None:
    """In exact arithmetic the same, in bits not."""
    assert (found.verdict, found.passes, found.different) == ("equivalent", True, [])
    (row,) = found.distances
    assert 0 < row.same < row.total == len(found.pairs)
    assert row.ulps >= 1
    (apart,) = [a for a, b in found.pairs if a.test.case.id == row.at]
    assert apart.gated


def test_every_clause_has_its_evidence(found: Equivalence) -> None:
    clauses = RULES["fromage"].clauses
    assert found.evidence.keys() == clauses.keys()
    for clause, sides in found.evidence.items():
        for side in sides:
            assert {side.found, *side.excluded, *side.open} == {*clauses[clause]}
            assert not side.excluded.keys() & {*side.open}
    a, _ = found.evidence["norm bound"]  # a setting that neither has
    assert (a.excluded, len(a.open)) == ({}, len(clauses["norm bound"]) - 1)
    a, b = found.evidence["prefactor"]
    assert a.found == b.found == "divided"
    assert a.excluded["absent"] in {j.test.case.id for j, _ in found.pairs}
    assert found.evidence["direction"][0].open == ()


def test_a_slip_is_not_equivalent(file: str) -> None:
    slip = compared(file, "slip", "fromage")
    assert (slip.verdict, slip.different, slip.passes) == ("not equivalent", ["prefactor"], False)
    text = report.text(slip)
    assert re.match(r"mine.py:slip is not equivalent to mine.py:fromage: .* `prefactor`", text)
    a, b = slip.evidence["prefactor"]
    assert (a.found, b.found, "absent" in b.excluded) == ("absent", "divided", True)


@pytest.mark.parametrize("name", ["nothing", "raises"])
def test_nothing_is_shown_by_answers_that_no_rule_explains(name: str, file: str) -> None:
    odd = compared(file, name, None)
    assert (odd.verdict, odd.passes, odd.evidence) == ("not shown", False, {})
    assert "is not shown: no rule explains the answers of both" in report.text(odd)


def test_against_the_published_rule(file: str) -> None:
    exact = compared(file, "fromage", None)
    assert exact.verdict == "equivalent to the bit"
    assert exact.b.verdict == "agrees to the bit"
    assert "with the published fromage is demonstrated, to the bit" in report.text(exact)


def test_the_reports(found: Equivalence) -> None:
    """Equation, clauses, versions and digests are in all of them."""
    made = json.loads(json.dumps(report.as_json(found)))
    digest = hashlib.sha256((FOLDER / "fromage_float64.json").read_bytes()).hexdigest()
    assert made["vectors"] == {"fromage_float64.json": digest}
    assert made["equation"] == ["w <- (w - lr * |w| / |g| * g) / sqrt(1 + lr**2)"]
    assert [side["verdict"] for side in made["implementations"]] == ["agrees", "agrees to the bit"]
    texts = [report.text(found), report.markdown(found).decode(), report.html(found).decode()]
    for text in texts:
        assert digest in text
        assert "numpy" in text
        assert all(clause in text for clause in RULES["fromage"].clauses)
        assert "Equivalence of mine.py:other" in text.replace("\\_", "_")
    assert "| clause | alternate | approved |" in texts[1]
    assert "`w <- (w - lr * \\|w\\| / \\|g\\| * g) / sqrt(1 + lr**2)`" in texts[1]
    columns = {line.replace("\\|", "").count("|") for line in texts[1].split("## Clauses")[1]
               .split("##")[0].splitlines() if line.startswith("|")}  # fmt: skip
    assert columns == {7}


def test_the_command(file: str, tmp_path: Path) -> None:
    common = ["--format", "float64", "--rule", "fromage", "--json"]
    against = [f"{file}:other", "--against", f"{file}:fromage"]
    done = npdrt_cli("audit", *against, *common, "--markdown", tmp_path / "e.md")
    assert (done.exit_code, json.loads(done.stdout)["verdict"]) == (0, "equivalent")
    assert (tmp_path / "e.md").read_text().startswith("# Equivalence of mine.py:other and mine.py:")
    done = npdrt_cli("audit", f"{file}:slip", "--report", "equivalence", *common)
    assert (done.exit_code, json.loads(done.stdout)["different"]) == (1, ["prefactor"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("x.py:f --against x.py:g --report audit", "leave out --report audit"),
        ("x.npz --against x.py:g --rule sgd", "a recording answers no tests"),
        ("x.py:f --against x.py:g --dialect AdamW", "--dialect is not for a report of equivalence"),
        ("x.py:f --report equivalence --junit a.xml", "--junit is not for a report of equivalence"),
        ("torch.optim.SGD --against torch.optim.Adam", "are of two rules: adam, sgd"),
    ],
)
def test_what_cannot_be_compared(words: str, message: str) -> None:
    if "torch" in words:
        pytest.importorskip("torch")
    done = npdrt_cli("audit", *words.split())
    assert (done.exit_code, message in " ".join(done.stderr.split())) == (2, True), done.stderr


def test_an_audit_in_markdown(file: str, tmp_path: Path) -> None:
    path = tmp_path / "a.md"
    words = ["--rule", "fromage", "--format", "float64", "--markdown", path]
    assert npdrt_cli("audit", f"{file}:slip", *words).exit_code == 1
    text = path.read_text()
    assert text.startswith("# mine.py:slip against fromage\n\nmine.py:slip deviates from fromage")
    assert "## Smallest disagreeing test" in text
    assert "| element | w | g |" in text
