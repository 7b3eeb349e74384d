"""Every operation over every dtype and kind of array: the right number, or an error that says what
to write instead."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from primitives import BROADCASTING, CASES, Case, is_float

import npdrt
from npdrt import ops, optim
from npdrt.arrays import namespace, number
from npdrt.autodiff import PRIMITIVES, detach
from npdrt.errors import Error
from npdrt.ops.normalisation import batch_statistics, running_statistics

every_case = pytest.mark.parametrize("row", CASES, ids=str)
TEN_MILLION = 10_000_000
INSTEAD = re.compile(  # what an error says to write
    r"astype|numpy\.asarray|filled|float\(|convert|expected (integer|a mask|a boolean|arrays)"
)


def test_every_primitive_states_its_dtypes() -> None:
    for name, operation in PRIMITIVES.items():
        assert name not in ops.__all__ or operation.computes is not None, name


# --- arrays of other dtypes --------------------------------------------------------------------

DTYPES = (
    *("float16", "longdouble", "bool", "int8", "uint8", "int16", "int32", "int64", "uint64"),
    *(">f4", ">f8", ">i4", "complex64", "object"),
)


def whole(a: np.ndarray, dtype: Any) -> np.ndarray:
    """Small whole numbers, which every dtype holds, in the shape and layout of `a`."""
    return np.abs(np.rint(3 * a)).astype(np.int8).astype(dtype)


@every_case
@pytest.mark.parametrize("dtype", DTYPES)
def test_other_dtypes(row: Case, dtype: str) -> None:
    """All floating arguments in one dtype: refused; or, if the operation only moves them, the
    numbers of float64 in that dtype."""
    given = [whole(a, dtype) if is_float(a) else a for a in row.arguments]
    with np.errstate(all="ignore"):
        found = right_or_refused(row, given)
        if found is not None:
            expected = row.call(*(whole(a, "float64") if is_float(a) else a for a in row.arguments))
            limit = {"float16": 1e-3, "complex64": 1e-5, ">f4": 1e-6}.get(dtype, 1e-12)
            if dtype == "bool":
                return  # whole numbers become True: moved only, tested below
            assert np.allclose(found.astype(complex), expected, rtol=limit, atol=limit)
    if found is not None and dtype != "complex64":
        assert row.moves
        meets_a_float = any(type(v) is float for v in (*row.arguments, *row.settings.values()))
        assert meets_a_float or dtype == "object" or native(found.dtype) == native(np.dtype(dtype))


def native(dtype: np.dtype) -> np.dtype:
    """The dtype in this machine's order of bytes."""
    return dtype.newbyteorder("=")


def right_or_refused(row: Case, given: list[Any]) -> Any:
    """The result, or None where an error says what to write instead."""
    try:
        return np.asarray(row.call(*given))
    except Error as error:
        text = str(error)
    assert INSTEAD.search(text), text
    return None


@pytest.mark.parametrize("dtype", ["bool", "int64", "float16", ">f4"])
def test_moved_elements_keep_their_values_and_dtype(dtype: str) -> None:
    x = np.array([[1, 0, 1], [0, 0, 1]], dtype)
    kept = {
        "reshape": ops.reshape(x, shape=(6,)),
        "transpose": ops.transpose(x).T,
        "getitem": ops.getitem(x, index=slice(None)),
        "gather": ops.gather(x, np.arange(2)),
        "concat": ops.concat(x, x)[:2],
        "pad": ops.pad(x, widths=((1, 0), (0, 0)))[1:],
        "where": ops.where(x == 1, x, x),
        "max": ops.max(np.stack((x, x)), axis=0),
    }
    for name, y in kept.items():
        assert np.ravel(y).tolist() == np.ravel(x).tolist(), name
        assert y.dtype == np.dtype(dtype).newbyteorder("=") or y.dtype == np.dtype(dtype), name


@every_case
def test_two_floating_dtypes_are_refused(row: Case) -> None:
    """Each argument in turn in float32 among float64 ones."""
    places = [i for i, a in enumerate(row.arguments) if is_float(a)]
    if len(places) < 2:
        return
    for place in places:
        given = list(row.arguments)
        given[place] = given[place].astype("float32")
        with pytest.raises(Error, match=r"one dtype|as q is|expected|convert"):
            row.call(*given)


@every_case
@pytest.mark.parametrize("kind", ["masked", "matrix"])
def test_masked_arrays_and_matrices_are_refused(row: Case, kind: str) -> None:
    """In the place of every array, those of integers too."""
    for i, a in enumerate(row.arguments):
        if not isinstance(a, np.ndarray) or (kind == "matrix" and a.ndim != 2):
            continue
        other = np.ma.masked_array(a) if kind == "masked" else a.view(np.matrix)
        given = [other if j == i else b for j, b in enumerate(row.arguments)]
        with pytest.raises(Error, match=r"filled\(value\)|numpy\.asarray\(x\)"):
            row.call(*given)


def test_a_memory_map_is_a_plain_array(tmp_path: Any) -> None:
    np.save(tmp_path / "x.npy", np.arange(6.0))
    assert float(ops.sum(np.load(tmp_path / "x.npy", mmap_mode="r"))) == 15


# --- numbers of NumPy ----------------------------------------------------------------------

NUMBERS = [np.float64(0.3), np.float32(0.3), np.float16(0.5), np.longdouble(0.3), np.int64(2),
           np.uint8(3), np.bool_(True)]  # fmt: skip


def chosen(a: Any, b: Any) -> Any:
    """`where` by a constant."""
    condition = np.array([True, False, True])
    arrays = (x for x in map(detach, (a, b)) if getattr(x, "shape", ()) == (3,))
    return ops.where(namespace(next(arrays)).asarray(condition), a, b)


BINARY: dict[str, Callable[..., Any]] = {
    row.operation: chosen if row.operation == "where" else getattr(ops, row.operation)
    for row in BROADCASTING
}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("value", NUMBERS, ids=lambda v: type(v).__name__)
@pytest.mark.parametrize("name", BINARY)
def test_numpy_numbers_are_python_numbers(name: str, value: Any, dtype: str) -> None:
    """On either side of an array: the bits and the dtype that Python's number gives, eagerly, in
    the derivative, and recorded."""
    w, operation = {"w": np.array([0.5, 1.5, 2.5], dtype)}, BINARY[name]
    for swapped in (False, True):

        def loss(p: dict[str, Any], v: Any, swapped: bool = swapped) -> Any:
            return ops.sum(operation(v, p["w"]) if swapped else operation(p["w"], v))

        found = npdrt.value_and_grad(loss)(w, value)
        expected = npdrt.value_and_grad(loss)(w, number(value))
        assert found[0].dtype == dtype
        assert found[0].tobytes() == expected[0].tobytes()
        assert found[1]["w"].tobytes() == expected[1]["w"].tobytes()
        program = npdrt.record(lambda p, f=loss: npdrt.value_and_grad(f)(p, value), w)
        replayed = program(w)
        assert np.asarray(replayed[0]).tobytes() == expected[0].tobytes()
        assert replayed[1]["w"].tobytes() == expected[1]["w"].tobytes()


def test_operators_with_numpy_numbers() -> None:
    """h / numpy.sqrt(n) of a float32 model, as it is written in papers' code."""
    w = {"w": np.ones(3, "float32")}
    for f in (
        lambda p: p["w"] / np.sqrt(16),
        lambda p: np.sqrt(16) * p["w"],
        lambda p: p["w"] ** np.float64(2),
        lambda p: np.float64(1) - p["w"],
        lambda p: p["w"] * np.array([1, 2, 3], np.uint8),
    ):
        loss, grads = npdrt.value_and_grad(lambda p, f=f: ops.sum(f(p)))(w)
        assert loss.dtype == grads["w"].dtype == np.float32


def test_two_numbers_are_arrays_without_axes() -> None:
    assert ops.maximum(np.float32(2), np.float32(3)) == 3
    with pytest.raises(Error, match="one dtype"):
        ops.add(np.uint8(200), np.uint8(100))


@pytest.mark.parametrize("other", [np.array([1, 2, 3]), np.zeros(3)], ids=["int64", "float64"])
def test_a_wider_array_is_refused_with_what_to_write(other: np.ndarray) -> None:
    with pytest.raises(Error, match=r'float32, .*64; convert first.*"float32".*float\(x\)'):
        npdrt.value_and_grad(lambda p: ops.sum(p["w"] * other))({"w": np.ones(3, "float32")})


@every_case
def test_settings_that_are_numpy_numbers(row: Case) -> None:
    """Scalars and arrays without axes: the bits and dtype of Python's numbers."""
    args = [a.astype("float32") if is_float(a) else a for a in row.arguments]
    expected = np.asarray(row.call(*args))
    for kind in (np.float64, np.array, np.int64):
        changed = {k: converted(v, kind) for k, v in row.settings.items()}
        found = np.asarray(row.call(*args, **changed))
        assert found.dtype == expected.dtype
        assert found.tobytes() == expected.tobytes()


def converted(setting: Any, kind: Any) -> Any:
    """A number as one of NumPy, if it is of that kind."""
    if isinstance(setting, tuple):
        return tuple(converted(s, kind) for s in setting)
    if type(setting) is float and kind is not np.int64:
        return kind(setting)
    return kind(setting) if type(setting) is int and kind is np.int64 else setting


def test_running_statistics_keep_their_dtype() -> None:
    x = np.arange(12, dtype="float32").reshape(3, 4)
    old = np.zeros(4, "float32")
    statistics = batch_statistics(x, channel_axis=1)
    for momentum in (np.float64(0.25), np.array(0.25)):
        for found, expected in zip(
            running_statistics(old, old, statistics, momentum=momentum),
            running_statistics(old, old, statistics, momentum=0.25),
            strict=True,
        ):
            assert found.dtype == np.float32
            assert found.tobytes() == expected.tobytes()
    with pytest.raises(Error, match="batch_statistics: expected arrays of one dtype"):
        batch_statistics(x.astype("float16"), channel_axis=1)


# --- parameters and optimizers -----------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "int64", "bool", ">f4", "object"])
def test_parameters_of_other_dtypes_are_refused(dtype: str) -> None:
    with pytest.raises(Error, match=r'w: a parameter is float32 or float64; got .*astype\("float'):
        npdrt.value_and_grad(lambda p: ops.sum(p["w"]))({"w": np.ones(3).astype(dtype)})


def test_masked_parameters_are_refused() -> None:
    params = {"w": np.ma.masked_array(np.ones(3))}
    with pytest.raises(Error, match="masked array"):
        npdrt.value_and_grad(lambda p: ops.sum(p["w"]))(params)
    with pytest.raises(Error, match="masked array"):
        optim.fromage(lr=0.1).init(params)


# --- sizes -------------------------------------------------------------------------------------

SUMS: dict[str, tuple[Callable[[np.ndarray], Any], float]] = {
    "sum": (ops.sum, TEN_MILLION),
    "mean": (ops.mean, 1.0),
    "var": (ops.var, 0.0),
    "logsumexp": (ops.logsumexp, 1 + np.log(TEN_MILLION)),
    "max": (ops.max, 1.0),
    "softmax": (lambda x: ops.softmax(x, axis=0)[0], 1 / TEN_MILLION),
    "squared_error": (lambda x: ops.squared_error(x, 3 * x), 4.0),
    "hinge": (lambda x: ops.hinge(x, -x), 2.0),
    "cross-entropy": (
        lambda x: ops.softmax_cross_entropy(x.reshape(-1, 2), np.zeros(x.size // 2, int)),
        np.log(2),
    ),
    "average pool": (
        lambda x: ops.global_average_pool(x.reshape(1, 1, 2500, -1)).reshape(()),
        1.0,
    ),
    "layer norm": (lambda x: ops.max(ops.layer_norm(x, axes=0)), 0.0),
}


@pytest.mark.parametrize("name", SUMS)
def test_ten_million_elements(name: str) -> None:
    """Of float32: what is summed keeps its digits."""
    function, expected = SUMS[name]
    found = function(np.ones(TEN_MILLION, "float32"))
    assert abs(float(found) - expected) <= 1e-6 * abs(expected)


EMPTY: dict[str, tuple[Callable[[np.ndarray], Any], Any]] = {
    "sum": (ops.sum, 0.0),
    "mean": (ops.mean, "mean of no elements"),
    "var": (ops.var, r"variance of 0 element\(s\)"),
    "max": (ops.max, "max"),
    "logsumexp": (ops.logsumexp, "logsumexp"),
    "squared_error": (lambda x: ops.squared_error(x, x), "of no elements"),
    "hinge": (lambda x: ops.hinge(x, x), "of no elements"),
    "batch norm": (lambda x: ops.batch_norm(x[None], channel_axis=0), "more than 1 value"),
    "layer norm": (lambda x: ops.layer_norm(x), "no elements"),
    "cross-entropy": (
        lambda x: ops.softmax_cross_entropy(x.reshape(0, 3), np.zeros(0, int)),
        "batch is empty",
    ),
}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", EMPTY)
def test_no_elements(name: str, dtype: str) -> None:
    """The number that the definition gives, or refused."""
    function, expected = EMPTY[name]
    if isinstance(expected, float):
        assert function(np.zeros(0, dtype)) == expected
        return
    with pytest.raises(Error, match=expected):
        function(np.zeros(0, dtype))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_one_element(dtype: str) -> None:
    x = np.full(1, 2, dtype)
    ones = {"sum": 2, "mean": 2, "var": 0, "max": 2, "logsumexp": 2}
    assert {name: float(getattr(ops, name)(x)) for name in ones} == ones
    assert ops.softmax(x).tolist() == [1]
    assert ops.log_softmax(x).tolist() == [0]
