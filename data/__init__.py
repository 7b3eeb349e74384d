"""npdrt.data: data sets as host arrays, their downloads, the order of their batches, and the
augmentation of images."""

from npdrt.data.ahead import Ahead
from npdrt.data.augment import AUGMENTS
from npdrt.data.dataset import Dataset
from npdrt.data.fetch import fetch, listing, verify
from npdrt.data.images import Images
from npdrt.data.load import load
from npdrt.data.sampler import Sampler

__all__ = [
    "AUGMENTS",
    "Ahead",
    "Dataset",
    "Images",
    "Sampler",
    "fetch",
    "listing",
    "load",
    "verify",
]
