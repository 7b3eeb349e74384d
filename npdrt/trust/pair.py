"""Two networks of one architecture, and what every bound needs of them, computed once.

`npdrt.trust.bounds` says what the letters mean.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from npdrt.arrays import Array, quiet
from npdrt.errors import Error
from npdrt.trust.change import Layer, Moved, affine, difference, jacobians, phi, still
from npdrt.trust.net import Net
from npdrt.trust.scaled import (
    LOGS,
    Host,
    Scaled,
    Size,
    layer_rounding,
    log_gamma,
    log_ratio_error,
    ratio,
    scaled,
)
from npdrt.trust.spectra import condition_number, log_condition_error

FLAT = 2.0**-1000  # alpha / beta below this counts as alpha = 0


def is_tall(widths: Sequence[int]) -> bool:
    """n_0 <= n_1 <= ... <= n_L: no layer contracts; what a) needs and the papers do not print."""
    return all(below <= above for below, above in pairwise(widths))


def is_valley(widths: Sequence[int]) -> bool:
    """The widths fall, then rise (or only one of the two): what b) needs."""
    bottom = narrowest(widths)
    return is_tall(widths[bottom:]) and is_tall(widths[bottom::-1])


def narrowest(widths: Sequence[int]) -> int:
    """Where the widths are smallest, the last such place."""
    return max(range(len(widths)), key=lambda n: (-widths[n], n))


class Terms(NamedTuple):
    """The logs of what the right sides are made of, an entry a layer: kappa(W_l), kappa(W~_l),
    kappa(dW_l), shape (3, L); r_l; b_l; b_l - 1."""

    kappa: Host
    change: Host
    gain: Host
    kink: Host


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
    def finite(self) -> bool:
        """Whether every weight and bias of both networks is."""
        return self.before.finite and self.after.finite

    @cached_property
    def weights(self) -> list[Scaled]:
        """W_1 .. W_L."""
        return [scaled(w) for w in self.before.weights]

    @cached_property
    def scaled_changes(self) -> list[Scaled]:
        """dW_1 .. dW_L, which do not overflow."""
        both = zip(self.before.weights, self.after.weights, strict=True)
        return [difference(w1, w2) for w1, w2 in both]

    @property
    def changes(self) -> list[Host]:
        """dW_1 .. dW_L."""
        return [d.at(0) for d in self.scaled_changes]

    @cached_property
    def _relative(self) -> list[Size]:
        return [ratio(d, w) for d, w in zip(self.scaled_changes, self.weights, strict=True)]

    @property
    def relative(self) -> Host:
        """r_l; `terms.change` has the logs."""
        return np.array([r.value for r in self._relative])

    @cached_property
    def kappa(self) -> Host:
        """kappa(W_l), kappa(W~_l), kappa(dW_l), shape (3, L); 1 for dW_l = 0, which has none."""
        digits = [d.digits for d in self.scaled_changes]
        changes = [condition_number(d) if np.any(d) else 1.0 for d in digits]
        nets = (self.before, self.after)
        return np.array([*([condition_number(w) for w in n.weights] for n in nets), changes])

    @property
    def gain(self) -> Host:
        """log b_l; inf where alpha = 0."""
        return self.terms.gain

    @cached_property
    def terms(self) -> Terms:
        """As they came out."""
        slopes = [self.before.transmission(n + 1) for n in range(self.before.depth)]
        kinks = [(high - low) / low if low > FLAT * high else math.inf for low, high in slopes]
        with quiet():
            return Terms(
                np.log(self.kappa),
                np.array([r.log for r in self._relative]),
                np.log1p(kinks),
                np.log(kinks),
            )

    @cached_property
    def largest_terms(self) -> Terms:
        """The largest that they can be, given their rounding errors."""
        found, shapes = self.terms, [w.shape for w in self.before.weights]
        kappa = [
            [log_condition_error(k, s) for k, s in zip(row, shapes, strict=True)]
            for row in self.kappa
        ]
        both = zip(self.scaled_changes, self.weights, strict=True)
        change = np.array([log_ratio_error(d, w) for d, w in both])
        with quiet():
            return Terms(
                found.kappa + kappa + LOGS * found.kappa,
                found.change + change,
                found.gain * (1 + LOGS),
                found.kink + LOGS * (1 + np.abs(np.where(np.isinf(found.kink), 0.0, found.kink))),
            )

    @cached_property
    def rounding(self) -> Host:
        """`layer_rounding` of every layer."""
        with quiet():
            kappas = np.exp(self.largest_terms.kappa[0])
        shapes = [w.shape for w in self.before.weights]
        return np.array([layer_rounding(float(k), s) for k, s in zip(kappas, shapes, strict=True)])

    @cached_property
    def slacks(self) -> list[float]:
        """How much rounding in the layers k > l adds to a log, for l = 0 .. L: in the sums of logs,
        and in a left side that is measured."""
        return [self._slack(layer) for layer in range(len(self.widths))]

    def _slack(self, layer: int) -> float:
        terms, widest = self.largest_terms, 4.0 * max(self.widths)
        kappa, change = terms.kappa[:, layer:], terms.change[layer:]
        count, outputs = len(change), self.widths[-1] * max(self.widths)
        largest = (_finite(kappa), _finite(terms.gain[layer:]), _finite(terms.kink[layer:]))
        logs = count * (2 * sum(largest) + math.log(widest) + 1.0)
        logs += 2 * _finite(change) + 2 * float(np.sum(np.maximum(change, 0.0)))
        measured = float(np.sum(self.rounding[layer:])) + log_gamma(2 * outputs + 8)
        return 8 * (count + 1) * LOGS * (1.0 + logs) + measured

    def layers(self, x: Array) -> tuple[Moved, list[Layer]]:
        """f(x) and its change, and the layers with their slopes at x."""
        before, after = self.before, self.after
        h, found = still(before.input(x)), []
        for n, (w, d) in enumerate(zip(self.weights, self.scaled_changes, strict=True)):
            a, b = (
                net.biases[n] if net.biases else np.zeros(len(w.digits)) for net in (before, after)
            )
            z = affine(w, d, h, Moved(scaled(a), difference(a, b)))
            h, slopes, moved = phi(z, *before.slopes(n + 1))
            found.append(Layer(w, d, slopes, moved))
        return h, found

    def function_change(self, x: Array | None) -> Size | None:
        """|f~(x) - f(x)| / |f(x)|."""
        return None if x is None else self._measured(x)[0]

    def jacobian_changes(self, x: Array | None) -> Sequence[Size | None]:
        """|J~_l - J_l|_F / |J_l|_F for l = 0 .. L."""
        return [None] * len(self.widths) if x is None else self._measured(x)[1]

    @cached_property
    def rights(self) -> dict[str, list[tuple[Size, float]]]:
        """The right sides that were computed, by the name of the bound."""
        return {}

    @cached_property
    def _lefts(self) -> dict[bytes, tuple[Size, list[Size]]]:
        return {}

    def _measured(self, x: Array) -> tuple[Size, list[Size]]:
        """Both left sides at x; those of the last x are kept."""
        key = self.before.input(x).tobytes()
        if key not in self._lefts:
            self._lefts.clear()
            f, layers = self.layers(x)
            sizes = [ratio(j.change, j.value) for j in jacobians(layers)]
            self._lefts[key] = ratio(f.change, f.value), sizes
        return self._lefts[key]


def _finite(logs: Host) -> float:
    """The largest size of those that are finite."""
    return float(np.max(np.abs(logs), where=np.isfinite(logs), initial=0.0))
