"""Portable functions: every float32 against the C library, and what functions and sums cost.

Every float32 (or every Nth, with --stride) goes through `npdrt.elementary`. `elementary.c` compares
the result with the C library's function in float64, rounded to float32. Where that is too close to
the middle of two float32 numbers to tell, mpmath decides. Needs gcc. A function takes some minutes.

The costs are CPU time an element, the least of several runs on 2**20 elements.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import report
import step

import npdrt
from npdrt import elementary, slices, sums

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # so that `import precise` works

import precise

NAMES = ("exp", "log", "tanh", "expm1", "log1p", "sin", "cos")
CHUNK = 1 << 22
SHAPES = (
    ((1 << 20,), (0,)),
    ((4096, 256), (1,)),
    ((4096, 256), (0,)),
    ((32, 64, 16, 16), (0, 2, 3)),
)


# --- every float32 ----------------------------------------------------------------------------


def compiled(folder: str) -> ctypes.CDLL:
    """`elementary.c`, compiled."""
    made = str(Path(folder) / "elementary.so")
    flags = ("-O2", "-std=c11", "-ffp-contract=off", "-shared", "-fPIC")
    subprocess.run(
        ["gcc", *flags, str(Path(__file__).with_suffix(".c")), "-o", made, "-lm"], check=True
    )
    return ctypes.CDLL(made)


def compare(library: ctypes.CDLL, name: str, x: Any, y: Any) -> tuple[int, Any]:
    """How many y are wrong among those that the C library decides, and the places of the rest."""
    places, wrong = np.empty(x.size, np.int64), ctypes.c_long(0)
    arrays = (ctypes.c_void_p(a.ctypes.data) for a in (x, y))
    found = getattr(library, f"compare_{name}")(
        *arrays, ctypes.c_long(x.size), ctypes.c_void_p(places.ctypes.data), ctypes.byref(wrong)
    )
    return wrong.value, places[:found]


def sweep(library: ctypes.CDLL, name: str, stride: int) -> dict[str, Any]:
    """Every `stride`-th float32 by its bits: how many, how many are rounded wrong, and how far."""
    function, decided, errors, count, wrong = getattr(elementary, name), 0, [], 0, 0
    for start in range(0, 1 << 32, CHUNK * stride):
        end = min(start + CHUNK * stride, 1 << 32)
        x = np.arange(start, end, stride, dtype=np.uint32).view(np.float32)
        y = function(x)
        more, places = compare(library, name, x, y)
        for v, found in zip(x[places], y[places], strict=True):
            true = precise.exact(name, v)
            if precise.nearest(true, "float32") != found:
                errors.append(precise.error(found, true, "float32"))
        count, wrong, decided = count + x.size, wrong + more, decided + places.size
    return {
        **{"function": name, "arguments": count, "wrong": wrong + len(errors)},
        **{"by mpmath": decided, "worst": max(errors, default=0.5), "far": wrong},
    }


# --- costs ------------------------------------------------------------------------------------


def least(call: Callable[..., Any], *args: Any, turns: int = 7) -> float:
    """The least CPU time of a call, in ns an element of its first argument."""
    call(*args)
    found = []
    for _ in range(turns):
        began = time.process_time_ns()
        call(*args)
        found.append(time.process_time_ns() - began)
    return min(found) / args[0].size


def costs(name: str, size: int) -> dict[str, Any]:
    """A function eager, replayed, compiled, and NumPy's."""
    x = np.random.default_rng(0).standard_normal(size).astype("float32")
    x = np.abs(x) if name.startswith("log") else x
    function = getattr(elementary, name)
    return {
        "function": name,
        "eager": least(function, x),
        "replay": least(npdrt.record(function, x), x),
        "fast": least(npdrt.record(function, x, fast=True), x),
        "numpy": least(getattr(np, name), x),
    }


def sliced(x: Any, axes: tuple[int, ...]) -> Any:
    """The other portable sum: two slices of x whose sums float64 holds exactly, in any order."""
    x = x.astype(np.float64)
    bits = 51 - (x.size - 1).bit_length()
    unit = slices.power_below(np.max(np.abs(x), axis=axes, keepdims=True)) * 2.0**-bits
    total, grid = 0.0, 3.0 * 2.0**51 * unit
    for _ in range(2):
        part = (x + grid) - grid
        x, grid = x - part, grid * 2.0**-bits
        total = total + np.sum(part, axis=axes)
    return total.astype(np.float32)


def sum_costs(shape: tuple[int, ...], axes: tuple[int, ...]) -> dict[str, Any]:
    """A sum in halves, in slices, and NumPy's."""
    x = np.random.default_rng(0).standard_normal(shape).astype("float32")
    return {
        "shape": f"{shape} over {axes}",
        "halves": least(lambda x: sums.sum(x, axis=axes), x),
        "slices": least(lambda x: sliced(x, axes), x),
        "numpy": least(lambda x: np.sum(x, axis=axes), x),
    }


# --- tables -----------------------------------------------------------------------------------


def text_of(results: dict[str, Any]) -> str:
    """The three tables."""
    swept = [
        (r["function"], f"{r['arguments']:,}", f"{r['wrong']:,}", f"{r['worst']:.10f}")
        for r in results["swept"]
    ]
    keys = ("eager", "replay", "fast", "numpy")
    functions = [(r["function"], *(f"{r[k]:.1f}" for k in keys)) for r in results["functions"]]
    keys = ("halves", "slices", "numpy")
    added = [(r["shape"], *(f"{r[k]:.2f}" for k in keys)) for r in results["sums"]]
    head = ("function", "arguments", "not rounded right", "largest error, ulps")
    return "\n\n".join(
        (
            report.table(head, swept),
            report.table(
                ("function, ns an element", "eager", "replay", "fast", "NumPy"), functions
            ),
            report.table(("sum, ns an element", "halves", "slices", "NumPy"), added),
        )
    )


def main() -> None:
    """Print the tables. Exit code 1 if a result is further off than the middle allows."""
    parser = report.parser(__doc__)
    parser.add_argument("names", nargs="*", default=NAMES, metavar="NAME", help="functions")
    parser.add_argument("--stride", type=int, default=1, metavar="N", help="every Nth float32")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        library = compiled(folder)
        swept = [sweep(library, name, asked.stride) for name in asked.names]
    results = {
        "swept": swept,
        "functions": [costs(name, 1 << 20) for name in asked.names],
        "sums": [sum_costs(*case) for case in SHAPES],
    }
    report.publish(text_of(results), step.machine(), results, asked.output)
    sys.exit(any(r["far"] or r["worst"] > 0.51 for r in swept))


if __name__ == "__main__":
    main()
