"""Arrays that a study computed, kept in a file so that the same command finds them again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from npdrt.store import container

Arrays = dict[str, Any]


def kept(path: Path, settings: Mapping[str, Any], compute: Callable[[], Arrays]) -> Arrays:
    """The arrays in the container at `path` if they were computed with these settings; else what
    `compute` returns, which is kept there.

    settings: JSON values; they become the metadata of the file. Raises `FileRefused` if the file is
    damaged.
    """
    if path.exists():
        arrays, meta = container.read(path)
        if meta == settings:
            return arrays
    arrays = {name: np.asarray(value) for name, value in compute().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    container.write(path, arrays, settings)
    return arrays
