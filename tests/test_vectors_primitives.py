"""Vectors of the primitives and of training steps: complete, right for npdrt and for PyTorch,
the same at every generation, and able to see a fault."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator
from functools import cache
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import mpmath
import numpy as np
import pytest
from oracle import primitives, steps
from oracle.dual import Dual, elementwise, pull_back, rounded, variables
from oracle.primitives_case import PrimitiveCase, case, normal

from npdrt import autodiff
from npdrt.autodiff import PRIMITIVES
from npdrt.conform import encoding, vectors
from npdrt.conform.formats import FORMATS
from npdrt.conform.judge import judge_arrays
from npdrt.errors import FileRefused
from npdrt.models import MODELS

try:
    import torch
except ImportError:  # a second opinion, not a requirement
    torch = MagicMock()

F = torch.nn.functional
needs_torch = pytest.mark.skipif(isinstance(torch, MagicMock), reason="PyTorch is not installed")

MODULES: dict[str, Any] = {"primitives": primitives, "steps": steps}
TYPES = {"primitives": "Primitive", "steps": "TrainingStep"}


@cache
def groups(kind: str) -> list[dict[str, Any]]:
    """The groups of a kind, generated once."""
    return list(MODULES[kind].groups())


def every(kind: str) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Every (group, test) of a kind."""
    return ((group, test) for group in groups(kind) for test in group["tests"])


def answers(kind: str) -> Iterator[tuple[dict[str, Any], dict[str, Any], Any]]:
    return ((g, t, MODULES[kind].answer(g, t)) for g, t in every(kind))


def arrays_in(record: Any) -> Iterator[dict[str, Any]]:
    """Every array within a record."""
    if isinstance(record, dict) and "dtype" in record:
        yield record
    elif isinstance(record, dict | list):
        for item in record.values() if isinstance(record, dict) else record:
            yield from arrays_in(item)


# --- what there is -----------------------------------------------------------------------------


def test_every_reference_has_vectors() -> None:
    """A primitive that is new may wait for its reference, its cases and its vectors."""
    covered = {(g["operation"], t["cotangent"]["dtype"]) for g, t in every("primitives")}
    names = set(primitives.REFERENCES)
    assert covered == {(name, dtype) for name in names for dtype in ("float32", "float64")}
    assert names <= set(PRIMITIVES)
    for name in names:
        flags = {f for g, t in every("primitives") if g["operation"] == name for f in t["flags"]}
        assert "ORDINARY" in flags or "BROADCAST" in flags
        assert len(flags) > 1, f"{name} has no edge case"


def test_the_stored_steps_are_of_every_rule() -> None:
    stored = json.loads((vectors.FOLDER / "steps.json").read_bytes())
    assert {g["optimizer"]["rule"] for g in stored["testGroups"]} == set(steps.RULES)


def test_every_rule_and_model_has_a_step() -> None:
    assert {g["optimizer"]["rule"] for g in groups("steps")} == set(steps.RULES)
    assert {g["model"]["kind"] for g in groups("steps")} == set(steps.KINDS)
    assert {row.rule for row in steps.ROWS} == set(steps.RULES)
    assert set(steps.KINDS) - {"resnet"} <= set(MODELS)


@pytest.mark.parametrize("kind", MODULES)
def test_form(kind: str) -> None:
    tests = [t for _, t in every(kind)]
    assert [t["tcId"] for t in sorted(tests, key=lambda t: t["tcId"])] == [
        *range(1, len(tests) + 1)
    ]
    assert {f for t in tests for f in t["flags"]} == set(MODULES[kind].FLAGS)
    assert {t["result"] for t in tests} <= {"valid", "acceptable"}
    for group, test in every(kind):
        assert test["comment"]
        assert 0 <= test["tolerance"] < math.inf
        found = list(arrays_in([group, test]))
        assert found
        for a in found:
            n = math.prod(a["shape"])
            if "bits" in a:
                assert len(a["bits"]) == n * FORMATS[a["dtype"]].width // 4
            else:
                assert len(a["values"]) == n
    assert json.loads(json.dumps(groups(kind))) == groups(kind)


def test_form_of_primitives() -> None:
    for group, test in every("primitives"):
        assert set(group["settings"]) == set(
            PrimitiveCase(group["operation"], "", ()).full_settings()
        )
        n = len(test["arguments"])
        vjp = test["expected"]["vjp"]
        assert [i for i in range(n) if vjp[i] is None] == test["constant"]
        assert test["cotangent"]["shape"] == test["expected"]["value"]["shape"]
        for a, g in zip(test["arguments"], vjp, strict=True):
            assert g is None or (g["shape"], g["dtype"]) == (a["shape"], a["dtype"])


def test_comments_name_a_case() -> None:
    """They name its random numbers too."""
    names = [(row.operation, row.comment) for row in primitives.CASES]
    assert len(set(names)) == len(names)
    assert len({(row.rule, row.comment) for row in steps.ROWS}) == len(steps.ROWS)


def test_size() -> None:
    compact = [len(json.dumps(g, separators=(",", ":"))) for g in map(groups, MODULES)]
    assert sum(compact) < 1_100_000


@pytest.mark.parametrize("kind", MODULES)
def test_two_generations_are_equal(kind: str) -> None:
    assert json.dumps(MODULES[kind].groups()) == json.dumps(groups(kind))


def test_a_part_keeps_the_numbers() -> None:
    whole = [g for g in groups("primitives") if g["operation"] in ("tanh", "where")]
    assert primitives.groups({"tanh", "where"}) == whole


def test_ordinary_steps_move_every_layer() -> None:
    for _, test in every("steps"):
        if test["flags"] == ["ORDINARY"]:
            for g in test["expected"]["grads"].values():
                assert np.any(encoding.read_array(g, "") != 0)


def test_new_cases_leave_the_numbers_of_old_ones() -> None:
    rows = [case("exp", comment, normal(2)).since(2) for comment in ("new", "newer")]
    found = primitives.ordered((SimpleNamespace(CASES=rows), *primitives.TABLES))
    assert all(a is b for a, b in zip(found, [*primitives.CASES, *rows], strict=True))


# --- npdrt passes ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MODULES)
def test_npdrt_passes(kind: str) -> None:
    """Acceptable tests too: npdrt keeps to its own conventions."""
    failed = {}
    for group, test, response in answers(kind):
        error, where = judge_arrays(TYPES[kind], test, response)
        if error > 1:
            failed[where] = (group.get("operation"), test["comment"])
    assert not failed


# --- and so does PyTorch -----------------------------------------------------------------------


def reduced(function: Callable[..., Any]) -> Callable[..., Any]:
    """A reduction of PyTorch with NumPy's settings."""

    def reduction(x: Any, axis: Any, keepdims: bool, **settings: Any) -> Any:
        if axis is None:
            axis = tuple(range(x.ndim))
        return function(x, dim=axis, keepdim=keepdims, **settings)

    return reduction


def torch_cross_entropy(z: Any, labels: Any, label_smoothing: float) -> Any:
    rows = z.reshape(-1, z.shape[-1])
    return F.cross_entropy(rows, labels.reshape(-1), label_smoothing=label_smoothing)


def torch_take(x: Any, indices: Any, axis: int) -> Any:
    axis %= x.ndim
    indices = indices % x.shape[axis]
    shape = (*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :])
    return x.index_select(axis, indices.reshape(-1)).reshape(shape)


def torch_index(x: Any, index: Any) -> Any:
    """PyTorch has no negative steps."""
    return x.flip(0) if index == slice(None, None, -1) else x[index]


def torch_batch_norm(
    x: Any, *rest: Any, channel_axis: int, eps: float, statistics: tuple[Any, Any] | None = None
) -> Any:
    last = x.movedim(channel_axis, -1)
    rows, (mean, variance) = last.reshape(-1, last.shape[-1]), statistics or (None, None)
    training = statistics is None
    y = F.batch_norm(rows, mean, variance, *rest, training=training, eps=eps)
    return y.reshape(last.shape).movedim(-1, channel_axis)


def torch_batch_norm_inference(
    x: Any, mean: Any, variance: Any, *rest: Any, **settings: Any
) -> Any:
    return torch_batch_norm(x, *rest, statistics=(mean, variance), **settings)


def torch_layer_norm(x: Any, *rest: Any, axes: Any, eps: float) -> Any:
    chosen = sorted(a % x.ndim for a in ([axes] if isinstance(axes, int) else axes))
    last = list(range(-len(chosen), 0))
    y = x.movedim(chosen, last)
    return F.layer_norm(y, y.shape[last[0] :], *rest, eps=eps).movedim(last, chosen)


def torch_weight_norm(w: Any, gain: Any = None, *, eps: float) -> Any:
    rows = w.flatten(1)
    unit = (rows / (rows.square().sum(1, keepdim=True) + eps).sqrt()).reshape(w.shape)
    return unit if gain is None else unit * gain.reshape(-1, *[1] * (w.ndim - 1))


def torch_attention(
    q: Any, k: Any, v: Any, mask: Any = None, keep: Any = None, *,
    causal: bool, scale: float | None, rate: float,
) -> Any:  # fmt: skip
    """PyTorch's takes a mask or `is_causal`, and draws its own dropout."""
    if causal and mask is not None:
        mask, causal = mask & torch.ones(q.shape[-2], k.shape[-2]).tril().bool(), False
    if keep is None:
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale)
    scores = (q @ k.mT / math.sqrt(q.shape[-1])).where(mask, -math.inf)
    return (scores.softmax(-1) * keep / (1 - rate)) @ v


def torch_images(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of images (N, C, H, W) as one of (C, N, H, W)."""
    return lambda x, *rest, **settings: function(x.transpose(0, 1), *rest, **settings).transpose(
        0, 1
    )


def like(a: Any, b: Any) -> tuple[Any, Any]:
    """Both as tensors."""
    if not isinstance(a, torch.Tensor):
        a = torch.tensor(a, dtype=b.dtype)
    return a, b if isinstance(b, torch.Tensor) else torch.tensor(b, dtype=a.dtype)


TORCH: dict[str, Callable[..., Any]] = {
    "absolute": torch.abs,
    "add": torch.add,
    "attention": torch_attention,
    "average_pool": torch_images(
        lambda x, size, stride, padding: F.avg_pool2d(x, size, stride, padding)
    ),
    "batch_norm": torch_batch_norm,
    "batch_norm_inference": torch_batch_norm_inference,
    "broadcast_to": lambda x, shape: x.broadcast_to(shape),
    "clip": lambda x, low, high: x.clip(low, high),
    "concat": lambda *xs, axis: torch.cat(xs, axis),
    "conv2d": torch_images(F.conv2d),
    "divide": lambda a, b: a / b,
    "dropout": lambda x, keep=True, rate=0.0: x * keep / (1 - rate) if keep is not True else x,
    "entry_norm": lambda w, eps: w / (w * w + eps).sqrt(),
    "erf": torch.erf,
    "exp": torch.exp,
    "gather": torch_take,
    "gelu": F.gelu,
    "getitem": torch_index,
    "global_average_pool": lambda x: x.mean((2, 3)),
    "hinge": lambda s, y: F.relu(1 - y * s).mean(),
    "layer_norm": torch_layer_norm,
    "leaky_relu": lambda x, a: F.leaky_relu(x, a),
    "linear": F.linear,
    "log": torch.log,
    "log_softmax": lambda x, axis: x.log_softmax(axis),
    "logsumexp": reduced(torch.logsumexp),
    "matmul": torch.matmul,
    "max": reduced(torch.amax),
    "max_pool": torch_images(
        lambda x, size, stride, padding: F.max_pool2d(x, size, stride, padding)
    ),
    "maximum": lambda a, b: torch.maximum(*like(a, b)),
    "mean": reduced(torch.mean),
    "minimum": lambda a, b: torch.minimum(*like(a, b)),
    "multiply": torch.mul,
    "negative": torch.neg,
    "pad": lambda x, widths, value: F.pad(x, [n for w in widths[::-1] for n in w], value=value),
    "power": torch.pow,
    "relu": F.relu,
    "reshape": lambda x, shape: x.reshape(shape),
    "sigmoid": torch.sigmoid,
    "softmax": lambda x, axis: x.softmax(axis),
    "softmax_cross_entropy": torch_cross_entropy,
    "softplus": lambda x: F.softplus(x, threshold=40.0),
    "spectral_normalise": lambda w, u, v: w / (u @ w @ v),
    "sqrt": torch.sqrt,
    "squared_error": F.mse_loss,
    "subtract": lambda a, b: a - b,
    "sum": reduced(torch.sum),
    "tanh": torch.tanh,
    "transpose": lambda x, axes: x.permute(axes or tuple(reversed(range(x.ndim)))),
    "var": reduced(torch.var),
    "weight_norm": torch_weight_norm,
    "where": torch.where,
}


def torch_answer(group: dict[str, Any], test: dict[str, Any]) -> dict[str, Any]:
    arguments = [
        primitives.decode(a) if "scalar" in a else torch.tensor(encoding.read_array(a, "argument"))
        for a in test["arguments"]
    ]
    wanted = [a.requires_grad_() for i, a in enumerate(arguments) if i not in test["constant"]]
    settings = {name: primitives.decode(v) for name, v in group["settings"].items()}
    value = TORCH[group["operation"]](*arguments, **settings)
    cotangent = torch.tensor(encoding.read_array(test["cotangent"], "cotangent"))
    found = torch.autograd.grad(value, wanted, cotangent, materialize_grads=True)
    grads = iter(found)
    number = FORMATS[test["cotangent"]["dtype"]]
    return {
        "value": encoding.array(value.detach().numpy(), number),
        "vjp": [
            None if i in test["constant"] else encoding.array(next(grads).numpy(), number)
            for i in range(len(arguments))
        ],
    }


# (operation, comment) -> why PyTorch fails a gated test; it must
TORCH_FAILS = {
    ("logsumexp", "large: nothing overflows"): "its slope exp(x - y) takes y after rounding",
    ("logsumexp", "very negative: nothing underflows"): "its slope exp(x - y) takes y rounded",
    ("layer_norm", "rows nearly constant"): "its derivative has x rstd - mean rstd, which cancels",
    ("entry_norm", "a small eps"): "the quotient's rule cancels where w**2 is far above eps",
    ("entry_norm", "large"): "the quotient's rule cancels where w**2 is far above eps",
}


@needs_torch
@pytest.mark.filterwarnings("ignore:var")  # of no slices
def test_torch_passes() -> None:
    """Every test that is gated."""
    failed = {}
    for group, test in every("primitives"):
        if group["operation"] in TORCH and test["result"] == "valid":
            error, where = judge_arrays("Primitive", test, torch_answer(group, test))
            if error > 1:
                failed[where] = (group["operation"], test["comment"])
    assert set(failed.values()) == set(TORCH_FAILS), failed


PHI: dict[str, Callable[[Any], Any]] = {
    "relu": F.relu,
    "tanh": torch.tanh,
    "gelu": F.gelu,
    "sigmoid": torch.sigmoid,
    "leaky_relu": F.leaky_relu,
    "softplus": lambda z: F.softplus(z, threshold=40.0),
}


Arrays = dict[str, Any]


def torch_mlp(model: Arrays, params: Arrays, buffers: Arrays, x: Any) -> Any:
    for layer in range(model["depth"]):
        name, last = f"layers/{layer:02d}", layer == model["depth"] - 1
        z = F.linear(x, params[f"{name}/weight"], params.get(f"{name}/bias"))
        out = PHI[model["nonlinearity"]](z) if model["output_nonlinearity"] or not last else z
        x = x + out if model["residual"] and not last and x.shape == z.shape else out
    return x


def torch_affine(params: Arrays, name: str, x: Any) -> Any:
    return F.linear(x, params[f"{name}/weight"], params[f"{name}/bias"])


def torch_transformer(model: Arrays, params: Arrays, buffers: Arrays, x: Any) -> Any:
    """With PyTorch's own layer, whose masks are True where a word is not seen."""
    length, width = x.shape[0], model["width"]
    rates = torch.exp(torch.arange(0, width, 2).double() * (-math.log(10000.0) / width))
    angles = torch.arange(length)[:, None] * rates
    positions = torch.stack([angles.sin(), angles.cos()], -1).reshape(length, 1, width)
    embedding = params["embedding/weight"]
    h = F.embedding(x, embedding) * math.sqrt(width) + positions.to(embedding)
    names = {"self_attn.in_proj_": "attention/in/", "self_attn.out_proj.": "attention/out/"}
    for number in range(model["layers"]):
        layer = torch.nn.TransformerEncoderLayer(
            width, model["heads"], model["hidden"], 0.0, PHI[model["nonlinearity"]],
            norm_first=model["pre_norm"],
        )  # fmt: skip
        given = {}
        for theirs, _ in layer.named_parameters():
            ours = theirs
            for a, b in (*names.items(), (".", "/")):
                ours = ours.replace(a, b)
            given[theirs] = params[f"layers/{number:02d}/{ours}"]
        mask = torch.ones(length, length).triu(1).bool()
        h = torch.func.functional_call(layer, given, (h, mask))
    if model["pre_norm"]:
        h = F.layer_norm(h, (width,), params["norm/weight"], params["norm/bias"])
    weight = embedding if model["tied"] else params["decoder/weight"]
    return F.linear(h, weight, params["decoder/bias"])


def torch_resnet(model: Arrays, params: Arrays, buffers: Arrays, x: Any) -> Any:
    """Moves the buffers in place."""
    before = model["pre_activation"]

    def conv(name: str, h: Any, stride: int = 1) -> Any:
        weight = params[f"{name}/weight"]
        return F.conv2d(h, weight, stride=stride, padding=weight.shape[-1] // 2)

    def norm(name: str, h: Any) -> Any:
        moved = [buffers[f"{name}/running_{s}"] for s in ("mean", "var")]
        parts = [params[f"{name}/{part}"] for part in ("weight", "bias")]
        return F.batch_norm(h, *moved, *parts, training=True)

    h = conv("stem", x)
    h = h if before else norm("norm", h).relu()
    for stage, (channels, stride) in enumerate(model["stages"]):
        name = f"stages/{stage:02d}/blocks/00"
        a = norm(f"{name}/norm1", h).relu() if before else h
        skip = h
        if f"{name}/shortcut/weight" in params:
            skip = conv(f"{name}/shortcut", a, stride)
            skip = skip if before else norm(f"{name}/shortcut/norm", skip)
            if model["shortcut"] == "modified":
                first = (channels - h.shape[1] + 1) // 2
                last = channels - h.shape[1] - first
                pooled = stride * F.avg_pool2d(a, stride)
                skip = skip + F.pad(pooled, (0, 0, 0, 0, first, last))
        h = conv(f"{name}/conv1", a, stride)
        h = norm(f"{name}/norm{2 if before else 1}", h).relu()
        h = conv(f"{name}/conv2", h)
        h = h + skip if before else (norm(f"{name}/norm2", h) + skip).relu()
    return torch_affine(params, "linear", h.mean((2, 3)))


def torch_skipnet(model: Arrays, params: Arrays, buffers: Arrays, x: Any) -> Any:
    eps, hidden = model["eps"], model["hidden"]
    w = params["layers/00/weight"]
    z = x @ (w * (w * w + eps).rsqrt()).T
    for layer in range(1, model["depth"]):
        u, v, c = (params[f"layers/{layer:02d}/{n}"] for n in ("outer", "inner", "bias"))
        u, v = (torch_weight_norm(m, eps=eps) for m in (u, v))
        kappa = (1 - model["delta"]) / math.sqrt(len(u) * hidden)
        z = z[:, : len(u)] + kappa * torch.tanh(z @ v.T + c.T) @ u.T
    return z


TORCH_MODELS = {"mlp": torch_mlp, "transformer": torch_transformer, "resnet": torch_resnet,
                "skipnet": torch_skipnet}  # fmt: skip


def torch_optimizer(params: list[Any], rule: str, lr: float, settings: dict[str, Any]) -> Any:
    """Of the rules that PyTorch has; None for others."""
    if rule == "sgd":
        return torch.optim.SGD(params, lr=lr, **settings)
    if rule == "adam":
        decoupled = settings.pop("decoupled")
        return (torch.optim.AdamW if decoupled else torch.optim.Adam)(params, lr=lr, **settings)
    return None


def torch_step(group: dict[str, Any], test: dict[str, Any]) -> dict[str, Any]:
    """PyTorch's answer; the expected parameters where it has not got the rule."""
    params = {
        name: torch.tensor(encoding.read_array(w, name)).requires_grad_()
        for name, w in test["params"].items()
    }
    buffers = {
        name: torch.tensor(encoding.read_array(a, name))
        for name, a in test.get("buffers", {}).items()
    }
    x, y = (torch.tensor(encoding.read_array(test[name], name)) for name in "xy")
    optimizer = torch_optimizer(
        list(params.values()),
        group["optimizer"]["rule"],
        encoding.unhexed(group["optimizer"]["lr"]),
        encoding.settings_from(group["optimizer"]["settings"]),
    )
    logits = TORCH_MODELS[group["model"]["kind"]](group["model"], params, buffers, x)
    loss = F.cross_entropy(logits.flatten(0, -2), y.flatten())
    loss.backward()
    number = FORMATS[str(loss.dtype).removeprefix("torch.")]
    grads = {n: encoding.array(w.grad.numpy(), number) for n, w in params.items()}
    new = test["expected"]["params"]
    if optimizer is not None:
        optimizer.step()
        new = {n: encoding.array(w.detach().numpy(), number) for n, w in params.items()}
    moved = {n: encoding.array(a.numpy(), number) for n, a in buffers.items()}
    loss = encoding.array(loss.item(), number)
    return {"loss": loss, "grads": grads, "params": new, "buffers": moved}


@needs_torch
def test_torch_passes_the_steps() -> None:
    for group, test in every("steps"):
        error, where = judge_arrays("TrainingStep", test, torch_step(group, test))
        assert error <= 1, (error, where)


# --- faults are seen ---------------------------------------------------------------------------


def faulty_tanh(x: Any) -> Any:
    y = np.tanh(x)
    return y, lambda g: g * (1.0 - y)


def faulty_multiply(a: Any, b: Any) -> Any:
    return a * b, (lambda g: g * b, lambda g: g * a * np.float32(1 + 2e-6))


def unshifted_softmax(x: Any, *, axis: int) -> Any:
    y = np.exp(x) / np.exp(x).sum(axis=axis, keepdims=True)
    return y, lambda g: y * (g - (g * y).sum(axis=axis, keepdims=True))


def relu_of_nan(x: Any) -> Any:
    return np.where(x > 0, x, x.dtype.type(0)), lambda g: g * (x > 0)


def naive_softplus(x: Any) -> Any:
    return np.log(1 + np.exp(x)), lambda g: g / (1 + np.exp(-x))


def naive_sigmoid(x: Any) -> Any:
    y = np.exp(x) / (1 + np.exp(x))
    return y, lambda g: g * y * (1 - y)


def coarse_log(x: Any) -> Any:
    return (np.log(x) * (1 + 8 * np.finfo(x.dtype).eps)).astype(x.dtype), lambda g: g / x


def detached_batch_norm(
    x: Any, gain: Any = None, bias: Any = None, *, channel_axis: int, eps: float
) -> Any:
    """The statistics as constants."""
    shape = [1] * x.ndim
    shape[channel_axis] = -1
    axes = tuple(a for a in range(x.ndim) if a != channel_axis % x.ndim)
    centred = x - x.mean(axis=axes, keepdims=True)
    inverse = 1 / np.sqrt((centred * centred).mean(axis=axes, keepdims=True) + eps)
    scale = inverse if gain is None else inverse * gain.reshape(shape)
    y = centred * scale + (0 if bias is None else bias.reshape(shape))
    return y, (
        lambda g: g * scale,
        lambda g: (g * centred * inverse).sum(axis=axes),
        lambda g: g.sum(axis=axes),
    )


def unscaled_dropout(x: Any, keep: Any = None, *, rate: float) -> Any:
    keep = np.ones((), x.dtype) if keep is None else keep.astype(x.dtype)
    factor = 1.0 if keep.shape == () else 1 / (1 - rate)
    return x * keep * factor, (lambda g: g * keep, None)


PLANTED = {  # operation -> (a fault, the flag of a test that must see it)
    "tanh": (faulty_tanh, "ORDINARY"),
    "multiply": (faulty_multiply, "BROADCAST"),
    "softmax": (unshifted_softmax, "LARGE_LOGITS"),
    "relu": (relu_of_nan, "NAN"),
    "softplus": (naive_softplus, "OVERFLOW"),
    "sigmoid": (naive_sigmoid, "OVERFLOW"),
    "log": (coarse_log, "ORDINARY"),
    "batch_norm": (detached_batch_norm, "BROADCAST"),
    "dropout": (unscaled_dropout, "ORDINARY"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_fault_fails(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fault, flag = PLANTED[name]
    monkeypatch.setitem(PRIMITIVES, name, PRIMITIVES[name])  # put back what `primitive` replaces
    fault.__name__ = name
    autodiff.primitive(fault)
    failed = {
        flag
        for group, test in every("primitives")
        if group["operation"] == name
        and judge_arrays("Primitive", test, primitives.answer(group, test))[0] > 1
        for flag in test["flags"]
    }
    assert flag in failed


def changed(response: Any, name: str, change: Callable[[Any], Any]) -> Any:
    """A copy of a response with an array changed; name: "value", "vjp 0", "grads w", ..."""
    response = copy.deepcopy(response)
    kind, *item = name.split()
    holder: Any = response[kind] if item else response
    key: Any = (int(item[0]) if item[0].isdigit() else item[0]) if item else kind
    record = holder[key]
    values = change(encoding.read_array(record, name))
    holder[key] = encoding.array(values, FORMATS[record["dtype"]])
    return response


def find(kind: str, comment: str, **wanted: Any) -> tuple[Any, Any]:
    return next(
        (group, test)
        for group, test in every(kind)
        if test["comment"] == comment and all(group[k] == v for k, v in wanted.items())
    )


@pytest.mark.parametrize("name", ["value", "vjp 0", "vjp 1", "vjp 2"])
@pytest.mark.parametrize(
    "change",
    [lambda a: a * (1 + 1e-5), lambda a: -a, lambda a: a * np.nan, lambda a: a[..., :-1]],
    ids=["scaled", "negated", "NaN", "cut"],
)
def test_a_changed_array_fails(name: str, change: Callable[[Any], Any]) -> None:
    group, test = find("primitives", "with a bias", operation="linear")
    response = primitives.answer(group, test)
    assert judge_arrays("Primitive", test, response)[0] <= 1
    error, where = judge_arrays("Primitive", test, changed(response, name, change))
    assert error > 1
    assert name in where


@pytest.mark.parametrize("name", ["loss", "grads layers/00/weight", "params layers/02/weight"])
def test_a_changed_step_fails(name: str) -> None:
    group, test = find("steps", "three layers")
    response = steps.answer(group, test)
    error, where = judge_arrays(
        "TrainingStep", test, changed(response, name, lambda a: a * 1.00001)
    )
    assert error > 1
    assert name in where


@pytest.mark.parametrize("part", ["running_mean", "running_var"])
def test_a_changed_buffer_fails(part: str) -> None:
    group, test = find("steps", "residual net")
    response = steps.answer(group, test)
    name = f"buffers stages/01/blocks/00/norm1/{part}"
    error, where = judge_arrays("TrainingStep", test, changed(response, name, lambda a: a * 1.0001))
    assert error > 1
    assert name in where
    del response["buffers"]
    with pytest.raises(FileRefused, match="expected buffers; got None"):
        judge_arrays("TrainingStep", test, response)


def test_what_is_not_finite_must_match() -> None:
    group, test = find("primitives", "infinite", operation="exp")  # [0, inf] and [0, inf]
    response = primitives.answer(group, test)
    assert judge_arrays("Primitive", test, response) == (
        0.0, f"test {test['tcId']}, value[0]: np.float64(0.0) for np.float64(0.0)"
    )  # fmt: skip
    for wrong in (math.nan, -math.inf, 1e30):
        for name in ("value", "vjp 0"):
            other = changed(response, name, lambda a, w=wrong: np.array([0, w], a.dtype))
            assert judge_arrays("Primitive", test, other)[0] == math.inf


def test_the_sign_of_zero_is_not_looked_at() -> None:
    group, test = find("primitives", "infinite", operation="exp")
    response = primitives.answer(group, test)
    other = changed(response, "value", lambda a: np.array([-0.0, math.inf], a.dtype))
    assert judge_arrays("Primitive", test, other)[0] <= 1


MALFORMED: dict[str, Callable[[Any], Any]] = {
    "expected a value and 1 vjps; got None": lambda r: None,
    "expected a value and 1 vjps; got {'value'": lambda r: {"value": r["value"]},
    "expected a value and 1 vjps; got {'value': 1, 'vjp'": lambda r: {"value": 1, "vjp": []},
    r"value: expected an array; got \[1\.0\]": lambda r: {**r, "value": [1.0]},
    "vjp 0: expected an array; got None": lambda r: {**r, "vjp": [None]},
    "value: expected an array; got .*float8": lambda r: {**r, "value": {**r["value"],
                                                                        "dtype": "float8"}},
    "bit patterns": lambda r: {**r, "value": {**r["value"], "bits": "xyz"}},
    "elements do not fill": lambda r: {**r, "value": {**r["value"], "shape": [7]}},
    r"elements do not fill the shape \[-1\]": lambda r: {**r, "value": {**r["value"],
                                                                         "shape": [-1]}},
}  # fmt: skip


@pytest.mark.parametrize("message", MALFORMED)
def test_a_malformed_response_is_refused(message: str) -> None:
    group, test = find("primitives", "ordinary values", operation="tanh")
    response = MALFORMED[message](primitives.answer(group, test))
    with pytest.raises(FileRefused, match=message):
        judge_arrays("Primitive", test, response)


def test_a_malformed_step_is_refused() -> None:
    group, test = find("steps", "three layers")
    with pytest.raises(FileRefused, match=r"expected a loss, grads and params; got \[\]"):
        judge_arrays("TrainingStep", test, [])
    response = steps.answer(group, test)
    del response["grads"]["layers/00/weight"]
    with pytest.raises(FileRefused, match=r"expected grads of layers/00/weight, .*; got layers/01"):
        judge_arrays("TrainingStep", test, response)


def test_another_dtype_is_an_error() -> None:
    group, test = find("primitives", "ordinary values", operation="tanh")  # float32
    response = primitives.answer(group, test)
    values = encoding.read_array(response["value"], "value")
    other = {**response, "value": encoding.array(values, FORMATS["float64"])}
    error, where = judge_arrays("Primitive", test, other)
    assert error == math.inf
    assert "value: float64(3, 4) for float32(3, 4)" in where


# --- the reference itself ----------------------------------------------------------------------

SMOOTH = ("erf", "exp", "gelu", "log", "sigmoid", "softplus", "sqrt", "tanh")


@pytest.mark.parametrize("name", SMOOTH)
@pytest.mark.parametrize("at", [0.25, 1.0, 3.5, 12.0])
def test_slopes_against_differences(name: str, at: float) -> None:
    """mpmath's numerical derivative of the reference's own value."""
    m = mpmath
    with m.workdps(300):

        def value(x: Any) -> Any:
            return primitives.REFERENCES[name].value(np.array([Dual(x)]))[0].value

        y = primitives.REFERENCES[name].value(variables(np.array([at]), "x"))
        slope = pull_back(y, np.ones(1), "x", (1,))[0][0]
        assert abs(slope - m.diff(value, at)) <= 1e-25 * abs(slope)


def test_dual_arithmetic() -> None:
    x, y = (variables(np.array([v]), v)[0] for v in (3.0, 5.0))
    z = (2 - x) * y / (x + 1) - -y / 4 + 7 / y
    with mpmath.workdps(30):
        assert float(z.value) == pytest.approx(-1.25 + 1.25 + 1.4)
        assert float(z.slopes[3.0, 0]) == pytest.approx(5 * -3 / 16)
        assert float(z.slopes[5.0, 0]) == pytest.approx(-0.25 + 0.25 - 7 / 25)


def test_a_condition_says_how_much_cancels() -> None:
    square = elementwise(lambda x: x * x, lambda x: 2 * x)
    y = square(np.broadcast_to(variables(np.array([3.0]), "x"), (2,)))
    slope, condition = pull_back(y, np.array([1.0, -0.5]), "x", (1,))
    assert (float(slope[0]), float(condition)) == (3.0, 3.0)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_rounding(dtype: str) -> None:
    """To nearest even, subnormals and overflow too."""
    number, m = FORMATS[dtype], mpmath
    ulp = number.ulp(1.0).item()
    with m.workdps(400):
        cases = {
            1 + m.mpf(ulp) / 2: 1.0,
            1 + 3 * m.mpf(ulp) / 2: 1 + 2 * ulp,
            m.mpf(number.smallest) / 2: 0.0,
            m.mpf(number.smallest) * 3 / 2: 2 * number.smallest,
            -m.mpf(number.smallest) * m.mpf("0.51"): -number.smallest,
            m.mpf(number.smallest_normal) * (1 - m.mpf(2) ** -60): number.smallest_normal,
            m.mpf(number.largest) * (1 + m.mpf(2) ** -60): number.largest,
            m.mpf(number.largest) * 2: math.inf,
            -(m.mpf(10) ** 500): -math.inf,
            m.exp(-(m.mpf(10) ** 30)): 0.0,
            m.inf: math.inf,
        }
        assert rounded(list(cases), number).tolist() == list(cases.values())
        assert np.isnan(rounded([m.nan], number)).all()
        x = np.random.default_rng(0).standard_normal(200) * 10.0 ** np.arange(-50, 50, 0.5)
        assert np.array_equal(rounded(x, number), number.round(x))
