"""Sums over ranks: bytes on the wire, exact integers, NCCL as a transport; MPI and NCCL are doubles
whose ranks are threads."""

from __future__ import annotations

import importlib
import math
import threading
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from npdrt import store
from npdrt.arrays import quiet
from npdrt.errors import Error, Unavailable
from npdrt.train import Config, integers, train
from npdrt.train import ranks as module
from npdrt.train.integers import Nccl
from npdrt.train.ranks import Ranks, Row
from npdrt.train.shards import held, roots


class Board:
    """Where the ranks of a test, threads, put what others take."""

    def __init__(self, size: int):
        self.size, self.barrier = size, threading.Barrier(size, timeout=30)
        self.slots: list[Any] = [None] * size

    def all(self, rank: int, value: Any) -> list[Any]:
        """The values of all ranks."""
        self.slots[rank] = value
        self.barrier.wait()
        found = list(self.slots)
        self.barrier.wait()
        return found


class Comm:
    """The calls of mpi4py's communicator that sums make. sent: bytes to other ranks."""

    def __init__(self, board: Board, rank: int):
        self.board, self.rank, self.sent = board, rank, 0

    def Dup(self) -> Comm:
        return self

    def Get_rank(self) -> int:
        return self.rank

    def Get_size(self) -> int:
        return self.board.size

    def allgather(self, value: Any) -> list[Any]:
        return self.board.all(self.rank, value)

    def bcast(self, value: Any, root: int) -> Any:
        return self.board.all(self.rank, value)[root]

    def Alltoallv(self, given: Any, taken: Any) -> None:
        (data, counts), (target, expected) = given, taken
        assert data.size == sum(counts)
        parts = np.split(data, np.cumsum(counts)[:-1])
        came = [row[self.rank] for row in self.board.all(self.rank, parts)]
        assert [len(part) for part in came] == list(expected)
        target.reshape(-1)[:] = np.concatenate(came)
        self.sent += sum(p.nbytes for r, p in enumerate(parts) if r != self.rank)

    def Allgatherv(self, data: Any, taken: Any) -> None:
        target, counts = taken
        came = self.board.all(self.rank, data)
        assert [len(part) for part in came] == list(counts)
        target[:] = np.concatenate(came)
        self.sent += data.nbytes * (self.board.size - 1)

    def Allreduce(self, place: str, whole: Any, op: Any) -> None:
        assert place == "in place"
        whole[...] = op(np.stack(self.board.all(self.rank, whole.copy())))


def on_ranks(size: int, work: Callable[[Ranks], Any]) -> tuple[list[Any], list[int]]:
    """What every rank comes to, and the bytes that it sent."""
    board, found = Board(size), [None] * size
    comms = [Comm(board, rank) for rank in range(size)]

    def run(rank: int) -> None:
        mpi = SimpleNamespace(
            COMM_WORLD=comms[rank], IN_PLACE="in place",
            MAX=lambda rows: rows.max(axis=0), SUM=lambda rows: rows.sum(axis=0),
        )  # fmt: skip
        try:
            with quiet():
                found[rank] = work(Ranks(mpi))
        except BaseException:
            board.barrier.abort()
            raise

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found, [comm.sent for comm in comms]


SHAPES = {"a": (7, 3), "b": (), "c": (0, 2), "d": (11,)}


def gradients(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """The gradients of so many shards, of magnitudes that floating-point sums tell apart."""
    rng = np.random.default_rng(seed)
    return [{n: np.asarray(rng.standard_normal(s) * 10.0 ** rng.integers(-4, 4, s), "float32")
             for n, s in SHAPES.items()} for _ in range(count)]  # fmt: skip


def of_tree(rows: list[Any], first: int, end: int) -> Any:
    """The sum of the rows first to end - 1, as docs/training.md has it."""
    if end - first == 1:
        return rows[first]
    middle = first + 2 ** math.ceil(math.log2(end - first) - 1)
    return of_tree(rows, first, middle) + of_tree(rows, middle, end)


@pytest.fixture
def scaling(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The benchmark that models the exchange."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    return importlib.import_module("scaling")


@pytest.mark.parametrize(("size", "count"), [(2, 8), (3, 8), (4, 8), (5, 7), (8, 8), (4, 3)])
def test_ranks_sum_along_the_tree_and_send_what_the_model_says(
    size: int, count: int, scaling: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes and bits, in several windows, and with more ranks than shards."""
    monkeypatch.setattr(module, "WINDOW", 5)
    shards = gradients(count)

    def work(team: Ranks) -> Any:
        mine = team.mine(count)
        rows = {s: {n: g.copy() for n, g in shards[s].items()} for s in mine}
        for first, middle, _ in held(mine, count):
            rows[first] = {n: g + rows[middle][n] for n, g in rows[first].items()}
        return team.summed({s: rows[s] for s in roots(mine, count)}, count, shards[0])

    found, sent = on_ranks(size, work)
    for name, shape in SHAPES.items():
        expected = of_tree([shard[name] for shard in shards], 0, count)
        for total in found:
            assert total[name].shape == shape
            assert total[name].tobytes() == expected.tobytes()
    elements = sum(math.prod(shape) for shape in SHAPES.values())
    assert sent == scaling.sent(elements, count, size)


def test_aligned_ranks_send_as_much_as_a_ring(scaling: Any) -> None:
    for size in (2, 4, 8, 64, 1024):
        assert scaling.sent(1 << 20, 1024, size) == [8 * (1 << 20) * (size - 1) // size] * size
    assert max(scaling.sent(1 << 20, 8, 3)) > 8 * (1 << 20) * 2 / 3


def test_a_rank_without_shards_has_the_sum_where_its_parameters_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On its GPU, in a short last batch of fewer shards than ranks."""
    monkeypatch.setattr(module, "device_of", lambda x: "its device")
    monkeypatch.setattr(module, "to_device", lambda x, device: (device, x.tolist()))
    one = {"w": np.asarray([1.0, 2.0], "float32")}

    def work(team: Ranks) -> Any:
        mine = team.mine(1)
        total = team.summed({0: one} if mine else {}, 1, one)
        numbers = {0: (np.asarray(0.5), np.asarray(3))} if mine else {}
        return bool(mine), total, team.numbers(numbers, 1, {}, one)

    found = {mine: rest for mine, *rest in on_ranks(2, work)[0]}
    there = {"w": ("its device", [1.0, 2.0])}, (("its device", 0.5), ("its device", 3), {})
    assert tuple(found[False]) == tuple(found[True]) == there


def test_a_row_is_its_arrays() -> None:
    arrays = [np.arange(6.0).reshape(2, 3), np.empty((0, 2)), np.asarray(6.0), np.arange(7.0, 9.0)]
    row, whole = Row(arrays), np.arange(9.0)
    for start in range(9):
        for stop in range(start + 1, 10):
            assert np.array_equal(row.read(range(start, stop)), whole[start:stop])
    row.write(range(4, 8), -whole[4:8])
    assert arrays[0][1].tolist() == [3, -4, -5]
    assert (arrays[2].item(), arrays[3].tolist()) == (-6, [-7, 8])


# --- integers ------------------------------------------------------------------------------------


def alone(x: Any, operation: str) -> Any:
    return x


@given(count=st.integers(1, 9), seed=st.integers(0, 99), scale=st.sampled_from([0, -120, 100]))
def test_integers_are_the_rounded_sum(count: int, seed: int, scale: int) -> None:
    """Against exact fractions: each gradient is rounded once, to a multiple of 2^(e - b)."""
    shards = [{n: np.ldexp(g, scale) for n, g in s.items()} for s in gradients(count, seed)]
    found = integers.summed(shards, count, shards[0], alone)
    for name in ("a", "b", "d"):
        rows = np.stack([s[name].reshape(-1) for s in shards]).astype(float)  # (shards, elements)
        unit = Fraction(2) ** (math.frexp(np.abs(rows).max())[1] - 62 + math.ceil(math.log2(count)))
        for i, value in enumerate(found[name].reshape(-1)):
            exact = [Fraction(g) for g in rows[:, i]]
            total = sum(round(g / unit) for g in exact)
            assert value == np.float32(float(total * unit))
            assert abs(total * unit - sum(exact)) <= count * unit / 2


def test_integers_have_no_order_and_flag_what_is_not_finite() -> None:
    shards = gradients(8)
    expected = integers.summed(shards, 8, shards[0], alone)
    again = integers.summed(shards[::-1], 8, shards[0], alone)
    for size in (2, 3, 8):
        found, _ = on_ranks(
            size, lambda team: integers.summed(
                [shards[s] for s in team.mine(8)], 8, shards[0], team.reduced))  # fmt: skip
        for total in (*found, again):
            assert all(total[n].tobytes() == g.tobytes() for n, g in expected.items())
    for bad in (np.nan, np.inf, -np.inf):
        shards[5]["a"][2, 1] = bad
        with quiet():
            total = integers.summed(shards, 8, shards[0], alone)
        assert np.isnan(total["a"]).all()
        assert total["d"].tobytes() == expected["d"].tobytes()


def test_a_gradient_is_rounded_to_the_unit_of_its_parameter() -> None:
    """One shard of largest magnitude 1, so e = 1 and b = 62: the unit is 2^-61, ties to even."""
    like = {"w": np.array([1.0, 1.5 * 2.0**-61, 2.5 * 2.0**-61, 0.75 * 2.0**-62])}
    found = integers.summed([like], 1, like, alone)["w"]
    assert (found * 2.0**61).tolist() == [2.0**61, 2, 2, 0]


def test_nothing_and_the_largest_numbers_have_sums() -> None:
    like = {"w": np.zeros(2, "float64")}
    assert not integers.summed([], 4, like, alone)["w"].any()
    top = np.finfo("float64").max / 4
    for g in ([top, -top], [5e-324, 0.0]):
        parts = [{"w": np.array(g)}] * 2
        assert integers.summed(parts, 2, like, alone)["w"].tolist() == [2 * g[0], 2 * g[1]]


# --- NCCL ------------------------------------------------------------------------------------


class Library:
    """NCCL among threads: it knows arrays by their addresses."""

    available = True
    NCCL_INT64, NCCL_FLOAT64, NCCL_SUM, NCCL_MAX = 4, 8, 0, 2

    def __init__(self, board: Board, arrays: dict[int, Any]):
        self.board, self.arrays = board, arrays

    def get_unique_id(self) -> tuple[int, ...]:
        return (1, 2, 3)

    def NcclCommunicator(self, size: int, name: Any, rank: int) -> Any:
        assert (size, name) == (self.board.size, (1, 2, 3))

        def all_reduce(source: int, target: int, n: int, kind: int, does: int, stream: int) -> None:
            x = self.arrays[source]
            assert (source, stream, n) == (target, 7, x.size)
            assert x.dtype == {self.NCCL_INT64: "int64", self.NCCL_FLOAT64: "float64"}[kind]
            rows = np.stack(self.board.all(rank, x.copy()))
            x[...] = rows.sum(axis=0) if does == self.NCCL_SUM else rows.max(axis=0)

        return SimpleNamespace(allReduce=all_reduce)


def test_nccl_is_given_the_sums_in_integers() -> None:
    shards, board = gradients(4), Board(4)
    expected = integers.summed(shards, 4, shards[0], alone)

    def work(team: Ranks) -> Any:
        known: dict[int, Any] = {}
        cuda = SimpleNamespace(nccl=Library(board, known),
                               get_current_stream=lambda: SimpleNamespace(ptr=7))  # fmt: skip
        transport = Nccl(cuda, team)

        def reduced(x: Any, operation: str) -> Any:
            known[id(x)] = x
            on_gpu = SimpleNamespace(dtype=x.dtype, size=x.size, data=SimpleNamespace(ptr=id(x)))
            assert transport(on_gpu, operation) is on_gpu
            return x

        return integers.summed([shards[team.rank]], 4, shards[0], reduced)

    for total in on_ranks(4, work)[0]:
        assert all(total[n].tobytes() == g.tobytes() for n, g in expected.items())


def test_without_nccl_it_says_what_to_install() -> None:
    cuda = SimpleNamespace(nccl=SimpleNamespace(available=False))
    with pytest.raises(Unavailable, match="need NCCL, and CuPy does not find it; install nvidia-"):
        Nccl(cuda, None)


# --- runs ------------------------------------------------------------------------------------


def test_runs_with_sums_in_integers(tmp_path: Path) -> None:
    """Replayed and eager alike; another run than along the tree, to rounding."""
    found = {}
    for name, settings in {
        "tree": {}, "integers": {"sums": "integers"}, "eager": {"sums": "integers", "eager": True},
    }.items():  # fmt: skip
        config = Config(model_options={"depth": 3, "width": 16}, epochs=1, shards=5, batch_size=48,
                        **settings)  # fmt: skip
        train(config, tmp_path / name)
        params = store.load(tmp_path / name / "checkpoint.h5").params
        found[name] = np.concatenate([w.reshape(-1) for w in params.values()])
    assert found["integers"].tobytes() == found["eager"].tobytes() != found["tree"].tobytes()
    assert np.max(np.abs(found["integers"] - found["tree"])) < 1e-5
    with pytest.raises(Error, match="sums integers are over shards; give --shards 2 or more"):
        Config(sums="integers")
