"""Recipes: one TOML file a figure, every value beside its source.

A recipe names its paper and statement, the study that reads its runs, and the runs themselves as
grids of training configurations at three scales. Format: docs/recipes.md.
"""

from __future__ import annotations

import itertools
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from npdrt.errors import Error, FileRefused
from npdrt.train.config import Config, check_names

RECIPES = Path(__file__).parent / "recipes"
SCALES = ("full", "quick", "smoke")
KEYS = ("title", "source", "statement", "study", "config", "options", "reference", *SCALES)
SCALE_KEYS = ("note", "config", "options", "grid")
RUN_OPTIONS = ("eager", "fast", "device")  # how to run, not what: the command's affair


@dataclass(frozen=True)
class Recipe:
    """A recipe at one scale.

    name: "fromage/figure-1" for a bundled one, else the file's path. title, source, statement:
    the figure, the paper's page and what it claims. study: the name of the analysis; options: its
    settings. reference: the authors' numbers, in the form that the study reads. note: what the
    scale leaves out. configs: the runs, in order.
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


def load(name: str, scale: str = "full") -> Recipe:
    """The recipe of that bundled name or path at a scale: full, quick or smoke.

    A scale's own `config` and `options` go over the recipe's, its `grid` replaces every other.
    Raises Error for an unknown name or key (with a suggestion) and FileRefused for what is not
    TOML.
    """
    check_names("scale", {scale: None}, list(SCALES))
    path = _path(name)
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise FileRefused(f"{path} is not TOML: {error}") from error
    check_names(f"key of {name}", content, list(KEYS))
    if scale not in content:
        known = ", ".join(s for s in SCALES if s in content)
        raise Error(f"{name} has no scale {scale!r}; it has {known or 'none'}")
    part = content[scale]
    check_names(f"key of {name}, [{scale}]", part, list(SCALE_KEYS))
    base = {**content.get("config", {}), **part.get("config", {})}
    return Recipe(
        name=name,
        scale=scale,
        options={**content.get("options", {}), **part.get("options", {})},
        reference=content.get("reference", {}),
        note=part.get("note", ""),
        configs=tuple(_configs(name, base, part.get("grid", []))),
        **{key: _text(name, content, key) for key in ("title", "source", "statement", "study")},
    )


def _path(name: str) -> Path:
    if name.endswith(".toml"):
        path = Path(name)
        if not path.is_file():
            raise Error(f"recipe {name} does not exist, seen from {Path.cwd()}")
        return path
    if name not in names():
        close = get_close_matches(name, names(), 1)
        hint = f"did you mean {close[0]!r}?" if close else f"use one of {', '.join(names())}"
        raise Error(f"unknown recipe {name!r}; {hint}, or the path of a TOML file")
    return RECIPES / f"{name}.toml"


def _text(name: str, content: Mapping[str, Any], key: str) -> str:
    if not isinstance(content.get(key), str):
        raise Error(f"{name}: expected {key} = a text; got {content.get(key)!r}")
    return " ".join(content[key].split())


def _configs(name: str, base: Mapping[str, Any], grids: Any) -> Iterator[Config]:
    """The configurations of all grids: in each, the product of the values given as lists."""
    for grid in grids:
        _check_settings(name, {**base, **grid})
        varied = {key: value for key, value in grid.items() if isinstance(value, list)}
        for values in itertools.product(*varied.values()):
            yield _config({**base, **grid, **dict(zip(varied, values, strict=True))})


def _check_settings(name: str, settings: Mapping[str, Any]) -> None:
    """Raise for a key that is neither a setting nor "model_options.x" or "optimizer_options.x"."""
    known = [f.name for f in fields(Config) if f.name not in RUN_OPTIONS]
    check_names(f"setting in {name}", {key.partition(".")[0]: None for key in settings}, known)


def _config(settings: Mapping[str, Any]) -> Config:
    """The configuration of one run; "model_options.depth" goes into model_options. A run of a
    recipe uses one thread unless it says otherwise, so that its bits do not depend on the cores."""
    plain: dict[str, Any] = {"threads": 1}
    for key, value in settings.items():
        group, _, option = key.partition(".")
        plain[group] = {**plain.get(group, {}), option: value} if option else value
    return Config.from_dict(plain)
