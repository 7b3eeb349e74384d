"""The data sets npdrt knows by name, from sources.toml."""

from __future__ import annotations

import difflib
import tomllib
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from npdrt.data.scale import Scale
from npdrt.errors import Error, FileRefused


@dataclass(frozen=True)
class File:
    """One published file: its name, its size in bytes and its `algorithm:digest`.

    role: the array it holds (x, y, x_test, y_test), or "all".
    """

    role: str
    name: str
    bytes: int
    hash: str


@dataclass(frozen=True)
class Source:
    """One data set: what it is, where it comes from and how it is standardised.

    image: (channels, height, width) of one example. mirrors: the folders, as URLs ending in /,
    that hold its files; none where the files are part of the package.
    """

    name: str
    what: str
    licence: str
    citation: str
    image: tuple[int, int, int]
    classes: int
    scale: Scale
    mirrors: tuple[str, ...]
    files: tuple[File, ...]

    @property
    def bundled(self) -> bool:
        """Whether the files are part of the package."""
        return not self.mirrors

    @property
    def bytes(self) -> int:
        """Size of all files together."""
        return sum(file.bytes for file in self.files)


def package_file(name: str) -> Traversable:
    """A file that is part of npdrt.data."""
    return resources.files("npdrt.data").joinpath(name)


def sources(catalogue: Path | None = None) -> dict[str, Source]:
    """Every known data set by name; `catalogue` replaces the sources.toml of the package."""
    place = catalogue or package_file("sources.toml")
    try:
        entries = tomllib.loads(place.read_text(encoding="utf-8"))
        return {name: _source(name, entry) for name, entry in entries.items()}
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise FileRefused(f"{place}: not a catalogue of data sets: {error!r}") from error


def find(name: str, catalogue: Path | None = None) -> Source:
    """The data set called `name`; Error with suggestions where there is none."""
    known = sources(catalogue)
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name.lower(), known, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise Error(
        f"unknown data set {name!r}; {hint}Known: {', '.join(known)}; "
        "or give the path of a FILE.npz with arrays x and y"
    )


def _source(name: str, entry: dict[str, Any]) -> Source:
    files = tuple(File(**file) for file in entry.pop("files"))
    image, mirrors = tuple(entry.pop("image")), tuple(entry.pop("mirrors"))
    scale = Scale(**entry.pop("scale"))
    return Source(name=name, image=image, mirrors=mirrors, scale=scale, files=files, **entry)
