"""npdrt.data: readers, standardisation, where data sets are, downloads, the order of batches."""

from __future__ import annotations

import gzip
import hashlib
import http.server
import io
import os
import pickle
import pwd
import re
import signal
import struct
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from npdrt import data
from npdrt.data import bounded, catalogue, folder, idx, npz, scale, squad, text
from npdrt.data.fetch import folders, locate, user_cache
from npdrt.data.load import READERS
from npdrt.errors import DiskError, Error, FileRefused, Unavailable
from npdrt.random import Random

REAL = Path(os.environ.get("NPDRT_DATA", "nowhere"))
real_mnist = pytest.mark.skipif(
    not (REAL / "mnist").is_dir(), reason="needs MNIST in the folder NPDRT_DATA names"
)
MNIST = ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz",
         "t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz")  # fmt: skip


@pytest.fixture(autouse=True)
def _no_data_of_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("NPDRT_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


# The bundled digits


def test_digits_file_is_the_one_the_catalogue_names() -> None:
    (check,) = data.verify("digits")
    assert check.status == "ok"
    assert check.found == "sha256:ab2f63ed6df08062c40070f1e90e7cbb3d7ba98bcbda5b8aa4cc0644c5f14b14"
    assert catalogue.find("digits").bytes == check.path.stat().st_size


@pytest.mark.skipif(not (REAL / "digits").is_dir(), reason="needs digits.csv.gz in NPDRT_DATA")
def test_digits_equal_their_source() -> None:
    rows = np.loadtxt(REAL / "digits" / "digits.csv.gz", delimiter=",", dtype=np.int64)
    digits = data.load("digits", standardise=False)
    np.testing.assert_array_equal(np.vstack([digits.x, digits.x_test]), rows[:, :64])
    np.testing.assert_array_equal(np.hstack([digits.y, digits.y_test]), rows[:, 64])


def test_digits() -> None:
    digits = data.load("digits")
    assert digits.x.shape == (1437, 64)
    assert digits.x_test.shape == (360, 64)
    assert digits.x.dtype == np.float32
    assert digits.y.dtype == np.int64
    assert (digits.classes, digits.outputs, digits.image_shape) == (10, 10, (1, 8, 8))
    assert np.bincount(digits.y_test).tolist() == [35, 36, 35, 37, 37, 37, 37, 36, 33, 37]
    assert list(digits.digests) == ["digits.npz"]
    assert "array" not in repr(digits)


def test_constants_of_the_digits() -> None:
    x = data.load("digits", standardise=False).x.astype(np.int64)
    constants = catalogue.find("digits").scale
    assert constants.mean == x.sum() / x.size / 16
    variance = (x.size * (x * x).sum() - x.sum() ** 2) / (x.size * 16) ** 2
    assert constants.std == pytest.approx(variance**0.5, rel=1e-15)
    standard = data.load("digits").x
    assert standard.mean(dtype=np.float64) == pytest.approx(0.0, abs=1e-6)
    assert standard.std(dtype=np.float64) == pytest.approx(1.0, abs=1e-6)


def test_digits_need_no_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NPDRT_DATA", str(tmp_path / "absent"))
    assert data.fetch("digits") == locate("digits")
    assert (locate("digits") / "digits-licence.txt").is_file()
    assert len(data.load("digits").x) == 1437


# The real MNIST


@pytest.fixture(scope="module")
def mnist() -> data.Dataset:
    return data.load("mnist", data_dir=REAL)


@real_mnist
def test_mnist(mnist: data.Dataset) -> None:
    assert mnist.x.shape == (60000, 784)
    assert mnist.x_test.shape == (10000, 784)
    assert mnist.y[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert mnist.y_test[:5].tolist() == [7, 2, 1, 0, 4]
    assert np.bincount(mnist.y)[[0, 1, 9]].tolist() == [5923, 6742, 5949]
    assert mnist.image_shape == (1, 28, 28)
    assert mnist.x.min() == np.float32(-0.1307 / 0.3081)
    assert mnist.x.max() == np.float32((1 - 0.1307) / 0.3081)


@real_mnist
def test_mnist_digests_are_the_published_ones(mnist: data.Dataset) -> None:
    published = {file.name: file.hash for file in catalogue.find("mnist").forms[0].files}
    assert {name: f"sha256:{digest}" for name, digest in mnist.digests.items()} == published
    assert [check.status for check in data.verify("mnist", REAL)] == ["ok"] * 4
    for file in catalogue.find("mnist").forms[0].files:
        assert (REAL / "mnist" / file.name).stat().st_size == file.bytes


# IDX files


def idx_bytes(array: np.ndarray, kind: int = 0x08) -> bytes:
    return (
        bytes((0, 0, kind, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape)
        + array.tobytes()
    )  # fmt: skip


def small_mnist(root: Path, **replaced: bytes) -> Path:
    """A folder with an MNIST of 30 and 20 images; `x=`, `y=`, ... replace the bytes of a file."""
    folder = root / "mnist"
    folder.mkdir(parents=True, exist_ok=True)
    for role, name, n in zip(("x", "y", "x_test", "y_test"), MNIST, (30, 30, 20, 20), strict=True):
        words = Random(0, f"test/{role}").words(n * 784).reshape(n, 28, 28)
        array = words[:, 0, 0] % 10 if role.startswith("y") else words % 256
        plain = gzip.compress(idx_bytes(array.astype(np.uint8)), mtime=0)
        (folder / name).write_bytes(replaced.get(role, plain))
    return root


IMAGES = np.arange(3 * 4 * 5, dtype=np.uint8).reshape(3, 4, 5)


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_idx_round_trip(pack: Callable[[bytes], bytes], tmp_path: Path) -> None:
    path = tmp_path / "images"
    path.write_bytes(pack(idx_bytes(IMAGES)))
    array, digest = idx.read_idx(path, axes=3)
    np.testing.assert_array_equal(array, IMAGES)
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()


HUGE = bytes((0, 0, 8, 3)) + struct.pack(">3I", *[2**32 - 1] * 3)
GOOD = idx_bytes(IMAGES)

BAD_IDX = {
    "empty": (b"", "expected IDX magic 00000803 .*; found nothing"),
    "labels": (idx_bytes(IMAGES[:, 0, 0]), r"\(unsigned bytes, axes: 3\); found 00000801"),
    "floats": (idx_bytes(IMAGES, 0x0D), "found 00000d03"),
    "text": (b"<html>not found", "found 3c68746d"),
    "header": (GOOD[:11], "expected 3 axis lengths; the file ends inside them"),
    "short": (GOOD[:-1], r"expected 60 bytes for shape \(3, 4, 5\) after the header; found 59"),
    "long": (GOOD + b"\0", "expected 60 bytes .* after the header; found more"),
    "huge": (HUGE + b"\0" * 10, "declares 79228162458924105385300197375 bytes of content in 26"),
    "gzip cut": (gzip.compress(GOOD)[:-9], "damaged gzip data: Compressed file ended"),
    "gzip sum": (gzip.compress(GOOD)[:-8] + b"\0" * 8, "damaged gzip data: CRC check failed"),
    "gzip body": (gzip.compress(GOOD)[:10] + b"\xff" * 30, "damaged gzip data"),
    "gzip tail": (gzip.compress(GOOD) + b"junk", "damaged gzip data: Not a gzipped file"),
    "gzip long": (gzip.compress(GOOD + b"\0"), "expected 60 bytes .*; found more"),
    "gzip short": (gzip.compress(GOOD[:-1]), "expected 60 bytes .*; found 59"),
    "two members": (gzip.compress(GOOD) * 2, "expected 60 bytes .*; found more"),
}


@pytest.mark.parametrize("what", BAD_IDX)
def test_bad_idx_is_refused(what: str, tmp_path: Path) -> None:
    content, message = BAD_IDX[what]
    path = tmp_path / "images"
    path.write_bytes(content)
    with pytest.raises(FileRefused, match=f"^{re.escape(str(path))}: .*{message}"):
        idx.read_idx(path, axes=3)


def test_idx_bomb_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded, "FREE", 1 << 16)
    path = tmp_path / "images"
    n = 1 << 24
    bomb = bytes((0, 0, 8, 1)) + struct.pack(">I", n) + bytes(n)
    path.write_bytes(gzip.compress(bomb))
    with pytest.raises(FileRefused, match=f"declares {n} bytes of content in .* bytes on disk"):
        idx.read_idx(path, axes=1)


def test_idx_bomb_behind_a_small_header_is_not_unpacked(tmp_path: Path) -> None:
    """A header that declares 10 bytes, then 64 MB of zeros: no more is unpacked than needed."""
    import tracemalloc

    path = tmp_path / "labels"
    path.write_bytes(gzip.compress(bytes((0, 0, 8, 1)) + struct.pack(">I", 10) + bytes(1 << 26)))
    tracemalloc.start()
    with pytest.raises(FileRefused, match=r"expected 10 bytes .*; found more"):
        idx.read_idx(path, axes=1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20


def test_declared_size_is_not_allocated(tmp_path: Path) -> None:
    import tracemalloc

    path = tmp_path / "labels"
    path.write_bytes(gzip.compress(bytes((0, 0, 8, 1)) + struct.pack(">I", 1 << 29) + b"\1" * 5))
    tracemalloc.start()
    with pytest.raises(FileRefused, match=r"expected 536870912 bytes .*; found 5"):
        idx.read_idx(path, axes=1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 255), st.booleans())
def test_a_flipped_bit_never_passes(place: int, flip: int, packed: bool) -> None:
    """Any change of a gzipped file is refused or harmless (gzip's own header); any change of the
    header of a plain one is refused."""
    content = bytearray(gzip.compress(GOOD, mtime=0) if packed else GOOD)
    content[place % (len(content) if packed else 16)] ^= flip
    path = Path(os.environ["XDG_CACHE_HOME"]).with_name("flipped")
    path.write_bytes(content)
    try:
        array, _ = idx.read_idx(path, axes=3)
    except FileRefused:
        return
    assert packed
    np.testing.assert_array_equal(array, IMAGES)


def test_unreadable_file(tmp_path: Path) -> None:
    with pytest.raises(FileRefused, match="labels does not exist"):
        idx.read_idx(tmp_path / "labels", axes=1)


def zipped(array: Any) -> bytes:
    return gzip.compress(idx_bytes(np.asarray(array, np.uint8)))


@pytest.mark.parametrize(
    ("replaced", "message"),
    [
        ({"y": zipped(np.arange(30))}, "train-labels.*: expected labels 0 to 9; found 0 to 29"),
        ({"y": zipped([1] * 29)}, "train-labels.*: expected one label .* 30 examples.*29"),
        ({"y_test": zipped([10] * 20)}, "t10k-labels.*: expected labels 0 to 9; found 10 to 10"),
        ({"x_test": zipped(np.zeros((20, 27, 28)))}, r"t10k-images.*\(28, 28\) pix.*\(27, 28\)"),
        ({"x": zipped(np.zeros((0, 28, 28))), "y": zipped([])}, r"train-images.*\(0, 784\)"),
        ({"x": zipped([1, 2])}, "train-images.*: expected IDX magic 00000803"),
    ],
)
def test_mismatched_mnist_is_refused(
    replaced: dict[str, bytes], message: str, tmp_path: Path
) -> None:
    small_mnist(tmp_path, **replaced)
    with pytest.raises(FileRefused, match=message):
        data.load("mnist", data_dir=tmp_path)


def test_mnist_without_gzip_is_the_same(tmp_path: Path) -> None:
    packed = data.load("mnist", data_dir=small_mnist(tmp_path))
    for name in MNIST:
        path = tmp_path / "mnist" / name
        path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
        path.unlink()
    again = data.load("mnist", data_dir=tmp_path)
    for role in ("x", "y", "x_test", "y_test"):
        np.testing.assert_array_equal(getattr(again, role), getattr(packed, role))
    assert {check.status for check in data.verify("mnist", tmp_path)} == {"unpacked"}


def test_small_mnist(tmp_path: Path) -> None:
    mnist = data.load("mnist", data_dir=small_mnist(tmp_path), standardise=False)
    assert mnist.scale is None
    assert mnist.x.shape == (30, 784)
    assert mnist.x.max() == 255.0
    assert mnist.x.dtype == np.float32


# A user's .npz


def save(path: Path, **arrays: Any) -> Path:
    np.savez_compressed(path, **arrays)
    return path


X, Y = np.arange(24.0).reshape(6, 4), np.array([0, 1, 2, 0, 1, 2])


def test_own_file(tmp_path: Path) -> None:
    path = save(tmp_path / "mine.npz", x=X, y=Y, x_test=X[:2], y_test=Y[:2])
    mine = data.load(path)
    assert (mine.name, mine.classes, mine.outputs, mine.image_shape) == ("mine", 3, 3, None)
    assert mine.scale == scale.Scale(1.0, X.mean(), X.std())
    np.testing.assert_array_equal(mine.x, ((X - X.mean()) / X.std()).astype(np.float32))
    np.testing.assert_array_equal(mine.x_test, mine.x[:2])
    assert mine.digests == {"mine.npz": hashlib.sha256(path.read_bytes()).hexdigest()}
    raw = data.load(str(path), standardise=False)
    np.testing.assert_array_equal(raw.x, X)


def test_own_file_with_targets_and_images(tmp_path: Path) -> None:
    images = np.asfortranarray(np.arange(4 * 3 * 2 * 5).reshape(4, 3, 2, 5), dtype=">i2")
    mine = data.load(save(tmp_path / "a.npz", x=images, y=np.ones((4, 2))), standardise=False)
    assert (mine.classes, mine.outputs, mine.image_shape) == (None, 2, (3, 2, 5))
    assert mine.y.dtype == np.float32
    assert mine.x_test is None
    assert mine.x.flags.c_contiguous
    np.testing.assert_array_equal(mine.x, images)
    grey = data.load(save(tmp_path / "b.npz", x=images[:, 0], y=np.ones(4)))
    assert (grey.outputs, grey.image_shape) == (1, (1, 2, 5))


@pytest.mark.parametrize("value", [0.1, 7, 1e300, True])
def test_constant_data_become_zero(value: Any, tmp_path: Path) -> None:
    mine = data.load(save(tmp_path / "a.npz", x=np.full((7, 3), value), y=np.zeros(7, int)))
    assert not mine.x.any()
    assert mine.scale == scale.Scale(mean=float(value))


NAN = np.where(X == 3.0, np.nan, X)
ONE = {"x": X, "y": Y}

BAD_NPZ = {
    "no y": ({"x": X}, "expected arrays x and y, .*; found x$"),
    "unknown": ({**ONE, "z": Y}, "expected arrays x and y, and optionally .*; found x, y, z"),
    "half": ({**ONE, "x_test": X}, "found only one of them"),
    "nan": ({"x": NAN, "y": Y}, "array x: expected finite values; found NaN or inf"),
    "inf target": ({"x": X, "y": np.full(6, np.inf)}, "array y: expected finite"),
    "nan test": ({**ONE, "x_test": NAN, "y_test": Y}, "array x_test: expected finite values"),
    "length": ({"x": X, "y": Y[:5]}, r"array y: expected one label .* 6 examples .* \(5,\)"),
    "0-d": ({"x": X, "y": 3}, r"array y: expected one label .* shape \(\)"),
    "1-d": ({"x": X[0], "y": Y[:4]}, r"array x: expected shape \(examples, features\).*\(4,\)"),
    "empty": ({"x": X[:0], "y": Y[:0]}, r"with none of them 0; found \(0, 4\)"),
    "no features": ({"x": X[:, :0], "y": Y}, r"with none of them 0; found \(6, 0\)"),
    "no targets": ({"x": X, "y": np.ones((6, 0))}, r"array y: expected one label or target"),
    "negative": ({"x": X, "y": Y - 1}, "array y: expected labels 0 to .*; found -1 to 1"),
    "giant": ({"x": X, "y": Y * 10**9}, "found 0 to 2000000000 .*stored as floats"),
    "one-hot": ({"x": X, "y": np.eye(6, dtype=int)}, r"expected labels of shape .*\(6, 6\)"),
    "test shape": ({**ONE, "x_test": X[:, :3], "y_test": Y}, r"like those of .* \(4,\); .* \(3,\)"),
    "test kind": ({**ONE, "x_test": X, "y_test": Y * 1.0}, "array y_test: .* int64 .* float64"),
    "objects": ({"x": np.array([[{}], [1]]), "y": Y[:2]}, "array x: .*; found dtype object"),
    "text": ({"x": np.array([["a"]]), "y": Y[:1]}, "integers or floats; found dtype <U1"),
    "complex": ({"x": X * 1j, "y": Y}, "found dtype complex128"),
    "too large": ({"x": X * 1e299, "y": Y}, "array x: values too large to standardise"),
}


@pytest.mark.parametrize("what", BAD_NPZ)
def test_bad_npz_is_refused(what: str, tmp_path: Path) -> None:
    arrays, message = BAD_NPZ[what]
    path = save(tmp_path / "mine.npz", **arrays)
    with pytest.raises(FileRefused, match=f"^{re.escape(str(path))}.*{message}"):
        data.load(path)


@pytest.mark.parametrize("role", ["x", "y"])
def test_beyond_float32(role: str, tmp_path: Path) -> None:
    arrays = {"x": X, "y": Y.astype(float)}
    path = save(tmp_path / "mine.npz", **{**arrays, role: arrays[role] * 1e200})
    with pytest.raises(FileRefused, match=f"array {role}, converted to float32: expected finite"):
        data.load(path, standardise=False)


def test_pickles_are_never_run(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "pwned"),)

    arrays = {"x": np.array([[Bomb()]], dtype=object), "y": Y[:1]}
    with pytest.raises(FileRefused, match="found dtype object"):
        data.load(save(tmp_path / "mine.npz", **arrays))
    with zipfile.ZipFile(tmp_path / "raw.npz", "w") as archive:
        archive.writestr("x.npy", pickle.dumps(Bomb()))
        archive.writestr("y.npy", pickle.dumps(Bomb()))
    with pytest.raises(FileRefused, match=r"damaged .npz file: .*magic string"):
        data.load(tmp_path / "raw.npz")
    assert not (tmp_path / "pwned").exists()


def npy(array: np.ndarray, shape: tuple[int, ...] | None = None) -> bytes:
    """A .npy file of `array` whose header says `shape`."""
    out = io.BytesIO()
    header = np.lib.format.header_data_from_array_1_0(array)
    np.lib.format.write_array_header_1_0(out, {**header, "shape": shape or array.shape})
    return out.getvalue() + array.tobytes()


def npz_of(path: Path, method: int = zipfile.ZIP_DEFLATED, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return path


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (npy(X, (6, 5)), r"array x: expected 240 bytes for float64 of shape \(6, 5\); found 192"),
        (npy(X, (6, 3)), "array x: expected 144 bytes .*; found more"),
        (npy(X, (2**40, 2**40)), r"array x: declares the shape \(\d+, \d+\); at most \d+ numbers"),
        (npy(X, (-1,)), r"array x: declares the shape \(-1,\)"),
        (npy(X, (2**62, 0, 2**62)), "array x: expected 0 bytes .*; found more"),
        (npy(X[:0], (2**62, 0, 2**62)), "damaged .npz file: .*(too big|dimension)"),
        (npy(X)[:40], "damaged .npz file"),
        (b"", "damaged .npz file"),
        (b"\x93NUMPY\x09\x00" + npy(X)[8:], "expected .npy format 1.0 or 2.0; found 9.0"),
    ],
)
def test_bad_npy_inside_is_refused(x: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(FileRefused, match=message):
        data.load(npz_of(tmp_path / "a.npz", x=x, y=npy(Y)))


def test_zip_bomb_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(npz, "FREE", 1 << 16)
    path = npz_of(tmp_path / "a.npz", x=npy(np.zeros((1000, 10000), np.uint8)), y=npy(Y))
    message = r"a.npz: array x: declares the shape \(1000, 10000\); at most 1\d{6} numbers"
    with pytest.raises(FileRefused, match=message):
        data.load(path)


def test_zip_bomb_with_a_lying_size(tmp_path: Path) -> None:
    """A member that declares 200 bytes but holds 64 MB is cut at what it declares."""
    import tracemalloc

    path = npz_of(tmp_path / "a.npz", x=npy(np.zeros((1 << 12, 1 << 14), np.uint8)), y=npy(Y))
    content = path.read_bytes()
    true = struct.pack("<I", (1 << 26) + 128)
    assert content.count(true) == 2
    path.write_bytes(content.replace(true, struct.pack("<I", 200)))
    tracemalloc.start()
    with pytest.raises(FileRefused, match=r"damaged .npz file: Bad CRC|found 72"):
        data.load(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_other_compression_is_refused(method: int, tmp_path: Path) -> None:
    with pytest.raises(FileRefused, match="array x: expected no compression or deflate"):
        data.load(npz_of(tmp_path / "a.npz", method, x=npy(X), y=npy(Y)))


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_duplicate_names_are_refused(tmp_path: Path) -> None:
    path = npz_of(tmp_path / "a.npz", x=npy(X), y=npy(Y))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("x.npy", npy(X))
    with pytest.raises(FileRefused, match="found x, x, y"):
        data.load(path)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 255), st.integers(0, 10**6))
def test_a_damaged_npz_is_refused_or_the_same(place: int, flip: int, cut: int) -> None:
    stream = io.BytesIO()
    np.savez_compressed(stream, x=X, y=Y)
    content = bytearray(stream.getvalue())
    content[place % len(content)] ^= flip
    if cut % 3 == 0:
        del content[cut % len(content) :]
    try:
        arrays = npz.read_npz(io.BytesIO(content), "mine.npz")
    except FileRefused:
        return
    np.testing.assert_array_equal(arrays["x"], X)
    np.testing.assert_array_equal(arrays["y"], Y)


def test_not_an_npz(tmp_path: Path) -> None:
    (tmp_path / "a.npz").write_bytes(npy(X))
    with pytest.raises(FileRefused, match=r"a.npz: damaged .npz file: File is not a zip file"):
        data.load(tmp_path / "a.npz")
    with pytest.raises(Error, match=r"b.npz does not exist"):
        data.load(tmp_path / "b.npz")


# Standardisation


@pytest.mark.parametrize("constants", [scale.Scale(), scale.Scale(255.0, 0.1307, 0.3081)])
def test_table_and_formula_give_the_same_bits(constants: scale.Scale) -> None:
    x = np.arange(256, dtype=np.uint8)
    table, formula = constants(x), constants(x.astype(np.int16))
    np.testing.assert_array_equal(table.view(np.int32), formula.view(np.int32))
    exact = [
        np.float32((v / constants.divisor - constants.mean) / constants.std) for v in range(256)
    ]
    np.testing.assert_array_equal(table, np.array(exact))


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 3), st.integers(0, 2**32), st.sampled_from([np.float32, np.float64, np.int32])
)
def test_standardised_data_have_mean_0_and_deviation_1(n: int, seed: int, dtype: Any) -> None:
    x = Random(seed, "test").normal((n * 100_000, 2), scale=50.0).astype(dtype) + dtype(1000)
    measured = scale.measure(x)
    assert measured.mean == pytest.approx(x.mean(dtype=np.float64), rel=1e-12)
    assert measured.std == pytest.approx(x.std(dtype=np.float64), rel=1e-9)
    standard = measured(x)
    assert abs(standard.mean(dtype=np.float64)) < 1e-6
    assert standard.std(dtype=np.float64) == pytest.approx(1.0, abs=1e-6)
    assert scale.measure(np.asfortranarray(x)) == measured


# Names and places


def test_unknown_name() -> None:
    message = "unknown data set 'Minst'; did you mean 'mnist'.*known: digits, mnist, fashion-mnist"
    with pytest.raises(Error, match=message):
        data.load("Minst")
    with pytest.raises(Error, match=r"unknown data set 'qqq'; known: .* FILE.npz"):
        data.load("qqq")


def test_not_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NPDRT_DATA", str(tmp_path / "env"))
    places = [tmp_path / "given", tmp_path / "env", tmp_path / "cache" / "npdrt"]
    assert folders("mnist", tmp_path / "given") == [place / "mnist" for place in places]
    looked_in = ", ".join(re.escape(str(place / "mnist")) for place in places)
    with pytest.raises(Unavailable, match=f"looked in {looked_in}.*npdrt data fetch mnist"):
        data.load("mnist", data_dir=tmp_path / "given")


def test_order_of_the_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NPDRT_DATA", str(tmp_path / "env"))
    for root in (tmp_path / "cache" / "npdrt", tmp_path / "env", tmp_path / "given"):
        small_mnist(root)
        assert locate("mnist", tmp_path / "given") == root / "mnist"
    (tmp_path / "given" / "mnist" / MNIST[3]).unlink()
    assert locate("mnist", tmp_path / "given") == tmp_path / "env" / "mnist"


@pytest.mark.parametrize(
    ("platform", "variables", "expected"),
    [
        ("linux", {"XDG_CACHE_HOME": "/x"}, "/x/npdrt"),
        ("linux", {"XDG_CACHE_HOME": "relative"}, "/home/me/.cache/npdrt"),
        ("linux", {"XDG_CACHE_HOME": ""}, "/home/me/.cache/npdrt"),
        ("darwin", {}, "/home/me/Library/Caches/npdrt"),
        ("win32", {"LOCALAPPDATA": "/local"}, "/local/npdrt"),
        ("win32", {"LOCALAPPDATA": ""}, "/home/me/AppData/Local/npdrt"),
    ],
)
def test_user_cache(
    platform: str, variables: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "platform", platform)
    assert user_cache() == Path(expected)


def test_without_a_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user id that the system does not know: a folder that is given serves, else it is said."""

    def unknown(user: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {user}")

    for name in ("HOME", "XDG_CACHE_HOME", "NPDRT_DATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr(sys, "platform", "linux")
    assert user_cache() is None
    assert folders("mnist") == []
    assert locate("mnist", small_mnist(tmp_path)) == tmp_path / "mnist"
    assert {e.name for e in data.listing() if e.where is not None} == {"digits"}
    for ask in (data.fetch, data.verify, locate):
        with pytest.raises(Unavailable, match=r"NPDRT_DATA|none is set"):
            ask("mnist")
    for name in ("wikitext-2", "squad"):
        with pytest.raises(Unavailable, match=f"'{name}' is not .* looked in no folder: none is"):
            data.load(name)
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert user_cache() == Path("/cache/npdrt")


@pytest.mark.parametrize("name", [name for name in catalogue.LOCAL if not folder.named(name)])
def test_a_set_without_a_download_is_said_to_have_none(name: str) -> None:
    for ask in (data.fetch, data.verify, locate):
        with pytest.raises(Error, match=f"no download and no digests of '{name}'"):
            ask(name)


def test_the_catalogue_and_the_table_of_readers_agree() -> None:
    forms = [form for source in catalogue.sources().values() for form in source.forms]
    assert {form.reader for form in forms} == set(READERS)
    for name in catalogue.LOCAL:
        assert text.named(name) or squad.named(name) or folder.named(name)


def test_listing(tmp_path: Path) -> None:
    entries = {entry.name: entry for entry in data.listing(small_mnist(tmp_path))}
    assert list(entries) == list(catalogue.sources())
    assert {"digits", "mnist", "fashion-mnist", "cifar-10", "cifar-100"} <= entries.keys()
    assert entries["mnist"].where == tmp_path / "mnist"
    assert entries["fashion-mnist"].where is None
    assert entries["fashion-mnist"].licence == "MIT"
    assert entries["mnist"].bytes == 11594722
    assert entries["digits"].bundled


def test_verify_tells_missing_from_wrong(tmp_path: Path) -> None:
    small_mnist(tmp_path)
    (tmp_path / "mnist" / MNIST[1]).unlink()
    first, second, *_ = data.verify("mnist", tmp_path)
    assert (first.status, second.status, second.found) == ("wrong", "missing", None)
    assert first.expected.startswith("sha256:440fcabf")
    content = (tmp_path / "mnist" / MNIST[0]).read_bytes()
    assert first.found == f"sha256:{hashlib.sha256(content).hexdigest()}"


def test_bad_catalogue(tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text("[mnist]\nfiles = []\n")
    with pytest.raises(FileRefused, match=r"bad.toml: not a catalogue of data sets: KeyError"):
        data.listing(catalogue=tmp_path / "bad.toml")


def test_importing_does_not_import_pooch() -> None:
    code = "import sys, npdrt.data; sys.exit('pooch' in sys.modules or 'requests' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Downloads, from a real server


class Server(http.server.ThreadingHTTPServer):
    """Serves `files`; `faults` change how a path is answered, once for each entry of its list."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.faults: dict[str, list[str]] = {}
        self.asked: list[str] = []
        self.started = threading.Event()  # half of a slow file has been sent

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        server: Any = self.server
        server.asked.append(self.path)
        faults = server.faults.get(self.path)
        fault = faults.pop(0) if faults else ""
        content = server.files.get(self.path)
        if content is None or fault == "404":
            return self.send_error(404)
        if fault == "wrong":
            content = content[:-1] + b"!"
        if fault == "endless":
            content = content + bytes(1 << 20)
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        half = len(content) // 2
        self.wfile.write(content[:half])
        if fault == "slow":
            self.wfile.flush()
            server.started.set()
            time.sleep(20)
        if fault not in ("drop", "slow"):
            self.wfile.write(content[half:])

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


TOY = {"a.gz": b"first file " * 20_000, "b.gz": b"second"}


@pytest.fixture
def toy(server: Server, tmp_path: Path) -> Path:
    """A catalogue with the data set `toy`, two files on two mirrors of the local server."""
    for mirror in ("one", "two"):
        server.files.update({f"/{mirror}/{name}": content for name, content in TOY.items()})
    digests = {"a.gz": f"sha256:{hashlib.sha256(TOY['a.gz']).hexdigest()}",
               "b.gz": f"md5:{hashlib.md5(TOY['b.gz']).hexdigest()}"}  # fmt: skip
    files = "".join(
        f'{{ role = "x", name = "{n}", bytes = {len(c)}, hash = "{digests[n]}" }},'
        for n, c in TOY.items()
    )
    path = tmp_path / "toy.toml"
    path.write_text(f"""
        [toy]
        what = "two files"
        licence = "none"
        citation = "none"
        image = [1, 1, 1]
        classes = 2
        scale = {{ divisor = 1.0, mean = 0.0, std = 1.0 }}
        mirrors = ["{server.url}one/", "{server.url}two/"]
        files = [{files}]
    """)
    return path


def content_of(folder: Path) -> dict[str, bytes]:
    """Every file under `folder`, hidden and half-done ones too."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def test_fetch(server: Server, toy: Path, tmp_path: Path, capfd: Any) -> None:
    folder = data.fetch("toy", tmp_path / "data", catalogue=toy)
    assert folder == tmp_path / "data" / "toy"
    assert content_of(folder) == TOY
    assert server.asked == ["/one/a.gz", "/one/b.gz"]
    assert [check.status for check in data.verify("toy", tmp_path / "data", catalogue=toy)] == [
        "ok", "ok",
    ]  # fmt: skip
    assert data.fetch("toy", tmp_path / "data", catalogue=toy) == folder
    assert len(server.asked) == 2  # nothing was downloaded again
    assert capfd.readouterr() == ("", "")


def test_fetch_goes_to_the_environments_folder_then_the_cache(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: Server
) -> None:
    assert data.fetch("toy", catalogue=toy) == tmp_path / "cache" / "npdrt" / "toy"
    monkeypatch.setenv("NPDRT_DATA", str(tmp_path / "env"))
    assert data.fetch("toy", catalogue=toy) == tmp_path / "cache" / "npdrt" / "toy"
    (tmp_path / "cache" / "npdrt" / "toy" / "a.gz").unlink()
    assert data.fetch("toy", catalogue=toy) == tmp_path / "env" / "toy"


def test_fetch_replaces_only_what_is_wrong(server: Server, toy: Path, tmp_path: Path) -> None:
    folder = data.fetch("toy", tmp_path, catalogue=toy)
    (folder / "b.gz").write_bytes(b"secomd")
    server.asked.clear()
    data.fetch("toy", tmp_path, catalogue=toy)
    assert content_of(folder) == TOY
    assert server.asked == ["/one/b.gz"]


@pytest.mark.parametrize("fault", ["404", "wrong", "endless", "drop"])
def test_a_second_mirror_helps(fault: str, server: Server, toy: Path, tmp_path: Path) -> None:
    server.faults["/one/a.gz"] = [fault]
    assert content_of(data.fetch("toy", tmp_path / "data", catalogue=toy)) == TOY
    assert server.asked == ["/one/a.gz", "/two/a.gz", "/one/b.gz"]


@pytest.mark.parametrize(
    ("fault", "kind", "message"),
    [
        ("404", Unavailable, "404 Client Error"),
        (
            "wrong",
            FileRefused,
            "does not match the known hash: expected sha256:[0-9a-f]{64} but got",
        ),
        ("endless", FileRefused, "expected 220000 bytes; the server sends more"),
        ("drop", Unavailable, "110000 bytes read, 110000 more expected"),
    ],
)
def test_no_mirror_helps(
    fault: str, kind: type[Error], message: str, server: Server, toy: Path, tmp_path: Path
) -> None:
    server.faults = {"/one/a.gz": [fault], "/two/a.gz": [fault]}
    first, second = (re.escape(f"{server.url}{mirror}/a.gz") for mirror in ("one", "two"))
    expected = (
        rf"could not download a.gz into .*\n  {first}: .*{message}(.|\n)*{second}: .*{message}"
    )
    with pytest.raises(kind, match=expected) as caught:
        data.fetch("toy", tmp_path / "data", catalogue=toy)
    assert caught.type is kind
    assert content_of(tmp_path / "data") == {}
    data.fetch("toy", tmp_path / "data", catalogue=toy)
    assert content_of(tmp_path / "data" / "toy") == TOY


def test_what_was_there_survives_a_failed_download(
    server: Server, toy: Path, tmp_path: Path
) -> None:
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "a.gz").write_bytes(b"mine")
    server.faults = {"/one/a.gz": ["drop"], "/two/a.gz": ["wrong"]}
    with pytest.raises(Unavailable, match="could not download"):
        data.fetch("toy", tmp_path, catalogue=toy)
    assert content_of(tmp_path / "toy") == {"a.gz": b"mine"}


def test_killed_in_mid_download(server: Server, toy: Path, tmp_path: Path) -> None:
    server.faults["/one/a.gz"] = ["slow"]
    code = "import sys; from npdrt import data; from pathlib import Path;"
    code += "data.fetch('toy', sys.argv[1], catalogue=Path(sys.argv[2]))"
    child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "data"), str(toy)])
    assert server.started.wait(15)
    child.send_signal(signal.SIGKILL)
    child.wait()
    folder = tmp_path / "data" / "toy"
    assert [path for path in folder.iterdir() if not path.name.startswith(".fetch-")] == []
    with pytest.raises(Unavailable, match="looked in"):
        locate("toy", tmp_path / "data", catalogue=toy)
    (left,) = folder.iterdir()
    os.utime(left, (0, 0))  # a day later, what it left is cleared away
    assert content_of(data.fetch("toy", tmp_path / "data", catalogue=toy)) == TOY


def test_progress(toy: Path, tmp_path: Path, capfd: Any) -> None:
    data.fetch("toy", tmp_path / "data", progress=True, catalogue=toy)
    out, err = capfd.readouterr()
    assert out == ""
    assert "\ra.gz: 0.2 of 0.2 MB\n" in err


def test_two_at_a_time(toy: Path, tmp_path: Path) -> None:
    results: list[Any] = []

    def work() -> None:
        # Only the two files: another thread's half-done folder may come and go beside them.
        folder = data.fetch("toy", tmp_path / "data", catalogue=toy)
        results.append({name: (folder / name).read_bytes() for name in TOY})

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [TOY] * 4
    assert content_of(tmp_path / "data" / "toy") == TOY


def test_folder_that_cannot_be_made(toy: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DiskError, match=r"cannot write the data set 'toy' to .*; set NPDRT_DATA"):
        data.fetch("toy", tmp_path / "file", catalogue=toy)


def test_no_pooch(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pooch", None)
    with pytest.raises(Unavailable, match=r'pip install "npdrt\[data\]"'):
        data.fetch("toy", tmp_path / "data", catalogue=toy)
    assert not (tmp_path / "data").exists()


# The order of the batches

sizes = st.integers(1, 200).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n)))
seeds = st.integers(0, 2**64 - 1)


@settings(deadline=None)
@given(sizes, seeds, st.integers(0, 5), st.booleans())
def test_an_epoch_is_a_permutation(size: Any, seed: int, epoch: int, drop: bool) -> None:
    n, batch_size = size
    sampler = data.Sampler(n, batch_size, seed, drop_last=drop)
    per_epoch = sampler.batches_per_epoch
    batches = [sampler.batch(epoch * per_epoch + k) for k in range(per_epoch)]
    order = Random(seed, "data/order", epoch).permutation(n)
    np.testing.assert_array_equal(
        np.concatenate(batches), order[: n - n % batch_size if drop else n]
    )
    if not drop:
        assert sorted(np.concatenate(batches)) == list(range(n))
    lengths = {len(batch) for batch in batches[: None if drop else -1]}
    assert lengths <= {batch_size}
    assert all(batch.dtype == np.int64 for batch in batches)


@settings(deadline=None)
@given(sizes, seeds, st.lists(st.integers(0, 500), min_size=1, max_size=10))
def test_any_step_without_the_ones_before(size: Any, seed: int, steps: list[int]) -> None:
    """Asked in any order, and after others were asked, a step has the batch of a sequential run."""
    sampler = data.Sampler(*size, seed)
    sequential = [sampler.batch(step) for step in range(max(steps) + 1)]
    for step in steps:
        np.testing.assert_array_equal(sampler.batch(step), sequential[step])
        np.testing.assert_array_equal(data.Sampler(*size, seed).batch(step), sequential[step])


def test_order_is_fixed_for_all_time() -> None:
    sampler = data.Sampler(10, 4, seed=1)
    assert [sampler.batch(step).tolist() for step in range(4)] == [
        [4, 5, 8, 2],
        [3, 1, 6, 0],
        [7, 9],
        [5, 1, 8, 9],
    ]


def test_a_batch_can_be_written_to() -> None:
    sampler = data.Sampler(10, 4)
    before = sampler.batch(0).copy()
    sampler.batch(0)[:] = 0
    np.testing.assert_array_equal(sampler.batch(0), before)


def test_bad_samplers() -> None:
    with pytest.raises(Error, match=r"batch size: expected 1 to 5, .*; got 6"):
        data.Sampler(5, 6)
    with pytest.raises(Error, match=r"batch size: expected 1 to 5, .*; got 0"):
        data.Sampler(5, 0)
    with pytest.raises(Error, match="step: expected 0 or more; got -1"):
        data.Sampler(5, 5).batch(-1)
    with pytest.raises(Error, match="seed must lie in"):
        data.Sampler(5, 5, seed=-1)
