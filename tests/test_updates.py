"""npdrt.optim gives the bits of docs/updates.md, which is the `page` of every rule in
npdrt.conform.rules in plain Python.

The sign and payload of a NaN are not defined, so all NaNs count as the same.

Run as a script, this file prints digests of a fixed set of updates by npdrt.optim, eager and
replayed; the tests run it under other BLAS settings and with SIMD instruction sets disabled.
"""

from __future__ import annotations

import ast
import builtins
import hashlib
import importlib.util
import inspect
import itertools
import json
import math
import os
import random
import re
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import backends
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import npdrt
from npdrt import optim
from npdrt.conform import canonical, page
from npdrt.conform.page import ROUND, norm
from npdrt.conform.rules import RULES

ROOT = Path(__file__).parents[1]
Numbers = list[float]
DTYPES = ["float16", "float32", "float64"]
CODE = {"float16": "e", "float32": "f", "float64": "d"}


def packed(values: Numbers, dtype: str) -> bytes:
    """The bytes of `values` in `dtype`, every NaN the same."""
    plain = [math.nan if x != x else x for x in values]
    return struct.pack(f"<{len(plain)}{CODE[dtype]}", *plain)


# --- the page in plain Python -------------------------------------------------------------------


def imported(tree: ast.Module) -> dict[str, str]:
    """Name -> the module that it is imported from, or is."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            home = node.module if isinstance(node, ast.ImportFrom) else None
            found.update({a.asname or a.name: home or a.name for a in node.names})
    return found


def test_the_arithmetic_of_the_page_is_independent() -> None:
    """Nothing but the standard library: neither npdrt nor an array library."""
    tree = ast.parse(Path(page.__file__).read_text(encoding="utf-8"))
    found = set(imported(tree).values())
    assert found == {"__future__", "collections.abc", "math", "struct", "sys", "typing"}


def outside_names(source: str) -> list[str]:
    """The names that `page` and the functions `page_...` of a rule's file read, but for their own,
    each other's, Python's, the standard library's and those of npdrt.conform.page."""
    tree, odd = ast.parse(source), []
    homes = imported(tree)
    for function in tree.body:
        if isinstance(function, ast.FunctionDef) and re.fullmatch("page(_.*)?", function.name):
            names = [n for n in ast.walk(function) if isinstance(n, ast.Name)]
            own = {n.id for n in names if isinstance(n.ctx, ast.Store)}
            own |= {a.arg for a in ast.walk(function) if isinstance(a, ast.arg)}
            for name in {n.id for n in names} - own - {*dir(builtins)}:
                home = homes.get(name, "")
                standard = home.partition(".")[0] in sys.stdlib_module_names
                if not (name.startswith("page_") or standard or home == page.__name__):
                    odd.append(name)
    return odd


@pytest.mark.parametrize("rule", RULES)
def test_the_page_of_a_rule_is_independent(rule: str) -> None:
    """It stands next to what npdrt knows of the rule, and uses nothing of it."""
    source = Path(inspect.getfile(RULES[rule].page)).read_text(encoding="utf-8")
    assert "def page(" in source
    assert outside_names(source) == []


@pytest.mark.parametrize(
    "line", ["np.sqrt(w)", "step(w)", "norm(w)", "[largest(x) for x in w]"], ids=str
)
def test_a_page_that_is_not_independent_is_seen(line: str) -> None:
    imports = "import numpy as np\nfrom npdrt.optim import norm\nfrom .evaluate import largest\n"
    assert outside_names(f"{imports}def step(w): ...\ndef page_x(w):\n    return {line}")


def finite(dtype: str) -> Any:
    """Every finite number >= 0 of a format of 16 bits in order, so that every second is even."""
    if dtype == "float16":
        return np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float64)
    kind = pytest.importorskip("ml_dtypes").bfloat16
    return np.arange(0x7F80, dtype=np.uint16).view(kind).astype(np.float64)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_rounding_to_16_bits(dtype: str) -> None:
    """Every number, the middle to the next and the float64 numbers on either side of it; both
    signs."""
    numbers = finite(dtype)
    assert page.LARGEST[dtype] == numbers[-1]
    above = np.append(numbers[1:], 2 * numbers[-1] - numbers[-2])
    middle = numbers + (above - numbers) / 2
    expected = np.append(above[:-1], np.inf)  # the upper neighbour
    even = np.where(np.arange(len(numbers)) % 2 == 0, numbers, expected)
    for inputs, answers in (
        (numbers, numbers),
        (middle, even),
        (np.nextafter(middle, -np.inf), numbers),
        (np.nextafter(middle, np.inf), expected),
    ):
        for sign in (1.0, -1.0):
            found = [ROUND[dtype](x) for x in (sign * inputs).tolist()]
            np.testing.assert_array_equal(np.array(found).view("u8"), (sign * answers).view("u8"))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_rounding_as_the_libraries_do(dtype: str) -> None:
    """NumPy from float64; ml_dtypes from float32, which it rounds a float64 to first."""
    source = random.Random(dtype)
    inputs = np.array([math.ldexp(source.uniform(-2, 2), source.randint(-140, 130))
                       for _ in range(20_000)])  # fmt: skip
    with np.errstate(over="ignore"):
        if dtype == "float16":
            expected = inputs.astype(np.float16)
        else:
            inputs = inputs.astype(np.float32)
            expected = inputs.astype(pytest.importorskip("ml_dtypes").bfloat16)
    found = [ROUND[dtype](x) for x in inputs.tolist()]
    assert np.array(found).tobytes() == expected.astype(np.float64).tobytes()


@pytest.mark.parametrize(
    ("dtype", "x", "expected"),
    [
        ("float16", 65519.99, 65504.0),
        ("float16", 65520.0, math.inf),
        ("float16", 1e308, math.inf),
        ("float16", 2.0**-25, 0.0),
        ("bfloat16", 1e308, math.inf),
        ("bfloat16", 5e-324, 0.0),
        ("bfloat16", 1 + 2.0**-8 + 2.0**-40, 1 + 2.0**-7),  # 1 by way of float32
        ("float32", 3.4028235677973366e38, math.inf),
        ("float32", 3.4028235677973362e38, page.LARGEST["float32"]),
        ("float64", 1.7e308, 1.7e308),
    ],
)
def test_rounding_at_the_ends(dtype: str, x: float, expected: float) -> None:
    assert ROUND[dtype](x) == expected
    assert ROUND[dtype](-x) == -expected
    assert math.copysign(1.0, ROUND[dtype](-x)) == -1.0
    assert ROUND[dtype](math.inf) == math.inf
    assert math.isnan(ROUND[dtype](math.nan))


def test_float32_serves_for_the_formats_of_16_bits() -> None:
    """The page says that one operation computed in float32 gives the same after rounding."""
    source, single = random.Random(0), ROUND["float32"]
    for dtype, low, high in (("float16", -24, 15), ("bfloat16", -133, 127)):
        fl = ROUND[dtype]
        for _ in range(20_000):
            a, b = (fl(math.ldexp(source.uniform(-2, 2), source.randint(low, high)))
                    for _ in range(2))  # fmt: skip
            for exact in (a + b, a * b, page.divide(a, b), page.root(abs(a))):
                assert packed([fl(single(exact))], "float64") == packed([fl(exact)], "float64")


@pytest.mark.parametrize("beta", [0.0, 1e-300, 0.5, 0.9, 0.999])
def test_power_is_the_running_product(beta: float) -> None:
    product = 1.0
    for t in range(3000):
        assert page.power(beta, t) == product
        product *= beta
    last = page.power(beta, 2**53)  # 0, or what rounding gives back: 0.9 * 2e-323 is 2e-323
    assert last == last * beta < 1e-320


def test_a_start_in_the_middle() -> None:
    """A state goes on where it is; without Adam's powers they are made anew."""
    for rule, options in RICHEST.items():
        w, gradients = problem(3, "bfloat16", 4)
        whole = by_the_page(rule, options, w, gradients, [0.1] * 4, "bfloat16")
        state = {k: v for k, v in whole[1].items() if k != "w" and not k.endswith("power")}
        for t in (2, 3):
            before = whole[t - 1]["w"]
            found = canonical.step(rule, before, gradients[t], state, 0.1, "bfloat16", **options)
            assert {"w": found, **state} == whole[t]


def test_norms_as_given() -> None:
    """They take the place of the page's; rules that are not layerwise ask for none."""
    for rule, options in RICHEST.items():
        w, gradients = problem(300, "float32", 1)
        settings: dict[str, Any] = {"lr": 0.25, "dtype": "float32", **options}
        own = (norm(w), norm(gradients[0]))
        plain, same, other = (
            canonical.step(rule, w, gradients[0], {"step": 0}, **settings, norms=norms)
            for norms in (None, own, (2 * own[0], own[1]))
        )
        assert plain == same
        own_norms = RULES[rule].shaped  # of rows, or of the momentum
        assert (plain == other) == (own_norms or not RULES[rule].takes_norms)


def every(**choices: tuple[Any, ...]) -> Iterator[dict[str, Any]]:
    """Every combination of the choices."""
    for values in itertools.product(*choices.values()):
        yield dict(zip(choices, values, strict=True))


OPTIONS: dict[str, Sequence[dict[str, Any]]] = {  # of other rules: those that the vectors ask
    **{name: rule.asked for name, rule in RULES.items()},
    "sgd": [
        o
        for o in every(
            momentum=(0.0, 0.9), dampening=(0.0, 0.3), nesterov=(False, True), weight_decay=(0, 0.1)
        )
        if not o["nesterov"] or (o["momentum"] and not o["dampening"])
    ],
    "adam": [
        *every(weight_decay=(0.0, 0.1), decoupled=(False, True), eps=(1e-8, 0.0)),
        {"betas": (0.0, 0.99)},
    ],
    "lars": list(
        every(
            momentum=(0.0, 0.9), weight_decay=(0.0, 5e-4), trust_coefficient=(1e-3, 1.0),
            eps=(0.0, 1e-8),
        )
    ),
    "fromage": [{}, {"norm_bound": 1.0}, {"norm_bound": 0.7}, {"norm_bound": 0.0}],
}  # fmt: skip
CASES = [
    pytest.param(rule, options, id="-".join([rule, *(f"{k}={v}" for k, v in options.items())]))
    for rule, choices in OPTIONS.items()
    for options in choices
]
RICHEST = {name: rule.asked[:2][-1] for name, rule in RULES.items()}

# --- the comparison --------------------------------------------------------------------------


def numbers(key: str, n: int, dtype: str) -> Numbers:
    """n reproducible numbers of `dtype`, of both signs and of several magnitudes up to 8."""
    source = random.Random(key)
    return [
        ROUND[dtype](source.uniform(-1.0, 1.0) * 2.0 ** source.randint(-3, 3)) for _ in range(n)
    ]


@cache
def problem(n: int, dtype: str, steps: int) -> tuple[Numbers, list[Numbers]]:
    """A parameter of n elements and a gradient for every step."""
    gradients = [numbers(f"gradient {step}", n, dtype) for step in range(steps)]
    return numbers("weight", n, dtype), gradients


def by_the_page(
    rule: str,
    options: Any,
    w: Numbers,
    gradients: list[Numbers],
    rates: Numbers,
    dtype: str,
    shape: tuple[int, ...] | None = None,
) -> list[dict[str, Any]]:
    """After every step the parameter under "w", and the state."""
    state: dict[str, Any] = {"step": 0}
    seen = []
    for g, lr in zip(gradients, rates, strict=True):
        w = canonical.step(rule, w, g, state, lr, dtype, shape=shape, **options)
        seen.append({"w": w, **state})
    return seen


def freeze(*groups: dict[str, Any]) -> None:
    """Make NumPy arrays read-only, so that a rule that writes to its arguments raises."""
    for x in itertools.chain.from_iterable(group.values() for group in groups):
        if isinstance(x, np.ndarray):
            x.setflags(write=False)


def by_npdrt(
    rule: str, options: Any, w: Any, gradients: list[Any], rates: Numbers, way: str = "eager"
) -> list[dict[str, Any]]:
    """The same from npdrt.optim, as arrays; the rates override a setting that must not matter.

    way: "eager", "replayed" from a program, or "compiled", a program with loops of numba.
    """
    optimizer = optim.RULES[rule](lr=0.5, **options)
    params = {"layers/00/weight": w}
    state = optimizer.init(params)
    freeze(state)

    def step(params: Any, grads: Any, state: Any, lr: Any) -> Any:
        return optimizer.update(params, grads, state, lr=lr)

    if way != "eager":
        first = {"layers/00/weight": gradients[0]}
        program = npdrt.record(step, params, first, state, rates[0], fast=way == "compiled")
    seen = []
    for g, lr in zip(gradients, rates, strict=True):
        if way == "eager":
            params, state = step(params, {"layers/00/weight": g}, state, lr)
        else:
            program(params, {"layers/00/weight": g}, state, lr)
            params, state = program.copy_out()
        freeze(params, state)
        slots = {name.rpartition("/")[2]: value for name, value in state.items()}
        seen.append({"w": params["layers/00/weight"], **slots})
    return seen


def array(values: Numbers, dtype: str, shape: tuple[int, ...] | None = None) -> Any:
    """A read-only array of `values`."""
    made = np.array(values, dtype=dtype).reshape((len(values),) if shape is None else shape)
    made.setflags(write=False)
    return made


def assert_same_bits(ours: list[dict[str, Any]], answers: list[dict[str, Any]], dtype: str) -> None:
    """Equal names, dtypes and bits of parameter and state after every step."""
    assert len(ours) == len(answers)
    for step, (found, expected) in enumerate(zip(ours, answers, strict=True)):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            per_element = isinstance(value, list)
            host = np.asarray(found[name])
            wanted = dtype if per_element else "int64" if name == "step" else "float64"
            assert host.dtype == wanted, name
            values = host.reshape(-1).tolist()
            value = value if per_element else [value]
            if name == "step":
                assert values == value
            elif packed(values, wanted) != packed(value, wanted):
                where = next(
                    i
                    for i, (a, b) in enumerate(zip(values, value, strict=True))
                    if packed([a], wanted) != packed([b], wanted)
                )
                pytest.fail(
                    f"step {step}, {name}[{where}]: npdrt {values[where].hex()}, "
                    f"page {value[where].hex()}"
                )


RATES = [0.01, 0.1, 0.003]
SHAPES: list[tuple[int, ...]] = [(), (0,), (0, 3), (1,), (255,), (16, 16), (257,), (3, 5, 7)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rule", "options"), CASES)
def test_equals_the_page(rule: str, options: dict[str, Any], dtype: str) -> None:
    """Every rule and combination of options, shapes of 0 to 257 elements, three steps."""
    for shape in SHAPES:
        w, gradients = problem(math.prod(shape), dtype, 3)
        expected = by_the_page(rule, options, w, gradients, RATES, dtype, shape)
        arrays = [array(g, dtype, shape) for g in gradients]
        ours = by_npdrt(rule, options, array(w, dtype, shape), arrays, RATES)
        assert_same_bits(ours, expected, dtype)
        assert all(step["w"].shape == shape for step in ours)


def large_problem(rule: str, dtype: str) -> tuple[Numbers, list[Numbers], tuple[int, int]]:
    """65,836 elements, more than one chunk of the norm and not whole rows; fewer where the page
    multiplies matrices. And their shape."""
    shape = (40, 26) if RULES[rule].matrices else (436, 151)
    return *problem(math.prod(shape), dtype, 2), shape


@pytest.fixture(scope="module")
def large() -> dict[tuple[str, str], list[dict[str, Any]]]:
    """By the page: two steps of `large_problem`."""
    found = {}
    for rule, dtype in itertools.product(RICHEST, DTYPES):
        w, gradients, shape = large_problem(rule, dtype)
        found[rule, dtype] = by_the_page(rule, RICHEST[rule], w, gradients, RATES[:2], dtype, shape)
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", RICHEST)
def test_equals_the_page_large(rule: str, dtype: str, large: Any) -> None:
    w, gradients, shape = large_problem(rule, dtype)
    arrays = [array(g, dtype, shape) for g in gradients]
    ours = by_npdrt(rule, RICHEST[rule], array(w, dtype, shape), arrays, RATES[:2])
    assert_same_bits(ours, large[rule, dtype], dtype)


@pytest.mark.parametrize("n", [0, 1, 255, 256, 257, 511, 512, 65535, 65536, 65537, 65536 + 300])
@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_equals_the_page(n: int, dtype: str) -> None:
    values = numbers(f"norm {n}", n, dtype)
    found = optim.norm(array(values, dtype))
    assert (found.dtype, found.shape) == (np.float64, ())
    assert float(found).hex() == norm(values).hex()


def floats(dtype: str) -> st.SearchStrategy[float]:
    """Any number of `dtype`: zeros of both signs, subnormals, inf and NaN among them."""
    width: Any = int(dtype.removeprefix("float"))
    return st.floats(width=width)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_equals_the_page_at_any_values(data: st.DataObject) -> None:
    rule = data.draw(st.sampled_from(sorted(RULES)))
    dtype = data.draw(st.sampled_from(DTYPES))
    options = data.draw(st.sampled_from(OPTIONS[rule]))
    n = data.draw(st.integers(1, 5))
    column = st.lists(floats(dtype), min_size=n, max_size=n)
    w, gradients = data.draw(column), data.draw(st.lists(column, min_size=1, max_size=3))
    rates = data.draw(
        st.lists(
            st.floats(0.0, 1e6) | st.sampled_from([0.0, 1.0, 5e-324, 1e300]),
            min_size=len(gradients),
            max_size=len(gradients),
        )
    )
    expected = by_the_page(rule, options, w, gradients, rates, dtype)
    arrays = [array(g, dtype) for g in gradients]
    assert_same_bits(by_npdrt(rule, options, array(w, dtype), arrays, rates), expected, dtype)


# --- the same bits everywhere -----------------------------------------------------------------


@pytest.mark.parametrize("rule", RICHEST)
def test_every_backend(rule: str, backend: backends.Backend) -> None:
    """NumPy, a strict array API library, the double of CuPy, and CuPy where there is a GPU."""
    for dtype in DTYPES if backend.exact else DTYPES[1:]:  # float16 is NumPy's
        w, gradients = problem(300, dtype, 3)
        shape = (20, 15)
        expected = by_the_page(rule, RICHEST[rule], w, gradients, RATES, dtype, shape)
        on_it = [backend.asarray(array(g, dtype, shape)) for g in gradients]
        start = backend.asarray(array(w, dtype, shape))
        ours = by_npdrt(rule, RICHEST[rule], start, on_it, RATES)
        host = [{name: backend.to_host(x) for name, x in step.items()} for step in ours]
        assert_same_bits(host, expected, dtype)
        assert packed(backend.to_host(start).reshape(-1).tolist(), dtype) == packed(w, dtype)


def test_norm_of_two_chunks_on_every_backend(backend: backends.Backend) -> None:
    values = numbers("norm", 65536 + 300, "float64")
    found = backend.to_host(optim.norm(backend.asarray(array(values, "float64"))))
    assert float(found).hex() == norm(values).hex()


def test_no_synchronisation_in_an_update() -> None:
    """An update never waits for the device, with rates that are on it too."""
    xp = backends.cupy_double
    for rule, options in RICHEST.items():
        w, g = (xp.asarray(np.ones(300, dtype="f4")) for _ in range(2))
        before = backends.synchronisations
        by_npdrt(rule, options, w, [g, g], [xp.asarray(np.float64(r)) for r in (0.1, 0.2)])
        assert backends.synchronisations == before, rule


def strided(values: Numbers, dtype: str, shape: tuple[int, int]) -> Any:
    """A read-only slice with strides of a larger array."""
    wide = np.zeros((2 * shape[0], 3 * shape[1]), dtype=dtype)
    wide[::2, ::3] = np.array(values, dtype=dtype).reshape(shape)
    wide.setflags(write=False)
    return wide[::2, ::3]


def layouts(values: Numbers, dtype: str) -> list[Any]:
    """Arrays of shape (20, 15) with the same elements in memory in other ways: Fortran order, a
    slice with strides, negative strides, and a start that no vector load is aligned to."""
    plain = np.array(values, dtype=dtype).reshape(20, 15)
    shifted = np.zeros(301, dtype=dtype)[1:]
    shifted[:] = values
    reverse = plain[::-1, ::-1].copy()[::-1, ::-1]
    slices = strided(values, dtype, (20, 15))
    return [np.asfortranarray(plain), slices, reverse, shifted.reshape(20, 15)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", RICHEST)
def test_memory_layout_does_not_matter(rule: str, dtype: str) -> None:
    w, gradients = problem(300, dtype, 2)
    shape = (20, 15)
    expected = by_the_page(rule, RICHEST[rule], w, gradients, RATES[:2], dtype, shape)
    kinds = [layouts(values, dtype) for values in (w, *gradients)]
    for start, *arrays in zip(*kinds, strict=True):
        for x in (start, *arrays):
            x.setflags(write=False)
        assert_same_bits(by_npdrt(rule, RICHEST[rule], start, arrays, RATES[:2]), expected, dtype)


def ways(dtype: str) -> list[str]:
    """The ways to run an update here; compiled loops need numba, which leaves float16 to NumPy."""
    numba = importlib.util.find_spec("numba") is not None
    return ["eager", "replayed", "compiled"] if numba else ["eager", "replayed"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", RICHEST)
def test_eager_or_replayed(rule: str, dtype: str, large: Any) -> None:
    """A program and its compiled loops, which take arrays of 1,024 elements and more."""
    w, gradients, shape = large_problem(rule, dtype)
    arrays = [array(g, dtype, shape) for g in gradients]
    for way in ways(dtype)[1:]:
        ours = by_npdrt(rule, RICHEST[rule], array(w, dtype, shape), arrays, RATES[:2], way)
        assert_same_bits(ours, large[rule, dtype], dtype)


@pytest.mark.parametrize("rule", ["lars", "fromage", "lars_lesion"])
def test_a_rate_that_is_not_a_number(rule: str) -> None:
    """Where both norms are infinite the ratio is NaN, and the rate is lr."""
    options = {"momentum": 0.0} if rule == "lars" else {}
    values = [math.inf, 2.0, 1.0]
    expected = by_the_page(rule, options, values, [values], [0.5], "float32")
    ours = by_npdrt(rule, options, array(values, "float32"), [array(values, "float32")], [0.5])
    assert_same_bits(ours, expected, "float32")
    below = ROUND["float32"](math.sqrt(1.25)) if rule == "fromage" else 1.0
    assert expected[0]["w"][1:] == [ROUND["float32"](x / below) for x in (1.0, 0.5)]


@pytest.mark.parametrize("kind", [np.float64, np.float32])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", RICHEST)
def test_settings_of_numpy_are_float64_scalars(rule: str, dtype: str, kind: Any) -> None:
    """They do not change the dtype that the elements are computed in."""

    def each(value: Any, change: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(change, value))
        return value if isinstance(value, bool) or not value else change(value)

    options = {k: each(v, lambda x: max(int(8 * x), 1) / 8) for k, v in RICHEST[rule].items()}
    given = {k: each(v, kind) for k, v in options.items()}
    w, gradients = problem(9, dtype, 2)
    expected = by_the_page(rule, options, w, gradients, [0.5, 0.25], dtype)
    arrays = [array(g, dtype) for g in gradients]
    rates = [kind(0.5), kind(0.25)]
    assert_same_bits(by_npdrt(rule, given, array(w, dtype), arrays, rates), expected, dtype)


@pytest.mark.parametrize("rule", RICHEST)
def test_update_is_a_function(rule: str) -> None:
    """Calling it twice gives the same values in new arrays, and leaves the dicts alone."""
    optimizer = optim.RULES[rule](lr=0.1, **RICHEST[rule])
    values, gradients = problem(300, "float64", 1)
    params, grads = {"w": array(values, "float64")}, {"w": array(gradients[0], "float64")}
    state = optimizer.init(params)
    before = dict(state)
    first, second = (optimizer.update(params, grads, state) for _ in range(2))
    assert list(params) == list(grads) == ["w"]
    assert state.keys() == before.keys()
    assert all(state[name] is before[name] for name in before)
    for a, b in zip(first, second, strict=True):
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])
            assert not np.shares_memory(a[name], b[name]) or a[name].ndim == 0
            assert not np.shares_memory(a[name], {**params, **state}[name]) or a[name].ndim == 0


# --- other processes --------------------------------------------------------------------------


def digest(steps: list[dict[str, Any]], dtype: str) -> str:
    """SHA-256 of the parameter and the state after every step, in the order of their names."""
    total = hashlib.sha256()
    for step in steps:
        for name in sorted(step):
            values = np.asarray(step[name], dtype=dtype if np.size(step[name]) > 1 else "float64")
            total.update(np.where(np.isnan(values), values.dtype.type(math.nan), values).tobytes())
    return total.hexdigest()


def digests(compiled: bool) -> dict[str, list[str]]:
    """By rule and dtype the digest of two large steps, eager, replayed and compiled, from whole
    arrays and from slices; all of them where they differ."""
    found: dict[str, set[str]] = {f"{rule} {dtype}": set() for rule in RICHEST for dtype in DTYPES}
    for rule, dtype, make in itertools.product(RICHEST, DTYPES, (array, strided)):
        w, gradients, shape = large_problem(rule, dtype)
        start, *arrays = (make(x, dtype, shape) for x in (w, *gradients))
        for way in ways(dtype) if compiled else ["eager", "replayed"]:
            steps = by_npdrt(rule, RICHEST[rule], start, arrays, RATES[:2], way)
            found[f"{rule} {dtype}"].add(digest(steps, dtype))
    return {name: sorted(different) for name, different in found.items()}


def umath() -> Any:
    return np._core._multiarray_umath  # the names of NumPy's dispatched instruction sets


def dispatched(without: str) -> list[str]:
    """The instruction sets in use that must go: above AVX2 ("AVX512"), or all ("all")."""
    used = [name for name in umath().__cpu_dispatch__ if umath().__cpu_features__[name]]
    above = [name for name in used if "AVX512" in name or name == "X86_V4"]
    return above if without == "AVX512" else used


ENVIRONMENTS = {
    "one BLAS thread, Haswell kernels": {
        "OPENBLAS_NUM_THREADS": "1",
        "OPENBLAS_CORETYPE": "Haswell",
    },
    "two BLAS threads, SkylakeX kernels": {
        "OPENBLAS_NUM_THREADS": "2",
        "OPENBLAS_CORETYPE": "SkylakeX",
    },
    "two BLAS threads, Prescott kernels": {
        "OPENBLAS_NUM_THREADS": "2",
        "OPENBLAS_CORETYPE": "Prescott",
    },
    "without AVX-512": {"NPY_DISABLE_CPU_FEATURES": " ".join(dispatched("AVX512"))},
    "without AVX2 and above": {
        "NPY_DISABLE_CPU_FEATURES": " ".join(dispatched("all")),
        "NUMBA_CPU_NAME": "generic",  # compiled loops join in: they know no other setting
    },
}


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_other_processes(name: str, large: Any) -> None:
    """The digests of the page, from a process of its own under each setting."""
    setting = ENVIRONMENTS[name]
    if not all(setting.values()):
        pytest.skip("this processor has no such instruction sets to disable")
    done = subprocess.run(
        [sys.executable, __file__],
        env={**os.environ, **setting, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    disabled = setting.get("NPY_DISABLE_CPU_FEATURES", "").split()
    assert not set(disabled) & set(found["features"])
    expected = {f"{rule} {dtype}": [digest(s, dtype)] for (rule, dtype), s in large.items()}
    assert found["digests"] == expected


if __name__ == "__main__":
    features = [name for name, on in umath().__cpu_features__.items() if on]
    found = digests(compiled="NUMBA_CPU_NAME" in os.environ)
    print(json.dumps({"features": features, "digests": found}))
