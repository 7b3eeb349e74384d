"""The primitives of language models: attention, embedding, dropout and a large vocabulary's loss.

Values and derivatives of small cases on every backend are rows of the table in test_ops.py.
"""

from __future__ import annotations

import math
import sys
import tracemalloc
from collections.abc import Callable
from typing import Any
from unittest.mock import MagicMock

import backends
import numpy as np
import pytest
from test_program import FIXED, check, peak
from test_train import assert_same as assert_same_run
from test_train import blobs, contents, settings, stop_after  # noqa: F401 - blobs is a fixture

from npdrt import Error, ops, record, value_and_grad
from npdrt.autodiff import Tensor, backward
from npdrt.ops import loss
from npdrt.ops.dropout import keep_mask
from npdrt.ops.embedding import check_tokens
from npdrt.ops.shape import scatter_add
from npdrt.random import Random
from npdrt.train import resume, train

try:
    import torch
except ImportError:  # a second opinion, not a requirement
    torch = MagicMock()

F = torch.nn.functional
needs_torch = pytest.mark.skipif(isinstance(torch, MagicMock), reason="PyTorch is not installed")
attending = sys.modules["npdrt.ops.attention"]  # the module; npdrt.ops has a function of its name
STREAM = Random(2017, "attention")


def normal(name: str, *shape: int) -> np.ndarray:
    return STREAM.of(name).normal(shape)


def inputs(*lead: int, length: int = 5, keys: int = 7, size: int = 4, out: int = 6) -> list[Any]:
    """q, k and v."""
    shapes = {"q": (length, size), "k": (keys, size), "v": (keys, out)}
    return [normal(name, *lead, *shape) for name, shape in shapes.items()]


def cotangent_of(value: Any) -> np.ndarray:
    return np.cos(np.arange(value.size) + 0.3).reshape(value.shape).astype(value.dtype)


def gradients(function: Callable[..., Any], arrays: list[Any]) -> list[Any]:
    """The value of a function of arrays, and the cotangent of each."""
    tensors = [Tensor(x) for x in arrays]
    y = function(*tensors)
    found = backward(y, cotangent_of(y.value))
    return [y.value, *(found[id(t)] for t in tensors)]


def torch_gradients(function: Callable[..., Any], arrays: list[Any]) -> list[Any]:
    """The same in PyTorch."""
    tensors = [torch.tensor(x, requires_grad=True) for x in arrays]
    y = function(*tensors)
    cotangent = torch.tensor(cotangent_of(y.detach().numpy()))
    grads = torch.autograd.grad(y, tensors, cotangent)
    return [y.detach().numpy(), *(g.numpy() for g in grads)]


def assert_close(ours: list[Any], theirs: list[Any], limit: float = 1e-12) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        assert np.max(np.abs(a - b), initial=0) <= limit * max(1.0, np.max(np.abs(b), initial=0))


def assert_same(ours: list[Any], theirs: list[Any]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        assert np.array_equal(a, b)


# --- attention against PyTorch ---------------------------------------------------------------


def masks(*shape: int) -> dict[str, Any]:
    """Masks of every kind for scores of a shape; every query may attend to its first key."""
    bools = {"shared": shape[-2:], "padding": (shape[0], 1, 1, shape[-1]), "full": shape}
    found: dict[str, Any] = {"none": None}
    for name, size in bools.items():
        found[name] = STREAM.of(name).bernoulli(size, 0.6)
        found[name][..., 0] = True
        found[f"added {name}"] = np.where(found[name], normal(name, *size), -math.inf)
    return found


@needs_torch
@pytest.mark.parametrize("name", masks(2, 3, 5, 7))
@pytest.mark.parametrize("shape", [(5, 7), (1, 7), (6, 1), (40, 40)], ids=str)
def test_attention_is_pytorchs(name: str, shape: tuple[int, int]) -> None:
    given = inputs(2, 3, length=shape[0], keys=shape[1])
    mask = masks(2, 3, *shape)[name]
    theirs = None if mask is None else torch.tensor(mask)
    assert_close(
        gradients(lambda q, k, v: ops.attention(q, k, v, mask), given),
        torch_gradients(lambda *x: F.scaled_dot_product_attention(*x, theirs), given),
    )


@needs_torch
@pytest.mark.parametrize("shape", [(5, 7), (7, 5), (4, 4), (1, 3)], ids=str)
def test_causal_attention_is_pytorchs(shape: tuple[int, int]) -> None:
    given = inputs(3, length=shape[0], keys=shape[1])
    assert_close(
        gradients(lambda *x: ops.attention(*x, causal=True), given),
        torch_gradients(lambda *x: F.scaled_dot_product_attention(*x, is_causal=True), given),
    )


def test_causal_with_a_mask_is_both() -> None:
    given, mask = inputs(2, 3), masks(2, 3, 5, 7)["padding"]
    both = mask & np.tri(5, 7, dtype=bool)
    for one in (mask, np.where(mask, 0.0, -math.inf)):
        found = gradients(lambda *x, one=one: ops.attention(*x, one, causal=True), given)
        assert_same(found, gradients(lambda *x: ops.attention(*x, both), given))


@needs_torch
def test_a_query_that_may_attend_to_nothing() -> None:
    """Zeros and no gradient, from boolean and from added masks, as in PyTorch's function."""
    given, mask = inputs(2, 3), masks(2, 3, 5, 7)["full"]
    mask[1, 2, 3], mask[0, 0, 0] = False, False
    for one in (mask, np.where(mask, 0.5, -math.inf)):
        ours = gradients(lambda *x, one=one: ops.attention(*x, one), given)
        assert not ours[0][1, 2, 3].any()
        assert not ours[1][0, 0, 0].any()
        theirs = torch.tensor(one)
        assert_close(
            ours, torch_gradients(lambda *x, m=theirs: F.scaled_dot_product_attention(*x, m), given)
        )


def test_what_is_not_finite_is_not_hidden() -> None:
    q, k, v = inputs(2)
    k[1, 3, 0] = math.nan
    with np.errstate(all="ignore"):
        y = ops.attention(q, k, v)
    assert np.isfinite(y[0]).all()
    assert np.isnan(y[1]).all()


def test_large_scores_do_not_overflow() -> None:
    q, k, v = (x.astype("float32") for x in inputs(2))
    found = gradients(lambda *x: ops.attention(*x, scale=1e4), [q, k, v])
    assert all(np.isfinite(x).all() for x in found)
    best = np.argmax(q @ np.swapaxes(k, -1, -2), axis=-1)
    assert np.allclose(found[0], np.take_along_axis(v, best[..., None], axis=1))


# --- the module ------------------------------------------------------------------------------


def module(size: int, heads: int) -> Any:
    """PyTorch's module in float64, biases not zero."""
    made = torch.nn.MultiheadAttention(size, heads, batch_first=True, dtype=torch.float64)
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(torch.tensor(normal(str(tuple(p.shape)), *p.shape)))
    return made


def of_module(made: Any, heads: int, **settings: Any) -> Callable[..., Any]:
    """The same function here, with its parameters."""
    parts = (made.in_proj_weight, made.in_proj_bias, made.out_proj.weight, made.out_proj.bias)
    w, b, out, c = (p.detach().numpy() for p in parts)

    def run(q: Any, k: Any, v: Any, mask: Any = None) -> Any:
        return ops.multi_head_attention(q, k, v, w, b, out, c, mask, heads=heads, **settings)

    return run


@needs_torch
@pytest.mark.parametrize("heads", [1, 2, 6])
def test_the_module_is_pytorchs(heads: int) -> None:
    made, given = module(12, heads), [normal(str(n), 2, n, 12) for n in (5, 7, 7)]
    blocked, padded = ~masks(2, heads, 5, 7)["shared"], ~masks(2, 1, 5, 7)["padding"]
    both = ~blocked & ~padded
    assert_close(
        gradients(lambda *x: of_module(made, heads)(*x, both), given),
        torch_gradients(
            lambda *x: made(
                *x, attn_mask=torch.tensor(blocked), key_padding_mask=torch.tensor(padded[:, 0, 0])
            )[0],
            given,
        ),
    )


@needs_torch
def test_gradients_of_the_modules_parameters() -> None:
    made, x = module(8, 2), normal("x", 3, 4, 8)
    names = ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")
    params = {name: made.get_parameter(name).detach().numpy() for name in names}

    def loss_of(p: Any, x: Any) -> Any:
        y = ops.multi_head_attention(x, x, x, *p.values(), heads=2, causal=True)
        return ops.sum(y * cotangent_of(x))

    found, grads = value_and_grad(loss_of)(params, x)
    tri, given = torch.tensor(~np.tri(4, dtype=bool)), torch.tensor(x)
    theirs = (made(given, given, given, attn_mask=tri)[0] * torch.tensor(cotangent_of(x))).sum()
    theirs.backward()
    assert abs(found - theirs.item()) <= 1e-12 * abs(found)
    assert_close(list(grads.values()), [made.get_parameter(n).grad.numpy() for n in names])


def test_the_module_without_biases() -> None:
    q, w, out = normal("q", 2, 5, 6), normal("w", 18, 6), normal("out", 6, 6)
    zero = np.zeros(18)
    without = ops.multi_head_attention(q, q, q, w, None, out, None, heads=3)
    assert np.array_equal(
        without, ops.multi_head_attention(q, q, q, w, zero, out, zero[:6], heads=3)
    )


# --- blocks, programs, memory ----------------------------------------------------------------


def with_everything(q: Any, k: Any, v: Any, mask: Any, random: Any) -> Any:
    keep = keep_mask(q, random, rate=0.3, shape=(*q.shape[:-1], k.shape[-2]))
    return ops.attention(q, k, v, mask, keep, causal=True, rate=0.3)


def attention_step(params: Any, mask: Any, random: Any) -> Any:
    """Loss and gradients of an attention with a mask, dropout and all else."""

    def loss_of(p: Any) -> Any:
        y = with_everything(p["q"], p["k"], p["v"], mask, random)
        return ops.sum(y * y)

    return value_and_grad(loss_of)(params)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", ["none", "shared", "padding", "full", "added full"])
def test_blocks_change_no_bit(monkeypatch: pytest.MonkeyPatch, name: str, dtype: str) -> None:
    given = [x.astype(dtype) for x in inputs(2, 3, length=9, keys=11)]
    mask, random = masks(2, 3, 9, 11)[name], Random(3, "train", 5)
    mask = mask.astype(dtype) if name.startswith("added") else mask
    monkeypatch.setattr(attending, "BLOCK", 1 << 30)
    expected = gradients(lambda *x: with_everything(*x, mask, random), given)
    params = dict(zip("qkv", given, strict=True))
    for heads in (1, 2, 3, 4):
        for kept in (0, 1 << 30):
            monkeypatch.setattr(attending, "BLOCK", heads * 9 * 11)
            monkeypatch.setattr(attending, "KEPT", kept)
            found = gradients(lambda *x: with_everything(*x, mask, random), given)
            assert_same(found, expected)
            check(attention_step, params, mask, random)


@pytest.mark.parametrize("name", ["none", "padding", "added full"])
@pytest.mark.parametrize("keys", [5, 11])
def test_queries_in_parts(monkeypatch: pytest.MonkeyPatch, name: str, keys: int) -> None:
    """Parts of a causal head see the keys up to their last query, and nothing is lost by that."""
    given, random = inputs(2, 3, length=9, keys=keys), Random(3, "train", 5)
    mask = masks(2, 3, 9, keys)[name]
    expected = gradients(lambda *x: with_everything(*x, mask, random), given)
    monkeypatch.setattr(attending, "BLOCK", 2 * 9 * keys)
    for queries in (1, 4):
        monkeypatch.setattr(attending, "QUERIES", queries)
        found = gradients(lambda *x: with_everything(*x, mask, random), given)
        for ours, whole in zip(found, expected, strict=True):
            np.testing.assert_allclose(ours, whole, rtol=0, atol=1e-14 * np.abs(whole).max())
        check(attention_step, dict(zip("qkv", given, strict=True)), mask, random)


def test_the_derivative_by_a_mask_with_queries_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    given = [*inputs(2, 3), normal("mask", 2, 1, 5, 7)]
    expected = gradients(lambda *x: ops.attention(*x, causal=True), given)
    monkeypatch.setattr(attending, "QUERIES", 2)
    found = gradients(lambda *x: ops.attention(*x, causal=True), given)
    for ours, whole in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, whole, rtol=0, atol=1e-14 * np.abs(whole).max())


@pytest.mark.parametrize("lead", [(), (1,), (2, 3), (3, 1, 2), (0,), (2, 0)], ids=str)
@pytest.mark.parametrize("count", [1, 2, 5])
def test_leading_axes(monkeypatch: pytest.MonkeyPatch, lead: tuple[int, ...], count: int) -> None:
    """Any number of them, none, and no head at all."""
    given = inputs(*lead)
    expected = gradients(ops.attention, given)
    monkeypatch.setattr(attending, "BLOCK", count * 5 * 7)
    assert_same(gradients(ops.attention, given), expected)
    assert expected[0].shape == (*lead, 5, 6)


def test_heads_that_are_views() -> None:
    """Heads side by side in the features are no copy, and change no bit."""
    x = normal("x", 2, 9, 12)
    cut = np.reshape(x, (2, 9, 3, 4)).transpose(0, 2, 1, 3)
    found = gradients(ops.attention, [cut, cut, cut])
    assert_same(found, gradients(ops.attention, [np.ascontiguousarray(cut)] * 3))


def test_the_derivative_by_a_mask_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    given = [*inputs(2, 3), normal("mask", 2, 1, 5, 7)]
    expected = gradients(ops.attention, given)
    monkeypatch.setattr(attending, "BLOCK", 1)
    assert_same(gradients(ops.attention, given), expected)


def test_a_replay_of_attention_allocates_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = inputs(4, length=300, keys=300)
    monkeypatch.setattr(attending, "BLOCK", 2 * 300 * 300)
    for kept in (0, 1 << 30):
        monkeypatch.setattr(attending, "KEPT", kept)
        args = ({"q": q, "k": k, "v": v}, masks(4, 1, 300, 300)["shared"], None)
        assert peak(check(attention_step, *args), args) < FIXED


def test_long_sequences_hold_one_block_of_scores() -> None:
    """8 heads of 1024: all scores are 64 MB in float64, those of a head 8."""
    scores = 8 * 1024 * 1024 * 8
    assert scores // 8 > attending.KEPT
    given = inputs(8, length=1024, keys=1024)
    tracemalloc.start()
    gradients(ops.attention, given)
    highest = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert highest < 0.75 * scores
    program = record(attention_step, dict(zip("qkv", given, strict=True)), None, None)
    program(dict(zip("qkv", given, strict=True)), None, None)
    assert program.memory is not None
    assert program.memory.nbytes < 0.75 * scores


# --- embedding -------------------------------------------------------------------------------


def embedded(params: Any, tokens: Any, g: Any) -> Any:
    return value_and_grad(lambda p: ops.sum(ops.embedding(p["weight"], tokens) * g))(params)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("count", [1, 2, 64, 700])
def test_equal_tokens_add_up_in_a_fixed_order(count: int, dtype: str) -> None:
    """The bits do not depend on the other tokens, nor on where the equal ones stand."""
    tokens = (STREAM.of("tokens").words(count) % 9).astype(np.int64).reshape(-1, 1)
    g, weight = normal("g", count, 1, 8).astype(dtype), normal("weight", 30, 8).astype(dtype)
    params = {"weight": weight}
    check(embedded, params, tokens, g)
    grad = embedded(params, tokens, g)[1]["weight"]
    exact = np.zeros((30, 8))
    np.add.at(exact, tokens, g.astype("float64"))
    limit = {"float32": 1e-5, "float64": 1e-13}[dtype]
    assert_close([grad], [exact.astype(dtype)], limit)
    alone = np.flatnonzero(tokens[:, 0] == tokens[0, 0])
    part = embedded(params, tokens[alone], g[alone])[1]["weight"]
    assert_close([grad[tokens[0]]], [part[tokens[0]]], limit)
    assert not grad[9:].any()


def test_a_gradient_that_is_not_finite_stays_in_its_row() -> None:
    rows = np.array([[1.0], [math.inf], [math.nan], [2.0], [3.0]])
    found = scatter_add(rows, np.array([4, 0, 2, 4, 1]), 5)
    assert found[[0, 1, 3, 4], 0].tolist() == [math.inf, 3.0, 0.0, 3.0]
    assert math.isnan(found[2, 0])


@needs_torch
def test_embedding_is_pytorchs() -> None:
    tokens = (STREAM.of("tokens").words(60) % 11).astype(np.int64).reshape(5, 12)
    given = [normal("weight", 11, 6)]
    assert_close(
        gradients(lambda w: ops.embedding(w, tokens), given),
        torch_gradients(lambda w: F.embedding(torch.tensor(tokens), w), given),
    )


def test_tokens_are_checked_on_the_host(xp: Any) -> None:
    tokens = np.array([[0, 4], [9, 2]])
    check_tokens(xp.asarray(tokens), 10)
    check_tokens(np.zeros((0, 3), np.uint8), 1)
    for wrong, found in ((9, r"1 token\(s\).*\[0, 9\); the first is 9 at \(1, 0\)"),
                         (1, r"3 token\(s\).*\[0, 1\); the first is 4 at \(0, 1\)")):  # fmt: skip
        with pytest.raises(Error, match=found):
            check_tokens(xp.asarray(tokens), wrong)
    with pytest.raises(Error, match=r"the first is -3 at \(1,\)"):
        check_tokens(np.array([0, -3]), 5)
    with pytest.raises(Error, match="expected integer tokens; got float64"):
        check_tokens(np.zeros(3), 5)


# --- dropout ---------------------------------------------------------------------------------


def test_dropout_keeps_the_mean_and_drops_its_share() -> None:
    x, n = np.ones((500, 200)), 100_000
    for rate in (0.1, 0.5, 0.9):
        keep = keep_mask(x, Random(1, "dropout"), rate=rate)
        y = ops.dropout(x, keep, rate=rate)
        assert set(np.unique(y)) == {0.0, 1.0 / (1.0 - rate)}
        spread = math.sqrt(rate * (1 - rate) / n)
        assert abs(np.mean(y == 0) - rate) < 5 * spread
        assert abs(np.mean(y) - 1.0) < 5 * spread / (1 - rate)
        columns = np.mean(keep, axis=0) - (1 - rate)  # no column is dropped more than others
        assert np.max(np.abs(columns)) < 6 * math.sqrt(rate * (1 - rate) / 500)
        assert abs(np.corrcoef(keep[:-1].ravel(), keep[1:].ravel())[0, 1]) < 5 / math.sqrt(n)


def test_masks_are_keyed_by_seed_name_and_step() -> None:
    x = np.ones((40, 30))
    streams = [Random(0, "train", 1), Random(1, "train", 1), Random(0, "train", 2),
               Random(0, "train", 1).of("layers/00")]  # fmt: skip
    drawn = [keep_mask(x, random, rate=0.5) for random in streams]
    for i, one in enumerate(drawn):
        assert np.array_equal(one, keep_mask(x, streams[i], rate=0.5))
        assert np.array_equal(one, streams[i].bernoulli((40, 30), 0.5))
        assert all(abs(np.mean(one == other) - 0.5) < 0.08 for other in drawn[i + 1 :])


def test_no_mask_in_evaluation() -> None:
    x = normal("x", 3, 4)
    assert keep_mask(x, None, rate=0.5) is None
    assert keep_mask(x, Random(0), rate=0.0) is None
    assert ops.dropout(x, None, rate=0.5) is x
    found = gradients(lambda x: ops.dropout(x, None, rate=0.5), [x])
    assert_same(found, [x, cotangent_of(x)])


def test_masks_reach_every_backend(backend: backends.Backend) -> None:
    """Drawn on the host, uploaded once, equal everywhere; nothing waits for the device."""
    x, random = normal("x", 6, 5), Random(4, "train", 7)
    waits = backends.synchronisations
    keep = keep_mask(Tensor(backend.asarray(x)), random, rate=0.4)
    y = ops.dropout(backend.asarray(x), keep, rate=0.4)
    assert backends.synchronisations == waits
    expected = ops.dropout(x, random.bernoulli((6, 5), 0.6), rate=0.4)
    assert np.array_equal(backend.to_host(y), expected)


def two_layers(params: Any, x: Any, random: Any) -> Any:
    """One step of a net with three masks."""

    def loss_of(p: Any) -> Any:
        h = x
        for name, w in p.items():
            h = ops.tanh(ops.linear(h, w))
            h = ops.dropout(h, keep_mask(h, random and random.of(name), rate=0.25), rate=0.25)
        shared = keep_mask(h, random and random.of("rows"), rate=0.5, shape=(x.shape[0], 1))
        return ops.sum(ops.dropout(h, shared, rate=0.5) ** 2)

    value, grads = value_and_grad(loss_of)(params)
    return {name: params[name] - 0.1 * g for name, g in grads.items()}, value


def test_fresh_masks_are_inputs_of_a_program() -> None:
    """A replay draws every mask from the stream it is given; a program resumed at any step goes
    on with the bits of one that never stopped, and those of the eager steps."""
    params = {f"layers/{i:02d}": normal(str(i), 8, 8) for i in range(2)}
    x = normal("x", 20, 8)
    streams = [Random(0, "train", step) for step in range(6)]
    program = check(two_layers, params, x, streams[0])
    assert sorted(draw.lineage[0][1] for draw in program.draws.values()) == [
        "layers/00", "layers/01", "rows"]  # fmt: skip
    assert [draw.method for draw in program.draws.values()] == ["bernoulli"] * 3
    eager, losses = params, []
    middle: Any = None
    for step, random in enumerate(streams):
        middle = eager if step == 3 else middle
        eager, value = two_layers(eager, x, random)
        losses.append(float(value))
    assert len(set(losses)) == 6
    for start, first in ((0, params), (3, middle)):
        program, state = record(two_layers, first, x, streams[5]), first
        for random, expected in zip(streams[start:], losses[start:], strict=True):
            state, value = program(state, x, random)
            assert float(value) == expected
        assert_same(list(state.values()), list(eager.values()))


def test_a_program_without_masks() -> None:
    """Evaluation records no draw, and is another program."""
    params, x = {"layers/00": normal("0", 8, 8)}, normal("x", 5, 8)
    program = check(two_layers, params, x, None)
    assert not program.draws
    with pytest.raises(Error, match="random"):
        program(params, x, Random(0))


DROPPING = '''
from dataclasses import dataclass
from npdrt import ops
from npdrt.ops.dropout import keep_mask
from npdrt.random import Random

@dataclass(frozen=True)
class Dropping:
    """Softmax regression with dropout of its inputs and an embedding of nothing."""

    inputs: int
    outputs: int
    rate: float = 0.5

    def init(self, seed, device, dtype):
        return {"weight": Random(seed, "init").normal((self.outputs, self.inputs)).astype(dtype)}

    def __call__(self, params, x):
        return ops.linear(x, params["weight"])

    def apply(self, params, buffers, x, *, train, random):
        keep = keep_mask(x, random.of("inputs") if train else None, rate=self.rate)
        return self(params, ops.dropout(x, keep, rate=self.rate)), buffers
'''


def test_training_with_dropout_resumes(blobs: Any, tmp_path: Any) -> None:  # noqa: F811
    """Recorded, eager, and stopped twice: the same bits, and no warning that it ran eagerly."""
    (tmp_path / "dropping.py").write_text(DROPPING)
    config = settings(blobs, model=f"{tmp_path}/dropping.py:Dropping", model_options={})
    train(config, tmp_path / "whole")
    train(config, tmp_path / "parts", stop=stop_after(4))
    code = [tmp_path / "dropping.py"]
    resume(tmp_path / "parts", stop=stop_after(4), code=code)
    resume(tmp_path / "parts", code=code)
    assert_same_run(contents(tmp_path / "parts"), contents(tmp_path / "whole"))


# --- the loss of a large vocabulary ----------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("rows", [1, 2, 5, 12])
def test_the_loss_in_blocks(
    monkeypatch: pytest.MonkeyPatch, rows: int, smoothing: float, dtype: str
) -> None:
    """The same bits as whole; also of rows that are equal, huge or not finite, and of labels that
    choose no class."""
    z = (30 * normal("z", 4, 3, 137)).astype(dtype)
    z[1, 0], z[2, 1, 5], z[3, 2, 7] = 4.0, 3e38, -math.inf
    labels = (STREAM.of("labels").words(12) % 137).astype(np.int64).reshape(4, 3)
    labels[0, 1], labels[3, 0] = -1, 137

    def step(p: Any, labels: Any) -> Any:
        return value_and_grad(
            lambda p: ops.softmax_cross_entropy(p["z"], labels, label_smoothing=smoothing)
        )(p)

    with np.errstate(all="ignore"):
        whole, grads = step({"z": z}, labels)
        monkeypatch.setattr(loss, "BLOCK", rows * 137)
        value, found = step({"z": z}, labels)
        check(step, {"z": z}, labels)
    assert np.array_equal(whole, value, equal_nan=True)
    assert np.array_equal(grads["z"], found["z"], equal_nan=True)


@needs_torch
def test_the_loss_in_blocks_is_pytorchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "BLOCK", 300)
    z, labels = normal("z", 9, 137), (STREAM.of("labels").words(9) % 137).astype(np.int64)
    assert_close(
        gradients(lambda z: ops.softmax_cross_entropy(z, labels), [z]),
        torch_gradients(lambda z: F.cross_entropy(z, torch.tensor(labels)), [z]),
    )


def decoder(params: Any, labels: Any) -> Any:
    """Loss and gradients of a decoder on (length, batch, features)."""
    return value_and_grad(
        lambda p: ops.softmax_cross_entropy(ops.linear(p["x"], p["weight"], p["bias"]), labels)
    )(params)


def test_a_decoder_holds_its_logits_and_their_derivative() -> None:
    """One product each way on all positions at once, and no third array of the logits' size."""
    n, classes, size = (5, 40), 8000, 16
    params = {"weight": normal("w", classes, size), "bias": np.zeros(classes),
              "x": normal("x", *n, size)}  # fmt: skip
    labels = (STREAM.of("labels").words(200) % classes).astype(np.int64).reshape(n)
    program = check(decoder, params, labels)
    products = [program.values[c.result].shape for c in program.calls if c.function == "matmul"]
    assert products == [(200, classes), (200, size), (classes, size)]
    logits, small = 200 * classes * 8, sum(2 * p.nbytes for p in params.values())
    assert 200 * classes > 2 * loss.BLOCK
    program = record(decoder, params, labels)
    program(params, labels)
    assert program.memory is not None
    assert program.memory.nbytes < 2 * logits + 5 * loss.BLOCK * 8 + small
    assert peak(program, (params, labels)) < 2 * FIXED  # searching and sorting of small arrays


# --- what is refused -------------------------------------------------------------------------


def shapes(*found: tuple[int, ...]) -> list[Any]:
    return [np.zeros(shape) for shape in found]


Q, K, V = shapes((2, 5, 4), (2, 7, 4), (2, 7, 6))
X, W, B, OUT = shapes((2, 5, 6), (18, 6), (18,), (6, 6))
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "one dimension": (lambda: ops.attention(*shapes((4,), (4,), (4,))), r"expected q \(\.\.\., L"),
    "head sizes": (lambda: ops.attention(Q, V, K), r"got \(2, 5, 4\), \(2, 7, 6\) and \(2, 7, 4\)"),
    "leading axes": (lambda: ops.attention(Q, K[:1], V), "with the same leading axes"),
    "as many values": (lambda: ops.attention(Q, K, V[:, :3]), "as many values as keys"),
    "no keys": (lambda: ops.attention(Q, K[:, :0], V[:, :0]), "at least 1, of at least 1 number"),
    "no size": (lambda: ops.attention(Q[..., :0], K[..., :0], V), "of at least 1 number"),
    "integers": (lambda: ops.attention(Q.astype(int), K, V), "one dtype, .* got int64, float64"),
    "booleans": (lambda: ops.attention(Q, K > 0, V), "one dtype, .* got float64, bool, float64"),
    "two dtypes": (lambda: ops.attention(Q.astype("float32"), K, V), "got float32, float64"),
    "integer mask": (lambda: ops.attention(Q, K, V, np.ones((5, 7), int)), "as q is; got int64"),
    "wider mask": (
        lambda: ops.attention(Q.astype("f4"), K.astype("f4"), V.astype("f4"), np.zeros((5, 7))),
        "a mask that is boolean or float32, as q is; got float64",
    ),
    "mask shape": (
        lambda: ops.attention(Q, K, V, np.ones((7, 5), bool)),
        r"the mask has shape \(7, 5\), which does not broadcast to \(2, 5, 7\)",
    ),
    "mask too deep": (lambda: ops.attention(Q, K, V, np.ones((1, 2, 5, 7), bool)), "broadcast to"),
    "keep shape": (
        lambda: ops.attention(Q, K, V, None, np.ones((5, 5), bool), rate=0.5),
        r"attention: the mask keep has shape \(5, 5\), which does not broadcast to \(2, 5, 7\)",
    ),
    "keep dtype": (
        lambda: ops.attention(Q, K, V, None, np.ones((5, 7)), rate=0.5),
        "attention: expected a mask keep of bool or uint8; got float64",
    ),
    "attention rate": (lambda: ops.attention(Q, K, V, rate=1.0), r"in \[0, 1\); got 1.0"),
    "heads": (
        lambda: ops.multi_head_attention(X, X, X, W, B, OUT, None, heads=4),
        "6 features cannot be cut into 4 heads of one size",
    ),
    "no heads": (
        lambda: ops.multi_head_attention(X, X, X, W, B, OUT, None, heads=0), "into 0 heads",
    ),
    "features": (
        lambda: ops.multi_head_attention(X, X, X[..., :4], W, B, OUT, None, heads=2),
        r"query \(N, L, E\), .* got \(2, 5, 6\), \(2, 5, 6\) and \(2, 5, 4\)",
    ),
    "two dimensions": (
        lambda: ops.multi_head_attention(X[0], X[0], X[0], W, B, OUT, None, heads=2),
        r"query \(N, L, E\)",
    ),
    "in_weight": (
        lambda: ops.multi_head_attention(X, X, X, W.T, B, OUT, None, heads=2),
        r"expected in_weight \(18, 6\), .* got \(6, 18\)",
    ),
    "in_bias": (
        lambda: ops.multi_head_attention(X, X, X, W, B[:6], OUT, None, heads=2), r"got .* \(6,\)",
    ),
    "table": (lambda: ops.embedding(np.zeros(5), np.zeros(2, int)), r"weight \(vocabulary, size\)"),
    "tokens": (lambda: ops.embedding(OUT, np.zeros(2)), "expected integer tokens; got float64"),
    "boolean tokens": (lambda: ops.embedding(OUT, np.zeros(2, bool)), "integer tokens; got bool"),
    "a rate of 1": (lambda: ops.dropout(OUT, None, rate=1.0), r"in \[0, 1\); got 1.0"),
    "a negative rate": (lambda: ops.dropout(OUT, None, rate=-0.1), "got -0.1"),
    "a rate that is no number": (lambda: keep_mask(OUT, None, rate=math.nan), "got nan"),
    "a float mask": (lambda: ops.dropout(OUT, OUT, rate=0.5), "bool or uint8; got float64"),
    "a mask that widens": (
        lambda: ops.dropout(OUT[0], OUT > 0, rate=0.5), r"does not broadcast to \(6,\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str) -> None:
    call, text = REFUSED[name]
    with pytest.raises(Error, match=text):
        call()
