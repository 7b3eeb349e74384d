"""The networks of the training steps, as functions of object arrays of Duals: their logits.

Each takes (params, buffers, x) and the settings of its model, and puts the buffers after the step
in the place of those before it.
"""

from __future__ import annotations

from typing import Any

import mpmath
import numpy as np

from .dual import Dual, constants, fill
from .primitives import REFERENCES
from .primitives_arrays import linear
from .primitives_layers import attention, batch_norm, conv2d, entry_norm, layer_norm, weight_norm

VALUES = {name: reference.value for name, reference in REFERENCES.items()}


def mlp(params: dict[str, Any], buffers: dict[str, Any], x: Any, *, depth: int, nonlinearity: str,
        output_nonlinearity: bool, residual: bool, **sizes: Any) -> Any:  # fmt: skip
    """h <- phi(W h + b); layers of equal sizes, but for the last, add h if they are residual."""
    settings = {"a": 0.01} if nonlinearity == "leaky_relu" else {}
    for layer in range(depth):
        name, last = f"layers/{layer:02d}", layer == depth - 1
        out = linear(x, params[f"{name}/weight"], params.get(f"{name}/bias"))
        if output_nonlinearity or not last:
            out = VALUES[nonlinearity](out, **settings)
        x = x + out if residual and not last and x.shape == out.shape else out
    return x


def _affine(params: dict[str, Any], name: str, x: Any) -> Any:
    return linear(x, params[f"{name}/weight"], params[f"{name}/bias"])


def _layer_norm(params: dict[str, Any], name: str, x: Any) -> Any:
    return layer_norm(x, params[f"{name}/weight"], params[f"{name}/bias"])


def _heads(parts: list[Any], heads: int) -> Any:
    """Causal attention of queries, keys and values (N, L, E); a head has a part of the features."""
    n, length, width = parts[0].shape
    cut = (n, length, heads, width // heads)
    q, k, v = (part.reshape(cut).transpose(0, 2, 1, 3) for part in parts)
    y = attention(q, k, v, causal=True)
    return y.transpose(0, 2, 1, 3).reshape(n, length, width)


def _sinusoids(length: int, width: int) -> Any:
    """sin and cos of t 10000^(-2i / width), next to each other."""
    rates = [mpmath.mpf(10000) ** (mpmath.mpf(-i) / width) for i in range(0, width, 2)]
    waves = [f(t * r) for t in range(length) for r in rates for f in (mpmath.sin, mpmath.cos)]
    return fill((length, width), [Dual(wave) for wave in waves])


def transformer(params: dict[str, Any], buffers: dict[str, Any], x: Any, *, width: int,
                layers: int, heads: int, pre_norm: bool, nonlinearity: str, tied: bool,
                **sizes: Any) -> Any:  # fmt: skip
    """Attention and two linear layers, each added; a norm after the sum, or before the branch."""

    def attend(name: str, h: Any) -> Any:
        parts = np.split(_affine(params, f"{name}/attention/in", h), 3, axis=-1)
        return _affine(params, f"{name}/attention/out", _heads(parts, heads))

    def feed_forward(name: str, h: Any) -> Any:
        z = VALUES[nonlinearity](_affine(params, f"{name}/linear1", h))
        return _affine(params, f"{name}/linear2", z)

    h = params["embedding/weight"][x.T] * Dual(mpmath.sqrt(width))  # (batch, length, width)
    h = h + _sinusoids(len(x), width)
    for layer in range(layers):
        name = f"layers/{layer:02d}"
        for norm, branch in ((f"{name}/norm1", attend), (f"{name}/norm2", feed_forward)):
            if pre_norm:
                h = h + branch(name, _layer_norm(params, norm, h))
            else:
                h = _layer_norm(params, norm, h + branch(name, h))
    h = _layer_norm(params, "norm", h) if pre_norm else h
    weight = params["embedding/weight" if tied else "decoder/weight"]
    return linear(h.transpose(1, 0, 2), weight, params["decoder/bias"])  # (length, batch, words)


def resnet(params: dict[str, Any], buffers: dict[str, Any], x: Any, *, stages: Any,
           pre_activation: bool, shortcut: str, **sizes: Any) -> Any:  # fmt: skip
    """A 3x3 convolution, blocks of two of them with a skip connection, means, linear."""
    relu = VALUES["relu"]

    def conv(name: str, h: Any, stride: int = 1) -> Any:
        weight = params[f"{name}/weight"]
        return conv2d(h, weight, stride=stride, padding=weight.shape[-1] // 2)

    def norm(name: str, h: Any) -> Any:
        _move(buffers, name, h)
        return batch_norm(h, params[f"{name}/weight"], params[f"{name}/bias"], channel_axis=0)

    def skip(name: str, h: Any, channels: int, stride: int) -> Any:
        if stride == 1 and len(h) == channels:
            return h
        y = conv(f"{name}/shortcut", h, stride)
        y = y if pre_activation else norm(f"{name}/shortcut/norm", y)
        return y + _unit_map(h, channels, stride) if shortcut == "modified" else y

    def block(name: str, h: Any, channels: int, stride: int) -> Any:
        if pre_activation:
            a = relu(norm(f"{name}/norm1", h))
            skipped = h if stride == 1 and len(h) == channels else skip(name, a, channels, stride)
            a = relu(norm(f"{name}/norm2", conv(f"{name}/conv1", a, stride)))
            return conv(f"{name}/conv2", a) + skipped
        skipped = skip(name, h, channels, stride)
        h = relu(norm(f"{name}/norm1", conv(f"{name}/conv1", h, stride)))
        return relu(norm(f"{name}/norm2", conv(f"{name}/conv2", h)) + skipped)

    h = conv("stem", x.transpose(1, 0, 2, 3))  # (C, N, H, W), as in the references
    h = h if pre_activation else relu(norm("norm", h))
    for stage, (channels, stride) in enumerate(stages):
        h = block(f"stages/{stage:02d}/blocks/00", h, channels, stride)
    return _affine(params, "linear", VALUES["global_average_pool"](h).T)  # (N, outputs)


def _move(buffers: dict[str, Any], name: str, h: Any) -> None:
    """The running mean and unbiased variance, a tenth of the way to those of the batch."""
    h, tenth = constants([[v.value for v in row.flat] for row in h]), Dual(0.1)
    over: dict[str, Any] = {"axis": 1, "keepdims": False}
    batch = {
        "running_mean": VALUES["mean"](h, **over),
        "running_var": VALUES["var"](h, **over, correction=1.0),
    }
    for buffer, found in batch.items():
        buffers[f"{name}/{buffer}"] = buffers[f"{name}/{buffer}"] * (1 - tenth) + found * tenth


def _unit_map(x: Any, channels: int, stride: int) -> Any:
    """`stride` times the means of squares of pixels, between channels of zeros."""
    pool, added = VALUES["average_pool"], channels - len(x)
    y = pool(x, size=stride, stride=None, padding=0) * Dual(stride)
    before = (added + 1) // 2
    widths = ((before, added - before), (0, 0), (0, 0), (0, 0))
    return VALUES["pad"](y, widths=widths, value=0.0)


def skipnet(params: dict[str, Any], buffers: dict[str, Any], x: Any, *, depth: int, hidden: int,
            eps: float, delta: float, **sizes: Any) -> Any:  # fmt: skip
    """en(W) x, then I z + kappa wn(U) tanh(wn(V) z + c), kappa = (1 - delta) / sqrt(rows of U h)"""
    z = linear(x, entry_norm(params["layers/00/weight"], eps=eps))
    for layer in range(1, depth):
        name = f"layers/{layer:02d}"
        outer, inner = (weight_norm(params[f"{name}/{n}"], eps=eps) for n in ("outer", "inner"))
        kappa = Dual((1 - mpmath.mpf(delta)) / mpmath.sqrt(len(outer) * hidden))
        y = VALUES["tanh"](linear(z, inner, params[f"{name}/bias"][:, 0]))
        z = z[:, : len(outer)] + linear(y, outer) * kappa
    return z
