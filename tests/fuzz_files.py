"""Read thousands of forged files: each is read or refused, and nothing else happens.

    python tests/fuzz_files.py containers 20000
    python tests/fuzz_files.py recordings 5000 [SEED [fork]]

Containers have a digest that is right. Some have a forged index, some an index that is right and
anything in the rest of the file. Recordings are npz, safetensors and HDF5, the checksums of their
members and metadata right where that leads deeper. A traceback, a signal or a hang ends the script
with another exit code than 0; at the end it prints counts and the peak of memory as JSON. With
`fork` the child that reads HDF5 is a copy of this process, which is faster than a new one.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import random
import re
import resource
import signal
import struct
import subprocess
import sys
import tempfile
import time
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from click.testing import CliRunner

from npdrt import store
from npdrt.cli import cli
from npdrt.conform import recorded
from npdrt.errors import Error, FileRefused
from npdrt.store import child, container, trace

SECONDS = 60  # for one file; the machine may be busy
EDGES = [0, 1, 2, 7, 8, 255, 256, 511, 512, 0x7FFF, 0xFFFF, 1 << 31, (1 << 32) - 1, 1 << 40,
         (1 << 63) - 1, 1 << 63, (1 << 64) - 1]  # fmt: skip
VALUES = [*EDGES, -1, -(1 << 63), 1 << 70, True, False, None, "", "a", "float32", "object", "../x",
          "a/b", [], {}, [[]], [0], 0.5, -0.0, 1e300, "\x1b[2J", "ä", "=1+1"]  # fmt: skip


# --- changes of bytes ---------------------------------------------------------------------------


def flipped(data: bytes, chance: random.Random, start: int = 0) -> bytes:
    """A few bytes changed."""
    out = bytearray(data)
    for _ in range(chance.choice([1, 1, 1, 2, 4, 16])):
        out[chance.randrange(start, len(out))] = chance.choice([0, 255, chance.randrange(256)])
    return bytes(out)


def numbered(data: bytes, chance: random.Random, start: int = 0) -> bytes:
    """A little-endian integer changed to one at an edge, or near one."""
    width = chance.choice([1, 2, 4, 8])
    at = chance.randrange(start, max(start + 1, len(data) - width))
    value = (chance.choice(EDGES) + chance.choice([-1, 0, 0, 1])) % (1 << 8 * width)
    return data[:at] + value.to_bytes(width, "little") + data[at + width :]


def spliced(data: bytes, chance: random.Random, start: int = 0) -> bytes:
    """A piece removed, doubled or put elsewhere."""
    a, b = sorted(chance.randrange(start, len(data) + 1) for _ in range(2))
    b = min(b, a + chance.choice([1, 8, 64, 4096]))
    at = chance.randrange(start, len(data) + 1)
    return chance.choice([data[:a] + data[b:], data[:at] + data[a:b] + data[at:], data[:b]])


BYTES: list[Callable[..., bytes]] = [flipped, numbered, spliced]


def changed_json(value: Any, chance: random.Random) -> Any:
    """A JSON value with one part, somewhere in it, replaced, removed or doubled."""
    if isinstance(value, dict) and value and chance.random() < 0.9:
        key = chance.choice(list(value))
        rest = {k: v for k, v in value.items() if k != key}
        new = chance.choice([key, key, key, "x", "meta", "a/b"])
        return rest if chance.random() < 0.1 else {**rest, new: changed_json(value[key], chance)}
    if isinstance(value, list) and value and chance.random() < 0.9:
        k = chance.randrange(len(value))
        some = [[changed_json(value[k], chance)]] * 6 + [[], [value[k]] * 2]
        return [*value[:k], *chance.choice(some), *value[k + 1 :]]
    if isinstance(value, int) and chance.random() < 0.5:
        return value + chance.choice([-8, -1, 1, 8, 1 << 32])
    return chance.choice(VALUES)


# --- containers -----------------------------------------------------------------------------------


def sealed(data: bytes) -> bytes:
    """The length and the digest made right."""
    data = data.ljust(512, b"\0")
    head = struct.pack("<8sQ", data[:8], len(data) - 512)
    return head + hashlib.sha256(data[48:]).digest() + data[48:]


def with_meta(data: bytes, text: bytes) -> bytes:
    """Another /meta, behind the rest."""
    place = struct.pack("<QQ", len(data), len(text))
    return data[:52] + place + data[68:] + text


def whole_containers(folder: Path) -> list[bytes]:
    """A checkpoint and a trace, small."""
    params = {f"layers/{k:02d}/{n}": np.ones((k + 2, 3), "f4") for k in range(3) for n in "wb"}
    store.save(folder / "a", params, state={"step": np.int64(3)}, meta={"a": [1, {"b": "ä"}]})
    records = [{"event": "epoch", "step": 3, "epoch": 1, "lr": 0.1, "train_loss": 2.0}]
    trace.write(folder / "b", records, ["w", "b"])
    return [(folder / name).read_bytes() for name in "ab"]


def forged_container(data: bytes, chance: random.Random) -> tuple[str, bytes]:
    """What was forged, and the file with a digest that is right."""
    start, length = struct.unpack_from("<QQ", data, 52)
    text = data[start : start + length]
    kind = chance.choice(["bytes", "index", "index", "index text", "behind the index", "header"])
    if kind == "bytes":
        return kind, sealed(chance.choice(BYTES)(data, chance, 48))
    if kind == "header":
        return kind, sealed(numbered(data[:80], chance, 48) + data[80:])
    if kind == "index":
        value = json.loads(text)
        for _ in range(chance.choice([1, 1, 2, 5])):
            value = changed_json(value, chance)
        settings: dict[str, Any] = {"sort_keys": True, "separators": (",", ":")}
        text = json.dumps(value, ensure_ascii=False, **settings).encode("utf-8", "replace")
        return kind, sealed(with_meta(data, text))
    if kind == "index text":
        return kind, sealed(with_meta(data, chance.choice(BYTES)(text, chance)))
    body, rows = data[:start], json.loads(text)["arrays"]
    kept = [
        (at, at + int(np.prod(shape)) * np.dtype(kind_).itemsize) for _, kind_, shape, at in rows
    ]
    return kind, sealed(rewritten(body, kept, chance) + data[start:])


def rewritten(body: bytes, kept: list[tuple[int, int]], chance: random.Random) -> bytes:
    """What HDF5 would read, changed in many places; the arrays are left."""
    out = bytearray(body)
    for _ in range(chance.choice([1, 4, 64, 512])):
        at = chance.randrange(512, len(out))
        if not any(a <= at < b for a, b in kept):
            out[at] = chance.randrange(256)
    return bytes(out)


def read_container(path: Path, kind: str, expected: dict[str, Any]) -> str:
    """ "read" or "refused"; whatever else happens is raised."""
    result = CliRunner().invoke(cli, ["show", str(path)])
    if result.exit_code not in (0, 3) or "Traceback" in result.output:
        raise result.exception or AssertionError(result.output)
    try:
        found, _ = container.read(path)
    except FileRefused:
        assert kind != "behind the index", "arrays that are there were refused"
        assert result.exit_code == 3, result.output
        return "refused"
    assert sum(v.nbytes for v in found.values()) <= path.stat().st_size
    if kind == "behind the index":
        assert all(found[name].tobytes() == v.tobytes() for name, v in expected.items())
    return "read"


def containers(count: int, seed: int, folder: Path) -> Iterator[str]:
    """Read that many forged containers."""
    whole, path = whole_containers(folder), folder / "forged.h5"
    expected = [container.read(folder / name)[0] for name in "ab"]
    for n in range(count):
        chance = random.Random(f"{seed} {n}")
        which = chance.randrange(2)
        kind, data = forged_container(whole[which], chance)
        path.unlink(missing_ok=True)
        path.write_bytes(data)
        yield f"{kind}: {read_container(path, kind, expected[which])}"


# --- recordings -----------------------------------------------------------------------------------

ARRAYS: dict[str, Any] = {
    "weights": np.linspace(0, 1, 36, dtype="f4").reshape(6, 2, 3),
    "gradients": np.ones((5, 2, 3), "f4"),
    "lr": np.full(5, 0.1),
}


def whole_npz(compressed: bool) -> bytes:
    """An npz file."""
    out = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(out, **ARRAYS)
    return out.getvalue()


def whole_hdf5(**settings: Any) -> bytes:
    """An HDF5 file: settings of h5py.File, and of its datasets under `data`."""
    out, each = io.BytesIO(), settings.pop("data", {})
    with h5py.File(out, "w", **settings) as file:
        for name, value in ARRAYS.items():
            file.create_dataset(f"layer/{name}", data=value, **each)
    return out.getvalue()


def whole_safetensors() -> bytes:
    """A safetensors file."""
    from safetensors.numpy import save

    return bytes(save({name: np.ascontiguousarray(v) for name, v in ARRAYS.items()}))


def whole_recordings() -> dict[str, list[bytes]]:
    """Files of every kind by their kind."""
    chunks = {"data": {"chunks": True, "compression": "gzip", "shuffle": True}}
    return {
        "npz": [whole_npz(False), whole_npz(True)],
        "safetensors": [whole_safetensors()],
        "hdf5": [
            whole_hdf5(), whole_hdf5(**chunks), whole_hdf5(libver="v110"),
            whole_hdf5(libver="latest", **chunks),
        ],
    }  # fmt: skip


def forged_npz(data: bytes, chance: random.Random) -> bytes:
    """Bytes of the archive, or a member changed and packed again with the right checksum."""
    if chance.random() < 0.5:
        return chance.choice(BYTES)(data, chance)
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w", 8) as new:
        for number, info in enumerate(old.infolist()):
            content = old.read(info)
            if chance.random() < 0.5:
                content = chance.choice([*BYTES, reshaped])(content, chance)
            twice = number and chance.random() < 0.05
            with warnings.catch_warnings(action="ignore", category=UserWarning):
                new.writestr(old.namelist()[0] if twice else info.filename, content)
    return out.getvalue()


def reshaped(content: bytes, chance: random.Random) -> bytes:
    """An npy member with another header."""
    shape = tuple(chance.choice([*EDGES, -1]) for _ in range(chance.randrange(4)))
    header = {"descr": chance.choice(["<f4", "<f8", "O", "<c16", "S9", "<f4,<f4", "?", "<U70000"]),
              "fortran_order": chance.choice([True, False]), "shape": shape}  # fmt: skip
    text = chance.choice([str(header), str(header)[:-9], "(" * 3000, "[" * 9000]).encode() + b"\n"
    if chance.random() < 0.2:
        text = text.ljust(1 << 20)
    if len(text) < 1 << 16:
        return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + content[128:]
    return b"\x93NUMPY\x02\x00" + struct.pack("<I", len(text)) + text + content[128:]


def forged_safetensors(data: bytes, chance: random.Random) -> bytes:
    """Bytes, or the header changed and its length made right."""
    if chance.random() < 0.4:
        return chance.choice(BYTES)(data, chance)
    length = int.from_bytes(data[:8], "little")
    value = changed_json(json.loads(data[8 : 8 + length]), chance)
    text = json.dumps(value).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def forged_hdf5(data: bytes, chance: random.Random) -> bytes:
    """Bytes; the checksums of the object headers are made right where there are some."""
    spans = list(headers(data))
    if not spans or chance.random() < 0.2:
        return chance.choice(BYTES)(data, chance)
    out = data
    for _ in range(chance.choice([1, 1, 2, 3])):
        start, end = chance.choice(spans)
        piece = chance.choice([flipped, numbered])(out[start + 4 : end], chance)[: end - start - 4]
        out = out[: start + 4] + piece + out[start + 4 + len(piece) :]
        out = out[:end] + lookup3(out[start:end]).to_bytes(4, "little") + out[end + 4 :]
    return out


FORGED = {"npz": forged_npz, "safetensors": forged_safetensors, "hdf5": forged_hdf5}


def recordings(count: int, seed: int, folder: Path) -> Iterator[str]:
    """Read that many forged recordings."""
    whole, path = whole_recordings(), folder / "forged"
    for n in range(count):
        chance = random.Random(f"{seed} {n}")
        kind = chance.choice(list(whole))
        path.write_bytes(FORGED[kind](chance.choice(whole[kind]), chance))
        try:
            recorded.load(path)
            yield f"{kind}: read"
        except Error as error:
            if str(path) not in str(error):
                raise AssertionError("the refusal does not name the file") from error
            signalled = re.search(r"gave no answer \((killed by \w+)\)", str(error))
            yield f"{kind}: {signalled[1] + ' in the child' if signalled else 'refused'}"


class Forked:
    """The part of subprocess.Popen that `npdrt.workers` uses, by fork."""

    def __init__(self, words: list[str], stdin: Any, **_: Any) -> None:
        reading, writing = os.pipe()
        self.pid = os.fork()
        self.returncode: int | None = None
        if self.pid == 0:
            os.dup2(stdin.fileno(), 0)
            os.dup2(writing, 1)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            sys.argv, sys.stdin, sys.stdout = words[2:], os.fdopen(0), os.fdopen(1, "w")
            signal.alarm(0)
            child.main()
            os._exit(0)
        os.close(writing)
        self.stdout = os.fdopen(reading, "rb")

    def __enter__(self) -> Forked:
        return self

    def __exit__(self, *_: object) -> None:
        self.stdout.close()
        self.wait()

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code, once it has ended."""
        if self.returncode is None:
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.returncode

    def kill(self) -> None:
        """End it, at the end of its answer or after a time; there may be nothing left to end."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)


# --- checksums of HDF5's metadata -----------------------------------------------------------------


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


def headers(data: bytes) -> Iterator[tuple[int, int]]:
    """Start and end of each object header (version 2), its checksum of 4 bytes not included."""
    for match in re.finditer(b"OHDR", data):
        start, flags = match.start(), data[match.start() + 5]
        width = 1 << (flags & 3)
        size_at = start + 6 + (16 if flags & 0x20 else 0) + (4 if flags & 0x10 else 0)
        end = size_at + width + int.from_bytes(data[size_at : size_at + width], "little")
        if end + 4 <= len(data):
            yield start, end


# --- the run --------------------------------------------------------------------------------------


def own_peak() -> int:
    """The most memory of this process in KiB; `getrusage` has that of its parent in it."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])  # type: ignore[index]


def main(what: str, count: str, seed: str = "0", how: str = "") -> None:
    """Read the files; print what became of them."""
    if how == "fork":
        subprocess.Popen = Forked  # type: ignore[assignment,misc]
    counts: Counter[str] = Counter()
    slowest, begin = 0.0, time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        runs = {"containers": containers, "recordings": recordings}
        signal.alarm(SECONDS)
        for outcome in runs[what](int(count), int(seed), Path(folder)):
            signal.alarm(SECONDS)  # a hang ends the script
            now = time.monotonic()
            slowest, begin = max(slowest, now - begin), now
            counts[outcome] += 1
    peak = max(own_peak(), resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss) * 1024
    print(json.dumps({"counts": counts, "peak_bytes": peak, "slowest_seconds": round(slowest, 1)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
