"""Initial values of weight matrices, drawn on the host in float64 and rounded once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from npdrt import compute
from npdrt.arrays import Device, Params, sum_rows, to_device
from npdrt.errors import Error
from npdrt.optim.norm import norm
from npdrt.random import Random

Floats = np.ndarray[Any, np.dtype[np.float64]]


def he(stream: Random, shape: tuple[int, int]) -> Floats:
    """Normal with standard deviation sqrt(2 / in) (He et al. 2015); shape (out, in)."""
    return stream.normal(shape, math.sqrt(2.0 / shape[1]))


def xavier(stream: Random, shape: tuple[int, int]) -> Floats:
    """Uniform within sqrt(6 / (in + out)) (Glorot and Bengio 2010)."""
    limit = math.sqrt(6.0 / sum(shape))
    return stream.uniform(shape, -limit, limit)


def authors(stream: Random, shape: tuple[int, int]) -> Floats:
    """Uniform within 1 / sqrt(in): PyTorch's default, which the Fromage experiments used."""
    limit = 1.0 / math.sqrt(shape[1])
    return stream.uniform(shape, -limit, limit)


def torchvision(stream: Random, shape: tuple[int, int]) -> Floats:
    """A linear layer as by `authors`; kernels are drawn by `he_out`, so that a network starts as
    torchvision's ResNets do."""
    return authors(stream, shape)


def he_out(stream: Random, shape: Sequence[int]) -> Floats:
    """Kernels (out, in, height, width), normal with standard deviation sqrt(2 / (out height
    width)): He et al. 2015, with the fan-out."""
    return stream.normal(shape, math.sqrt(2.0 / (shape[0] * math.prod(shape[2:]))))


def orthogonal(stream: Random, shape: tuple[int, int]) -> Floats:
    """Orthonormal rows or columns, Haar distributed (Saxe et al. 2014).

    The QR factorisation of a normal matrix, with the signs of R's diagonal moved into Q. LAPACK
    computes it: unlike every other draw its last bits depend on the machine, unless the arithmetic
    is portable.
    """
    rows, columns = shape
    factors = reflected if compute.is_portable() else np.linalg.qr
    q, r = factors(stream.normal((max(shape), min(shape))))
    q = q * np.where(np.diagonal(r) < 0, -1.0, 1.0)
    return q if rows >= columns else np.ascontiguousarray(q.T)


def reflected(x: Floats) -> tuple[Floats, Floats]:
    """x = q r by Householder's reflections, q (m, n) and r (n, n), in a defined order of additions.

    With s = |v|, v the rest of column k, v_0 its first element, and u = v but for
    u_0 = v_0 + sign(v_0) s, the reflection is 1 - u u^T / (s (s + |v_0|)); r_kk = -sign(v_0) s.
    Source: Golub and Van Loan 2013, "Matrix Computations", section 5.2.
    """
    r, q, mirrors = x.copy(), np.eye(*x.shape), []
    for k in range(x.shape[1]):
        u = r[k:, k].copy()
        size, first = float(norm(u)), float(u[0])
        if size == 0:
            continue
        u[0] += size if first >= 0 else -size
        mirrors.append((k, u, size * (size + abs(first))))
        _reflect(r[k:, k:], u, mirrors[-1][2])
    for k, u, scale in reversed(mirrors):
        _reflect(q[k:, k:], u, scale)
    return q, r[: x.shape[1]]


def _reflect(x: Floats, u: Floats, scale: float) -> None:
    """x -= u (u^T x) / scale."""
    x -= u[:, None] * (sum_rows(u[:, None] * x) / scale)


SCHEMES = {
    "he": he,
    "orthogonal": orthogonal,
    "xavier": xavier,
    "authors": authors,
    "torchvision": torchvision,
}
_DRAWN_BIASES = ("authors", "torchvision")


def weight(scheme: str, stream: Random, shape: tuple[int, int]) -> Floats:
    """A weight of `shape` (out, in) by the scheme of that name."""
    return SCHEMES[scheme](stream, shape)


def bias(scheme: str, stream: Random, shape: tuple[int, int]) -> Floats:
    """The bias of a layer with a weight of `shape`: drawn like it for "authors" and "torchvision",
    else zeros."""
    drawn = scheme in _DRAWN_BIASES
    return authors(stream, shape)[:, 0] if drawn else np.zeros(shape[0])


class Initialiser(str):
    """The `init` field of a model: the name of a scheme which, called, draws the parameters.

    `model.init == "he"` and `model.init(seed=0, device="cpu", dtype="float32")` both hold, so
    that a model stays a plain dataclass with `init=` among its fields.
    """

    __slots__ = ("_draw",)
    _draw: Callable[[Random], Iterator[tuple[str, Floats]]]

    def __new__(
        cls, scheme: str, draw: Callable[[Random], Iterator[tuple[str, Floats]]]
    ) -> Initialiser:
        """The scheme's name with the model's `draw(stream)` behind it: pairs of name and array."""
        if scheme not in SCHEMES:
            raise Error(f"unknown initialisation {scheme!r}; use one of {', '.join(SCHEMES)}")
        self = super().__new__(cls, scheme)
        self._draw = draw
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self._draw)

    def __call__(
        self, seed: int = 0, device: str | Device = "cpu", dtype: str = "float32"
    ) -> Params:
        """The initial parameters; see `draw`."""
        return draw(self._draw, seed, device, dtype)


def draw(
    pairs: Callable[[Random], Iterator[tuple[str, Floats]]],
    seed: int,
    device: str | Device,
    dtype: str,
) -> Params:
    """The initial parameters: each drawn in float64 from (seed, name), and rounded once to
    `dtype` before the next. pairs: a function from the stream to names and arrays."""
    if dtype not in ("float32", "float64"):
        raise Error(f"unknown dtype {dtype!r}; use float32 or float64")
    return {n: to_device(v.astype(dtype), device) for n, v in pairs(Random(seed, "init"))}
