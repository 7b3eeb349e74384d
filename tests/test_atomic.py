"""Replacing files: whole or not at all, on file systems of every kind."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import os
import stat
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest

from npdrt import atomic, owner
from npdrt.errors import DiskError, Error, FileRefused
from npdrt.owner import Owner


@pytest.fixture(autouse=True)
def _nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic, "_warned", set())


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_the_content_and_the_mode(tmp_path: Path) -> None:
    path = tmp_path / "a"
    atomic.replace(path, b"one")
    path.chmod(0o640)
    atomic.replace(path, b"two")
    assert path.read_bytes() == b"two"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert names(tmp_path) == ["a"]


def test_a_link_is_replaced_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(b"keep")
    (tmp_path / "a").symlink_to(victim)
    atomic.replace(tmp_path / "a", b"new")
    assert victim.read_bytes() == b"keep"
    assert not (tmp_path / "a").is_symlink()


def test_an_exception_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    atomic.replace(path, b"old")

    def fails() -> None:
        raise KeyError

    with pytest.raises(KeyError), atomic.replacing(path, before=fails) as handle:
        handle.write(b"new")
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL])
@pytest.mark.parametrize("call", ["fchmod", "fsync"])
def test_what_the_file_system_lacks_is_warned_of_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    def fails(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    path = tmp_path / "a"
    atomic.replace(path, b"one")
    monkeypatch.setattr(os, call, fails)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        atomic.replace(path, b"two")
        atomic.replace(path, b"three")
    assert path.read_bytes() == b"three"
    assert len(said) == {"fchmod": 1, "fsync": 2}[call]  # of files and of directories


def test_a_warning_turned_into_an_error_does_not_stop_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", fails)
    atomic.replace(tmp_path / "a", b"one")  # the suite turns warnings into errors
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_a_failing_disk_is_an_error_that_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def fails(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    path = tmp_path / "a"
    atomic.replace(path, b"old")
    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(DiskError, match=r"a: could not be written \("):
        atomic.replace(path, b"new")
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["a"]


def temporary(folder: Path, maker: Owner, number: int = 0) -> Path:
    name = f".npdrt-{maker.place}-{maker.process}-{maker.start}-{number:016x}.tmp"
    (folder / name).write_bytes(b"x")
    return folder / name


@pytest.fixture(scope="module")
def dead() -> Owner:
    """A process that has ended."""
    code = "from npdrt import owner; o = owner.this(); print(o.place, o.process, o.start)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    place, process, start = said.stdout.split()
    return Owner(place, "", int(process), int(start))


def test_stale_temporaries_are_removed(tmp_path: Path, dead: Owner) -> None:
    """Those of a dead process, and nothing that only looks like one."""
    stale = temporary(tmp_path, dead)
    others = [".npdrt.tmp", ".npdrt-0000000000000000.tmp", stale.name[1:], ".bashrc", "a.tmp"]
    for name in others:
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / stale.name.replace("0.tmp", "1.tmp")).mkdir()
    os.mkfifo(tmp_path / stale.name.replace("0.tmp", "2.tmp"))
    (tmp_path / stale.name.replace("0.tmp", "3.tmp")).symlink_to(stale)
    before = set(names(tmp_path))
    assert atomic.remove_stale(tmp_path) == [stale]
    assert before - set(names(tmp_path)) == {stale.name}
    assert atomic.remove_stale(tmp_path) == []


def test_the_next_write_removes_them(tmp_path: Path, dead: Owner) -> None:
    temporary(tmp_path, dead)
    atomic.replace(tmp_path / "a", b"new")
    assert names(tmp_path) == ["a"]


def test_a_number_used_again_is_not_the_process(tmp_path: Path) -> None:
    """A process that is alive, but began at another time than the maker of the file."""
    me = owner.this()
    assert not owner.gone(me)
    assert me.start > 0
    stale = temporary(tmp_path, dataclasses.replace(me, start=me.start + 1))
    temporary(tmp_path, me, 1)
    assert atomic.remove_stale(tmp_path) == [stale]


def test_a_zombie_is_gone() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as child:
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert owner.gone(dataclasses.replace(owner.this(), process=child.pid, start=0))


def test_of_another_machine_only_what_is_old_and_free(tmp_path: Path, dead: Owner) -> None:
    elsewhere = dataclasses.replace(dead, place="0" * 8)
    assert not owner.gone(elsewhere)
    young, old, held = (temporary(tmp_path, elsewhere, i) for i in range(3))
    for path in (old, held):
        os.utime(path, (0, 0))
    with held.open("rb") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        assert atomic.remove_stale(tmp_path) == [old]
    assert names(tmp_path) == sorted([young.name, held.name])


def test_creation_succeeds_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two, one; also on a file system without hard links."""

    def fails(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    assert atomic.create(tmp_path / "a", b"one")
    assert not atomic.create(tmp_path / "a", b"two")
    monkeypatch.setattr(os, "link", fails)
    assert atomic.create(tmp_path / "b", b"one")
    assert not atomic.create(tmp_path / "b", b"two")
    assert {(tmp_path / name).read_bytes() for name in names(tmp_path)} == {b"one"}
    assert names(tmp_path) == ["a", "b"]


def test_keeping_without_hard_links_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    (tmp_path / "a").write_bytes(b"one")
    atomic.keep(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "a").samefile(tmp_path / "b")
    monkeypatch.setattr(os, "link", fails)
    (tmp_path / "c").write_bytes(b"old")
    atomic.keep(tmp_path / "a", tmp_path / "c")
    assert (tmp_path / "c").read_bytes() == b"one"
    assert names(tmp_path) == ["a", "b", "c"]


def test_moving_forces_the_file_to_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced = []
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(os.fstat(handle).st_ino))
    (tmp_path / "a").write_bytes(b"new")
    (tmp_path / "b").write_bytes(b"old")
    atomic.move(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == b"new"
    assert synced == [(tmp_path / "b").stat().st_ino, tmp_path.stat().st_ino]
    with pytest.raises(Error, match=r"b does not exist; give another path"):
        atomic.move(tmp_path / "a", tmp_path / "b")


def test_a_wrong_path_is_not_the_disks_fault(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_bytes(b"")
    reasons = {
        "missing/a": "missing does not exist",
        "file/a": "file/a: Not a directory",
        "folder": "folder: Is a directory",
    }
    for name, reason in reasons.items():
        with pytest.raises(Error, match=reason) as raised:
            atomic.replace(tmp_path / name, b"new")
        assert raised.value.exit_code == 2
    assert names(tmp_path) == ["file", "folder"]


def test_appending_follows_no_link(tmp_path: Path) -> None:
    (tmp_path / "victim").write_bytes(b"keep")
    (tmp_path / "log").symlink_to("victim")
    os.mkfifo(tmp_path / "fifo")
    for name, reason in (("log", "symbolic link"), ("fifo", "not a regular file")):
        with pytest.raises(FileRefused, match=reason):
            atomic.appending(tmp_path / name)
    assert (tmp_path / "victim").read_bytes() == b"keep"


def test_a_temporary_in_use_is_left(tmp_path: Path) -> None:
    with atomic.replacing(tmp_path / "a"):
        assert atomic.remove_stale(tmp_path) == []


def test_keeping_a_file_that_others_replace(tmp_path: Path) -> None:
    """Linux says that a file is missing if it is replaced while it gets another name."""
    path, failures = tmp_path / "a", []
    atomic.replace(path, b"x")

    def save() -> None:
        try:
            for _ in range(200):
                with atomic.replacing(path, before=lambda: atomic.keep(path, tmp_path / "b")) as f:
                    f.write(b"x")
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=save) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert names(tmp_path) == ["a", "b"]
