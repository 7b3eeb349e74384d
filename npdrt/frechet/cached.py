"""Statistics of real images, kept from one command to the next.

They are in the folder `frechet` of npdrt's part of the user's cache. A file's name is a digest of
all that they depend on: the images, the weights of the network, and how the images were read.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from npdrt import atomic
from npdrt.data.bounded import contents
from npdrt.data.fetch import user_cache
from npdrt.errors import DiskError, Error, FileRefused
from npdrt.frechet.distance import Statistics
from npdrt.frechet.images import Source
from npdrt.frechet.networks import Extractor
from npdrt.store import foreign

VERSION = 1  # of the numbers: another one if features or statistics change


def place(network: Extractor, images: Source, how: str) -> Path | None:
    """The file for the statistics of such features; None without a folder for caches.

    how: what else was done to the images.
    """
    cache = user_cache()
    about = [VERSION, network.digest, images.fingerprint(), len(images), how]
    name = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:32]
    return None if cache is None else cache / "frechet" / f"{name}.npz"


def kept(
    path: Path | None, make: Callable[[], Statistics], warn: Callable[[str], None]
) -> Statistics:
    """The statistics in the file at `path`; if there is none, those of `make`, which it then holds.

    A damaged file is replaced, and a file that cannot be written is no reason to fail: `warn` says
    so.
    """
    if path is not None and path.exists():
        try:
            return _read(path)
        except FileRefused as error:
            warn(f"{error}; its statistics are made again")
    made = make()
    if path is not None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic.replace(path, _content(made))
        except (OSError, DiskError, Error) as error:
            warn(f"the statistics of the real images are not kept: {error}")
    return made


def _content(made: Statistics) -> bytes:
    out = io.BytesIO()
    np.savez(out, n=np.int64(made.n), mean=made.mean, covariance=made.covariance)
    return out.getvalue()


def _read(path: Path) -> Statistics:
    content = contents(path)
    fields = list(Statistics._fields)
    try:
        found = foreign.read_npz(io.BytesIO(content), lambda _: fields, len(content))
    except (FileRefused, KeyError) as error:
        raise FileRefused(f"{path}: damaged: {error}") from error
    n, mean, covariance = (found[name] for name in fields)
    square = mean.shape * 2 == covariance.shape and n.shape == ()
    if not square or not all(np.isfinite(a).all() for a in (n, mean, covariance)) or n < 2:
        raise FileRefused(f"{path}: damaged: its arrays are not the statistics of features")
    return Statistics(int(n), mean.astype(np.float64), covariance.astype(np.float64))
