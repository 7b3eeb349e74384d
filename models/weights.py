"""Parameters under the names of other frameworks, in safetensors files, both ways.

A model that has `pytorch_names()`, ours -> theirs, can be read and written. The shapes are the
same on both sides, so the bits are too.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from npdrt import atomic
from npdrt.arrays import Params, to_host
from npdrt.errors import FileRefused
from npdrt.store import foreign

Arrays = dict[str, np.ndarray[Any, Any]]
SHOWN = 8  # names in a message
# The prefixes of arrays for other heads, and buffers that are not parameters.
OTHER_HEADS = ("bert.pooler.", "cls.", "classifier.")
BUFFERS = ("bert.embeddings.position_ids", "pos_encoder.pe", "src_mask")


class Named(Protocol):
    """A model that names its parameters."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The name and shape of every parameter."""

    def pytorch_names(self) -> dict[str, str]:
        """Our name -> theirs."""


def load(path: Path, model: Named, *, optional: Collection[str] = ()) -> Params:
    """The parameters of `model` from a safetensors file, on the host, under our names.

    The file's floats are kept as they are (float16, float32 or float64). optional: parameters
    that the file may lack; they are left out. Old files call a norm's weight gamma and its bias
    beta, and a file of the bare encoder has no prefix "bert."; both are understood, and a tied
    decoder's weight under either name or both. Arrays of BERT's other heads (pooler, cls) are
    ignored.

    Raises Unavailable without the library, FileRefused where the file is not safetensors, or
    lacks a parameter, or has one too many or of another shape: all such names are listed.
    """
    found = _our_spelling(read(path))
    if getattr(model, "tied", False):
        found = _once(found)
    return fit(path, found, model.pytorch_names(), model.shapes(), _passed_over, optional)


def fit(
    path: Path,
    found: Mapping[str, Any],
    names: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
    passed_over: Callable[[str], bool],
    optional: Collection[str] = (),
) -> Arrays:
    """Of the arrays found in a file those with `names`, ours -> theirs, under our names.

    passed_over: whether another array, by its name, may be there too. Raises FileRefused, which
    lists all names, if arrays are missing, unknown, of another shape than ours, not floats, or not
    finite.
    """
    missing = [t for ours, t in names.items() if t not in found and ours not in optional]
    extra = [t for t in found if t not in set(names.values()) and not passed_over(t)]
    if missing or extra:
        said = [_list("missing", missing), _list("unknown", extra)]
        raise FileRefused(
            f"{path} does not fit the model: {'; '.join(filter(None, said))}; use the file of a "
            "model with the same fields (layers, width, ...)"
        )
    held = {ours: found[theirs] for ours, theirs in names.items() if theirs in found}
    wrong = [
        f"{names[n]} is {v.dtype}{v.shape}, the model has floats {shapes[n]}"
        for n, v in held.items()
        if v.shape != tuple(shapes[n]) or v.dtype.kind != "f"
    ]
    if wrong:
        raise FileRefused(f"{path} does not fit the model: {_list('shapes', wrong)}")
    if bad := [names[n] for n, v in held.items() if not np.isfinite(v).all()]:
        raise FileRefused(f"{path}: {_list('not finite', bad)}")
    return held


def save(path: Path, model: Named, params: Params) -> None:
    """Write the parameters of `model` as safetensors under the names of the other framework,
    atomically; PyTorch and Hugging Face read it (metadata format "pt")."""
    library, names = foreign.safetensors("safetensors.numpy"), model.pytorch_names()
    values = {names[n]: np.ascontiguousarray(to_host(v)) for n, v in params.items()}
    atomic.replace(path, library.save(values, metadata={"format": "pt"}))


def read(path: Path) -> Arrays:
    """Every array of a safetensors file; bfloat16 is refused."""
    found = foreign.read_safetensors(path)
    if half := [name for name, (kind, _) in found.items() if kind == "bfloat16"]:
        raise FileRefused(f"{path}: {_list('bfloat16', half)}; save them in float32")
    return {name: value for name, (_, value) in found.items()}


def _our_spelling(found: Mapping[str, Any]) -> Arrays:
    """Old names of norms as new ones, and the prefix of the bare encoder."""
    bare = any(name.startswith(("embeddings.", "encoder.layer.")) for name in found)
    spelled = {}
    for name, value in found.items():
        name = name.replace("LayerNorm.gamma", "LayerNorm.weight")
        name = name.replace("LayerNorm.beta", "LayerNorm.bias")
        inside = bare and name.startswith(("embeddings.", "encoder.layer.", "pooler."))
        spelled[f"bert.{name}" if inside else name] = value
    return spelled


def _once(found: Arrays) -> Arrays:
    """A tied decoder's weight under the embedding's name, where it is the same or alone: PyTorch's
    `save_model` keeps one of the two names, another writer both."""
    decoder, rest = found.get("decoder.weight"), dict(found)
    if decoder is not None and np.array_equal(rest.setdefault("encoder.weight", decoder), decoder):
        del rest["decoder.weight"]
    return rest


def _passed_over(name: str) -> bool:
    return name in BUFFERS or name.startswith(OTHER_HEADS)


def _list(what: str, names: list[str]) -> str:
    """At most SHOWN of the names, and how many more."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{what}: {', '.join(names[:SHOWN])}{more}" if names else ""
