"""Checkpoints: parameters, buffers, optimizer state and metadata, enough to resume a run."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from npdrt.arrays import Array, Params, to_host
from npdrt.errors import Error, FileRefused
from npdrt.plain import several
from npdrt.store import container

GROUPS = ("params", "buffers", "state")
DESCRIPTION = {
    "params": "trained arrays, one dataset each; linear weights are (out, in)",
    "buffers": "arrays a model keeps beside its parameters, such as running statistics",
    "state": "optimizer state: <parameter>/<slot>, and 0-d values shared by all parameters",
}


@dataclass(frozen=True)
class Checkpoint:
    """The content of a checkpoint; all arrays are on the host, in the order of saving.

    params, buffers, state: name -> array. meta: the writer's JSON values; a training run stores
    its resolved configuration, provenance and progress there.
    """

    params: Params
    buffers: Params = field(default_factory=dict)
    state: dict[str, Array] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        sizes = {group: len(getattr(self, group)) for group in GROUPS}
        values = sum(value.size for value in self.params.values())
        return (
            f"Checkpoint({', '.join(f'{n} {group}' for group, n in sizes.items() if n)}; "
            f"{values:,} parameter values; meta: {', '.join(self.meta) or 'none'})"
        )

    def check_shapes(self, shapes: Mapping[str, tuple[int, ...]], path: Path | str) -> None:
        """Raise `FileRefused` unless the parameters are exactly those of `shapes`."""
        names = self.params.keys() ^ shapes.keys()
        if names:
            raise FileRefused(
                f"{path}: parameters do not fit the model: {several(sorted(names))} "
                "in one of the two only; use the model the file was made with"
            )
        for name, shape in shapes.items():
            found = tuple(self.params[name].shape)
            if found != tuple(shape):
                raise FileRefused(
                    f"{path}: {name} has shape {found}, the model expects {tuple(shape)}; "
                    "use the model the file was made with"
                )


def save(
    path: str | os.PathLike[str],
    params: Params,
    *,
    buffers: Params | None = None,
    state: Mapping[str, Array] | None = None,
    meta: Mapping[str, Any] | None = None,
    keep_previous: Path | None = None,
) -> str:
    """Write a checkpoint atomically; returns the SHA-256 of its HDF5 image.

    params, buffers, state: dicts of arrays on any device (npdrt waits for a GPU). meta: JSON
    values. keep_previous: a path that receives the old file at `path`, by hard link. See
    `npdrt.store.container` for the format and docs/files.md for the content.

    Raises `Error` for names or dtypes that the container cannot store.
    """
    groups = {"params": params, "buffers": buffers or {}, "state": state or {}}
    arrays = {
        f"{group}/{name}": to_host(value)
        for group, members in groups.items()
        for name, value in members.items()
    }
    envelope = {"kind": "checkpoint", "groups": DESCRIPTION, "user": dict(meta or {})}
    return container.write(Path(path), arrays, envelope, keep_previous=keep_previous)


def load(
    path: str | os.PathLike[str], *, allow_nonfinite: bool = False, expect_sha256: str | None = None
) -> Checkpoint:
    """Read a checkpoint, or raise `FileRefused` with the reason.

    Parameters that are not finite are refused unless `allow_nonfinite`. expect_sha256: the digest
    that the file must have; the digest inside it shows that it is intact, not who wrote it.

    >>> import numpy as np, tempfile
    >>> path = Path(tempfile.mkdtemp()) / "weights.h5"
    >>> digest = save(path, {"layers/00/weight": np.eye(2, dtype=np.float32)})
    >>> load(path).params["layers/00/weight"].tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    path = Path(path)
    if path.is_dir():
        raise Error(
            f"{path} is a directory; npdrt.open_run opens a run, and npdrt.load reads one file of "
            f"it, as {path / 'checkpoint.h5'}"
        )
    arrays, meta = container.read(path, expect_sha256=expect_sha256)
    if meta.get("kind") != "checkpoint":
        raise FileRefused(f"{path}: expected a checkpoint; it holds {meta.get('kind')!r}")
    groups: dict[str, dict[str, Array]] = {group: {} for group in GROUPS}
    for name, value in arrays.items():
        group, _, rest = name.partition("/")
        if group not in groups or not rest:
            raise FileRefused(f"{path}: {name} is not below {', '.join(GROUPS)}")
        groups[group][rest] = value
    if not allow_nonfinite:
        _check_finite(groups["params"], path)
    user = meta.get("user")
    if not isinstance(user, dict):
        raise FileRefused(f"{path}: the metadata lacks its 'user' object")
    return Checkpoint(groups["params"], groups["buffers"], groups["state"], user)


def _check_finite(params: Params, path: Path) -> None:
    for name, value in params.items():
        if not np.isfinite(value).all():
            raise FileRefused(
                f"{path}: parameter {name} is not finite; pass allow_nonfinite to read it anyway"
            )


def checkpoints(directory: Path) -> tuple[Path, Path]:
    """The newest checkpoint of a run directory, and the one before it."""
    return directory / "checkpoint.h5", directory / "checkpoint.prev.h5"


def load_newest(directory: Path) -> tuple[Checkpoint, Path, str]:
    """The newest checkpoint of a run directory, or the previous one if the newest is refused.

    Returns (checkpoint, path, warning); the warning is "" unless it is the previous one. Raises
    `Error` if there is no checkpoint, `FileRefused` if none can be read.
    """
    newest, previous = checkpoints(directory)
    if not newest.exists() and not previous.exists():
        raise Error(container.missing(directory))
    try:
        return load(newest), newest, ""
    except FileRefused as error:
        if not previous.exists():
            raise
        why = str(error).rpartition("; ")[0] or str(error)  # without advice: npdrt follows it
        return load(previous), previous, f"{why}. Resuming from the previous checkpoint instead."
