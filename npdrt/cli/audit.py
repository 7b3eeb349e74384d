"""`npdrt audit`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

import click

from npdrt import atomic
from npdrt.cli.common import (
    Name,
    answer,
    bars,
    check_outputs,
    echo,
    json_option,
    print_json,
    table,
    toml_values,
)
from npdrt.conform import recorded, report, targets
from npdrt.conform.audit import Audit, audit, audit_recorded
from npdrt.conform.equivalence import Equivalence, compare
from npdrt.conform.formats import FORMATS
from npdrt.conform.rules import KNOWN, RULES, UNKNOWN
from npdrt.errors import Error, Unavailable
from npdrt.optim import RULES as OPTIMIZERS
from npdrt.regular import require

RECORDED = (".npz", ".safetensors", ".h5", ".hdf5")
DEFAULT = ("float32", "float64")
WORDS = {"True": True, "False": False, "None": None, "none": None}  # in addition to TOML's
_FILE = click.Path(path_type=Path, dir_okay=False)
html_option = click.option("--html", type=_FILE, help="Web page to write.  [default: none]")
junit_option = click.option("--junit", type=_FILE, help="JUnit XML to write.  [default: none]")


class RuleName(Name):
    """A rule that the referee knows."""

    def convert(self, value: Any, param: Any, ctx: Any) -> str:
        """The name. Raises `Error` for a rule of npdrt that the referee does not know."""
        return RULES[value].name if value in UNKNOWN else super().convert(value, param, ctx)


rule_name = RuleName(list(RULES))


@click.command("audit")
@click.argument("target", required=False)
@click.option(
    "--rule",
    type=rule_name,
    help="The rule to compare it with.  [default: what it is, or fits]",
)
@click.option(
    "--format",
    "formats",
    type=Name(list(FORMATS)),
    multiple=True,
    help="Number format; may be repeated.  [default: float32, float64]",
)
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="NAME=VALUE",
    help="An argument of every call; of a recording, a setting of its rule, as in momentum=0.9, "
    "decoupled=true, betas=[0.8,0.99]. May be repeated.  [default: none]",
)
@click.option(
    "--against", metavar="TARGET", help="Compare it with this implementation.  [default: none]"
)
@click.option(
    "--report",
    "kind",
    type=Name(["audit", "equivalence"]),
    help="What to report; equivalence is with --against, or else the published rule."
    "  [default: audit, or equivalence with --against]",
)
@click.option("--dialect", metavar="NAME", help="Pass where it is this dialect.  [default: none]")
@click.option(
    "--lr", type=float, help="Learning rate of a recording that has none.  [default: none]"
)
@click.option(
    "--parameter", metavar="NAME", help="The one tensor of a recording to look at.  [default: all]"
)
@click.option(
    "--limit",
    type=click.FloatRange(min=0, min_open=True),
    default=10.0,
    help="Seconds a test may take; not for recordings.  [default: 10]",
)
@html_option
@click.option("--markdown", type=_FILE, help="Markdown to write.  [default: none]")
@junit_option
@click.option("--force", is_flag=True, help="Replace these files if they exist.")
@click.option("--list", "listing", is_flag=True, help="List known targets and dialects; no audit.")
@json_option
def command(
    target: str | None, rule: str | None, formats: tuple[str, ...], settings: tuple[str, ...],
    against: str | None, kind: str | None, dialect: str | None, lr: float | None,
    parameter: str | None, limit: float, html: Path | None, markdown: Path | None,
    junit: Path | None, force: bool, listing: bool, as_json: bool,
) -> None:  # fmt: skip
    """Check an implementation of an update rule against the published rule; name its dialect.

    TARGET is torch.optim.SGD, optax.adam, ... (--list), path/to/file.py:callable of your own
    (docs/audit-protocol.md), whose code is run, or a recording of steps in .npz, .safetensors
    or .h5, which needs --rule.

    Exit code 0 where it agrees with the published rule; with --dialect NAME where that dialect
    explains all its answers, differences of mere arithmetic (the norm accumulation) aside. 1
    where not, or where there is no verdict. 4 where the library is not installed.

    With --against, or --report equivalence, it reports whether two implementations are equivalent:
    the equation, every clause with its evidence, versions and digests. Exit code 0 if they are.
    --set is for TARGET alone.

    \b
    --json prints one object:
      name, rule, verdict, passes, sentence
      dialect, also, clauses  what it is, what else it may be, where it differs
      levels                a list: level, format, passed, total, worst
      smallest              the smallest disagreeing test, or null: expected and
                            got as bits, parting: the first operation
      failing_flags, failures, not_asked, tests, versions
    Numbers that are not finite are "inf", "-inf" or "nan" in it; rule is null
    where none fits.
    """
    if listing:
        _list(as_json)
        return
    if target is None:
        raise click.UsageError("Missing argument 'TARGET'.")
    check_outputs(force, html, markdown, junit)
    given = values(settings)
    if against is not None or kind == "equivalence":
        _check_equivalence(target, kind, dialect=dialect, junit=junit, lr=lr, parameter=parameter)
        both = _compared(target, against, rule, given, formats or DEFAULT, limit)
        write(html, lambda: report.html(both))
        write(markdown, lambda: report.markdown(both))
        answer(as_json, report.as_json(both), lambda: report.text(both))
        raise SystemExit(0 if both.passes else 1)
    if Path(target).suffix.lower() in RECORDED:
        if formats:
            raise click.UsageError(
                "--format is not for recordings: a recording has its own format; leave it out."
            )
        known_dialect(dialect, rule)
        found = _recorded(Path(target), rule, given, lr, parameter)
    else:
        found = _asked(target, rule, given, formats or DEFAULT, limit, dialect, lr, parameter)
    known_dialect(dialect, found.rule)
    write(html, lambda: report.html(found, dialect))
    write(markdown, lambda: report.markdown(found, dialect))
    write(junit, lambda: report.junit(found, dialect))
    answer(as_json, report.as_json(found, dialect), lambda: report.text(found, dialect))
    if not report.passes(found, dialect):
        raise SystemExit(1)


def _check_equivalence(target: str, kind: str | None, **others: Any) -> None:
    """Refuse what does not go with a comparison of two implementations."""
    if kind == "audit":
        raise click.UsageError("--against makes a report of equivalence; leave out --report audit.")
    if Path(target).suffix.lower() in RECORDED:
        raise click.UsageError("a recording answers no tests, so it cannot be compared; give a "
                               "target that can be called.")  # fmt: skip
    for name in (name for name, value in others.items() if value is not None):
        raise click.UsageError(f"--{name} is not for a report of equivalence; leave it out.")


def _compared(
    spec: str, against: str | None, rule: str | None, given: Mapping[str, Any],
    formats: Sequence[str], limit: float,
) -> Equivalence:  # fmt: skip
    """The comparison of a target with another one, or with the published rule."""
    a = targets.find(spec, given, rule)
    b = None if against is None else targets.find(against, None, rule)
    with bars() as shown:
        progress = partial(shown.progress, "audit")
        return compare(a, b, formats, limit=limit, progress=progress)


def _asked(
    spec: str, rule: str | None, given: Mapping[str, Any], formats: Sequence[str],
    limit: float, dialect: str | None, lr: float | None, parameter: str | None,
) -> Audit:  # fmt: skip
    """The audit of something that can be asked."""
    for name, value in (("--lr", lr), ("--parameter", parameter)):
        if value is not None:
            raise click.UsageError(
                f"{name} is for recordings only ({', '.join(RECORDED)}); leave it out."
            )
    target = targets.find(spec, given, rule)
    known_dialect(dialect, target.rule)
    with bars() as shown:
        return audit(target, formats, limit=limit, progress=partial(shown.progress, "audit"))


def _recorded(
    path: Path, rule: str | None, given: Mapping[str, Any], lr: float | None, parameter: str | None
) -> Audit:
    """The audit of a recording."""
    if rule is None:
        raise click.UsageError("A recording needs --rule.")
    require(path, "file")
    settings = settings_of(rule, given)
    answered: list[Any] = []
    for recording in recorded.load(path, lr=lr, parameter=parameter):
        answered += recorded.cases(recording, rule, settings, first=len(answered) + 1)
    return audit_recorded(path.name, answered)


def settings_of(rule: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Every setting of a rule but lr, as npdrt's own optimizer of the rule takes them."""
    known = list(OPTIMIZERS[rule].settings)
    for name in given:
        if name not in known:
            hint = _hint(name, known, f"it has {', '.join(known) or 'none'}")
            raise Error(f"{rule} has no setting {name!r}; {hint}")
    try:
        settings = OPTIMIZERS[rule](lr=0.0, **given).settings
    except (TypeError, ValueError) as error:
        shown = " ".join(f"--set {name}={value}" for name, value in given.items())
        raise Error(
            f"{shown}: {error}; a number, true or false, text in quotes, or a list: "
            "--set momentum=0.9 --set betas=[0.9,0.999]"
        ) from error
    return {name: settings[name] for name in known}


def known_dialect(name: str | None, rule: str | None) -> None:
    """Refuse the name of a dialect that the rule does not have."""
    rules = [RULES[rule]] if rule else list(RULES.values())
    names = list(dict.fromkeys(d.name for r in rules for d in r.dialects))
    if name is not None and name not in names:
        hint = _hint(name, names, f"use one of {', '.join(map(repr, names))}")
        raise Error(f"unknown dialect {name!r}{f' of {rule}' if rule else ''}; {hint}")


def _hint(name: str, known: Sequence[str], otherwise: str) -> str:
    """The known name that was probably meant, or else `otherwise`."""
    close = get_close_matches(name, known, 1)
    return f"did you mean {close[0]!r}?" if close else otherwise


def values(pairs: Sequence[str]) -> dict[str, Any]:
    """--set NAME=VALUE as a dict; a value is TOML, True, False or None, or else text."""
    return toml_values(pairs, WORDS)


def write(path: Path | None, content: Any) -> None:
    """Write what `content()` gives to a file that was asked for."""
    if path is not None:
        atomic.replace(path, content())


# --- the list -------------------------------------------------------------------------------------


def _list(as_json: bool) -> None:
    """What can be asked, and what it may turn out to be."""
    if as_json:
        print_json({"targets": _targets(), "dialects": _dialects()})
        return
    rows = [("target", "rule", "version")]
    rows += [(t["target"], t["rule"], t["version"] or "not installed") for t in _targets()]
    lines = [
        table(rows),
        "any other optimizer: package.module.Name, or path/to/file.py:callable "
        "(docs/audit-protocol.md)",
        "",
    ]
    named = [("rule", "dialect", "source, and how it differs from the published rule")]
    for d in _dialects():
        name = d["dialect"] if d["in_scope"] else f"{d['dialect']} (out of scope)"
        named.append((d["rule"], name, d["source"]))
        named += [("", "", f"  {clause}: {choice}") for clause, choice in d["choices"].items()]
    missing = [f"{name}: not audited, npdrt/conform/rules/{name}.py is missing" for name in UNKNOWN]
    echo("\n".join([*lines, table(named), *missing]))


def _targets() -> list[dict[str, Any]]:
    found = []
    for name, (rule, _) in KNOWN.items():
        try:
            packages = targets.versions(name.partition(".")[0])
            version = ", ".join(f"{k} {v}" for k, v in packages.items())
        except Unavailable:
            version = None
        found.append({"target": name, "rule": rule.name, "version": version})
    return found


def _dialects() -> list[dict[str, Any]]:
    return [
        {
            "rule": rule.name, "dialect": d.name, "source": d.source, "note": d.note,
            "in_scope": d.scope, "choices": dict(d.choices),
        }
        for rule in RULES.values()
        for d in rule.dialects
    ]  # fmt: skip
