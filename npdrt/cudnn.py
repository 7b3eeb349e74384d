"""Convolutions of CuPy's arrays by cuDNN, if you ask for them (extra `cudnn`).

    with npdrt.cudnn.convolutions("cudnn"):
        y = ops.conv2d(x, weight)

cuDNN chooses among many algorithms. Here it may take only those whose results are the same each
time, and in float32 those without tensor cores, unless TF32 is asked for
(`npdrt.cublas.precision`); Winograd's only with form="winograd". The choice is cuDNN's own
heuristic, by shapes, device and version, so that an eager step and a replayed one have the same
bits. Grouped convolutions stay with `npdrt.kernels.convolution`.

cuDNN's float32 kernels read images as (N, C, H, W). Activations are (C, N, H, W), so each call
copies its images into that order and back.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

from npdrt import cublas
from npdrt.errors import Error, Unavailable

Array = Any
Shape = tuple[int, ...]
CONVOLUTIONS = ("npdrt", "cudnn")
REDUCED = ("TENSOR_CORE", "DOWN_CONVERT_INPUTS", "REDUCED_PRECISION_REDUCTION")


class Product(NamedTuple):
    """One of the three products of a convolution, in cuDNN's words. operands: their names, in
    the order of `npdrt.ops.convolution`. images: which of both operands, and whether the result,
    are images rather than a weight."""

    method: str
    operands: tuple[str, str]
    images: tuple[bool, bool, bool]


PRODUCTS = {
    "convolve": Product("conv_fprop", ("image", "weight"), (True, False, True)),
    "convolve_input": Product("conv_dgrad", ("loss", "filter"), (True, False, True)),
    "convolve_weight": Product("conv_wgrad", ("loss", "image"), (True, True, False)),
}


class Cudnn:
    """A handle of cuDNN on the current device, and the plans made with it.

    xp: CuPy. library: the module `cudnn` of nvidia-cudnn-frontend; None imports it.
    """

    def __init__(self, xp: Any, library: Any = None):
        self.xp, self.library = xp, load() if library is None else library
        self.handle = self.library.create_handle()
        weakref.finalize(self, self.library.destroy_handle, self.handle).atexit = False
        self.plans: dict[Any, tuple[Any, list[Any]]] = {}

    def write(self, function: str, out: Array, first: Array, second: Array, **setting: Any) -> None:
        """Fill `out` with a product of a convolution, on the current stream: a name in
        `PRODUCTS`, the contiguous arrays and the settings of `npdrt.ops.convolution`."""
        images = PRODUCTS[function].images
        given = [
            self._swapped(x) if yes else x
            for x, yes in zip((first, second), images[:2], strict=True)
        ]
        n, c = out.shape[:2]
        result = self.xp.empty((c, n, *out.shape[2:]), dtype=out.dtype) if images[2] else out
        arrays = (*given, result)
        self.library.set_stream(handle=self.handle, stream=self.xp.cuda.get_current_stream().ptr)
        graph, tensors = self._plan(function, arrays, setting)
        room = self.xp.empty(max(1, graph.get_workspace_size()), dtype="uint8")
        pointers = {t: int(x.data.ptr) for t, x in zip(tensors, arrays, strict=True)}
        graph.execute(pointers, int(room.data.ptr), handle=self.handle)
        if result is not out:
            self.xp.copyto(out, result.swapaxes(0, 1))

    def _swapped(self, x: Array) -> Array:
        """(C, N, H, W) as (N, C, H, W), contiguous."""
        c, n = x.shape[:2]
        made = self.xp.empty((n, c, *x.shape[2:]), dtype=x.dtype)
        self.xp.copyto(made, x.swapaxes(0, 1))
        return made

    def _plan(self, function: str, arrays: tuple[Array, ...], setting: Any) -> Any:
        """cuDNN's graph of a product, and its tensors in the order of the arrays."""
        unwanted = forbidden(str(arrays[0].dtype), setting.get("form", "direct"))
        shapes = tuple(x.shape for x in arrays)
        key = (
            function,
            str(arrays[0].dtype),
            shapes,
            setting["stride"],
            setting["padding"],
            unwanted,
        )
        if key not in self.plans:
            try:
                self.plans[key] = self._planned(*key)
            except Exception as error:
                raise Error(
                    f"cuDNN has no plan for {PRODUCTS[function].method} of {shapes[0]} and "
                    f"{shapes[1]} without {', '.join(unwanted).lower()}: {error}; use the "
                    'convolutions of npdrt (convolutions="npdrt")'
                ) from error
        return self.plans[key]

    def _planned(
        self,
        function: str,
        dtype: str,
        shapes: tuple[Shape, ...],
        stride: Shape,
        padding: Shape,
        unwanted: tuple[str, ...],
    ) -> tuple[Any, list[Any]]:
        library, product = self.library, PRODUCTS[function]
        kind = library.data_type.FLOAT if dtype == "float32" else library.data_type.DOUBLE
        graph = library.pygraph(
            io_data_type=kind, intermediate_data_type=kind, compute_data_type=kind,
            handle=self.handle,
        )  # fmt: skip
        operands = [
            graph.tensor(dim=list(shape), stride=strides(shape), data_type=kind, name=name)
            for name, shape in zip(product.operands, shapes[:2], strict=True)
        ]
        made = getattr(graph, product.method)(
            **dict(zip(product.operands, operands, strict=True)),
            padding=list(padding), stride=list(stride), dilation=[1, 1],
        )  # fmt: skip
        made.set_output(True).set_data_type(kind)
        made.set_dim(list(shapes[2])).set_stride(strides(shapes[2]))
        graph.validate()
        graph.build_operation_graph()
        graph.create_execution_plans([library.heur_mode.A, library.heur_mode.FALLBACK])
        graph.deselect_numeric_notes([getattr(library.numerical_note, name) for name in unwanted])
        graph.check_support()
        graph.build_plans()
        return graph, [*operands, made]


def forbidden(dtype: str, form: str) -> tuple[str, ...]:
    """The properties (cuDNN's numerical notes) of algorithms that may not be taken."""
    exact = dtype == "float64" or not cublas.takes_tf32()
    winograd = () if form == "winograd" else ("WINOGRAD",)
    return ("NONDETERMINISTIC", "FFT", *winograd, *(REDUCED if exact else ()))


def strides(shape: Shape) -> list[int]:
    """Of a contiguous array, in elements."""
    found = [1]
    for n in reversed(shape[1:]):
        found.insert(0, found[0] * n)
    return found


@cache
def load() -> Any:
    """The module `cudnn`, whose handle can be made."""
    try:
        import cudnn

        cudnn.backend_version()  # loads the library
        return cudnn
    except Exception as error:
        raise Unavailable(
            f"cuDNN cannot be loaded ({error}); install it with pip install "
            '"npdrt[cudnn]" nvidia-cudnn-cu12 (or -cu13, for your CuPy)'
        ) from error


def version() -> str:
    """The version of cuDNN: "9.10.2"."""
    number = int(load().backend_version())
    return f"{number // 10000}.{number // 100 % 100}.{number % 100}"


# --- whether --------------------------------------------------------------------------------

_of_thread = threading.local()


@contextmanager
def convolutions(name: str) -> Iterator[None]:
    """Inside, convolutions of this thread on a GPU are made by "npdrt", the default, or "cudnn".

    A CUDA graph keeps the way in which its program was captured.
    """
    if name not in CONVOLUTIONS:
        raise Error(f"unknown convolutions {name!r}; use one of {', '.join(CONVOLUTIONS)}")
    if name == "cudnn":
        load()
    before = getattr(_of_thread, "chosen", "npdrt")
    _of_thread.chosen = name
    try:
        yield
    finally:
        _of_thread.chosen = before


def takes(groups: int) -> bool:
    """Whether cuDNN makes the convolution."""
    return groups == 1 and getattr(_of_thread, "chosen", "npdrt") == "cudnn"


def write(function: str, library: Any, *arrays: Array, **setting: Any) -> None:
    """`Cudnn.write` with a handle for this thread, device and stream."""
    handles = _of_thread.__dict__.setdefault("handles", {})
    key = library.cuda.Device().id, library.cuda.get_current_stream().ptr
    if key not in handles:
        handles[key] = Cudnn(library)
    handles[key].write(function, *arrays, **setting)
