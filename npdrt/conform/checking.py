"""One line in a test suite: does this optimizer follow its rule?"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from typing import Any

from npdrt.conform import targets
from npdrt.conform.adapters.load import adapted
from npdrt.conform.adapters.serve import outcome
from npdrt.conform.audit import Audit, asked_of, audit, concluded
from npdrt.conform.case import Case, Failure, Outcome
from npdrt.conform.formats import FORMATS
from npdrt.conform.report import passes
from npdrt.conform.report.contents import SMALLEST, report
from npdrt.conform.report.document import Section, text
from npdrt.conform.rules import RULES
from npdrt.errors import Error


class Disagrees(AssertionError):
    """An optimizer does not follow its rule. The message has the verdict and the smallest test that
    disagrees; audit: everything that was found."""

    def __init__(self, found: Audit, dialect: str | None):
        document = report(found, dialect)
        smallest = [part for part in document.sections if part.title == SMALLEST]
        super().__init__(text(Section("", document.lines, sections=smallest)))
        self.audit = found


def check(
    optimizer: str | Callable[..., Any],
    rule: str,
    *,
    formats: Sequence[str] = ("float32", "float64"),
    dialect: str | None = None,
    settings: Mapping[str, Any] | None = None,
    long: bool = False,
) -> Audit:
    """Raise `Disagrees` unless an optimizer follows a rule; else the audit.

        def test_my_adam():
            npdrt.conform.check(my_adam, rule="adam")

    optimizer: a function update(w, g, state, *, lr, ...) (docs/audit-protocol.md), a function of lr
    and settings that returns an `npdrt.optim.Optimizer`, or a name as in `npdrt audit`
    ("torch.optim.Adam", "path/to/file.py:update"). dialect: the one that is accepted too, or
    "published". settings: arguments of every call. long: with the large and long tests, which a
    name always has.

    A function runs in this process, without a time limit. Raises `Error` if it cannot be called as
    the protocol says.
    """
    if rule not in RULES:
        raise Error(f"unknown rule {rule!r}; use one of {', '.join(RULES)}")
    if odd := [form for form in formats if form not in FORMATS]:
        raise Error(f"unknown format {odd[0]!r}; use {', '.join(FORMATS)}")
    names = [known.name for known in RULES[rule].dialects]
    if dialect not in (None, *names):
        raise Error(f"unknown dialect {dialect!r} of {rule}; use one of {', '.join(names)}")
    if isinstance(optimizer, str):
        found = audit(targets.find(optimizer, settings, rule), formats)
    else:
        found = _here(optimizer, rule, formats, settings or {}, (False, True) if long else (False,))
    if not passes(found, dialect):
        raise Disagrees(found, dialect)
    return found


def _here(
    optimizer: Any, rule: str, formats: Sequence[str], settings: Mapping[str, Any],
    kinds: Sequence[bool],
) -> Audit:  # fmt: skip
    """The audit of something that can be called, in this process."""
    if not callable(optimizer):
        raise Error(
            f"expected a function or a name; got {type(optimizer).__name__}. Of an optimizer give "
            "the function that makes it: the tests have settings of their own"
        )
    name = getattr(optimizer, "__name__", type(optimizer).__name__)
    code = getattr(inspect.unwrap(optimizer), "__code__", None)
    adapter = adapted(optimizer, name, settings, code.co_filename if code else "")
    versions = {"python": sys.version.split()[0], "numpy": metadata.version("numpy")}
    target = targets.Target(
        name, name, "file", rule, adapter.info.offers, adapter.info.formats, versions,
        overrides=dict(settings), required=adapter.info.required, uses=adapter.info.uses,
    )  # fmt: skip

    def answer(case: Case) -> Outcome:
        found = targets.lacks(target, case) or outcome(adapter, case)
        if isinstance(found, Failure) and found.message.startswith("KeyboardInterrupt"):
            raise KeyboardInterrupt
        return found

    vectors = list(asked_of(target, rule, formats, kinds))
    return concluded(name, versions, vectors, [answer(v.case) for v in vectors])
