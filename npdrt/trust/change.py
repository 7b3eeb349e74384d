"""How far apart two networks are at one input, without the digits that f~ - f would lose.

The change goes through the layers together with the value: with h~ = h + d,

    W~ h~ - W h = dW h~ + W d

so that a relative change of 1e-12 is as accurate as one of 1. Every step errs by less than
gamma_(n+8) times the sizes that the proofs of docs/theory.md bound, which is why the bounds hold
for what is computed here, with the slack of `npdrt.trust.bounds`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from npdrt.arrays import quiet
from npdrt.trust.scaled import NONE, Host, Scaled, product, scaled, times, total


class Layer(NamedTuple):
    """W_l and dW_l, and phi' of layer l at the first and at the second network."""

    weight: Scaled
    change: Scaled
    slopes: Host
    slopes_after: Host


class Moved(NamedTuple):
    """A value and by how much it changes."""

    value: Scaled
    change: Scaled

    @property
    def after(self) -> Scaled:
        """The value of the second network."""
        return total(self.value, self.change)


def still(value: Host) -> Moved:
    """A value that does not change."""
    return Moved(scaled(value), Scaled(np.zeros_like(value), NONE))


def difference(before: Host, after: Host) -> Scaled:
    """after - before, rounded once; also where it overflows."""
    with quiet():
        plain = after - before
        return scaled(plain) if np.all(np.isfinite(plain)) else scaled(after / 2 - before / 2, 1)


def affine(weight: Scaled, change: Scaled, h: Moved, bias: Moved) -> Moved:
    """W h + b and its change."""
    return Moved(
        total(product(weight, h.value), bias.value),
        total(product(change, h.after), product(weight, h.change), bias.change),
    )


def phi(z: Moved, below: float, above: float) -> tuple[Moved, Host, Host]:
    """phi(z) and its change, and phi' before and after; `below` at exactly 0.

    Where z keeps its sign the change is phi' dz. Where it does not, both terms of phi(z~) - phi(z)
    have one sign, so that nothing cancels.
    """
    slopes = scaled(np.array([below, above]))
    below, above = slopes.digits
    s = np.where(z.value.digits > 0, above, below)
    with quiet():
        before = z.value.at(z.change.power)  # inf where the change is far too small to reach 0
        after = before + z.change.digits
        t = np.where(after > 0, above, below)
        change = np.where(s == t, s * z.change.digits, t * after - s * before)
    powers = (z.value.power + slopes.power, z.change.power + slopes.power)
    value = scaled(s * z.value.digits, powers[0])
    return Moved(value, scaled(change, powers[1])), s, t


def on_the_left(t: Moved, layer: Layer) -> Moved:
    """Phi W T and its change, Phi~ dW T~ + (Phi~ - Phi) W T~ + Phi W (T~ - T)."""
    after, s, s_after = t.after, layer.slopes[:, None], layer.slopes_after[:, None]
    parts = (
        times(product(layer.change, after), s_after),
        times(product(layer.weight, after), s_after - s),
        times(product(layer.weight, t.change), s),
    )
    return Moved(times(product(layer.weight, t.value), s), total(*parts))


def on_the_right(t: Moved, layer: Layer) -> Moved:
    """T Phi W and its change, T~ Phi~ dW + (T~ (Phi~ - Phi) + (T~ - T) Phi) W."""
    after, s, s_after = t.after, layer.slopes, layer.slopes_after
    kinks = total(times(after, s_after - s), times(t.change, s))
    change = total(product(times(after, s_after), layer.change), product(kinks, layer.weight))
    return Moved(product(times(t.value, s), layer.weight), change)


def jacobians(layers: list[Layer]) -> list[Moved]:
    """J_0 .. J_L and their changes.

    Each J_l is made from where n_l .. n_L is narrowest outwards, in the order of
    `npdrt.trust.jacobian_recursion`: first the layers behind it, first to last, then those before
    it, last to first. In any other order rounding may be large compared with a small J_l.
    """
    widths = [layers[0].weight.digits.shape[1], *(y.weight.digits.shape[0] for y in layers)]
    found = [still(np.eye(widths[-1]))]
    for n in reversed(range(len(layers))):
        if widths[n] < min(widths[n + 1 :]):
            t = still(np.eye(widths[n]))
            for layer in layers[n:]:
                t = on_the_left(t, layer)
        else:
            t = on_the_right(found[-1], layers[n])
        found.append(t)
    return found[::-1]
