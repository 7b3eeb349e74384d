"""The SHA-256 of arrays."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from npdrt.arrays import to_host


def digest(value: Any) -> str:
    """The SHA-256 of an array's bytes (C order, little-endian), in hex.

    >>> digest(np.zeros(1, "float32"))[:8]
    'df3f6198'
    """
    x = np.asarray(to_host(value), order="C")
    return hashlib.sha256(x.astype(x.dtype.newbyteorder("<"), copy=False).tobytes()).hexdigest()


def digests(groups: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """GROUP/NAME -> `digest` of every array in the groups."""
    return {
        f"{group}/{name}": digest(value)
        for group, members in groups.items()
        for name, value in members.items()
    }
