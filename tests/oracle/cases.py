"""The cases of the vectors: ordinary ones, and the edges at which implementations part."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from npdrt.conform.case import LAYOUTS, Case, Neighbour
from npdrt.conform.cases import Draft, Drawer, finished
from npdrt.conform.formats import FORMATS, Format
from npdrt.conform.rules import RULES, Rule

LATER = 400_000  # the first id, less one, of cases that are not in the first version of the files
LATEST = 450_000  # and of those added after these

RATES = (0.1, 0.01, 0.3, 0.05)
SIZES = (1.0, 0.1, 0.01, 2.0)  # of the gradients of a sequence


def edges(f: Format, draw: Drawer) -> Iterator[Draft]:
    """The edge cases that every rule can meet."""
    w, g = draw("w", 2, 3), draw("g", 2, 3)
    zero = np.zeros((2, 3))
    yield Draft("parameter zero", ("ZERO_PARAMETER",), zero, g)
    yield Draft("parameter zero, lr 3", ("ZERO_PARAMETER", "LR_LARGE"), zero, g, 3.0)
    yield Draft("gradient zero", ("ZERO_GRADIENT",), w, zero)
    yield Draft("both zero", ("ZERO_PARAMETER", "ZERO_GRADIENT"), zero, zero)
    yield Draft("lr 0", ("LR_ZERO",), w, g, 0.0)
    yield Draft("lr -0.0", ("LR_ZERO", "SIGNED_ZERO"), w, g, -0.0, result="acceptable")
    yield Draft("lr 1", ("LR_LARGE",), w, g, 1.0)
    yield Draft("lr 3", ("LR_LARGE",), w, g, 3.0)
    yield Draft("lr 1e30", ("LR_HUGE",), w, g, 1e30, result="acceptable")
    yield Draft("lr 1e-40", ("LR_TINY", "SUBNORMAL"), w, g, 1e-40, result="acceptable")
    yield Draft("lr 0.7 + 2^-13", ("LR_PRECISION",), w, g, 0.7 + 2.0**-13)
    for lr in (float("nan"), float("inf"), -0.1):
        yield Draft(f"lr {lr}", ("LR_REFUSED",), w, g, lr, result="error", plain=True)
    yield Draft("negative zeros", ("SIGNED_ZERO",), [-0.0, 1.0, -0.0], [-0.0, -0.0, 0.5])
    yield from sizes(f, draw)
    yield from shapes(draw)
    yield from not_finite()


def sizes(f: Format, draw: Drawer) -> Iterator[Draft]:
    """Elements of extreme size."""
    w, g = draw("w", 2, 3), draw("g", 2, 3)
    small = [2.0**-20] if f.name == "float16" else [2.0**-20, 2.0**-30]
    for size in small:
        tiny = draw("tiny", 2, 3, size=size)
        yield Draft(f"gradient of about {size:.0e}", ("TINY_GRADIENT", "SMALL_NORM"), w, tiny)
        yield Draft(f"parameter of about {size:.0e}", ("SMALL_NORM",), tiny, g)
    half = f.emax // 2
    low = half + (8 if f.name == "float16" else 15)  # squares are below half of the smallest number
    big, little = 2.0 ** (half + 2), 2.0**-low
    large, slight = draw("big", 2, 3, size=big), draw("little", 2, 3, size=little)
    far = f.name != "float64"  # where float64 itself over- or underflows nothing is promised
    gate = "valid" if far else "acceptable"
    if f.name != "bfloat16":
        yield Draft(f"parameter of 2^{half + 2}", ("NORM_OVERFLOW",), large, g, result=gate)
        yield Draft(f"gradient of 2^{half + 2}", ("NORM_OVERFLOW",), w, large, result=gate)
        under = ("NORM_UNDERFLOW", "SMALL_NORM")
        yield Draft(f"gradient of 2^-{low}", under, w, slight, result=gate)
        yield Draft(f"parameter of 2^-{low}", under, slight, g, result=gate)
    sub = f.round(np.array([3.0, -5.0, 7.0]) * f.smallest)
    one = f.round(np.array([0.5, -1.0, 2.0]))
    most = f.round(np.array([f.largest / 2, -f.largest / 4, 1.0]))
    yield Draft("parameter subnormal", ("SUBNORMAL",), sub, one, result="acceptable")
    yield Draft("gradient subnormal", ("SUBNORMAL", "RATE_OVERFLOW"), one, sub, result="acceptable")
    yield Draft("parameter near the largest", ("LARGEST",), most, one, result="acceptable")
    yield Draft("gradient near the largest", ("LARGEST",), one, most, result="acceptable")
    yield Draft("w - s g is 0", ("CANCELLATION",), [2.0, 1.0], [2.0, 1.0], 1.0)
    yield Draft("g orthogonal to w", ("CANCELLATION",), [1.0, 0.0], [0.0, 1.0], 0.5)


def shapes(draw: Drawer) -> Iterator[Draft]:
    """Shapes, and what an array's shape or name might be thought to mean."""
    for shape in ((), (1,), (0,), (2, 0), (5,), (2, 1, 3), (17,)):
        w, g = draw(f"w{shape}", *shape), draw(f"g{shape}", *shape)
        yield Draft(f"shape {shape}", ("SHAPE",), w, g)
    rows = draw("rows", 3, 2) * np.array([[1.0], [8.0], [0.125]])
    yield Draft("rows of different norms", ("ONE_ROW_LARGE",), rows, draw("g rows", 3, 2))
    yield Draft("a bias", ("BIAS",), draw("b", 3), draw("g b", 3), kind="bias")


def not_finite() -> Iterator[Draft]:
    """Infinities and NaN. What layerwise rules do with them is npdrt's definition."""
    for name, x, flag in (("inf", np.inf, "INFINITE"), ("NaN", np.nan, "NAN")):
        for where in ("parameter", "gradient"):
            w, g = np.array([1.0, -2.0, 0.5]), np.array([0.25, 1.0, -1.0])
            (w if where == "parameter" else g)[1] = x
            yield Draft(f"{name} in the {where}", (flag,), w, g, result="acceptable")


def sequences(draw: Drawer) -> Iterator[Draft]:
    """Several steps: fresh starts, and the middle of a run."""
    g = np.stack([draw(f"g{k}", 2, 3, size=size) for k, size in enumerate(SIZES)])
    yield Draft("four steps", ("SEQUENCE",), draw("w", 2, 3), g, RATES)
    b = np.stack([draw(f"b{k}", 3, size=size) for k, size in enumerate(SIZES)])
    yield Draft("four steps of a bias", ("SEQUENCE", "BIAS"), draw("w", 3), b, RATES, kind="bias")
    zeros = np.stack([draw("z0", 4), np.zeros(4), draw("z1", 4), draw("z2", 4)])
    yield Draft("zero at first", ("SEQUENCE", "ZERO_PARAMETER"), np.zeros(4), zeros, RATES)
    if draw.number.precision >= 24:
        for n in (8, 64):
            g = np.stack([draw(f"t{k}", 3) for k in range(n)])
            rates = tuple(0.1 / (1 + k % 5) for k in range(n))
            yield Draft(f"{n} steps", ("TRAJECTORY",), draw("t", 3), g, rates)


def middle(rule: Rule, settings: dict[str, Any], draw: Drawer) -> Iterator[Draft]:
    """One step from a state that is given."""
    w, g = draw("w", 2, 3), draw("g", 2, 3)
    yield Draft("one step", ("ORDINARY", "FIRST_STEP"), w, g)
    if rule.accumulates(settings):
        yield Draft("from a state", ("ORDINARY",), w, g, state=rule.start(draw, 9, 0.3))


def operands(draw: Drawer) -> Iterator[Draft]:
    """Arrays that lie in memory in other ways, and one of four dimensions."""
    w, g = draw("w layout", 3, 4), draw("g layout", 3, 4)
    for layout in LAYOUTS[1:]:
        yield Draft(f"layout {layout}", ("LAYOUT",), w, g, layout=layout)
    shape = (3, 2, 2, 2)
    g = np.stack([draw("g kernel", *shape), draw("h kernel", *shape, size=0.1)])
    yield Draft("four dimensions", ("KERNEL", "SEQUENCE"), draw("kernel", *shape), g, RATES[:2])


def neighbours(draw: Drawer) -> Iterator[Draft]:
    """A weight and a bias in one optimizer, each of them with the other as its neighbour."""
    pair = [
        Neighbour(draw(f"{n} beside", 2, 3), tuple(draw(f"{n} beside {k}", 2, 3) for k in range(3)))
        for n in ("weight", "bias")
    ]
    for kind, own, other in zip(("weight", "bias"), pair, pair[::-1], strict=True):
        yield Draft(
            f"a {kind} beside another tensor", ("NEIGHBOUR", "SEQUENCE"), own.w, np.stack(own.g),
            RATES[:3], kind=kind, neighbour=other,
        )  # fmt: skip


def cases() -> Iterator[Case]:
    """All cases of the updates but the generated ones: those of the first version of the files,
    numbered from 1, then the others."""
    for first, drafted in ((0, drafts), (LATER, later), (LATEST, latest)):
        number = first
        for rule in RULES.values():
            for f in FORMATS.values():
                for draft, settings in drafted(rule, f, Drawer(f)):
                    number += 1
                    yield finished(number, rule.name, f, gated(rule, draft), settings)


def gated(rule: Rule, draft: Draft) -> Draft:
    """The draft; acceptable if it is no matrix, and the rule is defined for matrices alone."""
    odd = rule.matrices and (np.ndim(draft.w) < 2 or not np.size(draft.w))
    return replace(draft, result="acceptable") if odd and draft.result == "valid" else draft


def later(rule: Rule, f: Format, draw: Drawer) -> Iterator[tuple[Draft, dict[str, Any]]]:
    """The drafts of cases that are not in the first version, with their settings."""
    for settings in rule.asked[:2]:
        for draft in operands(draw):
            yield draft, settings
    for settings in rule.asked[:3]:
        for draft in neighbours(draw):
            yield draft, settings
    for draft in rule.later(draw):
        yield draft, rule.asked[0]


def latest(rule: Rule, f: Format, draw: Drawer) -> Iterator[tuple[Draft, dict[str, Any]]]:
    """The drafts that were added last, with their settings."""
    for settings in rule.asked[:2]:
        for draft in lines(draw):
            yield draft, settings
    for settings in rule.asked:
        if rule.accumulates(settings):
            for draft in (*pauses(draw), *late(rule, draw)):
                yield draft, settings


def lines(draw: Drawer) -> Iterator[Draft]:
    """Matrices of one row or one column, which are no biases, and slices that are square."""
    for shape in ((1, 5), (5, 1), (2, 3, 3)):
        w, g = draw(f"w{shape}", *shape), draw(f"g{shape}", *shape)
        yield Draft(f"shape {shape}", ("SHAPE",), w, g)


def pauses(draw: Drawer) -> Iterator[Draft]:
    """A step at rate 0 among others, which moves the state all the same."""
    g = np.stack([draw(f"pause {k}", 2, 3) for k in range(3)])
    rates = (0.1, 0.0, 0.05)
    yield Draft("lr 0 at the second step", ("SEQUENCE", "LR_ZERO"), draw("w", 2, 3), g, rates)


def late(rule: Rule, draw: Drawer) -> Iterator[Draft]:
    """Starts in the middle, far on, and from a state of zeros, which is no fresh one."""
    w, g = draw("w", 2, 3), draw("g", 2, 3)

    yield Draft(
        "from a state of zeros", ("ORDINARY", "ZERO_STATE"), w, g, state=rule.start(draw, 9, 0.0)
    )
    for t in (401, 6001, 70_001):
        state = rule.start(draw, t - 1, 0.3)
        yield Draft(f"t = {t}", ("LATE_STEP", "COUNTER"), w, g, state=state)


def drafts(rule: Rule, f: Format, draw: Drawer) -> Iterator[tuple[Draft, dict[str, Any]]]:
    """Every draft with the settings it is asked under."""
    for settings in rule.asked:
        for draft in (*middle(rule, settings, draw), *sequences(draw)):
            yield draft, settings
    for draft in (*edges(f, draw), *rule.edges(f, draw)):
        for settings in rule.asked[: 1 if draft.plain or draft.settings else 2]:
            yield draft, {**settings, **draft.settings}
