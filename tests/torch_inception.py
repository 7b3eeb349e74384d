"""The Inception of 2015-12-05 in PyTorch, with the names of mseitzer's port: an oracle for
npdrt.models.inception, written from the paper's figures and the list of the port's patches."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


class Basic(nn.Module):
    """Convolution, batch normalisation of eps .001, ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: Any, stride: int = 1, padding: Any = 0):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x: Any) -> Any:
        return F.relu(self.bn(self.conv(x)))


def mean(x: Any) -> Any:
    return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)


class Block(nn.Module):
    """Units by name, and a function of them and x that returns the branches."""

    def __init__(self, branches: Any, **units: tuple[Any, ...]):
        super().__init__()
        for name, settings in units.items():
            self.add_module(name, Basic(*settings))
        self.branches = branches

    def forward(self, x: Any) -> Any:
        return torch.cat(self.branches(self, x), 1)


def block_a(n: int, pool: int) -> Block:
    return Block(
        lambda m, x: [
            m.branch1x1(x),
            m.branch5x5_2(m.branch5x5_1(x)),
            m.branch3x3dbl_3(m.branch3x3dbl_2(m.branch3x3dbl_1(x))),
            m.branch_pool(mean(x)),
        ],
        branch1x1=(n, 64, 1),
        branch5x5_1=(n, 48, 1),
        branch5x5_2=(48, 64, 5, 1, 2),
        branch3x3dbl_1=(n, 64, 1),
        branch3x3dbl_2=(64, 96, 3, 1, 1),
        branch3x3dbl_3=(96, 96, 3, 1, 1),
        branch_pool=(n, pool, 1),
    )


def block_b(n: int) -> Block:
    return Block(
        lambda m, x: [
            m.branch3x3(x),
            m.branch3x3dbl_3(m.branch3x3dbl_2(m.branch3x3dbl_1(x))),
            F.max_pool2d(x, 3, 2),
        ],
        branch3x3=(n, 384, 3, 2),
        branch3x3dbl_1=(n, 64, 1),
        branch3x3dbl_2=(64, 96, 3, 1, 1),
        branch3x3dbl_3=(96, 96, 3, 2),
    )


def block_c(n: int, c: int) -> Block:
    def branches(m: Any, x: Any) -> list[Any]:
        y = x
        for k in range(1, 6):
            y = getattr(m, f"branch7x7dbl_{k}")(y)
        seven = m.branch7x7_3(m.branch7x7_2(m.branch7x7_1(x)))
        return [m.branch1x1(x), seven, y, m.branch_pool(mean(x))]

    row, column = ((1, 7), 1, (0, 3)), ((7, 1), 1, (3, 0))
    return Block(
        branches,
        branch1x1=(n, 192, 1),
        branch7x7_1=(n, c, 1),
        branch7x7_2=(c, c, *row),
        branch7x7_3=(c, 192, *column),
        branch7x7dbl_1=(n, c, 1),
        branch7x7dbl_2=(c, c, *column),
        branch7x7dbl_3=(c, c, *row),
        branch7x7dbl_4=(c, c, *column),
        branch7x7dbl_5=(c, 192, *row),
        branch_pool=(n, 192, 1),
    )


def block_d(n: int) -> Block:
    return Block(
        lambda m, x: [
            m.branch3x3_2(m.branch3x3_1(x)),
            m.branch7x7x3_4(m.branch7x7x3_3(m.branch7x7x3_2(m.branch7x7x3_1(x)))),
            F.max_pool2d(x, 3, 2),
        ],
        branch3x3_1=(n, 192, 1),
        branch3x3_2=(192, 320, 3, 2),
        branch7x7x3_1=(n, 192, 1),
        branch7x7x3_2=(192, 192, (1, 7), 1, (0, 3)),
        branch7x7x3_3=(192, 192, (7, 1), 1, (3, 0)),
        branch7x7x3_4=(192, 192, 3, 2),
    )


def block_e(n: int, pool: Any) -> Block:
    def branches(m: Any, x: Any) -> list[Any]:
        three, double = m.branch3x3_1(x), m.branch3x3dbl_2(m.branch3x3dbl_1(x))
        pairs = [m.branch3x3_2a(three), m.branch3x3_2b(three)]
        pairs += [m.branch3x3dbl_3a(double), m.branch3x3dbl_3b(double)]
        return [m.branch1x1(x), *pairs, m.branch_pool(pool(x))]

    row, column = ((1, 3), 1, (0, 1)), ((3, 1), 1, (1, 0))
    return Block(
        branches,
        branch1x1=(n, 320, 1),
        branch3x3_1=(n, 384, 1),
        branch3x3_2a=(384, 384, *row),
        branch3x3_2b=(384, 384, *column),
        branch3x3dbl_1=(n, 448, 1),
        branch3x3dbl_2=(448, 384, 3, 1, 1),
        branch3x3dbl_3a=(384, 384, *row),
        branch3x3dbl_3b=(384, 384, *column),
        branch_pool=(n, 192, 1),
    )


class Inception(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Basic(3, 32, 3, 2)
        self.Conv2d_2a_3x3 = Basic(32, 32, 3)
        self.Conv2d_2b_3x3 = Basic(32, 64, 3, 1, 1)
        self.Conv2d_3b_1x1 = Basic(64, 80, 1)
        self.Conv2d_4a_3x3 = Basic(80, 192, 3)
        self.Mixed_5b, self.Mixed_5c = block_a(192, 32), block_a(256, 64)
        self.Mixed_5d, self.Mixed_6a = block_a(288, 64), block_b(288)
        self.Mixed_6b, self.Mixed_6c = block_c(768, 128), block_c(768, 160)
        self.Mixed_6d, self.Mixed_6e = block_c(768, 160), block_c(768, 192)
        self.Mixed_7a = block_d(768)
        self.Mixed_7b = block_e(1280, mean)
        self.Mixed_7c = block_e(2048, lambda x: F.max_pool2d(x, 3, 1, 1))
        self.fc = nn.Linear(2048, 1008)

    def forward(self, x: Any) -> Any:
        """Features of images (N, 3, H, W) in [0, 1]."""
        x = F.interpolate(x, (299, 299), mode="bilinear", align_corners=False)
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(2 * x - 1)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))
        x = F.max_pool2d(x, 3, 2)
        for name, block in self.named_children():
            if name.startswith("Mixed"):
                x = block(x)
        return x.mean((2, 3))


def random_weights(network: Inception, seed: int) -> Inception:
    """Weights with which signals of all layers keep their size; evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.7, 1.3, generator=generator)
                module.running_var.uniform_(0.7, 1.3, generator=generator)
                module.running_mean.normal_(0, 0.1, generator=generator)
                module.bias.normal_(0, 0.1, generator=generator)
    return network.eval()
