"""Recipes and sweeps: strict files, runs named by what decides them, and kills at any time."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from npdrt.cli import cli
from npdrt.errors import Error, FileRefused
from npdrt.store import log
from npdrt.train.config import Config
from npdrt.train.studies import cluster, recipe, sweep
from npdrt.train.studies.recipe import RECIPES, SCALES
from npdrt.train.studies.sweep import Options

HEAD = """
title = "t"
source = "s"
statement = "c"
study = "rates"
"""
RUNS = (
    HEAD
    + """
[config]
batch_size = 64
"model_options.width" = 32
checkpoint_every = 5
[full]
[full.config]
epochs = 20
[[full.grid]]
optimizer = ["fromage", "sgd"]
lr = [0.02, 0.01]
"model_options.depth" = 6
"""
)


def write(tmp_path: Path, text: str) -> str:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    return str(path)


# --- recipes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", recipe.names())
@pytest.mark.parametrize("scale", SCALES)
def test_bundled_recipes_load(name: str, scale: str) -> None:
    found = recipe.load(name, scale)
    assert found.statement
    assert found.source
    assert all(isinstance(config, Config) for config in found.configs)
    assert scale == "full" or found.note or not found.configs


def test_there_are_recipes_of_each_paper() -> None:
    assert {name.partition("/")[0] for name in recipe.names()} >= {
        *("fromage", "fromage-v1", "author-response")
    }


@pytest.mark.parametrize("name", recipe.names())
def test_every_value_has_its_source(name: str) -> None:
    """A setting of a recipe carries a comment that says where it is from."""
    text = (RECIPES / f"{name}.toml").read_text().partition("[reference]")[0]
    text = text.partition("[[reference")[0]
    body = text.partition("\n\n")[2]
    lines = re.findall(r'^"?[\w.]+"? = [^"{\n].*$|^"?[\w.]+"? = "[^"]*".*$', body, re.M)
    bare = [line for line in lines if "#" not in line and not line.startswith("note")]
    assert bare == []
    assert lines or "[config]" not in text


def test_a_grid_is_a_product_and_lists_nest(tmp_path: Path) -> None:
    grid = "[full]\n[[full.grid]]\nlr = [0.1, 0.2]\nseed = [0, 1]\nsnapshots = [[0, 5]]\n"
    found = recipe.load(write(tmp_path, HEAD + grid)).configs
    assert [(c.lr, c.seed) for c in found] == [(0.1, 0), (0.1, 1), (0.2, 0), (0.2, 1)]
    assert all(c.snapshots == (0, 5) for c in found)


def test_options_of_the_model_add_up(tmp_path: Path) -> None:
    config = '[config]\n"model_options.width" = 8\n'
    grid = '[full]\n[[full.grid]]\n"model_options.depth" = [2, 3]\n'
    found = recipe.load(write(tmp_path, HEAD + config + grid)).configs
    assert [c.model_options for c in found] == [{"width": 8, "depth": 2}, {"width": 8, "depth": 3}]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[config]\nbatchsize = 3\n[full]\n[[full.grid]]\n", "did you mean 'batch_size'"),
        ("[ful]\n", "did you mean 'full'"),
        ("[quick]\n", "no scale 'full'; it has quick"),
        ("[full]\ngrids = 1\n", "did you mean 'grid'"),
        ("[config]\ndevice = 'cpu'\n[full]\n[[full.grid]]\n", "unknown setting"),
        ("[full]\n[[full.grid]]\noptimizer = 'adm'\n", "did you mean 'adam'"),
        ("[full]\n[[full.grid]]\nepochs = 'two'\n", "a setting is of the wrong type"),
        ("[full]\n[[full.grid]]\nsnapshots = [0, 10]\n", "a setting is of the wrong type"),
    ],
)
def test_a_recipe_is_strict(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(Error, match=message):
        recipe.load(write(tmp_path, HEAD + text))


def test_a_recipe_needs_its_texts(tmp_path: Path) -> None:
    with pytest.raises(Error, match=r"Expected `str`, got `int` - at `\$.statement`"):
        recipe.load(write(tmp_path, HEAD.replace('statement = "c"', "statement = 3") + "[full]"))


@pytest.mark.parametrize("sizes", [[100] * 5, [10_001]])
def test_a_recipe_has_a_limited_number_of_runs(tmp_path: Path, sizes: list[int]) -> None:
    """Refused before any is made."""
    names = ("seed", "epochs", "batch_size", "log_every", "trace_every")
    lists = "".join(f"{name} = {list(range(n))}\n" for name, n in zip(names, sizes, strict=False))
    path = write(tmp_path, HEAD + "[full]\n[[full.grid]]\n" + lists)
    with pytest.raises(Error, match=r"make 10,0.* runs; a recipe has 10,000 at most"):
        recipe.load(path)
    huge = tmp_path / "huge.toml"
    huge.write_bytes(b"#" * (1 << 20) + b"\n")
    with pytest.raises(FileRefused, match="more than the limit of 1048576"):
        recipe.load(str(huge))


def test_a_damaged_result_is_refused(tmp_path: Path) -> None:
    run = sweep.Run(Config(), tmp_path, 1)
    assert run.result is None
    (tmp_path / "result.json").write_text('{"train_loss": "low"}')
    with pytest.raises(FileRefused, match=r"result.json: Expected `float \| null`, got `str`"):
        run.result
    (tmp_path / "result.json").write_text('{"train_loss": null}')
    assert run.result == {"train_loss": None}


def test_unknown_recipes_and_files() -> None:
    with pytest.raises(Error, match="did you mean 'fromage/figure-1'"):
        recipe.load("fromage/figure1")
    with pytest.raises(Error, match=r"none\.toml does not exist"):
        recipe.load("none.toml")


def test_what_is_not_toml_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileRefused, match="is not TOML"):
        recipe.load(write(tmp_path, "title = "))


# --- names of runs ---------------------------------------------------------------------------


def test_a_run_is_named_by_what_decides_its_numbers(tmp_path: Path) -> None:
    found = recipe.load(write(tmp_path, RUNS))
    names = [run.path.name for run in sweep.runs(found, tmp_path, Options())]
    assert len(set(names)) == 4
    assert names == [run.path.name for run in sweep.runs(found, tmp_path, Options(fast=True))]
    other = tuple(dataclasses.replace(c, seed=1) for c in found.configs)
    again = sweep.runs(dataclasses.replace(found, configs=other), tmp_path, Options())
    assert not set(names) & {run.path.name for run in again}


def test_equal_runs_are_made_once(tmp_path: Path) -> None:
    found = recipe.load(write(tmp_path, RUNS))
    twice = dataclasses.replace(found, configs=found.configs * 2)
    assert len(sweep.runs(twice, tmp_path, Options())) == 4


# --- sweeps ----------------------------------------------------------------------------------


def command(path: str, out: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "npdrt", "sweep", path, "--out", str(out), "--json", *more]


def table(path: str, out: Path, *more: str) -> list[dict[str, Any]]:
    done = subprocess.run(command(path, out, *more), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows: list[dict[str, Any]] = json.loads(done.stdout)["runs"]
    return rows


@pytest.fixture(scope="module")
def through(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[dict[str, Any]]]:
    """A recipe, and the table of a sweep that ran through."""
    folder = tmp_path_factory.mktemp("sweep")
    path = write(folder, RUNS)
    return path, table(path, folder / "through")


def test_a_sweep_killed_three_times_gives_the_same_table(
    through: tuple[str, list[dict[str, Any]]], tmp_path: Path
) -> None:
    path, expected = through
    out, seen = tmp_path / "killed", 0
    for number in (signal.SIGKILL, signal.SIGINT, signal.SIGKILL):
        process = subprocess.Popen(command(path, out, "--jobs", "2"), stderr=subprocess.DEVNULL,
                                   stdout=subprocess.DEVNULL, start_new_session=True)  # fmt: skip
        while (steps := progress(out)) <= seen + 30 and process.poll() is None:
            time.sleep(0.02)
        seen = steps
        assert process.poll() is None, "the sweep ended before it was killed"
        if number == signal.SIGKILL:
            process.kill()  # its workers see that it is gone, save and end
        else:
            os.killpg(process.pid, number)
        process.wait()
        wait_for_workers(process.pid)
    assert not all(row["state"] == "done" for row in rows_of(path, out))
    assert table(path, out, "--jobs", "2") == expected


def test_a_lost_worker_of_dask_changes_no_number(
    through: tuple[str, list[dict[str, Any]]], tmp_path: Path
) -> None:
    """Its run goes on from its last checkpoint, on another worker or its successor."""
    pytest.importorskip("distributed")
    import psutil

    path, expected = through
    out = tmp_path / "dask"
    process = subprocess.Popen(command(path, out, "--dask", "local", "--jobs", "1"), text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
    while progress(out) < 30:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    children = psutil.Process(process.pid).children(recursive=True)
    workers = [child for child in children if "spawn_main" in " ".join(child.cmdline())]
    assert workers
    for worker in workers:
        worker.kill()
    rows, told = process.communicate(timeout=300)
    assert process.returncode == 0, told
    assert json.loads(rows)["runs"] == expected


@pytest.mark.soak
def test_two_clusters_share_a_directory(
    through: tuple[str, list[dict[str, Any]]], tmp_path: Path
) -> None:
    """Each run is made by one of them; both print the whole table."""
    pytest.importorskip("distributed")
    path, expected = through
    words = command(path, tmp_path / "out", "--dask", "local", "--jobs", "1")
    both = [subprocess.Popen(words, text=True, stdout=subprocess.PIPE) for _ in range(2)]
    assert [json.loads(one.communicate(timeout=300)[0])["runs"] for one in both] == [expected] * 2
    for history in (tmp_path / "out").glob("runs/*/log.jsonl"):
        assert [r["event"] for r in log.read(history)].count("start") == 1


def test_a_sweep_whose_local_workers_are_all_lost_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dask does not replace a worker that is killed while it starts; the sweep waited for ever."""
    distributed = pytest.importorskip("distributed")
    never = SimpleNamespace(done=lambda: False)
    lost = SimpleNamespace(scheduler_info={"workers": {}})
    client = SimpleNamespace(cluster=lost, submit=lambda *args, **options: never)
    monkeypatch.setattr(cluster, "client_of", lambda *args: nullcontext(client))
    monkeypatch.setattr(distributed, "Event", lambda *args, **options: None)
    monkeypatch.setattr(cluster, "GONE", 0.3)
    found = recipe.load(write(tmp_path, RUNS))
    with pytest.raises(Error, match="Dask has lost all local workers; give the same command"):
        sweep.sweep(found, tmp_path / "out", Options(dask="local"))


def test_a_scheduler_that_is_not_there(tmp_path: Path) -> None:
    pytest.importorskip("distributed")
    words = command(write(tmp_path, RUNS), tmp_path / "out", "--dask", "nonsense")
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "no Dask scheduler answers at nonsense" in done.stderr
    assert "or give --dask local" in done.stderr


def wait_for_workers(group: int) -> None:
    """Until no process of the group is left; a killed sweep leaves none behind."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    raise AssertionError("workers outlive their sweep")


def progress(out: Path) -> int:
    """Steps at the checkpoints of all runs."""
    logs = [log.read(path) for path in out.glob("runs/*/log.jsonl")]
    return sum(max((r["step"] for r in records), default=0) for records in logs)


def rows_of(path: str, out: Path) -> list[dict[str, Any]]:
    from npdrt.cli.sweep import row

    return [row(run) for run in sweep.runs(recipe.load(path), out, Options())]


def test_shards_give_the_whole(through: tuple[str, list[dict[str, Any]]], tmp_path: Path) -> None:
    path, expected = through
    first = table(path, tmp_path / "out", "--shard", "0/2")
    assert [row["state"] for row in first] == ["done", "not finished"] * 2
    assert table(path, tmp_path / "out", "--shard", "1/2") == expected


def test_a_finished_sweep_starts_nothing(
    through: tuple[str, list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, expected = through
    monkeypatch.setattr(sweep, "_work", None)  # which no worker could be given
    out = Path(path).parent / "through"
    result = CliRunner().invoke(cli, ["sweep", path, "--out", str(out), "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["runs"] == expected
    manifest = json.loads((out / "manifest.json").read_text())
    assert [run["run"] for run in manifest["runs"]] == [row["run"] for row in expected]


def test_the_table_leaves_out_what_all_runs_share(
    through: tuple[str, list[dict[str, Any]]],
) -> None:
    path, _ = through
    out = Path(path).parent / "through"
    result = CliRunner().invoke(cli, ["sweep", path, "--out", str(out)])
    heading = result.output.splitlines()[0].split()
    assert heading[:4] == ["run", "optimizer", "lr", "state"]


def test_a_run_that_diverges_is_finished(tmp_path: Path) -> None:
    text = RUNS.replace("[0.02, 0.01]", "1e30").replace('["fromage", "sgd"]', '"sgd"')
    rows = table(write(tmp_path, text), tmp_path / "out")
    assert "is not finite" in rows[0]["state"]


def test_a_run_that_fails_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, RUNS)
    first = sweep.runs(recipe.load(path), tmp_path / "out", Options())[0]
    first.path.mkdir(parents=True)
    (first.path / "checkpoint.h5").write_bytes(b"nonsense")
    done = subprocess.run(
        command(path, tmp_path / "out"), capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert f"run {first.path.name}" in done.stderr
    states = [row["state"] for row in rows_of(path, tmp_path / "out")]
    assert states == ["not finished", "done", "done", "done"]


@pytest.mark.parametrize("shard", ["2/2", "1", "a/b", "0/0", "-1/2"])
def test_shards_out_of_range(shard: str) -> None:
    result = CliRunner().invoke(cli, ["sweep", "fromage/figure-1", f"--shard={shard}"])
    assert result.exit_code == 2
    assert "0 <= I < N" in result.output
