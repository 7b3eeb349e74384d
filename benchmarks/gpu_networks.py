"""The networks of gpu.py: a training step of npdrt, and the same network in PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import resnet
import transformer

from npdrt import arrays, optim
from npdrt.models import MODELS
from npdrt.random import Random
from npdrt.train.step import State, Task, make_step

# So small that rounding does not part the libraries in a few steps; sgd has momentum 0.9.
RATES = {"fromage": 1e-5, "sgd": 1e-5, "adam": 1e-7}
SETTINGS = {"sgd": {"momentum": 0.9}}
Loss = Callable[[], Any]


@dataclass(frozen=True, eq=False)
class Network:
    """A model, a batch and a rule. torch: from PyTorch, the first weights, x and y, the tensors to
    train and a function that computes their loss."""

    name: str
    model: Any
    classes: int
    x: Any
    y: Any
    rule: str
    torch: Callable[[Any, dict[str, Any], Any, Any], tuple[list[Any], Loss]]
    clip: float | None = None

    def step(self, device: str = "cuda") -> tuple[Callable[..., Any], list[Any]]:
        """The step of `npdrt train`, and its first arguments (no `Random`), on the device."""
        optimizer = optim.RULES[self.rule](lr=RATES[self.rule], **SETTINGS.get(self.rule, {}))
        task = Task(self.model, self.classes, clip=self.clip)
        params = self.model.init(seed=0, device=device)
        state = State(params, task.buffers(0, device, "float32"), optimizer.init(params))
        batch = [arrays.to_device(a, device) for a in (self.x, self.y)]
        return make_step(task, optimizer), [state, *batch, RATES[self.rule]]

    def in_torch(self, torch: Any, device: str = "cuda") -> tuple[list[Any], Loss]:
        """The tensors and the loss in PyTorch, from the same weights and batch."""
        x, y = (torch.tensor(a, device=device) for a in (self.x, self.y))
        return self.torch(torch, self.model.init(seed=0), x, y)


# --- the perceptron -------------------------------------------------------------------------------


def perceptron(depth: int, rule: str, width: int = 784, batch: int = 250) -> Network:
    """`depth` layers without bias, ReLU, on rows of `width` numbers, 10 classes."""
    model = MODELS["mlp"](depth=depth, width=width, inputs=width, outputs=10)
    x = Random(0, "benchmark/x").normal((batch, width)).astype(np.float32)
    y = (Random(0, "benchmark/y").words(batch) % 10).astype(np.int64)
    return Network(f"perceptron, L = {depth}", model, 10, x, y, rule, _perceptron)


def _perceptron(torch: Any, params: dict[str, Any], x: Any, y: Any) -> tuple[list[Any], Loss]:
    weights = [torch.tensor(w, device=x.device, requires_grad=True) for w in params.values()]

    def loss() -> Any:
        h = x
        for w in weights:
            z = torch.nn.functional.linear(h, w)
            h = torch.relu(z)
        return torch.nn.functional.cross_entropy(z, y)

    return weights, loss


# --- ResNet-18 ------------------------------------------------------------------------------------


def resnet18(batch: int = 128, width: int = 64) -> Network:
    """The pre-activation ResNet-18 on CIFAR's sizes, SGD."""
    model, (x, y) = MODELS["resnet18"](outputs=10, width=width), resnet.data(batch)
    return Network(f"ResNet-18, batch {batch}", model, 10, x, y, "sgd", _resnet18)


def _resnet18(torch: Any, params: dict[str, Any], x: Any, y: Any) -> tuple[list[Any], Loss]:
    F = torch.nn.functional
    tensors = {n: torch.tensor(w, device=x.device, requires_grad=True) for n, w in params.items()}
    statistics: dict[str, Any] = {}

    class Operations:
        conv = staticmethod(lambda x, w, stride, pad: F.conv2d(x, w, None, stride, pad))
        relu = staticmethod(torch.relu)
        mean = staticmethod(lambda h: h.mean((2, 3)))

        @staticmethod
        def norm(h: Any, name: str, p: Any) -> Any:
            gain, bias = p[f"{name}/weight"], p[f"{name}/bias"]
            mean, var = statistics[name]
            return F.batch_norm(h, mean, var, gain, bias, True, resnet.MOMENTUM, resnet.EPS)

    for name, w in tensors.items():
        if "/norm" in name and name.endswith("/weight"):
            statistics[name.removesuffix("/weight")] = torch.zeros_like(w), torch.ones_like(w)
    return [*tensors.values()], lambda: F.cross_entropy(resnet.forward(Operations, tensors, x), y)


# --- the language model ---------------------------------------------------------------------------


def language_model(batch: int = 20) -> Network:
    """The WikiText-2 transformer with dropout and clipped gradients, SGD."""
    model, words = transformer.model_of(transformer.DROPOUT), transformer.WORDS
    name = f"transformer, {batch} streams"
    return Network(name, model, words, *transformer.data(batch), "sgd", _language_model, 0.25)


def _language_model(torch: Any, params: dict[str, Any], x: Any, y: Any) -> tuple[list[Any], Loss]:
    model = transformer.torch_model(params, transformer.DROPOUT).to(x.device)
    model.positions, model.mask = model.positions.to(x.device), model.mask.to(x.device)
    cross_entropy, labels = torch.nn.functional.cross_entropy, y.view(-1)
    return [*model.parameters()], lambda: cross_entropy(model(x).view(len(labels), -1), labels)


# --- the updates of PyTorch -----------------------------------------------------------------------


def torch_update(torch: Any, weights: list[Any], network: Network) -> Callable[[], Any]:
    """PyTorch's own SGD and fused Adam, Fromage by hand; after the gradients are clipped."""
    lr = RATES[network.rule]

    @torch.no_grad()
    def fromage() -> None:
        for w in weights:
            w.sub_(w.grad * (lr * w.norm() / w.grad.norm())).div_(math.sqrt(1 + lr * lr))

    if network.rule == "fromage":
        return fromage
    if network.rule == "adam":
        return torch.optim.Adam(weights, lr=lr, fused=True).step
    step = torch.optim.SGD(weights, lr=lr, momentum=0.9, fused=True).step
    if network.clip is None:
        return step

    def clipped() -> None:
        torch.nn.utils.clip_grad_norm_(weights, network.clip)
        step()

    return clipped
