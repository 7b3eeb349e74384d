"""Reports of audits: the sentence of every verdict, the text, the JSON, the JUnit XML, the page."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as Xml

import numpy as np
import pytest

from npdrt.conform import report, vectors
from npdrt.conform.audit import PASSES, Audit, concluded
from npdrt.conform.case import Answer, Failure, Outcome
from npdrt.conform.identify import Finding
from npdrt.conform.report import page as report_page
from npdrt.conform.report.contents import elements
from npdrt.conform.report.document import Table
from npdrt.conform.report.verdict import smallest
from npdrt.conform.rules import RULES, run
from npdrt.conform.vectors import Vector
from npdrt.conform.verify import Checked, Missing, Verification

HOSTILE = "</script><img src=http://x.example/ onerror=alert(1)> & \x1b[31m \u202e \ud800"
EXACT: dict[str, str] = {}


def following(rule: str, choices: dict[str, str]) -> Callable[[Vector], Outcome]:
    """An implementation of a rule with these choices, rounded once from extended precision."""

    def answer(test: Vector) -> Outcome:
        case = test.case
        if case.result == "error":
            return Failure("raised", "no such lr")
        steps = run(RULES[rule], choices, case)
        values = (np.broadcast_to(step.w, case.w.shape).astype(np.float64) for step in steps)
        return tuple(Answer(case.number.round(w)) for w in values)

    return answer


def canonical(test: Vector) -> Outcome:
    """The bits of docs/updates.md."""
    if test.case.result == "error":
        return Failure("raised", "no such lr")
    return tuple(e.canonical for e in test.expected)


def audited(
    rule: str, answer: Callable[[Vector], Outcome], name: str = "theirs", form: str = "float32"
) -> Audit:
    """The audit of an implementation in this process."""
    tests = vectors.load(rule, [form], large=False)
    return concluded(name, {"lib": "1.2"}, tests, [answer(test) for test in tests])


def failing(kind: str, message: str) -> Callable[[Vector], Outcome]:
    """The published rule, with a failure on arrays of 17 elements."""
    rest = following("fromage", EXACT)
    return lambda t: Failure(kind, message) if t.case.w.size == 17 else rest(t)


def nonsense(test: Vector) -> Outcome:
    """Nothing that any rule gives."""
    w = test.case.number.round(test.case.w * 0.5 + 3)
    w.reshape(-1)[:1] = np.inf
    return tuple(Answer(w) for _ in test.case.steps)


def coarse(test: Vector) -> Outcome:
    """The published rule, a few ulps too far off: within what identifies it, not what passes."""
    found = following("fromage", EXACT)(test)
    if isinstance(found, Failure) or "ORDINARY" not in test.case.flags:
        return found
    return tuple(
        Answer(a.w + 1.5 * test.ulps / len(found) * test.case.number.ulp(e.scale))
        for a, e in zip(found, test.expected, strict=True)
    )


AUDITS: dict[str, tuple[str, Callable[[Vector], Outcome], str]] = {
    # name -> rule, answers, verdict
    "bits": ("fromage", canonical, "agrees to the bit"),
    "close": ("lars", following("lars", EXACT), "agrees"),
    "optax": ("fromage", following("fromage", {"zero norm": "floor 1e-6"}), "dialect"),
    "profile": ("fromage", following("fromage", {"norm accumulation": "dtype"}), "profile"),
    "squared": ("fromage", following("fromage", {"prefactor": "squared"}), "deviates"),
    "amsgrad": (
        "adam",
        following("adam", {"second moment": "largest mean of squares"}),
        "out of scope",
    ),
    "raises": ("fromage", failing("raised", f"TypeError: {HOSTILE}"), "no verdict"),
    "hangs": ("fromage", failing("hung", "no answer within 10 s"), "no verdict"),
    "silent": ("fromage", lambda t: Failure("not offered", f"no {HOSTILE}"), "no verdict"),
    "nonsense": ("fromage", nonsense, "unknown"),
}


@pytest.fixture(scope="module")
def audits() -> dict[str, Audit]:
    """An audit for every verdict."""
    return {name: audited(rule, answer, name) for name, (rule, answer, _) in AUDITS.items()}


@pytest.fixture(scope="module")
def hostile() -> Audit:
    """An audit whose target has a hostile name, version and messages."""
    audit = audited("fromage", failing("raised", HOSTILE), HOSTILE)
    return dataclasses.replace(audit, versions={"lib": HOSTILE}, skipped={HOSTILE: 3})


# --- the sentence ---------------------------------------------------------------------------------


def test_every_verdict_is_here(audits: dict[str, Audit]) -> None:
    assert {verdict for _, _, verdict in AUDITS.values()} == set(PASSES)
    assert {n: a.verdict for n, a in audits.items()} == {n: v for n, (_, _, v) in AUDITS.items()}


SENTENCES = {
    "bits": r"bits agrees with fromage to the bit \(C0\): \d+ tests in float32",
    "close": r"close agrees with lars to within \S+ ulps? \(C1\), \S+ ulps? after many steps "
    r"\(C3\): \d+ tests in float32",
    "optax": r"optax is the optax dialect of fromage: it differs from the published rule in "
    r"`zero norm`: norms are at least 1e-6 \(published: lr \* g where either norm is not > 0\)",
    "profile": r"profile is fromage in other arithmetic: `norm accumulation`: squares and .*",
    "squared": r"squared deviates from fromage: it breaks `prefactor`: \(w - s g\) / \(1 \+ lr\^2\)"
    r" \(published: \(w - s g\) / sqrt\(1 \+ lr\^2\)\)",
    "amsgrad": r"amsgrad is AMSGrad, another optimizer than adam, and out of scope: `second .*",
    "raises": r"raises: no verdict: it raises on \d of \d+ tests; first: test \d+ "
    r"\(shape \(17,\)\): TypeError: .*",
    "hangs": r"hangs: no verdict: it gives no answer in time on \d of .* no answer within 10 s",
    "silent": r"silent: no verdict: no test was answered: no .*",
    "nonsense": r"nonsense follows no known way to write fromage; it fails most at [A-Z_]+ "
    r"\(\d+ of \d+\), .*; \d+ answers not finite where finite ones are expected",
}


@pytest.mark.parametrize("name", SENTENCES)
def test_sentences(name: str, audits: dict[str, Audit]) -> None:
    assert re.fullmatch(SENTENCES[name], report.sentence(audits[name]))


def test_less_exact_than_it_should_be() -> None:
    audit = audited("fromage", coarse)
    assert audit.verdict == "unknown"
    assert "follows no known way to write fromage" in report.sentence(audit)
    rule = audit.finding.rule
    near = dataclasses.replace(audit, finding=Finding(rule, {}, rule.dialects[0]))
    assert near.verdict == "unknown"
    assert "but less exactly than it should" in report.sentence(near)


def test_dialects_pass_where_they_are_asked_for(audits: dict[str, Audit]) -> None:
    assert report.passes(audits["optax"], "optax")
    assert not report.passes(audits["optax"])
    assert not report.passes(audits["optax"], "nfnets")
    assert not report.passes(audits["bits"], "optax")
    assert report.passes(audits["bits"], "published")
    assert report.passes(audits["profile"], "published")
    assert not report.passes(audits["squared"], "published")
    assert report.passes(audits["amsgrad"], "AMSGrad")
    assert not report.passes(audits["raises"], "published")
    assert not report.passes(audits["nonsense"], "published")


# --- text and JSON --------------------------------------------------------------------------------


def test_text(audits: dict[str, Audit]) -> None:
    text = report.text(audits["optax"])
    lines, dialect = text.splitlines(), RULES["fromage"].dialects[1]
    assert lines[0] == report.sentence(audits["optax"]) + "."
    assert lines[1] == f"source: {dialect.source} ({dialect.note})"
    assert re.search(r"^  level +format +passed +worst, ulps +at$", text, re.M)
    assert re.search(r"^  C1 +float32 +\d+ of \d+ +\S+ +test \d+ \(.+\)$", text, re.M)
    assert "smallest disagreeing test: " in text
    assert re.search(r"  first difference: s is \S+; published: 0.1$", text, re.M)
    assert lines[-1].startswith("lib 1.2, npdrt ")


def test_the_dialect_that_was_asked_for(audits: dict[str, Audit]) -> None:
    for render in (report.text, lambda *found: Page(report.html(*found)).text):
        accepted, refused = (render(audits["optax"], name) for name in ("optax", "nfnets"))
        assert "accepted as the dialect that was asked for: optax" in accepted
        assert "it is not the dialect that was asked for: nfnets" in refused
        assert "accepted as" not in refused
        assert "asked for" not in render(audits["optax"])


def test_the_smallest_test_in_full(audits: dict[str, Audit]) -> None:
    judged = smallest(audits["optax"])
    assert judged is not None
    about, table = elements(judged)
    assert isinstance(about, str)
    assert about.startswith("format float32; shape [2, 3]; settings norm_bound = None; step 1 of 1")
    assert isinstance(table, Table)
    head, *rows = table.rows
    assert head == ("element", "w", "g", "expected", "bits expected", "got", "bits got", "ulps")
    case = judged.test.case
    assert len(rows) == case.w.size
    for row, w, e in zip(rows, case.w.flat, judged.test.expected[0].exact.flat, strict=True):
        assert np.float32(str(row[1])) == w
        assert vectors.FORMATS["float32"].values(row[4])[0] == e == np.float32(str(row[3]))


def test_an_agreeing_audit_has_no_disagreeing_test(audits: dict[str, Audit]) -> None:
    assert smallest(audits["bits"]) is None
    assert "disagreeing" not in report.text(audits["close"])


def test_json(audits: dict[str, Audit], hostile: Audit) -> None:
    for audit in (*audits.values(), hostile):
        found = json.loads(json.dumps(report.as_json(audit)))
        assert found["verdict"] == audit.verdict
        assert found["passes"] is PASSES[audit.verdict]
        assert len(found["tests"]) == len(audit.judged)
    found = report.as_json(audits["optax"])
    assert found["dialect"]["name"] == "optax"
    assert [clause["name"] for clause in found["clauses"]] == ["zero norm"]
    assert found["smallest"]["parting"]["label"] == "s"
    assert len(found["smallest"]["got"][0]) == len(found["smallest"]["w"])


def test_nothing_steers_a_terminal(hostile: Audit) -> None:
    text = report.text(hostile)
    assert all(c.isprintable() or c == "\n" for c in text)
    assert "\\x1b[31m \\u202e \\ud800" in text


# --- JUnit ----------------------------------------------------------------------------------------


def test_junit(audits: dict[str, Audit], hostile: Audit) -> None:
    for audit in (*audits.values(), hostile):
        root = Xml.fromstring(report.junit(audit))
        made = root.findall("testsuite/testcase")
        assert len(made) == len(audit.judged) + 1
        assert int(root.attrib["tests"]) == len(made)
        assert int(root.attrib["failures"]) == len(root.findall(".//failure"))
        assert int(root.attrib["errors"]) == len(root.findall(".//error"))
        assert bool(root.findall(".//failure")) is not PASSES[audit.verdict]
        odd = [j for j in audit.gated if not j.accurate]
        wrong = len(root.findall(".//failure")) + len(root.findall(".//error"))
        assert wrong == len(odd) + (not PASSES[audit.verdict])


def test_junit_of_a_failure(audits: dict[str, Audit]) -> None:
    root = Xml.fromstring(report.junit(audits["squared"]))
    case = next(c for c in root.iter("testcase") if c.get("classname") == "fromage.float32"
                and c.find("failure") is not None)  # fmt: skip
    message = case.find("failure")
    assert message is not None
    pattern = r"\S+ ulps, accepted \d+: element \d+ after step 1: expected bits \w{8}, got \w{8}"
    assert re.fullmatch(pattern, message.get("message", ""))


def test_junit_of_an_accepted_dialect(audits: dict[str, Audit]) -> None:
    root = Xml.fromstring(report.junit(audits["optax"], "optax"))
    assert (root.get("failures"), root.get("errors")) == ("0", "0")
    assert len(root.findall(".//skipped")) > 0


# --- the page -------------------------------------------------------------------------------------

VOID = {"meta"}
POLICY = "default-src 'none'; style-src 'unsafe-inline'"


class Page(HTMLParser):
    """Nesting, headings, resources and scripts of a page."""

    def __init__(self, content: bytes):
        super().__init__()
        self.open: list[str] = []
        self.headings: list[int] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.tags: set[str] = set()
        self.text = ""
        self.feed(content.decode())
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.add(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if re.fullmatch(r"h\d", tag):
            self.headings.append(int(tag[1]))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def verification(audits: dict[str, Audit], name: str = "them") -> Verification:
    """A verification with a bit of everything."""
    checked = [
        Checked(1, "one", ("F",), "Norm", "norm float32", True, 0.5, "norm", True),
        Checked(2, "two", ("F",), "Primitive", "primitive exp float32", False, 9.0, HOSTILE, True),
        Checked(3, "three", ("F",), "TrainingStep", "training step with sgd float64", False,
                np.inf, "", True, HOSTILE),
    ]  # fmt: skip
    missing = (Missing(4, HOSTILE, "norm float32"),)
    rules = (audits["optax"], audits["bits"], audits["raises"])
    return Verification(name, rules, tuple(checked), missing, {"sgd float32": 7}, 2)


@pytest.fixture(scope="module")
def pages(audits: dict[str, Audit], hostile: Audit) -> dict[str, bytes]:
    """Every page."""
    found = {name: report.html(audit) for name, audit in audits.items()}
    found["hostile"] = report.html(hostile)
    found["accepted"] = report.html(audits["optax"], "optax")
    found["verification"] = report.html(verification(audits, HOSTILE))
    return found


def test_pages_are_well_formed_and_fetch_nothing(pages: dict[str, bytes]) -> None:
    for name, content in pages.items():
        page = Page(content)
        assert content.startswith(b'<!DOCTYPE html>\n<html lang="en">'), name
        assert not page.tags & {"script", "img", "link", "iframe", "object", "a", "base", "form"}
        names = {attribute for _, attribute, _ in page.attributes}
        assert not names & {"src", "href", "xlink:href", "srcset", "action", "data", "background"}
        assert not [n for n in names if n.startswith("on")]
        assert not re.search(r"url\(|@import", report_page.TEMPLATE.read_text())
        links = [v for _, _, v in page.attributes if "http" in v and "x.example" not in v]
        assert links == []
        assert ("meta", "content", POLICY) in page.attributes


def test_headings_are_in_order(pages: dict[str, bytes]) -> None:
    for name, content in pages.items():
        headings = Page(content).headings
        assert headings[0] == 1, name
        assert headings.count(1) == 1, name
        assert all(b <= a + 1 for a, b in itertools.pairwise(headings)), name


def test_plots_and_tables_can_be_read_aloud(pages: dict[str, bytes]) -> None:
    page = Page(pages["optax"])
    labels = [value for tag, name, value in page.attributes if (tag, name) == ("svg", "aria-label")]
    assert len(labels) == 1
    assert re.fullmatch(r"float32: error of \d+ tests; \d+ of \d+ gated tests beyond .*", labels[0])
    assert ("svg", "role", "img") in page.attributes
    assert ("th", "scope", "col") in page.attributes
    content = pages["optax"].decode()
    assert content.count("<table>") == content.count("<caption>")


def test_what_is_on_a_page(audits: dict[str, Audit], pages: dict[str, bytes]) -> None:
    text = Page(pages["optax"]).text
    assert "\noptax against fromage\n" in text
    assert "Does not pass. optax is the optax dialect of fromage" in text
    for heading in ("Levels", "Error of every test", "Clauses", "Smallest disagreeing test",
                    "Failing tests", "By flag", "Not asked, not gated", "Environment"):  # fmt: skip
        assert heading in text
    content = pages["optax"].decode()
    asked = sum(bool(j.test.expected) for j in audits["optax"].judged)
    assert len(re.findall(r"<title>test \d+, ", content)) == asked
    assert content.count('class="off"') == sum(not j.accurate for j in audits["optax"].gated)
    assert "Passes. " in Page(pages["accepted"]).text
    assert "Passes. " in Page(pages["bits"]).text
    assert "Clauses" not in Page(pages["bits"]).text


def test_hostile_texts_are_shown_as_text(pages: dict[str, bytes]) -> None:
    for name in ("hostile", "verification"):
        content = pages[name].decode()
        assert "&lt;/script&gt;&lt;img src=http://x.example/" in content
        assert "\x1b" not in content
        assert "\u202e" not in content
        assert "\\x1b[31m \\u202e \\ud800" in content


def test_verification_reports(audits: dict[str, Audit], pages: dict[str, bytes]) -> None:
    found = verification(audits, HOSTILE)
    text = report.text(found)
    assert all(c.isprintable() or c == "\n" for c in text)
    assert "no answer to 1 test: norm float32 1" in text
    assert "not attempted: 7 tests: sgd 7" in text
    assert "not looked at: 2 answers to other tests" in text
    root = Xml.fromstring(report.junit(found))
    assert len(root.findall("testsuite")) == 4
    assert {c.get("classname") for c in root.findall("testsuite[@name='other']/testcase")} == {
        *("Norm", "Primitive", "TrainingStep", "norm float32"),
    }
    json.dumps(report.as_json(found))
    for heading in ("Not answered", "Norms, primitives, training steps"):
        assert heading in Page(pages["verification"]).text


def test_in_a_browser(pages: dict[str, bytes], tmp_path: Path) -> None:
    """Chromium shows the page, logs no error and refuses nothing by the page's policy."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        pytest.skip("chromium is not installed")
    for name in ("verification", "optax"):
        (tmp_path / "page.html").write_bytes(pages[name])
        words = [
            *(browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic"),
            *("--no-first-run", "--disable-background-networking", "--disable-component-update"),
            *("--disable-sync", f"--user-data-dir={tmp_path / name}", "--enable-logging=stderr"),
            *("--v=0", "--dump-dom", f"file://{tmp_path / 'page.html'}"),
        ]
        done = subprocess.run(words, capture_output=True, text=True, timeout=60)
        if "<main>" not in done.stdout:
            pytest.skip(f"chromium does not start here: {done.stderr[-200:]}")
        for heading in re.findall(r"<h[123]>.*?</h[123]>", pages[name].decode()):
            assert heading in done.stdout
        assert "CONSOLE" not in done.stderr
        assert "x.example" not in done.stderr
        assert not re.search(r"Refused to|ERR_", done.stderr)
