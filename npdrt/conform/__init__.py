"""The referee: it runs conformance vectors through an optimizer and judges its answers.

`npdrt.conform.check(optimizer, rule="adam")` is its one line for a test suite.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from npdrt.conform.checking import Disagrees, check

__all__ = ["Disagrees", "check"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module("npdrt.conform.checking"), name)
    raise AttributeError(f"module 'npdrt.conform' has no attribute {name!r}")
