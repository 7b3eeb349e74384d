"""How far two sets of images are from each other: the Frechet distance of their features.

    network = frechet.load()                     # EfficientNet-Lite0, or load(path) for others
    real = frechet.features(network, images)     # (N, 3, H, W), bytes -> (N, features)
    made = frechet.features(network, others)
    frechet.frechet(real, made)

Where to look:

    distance    the distance of two normal distributions, and the statistics of features
    networks    which network a file of weights is for, and what the distance is called with it
    resize      images of any size as the networks want them
    images      folders, npz files and data sets as images, and the authors' stretch
    compare     the report of `npdrt fid`
    cached      statistics of real images, kept from one command to the next
"""

from npdrt.frechet.distance import Statistics, distance, frechet, statistics
from npdrt.frechet.networks import Extractor, features, load

__all__ = ["Extractor", "Statistics", "distance", "features", "frechet", "load", "statistics"]
