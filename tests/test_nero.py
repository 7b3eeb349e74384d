"""nero: PyTorch's arithmetic, its page, real arithmetic, and what the referee tells apart."""

from __future__ import annotations

import math
from typing import Any

import mpmath
import numpy as np
import pytest
from edited import RATES, Edited, named, run

from npdrt import optim
from npdrt.conform import canonical
from npdrt.conform.formats import FORMATS
from npdrt.conform.rules import RULES
from npdrt.optim.nero import projected

SHAPES = [(), (0,), (7,), (0, 3), (3, 0), (5, 1), (1, 5), (3, 5), (4, 2, 3)]


def problem(dtype: str, shape: tuple[int, ...], steps: int = 12) -> tuple[Any, Any]:
    """A parameter and a gradient for every step, whose rows have several sizes."""
    rng = np.random.default_rng(0)
    sizes = 10.0 ** rng.integers(-2, 2, (*shape[:1], *(1 for _ in shape[1:])))
    w, g = rng.normal(size=shape), rng.normal(size=(steps, *shape)) * sizes
    return w.astype(dtype), g.astype(dtype)


@pytest.mark.parametrize("beta", [0.999, 0.5, 0.0])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_page_gives_the_same_bits(shape: tuple[int, ...], dtype: str, beta: float) -> None:
    w, gradients = problem(dtype, shape)
    optimizer, params, state = optim.nero(beta=beta), {"w": w}, {"step": 0}
    ours, page = optimizer.init(params), w.reshape(-1).tolist()
    for g, lr in zip(gradients, RATES, strict=False):
        params, ours = optimizer.update(params, {"w": g}, ours, lr=lr)
        flat = g.reshape(-1).tolist()
        page = canonical.step("nero", page, flat, state, lr, dtype, shape=shape, beta=beta)
        assert (params["w"].dtype, params["w"].shape) == (w.dtype, shape)
        np.testing.assert_array_equal(params["w"].reshape(-1).astype(float), page)
    assert float(ours["w/scale"]) == state["scale"]
    np.testing.assert_array_equal(ours["w/exp_avg_sq"].reshape(-1), state["exp_avg_sq"])


@pytest.mark.parametrize("shape", [(7,), (4, 6), (4, 3, 2)], ids=str)
def test_torch_has_the_same_trajectory(shape: tuple[int, ...]) -> None:
    """Algorithm 1 in PyTorch, row by row."""
    torch = pytest.importorskip("torch")
    w, gradients = problem("float64", shape)
    p, beta = torch.tensor(w).reshape(shape[0], -1), 0.9
    scale, v = p.abs().mean(), torch.zeros(shape[0], 1, dtype=torch.float64)
    found = run("nero", {"beta": beta}, w, gradients)
    for t, (ours, g, lr) in enumerate(zip(found, gradients, RATES, strict=False), 1):
        g = torch.tensor(g).reshape(shape[0], -1)
        v = beta * v + (1 - beta) * torch.linalg.vector_norm(g, dim=1, keepdim=True) ** 2
        size = torch.linalg.vector_norm(p, dim=1, keepdim=True) if len(shape) > 1 else scale
        p = p - lr * size * g / torch.sqrt(v / (1 - beta**t))
        if len(shape) > 1:
            p = p - p.mean(dim=1, keepdim=True)
            p = torch.nn.functional.normalize(p, dim=1)
        np.testing.assert_allclose(ours, p.reshape(shape).numpy(), rtol=1e-11, atol=1e-13)


def exactly(w: Any, gradients: Any, beta: float) -> Any:
    """Algorithm 1 for a matrix in 60 digits, from w to the last step."""
    mp = mpmath.mp.clone()
    mp.dps = 60
    rows = [[mp.mpf(float(x)) for x in row] for row in w]
    b, v = mp.mpf(beta), [mp.mpf(0)] * len(rows)
    for t, (g, lr) in enumerate(zip(gradients, RATES, strict=False), 1):
        for i, row in enumerate(rows):
            y = [mp.mpf(float(x)) for x in g[i]]
            v[i] = b * v[i] + (1 - b) * sum(x * x for x in y)
            k = mp.mpf(lr) * mp.sqrt(sum(x * x for x in row)) / mp.sqrt(v[i] / (1 - b**t))
            row = [x - k * d for x, d in zip(row, y, strict=True)]
            row = [x - sum(row) / len(row) for x in row]
            rows[i] = [x / mp.sqrt(sum(z * z for z in row)) for x in row]
    return np.array([[float(x) for x in row] for row in rows])


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_few_ulps_from_the_paper(dtype: str) -> None:
    """Three ulps of 1, the length of a row, a step."""
    w, gradients = problem(dtype, (4, 6), 8)
    found = np.asarray(run("nero", {"beta": 0.5}, w, gradients)[-1], dtype=float)
    exact = exactly(w, gradients, 0.5)
    assert np.max(np.abs(found - exact)) <= 8 * 3 * FORMATS[dtype].ulp(np.float64(0.99))


def after(w: Any, g: Any) -> Any:
    """An array after one step at lr 0.5."""
    return run("nero", {}, np.array(w), [np.array(g)], [0.5])[0]


def test_rows_have_mean_0_and_norm_1() -> None:
    w, gradients = problem("float64", (4, 6))
    for found in (projected(w), *run("nero", {}, w, gradients)):
        np.testing.assert_allclose(found.mean(axis=1), 0, atol=1e-15)
        np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-15)
    cube = w.reshape(4, 3, 2)
    np.testing.assert_array_equal(projected(cube), projected(w).reshape(4, 3, 2))


def test_elements_of_a_vector_move_by_the_rate_times_the_scale() -> None:
    assert after([1.0, -3.0], [1e-3, 50.0]).tolist() == [0.0, -4.0]  # the scale is 2
    assert after([0.0, 0.0], [5.0, 0.0]).tolist() == [-0.005, 0.0]
    assert after(2.0, -0.5).tolist() == 3.0


def test_rows_of_zeros_of_one_element_and_not_finite() -> None:
    assert after([[2.0], [-3.0]], [[1.0], [1.0]]).tolist() == [[0.0], [0.0]]
    assert after([[0.0, 0.0]], [[0.0, 0.0]]).tolist() == [[0.0, 0.0]]
    np.testing.assert_allclose(after([[0.0, 0.0]], [[2.0, 0.0]]), [[-(0.5**0.5), 0.5**0.5]])
    for odd in (math.nan, math.inf):
        found = after([[1.0, 2.0], [3.0, 5.0]], [[odd, 1.0], [0.0, 0.0]])
        assert np.isnan(found).tolist() == [[True, True], [False, False]]
        assert np.isnan(after([1.0, 2.0], [odd, 1.0])).tolist() == [True, False]


# --- the referee ----------------------------------------------------------------------------------

PLAIN = Edited(
    "nero",
    """
def update(w, g, state, *, lr, beta):
    t, n, matrix = w.dtype.type, state.get("step", 0) + 1, w.ndim > 1
    if w.size == 0:
        return w, state
    x, y = (np.reshape(a, (a.shape[0], -1) if matrix else (-1, 1)).astype(float) for a in (w, g))
    length = lambda a: np.sqrt(np.sum(a * a, axis=1, keepdims=True))
    project = lambda a: (a - a.mean(axis=1, keepdims=True)) if matrix else a
    whole = lambda a: a / np.where(length(a) > 0, length(a), 1) if matrix else a
    fresh = state
    s = np.mean(length(x))
    s = state.get("scale", s if s > 0 else 0.01)
    v = np.reshape(state.get("exp_avg_sq", 0 * w), x.shape).astype(float)
    q = length(y) ** 2
    v = beta * v + (1 - beta) * q
    vh = v / (1 - beta**n)
    u = y / np.where(vh == 0, 1, np.sqrt(vh))
    size = np.where(length(x) > 0, length(x), s) if matrix else s
    x = x - lr * size * u
    x = whole(project(x))
    return x.astype(w.dtype).reshape(w.shape), {"exp_avg_sq": v, "scale": s, "step": n}
""",
)
SIZE = "size = np.where(length(x) > 0, length(x), s) if matrix else s"
LAST = "x = whole(project(x))"
GUARDED = "np.where(vh == 0, 1, np.sqrt(vh))"
WHOLE = "a / np.where(length(a) > 0, length(a), 1) if matrix else a"
AUTHORS = {
    SIZE: "size = s",
    "u = y / np.where(vh == 0, 1, np.sqrt(vh))": "u = np.where(y == 0, y, y / np.sqrt(vh))",
    WHOLE: "a / length(a) if matrix else a",
    "s if s > 0 else 0.01": "s if s != 0 else 0.01",
}
DIALECTS: dict[str, dict[str, str]] = {
    "published": {},
    "jxbz/nero": {**AUTHORS, "fresh = state": "x = whole(project(x - 0)) if n == 1 else x"},
    "constraints=False": {**AUTHORS, LAST: ""},
    "kozistr": {
        "fresh = state": "x = whole(project(x - 0)) if n == 1 else x",
        SIZE: "size = s",
        GUARDED: "(np.sqrt(vh) + 1e-8)",
        WHOLE: "a / (length(a) + 1e-8) if matrix else a",
    },
}


@pytest.mark.parametrize("name", DIALECTS)
def test_dialects_are_found(name: str) -> None:
    assert named(PLAIN.found(DIALECTS[name])) == (name, {}, ())


def test_every_dialect_has_an_implementation() -> None:
    assert set(DIALECTS) == {d.name for d in RULES["nero"].dialects}


@pytest.mark.parametrize(
    ("clause", "how", "edits"),
    [
        ("mean", "of norms", {"q = length(y) ** 2": "q = length(y)", "np.sqrt(vh)": "vh"}),
        ("mean", "of squares, without weight", {"(1 - beta) * q": "q"}),
        ("bias correction", "none", {"v / (1 - beta**n)": "v"}),
        ("size", "initial", {SIZE: "size = s"}),
        ("size", "one", {SIZE: "size = 1.0"}),
        ("zero size", "zero", {"s if s > 0 else 0.01": "s"}),
        ("zero size", "one", {"else 0.01": "else 1.0"}),
        ("projection", "normal", {LAST: "x = whole(x)"}),
        ("projection", "centred", {LAST: "x = project(x)"}),
        ("projection", "normal, then centred", {LAST: "x = project(whole(x))"}),
        ("projection", "none", {LAST: ""}),
        ("vectors", "one neuron", {
            "q = length(y) ** 2": "q = length(y) ** 2 if matrix else np.sum(y * y) + 0 * y"
        }),
        ("epsilon", "1e-8", {"np.sqrt(vh))": "np.sqrt(vh) + 1e-8)"}),
        ("norm of", "tensor", {
            "q = length(y) ** 2": "q = np.sum(y * y) + 0 * y if matrix else y * y",
            SIZE: "size = np.sqrt(np.sum(x * x)) if matrix else s; size = size if size > 0 else s",
            "np.mean(length(x))": "np.sqrt(np.sum(x * x)) if matrix else np.mean(length(x))",
        }),
        ("direction", "ascent", {"x - lr * size": "x + lr * size"}),
        ("state", "lost", {'{"exp_avg_sq": v, "scale": s, "step": n}': "{}"}),
    ],
)  # fmt: skip
def test_planted_faults_are_found(clause: str, how: str, edits: dict[str, str]) -> None:
    assert PLAIN.found(edits).choices == {clause: how}


@pytest.mark.parametrize(
    "edits", [{"x - lr * size": "x - 1.01 * lr * size"}, {"v / (1 - beta**n)": "v / (1 - beta)"}]
)
def test_a_fault_that_no_clause_names_is_refused(edits: dict[str, str]) -> None:
    assert PLAIN.found(edits).kind not in ("published", "dialect")
