"""check_gradients: what it catches, its methods, and what it refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from backends import Backend
from test_autodiff import temporary

from npdrt import check_gradients, ops
from npdrt.errors import Diverged, Error

RNG = np.random.default_rng(7)

# --- rules that are wrong --------------------------------------------------------------------


def wrong_by_a_tenth_of_a_percent(x: Any) -> Any:
    return x * x, lambda g: g * 2.002 * x


def wrong_sign_at_a_small_scale(x: Any) -> Any:
    return 1e-8 * x * x, lambda g: -2e-8 * x * g


def wrong_in_one_coordinate(x: Any) -> Any:
    def vjp(g: Any) -> Any:
        out = 2 * x * g
        out[3000] *= 1.01
        return out

    return x * x, vjp


def nan_in_one_coordinate(x: Any) -> Any:
    def vjp(g: Any) -> Any:
        out = 2 * x * g
        out[1] = np.nan
        return out

    return x * x, vjp


def zero(x: Any) -> Any:
    return x * x, lambda g: 0 * g


@pytest.mark.parametrize("method", ["complex", "central"])
@pytest.mark.parametrize("directions", [None, 3])
@pytest.mark.parametrize(
    ("rule", "size"),
    [
        (wrong_by_a_tenth_of_a_percent, 5),
        (wrong_sign_at_a_small_scale, 5),
        (wrong_in_one_coordinate, 4096),
        (nan_in_one_coordinate, 4),
        (zero, 3),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_the_checker_catches(rule: Any, size: int, directions: int | None, method: str) -> None:
    params = {"x": RNG.uniform(1.0, 2.0, size)}
    with (
        temporary(rule) as planted,
        pytest.raises(Diverged, match="gradient check failed") as caught,
    ):
        check_gradients(
            lambda p: ops.sum(planted(p["x"])), params, method=method, directions=directions
        )
    if rule is wrong_in_one_coordinate and directions is None:
        assert "worst at x[3000]" in str(caught.value)
    assert caught.value.exit_code == 1


def test_a_nan_is_not_forgotten_for_what_follows() -> None:
    params = {"x": np.ones(3), "right": np.ones(2)}
    with temporary(nan_in_one_coordinate) as planted, pytest.raises(Diverged, match="error nan"):
        check_gradients(
            lambda p: ops.sum(planted(p["x"])) + ops.sum(p["right"] * p["right"]), params
        )


# --- check_gradients -------------------------------------------------------------------------


def smooth(p: Any, x: Any, y: Any) -> Any:
    return ops.softmax_cross_entropy(ops.tanh(ops.linear(x, p["w"], p["b"])), y)


def kinked(p: Any, x: Any, y: Any) -> Any:
    return ops.softmax_cross_entropy(ops.relu(ops.linear(x, p["w"], p["b"])), y)


PARAMS = {"w": RNG.standard_normal((3, 4)), "b": RNG.standard_normal(3)}
BATCH = RNG.standard_normal((5, 4)), np.array([0, 1, 2, 1, 0])


@pytest.mark.parametrize(
    ("function", "method", "label", "bound"),
    [
        (smooth, "auto", "complex step", 1e-13),
        (smooth, "complex", "complex step", 1e-13),
        (smooth, "central", "central differences", 1e-8),
        (kinked, "auto", "central differences", 1e-8),
    ],
)
def test_methods(function: Any, method: str, label: str, bound: float) -> None:
    found = check_gradients(function, PARAMS, *BATCH, method=method)
    assert found.method == label
    assert found.error <= bound
    assert found.coordinates == 15


def test_directions() -> None:
    found = check_gradients(smooth, PARAMS, *BATCH, directions=2)
    assert found.coordinates == 2
    assert found.worst.startswith("direction")
    assert found.error <= 1e-13


def test_single_precision_and_devices_are_checked_in_float64_on_the_host(backend: Backend) -> None:
    params = {name: backend.asarray(a.astype("float32")) for name, a in PARAMS.items()}
    x, y = (backend.asarray(a) for a in BATCH)
    buffers = {"scale": [backend.asarray(np.float32(2.0))]}

    def loss_fn(p: Any, batch: Any, buffers: Any) -> Any:
        assert p["w"].dtype.kind in "fc"
        assert buffers["scale"][0].dtype == np.float64
        return smooth(p, *batch) * buffers["scale"][0]

    assert check_gradients(loss_fn, params, (x, y), buffers).error <= 1e-13


def test_the_complex_step_needs_analytic_operations() -> None:
    with pytest.raises(Error, match="needs analytic operations; relu is not analytic; use method"):
        check_gradients(kinked, PARAMS, *BATCH, method="complex")


def test_unknown_method() -> None:
    with pytest.raises(Error, match="unknown method 'exact'; use auto, complex or central"):
        check_gradients(smooth, PARAMS, *BATCH, method="exact")


def test_tolerance() -> None:
    with pytest.raises(Diverged, match=r"central differences over 15 derivatives.*> 1e-16"):
        check_gradients(smooth, PARAMS, *BATCH, method="central", tolerance=1e-16)


def test_a_gradient_of_zero_is_right() -> None:
    assert check_gradients(lambda p: ops.sum(p["w"] * 0.0), {"w": np.ones(3)}).error == 0.0
