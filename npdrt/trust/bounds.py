"""The theorems of Bernstein et al. 2020 as numbers: the bounds, and whether they are guaranteed.

b_l = beta_l / alpha_l of layer l's phi, kappa a condition number, n_l the width of layer l,
nbar_l = min(n_l, n_{l-1}), r_l = |dW_l|_F / |W_l|_F. v2 is the NeurIPS version, v1 the first; where
each holds, with proofs and counterexamples, is in docs/theory.md.

Every right side is a polynomial with positive coefficients, and is computed in logs, so that depth
and scale neither over- nor underflow. It is computed twice: from kappa, r and b as they came out,
and from the largest that they can be given their rounding errors. The second, with room for the
logs and for the left side's own rounding, is the bound that is returned; how far it lies above the
first is its `slack`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise

import numpy as np

from npdrt.arrays import Array, quiet
from npdrt.trust.pair import Pair, Terms, is_tall, is_valley, narrowest
from npdrt.trust.scaled import Host, Size, log_slack, relative, size


@dataclass(frozen=True)
class Bound:
    """One inequality for one pair of networks: measured <= value where guaranteed, in float64.

    name, source: the statement. ours: not printed in the papers, proved in docs/theory.md.
    value, log_value: the right side and its log, rounded up by `slack`; inf where a constant is
    infinite. measured, log_measured: the left side at the input that was given (None without one;
    NaN for 0/0 and where something is not finite); v1's are squares.
    slack: by how much of itself the right side was rounded up, for all rounding on both sides.
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
    log_measured: float | None = None
    slack: float = 0.0


def log_excess(logs: Host) -> Host:
    """log(prod_{k>l} (1 + e^a_k) - 1) for l = 0 .. L, multiplied up layer by layer, so that nothing
    cancels; -inf, the log of 0, at l = L."""
    found = [-math.inf]
    for a in reversed(logs.tolist()):
        found.append(_log_sum(found[-1] + _log_sum(0.0, a), a))
    return np.array(found[::-1])


def _log_sum(a: float, b: float) -> float:
    """log(e^a + e^b)."""
    small, large = (a, b) if a < b else (b, a)
    if small == -math.inf or large == math.inf:
        return large
    return large + math.log1p(math.exp(small - large))


def _times(log_constants: Host, log_trusts: Host) -> Host:
    """The logs of products; inf if the constant is infinite, even if the trust is 0."""
    infinite = log_constants == math.inf
    return np.asarray(np.where(infinite, math.inf, log_constants + log_trusts))


def _from(values: Host, gather: np.ufunc) -> Host:
    """A sum or maximum over the layers k > l, for l = 0 .. L - 1."""
    return np.asarray(gather.accumulate(values[::-1])[::-1])


Formula = Callable[[Terms], Host]  # the logs of the right side for l = 0 .. L


def _rights(name: str, pair: Pair, formula: Formula, power: int) -> list[tuple[Size, float]]:
    """The right sides for l = 0 .. L, rounded up, and their slacks, which are logs."""
    if name not in pair.rights:
        with quiet():
            logs, largest = formula(pair.terms).tolist(), formula(pair.largest_terms).tolist()
        slacks = [
            log_slack(log, high, power * rounding)
            for log, high, rounding in zip(logs, largest, pair.slacks, strict=True)
        ]
        pair.rights[name] = [(size(log).up(s), s) for log, s in zip(logs, slacks, strict=True)]
    return pair.rights[name]


def _make(
    name: str,
    right: tuple[Size, float],
    measured: Size | None,
    holds: dict[str, bool],
    layer: int | None = None,
    power: int = 1,
) -> Bound:
    """The bound with this right side and slack. power: 2 if it speaks of squares."""
    bound, slack = right
    if measured is not None and power == 2:
        measured = measured.squared()
    left, log_left = measured or (None, None)
    holds = holds | {"rounding (slack < 1)": relative(slack) < 1.0}
    ours = name.startswith("ours")
    return Bound(
        name=name,
        source="docs/theory.md" if ours else f"Bernstein et al. 2020, {name}",
        ours=ours,
        log_value=bound.log,
        value=bound.value,
        measured=left,
        holds_assumptions=holds,
        guaranteed=all(holds.values()) and not any(map(math.isnan, (bound.log, left or 0.0))),
        layer=layer,
        log_measured=log_left,
        slack=relative(slack),
    )


def _assumptions(pair: Pair, x: Array | None, layer: int, rows: slice) -> dict[str, bool]:
    """The assumptions of every bound on the layers above `layer`; rows: of kappa."""
    gain, kappas = pair.gain[layer:], pair.kappa[rows, layer:]
    inputs_finite = x is None or bool(np.all(np.isfinite(pair.before.input(x))))
    return {
        "transmission (alpha > 0)": bool(np.all(np.isfinite(gain))),
        "conditioning (kappa finite)": bool(np.all(np.isfinite(kappas))),
        "finite numbers": pair.finite and inputs_finite,
    }


# --- the function: a) ------------------------------------------------------------------------


def _function(
    name: str, pair: Pair, x: Array | None, formula: Formula, rows: slice, power: int = 1
) -> Bound:
    """A bound on the function, with its assumptions."""
    biases = (*pair.before.biases, *pair.after.biases)
    holds = {
        **_assumptions(pair, x, 0, rows),
        "phi(0) = 0": True,  # as in every Net
        "x is not 0": x is None or bool(np.any(pair.before.input(x))),
        "no bias": not any(np.any(b) for b in biases),
        "tall (not printed)": is_tall(pair.widths),
    }
    right = _rights(name, pair, formula, power)[0]
    return _make(name, right, pair.function_change(x), holds, power=power)


def _printed_constant(terms: Terms, rows: slice = slice(3)) -> Host:
    """log prod_{k>l} b_k kappa^2, kappa the largest of the layers k > l, for l = 0 .. L."""
    kappas = _from(np.max(terms.kappa[rows], axis=0), np.maximum)
    return _constant(terms.gain, 2.0 * kappas)


def _constant(factors: Host, equal: Host) -> Host:
    """log prod_{k>l} f_k e_l: a factor of its own for every layer, and one for all; l = 0 .. L."""
    count = np.arange(len(factors), 0, -1)
    return np.append(_from(factors, np.add) + count * equal, 0.0)


def theorem_1a(pair: Pair, x: Array | None = None) -> Bound:
    """v2, Theorem 1 a), as printed.

        |f~(x) - f(x)| / |f(x)| <= (prod_l b_l kappa^2) [prod_l (1 + r_l) - 1]

    kappa: the largest condition number of all W_l, W~_l, dW_l (dW_l = 0 has none and is left
    out). Holds for tall networks only, which the paper does not say. x: one input (n_0,).
    """

    def formula(terms: Terms) -> Host:
        return _times(_printed_constant(terms), log_excess(terms.change))

    return _function("v2, Theorem 1 a)", pair, x, formula, slice(3))


def without_perturbed(pair: Pair, x: Array | None = None) -> Bound:
    """Ours: `theorem_1a` with kappa over W_l and dW_l only; W~_l need not be conditioned."""

    def formula(terms: Terms) -> Host:
        return _times(_printed_constant(terms, slice(0, 3, 2)), log_excess(terms.change))

    return _function("ours, a) without W~", pair, x, formula, slice(0, 3, 2))


def unconditional(pair: Pair, x: Array | None = None) -> Bound:
    """Ours: asks nothing of dW_l or W~_l, which in training have rank 1 or near it.

        |f~(x) - f(x)| / |f(x)| <= prod_l [b_l sqrt(nbar_l) kappa(W_l)] [prod_l (1 + r_l) - 1]

    Holds for tall networks.
    """

    def formula(terms: Terms) -> Host:
        constant = _constant(terms.gain + _width_constants(pair, terms), np.zeros(1))
        return _times(constant, log_excess(terms.change))

    return _function("ours, a) unconditional", pair, x, formula, slice(1))


def _width_constants(pair: Pair, terms: Terms) -> Host:
    """log(sqrt(nbar_l) kappa(W_l))."""
    nbar = [min(sizes) for sizes in pairwise(pair.widths)]
    return np.asarray(0.5 * np.log(nbar) + terms.kappa[0])


def theorem_1_v1(pair: Pair, x: Array | None = None) -> Bound:
    """v1, Theorem 1, as printed, for squares.

        |f~(x) - f(x)|^2 / |f(x)|^2 <= prod_l (2 b_l^2 n* kappa^2) [prod_l (1 + r_l^2) - 1]

    b_l^2 is v1's beta / alpha, which are squares. n* = max of n_1 .. n_L; kappa over
    the W_l only. Holds for tall networks only, which the paper does not say.
    """

    def formula(terms: Terms) -> Host:
        return _times(v1_log_constant(pair, terms), log_excess(2.0 * terms.change))

    return _function("v1, Theorem 1", pair, x, formula, slice(1), power=2)


def v1_log_constant(pair: Pair, terms: Terms) -> Host:
    """log prod_{k>l} [2 b_k^2 n* kappa^2], of v1's Theorem 1 and Lemma 2; l = 0 .. L."""
    kappas = _from(terms.kappa[0], np.maximum)
    return _constant(2.0 * terms.gain, 2.0 * kappas + np.log(2.0 * _widest(pair)))


def _widest(pair: Pair) -> Host:
    """n*, the largest of n_{l+1} .. n_L, for l = 0 .. L - 1."""
    return _from(np.array(pair.widths[1:]), np.maximum)


# --- the layer-to-output Jacobians: b) -------------------------------------------------------


def _jacobian_bounds(
    pair: Pair,
    x: Array | None,
    name: str,
    formula: Formula,
    rows: slice,
    power: int = 1,
) -> list[Bound]:
    """The bound for J_l, l = 0 .. L; J_L is the identity, which never changes."""
    rights = _rights(name, pair, formula, power)
    both, bounds = zip(rights, pair.jacobian_changes(x), strict=True), []
    for layer, (right, change) in enumerate(both):
        holds = _assumptions(pair, x, layer, rows) | {
            "valley (not printed)": is_valley(pair.widths[layer:])
        }
        bounds.append(_make(name, right, change, holds, layer, power))
    return bounds


def theorem_1b(pair: Pair, x: Array | None = None) -> list[Bound]:
    """v2, Theorem 1 b), as printed, for l = 0 .. L.

        |J~_l - J_l|_F / |J_l|_F <= (prod_{k>l} b_k kappa^2) [prod_{k>l} b_k (1 + r_k) - 1]

    J_l = df/dh_l. kappa: the largest condition number of W_k, W~_k, dW_k in the layers k > l,
    the network whose theorem this is. Holds where the widths n_l .. n_L fall, then rise; needs
    neither phi(0) = 0 nor x != 0, and biases do not matter. At dW = 0 it is not 0 for b > 1.
    """

    def formula(terms: Terms) -> Host:
        return _times(_printed_constant(terms), log_excess(_jumps(terms)))

    return _jacobian_bounds(pair, x, "v2, Theorem 1 b)", formula, slice(3))


def _jumps(terms: Terms) -> Host:
    """log(b_k (1 + r_k) - 1), as (b_k - 1) + b_k r_k."""
    return np.asarray(np.logaddexp(terms.kink, terms.gain + terms.change))


def theorem_2_v1(pair: Pair, x: Array | None = None) -> list[Bound]:
    """v1, Theorem 2, as printed, for squares and l = 0 .. L (k in the paper).

        |J~_l - J_l|_F^2 / |J_l|_F^2
            <= prod_{k>l} (2 n* b_k kappa)^2 [prod_{k>l} C_k (1 + r_k^2) - 1],
        C_k = 1 + (b_k - 1)^2

    b is the square root of v1's beta / alpha. n* = max and kappa = largest kappa(W) of the
    layers k > l. Holds where the widths n_l .. n_L fall, then rise.
    """

    def formula(terms: Terms) -> Host:
        kinks = 2.0 * terms.kink
        jumps = np.logaddexp(kinks, np.logaddexp(0.0, kinks) + 2.0 * terms.change)
        equal = 2.0 * (np.log(2.0 * _widest(pair)) + _from(terms.kappa[0], np.maximum))
        return _times(_constant(2.0 * terms.gain, equal), log_excess(jumps))

    return _jacobian_bounds(pair, x, "v1, Theorem 2", formula, slice(1), power=2)


def jacobian_recursion(pair: Pair, x: Array | None = None) -> list[Bound]:
    """Ours: at most `theorem_1b`, and asks nothing of dW_l or W~_l; for l = 0 .. L.

        D <- c_k [(b_k (1 + r_k) - 1) (1 + D) + b_k D],  D = 0 at first
        c_k = min(kappa_k^2, sqrt(nbar_k) kappa(W_k)),  kappa_k over W_k and dW_k

    over the layers k > l from where n_l .. n_L is narrowest outwards: first the layers behind it,
    first to last, then those before it, last to first.
    """

    def formula(terms: Terms) -> Host:
        kappas = np.maximum(terms.kappa[0], terms.kappa[2])
        constants, jumps = np.minimum(2.0 * kappas, _width_constants(pair, terms)), _jumps(terms)
        steps = list(zip(constants, terms.gain, jumps, strict=True))
        found = [-math.inf]
        for layer in reversed(range(pair.before.depth)):
            if narrowest(pair.widths[layer:]) == 0:
                found.append(reduce(_grown, steps[layer:], -math.inf))
            else:
                found.append(_grown(found[-1], steps[layer]))
        return np.array(found[::-1])

    return _jacobian_bounds(pair, x, "ours, b) recursion", formula, slice(1))


def _grown(log_d: float, step: tuple[float, float, float]) -> float:
    """One step of the recursion, in logs."""
    constant, gain, jump = map(float, step)
    if not math.isfinite(constant + gain):
        return math.inf
    return constant + _log_sum(jump + _log_sum(0.0, log_d), gain + log_d)


def all_bounds(pair: Pair, x: Array | None = None) -> list[Bound]:
    """Every bound of this file: those on the function, then those on J_0 .. J_L."""
    functions = (theorem_1a, without_perturbed, unconditional, theorem_1_v1)
    jacobians = (theorem_1b, theorem_2_v1, jacobian_recursion)
    return [f(pair, x) for f in functions] + [b for f in jacobians for b in f(pair, x)]
