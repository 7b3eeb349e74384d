"""The settings of a run in a TOML file: `npdrt train CONFIG`, `npdrt show RUN --as-toml`.

The keys are the fields of `npdrt.train.Config`; those of the model and the rule are in the tables
[model_options] and [optimizer_options].
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from npdrt.errors import Error, FileRefused
from npdrt.regular import contents, require
from npdrt.train.config import Config

MOST_BYTES = 1 << 20  # of a file
TABLES = {"model_options": "model", "optimizer_options": "optimizer"}  # of which setting


def read_toml(path: Path) -> dict[str, Any]:
    """The TOML of a file; a byte order mark, which Windows editors write, is ignored."""
    try:
        text = contents(path, follow=True, limit=MOST_BYTES).decode("utf-8-sig")
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # of which TOMLDecodeError is one
        raise FileRefused(f"{path} is not TOML: {str(error)[:300]}") from error


def settings_in(path: Path, code: Sequence[Path] = ()) -> dict[str, Any]:
    """The settings in a file, as far as `Config` can check them; see `Config.from_dict`."""
    require(path, "file")
    found = read_toml(path)
    try:
        Config.from_dict(found, code=code)
    except Error as error:
        raise type(error)(f"{path}: {error}") from error
    return found


def merged(file: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a file with those that are given in their place. Options of the file's model
    or rule do not go to another one."""
    found = {**file, **given}
    for table, of in TABLES.items():
        stays = of not in given or given[of] == file.get(of)
        options = {**(file.get(table, {}) if stays else {}), **given.get(table, {})}
        found[table] = options
    return {name: value for name, value in found.items() if value != {}}


def as_toml(settings: Mapping[str, Any]) -> str:
    """Settings as TOML; those without a value are left out, because TOML has none."""
    known = {name: value for name, value in settings.items() if value not in (None, [], (), {})}
    plain = [_pair(name, v) for name, v in known.items() if not isinstance(v, Mapping)]
    tables = [
        f"\n[{_key(name)}]\n" + "\n".join(_pair(n, v) for n, v in table.items() if v is not None)
        for name, table in known.items()
        if isinstance(table, Mapping)
    ]
    return "\n".join([*plain, *tables])


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else _value(name)


def _pair(name: str, value: Any) -> str:
    return f"{_key(name)} = {_value(value)}"


def _value(value: Any) -> str:
    """A JSON value in TOML, whose texts, numbers and lists are written alike."""
    if isinstance(value, Mapping):
        return "{ " + ", ".join(_pair(n, v) for n, v in value.items() if v is not None) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_value, value)) + "]"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
