"""Reports of an audit or of a verification: as text, as a web page, in Markdown, as JSON
and as JUnit XML.

`contents` builds one document, or `equivalence` that of two implementations; `document` gives its
text and its Markdown, `page` its page. `data` makes the JSON, `xml` the JUnit XML.
"""

from __future__ import annotations

from typing import Any

from npdrt.conform.equivalence import Equivalence
from npdrt.conform.report import data, document, equivalence, page
from npdrt.conform.report.contents import report
from npdrt.conform.report.verdict import Found, passes, sentence
from npdrt.conform.report.xml import junit
from npdrt.plain import counted


def text(found: Found | Equivalence, dialect: str | None = None) -> str:
    """The report for a terminal; dialect: the one that was asked for."""
    return document.text(_document(found, dialect))


def html(found: Found | Equivalence, dialect: str | None = None) -> bytes:
    """The report as a web page: one file without scripts that fetches nothing."""
    return page.page(_document(found, dialect))


def markdown(found: Found | Equivalence, dialect: str | None = None) -> bytes:
    """The report in Markdown, without its plots."""
    return f"{document.markdown(_document(found, dialect))}\n".encode()


def as_json(found: Found | Equivalence, dialect: str | None = None) -> dict[str, Any]:
    """The report as one JSON object."""
    if isinstance(found, Equivalence):
        return equivalence.as_json(found)
    return data.as_json(found, dialect)


def _document(found: Found | Equivalence, dialect: str | None) -> document.Document:
    return equivalence.document(found) if isinstance(found, Equivalence) else report(found, dialect)


__all__ = ["as_json", "counted", "html", "junit", "markdown", "passes", "sentence", "text"]
