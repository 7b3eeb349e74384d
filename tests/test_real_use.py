"""Optimizers as they are used: several groups, tensors without a gradient, accumulated gradients, a
network in bfloat16; and optimizers as they are written, without a line of npdrt's protocol."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import libraries
import numpy as np
import pytest

from npdrt import optim
from npdrt.conform import Disagrees, check, recorded, targets
from npdrt.conform.adapters.load import adapted
from npdrt.conform.adapters.serve import outcome
from npdrt.conform.audit import Audit, asked_of, audit_recorded, concluded
from npdrt.conform.case import USES, Failure

CLASSES = """
import torch


class SGD(torch.optim.Optimizer):
    def __init__(self, params, lr, momentum=0.0, weight_decay=0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                self.move(p, group["lr"], group)

    def move(self, p, lr, group):
        if p.grad is None:
            return
        d = p.grad + group["weight_decay"] * p
        if group["momentum"]:
            old = self.state[p].get("momentum_buffer", torch.zeros_like(p))
            d = self.state[p]["momentum_buffer"] = group["momentum"] * old + d
        p.sub_(lr * d)


class FirstRate(SGD):
    def move(self, p, lr, group):
        super().move(p, self.param_groups[0]["lr"], group)


class FirstDecay(SGD):
    def move(self, p, lr, group):
        super().move(p, lr, {**group, "weight_decay": self.param_groups[0]["weight_decay"]})


class DefaultDecay(SGD):
    def move(self, p, lr, group):
        super().move(p, lr, {**group, "weight_decay": self.defaults["weight_decay"]})


class Zeros(SGD):
    def move(self, p, lr, group):
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        super().move(p, lr, group)


class Counted(torch.optim.Optimizer):
    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "step": 0})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            group["step"] += 1
            (b1, b2), t = group["betas"], group["step"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                if not self.state[p]:
                    zeros = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
                    self.state[p].update(zeros)
                m, v = self.state[p].values()
                m.mul_(b1).add_(p.grad, alpha=1 - b1)
                v.mul_(b2).addcmul_(p.grad, p.grad, value=1 - b2)
                p.sub_(group["lr"] * (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + group["eps"]))


class Passes(torch.optim.AdamW):
    def __init__(self, params, **others):
        super().__init__(params, **others)
"""


@pytest.fixture(scope="module")
def classes() -> dict[str, Any]:
    pytest.importorskip("torch")
    space: dict[str, Any] = {}
    exec(CLASSES, space)
    return space


def audited(optimizer: Any, rule: str) -> Audit:
    try:
        return check(optimizer, rule, formats=["float32"])
    except Disagrees as disagrees:
        return disagrees.audit


@pytest.mark.parametrize(
    ("name", "rule", "choices"),
    [
        ("SGD", "sgd", {}),
        ("FirstRate", "sgd", {"learning rate of": "the first group"}),
        ("Zeros", "sgd", {"missing gradient": "a step of zeros"}),
        ("Counted", "adam", {"missing gradient": "counted"}),
        ("Passes", "adamw", {}),
    ],
)
def test_classes_are_audited_as_they_are(
    name: str, rule: str, choices: dict[str, str], classes: dict[str, Any]
) -> None:
    found = audited(classes[name], rule)
    assert not found.failures
    assert found.finding.choices == choices
    flags = [flag for j in found.gated for flag in j.test.case.flags]
    assert all(flag in flags for flag in USES)
    assert any("LATE_STEP" in j.test.case.flags for j in found.judged) or name == "Counted"


def test_the_decay_of_another_group(classes: dict[str, Any]) -> None:
    """No clause explains it; the flag does."""
    for name, use in (("FirstDecay", "GROUPS"), ("DefaultDecay", "EXCLUSION")):
        found = audited(classes[name], "sgd")
        assert found.verdict == "unknown"
        flag, (odd, total) = next(iter(found.failing_flags().items()))
        assert (flag, odd) == (use, total)


@pytest.mark.parametrize("spec", ["torch.optim.AdamW", "optax.adamw", "optax.lamb", "optax.lars"])
def test_tensors_that_are_excluded_by_name(spec: str) -> None:
    target = libraries.find(spec)
    tests = [
        v
        for v in asked_of(target, str(target.rule), ("float32",), (False,))
        if "EXCLUSION" in v.case.flags
    ]
    assert {bool(v.case.settings["weight_decay"]) for v in tests} == {True, False}
    found = concluded(spec, {}, tests, libraries.outcomes(target, [v.case for v in tests]))
    assert not found.failures
    assert found.finding.kind in ("published", "profile", "dialect")


FORMS = """
import jax.numpy as jnp
import optax


def chained(learning_rate, b1=0.9, b2=0.999, eps=1e-8):
    return optax.chain(optax.scale_by_adam(b1, b2, eps), optax.scale(-learning_rate))


def plain(w, g, state, *, lr):
    return jnp.asarray(w) - lr * jnp.asarray(g), state
"""


def test_transformations_and_functions_of_jax(tmp_path: Path) -> None:
    pytest.importorskip("optax")
    space: dict[str, Any] = {}
    exec(FORMS, space)
    target = targets.Target("", "chained", "file", "adam", None, ("float32",), {})
    adapter = adapted(space["chained"], "chained", {})
    assert adapter.info.offers == {"betas", "eps"}
    tests = [
        v for v in asked_of(target, "adam", ("float32",), (False,)) if v.case.w.shape == (2, 3)
    ]
    tests = [v for v in tests if len(v.case.steps) < 8][:25]
    assert any(v.case.state for v in tests)
    offered = [v for v in tests if v.case.settings["weight_decay"] == 0]
    found = concluded("", {}, offered, [tuple(adapter.run(v.case)) for v in offered])
    assert found.finding.dialect is not None
    assert found.finding.dialect.name == "published"
    narrow = audited_in(space["plain"], "float64")
    assert isinstance(narrow, Failure)
    assert "jax_enable_x64" in narrow.message
    assert "--format float32" in narrow.message
    assert not isinstance(audited_in(space["plain"], "float32"), Failure)


def audited_in(function: Any, form: str) -> Any:
    """The outcome of one test of sgd."""
    target = targets.Target("", "plain", "file", "sgd", frozenset(), (form,), {})
    vector = next(iter(asked_of(target, "sgd", (form,), (False,))))
    return outcome(adapted(function, "plain", {}), vector.case)


# --- other packages, where they are installed -----------------------------------------------------


PACKAGED = [
    ("timm.optim.Lion", "published", {}),
    ("timm.optim.Lars", "timm", {"norm accumulation": "dtype"}),
    ("pytorch_optimizer.Lion", "published", {}),
    ("pytorch_optimizer.Fromage", "published", {"norm accumulation": "dtype"}),
    ("torch_optimizer.LARS", "lightning-bolts", {"norm accumulation": "dtype"}),
    ("keras.optimizers.Lion", "published", {}),
    (
        "keras.optimizers.AdamW",
        "epsilon-hat",
        {"missing gradient": "counted", "precision": "dtype"},
    ),
    ("keras.optimizers.SGD", "tensorflow", {"weight decay": "decoupled"}),
]


@pytest.mark.soak
@pytest.mark.parametrize(("spec", "dialect", "beyond"), PACKAGED)
def test_other_packages(spec: str, dialect: str, beyond: dict[str, str]) -> None:
    if importlib.util.find_spec(spec.partition(".")[0]) is None:
        pytest.skip("not installed")
    target = targets.find(spec)
    tests = list(asked_of(target, str(target.rule), ("float32",), (False,)))
    found = concluded(spec, {}, tests, libraries.outcomes(target, [v.case for v in tests]))
    assert not found.failures
    assert found.finding.dialect is not None
    assert (found.finding.dialect.name, found.finding.extra_choices) == (dialect, beyond)


# --- recordings -----------------------------------------------------------------------------------


def recording(path: Path, *, carried: bool = False) -> Path:
    """PyTorch's AdamW on float32 weights of a network that computes in bfloat16, with the gradients
    of three parts of each batch. carried: the gradients are never cleared.
    """
    torch = pytest.importorskip("torch")
    save_file = pytest.importorskip("safetensors.torch").save_file
    torch.manual_seed(3)
    master = torch.nn.Linear(4, 3, bias=False)
    optimizer = torch.optim.AdamW(master.parameters(), lr=0.1, weight_decay=0.1)
    weights, gradients = [master.weight.detach().clone()], []
    master.weight.grad = torch.zeros_like(master.weight)
    for _ in range(6):
        parts = []
        network = torch.nn.Linear(4, 3, bias=False, dtype=torch.bfloat16)
        network.weight.data.copy_(master.weight.data)
        for _ in range(3):
            x = torch.randn(5, 4, dtype=torch.bfloat16)
            (own,) = torch.autograd.grad(network(x).square().mean() / 3, network.weight)
            master.weight.grad += own.float()
            parts.append(own)
        optimizer.step()
        if not carried:
            optimizer.zero_grad(set_to_none=False)
        weights.append(master.weight.detach().clone())
        gradients.append(torch.stack(parts))
    file = path / "steps.safetensors"
    save_file({"weights": torch.stack(weights), "gradients": torch.stack(gradients)}, file)
    return file


SETTINGS = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}


def judged(file: Path) -> Audit:
    answered: list[Any] = []
    for one in recorded.load(file, lr=0.1):
        assert (one.format, one.gradients.shape) == ("float32", (6, 3, 4))
        answered += recorded.cases(one, "adamw", SETTINGS)
    return audit_recorded("steps", answered)


def test_accumulated_gradients_of_bfloat16_and_weights_of_float32(tmp_path: Path) -> None:
    assert judged(recording(tmp_path)).verdict == "agrees"
    assert judged(recording(tmp_path, carried=True)).verdict == "unknown"


# --- names that are left out, and float32 copies of bfloat16 weights ------------------------------

Arrays = dict[str, Any]
DECAYED = {"weight": 0.1, "bias": 0.0}


def master_copies(path: Path, step: Callable[[Arrays, Arrays], Arrays]) -> Path:
    """Six steps on the float32 copies of a layer in bfloat16, which gives their gradients."""
    torch = pytest.importorskip("torch")
    save_file = pytest.importorskip("safetensors.torch").save_file
    torch.manual_seed(3)
    copies = {"weight": torch.randn(3, 4), "bias": torch.randn(3)}
    found = [copies]
    gradients = []
    for _ in range(6):
        layer = torch.nn.Linear(4, 3, dtype=torch.bfloat16)
        for name, p in layer.named_parameters():
            p.data.copy_(copies[name])
        layer(torch.randn(5, 4, dtype=torch.bfloat16)).square().mean().backward()
        gradients.append({name: p.grad for name, p in layer.named_parameters()})
        given = ({n: x.float().numpy() for n, x in xs.items()} for xs in (copies, gradients[-1]))
        copies = {n: torch.tensor(x) for n, x in step(*given).items()}
        found.append(copies)
    arrays = {f"{n}/weights": torch.stack([x[n] for x in found]) for n in DECAYED}
    arrays |= {f"{n}/gradients": torch.stack([x[n] for x in gradients]) for n in DECAYED}
    save_file(arrays, path / "steps.safetensors")
    return path / "steps.safetensors"


def by_torch(**options: Any) -> Callable[[Arrays, Arrays], Arrays]:
    """torch.optim.AdamW, with a group for each name."""
    torch = pytest.importorskip("torch")
    own: Arrays = {}

    def step(copies: Arrays, gradients: Arrays) -> Arrays:
        if not own:
            own.update({n: torch.tensor(x, requires_grad=True) for n, x in copies.items()})
            groups = [{"params": [own[n]], "weight_decay": wd} for n, wd in DECAYED.items()]
            own["optimizer"] = torch.optim.AdamW(groups, lr=0.1, **options)
        for n in DECAYED:
            own[n].grad = torch.tensor(gradients[n])
        own["optimizer"].step()
        return {n: own[n].detach().numpy().copy() for n in DECAYED}

    return step


def by_optax(name: str) -> Callable[[Arrays, Arrays], Arrays]:
    """A transformation of optax, with a mask by names."""
    optax = pytest.importorskip("optax")
    make = getattr(optax, name)(
        0.1, weight_decay=0.1, mask={n: wd > 0 for n, wd in DECAYED.items()}
    )
    own: Arrays = {}

    def step(copies: Arrays, gradients: Arrays) -> Arrays:
        updates, own["state"] = make.update(gradients, own.get("state", make.init(copies)), copies)
        return {n: np.array(x) for n, x in optax.apply_updates(copies, updates).items()}

    return step


@pytest.mark.parametrize(
    ("rule", "step"),
    [
        ("adamw", lambda: by_torch(foreach=False)),
        ("adamw", lambda: by_torch(fused=True)),
        ("adamw", lambda: by_optax("adamw")),
        ("lamb", lambda: by_optax("lamb")),
    ],
)
def test_names_without_decay_and_float32_copies(rule: str, step: Any, tmp_path: Path) -> None:
    """Each tensor follows the rule with its own decay, and the bias not with that of the weight."""
    recordings = recorded.load(master_copies(tmp_path, step()), lr=0.1)
    assert {r.name for r in recordings} == {*DECAYED}
    eps = optim.RULES[rule].defaults["eps"]
    for one in recordings:
        for decay in (0.0, 0.1):
            settings = {"betas": (0.9, 0.999), "eps": eps, "weight_decay": decay}
            found = audit_recorded(one.name, recorded.cases(one, rule, settings))
            follows = found.verdict in ("agrees", "profile")  # optax: scalars in float32
            assert follows == (decay == DECAYED[one.name]), (one.name, decay, found.verdict)


def test_parts_are_added_in_their_order_and_format(tmp_path: Path) -> None:
    parts = np.array([[[1.0], [2.0**-24], [2.0**-24]], [[2.0**-24], [2.0**-24], [1.0]]], np.float32)
    weights = np.zeros((3, 1), np.float32)
    np.savez(tmp_path / "a.npz", weights=weights, gradients=parts)
    [found] = recorded.load(tmp_path / "a.npz", lr=1.0)
    assert found.gradients.tolist() == [[1.0], [1.0 + 2.0**-23]]
