"""Condition numbers and Jacobians of a checkpoint, for a trace: expensive, so off by default."""

from __future__ import annotations

import math
from typing import Any

from npdrt.arrays import Array, Params, to_host
from npdrt.models import MLP
from npdrt.optim import norm
from npdrt.trust.distances import weights
from npdrt.trust.net import SLOPES, Net
from npdrt.trust.spectra import condition_number

EXAMPLES = 4  # of the training set, the first: the Jacobians are taken at these inputs


def conditioning(model: Any, params: Params, x: Array) -> dict[str, Any]:
    """Condition number of every weight matrix, and the size of the Jacobian to the output.

    "condition_number": by name of the weight. "jacobian_norm": in their order, for the l-th the
    root mean square over EXAMPLES rows of x of |df/dh_{l-1}|_F, h_{l-1} the input of its layer
    (Proposition 1); None if the model is not the perceptron of Definition 1, piecewise linear
    and without skip connections or normalisation. It costs a singular value decomposition a weight.
    """
    matrices = weights(params)
    numbers = {name: condition_number(w) for name, w in matrices.items()}
    return {"condition_number": numbers, "jacobian_norm": _jacobian_norms(model, params, x)}


def _jacobian_norms(model: Any, params: Params, x: Array) -> list[float] | list[None]:
    plain = isinstance(model, MLP) and not model.residual and model.normalisation == "none"
    if not plain or model.nonlinearity not in SLOPES:
        return [None] * len(weights(params))
    net = Net.from_params(params, model.nonlinearity, output_nonlinearity=model.output_nonlinearity)
    inputs = to_host(x[:EXAMPLES, ...])
    sizes = [[float(norm(j)) for j in net.jacobians(row)[:-1]] for row in inputs]
    return [
        math.sqrt(sum(s * s for s in column) / len(column)) for column in zip(*sizes, strict=True)
    ]
