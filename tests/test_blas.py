"""The kernels of OpenBLAS: chosen by the command alone, and only where they run and were unset."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
from threadpoolctl import threadpool_info

import npdrt
from npdrt import blas
from npdrt.cli import doctor
from npdrt.train.provenance import blas_kernel_chosen_by

ROOT = Path(__file__).parents[1]
OPENBLAS = any(info["internal_api"] == "openblas" for info in threadpool_info())
FLAGS = "fpu sse2 avx2 fma avx512f avx512dq avx512ifma avx512cd avx512bw avx512vl avx512_bf16"
needs_openblas = pytest.mark.skipif(not OPENBLAS, reason="NumPy runs another BLAS")


def processor(vendor: str = "AuthenticAMD", flags: str = FLAGS, family: int = 26) -> str:
    """The section of /proc/cpuinfo on one processor, a blank line at its end."""
    fields = {"vendor_id": vendor, "cpu family": family, "flags\t": flags}
    lines = (f"{name}\t: {value}\n" for name, value in fields.items())
    return "".join(("processor\t: 0\n", *lines, "\n"))


SUITED = processor()
ZEN_4 = processor(family=25)
PLAIN = processor(flags="fpu sse2 avx2 fma")
ARM = "processor\t: 0\nBogoMIPS\t: 50.00\nFeatures\t: fp asimd sve\nCPU part\t: 0xd40\n\n"


def environment(**changes: str) -> dict[str, str]:
    own = {"PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1", "GIT_DIR": os.devnull}
    kept = {k: v for k, v in os.environ.items() if k not in (blas.VARIABLE, blas.OUR_CHOICE)}
    return {**kept, **own, **changes}


def python(code: str, *words: str, cwd: Path, **changes: str) -> str:
    """What `code` prints in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        cwd=cwd,
        env=environment(**changes),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- which processors ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cpuinfo", "suited"),
    [
        (SUITED, "SkylakeX"),
        (SUITED + PLAIN, "SkylakeX"),
        (ZEN_4, "Haswell"),
        (PLAIN + SUITED, None),
        (processor(flags="fpu sse2 avx2 fma", family=25), None),  # Zen 3
        (processor("GenuineIntel"), None),
        (processor("HygonGenuine"), None),
        (processor(flags=FLAGS.replace("avx512", "xavx512")), None),
        (ARM, None),
        ("", None),
        ("\n", None),
        ("no colon\nvendor_id\n", None),
    ],
)
def test_which_kernels_suit_a_processor(cpuinfo: str, suited: str | None) -> None:
    assert blas.suited(cpuinfo.splitlines(keepends=True)) == suited


@pytest.mark.parametrize("missing", ["avx512f", "avx512cd", "avx512bw", "avx512dq", "avx512vl"])
def test_every_instruction_set_is_needed(missing: str) -> None:
    flags = " ".join(flag for flag in FLAGS.split() if flag != missing)
    assert not blas.suited(processor(flags=flags).splitlines(keepends=True))


def test_only_the_first_processor_is_read() -> None:
    lines = iter((SUITED + PLAIN).splitlines(keepends=True))
    assert blas.suited(lines)
    assert len(list(lines)) == PLAIN.count("\n")


# --- when ------------------------------------------------------------------------------------

CHOOSE = """
import json, os, sys
from pathlib import Path
{before}
from npdrt import blas
blas.choose_kernels(Path(sys.argv[1]))
print(json.dumps([os.environ.get(blas.VARIABLE), blas.kernels_chosen_by(), "numpy" in sys.modules]))
"""


@pytest.mark.parametrize(
    ("cpuinfo", "before", "changes", "expected"),
    [
        (SUITED, "", {}, ["SkylakeX", "npdrt", False]),
        (ZEN_4, "", {}, ["Haswell", "npdrt", False]),
        (PLAIN, "", {}, [None, "library", False]),
        (None, "", {}, [None, "library", False]),
        (b"vendor_id\t: \xff\xfe\n", "", {}, [None, "library", False]),
        (SUITED, "", {blas.VARIABLE: "Haswell"}, ["Haswell", "user", False]),
        (SUITED, "", {blas.VARIABLE: "SkylakeX"}, ["SkylakeX", "user", False]),
        (SUITED, "", {blas.VARIABLE: ""}, ["", "user", False]),
        (SUITED, "import numpy", {}, [None, "library", True]),
        (SUITED, "sys.platform = 'darwin'", {}, [None, "library", False]),
        # a child process of the command, and one in which the user chose again
        (SUITED, "", {blas.VARIABLE: "SkylakeX", blas.OUR_CHOICE: "SkylakeX"},
         ["SkylakeX", "npdrt", False]),
        (SUITED, "", {blas.VARIABLE: "Haswell", blas.OUR_CHOICE: "SkylakeX"},
         ["Haswell", "user", False]),
        (PLAIN, "", {blas.OUR_CHOICE: "SkylakeX"}, [None, "library", False]),
    ],
)  # fmt: skip
def test_when_kernels_are_chosen(
    cpuinfo: str | bytes | None,
    before: str,
    changes: dict[str, str],
    expected: list[object],
    tmp_path: Path,
) -> None:
    file = tmp_path / "cpuinfo"
    if cpuinfo is not None:
        file.write_bytes(cpuinfo.encode() if isinstance(cpuinfo, str) else cpuinfo)
    code = CHOOSE.format(before=before)
    if sys.platform != "linux" and not before:
        code = CHOOSE.format(before="sys.platform = 'linux'")
    assert json.loads(python(code, str(file), cwd=tmp_path, **changes)) == expected


# --- the command and the library ---------------------------------------------------------------

# A process whose /proc/cpuinfo is the file of its first argument runs the command in the others.
# It asks for kernels that every processor runs on which NumPy does, and that are picked on none of
# those with AVX.
COMMAND = """
import sys
from pathlib import Path
from npdrt import blas, cli
blas.AVX512_KERNELS = "Nehalem"
blas.choose_kernels.__defaults__ = (Path(sys.argv.pop(1)),)
sys.platform = "linux"
cli.main()
"""
TRAIN = ["train", "--epochs", "0", "--width", "4", "--out", "run"]


@needs_openblas
@pytest.mark.parametrize(
    ("cpuinfo", "user", "chosen_by"),
    [
        (SUITED, None, "npdrt"),
        (processor("GenuineIntel"), None, "library"),
        (SUITED, "Haswell", "user"),
    ],
)
def test_the_command_chooses(
    cpuinfo: str, user: str | None, chosen_by: str, tmp_path: Path
) -> None:
    """The variable reaches OpenBLAS in time, and the run's record says who set it."""
    (tmp_path / "cpuinfo").write_text(cpuinfo)
    changes = {blas.VARIABLE: user} if user else {}
    python(COMMAND, "cpuinfo", *TRAIN, cwd=tmp_path, **changes)
    made = npdrt.load(tmp_path / "run" / "checkpoint.h5").meta["provenance"]
    assert made["blas_kernel_chosen_by"] == chosen_by
    value = {"npdrt": "Nehalem", "library": None, "user": user}[chosen_by]
    assert made["environment"].get(blas.VARIABLE) == value
    if platform.machine() == "x86_64":
        kernels = {b["kernel"] for b in made["blas"] if b["library"] == "openblas"}
        assert (kernels == {"Nehalem"}) == (chosen_by == "npdrt")


@needs_openblas
def test_doctor_says_who_chose(tmp_path: Path) -> None:
    """And what OpenBLAS picks by itself is the same whoever chose."""
    (tmp_path / "cpuinfo").write_text(SUITED)
    found = {}
    for who, changes in {"npdrt": {}, "user": {blas.VARIABLE: "Haswell"}}.items():
        text = python(COMMAND, "cpuinfo", "doctor", "--json", cwd=tmp_path, **changes)
        found[who] = json.loads(text)
        assert found[who]["blas_kernel_chosen_by"] == who
        assert f"kernels (chosen by {who})" in doctor._text(found[who])
    code = f"import os\nos.environ.pop({blas.VARIABLE!r}, None)\n{doctor.ASK_KERNEL}"
    kernel = python(code, cwd=tmp_path).split()[0]
    assert {f["blas_kernel_by_itself"] for f in found.values()} == {kernel}


def test_the_library_leaves_the_environment_alone(tmp_path: Path) -> None:
    code = """
import os
before = dict(os.environ)
import npdrt, npdrt.blas, npdrt.cli
for name in npdrt.__all__: getattr(npdrt, name)
from pathlib import Path
from npdrt.train import Config, train
train(Config(epochs=0), Path("run"))
print(sorted(set(os.environ.items()) ^ set(before.items())))
"""
    assert python(code, cwd=tmp_path).strip() == "[]"


def test_other_libraries_choose_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    """OPENBLAS_CORETYPE means nothing to MKL."""
    monkeypatch.setenv(blas.VARIABLE, "Haswell")
    monkeypatch.delenv(blas.OUR_CHOICE, raising=False)
    mkl = {"library": "mkl", "version": "2024", "kernel": None, "threads": 2}
    monkeypatch.setattr("npdrt.train.provenance.blas", lambda: [mkl])
    assert blas_kernel_chosen_by() == "library"
    monkeypatch.setattr("npdrt.train.provenance.blas", lambda: [{**mkl, "library": "openblas"}])
    assert blas_kernel_chosen_by() == "user"
