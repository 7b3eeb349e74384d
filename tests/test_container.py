"""The container: what goes in comes out, a save is whole or absent, nothing foreign is read."""

from __future__ import annotations

import errno
import gc
import hashlib
import json
import os
import random
import re
import resource
import shutil
import signal
import stat
import struct
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from npdrt import atomic
from npdrt.cli import cli
from npdrt.errors import Error, FileRefused
from npdrt.store import container
from npdrt.train import Config, train
from npdrt.train.studies.slices import slices

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


def assert_h5py_agrees(path: Path) -> None:
    """The index and HDF5 describe the same arrays, at the same places, and no others."""
    arrays, meta = container.read(path)
    found: dict[str, Any] = {}
    with h5py.File(path) as file:
        index = json.loads(bytes(file["meta"][()]))
        file.visititems(lambda name, item: found.update({name: item}))
        sets = {n: item for n, item in found.items() if isinstance(item, h5py.Dataset)}
        assert set(sets) == {*arrays, "meta"}
        assert not any(len(item.attrs) for item in (file, *found.values()))
        for name, kind, shape, offset in index["arrays"]:
            dataset = sets[name]
            assert (dataset.dtype.name, list(dataset.shape)) == (kind, shape)
            assert offset == (dataset.id.get_offset() if dataset.size else 0)
            assert dataset[()].tobytes() == arrays[name].tobytes()
            assert dataset.dtype == arrays[name].dtype
    assert [name for name, *_ in index["arrays"]] == list(arrays)
    assert index["meta"] == meta
    assert index["format"] == 2


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
        assert sha == hashlib.sha256(path.read_bytes()[48:]).hexdigest()
        assert_h5py_agrees(path)
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


def test_a_name_that_is_not_utf8_in_the_metadata(path: Path) -> None:
    """As Python has it in sys.argv: a surrogate, which JSON writes as an escape."""
    container.write(path, {}, {"argv": [os.fsdecode(b"caf\xe9.h5")]})
    assert container.read(path)[1] == {"argv": [os.fsdecode(b"caf\xe9.h5")]}


def test_order_is_the_order_given(path: Path) -> None:
    order = ["b", "c/10", "c/9", "a"]
    container.write(path, {name: np.zeros(2) for name in order}, {})
    assert list(container.read(path)[0]) == order


def test_plain_h5py_reads_the_file(path: Path) -> None:
    container.write(path, ARRAYS, META)
    with h5py.File(path) as file:
        assert file.userblock_size == 512
        for name, array in ARRAYS.items():
            assert file[name].chunks is None
            assert file[name].dtype == array.dtype
            np.testing.assert_array_equal(file[name][()], array)
        text = bytes(file["meta"][()]).decode()
    assert text.startswith('{"arrays":[["params/layers/01/weight","float32",[3,4],')
    assert text.endswith(
        '"format":2,"meta":{"config":{"lr":0.01,"name":"Frömage","none":null},"step":7}}'
    )
    assert_h5py_agrees(path)


def test_plain_h5dump_reads_the_file(path: Path) -> None:
    if not shutil.which("h5dump"):
        pytest.skip("h5dump is not installed")
    container.write(path, ARRAYS, META)
    words = ["h5dump", "-d", "/params/layers/01/weight", "-y", "-w", "0", str(path)]
    found = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    assert "IEEE_F32LE" in found
    assert "0, 1, 2, 3" in found


def test_h5py_agrees_with_what_a_run_writes(tmp_path: Path) -> None:
    """Checkpoints with state, the trace, a snapshot, slices."""
    config = Config(
        model_options={"depth": 2, "width": 4}, optimizer="adam", epochs=2, batch_size=600,
        snapshots=(2,), trace_every=1, conditioning=True, schedule="constant",
    )  # fmt: skip
    train(config, tmp_path / "run")
    slices(tmp_path / "run", eta=(0.0, 0.1), examples=8)
    files = sorted(path.name for path in tmp_path.rglob("*.h5"))
    assert {"checkpoint.h5", "trace.h5", "slices.h5", "step-000002.h5"} <= set(files)
    for path in tmp_path.rglob("*.h5"):
        assert_h5py_agrees(path)


@pytest.mark.parametrize("count", [300, pytest.param(36_000, marks=pytest.mark.soak)])
def test_many_arrays(path: Path, count: int) -> None:
    arrays = {f"params/{i // 2}/{'ab'[i % 2]}": np.full(i % 5, i, "f4") for i in range(count)}
    container.write(path, arrays, {})
    assert_same(container.read(path)[0], arrays)
    assert_h5py_agrees(path)


def test_reading_does_without_hdf5(path: Path) -> None:
    """The reader does not even import the library."""
    container.write(path, ARRAYS, META)
    script = "import sys; from npdrt.store import container; from pathlib import Path; "
    script += f"container.read(Path({str(path)!r})); print('h5py' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert found.stdout == "False\n", found.stderr


def test_header_is_as_documented(path: Path) -> None:
    sha = container.write(path, ARRAYS, META)
    block, image = path.read_bytes()[:512], path.read_bytes()[512:]
    assert block[:8] == b"NPDRTCK1"
    assert int.from_bytes(block[8:16], "little") == len(image)
    assert block[16:48] == hashlib.sha256(block[48:] + image).digest() == bytes.fromhex(sha)
    assert block[48:52] == b"\2\0\0\0"
    with h5py.File(path) as file:
        offset, size = file["meta"].id.get_offset(), file["meta"].size
    assert block[52:68] == struct.pack("<QQ", offset, size)
    assert block[68:] == bytes(444)


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
        ({"a": np.ones(1), "a/b": np.ones(1)}, "'a' has arrays below it"),
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
    [{"a": float("nan")}, {"a": float("inf")}, {"a": np.ones(1)}, {1: 0, "1": 0},
     {"a": {1: 0, "1": 0}}, {"a": "x" * (4 << 20)}],
)  # fmt: skip
def test_meta_that_cannot_be_stored(path: Path, meta: dict[Any, Any]) -> None:
    with pytest.raises(Error, match=r"meta cannot be stored as JSON .*; give plain finite data"):
        container.write(path, {}, meta)
    assert names(path.parent) == []


def test_too_many_arrays(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = {str(i): np.ones(1) for i in range(4)}
    container.write(path, arrays, {})
    monkeypatch.setattr(container, "MAX_ARRAYS", 3)
    with pytest.raises(Error, match="4 arrays cannot be stored; at most 3"):
        container.write(path, arrays, {})
    with pytest.raises(FileRefused, match="has more than 3 arrays"):
        container.read(path)
    monkeypatch.setattr(container, "MAX_ARRAYS", 4)
    monkeypatch.setattr(container, "MAX_INDEX", 50)
    with pytest.raises(Error, match=r"\d+ bytes of names and meta cannot be stored; at most 50"):
        container.write(path, arrays, {})
    with pytest.raises(FileRefused, match=r"has a /meta of \d+ bytes, more than 50"):
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
    monkeypatch.setattr(container, "_encode_index", failing(MemoryError("planted")))
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
    with pytest.raises(Error, match=r"missing does not exist; give another path"):
        container.write(tmp_path / "missing" / "c.h5", ARRAYS, META)
    (tmp_path / "c.h5").mkdir()
    with pytest.raises(Error, match=r"c.h5: .*[Dd]irectory; give another path"):
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
from npdrt.cli import cli
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
    r"starts with b'|has format version (1; convert|\d+, not 2; )|"
    r"has bytes other than zero in the padding|"
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

    cases = [flipped(bit) for bit in range(68 * 8)]
    cases += [flipped(chance.randrange(68 * 8, 8 * len(good))) for _ in range(600)]
    cases += [good[: chance.randrange(len(good))] for _ in range(300)]
    cases += [good[:cut] for cut in (0, 1, 8, 16, 52, 68, 511, 512, 513, len(good) - 1)]
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


def test_path_that_is_no_regular_file(path: Path, tmp_path: Path) -> None:
    with pytest.raises(FileRefused, match=r"checkpoint.h5 does not exist"):
        container.read(path)
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


def test_sparse_file(path: Path) -> None:
    """A gibibyte that takes 4 KiB of disk would fill the memory."""
    container.write(path, ARRAYS, META)
    os.truncate(path, 1 << 30)
    assert re.match(rf"has {1 << 30} bytes, of which \d{{4,6}} are not holes; ", refusal(path))
    container.write(path, {"a": np.zeros(1 << 16)}, {})
    container.read(path)
    with path.open("r+b") as file:  # what a copy without zeros makes of it; small enough
        data = file.read()
        place = data.index(bytes(1 << 18))
        file.truncate(place)
        file.truncate(place + (1 << 18))
        file.seek(place + (1 << 18))
        file.write(data[place + (1 << 18) :])
    assert not container.read(path)[0]["a"].any()


def test_memory_is_that_of_the_arrays(path: Path) -> None:
    container.write(path, {"a": np.zeros(1 << 22), "b": np.ones(1 << 22)}, {})
    tracemalloc.start()
    container.read(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < (64 << 20) + (8 << 20)


def test_file_changed_while_it_is_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The index that is used is the one that goes through the digest."""
    container.write(path, {"a": np.arange(1 << 17)}, {"x": 1})  # more than a buffer
    sound, index = path.read_bytes(), container._index

    def forged(*words: Any) -> Any:
        path.write_bytes(sound.replace(b'{"x":1}', b'{"x":2}'))
        found = index(*words)
        words[0].seek(0)  # so that nothing of it is left in the buffer
        words[0].read(1)
        path.write_bytes(sound)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(container, "_index", forged)
        assert "was changed while it was read" in refusal(path)
    assert container.read(path)[1] == {"x": 1}


# Hostile files: the digest is right, the index is not what `write` makes


def seal(path: Path, meta: bytes, body: bytes = bytes(1024), version: int = 2) -> None:
    """A container by its description: a header, `body` at 512, then the bytes of /meta."""
    tail = struct.pack("<IQQ", version, 512 + len(body), len(meta)).ljust(464, b"\0") + body + meta
    sha = hashlib.sha256(tail).digest()
    renew(path, struct.pack("<8sQ32s", b"NPDRTCK1", len(body) + len(meta), sha) + tail)


def index(*rows: Any, meta: Any = (), **more: Any) -> bytes:
    """The canonical JSON of an index."""
    value = {"arrays": list(rows), "format": 2, "meta": dict(meta), **more}
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


A = ["a", "float32", [4], 600]


def test_the_hostile_files_start_from_a_good_one(path: Path) -> None:
    body = bytes(88) + np.arange(4, dtype="<f4").tobytes() + bytes(920)
    seal(path, index(A, ["e", "int8", [3, 0], 0]), body)
    assert_same(
        container.read(path)[0], {"a": np.arange(4, dtype="<f4"), "e": np.empty((3, 0), "i1")}
    )


SPAN = r"bytes \d+ to \d+ of its index overlap others or lie outside the image"
NAME = "array name '.*' cannot be stored"
HOSTILE: dict[str, tuple[list[Any], str]] = {
    "before the image": ([["a", "float32", [4], 511]], SPAN),
    "at 0": ([["a", "float32", [4], 0]], SPAN),
    "over /meta": ([["a", "float32", [4], 1528]], SPAN),
    "after the end": ([["a", "float32", [4], 1 << 40]], SPAN),
    "over the end": ([["a", "float32", [1 << 20], 520]], SPAN),
    "the same bytes twice": ([A, ["b", "float32", [4], 600]], SPAN),
    "one byte shared": ([A, ["b", "int8", [4], 615]], SPAN),
    "inside another": ([["a", "float64", [20], 600], ["b", "int8", [1], 680]], SPAN),
    "more than 2**64 bytes": ([["a", "float32", [1 << 32, 1 << 32], 600]], SPAN),
    "2**64 + 16 bytes": ([["a", "int8", [(1 << 63) - 1, 2, 3], 600]], SPAN),
    "empty with an offset": ([["a", "float32", [0], 600]], "'a' is empty, but has an offset"),
    "empty, too large": ([["a", "float32", [0, 1 << 62, 1 << 62], 0]], "cannot be read"),
    "a name twice": ([A, ["a", "float32", [4], 700]], "a name twice in its index"),
    "array and group": ([A, ["a/b", "float32", [4], 700]], "array 'a' has arrays below it"),
    "meta": ([["meta", "float32", [4], 600]], NAME),
    "below meta": ([["meta/a", "float32", [4], 600]], NAME),
    "dots": ([["..", "float32", [4], 600]], NAME),
    "dots below": ([["a/../b", "float32", [4], 600]], NAME),
    "no name": ([["", "float32", [4], 600]], NAME),
    "newline": ([["a\n", "float32", [4], 600]], NAME),
    "accent": ([["é", "float32", [4], 600]], "not the canonical JSON"),
    "escape sequence": ([["\x1b[2J", "float32", [4], 600]], r"array name '.x1b\[2J'"),
    "long name": ([["x" * 129, "float32", [4], 600]], NAME),
    "depth 9": ([["/".join("abcdefghi"), "float32", [4], 600]], NAME),
    "type with byte order": ([["a", "<f4", [4], 600]], "Invalid enum value"),
    "object": ([["a", "object", [4], 600]], "Invalid enum value"),
    "complex": ([["a", "complex64", [2], 600]], "Invalid enum value"),
    "records": ([["a", "f4,f4", [2], 600]], "Invalid enum value"),
    "boolean": ([["a", "bool", [4], 600]], "Invalid enum value"),
    "type is a number": ([["a", 4, [4], 600]], "Expected `str`"),
    "negative length": ([["a", "float32", [-4], 600]], "Expected `int` >= 0"),
    "two negative lengths": ([["a", "float32", [-2, -2], 600]], "Expected `int` >= 0"),
    "negative offset": ([["a", "float32", [4], -600]], "Expected `int` >= 0"),
    "length true": ([["a", "float32", [True], 600]], "Expected `int`, got `bool`"),
    "offset true": ([["a", "float32", [4], True]], "Expected `int`, got `bool`"),
    "length 4.0": ([["a", "float32", [4.0], 600]], "(canonical|Expected `int`)"),
    "length a text": ([["a", "float32", ["4"], 600]], "Expected `int`, got `str`"),
    "length null": ([["a", "float32", [None], 600]], "Expected `int`, got `null`"),
    "length 2**64": ([["a", "float32", [1 << 64], 600]], "of another form"),
    "length 2**63": ([["a", "float32", [1 << 63], 600]], "of another form"),
    "shape a number": ([["a", "float32", 4, 600]], "Expected `array`"),
    "33 axes": ([["a", "float32", [1] * 33, 600]], "length <= 32"),
    "a field too few": ([["a", "float32", [4]]], "of another form"),
    "a field too many": ([[*A, 0]], "of another form"),
    "an object": ([{"name": "a"}], "Expected `array`"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_index_with_a_valid_digest(path: Path, case: str) -> None:
    rows, reason = HOSTILE[case]
    seal(path, index(*rows))
    assert re.match(f".*{reason}", refusal(path))


@pytest.mark.parametrize(
    ("meta", "reason"),
    [
        (b"", "truncated"),
        (b"{", "Expected `array`"),
        (b"\xff", "malformed"),
        (b"\x80\x04N.", "malformed"),
        (b"[" * 100_000, "Expected `str`"),
        (b'{"arrays":[' + b"[" * 100_000, "recursion|Expected"),
        (b'{"arrays":[],"format":2,"format":2,"meta":{}}', "malformed"),
        (b'{"arrays":[["b","int8",[0],0]],"arrays":[],"format":2,"meta":{}}', "malformed"),
        (b'{"arrays":[],"format":2,"meta":{},"meta":{}}', "Extra data"),
        (b'{"arrays":[],"format":2,"meta":{"x":1,"x":1}}', "not canonical"),
        (b'{"arrays":[],"format":2,"meta":{"x":NaN}}', "[Oo]ut of range"),
        (b'{"arrays":[],"format":2,"meta":{"x":-Infinity}}', "[Oo]ut of range"),
        (b'{"arrays":[],"format":2,"meta":{"x":1e999}}', "[Oo]ut of range"),
        (b'{"arrays":[],"format":2,"meta":{"x":%s}}' % (b"1" * 5000), "digits"),
        (b'{"arrays":[],"format":2,"meta":{"x":%s}}' % (b"[" * 3000 + b"]" * 3000), "recursion"),
        (b'{"arrays":[],"format":2,"meta":{"x":1.50}}', "not canonical"),
        (b'{"arrays":[],"format":2,"meta":{"y":1,"x":1}}', "not canonical"),
        (b'{"arrays":[],"format":2,"meta":{"x":"\xff"}}', "codec"),
        (b'{"arrays":[],"format":2,"meta":{"x":"%s"}}' % (b"y" * (4 << 20)), "more than 4194304"),
        (b'{"arrays": [],"format":2,"meta":{}}', "not the canonical JSON"),
        (b'{"arrays":[["a","int8",[0],0 ]],"format":2,"meta":{}}', "not the canonical JSON"),
        (b'{"arrays":[["\\u0061","int8",[0],0]],"format":2,"meta":{}}', "not the canonical JSON"),
        (b'{"meta":{},"format":2,"arrays":[]}', "Expected `array`"),
        (b'{"arrays":[],"format":2,"meta":{}} ', "not the canonical JSON"),
        (b'{"arrays":[],"format":2,"meta":{}', "Expecting"),
        (b"[]", "not the canonical JSON"),
        (b'{"arrays":[],"format":2}', "malformed"),
        (b'{"arrays":[],"format":2,"meta":{},"more":0}', "Extra data"),
        (b'{"arrays":[],"format":1,"meta":{}}', "malformed"),
        (b'{"arrays":[],"format":true,"meta":{}}', "malformed"),
        (b'{"arrays":[],"format":2,"meta":[]}', "not an object"),
        (b'{"arrays":{},"format":2,"meta":{}}', "Expected `array`"),
    ],
)
def test_hostile_metadata(path: Path, meta: bytes, reason: str) -> None:
    seal(path, meta)
    assert re.match(rf"has a /meta of another form \(.*({reason})", refusal(path))


@pytest.mark.parametrize(
    ("start", "length"), [(0, 40), (511, 40), (1 << 40, 40), (600, 1 << 63), (2**64 - 1, 2)]
)
def test_meta_elsewhere(path: Path, start: int, length: int) -> None:
    seal(path, index())
    data = bytearray(path.read_bytes())
    data[52:68] = struct.pack("<QQ", start, length)
    data[16:48] = hashlib.sha256(data[48:]).digest()
    renew(path, bytes(data))
    assert re.match(f"has a /meta of|{SPAN}", refusal(path))


def test_other_versions(path: Path) -> None:
    seal(path, index(), version=1)
    assert refusal(path) == "has format version 1; convert it with: npdrt convert OLD NEW"
    seal(path, index(), version=3)
    assert refusal(path).startswith("has format version 3, not 2; ")
    with h5py.File(path, "w"):
        pass
    assert refusal(path).startswith(r"starts with b'\x89HDF\r\n\x1a\n', not b'NPDRTCK1'; ")


def test_every_command_refuses_version_1(path: Path) -> None:
    """And names the one that converts it."""
    seal(path, index(), version=1)
    for words in (
        ("show", path), ("export", path, "--to", "npz"), ("plot", path), ("perturb", path.parent),
        ("distance", path, path), ("explain", path.parent),
        ("train", "--out", path.parent, "--resume"),
    ):  # fmt: skip
        result = CliRunner().invoke(cli, list(map(str, words)))
        assert result.exit_code == 3, (words, result.output)
        assert "npdrt convert OLD NEW" in result.output
