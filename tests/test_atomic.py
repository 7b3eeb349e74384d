"""Replacing files: whole or not at all, on file systems of every kind."""

from __future__ import annotations

import errno
import os
import stat
import warnings
from pathlib import Path

import pytest

from npdrt import atomic
from npdrt.errors import DiskError


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


def test_stale_temporaries_are_removed(tmp_path: Path) -> None:
    stale = tmp_path / f".npdrt-{'0a' * 8}.tmp"
    others = [".npdrt.tmp", f".npdrt-{'0g' * 8}.tmp", f"npdrt-{'0a' * 8}.tmp", ".bashrc", "a.tmp"]
    for name in (stale.name, *others):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / f".npdrt-{'1' * 16}.tmp").mkdir()
    os.mkfifo(tmp_path / f".npdrt-{'2' * 16}.tmp")
    (tmp_path / f".npdrt-{'3' * 16}.tmp").symlink_to(stale)
    before = set(names(tmp_path))
    assert atomic.remove_stale(tmp_path) == [stale]
    assert before - set(names(tmp_path)) == {stale.name}
    assert atomic.remove_stale(tmp_path) == []


def test_a_temporary_in_use_is_left(tmp_path: Path) -> None:
    with atomic.replacing(tmp_path / "a"):
        assert atomic.remove_stale(tmp_path) == []
