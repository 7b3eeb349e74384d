"""Time of the update alone, beside other libraries and beside the bandwidth of memory.

Fromage, SGD with momentum 0.9 and Adam on arrays of width x width float32 (50 of 784 x 784: 30.7
million parameters), gradients given and the same in every step. npdrt runs eagerly, as a program of
NumPy calls, and as a program with compiled loops; the gradients are already in the program's own
memory, as they are in a training step, which makes them there. PyTorch runs its optimizers, with
foreach and fused (Fromage has no fused one; its foreach is written by hand); JAX compiles the
update, weights and slots donated.

A rule has to move so many arrays of the weights' size at least: Fromage 3 (reads w, g; writes w),
SGD 5 (w, g, v; w, v), Adam 7 (w, g, m, v; w, m, v). The floor is those bytes over the bandwidth of
the triad a = b + 3c. All take turns, the triad too; the table has medians in milliseconds, and in
brackets the time over the floor. What the rules made of the weights is compared at the end.
"""

from __future__ import annotations

import math
import statistics
import sys
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import report
from step import RATES, first_slots, machine, updated

from npdrt import optim, record
from npdrt.errors import Unavailable
from npdrt.random import Random
from npdrt.train.bench import take_turns
from npdrt.train.limits import triad_bandwidth

ARRAYS_MOVED = {"fromage": 3, "sgd": 5, "adam": 7}
Arrays = dict[str, Any]
Contender = tuple[Callable[[], None], Callable[[], Any]]  # a step, and the first array after it


def rule_of(rule: str) -> optim.Optimizer:
    """npdrt's optimizer."""
    momentum = {"momentum": 0.9} if rule == "sgd" else {}
    made: optim.Optimizer = optim.RULES[rule](lr=RATES[rule], **momentum)
    return made


def eager(params: Arrays, grads: Arrays, rule: str) -> Contender:
    """npdrt, one array call after another."""
    optimizer = rule_of(rule)
    state = optimizer.init(params)

    def step() -> None:
        nonlocal params, state
        params, state = optimizer.update(params, grads, state)

    return step, lambda: next(iter(params.values()))


def program(params: Arrays, grads: Arrays, rule: str, fast: bool = False) -> Contender:
    """npdrt, recorded; the gradients pass through the program, so that they are in its memory."""
    optimizer = rule_of(rule)

    def update(params: Arrays, grads: Arrays, state: Arrays) -> tuple[Arrays, ...]:
        params, state = optimizer.update(params, grads, state)
        return params, grads, state

    now: Any = (params, grads, optimizer.init(params))
    replay = record(update, *now, fast=fast)

    def step() -> None:
        nonlocal now
        now = replay(*now)

    def weight() -> Any:
        first, before = next(iter(now[0].values())).copy(), places(now)
        step()
        if places(now) != before:
            raise RuntimeError("the program copied arrays of its own")
        return first

    return step, weight


def places(trees: Any) -> list[int]:
    """The addresses of all arrays."""
    return [x.ctypes.data for tree in trees for x in tree.values()]


def compiled(params: Arrays, grads: Arrays, rule: str) -> Contender:
    """npdrt, recorded, with compiled loops."""
    return program(params, grads, rule, fast=True)


def torch_foreach(params: Arrays, grads: Arrays, rule: str) -> Contender:
    """PyTorch, all arrays in one call an operation."""
    return _torch(params, grads, rule, foreach=True)


def torch_fused(params: Arrays, grads: Arrays, rule: str) -> Contender:
    """PyTorch, one kernel for the whole rule."""
    if rule == "fromage":
        raise Unavailable("PyTorch has no fused Fromage")
    return _torch(params, grads, rule, fused=True)


def _torch(params: Arrays, grads: Arrays, rule: str, **how: bool) -> Contender:
    import torch

    lr, weights = RATES[rule], [torch.tensor(w, requires_grad=True) for w in params.values()]
    slopes = [torch.from_numpy(g) for g in grads.values()]
    for w, g in zip(weights, slopes, strict=True):
        w.grad = g

    @torch.no_grad()
    def fromage() -> None:
        sizes = zip(torch._foreach_norm(weights), torch._foreach_norm(slopes), strict=True)
        torch._foreach_sub_(weights, torch._foreach_mul(slopes, [lr * a / b for a, b in sizes]))
        torch._foreach_div_(weights, math.sqrt(1 + lr * lr))

    update: Any = fromage
    if rule == "sgd":
        update = torch.optim.SGD(weights, lr=lr, momentum=0.9, **how).step
    elif rule == "adam":
        update = torch.optim.Adam(weights, lr=lr, **how).step
    return update, lambda: weights[0].detach().numpy()


def with_jax(params: Arrays, grads: Arrays, rule: str) -> Contender:
    """JAX: the update compiled, weights and slots donated."""
    import jax
    import jax.numpy as jnp

    def whole(weights: Any, slots: Any, grads: Any, t: Any) -> Any:
        done = [updated(jnp, rule, *a, t) for a in zip(weights, grads, slots, strict=True)]
        return [w for w, _ in done], [s for _, s in done]

    host = list(params.values())
    given = (host, first_slots(rule, host), list(grads.values()))
    weights, slots, slopes = jax.tree.map(jnp.array, given)
    run, t = jax.jit(whole, donate_argnums=(0, 1)), 0

    def step() -> None:
        nonlocal weights, slots, t
        t += 1
        weights, slots = run(weights, slots, slopes, jnp.float32(t))
        jax.block_until_ready(weights)

    return step, lambda: np.asarray(weights[0])


CONTENDERS: dict[str, Callable[[Arrays, Arrays, str], Contender]] = {
    "npdrt eager": eager,
    "npdrt program": program,
    "npdrt program, fast": compiled,
    "PyTorch foreach": torch_foreach,
    "PyTorch fused": torch_fused,
    "JAX jit": with_jax,
}


def measure(rule: str, arrays: int, width: int, steps: int) -> dict[str, Any]:
    """Seconds of every step by contender, the triad's GB/s, and the bytes to move."""
    shape, names = (width, width), [f"layers/{k:02d}/weight" for k in range(arrays)]
    stream = Random(0, "benchmark/update")
    params, grads = (
        {n: stream.of(kind).of(n).normal(shape).astype(np.float32) for n in names}
        for kind in ("w", "g")
    )
    ready: dict[str, Contender] = {}
    for name, make in CONTENDERS.items():
        try:
            ready[name] = make(params, grads, rule)
        except (ImportError, Unavailable) as error:
            print(f"{rule}: {name} is left out: {error}", file=sys.stderr)
    triad: list[float] = []

    def limits() -> None:
        triad.append(triad_bandwidth(passes=2).rate)

    seconds = take_turns({"triad": limits, **{n: step for n, (step, _) in ready.items()}}, steps)
    del seconds["triad"]
    compare(rule, next(iter(params.values())), {n: weight() for n, (_, weight) in ready.items()})
    moved = ARRAYS_MOVED[rule] * sum(w.nbytes for w in params.values())
    floor = moved / (1e9 * statistics.median(triad))
    return {"rule": rule, "seconds": seconds, "triad": triad, "bytes": moved, "floor": floor}


def compare(rule: str, before: Any, after: dict[str, Any]) -> None:
    """Warn where a contender has changed the weights otherwise than npdrt eager."""
    change = {name: w - before for name, w in after.items()}
    plain = change["npdrt eager"]
    for name, other in change.items():
        if np.abs(other - plain).max() > 0.1 * np.abs(plain).max():
            warnings.warn(f"{rule}: {name} does not do the work of npdrt eager", stacklevel=2)


def text_of(results: list[dict[str, Any]]) -> str:
    """The results as Markdown."""
    names = [name for name in CONTENDERS if any(name in r["seconds"] for r in results)]
    rows = []
    for r in results:
        cells = [r["rule"], f"{r['bytes'] / 1e6:.0f}", f"{statistics.median(r['triad']):.1f}"]
        cells.append(f"{1e3 * r['floor']:.1f}")
        for name in names:
            taken = statistics.median(r["seconds"].get(name, [math.nan]))
            shown = f"{1e3 * taken:.1f} ({taken / r['floor']:.2f})"
            cells.append("" if math.isnan(taken) else shown)
        rows.append(cells)
    return report.table(["rule", "MB", "triad GB/s", "floor", *names], rows)


def main() -> None:
    """Measure every rule."""
    parser = report.parser(__doc__)
    parser.add_argument("--rules", nargs="+", choices=list(ARRAYS_MOVED), default=[*ARRAYS_MOVED])
    parser.add_argument("--arrays", type=int, default=50)
    parser.add_argument("--width", type=int, default=784)
    parser.add_argument("--steps", type=int, default=10, help="timed steps")
    given = parser.parse_args()
    results = [measure(rule, given.arrays, given.width, given.steps) for rule in given.rules]
    report.publish(text_of(results), machine(), results, given.output)


if __name__ == "__main__":
    main()
