"""How the norms of the adversarial network's 44 normalised weights grow, next to the closed form.

The gradient of a normalised weight is orthogonal to it, so that a step of Fromage without its
prefactor (lars_lesion) multiplies the weight's norm by sqrt(1 + lr^2), and a step of Fromage keeps
it (Bernstein et al. 2020, Figure 2 right). In numbers of a computer the cosine of weight and
gradient is not quite 0, and after k steps of the lesion

    log |w_k| / |w_0| - k/2 log(1 + lr^2) = -lr (sum of the cosines)

up to terms of lr^3 and the rounding of the update. Where the hinge loss is flat the gradient is 0:
such a step does not count for the lesion, and in Fromage it shrinks the weight by the prefactor.
The table has the largest of both sides over the weights, of their difference, and the mean
difference from the closed form a step. The images are CIFAR-10's (`npdrt data fetch cifar-10`).
"""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np
from report import parser, publish, table
from step import machine

from npdrt import data, optim, record
from npdrt.arrays import quiet
from npdrt.models import GAN
from npdrt.optim import norm
from npdrt.program import Memory
from npdrt.random import Random
from npdrt.train.adversarial import Adversarial
from npdrt.train.step import State
from npdrt.trust.descent import dot

LR = 0.01
CASES = (("lars_lesion", "float32"), ("lars_lesion", "float64"), ("fromage", "float32"))


def grown(rule: str, dtype: str, width: int, steps: int, batch: int) -> tuple[Any, Any, Any]:
    """log |w_k| / |w_0|, the sum of the cosines of weight and gradient, and how many steps had a
    gradient, (weights,) each."""
    model, optimizer = GAN(width=width), optim.RULES[rule](lr=LR)
    params, buffers = model.init(seed=0, dtype=dtype), model.buffers(seed=0, dtype=dtype)
    images, turns = data.load("cifar-10", standardise="symmetric"), Adversarial(model, 10).turns
    sampler = images.sampler(batch, seed=0)

    def step(state: State, x: Any, y: Any, random: Random) -> tuple[State, list[Any]]:
        params, buffers, slots, cosines = state.params, state.buffers, dict(state.optimizer), {}
        for turn in turns:
            (_, (_, buffers)), grads = turn.gradients(params, buffers, x, y, random)
            own = turn.own(params)
            for name, g in grads.items():
                cosines[name] = dot(own[name], g) / (norm(own[name]) * norm(g))  # NaN if g is 0
            new, made = optimizer.update(own, grads, state.optimizer)
            params, slots = {**params, **new}, {**slots, **made}
        return State(params, buffers, slots), [cosines[name] for name in model.normalised]

    def arguments(number: int) -> tuple[Any, Any, Random]:
        chosen = sampler.batch(number)
        return images.x[chosen].astype(dtype), images.y[chosen], Random(0, "step", number)

    state, found = State(params, buffers, optimizer.init(params)), []
    first = [float(norm(params[name])) for name in model.normalised]
    memory = Memory()
    program = record(step, state, *arguments(0), memory=memory)
    memory.adopt({"state": state})
    with quiet():
        for number in range(steps):
            state, cosines = program(state, *arguments(number))
            found.append([float(c) for c in cosines])
    last = [float(norm(state.params[name])) for name in model.normalised]
    growth, moved = np.log(last) - np.log(first), np.isfinite(found)
    return growth, np.where(moved, found, 0.0).sum(0), moved.sum(0)


def main() -> None:
    """Print the table."""
    given = parser(__doc__)
    given.add_argument("--width", type=int, default=4)
    given.add_argument("--steps", type=int, default=1000)
    given.add_argument("--batch", type=int, default=8)
    given = given.parse_args()
    rows, results = [], {}
    for rule, dtype in CASES:
        growth, cosines, moved = grown(rule, dtype, given.width, given.steps, given.batch)
        counted = moved if rule == "lars_lesion" else moved - given.steps
        off = growth - counted / 2 * math.log1p(LR * LR)
        numbers = [np.abs(off).max(), LR * np.abs(cosines).max(), np.abs(off + LR * cosines).max()]
        numbers += [off.mean() / given.steps]
        results[f"{rule} {dtype}"] = {"growth": growth.tolist(), "cosines": cosines.tolist(),
                                      "moved": moved.tolist()}  # fmt: skip
        rows.append((rule, dtype, str(moved.min()), *(f"{value:.3g}" for value in numbers)))
        print(*rows[-1], file=sys.stderr)
    head = ("rule", "dtype", "steps with a gradient, least", "off the closed form", "lr sum cos",
            "difference", "drift a step")  # fmt: skip
    publish(table(head, rows), machine(), results, given.output)


if __name__ == "__main__":
    main()
