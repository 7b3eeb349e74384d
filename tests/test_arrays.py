"""The seam: namespaces, transfers, devices, and the sum of rows in row order."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import backends
import numpy as np
import pytest
from backends import Backend, cupy_double

from npdrt import arrays
from npdrt.arrays import Device, device, namespace, sum_rows, to_device, to_host
from npdrt.errors import Error, Unavailable

# --- whose array -----------------------------------------------------------------------------


def test_namespace(backend: Backend) -> None:
    x = backend.asarray([1.0, 2.0])
    assert namespace(x) is backend.xp
    assert namespace(2, None, x, 1.5, True, 1j, x) is backend.xp
    assert namespace(x[0]) is backend.xp
    assert namespace(backend.xp.sum(x)) is backend.xp


def test_namespace_of_numpy_scalars() -> None:
    assert namespace(np.float32(1.0)) is np
    assert namespace(np.bool_(True), np.ones(2)) is np


def test_arrays_of_two_libraries_are_refused(backend: Backend) -> None:
    if backend.xp is np:
        return
    x, y = np.ones(2), backend.asarray([1.0, 2.0])
    name = backend.xp.__name__
    with pytest.raises(Error, match=f"in one operation: numpy and {name}; move them to one device"):
        namespace(x, y)
    with pytest.raises(Error, match=f"in one operation: {name} and numpy; "):
        namespace(y, np.float64(1.0))


@pytest.mark.parametrize(
    "thing", [[1.0, 2.0], "text", {"a": 1}, object()], ids=["list", "text", "dict", "object"]
)
def test_other_things_are_refused(thing: Any) -> None:
    with pytest.raises(Error, match=f"expected an array .*got {type(thing).__name__}; convert it"):
        namespace(thing)


def test_no_array_at_all() -> None:
    with pytest.raises(Error, match=r"expected at least one array; got \['int', 'NoneType'\]"):
        namespace(1, None)


def test_cupy_is_known_by_the_module_of_its_type(monkeypatch: pytest.MonkeyPatch) -> None:
    """Real CuPy arrays have no `__array_namespace__`."""
    cupy_array = type("ndarray", (), {"__module__": "cupy.of_this_test"})
    library = SimpleNamespace(__name__="cupy")
    monkeypatch.setitem(sys.modules, "cupy", library)
    assert namespace(cupy_array()) is library


# --- the double: the suite's own tool --------------------------------------------------------


DOUBLE = cupy_double.asarray(np.arange(6.0).reshape(2, 3))
REFUSED = {
    "float": lambda x: float(x[0, 0]),
    "int": lambda x: int(x[0, 0]),
    "bool": lambda x: bool(x[0, 0] > 0),
    "index": lambda x: [1, 2][cupy_double.asarray(np.array(1))],
    "len": len,
    "iteration": list,
    "item": lambda x: x[0, 0].item(),
    "np.asarray": np.asarray,
    "np.sum": np.sum,
    "np.exp": np.exp,
    "array + double": lambda x: np.ones(3) + x,
    "double + array": lambda x: x + np.ones(3),
    "double * list": lambda x: x * [1.0, 2.0, 3.0],
    "add of an array": lambda x: cupy_double.add(x, np.ones(3)),
    "add of a list": lambda x: cupy_double.add(x, [1.0, 2.0, 3.0]),
    "concat with an array": lambda x: cupy_double.concat((x, np.ones((1, 3)))),
    "assignment of an array": lambda x: x.__setitem__(0, np.ones(3)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_the_double_refuses(name: str) -> None:
    with pytest.raises(TypeError, match=r"cupy_double|double"):
        REFUSED[name](DOUBLE)


def test_the_double_computes() -> None:
    x = cupy_double.asarray(np.array([3.0, 1.0, 2.0]))
    total = cupy_double.sum(x)
    assert type(total) is backends.DoubleArray
    assert total.shape == ()
    found = 1 - x[1:] * 2 + cupy_double.take(x, cupy_double.asarray(np.array([4, -1])))
    assert to_host(found).tolist() == [0.0, -1.0]  # 4 wraps to 1, as on a GPU
    x[0] = 7.0
    x += 1.0
    assert to_host(x).tolist() == [8.0, 2.0, 3.0]
    assert to_host(cupy_double.asarray(x, dtype=cupy_double.float32)).dtype == np.float32
    assert np.isinf(to_host(cupy_double.log(x * 0.0))).all()  # and nothing warns


def test_the_double_counts_synchronisations() -> None:
    before = backends.synchronisations
    x = DOUBLE + 1.0
    assert backends.synchronisations == before
    to_host(x)
    x[x > 2]
    cupy_double.nonzero(x)
    assert backends.synchronisations == before + 3


# --- to the host and back --------------------------------------------------------------------


def test_to_host(backend: Backend) -> None:
    x = np.arange(6, dtype="float32").reshape(2, 3)
    host = to_host(backend.asarray(x))
    assert type(host) is np.ndarray
    assert host.dtype == x.dtype
    assert np.array_equal(host, x)


def test_to_device_cpu_is_the_same_array() -> None:
    x = np.ones(3)
    assert to_device(x, "cpu") is x
    assert to_device(x, Device()) is x


def test_cast_and_scalar(backend: Backend) -> None:
    like = backend.asarray(np.ones(2, "float32"))
    third = arrays.scalar(1 / 3, like)
    assert third.dtype == backend.xp.float64
    assert third.shape == ()
    rounded = arrays.cast(third, like)
    assert rounded.dtype == backend.xp.float32
    assert backend.to_host(rounded) == np.float32(1 / 3)
    assert namespace(third, rounded) is backend.xp


def test_real() -> None:
    assert arrays.real(np.array(2 + 3j)) == 2.0
    x = np.ones(2)
    assert np.shares_memory(arrays.real(x), x)


def test_quiet() -> None:
    with arrays.quiet():
        assert np.isinf(np.ones(1) / np.zeros(1)).all()


# --- the sum of rows -------------------------------------------------------------------------


def row_by_row(x: np.ndarray) -> np.ndarray:
    total = x[0]
    for row in x[1:]:
        total = total + row
    return total


WIDTHS = (1, 2, 3, 7, 8, 16, 17, 64, 255, 256, 300)
HEIGHTS = (1, 2, 3, 8, 9, 16, 17, 128, 129, 257, 1000)


@pytest.mark.parametrize("rows", HEIGHTS)
def test_sum_rows_equals_the_loop(rows: int) -> None:
    for width in WIDTHS:
        x = np.random.default_rng(rows).standard_normal((rows, width)) * 10.0 ** np.arange(width)
        x = x if width < 256 else np.random.default_rng(width).standard_normal((rows, width)) ** 2
        assert np.array_equal(sum_rows(x), row_by_row(x)), (rows, width)


@pytest.mark.parametrize("shape", [(1, 256), (2, 256), (257, 256), (129, 1), (5, 3)])
def test_sum_rows_on_every_backend(shape: tuple[int, int], backend: Backend) -> None:
    x = np.random.default_rng(shape[0]).standard_normal(shape)
    found = sum_rows(backend.asarray(x))
    assert namespace(found) is backend.xp
    assert np.array_equal(backend.to_host(found), row_by_row(x))


# --- devices ---------------------------------------------------------------------------------


class FakeCupy(SimpleNamespace):
    """As much of CuPy as choosing a device needs; `broken` is what an allocation raises."""

    def __init__(self, count: int, broken: Exception | None = None) -> None:
        runtime = SimpleNamespace(
            getDeviceCount=lambda: count,
            getDeviceProperties=lambda i: {
                "name": f"GPU {i}".encode(), "totalGlobalMem": 1 << 34, "major": 9, "minor": 0,
            },
            driverGetVersion=lambda: 12080,
            runtimeGetVersion=lambda: 12090,
        )  # fmt: skip
        self.chosen: list[int] = []
        cuda = SimpleNamespace(runtime=runtime, Device=self._device)
        super().__init__(cuda=cuda, broken=broken, asarray=cupy_double.asarray, __version__="14.2")

    def _device(self, index: int) -> Any:
        self.chosen.append(index)
        return nullcontext()

    def is_available(self) -> bool:
        return self.cuda.runtime.getDeviceCount() > 0

    def zeros(self, n: int) -> Any:
        if self.broken:
            raise self.broken
        return cupy_double.zeros(n)


NO_CUPY = None  # what `import cupy` finds then: nothing
SITUATIONS = {
    "not installed": (NO_CUPY, r"CuPy cannot be imported .*pip install \"npdrt\[cuda12\]\""),
    "no driver": (FakeCupy(0), "CuPy is installed but found no CUDA driver or device"),
    "broken": (FakeCupy(1, RuntimeError("out of memory")), "does not accept work: out of memory"),
}


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("spec", ["cuda", "cuda:0", "cuda:3"])
def test_cuda_never_falls_back(situation: str, spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cupy, message = SITUATIONS[situation]
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    with pytest.raises(Unavailable, match=message) as caught:
        device(spec)
    assert caught.value.exit_code == 4
    with pytest.raises(Unavailable, match=message):
        to_device(np.ones(2), spec)
    with pytest.raises(Unavailable, match=message):
        arrays.describe_gpus()


@pytest.mark.parametrize("situation", SITUATIONS)
def test_auto_takes_the_cpu_and_says_why(situation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cupy, message = SITUATIONS[situation]
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    found = device("auto")
    assert str(found) == "cpu"
    with pytest.raises(Unavailable, match=message):
        raise Unavailable(found.why)


def test_auto_takes_a_working_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", FakeCupy(1))
    assert device("auto") == Device("cuda", 0, "a working CUDA device was found")


def test_a_gpu_is_chosen_by_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    cupy = FakeCupy(2)
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    assert [str(device(spec)) for spec in ("cuda", "cuda:1")] == ["cuda:0", "cuda:1"]
    with pytest.raises(Unavailable, match=r"cuda:2: this machine has 2 CUDA device\(s\)"):
        device("cuda:2")
    x = to_device(np.ones(2), "cuda:1")
    assert namespace(x) is cupy_double
    with arrays.on(device("cuda:1")):
        pass
    assert cupy.chosen == [1, 1]
    assert [gpu["name"] for gpu in arrays.describe_gpus()] == ["GPU 0", "GPU 1"]
    assert arrays.describe_gpus()[1]["compute_capability"] == "9.0"


def test_cpu() -> None:
    assert str(device("cpu")) == str(device()) == "cpu"
    assert device(Device("cuda", 2)) == Device("cuda", 2)
    with arrays.on(Device()):
        assert np.ones(1) == 1.0


@pytest.mark.parametrize("spec", ["gpu", "cuda:", "cuda:x", "cuda:-1", "CPU", "", None, 3])
def test_nonsense(spec: Any) -> None:
    with pytest.raises(Error, match=f"unknown device {spec!r}; use auto, cpu, cuda or cuda:N"):
        device(spec)


def test_this_machine() -> None:
    """Whatever CuPy is really there, `auto` and `cuda` agree."""
    try:
        found = device("cuda")
    except Unavailable:
        assert device("auto").kind == "cpu"
        assert device("auto").why
    else:
        assert device("auto").kind == found.kind == "cuda"
