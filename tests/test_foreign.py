"""Files of others: what they may cost is bounded, and HDF5 is read in a process of its own."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import struct
import subprocess
import sys
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from click.testing import CliRunner, Result

from npdrt.cli import cli
from npdrt.errors import FileRefused
from npdrt.store import child, container, foreign

ROOT = Path(__file__).parents[1]
ARRAYS = {
    "params/layers/01/weight": np.arange(12, dtype="f4").reshape(3, 4),
    "params/layers/00/bias": np.arange(5, dtype="f8"),
    "state/step": np.array(7, dtype="i8"),
    "state/none": np.empty((0, 3), "f2"),
}
META = {"kind": "checkpoint", "user": {"lr": 0.01, "name": "Frömage"}}


def refusal(path: Path, read: Callable[[Path], Any] = foreign.read) -> str:
    with pytest.raises(FileRefused) as caught:
        read(path)
    text = str(caught.value)
    assert text.startswith(f"{path}: ")
    return text.removeprefix(f"{path}: ")


# --- bounds ---------------------------------------------------------------------------------------


def peak(path: Path) -> tuple[str, int]:
    """Why a file is refused, and the most memory that takes."""
    tracemalloc.start()
    try:
        return refusal(path), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def zipped(path: Path, *members: tuple[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return path


def npy(shape: tuple[int, ...], content: bytes, descr: str = "|u1") -> bytes:
    out = io.BytesIO()
    header = {"descr": descr, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(out, header)
    return out.getvalue() + content


def test_numbers_of_an_npz(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not what a member declares, nor what a small file unpacks to, ends up in memory."""
    path = zipped(tmp_path / "a.npz", ("x.npy", npy((1 << 26,), bytes(1 << 26))))
    text, most = peak(path)
    assert text == f"array x: declares the shape ({1 << 26},); at most {1 << 25} numbers are read"
    assert most < 8 << 20
    content = np.ones(60, "u1").tobytes()
    zipped(path, ("x.npy", npy((60,), content)), ("y.npy", npy((60,), content)))
    assert len(foreign.read(path)) == 2
    monkeypatch.setattr(foreign, "FREE", 0)  # then as many numbers as the file has bytes
    assert len(foreign.read(path)) == 2
    zipped(path, ("x.npy", npy((200,), bytes(200))), ("y.npy", npy((200,), bytes(200))))
    size = path.stat().st_size
    assert 200 < size < 400
    assert f"array y: declares the shape (200,); at most {size - 200} numbers" in refusal(path)


def test_list_of_members_of_an_npz(tmp_path: Path) -> None:
    """zipfile makes an object of every entry of the list, some 15 times its bytes."""
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        for n in range(60_000):
            archive.writestr(f"directory/of/members/{n:020}.npy", b"")
    text, most = peak(tmp_path / "a.npz")
    assert text == "its list of members has more than 4194304 bytes"
    assert most < 10 << 20


@pytest.mark.parametrize("version", [b"\x01\x00", b"\x02\x00"])
def test_header_of_a_member(tmp_path: Path, version: bytes) -> None:
    """NumPy reads all of a header, 4 GiB in version 2, before it looks at its length."""
    length = struct.pack("<I", 1 << 28) if version[0] == 2 else struct.pack("<H", 65535)
    content = b"\x93NUMPY" + version + length + bytes(1 << 28 if version[0] == 2 else 65535)
    text, most = peak(zipped(tmp_path / "a.npz", ("x.npy", content)))
    assert text.startswith("damaged .npz file: EOF: reading array header")
    assert most < 8 << 20


def test_header_of_safetensors(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    text = b"{" + b" " * (5 << 20) + b"}"
    (tmp_path / "a").write_bytes(len(text).to_bytes(8, "little") + text)
    assert "a header of 5242882 bytes, more than 4194304" in refusal(tmp_path / "a")


@pytest.mark.parametrize("chunk", [1 << 10, 1 << 26])
def test_numbers_of_hdf5(tmp_path: Path, chunk: int) -> None:
    """A few kilobytes of gzip; the chunks are small or all there is."""
    with h5py.File(tmp_path / "a.h5", "w") as file:
        settings = {"chunks": (chunk,), "compression": "gzip", "fillvalue": 0}
        file.create_dataset("x", shape=(1 << 26,), dtype="u1", **settings)
    assert refusal(tmp_path / "a.h5") == f"holds more than {1 << 25} numbers, which are not read"
    with h5py.File(tmp_path / "b.h5", "w") as file:
        file.create_dataset("x", shape=(4,), maxshape=(None,), dtype="f4", chunks=(1 << 28,))
    assert refusal(tmp_path / "b.h5") == (
        "x has pieces of more than 268435456 bytes, which are not read"
    )


def test_only_what_is_wanted_is_read(tmp_path: Path) -> None:
    path = zipped(
        tmp_path / "a.npz", ("a/x.npy", npy((2,), b"ab")), ("b.npy", b"junk"), ("x.npy", b"")
    )
    with pytest.raises(FileRefused, match="damaged"):
        foreign.read(path, ["x"])
    zipped(path, ("a/x.npy", npy((2,), b"ab")), ("b.npy", b"junk"))
    assert list(foreign.read(path, ["x"])) == ["a/x"]
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["a/x"] = np.arange(3, dtype=">i2")
        file["b"] = "text"
    ((name, (kind, value)),) = foreign.read(tmp_path / "a.h5", ["x"]).items()
    assert (name, kind, value.tolist(), value.dtype.str) == ("a/x", "int16", [0, 1, 2], "<i2")


# --- the child ------------------------------------------------------------------------------------


def played(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: str) -> str:
    """The refusal when the child runs this code."""
    script = tmp_path / "child.py"
    script.write_text(f"import os, signal, sys, time\n{code}\n")
    monkeypatch.setattr(foreign, "_CHILD", script)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["x"] = np.ones(3)
    return refusal(tmp_path / "a.h5")


def answer(header: Any, data: bytes = b"") -> str:
    text = json.dumps(header).encode()
    return f"sys.stdout.buffer.write({len(text).to_bytes(8, 'little') + text + data!r})"


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("os.kill(os.getpid(), signal.SIGSEGV)", "its reader gave no answer (killed by SIGSEGV): "),
        ("os.abort()", "its reader gave no answer (killed by SIGABRT): "),
        ("sys.exit(3)", "its reader gave no answer (exit code 3): "),
        ("pass", "its reader gave no answer (exit code 0): "),
        ("print('no answer')", "its reader gave no answer"),
        (answer([]), "its reader gave no answer"),
        (answer({"arrays": [["x", "float64", [3]]]}, bytes(23)), "its reader gave no answer"),
        (
            answer({"arrays": [["x", "float64", [1 << 40]]]}, bytes(24)),
            "its reader gave no answer",
        ),
        (
            answer({"arrays": [["x", "float64", [-1, -3]]]}, bytes(24)),
            "its reader gave no answer",
        ),
        (answer({"arrays": [["x", "O", [3]]]}, bytes(24)), "its reader gave no answer"),
        (answer({"arrays": [["x", "S", [3]]]}, bytes(24)), "its reader gave no answer"),
        (answer({"arrays": [["x", "!", [3]]]}, bytes(24)), "its reader gave no answer"),
        (answer({"refused": "because"}), "because"),
        ("while True: sys.stdout.buffer.write(bytes(1 << 16))", "its reader gave no answer"),
    ],
)
def test_what_the_child_does_is_a_refusal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, reason: str
) -> None:
    assert played(monkeypatch, tmp_path, code).startswith(reason)


def test_a_child_that_waits_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foreign, "PATIENCE", 0.01)
    start = time.monotonic()
    assert "killed by SIGKILL" in played(monkeypatch, tmp_path, "time.sleep(600)")
    assert time.monotonic() - start < 300


@pytest.mark.parametrize(
    ("work", "end"),
    [("bytearray(1 << 30)", 1), ("[bytearray(1 << 20) for _ in range(1000)]", 1),
     ("\nwhile True: pass", (-9, -24)), ("bytearray(1 << 20)", 0)],
)  # fmt: skip
def test_limits_of_the_child(work: str, end: Any) -> None:
    code = f"from npdrt.store import child; child._limit(64 << 20, 1); {work}"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode in (end if isinstance(end, tuple) else (end,)), found.stderr
    assert end != 1 or "MemoryError" in found.stderr


def test_the_child_runs_nothing_of_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither modules of the working directory or next to the script, nor plug-ins."""
    monkeypatch.setattr(foreign, "_CHILD", tmp_path / "child.py")
    shutil.copy(child.__file__, tmp_path / "child.py")
    for name in ("h5py", "numpy", "json"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')")
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["x"] = np.ones(3)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HDF5_PLUGIN_PATH", str(tmp_path))
    assert foreign.read(tmp_path / "a.h5")["x"][1].tolist() == [1, 1, 1]
    assert not (tmp_path / "run").exists()
    assert "HDF5_PLUGIN_PATH" not in foreign._environment()
    assert foreign._environment()["HDF5_PLUGIN_PRELOAD"] == "::"


# --- the container of version 1 -------------------------------------------------------------------


def seal(path: Path, image: bytes, version: int = 1) -> Path:
    """Put the header of version 1 before an image, with the right digest."""
    sha = hashlib.sha256(image).digest()
    header = struct.pack("<8sQ32sI", b"NPDRTCK1", len(image), sha, version)
    path.write_bytes(header.ljust(512, b"\0") + image)
    return path


def envelope(*order: str, meta: Any = ()) -> bytes:
    return json.dumps({"format": 1, "meta": dict(meta), "order": list(order)}).encode()


def hdf5_image(build: Callable[[h5py.File], Any], meta: bytes | None, **settings: Any) -> bytes:
    buffer = io.BytesIO()
    with h5py.File(buffer, "w", **{"libver": "v110", "userblock_size": 512, **settings}) as file:
        build(file)
        if meta is not None:
            file.create_dataset("meta", data=np.frombuffer(meta, np.uint8))
    return buffer.getvalue()[512:]


def fill(file: h5py.File) -> None:
    for name in sorted(ARRAYS):
        file.create_dataset(name, data=ARRAYS[name], track_times=False)


def old(path: Path) -> Path:
    """A file of version 1."""
    return seal(path, hdf5_image(fill, envelope(*ARRAYS, meta=META)))


def convert(*words: object) -> Result:
    return CliRunner().invoke(cli, ["convert", *map(str, words)])


def test_convert_a_file(tmp_path: Path) -> None:
    before = old(tmp_path / "old.h5").read_bytes()
    assert convert(tmp_path / "old.h5", tmp_path / "new.h5").output.endswith(": 1 converted\n")
    found, meta = container.read(tmp_path / "new.h5")
    assert meta == META
    assert list(found) == list(ARRAYS)
    for name, value in ARRAYS.items():
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape)
        assert found[name].tobytes() == value.tobytes()
    assert (tmp_path / "old.h5").read_bytes() == before
    container.write(tmp_path / "direct.h5", ARRAYS, META)
    assert (tmp_path / "new.h5").read_bytes() == (tmp_path / "direct.h5").read_bytes()


def test_convert_a_directory(tmp_path: Path) -> None:
    run, made = tmp_path / "run", tmp_path / "made"
    (run / "snapshots").mkdir(parents=True)
    old(run / "checkpoint.h5")
    old(run / "snapshots" / "step-000002.h5")
    (run / "log.jsonl").write_text("{}\n")
    container.write(run / "trace.h5", {"a": np.ones(1)}, {"kind": "trace"})
    assert convert(run, made).output == f"{made}: 2 converted\n"
    assert container.read(made / "snapshots" / "step-000002.h5")[1] == META
    for same in ("log.jsonl", "trace.h5"):
        assert (made / same).read_bytes() == (run / same).read_bytes()
    (run / "checkpoint.h5").write_bytes((run / "checkpoint.h5").read_bytes() + b"?")
    result = convert(run, tmp_path / "none")
    assert (result.exit_code, (tmp_path / "none").exists()) == (3, False)
    assert f"{run / 'checkpoint.h5'}: is damaged" in result.output


def test_what_is_not_converted(tmp_path: Path) -> None:
    path = old(tmp_path / "old.h5")
    assert convert(tmp_path / "none", tmp_path / "x").exit_code == 2
    result = convert(path, path)
    assert (result.exit_code, "already exists" in result.output) == (2, True)
    container.write(tmp_path / "new.h5", ARRAYS, META)
    result = convert(tmp_path / "new.h5", tmp_path / "x")
    assert (result.exit_code, "has format version 2 already" in result.output) == (3, True)
    path.write_bytes(b"text")
    result = convert(path, tmp_path / "x")
    assert (result.exit_code, "not a container of version 1" in result.output) == (3, True)
    seal(path, hdf5_image(lambda file: file.__setitem__("a b", np.ones(4)), envelope("a b")))
    result = convert(path, tmp_path / "x")
    assert (result.exit_code, "array name 'a b' cannot be stored" in result.output) == (3, True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new.h5", "old.h5"]


def plain(file: h5py.File) -> None:
    file["a"] = np.arange(4, dtype="<f4")


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


def odd_float(file: h5py.File) -> None:
    kind = h5py.h5t.IEEE_F32LE.copy()
    kind.set_ebias(126)
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


def dataset_attribute(file: h5py.File) -> None:
    plain(file)
    file["a"].attrs["x"] = np.void(b"cos\nsystem\n")


def raw_name(file: h5py.File) -> None:
    space = h5py.h5s.create_simple((4,))
    h5py.h5d.create(file.id, b"\xff\xfe", h5py.h5t.IEEE_F32LE, space)


def assign(name: str, value: Any) -> Callable[[h5py.File], Any]:
    return lambda file: file.__setitem__(name, value)


def put(name: str, **settings: Any) -> Callable[[h5py.File], Any]:
    return lambda file: file.create_dataset(name, **settings)


TYPE = "'a' is not an array of an allowed type"
PIECE = "'a' is not stored in one piece in the file itself"
LINK = "is a soft, external or user-defined link"
EXTRA = "has attributes or several links"
HOSTILE: dict[str, tuple[Callable[[h5py.File], Any], str]] = {
    "external storage": (
        put("a", shape=(4,), dtype="<f4", external=[("/etc/passwd", 0, 16)]),
        PIECE,
    ),
    "soft link": (assign("a", h5py.SoftLink("/meta")), LINK),
    "external link": (assign("a", h5py.ExternalLink("/etc/passwd", "/a")), LINK),
    "virtual dataset": (virtual, PIECE),
    "chunked": (put("a", shape=(4,), dtype="<f4", chunks=(2,)), PIECE),
    "compact": (compact, PIECE),
    "late allocation bomb": (
        lambda file: late(file, (1 << 40,)),
        f"needs {1 << 42} bytes, which are not there",
    ),
    "null space": (assign("a", h5py.Empty("<f4")), TYPE),
    "gzip": (put("a", data=np.ones(4, "<f4"), chunks=(4,), compression="gzip"), PIECE),
    "variable length": (put("a", shape=(2,), dtype=h5py.vlen_dtype(np.int32)), TYPE),
    "reference": (put("a", shape=(2,), dtype=h5py.ref_dtype), TYPE),
    "big-endian": (put("a", data=np.ones(4, ">f4")), TYPE),
    "compound": (put("a", data=np.ones(4, "<f4,<f4")), TYPE),
    "boolean": (put("a", data=np.ones(4, bool)), TYPE),
    "float of another bias": (odd_float, TYPE),
    "alias": (alias, EXTRA),
    "cycle": (cycle, EXTRA),
    "attribute on a group": (group_attribute, EXTRA),
    "attribute on a dataset": (dataset_attribute, EXTRA),
    "empty group": (lambda file: file.create_group("g"), "'g/' is an empty group"),
    "name that is no text": (raw_name, "codec"),
    "depth 9": (assign("/".join("abcdefghi"), np.ones(4)), "deeper than 8"),
    "member not in order": (assign("z", np.ones(4)), "its order and its members differ"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_version_1(tmp_path: Path, case: str) -> None:
    """As `child` reads it, here in this process: none of these crashes libhdf5."""
    build, reason = HOSTILE[case]
    path = seal(tmp_path / "a.h5", hdf5_image(build, envelope("a")))
    with pytest.raises((child.Refused, UnicodeDecodeError), match=reason):
        child.version_1(path.read_bytes(), {})


# --- fuzz -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("what", "count"), [("containers", 400), ("recordings", 40)])
def test_forged_files(what: str, count: int) -> None:
    """See `fuzz_files.py`, which reads as many as you like."""
    pytest.importorskip("safetensors")
    words = [sys.executable, str(ROOT / "tests" / "fuzz_files.py"), what, str(count), "7"]
    found = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
    assert found.returncode == 0, found.stderr
    result = json.loads(found.stdout)
    assert sum(result["counts"].values()) == count
    assert len(result["counts"]) > 4
    assert result["peak_bytes"] < 1 << 30
