"""Records that somebody changed: every value of every file that npdrt reads again becomes one of
another type, size or form, and each command that reads it refuses it, or does not need it."""

from __future__ import annotations

import contextlib
import copy
import json
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from npdrt import schema
from npdrt.cli import cli
from npdrt.conform import vectors
from npdrt.errors import Error, FileRefused
from npdrt.store import container
from npdrt.train import Config, train

FAST = ("-q", "--json")
FEW = 5  # mutants of a file in the suite; the soak makes all
DEEP = "DEEP"  # stands for a list in a list, 100,000 times
NAN = "NAN"


def deep(levels: int) -> Any:
    value: Any = 0
    for _ in range(levels):
        value = [value]
    return value


VALUES: tuple[Any, ...] = (
    *(None, True, -1, 1.5, 10**30, -(10**30), 1e300, "", "x", "\ud800", "a\0b", "\x1b[2J"),
    *([], {}, [[]], [None], [1e300], ["x"], {"x": 1}, {"": None}, deep(200), DEEP, NAN),
)
ABSENT = object()


# --- changing a value ------------------------------------------------------------------------


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where the values are in a document; of a list the first two."""
    yield at
    items: Any = value.items() if isinstance(value, dict) else ()
    if isinstance(value, list):
        items = enumerate(value[:2])
    for key, item in items:
        yield from places(item, (*at, key))


def changed(document: Any, at: tuple[Any, ...], value: Any) -> Any:
    """The document with another value at a place, or without it."""
    if not at:
        return {} if value is ABSENT else value
    document = copy.deepcopy(document)
    holder = document
    for key in at[:-1]:
        holder = holder[key]
    if value is ABSENT:
        del holder[at[-1]]
    else:
        holder[at[-1]] = value
    return document


def as_json(document: Any) -> bytes:
    text = json.dumps(document)
    return text.replace(f'"{DEEP}"', "[" * 100_000).replace(f'"{NAN}"', "NaN").encode()


def as_lines(records: list[Any]) -> bytes:
    return b"".join(as_json(record) + b"\n" for record in records)


def as_toml(document: Any) -> bytes:
    """TOML on one line a key; what TOML has no form for is left out."""

    def form(value: Any) -> str:
        match value:
            case dict():
                return "{" + ", ".join(f"{name(k)} = {form(v)}" for k, v in value.items()) + "}"
            case list():
                return "[" + ", ".join(map(form, value)) + "]"
            case str() if value == DEEP:
                return "[" * 100_000
            case str() if value == NAN:
                return "nan"
            case None:
                raise ValueError("TOML has no null")
        return json.dumps(value, ensure_ascii="\ud800" not in str(value))

    def name(key: str) -> str:
        return json.dumps(key)

    if not isinstance(document, dict):
        return form(document).encode("utf-8", "surrogatepass")
    lines = "".join(f"{name(k)} = {form(v)}\n" for k, v in document.items())
    return lines.encode("utf-8", "surrogatepass")


# --- the files and who reads them ------------------------------------------------------------


@dataclass(frozen=True)
class File:
    """A file that is read again. document: what is in it; write: puts another there; commands:
    those that read it, run in the folder of the files."""

    document: Any
    write: Callable[[Any], None]
    commands: tuple[str, ...]


def text_file(path: Path, document: Any, form: Callable[[Any], bytes], *commands: str) -> File:
    return File(document, lambda other: void(path.write_bytes(form(other))), commands)


def container_file(path: Path, *commands: str) -> File:
    arrays, meta = container.read(path)
    return File(meta, lambda other: void(container.write(path, arrays, other)), commands)


def void(_: object) -> None:
    """Nothing, of something."""


RECIPE: dict[str, Any] = {
    "title": "t", "source": "s", "statement": "x", "study": "trials",
    "config": {"data": "digits", "batch_size": 256, "model_options.width": 4},
    "options": {"by": ["lr", "model_options.depth"], "remarks": ["r"],
                "measures": ["train_loss", "max train_accuracy", "train_loss@1",
                             "test_loss at least train_loss"]},
    "smoke": {"note": "n", "config": {"epochs": 1}, "options": {},
              "grid": [{"lr": [0.01, 0.02], "snapshots": [[0]]}]},
    "reference": {"data": "digits", "row": [{"lr": 0.01, "depth": 2, "train_loss": [1.0, 2.0]},
                                            {"lr": 0.02, "train_loss": {"mean": 1.0, "std": 0.1}}]},
}  # fmt: skip
SMOKE = "--scale smoke --out sweep --jobs 1 -q"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a trace, a log, a snapshot and slices; a sweep with its study; a saved program;
    a recipe; a response."""
    folder = tmp_path_factory.mktemp("records")
    options = {"depth": 2, "width": 4}
    settings = {"snapshots": (0,), "conditioning": True, "log_every": 1, "batch_size": 256}
    train(Config(model_options=options, epochs=1, **settings), folder / "run")
    (folder / "r.toml").write_bytes(as_toml(RECIPE))
    with contextlib.chdir(folder):
        for words in (
            "perturb run --points 2 --examples 5 -q",
            f"reproduce r.toml {SMOKE}",
            "explain --model mlp --width 4 --save program.json",
        ):
            assert call(words).exit_code == 0
    test = next(vectors.groups("Norm"))["tests"][0]
    answers = [{"tcId": test["tcId"], "norm": test["norm"]}, {"tcId": 100_001, "error": "no"}]
    response = {"npdrtVectors": 1, "implementation": "mine", "answers": answers[:1]}
    (folder / "response.json").write_text(json.dumps(response))
    return folder


def call(words: str) -> Any:
    return CliRunner().invoke(cli, words.split(), prog_name="npdrt")


def the_run(sweep: Path) -> Path:
    return min((sweep / "runs").iterdir())


FILES: dict[str, Callable[[Path], File]] = {
    "checkpoint": lambda at: container_file(
        at / "run" / "checkpoint.h5",
        "show run",
        "train --out run --resume -q",
        "train --out run --resume -q --width 4",
        "explain run",
        "distance run run --samples 1",
        "export run --to npz --output o.npz --force",
    ),
    "snapshot": lambda at: container_file(
        at / "run" / "snapshots" / "step-000000.h5", "perturb run --points 2 --examples 4 -q"
    ),
    "trace": lambda at: container_file(
        at / "run" / "trace.h5", "show run/trace.h5", "plot run --output p.svg --force"
    ),
    "slices": lambda at: container_file(
        at / "run" / "slices.h5",
        "perturb run --points 2 --examples 5 -q",
        "plot run/slices.h5 --output p.svg --force",
        "show run/slices.h5",
    ),
    "study": lambda at: container_file(
        at / "sweep" / "study.h5", "show sweep", "plot sweep --output p.svg --force"
    ),
    "log": lambda at: text_file(
        at / "run" / "log.jsonl",
        lines(at / "run" / "log.jsonl"),
        as_lines,
        "export run --to csv --output o.csv --force",
        "train --out run --resume -q",
    ),
    "log of a sweep": lambda at: text_file(
        the_run(at / "sweep") / "log.jsonl",
        lines(the_run(at / "sweep") / "log.jsonl"),
        as_lines,
        f"reproduce r.toml {SMOKE} --as-is",
    ),
    "result": lambda at: text_file(
        the_run(at / "sweep") / "result.json",
        json.loads((the_run(at / "sweep") / "result.json").read_text()),
        as_json,
        f"sweep r.toml {SMOKE}",
        f"reproduce r.toml {SMOKE} --as-is",
    ),
    "recipe": lambda at: text_file(
        at / "r.toml", RECIPE, as_toml, f"reproduce r.toml {SMOKE} --as-is"
    ),
    "program": lambda at: text_file(
        at / "program.json",
        json.loads((at / "program.json").read_text()),
        as_json,
        "explain program.json",
    ),
    "response": lambda at: text_file(
        at / "response.json",
        json.loads((at / "response.json").read_text()),
        as_json,
        "vectors verify response.json --format float64",
    ),
}
SLOW = {"response": 2, "trace": 3}  # of which fewer are made in the suite


def lines(path: Path) -> list[Any]:
    """The records of a log, one of each event."""
    records = [json.loads(line) for line in path.read_bytes().splitlines()]
    return list({record["event"]: record for record in records}.values())


def outcomes(file: File, chosen: Callable[[list[Any]], list[Any]], reset: Any) -> Counter[str]:
    """How commands end on mutants; AssertionError names those that end in another way."""
    every = [(at, value) for at in places(file.document) for value in (*VALUES, ABSENT)]
    counts: Counter[str] = Counter()
    wrong: list[str] = []
    for at, value in chosen(every):
        for words in file.commands:
            try:
                file.write(changed(file.document, at, value))
            except (Error, ValueError, TypeError):  # the form cannot say it
                counts["not written"] += 1
                break
            result = call(words)
            ended = result.exception is None or isinstance(result.exception, SystemExit)
            steers = "Traceback" in result.output or "\x1b" in result.output
            if not ended or steers or result.exit_code not in (0, 2, 3):
                ending = f"{result.exit_code}, {result.exception!r}, {result.output[-80:]!r}"
                wrong.append(f"{words}: {at} = {str(value)[:60]!r}: {ending}")
            counts[str(result.exit_code)] += 1
            reset()
    assert not wrong, "\n".join([f"{len(wrong)} ended in another way", *wrong[:40]])
    return counts


def fuzz(original: Path, folder: Path, name: str, chosen: Callable[[list[Any]], list[Any]]) -> None:
    def reset() -> None:
        for path in folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        shutil.copytree(original, folder, dirs_exist_ok=True)

    reset()
    with contextlib.chdir(folder):
        found = outcomes(FILES[name](Path()), chosen, reset)
    print(f"{name}: exit codes {dict(sorted(found.items()))}")
    assert found


@pytest.mark.parametrize("name", FILES)
def test_changed_records(name: str, original: Path, tmp_path: Path) -> None:
    pick, few = random.Random(name), SLOW.get(name, FEW)
    fuzz(original, tmp_path, name, lambda every: pick.sample(every, min(few, len(every))))


@pytest.mark.soak
@pytest.mark.parametrize("name", FILES)
def test_every_changed_record(name: str, original: Path, tmp_path: Path) -> None:
    fuzz(original, tmp_path, name, lambda every: every)


# --- the layer itself ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "raw",
    [
        b"[",
        b"\xff\xfe",
        b"[" * 100_000,
        b"1" * 5_000,
        b"NaN",
        b'{"event": "a", "event": "b", "step": 1}',
        b'{"event": "epoch", "step": 1, "epoch": 1, "lr": 1e999, "train_loss": 1}',
        b'{"event": "trace", "step": 1}',
        b'{"event": "a", "step": true}',
        b'{"event": "a", "step": -1}',
        b'{"event": "a", "step": 1.0}',
        b'{"event": {}, "step": 1}',
    ],
)
def test_what_is_no_record_is_refused(raw: bytes) -> None:
    with pytest.raises(FileRefused, match=r"^here: "):
        schema.log_record(raw, "here")


def test_a_record_keeps_what_is_not_declared() -> None:
    raw = (
        '\ufeff{"event": "epoch", "step": 1, "epoch": 1, "lr": 1, "train_loss": null, "more": "x"}'
    )
    found = schema.log_record(raw.encode(), "here")
    assert found == json.loads(raw.removeprefix("\ufeff"))
    assert type(found["lr"]) is int  # nothing is converted
    assert schema.log_record(b'{"event": "own", "step": 1}', "here")["event"] == "own"
