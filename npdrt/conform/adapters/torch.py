"""Optimizers of torch.optim."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np

from npdrt.conform.adapters.adapter import Info, accepts, arguments, checked, library, wide
from npdrt.conform.case import FILLER, Answer, Case, operands
from npdrt.conform.formats import FORMATS, Values
from npdrt.conform.rules import KNOWN, SLOTS


class Torch:
    """A class of torch.optim, stepped on a parameter of its own, on the CPU."""

    files: tuple[str, ...] = ()

    def __init__(self, source: str, overrides: Mapping[str, Any]):
        self.torch, (_, self.known) = library("torch"), KNOWN[source]
        self.make = getattr(self.torch.optim, source.rpartition(".")[2])
        accepts(inspect.signature(self.make).parameters, source, overrides)
        self.overrides = dict(overrides)
        self.info = Info(self.known.settings, frozenset(), tuple(FORMATS))
        one = self.torch.zeros(1, requires_grad=True)  # the first step imports half of torch
        self.torch.optim.SGD([one], lr=0.0).step()

    def run(self, case: Case) -> list[Answer]:
        """The answers of a case, through `step()` with the learning rate set in the group."""
        w = self.operands(case, case.w, case.w)[0].requires_grad_()
        settings = {**arguments(case, self.known), **self.overrides}
        other: Any = None
        if case.neighbour is not None:
            other = self.tensor(case.neighbour.w, case).requires_grad_()
        tensors = [w] if other is None else [other, w]
        optimizer = self.make(tensors, lr=case.steps[0].lr, **settings)
        if state := self.state(case):
            optimizer.state[w] = state
        answers = []
        for k, step in enumerate(case.steps, 1):
            optimizer.param_groups[0]["lr"] = step.lr
            if case.neighbour is not None:
                other.grad = self.tensor(case.neighbour.g[k - 1], case)
            w.grad = self.operands(case, case.w, step.g)[1]
            optimizer.step()
            checked(w, case.w.shape, case.format, k)
            answers.append(Answer(self.values(w), self.slots(optimizer.state.get(w, {}))))
        return answers

    def tensor(self, values: Values, case: Case) -> Any:
        """Numbers of the case's format, exactly, as a tensor."""
        return self.torch.tensor(values).to(getattr(self.torch, case.format))

    def operands(self, case: Case, w: Values, g: Values) -> tuple[Any, Any]:
        """The parameter and the gradient as tensors in the layout of the case; torch has no
        negative strides."""
        return operands(self.tensor(w, case), self.tensor(g, case), case.layout, self.laid_out)

    def laid_out(self, tensor: Any, layout: str) -> Any:
        """A copy of a tensor in a layout."""
        if layout.startswith("fortran"):
            backwards = tuple(reversed(range(tensor.dim())))
            return tensor.permute(backwards).contiguous().permute(backwards)
        if layout != "strided":
            return tensor
        buffer = tensor.new_full((2 * tensor.numel(),), FILLER)
        return buffer.as_strided(tensor.shape, [2 * s for s in tensor.stride()]).copy_(tensor)

    def values(self, tensor: Any) -> Values:
        """A copy of a tensor as float64."""
        return wide(tensor.detach().to(self.torch.float64).numpy())

    def state(self, case: Case) -> dict[str, Any]:
        """The state of the parameter at the case's start; {} if the optimizer makes it itself."""
        given, slots = case.state or {}, dict(self.known.slots)
        if not given.get("step", 0) and not given.keys() & SLOTS:
            return {}
        state, zero = {}, np.zeros_like(case.w)
        if name := slots.pop("step", ""):
            state[name] = self.torch.tensor(float(given.get("step", 0)), dtype=self.torch.float32)
        for slot, name in slots.items():
            state[name] = self.tensor(given.get(slot, zero), case)
        for argument, name in self.known.adds.items():
            if self.overrides.get(argument):  # no case has it: it is as at the start
                state[name] = self.tensor(zero, case)
        return state

    def slots(self, state: Mapping[str, Any]) -> dict[str, Values]:
        """The array slots by npdrt's names."""
        own = {k: state.get(name) for k, name in self.known.slots.items() if k in SLOTS}
        return {k: self.values(value) for k, value in own.items() if value is not None}
