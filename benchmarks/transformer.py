"""Time and memory of one training step of the WikiText-2 transformer, beside other libraries.

Forward, backward, clipping of all gradients at norm 0.25 and one SGD update of the language model
of Bernstein et al. 2020, Table 1 (width 200, 2 layers of 2 heads, hidden width 200, dropout 0.2,
33,278 words, an untied decoder, 35 words of 20 streams) in float32, all from the same weights and
batch. PyTorch is its example word_language_model: nn.TransformerEncoder, with its own clipping and
SGD. JAX is written by hand, the whole step compiled, weights donated; its masks are of its default
generator. The libraries take turns, one step each, and start every round with another of them; the
table has the medians. With --memory every library runs alone in a process of its own, and its peak
resident memory is taken.

Every library draws its own masks of dropout, anew at every step, so their losses differ a little.
--check compares them without dropout, to 1e-3, over three steps.
"""

from __future__ import annotations

import math
import sys
from functools import partial
from typing import Any

import numpy as np
from resnet import Step, arguments, available, measure

from npdrt import ops, optim, record, value_and_grad
from npdrt.models import MODELS
from npdrt.models.transformer import sinusoids
from npdrt.optim.clip import EPS, clipped
from npdrt.program import Memory
from npdrt.random import Random

WORDS, LENGTH, WIDTH, HEADS, LAYERS, DROPOUT = 33_278, 35, 200, 2, 2, 0.2
LR, CLIP = 1.0, 0.25  # the recipe's, for SGD
NORM_EPS = 1e-5  # of layer normalisation
CHECKED, TOLERANCE = 3, 1e-3  # steps of --check, relative difference of the losses


def model_of(dropout: float) -> Any:
    """npdrt's model; the others have its weights."""
    return MODELS["transformer"](
        vocabulary=WORDS, width=WIDTH, heads=HEADS, layers=LAYERS, hidden=WIDTH, dropout=dropout
    )


def data(batch: int) -> tuple[Any, Any]:
    """Words (35, batch) and the words after them."""
    words = [Random(0, f"benchmark/{name}").words(LENGTH * batch) % WORDS for name in "xy"]
    x, y = (w.astype(np.int64).reshape(LENGTH, batch) for w in words)
    return x, y


def with_npdrt(batch: int, *, dropout: float = DROPOUT, mode: str) -> Step:
    """The package itself: mode "eager", "replay" or "fast"."""
    model, optimizer, count = model_of(dropout), optim.sgd(lr=LR), 0
    params, random = model.init(seed=0), Random(0, "benchmark/step")
    x, y = data(batch)

    def loss_fn(params: Any, x: Any, y: Any, random: Any) -> Any:
        logits, _ = model.apply(params, {}, x, train=True, random=random)
        return ops.softmax_cross_entropy(logits, y)

    differentiated = value_and_grad(loss_fn)

    def whole(params: Any, state: Any, x: Any, y: Any, lr: Any, random: Any) -> Any:
        loss, grads = differentiated(params, x, y, random)
        return *optimizer.update(params, clipped(grads, CLIP), state, lr=lr), loss

    state, run = optimizer.init(params), whole
    if mode != "eager":
        memory = Memory()
        run = record(whole, params, state, x, y, LR, random, fast=mode == "fast", memory=memory)  # type: ignore[assignment]
        memory.adopt({"params": params})

    def step() -> float:
        nonlocal params, state, count
        params, state, loss = run(params, state, x, y, LR, random.at(count))
        count += 1
        return float(loss)

    return step


def torch_model(params: Any, dropout: float = DROPOUT) -> Any:
    """The example's TransformerModel with npdrt's weights, in training mode."""
    import torch
    from torch import nn

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(WIDTH, HEADS, WIDTH, dropout)
            self.encoder = nn.Embedding(WORDS, WIDTH)
            self.transformer_encoder = nn.TransformerEncoder(
                layer, LAYERS, enable_nested_tensor=False
            )
            self.decoder = nn.Linear(WIDTH, WORDS)
            self.dropout = nn.Dropout(dropout)
            angles = torch.arange(LENGTH).unsqueeze(1) * torch.exp(
                torch.arange(0, WIDTH, 2) * (-math.log(10000.0) / WIDTH)
            )
            positions = torch.stack((torch.sin(angles), torch.cos(angles)), dim=-1)
            self.positions = positions.reshape(LENGTH, 1, WIDTH)
            self.mask = nn.Transformer.generate_square_subsequent_mask(LENGTH)

        def forward(self, x: Any) -> Any:
            n = len(x)
            h = self.dropout(self.encoder(x) * math.sqrt(WIDTH) + self.positions[:n])
            return self.decoder(self.transformer_encoder(h, mask=self.mask[:n, :n]))

    model, names = Model(), model_of(dropout).pytorch_names()
    model.load_state_dict({names[k]: torch.tensor(w) for k, w in params.items()})
    return model.train()


def with_torch(batch: int, *, dropout: float = DROPOUT) -> Step:
    """PyTorch, eager: its own layers, clipping and SGD."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    torch.manual_seed(0)
    model = torch_model(model_of(dropout).init(seed=0), dropout)
    x, y = (torch.tensor(a) for a in data(batch))
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)

    def step() -> float:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x).view(-1, WORDS), y.view(-1))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        return loss.item()

    return step


def with_jax(batch: int, *, dropout: float = DROPOUT) -> Step:
    """JAX: the whole step compiled, weights donated."""
    import jax
    import jax.numpy as jnp

    table, (x, y), head = sinusoids(LENGTH, WIDTH), data(batch), WIDTH // HEADS
    positions = jnp.asarray(table.astype(np.float32))[None]
    triangle = jnp.tril(jnp.ones((LENGTH, LENGTH), dtype=bool))

    def linear(p: Any, name: str, h: Any) -> Any:
        return h @ p[f"{name}/weight"].T + p[f"{name}/bias"]

    def norm(p: Any, name: str, h: Any) -> Any:
        centred = h - h.mean(-1, keepdims=True)
        scale = jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + NORM_EPS)
        return centred * scale * p[f"{name}/weight"] + p[f"{name}/bias"]

    def loss_fn(p: Any, x: Any, y: Any, key: Any) -> Any:
        keys = iter(jax.random.split(key, 1 + 4 * LAYERS))

        def dropped(h: Any) -> Any:
            if not dropout:
                return h
            keep = jax.random.bernoulli(next(keys), 1 - dropout, h.shape)
            return jnp.where(keep, h / (1 - dropout), 0)

        def attention(name: str, h: Any) -> Any:
            cut = linear(p, f"{name}/in", h).reshape(batch, LENGTH, 3, HEADS, head)
            q, k, v = jnp.moveaxis(cut, 2, 0)
            scores = jnp.einsum("nlhd,nshd->nhls", q / math.sqrt(head), k)
            weights = jax.nn.softmax(jnp.where(triangle, scores, -jnp.inf))
            mixed = jnp.einsum("nhls,nshd->nlhd", dropped(weights), v)
            return linear(p, f"{name}/out", mixed.reshape(h.shape))

        h = dropped(p["embedding/weight"][x.T] * math.sqrt(WIDTH) + positions)
        for number in range(LAYERS):
            name = f"layers/{number:02d}"
            h = norm(p, f"{name}/norm1", h + dropped(attention(f"{name}/attention", h)))
            z = dropped(jax.nn.relu(linear(p, f"{name}/linear1", h)))
            h = norm(p, f"{name}/norm2", h + dropped(linear(p, f"{name}/linear2", z)))
        logits = linear(p, "decoder", h.reshape(-1, WIDTH))
        labels = y.T.reshape(-1)
        picked = jnp.take_along_axis(logits, labels[:, None], axis=1)[:, 0]
        return (jax.nn.logsumexp(logits, axis=1) - picked).mean()

    def whole(p: Any, x: Any, y: Any, key: Any, count: Any) -> Any:
        loss, grads = jax.value_and_grad(loss_fn)(p, x, y, jax.random.fold_in(key, count))
        total = jnp.sqrt(sum(jnp.vdot(g, g) for g in grads.values()))
        s = LR * jnp.minimum(1, CLIP / (total + EPS))
        return {k: w - s * grads[k] for k, w in p.items()}, loss

    compiled, count = jax.jit(whole, donate_argnums=0), 0
    params, x, y = jax.tree.map(jnp.array, (model_of(dropout).init(seed=0), x, y))
    key = jax.random.key(0)

    def step() -> float:
        nonlocal params, count
        params, loss = compiled(params, x, y, key, count)
        count += 1
        jax.block_until_ready(params)
        return float(loss)

    return step


LIBRARIES: dict[str, Any] = {
    "npdrt eager": partial(with_npdrt, mode="eager"),
    "npdrt replay": partial(with_npdrt, mode="replay"),
    "npdrt fast": partial(with_npdrt, mode="fast"),
    "PyTorch": with_torch,
    "JAX jit": with_jax,
}


def check(batch: int) -> bool:
    """Whether all libraries find the same losses without dropout; prints them."""
    losses: dict[str, list[float]] = {}
    for name in available(LIBRARIES):
        step = LIBRARIES[name](batch, dropout=0.0)
        losses[name] = [step() for _ in range(CHECKED)]
        print(f"{name:14}", *(f"{loss:.6f}" for loss in losses[name]))
    found = np.array(list(losses.values()))
    worst = float(np.max((found.max(axis=0) - found.min(axis=0)) / np.abs(found).min(axis=0)))
    print(f"largest relative difference {worst:.1e}, allowed {TOLERANCE:.0e}")
    return worst <= TOLERANCE


def main() -> None:
    """Time, and with --memory the peaks; or compare the losses."""
    parser = arguments(__doc__, batch=20)
    parser.add_argument("--check", action="store_true", help="compare losses, without dropout")
    given = parser.parse_args()
    if given.check:
        sys.exit(not check(given.batch))
    measure(LIBRARIES, given)


if __name__ == "__main__":
    main()
