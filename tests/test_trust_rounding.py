"""Every `guaranteed` of `npdrt.trust` in float64: chosen against rounding, at scales of 1e-150 to
1e150 and depths to 200, with both sides of every inequality again at 400 digits.

By default a few hundred inputs; `-m soak` takes 100,000 and more."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from npdrt import Error, trust
from npdrt.trust import Bound, Inequality, Net, Pair

DIGITS = 400
LONG = [(0, 150), *(pytest.param(n, 25_000, marks=pytest.mark.soak) for n in range(1, 5))]
Rng = np.random.Generator

# --- matrices, perturbations and inputs chosen against the statements -------------------------


def isometry(rng: Rng, n: int, m: int) -> np.ndarray:
    """All singular values 1."""
    q = np.linalg.qr(rng.normal(size=(max(n, m), min(n, m))))[0]
    return q if n >= m else q.T


def signs(rng: Rng, n: int, m: int) -> np.ndarray:
    """A diagonal of signs: exact in float64, where equality occurs."""
    return np.eye(n, m) * rng.choice([-1.0, 1.0], size=(n, 1))


def conditioned(rng: Rng, n: int, m: int) -> np.ndarray:
    """Singular values 1 and kappa, kappa up to 1e12."""
    k, kappa = min(n, m), 10 ** rng.choice([rng.uniform(0, 2), rng.uniform(0, 12)])
    s = np.where(np.arange(k) < rng.integers(1, k + 1), kappa, 1.0)
    return isometry(rng, n, k) * s @ isometry(rng, k, m)


def gaussian(rng: Rng, n: int, m: int) -> np.ndarray:
    """Independent normal numbers."""
    return rng.normal(size=(n, m))


FAMILIES = (isometry, signs, conditioned, gaussian)


def perturbed(rng: Rng, w: np.ndarray) -> np.ndarray:
    """W~: W plus something along it, against it, of rank one, or of a family; relative sizes from
    1e-18 to 1e150, most of them moderate."""
    kind = rng.integers(6)
    u, s, v = np.linalg.svd(w / np.max(np.abs(w)), full_matrices=False)
    if kind == 0:
        d = w / np.linalg.norm(w / np.max(np.abs(w)))
    elif kind == 1:
        d = u * s[::-1] @ v
    elif kind == 2:
        d = np.outer(u[:, -1], v[-1])
    elif kind == 3:
        return w.copy()
    else:
        d = FAMILIES[rng.integers(4)](rng, *w.shape)
    d = d / np.linalg.norm(d / np.max(np.abs(d))) / np.max(np.abs(d))
    size = 10 ** rng.choice([rng.uniform(-18, -8), rng.uniform(-3, 2), 0.0, rng.uniform(-18, 150)])
    with np.errstate(over="ignore", invalid="ignore"):
        after = w + d * np.max(np.abs(w)) * size * rng.choice([-1, 1])
    return after if np.all(np.isfinite(after)) else w * 2


def widths(rng: Rng, depth: int, largest: int) -> list[int]:
    """n_0 .. n_L: tall, wide, a valley, or any."""
    sizes = np.sort(rng.integers(1, largest + 1, size=depth + 1))
    shape = rng.integers(4)
    if shape == 0:
        return sizes.tolist()
    if shape == 1:
        return sizes[::-1].tolist()
    cut = rng.integers(depth + 1)
    if shape == 2:
        return [*np.sort(sizes[:cut])[::-1].tolist(), *np.sort(sizes[cut:]).tolist()]
    return rng.permutation(sizes).tolist()


def random_pair(rng: Rng, depth: int, largest: int = 4) -> Pair:
    """Two networks whose layers have scales of 1e-150 to 1e150."""
    sizes = widths(rng, depth, largest)
    family = FAMILIES[rng.integers(4)]
    spread = rng.choice([0, 3, 150])
    weights = [family(rng, n, m) * 10.0 ** rng.uniform(-spread, spread) for m, n in pairwise(sizes)]
    sign = rng.choice([-1.0, 1.0]) * 10.0 ** rng.choice([0, 0, rng.uniform(-spread, spread)])
    slope = sign * rng.choice([0.01, 0.2, 0.5, 0.9, 1 - 1e-9, 1.0, 1.0, 1.0])
    last = bool(rng.random() < 0.5)
    nets = [
        Net(tuple(w), slope, sign, output_nonlinearity=last)
        for w in (weights, [perturbed(rng, w) for w in weights])
    ]
    return Pair(*nets)


def inputs(rng: Rng, p: Pair) -> Iterator[np.ndarray]:
    """A generic input, the weakest and the strongest direction of W_1, a unit vector."""
    w = p.before.weights[0]
    v = np.linalg.svd(w / np.max(np.abs(w)))[2]
    for x in (rng.normal(size=p.widths[0]), v[-1], -v[-1], v[0], np.eye(p.widths[0])[-1]):
        yield x * 10.0 ** rng.choice([0.0, rng.uniform(-150, 150)])


def sharp() -> Iterator[tuple[Pair, np.ndarray]]:
    """The examples of docs/theory.md, one layer and deep, at scales where squares overflow."""
    one, two = np.eye(2), np.array([[0, 0.1], [-0.1, 0]])
    examples = (
        (one, two, 0.2, [-1.0, 0.0]),
        (one, two, 1.0, [-1.0, 0.0]),
        (one, np.diag([1.0, 0.0]), 1.0, [1.0, 0.0]),
        (one, np.diag([-2.0, 0.0]), 1.0, [1.0, 0.0]),
        (one, np.diag([-2.0, 1e-3]), 1.0, [1.0, 0.0]),
        (one, -one, 1.0, [1.0, 1.0]),
        (np.diag([3.0, 3, 3, 1]), 0.1 * np.diag([1.0, 1, 1, 3]), 1.0, [0.0, 0, 0, 1]),
        (np.ones((1, 1)), np.ones((1, 1)), 1.0, [1.0]),
        (np.ones((1, 1)), -11 * np.ones((1, 1)), 0.1, [-1.0]),
        (np.array([[0.0], [1.0]]), np.array([[0.0], [1.0]]), 0.5, [1.0]),
    )
    for w, d, slope, x in examples:
        square = w.shape[0] == w.shape[1]
        for depth in (1, 2, 20, 200) if square else (1,):
            for scale in (1e-150, 1.0, 1 / 3, 1e100) if depth < 9 else (1e150,):
                for small in (1.0, 1e-12):
                    ws, ds = [scale * w] * depth, [small * (scale * d)] * depth
                    after = tuple(a + b for a, b in zip(ws, ds, strict=True))
                    yield Pair(Net(tuple(ws), slope), Net(after, slope)), np.array(x) * scale


# --- the oracle: both sides at 400 digits -----------------------------------------------------


def exact(a: np.ndarray) -> Any:
    """A matrix or vector of mpmath, with the same numbers."""
    return mpmath.matrix(a.tolist())


def size(a: Any) -> Any:
    """The 2-norm of all elements."""
    return mpmath.sqrt(mpmath.fsum(v * v for v in a))


def kappa(w: np.ndarray) -> Any:
    """The condition number, from singular values at 80 digits."""
    if min(w.shape) == 1:
        return mpmath.mpf(1)
    with mpmath.workdps(80):
        m = exact(w) / float(np.max(np.abs(w)))
        s = mpmath.svd_r(m if m.rows >= m.cols else m.T, compute_uv=False)
        return max(s) / min(s)


class Oracle:
    """Both sides of every bound of a pair, from the definitions in docs/theory.md."""

    def __init__(self, p: Pair) -> None:
        self.p, self.slopes = (
            p,
            [tuple(map(abs, p.before.slopes(n + 1))) for n in range(p.before.depth)],
        )
        nets = [[exact(w) for w in n.weights] for n in (p.before, p.after)]
        self.nets, self.changes = nets, [b - a for a, b in zip(*nets, strict=True)]
        self.r = [size(d) / size(w) for d, w in zip(self.changes, nets[0], strict=True)]
        self.b = [mpmath.mpf(max(s)) / min(s) for s in self.slopes]
        self.kappas: dict[tuple[int, int], Any] = {}

    def kappa(self, which: int, layer: int) -> Any:
        """kappa of W, W~ or dW of a layer; 1 for no change."""
        if (which, layer) not in self.kappas:
            if which < 2:
                w = (self.p.before, self.p.after)[which].weights[layer]
                found = kappa(w)
            else:
                d = self.changes[layer]
                found = mpmath.mpf(1)
                if size(d) and min(d.rows, d.cols) > 1:
                    with mpmath.workdps(80):
                        d = d / size(d)
                        s = mpmath.svd_r(d if d.rows >= d.cols else d.T, compute_uv=False)
                        found = max(s) / min(s) if min(s) > 1e-60 else mpmath.inf
            self.kappas[which, layer] = found
        return self.kappas[which, layer]

    def outputs(self, x: np.ndarray) -> tuple[list[Any], list[list[Any]]]:
        """f and f~, and the slopes of every layer at both."""
        values, slopes = [], []
        for weights in self.nets:
            h, found = exact(x), []
            for n, w in enumerate(weights):
                below, above = self.p.before.slopes(n + 1)
                z = w * h
                found.append([mpmath.mpf(above if v > 0 else below) for v in z])
                h = mpmath.matrix([s * v for s, v in zip(found[-1], z, strict=True)])
            values.append(h)
            slopes.append(found)
        return values, slopes

    def left(self, bound: Bound, x: np.ndarray) -> Any:
        """The left side of a bound."""
        values, slopes = self.outputs(x)
        if bound.layer is not None:
            values = [self.jacobian(n, slopes[n], bound.layer) for n in (0, 1)]
        found = size(values[1] - values[0]) / size(values[0])
        return found**2 if bound.name.startswith("v1") else found

    def jacobian(self, net: int, slopes: list[Any], layer: int) -> Any:
        """J_l."""
        j = mpmath.eye(self.p.widths[-1])
        for s, w in list(zip(slopes, self.nets[net], strict=True))[
            : layer - 1 if layer else None : -1
        ]:
            j = j * (mpmath.diag(s) * w)
        return j

    def right(self, bound: Bound) -> Any:
        """The right side of a bound."""
        layers = range(bound.layer or 0, self.p.before.depth)
        if not layers:
            return mpmath.mpf(0)
        r, b = [self.r[k] for k in layers], [self.b[k] for k in layers]
        nbar = [min(self.p.widths[k : k + 2]) for k in layers]
        widest = max(self.p.widths[layers[0] + 1 :])

        def largest(*which: int) -> Any:
            return max(self.kappa(n, k) for n in which for k in layers)

        def prod(values: Any) -> Any:
            return mpmath.fprod(values)

        width = [mpmath.sqrt(n) * self.kappa(0, k) for n, k in zip(nbar, layers, strict=True)]
        name = bound.name
        if name == "v2, Theorem 1 a)":
            return prod(c * largest(0, 1, 2) ** 2 for c in b) * (prod(1 + s for s in r) - 1)
        if name == "ours, a) without W~":
            return prod(c * largest(0, 2) ** 2 for c in b) * (prod(1 + s for s in r) - 1)
        if name == "ours, a) unconditional":
            both = zip(b, width, strict=True)
            return prod(c * w for c, w in both) * (prod(1 + s for s in r) - 1)
        if name == "v1, Theorem 1":
            constant = prod(2 * c**2 * widest * largest(0) ** 2 for c in b)
            return constant * (prod(1 + s**2 for s in r) - 1)
        both = list(zip(b, r, strict=True))
        if name == "v2, Theorem 1 b)":
            jumps = prod(c * (1 + s) for c, s in both) - 1
            return prod(c * largest(0, 1, 2) ** 2 for c in b) * jumps
        if name == "v1, Theorem 2":
            jumps = prod((1 + (c - 1) ** 2) * (1 + s**2) for c, s in both) - 1
            return prod((2 * widest * c * largest(0)) ** 2 for c in b) * jumps
        assert name == "ours, b) recursion"
        sizes = self.p.widths[layers[0] :]
        bottom = layers[0] + max(n for n, w in enumerate(sizes) if w == min(sizes))
        d = mpmath.mpf(0)
        for k in (*range(bottom, layers[-1] + 1), *reversed(range(layers[0], bottom))):
            n = k - layers[0]
            c = min(max(self.kappa(0, k), self.kappa(2, k)) ** 2, width[n])
            d = c * ((b[n] * (1 + r[n]) - 1) * (1 + d) + b[n] * d)
        return d


def log(value: Any) -> Any:
    return mpmath.log(value) if value else -mpmath.inf


def in_float64(b: Any, lhs: float, rhs: float, log_lhs: float, log_rhs: float) -> None:
    """What `guaranteed` says, of the numbers that are returned."""
    assert lhs <= rhs, b
    assert log_lhs <= log_rhs, b
    assert 0 <= b.slack < 1, b


def confirmed(p: Pair, x: np.ndarray, bounds: list[Bound]) -> Counter[str]:
    """Both sides of guaranteed bounds at 400 digits: the right side is at most what is returned
    and not far below it, the true left side is below both."""
    oracle, counted = Oracle(p), Counter[str]()
    for b in bounds:
        lhs, rhs = oracle.left(b, x), oracle.right(b)
        assert lhs <= rhs * (1 + mpmath.mpf(10) ** -50), (b, "the theorem itself")
        assert rhs <= 0 or log(rhs) <= b.log_value, b
        assert rhs <= 0 or b.log_value - log(rhs) <= 2 * math.log1p(b.slack) + 1e-15, b
        assert rhs <= b.value or b.value == math.inf, b
        counted["at 400 digits"] += 1
    return counted


def check_pair(p: Pair, x: np.ndarray, *, sample: bool, most: int = 1) -> Counter[str]:
    """Every guaranteed bound in float64; at 400 digits those that are close, and a sample."""
    bounds, counted = [b for b in trust.all_bounds(p, x) if b.guaranteed], Counter[str]()
    for b in bounds:
        assert b.measured is not None
        assert b.log_measured is not None
        in_float64(b, b.measured, b.value, b.log_measured, b.log_value)
    counted["bounds in float64"] += len(bounds)
    close = [b for b in bounds if b.log_measured is not None and b.value > 0
             and b.log_measured > b.log_value - 1e-6]  # fmt: skip
    counted["within 1e-6 of equality"] += len(close)
    if (sample and p.before.depth < 40) or (close and p.before.depth <= most):
        with mpmath.workdps(DIGITS):
            counted += confirmed(p, x, bounds if sample else close[:3])
    return counted


def depth(rng: Rng) -> int:
    return int(
        rng.choice([1, 1, 2, 3, 5, rng.integers(1, 201)], p=[0.3, 0.2, 0.2, 0.2, 0.08, 0.02])
    )


@pytest.mark.parametrize(("seed", "count"), LONG)
def test_bounds(seed: int, count: int, capsys: Any) -> None:
    """Every bound in float64; at 400 digits one input in 50, and one in 5 that is close."""
    rng, counted, seen = np.random.default_rng(seed), Counter[str](), 0
    while seen < count:
        layers = depth(rng)
        p = random_pair(rng, layers, 4 if layers < 9 else 2)
        for n, x in enumerate(inputs(rng, p)):
            counted += check_pair(p, x, sample=seen % 50 == 0, most=40 if n == 1 else 0)
            seen += 1
    with capsys.disabled():
        print(f"\n{seen} inputs: {dict(counted)}")
    assert counted["bounds in float64"] > seen
    assert counted["within 1e-6 of equality"] > seen / 20
    assert counted["at 400 digits"] > seen / 50


def test_sharp_examples() -> None:
    """In float64 all of them; at 400 digits those that are not deep."""
    counted = Counter[str]()
    for n, (p, x) in enumerate(sharp()):
        counted += check_pair(p, x, sample=p.before.depth == 1 and n % 3 == 0)
    assert counted["within 1e-6 of equality"] > 100
    assert counted["at 400 digits"] > 100


# --- lemmas -----------------------------------------------------------------------------------


def close(i: Inequality, lhs: Any, rhs: Any) -> None:
    """A guaranteed inequality in float64, and both sides beside those at 400 digits: the side that
    was moved is on the safe side of the truth and within twice its slack."""
    assert i.guaranteed
    in_float64(i, i.lhs, i.rhs, i.log_lhs, i.log_rhs)
    assert lhs <= rhs * (1 + mpmath.mpf(10) ** -50), (i, "the lemma itself")
    room = 2 * math.log1p(i.slack) + 1e-15
    if i.name.endswith("lower"):
        assert i.log_lhs <= log(lhs) <= i.log_lhs + room or lhs == 0, i
    else:
        assert i.log_rhs - room <= log(rhs) <= i.log_rhs or rhs == 0, i


def matrices(rng: Rng, largest: int = 4) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """M, M~ (n, m), X and Y for Lemma 3, where it is sharp: the strongest direction of M~, the
    weakest of M."""
    m, n = sorted(rng.integers(1, largest + 1, size=2).tolist())
    family = FAMILIES[rng.integers(4)]
    a, b = family(rng, n, m), family(rng, n, m)
    if rng.random() < 0.3:
        u, s, v = np.linalg.svd(a, full_matrices=False)
        b = u * s[::-1] @ v
    x, y = np.linalg.svd(b)[2][:1].T, np.linalg.svd(a)[2][-1:].T
    if rng.random() < 0.3:
        x, y = rng.normal(size=(m, 2)), rng.normal(size=(m, 3))
    scales = 10.0 ** rng.choice([np.zeros(4), rng.uniform(-150, 150, size=4)])
    return tuple(z * s for z, s in zip((a, b, x, y), scales, strict=True))  # type: ignore[return-value]


@pytest.mark.parametrize("count", [60, pytest.param(20_000, marks=pytest.mark.soak)])
def test_lemmas_of_two_matrices(count: int) -> None:
    """v2's Lemma 3 with both constants, v1's Lemmas 1, 3 and 4."""
    rng, guaranteed = np.random.default_rng(1), 0
    for n in range(count):
        a, b, x, y = matrices(rng)
        low, high = trust.lemma_4_v1(a, y)
        found = [*(trust.lemma_3(a, b, x, y, ours=flag) for flag in (False, True)), low, high,
                 trust.lemma_3_v1([a, b, a]), *trust.lemma_1_v1(a, x[:, 0])]  # fmt: skip
        for i in (i for i in found if i.guaranteed):
            in_float64(i, i.lhs, i.rhs, i.log_lhs, i.log_rhs)
            guaranteed += 1
        if n % 20 and count > 100:
            continue
        with mpmath.workdps(DIGITS):
            ea, eb, ex, ey = map(exact, (a, b, x, y))
            k, rest = max(kappa(a), kappa(b)), min(a.shape) - 1
            best = mpmath.sqrt((1 + rest * k**2) / (1 + rest / k**2))
            sizes = size(eb) * size(ex) / (size(ea) * size(ey))
            for i, c in zip(found[:2], (k**2, best), strict=True):
                if i.guaranteed:
                    close(i, size(eb * ex) / size(ea * ey), c * sizes)
            product, whole = size(ea * ey) ** 2, (size(ea) * size(ey)) ** 2
            close(high, product, whole)
            if low.guaranteed:
                close(low, whole / (min(a.shape) * kappa(a) ** 2), product)
            squares = 2 * size(ea) ** 2 + size(eb) ** 2
            close(found[4], size(ea + eb + ea) ** 2, 3 * squares)
    assert guaranteed > 5 * count


@pytest.mark.parametrize("count", [60, pytest.param(10_000, marks=pytest.mark.soak)])
def test_lemmas_of_networks(count: int) -> None:
    """v1's Lemmas 2 and 5, where dW may be far below the last digit of W."""
    rng, guaranteed = np.random.default_rng(2), 0
    for n in range(count):
        layers = depth(rng)
        p = random_pair(rng, layers, 4 if layers < 9 else 2)
        scale = 10.0 ** rng.uniform(-40, 10)
        moved = [d * scale for d in p.changes]
        found = [trust.lemma_5_v1(p.before.weights, moved, ours=flag) for flag in (False, True)]
        found += [trust.lemma_2_v1(p, x) for x in inputs(rng, p)]
        for i in (i for i in found if i.guaranteed):
            in_float64(i, i.lhs, i.rhs, i.log_lhs, i.log_rhs)
            guaranteed += 1
        if layers > 5 or (n % 20 and count > 100):
            continue
        with mpmath.workdps(DIGITS):
            before, change = ([exact(w) for w in ws] for ws in (p.before.weights, moved))
            plain = after = mpmath.eye(p.widths[0])
            for w, d in zip(before, change, strict=True):
                plain, after = w * plain, (w + d) * after
            constant = mpmath.fprod(min(w.shape) * kappa(w) ** 2 * 2 for w in p.before.weights)
            r = [size(d) / size(w) for w, d in zip(before, change, strict=True)]
            rhs = constant * (mpmath.fprod(1 + s**2 for s in r) - 1)
            for i, factor in zip(found, (1, 1 - mpmath.mpf(2) ** -layers), strict=False):
                if i.guaranteed:
                    close(i, (size(after - plain) / size(plain)) ** 2, factor * rhs)
    assert guaranteed > count / 2


numbers = st.floats(allow_nan=False, allow_infinity=False)
others = numbers.filter(lambda v: v != 0)


@settings(deadline=None, max_examples=300)
@given(others, numbers, others, numbers)
def test_two_scalar_layers(a: float, da: float, b: float, db: float) -> None:
    """Any float64 at all: exact, so that there is no slack."""
    for i in (trust.scalar_two_layers(a, da, b, db), trust.scalar_two_layers_v1(a, da, b, db)):
        assert i.guaranteed
        assert i.slack == 0
        assert i.lhs <= i.rhs
        assert i.log_lhs <= i.log_rhs
    with mpmath.workdps(2000):
        u, v = mpmath.mpf(da) / a, mpmath.mpf(db) / b
        change = abs(u + v + u * v)
        i = trust.scalar_two_layers(a, da, b, db)
        assert i.log_lhs == pytest.approx(float(log(change)), rel=1e-14, abs=1e-14)
        assert i.lhs == pytest.approx(float(change) if change < 1e308 else math.inf, rel=1e-15)


@pytest.mark.parametrize("count", [60, pytest.param(5_000, marks=pytest.mark.soak)])
def test_spectral_shift(count: int) -> None:
    """Mirsky's bound with its slack, and both sides at 80 digits."""
    rng = np.random.default_rng(3)
    for n in range(count):
        w = FAMILIES[rng.integers(4)](rng, *rng.integers(1, 5, size=2))
        w = w * 10.0 ** rng.uniform(-150, 150)
        d = perturbed(rng, w) - w
        s = trust.spectral_shift(w, d)
        assert s.absolute <= s.bound + s.slack
        assert s.relative <= s.relative_bound + s.relative_slack
        if n % 20 and count > 100:
            continue
        with mpmath.workdps(DIGITS):
            a, b = exact(w), exact(d)
            both = [z if w.shape[0] >= w.shape[1] else z.T for z in (a, a + b)]
            values = [sorted(mpmath.svd_r(z / size(a), compute_uv=False)) for z in both]
            shift = size([y - x for x, y in zip(*values, strict=True)])
            assert abs(shift - s.relative) <= s.relative_slack * 2 + 1e-15 * s.relative
            assert abs(size(b) / size(a) - s.relative_bound) <= 1e-14 * s.relative_bound


# --- what no number should do -----------------------------------------------------------------

BAD = {"nan": math.nan, "inf": math.inf, "minus inf": -math.inf}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
@pytest.mark.parametrize("place", ["W_1", "W_2", "W~_1", "W~_2", "x", "bias"])
def test_what_is_not_finite_guarantees_nothing(bad: float, place: str) -> None:
    """No `guaranteed` is True beside NaN or infinities, wherever they are."""
    weights = [[np.diag([2.0, 1]), np.eye(2)] for _ in range(2)]
    x, biases = np.ones(2), [[np.zeros(2), np.zeros(2)] for _ in range(2)]
    if place == "x":
        x[1] = bad
    elif place == "bias":
        biases[1][0][0] = bad
    else:
        weights["~" in place][int(place[-1]) - 1][0, 1] = bad
    nets = [Net(tuple(w), 0.5, biases=tuple(b)) for w, b in zip(weights, biases, strict=True)]
    assert not any(b.guaranteed for b in trust.all_bounds(Pair(*nets), x))
    assert not trust.lemma_2_v1(Pair(*nets), x).guaranteed
    m = np.array([[1.0, bad], [0.0, 1.0]])
    for a, b in ((m, np.eye(2)), (np.eye(2), m)):
        found = [trust.lemma_3(a, b, b, a), *trust.lemma_4_v1(a, b), trust.lemma_3_v1([a, b]),
                 trust.lemma_5_v1([a], [b]), *trust.lemma_1_v1(a, b[0])[:1]]  # fmt: skip
        found = [i for i in found if i.name != "v1, Lemma 1, lower" or a is m]
        assert not any(i.guaranteed for i in found)


def plain_pair(dtype: str = "float64", **options: Any) -> Pair:
    w = np.array([[2, 1], [1, 3]]).astype(dtype)
    return Pair(Net((w, w), **options), Net((w + w, w), **options))


@pytest.mark.parametrize("dtype", ["float16", "float32", "int64", "uint8", ">f8"])
def test_other_dtypes_are_exact(dtype: str) -> None:
    """Narrow floats and integers give what their values give as float64."""
    x = np.ones(2).astype(dtype)
    assert trust.all_bounds(plain_pair(dtype), x) == trust.all_bounds(plain_pair(), np.ones(2))


def test_python_lists_and_array_scalars() -> None:
    w = [[2, 1], [1, 3]]
    assert trust.condition_number(w) == trust.condition_number(np.array(w, float))
    found = Pair(Net((w,), np.float64(0.5)), Net((w,), np.array(0.5)))
    assert trust.theorem_1a(found, [1, 1]).measured == 0
    one = trust.scalar_two_layers(np.float32(2), np.array(1), np.int64(3), 6)
    assert one.lhs == one.rhs == 3.5


def test_widths_of_one() -> None:
    """1-element layers are exact: kappa is 1 without error."""
    p = Pair(Net(([[3.0]],)), Net(([[4.0]],)))
    for bound in trust.all_bounds(p, [1.0]):
        assert bound.guaranteed
        assert bound.slack < 1e-12
    assert trust.theorem_1a(p, [1.0]).measured == 1 / 3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: trust.scalar_two_layers(0, 1, 1, 1), "da / a: expected finite .* got 1 and 0"),
        (lambda: trust.scalar_two_layers_v1(1, 1, 0.0, 1), "db / b: .* the lower one not 0"),
        (lambda: trust.scalar_two_layers(1, math.nan, 1, 1), "da / a: expected finite numbers"),
        (lambda: trust.scalar_two_layers(1, 1, 1, math.inf), "db / b: expected finite numbers"),
        (lambda: trust.scalar_two_layers(1, "x", 1, 1), "da / a: .* got 'x' and 1"),
        (lambda: trust.lemma_3_v1([]), r"matrices of one shape; got \[\]"),
        (lambda: trust.lemma_3_v1([np.eye(2), np.eye(3)]), "expected matrices of one shape"),
        (lambda: trust.lemma_5_v1([], []), "got no weights"),
        (lambda: trust.lemma_5_v1([np.eye(2), np.eye(3)], [np.eye(2)]), "layer 1 has 2 outputs"),
        (lambda: trust.lemma_1_v1(np.eye(2), np.eye(2)), r"expected a vector; got shape \(2, 2\)"),
        (lambda: trust.lemma_4_v1(np.eye(2), np.eye(3)), "v1, Lemma 4: the shapes do not fit"),
        (lambda: trust.lemma_3(np.eye(2), np.eye(3), np.eye(2), np.eye(2)), "lemma_3: the shapes"),
        (lambda: trust.lemma_3(np.eye(2), np.eye(2), np.eye(3), np.eye(2)), "lemma_3: the shapes"),
        (lambda: trust.condition_number([1.0]), r"got shape \(1,\)"),
        (lambda: trust.condition_number(np.float64(3)), r"got shape \(\)"),
        (lambda: trust.condition_number(np.eye(2) * 1j), "real numbers; got complex128"),
        (lambda: trust.condition_number(np.eye(2, dtype=bool)), "real numbers; got bool"),
        (lambda: trust.condition_number([[1], [1, 2]]), "real numbers; .*inhomogeneous"),
        (lambda: trust.condition_number(None), "real numbers; got object"),
        (lambda: Net((np.eye(2),), math.nan), "slope must be a finite number; got nan"),
        (lambda: Net((np.eye(2),), 1.0, math.inf), "slope_above must be a finite number; got inf"),
        (lambda: Net((np.eye(2),), "steep"), "slope must be a finite number; got 'steep'"),
        (lambda: Net((np.eye(2),))(["a", "b"]), "Net: an input: expected an array of real"),
    ],
)  # fmt: skip
def test_errors(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(Error, match=message):
        call()
