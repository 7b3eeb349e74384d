"""Which module reads which data set.

A name of sources.toml goes to the reader that its entry states; every other kind of name belongs to
one module (FILE.npz, folder:PATH, imagenet, text:PATH, squad:PATH).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from npdrt.data import cifar, folder, idx, npz, squad, text
from npdrt.data.catalogue import Form, Source, find
from npdrt.data.dataset import Dataset
from npdrt.data.fetch import locate_form, locate_images
from npdrt.data.raw import Raw, check, make_dataset
from npdrt.data.scale import Standardise, choose

READERS: dict[str, Callable[[Path, Form, Source], Raw]] = {  # by `reader` in sources.toml
    "npz": npz.read,
    "idx": idx.read,
    "cifar-binary": cifar.read,
    "cifar-python": cifar.read,
}


def load(
    name_or_path: str | Path,
    *,
    data_dir: str | Path | None = None,
    standardise: Standardise = True,
    catalogue: Path | None = None,
) -> Dataset:
    """Load a data set by its name, or from a FILE.npz.

    name_or_path: "digits", "mnist", "fashion-mnist", "cifar-10", "cifar-100"; "folder:PATH",
    images (224x224; "folder-64:PATH" for 64x64; see `npdrt.data.folder`); "imagenet", "imagenette",
    "sample-imagenet", also with a size: "imagenet-64"; "wikitext-2",
    "text:PATH" (`npdrt.data.text`); "squad", "squad:PATH" (`npdrt.data.squad`); or the path of a
    FILE.npz.

    data_dir: a folder to look in first (`npdrt.data.fetch.locate`). standardise: subtract a mean
    and divide by a standard deviation, in float64, rounded once to float32. The constants of named
    data sets are fixed (sources.toml), for all pixels or for each channel; those of a user's file
    are measured on its x. False only casts the values to float32. The name of another
    standardisation: "unit" is [0, 1], "symmetric" is [-1, 1], and cifar-10 has "fromage". The
    `scale` of another data set: that one.
    catalogue: another sources.toml.

    CIFAR is read in its binary or its Python version, without running the latter. If some of its
    training batches are missing, the others are the training set, and `notes` says so. Its images,
    and those of a folder, become floats a batch at a time.

    A FILE.npz has arrays x and y, and optionally x_test and y_test: x (N, ...), any integers or
    floats; y labels (N,), integers from 0, or float targets (N, ...). A constant x becomes 0.

    Raises Error for an unknown name or a missing path, Unavailable if the data set has not been
    fetched, FileRefused if a file is damaged or its arrays do not fit together.
    """
    name = str(name_or_path)
    if folder.named(name):
        return folder.load(name, locate_images(name, data_dir), standardise)
    if text.named(name):
        return text.load(name, data_dir)
    if squad.named(name):
        return squad.load(name, data_dir)
    if npz.named(name):
        return npz.load(Path(name_or_path), standardise)
    source = find(name, catalogue)
    scale = choose(standardise, source.scale, source.scales, name)
    where, form = locate_form(source, data_dir)
    raw = READERS[form.reader](where, form, source)
    classes = check(raw, source.classes)
    return make_dataset(name, raw, classes, source.image, scale)
