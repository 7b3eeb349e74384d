"""Cases too large for the files: their numbers are drawn from Philox words whenever they are read.

A file has of such a test its shape, its steps and 64 exact elements. Everything else that is
expected of it is npdrt's own answer (`npdrt.conform.canonical`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from npdrt.conform.case import Answer, Case
from npdrt.conform.cases import SETTINGS, Draft, Drawer, finished
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
# rule -> settings, the richest first; the steps of lars large enough to show in float32
CHOICES: dict[str, list[dict[str, Any]]] = {
    "sgd": [SETTINGS["sgd"][k] for k in (1, 7, 2, 0)],
    "adam": [SETTINGS["adam"][k] for k in (1, 2, 0)],
    "lars": [{**SETTINGS["lars"][k], "trust_coefficient": 0.1} for k in (1, 0, 2)],
    "lars_lesion": [{}],
    "fromage": [SETTINGS["fromage"][k] for k in (1, 0)],
}


# Dampening and Nesterov's velocity exclude each other: both are asked, the former for 330 steps.
# The published defaults of lars are for implementations that have them built in.
LATER: list[tuple[str, dict[str, Any], Row, bool]] = [
    ("sgd", SETTINGS["sgd"][4], ROWS[2], False),
    *(("lars", SETTINGS["lars"][0], row, True) for row in ROWS),
]


def cases() -> Iterator[Case]:
    """The generated cases, those with the richest settings of a rule first."""
    asked = [
        (rule, settings, row, k > 0)
        for rule, choices in CHOICES.items()
        for k, settings in enumerate(choices)
        for row in ROWS
    ]
    number = FIRST
    for rule, settings, row, plainer in [*asked, *LATER]:
        for form in row.formats:
            number += 1
            flags = (row.flag, "PLAINER") if plainer else (row.flag,)
            draft = drawn(form, flags, row.shape, row.steps)
            yield finished(number, rule, FORMATS[form], draft, settings)


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
    """The size of the parameter before or after every step, whichever is larger; of adam in float64
    that of all operands, since the rounding of 1 - beta^t in float64 counts there."""
    if (case.rule, case.format) == ("adam", "float64"):
        return [np.asarray(e.scale, dtype=np.float64) for e in run(RULES["adam"], {}, case)]
    before = [case.w, *(a.w for a in given[:-1])]
    return [np.maximum(np.abs(w), np.abs(a.w)) for w, a in zip(before, given, strict=True)]
