"""`npdrt audit A --against B`: the report of equivalence."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from npdrt.cli import cli
from npdrt.conform import Disagrees, check, report
from npdrt.conform.audit import Audit
from npdrt.conform.equivalence import Equivalence, published
from npdrt.conform.rules import RULES
from npdrt.conform.vectors import FOLDER, sums

FILE = "fromage_float64.json"

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


def raises(w, g, state, *, lr=0.01):
    raise ValueError("no")
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("targets") / "mine.py"
    path.write_text(RULES_FILE)
    return str(path)


@pytest.fixture(scope="module")
def audits() -> dict[str, Audit]:
    """One audit of each function, without the large and long tests."""
    scope: dict[str, Any] = {}
    exec(RULES_FILE, scope)
    return {name: audited(scope[name]) for name in ("fromage", "other", "slip", "raises")}


def audited(function: Any) -> Audit:
    try:
        return check(function, rule="fromage", formats=["float64"])
    except Disagrees as disagrees:
        return disagrees.audit


@pytest.fixture(scope="module")
def found(audits: dict[str, Audit]) -> Equivalence:
    return compared(audits, "other", "fromage")


def compared(audits: dict[str, Audit], a: str, b: str) -> Equivalence:
    return Equivalence(audits[a], audits[b], {FILE: sums()[FILE]})


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


def test_a_slip_is_not_equivalent(audits: dict[str, Audit]) -> None:
    slip = compared(audits, "slip", "fromage")
    assert (slip.verdict, slip.different, slip.passes) == ("not equivalent", ["prefactor"], False)
    text = report.text(slip)
    assert re.match(r"slip is not equivalent to fromage: .* `prefactor`", text)
    a, b = slip.evidence["prefactor"]
    assert (a.found, b.found, "absent" in b.excluded) == ("absent", "divided", True)


def test_nothing_is_shown_by_answers_that_no_rule_explains(audits: dict[str, Audit]) -> None:
    odd = compared(audits, "raises", "fromage")
    assert (odd.verdict, odd.passes, odd.evidence) == ("not shown", False, {})
    assert "is not shown: no rule explains the answers of both" in report.text(odd)


def test_against_the_published_rule(audits: dict[str, Audit]) -> None:
    exact = Equivalence(audits["fromage"], published(audits["fromage"], "fromage"), {})
    assert exact.verdict == "equivalent to the bit"
    assert exact.b.verdict == "agrees to the bit"
    assert "with the published fromage is demonstrated, to the bit" in report.text(exact)
    other = Equivalence(audits["other"], exact.b, {})
    assert other.verdict == "equivalent"


def test_the_reports(found: Equivalence) -> None:
    """Equation, clauses, versions and digests are in all of them."""
    made = json.loads(json.dumps(report.as_json(found)))
    digest = hashlib.sha256((FOLDER / FILE).read_bytes()).hexdigest()
    assert made["vectors"] == {FILE: digest}
    assert made["equation"] == ["w <- (w - lr * |w| / |g| * g) / sqrt(1 + lr**2)"]
    assert [side["verdict"] for side in made["implementations"]] == ["agrees", "agrees to the bit"]
    texts = [report.text(found), report.markdown(found).decode(), report.html(found).decode()]
    for text in texts:
        assert digest in text
        assert "numpy" in text
        assert all(clause in text for clause in RULES["fromage"].clauses)
        assert "Equivalence of other" in text.replace("\\_", "_")
    assert "| clause | alternate | approved |" in texts[1]
    assert "`w <- (w - lr * \\|w\\| / \\|g\\| * g) / sqrt(1 + lr**2)`" in texts[1]
    columns = {line.replace("\\|", "").count("|") for line in texts[1].split("## Clauses")[1]
               .split("##")[0].splitlines() if line.startswith("|")}  # fmt: skip
    assert columns == {7}


def test_the_command(file: str, tmp_path: Path) -> None:
    """With the large and long tests, in processes of their own."""
    words = ["audit", f"{file}:other", "--against", f"{file}:fromage", "--rule", "fromage"]
    files = ["--markdown", tmp_path / "e.md", "--html", tmp_path / "e.html"]
    done = npdrt_cli(*words, "--format", "float64", "--json", *files)
    found = json.loads(done.stdout)
    assert (done.exit_code, found["verdict"], found["different"]) == (0, "equivalent", [])
    assert (tmp_path / "e.md").read_text().startswith("# Equivalence of mine.py:other and mine.py:")
    assert "Does not pass" not in (tmp_path / "e.html").read_text()


@pytest.mark.parametrize("name", ["slip", "raises"])
def test_the_exit_code_without_equivalence(
    name: str, audits: dict[str, Audit], file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = compared(audits, name, "fromage")
    monkeypatch.setattr("npdrt.cli.audit.compare", lambda *_, **__: made)
    done = npdrt_cli("audit", f"{file}:{name}", "--report", "equivalence")
    assert (done.exit_code, "fromage" in done.stdout) == (1, True)


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
    if "torch" in words and importlib.util.find_spec("torch") is None:
        pytest.skip("torch is not installed")
    done = npdrt_cli("audit", *words.split())
    assert (done.exit_code, message in " ".join(done.stderr.split())) == (2, True), done.stderr


def test_an_audit_in_markdown(audits: dict[str, Audit]) -> None:
    text = report.markdown(audits["slip"]).decode()
    assert text.startswith("# slip against fromage\n\nslip deviates from fromage")
    assert "## Smallest disagreeing test" in text
    assert "| element | w | g |" in text
