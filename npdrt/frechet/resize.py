"""Images of another size by bilinear interpolation, as two products with matrices.

The centre of an image's first pixel is at half a pixel, and beyond the outermost centres the image
goes on as it is there: corners are not aligned, and nothing is smoothed before (PyTorch's
`interpolate(mode="bilinear", align_corners=False)`; not Pillow's, nor TensorFlow's of 2015).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from npdrt import ops
from npdrt.arrays import Array, Device, to_device


def weights(size: int, wanted: int, device: Device) -> Array:
    """The matrix (wanted, size), float32, that resizes one axis."""
    places = np.maximum((np.arange(wanted) + 0.5) * (size / wanted) - 0.5, 0.0)
    low = np.minimum(places.astype(np.int64), size - 1)
    share = np.minimum(places - low, 1.0)
    matrix, rows = np.zeros((wanted, size)), np.arange(wanted)
    matrix[rows, low] += 1.0 - share
    matrix[rows, np.minimum(low + 1, size - 1)] += share
    return to_device(matrix.astype(np.float32), device)


def resized(x: Any, down: Array, across: Array) -> Any:
    """Images (..., h, w) as (..., H, W), for matrices (H, h) and (W, w)."""
    return ops.matmul(ops.matmul(down, x), ops.transpose(across))
