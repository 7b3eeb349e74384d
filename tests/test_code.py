"""What npdrt runs: no code because a file names it, and no module from where it is called."""

from __future__ import annotations

import os
import py_compile
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

import npdrt
from npdrt import store
from npdrt.cli import cli
from npdrt.errors import Error
from npdrt.train import Config, resume
from npdrt.train.studies import recipe

ROOT = Path(__file__).parents[1]
MODEL = """
from pathlib import Path
Path("RAN").touch()
from dataclasses import dataclass
import numpy as np
from npdrt import ops
@dataclass(frozen=True)
class M:
    inputs: int = 64
    outputs: int = 10
    def init(self, seed=0, device="cpu", dtype="float32"):
        return {"w": np.ones((self.outputs, self.inputs), dtype) / 100}
    def __call__(self, p, x):
        return ops.linear(x, p["w"])
"""
RECIPE = """title = "t"
source = "s"
statement = "c"
study = "rates"
[smoke]
[[smoke.grid]]
model = "m.py:M"
batch_size = 512
epochs = 1
"""
MADE = ("--model", "m.py:M", "--epochs", "1", "--batch-size", "512", "--snapshot", "1", "-q")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a run of a user's model, as if it came from somebody else."""
    monkeypatch.chdir(tmp_path)
    Path("m.py").write_text(MODEL)
    assert call("train", *MADE, "--out", "run").exit_code == 0
    Path("RAN").unlink()
    return tmp_path


def call(*words: Any) -> Result:
    return CliRunner().invoke(cli, [str(word) for word in words], prog_name="npdrt")


READERS = {
    "show": ("show", "run"),
    "export": ("export", "run", "--to", "npz"),
    "distance": ("distance", "run", "run"),
}
RUNNERS = {
    "resume": ("train", "--out", "run", "--resume", "-q"),
    "resume longer": ("train", "--out", "run", "--resume", "-q", "--schedule", "linear"),
    "perturb": ("perturb", "run", "--points", "2", "--examples", "5", "-q"),
    "explain": ("explain", "run"),
}


@pytest.mark.parametrize("what", [*READERS, *RUNNERS])
def test_a_checkpoint_makes_nothing_run(what: str, here: Path) -> None:
    found = call(*(READERS | RUNNERS)[what])
    assert not Path("RAN").exists()
    assert found.exit_code == (0 if what in READERS else 2)
    if what in RUNNERS:
        assert found.stderr.endswith(
            "the model is Python code, m.py:M, and npdrt runs no code because a data file names "
            "it; if you trust that file, repeat it: --code m.py\n"
        )
        assert call(*RUNNERS[what], "--code", "other.py").exit_code == 2
        assert not Path("RAN").exists()


@pytest.mark.parametrize("what", RUNNERS)
def test_code_that_is_repeated_runs(what: str, here: Path) -> None:
    """Under any path that leads to the file; not if it has changed since."""
    found = call(*RUNNERS[what], "--code", "other.py", "--code", here / "m.py")
    assert found.exit_code == 0, found.output
    assert Path("RAN").exists()
    Path("RAN").unlink()
    Path("m.py").write_text(MODEL + "\n")
    found = call(*RUNNERS[what], "--code", "m.py")
    assert (found.exit_code, Path("RAN").exists()) == (2, False)
    assert "m.py:M has changed since the run was started" in found.stderr


def test_an_option_repeats_it_too(here: Path) -> None:
    assert call("train", "--out", "run", "--resume", "-q", "--model", "m.py:M").exit_code == 0
    assert Path("RAN").exists()


def test_in_python(here: Path) -> None:
    with pytest.raises(Error, match="npdrt runs no code because a data file names it"):
        resume(here / "run")
    with pytest.raises(Error, match="npdrt runs no code because a data file names it"):
        Config.from_dict({"model": "m.py:M"})
    assert not Path("RAN").exists()
    config = Config.from_dict({"model": "m.py:M"}, code=[Path("m.py")])
    assert config == Config(model="m.py:M")
    assert resume(here / "run", code=[here / "m.py"]).step > 0


def test_a_hidden_file_with_its_digest(here: Path) -> None:
    """A checkpoint can name any file and its right digest."""
    held = store.load("run/checkpoint.h5")
    evil = here / "run" / ".cache.py"
    evil.write_text(MODEL)
    config = {**held.meta["config"], "model": f"{evil}:M"}
    meta = {**held.meta, "config": config}
    npdrt.save("run/checkpoint.h5", held.params, state=held.state, meta=meta)
    found = call(*RUNNERS["resume"], "--code", "m.py")
    assert (found.exit_code, Path("RAN").exists()) == (2, False)
    assert f"--code {evil}\n" in found.stderr


def test_bytecode_beside_a_model_is_not_run(here: Path) -> None:
    """The digest is of the source, so the source is what runs."""
    Path("evil.py").write_text("raise SystemExit('bytecode ran')")
    target = Path("__pycache__") / f"m.{sys.implementation.cache_tag}.pyc"
    mode = py_compile.PycInvalidationMode.UNCHECKED_HASH
    py_compile.compile("evil.py", cfile=str(target), dfile="m.py", invalidation_mode=mode)
    assert call(*RUNNERS["explain"], "--code", "m.py").exit_code == 0


@pytest.mark.parametrize("file", ["pipe.py", "/dev/zero"])
def test_what_is_no_file_is_no_model(file: str, here: Path) -> None:
    os.mkfifo("pipe.py")
    found = call("train", "--model", f"{file}:M", "--out", "other", "-q")
    assert found.exit_code == 3
    assert f"{file}: is not a regular file" in found.stderr
    assert not Path("other").exists()


def test_a_recipe_makes_nothing_run(here: Path) -> None:
    Path("r.toml").write_text(RECIPE)
    sweep = ("sweep", "r.toml", "--scale", "smoke", "--out", "sw", "--jobs", "1", "-q")
    study = ("reproduce", *sweep[1:], "--as-is")
    for words in (sweep, study):
        found = call(*words)
        assert (found.exit_code, Path("RAN").exists()) == (2, False)
        assert "repeat it: --code m.py" in found.stderr
    assert not Path("sw").exists()
    with pytest.raises(Error, match="npdrt runs no code"):
        recipe.load("r.toml", "smoke")
    found = call(*sweep, "--code", "m.py")  # a worker process is told too
    assert found.exit_code == 0, found.output
    assert Path("RAN").exists()
    assert call(*study, "--code", "m.py").exit_code == 0


# --- modules where npdrt is called ------------------------------------------------------------

STOLEN = """import os, sys
open({mark!r}, "a").write({name!r} + "\\n")
sys.path[:] = [p for p in sys.path if os.path.abspath(p) not in ({places})]
sys.modules.pop({name!r})
__import__({name!r})
"""
NAMES = ("numpy", "random", "json", "signal", "struct", "tempfile", "multiprocessing", "h5py",
         "pickle", "selectors", "subprocess", "threadpoolctl", "concurrent", "queue")  # fmt: skip


def test_no_module_of_the_working_directory_is_imported(tmp_path: Path) -> None:
    """Nor of the script's folder, nor in the processes of a sweep."""
    script, there = tmp_path / "bin" / "npdrt", tmp_path / "there"
    script.parent.mkdir()
    there.mkdir()
    script.write_text("from npdrt.cli import main\nif __name__ == '__main__':\n    main()\n")
    plain = RECIPE.replace('model = "m.py:M"', '"model_options.width" = 4')
    (there / "r.toml").write_text(plain)
    mark = tmp_path / "STOLEN"
    places = f"{str(there)!r}, {str(script.parent)!r}"
    for name in NAMES:
        text = STOLEN.format(mark=str(mark), name=name, places=places)
        (there / f"{name}.py").write_text(text)
    (script.parent / "numpy.py").write_text((there / "numpy.py").read_text())
    unset = {k: v for k, v in os.environ.items() if k != "PYTHONSAFEPATH"}
    environment = {**unset, "PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1"}
    words = "sweep r.toml --scale smoke --out sw --jobs 1 -q"
    done = subprocess.run(
        [sys.executable, str(script), *words.split()],
        cwd=there, env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not mark.exists(), mark.read_text()
