"""Recording: a step runs once on arrays that have a shape and a dtype but no data.

`Recorded` arrays stand behind the same `xp` seam as NumPy's; their namespace notes every call
instead of making it. Nothing is computed, so recording a deep network takes no memory; a step
that looks at an array's value (float, if, item) is refused, with the line that looked.
"""

from __future__ import annotations

import sys
import weakref
from collections import defaultdict
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from npdrt.arrays import current_phase
from npdrt.errors import Error
from npdrt.program import infer
from npdrt.program.calls import KINDS, Call, Draw, Ref, Stream, Value
from npdrt.program.infer import Form

PACKAGE = Path(__file__).resolve().parents[1]
MACHINERY = (  # beginnings of files whose lines ask for a call on behalf of others
    *(str(PACKAGE / name) for name in ("program/recorder.py", "arrays.py", "optim/optimizer.py")),
    *(str(PACKAGE / name) for name in ("compute.py", "exact.py")),
    str(Path(np.__file__).parent),
    "<",
)
_HOST = (
    *("__bool__", "__float__", "__int__", "__index__", "__complex__", "__array__"),
    *("item", "tolist", "tobytes"),
)
_NUMBERS = (int, float, bool)
_SPELLED = {  # NumPy's name -> the standard's
    **{"absolute": "abs", "invert": "bitwise_invert"},
    **{"concatenate": "concat", "transpose": "permute_dims"},
}
_ASKED = (
    "edges",
    "flags",
    "get",
    "real",
)  # attributes that code asks for to tell the kind of an array
_BINARY = {
    **{"add": "add", "sub": "subtract", "mul": "multiply", "truediv": "divide", "pow": "power"},
    **{"and": "bitwise_and", "or": "bitwise_or", "xor": "bitwise_xor", "mod": "remainder"},
    **{"floordiv": "floor_divide", "matmul": "matmul"},
}
_COMPARISONS = {
    **{"eq": "equal", "ne": "not_equal", "lt": "less", "le": "less_equal"},
    **{"gt": "greater", "ge": "greater_equal"},
}


class NoAttribute(Error, AttributeError):
    """A recorded array was asked for an attribute that it does not have."""


class Recorded:
    """An array of a program that is being recorded: a shape and a dtype, no data.

    weak: it stands for a Python float, which takes the dtype of the arrays it meets.
    """

    __slots__ = ("__weakref__", "index", "recorder", "weak")
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, recorder: Recorder, index: int, weak: bool = False):
        self.recorder, self.index, self.weak = recorder, index, weak

    @property
    def _form(self) -> Form:
        return self.recorder.forms[self.index]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape."""
        return self._form.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype."""
        return self._form.dtype

    @property
    def ndim(self) -> int:
        """The number of dimensions."""
        return self._form.ndim

    @property
    def size(self) -> int:
        """The number of elements."""
        return self._form.size

    @property
    def strides(self) -> tuple[int, ...]:
        """The strides, in bytes, that the array has when the program runs."""
        return self._form.strides

    @property
    def owner(self) -> int:
        """The number of the value whose memory it is in."""
        base = self.recorder.values[self.index].base
        return self.index if base is None else base

    def __array_namespace__(self, api_version: str | None = None) -> Any:
        return self.recorder.namespace

    def __array_ufunc__(self, ufunc: Any, method: str, *args: Any, **settings: Any) -> Any:
        """NumPy's own functions of a recorded array, and operators of its arrays with one."""
        name = _SPELLED.get(ufunc.__name__, ufunc.__name__)
        if any(hasattr(x, "edges") for x in args):
            return NotImplemented
        if method != "__call__" or settings or name not in KINDS:
            raise Error(f"{self.recorder.source()}: numpy.{ufunc.__name__} cannot be recorded so")
        return self.recorder.call(name, args)

    def __array_function__(self, function: Any, types: Any, args: Any, settings: Any) -> Any:
        """Functions of NumPy, called with a recorded array."""
        name = _SPELLED.get(function.__name__, function.__name__)
        if name not in (*KINDS, "zeros_like", "ones_like"):
            raise Error(
                f"{self.recorder.source()}: numpy.{function.__name__} cannot be recorded; a step "
                "computes with npdrt.ops, or with the functions npdrt.program.calls.KINDS names"
            )
        return getattr(self.recorder.namespace, name)(*args, **settings)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name in _ASKED:
            raise AttributeError(name)
        raise NoAttribute(
            f"{self.recorder.source()}: a recorded array has no .{name}; with "
            "xp = npdrt.arrays.namespace(x) there are xp.sum(x), xp.matrix_transpose(x), ..."
        )

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Any:
        return (self[i] for i in range(self.shape[0]))

    def __getitem__(self, index: Any) -> Any:
        return self.recorder.call("getitem", (self, self.recorder.index(index)))

    def __setitem__(self, index: Any, value: Any) -> None:
        self.recorder.check_writable(self)
        args = (self, self.recorder.index(index), value)
        self.index = self.recorder.call("assign", args).index

    def __neg__(self) -> Any:
        return self.recorder.operator("negative", (self,))

    def __abs__(self) -> Any:
        return self.recorder.operator("abs", (self,))

    def __invert__(self) -> Any:
        return self.recorder.call("bitwise_invert", (self,))

    def label(self, name: str) -> None:
        """Name the value in the listing, unless it has a name."""
        self.recorder.names.setdefault(self.index, name)

    def __repr__(self) -> str:
        return f"Recorded(shape={self.shape}, dtype={self.dtype})"


def _operator(function: str, swapped: bool = False) -> Any:
    def operate(self: Recorded, other: Any) -> Any:
        if hasattr(other, "edges"):  # a Tensor has the operation with its derivative
            return NotImplemented
        args = (other, self) if swapped else (self, other)
        return self.recorder.operator(function, args)

    return operate


def _in_place(function: str) -> Any:
    def operate(self: Recorded, other: Any) -> Any:
        if self.weak or hasattr(other, "edges"):  # both make a new value
            return NotImplemented
        self[...] = self.recorder.call(function, (self, other))
        return self

    return operate


def _host_look(name: str) -> Any:
    def refuse(self: Recorded, *args: Any, **settings: Any) -> NoReturn:
        what = name.strip("_")
        what = "if, while, and, or" if what == "bool" else f"{what}()"
        raise Error(
            f"{self.recorder.source()}: the step looks at the value of a {self.dtype}"
            f"{list(self.shape)} array on the host ({what}) while it is recorded; a program has "
            "no values yet: use xp.where, or return the array and look at the result"
        )

    return refuse


for _name, _function in _BINARY.items():
    setattr(Recorded, f"__{_name}__", _operator(_function))
    setattr(Recorded, f"__r{_name}__", _operator(_function, swapped=True))
    setattr(Recorded, f"__i{_name}__", _in_place(_function))
for _name, _function in _COMPARISONS.items():
    setattr(Recorded, f"__{_name}__", _operator(_function))
for _name in _HOST:
    setattr(Recorded, _name, _host_look(_name))


class Namespace:
    """The array module of recorded arrays: every function notes a call."""

    __name__ = "a program being recorded (give the step every array as an argument)"

    def __init__(self, recorder: Recorder):
        self._recorder, self.has_kernels = recorder, recorder.has_kernels

    def __getattr__(self, name: str) -> Any:
        if name in KINDS and name not in ("getitem", "assign", "copy"):
            return lambda *args, **settings: self._recorder.call(name, args, settings)
        if name in ("isdtype", "finfo", "iinfo", "result_type", "newaxis", "pi", "inf", "nan"):
            return getattr(np, name)
        if isinstance(getattr(np, name, None), type):
            return getattr(np, name)  # a dtype
        raise Error(
            f"{self._recorder.source()}: {name} cannot be recorded; a step computes with "
            "npdrt.ops, or with the functions npdrt.program.calls.KINDS names"
        )

    def asarray(self, x: Any, dtype: Any = None, copy: bool | None = None) -> Any:
        """A recorded array in `dtype`; a number or host array becomes a constant."""
        if isinstance(x, Recorded):
            if copy and (dtype is None or x.dtype == np.dtype(dtype)):
                return self._recorder.call("copy", (x,))
            if dtype is None or x.dtype == np.dtype(dtype):
                return Recorded(self._recorder, x.index) if x.weak else x
            return self._recorder.call("astype", (x, np.dtype(dtype).name))
        return self._recorder.constant(np.asarray(x, dtype=dtype))

    def astype(self, x: Any, dtype: Any) -> Any:
        """A recorded array in another dtype."""
        return self._recorder.call("astype", (x, np.dtype(dtype).name))

    def record_composite(
        self, name: str, arrays: tuple[Any, ...], settings: dict[str, Any], *, strided: bool
    ) -> Any:
        """A function that a program replays with a kernel of its own. Asked for again with the
        same values, it gives the first result."""
        known = self._recorder.composites
        key = (name, *(x.index for x in arrays), *sorted(settings.items()))
        if key not in known:
            given = arrays if strided else tuple(map(self._contiguous, arrays))
            known[key] = self._recorder.call(name, given, settings)
        return known[key]

    def _contiguous(self, x: Any) -> Any:
        contiguous = self._recorder.values[x.index].contiguous
        return x if contiguous else self._recorder.call("copy", (x,))

    def zeros_like(self, x: Any) -> Any:
        """Zeros of the form of x."""
        return self._like("zeros", x)

    def ones_like(self, x: Any) -> Any:
        """Ones of the form of x."""
        return self._like("ones", x)

    def _like(self, function: str, x: Any) -> Any:
        """A new array with the order of axes of x, as NumPy makes it."""
        order = infer.order(self._recorder.forms[x.index].strides)
        shape = tuple(x.shape[i] for i in order)
        made = self._recorder.call(function, (shape,), {"dtype": x.dtype})
        if order == tuple(range(x.ndim)):
            return made
        back = tuple(map(order.index, range(x.ndim)))
        return self._recorder.call("permute_dims", (made, back))


class Recorder:
    """The values and calls of a program as they are noted. has_kernels: it is for a GPU, where
    primitives with a kernel are one call."""

    def __init__(self, has_kernels: bool = False) -> None:
        self.has_kernels = has_kernels
        self.values: list[Value] = []
        self.forms: list[Form] = []
        self.calls: list[Call] = []
        self.names: dict[int, str] = {}
        self.composites: dict[tuple[Any, ...], Any] = {}  # by function, values and settings
        self.constants: dict[int, np.ndarray[Any, Any]] = {}
        self.draws: dict[int, Draw] = {}
        self.views: dict[int, list[weakref.ref[Recorded]]] = defaultdict(list)  # by owner
        self.namespace = Namespace(self)

    def input(
        self, shape: tuple[int, ...], dtype: Any, name: str, origin: str, weak: bool = False
    ) -> Recorded:
        """A new C-ordered array that is filled before every replay; weak: for a Python float."""
        self.names[len(self.values)] = name
        made = self._new(infer.empty(tuple(shape), np.dtype(dtype)), origin=origin)
        made.weak = weak
        return made

    def constant(self, array: np.ndarray[Any, Any]) -> Recorded:
        """An array that is the same in every replay; kept as a copy."""
        held = np.array(array, order="C")
        self.constants[len(self.values)] = held
        return self._new(infer.empty(held.shape, held.dtype), origin="constant")

    def call(
        self, function: str, args: tuple[Any, ...], settings: dict[str, Any] | None = None
    ) -> Recorded:
        """Note a call and return its result."""
        args = tuple(self._argument(a) for a in self._promoted(function, args))
        settings = {name: _plain(value) for name, value in (settings or {}).items()}
        if any(hasattr(value, "__array_namespace__") for value in settings.values()):
            raise Error(f"{self.source()}: {function}: give arrays by position, not by keyword")
        forms = infer.with_forms(args, self.forms)
        try:
            form = infer.result(function, forms, settings)
        except Error as error:
            raise Error(f"{self.source()}: {error}") from error
        if KINDS[function] == "view" and form.base is None:  # NumPy would copy here, so do we
            source = args[0]
            copied = self.call("copy", (Recorded(self, source.index),))
            return self.call(function, (copied, *args[1:]), settings)
        base, offset = infer.place(self.values, args, form)
        result = self._new(form, base, offset)
        phase = current_phase()
        self.calls.append(Call(function, args, result.index, settings, phase, self.source()))
        if base is not None:
            self.views[base].append(weakref.ref(result))
        return result

    def index(self, index: Any) -> tuple[Any, ...]:
        """A basic index in its full form."""
        try:
            return infer.basic_index(index)
        except Error as error:
            raise Error(f"{self.source()}: {error}") from None

    def operator(self, function: str, args: tuple[Any, ...]) -> Recorded:
        """Note the call of an operator, which makes a Python float of Python numbers."""
        result = self.call(function, args)
        result.weak = all(x.weak if isinstance(x, Recorded) else type(x) in _NUMBERS for x in args)
        return result

    def _promoted(self, function: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Elementwise, a Python float takes the dtype of the arrays it meets, as in NumPy."""
        weak = [isinstance(x, Recorded) and x.weak for x in args]
        if KINDS[function] != "elementwise" or not any(weak):
            return args
        met = args[1:] if function == "where" else args
        strong = [x.dtype for x in met if hasattr(x, "dtype") and not getattr(x, "weak", False)]
        dtype = np.result_type(*strong, 1.0)
        return tuple(
            self.namespace.asarray(x, dtype) if w else x for x, w in zip(args, weak, strict=True)
        )

    def check_writable(self, x: Recorded) -> None:
        """Refuse to write into memory that other arrays of the step show."""
        value = self.values[x.index]
        shown = any(view() is not None for view in self.views[x.index])
        if value.origin != "call" or value.base is not None or shown:
            kind = value.origin if value.origin != "call" else "view"
            what = {"input": "an argument", "view": "memory that a view shows"}
            raise Error(
                f"{self.source()}: the step writes into {what.get(kind, f'a {kind} array')}; only "
                "an array that it has made, and of which no view is left, can be written to"
            )

    def _new(
        self, form: Form, base: int | None = None, offset: int = 0, origin: str = "call"
    ) -> Recorded:
        value = Value(form.shape, form.dtype.name, form.strides, base, offset, "", origin)
        self.values.append(value)
        self.forms.append(form)
        return Recorded(self, len(self.values) - 1)

    def _argument(self, x: Any) -> Any:
        """An argument as a call keeps it."""
        if isinstance(x, Recorded):
            if x.recorder is not self:
                raise Error(f"{self.source()}: an array of another recording")
            return Ref(x.index)
        if isinstance(x, np.generic):
            return Ref(self.constant(np.asarray(x)).index)
        if hasattr(x, "dtype") and hasattr(x, "shape"):
            raise Error(
                f"{self.source()}: the step uses a {x.dtype}{list(x.shape)} array that is not "
                "among its arguments; pass it as one, or make it a constant with xp.asarray"
            )
        if isinstance(x, tuple | list):
            return tuple(self._argument(item) for item in x)
        return _plain(x)

    def source(self) -> str:
        """The line that asked for the call being noted: the nearest one outside the machinery."""
        frame = sys._getframe(1)
        while frame.f_back and frame.f_code.co_filename.startswith(MACHINERY):
            frame = frame.f_back
        return f"{_shown(frame.f_code.co_filename)}:{frame.f_lineno}"


@cache
def _shown(file: str) -> str:
    """A file of npdrt by its place in the package, another by its name."""
    path = Path(file).resolve()
    for root in (PACKAGE, *(PACKAGE.parent / name for name in ("models", "train"))):
        if path.is_relative_to(root):
            return (root.name / path.relative_to(root)).as_posix()
    return path.name


def _plain(x: Any) -> Any:
    """A setting as text, number or tuple: a dtype by its name."""
    if isinstance(x, np.dtype) or (isinstance(x, type) and issubclass(x, np.generic)):
        return np.dtype(x).name
    return tuple(map(_plain, x)) if isinstance(x, tuple | list) else x


DRAWN = {"uniform": "float64", "normal": "float64", "bernoulli": "bool", "permutation": "int64",
          "words": "uint64"}  # fmt: skip


class RecordedRandom:
    """A `Random` argument while a step is recorded: every draw becomes an input.

    lineage: the `of` and `at` calls that lead from the argument to this stream.
    """

    def __init__(self, recorder: Recorder, stream: Stream, lineage: Any = ()):
        self._recorder, self._stream, self._lineage = recorder, stream, lineage

    def of(self, purpose: str) -> RecordedRandom:
        """The stream for a narrower purpose."""
        return RecordedRandom(self._recorder, self._stream, (*self._lineage, ("of", purpose)))

    def at(self, step: int) -> RecordedRandom:
        """The same stream at another step."""
        return RecordedRandom(self._recorder, self._stream, (*self._lineage, ("at", step)))

    def __getattr__(self, method: str) -> Any:
        if method not in DRAWN:
            raise Error(
                f"{self._recorder.source()}: {method} of a random stream differs from step to "
                "step and cannot be read while a step is recorded; draw numbers from the stream"
            )

        def draw(shape: Any, *args: Any, **settings: Any) -> Recorded:
            size = (shape,) if isinstance(shape, int) else tuple(shape)
            steps = [str(argument) for _, argument in self._lineage]
            name = "/".join([*self._stream.path, *steps, method])
            drawn = self._recorder.input(size, DRAWN[method], name, "random")
            call = Draw(self._stream, self._lineage, method, (shape, *args), settings)
            self._recorder.draws[drawn.index] = call
            return drawn

        return draw
