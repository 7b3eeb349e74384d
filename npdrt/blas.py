"""Which kernels OpenBLAS runs, and who chose them. It must run before NumPy is imported.

OpenBLAS picks its kernels when NumPy loads it, by the family and model of the processor. Intel
processors with AVX-512 get AVX-512 kernels. An AMD family that the release of OpenBLAS does not
know yet (Zen 5, up to 0.3.31) can get AVX2 kernels, although the AVX-512 kernels named SkylakeX
run on it, and faster. On an AMD family that it knows it picks SkylakeX, or Cooperlake, which
differs from it for bfloat16. But Zen 4 executes an AVX-512 instruction in two halves: the AVX2
kernels named Haswell are as fast there or faster (benchmarks/README.md).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from itertools import takewhile
from pathlib import Path

VARIABLE = "OPENBLAS_CORETYPE"  # read by OpenBLAS when it is loaded
OUR_CHOICE = "NPDRT_OPENBLAS_CORETYPE"  # what the command set it to; child processes inherit both
AVX512_KERNELS, AVX2_KERNELS = "SkylakeX", "Haswell"
AVX512_FLAGS = {"avx512f", "avx512cd", "avx512bw", "avx512dq", "avx512vl"}  # AVX512_KERNELS need
SPLIT_AVX512 = "25"  # the family of Zen 4, and of Zen 3, which has no AVX-512
CPUINFO = Path("/proc/cpuinfo")


def choose_kernels(cpuinfo: Path = CPUINFO) -> None:
    """Have OpenBLAS run the kernels that suit an AMD processor with AVX-512.

    It sets OPENBLAS_CORETYPE in the environment of the process, unless the variable is set to
    anything already, or NumPy is imported, which is too late. The command (`npdrt.cli.main`) calls
    this. The library never does, because the environment belongs to the program that imports it.
    On systems other than Linux the function does nothing.
    """
    if VARIABLE in os.environ or "numpy" in sys.modules:
        return
    kernels = suited_here(cpuinfo)
    if kernels:
        os.environ[VARIABLE] = os.environ[OUR_CHOICE] = kernels


def suited_here(cpuinfo: Path = CPUINFO) -> str | None:
    """The kernels that suit this machine; None if OpenBLAS's own choice stands."""
    if sys.platform != "linux":
        return None
    try:
        with cpuinfo.open(encoding="utf-8", errors="replace") as lines:
            return suited(lines)
    except OSError:
        return None


def suited(cpuinfo: Iterable[str]) -> str | None:
    """The kernels that suit an AMD processor with AVX-512, from the lines of /proc/cpuinfo; None
    for other processors.

    It reads the lines of the first processor only: Linux makes the lines of each processor when
    they are read, which takes time. The flags leave out what the operating system has not enabled.
    """
    fields = [line.partition(":") for line in takewhile(str.strip, cpuinfo)]
    first = {name.strip(): value.strip() for name, _, value in fields}
    has_avx512 = set(first.get("flags", "").split()) >= AVX512_FLAGS
    if first.get("vendor_id") != "AuthenticAMD" or not has_avx512:
        return None
    return AVX2_KERNELS if first.get("cpu family") == SPLIT_AVX512 else AVX512_KERNELS


def kernels_chosen_by() -> str:
    """Who chose OpenBLAS's kernels: the "library" itself, the "user" or the command "npdrt"."""
    value = os.environ.get(VARIABLE)
    if value is None:
        return "library"
    return "npdrt" if value == os.environ.get(OUR_CHOICE) else "user"
