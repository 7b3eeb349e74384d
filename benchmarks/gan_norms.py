"""How the norms of the adversarial network's 44 normalised weights grow, next to the closed form.

The gradient of a normalised weight is orthogonal to it, so that a step of Fromage without its
prefactor (lars_lesion) multiplies the weight's norm by sqrt(1 + lr^2), and a step of Fromage keeps
it (Bernstein et al. 2020, Figure 2 right). In numbers of a computer the cosine of weight and
gradient is not quite 0, and the update rounds the exact new weight d to w'. After k steps

    log |w_k| / |w_0| - closed form = -lr (sum of the cosines) + sum of log |w'| / |d|

up to terms of lr^3; the closed form of the lesion is k/2 log(1 + lr^2). Where the hinge loss is
flat the gradient is 0: such a step does not count for the lesion, and in Fromage it shrinks the
weight by the prefactor.

The last sum is the rounding of the updates. An element is off by up to half an ulp. If all errors
are independent and evenly spread, the sum for the lesion is a random walk of the variance

    sum over steps of (sum over elements of (ulp(w_i) w_i)^2 / 12) / |w|^4

which for 1,000 steps of n float32 elements of equal size is about 1000 (2.5e-8)^2 / n. The script
fails if the two sides differ by more than MISSING, or if the lesion's rounding is larger than
DEVIATIONS standard deviations of the walk. The images are CIFAR-10's (`npdrt data fetch cifar-10`).
"""

from __future__ import annotations

import math
import sys
from typing import Any, NamedTuple

import numpy as np
from report import parser, publish, table
from step import machine

from npdrt import data, optim, record
from npdrt.arrays import namespace, quiet
from npdrt.models import GAN
from npdrt.optim import norm
from npdrt.optim.fromage import relative_rate
from npdrt.program import Memory
from npdrt.random import Random
from npdrt.train.adversarial import Adversarial
from npdrt.train.step import State
from npdrt.trust.descent import dot

LR = 0.01
CASES = ("lars_lesion float32", "lars_lesion float64", "fromage float32")
MISSING = 1e-9
DEVIATIONS = 5


class Growth(NamedTuple):
    """Of every weight, (weights,) each: log |w_k| / |w_0| less the closed form; the sum of the
    cosines of weight and gradient; the sum of log |w'| / |d|, and the standard deviation of the
    random walk; the number of elements; how many steps had a gradient."""

    off: Any
    cosines: Any
    rounding: Any
    deviation: Any
    size: Any
    moved: Any


def grown(rule: str, dtype: str, width: int, steps: int, batch: int) -> Growth:
    """Train for so many steps."""
    model, optimizer = GAN(width=width), optim.RULES[rule](lr=LR)
    prefactor = math.sqrt(1 + LR * LR) if rule == "fromage" else 1.0
    params, buffers = model.init(seed=0, dtype=dtype), model.buffers(seed=0, dtype=dtype)
    images, turns = data.load("cifar-10", standardise="symmetric"), Adversarial(model, 10).turns
    sampler = images.sampler(batch, seed=0)

    def step(state: State, x: Any, y: Any, random: Random) -> tuple[State, list[Any]]:
        params, buffers, slots, found = state.params, state.buffers, dict(state.optimizer), {}
        for turn in turns:
            (_, (_, buffers)), grads = turn.gradients(params, buffers, x, y, random)
            own = turn.own(params)
            new, made = optimizer.update(own, grads, state.optimizer)
            for name, g in grads.items():
                exact = norm(unrounded(own[name], g)) / prefactor
                cosine = dot(own[name], g) / (norm(own[name]) * norm(g))  # NaN if g is 0
                found[name] = cosine, norm(new[name]) / exact
            params, slots = {**params, **new}, {**slots, **made}
        return State(params, buffers, slots), [found[name] for name in model.normalised]

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
            state, pairs = program(state, *arguments(number))
            walked = [variance(state.params[name]) for name in model.normalised]
            found.append([(*map(float, pair), v) for pair, v in zip(pairs, walked, strict=True)])
    cosines, ratios, variances = np.moveaxis(np.array(found), 2, 0)  # (steps, weights) each
    last = [float(norm(state.params[name])) for name in model.normalised]
    moved = np.isfinite(cosines).sum(0)
    counted = moved - steps if rule == "fromage" else moved
    return Growth(
        off=np.log(last) - np.log(first) - counted / 2 * math.log1p(LR * LR),
        cosines=np.nansum(cosines, 0),
        rounding=np.log(ratios).sum(0),
        deviation=np.sqrt(variances.sum(0)),
        size=np.array([params[name].size for name in model.normalised]),
        moved=moved,
    )


def unrounded(w: Any, g: Any) -> Any:
    """w - lr |w|/|g| g in float64."""
    xp = namespace(w)
    wide, along = (xp.asarray(a, dtype=xp.float64) for a in (w, g))
    return wide - relative_rate(w, g, LR) * along


def variance(w: Any) -> float:
    """Of log |w|, if each element is off by up to half an ulp."""
    errors = np.spacing(np.abs(w)).astype(float) * w
    return float((errors * errors).sum() / 12 / norm(w) ** 4)


def check(case: str, grown: Growth) -> None:
    """Fail where something is not accounted for."""
    missing = np.abs(grown.off + LR * grown.cosines - grown.rounding).max()
    if missing > MISSING:
        raise SystemExit(f"{case}: {missing:.2g} of the growth is in no term")
    walked = np.abs(grown.rounding / grown.deviation).max()
    if "lesion" in case and walked > DEVIATIONS:
        raise SystemExit(f"{case}: the rounding is {walked:.1f} deviations of a random walk")


def row(case: str, grown: Growth, steps: int) -> tuple[str, ...]:
    """The largest of each term over the weights, and the mean of `off` a step."""
    terms = (grown.off, LR * grown.cosines, grown.off + LR * grown.cosines, grown.rounding)
    numbers = [np.abs(term).max() for term in terms] + [grown.off.mean() / steps]
    return case, str(grown.moved.min()), *(f"{number:.3g}" for number in numbers)


def by_size(grown: Growth) -> str:
    """The rounding of the weights of each size, next to the random walk's."""
    rows = []
    for size in np.unique(grown.size):
        rounding, deviation = (a[grown.size == size] for a in (grown.rounding, grown.deviation))
        numbers = np.abs(rounding).max(), deviation.mean(), np.abs(rounding / deviation).max()
        rows.append((f"{size}", f"{len(rounding)}", *(f"{number:.2g}" for number in numbers)))
    head = ("elements", "weights", "rounding, largest", "deviation of the walk", "largest ratio")
    return table(head, rows)


def main() -> None:
    """Print the tables."""
    given = parser(__doc__)
    given.add_argument("--width", type=int, default=4)
    given.add_argument("--steps", type=int, default=1000)
    given.add_argument("--batch", type=int, default=8)
    given.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    given = given.parse_args()
    rows, results, texts = [], {}, []
    for case in given.cases:
        found = grown(*case.split(), given.width, given.steps, given.batch)
        check(case, found)
        results[case] = {name: value.tolist() for name, value in found._asdict().items()}
        rows.append(row(case, found, given.steps))
        if case == "lars_lesion float32":
            texts.append(by_size(found))
        print(*rows[-1], file=sys.stderr)
    head = ("rule", "steps with a gradient, least", "off the closed form", "lr sum cos",
            "difference", "rounding of the updates", "drift a step")  # fmt: skip
    publish("\n\n".join((table(head, rows), *texts)), machine(), results, given.output)


if __name__ == "__main__":
    main()
