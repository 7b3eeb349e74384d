"""Training: a run that was stopped, killed or damaged ends with the bits of one that never was."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import math
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import backends
import h5py
import numpy as np
import pytest
from click.testing import CliRunner, Result

import npdrt
from npdrt import data, optim, store
from npdrt.arrays import quiet
from npdrt.cli import cli
from npdrt.data import Dataset
from npdrt.errors import Diverged, Error, FileRefused, Unavailable
from npdrt.models import MLP
from npdrt.random import Random
from npdrt.store import log, trace
from npdrt.train import Config, Reporter, Summary, resume, train
from npdrt.train.config import learning_rate, resolve
from npdrt.train.diagnose import first_nonfinite
from npdrt.train.feed import Feed
from npdrt.train.loop import Trainer
from npdrt.train.step import State, Task, make_step

ROOT = Path(__file__).parents[1]
SAMPLES, BATCH, EPOCHS = 53, 8, 3
EPOCH = 7  # steps, the last on 5 samples
STEPS = EPOCHS * EPOCH
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"lr": 0.05},
    "sgd, momentum": {"lr": 0.05, "optimizer_options": {"momentum": 0.9, "weight_decay": 0.01}},
    "adam": {"lr": 0.01, "optimizer_options": {"betas": (0.8, 0.99), "weight_decay": 0.1}},
    "lars": {"lr": 1.0},
    "lars_lesion": {},
    "fromage": {},
    "fromage, bounded": {"optimizer_options": {"norm_bound": 1.0}},
}
SCHEDULES = [
    "constant",
    "exponential:0.9",
    "milestones:1,2:0.5",
    "linear",
    "linear:0.001",
    "plateau:0.5:0",
]


@pytest.fixture(autouse=True)
def cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare each of the many runs its two calls of git and its waits for the disk."""
    monkeypatch.setattr("npdrt.train.provenance.git_state", lambda: None)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(autouse=True)
def no_process_outlives_its_test() -> Iterator[None]:
    yield
    while PROCESSES:
        process = PROCESSES.pop()
        process.kill()
        process.wait()


def write_blobs(path: Path, **changes: Any) -> Path:
    """A data set of three noisy groups of points in six dimensions."""
    rng = np.random.default_rng(5)
    y, y_test = rng.integers(0, 3, SAMPLES), rng.integers(0, 3, 20)
    centres = rng.normal(size=(3, 6))
    arrays = {
        "x": centres[y] + rng.normal(size=(SAMPLES, 6)),
        "y": y,
        "x_test": centres[y_test] + rng.normal(size=(20, 6)),
        "y_test": y_test,
    }
    np.savez(path, **{k: v for k, v in {**arrays, **changes}.items() if v is not None})
    return path


@pytest.fixture(scope="module")
def blobs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_blobs(tmp_path_factory.mktemp("data") / "blobs.npz")


def settings(blobs: Path, **changes: Any) -> Config:
    """A short run with everything that can be logged or traced."""
    config: dict[str, Any] = {
        "data": str(blobs),
        "model_options": {"depth": 3, "width": 5},
        "epochs": EPOCHS,
        "batch_size": BATCH,
        "log_every": 2,
        "trace_every": 4,
        "checkpoint_every": 5,
        "conditioning": True,
    }
    return Config(**{**config, **changes})


def stop_after(steps: int, number: int = signal.SIGINT) -> Callable[[], int]:
    """A `stop` that names the signal `number` after that many steps."""
    left = iter(range(steps - 1, -1, -1))
    return lambda: number if next(left) == 0 else 0


def contents(run: Path) -> dict[str, Any]:
    """Everything a run directory holds that must not depend on how often the run was stopped."""
    checkpoint = store.load(run / "checkpoint.h5")
    tables, about = trace.read(run / "trace.h5")
    meta = {name: value for name, value in checkpoint.meta.items() if name != "provenance"}
    records = log.read(run / "log.jsonl")
    return {
        "params": fingerprints(checkpoint.params),
        "buffers": fingerprints(checkpoint.buffers),
        "state": fingerprints(checkpoint.state),
        "meta": meta,
        "log": [{k: v for k, v in r.items() if k != "seconds"} for r in records],
        "trace": fingerprints(tables),
        "about": about,
    }


def fingerprints(arrays: dict[str, Any]) -> list[tuple[Any, ...]]:
    return [(name, a.dtype.str, a.shape, a.tobytes()) for name, a in arrays.items()]


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for part, value in expected.items():
        assert found[part] == value, part


def results(summary: Summary) -> tuple[Any, ...]:
    return (summary.step, summary.train_loss, summary.train_accuracy, summary.test_loss)


def names(run: Path) -> set[str]:
    return {path.name for path in run.iterdir()}


PROCESSES: list[subprocess.Popen[str]] = []
RUN_FILES = {"checkpoint.h5", "checkpoint.prev.h5", "trace.h5", "log.jsonl"}


def npdrt_cli(*words: Any) -> Result:
    return CliRunner().invoke(cli, [str(word) for word in words], prog_name="npdrt")


# --- stopping and resuming ------------------------------------------------------------------


CONFIGURATIONS = [
    *((rule, "float32", schedule) for rule in OPTIMIZERS for schedule in SCHEDULES),
    *((rule, "float64", SCHEDULES[k % len(SCHEDULES)]) for k, rule in enumerate(OPTIMIZERS)),
]


@pytest.mark.parametrize(("rule", "dtype", "schedule"), CONFIGURATIONS)
def test_resumption_is_exact(
    rule: str, dtype: str, schedule: str, blobs: Path, tmp_path: Path
) -> None:
    """Every rule with every schedule, and in both precisions, stopped twice at steps drawn for
    the case."""
    config = settings(
        blobs,
        optimizer=rule.partition(",")[0],
        dtype=dtype,
        schedule=schedule,
        **OPTIMIZERS[rule],
    )
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    expected = train(config, whole)
    first = random.Random(f"{rule} {dtype} {schedule}").randrange(1, STEPS - 2)
    second = random.Random(f"{schedule} {rule}").randrange(1, STEPS - first)
    stopped = train(config, parts, stop=stop_after(first))
    assert (stopped.step, stopped.stopped, stopped.train_loss) == (first, signal.SIGINT, None)
    assert resume(parts, stop=stop_after(second)).step == first + second
    found = resume(parts)
    assert_same(contents(parts), contents(whole))
    assert results(found) == results(expected)
    assert names(parts) == names(whole) == RUN_FILES


@pytest.mark.parametrize("every", [0, 1, None])
def test_stopped_at_every_step(every: int | None, blobs: Path, tmp_path: Path) -> None:
    """21 processes, one step each: mid-epoch, at the end of an epoch, at the last step."""
    config = settings(
        blobs, optimizer="adam", schedule="plateau:0.5:0", lr=9.0, checkpoint_every=every
    )
    train(config, tmp_path / "whole")
    train(config, tmp_path / "parts", stop=stop_after(1))
    steps = [resume(tmp_path / "parts", stop=stop_after(1)).step for _ in range(STEPS - 1)]
    assert steps == list(range(2, STEPS + 1))
    assert_same(contents(tmp_path / "parts"), contents(tmp_path / "whole"))
    memory = contents(tmp_path / "whole")["meta"]["progress"]["schedule_memory"]
    assert memory["reductions"] >= 1  # else the schedule's memory was not tried


def test_a_finished_run_resumes_to_itself(blobs: Path, tmp_path: Path) -> None:
    expected = train(settings(blobs), tmp_path / "run")
    before = contents(tmp_path / "run")
    assert results(resume(tmp_path / "run")) == results(expected)
    assert_same(contents(tmp_path / "run"), before)


def test_data_order_is_that_of_the_seed(
    blobs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The samples met, in their order, across two interruptions: a permutation an epoch."""
    met: list[int] = []
    take = Feed.batch

    def watched(self: Feed, step: int) -> Any:
        met.extend(self.sampler.batch(step).tolist())
        return take(self, step)

    monkeypatch.setattr(Feed, "batch", watched)
    train(settings(blobs, seed=4), tmp_path / "run", stop=stop_after(3))
    resume(tmp_path / "run", stop=stop_after(9))
    resume(tmp_path / "run")
    order = [Random(4, "data/order", epoch).permutation(SAMPLES) for epoch in range(EPOCHS)]
    assert met == np.concatenate(order).tolist()


NOISY = '''
from dataclasses import dataclass
from typing import Any
import numpy as np
from npdrt import ops
from npdrt.random import Random

SEEN = []

@dataclass(frozen=True)
class Noisy:
    """A linear model behind dropout, with a running mean of its inputs in a buffer."""
    inputs: int
    outputs: int
    keep: float = 0.5
    phi: Any = ops.tanh
    sizes: tuple = (1, 2)

    def init(self, seed, device, dtype):
        w = Random(seed, "init").normal((self.outputs, self.inputs))
        return {"weight": w.astype(dtype), "bias": np.zeros(self.outputs, dtype)}

    def __call__(self, params, x):
        return self.phi(ops.linear(x, params["weight"], params["bias"]))

    def apply(self, params, buffers, x, *, train, random):
        SEEN.append(random)
        mean = buffers.get("mean", np.zeros(self.inputs)) * 0.9 + 0.1 * x.mean(axis=0)
        mask = random.of("dropout").bernoulli(x.shape, self.keep)
        return self(params, x * mask.astype(x.dtype)), {"mean": mean}
'''


def test_masks_and_buffers_resume(blobs: Path, tmp_path: Path) -> None:
    """A user's model: random masks are keyed by the step, buffers are in the checkpoint, and
    defaults that are not JSON (a function, a tuple) stay with the file."""
    (tmp_path / "noisy.py").write_text(NOISY)
    options = {"keep": 0.75}
    config = settings(blobs, model=f"{tmp_path}/noisy.py:Noisy", model_options=options)
    keys = [Random(0, "train", step) for step in range(STEPS)]
    train(config, tmp_path / "whole")

    def seen() -> list[Any]:
        """The streams of the steps that ran, without those of recordings that were tried."""
        asked = sys.modules["npdrt_user_model_noisy"].SEEN
        return list(dict.fromkeys(random for random in asked if isinstance(random, Random)))

    assert seen() == keys
    train(config, tmp_path / "parts", stop=stop_after(4))
    with pytest.raises(Error, match=r"if you trust that file, repeat it: --code .*/noisy\.py$"):
        resume(tmp_path / "parts")
    code = [tmp_path / "noisy.py"]
    resume(tmp_path / "parts", stop=stop_after(4), code=code)
    resume(tmp_path / "parts", code=code)
    assert seen() == keys[8:]
    found = contents(tmp_path / "parts")
    assert_same(found, contents(tmp_path / "whole"))
    assert [name for name, *_ in found["buffers"]] == ["mean"]
    assert found["meta"]["config"]["model_options"] == {"inputs": 6, "outputs": 3, "keep": 0.75}


class Collector(Reporter):
    """Keeps the warnings."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warning(self, text: str) -> None:
        self.warnings.append(text)


def test_a_model_that_reads_more_than_its_arguments(blobs: Path, tmp_path: Path) -> None:
    """It cannot be a program: a counter would stand still in a replay. One warning, same bits."""
    counting = "SEEN.append(0); x = x * (1.0 + 0.001 * len(SEEN))"
    (tmp_path / "noisy.py").write_text(
        NOISY.replace("return self.phi(", f"{counting}\n        return self.phi(").replace(
            "def apply", "def unused"
        )
    )
    reporter = Collector()
    config = settings(blobs, model=f"{tmp_path}/noisy.py:Noisy", model_options={})
    train(config, tmp_path / "run", reporter=reporter)
    assert len(reporter.warnings) == 1
    assert "noisy.py:Noisy cannot be recorded, so it runs eagerly" in reporter.warnings[0]
    assert "recorded again, it makes other calls" in reporter.warnings[0]


def test_a_model_with_functions_of_numpy_runs_eagerly(blobs: Path, tmp_path: Path) -> None:
    (tmp_path / "noisy.py").write_text(NOISY)
    reporter = Collector()
    config = settings(blobs, model=f"{tmp_path}/noisy.py:Noisy", model_options={})
    found = train(config, tmp_path / "run", reporter=reporter)
    assert re.search(r"cannot be recorded.*noisy.py:\d+: ", reporter.warnings[0])
    eager = train(dataclasses.replace(config, eager=True), tmp_path / "eager")
    assert results(found) == results(eager)


def test_compiled_loops_need_the_extra_before_anything_is_made(
    blobs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> None:
        raise Unavailable("compiled loops need numba")

    monkeypatch.setattr("npdrt.train.loop.require_compiler", missing)
    with pytest.raises(Unavailable, match="need numba"):
        train(settings(blobs, fast=True), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_eager_and_fast_exclude_each_other(blobs: Path) -> None:
    with pytest.raises(Error, match="eager and fast exclude each other"):
        settings(blobs, fast=True, eager=True)


@pytest.mark.parametrize("first", [{}, {"eager": True}, {"fast": True}])
@pytest.mark.parametrize("then", [{"eager": True}, {"fast": True}, {"eager": False}, {}])
def test_another_way_to_run_keeps_the_bits(
    blobs: Path, tmp_path: Path, first: dict[str, bool], then: dict[str, bool]
) -> None:
    if "fast" in {**first, **then}:
        pytest.importorskip("numba")
    train(settings(blobs), tmp_path / "whole")
    train(settings(blobs, **first), tmp_path / "parts", stop=stop_after(4))
    resume(tmp_path / "parts", **then)
    whole, parts = contents(tmp_path / "whole"), contents(tmp_path / "parts")
    assert [whole[g] for g in ("params", "state")] == [parts[g] for g in ("params", "state")]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("import numpy as np; return np.nope(x)", r"AttributeError: .*mine.py, line \d+"),
        ("return params['gone']", r"KeyError: 'gone' .*mine.py, line \d+"),
    ],
)
def test_failing_user_model(blobs: Path, tmp_path: Path, body: str, message: str) -> None:
    """One line that names file and line."""
    file = tmp_path / "mine.py"
    file.write_text(NOISY.replace("return self.phi(", f"{body}\n        return self.phi("))
    with pytest.raises(Error, match=message):
        train(settings(blobs, model=f"{file}:Noisy", model_options={}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_more_epochs(blobs: Path, tmp_path: Path) -> None:
    """A finished run made longer has the bits of one that was that long from the start."""
    longer = settings(blobs, schedule="exponential:0.9", epochs=5)
    train(longer, tmp_path / "whole")
    train(settings(blobs, schedule="exponential:0.9"), tmp_path / "parts")
    resume(tmp_path / "parts", epochs=5)
    found, expected = contents(tmp_path / "parts"), contents(tmp_path / "whole")
    assert found["log"][0].pop("config") != expected["log"][0].pop("config")  # as it was started
    for side in (found, expected):
        del side["meta"]["progress"]["log"]["sha256"]  # of those records
    assert_same(found, expected)


def test_epochs_that_cannot_be(blobs: Path, tmp_path: Path) -> None:
    train(settings(blobs, schedule="linear"), tmp_path / "line")
    with pytest.raises(Error, match="a linear schedule falls over the run's 3 epochs"):
        resume(tmp_path / "line", epochs=4)
    resume(tmp_path / "line", epochs=3)
    train(settings(blobs, schedule="constant"), tmp_path / "flat")
    before = contents(tmp_path / "flat")
    with pytest.raises(Error, match="is at step 21, beyond 2 epochs of 7 steps"):
        resume(tmp_path / "flat", epochs=2)
    assert_same(contents(tmp_path / "flat"), before)


def test_damaged_tail_of_the_log(blobs: Path, tmp_path: Path) -> None:
    """What a power cut leaves behind the last sync is dropped; damage before it is refused."""
    config = settings(blobs)
    train(config, tmp_path / "whole")
    train(config, tmp_path / "parts", stop=stop_after(10))
    journal = tmp_path / "parts" / "log.jsonl"
    sound = journal.read_bytes()
    journal.write_bytes(sound + b'\0\0\0\xff\n{"event": "step", "step": 11}\n{"event": "st')
    resume(tmp_path / "parts")
    assert_same(contents(tmp_path / "parts"), contents(tmp_path / "whole"))
    for damaged in (sound.replace(b"\n", b"\n\xff\n", 1), sound.replace(b"\n", b"\n[1]\n", 1)):
        journal.write_bytes(damaged)
        with pytest.raises(FileRefused, match=r"log.jsonl: does not begin with the 23 records"):
            resume(tmp_path / "parts")
        assert journal.read_bytes() == damaged
    journal.unlink()
    with pytest.raises(FileRefused, match=r"log.jsonl does not exist"):
        resume(tmp_path / "parts")


# --- killing and signalling real processes --------------------------------------------------


def environment(**changes: str) -> dict[str, str]:
    """The environment of child processes: one thread, no git, this source."""
    own = {"PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1", "GIT_DIR": os.devnull}
    return {**os.environ, **own, **changes}


def start(*words: Any, cwd: Path, **changes: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "npdrt", *map(str, words)]
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        command, cwd=cwd, env=environment(**changes), stdout=pipe, stderr=pipe, text=True
    )
    PROCESSES.append(process)
    return process


def finish(process: subprocess.Popen[str]) -> int:
    """The exit code of a process that is expected to end by itself."""
    _, errors = process.communicate(timeout=120)
    assert "Traceback" not in errors, errors
    return process.returncode


KILLED = shlex.split(
    "train --data blobs.npz --depth 3 --width 8 --epochs 6 --batch-size 8 --optimizer adam "
    "--lr 0.1 --schedule plateau:0.5:0 --checkpoint-every 1 --log-every 2 --trace-every 3 -q"
)


def uninterrupted(folder: Path) -> tuple[dict[str, Any], float]:
    """What the run to be killed comes to, and how long its process lives."""
    begun = time.perf_counter()
    assert finish(start(*KILLED, "--out", "whole", cwd=folder)) == 0
    return contents(folder / "whole"), time.perf_counter() - begun


def check_after_kill(run: Path) -> None:
    """A kill leaves the newest checkpoint whole, or none if the first was not yet written."""
    if (run / "checkpoint.h5").exists() or (run / "checkpoint.prev.h5").exists():
        assert store.load_newest(run)[2] == ""


def survives(process: subprocess.Popen[str], seconds: float) -> bool:
    """Whether a process ends before it is killed after so many seconds."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
    return finish(process) == 0


def kill_and_resume(folder: Path, seed: int, expected: dict[str, Any], life: float) -> int:
    """Kill a run at a random moment of its life, perhaps its resumptions too; resume to the end.
    Returns how many processes were killed alive."""
    draw, kills = random.Random(seed), 0
    run = folder / f"run-{seed}"
    while True:
        process = start(*KILLED, "--out", run.name, "--resume-or-start", cwd=folder)
        to_kill = kills == 0 or draw.random() < 0.3
        if survives(process, draw.random() * life if to_kill else 120):
            break
        assert process.returncode == -signal.SIGKILL
        kills += 1
        check_after_kill(run)
    assert_same(contents(run), expected)
    assert names(run) == RUN_FILES
    return kills


def kill_many(folder: Path, kills: int) -> None:
    """Kill so many processes alive. One that ends before its moment, because the run that was
    timed met a busier machine, does not count, and another takes its place."""
    write_blobs(folder / "blobs.npz")
    expected, life = uninterrupted(folder)
    for _ in range(10 * kills):
        seed = random.SystemRandom().randrange(1 << 32)
        try:
            kills -= kill_and_resume(folder, seed, expected, life)
        except BaseException:
            print(f"failed with seed {seed}, a life of {life:.3f} s")
            raise
        if kills <= 0:
            return
    pytest.fail(f"{kills} kills are missing: nearly every process ended before its moment")


def test_kill_9(tmp_path: Path) -> None:
    kill_many(tmp_path, 5)


@pytest.mark.soak
def test_kill_9_a_hundred_times(tmp_path: Path) -> None:
    kill_many(tmp_path, 100)


KILL_EVERYWHERE = """
import contextlib, json, os, shutil, signal, sys
from pathlib import Path
import npdrt.cli.train
import npdrt.store.hdf5  # once, not in every child
from npdrt.cli import cli

# One process forks a child for each n: the child dies before the n-th change of a file or folder.
words = json.loads(sys.argv[1])
changes = {"os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir", "fcntl.flock"}
countdown = -1

def hook(event, args):
    global countdown
    opening = event == "open" and args[2] is not None and args[2] & (os.O_WRONLY | os.O_RDWR)
    if countdown >= 0 and (event in changes or opening):
        countdown -= 1
        if countdown < 0:
            os.kill(os.getpid(), signal.SIGKILL)

def child(out, n):
    global countdown
    pid = os.fork()
    if pid == 0:
        countdown = n
        with contextlib.suppress(SystemExit):
            cli([*words, "--out", out, "--resume-or-start"])
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def kill_everywhere(begin, most=1000):
    n, left = 0, []
    while n < most:
        out = f"{begin}-{n}"
        if begin != "fresh":
            shutil.copytree(begin, out)
        killed = child(out, n)
        left.append(sorted(os.listdir(out)) if os.path.isdir(out) else [])
        if killed == 0:
            return left
        shutil.copytree(out, f"left-{out}") if left[-1] else None
        assert child(out, -1) == 0, out
        n += 1
    return left

os.fsync = lambda descriptor: None  # a kill leaves the page cache as it is
sys.addaudithook(hook)
sys.stdout = open(os.devnull, "w")
left = kill_everywhere("fresh")
born = next(n for n, names in enumerate(left) if "checkpoint.h5" in names)
os.rename(f"left-fresh-{born - 1}", "unborn")
os.rename(f"left-fresh-{(born + len(left)) // 2}", "half")
counts = {begin: len(kill_everywhere(begin, 8)) for begin in ("unborn", "half")}
sys.stderr.write("\\n" + json.dumps({"fresh": len(left), **counts}))
"""


def test_killed_before_every_change_of_a_file(tmp_path: Path) -> None:
    """One kill before each file operation of a whole run; before the first 8 of one that finds
    what a run killed before its first checkpoint left, and of a resumption: each resumes."""
    write_blobs(tmp_path / "blobs.npz")
    words = [*KILLED, "--epochs", "1", "--checkpoint-every", "4"]
    assert finish(start(*words, "--out", "whole", cwd=tmp_path)) == 0
    done = subprocess.run(
        [sys.executable, "-c", KILL_EVERYWHERE, json.dumps(words)],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    expected = contents(tmp_path / "whole")
    for begin, count in json.loads(done.stderr.splitlines()[-1]).items():  # after the warnings
        runs = sorted(tmp_path.glob(f"{begin}-*"))
        assert len(runs) == count >= 8
        for run in runs:
            assert_same(contents(run), expected)
            assert names(run) == RUN_FILES, run


SLOW = '''
import os, time
from dataclasses import dataclass
from npdrt.models import MLP

@dataclass(frozen=True)
class Slow(MLP):
    """The perceptron, waiting in each call for as long as the environment says."""

    def __call__(self, params, x):
        time.sleep(float(os.environ.get("SLOW", "0")))
        return super().__call__(params, x)
'''
WORDS = shlex.split(
    "train --model slow.py:Slow --depth 2 --width 5 --data blobs.npz --epochs 3 --batch-size 8 "
    "--log-every 1 --checkpoint-every 0 -q --out"
)


@pytest.fixture
def slow(tmp_path: Path) -> Path:
    """A folder with data, a model that can be slowed down, and a whole run."""
    write_blobs(tmp_path / "blobs.npz")
    (tmp_path / "slow.py").write_text(SLOW)
    return tmp_path


def wait_for_step(process: subprocess.Popen[str], run: Path, step: int) -> None:
    path = run / "log.jsonl"
    while not (path.exists() and any(r["step"] >= step for r in log.read(path))):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)],
    ids=["SIGINT", "SIGTERM", "SIGHUP"],
)
def test_signal_saves_and_stops(number: int, code: int, slow: Path) -> None:
    process = start(*WORDS, "run", cwd=slow, SLOW="0.05")
    wait_for_step(process, slow / "run", 3)
    process.send_signal(number)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    assert "stopping after this step; once more stops at once" in errors
    assert "next: npdrt train --out run --resume --code slow.py\n" in out
    checkpoint = store.load(slow / "run" / "checkpoint.h5")
    assert 3 <= checkpoint.meta["progress"]["step"] < STEPS
    assert f"stopped by signal {int(number)} at step {checkpoint.meta['progress']['step']}" in out
    again = ("train", "--out", "run", "--resume", "--code", "slow.py")
    assert finish(start(*again, cwd=slow)) == 0
    assert finish(start(*WORDS, "whole", cwd=slow)) == 0
    assert_same(contents(slow / "run"), contents(slow / "whole"))


def test_second_signal_ends_at_once(slow: Path) -> None:
    """The step in which both signals arrive would last for two minutes."""
    process = start(*WORDS, "run", cwd=slow, SLOW="120")
    while not (slow / "run" / "checkpoint.h5").exists():  # before it there is nothing to resume
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.stderr is not None
    while "stopping after this step" not in process.stderr.readline():
        pass
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 143
    process.stderr.close()
    assert process.stdout is not None
    process.stdout.close()
    assert store.load(slow / "run" / "checkpoint.h5").meta["progress"]["step"] == 0


def test_signal_with_stderr_gone(slow: Path) -> None:
    """Ctrl-C ends every process of a pipe; the run is saved although nobody reads its notice."""
    process = start(*WORDS, "run", cwd=slow, SLOW="0.05")
    assert process.stderr is not None
    process.stderr.close()
    wait_for_step(process, slow / "run", 2)
    process.send_signal(signal.SIGINT)
    assert process.stdout is not None
    with process.stdout:
        assert "next: npdrt train --out run --resume" in process.stdout.read()
    assert process.wait(timeout=60) == 130
    assert store.load(slow / "run" / "checkpoint.h5").meta["progress"]["step"] >= 2


# --- damaged files --------------------------------------------------------------------------


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("damage", [flip, truncate, Path.unlink])
def test_damaged_newest_checkpoint(
    damage: Callable[[Path], None], blobs: Path, tmp_path: Path
) -> None:
    config = settings(blobs, optimizer="adam")
    train(config, tmp_path / "whole")
    run = tmp_path / "run"
    train(config, run, stop=stop_after(13))  # newest at 13, the one before it at 10
    damage(run / "checkpoint.h5")
    result = npdrt_cli("train", "--out", run, "--resume")
    assert result.exit_code == 0, result.output
    assert "Warning: " in result.stderr
    assert re.search("checkpoint.h5(: | does not exist)", result.stderr)
    assert ". Resuming from the previous checkpoint instead." in result.stderr
    assert "use the previous checkpoint" not in result.stderr
    assert "Warning" not in result.stdout
    assert_same(contents(run), contents(tmp_path / "whole"))


def test_damage_does_not_spread(blobs: Path, tmp_path: Path) -> None:
    """A damaged newest checkpoint is not kept as the previous one by the next save."""
    run = tmp_path / "run"
    train(settings(blobs), run, stop=stop_after(13))
    flip(run / "checkpoint.h5")
    resume(run, stop=stop_after(1))  # saves at step 11
    assert store.load(run / "checkpoint.h5").meta["progress"]["step"] == 11
    assert store.load(run / "checkpoint.prev.h5").meta["progress"]["step"] == 10


def test_both_checkpoints_damaged(blobs: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(settings(blobs), run)
    flip(run / "checkpoint.h5")
    truncate(run / "checkpoint.prev.h5")
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    result = npdrt_cli("train", "--out", run, "--resume")
    assert result.exit_code == 3
    assert "the file is damaged" in result.stderr
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before
    for file, reason in (("checkpoint.h5", "SHA-256"), ("checkpoint.prev.h5", "bytes")):
        result = npdrt_cli("show", run / file)
        assert result.exit_code == 3
        assert file in result.stderr
        assert reason in result.stderr
    for path in run.glob("checkpoint*"):
        path.unlink()
    result = npdrt_cli("train", "--out", run, "--resume")
    assert result.exit_code == 2
    assert "holds no run to go on with" in result.stderr
    assert names(run) == {"log.jsonl", "trace.h5"}  # the history is not thrown away


def test_checkpoints_that_are_no_run(blobs: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(settings(blobs), run)
    stored = store.load(run / "checkpoint.h5")
    store.save(run / "checkpoint.h5", stored.params, state=stored.state)
    with pytest.raises(FileRefused, match="expected the checkpoint of a training run"):
        resume(run)
    other = {name: np.zeros((2, 2)) for name in stored.params}
    for params, state, reason in (
        (other, stored.state, r"has shape \(2, 2\), the model expects \(5, 6\)"),
        ({"a": np.zeros(1)}, stored.state, "parameters do not fit the model: a"),
        (stored.params, {"step": np.array(1)} | {"a": np.ones(1)}, "state is not that of fromage"),
    ):
        store.save(run / "checkpoint.h5", params, state=state, meta=stored.meta)
        with pytest.raises(FileRefused, match=reason):
            resume(run)


# --- divergence -----------------------------------------------------------------------------

LINE = '''
from dataclasses import dataclass
import numpy as np
from npdrt import ops

@dataclass(frozen=True)
class Chain:
    """A chain of one-element layers; the kinds are those of `how`."""
    how: str = "linear"
    weights: str = "1"

    def init(self, seed, device, dtype):
        values = self.weights.split()
        return {f"w/{i}": np.full((1, 1), v, dtype) for i, v in enumerate(values)}

    def __call__(self, params, x):
        for w in params.values():
            x = ops.linear(x, w)
        return ops.exp(x) if self.how == "exp" else x
'''


def chain(
    folder: Path, x: float, y: float, *, samples: int = 4, how: str = "linear", weights: str = "1",
    **changes: Any,
) -> Config:  # fmt: skip
    """A regression of constant data: every quantity can be followed by hand."""
    (folder / "chain.py").write_text(LINE)
    np.savez(
        folder / "line.npz", x=np.full((samples, 1), float(x)), y=np.full((samples, 1), float(y))
    )
    given: dict[str, Any] = {
        "model": f"{folder}/chain.py:Chain",
        "model_options": {"how": how, "weights": weights},
        "data": str(folder / "line.npz"),
        "standardise": False,
        "optimizer": "sgd",
        "schedule": "constant",
        "lr": 1e-3,
        "epochs": 20,
        "batch_size": samples,
        "checkpoint_every": 0,
    }
    return Config(**{**given, **changes})


def message(run: Path, step: int, what: str, last: int) -> str:
    newest = run / "checkpoint.h5"
    return f"step {step}: {what} is not finite. The last good checkpoint is {newest}, step {last}"


CASES: dict[str, tuple[dict[str, Any], str]] = {
    "activation of a layer": (
        {"x": 1, "y": 1, "weights": "1 1e20 1e15 1e10"},
        "operation 4 of the forward pass, linear(w/3)",
    ),
    "loss": (
        {"x": 1, "y": 1, "weights": "1e15 1e5"},
        "operation 3 of the forward pass, squared_error()",
    ),
    "gradient": ({"x": 1e30, "y": 1e10, "weights": "0", "how": "exp"}, "the gradient of w/0"),
    "gradient of the later layer": (
        {"x": 1, "y": 1e9, "weights": "1e35 1e-35"},
        "the gradient of w/1",
    ),
    "update": ({"x": 1, "y": 1e10, "weights": "1", "lr": 1e30}, "w/0 after its update"),
    "update of one of two": (
        {"x": 1, "y": 1e18, "weights": "1e18 1e-18", "lr": 1e10},
        "w/1 after its update",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_divergence_names_the_first_value(case: str, tmp_path: Path) -> None:
    changes, what = CASES[case]
    run = tmp_path / "run"
    with pytest.raises(Diverged) as raised:
        train(chain(tmp_path, **changes), run)
    assert str(raised.value).startswith(message(run, 1, what, 0))
    assert store.load(run / "checkpoint.h5").meta["progress"]["step"] == 0


def explosion(lr: float, *, factor: float = 1.0) -> int:
    """The step whose loss overflows when w -= lr * 2 * (w - 2), and the rate falls each epoch
    after the second by `factor`: followed in float32."""
    w, step = np.float32(1), 0
    with quiet():
        while np.isfinite((w - np.float32(2)) ** 2):
            w = w - np.float32(lr) * (np.float32(2) * (w - np.float32(2)))
            step += 1
            lr = lr * factor if step > 1 else lr
    return step + 1


@pytest.mark.parametrize("every", [{"log_every": 1}, {}, {"checkpoint_every": 3}])
def test_divergence_at_a_later_step(every: dict[str, int], tmp_path: Path) -> None:
    """The step is named whether it is noticed by the log, at an epoch's end or at a save."""
    when, run = explosion(1e4), tmp_path / "run"
    assert when == 6
    batches = 7 if "checkpoint_every" in every else 1  # one epoch over the explosion, or many
    config = chain(tmp_path, 1, 2, samples=14, batch_size=14 // batches, lr=1e4, **every)
    with pytest.raises(Diverged) as raised:
        train(config, run)
    last = 3 if batches > 1 else 0
    what = "operation 2 of the forward pass, squared_error()"
    assert str(raised.value).startswith(message(run, when, what, last))
    assert store.load(run / "checkpoint.h5").meta["progress"]["step"] == last
    steps = [r["step"] for r in log.read(run / "log.jsonl") if r["event"] != "trace"]
    expected = {"log_every": [0, *(s for s in range(1, when) for _ in "se")]}
    assert steps == expected.get(next(iter(every), ""), steps)
    assert steps[-1] < when
    again = ("train", "--out", run, "--resume", "--code", tmp_path / "chain.py")
    found = npdrt_cli(*again)  # the same again
    assert found.exit_code == 1
    assert message(run, when, what, last) in found.stderr


def test_the_repetition_makes_the_steps_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It replays the programs of the run, whose last results the loop still holds: the bits of
    every step are those of eager steps, and the results that are held keep theirs."""
    seen: list[list[bytes]] = []
    held: list[list[bytes]] = []

    def bits(state: State) -> list[bytes]:
        return [v.tobytes() for v in (*state.params.values(), *state.optimizer.values())]

    def look(task: Any, rule: Any, state: State, *step: Any) -> str | None:
        seen.append(bits(state))
        return first_nonfinite(task, rule, state, *step)

    explain = Trainer._explain_divergence

    def explained(trainer: Trainer, at: Any) -> NoReturn:
        before = bits(at.state)
        try:
            explain(trainer, at)
        finally:
            held.append([*before, *bits(at.state)])

    monkeypatch.setattr("npdrt.train.loop.first_nonfinite", look)
    monkeypatch.setattr(Trainer, "_explain_divergence", explained)
    momentum = {"momentum": 0.5}
    for eager in (True, False):
        config = chain(tmp_path, 1, 2, lr=1e4, log_every=1, eager=eager, optimizer_options=momentum)
        with pytest.raises(Diverged, match=r"^step \d+: "):
            train(config, tmp_path / f"run-{eager}")
    assert len(seen) >= 2 * 5
    assert seen[: len(seen) // 2] == seen[len(seen) // 2 :]
    for bits_held in held:
        assert bits_held[: len(bits_held) // 2] == bits_held[len(bits_held) // 2 :]


def test_divergence_under_a_schedule_with_memory(tmp_path: Path) -> None:
    """Between checkpoint and divergence the plateau schedule falls; the repetition follows it."""
    when = explosion(1e5, factor=0.1)
    assert when > explosion(1e5)
    run = tmp_path / "run"
    with pytest.raises(Diverged, match=f"^step {when}: "):
        train(chain(tmp_path, 1, 2, lr=1e5, schedule="plateau:0.1:0"), run)


@pytest.mark.parametrize(
    ("y", "lr", "advice"),
    [
        (1e30, 1e-3, "No rate was used yet: look at the data and the initial weights."),
        (1e15, 1e30, "Try a lower --lr."),
    ],
)
def test_divergence_in_the_first_step(y: float, lr: float, advice: str, tmp_path: Path) -> None:
    """A rate is to blame only where it was used."""
    with pytest.raises(Diverged, match=r"^step 1: ") as raised:
        train(chain(tmp_path, 1, y, lr=lr), tmp_path / "run")
    assert str(raised.value).endswith(f"checkpoint.h5, step 0. {advice}")


def test_divergence_on_the_command_line(tmp_path: Path) -> None:
    """Exit code 1, a message of one line, the log kept to the end, nothing on stdout."""
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "d.npz", x=rng.normal(size=(40, 3)), y=rng.integers(0, 2, 40))
    words = "train --data d.npz --width 4 --optimizer sgd --lr 1e30 --log-every 1 --epochs 9"
    process = start(*words.split(), "-q", "--json", "--out", "run", cwd=tmp_path)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert out == ""
    assert errors.startswith("Error: step ")
    assert "is not finite. The last good checkpoint is run/checkpoint.h5, step" in errors
    assert errors.count("\n") == 1
    records = log.read(tmp_path / "run" / "log.jsonl")
    assert all(math.isfinite(r["loss"]) for r in records if r["event"] == "step")
    store.load(tmp_path / "run" / "checkpoint.h5")


def test_diagnosis_of_an_unused_parameter() -> None:
    """A parameter the loss does not depend on has gradient 0, here as in training."""

    class Half:
        def __call__(self, params: Any, x: Any) -> Any:
            return npdrt.ops.linear(x, params["used"])

    params = {"used": np.ones((1, 1)), "idle": np.ones(1)}
    optimizer = optim.sgd(lr=1.0)
    state = State(params, {}, optimizer.init(params))
    x = np.ones((2, 1))
    task = Task(Half(), None)
    arguments = (task, optimizer, state, x, x, 1.0, Random(0))
    assert first_nonfinite(*arguments) is None
    assert first_nonfinite(*arguments[:3], x * np.nan, *arguments[4:]) == "the minibatch"
    bad = State({**params, "idle": np.array([np.inf])}, {}, state.optimizer)
    assert first_nonfinite(*arguments[:2], bad, *arguments[3:]) == "parameter idle"


# --- the device is not waited for -----------------------------------------------------------


@pytest.mark.parametrize("rule", OPTIMIZERS)
def test_step_does_not_synchronise(rule: str) -> None:
    """On the double of CuPy, which refuses implicit conversions and counts explicit ones."""
    upload = backends.BACKENDS["cupy_double"]().asarray
    model = MLP(depth=3, width=4, inputs=6, outputs=3, bias=True)
    params = {name: upload(value) for name, value in model.init(seed=0).items()}
    given = {"lr": 0.01, **OPTIMIZERS[rule]}
    optimizer = optim.RULES[rule.partition(",")[0]](
        lr=given["lr"], **given.get("optimizer_options", {})
    )
    step = make_step(Task(model, 3), optimizer)
    state = State(params, {}, optimizer.init(params))
    x, y = upload(np.ones((8, 6), np.float32)), upload(np.arange(8) % 3)
    before = backends.synchronisations
    for number in range(5):
        state = step(state, x, y, 0.01, Random(0, "train", number)).state
    assert backends.synchronisations == before


def test_loop_synchronises_at_logging_points_only(
    blobs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A whole run on the double: between its records and checkpoints nothing waits."""
    double = backends.BACKENDS["cupy_double"]()
    for module in ("npdrt.train.feed", "npdrt.models.initialisation"):
        monkeypatch.setattr(f"{module}.to_device", lambda x, where: double.asarray(x))
    begun: list[int] = []
    waits: dict[int, int] = {}
    batch, logged = Feed.batch, Trainer._logged

    def first(self: Feed, step: int) -> Any:
        begun.append(backends.synchronisations)
        return batch(self, step)

    def last(self: Trainer, at: Any, *rest: Any) -> Any:
        found = logged(self, at, *rest)
        waits[at.step] = backends.synchronisations - begun[-1]
        return found

    monkeypatch.setattr(Feed, "batch", first)
    monkeypatch.setattr(Trainer, "_logged", last)
    config = settings(blobs, log_every=5, trace_every=4, eager=True)
    found = train(config, tmp_path / "double")
    expected = {s for s in range(1, STEPS + 1) if s % 5 == 0 or s % 4 == 0 or s % EPOCH == 0}
    assert {step for step, count in waits.items() if count} == expected
    assert waits[5] == 1
    monkeypatch.undo()
    assert results(train(config, tmp_path / "numpy")) == results(found)


# --- the configuration ----------------------------------------------------------------------


def dataset(**changes: Any) -> Dataset:
    values: dict[str, Any] = {
        "name": "made",
        "x": np.zeros((4, 6), np.float32),
        "y": np.arange(4) % 3,
        "x_test": None,
        "y_test": None,
        "classes": 3,
        "image_shape": None,
        "digests": {},
        "scale": None,
    }
    return Dataset(**{**values, **changes})


def test_resolve_fills_everything_in() -> None:
    config = resolve(Config(model_options={"depth": 4}), dataset())
    assert config.model_options == {
        "depth": 4, "width": 128, "inputs": 6, "outputs": 3, "bias": False, "nonlinearity": "relu",
        "output_nonlinearity": False, "residual": False, "init": "he", "normalisation": "none",
    }  # fmt: skip
    assert type(config.model_options["init"]) is str
    assert Config.from_dict(json.loads(json.dumps(config.as_dict()))) == config
    assert resolve(config, dataset()) == config


@pytest.mark.parametrize(
    ("depth", "rate"), [(1, 0.01), (2, 0.01), (5, 0.00892), (10, 0.00431), (50, 0.000838)]
)
def test_lr_auto(depth: int, rate: float) -> None:
    """0.06 (2**(1/L) - 1) to three digits, not above 0.01."""
    config = Config(model_options={"depth": depth})
    assert learning_rate(config, depth) == rate
    exact = 0.06 * (2 ** (1 / depth) - 1)
    assert rate == pytest.approx(min(0.01, exact), rel=5e-3)
    assert learning_rate(Config(optimizer="lars_lesion"), depth) == rate
    assert resolve(config, dataset()).lr == rate


def test_settings_may_be_numbers_of_numpy() -> None:
    """They are kept as Python's, as JSON has them, and refused as those are."""
    ours = Config(
        lr=np.float32(0.5), clip=np.array(2.0), seed=np.int64(3), epochs=np.uint8(2),
        snapshots=(np.int64(4),), optimizer="adam", model_options={"depth": np.int64(3)},
        optimizer_options={"betas": (np.float64(0.5), np.array(0.75))},
    )  # fmt: skip
    theirs = Config(
        lr=0.5, clip=2.0, seed=3, epochs=2, snapshots=(4,), optimizer="adam",
        model_options={"depth": 3}, optimizer_options={"betas": (0.5, 0.75)},
    )  # fmt: skip
    assert ours == theirs
    assert json.dumps(ours.as_dict()) == json.dumps(theirs.as_dict())
    with pytest.raises(Error, match="clip must be a finite norm above 0; got nan"):
        Config(clip=np.float32("nan"))


def test_lr_auto_elsewhere() -> None:
    rates = {"sgd": 0.1, "adam": 1e-3, "lars": 1.0}
    for rule, rate in rates.items():
        assert learning_rate(Config(optimizer=rule), 50) == rate
    for depth in (None, "deep", 0):  # a model without a depth in the sense of Definition 1
        assert learning_rate(Config(), depth) == 0.01
    assert learning_rate(Config(lr=0.5), 50) == 0.5
    with pytest.raises(Error, match="lr must be a number or auto; got 'fast'"):
        learning_rate(Config(lr="fast"), 50)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"epochs": -1}, "epochs must be at least 0; got -1"),
        ({"batch_size": 0}, "batch_size must be at least 1; got 0"),
        ({"trace_every": -2}, "trace_every must be at least 0; got -2"),
        ({"label_smoothing": 1.0}, r"label_smoothing must lie in \[0, 1\); got 1.0"),
        ({"label_smoothing": math.nan}, r"label_smoothing must lie in \[0, 1\); got nan"),
        ({"optimizer": "fromagr"}, "unknown optimizer 'fromagr'; did you mean 'fromage'?"),
        ({"model": "mpl"}, "unknown model 'mpl'; did you mean 'mlp'?"),
        ({"model_options": {"dpeth": 3}}, "unknown option of model mlp: 'dpeth'; .*'depth'"),
        ({"model_options": {"depth": 2.5}}, "option depth of model mlp: expected int; got 2.5"),
        ({"model_options": {"bias": 1}}, "option bias of model mlp: expected bool; got 1"),
        ({"model_options": {"outputs": 4}}, "the model has outputs=4, the data set has 3"),
        ({"model_options": {"depth": 0}}, "MLP: depth must be at least 1; got 0"),
        ({"model_options": {"init": print}}, "option init of the model cannot be kept as JSON"),
        ({"optimizer_options": {"momentum": 0.9}}, "unknown setting of fromage: 'momentum'"),
        ({"lr": -1.0}, "lr must be a finite number >= 0; got -1.0"),
        ({"lr": math.nan}, "lr must be a finite number >= 0; got nan"),
        ({"schedule": "cosin"}, "unknown schedule 'cosin'; expected constant"),
        ({"batch_size": 54}, "batch size: expected 1 to 53"),
        ({"seed": 1 << 64}, "seed must lie in"),
        ({"device": "tpu"}, "unknown device 'tpu'"),
        ({"dtype": "float16"}, "unknown dtype 'float16'"),
        ({"data": "digit"}, "unknown data set 'digit'; did you mean 'digits'?"),
        ({"model": "nowhere.py:Net"}, "nowhere.py does not exist"),
    ],
    ids=str,
)
def test_refused_before_anything_is_written(
    changes: dict[str, Any], text: str, blobs: Path, tmp_path: Path
) -> None:
    with pytest.raises(Error, match=text):
        train(settings(blobs, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_unknown_setting_in_a_checkpoint() -> None:
    with pytest.raises(Error, match=r"unknown setting 'epoch'; did you mean 'epochs'\?"):
        Config.from_dict({"epoch": 3})


@pytest.mark.parametrize(
    ("leftover", "message"),
    [
        ("a file", "holds files that are not of a run; give another --out"),
        ("checkpoint.h5", "already exists; give --resume to go on with it"),
    ],
)
def test_a_folder_with_something_in_it(
    leftover: str, message: str, blobs: Path, tmp_path: Path
) -> None:
    (tmp_path / leftover).write_text("")
    with pytest.raises(Error, match=message):
        train(settings(blobs), tmp_path)
    with pytest.raises(Error, match="is not a directory; give another --out"):
        train(settings(blobs), tmp_path / leftover)
    assert names(tmp_path) == {leftover}


def test_resume_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(Error, match="nowhere does not exist"):
        resume(tmp_path / "nowhere")
    with pytest.raises(Error, match=r"holds no run: it has no checkpoint.h5"):
        resume(tmp_path)
    (tmp_path / "a file").write_text("")
    with pytest.raises(Error, match="holds files that are not of a run; give another --out"):
        resume(tmp_path)


BROKEN = {
    "raise ValueError('no')": "model file .*m.py does not run: ValueError: no",
    "def (": "model file .*m.py does not run: SyntaxError",
    "Net = 3": "m.py:Net: a model is a dataclass with init",
    "class Net:\n    def init(self): ...\n    def __call__(self): ...": "a model is a dataclass",
    "from dataclasses import dataclass\n@dataclass\nclass Net:\n    a: int = 1": "a model is a",
    "from dataclasses import dataclass\n@dataclass\nclass Net:\n    size: int\n"
    "    def init(self): ...\n    def __call__(self): ...": "missing 1 required positional",
    "import npdrt.models\nNat = npdrt.models.MLP": "m.py has no class 'Net'",
}


@pytest.mark.parametrize("source", BROKEN)
def test_model_files_that_are_none(source: str, blobs: Path, tmp_path: Path) -> None:
    (tmp_path / "m.py").write_text(source)
    with pytest.raises(Error, match=BROKEN[source]):
        train(settings(blobs, model=f"{tmp_path}/m.py:Net", model_options={}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_model_file_with_a_bug(blobs: Path, tmp_path: Path) -> None:
    """What a user's network does wrong is said with its shapes."""
    (tmp_path / "noisy.py").write_text(NOISY.replace("(self.outputs, self.inputs)", "(3, 5)"))
    config = settings(blobs, model=f"{tmp_path}/noisy.py:Noisy", model_options={})
    with pytest.raises(Error, match=r"linear: expected .* got \(8, 6\) and \(3, 5\)"):
        train(config, tmp_path / "run")
    (tmp_path / "few.py").write_text(NOISY.replace("Noisy:", "Few:").replace("self.outputs", "2"))
    config = settings(blobs, model=f"{tmp_path}/few.py:Few", model_options={})
    with pytest.raises(Error, match="the model returns 2 values for 3 classes"):
        train(config, tmp_path / "few")


def test_changed_inputs_are_refused(tmp_path: Path) -> None:
    """A run is not resumed on other data or with another model."""
    data = write_blobs(tmp_path / "blobs.npz")
    model = tmp_path / "noisy.py"
    model.write_text(NOISY)
    run = tmp_path / "run"
    config = settings(data, model=f"{model}:Noisy", model_options={})
    train(config, run, stop=stop_after(3))
    before = contents(run)
    model.write_text(NOISY + "# another\n")
    with pytest.raises(Error, match=r"noisy.py:Noisy has changed since the run was started"):
        resume(run, code=[model])
    model.unlink()
    with pytest.raises(Error, match=r"noisy.py does not exist"):
        resume(run, code=[model])
    model.write_text(NOISY)
    write_blobs(data, y=np.zeros(SAMPLES, int))
    with pytest.raises(Error, match=r"the data set .*blobs.npz has changed since the run"):
        resume(run, code=[model])
    assert_same(contents(run), before)
    write_blobs(data)
    assert resume(run, code=[model]).step == STEPS


def test_model_file_changed_during_the_run(tmp_path: Path) -> None:
    """The digest in the checkpoint is of the file the run was made with."""
    data, model = write_blobs(tmp_path / "blobs.npz"), tmp_path / "noisy.py"
    model.write_text(NOISY)

    def edit() -> int:
        model.write_text(NOISY + "# edited while the run went on\n")
        return 0

    config = settings(data, model=f"{model}:Noisy", model_options={})
    train(config, tmp_path / "run", stop=edit)
    found = store.load(tmp_path / "run" / "checkpoint.h5").meta["model_file"]
    assert found == hashlib.sha256(NOISY.encode()).hexdigest()
    with pytest.raises(Error, match="has changed since the run was started"):
        resume(tmp_path / "run", code=[model])


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--depth 4", "was started with --depth 3, not --depth 4"),
        ("--width 6", "was started with --width 5, not --width 6"),
        ("--no-standardise", "was started with --standardise, not --no-standardise"),
        ("--optimizer sgd", "was started with --optimizer adam, not --optimizer sgd"),
        ("--betas 0.9,0.99", "was started with --betas 0.8,0.9, not --betas 0.9,0.99"),
        ("--eps 1e-4", "was started without --eps; leave the option out"),
        ("--threads 1", "was started without --threads; leave the option out"),
        ("--snapshot 2", "was started without --snapshot; leave the option out"),
        ("--lr 0.5", "was started with --lr 0.001, not --lr 0.5"),
        ("--seed 1", "was started with --seed 0, not --seed 1"),
        ("--checkpoint-every 2", "was started with --checkpoint-every 5, not --checkpoint-every 2"),
        ("--epochs 4", "a linear schedule falls over the run's 3 epochs"),
    ],
)
def test_resume_with_another_setting(
    option: str, message: str, blobs: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    betas = {"betas": (0.8, 0.9)}
    config = settings(blobs, optimizer="adam", optimizer_options=betas)
    train(config, run, stop=stop_after(2))
    result = npdrt_cli("train", "--out", run, "--resume", *option.split())
    assert result.exit_code == 2
    assert message in result.stderr
    same = "--depth 3 --lr auto --betas 0.8,0.9 --optimiser adam --seed 0 --epochs 3 --device cpu"
    assert npdrt_cli("train", "--out", run, "--resume", *same.split()).exit_code == 0


# --- what is stored -------------------------------------------------------------------------


def test_contents_of_a_checkpoint(blobs: Path, tmp_path: Path) -> None:
    config = settings(blobs, optimizer="adam", model_options={"depth": 2, "bias": True, "width": 5})
    train(config, tmp_path / "run", stop=stop_after(9))
    checkpoint = npdrt.load(tmp_path / "run" / "checkpoint.h5")
    layers = [f"layers/{i:02}/{a}" for i in range(2) for a in ("weight", "bias")]
    assert list(checkpoint.params) == layers
    assert [p.shape for p in checkpoint.params.values()] == [(5, 6), (5,), (3, 5), (3,)]
    slots = {f"{name}/{slot}" for name in layers for slot in ("exp_avg", "exp_avg_sq")}
    assert set(checkpoint.state) == slots | {"step", "beta1_power", "beta2_power"}
    assert checkpoint.state["step"] == 9
    assert checkpoint.buffers == {}
    meta = checkpoint.meta
    assert set(meta) == {"run", "config", "model_file", "data", "progress", "provenance"}
    assert meta["model_file"] is None
    assert meta["config"]["lr"] == 0.001
    progress = meta["progress"]
    assert (progress["step"], progress["steps"], progress["epoch"]) == (9, STEPS, 9 / 7)
    assert 0 < progress["right"] <= 16  # the two minibatches of the unfinished epoch
    losses = [r["loss"] for r in log.read(tmp_path / "run" / "log.jsonl") if r["event"] == "step"]
    assert losses[-1] * BATCH < progress["loss_sum"] < 100
    made = meta["provenance"]
    assert made["npdrt"] == npdrt.__version__
    assert made["argv"] == sys.argv
    assert made["packages"]["numpy"] == np.__version__
    assert made["data"] == {"blobs.npz": hashlib.sha256(blobs.read_bytes()).hexdigest()}
    expected = {"python", "platform", "cpu", "cpu_features", "blas", "cores", "device", "gpus"}
    assert expected | {"environment", "git"} <= set(made)


def test_the_same_run_gives_the_same_bytes(tmp_path: Path) -> None:
    """Two processes in two folders: no time, path or process number is in a checkpoint."""
    files = []
    for name in ("one", "another"):
        folder = tmp_path / name
        folder.mkdir()
        write_blobs(folder / "blobs.npz")
        assert finish(start(*KILLED, "--epochs", "2", "--out", "run", cwd=folder)) == 0
        files.append(
            {p.name: p.read_bytes() for p in (folder / "run").iterdir() if p.suffix == ".h5"}
        )
    assert set(files[0]) == RUN_FILES - {"log.jsonl"}
    assert files[0] == files[1]


def test_readers_agree(blobs: Path, tmp_path: Path) -> None:
    """npdrt.load, plain h5py and `npdrt show --json` see the same bytes."""
    train(settings(blobs, optimizer="adam"), tmp_path / "run")
    path = tmp_path / "run" / "checkpoint.h5"
    checkpoint = npdrt.load(path)
    shown = json.loads(npdrt_cli("show", tmp_path / "run", "--json").stdout)
    groups = {"params": checkpoint.params, "state": checkpoint.state}
    arrays = {f"{g}/{n}": value for g, group in groups.items() for n, value in group.items()}
    assert list(shown["arrays"]) == list(arrays)
    with h5py.File(path) as file:
        for name, value in arrays.items():
            plain = file[name][()]
            assert (plain.dtype, plain.shape) == (value.dtype, value.shape)
            assert plain.tobytes() == value.tobytes()
            assert shown["arrays"][name]["sha256"] == hashlib.sha256(value.tobytes()).hexdigest()
            norm = math.sqrt(math.fsum(float(v) ** 2 for v in value.ravel()))
            assert shown["arrays"][name]["norm"] == pytest.approx(norm, rel=1e-12)
    assert shown["meta"]["user"] == checkpoint.meta


def test_float_targets(tmp_path: Path) -> None:
    """Regression: squared error, no accuracy, and no test set here."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(60, 4))
    np.savez(tmp_path / "r.npz", x=x, y=x @ rng.normal(size=(4, 2)))
    config = Config(data=str(tmp_path / "r.npz"), epochs=60, batch_size=16, optimizer="adam")
    run = tmp_path / "run"
    found = train(config, run)
    assert (found.train_accuracy, found.test_loss, found.test_accuracy) == (None, None, None)
    data = npdrt.data.load(config.data)
    model = MLP(depth=2, width=128, inputs=4, outputs=2)
    difference = model(npdrt.load(run / "checkpoint.h5").params, data.x) - data.y
    assert found.train_loss == pytest.approx(np.mean(np.square(difference, dtype="f8")), rel=1e-5)
    epochs = [r for r in log.read(run / "log.jsonl") if r["event"] == "epoch"]
    assert epochs[-1]["train_loss"] < 0.1 * epochs[0]["train_loss"]
    assert not any("accuracy" in key or "test" in key for key in epochs[0])
    tables, _ = trace.read(run / "trace.h5")
    assert np.isnan(tables["history/train_accuracy"]).all()
    assert np.isnan(tables["history/test_loss"]).all()
    assert not np.isnan(tables["history/train_loss"]).any()


def test_epochs_are_measured_as_documented(blobs: Path, tmp_path: Path) -> None:
    """train_loss: the mean over the epoch's samples, each before its step; test over the set."""
    config = settings(blobs, model_options={"depth": 1}, optimizer="sgd", lr=0.1, dtype="float64")
    run = tmp_path / "run"
    train(config, run)
    data = npdrt.data.load(str(blobs))
    w = MLP(depth=1, width=128, inputs=6, outputs=3).init(seed=0, dtype="float64")
    weight, total, right = w["layers/00/weight"], 0.0, 0
    x = data.x.astype(float)
    order = Random(0, "data/order", 0).permutation(SAMPLES)
    for step, start_ in enumerate(range(0, SAMPLES, BATCH)):
        chosen = order[start_ : start_ + BATCH]
        loss, probabilities = softmax_loss(x[chosen] @ weight.T, data.y[chosen])
        total += loss * len(chosen)
        right += int(np.sum(np.argmax(probabilities, 1) == data.y[chosen]))
        error = (probabilities - np.eye(3)[data.y[chosen]]) / len(chosen)
        weight = weight - 0.1 * (1 - step / STEPS) * (error.T @ x[chosen])
    (first, *_) = [r for r in log.read(run / "log.jsonl") if r["event"] == "epoch"]
    assert first["train_loss"] == pytest.approx(total / SAMPLES, rel=1e-12)
    assert first["train_accuracy"] == right / SAMPLES
    logits = data.x_test.astype(float) @ weight.T
    assert first["test_loss"] == pytest.approx(softmax_loss(logits, data.y_test)[0], rel=1e-12)
    assert first["test_accuracy"] == np.mean(np.argmax(logits, 1) == data.y_test)
    assert first["lr"] == pytest.approx(0.1 * (1 - 6 / STEPS), rel=1e-15)


def softmax_loss(logits: Any, labels: Any) -> tuple[float, Any]:
    """Mean cross-entropy and the probabilities, written out."""
    e = np.exp(logits - logits.max(1, keepdims=True))
    p = e / e.sum(1, keepdims=True)
    return -np.mean(np.log(p[np.arange(len(labels)), labels])), p


def test_trace_recomputed(blobs: Path, tmp_path: Path) -> None:
    """The measurements of the first step, from forward pass to cosine, in plain NumPy."""
    config = settings(
        blobs, model_options={"depth": 2, "width": 5}, dtype="float64", trace_every=1, lr=0.02
    )
    run = tmp_path / "run"
    train(config, run, stop=stop_after(2))
    data = npdrt.data.load(str(blobs))
    params = MLP(depth=2, width=5, inputs=6, outputs=3).init(seed=0, dtype="float64")
    v, w = params.values()
    chosen = Random(0, "data/order", 0).permutation(SAMPLES)[:BATCH]
    x, y = data.x[chosen].astype(float), data.y[chosen]
    z = x @ v.T
    h = np.maximum(z, 0)
    _, p = softmax_loss(h @ w.T, y)
    g = (p - np.eye(3)[y]) / BATCH
    grads = [((g @ w) * (z > 0)).T @ x, g.T @ h]
    tables, about = trace.read(run / "trace.h5")
    assert about["parameters"] == list(params)
    assert tables["layers/step"].tolist() == [1, 2]
    for i, (before, grad) in enumerate(zip((v, w), grads, strict=True)):
        size, slope = np.linalg.norm(before), np.linalg.norm(grad)
        after = (before - 0.02 * size / slope * grad) / math.sqrt(1 + 0.02**2)
        change = after - before
        expected = {
            "weight_norm": size,
            "gradient_norm": slope,
            "relative_update": np.linalg.norm(change) / size,
            "cosine": -np.sum(change * grad) / (np.linalg.norm(change) * slope),
        }
        for name, value in expected.items():
            assert tables[f"layers/{name}"][0, i] == pytest.approx(value, rel=1e-10), name
    assert tables["layers/relative_update"][0] == pytest.approx(0.02, rel=5e-3)
    for row in range(2):  # the distances of the papers, from the columns of the same step
        r, c = (tables[f"layers/{name}"][row] for name in ("relative_update", "cosine"))
        sizes = r * tables["layers/weight_norm"][row]
        expected = {
            "deep_relative_trust": np.prod(1 + r) - 1,
            "log_deep_relative_trust": math.log(np.prod(1 + r)),
            "squared_deep_relative_trust": np.prod(1 + r**2) - 1,
            "euclidean_trust": np.sum(sizes**2),
            "descent_threshold": math.sqrt(1 + min(c)) - 1,
        }
        for name, value in expected.items():
            assert tables[f"network/{name}"][row] == pytest.approx(value, rel=1e-10), name
    assert set(expected) == {name[8:] for name in tables if name.startswith("network/")}
    assert set(about["datasets"]) == set(tables)


def test_trace_of_conditioning(blobs: Path, tmp_path: Path) -> None:
    """At the start and after every epoch; only if asked for; the weights have it, biases do not."""
    options = {"depth": 2, "width": 5, "bias": True}
    config = settings(blobs, model_options=options, checkpoint_every=0)
    train(config, tmp_path / "run")
    tables, about = trace.read(tmp_path / "run" / "trace.h5")
    assert tables["conditioning/step"].tolist() == [0, 7, 14, 21]
    assert about["weights"] == ["layers/00/weight", "layers/01/weight"]
    assert about["datasets"]["conditioning/condition_number"]["shape"] == "(checks, weights)"
    start_ = MLP(inputs=6, outputs=3, **options).init(seed=0)
    end = npdrt.load(tmp_path / "run" / "checkpoint.h5").params
    for row, params in ((0, start_), (-1, end)):
        for column, name in enumerate(about["weights"]):
            w = params[name].astype(np.float64)
            expected = np.sqrt(np.linalg.cond(w @ w.T if len(w) < w.shape[1] else w.T @ w))
            found = tables["conditioning/condition_number"][row, column]
            assert found == pytest.approx(expected, rel=1e-6)
    assert np.isfinite(tables["network/deep_relative_trust"]).all()  # of the weights alone
    train(dataclasses.replace(config, conditioning=False), tmp_path / "plain")
    plain, about = trace.read(tmp_path / "plain" / "trace.h5")
    assert set(plain) == {name for name in tables if not name.startswith("conditioning/")}
    assert "weights" not in about
    assert fingerprints(npdrt.load(tmp_path / "plain" / "checkpoint.h5").params) == fingerprints(
        end
    )


def test_trace_of_jacobians(blobs: Path, tmp_path: Path) -> None:
    """d output / d input of every layer, against finite differences, which are exact where a
    network is linear; nothing where a layer is no piecewise-linear perceptron's."""
    options = {"depth": 3, "width": 5, "bias": True}
    config = settings(blobs, model_options=options)
    train(config, tmp_path / "run")
    tables, _ = trace.read(tmp_path / "run" / "trace.h5")
    params = npdrt.load(tmp_path / "run" / "checkpoint.h5").params
    h = data.load(config.data, standardise=config.standardise).x[:4].astype(np.float64)
    names = [name for name in params if name.endswith("weight")]
    for layer, name in enumerate(names):
        columns = [
            above(params, names[layer:], h + 1e-6 * e) - above(params, names[layer:], h - 1e-6 * e)
            for e in np.eye(h.shape[1])
        ]
        squares = np.sum(np.square(np.array(columns) / 2e-6), axis=(0, 2))
        found = tables["conditioning/jacobian_norm"][-1, layer]
        assert found == pytest.approx(np.sqrt(np.mean(squares)), rel=1e-6)
        h = above(params, [name, ""], h)
    for other in ({"nonlinearity": "tanh"}, {"residual": True}, {"normalisation": "spectral"}):
        train(settings(blobs, model_options={**options, **other}), tmp_path / str(*other))
        tables, _ = trace.read(tmp_path / str(*other) / "trace.h5")
        assert np.isnan(tables["conditioning/jacobian_norm"]).all()


def above(params: Any, names: list[str], h: Any) -> Any:
    """The output of these relu layers, the last of them linear; an empty name is no layer."""
    for name in names:
        if name:
            z = h @ params[name].T + params[name.replace("weight", "bias")]
            h = z if name == names[-1] else np.maximum(z, 0.0)
    return h


def test_trace_of_a_rank_deficient_weight(blobs: Path, tmp_path: Path) -> None:
    """A condition number of inf is null in the log and NaN in the file."""
    drawn = 'Random(seed, "init").normal((self.outputs, self.inputs))'
    ones = "np.ones((self.outputs, self.inputs))"
    (tmp_path / "dull.py").write_text(NOISY.replace(drawn, ones))
    config = settings(blobs, model=f"{tmp_path}/dull.py:Noisy", model_options={}, eager=True)
    train(config, tmp_path / "run", stop=stop_after(1))
    (first, *_) = [
        r for r in log.read(tmp_path / "run" / "log.jsonl") if r["event"] == "conditioning"
    ]
    assert first["condition_number"] == {"weight": None}
    tables, about = trace.read(tmp_path / "run" / "trace.h5")
    assert np.isnan(tables["conditioning/condition_number"]).tolist() == [[True]]
    assert about["weights"] == ["weight"]


def test_trace_is_the_same_in_every_way_to_run(blobs: Path, tmp_path: Path) -> None:
    """Eager or from a program, with compiled loops or without: the same bits, network included."""
    options = {"depth": 3, "width": 5, "bias": True}
    ways: list[dict[str, bool]] = [{}, {"eager": True}]
    if importlib.util.find_spec("numba"):
        ways.append({"fast": True})
    found = []
    for number, way in enumerate(ways):
        train(settings(blobs, model_options=options, **way), tmp_path / str(number))
        found.append(fingerprints(trace.read(tmp_path / str(number) / "trace.h5")[0]))
    assert all(one == found[0] for one in found)


def test_a_run_of_an_older_npdrt(blobs: Path, tmp_path: Path) -> None:
    """One from before the checkpoint covered the log, and before the columns of the network: it
    goes on with a warning, and its old rows are NaN there."""
    run, reporter = tmp_path / "run", Collector()
    train(settings(blobs), run, stop=stop_after(5))
    old = [
        {k: v for k, v in r.items() if "trust" not in k and k != "descent_threshold"}
        for r in log.read(run / "log.jsonl")
        if r["event"] != "conditioning"
    ]
    later = [{"event": "step", "step": 6, "loss": 1.0}]
    write_log(run / "log.jsonl", old + later)
    forget_the_log(run / "checkpoint.h5")
    resume(run, reporter=reporter)
    assert "is of an older npdrt" in reporter.warnings[0]
    tables, _ = trace.read(run / "trace.h5")
    assert np.isnan(tables["network/euclidean_trust"]).tolist() == [True, *[False] * 4]
    assert tables["conditioning/step"].tolist() == [7, 14, 21]
    assert log.read(run / "log.jsonl")[: len(old)] == old
    covered = store.load(run / "checkpoint.h5").meta["progress"]["log"]
    assert covered["records"] == len(log.read(run / "log.jsonl"))


def test_damage_in_the_log_of_an_older_npdrt(blobs: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(settings(blobs), run, stop=stop_after(5))
    forget_the_log(run / "checkpoint.h5")
    sound = (run / "log.jsonl").read_bytes()
    (run / "log.jsonl").write_bytes(sound.replace(b"\n", b"\n[1]\n", 1))
    with pytest.raises(FileRefused, match=r"log.jsonl: line 2 is damaged"):
        resume(run)


def write_log(path: Path, records: list[Any]) -> None:
    path.write_text("".join(json.dumps(r) + "\n" for r in records))


def forget_the_log(path: Path) -> None:
    """Make a checkpoint as npdrt wrote it before it kept the tally of the log."""
    stored = store.load(path)
    del stored.meta["progress"]["log"]
    store.save(path, stored.params, buffers=stored.buffers, state=stored.state, meta=stored.meta)


VECTOR = """
from dataclasses import dataclass
import numpy as np

@dataclass(frozen=True)
class Gains:
    inputs: int
    outputs: int

    def init(self, seed, device, dtype):
        return {"gain": np.ones(self.inputs, dtype)}

    def __call__(self, params, x):
        return (x * params["gain"])[:, : self.outputs]
"""


def test_trace_of_a_model_without_weights(blobs: Path, tmp_path: Path) -> None:
    """Only vectors: its parameters are measured, the network has nothing to say."""
    (tmp_path / "vector.py").write_text(VECTOR)
    config = settings(blobs, model=f"{tmp_path}/vector.py:Gains", model_options={})
    train(config, tmp_path / "run")
    tables, about = trace.read(tmp_path / "run" / "trace.h5")
    assert np.isfinite(tables["layers/cosine"]).all()
    assert np.isnan(tables["network/descent_threshold"]).all()
    assert tables["conditioning/condition_number"].shape == (4, 0)
    assert about["weights"] == []


def test_trace_of_a_zero_parameter(blobs: Path, tmp_path: Path) -> None:
    """A bias that starts at 0 has no relative update: NaN in the file, null in the log."""
    options = {"depth": 1, "bias": True}
    config = settings(blobs, model_options=options, trace_every=1)
    train(config, tmp_path / "run", stop=stop_after(2))
    tables, _ = trace.read(tmp_path / "run" / "trace.h5")
    assert np.isnan(tables["layers/relative_update"]).tolist() == [[False, True], [False, False]]
    (first, *_) = [r for r in log.read(tmp_path / "run" / "log.jsonl") if r["event"] == "trace"]
    assert first["relative_update"][1] is None


def test_never_logged_never_traced(blobs: Path, tmp_path: Path) -> None:
    """0 is never; None is once an epoch; checkpoints at the start and at the end remain."""
    config = settings(blobs, log_every=0, trace_every=0, checkpoint_every=0, conditioning=False)
    train(config, tmp_path / "run")
    events = [(r["event"], r["step"]) for r in log.read(tmp_path / "run" / "log.jsonl")]
    assert events == [("start", 0), ("epoch", 7), ("epoch", 14), ("epoch", 21)]
    assert npdrt.load(tmp_path / "run/checkpoint.prev.h5").meta["progress"]["step"] == 0
    tables, _ = trace.read(tmp_path / "run" / "trace.h5")
    assert tables["layers/cosine"].shape == (0, 3)
    config = settings(blobs, log_every=0, trace_every=None, checkpoint_every=None)
    train(config, tmp_path / "default")
    events = [r["step"] for r in log.read(tmp_path / "default/log.jsonl") if r["event"] == "trace"]
    assert events == [7, 14, 21]
    assert npdrt.load(tmp_path / "default/checkpoint.prev.h5").meta["progress"]["step"] == 14


def test_no_epochs(blobs: Path, tmp_path: Path) -> None:
    found = train(settings(blobs, epochs=0), tmp_path / "run")
    assert (found.step, found.steps) == (0, 0)
    params = npdrt.load(tmp_path / "run" / "checkpoint.h5").params
    start_ = MLP(depth=3, width=5, inputs=6, outputs=3).init(seed=0)
    assert fingerprints(params) == fingerprints(start_)
