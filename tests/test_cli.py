"""The command line: its help, exit codes, streams and terminals, and that nothing is half done."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import pty
import re
import select
import shlex
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import h5py
import numpy as np
import pytest
from click.testing import CliRunner, Result
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import npdrt
from npdrt import optim, store
from npdrt.cli import COMMANDS, cli, doctor
from npdrt.data.catalogue import sources
from npdrt.models.initialisation import SCHEMES
from npdrt.models.mlp import NONLINEARITIES
from npdrt.store import log, trace

ROOT = Path(__file__).parents[1]
CODES = {0, 1, 2, 3, 4, 130, 143}
ESCAPE = "\x1b"
SHORT = shlex.split("train --data blobs.npz --width 4 --batch-size 8 --epochs 2 --out")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small data set and a run trained on it; tests leave it as it is."""
    folder = tmp_path_factory.mktemp("cli")
    rng = np.random.default_rng(3)
    np.savez(folder / "blobs.npz", x=rng.normal(size=(40, 5)), y=rng.integers(0, 3, 40))
    done = run(*SHORT, "run", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """That folder as the current one."""
    monkeypatch.chdir(folder)
    return folder


def environment(**changes: str) -> dict[str, str]:
    own = {"PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1", "GIT_DIR": os.devnull}
    kept = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR", "TERM")}
    return {**kept, **own, "TERM": "xterm-256color", **changes}


def run(*words: Any, cwd: Path, **changes: str) -> subprocess.CompletedProcess[str]:
    """`npdrt words` as a process of its own."""
    command = [sys.executable, "-m", "npdrt", *map(str, words)]
    return subprocess.run(
        command, cwd=cwd, env=environment(**changes), capture_output=True, text=True, timeout=120
    )


def call(*words: Any) -> Result:
    """`npdrt words` in this process."""
    result = CliRunner().invoke(cli, [str(word) for word in words], prog_name="npdrt")
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def commands() -> Iterator[tuple[list[str], click.Command]]:
    """Every command and subcommand with the words that call it."""
    for name in COMMANDS:
        command = cli.get_command(click.Context(cli), name)
        assert command is not None
        yield [name], command
        if isinstance(command, click.Group):
            yield from (([name, n], c) for n, c in command.commands.items())


# --- help and usage -------------------------------------------------------------------------


def test_help() -> None:
    result = call("--help")
    assert result.exit_code == 0
    assert result.output.startswith("Usage: npdrt [OPTIONS] COMMAND [ARGS]...\n")
    assert "129, 130 and 143 stopped by a signal after saving." in " ".join(result.output.split())
    listed = re.findall(r"^  ([\w-]+) {2,}(.+)$", result.output.partition("Commands:")[2], re.M)
    assert dict(listed) == COMMANDS
    assert call("-h").output == result.output
    assert call().output == result.output
    assert call().exit_code == 2


@pytest.mark.parametrize(("words", "command"), list(commands()), ids=lambda x: str(x))
def test_help_of_each_command(words: list[str], command: click.Command) -> None:
    """Every option is in the help with a description, every argument in the usage line."""
    result = call(*words, "--help")
    assert result.exit_code == 0
    lines = result.output.splitlines()
    assert lines[0].startswith(f"Usage: npdrt {' '.join(words)} ")
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, parameter.name
            for name in (*parameter.opts, *parameter.secondary_opts):
                assert re.search(rf"^ .*{re.escape(name)}\b", result.output, re.M), name
        else:
            assert str(parameter.name).upper() in lines[0]
    assert max(map(len, lines)) <= 80


def test_help_of_train_in_full() -> None:
    """The choices and defaults a reader looks for."""
    text = " ".join(call("train", "--help").output.split())
    for expected in (
        "--model NAME One of mlp, resnet18, ",
        "Or path/to/file.py:Class. [default: mlp]",
        "--depth INTEGER RANGE Weight matrices L. [default: 2; x>=1]",
        "--normalisation, --normalization [",
        f"--nonlinearity [{'|'.join(NONLINEARITIES)}] [default: relu]",
        f"--init [{'|'.join(SCHEMES)}] Initialisation. [default: he]",
        f"--optimizer, --optimiser NAME One of {', '.join(optim.RULES)}. ",
        "lars_lesion: Fromage without its prefactor. Or path/to/file.py:rule. [default: fromage]",
        "--lr, --learning-rate TEXT Learning rate, or auto. [default: auto]",
        "--batch-size, --batch INTEGER RANGE Examples of a step. [default: 32; x>=1]",
        "--nesterov / --no-nesterov",
        "[default: sgd no-nesterov, muon nesterov]",
        "constant | exponential:FACTOR | milestones:EPOCH,EPOCH,...:FACTOR | linear[:END] | ",
        "--betas NUMBER,NUMBER adam, adamw, lamb: shares of the two moments that are kept",
        "--momentum FLOAT sgd, lars",
        ": share of the velocity that is kept",
        "[default: sgd 0, lars 0.9",
        "adam: decay as in AdamW, with --weight-",
        "--dtype [float32|float64] [default: float32]",
        "--resume Go on with the run in --out.",
        "--resume-or-start Go on with the run in --out, or start it: ",
    ):
        assert expected.replace("; x>=1]", "") in text.replace("; x>=1]", ""), expected


def test_version() -> None:
    assert call("--version").output == f"npdrt, version {npdrt.__version__}\n"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("trian", "No such command 'trian'. Did you mean 'train'?"),
        ("zzz", "No such command 'zzz'.\n"),
        ("train --dept 3", "No such option '--dept'"),
        ("train --epoch 3", "--epochs"),
        ("train --optimizer fromagr", "'fromagr' is unknown. Did you mean 'fromage'?"),
        ("train --optimiser adm", "'adm' is unknown. Did you mean 'adam'?"),
        ("train --model mpl", "'mpl' is unknown. Did you mean 'mlp'?"),
        ("train --nonlinearity rellu", "'rellu' is unknown. Did you mean 'relu'?"),
        ("train --init zero", "'zero' is unknown. Use one of he, orthogonal, xavier, authors, "),
        ("train --dtype float16", "'float16' is unknown. Did you mean 'float"),
        ("train --data digit", "unknown data set 'digit'; did you mean 'digits'?"),
        ("train --schedule cosin", "unknown schedule 'cosin'; expected constant | "),
        ("train --set dpeth=3", "unknown option of model mlp: 'dpeth'; did you mean 'depth'?"),
        ("train --set depth", "'depth' is not NAME=VALUE."),
        ("train --set depth=deep", "option depth of model mlp: expected int; got 'deep'"),
        ("train --momentum 0.9", "fromage takes no --momentum; it takes --norm-bound"),
        ("train --lr fast", "'fast' is neither a number nor auto."),
        ("train --lr nan", "Error: --lr must be a finite number >= 0; got nan"),
        ("train --clip 0", "Error: --clip must be a finite norm above 0; got 0.0"),
        ("train --eps -1 --optimizer adam", "Error: --eps must be a finite number >= 0"),
        ("train --norm-bound 0 --epochs 1", "--norm-bound must be above 0 in a run"),
        ("explain --momentum 0.9", "fromage takes no --momentum; it takes --norm-bound"),
        ("train --depth 0", "0 is not in the range x>=1"),
        ("train --depth two", "'two' is not a valid integer"),
        ("train --device tpu", "unknown device 'tpu'; use auto, cpu, cuda or cuda:N"),
        ("train --label-smoothing 1", "Error: --label-smoothing must lie in [0, 1); got 1.0"),
        ("train --set width=4 --width 6", "--set width and --width name the same field"),
        ("train --resume", "--resume needs --out, the directory of the run."),
        ("train --model x.py:Net", "x.py does not exist"),
        ("train extra", "Error: extra does not exist\n"),
        (
            "train --resume --out fresh",
            "fresh holds no run to go on with; leave out --resume to st",
        ),
        ("train --betas 0.9 --optimizer adam", "'0.9' is not 2 numbers with commas, as 0.9,0.99."),
        ("train --betas 0.9 0.99", "'0.9' is not 2 numbers with commas"),
        ("export . --to npz --output no.npz", ". holds no run: it has no checkpoint.h5\n"),
        ("explain .", ". holds no run: it has no checkpoint.h5\n"),
        ("train --out run", "run already exists; give --resume to go on with it, or another"),
        ("train --out blobs.npz/run", "blobs.npz/run"),
        ("train --out blobs.npz", "blobs.npz is not a directory; give another --out"),
        ("train --resume --out blobs.npz", "blobs.npz is not a directory"),
        ("train --out /proc/x", "/proc/x cannot be made there; give another place"),
        ("show", "Missing argument 'PATH'."),
        ("show nowhere", "Error: nowhere does not exist\n"),
        ("show run --sha256 abc", "'abc' is not a SHA-256, 64 hex digits."),
        ("perturb nowhere", "Error: nowhere does not exist\n"),
        ("plot nowhere", "nowhere does not exist"),
        ("distance run nowhere", "Error: nowhere does not exist\n"),
        ("explain nowhere", "Error: nowhere does not exist\n"),
        ("convert nowhere new", "Error: nowhere does not exist\n"),
        ("audit nowhere.npz --rule sgd", "Error: nowhere.npz does not exist\n"),
        ("audit nowhere.py:update", "Error: nowhere.py does not exist\n"),
        ("vectors verify nowhere", "Error: nowhere does not exist\n"),
        ("sweep nowhere.toml", "Error: nowhere.toml does not exist\n"),
        ("reproduce nowhere.toml", "Error: nowhere.toml does not exist\n"),
        ("train --data nowhere.npz", "Error: nowhere.npz does not exist\n"),
        ("train --data folder:nowhere", "Error: nowhere does not exist\n"),
        ("train --data text:nowhere", "Error: nowhere does not exist\n"),
        ("export nowhere --to csv", "Error: nowhere does not exist\n"),
        ("export nowhere --to npz", "Error: nowhere does not exist\n"),
        ("export run --to npz --output no/x", "Error: no does not exist\n"),
        ("export run", "Missing option '--to'"),
        ("export run --to nzp", "'nzp' is unknown. Did you mean 'npz'?"),
        ("export blobs.npz --to csv", "blobs.npz is not a directory"),
        ("data verify mnits", "unknown data set 'mnits'; did you mean 'mnist'?"),
        ("data lst", "No such command 'lst'."),
        ("completion bsh", "'bsh' is unknown. Did you mean 'bash'?"),
    ],
)
def test_usage_errors(words: str, expected: str, here: Path) -> None:
    """Exit code 2, the reason on stderr, nothing on stdout, nothing written."""
    before = sorted(here.rglob("*"))
    result = call(*words.split())
    assert result.exit_code == 2, result.output
    assert expected in result.stderr
    assert result.stdout == ""
    assert sorted(here.rglob("*")) == before


def test_data_that_cannot_be_fetched() -> None:
    """Only what `fetch` takes is offered."""
    result = call("data", "fetch", "mnits")
    assert result.exit_code == 2
    assert "unknown data set 'mnits'; did you mean 'mnist'? known: " in result.stderr
    assert "FILE.npz" not in result.stderr
    assert "wikitext-2" not in result.stderr


def test_resume_of_no_run_and_of_a_finished_one(here: Path, tmp_path: Path) -> None:
    """A misspelt --out does not start a run; a script may ask for either."""
    run = tmp_path / "run"
    assert call(*SHORT, run, "--resume", "-q").exit_code == 2
    assert not run.exists()
    started, again = (call(*SHORT, run, "--resume-or-start", "-q") for _ in range(2))
    assert started.stdout.startswith("done: 10 steps in ")
    assert (again.exit_code, again.stderr) == (0, "")
    assert again.stdout.startswith("already finished: 10 steps in ")
    assert call(*SHORT, run, "--resume", "-q").stdout.startswith("already finished")
    needs = call("train", "--resume-or-start")
    assert "--resume-or-start needs --out" in needs.stderr


def test_settings_that_hardly_anybody_means(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("npdrt.train.cautions.cores", lambda: 1)
    odd = ["--epochs", "1", "--threads", "2", "--schedule", "exponential:2", "-q"]
    result = call(*SHORT, tmp_path / "run", *odd)
    assert result.exit_code == 0
    threads, schedule = result.stderr.splitlines()
    assert re.match(
        r"Warning: threads 2: this machine has 1 core, and BLAS runs \d+ threads?; more", threads
    )
    assert schedule.startswith("Warning: schedule exponential:2: the factor is above 1")
    usual = ["--epochs", "1", "--threads", "1", "--schedule", "exponential:0.5", "-q"]
    assert call(*SHORT, tmp_path / "usual", *usual).stderr == ""


# --- exit codes, by real processes ----------------------------------------------------------


def test_exit_code_0_and_the_summary(folder: Path, tmp_path: Path) -> None:
    done = run(*SHORT, tmp_path / "run", cwd=folder)
    assert done.returncode == 0
    assert re.fullmatch(
        r"done: 10 steps in \d+\.\d s, 32 parameters, fromage lr 0\.01\n"
        r"train  accuracy \d\.\d{4}  loss \S+\n"
        rf"run    {tmp_path}/run\n"
        rf"next: npdrt show {tmp_path}/run\n",
        done.stdout,
    )
    assert done.stderr == "" or done.stderr.startswith("device: cuda:0 (")
    asked = run(*SHORT, tmp_path / "asked", "--device", "auto", cwd=folder)
    assert re.fullmatch(r"device: (cpu|cuda:0) \(.+\)\n", asked.stderr)
    quiet = run(*SHORT, tmp_path / "quiet", "--device", "auto", "-q", cwd=folder)
    assert quiet.stderr == ""


def test_exit_code_1(folder: Path, tmp_path: Path) -> None:
    words = [*SHORT, tmp_path / "run", "--optimizer", "sgd", "--lr", "1e38", "-q"]
    done = run(*words, "--json", cwd=folder)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.search(r"^Error: step \d+: .+ is not finite\. The last good checkpoint", done.stderr)
    np.savez(tmp_path / "x.npz", x=np.zeros(2))
    missing = run("data", "verify", "mnist", "--data-dir", tmp_path, cwd=tmp_path, NPDRT_DATA="",
                  XDG_CACHE_HOME=str(tmp_path))  # fmt: skip
    assert missing.returncode == 1
    assert "missing or wrong; run npdrt data fetch mnist" in missing.stderr


def test_exit_code_2(folder: Path) -> None:
    done = run("train", "--dept", "3", cwd=folder)
    assert (done.returncode, done.stdout) == (2, "")
    assert "--depth" in done.stderr


def test_exit_code_3(folder: Path, tmp_path: Path) -> None:
    damaged = bytearray((folder / "run" / "checkpoint.h5").read_bytes())
    damaged[-5] ^= 1
    (tmp_path / "damaged.h5").write_bytes(damaged)
    done = run("show", "damaged.h5", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (3, "")
    assert "damaged.h5: has data with SHA-256" in done.stderr
    assert run("export", "damaged.h5", "--to", "npz", cwd=tmp_path).returncode == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged.h5"]
    (tmp_path / "text.npz").write_text("no zip file")
    assert run("train", "--data", "text.npz", "--out", "run", cwd=tmp_path).returncode == 3
    assert not (tmp_path / "run").exists()


def test_exit_code_4(tmp_path: Path) -> None:
    """No GPU (none is visible to the process), and no data."""
    done = run("train", "--device", "cuda", "--out", "run", cwd=tmp_path, CUDA_VISIBLE_DEVICES="")
    assert (done.returncode, done.stdout) == (4, "")
    assert "CuPy" in done.stderr or "CUDA" in done.stderr
    empty = {"NPDRT_DATA": "", "XDG_CACHE_HOME": str(tmp_path / "cache"), "HOME": str(tmp_path)}
    done = run("train", "--data", "mnist", "--out", "run", cwd=tmp_path, **empty)
    assert (done.returncode, done.stdout) == (4, "")
    assert "data set 'mnist' is not on this machine; looked in" in done.stderr
    assert "npdrt data fetch mnist" in done.stderr
    assert not (tmp_path / "run").exists()


def test_exit_code_130(folder: Path, tmp_path: Path) -> None:
    """Ctrl-C on a terminal: the run is saved, its summary says how to go on."""
    words = [*SHORT, tmp_path / "run", "--epochs", "100000", "--checkpoint-every", "0", "--json"]
    words += ["--trace-every", "0", "--log-every", "1"]
    command = [sys.executable, "-m", "npdrt", *map(str, words)]
    with subprocess.Popen(
        command, cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        journal = tmp_path / "run" / "log.jsonl"
        while not journal.exists() or journal.read_bytes().count(b"\n") < 5:
            assert process.poll() is None
        process.send_signal(2)
        out, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    summary = json.loads(out)
    assert summary["stopped"] == 2
    assert 0 < summary["step"] < summary["steps"] == 500000
    stored = store.load(tmp_path / "run" / "checkpoint.h5").meta["progress"]["step"]
    assert stored == summary["step"]


def test_not_enough_memory(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run_out(*words: Any, **settings: Any) -> None:
        raise MemoryError("Unable to allocate 1 PiB")

    monkeypatch.setattr("npdrt.cli.train.train", run_out)
    result = call("train", "--out", "big")
    assert result.exit_code == 4
    assert result.stderr.endswith("Error: not enough memory: Unable to allocate 1 PiB\n")
    monkeypatch.undo()
    monkeypatch.chdir(here)
    result = call("train", "--width", "1" + "0" * 20, "--out", "big")
    assert result.exit_code == 4
    assert "not enough memory: Python int too large" in result.stderr
    assert not (here / "big").exists()


# --- streams and terminals ------------------------------------------------------------------


def test_json_is_one_object_and_nothing_else(folder: Path, tmp_path: Path) -> None:
    for words in (
        [*SHORT, tmp_path / "run", "--json"],
        ["train", "--out", tmp_path / "run", "--resume", "--json"],
        ["show", "run", "--json"],
        ["show", "run/trace.h5", "--json"],
        ["data", "list", "--json"],
        ["data", "verify", "digits", "--json"],
        ["doctor", "--json"],
    ):
        done = run(*words, cwd=folder)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("\n") == 1
        assert isinstance(json.loads(done.stdout, parse_constant=lambda c: pytest.fail(c)), dict)


def test_summary_as_json(here: Path, tmp_path: Path) -> None:
    summary = json.loads(call(*SHORT, tmp_path / "run", "--optimiser", "adam", "--json").stdout)
    assert summary.pop("seconds") > 0
    assert 0 < summary.pop("train_loss") < 2
    assert 0 <= summary.pop("train_accuracy") <= 1
    assert summary == {
        "run": str(tmp_path / "run"), "step": 10, "steps": 10, "epochs": 2, "parameters": 32,
        "optimizer": "adam", "lr": 0.001, "stopped": 0, "test_loss": None, "test_accuracy": None,
        "train_perplexity": None, "test_perplexity": None,
    }  # fmt: skip


def on_pty(words: list[Any], cwd: Path, stdout: bool = True, **changes: str) -> tuple[str, str]:
    """What a process writes to a terminal that is its stderr, and its stdout or not; exit 0."""
    master, slave = pty.openpty()
    command = [sys.executable, "-m", "npdrt", *map(str, words)]
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env=environment(**changes),
        stderr=slave,
        stdout=slave if stdout else subprocess.PIPE,
    )
    os.close(slave)
    drawn = b""
    while select.select([master], [], [], 120)[0]:
        try:
            part = os.read(master, 65536)
        except OSError:  # Linux: the other end is closed
            break
        if not part:
            break
        drawn += part
    out = process.communicate(timeout=60)[0] if not stdout else b""
    assert process.wait(timeout=60) == 0, drawn
    os.close(master)
    return drawn.decode(), (out or b"").decode()


def test_progress_on_a_terminal_only(folder: Path, tmp_path: Path) -> None:
    """The bar is on a stderr that is a terminal; stdout stays clean, the cursor visible."""
    drawn, out = on_pty([*SHORT, tmp_path / "bar"], folder, stdout=False)
    assert "training" in drawn
    assert "100%" in drawn
    assert re.search(r"loss \d\.\d{4}  accuracy \d\.\d{4}", drawn)
    assert out.startswith("done: 10 steps")
    assert ESCAPE not in out
    assert "[?25" not in drawn
    drawn, _ = on_pty([*SHORT, tmp_path / "quiet", "-q"], folder, stdout=False)
    assert drawn == ""
    piped = run(*SHORT, tmp_path / "pipe", cwd=folder)
    assert "training" not in piped.stderr
    assert ESCAPE not in piped.stderr + piped.stdout


def test_progress_of_a_resumed_run(folder: Path, tmp_path: Path) -> None:
    words = [*SHORT, tmp_path / "run", "--schedule", "constant"]
    assert run(*words, cwd=folder).returncode == 0
    drawn, _ = on_pty([*words, "--resume", "--epochs", "4"], folder)
    shares = [int(share) for share in re.findall(r"(\d+)%", drawn)]
    assert shares[0] >= 50
    assert shares[-1] == 100


def test_colour_on_a_terminal(folder: Path, tmp_path: Path) -> None:
    drawn, _ = on_pty([*SHORT, tmp_path / "run"], folder)
    assert f"{ESCAPE}[1mdone: 10 steps" in drawn
    for number, plain in enumerate(({"NO_COLOR": "1"}, {"TERM": "dumb"})):
        drawn, _ = on_pty([*SHORT, tmp_path / f"plain-{number}"], folder, **plain)
        assert "done: 10 steps" in drawn
        assert ESCAPE not in drawn


def test_warning_is_coloured_on_a_terminal_only(folder: Path, tmp_path: Path) -> None:
    words = ["train", "--out", tmp_path / "run", "--resume"]
    for plain, coloured in (({}, True), ({"NO_COLOR": "1"}, False)):
        assert run(*SHORT, tmp_path / "run", cwd=folder).returncode in (0, 2)
        (tmp_path / "run" / "checkpoint.h5").write_bytes(b"")
        drawn, _ = on_pty(words, folder, **plain)
        assert (f"{ESCAPE}[33mWarning: " in drawn) == (ESCAPE in drawn) == coloured
        assert "Resuming from the previous checkpoint instead." in drawn


def test_broken_pipe(folder: Path) -> None:
    """`npdrt show run | head -1`, the reader gone before the text is written."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "npdrt", "show", "run"]
    done = subprocess.run(
        command, cwd=folder, env=environment(), stdout=write, stderr=subprocess.PIPE, text=True
    )
    os.close(write)
    assert done.stderr == ""
    shell = f"{sys.executable} -m npdrt show run | head -1"
    done = subprocess.run(
        shell, shell=True, cwd=folder, env=environment(), capture_output=True, text=True
    )
    assert done.stdout.startswith("run/checkpoint.h5: checkpoint, sha256 ")
    assert done.stderr == ""


# --- show -----------------------------------------------------------------------------------


def test_show_a_run(here: Path) -> None:
    """The whole text of a run directory, which is that of its checkpoint."""
    result = call("show", "run")
    lines = result.output.splitlines()
    made = npdrt.load("run/checkpoint.h5").meta["provenance"]
    assert lines[0].startswith("run/checkpoint.h5: checkpoint, sha256 ")
    assert lines[1] == "step 10 of 10, epoch 2: finished"
    assert lines[2].startswith("train: loss ")
    assert lines[2].endswith("(mean of the last epoch's minibatches)")
    assert lines[3].startswith("config: arithmetic fast, augment none, batch_size 8")
    assert "convolutions npdrt, data blobs" in lines[3]
    assert "model mlp, model_options (bias=False depth=2 init=he inputs=5 " in lines[3]
    assert "optimizer fromage, precision ieee, schedule linear, seed 0" in lines[3]
    assert lines[4].startswith(f"made by: npdrt {npdrt.__version__}, Python ")
    assert f"numpy {np.__version__}" in lines[4]
    assert lines[5].startswith(f"on: {made['cpu']}, ")
    assert "device cpu" in lines[5]
    assert "train --data blobs.npz --width 4" in lines[6]
    assert lines[7] == ""
    assert lines[8].split() == ["array", "dtype", "shape", "norm", "min", "max"]
    rows = [line.split() for line in lines[9:-2]]
    assert [row[:3] for row in rows] == [
        ["params/layers/00/weight", "float32", "4x5"],
        ["params/layers/01/weight", "float32", "3x4"],
        ["state/step", "int64", "0-d"],
    ]
    assert rows[2][3:] == ["10", "10", "10"]
    history = "\nhistory: npdrt show run/trace.h5\n"
    assert call("show", "run/checkpoint.h5").output + history == result.output


def test_show_a_trace(here: Path) -> None:
    lines = call("show", "run/trace.h5").output.splitlines()
    assert lines[0].startswith("run/trace.h5: trace, sha256 ")
    header = lines[2].split()
    assert header == ["epoch", "step", "lr", *(f"{p}_{q}" for p in ("train", "test")
                                               for q in ("loss", "accuracy"))]  # fmt: skip
    epochs = [r for r in log.read(here / "run" / "log.jsonl") if r["event"] == "epoch"]
    for line, record in zip(lines[3:5], epochs, strict=True):
        assert line.split()[:2] == [str(record["epoch"]), str(record["step"])]
        assert float(line.split()[3]) == pytest.approx(record["train_loss"], rel=1e-5)
        assert line.split()[5:] == ["nan", "nan"]
    shown = json.loads(call("show", "run/trace.h5", "--json").stdout)
    assert shown["meta"]["kind"] == "trace"
    assert shown["arrays"]["layers/cosine"]["shape"] == [2, 2]
    assert shown["arrays"]["history/test_loss"]["min"] is None


def test_show_what_is_no_run(here: Path, tmp_path: Path) -> None:
    """Checkpoints and containers that other programs wrote with npdrt."""
    arrays = {"w": np.array([1e200, -1e200]), "none": np.zeros((0, 2))}
    npdrt.save(tmp_path / "own.h5", arrays, meta={"run": "third", "by": "hand"})
    text = call("show", tmp_path / "own.h5").output
    assert "meta: {'by': 'hand', 'run': 'third'}" in text
    assert re.search(r"^params/w +float64 +2 +inf +-1e\+200 +1e\+200$", text, re.M)
    assert re.search(r"^params/none +float64 +0x2 +0$", text, re.M)
    npdrt.save(tmp_path / "bare.h5", {"w": np.ones(2)})
    assert "meta" not in call("show", tmp_path / "bare.h5").output
    store.container.write(tmp_path / "other.h5", {"w": np.ones(2)}, {})
    assert "other.h5: unknown kind, sha256" in call("show", tmp_path / "other.h5").output


def test_show_nonsense(here: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("nonsense")
    (tmp_path / "empty").write_bytes(b"")
    with h5py.File(tmp_path / "plain.h5", "w") as file:
        file["w"] = np.ones(3)
    for name in ("text", "empty", "plain.h5"):
        result = call("show", tmp_path / name)
        assert (result.exit_code, result.stdout) == (3, "")
        assert str(tmp_path / name) in result.stderr
    assert call("show", "run/log.jsonl").exit_code == 3
    result = call("train", "--out", tmp_path / "text" / "run", "--epochs", "1")
    assert result.exit_code == 2
    said = f"Error: {tmp_path / 'text' / 'run'}: Not a directory; give another path\n"
    assert result.stderr.endswith(said)
    (tmp_path / "folder").mkdir()
    result = call("show", tmp_path / "folder")
    assert result.exit_code == 2
    assert "folder holds no run: it has no checkpoint.h5" in result.stderr
    shown = json.loads(call("show", "run", "--json").stdout)
    assert call("show", "run", "--sha256", shown["sha256"]).exit_code == 0
    result = call("show", "run", "--sha256", "0" * 64)
    assert result.exit_code == 3
    assert f"{'0' * 64} was expected" in result.stderr


# --- export ---------------------------------------------------------------------------------


def test_export_npz(here: Path, tmp_path: Path) -> None:
    target = tmp_path / "w.npz"
    result = call("export", "run", "--to", "npz", "--output", target)
    assert result.output == f"{target}\n"
    params = npdrt.load("run/checkpoint.h5").params
    with np.load(target, allow_pickle=False) as found:
        assert list(found) == list(params)
        for name, value in params.items():
            assert found[name].dtype == value.dtype
            np.testing.assert_array_equal(found[name], value)


def test_export_safetensors(here: Path, tmp_path: Path) -> None:
    numpy = pytest.importorskip("safetensors.numpy")
    target = tmp_path / "w.safetensors"
    words = ("export", "run/checkpoint.h5", "--to", "safetensors", "--output", target)
    assert call(*words).exit_code == 0
    params = npdrt.load("run/checkpoint.h5").params
    found = numpy.load_file(target)
    assert found.keys() == params.keys()
    for name, value in params.items():
        assert (found[name].dtype, found[name].tobytes()) == (value.dtype, value.tobytes())


def test_export_has_the_buffers_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its running statistics a network could not be evaluated."""
    monkeypatch.chdir(tmp_path)
    words = ("--model", "resnet18", "--width", "1", "--batch-size", "128", "--epochs", "0")
    assert call("train", *words, "--out", "run", "-q").exit_code == 0
    assert call("export", "run", "--to", "npz").exit_code == 0
    held = npdrt.load("run/checkpoint.h5")
    with np.load("run.npz") as found:
        assert found.keys() == held.params.keys() | held.buffers.keys()
        for name, value in held.buffers.items():
            np.testing.assert_array_equal(found[name], value)


def test_export_keeps_every_name_and_shape(tmp_path: Path) -> None:
    """Also `file`, which is a keyword of np.savez, and arrays of no axes."""
    params = {"file": np.ones((2, 3)), "gain": np.array(2.5, np.float32), "none": np.ones((0, 4))}
    npdrt.save(tmp_path / "own.h5", params, buffers={"arr_0": np.asfortranarray(np.eye(2))})
    expected = npdrt.load(tmp_path / "own.h5")
    for form in ("npz", "safetensors"):
        assert call("export", tmp_path / "own.h5", "--to", form).exit_code == 0
    with np.load(tmp_path / "own.npz") as found:
        packed = dict(found)
    flat = pytest.importorskip("safetensors.numpy").load_file(tmp_path / "own.safetensors")
    for arrays in (packed, flat):
        assert arrays.keys() == {*expected.params, *expected.buffers}
        for name, value in (expected.params | expected.buffers).items():
            assert (arrays[name].shape, arrays[name].dtype) == (value.shape, value.dtype)
            np.testing.assert_array_equal(arrays[name], value)
    again = call("export", tmp_path / "own.h5", "--to", "npz", "--output", tmp_path / "again.npz")
    assert again.exit_code == 0
    assert (tmp_path / "again.npz").read_bytes() == (tmp_path / "own.npz").read_bytes()


def test_export_refuses_two_arrays_of_one_name(tmp_path: Path) -> None:
    npdrt.save(tmp_path / "own.h5", {"w": np.ones(2)}, buffers={"w": np.zeros(2)})
    found = call("export", tmp_path / "own.h5", "--to", "npz")
    assert found.exit_code == 2
    assert "holds a parameter and a buffer named w" in found.stderr
    assert not (tmp_path / "own.npz").exists()


def test_export_csv_has_no_formulas(tmp_path: Path) -> None:
    """Text that a spreadsheet would run is quoted; numbers are numbers."""
    record = {"event": "epoch", "step": 1, "epoch": 1, "lr": -1.5, "train_loss": None}
    odd = {"=a": "=cmd()", "b": "+1", "c": "-1", "d": "@x", "e": "\t=1", "f": "plain", "g": -2}
    (tmp_path / "log.jsonl").write_text(json.dumps(record | odd) + "\n")
    assert call("export", tmp_path, "--to", "csv", "--output", tmp_path / "o.csv").exit_code == 0
    (row,) = csv.DictReader(io.StringIO((tmp_path / "o.csv").read_text()))
    shown = ("'=cmd()", "'+1", "'-1", "'@x", "'\t=1", "plain", "-2")
    assert tuple(row[name] for name in ("'=a", *"bcdefg")) == shown
    assert (row["lr"], row["train_loss"]) == ("-1.5", "")


# --- what files may say to a terminal ---------------------------------------------------------

STEERING = "\x1b[2J\x9b1A\x07\u202e\u2028\ud800"


def test_text_of_files_cannot_steer_a_terminal(tmp_path: Path) -> None:
    """Names, titles, provenance and messages; a cell of a table is one line."""
    meta = {"by": f"hand{STEERING}", "odd\nname": "\nnext"}
    npdrt.save(tmp_path / "own.h5", {"w": np.ones(2)}, meta=meta)
    tables = [{"title": f"t{STEERING}", "columns": ["a"], "rows": [[f"x\ny{STEERING}"]]}]
    texts = dict.fromkeys(("name", "scale", "title", "source", "statement", "note"), STEERING)
    study = {"kind": "study", **texts, "tables": tables, "notes": [STEERING]}
    store.container.write(tmp_path / "study.h5", {}, study)
    odd = tmp_path / f"gone{STEERING[:-1]}"
    for words in (("show", tmp_path / "own.h5"), ("show", tmp_path / "study.h5"), ("show", odd)):
        found = call(*words)
        said = found.stdout + found.stderr
        assert "\\x1b[2J\\x9b1A\\x07\\u202e\\u2028" in said
        assert not set(STEERING[:1] + STEERING[4:5] + STEERING[7:]) & set(said)
    assert "x\\ny\\x1b" in call("show", tmp_path / "study.h5").stdout


def test_names_that_are_not_utf_8(folder: Path, tmp_path: Path) -> None:
    """A Latin-1 name of a data set, a run and a sweep; what is printed is an escape."""
    name, out = os.fsdecode(b"caf\xe9.npz"), os.fsdecode(b"r\xe9")
    try:
        (tmp_path / name).write_bytes((folder / "blobs.npz").read_bytes())
    except OSError:
        pytest.skip("this file system has UTF-8 names only")
    train = ("train", "--data", name, "--width", "4", "--epochs", "1", "-q", "--out", out)
    for words in (train, (*train[-2:], "--resume"), ("show", out), ("export", out, "--to", "csv")):
        words = words if words[0] != "--out" else ("train", *words)
        done = run(*words, cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, "")
    assert "data caf\\udce9.npz" in run("show", out, cwd=tmp_path).stdout
    assert run("show", name, cwd=tmp_path).returncode == 3


def test_export_csv_of_text(tmp_path: Path) -> None:
    words = ("--model", "transformer", "--data", "sample-text", "--set", "width=2", "--set",
             "heads=1", "--batch-size", "20", "--epochs", "1", "-q", "--out")  # fmt: skip
    assert call("train", *words, tmp_path / "run").exit_code == 0
    assert call("export", tmp_path / "run", "--to", "csv").exit_code == 0
    (row,) = csv.DictReader(io.StringIO((tmp_path / "run.csv").read_text()))
    (epoch,) = (r for r in log.read(tmp_path / "run" / "log.jsonl") if r["event"] == "epoch")
    assert {name: float(value) for name, value in row.items()} == {
        name: value for name, value in epoch.items() if name != "event"
    }
    assert {"valid_loss", "valid_perplexity", "test_perplexity"} <= row.keys()


def test_export_csv(here: Path, tmp_path: Path) -> None:
    target = tmp_path / "history.csv"
    assert call("export", "run", "--to", "csv", "--output", target).exit_code == 0
    rows = list(csv.DictReader(io.StringIO(target.read_text())))
    epochs = [r for r in log.read(here / "run" / "log.jsonl") if r["event"] == "epoch"]
    assert list(rows[0]) == [*trace.HISTORY, "seconds"]
    for row, record in zip(rows, epochs, strict=True):
        assert {k: float(v) for k, v in row.items() if v} == {
            k: v for k, v in record.items() if k != "event"
        }  # repr gives every float back exactly
        assert row["test_loss"] == ""


def test_export_beside_the_run(folder: Path, tmp_path: Path) -> None:
    """Without --output: the name of the run or of the file, and of "." what it stands for."""
    (tmp_path / "a").mkdir()
    data = (folder / "run" / "checkpoint.h5").read_bytes()
    (tmp_path / "a" / "checkpoint.h5").write_bytes(data)
    for words, cwd, target in (
        ("a", tmp_path, "a.npz"),
        ("a/", tmp_path, "a.npz"),
        ("a/checkpoint.h5", tmp_path, "a/checkpoint.npz"),
        (".", tmp_path / "a", "a.npz"),
    ):
        before = set(tmp_path.rglob("*"))
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(cwd)
            assert call("export", words, "--to", "npz").exit_code == 0
        assert set(tmp_path.rglob("*")) - before == {tmp_path / target}
        (tmp_path / target).unlink()


def test_export_overwrites_only_by_force(here: Path, tmp_path: Path) -> None:
    target = tmp_path / "w.npz"
    target.write_text("mine")
    words = ("export", "run", "--to", "npz", "--output", target)
    result = call(*words)
    assert (result.exit_code, target.read_text()) == (2, "mine")
    assert "already exists; give --force to replace it, or another name" in result.stderr
    assert call(*words, "--force").exit_code == 0
    assert target.read_bytes().startswith(b"PK")
    (tmp_path / "folder").mkdir()
    result = call("export", "run", "--to", "npz", "--output", tmp_path / "folder", "--force")
    assert result.exit_code == 2
    assert "folder is not a regular file; give another name" in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "w.npz"]


def test_export_is_whole_or_absent(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that fills up leaves the old file and no temporary one."""
    target = tmp_path / "w.npz"
    target.write_text("old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    result = call("export", "run", "--to", "npz", "--output", target, "--force")
    assert result.exit_code == 5
    assert f"{target}: could not be written (No space left on device)" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["w.npz"]
    assert target.read_text() == "old"


def test_export_without_safetensors(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    target = tmp_path / "w.safetensors"
    result = call("export", "run", "--to", "safetensors", "--output", target)
    assert result.exit_code == 4
    assert 'pip install "npdrt[text]"' in result.stderr
    assert not target.exists()


def test_export_of_a_damaged_log(here: Path, tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_bytes(b'{"event": "own", "step": 1}\n\xff\xfe\n')
    result = call("export", tmp_path, "--to", "csv")
    assert result.exit_code == 3
    assert "log.jsonl: line 2: not JSON in UTF-8" in result.stderr


# --- data, doctor, completion ---------------------------------------------------------------


def test_data_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NPDRT_DATA", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    lines = call("data", "list").output.splitlines()
    assert lines[0].split() == ["name", "MB", "here", "what", "licence"]
    rows = [line.split()[:3] for line in lines[1:]]
    assert rows[:2] == [["digits", "0.0", "bundled"], ["mnist", "11.6", "no"]]
    assert ["cifar-10", "170.1", "no"] in rows
    found = json.loads(call("data", "list", "--json").stdout)["data"]
    names = [entry["name"] for entry in found]
    assert names == [row[0] for row in rows] == list(sources())
    assert found[0]["bundled"] is True
    assert found[1]["where"] is None
    assert set(found[0]) == {"name", "what", "bytes", "licence", "where", "bundled", "part"}
    here = Path(os.environ.get("NPDRT_DATA", ""))
    assert here == tmp_path


def test_data_verify(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NPDRT_DATA", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    result = call("data", "verify", "digits")
    assert result.exit_code == 0
    assert re.fullmatch(r"ok  \S+digits\.npz  sha256:[0-9a-f]{64}\n", result.output)
    found = json.loads(call("data", "verify", "digits", "--json").stdout)
    assert found["data"] == "digits"
    assert found["files"][0]["status"] == "ok"
    assert found["files"][0]["found"] == found["files"][0]["expected"]
    (tmp_path / "mnist").mkdir()
    (tmp_path / "mnist" / "train-labels-idx1-ubyte.gz").write_bytes(b"nonsense")
    result = call("data", "verify", "mnist", "--data-dir", tmp_path)
    assert result.exit_code == 1
    assert [line.split()[0] for line in result.stdout.splitlines()] == [
        "missing", "wrong", "missing", "missing"
    ]  # fmt: skip
    assert "t10k-labels-idx1-ubyte.gz missing or wrong" in result.stderr
    result = call("data", "verify", "mnist", "--data-dir", tmp_path, "--json")
    assert result.exit_code == 1
    statuses = [entry["status"] for entry in json.loads(result.stdout)["files"]]
    assert statuses == ["missing", "wrong", "missing", "missing"]


def test_data_fetch_of_what_is_here() -> None:
    result = call("data", "fetch", "digits")
    assert result.exit_code == 0
    assert result.output == f"digits: {npdrt.data.fetch('digits')}\n"


def test_doctor() -> None:
    text = call("doctor").output
    rows = dict(re.split(r" {2,}", line, maxsplit=1) for line in text.splitlines())
    assert rows["npdrt"].startswith(f"{npdrt.__version__} on Python 3.")
    for name in ("cpu", "blas", "gpu", "extra data", "data digits", "data mnist", "advice"):
        assert rows[name], name
    found = json.loads(call("doctor", "--json").stdout)
    assert set(found) == {
        "npdrt", "python", "packages", "cpu", "cpu_features", "blas", "blas_kernel_chosen_by",
        "blas_kernel_by_itself", "blas_kernel_suited", "gpu", "extras", "data", "advice",
    }  # fmt: skip
    assert found["packages"]["numpy"] == np.__version__
    assert found["advice"] == doctor.advice(found)
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert set(doctor.EXTRAS) == set(declared["optional-dependencies"]) - {"test"}


def machine(
    features: list[str],
    kernel: str,
    chosen_by: str = "library",
    by_itself: str | None = None,
    suited: str | None = None,
) -> dict[str, Any]:
    """What doctor found on a machine with these features whose OpenBLAS runs these kernels."""
    blas = {"library": "openblas", "version": "0.3.31", "kernel": kernel, "threads": 2}
    return {
        "cpu_features": features,
        "blas": [blas],
        "blas_kernel_chosen_by": chosen_by,
        "blas_kernel_by_itself": by_itself or kernel,
        "blas_kernel_suited": suited,
        "gpu": {"devices": []},
    }


@pytest.mark.parametrize(
    ("features", "kernel", "advised"),
    [
        (["X86_V2", "X86_V3", "X86_V4"], "Haswell", True),
        (["AVX512F", "AVX512_SKX"], "Zen", True),
        (["X86_V2", "X86_V3", "X86_V4"], "SkylakeX", False),
        (["X86_V4", "AVX512_SPR"], "SapphireRapids", False),
        (["X86_V4", "AVX512_ICL"], "Cooperlake", False),
        (["X86_V2", "X86_V3"], "Haswell", False),
        (["NEON", "ASIMD"], "neoversen1", False),
    ],
)
def test_advice_on_kernels(features: list[str], kernel: str, advised: bool) -> None:
    advice = doctor.advice(machine(features, kernel))
    assert bool(advice) == advised
    if advised:
        assert advice[0].startswith(
            f"OpenBLAS runs its {kernel} kernels, and SkylakeX's suit the processor: set "
            "OPENBLAS_CORETYPE=SkylakeX in the shell, or in os.environ before NumPy is imported, "
        )
        assert "the command npdrt does so by itself" in advice[0]
        assert advice[0].endswith("The last bits of results differ between kernels.")


def test_advice_on_kernels_somebody_chose() -> None:
    wide = ["X86_V3", "X86_V4"]
    (advice,) = doctor.advice(machine(wide, "Haswell", "user", "SkylakeX"))
    assert "(it runs Haswell's because OPENBLAS_CORETYPE is set): " in advice
    (advice,) = doctor.advice(machine(wide, "SkylakeX", "npdrt", "Haswell"))
    assert advice.startswith("The command npdrt has OpenBLAS run its SkylakeX kernels. In a Python")
    assert "OpenBLAS runs its Haswell kernels: set" in advice
    assert "set OPENBLAS_CORETYPE=SkylakeX in the shell, or in os.environ before" in advice
    assert doctor.advice(machine(wide, "SkylakeX", "npdrt", "Cooperlake")) == []
    assert doctor.advice(machine(wide, "SkylakeX", "user", "Haswell")) == []


def test_advice_on_kernels_of_zen_4() -> None:
    wide = ["X86_V3", "X86_V4"]
    (advice,) = doctor.advice(machine(wide, "SkylakeX", "library", suited="Haswell"))
    assert "runs its SkylakeX kernels, and Haswell's suit the processor: set" in advice
    (advice,) = doctor.advice(machine(wide, "Haswell", "npdrt", "SkylakeX", suited="Haswell"))
    assert "runs its SkylakeX kernels: set OPENBLAS_CORETYPE=Haswell in the shell" in advice
    assert doctor.advice(machine(wide, "Zen", "library", suited="Haswell")) == []


def test_advice_on_blas() -> None:
    found = machine(["X86_V4"], "Haswell")
    mkl = [{"library": "mkl", "version": "2024", "kernel": None, "threads": 2}]
    assert doctor.advice({**found, "blas": mkl}) == []
    (advice,) = doctor.advice({**found, "blas": []})
    assert advice.startswith("NumPy has no BLAS that threadpoolctl knows")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell: str, tmp_path: Path) -> None:
    result = call("completion", shell)
    assert result.exit_code == 0
    assert f"_NPDRT_COMPLETE={shell}_complete" in result.output
    if shell == "bash":
        script = tmp_path / "npdrt.bash"
        script.write_text(result.output)
        done = subprocess.run(["bash", "-n", script], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("npdrt tr", ["train"]),
        ("npdrt train --opt", ["--optimizer", "--optimiser"]),
        ("npdrt train --optimizer la", ["lamb", "lars", "lars_lesion"]),
        ("npdrt data ", ["fetch", "list", "verify"]),
    ],
)
def test_what_completion_offers(words: str, expected: list[str], tmp_path: Path) -> None:
    asked = {"_NPDRT_COMPLETE": "bash_complete", "COMP_WORDS": words}
    done = run(cwd=tmp_path, **asked, COMP_CWORD=str(len(words.split(" ")) - 1))
    found = [line.partition(",")[2] for line in done.stdout.splitlines()]
    assert sorted(found) == sorted(expected)


# --- starting up ----------------------------------------------------------------------------


def test_module_and_script_are_the_same(tmp_path: Path) -> None:
    code = "import sys; sys.argv[0] = 'npdrt'; from npdrt.cli import main; main()"
    for words in (["--help"], ["train", "--help"], ["trian"], []):
        script = subprocess.run(
            [sys.executable, "-c", code, *words],
            cwd=tmp_path,
            env=environment(),
            capture_output=True,
            text=True,
        )
        module = run(*words, cwd=tmp_path)
        assert module.returncode == script.returncode
        assert (module.stdout, module.stderr) == (script.stdout, script.stderr)


def loaded(code: str, cwd: Path) -> set[str]:
    """The top-level modules in a new process after `code`."""
    code += "\nimport sys; print(' '.join({name.partition('.')[0] for name in sys.modules}))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split())


HEAVY = {"numpy", "h5py", "cupy", "pooch", "requests", "safetensors", "autograd", "torch", "jax"}


def test_import_is_light(tmp_path: Path) -> None:
    assert not loaded("import npdrt", tmp_path) & {*HEAVY, "click", "threadpoolctl"}
    help_ = "from npdrt.cli import cli\ncli(['--help'], standalone_mode=False)"
    assert not loaded(help_, tmp_path) & {*HEAVY, "threadpoolctl"}
    extras = {"cupy", "pooch", "requests", "safetensors", "autograd", "torch", "jax"}
    everything = "import npdrt\nfor name in npdrt.__all__: getattr(npdrt, name)"
    assert not loaded(everything, tmp_path) & extras
    assert not loaded("import npdrt.models", tmp_path) & {*HEAVY, "msgspec"} - {"numpy"}
    training = "from npdrt.train import Config, train\nfrom pathlib import Path\n"
    training += "train(Config(epochs=0), Path('run'))"
    assert not loaded(training, tmp_path) & {*extras, "click"}


# --- nonsense -------------------------------------------------------------------------------

OPTIONS = {
    words[0]: sorted({name for p in c.params for name in (*p.opts, *p.secondary_opts)})
    for words, c in commands()
}
VALUES = [
    "", "0", "1", "2", "3", "-1", "0.5", "nan", "inf", "-inf", "1e400", "auto", "mlp", "adam",
    "sgd", "lars", "relu", "he", "float64", "cpu", "cuda:7", "linear:-1", "plateau:0.5:0",
    "exponential:nan", "milestones:1:0.1", "constant", "blobs.npz", "run", "run/checkpoint.h5",
    "run/trace.h5", "run/log.jsonl", "nowhere", "blobs.npz/x", "depth=3", "width=0", "init=[1]",
    "nonlinearity={a=1}", "x=1979-05-27", "=", ":", "a.py:B", "digits", "mnist", "npz", "csv",
    "bash", "list", "verify", "a" * 300, "\u00e9\u2603", "--", "-", "%s", "{}",
]  # fmt: skip
TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=8)


@st.composite
def nonsense(draw: st.DrawFn) -> list[str]:
    """A command with options of its own, values of any kind, and stray words."""
    command = draw(st.sampled_from([*COMMANDS, "train", "train", "export", "show"]))
    value = st.sampled_from(VALUES) | TEXT
    option = st.tuples(st.sampled_from(OPTIONS[command]), value)
    parts = draw(st.lists(option | st.tuples(value), max_size=5))
    return [*draw(st.sampled_from([[command], []])), *(word for part in parts for word in part)]


SAFE = ["--out", "fuzz", "--epochs", "0", "--device", "cpu"]  # what keeps a drawn run short


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(arguments=nonsense(), safe=st.booleans())
def test_nonsense_is_answered(arguments: list[str], safe: bool, here: Path) -> None:
    """Any arguments: a documented exit code and a message, never a traceback; files that were
    there are as before (but for --force)."""
    arguments = arguments + SAFE if safe and arguments[:1] == ["train"] else arguments
    with tempfile.TemporaryDirectory() as place, contextlib.chdir(place):
        shutil.copytree(here, place, dirs_exist_ok=True)
        before = {path: path.read_bytes() for path in Path(place).rglob("*.*")}
        no_data = {"NPDRT_DATA": "", "XDG_CACHE_HOME": place, "HOME": place}
        result = CliRunner().invoke(cli, arguments, prog_name="npdrt", env=no_data)
        if "--force" not in arguments:
            assert {path: path.read_bytes() for path in before} == before, arguments
    odd = result.exception
    assert odd is None or isinstance(odd, SystemExit), (arguments, odd)
    assert result.exit_code in CODES, arguments
    assert result.exit_code in (0, 130, 143) or result.stderr, arguments
    assert "Traceback" not in result.output
