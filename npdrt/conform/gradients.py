"""npdrt's gradients against those of autograd, PyTorch and JAX.

The forward passes are written here anew, apart from npdrt's models, from functions of each oracle,
and so is the loss. The oracle differentiates them itself, in float64 on the CPU. It is imported
when you ask it; no setting of its library stays changed.
"""

from __future__ import annotations

import importlib
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from importlib import metadata
from itertools import combinations
from typing import Any

import numpy as np

from npdrt import ops
from npdrt.arrays import Params, quiet
from npdrt.autodiff import value_and_grad
from npdrt.conform.adapters.adapter import double
from npdrt.errors import Error, Unavailable
from npdrt.models import MLP, ResNet18, Transformer

Answer = tuple[float, Params]  # a loss and its gradients by parameter, on the host

# The largest accepted error by the dtype of npdrt's pass: over ten times the largest measured with
# 50 layers of width 128 on the digits, for every nonlinearity, plain, with biases, with skip
# connections and with spectral normalisation: 6e-14 in float64; 8e-5 in float32, but for the two
# cases in the docstring of `audit`.
TOLERANCES = {"float64": 1e-12, "float32": 1e-3}


@dataclass(frozen=True, eq=False)
class Problem:
    """The audited loss: mean softmax cross-entropy of a model's logits, in nats, training mode
    without dropout.

    model: one of the types in FORWARDS. params, buffers: its arrays by name. x: what the model
    takes, (batch, ...) or tokens. y: integer labels, one for every row of logits. All arrays are
    NumPy's; params, buffers and x, tokens apart, are of one dtype, that of npdrt's pass.
    """

    model: Any
    params: Params
    buffers: Params
    x: Any
    y: Any

    @property
    def dtype(self) -> str:
        """That of npdrt's pass."""
        return str(next(iter(self.params.values())).dtype)


@dataclass(frozen=True)
class Comparison:
    """npdrt compared with one oracle; every error is max|ours - theirs| / max|theirs|.

    loss: the oracle's. loss_error: of the loss. errors: of each parameter's gradient by name.
    overall: of all gradients as one vector; never above the largest of `errors`.
    """

    oracle: str
    version: str
    loss: float
    loss_error: float
    errors: dict[str, float]
    overall: float

    @property
    def worst(self) -> str:
        """The parameter with the largest error; the first NaN is larger than any number."""
        return max(self.errors, key=lambda n: (math.isnan(self.errors[n]), self.errors[n]))

    @property
    def error(self) -> float:
        """The largest error of a parameter's gradient."""
        return self.errors[self.worst]

    def beyond(self, tolerance: float) -> list[str]:
        """The parameters whose error is above `tolerance` or NaN, in the model's order."""
        return [name for name, error in self.errors.items() if not error <= tolerance]

    def agrees(self, tolerance: float) -> bool:
        """Whether the loss and every gradient are within `tolerance`."""
        return self.loss_error <= tolerance and not self.beyond(tolerance)


@dataclass(frozen=True)
class GradientAudit:
    """The result of `audit`.

    loss: npdrt's. zero: the parameters whose gradient is zero throughout, so that they learn
    nothing. tolerance: the largest accepted error. comparisons: one for each oracle. absent: the
    oracles that could not be asked, each with the reason. spread: the largest error between two
    oracles, None if there is only one; if it is above the tolerance, so is rounding alone.
    """

    loss: float
    zero: tuple[str, ...]
    tolerance: float
    comparisons: tuple[Comparison, ...]
    absent: dict[str, str]
    spread: float | None

    @property
    def agrees(self) -> bool:
        """Whether npdrt agrees with every oracle that was asked."""
        return all(c.agrees(self.tolerance) for c in self.comparisons)


def audit(
    problem: Problem, *, tolerance: float | None = None, against: Sequence[str] = ()
) -> GradientAudit:
    """Compare npdrt's loss and gradients with those of the oracles, for each parameter array.

    tolerance: see `Comparison`; None is that of TOLERANCES for problem.dtype. The oracles
    compute in float64 on the same values, so that an error of a float32 pass is npdrt's. Two
    such errors do not come from a formula: a relu whose argument rounds to the other side of 0, and
    derivatives below float32's range of 1e-38, as under 50 layers of sigmoid. Nothing widens the
    tolerance: an array whose derivative is zero in theory, but is rounded, differs.
    against: names in ORACLES, all of which are needed; () means those that are installed.

    Raises Unavailable where a named oracle, or every one, is not installed; Error for a model
    without a row in FORWARDS, an unknown oracle, or a tolerance that is negative or not finite.
    """
    limit = TOLERANCES[problem.dtype] if tolerance is None else tolerance
    _check(problem, limit, against)
    absent = _absent(against)
    loss, grads = ours(problem)
    asked = [name for name in ORACLES if name not in absent and name in (against or ORACLES)]
    answers = {name: ask(name, problem) for name in asked}
    found = tuple(compare(name, (loss, grads), theirs) for name, theirs in answers.items())
    zero = tuple(name for name, g in grads.items() if not np.any(g))
    return GradientAudit(loss, zero, limit, found, absent, _spread(list(answers.values())))


def _check(problem: Problem, tolerance: float, against: Sequence[str]) -> None:
    if not 0 <= tolerance < math.inf:
        raise Error(f"tolerance: expected a number from 0; got {tolerance}")
    if type(problem.model) not in FORWARDS:
        known = ", ".join(model.__name__ for model in FORWARDS)
        raise Error(
            f"no oracle has the forward pass of {type(problem.model).__name__}; they have {known} "
            "(npdrt.check_gradients compares any model with the complex step)"
        )
    for name in against:
        if name not in ORACLES:
            raise Error(f"unknown oracle {name!r}; use one of {', '.join(ORACLES)}")


def _absent(against: Sequence[str]) -> dict[str, str]:
    """The oracles that cannot be asked, with the reason; raises Unavailable if they are needed."""
    absent = {name: why for name in against or ORACLES if (why := absence(name))}
    reasons = "; ".join(f"{name}: {why}" for name, why in absent.items())
    if absent and against:
        raise Unavailable(reasons)
    if len(absent) == len(ORACLES):
        raise Unavailable(f"no oracle to compare gradients with. {reasons}")
    return absent


def compare(oracle: str, found: Answer, theirs: Answer) -> Comparison:
    """npdrt's answer, `found`, compared with that of the oracle of that name."""
    (loss, grads), (their_loss, reference) = found, theirs
    with quiet():
        errors = {name: relative(grads[name], value) for name, value in reference.items()}
        overall = relative(_flat(grads), _flat(reference))
        loss_error = relative(loss, their_loss)
    return Comparison(oracle, version(oracle), their_loss, loss_error, errors, overall)


def relative(found: Any, reference: Any) -> float:
    """max|found - reference| / max|reference|: 0 where both are 0, inf where only the reference
    is or the shapes differ, NaN or inf where a value is NaN."""
    if np.shape(found) != np.shape(reference):
        return math.inf
    gap = float(np.max(np.abs(np.subtract(found, reference))))
    size = float(np.max(np.abs(reference)))
    if size == 0:
        return math.inf if gap else 0.0
    return gap / size


def _flat(grads: Params) -> Any:
    return np.concatenate([np.ravel(grads[name]) for name in sorted(grads)])


def _spread(answers: list[Answer]) -> float | None:
    """The largest error between two oracles."""
    pairs = combinations(answers, 2)
    with quiet():
        errors = [relative(a[name], b[name]) for (_, a), (_, b) in pairs for name in a]
    return float(np.max(errors)) if errors else None


# --- who answers -----------------------------------------------------------------------------


def ours(problem: Problem) -> Answer:
    """npdrt's loss and gradients, in the dtype of the problem."""

    def loss(params: Params, x: Any, y: Any) -> Any:
        logits, _ = problem.model.apply(params, problem.buffers, x, train=True)
        return ops.softmax_cross_entropy(logits, y)

    with quiet():
        value, grads = value_and_grad(loss)(problem.params, problem.x, problem.y)
    return float(value), grads


def ask(oracle: str, problem: Problem) -> Answer:
    """The oracle's loss and gradients in float64, of the same values.

    Raises Unavailable where it is not installed.
    """
    if why := absence(oracle):
        raise Unavailable(f"{oracle}: {why}")
    with _silent():
        return ORACLES[oracle](_widened(problem))


def absence(oracle: str) -> str:
    """Why an oracle cannot be asked, and what to do; "" if it can."""
    try:
        _library(oracle)
    except ModuleNotFoundError as error:
        missing = error.name in (oracle, None)
        return f"not installed: {INSTALL[oracle]}" if missing else f"does not import: {error}"
    except Exception as error:  # a broken installation raises what it likes
        return f"does not import: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return ""


def version(oracle: str) -> str:
    """The version of an oracle's library; "" if its installation does not tell."""
    try:
        return metadata.version(oracle)
    except metadata.PackageNotFoundError:
        return ""


def _library(name: str) -> Any:
    """A module of an oracle, imported without a warning; as Any, so that no type checker reads
    these libraries."""
    with _silent():
        return importlib.import_module(name)


@contextmanager
def _silent() -> Iterator[None]:
    with warnings.catch_warnings(), quiet():
        warnings.simplefilter("ignore")
        yield


def _widened(problem: Problem) -> Problem:
    """The problem with its floats in float64, as copies."""
    params, buffers = (
        {name: np.array(value, np.float64) for name, value in arrays.items()}
        for arrays in (problem.params, problem.buffers)
    )
    whole = np.issubdtype(problem.x.dtype, np.integer)
    x = np.array(problem.x, np.int64 if whole else np.float64)
    y = np.array(problem.y, np.int64)
    return replace(problem, params=params, buffers=buffers, x=x, y=y)


@dataclass(frozen=True)
class Library:
    """Operations of an oracle, next to those that arrays have everywhere: @, +, .mean(axes), ...

    array: from NumPy's. phi: the nonlinearities by name. spectral: of (weight, u), the weight over
    its spectral norm, after one step of the power method from u. convolve: of (x, weight, stride,
    padding), images (N, C, H, W). batch_norm, layer_norm: of (x, gain, bias), eps 1e-5, over all
    but the channels and over the last axis. attend: causal attention of queries, keys and values.
    """

    array: Callable[[Any], Any]
    phi: dict[str, Callable[[Any], Any]]
    spectral: Callable[[Any, Any], Any]
    convolve: Callable[[Any, Any, int, int], Any]
    batch_norm: Callable[[Any, Any, Any], Any]
    layer_norm: Callable[[Any, Any, Any], Any]
    attend: Callable[[Any, Any, Any], Any]


# --- autograd --------------------------------------------------------------------------------


def _by_autograd(problem: Problem) -> Answer:
    anp, rows = _library("autograd.numpy"), np.arange(problem.y.size)

    def loss(params: Params) -> Any:
        z = FORWARDS[type(problem.model)](_operations_autograd(), problem, params)
        z = anp.reshape(z, (-1, z.shape[-1]))
        top = np.max(_value(z), axis=1, keepdims=True)
        log_sum = anp.log(anp.sum(anp.exp(z - top), axis=1)) + top[:, 0]
        return anp.mean(log_sum - z[rows, problem.y.reshape(-1)])

    value, grads = _library("autograd").value_and_grad(loss)(problem.params)
    return float(value), grads


def _value(x: Any) -> Any:
    """The array in one of autograd's boxes, a constant."""
    return _library("autograd.tracer").getval(x)


@cache
def _erf_autograd() -> Any:
    """The C library's erf as an operation of autograd, whose own needs SciPy."""
    extend = _library("autograd.extend")
    erf = extend.primitive(np.vectorize(math.erf, otypes=[np.float64]))
    slope = 2.0 / math.sqrt(math.pi)
    extend.defvjp(erf, lambda y, x: lambda g: g * slope * np.exp(-np.square(x)))
    return erf


def _operations_autograd() -> Library:
    anp = _library("autograd.numpy")

    def spectral(weight: Any, u: Any) -> Any:
        matrix = _value(weight)
        v = matrix.T @ u
        v = v / np.linalg.norm(v)
        u = matrix @ v
        return weight / anp.dot(u / np.linalg.norm(u), anp.dot(weight, v))

    def convolve(x: Any, weight: Any, stride: int, padding: int) -> Any:
        """Tap by tap."""
        x = anp.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding)), "constant")
        size = weight.shape[-1]
        high, wide = ((n - size) // stride * stride + 1 for n in x.shape[2:])
        return sum(
            anp.einsum("nchw,oc->nohw", x[:, :, i : i + high : stride, j : j + wide : stride],
                       weight[:, :, i, j])
            for i in range(size)
            for j in range(size)
        )  # fmt: skip

    def standardised(x: Any, axes: tuple[int, ...]) -> Any:
        centred = x - anp.mean(x, axis=axes, keepdims=True)
        return centred / anp.sqrt(anp.mean(centred**2, axis=axes, keepdims=True) + 1e-5)

    def attend(q: Any, k: Any, v: Any) -> Any:
        seen = np.tri(q.shape[-2], k.shape[-2])
        scores = anp.matmul(q, anp.swapaxes(k, -1, -2)) / math.sqrt(q.shape[-1])
        weights = anp.exp(scores - np.max(_value(scores), axis=-1, keepdims=True)) * seen
        return anp.matmul(weights / anp.sum(weights, axis=-1, keepdims=True), v)

    return Library(
        array=np.asarray,
        phi={
            "relu": lambda z: anp.where(z > 0, z, 0.0),
            "leaky_relu": lambda z: anp.where(z > 0, z, 0.01 * z),
            "tanh": anp.tanh,
            "sigmoid": lambda z: anp.exp(-anp.logaddexp(0.0, -z)),
            "gelu": lambda z: z * (1.0 + _erf_autograd()(z / math.sqrt(2.0))) / 2.0,
            "softplus": lambda z: anp.logaddexp(z, 0.0),
            "identity": lambda z: z,
        },
        spectral=spectral,
        convolve=convolve,
        batch_norm=lambda x, a, b: standardised(x, (0, 2, 3)) * a[:, None, None] + b[:, None, None],
        layer_norm=lambda x, a, b: standardised(x, (-1,)) * a + b,
        attend=attend,
    )


# --- PyTorch ---------------------------------------------------------------------------------


def _by_torch(problem: Problem) -> Answer:
    torch = _library("torch")
    with torch.enable_grad(), torch.device("cpu"):
        params = {n: torch.tensor(value, requires_grad=True) for n, value in problem.params.items()}
        logits = FORWARDS[type(problem.model)](_operations_torch(), problem, params)
        labels = torch.tensor(problem.y).flatten()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, -2), labels)
        grads = torch.autograd.grad(loss, list(params.values()))
    return loss.item(), {n: g.numpy() for n, g in zip(params, grads, strict=True)}


def _operations_torch() -> Library:
    torch = _library("torch")
    functional = torch.nn.functional

    def spectral(weight: Any, u: Any) -> Any:
        with torch.no_grad():
            v = functional.normalize(torch.mv(weight.t(), u), dim=0)
            u = functional.normalize(torch.mv(weight, v), dim=0)
        return torch.div(weight, torch.dot(u, torch.mv(weight, v)))

    return Library(
        array=torch.tensor,
        phi={
            "relu": functional.relu,
            "leaky_relu": lambda z: functional.leaky_relu(z, 0.01),
            "tanh": torch.tanh,
            "sigmoid": torch.sigmoid,
            "gelu": lambda z: functional.gelu(z, approximate="none"),
            "softplus": lambda z: torch.logaddexp(z, torch.zeros_like(z)),  # softplus cuts at 20
            "identity": lambda z: z,
        },
        spectral=spectral,
        convolve=lambda x, w, stride, padding: functional.conv2d(x, w, None, stride, padding),
        batch_norm=lambda x, a, b: functional.batch_norm(x, None, None, a, b, training=True),
        layer_norm=lambda x, a, b: functional.layer_norm(x, x.shape[-1:], a, b),
        attend=lambda q, k, v: functional.scaled_dot_product_attention(q, k, v, is_causal=True),
    )


# --- JAX -------------------------------------------------------------------------------------


def _by_jax(problem: Problem) -> Answer:
    jax = _library("jax")

    def loss(params: Params, y: Any) -> Any:
        logits = FORWARDS[type(problem.model)](_operations_jax(), problem, params)
        log_p = jax.nn.log_softmax(logits)
        return -jax.numpy.mean(jax.numpy.take_along_axis(log_p, y[..., None], axis=-1))

    with double(jax, True), jax.default_device(jax.local_devices(backend="cpu")[0]):
        params = {name: jax.numpy.asarray(value) for name, value in problem.params.items()}
        value, grads = jax.value_and_grad(loss)(params, jax.numpy.asarray(problem.y))
        return float(value), {name: np.asarray(grads[name]) for name in problem.params}


def _operations_jax() -> Library:
    jax, jnp = _library("jax"), _library("jax.numpy")

    def spectral(weight: Any, u: Any) -> Any:
        v = jnp.matmul(u, weight)
        v = jax.lax.stop_gradient(v / jnp.linalg.norm(v))
        u = jnp.matmul(weight, v)
        u = jax.lax.stop_gradient(u / jnp.linalg.norm(u))
        return weight / jnp.einsum("o,oi,i->", u, weight, v)

    def convolve(x: Any, weight: Any, stride: int, padding: int) -> Any:
        around = [(padding, padding)] * 2
        return jax.lax.conv_general_dilated(x, weight, (stride, stride), around)

    def batch_norm(x: Any, a: Any, b: Any) -> Any:
        normal = jax.nn.standardize(x, axis=(0, 2, 3), epsilon=1e-5)
        return normal * a[:, None, None] + b[:, None, None]

    def attend(q: Any, k: Any, v: Any) -> Any:
        scores = jnp.einsum("nhqd,nhkd->nhqk", q, k) / math.sqrt(q.shape[-1])
        seen = jnp.tril(jnp.ones(scores.shape[-2:], bool))
        return jnp.einsum("nhqk,nhkd->nhqd", jax.nn.softmax(scores, where=seen), v)

    return Library(
        array=jnp.asarray,
        phi={
            "relu": jax.nn.relu,
            "leaky_relu": lambda z: jnp.where(z > 0, z, 0.01 * z),  # JAX's own has slope 1 at 0
            "tanh": jnp.tanh,
            "sigmoid": jax.nn.sigmoid,
            "gelu": lambda z: jax.nn.gelu(z, approximate=False),
            "softplus": jax.nn.softplus,
            "identity": lambda z: z,
        },
        spectral=spectral,
        convolve=convolve,
        batch_norm=batch_norm,
        layer_norm=lambda x, a, b: jax.nn.standardize(x, epsilon=1e-5) * a + b,
        attend=attend,
    )


# --- networks, of the operations of an oracle ----------------------------------------------------


def _mlp(of: Library, problem: Problem, params: Params) -> Any:
    """Linear layers and nonlinearities, with skip connections or without; x (N, inputs)."""
    model, phi, h = problem.model, of.phi[problem.model.nonlinearity], of.array(problem.x)
    names = [n.removesuffix("/weight") for n in model.shapes() if n.endswith("/weight")]
    for name in names:
        weight, last = params[f"{name}/weight"], name == names[-1]
        if model.normalisation == "spectral":
            weight = of.spectral(weight, of.array(problem.buffers[f"{name}/u"]))
        z = h @ weight.T
        if model.bias:
            z = z + params[f"{name}/bias"]
        if model.output_nonlinearity or not last:
            z = phi(z)
        h = h + z if model.residual and not last and h.shape == z.shape else z
    return h


def _resnet(of: Library, problem: Problem, params: Params) -> Any:
    """Blocks of two 3x3 convolutions, pre-activated or not, on images (N, C, H, W)."""
    before, modified = problem.model.pre_activation, problem.model.shortcut == "modified"
    relu = of.phi["relu"]

    def conv(name: str, h: Any, stride: int = 1) -> Any:
        weight = params[f"{name}/weight"]
        return of.convolve(h, weight, stride, weight.shape[-1] // 2)

    def norm(name: str, h: Any) -> Any:
        return of.batch_norm(h, params[f"{name}/weight"], params[f"{name}/bias"])

    def shortcut(name: str, h: Any, stride: int) -> Any:
        y = conv(name, h, stride)
        y = y if before else norm(f"{name}/norm", y)
        return y + _isometry(of, h, y.shape[1], stride) if modified else y

    h = conv("stem", of.array(problem.x.reshape(-1, *problem.model.image_shape)))
    h = h if before else relu(norm("norm", h))
    for name in (n.removesuffix("/conv1/weight") for n in params if n.endswith("/conv1/weight")):
        stride = 2 if name.endswith("/00") and not name.startswith("stages/00") else 1
        a = relu(norm(f"{name}/norm1", h)) if before else h
        skip = shortcut(f"{name}/shortcut", a, stride) if f"{name}/shortcut/weight" in params else h
        h = conv(f"{name}/conv1", a, stride)
        h = conv(f"{name}/conv2", relu(norm(f"{name}/norm{2 if before else 1}", h)))
        h = h + skip if before else relu(norm(f"{name}/norm2", h) + skip)
    return _affine(params, "linear", h.mean((2, 3)))


def _isometry(of: Library, x: Any, outputs: int, stride: int) -> Any:
    """Sums of squares of pixels over their side, between channels of zeros: a convolution."""
    inputs = x.shape[1]
    kernel, first = np.zeros((outputs, inputs, stride, stride)), (outputs - inputs + 1) // 2
    kernel[np.arange(inputs) + first, np.arange(inputs)] = 1.0 / stride
    return of.convolve(x, of.array(kernel), stride, 0)


def _affine(params: Params, name: str, x: Any) -> Any:
    return x @ params[f"{name}/weight"].T + params[f"{name}/bias"]


def _transformer(of: Library, problem: Problem, params: Params) -> Any:
    """Causal layers, with norms after the sums or before the branches; tokens (length, batch)."""
    model, (length, batch), width = problem.model, problem.x.shape, problem.model.width
    phi = of.phi[model.nonlinearity]

    def norm(name: str, h: Any) -> Any:
        return of.layer_norm(h, params[f"{name}/weight"], params[f"{name}/bias"])

    def attention(name: str, h: Any) -> Any:
        parts = _affine(params, f"{name}/attention/in", h)
        cut = (batch, length, model.heads, width // model.heads)
        q, k, v = (
            parts[:, :, i * width : (i + 1) * width].reshape(cut).swapaxes(1, 2) for i in range(3)
        )
        mixed = of.attend(q, k, v).swapaxes(1, 2).reshape((batch, length, width))
        return _affine(params, f"{name}/attention/out", mixed)

    def mlp(name: str, h: Any) -> Any:
        return _affine(params, f"{name}/linear2", phi(_affine(params, f"{name}/linear1", h)))

    angles = np.arange(length)[:, None] / 10000.0 ** (np.arange(0, width, 2) / width)
    places = np.dstack([np.sin(angles), np.cos(angles)]).reshape(length, width)
    h = params["embedding/weight"][problem.x.T] * math.sqrt(width) + of.array(places)
    for name in (n.removesuffix("/norm1/weight") for n in params if n.endswith("/norm1/weight")):
        for last, branch in (("norm1", attention), ("norm2", mlp)):
            if model.pre_norm:
                h = h + branch(name, norm(f"{name}/{last}", h))
            else:
                h = norm(f"{name}/{last}", h + branch(name, h))
    h = norm("norm", h) if model.pre_norm else h
    weight = params["embedding/weight" if model.tied else "decoder/weight"]
    return h.swapaxes(0, 1) @ weight.T + params["decoder/bias"]


# --- the tables, in the order of the report -----------------------------------------------------

ORACLES: dict[str, Callable[[Problem], Answer]] = {
    "autograd": _by_autograd,
    "torch": _by_torch,
    "jax": _by_jax,
}
INSTALL = {
    "autograd": 'pip install "npdrt[audit]"',
    "torch": "pip install torch",
    "jax": "pip install jax",
}
# type of a model -> (operations, problem, params in the oracle's arrays) -> logits (batch, outputs)
FORWARDS: dict[type, Callable[[Library, Problem, Any], Any]] = {
    MLP: _mlp,
    ResNet18: _resnet,
    Transformer: _transformer,
}
