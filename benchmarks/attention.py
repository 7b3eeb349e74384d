"""Attention forward and backward, beside PyTorch, by length; time and peak memory.

`ops.attention` on float32 q, k, v of (batch, heads, length, head size), causal, with its cotangents
by all three, eagerly and as a program; PyTorch's `scaled_dot_product_attention` with `is_causal`.
All take turns in one process for the times, medians in milliseconds. "program / PyTorch" is the
ratio of these. Memory: each run in a process of its own, the resident bytes that three rounds add
at their highest to what is resident after the inputs are made, in MB, beside the bytes of all
scores. The gradients are compared first.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from memory import peak

Shape = tuple[int, int, int, int]  # batch, heads, length, head size
SHAPES: dict[str, Shape] = {
    "WikiText-2": (20, 2, 35, 100),
    "128": (16, 8, 128, 64),
    "384, BERT": (12, 12, 384, 64),
    "512": (4, 8, 512, 64),
    "1024": (2, 8, 1024, 64),
    "2048": (1, 8, 2048, 64),
}
Round = Callable[[], Any]  # one forward and backward pass: the cotangents of q, k and v


def inputs(shape: Shape) -> list[Any]:
    """q, k, v and the cotangent of the result."""
    import numpy as np

    draw = np.random.default_rng(0)
    return [draw.standard_normal(shape, dtype=np.float32) for _ in range(4)]


def with_npdrt(given: list[Any], *, recorded: bool) -> Round:
    """The package: eagerly, or replayed from a program with the inputs in its own memory."""
    from npdrt import ops, record
    from npdrt.autodiff import Tensor, backward

    def step(state: Any, g: Any) -> Any:
        tensors = {name: Tensor(x) for name, x in state.items()}
        y = ops.attention(*tensors.values(), causal=True)
        found = backward(y, g)
        return {f"g{name}": found[id(t)] for name, t in tensors.items()}

    state, g = dict(zip("qkv", given, strict=False)), given[3]
    run = record(step, state, g) if recorded else step
    return lambda: list(run(state, g).values())


def with_torch(given: list[Any]) -> Round:
    """PyTorch's fused function."""
    import torch

    *tensors, g = map(torch.from_numpy, given)
    tensors = [t.requires_grad_() for t in tensors]

    def run() -> Any:
        y = torch.nn.functional.scaled_dot_product_attention(*tensors, is_causal=True)
        return [x.numpy() for x in torch.autograd.grad(y, tensors, g)]

    return run


RUNS: dict[str, Callable[[list[Any]], Round]] = {
    "npdrt eager": lambda given: with_npdrt(given, recorded=False),
    "npdrt program": lambda given: with_npdrt(given, recorded=True),
    "PyTorch": with_torch,
}


def available(names: list[str]) -> list[str]:
    """Those that can run here."""
    try:
        import torch  # noqa: F401
    except ImportError:
        print("PyTorch is left out: it is not installed", file=sys.stderr)
        return [name for name in names if name != "PyTorch"]
    return names


def times(shape: Shape, names: list[str], turns: int) -> dict[str, list[float]]:
    """Seconds of every run, turn by turn; all have to agree."""
    import numpy as np

    from npdrt.train.bench import take_turns

    given = inputs(shape)
    rounds = {name: RUNS[name](given) for name in names}
    expected = [np.array(x) for x in rounds[names[0]]()]
    for name, run in rounds.items():
        for ours, theirs in zip(run(), expected, strict=True):
            if np.max(np.abs(ours - theirs)) > 1e-4 * np.max(np.abs(theirs)):
                raise SystemExit(f"{name} differs from {names[0]} at {shape}")
    found: dict[str, list[float]] = take_turns(rounds, turns)
    return found


def child(name: str, shape: Shape) -> None:
    """The bytes that three rounds of a run add at their highest; for a process of its own."""
    given = inputs(shape)
    run = RUNS[name](given)
    RUNS[name](inputs((1, 1, 8, 4)))()  # so that what a first call loads is there
    before = peak()
    for _ in range(3):
        run()
    print(json.dumps(peak() - before))


def memory(shape: Shape, name: str) -> int:
    """What `child` prints in a new process."""
    command = [sys.executable, __file__, f"--child={name}", f"--shape={json.dumps(shape)}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(json.loads(done.stdout))


def measure(names: list[str], shapes: list[str], turns: int) -> list[dict[str, Any]]:
    """Times and memory of every shape."""
    return [
        {
            "name": title,
            "shape": SHAPES[title],
            "seconds": times(SHAPES[title], names, turns),
            "bytes": {name: memory(SHAPES[title], name) for name in names},
        }
        for title in shapes
    ]


def text_of(results: list[dict[str, Any]]) -> str:
    """The results as Markdown."""
    import report

    names = list(results[0]["seconds"])
    rows = []
    for result in results:
        batch, heads, length, size = result["shape"]
        typical = {name: 1e3 * statistics.median(s) for name, s in result["seconds"].items()}
        ratio = typical.get("npdrt program", 0.0) / typical.get("PyTorch", float("nan"))
        rows.append(
            [
                f"{result['name']} ({batch} x {heads} x {length} x {size})",
                *(f"{typical[name]:.1f}" for name in names),
                f"{ratio:.2f}" if ratio == ratio else "",
                *(f"{result['bytes'][name] / 1e6:.0f}" for name in names),
                f"{4e-6 * batch * heads * length * length:.0f}",
            ]
        )
    head = [
        *("length (batch x heads x length x size)", *(f"{name}, ms" for name in names)),
        *("program / PyTorch", *(f"{name}, MB" for name in names), "scores, MB"),
    ]
    return report.table(head, rows)


def main() -> None:
    """Measure everything; or be a child."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, metavar="PREFIX", help="write PREFIX.md, .json too")
    parser.add_argument("--lengths", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--steps", type=int, default=10, help="timed rounds")
    parser.add_argument("--child", choices=list(RUNS), help=argparse.SUPPRESS)
    parser.add_argument("--shape", type=json.loads, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        child(given.child, tuple(given.shape))
        return
    results = measure(available(list(RUNS)), given.lengths, given.steps)
    import report
    from step import machine

    report.publish(text_of(results), machine(), results, given.output)


if __name__ == "__main__":
    main()
