"""How many nodes a CUDA graph has: kernels, copies and fills."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any


def count_nodes(graph: Any) -> int | None:
    """The nodes of a graph that CuPy captured; None if the driver does not say.

    CuPy has no function for it. A graph of the runtime is one of the driver.
    """
    driver, count = _driver(), ctypes.c_size_t()
    ask = getattr(driver, "cuGraphGetNodes", None)
    if ask is None or ask(ctypes.c_void_p(graph.graph), None, ctypes.byref(count)):
        return None
    return count.value


@cache
def _driver() -> Any:
    """The driver's library, which is loaded if there is a device."""
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
