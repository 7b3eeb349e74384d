"""Recipes: one TOML file a figure, every value with its source in a comment.

A recipe names its paper and statement, the study that reads its runs, and the runs themselves as
grids of training configurations at three scales. Format: docs/recipes.md.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from msgspec import Struct

from npdrt import schema
from npdrt.errors import Error, FileRefused
from npdrt.regular import require
from npdrt.train.config import Config
from npdrt.train.own import check_names
from npdrt.train.settings_file import read_toml

RECIPES = Path(__file__).parent / "recipes"
SCALES = ("full", "quick", "smoke")
TEXTS = ("title", "source", "statement", "study")
KEYS = (*TEXTS, "config", "options", "reference", *SCALES)
SCALE_KEYS = ("note", "config", "options", "grid")
RUN_OPTIONS = ("eager", "fast", "device", "decoders")  # how to run, not what: the command's affair
MOST_RUNS = 10_000  # of a recipe at one scale


class Scale(Struct):
    """The outer form of a scale."""

    note: str = ""
    config: dict[str, Any] = {}
    options: dict[str, Any] = {}
    grid: list[dict[str, Any]] = []


class Outer(Struct):
    """The outer form of a recipe; studies declare their options."""

    title: str
    source: str
    statement: str
    study: str
    config: dict[str, Any] = {}
    options: dict[str, Any] = {}
    reference: dict[str, Any] = {}
    full: Scale | None = None
    quick: Scale | None = None
    smoke: Scale | None = None


@dataclass(frozen=True)
class Recipe:
    """A recipe at one scale.

    name: "fromage/figure-1" for a bundled one, else the file's path. title, source, statement:
    the figure, the paper's page and its claim. study: the name of the analysis; options: its
    settings. reference: the authors' numbers, in the form that the study reads. note: the
    omissions of the scale. configs: the runs, in order.
    """

    name: str
    scale: str
    title: str
    source: str
    statement: str
    study: str
    note: str
    options: Mapping[str, Any]
    reference: Mapping[str, Any]
    configs: tuple[Config, ...]


def names() -> list[str]:
    """The names of the bundled recipes."""
    found = (path.relative_to(RECIPES).with_suffix("") for path in RECIPES.rglob("*.toml"))
    return sorted(name.as_posix() for name in found)


def load(name: str, scale: str = "full", *, code: Sequence[Path] = ()) -> Recipe:
    """The recipe of that bundled name or path at a scale: full, quick or smoke.

    A scale's own `config` and `options` go over the recipe's, its `grid` replaces every other.
    code: the Python files of users' models that may be run (`Config.from_dict`).

    Raises Error for an unknown name or key (with a suggestion), for more than MOST_RUNS runs and
    for a model file that is not in `code`; FileRefused for a file that is not TOML
    or a value of another type.
    """
    check_names("scale", {scale: None}, list(SCALES))
    content = read_toml(_path(name))
    check_names(f"key of {name}:", content, list(KEYS))
    if scale not in content:
        known = ", ".join(s for s in SCALES if s in content)
        raise Error(f"{name} has no scale {scale!r}; it has {known or 'none'}")
    schema.check(content, Outer, name)
    part = content[scale]
    check_names(f"key of {name}, [{scale}]:", part, list(SCALE_KEYS))
    base = {**content.get("config", {}), **part.get("config", {})}
    return Recipe(
        name=name,
        scale=scale,
        options={**content.get("options", {}), **part.get("options", {})},
        reference=content.get("reference", {}),
        note=part.get("note", ""),
        configs=tuple(_configs(name, base, part.get("grid", []), code)),
        **{key: " ".join(content[key].split()) for key in TEXTS},
    )


def _path(name: str) -> Path:
    if name.endswith(".toml"):
        path = Path(name)
        require(path)
        return path
    if name not in names():
        close = get_close_matches(name, names(), 1)
        hint = f"did you mean {close[0]!r}?" if close else f"use one of {', '.join(names())}"
        raise Error(f"unknown recipe {name!r}; {hint}, or the path of a TOML file")
    return RECIPES / f"{name}.toml"


def _configs(
    name: str, base: Mapping[str, Any], grids: Sequence[Mapping[str, Any]], code: Sequence[Path]
) -> Iterator[Config]:
    """The configurations of all grids: in each, the product of the values given as lists."""
    lists = [{key: value for key, value in g.items() if isinstance(value, list)} for g in grids]
    runs = sum(math.prod(map(len, varied.values())) for varied in lists)
    if runs > MOST_RUNS:
        raise Error(f"{name}: its grids make {runs:,} runs; a recipe has {MOST_RUNS:,} at most")
    for grid, varied in zip(grids, lists, strict=True):
        _check_settings(name, {**base, **grid})
        for values in itertools.product(*varied.values()):
            settings = {**base, **grid, **dict(zip(varied, values, strict=True))}
            yield _config(name, settings, code)


def _check_settings(name: str, settings: Mapping[str, Any]) -> None:
    """Raise for a key that is neither a setting nor "model_options.x" or "optimizer_options.x"."""
    known = [f.name for f in fields(Config) if f.name not in RUN_OPTIONS]
    check_names(f"setting in {name}:", {key.partition(".")[0]: None for key in settings}, known)


def _config(name: str, settings: Mapping[str, Any], code: Sequence[Path]) -> Config:
    """The configuration of one run; "model_options.depth" goes into model_options. A run of a
    recipe uses one thread unless it says otherwise, so that its bits do not depend on the cores."""
    plain: dict[str, Any] = {"threads": 1}
    for key, value in settings.items():
        group, _, option = key.partition(".")
        if option and not isinstance(plain.get(group, {}), dict):
            raise FileRefused(f"{name}: {group} is a table and another value")
        plain[group] = {**plain.get(group, {}), option: value} if option else value
    try:
        return Config.from_dict(plain, code=code)
    except Error as error:
        raise type(error)(f"{name}: {error}") from error
