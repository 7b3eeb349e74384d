"""Whose numbers are in a program's memory: what a caller holds is never overwritten."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from npdrt import ops, record, value_and_grad
from npdrt.arrays import namespace
from npdrt.errors import Error
from npdrt.models import MLP
from npdrt.program import Memory, Program
from npdrt.random import Random

RNG = np.random.default_rng(2026)
HOLD = 0.2  # seconds
HELD = "an earlier result, which was passed back to the program, is still held"


def step(state: dict[str, Any], x: Any) -> Any:
    """Two results that replace inputs, one in place and one by a copy, and two that do not."""
    xp = namespace(x)
    w = state["w"] * 0.5 + x
    v = state["v"] - xp.sum(state["w"]) * x
    return {"w": w, "v": v}, ops.sum(w * v), w * x


def start() -> dict[str, Any]:
    return {"w": RNG.standard_normal((4, 5)), "v": RNG.standard_normal((4, 5))}


def inputs(count: int) -> list[Any]:
    return [RNG.standard_normal((4, 5)) for _ in range(count)]


def new(memory: Memory | None = None) -> Program:
    return record(step, start(), *inputs(1), memory=memory)


def flat(result: Any) -> list[Any]:
    state, total, product = result
    return [state["w"], state["v"], total, product]


def assert_same(found: Any, expected: Any) -> None:
    for a, b in zip(flat(found), flat(expected), strict=True):
        assert np.array_equal(a, b)


# --- held results ----------------------------------------------------------------------------


def test_a_list_of_results() -> None:
    """Every call has numbers of its own, also of what replaces an input."""
    program, state, xs = new(), start(), inputs(7)
    found = [program(state, x) for x in xs]
    for result, x in zip(found, xs, strict=True):
        assert_same(result, step(state, x))


VIEWS: dict[str, Callable[[Any], Any]] = {
    "array": lambda x: x,
    "row": lambda x: x[1],
    "transpose": lambda x: x.T,
    "view of a view": lambda x: x[1:].T[2:],
    "reshape": lambda x: x.reshape(-1),
    "memoryview": memoryview,
    "array of a memoryview": lambda x: np.asarray(memoryview(x)),
    "DLPack": np.from_dlpack,
    "PyTorch": lambda x: pytest.importorskip("torch").from_numpy(x),
    "PyTorch by DLPack": lambda x: pytest.importorskip("torch").from_dlpack(x),
    "iterator": lambda x: x.flat,
    "bytes": lambda x: x.view(np.uint8),
}


def numbers(view: Any) -> np.ndarray:
    """A copy of what a view shows."""
    return np.array(view.numpy() if hasattr(view, "numpy") else view)


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("which", range(4))
def test_any_view_keeps_its_numbers(view: str, which: int) -> None:
    """Nothing but the view is kept of the first call."""
    program, state, xs = new(), start(), inputs(5)
    x = flat(program(state, xs[0]))[which]
    if x.ndim == 0 and view in ("row", "transpose", "view of a view", "bytes"):
        pytest.skip("a number has no such view")
    kept = VIEWS[view](x)
    before = numbers(kept)
    del x
    for x in xs:
        program(state, x)
    assert np.array_equal(numbers(kept), before)
    expected = VIEWS[view](np.array(flat(step(state, xs[0]))[which]))
    assert np.array_equal(before, numbers(expected))


def test_results_that_are_inputs_constants_and_views() -> None:
    """All are the caller's to keep and to change."""

    def several(state: Any, x: Any) -> Any:
        xp = namespace(x)
        y = x * 2.0
        flag = xp.full((5,), 3.0)
        wide = xp.broadcast_to(y[:1, :], (4, 5))
        return {"w": state["w"], "x": x, "y": y, "again": y, "part": y[1::2, ::-1],
                "turned": xp.matrix_transpose(y), "constant": flag, "wide": wide,
                "view": state["w"][1:]}  # fmt: skip

    xs, state = inputs(4), {"w": RNG.standard_normal((4, 5))}
    program = record(several, state, xs[0])
    found = [program(state, x) for x in xs]
    for result, x in zip(found, xs, strict=True):
        expected = several(state, x)
        for name, y in result.items():
            assert np.array_equal(y, expected[name]), name
            assert y.strides == expected[name].strides, name
        assert result["again"] is result["y"]
        result["constant"] += 1.0
        result["y"] += 1.0
    assert np.array_equal(program(state, xs[0])["constant"], np.full(5, 3.0))


def test_a_parameter_that_is_returned_as_it_is() -> None:
    """It is passed back without a copy, and stays the same array."""

    def frozen(state: Any, x: Any) -> Any:
        return {"w": state["w"], "v": state["v"] + x}

    state, xs = start(), inputs(4)
    program = record(frozen, state, xs[0])
    found, expected = program(state, xs[0]), frozen(state, xs[0])
    for x in xs[1:]:
        before = found["w"]
        found, expected = program(found, x), frozen(expected, x)
        assert found["w"] is before
        assert np.array_equal(found["v"], expected["v"])
    assert np.array_equal(found["w"], state["w"])


def test_two_buffers_serve_a_loop() -> None:
    """A name that is assigned in a loop has one of two arrays of the pool; what is dropped at once
    has the same one."""
    program, state, xs = new(), start(), inputs(8)
    seen = set()
    for x in xs:
        _, _, product = program(state, x)
        seen.add(product.ctypes.data)
    assert len(seen) == 2
    del product
    assert len({program(state, x)[2].ctypes.data for x in xs}) == 1


def test_held_results_do_not_make_the_memory_grow() -> None:
    """What the pool has lent and forgotten belongs to whoever holds it."""
    program, state, xs = new(), start(), inputs(40)
    found = [program(state, x) for x in xs[:20]]
    size = program.memory.nbytes
    found += [program(state, x) for x in xs[20:]]
    assert program.memory.nbytes == size
    assert len({y.ctypes.data for result in found for y in flat(result)}) == 4 * len(xs)


def test_results_outlive_the_program() -> None:
    program, state, (x,) = new(), start(), inputs(1)
    found = program(state, x)
    del program
    assert_same(found, step(state, x))


# --- passing back ----------------------------------------------------------------------------


def addresses(state: dict[str, Any]) -> list[int]:
    return [y.ctypes.data for y in state.values()]


def test_a_training_loop_copies_no_state() -> None:
    """In the same memory from the first call on, with evaluation and copies in between."""
    program, state, xs = new(), start(), inputs(9)
    expected = step(state, xs[0])
    found = program(state, xs[0])
    place = addresses(found[0])
    saved = []
    for x in xs[1:]:
        found, expected = program(found[0], x), step(expected[0], x)
        assert addresses(found[0]) == place
        assert_same(found, expected)
        saved.append((np.array(found[0]["w"]), np.array(expected[0]["w"])))
        float(np.sum(found[0]["w"]))  # an evaluation
    assert all(np.array_equal(*both) for both in saved)


def test_after_held_results_a_loop_copies_no_state_again() -> None:
    """Results that are held cost copies; those that are passed back, at most one more."""
    program, state, xs = new(), start(), inputs(9)
    held = [program(state, x) for x in xs]
    found = program(state, xs[0])
    found = program(found[0], xs[1])
    place = addresses(found[0])
    for x in xs:
        found = program(found[0], x)
        assert addresses(found[0]) == place
    for result, x in zip(held, xs, strict=True):
        assert_same(result, step(state, x))


def test_a_consumed_result_that_is_held_raises() -> None:
    program, state, xs = new(), start(), inputs(5)
    first = program(state, xs[0])[0]
    second = program(first, xs[1])[0]
    with pytest.raises(Error, match=f"state/w, state/v: {HELD}") as refused:
        program(second, xs[2])
    assert "x.copy()" in str(refused.value)
    del first["w"]
    with pytest.raises(Error, match=f"^state/v: {HELD}"):
        program(second, xs[2])
    del first
    assert np.array_equal(program(second, xs[2])[0]["w"].shape, (4, 5))


@pytest.mark.parametrize("view", VIEWS)
def test_a_view_of_a_consumed_result_raises(view: str) -> None:
    program, state, xs = new(), start(), inputs(5)
    state = program(state, xs[0])[0]
    kept = VIEWS[view](state["v"])
    state = program(state, xs[1])[0]
    with pytest.raises(Error, match=f"^state/v: {HELD}"):
        program(state, xs[2])
    del kept
    program(state, xs[2])


def test_a_circle_of_references_holds_nothing() -> None:
    program, state, xs = new(), start(), inputs(3)
    state = program(state, xs[0])[0]
    circle: dict[str, Any] = {"state": state}
    circle["itself"] = circle
    del circle
    state = program(state, xs[1])[0]
    program(state, xs[2])


def test_a_refused_call_consumes_nothing() -> None:
    program, state, xs = new(), start(), inputs(3)
    found = program(state, xs[0])
    kept = [np.array(y) for y in flat(found)]
    with pytest.raises(Error, match="a program serves one shape"):
        program(found[0], xs[1][:2])
    assert all(np.array_equal(*both) for both in zip(flat(found), kept, strict=True))
    assert_same(program(found[0], xs[1]), step(step(state, xs[0])[0], xs[1]))


def test_only_what_comes_back_to_its_place_is_consumed() -> None:
    """Swapped, as a view, or twice: the caller's arrays keep their numbers."""
    program, state, xs = new(), start(), inputs(4)
    first = program(state, xs[0])[0]
    kept = {name: np.array(y) for name, y in first.items()}
    changes: list[Callable[[Any], Any]] = [
        lambda s: {"w": s["v"], "v": s["w"]},
        lambda s: {"w": s["w"][:], "v": s["w"]},
        lambda s: {"w": np.from_dlpack(s["v"]), "v": s["v"][::-1]},
    ]
    for change in changes:
        for x in xs:
            assert_same(program(change(first), x), step(change(kept), x))
            assert all(np.array_equal(first[name], kept[name]) for name in kept)


def test_results_may_be_changed_before_they_are_passed_back() -> None:
    program, state, xs = new(), start(), inputs(3)
    found, expected = program(state, xs[0])[0], step(state, xs[0])[0]
    for x in xs:
        for tree in (found, expected):
            tree["w"] *= 0.5
            tree["v"][1] = 0.0
        found, expected = program(found, x)[0], step(expected, x)[0]
        assert np.array_equal(found["w"], expected["w"])
        assert np.array_equal(found["v"], expected["v"])


def test_an_interrupted_call_does_not_pass_for_a_whole_one() -> None:
    """Its arguments were consumed, and say so if they are passed again."""
    program, state, xs = new(), start(), inputs(3)
    found = program(state, xs[0])[0]
    bound = program._bound
    assert bound is not None
    bound.operations.append((interrupt, (), {}))
    with pytest.raises(KeyboardInterrupt):
        program(found, xs[1])
    bound.operations.pop()
    with pytest.raises(Error, match=HELD):
        program(found, xs[1])
    del found
    assert_same(program(state, xs[0]), step(state, xs[0]))


def interrupt() -> None:
    raise KeyboardInterrupt


def test_programs_of_one_memory_respect_each_other() -> None:
    """One that reads a home leaves it alone; one that writes there moves it, if it is held."""
    memory = Memory()
    program = new(memory)

    def total(state: Any, x: Any) -> Any:
        return ops.sum(state["w"] * x)

    state, xs = start(), inputs(4)
    evaluation = record(total, state, xs[0], memory=memory)
    found, expected = program(state, xs[0])[0], step(state, xs[0])[0]
    place = addresses(found)
    for x in xs:
        assert float(evaluation(found, x)) == float(total(expected, x))
        found, expected = program(found, x)[0], step(expected, x)[0]
        assert addresses(found) == place
    kept = np.array(found["w"])
    other = start()
    assert float(evaluation(other, xs[0])) == float(total(other, xs[0]))
    assert np.array_equal(found["w"], kept)
    assert_same(program(found, xs[0]), step(expected, xs[0]))


# --- any sequence ----------------------------------------------------------------------------

ACTIONS = ("fresh", "back", "swap", "views", "keep", "drop", "copy")


@settings(max_examples=150, deadline=None)
@given(actions=st.lists(st.sampled_from(ACTIONS), max_size=14), programs=st.integers(1, 2))
def test_any_sequence(actions: list[str], programs: int) -> None:
    """Every result is that of the step, and what is held, and was not consumed, never changes."""
    memory = Memory()
    turns = [new(memory) for _ in range(programs)]
    xs, fresh = inputs(len(actions) + 1), start()
    found = turns[0](fresh, xs[0])
    held: list[tuple[Any, Any]] = []
    for number, (action, x) in enumerate(zip(actions, xs[1:], strict=True)):
        program, state = turns[number % programs], found[0]
        before = copy.deepcopy(state)
        if action == "keep":
            held.append((found, copy.deepcopy(found)))
            given: Any = fresh
        elif action == "copy":
            held.append((copy.deepcopy(found), copy.deepcopy(found)))
            given = state
        elif action == "drop":
            held.clear()
            given = fresh
        else:
            given = {
                "fresh": fresh, "back": state, "swap": {"w": state["v"], "v": state["w"]},
                "views": {"w": state["w"][:], "v": np.from_dlpack(state["v"])},
            }[action]  # fmt: skip
        expected = step({n: np.array(y) for n, y in given.items()}, x)
        held = [(a, b) for a, b in held if given is not a[0]]
        new_found = program(given, x)
        if given is not state:
            assert all(np.array_equal(state[name], y) for name, y in before.items())
        del state, given
        found = new_found
        del new_found
        assert_same(found, expected)
        for kept, kept_numbers in held:
            assert_same(kept, kept_numbers)


# --- copies and threads ----------------------------------------------------------------------

MODEL = MLP(inputs=20, outputs=5, depth=4, width=64)
PARAMS = MODEL.init(seed=0)
X = np.random.default_rng(0).normal(size=(16, 20)).astype("f4")


def training(params: Any, x: Any, lr: Any, random: Any) -> Any:
    noise = namespace(x).astype(random.normal(x.shape), "float32")
    loss, grads = value_and_grad(lambda p: ops.mean(MODEL(p, x + noise) ** 2))(params)
    return {n: w - namespace(w).astype(lr, w.dtype) * grads[n] for n, w in params.items()}, loss


def trainer(memory: Memory | None = None) -> Program:
    return record(training, PARAMS, X, np.float64(0.01), Random(0, "t", 0), memory=memory)


def trained(program: Any, steps: int = 12) -> tuple[list[float], dict[str, bytes]]:
    params, losses = dict(PARAMS), []
    for i in range(steps):
        params, loss = program(params, X, np.float64(0.01), Random(0, "t", i))
        losses.append(float(loss))
    return losses, {name: w.tobytes() for name, w in params.items()}


COPIES: dict[str, Callable[[Program], Program]] = {
    "pickle": lambda program: pickle.loads(pickle.dumps(program)),
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
}


@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("how", COPIES)
def test_copies_of_a_program(how: str, called: bool) -> None:
    """Before a call or after, they give the same numbers, each in its own time."""
    program, expected = trainer(), trained(training)
    if called:
        assert trained(program) == expected
    held = program(PARAMS, X, np.float64(0.01), Random(0, "t", 0))
    kept = copy.deepcopy(held)
    other = COPIES[how](program)
    assert trained(other) == expected
    assert all(np.array_equal(held[0][n], w) for n, w in kept[0].items())
    assert trained(program) == expected
    assert trained(other) == expected


def test_copies_of_two_programs_still_share_their_memory() -> None:
    memory = Memory()
    first, second = copy.deepcopy([trainer(memory), trainer(memory)])
    assert first.memory is second.memory
    assert first.memory is not memory
    assert trained(first) == trained(second) == trained(training)


@pytest.mark.parametrize("shared", ["program", "memory", "nothing"])
def test_threads(shared: str) -> None:
    """One program in all of them, programs of one memory, and programs of their own."""
    memory = Memory() if shared == "memory" else None
    one = trainer()
    programs = [one if shared == "program" else trainer(memory) for _ in range(5)]
    found: list[Any] = []
    threads = [
        threading.Thread(target=lambda p=p: found.append(trained(p)))  # type: ignore[misc]
        for p in programs
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [trained(training)] * len(programs)


def test_a_program_is_planned_while_another_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """No lock is held meanwhile: a process forked then would find it taken for ever."""
    from npdrt.program import program as module

    begun, go_on, make_plan = threading.Event(), threading.Event(), module.make_plan

    def slowly(*args: Any) -> Any:
        if threading.current_thread() is slow:
            begun.set()
            assert go_on.wait(60)
        return make_plan(*args)

    monkeypatch.setattr(module, "make_plan", slowly)
    first, second = (record(lambda x: x + 1.0, np.ones(2)) for _ in range(2))
    plans: list[Any] = []
    slow = threading.Thread(target=lambda: plans.append(first.plan))
    other = threading.Thread(target=lambda: plans.append(second.plan))
    slow.start()
    assert begun.wait(60)
    other.start()
    other.join(60)
    found = len(plans)
    go_on.set()
    slow.join()
    assert (found, len(plans)) == (1, 2)


def test_a_thread_that_looks_at_our_frames_for_a_moment_is_no_holder() -> None:
    """As a profiler's does, Dask's for one; a thread that keeps what it saw is one."""
    program, state, x, w = new(), start(), *inputs(2)
    seen: list[Any] = []
    state = program(state, x)[0]
    seen.append(state["w"])
    glancing = threading.Timer(HOLD, seen.clear)
    glancing.start()
    state = program(state, w)[0]
    state = program(state, x)[0]
    glancing.join()
    assert not seen
