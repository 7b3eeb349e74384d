"""Data sets in one NumPy .npz file: arrays x and y, and x_test and y_test if it has a test set.

`npdrt.store.foreign` reads the file: NumPy's own reader allocates whatever shape a file declares
and can run pickles.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO

import numpy as np

from npdrt import regular
from npdrt.data.bounded import FREE, RATIO, reading
from npdrt.data.catalogue import Form, Source, package_file
from npdrt.data.dataset import Dataset
from npdrt.data.raw import Raw, check, make_dataset
from npdrt.data.scale import Array, Channels, Scale, Standardise, choose, measure, usual_names
from npdrt.errors import Error, FileRefused
from npdrt.store import foreign

ROLES = ("x", "y", "x_test", "y_test")
BYTES = 4  # a number of the file ends up as a float32


def named(name: str) -> bool:
    """Whether a data set's name is the path of a .npz file."""
    return name.endswith(".npz")


def load(path: Path, standardise: Standardise) -> Dataset:
    """The user's data set in a .npz file; see `npdrt.data.load`."""
    regular.require(path)
    with reading(path) as stream:
        raw = _raw(stream, path.name, str(path))
    classes, x = check(raw, None), raw.arrays["x"]
    scale = standardise if isinstance(standardise, Scale | Channels) else None
    scale = _pixels(x, standardise, path) if isinstance(standardise, str) else scale
    scale = measure(x) if standardise is True else scale
    if isinstance(scale, Scale) and not np.isfinite([scale.mean, scale.std]).all():
        raise FileRefused(f"{raw.names['x']}: values too large to standardise")
    return make_dataset(path.stem, raw, classes, _image_shape(x), scale)


def read_x(path: Path) -> Array:
    """The array x of a .npz file, which needs no labels."""
    regular.require(path)
    with reading(path) as stream:
        return _arrays(stream, str(path), _only_x)["x"]


def _pixels(x: Array, name: str, path: Path) -> Scale | Channels | None:
    """The scale of that name for pixels: bytes, or floats from 0 to 1."""
    byte = x.dtype == np.uint8
    if not byte and not (x.dtype.kind == "f" and x.min() >= 0 and x.max() <= 1):
        raise Error(
            f"{path}: the standardisation {name!r} is for pixels, bytes or floats from 0 to 1; "
            f"found {x.dtype} from {x.min()} to {x.max()}"
        )
    return choose(name, Scale(), usual_names(255.0 if byte else 1.0), str(path))


def read(_: Path, form: Form, source: Source) -> Raw:
    """A data set that is part of the package."""
    (file,) = form.files
    return _raw(io.BytesIO(package_file(file.name).read_bytes()), file.name, file.name)


def _raw(stream: BufferedReader | io.BytesIO, file: str, name: str) -> Raw:
    digest = hashlib.file_digest(stream, "sha256").hexdigest()
    arrays = read_npz(stream, name)
    return Raw(arrays, {role: f"{name}: array {role}" for role in arrays}, {file: digest})


def read_npz(stream: BinaryIO, name: str) -> dict[str, Array]:
    """The arrays of a seekable .npz file by role; `name` is what messages call the file.

    Raises FileRefused if the file is damaged, declares sizes out of proportion, lacks x or y, or
    holds an array of another name or anything but plain numbers (objects, pickles).
    """
    return _arrays(stream, name, _roles)


def _arrays(
    stream: BinaryIO, name: str, chosen: Callable[[list[str]], list[str]]
) -> dict[str, Array]:
    """The arrays of a file that `chosen` picks from their names."""
    size = stream.seek(0, 2)
    stream.seek(0)
    with regular.refusing(name):
        return foreign.read_npz(stream, chosen, max(FREE // BYTES, RATIO * size))


def _only_x(names: list[str]) -> list[str]:
    if "x" not in names:
        raise FileRefused(f"expected an array x; found {', '.join(sorted(names)) or 'none'}")
    return ["x"]


def _roles(names: list[str]) -> list[str]:
    """The names in the order of ROLES; refused if they are not one set or two."""
    wanted = "expected arrays x and y, and optionally x_test and y_test"
    if len(set(names)) != len(names) or not {"x", "y"} <= set(names) <= set(ROLES):
        raise FileRefused(f"{wanted}; found {', '.join(sorted(names)) or 'none'}")
    if ("x_test" in names) != ("y_test" in names):
        raise FileRefused(f"{wanted} together; found only one of them")
    return [role for role in ROLES if role in names]


def _image_shape(x: Array) -> tuple[int, int, int] | None:
    """(channels, height, width) of x (N, C, H, W) or (N, H, W); else None."""
    shape = x.shape[1:]
    if len(shape) == 2:
        return (1, shape[0], shape[1])
    return (shape[0], shape[1], shape[2]) if len(shape) == 3 else None
