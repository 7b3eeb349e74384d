"""BERT (Devlin et al. 2019) with the head that marks an answer's first and last token.

The same function as Hugging Face's `BertForQuestionAnswering`, whose weights `npdrt.models.weights`
reads and writes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from npdrt import ops
from npdrt.arrays import Array, Device, Params, label, namespace
from npdrt.autodiff import detach
from npdrt.errors import Error
from npdrt.models.initialisation import Floats, draw
from npdrt.models.transformer import (
    Shapes,
    check_heads,
    dropout_mask,
    linear,
    normalised,
    with_dropout,
)
from npdrt.ops.dropout import check_rate
from npdrt.random import Random

EPS = 1e-12  # of every layer normalisation
DEVIATION = 0.02  # of the normal draws
PADDING = 0  # the token whose embedding gets no gradient, as PyTorch's padding_idx
HEAD = ("span/weight", "span/bias")


@dataclass(frozen=True)
class BERT:
    """Logits of an answer's first and last token: BERT's encoder and a linear head.

        h = dropout(norm(word[t] + position + token_type[s]))
        a layer:  h = norm1(h + dropout(attention(h)));  h = norm2(h + dropout(mlp(h)))
        mlp(h) = W2 gelu(W1 h + b1) + b2 (gelu with erf),    logits = W h + b, W (2, width)

    The defaults are bert-base-cased: 107,721,218 parameters (no pooler). x: (batch, 3, length)
    integers: tokens, token types (0 for the question, 1 for the text), and 1 at real tokens, 0 at
    padding, to which no token attends. vocabulary: tokens; from the data. hidden: of the mlp.
    positions: the longest sequence. token_types: at least 2. dropout: rate in training mode, of
    embeddings, attention and both branches. weights: a safetensors file with the encoder's first
    values, and the head's if it holds one (`npdrt.models.weights.load`); without, all are drawn.

    Initialisation: weights normal with deviation 0.02, gains 1, biases 0, and the embedding of
    the padding token 0.

    >>> model = BERT(vocabulary=30, width=8, layers=1, heads=2, hidden=16, positions=12)
    >>> x = np.ones((4, 3, 10), np.int64)
    >>> model(model.init(seed=0), x).shape
    (4, 2, 10)
    """

    vocabulary: int = 28996
    width: int = 768
    layers: int = 12
    heads: int = 12
    hidden: int = 3072
    positions: int = 512
    token_types: int = 2
    dropout: float = 0.1
    weights: str = ""

    first_values: ClassVar[str] = "weights"  # a file that a resumed run does not read

    def __post_init__(self) -> None:
        for name in ("vocabulary", "width", "layers", "heads", "hidden", "positions"):
            if getattr(self, name) < 1:
                raise Error(f"BERT: {name} must be at least 1; got {getattr(self, name)}")
        if self.token_types < 2:
            raise Error(f"BERT: token_types must be at least 2; got {self.token_types}")
        check_heads("BERT", self.width, self.heads)
        check_rate("BERT", self.dropout)

    # --- parameters ----------------------------------------------------------------------

    def shapes(self) -> Shapes:
        """The name and shape of every parameter, in definition order."""
        width = self.width
        shapes: Shapes = {
            "embeddings/word/weight": (self.vocabulary, width),
            "embeddings/position/weight": (self.positions, width),
            "embeddings/token_type/weight": (self.token_types, width),
            "embeddings/norm/weight": (width,),
            "embeddings/norm/bias": (width,),
        }
        for layer in range(self.layers):
            shapes |= {f"{self.layer_name(layer)}/{n}": s for n, s in self._layer_shapes().items()}
        return {**shapes, "span/weight": (2, width), "span/bias": (2,)}

    def _layer_shapes(self) -> Shapes:
        width, hidden = self.width, self.hidden
        square = {f"attention/{n}": (width, width) for n in ("query", "key", "value", "output")}
        matrices = {
            **square,
            "norm1": (width,),
            "linear1": (hidden, width),
            "linear2": (width, hidden),
            "norm2": (width,),
        }
        shapes: Shapes = {}
        for name, shape in matrices.items():
            shapes |= {f"{name}/weight": shape, f"{name}/bias": shape[:1]}
        return shapes

    def layer_name(self, number: int) -> str:
        """The name of a layer: "layers/00", ..."""
        return f"layers/{number:0{max(2, len(str(self.layers - 1)))}d}"

    def init(self, seed: int = 0, device: str | Device = "cpu", dtype: str = "float32") -> Params:
        """The initial parameters: those of the file `weights`, the others drawn in float64 from
        (seed, name), and rounded once."""
        return draw(self._draw, seed, device, dtype)

    def _draw(self, stream: Random) -> Iterator[tuple[str, Floats]]:
        held = self._held()
        for name, shape in self.shapes().items():
            yield name, held[name] if name in held else _first(stream.of(name), name, shape)

    def _held(self) -> Params:
        """The values in the file `weights`, none without one."""
        if not self.weights:
            return {}
        from npdrt.models import weights  # not before a file is read: it loads npdrt.store

        return weights.load(Path(self.weights), self, optional=HEAD)

    # --- the network ---------------------------------------------------------------------

    def __call__(self, params: Params, x: Array) -> Array:
        """Logits (batch, 2, length) of an answer's first and last token, in evaluation mode."""
        return self._spans(params, self._encode(params, x, None))

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
        return self._spans(params, self._encode(params, x, random if train else None)), buffers

    def encode(self, params: Params, x: Array) -> Array:
        """The last hidden states (batch, length, width), in evaluation mode."""
        return self._encode(params, x, None)

    def _spans(self, params: Params, h: Any) -> Any:
        logits = linear(params, "span", h)  # (batch, length, 2)
        return ops.transpose(logits, axes=(0, 2, 1))  # (batch, 2, length)

    def _encode(self, params: Params, x: Array, random: Random | None) -> Any:
        self._check_input(x)
        h = self._embedded(params, x, random)  # (batch, length, width)
        mask = x[:, None, 2:3, :] > 0  # (batch, 1, 1, length)
        for number in range(self.layers):
            name = self.layer_name(number)
            h = label(self._layer(params, h, mask, random, name), name)
        return h

    def _embedded(self, params: Params, x: Array, random: Random | None) -> Any:
        """The sum of word, position and token type, normalised."""
        tokens, length = x[:, 0, :], x.shape[2]
        words = ops.embedding(params["embeddings/word/weight"], tokens)  # (batch, length, width)
        words = ops.where((tokens == PADDING)[:, :, None], detach(words), words)
        places = params["embeddings/position/weight"][:length, :]  # (length, width)
        types = ops.embedding(params["embeddings/token_type/weight"], x[:, 1, :])
        h = normalised(params, "embeddings/norm", words + types + places, EPS)
        return label(with_dropout(self.dropout, h, random, "embeddings"), "embeddings/output")

    def _layer(self, params: Params, h: Any, mask: Array, random: Random | None, name: str) -> Any:
        """One layer: attention and mlp, each added to its input and normalised."""
        out = with_dropout(
            self.dropout, self._attention(params, h, mask, random, name), random, f"{name}/norm1"
        )
        h = normalised(params, f"{name}/norm1", h + out, EPS)
        z = ops.gelu(linear(params, f"{name}/linear1", h))  # (batch, length, hidden)
        out = with_dropout(
            self.dropout, linear(params, f"{name}/linear2", z), random, f"{name}/norm2"
        )
        return normalised(params, f"{name}/norm2", h + out, EPS)

    def _attention(
        self, params: Params, h: Any, mask: Array, random: Random | None, name: str
    ) -> Any:
        batch, length, width = h.shape
        name = f"{name}/attention"

        def projected(part: str) -> Any:
            """The heads of one projection."""
            cut = (batch, length, self.heads, width // self.heads)
            rows = ops.reshape(linear(params, f"{name}/{part}", h), shape=cut)
            return ops.transpose(rows, axes=(0, 2, 1, 3))  # (batch, heads, length, width / heads)

        q, k, v = (projected(part) for part in ("query", "key", "value"))
        keep = dropout_mask(self.dropout, h, random, name, (batch, self.heads, length, length))
        y = ops.attention(q, k, v, mask, keep, rate=0.0 if keep is None else self.dropout)
        y = ops.transpose(y, axes=(0, 2, 1, 3))  # (batch, length, heads, width / heads)
        y = ops.reshape(y, shape=(batch, length, width))
        return linear(params, f"{name}/output", y)

    def _check_input(self, x: Array) -> None:
        if x.ndim != 3 or x.shape[1] != 3 or not 1 <= x.shape[2] <= self.positions:
            raise Error(
                "BERT: expected integers (batch, 3, length), of tokens, token types and mask, with "
                f"a length of 1 to {self.positions}, the positions; got shape {tuple(x.shape)}"
            )
        if not namespace(x).isdtype(x.dtype, "integral"):
            raise Error(f"BERT: expected integer tokens; got {x.dtype}")

    # --- other frameworks ----------------------------------------------------------------

    def pytorch_names(self) -> dict[str, str]:
        """The name in Hugging Face's BertForQuestionAnswering of every parameter; see
        `npdrt.models.weights`."""
        return {name: _pytorch_name(name) for name in self.shapes()}


def _first(stream: Random, name: str, shape: tuple[int, ...]) -> Floats:
    """The first value of one parameter."""
    if len(shape) == 1:
        return np.full(shape, 1.0 if "norm" in name and name.endswith("weight") else 0.0)
    value = stream.normal(shape, DEVIATION)
    if name == "embeddings/word/weight":
        value[PADDING] = 0.0
    return value


_EMBEDDINGS = {
    "word": "word_embeddings",
    "position": "position_embeddings",
    "token_type": "token_type_embeddings",
    "norm": "LayerNorm",
}
_LAYER = {
    "attention/query": "attention.self.query",
    "attention/key": "attention.self.key",
    "attention/value": "attention.self.value",
    "attention/output": "attention.output.dense",
    "norm1": "attention.output.LayerNorm",
    "linear1": "intermediate.dense",
    "linear2": "output.dense",
    "norm2": "output.LayerNorm",
}


def _pytorch_name(name: str) -> str:
    owner, _, array = name.rpartition("/")
    if owner == "span":
        return f"qa_outputs.{array}"
    if owner.startswith("embeddings/"):
        return f"bert.embeddings.{_EMBEDDINGS[owner.removeprefix('embeddings/')]}.{array}"
    _, number, part = owner.split("/", 2)
    return f"bert.encoder.layer.{int(number)}.{_LAYER[part]}.{array}"
