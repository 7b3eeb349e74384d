"""Standardisation: one mean and one standard deviation for all features, or for each channel."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from npdrt.errors import Error

Array = np.ndarray[Any, np.dtype[Any]]
Floats = np.ndarray[Any, np.dtype[np.float32]]

_BLOCK = 1 << 18  # elements at a time, so that the float64 temporaries are small


@dataclass(frozen=True)
class Scale:
    """(x / divisor - mean) / std, in float64, rounded once to float32."""

    divisor: float = 1.0
    mean: float = 0.0
    std: float = 1.0

    def __call__(self, x: Array) -> Floats:
        """`x` standardised, in its shape. Values beyond float32 become inf; callers check."""
        if x.dtype == np.uint8:  # 256 possible values: the same bits, many times faster
            return self._values(np.arange(256)).take(x, mode="clip")
        flat, out = x.reshape(-1), np.empty(x.size, np.float32)
        for part in _blocks(x.size):
            out[part] = self._values(flat[part])
        return out.reshape(x.shape)

    def _values(self, x: Array) -> Floats:
        with np.errstate(over="ignore"):
            scaled = (x.astype(np.float64) / self.divisor - self.mean) / self.std
            return scaled.astype(np.float32)


@dataclass(frozen=True)
class Channels:
    """A Scale for each channel, over the second axis of images (N, C, H, W)."""

    scales: tuple[Scale, ...]

    def __call__(self, x: Array) -> Floats:
        """`x` standardised, in its shape."""
        out = np.empty(x.shape, np.float32)
        for channel, scale in enumerate(self.scales):
            out[:, channel] = scale(x[:, channel])
        return out


Standardise = bool | str | Scale | Channels


def from_constants(divisor: float = 1.0, mean: Any = 0.0, std: Any = 1.0) -> Scale | Channels:
    """(x / divisor - mean) / std: a Scale for numbers, Channels for lists of them."""
    if not isinstance(mean, list):
        return Scale(divisor, mean, std)
    return Channels(tuple(Scale(divisor, m, s) for m, s in zip(mean, std, strict=True)))


def constants(scale: Scale | Channels) -> dict[str, Any]:
    """The arguments of `from_constants` that give this scale."""
    if isinstance(scale, Scale):
        return vars(scale)
    mean, std = ([getattr(one, name) for one in scale.scales] for name in ("mean", "std"))
    return {"divisor": scale.scales[0].divisor, "mean": mean, "std": std}


def usual_names(divisor: float) -> dict[str, Scale | Channels]:
    """The standardisations of every data set: "unit" is [0, 1], "symmetric" is [-1, 1]."""
    return {"unit": Scale(divisor), "symmetric": Scale(divisor, 0.5, 0.5)}


def choose(
    standardise: Standardise,
    usual: Scale | Channels,
    others: dict[str, Scale | Channels],
    what: str,
) -> Scale | Channels | None:
    """The usual standardisation for True, None for False, one of the others by name, or the given
    one.

    what: the name of the data set in the Error for an unknown name.
    """
    if isinstance(standardise, Scale | Channels):
        return standardise
    if not isinstance(standardise, str):
        return usual if standardise else None
    if standardise not in others:
        known = ", ".join(others)
        raise Error(f"{what} has no standardisation {standardise!r}; use true, false or {known}")
    return others[standardise]


def measure(x: Array) -> Scale:
    """The Scale that gives `x` mean 0 and standard deviation 1 (float64, two passes).

    A constant `x` has no deviation: it gets std 1 and becomes 0. If the sums overflow float64, the
    mean or std is not finite; callers check.
    """
    low, high = float(x.min()), float(x.max())
    if low == high:
        return Scale(mean=low)
    flat = x.reshape(-1)
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        mean = _sum(flat, 0.0, 1) / x.size
        std = math.sqrt(_sum(flat, mean, 2) / x.size)
    return Scale(mean=mean, std=std or 1.0)


def _sum(flat: Array, centre: float, power: int) -> float:
    """sum (x - centre)**power, in blocks of a fixed size, so that the order is always the same."""
    blocks = (flat[part].astype(np.float64) - centre for part in _blocks(flat.size))
    return float(np.sum([np.sum(b if power == 1 else b * b) for b in blocks]))


def _blocks(size: int) -> Iterator[slice]:
    return (slice(start, start + _BLOCK) for start in range(0, size, _BLOCK))
