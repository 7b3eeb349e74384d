"""`npdrt explain`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from npdrt import store
from npdrt.cli.common import Name, answer, code_option, echo, print_json
from npdrt.cli.options import config_options, configuration, option_of, settings_of
from npdrt.errors import Error
from npdrt.program import Program, compare, listing, load
from npdrt.regular import require
from npdrt.store import container
from npdrt.train.config import stored
from npdrt.train.record import record_step

# The fields of `Config` that decide which calls a step makes.
DECISIVE = (
    *("model", "model_options", "data", "optimizer", "optimizer_options", "groups", "lr"),
    *("batch_size", "label_smoothing", "clip", "dtype", "arithmetic"),
)


@click.command("explain")
@click.argument("run", nargs=-1, metavar="[RUN|FILE]...", type=click.Path(path_type=Path))
@click.option(
    "--format",
    "form",
    type=Name(["text", "json"]),
    default="text",
    help="For a person or a program.  [default: text]",
)
@click.option("--json", "as_json", is_flag=True, help="The same as --format json.")
@click.option(
    "--save",
    "target",
    metavar="FILE.json",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write the program to a file, and list nothing.  [default: none]",
)
@config_options(*DECISIVE)
@code_option
def command(
    run: tuple[Path, ...], form: str, as_json: bool, target: Path | None, **given: Any
) -> None:
    """The array calls of one training step: forward, backward, update.

    Describe the network and the update rule with the options of `npdrt train`, or give RUN, a run
    directory, or FILE, a program that --save wrote. Each call is listed with the name, dtype and
    shape of its result, its floating-point operations, the bytes it reads and writes, and the line
    of source that asked for it.

    `npdrt explain A B` compares two runs or files call by call, without names and sources, and
    shows the first difference. Exit code 0 if there is none, 1 if there is one.
    """
    given = {name: value for name, value in given.items() if value not in (None, ())}
    _check_usage(run, given, target)
    json_wanted = as_json or form == "json"
    if len(run) == 2:
        _compare(_program(run[0], given), _program(run[1], given), json_wanted)
        return
    program = _program(run[0], given) if run else _described(given)
    if target is not None:
        program.save(target)
        answer(json_wanted, {"saved": str(target)}, lambda: target)
    elif json_wanted:
        print_json(listing.as_json(program))
    else:
        echo(program.listing())


def _check_usage(paths: tuple[Path, ...], given: dict[str, Any], target: Path | None) -> None:
    if target is not None and not target.name:
        raise click.UsageError("--save needs the name of a file.")
    if len(paths) > 2:
        raise click.UsageError(
            f"give one run or file to list, or two to compare; got {len(paths)}."
        )
    if len(paths) == 2 and target is not None:
        raise click.UsageError("--save writes one program; two are compared.")
    odd = sorted(given.keys() - {"data_dir", "code"})
    if paths and odd:
        option = {"fields": "--set", "rule_fields": "--rule-set"}.get(odd[0], option_of(odd[0]))
        raise click.UsageError(
            f"{option} describes a step, but {paths[0]} has its own; leave out {option}."
        )
    if not paths and not odd:
        raise click.UsageError("give --model, a run directory, or a file that --save wrote.")


def _compare(a: Program, b: Program, json_wanted: bool) -> None:
    """Print the first difference; exit code 1 if there is one."""
    found = compare(a, b)
    difference = None if found is None else vars(found)
    text = found or f"the same {len(a.calls)} calls"
    answer(json_wanted, {"same": found is None, "difference": difference}, lambda: text)
    if found is not None:
        raise SystemExit(1)


# --- from a name to a program -----------------------------------------------------------------


def _program(path: Path, given: dict[str, Any]) -> Program:
    """The program of a run directory or file."""
    require(path)
    if not path.is_dir():
        return load(path)
    file = path / "checkpoint.h5"
    if not file.exists():
        raise Error(container.missing(path))
    config = stored(store.load(file).meta, file, code=given.get("code", ()))
    return record_step(config, given.get("data_dir"))


def _described(given: dict[str, Any]) -> Program:
    """The program that options describe."""
    data_dir = given.pop("data_dir", None)
    given.pop("code", None)
    return record_step(configuration(settings_of(given)), data_dir)
