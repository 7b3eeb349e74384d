"""npdrt.data: data sets as host arrays, where they come from, and the order of their batches."""

from npdrt.data.dataset import Dataset, load
from npdrt.data.fetch import fetch, listing, verify
from npdrt.data.sampler import Sampler

__all__ = ["Dataset", "Sampler", "fetch", "listing", "load", "verify"]
