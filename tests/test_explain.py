"""Programs as text, as files, beside each other, and run without npdrt."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import re
import runpy
import subprocess
import sys
import tracemalloc
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import npdrt
from npdrt import ops, record
from npdrt.arrays import label, namespace
from npdrt.cli import cli
from npdrt.errors import DiskError, Error, FileRefused
from npdrt.optim import RULES
from npdrt.program import Program, compare, decode, listing, load
from npdrt.program.calls import KINDS
from npdrt.program.file import encode
from npdrt.program.tree import leaves
from npdrt.random import Random
from npdrt.train.step import State, Task, make_step

RUNNER = Path(__file__).parents[1] / "docs" / "run_program.py"
RNG = np.random.default_rng(20)
SETTINGS: dict[str, dict[str, Any]] = {
    "sgd": {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-3},
    "adam": {"lr": 1e-3, "weight_decay": 1e-2, "decoupled": True},
    "lars": {"lr": 1.0, "weight_decay": 1e-3},
    "lars_lesion": {"lr": 0.01},
    "fromage": {"lr": 0.01},
    "fromage, bounded": {"lr": 0.01, "norm_bound": 1.0},
}


def step_and_args(
    rule: str = "fromage", dtype: str = "float32", **sizes: int
) -> tuple[Any, tuple[Any, ...]]:
    """The training step of a small perceptron, and arguments for it."""
    size = {"depth": 3, "width": 4, "inputs": 3, "outputs": 2, "batch": 2} | sizes
    batch = size.pop("batch")
    model = npdrt.models.MLP(**size)
    optimizer = RULES[rule.partition(",")[0]](**SETTINGS[rule])
    params = model.init(seed=0, dtype=dtype)
    state = State(params, {}, optimizer.init(params))
    x = RNG.standard_normal((batch, size["inputs"])).astype(dtype)
    y = RNG.integers(0, size["outputs"], batch)
    inner = make_step(Task(model, size["outputs"]), optimizer)

    def step(state: State, x: Any, y: Any, lr: Any, random: Random) -> Any:
        done = inner(state, x, y, lr, random)
        return done.state, done.loss, done.correct

    return step, (state, x, y, 0.01, Random(0, "train", 0))


def recorded(rule: str = "fromage", dtype: str = "float32", **sizes: int) -> Program:
    step, args = step_and_args(rule, dtype, **sizes)
    return record(step, *args)


def assert_same_bits(found: Any, expected: Any) -> None:
    ours, theirs = dict(leaves(found)), dict(leaves(expected))
    assert ours.keys() == theirs.keys()
    for path, x in theirs.items():
        a, b = np.asarray(ours[path]), np.asarray(x)
        assert (path, a.dtype, a.shape) == (path, b.dtype, b.shape)
        assert a.tobytes() == b.tobytes(), path


# --- the listing against the mathematics -----------------------------------------------------
# Written by hand: h_l = max(W_l h_{l-1}, 0); z = h_3; log p = z - max - log sum exp; the loss and
# its derivative (softmax - onehot) / N; d h = d z W, d W = d z^T h; then Algorithm 1 of Bernstein
# et al. 2020, w <- (w - lr |w|/|g| g) / sqrt(1 + lr^2), layer by layer.

INPUTS = """\
inputs
  layers/00/weight      float32[4, 3]
  layers/01/weight      float32[4, 4]
  layers/02/weight      float32[2, 4]
  state/optimizer/step  int64[]
  x                     float32[2, 3]
  y                     int64[2]
  lr                    float64[]"""
FORWARD = """\
forward
0 layers/00/weight.T float32[3, 4] matrix_transpose(layers/00/weight) 0 FLOP 0 B
1 layers/00/linear float32[2, 4] matmul(x, layers/00/weight.T) 48 FLOP 104 B
2 %2 float32[] zeros((), dtype=float32) 0 FLOP 4 B
3 layers/00/output float32[2, 4] maximum(layers/00/linear, %2) 8 FLOP 68 B
4 layers/01/weight.T float32[4, 4] matrix_transpose(layers/01/weight) 0 FLOP 0 B
5 layers/01/linear float32[2, 4] matmul(layers/00/output, layers/01/weight.T) 64 FLOP 128 B
6 %6 float32[] zeros((), dtype=float32) 0 FLOP 4 B
7 layers/01/output float32[2, 4] maximum(layers/01/linear, %6) 8 FLOP 68 B
8 layers/02/weight.T float32[4, 2] matrix_transpose(layers/02/weight) 0 FLOP 0 B
9 layers/02/linear float32[2, 2] matmul(layers/01/output, layers/02/weight.T) 32 FLOP 80 B
10 %10 float32[2, 2] reshape(layers/02/linear, (-1, 2)) 0 FLOP 0 B
11 %11 int64[2, 1] reshape(y, (-1, 1)) 0 FLOP 0 B
12 %12 int64[2, 1] astype(%11, int64) 0 FLOP 32 B
13 %13 int64[2] arange(2, dtype=int64) 0 FLOP 16 B
14 %14 bool[2, 2] equal(%12, %13) 4 FLOP 36 B
15 %15 float32[2, 1] max(%10, axis=(1,), keepdims=True) 4 FLOP 24 B
16 %16 bool[2, 1] isfinite(%15) 2 FLOP 10 B
17 %17 float32[2, 1] zeros((2, 1), dtype=float32) 0 FLOP 8 B
18 %18 float32[2, 1] where(%16, %15, %17) 0 FLOP 26 B
19 %19 float32[2, 2] subtract(%10, %18) 4 FLOP 40 B
20 %20 float32[2, 2] exp(%19) 4 FLOP 32 B
21 %21 float32[2, 1] sum(%20, axis=(1,), keepdims=True) 4 FLOP 24 B
22 %22 float32[2, 2] floor(%20) 4 FLOP 32 B
23 %23 float32[2, 2] subtract(%20, %22) 4 FLOP 48 B
24 %24 float32[2, 1] sum(%23, axis=(1,), keepdims=True) 4 FLOP 24 B
25 %25 bool[2, 1] greater_equal(%21, 1) 2 FLOP 10 B
26 %26 bool[2, 1] less(%21, 2) 2 FLOP 10 B
27 %27 bool[2, 1] bitwise_and(%25, %26) 2 FLOP 6 B
28 %28 float32[2, 1] log1p(%24) 2 FLOP 16 B
29 %29 float32[2, 1] log(%21) 2 FLOP 16 B
30 %30 float32[2, 1] where(%27, %28, %29) 0 FLOP 26 B
31 %31 float32[2, 2] subtract(%19, %30) 4 FLOP 40 B
32 %32 float32[2, 2] divide(%20, %21) 4 FLOP 40 B
33 %33 float32[] zeros((), dtype=float32) 0 FLOP 4 B
34 %34 float32[2, 2] where(%14, %31, %33) 0 FLOP 40 B
35 %35 float32[2] sum(%34, axis=(1,), keepdims=False) 4 FLOP 24 B
36 %36 float32[] sum(%35, axis=(0,), keepdims=False) 2 FLOP 12 B
37 %37 float32[] negative(%36) 1 FLOP 8 B
38 %38 float32[] divide(%37, 2) 1 FLOP 8 B"""
BACKWARD = """\
backward
39 %39 float32[] ones((), dtype=float32) 0 FLOP 4 B
40 %40 float32[2, 2] astype(%14, float32) 0 FLOP 20 B
41 %41 float32[2, 2] multiply(1.0, %40) 4 FLOP 32 B
42 %42 float32[2, 2] add(%41, 0.0) 4 FLOP 32 B
43 %43 float32[2, 2] subtract(%32, %42) 4 FLOP 48 B
44 %44 float32[2, 1] divide(%24, %21) 2 FLOP 24 B
45 %45 bool[2, 2] greater_equal(%20, 1) 4 FLOP 20 B
46 %46 bool[2, 2] bitwise_and(%14, %45) 4 FLOP 12 B
47 %47 bool[2, 2] bitwise_and(%46, %27) 4 FLOP 10 B
48 %48 float32[2, 1] negative(%44) 2 FLOP 16 B
49 %49 float32[2, 2] where(%47, %48, %43) 0 FLOP 44 B
50 %50 float32[] divide(%39, 2) 1 FLOP 8 B
51 %51 float32[2, 2] multiply(%49, %50) 4 FLOP 36 B
52 d layers/02/linear float32[2, 2] reshape(%51, (2, 2)) 0 FLOP 0 B
53 %53 float32[2, 4] matmul(d layers/02/linear, layers/02/weight) 32 FLOP 80 B
54 d layers/01/output float32[2, 4] reshape(%53, (2, 4)) 0 FLOP 0 B
55 d layers/02/linear.T float32[2, 2] matrix_transpose(d layers/02/linear) 0 FLOP 0 B
56 d layers/02/weight float32[2, 4] matmul(d layers/02/linear.T, layers/01/output) 32 FLOP 80 B
57 %57 bool[2, 4] greater(layers/01/output, 0) 8 FLOP 40 B
58 %58 float32[2, 4] astype(%57, float32) 0 FLOP 40 B
59 d layers/01/linear float32[2, 4] multiply(d layers/01/output, %58) 8 FLOP 96 B
60 %60 float32[2, 4] matmul(d layers/01/linear, layers/01/weight) 64 FLOP 128 B
61 d layers/00/output float32[2, 4] reshape(%60, (2, 4)) 0 FLOP 0 B
62 d layers/01/linear.T float32[4, 2] matrix_transpose(d layers/01/linear) 0 FLOP 0 B
63 d layers/01/weight float32[4, 4] matmul(d layers/01/linear.T, layers/00/output) 64 FLOP 128 B
64 %64 bool[2, 4] greater(layers/00/output, 0) 8 FLOP 40 B
65 %65 float32[2, 4] astype(%64, float32) 0 FLOP 40 B
66 d layers/00/linear float32[2, 4] multiply(d layers/00/output, %65) 8 FLOP 96 B
67 d layers/00/linear.T float32[4, 2] matrix_transpose(d layers/00/linear) 0 FLOP 0 B
68 d layers/00/weight float32[4, 3] matmul(d layers/00/linear.T, x) 48 FLOP 104 B"""
CORRECT = """\
forward
69 %69 int64[2] argmax(layers/02/linear, axis=-1) 4 FLOP 32 B
70 %70 bool[2] equal(%69, y) 2 FLOP 34 B
71 %71 int64[] sum(%70, dtype=int64) 2 FLOP 10 B"""
ALGORITHM_1 = """\
{0} |{w}| float64[] norm({w}) {2n} FLOP {4n+8} B
{1} |d {w}| float64[] norm(d {w}) {2n} FLOP {4n+8} B
{2} %{2} bool[] greater(|{w}|, 0) 1 FLOP 9 B
{3} %{3} bool[] greater(|d {w}|, 0) 1 FLOP 9 B
{4} usable%{4} bool[] bitwise_and(%{2}, %{3}) 1 FLOP 3 B
{5} %{5} float64[] multiply(lr, |{w}|) 1 FLOP 24 B
{6} %{6} float64[] where(usable%{4}, |d {w}|, 1.0) 0 FLOP 17 B
{7} %{7} float64[] divide(%{5}, %{6}) 1 FLOP 24 B
{8} %{8} float64[] where(usable%{4}, %{7}, lr) 0 FLOP 25 B
{9} %{9} bool[] less_equal(%{8}, 3.4028234663852886e+38) 1 FLOP 9 B
{10} s%{10} float64[] where(%{9}, %{8}, lr) 0 FLOP 25 B
{11} %{11} float64[] multiply(lr, lr) 1 FLOP 16 B
{12} %{12} float64[] add(1.0, %{11}) 1 FLOP 16 B
{13} prefactor%{13} float64[] sqrt(%{12}) 1 FLOP 16 B
{14} %{14} float32[] astype(s%{10}, float32) 0 FLOP 12 B
{15} %{15} float32{form} multiply(%{14}, d {w}) {n} FLOP {8n+4} B
{16} %{16} float32{form} subtract({w}, %{15}) {n} FLOP {12n} B
{17} %{17} float32[] astype(prefactor%{13}, float32) 0 FLOP 12 B
{18} {w}' float32{form} divide(%{16}, %{17}) {n} FLOP {8n+4} B"""
LAST = "129 state/optimizer/step' int64[] add(state/optimizer/step, 1) 1 FLOP 16 B"
OUTPUTS = """\
outputs
  0/params/layers/00/weight  = layers/00/weight'      float32[4, 3]
  0/params/layers/01/weight  = layers/01/weight'      float32[4, 4]
  0/params/layers/02/weight  = layers/02/weight'      float32[2, 4]
  0/optimizer/step           = state/optimizer/step'  int64[]
  1                          = %38                    float32[]
  2                          = %71                    int64[]"""
TOTALS = """\
totals      calls  FLOP  bytes
  forward      42   228  1,144
  backward     30   305  1,178
  update       58   280  2,035
  all         130   813  4,357"""


def algorithm_1(w: str, shape: tuple[int, int], first: int) -> str:
    """The update of one layer, its first call being number `first`."""
    n = shape[0] * shape[1]
    sizes = {"n": n, "2n": 2 * n, "4n+8": 4 * n + 8, "8n+4": 8 * n + 4, "12n": 12 * n}
    filled = {"w": w, "form": str(list(shape)), **{k: f"{v:,}" for k, v in sizes.items()}}
    filled |= {str(k): str(first + k) for k in range(19)}
    return re.sub(r"\{([^}]+)\}", lambda match: filled[match[1]], ALGORITHM_1)


def without_columns(block: str) -> str:
    """A block of calls with one space between cells, and without its sources."""
    lines = [re.sub(r"(\d B)  \S+:\d+$", r"\1", line.strip()) for line in block.splitlines()]
    return "\n".join(re.sub(" {2,}", " ", line) for line in lines)


def test_the_listing_of_a_small_step_is_the_mathematics() -> None:
    blocks = recorded().listing().split("\n\n")
    assert blocks[0] == INPUTS
    assert without_columns(blocks[1]) == FORWARD
    assert without_columns(blocks[2]) == BACKWARD
    assert without_columns(blocks[3]) == CORRECT
    layers = [
        ("layers/00/weight", (4, 3)),
        ("layers/01/weight", (4, 4)),
        ("layers/02/weight", (2, 4)),
    ]
    updates = [algorithm_1(w, shape, 72 + 19 * k) for k, (w, shape) in enumerate(layers)]
    assert without_columns(blocks[4]) == "\n".join(["update", *updates, LAST])
    assert blocks[5:] == [OUTPUTS, TOTALS]


def test_the_update_shown_in_the_documentation_is_the_one_made() -> None:
    page = RUNNER.with_name("programs.md").read_text()
    shown = re.search(r"```\nupdate\n(.*?)\n```", page, re.S)
    assert shown is not None
    assert shown[1] + "\n" in recorded().listing()


def test_columns_are_aligned_and_sources_are_lines() -> None:
    lines = recorded().listing().splitlines()
    calls = [line for line in lines if re.search(r" FLOP +[\d,]+ B ", line)]
    assert len(calls) == 130
    assert len({line.index(" FLOP ") for line in calls}) == 1
    assert len({re.search(r" B  (\S)", line).start(1) for line in calls}) == 1  # type: ignore[union-attr]
    places = {line.split()[-1].rpartition(":")[0] for line in calls}
    assert {"npdrt/ops/linear.py", "npdrt/optim/fromage.py", "train/step.py"} <= places
    root = Path(npdrt.__file__).parents[1]
    matmul = next(line for line in calls if "matmul" in line).split()[-1].rpartition(":")
    text = (root / matmul[0]).read_text().splitlines()[int(matmul[2]) - 1]
    assert "product(" in text


@pytest.mark.parametrize(("dtype", "s"), [("float32", 4), ("float64", 8)])
def test_totals_follow_a_formula(dtype: str, s: int) -> None:
    """By hand: b examples, c classes, widths n_0 .. n_L, s bytes an element."""
    b, c, width, depth, inputs = 5, 7, 6, 4, 11
    program = recorded(dtype=dtype, depth=depth, width=width, inputs=inputs, outputs=c, batch=b)
    found = listing.totals(program)
    sizes = [inputs, *[width] * (depth - 1), c]
    weights = [m * n for m, n in pairwise(sizes)]
    hidden, count, scalars = (depth - 1) * b * width, sum(weights), depth * 9
    loss, right = 11 * b * c + 7 * b + 2, b * c + 2 * b
    assert found["forward"].flops == 2 * b * count + hidden + loss + right
    inner = 4 * b * count - 2 * b * weights[0]  # d W everywhere, d h not below the first layer
    assert found["backward"].flops == inner + 2 * hidden + 7 * b * c + 2 * b + 1
    assert found["update"].flops == 7 * count + scalars + 1
    products = sum(s * (b * m + m * n + b * n) for m, n in pairwise(sizes))
    relu = (depth - 1) * 2 * s + 2 * s * hidden
    labels = 16 * b + 8 * c + (8 * b + 8 * c + b * c)
    softmax = s * (16 * b * c + 20 * b) + 8 * b
    picked = b * c + s * (3 * b * c + 2 * b + 7)
    correct = (s * b * c + 8 * b) + (16 * b + b) + (b + 8)
    assert found["forward"].bytes == products + relu + labels + softmax + picked + correct
    tensors = 2 * (s * count + 8 * depth) + s * (2 + 3 + 2) * count + 2 * s * depth
    small = depth * (2 * 9 + 3 + 24 + 17 + 24 + 25 + 9 + 25 + 3 * 16 + 2 * (8 + s))
    small -= 0 if s == 4 else depth * 2 * 16  # no rounding to the tensor's dtype
    assert found["update"].bytes == tensors + small + 16


# --- names -----------------------------------------------------------------------------------


def test_names_are_never_shared() -> None:
    def step(x: Any, w: Any) -> Any:
        a = label(x + 1.0, "h")
        b = label(a * 2.0, "h")
        c = label(b - w, "x")  # the name of an input
        d = label(c * c, "%4")  # looks like the number of another call
        return {"w": d + 1.0, "c": c}

    names = listing.names(record(step, np.ones(3), np.ones(3)))
    assert list(names.values()) == ["x", "w", "h%0", "h%1", "x%2", "%4", "w'"]


@pytest.mark.parametrize("rule", SETTINGS)
def test_names_of_every_rule_are_unique(rule: str) -> None:
    program = recorded(rule)
    names = listing.names(program)
    assert len(set(names.values())) == len(names) == len(program.values)
    for replaced in program.plan.in_place.values():
        assert f"{names[replaced]}'" in names.values()


def test_inputs_of_one_name_are_told_apart_by_their_paths() -> None:
    args = {"a/w": np.ones(2)}, {"a/w": np.ones(2)}
    program = record(lambda params, average: average["a/w"] - params["a/w"], *args)
    assert list(listing.names(program).values()) == ["params/a/w", "average/a/w", "%0"]


def test_draws_constants_slices_and_fixed_leaves_are_listed() -> None:
    text = odd_program().listing()
    assert "random/dropout/bernoulli  bool[2, 3]" in text
    assert "random.of(dropout).bernoulli((2, 3), 0.5)" in text
    assert re.search(r"\$0 +float64\[2\] +constant: \[0.5, inf\]", text)
    assert re.search(r"options/flip +fixed +True", text)
    assert "getitem(x, (0:1, ..., None))" in text
    assert re.search(r"flip +(= True|fixed) +", text)


# --- files -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Pair:
    """A result of two."""

    first: Any
    second: Any


def odd_step(x: Any, random: Any, options: dict[str, Any]) -> Any:
    """Draws, constants, slices, writes, an infinite number, a transpose that must be copied."""
    xp = namespace(x)
    kept = xp.where(random.of("dropout").bernoulli((2, 3), 0.5), x, xp.zeros_like(x))
    bounds = xp.asarray(np.array([0.5, np.inf]))
    y = xp.zeros((2, 4), dtype=x.dtype)
    y[:, 1:] = kept * bounds[0] + xp.reshape(xp.matrix_transpose(x), (2, 3))
    part = x[0:1, ..., None]
    low = xp.minimum(xp.max(y, axis=1), float("inf"))
    return {"pair": Pair(y, (part + 1.0, low)), "list": [low[::-1]], "flip": options["flip"]}


def odd_program() -> Program:
    return record(odd_step, np.ones((2, 3)), Random(3, "train", 0), {"flip": True})


@pytest.mark.parametrize("rule", SETTINGS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_loaded_program_replays_to_the_same_bits(rule: str, dtype: str, tmp_path: Path) -> None:
    step, args = step_and_args(rule, dtype, batch=6)
    record(step, *args).save(tmp_path / "step.json")
    program = load(tmp_path / "step.json")
    state, expected = args[0], args[0]
    for _ in range(3):
        result = program(state, *args[1:])
        eager = step(expected, *args[1:])
        assert_same_bits(result, eager)
        state, expected = result[0], eager[0]


def test_odd_parts_survive_a_file(tmp_path: Path) -> None:
    odd_program().save(tmp_path / "odd.json")
    program = load(tmp_path / "odd.json")
    for seed in range(3):
        args = RNG.standard_normal((2, 3)), Random(seed, "train", seed), {"flip": True}
        found, expected = program(*args), odd_step(*args)
        assert_same_bits(found, expected)
    assert isinstance(found["pair"], dict)  # a dataclass is a dict of its fields
    assert isinstance(found["pair"]["second"], tuple)
    assert isinstance(found["list"], list)
    with pytest.raises(Error, match="options/flip: recorded with True"):
        program(args[0], args[1], {"flip": False})


def test_the_same_program_gives_the_same_bytes(tmp_path: Path) -> None:
    for program in (recorded("adam"), odd_program()):
        program.save(tmp_path / "a.json")
        load(tmp_path / "a.json").save(tmp_path / "b.json")
        assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
        assert (tmp_path / "a.json").read_bytes() == encode(program)
        assert compare(program, load(tmp_path / "a.json")) is None


def test_saving_is_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "step.json"
    recorded().save(path)
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskError, match=r"step.json: could not be written .*No space left"):
        odd_program().save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["step.json"]


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    strange = record(lambda x, f: f(x), np.ones(2), lambda x: x + 1.0)
    with pytest.raises(Error, match="cannot be saved: Object of type function"):
        strange.save(tmp_path / "f.json")
    numbered = record(lambda x: {1: x + 1.0}, np.ones(2))
    with pytest.raises(Error, match="keys that are not strings"):
        numbered.save(tmp_path / "f.json")
    complex_ = record(lambda x: x + 1.0, np.ones(2, complex))
    with pytest.raises(
        Error, match=r"Invalid enum value \'complex128\' - at `\$.values\[0\].dtype`"
    ):
        complex_.save(tmp_path / "f.json")
    assert list(tmp_path.iterdir()) == []


def changed(content: Any, path: tuple[Any, ...], value: Any) -> None:
    for key in path[:-1]:
        content = content[key]
    if value is DELETED:
        del content[path[-1]]
    else:
        content[path[-1]] = value


DELETED = object()
FIRST_VIEW = 7  # value 7 is made by call 0, the transpose of value 0
WRONG: list[tuple[tuple[Any, ...], Any, str]] = [
    (("kind",), "npdrt vectors", "not a saved program"),
    (("format",), 1, "format 1; this npdrt reads format 2: record and save the step again"),
    (("format",), [[]], "format unknown; this npdrt reads format 2"),
    (("calls", 1, "settings"), {"dtype": "V2000000000"}, "call 1: a text that no call has"),
    (("calls", 1, "settings"), {"dtype": "object"}, "call 1: a text that no call has"),
    (("calls", 1, "args", 1), "float32,float32", "call 1: a text that no call has"),
    (("calls", 1, "args"), [{"value": 0}] * 20_000, "call 1: reads more than 16384 values"),
    (("values", 0, "shape"), [1 << 30, 1 << 30], "value 0 is too large"),
    (("signature", 0), [], "malformed: Expected `object`, got `array` - at `$.signature[0]`"),
    (
        ("signature", 0, "path"),
        {"x": 1},
        "malformed: Expected `array`, got `object` - at `$.signature[0].path`",
    ),
    (("values", 1), None, "Expected `object`, got `null` - at `$.values[1]`"),
    (("values", 1, "name"), ["w"], "Expected `str`, got `array` - at `$.values[1].name`"),
    (("calls", 13, "args"), [0, 1 << 63], "OverflowError"),
    (("more",), 1, "malformed: the key more is unknown"),
    (("result",), DELETED, "malformed: the key result is missing"),
    (("calls",), {}, "Expected `array`, got `object` - at `$.calls`"),
    (("calls", 1, "function"), "fromfile", "unknown function 'fromfile'"),
    (("calls", 1, "function"), "__import__", "unknown function '__import__'"),
    (("calls", 1, "function"), ["add"], "Expected `str`, got `array` - at `$.calls[1].function`"),
    (("calls", 1, "args", 0, "value"), 99_999, "call 1: a value is not an integer from 0"),
    (("calls", 1, "args", 0, "value"), -1, "call 1: a value is not an integer from 0"),
    (("calls", 1, "args", 0, "value"), True, "call 1: a value is not an integer from 0"),
    (
        ("calls", 1, "args", 0, "value"),
        30,
        "value 8: no call produces it, or its call reads a later value",
    ),
    (("calls", 1, "result"), 9, "value 8: no call produces it"),
    (("calls", 1, "args", 0), {"code": "x"}, "call 1: an argument is not an integer"),
    (
        ("calls", 1, "settings"),
        {"out": {"value": 0}},
        "Invalid enum value 'out' - at `key` in `$.calls[1].settings`",
    ),
    (("calls", 1, "settings"), {"axis": {"value": 0}}, "call 1: a value is not an integer"),
    (("calls", 1, "args"), [], "call 1: matmul of no value"),
    (("calls", 3, "args", 1), [1.0, 2.0], "call 3: a list as argument"),
    (("calls", 3, "args", 1), 10**400, "call 3: an argument is not an integer"),
    (("calls", 0, "source"), "a\x1b[2J", "a text that is not printable"),
    (("calls", 13, "args"), [1 << 40], "call 13: arange"),
    (("values", 8, "shape"), [2, 5], "value 8: its shape, dtype or place"),
    (("values", 8, "dtype"), "float64", "value 8: its shape, dtype or place"),
    (("values", 8, "dtype"), "object", "Invalid enum value 'object' - at `$.values[8].dtype`"),
    (("values", 8, "strides"), [4, 8], "value 8: its shape, dtype or place"),
    (("values", 8, "shape"), [2] * 40, "Expected `array` of length <= 8 - at `$.values[8].shape`"),
    (("values", 8, "shape"), [2] * 4, "value 8: shape and strides do not fit"),
    (("values", FIRST_VIEW, "offset"), 4, "value 7: its shape, dtype or place"),
    (("values", FIRST_VIEW, "offset"), -8, "Expected `int` >= 0 - at `$.values[7].offset`"),
    (("values", FIRST_VIEW, "base"), 4, "value 7: its shape, dtype or place"),
    (("values", FIRST_VIEW, "base"), None, "value 7: its shape, dtype or place"),
    (("values", FIRST_VIEW, "strides"), [4096, 12], "value 7: its shape, dtype or place"),
    (("values", 0, "origin"), "constant", "the values of origin input are not those"),
    (("values", 0, "shape"), [1 << 61, 1 << 61], "value 0"),
    (("values", 8, "origin"), "input", "value 9: no call produces it"),
    (("signature", 0, "value"), 1, "the values of origin input are not those"),
    (("signature", 0, "path"), ["other", "w"], "signature: path"),
    (
        ("signature", 0),
        {"path": ["x"], "eval": 1},
        "the key eval is unknown - at `$.signature[0]`",
    ),
    (("signature", 0), {"path": ["x"]}, "signature: x is not one of value, stream and fixed"),
    (("signature", 0), {"path": ["x"], "stream": False}, "signature: x: stream is not true"),
    (("signature", 0, "path", 1), "w\x07", "a text that is not printable"),
    (("signature", 4, "path"), ["y"], "signature: path"),
    (("constants",), [{"value": 0, "base64": "AAAA"}], "constant 0: wrong length"),
    (("draws",), [{"value": 0}], "the key stream is missing - at `$.draws[0]`"),
    (("result", "tuple", 1, "value"), 99_999, "result is not an integer"),
    (("result", "tuple", 1), {"set": []}, "result: unknown 'set'"),
    (("parameters", 0), 3, "Expected `str`, got `int` - at `$.parameters[0]`"),
]


@pytest.mark.parametrize(("path", "value", "reason"), WRONG)
def test_malformed_files_are_refused(
    path: tuple[Any, ...], value: Any, reason: str, tmp_path: Path
) -> None:
    content = json.loads(encode(recorded()))
    changed(content, path, value)
    file = tmp_path / "bad.json"
    file.write_text(json.dumps(content))
    with pytest.raises(FileRefused, match=re.escape(reason)) as caught:
        load(file)
    assert str(caught.value).startswith(f"{file}: ")


ODD: list[tuple[tuple[Any, ...], Any, str]] = [
    (("draws", 0, "method"), "__class__", "a draw by '__class__'"),
    (("draws", 0, "lineage"), [["__getattribute__", "x"]], "lineage is made of"),
    (("draws", 0, "args", 0), [2, 4], "is not what is drawn"),
    (("draws", 0, "stream"), ["x"], "something that is not a stream"),
    (
        ("draws", 0, "settings"),
        {"__x": 1},
        "Invalid enum value '__x' - at `key` in `$.draws[0].settings`",
    ),
    (("draws",), [], "the values of origin random are not those"),
    (("constants", 0, "base64"), "!!", "not base64"),
    (("constants",), [], "the values of origin constant are not those"),
]


@pytest.mark.parametrize(("path", "value", "reason"), ODD)
def test_malformed_draws_and_constants_are_refused(
    path: tuple[Any, ...], value: Any, reason: str
) -> None:
    content = json.loads(encode(odd_program()))
    changed(content, path, value)
    with pytest.raises(FileRefused, match=re.escape(reason)):
        decode.decode(json.dumps(content).encode())


@pytest.mark.parametrize("index", [[0], [True], ["x"], [{"value": 0}, {"ellipsis": True}], 3])
def test_indices_that_are_not_basic_are_refused(index: Any) -> None:
    content = json.loads(encode(odd_program()))
    number = next(i for i, c in enumerate(content["calls"]) if c["function"] == "getitem")
    content["calls"][number]["args"][1] = index
    with pytest.raises(FileRefused, match=f"call {number}: (not a basic index|a text)"):
        decode.decode(json.dumps(content).encode())


def test_an_arange_that_would_fill_the_memory_is_not_made() -> None:
    content = json.loads(encode(recorded()))
    number = next(i for i, c in enumerate(content["calls"]) if c["function"] == "arange")
    content["calls"][number]["args"] = [1 << 36]
    content["values"][content["calls"][number]["result"]]["shape"] = [1 << 36]
    with pytest.raises(FileRefused, match=f"call {number}: arange"):
        decode.decode(json.dumps(content).encode())


@pytest.mark.parametrize("dtype", ["V2000000000", "U500000000", "S2000000000", "4000000000f4"])
def test_a_cast_to_a_huge_dtype_is_not_tried(dtype: str) -> None:
    """NumPy would make an element of it in order to tell the form of the result."""
    content = json.loads(encode(record(lambda x: namespace(x).astype(x, "float64"),
                                       np.ones(3, np.float32))))  # fmt: skip
    content["calls"][0]["args"][1] = dtype
    tracemalloc.start()
    try:
        with pytest.raises(FileRefused, match="call 0: a text that no call has"):
            decode.decode(json.dumps(content).encode())
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("depth", [60, 300])
@pytest.mark.parametrize("place", ["result", "argument", "setting", "shape"])
def test_deep_nesting_is_refused(depth: int, place: str) -> None:
    """Deeper than a program's, and too deep for Python or for the reader of JSON."""
    content = json.loads(encode(recorded()))
    deep: Any = {"value": 0}
    for _ in range(depth):
        deep = {"tuple": [deep]} if place == "result" else [deep]
    if place == "result":
        content["result"] = deep
    elif place == "argument":
        content["calls"][1]["args"][0] = deep
    elif place == "setting":
        content["calls"][1]["settings"] = {"axis": deep}
    else:
        content["values"][0]["shape"] = deep
    with pytest.raises(FileRefused):
        decode.decode(json.dumps(content).encode())


def test_what_cannot_be_read_is_not_written(tmp_path: Path) -> None:
    def step(x: Any) -> Any:
        for _ in range(60):
            x = (x,)
        return x

    with pytest.raises(Error, match="cannot be saved: result: nested deeper than 50"):
        record(step, np.ones(2)).save(tmp_path / "f.json")


@pytest.mark.parametrize("item", [b"{},", b"0,", b'"",'])
def test_many_items_are_not_made(item: bytes) -> None:
    data = b"[" + item * 3_000_000 + b"0]"
    tracemalloc.start()
    try:
        with pytest.raises(FileRefused, match="bytes or 2,097,152 items"):
            decode.decode(data)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not JSON"),
        (b"\xff{}", "not JSON in UTF-8"),
        (b"[" * 100_000, "not JSON"),
        (b'{"kind": NaN}', "NaN is not a number of JSON"),
        (b'{"kind": 1, "kind": 2}', "a key occurs twice"),
        (b"[]", "not a saved program"),
    ],
)
def test_other_files_are_refused(data: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(FileRefused, match=reason):
        load(tmp_path / "x")


@pytest.mark.parametrize("args", [[], [1, 2, 0], [0, 4, 1, 1]])
def test_ranges_that_are_none_are_refused(args: list[int], tmp_path: Path) -> None:
    content = json.loads(encode(recorded()))
    call = next(c for c in content["calls"] if c["function"] == "arange")
    call["args"] = args
    (tmp_path / "bad.json").write_text(json.dumps(content))
    with pytest.raises(FileRefused, match="arange"):
        load(tmp_path / "bad.json")


def test_missing_files_and_folders_are_refused(tmp_path: Path) -> None:
    for path, reason in {
        tmp_path: "not a regular file",
        tmp_path / "missing": "does not exist",
    }.items():
        with pytest.raises(FileRefused, match=reason):
            load(path)


def test_a_view_must_lie_inside_its_owner() -> None:
    owner = decode.Value((4,), "float32", (4,))
    for shape, strides, offset, inside in [
        ((4,), (4,), 0, True),
        ((4,), (-4,), 12, True),
        ((2,), (4,), 8, True),
        ((2,), (4,), 12, False),
        ((5,), (4,), 0, False),
        ((4,), (-4,), 8, False),
        ((0,), (4,), 99, True),
        ((1000,), (0,), 12, True),
    ]:
        view = decode.Value(shape, "float32", strides, 0, offset)
        assert decode._inside(view, owner) == inside, view


def test_random_damage_is_refused_or_harmless() -> None:
    """Any number, text or list of a file replaced by another: refused, or still a program."""
    sound, dice = encode(odd_program()), random.Random(7)
    others: list[Any] = [
        None,
        True,
        -1,
        0,
        1,
        2,
        3,
        1 << 70,
        0.5,
        "",
        "add",
        "int64",
        [],
        [0],
        {},
        "V2000000000",
        1 << 63,
        -1 << 63,
        1e308,
        [[[]]],
        {"value": 0},
        "left",
    ]
    refused = 0
    for _ in range(1000):
        content = json.loads(sound)
        places = list(everywhere(content))
        changed(content, dice.choice(places), dice.choice(others))
        try:
            found = decode.decode(json.dumps(content).encode())
        except FileRefused:
            refused += 1
        else:
            assert Program(**found).plan is not None
    assert refused > 300


def everywhere(content: Any, path: tuple[Any, ...] = ()) -> Any:
    """The path of every part of nested JSON."""
    if path:
        yield path
    keys = (
        content
        if isinstance(content, dict)
        else range(len(content))
        if isinstance(content, list)
        else ()
    )
    for key in keys:
        yield from everywhere(content[key], (*path, key))


# --- without npdrt ---------------------------------------------------------------------------

BLOCKED = """
import runpy, sys
sys.modules["npdrt"] = None  # importing it, or anything in it, fails
sys.argv = ["run_program.py", *sys.argv[2:]]
runpy.run_path({path!r}, run_name="__main__")
assert not [name for name in sys.modules if name.startswith("npdrt.")]
"""


def run_plainly(program: Program, args: tuple[Any, ...], tmp_path: Path) -> dict[str, Any]:
    """The outputs of a saved program from docs/run_program.py in a process without npdrt."""
    program.save(tmp_path / "program.json")
    given = dict(leaves(dict(zip(program.parameters, args, strict=True))))
    inputs = {"/".join(path): np.asarray(given[path]) for path in program.inputs}
    for number, draw in enumerate(program.draws.values()):
        stream = given[draw.stream.path]
        for method, argument in draw.lineage:
            stream = getattr(stream, method)(argument)
        inputs[f"draw/{number}"] = getattr(stream, draw.method)(*draw.args, **draw.settings)
    np.savez(tmp_path / "inputs.npz", **inputs)
    files = [str(tmp_path / name) for name in ("program.json", "inputs.npz", "outputs.npz")]
    code = BLOCKED.format(path=str(RUNNER))
    subprocess.run([sys.executable, "-I", "-c", code, "-", *files], check=True, cwd=tmp_path)
    return dict(np.load(tmp_path / "outputs.npz"))


@pytest.mark.parametrize("rule", SETTINGS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_plain_numpy_gives_the_same_bits(rule: str, dtype: str, tmp_path: Path) -> None:
    step, args = step_and_args(rule, dtype, width=300, batch=6)  # a norm of more than one chunk
    found = run_plainly(record(step, *args), args, tmp_path)
    expected = {"/".join(path): x for path, x in leaves(step(*args))}
    assert_same_bits(found, expected)


def test_plain_numpy_runs_odd_programs(tmp_path: Path) -> None:
    args = RNG.standard_normal((2, 3)), Random(5, "train", 2), {"flip": True}
    found = run_plainly(odd_program(), args, tmp_path)
    expected = {"/".join(path): x for path, x in leaves(odd_step(*args)) if path != ("flip",)}
    assert_same_bits(found, expected)


def test_the_runner_writes_to_no_value() -> None:
    x = np.zeros(3)
    assert runpy.run_path(str(RUNNER))["assign"](x, (slice(1, 2),), 5.0).tolist() == [0, 5, 0]
    assert x.tolist() == [0, 0, 0]


def test_the_runner_imports_nothing_else() -> None:
    text = RUNNER.read_text()
    imported = re.findall(r"^(?:import|from) (\w+)", text, re.M)
    assert sorted(imported) == ["base64", "json", "numpy", "sys"]
    own = set(re.findall(r'^    "(\w+)": ', text, re.M))
    for_cpu = {name for name, kind in KINDS.items() if kind != "rows"}  # docs/programs.md says so
    portable = {name for name in for_cpu if name.startswith("portable_")} | {"exact_matmul"}
    assert all(hasattr(np, name) for name in for_cpu - portable if name not in own)


# --- two programs ----------------------------------------------------------------------------


def test_a_program_is_the_same_as_itself() -> None:
    assert compare(recorded(), recorded()) is None
    a = record(lambda x, w: label(x * w, "product") + 1.0, np.ones(2), np.ones(2))
    b = record(lambda u, v: u * v + 1.0, np.ones(2), np.ones(2))  # other names, other lines
    assert compare(a, b) is None


@pytest.mark.parametrize(
    ("a", "b", "number", "what", "values"),
    [
        (lambda x: x + 1.0, lambda x: x - 1.0, 0, "function", ("add", "subtract")),
        (lambda x: x + 1.0, lambda x: x + 2.0, 0, "argument 1", ("1.0", "2.0")),
        (lambda x: x + 1.0, lambda x: x + 1, 0, "argument 1", ("1.0", "1")),
        (lambda x: -x * x, lambda x: -x * -x, 1, "function", ("multiply", "negative")),
        (lambda x: ops.sum(x, axis=0), lambda x: ops.sum(x, axis=1), 0, "setting axis", None),
        (lambda x: x + 1.0, lambda x: x + 1.0 - x, 1, "length", ("no more calls", "a call")),
        (lambda x: (x + 1.0, x), lambda x: (x, x + 1.0), None, "output 0", ("%0", "0")),
        (lambda x: x + 1.0, lambda x: [x + 1.0], None, "output ", ("%0", "nothing")),
    ],
)
def test_the_first_difference(a: Any, b: Any, number: Any, what: str, values: Any) -> None:
    found = compare(record(a, np.ones((2, 2))), record(b, np.ones((2, 2))))
    assert found is not None
    assert (found.number, found.what) == (number, what)
    assert values is None or (found.a, found.b) == values


def test_forms_and_constants_count() -> None:
    double = lambda x: x * 2.0  # noqa: E731
    found = compare(record(double, np.ones(2)), record(double, np.ones(3)))
    assert found is not None
    assert (found.what, found.a, found.b) == ("shape", "[2]", "[3]")
    found = compare(record(double, np.ones(2)), record(double, np.ones(2, np.float32)))
    assert found is not None
    assert (found.what, found.a, found.b) == ("dtype", "float64", "float32")
    plus = [
        record(lambda x, c=c: x + namespace(x).asarray(np.array([1.0, c])), np.ones(2))
        for c in (2.0, 3.0)
    ]
    found = compare(*plus)
    assert found is not None
    assert found.what == "argument 1"


def test_a_difference_is_shown_with_the_calls_before_it() -> None:
    found = compare(recorded("fromage"), recorded("lars_lesion"))
    assert found is not None
    lines = str(found).splitlines()
    assert lines[0] == "the first difference is in call 83: function"
    assert [line.split()[0] for line in lines[2:5]] == ["80", "81", "82"]
    assert re.match(
        r"A  83  %83 +float64\[\]  multiply\(lr, lr\) +npdrt/optim/fromage.py:", lines[5]
    )
    assert re.match(
        r"B  83  %83 +float32\[\]  astype\(s%82, float32\) +npdrt/optim/lars_l", lines[6]
    )
    assert lines[8:] == ["A  multiply", "B  astype"]


# --- the command -----------------------------------------------------------------------------


def run(*words: str, code: int = 0) -> str:
    done = CliRunner().invoke(cli, ["explain", *words], prog_name="npdrt")
    assert done.exit_code == code, done.output
    return done.output


SMALL = ("--depth", "2", "--width", "4")


def test_explain_lists_the_step_that_train_runs() -> None:
    text = run("--model", "mlp", "--depth", "3", "--batch-size", "7")
    assert text.startswith("inputs\n  layers/00/weight      float32[128, 64]\n")
    assert "\n\nforward\n" in text
    assert "layers/02/weight'" in text
    assert "  x                     float32[7, 64]\n" in text


def test_explain_takes_every_option_of_the_step() -> None:
    plain = run(*SMALL)
    for words in (
        ("--label-smoothing", "0.1"),
        ("--dtype", "float64"),
        ("--optimizer", "sgd"),
        ("--norm-bound", "1"),
        ("--residual", "--depth", "3"),
        ("--nonlinearity", "tanh"),
    ):
        assert run(*SMALL, *words) != plain


def test_explain_as_json(tmp_path: Path) -> None:
    """The object of the file, with unique names, costs, replaced inputs and totals."""
    words = (*SMALL, "--optimizer", "adam")
    found = json.loads(run(*words, "--format", "json"))
    assert found == json.loads(run(*words, "--json"))
    run(*words, "--save", str(tmp_path / "step.json"))
    stored = json.loads((tmp_path / "step.json").read_text())
    assert list(found) == ["listing", *stored, "replaced", "totals"]
    program = load(tmp_path / "step.json")
    for k, name in listing.names(program).items():
        assert found["values"][k] == {**stored["values"][k], "name": name}
    costs = [{key: call.pop(key) for key in ("flops", "bytes")} for call in found["calls"]]
    assert {key: found[key] for key in stored if key != "values"} == {
        key: stored[key] for key in stored if key != "values"
    }
    assert found["totals"]["all"]["calls"] == len(found["calls"])
    assert sum(cost["flops"] for cost in costs) == found["totals"]["all"]["flops"]
    assert costs[0]["bytes"] == 0  # a transpose
    names = [value["name"] for value in found["values"]]
    replaced = {names[new]: names[old] for new, old in found["replaced"]}
    slot = "layers/00/weight/exp_avg"
    assert replaced[f"{slot}'"] == slot
    assert "loss" not in replaced.values()


def test_explain_compares_runs_and_files(tmp_path: Path) -> None:
    folder, file = str(tmp_path / "run"), str(tmp_path / "step.json")
    words = ["train", *SMALL, "--epochs", "0", "--out", folder, "-q", "--lr", "0.02"]
    assert CliRunner().invoke(cli, words).exit_code == 0
    assert run(*SMALL, "--save", file) == f"{file}\n"
    assert run(folder, file).startswith("the same ")
    assert run(folder) == run(*SMALL) == run(file)
    other = str(tmp_path / "other.json")
    run(*SMALL, "--bias", "--save", other)
    assert run(file, other, code=1).startswith("the first difference is in call ")
    found = json.loads(run(file, other, "--json", code=1))
    assert found["same"] is False
    assert list(found["difference"]) == ["number", "what", "a", "b", "text"]
    assert json.loads(run(file, file, "--json")) == {"same": True, "difference": None}


def test_explain_of_a_model_in_a_file(tmp_path: Path) -> None:
    code = """
from dataclasses import dataclass
import numpy as np
from npdrt import ops
@dataclass(frozen=True)
class Line:
    inputs: int
    outputs: int
    fail: bool = False
    def init(self, seed=0, device="cpu", dtype="float32"):
        return {"w": np.ones((self.outputs, self.inputs), dtype)}
    def __call__(self, params, x):
        return ops.linear(x, params["nothing" if self.fail else "w"])
"""
    (tmp_path / "line.py").write_text(code)
    model = f"{tmp_path / 'line.py'}:Line"
    assert "line.py:" not in run("--model", model)  # the calls are those of npdrt.ops
    assert "KeyError: 'nothing'" in run("--model", model, "--set", "fail=true", code=2)
    folder = str(tmp_path / "run")
    words = ["train", "--model", model, "--epochs", "0", "--out", folder, "-q", "--lr", "0.01"]
    assert CliRunner().invoke(cli, words).exit_code == 0
    trusted = ("--code", str(tmp_path / "line.py"))
    assert "npdrt runs no code because a data file names it" in run(folder, code=2)
    assert run(folder, *trusted) == run("--model", model, "--lr", "0.01")
    (tmp_path / "line.py").write_text(code + "\n")
    assert "has changed since the run" in run(folder, *trusted, code=2)
    inputs = tmp_path / "targets.npz"
    np.savez(inputs, x=np.ones((9, 2)), y=np.ones((9, 3)))
    text = run("--model", model, "--data", str(inputs), "--batch-size", "4")
    assert re.search(r"\n  y +float32\[4, 3\]\n", text)


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ([], 2, "give --model, a run directory, or a file that --save wrote"),
        (["nowhere"], 2, "nowhere does not exist"),
        (["a", "b", "c"], 2, "one run or file to list, or two to compare; got 3"),
        (["a", "b", "--save", "c"], 2, "--save writes one program"),
        (["a", "--batch-size", "3"], 2, "--batch-size describes a step, but a has its own"),
        (["--model", "mlp", "--batch-size", "5000"], 2, "expected 1 to 1437"),
        (
            ["--model", "mlp", "--optimizer", "sgd", "--norm-bound", "1"],
            2,
            "sgd takes no --norm-bound; it takes --momentum",
        ),
        (["--model", "mpl"], 2, "Did you mean 'mlp'?"),
        (["--model", "mlp", "--lr", "fast"], 2, "neither a number nor auto"),
        (["--model", "mlp", "--format", "xml"], 2, "'xml' is unknown"),
    ],
)
def test_bad_usage_of_explain(words: list[str], code: int, message: str) -> None:
    assert message in run(*words, code=code)


def test_explain_refuses_other_files(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{}")
    assert "not a saved program" in run(str(tmp_path / "x.json"), code=3)
    (tmp_path / "run").mkdir()
    assert "holds no run" in run(str(tmp_path / "run"), code=2)
    npdrt.save(tmp_path / "run" / "checkpoint.h5", {"w": np.ones(2)})
    assert "expected the checkpoint of a training run" in run(str(tmp_path / "run"), code=3)
