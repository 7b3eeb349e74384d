"""Options from descriptions that stand elsewhere: fields of `Config`, settings of update rules.

Decorate a command with `config_options("model", "lr", "optimizer_options")`, names of fields of
`Config`; `configuration(settings_of(given))` is the configuration that its options describe.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, get_args, get_origin, get_type_hints

import click

from npdrt import optim
from npdrt.cli.common import F, Name, combined, data_dir_option, toml_values
from npdrt.errors import Error
from npdrt.models.initialisation import SCHEMES
from npdrt.models.mlp import NONLINEARITIES, NORMALISATIONS
from npdrt.train import Config

FLAGS = {  # field or setting -> its options, if they are not --field alone
    "optimizer": ("--optimizer", "--optimiser"),
    "lr": ("--lr", "--learning-rate"),
    "batch_size": ("--batch-size", "--batch"),
    "normalisation": ("--normalisation", "--normalization"),
    "standardise": ("--standardise", "--standardize"),
    "centered": ("--centered", "--centred"),
    "snapshots": ("--snapshot",),
    "groups": ("--group",),
}
METAVARS = {"schedule": "FORM", "snapshots": "STEP", "groups": "PATTERN:NAME=VALUE,..."}
RESUMABLE = [f.name for f in dataclasses.fields(Config) if f.metadata.get("resumable")]
TYPES = get_type_hints(Config)
SETTINGS = list(dict.fromkeys(name for rule in optim.RULES.values() for name in rule.settings))
MODEL = {  # option of the built-in models -> its type and words; --set gives the others
    "depth": (click.IntRange(min=1), "Weight matrices L.  [default: 2]"),
    "width": (click.IntRange(min=1), "Units of a hidden layer.  [default: 128]"),
    "bias": (bool, "Add a bias to every layer.  [default: no-bias]"),
    "nonlinearity": (Name(list(NONLINEARITIES)), "[default: relu]"),
    "output_nonlinearity": (bool, "Apply it after the last layer too.  [default: not]"),
    "residual": (bool, "Skip connections.  [default: no-residual]"),
    "normalisation": (Name(list(NORMALISATIONS)), "Of weights.  [default: none]"),
    "init": (Name(list(SCHEMES)), "Initialisation.  [default: he]"),
}
MORE = click.option(
    "--set",
    "fields",
    multiple=True,
    metavar="NAME=VALUE",
    help="A field of the model, as TOML; any, also one with an option of its own.  [default: none]",
)

MORE_OF_RULE = click.option(
    "--rule-set",
    "rule_fields",
    multiple=True,
    metavar="NAME=VALUE",
    help="A setting of your own rule, as TOML.  [default: none]",
)


class Rate(click.ParamType[float | str]):
    """A number, or auto."""

    name = "text"

    def convert(self, value: Any, param: Any, ctx: Any) -> float | str:
        """The number, or auto as it is."""
        try:
            return "auto" if value == "auto" else float(value)
        except ValueError:
            self.fail(f"{value!r} is neither a number nor auto.", param, ctx)


class Numbers(click.ParamType[tuple[float, ...]]):
    """So many numbers with commas between them."""

    def __init__(self, count: int):
        self.count = count
        self.name = ",".join(["number"] * count)

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[float, ...]:
        """The numbers."""
        with suppress(ValueError):
            found = value if isinstance(value, tuple) else tuple(map(float, value.split(",")))
            if len(found) == self.count:
                return found
        example = ",".join(["0.9", "0.99", "0.999"][: self.count])
        self.fail(f"{value!r} is not {self.count} numbers with commas, as {example}.", param, ctx)


def config_options(*names: str) -> Callable[[F], F]:
    """Decorate a command with the options of these fields of `Config`, None if not given.

    model_options stands for the options of the built-in models, optimizer_options for those of the
    update rules; data brings --data-dir. Without names: all fields.
    """
    fields = {field.name: field for field in dataclasses.fields(Config)}
    return combined(option for name in names or fields for option in _options(fields[name]))


def _options(field: dataclasses.Field[Any]) -> Sequence[Callable[[Any], Any]]:
    """The options of a field of `Config`: one, unless it holds settings of something."""
    if field.name == "model_options":
        return [*(_option(name, kind, words) for name, (kind, words) in MODEL.items()), MORE]
    if field.name == "optimizer_options":
        return [*map(_of_rules, SETTINGS), MORE_OF_RULE]
    if not field.metadata:  # not one for the command line
        return []
    own = _of_field(field, TYPES[field.name])
    return [own, data_dir_option] if field.name == "data" else [own]


def _option(
    name: str, kind: Any, words: str, default: str = "", **more: Any
) -> Callable[[Any], Any]:
    """One option; None if it is not given. kind: bool for a pair of flags, or a type of Click."""
    dashed = name.replace("_", "-")
    words = f"{words}  [default: {default}]".lstrip() if default else words
    flags = FLAGS.get(name, (f"--{dashed}",))
    if kind is bool:
        pairs = (f"{flag}/--no-{flag.removeprefix('--')}" for flag in flags)
        return click.option(*pairs, name, default=None, help=words)
    return click.option(*flags, name, type=kind, metavar=METAVARS.get(name), help=words, **more)


def _shown(value: Any, name: str) -> str:
    """A default in the help."""
    if isinstance(value, bool):
        return name if value else f"no-{name}"
    if value is None or value == ():
        return "none"
    if isinstance(value, tuple):
        return ",".join(_shown(item, name) for item in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _of_field(field: dataclasses.Field[Any], kind: Any) -> Callable[[Any], Any]:
    """The option of a field, by its type and the metadata that `npdrt.train.config` gives it."""
    meta = field.metadata
    default = meta.get("shown", _shown(field.default, field.name))
    if kind == tuple[int, ...]:
        return _option(field.name, click.IntRange(min=0), meta["words"], default, multiple=True)
    if kind == tuple[str, ...]:
        return _option(field.name, str, meta["words"], default, multiple=True)
    of_type = _type(kind, meta)
    listed = of_type.listed if isinstance(of_type, Name) else ""
    return _option(field.name, of_type, listed + meta["words"], default)


def _type(kind: Any, meta: Mapping[str, Any]) -> Any:
    """How Click reads a value of the type `kind`."""
    if "choices" in meta:
        other = meta.get("other", "")
        return Name(list(meta["choices"]), ":" if other else "", other)
    if "least" in meta:
        return click.IntRange(min=meta["least"])
    kinds = [t for t in get_args(kind) if t is not type(None)] or [kind]
    return bool if bool in kinds else Rate() if kinds == [float, str] else kinds[0]


def _of_rules(name: str) -> Callable[[Any], Any]:
    """The option of a setting: the rules that have it, what it is in each, and its default."""
    rules = {r.name: r.settings[name] for r in optim.RULES.values() if name in r.settings}
    words: dict[str, list[str]] = {}
    for rule, setting in rules.items():
        needs = f", with {option_of(setting.needs)}" if setting.needs else ""
        words.setdefault(setting.help + needs, []).append(rule)
    text = "; ".join(f"{', '.join(of)}: {what}" for what, of in words.items())
    dashed = name.replace("_", "-")
    defaults = {rule: _shown(setting.default, dashed) for rule, setting in rules.items()}
    shown = ", ".join(f"{rule} {value}" for rule, value in defaults.items())
    if len(set(defaults.values())) == 1:
        shown = next(iter(defaults.values()))
    kind = next(iter(rules.values())).type
    of_type = Numbers(len(get_args(kind))) if get_origin(kind) is tuple else _type(kind, {})
    return _option(name, of_type, f"{text}.", shown)


# --- from options to settings ---------------------------------------------------------------------


def settings_of(given: Mapping[str, Any]) -> dict[str, Any]:
    """The options that were given, as fields of `Config`."""
    given = {name: value for name, value in given.items() if value not in (None, ())}
    model = _settings(given, MODEL, "fields", "--set")
    optimizer = _settings(given, SETTINGS, "rule_fields", "--rule-set")
    grouped = {"model_options": model, "optimizer_options": optimizer}
    return {**given, **{name: options for name, options in grouped.items() if options}}


def configuration(settings: Mapping[str, Any]) -> Config:
    """The configuration of a new run with these settings, as far as they can be checked without
    the data; `Error` names the option of a wrong one."""
    with naming_options():
        config = Config(**settings)
        optim.schedule(config.schedule, lr=1.0, steps_per_epoch=1, steps=1)
        if config.optimizer in optim.RULES:  # a user's file is run later
            _check_rule(optim.RULES[config.optimizer], config)
    return config


def _check_rule(rule: optim.Rule[...], config: Config) -> None:
    """Raise `Error` for settings that the rule does not take."""
    given = config.optimizer_options
    for name in given.keys() - rule.settings.keys():
        takes = ", ".join(map(option_of, rule.settings)) or "no settings"
        raise Error(f"{rule.name} takes no {option_of(name)}; it takes {takes}")
    rule(lr=rule.default_rate if isinstance(config.lr, str) else config.lr, **given)


@contextmanager
def naming_options() -> Iterator[None]:
    """Let an `Error` that begins with the name of a setting begin with its option."""
    try:
        yield
    except Error as error:
        name, space, rest = str(error).partition(" ")
        if name not in (*TYPES, *SETTINGS) or not space:
            raise
        raise type(error)(f"{option_of(name)} {rest}") from error


def as_given(name: str, value: Any) -> str:
    """An option and its value, as on the command line."""
    if isinstance(value, bool):
        return option_of(name) if value else option_of(f"no_{name}")
    if name in ("groups", "snapshots"):
        return " ".join(f"{option_of(name)} {item}" for item in value)
    values = value if isinstance(value, list | tuple) else [value]
    return f"{option_of(name)} {','.join(map(str, values))}"


def _settings(
    given: dict[str, Any], names: Iterable[str], more: str, option: str
) -> dict[str, Any]:
    """The options `names`, taken out of `given`, and the NAME=VALUE pairs of one under `more`."""
    fields = toml_values(given.pop(more, ()), option=option)
    own = {name: given.pop(name) for name in names if name in given}
    for name in own.keys() & fields.keys():
        flag = option_of(name)
        raise click.UsageError(f"{option} {name} and {flag} name the same field; give one of them.")
    return own | fields


def option_of(name: str) -> str:
    """The option that gives a field, a setting of a rule or an option of a model."""
    return FLAGS.get(name, (f"--{name.replace('_', '-')}",))[0]
