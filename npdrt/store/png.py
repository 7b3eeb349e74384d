"""Pictures as PNG, with nothing but zlib."""

from __future__ import annotations

import struct
import zlib
from typing import Any

import numpy as np

from npdrt.errors import Error

SIGNATURE = b"\x89PNG\r\n\x1a\n"
COLOURS = {1: 0, 3: 2}  # channels -> PNG's colour type: grey, red-green-blue


def encode(pixels: Any) -> bytes:
    """A PNG file of pixels (height, width, channels), uint8, with 1 channel or 3.

    Source: the PNG specification, third edition (W3C 2025), sections 5 and 9; no filter.
    """
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] not in COLOURS:
        raise Error(
            "a PNG is made of uint8 pixels (height, width, 1 or 3); got "
            f"{pixels.dtype}{tuple(pixels.shape)}"
        )
    height, width, channels = pixels.shape
    rows = np.zeros((height, 1 + width * channels), np.uint8)  # a row begins with its filter, 0
    rows[:, 1:] = pixels.reshape(height, -1)
    header = struct.pack(">2I5B", width, height, 8, COLOURS[channels], 0, 0, 0)
    chunks = {b"IHDR": header, b"IDAT": zlib.compress(rows.tobytes(), 9), b"IEND": b""}
    return SIGNATURE + b"".join(_chunk(kind, content) for kind, content in chunks.items())


def _chunk(kind: bytes, content: bytes) -> bytes:
    """Length, kind, content and checksum."""
    body = kind + content
    return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))
