"""Optimizers of PyTorch: the classes of torch.optim, and those that others derive from them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from npdrt.conform.adapters.adapter import (
    OTHER_DECAY,
    Info,
    arguments,
    asked_with,
    check_start,
    checked,
    exclusion,
    library,
    wide,
)
from npdrt.conform.adapters.signature import fitted, required, signature_of
from npdrt.conform.case import FILLER, FIRST_GROUP, USES, Answer, Case, operands
from npdrt.conform.formats import FORMATS, Values
from npdrt.conform.rules import RULES, SLOTS, LibraryOptimizer

# what optimizers call the slots, and the bound on a norm, if npdrt is not told otherwise
NAMES = {slot: slot for slot in SLOTS} | {"momentum": "momentum_buffer", "max_norm": "max"}


class Torch:
    """A class of optimizers, stepped on a parameter of its own, on the CPU."""

    def __init__(
        self, make: Any, known: LibraryOptimizer, overrides: Mapping[str, Any], path: str = ""
    ):
        self.torch, self.make, self.overrides = library("torch"), make, dict(overrides)
        signature = signature_of(make, first=1)
        self.known = fitted(known, signature, overrides)
        self.names = {**NAMES, **self.known.slots}
        self.files: tuple[str, ...] = (path,) if path else ()
        self.info = Info(
            self.known.settings, required(self.known, signature), tuple(FORMATS), tuple(USES)
        )
        one = self.torch.zeros(1, requires_grad=True)  # the first step imports half of torch
        self.torch.optim.SGD([one], lr=0.0).step()

    def run(self, case: Case) -> list[Answer]:
        """The answers of a case, through `step()` with the learning rate set in the group."""
        w = self.operands(case, case.w, case.w)[0].requires_grad_()
        other: Any = None
        if case.neighbour is not None:
            other = self.tensor(case.neighbour.w, case).requires_grad_()
        with asked_with(case):
            optimizer = self.optimizer(case, w, other)
        self.start(case, optimizer, w)
        answers = []
        for k, step in enumerate(case.steps, 1):
            first = FIRST_GROUP if "GROUPS" in case.flags else 1.0
            optimizer.param_groups[0]["lr"] = first * step.lr
            optimizer.param_groups[-1]["lr"] = step.lr
            if case.neighbour is not None:
                other.grad = self.tensor(case.neighbour.g[k - 1], case)
            if "MISSING_GRADIENT" in case.flags and k > 1:
                w.grad = None
                optimizer.step()
            w.grad = self.operands(case, case.w, step.g)[1]
            optimizer.step()
            checked(w, case.w.shape, case.format, k)
            answers.append(Answer(self.values(w), self.slots(optimizer.state.get(w, {}), case)))
        return answers

    def optimizer(self, case: Case, w: Any, other: Any) -> Any:
        """The optimizer of a tensor, last in its last group, and of its neighbour, if any."""
        lr = case.steps[0].lr or 1.0  # some refuse 0 at first
        settings, own = arguments(case, self.known), RULES[case.rule].group
        groups = [{"params": [w] if other is None else [other, w], **own}]
        if "GROUPS" in case.flags:
            apart = {"params": [other], "lr": FIRST_GROUP * lr, **own}
            if "weight_decay" in settings:
                apart["weight_decay"] = settings["weight_decay"] + OTHER_DECAY
            groups = [apart, {"params": [w], **own}]
        elif (excluded := exclusion(case, settings)) is not None:
            (given, decays), both = excluded, ([other], [w])
            sizes = [(1 - decays) * given["weight_decay"], decays * given["weight_decay"]]
            groups = [
                {"params": p, "weight_decay": wd, **own} for p, wd in zip(both, sizes, strict=True)
            ]
            settings = {**settings, "weight_decay": OTHER_DECAY}  # of groups that have none
        return self.make(groups, lr=lr, **settings, **self.overrides)

    def start(self, case: Case, optimizer: Any, w: Any) -> None:
        """Give the parameter the state of a case that starts in the middle. A step of zeros makes
        the optimizer's own, in which the given values take their places."""
        given = case.state or {}
        if not given.get("step", 0) and not given.keys() & self.names.keys():
            return
        before = w.detach().clone()
        w.data.zero_()
        w.grad = self.torch.zeros_like(w)
        optimizer.step()
        w.data.copy_(before)
        self.set_step(optimizer, optimizer.state[w], given.get("step", 0))
        kept = {n: x for n, x in optimizer.state[w].items() if isinstance(x, self.torch.Tensor)}
        check_start(case, kept, self.names)
        for slot in given.keys() & self.names.keys():
            kept[self.names[slot]].copy_(self.tensor(given[slot], case))

    def set_step(self, optimizer: Any, state: dict[str, Any], step: int) -> None:
        """Set the count of steps, wherever it is."""
        for home in (state, *optimizer.param_groups):
            if "step" in home:
                old = home["step"]
                tensor = isinstance(old, self.torch.Tensor)
                home["step"] = self.torch.full_like(old, step) if tensor else type(old)(step)

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

    def slots(self, state: Mapping[str, Any], case: Case) -> dict[str, Values]:
        """The array slots by npdrt's names."""
        own = {slot: state.get(self.names[slot]) for slot in SLOTS}
        return {
            k: self.values(value) for k, value in own.items()
            if getattr(value, "shape", None) == case.w.shape
        }  # fmt: skip
