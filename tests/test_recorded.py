"""Recorded trajectories are read as they were written, or refused with what is wrong."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from npdrt import optim
from npdrt.conform import recorded
from npdrt.conform.rules import RULES, run
from npdrt.errors import Error, FileRefused, Unavailable
from npdrt.store import foreign

Arrays = dict[str, Any]
SGD = {"momentum": 0.0, "dampening": 0.0, "nesterov": False, "weight_decay": 0.0}


def as_npz(path: Path, arrays: Arrays) -> Path:
    np.savez(path.with_suffix(".npz"), **arrays)
    return path.with_suffix(".npz")


def as_safetensors(path: Path, arrays: Arrays) -> Path:
    save_file = pytest.importorskip("safetensors.numpy").save_file
    save_file({k: np.asarray(v, order="C") for k, v in arrays.items()}, path)
    return path


def as_hdf5(path: Path, arrays: Arrays, **options: Any) -> Path:
    with h5py.File(path, "w") as file:
        for name, value in arrays.items():
            file.create_dataset(name, data=value, **(options if np.ndim(value) else {}))
    return path


WRITERS: dict[str, Callable[[Path, Arrays], Path]] = {
    "npz": as_npz,
    "safetensors": as_safetensors,
    "hdf5": as_hdf5,
    "hdf5, gzip": lambda path, arrays: as_hdf5(path, arrays, compression="gzip", shuffle=True),
}


def trajectory(rule: str, dtype: str, shape: tuple[int, ...] = (2, 3), **settings: Any) -> Arrays:
    """Five steps of npdrt's own rule."""
    draw = np.random.default_rng(5)
    w = {"w": draw.normal(size=shape).astype(dtype)}
    gradients = draw.normal(size=(5, *shape)).astype(dtype)
    rates = np.array([0.1, 0.2, 0.05, 0.3, 0.01])
    optimizer = optim.RULES[rule](lr=0.1, **settings)
    state, weights = optimizer.init(w), [w["w"]]
    for g, lr in zip(gradients, rates, strict=True):
        w, state = optimizer.update(w, {"w": g}, state, lr=lr)
        weights.append(w["w"])
    return {"weights": np.array(weights), "gradients": gradients, "lr": rates}


def ulps(recording: recorded.Recording, rule: str, settings: dict[str, Any]) -> float:
    """The largest distance of a recording from its rule."""
    worst = 0.0
    for case, answers in recorded.cases(recording, rule, settings):
        for got, exact in zip(answers, run(RULES[rule], {}, case, answers=answers), strict=True):
            distance = np.abs(got.w - exact.w) / case.number.ulp(exact.scale)
            worst = max(worst, float(np.max(distance)))
    return worst


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("form", WRITERS)
def test_what_is_written_is_read(form: str, dtype: str, tmp_path: Path) -> None:
    arrays = trajectory("fromage", dtype)
    [found] = recorded.load(WRITERS[form](tmp_path / "file", {**arrays, "loss": np.arange(5)}))
    assert (found.name, found.format, found.gaps) == ("", dtype, [])
    assert np.array_equal(found.before, arrays["weights"][:-1].astype(np.float64))
    assert np.array_equal(found.after, arrays["weights"][1:].astype(np.float64))
    assert np.array_equal(found.gradients, arrays["gradients"].astype(np.float64))
    assert np.array_equal(found.lr, arrays["lr"])
    assert {x.dtype for x in (found.before, found.after, found.gradients, found.lr)} == {
        np.dtype(np.float64)
    }


@pytest.mark.parametrize(
    ("rule", "settings"),
    [
        ("sgd", SGD),
        ("sgd", {**SGD, "momentum": 0.9, "nesterov": True}),
        ("adam", {"betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1, "decoupled": True}),
        ("lars", {"momentum": 0.9, "weight_decay": 0.1, "trust_coefficient": 0.1, "eps": 0.0}),
        ("fromage", {"norm_bound": 1.1}),
    ],
)
def test_npdrt_is_recorded_as_its_rule(rule: str, settings: Any, tmp_path: Path) -> None:
    arrays = trajectory(rule, "float32", **settings)
    [found] = recorded.load(as_npz(tmp_path / "file", arrays))
    [(case, answers)] = recorded.cases(found, rule, settings, first=7)
    assert (case.id, case.rule, case.format, case.state) == (7, rule, "float32", None)
    assert len(case.steps) == len(answers) == 5
    assert ulps(found, rule, settings) < 8
    other = "adam" if rule == "sgd" else "sgd"
    assert ulps(found, other, SGD if other == "sgd" else {"betas": (0.9, 0.999), "eps": 0.0}) > 1e3


def test_several_tensors(tmp_path: Path) -> None:
    one, two = trajectory("sgd", "float32"), trajectory("sgd", "float64", (3,))
    arrays = {"lr": one.pop("lr"), **{f"layers/1/weight/{k}": v for k, v in one.items()}}
    arrays |= {f"layers.1.bias/{k}": v for k, v in two.items()}
    for form in WRITERS:
        path = WRITERS[form](tmp_path / "file", arrays)
        bias, weight = recorded.load(path)
        assert (bias.name, weight.name) == ("layers.1.bias", "layers/1/weight")
        [(case, _)] = recorded.cases(bias, "sgd", SGD)
        assert (case.kind, case.format) == ("bias", "float64")
        assert case.comment == "layers.1.bias: recorded steps 1 to 5"
        [(case, _)] = recorded.cases(weight, "sgd", SGD)
        assert case.kind == "weight"
        [single] = recorded.load(path, parameter="layers.1.bias")
        assert single.name == "layers.1.bias"
        with pytest.raises(Error, match=r"no tensor 'x'; it has .*layers\.1\.bias"):
            recorded.load(path, parameter="x")


def test_bfloat16_in_safetensors(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    bits = np.array([[0x3F80, 0xC000], [0x0001, 0x7F80]], dtype="<u2")
    header = {
        "weights": {"dtype": "BF16", "shape": [2, 2], "data_offsets": [0, 8]},
        "gradients": {"dtype": "BF16", "shape": [1, 2], "data_offsets": [8, 12]},
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path = tmp_path / "file"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bits.tobytes() + bits[:1].tobytes())
    [found] = recorded.load(path, lr=0.5)
    assert found.format == "bfloat16"
    assert np.array_equal(found.before, [[1.0, -2.0]])
    assert np.array_equal(found.after, [[2.0**-133, np.inf]])
    assert np.array_equal(found.lr, [0.5])


def triple(gaps: bool) -> Arrays:
    """Steps as before, gradient and after; with gaps, the third begins anew."""
    arrays = trajectory("sgd", "float32")
    weights, g, lr = arrays["weights"].copy(), arrays["gradients"], arrays["lr"]
    before, after = weights[:-1].copy(), weights[1:].copy()
    if gaps:
        before[2] += 1
        after[2] = before[2] - np.float32(lr[2]) * g[2]
        before[3] = after[2]
        after[3] = before[3] - np.float32(lr[3]) * g[3]
    return {"before": before, "after": after, "gradients": g, "lr": lr}


def test_steps_apart(tmp_path: Path) -> None:
    [joined] = recorded.load(as_npz(tmp_path / "a", triple(gaps=False)))
    assert joined.gaps == []
    assert len(recorded.cases(joined, "adam", {})) == 1
    [apart] = recorded.load(as_npz(tmp_path / "b", triple(gaps=True)))
    assert apart.gaps == [2, 4]
    cases = recorded.cases(apart, "sgd", SGD, first=3)
    assert [(c.id, len(c.steps), len(a)) for c, a in cases] == [(3, 2, 2), (4, 2, 2), (5, 1, 1)]
    assert [c.comment for c, _ in cases][1] == "recorded steps 3 to 4"
    assert ulps(apart, "sgd", SGD) < 3
    for rule, settings in (
        ("adam", {}),
        ("sgd", {"momentum": 0.9}),
        ("lars", {"momentum": 0.9}),
        ("fromage", {"norm_bound": 1.0}),
    ):
        with pytest.raises(Error, match=f"step 3 does not begin where step 2 ended, and {rule} "):
            recorded.cases(apart, rule, settings)
    assert len(recorded.cases(apart, "lars", {"momentum": 0.0})) == 3


def test_nan_does_not_break_a_trajectory(tmp_path: Path) -> None:
    arrays = triple(gaps=False)
    arrays["after"][1, 0, 0] = arrays["before"][2, 0, 0] = np.nan
    [found] = recorded.load(as_npz(tmp_path / "a", arrays))
    assert found.gaps == []


def test_learning_rates(tmp_path: Path) -> None:
    arrays = trajectory("sgd", "float32")
    with pytest.raises(Error, match="has lr itself"):
        recorded.load(as_npz(tmp_path / "a", arrays), lr=0.1)
    rates = arrays.pop("lr")
    with pytest.raises(Error, match="has no lr; give the learning rate"):
        recorded.load(as_npz(tmp_path / "a", arrays))
    for bad in (np.nan, np.inf):
        with pytest.raises(Error, match="lr: expected a finite number"):
            recorded.load(tmp_path / "a.npz", lr=bad)
    [found] = recorded.load(tmp_path / "a.npz", lr=0.25)
    assert found.lr.tolist() == [0.25] * 5
    for form in WRITERS:
        for one in (np.float64(1), np.ones(5, np.float32), np.int64(1)):
            [found] = recorded.load(WRITERS[form](tmp_path / "b", {**arrays, "lr": one}))
            assert found.lr.tolist() == [1.0] * 5
    rates[3] = np.nan
    with pytest.raises(FileRefused, match="lr of step 4 is nan"):
        recorded.load(as_npz(tmp_path / "a", {**arrays, "lr": rates}))
    with pytest.raises(FileRefused, match=r"lr is \(4,\); expected \(5,\), or one number"):
        recorded.load(as_npz(tmp_path / "a", {**arrays, "lr": rates[:4]}))


def changed(**fields: Any) -> Arrays:
    arrays = {**trajectory("sgd", "float32"), **fields}
    return {name: value for name, value in arrays.items() if value is not None}


REFUSED: dict[str, tuple[Arrays, str]] = {
    "empty": ({}, "found none of them"),
    "only lr": ({"lr": np.ones(2)}, "found none of them"),
    "no gradients": (changed(gradients=None), "found lr, weights"),
    "no weights": (changed(weights=None), "found gradients, lr"),
    "no after": (changed(weights=None, before=np.zeros((5, 2, 3))), "found before, gradients, lr"),
    "both forms": (changed(before=np.zeros((5, 2, 3), np.float32)), "keep one form"),
    "one weight too few": (
        changed(weights=np.zeros((5, 2, 3), np.float32)),
        r"weights \(5, 2, 3\), gradients \(5, 2, 3\)",
    ),
    "another shape": (
        changed(weights=np.zeros((6, 3, 2), np.float32)),
        r"weights \(6, 3, 2\), gradients \(5, 2, 3\)",
    ),
    "no steps": (
        changed(weights=np.zeros((1, 2), np.float32), gradients=np.zeros((0, 2), np.float32)),
        "of one step at least",
    ),
    "numbers": (changed(weights=np.float32(1), gradients=np.float32(1)), "shapes do not fit"),
    "two dtypes": (
        changed(gradients=np.zeros((5, 2, 3))),
        "gradients of a narrower one; found weights float32, gradients float64",
    ),
    "integers": (changed(gradients=np.zeros((5, 2, 3), np.int32)), "gradients is int32"),
}


@pytest.mark.parametrize("form", ["npz", "safetensors", "hdf5"])
@pytest.mark.parametrize("what", REFUSED)
def test_arrays_that_do_not_fit(what: str, form: str, tmp_path: Path) -> None:
    arrays, words = REFUSED[what]
    with pytest.raises(FileRefused, match=words) as caught:
        recorded.load(WRITERS[form](tmp_path / "file", arrays))
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("form", ["npz", "safetensors", "hdf5"])
def test_damaged_files(form: str, tmp_path: Path) -> None:
    """Cut off anywhere, or with bytes changed: refused, or the numbers of a changed array."""
    whole = WRITERS[form](tmp_path / "file", trajectory("sgd", "float32")).read_bytes()
    draw = np.random.default_rng(1)
    for cut in (0, 1, 7, 8, 9, 60, len(whole) // 2, len(whole) - 1):
        (tmp_path / "bad").write_bytes(whole[:cut])
        with pytest.raises(FileRefused, match=re.escape(str(tmp_path / "bad"))):
            recorded.load(tmp_path / "bad")
    for _ in range(5 if form == "hdf5" else 100):  # a process each; `fuzz_files.py` has more
        data = bytearray(whole)
        for at in draw.integers(0, len(data), 3):
            data[at] ^= 1 << draw.integers(8)
        (tmp_path / "bad").write_bytes(data)
        with contextlib.suppress(Error):
            recorded.load(tmp_path / "bad")


def test_no_file_and_no_kind(tmp_path: Path) -> None:
    with pytest.raises(FileRefused, match="does not exist"):
        recorded.load(tmp_path / "missing.npz")
    with pytest.raises(FileRefused, match="is not a regular file"):
        recorded.load(tmp_path)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(FileRefused, match="is not a regular file"):
        recorded.load(tmp_path / "fifo")
    (tmp_path / "text").write_text("step,loss\n1,2\n")
    with pytest.raises(FileRefused, match=r"expected an npz, safetensors or HDF5 file; .*step,los"):
        recorded.load(tmp_path / "text")


def test_pickles_are_not_read(tmp_path: Path) -> None:
    path = as_npz(tmp_path / "a", {"weights": np.array([{}, 1], dtype=object)})
    with pytest.raises(FileRefused, match="pickled objects are not read"):
        recorded.load(path)


def test_a_file_that_declares_too_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "<f4", "fortran_order": False, "shape": (1 << 60,)}
    )
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("weights.npy", header.getvalue())
    with pytest.raises(FileRefused, match="array weights: declares the shape"):
        recorded.load(tmp_path / "a.npz")
    with h5py.File(tmp_path / "b.h5", "w") as file:
        file.create_dataset("weights", shape=(1 << 40,), dtype="f4", chunks=(1 << 10,))
    with pytest.raises(FileRefused, match="1 arrays of 4398046511104 bytes; at most"):
        recorded.load(tmp_path / "b.h5")
    path = as_npz(tmp_path / "c", trajectory("sgd", "float32"))
    monkeypatch.setattr(foreign, "MAX_FILE", 100)
    with pytest.raises(FileRefused, match="at most 100 are read"):
        recorded.load(path)


def test_hdf5_leads_nowhere(tmp_path: Path) -> None:
    """Neither to other files, nor round in a circle, nor into strings."""
    other = as_hdf5(tmp_path / "other.h5", trajectory("sgd", "float32"))
    path = tmp_path / "a.h5"

    def refused(words: str) -> None:
        with pytest.raises(FileRefused, match=words):
            recorded.load(path)

    with h5py.File(path, "w") as file:
        file["weights"] = h5py.ExternalLink(str(other), "/weights")
    refused("weights is not in the file itself")
    with h5py.File(path, "w") as file:
        file["weights"] = h5py.SoftLink("/nowhere")
    refused("weights is not in the file itself")
    with h5py.File(path, "w") as file:
        layout = h5py.VirtualLayout((6, 2, 3), "f4")
        layout[:] = h5py.VirtualSource(str(other), "weights", (6, 2, 3))
        file.create_virtual_dataset("weights", layout)
    refused("weights is not in the file itself")
    with h5py.File(path, "w") as file:
        file.create_dataset("weights", (4,), "f4", external=[(str(other), 0, 16)])
    refused("weights is not in the file itself")
    with h5py.File(path, "w") as file:
        file["a"] = file.create_group("b")
        file["b/c"] = file["b"]
    refused("too deep")
    with h5py.File(path, "w") as file:
        file["weights"] = ["some", "text"]
    refused("weights is object; expected integers or floats")
    with h5py.File(path, "w") as file:
        file.create_dataset("weights", data=np.zeros(9), compression="lzf")
    refused("compressed other than by gzip")


def test_without_safetensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = as_safetensors(tmp_path / "file", trajectory("sgd", "float32"))
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(Unavailable, match=r"npdrt\[text\]"):
        recorded.load(path)
