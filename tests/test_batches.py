"""The plan of a GPU: batches, what they hold, whether their groups may run in any order, and how
many nodes the graphs of whole steps have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from cupy_standin import StandIn
from hypothesis import given, settings
from hypothesis import strategies as st
from test_program_gpu import OPTIMIZERS, assert_same, network, same

from npdrt import arrays, record
from npdrt.arrays import phase
from npdrt.models import MLP, Transformer
from npdrt.program import Memory
from npdrt.program.batches import make_batches
from npdrt.program.cuda import WARM_UPS, CudaMemory
from npdrt.program.kernels import can_compile
from npdrt.program.plan import Target
from npdrt.program.replay import Binding
from npdrt.random import Random
from npdrt.train.step import State, Task, make_step

# --- batches of any calls ----------------------------------------------------------------------


@st.composite
def calls(draw: Any) -> tuple[dict[int, set[int]], list[int]]:
    """What every call needs, and its kind; 0 is the kind that loops are made of."""
    count = draw(st.integers(1, 25))
    needs = {c: draw(st.sets(st.integers(0, c - 1), max_size=3)) if c else set()
             for c in range(count)}  # fmt: skip
    return needs, [draw(st.integers(0, 3)) for _ in range(count)]


@given(calls())
@settings(max_examples=200, deadline=None)
def test_what_a_call_needs_runs_before_it(case: tuple[dict[int, set[int]], list[int]]) -> None:
    needs, kinds = case

    def joins(d: int, c: int) -> bool:
        return kinds[d] == kinds[c] == 0

    batches = make_batches(list(needs), needs, joins, lambda c: kinds[c])
    place = {c: (b, k, position) for b, batch in enumerate(batches)
             for k, chain in enumerate(batch) for position, c in enumerate(chain)}  # fmt: skip
    assert sum(len(chain) for batch in batches for chain in batch) == len(place) == len(needs)
    for c, needed in needs.items():
        for d in needed:
            inside = place[d][:2] == place[c][:2] and joins(d, c)
            assert place[d] < place[c] if inside else place[d][0] < place[c][0]
    for batch in batches:
        assert len({kinds[c] for chain in batch for c in chain}) == 1
        assert all(len(chain) == 1 for chain in batch if kinds[chain[0]])


def test_calls_join_the_loop_of_those_that_need_them() -> None:
    """d = g + decay w does not wait for the norms, but it runs with the update that does."""
    needs = {0: set(), 1: set(), 2: {1}, 3: {0, 2}}  # d, norm, scalar, update
    kinds = ["array", "norm", "scalar", "array"]

    def joins(d: int, c: int) -> bool:
        return kinds[d] == kinds[c] != "norm"

    assert make_batches([0, 1, 2, 3], needs, joins, kinds.__getitem__) == [[(1,)], [(2,)], [(0, 3)]]


# --- the plan, run by NumPy in any order ---------------------------------------------------------


class AnyOrder(Memory):
    """Memory that plans for a GPU, and runs the groups of a batch in a random order."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.random = np.random.default_rng(seed)

    def target(self, fast: bool) -> Target:
        return Target(can_compile, batched=True)

    def bind(self, values: Any, plan: Any, persistent: Any, draws: Any, fast: bool) -> Binding:
        return AnyOrderBinding(values, plan, persistent, draws, self)


class AnyOrderBinding(Binding):
    """Chains call by call, on whole arrays."""

    memory: AnyOrder

    def _batch(self, batch: Any) -> Any:
        return super()._batch([batch[k] for k in self.memory.random.permutation(len(batch))])

    def _chain(self, calls: Any, blocks: Any) -> Any:
        for i in blocks:
            self.arrays[i] = self.memory.new(self.values[i])
        return [operation for call in calls for operation in self.single(call)]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_groups_of_a_batch_run_in_any_order(name: str) -> None:
    step, args = network(name)
    for seed in range(2):
        program = record(step, *args, memory=AnyOrder(seed))
        assert max(map(len, program.plan.batches)) >= 6
        found = expected = args[:2]
        for _ in range(2):
            found, expected = program(*found[:2], *args[2:]), step(*expected[:2], *args[2:])
            assert_same(found, expected)


@pytest.mark.parametrize("traced", [False, True])
def test_clipping_and_measurements_run_in_any_order(traced: bool) -> None:
    step, args = training("fromage", traced=traced, clip=0.25)
    program, found, expected = record(step, *args, memory=AnyOrder()), args[0], args[0]
    for k in range(3):
        a = program(found, *args[1:4], Random(0, "t", k))
        with arrays.quiet():
            b = step(expected, *args[1:4], Random(0, "t", k))
        found, expected = a.state, b.state
        for x, y in ((found.params, expected.params), (a.measured, b.measured)):
            assert [n for n in y if not same(x[n], y[n])] == []


def test_a_number_that_is_read_is_not_written_over_at_once() -> None:
    """Two groups of a batch read `total`; the buffer of neither result may be that of `total`."""

    def step(w: Any, v: Any) -> Any:
        xp = arrays.namespace(w)
        with phase("update"):
            total = xp.sum(w)
            return xp.sum(w * (total * 2.0)), xp.sum(v * (total * 3.0))

    w, v = (np.random.default_rng(k).standard_normal(7) for k in range(2))
    for seed in range(4):
        found = record(step, w, v, memory=AnyOrder(seed))(w, v)
        assert all(same(a, b) for a, b in zip(found, step(w, v), strict=True))


def test_what_replaces_an_input_waits_for_those_that_read_it() -> None:
    """In another batch, or in the same loop."""

    def step(p: Any) -> Any:
        xp = arrays.namespace(p["a"])
        with phase("update"):
            size = xp.sum(p["a"])
            b, shared = p["b"] * 2.0 + size, p["a"] + p["b"]
            return {"a": p["a"] * p["s"], "b": b, "s": p["s"] + 1.0}, shared * size

    args = {"a": np.arange(5.0), "b": np.arange(5.0) ** 2, "s": np.asarray(0.5)}
    for seed in range(4):
        program, found, expected = record(step, args, memory=AnyOrder(seed)), args, args
        for _ in range(3):
            (found, a), (expected, b) = program(found), step(expected)
            assert same(a, b)
            assert [n for n in expected if not same(found[n], expected[n])] == []


def test_two_updates_in_a_step_are_batches_each() -> None:
    """Those of a critic, and then of a generator that uses the new critic."""
    step, args = network("adam")

    def both(params: Any, state: Any, x: Any, y: Any, lr: Any) -> Any:
        params, state, _ = step(params, state, x, y, lr)
        return step(params, state, x, y, lr)

    program, found, expected = record(both, *args, memory=AnyOrder()), args[:2], args[:2]
    assert sorted(map(len, program.plan.batches))[-2:] == [6, 6], "the updates of six parameters"
    for _ in range(2):
        found, expected = program(*found[:2], *args[2:]), both(*expected[:2], *args[2:])
        assert_same(found, expected)


# --- nodes ---------------------------------------------------------------------------------------


def training(rule: str, model: Any = None, **settings: Any) -> tuple[Callable[..., Any], Any]:
    """The step of a training run, and its first arguments."""
    model = model or MLP(depth=3, width=16, inputs=16, outputs=10, bias=True)
    optimizer, rng = OPTIMIZERS[rule](), np.random.default_rng(0)
    task = Task(model, 10, clip=settings.pop("clip", None))
    x, y = rng.standard_normal((250, model.inputs)).astype("float32"), rng.integers(0, 10, 250)
    params = model.init(seed=0)
    state = State(params, {}, optimizer.init(params))
    return make_step(task, optimizer, **settings), (state, x, y, 0.01, Random(0, "t", 0))


class Counted(StandIn):
    """A stand-in whose kernels do nothing, and which takes nothing by indices, as they are not
    made."""

    def take(self, x: Any, indices: Any, axis: Any = None, out: Any = None) -> None:
        self.work("take", lambda: None)

    def _nothing(self, name: str) -> Callable[..., None]:
        return lambda *args: self.work(name, lambda: None)

    def ElementwiseKernel(self, reads: str, writes: str, body: str, name: str, **_: Any) -> Any:
        return self._nothing(name)

    def RawKernel(self, code: str, name: str, **_: Any) -> Any:
        return self._nothing(name)


def nodes(step: Callable[..., Any], args: Any) -> int:
    """The nodes of the graph of a step."""
    device = Counted()
    program = record(step, *args, memory=CudaMemory(device, device.blas))
    for _ in range(WARM_UPS + 1):
        program(*args)
    assert program.graph, program.graph_error
    assert program._bound is not None
    return int(program._bound.graph.nodes)


@pytest.mark.parametrize(("rule", "bias", "most"), [("fromage", False, 290), ("adam", True, 340)])
def test_a_perceptron_of_fifty_layers_has_few_nodes(rule: str, bias: bool, most: int) -> None:
    """Its 149 products, a launch for every nonlinearity and derivative of one, and for every bias a
    sum; the update takes five launches, however many layers there are. Sizes do not matter."""
    model = MLP(depth=50, width=16, inputs=16, outputs=10, bias=bias)
    whole = nodes(*training(rule, model))
    half = nodes(*training(rule, MLP(depth=25, width=16, inputs=16, outputs=10, bias=bias)))
    assert whole <= most
    assert whole - half == 25 * (5 + bias)


def test_the_transformer_of_wikitext_has_few_nodes() -> None:
    """35 words of 20 streams; a smaller vocabulary and width have as many nodes."""
    model, rng = Transformer(vocabulary=120, width=16, hidden=16), np.random.default_rng(0)
    optimizer, params = OPTIMIZERS["fromage bounded"](), model.init(seed=0)
    step = make_step(Task(model, 120), optimizer)
    x, y = rng.integers(0, 120, (2, 35, 20))
    state = State(params, {}, optimizer.init(params))
    assert nodes(step, (state, x, y, 0.01, Random(0, "t", 0))) <= 400
