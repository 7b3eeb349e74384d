"""Read records strictly: JSON and TOML values whose types are declared, and checked, in one place.

    found = schema.parse(raw, Result, path)        # bytes of JSON
    schema.check(meta, RunMeta, path)              # values that were read already

A value of another type, a missing field, a number that is not finite or a text that is not JSON
raises `FileRefused` with the file, the place in it and what was expected. Both functions return the
plain values, so that a field that is not declared is kept.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from npdrt.errors import FileRefused

LARGEST = 1.7976931348623157e308  # float64; a Number is not inf and not NaN
SHOWN = 300  # characters of a message of the library, which may quote the file

Number = Annotated[float, Meta(ge=-LARGEST, le=LARGEST)]
Count = Annotated[int, Meta(ge=0, le=1 << 53)]
Positive = Annotated[int, Meta(ge=1, le=1_000_000)]
Size = Annotated[float, Meta(gt=0, le=LARGEST)]
Depths = Annotated[list[Annotated[int, Meta(ge=1, le=10_000)]], Meta(min_length=1, max_length=100)]
Sizes = Annotated[list[Size], Meta(max_length=10_000)]
Numbers = list[Number | None]  # null: not finite, or not measured
Values = dict[str, Any]


def parse(raw: bytes, kind: Any, where: object) -> Any:
    """The JSON value in `raw`, checked against the type `kind`; `FileRefused` names `where`.

    UTF-8, with or without a byte order mark; a key twice in an object is refused.
    """
    try:
        text = raw.decode("utf-8-sig")
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise FileRefused(f"{where}: not JSON in UTF-8 ({_shown(error)})") from error
    return check(value, kind, where)


def check(value: Any, kind: Any, where: object) -> Any:
    """`value` itself, if it is of the type `kind`; else `FileRefused` names `where`."""
    try:
        msgspec.convert(value, kind, strict=True)
    except (msgspec.ValidationError, RecursionError, OverflowError, UnicodeError) as error:
        raise FileRefused(f"{where}: {_shown(error)}") from error
    return value


def toml_value(text: str, words: Mapping[str, Any] | None = None) -> Any:
    """The value that a text is in TOML, or one of `words`, or else the text."""
    import tomllib

    try:
        found = tomllib.loads(f"value = {text}")
        return found["value"] if len(found) == 1 else text
    except (tomllib.TOMLDecodeError, RecursionError):
        return (words or {}).get(text, text)


def _shown(error: Exception) -> str:
    text = re.sub(r"^Object missing required field `(.*?)`", r"the key \1 is missing", str(error))
    text = re.sub(r"^Object contains unknown field `(.*?)`", r"the key \1 is unknown", text)
    return text[:SHOWN]


def _unique(pairs: list[tuple[str, Any]]) -> Values:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key occurs twice in one object")
    return found


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is not a number of JSON")


# --- log.jsonl -------------------------------------------------------------------------------


class Event(Struct):
    """What every line of a log has."""

    event: str
    step: Count


class Start(Event):
    """The first line."""

    config: Values


class Loss(Event):
    """A minibatch."""

    loss: Number | None
    lr: Number
    accuracy: Number | None = None
    perplexity: Number | None = None


class Trace(Event):
    """Measurements of a step: one number a parameter, and numbers of the network, or of each of
    several."""

    weight_norm: Numbers
    gradient_norm: Numbers
    relative_update: Numbers
    cosine: Numbers
    deep_relative_trust: Number | Numbers | None = None
    log_deep_relative_trust: Number | Numbers | None = None
    squared_deep_relative_trust: Number | Numbers | None = None
    euclidean_trust: Number | Numbers | None = None
    descent_threshold: Number | Numbers | None = None


class Conditioning(Event):
    """Condition numbers by the name of the weight, Jacobians in the same order."""

    condition_number: dict[str, Number | None]
    jacobian_norm: Numbers


class Epoch(Event):
    """A finished epoch."""

    epoch: Count
    lr: Number
    train_loss: Number | None
    train_accuracy: Number | None = None
    train_perplexity: Number | None = None
    valid_loss: Number | None = None
    valid_accuracy: Number | None = None
    valid_perplexity: Number | None = None
    test_loss: Number | None = None
    test_accuracy: Number | None = None
    test_perplexity: Number | None = None
    seconds: Number = 0.0


class Digests(Event):
    """The SHA-256 of every array after an epoch of a portable run, by group and name."""

    epoch: Count
    arrays: dict[str, str]


EVENTS = {"start": Start, "step": Loss, "trace": Trace, "conditioning": Conditioning,
          "epoch": Epoch, "digests": Digests}  # fmt: skip


def log_record(raw: bytes, where: object) -> Values:
    """The record in a line of a log; an event that is not known has a name and a step."""
    found: Values = parse(raw, Event, where)
    if kind := EVENTS.get(found["event"]):
        check(found, kind, where)
    return found


# --- result.json of a run --------------------------------------------------------------------


class Result(Struct):
    """What a run of a sweep came to: where it diverged, or the fields of its summary."""

    diverged: str = ""
    step: Count = 0
    steps: Count = 0
    epochs: Count = 0
    parameters: Count = 0
    optimizer: str = ""
    lr: Number = 0.0
    seconds: Number = 0.0
    train_loss: Number | None = None
    train_accuracy: Number | None = None
    train_perplexity: Number | None = None
    test_loss: Number | None = None
    test_accuracy: Number | None = None
    test_perplexity: Number | None = None


# --- metadata of checkpoints, traces, slices and studies --------------------------------------


class CheckpointMeta(Struct):
    """What every checkpoint has; `user` is what its writer gave."""

    user: Values


class Progress(Struct):
    """Where a run stands."""

    step: Count
    steps: Count
    epoch: Number


class Resumable(Progress):
    """What a checkpoint has of it, so that the run can go on; snapshots do not."""

    loss_sum: Number
    right: Count
    schedule_memory: dict[str, Number | None]
    log: Tally | None = None  # of an older npdrt: none


class Tally(Struct):
    """The records of the log that a checkpoint covers."""

    records: Count
    sha256: str


class Blas(Struct):
    """A BLAS library of the process that made a run."""

    library: str
    version: str | None
    kernel: str | None
    threads: Count


class Provenance(Struct):
    """How a run was made, as far as npdrt reads it again."""

    npdrt: str
    python: str
    argv: list[str]
    packages: dict[str, str]
    cpu: str
    cores: Count | None
    blas: list[Blas]
    device: str
    data: dict[str, str]
    blas_before: list[list[Blas]] = []
    graph: str = ""
    arithmetic: Arithmetic | None = None


class Arithmetic(Struct):
    """The arithmetic of a portable run."""

    name: str
    version: Count


class Constants(Struct):
    """A standardisation, (x / divisor - mean) / std, of all values or of each channel."""

    divisor: Size
    mean: Number | list[Number]
    std: Size | list[Size]


class Expected(Struct):
    """The form of a run's data."""

    example: list[Count]
    outputs: Count
    classes: Count | None
    image_shape: tuple[Count, Count, Count] | None
    vocabulary: Count | None
    scale: Constants


class RunMeta(Struct):
    """What a training run writes into its checkpoints; `config` is checked by `Config`."""

    run: Count
    config: Values
    model_file: str | None
    progress: Progress
    provenance: Provenance
    rule_files: dict[str, str] = {}
    data: Expected | None = None  # of an older npdrt: none


class TraceMeta(Struct):
    """The names of the columns of a trace."""

    parameters: list[str]
    weights: list[str] = []
    networks: list[str] = []
    records: Count = 0


class SliceSettings(Struct):
    """What slices depend on, as far as npdrt reads it again."""

    examples: Count


class SlicesMeta(Struct):
    """The metadata of slices."""

    settings: SliceSettings


class Table(Struct):
    """A table of a study."""

    title: str
    columns: list[str]
    rows: list[list[str | int | Number | bool | None]]

    def __post_init__(self) -> None:
        if any(len(row) != len(self.columns) for row in self.rows):
            raise ValueError(f"a row of a table has not {len(self.columns)} cells")


Caption = Annotated[str, Meta(max_length=1_000)]


class LineMeta(Struct):
    """A line of a picture."""

    label: Caption
    x: Numbers
    y: Numbers
    style: str
    shade: Number | None
    group: Count | None


class PanelMeta(Struct):
    """A panel of a picture."""

    title: Caption
    xlabel: Caption
    ylabel: Caption
    xlog: bool
    ylog: bool
    note: Caption
    xlim: tuple[Number, Number] | None
    ylim: tuple[Number, Number] | None
    lines: Annotated[list[LineMeta], Meta(max_length=10_000)]


class FigureMeta(Struct):
    """A picture."""

    name: str
    caption: Caption
    columns: Annotated[int, Meta(ge=1, le=20)] | None
    panels: Annotated[list[PanelMeta], Meta(max_length=500)]


class StudyMeta(Struct):
    """What a study claims and found."""

    name: str
    scale: str
    title: str
    source: str
    statement: str
    note: str
    tables: list[Table]
    notes: list[str]


# --- a response to the conformance vectors ----------------------------------------------------


class Answer(Struct):
    """An answer to a test; the judge of the test reads the rest."""

    tcId: int
    error: str | None = None


class Response(Struct):
    """The outer form of a response."""

    npdrtVectors: int
    answers: list[Answer]
    implementation: str = ""
