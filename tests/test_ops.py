"""The primitives: one table of cases, and every property held on every row of it."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest.mock import MagicMock

import autograd
import autograd.numpy as anp
import backends
import images
import mpmath
import numpy as np
import pytest
from backends import Backend
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from npdrt import arrays, ops
from npdrt.autodiff import PRIMITIVES, Tensor, backward, undo_broadcast
from npdrt.errors import Error
from npdrt.ops.shape import scatter_add

try:
    import torch
except ImportError:  # a second opinion, not a requirement
    torch = MagicMock()

F = torch.nn.functional
needs_torch = pytest.mark.skipif(isinstance(torch, MagicMock), reason="PyTorch is not installed")
DTYPES = ("float32", "float64")
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
    """One call: an operation, the same value by other means, the same function in PyTorch.

    Float arrays among the arguments are differentiated, apart from the positions in `constant`.
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

    def call(self, *args: Any) -> Any:
        return OPERATIONS[self.operation](*args, **self.settings)

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
    rows.append(case("global_average_pool", lambda x: x.mean((2, 3)), lambda x: x.mean((2, 3)),
                     normal(3, 2, 4, 3)))  # fmt: skip
    return rows


CASES = [
    *(*ELEMENTWISE, *BROADCASTING, *SCALAR_SETTINGS, *LINEAR, *NORMALISATIONS, *LOSSES),
    *(*reductions(), *softmaxes(), *shapes(), *gathers(), *LANGUAGE),
    *convolutions(),
]
COMPOSED: dict[str, Callable[..., Any]] = {
    "split": split_and_join,
    "group_norm": ops.group_norm,
    "embedding": ops.embedding,
    "multi_head_attention": ops.multi_head_attention,
}
OPERATIONS: dict[str, Callable[..., Any]] = {**PRIMITIVES, **COMPOSED}
every_case = pytest.mark.parametrize("row", CASES, ids=str)


def test_every_operation_has_a_case() -> None:
    tested = {row.operation for row in CASES}
    assert set(PRIMITIVES) <= tested
    assert set(ops.__all__) == tested


# --- comparison ------------------------------------------------------------------------------


def error(ours: Any, reference: Any) -> float:
    """max|difference| / max|reference|; the plain difference where the reference is 0."""
    ours, reference = np.asarray(ours), np.asarray(reference)
    assert ours.shape == reference.shape
    difference = np.max(np.abs(ours - reference), initial=0.0)
    scale = np.max(np.abs(reference), initial=0.0)
    return float(difference / scale if scale else difference)


def values(row: Case, dtype: str = "float64") -> list[Any]:
    """The arguments, floats in `dtype`, locked against writing."""
    converted = [a.astype(dtype) if is_float(a) else a for a in row.arguments]
    for a in converted:
        if isinstance(a, np.ndarray):
            a.flags.writeable = False
    return converted


def is_float(a: Any) -> bool:
    return isinstance(a, np.ndarray) and a.dtype.kind == "f"


def as_tensors(row: Case, args: list[Any]) -> list[Any]:
    wanted = row.differentiated()
    return [Tensor(a) if i in wanted else a for i, a in enumerate(args)]


def gradients(row: Case, args: list[Any], cotangent: Any) -> list[Any]:
    """The cotangents of the differentiated arguments."""
    tensors = as_tensors(row, args)
    found = backward(row.call(*tensors), cotangent)
    return [found[id(t)] for t in tensors if isinstance(t, Tensor)]


def cotangent_of(value: Any) -> np.ndarray:
    """A cotangent without symmetry, of the shape and dtype of `value`."""
    n = np.arange(math.prod(value.shape)).reshape(value.shape)
    return (np.cos(n + 0.3) + 0.1 * np.sin(7 * n)).astype(value.dtype)


def shifted(row: Case, position: int, index: tuple[int, ...], step: complex) -> Any:
    """The weighted value with one coordinate of one argument moved by `step`."""
    args = values(row)
    args[position] = args[position].astype(type(step))
    args[position][index] += step
    with arrays.quiet():
        value = row.call(*args)
    return np.sum(value * cotangent_of(value.real))


def difference_quotients(row: Case, quotient: Callable[..., float]) -> list[np.ndarray]:
    return [
        np.array([quotient(i, index) for index in np.ndindex(row.arguments[i].shape)]).reshape(
            row.arguments[i].shape
        )
        for i in row.differentiated()
    ]


def worst(ours: list[Any], reference: list[Any]) -> float:
    return max(error(a, b) for a, b in zip(ours, reference, strict=True))


# --- every property of every row -------------------------------------------------------------


@every_case
def test_value(row: Case) -> None:
    args = values(row)
    assert error(row.call(*args), row.reference(*args)) <= 1e-14


@pytest.mark.parametrize("row", [row for row in CASES if row.analytic()], ids=str)
def test_gradient_against_complex_step(row: Case) -> None:
    args = values(row)
    ours = gradients(row, args, cotangent_of(row.call(*args)))
    step = 1e-30
    exact = difference_quotients(row, lambda i, at: shifted(row, i, at, step * 1j).imag / step)
    assert worst(ours, exact) <= 1e-12


@every_case
def test_gradient_against_central_differences(row: Case) -> None:
    args, h = values(row), 1e-5
    ours = gradients(row, args, cotangent_of(row.call(*args)))
    rough = difference_quotients(
        row, lambda i, at: (shifted(row, i, at, h) - shifted(row, i, at, -h)) / (2 * h)
    )
    assert worst(ours, rough) <= 1e-7


def torch_gradients(row: Case, args: list[Any], cotangent: np.ndarray) -> tuple[Any, list[Any]]:
    tensors = [torch.tensor(a) if isinstance(a, np.ndarray) else a for a in args]
    wanted = [tensors[i].requires_grad_() for i in row.differentiated()]
    value = row.torch(*tensors)
    if not value.requires_grad:  # PyTorch knows that x**0 does not depend on x
        return value.numpy(), [np.zeros(t.shape) for t in wanted]
    found = torch.autograd.grad(value, wanted, torch.tensor(cotangent))
    return value.detach().numpy(), [g.numpy() for g in found]


@needs_torch
@every_case
def test_value_and_gradient_against_torch(row: Case) -> None:
    args = values(row)
    cotangent = cotangent_of(row.call(*args))
    value, theirs = torch_gradients(row, args, cotangent)
    assert error(row.call(*args), value) <= 1e-12
    assert worst(gradients(row, args, cotangent), theirs) <= 1e-9


@every_case
@pytest.mark.parametrize("dtype", DTYPES)
def test_on_every_backend(row: Case, dtype: str, backend: Backend) -> None:
    """Same values and cotangents as NumPy, in the dtype of the arguments, nothing written to,
    nothing fetched to the host."""
    host = values(row, dtype)
    value = row.call(*host)
    cotangent = cotangent_of(value)
    expected = [value, *gradients(row, host, cotangent)]

    args = [backend.asarray(a) if isinstance(a, np.ndarray) else a for a in host]
    g = backend.asarray(cotangent)
    waits = backends.synchronisations
    found = [row.call(*args), *gradients(row, args, g)]
    assert backends.synchronisations == waits
    for ours, theirs in zip(found, expected, strict=True):
        assert arrays.namespace(ours) is backend.xp
        assert_same(backend, ours, theirs, dtype)
    for before, after in zip([*host, cotangent], [*args, g], strict=True):
        if isinstance(before, np.ndarray):
            assert np.array_equal(backend.to_host(after), before)


def assert_same(backend: Backend, ours: Any, expected: Any, dtype: str) -> None:
    host = backend.to_host(ours)
    assert host.dtype == expected.dtype == dtype
    if backend.exact:
        assert np.array_equal(host, expected)
    else:
        assert error(host, expected) <= {"float32": 1e-5, "float64": 1e-13}[dtype]


@every_case
@pytest.mark.parametrize("dtype", DTYPES)
def test_rules_keep_shape_and_dtype(row: Case, dtype: str) -> None:
    """What a rule returns, before the walker sums it back: right dtype, broadcastable shape."""
    value = row.call(*as_tensors(row, values(row, dtype)))
    assert value.dtype == dtype
    for argument, vjp in value.edges:
        part = vjp(cotangent_of(value.value))
        assert part.dtype == dtype
        assert undo_broadcast(part, argument.shape).shape == argument.shape


@every_case
def test_float32_agrees_with_float64(row: Case) -> None:
    single = values(row, "float32")
    double = [a.astype("float64") if is_float(a) else a for a in single]
    cotangent = cotangent_of(row.call(*single))
    assert error(row.call(*single), row.call(*double)) <= 1e-6
    ours = gradients(row, single, cotangent)
    assert worst(ours, gradients(row, double, cotangent.astype("float64"))) <= 3e-6


# --- broadcasting, drawn ---------------------------------------------------------------------


@needs_torch
@pytest.mark.parametrize("row", BROADCASTING, ids=lambda row: row.operation)
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_broadcasting(row: Case, data: st.DataObject) -> None:
    n = len(row.arguments)
    drawn = data.draw(
        hnp.mutually_broadcastable_shapes(num_shapes=n, min_side=0, max_side=3, max_dims=4)
    )
    source = np.random.default_rng(data.draw(st.integers(0, 99)))
    args = [
        np.asarray((source.permutation(math.prod(s)).reshape(s) + 0.3 * i + 0.5) / 8)
        for i, s in enumerate(drawn.input_shapes)
    ]  # positive, no ties
    if row.operation == "where":
        args[0] = np.asarray(args[0] > 1)
    drawn_row = Case(row.operation, row.reference, row.torch, tuple(args))
    value = row.call(*args)
    assert np.shape(value) == drawn.result_shape
    assert error(value, row.reference(*args)) <= 1e-14
    cotangent = cotangent_of(np.asarray(value))
    _, theirs = torch_gradients(drawn_row, args, cotangent)
    assert worst(gradients(drawn_row, args, cotangent), theirs) <= 1e-12


# --- odd shapes ------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (1,), (0,), (2, 0, 3), (1, 1)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("row", [*ELEMENTWISE, *SCALAR_SETTINGS, *BROADCASTING], ids=str)
def test_elementwise_at_odd_shapes(row: Case, dtype: str, shape: Any, backend: Backend) -> None:
    host = [np.full(shape, a.ravel()[0], a.dtype) if isinstance(a, np.ndarray) else a
            for a in values(row, dtype)]  # fmt: skip
    args = [backend.asarray(a) if isinstance(a, np.ndarray) else a for a in host]
    value = row.call(*as_tensors(row, args)).value
    assert tuple(value.shape) == shape
    assert error(backend.to_host(value), row.reference(*host)) <= 1e-6
    for g in gradients(row, args, backend.asarray(np.ones(shape, dtype))):
        assert tuple(g.shape) == shape
        assert g.dtype == value.dtype


@pytest.mark.parametrize(
    ("call", "shapes", "expected"),
    [
        (ops.sum, [(0, 3)], np.zeros(())),
        (lambda x: ops.sum(x, axis=0), [(0, 3)], np.zeros(3)),
        (lambda x: ops.mean(x, axis=0), [(2, 0)], np.zeros(0)),
        (lambda x: ops.max(x, axis=-1), [(0, 3)], np.zeros(0)),
        (lambda x: ops.logsumexp(x, axis=1, keepdims=True), [(0, 3)], np.zeros((0, 1))),
        (lambda x: ops.softmax(x), [(0, 3)], np.zeros((0, 3))),
        (lambda x: ops.log_softmax(x, axis=0), [(2, 0)], np.zeros((2, 0))),
        (ops.matmul, [(2, 0), (0, 3)], np.zeros((2, 3))),
        (ops.matmul, [(0, 4), (4, 3)], np.zeros((0, 3))),
        (ops.linear, [(0, 4), (3, 4), (3,)], np.zeros((0, 3))),
        (ops.linear, [(0, 2, 4), (3, 4), (3,)], np.zeros((0, 2, 3))),
        (ops.concat, [(0, 3), (0, 3)], np.zeros((0, 3))),
        (lambda x: ops.pad(x, widths=((1, 1),)), [(0,)], np.zeros(2)),
        (lambda x: ops.pad(x, widths=()), [()], np.zeros(())),
        (lambda x: ops.getitem(x, index=slice(3, 3)), [(4, 2)], np.zeros((0, 2))),
        (lambda x: ops.transpose(x), [()], np.zeros(())),
        (ops.sum, [()], np.zeros(())),
        (lambda x: ops.max(x, keepdims=True), [()], np.zeros(())),
        (ops.logsumexp, [()], np.zeros(())),
        (ops.squared_error, [(), ()], np.zeros(())),
        (lambda x: ops.hinge(x + 1.0, np.ones(())), [()], np.zeros(())),
    ],
)
def test_empty_and_scalar_arrays(call: Any, shapes: list[Any], expected: Any) -> None:
    tensors = [Tensor(np.zeros(shape)) for shape in shapes]
    y = call(*tensors)
    assert np.array_equal(y.value, expected)
    found = backward(y, np.ones(y.shape))
    assert [found[id(t)].shape for t in tensors] == shapes


# --- kinks and ties, as the docstrings say ---------------------------------------------------


def slope(function: Callable[..., Any], *args: Any) -> list[Any]:
    """The derivative of the sum of `function` by each argument, as lists."""
    tensors = [Tensor(np.asarray(a, dtype=float)) for a in args]
    y = function(*tensors)
    found = backward(y, np.ones(y.shape))
    return [found[id(t)].tolist() for t in tensors]


KINKS = {
    "relu has slope 0 at 0": (ops.relu, ([-1, 0, 1],), [[0, 0, 1]]),
    "leaky_relu has slope a at 0": (lambda x: ops.leaky_relu(x, a=0.25), ([-1, 0, 1],),
                                    [[0.25, 0.25, 1]]),
    "absolute has slope 0 at 0": (ops.absolute, ([-2, 0, 3],), [[-1, 0, 1]]),
    "maximum shares a tie": (ops.maximum, ([1, 2, 3], [2, 2, 2]), [[0, 0.5, 1], [1, 0.5, 0]]),
    "minimum shares a tie": (ops.minimum, ([1, 2, 3], [2, 2, 2]), [[1, 0.5, 0], [0, 0.5, 1]]),
    "max shares a tie": (lambda x: ops.max(x, axis=1), ([[1, 3, 3], [2, 2, 2], [5, 4, 4]],),
                         [[[0, 0.5, 0.5], [1 / 3] * 3, [1, 0, 0]]]),
    "max over all shares a tie": (ops.max, ([[7, 1], [7, 7]],), [[[1 / 3, 0], [1 / 3, 1 / 3]]]),
    "clip has slope 1 on its limits": (lambda x: ops.clip(x, low=-1, high=1),
                                       ([-2, -1, 0, 1, 2],), [[0, 1, 1, 1, 0]]),
    "hinge has slope 0 at its kink": (lambda s: 4 * ops.hinge(s, np.array([1.0, 1, -1, -1])),
                                      ([1, 0.5, -1, 0],), [[0, -1, 0, 1]]),
    "power 0 has slope 0, also at 0": (lambda x: ops.power(x, 0), ([0, 2],), [[0, 0]]),
    "power by an array of 0 too": (lambda x: ops.power(x, np.zeros(2)), ([0, 2],), [[0, 0]]),
    "power 1 at 0": (lambda x: ops.power(x, 1), ([0, 2],), [[1, 1]]),
    "power 2 of negative values": (lambda x: ops.power(x, 2.0), ([-3, 0],), [[-6, 0]]),
    "exponent at base 0": (lambda p: ops.power(np.array([0.0, 1.0]), p), ([2, 2],), [[0, 0]]),
}  # fmt: skip


@pytest.mark.parametrize("name", KINKS)
def test_kinks_and_ties(name: str) -> None:
    function, args, expected = KINKS[name]
    assert slope(function, *args) == expected


def test_singular_points() -> None:
    with arrays.quiet():
        assert slope(ops.sqrt, [0.0]) == [[math.inf]]
        assert slope(ops.log, [0.0]) == [[math.inf]]
        assert np.isnan(slope(lambda p: ops.power(np.array([-2.0]), p), [2.0])).all()
        assert ops.divide(np.array([1.0, -1.0]), np.zeros(2)).tolist() == [math.inf, -math.inf]
        assert np.isnan(ops.divide(np.zeros(1), np.zeros(1))).all()


def test_max_and_hinge_at_infinity() -> None:
    assert slope(ops.max, [-math.inf, -math.inf]) == [[0.5, 0.5]]
    scores = np.array([math.inf, 0.0])
    assert ops.hinge(scores, np.ones(2)) == 0.5
    assert slope(lambda s: ops.hinge(s, np.ones(2)), scores) == [[0, -0.5]]


# --- large magnitudes ------------------------------------------------------------------------


def precisely(function: Callable[..., Any], x: np.ndarray) -> np.ndarray:
    """`function` of each row of x in 60 digits, rounded to float64 at the end."""
    with mpmath.workdps(60):
        return np.array([[float(v) for v in function([mpmath.mpf(float(e)) for e in row])]
                         for row in x])  # fmt: skip


def precise_log_softmax(row: list[Any]) -> list[Any]:
    total = mpmath.log(mpmath.fsum(map(mpmath.exp, row)))
    return [x - total for x in row]


def precise_softmax(row: list[Any]) -> list[Any]:
    total = mpmath.fsum(map(mpmath.exp, row))
    return [mpmath.exp(x) / total for x in row]


def precise_sigmoid(row: list[Any]) -> list[Any]:
    return [1 / (1 + mpmath.exp(-x)) for x in row]


def precise_softplus(row: list[Any]) -> list[Any]:
    return [mpmath.log(1 + mpmath.exp(x)) for x in row]


LARGE = np.array([[1, -1, 0.5], [-1, -1, -1], [1, 1, 0.25], [0, 0, -1]])
TINY = {"float32": 2e-7, "float64": 4e-16}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1.0, 30.0, 1e4, 1e30])
def test_large_magnitudes(dtype: str, scale: float, backend: Backend) -> None:
    """No overflow, no warning, and every element to a few units in the last place."""
    host = (scale * LARGE).astype(dtype)
    x = backend.asarray(host)
    for function, precise, absolute in (
        (ops.softmax, precise_softmax, 0.0),
        (ops.log_softmax, precise_log_softmax, TINY[dtype]),
        (ops.sigmoid, precise_sigmoid, 0.0),
        (ops.softplus, precise_softplus, 0.0),
    ):
        expected = precisely(precise, host)
        np.testing.assert_allclose(
            backend.to_host(function(x)), expected, rtol=8 * TINY[dtype], atol=absolute
        )
        tensor = Tensor(x)
        g = backward(function(tensor), backend.asarray(np.ones_like(host)))[id(tensor)]
        assert np.isfinite(backend.to_host(g)).all()
        if function is ops.softplus:
            slopes = precisely(precise_sigmoid, host)
            np.testing.assert_allclose(backend.to_host(g), slopes, rtol=8 * TINY[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e4, 1e30])
def test_logsumexp_and_cross_entropy_at_large_magnitudes(dtype: str, scale: float) -> None:
    x = (scale * LARGE).astype(dtype)
    expected = precisely(precise_log_softmax, x)
    np.testing.assert_allclose(ops.logsumexp(x, axis=1), (x - expected)[:, 0], rtol=TINY[dtype])
    for label in range(3):
        labels = np.full(len(x), label)
        loss = ops.softmax_cross_entropy(x, labels)
        np.testing.assert_allclose(loss, -expected[:, label].mean(), rtol=4 * TINY[dtype])
        g = slope(lambda z, y=labels: ops.softmax_cross_entropy(z, y), x)[0]
        q = np.eye(3)[labels]
        np.testing.assert_allclose(g, (precisely(precise_softmax, x) - q) / 4, atol=TINY[dtype])


def test_equal_large_logits_lose_nothing() -> None:
    """log C, whatever the size of the logits."""
    for dtype in DTYPES:
        z = np.full((2, 8), 1e30, dtype)
        assert ops.log_softmax(z) == pytest.approx(-math.log(8), rel=1e-7)
        assert ops.softmax_cross_entropy(z, np.zeros(2, int)) == pytest.approx(math.log(8))


def test_infinite_entries() -> None:
    inf = math.inf
    masked = np.array([[0.0, -inf, 0.0], [-inf, 2.0, -inf]])
    assert np.array_equal(ops.softmax(masked), [[0.5, 0, 0.5], [0, 1, 0]])
    assert np.array_equal(ops.logsumexp(masked, axis=1), [math.log(2), 2.0])
    assert np.array_equal(ops.log_softmax(masked)[1], [-inf, 0, -inf])
    assert ops.softmax_cross_entropy(masked, np.array([2, 1])) == math.log(2) / 2
    assert slope(lambda z: ops.logsumexp(z, axis=1), masked) == [[[0.5, 0, 0.5], [0, 1, 0]]]
    assert ops.sigmoid(np.array([-inf, inf])).tolist() == [0, 1]
    assert ops.softplus(np.array([-inf, inf])).tolist() == [0, inf]
    with arrays.quiet():
        assert ops.logsumexp(np.full((2, 3), -inf), axis=1).tolist() == [-inf, -inf]
        assert ops.logsumexp(np.array([inf, 0.0])) == inf


@pytest.mark.parametrize("dtype", DTYPES)
def test_gelu_and_erf_at_large_magnitudes(dtype: str) -> None:
    x = np.array([-1e15, -1e4, -50.0, 50.0, 1e4, 1e15], dtype)
    assert np.array_equal(ops.gelu(x), np.maximum(x, 0))
    assert np.array_equal(ops.erf(x), np.sign(x))
    assert slope(ops.gelu, x) == [[0, 0, 0, 1, 1, 1]]
    assert slope(ops.erf, x) == [[0] * 6]


# --- erf -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "bound"), [("float64", 3e-16), ("float32", 2.5e-7)])
def test_erf_against_mpmath(dtype: str, bound: float, backend: Backend) -> None:
    """The bounds of the docstring, sampled most densely where the error is largest."""
    joint, far = np.linspace(0.468, 0.6, 2000), np.linspace(5.99, 6.01, 100)
    x = np.concatenate([np.linspace(-7, 7, 4001), joint, -joint, far, -far]).astype(dtype)
    exact = np.array([float(mpmath.erf(float(v))) for v in x])
    ours = backend.to_host(ops.erf(backend.asarray(x)))
    assert np.max(np.abs(ours - exact)) <= bound
    assert np.array_equal(ours, -backend.to_host(ops.erf(backend.asarray(-x))))


# --- gather ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("n", "size", "used"), [(1, 1, 1), (4000, 12, 3), (257, 300, 300), (64, 5, 1)]
)
def test_scatter_add(dtype: str, n: int, size: int, used: int, backend: Backend) -> None:
    """The sums of np.add.at: exact for integers, the same bits on every library for floats."""
    source = np.random.default_rng(n)
    indices = source.integers(0, used, n)
    whole = source.integers(-1000, 1000, (n, 3)).astype(dtype)
    expected = np.zeros((size, 3))
    np.add.at(expected, indices, whole)
    found = scatter_add(backend.asarray(whole), backend.asarray(indices), size)
    assert np.array_equal(backend.to_host(found), expected)

    rows = source.standard_normal((n, 3)).astype(dtype)
    expected = np.zeros((size, 3))
    np.add.at(expected, indices, rows.astype("float64"))
    found = backend.to_host(scatter_add(backend.asarray(rows), backend.asarray(indices), size))
    assert found.dtype == dtype
    assert error(found, expected) <= {"float32": 1e-6, "float64": 1e-14}[dtype]
    assert np.array_equal(found, scatter_add(rows, indices, size))


def test_scatter_add_order_is_the_documented_one() -> None:
    """By doubling: ((x0 + x1) + (x2 + x3)) seen from the last element of the run."""
    x = np.array([1e16, 1.0, -1e16, 1.0, 3.0])[:, None]
    total = scatter_add(x, np.zeros(5, dtype=int), 1)[0, 0]
    assert total == ((3.0 + 1.0) + (-1e16 + 1.0)) + 1e16


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", "int32", "int64", "uint16"])
def test_gather_takes_any_integer_dtype(dtype: str, backend: Backend) -> None:
    table = Tensor(backend.asarray(normal(300, 2)))
    indices = np.array([0, 5, 100, 5], dtype)
    y = ops.gather(table, backend.asarray(indices))
    found = backward(y, backend.asarray(np.ones((4, 2))))[id(table)]
    expected = np.zeros((300, 2))
    np.add.at(expected, indices, 1.0)
    assert np.array_equal(backend.to_host(found), expected)


def test_a_cotangent_that_is_not_finite_stays_in_its_row(backend: Backend) -> None:
    rows = backend.asarray(np.array([[1.0], [math.inf], [2.0], [math.nan]]))
    found = backend.to_host(scatter_add(rows, backend.asarray(np.array([0, 1, 0, 3])), 5))
    assert np.array_equal(found[:, 0], [3.0, math.inf, 0.0, math.nan, 0.0], equal_nan=True)


# --- autograd, a second opinion on whole expressions -----------------------------------------


def test_expressions_against_autograd() -> None:
    x, w, b = normal(6, 4), normal(3, 4), normal(3)
    labels = np.array([0, 1, 2, 2, 1, 0])

    def ours(w: Any, b: Any) -> Any:
        y = ops.tanh(ops.linear(x, w, b))
        return ops.sum(ops.exp(y * 0.5) / (1.0 + y**2)) + ops.softmax_cross_entropy(y, labels)

    def theirs(w: Any, b: Any) -> Any:
        y = anp.tanh(anp.dot(x, w.T) + b)
        total = anp.log(anp.sum(anp.exp(y), axis=1))
        loss = anp.mean(total - y[anp.arange(6), labels])
        return anp.sum(anp.exp(y * 0.5) / (1.0 + y**2)) + loss

    tensors = Tensor(w), Tensor(b)
    found = backward(ours(*tensors), np.ones(()))
    expected = autograd.grad(theirs, (0, 1))(w, b)
    assert worst([found[id(t)] for t in tensors], list(expected)) <= 1e-13


# --- errors ----------------------------------------------------------------------------------

X = np.ones((2, 3))
ERRORS: dict[str, Callable[[], Any]] = {
    r"add: operands could not be broadcast.*\(2, 3\), \(2,\)": lambda: ops.add(X, np.ones(2)),
    r"matmul: expected at least 2 dimensions; got shapes \(3,\)": lambda: ops.matmul(X[0], X[0]),
    r"matmul: .*arguments: \(2, 3\), \(2, 3\)": lambda: ops.matmul(X, X),
    r"linear: expected x \(\.\.\., in\) and weight \(out, in\); got \(2, 3\) and \(3, 2\)":
        lambda: ops.linear(X, X.T),
    r"axis 2 is out of range for 2 dimension": lambda: ops.sum(X, axis=2),
    r"axis \(0, -3\) is out of range": lambda: ops.logsumexp(X, axis=(0, -3)),
    r"axis 3 is out of range for 2 dim": lambda: ops.softmax(X, axis=3),
    r"axis -3 is out of range for 2 dim": lambda: ops.log_softmax(X, axis=-3),
    r"axis -1 is out of range for 0 dim": lambda: ops.softmax(np.ones(())),
    r"axis 5 is out of range for 2 dim": lambda: ops.gather(X, np.array([0]), axis=5),
    r"axis 4 is out of range for 2 dim": lambda: ops.split(X, sizes=(1, 1), axis=4),
    r"axis \(2, 1\) is out of range for 2 dim": lambda: ops.transpose(X, axes=(2, 1)),
    r"transpose: axes": lambda: ops.transpose(X, axes=(0,)),
    r"mean of no elements is not defined": lambda: ops.mean(np.ones((0, 3)), axis=0),
    r"max: zero-size array": lambda: ops.max(np.ones(0)),
    r"variance of 1 element\(s\) with correction 1 is not":
        lambda: ops.var(np.ones(1), correction=1),
    r"expected labels of shape \(2,\) for logits \(2, 3\); got \(3,\)":
        lambda: ops.softmax_cross_entropy(X, np.zeros(3, int)),
    r"label_smoothing must lie in \[0, 1\); got 1.0":
        lambda: ops.softmax_cross_entropy(X, np.zeros(2, int), label_smoothing=1.0),
    r"softmax_cross_entropy: expected integer labels; got float64":
        lambda: ops.softmax_cross_entropy(X, np.zeros(2)),
    r"softmax_cross_entropy: the batch is empty":
        lambda: ops.softmax_cross_entropy(np.ones((0, 3)), np.zeros(0, int)),
    r"squared_error: expected equal shapes; got \(2, 3\) and \(3,\)":
        lambda: ops.squared_error(X, X[0]),
    r"squared_error of no elements": lambda: ops.squared_error(np.ones(0), np.ones(0)),
    r"hinge: expected equal shapes; got \(2, 3\) and \(2, 1\)": lambda: ops.hinge(X, X[:, :1]),
    r"hinge of no elements": lambda: ops.hinge(np.ones(0), np.ones(0)),
    r"split: sizes \(1, 3\) do not add up to length 3 of axis 1":
        lambda: ops.split(X, sizes=(1, 3), axis=1),
    r"split: sizes \(4, -1\) do not add up": lambda: ops.split(X, sizes=(4, -1), axis=1),
    r"pad: expected 2 pairs of widths; got 1": lambda: ops.pad(X, widths=((1, 1),)),
    r"pad: widths must not be negative": lambda: ops.pad(X[:1, :1], widths=((0, 0), (-1, 1))),
    r"getitem: basic indices only, got \[0, 1\]": lambda: ops.getitem(X, index=[0, 1]),
    r"getitem: basic indices only": lambda: ops.getitem(X, index=(slice(None), np.array([0]))),
    r"getitem: basic indices only, got True": lambda: ops.getitem(X, index=True),
    r"getitem: index 7 is out of bounds": lambda: ops.getitem(X, index=7),
    r"gather: index 9 is out of bounds": lambda: ops.gather(X, np.array([9])),
    r"reshape: cannot reshape": lambda: ops.reshape(X, shape=(4, 2)),
    r"broadcast_to: .*arguments: \(2, 3\)": lambda: ops.broadcast_to(X, shape=(2, 4)),
    r"concat: ": lambda: ops.concat(X, np.ones((2, 2))),
    r"clip: give low, high or both": lambda: ops.clip(X),
    r"Tensors are compared by value": lambda: Tensor(X) < 1.0,
    r"Tensors are compared by value: write": lambda: Tensor(X) == 1.0,
}  # fmt: skip


@pytest.mark.parametrize("message", ERRORS)
def test_errors(message: str) -> None:
    with pytest.raises(Error, match=message):
        ERRORS[message]()
