"""How far apart two networks are: deep relative trust and its relatives.

before, after: two sets of parameters, dicts of arrays of the same names and shapes, each array a
layer l = 1 .. L. r: relative perturbations by name, r_l = |dW_l| / |W_l|, 0-d float64;
dW_l = after_l - before_l and |.| the Frobenius norm (`npdrt.optim.norm`). But for the checks,
everything here works on any array library and inside a recorded program, never looks at a value,
and returns 0-d float64 arrays. Distances are exactly 0 where nothing moved.

Source: Bernstein et al. 2020; v2 is the NeurIPS version, v1 the first, whose distances are
squared.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import numpy as np

from npdrt.arrays import Array, Params, namespace, quiet, to_host
from npdrt.errors import Error
from npdrt.optim.norm import norm
from npdrt.plain import several


def weights(params: Params) -> Params:
    """The layers of the papers: the arrays of two or more dimensions, in order.

    The papers' networks are matrices and nothing else (v2, Definition 1), so biases and gains are
    left out; a convolution kernel counts as one matrix. The optimizers take every array for a
    layer; so do the distances below, with whatever dict they get: give them `params` itself to
    count biases too.
    """
    return {name: w for name, w in params.items() if len(w.shape) >= 2}


def check_same_shapes(before: Params, after: Params) -> None:
    """Raise `Error` unless both have the same names, in one order, and the same shapes.

    Reads no values, so that recorded programs may call it.
    """
    if not before:
        raise Error("distance: got no layers; pass at least one array")
    if list(before) != list(after):
        names = several(sorted(set(before) ^ set(after))) or "the order of their names"
        raise Error(
            f"distance: the layers before and after differ in {names}; both must be of one model"
        )
    for name, w in before.items():
        shapes = tuple(w.shape), tuple(after[name].shape)
        if shapes[0] != shapes[1]:
            raise Error(
                f"distance: {name} has shape {shapes[0]} before and {shapes[1]} after; both "
                "must be of one model"
            )


def check_same_layers(before: Params, after: Params) -> None:
    """`check_same_shapes`, and raise `Error` where a layer before has a norm that is 0 or not
    finite, to which nothing can be relative.

    Apart from the distances because it reads values: on a GPU it waits for the device.
    """
    check_same_shapes(before, after)
    for name, w in before.items():
        size = float(to_host(safe_norm(w)))
        if not 0 < size < math.inf:
            raise Error(
                f"distance: a change relative to {name}, whose norm is {size:g}; it must be above "
                "0 and finite: leave this layer out, or start from another step"
            )


def relative_perturbations(before: Params, after: Params) -> Params:
    """r_l = |after_l - before_l| / |before_l| of every array, by name (v1 and v2, Theorem 1).

    The difference is taken in float64. An array that stays gives exactly 0, a zero array that
    moves gives inf; `check_same_layers` refuses zero arrays beforehand. NaN gives NaN.
    """
    with quiet():
        return {n: _quotient(_change(w, after[n]), safe_norm(w)) for n, w in before.items()}


def safe_norm(x: Array) -> Array:
    """`npdrt.optim.norm`, to the bit, where no square over- or underflows; else the norm of
    x / max|x| times max|x|. Any real array; 0-d float64."""
    xp = namespace(x)
    x = xp.asarray(x, dtype=xp.float64)
    if math.prod(x.shape) == 0:
        return norm(x)
    with quiet():
        plain, largest = norm(x), xp.max(xp.abs(x))
        usable = (largest > 0) & (largest < math.inf)
        divisor = xp.where(usable, largest, 1.0)
        safe = (plain > 1e-140) & (plain < 1e150)
        return xp.where(safe, plain, norm(x / divisor) * divisor)


def _change(before: Array, after: Array) -> Array:
    """|after - before|, subtracted in float64."""
    xp = namespace(before, after)
    return safe_norm(xp.asarray(after, dtype=xp.float64) - xp.asarray(before, dtype=xp.float64))


def _quotient(change: Array, size: Array) -> Array:
    """change / size; over a size of 0: 0 for no change, else inf."""
    xp, zero = namespace(change, size), size == 0
    quotient = change / xp.where(zero, 1.0, size)
    return xp.where(zero & (change > 0), math.inf, quotient)


def _stack(r: Params) -> Array:
    """The values of r as one float64 array of shape (L,)."""
    if not r:
        raise Error("distance: got no layers; pass the relative perturbation of at least one")
    return namespace(*r.values()).stack(list(r.values()))


def log_deep_relative_trust(r: Params) -> Array:
    """log prod_l (1 + r_l) = sum_l log(1 + r_l), which stays finite in deep networks.

    The log of 1 + `deep_relative_trust`.
    """
    sizes = _stack(r)
    xp = namespace(sizes)
    return xp.sum(xp.log1p(sizes))


def deep_relative_trust(r: Params) -> Array:
    """prod_l (1 + r_l) - 1 (v2, Theorem 1 and modelling assumption 1).

    Computed as expm1(sum_l log1p(r_l)), so that small r do not cancel; inf where it exceeds
    1.8e308: see `log_deep_relative_trust`.
    """
    return _expm1(log_deep_relative_trust(r))


def log_squared_deep_relative_trust(r: Params) -> Array:
    """log prod_l (1 + r_l^2), the log of 1 + `squared_deep_relative_trust`."""
    sizes = _stack(r)
    xp = namespace(sizes)
    with quiet():
        logs = xp.log1p(sizes * sizes)
        return xp.sum(xp.where(sizes > 1e150, 2.0 * xp.log(sizes), logs))


def squared_deep_relative_trust(r: Params) -> Array:
    """D = prod_l (1 + r_l^2) - 1 (v1, Definition 2); not the square of `deep_relative_trust`.

    Computed as expm1(sum_l log1p(r_l^2)).
    """
    return _expm1(log_squared_deep_relative_trust(r))


def _expm1(log: Array) -> Array:
    with quiet():
        return namespace(log).expm1(log)


def euclidean_trust(before: Params, after: Params) -> Array:
    """D_E = sum_l |dW_l|^2 (v1, Definition 1): the trust that gradient descent assumes."""
    with quiet():
        changes = _stack({name: _change(w, after[name]) for name, w in before.items()})
        return namespace(changes).sum(changes * changes)


def log_surrogate_trust(r: Params) -> Array:
    """log of `surrogate_trust`, a log-sum-exp of 2 L log r_l; -inf where nothing moved."""
    sizes = _stack(r)
    xp, depth = namespace(sizes), sizes.shape[0]
    with quiet():
        powers = 2.0 * depth * xp.log(sizes)
        peak = xp.max(powers)
        peak = xp.where(xp.isfinite(peak), peak, 0.0)
        return peak + xp.log(xp.sum(xp.exp(powers - peak)) / depth)


def surrogate_trust(r: Params) -> Array:
    """D' = (1/L) sum_l r_l^(2L), which decouples the layers (v1, Definition 4).

    Neither an upper nor a lower bound of D (`squared_deep_relative_trust`): for L = 2, r = (2, 0)
    gives D' = 8 > D = 4, and r = (1, 1) gives D' = 1 < D = 3.
    """
    log = log_surrogate_trust(r)
    with quiet():
        return namespace(log).exp(log)


def surrogate_ratio(eta: float | Array, depth: int) -> Array:
    """D / D' of `depth` layers that all have r_l = eta > 0 (v1, section 5 and Figure 3).

        (1 + eta^-2)^L - eta^-2L = (1 + eta^-2)^L [1 - (1 + eta^2)^-L]

    eta: a number, or a float64 array of any shape. The form on the right does not cancel. The
    ratio tends to 1, as v1 says, but only for eta^2 much larger than L: it is 1 + L / eta^2 + ...
    for L >= 2. inf where it exceeds 1.8e308; NaN for eta 0.

    Raises `Error` for depth < 1.
    """
    check_depth(depth)
    xp, eta = numbers("surrogate_ratio", eta)
    with quiet():
        square, log = eta * eta, 2.0 * xp.log(eta)
        tiny = (
            eta < 1e-150
        )  # there log(1 + 1 / eta^2) is -2 log eta, and (1 + eta^2)^L - 1 is L eta^2
        up = xp.where(tiny, -log, xp.log1p(1.0 / square))
        loss = xp.log(-xp.expm1(-depth * xp.log1p(square)))
        return xp.exp(depth * up + xp.where(tiny, math.log(depth) + log, loss))


def check_depth(depth: int) -> None:
    """Raise `Error` unless L, a number of weight matrices, is an integer >= 1."""
    try:
        found = operator.index(depth)
    except TypeError:
        found = 0
    if found < 1:
        raise Error(
            f"depth must be at least 1, the number of weight matrices, an integer; got {depth!r}"
        )


def numbers(name: str, values: Any) -> tuple[Any, Array]:
    """The array library and float64 array of numbers given as Python's, NumPy's or an array."""
    try:
        given = hasattr(values, "dtype") and not isinstance(values, np.generic)
        array = values if given else np.asarray(values)
        xp = namespace(array)
        return xp, xp.asarray(array, dtype=xp.float64)
    except (TypeError, ValueError) as error:
        raise Error(f"{name}: expected a number or an array of numbers; got {values!r}") from error
