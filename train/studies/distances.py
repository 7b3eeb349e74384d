"""How far the images of a run's generator are from real ones, as a measure of the studies.

The distance is that of `npdrt fid` (`npdrt.frechet`). The generator's classes take turns; the
authors gave it the classes of the real images.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
from msgspec import Struct

from npdrt import arrays, frechet
from npdrt.data import Dataset
from npdrt.data.fetch import locate_local
from npdrt.errors import Error, FileRefused
from npdrt.frechet.images import stretched
from npdrt.schema import Positive
from npdrt.train.pictures import as_bytes, generator
from npdrt.train.studies.cache import Arrays, kept
from npdrt.train.studies.study import Stopped, Work
from npdrt.train.studies.sweep import Run

MEASURES = ("train_distance", "test_distance")
NAMES = {
    "inception": "FID",
    "lite0": "Frechet distance, features EfficientNet-Lite0",
    "pixels": "Frechet distance, features 8x8 pixels",
}
INCEPTION = ("inception", "pt_inception-2015-12-05-6726825d.pth")  # folder and file of the data
SIDE = 8  # of the small images whose pixels are features


class Distance(Struct):
    """features: "inception", which needs the published weights, "lite0", which needs the extra fid,
    or "pixels", those of the images made 8x8. images: of either kind. stretch: each of them, as the
    authors did."""

    features: Literal["inception", "lite0", "pixels"]
    images: Positive
    stretch: bool = True


def name(work: Work) -> str:
    """What the distance of a recipe is called, and of how many images it is."""
    asked = Distance(**work.recipe.options["distance"])
    return f"{NAMES[asked.features]}, {asked.images:,} images"


def distances(work: Work, run: Run, step: int | None = None) -> dict[str, float]:
    """Distances from the first images of the training set, and of the test set if it has as many;
    kept in the run's directory.

    step: of a snapshot; None for the last checkpoint.
    """
    asked = Distance(**work.recipe.options["distance"])
    path = run.path if step is None else run.path / "snapshots" / f"step-{step:06d}.h5"
    about = f"{asked.features}-{asked.images}{'-stretched' * asked.stretch}"
    place = "" if step is None else f"-{step:06d}"
    found = run.kept(f"distance-{about}{place}", lambda: _distances(work, run, path, asked, about))
    return {name: float(value) for name, value in found.items()}


def _distances(work: Work, run: Run, path: Path, asked: Distance, about: str) -> Arrays:
    source, where = work.data(run), arrays.device(work.options.device)
    with arrays.on(where):
        made = generator(path, where, work.options.code).images(range(asked.images))
        ours = frechet.statistics(_features(work, made, asked))
        return {
            f"{part}_distance": frechet.distance(ours, _real(work, source, part, asked, about))
            for part in ("train", "test")
            if part == "train" or _count(source.x_test) >= asked.images
        }


def _count(images: Any) -> int:
    return 0 if images is None else len(images)


def _real(
    work: Work, source: Dataset, part: str, asked: Distance, about: str
) -> frechet.Statistics:
    """The statistics of the first real images, kept in the study's directory."""
    x: Any = source.x if part == "train" else source.x_test
    if _count(x) < asked.images:
        raise Error(f"{source.name}: it has not {asked.images:,} images; ask for fewer")

    def compute() -> Arrays:
        images = np.asarray(x[: asked.images]).reshape(-1, *(source.image_shape or ()))
        return frechet.statistics(_features(work, as_bytes(images), asked))._asdict()

    file = work.out / f"real-{part}-{about}.h5"
    found = kept(file, {"kind": "real", "data": source.digests}, compute)
    return frechet.Statistics(int(found["n"]), found["mean"], found["covariance"])


def _features(work: Work, images: Any, asked: Distance) -> Any:
    """Features (N, D) of bytes (N, C, S, S)."""
    images = stretched(images) if asked.stretch else images
    if asked.features == "pixels":
        return pixels(images)
    network = frechet.load(_weights(work, asked), where=work.options.device)
    if network.distance != NAMES[asked.features]:
        raise FileRefused(f"expected weights of {NAMES[asked.features]}; found {network.name}")

    def progress(done: int, total: int) -> None:
        work.progress("features", done, total)
        if work.stop():
            raise Stopped

    return frechet.features(network, images, progress=progress)


def _weights(work: Work, asked: Distance) -> Path | None:
    """The file of Inception's weights; None for those that a package has."""
    if asked.features == "lite0":
        return None
    folder, file = INCEPTION
    remedy = f"npdrt cannot download it; put mseitzer/pytorch-fid's {file} there"
    return locate_local(folder, work.options.data_dir, [file], remedy) / file


def pixels(images: Any) -> Any:
    """The pixels (N, C 64), from 0 to 1, of images (N, C, S, S) made 8x8 by means of squares."""
    n, channels, side, _ = images.shape
    squares = images.reshape(n, channels, SIDE, side // SIDE, SIDE, side // SIDE)
    return squares.mean((3, 5)).reshape(n, -1) / 255.0
