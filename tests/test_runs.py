"""Run directories under attack: several writers, logs and checkpoints that do not belong together,
full disks, missing streams, hang-ups, and kills at chosen system calls."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import pty
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from test_train import (
    KILLED,
    NOISY,
    RUN_FILES,
    SLOW,
    STEPS,
    WORDS,
    Collector,
    assert_same,
    blobs,
    cheap,
    contents,
    environment,
    finish,
    names,
    no_process_outlives_its_test,
    npdrt_cli,
    settings,
    start,
    stop_after,
    wait_for_step,
    write_blobs,
    write_log,
)

from npdrt import store
from npdrt.cli import cli
from npdrt.errors import DiskError, Error, FileRefused, Unavailable, of_the_system
from npdrt.store import log, trace
from npdrt.train import Reporter, resume, train
from npdrt.train.studies.figure_of_file import load
from npdrt.train.studies.slices import slices

__all__ = ["blobs", "cheap", "no_process_outlives_its_test"]  # fixtures

SOAK = pytest.mark.soak


# --- the log and its checkpoints -------------------------------------------------------------


def emptied(path: Path, other: Path) -> None:
    path.write_bytes(b"")


def cut_short(path: Path, other: Path) -> None:
    path.write_bytes(path.read_bytes().partition(b"\n")[0] + b"\n")


def without_its_middle(path: Path, other: Path) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:2] + lines[4:]))


def with_another_digit(path: Path, other: Path) -> None:
    digit = re.compile(rb'(?<="loss": \d\.)\d')
    path.write_bytes(digit.sub(lambda m: b"%d" % ((int(m[0]) + 1) % 10), path.read_bytes(), 1))


def of_another_run(path: Path, other: Path) -> None:
    shutil.copy(other / "log.jsonl", path)


def beside_a_foreign_checkpoint(path: Path, other: Path) -> None:
    for name in ("checkpoint.h5", "checkpoint.prev.h5"):
        shutil.copy(other / name, path.with_name(name))


def behind_a_link(path: Path, other: Path) -> None:
    path.rename(path.with_name("aside"))
    path.symlink_to("aside")


def reordered(path: Path, other: Path) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0], lines[2], lines[1], *lines[3:]]))


WRONG = [
    *(emptied, cut_short, without_its_middle, with_another_digit, of_another_run, reordered),
    *(beside_a_foreign_checkpoint, behind_a_link),
]


@pytest.mark.parametrize("previous", [False, True])
@pytest.mark.parametrize("change", WRONG)
def test_a_log_that_is_not_the_checkpoints(
    change: Callable[[Path, Path], None], previous: bool, blobs: Path, tmp_path: Path
) -> None:
    """Refused, whichever of the two checkpoints is read, and nothing is changed."""
    run, other = tmp_path / "run", tmp_path / "other"
    for path, seed in ((run, 0), (other, 5)):
        train(settings(blobs, seed=seed), path, stop=stop_after(13))
    if previous:
        (run / "checkpoint.h5").unlink()
        (other / "checkpoint.h5").unlink()
        (other / "checkpoint.h5").symlink_to("checkpoint.prev.h5")
    change(run / "log.jsonl", other)
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    result = npdrt_cli("train", "--out", run, "--resume", "-q")
    assert result.exit_code == 3, result.output
    assert "log.jsonl: " in result.stderr or "is a symbolic link" in result.stderr
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


def test_a_log_with_more_than_the_checkpoint_covers(blobs: Path, tmp_path: Path) -> None:
    """What comes after the checkpoint is dropped, whatever it is; a doubled log is one such."""
    config = settings(blobs)
    train(config, tmp_path / "whole")
    for name, more in {
        "doubled": None,
        "odd": b'\xff\n{"event": "epoch", "step": 1}\n{"ev',
    }.items():
        run = tmp_path / name
        train(config, run, stop=stop_after(10))
        sound = (run / "log.jsonl").read_bytes()
        (run / "log.jsonl").write_bytes(sound + (more or sound))
        resume(run)
        assert_same(contents(run), contents(tmp_path / "whole"))


def test_the_previous_checkpoint_covers_less(blobs: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(settings(blobs), run, stop=stop_after(13))
    covered = [
        store.load(run / name).meta["progress"]["log"]["records"]
        for name in ("checkpoint.prev.h5", "checkpoint.h5")
    ]
    assert 0 < covered[0] < covered[1] == len(log.read(run / "log.jsonl"))


def test_seconds_are_not_covered(tmp_path: Path) -> None:
    """The only value that differs between a resumed run and one that never stopped."""
    lines = [b'{"event": "epoch", "step": 7, "seconds": %s}' % s for s in (b"1.5", b"2", b"null")]
    digests = {log.Tally([line]).as_dict()["sha256"] for line in lines}
    assert len(digests) == 1
    assert log.Tally([b'{"event": "epoch", "step": 8, "seconds": 2}']).as_dict() != {
        "records": 1, "sha256": digests.pop()
    }  # fmt: skip


def test_a_hard_link_of_the_log_is_left_alone(blobs: Path, tmp_path: Path) -> None:
    """A backup by hard links does not grow when the run goes on."""
    run = tmp_path / "run"
    train(settings(blobs), run, stop=stop_after(5))
    os.link(run / "log.jsonl", tmp_path / "backup")
    before = (tmp_path / "backup").read_bytes()
    resume(run)
    assert (tmp_path / "backup").read_bytes() == before


def test_numbers_that_no_run_has(blobs: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(settings(blobs, optimizer="adam"), run, stop=stop_after(5))
    sound = store.load(run / "checkpoint.h5")
    slot = next(name for name in sound.state if name.endswith("exp_avg"))
    values = {
        "step": [-5, 2.0, True, 4, "5"],
        "loss_sum": [-1.0, None, "3"],
        "right": [-1, 1.0, SAMPLES_AND_MORE],
        "schedule_memory": [{"lr": 9.0}, {"x": 1}],
    }
    for name, wrong in values.items():
        for value in wrong:
            progress = {**sound.meta["progress"], name: value}
            save(run, sound, meta={**sound.meta, "progress": progress})
            with pytest.raises(FileRefused, match=r"checkpoint.h5: "):
                resume(run)
    value = sound.state[slot]
    for wrong in (value[:1, :1], value.astype("f8"), np.float32(3), value.astype("i1")):
        save(run, sound, state={**sound.state, slot: wrong})
        with pytest.raises(FileRefused, match="use a checkpoint of this run"):
            resume(run)
    save(run, sound)
    assert resume(run).step == STEPS


SAMPLES_AND_MORE = 1000


def save(run: Path, found: store.Checkpoint, **changes: Any) -> None:
    whole = {"state": found.state, "buffers": found.buffers, "meta": found.meta, **changes}
    store.save(run / "checkpoint.h5", found.params, **whole)


# --- the trace -------------------------------------------------------------------------------


def test_saving_does_not_cost_the_whole_history(
    blobs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 2,100 saves, each with more history, a few read it: all together six times its length."""
    read: list[int] = []
    saves: list[int] = []
    records, save = log.read, store.save

    def counted(path: Path) -> Any:
        found = records(path)
        read.append(len(found))
        return found

    def saved(path: Path, *given: Any, **more: Any) -> str:
        saves.append(path.with_name("log.jsonl").stat().st_size)
        return save(path, *given, **more)

    monkeypatch.setattr(log, "read", counted)
    monkeypatch.setattr(store, "save", saved)
    config = settings(blobs, epochs=100, trace_every=1, log_every=1, checkpoint_every=1)
    train(dataclasses.replace(config, conditioning=False), tmp_path / "run")
    assert len(saves) == 100 * 7 + 1
    assert len(read) < 40
    assert sum(read) < 6 * len(records(tmp_path / "run" / "log.jsonl"))
    assert saves == sorted(saves)
    tables, about = trace.read(tmp_path / "run" / "trace.h5")
    assert len(tables["layers/step"]) == 700
    assert about["records"] == len(records(tmp_path / "run" / "log.jsonl"))


@pytest.fixture
def behind(blobs: Path, tmp_path: Path) -> Path:
    """A run whose trace is of its first epoch, while the log has three."""
    run = tmp_path / "run"
    train(settings(blobs), run)
    records = [r for r in log.read(run / "log.jsonl") if r["step"] <= 7]
    names = trace.read(run / "trace.h5")[1]["parameters"]
    trace.write(run / "trace.h5", records, names)
    return run


def test_show_plot_and_export_read_the_log_where_it_is_newer(behind: Path) -> None:
    shown = npdrt_cli("show", behind / "trace.h5")
    assert shown.exit_code == 0, shown.output
    assert "the log has more records" in shown.stdout
    rows = [line.split()[:2] for line in shown.stdout.splitlines() if re.match(r"[123] ", line)]
    assert rows == [["1", "7"], ["2", "14"], ["3", "21"]]
    figure = load(behind)
    assert list(figure.panels[0].lines[0].x) == [1, 2, 3]
    result = npdrt_cli("export", behind, "--to", "csv", "--output", behind / "history.csv")
    assert result.exit_code == 0
    assert (behind / "history.csv").read_text().count("\n") == 4
    resume(behind)
    again = npdrt_cli("show", behind / "trace.h5")
    assert "the log has more records" not in again.stdout
    assert trace.read(behind / "trace.h5")[0]["history/epoch"].tolist() == [1, 2, 3]


def test_a_pinned_trace_is_the_file(behind: Path) -> None:
    sha = json.loads(npdrt_cli("show", behind / "trace.h5", "--json").stdout)["sha256"]
    shown = json.loads(npdrt_cli("show", behind / "trace.h5", "--json", "--sha256", sha).stdout)
    assert shown["arrays"]["history/epoch"]["shape"] == [1]


def test_a_newer_log_with_a_damaged_end(behind: Path) -> None:
    """The records before the damage count, if they are more than the trace has."""
    lines = (behind / "log.jsonl").read_bytes().splitlines(keepends=True)
    for count, epochs in ((len(lines), [1, 2, 3]), (3, [1])):
        (behind / "log.jsonl").write_bytes(b"".join(lines[:count]) + b"\0\n" * 50)
        assert list(load(behind).panels[0].lines[0].x) == epochs


def test_a_newer_log_of_another_run(behind: Path) -> None:
    one = {name: [1.0] for name in trace.LAYERS}  # of a net with one parameter
    records = [{"event": "trace", "step": step, **one} for step in range(1, 99)]
    write_log(behind / "log.jsonl", records)
    for words in (("show", behind / "trace.h5"), ("plot", behind)):
        result = npdrt_cli(*words)
        assert result.exit_code == 3
        assert "log.jsonl: is not the log of" in result.stderr


# --- several writers -------------------------------------------------------------------------


def in_order(run: Path) -> None:
    """One start, and no step twice."""
    records = log.read(run / "log.jsonl")
    assert [r["event"] for r in records].count("start") == 1
    for event in {r["event"] for r in records}:
        steps = [r["step"] for r in records if r["event"] == event]
        assert steps == sorted(set(steps)), event


PAIRS = {
    "train, train": ([], []),
    "resume, resume": (["--resume-or-start"], ["--resume-or-start"]),
    "train, resume": ([], ["--resume-or-start"]),
}


def pair(folder: Path, words: list[str], seed: int) -> str:
    """Two processes at nearly the same time in one directory; the kind of pair, and its codes."""
    draw = random.Random(seed)
    kind = draw.choice(list(PAIRS))
    run = folder / f"run-{seed}"
    first, second = (start(*words, "--out", run.name, *more, cwd=folder) for more in PAIRS[kind])
    if draw.random() < 0.5:
        time.sleep(draw.uniform(0, 1.5))
        second.send_signal(signal.SIGKILL)
    outcomes = [process.communicate(timeout=300) for process in (first, second)]
    codes = (first.returncode, second.returncode)
    said = [errors.strip().splitlines()[-1:] for _, errors in outcomes]
    for code, message in zip(codes, said, strict=True):
        refused = message and re.search("already exists|is in use by another process", message[0])
        assert code in (0, -signal.SIGKILL) or (code == 2 and refused), (kind, codes, said)
    if codes[0] != 0 and codes[1] != 0:
        assert finish(start(*words, "--out", run.name, "--resume-or-start", cwd=folder)) == 0
    in_order(run)
    assert names(run) == RUN_FILES
    return f"{kind}: {sorted(codes)}"


@pytest.mark.parametrize("pairs", [3, pytest.param(50, marks=SOAK)])
def test_pairs_of_writers(pairs: int, tmp_path: Path) -> None:
    """Nothing lost, nothing doubled, nothing left over; the bits are those of one alone."""
    write_blobs(tmp_path / "blobs.npz")
    words = [*KILLED, "--epochs", "4"]
    assert finish(start(*words, "--out", "alone", cwd=tmp_path)) == 0
    expected, seen = contents(tmp_path / "alone"), Counter[str]()
    for seed in range(pairs):
        seen[pair(tmp_path, words, seed)] += 1
        assert_same(contents(tmp_path / f"run-{seed}"), expected)
    print(dict(seen))


def test_runs_without_a_name_do_not_share_one(tmp_path: Path) -> None:
    write_blobs(tmp_path / "blobs.npz")
    words = [*KILLED, "--epochs", "1"]
    processes = [start(*words, cwd=tmp_path) for _ in range(3)]
    assert [finish(process) for process in processes] == [0, 0, 0]
    runs = sorted((tmp_path / "runs").iterdir())
    assert [run.name for run in runs] == ["mlp-3-1", "mlp-3-2", "mlp-3-3"]
    for run in runs:
        in_order(run)
        assert names(run) == RUN_FILES


RECIPE = """
title = "t"
source = "s"
statement = "c"
study = "rates"
[config]
data = "blobs.npz"
batch_size = 8
checkpoint_every = 2
trace_every = 1
"model_options.width" = 8
[smoke]
[[smoke.grid]]
epochs = 3
seed = [0, 1, 2]
"""


@pytest.mark.parametrize("pairs", [1, pytest.param(20, marks=SOAK)])
def test_pairs_of_sweeps(pairs: int, tmp_path: Path) -> None:
    """Both end well, each run is made once, and the table is that of a sweep alone."""
    write_blobs(tmp_path / "blobs.npz")
    (tmp_path / "r.toml").write_text(RECIPE)
    words = shlex.split("sweep r.toml --scale smoke --jobs 1 -q --json --out")
    (alone,) = swept(tmp_path, words, ["alone"])
    for number in range(pairs):
        out = f"pair-{number}"
        tables = swept(tmp_path, words, [out, out], kill=random.Random(number).random() < 0.3)
        for table in tables:
            assert table == alone
        for run in (tmp_path / out / "runs").iterdir():
            in_order(run)
            assert names(run) == {*RUN_FILES, "result.json"}
        assert names(tmp_path / out) == {"runs", "manifest.json"}


def swept(folder: Path, words: list[str], outs: list[str], *, kill: bool = False) -> list[Any]:
    """The tables of sweeps at the same time; kill: the first is killed, and begun again."""
    running = [start(*words, out, cwd=folder) for out in outs]
    if kill:
        time.sleep(random.uniform(1, 4))
        running[0].kill()
        running[0].communicate()
        running[0] = start(*words, outs[0], cwd=folder)
    tables = []
    for process in running:
        said, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
        tables.append(json.loads(said)["runs"])
    return tables


# --- without the system's locks --------------------------------------------------------------


def test_a_run_without_locks(blobs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It trains, is refused to others while it does, and leaves nothing over."""

    def flock(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr("npdrt.store.lock.PATIENCE", 0.0)
    run, refused = tmp_path / "run", []

    class Other(Reporter):
        def progress(self, step: int, steps: int, record: Any) -> None:
            with pytest.raises(Error, match="is in use"):
                resume(run)
            refused.append(step)

    train(settings(blobs), run, stop=stop_after(2), reporter=Other())
    assert refused == [1, 2]
    assert names(run) == RUN_FILES
    resume(run)
    train(settings(blobs), tmp_path / "whole")
    assert_same(contents(run), contents(tmp_path / "whole"))
    assert names(run) == RUN_FILES


# --- how a run may end -----------------------------------------------------------------------


def test_a_failing_first_step_leaves_what_was_there(blobs: Path, tmp_path: Path) -> None:
    """Nothing at all, or the empty directory and the parents that were there; and a later step's
    failure leaves the run."""
    fails = "SEEN.append(0)\n        if len(SEEN) > 20: raise ValueError('late')\n        "
    for name, text in {"early": "raise ValueError('early')\n        ", "late": fails}.items():
        body = NOISY.replace("return self.phi(", f"{text}return self.phi(").replace(
            "def apply", "def unused"
        )
        (tmp_path / f"{name}.py").write_text(body)
    config = settings(blobs, model=f"{tmp_path}/early.py:Noisy", model_options={}, eager=True)
    (tmp_path / "there").mkdir()
    for out in ("a/b/run", "there"):
        with pytest.raises(Error, match="early"):
            train(dataclasses.replace(config, snapshots=(0,)), tmp_path / out)
    assert not (tmp_path / "a").exists()
    assert names(tmp_path / "there") == set()
    late = dataclasses.replace(config, model=f"{tmp_path}/late.py:Noisy", checkpoint_every=1)
    with pytest.raises(Error, match="late"):
        train(late, tmp_path / "late")
    assert store.load(tmp_path / "late" / "checkpoint.h5").meta["progress"]["step"] > 0


# No `preexec_fn`: it forks, and libraries that other tests import warn of forks.
LIMITED = """
import os, resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))
os.execv(sys.executable, [sys.executable, "-m", "npdrt", *sys.argv[2:]])
"""
LEADING = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.executable, [sys.executable, "-m", "npdrt", *sys.argv[1:]])
"""


def run_limited(folder: Path, size: int, *words: str) -> subprocess.CompletedProcess[str]:
    """Run npdrt where no file becomes longer than so many bytes, as on a full disk."""
    command = [sys.executable, "-c", LIMITED, str(size), *words]
    return subprocess.run(
        command, cwd=folder, env=environment(), text=True, capture_output=True, timeout=120
    )


def test_a_full_disk_exits_5_and_names_the_file(tmp_path: Path) -> None:
    """At the first save nothing is left; later, what was saved goes on to the same bits."""
    write_blobs(tmp_path / "blobs.npz")
    done = run_limited(tmp_path, 1000, *KILLED, "--out", "first")
    assert done.returncode == 5, done.stderr
    assert re.match(r"Error: first/\S+: could not be written \(File too large\)", done.stderr)
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "first").exists()
    words = [*KILLED, "--epochs", "40", "--trace-every", "1", "--checkpoint-every", "40"]
    done = run_limited(tmp_path, 60_000, *words, "--out", "run")
    assert done.returncode == 5, done.stderr
    assert re.match(r"Error: run/(log.jsonl|trace.h5): could not be written", done.stderr)
    assert names(tmp_path / "run") == RUN_FILES
    assert finish(start(*words, "--out", "run", "--resume", cwd=tmp_path)) == 0
    assert finish(start(*words, "--out", "whole", cwd=tmp_path)) == 0
    assert_same(contents(tmp_path / "run"), contents(tmp_path / "whole"))


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_output_that_cannot_be_written_exits_5(
    unbuffered: str, blobs: Path, tmp_path: Path
) -> None:
    """Also where Python would fail once more when it ends, at what is left in its buffer."""
    train(settings(blobs, epochs=0), tmp_path / "run")
    around = environment() | {"PYTHONUNBUFFERED": unbuffered}
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "npdrt", "show", "run"]
        done = subprocess.run(
            command, cwd=tmp_path, env=around, stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 5, done.stderr
    assert done.stderr.count("\n") == 1
    assert "No space left on device" in done.stderr


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (IsADirectoryError(21, "Is a directory", "a"), Error),
        (PermissionError(13, "Permission denied", "a"), DiskError),
        (OSError(28, "No space left on device", "a"), DiskError),
        (OSError(30, "Read-only file system", "a"), DiskError),
        (OSError(5, "Input/output error", "a"), DiskError),
        (OSError(5, "Input/output error"), DiskError),
        (OSError(24, "Too many open files", "a"), Unavailable),
    ],
)
def test_errors_of_the_system(error: OSError, kind: type[Error]) -> None:
    found = of_the_system(error)
    assert type(found) is kind
    assert error.strerror in str(found)
    assert error.filename is None or kind is Unavailable or str(found).startswith("a: ")


def test_a_missing_file_of_the_system() -> None:
    found = of_the_system(FileNotFoundError(2, "No such file", "a"))
    assert (type(found), str(found)) == (Error, "a does not exist")


@pytest.mark.parametrize("closed", ["2>&-", ">&-", "<&-", "<&- >&- 2>&-"])
def test_streams_that_are_closed(closed: str, tmp_path: Path) -> None:
    """It trains; and what is meant for a stream does not end in a file of the run."""
    write_blobs(tmp_path / "blobs.npz")
    words = shlex.join([sys.executable, "-m", "npdrt", *KILLED[:-1], "--epochs", "1"])
    script = f"exec {words} --out run {closed}"
    done = subprocess.run(
        ["sh", "-c", script], cwd=tmp_path, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert store.load(tmp_path / "run" / "checkpoint.h5").meta["progress"]["step"] == 7
    in_order(tmp_path / "run")


OPENED = """
from npdrt.cli import open_standard_streams
open_standard_streams()
with open("opened", "w") as file:
    file.write(str(file.fileno()))
"""


@pytest.mark.parametrize("closed", ["2>&-", ">&-", "<&-", "<&- >&- 2>&-"])
def test_no_file_gets_the_number_of_a_stream(closed: str, tmp_path: Path) -> None:
    words = shlex.join([sys.executable, "-c", OPENED])
    subprocess.run(
        ["sh", "-c", f"exec {words} {closed}"], cwd=tmp_path, env=environment(), check=True
    )
    assert int((tmp_path / "opened").read_text()) > 2


def test_a_signal_with_stderr_closed_writes_into_no_file(tmp_path: Path) -> None:
    write_blobs(tmp_path / "blobs.npz")
    (tmp_path / "slow.py").write_text(SLOW)
    words = shlex.join([sys.executable, "-m", "npdrt", *WORDS, "run"])
    process = subprocess.Popen(
        ["sh", "-c", f"exec {words} 2>&-"], cwd=tmp_path, env=environment(SLOW="0.05"),
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    wait_for_step(process, tmp_path / "run", 2)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143
    assert b"stopping" not in b"".join(p.read_bytes() for p in (tmp_path / "run").iterdir())
    assert store.load_newest(tmp_path / "run")[0].meta["progress"]["step"] >= 2


def test_a_terminal_that_hangs_up(tmp_path: Path) -> None:
    """Its reader gone, every write fails; the run is saved and ends by the signal, exit code 129,
    with the progress bar drawn."""
    write_blobs(tmp_path / "blobs.npz")
    (tmp_path / "slow.py").write_text(SLOW)
    ours, theirs = pty.openpty()

    words = [word for word in WORDS if word != "-q"]
    process = subprocess.Popen(
        [sys.executable, "-c", LEADING, *words, "run"], cwd=tmp_path,
        env=environment(SLOW="0.05"), stdin=theirs, stdout=theirs, stderr=theirs,
        start_new_session=True,
    )  # fmt: skip
    os.close(theirs)
    wait_for_step(process, tmp_path / "run", 2)
    with contextlib.suppress(BlockingIOError):
        os.set_blocking(ours, False)
        assert b"training" in os.read(ours, 1 << 16)
    os.close(ours)
    assert process.wait(timeout=60) == 129
    assert store.load(tmp_path / "run" / "checkpoint.h5").meta["progress"]["step"] >= 2


def test_nohup_keeps_ignoring_hang_ups(tmp_path: Path) -> None:
    write_blobs(tmp_path / "blobs.npz")
    (tmp_path / "slow.py").write_text(SLOW)
    words = shlex.join([sys.executable, "-m", "npdrt", *WORDS, "run"])
    process = subprocess.Popen(
        ["sh", "-c", f"trap '' HUP; exec {words}"], cwd=tmp_path, env=environment(SLOW="0.03"),
        stdout=subprocess.DEVNULL,
    )  # fmt: skip
    wait_for_step(process, tmp_path / "run", 2)
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=120) == 0
    assert store.load(tmp_path / "run" / "checkpoint.h5").meta["progress"]["step"] == STEPS


# --- other code, other kernels ---------------------------------------------------------------


def test_slices_need_the_model_file_of_the_run(tmp_path: Path) -> None:
    data, model = write_blobs(tmp_path / "blobs.npz"), tmp_path / "noisy.py"
    body = NOISY.replace("def apply", "def unused")
    model.write_text(body)
    config = settings(data, model=f"{model}:Noisy", model_options={}, snapshots=(0,))
    train(config, tmp_path / "run", stop=stop_after(3))
    assert slices(tmp_path / "run", eta=(0.0, 0.01), code=[model]).loss.shape == (1, 2)
    model.write_text(
        body.replace("return self.phi(", "open('RAN', 'w')\n        return 2 * self.phi(")
    )
    result = CliRunner().invoke(
        cli, ["perturb", str(tmp_path / "run"), "--points", "2", "--code", str(model)]
    )
    assert result.exit_code == 2
    assert "noisy.py:Noisy has changed since the run was started" in result.stderr


def test_other_kernels_are_warned_of_and_recorded(tmp_path: Path) -> None:
    """There, back, and on under the same: three processes with two kinds of kernels."""
    write_blobs(tmp_path / "blobs.npz")
    words = [*KILLED, "--out", "run", "--resume-or-start"]
    said, found = [], []
    for kernel, epochs in (("Haswell", "1"), ("Sandybridge", "2"), ("Sandybridge", "3")):
        process = start(*words, "--epochs", epochs, cwd=tmp_path, OPENBLAS_CORETYPE=kernel)
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        said.append("will differ in its last bits" in errors)
        found.append(store.load(tmp_path / "run" / "checkpoint.h5").meta["provenance"])
    if found[0]["blas"] == found[1]["blas"]:
        pytest.skip("this BLAS has no kernels to choose")
    assert said == [False, True, False]
    assert "blas_before" not in found[0]
    assert found[1]["blas_before"] == found[2]["blas_before"] == [found[0]["blas"]]


def test_the_same_kernels_are_not_warned_of(blobs: Path, tmp_path: Path) -> None:
    reporter = Collector()
    train(settings(blobs), tmp_path / "run", stop=stop_after(2))
    resume(tmp_path / "run", reporter=reporter)
    assert reporter.warnings == []
    assert "blas_before" not in store.load(tmp_path / "run" / "checkpoint.h5").meta["provenance"]


# --- kills at chosen system calls ------------------------------------------------------------

CALLS = (
    *("openat", "write", "fsync", "link", "rename", "unlink", "mkdir", "flock", "ftruncate"),
    *("lseek", "close", "read", "fchmod", "newfstatat"),
)
ATTACKED = [
    *KILLED,
    "--epochs",
    "1",
    "--checkpoint-every",
    "2",
    "--snapshot",
    "3",
    "--resume-or-start",
]
KILL_AT_CALLS = """
import contextlib, ctypes, json, os, random, re, shutil, signal, subprocess, sys
from pathlib import Path
import npdrt.cli.train
from npdrt.cli import cli

# Children are forked from here, where everything is imported; strace attaches before they begin.
words, calls, kills = json.loads(sys.argv[1]), sys.argv[2].split(), int(sys.argv[3])

def attach(out, options):
    ctypes.CDLL(None).prctl(0x59616D61, -1, 0, 0, 0)  # PR_SET_PTRACER: any process
    command = ["strace", "-y", "-p", str(os.getpid()), "-o", f"{out}.strace", *options]
    tracer = subprocess.Popen(command, stderr=subprocess.PIPE)
    while b"attached" not in tracer.stderr.readline():
        pass

def child(out, *options):
    pid = os.fork()
    if pid == 0:
        if options:
            attach(out, options)
        with contextlib.suppress(SystemExit):
            cli([*words, "--out", out])
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def touching(call, trace):
    lines = [line for line in trace if line.startswith(f"{call}(")]
    return [i for i, line in enumerate(lines, 1) if re.search(r'counted[/">]', line)]

sys.stdout = open(os.devnull, "w")
draw, done = random.Random(0), []
assert child("counted", "-e", "trace=" + ",".join(calls)) == 0
trace = Path("counted.strace").read_text(errors="replace").splitlines()
points = [(call, n) for call in calls for n in touching(call, trace)]
while len(done) < kills:
    call, n = draw.choice(points)
    out = f"run-{len(done)}"
    while True:  # and perhaps its resumptions
        code = child(out, "-e", f"trace={call}", "-e", f"inject={call}:signal=KILL:when={n}")
        done += [call] * (code == -signal.SIGKILL)
        if code == 0 or draw.random() < 0.7:
            break
        n = draw.randint(1, n)
    assert child(out) == 0, (out, call, n)
    print(len(done), flush=True)
sys.stderr.write(json.dumps(done))
"""


@pytest.mark.parametrize("kills", [10, pytest.param(300, marks=SOAK)])
@pytest.mark.skipif(not shutil.which("strace"), reason="needs strace")
def test_kills_at_system_calls(kills: int, tmp_path: Path) -> None:
    """SIGKILL at the n-th call of a kind; the run resumes to the bits, and nothing is left over."""
    write_blobs(tmp_path / "blobs.npz")
    assert finish(start(*ATTACKED, "--out", "whole", cwd=tmp_path)) == 0
    arguments = [json.dumps(ATTACKED), " ".join(CALLS), str(kills)]
    done = subprocess.run(
        [sys.executable, "-c", KILL_AT_CALLS, *arguments], cwd=tmp_path, env=environment(),
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    expected = contents(tmp_path / "whole")
    runs = [path for path in tmp_path.glob("run-*") if path.is_dir()]
    assert runs
    for run in runs:
        assert_same(contents(run), expected)
        assert names(run) == {*RUN_FILES, "snapshots"}, run
        assert names(run / "snapshots") == {"step-000003.h5"}
    print(f"kills: {dict(Counter(json.loads(done.stderr.splitlines()[-1])))}")
