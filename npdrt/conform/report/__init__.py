"""Reports of an audit or of a verification: as text, as a web page, as JSON and as JUnit XML.

`contents` builds one document, whose text `document` gives and whose page `page`; `data` makes the
JSON, `xml` the JUnit XML.
"""

from __future__ import annotations

from npdrt.conform.report import document, page
from npdrt.conform.report.contents import report
from npdrt.conform.report.data import as_json
from npdrt.conform.report.verdict import Found, passes, sentence
from npdrt.conform.report.xml import junit
from npdrt.plain import counted


def text(found: Found, dialect: str | None = None) -> str:
    """The report for a terminal; dialect: the one that was asked for."""
    return document.text(report(found, dialect))


def html(found: Found, dialect: str | None = None) -> bytes:
    """The report as a web page: one file without scripts that fetches nothing."""
    return page.page(report(found, dialect))


__all__ = ["as_json", "counted", "html", "junit", "passes", "sentence", "text"]
