"""The table of the operations: for each public operation of npdrt.ops one line or more, a call with
example arguments and the same value by other means. test_ops and test_dtypes hold every property
on every line; a new operation gets its line here."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest.mock import MagicMock

import images
import numpy as np

from npdrt import ops
from npdrt.autodiff import PRIMITIVES

try:
    import torch
except ImportError:  # a second opinion, not a requirement
    torch = MagicMock()

F = torch.nn.functional
RNG = np.random.default_rng(20200207)


# --- arguments -------------------------------------------------------------------------------


def normal(*shape: int) -> np.ndarray:
    """Values of both signs."""
    return RNG.standard_normal(shape)


def positive(*shape: int) -> np.ndarray:
    """Values in [0.2, 3)."""
    return RNG.uniform(0.2, 3.0, shape)


def apart(*shape: int) -> np.ndarray:
    """Values of both signs, at least 0.1 from each other, from 0 and from 1: no kink, no tie."""
    n = math.prod(shape)
    return RNG.permutation(0.1 * (np.arange(n) - n // 2) + 0.05).reshape(shape)


def signs(*shape: int) -> np.ndarray:
    return np.where(RNG.random(shape) < 0.5, -1.0, 1.0)


# --- the table -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A line: an operation of npdrt.ops by name, the same value by other means, the same function
    in PyTorch, arguments and settings.

    Float arrays among the arguments are differentiated, except at the positions in `constant`.
    """

    operation: str
    reference: Callable[..., Any]
    torch: Callable[..., Any]
    arguments: tuple[Any, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    constant: tuple[int, ...] = ()

    def __str__(self) -> str:
        shapes = [str(getattr(a, "shape", a)) for a in self.arguments]
        chosen = [f"{k}={v}" for k, v in self.settings.items()]
        return f"{self.operation}({', '.join(shapes + chosen)})".replace(" ", "")

    def call(self, *args: Any, **changed: Any) -> Any:
        """The operation of these arguments, with the settings of the line unless changed."""
        function = split_and_join if self.operation == "split" else getattr(ops, self.operation)
        return function(*args, **{**self.settings, **changed})

    @property
    def moves(self) -> bool:
        """Whether the operation only moves or selects elements, so that it takes any dtype."""
        made_of = {"split": "getitem", "embedding": "gather"}
        name = made_of.get(self.operation, self.operation)
        return name in PRIMITIVES and PRIMITIVES[name].moves

    def analytic(self) -> bool:
        composed = self.operation not in PRIMITIVES
        return composed or PRIMITIVES[self.operation].analytic

    def differentiated(self) -> list[int]:
        return [
            i
            for i, a in enumerate(self.arguments)
            if getattr(a, "dtype", None) == np.float64 and i not in self.constant
        ]


def case(
    operation: str,
    reference: Callable[..., Any],
    torch_function: Callable[..., Any],
    *arguments: Any,
    constant: tuple[int, ...] = (),
    **settings: Any,
) -> Case:
    return Case(operation, reference, torch_function, arguments, settings, constant)


def split_and_join(x: Any, *, sizes: tuple[int, ...], axis: int = 0) -> Any:
    """`split`, made one value: the parts joined in reverse order."""
    return ops.concat(*ops.split(x, sizes=sizes, axis=axis)[::-1], axis=axis)


def joined_reversed(x: Any, sizes: tuple[int, ...], axis: int, library: Any) -> Any:
    parts = np.split(x, np.cumsum(sizes)[:-1], axis) if library is np else x.split(sizes, axis)
    return library.concatenate(tuple(parts)[::-1], axis)


def each(function: Callable[..., float]) -> Callable[..., Any]:
    """A function of Python floats applied element by element, with broadcasting."""
    return np.vectorize(function, otypes=[float])


def log_sum_exp(x: np.ndarray, axis: Any = None, keepdims: bool = False) -> Any:
    return np.log(np.sum(np.exp(x), axis=axis, keepdims=keepdims))


def cross_entropy(z: np.ndarray, labels: np.ndarray, smoothing: float) -> float:
    z, labels = z.reshape(-1, z.shape[-1]), labels.reshape(-1)
    losses = []
    for row, label in zip(z, labels, strict=True):
        q = np.full(row.size, smoothing / row.size)
        q[label] += 1.0 - smoothing
        losses.append(log_sum_exp(row) - np.dot(q, row))
    return math.fsum(losses) / len(losses)


def torch_cross_entropy(z: Any, labels: Any, smoothing: float) -> Any:
    rows = z.reshape(-1, z.shape[-1])
    return F.cross_entropy(rows, labels.reshape(-1).long(), label_smoothing=smoothing)


ELEMENTWISE = [
    case("absolute", each(abs), torch.abs, apart(3, 4)),
    case("erf", each(math.erf), torch.erf, np.linspace(-7, 7, 57)),
    case("exp", each(math.exp), torch.exp, normal(3, 4)),
    case("gelu", each(lambda x: x * math.erfc(-x / math.sqrt(2)) / 2), F.gelu, 2 * normal(3, 7)),
    case("leaky_relu", each(lambda x: x if x > 0 else 0.01 * x), F.leaky_relu, apart(3, 4)),
    case("log", each(math.log), torch.log, positive(3, 4)),
    case("negative", each(operator.neg), torch.neg, normal(3, 4)),
    case("relu", each(lambda x: max(x, 0.0)), F.relu, apart(3, 4)),
    case("sigmoid", each(lambda x: 1 / (1 + math.exp(-x))), torch.sigmoid, 4 * normal(3, 4)),
    case("softplus", each(lambda x: math.log1p(math.exp(x))), F.softplus, 4 * normal(3, 4)),
    case("sqrt", each(math.sqrt), torch.sqrt, positive(3, 4)),
    case("tanh", each(math.tanh), torch.tanh, normal(3, 4)),
]

BROADCASTING = [
    case("add", each(operator.add), torch.add, normal(3, 4), normal(4)),
    case("subtract", each(operator.sub), torch.sub, normal(2, 1, 4), normal(3, 1)),
    case("multiply", each(operator.mul), torch.mul, normal(3, 4), normal(3, 1)),
    case("divide", each(operator.truediv), torch.div, normal(3, 4), positive(1, 4)),
    case("power", each(operator.pow), torch.pow, positive(3, 4), normal(4)),
    case("maximum", each(max), torch.maximum, apart(3, 4), apart(4) + 0.03),
    case("minimum", each(min), torch.minimum, apart(3, 4), apart(3, 1) + 0.03),
    case("where", np.where, torch.where, normal(3, 4) > 0, normal(4), normal(3, 1)),
]

SCALAR_SETTINGS = [
    case("leaky_relu", each(lambda x: x if x > 0 else 0.3 * x), lambda x: F.leaky_relu(x, 0.3),
         apart(3, 4), a=0.3),
    case("clip", each(lambda x: min(max(x, -0.2), 0.4)), lambda x: x.clip(-0.2, 0.4),
         apart(3, 4), low=-0.2, high=0.4),
    case("clip", each(lambda x: min(x, 0.4)), lambda x: x.clip(max=0.4), apart(3, 4), high=0.4),
    case("clip", each(lambda x: max(x, 0.0)), lambda x: x.clip(min=0.0), apart(3, 4), low=0.0),
    case("add", each(operator.add), torch.add, normal(3), 2.5),
    case("subtract", each(operator.sub), lambda a, b: a - b, 2.5, normal(3)),
    case("divide", each(operator.truediv), lambda a, b: a / b, 2, positive(3)),
    case("maximum", each(max), lambda a, b: a.clip(min=b), apart(5), 0.0),
    case("power", each(operator.pow), torch.pow, normal(3, 4), 3),
    case("power", each(operator.pow), torch.pow, positive(3, 4), -0.5),
    case("power", each(operator.pow), torch.pow, normal(3, 4), 0),
    case("power", each(operator.pow), torch.pow, 2.5, normal(3, 4)),
]  # fmt: skip

LINEAR = [
    case("matmul", lambda a, b: np.einsum("ij,jk->ik", a, b), torch.matmul,
         normal(3, 4), normal(4, 5)),
    case("matmul", lambda a, b: np.einsum("...ij,...jk->...ik", a, b), torch.matmul,
         normal(2, 1, 3, 4), normal(5, 4, 2)),
    case("linear", lambda x, w, b: np.einsum("ni,oi->no", x, w) + b, F.linear,
         normal(5, 4), normal(3, 4), normal(3)),
    case("linear", lambda x, w: np.einsum("ni,oi->no", x, w), F.linear, normal(5, 4), normal(3, 4)),
    case("linear", lambda x, w, b: np.einsum("...i,oi->...o", x, w) + b, F.linear,
         normal(2, 5, 4), normal(3, 4), normal(3)),
    case("spectral_normalise", lambda w, u, v: w / np.einsum("i,ij,j", u, w, v),
         lambda w, u, v: w / (u @ w @ v), normal(3, 4), positive(3), positive(4),
         constant=(1, 2)),
    case("spectral_normalise", lambda w, u, v: w / np.einsum("i,ij,j", u, w.reshape(3, -1), v),
         lambda w, u, v: w / (u @ w.flatten(1) @ v), normal(3, 2, 2, 1), positive(3), positive(4),
         constant=(1, 2)),
]  # fmt: skip


def standard(x: Any, axes: tuple[int, ...], eps: float) -> Any:
    """(x - mean) / sqrt(var + eps) in NumPy."""
    return (x - x.mean(axes, keepdims=True)) / np.sqrt(x.var(axes, keepdims=True) + eps)


def per_channel(x: Any, gain: Any, bias: Any, eps: float) -> Any:
    """Batch normalisation with the channels in axis 0."""
    shape = (-1, *[1] * (x.ndim - 1))
    return standard(x, tuple(range(1, x.ndim)), eps) * gain.reshape(shape) + bias.reshape(shape)


def torch_per_channel(x: Any, gain: Any, bias: Any, eps: float) -> Any:
    y = F.batch_norm(x.movedim(0, 1), None, None, gain, bias, training=True, eps=eps)
    return y.movedim(1, 0)


def per_example(x: Any, gain: Any, bias: Any, eps: float) -> Any:
    """Batch normalisation of (C, N, H, W) with a gain and a bias (C, N)."""
    return standard(x, (1, 2, 3), eps) * gain[:, :, None, None] + bias[:, :, None, None]


def torch_per_example(x: Any, gain: Any, bias: Any, eps: float) -> Any:
    y = F.batch_norm(x.movedim(0, 1), None, None, training=True, eps=eps).movedim(1, 0)
    return y * gain[:, :, None, None] + bias[:, :, None, None]


def per_channel_with(x: Any, mean: Any, var: Any, gain: Any, bias: Any, eps: float) -> Any:
    """Channels in axis 1, with given statistics."""
    mean, var, gain, bias = (a[:, None, None] for a in (mean, var, gain, bias))
    return (x - mean) / np.sqrt(var + eps) * gain + bias


def grouped(x: Any, groups: int, gain: Any = 1.0, bias: Any = 0.0, eps: float = 1e-5) -> Any:
    """Group normalisation of (N, C, ...)."""
    shape = (-1, *[1] * (x.ndim - 2))
    cut = standard(x.reshape(x.shape[0], groups, -1), (2,), eps).reshape(x.shape)
    return cut * np.reshape(gain, shape) + np.reshape(bias, shape)


NORMALISATIONS = [
    case("batch_norm", lambda x, a, b: per_channel(x, a, b, 1e-5),
         lambda x, a, b: torch_per_channel(x, a, b, 1e-5), 2 * normal(3, 2, 4, 3) + 1, normal(3),
         normal(3), channel_axis=0),
    case("batch_norm", lambda x, a, b: per_channel(x.T, a, b, 0.1).T,
         lambda x, a, b: F.batch_norm(x, None, None, a, b, training=True, eps=0.1), normal(6, 4),
         positive(4), normal(4), channel_axis=-1, eps=0.1),
    case("batch_norm", lambda x: standard(x, (1,), 0.01),
         lambda x: torch_per_channel(x, None, None, 0.01), normal(4, 5), channel_axis=0, eps=0.01),
    case("conditional_batch_norm", lambda x, a, b: per_example(x, a, b, 1e-5),
         lambda x, a, b: torch_per_example(x, a, b, 1e-5), 2 * normal(3, 4, 2, 3) + 1,
         normal(3, 4), normal(3, 4)),
    case("conditional_batch_norm", lambda x, a, b: per_example(x, a, b, 0.1),
         lambda x, a, b: torch_per_example(x, a, b, 0.1), normal(2, 3, 1, 5), normal(2, 3),
         normal(2, 3), eps=0.1),
    case("batch_norm_inference",
         lambda x, m, v, a, b: per_channel_with(x, m, v, a, b, 1e-3),
         lambda x, m, v, a, b: F.batch_norm(x, m, v, a, b, eps=1e-3), normal(5, 3, 2, 2),
         normal(3), positive(3), normal(3), normal(3), channel_axis=1, eps=1e-3,
         constant=(1, 2)),
    case("layer_norm", lambda x, a, b: standard(x, (-1,), 1e-5) * a + b,
         lambda x, a, b: F.layer_norm(x, (6,), a, b), normal(2, 5, 6), normal(6), normal(6)),
    case("layer_norm", lambda x, a: standard(x, (1, 2), 0.1) * a,
         lambda x, a: F.layer_norm(x, (3, 4), a, None, 0.1), normal(5, 3, 4), normal(3, 4),
         axes=(-1, 1), eps=0.1),
    case("layer_norm", lambda x, a, b: standard(x, (0,), 1e-5) * a[:, None] + b[:, None],
         lambda x, a, b: F.layer_norm(x.T, (4,), a, b).T, normal(4, 3), normal(4), normal(4),
         axes=0),
    case("group_norm", lambda x, a, b: grouped(x, 2, a, b, 1e-5),
         lambda x, a, b: F.group_norm(x, 2, a, b), normal(3, 4, 2, 3), normal(4), normal(4),
         groups=2, channel_axis=1),
    case("group_norm", lambda x: np.moveaxis(grouped(np.moveaxis(x, 0, 1), 3, eps=0.1), 1, 0),
         lambda x: F.group_norm(x.movedim(0, 1), 3, eps=0.1).movedim(1, 0), normal(6, 2, 3),
         groups=3, channel_axis=0, eps=0.1),
    case("weight_norm", lambda w: w / np.sqrt(0.1 + (w * w).sum(1, keepdims=True)),
         lambda w: w / (0.1 + (w * w).sum(1, keepdim=True)).sqrt(), normal(4, 3), eps=0.1),
    case("weight_norm", lambda w, g: w * (g / np.sqrt((w * w).sum((1, 2, 3))))[:, None, None, None],
         lambda w, g: torch._weight_norm(w, g.reshape(-1, 1, 1, 1), 0), normal(4, 3, 2, 2),
         positive(4)),
    case("entry_norm", lambda w: w / np.sqrt(0.1 + w * w), lambda w: w / (0.1 + w * w).sqrt(),
         normal(4, 3), eps=0.1),
]  # fmt: skip


def attend(
    q: Any, k: Any, v: Any, bias: Any = 0.0, keep: Any = 1.0, scale: Any = None, rate: float = 0.0
) -> Any:
    """Scaled dot-product attention as its formula has it, in NumPy."""
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    p = np.exp(scale * np.einsum("...ld,...sd->...ls", q, k) + bias)
    p = p / p.sum(-1, keepdims=True) * keep / (1 - rate)
    return np.einsum("...ls,...se->...le", p, v)


def torch_attend(q: Any, k: Any, v: Any, keep: Any, rate: float) -> Any:
    """The same with dropout in PyTorch."""
    p = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)
    return (p * keep / (1 - rate)) @ v


def several_heads(q: Any, k: Any, v: Any, w: Any, b: Any, out: Any, c: Any) -> Any:
    """Multi-head attention, head by head, in NumPy; two heads."""
    size = q.shape[-1]
    parts = [slice(i, i + size) for i in range(0, 3 * size, size)]
    q, k, v = (x @ w[p].T + b[p] for x, p in zip((q, k, v), parts, strict=True))
    cuts = (slice(0, size // 2), slice(size // 2, size))
    y = np.concatenate([attend(q[..., h], k[..., h], v[..., h]) for h in cuts], -1)
    return y @ out.T + c


def torch_several_heads(q: Any, k: Any, v: Any, w: Any, b: Any, out: Any, c: Any) -> Any:
    given = [x.transpose(0, 1) for x in (q, k, v)]
    y, _ = F.multi_head_attention_forward(
        *given, q.shape[-1], 2, w, b, None, None, False, 0.0, out, c
    )
    return y.transpose(0, 1)


ALLOWED = np.arange(7) <= 2 * np.arange(4)[:, None]  # what 4 queries attend to of 7 keys
KEEP = RNG.random((2, 3, 4, 7)) < 0.6
TOKENS = RNG.integers(0, 5, (3, 4))
LANGUAGE = [
    case("attention", attend, F.scaled_dot_product_attention, normal(3, 4), normal(7, 4),
         normal(7, 2)),
    case("attention", lambda q, k, v, m: attend(q, k, v, np.where(m, 0, -np.inf)),
         F.scaled_dot_product_attention, normal(2, 3, 4, 5), normal(2, 3, 7, 5),
         normal(2, 3, 7, 5), ALLOWED),
    case("attention", lambda q, k, v, m: attend(q, k, v, m, scale=0.7),
         lambda *args: F.scaled_dot_product_attention(*args, scale=0.7), normal(2, 3, 4, 5),
         normal(2, 3, 7, 5), normal(2, 3, 7, 5), normal(2, 1, 1, 7), scale=0.7),
    case("attention", lambda q, k, v: attend(q, k, v, np.where(np.tri(4, 6), 0, -np.inf)),
         lambda *args: F.scaled_dot_product_attention(*args, is_causal=True), normal(2, 4, 3),
         normal(2, 6, 3), normal(2, 6, 4), causal=True),
    case("attention", lambda q, k, v, _, keep: attend(q, k, v, 0.0, keep, rate=0.4),
         lambda q, k, v, _, keep: torch_attend(q, k, v, keep, 0.4), normal(2, 3, 4, 5),
         normal(2, 3, 7, 5), normal(2, 3, 7, 5), None, KEEP, rate=0.4),
    case("multi_head_attention", several_heads, torch_several_heads, normal(3, 4, 6),
         normal(3, 5, 6), normal(3, 5, 6), normal(18, 6), normal(18), normal(6, 6), normal(6),
         heads=2),
    case("dropout", lambda x, keep: x * keep / 0.75, lambda x, keep: x * keep / 0.75,
         normal(3, 4), RNG.random((3, 4)) < 0.75, rate=0.25),
    case("dropout", lambda x, keep: x * keep * 2, lambda x, keep: x * keep * 2, normal(2, 3, 4),
         RNG.integers(0, 2, (3, 1)).astype("uint8"), rate=0.5),
    case("embedding", lambda w, t: w[t], lambda w, t: F.embedding(t, w), normal(5, 3), TOKENS),
]  # fmt: skip


def reductions() -> list[Case]:
    """Every reduction over every kind of axis, with and without keepdims."""
    rows: list[Case] = []
    formulas: dict[str, tuple[Any, Any, Any]] = {
        "sum": (np.sum, torch.sum, normal),
        "mean": (np.mean, torch.mean, normal),
        "max": (np.max, torch.amax, apart),
        "var": (np.var, lambda x, **s: torch.var(x, correction=0, **s), normal),
        "logsumexp": (log_sum_exp, torch.logsumexp, normal),
    }
    for axis, keepdims in itertools.product((None, 0, -2, (0, 2), (-1, 0, 1)), (False, True)):
        dim = tuple(range(3)) if axis is None else axis
        chosen = {"axis": axis, "keepdims": keepdims}
        for name, (reference, torch_function, make) in formulas.items():
            rows.append(
                case(
                    name,
                    lambda x, f=reference, s=chosen: f(x, **s),
                    lambda x, f=torch_function, d=dim, k=keepdims: f(x, dim=d, keepdim=k),
                    make(2, 3, 4),
                    **chosen,
                )
            )
    rows.append(
        case("var", lambda x: np.var(x, 1, ddof=1), lambda x: x.var(1), normal(3, 4), axis=1,
             correction=1)
    )  # fmt: skip
    return rows


def softmaxes() -> list[Case]:
    rows = []
    for axis in (0, 1, -1, -3):
        rows += [
            case("softmax", lambda x, a=axis: np.exp(x) / np.exp(x).sum(a, keepdims=True),
                 lambda x, a=axis: x.softmax(a), normal(2, 3, 4), axis=axis),
            case("log_softmax", lambda x, a=axis: x - log_sum_exp(x, a, True),
                 lambda x, a=axis: x.log_softmax(a), normal(2, 3, 4), axis=axis),
        ]  # fmt: skip
    return rows


def cross_entropies() -> list[Case]:
    rows = []
    for shape, dtype in (((5, 4), "int64"), ((2, 3, 4), "int32"), ((5, 300), "uint8")):
        for smoothing in (0.0, 0.1, 0.75):
            labels = RNG.integers(0, min(shape[-1], 256), shape[:-1]).astype(dtype)
            rows.append(
                case("softmax_cross_entropy",
                     lambda z, y, s=smoothing: cross_entropy(z, y, s),
                     lambda z, y, s=smoothing: torch_cross_entropy(z, y, s),
                     2 * normal(*shape), labels, label_smoothing=smoothing)
            )  # fmt: skip
    return rows


LOSSES = [
    *cross_entropies(),
    case("squared_error", lambda p, t: ((p - t) ** 2).mean(), F.mse_loss, normal(5, 3),
         normal(5, 3)),
    case("hinge", lambda s, y: np.maximum(0, 1 - y * s).mean(),
         lambda s, y: F.relu(1 - y * s).mean(), 3 * apart(5, 3), signs(5, 3), constant=(1,)),
]  # fmt: skip


def shapes() -> list[Case]:
    """Rearrangements: PyTorch and NumPy share the notation of most."""
    x = normal(3, 4, 5)
    rows = [
        case("reshape", lambda x: x.reshape(4, -1), lambda x: x.reshape(4, -1), x, shape=(4, -1)),
        case("broadcast_to", lambda x: np.broadcast_to(x, (2, 3, 4)),
             lambda x: x.broadcast_to((2, 3, 4)), normal(3, 1), shape=(2, 3, 4)),
        case("concat", lambda *xs: np.concatenate(xs), lambda *xs: torch.cat(xs),
             normal(2, 3), normal(1, 3), normal(4, 3)),
        case("concat", lambda *xs: np.concatenate(xs, -2), lambda *xs: torch.cat(xs, -2),
             normal(3, 2, 2), normal(3, 0, 2), normal(3, 1, 2), axis=-2),
        case("split", lambda x: joined_reversed(x, (1, 0, 3), 1, np),
             lambda x: joined_reversed(x, (1, 0, 3), 1, torch), x, sizes=(1, 0, 3), axis=1),
        case("split", lambda x: joined_reversed(x, (2, 3), -1, np),
             lambda x: joined_reversed(x, (2, 3), -1, torch), x, sizes=(2, 3), axis=-1),
        case("pad", lambda x: np.pad(x, ((1, 0), (0, 2))),
             lambda x: F.pad(x, (0, 2, 1, 0)), normal(3, 2), widths=((1, 0), (0, 2))),
        case("pad", lambda x: np.pad(x, ((2, 1),), constant_values=-7.0),
             lambda x: F.pad(x, (2, 1), value=-7.0), normal(3), widths=((2, 1),), value=-7.0),
    ]  # fmt: skip
    for axes, full in ((None, (2, 1, 0)), ((1, 2, 0), (1, 2, 0)), ((-1, 0, 1), (2, 0, 1))):
        rows.append(
            case("transpose", lambda x, a=full: np.moveaxis(x, a, (0, 1, 2)),
                 lambda x, a=full: x.permute(a), x, axes=axes)
        )  # fmt: skip
    for index in (1, -1, slice(1, None, 2), (slice(None), 0), (..., slice(0, 2)), None, ...,
                  (None, slice(2, 2), -2, None), (2, 3, 4)):  # fmt: skip
        take = lambda x, i=index: x[i]  # noqa: E731  (one function for both libraries)
        rows.append(case("getitem", take, take, x, index=index))
    return rows


def gathers() -> list[Case]:
    rows = []
    for axis, shape, dtype in (
        *((0, (6,), "int64"), (1, (2, 3), "int32"), (-1, (), "int64"), (-2, (9, 1), "uint8")),
        *((0, (0,), "int64"),),
    ):
        indices = RNG.integers(0, 3, shape).astype(dtype)
        rows.append(
            case("gather", lambda x, i, a=axis: np.take(x, i.astype(int), a),
                 lambda x, i, a=axis: torch_take(x, i.long(), a), normal(3, 4, 3), indices,
                 axis=axis)
        )  # fmt: skip
    return rows


def torch_take(x: Any, indices: Any, axis: int) -> Any:
    axis %= x.ndim
    shape = (*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :])
    return x.index_select(axis, indices.reshape(-1)).reshape(shape)


def convolutions() -> list[Case]:
    """Convolutions and pools of channel-major images."""
    rows = []
    for chosen, shape, weight in (
        ({}, (3, 2, 5, 4), (4, 3, 3, 3)),
        ({"stride": 2, "padding": 1}, (2, 3, 5, 6), (3, 2, 3, 3)),
        ({"stride": (3, 1), "padding": (0, 2), "groups": 2}, (4, 1, 7, 3), (2, 2, 2, 4)),
        ({"stride": (2, 1), "padding": (1, 0), "groups": 3}, (3, 2, 4, 5), (3, 1, 3, 2)),
        ({"stride": 2}, (3, 2, 4, 5), (2, 3, 1, 1)),
        ({}, (3, 2, 4, 2), (2, 3, 1, 1)),
    ):
        rows.append(
            case("conv2d", partial(images.convolved, **chosen),
                 images.turned(partial(F.conv2d, **chosen)), normal(*shape), normal(*weight),
                 normal(weight[0]), **chosen)
        )  # fmt: skip
    for size, stride, padding in ((2, 2, 0), (3, 2, 1), ((2, 3), (1, 3), (1, 0))):
        chosen = {"size": size, "stride": stride, "padding": padding}
        rows += [
            case("average_pool", partial(images.averaged, **chosen),
                 images.turned(lambda x, c=chosen: F.avg_pool2d(x, *c.values())),
                 normal(2, 2, 5, 6), **chosen),
            case("max_pool", partial(images.largest, **chosen),
                 images.turned(lambda x, c=chosen: F.max_pool2d(x, *c.values())),
                 apart(2, 2, 5, 6), **chosen),
        ]  # fmt: skip
    rows += [
        case("upsample", lambda x, f=factor: x.repeat(f, 2).repeat(f, 3),
             images.turned(lambda x, f=factor: F.interpolate(x, scale_factor=f, mode="nearest")),
             normal(2, 3, 2, 4), factor=factor)
        for factor in (2, 3)
    ]  # fmt: skip
    rows.append(case("global_average_pool", lambda x: x.mean((2, 3)), lambda x: x.mean((2, 3)),
                     normal(3, 2, 4, 3)))  # fmt: skip
    return rows


CASES = [
    *(*ELEMENTWISE, *BROADCASTING, *SCALAR_SETTINGS, *LINEAR, *NORMALISATIONS, *LOSSES),
    *(*reductions(), *softmaxes(), *shapes(), *gathers(), *LANGUAGE),
    *convolutions(),
]


def is_float(a: Any) -> bool:
    return isinstance(a, np.ndarray) and a.dtype.kind == "f"
