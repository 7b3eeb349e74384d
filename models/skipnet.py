"""The weight-normalised residual network of MacDonald et al. 2023, Theorem 5.1, as a model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from npdrt import ops
from npdrt.arrays import Array, Device, Params
from npdrt.errors import Error
from npdrt.models.initialisation import Initialiser
from npdrt.random import Random
from npdrt.trust.normalised_net import NormalisedResidualNet

NAMES = {"w": "weight", "u": "outer", "v": "inner", "c": "bias"}  # of theta_l, and in params


@dataclass(frozen=True)
class SkipNet:
    """f_1 = en(w) x, then f_l(z) = I_l z + kappa_l wn(U_l) tanh(wn(V_l) z + c_l), l = 2 .. depth.

    The network of `npdrt.trust.NormalisedResidualNet`, which has its formulas and bounds,
    with an example in a row of x. depth: L. inputs: d_0. width: d_1 .. d_{L-1}, at least `outputs`,
    which is d_L. hidden: rows of each V_l. eps: of the normalisations of entries and rows. delta:
    the smallest singular value of every Jf_l, l >= 2, is at least delta.

    Parameters: "layers/00/weight" (d_1, d_0), "layers/01/outer" U (d_2, hidden), "layers/01/inner"
    V (hidden, d_1), "layers/01/bias" c (hidden, 1), ...; all standard normal at first. There are
    no buffers. The logits are bounded, so that the cross-entropy cannot reach 0.
    """

    inputs: int
    outputs: int
    depth: int = 3
    width: int = 16
    hidden: int = 16
    eps: float = 0.1
    delta: float = 0.1

    def __post_init__(self) -> None:
        for name in ("inputs", "outputs", "depth", "width", "hidden"):
            if getattr(self, name) < 1:
                raise Error(f"SkipNet: {name} must be at least 1; got {getattr(self, name)}")
        _ = self.net  # made now: it refuses what does not fit

    @cached_property
    def net(self) -> NormalisedResidualNet:
        """The system of layers, with an example in a column."""
        widths = (self.inputs, *[self.width] * (self.depth - 1), self.outputs)
        return NormalisedResidualNet(widths, self.hidden, self.eps, self.delta)

    def init(self, seed: int = 0, device: str | Device = "cpu", dtype: str = "float32") -> Params:
        """Standard normal parameters, drawn in float64 from the seed and rounded once."""
        return Initialiser("he", self._draw)(seed, device, dtype)

    def _draw(self, stream: Random) -> Iterator[tuple[str, Any]]:
        for layer, theta in enumerate(self.net.draw(stream)):
            for name, value in theta.items():
                yield f"{self._layer(layer)}/{NAMES[name]}", value

    def _layer(self, layer: int) -> str:
        return f"layers/{layer:0{max(2, len(str(self.depth - 1)))}d}"

    def thetas(self, params: Params) -> list[Params]:
        """theta_1 .. theta_L, as the functions of `npdrt.trust.system` take them."""
        names = [("w",), *[("u", "v", "c")] * (self.depth - 1)]
        return [
            {name: params[f"{self._layer(layer)}/{NAMES[name]}"] for name in of_layer}
            for layer, of_layer in enumerate(names)
        ]

    def __call__(self, params: Params, x: Array) -> Array:
        """Logits (N, outputs) for x (N, inputs)."""
        x = x if x.ndim == 2 else ops.reshape(x, shape=(x.shape[0], self.inputs))
        y = self.net.system(self.thetas(params), ops.transpose(x))  # (outputs, N)
        return ops.transpose(y)
