"""One process in a directory: with the system's locks, and without them."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

from npdrt import atomic, owner
from npdrt.errors import DiskError, Error
from npdrt.owner import Owner
from npdrt.store import lock
from npdrt.store.lock import InUse, exclusive, numbered

ROOT = Path(__file__).parents[1]


def refuse(number: int) -> Any:
    def flock(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    return flock


@pytest.fixture(params=["flock", "file"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The system's lock, or the file that takes its place."""
    monkeypatch.setattr(lock, "PATIENCE", 0.0)
    if request.param == "file":
        without_locks(monkeypatch)
    return str(request.param)


def without_locks(monkeypatch: pytest.MonkeyPatch, number: int = errno.ENOSYS) -> None:
    monkeypatch.setattr(lock, "PATIENCE", 0.0)
    monkeypatch.setattr(fcntl, "flock", refuse(number))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_one_at_a_time_and_nothing_is_left(kind: str, tmp_path: Path) -> None:
    with exclusive(tmp_path):
        assert names(tmp_path) == ([] if kind == "flock" else [lock.NAME])
        with pytest.raises(InUse, match="in use by another process"), exclusive(tmp_path):
            pass
    with exclusive(tmp_path):
        pass
    assert names(tmp_path) == []


def test_what_was_made_and_is_empty_is_removed(kind: str, tmp_path: Path) -> None:
    inner = tmp_path / "a" / "b"
    with exclusive(inner, make=True):
        assert inner.is_dir()
    assert names(tmp_path) == []
    with exclusive(inner, make=True):
        (inner / "file").write_text("")
    with exclusive(inner, make=True):
        (inner / "file").unlink()
    assert names(inner) == []  # not made by the second, so not removed by it


def test_no_directory(kind: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for name in ("file", "missing"):
        with pytest.raises(Error, match="is not a directory"), exclusive(tmp_path / name):
            pass
    with pytest.raises(Error, match="is not a directory"), exclusive(tmp_path / "file", make=True):
        pass
    assert names(tmp_path) == ["file"]


def test_a_directory_that_was_exchanged_is_locked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between opening and locking, another process removes the directory and makes a new one."""
    run, locked, take = tmp_path / "run", [], atomic.lock

    def exchanged(handle: int) -> bool | None:
        if not locked:
            run.rename(tmp_path / "old")
            run.mkdir()
        locked.append(os.fstat(handle).st_ino)
        return take(handle)

    run.mkdir()
    monkeypatch.setattr(atomic, "lock", exchanged)
    with exclusive(run):
        assert locked == [(tmp_path / "old").stat().st_ino, run.stat().st_ino]


def test_waiting_is_asked_about(kind: str, tmp_path: Path) -> None:
    answers = iter([True, True, False])
    with (
        exclusive(tmp_path),
        pytest.raises(InUse),
        exclusive(tmp_path, waiting=lambda: next(answers)),
    ):
        pass
    assert list(answers) == []


def test_stale_temporaries_are_removed_under_the_lock(kind: str, tmp_path: Path) -> None:
    me = owner.this()
    (tmp_path / "snapshots").mkdir()
    for folder in (tmp_path, tmp_path / "snapshots"):
        (folder / f".npdrt-{me.place}-{me.process}-1-{0:016x}.tmp").write_text("")
    with exclusive(tmp_path):
        assert list(tmp_path.rglob("*.tmp")) == []


def test_a_failing_disk_is_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_locks(monkeypatch, errno.EIO)
    said = "run: could not be written"
    with pytest.raises(DiskError, match=said), exclusive(tmp_path / "run", make=True):
        pass
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    "number", [errno.EPERM, errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF]
)
def test_no_locks_are_warned_of_once(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_locks(monkeypatch, number)
    monkeypatch.setattr(atomic, "_warned", set())
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            with exclusive(tmp_path):
                pass
    assert ["has no locks" in str(w.message) for w in said] == [True]


def test_numbers_are_each_given_once(tmp_path: Path) -> None:
    with numbered(tmp_path / "runs", "mlp") as first, numbered(tmp_path / "runs", "mlp") as second:
        assert (first.name, second.name) == ("mlp-1", "mlp-2")
        (second / "file").write_text("")
    assert names(tmp_path / "runs") == ["mlp-2"]


# --- the file in the lock's place -------------------------------------------------------------


def mark(path: Path, holder: Owner) -> None:
    path.write_text(json.dumps(dataclasses.asdict(holder)))


def dead() -> Owner:
    """This process number, of a process that began at another time."""
    return dataclasses.replace(owner.this(), start=1)


@pytest.mark.parametrize("depth", range(3))
def test_a_dead_process_is_succeeded(
    depth: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that died while it succeeded another."""
    without_locks(monkeypatch)
    for level in range(depth + 1):
        mark(tmp_path / (lock.NAME + ".stale" * level), dead())
    with exclusive(tmp_path):
        assert names(tmp_path) == [lock.NAME]
        assert json.loads((tmp_path / lock.NAME).read_text())["start"] == owner.this().start
    assert names(tmp_path) == []


def test_a_faster_successor_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the look at a dead process's file and its removal, another process took over."""
    without_locks(monkeypatch)
    alive = dataclasses.replace(owner.this(), process=os.getppid(), start=0)
    mark(tmp_path / lock.NAME, dead())
    claimed = lock._claimed

    def faster(path: Path) -> bool:
        found = claimed(path)
        if path.suffix == ".stale":
            mark(tmp_path / lock.NAME, alive)
        return found

    monkeypatch.setattr(lock, "_claimed", faster)
    with pytest.raises(InUse), exclusive(tmp_path):
        pass
    assert json.loads((tmp_path / lock.NAME).read_text())["process"] == os.getppid()
    assert names(tmp_path) == [lock.NAME]


@pytest.mark.parametrize("locks", [True, False])
def test_a_process_of_another_machine_is_named(
    locks: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its file counts where this machine has locks too: the other one may not."""
    if not locks:
        without_locks(monkeypatch)
    mark(tmp_path / lock.NAME, Owner("0" * 8, "elsewhere", 77, 5))
    said = rf"in use by process 77 on elsewhere, says .*{lock.NAME}; .* remove the file"
    with pytest.raises(InUse, match=said), exclusive(tmp_path, waiting=lambda: True):
        pass
    assert names(tmp_path) == [lock.NAME]


OF_NO_PROCESS = ["", "{}", "[1]", "[" * 4000, '{"place": 1, "host": 2, "process": "x"}']


@pytest.mark.parametrize("content", OF_NO_PROCESS, ids=range(len(OF_NO_PROCESS)))
def test_a_file_of_no_known_process_is_left(
    content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_locks(monkeypatch)
    (tmp_path / lock.NAME).write_text(content)
    with pytest.raises(InUse, match="an unknown machine"), exclusive(tmp_path):
        pass
    assert (tmp_path / lock.NAME).read_text() == content


# Many processes count in one file; some are killed while they hold the directory.
COUNTER = """
import errno, fcntl, os, random, signal, sys
from pathlib import Path
from npdrt.store.lock import exclusive

folder, rounds, seed, locks = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
def flock(*_):
    raise OSError(errno.ENOLCK, "No locks available")
if locks == "file":
    fcntl.flock = flock
draw = random.Random(seed)
for _ in range(rounds):
    with exclusive(folder, waiting=lambda: True):
        count = int((folder / "count").read_text())
        if draw.random() < 0.2:
            print("killed", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        (folder / "count").write_text(str(count + 1))
    print("counted", flush=True)
"""


@pytest.mark.parametrize("locks", ["flock", "file"])
@pytest.mark.parametrize("processes", [4, pytest.param(40, marks=pytest.mark.soak)])
def test_processes_that_are_killed_while_they_count(
    processes: int, locks: str, tmp_path: Path
) -> None:
    """Every count that was made is there, and a killed holder stops nobody."""
    (tmp_path / "count").write_text("0")
    command = [sys.executable, "-W", "ignore", "-c", COUNTER, str(tmp_path), "6"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    running = [
        subprocess.Popen(
            [*command, str(seed), locks], stdout=subprocess.PIPE, text=True, env=environment
        )
        for seed in range(processes)
    ]
    said = [process.communicate(timeout=120)[0].split() for process in running]
    codes = [process.returncode for process in running]
    assert [code == -signal.SIGKILL for code in codes] == ["killed" in words for words in said]
    assert set(codes) == {0, -signal.SIGKILL}
    counted = sum(words.count("counted") for words in said)
    assert int((tmp_path / "count").read_text()) == counted > 0
    with exclusive(tmp_path):  # here the system has locks; the file of a dead process may be left
        pass
    assert names(tmp_path) == ["count"]
