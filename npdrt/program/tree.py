"""Nested arguments and results: dicts, tuples, lists and dataclasses with arrays as leaves."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from npdrt.random import Random

Path = tuple[str, ...]


class Leaf:
    """A dataclass that is a leaf itself: it is never taken apart."""

    __slots__ = ()


def leaves(tree: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """`(path, leaf)` of every leaf, in order; a dict's key or a field's name is one step."""
    if isinstance(tree, dict):
        for key, item in tree.items():
            yield from leaves(item, (*path, str(key)))
    elif isinstance(tree, tuple | list):
        for i, item in enumerate(tree):
            yield from leaves(item, (*path, str(i)))
    elif _is_container(tree):
        for field in dataclasses.fields(tree):
            yield from leaves(getattr(tree, field.name), (*path, field.name))
    else:
        yield path, tree


def rebuild(tree: Any, change: Callable[[Any], Any]) -> Any:
    """The same containers with every leaf changed."""
    if isinstance(tree, dict):
        return {key: rebuild(item, change) for key, item in tree.items()}
    if isinstance(tree, tuple | list):
        return getattr(type(tree), "_make", type(tree))(rebuild(item, change) for item in tree)
    if _is_container(tree):
        fields = [f.name for f in dataclasses.fields(tree)]
        return dataclasses.replace(tree, **{n: rebuild(getattr(tree, n), change) for n in fields})
    return change(tree)


def _is_container(tree: Any) -> bool:
    """Whether it is a dataclass instance that holds leaves; a `Random` is a leaf itself."""
    return dataclasses.is_dataclass(tree) and not isinstance(tree, type | Leaf | Random)
