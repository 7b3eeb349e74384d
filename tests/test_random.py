"""Random numbers: words against an independent Philox, transforms against exact arithmetic, the
same bytes under every SIMD level, and the distributions."""

from __future__ import annotations

import hashlib
import math
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from npdrt.errors import Error
from npdrt.random import _CHUNK, Random, _inverse_normal

ROOT = Path(__file__).parents[1]
MASK = (1 << 64) - 1


# --- words -----------------------------------------------------------------------------------


def philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x64 with 10 rounds, from the paper (Salmon et al. 2011), in Python integers."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        high0, low0 = divmod(0xD2E7470EE14C6C93 * c0, 1 << 64)
        high1, low1 = divmod(0xCA5A826395121157 * c2, 1 << 64)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & MASK, (k1 + 0xBB67AE8584CAA73B) & MASK
    return [c0, c1, c2, c3]


PI = [0x243F6A8885A308D3, 0x13198A2E03707344, 0xA4093822299F31D0, 0x082EFA98EC4E6C89]
KNOWN_ANSWERS = [  # Random123, kat_vectors
    ([0] * 4, [0] * 2, "16554d9eca36314c db20fe9d672d0fdc d7e772cee186176b 7e68b68aec7ba23b"),
    ([MASK] * 4, [MASK] * 2, "87b092c3013fe90b 438c3c67be8d0224 9cc7d7c69cd777b6 a09caebf594f0ba0"),
    (PI, [0x452821E638D01377, 0xBE5466CF34E90C6C],
     "a528f45403e61d95 38c72dbd566e9788 a5a1610e72fd18b5 57bd43b5e52b7fe6"),
]  # fmt: skip


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_the_oracle_gives_the_known_answers(counter: Any, key: Any, words: str) -> None:
    assert " ".join(f"{w:016x}" for w in philox(counter, key)) == words


def expected_words(seed: int, purpose: str, step: int, n: int) -> list[int]:
    """Key (seed, SHA-256 of the purpose), counter (block, 0, step, 0) from block 1."""
    name = int.from_bytes(hashlib.sha256(purpose.encode()).digest()[:8], "little")
    blocks = [philox([block, 0, step, 0], [seed, name]) for block in range(1, n // 4 + 2)]
    return [word for block in blocks for word in block][:n]


@pytest.mark.parametrize(
    ("seed", "purpose", "step"),
    [(0, "", 0), (1, "data/order", 7), (MASK, "größe", MASK), (12345, "layers/00/weight", 1 << 40)],
)
def test_words(seed: int, purpose: str, step: int) -> None:
    for n in (0, 1, 4, 11):
        found = Random(seed, purpose, step).words(n)
        assert found.dtype == np.uint64
        assert found.tolist() == expected_words(seed, purpose, step, n)


def test_streams_differ() -> None:
    r = Random(3, "a")
    others = [Random(4, "a"), Random(3, "b"), r.at(1), r.of("a"), r.of("b"), Random(3)]
    seen = {tuple(x.words(4).tolist()) for x in (r, *others)}
    assert len(seen) == 7
    assert abs(np.corrcoef([x.normal(2000) for x in (r, *others)]) - np.eye(7)).max() < 0.1


def test_names_of_streams() -> None:
    assert Random(3).of("data").of("order").at(5) == Random(3, "data/order", 5)
    assert Random(3, "x", 5).of("y") == Random(3, "x/y", 5)


def test_every_draw_starts_anew() -> None:
    r = Random(1, "x")
    assert np.array_equal(r.normal(9), r.normal(9))
    assert np.array_equal(r.uniform(5), r.uniform(50)[:5])
    long = r.normal(2 * _CHUNK + 3)
    assert np.array_equal(long[: _CHUNK + 1], r.normal(_CHUNK + 1))
    assert np.array_equal(long, _inverse_normal(midpoints(r.words(long.size))))


# --- transforms, recomputed ------------------------------------------------------------------


def midpoints(words: np.ndarray) -> np.ndarray:
    return np.array([float(Fraction(2 * (int(w) >> 12) + 1, 1 << 53)) for w in words])


def test_uniform_is_exact() -> None:
    r = Random(5, "uniform")
    words = expected_words(5, "uniform", 0, 300)
    assert r.uniform(300).tolist() == [float(Fraction(w >> 11, 1 << 53)) for w in words]
    wide = [float(Fraction(-3) + Fraction(7) * Fraction(w >> 11, 1 << 53)) for w in words]
    assert np.allclose(r.uniform(300, low=-3.0, high=4.0), wide, rtol=0, atol=2e-15)


def exact_normal(p: float) -> Any:
    with mpmath.workdps(50):
        return mpmath.sqrt(2) * mpmath.erfinv(2 * mpmath.mpf(p) - 1)


def worst_normal_error(p: np.ndarray) -> float:
    ours = _inverse_normal(p)
    exact = [exact_normal(float(x)) for x in p]
    return max(float(abs((mpmath.mpf(float(z)) - e) / e)) for z, e in zip(ours, exact, strict=True))


EDGES = [0.075, 0.925, math.exp(-25.0), 1 - math.exp(-25.0), 0.5 - 2.0**-30, 0.5 + 2.0**-53, 0.5]


def test_normal_is_accurate_over_every_p_it_can_meet() -> None:
    """Relative error 1e-14 from p = 2**-53 to 1 - 2**-53, and around the joints of AS 241."""
    powers = 2.0 ** -np.arange(2, 54)
    spread = np.linspace(-1e-9, 1e-9, 8)
    near = np.concatenate([edge + min(edge, 1 - edge) * spread for edge in EDGES])
    p = np.concatenate([powers, 1 - powers, near, np.random.default_rng(1).random(400)])
    assert worst_normal_error(p[p != 0.5]) <= 1e-14
    assert _inverse_normal(np.array([0.5])) == 0.0


def test_normal_of_a_stream_is_accurate() -> None:
    p = midpoints(np.array(expected_words(9, "normal", 2, 200), dtype=np.uint64))
    ours = Random(9, "normal", 2).normal(200, scale=3.0)
    np.testing.assert_allclose(ours, [3.0 * float(exact_normal(x)) for x in p], rtol=1e-14)


def test_permutation_sorts_the_words() -> None:
    words = expected_words(2, "order", 4, 100)
    expected = sorted(range(100), key=words.__getitem__)
    assert Random(2, "order", 4).permutation(100).tolist() == expected


def test_bernoulli_compares_uniforms() -> None:
    r = Random(2, "mask")
    assert np.array_equal(r.bernoulli((40, 5), 0.3), r.uniform((40, 5)) < 0.3)
    assert not r.bernoulli(1000, 0.0).any()
    assert r.bernoulli(1000, 1.0).all()


@given(n=st.integers(0, 300), seed=st.integers(0, MASK))
@settings(max_examples=50, deadline=None)
def test_permutations_are_permutations(n: int, seed: int) -> None:
    found = Random(seed, "p").permutation(n)
    assert found.dtype == np.int64
    assert sorted(found.tolist()) == list(range(n))


@pytest.mark.parametrize("shape", [(), 0, 3, (2, 3), [4, 1], (0, 5)])
def test_shapes(shape: Any) -> None:
    wanted = (shape,) if isinstance(shape, int) else tuple(shape)
    r = Random(0)
    for found in (r.uniform(shape), r.normal(shape), r.bernoulli(shape, 0.5)):
        assert found.shape == wanted
    assert r.normal(shape).dtype == r.uniform(shape).dtype == np.float64


# --- the same bytes everywhere ---------------------------------------------------------------

DIGESTS = """
import hashlib
from npdrt.random import Random
r = Random(2020, "known/answer", 3)
draws = {
    "uniform": r.uniform(5000).astype("<f8"),
    "normal": r.normal(40000, scale=0.5).astype("<f8"),
    "permutation": r.permutation(5000).astype("<i8"),
    "bernoulli": r.bernoulli((50, 100), 0.9),
}
for name, draw in draws.items():
    print(name, hashlib.sha256(draw.tobytes()).hexdigest()[:32])
"""
KNOWN_DIGESTS = """
uniform 491cfe944707675ef40bfef3573be9c0
normal 4131026061d4d7dffe071a96dad92ae1
permutation b1e7603c3906de24b620b072b754a2fa
bernoulli 40bd87d00e693995baef1bbb134bffcd
"""


def cpu_features() -> tuple[list[str], list[str]]:
    """NumPy's optional SIMD levels, from low to high, and those that this machine has."""
    from numpy._core import _multiarray_umath as core

    names = list(core.__cpu_dispatch__)
    return names, [name for name in names if core.__cpu_features__.get(name)]


def disabled(*marks: str) -> str:
    """The SIMD levels of this machine whose name contains one of `marks`, to be switched off."""
    return " ".join(name for name in cpu_features()[1] if any(mark in name for mark in marks))


AVX512, AVX2 = ("AVX512", "X86_V4"), ("AVX2", "FMA3", "X86_V3")  # names of old and new NumPy
ENVIRONMENTS = {
    "as it is": {},
    "without AVX-512": {"NPY_DISABLE_CPU_FEATURES": disabled(*AVX512)},
    "without AVX2 and above": {"NPY_DISABLE_CPU_FEATURES": disabled(*AVX512, *AVX2)},
    "lowest": {"NPY_DISABLE_CPU_FEATURES": disabled("")},
    "Haswell BLAS": {"OPENBLAS_CORETYPE": "Haswell"},
    "Prescott BLAS": {"OPENBLAS_CORETYPE": "Prescott"},
}


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_known_digests_in_other_processes(name: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **ENVIRONMENTS[name]}
    done = subprocess.run(
        [sys.executable, "-c", DIGESTS], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == KNOWN_DIGESTS.split()


def test_simd_levels_can_be_switched_off() -> None:
    """The test above does what it says: the levels it names are off in the other process."""
    if not cpu_features()[1]:
        pytest.skip("this NumPy has no optional SIMD level on this machine")
    code = (
        "from numpy._core import _multiarray_umath as m;"
        "print(sum(bool(m.__cpu_features__.get(f)) for f in m.__cpu_dispatch__))"
    )
    environment = {**os.environ, **ENVIRONMENTS["lowest"]}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "0"


# --- distributions ---------------------------------------------------------------------------


def kolmogorov(sample: np.ndarray, distribution: Any) -> float:
    """sqrt(n) sup |F_n - F|: above 1.95 with probability 0.001."""
    f, n = distribution(np.sort(sample)), sample.size
    steps = np.arange(n + 1) / n
    return math.sqrt(n) * max(np.max(steps[1:] - f), np.max(f - steps[:-1]))


def normal_distribution(z: np.ndarray) -> np.ndarray:
    return np.array([0.5 * math.erfc(-x / math.sqrt(2.0)) for x in z])


@pytest.mark.parametrize("seed", range(4))
def test_distributions(seed: int) -> None:
    r, n = Random(seed, "distribution"), 50_000
    u, z = r.uniform(n), r.of("normal").normal(n)
    assert 0.0 <= u.min() <= u.max() < 1.0
    assert kolmogorov(u, lambda x: x) < 1.95
    assert kolmogorov(z, normal_distribution) < 1.95
    moments = [np.mean(z), np.mean(z**2) - 1, np.mean(z**3), np.mean(z**4) - 3]
    deviations = np.sqrt(np.array([1.0, 2.0, 15.0, 96.0]) / n)
    assert np.all(np.abs(moments) < 4 * deviations)
    assert abs(np.mean(r.bernoulli(n, 0.3)) - 0.3) < 4 * math.sqrt(0.21 / n)
    assert abs(np.corrcoef(u[:-1], u[1:])[0, 1]) < 4 / math.sqrt(n)


def test_permutations_are_even() -> None:
    """Every order of three, about equally often."""
    counts = np.zeros((3, 3, 3))
    for step in range(3000):
        counts[tuple(Random(0, "orders", step).permutation(3))] += 1
    found = counts[counts > 0]
    assert found.size == 6
    assert np.all(np.abs(found - 500) < 4 * math.sqrt(500))


# --- errors ----------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [-1, 1 << 64, 1.5, "0", np.int64(3), None])
def test_seeds_and_steps_out_of_range(value: Any) -> None:
    for name in ("seed", "step"):
        with pytest.raises(Error, match=rf"{name} must lie in \[0, 2\*\*64\) and be an int; got"):
            Random(**{"seed": 0, name: value})
    with pytest.raises(Error, match="step must lie in"):
        Random(0).at(value)


@pytest.mark.parametrize("p", [-0.1, 1.5, math.nan])
def test_probability_out_of_range(p: float) -> None:
    with pytest.raises(Error, match=rf"a probability lies in \[0, 1\]; got {p}"):
        Random(0).bernoulli(3, p)
