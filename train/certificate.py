"""What a portable run comes to, as digests that anybody can repeat.

A portable run logs the digests of its parameters, buffers and optimizer state before the first
epoch and after every one (`npdrt.store.digest`). The certificate of a run adds its settings, data
and losses.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import signal
import tempfile
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from npdrt import compute, store
from npdrt.arrays import Params
from npdrt.errors import Error, FileRefused
from npdrt.models import MODELS
from npdrt.store import Checkpoint, log
from npdrt.store.checkpoint import GROUPS
from npdrt.store.digest import digest
from npdrt.store.log import Record
from npdrt.train.config import Config, load_data, stored
from npdrt.train.loop import Reporter
from npdrt.train.own import file_of
from npdrt.train.run import check_data, never, train

# Settings that change no bits of a portable run, and "data", whose digests count instead.
NO_BITS = {
    *("data", "device", "threads", "eager", "fast", "decoders", "precision", "convolutions"),
    *("trace_every", "log_every", "checkpoint_every", "snapshots", "conditioning"),
}  # fmt: skip
LOSSES = ("train_loss", "valid_loss", "test_loss")
ENDED = int(signal.SIGTERM)  # how a repetition asks its run to save and end


def certificate(run: Path) -> dict[str, Any]:
    """The certificate of the run in a directory, at its newest checkpoint.

    Its `digest` depends on the settings of `Config` that are not their defaults (without those in
    `NO_BITS`), the digests of data and own files, the version of the arithmetic, the arrays, and
    the losses of the epochs so far. Two runs with one `digest` are the same run to the bit.
    """
    checkpoint, path, _ = store.load_newest(run)
    if "config" not in checkpoint.meta:
        raise FileRefused(f"{path}: no training run made it; give a run directory")
    meta, step = checkpoint.meta, checkpoint.meta["progress"]["step"]
    settings = _unusual(meta["config"])
    found = {
        "arithmetic_version": compute.VERSION if settings.get("arithmetic") == "portable" else None,
        "settings": {name: _without_folder(value) for name, value in settings.items()},
        "files": [meta["model_file"], *meta.get("rule_files", {}).values()],
        "data": meta["provenance"]["data"],
        "step": step,
        "arrays": {name: digest(value) for name, value in _arrays(checkpoint).items()},
        "losses": [_losses(r) for r in _epochs(run) if r["step"] <= step],
    }
    whole = json.dumps(found, sort_keys=True, separators=(",", ":")).encode()
    return {"digest": hashlib.sha256(whole).hexdigest(), **found}


def _unusual(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that are not their defaults, nor those of the model, without `NO_BITS`. So a
    setting that only a later npdrt has changes no digest."""
    usual = json.loads(json.dumps(Config().as_dict()))
    found = {n: v for n, v in settings.items() if n not in NO_BITS and v != usual[n]}
    model = MODELS.get(settings["model"])
    fields = {f.name: f.default for f in dataclasses.fields(model)} if model else {}
    options = settings["model_options"]
    return found | {
        "model_options": {n: v for n, v in options.items() if n not in fields or v != fields[n]}
    }


def _arrays(checkpoint: Checkpoint) -> Params:
    """GROUP/NAME -> array."""
    return {f"{group}/{name}": value for group in GROUPS
            for name, value in getattr(checkpoint, group).items()}  # fmt: skip


def _without_folder(value: Any) -> Any:
    """The name of a model or rule of a file without the folder, which differs between machines."""
    return value.rpartition("/")[2] if isinstance(value, str) and file_of(value) else value


def _epochs(run: Path) -> list[Record]:
    return [record for record in log.read(run / "log.jsonl") if record["event"] == "epoch"]


def _losses(record: Mapping[str, Any]) -> dict[str, float | None]:
    return {name: record[name] for name in LOSSES if name in record}


# --- repeating a run --------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """Where two runs part: the first epoch and array, or loss, of which the bits differ, and how
    many differ there. element, values: the first element of that array that differs, and its values
    in the run and in the repetition, if both have a checkpoint of that step."""

    epoch: float
    step: int
    name: str
    names: int
    element: tuple[int, ...] | None = None
    values: tuple[float, float] | None = None


@dataclass(frozen=True)
class Verdict:
    """What a repetition came to. step, epoch: how far both runs have the same bits. difference:
    where they part, None if they do not. digest: of the run's certificate, if the repetition
    reached its checkpoint. stopped: the number of the signal that ended it early, or 0."""

    run: str
    step: int
    epoch: float
    difference: Difference | None
    digest: str | None
    stopped: int


def verify(
    run: Path,
    *,
    epochs: int | None = None,
    device: str = "cpu",
    code: Sequence[Path] = (),
    data_dir: Path | None = None,
    reporter: Reporter | None = None,
    stop: Callable[[], int] = never,
) -> Verdict:
    """Repeat the portable run in a directory up to its checkpoint, or for its first epochs, and
    compare the bits. The repetition ends at the first epoch that parts.

    Raises `Error` for a run of another arithmetic, or of another version of it, and for data that
    are not those of the run.
    """
    checkpoint, path, _ = store.load_newest(run)
    config = stored(checkpoint.meta, path, code=code)
    _require_portable(checkpoint, path)
    check_data(config, load_data(config, data_dir), checkpoint, path)
    last = checkpoint.meta["progress"]["step"]
    known = [epoch for epoch in _known(run) if epoch.step <= last]
    if epochs is not None:
        known = [epoch for epoch in known if epoch.number <= epochs]
        last = min(last, known[-1].step)
    with tempfile.TemporaryDirectory(prefix="npdrt-verify-") as folder:
        again = Path(folder) / "run"
        repetition = Repetition(again, known, last, reporter or Reporter(), stop)
        train(
            _quiet(config, device), again, data_dir=data_dir, reporter=repetition,
            stop=repetition.signal,
        )  # fmt: skip
        return repetition.verdict(run, checkpoint)


def _require_portable(checkpoint: Checkpoint, path: Path) -> None:
    made = checkpoint.meta["provenance"].get("arithmetic", {"name": "fast"})
    if made["name"] != "portable":
        raise Error(
            f"{path}: the bits of a run in {made['name']} arithmetic depend on the machine; "
            "to have one that can be verified anywhere, train it with --arithmetic portable"
        )
    if made["version"] != compute.VERSION:
        raise Error(
            f"{path}: made in version {made['version']} of portable arithmetic, and this npdrt has "
            f"version {compute.VERSION}; verify it with the npdrt that made it"
        )


def _quiet(config: Config, device: str) -> Config:
    """The same run with nothing but epochs and digests in its log."""
    return dataclasses.replace(
        config, device=device, threads=None, eager=False, fast=False, trace_every=0, log_every=0,
        checkpoint_every=0, snapshots=(), conditioning=False,
    )  # fmt: skip


class Epoch(NamedTuple):
    """The end of an epoch in a log: its losses, and the digests of its arrays."""

    number: int
    step: int
    bits: Mapping[str, Any]


def _known(run: Path) -> list[Epoch]:
    records = log.read(run / "log.jsonl")
    losses = {r["step"]: _losses(r) for r in records if r["event"] == "epoch"}
    return [
        Epoch(r["epoch"], r["step"], losses.get(r["step"], {}) | r["arrays"])
        for r in records
        if r["event"] == "digests"
    ]


@dataclass
class Repetition(Reporter):
    """Compares a run with `known`, the epochs of the run that it repeats, as it goes, and ends it
    where they part, at step `last`, or when `stop` says so."""

    out: Path
    known: Sequence[Epoch]
    last: int
    reporter: Reporter
    stop: Callable[[], int]
    step: int = 0
    stopped: int = 0
    same: Epoch | None = None
    difference: Difference | None = None

    def progress(self, step: int, steps: int, record: Record | None) -> None:
        """Compare the epochs so far at the end of every one."""
        self.step = step
        self.reporter.progress(step, self.last, record)
        if record is not None and record["event"] == "epoch":
            self._compare()

    def warning(self, text: str) -> None:
        """Passed on."""
        self.reporter.warning(text)

    def signal(self) -> int:
        """A signal if the repetition should end."""
        self.stopped = self.stop()
        return self.stopped or (ENDED if self.difference or self.step >= self.last else 0)

    def _compare(self) -> None:
        for found, known in zip(_known(self.out), self.known, strict=False):
            if names := _parted(found.bits, known.bits):
                self.difference = Difference(known.number, known.step, names[0], len(names))
                return
            self.same = known

    def verdict(self, run: Path, checkpoint: Checkpoint) -> Verdict:
        """What the repetition of the run with that checkpoint came to, when it has ended."""
        self._compare()
        again, _, _ = store.load_newest(self.out)
        progress, reached = checkpoint.meta["progress"], again.meta["progress"]
        step, epoch = (self.same.step, self.same.number) if self.same else (0, 0)
        whole = progress["step"] == reached["step"]
        if whole:
            self._compare_elements(checkpoint, again)
        if whole and not self.difference:
            step, epoch = progress["step"], progress["epoch"]
        complete = whole and not self.difference and not self.stopped
        found = certificate(run)["digest"] if complete else None
        return Verdict(str(run), step, epoch, self.difference, found, self.stopped)

    def _compare_elements(self, checkpoint: Checkpoint, again: Checkpoint) -> None:
        """Find the first array and element that differ in two checkpoints of one step."""
        theirs, ours = (_arrays(c) for c in (checkpoint, again))
        names = _parted(*({n: digest(x) for n, x in arrays.items()} for arrays in (ours, theirs)))
        if not names or (self.difference and self.difference.step != self.step):
            return
        progress, name = checkpoint.meta["progress"], names[0]
        where = self.difference or Difference(progress["epoch"], self.step, name, len(names))
        self.difference = dataclasses.replace(where, **_element(theirs, ours, name))


def _parted(found: Mapping[str, Any], known: Mapping[str, Any]) -> list[str]:
    """The names whose values differ, those of `known` first."""
    names = [*known, *(found.keys() - known.keys())]
    return [name for name in names if found.get(name) != known.get(name)]


def _element(theirs: Params, ours: Params, name: str) -> dict[str, Any]:
    """The name, and the first element whose bytes differ."""
    a, b = (np.asarray(x[name]) for x in (theirs, ours))
    unlike = a.view(f"u{a.itemsize}") != b.view(f"u{b.itemsize}")
    at = tuple(int(i) for i in np.argwhere(unlike)[0])
    return {"name": name, "element": at, "values": (float(a[at]), float(b[at]))}


# --- the runs that come with npdrt ------------------------------------------------------------


def published() -> dict[str, dict[str, Any]]:
    """Name -> digest and settings of the runs whose digests come with npdrt."""
    text = (resources.files("npdrt.train") / "published.toml").read_text("utf-8")
    return tomllib.loads(text)


def repeat_published(
    *, device: str = "cpu", reporter: Reporter | None = None, stop: Callable[[], int] = never
) -> list[dict[str, Any]]:
    """Repeat the runs that come with npdrt: the name, the digest found here, and whether it is the
    published one, of each; fewer if `stop` says so."""
    rows: list[dict[str, Any]] = []
    for name, known in published().items():
        with tempfile.TemporaryDirectory(prefix="npdrt-verify-") as folder:
            config = Config(arithmetic="portable", device=device, **known["settings"])
            done = train(config, Path(folder) / "run", reporter=reporter, stop=stop)
            found = certificate(Path(folder) / "run")["digest"]
        if done.stopped:
            break
        rows.append({"name": name, "digest": found, "same": found == known["digest"]})
    return rows
