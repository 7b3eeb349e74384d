"""`npdrt bench` and the scripts of benchmarks/: what they report, not how fast anything is."""

from __future__ import annotations

import argparse
import importlib
import json
import math
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from npdrt import record
from npdrt.cli import bench as command
from npdrt.cli import cli
from npdrt.program import fused
from npdrt.train import bench, limits

SCRIPTS = Path(__file__).parents[1] / "benchmarks"
NAMES = ("report", "step", "update", "gradient", "memory", "depth", "elementary")
WAYS = ("eager", "replay")
TINY_ANYWHERE = ("--quick", "--depth", 2, "--width", 8, "--batch-size", 4, "--steps", 1)
TINY = (*TINY_ANYWHERE, "--device", "cpu", "--no-fast")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits that take no time."""
    monkeypatch.setattr(limits, "SQUARE", 32)
    triad = limits.Bandwidth(1.0, 1)
    monkeypatch.setattr(limits, "triad_bandwidth", lambda *args, **settings: triad)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Any]]:
    """A function that imports a benchmark by its name, as Python runs it from its folder."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    kept = {name: sys.modules.pop(name) for name in NAMES if name in sys.modules}
    yield importlib.import_module
    for name in NAMES:
        sys.modules.pop(name, None)
    sys.modules.update(kept)


def call(*words: Any) -> Result:
    """`npdrt bench words` in this process."""
    return CliRunner().invoke(cli, ["bench", *map(str, words)], prog_name="npdrt")


def numbers(value: Any) -> Iterator[float]:
    """Every number in a JSON value."""
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from numbers(item)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value


# --- npdrt bench -----------------------------------------------------------------------------


def test_json_has_what_the_help_says() -> None:
    result = call(*TINY, "--json")
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    found = json.loads(result.stdout)
    documented = call("--help").output.partition("--json prints one object:")[2]
    for key in found:
        assert key in documented
    assert set(found) == {
        *("cpu", "blas", "case", "limits", "step", "ways"),
        *("record_ms", "call_overhead_us", "memory_mb"),
    }
    assert set(found["ways"]) == set(WAYS)
    for way in found["ways"].values():
        assert set(way) == {"ms", "gflops", "share_of_sgemm", "share_of_floor"}
    assert set(found["limits"]) == {"sgemm", "products", "triad", "triad_threads"}
    assert set(found["step"]) == {"calls", "gflop", "update_gb", "floor_ms"}
    found.pop("call_overhead_us")  # a difference of times, which noise can make negative
    assert all(0 < n < math.inf for n in numbers(found))


def test_options_reach_the_report() -> None:
    words = (*TINY, "--optimiser", "adam", "--dtype", "float64", "--json")
    case = json.loads(call(*words).stdout)["case"]
    sizes = {"depth": 2, "width": 8, "batch_size": 4, "steps": 1}
    given = {"model": "mlp", "optimizer": "adam", "dtype": "float64", "fast": False, "quick": True}
    assert case == {**sizes, **given, "parameters": 8 * 8 + 10 * 8}


def test_text() -> None:
    result = call(*TINY)
    assert result.exit_code == 0, result.output
    assert "GFLOP/s at the step's shapes" in result.output
    assert "us beyond the bare NumPy call" in result.output
    assert "\x1b" not in result.output
    for way in WAYS:
        assert f"\n{way}" in result.output


def test_compiled_loops_are_measured_where_numba_is() -> None:
    pytest.importorskip("numba", reason="numba is not installed")
    assert "fast" in json.loads(call(*TINY[:-1], "--json").stdout)["ways"]


def test_without_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for, compiled loops are an error; not asked for, they are left out."""
    monkeypatch.setitem(sys.modules, "numba", None)
    fused._compiled.cache_clear()
    result = call(*TINY[:-1], "--fast")
    assert result.exit_code == 4
    assert "npdrt[fast]" in result.output
    assert set(json.loads(call(*TINY[:-1], "--json").stdout)["ways"]) == set(WAYS)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--depth", 0), "0 is not in the range x>=1"),
        (("--steps", "two"), "'two' is not a valid integer"),
        (("--optimizer", "fromge"), "Did you mean 'fromage'?"),
        (("--model", "resnet"), "'resnet' is unknown"),
        (("--dtype", "float16"), "'float16' is unknown"),
        (("fast",), "unexpected extra argument"),
    ],
)
def test_bad_options_are_refused(words: tuple[Any, ...], message: str) -> None:
    result = call(*words)
    assert result.exit_code == 2
    assert message in result.output


def test_progress_is_for_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "on_terminal", lambda: True)
    result = call(*TINY, "--json")
    assert result.stderr.startswith("measuring: ")
    json.loads(result.stdout)


# --- what is counted -------------------------------------------------------------------------


def test_products_are_counted() -> None:
    program = record(lambda x, w: (x @ w) + 1.0, np.ones((3, 5)), np.ones((5, 7)))
    assert bench.products(program) == 2 * 3 * 5 * 7


def test_bytes_of_an_update() -> None:
    """Adam reads w, g and two slots, and writes w and the slots; 0-d state hardly counts."""
    w = np.ones(1000, np.float32)
    state = {"w/exp_avg": w, "w/exp_avg_sq": w, "step": np.asarray(0)}
    assert bench.update_bytes({"w": w}, state) == 7 * w.nbytes + 2 * 8


def test_turns() -> None:
    """Everybody once a turn, each first in its turn; the warm-up is not counted."""
    log: list[str] = []
    calls = {name: (lambda name=name: log.append(name)) for name in "abc"}
    seconds = bench.take_turns(calls, turns=2, warm_up=1)
    assert log == [*"abc", *"bca", *"cab"]
    assert {name: len(taken) for name, taken in seconds.items()} == dict.fromkeys("abc", 2)


def test_typical_and_together() -> None:
    samples = [{"x": x, "in": {"y": -x}} for x in (3, 1, 2)]
    assert bench.typical(samples) == {"x": 2, "in": {"y": -2}}
    rates = {"a": 1.0, "b": 2.0, "square 2048": 9.0}
    assert bench.together(rates) == pytest.approx(2 / (1 + 1 / 2))


def test_cost_of_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(calls: Any, turns: int) -> dict[str, list[float]]:
        for run in calls.values():
            run()
        return {"replay": [5.0, 3.0], "bare": [1.0, 2.0]}

    monkeypatch.setattr(bench, "take_turns", fake)
    assert bench.call_overhead(arrays=2, calls=5) == pytest.approx((3.0 - 1.0) / 10)


# --- benchmarks/ -----------------------------------------------------------------------------


@pytest.mark.filterwarnings("default")  # other libraries warn as they like
@pytest.mark.parametrize("rule", ["fromage", "sgd", "adam"])
def test_update(script: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, rule: str) -> None:
    update = script("update")
    monkeypatch.setattr(update, "CONTENDERS", {n: update.CONTENDERS[n] for n in OWN})
    result = update.measure(rule, arrays=2, width=40, steps=2)
    assert {"npdrt eager", "npdrt program"} <= set(result["seconds"])
    assert result["bytes"] == {"fromage": 3, "sgd": 5, "adam": 7}[rule] * 2 * 40 * 40 * 4
    assert f"| {rule} |" in update.text_of([result])


OWN = ("npdrt eager", "npdrt program", "npdrt program, fast")


@pytest.mark.filterwarnings("default")
def test_peers_do_the_same_update(script: Callable[[str], Any]) -> None:
    pytest.importorskip("torch", reason="PyTorch is not installed")
    update = script("update")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for rule in update.ARRAYS_MOVED:
            update.measure(rule, arrays=2, width=40, steps=2)
    assert [str(w.message) for w in seen if "does not do the work" in str(w.message)] == []
    with pytest.warns(UserWarning, match="other does not do the work of npdrt eager"):
        update.compare("sgd", 0.0, {"npdrt eager": np.ones(2), "other": np.zeros(2)})


def test_gradient(script: Callable[[str], Any]) -> None:
    gradient = script("gradient")
    result = gradient.measure(depth=3, width=8, size=4, turns=2)
    forward = 2 * 4 * 8 * (8 + 8 + 10)
    assert result["operations"] == 2 * forward + 2 * 4 * 8 * (8 + 10)
    assert {"its products alone", "program"} <= set(result["seconds"])
    assert "| program |" in gradient.text_of(result)


def test_depth(script: Callable[[str], Any]) -> None:
    depth = script("depth")
    result = depth.measure([1, 2, 4, 5], width=8, size=4, steps=2)
    assert [row["depth"] for row in result["rows"]] == [1, 2, 4, 5]
    assert all(math.isfinite(loss) for row in result["rows"] for loss in row["losses"])
    text = depth.text_of([result])
    assert "| step, ms |" in text
    assert depth.size_of("128x32") == (128, 32)


def test_a_straight_line(script: Callable[[str], Any]) -> None:
    line = script("depth").line([1, 2, 3, 4, 5], [3.0, 5.0, 7.0, 9.0, 11.0])
    expected = {"a": 1.0, "b": 2.0, "r2": 1.0, "residual": 0.0, "ratio": 1.0}
    assert line == pytest.approx(expected)
    bent = script("depth").line([1, 2, 3, 4, 5], [1.0, 2.0, 3.0, 6.0, 9.0])
    assert bent["ratio"] == pytest.approx(3.0)


def test_what_fits(script: Callable[[str], Any], capsys: pytest.CaptureFixture[str]) -> None:
    fitting = script("depth").that_fit([1000, 2], width=784, size=250, gigabytes=1)
    assert fitting == [2]
    assert "L = 1000 does not fit" in capsys.readouterr().err


@pytest.mark.parametrize("run", ["npdrt program", "npdrt eager", "npdrt train"])
def test_memory(script: Callable[[str], Any], run: str) -> None:
    """In a process of its own, as a user runs it."""
    memory = script("memory")
    sizes = argparse.Namespace(depth=2, width=16, batch_size=8, steps=2)
    [found] = memory.measure(["adam"], [run], sizes, repeats=1)
    assert found["peak"] >= found["imports"] > 1e6
    assert all(math.isfinite(loss) for loss in found["losses"])
    assert "| adam |" in memory.text_of([found])


def test_a_run_that_fails_is_left_out(
    script: Callable[[str], Any], capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = argparse.Namespace(depth=0, width=16, batch_size=8, steps=2)
    assert script("memory").measure(["adam"], ["npdrt program"], sizes, repeats=1) == []
    assert "depth must be at least 1" in capsys.readouterr().err


def test_output(
    script: Callable[[str], Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The files hold the table and the numbers; what is not finite is null."""
    report = script("report")
    results = {"x": math.nan, "y": [1.0]}
    report.publish("text", script("step").machine(), results, tmp_path / "found.1")
    assert (tmp_path / "found.1.md").read_text() == capsys.readouterr().out
    found = json.loads((tmp_path / "found.1.json").read_text())
    assert found["results"] == {"x": None, "y": [1.0]}
    assert "numpy" in found["machine"]["packages"]
    assert report.table(["a"], [["1"]]) == "| a |\n|---|\n| 1 |"


@pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is not installed")
def test_every_float32(
    script: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Of a few; and a result that is one float32 too high is seen."""
    swept = script("elementary")
    library = swept.compiled(str(tmp_path))
    for name in swept.NAMES:
        found = swept.sweep(library, name, stride=1 << 19)
        assert (found["arguments"], found["wrong"], found["worst"]) == (8192, 0, 0.5)
    assert "| cos | 8,192 | 0 | 0.5000000000 |" in swept.text_of(
        {"swept": [found], "functions": [], "sums": [swept.sum_costs((64, 16), (1,))]}
    )
    right = swept.elementary.exp
    monkeypatch.setattr(
        swept.elementary, "exp", lambda x: np.nextafter(right(x), np.float32(np.inf))
    )
    assert swept.sweep(library, "exp", stride=1 << 24)["far"] > 100


def test_sums_in_slices(script: Callable[[str], Any]) -> None:
    """What the benchmark compares with adds exactly, in any order."""
    sliced = script("elementary").sliced
    x = np.random.default_rng(0).standard_normal((1000, 30)).astype("float32")
    assert sliced(x, (0,)).tobytes() == sliced(x[::-1], (0,)).tobytes()
    assert np.array_equal(sliced(x, (0,)), x.astype(float).sum(axis=0).astype("float32"))


# --- benchmarks/folders.py -----------------------------------------------------------------------


def test_folders(
    script: Callable[[str], Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It reads its own files, and the ratio is that of the turns."""
    pytest.importorskip("PIL")
    images = script("folders")
    for name, value in {"FILES": 8, "BATCH": 2, "SIZE": 16, "BATCHES": 3}.items():
        monkeypatch.setattr(images, name, value)
    images.make(tmp_path)
    images.read("npdrt", str(tmp_path), "training", "1")
    rate, cpu = json.loads(capsys.readouterr().out)
    assert rate > 0
    assert cpu >= 0
    turns = {"rate": [300.0, 100.0, 90.0], "cpu": [4.0, 5.0, 6.0]}
    other = {"rate": [100.0, 100.0, 100.0], "cpu": [8.0, 5.0, 8.0]}
    row = {"way": "training", "processes": 2, "npdrt": turns, "torchvision": other}
    assert images.line(row)[2:] == ["100", "100", "1.00", "5.00", "8.00", "0.75"]
    text, found = images.parts(1)
    assert "| decode it, random part, colours |" in text
    assert found["decode it"][0] > 0
