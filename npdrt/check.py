"""Check gradients against an independent derivative: the complex step or central differences."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from npdrt.arrays import Array, Params, quiet, to_host
from npdrt.autodiff import PRIMITIVES, Tensor, graph, value_and_grad
from npdrt.errors import Diverged, Error
from npdrt.random import Random

# The name of each method and the largest error that it accepts.
METHODS = {"complex": ("complex step", 1e-10), "central": ("central differences", 1e-6)}


@dataclass(frozen=True)
class GradientCheck:
    """The result of `check_gradients`.

    method: "complex step" or "central differences". error: max|difference| / max|reference| over
    the coordinates (or the direction) tried. worst: the parameter with the largest difference.
    coordinates: how many derivatives were compared.
    """

    method: str
    error: float
    worst: str
    coordinates: int


def check_gradients(
    function: Callable[..., Any],
    params: Params,
    *args: Any,
    method: str = "auto",
    directions: int | None = None,
    tolerance: float | None = None,
    seed: int = 0,
) -> GradientCheck:
    """Compare the gradient of `function(params, *args)` with an independent derivative.

    Everything runs in float64 on the host. method: "complex" (Im f(x + ih) / h, h = 1e-30, exact
    to rounding, needs every operation analytic), "central" ((f(x+h) - f(x-h)) / 2h, h = 1e-6,
    error about 1e-9 for parameters near 1), or "auto": complex if it is defined.
    directions: None compares every coordinate; n compares n random directions, for large nets.
    tolerance: largest accepted error, 1e-10 (complex) or 1e-6 (central) unless given; relative
    to the largest derivative, never widened by size.

    Raises `Diverged` with the worst parameter if the error is above the tolerance.
    """
    params = {name: _float64(value) for name, value in params.items()}
    args = _float64(args)
    method = _method(function, params, args, method)
    _, grads = value_and_grad(function)(params, *args)
    error, worst, count, largest = 0.0, "", 0, 0.0
    for name, direction in _directions(params, directions, seed):
        reference = _derivative(function, params, args, direction, method)
        found = sum(float(np.sum(grads[n] * d)) for n, d in direction.items())
        difference = abs(found - reference)
        if not difference <= error and not math.isnan(error):  # the first NaN stays
            error, worst = difference, name
        largest, count = max(largest, abs(reference)), count + 1
    error = error / largest if largest > 0 else error
    label, limit = METHODS[method]
    limit = limit if tolerance is None else tolerance
    if not error <= limit:
        raise Diverged(
            f"gradient check failed: {label} over {count} derivatives, relative error {error:.3g} "
            f"> {limit:.3g}, worst at {worst}"
        )
    return GradientCheck(label, error, worst, count)


def _float64(x: Any) -> Any:
    """`x` with every float array in it (in tuples, lists and dicts) as float64 on the host."""
    if isinstance(x, tuple | list):
        return getattr(type(x), "_make", type(x))(_float64(item) for item in x)
    if isinstance(x, dict):
        return {key: _float64(item) for key, item in x.items()}
    if not hasattr(x, "dtype"):
        return x
    host = to_host(x)
    return host.astype(np.float64) if host.dtype.kind == "f" else host


def _method(function: Callable[..., Any], params: Params, args: Any, method: str) -> str:
    """The method to use: an operation with kinks excludes the complex step."""
    if method not in ("auto", *METHODS):
        raise Error(f"check_gradients: unknown method {method!r}; use auto, complex or central")
    output = function({name: Tensor(value, name=name) for name, value in params.items()}, *args)
    used = {n.name for n in graph(output) if n.edges} if isinstance(output, Tensor) else set()
    kinked = sorted(name for name in used if not PRIMITIVES[name].analytic)  # type: ignore[attr-defined]
    if method == "complex" and kinked:
        raise Error(
            f"check_gradients: the complex step needs analytic operations; {', '.join(kinked)} "
            "is not analytic; use method='central'"
        )
    if method == "auto":
        return "central" if kinked else "complex"
    return method


def _directions(
    params: Params, count: int | None, seed: int
) -> Iterator[tuple[str, dict[str, Array]]]:
    """Unit vectors of every coordinate, or `count` random directions over all parameters."""
    if count is None:
        for name, value in params.items():
            for i in range(value.size):
                unit = np.zeros(value.size)
                unit[i] = 1.0
                yield f"{name}[{i}]", {name: unit.reshape(value.shape)}
        return
    stream = Random(seed, "check_gradients")
    for k in range(count):
        yield (
            f"direction {k}",
            {n: stream.of(n).at(k).normal(v.shape) for n, v in params.items()},
        )


def _derivative(
    function: Callable[..., Any],
    params: Params,
    args: tuple[Any, ...],
    direction: dict[str, Array],
    method: str,
) -> float:
    """The derivative of the function along `direction`."""

    def moved(step: complex) -> Any:
        shifted = {n: p + step * direction[n] if n in direction else p for n, p in params.items()}
        with quiet():
            return complex(function(shifted, *args))

    if method == "complex":
        return float(moved(1e-30j).imag / 1e-30)
    h = 1e-6
    return float((moved(h) - moved(-h)).real / (2 * h))
