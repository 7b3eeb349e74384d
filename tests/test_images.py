"""Images: CIFAR in both versions, folders of JPEG, crops and flips, batches made ahead, and that
training on them resumes to the same bits."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import io
import os
import pickle
import re
import signal
import struct
import subprocess
import sys
import tarfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import npdrt.train.feed
from npdrt import data, store
from npdrt.cli import cli
from npdrt.data import Ahead, archive, augment, catalogue, cifar, decode, folder, scale, unpickle
from npdrt.data.catalogue import File, Form
from npdrt.data.images import Stored, unscaled
from npdrt.errors import Error, FileRefused, Unavailable
from npdrt.random import Random
from npdrt.store import log
from npdrt.train import Config, Reporter, resume, train

ROOT = Path(__file__).parents[1]
REAL = Path(os.environ.get("NPDRT_DATA", "nowhere"))
BINARY = REAL / "cifar-10" / "cifar-10-batches-bin"
real_cifar = pytest.mark.skipif(
    not BINARY.is_dir(), reason="needs cifar-10 in the folder NPDRT_DATA names"
)


@pytest.fixture(autouse=True)
def _no_data_of_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("NPDRT_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("npdrt.train.provenance.git_state", lambda: None)


# --- CIFAR files -----------------------------------------------------------------------------

RECORDS = 6
FILE = File(role="train", name="a", hash="", records=RECORDS)


def pixels(purpose: str, n: int = RECORDS) -> np.ndarray:
    words = Random(1, f"test/{purpose}").words(n * 384)
    return words.view(np.uint8).reshape(n, 3072).copy()


def binary(purpose: str = "a", classes: int = 10, n: int = RECORDS) -> bytes:
    """A file of the binary version."""
    names = {10: [10], 100: [20, 100]}[classes]
    labels = [np.arange(n, dtype=np.uint8)[:, None] * 7 % limit for limit in names]
    return np.hstack([*labels, pixels(purpose, n)]).astype(np.uint8).tobytes()


class Python2(pickle._Pickler):  # type: ignore[misc]
    """Pickles as Python 2 wrote the published files: protocol 2, all text as byte strings."""

    dispatch = dict(pickle._Pickler.dispatch)  # type: ignore[attr-defined]  # noqa: RUF012

    def save_text(self, text: Any) -> None:
        raw = text.encode("latin-1") if isinstance(text, str) else text
        short = len(raw) < 256
        size = bytes([len(raw)]) if short else struct.pack("<i", len(raw))
        self.write((b"U" if short else b"T") + size + raw)
        self.memoize(text)

    dispatch[str] = dispatch[bytes] = save_text


def pickled(value: Any) -> bytes:
    out = io.BytesIO()
    Python2(out, protocol=2).dump(value)
    return out.getvalue().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")


def structure(purpose: str = "a", classes: int = 10, n: int = RECORDS) -> dict[str, Any]:
    """What a file of the Python version holds."""
    raw = np.frombuffer(binary(purpose, classes, n), np.uint8).reshape(n, -1)
    names = {10: ["labels"], 100: ["coarse_labels", "fine_labels"]}[classes]
    labels = {name: raw[:, i].tolist() for i, name in enumerate(names)}
    return {
        "batch_label": "training batch 1 of 5",
        **labels,
        "data": raw[:, len(names) :].copy(),
        "filenames": [f"leptodactylus_s_{i:06d}.png" for i in range(n)],
    }


def written(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "a"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("classes", [10, 100])
def test_both_versions_of_cifar_are_the_same(classes: int, tmp_path: Path) -> None:
    one = cifar.read_binary(written(tmp_path, binary("a", classes)), FILE, classes)
    other = cifar.read_python(written(tmp_path, pickled(structure("a", classes))), FILE, classes)
    assert one[0].shape == (RECORDS, 3, 32, 32)
    assert one[0].dtype == np.uint8
    assert one[1].tolist() == [i * 7 % classes for i in range(RECORDS)]  # the fine ones of 100
    np.testing.assert_array_equal(one[0].reshape(RECORDS, -1), pixels("a"))
    np.testing.assert_array_equal(one[0], other[0])
    np.testing.assert_array_equal(one[1], other[1])


def test_the_test_files_are_like_the_published_ones() -> None:
    """The first bytes of the real data_batch_1, and only instructions of that protocol."""
    raw = pickled(structure())
    assert raw.startswith(
        b"\x80\x02}q\x00(U\x0bbatch_labelq\x01U\x15training batch 1 of 5q\x02U\x06labels"
    )
    assert b"cnumpy.core.multiarray\n_reconstruct\n" in raw
    assert pickle.loads(raw, encoding="bytes")[b"labels"] == [0, 7, 4, 1, 8, 5]


def test_protocols_0_and_1_and_the_name_in_numpy_2() -> None:
    simple = {b"labels": [1, -2, 300, 70000], b"names": [b"a", b"b"]}
    for protocol in (0, 1, 2):
        out = io.BytesIO()
        pickler = Python2(out, protocol=protocol)
        if protocol == 0:
            pickler.dispatch = {**Python2.dispatch, bytes: save_quoted}
        pickler.dump(simple)
        assert unpickle.read_pickle(out.getvalue(), "a") == simple
    new = pickled(structure()).replace(b"numpy.core.", b"numpy._core.")
    np.testing.assert_array_equal(unpickle.read_pickle(new, "a")[b"data"], pixels("a"))


def save_quoted(pickler: Any, raw: bytes) -> None:
    """Python 2's protocol 0."""
    pickler.write(b"S'" + raw + b"'\n")
    pickler.memoize(raw)


def test_fortran_order_is_understood() -> None:
    found = unpickle.read_pickle(pickled({"data": np.asfortranarray(pixels("a"))}), "a")
    np.testing.assert_array_equal(found[b"data"], pixels("a"))


GZIP = gzip.compress(binary())
SIZE = RECORDS * 3073
BAD_BINARY = {
    "empty": (b"", f"expected {SIZE} bytes, 6 records of 3073; found an empty file"),
    "short": (binary()[:-1], f"expected {SIZE} bytes, .*; found {SIZE - 1}$"),
    "a record less": (binary(n=5), "found 15365"),
    "long": (binary() + b"\0", "found more$"),
    "gzip": (GZIP, r"found more|found \d+: gzip data, to be unpacked first"),
    "html": (b"<html>not found</html>", "found 22"),
    "label": (b"\x0a" + binary()[1:], r"expected labels 0 to 9; found 10 \(record 0\)"),
    "later label": (
        binary()[: 3073 * 4] + b"\xff" + binary()[3073 * 4 + 1 :],
        r"expected labels 0 to 9; found 255 \(record 4\)",
    ),
    "the Python version": (pickled(structure()), "found more"),
}


@pytest.mark.parametrize("what", BAD_BINARY)
def test_bad_binary_is_refused(what: str, tmp_path: Path) -> None:
    content, message = BAD_BINARY[what]
    path = written(tmp_path, content)
    with pytest.raises(FileRefused, match=f"^{re.escape(str(path))}: .*{message}"):
        cifar.read_binary(path, FILE, 10)


def test_labels_of_cifar_100_are_both_checked(tmp_path: Path) -> None:
    good = binary(classes=100)
    for content, message in [
        (b"\x14" + good[1:], "expected coarse labels 0 to 19; found 20"),
        (good[:1] + b"\x64" + good[2:], "expected fine labels 0 to 99; found 100"),
    ]:
        with pytest.raises(FileRefused, match=message):
            cifar.read_binary(written(tmp_path, content), FILE, 100)


def test_unreadable_files_are_refused(tmp_path: Path) -> None:
    for read in (cifar.read_binary, cifar.read_python):
        with pytest.raises(FileRefused, match="does not exist"):
            read(tmp_path / "gone", FILE, 10)
        with pytest.raises(FileRefused, match="is not a regular file"):
            read(tmp_path, FILE, 10)


def changed(**changes: Any) -> bytes:
    return pickled({k: v for k, v in {**structure(), **changes}.items() if v is not None})


BAD_PYTHON = {
    "empty": (b"", "expected a pickle of 6 images; found an empty file"),
    "gzip": (gzip.compress(changed()), "gzip data, to be unpacked first"),
    "cut": (changed()[:-40], "damaged pickle"),
    "no stop": (changed()[:-1], "damaged pickle: pickle exhausted before seeing STOP"),
    "no data": (changed(data=None), r"expected b'data' as bytes of shape \(6, 3072\); .*NoneType"),
    "list": (changed(data=[1, 2]), "expected b'data' as bytes .* found list"),
    "few": (changed(data=pixels("a", 5)), r"shape \(6, 3072\); found \(5, 3072\)"),
    "narrow": (changed(data=pixels("a")[:, :-1].copy()), r"found \(6, 3071\)"),
    "floats": (
        changed(data=pixels("a", 1) * 0.5),
        "REDUCE with another call than an array of bytes",
    ),
    "objects": (changed(data=np.array([b"a", 1], object)), "REDUCE with another call"),
    "no labels": (changed(labels=None), "expected b'labels' as a list of integers"),
    "text": (changed(labels=["a"] * 6), "expected b'labels' as a list of integers"),
    "bool": (changed(labels=[True] * 6), "expected b'labels' as a list of integers"),
    "short": (changed(labels=[0] * 5), "expected 6 of b'labels'; found 5"),
    "label": (changed(labels=[0, 1, 10, 0, 0, 0]), r"labels 0 to 9; found 10 \(record 2\)"),
    "negative": (changed(labels=[-5] * 6), r"expected labels 0 to 9; found -1 \(record 0\)"),
    "a giant": (changed(labels=[1 << 80] * 6), "opcode LONG1|expected labels 0 to 9"),
    "a list": (pickled([1]), "damaged pickle: expected a dict; found list"),
    "two": (b"\x80\x02}}.", "damaged pickle"),
    "protocol 4": (pickle.dumps({b"a": b"b"}, protocol=4), "opcode PROTO 4 at byte 0"),
    "unicode": (pickle.dumps({"data": 1}, protocol=2), "opcode BINUNICODE at byte"),
    "no keys": (b"\x80\x02}(K\x01K\x02u.", "keys that are not byte strings"),
    "no list": (b"\x80\x02K\x01K\x02a.", "items for a value that is not a list"),
    "mark": (b"\x80\x02}u.", "damaged pickle: a mark is missing"),
    "stack": (b"\x80\x02\x87.", "damaged pickle: the stack is empty"),
    "memo": (b"\x80\x02h\x05.", "damaged pickle: 5"),
    "itself": (b"\x80\x02}(U\x06labels]q\x00h\x00a\x75.", "expected b'data'"),
    "frame": (b"\x80\x02\x95" + b"\xff" * 8 + b".", "damaged pickle|opcode FRAME"),
    "long text": (b"\x80\x02T\xff\xff\xff\x7fab.", "damaged pickle"),
    "dup": (b"\x80\x02}2.", "opcode DUP at byte 3"),
}


@pytest.mark.parametrize("what", BAD_PYTHON)
def test_bad_pickles_are_refused(what: str, tmp_path: Path) -> None:
    content, message = BAD_PYTHON[what]
    path = written(tmp_path, content)
    with pytest.raises(FileRefused, match=f"^{re.escape(str(path))}: .*({message})"):
        cifar.read_python(path, FILE, 10)


class Runs:
    """Its pickle calls a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def malicious(path: str) -> dict[str, bytes]:
    """Pickles that would make the file `path` if they were run."""
    touch = f"touch {path}"
    made = {
        "system": pickled(Runs(os.system, touch)),
        "inside": changed(labels=[Runs(os.system, touch)] * 6),
        "as data": changed(data=Runs(os.mkdir, path)),
        "eval": changed(data=Runs(eval, f"open({path!r}, 'w')")),
        "popen": changed(filenames=Runs(subprocess.Popen, [touch])),
        "protocol 0": b"cos\nsystem\n(S'" + touch.encode() + b"'\ntR.",
        "inst": b"(S'" + touch.encode() + b"'\nios\nsystem\n.",
        "obj": b"(cos\nsystem\nS'" + touch.encode() + b"'\no.",
        "newobj": b"\x80\x02cnumpy\nndarray\nK\x01\x85\x81.",
        "stack global": b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x01a\x85R.",
        "persistent": b"\x80\x02U\x01aQ.",
        "extension": b"\x80\x02\x82\x01.",
        "getattr": b"\x80\x02c__builtin__\ngetattr\n.",
        "other numpy": b"\x80\x02cnumpy.core.multiarray\nfromfile\n.",
        "ndarray": b"\x80\x02cnumpy\nndarray\nK\x01\x85R.",
        "build": b"\x80\x02cnumpy\nndarray\n}U\x01aK\x01sb.",
    }
    return made


@pytest.mark.parametrize("what", malicious("x"))
def test_malicious_pickles_are_refused_and_not_run(what: str, tmp_path: Path) -> None:
    pwned = tmp_path / "pwned"
    path = written(tmp_path, malicious(str(pwned))[what])
    expected = (
        "opcode (GLOBAL naming|INST|OBJ|NEWOBJ|BINPERSID|EXT1|PROTO 4|REDUCE|BUILD).* at byte"
    )
    with pytest.raises(FileRefused, match=f"{expected} .*nothing of this file was run"):
        cifar.read_python(path, FILE, 10)
    assert not pwned.exists()


def test_the_malicious_pickles_would_run(tmp_path: Path) -> None:
    """Else the test above would show nothing."""
    pickle.loads(malicious(str(tmp_path / "pwned"))["system"])
    assert (tmp_path / "pwned").exists()


def mutate(content: bytes, changes: list[tuple[int, int]], cut: int | None) -> bytes:
    out = bytearray(content)
    for place, value in changes:
        out[place % len(out)] = value
    return bytes(out if cut is None else out[: cut % len(out)])


mutations = st.tuples(
    st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=6),
    st.none() | st.integers(0, 10**6),
)
scratch = settings(
    max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@cache
def small_pickle() -> bytes:
    """A file of two images."""
    return pickled(structure(n=2))


def test_an_escape_that_python_warns_of_is_read() -> None:
    """Python decodes it with a DeprecationWarning, which does not mean damage."""
    assert unpickle.read_pickle(b"(dp0\nS'a\\d'\nI3\ns.", "a") == {b"a\\d": 3}


@scratch
@given(mutations, st.booleans())
def test_a_damaged_pickle_never_raises_anything_else(
    tmp_path: Path, mutation: Any, early: bool
) -> None:
    """Bytes changed anywhere, or only where the instructions are; images may change unseen."""
    changes, cut = mutation
    raw = small_pickle()
    tail = len(raw) - 90
    places = [(p % 260 if p % 2 else tail + p % 90, v) if early else (p, v) for p, v in changes]
    path = written(tmp_path, mutate(raw, places, cut))
    try:
        images, labels, _ = cifar.read_python(path, dataclasses.replace(FILE, records=2), 10)
    except FileRefused:
        return
    assert (images.shape, labels.shape) == ((2, 3, 32, 32), (2,))
    assert set(labels.tolist()) <= set(range(10))


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from([
    b"}", b"]", b")", b"(", b"K\x01", b"M\x01\x02", b"J\xff\xff\xff\xff", b"N", b"\x88", b"\x89",
    b"q\x00", b"h\x00", b"a", b"e", b"s", b"u", b"t", b"\x85", b"\x86", b"\x87", b"l", b"d",
    b"U\x02u1", b"U\x01b", b"U\x01|", b"R", b"b", b"cnumpy\nndarray\n", b"cnumpy\ndtype\n",
    b"cnumpy.core.multiarray\n_reconstruct\n", b"I5\n", b"L7L\n", b"S'a'\n", b".",
]), max_size=60))  # fmt: skip
def test_random_programs_never_raise_anything_else(parts: list[bytes]) -> None:
    try:
        found = unpickle.read_pickle(b"\x80\x02" + b"".join(parts) + b".", "a")
    except FileRefused:
        return
    assert type(found) is dict


@scratch
@given(mutations)
def test_a_damaged_binary_file_is_refused_or_has_all_its_records(
    tmp_path: Path, mutation: Any
) -> None:
    path = written(tmp_path, mutate(binary(n=2), *mutation))
    try:
        images, labels, _ = cifar.read_binary(path, dataclasses.replace(FILE, records=2), 10)
    except FileRefused:
        return
    assert images.shape == (2, 3, 32, 32)
    assert labels.max() < 10


# --- CIFAR as a data set ---------------------------------------------------------------------


def toml(classes: int = 10, mirror: str = "http://127.0.0.1:9/") -> str:
    """A catalogue with a CIFAR-10 of two training batches of six images, in both forms."""
    digest = {p: hashlib.sha256(binary(p, classes)).hexdigest() for p in "abt"}
    files = "".join(
        f'{{ role = "{role}", name = "{name}.bin", bytes = {len(binary("a", classes))}, '
        f'records = 6, hash = "sha256:{digest[p]}" }},'
        for role, name, p in (("train", "b1", "a"), ("train", "b2", "b"), ("test", "t", "t"))
    )
    pickles = "".join(
        f'{{ role = "{role}", name = "{name}", records = 6, hash = "md5:0" }},'
        for role, name in (("train", "b1"), ("train", "b2"), ("test", "t"))
    )
    size, sha = len(tar()), hashlib.sha256(tar()).hexdigest()
    return f"""
        [cifar-10]
        what = "small"
        licence = "none"
        citation = "none"
        image = [3, 32, 32]
        classes = {classes}
        scale = {{ divisor = 255.0, mean = [0.5, 0.4, 0.3], std = [0.25, 0.2, 0.125] }}
        scales.fromage = {{ divisor = 255.0, mean = [0.5, 0.4, 0.3], std = [1.0, 1.0, 1.0] }}
        mirrors = ["{mirror}"]
        [[cifar-10.forms]]
        reader = "cifar-binary"
        folder = "bin"
        archive = {{ name = "c.tar.gz", bytes = {size}, hash = "sha256:{sha}" }}
        files = [{files}]
        [[cifar-10.forms]]
        reader = "cifar-python"
        folder = "py"
        files = [{pickles}]
    """


@cache
def tar(**replaced: Any) -> bytes:
    """The archive of the small CIFAR-10."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as made:
        for name, content in {
            "bin/readme.html": b"<html>",
            **{f"bin/{n}.bin": binary(p) for n, p in (("b1", "a"), ("b2", "b"), ("t", "t"))},
        }.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            made.addfile(info, io.BytesIO(content))
    return out.getvalue()


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """The catalogue, and the binary files under tmp_path/cifar-10/bin."""
    (tmp_path / "cifar-10" / "bin").mkdir(parents=True)
    for name, purpose in (("b1", "a"), ("b2", "b"), ("t", "t")):
        (tmp_path / "cifar-10" / "bin" / f"{name}.bin").write_bytes(binary(purpose))
    (tmp_path / "small.toml").write_text(toml())
    return tmp_path / "small.toml"


def load(catalogue_file: Path, **options: Any) -> data.Dataset:
    return data.load(
        "cifar-10", data_dir=catalogue_file.parent, catalogue=catalogue_file, **options
    )


def test_cifar(small: Path) -> None:
    found = load(small)
    assert (len(found.x), found.x.shape, found.x_test.shape) == (
        12,
        (12, 3, 32, 32),
        (6, 3, 32, 32),
    )
    assert (found.classes, found.outputs, found.image_shape) == (10, 10, (3, 32, 32))
    assert (found.notes, found.x.dtype, found.y.dtype) == ((), np.float32, np.int64)
    assert list(found.digests) == ["b1.bin", "b2.bin", "t.bin"]
    raw = np.vstack([pixels("a"), pixels("b")]).reshape(12, 3, 32, 32)
    exact = (raw / 255.0 - np.reshape([0.5, 0.4, 0.3], (3, 1, 1))) / np.reshape(
        [0.25, 0.2, 0.125], (3, 1, 1)
    )
    np.testing.assert_array_equal(found.x[:], exact.astype(np.float32))
    np.testing.assert_array_equal(found.x[3], exact[3].astype(np.float32))
    np.testing.assert_array_equal(found.x[2:5, ...], exact[2:5].astype(np.float32))
    np.testing.assert_array_equal(found.x[np.array([7, 1])], exact[[7, 1]].astype(np.float32))
    assert found.x.raw.nbytes == raw.size  # a byte a value
    with pytest.raises(IndexError):
        found.x[12]


@pytest.mark.parametrize(
    ("standardise", "low", "high"),
    [(False, 0.0, 255.0), ("unit", 0.0, 1.0), ("symmetric", -1.0, 1.0), ("fromage", -0.5, 0.7)],
)
def test_standardisations(standardise: Any, low: float, high: float, small: Path) -> None:
    x = load(small, standardise=standardise).x[:]
    assert (x.min(), x.max()) == (np.float32(low), np.float32(high))


def test_unknown_standardisation(small: Path, tmp_path: Path) -> None:
    with pytest.raises(Error, match=r"cifar-10 has no standardisation 'x'; use .* unit, symmetric"):
        load(small, standardise="x")


@pytest.mark.parametrize(("dtype", "most"), [("uint8", 255), ("float32", 1.0)])
def test_pixels_of_a_file_have_named_standardisations(
    dtype: str, most: float, tmp_path: Path
) -> None:
    np.savez(tmp_path / "a.npz", x=np.array([[0, most]], dtype), y=np.zeros(1, np.int64))
    for name, expected in (("unit", [0.0, 1.0]), ("symmetric", [-1.0, 1.0])):
        x = data.load(tmp_path / "a.npz", standardise=name).x
        np.testing.assert_array_equal(x[0], np.array(expected, np.float32))
    with pytest.raises(Error, match=r"a.npz has no standardisation 'x'; use .* unit, symmetric"):
        data.load(tmp_path / "a.npz", standardise="x")


@pytest.mark.parametrize("x", [np.array([[0, 9]]), np.array([[0.0, 1.5]]), np.array([[-0.5, 1.0]])])
def test_other_numbers_are_not_pixels(x: Any, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=x, y=np.zeros(1, np.int64))
    with pytest.raises(Error, match="'unit' is for pixels, bytes or floats from 0 to 1; found"):
        data.load(tmp_path / "a.npz", standardise="unit")


def test_channels_are_scales() -> None:
    made = scale.from_constants(255.0, [0.1, 0.2], [1.0, 0.5])
    x = np.arange(2 * 2 * 3 * 3, dtype=np.uint8).reshape(2, 2, 3, 3)
    np.testing.assert_array_equal(made(x)[:, 1], scale.Scale(255.0, 0.2, 0.5)(x[:, 1]))
    np.testing.assert_array_equal(made(x), made(x.astype(np.float64)))


def python_version(root: Path) -> None:
    (root / "cifar-10" / "py").mkdir()
    for name, purpose in (("b1", "a"), ("b2", "b"), ("t", "t")):
        (root / "cifar-10" / "py" / name).write_bytes(pickled(structure(purpose)))


def test_the_python_version_is_read_where_there_is_no_other(small: Path, tmp_path: Path) -> None:
    expected = load(small)
    python_version(tmp_path)
    assert list(load(small).digests) == ["b1.bin", "b2.bin", "t.bin"]
    (tmp_path / "cifar-10" / "bin" / "b2.bin").unlink()  # the whole one goes before a part
    found = load(small)
    assert list(found.digests) == ["b1", "b2", "t"]
    np.testing.assert_array_equal(found.x.raw, expected.x.raw)
    np.testing.assert_array_equal(found.y, expected.y)
    np.testing.assert_array_equal(found.x_test[:], expected.x_test[:])


def test_a_part_of_the_training_set(small: Path, tmp_path: Path) -> None:
    (tmp_path / "cifar-10" / "bin" / "b1.bin").unlink()
    found = load(small)
    assert len(found.x) == 6
    (note,) = found.notes
    assert re.fullmatch(
        r"cifar-10: 6 of 12 training images; b1.bin not in .*/bin \(npdrt data fetch cifar-10\)",
        note,
    )
    (entry,) = data.listing(tmp_path, catalogue=small)
    assert (entry.where, entry.part) == (tmp_path / "cifar-10" / "bin", "2 of 3 files")
    checks = data.verify("cifar-10", tmp_path, catalogue=small)
    assert [check.status for check in checks] == ["missing", "ok", "ok"]
    (tmp_path / "cifar-10" / "bin" / "t.bin").unlink()
    with pytest.raises(Unavailable, match="not on this machine"):
        load(small)


def test_a_damaged_batch_is_named(small: Path, tmp_path: Path) -> None:
    path = tmp_path / "cifar-10" / "bin" / "b2.bin"
    path.write_bytes(path.read_bytes()[:-3000])
    with pytest.raises(FileRefused, match=f"^{path}: expected {SIZE} bytes"):
        load(small)


# --- the archive -----------------------------------------------------------------------------

FORM = Form(
    "cifar-binary",
    tuple(File("train", f"{n}.bin", "", bytes=len(binary())) for n in ("b1", "b2", "t")),
    folder="bin",
)


def packed(*members: tuple[str, Any]) -> bytes:
    """A .tar.gz of members: bytes, or changes of the header of an empty one."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as made:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if isinstance(content, bytes):
                info.size = len(content)
                made.addfile(info, io.BytesIO(content))
            else:
                info.type, info.linkname = content
                made.addfile(info)
    return out.getvalue()


def unpacked(tmp_path: Path, content: bytes) -> dict[str, bytes]:
    (tmp_path / "into").mkdir()
    path = tmp_path / "c.tar.gz"
    path.write_bytes(content)
    archive.unpack(path, FORM, tmp_path / "into")
    return {p.name: p.read_bytes() for p in (tmp_path / "into").iterdir()}


WHOLE = [(f"bin/{n}.bin", binary(p)) for n, p in (("b1", "a"), ("b2", "b"), ("t", "t"))]


def test_unpack_takes_the_files_and_nothing_else(tmp_path: Path) -> None:
    outside = tmp_path.parent / "npdrt-evil"
    strange = [
        ("../evil", b"x"), (str(outside), b"x"), ("bin/../../evil", b"x"), ("bin/other", b"x"),
        ("bin/link", (tarfile.SYMTYPE, "/etc/passwd")), ("dev", (tarfile.CHRTYPE, "")),
        ("bin", (tarfile.DIRTYPE, "")),
    ]  # fmt: skip
    found = unpacked(tmp_path, packed(*strange, *WHOLE, *strange))
    assert found == {name.removeprefix("bin/"): content for name, content in WHOLE}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.tar.gz", "into"]
    assert not outside.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (packed(*WHOLE[1:]), "c.tar.gz: lacks bin/b1.bin"),
        (
            packed(("bin/b1.bin", b"short"), *WHOLE[1:]),
            "bin/b1.bin: expected a plain file of 18438",
        ),
        (packed(("bin/b1.bin", (tarfile.SYMTYPE, "/etc/passwd"))), "expected a plain file"),
        (packed(("bin/b1.bin", (tarfile.LNKTYPE, "bin/t.bin"))), "expected a plain file"),
        (packed(("bin/b1.bin", (tarfile.DIRTYPE, ""))), "expected a plain file"),
        (packed(("big", bytes(1 << 25)), *WHOLE), "unpacks to more than its published files"),
        (b"", "damaged archive"),
        (b"no archive at all", "damaged archive"),
        (packed(*WHOLE)[:-2000], "damaged archive|lacks"),
        (gzip.compress(b"no tar" * 1000), "damaged archive"),
    ],
    ids=range(10),
)
def test_bad_archives_are_refused(content: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(FileRefused, match=message):
        unpacked(tmp_path, content)


@settings(max_examples=150, deadline=None)
@given(mutations, st.booleans())
def test_a_damaged_archive_never_raises_anything_else(mutation: Any, inside: bool) -> None:
    """Damage of the compressed bytes, and of the headers inside."""
    changes, cut = mutation
    whole = gzip.decompress(tar())
    headers = [(place % 512 + 512 * (place % 3), value) for place, value in changes]
    content = gzip.compress(mutate(whole, headers, cut)) if inside else mutate(tar(), changes, cut)
    folder_ = Path(os.environ["XDG_CACHE_HOME"]).parent / "fuzz"
    folder_.mkdir(exist_ok=True)
    path = folder_ / "c.tar.gz"
    path.write_bytes(content)
    try:
        archive.unpack(path, FORM, folder_)
    except FileRefused:
        return
    assert {p.name for p in folder_.iterdir()} <= {"c.tar.gz", "b1.bin", "b2.bin", "t.bin"}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, list[str]]]:
    """The archive on a local server; what was asked for."""
    import http.server

    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.send_header("Content-Length", str(len(tar())))
            self.end_headers()
            self.wfile.write(tar())

        def log_message(self, *args: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as made:
        thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{made.server_address[1]}/", asked
        made.shutdown()
        thread.join()


def test_fetch_of_an_archive(server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    url, asked = server
    (tmp_path / "small.toml").write_text(toml(mirror=url))
    where = tmp_path / "data"
    found = data.fetch("cifar-10", where, catalogue=tmp_path / "small.toml")
    assert found == where / "cifar-10" / "bin"
    assert {p.name: p.read_bytes() for p in found.iterdir()} == {
        name.removeprefix("bin/"): content for name, content in WHOLE
    }
    checks = data.verify("cifar-10", where, catalogue=tmp_path / "small.toml")
    assert [check.status for check in checks] == ["ok"] * 3
    assert data.fetch("cifar-10", where, catalogue=tmp_path / "small.toml") == found
    assert asked == ["/c.tar.gz"]
    (found / "b2.bin").write_bytes(b"damaged")
    data.fetch("cifar-10", where, catalogue=tmp_path / "small.toml")
    assert (found / "b2.bin").read_bytes() == binary("b")
    assert sorted(p.name for p in found.iterdir()) == ["b1.bin", "b2.bin", "t.bin"]


def test_an_archive_with_other_files_is_refused(
    server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    digest = hashlib.sha256(binary("b")).hexdigest()
    other = toml(mirror=server[0]).replace(digest, "0" * 64)
    (tmp_path / "small.toml").write_text(other)
    with pytest.raises(FileRefused, match=r"b2.bin: expected sha256:0000.*; found sha256:"):
        data.fetch("cifar-10", tmp_path / "data", catalogue=tmp_path / "small.toml")
    assert not list((tmp_path / "data" / "cifar-10" / "bin").iterdir())


def test_the_catalogue_names_cifar() -> None:
    ten, hundred = catalogue.find("cifar-10"), catalogue.find("cifar-100")
    assert (ten.bytes, hundred.bytes) == (170052171, 168513733)
    assert all(f.bytes == f.records * 3073 for f in ten.forms[0].files)
    assert all(f.bytes == f.records * 3074 for f in hundred.forms[0].files)
    assert [sum(f.records for f in form.files) for form in ten.forms + hundred.forms] == [60000] * 4


# --- the real CIFAR-10 -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def real() -> data.Dataset:
    return data.load("cifar-10", data_dir=REAL)


@real_cifar
def test_real_cifar(real: data.Dataset) -> None:
    batches = sum((BINARY / f"data_batch_{n}.bin").is_file() for n in range(1, 6))
    assert real.x.shape == (batches * 10000, 3, 32, 32)
    assert np.bincount(real.y_test).tolist() == [1000] * 10
    assert real.y[:10].tolist() == [6, 9, 9, 4, 1, 1, 2, 7, 8, 3]
    first = hashlib.sha256(real.x.raw[0].tobytes()).hexdigest()
    assert first == hashlib.sha256((BINARY / "data_batch_1.bin").read_bytes()[1:3073]).hexdigest()
    assert real.x.raw[0, :, 0, 0].tolist() == [59, 62, 63]  # the frog's first pixel
    if batches < 5:
        assert f"{batches * 10000:,} of 50,000 training images" in real.notes[0]


MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


@real_cifar
def test_real_cifar_is_standardised(real: data.Dataset) -> None:
    """The published constants are those of all pixels, to four digits."""
    values = np.arange(256) / 255.0
    for c, (mean, std) in enumerate(zip(MEAN, STD, strict=True)):
        share = np.bincount(real.x.raw[:, c].ravel(), minlength=256) / real.x.raw[:, c].size
        assert share @ values == pytest.approx(mean, abs=0.003)
        assert share @ values**2 - (share @ values) ** 2 == pytest.approx(std**2, abs=0.001)
    own = (real.x.raw[:5000] / np.float32(255)).std((2, 3)).mean(0)  # each image's own, averaged
    np.testing.assert_allclose(own, [0.2023, 0.1994, 0.2010], atol=0.004)  # the Fromage authors'
    sample = real.x[:2000]
    np.testing.assert_allclose(sample.mean((0, 2, 3)), 0.0, atol=0.05)
    np.testing.assert_allclose(sample.std((0, 2, 3)), 1.0, atol=0.03)


@real_cifar
def test_real_files_verify() -> None:
    for check in data.verify("cifar-10", REAL):
        assert check.status in ("ok", "missing"), check
    result = CliRunner().invoke(cli, ["data", "list", "--data-dir", str(REAL)])
    assert re.search(r"cifar-10 +170\.1 +\S+", result.output)


@real_cifar
def test_real_batch_as_a_pickle(tmp_path: Path) -> None:
    """data_batch_1 converted as Python 2 would have written it: the same images and labels."""
    file = dataclasses.replace(FILE, records=10000)
    images, labels, _ = cifar.read_binary(BINARY / "data_batch_1.bin", file, 10)
    content = pickled({
        "batch_label": "training batch 1 of 5", "labels": labels.tolist(),
        "data": images.reshape(10000, 3072),
        "filenames": [f"leptodactylus_pentadactylus_s_{i:06d}.png" for i in range(10000)],
    })  # fmt: skip
    again = cifar.read_python(written(tmp_path, content), file, 10)
    np.testing.assert_array_equal(again[0], images)
    np.testing.assert_array_equal(again[1], labels)


# --- crops and flips -------------------------------------------------------------------------


def image_batch(n: int, channels: int = 3, height: int = 8, width: int = 6) -> np.ndarray:
    words = Random(2, "test/images").words(n * channels * height * width)
    return (words % 255 + 1).astype(np.uint8).reshape(n, channels, height, width)


def plain_crop_flip(image: np.ndarray, key: int, fill: float = 0.0) -> np.ndarray:
    """The definition, an image at a time."""
    choice = (int(key) >> 32) * 162 >> 32
    down, right = divmod(choice // 2, 9)
    padded = np.pad(image, ((0, 0), (4, 4), (4, 4)), constant_values=fill)
    out = padded[:, down : down + image.shape[1], right : right + image.shape[2]]
    return out[:, :, ::-1] if choice % 2 else out


def test_crop_flip_is_its_definition() -> None:
    images, keys = image_batch(400), Random(3, "test/keys").words(400)
    found = augment.crop_flip(images, keys)
    for image, key, out in zip(images, keys, found, strict=True):
        np.testing.assert_array_equal(out, plain_crop_flip(image, key))
    assert (found.shape, found.dtype, found.flags.c_contiguous) == (images.shape, np.uint8, True)


def keys_for(choice: int) -> np.ndarray:
    """A word that takes a choice: (down * 9 + right) * 2 + flip."""
    return np.array([(((choice << 32) + 161) // 162 + 1) << 32], np.uint64)


def test_every_crop_and_flip_can_be_taken() -> None:
    image = image_batch(1)
    for choice in range(162):
        found = augment.crop_flip(image, keys_for(choice))
        np.testing.assert_array_equal(found[0], plain_crop_flip(image[0], keys_for(choice)[0]))
    middle, mirrored = (augment.crop_flip(image, keys_for((4 * 9 + 4) * 2 + f)) for f in (0, 1))
    np.testing.assert_array_equal(middle, image)
    again = augment.crop_flip(mirrored, keys_for((4 * 9 + 4) * 2 + 1))
    np.testing.assert_array_equal(again, image)  # flipped twice


def test_all_places_and_flips_are_equally_likely() -> None:
    n = 162_000
    keys = Random(0, "data/augment", 7).words(n)
    counts = np.bincount(((keys >> np.uint64(32)) * np.uint64(162) >> np.uint64(32)).astype(int))
    assert len(counts) == 162
    chi = float(((counts - n / 162) ** 2 / (n / 162)).sum())
    assert 161 - 5 * 18 < chi < 161 + 5 * 18  # the variance of chi squared is 2 * 161


def test_the_border_is_black_before_standardisation(small: Path) -> None:
    """Padding the bytes with 0 and then standardising, as torchvision's order of transforms has
    it; and for numbers that are standardised already, padding with what 0 becomes."""
    found = load(small)
    keys = np.repeat(keys_for(0), 12)  # down 0, right 0: the border is at the top and left
    x = found.x.batch(np.arange(12), "crop-flip", keys)
    black = found.scale(np.zeros((12, 3, 4, 32), np.uint8))
    np.testing.assert_array_equal(x[:, :, :4], black)
    np.testing.assert_array_equal(x[:, :, 4:, 4:], found.x[:][:, :, :-4, :-4])


def test_bytes_and_numbers_are_cropped_to_the_same_bits(tmp_path: Path) -> None:
    images = image_batch(50, channels=1)
    np.savez(tmp_path / "a.npz", x=images, y=np.arange(50) % 3)
    found = data.load(tmp_path / "a.npz")
    keys, rows = Random(5, "test/keys").words(50), np.arange(50)
    numbers = found.images("crop-flip").batch(rows, "crop-flip", keys)
    stored = Stored(images, found.scale).batch(rows, "crop-flip", keys)
    np.testing.assert_array_equal(numbers, stored)
    raw = data.load(tmp_path / "a.npz", standardise=False)
    zeros = raw.images("crop-flip").batch(rows, "crop-flip", keys)
    np.testing.assert_array_equal(zeros, augment.crop_flip(images, keys).astype(np.float32))


def test_words_are_of_the_example_and_the_epoch() -> None:
    whole = augment.words(4, 2, 100, np.arange(100))
    np.testing.assert_array_equal(whole, Random(4, "data/augment", 2).words(100))
    np.testing.assert_array_equal(augment.words(4, 2, 100, np.array([7, 3])), whole[[7, 3]])
    np.testing.assert_array_equal(augment.words(4, 2, 60, np.arange(60)), whole[:60])
    assert not set(whole.tolist()) & set(augment.words(4, 3, 100, np.arange(100)).tolist())


def test_augment_needs_images(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.eye(4), y=np.arange(4))
    points = data.load(tmp_path / "a.npz")
    assert points.images() is None
    with pytest.raises(Error, match="augment crop-flip needs images; the examples of a are not"):
        points.images("crop-flip")
    with pytest.raises(Error, match="augment imagenet needs a folder of images; use crop-flip"):
        data.load("digits").images("imagenet")
    with pytest.raises(
        Error, match="unknown augment 'crop'; use one of none, flip, crop-flip, imagenet"
    ):
        points.images("crop")
    with pytest.raises(Error, match="unknown augment 'cropflip'; did you mean 'crop-flip'"):
        Config(augment="cropflip")


# --- RandomResizedCrop -----------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2**64 - 1), st.integers(1, 700), st.integers(1, 700))
def test_random_resized_crop_stays_inside(key: int, width: int, height: int) -> None:
    (left, top, right, bottom), flip = augment.random_resized_crop(key, width, height)
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    assert type(flip) is bool
    assert ((left, top, right, bottom), flip) == augment.random_resized_crop(key, width, height)


def test_random_resized_crop_is_spread_as_documented() -> None:
    keys = Random(1, "test/keys").words(4000).tolist()
    found = [augment.random_resized_crop(key, 1000, 1000) for key in keys]
    w = np.array([box[2] - box[0] for box, _ in found], float)
    h = np.array([box[3] - box[1] for box, _ in found], float)
    area, ratio = w * h / 1e6, np.log(w / h)
    assert 0.079 < area.min() < 0.09
    assert np.quantile(area, 0.25) == pytest.approx(0.08 + 0.25 * 0.92, abs=0.03)
    assert np.abs(ratio).max() < np.log(4 / 3) + 0.01
    assert np.mean(ratio) == pytest.approx(0.0, abs=0.01)
    assert np.std(ratio) == pytest.approx(np.log(4 / 3) / np.sqrt(3), rel=0.1)
    assert np.mean([flip for _, flip in found]) == pytest.approx(0.5, abs=0.03)
    left = np.array([box[0] for box, _ in found]) / np.maximum(1000 - w, 1)
    assert np.mean(left) == pytest.approx(0.5, abs=0.03)


def test_random_resized_crop_falls_back_to_the_middle() -> None:
    assert augment._middle(100, 10) == (43, 0, 56, 10)
    assert augment._middle(10, 100) == (0, 43, 10, 56)
    assert augment._middle(40, 40) == (0, 0, 40, 40)
    box, _ = augment.random_resized_crop(1, 4000, 1)  # no part with such a ratio fits
    assert box == (1999, 0, 2000, 1)  # round(4/3) = 1


def test_exp_of_the_ratio() -> None:
    x = np.linspace(-0.3, 0.3, 101)
    found = np.array([augment._exp(v) for v in x])
    np.testing.assert_allclose(found, np.exp(x), rtol=3e-16)


# --- folders of JPEG -------------------------------------------------------------------------

PIL = pytest.importorskip("PIL.Image", reason="needs Pillow")


def jpeg(
    shade: int = 0,
    size: tuple[int, int] = (40, 30),
    kind: str = "JPEG",
    mode: str = "RGB",
    **options: Any,
) -> bytes:
    """An image file: a smooth pattern that JPEG keeps nearly."""
    x, y = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
    planes = [(x * 3 + shade) % 256, (y * 4 + shade) % 256, (x + y + shade) % 256]
    image = PIL.fromarray(np.stack(planes, -1).astype(np.uint8)).convert(mode)
    out = io.BytesIO()
    image.save(out, kind, **({"quality": 95} if kind == "JPEG" else {}), **options)
    return out.getvalue()


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder of images: 6 cats and 5 dogs to train, 2 and 3 to validate."""
    for part, counts in (("train", {"cat": 6, "dog": 5}), ("val", {"cat": 2, "dog": 3})):
        for name, count in counts.items():
            place = tmp_path / "pets" / part / name
            place.mkdir(parents=True)
            for i in range(count):
                shade = 90 * (name == "dog") + 7 * i
                (place / f"{name}_{i}.JPEG").write_bytes(jpeg(shade, (40 + i, 30)))
    return tmp_path / "pets"


def test_folder(pictures: Path) -> None:
    (pictures / "train" / "cat" / "README.txt").write_text("passed over")
    (pictures / "train" / "cat" / ".hidden.jpg").write_text("passed over")
    (pictures / "train" / "classes.txt").write_text("passed over")
    found = data.load(f"folder-16:{pictures}")
    assert (found.x.shape, found.x_test.shape) == ((11, 3, 16, 16), (5, 3, 16, 16))
    assert found.y.tolist() == [0] * 6 + [1] * 5
    assert found.y_test.tolist() == [0, 0, 1, 1, 1]
    assert (found.classes, found.image_shape) == (2, (3, 16, 16))
    assert set(found.digests) == {"train/", "val/"}
    assert data.load(f"folder:{pictures}").x.shape == (11, 3, 224, 224)
    x = found.x[:]
    assert (x.dtype, x.shape) == (np.float32, (11, 3, 16, 16))
    np.testing.assert_array_equal(found.x[4], x[4])


def test_folders_inside_a_class_are_its_images(pictures: Path) -> None:
    """As in Tiny ImageNet: train/<class>/images/*.JPEG."""
    flat = data.load(f"folder-16:{pictures}")
    pixels = flat.x[:]
    cats = pictures / "train" / "cat"
    for place, name in (("images", "cat_4"), ("images/more", "cat_5"), (".bin", "cat_0")):
        (cats / place).mkdir()
        (cats / f"{name}.JPEG").rename(cats / place / f"{name}.JPEG")
    found = data.load(f"folder-16:{pictures}")
    assert found.y.tolist() == [0] * 5 + [1] * 5
    np.testing.assert_array_equal(found.x[:], pixels[1:])
    assert found.digests["train/"] != flat.digests["train/"]
    assert found.digests["val/"] == flat.digests["val/"]


def test_folder_is_resized_and_cut_in_the_middle(pictures: Path) -> None:
    """Resize(short side) and CenterCrop, then the constants of ImageNet."""
    path = pictures / "train" / "cat" / "cat_3.JPEG"  # 43 x 30
    image = PIL.open(path).convert("RGB").resize((int(18 * 43 / 30), 18), PIL.Resampling.BILINEAR)
    plain = np.asarray(image)[1:17, round((25 - 16) / 2) :][:, :16].transpose(2, 0, 1)
    unit = data.load(f"folder-16:{pictures}", standardise="unit").x[3]
    np.testing.assert_array_equal(unit, (plain / 255.0).astype(np.float32))
    usual = data.load(f"folder-16:{pictures}").x[3]
    mean, std = (np.reshape(v, (3, 1, 1)) for v in (folder.MEAN, folder.STD))
    np.testing.assert_array_equal(usual, ((plain / 255.0 - mean) / std).astype(np.float32))


def test_sizes_of_imagenet() -> None:
    for size in ((500, 375), (375, 500), (256, 256), (224, 3000), (10, 10)):
        assert decode.middle(PIL.new("RGB", size), 224).size == (224, 224)


def test_imagenet_crops_are_of_the_key(pictures: Path) -> None:
    found = data.load(f"folder-16:{pictures}", standardise=False)
    keys, rows = Random(9, "test/keys").words(11), np.arange(11)
    x = found.x.batch(rows, "imagenet", keys)
    again = found.x.batch(rows[::-1], "imagenet", keys[::-1])
    np.testing.assert_array_equal(again[::-1], x)
    box, flip = augment.random_resized_crop(int(keys[2]), 42, 30)
    image = PIL.open(pictures / "train" / "cat" / "cat_2.JPEG").crop(box)
    plain = np.asarray(image.resize((16, 16), PIL.Resampling.BILINEAR)).transpose(2, 0, 1)
    np.testing.assert_array_equal(x[2], plain[:, :, ::-1] if flip else plain)
    shifted = found.x.batch(rows, "crop-flip", keys)
    plain = augment.crop_flip(found.x[:].astype(np.uint8), keys)
    np.testing.assert_array_equal(shifted, plain)


@pytest.mark.parametrize(
    ("kind", "mode"),
    [("JPEG", "L"), ("JPEG", "CMYK"), ("PNG", "RGB"), ("PNG", "RGBA"), ("PNG", "P"), ("PNG", "1")],
)
def test_every_kind_becomes_rgb(kind: str, mode: str, pictures: Path) -> None:
    """Also a PNG that is called .JPEG, of which ImageNet has one."""
    (pictures / "train" / "cat" / "cat_0.JPEG").write_bytes(jpeg(3, kind=kind, mode=mode))
    assert data.load(f"folder-16:{pictures}").x[0].shape == (3, 16, 16)


def test_exif_is_ignored(pictures: Path) -> None:
    path = pictures / "train" / "cat" / "cat_0.JPEG"
    before = data.load(f"folder-16:{pictures}").x[0]
    turned = PIL.Exif()
    turned[0x0112] = 6  # by 90 degrees
    path.write_bytes(jpeg(0, exif=turned))
    np.testing.assert_array_equal(data.load(f"folder-16:{pictures}").x[0], before)


BAD_IMAGES = {
    "truncated": (jpeg()[:-60], "image file is truncated"),
    "header": (jpeg()[:300], "Truncated File Read"),
    "empty": (b"", "cannot identify image file"),
    "text": (b"<html>not found</html>", "cannot identify image file"),
    "gif": (jpeg(kind="GIF", mode="P"), "cannot identify image file"),
    "bmp": (jpeg(kind="BMP"), "cannot identify image file"),
    "truncated png": (jpeg(kind="PNG")[:-200], ""),
    "gzip": (gzip.compress(jpeg()), "cannot identify image file"),
}


@pytest.mark.parametrize("what", BAD_IMAGES)
def test_bad_images_are_refused_when_they_are_read(what: str, pictures: Path) -> None:
    content, message = BAD_IMAGES[what]
    path = pictures / "train" / "dog" / "dog_1.JPEG"
    path.write_bytes(content)
    found = data.load(f"folder-16:{pictures}")
    assert found.x[:6].shape == (6, 3, 16, 16)
    with pytest.raises(
        FileRefused, match=f"^{path}: expected a whole JPEG or PNG image: {message}"
    ):
        found.x[6:9]


def test_an_image_that_is_gone_or_giant(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = data.load(f"folder-16:{pictures}")
    (pictures / "train" / "cat" / "cat_1.JPEG").unlink()
    with pytest.raises(FileRefused, match=r"cat_1.JPEG does not exist"):
        found.x[1]
    monkeypatch.setattr(decode, "_MOST_PIXELS", 1000)
    with pytest.raises(FileRefused, match=r"cat_0.JPEG: .*40x30 pixels; at most 1000"):
        found.x[0]


@scratch
@given(mutations, st.sampled_from(["JPEG", "PNG"]))
def test_a_damaged_image_never_raises_anything_else(
    tmp_path: Path, mutation: Any, kind: str
) -> None:
    path = tmp_path / "a.jpeg"
    path.write_bytes(mutate(jpeg(kind=kind), *mutation))
    try:
        image = decode.decode(str(path))
    except FileRefused:
        return
    assert image.mode == "RGB"
    decode.middle(image, 8)
    decode.cut(image, 8, 3)


def empty_class(root: Path) -> None:
    (root / "train" / "fox").mkdir()


def one_class(root: Path) -> None:
    for path in (root / "train" / "dog").iterdir():
        path.unlink()
    (root / "train" / "dog").rmdir()


def no_class(root: Path) -> None:
    one_class(root)
    (root / "train" / "cat").rename(root / "cat")


def other_class(root: Path) -> None:
    (root / "val" / "fox").mkdir()


def empty_val(root: Path) -> None:
    for path in (root / "val").rglob("*.JPEG"):
        path.unlink()


def no_classes_in_val(root: Path) -> None:
    for name in ("cat", "dog"):
        (root / "val" / name).rename(root / name)


def dangling(root: Path) -> None:
    (root / "train" / "cat" / "x.jpg").symlink_to(root / "nowhere")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (empty_class, r"train/fox: expected images \(.jpeg, .jpg, .png\); found none"),
        (one_class, "train: expected two class folders or more; found cat"),
        (no_class, "train: expected class folders with images; found none"),
        (other_class, "val/fox: expected a class of train; it has no such folder"),
        (empty_val, "val/cat: expected images"),
        (no_classes_in_val, "val: expected class folders with images; found none"),
        (dangling, "x.jpg does not exist"),
    ],
)
def test_bad_folders_are_refused(
    damage: Callable[[Path], None], message: str, pictures: Path
) -> None:
    damage(pictures)
    with pytest.raises(FileRefused, match=message):
        data.load(f"folder:{pictures}")


def test_linked_folders_are_read_once(pictures: Path, tmp_path: Path) -> None:
    """As torchvision reads them; of two links to one folder the first counts."""
    plain = data.load(f"folder-16:{pictures}")
    more = tmp_path / "more"
    (more / "deep").mkdir(parents=True)
    for place in (more / "a.png", more / "deep" / "b.png"):
        place.write_bytes(jpeg(kind="PNG"))
    for name in ("cat/again", "cat/linked", "dog/linked"):
        (pictures / "train" / name).symlink_to(more)
    found = data.load(f"folder-16:{pictures}")
    dogs, cats = int(plain.y.sum()), len(plain.y) - int(plain.y.sum())
    assert found.y.tolist() == [0] * (cats + 2) + [1] * (dogs + 2)
    names = [os.path.relpath(path, pictures / "train") for path in found.x.paths]
    assert [name for name in names if "cat/" in name][-2:] == ["cat/again/a.png",
                                                              "cat/again/deep/b.png"]  # fmt: skip
    assert found.x[cats : cats + 2].shape == (2, 3, 16, 16)


@pytest.mark.parametrize("target", ["train/cat", "train", "", "train/cat/deep", "other"])
def test_loops_of_links_are_refused(target: str, pictures: Path) -> None:
    """Also one through a folder elsewhere, which links back."""
    (pictures / "train" / "cat" / "deep").mkdir()
    (pictures / "other").mkdir()
    (pictures / "other" / "back").symlink_to(pictures / "train" / "cat")
    (pictures / "train" / "cat" / "deep" / "loop").symlink_to(pictures / target)
    with pytest.raises(FileRefused, match="a link to a folder that it is in; remove it"):
        data.load(f"folder:{pictures}")


def test_a_pipe_is_no_image(pictures: Path) -> None:
    path = pictures / "train" / "dog" / "dog_1.JPEG"
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(FileRefused, match=r"dog_1.JPEG: is not a regular file"):
        decode.decode(str(path))


def test_a_warning_of_the_library_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under -W error, as here, it is raised as what it is."""
    path = tmp_path / "a.png"
    path.write_bytes(jpeg(kind="PNG", mode="L"))

    def convert(image: Any) -> Any:
        warnings.warn("a word from Pillow", UserWarning, stacklevel=1)
        return image

    monkeypatch.setattr(decode, "_eight_bits", convert)
    with pytest.raises(UserWarning, match="a word from Pillow"):
        decode.decode(str(path))


def test_a_folder_that_cannot_be_listed(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def scandir(path: Any) -> Any:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(folder.os, "scandir", scandir)
    with pytest.raises(FileRefused, match="train: cannot be read: Permission denied"):
        data.load(f"folder:{pictures}")


def test_val_may_lack_a_class_and_be_absent(pictures: Path) -> None:
    for path in (pictures / "val" / "cat").iterdir():
        path.unlink()
    (pictures / "val" / "cat").rmdir()
    found = data.load(f"folder:{pictures}")
    assert found.y_test.tolist() == [1, 1, 1]
    (pictures / "val").rename(pictures / "test")
    assert data.load(f"folder:{pictures}").x_test is None


@pytest.mark.parametrize(
    "name", ["folder:", "folder-0:x", "folder-x:y", "folder-64", "folder-99999:x"]
)
def test_bad_names_of_folders(name: str) -> None:
    with pytest.raises(Error, match="expected folder:PATH, or folder-64:PATH"):
        data.load(name)


def test_no_such_folder(tmp_path: Path, pictures: Path) -> None:
    with pytest.raises(Error, match="gone does not exist"):
        data.load(f"folder:{tmp_path / 'gone'}")
    with pytest.raises(Error, match="a folder has no standardisation 'fromage'"):
        data.load(f"folder:{pictures}", standardise="fromage")


def test_no_pillow(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(Unavailable, match=r'need Pillow, .* pip install "npdrt\[data\]"'):
        data.load(f"folder:{pictures}")


def test_importing_does_not_import_pillow() -> None:
    code = "import sys, npdrt.data, npdrt.train; sys.exit('PIL' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_another_file_is_another_data_set(pictures: Path) -> None:
    before = data.load(f"folder:{pictures}").digests
    assert data.load(f"folder:{pictures}").digests == before
    (pictures / "train" / "cat" / "cat_1.JPEG").write_bytes(jpeg(200, (31, 33)))
    after = data.load(f"folder:{pictures}").digests
    assert after["val/"] == before["val/"]
    assert after["train/"] != before["train/"]


def test_verify_decodes_every_image(pictures: Path) -> None:
    assert [(c.file, c.status) for c in data.verify(f"folder:{pictures}")] == [
        ("train", "ok"), ("val", "ok"),
    ]  # fmt: skip
    (pictures / "train" / "dog" / "dog_4.JPEG").write_bytes(jpeg()[:-100])
    first, train_, val = data.verify(f"folder:{pictures}")
    assert (first.file, first.status) == ("dog_4.JPEG", "wrong")
    assert "truncated" in first.found
    assert (train_.status, train_.found) == ("wrong", "10 of 11 images")
    assert (val.status, val.found) == ("ok", "5 of 5 images")
    done = CliRunner().invoke(cli, ["data", "verify", f"folder:{pictures}"])
    assert done.exit_code == 1
    assert "dog_4.JPEG" in done.output
    assert "npdrt data fetch" not in done.output


# --- ahead -----------------------------------------------------------------------------------


def threads() -> int:
    return sum(thread.name.startswith("npdrt-batches") for thread in threading.enumerate())


@pytest.mark.parametrize("ahead", [0, 1, 2, 5])
def test_ahead_gives_what_it_is_asked_for(ahead: int) -> None:
    made: list[int] = []

    def make(step: int) -> int:
        made.append(step)
        return step * step

    with Ahead(make, 10, ahead) as squares:
        assert [squares(step) for step in range(10)] == [step * step for step in range(10)]
    assert made == list(range(10))  # each once, none beyond the end
    assert threads() == 0


def test_ahead_is_bounded() -> None:
    made: list[int] = []

    def makes(steps: list[int]) -> bool:
        """Whether those are made, and no more."""
        deadline = time.monotonic() + 60
        while len(made) < len(steps) and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.1)
        return made == steps

    with Ahead(lambda step: made.append(step), 1000) as ahead:
        ahead(0)
        assert makes([0, 1, 2])
        ahead(1)
        assert makes([0, 1, 2, 3])


def test_ahead_works_while_the_caller_does() -> None:
    begun = threading.Event()

    def make(step: int) -> int:
        if step == 1:
            begun.set()
        return step

    with Ahead(make, 3) as ahead:
        ahead(0)
        assert begun.wait(60)  # step 1 is made although nobody has asked for it


def test_ahead_may_be_asked_out_of_order() -> None:
    with Ahead(lambda step: -step, 100) as ahead:
        assert [ahead(step) for step in (5, 6, 2, 50, 51, 0, 99, 99)] == [
            -5, -6, -2, -50, -51, 0, -99, -99,
        ]  # fmt: skip


def test_errors_are_raised_where_their_step_is_asked_for() -> None:
    def make(step: int) -> int:
        if step == 2:
            raise FileRefused("a.jpeg: damaged")
        return step

    with Ahead(make, 10) as ahead:
        assert (ahead(0), ahead(1)) == (0, 1)
        with pytest.raises(FileRefused, match=r"a.jpeg: damaged"):
            ahead(2)
        assert ahead(3) == 3
    assert threads() == 0


def test_leaving_drops_what_waits() -> None:
    made: list[int] = []

    def make(step: int) -> int:
        made.append(step)
        time.sleep(0.2)
        return step

    def work() -> None:
        with ahead:
            ahead(0)
            raise KeyboardInterrupt

    ahead = Ahead(make, 100, 50)
    with pytest.raises(KeyboardInterrupt):
        work()
    assert len(made) < 50
    assert threads() == 0
    assert ahead(7) == 7  # a later call begins anew
    ahead.__exit__(None, None, None)


# --- training --------------------------------------------------------------------------------


def small_images(path: Path, n: int = 80, side: int = 32) -> Path:
    """Colour images of three classes; a batch of 32 is worth a thread."""
    y = np.arange(n) % 3
    words = Random(0, "test/train").words(n * 3 * side * side)
    x = (words % 200).reshape(n, 3, side, side) + 25 * y[:, None, None, None]
    np.savez(path, x=x.astype(np.uint8), y=y, x_test=x[:20].astype(np.uint8), y_test=y[:20])
    return path


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_images(tmp_path_factory.mktemp("data") / "images.npz")


def settings_for(images: Path | str, **changes: Any) -> Config:
    base: dict[str, Any] = {
        "data": str(images),
        "augment": "crop-flip",
        "model_options": {"depth": 2, "width": 8},
        "epochs": 3,
        "batch_size": 32,
        "log_every": 1,
        "checkpoint_every": 2,
    }
    return Config(**{**base, **changes})


def stop_after(steps: int) -> Callable[[], int]:
    left = iter(range(steps - 1, -1, -1))
    return lambda: signal.SIGINT if next(left) == 0 else 0


def bits(run: Path) -> tuple[Any, ...]:
    checkpoint = store.load(run / "checkpoint.h5")
    records = [r for r in log.read(run / "log.jsonl") if r["event"] in ("step", "epoch")]
    return (
        {name: value.tobytes() for name, value in checkpoint.params.items()},
        {name: value.tobytes() for name, value in checkpoint.state.items()},
        [{k: v for k, v in r.items() if k != "seconds"} for r in records],
    )


def test_augmented_training_resumes_to_the_same_bits(images: Path, tmp_path: Path) -> None:
    config = settings_for(images)
    train(config, tmp_path / "whole")
    train(config, tmp_path / "parts", stop=stop_after(2))
    for _ in range(3):
        resume(tmp_path / "parts", stop=stop_after(2))
    resume(tmp_path / "parts")
    assert bits(tmp_path / "parts") == bits(tmp_path / "whole")
    train(settings_for(images, augment="none"), tmp_path / "plain")
    assert bits(tmp_path / "plain")[0] != bits(tmp_path / "whole")[0]
    assert threads() == 0


@pytest.mark.parametrize("worth", [0, 1 << 60])
def test_a_thread_changes_no_bit(
    worth: int, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(settings_for(images, eager=True), tmp_path / "eager")
    monkeypatch.setattr(npdrt.train.feed, "WORTH_A_THREAD", worth)
    train(settings_for(images), tmp_path / "run")
    assert bits(tmp_path / "run") == bits(tmp_path / "eager")


def test_the_images_of_a_step_are_those_documented(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[np.ndarray] = []
    take = npdrt.train.feed.Feed.batch

    def watched(self: Any, step: int) -> Any:
        x, y = take(self, step)
        seen.append(x.copy())
        return x, y

    monkeypatch.setattr(npdrt.train.feed.Feed, "batch", watched)
    train(settings_for(images, seed=5, standardise=False), tmp_path / "run", stop=stop_after(5))
    raw = np.load(images)["x"]
    for step, x in enumerate(seen):
        epoch, k = divmod(step, 3)
        chosen = Random(5, "data/order", epoch).permutation(80)[32 * k : 32 * (k + 1)]
        keys = Random(5, "data/augment", epoch).words(80)[chosen]
        expected = [plain_crop_flip(raw[i], key) for i, key in zip(chosen, keys, strict=True)]
        np.testing.assert_array_equal(x, np.stack(expected).reshape(len(chosen), -1))


def environment() -> dict[str, str]:
    own = {"PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1", "GIT_DIR": os.devnull}
    return {**os.environ, **own}


def test_killed_and_resumed(images: Path, tmp_path: Path) -> None:
    """kill -9 in the middle of a run whose batches are made on a thread."""
    words = ["train", "--data", str(images), "--augment", "crop-flip", "--width", "8", "--epochs"]
    words += ["12", "--batch-size", "32", "--checkpoint-every", "1", "--log-every", "1", "-q"]
    command = [sys.executable, "-m", "npdrt", *words, "--out"]
    subprocess.run([*command, str(tmp_path / "whole")], check=True, env=environment())
    run = tmp_path / "parts"
    killed = 0
    for step in (4, 15):
        process = subprocess.Popen([*command, str(run), "--resume-or-start"], env=environment())
        while process.poll() is None and not reached(run, step):
            time.sleep(0.005)
        killed += process.poll() is None
        process.kill()
        process.wait()
    subprocess.run([*command, str(run), "--resume"], check=True, env=environment())
    assert bits(run) == bits(tmp_path / "whole")
    assert killed >= 1


def reached(run: Path, step: int) -> bool:
    try:
        return any(r["step"] >= step for r in log.read(run / "log.jsonl"))
    except Error:
        return False


@real_cifar
def test_training_on_real_cifar(tmp_path: Path) -> None:
    """One epoch over what is there, cropped and mirrored, stopped on the way: the same bits, and
    better than guessing; the missing batches are said."""

    class Collector(Reporter):
        warnings: list[str] = []  # noqa: RUF012

        def warning(self, text: str) -> None:
            self.warnings.append(text)

    config = settings_for(
        "cifar-10", epochs=1, batch_size=256, model_options={"depth": 2, "width": 32},
        checkpoint_every=0, log_every=0, trace_every=0,
    )  # fmt: skip
    reporter = Collector()
    found = train(config, tmp_path / "whole", data_dir=REAL, reporter=reporter)
    train(config, tmp_path / "parts", data_dir=REAL, stop=stop_after(30))
    resume(tmp_path / "parts", data_dir=REAL)
    assert bits(tmp_path / "parts") == bits(tmp_path / "whole")
    assert found.test_accuracy > 0.25
    if len(list(BINARY.glob("data_batch_*.bin"))) < 5:
        assert "of 50,000 training images" in reporter.warnings[0]


IMAGE_MODEL = '''
from dataclasses import dataclass
import numpy as np
from npdrt import ops
from npdrt.random import Random

@dataclass(frozen=True)
class Mean:
    """A linear model on the mean of each column of pixels; it is given images."""
    image_shape: tuple
    outputs: int

    def init(self, seed, device, dtype):
        channels, _, width = self.image_shape
        w = Random(seed, "init").normal((self.outputs, channels * width))
        return {"weight": w.astype(dtype)}

    def __call__(self, params, x):
        assert tuple(x.shape[1:]) == tuple(self.image_shape), x.shape
        columns = ops.mean(x, axis=2)
        return ops.linear(ops.reshape(columns, shape=(x.shape[0], -1)), params["weight"])
'''


@pytest.mark.parametrize("augmented", ["none", "crop-flip"])
def test_a_model_of_images_is_given_images(augmented: str, images: Path, tmp_path: Path) -> None:
    (tmp_path / "mean.py").write_text(IMAGE_MODEL)
    config = settings_for(
        images, model=f"{tmp_path}/mean.py:Mean", model_options={}, augment=augmented
    )
    found = train(config, tmp_path / "run")
    assert found.parameters == 3 * 3 * 32
    train(config, tmp_path / "parts", stop=stop_after(4))
    resume(tmp_path / "parts", code=[tmp_path / "mean.py"])
    assert bits(tmp_path / "parts") == bits(tmp_path / "run")
    np.savez(tmp_path / "a.npz", x=np.eye(4), y=np.arange(4))
    with pytest.raises(Error, match=r"mean.py:Mean needs images; the examples of a are not"):
        train(dataclasses.replace(config, data=str(tmp_path / "a.npz")), tmp_path / "no")


@pytest.mark.parametrize("augmented", ["none", "crop-flip", "imagenet"])
def test_training_on_a_folder(augmented: str, pictures: Path, tmp_path: Path) -> None:
    config = settings_for(f"folder-16:{pictures}", augment=augmented, batch_size=4, epochs=2)
    found = train(config, tmp_path / "whole")
    assert found.test_loss is not None
    train(config, tmp_path / "parts", stop=stop_after(2))
    resume(tmp_path / "parts")
    assert bits(tmp_path / "parts") == bits(tmp_path / "whole")
    (pictures / "train" / "cat" / "cat_9.JPEG").write_bytes(jpeg(1))
    with pytest.raises(Error, match=r"the data set folder-16:.* has changed since the run"):
        resume(tmp_path / "parts")


def test_a_damaged_image_ends_training_with_its_name(pictures: Path, tmp_path: Path) -> None:
    (pictures / "train" / "dog" / "dog_0.JPEG").write_bytes(jpeg()[:-60])
    words = ["train", "--data", f"folder-160:{pictures}", "--augment", "imagenet", "-q", "--epochs"]
    done = CliRunner().invoke(
        cli, [*words, "1", "--batch-size", "4", "--width", "4", "--out", str(tmp_path / "run")]
    )
    assert done.exit_code == 3, done.output
    assert re.search(r"dog_0.JPEG: .*truncated", done.output)
    assert threads() == 0


def test_evaluation_takes_fewer_of_large_images(monkeypatch: pytest.MonkeyPatch) -> None:
    from npdrt.train import evaluation, step

    sizes: list[int] = []

    class Task(step.Task):
        def predict(self, params: Any, buffers: Any, x: Any, y: Any) -> Any:
            sizes.append(len(x))
            return np.zeros((len(x), 2))

    monkeypatch.setattr(evaluation, "EVALUATED", 100)
    x, y = np.zeros((25, 3, 2, 2)), np.zeros(25, np.int64)
    loss, right = evaluation.evaluate(Task(None, 2), step.State({}, {}, {}), x, y)
    assert sizes == [8, 8, 8, 1]
    assert float(loss) == pytest.approx(np.log(2))
    assert int(right) == 25


def test_numbers_are_as_they_are() -> None:
    x = np.ones((2, 1, 3, 3), np.float32)
    np.testing.assert_array_equal(Stored(x, unscaled)[:], x)


def test_explain_a_model_of_images(images: Path, tmp_path: Path) -> None:
    (tmp_path / "mean.py").write_text(IMAGE_MODEL)
    words = ["--model", f"{tmp_path}/mean.py:Mean", "--data", str(images), "--batch-size", "5"]
    done = CliRunner().invoke(cli, ["explain", *words])
    assert done.exit_code == 0, done.output
    assert re.search(r"x +float32\[5, 3, 32, 32\]", done.output)


# --- images of other kinds, indices, last batches -------------------------------------------


def test_16_bits_are_scaled_to_8(tmp_path: Path) -> None:
    pil = pytest.importorskip("PIL.Image")
    ramp = np.arange(0, 1 << 16, 64, dtype=np.uint16).reshape(32, 32)
    pil.fromarray(ramp).save(tmp_path / "a.png")
    found = np.asarray(decode.decode(str(tmp_path / "a.png")))
    expected = np.rint(ramp / 257).astype(np.uint8)
    assert all(np.array_equal(found[..., c], expected) for c in range(3))


def test_a_thin_image_is_refused(tmp_path: Path) -> None:
    pil = pytest.importorskip("PIL.Image")
    for width, name in ((256, "wide"), (257, "wider")):
        pil.new("L", (width, 1)).save(tmp_path / f"{name}.png")
    assert decode.decode(str(tmp_path / "wide.png")).size == (256, 1)
    with pytest.raises(FileRefused, match=r"wider.png: .* 257x1 pixels; sides 1 to 256"):
        decode.decode(str(tmp_path / "wider.png"))


def test_images_have_an_index_of_the_first_axis_alone() -> None:
    raw = np.arange(2 * 3 * 4 * 5, dtype=np.uint8).reshape(2, 3, 4, 5)
    images = Stored(raw, unscaled)
    assert np.array_equal(images[1, ...], raw[1])
    assert np.array_equal(images[:1, ...], raw[:1])
    for key in ((0, 1), (..., 0), (slice(None), 0), ...):
        with pytest.raises(Error, match="expected an index of the first axis alone"):
            images[key]


def test_a_last_batch_of_one_image_is_refused_at_once(tmp_path: Path) -> None:
    """The digits are 1437 = 4 * 359 + 1, and ResNet-18 makes them one pixel large."""
    config = Config(model="resnet18", model_options={"width": 1}, batch_size=4, epochs=1)
    with pytest.raises(Error, match="has 1 of the 1437 examples, since the batch size is 4"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
