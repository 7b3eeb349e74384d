"""Vectors of the norm alone, so that an implementer can test the reduction apart from the rule."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import mpmath
import numpy as np

from npdrt.conform.encoding import DOUBLE, from_bits, hexed
from npdrt.conform.formats import FORMATS, Format, Values
from npdrt.random import Random

from .dual import DIGITS, rounded

TITLE = "Norms: the square root of the sum of squares, float64"
# flag -> (kind of mistake it is after, what the test has)
FLAGS = {
    "ORDINARY": ("BASIC", "normal numbers"),
    "EMPTY": ("EDGE_CASE", "no element"),
    "NORM_OVERFLOW": ("EDGE_CASE", "squares above the largest number"),
    "NORM_UNDERFLOW": ("EDGE_CASE", "squares below the smallest number"),
    "LONG": ("BASIC", "the error of a sum grows with its length"),
    "SUBNORMAL": ("EDGE_CASE", "subnormal elements"),
}
LENGTHS = (0, 1, 2, 5, 255, 256, 257, 1000)


def groups() -> list[dict[str, Any]]:
    """A group a format."""
    return [
        {"type": "Norm", "format": f.name, "tests": [vector(f, *row) for row in rows(f)]}
        for f in FORMATS.values()
    ]


def rows(f: Format) -> Iterator[tuple[str, str, Values]]:
    """Comment, flag and elements of every test of a format."""
    stream = Random(2020, "vectors").of(f"norm {f.name}")
    for n in LENGTHS:
        flag = "EMPTY" if n == 0 else "LONG" if n > 200 else "ORDINARY"
        yield f"{n} elements", flag, f.round(np.asarray(stream.of(str(n)).normal(n)))
    x = np.asarray(stream.of("extreme").normal(9))
    half = f.emax // 2
    if f.name != "float64":
        yield "large elements", "NORM_OVERFLOW", f.round(x * 2.0 ** (half + 2))
        yield "small elements", "NORM_UNDERFLOW", f.round(x * 2.0 ** (-half - 8))
    yield "subnormal elements", "SUBNORMAL", np.round(x * 4) * f.smallest


def vector(f: Format, comment: str, flag: str, x: Values) -> dict[str, Any]:
    """A test with the exact norm, rounded once to float64."""
    return {
        "tcId": 0,
        "comment": comment,
        "flags": [flag],
        "result": "acceptable" if flag == "SUBNORMAL" else "valid",
        "shape": [x.size],
        "x": f.bits(x),
        "norm": hexed(exact(x)),
        "tolerance": hexed(tolerance(f, x.size)),
    }


def exact(x: Values) -> float:
    """sqrt(sum x^2), rounded once to float64."""
    with mpmath.workdps(DIGITS):
        return rounded(mpmath.sqrt(mpmath.fsum(x, squared=True)), DOUBLE).item()


def tolerance(f: Format, n: int) -> float:
    """The accepted relative error: (n / 2 + 2) units of rounding of the format.

    That is the bound of a sum of n squares in any order in the format, halved by the root. In
    float64 accumulation the error is below one unit of float64.
    """
    return (n / 2 + 2) * 2.0**-f.precision


def elements(group: Mapping[str, Any], test: Mapping[str, Any]) -> Values:
    """The array of a test."""
    return from_bits(test["x"], test["shape"], FORMATS[group["format"]])
