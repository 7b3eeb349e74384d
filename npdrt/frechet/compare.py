"""The distance of two sets of images, and what may be compared with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from npdrt.frechet import cached
from npdrt.frechet.distance import Statistics, distance, statistics
from npdrt.frechet.images import Source
from npdrt.frechet.networks import BATCH, INCEPTION, Extractor, features

STRETCH = "each image stretched to 0..255"  # see `npdrt.frechet.images.stretched`


@dataclass(frozen=True)
class Report:
    """A distance. name: "FID", or another name with the features. features, weights, width: the
    network, the SHA-256 of its weights, how many features. made, real: what was compared, and how
    many images. notes: what to know before comparing the distance with another one."""

    name: str
    distance: float
    features: str
    weights: str
    width: int
    made: str
    made_images: int
    real: str
    real_images: int
    stretch: bool
    notes: tuple[str, ...]


def compare(
    network: Extractor,
    made: Source,
    real: Source,
    *,
    stretch: bool = False,
    batch: int = BATCH,
    progress: Callable[[str, int, int], None] = lambda label, done, total: None,
    warn: Callable[[str], None] = lambda text: None,
) -> Report:
    """The distance of the images `made` from `real` ones, whose statistics are kept for next time.

    stretch: stretch every image first, as the authors of Bernstein et al. 2020 did.
    """

    def measure(images: Source, label: str) -> Statistics:
        chosen = images.stretched() if stretch else images
        told = partial(progress, label)
        return statistics(features(network, chosen, batch=batch, progress=told))

    ours = measure(made, "made")
    file = cached.place(network, real, STRETCH if stretch else "")
    theirs = cached.kept(file, lambda: measure(real, "real"), warn)
    width, sizes = len(ours.mean), (len(made), len(real))
    return Report(
        name=network.distance,
        distance=distance(ours, theirs),
        features=network.name,
        weights=network.digest,
        width=width,
        made=made.what,
        made_images=len(made),
        real=real.what,
        real_images=len(real),
        stretch=stretch,
        notes=tuple(_notes(network, width, sizes, stretch)),
    )


def _notes(network: Extractor, width: int, sizes: tuple[int, int], stretch: bool) -> Iterator[str]:
    if network.digest != INCEPTION:
        yield "not the FID: compare it only with distances in the same features"
    if min(sizes) <= width:
        yield (
            f"{min(sizes)} images have a singular covariance of {width} features: the distance is "
            "too large by an amount that depends on their number"
        )
    yield (
        f"compare it only with distances of {sizes[0]} made and {sizes[1]} real images, "
        f"{'' if stretch else 'not '}stretched one by one"
    )
