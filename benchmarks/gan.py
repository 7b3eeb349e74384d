"""Time and memory of one step of the adversarial network, next to PyTorch.

A step updates the discriminator, then the generator, of Bernstein et al. 2020, with SGD in float32:
three forward passes of the discriminator and two of the generator, 32x32 images of 10 classes.
PyTorch's network is the one that the tests compare with (tests/torch_gan.py); its generator makes
the discriminator's images without a graph. The libraries take turns, as in resnet.py, whose options
these are; --memory runs each alone in a process. The losses of the last steps are compared.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from resnet import Libraries, Step, arguments, data, measure

from npdrt import optim, record
from npdrt.models import GAN
from npdrt.program import Memory
from npdrt.random import Random
from npdrt.train.adversarial import Adversarial
from npdrt.train.step import State, make_step

sys.path.append(str(Path(__file__).parents[1] / "tests"))
LR, MODEL = 1e-4, GAN()


def random(number: int) -> Random:
    """The stream of a step."""
    return Random(0, "benchmark/gan", number)


def with_npdrt(batch: int, *, mode: str) -> Step:
    """The step of `npdrt train`: mode "eager", "replay" or "fast"."""
    optimizer, (x, y) = optim.sgd(lr=LR), data(batch)
    params, buffers = MODEL.init(seed=0), MODEL.buffers(seed=0)
    state, number = State(params, buffers, optimizer.init(params)), 0
    run: Any = make_step(Adversarial(MODEL, 10), optimizer)
    if mode != "eager":
        memory = Memory()
        run = record(run, state, x, y, LR, random(0), fast=mode == "fast", memory=memory)
        memory.adopt({"state": state})

    def step() -> float:
        nonlocal state, number
        done = run(state, x, y, LR, random(number))
        state, number = done.state, number + 1
        return float(done.loss)

    return step


def with_torch(batch: int, *, channels_last: bool) -> Step:
    """PyTorch, eager."""
    import torch
    from torch_gan import Twin

    form = torch.channels_last if channels_last else torch.contiguous_format
    twin = Twin(MODEL.init(seed=0), MODEL.buffers(seed=0), torch.float32)
    twin.lay_out(form)
    x, y = (torch.tensor(a) for a in data(batch))
    x, number = x.to(memory_format=form), 0

    def step() -> float:
        nonlocal number
        streams = (random(number).of(f"noise/{name}") for name in MODEL.networks)
        noises = [torch.tensor(MODEL.noise(s, batch).astype(np.float32)) for s in streams]
        number += 1
        (judged, _), _ = twin.step(x, y, noises, LR)
        return judged + 2.0

    return step


LIBRARIES: Libraries = {
    "npdrt eager": partial(with_npdrt, mode="eager"),
    "npdrt replay": partial(with_npdrt, mode="replay"),
    "npdrt fast": partial(with_npdrt, mode="fast"),
    "PyTorch": partial(with_torch, channels_last=False),
    "PyTorch channels last": partial(with_torch, channels_last=True),
}

if __name__ == "__main__":
    measure(LIBRARIES, arguments(__doc__, batch=64).parse_args())
