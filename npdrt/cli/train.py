"""`npdrt train`."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import click

from npdrt import arrays, optim
from npdrt.cli.common import (
    Name,
    code_option,
    echo,
    json_option,
    notice,
    on_terminal,
    print_json,
    signals,
    telling,
    unbroken,
    warn,
)
from npdrt.data import AUGMENTS
from npdrt.errors import Error
from npdrt.models import MODELS
from npdrt.models.initialisation import SCHEMES
from npdrt.models.mlp import NONLINEARITIES, NORMALISATIONS
from npdrt.optim.schedules import FORMS
from npdrt.store.lock import numbered
from npdrt.train import Config, Reporter, Summary, resume, train

DEFAULTS = Config()
USER_MODEL = "path/to/file.py:Class"
MODEL_OPTIONS = (
    "depth",
    "width",
    "bias",
    "nonlinearity",
    "output_nonlinearity",
    "residual",
    "normalisation",
    "init",
)
OPTIMIZER_OPTIONS = (
    "momentum",
    "dampening",
    "nesterov",
    "weight_decay",
    "decoupled",
    "betas",
    "eps",
    "trust_coefficient",
    "norm_bound",
)
RESUMABLE = ("epochs", "device", "eager", "fast")  # what may differ from the run that is resumed


class Bar(Reporter):
    """A progress bar on stderr with time left, loss and accuracy."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._step = 0
        self._shown = ""

    def progress(self, step: int, steps: int, record: dict[str, Any] | None) -> None:
        """Move the bar; the newest record gives the numbers beside it."""
        with telling():
            self._move(step, steps, record)

    def _move(self, step: int, steps: int, record: dict[str, Any] | None) -> None:
        if self._bar is None:
            self._bar = click.progressbar(
                length=steps,
                label="training",
                item_show_func=lambda _: self._shown,
                file=sys.stderr,
                color=False,  # no escape codes: the cursor is not hidden, so it cannot stay so
            )
            self._bar.update(step - 1)
            self._step = step - 1
        if record:
            self._shown = _numbers(record)
        self._bar.update(step - self._step)
        self._step = step

    def warning(self, text: str) -> None:
        """A warning on stderr."""
        warn(text)

    def close(self) -> None:
        """Leave the bar's line."""
        if self._bar is not None:
            notice("")


class Quiet(Reporter):
    """No progress; warnings on stderr."""

    def warning(self, text: str) -> None:
        """A warning on stderr."""
        warn(text)

    def close(self) -> None:
        """Nothing to leave."""


def _numbers(record: dict[str, Any]) -> str:
    loss = record.get("train_loss", record.get("loss"))
    shown = f"loss {loss:.4f}"
    if "train_perplexity" in record:
        shown += f"  perplexity {record['train_perplexity']:.2f}"
    elif "train_accuracy" in record:
        shown += f"  accuracy {record['train_accuracy']:.4f}"
    return shown


_POSITIVE, _NATURAL = click.IntRange(min=1), click.IntRange(min=0)
OPTIONS = (  # in the order of the help; None means not given
    click.option(
        "--model",
        type=Name(list(MODELS), ":", USER_MODEL),
        help=f"Or {USER_MODEL}.  [default: {DEFAULTS.model}]",
    ),
    click.option("--depth", type=_POSITIVE, help="Weight matrices L.  [default: 2]"),
    click.option("--width", type=_POSITIVE, help="Units of a hidden layer.  [default: 128]"),
    click.option("--bias/--no-bias", default=None, help="Add a bias to every layer."),
    click.option("--nonlinearity", type=Name(list(NONLINEARITIES)), help="[default: relu]"),
    click.option(
        "--output-nonlinearity/--no-output-nonlinearity",
        default=None,
        help="Apply it after the last layer too.",
    ),
    click.option("--residual/--no-residual", default=None, help="Skip connections."),
    click.option(
        "--normalisation", type=Name(list(NORMALISATIONS)), help="Of weights.  [default: none]"
    ),
    click.option("--init", type=Name(list(SCHEMES)), help="Initialisation.  [default: he]"),
    click.option(
        "--set",
        "fields",
        multiple=True,
        metavar="NAME=VALUE",
        help="A field of the model without an option of its own, as TOML.",
    ),
    click.option(
        "--data",
        help="digits, wikitext-2, ..., FILE.npz, folder:PATH, text:PATH.  [default: digits]",
    ),
    click.option("--data-dir", type=click.Path(path_type=Path), help="Where data sets are."),
    click.option(
        "--standardise/--no-standardise",
        default=None,
        help="Mean 0 and deviation 1 over the training inputs.  [default: standardise]",
    ),
    click.option(
        "--augment", type=Name(list(AUGMENTS)), help="Random crops of images.  [default: none]"
    ),
    click.option(
        "--optimizer",
        "--optimiser",
        type=Name(list(optim.RULES)),
        help=f"[default: {DEFAULTS.optimizer}]",
    ),
    click.option("--lr", help="Learning rate, or auto.  [default: auto]"),
    click.option("--schedule", metavar="FORM", help=f"{FORMS}  [default: {DEFAULTS.schedule}]"),
    click.option("--momentum", type=float, help="sgd, lars."),
    click.option("--dampening", type=float, help="sgd."),
    click.option("--nesterov/--no-nesterov", default=None, help="sgd."),
    click.option("--weight-decay", type=float, help="sgd, adam, lars."),
    click.option("--decoupled/--no-decoupled", default=None, help="adam: decay as in AdamW."),
    click.option("--betas", type=(float, float), default=None, help="adam."),
    click.option("--eps", type=float, help="adam, lars."),
    click.option("--trust-coefficient", type=float, help="lars."),
    click.option("--norm-bound", type=float, help="fromage: norm over its initial norm."),
    click.option("--epochs", type=_NATURAL, help=f"[default: {DEFAULTS.epochs}]"),
    click.option("--batch-size", type=_POSITIVE, help=f"[default: {DEFAULTS.batch_size}]"),
    click.option("--label-smoothing", type=float, help="[default: 0]"),
    click.option("--clip", type=float, help="Largest norm of all gradients together."),
    click.option("--seed", type=_NATURAL, help="[default: 0]"),
    click.option("--dtype", type=Name(["float32", "float64"]), help="[default: float32]"),
    click.option("--device", help="auto, cpu, cuda or cuda:N.  [default: auto]"),
    click.option("--threads", type=_POSITIVE, help="BLAS threads.  [default: 1 for small nets]"),
    click.option(
        "--eager/--no-eager", default=None, help="Make every array call from Python, no program."
    ),
    click.option("--fast/--no-fast", default=None, help="Compiled loops (extra fast); same bits."),
    click.option(
        "--trace-every",
        type=_NATURAL,
        help="Steps between layer measurements; 0 never.  [default: an epoch]",
    ),
    click.option(
        "--conditioning/--no-conditioning",
        default=None,
        help="Trace condition numbers and Jacobians, once an epoch.",
    ),
    click.option(
        "--log-every",
        type=_NATURAL,
        help="Steps between logged losses.  [default: 0, never]",
    ),
    click.option(
        "--checkpoint-every",
        type=_NATURAL,
        help="Steps; 0 only at the end.  [default: an epoch]",
    ),
    click.option(
        "--snapshot",
        "snapshots",
        type=_NATURAL,
        multiple=True,
        metavar="STEP",
        help="Keep the parameters after this step, for npdrt perturb; may be repeated.",
    ),
    click.option(
        "--out",
        type=click.Path(path_type=Path),
        help="Run directory, to be made.  [default: runs/MODEL-N]",
    ),
    click.option("--resume", "resuming", is_flag=True, help="Go on with the run in --out."),
    code_option,
    click.option("-q", "--quiet", is_flag=True, help="No progress and no notices."),
    json_option,
)


def _options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of `train` on a function."""
    for option in reversed(OPTIONS):
        command = option(command)
    return command


@click.command("train")
@_options
def command(**given: Any) -> None:
    """Train a network, or go on with a run.

    With nothing else, `npdrt train --model mlp --depth 50` trains a 50-layer perceptron with
    Fromage on the bundled digits. A run is a directory: checkpoint.h5, trace.h5, log.jsonl. The
    first Ctrl-C saves and stops, the second stops at once; --resume goes on to the same bits.
    """
    out, resuming = given.pop("out"), given.pop("resuming")
    quiet, as_json, data_dir = given.pop("quiet"), given.pop("as_json"), given.pop("data_dir")
    code = given.pop("code")
    settings = settings_of(given)
    code += tuple(map(Path, _model_file(settings)))
    if resuming and out is None:
        raise click.UsageError("--resume needs --out, the directory of the run.")
    reporter = Bar() if on_terminal() and not quiet else Quiet()
    with signals() as stop:
        common = {"data_dir": data_dir, "reporter": reporter, "stop": stop}
        try:
            if resuming:
                summary = _resume(out, settings, code, quiet, common)
            else:
                summary = _start(out, settings, quiet, common)
        finally:
            reporter.close()
    with unbroken(summary.stopped):
        if as_json:
            print_json(dataclasses.asdict(summary))
        else:
            head, *lines = _text(summary, code)
            echo(head, bold=not summary.stopped)
            echo("\n".join(lines))


def _start(
    out: Path | None, settings: dict[str, Any], quiet: bool, common: dict[str, Any]
) -> Summary:
    config = _configuration(settings, quiet)
    with nullcontext(out) if out else numbered(Path("runs"), _stem(config)) as directory:
        return train(config, directory, **common)


def _configuration(settings: dict[str, Any], quiet: bool) -> Config:
    return Config(**{**settings, "device": _device(settings.get("device", "auto"), quiet)})


def _model_file(settings: dict[str, Any]) -> list[str]:
    """The file of the model that --model names, if it names one."""
    file = settings.get("model", "").rpartition(":")[0]
    return [file] if file else []


def _resume(
    out: Path,
    settings: dict[str, Any],
    code: tuple[Path, ...],
    quiet: bool,
    common: dict[str, Any],
) -> Summary:
    def begin() -> Config:
        if not quiet:
            notice(f"{out} holds no run yet; starting it")
        return _configuration(settings, quiet)

    device = settings.get("device")
    return resume(
        out,
        epochs=settings.get("epochs"),
        eager=settings.get("eager"),
        fast=settings.get("fast"),
        device=_device(device, quiet) if device else None,
        code=code,
        begin=begin,
        accept=partial(_check_settings, out, settings),
        **common,
    )


def _check_settings(out: Path, settings: dict[str, Any], stored: Mapping[str, Any]) -> None:
    """Refuse to go on with a run under settings that are not its own."""
    own = _flat(stored)
    for name, value in _flat(settings).items():
        if name not in RESUMABLE and not _same(value, own.get(name)):
            option = "--" + name.rpartition(".")[2].replace("_", "-")
            raise Error(
                f"{out} was started with {option} {own.get(name)!r}, not {value!r}; "
                "leave the option out, or start a new run"
            )


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """One entry an option: those of the model as "model_options.depth", and so on."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        inner = value if isinstance(value, dict) else {"": value}
        flat |= {f"{name}.{key}".rstrip("."): item for key, item in inner.items()}
    return flat


def _same(given: Any, stored: Any) -> bool:
    """Whether a given setting is the stored one."""
    if isinstance(given, tuple):
        return bool(list(given) == stored)
    return given in ("auto", stored)


def settings_of(given: dict[str, Any]) -> dict[str, Any]:
    """The options that were given, as fields of `Config`."""
    given = {name: value for name, value in given.items() if value not in (None, ())}
    fields = _model_fields(given.pop("fields", ()))
    model = {n: given.pop(n) for n in MODEL_OPTIONS if n in given}
    for name in model.keys() & fields.keys():
        raise click.UsageError(f"--set {name} and --{name} name the same field; give one of them.")
    model |= fields
    optimizer = {n: given.pop(n) for n in OPTIMIZER_OPTIONS if n in given}
    if "lr" in given:
        given["lr"] = _rate(given["lr"])
    for name, options in (("model_options", model), ("optimizer_options", optimizer)):
        if options:
            given[name] = options
    return given


def _rate(text: str) -> float | str:
    try:
        return text if text == "auto" else float(text)
    except ValueError:
        raise click.BadParameter(
            f"{text!r} is neither a number nor auto.", param_hint="--lr"
        ) from None


def _model_fields(pairs: tuple[str, ...]) -> dict[str, Any]:
    """--set NAME=VALUE as a dict; a value is TOML, or text where it is not."""
    import tomllib

    fields = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not (name and equals):
            raise click.BadParameter(f"{pair!r} is not NAME=VALUE.", param_hint="--set")
        try:
            fields[name] = tomllib.loads(f"value = {value}")["value"]
        except (tomllib.TOMLDecodeError, RecursionError):
            fields[name] = value
    return fields


def _device(spec: str, quiet: bool) -> str:
    """The device to use; what `auto` took is said on stderr."""
    found = arrays.device(spec)
    if spec == "auto" and not quiet:
        notice(f"device: {found} ({found.why})")
    return str(found)


def _stem(config: Config) -> str:
    """What the run's directory is called, before its number: runs/<model>-<depth>-<n>."""
    stem = Path(config.model.rpartition(":")[0] or config.model).stem
    depth = config.model_options.get("depth")
    return f"{stem}-{depth}" if depth else stem


def _text(s: Summary, code: tuple[Path, ...]) -> list[str]:
    """The summary for a person, in lines."""
    if s.stopped:
        lines = [f"stopped by signal {s.stopped} at step {s.step} of {s.steps}; saved in {s.run}"]
        again = "".join(f" --code {shlex.quote(str(file))}" for file in code)
        return [*lines, f"next: npdrt train --out {s.run} --resume{again}"]
    head = f"done: {s.step} steps in {s.seconds:.1f} s"
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
    return [*lines, f"run    {s.run}", f"next: npdrt show {s.run}"]
