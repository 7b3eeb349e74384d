"""`npdrt train`."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import click

from npdrt import arrays
from npdrt.cli.common import (
    code_option,
    echo,
    json_option,
    notice,
    print_json,
    unbroken,
    warn,
    working,
)
from npdrt.cli.options import (
    RESUMABLE,
    as_given,
    config_options,
    configuration,
    naming_options,
    option_of,
    settings_of,
)
from npdrt.errors import Error
from npdrt.store.checkpoint import checkpoints
from npdrt.store.lock import numbered
from npdrt.train import Config, Summary, resume, train
from npdrt.train.own import file_of
from npdrt.train.ranks import ranks
from npdrt.train.rules import own_rules
from npdrt.train.settings_file import merged, settings_in
from npdrt.train.shown import Shown


@click.command("train")
@click.argument("config", required=False, type=click.Path(path_type=Path), metavar="[CONFIG]")
@config_options()
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Run directory, to be made.  [default: runs/MODEL-N]",
)
@click.option(
    "--resume",
    "resuming",
    is_flag=True,
    help="Go on with the run in --out.",
)
@click.option(
    "--resume-or-start",
    "either",
    is_flag=True,
    help="Go on with the run in --out, or start it: for scripts that give one command every time.",
)
@code_option
@click.option("-q", "--quiet", is_flag=True, help="No progress and no notices.")
@json_option
def command(**given: Any) -> None:
    """Train a network, or go on with a run.

    Every option has a default. For example, `npdrt train --model mlp --depth 50` trains a 50-layer
    perceptron with Fromage on the bundled digits. A run is a directory: checkpoint.h5, trace.h5,
    log.jsonl. The first Ctrl-C saves and stops, the second stops at once; --resume continues to the
    same bits.

    CONFIG is a TOML file of settings, as `npdrt show RUN --as-toml` writes it; options go before
    it.
    """
    out, resuming, either = (given.pop(name) for name in ("out", "resuming", "either"))
    quiet, as_json, data_dir = given.pop("quiet"), given.pop("as_json"), given.pop("data_dir")
    code, file = given.pop("code"), given.pop("config")
    own = settings_of(given)
    code += tuple(map(Path, _own_files(own)))
    settings = merged(settings_in(file, code), own) if file else own
    if (resuming or either) and out is None:
        option = "--resume" if resuming else "--resume-or-start"
        raise click.UsageError(f"{option} needs --out, the directory of the run.")
    team = ranks()
    silent = bool(team.rank)  # rank 0 reports
    quiet = quiet or silent
    with team.together(), naming_options(), working(quiet=quiet, silent=silent) as (bars, stop):
        progress = Shown(bars, _warn)
        common = {"data_dir": data_dir, "reporter": progress, "stop": stop}
        if resuming or either:
            summary = _resume(out, settings, code, quiet, common, either)
        else:
            summary = _start(out, settings, quiet, common)
    with unbroken(summary.stopped):
        if team.rank:
            return
        if as_json:
            print_json(dataclasses.asdict(summary))
        else:
            made = progress.moved or not (resuming or either)
            head, *lines = _text(summary, code, "done" if made else "already finished")
            echo(head, bold=not summary.stopped)
            echo("\n".join(lines))


def _warn(text: str) -> None:
    """A warning on stderr, of rank 0 only."""
    if not ranks().rank:
        warn(text)


def _start(
    out: Path | None, settings: dict[str, Any], quiet: bool, common: dict[str, Any]
) -> Summary:
    config = _configuration(settings, quiet)
    team = ranks()
    named = nullcontext(out) if out or team.rank else numbered(Path("runs"), _stem(config))
    with named as directory:
        return train(config, team.told(directory), **common)


def _configuration(settings: dict[str, Any], quiet: bool) -> Config:
    config = configuration(settings)  # before a word on the device
    return dataclasses.replace(config, device=_device(settings.get("device"), quiet))


def _own_files(settings: dict[str, Any]) -> list[str]:
    """The files of the model and the rules that options name."""
    rules = own_rules(settings.get("optimizer", ""), settings.get("groups", ()))
    return [file for name in (settings.get("model", ""), *rules) if (file := file_of(name))]


def _resume(
    out: Path,
    settings: dict[str, Any],
    code: tuple[Path, ...],
    quiet: bool,
    common: dict[str, Any],
    either: bool,
) -> Summary:
    if not either and not out.is_file() and not any(map(Path.exists, checkpoints(out))):
        raise Error(
            f"{out} holds no run to go on with; leave out --resume to start one, or give "
            "--resume-or-start"
        )
    begin = partial(_configuration, settings, quiet) if either else None
    other = {name: settings[name] for name in RESUMABLE if name in settings}
    if "device" in other:
        other["device"] = _device(other["device"], quiet)
    accept = partial(_check_settings, out, settings)
    return resume(out, **other, code=code, begin=begin, accept=accept, **common)


def _check_settings(out: Path, settings: dict[str, Any], stored: Mapping[str, Any]) -> None:
    """Refuse to go on with a run under settings that are not its own."""
    own = _flat(stored)
    for name, value in _flat(settings).items():
        if name not in RESUMABLE and not _same(value, own.get(name)):
            option, started = name.rpartition(".")[2], own.get(name)
            without = started in (None, [], ())
            how = f"without {option_of(option)}" if without else f"with {as_given(option, started)}"
            other = "" if without else f", not {as_given(option, value)}"
            raise Error(f"{out} was started {how}{other}; leave the option out, or start a new run")


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """One entry an option: those of the model as "model_options.depth", and so on."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        inner = value if isinstance(value, dict) else {"": value}
        flat |= {f"{name}.{key}".rstrip("."): item for key, item in inner.items()}
    return flat


def _same(given: Any, stored: Any) -> bool:
    """Whether a setting that was given is the stored one."""
    if isinstance(given, tuple):
        return bool(list(given) == stored)
    return given in ("auto", stored)


def _device(spec: str | None, quiet: bool) -> str:
    """The device to use: without `spec` a GPU that works, else the CPU. What `auto` took is said on
    stderr, if it was asked for or is a GPU."""
    found = arrays.device(spec or "auto")
    if not quiet and (spec == "auto" or (spec is None and found.kind == "cuda")):
        notice(f"device: {found} ({found.why})")
    return str(found)


def _stem(config: Config) -> str:
    """What the run's directory is called, before its number: runs/<model>-<depth>-<n>."""
    stem = Path(config.model.rpartition(":")[0] or config.model).stem
    depth = config.model_options.get("depth")
    return f"{stem}-{depth}" if depth else stem


def _text(s: Summary, code: tuple[Path, ...], done: str) -> list[str]:
    """The summary for a person, in lines; `done` is the first word of a finished run's."""
    if s.stopped:
        lines = [f"stopped by signal {s.stopped} at step {s.step} of {s.steps}; saved in {s.run}"]
        again = "".join(f" --code {shlex.quote(str(file))}" for file in code)
        return [*lines, f"next: npdrt train --out {shlex.quote(s.run)} --resume{again}"]
    head = f"{done}: {s.step} steps in {s.seconds:.1f} s"
    lines = [f"{head}, {s.parameters:,} parameters, {s.optimizer} lr {s.lr:g}"]
    if s.train_accuracy is None:
        lines.append("y holds floats: regression on the mean squared error")
    for part in ("train", "test"):
        loss, accuracy = getattr(s, f"{part}_loss"), getattr(s, f"{part}_accuracy")
        if loss is not None:
            right = "" if accuracy is None else f"  accuracy {accuracy:.4f}"
            perplexity = getattr(s, f"{part}_perplexity")
            right += "" if perplexity is None else f"  perplexity {perplexity:.2f}"
            lines.append(f"{part:5}{right}  loss {loss:.4g}")
    return [*lines, f"run    {s.run}", f"next: npdrt show {shlex.quote(s.run)}"]
