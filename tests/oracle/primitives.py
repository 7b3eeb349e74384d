"""Vectors of every primitive: its value and its vjp, from references that share none of its code.

`CASES` is the table, a line a case. A reference (`REFERENCES`) is the definition of the value in
400 digits; the derivative follows from it by `oracle.dual` and both are rounded once. At a
kink or tie the reference states the subgradient that npdrt documents, and the test is
"acceptable" (reported, not gated), since another choice is no error; so is a test whose answer is
another where subnormals are flushed to zero. Values and derivatives that are not finite are
stated in the table, but for a NaN that passes through sums, products or exp, as mpmath has it too.

JSON. An array: {"dtype", "shape", "bits"}, or {"dtype", "shape", "values"} for int64 and bool. A
number: {"scalar": bits of a float64}. Settings: as Python's keyword arguments, each present;
tuples are lists, a float is a scalar, a slice {"slice": [start, stop, step]}, an ellipsis "...".
"""

from __future__ import annotations

import itertools
import math
import types
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from npdrt.arrays import quiet
from npdrt.autodiff import PRIMITIVES, Tensor, backward
from npdrt.conform.encoding import DOUBLE, Json, array, read_array
from npdrt.conform.formats import FORMATS, Format

from . import primitives_layers
from .dual import (
    DIGITS,
    Dual,
    constants,
    each,
    elementwise,
    exp,
    fill,
    mpmath,
    pull_back,
    rounded,
    variables,
)
from .primitives_case import (
    INF,
    LENIENT,
    NAN,
    Case,
    Draw,
    apart,
    case,
    cotangent_for,
    either,
    fixed,
    largest,
    near,
    normal,
    positive,
    signs,
    spread,
    subnormal,
    whole,
)

TITLE = "Primitives: value and vjp"
NOTES = {
    "ORDINARY": {"bugType": "BASIC", "description": "values near 1"},
    "ZERO": {"bugType": "EDGE_CASE", "description": "zeros among the arguments, or as the value"},
    "KINK": {"bugType": "DEFINED", "description": "the subgradient that npdrt documents"},
    "TIE": {
        "bugType": "DEFINED",
        "description": "equal candidates share; max_pool takes the first",
    },
    "CONVENTION": {"bugType": "DEFINED", "description": "where formulas of one function differ"},
    "INF": {"bugType": "EDGE_CASE", "description": "infinite elements"},
    "NAN": {"bugType": "EDGE_CASE", "description": "NaN among the arguments, or as the value"},
    "OVERFLOW": {"bugType": "EDGE_CASE", "description": "a value or an intermediate overflows"},
    "UNDERFLOW": {"bugType": "EDGE_CASE", "description": "a value rounds to zero, or nearly"},
    "SUBNORMAL": {"bugType": "EDGE_CASE", "description": "subnormals, flushed by some hardware"},
    "LARGE_LOGITS": {"bugType": "MISSING_STEP", "description": "exp overflows without a shift"},
    "EMPTY": {"bugType": "EDGE_CASE", "description": "an array without elements"},
    "SCALAR": {"bugType": "EDGE_CASE", "description": "a 0-d array or a number"},
    "BROADCAST": {"bugType": "FUNCTIONALITY", "description": "the vjp sums over stretched axes"},
    "CANCELLATION": {"bugType": "EDGE_CASE", "description": "leading digits cancel"},
}
DTYPES = ("float32", "float64")

# --- the table -------------------------------------------------------------------------------

UNARY: dict[str, Draw] = {
    "absolute": apart(3, 4),
    "erf": fixed(np.linspace(-5, 5, 17)),
    "exp": normal(3, 4),
    "gelu": spread(2.0, 3, 5),
    "leaky_relu": apart(3, 4),
    "log": positive(3, 4),
    "negative": normal(3, 4),
    "relu": apart(3, 4),
    "sigmoid": spread(4.0, 3, 4),
    "softplus": spread(4.0, 3, 4),
    "sqrt": positive(3, 4),
    "tanh": normal(3, 4),
}  # an ordinary argument each; some rows below are held on every one of them


def unary() -> Iterator[Case]:
    """The shapes that every elementwise operation meets, and that a NaN stays one."""
    for name, ordinary in UNARY.items():
        yield case(name, "ordinary values", ordinary)
        yield case(name, "0-d", fixed(0.75)).flag("SCALAR")
        yield case(name, "no elements", fixed(np.zeros((2, 0, 3)))).flag("EMPTY")
    for name in ("erf", "exp", "gelu", "log", "sigmoid", "softplus", "sqrt", "tanh"):
        yield case(name, "NaN", fixed([NAN])).flag("NAN").gives([NAN], [NAN])
    yield case("negative", "NaN", fixed([NAN, 1.0])).flag("NAN").gives([NAN, -1], [-1, -1])


ELEMENTWISE = [
    *unary(),
    case("absolute", "kink: slope 0 at 0", fixed([-2, 0, 3])).flag("KINK"),
    case("absolute", "infinite", fixed([-INF, INF])).flag("INF").gives([INF, INF], [-1, 1]),
    case("absolute", "NaN", fixed([NAN])).flag("NAN", "CONVENTION").gives([NAN], [NAN]),
    case("absolute", "subnormal", subnormal(-1, 3)).flag("SUBNORMAL"),
    case("erf", "both sides of 0.46875", near(0.46875, -1, 0, 1)),
    case("erf", "zero and small", fixed([0, 1e-3, -1e-3, 2.0**-20, -(2.0**-20)])).flag("ZERO"),
    case("erf", "large", fixed([-1e4, -6, 6, 30, 0.5])),
    case("erf", "infinite", fixed([-INF, INF])).flag("INF").gives([-1, 1], [0, 0]),
    case("erf", "subnormal", subnormal(-2, 5)).flag("SUBNORMAL"),
    case("exp", "zero and small", fixed([0, 2.0**-30, -(2.0**-30)])).flag("ZERO"),
    case("exp", "large, and not beyond", fixed([80, -80, 87])),
    case("exp", "overflows", fixed([1000, 1])).flag("OVERFLOW"),
    case("exp", "underflows to 0", fixed([-2000, 0])).flag("UNDERFLOW"),
    case("exp", "subnormal value", either([-90, -100], [-710, -740]))
    .flag("UNDERFLOW", "SUBNORMAL"),
    case("exp", "infinite", fixed([-INF, INF])).flag("INF").gives([0, INF], [0, INF]),
    case("gelu", "zero and small", fixed([0, 1e-3, -1e-3, 2.0**-20, -(2.0**-20)])).flag("ZERO"),
    case("gelu", "large", fixed([-1e15, -1e4, -50, 50, 1e4])),
    case("gelu", "large positive", fixed([1e15])),
    case("leaky_relu", "kink: slope a at 0", fixed([-1, 0, 1])).flag("KINK"),
    case("leaky_relu", "another slope", apart(3, 4), a=0.25),
    case("leaky_relu", "kink: slope a at 0, another slope", fixed([-1, 0, 1]), a=0.25).flag("KINK"),
    case("leaky_relu", "infinite", fixed([-INF, INF]), a=0.25).flag("INF")
    .gives([-INF, INF], [0.25, 1]),
    case("leaky_relu", "NaN", fixed([NAN])).flag("NAN", "CONVENTION").gives([NAN], [0.01]),
    case("log", "near 1", near(1.0, -2, -1, 0, 1, 2)).flag("ZERO", "CANCELLATION"),
    case("log", "large and small", fixed([1e30, 1e-30, 7])),
    case("log", "zero: infinite slope", fixed([0])).flag("ZERO", "INF").gives([-INF], [INF]),
    case("log", "infinite", fixed([INF])).flag("INF").gives([INF], [0]),
    case("log", "negative: no real value", fixed([-1])).flag("NAN").gives([NAN], [-1]),
    case("log", "subnormal: the slope overflows", subnormal(4, 1000)).flag("SUBNORMAL", "OVERFLOW"),
    case("negative", "zero and infinite", fixed([0, -INF, INF])).flag("ZERO", "INF")
    .gives([0, INF, -INF], [-1, -1, -1]),
    case("negative", "subnormal", subnormal(-1, 3)).flag("SUBNORMAL"),
    case("relu", "kink: slope 0 at 0", fixed([-1, 0, 1])).flag("KINK"),
    case("relu", "infinite", fixed([-INF, INF])).flag("INF").gives([0, INF], [0, 1]),
    case("relu", "NaN", fixed([NAN, 1])).flag("NAN", "CONVENTION").gives([NAN, 1], [0, 1]),
    case("relu", "subnormal", subnormal(-1, 3)).flag("SUBNORMAL"),
    case("sigmoid", "zero and small", fixed([0, 2.0**-20, -(2.0**-20)])).flag("ZERO"),
    case("sigmoid", "large: nothing overflows", fixed([-1e4, -1000, 1000, 1e4, 1]))
    .flag("OVERFLOW"),
    case("sigmoid", "small values", fixed([-60, -70, -80])),
    case("sigmoid", "infinite", fixed([-INF, INF])).flag("INF").gives([0, 1], [0, 0]),
    case("softplus", "zero and small", fixed([0, 2.0**-20, -(2.0**-20)])).flag("ZERO"),
    case("softplus", "large: nothing overflows", fixed([-1e4, -1000, 1000, 1e4]))
    .flag("OVERFLOW"),
    case("softplus", "small values", fixed([-60, -70, -80])).flag("CANCELLATION"),
    case("softplus", "infinite", fixed([-INF, INF])).flag("INF").gives([0, INF], [0, 1]),
    case("sqrt", "large and small", fixed([1e30, 1e-30, 2])),
    case("sqrt", "zero: infinite slope", fixed([0])).flag("ZERO", "INF").gives([0], [INF]),
    case("sqrt", "infinite", fixed([INF])).flag("INF").gives([INF], [0]),
    case("sqrt", "negative: no real value", fixed([-1])).flag("NAN").gives([NAN], [NAN]),
    case("sqrt", "subnormal", subnormal(4, 7)).flag("SUBNORMAL"),
    case("tanh", "zero and small", fixed([0, 1e-3, 2.0**-20, -(2.0**-20)])).flag("ZERO"),
    case("tanh", "large", fixed([-1e4, -20, 20, 1e30, 0.5])),
    case("tanh", "infinite", fixed([-INF, INF])).flag("INF").gives([-1, 1], [0, 0]),
    case("tanh", "subnormal", subnormal(-2, 5)).flag("SUBNORMAL"),
]  # fmt: skip


def binary() -> Iterator[Case]:
    """The shapes that every operation of two arguments meets."""
    for name in ("add", "subtract", "multiply", "divide", "maximum", "minimum", "power"):
        a, b = (apart, apart) if name in ("maximum", "minimum") else (positive, positive)
        yield case(name, "equal shapes", a(3, 3), b(3, 3))
        yield case(name, "a column and a row", a(3, 1), b(1, 4)).flag("BROADCAST")
        yield case(name, "new axes", a(2, 1, 3), b(2, 1)).flag("BROADCAST")
        yield case(name, "0-d and a row", a(), b(4)).flag("BROADCAST", "SCALAR")
        yield case(name, "no elements", a(0, 3), b(1, 3)).flag("EMPTY", "BROADCAST")
        yield case(name, "an array and a number", a(5), 2.5).flag("SCALAR")


PAIRS = [
    *binary(),
    case("add", "both signs", normal(3, 4), normal(3, 4)),
    case("add", "a number and an array", 2.5, normal(3)).flag("SCALAR"),
    case("add", "cancels to the last digits", near(1.0, 1, 3, -2), fixed([-1, -1, -1]))
    .flag("CANCELLATION"),
    case("add", "overflows", largest(1, -1, 0.5), largest(1, -1, 0.25)).flag("OVERFLOW"),
    case("add", "infinite", fixed([INF, INF, 1]), fixed([1, -INF, -INF])).flag("INF", "NAN")
    .gives([INF, NAN, -INF], [1, 1, 1], [1, 1, 1]),
    case("add", "subnormal", subnormal(3, -1), subnormal(4, 2)).flag("SUBNORMAL"),
    case("subtract", "both signs", normal(2, 1, 4), normal(3, 1)).flag("BROADCAST"),
    case("subtract", "a number and an array", 2.5, normal(3)).flag("SCALAR"),
    case("subtract", "neighbours", near(1.0, 1, 3, -2), fixed([1, 1, 1])).flag("CANCELLATION"),
    case("subtract", "infinite", fixed([INF, INF, NAN]), fixed([1, INF, 1])).flag("INF", "NAN")
    .gives([INF, NAN, NAN], [1, 1, 1], [-1, -1, -1]),
    case("multiply", "both signs", normal(3, 4), normal(3, 1)).flag("BROADCAST"),
    case("multiply", "zeros", fixed([0, 2, 0]), fixed([3, 0, 0])).flag("ZERO"),
    case("multiply", "overflows", largest(0.5, 0.5), fixed([4, 0.25])).flag("OVERFLOW"),
    case("multiply", "underflows to 0", either([1e-38, 1], [1e-300, 1]), fixed([1e-30, 1]))
    .flag("UNDERFLOW"),
    case("multiply", "subnormal", subnormal(3, 8), fixed([2, 0.5])).flag("SUBNORMAL"),
    case("multiply", "infinite", fixed([INF, INF]), fixed([2, 0])).flag("INF", "NAN")
    .gives([INF, NAN], [2, 0], [INF, INF]),
    case("divide", "both signs", normal(3, 4), positive(1, 4)).flag("BROADCAST"),
    case("divide", "a number and an array", 2.0, positive(3)).flag("SCALAR"),
    case("divide", "zero above", fixed([0, 0]), fixed([2, -3])).flag("ZERO"),
    case("divide", "by zero", fixed([1, -1]), fixed([0, 0])).fix(1).flag("ZERO", "INF")
    .gives([INF, -INF], [INF, INF], None),
    case("divide", "zero by zero", fixed([0]), fixed([0])).fix(1).flag("ZERO", "NAN")
    .gives([NAN], [INF], None),
    case("divide", "by infinity", fixed([2, -INF]), fixed([INF, INF])).fix(1).flag("INF", "NAN")
    .gives([0, NAN], [0, 0], None),
    case("divide", "overflows", largest(0.5, 0.25), fixed([0.25, 1])).fix(1).flag("OVERFLOW"),
    case("power", "exponents of both signs", positive(3, 4), normal(4)).flag("BROADCAST"),
    case("power", "a whole exponent of any base", normal(3, 4), 3.0),
    case("power", "a negative exponent", positive(3, 4), -0.5),
    case("power", "a number to an array", 2.5, normal(3, 4)).flag("SCALAR"),
    case("power", "squares of negative values and 0", fixed([-3, 0, 2]), 2.0).flag("ZERO"),
    case("power", "exponent 1 at 0", fixed([0, 2]), 1.0).flag("ZERO"),
    case("power", "exponent 0: slope 0, also at 0", fixed([0, 2, -3]), 0.0).flag("ZERO"),
    case("power", "exponents of 0 in an array", fixed([0, 2]), fixed([0, 0])).fix(1).flag("ZERO"),
    case("power", "base 0: slope 0 for the exponent", fixed([0, 1]), fixed([2, 2])).flag("ZERO")
    .gives([0, 1], [0, 2], [0, 0]),
    case("power", "negative base: no slope for the exponent", fixed([-2]), fixed([2]))
    .flag("NAN", "CONVENTION").gives([4], [-4], [NAN]),
    case("power", "negative base, no real value", fixed([-2]), 0.5).flag("NAN")
    .gives([NAN], [NAN], None),
    case("power", "overflows", fixed([1e30, 2]), 20.0).flag("OVERFLOW"),
    case("maximum", "tie: half each", fixed([1, 2, 3]), fixed([2, 2, 2])).flag("TIE"),
    case("maximum", "with a number", apart(5), 0.0),
    case("maximum", "infinite", fixed([INF, -INF, 0]), fixed([1, 1, INF])).flag("INF")
    .gives([INF, 1, INF], [1, 0, 0], [0, 1, 1]),
    case("minimum", "tie: half each", fixed([1, 2, 3]), fixed([2, 2, 2])).flag("TIE"),
    case("minimum", "with a number", apart(5), 0.0),
    case("minimum", "infinite", fixed([INF, -INF, 0]), fixed([1, 1, INF])).flag("INF")
    .gives([1, -INF, 0], [0, 1, 1], [1, 0, 0]),
    case("where", "equal shapes", np.array([True, False, True]), normal(3), normal(3)),
    case("where", "all three broadcast", np.array([[True], [False], [True]]), normal(4),
         normal(2, 1, 1)).flag("BROADCAST"),
    case("where", "0-d", np.array(False), normal(), normal()).flag("SCALAR"),
    case("where", "no elements", np.zeros((0, 2), dtype=np.bool_), normal(2), normal(1, 1))
    .flag("EMPTY", "BROADCAST"),
    case("where", "NaN and inf stay where they are", np.array([True, True, False, False]),
         fixed([NAN, 1, NAN, 2]), fixed([3, INF, 4, INF])).flag("NAN", "INF")
    .gives([NAN, 1, 4, INF], None, [1, 1, 0, 0], [0, 0, 1, 1]),
    case("clip", "both limits", apart(3, 4), low=-0.25, high=0.5),
    case("clip", "an upper limit", apart(3, 4), high=0.25),
    case("clip", "a lower limit", apart(3, 4), low=0.0),
    case("clip", "kink: slope 1 on the limits", fixed([-2, -1, 0, 1, 2]), low=-1.0, high=1.0)
    .flag("KINK"),
    case("clip", "infinite", fixed([-INF, 0, INF]), low=-1.0, high=1.0).flag("INF")
    .gives([-1, 0, 1], [0, 1, 0]),
    case("clip", "0-d", fixed(3.0), low=-1.0, high=1.0).flag("SCALAR"),
    case("clip", "no elements", fixed(np.zeros((0, 3))), low=-1.0, high=1.0).flag("EMPTY"),
]  # fmt: skip

PRODUCTS = [
    case("matmul", "two matrices", normal(3, 4), normal(4, 5)),
    case("matmul", "stacks that broadcast", normal(2, 1, 2, 3), normal(2, 3, 1)).flag("BROADCAST"),
    case("matmul", "a row by a column", normal(1, 5), normal(5, 1)),
    case("matmul", "a column by a row", normal(4, 1), normal(1, 3)),
    case("matmul", "nothing to sum over", normal(2, 0), normal(0, 3)).flag("EMPTY"),
    case("matmul", "no rows", normal(0, 4), normal(4, 3)).flag("EMPTY"),
    case("matmul", "long sums", normal(2, 24), normal(24, 2)),
    case("matmul", "zeros", fixed(np.zeros((2, 3))), normal(3, 2)).flag("ZERO"),
    case("matmul", "rows of very different size", fixed([[1e10, 1.0], [1e-10, 1e-12]]),
         normal(2, 2)),
    case("matmul", "a NaN reaches its row and column", fixed([[NAN, 1], [2, 3]]),
         fixed([[1, 1], [1, 1]])).flag("NAN")
    .gives([[NAN, NAN], [5, 5]], [[2, 2], [2, 2]], [[NAN, NAN], [4, 4]]),
    case("matmul", "inf times 0 is NaN", fixed([[INF, 1], [2, 3]]), fixed([[0, 1], [1, 1]]))
    .flag("INF", "NAN")
    .gives([[NAN, INF], [3, 5]], [[1, 2], [1, 2]], [[INF, INF], [4, 4]]),
    case("linear", "with a bias", normal(4, 3), normal(3, 3), normal(3)),
    case("linear", "without a bias", normal(4, 3), normal(2, 3)),
    case("linear", "more than one batch axis", normal(2, 2, 3), normal(2, 3), normal(2)),
    case("linear", "a batch of one", normal(1, 4), normal(3, 4), normal(3)),
    case("linear", "one feature in and out", normal(4, 1), normal(1, 1), normal(1)),
    case("linear", "no batch", normal(0, 4), normal(3, 4), normal(3)).flag("EMPTY"),
    case("linear", "no batch, two axes", normal(0, 2, 4), normal(3, 4), normal(3)).flag("EMPTY"),
    case("linear", "long sums", normal(2, 24), normal(2, 24), normal(2)),
    case("linear", "zero weight and bias", normal(3, 2), fixed(np.zeros((2, 2))),
         fixed([0, 0])).flag("ZERO"),
    case("linear", "the bias cancels the product", fixed([[1, 0.5], [2, 3]]),
         fixed([[3, 2], [1, 1]]), near(-4.0, 1, 3)).flag("CANCELLATION"),
    case("linear", "a NaN reaches its row", fixed([[NAN, 1], [2, 3]]), fixed([[1, 1]]), fixed([1]))
    .flag("NAN").gives([[NAN], [6]], [[1, 1], [1, 1]], [[NAN, 4]], [2]),
    case("spectral_normalise", "ordinary values", normal(3, 4), positive(3), positive(4))
    .fix(1, 2),
    case("spectral_normalise", "unit vectors", positive(2, 3), fixed([0.6, 0.8]),
         fixed([0.0, 1.0, 0.0])).fix(1, 2),
    case("spectral_normalise", "one row", fixed([[-2.5, 1]]), fixed([1]), fixed([0.6, 0.8]))
    .fix(1, 2),
    case("spectral_normalise", "negative sigma", fixed([[-1, -2], [-3, -1]]), fixed([0.6, 0.8]),
         fixed([0.8, 0.6])).fix(1, 2),
    case("spectral_normalise", "zero weight: sigma counts as 1", fixed([[0, 0], [0, 0]]),
         fixed([0.6, 0.8]), fixed([1, 0])).fix(1, 2).flag("ZERO", "KINK")
    .gives([[0, 0], [0, 0]], [[1, 1], [1, 1]], None, None),
]  # fmt: skip


def reductions() -> Iterator[Case]:
    """Every reduction over every kind of axis, with and without keepdims, and of odd shapes."""
    makes = {"sum": normal, "mean": normal, "max": apart, "var": normal, "logsumexp": normal}
    axes = ((None, False), (-2, True), ((0, 2), False), ((-1, 0), True))
    for name, make in makes.items():
        for axis, keepdims in axes:
            comment = f"axis {axis}{', kept' if keepdims else ''}"
            yield case(name, comment, make(2, 3, 2), axis=axis, keepdims=keepdims)
        yield case(name, "0-d", fixed(-1.5)).flag("SCALAR")
        yield case(name, "long", make(24))
        yield case(name, "no slices", fixed(np.zeros((2, 0))), axis=0).flag("EMPTY")
        if name != "max":
            yield case(name, "a NaN stays in its slice", fixed([[NAN, 1], [2, 3]]), axis=1).flag(
                "NAN"
            )


REDUCTIONS = [
    *reductions(),
    case("sum", "of nothing is 0", fixed(np.zeros((0, 3))), axis=0).flag("EMPTY", "ZERO"),
    case("sum", "infinite", fixed([[INF, 1], [INF, -INF]]), axis=1).flag("INF", "NAN")
    .gives([INF, NAN], [[1, 1], [1, 1]]),
    case("sum", "overflows", largest(0.75, 0.75)).flag("OVERFLOW"),
    case("sum", "of terms that mostly cancel", fixed([4096.0, 0.125, -4095.5, 0.25, 1e-3]))
    .flag("CANCELLATION").within(8192),
    case("mean", "of zeros", fixed([0, 0, 0])).flag("ZERO"),
    case("max", "tie: equal parts", fixed([[1, 3, 3], [2, 2, 2], [5, 4, 4]]), axis=1).flag("TIE"),
    case("max", "tie over all axes", fixed([[7, 1], [7, 7]])).flag("TIE"),
    case("max", "an infinite winner", fixed([[INF, 1], [-INF, 2]]), axis=1).flag("INF")
    .gives([INF, 2], [[1, 0], [0, 1]]),
    case("max", "tie of infinities", fixed([-INF, -INF])).flag("INF", "TIE")
    .gives(-INF, [0.5, 0.5]),
    case("max", "a NaN stays in its slice", fixed([[NAN, 1], [2, 3]]), axis=1)
    .flag("NAN", "CONVENTION").gives([NAN, 3], [[NAN, NAN], [0, 1]]),
    case("var", "correction 1", normal(3, 4), axis=1, correction=1.0),
    case("var", "of equal values is 0", fixed([2, 2, 2])).flag("ZERO"),
    case("var", "a large mean loses nothing", fixed([4096.5, 4097.25, 4098.75, 4095.5]))
    .flag("CANCELLATION"),
    case("var", "infinite", fixed([INF, 1])).flag("INF", "NAN", "CONVENTION")
    .gives(NAN, [NAN, -INF]),
    case("logsumexp", "large: nothing overflows", fixed([[1e4, -1e4, 9999], [1e30, 1e30, 0]]),
         axis=1).flag("LARGE_LOGITS"),
    case("logsumexp", "very negative: nothing underflows", fixed([[-1e4, -9999], [-1e30, -1e30]]),
         axis=1).flag("LARGE_LOGITS"),
    case("logsumexp", "-inf counts as nothing", fixed([[0, -INF, 0], [-INF, 2, -INF]]), axis=1)
    .flag("INF"),
    case("logsumexp", "all -inf", fixed([-INF, -INF])).flag("INF", "CONVENTION")
    .gives(-INF, [NAN, NAN]),
]  # fmt: skip


def softmaxes() -> Iterator[Case]:
    """Softmax and its logarithm: axes, stability, odd shapes."""
    for name in ("softmax", "log_softmax"):
        for axis in (0, 1, -1):
            yield case(name, f"axis {axis}", normal(2, 2, 3), axis=axis)
        yield case(name, "one class", normal(3, 1))
        yield case(name, "one dimension", normal(5))
        yield case(name, "no rows", fixed(np.zeros((0, 3)))).flag("EMPTY")
        yield case(name, "equal", fixed(np.zeros((2, 8)))).flag("ZERO")
        for scale in (1e4, 1e30):
            logits = fixed(scale * np.array([[1, -1, 0.5], [-1, -1, -1], [1, 1, 0.25]]))
            yield case(name, f"logits of {scale:g}", logits).flag("LARGE_LOGITS")
        yield case(name, "far apart, and close beside them", fixed([[50, 0, 49.5], [0, 0.5, 90]]))
        yield case(name, "-inf masks", fixed([[0, -INF, 1], [-INF, 2, -INF]])).flag("INF")
        yield case(name, "a NaN stays in its row", fixed([[NAN, 1], [2, 3]])).flag("NAN")


def cross_entropies() -> Iterator[Case]:
    """Softmax cross-entropy: smoothing, batches, stability."""
    name, labels = "softmax_cross_entropy", whole([3, 0, 2, 2, 1])
    large = np.array([[1, -1, 0.5], [-1, -1, -1], [1, 1, 0.25]])
    for smoothing in (0.0, 0.125, 0.75):
        yield case(name, f"smoothing {smoothing}", spread(2.0, 5, 4), labels,
                   label_smoothing=smoothing)  # fmt: skip
    yield case(name, "two batch axes", normal(2, 2, 3), whole([[0, 2], [1, 1]]))
    yield case(name, "a batch of one", normal(1, 4), whole([2]))
    yield case(name, "one row, no batch", normal(4), whole(2)).flag("SCALAR")
    yield case(name, "one class", normal(3, 1), whole([0, 0, 0])).flag("ZERO")
    yield case(name, "equal logits", fixed(np.zeros((2, 8))), whole([0, 5])).flag("ZERO")
    for scale, label in ((1e4, 0), (1e30, 1)):
        yield case(name, f"logits of {scale:g}, label {label}", fixed(scale * large),
                   whole([label] * 3)).flag("LARGE_LOGITS")  # fmt: skip
    yield case(name, "large equal logits lose nothing", fixed(np.full((2, 8), 1e30)),
               whole([0, 7])).flag("LARGE_LOGITS", "CANCELLATION")  # fmt: skip
    yield case(name, "-inf masks classes", fixed([[0, -INF, 0], [-INF, 2, 1]]),
               whole([2, 1])).flag("INF")  # fmt: skip
    yield case(name, "-inf for the label", fixed([[0, -INF]]), whole([1])).flag("INF")
    yield case(name, "a NaN", fixed([[NAN, 1], [0, 0]]), whole([0, 1])).flag("NAN")


LOSSES = [
    *softmaxes(),
    *cross_entropies(),
    case("squared_error", "ordinary values", normal(5, 3), normal(5, 3)),
    case("squared_error", "0-d", normal(), normal()).flag("SCALAR"),
    case("squared_error", "equal", fixed([1, 2]), fixed([1, 2])).flag("ZERO"),
    case("squared_error", "neighbours", near(1.0, 1, -2), fixed([1, 1])).flag("CANCELLATION"),
    case("squared_error", "overflows", largest(0.5, 0.0), fixed([0, 1])).flag("OVERFLOW"),
    case("squared_error", "a NaN", fixed([NAN, 1]), fixed([0, 0])).flag("NAN")
    .gives(NAN, [NAN, 1], [NAN, -1]),
    case("hinge", "ordinary values", apart(5, 3), signs(5, 3)).fix(1),
    case("hinge", "0-d", fixed(0.5), fixed(-1.0)).fix(1).flag("SCALAR"),
    case("hinge", "kink: slope 0 where sign * score = 1", fixed([1, 0.5, -1, 0]),
         fixed([1, 1, -1, -1])).fix(1).flag("KINK"),
    case("hinge", "all beyond the margin", fixed([2, -3]), fixed([1, -1])).fix(1).flag("ZERO"),
    case("hinge", "infinite", fixed([INF, 0]), fixed([1, 1])).fix(1).flag("INF")
    .gives(0.5, [0, -0.5], None),
]  # fmt: skip

INDICES: tuple[Any, ...] = (
    1, -1, slice(1, None, 2), (slice(None), 0), (..., slice(0, 2)), None, ...,
    (None, slice(2, 2), -2, None), (2, 1, 0), slice(None, None, -1),
)  # fmt: skip


def indexings() -> Iterator[Case]:
    """Basic indices of every kind."""
    for index in INDICES:
        flags = ("EMPTY",) if index == (None, slice(2, 2), -2, None) else ()
        yield case("getitem", f"index {index}", normal(3, 2, 2), index=index).flag(*flags)


SHAPES = [
    case("reshape", "with a length to be found", normal(2, 6), shape=(4, -1)),
    case("reshape", "to one dimension", normal(2, 3), shape=(6,)),
    case("reshape", "0-d to a matrix", fixed(2.5), shape=(1, 1)).flag("SCALAR"),
    case("reshape", "no elements", fixed(np.zeros((2, 0))), shape=(0, 3)).flag("EMPTY"),
    case("transpose", "reversed", normal(2, 3, 2)),
    case("transpose", "by axes", normal(2, 3, 2), axes=(1, 2, 0)),
    case("transpose", "by negative axes", normal(2, 3, 2), axes=(-1, 0, 1)),
    case("transpose", "0-d", fixed(2.5)).flag("SCALAR"),
    case("transpose", "no elements", fixed(np.zeros((2, 0)))).flag("EMPTY"),
    case("broadcast_to", "a column to a stack", normal(3, 1), shape=(2, 3, 4)).flag("BROADCAST"),
    case("broadcast_to", "0-d to a matrix", fixed(2.5), shape=(2, 3)).flag("BROADCAST", "SCALAR"),
    case("broadcast_to", "to no elements", normal(1, 3), shape=(0, 3)).flag("BROADCAST", "EMPTY"),
    case("broadcast_to", "to its own shape", normal(2, 3), shape=(2, 3)),
    case("concat", "along the first axis", normal(2, 3), normal(1, 3), normal(2, 3)),
    case("concat", "along another, one part empty", normal(2, 2, 2), normal(2, 0, 2),
         normal(2, 1, 2), axis=-2).flag("EMPTY"),
    case("concat", "one part", normal(2, 3), axis=1),
    case("concat", "NaN and inf", fixed([NAN, 1]), fixed([-INF])).flag("NAN", "INF")
    .gives([NAN, 1, -INF], [1, 1], [1]),
    case("pad", "with zeros", normal(3, 2), widths=((1, 0), (0, 2))),
    case("pad", "with a value", normal(3), widths=((2, 1),), value=-7.0),
    case("pad", "with -inf", normal(2), widths=((1, 1),), value=-INF).flag("INF"),
    case("pad", "nothing", fixed(np.zeros(0)), widths=((1, 1),)).flag("EMPTY"),
    case("pad", "0-d", fixed(2.5), widths=()).flag("SCALAR"),
    *indexings(),
    case("gather", "rows, some twice", normal(3, 2), whole([2, 0, 2, 1, 2])),
    case("gather", "indices in a matrix", normal(3, 2), whole([[0, 1], [1, 1]])),
    case("gather", "another axis", normal(2, 3, 2), whole([0, 2, 0]), axis=1),
    case("gather", "negative indices and axis", normal(2, 3), whole([-1, 0, 2, -3]), axis=-1),
    case("gather", "one index", normal(3, 2), whole(1)).flag("SCALAR"),
    case("gather", "no index", normal(3, 2), whole(np.zeros(0))).flag("EMPTY"),
    case("gather", "a NaN and an inf stay in their rows", fixed([[NAN, 1], [INF, 2], [3, 4]]),
         whole([2, 0, 1, 2])).flag("NAN", "INF")
    .gives([[3, 4], [NAN, 1], [INF, 2], [3, 4]], [[1, 1], [1, 1], [2, 2]], None),
]  # fmt: skip

CASES: tuple[Case, ...] = (
    *(*ELEMENTWISE, *PAIRS, *PRODUCTS, *REDUCTIONS, *LOSSES, *SHAPES),
    *primitives_layers.CASES,
)

# The tolerance by operation, in eps: npdrt's largest error over the table, in float32 or float64
# (NumPy 2.4, x86-64), times about 4, since the last bits of exp or tanh and the order of a sum are
# not the same everywhere. 0: values are only moved, and the cotangents' sums are exact. The
# condition of the sums in a vjp multiplies it.
UNITS: dict[str, float] = {
    "absolute": 0, "add": 1, "broadcast_to": 0, "clip": 0, "concat": 0, "divide": 4, "erf": 4,
    "exp": 6, "gather": 0, "gelu": 4, "getitem": 0, "hinge": 2, "leaky_relu": 1, "linear": 6,
    "log": 3, "log_softmax": 5, "logsumexp": 5, "matmul": 6, "max": 1, "maximum": 0, "mean": 4,
    "minimum": 0, "multiply": 4, "negative": 0, "pad": 0, "power": 16, "relu": 0, "reshape": 0,
    "sigmoid": 8, "softmax": 8, "softmax_cross_entropy": 5, "softplus": 4,
    "spectral_normalise": 12, "sqrt": 3, "squared_error": 4, "subtract": 1, "sum": 4, "tanh": 5,
    "transpose": 0, "var": 5, "where": 0, **primitives_layers.UNITS,
}  # fmt: skip

# --- references ------------------------------------------------------------------------------


def _log(x: Dual) -> Dual:
    return x.chain(mpmath().log(x.value), INF if x.value == 0 else 1 / x.value)


def _sigmoid(x: Any) -> Any:
    return 1 / (1 + mpmath().exp(-x))


def _density(x: Any) -> Any:
    m = mpmath()
    return m.exp(-x * x / 2) / m.sqrt(2 * m.pi)


def _power(x: Dual, p: Dual) -> Dual:
    """x**p; the slope in x is 0 where p = 0, that in p is 0 where x = 0 and NaN where x < 0."""
    m, a, b = mpmath(), x.value, p.value
    y = m.power(a, b)
    by_x = b * m.power(a, b - 1) if b else m.mpf(0)
    by_p = y * m.log(a) if a > 0 else m.mpf(0 if a == 0 else NAN)
    return x.chain(y, by_x) + p.chain(0, by_p)


def _maximum(a: Dual, b: Dual) -> Dual:
    """The larger; at a tie the mean of both, which has half of the slope of each."""
    return (a + b) / 2 if a.value == b.value else a if a.value > b.value else b


def _minimum(a: Dual, b: Dual) -> Dual:
    return -_maximum(-a, -b)


def _max(row: list[Dual]) -> Dual:
    """The largest; at a tie the mean of the largest, so that they have equal slopes."""
    top = max(x.value for x in row)
    return _mean([x for x in row if x.value == top])


def _sum(row: list[Dual]) -> Dual:
    return sum(row, Dual(0))


def _mean(row: list[Dual]) -> Dual:
    return _sum(row) / len(row)


def _var(row: list[Dual], *, correction: float) -> Dual:
    centre = _mean(row)
    return _sum([(x - centre) * (x - centre) for x in row]) / (len(row) - correction)


def _logsumexp(row: list[Dual]) -> Dual:
    return _log(_sum([exp(x) for x in row]))


def _softmax(row: list[Dual]) -> list[Dual]:
    weights = [exp(x) for x in row]
    total = _sum(weights)
    return [w / total for w in weights]


def _log_softmax(row: list[Dual]) -> list[Dual]:
    total = _logsumexp(row)
    return [x - total for x in row]


def _cross_entropy(logits: Any, labels: Any, *, label_smoothing: float) -> Any:
    """Mean over rows of logsumexp(z) - sum_c q_c z_c, q = (1 - s) onehot + s / C."""
    classes, losses = logits.shape[-1], []
    for row, label in zip(logits.reshape(-1, classes), labels.reshape(-1).tolist(), strict=True):
        target = (1 - Dual(label_smoothing)) * row[label]
        if label_smoothing:
            target = target + Dual(label_smoothing) * _mean(list(row))
        losses.append(_logsumexp(list(row)) - target)
    return _mean(losses)


def _clip(x: Any, *, low: float | None, high: float | None) -> Any:
    """Slope 1 on the limits."""

    def clipped(v: Dual) -> Dual:
        if low is not None and v.value < low:
            return Dual(low)
        return Dual(high) if high is not None and v.value > high else v

    return each(clipped, x)


def _hinge(scores: Any, signs: Any) -> Dual:
    """Slope 0 where the margin is 0."""
    margins = [1 - a * b for a, b in zip(scores.flat, signs.flat, strict=True)]
    return _mean([m if m.value > 0 else Dual(0) for m in margins])


def _squared_error(prediction: Any, target: Any) -> Dual:
    pairs = zip(prediction.flat, target.flat, strict=True)
    return _mean([(a - b) * (a - b) for a, b in pairs])


def _where(condition: Any, a: Any, b: Any) -> Any:
    chosen = fill(condition.shape, condition.reshape(-1).tolist())
    c, a, b = np.broadcast_arrays(chosen, a, b)
    rows = zip(c.flat, a.flat, b.flat, strict=True)
    return fill(c.shape, [x if which else y for which, x, y in rows])


def _matmul(a: Any, b: Any) -> Any:
    return np.sum(a[..., :, :, None] * b[..., None, :, :], axis=-2)


def linear(x: Any, weight: Any, bias: Any = None) -> Any:
    """y[..., o] = sum_i x[..., i] weight[o, i] + bias[o], over arrays of Duals."""
    y = np.sum(x[..., None, :] * weight, axis=-1)
    return y if bias is None else y + bias


def _spectral_normalise(weight: Any, u: Any, v: Any) -> Any:
    return weight / np.sum(u[:, None] * weight * v)


def _pad(x: Any, *, widths: tuple[tuple[int, int], ...], value: float) -> Any:
    shape = tuple(n + a + b for n, (a, b) in zip(x.shape, widths, strict=True))
    out = fill(shape, [Dual(value)] * math.prod(shape))
    for index in np.ndindex(x.shape):
        out[tuple(i + a for i, (a, _) in zip(index, widths, strict=True))] = x[index]
    return out


def slices(function: Callable[..., Dual]) -> Callable[..., Any]:
    """A function of a list of Duals made a reduction over `axis`."""

    def reduction(x: Any, *, axis: Any, keepdims: bool, **settings: Any) -> Any:
        axes = range(x.ndim) if axis is None else [axis] if isinstance(axis, int) else axis
        gone = [a % x.ndim for a in axes]
        kept = [a for a in range(x.ndim) if a not in gone]
        outer, inner = [x.shape[a] for a in kept], [x.shape[a] for a in gone]
        rows = x.transpose(kept + gone).reshape(math.prod(outer), math.prod(inner))
        shape = [1 if a in gone else n for a, n in enumerate(x.shape)] if keepdims else outer
        return fill(tuple(shape), [function(list(row), **settings) for row in rows])

    return reduction


def rows(function: Callable[[list[Dual]], list[Dual]]) -> Callable[..., Any]:
    """A function from a list of Duals to one as long, applied along `axis`."""

    def along(x: Any, *, axis: int) -> Any:
        last = np.moveaxis(x, axis, -1)
        flat = last.reshape(math.prod(last.shape[:-1]), last.shape[-1])
        out = [value for row in flat for value in function(list(row))]
        return np.moveaxis(fill(last.shape, out), -1, axis)

    return along


REFERENCES: dict[str, Callable[..., Any]] = {
    "absolute": elementwise(abs, lambda x: (x > 0) - (x < 0)),  # slope 0 at 0
    "add": lambda a, b: each(lambda x, y: x + y, a, b),
    "broadcast_to": lambda x, shape: np.broadcast_to(x, shape),
    "clip": _clip,
    "concat": lambda *xs, axis: np.concatenate(xs, axis),
    "divide": lambda a, b: each(lambda x, y: x / y, a, b),
    "erf": elementwise(
        lambda x: mpmath().erf(x), lambda x: 2 * mpmath().exp(-x * x) / mpmath().sqrt(mpmath().pi)
    ),
    "exp": lambda x: each(exp, x),
    "gather": lambda x, indices, axis: np.take(x, indices, axis),
    "gelu": elementwise(
        lambda x: x * mpmath().ncdf(x), lambda x: mpmath().ncdf(x) + x * _density(x)
    ),
    "getitem": lambda x, index: x[index],
    "hinge": _hinge,
    "leaky_relu": lambda x, a: each(lambda v: v if v.value > 0 else v * a, x),  # slope a at 0
    "linear": linear,
    "log": lambda x: each(_log, x),
    "log_softmax": rows(_log_softmax),
    "logsumexp": slices(_logsumexp),
    "matmul": _matmul,
    "max": slices(_max),
    "maximum": lambda a, b: each(_maximum, a, b),
    "mean": slices(_mean),
    "minimum": lambda a, b: each(_minimum, a, b),
    "multiply": lambda a, b: each(lambda x, y: x * y, a, b),
    "negative": lambda x: each(lambda v: -v, x),
    "pad": _pad,
    "power": lambda x, p: each(_power, x, p),
    "relu": lambda x: each(lambda v: v if v.value > 0 else Dual(0), x),  # slope 0 at 0
    "reshape": lambda x, shape: x.reshape(shape),
    "sigmoid": elementwise(_sigmoid, lambda x: _sigmoid(x) * _sigmoid(-x)),
    "softmax": rows(_softmax),
    "softmax_cross_entropy": _cross_entropy,
    "softplus": elementwise(lambda x: mpmath().log1p(mpmath().exp(x)), _sigmoid),
    "spectral_normalise": _spectral_normalise,
    "sqrt": elementwise(lambda x: mpmath().sqrt(x), lambda x: 1 / (2 * mpmath().sqrt(x))),
    "squared_error": _squared_error,
    "subtract": lambda a, b: each(lambda x, y: x - y, a, b),
    "sum": slices(_sum),
    "tanh": elementwise(lambda x: mpmath().tanh(x), lambda x: mpmath().sech(x) ** 2),
    "transpose": lambda x, axes: x.transpose(axes),
    "var": slices(_var),
    "where": _where,
    **primitives_layers.REFERENCES,
}  # the value of every primitive, over object arrays of Duals

# --- generation ------------------------------------------------------------------------------


def groups(operations: set[str] | None = None) -> list[Json]:
    """The groups of the table, one an operation with its settings; those of `operations` if given.

    tcId counts from 1 over the whole table, an id for each dtype. Raises `Unavailable` without
    mpmath.
    """
    found: dict[str, Json] = {}
    ids = itertools.count(1)
    for row in CASES:
        numbers = [(next(ids), FORMATS[dtype]) for dtype in DTYPES]
        if operations is not None and row.operation not in operations:
            continue
        settings = {name: encode(value) for name, value in row.full_settings().items()}
        group = found.setdefault(
            f"{row.operation} {settings}",
            {"type": "Primitive", "operation": row.operation, "settings": settings, "tests": []},
        )
        group["tests"] += [_test(row, identity, number) for identity, number in numbers]
    return list(found.values())


def _test(row: Case, identity: int, number: Format) -> Json:
    arguments = row.realised(number)
    cotangent, value, vjp, condition = expected(row, arguments, number)
    wanted = row.differentiated()
    units = UNITS[row.operation] if row.units is None else row.units
    return {
        "tcId": identity,
        "comment": row.comment,
        "flags": list(row.flags) or ["ORDINARY"],
        "result": "acceptable" if LENIENT & set(row.flags) else "valid",
        "arguments": [_argument(a, number) for a in arguments],
        "constant": [i for i in range(len(arguments)) if i not in wanted],
        "cotangent": array(cotangent, number),
        "expected": {
            "value": array(value, number),
            "vjp": [None if g is None else array(g, number) for g in vjp],
        },
        "tolerance": math.ceil(units * condition) * number.ulp(1.0).item(),
    }


def expected(row: Case, arguments: list[Any], number: Format) -> tuple[Any, Any, list[Any], float]:
    """The cotangent; the value and the vjp of every argument (None where there is none), rounded;
    and the largest condition of the sums of a vjp (1 where it is stated).

    What the table states comes before the reference.
    """
    wanted, condition = row.differentiated(), 1.0
    with mpmath().workdps(DIGITS):
        if row.value is not None and row.vjp is not None:
            value, cotangent, vjp = row.value, np.ones(np.shape(row.value)), list(row.vjp)
        else:
            output = _reference(row, arguments, wanted)
            value, vjp = output, [None] * len(arguments)
            cotangent = cotangent_for(output.shape)
            for i in wanted:
                vjp[i], found = pull_back(output, cotangent, i, arguments[i].shape)
                condition = max(condition, float(found)) if found < INF else condition
        parts = [None if g is None else rounded(g, number) for g in vjp]
        return cotangent, rounded(value, number), parts, condition


def _reference(row: Case, arguments: list[Any], wanted: tuple[int, ...]) -> Any:
    exact = [
        variables(a, i) if i in wanted else a if _is_discrete(a) else constants(a)
        for i, a in enumerate(arguments)
    ]
    output = REFERENCES[row.operation](*exact, **row.full_settings())
    return np.asarray(output, dtype=object)


def _is_discrete(a: Any) -> bool:
    return getattr(a, "dtype", None) in (np.dtype(np.int64), np.dtype(np.bool_))


def _argument(a: Any, number: Format) -> Json:
    return scalar(a) if isinstance(a, float) else array(a, number)


def scalar(value: float) -> Json:
    """The JSON form of a number."""
    return {"scalar": DOUBLE.bits(value)}


def encode(setting: Any) -> Any:
    """The JSON form of a setting."""
    match setting:
        case None | bool() | int() | str():
            return setting
        case float():
            return scalar(setting)
        case tuple():
            return [encode(item) for item in setting]
        case slice():
            return {"slice": [setting.start, setting.stop, setting.step]}
        case types.EllipsisType():
            return "..."
    raise TypeError(f"no JSON form for a setting {setting!r}")


def decode(setting: Any) -> Any:
    """A setting from its JSON form."""
    match setting:
        case {"scalar": bits}:
            return DOUBLE.values(bits).item()
        case {"slice": [start, stop, step]}:
            return slice(start, stop, step)
        case list():
            return tuple(decode(item) for item in setting)
        case "...":
            return ...
    return setting


# --- answering -------------------------------------------------------------------------------


def answer(group: Json, test: Json) -> Json:
    """npdrt's own answer: {"value": array, "vjp": [array or None, ...]}."""
    arguments = [_read_argument(a) for a in test["arguments"]]
    leaves = [a if i in test["constant"] else Tensor(a) for i, a in enumerate(arguments)]
    settings = {name: decode(value) for name, value in group["settings"].items()}
    with quiet():
        output = PRIMITIVES[group["operation"]](*leaves, **settings)
        found = backward(output, read_array(test["cotangent"], "cotangent"))
    number = FORMATS[str(output.dtype)]
    return {
        "value": array(output.value, number),
        "vjp": [
            array(found[id(leaf)], number) if isinstance(leaf, Tensor) else None for leaf in leaves
        ],
    }


def _read_argument(record: Json) -> Any:
    return decode(record) if "scalar" in record else read_array(record, "arguments")
