"""Files: the HDF5 container, checkpoints, traces and the log of a run."""

from npdrt.store.checkpoint import Checkpoint, load, load_newest, save

__all__ = ["Checkpoint", "load", "load_newest", "save"]
