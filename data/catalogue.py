"""The data sets npdrt knows by name, from sources.toml."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Collection
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from npdrt.data.scale import Channels, Scale, from_constants, usual_names
from npdrt.errors import Error, FileRefused

# Their modules find them (text.py, squad.py): npdrt knows no place to download them from.
LOCAL = (
    "wikitext-2", "sample-text", "squad", "sample-squad", "imagenet", "imagenette",
    "sample-imagenet",
)  # fmt: skip


@dataclass(frozen=True)
class File:
    """One published file: its name and its `algorithm:digest`.

    role: the array in it (x, y, x_test, y_test), the set it belongs to (train, test), or "all".
    bytes: its size, 0 if that is not published. records: the number of images in it, if the
    format does not state it.
    """

    role: str
    name: str
    hash: str
    bytes: int = 0
    records: int = 0

    @property
    def names(self) -> tuple[str, str]:
        """Its name, and that of the same file without .gz, which readers take too."""
        return self.name, self.name.removesuffix(".gz")


@dataclass(frozen=True)
class Form:
    """One form in which a data set is published.

    reader: a name in `npdrt.data.load.READERS`. folder: the folder with the files, inside the data
    set's own; "" if there is none. archive: the .tar.gz with all files; None if each file is
    published.
    """

    reader: str
    files: tuple[File, ...]
    folder: str = ""
    archive: File | None = None

    @property
    def bytes(self) -> int:
        """The size of a download."""
        return self.archive.bytes if self.archive else sum(file.bytes for file in self.files)

    def enough(self, files: Collection[File]) -> bool:
        """Whether these files are enough for a data set: at least one of each role.

        Only training sets are published in several files of one role.
        """
        return {file.role for file in files} == {file.role for file in self.files}


@dataclass(frozen=True)
class Source:
    """One data set: what it is, where it comes from and how it is standardised.

    image: (channels, height, width) of one example; None if it is not an image. classes: None for
    float targets. mirrors: URLs, ending in /, of the folders
    with its files; none if the files are part of the package. forms: the forms it may have on the
    disk; the first one is downloaded. scale: the standardisation; scales: others, by name.
    """

    name: str
    what: str
    licence: str
    citation: str
    image: tuple[int, int, int] | None
    classes: int | None
    scale: Scale | Channels
    scales: dict[str, Scale | Channels]
    mirrors: tuple[str, ...]
    forms: tuple[Form, ...]

    @property
    def bundled(self) -> bool:
        """Whether the files are part of the package."""
        return not self.mirrors

    @property
    def bytes(self) -> int:
        """The size of a download."""
        return self.forms[0].bytes


def package_file(name: str) -> Traversable:
    """A file that is part of npdrt.data."""
    return resources.files("npdrt.data").joinpath(name)


def sources(catalogue: Path | None = None) -> dict[str, Source]:
    """Every known data set by name; `catalogue` replaces the sources.toml of the package."""
    place = catalogue or package_file("sources.toml")
    try:
        entries = tomllib.loads(place.read_text(encoding="utf-8"))
        return {name: _source(name, entry) for name, entry in entries.items()}
    except (OSError, LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise FileRefused(f"{place}: not a catalogue of data sets: {error!r}") from error


OWN = (
    "; or give the path of a FILE.npz with arrays x and y, folder:PATH with images, or text:PATH "
    "with train.txt, valid.txt and test.txt"
)


def find(name: str, catalogue: Path | None = None, *, paths: bool = True) -> Source:
    """The data set called `name`; Error with suggestions if there is none.

    paths: whether they name the forms in which a user gives data of their own.
    """
    known = sources(catalogue)
    if name in known:
        return known[name]
    if name in LOCAL:
        raise Error(f"npdrt has no download and no digests of {name!r}; it can only load it")
    offered = [*known, *LOCAL] if paths else list(known)
    near = difflib.get_close_matches(name.lower(), [*known, *LOCAL], n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    own = OWN if paths else ""
    raise Error(f"unknown data set {name!r}; {hint}known: {', '.join(offered)}{own}")


def _source(name: str, entry: dict[str, Any]) -> Source:
    constants, others = entry.pop("scale", {}), entry.pop("scales", {})
    forms = entry.pop("forms", None) or [
        {"reader": entry.pop("reader", "idx"), "files": entry.pop("files")}
    ]
    image = entry.pop("image", None)
    return Source(
        name=name,
        image=tuple(image) if image else None,
        classes=entry.pop("classes", None),
        mirrors=tuple(entry.pop("mirrors")),
        scale=from_constants(**constants),
        scales=usual_names(constants.get("divisor", 1.0))
        | {name: from_constants(**values) for name, values in others.items()},
        forms=tuple(_form(**form) for form in forms),
        **entry,
    )


def _form(files: list[Any], archive: dict[str, Any] | None = None, **about: str) -> Form:
    found = File(role="archive", **archive) if archive else None
    return Form(files=tuple(File(**file) for file in files), archive=found, **about)
