"""A network to which Theorem 5.1 of MacDonald et al. 2023 applies, and how far its weights go."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from npdrt import ops
from npdrt.arrays import Params
from npdrt.autodiff import detach
from npdrt.errors import Error
from npdrt.random import Random
from npdrt.trust.layers import entry_norm_derivative
from npdrt.trust.lemmas import Inequality
from npdrt.trust.scaled import Host
from npdrt.trust.system import Point, System, theorem_4_7


@dataclass(frozen=True)
class NormalisedResidualNet:
    """A weight-normalised residual network to which Theorems 4.7 and 5.1 apply, our instance.

        f_1(w, X) = en(w) X
        f_l(Z) = I_l Z + kappa_l wn(U_l) tanh(wn(V_l) Z + c_l 1^T),    l = 2 .. L

    en entrywise, wn rowwise, both with eps; I_l the first d_l rows of the identity; kappa_l =
    (1 - delta) / sqrt(d_l h): since |wn(U)|_2 < sqrt(d_l), |wn(V)|_2 < sqrt(h) and |tanh'| <= 1,
    |J g_l|_2 < 1 - delta. wn alone would not do: its norm may be as large as sqrt(rows).

    widths: d_0 .. d_L, not growing after d_1. hidden: h, rows of V_l. 0 < delta < 1. The paper's
    definition is not at hand; this one meets every condition that its proof uses.
    """

    widths: tuple[int, ...]
    hidden: int
    eps: float = 0.1
    delta: float = 0.1

    def __post_init__(self) -> None:
        grows = any(below < above for below, above in pairwise(self.widths[1:]))
        if len(self.widths) < 2 or grows or not (self.eps > 0 and 0 < self.delta < 1):
            raise Error(
                "NormalisedResidualNet: expected widths d_0, d_1 >= d_2 >= ... >= d_L, eps > 0 and "
                f"0 < delta < 1; got {self.widths}, {self.eps} and {self.delta}"
            )

    @property
    def system(self) -> System:
        """The layers f_1 .. f_L."""
        return System((self._first, *(self._block for _ in self.widths[2:])))

    def draw(self, random: Random) -> list[Params]:
        """theta_1 .. theta_L of standard normal numbers: {"w"}, then {"u", "v", "c"}."""
        thetas = [{"w": random.of("w").normal((self.widths[1], self.widths[0]))}]
        for layer, (inputs, outputs) in enumerate(pairwise(self.widths[1:]), start=2):
            shapes = {
                "u": (outputs, self.hidden),
                "v": (self.hidden, inputs),
                "c": (self.hidden, 1),
            }
            of_layer = random.of(f"layer {layer}")
            thetas.append({name: of_layer.of(name).normal(s) for name, s in shapes.items()})
        return thetas

    def bound(self, point: Point) -> Inequality:
        """`theorem_4_7` at a point, with DP(w) = D en(w)."""
        first = entry_norm_derivative(detach(point.thetas[0]["w"]), eps=self.eps)
        return theorem_4_7(point, first, delta=self.delta)

    def _first(self, theta: Params, x: Any) -> Any:
        return ops.matmul(ops.entry_norm(theta["w"], eps=self.eps), x)

    def _block(self, theta: Params, z: Any) -> Any:
        outputs = theta["u"].shape[0]
        kappa = (1.0 - self.delta) / math.sqrt(outputs * self.hidden)
        inner = ops.matmul(ops.weight_norm(theta["v"], eps=self.eps), z) + theta["c"]
        branch = ops.matmul(ops.weight_norm(theta["u"], eps=self.eps), ops.tanh(inner))
        return residual(ops.getitem(z, index=slice(0, outputs)), branch * kappa)


def residual(skipped: Any, branch: Any) -> Any:
    """I X + g(X) (23), given both parts; they must have one shape."""
    if tuple(skipped.shape) != tuple(branch.shape):
        raise Error(
            f"residual: expected both parts in one shape; got {tuple(skipped.shape)} "
            f"and a branch {tuple(branch.shape)}"
        )
    return skipped + branch


def escaping_radius(steps: int, *, c: float, eps: float, eta: float) -> Host:
    """r_0 = 1, r_{t+1} = r_t + eta c eps r_t^(-3), t < steps: the fastest that a weight of the
    first layer can go to infinity in the proof of Theorem 5.1; (steps + 1,).

    Close to (4 c eps eta t + 1)^(1/4). So sigma(D en) falls like t^(-3/4), whose sum diverges, and
    its square, which Theorem 2.4 asks for, like t^(-3/2), whose sum does not.
    """
    found = [1.0]
    for _ in range(steps):
        found.append(found[-1] + eta * c * eps / found[-1] / found[-1] / found[-1])
    return np.array(found)
