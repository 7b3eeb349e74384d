"""The adversarial network of Bernstein et al. 2020 in PyTorch, written from its tables: one step of
the discriminator and one of the generator, for npdrt's parameters by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

GENERATOR = ((4, 4), (4, 2), (2, 1))  # channels of the blocks, in widths
DISCRIMINATOR = ((0, 1, True), (1, 2, True), (2, 4, True), (4, 4, False))  # and whether they halve


class Twin:
    """Parameters that require gradients, and buffers that forward passes replace, by name."""

    def __init__(self, params: Mapping[str, Any], buffers: Mapping[str, Any], dtype: Any):
        self.params = {n: torch.tensor(v, dtype=dtype) for n, v in params.items()}
        self.buffers = {n: torch.tensor(v, dtype=dtype) for n, v in buffers.items()}
        for value in self.params.values():
            value.requires_grad_(True)

    # --- layers ---------------------------------------------------------------------------

    def weight(self, name: str, train: bool) -> Any:
        """The raw weight over sigma; a power iteration a training pass."""
        w = self.params[f"{name}/weight"]
        with torch.no_grad():
            matrix, u = w.flatten(1), self.buffers[f"{name}/u"]
            v = F.normalize(matrix.T @ u, dim=0, eps=1e-12)
            if train:
                u = F.normalize(matrix @ v, dim=0, eps=1e-12)
                self.buffers[f"{name}/u"] = u
        return w / (u @ (w.flatten(1) @ v))

    def conv(self, name: str, x: Any, train: bool) -> Any:
        w = self.weight(name, train)
        return F.conv2d(x, w, self.params[f"{name}/bias"], padding=w.shape[-1] // 2)

    def linear(self, name: str, x: Any, train: bool) -> Any:
        return F.linear(x, self.weight(name, train), self.params[f"{name}/bias"])

    def norm(self, name: str, x: Any, train: bool, momentum: float, *affine: Any) -> Any:
        mean, var = (self.buffers[f"{name}/running_{kind}"] for kind in ("mean", "var"))
        mean, var = mean.clone(), var.clone()
        y = F.batch_norm(x, mean, var, *affine, training=train, momentum=momentum, eps=1e-5)
        self.buffers |= {f"{name}/running_mean": mean, f"{name}/running_var": var}
        return y

    def conditional(self, name: str, x: Any, c: Any, train: bool) -> Any:
        gamma = self.linear(f"{name}/gain", c, train)[:, :, None, None]
        beta = self.linear(f"{name}/shift", c, train)[:, :, None, None]
        return self.norm(name, x, train, 0.001) * (1 + gamma) + beta

    def attention(self, name: str, x: Any, train: bool) -> Any:
        n, c, h, w = x.shape
        query = self.conv(f"{name}/query", x, train).reshape(n, c // 8, h * w)
        key = F.max_pool2d(self.conv(f"{name}/key", x, train), 2).reshape(n, c // 8, h * w // 4)
        value = F.max_pool2d(self.conv(f"{name}/value", x, train), 2).reshape(n, c // 2, h * w // 4)
        share = torch.softmax(torch.einsum("ncq,nck->nqk", query, key), -1)
        y = torch.einsum("nck,nqk->ncq", value, share).reshape(n, c // 2, h, w)
        return self.params[f"{name}/gate"] * self.conv(f"{name}/output", y, train) + x

    # --- networks -------------------------------------------------------------------------

    def generate(self, noise: Any, labels: Any, train: bool = True) -> Any:
        """Images (N, channels, side, side)."""
        z = noise.split(20, 1)
        rows = F.one_hot(labels, 1000).to(noise.dtype)
        e = self.linear("generator/classes", rows, train)
        h = self.linear("generator/stem", z[0], train)
        channels = self.params["generator/blocks/00/conv1/weight"].shape[1]
        side = round((h.shape[1] / channels) ** 0.5)
        h = h.reshape(len(noise), channels, side, side)
        for i, (a, b) in enumerate(GENERATOR):
            h = self.attention("generator/attention", h, train) if i == 2 else h
            h = self.up(f"generator/blocks/0{i}", h, torch.cat([e, z[i + 1]], 1), a != b, train)
        gain, bias = (self.params[f"generator/norm/{name}"] for name in ("weight", "bias"))
        h = self.norm("generator/norm", h, train, 0.1, gain, bias)
        return torch.tanh(self.conv("generator/head", F.relu(h), train))

    def up(self, name: str, x: Any, c: Any, changes: bool, train: bool) -> Any:
        h = F.relu(self.conditional(f"{name}/norm1", x, c, train))
        h = self.conv(f"{name}/conv1", F.interpolate(h, scale_factor=2, mode="nearest"), train)
        h = F.relu(self.conditional(f"{name}/norm2", h, c, train))
        skip = F.interpolate(x, scale_factor=2, mode="nearest")
        skip = self.conv(f"{name}/skip", skip, train) if changes else skip
        return self.conv(f"{name}/conv2", h, train) + skip

    def discriminate(self, x: Any, labels: Any, train: bool = True) -> Any:
        """Scores (N,)."""
        for i, (a, b, halve) in enumerate(DISCRIMINATOR):
            x = self.attention("discriminator/attention", x, train) if i == 2 else x
            x = self.down(f"discriminator/blocks/0{i}", x, i == 0, halve, a != b, train)
        h = F.relu(x).mean((2, 3))
        table = self.weight("discriminator/classes", train)
        projected = (h * F.embedding(labels, table)).sum(1)
        return 10 * (self.linear("discriminator/linear", h, train)[:, 0] + projected)

    def down(self, name: str, x: Any, first: bool, halve: bool, changes: bool, train: bool) -> Any:
        h = self.conv(f"{name}/conv1", x if first else F.relu(x), train)
        h = self.conv(f"{name}/conv2", F.relu(h), train)
        skip = self.conv(f"{name}/skip", x, train) if changes or halve else x
        return F.avg_pool2d(h, 2) + F.avg_pool2d(skip, 2) if halve else h + skip

    # --- a step ---------------------------------------------------------------------------

    def discriminator_loss(self, images: Any, labels: Any, noise: Any) -> Any:
        """The authors' loss; npdrt's is larger by the constant 2."""
        with torch.no_grad():  # the authors do not, and clear the generator's gradients instead
            images_made = self.generate(noise, labels)
        fake = self.discriminate(images_made, labels)
        real = self.discriminate(images, labels)
        return fake.clamp(min=-1).mean() - real.clamp(max=1).mean()

    def generator_loss(self, labels: Any, noise: Any) -> Any:
        return -self.discriminate(self.generate(noise, labels), labels).mean()

    def gradients(self, network: str, loss: Any) -> dict[str, Any]:
        """Of the parameters of one network; the gradients of both are cleared."""
        loss.backward()
        own = {n: p for n, p in self.params.items() if n.startswith(network)}
        found = {n: p.grad for n, p in own.items()}
        for p in self.params.values():
            p.grad = None
        return found

    @torch.no_grad()
    def descend(self, grads: Mapping[str, Any], lr: float) -> None:
        """Plain gradient descent."""
        for name, g in grads.items():
            self.params[name] -= lr * g

    def step(self, images: Any, labels: Any, noises: Any, lr: float) -> tuple[list[float], Any]:
        """One update of each network; the two losses, and all gradients by name."""
        judged = self.discriminator_loss(images, labels, noises[0])
        grads = self.gradients("discriminator/", judged)
        self.descend(grads, lr)
        fooled = self.generator_loss(labels, noises[1])
        made = self.gradients("generator/", fooled)
        self.descend(made, lr)
        return [judged.item(), fooled.item()], {**grads, **made}

    def lay_out(self, form: Any) -> None:
        """Keep kernels in a memory format of PyTorch."""
        for name, value in self.params.items():
            if value.ndim == 4:
                laid_out = value.detach().to(memory_format=form)
                self.params[name] = laid_out.requires_grad_(True)
