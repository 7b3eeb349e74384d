"""docs/updates.md in plain Python floats and `struct`: npdrt.optim must give the same bits.

The reference below is written from that page alone; it uses no array library. A float32
operation is computed in float64 and rounded once more by `struct`, which gives the correctly
rounded float32 result of `+ - * / sqrt` (53 >= 2 * 24 + 2 bits), subnormal results included.
The sign and payload of a NaN are not defined, so all NaNs count as the same.

Run as a script, this file prints digests of a fixed set of updates by npdrt.optim; the tests run
it under other BLAS settings and with SIMD instruction sets disabled.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import random
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import backends
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from npdrt import optim

ROOT = Path(__file__).parents[1]
Numbers = list[float]

# --- IEEE arithmetic ------------------------------------------------------------------------


def single(x: float) -> float:
    """`x` rounded to float32, to nearest even."""
    try:
        return struct.unpack("<f", struct.pack("<f", x))[0]
    except OverflowError:
        return math.copysign(math.inf, x)


ROUND: dict[str, Callable[[float], float]] = {"float32": single, "float64": float}
LARGEST = {single: 3.4028234663852886e38, float: sys.float_info.max}
CODE = {"float32": "f", "float64": "d"}


def divide(a: float, b: float) -> float:
    """a / b in float64, with the infinities and NaN that Python refuses."""
    if b != 0.0:
        return a / b
    if a == 0.0 or math.isnan(a):
        return math.nan
    return math.copysign(math.inf, a) * math.copysign(1.0, b)


def packed(values: Numbers, dtype: str) -> bytes:
    """The bytes of `values` in `dtype`, every NaN the same."""
    plain = [math.nan if x != x else x for x in values]
    return struct.pack(f"<{len(plain)}{CODE[dtype]}", *plain)


# --- the page --------------------------------------------------------------------------------


def norm(values: Numbers) -> float:
    """The section "The norm"."""
    squares = [x * x for x in values]
    total: Numbers = []
    for start in range(0, max(len(squares), 1), 65536):
        chunk = squares[start : start + 65536] or [0.0]
        chunk += [0.0] * (-len(chunk) % 256)
        lanes = chunk[:256]
        for row in range(256, len(chunk), 256):
            lanes = [a + b for a, b in zip(lanes, chunk[row : row + 256], strict=True)]
        total = [a + b for a, b in zip(total, lanes, strict=True)] if total else lanes
    for half in (128, 64, 32, 16, 8, 4, 2, 1):
        total = [total[k] + total[k + half] for k in range(half)]
    return math.sqrt(total[0])


def decayed(w: Numbers, g: Numbers, decay: float, fl: Any) -> Numbers:
    """g + [weight_decay] * w, or g without decay."""
    c = fl(decay)
    return [fl(b + fl(c * a)) for a, b in zip(w, g, strict=True)] if decay else g


def sgd(
    w: Numbers, g: Numbers, state: Any, lr: float, fl: Any, *,
    momentum: float = 0.0, dampening: float = 0.0, nesterov: bool = False,
    weight_decay: float = 0.0,
) -> Numbers:  # fmt: skip
    """The section "sgd"."""
    d = u = decayed(w, g, weight_decay, fl)
    if momentum:
        k, m = fl(1.0 if state["step"] == 0 else 1.0 - dampening), fl(momentum)
        v = state.get("momentum", [0.0] * len(w))
        v = [fl(fl(m * a) + fl(k * b)) for a, b in zip(v, d, strict=True)]
        u = [fl(b + fl(m * a)) for a, b in zip(v, d, strict=True)] if nesterov else v
        state["momentum"] = v
    r = fl(lr)
    return [fl(a - fl(r * b)) for a, b in zip(w, u, strict=True)]


def adam(
    w: Numbers, g: Numbers, state: Any, lr: float, fl: Any, *,
    betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.0,
    decoupled: bool = False,
) -> Numbers:  # fmt: skip
    """The section "adam"."""
    b1 = state["beta1_power"] = state.get("beta1_power", 1.0) * betas[0]
    b2 = state["beta2_power"] = state.get("beta2_power", 1.0) * betas[1]
    if decoupled and weight_decay:
        c = fl(1.0 - lr * weight_decay)
        w = [fl(a * c) for a in w]
    else:
        g = decayed(w, g, weight_decay, fl)
    m, v = state.get("exp_avg", [0.0] * len(w)), state.get("exp_avg_sq", [0.0] * len(w))
    c, k = fl(betas[0]), fl(1.0 - betas[0])
    m = state["exp_avg"] = [fl(fl(c * a) + fl(k * b)) for a, b in zip(m, g, strict=True)]
    c, k = fl(betas[1]), fl(1.0 - betas[1])
    v = state["exp_avg_sq"] = [fl(fl(c * a) + fl(k * fl(b * b))) for a, b in zip(v, g, strict=True)]
    c1, c2, r, e = fl(1.0 - b1), fl(1.0 - b2), fl(lr), fl(eps)
    mh, vh = [fl(divide(a, c1)) for a in m], [fl(divide(a, c2)) for a in v]
    return [
        fl(a - fl(divide(fl(r * b), fl(fl(math.sqrt(c)) + e))))
        for a, b, c in zip(w, mh, vh, strict=True)
    ]


def lars(
    w: Numbers, g: Numbers, state: Any, lr: float, fl: Any, *,
    momentum: float = 0.9, weight_decay: float = 0.0, trust_coefficient: float = 1e-3,
    eps: float = 0.0,
) -> Numbers:  # fmt: skip
    """The section "lars"."""
    nw, ng, r = norm(w), norm(g), 1.0
    if nw > 0 and ng > 0:
        r = divide(trust_coefficient * nw, (ng + weight_decay * nw) + eps)
    k = lr * r if lr * r <= LARGEST[fl] else lr
    d, m, k = decayed(w, g, weight_decay, fl), fl(momentum), fl(k)
    v = state.get("momentum", [0.0] * len(w))
    v = state["momentum"] = [fl(fl(m * a) + fl(k * b)) for a, b in zip(v, d, strict=True)]
    return [fl(a - b) for a, b in zip(w, v, strict=True)]


def relative_rate(w: Numbers, g: Numbers, lr: float, fl: Any) -> float:
    nw, ng = norm(w), norm(g)
    s = divide(lr * nw, ng) if nw > 0 and ng > 0 else lr
    return s if s <= LARGEST[fl] else lr


def fromage(
    w: Numbers, g: Numbers, state: Any, lr: float, fl: Any, *, norm_bound: float | None = None
) -> Numbers:
    """The section "fromage"."""
    if norm_bound is not None:
        state.setdefault("max_norm", norm_bound * norm(w))
    s, p = fl(relative_rate(w, g, lr, fl)), fl(math.sqrt(1.0 + lr * lr))
    w = [fl(divide(fl(a - fl(s * b)), p)) for a, b in zip(w, g, strict=True)]
    if norm_bound is None:
        return w
    nw, bound = norm(w), state["max_norm"]
    f = fl(divide(bound, nw) if nw > bound else 1.0)
    return [fl(a * f) for a in w]


def lars_lesion(w: Numbers, g: Numbers, state: Any, lr: float, fl: Any) -> Numbers:
    """The section "lars_lesion"."""
    s = fl(relative_rate(w, g, lr, fl))
    return [fl(a - fl(s * b)) for a, b in zip(w, g, strict=True)]


PAGE = {"sgd": sgd, "adam": adam, "lars": lars, "lars_lesion": lars_lesion, "fromage": fromage}


def every(**choices: tuple[Any, ...]) -> Iterator[dict[str, Any]]:
    """Every combination of the choices."""
    for values in itertools.product(*choices.values()):
        yield dict(zip(choices, values, strict=True))


OPTIONS: dict[str, list[dict[str, Any]]] = {
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
    "lars_lesion": [{}],
    "fromage": [{}, {"norm_bound": 1.0}, {"norm_bound": 0.7}, {"norm_bound": 0.0}],
}  # fmt: skip
CASES = [
    pytest.param(rule, options, id="-".join([rule, *(f"{k}={v}" for k, v in options.items())]))
    for rule, choices in OPTIONS.items()
    for options in choices
]
RICHEST: dict[str, dict[str, Any]] = {  # the setting that uses most of each section
    "sgd": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    "adam": {"weight_decay": 0.1, "decoupled": False},
    "lars": {"momentum": 0.9, "weight_decay": 5e-4, "eps": 1e-8},
    "lars_lesion": {},
    "fromage": {"norm_bound": 0.99},
}
DTYPES = ["float32", "float64"]

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
    rule: str, options: Any, w: Numbers, gradients: list[Numbers], rates: Numbers, dtype: str
) -> list[dict[str, Any]]:
    """After every step the parameter under "w", and the state."""
    state: dict[str, Any] = {"step": 0}
    seen = []
    for g, lr in zip(gradients, rates, strict=True):
        w = PAGE[rule](w, g, state, lr, ROUND[dtype], **options)
        state["step"] += 1
        seen.append({"w": w, **state})
    return seen


def freeze(*groups: dict[str, Any]) -> None:
    """Make NumPy arrays read-only, so that a rule that writes to its arguments raises."""
    for x in itertools.chain.from_iterable(group.values() for group in groups):
        if isinstance(x, np.ndarray):
            x.setflags(write=False)


def by_npdrt(
    rule: str, options: Any, w: Any, gradients: list[Any], rates: Numbers
) -> list[dict[str, Any]]:
    """The same from npdrt.optim, as arrays; the rates override a setting that must not matter."""
    optimizer = optim.RULES[rule](lr=0.5, **options)
    params = {"layers/00/weight": w}
    state = optimizer.init(params)
    freeze(state)
    seen = []
    for g, lr in zip(gradients, rates, strict=True):
        params, state = optimizer.update(params, {"layers/00/weight": g}, state, lr=lr)
        freeze(params, state)
        slots = {name.rpartition("/")[2]: value for name, value in state.items()}
        seen.append({"w": params["layers/00/weight"], **slots})
    return seen


def array(values: Numbers, dtype: str, shape: tuple[int, ...] | None = None) -> Any:
    """A read-only array of `values`."""
    made = np.array(values, dtype=dtype).reshape((len(values),) if shape is None else shape)
    made.setflags(write=False)
    return made


def assert_same_bits(ours: list[dict[str, Any]], page: list[dict[str, Any]], dtype: str) -> None:
    """Equal names, dtypes and bits of parameter and state after every step."""
    assert len(ours) == len(page)
    for step, (found, expected) in enumerate(zip(ours, page, strict=True)):
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
        page = by_the_page(rule, options, w, gradients, RATES, dtype)
        arrays = [array(g, dtype, shape) for g in gradients]
        ours = by_npdrt(rule, options, array(w, dtype, shape), arrays, RATES)
        assert_same_bits(ours, page, dtype)
        assert all(step["w"].shape == shape for step in ours)


@pytest.fixture(scope="module")
def large() -> dict[tuple[str, str], list[dict[str, Any]]]:
    """By the page: 65,836 elements, more than one chunk of the norm and not whole rows."""
    found = {}
    for rule, dtype in itertools.product(RICHEST, DTYPES):
        w, gradients = problem(65536 + 300, dtype, 2)
        found[rule, dtype] = by_the_page(rule, RICHEST[rule], w, gradients, RATES[:2], dtype)
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", RICHEST)
def test_equals_the_page_large(rule: str, dtype: str, large: Any) -> None:
    w, gradients = problem(65536 + 300, dtype, 2)
    arrays = [array(g, dtype) for g in gradients]
    ours = by_npdrt(rule, RICHEST[rule], array(w, dtype), arrays, RATES[:2])
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
    return st.floats(width=32 if dtype == "float32" else 64)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_equals_the_page_at_any_values(data: st.DataObject) -> None:
    rule, dtype = data.draw(st.sampled_from(sorted(PAGE))), data.draw(st.sampled_from(DTYPES))
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
    page = by_the_page(rule, options, w, gradients, rates, dtype)
    arrays = [array(g, dtype) for g in gradients]
    assert_same_bits(by_npdrt(rule, options, array(w, dtype), arrays, rates), page, dtype)


# --- the same bits everywhere -----------------------------------------------------------------


@pytest.mark.parametrize("rule", RICHEST)
def test_every_backend(rule: str, backend: backends.Backend) -> None:
    """NumPy, a strict array API library, the double of CuPy, and CuPy where there is a GPU."""
    for dtype in DTYPES:
        w, gradients = problem(300, dtype, 3)
        page = by_the_page(rule, RICHEST[rule], w, gradients, RATES, dtype)
        shape = (20, 15)
        on_it = [backend.asarray(array(g, dtype, shape)) for g in gradients]
        start = backend.asarray(array(w, dtype, shape))
        ours = by_npdrt(rule, RICHEST[rule], start, on_it, RATES)
        host = [{name: backend.to_host(x) for name, x in step.items()} for step in ours]
        assert_same_bits(host, page, dtype)
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


def layouts(values: Numbers, dtype: str) -> list[Any]:
    """Arrays of shape (20, 15) with the same elements in memory in other ways: Fortran order, a
    slice with strides, negative strides, and a start that no vector load is aligned to."""
    plain = np.array(values, dtype=dtype).reshape(20, 15)
    wide, shifted = np.zeros((40, 45), dtype=dtype), np.zeros(301, dtype=dtype)[1:]
    wide[::2, ::3] = plain
    shifted[:] = values
    reverse = plain[::-1, ::-1].copy()[::-1, ::-1]
    return [np.asfortranarray(plain), wide[::2, ::3], reverse, shifted.reshape(20, 15)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", RICHEST)
def test_memory_layout_does_not_matter(rule: str, dtype: str) -> None:
    w, gradients = problem(300, dtype, 2)
    page = by_the_page(rule, RICHEST[rule], w, gradients, RATES[:2], dtype)
    kinds = [layouts(values, dtype) for values in (w, *gradients)]
    for start, *arrays in zip(*kinds, strict=True):
        for x in (start, *arrays):
            x.setflags(write=False)
        assert_same_bits(by_npdrt(rule, RICHEST[rule], start, arrays, RATES[:2]), page, dtype)


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
            values = [float(x) for x in np.asarray(step[name]).reshape(-1).tolist()]
            total.update(packed(values, dtype if len(values) > 1 else "float64"))
    return total.hexdigest()


def digests() -> dict[str, str]:
    """Digests of two large steps of every rule by npdrt.optim in this process."""
    found = {}
    for rule, options in RICHEST.items():
        for dtype in DTYPES:
            w, gradients = problem(65536 + 300, dtype, 2)
            arrays = [array(g, dtype) for g in gradients]
            steps = by_npdrt(rule, options, array(w, dtype), arrays, RATES[:2])
            found[f"{rule} {dtype}"] = digest(steps, dtype)
    return found


def umath() -> Any:
    return np._core._multiarray_umath  # the names of NumPy's dispatched instruction sets


def dispatched(without: str) -> list[str]:
    """The instruction sets in use that must go: above AVX2 ("AVX512"), or all ("all")."""
    used = [name for name in umath().__cpu_dispatch__ if umath().__cpu_features__[name]]
    above = [name for name in used if "AVX512" in name or name == "X86_V4"]
    return above if without == "AVX512" else used


ENVIRONMENTS = {
    "one BLAS thread": {"OPENBLAS_NUM_THREADS": "1"},
    "two BLAS threads": {"OPENBLAS_NUM_THREADS": "2"},
    "Haswell kernels": {"OPENBLAS_CORETYPE": "Haswell"},
    "SkylakeX kernels": {"OPENBLAS_CORETYPE": "SkylakeX"},
    "Prescott kernels": {"OPENBLAS_CORETYPE": "Prescott"},
    "without AVX-512": {"NPY_DISABLE_CPU_FEATURES": " ".join(dispatched("AVX512"))},
    "without AVX2 and above": {"NPY_DISABLE_CPU_FEATURES": " ".join(dispatched("all"))},
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
    expected = {f"{rule} {dtype}": digest(s, dtype) for (rule, dtype), s in large.items()}
    assert found["digests"] == expected


if __name__ == "__main__":
    features = [name for name, on in umath().__cpu_features__.items() if on]
    print(json.dumps({"features": features, "digests": digests()}))
