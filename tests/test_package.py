"""What is built: sdist and wheel hold the package, its linked folders and its data, no more."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NEEDED = [
    "npdrt/py.typed",
    "npdrt/ops/loss.py",
    "npdrt/models/mlp.py",
    "npdrt/conform/report/page.html",
    "npdrt/train/loop.py",
    "npdrt/train/studies/depth.py",
    "npdrt/train/studies/recipes/fromage/figure-1.toml",
    "npdrt/train/studies/npdrt.mplstyle",
    "npdrt/trust/bounds.py",
    "npdrt/data/digits.npz",
    "npdrt/data/digits-licence.txt",
    "npdrt/data/sources.toml",
]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel built from the sdist."""
    pytest.importorskip("build")
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def test_wheel(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert set(NEEDED) <= set(names)
    assert {name.partition("/")[0] for name in names} == {"npdrt", "npdrt-0.1.0.dist-info"}
    assert not [name for name in names if "test" in name or name.endswith(".pyc")]
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_sdist(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        members = {m.name.partition("/")[2]: m for m in archive.getmembers()}
    assert {*NEEDED, "pyproject.toml", "README.md", "LICENSE"} <= set(members)
    assert all(members[name].isfile() for name in NEEDED)
