"""The container: what goes in comes out, a save is whole or absent, nothing foreign is read."""

from __future__ import annotations

import errno
import gc
import hashlib
import io
import json
import os
import random
import re
import resource
import signal
import stat
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from npdrt import atomic
from npdrt.errors import Error, FileRefused
from npdrt.store import container

ROOT = Path(__file__).parents[1]
ARRAYS = {
    "params/layers/01/weight": np.arange(12, dtype="f4").reshape(3, 4),
    "params/layers/00/bias": np.arange(5, dtype="f8"),
    "optimizer/step": np.array(7, dtype="i8"),
}
META = {"step": 7, "config": {"lr": 0.01, "name": "Frömage", "none": None}}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "checkpoint.h5"


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def assert_same(found: dict[str, Any], given: dict[str, Any]) -> None:
    assert list(found) == list(given)
    for name, array in given.items():
        wanted = np.asarray(array)
        assert found[name].shape == wanted.shape
        assert found[name].dtype == wanted.dtype.newbyteorder("<")
        assert found[name].flags.c_contiguous
        assert found[name].flags.writeable
        np.testing.assert_array_equal(found[name], wanted)


# What goes in comes out


def strided(array: np.ndarray, how: int) -> np.ndarray:
    """The same kind of array in another memory layout or byte order."""
    if how == 1:
        return np.asfortranarray(array) if array.ndim else array
    if how == 2:
        return array[..., ::-2] if array.ndim else array
    if how == 3:
        return array.astype(array.dtype.newbyteorder(">"))
    return array


arrays_strategy = st.dictionaries(
    st.from_regex(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,9}(/[A-Za-z0-9_-][.A-Z]*){1,3}", fullmatch=True),
    st.builds(
        strided,
        hnp.arrays(
            st.sampled_from(container.DTYPES),
            hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4),
        ),
        st.integers(0, 3),
    ),
    max_size=5,
)  # fmt: skip
json_strategy = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.text("aä\"\\/0", max_size=3), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(arrays=arrays_strategy, value=json_strategy)
def test_round_trip(arrays: dict[str, np.ndarray], value: Any) -> None:
    def clash(name: str) -> bool:
        return name.startswith("meta/") or any(other.startswith(name + "/") for other in arrays)

    arrays = {name: array for name, array in arrays.items() if not clash(name)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "c.h5"
        sha = container.write(path, arrays, {"value": value})
        found, meta = container.read(path, expect_sha256=sha.upper())
        assert_same(found, arrays)
        assert meta == {"value": value}
        assert sha == container.digest(path) == container.verify(path)
        assert sha == hashlib.sha256(path.read_bytes()[512:]).hexdigest()
        assert names(Path(folder)) == ["c.h5"]


def test_special_values_and_shapes(path: Path) -> None:
    bits = np.array([0x7FF8000000000001, 0x7FF0000000000000, 1 << 63, 1], "u8")
    arrays = {
        "nan": bits.view("f8"),
        "scalar": np.float64(2.5),
        "empty": np.empty((0, 3), "f2"),
        "empty2": np.empty((3, 0, 2), "i8"),
    }
    container.write(path, arrays, {})
    found, _ = container.read(path)
    assert_same(found, arrays)
    assert found["nan"].tobytes() == bits.tobytes()


def test_order_is_the_order_given(path: Path) -> None:
    order = ["b", "c/10", "c/9", "a"]
    container.write(path, {name: np.zeros(2) for name in order}, {})
    assert list(container.read(path)[0]) == order


def test_hundreds_of_members_a_group(path: Path) -> None:
    arrays = {f"params/{i:03}/w": np.full(3, i) for i in reversed(range(300))}
    container.write(path, arrays, {})
    assert_same(container.read(path)[0], arrays)


def test_plain_h5py_reads_the_file(path: Path) -> None:
    container.write(path, ARRAYS, META)
    with h5py.File(path) as file:
        assert file.userblock_size == 512
        for name, array in ARRAYS.items():
            assert file[name].chunks is None
            assert file[name].dtype == array.dtype
            np.testing.assert_array_equal(file[name][()], array)
        offsets = [file[name].id.get_offset() for name in sorted([*ARRAYS, "meta"])]
        assert offsets == sorted(offsets)
        text = bytes(file["meta"][()]).decode()
    assert text.startswith('{"format":1,"meta":{"config":{"lr":0.01,"name":"Frömage","none":null}')
    assert text.endswith(f'"order":{json.dumps(list(ARRAYS)).replace(" ", "")}}}')


def test_header_is_as_documented(path: Path) -> None:
    sha = container.write(path, ARRAYS, META)
    block, image = path.read_bytes()[:512], path.read_bytes()[512:]
    assert block[:8] == b"NPDRTCK1"
    assert int.from_bytes(block[8:16], "little") == len(image)
    assert block[16:48] == hashlib.sha256(image).digest() == bytes.fromhex(sha)
    assert block[48:] == b"\1\0\0\0".ljust(464, b"\0")


def test_bytes_depend_on_nothing_else(tmp_path: Path) -> None:
    script = """
import sys, time
from pathlib import Path
import numpy as np
from npdrt.store import container
time.sleep(float(sys.argv[2]))
arrays = {"params/b/x": np.arange(6.0), "params/a": np.ones((), "f4"), "e": np.empty(0)}
meta = {key: {key: 1} for key in {"x", "y", "z", "w"}}
container.write(Path(sys.argv[1]), arrays, meta)
"""
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path / run), delay],
            env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": seed},
        )
        for run, delay, seed in (("first", "0", "1"), ("later", "1.2", "2"))
    ]
    assert [run.wait() for run in runs] == [0, 0]
    assert (tmp_path / "first").read_bytes() == (tmp_path / "later").read_bytes()


@pytest.mark.parametrize(
    ("arrays", "text"),
    [
        ({"a": np.ones(2, bool)}, "'a' is bool, which cannot be stored; convert to float16, "),
        ({"a": np.ones(2, "G")}, "'a' is (complex256|clongdouble), which cannot be stored"),
        ({"a": np.ones(2, complex)}, "'a' is complex128, which cannot be stored"),
        ({"a": np.array(["x"])}, "'a' is <U1, which cannot be stored"),
        ({"a": np.array([None])}, "'a' is object, which cannot be stored"),
        ({"a": np.zeros(2, "f4,f4")}, "which cannot be stored"),
        ({"a": [1.0]}, "'a' is list, which cannot be stored"),
        ({"a": np.ones(1), "a/b": np.ones(1)}, "'a/b' lies below another array"),
        *(
            ({name: np.ones(1)}, f"array name {re.escape(repr(name))} cannot be stored; use 1 to 8")
            for name in ("", "a//b", "/a", "a/", ".", "a/..", "meta", "meta/a", "a b", "é", "a\n",
                         "x" * 129, "/".join("abcdefghi"))
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_stored(path: Path, arrays: dict[str, Any], text: str) -> None:
    with pytest.raises(Error, match=text):
        container.write(path, arrays, {})
    assert names(path.parent) == []


@pytest.mark.parametrize(
    "meta",
    [{"a": float("nan")}, {"a": float("inf")}, {"a": np.ones(1)}, {"a": "\ud800"}, {1: 0, "1": 0},
     {"a": {1: 0, "1": 0}}, {"a": "x" * (1 << 20)}],
)  # fmt: skip
def test_meta_that_cannot_be_stored(path: Path, meta: dict[Any, Any]) -> None:
    with pytest.raises(Error, match=r"meta cannot be stored as JSON .*; give plain finite data"):
        container.write(path, {}, meta)
    assert names(path.parent) == []


def test_too_many_arrays(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = {str(i): np.ones(1) for i in range(4)}
    container.write(path, arrays, {})
    monkeypatch.setattr(container, "MAX_ARRAYS", 4)
    with pytest.raises(Error, match="4 arrays cannot be stored; at most 3"):
        container.write(path, arrays, {})
    with pytest.raises(FileRefused, match="has more than 4 members"):
        container.read(path)


# A save is whole or absent


def test_previous_is_kept_by_hard_link(path: Path) -> None:
    previous = path.with_name("checkpoint.prev.h5")
    for step in range(3):
        inode = path.stat().st_ino if step else None
        container.write(path, ARRAYS, {"step": step}, keep_previous=previous)
        if step:
            assert previous.stat().st_ino == inode
            assert container.read(previous)[1] == {"step": step - 1}
        assert container.read(path)[1] == {"step": step}
    assert names(path.parent) == ["checkpoint.h5", "checkpoint.prev.h5"]


def test_previous_that_is_already_the_same_file(path: Path) -> None:
    """A run killed between link and rename leaves two names for one file."""
    previous = path.with_name("checkpoint.prev.h5")
    container.write(path, ARRAYS, {"step": 0})
    os.link(path, previous)
    container.write(path, ARRAYS, {"step": 1}, keep_previous=previous)
    assert container.read(previous)[1] == {"step": 0}
    assert names(path.parent) == ["checkpoint.h5", "checkpoint.prev.h5"]


def test_damaged_file_does_not_displace_the_previous(path: Path) -> None:
    previous = path.with_name("checkpoint.prev.h5")
    for step in range(2):
        container.write(path, ARRAYS, {"step": step}, keep_previous=previous)
    path.write_bytes(path.read_bytes()[:-1])
    container.write(path, ARRAYS, {"step": 2}, keep_previous=previous)
    assert container.read(previous)[1] == {"step": 0}
    assert container.read(path)[1] == {"step": 2}


def test_previous_without_hard_links(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    previous = path.with_name("checkpoint.prev.h5")
    container.write(path, ARRAYS, {"step": 0})
    monkeypatch.setattr(os, "link", failing(OSError(errno.EPERM, "no hard links here")))
    container.write(path, ARRAYS, {"step": 1}, keep_previous=previous)
    assert container.read(previous)[1] == {"step": 0}
    assert names(path.parent) == ["checkpoint.h5", "checkpoint.prev.h5"]


def test_mode_of_the_old_file_or_the_umask(path: Path) -> None:
    umask = os.umask(0o027)
    try:
        container.write(path, ARRAYS, META)
        assert path.stat().st_mode & 0o777 == 0o640
        path.chmod(0o606)
        container.write(path, ARRAYS, META)
        assert path.stat().st_mode & 0o777 == 0o606
    finally:
        os.umask(umask)


def failing(error: BaseException, after: int = 0) -> Callable[..., None]:
    calls = iter(range(1000))

    def fail(*_: Any, **__: Any) -> None:
        if next(calls) >= after:
            raise error

    return fail


@pytest.mark.parametrize("call", ["fsync", "fchmod", "replace"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "disk full"), KeyboardInterrupt()])
def test_failure_leaves_the_old_file(
    path: Path, monkeypatch: pytest.MonkeyPatch, call: str, error: BaseException
) -> None:
    container.write(path, ARRAYS, {"step": 0})
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing(error))
        expected = Error if isinstance(error, OSError) else KeyboardInterrupt
        with pytest.raises(
            expected, match=r"could not be written .*disk full" if expected is Error else None
        ):
            container.write(path, ARRAYS, {"step": 1}, keep_previous=path.with_name("previous"))
    assert path.read_bytes() == before
    assert set(names(path.parent)) <= {"checkpoint.h5", "previous"}
    assert call == "replace" or names(path.parent) == ["checkpoint.h5"]


def test_failure_while_filling(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(h5py.File, "create_dataset", failing(MemoryError("planted"), after=1))
    with pytest.raises(MemoryError, match="planted"):
        container.write(path, ARRAYS, META)
    assert names(path.parent) == []


def test_disk_that_fills_up(path: Path) -> None:
    container.write(path, ARRAYS, {"step": 0})
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in (1, 600, 100_000, 2_000_000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        try:
            with pytest.raises(Error, match=r"could not be written .*File too large"):
                container.write(path, {"a": np.ones(1000), "b": np.ones(1_000_000)}, {})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        gc.collect()
        assert path.read_bytes() == before
        assert names(path.parent) == ["checkpoint.h5"]
    container.write(path, ARRAYS, {"step": 0})
    assert path.read_bytes() == before


def test_directory_that_cannot_be_synced(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", failing(OSError(errno.EINVAL, "not here"), after=1))
    container.write(path, ARRAYS, {"step": 1})
    monkeypatch.setattr(os, "fsync", failing(OSError(errno.EIO, "broken"), after=1))
    with pytest.raises(Error, match="broken"):
        container.write(path, ARRAYS, {"step": 2})
    assert container.read(path)[1] == {"step": 2}
    assert names(path.parent) == ["checkpoint.h5"]


def test_folder_that_is_missing_or_in_the_way(tmp_path: Path) -> None:
    with pytest.raises(Error, match=r"missing/c.h5: could not be written .*No such file"):
        container.write(tmp_path / "missing" / "c.h5", ARRAYS, META)
    (tmp_path / "c.h5").mkdir()
    with pytest.raises(Error, match=r"c.h5: could not be written .*[Dd]irectory"):
        container.write(tmp_path / "c.h5", ARRAYS, META, keep_previous=tmp_path / "p.h5")
    assert names(tmp_path) == ["c.h5"]


def test_order_of_the_system_calls(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data to disk, previous, name, directory; and the file is whole when it is synced."""
    container.write(path, ARRAYS, {"step": 0})
    log: list[str] = []
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(descriptor: int) -> None:
        folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        if not folder:
            (temporary,) = path.parent.glob(".*.tmp")
            assert container.read(temporary)[1] == {"step": 1}
            assert atomic.remove_stale(path.parent) == []  # it is held
        log.append("directory" if folder else "data")
        real_fsync(descriptor)

    def replace(source: Path, target: Path) -> None:
        log.append(Path(target).name)
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    container.write(path, ARRAYS, {"step": 1}, keep_previous=path.with_name("previous.h5"))
    assert log == ["data", "previous.h5", "checkpoint.h5", "directory"]


SAVER = """
import sys
from pathlib import Path
import numpy as np
from npdrt import atomic
from npdrt.store import container
path = Path(sys.argv[1])
atomic.remove_stale(path.parent)
step = container.read(path)[1]["step"] if path.exists() else 0
while True:
    step += 1
    arrays = {f"w/{i:02}": np.full((100, 50), step) for i in range(20)}
    container.write(path, arrays, {"step": step}, keep_previous=path.with_name("previous.h5"))
    print(step, flush=True)
"""


def whole_step(path: Path) -> int:
    arrays, meta = container.read(path)
    assert len(arrays) == 20
    assert all((array == meta["step"]).all() for array in arrays.values())
    return int(meta["step"])


def kill_while_saving(path: Path, delay: float) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", SAVER, str(path)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
    ) as child:
        assert child.stdout is not None
        said = child.stdout.readline()
        time.sleep(delay)
        child.send_signal(signal.SIGKILL)
        said += child.stdout.read()
    reported = int(said.split(b"\n")[-2])
    current, previous = whole_step(path), whole_step(path.with_name("previous.h5"))
    assert current in (reported, reported + 1)  # a save that was reported is never lost
    assert previous in (current, current - 1)


@pytest.mark.parametrize("kills", [10, pytest.param(100, marks=pytest.mark.soak)])
def test_kill_while_saving(path: Path, kills: int) -> None:
    chance = random.Random(0)
    container.write(path, {f"w/{i:02}": np.zeros(1) for i in range(20)}, {"step": 0})
    for _ in range(kills):
        kill_while_saving(path, chance.uniform(0, 0.06))
    atomic.remove_stale(path.parent)
    assert names(path.parent) == ["checkpoint.h5", "previous.h5"]


# Damage


def renew(path: Path, data: bytes) -> None:
    path.unlink(missing_ok=True)  # some file systems flush to disk when a file is overwritten
    path.write_bytes(data)


def refusal(path: Path, **settings: Any) -> str:
    with pytest.raises(FileRefused) as caught:
        container.read(path, **settings)
    text = str(caught.value)
    assert text.startswith(f"{path}: ")
    assert "; " in text
    return text.removeprefix(f"{path}: ")


REASONS = (
    r"starts with b'|has format version \d+, not 1; |has bytes other than zero in the padding|"
    r"has \d+ bytes, (but its header says \d+|fewer than the 512)|"
    r"has data with SHA-256 [0-9a-f]{64}, but its header says"
)


def test_every_flipped_header_bit_and_random_damage_are_refused(path: Path, tmp_path: Path) -> None:
    container.write(path, ARRAYS, META)
    good, chance = path.read_bytes(), random.Random(1)
    damaged = tmp_path / "damaged.h5"

    def flipped(bit: int) -> bytes:
        data = bytearray(good)
        data[bit // 8] ^= 1 << bit % 8
        return bytes(data)

    cases = [flipped(bit) for bit in range(52 * 8)]
    cases += [flipped(chance.randrange(52 * 8, 8 * len(good))) for _ in range(600)]
    cases += [good[: chance.randrange(len(good))] for _ in range(300)]
    cases += [good[:cut] for cut in (0, 1, 8, 16, 52, 511, 512, 513, len(good) - 1)]
    cases += [good + chance.randbytes(chance.randrange(1, 99)) for _ in range(100)]
    for data in cases:
        renew(damaged, data)
        assert re.match(REASONS, refusal(damaged))
    for check in (container.digest, container.verify):
        damaged.write_bytes(good[:-1])
        with pytest.raises(FileRefused, match="but its header says"):
            check(damaged)
    damaged.write_bytes(flipped(8 * len(good) - 1))
    assert container.digest(damaged) == container.digest(path)
    with pytest.raises(FileRefused, match="has data with SHA-256"):
        container.verify(damaged)


def test_libhdf5_sees_nothing_before_the_digest(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    container.write(path, ARRAYS, META)
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    monkeypatch.setattr(h5py, "File", failing(AssertionError("HDF5 was given unchecked bytes")))
    assert "has data with SHA-256" in refusal(path)


def test_path_that_is_no_regular_file(path: Path, tmp_path: Path) -> None:
    assert re.match("cannot be read .*No such file", refusal(path))
    container.write(path, ARRAYS, META)
    link, fifo = tmp_path / "link.h5", tmp_path / "fifo.h5"
    link.symlink_to(path)
    os.mkfifo(fifo)
    assert refusal(link).startswith("is a symbolic link; give the path of the file itself")
    assert refusal(fifo).startswith("is not a regular file; ")
    assert refusal(tmp_path).startswith("is not a regular file; ")
    assert refusal(Path("/dev/zero")).startswith("is not a regular file; ")


def test_limit_and_expected_digest(path: Path) -> None:
    sha = container.write(path, ARRAYS, META)
    size = path.stat().st_size
    container.read(path, max_bytes=size, expect_sha256=sha)
    assert f"has {size} bytes, more than the limit of {size - 1}; " in refusal(
        path, max_bytes=size - 1
    )
    other = "0" * 64
    assert f"has SHA-256 {sha}, but {other} was expected; " in refusal(path, expect_sha256=other)


# Hostile files: the digest is right, the content is not what `write` makes


def seal(path: Path, image: bytes, version: int = 1) -> None:
    """Put the header of the documented layout before an image, with the right digest."""
    header = struct.pack(
        "<8sQ32sI", b"NPDRTCK1", len(image), hashlib.sha256(image).digest(), version
    )
    renew(path, header.ljust(512, b"\0") + image)


def envelope(*order: str) -> bytes:
    return (
        f'{{"format":1,"meta":{{}},"order":{list(order)}}}'.replace("'", '"')
        .replace(" ", "")
        .encode()
    )


def hdf5_image(build: Callable[[h5py.File], Any], meta: bytes | None, **settings: Any) -> bytes:
    buffer = io.BytesIO()
    with h5py.File(buffer, "w", **{"libver": "v110", "userblock_size": 512, **settings}) as file:
        build(file)
        if meta is not None:
            file.create_dataset("meta", data=np.frombuffer(meta, np.uint8))
    return buffer.getvalue()[512:]


def plain(file: h5py.File) -> None:
    file["a"] = np.arange(4, dtype="<f4")


def test_the_hostile_files_start_from_a_good_one(path: Path) -> None:
    seal(path, hdf5_image(plain, envelope("a")))
    assert_same(container.read(path)[0], {"a": np.arange(4, dtype="<f4")})


def late(file: h5py.File, shape: tuple[int, ...]) -> None:
    creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    creation.set_alloc_time(h5py.h5d.ALLOC_TIME_LATE)
    h5py.h5d.create(file.id, b"a", h5py.h5t.IEEE_F32LE, h5py.h5s.create_simple(shape), creation)


def compact(file: h5py.File) -> None:
    creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    creation.set_layout(h5py.h5d.COMPACT)
    h5py.h5d.create(file.id, b"a", h5py.h5t.IEEE_F32LE, h5py.h5s.create_simple((4,)), creation)


def virtual(file: h5py.File) -> None:
    layout = h5py.VirtualLayout(shape=(4,), dtype="<f4")
    layout[:] = h5py.VirtualSource("/etc/passwd", "a", shape=(4,))
    file.create_virtual_dataset("a", layout)


def named_type(file: h5py.File) -> None:
    file["t"] = np.dtype("<f4")
    file.create_dataset("a", data=np.ones(4, "<f4"), dtype=file["t"])
    del file["t"]


def odd_float(file: h5py.File) -> None:
    kind = h5py.h5t.IEEE_F32LE.copy()
    kind.set_ebias(126)
    h5py.h5d.create(file.id, b"a", kind, h5py.h5s.create_simple((4,)))


def odd_integer(file: h5py.File) -> None:
    kind = h5py.h5t.STD_I32LE.copy()
    kind.set_precision(31)
    h5py.h5d.create(file.id, b"a", kind, h5py.h5s.create_simple((4,)))


def alias(file: h5py.File) -> None:
    file["a"] = np.ones(4)
    file["b"] = file["a"]


def cycle(file: h5py.File) -> None:
    file["g/a"] = np.ones(4)
    file["g/loop"] = file["g"]


def group_attribute(file: h5py.File) -> None:
    file["g/a"] = np.ones(4)
    file["g"].attrs["x"] = 1


def root_attribute(file: h5py.File) -> None:
    plain(file)
    file.attrs["x"] = 1


def dataset_attribute(file: h5py.File) -> None:
    plain(file)
    file["a"].attrs["x"] = np.void(b"cos\nsystem\n")


def raw_name(file: h5py.File) -> None:
    space = h5py.h5s.create_simple((4,))
    h5py.h5d.create(file.id, b"\xff\xfe", h5py.h5t.IEEE_F32LE, space)


def store(name: str, data: Any, **settings: Any) -> Callable[[h5py.File], Any]:
    return lambda file: file.create_dataset(name, data=data, **settings)


def assign(name: str, value: Any) -> Callable[[h5py.File], Any]:
    return lambda file: file.__setitem__(name, value)


def put(name: str, **settings: Any) -> Callable[[h5py.File], Any]:
    return lambda file: file.create_dataset(name, **settings)


KIND = "'a' is not an array of an allowed type"
LAYOUT = "'a' is not stored contiguously"
LINK = "'a' is a soft, external or user-defined link"
HOSTILE: dict[str, tuple[Callable[[h5py.File], Any], str]] = {
    "external storage": (
        put("a", shape=(4,), dtype="<f4", external=[("/etc/passwd", 0, 16)]),
        "'a' has its data in another file",
    ),
    "soft link": (assign("a", h5py.SoftLink("/meta")), LINK),
    "dangling soft link": (assign("a", h5py.SoftLink("/nowhere")), LINK),
    "external link": (assign("a", h5py.ExternalLink("/etc/passwd", "/a")), LINK),
    "virtual dataset": (virtual, LAYOUT),
    "chunked": (put("a", shape=(4,), dtype="<f4", chunks=(2,)), LAYOUT),
    "chunk bomb": (put("a", shape=(1 << 40,), dtype="<f4", chunks=(1 << 20,)), LAYOUT),
    "resizable": (put("a", shape=(4,), dtype="<f4", maxshape=(None,)), LAYOUT),
    "compact": (compact, LAYOUT),
    "late allocation bomb": (
        lambda file: late(file, (1 << 40,)),
        rf"'a' of shape \({1 << 40},\) needs {1 << 42} bytes, but 0 are stored",
    ),
    "late allocation, small": (lambda file: late(file, (4,)), "needs 16 bytes, but 0 are stored"),
    "empty of impossible shape": (
        lambda file: late(file, (0, 1 << 62, 1 << 62)),
        "cannot be read .*(array is too big|maximum)",
    ),
    "null space": (assign("a", h5py.Empty("<f4")), KIND),
    "gzip": (put("a", data=np.ones(4, "<f4"), chunks=(4,), compression="gzip"), LAYOUT),
    "scale-offset": (put("a", data=np.ones(4, "<i4"), chunks=(4,), scaleoffset=0), LAYOUT),
    "fletcher32": (put("a", data=np.ones(4, "<i4"), chunks=(4,), fletcher32=True), LAYOUT),
    "variable length": (put("a", shape=(2,), dtype=h5py.vlen_dtype(np.int32)), KIND),
    "variable string": (put("a", shape=(2,), dtype=h5py.string_dtype()), KIND),
    "fixed string": (put("a", data=np.array([b"ab"])), KIND),
    "reference": (put("a", shape=(2,), dtype=h5py.ref_dtype), KIND),
    "region reference": (put("a", shape=(2,), dtype=h5py.regionref_dtype), KIND),
    "named type": (assign("a", np.dtype("<f4")), "'a' is neither a group nor a dataset"),
    "dataset of a named type": (named_type, "'a' has a named type"),
    "big-endian": (put("a", data=np.ones(4, ">f4")), KIND),
    "complex": (put("a", data=np.ones(4, "c16")), KIND),
    "compound": (put("a", data=np.ones(4, "<f4,<f4")), KIND),
    "enum": (put("a", shape=(4,), dtype=h5py.enum_dtype({"x": 0}, basetype="<i4")), KIND),
    "boolean": (put("a", data=np.ones(4, bool)), KIND),
    "opaque": (put("a", data=np.void(b"cos\nsystem\n")), KIND),
    "array type": (put("a", shape=(2,), dtype=np.dtype(("<f4", (3,)))), KIND),
    "float of another bias": (odd_float, KIND),
    "integer of 31 bits": (odd_integer, KIND),
    "alias": (alias, "'a' has 2 hard links, not 1"),
    "cycle": (cycle, "'g' has 2 hard links, not 1"),
    "link to the root": (lambda file: file.__setitem__("a", file["/"]), "has 2 hard links"),
    "attribute on the root": (root_attribute, "'/' has attributes"),
    "attribute on a group": (group_attribute, "'g' has attributes"),
    "attribute on a dataset": (dataset_attribute, "'a' has attributes"),
    "empty group": (lambda file: file.create_group("g"), "'g/' is an empty group"),
    "space in a name": (assign("a b", np.ones(4)), "'a b' is not an allowed name"),
    "accent in a name": (assign("é", np.ones(4)), "'é' is not an allowed name"),
    "newline in a name": (assign("a\n", np.ones(4)), r"'a\\n' is not an allowed name"),
    "dots": (assign("..", np.ones(4)), r"'\.\.' is not an allowed name"),
    "long name": (assign("x" * 129, np.ones(4)), "'x{129}' is not an allowed name"),
    "name that is no text": (raw_name, r"'\\\\xff\\\\xfe' is not an allowed name"),
    "depth 9": (assign("/".join("abcdefghi"), np.ones(4)), "deeper than 8"),
    "member not in order": (assign("z", np.ones(4)), "order and members differ, first in 'a'"),
}  # fmt: skip


if np.dtype("g").itemsize > 8:  # on some platforms it is a double
    HOSTILE["long double"] = (put("a", data=np.ones(4, "g")), KIND)


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_file_with_a_valid_digest(path: Path, case: str) -> None:
    build, reason = HOSTILE[case]
    seal(path, hdf5_image(build, envelope("a")))
    assert re.match(f".*{reason}", refusal(path))


def test_depth_of_8_is_allowed(path: Path) -> None:
    name = "/".join("abcdefgh")
    seal(path, hdf5_image(assign(name, np.ones(4)), envelope(name)))
    assert list(container.read(path)[0]) == [name]


@pytest.mark.parametrize(
    ("order", "first"), [(("a", "b"), "b"), ((), "a"), (("a", "meta"), "meta"), (("/a",), "/a")]
)
def test_members_and_order_must_agree(path: Path, order: tuple[str, ...], first: str) -> None:
    seal(path, hdf5_image(plain, envelope(*order)))
    assert f"order and members differ, first in {first!r}" in refusal(path)


@pytest.mark.parametrize(
    ("meta", "reason"),
    [
        (b"", "Expecting|decode|codec|digits|recursion"),
        (b"{", "Expecting|decode|codec|digits|recursion"),
        (b"\xff", "Expecting|decode|codec|digits|recursion"),
        (b"\x80\x04N.", "Expecting|decode|codec|digits|recursion"),
        (b'{"format":1,"format":1,"meta":{},"order":["a"]}', "a key occurs twice"),
        (b'{"format":1,"meta":{"x":{"b":1,"b":1}},"order":["a"]}', "a key occurs twice"),
        (b'{"format":1,"meta":{"x":NaN},"order":["a"]}', "NaN is not a number of JSON"),
        (b'{"format":1,"meta":{"x":-Infinity},"order":["a"]}', "-Infinity is not a number"),
        (b'{"format":1,"meta":{"x":1e999},"order":["a"]}', "[Oo]ut of range"),
        (
            b'{"format":1,"meta":{"x":%s},"order":["a"]}' % (b"1" * 5000),
            "Expecting|decode|codec|digits|recursion",
        ),
        (
            b'{"format":1,"meta":{"x":"\\ud800"},"order":["a"]}',
            "Expecting|decode|codec|digits|recursion",
        ),
        (b"[" * 100_000, "Expecting|decode|codec|digits|recursion"),
        (
            b'{"format":1,"meta":{"x":"' + b"y" * (1 << 20) + b'"},"order":["a"]}',
            "more than 1048576",
        ),
        (b'{"format": 1,"meta":{},"order":["a"]}', "JSON that is not canonical"),
        (b'{"order":["a"],"format":1,"meta":{}}', "JSON that is not canonical"),
        (b'{"format":1,"meta":{"x":1.50},"order":["a"]}', "JSON that is not canonical"),
        (b"[]", "not exactly the keys"),
        (b'{"format":1,"order":["a"]}', "not exactly the keys"),
        (b'{"extra":0,"format":1,"meta":{},"order":["a"]}', "not exactly the keys"),
        (b'{"format":2,"meta":{},"order":["a"]}', "of the wrong kind"),
        (b'{"format":1,"meta":[],"order":["a"]}', "of the wrong kind"),
        (b'{"format":1,"meta":{},"order":"a"}', "of the wrong kind"),
        (b'{"format":1,"meta":{},"order":[1]}', "of the wrong kind"),
        (b'{"format":1,"meta":{},"order":["a","a"]}', "a name twice in the order"),
    ],
)
def test_hostile_metadata(path: Path, meta: bytes, reason: str) -> None:
    seal(path, hdf5_image(plain, meta))
    assert re.match(rf"has a /meta of another form \(.*({reason})", refusal(path))


@pytest.mark.parametrize(
    "build", [plain, put("meta", data=np.ones(4, "<f4")), put("meta", data=np.ones((2, 2), "u1"))]
)
def test_metadata_missing_or_of_another_type(path: Path, build: Callable[[h5py.File], Any]) -> None:
    seal(path, hdf5_image(build, None))
    assert "has no /meta of uint8 in one dimension" in refusal(path)


@pytest.mark.parametrize(
    "image",
    [
        b"",
        b"\x89HDF\r\n\x1a\n",
        b"\x80\x04N." * 100,
        hdf5_image(plain, envelope("a"), libver="earliest"),
        hdf5_image(plain, envelope("a"), fs_strategy="fsm", fs_persist=True),
        hdf5_image(plain, envelope("a")) + b"more",
        b"\0" * 512 + hdf5_image(plain, envelope("a")),
    ],
    ids=["empty", "cut", "pickle", "superblock 0", "extension", "tail", "second user block"],
)
def test_image_of_another_form(path: Path, image: bytes) -> None:
    seal(path, image)
    assert re.match("has (no HDF5 superblock|an HDF5 superblock of another form); ", refusal(path))


def test_header_of_another_form(path: Path) -> None:
    image = hdf5_image(plain, envelope("a"))
    seal(path, image, version=2)
    assert refusal(path).startswith("has format version 2, not 1; ")
    path.write_bytes(image)
    assert refusal(path).startswith(r"starts with b'\x89HDF\r\n\x1a\n', not b'NPDRTCK1'; ")


# Hostile HDF5 metadata whose own checksums are right too


def lookup3(data: bytes) -> int:
    """Bob Jenkins's lookup3, the checksum of HDF5's metadata."""
    mask = 0xFFFFFFFF

    def rotate(x: int, k: int) -> int:
        return (x << k | x >> 32 - k) & mask

    a = b = c = (0xDEADBEEF + len(data)) & mask
    whole = max(0, (len(data) - 1) // 12) * 12
    for start in range(0, whole, 12):
        x, y, z = struct.unpack_from("<3I", data, start)
        a, b, c = (a + x) & mask, (b + y) & mask, (c + z) & mask
        for k in (4, 6, 8, 16, 19, 4):
            a, b, c = b, (c + b) & mask, (a - c) & mask ^ rotate(c, k)
    x, y, z = struct.unpack("<3I", data[whole:].ljust(12, b"\0"))
    a, b, c = (a + x) & mask, (b + y) & mask, (c + z) & mask
    for k in (14, 11, 25, 16, 4, 14, 24):
        a, b, c = b, ((c ^ b) - rotate(b, k)) & mask, a
    return b


def headers(image: bytes) -> Iterator[tuple[int, int]]:
    """Start and end of each object header (version 2), its checksum of 4 bytes not included."""
    for match in re.finditer(b"OHDR", image):
        start, flags = match.start(), image[match.start() + 5]
        width = 1 << (flags & 3)
        size_at = start + 6 + (16 if flags & 0x20 else 0) + (4 if flags & 0x10 else 0)
        yield start, size_at + width + int.from_bytes(image[size_at : size_at + width], "little")


def patched(image: bytes, offset: int, new: bytes) -> bytes:
    """Overwrite bytes of the image and make the checksum of the object header right again."""
    data = bytearray(image)
    spans = list(headers(image))
    data[offset : offset + len(new)] = new
    for start, end in spans:
        if start <= offset < end:
            data[end : end + 4] = lookup3(bytes(data[start:end])).to_bytes(4, "little")
    return bytes(data)


def two(file: h5py.File) -> None:
    file["a"] = np.zeros(400, "<f4")
    file["b"] = np.ones(400, "<f4")


def layout_of(image: bytes, name: str) -> int:
    """Where the address of a contiguous dataset's data (then its size) stands in the image."""
    with h5py.File(io.BytesIO(image)) as file:
        pair = struct.pack("<QQ", file[name].id.get_offset(), file[name].id.get_storage_size())
    assert image.count(pair) == 1
    return image.index(pair)


def test_checksum_of_hdf5() -> None:
    image = hdf5_image(two, envelope("a", "b"))
    spans = list(headers(image))
    assert len(spans) == 4
    for start, end in spans:
        assert lookup3(image[start:end]).to_bytes(4, "little") == image[end : end + 4]


def test_data_outside_the_image_or_shared(path: Path) -> None:
    image = hdf5_image(two, envelope("a", "b"))
    a, b = layout_of(image, "a"), layout_of(image, "b")
    seal(path, patched(image, a, image[b : b + 8]))
    assert (container.read(path)[0]["a"] == 1).all()  # the patch works; no more than the image
    for address in (len(image) - 8, len(image), 1 << 40, 2**63, 2**64 - 2):
        seal(path, patched(image, a, address.to_bytes(8, "little")))
        assert "cannot be read" in refusal(path)
    seal(path, patched(image, a, b"\xff" * 8))
    assert "needs 1600 bytes, but 0 are stored" in refusal(path)
    for size in (0, 1599, 1601, 1 << 40):
        seal(path, patched(image, a + 8, size.to_bytes(8, "little")))
        assert re.match("'a' of shape .* needs 1600 bytes|cannot be read", refusal(path))


def test_filter_on_contiguous_data(path: Path) -> None:
    """HDF5 makes no such dataset, but opens one: deflate written over a message of no content."""
    image = hdf5_image(plain, envelope("a"))
    deflate = struct.pack("<BHBBBHHHI", 0x0B, 176, 0, 2, 1, 1, 1, 1, 9)
    seal(path, patched(image, image.index(b"\0\xb0\0\0" + b"\0" * 176), deflate))
    assert refusal(path).startswith("'a' passes through a filter; ")


def many(file: h5py.File) -> None:
    for name in "abcd":
        file[name] = np.ones(400, "<f4")


def test_shared_data_cannot_multiply(path: Path) -> None:
    """Four names for the same 4800 bytes: more than the image has, though each lies inside."""
    image = hdf5_image(many, envelope(*"abcd"))
    first = layout_of(image, "a")
    shared = image[first : first + 8] + struct.pack("<Q", 4800)
    for at in [layout_of(image, name) for name in "abcd"]:
        image = patched(image, at, shared)
    for match in list(re.finditer(re.escape(struct.pack("<QQ", 400, 400)), image)):  # the shapes
        image = patched(image, match.start(), struct.pack("<QQ", 1200, 1200))
    with h5py.File(io.BytesIO(image)) as file:
        assert [file[name].shape for name in "abcd"] == [(1200,)] * 4
    seal(path, image)
    assert re.match("'[a-d]' of shape .* needs 4800 bytes, but 4800 are stored and", refusal(path))


@pytest.mark.parametrize("part", [b".", b"/", b"\0", b"\xff"])
def test_link_names_no_api_makes(path: Path, part: bytes) -> None:
    image = hdf5_image(lambda file: file.__setitem__("Q", np.ones(4)), envelope("Q"))
    seal(path, patched(image, image.index(b"\x01Q") + 1, part))
    assert re.match("'.*' is not an allowed name|cannot be read", refusal(path))


@pytest.mark.parametrize("rounds", [300, pytest.param(100_000, marks=pytest.mark.soak)])
def test_random_hdf5_metadata(path: Path, rounds: int) -> None:
    """Random bytes in the object headers, all checksums right: the same arrays or a refusal."""
    image = hdf5_image(many, envelope(*"abcd"))
    chance, spans = random.Random(2), list(headers(image))
    for _ in range(rounds):
        start, end = chance.choice(spans)
        new = chance.choice([chance.randbytes(1), b"\0", b"\xff", chance.randbytes(4)])
        seal(path, patched(image, chance.randrange(start + 4, end), new))
        found = read_or_refusal(path)
        if isinstance(found, str):
            assert found.startswith(f"{path}: ")
        else:
            assert list(found) == list("abcd")
            assert sum(array.nbytes for array in found.values()) <= len(image)


def read_or_refusal(path: Path) -> dict[str, np.ndarray] | str:
    try:
        return container.read(path)[0]
    except FileRefused as refused:
        return str(refused)
