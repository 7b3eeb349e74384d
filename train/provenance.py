"""How a run was made: versions, machine, threads, source and data, for its checkpoint."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_info

import npdrt
from npdrt.arrays import Device, describe_gpus, gpu_software
from npdrt.blas import kernels_chosen_by
from npdrt.plain import counted

PACKAGES = (
    "numpy",
    "h5py",
    "click",
    "threadpoolctl",
    "pillow",
    "tokenizers",
    "cupy-cuda12x",
    "cupy-cuda13x",
)
VARIABLES = (
    "OPENBLAS_CORETYPE",
    "OPENBLAS_NUM_THREADS",
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "NPY_DISABLE_CPU_FEATURES",
    "NVIDIA_TF32_OVERRIDE",
)


def provenance(device: Device, data_digests: dict[str, str]) -> dict[str, Any]:
    """Everything apart from the configuration that could change a bit of the results.

    It holds no wall-clock time, so the same run gives the same bytes.
    """
    on_gpu = {"gpu_software": gpu_software()} if device.kind == "cuda" else {}
    return on_gpu | {
        "npdrt": npdrt.__version__,
        "argv": sys.argv,
        "python": platform.python_version(),
        "packages": packages(),
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cpu_features": cpu_features(),
        "blas": blas(),
        "blas_kernel_chosen_by": blas_kernel_chosen_by(),
        "cores": os.cpu_count(),
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "device": str(device),
        "gpus": describe_gpus() if device.kind == "cuda" else [],
        "git": git_state(),
        "data": data_digests,
    }


def packages() -> dict[str, str]:
    """The versions of the installed packages on which numbers depend."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def blas() -> list[dict[str, Any]]:
    """The BLAS libraries in the process: name, version, kernel family, threads."""
    return [
        {
            "library": info["internal_api"],
            "version": info.get("version"),
            "kernel": info.get("architecture"),
            "threads": info["num_threads"],
        }
        for info in threadpool_info()
        if info["user_api"] == "blas"
    ]


def same_blas(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether two processes had the same BLAS libraries; one of them may have loaded more."""
    return all(library in b for library in a) or all(library in a for library in b)


def blas_in_words(blas: Sequence[Mapping[str, Any]]) -> str:
    """The BLAS libraries of a process, for a message."""
    parts = (
        f"{b['library']} {b['version']} ({b['kernel']} kernels, {counted(b['threads'], 'thread')})"
        for b in blas
    )
    return ", ".join(parts) or "no BLAS library that is known"


def blas_kernel_chosen_by() -> str:
    """Who chose the kernels: the BLAS "library" itself, the "user" or the command "npdrt".

    The user and the command choose by OPENBLAS_CORETYPE, which only OpenBLAS reads.
    """
    heeded = any(b["library"] == "openblas" for b in blas())
    return kernels_chosen_by() if heeded else "library"


def cpu_name() -> str:
    """The processor's name as the operating system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def cpu_features() -> list[str]:
    """The instruction sets that NumPy found and may use."""
    found = np.show_config(mode="dicts")
    simd = found.get("SIMD Extensions", {}) if isinstance(found, dict) else {}
    return [*simd.get("baseline", []), *simd.get("found", [])]


def git_state() -> dict[str, Any] | None:
    """The commit, and whether files differ from it; None outside a git checkout."""
    root = Path(npdrt.__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        commit = _git(root, "rev-parse", "HEAD")
        return {"commit": commit, "dirty": bool(_git(root, "status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    return done.stdout.strip()
