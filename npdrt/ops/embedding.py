"""Embedding: the rows of a table by token."""

from __future__ import annotations

from typing import Any

import numpy as np

from npdrt.arrays import Array, namespace, to_host
from npdrt.errors import Error
from npdrt.ops.shape import gather

__all__ = ["embedding"]


def embedding(weight: Any, tokens: Array) -> Any:
    """Rows of a table: y[..., :] = weight[tokens[...], :].

    weight: (vocabulary, size). tokens: (...), integers in [0, vocabulary), an array, not a
    Tensor. Returns (..., size). gweight: (vocabulary, size), dense; row v is the sum of the
    cotangents of the tokens equal to v in a fixed order (`gather`), so it has the same bits on
    every thread count; cost log2(tokens) passes over the cotangent and one over the table.

    The values of tokens are not checked here: a device would have to wait, and a recorded program
    cannot check them. Call `check_tokens` where data enter. Without it, negative tokens count from
    the end, and tokens beyond the table raise an error in eager NumPy, but wrap around to another
    token's row in programs and in CuPy.
    """
    if weight.ndim != 2:
        raise Error(f"embedding: expected weight (vocabulary, size); got {tuple(weight.shape)}")
    if not namespace(tokens).isdtype(tokens.dtype, "integral"):
        raise Error(f"embedding: expected integer tokens; got {tokens.dtype}")
    return gather(weight, tokens, axis=0)


def check_tokens(tokens: Array, vocabulary: int) -> None:
    """Refuse tokens that are not integers in [0, vocabulary): for where data enter, on the host.

    Reads every token once; an array on a GPU is fetched for that, so check before uploading.

    Raises `Error` with the first token out of range and its place.
    """
    host = to_host(tokens)
    if host.dtype.kind not in "iu":
        raise Error(f"check_tokens: expected integer tokens; got {host.dtype}")
    if host.size == 0 or (host.min() >= 0 and host.max() < vocabulary):
        return
    wrong = np.flatnonzero((host < 0) | (host >= vocabulary))
    place = tuple(map(int, np.unravel_index(wrong[0], host.shape)))
    raise Error(
        f"check_tokens: {len(wrong)} token(s) are not in [0, {vocabulary}); the first is "
        f"{host[place]} at {place}; use the vocabulary the data were tokenised with"
    )
