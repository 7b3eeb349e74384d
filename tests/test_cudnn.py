"""Convolutions by cuDNN: what it is asked for means the convolution. On a strict stand-in for its
frontend, and where there is a device; the words of the frontend, where it is installed."""

from __future__ import annotations

import enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from cupy_standin import COMPILER, StandIn
from numpy.lib.stride_tricks import as_strided

from npdrt import arrays, cublas, cudnn, ops, record, value_and_grad
from npdrt.data import load
from npdrt.errors import Error, Unavailable
from npdrt.kernels import KERNELS
from npdrt.ops import convolution as products
from npdrt.program.cuda import WARM_UPS, CudaMemory
from npdrt.train import Config, train
from npdrt.train.studies import sweep

# --- a stand-in for the frontend ---------------------------------------------------------------

NOTES = (
    "DOWN_CONVERT_INPUTS", "FFT", "NONDETERMINISTIC", "REDUCED_PRECISION_REDUCTION",
    "STRICT_NAN_PROP", "TENSOR_CORE", "WINOGRAD",
)  # fmt: skip
ORDER = [
    "validate", "build_operation_graph", "create_execution_plans", "deselect_numeric_notes",
    "check_support", "build_plans",
]  # fmt: skip
ROOM = 64  # bytes of workspace


class Tensor:
    """A tensor of a graph."""

    output = False

    def __init__(self, dim: Any = None, stride: Any = None, data_type: Any = None):
        self.dim, self.stride, self.data_type = dim, stride, data_type

    def set_output(self, value: bool) -> Tensor:
        self.output = value
        return self

    def set_data_type(self, value: Any) -> Tensor:
        self.data_type = value
        return self

    def set_dim(self, value: list[int]) -> Tensor:
        self.dim = value
        return self

    def set_stride(self, value: list[int]) -> Tensor:
        self.stride = value
        return self

    def at(self, pointer: int) -> Any:
        """The numbers at an address of the host."""
        assert type(pointer) is int
        size = 4 if self.data_type is Frontend.data_type.FLOAT else 8
        interface = {
            "data": (pointer, False), "typestr": f"<f{size}", "version": 3,
            "shape": tuple(self.dim), "strides": tuple(size * s for s in self.stride),
        }  # fmt: skip
        return np.asarray(SimpleNamespace(__array_interface__=interface))


def add_taps(kind: str, x: Any, w: Any, y: Any, padding: Any, stride: Any) -> None:
    """Fill one of images x (N, C, H, W), weight w (O, C, kh, kw) and value y, tap by tap."""
    (p, q), (s, t) = padding, stride
    border = np.pad(x, ((0, 0), (0, 0), (p, p), (q, q)))
    {"conv_fprop": y, "conv_dgrad": border, "conv_wgrad": w}[kind][:] = 0
    for k, m in np.ndindex(w.shape[2:]):
        step = border.strides[2] * s, border.strides[3] * t
        seen = as_strided(border[:, :, k:, m:], (*x.shape[:2], *y.shape[2:]),
                          (*border.strides[:2], *step))  # fmt: skip
        if kind == "conv_fprop":
            y += np.einsum("nchw,oc->nohw", seen, w[:, :, k, m])
        elif kind == "conv_dgrad":
            seen += np.einsum("nohw,oc->nchw", y, w[:, :, k, m])
        else:
            w[:, :, k, m] = np.einsum("nohw,nchw->oc", y, seen)
    if kind == "conv_dgrad":
        x[:] = border[:, :, p : p + x.shape[2], q : q + x.shape[3]]


class Graph:
    """cuDNN's graph of one product: built in cuDNN's order, and only then run."""

    def __init__(self, frontend: Frontend, **about: Any):
        assert about.pop("handle") is frontend.handle
        assert set(about) == {"io_data_type", "intermediate_data_type", "compute_data_type"}
        assert len(set(about.values())) == 1
        self.frontend, self.done, self.notes = frontend, [], ()

    def tensor(self, *, dim: Any, stride: Any, data_type: Any, name: str) -> Tensor:
        return Tensor(dim, stride, data_type)

    def conv_fprop(self, *, image: Tensor, weight: Tensor, **how: Any) -> Tensor:
        return self._product("conv_fprop", how, x=image, w=weight)

    def conv_dgrad(self, *, loss: Tensor, filter: Tensor, **how: Any) -> Tensor:
        return self._product("conv_dgrad", how, y=loss, w=filter)

    def conv_wgrad(self, *, image: Tensor, loss: Tensor, **how: Any) -> Tensor:
        return self._product("conv_wgrad", how, x=image, y=loss)

    def _product(self, kind: str, how: Any, **given: Tensor) -> Tensor:
        assert how.pop("dilation") == [1, 1]
        self.kind, self.how, self.result = kind, how, Tensor()
        (name,) = {"x", "w", "y"} - set(given)
        self.roles = {**given, name: self.result}
        return self.result

    def __getattr__(self, name: str) -> Any:
        if name not in ORDER:
            raise AttributeError(name)
        assert name == ORDER[len(self.done)], f"{name} after {self.done}"
        assert self.result.output
        assert self.result.dim
        self.done.append(name)
        return lambda *args: self.__dict__.update({name: args})

    def get_workspace_size(self) -> int:
        assert self.done == ORDER
        return ROOM

    def execute(self, pack: dict[Tensor, int], workspace: int, handle: Any) -> None:
        device = self.frontend.device
        assert self.done == ORDER
        assert handle is self.frontend.handle
        assert self.frontend.stream == device.streams[-1].ptr, "on another stream"
        assert workspace
        x, w, y = (self.roles[role].at(pack[self.roles[role]]) for role in "xwy")
        self.frontend.ran.append((self.kind, self.deselect_numeric_notes))
        device.work(self.kind, add_taps, self.kind, x, w, y, **self.how)


class Frontend:
    """As much of the module `cudnn` as npdrt uses, on a stand-in for CuPy."""

    data_type = enum.Enum("data_type", ["FLOAT", "DOUBLE"])
    heur_mode = enum.Enum("heur_mode", ["A", "FALLBACK"])
    numerical_note = enum.Enum("numerical_note", NOTES)

    def __init__(self, device: Any):
        self.device, self.handle, self.stream = device, object(), None
        self.ran: list[Any] = []

    def create_handle(self) -> Any:
        return self.handle

    def destroy_handle(self, handle: Any) -> None:
        assert handle is self.handle

    def set_stream(self, *, handle: Any, stream: int) -> None:
        assert handle is self.handle
        self.stream = stream

    def backend_version(self) -> int:
        return 91002

    def pygraph(self, **about: Any) -> Graph:
        return Graph(self, **about)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """A stand-in whose cuDNN is in use."""
    device = StandIn()
    frontend = Frontend(device)
    monkeypatch.setattr(cudnn, "load", lambda: frontend)
    monkeypatch.setitem(cudnn._of_thread.__dict__, "handles", {})
    device.frontend = frontend  # type: ignore[attr-defined]
    return device


# --- the products ------------------------------------------------------------------------------

GEOMETRIES = [  # images (C, N, H, W), kernel (O, kh, kw), stride, padding
    ((3, 2, 6, 5), (4, 3, 3), (1, 1), (1, 1)),
    ((3, 2, 7, 6), (4, 3, 2), (2, 3), (1, 0)),
    ((1, 1, 4, 4), (2, 1, 1), (2, 2), (0, 0)),
    ((5, 3, 8, 8), (2, 5, 5), (2, 2), (2, 2)),
]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_products_are_those_of_the_definition(geometry: Any, dtype: str, device: StandIn) -> None:
    image, kernel, stride, padding = geometry
    rng = np.random.default_rng(0)
    x = rng.standard_normal(image).astype(dtype)
    w = rng.standard_normal((kernel[0], image[0], *kernel[1:])).astype(dtype)
    setting = {"stride": stride, "padding": padding, "groups": 1}
    g = products.convolve(x, w, **setting)
    cases = {
        "convolve": (x, w, setting),
        "convolve_input": (g, w, {**setting, "size": image[2:]}),
        "convolve_weight": (g, x, {**setting, "size": kernel[1:]}),
    }
    for name, (a, b, how) in cases.items():
        expected = getattr(products, name).definition(a, b, **how)
        with cudnn.convolutions("cudnn"):
            found = KERNELS[name](device, device.asarray(a), device.asarray(b), **how)
        scale = np.max(np.abs(expected))
        bound = {"float32": 2e-6, "float64": 1e-14}[dtype]
        assert np.max(np.abs(found.get() - expected)) <= bound * scale, name
    kinds = [kind for kind, _ in device.frontend.ran]  # type: ignore[attr-defined]
    assert kinds == ["conv_fprop", "conv_dgrad", "conv_wgrad"]


def test_a_plan_is_made_once_and_may_not_be_random_or_rounded(device: StandIn) -> None:
    x, w = np.ones((2, 3, 4, 4), "float32"), np.ones((5, 2, 3, 3), "float32")
    setting: dict[str, Any] = {"stride": (1, 1), "padding": (0, 0), "groups": 1}

    def run(form: str = "direct", dtype: str = "float32") -> set[str]:
        given = (device.asarray(a.astype(dtype)) for a in (x, w))
        KERNELS["convolve"](device, *given, form=form, **setting)
        (notes,) = device.frontend.ran[-1][1]  # type: ignore[attr-defined]
        return {note.name for note in notes}

    always, reduced = {"NONDETERMINISTIC", "FFT"}, set(cudnn.REDUCED)
    with cudnn.convolutions("cudnn"):
        assert run() == run() == {*always, *reduced, "WINOGRAD"}
        assert run("winograd") == {*always, *reduced}
        with cublas.precision("tf32"):
            assert run() == {*always, "WINOGRAD"}
            assert run(dtype="float64") == {*always, *reduced, "WINOGRAD"}
        (handle,) = cudnn._of_thread.handles.values()
    assert len(handle.plans) == 4


def step(x: Any, w: Any) -> Any:
    """A convolution and its derivatives."""
    made = value_and_grad(lambda p: ops.sum(ops.conv2d(p["x"], p["w"], stride=2, padding=1) ** 2))
    return made({"x": x, "w": w})


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
def test_convolutions_are_captured_and_replayed(device: StandIn) -> None:
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((3, 4, 8, 8)), rng.standard_normal((5, 3, 3, 3))
    _, expected = step(x, w)
    with cudnn.convolutions("cudnn"):
        program = record(step, x, w, memory=CudaMemory(device, device.blas))
        for _ in range(WARM_UPS + 2):
            _, found = program(x, w)
            for name, want in expected.items():
                assert np.max(np.abs(found[name].get() - want)) <= 1e-12 * np.max(np.abs(want))
    assert program.graph, program.graph_error
    ran = len(device.frontend.ran)  # type: ignore[attr-defined]
    program(2 * x, w)
    assert len(device.frontend.ran) == ran, "a replay asks cuDNN for nothing"  # type: ignore[attr-defined]


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
def test_groups_and_other_threads_stay_with_our_kernels(device: StandIn) -> None:
    x, w = np.ones((4, 2, 4, 4), "float32"), np.ones((4, 2, 3, 3), "float32")
    setting: dict[str, Any] = {"stride": (1, 1), "padding": (0, 0)}
    with cudnn.convolutions("cudnn"):
        KERNELS["convolve"](device, device.asarray(x), device.asarray(w), groups=2, **setting)
        with cudnn.convolutions("npdrt"):
            KERNELS["convolve"](
                device, device.asarray(x[:2]), device.asarray(w), groups=1, **setting
            )
    KERNELS["convolve"](device, device.asarray(x[:2]), device.asarray(w), groups=1, **setting)
    assert not device.frontend.ran  # type: ignore[attr-defined]


def test_no_plan_is_an_error_that_says_what_to_do(
    device: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Any, *args: Any) -> None:
        raise RuntimeError("no engine")

    monkeypatch.setattr(Graph, "check_support", refuse, raising=False)
    x, w = (device.asarray(np.ones(s, "float32")) for s in ((2, 3, 4, 4), (5, 2, 3, 3)))
    with (
        cudnn.convolutions("cudnn"),
        pytest.raises(Error, match=r"cuDNN has no plan for conv_fprop .* no engine; use the conv"),
    ):
        KERNELS["convolve"](device, x, w, stride=(1, 1), padding=(0, 0), groups=1)


# --- the choice --------------------------------------------------------------------------------


def test_unknown_and_missing_ways_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Error, match="unknown convolutions 'mkl'; use one of npdrt, cudnn"):
        cudnn.convolutions("mkl").__enter__()
    with pytest.raises(Unavailable, match=r"cuDNN cannot be loaded .*npdrt\[cudnn\]"):
        cudnn.load.__wrapped__()
    with pytest.raises(Unavailable, match="convolutions cudnn needs a GPU, and the device is cpu"):
        train(Config(convolutions="cudnn", epochs=0), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_runs_by_cudnn_have_names_of_their_own() -> None:
    digits = load("digits")
    names = {c: sweep._hash(Config(convolutions=c), digits) for c in cudnn.CONVOLUTIONS}
    assert names["npdrt"] != names["cudnn"]
    assert names["npdrt"] == sweep._hash(Config(), digits)


def test_the_version_in_words(device: StandIn) -> None:
    assert cudnn.version() == "9.10.2"


# --- the frontend itself -----------------------------------------------------------------------


def test_the_frontend_has_these_words() -> None:
    """Its graph takes the tensors, the product and the result as npdrt gives them."""
    frontend = pytest.importorskip("cudnn")
    assert all(hasattr(frontend.numerical_note, name) for name in NOTES)
    assert callable(frontend.create_handle)
    assert callable(frontend.destroy_handle)

    class Unplanned(frontend.pygraph):  # type: ignore[misc, name-defined]
        """Without what needs a device."""

        def planned(self, *args: Any) -> None:
            assert len(self.nodes) == 1

    for name in ORDER:
        assert callable(getattr(frontend.pygraph, name))
        setattr(Unplanned, name, Unplanned.planned)
    names = ("data_type", "heur_mode", "numerical_note")
    library = SimpleNamespace(pygraph=Unplanned, **{n: getattr(frontend, n) for n in names})
    handle = SimpleNamespace(library=library, handle=None)
    x, w, y = (2, 3, 8, 8), (5, 3, 3, 3), (2, 5, 4, 4)
    for function, shapes in (
        ("convolve", (x, w, y)), ("convolve_input", (y, w, x)), ("convolve_weight", (y, x, w)),
    ):  # fmt: skip
        key = function, "float32", shapes, (2, 2), (1, 1), cudnn.forbidden("float32", "direct")
        graph, tensors = cudnn.Cudnn._planned(handle, *key)  # type: ignore[arg-type]
        assert [tuple(t.get_dim()) for t in tensors] == list(shapes)
        assert [list(t.get_stride()) for t in tensors] == list(map(cudnn.strides, shapes))
        assert {id(t) for t in graph.get_outputs()} == {id(tensors[2])}


@pytest.mark.gpu
def test_gpu_steps_by_cudnn_are_close_to_ours() -> None:
    try:
        arrays._import_cupy()
        cudnn.load()
    except Unavailable as error:
        pytest.skip(str(error))
    rng = np.random.default_rng(0)
    x = rng.standard_normal((16, 8, 32, 32)).astype("float32")
    w = rng.standard_normal((32, 16, 3, 3)).astype("float32")
    _, expected = step(x, w)
    given = [arrays.to_device(a, "cuda") for a in (x, w)]
    with cudnn.convolutions("cudnn"):
        program = record(step, *given)
        _, eager = step(*given)
        for _ in range(WARM_UPS + 2):
            _, found = program(*given)
    assert program.graph, program.graph_error
    for name, want in expected.items():
        one, other = arrays.to_host(found[name]), arrays.to_host(eager[name])
        assert np.array_equal(one, other)
        assert np.max(np.abs(one - want)) <= 1e-5 * np.max(np.abs(want))
