"""Spectral normalisation by name: the weight P/weight has its singular vector in the buffer P/u."""

from __future__ import annotations

from typing import Any

import numpy as np

from npdrt import ops
from npdrt.arrays import Params, label
from npdrt.errors import Error
from npdrt.models.initialisation import Floats
from npdrt.ops.spectral import power_iteration
from npdrt.optim import norm
from npdrt.random import Random


def vector_of(weight: str) -> str:
    """The buffer of a weight: "layers/00/weight" -> "layers/00/u"."""
    return f"{weight.removesuffix('weight')}u"


def first_vector(stream: Random, weight: str, rows: int) -> Floats:
    """A random vector of length 1 for a weight of so many rows, drawn from the buffer's name."""
    u = stream.of(vector_of(weight)).normal(rows)
    return np.asarray(u / norm(u))


def normalised(name: str, weight: Any, buffers: Params, *, train: bool) -> Any:
    """weight / sigma; in training mode one power iteration replaces the weight's vector in
    `buffers`. weight: (out, ...), the matrix (out, everything else)."""
    u_name = vector_of(name)
    if u_name not in buffers:
        raise Error(
            f"spectral normalisation needs the buffer {u_name}; start from model.buffers(seed) "
            "and pass buffers= to the model"
        )
    u, v = power_iteration(weight, buffers[u_name], iterate=train)  # (out,), (in,)
    buffers[u_name] = label(u, u_name)
    value = ops.spectral_normalise(weight, u, v)
    return label(value, f"{name.removesuffix('weight')}normalised")
