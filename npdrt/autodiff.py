"""Reverse-mode differentiation: a derivative is a function on raw arrays.

A primitive is one small function from arrays to `(value, vjps)`: the value, and for each array
argument the function that maps the cotangent of the value to the cotangent of that argument
(None if it has no derivative). The decorator `primitive` makes it return a `Tensor` if one of its
arguments is a `Tensor`; for plain arrays it returns the plain value. `backward` undoes
broadcasting and checks shapes and dtypes in one place, keeps cotangents in a dict, and frees the
graph as it goes. There are no second derivatives.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial, wraps
from typing import TYPE_CHECKING, Any

import numpy as np

from npdrt.arrays import (
    Array,
    Params,
    check_dtypes,
    check_params,
    check_plain,
    copied,
    differentiable,
    label,
    namespace,
    number,
    owner,
    phase,
    plain,
    writable,
)
from npdrt.compute import total
from npdrt.errors import Error

Vjp = Callable[[Array], Array]
ALL = slice(None)  # all arrays of a primitive
PRIMITIVES: dict[str, Callable[..., Any]] = {}  # every primitive by name, for tests and audits


INSTEAD = {  # what an array has -> what to write for a Tensor
    "T": "npdrt.ops.transpose(x)",
    "reshape": "npdrt.ops.reshape(x, shape=(...))",
    "flatten": "npdrt.ops.reshape(x, shape=(-1,))",
    "ravel": "npdrt.ops.reshape(x, shape=(-1,))",
    "dot": "x @ y",
    "size": "math.prod(x.shape)",
    "item": "x.value.item()",
}


class Tensor:
    """A value in the graph of one differentiation: its array and how it was computed.

    value: the raw array. edges: the pairs (input Tensor, vjp to it); empty for a leaf.
    name: the primitive that made it, or the parameter's name.
    """

    __slots__ = ("edges", "label_text", "name", "value")
    __array_ufunc__ = None  # NumPy hands `array * tensor` over to Tensor.__rmul__

    def __init__(self, value: Array, edges: tuple[tuple[Tensor, Vjp], ...] = (), name: str = ""):
        self.value, self.edges, self.name = value, edges, name
        self.label_text = ""  # the name that the model gave it by `npdrt.arrays.label`

    def label(self, name: str) -> None:
        """Name the value, and its cotangent, in the listing of a program."""
        self.label_text = self.label_text or name
        label(self.value, name)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the value."""
        return tuple(self.value.shape)

    @property
    def ndim(self) -> int:
        """The number of dimensions of the value."""
        return len(self.value.shape)

    @property
    def dtype(self) -> Any:
        """The dtype of the value."""
        return self.value.dtype

    if TYPE_CHECKING:  # npdrt.ops sets the operators, since it has the primitives

        def __neg__(self) -> Any: ...
        def __add__(self, other: Any) -> Any: ...
        def __mul__(self, other: Any) -> Any: ...
        def __pow__(self, other: Any) -> Any: ...
        def __matmul__(self, other: Any) -> Any: ...
        def __getitem__(self, index: Any) -> Any: ...

    def __getattr__(self, name: str) -> Any:
        """No array methods: the error names the operation."""
        call = INSTEAD.get(name) or (f"npdrt.ops.{name}(x)" if name in PRIMITIVES else "")
        hint = f"; write {call}" if call else "; compute with npdrt.ops"
        raise AttributeError(f"a Tensor has no .{name}{hint}")

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(self.shape[0]))

    def __repr__(self) -> str:
        return f"Tensor({self.name or 'leaf'}, shape={self.shape}, dtype={self.dtype})"

    def __bool__(self) -> bool:
        raise Error("the truth of a Tensor is not defined; compare its .value")


def detach(x: Any) -> Any:
    """`x` with every Tensor in it (in tuples, lists and dicts) replaced by its array."""
    if isinstance(x, Tensor):
        return x.value
    if isinstance(x, tuple | list):
        return getattr(type(x), "_make", type(x))(detach(item) for item in x)  # named tuples too
    if isinstance(x, dict):
        return {key: detach(item) for key, item in x.items()}
    return x


def primitive(
    function: Callable[..., Any] | None = None,
    *,
    analytic: bool = True,
    computes: slice | None = None,
    moves: bool = False,
    numbers: bool = False,
) -> Callable[..., Any]:
    """Make a function from arrays to `(value, vjps)` a differentiable operation.

    Arrays are positional arguments, settings keyword arguments. `vjps` is one function for a
    single array argument, else a tuple of one function (or None) for each. `analytic=False`
    marks an operation with kinks, for which the complex step is not defined.

    computes: the arrays that must be floating-point and of one dtype
    (`npdrt.arrays.check_dtypes`); None leaves the check to the function. moves: the operation only
    moves or selects their elements, so that they may be of any dtype. numbers: some arrays may be
    numbers instead; NumPy's numbers count as Python's, here and as settings.
    """
    if function is None:
        return partial(
            primitive, analytic=analytic, computes=computes, moves=moves, numbers=numbers
        )
    name = function.__name__

    @wraps(function)
    def operation(*args: Any, **settings: Any) -> Any:
        if any(isinstance(s, Tensor) for s in settings.values()):
            raise Error(f"{name}: arrays are positional arguments, settings are keywords")
        raw = [a.value if isinstance(a, Tensor) else a for a in args]
        if numbers and any(isinstance(a, np.generic) for a in args) and _meets_array(args):
            raw = [
                number(a) if isinstance(a, np.generic) else x
                for a, x in zip(args, raw, strict=True)
            ]
        check_plain(*raw)
        if computes is not None:
            check_dtypes(name, *raw[computes], moves=moves, numbers=numbers)
        try:
            value, vjps = function(*raw, **(plain(settings) if settings else settings))
        except (ValueError, TypeError, IndexError) as error:
            raise Error(_reason(function, error, raw, settings)) from error
        vjps = (vjps,) if callable(vjps) else vjps
        edges = tuple(
            (a, vjp)
            for a, vjp in zip(args, vjps, strict=False)
            if isinstance(a, Tensor) and vjp is not None
        )
        return Tensor(value, edges, name) if edges else value

    operation.analytic, operation.computes = analytic, computes  # type: ignore[attr-defined]
    operation.moves = moves  # type: ignore[attr-defined]
    PRIMITIVES[name] = operation
    return operation


def _meets_array(args: tuple[Any, ...]) -> bool:
    """Whether not all of `args` are numbers of Python or NumPy."""
    return any(hasattr(a, "dtype") and not isinstance(a, np.generic) for a in args)


def once(function: Callable[[Array], Any]) -> Callable[[Array], Any]:
    """`function`, computed once if several derivatives ask for it with the same cotangent."""
    last: list[Any] = []

    def call(g: Array) -> Any:
        if not last or last[0] is not g:
            last[:] = [g, function(g)]
        return last[1]

    return call


def graph(output: Tensor) -> list[Tensor]:
    """Every Tensor that `output` depends on, each after its inputs; `output` is last."""
    order: list[Tensor] = []
    seen: set[int] = set()
    stack: list[tuple[Tensor, bool]] = [(output, False)]
    while stack:
        node, inputs_done = stack.pop()
        if inputs_done:
            order.append(node)
        elif id(node) not in seen:
            seen.add(id(node))
            stack.append((node, True))
            stack.extend((parent, False) for parent, _ in reversed(node.edges))
    return order


def undo_broadcast(g: Array, shape: tuple[int, ...]) -> Array:
    """Sum the cotangent `g` of a broadcast array back to the array's own `shape`."""
    if tuple(g.shape) == shape:
        return g
    extra = len(g.shape) - len(shape)
    stretched = (extra + i for i, n in enumerate(shape) if n == 1 and g.shape[extra + i] != 1)
    return namespace(g).reshape(total(g, (*range(extra), *stretched)), shape)


def backward(output: Tensor, cotangent: Array) -> dict[int, Array]:
    """Cotangents of the leaves under `output`, by `id` of the leaf.

    It empties the graph: call it once.
    """
    order = graph(output)
    cotangents = {id(output): cotangent}
    with phase("backward"):
        while order:
            node = order.pop()
            edges, node.edges = node.edges, ()
            if not edges:
                continue
            g = cotangents.pop(id(node))
            if node.label_text:
                label(g, f"d {node.label_text}")
            for parent, vjp in edges:
                part = _checked(vjp(g), parent, node.name)
                have = cotangents.get(id(parent))
                cotangents[id(parent)] = part if have is None else have + part
    return cotangents


def _checked(g: Array, parent: Tensor, name: str) -> Array:
    """A cotangent summed to the shape of its argument; refuses any other shape or dtype."""
    found, shape = tuple(g.shape), parent.shape
    trailing = found[len(found) - len(shape) :]
    if len(found) < len(shape) or any(
        n not in (1, m) for n, m in zip(shape, trailing, strict=True)
    ):
        raise Error(f"{name}: the derivative has shape {found} for an argument of shape {shape}")
    g = undo_broadcast(g, shape)
    if g.dtype != parent.value.dtype:
        raise Error(
            f"{name}: the derivative is {g.dtype} for an argument of {parent.value.dtype}; "
            "keep the dtype of the argument in the derivative"
        )
    return g


def _reason(
    function: Callable[..., Any], error: Exception, raw: Sequence[Any], settings: Mapping[str, Any]
) -> str:
    """Why a primitive raised: a call that does not fit it, or else the library's reason."""
    name, signature = function.__name__, inspect.signature(function)
    try:
        signature.bind(*raw, **settings)
    except TypeError as misfit:
        names = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
        form = signature.replace(parameters=names, return_annotation=signature.empty)
        return f"{name}: {misfit}; call it as {name}{form}"
    shapes = ", ".join(str(getattr(a, "shape", a)) for a in raw)
    reason = str(error).removeprefix(f"{name}: ").rstrip()
    return f"{name}: {reason}; arguments: {shapes}"


def value_and_grad(function: Callable[..., Any], *, has_aux: bool = False) -> Callable[..., Any]:
    """`function(params, *args) -> loss` made to return `(loss, grads)`.

    params: dict of name -> array. loss: a real 0-d value. grads: same names, shapes and dtypes as
    params, zero if the loss does not depend on a parameter. Each is in its own memory, so you may
    write to it. With `has_aux` the function returns `(loss, aux)` and the result is
    `((loss, aux), grads)`, aux as plain arrays.

    Raises `Error` if params is not a dict or the loss is not a scalar.

    >>> import numpy as np
    >>> import npdrt.ops as ops
    >>> squares = value_and_grad(lambda p: ops.sum(p["w"] * p["w"]))
    >>> loss, grads = squares({"w": np.array([1.0, 2.0])})
    >>> float(loss), grads["w"]
    (5.0, array([2., 4.]))
    """

    @wraps(function)
    def differentiated(params: Params, *args: Any, **settings: Any) -> Any:
        check_params(params)
        leaves = {name: _leaf(value, name) for name, value in params.items()}
        result = function(leaves, *args, **settings)
        output, aux = result if has_aux else (result, None)
        loss = detach(output)
        if getattr(loss, "shape", None) != ():
            found = getattr(loss, "shape", type(loss).__name__)
            raise Error(f"value_and_grad: expected a scalar loss, a 0-d array; got {found}")
        aux = detach(aux)
        grads = _gradients(output, leaves)
        return ((loss, aux), grads) if has_aux else (loss, grads)

    return differentiated


def _leaf(value: Array, name: str) -> Tensor:
    """A parameter as a leaf of the graph."""
    namespace(value)
    if not differentiable(value):
        raise Error(
            f"{name}: a parameter is float32 or float64; got {value.dtype}; convert it first, for "
            'example x.astype("float32")'
        )
    return Tensor(value, name=name)


def _gradients(output: Any, leaves: dict[str, Tensor]) -> Params:
    cotangents: dict[int, Array] = {}
    with phase("backward"):
        if isinstance(output, Tensor):
            one = namespace(output.value).ones((), dtype=output.value.dtype)
            cotangents = backward(output, one)
        grads = {
            name: cotangents[id(leaf)] if id(leaf) in cotangents else _zeros_like(leaf.value)
            for name, leaf in leaves.items()
        }
        grads = _unaliased(grads, {owner(leaf.value) for leaf in leaves.values()})
    return {name: label(g, f"d {name}") for name, g in grads.items()}


def _unaliased(grads: Params, used_owners: set[int]) -> Params:
    """The gradients, each in its own writable memory; those that share memory with each other or
    with `used_owners`, the owners of other arrays, are copied. Few are."""
    unaliased = {}
    for name, g in grads.items():
        free = writable(g) and owner(g) not in used_owners
        unaliased[name] = g if free else copied(g)
        used_owners.add(owner(unaliased[name]))
    return unaliased


def _zeros_like(x: Array) -> Array:
    return namespace(x).zeros(tuple(x.shape), dtype=x.dtype)


__all__ = [
    "PRIMITIVES",
    "Tensor",
    "backward",
    "detach",
    "graph",
    "once",
    "primitive",
    "value_and_grad",
]
