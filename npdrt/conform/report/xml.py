"""A report as JUnit XML: a suite for each rule, and a test case for each test and each verdict."""

from __future__ import annotations

from xml.etree import ElementTree as Xml

from npdrt.conform.audit import Audit
from npdrt.conform.judge import Judged
from npdrt.conform.report.contents import elements, failed, named, wrong
from npdrt.conform.report.document import Section, text
from npdrt.conform.report.verdict import Found, environment, passes, sentence
from npdrt.conform.verify import Verification
from npdrt.plain import line, printable

COUNTS = {"tests": "testcase", "failures": "failure", "errors": "error", "skipped": "skipped"}


def junit(found: Found, dialect: str | None = None) -> bytes:
    """The report as JUnit XML.

    dialect: the one that is accepted; a test that its clauses explain does not fail.
    """
    root = Xml.Element("testsuites", name=line(found.name))
    if isinstance(found, Verification):
        root.extend(_suite(audit, None) for audit in found.audits)
        root.extend(_others(found))
    else:
        root.append(_suite(found, dialect))
    for element in (root, *root):
        for count, kind in COUNTS.items():
            element.set(count, str(len(element.findall(f".//{kind}"))))
    del root.attrib["skipped"]  # only suites have it
    Xml.indent(root)
    return bytes(Xml.tostring(root, encoding="utf-8", xml_declaration=True)) + b"\n"


def _suite(audit: Audit, dialect: str | None) -> Xml.Element:
    """The tests of an audit and its verdict."""
    suite = Xml.Element("testsuite", name=line(f"{audit.name} against {audit.rule}"))
    properties = Xml.SubElement(suite, "properties")
    skipped = {f"not asked: {why}": n for why, n in audit.skipped.items()}
    about = {"verdict": audit.verdict, **environment(audit.versions), **skipped}
    for name, value in about.items():
        Xml.SubElement(properties, "property", name=line(name), value=line(value))
    passed = passes(audit, dialect)
    _case(suite, audit.rule, "verdict", "" if passed else "failure", sentence(audit))
    excused = passed and dialect is not None
    for judged in audit.judged:
        case, kind = judged.test.case, ""
        if not judged.accurate:
            kind = "failure" if judged.failure is None else "error"
            kind = "skipped" if excused or not judged.gated else kind
        name = f"{case.id} {case.comment}"
        message = (wrong(judged), _details(judged)) if kind else ()
        _case(suite, f"{case.rule}.{case.format}", name, kind, *message)
    return suite


def _details(judged: Judged) -> str:
    blocks = elements(judged)
    return text(Section("", [f"test: {named(judged)}"], blocks)) if blocks else ""


def _others(found: Verification) -> list[Xml.Element]:
    """The norms, primitives and training steps of a response, and the missing answers."""
    suite = Xml.Element("testsuite", name="other")
    for c in found.checked:
        kind = "" if c.passed else "failure" if c.gated else "skipped"
        _case(suite, c.kind, f"{c.id} {c.comment}", kind, failed(c))
    for m in found.missing:
        _case(suite, m.group, f"{m.id} {m.comment}", "failure", "no answer")
    return [suite] if len(suite) else []


def _case(
    suite: Xml.Element, group: str, name: str, kind: str, message: str = "", details: str = ""
) -> None:
    """Add a test case; kind: the element that says why it does not pass, or ""."""
    case = Xml.SubElement(suite, "testcase", classname=line(group), name=line(name))
    if kind:
        Xml.SubElement(case, kind, message=line(message)).text = printable(details) or None
