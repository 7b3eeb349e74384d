"""Convolutions and pools of channel-major images (C, N, H, W) by other means: loops and PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np


def two(n: Any) -> tuple[int, int]:
    """A setting as a pair."""
    return tuple(n) if isinstance(n, tuple) else (n, n)  # type: ignore[return-value]


def windows(x: np.ndarray, size: Any, stride: Any, padding: Any, value: float = 0.0) -> np.ndarray:
    """(C, N, oh, ow, kh, kw): what every window sees."""
    (p, q), (s, t) = two(padding), two(stride)
    x = np.pad(x, ((0, 0), (0, 0), (p, p), (q, q)), constant_values=value)
    seen = np.lib.stride_tricks.sliding_window_view(x, two(size), axis=(2, 3))
    return seen[:, :, ::s, ::t]


def convolved(
    x: np.ndarray,
    w: np.ndarray,
    b: Any = None,
    *,
    stride: Any = 1,
    padding: Any = 0,
    groups: int = 1,
) -> np.ndarray:
    """The definition of a convolution, group by group."""
    made = []
    for part, weight in zip(np.split(x, groups), np.split(w, groups), strict=True):
        seen = windows(part, w.shape[2:], stride, padding)
        made.append(np.einsum("cnijkl,ockl->onij", seen, weight))
    y = np.concatenate(made)
    return y if b is None else y + b[:, None, None, None]


def averaged(x: np.ndarray, *, size: Any, stride: Any = None, padding: Any = 0) -> np.ndarray:
    """Means of windows."""
    return windows(x, size, stride or size, padding).mean((-2, -1))


def largest(x: np.ndarray, *, size: Any, stride: Any = None, padding: Any = 0) -> np.ndarray:
    """Maxima of windows."""
    return windows(x, size, stride or size, padding, -np.inf).max((-2, -1))


def turned(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of PyTorch on (N, C, H, W) for images (C, N, H, W)."""

    def call(x: Any, *args: Any, **settings: Any) -> Any:
        return function(x.transpose(0, 1), *args, **settings).transpose(0, 1)

    return call
