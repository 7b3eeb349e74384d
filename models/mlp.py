"""The multilayer perceptron of Bernstein et al. 2020, Definition 1."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

from npdrt import ops
from npdrt.arrays import Array, Device, Params, label
from npdrt.errors import Error
from npdrt.models import initialisation
from npdrt.models.initialisation import Initialiser
from npdrt.models.spectral import first_vector, normalised, vector_of
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
NORMALISATIONS = ("none", "spectral")


@dataclass(frozen=True)
class MLP:
    """h_l = phi(W_l h_{l-1} + b_l), l = 1 .. depth, h_0 = x; the last layer without phi.

    depth: the number L of weight matrices. inputs, width, outputs: layer sizes; hidden layers
    are square, except the first. bias: add b_l (Definition 1 has none, the authors' experiments
    do). nonlinearity: a name in NONLINEARITIES. output_nonlinearity: apply phi after the last
    layer too, as Definition 1 does and trained classifiers do not. residual: every layer whose
    input has the size of its output, except the last, becomes h + phi(W h + b) (author response,
    16-layer residual network). init: he, orthogonal, xavier or authors; see
    `npdrt.models.initialisation`. normalisation: with "spectral" every W_l is used as
    W_l / sigma_l, sigma_l = u^T W_l v the running estimate of its largest singular value (Miyato
    et al. 2018, Algorithm 1, as in Bernstein et al. 2020, Figure 2 right): each layer's product
    is then invariant to the scale of its weight, and the gradient orthogonal to it. In training
    mode one power iteration moves u; in evaluation mode none does.

    Parameters: "layers/00/weight" (out, in), "layers/00/bias" (out,), ... Buffers: none, or with
    spectral normalisation "layers/00/u" (out,), ...

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
    normalisation: str = "none"

    defaults: ClassVar[dict[str, int]] = {"depth": 2, "width": 128}  # without --depth or --width

    def __post_init__(self) -> None:
        for name in ("depth", "width", "inputs", "outputs"):
            if getattr(self, name) < 1:
                raise Error(f"MLP: {name} must be at least 1; got {getattr(self, name)}")
        if self.nonlinearity not in NONLINEARITIES:
            known = ", ".join(NONLINEARITIES)
            raise Error(f"unknown nonlinearity {self.nonlinearity!r}; use one of {known}")
        if self.normalisation not in NORMALISATIONS:
            known = ", ".join(NORMALISATIONS)
            raise Error(f"unknown normalisation {self.normalisation!r}; use one of {known}")
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

    def buffers(
        self, seed: int = 0, device: str | Device = "cpu", dtype: str = "float32"
    ) -> Params:
        """The initial buffers: {}, or with spectral normalisation a random vector u of length 1 a
        layer, drawn and normalised in float64 from (seed, name) and rounded once to `dtype`."""
        if self.normalisation == "none":
            return {}
        return Initialiser(self.init, self._draw_buffers)(seed, device, dtype)

    def _draw_buffers(self, stream: Random) -> Iterator[tuple[str, Any]]:
        for name, shape in self.shapes().items():
            if name.endswith("weight"):
                yield vector_of(name), first_vector(stream, name, shape[0])

    def __call__(self, params: Params, x: Array, *, buffers: Params | None = None) -> Array:
        """Logits (batch, outputs) for x (batch, inputs), in evaluation mode.

        buffers: needed with spectral normalisation, ignored without.
        """
        return self._forward(params, buffers or {}, x, train=False)[0]

    def apply(
        self,
        params: Params,
        buffers: Params,
        x: Array,
        *,
        train: bool = False,
        random: Random | None = None,
    ) -> tuple[Array, Params]:
        """`(logits, buffers)`: training mode moves the vectors u of spectral normalisation by one
        power iteration; without normalisation both modes are the same function."""
        if self.normalisation == "none":
            return self(params, x), buffers
        return self._forward(params, buffers, x, train=train)

    def _forward(
        self, params: Params, buffers: Params, x: Array, *, train: bool
    ) -> tuple[Array, Params]:
        phi, h, moved = NONLINEARITIES[self.nonlinearity], x, dict(buffers)
        for layer in range(self.depth):
            bias = params[self._name(layer, "bias")] if self.bias else None
            weight = params[self._name(layer, "weight")]  # (out, in)
            if self.normalisation == "spectral":
                weight = normalised(self._name(layer, "weight"), weight, moved, train=train)
            z = ops.linear(h, weight, bias)  # (batch, in) -> (batch, out)
            label(z, self._name(layer, "linear"))
            last = layer == self.depth - 1
            out = z if last and not self.output_nonlinearity else phi(z)
            h = h + out if self.residual and not last and h.shape == z.shape else out
            label(h, self._name(layer, "output"))
        return h, moved
