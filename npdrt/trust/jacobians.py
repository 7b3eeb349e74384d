"""Jacobians by parameters and by whole batches, with one vjp for each output; their spectra."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from npdrt.arrays import Array, Params, namespace, to_host
from npdrt.autodiff import Tensor, backward, detach, graph
from npdrt.trust.scaled import Host
from npdrt.trust.spectra import singular_values


def jacobian(function: Callable[[Params], Any], params: Params) -> Host:
    """The derivative of vec function(params) in vec(params), row by row: (outputs, parameters).

    Columns are those of the arrays in their order, each in C order. One forward pass and one vjp
    an output; float64 on the host at the end, computed in the dtype of the arrays.
    """
    leaves = {name: Tensor(value, name=name) for name, value in params.items()}
    output = function(leaves)
    value = detach(output)
    size, columns = math.prod(value.shape), [math.prod(p.shape) for p in params.values()]
    rows = np.zeros((size, sum(columns)))
    if not isinstance(output, Tensor):
        return rows
    nodes = graph(output)
    edges = [node.edges for node in nodes]
    starts = np.cumsum([0, *columns])
    for i, unit in enumerate(_units(value)):
        found = backward(output, unit)
        for node, kept in zip(nodes, edges, strict=True):  # the walker consumes the graph
            node.edges = kept
        for leaf, start, stop in zip(leaves.values(), starts, starts[1:], strict=False):
            if id(leaf) in found:
                rows[i, start:stop] = to_host(found[id(leaf)]).reshape(-1)
    return rows


def _units(value: Array) -> Iterable[Array]:
    """The cotangents that pick one output each."""
    xp, shape = namespace(value), tuple(value.shape)
    for i in range(math.prod(shape)):
        unit = np.zeros(math.prod(shape))
        unit[i] = 1.0
        yield xp.asarray(unit.reshape(shape), dtype=value.dtype)


def batch_jacobian(function: Callable[[Any], Any], x: Array) -> Host:
    """The Jacobian of a function of a whole batch, (outputs, inputs), the coupling of the
    examples by batch normalisation included; see `jacobian`."""
    return jacobian(lambda p: function(p["x"]), {"x": x})


def gram_spectrum(j: Host) -> Host:
    """The singular values of J (m, n), m <= n, largest first, as roots of the eigenvalues of
    J J^T in float64.

    For the wide Jacobians of batches it costs one product; values below about 1e-8 of the
    largest are rounding. `singular_values` is exact and slower.
    """
    values = np.linalg.eigvalsh(j @ j.T)
    return np.sqrt(np.maximum(values[::-1], 0.0))


def skip_spectra(a: Host) -> tuple[Host, Host]:
    """The singular values of A and of Id + A, largest first: why a skip connection keeps layer
    Jacobians away from 0. The authors' figure has A uniform on (-1, 1) / sqrt(n), n = 500."""
    return singular_values(a), singular_values(np.eye(*a.shape) + a)
