"""Fromage without its prefactor: what the Fromage paper's Figure 2 runs and calls LARS."""

from __future__ import annotations

from npdrt.arrays import Array, cast
from npdrt.optim.fromage import relative_rate
from npdrt.optim.optimizer import Slots
from npdrt.optim.rule import Formula, rule


@rule(default_rate=0.01, relative=True, note="Fromage without its prefactor")
def lars_lesion(*, lr: float) -> Formula:
    """w <- w - lr * |w| / |g| * g, and w - lr * g if either norm is not > 0.

    No trust coefficient, momentum, weight decay or norm bound. In a layer that is invariant to
    rescaling, g is orthogonal to w and |w| grows by sqrt(1 + lr**2) a step.

    Source: Bernstein et al. 2020, Equation 5 and Figure 2 (right). `lars` is the rule of You et
    al. 2017.
    """
    return Formula(update)


def update(w: Array, g: Array, slots: Slots, shared: Slots, lr: Array) -> tuple[Array, Slots]:
    """w <- w - lr |w|/|g| g, one array."""
    return w - cast(relative_rate(w, g, lr), w) * g, slots
