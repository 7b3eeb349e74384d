"""Transformer language models: that of the Fromage experiments on WikiText-2, and pre-norm ones.

Tokens are (length, batch), as the text lies in its streams; inside, activations are
(batch, length, width) and every product but attention's own runs over all batch * length rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from npdrt import compute, ops
from npdrt.arrays import Array, Device, Params, label, namespace
from npdrt.errors import Error
from npdrt.models import initialisation
from npdrt.models.initialisation import Floats, draw
from npdrt.models.mlp import NONLINEARITIES
from npdrt.ops.dropout import check_rate, keep_mask
from npdrt.random import Random

Shapes = dict[str, tuple[int, ...]]
LOG_10000 = 9.210340371976184
EMBEDDING_LIMIT = 0.1  # of the uniform draws of embedding and decoder


@dataclass(frozen=True)
class Transformer:
    """Next-word logits: embedding, sinusoidal positions, `layers` causal layers, decoder.

    The input x is (length, batch); inside, tokens are (batch, length) and h is
    (batch, length, width).
        h = dropout(sqrt(width) embedding[x] + positions)
        post-norm layer:  h = norm1(h + dropout(attention(h)));  h = norm2(h + dropout(mlp(h)))
        pre-norm layer:   h = h + dropout(attention(norm1(h)));  h = h + dropout(mlp(norm2(h)))
        mlp(h) = W2 dropout(phi(W1 h + b1)) + b2,    logits = W h + b

    The defaults are the network of Bernstein et al. 2020, Table 1: that of PyTorch's example
    word_language_model with 2 heads and layers of nn.TransformerEncoderLayer, post-norm, ReLU,
    13,828,478 parameters at 33,278 words. vocabulary: words; from the data. width: features of a
    word; even, and a multiple of heads. hidden: of the mlp. dropout: rate in training mode, of
    embeddings, attention, mlp and both branches. pre_norm: layers as in GPT-2, and a last norm
    before the decoder. nonlinearity: phi; GPT-2 has gelu. tied: the decoder's weight is the
    embedding's. positions: the longest sequence. identical_layers: all layers begin as copies of
    one, as nn.TransformerEncoder makes them.

    Initialisation, PyTorch's: embedding and decoder weight uniform within 0.1; attention's input
    projection within sqrt(6 / (4 width)), its output projection, W1, b1, W2 and b2 within
    1/sqrt(in); gains 1; all other biases 0. Under Fromage with a norm bound those biases stay 0
    for ever: their largest norm is norm_bound * 0. (The same happened in the paper's runs.)

    Source: Vaswani et al. 2017, section 3; Radford et al. 2019, section 2.3, for pre-norm.

    >>> model = Transformer(vocabulary=50, width=8, heads=2, layers=1, hidden=8)
    >>> model(model.init(seed=0), np.zeros((5, 3), np.int64)).shape
    (5, 3, 50)
    """

    vocabulary: int
    width: int = 200
    layers: int = 2
    heads: int = 2
    hidden: int = 200
    dropout: float = 0.2
    pre_norm: bool = False
    nonlinearity: str = "relu"
    tied: bool = False
    positions: int = 5000
    identical_layers: bool = True

    def __post_init__(self) -> None:
        for name in ("vocabulary", "width", "layers", "heads", "hidden", "positions"):
            if getattr(self, name) < 1:
                raise Error(f"Transformer: {name} must be at least 1; got {getattr(self, name)}")
        check_heads("Transformer", self.width, self.heads)
        if self.width % 2:
            raise Error(f"Transformer: width must be even, for sines and cosines; got {self.width}")
        if self.nonlinearity not in NONLINEARITIES:
            known = ", ".join(NONLINEARITIES)
            raise Error(f"unknown nonlinearity {self.nonlinearity!r}; use one of {known}")
        check_rate("Transformer", self.dropout)

    # --- parameters ----------------------------------------------------------------------

    def shapes(self) -> Shapes:
        """The name and shape of every parameter, in definition order."""
        shapes: Shapes = {"embedding/weight": (self.vocabulary, self.width)}
        for layer in range(self.layers):
            shapes |= {f"{self.layer_name(layer)}/{n}": s for n, s in self._layer_shapes().items()}
        if self.pre_norm:
            shapes |= {"norm/weight": (self.width,), "norm/bias": (self.width,)}
        if not self.tied:
            shapes["decoder/weight"] = (self.vocabulary, self.width)
        return {**shapes, "decoder/bias": (self.vocabulary,)}

    def _layer_shapes(self) -> Shapes:
        width, hidden = self.width, self.hidden
        matrices = {
            "attention/in": (3 * width, width),
            "attention/out": (width, width),
            "linear1": (hidden, width),
            "linear2": (width, hidden),
        }
        shapes: Shapes = {}
        for name, shape in matrices.items():
            shapes |= {f"{name}/weight": shape, f"{name}/bias": shape[:1]}
        norms = ("norm1/weight", "norm1/bias", "norm2/weight", "norm2/bias")
        return shapes | dict.fromkeys(norms, (width,))

    def layer_name(self, number: int) -> str:
        """The name of a layer: "layers/00", ..."""
        return f"layers/{number:0{max(2, len(str(self.layers - 1)))}d}"

    def init(self, seed: int = 0, device: str | Device = "cpu", dtype: str = "float32") -> Params:
        """The initial parameters: each drawn in float64 from (seed, name), rounded once."""
        return draw(self._draw, seed, device, dtype)

    def _draw(self, stream: Random) -> Iterator[tuple[str, Floats]]:
        shapes = self.shapes()
        for name, shape in shapes.items():
            stream_name = name
            if self.identical_layers and name.startswith("layers/"):
                first = self.layer_name(0)
                stream_name = first + name[len(first) :]
            yield name, self._initial_value(stream.of(stream_name), name, shape, shapes)

    def _initial_value(
        self, stream: Random, name: str, shape: tuple[int, ...], shapes: Shapes
    ) -> Floats:
        """The initial value of one parameter."""
        if name in ("embedding/weight", "decoder/weight"):
            return stream.uniform(shape, -EMBEDDING_LIMIT, EMBEDDING_LIMIT)
        if "norm" in name:
            return np.full(shape, 1.0 if name.endswith("weight") else 0.0)
        if name.endswith("attention/in/weight"):
            limit = math.sqrt(6.0 / sum(shape))
            return stream.uniform(shape, -limit, limit)
        if "linear" in name or name.endswith("attention/out/weight"):
            rule = initialisation.weight if len(shape) == 2 else initialisation.bias
            rows, columns = shapes[name.replace("bias", "weight")]
            return rule("authors", stream, (rows, columns))
        return np.zeros(shape)

    # --- the network ---------------------------------------------------------------------

    def __call__(self, params: Params, x: Array) -> Array:
        """Logits (length, batch, vocabulary) of the word after each of x (length, batch), in
        evaluation mode."""
        return self._forward(params, x, None)

    def apply(
        self,
        params: Params,
        buffers: Params,
        x: Array,
        *,
        train: bool = False,
        random: Random | None = None,
    ) -> tuple[Array, Params]:
        """`(logits, buffers)`: training mode draws the masks of dropout from `random`."""
        return self._forward(params, x, random if train else None), buffers

    def _forward(self, params: Params, x: Array, random: Random | None) -> Array:
        self._check_length(x)
        tokens = namespace(x).permute_dims(x, (1, 0))  # (batch, length)
        h = ops.embedding(params["embedding/weight"], tokens)  # (batch, length, width)
        h = h * math.sqrt(self.width) + constant(sinusoids(x.shape[0], self.width), h)
        h = label(with_dropout(self.dropout, h, random, "embedding"), "embedding/output")
        for number in range(self.layers):
            name = self.layer_name(number)
            h = label(self._layer(params, h, random, name), name)
        h = normalised(params, "norm", h) if self.pre_norm else h
        h = ops.transpose(h, axes=(1, 0, 2))  # (length, batch, width)
        weight = params["embedding/weight" if self.tied else "decoder/weight"]
        return ops.linear(h, weight, params["decoder/bias"])  # (length, batch, vocabulary)

    def _layer(self, params: Params, h: Any, random: Random | None, name: str) -> Any:
        """One layer: attention and mlp, each with a skip connection; (batch, length, width)."""

        def branch(h: Any, function: Any, norm: str) -> Any:
            normed = normalised(params, f"{name}/{norm}", h) if self.pre_norm else h
            out = with_dropout(
                self.dropout, function(params, normed, random, name), random, f"{name}/{norm}"
            )
            return h + out if self.pre_norm else normalised(params, f"{name}/{norm}", h + out)

        return branch(branch(h, self._attention, "norm1"), self._mlp, "norm2")

    def _attention(self, params: Params, h: Any, random: Random | None, name: str) -> Any:
        batch, length, _ = h.shape
        names = ("in/weight", "in/bias", "out/weight", "out/bias")
        wi, bi, wo, bo = (params[f"{name}/attention/{part}"] for part in names)
        scores = (batch, self.heads, length, length)  # of queries and keys
        keep = dropout_mask(self.dropout, h, random, f"{name}/attention", scores)
        rate = 0.0 if keep is None else self.dropout
        return ops.multi_head_attention(
            h, h, h, wi, bi, wo, bo, None, keep, heads=self.heads, causal=True, rate=rate
        )

    def _mlp(self, params: Params, h: Any, random: Random | None, name: str) -> Any:
        z = linear(params, f"{name}/linear1", h)  # (batch, length, hidden)
        z = with_dropout(
            self.dropout, NONLINEARITIES[self.nonlinearity](z), random, f"{name}/linear1"
        )
        return linear(params, f"{name}/linear2", z)  # (batch, length, width)

    def _check_length(self, x: Array) -> None:
        if x.ndim != 2 or not 1 <= x.shape[0] <= self.positions:
            raise Error(
                "Transformer: expected tokens (length, batch) with a length of 1 to "
                f"{self.positions}, the positions; got shape {tuple(x.shape)}"
            )

    # --- other frameworks ----------------------------------------------------------------

    def pytorch_names(self) -> dict[str, str]:
        """The name in PyTorch's word_language_model example of every parameter; see
        `npdrt.models.weights`. A last norm is `transformer_encoder.norm`."""
        return {name: _pytorch_name(name) for name in self.shapes()}


def _pytorch_name(name: str) -> str:
    if not name.startswith("layers/"):
        owner, _, array = name.partition("/")
        owners = {"embedding": "encoder", "norm": "transformer_encoder.norm"}
        return f"{owners.get(owner, owner)}.{array}"
    _, number, rest = name.split("/", 2)
    rest = rest.replace("attention/in/", "self_attn.in_proj_")
    rest = rest.replace("attention/out/", "self_attn.out_proj.").replace("/", ".")
    return f"transformer_encoder.layers.{int(number)}.{rest}"


# --- parts that language models share ---------------------------------------------------------


def check_heads(name: str, width: int, heads: int) -> None:
    """Refuse a width that cannot be cut into heads."""
    if width % heads:
        raise Error(f"{name}: width {width} cannot be cut into {heads} heads of one size")


def with_dropout(rate: float, h: Any, random: Random | None, name: str) -> Any:
    """h after dropout at a place of that name; h itself in evaluation."""
    keep = dropout_mask(rate, h, random, name)
    return h if keep is None else ops.dropout(h, keep, rate=rate)


def dropout_mask(
    rate: float, like: Any, random: Random | None, name: str, shape: tuple[int, ...] | None = None
) -> Array | None:
    """The mask of dropout at a place of that name; None in evaluation."""
    stream = None if random is None else random.of(f"{name}/dropout")
    return keep_mask(like, stream, rate=rate, shape=shape)


def linear(params: Params, name: str, h: Any) -> Any:
    """h W^T + b with the parameters below `name`."""
    return ops.linear(h, params[f"{name}/weight"], params[f"{name}/bias"])


def normalised(params: Params, name: str, h: Any, eps: float = 1e-5) -> Any:
    """Layer normalisation over the features, with the gain and bias below `name`."""
    return ops.layer_norm(h, params[f"{name}/weight"], params[f"{name}/bias"], eps=eps)


def constant(values: Floats, like: Any) -> Array:
    """A host array in the library, on the device and of the dtype of `like`."""
    raw = getattr(like, "value", like)
    return namespace(raw).asarray(values, dtype=raw.dtype)


def sinusoids(length: int, width: int) -> Floats:
    """Positions as sines and cosines, (length, width), float64:

        p[t, 2i] = sin(t w_i),   p[t, 2i + 1] = cos(t w_i),   w_i = 10000^(-2i / width)

    Source: Vaswani et al. 2017, section 3.5.
    """
    return _sinusoids(length, width, compute.is_portable())


@lru_cache(maxsize=8)
def _sinusoids(length: int, width: int, portable: bool) -> Floats:
    rates = compute.exp(np.arange(0, width, 2) * (-LOG_10000 / width))
    angles = np.arange(length)[:, None] * rates
    waves = np.stack([compute.sin(angles), compute.cos(angles)], axis=-1)
    return waves.reshape(length, width)
