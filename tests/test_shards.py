"""Batches in shards, in one process and on ranks: the same bits, and one end for all ranks."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from npdrt import store
from npdrt.arrays import quiet
from npdrt.data import load
from npdrt.errors import Error
from npdrt.models import GAN, MLP, ResNet18
from npdrt.optim import adam, sgd
from npdrt.program.tree import leaves
from npdrt.random import Random
from npdrt.train import Config, resume, train
from npdrt.train.adversarial import Adversarial
from npdrt.train.evaluation import evaluate
from npdrt.train.shards import (
    ALONE,
    Alone,
    Sharded,
    add,
    bounds,
    held,
    roots,
    schedule,
    share,
    tree,
)
from npdrt.train.step import State, Task, make_step
from npdrt.train.studies import sweep

# --- how a batch is cut and summed -------------------------------------------------------------


@given(n=st.integers(1, 200), shards=st.integers(1, 40))
def test_shards_are_equal_parts(n: int, shards: int) -> None:
    places = bounds(n, shards)
    sizes = [end - start for start, end in places]
    assert [i for start, end in places for i in range(start, end)] == list(range(n))
    assert max(sizes) - min(sizes) <= 1 <= min(sizes)
    assert len(places) == min(n, shards)


@given(count=st.integers(1, 70))
def test_the_tree_adds_every_row_once(count: int) -> None:
    rows = {s: frozenset([s]) for s in range(count)}
    for first, middle, end in tree(0, count):
        both = rows[first], rows.pop(middle)
        assert both == (frozenset(range(first, middle)), frozenset(range(middle, end)))
        rows[first] = both[0] | both[1]
    assert rows == {0: frozenset(range(count))}


def test_additions_are_those_of_the_tree() -> None:
    """8 shards: pairs, pairs of pairs, then both halves. float32 tells other orders."""
    x = (1 + np.arange(8) * 1e-7).astype("float32") * np.float32(1 / 3)
    rows = dict(enumerate(x))
    add(rows, list(tree(0, 8)))
    pairs = x[::2] + x[1::2]
    assert rows == {0: (pairs[0] + pairs[1]) + (pairs[2] + pairs[3])}


@given(count=st.integers(1, 40), size=st.integers(1, 9))
def test_a_stack_of_sums_is_the_tree(count: int, size: int) -> None:
    """Every rank adds a shard to the sums on top of its stack; what is left are its subtrees."""
    for rank in range(size):
        mine = share(rank, size, count)
        stack: list[Any] = []
        for s, level, added in schedule(mine, count):
            total: Any = s
            for left in reversed(stack[level : level + added]):
                total = left, total
            stack[level:] = [total]
            assert len(stack) <= 2 * math.log2(len(mine)) + 1
        rows: dict[int, Any] = {s: s for s in mine}
        for first, middle, _ in held(mine, count):
            rows[first] = rows[first], rows.pop(middle)
        assert stack == list(rows.values())
        assert roots(mine, count) == list(rows)


# --- a step ------------------------------------------------------------------------------------


def run_step(step: Any, args: Any) -> Any:
    return step


def sharded(task: Task, shards: int, rule: Any = None, traced: bool = False) -> Any:
    return partial(Sharded(task, rule or sgd(lr=0.1), shards, ALONE, run_step), traced=traced)


def state_of(model: Any, dtype: str) -> State:
    params = model.init(seed=0, dtype=dtype)
    make = getattr(model, "buffers", None)
    buffers = make(seed=0, dtype=dtype) if make else {}
    return State(params, buffers, sgd(lr=0.1).init(params))


@pytest.mark.parametrize("shards", [2, 3, 8])
def test_a_step_in_shards_is_that_of_the_batch(shards: int) -> None:
    """Without statistics of a batch, up to rounding: shares of unequal shards are weighted."""
    model = MLP(depth=3, width=8, inputs=5, outputs=3)
    task, state, rng = Task(model, 3), state_of(model, "float64"), np.random.default_rng(0)
    x, y = rng.standard_normal((13, 5)), rng.integers(0, 3, 13)
    args = x, y, 0.1, Random(0, "train")
    whole = make_step(task, sgd(lr=0.1))(state, *args)
    found = sharded(task, shards)(state, *args)
    assert abs(float(found.loss) - float(whole.loss)) < 1e-15
    assert int(found.correct) == int(whole.correct)
    for name, w in whole.state.params.items():
        assert np.max(np.abs(found.state.params[name] - w)) < 1e-15


def test_statistics_of_a_batch_are_a_shards_own() -> None:
    """The loss is the mean of the shards' losses, and the buffers are those of shard 0."""
    model = ResNet18(outputs=3, image_shape=(3, 8, 8), width=2)
    task, state, rng = Task(model, 3), state_of(model, "float64"), np.random.default_rng(0)
    x, y = rng.standard_normal((8, 3, 8, 8)), rng.integers(0, 3, 8)
    found = sharded(task, 2)(state, x, y, 0.1, Random(0, "train"))
    losses, buffers = [], []
    for part in (slice(0, 4), slice(4, 8)):
        loss, (_, made) = task.forward(
            state.params, state.buffers, x[part], y[part], Random(0, "train")
        )
        losses.append(float(loss))
        buffers.append(made)
    assert abs(float(found.loss) - np.mean(losses)) < 1e-15
    assert all(np.array_equal(found.state.buffers[n], b) for n, b in buffers[0].items())
    assert not all(np.array_equal(buffers[1][n], b) for n, b in buffers[0].items())


def test_random_numbers_are_a_shards_own() -> None:
    met: list[Any] = []

    class Noisy(Task):
        def forward(self, params: Any, buffers: Any, x: Any, y: Any, random: Any) -> Any:
            met.append(random.of("dropout").uniform(2).tolist())
            return super().forward(params, buffers, x, y, random)

    model = MLP(depth=1, width=8, inputs=5, outputs=3)
    x, y = np.ones((4, 5), "float32"), np.zeros(4, int)
    random = Random(3, "train", 7)
    sharded(Noisy(model, 3), 2)(state_of(model, "float32"), x, y, 0.1, random)
    assert met == [random.of(f"shards/{s}").of("dropout").uniform(2).tolist() for s in (0, 1)]
    assert met[0] != met[1]


def gan_state(optimizer: Any, dtype: str) -> tuple[State, Any, Any]:
    """A state of the smallest adversarial network, and a batch of five images."""
    params, buffers = GAN_MODEL.init(seed=0, dtype=dtype), GAN_MODEL.buffers(seed=0, dtype=dtype)
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((5, 3, 8, 8)).astype(dtype), rng.integers(0, 4, 5)
    return State(params, buffers, optimizer.init(params)), x, y


def test_one_shard_of_two_networks_is_their_step() -> None:
    """Parameters, state, losses and measurements, in their order: both turns start from the same
    step count and powers."""
    task, optimizer, random = Adversarial(GAN_MODEL, 4), adam(lr=0.01), Random(0, "train")
    state, x, y = gan_state(optimizer, "float32")
    whole_step, step = make_step(task, optimizer, traced=True), sharded(task, 1, optimizer, True)
    with quiet():  # some classes have no gradient
        whole = whole_step(state, x, y, 0.01, random.of("shards/0"))
        found = step(state, x, y, 0.01, random)
    expected, given = list(leaves(whole)), list(leaves(found))
    assert [path for path, _ in given] == [path for path, _ in expected]
    for (path, a), (_, b) in zip(given, expected, strict=True):
        assert np.array_equal(a, b, equal_nan=True), path


def test_each_update_of_two_networks_follows_a_sum_over_shards() -> None:
    """The generator's gradients are those against the new discriminator, in every shard."""
    task, rule, random = Adversarial(GAN_MODEL, 4), sgd(lr=0.1), Random(0, "train")
    state, x, y = gan_state(rule, "float64")
    found = sharded(task, 2)(state, x, y, 0.1, random)
    params, buffers = state.params, state.buffers
    for turn in task.turns:
        made = [turn.gradients(params, buffers, x[part], y[part], random.of(f"shards/{s}"))
                for s, part in enumerate((slice(0, 2), slice(2, 5)))]  # fmt: skip
        grads = [g for _, g in made]
        new = {n: params[n] - 0.1 * (0.4 * grads[0][n] + 0.6 * grads[1][n]) for n in grads[0]}
        params, buffers = params | new, made[0][0][1][1]
    for name, w in params.items():
        assert np.max(np.abs(found.state.params[name] - w)) < 1e-13, name
    assert list(found.others) == ["generator"]


# --- an evaluation -------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 3, 7])
def test_ranks_share_the_batches_of_an_evaluation(size: int) -> None:
    """Each batch is one rank's, and the sums have the bits of one process, also where a rank has
    no batch."""
    met: list[int] = []

    class Counted(Task):
        def predict(self, params: Any, buffers: Any, x: Any, y: Any) -> Any:
            met.append(len(x))
            return super().predict(params, buffers, x, y)

    class Rank(Alone):
        def __init__(self, rank: int, every: list[Any]):
            self.rank, self.size, self.every = rank, size, every
            self.own: list[Any] = []

        def mine(self, count: int) -> range:
            return share(self.rank, self.size, count)

        def joined(self, found: list[Any]) -> list[Any]:
            self.own = found
            return self.every

    model = MLP(depth=3, width=8, inputs=5, outputs=3)
    task, state, rng = Counted(model, 3), state_of(model, "float32"), np.random.default_rng(0)
    args = task, state, rng.standard_normal((53, 5)).astype("float32"), rng.integers(0, 3, 53), 9
    expected = [np.asarray(value).tobytes() for value in evaluate(*args)]
    assert met == [9, 9, 9, 9, 9, 8]
    met.clear()
    found: list[Any] = []
    for rank in range(size):
        one = Rank(rank, [])
        evaluate(*args, one)
        found += one.own
    assert met == [9, 9, 9, 9, 9, 8]
    for rank in range(size):
        both = evaluate(*args, Rank(rank, found))
        assert [np.asarray(value).tobytes() for value in both] == expected


# --- a run -------------------------------------------------------------------------------------

GAN_MODEL = GAN(outputs=4, width=4, image_shape=(3, 8, 8))
TINY: dict[str, Any] = {"model_options": {"depth": 4, "width": 16}, "epochs": 2, "batch_size": 50}


def contents(run: Path) -> tuple[Any, ...]:
    """What a run came to, without its times and the way it was started."""
    kept = store.load(run / "checkpoint.h5")
    lines = (run / "log.jsonl").read_text(encoding="utf-8").splitlines()
    log = [{k: v for k, v in json.loads(line).items() if k not in ("seconds", "config")}
           for line in lines]  # fmt: skip
    arrays = {**kept.params, **kept.buffers, **kept.state}
    return {name: (a.dtype, a.tobytes()) for name, a in arrays.items()}, log


def test_a_shard_does_not_see_the_buffers_of_another(tmp_path: Path) -> None:
    """A replayed program may write the new vectors of spectral normalisation over the old ones."""
    options = {"depth": 3, "width": 8, "normalisation": "spectral"}
    for eager in (False, True):
        train(Config(shards=3, eager=eager, model_options=options, epochs=1, batch_size=300),
              tmp_path / str(eager))  # fmt: skip
    assert contents(tmp_path / "False") == contents(tmp_path / "True")


def test_replayed_eager_and_resumed_runs_have_the_same_bits(tmp_path: Path) -> None:
    """The last batch of the 1,437 digits has 37 examples: 7 shards of two sizes."""
    for name, eager in (("replayed", False), ("eager", True)):
        train(Config(shards=7, eager=eager, **TINY), tmp_path / name)
    count = iter(range(1000))
    train(Config(shards=7, **TINY), tmp_path / "part", stop=lambda: 2 * (next(count) == 30))
    resume(tmp_path / "part")
    expected = contents(tmp_path / "replayed")
    assert contents(tmp_path / "eager") == contents(tmp_path / "part") == expected
    train(Config(**TINY), tmp_path / "whole")
    assert contents(tmp_path / "whole") != expected


def test_one_shard_has_the_name_of_a_run_before_shards() -> None:
    digits = load("digits")
    names = [sweep._hash(Config(shards=s), digits) for s in (1, 2)]
    assert names[0] == sweep._hash(Config(), digits) != names[1]


def test_shards_that_cannot_be_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Error, match="shards are computed by one BLAS thread each"):
        Config(shards=2, threads=2)
    with pytest.raises(Error, match="33 shards need as many examples; batch_size is 32"):
        Config(shards=33)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (9, 3, 8, 8)).astype("uint8")
    np.savez(tmp_path / "images.npz", x=images, y=np.arange(9) % 3)
    with pytest.raises(Error, match="a shard of the batch of 9 examples has 1 of them; use fewer"):
        train(
            Config(model="resnet18", model_options={"width": 2}, data=str(tmp_path / "images.npz"),
                   shards=5, batch_size=9, epochs=1), tmp_path / "run")  # fmt: skip
    assert not (tmp_path / "run").exists()


# --- ranks -------------------------------------------------------------------------------------

MPIEXEC = next(filter(None, map(shutil.which, ("mpiexec.hydra", "mpiexec"))), None)
COMMAND = [sys.executable, "-m", "npdrt", "train", "--depth", "4", "--width", "16",
           "--batch-size", "50", "--shards", "4"]  # fmt: skip


@pytest.fixture
def mpiexec() -> list[str]:
    """The command that starts ranks; skipped without mpi4py."""
    pytest.importorskip("mpi4py")
    if MPIEXEC is None:
        pytest.skip("no mpiexec")
    return [MPIEXEC, "-n"]


def environment() -> dict[str, str]:
    return os.environ | {"OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}


def started(words: list[str], folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        words, cwd=folder, env=environment(), text=True, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def output(process: subprocess.Popen[str]) -> str:
    try:
        return process.communicate(timeout=120)[0]
    finally:
        process.kill()


def test_ranks_have_the_bits_of_one_process(mpiexec: list[str], tmp_path: Path) -> None:
    """Aligned and unaligned, and stopped on 3 ranks to go on with 2."""
    alone = [*COMMAND, "--epochs", "2", "--out"]
    one = output(started([*alone, "1"], tmp_path))
    text = output(started([*mpiexec, "4", *alone, "4", "--device", "auto"], tmp_path))
    assert results(text) == results(one) != []
    assert text.count("done:") == text.count("device: cpu") == 1, text
    assert "done" in output(started([*mpiexec, "3", *COMMAND, "--epochs", "1", "--out", "part",
                                     "--schedule", "constant"], tmp_path))  # fmt: skip
    resumed = [*COMMAND, "--epochs", "2", "--resume", "--out", "part"]
    assert "done" in output(started([*mpiexec, "2", *resumed], tmp_path))
    assert contents(tmp_path / "1") == contents(tmp_path / "4")
    again = [*alone, "constant", "--schedule", "constant"]
    assert "done" in output(started(again, tmp_path))
    arrays, _ = contents(tmp_path / "part")
    assert arrays == contents(tmp_path / "constant")[0]


@pytest.mark.soak
def test_ranks_with_different_kernels(mpiexec: list[str], tmp_path: Path) -> None:
    """They are refused, but in portable arithmetic they have the bits of one process."""

    def mixed(words: list[str]) -> list[str]:
        first, second = (["env", f"OPENBLAS_CORETYPE={k}", *words] for k in ("Prescott", "Haswell"))
        return [*mpiexec, "1", *first, ":", "-n", "1", *second]

    short = [*COMMAND, "--epochs", "1", "--out"]
    assert "rank 1 has another BLAS than rank 0" in output(started(mixed([*short, "0"]), tmp_path))
    portable = ["--arithmetic", "portable"]
    one = output(started([*short, "1", *portable], tmp_path))
    assert results(output(started(mixed([*short, "2", *portable]), tmp_path))) == results(one) != []
    assert contents(tmp_path / "1")[0] == contents(tmp_path / "2")[0]


def test_two_networks_have_the_same_bits_on_ranks(mpiexec: list[str], tmp_path: Path) -> None:
    """Replayed, eagerly and on two ranks; spectral vectors are buffers that every shard reads."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (16, 3, 8, 8)).astype("uint8")
    np.savez(tmp_path / "images.npz", x=images, y=np.arange(16) % 3)
    settings: dict[str, Any] = {"shards": 3, "batch_size": 8, "optimizer": "adam", "epochs": 2,
                                "trace_every": 1, "data": str(tmp_path / "images.npz")}  # fmt: skip
    for name, eager in (("replayed", False), ("eager", True)):
        config = Config(model="gan", model_options={"width": 4}, eager=eager, **settings)
        train(config, tmp_path / name)
    words = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    gan = [*COMMAND[:4], "--model", "gan", "--set", "width=4", "--device", "cpu", *words]
    assert "done" in output(started([*mpiexec, "2", *gan, "--out", "ranks"], tmp_path))
    expected = contents(tmp_path / "replayed")
    assert contents(tmp_path / "eager") == contents(tmp_path / "ranks") == expected


def results(text: str) -> list[str]:
    """The lines of both sets' losses; that of the training set has two batches."""
    return [line for line in text.splitlines() if line.startswith(("train ", "test "))]


def test_more_ranks_than_shards_are_refused_once(mpiexec: list[str], tmp_path: Path) -> None:
    process = started([*mpiexec, "2", *COMMAND[:-2], "--out", "run"], tmp_path)
    text = output(process)
    assert text.count("2 ranks need as many shards of a batch; give --shards 2 or more") == 1
    assert process.returncode
    assert not (tmp_path / "run").exists()


def ranks_of(folder: Path) -> list[int]:
    """The processes that train in a folder."""
    found = []
    for place in Path("/proc").iterdir():
        try:
            words = (place / "cmdline").read_bytes().split(b"\0")
            trains = b"train" in words and b"-n" not in words
            if trains and (place / "cwd").readlink() == folder:
                found.append(int(place.name))
        except OSError:
            continue
    return found


@pytest.mark.parametrize(
    "number",
    [signal.SIGKILL, signal.SIGSTOP, signal.SIGINT,
     pytest.param(signal.SIGTERM, marks=pytest.mark.soak)],
)  # fmt: skip
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="processes are found in /proc")
def test_one_end_for_all_ranks(number: int, mpiexec: list[str], tmp_path: Path) -> None:
    """A rank that dies, stops or is asked to end, or Ctrl-C: all end, and the run goes on from its
    files."""
    words = [*COMMAND, "--epochs", "2000", "--checkpoint-every", "10", "--out", "run"]
    process = started([*mpiexec, "2", *words], tmp_path)
    while not (tmp_path / "run" / "checkpoint.prev.h5").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    os.kill(process.pid if number == signal.SIGINT else max(ranks_of(tmp_path)), number)
    text = output(process)
    assert process.returncode
    while ranks_of(tmp_path):  # they are being killed
        time.sleep(0.05)
    if number == signal.SIGSTOP:
        assert "gives no sign of life" in text
    if number in (signal.SIGINT, signal.SIGTERM):
        assert text.count("saved in run") == 1
        assert text.count("stopping after this step") == (number == signal.SIGINT)
        assert process.returncode == 128 + number
    found = store.load_newest(tmp_path / "run")[0]
    steps = int(found.meta["progress"]["step"])
    going = iter(range(10))
    assert resume(tmp_path / "run", stop=lambda: 2 * (next(going) == 1)).step == steps + 2


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="processes are found in /proc")
def test_a_rank_that_is_stopped_before_it_has_met_the_others(
    mpiexec: list[str], tmp_path: Path
) -> None:
    process = started([*mpiexec, "3", *COMMAND, "--epochs", "2000", "--out", "run"], tmp_path)
    while len(ranks_of(tmp_path)) < 3:
        assert process.poll() is None, process.communicate()
    os.kill(max(ranks_of(tmp_path)), signal.SIGSTOP)
    text = output(process)
    assert process.returncode
    assert text.count("was stopped or has ended, while the ranks were coming together") == 1, text


MODEL = """
import os
from dataclasses import dataclass
from npdrt.models import MLP

@dataclass(frozen=True)
class Mine(MLP):
    def __call__(self, params, x):
        if "1" in (os.environ.get("PMI_RANK"), os.environ.get("OMPI_COMM_WORLD_RANK")):
            raise {error}
        return super().__call__(params, x)
"""
FAILURES = {  # exit code and message
    "MemoryError('planted')": (4, "Error: rank 1: not enough memory: planted"),
    "OSError(28, 'No space left', 'there')": (5, "Error: rank 1: there: No space left"),
    "ValueError('planted')": (2, "Error: rank 1: --model mine.py:Mine failed: ValueError: planted"),
}


@pytest.mark.parametrize(
    "error", [next(iter(FAILURES)), *(pytest.param(e, marks=pytest.mark.soak) for e in FAILURES)]
)
def test_an_error_of_one_rank_is_told_once(error: str, mpiexec: list[str], tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(MODEL.format(error=error), encoding="utf-8")
    words = [*COMMAND, "--model", "mine.py:Mine", "--eager", "--out", "run"]
    process = started([*mpiexec, "2", *words], tmp_path)
    text = output(process)
    code, message = FAILURES[error]
    assert text.count(message) == text.count("Error: rank") == 1, text
    assert process.returncode == code


def test_a_run_that_diverges_on_ranks(mpiexec: list[str], tmp_path: Path) -> None:
    """Rank 0 repeats it alone from the last checkpoint, all four shards, and names the value."""
    words = [*COMMAND, "--optimizer", "sgd", "--lr", "1e4", "--epochs", "9"]
    texts = []
    for launcher, out in (([], "1"), ([*mpiexec, "2"], "2")):
        process = started([*launcher, *words, "--out", out], tmp_path)
        texts.append(output(process))
        assert process.returncode == 1, texts
    one, two = (text[text.index("step ", text.index("Error: ")) :] for text in texts)
    assert one.partition(".")[0] == two.partition(".")[0]


def test_a_launcher_of_another_mpi(tmp_path: Path) -> None:
    pytest.importorskip("mpi4py")
    with_size = environment() | {"OMPI_COMM_WORLD_SIZE": "2"}
    done = subprocess.run([*COMMAND, "--out", "run"], cwd=tmp_path, env=with_size, text=True,
                          capture_output=True, check=False)  # fmt: skip
    assert done.returncode == 4
    assert "mpiexec started 2 ranks, and mpi4py's library" in done.stderr


def test_other_shards_are_refused_on_resume(tmp_path: Path) -> None:
    train(Config(shards=4, **TINY), tmp_path / "run", stop=lambda: 2)
    process = started([*COMMAND[:-1], "2", "--resume", "--out", "run"], tmp_path)
    text = output(process)
    assert process.returncode == 2
    assert "run was started with --shards 4, not --shards 2; leave the option out" in text
