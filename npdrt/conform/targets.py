"""Asks an optimizer of somebody else: finds it, and runs cases through it in a child process.

All code of a target runs in one child (`npdrt.conform.adapters.serve`), with a time limit for every
case. The child writes nothing to this process's output and ends with it. That guards against
mistakes, not against malice: a target may do whatever the user who runs it may do.
"""

from __future__ import annotations

import importlib.util
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from importlib import metadata
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from npdrt.conform.adapters.adapter import Info, Unanswered
from npdrt.conform.adapters.signature import RATES
from npdrt.conform.case import USES, Case, Failure, Outcome
from npdrt.conform.formats import FORMATS
from npdrt.conform.rules import KNOWN
from npdrt.errors import Error, Unavailable
from npdrt.optim import RULES
from npdrt.regular import require
from npdrt.workers import Worker

START = 120.0  # seconds to import a target
UNIT = 500  # steps for which the limit of a case is enough
LOSSES = 3  # children that a target may crash
COUNTER = 2**31 - 1  # where optax and Keras stop counting
PACKAGES = {  # what optimizers of a package need
    "torch": ("torch",),
    "optax": ("optax", "jax"),
    "keras": ("keras",),
    "timm": ("timm", "torch"),
    "pytorch_optimizer": ("pytorch_optimizer", "torch"),
    "torch_optimizer": ("torch_optimizer", "torch"),
}
FORMS = (
    "a name in a package, such as torch.optim.SGD (npdrt audit --list), or "
    "path/to/file.py:callable (docs/audit-protocol.md)"
)
_BOOT = "import sys; sys.path[:] = {!r}; sys.argv[1:] = []; "
_CALL = "from npdrt.conform.adapters.serve import serve; serve({}, {})"


@dataclass(frozen=True)
class Target:
    """An optimizer that can be asked.

    spec: as the user named it. name: for reports, with the overrides. kind: the package ("torch",
    "optax", ...) or "file". rule: a name in `npdrt.optim.RULES`, or None if nobody has said which.
    offers: the settings it takes by npdrt's names, None for any. formats: those it runs.
    versions: package -> version. overrides: extra keyword arguments of every call. required:
    settings that it cannot be called without. fixed: settings that have one value only.
    source: what the child loads. uses: those of `npdrt.conform.case.USES` that it can be put to.
    """

    spec: str
    name: str
    kind: str
    rule: str | None
    offers: frozenset[str] | None
    formats: tuple[str, ...]
    versions: dict[str, str]
    overrides: dict[str, Any] = field(default_factory=dict)
    required: frozenset[str] = frozenset()
    fixed: dict[str, Any] = field(default_factory=dict)
    source: str = ""
    uses: tuple[str, ...] = ()


# --- finding ----------------------------------------------------------------------------------


def find(spec: str, overrides: Mapping[str, Any] | None = None, rule: str | None = None) -> Target:
    """The target of that name: an optimizer of a package ("torch.optim.SGD", "optax.contrib.muon",
    "my_package.optim.Mine"), or "path/to/file.py:callable" (docs/audit-protocol.md).

    overrides: keyword arguments that every call gets in addition to npdrt's settings. rule: the
    rule to compare it with, if npdrt does not know it. A child process imports it.

    Raises Error if the target is unknown, does not fit or does not import, and Unavailable if a
    library is not installed.
    """
    overrides = dict(overrides or {})
    if rule is not None and rule not in RULES:
        raise Error(f"unknown rule {rule!r}; use one of {', '.join(RULES)}")
    target = _file(spec, rule) if ":" in spec or Path(spec).is_file() else _packaged(spec, rule)
    _check(overrides, target)
    shown = ", ".join(f"{k}={v}" for k, v in overrides.items())
    name = f"{target.name}({shown})" if overrides else target.name
    target = replace(target, overrides=overrides, name=name)
    if target.offers is not None and not overrides:
        return target
    with closing(_Child(target)) as child:
        info = child.info
    return replace(
        target, offers=info.offers, required=info.required, formats=info.formats, uses=info.uses
    )


def _packaged(spec: str, rule: str | None) -> Target:
    """A target in a package; what it offers is known where the rule's file says so."""
    kind, dot, _ = spec.partition(".")
    if not dot or not all(part.isidentifier() for part in spec.split(".")):
        raise Error(f"{spec!r} is not a target; use {FORMS}")
    own, known = KNOWN.get(spec, (None, None))
    if own is not None and rule not in (own.name, None):
        raise Error(f"{spec} is {own.name}, not {rule}")
    if kind not in PACKAGES and importlib.util.find_spec(kind) is None:
        raise Error(f"{spec!r} is not a target: there is no package {kind}; use {FORMS}")
    target = Target(
        spec, spec, kind, own.name if own else rule, None, (), versions(kind), source=spec
    )
    if known is None or known.offers is None:
        return target
    return replace(
        target, offers=known.settings, fixed=dict(known.fixed), formats=tuple(FORMATS),
        uses=tuple(USES) if kind == "torch" else ("EXCLUSION",) if known.mask else (),
    )  # fmt: skip


def versions(kind: str) -> dict[str, str]:
    """The versions of a package, which is not imported, and of those that it needs."""
    return {package: _version(package) for package in PACKAGES.get(kind, (kind,))}


def _version(package: str) -> str:
    """The version of an installed package, which is not imported."""
    if importlib.util.find_spec(package) is None:
        raise Unavailable(f"{package} is not installed; install it with pip install {package}")
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"


def _file(spec: str, rule: str | None) -> Target:
    """A target in a file; what it offers is not known yet."""
    path, colon, name = spec.rpartition(":")
    if not colon:
        raise Error(f"{spec}: name the callable in it too, as in {spec}:update")
    if not name.isidentifier():
        raise Error(f"{spec!r} is not a target; use {FORMS}")
    require(Path(path), "file")
    python = {"python": sys.version.split()[0], "numpy": metadata.version("numpy")}
    source = f"{Path(path).resolve()}:{name}"
    shown = f"{Path(path).name}:{name}"
    return Target(spec, shown, "file", rule, None, (), python, source=source)


def _check(overrides: Mapping[str, Any], target: Target) -> None:
    """Refuse overrides of arguments that the cases set."""
    rules = [target.rule] if target.rule else list(RULES)
    taken = {"lr", "w", "g", "state", "name", "step"}
    taken.update(name for rule in rules for name in RULES[rule].settings)
    if target.kind != "file":
        taken |= {"params", *RATES}
    if target.spec in KNOWN:
        rule, known = KNOWN[target.spec]
        offers = known.offers or ()
        taken |= {*known.arguments({name: RULES[rule.name].defaults[name] for name in offers})}
    for key in overrides:
        if key in taken:
            hint = "" if target.rule else "; where the rule has no such setting, name the rule"
            raise Error(f"{key} is set by the cases and cannot be given{hint}")


# --- what is not asked ------------------------------------------------------------------------


def lacks(target: Target, case: Case) -> Failure | None:
    """Why a target cannot run a case, which is not its fault; None if it can."""
    why = _lacks(target, case)
    return Failure("not offered", why) if why else None


def _lacks(target: Target, case: Case) -> str:
    if target.rule not in (case.rule, None):
        return f"it is {target.rule}, not {case.rule}"
    if case.format not in target.formats:
        return f"it runs {', '.join(target.formats) or 'no format'}; not {case.format}"
    if missing := sorted(target.required - set(case.settings)):
        return f"it needs {', '.join(missing)}, which {case.rule} has not"
    known = KNOWN[target.spec][1] if target.spec in KNOWN else None
    if known and known.dimensions not in (case.w.ndim, None):
        return f"it takes tensors of {known.dimensions} dimensions only"
    if target.kind in ("optax", "keras") and (case.state or {}).get("step", 0) > COUNTER:
        return f"it counts steps up to {COUNTER}"
    for name, value in case.settings.items():
        setting = RULES[case.rule].settings[name]
        if setting.needs and not case.settings.get(setting.needs):
            continue
        if name in target.fixed and value != target.fixed[name]:
            return f"it has {name}={target.fixed[name]} only"
        offered = target.offers is None or name in target.offers
        if not offered and value != setting.default:
            return f"it has no {name}; {value} is asked for"
    return ""


# --- asking -----------------------------------------------------------------------------------


def answers(
    target: Target,
    cases: Sequence[Case],
    *,
    limit: float = 10.0,
    progress: Callable[[int, int], None] | None = None,
) -> list[Outcome]:
    """The outcome of every case, in order.

    limit: seconds for a case, which is run twice; a case of more than `UNIT` steps has as many
    times more. A child that hangs or dies is replaced; after three, the remaining cases get the
    last failure. progress(done, total) is called after every case. Never raises an error of a
    target.
    """
    outcomes: list[Outcome] = []
    with closing(_Children(target, limit)) as children:
        for case in cases:
            outcomes.append(lacks(target, case) or children.ask(case))
            if progress is not None:
                progress(len(outcomes), len(cases))
    return outcomes


class _Children:
    """One child after another: a child that hangs or dies is replaced."""

    def __init__(self, target: Target, limit: float):
        self._target, self._limit = target, limit
        self._child: _Child | None = None
        self._lost: list[Failure] = []

    def ask(self, case: Case) -> Outcome:
        """The outcome of a case; after too many lost children, the failure of the last."""
        if len(self._lost) >= LOSSES:
            last = self._lost[-1]
            return Failure("not run", f"not run after {LOSSES} lost processes: {last.message}")
        try:
            if self._child is None:
                self._child = _Child(self._target)
            return self._child.ask(case, self._limit)
        except Unanswered as lost:
            self._lost.append(lost.failure)
            self.close()
            return lost.failure
        except Error as error:  # what could be loaded before cannot be now
            self.close()
            self._lost = [Failure("raised", str(error))] * LOSSES
            return self._lost[-1]

    def close(self) -> None:
        """End the child, if there is one."""
        if self._child is not None:
            self._child.close()
        self._child = None


class _Child(Worker):
    """A worker that has loaded a target.

    It is started with `python -c`, so that the main module is not run again.
    """

    def __init__(self, target: Target):
        ours, theirs = Pipe()
        self._connection: Connection[Any, Any] = ours
        self._number = 0
        code = _BOOT.format(sys.path) + _CALL.format(theirs.fileno(), os.getpid())
        nowhere = subprocess.DEVNULL
        super().__init__("-c", code, stdin=nowhere, stdout=nowhere, pass_fds=[theirs.fileno()])
        theirs.close()
        try:
            self.info: Info = self._load(target)
        except BaseException:
            self.close()
            raise

    def _load(self, target: Target) -> Any:
        try:
            what, content = self._exchange((target.source, target.overrides), START)
        except Unanswered as lost:
            what, content = "error", lost.failure.message
        if what == "error":
            raise Error(f"{target.spec} does not load: {content}")
        return content

    def ask(self, case: Case, limit: float) -> Outcome:
        """The outcome of a case. Raises `Unanswered` if the child can answer nothing more."""
        self._number += 1
        plain = replace(case, settings=dict(case.settings))
        outcome: Outcome
        longer = max(1.0, len(case.steps) / UNIT)
        number, outcome = self._exchange((self._number, plain), limit * longer)
        if number != self._number:
            raise Unanswered("died", "its answers came out of order, as when it forks")
        return outcome

    def _exchange(self, request: Any, limit: float) -> tuple[Any, Any]:
        """The answer to a request; the limit is that of sending both."""
        content = pickle.dumps(request)
        try:
            with self.within(limit):
                self._connection.send_bytes(content)
                first, second = self._connection.recv()
        except Exception as error:  # the connection is closed, or holds no answer of `serve`
            if not self.late:
                how = self.ending() or "it closed its connection"
                raise Unanswered("died", how) from error
        if self.late:
            raise Unanswered("hung", f"no answer within {limit:g} s")
        return first, second

    def close(self) -> None:
        """End the process and those that it has started."""
        self._connection.close()
        super().close()


__all__ = ["Target", "answers", "find", "lacks"]
