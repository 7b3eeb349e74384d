"""Cases too large for the files: their numbers are drawn from Philox words when they are read.

The file has the shape of such a test, its steps and 64 exact elements. All other elements are
compared with npdrt's own answer (`npdrt.conform.canonical`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from npdrt.conform.case import Answer, Case
from npdrt.conform.cases import Draft, Drawer, finished
from npdrt.conform.formats import FORMATS, Values
from npdrt.conform.rules import RULES, run

FIRST = 500_000  # the first id, less one
SAMPLE = 64  # exact elements that are stored, over all steps
RATES = (0.1, 0.05, 0.03, 0.025, 0.02)  # of the steps, over and over


@dataclass(frozen=True)
class Row:
    """A case in some formats: its flag, its shape and its number of steps."""

    flag: str
    shape: tuple[int, ...]
    steps: int
    formats: tuple[str, ...]


# More than the usual blocks of 256, 1,024 and 65,536 elements, and no multiple of any; more steps
# than a counter in bfloat16 (256) or float16 (2,048) counts.
ROWS = (
    Row("LARGE", (45, 31), 2, ("float16", "float32", "float64")),
    Row("LARGE", (257, 263), 2, ("float32", "float64")),
    Row("LONG", (2, 2), 330, ("float16", "bfloat16", "float32", "float64")),
    Row("LONG", (3,), 5040, ("float32", "float64")),
)


def cases() -> Iterator[Case]:
    """The generated cases, round by round, those with the richest settings of a rule first."""
    asked = [(rule, part) for rule in RULES.values() for part in rule.generated]
    number = FIRST
    for rule, part in sorted(asked, key=lambda pair: max(pair[0].added, pair[1].added)):
        for row in ROWS if part.steps is None else (r for r in ROWS if r.steps == part.steps):
            for form in row.formats:
                number += 1
                flags = (row.flag, "PLAINER") if part.plainer else (row.flag,)
                draft = drawn(form, flags, row.shape, row.steps)
                yield finished(number, rule.name, FORMATS[form], draft, part.settings)


def drawn(form: str, flags: tuple[str, ...], shape: tuple[int, ...], steps: int) -> Draft:
    """The numbers of a case: streams of Random(2020, "vectors") named by format, part and shape."""
    draw, name = Drawer(FORMATS[form]), f"{shape} {steps}"
    many = f"{steps} steps" if steps > 2 else f"{math.prod(shape)} elements"
    rates = tuple(RATES[k % len(RATES)] for k in range(steps))
    w, g = draw(f"w {name}", *shape), draw(f"g {name}", steps, *shape)
    return Draft(f"{many}, generated", flags, w, g, rates, generated=True)


def sample(shape: tuple[int, ...], steps: int) -> list[tuple[int, int]]:
    """The (step, index) of the stored elements: spread over both, first and last included."""
    n = math.prod(shape)
    each = min(n, SAMPLE if steps == 1 else SAMPLE // 2 if steps == 2 else n)
    at = np.linspace(0, steps - 1, SAMPLE // each).round().astype(int).tolist()
    indices = np.linspace(0, n - 1, each).round().astype(int).tolist()
    return [(k, i) for k in at for i in indices]


def scales(case: Case, given: list[Answer]) -> list[Values]:
    """The size of the parameter before or after every step, whichever is larger; if the rule
    asks for it (`Rule.scales_by_operands`), the size of all operands."""
    rule = RULES[case.rule]
    if case.format in rule.scales_by_operands:
        return [np.asarray(e.scale, dtype=np.float64) for e in run(rule, {}, case)]
    before = [case.w, *(a.w for a in given[:-1])]
    return [np.maximum(np.abs(w), np.abs(a.w)) for w, a in zip(before, given, strict=True)]
