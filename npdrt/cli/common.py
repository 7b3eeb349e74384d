"""Shared by the commands: options, JSON on stdout, notices on stderr, signals."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import signal
import sys
import textwrap
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from pathlib import Path
from types import FrameType
from typing import Any, TextIO, TypeVar

import click

from npdrt import plain
from npdrt.errors import Error
from npdrt.plain import printable as printable
from npdrt.progress import Bars, to_stderr
from npdrt.regular import missing
from npdrt.schema import toml_value
from npdrt.store.log import finite

F = TypeVar("F", bound=Callable[..., Any])


LINE = 58  # characters of choices that fit beside an option


class Name(click.ParamType[str]):
    """One of a few names; anything else gets a suggestion.

    choices: the names. mark: a value that contains this character is another form, which the
    library checks; other: that form, for the hint.
    """

    name = "name"

    def __init__(self, choices: list[str], mark: str = "", other: str = ""):
        self.choices, self.mark, self.other = choices, mark, other

    def convert(self, value: Any, param: Any, ctx: Any) -> str:
        """The value, if it is a choice or another form."""
        if value in self.choices or any(m in value for m in self.mark):
            return str(value)
        close = get_close_matches(value, self.choices, 1)
        known = [*self.choices, self.other] if self.other else self.choices
        hint = f"Did you mean {close[0]!r}?" if close else f"Use one of {', '.join(known)}."
        self.fail(f"{value!r} is unknown. {hint}", param, ctx)

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        """The choices, as the help shows them; "NAME" if they are `listed` in its words."""
        return "NAME" if self.listed else "[" + "|".join(self.choices) + "]"

    @property
    def listed(self) -> str:
        """The choices as a sentence, if they are too many for a line of the help; else ""."""
        names = ", ".join(self.choices)
        return f"One of {names}. " if len(names) > LINE else ""

    def shell_complete(self, ctx: Any, param: Any, incomplete: str) -> list[Any]:
        """The choices that begin so."""
        from click.shell_completion import CompletionItem

        return [CompletionItem(c) for c in self.choices if c.startswith(incomplete)]


json_option = click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
data_dir_option = click.option(
    "--data-dir",
    type=click.Path(path_type=Path),
    help="Where data sets are.  [default: $NPDRT_DATA, else the cache]",
)
fast_option = click.option(
    "--fast", is_flag=True, help="Compiled loops (extra fast); the same bits."
)
quiet_option = click.option("-q", "--quiet", is_flag=True, help="No progress.")
code_option = click.option(
    "--code",
    multiple=True,
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Allow this Python file to be run as the model or the rule; repeatable.  [default: none]",
)


def combined(options: Iterable[Callable[[Any], Any]]) -> Callable[[F], F]:
    """One decorator for several options, in the order of the help."""

    def decorated(command: F) -> F:
        for option in reversed([*options]):
            command = option(command)
        return command

    return decorated


def toml_values(
    pairs: Sequence[str], words: Mapping[str, Any] | None = None, option: str = "--set"
) -> dict[str, Any]:
    """`option` NAME=VALUE as a dict; a value is TOML, or one of `words`, or else text."""
    found: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not (name and equals):
            raise click.BadParameter(f"{pair!r} is not NAME=VALUE.", param_hint=option)
        found[name] = toml_value(value, words)
    return found


def check_outputs(force: bool, *paths: Path | None) -> None:
    """Refuse, before any work, files that a command cannot write or that exist; None is no file."""
    given = [path for path in paths if path is not None]
    if len({path.absolute() for path in given}) < len(given):
        raise Error(f"{given[0].absolute()}: two reports cannot go into one file")
    for path in given:
        if path.exists() and not path.is_file():
            raise Error(f"{path} is not a regular file; give another name")
        if path.exists() and not force:
            raise Error(f"{path} already exists; give --force to replace it, or another name")
        if not path.absolute().parent.is_dir():
            raise Error(missing(path.parent))


def npz_bytes(arrays: Mapping[str, Any]) -> bytes:
    """An .npz file. np.savez takes names as keywords, of which `file` is its own."""
    from numpy.lib.format import write_array  # here: messages of the command do without NumPy

    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, value in arrays.items():
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                write_array(member, value, allow_pickle=False)
    return buffer.getvalue()


def csv_bytes(rows: Iterable[Iterable[Any]]) -> bytes:
    """Rows as CSV, numbers as Python writes them. Text that a spreadsheet would take for a formula
    is quoted."""
    text = io.StringIO()
    csv.writer(text).writerows(map(_csv_cell, row) for row in rows)
    return text.getvalue().encode("utf-8", "backslashreplace")


def _csv_cell(value: Any) -> str:
    if isinstance(value, int | float):
        return repr(value)
    text = "" if value is None else str(value)
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


def answer(as_json: bool, value: Any, text: Callable[[], object]) -> None:
    """What a command found, on stdout: `value` as JSON, or else text for a person."""
    if as_json:
        print_json(value)
    else:
        echo(text())


def print_json(value: Any) -> None:
    """One JSON object on stdout; a number that is not finite is null."""
    echo(json.dumps(finite(value), allow_nan=False))


def echo(text: object, *, err: bool = False, **style: Any) -> None:
    """Print text, which may come from a file or be a path; every command prints through here."""
    click.secho(printable(text), err=err, **colour(**style))


def notice(text: str) -> None:
    """A line on stderr."""
    with telling():
        echo(text, err=True)


def warn(text: str) -> None:
    """A line on stderr that should be read; coloured on a terminal unless NO_COLOR is set."""
    with telling():
        echo(f"Warning: {text}", err=True, fg="yellow")


@contextmanager
def telling() -> Iterator[None]:
    """Write to stderr; if its reader has gone, this and all later messages are discarded."""
    try:
        yield
    except OSError:
        sys.stderr = _nowhere()


@contextmanager
def unbroken(number: int) -> Iterator[None]:
    """Print the last output of a command; `number` is the signal that stopped it, or 0.

    After a signal the exit code is 128 + number, even if the terminal or the reader has gone.
    """
    try:
        yield
    except OSError:
        if not number:
            raise
        sys.stdout = _nowhere()
    if number:
        raise SystemExit(128 + number)


def give_up_output() -> None:
    """Let what is still to be written to stdout go nowhere: Python would fail once more when it
    ends, and exit with 120."""
    with suppress(OSError, ValueError), _nowhere() as file:
        os.dup2(file.fileno(), sys.stdout.fileno())


def _nowhere() -> TextIO:
    """A file that takes all output, and does not fail again when Python ends."""
    return Path(os.devnull).open("w", encoding="utf-8")


def colour(**style: Any) -> dict[str, Any]:
    """`style` for click.secho, or plain text where NO_COLOR or TERM=dumb asks for it."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return {"reset": False} if plain else style


def on_terminal() -> bool:
    """Whether stderr is a terminal, where progress may be drawn."""
    return sys.stderr is not None and sys.stderr.isatty()


def cell(value: Any, digits: int = 4) -> str:
    """A value in a table: None is empty, a float has so many digits."""
    if isinstance(value, float):
        return f"{value:.{digits}g}"
    return "" if value is None else str(value)


ANY_WIDTH = 1 << 20  # of output that goes into a file or a pipe
SHORTEST = 8  # characters to which a cell may be shortened


def terminal_width() -> int:
    """The columns of the terminal that is stdout; no limit if it is a file or a pipe."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else ANY_WIDTH


def table(rows: Sequence[Sequence[object]]) -> str:
    """Rows as lines with aligned columns that fit the terminal: of two columns the second is
    wrapped, of more the widest are cut at the front."""
    cells = [[plain.line(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    room = terminal_width() - 2 * (len(widths) - 1)
    if sum(widths) > room and len(widths) == 2 and room - widths[0] >= SHORTEST:
        return plain.table([pair for row in cells for pair in _wrapped(row, room - widths[0])])
    while (over := sum(widths) - room) > 0 and (widest := max(widths)) > SHORTEST:
        widths[widths.index(widest)] = max(widest - over, SHORTEST)
    return plain.table([[*map(_shortened, row, widths)] for row in cells])


def _wrapped(row: Sequence[str], width: int) -> list[tuple[str, str]]:
    first, *rest = textwrap.wrap(row[1], width) or [""]
    return [(row[0], first), *(("", line) for line in rest)]


def _shortened(text: str, width: int) -> str:
    """The end of a text, which tells names and paths apart."""
    return text if len(text) <= width else f"..{text[2 - width :]}"


def listed(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows with named values as a table. If it is wider than the terminal, a line after it says the
    values in which all rows agree."""
    names = dict.fromkeys(name for row in rows for name in row)
    known = [name for name in names if any(row.get(name) is not None for row in rows)]
    same = [name for name in known if len({str(row.get(name)) for row in rows}) == 1]
    if _width(rows, known) <= terminal_width() or len(rows) == 1:
        same = []
    shown = [name for name in known if name not in same]
    agreed = ", ".join(f"{name.replace('_', ' ')} {cell(rows[0].get(name))}" for name in same)
    return "\n".join([table(_cells(rows, shown)), *(["all: " + agreed] if same else [])])


def _cells(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[list[str]]:
    heads = [name.replace("_", " ") for name in names]
    return [heads, *([cell(row.get(name)) for name in names] for row in rows)]


def _width(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> int:
    return max(map(len, plain.table(_cells(rows, names)).splitlines()))


@contextmanager
def signals(*, silent: bool = False) -> Iterator[Any]:
    """Catch SIGINT, SIGTERM and SIGHUP: yields a function that returns the first's number, or 0.

    The first signal lets the work end in good order; the second stops the process at once. A
    SIGHUP that is ignored, as under nohup, stays ignored. silent: says nothing of it.
    """
    caught: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if caught:
            os._exit(128 + number)
        caught.append(number)
        if silent:
            return
        with suppress(OSError):  # stderr may be gone: Ctrl-C ends every process of a pipe
            os.write(2, b"\nstopping after this step; once more stops at once\n")

    numbers = [signal.SIGINT, signal.SIGTERM]
    hangup = getattr(signal, "SIGHUP", None)  # Windows has none
    if hangup is not None and signal.getsignal(hangup) is not signal.SIG_IGN:
        numbers.append(hangup)
    before = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield lambda: caught[0] if caught else 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def bars(*, quiet: bool = False) -> Bars:
    """Progress on stderr, which goes on if the reader of stderr has gone."""
    return Bars(quiet=quiet, write=_tell)


def _tell(text: str) -> None:
    with telling():
        to_stderr(text)


@contextmanager
def working(*, quiet: bool, silent: bool = False) -> Iterator[tuple[Bars, Callable[[], int]]]:
    """Progress, unless `quiet`, and `signals`, for a long command."""
    with signals(silent=silent) as stop, bars(quiet=quiet) as shown:
        yield shown, stop
