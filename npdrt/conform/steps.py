"""Vectors of one training step of a small network: loss, gradients, and parameters after it.

The loss is the mean softmax cross-entropy of the logits, in nats. The reference runs the forward
pass, its derivative and the first update of the rule from a fresh state in 400 digits
(`npdrt.conform.dual`), with the exact gradient, and rounds each array once.

`ROWS` is the table, a line a test; `FORWARDS` has a reference for every kind of model, `UPDATES`
for every rule.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from npdrt import ops
from npdrt.arrays import Params, quiet
from npdrt.autodiff import value_and_grad
from npdrt.conform.dual import DIGITS, constants, fill, mpmath, pull_back, rounded, variables
from npdrt.conform.formats import FORMATS, Format
from npdrt.conform.primitives import (
    DTYPES,
    REFERENCES,
    SEED,
    Json,
    array,
    linear,
    read_array,
    shown,
    worst,
)
from npdrt.conform.vectors import hexed, settings_from, settings_json, unhexed
from npdrt.errors import FileRefused
from npdrt.models import MODELS
from npdrt.optim import RULES
from npdrt.random import Random

TITLE = "One training step of small networks: loss, gradients, new parameters"
NOTES = {
    "ORDINARY": {"bugType": "BASIC", "description": "random parameters, a fresh optimizer state"},
    "ZERO_PARAMETER": {"bugType": "EDGE_CASE", "description": "biases that start at 0"},
    "ZERO_GRADIENT": {"bugType": "EDGE_CASE", "description": "a layer without any gradient"},
    "LARGE_LOGITS": {"bugType": "EDGE_CASE", "description": "exp of a logit would overflow"},
}
BATCH = 4

# --- the table -------------------------------------------------------------------------------

PLAIN: dict[str, Any] = {
    "depth": 3, "width": 3, "inputs": 4, "outputs": 2, "bias": False, "nonlinearity": "relu",
    "output_nonlinearity": False, "residual": False,
}  # fmt: skip
TANH = {**PLAIN, "depth": 2, "inputs": 3, "outputs": 3, "bias": True, "nonlinearity": "tanh"}
RESIDUAL = {**PLAIN, "inputs": 3, "bias": True, "residual": True}
OUTPUT = {**PLAIN, "depth": 2, "width": 5, "nonlinearity": "leaky_relu",
          "output_nonlinearity": True}  # fmt: skip
GELU = {**PLAIN, "depth": 2, "nonlinearity": "gelu"}
SIGMOID = {**PLAIN, "depth": 2, "bias": True, "nonlinearity": "sigmoid"}
SOFTPLUS = {**PLAIN, "depth": 2, "nonlinearity": "softplus"}

SGD = {"momentum": 0.0, "dampening": 0.0, "nesterov": False, "weight_decay": 0.0}
MOMENTUM = {**SGD, "momentum": 0.9, "dampening": 0.5}
NESTEROV = {**SGD, "momentum": 0.9, "nesterov": True, "weight_decay": 0.125}
ADAM = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "decoupled": False}
ADAM_L2 = {**ADAM, "weight_decay": 0.125}
ADAM_W = {**ADAM_L2, "decoupled": True}
LARS = {"momentum": 0.9, "weight_decay": 0.0, "trust_coefficient": 0.001, "eps": 0.0}
LARS_DECAY = {**LARS, "weight_decay": 0.125, "trust_coefficient": 0.02, "eps": 1e-8}
FROMAGE = {"norm_bound": None}
BOUNDED = {"norm_bound": 0.5}


@dataclass(frozen=True)
class Row:
    """A test in every format.

    comment: unique. model: settings of the kind. rule, settings, lr: the optimizer. scales: the
    standard deviation of a parameter by its last name or layer ("bias", "layers/00"), else 3/4.
    """

    comment: str
    model: dict[str, Any]
    rule: str
    settings: dict[str, Any]
    lr: float
    flag: str = "ORDINARY"
    scales: tuple[tuple[str, float], ...] = ()
    kind: str = "mlp"


ROWS = (
    Row("three layers", PLAIN, "sgd", SGD, 0.5),
    Row("momentum: the first velocity is the gradient", TANH, "sgd", MOMENTUM, 0.25),
    Row("Nesterov momentum, decay", RESIDUAL, "sgd", NESTEROV, 0.25),
    Row("logits far apart", PLAIN, "sgd", SGD, 0.01, "LARGE_LOGITS", (("layers/02", 500.0),)),
    Row("gelu", GELU, "sgd", SGD, 0.5),
    Row("softplus", SOFTPLUS, "sgd", SGD, 0.5),
    Row("three layers", PLAIN, "adam", ADAM, 0.01),
    Row("decay in the gradient", TANH, "adam", ADAM_L2, 0.125),
    Row("decoupled decay", SIGMOID, "adam", ADAM_W, 0.125),
    Row("a layer that never fires", PLAIN, "adam", ADAM, 0.01, "ZERO_GRADIENT",
        (("layers/00", -1.0),)),
    Row("three layers", PLAIN, "lars", LARS, 1.0),
    Row("decay", TANH, "lars", LARS_DECAY, 0.5),
    Row("biases of 0", TANH, "lars", LARS_DECAY, 0.5, "ZERO_PARAMETER", (("bias", 0.0),)),
    Row("a layer that never fires", PLAIN, "lars", LARS, 1.0, "ZERO_GRADIENT",
        (("layers/00", -1.0),)),
    Row("three layers", PLAIN, "fromage", FROMAGE, 0.01),
    Row("weights and biases", TANH, "fromage", FROMAGE, 0.125),
    Row("residual layers", RESIDUAL, "fromage", FROMAGE, 0.125),
    Row("nonlinear output", OUTPUT, "fromage", FROMAGE, 0.5),
    Row("norms bounded", PLAIN, "fromage", BOUNDED, 0.125),
    Row("biases of 0", TANH, "fromage", FROMAGE, 0.125, "ZERO_PARAMETER", (("bias", 0.0),)),
    Row("a layer that never fires", PLAIN, "fromage", FROMAGE, 0.125, "ZERO_GRADIENT",
        (("layers/00", -1.0),)),
    Row("logits far apart and wrong", PLAIN, "fromage", FROMAGE, 0.125, "LARGE_LOGITS",
        (("layers/02", 500.0),)),
    Row("without the prefactor", PLAIN, "lars_lesion", {}, 0.125),
)  # fmt: skip

# In eps, for the loss and every array: npdrt's largest error over the table times about 4.
UNITS = {"ORDINARY": 16, "ZERO_PARAMETER": 12, "ZERO_GRADIENT": 4, "LARGE_LOGITS": 32}

# --- references ------------------------------------------------------------------------------


def _mlp(params: dict[str, Any], x: Any, *, depth: int, nonlinearity: str,
         output_nonlinearity: bool, residual: bool, **sizes: Any) -> Any:  # fmt: skip
    """h <- phi(W h + b), with h added in residual layers of equal sizes, the last excepted."""
    settings = {"a": 0.01} if nonlinearity == "leaky_relu" else {}
    for layer in range(depth):
        name, last = f"layers/{layer:02d}", layer == depth - 1
        out = linear(x, params[f"{name}/weight"], params.get(f"{name}/bias"))
        if output_nonlinearity or not last:
            out = REFERENCES[nonlinearity](out, **settings)
        x = x + out if residual and not last and x.shape == out.shape else out
    return x


FORWARDS: dict[str, Callable[..., Any]] = {"mlp": _mlp}  # logits over object arrays of Duals


def _norm(w: list[Any]) -> Any:
    return mpmath().sqrt(sum(x * x for x in w))


def _sgd(w: list[Any], g: list[Any], lr: Any, *, momentum: float, dampening: float,
         nesterov: bool, weight_decay: float) -> list[Any]:  # fmt: skip
    """The first velocity is d, whatever the dampening."""
    return [a - lr * (b + weight_decay * a) * (1 + momentum * nesterov)
            for a, b in zip(w, g, strict=True)]  # fmt: skip


def _adam(w: list[Any], g: list[Any], lr: Any, *, betas: tuple[float, float], eps: float,
          weight_decay: float, decoupled: bool) -> list[Any]:  # fmt: skip
    """At the first step the corrected moments are d and d**2, whatever the betas."""
    if decoupled:
        w, weight_decay = [a * (1 - lr * weight_decay) for a in w], 0.0
    d = [b + weight_decay * a for a, b in zip(w, g, strict=True)]
    return [a - lr * b / (abs(b) + eps) for a, b in zip(w, d, strict=True)]


def _lars(w: list[Any], g: list[Any], lr: Any, *, momentum: float, weight_decay: float,
          trust_coefficient: float, eps: float) -> list[Any]:  # fmt: skip
    size, slope, ratio = _norm(w), _norm(g), mpmath().mpf(1)
    if size and slope:
        ratio = trust_coefficient * size / (slope + weight_decay * size + eps)
    return [a - lr * ratio * (b + weight_decay * a) for a, b in zip(w, g, strict=True)]


def _lars_lesion(w: list[Any], g: list[Any], lr: Any) -> list[Any]:
    rate = lr * _norm(w) / _norm(g) if _norm(w) and _norm(g) else lr
    return [a - rate * b for a, b in zip(w, g, strict=True)]


def _fromage(w: list[Any], g: list[Any], lr: Any, *, norm_bound: float | None) -> list[Any]:
    prefactor = mpmath().sqrt(1 + lr * lr)
    new = [a / prefactor for a in _lars_lesion(w, g, lr)]
    if norm_bound is not None and _norm(new) > norm_bound * _norm(w):
        new = [a * norm_bound * _norm(w) / _norm(new) for a in new]
    return new


UPDATES: dict[str, Callable[..., list[Any]]] = {
    "sgd": _sgd,
    "adam": _adam,
    "lars": _lars,
    "lars_lesion": _lars_lesion,
    "fromage": _fromage,
}  # the first update of an array, from a fresh state, over mpf

# --- generation ------------------------------------------------------------------------------


def groups() -> list[Json]:
    """The groups of the table, one a model with its optimizer; tcId counts from 1.

    Raises `Unavailable` without mpmath.
    """
    found: dict[str, Json] = {}
    ids = itertools.count(1)
    for row in ROWS:
        optimizer = {
            "rule": row.rule,
            "settings": settings_json(row.settings),
            "lr": hexed(row.lr),
        }
        group: Json = {
            "type": "TrainingStep",
            "model": {"kind": row.kind, **row.model},
            "optimizer": optimizer,
            "tests": [],
        }
        group = found.setdefault(f"{group}", group)
        group["tests"] += [_test(row, next(ids), FORMATS[dtype]) for dtype in DTYPES]
    return list(found.values())


def _test(row: Row, identity: int, number: Format) -> Json:
    params, x, y = _arguments(row, number)
    loss, grads, new = _expected(row, params, x, y)
    return {
        "tcId": identity,
        "comment": row.comment,
        "flags": [row.flag],
        "result": "valid",
        "params": _arrays(params, number),
        "x": array(x, number),
        "y": {"dtype": "int64", "shape": list(y.shape), "values": y.tolist()},
        "expected": {
            "loss": array(rounded(loss, number), number),
            "grads": _arrays({name: rounded(g, number) for name, g in grads.items()}, number),
            "params": _arrays({name: rounded(w, number) for name, w in new.items()}, number),
        },
        "tolerance": UNITS[row.flag] * number.ulp(1.0).item(),
    }


def _arrays(values: Params, number: Format) -> Json:
    return {name: array(value, number) for name, value in values.items()}


def _arguments(row: Row, number: Format) -> tuple[Params, Any, Any]:
    """Parameters and inputs in the format, and labels."""
    stream = Random(SEED, f"vectors/steps/{row.rule}/{row.comment}")
    model = MODELS[row.kind](**row.model)
    params = {
        name: number.round(_parameter(stream.of(name), name, shape, row.scales))
        for name, shape in model.shapes().items()
    }
    x = number.round(np.abs(stream.of("x").normal((BATCH, row.model["inputs"]))))
    y = (stream.of("y").words(BATCH) % np.uint64(row.model["outputs"])).astype(np.int64)
    return params, x, y


def _parameter(
    stream: Random, name: str, shape: tuple[int, ...], scales: tuple[tuple[str, float], ...]
) -> Any:
    """Normal values; a scale below 0 makes them all negative, so that a relu never fires."""
    scale = next((s for part, s in scales if part in name), 0.75)
    w = stream.normal(shape)
    return -np.abs(w) if scale < 0 else w * scale


def _expected(
    row: Row, params: Params, x: Any, y: Any
) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """The loss, the gradients and the new parameters, exact."""
    with mpmath().workdps(DIGITS):
        leaves = {name: variables(w, name) for name, w in params.items()}
        logits = FORWARDS[row.kind](leaves, constants(x), **row.model)
        cross_entropy = REFERENCES["softmax_cross_entropy"]
        loss = np.asarray(cross_entropy(logits, y, label_smoothing=0.0), dtype=object)
        grads = {
            name: pull_back(loss, np.ones(()), name, np.shape(w))[0] for name, w in params.items()
        }
        new = {}
        for name, w in leaves.items():
            before = [v.value for v in w.reshape(-1)]
            after = UPDATES[row.rule](
                before, grads[name].reshape(-1).tolist(), mpmath().mpf(row.lr), **row.settings
            )
            new[name] = fill(w.shape, after)
        return loss, grads, new


# --- answering and judging -------------------------------------------------------------------


def answer(group: Json, test: Json) -> Json:
    """npdrt's own answer: {"loss": array, "grads": {name: array}, "params": {name: array}}."""
    kind, optimizer = group["model"]["kind"], group["optimizer"]
    model = MODELS[kind](**{k: v for k, v in group["model"].items() if k != "kind"})
    rule = RULES[optimizer["rule"]](
        lr=unhexed(optimizer["lr"]), **settings_from(optimizer["settings"])
    )
    params = {name: read_array(w, name) for name, w in test["params"].items()}
    x, y = read_array(test["x"], "x"), read_array(test["y"], "y")
    with quiet():
        loss, grads = value_and_grad(lambda p: ops.softmax_cross_entropy(model(p, x), y))(params)
        new, _ = rule.update(params, grads, rule.init(params))
    number = FORMATS[str(x.dtype)]
    return {
        "loss": array(loss, number),
        "grads": _arrays(grads, number),
        "params": _arrays(new, number),
    }


def judge(group: Json, test: Json, response: Any) -> tuple[bool, float, str]:
    """(passed, error, where) of a response of the form of `answer`.

    error: the largest, as `npdrt.conform.primitives.difference` measures it, over the loss and
    every array, over the tolerance; passed where it is at most 1. Raises `FileRefused` where the
    response is not of the form.
    """
    wanted = test["expected"]
    match response:
        case {"loss": loss, "grads": dict(grads), "params": dict(params)}:
            parts = {"loss": (loss, wanted["loss"])}
        case _:
            raise FileRefused(
                f"test {test['tcId']}: expected a loss, grads and params; got {shown(response)}"
            )
    for kind, found in (("grads", grads), ("params", params)):
        if found.keys() != wanted[kind].keys():
            names = ", ".join(map(str, found))
            raise FileRefused(
                f"test {test['tcId']}: expected {kind} of {', '.join(wanted[kind])}; got {names}"
            )
        parts.update({f"{kind} {n}": (found[n], w) for n, w in wanted[kind].items()})
    return worst(parts, test)
