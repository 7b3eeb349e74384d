"""Files of torch.save: read as PyTorch reads them, and nothing in them is run."""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from npdrt.errors import FileRefused
from npdrt.store import torch_file

RNG = np.random.default_rng(1945)
scratch = settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


# --- files by hand: instructions of protocol 2 --------------------------------------------------


def text(x: str) -> bytes:
    return b"X" + struct.pack("<I", len(x)) + x.encode()


def whole(n: int) -> bytes:
    return b"J" + struct.pack("<i", n)


def several(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def storage(key: str, count: int, kind: str = "FloatStorage") -> bytes:
    parts = text("storage"), b"ctorch\n" + kind.encode() + b"\n", text(key), text("cpu")
    return several(*parts, whole(count), b"N") + b"Q"


def tensor(key: str, count: int, shape: Any, strides: Any, offset: int = 0, **more: Any) -> bytes:
    sizes = (several(*map(whole, numbers)) for numbers in (shape, strides))
    hooks = b"ccollections\nOrderedDict\n)R"
    arguments = storage(key, count, **more), whole(offset), *sizes, b"\x89", hooks
    return b"ctorch._utils\n_rebuild_tensor_v2\n" + several(*arguments) + b"R"


def pickled(*entries: tuple[str, bytes]) -> bytes:
    body = b"".join(text(name) + value for name, value in entries)
    return b"\x80\x02ccollections\nOrderedDict\n)R(" + body + b"u."


def old_format(content: bytes, storages: dict[str, bytes], item: int = 4) -> bytes:
    """The five pickles, then the storages."""
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"int": 4}}
    out = [pickle.dumps(x, protocol=2) for x in (torch_file.MAGIC, torch_file.VERSION, system)]
    out += [content, pickle.dumps(list(storages), protocol=2)]
    for data in storages.values():
        out += [struct.pack("<q", len(data) // item), data]
    return b"".join(out)


def new_format(content: bytes, storages: dict[str, bytes], **how: Any) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", **how) as archive:
        archive.writestr("archive/data.pkl", content)
        for key, data in storages.items():
            archive.writestr(f"archive/data/{key}", data)
    return out.getvalue()


FORMATS = [old_format, new_format]
FLOATS = np.arange(24, dtype="<f4")
STORED = {"0": FLOATS.tobytes()}


def read(tmp_path: Path, content: bytes) -> Any:
    path = tmp_path / "a.pth"
    path.write_bytes(content)
    return torch_file.read(path)


# --- what is read -----------------------------------------------------------------------------


@pytest.mark.parametrize("old", [True, False])
def test_as_torch_reads_it(old: bool, tmp_path: Path) -> None:
    """Every dtype, parts of one storage, other orders in memory, empty arrays and numbers."""
    torch = pytest.importorskip("torch")
    base = torch.tensor(RNG.standard_normal((6, 5)))
    state = OrderedDict(base=base, part=base[2:4], column=base[:, 1], turned=base.T)
    state |= {"image": base.reshape(1, 2, 3, 5).contiguous(memory_format=torch.channels_last)}
    state |= {"empty": torch.zeros(3, 0), "number": torch.tensor(7), "two words": base[0] > 0}
    for kind in (torch.float32, torch.float16, torch.int32, torch.int16, torch.int8, torch.uint8):
        state[str(kind)] = (base * 9).abs().to(kind)
    torch.save(state, tmp_path / "a.pth", _use_new_zipfile_serialization=not old)
    found = torch_file.read(tmp_path / "a.pth")
    assert list(found) == list(state)
    for name, value in found.items():
        assert value.dtype == state[name].numpy().dtype
        assert np.array_equal(value, state[name].numpy())
        assert value.flags.c_contiguous
        assert value.flags.owndata


@pytest.mark.parametrize("form", FORMATS)
def test_files_by_hand(form: Callable[..., bytes], tmp_path: Path) -> None:
    content = pickled(("a", tensor("0", 24, (2, 3), (1, 4), 5)), ("b", tensor("0", 24, (), (), 7)))
    found = read(tmp_path, form(content, STORED))
    assert np.array_equal(found["a"], [[5, 9, 13], [6, 10, 14]])
    assert found["b"] == 7


# --- what is refused --------------------------------------------------------------------------

ONE = pickled(("a", tensor("0", 24, (24,), (1,))))
BAD: dict[str, tuple[bytes, str]] = {
    "a call": (b"\x80\x02cos\nsystem\n(X\x02\x00\x00\x00lstR.", "GLOBAL naming 'os system'"),
    "a class": (pickle.dumps(RuntimeError("a"), protocol=2), "opcode GLOBAL naming"),
    "another call": (b"\x80\x02ccollections\nOrderedDict\n(K\x01tR.", "REDUCE with another call"),
    "a state": (b"\x80\x02K\x01}b.", "opcode BUILD for another value than a dict"),
    "another id": (b"\x80\x02" + several(*[b"K\x01"] * 5) + b"Q.", "opcode BINPERSID"),
    "a short id": (b"\x80\x02K\x01Q.", "damaged pickle"),
    "protocol 4": (pickle.dumps({}, protocol=4), "opcode PROTO 4"),
    "a list": (b"\x80\x02].", "expected a state dict"),
    "numbers": (pickled(("a", b"K\x01")), "expected a state dict, names and their tensors"),
    "nested": (pickled(("a", b"}")), "expected a state dict"),
    "keys": (b"\x80\x02}(K\x01K\x02u.", "keys that are not texts"),
    "outside": (pickled(("a", tensor("0", 24, (24,), (1,), 1))), "not inside its storage of 24"),
    "far": (pickled(("a", tensor("0", 24, (2, 2), (1, 23)))), "not inside its storage of 24"),
    "repeated": (pickled(("a", tensor("0", 24, (99, 9), (0, 1)))), "not inside its storage"),
    "negative": (pickled(("a", tensor("0", 24, (2,), (-1,), 9))), "as whole numbers"),
    "few strides": (pickled(("a", tensor("0", 24, (2, 2), (1,)))), "as whole numbers"),
    "two sizes": (
        pickled(("a", tensor("0", 24, (2,), (1,))), ("b", tensor("0", 99, (99,), (1,)))),
        "a storage has two types or sizes",
    ),
    "bfloat16": (
        pickled(("a", tensor("0", 24, (2,), (1,), kind="BFloat16Storage"))),
        "GLOBAL naming 'torch BFloat16Storage'",
    ),
}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("what", BAD)
def test_bad_pickles_are_refused(what: str, form: Callable[..., bytes], tmp_path: Path) -> None:
    content, message = BAD[what]
    with pytest.raises(FileRefused, match=message) as caught:
        read(tmp_path, form(content, STORED))
    assert str(caught.value).startswith(f"{tmp_path / 'a.pth'}: ")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected a file of torch.save; it begins b''"),
        (b"\x93NUMPY", "expected a file of torch.save"),
        (old_format(ONE, STORED)[:-1], "storage 0: expected 96 bytes; the file has fewer"),
        (old_format(ONE, {"0": STORED["0"][4:]}), "storage 0 has not its 24 elements"),
        (old_format(ONE, {"1": STORED["0"]}), "list of storages is not that of its tensors"),
        (old_format(ONE, {**STORED, "1": b""}), "list of storages is not that of its tensors"),
        (old_format(ONE, STORED).replace(b"little_endian", b"little_engine"), "little-endian"),
        (old_format(ONE, STORED)[:60], "damaged pickle"),
        (pickle.dumps({"a": 1}, protocol=2) * 5, "damaged pickle|little-endian"),
        (new_format(ONE, STORED, compression=zipfile.ZIP_DEFLATED), "not compressed"),
        (new_format(ONE, {}), "damaged zip archive: .*archive/data/0"),
        (new_format(ONE, {"0": STORED["0"][1:]}), "storage 0: expected 96 bytes"),
        (new_format(ONE, STORED)[:-30], "damaged zip archive"),
        (new_format(ONE, STORED).replace(b"data.pkl", b"data.abc"), "expected a zip archive of"),
    ],
)
def test_damaged_files_are_refused(content: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(FileRefused, match=message) as caught:
        read(tmp_path, content)
    assert str(caught.value).startswith(f"{tmp_path / 'a.pth'}: ")


def test_numbers_are_bounded_by_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a large storage that is not there, nor a small one many times."""
    huge = pickled(("a", tensor("0", 1 << 30, (1 << 30,), (1,))))
    with pytest.raises(FileRefused, match="storage 0: expected 4294967296 bytes; the file has"):
        read(tmp_path, new_format(huge, STORED))
    monkeypatch.setattr(torch_file, "FREE", 100)
    again = [(f"{k}", b"h\x00") for k in range(99)]
    content = new_format(pickled(("a", tensor("0", 24, (24,), (1,)) + b"q\x00"), *again), STORED)
    with pytest.raises(FileRefused, match=f"holds 2400 numbers; at most {len(content)} are read"):
        read(tmp_path, content)
    monkeypatch.setattr(torch_file, "FREE", 2400)
    assert len(read(tmp_path, content)) == 100
    monkeypatch.setattr(torch_file, "MAX_FILE", len(content) - 1)
    with pytest.raises(FileRefused, match=f"{len(content)} bytes; at most {len(content) - 1}"):
        read(tmp_path, content)


@scratch
@given(st.sampled_from(FORMATS), st.data())
def test_damage_never_raises_anything_else(
    tmp_path: Path, form: Callable[..., bytes], data: st.DataObject
) -> None:
    raw = bytearray(form(ONE, STORED))
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        found = read(tmp_path, bytes(raw[: data.draw(st.integers(1, len(raw)))] if
                               data.draw(st.booleans()) else raw))  # fmt: skip
    except FileRefused:
        return
    assert all(value.size <= 24 for value in found.values())


PIECES = [
    b"}", b"(", b"t", b")", b"]", b"R", b"b", b"Q", b"u", b"s", b"N", b"\x88", b"q\x00", b"h\x00",
    b"ccollections\nOrderedDict\n", b"ctorch._utils\n_rebuild_tensor_v2\n", storage("0", 24),
    b"ctorch\nFloatStorage\n", text("storage"), text("a"), whole(3), whole(-1), b"\x86", b"\x85",
]  # fmt: skip


@scratch
@given(st.lists(st.sampled_from(PIECES), max_size=40))
def test_random_programs_never_raise_anything_else(tmp_path: Path, pieces: list[bytes]) -> None:
    try:
        read(tmp_path, new_format(b"\x80\x02" + b"".join(pieces) + b".", STORED))
    except FileRefused:
        return
