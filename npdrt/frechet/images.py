"""Images to compare: a folder of PNG or JPEG files or of npz files, one npz file, a data set, or
those that the generator of a run makes.

All are bytes (N, 3, H, W) of one size, read a few at a time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from npdrt import data, regular
from npdrt.arrays import Device
from npdrt.data import decode, folder
from npdrt.data.bounded import FREE, RATIO, contents, reading
from npdrt.data.catalogue import sources
from npdrt.data.images import Stored
from npdrt.errors import Error, FileRefused
from npdrt.store import container, foreign
from npdrt.train.pictures import generator

PARTS = ("train", "test")
FILE_OF_RUN = "checkpoint.h5"
OF_RUN = 10_000  # images of a run, as many as Bernstein et al. 2020 took

Bytes = np.ndarray[Any, Any]  # uint8


@dataclass(frozen=True)
class Source:
    """Images as a sequence: its slices are arrays (n, 3, H, W) of bytes.

    what: its name for a report. read: the images of a slice. fingerprint: a digest of all of them.
    notes: warnings for the user, for example that some files of a data set are missing.
    """

    what: str
    count: int
    read: Callable[[slice], Bytes] = field(repr=False)
    fingerprint: Callable[[], str] = field(repr=False)
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, key: slice) -> Bytes:
        return self.read(slice(*key.indices(self.count)))

    def first(self, count: int | None) -> Source:
        """The first `count` images; Error if there are fewer. None for all."""
        if count is not None and count > self.count:
            raise Error(f"{self.what}: has {self.count} images; {count} were asked for")
        return self if count is None else replace(self, count=count)

    def stretched(self) -> Source:
        """The images, each stretched by `stretched`."""
        return replace(self, read=lambda key: stretched(self.read(key)))


def stretched(images: Any) -> Bytes:
    """Every image stretched from its own minimum and maximum, over all channels, to 0 and 255.

    images: bytes or floats (N, 3, H, W). The authors of Bernstein et al. 2020 wrote their real and
    generated images so before they took the FID. An image of one colour becomes black.
    """
    x = np.asarray(images, np.float64)
    low, high = x.min((1, 2, 3), keepdims=True), x.max((1, 2, 3), keepdims=True)
    share = (x - low) / np.where(high > low, high - low, 1.0)
    bytes_: Bytes = np.floor(255.0 * share + 0.5).astype(np.uint8)
    return bytes_


def of_path(path: Path) -> Source:
    """The images in a folder, with the folders in it, or in a .npz file."""
    if not path.exists():
        raise Error(f"{path} does not exist; give a folder of images or a .npz file")
    if is_run(path):
        raise Error(f"{path} is a run; real images are those of a data set or in a folder")
    if path.is_file():
        return of_arrays(str(path), [path])
    arrays = sorted(path.glob("*.npz"))
    return of_arrays(str(path), arrays) if arrays else of_files(str(path), folder.files_in(path))


def is_run(path: Path) -> bool:
    """Whether it is a run directory, or a file as runs write them: a checkpoint or a snapshot."""
    return (path / FILE_OF_RUN).exists() or path.suffix == ".h5"


def of_run(path: Path, device: Device, code: Sequence[Path] = ()) -> Source:
    """The images that the generator of a run makes, at most `OF_RUN`; its classes take turns."""
    made = generator(path, device, code)

    def read(key: slice) -> Bytes:
        images: Bytes = made.images(range(key.start, key.stop, key.step))
        return images

    name = f"the generator of {path}"
    return Source(
        name, OF_RUN, read, lambda: _digest([contents(container.within(path, FILE_OF_RUN))])
    )


def of_name(name: str, part: str = "train", data_dir: Path | None = None) -> Source:
    """The images of a data set, or in the folder or .npz file of that path."""
    if name not in sources() and Path(name).exists():
        return of_path(Path(name))
    return of_data(name, part, data_dir)


def of_data(name: str, part: str = "train", data_dir: Path | None = None) -> Source:
    """The training or test images of a data set whose images npdrt keeps as bytes."""
    dataset = data.load(name, data_dir=data_dir, standardise=False)
    x = dataset.x if part == "train" else dataset.x_test
    if not isinstance(x, Stored) or x.shape[1] != 3:
        raise Error(
            f"{name} has no {part} set of colour images; use cifar-10 or cifar-100, or give the "
            "path of a folder of images"
        )
    return replace(of_pixels(f"{name}, {part} set", x.raw), notes=dataset.notes)


def of_pixels(what: str, pixels: Bytes) -> Source:
    """Images in memory: bytes (N, 3, H, W)."""
    return Source(what, len(pixels), lambda key: pixels[key], lambda: _digest([pixels.tobytes()]))


def of_files(what: str, paths: list[str]) -> Source:
    """Image files, which must have one size; they are decoded when they are asked for."""
    size = decode.decode(paths[0]).size

    def read(key: slice) -> Bytes:
        return np.stack([_decoded(path, size) for path in paths[key]])

    return Source(what, len(paths), read, lambda: _digest(contents(Path(p)) for p in paths))


def _decoded(path: str, size: tuple[int, int]) -> Bytes:
    image = decode.decode(path)
    if image.size != size:
        raise FileRefused(
            f"{path}: has {image.width}x{image.height} pixels, and the first image of its folder "
            f"{size[0]}x{size[1]}; give images of one size"
        )
    return np.asarray(image).transpose(2, 0, 1)  # (3, H, W)


def of_arrays(what: str, paths: list[Path]) -> Source:
    """The images in npz files: in each an array "x", or its only array."""
    return of_pixels(what, np.concatenate([_pixels(path) for path in paths]))


def _pixels(path: Path) -> Bytes:
    """The images in a .npz file as (N, 3, H, W)."""
    with regular.refusing(path), reading(path) as stream:
        size = stream.seek(0, 2)
        ((name, x),) = foreign.read_npz(stream, _chosen, max(FREE, RATIO * size)).items()
        if x.dtype != np.uint8 or x.ndim != 4 or 3 not in (x.shape[1], x.shape[3]) or not x.size:
            raise FileRefused(
                f"array {name}: expected bytes (N, 3, height, width) or (N, height, width, 3); "
                f"found {x.dtype} of shape {x.shape}"
            )
        return x if x.shape[1] == 3 else np.ascontiguousarray(x.transpose(0, 3, 1, 2))


def _chosen(names: list[str]) -> list[str]:
    if "x" not in names and len(names) != 1:
        raise FileRefused(f"expected an array x, or one array; found {', '.join(names) or 'none'}")
    return ["x"] if "x" in names else names


def _digest(pieces: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()
