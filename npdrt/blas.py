"""Which kernels OpenBLAS runs, and who chose them. It imports no NumPy: it is for before that.

OpenBLAS picks its kernels when NumPy loads it, by the family and model of the processor. An Intel
processor with AVX-512 gets AVX-512 kernels, the newest ones those for its newest instructions. An
AMD family that the release of OpenBLAS does not know yet (Zen 5 to 0.3.31, for one) can get AVX2
kernels, though the AVX-512 kernels named SkylakeX run on it, and faster. On an AMD family that it
knows it picks SkylakeX, or Cooperlake, which differs from it for bfloat16; but Zen 4 executes an
AVX-512 instruction in two halves, and the AVX2 kernels named Haswell are as fast there or faster
(benchmarks/README.md).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from itertools import takewhile
from pathlib import Path

VARIABLE = "OPENBLAS_CORETYPE"  # read by OpenBLAS when it is loaded
MARK = "NPDRT_OPENBLAS_CORETYPE"  # the value that the command gave it; child processes inherit both
WIDE, NARROW = "SkylakeX", "Haswell"
HALVES = "25"  # the family of Zen 3, which has no AVX-512, and Zen 4
NEEDED = {"avx512f", "avx512cd", "avx512bw", "avx512dq", "avx512vl"}  # what WIDE's execute
CPUINFO = Path("/proc/cpuinfo")


def choose_kernels(cpuinfo: Path = CPUINFO) -> None:
    """Have OpenBLAS run the kernels that suit an AMD processor with AVX-512.

    Sets OPENBLAS_CORETYPE in the environment of the process, unless it is set, whatever to, or
    NumPy is imported, when it would come too late. The command calls this; the library never does,
    since the environment is the program's. On another system than Linux it does nothing.
    """
    if VARIABLE in os.environ or "numpy" in sys.modules:
        return
    kernels = suited_here(cpuinfo)
    if kernels:
        os.environ[VARIABLE] = os.environ[MARK] = kernels


def suited_here(cpuinfo: Path = CPUINFO) -> str | None:
    """The kernels that suit this machine; None where OpenBLAS's own choice stands."""
    if sys.platform != "linux":
        return None
    try:
        with cpuinfo.open(encoding="utf-8", errors="replace") as lines:
            return suited(lines)
    except OSError:
        return None


def suited(cpuinfo: Iterable[str]) -> str | None:
    """The kernels that suit an AMD processor with AVX-512, from the lines of /proc/cpuinfo; None
    for any other.

    Only the first processor is read: the kernel writes the file while it is read, at a cost for
    each processor. Its flags leave out what the operating system has not switched on.
    """
    fields = [line.partition(":") for line in takewhile(str.strip, cpuinfo)]
    first = {name.strip(): value.strip() for name, _, value in fields}
    wide = set(first.get("flags", "").split()) >= NEEDED
    if first.get("vendor_id") != "AuthenticAMD" or not wide:
        return None
    return NARROW if first.get("cpu family") == HALVES else WIDE


def kernels_chosen_by() -> str:
    """Who chose OpenBLAS's kernels: the "library" itself, the "user" or the command "npdrt"."""
    value = os.environ.get(VARIABLE)
    if value is None:
        return "library"
    return "npdrt" if value == os.environ.get(MARK) else "user"
