"""How a kernel is described, compiled and launched."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

Array = Any  # of CuPy, contiguous
Shape = tuple[int, ...]
OPTIONS = ("--fmad=false", "--prec-div=true", "--prec-sqrt=true")
TYPES = {"float32": "float", "float64": "double"}


@dataclass(frozen=True)
class Kernel:
    """What computes a composite function (`npdrt.arrays.composite`) on a GPU.

    shape(*arrays, **settings): the shape of the result, of anything that has shapes; ValueError if
    they do not fit. write(library, out, *arrays, **settings): fill `out`, on the current stream of
    CuPy, the library, without waiting for it. The arrays are contiguous, and the result has the
    dtype of the first.
    """

    shape: Callable[..., Shape]
    write: Callable[..., None]

    def __call__(self, library: Any, *arrays: Array, **settings: Any) -> Array:
        """The result in a new array."""
        given = [_contiguous(library, x) for x in arrays]
        out = library.empty(self.shape(*given, **settings), dtype=given[0].dtype)
        self.write(library, out, *given, **settings)
        return out


def _contiguous(library: Any, x: Array) -> Array:
    if x.flags.c_contiguous:
        return x
    made = library.empty(x.shape, dtype=x.dtype)
    library.copyto(made, x)
    return made


def launch(
    library: Any,
    source: str,
    name: str,
    blocks: int,
    threads: int,
    args: tuple[Any, ...],
    **names: Any,
) -> None:
    """Run the kernel `name` of a source, on which `names` are defined, in so many blocks."""
    if blocks:
        defined = "".join(f"#define {key} {value}\n" for key, value in sorted(names.items()))
        compiled(library, defined + source, name)((blocks,), (threads,), args)


@cache
def compiled(library: Any, source: str, name: str) -> Any:
    """The kernel of that name."""
    return library.RawKernel(source, name, options=OPTIONS)


def ceil(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)
