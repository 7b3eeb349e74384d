"""The multilayer perceptron of the papers' theorems, small and in float64, on the host."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np

from npdrt.arrays import Array, Params, quiet
from npdrt.errors import Error
from npdrt.trust.scaled import Host, host
from npdrt.trust.spectra import matrix

SLOPES = {"identity": 1.0, "leaky_relu": 0.01, "relu": 0.0}  # below zero; 1 above


@dataclass(frozen=True, eq=False)
class Net:
    """h_l = phi(W_l h_{l-1} + b_l), l = 1 .. L, h_0 = x, phi after the last layer too.

    weights: W_1 .. W_L, W_l of shape (n_l, n_{l-1}), kept as float64. slope, slope_above:
    phi(z) = slope_above z for z > 0 and slope z below, so that slope = 1 is the identity and
    slope = 0 relu. biases: b_1 .. b_L, or () for none; the papers have none.
    output_nonlinearity: False makes the last phi the identity, as in a trained classifier; the
    theorems hold with beta / alpha = 1 for that layer.

    Source: Bernstein et al. 2020, v2, Definition 1 (v1, Definition 3), and their leaky relu.
    """

    weights: tuple[Host, ...]
    slope: float = 1.0
    slope_above: float = 1.0
    biases: tuple[Host, ...] = ()
    output_nonlinearity: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "weights", tuple(matrix(w) for w in self.weights))
        biases = tuple(host(b, "Net: a bias") for b in self.biases)
        object.__setattr__(self, "biases", biases)
        for name in ("slope", "slope_above"):
            object.__setattr__(self, name, _finite(name, getattr(self, name)))
        if not self.weights:
            raise Error("Net: got no weights; a network has at least one layer")
        for layer, (below, above) in enumerate(pairwise(self.weights), start=1):
            if below.shape[0] != above.shape[1]:
                raise Error(
                    f"Net: layer {layer} has {below.shape[0]} outputs and layer {layer + 1} takes "
                    f"{above.shape[1]}; weights are (out, in), first layer first"
                )
        if biases and [b.shape for b in biases] != [w.shape[:1] for w in self.weights]:
            raise Error("Net: give one bias of n_l numbers for every layer, or none")

    @classmethod
    def from_params(
        cls, params: Params, nonlinearity: str, *, output_nonlinearity: bool = False
    ) -> Net:
        """The network of MLP parameters: NAME/weight (out, in) and, where there, NAME/bias (out,).

        nonlinearity: identity, leaky_relu (slope 0.01) or relu; others have no alpha > 0, so
        that no theorem covers them. Skip connections cannot be seen in parameters: the networks
        here have none.
        """
        if nonlinearity not in SLOPES:
            raise Error(
                f"Net: nonlinearity {nonlinearity!r}; the theorems know {', '.join(SLOPES)}"
            )
        layers = [name.removesuffix("weight") for name in params if name.endswith("weight")]
        biased = [layer for layer in layers if layer + "bias" in params]
        odd = set(params) - {n + "weight" for n in layers} - {n + "bias" for n in biased}
        if odd or any(len(params[layer + "weight"].shape) != 2 for layer in layers):
            raise Error(
                f"Net: expected matrices NAME/weight and vectors NAME/bias; got {list(params)}; "
                "the theorems speak of multilayer perceptrons"
            )
        zeros = {n + "bias": np.zeros(params[n + "weight"].shape[0]) for n in layers}
        return cls(
            weights=tuple(params[n + "weight"] for n in layers),
            slope=SLOPES[nonlinearity],
            biases=tuple({**zeros, **params}[n + "bias"] for n in layers) if biased else (),
            output_nonlinearity=output_nonlinearity,
        )

    @property
    def depth(self) -> int:
        """L, the number of weight matrices."""
        return len(self.weights)

    @cached_property
    def widths(self) -> tuple[int, ...]:
        """n_0, n_1, ..., n_L."""
        return (self.weights[0].shape[1], *(w.shape[0] for w in self.weights))

    def transmission(self, layer: int) -> tuple[float, float]:
        """alpha and beta of layer 1 .. L: alpha |x - y| <= |phi(x) - phi(y)| <= beta |x - y|.

        As in v2; v1 has alpha and beta squared. alpha is 0 where the slopes differ in sign.
        """
        below, above = self.slopes(layer)
        small, large = sorted((abs(below), abs(above)))
        return (small if (below > 0) == (above > 0) else 0.0), large

    def slopes(self, layer: int) -> tuple[float, float]:
        """phi' of layer 1 .. L below and above zero."""
        linear = layer == self.depth and not self.output_nonlinearity
        return (1.0, 1.0) if linear else (self.slope, self.slope_above)

    @property
    def finite(self) -> bool:
        """Whether every weight and bias is."""
        return all(bool(np.all(np.isfinite(a))) for a in (*self.weights, *self.biases))

    def input(self, x: Array) -> Host:
        """One input as float64 on the host. Raises `Error` unless it has shape (n_0,)."""
        h = host(x, "Net: an input")
        if h.shape != self.widths[:1]:
            raise Error(f"Net: an input of shape {h.shape}; expected one example {self.widths[:1]}")
        return h

    def derivatives(self, x: Array) -> tuple[Host, list[Host]]:
        """f(x), and phi'(W_l h_{l-1} + b_l) for l = 1 .. L; `slope` at exactly 0."""
        h, found = self.input(x), []
        with quiet():
            for layer, w in enumerate(self.weights, start=1):
                z = w @ h + (self.biases[layer - 1] if self.biases else 0.0)
                below, above = self.slopes(layer)
                found.append(np.where(z > 0, above, below))
                h = found[-1] * z
        return h, found

    def __call__(self, x: Array) -> Host:
        """f(x), shape (n_L,), for one input x, shape (n_0,)."""
        return self.derivatives(x)[0]

    def jacobians(self, x: Array) -> list[Host]:
        """J_0 .. J_L, the layer-to-output Jacobians df/dh_l (n_L, n_l); J_L is the identity.

        J_l = Phi'_L W_L ... Phi'_{l+1} W_{l+1}, Phi'_k = diag phi'(W_k h_{k-1} + b_k)
        (Proposition 1; v2's middle chain should end in dh_{l+1}/dh_l).
        """
        found = [np.eye(self.widths[-1])]
        with quiet():
            for slopes, w in zip(self.derivatives(x)[1][::-1], self.weights[::-1], strict=True):
                found.append(found[-1] @ (slopes[:, None] * w))
        return found[::-1]


def _finite(name: str, slope: float) -> float:
    """A slope as a float."""
    try:
        value = float(slope)
    except (TypeError, ValueError) as error:
        raise Error(f"Net: {name} must be a finite number; got {slope!r}") from error
    if not math.isfinite(value):
        raise Error(f"Net: {name} must be a finite number; got {slope!r}")
    return value
