"""Every random number of npdrt, from counter-based Philox words.

They are drawn on the host; `npdrt.philox` draws masks on a GPU, from the same words.

A stream is named by (seed, purpose, step) and each draw starts at its beginning: the same key
always gives the same numbers, so CPU and GPU runs, any number of ranks and any resumption see
the same initial weights, data order and masks. There is no state to save.

Words. Philox4x64 with 10 rounds (Salmon et al. 2011). Key: (seed, first 8 bytes of the SHA-256
of the purpose, little-endian). Counter: (block, 0, step, 0), block = 1, 2, ...; each block gives
four 64-bit words. NumPy guarantees these raw words on every platform.

Transforms. Only `+ - * / sqrt`, comparisons, selections and bit patterns: no log, sin or power,
whose last bits change with the SIMD level. The same words therefore give the same numbers on
every machine.

* uniform: (word >> 11) * 2**-53, in [0, 1).
* normal: Wichura's inverse normal distribution function (algorithm AS 241, PPND16) at
  ((word >> 12) + 1/2) * 2**-52, never 0 or 1; the logarithm of its tail is `_log`.
* permutation: the order that sorts n words (stable, so that ties are defined).
* bernoulli: uniform < p.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from npdrt import philox
from npdrt.errors import Error

Floats = np.ndarray[Any, np.dtype[np.float64]]

# AS 241 (Wichura 1988), coefficients from the highest power down: |q| <= 0.425, then the tail
# in r = sqrt(-log p) for r <= 5, then r > 5.
_CENTRE = (
    (2509.0809287301226727, 33430.575583588128105, 67265.770927008700853, 45921.953931549871457,
     13731.693765509461125, 1971.5909503065514427, 133.14166789178437745, 3.387132872796366608),
    (5226.495278852854561, 28729.085735721942674, 39307.89580009271061, 21213.794301586595867,
     5394.1960214247511077, 687.1870074920579083, 42.313330701600911252, 1.0),
)  # fmt: skip
_TAIL = (
    (7.7454501427834140764e-4, 0.0227238449892691845833, 0.24178072517745061177,
     1.27045825245236838258, 3.64784832476320460504, 5.7694972214606914055,
     4.6303378461565452959, 1.42343711074968357734),
    (1.05075007164441684324e-9, 5.475938084995344946e-4, 0.0151986665636164571966,
     0.14810397642748007459, 0.68976733498510000455, 1.6763848301838038494,
     2.05319162663775882187, 1.0),
)  # fmt: skip
_FAR_TAIL = (
    (2.01033439929228813265e-7, 2.71155556874348757815e-5, 0.0012426609473880784386,
     0.026532189526576123093, 0.29656057182850489123, 1.7848265399172913358,
     5.4637849111641143699, 6.6579046435011037772),
    (2.04426310338993978564e-15, 1.4215117583164458887e-7, 1.8463183175100546818e-5,
     7.868691311456132591e-4, 0.0148753612908506148525, 0.13692988092273580531,
     0.59983220655588793769, 1.0),
)  # fmt: skip
_LN2 = 0.6931471805599453
_SQRT_HALF = 0.7071067811865476
_CHUNK = 1 << 14  # elements of a pass: its temporaries stay in cache


@dataclass(frozen=True)
class Random:
    """A stream of random numbers named by `seed`, `purpose` and `step`; every draw starts anew.

    seed: 0 <= seed < 2**64. purpose: what the numbers are for, as a path. step: which of the
    stream's positions (an epoch, a training step), 0 <= step < 2**64.

    >>> Random(0, "example").uniform(2)
    array([0.02184757, 0.34517229])
    >>> Random(0, "example").at(1).permutation(5)
    array([2, 1, 4, 0, 3])
    """

    seed: int
    purpose: str = ""
    step: int = 0

    def __post_init__(self) -> None:
        for name in ("seed", "step"):
            value = getattr(self, name)
            if not isinstance(value, int) or not 0 <= value < 1 << 64:
                raise Error(f"{name} must lie in [0, 2**64) and be an int; got {value!r}")

    def of(self, purpose: str) -> Random:
        """The stream for a narrower purpose, below this one."""
        return replace(self, purpose=f"{self.purpose}/{purpose}" if self.purpose else purpose)

    def at(self, step: int) -> Random:
        """The same stream at another step."""
        return replace(self, step=step)

    def words(self, n: int) -> np.ndarray[Any, np.dtype[np.uint64]]:
        """The first `n` 64-bit words of the stream."""
        return np.asarray(self._generator().random_raw(n), dtype=np.uint64)

    @property
    def key(self) -> tuple[int, int]:
        """The two words of Philox's key: the seed, and 8 bytes of the purpose's digest."""
        name = hashlib.sha256(self.purpose.encode()).digest()[:8]
        return self.seed, int.from_bytes(name, "little")

    def _generator(self) -> np.random.Philox:
        """The words of the stream from the first."""
        low, high = self.key
        return np.random.Philox(key=low | high << 64, counter=self.step << 128)

    def uniform(self, shape: int | Sequence[int], low: float = 0.0, high: float = 1.0) -> Floats:
        """Float64 low + (high - low) * u with u = (word >> 11) * 2**-53, in [0, 1).

        Rounding can give `high` itself where low is not 0.
        """
        shape = _shape(shape)
        u = (self.words(_size(shape)) >> np.uint64(11)).astype(np.float64) * 2.0**-53
        return (low + (high - low) * u).reshape(shape)

    def normal(self, shape: int | Sequence[int], scale: float = 1.0) -> Floats:
        """Float64 from the normal distribution of mean 0 and standard deviation `scale`."""
        shape = _shape(shape)
        words = self.words(_size(shape))
        out = np.empty(words.size)
        for start in range(0, words.size, _CHUNK):
            part = slice(start, start + _CHUNK)
            p = ((words[part] >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52
            out[part] = _inverse_normal(p) * scale
        return out.reshape(shape)

    def permutation(self, n: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        """A permutation of 0 .. n-1."""
        return np.argsort(self.words(n), kind="stable").astype(np.int64)

    def bernoulli(
        self, shape: int | Sequence[int], p: float
    ) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """True with probability `p`, independently for every element: where `uniform` < p.

        It compares integers, (word >> 11) < ceil(2**53 p), which is equivalent; only the result
        grows with the shape. A million take about 6 ms.
        """
        shape, limit = _shape(shape), np.uint64(philox.limit(p))
        out, generator = np.empty(_size(shape), dtype=np.bool_), self._generator()
        for start in range(0, out.size, _CHUNK):
            part = out[start : start + _CHUNK]
            np.less(generator.random_raw(part.size) >> np.uint64(11), limit, out=part)
        return out.reshape(shape)


def _shape(shape: int | Sequence[int]) -> tuple[int, ...]:
    return (shape,) if isinstance(shape, int) else tuple(shape)


def _size(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape, dtype=np.int64))


def _horner(x: Floats, coefficients: tuple[float, ...]) -> Floats:
    total = np.full_like(x, coefficients[0])
    for c in coefficients[1:]:
        total = total * x + c
    return total


def _ratio(x: Floats, fraction: tuple[tuple[float, ...], tuple[float, ...]]) -> Floats:
    return _horner(x, fraction[0]) / _horner(x, fraction[1])


def _log(x: Floats) -> Floats:
    """log x for normal x > 0: with x = m * 2**e, m in [sqrt(1/2), sqrt(2)) and t = (m-1)/(m+1),
    log x = e log 2 + 2 (t + t**3/3 + t**5/5 + ...); |t| <= 0.1716, so 11 terms reach 2**-53."""
    m, e = np.frexp(x)
    small = m < _SQRT_HALF
    m = np.where(small, 2.0 * m, m)
    t = (m - 1.0) / (m + 1.0)
    series = _horner(t * t, tuple(1.0 / k for k in range(21, 0, -2)))
    return (e - small) * _LN2 + 2.0 * t * series


def _inverse_normal(p: Floats) -> Floats:
    """The z with P(Z <= z) = p for 0 < p < 1, to about 1e-15 relative."""
    q = p - 0.5
    z = q * _ratio(0.180625 - q * q, _CENTRE)
    tail = np.abs(q) > 0.425
    side = q[tail]
    r = np.sqrt(-_log(np.where(side < 0.0, p[tail], 1.0 - p[tail])))
    size = np.where(r <= 5.0, _ratio(r - 1.6, _TAIL), _ratio(r - 5.0, _FAR_TAIL))
    z[tail] = np.where(side < 0.0, -size, size)
    return z
