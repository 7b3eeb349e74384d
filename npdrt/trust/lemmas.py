"""The lemmas under the theorems of Bernstein et al. 2020: both sides, and what each needs.

v2 is the NeurIPS version, v1 the first, whose lemmas speak of squared norms. |.| is the 2-norm of
all elements, kappa a condition number, nbar the smaller side of a matrix. Matrices are arrays of
any library; the arithmetic is float64 on the host. Proofs and counterexamples: docs/theory.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import reduce
from itertools import pairwise

import numpy as np

from npdrt.arrays import Array, quiet
from npdrt.errors import Error
from npdrt.optim.norm import norm
from npdrt.trust.bounds import Pair, is_valley, theorem_1_v1, v1_log_constant
from npdrt.trust.spectra import Host, condition_number, matrix


@dataclass(frozen=True)
class Inequality:
    """lhs <= rhs, where guaranteed: where everything in `holds_assumptions` holds."""

    name: str
    lhs: float
    rhs: float
    holds_assumptions: dict[str, bool] = field(default_factory=dict)

    @property
    def guaranteed(self) -> bool:
        """Whether every assumption, printed or not, holds."""
        return all(self.holds_assumptions.values())


def _square(a: Host) -> float:
    return float(norm(a)) ** 2


def _enough_rows(m: Host, kappa: float) -> dict[str, bool]:
    return {
        "conditioning (kappa finite)": math.isfinite(kappa),
        "rows >= columns (not printed)": m.shape[0] >= m.shape[1],
    }


def lemma_3(m: Array, perturbed: Array, x: Array, y: Array, *, ours: bool = False) -> Inequality:
    """v2, Lemma 3: |M~ X| / |M Y| <= c |M~| |X| / (|M| |Y|) for matrices M, M~ (n, m), Y not 0.

    As printed, c = kappa^2 with kappa the larger condition number of M and M~. ours: the best
    constant, c = sqrt[(1 + (nbar - 1) kappa^2) / (1 + (nbar - 1) / kappa^2)]. Both hold for
    n >= m, which the paper does not say, or for any shape where the columns of Y lie in the row
    space of M. X (m, p), Y (m, q).
    """
    a, b, x, y = map(matrix, (m, perturbed, x, y))
    kappa = max(condition_number(a), condition_number(b))
    rest = min(a.shape) - 1
    with quiet():
        sharp = np.sqrt(np.divide(1.0 + rest * kappa**2, 1.0 + rest / kappa**2))
        lhs = np.divide(norm(b @ x), norm(a @ y))
        rhs = (sharp if ours else kappa**2) * norm(b) * norm(x) / (norm(a) * norm(y))
    holds = _enough_rows(a, kappa) | {"Y is not 0": bool(norm(y) > 0)}
    return Inequality(
        "ours, Lemma 3 sharp" if ours else "v2, Lemma 3", float(lhs), float(rhs), holds
    )


def lemma_1_v1(m: Array, x: Array) -> tuple[Inequality, Inequality]:
    """v1, Lemma 1: `lemma_4_v1` for one vector x (n,)."""
    lower, upper = lemma_4_v1(m, x[:, None])
    names = "v1, Lemma 1, lower", "v1, Lemma 1, upper"
    return (
        Inequality(names[0], lower.lhs, lower.rhs, lower.holds_assumptions),
        Inequality(names[1], upper.lhs, upper.rhs),
    )


def lemma_4_v1(m: Array, x: Array) -> tuple[Inequality, Inequality]:
    """v1, Lemma 4: |M|^2 |X|^2 / (nbar kappa^2) <= |M X|^2 <= |M|^2 |X|^2, M (m, n), X (n, p).

    The second always holds, the first for m >= n, which the paper does not say.
    """
    a, b = matrix(m), matrix(x)
    kappa, product, sizes = condition_number(a), _square(a @ b), _square(a) * _square(b)
    return (
        Inequality(
            "v1, Lemma 4, lower", sizes / (min(a.shape) * kappa**2), product, _enough_rows(a, kappa)
        ),
        Inequality("v1, Lemma 4, upper", product, sizes),
    )


def lemma_2_v1(pair: Pair, x: Array) -> Inequality:
    """v1, Lemma 2: |h~_L|^2 / |h_L|^2 <= prod_l [2 (beta/alpha) n* kappa^2] prod_l (1 + r_l^2).

    Symbols and assumptions as in `theorem_1_v1`, whose constant this is: tall networks only.
    """
    with quiet():
        trust = np.prod(1.0 + pair.relative**2)
        lhs = np.divide(norm(pair.after(x)), norm(pair.before(x))) ** 2
        rhs = np.exp(v1_log_constant(pair)) * trust
    return Inequality(
        "v1, Lemma 2", float(lhs), float(rhs), theorem_1_v1(pair, x).holds_assumptions
    )


def lemma_3_v1(matrices: Sequence[Array]) -> Inequality:
    """v1, Lemma 3, "freshman's dream": |sum_i A_i|^2 <= k sum_i |A_i|^2 for k matrices."""
    hosts = [matrix(a) for a in matrices]
    total = reduce(np.add, hosts)
    return Inequality("v1, Lemma 3", _square(total), len(hosts) * sum(map(_square, hosts)))


def lemma_5_v1(
    weights: Sequence[Array], perturbations: Sequence[Array], *, ours: bool = False
) -> Inequality:
    """v1, Lemma 5, the relative difference of a product, for squares:

        |prod_l (W_l + dW_l) - prod_l W_l|^2 / |prod_l W_l|^2
            <= 2^L prod_l nbar_l kappa_l^2 [prod_l (1 + r_l^2) - 1]

    W_l (n_l, n_{l-1}), the first layer first; the product is W_L ... W_1. ours: 2^L - 1 in place
    of 2^L, which is attained. Holds where the widths fall, then rise, which the paper does not
    say.
    """
    before, changes = [matrix(w) for w in weights], [matrix(d) for d in perturbations]
    if [w.shape for w in before] != [d.shape for d in changes]:
        raise Error("lemma_5_v1: weights and perturbations differ in number or shape")
    widths = [before[0].shape[1], *(w.shape[0] for w in before)]
    kappas = np.array([condition_number(w) for w in before])
    with quiet():
        plain = reduce(lambda p, w: w @ p, before)
        moved = reduce(lambda p, w: w @ p, [w + d for w, d in zip(before, changes, strict=True)])
        lhs = np.divide(norm(moved - plain), norm(plain)) ** 2
        r = np.array([np.divide(norm(d), norm(w)) for w, d in zip(before, changes, strict=True)])
        nbar = np.array([min(sizes) for sizes in pairwise(widths)])
        factor = 2.0 ** len(before) - (1.0 if ours else 0.0)
        rhs = factor * np.prod(nbar * kappas**2) * np.expm1(np.sum(np.log1p(r**2)))
    holds = {
        "conditioning (kappa finite)": bool(np.all(np.isfinite(kappas))),
        "valley (not printed)": is_valley(widths),
    }
    name = "ours, Lemma 5 with 2^L - 1" if ours else "v1, Lemma 5"
    return Inequality(name, float(lhs), float(rhs), holds)


def scalar_two_layers(a: float, da: float, b: float, db: float) -> Inequality:
    """v2, Equation 3, f(x) = a b x: |f~ - f| / |f| <= (1 + |da/a|) (1 + |db/b|) - 1. a, b not 0."""
    u, v = da / a, db / b
    return Inequality("v2, Equation 3", abs(u + v + u * v), abs(u) + abs(v) + abs(u) * abs(v))


def scalar_two_layers_v1(a: float, da: float, b: float, db: float) -> Inequality:
    """v1, section 3: (f~ - f)^2 / f^2 <= 3 [(1 + da^2/a^2) (1 + db^2/b^2) - 1]; 3 is attained at
    da/a = db/b = 1. a, b not 0.
    """
    u, v = (da / a) ** 2, (db / b) ** 2
    change = da / a + db / b + da / a * (db / b)
    return Inequality("v1, two scalar layers", change**2, 3.0 * (u + v + u * v))
