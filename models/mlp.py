"""The multilayer perceptron of Bernstein et al. 2020, Definition 1."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from npdrt import ops
from npdrt.arrays import Array, Params, label
from npdrt.errors import Error
from npdrt.models import initialisation
from npdrt.models.initialisation import Initialiser
from npdrt.random import Random

NONLINEARITIES: dict[str, Callable[[Any], Any]] = {
    "relu": ops.relu,
    "leaky_relu": ops.leaky_relu,
    "tanh": ops.tanh,
    "sigmoid": ops.sigmoid,
    "gelu": ops.gelu,
    "softplus": ops.softplus,
    "identity": lambda h: h,
}


@dataclass(frozen=True)
class MLP:
    """h_l = phi(W_l h_{l-1} + b_l), l = 1 .. depth, h_0 = x; the last layer without phi.

    depth: the number L of weight matrices. inputs, width, outputs: layer sizes; hidden layers
    are square but for the first. bias: add b_l (Definition 1 has none, the authors' experiments
    do). nonlinearity: a name in NONLINEARITIES. output_nonlinearity: apply phi after the last
    layer too, as Definition 1 does and trained classifiers do not. residual: every layer whose
    input has its own size, the last excepted, becomes h + phi(W h + b) (author response,
    16-layer residual network). init: he, orthogonal, xavier or authors; see
    `npdrt.models.initialisation`.

    Parameters: "layers/00/weight" (out, in), "layers/00/bias" (out,), ...

    >>> model = MLP(depth=3, width=8, inputs=4, outputs=2)
    >>> list(model.init(seed=0))
    ['layers/00/weight', 'layers/01/weight', 'layers/02/weight']
    """

    depth: int
    width: int
    inputs: int
    outputs: int
    bias: bool = False
    nonlinearity: str = "relu"
    output_nonlinearity: bool = False
    residual: bool = False
    init: Any = "he"

    def __post_init__(self) -> None:
        for name in ("depth", "width", "inputs", "outputs"):
            if getattr(self, name) < 1:
                raise Error(f"MLP: {name} must be at least 1; got {getattr(self, name)}")
        if self.nonlinearity not in NONLINEARITIES:
            known = ", ".join(NONLINEARITIES)
            raise Error(f"unknown nonlinearity {self.nonlinearity!r}; use one of {known}")
        object.__setattr__(self, "init", Initialiser(self.init, self._draw))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The name and shape of every parameter, in definition order."""
        sizes = [self.inputs, *[self.width] * (self.depth - 1), self.outputs]
        shapes: dict[str, tuple[int, ...]] = {}
        for layer, (n_in, n_out) in enumerate(pairwise(sizes)):
            shapes[self._name(layer, "weight")] = (n_out, n_in)
            if self.bias:
                shapes[self._name(layer, "bias")] = (n_out,)
        return shapes

    def _name(self, layer: int, array: str) -> str:
        digits = max(2, len(str(self.depth - 1)))
        return f"layers/{layer:0{digits}d}/{array}"

    def _draw(self, stream: Random) -> Iterator[tuple[str, Any]]:
        for name, shape in self.shapes().items():
            if len(shape) == 2:
                draw, matrix = initialisation.weight, (shape[0], shape[1])
            else:
                draw = initialisation.bias
            yield name, draw(self.init, stream.of(name), matrix)

    def __call__(self, params: Params, x: Array) -> Array:
        """Logits (batch, outputs) for x (batch, inputs)."""
        phi, h = NONLINEARITIES[self.nonlinearity], x
        for layer in range(self.depth):
            bias = params[self._name(layer, "bias")] if self.bias else None
            z = ops.linear(h, params[self._name(layer, "weight")], bias)
            label(z, self._name(layer, "linear"))
            last = layer == self.depth - 1
            out = z if last and not self.output_nonlinearity else phi(z)
            h = h + out if self.residual and not last and h.shape == z.shape else out
            label(h, self._name(layer, "output"))
        return h

    def apply(
        self,
        params: Params,
        buffers: Params,
        x: Array,
        *,
        train: bool = False,
        random: Random | None = None,
    ) -> tuple[Array, Params]:
        """`(logits, buffers)`: training mode is the same function, and there are no buffers."""
        return self(params, x), buffers
