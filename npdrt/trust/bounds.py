"""The theorems of Bernstein et al. 2020 as numbers: each bound, what it bounds, and whether it may.

b_l = beta_l / alpha_l of layer l's phi, kappa a condition number, n_l the width of layer l,
nbar_l = min(n_l, n_{l-1}), r_l = |dW_l|_F / |W_l|_F. Every constant is multiplied up in logs, so
that deep networks give a finite `log_value` where `value` overflows. v2 is the NeurIPS version,
v1 the first; where each holds, with proofs and counterexamples, is in docs/theory.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np

from npdrt.arrays import Array, quiet, to_host
from npdrt.errors import Error
from npdrt.optim.norm import norm
from npdrt.trust.net import Net
from npdrt.trust.spectra import Host, condition_number


@dataclass(frozen=True)
class Bound:
    """One inequality for one pair of networks: measured <= value where guaranteed.

    name, source: the statement. ours: not printed in the papers, proved in docs/theory.md.
    value, log_value: the right side and its log; inf where a constant is infinite. measured: the
    left side at the input that was given (None without one; NaN for 0/0 and where the network
    overflows); v1's are squares.
    holds_assumptions: what the statement needs, printed or not, and whether it is so. guaranteed:
    all of it is. layer: l of a layer-to-output Jacobian, else None.
    """

    name: str
    source: str
    ours: bool
    log_value: float
    value: float
    measured: float | None
    holds_assumptions: dict[str, bool]
    guaranteed: bool
    layer: int | None = None


def is_tall(widths: Sequence[int]) -> bool:
    """n_0 <= n_1 <= ... <= n_L: no layer contracts; what a) needs and the papers do not print."""
    return all(below <= above for below, above in pairwise(widths))


def is_valley(widths: Sequence[int]) -> bool:
    """The widths fall, then rise (or only one of the two): what b) needs."""
    bottom = _bottom(widths)
    return is_tall(widths[bottom:]) and is_tall(widths[bottom::-1])


def _bottom(widths: Sequence[int]) -> int:
    return min(range(len(widths)), key=widths.__getitem__)


@dataclass(frozen=True, eq=False)
class Pair:
    """Two networks of one architecture, and what every bound needs of them, computed once.

    before, after: W and W~ = W + dW. All arrays have one number a layer.
    """

    before: Net
    after: Net

    def __post_init__(self) -> None:
        a, b = self.before, self.after
        if a.widths != b.widths:
            raise Error(f"Pair: widths {a.widths} and {b.widths}; give two networks of one shape")
        kinds = [(n.slope, n.slope_above, n.output_nonlinearity) for n in (a, b)]
        if kinds[0] != kinds[1]:
            raise Error(f"Pair: nonlinearities {kinds[0]} and {kinds[1]}; give both networks one")

    @property
    def widths(self) -> tuple[int, ...]:
        """n_0, ..., n_L."""
        return self.before.widths

    @cached_property
    def changes(self) -> list[Host]:
        """dW_1 .. dW_L."""
        with quiet():
            return [w2 - w1 for w1, w2 in zip(self.before.weights, self.after.weights, strict=True)]

    @cached_property
    def relative(self) -> Host:
        """r_l."""
        weights = zip(self.before.weights, self.after.weights, strict=True)
        return np.array([_relative(w1, w2) for w1, w2 in weights])

    @cached_property
    def kappa(self) -> Host:
        """kappa(W_l), kappa(W~_l), kappa(dW_l), shape (3, L); 1 for dW_l = 0, which has none."""
        changes = [condition_number(d) if np.any(d) else 1.0 for d in self.changes]
        nets = (self.before, self.after)
        return np.array([*([condition_number(w) for w in n.weights] for n in nets), changes])

    @cached_property
    def gain(self) -> Host:
        """log b_l; inf where alpha = 0."""
        pairs = [self.before.transmission(n + 1) for n in range(self.before.depth)]
        return np.array([math.log(beta / alpha) if alpha else math.inf for alpha, beta in pairs])

    def function_change(self, x: Array | None) -> float | None:
        """|f~(x) - f(x)| / |f(x)|."""
        return None if x is None else _relative(self.before(x), self.after(x))

    def jacobian_changes(self, x: Array | None) -> list[float | None]:
        """|J~_l - J_l|_F / |J_l|_F for l = 0 .. L."""
        if x is None:
            return [None] * len(self.widths)
        jacobians = zip(self.before.jacobians(x), self.after.jacobians(x), strict=True)
        return [_relative(j1, j2) for j1, j2 in jacobians]


def _relative(before: Host, after: Host) -> float:
    """|after - before| / |before|, scaled so that no square overflows or vanishes."""
    with quiet():
        scale = np.max(np.abs(before)) or 1.0
        return float(np.divide(norm((after - before) / scale), norm(before / scale)))


def _log_excess(u: float) -> float:
    """log(e^u - 1), u >= 0, without cancellation or overflow."""
    with quiet():
        return float(u + np.log(-np.expm1(-u)))


def _times(log_constant: float, log_trust: float) -> float:
    """The log of a product; inf where the constant is, whatever the trust."""
    return log_constant if log_constant == math.inf else log_constant + log_trust


def _make(
    name: str,
    log_value: float,
    measured: float | None,
    holds: dict[str, bool],
    layer: int | None = None,
) -> Bound:
    with quiet():
        value = float(np.exp(log_value))
    ours = name.startswith("ours")
    source = "docs/theory.md" if ours else f"Bernstein et al. 2020, {name}"
    return Bound(name, source, ours, log_value, value, measured, holds, all(holds.values()), layer)


def _assumptions(pair: Pair, kappas: Host) -> dict[str, bool]:
    return {
        "transmission (alpha > 0)": bool(np.all(np.isfinite(pair.gain))),
        "conditioning (kappa finite)": bool(np.all(np.isfinite(kappas))),
    }


# --- the function: a) ------------------------------------------------------------------------


def _function(pair: Pair, x: Array | None, kappas: Host) -> dict[str, bool]:
    """What a bound on the function needs."""
    biases = (*pair.before.biases, *pair.after.biases)
    return {
        **_assumptions(pair, kappas),
        "phi(0) = 0": True,  # as in every Net
        "x is not 0": x is None or bool(np.any(to_host(x))),
        "no bias": not any(np.any(b) for b in biases),
        "tall (not printed)": is_tall(pair.widths),
    }


def _trust(r: Host) -> float:
    return _log_excess(float(np.sum(np.log1p(r))))


def theorem_1a(pair: Pair, x: Array | None = None) -> Bound:
    """v2, Theorem 1 a), as printed.

        |f~(x) - f(x)| / |f(x)| <= (prod_l b_l kappa^2) [prod_l (1 + r_l) - 1]

    kappa: the largest condition number of all W_l, W~_l, dW_l (dW_l = 0 has none and is left
    out). Holds for tall networks only, which the paper does not say. x: one input (n_0,).
    """
    log_constant = float(np.sum(pair.gain + 2.0 * np.log(np.max(pair.kappa))))
    log_value = _times(log_constant, _trust(pair.relative))
    holds = _function(pair, x, pair.kappa)
    return _make("v2, Theorem 1 a)", log_value, pair.function_change(x), holds)


def without_perturbed(pair: Pair, x: Array | None = None) -> Bound:
    """Ours: `theorem_1a` with kappa over W_l and dW_l only; W~_l need not be conditioned."""
    kappas = pair.kappa[[0, 2]]
    log_constant = float(np.sum(pair.gain + 2.0 * np.log(np.max(kappas))))
    log_value = _times(log_constant, _trust(pair.relative))
    holds = _function(pair, x, kappas)
    return _make("ours, a) without W~", log_value, pair.function_change(x), holds)


def unconditional(pair: Pair, x: Array | None = None) -> Bound:
    """Ours: asks nothing of dW_l or W~_l, which in training have rank 1 or near it.

        |f~(x) - f(x)| / |f(x)| <= prod_l [b_l sqrt(nbar_l) kappa(W_l)] [prod_l (1 + r_l) - 1]

    Holds for tall networks.
    """
    log_constant = float(np.sum(pair.gain + _width_constants(pair)))
    log_value = _times(log_constant, _trust(pair.relative))
    holds = _function(pair, x, pair.kappa[0])
    return _make("ours, a) unconditional", log_value, pair.function_change(x), holds)


def _width_constants(pair: Pair) -> Host:
    """log(sqrt(nbar_l) kappa(W_l))."""
    nbar = [min(sizes) for sizes in pairwise(pair.widths)]
    return np.asarray(0.5 * np.log(nbar) + np.log(pair.kappa[0]))


def theorem_1_v1(pair: Pair, x: Array | None = None) -> Bound:
    """v1, Theorem 1, as printed, for squares.

        |f~(x) - f(x)|^2 / |f(x)|^2 <= prod_l (2 b_l^2 n* kappa^2) [prod_l (1 + r_l^2) - 1]

    b_l^2 is v1's beta / alpha, which are squares. n* = max of n_1 .. n_L; kappa over
    the W_l only. Holds for tall networks only, which the paper does not say.
    """
    log_value = _times(v1_log_constant(pair), _trust(pair.relative**2))
    change = pair.function_change(x)
    holds = _function(pair, x, pair.kappa[0])
    return _make("v1, Theorem 1", log_value, None if change is None else change**2, holds)


def v1_log_constant(pair: Pair) -> float:
    """log prod_l [2 b_l^2 n* kappa^2], the constant of v1's Theorem 1 and Lemma 2."""
    kappa, widest = np.max(pair.kappa[0]), max(pair.widths[1:])
    return float(np.sum(2.0 * (pair.gain + np.log(kappa)) + np.log(2.0 * widest)))


# --- the layer-to-output Jacobians: b) -------------------------------------------------------


def _jacobian_bounds(
    pair: Pair,
    x: Array | None,
    name: str,
    log_value: Callable[[int], float],
    kappas: Host,
    power: int = 1,
) -> list[Bound]:
    """The bound for J_l, l = 0 .. L; J_L is the identity, which never changes."""
    bounds = []
    for layer, change in enumerate(pair.jacobian_changes(x)):
        last = layer == pair.before.depth
        holds = _assumptions(pair, kappas[:, layer:]) | {
            "valley (not printed)": is_valley(pair.widths[layer:])
        }
        log = -math.inf if last else log_value(layer)
        bounds.append(_make(name, log, None if change is None else change**power, holds, layer))
    return bounds


def theorem_1b(pair: Pair, x: Array | None = None) -> list[Bound]:
    """v2, Theorem 1 b), as printed, for l = 0 .. L.

        |J~_l - J_l|_F / |J_l|_F <= (prod_{k>l} b_k kappa^2) [prod_{k>l} b_k (1 + r_k) - 1]

    J_l = df/dh_l. kappa: the largest condition number of W_k, W~_k, dW_k in the layers k > l,
    the network whose theorem this is. Holds where the widths n_l .. n_L fall, then rise; needs
    neither phi(0) = 0 nor x != 0, and biases do not matter. At dW = 0 it is not 0 for b > 1.
    """

    def log_value(layer: int) -> float:
        gain, kappa = pair.gain[layer:], np.max(pair.kappa[:, layer:])
        trust = _log_excess(float(np.sum(gain + np.log1p(pair.relative[layer:]))))
        return _times(float(np.sum(gain + 2.0 * np.log(kappa))), trust)

    return _jacobian_bounds(pair, x, "v2, Theorem 1 b)", log_value, pair.kappa)


def theorem_2_v1(pair: Pair, x: Array | None = None) -> list[Bound]:
    """v1, Theorem 2, as printed, for squares and l = 0 .. L (k in the paper).

        |J~_l - J_l|_F^2 / |J_l|_F^2
            <= prod_{k>l} (2 n* b_k kappa)^2 [prod_{k>l} C_k (1 + r_k^2) - 1],
        C_k = 1 + (b_k - 1)^2

    b is the square root of v1's beta / alpha. n* = max and kappa = largest kappa(W) of the
    layers k > l. Holds where the widths n_l .. n_L fall, then rise.
    """

    def log_value(layer: int) -> float:
        gain, kappa, widest = (
            pair.gain[layer:],
            np.max(pair.kappa[0, layer:]),
            max(pair.widths[layer + 1 :]),
        )
        with quiet():
            jumps = np.log1p(np.expm1(gain) ** 2)
        trust = _log_excess(float(np.sum(jumps + np.log1p(pair.relative[layer:] ** 2))))
        return _times(float(np.sum(2.0 * (gain + np.log(2.0 * widest * kappa)))), trust)

    return _jacobian_bounds(pair, x, "v1, Theorem 2", log_value, pair.kappa[:1], power=2)


def jacobian_recursion(pair: Pair, x: Array | None = None) -> list[Bound]:
    """Ours: at most `theorem_1b`, and asks nothing of dW_l or W~_l; for l = 0 .. L.

        D <- c_k [(b_k (1 + r_k) - 1) (1 + D) + b_k D],  D = 0 at first
        c_k = min(kappa_k^2, sqrt(nbar_k) kappa(W_k)),  kappa_k over W_k and dW_k

    over the layers k > l from where n_l .. n_L is narrowest outwards: first the layers before it,
    last to first, then those behind it, first to last.
    """
    kappas = np.log(np.maximum(pair.kappa[0], pair.kappa[2]))
    constants = np.minimum(2.0 * kappas, _width_constants(pair))
    jumps = [_log_excess(u) for u in pair.gain + np.log1p(pair.relative)]

    def log_value(layer: int) -> float:
        if not np.all(np.isfinite(constants[layer:] + pair.gain[layer:])):
            return math.inf
        bottom, log_d = layer + _bottom(pair.widths[layer:]), -math.inf
        for k in (*reversed(range(layer, bottom)), *range(bottom, pair.before.depth)):
            jump = jumps[k] + np.logaddexp(0.0, log_d)
            log_d = constants[k] + np.logaddexp(jump, pair.gain[k] + log_d)
        return float(log_d)

    return _jacobian_bounds(pair, x, "ours, b) recursion", log_value, pair.kappa[:1])


def all_bounds(pair: Pair, x: Array | None = None) -> list[Bound]:
    """Every bound of this file: those on the function, then those on J_0 .. J_L."""
    functions = (theorem_1a, without_perturbed, unconditional, theorem_1_v1)
    jacobians = (theorem_1b, theorem_2_v1, jacobian_recursion)
    return [f(pair, x) for f in functions] + [b for f in jacobians for b in f(pair, x)]
