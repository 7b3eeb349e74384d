"""Vectors of one training step of small networks: loss, gradients, parameters and buffers after it.

The loss is the mean softmax cross-entropy of the logits, in nats. The reference runs the forward
pass, its derivative and the first update of the rule from a fresh state in 400 digits
(`oracle.dual`), with the exact gradient, and rounds each array once.

`ROWS` is the table, one line for each test; `KINDS` has every kind of model with its reference in
`networks`; the rules are those of `npdrt.conform.rules`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import mpmath
import numpy as np

from npdrt import ops
from npdrt.arrays import Params, quiet
from npdrt.autodiff import value_and_grad
from npdrt.conform.case import Case, Step
from npdrt.conform.encoding import (
    Json,
    array,
    hexed,
    read_array,
    settings_from,
    settings_json,
    unhexed,
)
from npdrt.conform.formats import FORMATS, Format
from npdrt.conform.rules import RULES as DIALECTS
from npdrt.conform.rules import Rule, run
from npdrt.models import MLP, ResNet18, SkipNet, Transformer
from npdrt.models.resnet import Block
from npdrt.optim import RULES
from npdrt.random import Random

from . import networks
from .dual import DIGITS, constants, pull_back, reals, rounded, variables
from .primitives import DTYPES, REFERENCES
from .primitives_case import SEED

TITLE = "One training step of small networks: loss, gradients, new parameters"
# flag -> (kind of mistake it is after, what the test has)
FLAGS = {
    "ORDINARY": ("BASIC", "random parameters, a fresh optimizer state"),
    "ZERO_PARAMETER": ("EDGE_CASE", "biases that start at 0"),
    "ZERO_GRADIENT": ("EDGE_CASE", "a layer without any gradient"),
    "LARGE_LOGITS": ("EDGE_CASE", "exp of a logit would overflow"),
    "RUNNING": ("MISSING_STEP", "running statistics move, too"),
    "ORTHOGONAL": ("BASIC", "the rule makes small singular values up to 485 times larger"),
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

TRANSFORMER: dict[str, Any] = {
    "vocabulary": 7, "width": 4, "layers": 1, "heads": 2, "hidden": 3, "dropout": 0.0,
    "pre_norm": False, "nonlinearity": "relu", "tied": False,
}  # fmt: skip
TIED = {**TRANSFORMER, "pre_norm": True, "nonlinearity": "gelu", "tied": True}
CONVOLUTIONAL: dict[str, Any] = {
    "outputs": 2, "image_shape": [1, 3, 3], "width": 2, "stages": [[2, 1], [3, 2]],
    "pre_activation": True, "shortcut": "convolution",
}  # fmt: skip
ORIGINAL = {**CONVOLUTIONAL, "pre_activation": False}
MODIFIED = {**CONVOLUTIONAL, "image_shape": [1, 4, 4], "width": 1, "stages": [[3, 2]],
            "shortcut": "modified"}  # fmt: skip
NORMALISED = {"inputs": 3, "outputs": 2, "depth": 3, "width": 3, "hidden": 2, "eps": 0.5,
              "delta": 0.125}  # fmt: skip

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


ROWS: tuple[Row, ...] = (
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
    Row("transformer", TRANSFORMER, "sgd", SGD, 0.25, kind="transformer"),
    Row("transformer, norms first, tied", TIED, "fromage", FROMAGE, 0.125, kind="transformer"),
    Row("residual net", CONVOLUTIONAL, "sgd", NESTEROV, 0.25, "RUNNING",
        kind="resnet"),
    Row("residual net, norms last", ORIGINAL, "fromage", FROMAGE, 0.125, "RUNNING",
        kind="resnet"),
    Row("residual net, modified shortcut", MODIFIED, "lars", LARS_DECAY, 0.5, "RUNNING",
        kind="resnet"),
    Row("normalised residual layers", NORMALISED, "adam", ADAM, 0.125, kind="skipnet"),
)  # fmt: skip


def _flag(rule: Rule) -> str:
    return "ORTHOGONAL" if rule.matrices else "ORDINARY"


# and a row for every other rule, under its richest settings
ROWS += tuple(
    Row("three layers", PLAIN, rule.name, rule.asked[:2][-1], 0.125, flag=_flag(rule))
    for rule in DIALECTS.values()
    if rule.name not in {row.rule for row in ROWS}
)

# In eps, for the loss and every array: npdrt's largest error over the table times about 4.
UNITS = {"ORDINARY": 16, "ZERO_PARAMETER": 12, "ZERO_GRADIENT": 4, "LARGE_LOGITS": 32,
         "RUNNING": 128, "ORTHOGONAL": 128}  # fmt: skip

# --- models ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class SmallResNet(ResNet18):
    """A residual net whose stages, each of one block, are given: [channels, stride]."""

    stages: Any = ()

    @cached_property
    def blocks(self) -> list[Block]:
        """One in each stage."""
        blocks, inputs = [], self.width
        for stage, (channels, stride) in enumerate(self.stages):
            blocks.append(self._block(f"stages/{stage:02d}/blocks/00", inputs, channels, stride))
            inputs = channels
        return blocks


def _tokens(stream: Random, shape: tuple[int, ...], vocabulary: int) -> Any:
    words = stream.words(int(np.prod(shape))) % np.uint64(vocabulary)
    return words.astype(np.int64).reshape(shape)


@dataclass(frozen=True)
class Kind:
    """A kind of model.

    model: its class. logits: the reference over object arrays of Duals, of (params, buffers, x,
    settings), which puts buffers after the step in their place. inputs: of (stream, settings).
    labels: of settings, their shape and the number of classes.
    """

    model: Any
    logits: Callable[..., Any]
    inputs: Callable[[Random, dict[str, Any]], Any]
    labels: Callable[[dict[str, Any]], tuple[tuple[int, ...], int]]


def _vectors(stream: Random, model: dict[str, Any]) -> Any:
    return np.abs(stream.normal((BATCH, model["inputs"])))


# Without a step: resnet18, resnet50 and mnist-resnet are too large (resnet has their blocks). In
# bert a softmax over places does not see what is added to all of them, so that the gradients of the
# biases of its head, its last norm and its keys are 0 but for rounding, which no relative error
# measures.
KINDS = {
    "mlp": Kind(MLP, networks.mlp, _vectors, lambda m: ((BATCH,), m["outputs"])),
    "transformer": Kind(
        Transformer,
        networks.transformer,
        lambda stream, m: _tokens(stream, (3, 2), m["vocabulary"]),
        lambda m: ((3, 2), m["vocabulary"]),
    ),
    "resnet": Kind(
        SmallResNet,
        networks.resnet,
        lambda stream, m: stream.normal((3, *m["image_shape"])),
        lambda m: ((3,), m["outputs"]),
    ),
    "skipnet": Kind(SkipNet, networks.skipnet, _vectors, lambda m: ((BATCH,), m["outputs"])),
}


# --- generation ------------------------------------------------------------------------------


def groups() -> list[Json]:
    """The groups of the table, one for each model with its optimizer; tcId counts from 1."""
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
    params, buffers, x, y = _arguments(row, number)
    loss, *found = _expected(row, params, buffers, x, y)
    grads, new, moved = (
        _arrays({name: rounded(a, number) for name, a in arrays.items()}, number)
        for arrays in found
    )
    return {
        "tcId": identity,
        "comment": row.comment,
        "flags": [row.flag],
        "result": "valid",
        "params": _arrays(params, number),
        **({"buffers": _arrays(buffers, number)} if buffers else {}),
        "x": array(x, number),
        "y": array(y, number),
        "expected": {
            "loss": array(rounded(loss, number), number),
            "grads": grads,
            "params": new,
            **({"buffers": moved} if buffers else {}),
        },
        "tolerance": UNITS[row.flag] * number.ulp(1.0).item(),
    }


def _arrays(values: Params, number: Format) -> Json:
    return {name: array(value, number) for name, value in values.items()}


def _arguments(row: Row, number: Format) -> tuple[Params, Params, Any, Any]:
    """Parameters, buffers and inputs in the format, and labels."""
    stream, kind = Random(SEED, f"vectors/steps/{row.rule}/{row.comment}"), KINDS[row.kind]
    model = kind.model(**row.model)
    params = {
        name: number.round(_parameter(stream.of(name), name, w.shape, row.scales))
        for name, w in model.init().items()
    }
    buffers = {
        name: number.round(np.abs(stream.of(name).normal(value.shape)))
        for name, value in (model.buffers() if hasattr(model, "buffers") else {}).items()
    }
    x = kind.inputs(stream.of("x"), row.model)
    shape, classes = kind.labels(row.model)
    y = _tokens(stream.of("y"), shape, classes)
    return params, buffers, x if x.dtype == np.int64 else number.round(x), y


def _parameter(
    stream: Random, name: str, shape: tuple[int, ...], scales: tuple[tuple[str, float], ...]
) -> Any:
    """Normal values; a scale below 0 makes them all negative, so that a relu never fires."""
    scale = next((s for part, s in scales if part in name), 0.75)
    w = stream.normal(shape)
    return -np.abs(w) if scale < 0 else w * scale


def _expected(row: Row, params: Params, buffers: Params, x: Any, y: Any) -> tuple[Any, ...]:
    """The loss, the gradients, the new parameters and the buffers after the step, exact."""
    with mpmath.workdps(DIGITS):
        leaves = {name: variables(w, name) for name, w in params.items()}
        moved = {name: constants(a) for name, a in buffers.items()}
        inputs = x if x.dtype == np.int64 else constants(x)
        logits = KINDS[row.kind].logits(leaves, moved, inputs, **row.model)
        cross_entropy = REFERENCES["softmax_cross_entropy"].value
        loss = np.asarray(cross_entropy(logits, y, label_smoothing=0.0), dtype=object)
        grads = {
            name: pull_back(loss, np.ones(()), name, np.shape(w))[0] for name, w in params.items()
        }
        new = {name: _updated(row, w, grads[name]) for name, w in params.items()}
        return loss, grads, new, moved


def _updated(row: Row, w: Any, g: Any) -> Any:
    """A parameter after the first step of the rule, exact; w: float64, g: numbers of mpmath."""
    case = Case(0, "", (), row.rule, "float64", row.settings, w, (Step(g, row.lr),))
    (after,) = run(DIALECTS[row.rule], {}, case, reals)
    return after.w


# --- answering -------------------------------------------------------------------------------


def answer(group: Json, test: Json) -> Json:
    """npdrt's own answer: {"loss": array, "grads": {name: array}, "params": {name: array}}, and
    "buffers" where the model has some."""
    kind, optimizer = group["model"]["kind"], group["optimizer"]
    model = KINDS[kind].model(**{k: v for k, v in group["model"].items() if k != "kind"})
    rule = RULES[optimizer["rule"]](
        lr=unhexed(optimizer["lr"]), **settings_from(optimizer["settings"])
    )
    params, buffers = (
        {name: read_array(w, name) for name, w in test.get(part, {}).items()}
        for part in ("params", "buffers")
    )
    x, y = read_array(test["x"], "x"), read_array(test["y"], "y")

    def of(params: Params) -> Any:
        if hasattr(model, "apply"):
            logits, moved = model.apply(params, buffers, x, train=True)
        else:
            logits, moved = model(params, x), {}
        return ops.softmax_cross_entropy(logits, y), moved

    with quiet():
        (loss, moved), grads = value_and_grad(of, has_aux=True)(params)
        new, _ = rule.update(params, grads, rule.init(params))
    number = FORMATS[str(loss.dtype)]
    return {
        "loss": array(loss, number),
        "grads": _arrays(grads, number),
        "params": _arrays(new, number),
        **({"buffers": _arrays(moved, number)} if buffers else {}),
    }
