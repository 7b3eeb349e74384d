"""Arrays as the files of a data set hold them: checked, then made into a Dataset."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from npdrt.data.dataset import Dataset
from npdrt.data.images import Stored
from npdrt.data.scale import Array, Channels, Scale
from npdrt.errors import FileRefused

_MOST_CLASSES = 1 << 20  # above it a label is more likely a target, or damage


@dataclass(frozen=True)
class Raw:
    """What a reader returns.

    arrays: by role (x, y, x_test, y_test). names: what messages call each of them. digests: the
    SHA-256 of each file by its name. notes: warnings for the user. stored: x stays bytes in
    memory, and becomes floats a batch at a time.
    """

    arrays: dict[str, Array]
    names: dict[str, str]
    digests: dict[str, str]
    notes: tuple[str, ...] = ()
    stored: bool = False


def make_dataset(
    name: str,
    raw: Raw,
    classes: int | None,
    image: tuple[int, int, int] | None,
    scale: Scale | Channels | None,
) -> Dataset:
    """The data set of arrays that `check` accepted, standardised by `scale`."""
    scaled, as_y = scale or Scale(), np.int64 if classes else np.float32
    as_x: Any = partial(Stored, scale=scaled) if raw.stored else scaled
    out: dict[str, Any] = {}
    for role, array in raw.arrays.items():
        with np.errstate(over="ignore"):
            out[role] = array.astype(as_y) if role.startswith("y") else as_x(array)
        if array.dtype.kind == "f":
            check_finite(out[role], f"{raw.names[role]}, converted to float32")
    about: dict[str, Any] = {"classes": classes, "image_shape": image, "scale": scale}
    return Dataset(name, digests=raw.digests, notes=raw.notes, **about, **out)


def check(raw: Raw, classes: int | None) -> int | None:
    """Return the number of classes, None for float targets.

    classes: that number if it is known. Raises FileRefused if the arrays do not fit together.
    """
    for role, array in raw.arrays.items():
        check_finite(array, raw.names[role])
    _check_pair(raw, "x", "y")
    if "x_test" in raw.arrays:
        _check_pair(raw, "x_test", "y_test")
        _check_alike(raw, "x_test", "x")
        _check_alike(raw, "y_test", "y")
    if raw.arrays["y"].dtype.kind == "f":
        return None
    return max(_check_labels(raw, role, classes) for role in raw.arrays if role.startswith("y"))


def check_finite(array: Array, name: str) -> None:
    """Refuse floats that are not finite."""
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise FileRefused(f"{name}: expected finite values; found NaN or inf")


def _check_pair(raw: Raw, x: str, y: str) -> None:
    features, answers = raw.arrays[x], raw.arrays[y]
    if features.ndim < 2 or features.size == 0:
        raise FileRefused(
            f"{raw.names[x]}: expected shape (examples, features) with none of them 0; "
            f"found {features.shape}"
        )
    if answers.shape[:1] != features.shape[:1] or answers.size == 0:
        raise FileRefused(
            f"{raw.names[y]}: expected one label or target for each of the {len(features)} "
            f"examples in {raw.names[x]}; found shape {answers.shape}"
        )


def _check_alike(raw: Raw, test: str, train: str) -> None:
    a, b = raw.arrays[test], raw.arrays[train]
    if a.shape[1:] != b.shape[1:] or (a.dtype.kind == "f") != (b.dtype.kind == "f"):
        raise FileRefused(
            f"{raw.names[test]}: expected examples like those of {raw.names[train]}, {b.dtype} of "
            f"shape {b.shape[1:]}; found {a.dtype} of shape {a.shape[1:]}"
        )


def _check_labels(raw: Raw, role: str, classes: int | None) -> int:
    """`classes`, or the largest label plus one."""
    y, name, limit = raw.arrays[role], raw.names[role], classes or _MOST_CLASSES
    low, high = int(y.min()), int(y.max())
    if y.ndim != 1:
        raise FileRefused(f"{name}: expected labels of shape (examples,); found {y.shape}")
    if low < 0 or high >= limit:
        raise FileRefused(
            f"{name}: expected labels 0 to {limit - 1}; found {low} to {high} "
            "(targets that are not labels are stored as floats)"
        )
    return classes or high + 1
