"""The settings of a run: what was asked, and what it resolves to."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from npdrt import data, optim, schema
from npdrt.arrays import plain
from npdrt.compute import ARITHMETICS
from npdrt.cublas import PRECISIONS
from npdrt.cudnn import CONVOLUTIONS
from npdrt.data import AUGMENTS, Dataset
from npdrt.errors import Error, FileRefused
from npdrt.models import MODELS, Model
from npdrt.optim.schedules import FORMS
from npdrt.train import rules
from npdrt.train.own import (
    check_names,
    digest,
    file_of,
    found_in,
    given_class,
    given_for,
    require_code,
)
from npdrt.train.rules import USER_RULE, own_rules, rule_digests, rule_named

RUN_FORMAT = 1  # of what a run adds to its checkpoint's metadata
MOST = 1 << 53  # of a whole number among the settings
# Learning rate of `--lr auto`. For Fromage on a perceptron of depth L it is this share of
# Lemma 2's bound 2**(1/L) - 1; measured by benchmarks/lr_auto.py, see docs/learning-rate.md.
SHARE_OF_BOUND = 0.06
USER_MODEL = "path/to/file.py:Class"
NOTES = [f"{rule.name}: {rule.note}." for rule in optim.RULES.values() if rule.note]


def _setting(default: Any, words: str = "", **more: Any) -> Any:
    """A field of `Config`; `npdrt.cli.options` makes an option of it.

    words: for the help. least: the smallest value. choices: the values of a name; other: a form
    with a colon that is accepted too. shown: the default in the help, if it is not the value.
    resumable: whether a run may be resumed with another value.
    """
    return field(default=default, metadata={"words": words, **more})


@dataclass(frozen=True)
class Config:
    """Everything that decides the numbers of a run, and when it writes.

    model: a name in `npdrt.models.MODELS`, "path/to/file.py:Class" or, in Python, a class, of which
    the configuration keeps the name. model_options: fields of the model; inputs and outputs come
    from the data. A model with a field image_shape is given it too, and images (batch, channels,
    height, width); others are given rows (batch, inputs).
    data: a data set's name, FILE.npz or folder:PATH. standardise: true, false, or the name of
    another standardisation (`npdrt.data.load`). augment: none; flip, a random mirror image;
    crop-flip, also a random crop after a border of 4 pixels; imagenet, a random part resized and a
    random mirror image, of a folder of images; or imagenet-jitter, also random colours
    (`npdrt.data.augment`).
    optimizer: a name in `npdrt.optim.RULES` or "path/to/file.py:rule" (docs/your-own-rule.md).
    optimizer_options: its settings. groups: see `npdrt.train.rules`. lr: a rate or "auto".
    schedule: see `npdrt.optim.schedules.FORMS`. epochs: passes over the training data.
    batch_size: examples of a step; of text, streams (`npdrt.data.text`). shards: equal parts of a
    batch, which ranks share (`npdrt.train.shards`). sums: how their gradients are added, along a
    tree or as integers (`npdrt.train.integers`). clip: the largest norm of
    all gradients together, to which larger ones are scaled (`npdrt.optim.clip`); None for any.
    arithmetic: "fast", that of the array library, or "portable", with the same bits on any machine
    (`npdrt.arithmetic`, docs/portable.md).
    threads: of BLAS; None is 1 if the matrix products of a step are small
    (`npdrt.train.loop.SMALL_PRODUCT`), else as many as BLAS takes. precision: of float32 products
    on a GPU, "ieee" or the faster "tf32" (`npdrt.cublas.precision`). convolutions: on a GPU, by the
    kernels of "npdrt" or by "cudnn" (extra `cudnn`; `npdrt.cudnn.convolutions`). eager: run every
    array call from Python instead of recording the step once and replaying it; same bits. fast:
    replay with compiled loops (extra `fast`); same bits. decoders: processes that decode the files
    of images; None is as many as there are cores, over all ranks; same bits.
    trace_every, log_every, checkpoint_every: in steps; 0 means never, for checkpoint_every only at
    the end; None means once an epoch. snapshots: steps after which the parameters are kept in
    RUN/snapshots; 0 is before the first. conditioning: log condition numbers and Jacobians at the
    start and after every epoch; see `npdrt.train.conditioning`.
    """

    model: str = _setting("mlp", f"Or {USER_MODEL}.", choices=tuple(MODELS), other=USER_MODEL)
    model_options: Mapping[str, Any] = field(default_factory=dict)
    data: str = _setting("digits", "digits, imagenet, ..., FILE.npz, folder:PATH, text:PATH.")
    standardise: bool | str = _setting(
        True, "Mean 0 and deviation 1 over the training inputs.", shown="standardise"
    )
    augment: str = _setting(
        "none", "Random crops, mirror images and colours.", choices=tuple(AUGMENTS)
    )
    optimizer: str = _setting(
        "fromage", " ".join([*NOTES, f"Or {USER_RULE}."]), choices=tuple(optim.RULES),
        other=USER_RULE,
    )  # fmt: skip
    optimizer_options: Mapping[str, Any] = field(default_factory=dict)
    groups: tuple[str, ...] = _setting(
        (), "Another rule or rate for some parameters, as in '*/bias:rule=sgd,lr=0.1'; repeatable."
    )
    lr: float | str = _setting("auto", "Learning rate, or auto.")
    schedule: str = _setting("linear", FORMS)
    epochs: int = _setting(40, "Passes over the training data.", least=0, resumable=True)
    batch_size: int = _setting(32, "Examples of a step.", least=1)
    shards: int = _setting(1, "Equal parts of a batch, for ranks.", least=1)
    sums: str = _setting("tree", "Of shards: integers for NCCL.", choices=("tree", "integers"))
    label_smoothing: float = _setting(0.0, "Share of a label given to all classes.")
    clip: float | None = _setting(None, "Largest norm of all gradients together.")
    seed: int = _setting(0, "Of every random number.", least=0)
    dtype: str = _setting("float32", choices=("float32", "float64"))
    arithmetic: str = _setting(
        "fast", "portable: the same bits on any machine, several times slower.", choices=ARITHMETICS
    )
    precision: str = _setting("ieee", "Of float32 products on a GPU.", choices=PRECISIONS)
    convolutions: str = _setting("npdrt", "On a GPU; cudnn is an extra.", choices=CONVOLUTIONS)
    device: str = _setting("cpu", "auto, cpu, cuda or cuda:N.", shown="auto", resumable=True)
    threads: int | None = _setting(None, "BLAS threads.", least=1, shown="1 for small nets")
    eager: bool = _setting(False, "Make every array call from Python, no program.", resumable=True)
    fast: bool = _setting(False, "Compiled loops (extra fast); same bits.", resumable=True)
    trace_every: int | None = _setting(
        None, "Steps between layer measurements; 0 never.", least=0, shown="an epoch"
    )
    decoders: int | None = _setting(
        None, "Processes that decode images; 0 for none.", least=0, shown="all cores",
        resumable=True,
    )  # fmt: skip
    log_every: int = _setting(0, "Steps between logged losses.", least=0, shown="0, never")
    checkpoint_every: int | None = _setting(
        None, "Steps; 0 only at the end.", least=0, shown="an epoch"
    )
    snapshots: tuple[int, ...] = _setting(
        (), "Keep the parameters after this step, for npdrt perturb; may be repeated."
    )
    conditioning: bool = _setting(False, "Trace condition numbers and Jacobians, once an epoch.")

    def __post_init__(self) -> None:
        if isinstance(self.model, type):
            object.__setattr__(self, "model", given_class(self.model))
        for setting in dataclasses.fields(self):
            value = plain(getattr(self, setting.name))  # numbers of NumPy are not JSON
            object.__setattr__(self, setting.name, value)
            _check_range(setting, value)
        if any(type(step) is not int or not 0 <= step <= MOST for step in self.snapshots):
            raise Error(f"snapshots must be step numbers, 0 or more; got {self.snapshots}")
        for name, value in vars(self).items():
            if isinstance(value, str) and "\0" in value:
                raise Error(f"{name} has a zero byte: {value!r}")
            if isinstance(value, int) and abs(value) > MOST and name != "seed":  # has its own range
                raise Error(f"{name} must be at most 2^53; got {value:.3e}")
        for name in ("snapshots", "groups"):  # JSON and TOML give a list
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for group in self.groups:
            rules.parsed(group)
        if self.clip is not None and not 0 < self.clip < math.inf:
            raise Error(f"clip must be a finite norm above 0; got {self.clip}")
        if not 0 <= self.label_smoothing < 1:
            raise Error(f"label_smoothing must lie in [0, 1); got {self.label_smoothing}")
        if self.precision != "ieee" and self.dtype != "float32":
            raise Error(f"precision {self.precision} is of float32; the dtype is {self.dtype}")
        if self.arithmetic == "portable":
            self._check_portable()
        if self.shards > 1 and self.threads not in (None, 1):
            raise Error(
                f"shards are computed by one BLAS thread each; leave out threads={self.threads}"
            )
        if self.shards == 1 and self.sums != "tree":
            raise Error(f"sums {self.sums} are over shards; give --shards 2 or more")
        if self.shards > self.batch_size:
            raise Error(f"{self.shards} shards need as many examples; batch_size is "
                        f"{self.batch_size}")  # fmt: skip
        if self.eager and self.fast:
            raise Error("eager and fast exclude each other: compiled loops need a recorded step")

    def _check_portable(self) -> None:
        """Refuse settings that would compute in another way."""
        for name, needed in (
            ("dtype", "float32"),
            ("precision", "ieee"),
            ("convolutions", "npdrt"),
        ):
            if getattr(self, name) != needed:
                raise Error(f"arithmetic portable needs {name} {needed}; got {getattr(self, name)}")

    def as_dict(self) -> dict[str, Any]:
        """The settings as JSON values."""
        return {**asdict(self), "model": str(self.model)}

    @classmethod
    def from_dict(
        cls, settings: Mapping[str, Any], *, code: Sequence[Path] = (), model: type | None = None
    ) -> Config:
        """The settings that `as_dict` wrote, or a file has.

        code: the Python files that may be run. A model file that the settings name must be one of
        them: the user decides which code runs, not a data file. model: the class of the model, in
        place of its file.

        Raises `Error` for an unknown setting or a model file that is not in `code`, `FileRefused`
        for a value of another type.
        """
        check_names("setting", settings, [f.name for f in dataclasses.fields(cls)])
        schema.check(dict(settings), cls, "a setting is of the wrong type")
        config = cls(**settings)
        if model is not None:
            config = dataclasses.replace(config, model=given_for(config.model, model))
        require_code([config.model], "model", code)
        require_code(own_rules(config.optimizer, config.groups), "rule", code)
        return config


def stored(
    meta: Mapping[str, Any], path: Path, *, code: Sequence[Path] = (), model: type | None = None
) -> Config:
    """The configuration in the metadata of a run's checkpoint at `path`, all of which is checked.

    A user's model must be in one of the files `code`, or given as the class `model`, and must not
    have changed since the run was started. Raises `FileRefused` if the metadata are not those of a
    run, else `Error`.
    """
    if meta.get("run") != RUN_FORMAT:
        raise FileRefused(f"{path}: expected the checkpoint of a training run; use npdrt.load")
    schema.check(dict(meta), schema.RunMeta, path)
    try:
        config = Config.from_dict(meta["config"], code=code, model=model)
    except Error as error:
        raise type(error)(f"{path}: {error}") from error
    if model_digest(config) != meta["model_file"]:
        raise Error(
            f"{path}: {config.model} has changed since the run was started; give back its source, "
            "or start a new run, with another --out"
        )
    for name, found in rule_digests(config.optimizer, config.groups).items():
        if found != meta.get("rule_files", {}).get(name):
            raise Error(f"{path}: {name} has changed since the run was started; give back the "
                        "file, or start a new run, with another --out")  # fmt: skip
    return config


def _check_range(setting: dataclasses.Field[Any], value: Any) -> None:
    """Raise `Error` where a value is below the least of its field, or not one of its choices."""
    least, choices = setting.metadata.get("least"), setting.metadata.get("choices")
    given = value is not None or setting.default is not None
    if given and least is not None and value < least:
        raise Error(f"{setting.name} must be at least {least}; got {value}")
    other = setting.metadata.get("other")
    if choices and not (other and file_of(str(value))):
        check_names(setting.name, {value: None}, [*choices, *([other] if other else [])])


def resolve(config: Config, dataset: Dataset) -> Config:
    """`config` with every default of the model and the learning rate filled in.

    A default that is not JSON (a function, say) is left to the model's file.
    """
    given = {name: _as_json(name, value) for name, value in config.model_options.items()}
    model = build_model(dataclasses.replace(config, model_options=given), dataset)
    fields = {f.name: getattr(model, f.name) for f in dataclasses.fields(model) if f.init}
    options = {name: _plain(value) for name, value in fields.items() if _is_json(value)}
    if hasattr(model, "generate") and "image_shape" in fields:  # it makes images without the data
        options["image_shape"] = list(fields["image_shape"])
    depth = None if options.get("residual") else options.get("depth")
    return dataclasses.replace(config, model_options=options, lr=learning_rate(config, depth))


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, str) else value


def _as_json(name: str, value: Any) -> Any:
    """`value` as a checkpoint gives it back, so that a run and its resumption see the same."""
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise Error(f"option {name} of the model cannot be kept as JSON: {error}") from error


def _is_json(value: Any) -> bool:
    try:
        return bool(_as_json("", value) == value)
    except Error:
        return False


def learning_rate(config: Config, depth: Any) -> float:
    """The learning rate of `config`; "auto" is derived.

    For Fromage on a model with a depth L and no skip connections: SHARE_OF_BOUND times the
    largest relative step that Lemma 2 (Bernstein et al. 2020) allows, 2**(1/L) - 1, but not
    above the paper's default 0.01; rounded to three digits, so that it is the same number
    everywhere. For other rules the `default_rate` in the rule's file.
    """
    if not isinstance(config.lr, str):
        return float(config.lr)
    if config.lr != "auto":
        raise Error(f"lr must be a number or auto; got {config.lr!r}")
    rule = rule_named(config.optimizer)
    if rule.default_rate is None:
        raise Error(f"{rule.name} has no default rate; give --lr, or lr a default in its signature")
    if not rule.relative or not isinstance(depth, int) or depth < 1:
        return rule.default_rate
    return min(rule.default_rate, float(f"{SHARE_OF_BOUND * (2 ** (1 / depth) - 1):.3g}"))


def load_data(config: Config, data_dir: Path | None = None) -> Dataset:
    """The data set that `config` names. Its usual standardisation gives way to the one that the
    model's class names in `standardise`, if it names one."""
    scale = config.standardise
    if scale is True:
        scale = getattr(_model_class(config.model), "standardise", True)
    return data.load(config.data, data_dir=data_dir, standardise=scale)


def build_optimizer(config: Config) -> optim.Updater:
    """The optimizer that a resolved `config` names, with its settings and groups."""
    lr, settings = float(config.lr), config.optimizer_options
    return rules.build(config.optimizer, lr, settings, config.groups)


def build_model(config: Config, dataset: Dataset) -> Model:
    """The model that `config` names, its inputs and outputs taken from the data."""
    cls = _model_class(config.model)
    types = {f.name: f.type for f in dataclasses.fields(cls) if f.init}
    known = list(types)
    check_names(f"option of model {config.model}:", config.model_options, known)
    for name, value in config.model_options.items():
        _check_type(f"option {name} of model {config.model}", types[name], value)
    sizes = _sizes(dataset)
    if dataset.vocabulary is not None and "vocabulary" not in known:
        raise Error(f"the examples of {dataset.name} are tokens, but model {config.model} takes "
                    "numbers; use a model with a field vocabulary, like transformer")  # fmt: skip
    if dataset.vocabulary is None and "vocabulary" in known:
        raise Error(
            f"model {config.model} needs tokens; the examples of {dataset.name} are not tokens; "
            "use a data set of text, such as wikitext-2"
        )
    if "image_shape" in known and dataset.image_shape is None:
        raise Error(
            f"model {config.model} needs images; the examples of {dataset.name} are not images; "
            "use a data set of images, such as cifar-10"
        )
    options = {
        **{n: v for n, v in {**getattr(cls, "defaults", {}), **sizes}.items() if n in known},
        **{
            n: tuple(v) if isinstance(v, list) and n == "image_shape" else v
            for n, v in config.model_options.items()
        },
    }
    for name, size in sizes.items():
        if name in known and options[name] != size:
            raise Error(f"the model has {name}={options[name]}, the data set has {size}")
    try:
        model: Model = cls(**options)
        return model
    except (TypeError, ValueError) as error:
        raise Error(f"model {config.model}: {error}") from error


def stored_model(config: Config) -> Any:
    """The model of a resolved configuration, without its data."""
    options = dict(config.model_options)
    if isinstance(options.get("image_shape"), list):
        options["image_shape"] = tuple(options["image_shape"])
    return _model_class(config.model)(**options)


def _sizes(dataset: Dataset) -> dict[str, Any]:
    """The fields of a model that come from the data."""
    inputs = math.prod(dataset.x.shape[1:])
    sizes = {"inputs": inputs, "outputs": dataset.outputs, "image_shape": dataset.image_shape}
    return sizes if dataset.vocabulary is None else {"vocabulary": dataset.vocabulary}


def example_shape(model: Model, dataset: Dataset) -> tuple[int, ...]:
    """The shape in which the model is given an example: an image, or a row of features."""
    if dataset.vocabulary is not None:
        return tuple(dataset.x.shape[1:])
    if hasattr(model, "image_shape") and dataset.image_shape is not None:
        return dataset.image_shape
    return (math.prod(dataset.x.shape[1:]),)


def _check_type(what: str, annotation: Any, value: Any) -> None:
    """Raise `Error` where a field annotated int, float, bool or str is given something else."""
    name = getattr(annotation, "__name__", annotation)
    accepted: dict[Any, set[type]] = {
        "int": {int}, "float": {float, int}, "bool": {bool}, "str": {str}
    }  # fmt: skip
    if type(value) not in accepted.get(name, {type(value)}):
        raise Error(f"{what}: expected {name}; got {value!r}")


def _model_class(name: str) -> Any:
    """The class of a built-in model, or of "path/to/file.py:Class"."""
    if ":" not in name:
        check_names("model", {name: None}, [*MODELS, USER_MODEL])
        return MODELS[name]
    file, _, attribute = name.rpartition(":")
    cls = found_in(name, "model")
    if cls is None:
        raise Error(f"{file} has no class {attribute!r}")
    methods = {name for base in getattr(cls, "__mro__", ()) for name in vars(base)}
    if not dataclasses.is_dataclass(cls) or not {"init", "__call__"} <= methods:
        raise Error(
            f"{name}: a model is a dataclass with init(seed, device, dtype) -> params and "
            "__call__(params, x) -> logits"
        )
    return cls


def model_digest(config: Config) -> str | None:
    """SHA-256 of a user's model file, None for a built-in model."""
    return digest(config.model)
