"""How the norms of the adversarial network's 44 normalised weights grow, next to the closed form.

The gradient of a normalised weight is orthogonal to it, so that a step of Fromage without its
prefactor (lars_lesion) multiplies the weight's norm by sqrt(1 + lr^2), and a step of Fromage keeps
it (Bernstein et al. 2020, Figure 2 right). In numbers of a computer the cosine of weight and
gradient is not quite 0, and after k steps of the lesion

    log |w_k| / |w_0| - k/2 log(1 + lr^2) = -lr (sum of the cosines)

up to terms of lr^3 and the rounding of the update. The table has the largest of both sides over the
weights, of their difference, and for Fromage the change of log |w| a step.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from report import parser, publish, table
from step import machine

from npdrt import optim, record
from npdrt.arrays import quiet
from npdrt.models import GAN
from npdrt.optim import norm
from npdrt.program import Memory
from npdrt.random import Random
from npdrt.train.adversarial import Adversarial
from npdrt.train.step import State
from npdrt.trust.descent import dot

LR, BATCH = 0.01, 4
CASES = (("lars_lesion", "float32"), ("lars_lesion", "float64"), ("fromage", "float32"))


def grown(rule: str, dtype: str, width: int, steps: int) -> tuple[Any, Any]:
    """log |w_k| / |w_0| and the sum of the cosines of weight and gradient, (weights,)."""
    model, optimizer = GAN(width=width), optim.RULES[rule](lr=LR)
    params, buffers = model.init(seed=0, dtype=dtype), model.buffers(seed=0, dtype=dtype)
    x = np.tanh(Random(0, "benchmark/x").normal((BATCH, 3, 32, 32))).astype(dtype)
    y, turns = np.arange(BATCH) % 10, Adversarial(model, 10).turns

    def step(state: State, x: Any, y: Any, random: Random) -> tuple[State, list[Any]]:
        params, buffers, slots, cosines = state.params, state.buffers, dict(state.optimizer), {}
        for turn in turns:
            (_, (_, buffers)), grads = turn.gradients(params, buffers, x, y, random)
            own = turn.own(params)
            for name, g in grads.items():
                cosines[name] = dot(own[name], g) / (norm(own[name]) * norm(g))
            new, made = optimizer.update(own, grads, state.optimizer)
            params, slots = {**params, **new}, {**slots, **made}
        return State(params, buffers, slots), [cosines[name] for name in model.normalised]

    state, total = State(params, buffers, optimizer.init(params)), np.zeros(len(model.normalised))
    first = [float(norm(params[name])) for name in model.normalised]
    memory = Memory()
    program = record(step, state, x, y, Random(0, "step"), memory=memory)
    memory.adopt({"state": state})
    with quiet():
        for number in range(steps):
            state, cosines = program(state, x, y, Random(0, "step", number))
            total += np.array([float(c) for c in cosines])
    last = [float(norm(state.params[name])) for name in model.normalised]
    return np.log(last) - np.log(first), total


def main() -> None:
    """Print the table."""
    given = parser(__doc__)
    given.add_argument("--width", type=int, default=4)
    given.add_argument("--steps", type=int, default=1000)
    given = given.parse_args()
    rows, results = [], {}
    for rule, dtype in CASES:
        growth, cosines = grown(rule, dtype, given.width, given.steps)
        closed = given.steps / 2 * math.log1p(LR * LR) if rule == "lars_lesion" else 0.0
        off = growth - closed
        numbers = [np.abs(off).max(), LR * np.abs(cosines).max(), np.abs(off + LR * cosines).max()]
        numbers += [growth.mean() / given.steps]
        results[f"{rule} {dtype}"] = {"growth": growth.tolist(), "cosines": cosines.tolist()}
        rows.append((rule, dtype, f"{growth.min():.8f} to {growth.max():.8f}",
                     *(f"{value:.3g}" for value in numbers)))  # fmt: skip
    head = ("rule", "dtype", "log of the growth", "off the closed form", "lr sum cos", "difference",
            "growth a step")  # fmt: skip
    publish(table(head, rows), machine(), results, given.output)


if __name__ == "__main__":
    main()
