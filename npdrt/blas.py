"""Which kernels OpenBLAS runs, and who chose them. It imports no NumPy: it is for before that.

OpenBLAS picks its kernels when NumPy loads it, by the family and model of the processor. An Intel
processor with AVX-512 gets AVX-512 kernels, the newest ones those for its newest instructions. An
AMD family that the release of OpenBLAS does not know yet (Zen 5 to 0.3.31, for one) can get AVX2
kernels, though the AVX-512 kernels named SkylakeX run on it, and faster. On an AMD family that it
knows it picks SkylakeX, or Cooperlake, which differs from it for bfloat16.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from itertools import takewhile
from pathlib import Path

VARIABLE = "OPENBLAS_CORETYPE"  # read by OpenBLAS when it is loaded
MARK = "NPDRT_OPENBLAS_CORETYPE"  # the value that the command gave it; child processes inherit both
KERNELS = "SkylakeX"
NEEDED = {"avx512f", "avx512cd", "avx512bw", "avx512dq", "avx512vl"}  # what KERNELS execute
CPUINFO = Path("/proc/cpuinfo")


def choose_kernels(cpuinfo: Path = CPUINFO) -> None:
    """Have OpenBLAS run its AVX-512 kernels on an AMD processor that has what they need.

    Sets OPENBLAS_CORETYPE in the environment of the process, unless it is set, whatever to, or
    NumPy is imported, when it would come too late. The command calls this; the library never does,
    since the environment is the program's. On another system than Linux it does nothing.
    """
    if VARIABLE in os.environ or "numpy" in sys.modules or sys.platform != "linux":
        return
    try:
        with cpuinfo.open(encoding="utf-8", errors="replace") as lines:
            suited = runs_kernels(lines)
    except OSError:
        return
    if suited:
        os.environ[VARIABLE] = os.environ[MARK] = KERNELS


def runs_kernels(cpuinfo: Iterable[str]) -> bool:
    """Whether the lines of /proc/cpuinfo are of an AMD processor that can run KERNELS.

    Only the first processor is read: the kernel writes the file while it is read, at a cost for
    each processor. Its flags leave out what the operating system has not switched on.
    """
    fields = [line.partition(":") for line in takewhile(str.strip, cpuinfo)]
    first = {name.strip(): value.strip() for name, _, value in fields}
    of_amd = first.get("vendor_id") == "AuthenticAMD"
    return of_amd and set(first.get("flags", "").split()) >= NEEDED


def kernels_chosen_by() -> str:
    """Who chose OpenBLAS's kernels: the "library" itself, the "user" or the command "npdrt"."""
    value = os.environ.get(VARIABLE)
    if value is None:
        return "library"
    return "npdrt" if value == os.environ.get(MARK) else "user"
