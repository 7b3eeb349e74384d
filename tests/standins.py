"""Stand-ins for public implementations of the four rules, and right ones in any arithmetic.

Each is written as its source has it, from the list of dialects that npdrt's documentation cites,
and none from npdrt.conform.rules. All follow the file protocol:

    update(w, g, state, *, lr, name, ways, **settings) -> (w, state)

in the dtype of `w`; `beside` is the gradient of another tensor, if there is one. Python floats are
float64 until they meet an array, and are rounded to its dtype there, as in PyTorch, JAX and NumPy.
`ways` are the liberties that an implementation has.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from npdrt.conform.case import Answer, Case, Failure, Outcome
from npdrt.conform.targets import Target, lacks

Update = Callable[..., tuple[Any, dict[str, Any]]]
WIDER = {"float16": np.float32, "float32": np.float64, "float64": np.longdouble}
WIDER[np.dtype(np.longdouble).name] = np.longdouble
SLOTS = ("momentum", "exp_avg", "exp_avg_sq", "square_avg", "grad_avg")

# --- liberties ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ways:
    """Arithmetic in which right implementations differ.

    norm: how squares are summed, a key of NORMS. orders: a number that picks an order of
    operations at every place that has several; 0 is the order of the source. fused: a x + y is
    rounded once. wide: everything is computed in the next wider format and rounded at the end.
    """

    norm: str = "float64"
    orders: int = 0
    fused: bool = False
    wide: bool = False

    def pick(self, place: str, *options: Callable[[], Any]) -> Any:
        """What one of the options gives; always the same one at a place."""
        if not self.orders:
            return options[0]()
        return random.Random(f"{self.orders} {place}").choice(options)()

    def axpy(self, a: Any, x: Any, y: Any) -> Any:
        """y + a x."""
        kind = y.dtype.type
        if not self.fused:
            return y + kind(a) * x
        wide = WIDER[y.dtype.name]
        return kind(wide(y) + wide(kind(a)) * wide(x))

    def mean(self, place: str, beta: float, old: Any, new: Any) -> Any:
        """beta old + (1 - beta) new."""
        kind = new.dtype.type
        b, k = kind(beta), kind(1 - beta)
        return self.pick(
            place,
            lambda: b * old + k * new,
            lambda: old + k * (new - old) if k < 0.5 else new - b * (new - old),
            lambda: self.axpy(b, old, k * new),
            lambda: self.axpy(k, new, b * old),
            lambda: self.axpy(k, new - old, old) if k < 0.5 else self.axpy(b, old - new, new),
        )


PLAIN = Ways()


def scaled_norm(x: Any) -> Any:
    """The norm of BLAS nrm2: divided by the largest element first."""
    most = np.max(np.abs(x), initial=x.dtype.type(0))
    if not (0 < most < np.inf):
        return most
    return most * np.sqrt(np.sum((x / most) ** 2))


NORMS: dict[str, Callable[[Any], Any]] = {
    "float64": lambda x: np.sqrt(np.sum(x.astype(np.float64) ** 2)),
    "float64, rounded": lambda x: x.dtype.type(np.sqrt(np.sum(x.astype(np.float64) ** 2))),
    "scaled": scaled_norm,
    "pairwise": lambda x: np.sqrt(np.sum(x * x)),
    "sequential": lambda x: np.sqrt(np.cumsum(np.append(x.dtype.type(0), x * x))[-1]),
    "backwards": lambda x: (
        np.sqrt(np.cumsum(np.append((x * x).reshape(-1)[::-1], x[:0]))[-1])
        if x.size
        else x.dtype.type(0)
    ),
}
NARROW = ("pairwise", "sequential", "backwards")  # these over- and underflow in the dtype


def norm(x: Any, ways: Ways) -> Any:
    """|x|, a NumPy scalar of float64 or of the dtype of x."""
    return NORMS[ways.norm](x.reshape(-1))


def meet(s: Any, x: Any) -> Any:
    """A scalar that meets an array: rounded to its dtype."""
    return x.dtype.type(s)


# --- SGD ----------------------------------------------------------------------------------------


def sgd_torch(
    w, g, state, *, lr, momentum=0, dampening=0, nesterov=False, weight_decay=0, ways, **_
):  # fmt: skip
    """torch/optim/sgd.py; optax sgd."""
    if weight_decay != 0:
        g = ways.axpy(weight_decay, w, g)
    if momentum != 0:
        if "momentum" not in state:
            v = g.copy()
        else:
            kept = meet(1 - dampening, g) * g if dampening else g
            v = ways.axpy(momentum, state["momentum"], kept)
        state = {"momentum": v}
        g = ways.axpy(momentum, v, g) if nesterov else v
    return ways.axpy(-lr, g, w), state


def sgd_keras(w, g, state, *, lr, momentum=0, nesterov=False, ways, **_):
    """keras/src/optimizers/sgd.py: the velocity is negative and holds the learning rate."""
    change = meet(lr, g) * g
    if momentum == 0:
        return w - change, state
    v = ways.axpy(momentum, state.get("momentum", w * 0), -change)
    new = w + ways.axpy(momentum, v, -change) if nesterov else w + v
    return new, {"momentum": v}


def sgd_caffe(w, g, state, *, lr, momentum=0, nesterov=False, weight_decay=0, ways, **_):
    """Caffe: v = m v + lr d; Nesterov steps (1 + m) v - m v_old."""
    d = ways.axpy(weight_decay, w, g)
    old = state.get("momentum", w * 0)
    v = ways.axpy(momentum, old, meet(lr, d) * d)
    step = v
    if nesterov:
        step = ways.pick(
            "nesterov",
            lambda: meet(1 + momentum, v) * v - meet(momentum, v) * old,
            lambda: ways.axpy(momentum, v, meet(lr, d) * d),
        )
    return w - step, {"momentum": v} if momentum else state


def sgdw(
    w, g, state, *, lr, momentum=0, dampening=0, nesterov=False, weight_decay=0, ways, **_
):  # fmt: skip
    """SGDW: the parameter decays first, then a step of SGD."""
    decayed = ways.pick(
        "decay",
        lambda: w * meet(1 - lr * weight_decay, w),
        lambda: ways.axpy(-lr * weight_decay, w, w),
    )
    return sgd_torch(
        decayed, g, state, lr=lr, momentum=momentum, dampening=dampening, nesterov=nesterov,
        weight_decay=0, ways=ways,
    )  # fmt: skip


# --- Adam ---------------------------------------------------------------------------------------


def moments(g, state, betas, ways):
    """The running means of g and g^2, by either order of the product."""
    m, v = (state.get(name, g * 0) for name in ("exp_avg", "exp_avg_sq"))
    k = meet(1 - betas[1], g)
    return (
        ways.mean("m", betas[0], m, g),
        ways.pick(
            "v",
            lambda: ways.mean("square", betas[1], v, g * g),
            lambda: meet(betas[1], v) * v + (k * g) * g,
        ),
    )


def kept(state, m, v, **more):
    """The state after a step."""
    step = state.get("step", 0) + 1
    return {"exp_avg": m, "exp_avg_sq": v, "step": step, **more}


def adam_step(w, m, v, t, lr, betas, eps, ways):
    """w - lr m_hat / (sqrt(v_hat) + eps), scalars in float64, in one of the orders in use."""
    c1, c2 = 1 - betas[0] ** t, 1 - betas[1] ** t

    def torch():
        return ways.axpy(-(lr / c1), m / (np.sqrt(v) / meet(np.sqrt(c2), v) + meet(eps, v)), w)

    def paper():
        hat = m / meet(c1, m)
        return w - (meet(lr, m) * hat) / (np.sqrt(v / meet(c2, v)) + meet(eps, v))

    def end_of_section_2():
        root = np.sqrt(v) + meet(eps * np.sqrt(c2), v)
        return w - meet(lr * np.sqrt(c2) / c1, m) * m / root

    def by_reciprocals():
        hats = m * meet(1 / c1, m), v * meet(1 / c2, v)
        return w - meet(lr, m) * (hats[0] / (np.sqrt(hats[1]) + meet(eps, v)))

    return ways.pick("step", torch, paper, end_of_section_2, by_reciprocals)


def adam_torch(w, g, state, *, lr, betas, eps, weight_decay, ways, decoupled=False, **_):
    """torch/optim/adam.py and adamw.py, scalars in float64."""
    if decoupled:
        w = w * meet(1 - lr * weight_decay, w)
    elif weight_decay != 0:
        g = ways.axpy(weight_decay, w, g)
    m, v = moments(g, state, betas, ways)
    t = state.get("step", 0) + 1
    return adam_step(w, m, v, t, lr, betas, eps, ways), kept(state, m, v)


def adamw(w, g, state, *, lr, betas, eps, weight_decay, ways, **_):
    """AdamW that knows no coupled decay; as optax, which adds wd w to the step."""
    m, v = moments(g, state, betas, ways)
    t = state.get("step", 0) + 1
    decayed = ways.axpy(-lr * weight_decay, w, w)
    return adam_step(decayed, m, v, t, lr, betas, eps, ways), kept(state, m, v)


def narrow_corrections(w, state, betas):
    """1 - beta^t in the dtype of w, as in optax and TensorFlow."""
    kind, t = w.dtype.type, state.get("step", 0) + 1
    return tuple(kind(1) - kind(b) ** kind(t) for b in betas)


def adam_optax(w, g, state, *, lr, betas, eps, weight_decay, ways, decoupled=False, **_):
    """optax adam and adamw: bias correction in the dtype of the parameter."""
    if weight_decay and not decoupled:
        g = ways.axpy(weight_decay, w, g)
    m, v = moments(g, state, betas, ways)
    c1, c2 = narrow_corrections(w, state, betas)
    u = (m / c1) / (np.sqrt(v / c2) + meet(eps, v))
    if weight_decay and decoupled:
        u = ways.axpy(weight_decay, w, u)
    return ways.axpy(-lr, u, w), kept(state, m, v)


def adam_keras(w, g, state, *, lr, betas, eps, ways, **_):
    """keras/src/optimizers/adam.py: epsilon-hat, scalars in the dtype of the parameter."""
    m, v = moments(g, state, betas, ways)
    c1, c2 = narrow_corrections(w, state, betas)
    alpha = meet(lr, w) * np.sqrt(c2) / c1
    return w - (m * alpha) / (np.sqrt(v) + meet(eps, v)), kept(state, m, v)


def adam_onnx(w, g, state, *, lr, betas, eps, weight_decay, ways, **_):
    """ai.onnx.preview.training Adam: epsilon-hat, scalars in float64, coupled decay."""
    g = ways.axpy(weight_decay, w, g)
    m, v = moments(g, state, betas, ways)
    t = state.get("step", 0) + 1
    rate = lr * np.sqrt(1 - betas[1] ** t) / (1 - betas[0] ** t)
    return w - meet(rate, m) * m / (np.sqrt(v) + meet(eps, v)), kept(state, m, v)


def amsgrad_torch(w, g, state, *, lr, betas, eps, weight_decay, ways, decoupled=False, **_):
    """torch.optim.Adam(amsgrad=True)."""
    if decoupled:
        w = w * meet(1 - lr * weight_decay, w)
    elif weight_decay != 0:
        g = ways.axpy(weight_decay, w, g)
    m, v = moments(g, state, betas, ways)
    most = np.maximum(state.get("largest", v * 0), v)
    t = state.get("step", 0) + 1
    return adam_step(w, m, most, t, lr, betas, eps, ways), kept(state, m, v, largest=most)


def amsgrad_optax(w, g, state, *, lr, betas, eps, ways, **_):
    """optax amsgrad: the largest corrected second moment."""
    m, v = moments(g, state, betas, ways)
    c1, c2 = narrow_corrections(w, state, betas)
    most = np.maximum(state.get("largest", v * 0), v / c2)
    u = (m / c1) / (np.sqrt(most) + meet(eps, v))
    return ways.axpy(-lr, u, w), kept(state, m, v, largest=most)


def adamax(w, g, state, *, lr, betas, eps, ways, **_):
    """Kingma and Ba, Algorithm 2, with epsilon as in optax."""
    m = ways.mean("m", betas[0], state.get("exp_avg", g * 0), g)
    u = np.maximum(meet(betas[1], g) * state.get("exp_avg_sq", g * 0), np.abs(g))
    t = state.get("step", 0) + 1
    return ways.axpy(-(lr / (1 - betas[0] ** t)), m / (u + meet(eps, u)), w), kept(state, m, u)


def adabelief(w, g, state, *, lr, betas, eps, ways, **_):
    """AdaBelief: the second moment of g - m."""
    m = ways.mean("m", betas[0], state.get("exp_avg", g * 0), g)
    v = ways.mean("v", betas[1], state.get("exp_avg_sq", g * 0), (g - m) ** 2)
    t = state.get("step", 0) + 1
    return adam_step(w, m, v, t, lr, betas, eps, ways), kept(state, m, v)


# --- Fromage ------------------------------------------------------------------------------------


def shrunk(w, s, g, p, ways):
    """(w - s g) / p in one of the orders in use."""

    def by_factor():
        return ways.axpy(-s / p, g, w * meet(1 / p, w))

    return ways.pick(
        "prefactor",
        lambda: ways.axpy(-s, g, w) / meet(p, w),
        lambda: ways.axpy(-s, g, w) * meet(1 / p, w),
        lambda: w / meet(p, w) - meet(s, g) * g / meet(p, w),
        by_factor,
    )


def relative(lr, nw, ng, ways):
    """lr |w| / |g|."""
    return ways.pick(
        "ratio", lambda: lr * (nw / ng), lambda: lr * nw / ng, lambda: (lr / ng) * nw
    )  # fmt: skip


def fromage_official(w, g, state, *, lr, ways, norm_bound=None, **_):
    """The authors' code and kozistr's: the plain step where a norm is zero, and norm_bound."""
    nw, ng = norm(w, ways), norm(g, ways)
    if norm_bound is not None and "max" not in state:
        state = {**state, "max": norm_bound * nw}
    s = relative(lr, nw, ng, ways) if nw > 0 and ng > 0 else lr
    w = shrunk(w, s, g, np.sqrt(1 + lr**2), ways)
    if norm_bound is not None:
        new = norm(w, ways)
        if new > state["max"]:
            w = w * meet(state["max"] / new, w)
    return w, state


def fromage_imaginaire(w, g, state, *, lr, ways, momentum=0, **_):
    """NVlabs imaginaire: momentum is taken and ignored."""
    nw, ng = norm(w, ways), norm(g, ways)
    s = relative(lr, nw, ng, ways) if nw > 0 and ng > 0 else lr
    return shrunk(w, s, g, np.sqrt(1 + lr**2), ways), state


def fromage_optax(w, g, state, *, lr, ways, **_):
    """optax fromage: norms of at least 1e-6, the prefactor as decay and in the rate."""
    ratio = np.maximum(norm(w, ways), 1e-6) / np.maximum(norm(g, ways), 1e-6)
    mult = 1 / np.sqrt(1 + lr**2)

    def as_chained():
        u = meet(-lr * mult, g) * (g * meet(ratio, g))
        return w + ways.axpy(mult - 1, w, u)

    return ways.pick(
        "chain", as_chained, lambda: shrunk(w, lr * ratio, g, np.sqrt(1 + lr**2), ways)
    ), state


def fromage_old_optax(w, g, state, *, lr, ways, **_):
    """optax before February 2021: called with a negative rate."""
    rate = -lr
    ratio = np.maximum(norm(w, ways), 1e-6) / np.maximum(norm(g, ways), 1e-6)
    mult = 1 / np.sqrt(1 + rate**2)
    return w + (meet(rate * mult, g) * (g * meet(ratio, g)) + meet(mult - 1, w) * w), state


def fromage_nfnets(w, g, state, *, lr, ways, **_):
    """deepmind-research nfnets, without its weight decay."""
    ratio = np.maximum(norm(w, ways), 1e-5) / np.maximum(norm(g, ways), 1e-5)
    return meet(1 / np.sqrt(1 + lr**2), w) * ways.axpy(-lr * ratio, g, w), state


def lesion(w, g, state, *, lr, ways, **_):
    """The authors' lars lesion: Fromage without the prefactor."""
    nw, ng = norm(w, ways), norm(g, ways)
    s = relative(lr, nw, ng, ways) if nw > 0 and ng > 0 else lr
    return ways.axpy(-s, g, w), state


# --- LARS ---------------------------------------------------------------------------------------


def torch_momentum(w, d, state, lr, momentum, ways):
    """PyTorch's SGD on a gradient that is scaled already: the rate stays outside."""
    if momentum != 0:
        d = ways.axpy(momentum, state["momentum"], d) if "momentum" in state else d
        state = {"momentum": d}
    return ways.axpy(-lr, d, w), state


def inner_momentum(w, k, d, state, momentum, ways):
    """v = m v + k d;  w - v."""
    v = ways.axpy(momentum, state.get("momentum", w * 0), meet(k, d) * d)
    return w - v, {"momentum": v}


def trust(nw, ng, tc, wd, eps, ways):
    """tc |w| / (|g| + wd |w| + eps)."""
    below = ng + wd * nw + eps
    return ways.pick("trust", lambda: tc * nw / below, lambda: tc * (nw / below))


def lars_paper(w, g, state, *, lr, momentum, weight_decay, trust_coefficient, eps, ways, **_):
    """Algorithm 1 of You et al.; r = 1 where a norm is zero."""
    nw, ng, r = norm(w, ways), norm(g, ways), 1.0
    if nw > 0 and ng > 0:
        r = trust(nw, ng, trust_coefficient, weight_decay, eps, ways)
    d = ways.axpy(weight_decay, w, g)

    def rate_last():
        v = ways.axpy(momentum, state.get("momentum", w * 0), meet(lr, d) * (meet(r, d) * d))
        return w - v, {"momentum": v}

    return ways.pick(
        "rate", lambda: inner_momentum(w, lr * r, d, state, momentum, ways), rate_last
    )  # fmt: skip


def lars_optax(w, g, state, *, lr, momentum, weight_decay, trust_coefficient, eps, ways, **_):
    """optax lars: decay, trust ratio of the sum, rate, trace."""
    u = ways.axpy(weight_decay, w, g)
    nw, nu = norm(w, ways), norm(u, ways)
    r = 1.0 if nw == 0 or nu == 0 else trust_coefficient * nw / (nu + eps)
    u = meet(-lr, u) * (u * meet(r, u))
    trace = ways.axpy(momentum, -state.get("momentum", w * 0), u)
    return w + trace, {"momentum": -trace}


def lars_kozistr(w, g, state, *, lr, momentum, weight_decay, trust_coefficient, ways, **_):
    """kozistr LARS: vectors are left alone; the buffer starts as a copy of the raw gradient."""
    d = g
    if w.ndim > 1:
        nw, ng = norm(w, ways), norm(g, ways)
        r = trust_coefficient * nw / ng if nw > 0 and ng > 0 else 1.0
        d = ways.axpy(weight_decay, w, g) * meet(r, g)
    if momentum != 0:
        d = ways.axpy(momentum, state.get("momentum", g), d)
        state = {"momentum": d}
    return ways.axpy(-lr, d, w), state


def larc(clip):
    """NVIDIA apex LARC around SGD, with clip on or off."""

    def update(w, g, state, *, lr, momentum, weight_decay, trust_coefficient, eps, ways, **_):
        nw, ng = norm(w, ways), norm(g, ways)
        if nw != 0 and ng != 0:
            r = trust(nw, ng, trust_coefficient, weight_decay, eps, ways)
            r = np.minimum(r / np.float64(lr), 1) if clip else r
            g = ways.axpy(weight_decay, w, g) * meet(r, g)
        return torch_momentum(w, g, state, lr, momentum, ways)

    return update


def lars_bolts(w, g, state, *, lr, momentum, weight_decay, trust_coefficient, eps, ways, **_):
    """lightning-bolts: SGD unless there is weight decay."""
    nw, ng = norm(w, ways), norm(g, ways)
    if weight_decay != 0 and nw != 0 and ng != 0:
        r = trust(nw, ng, trust_coefficient, weight_decay, eps, ways)
        g = ways.axpy(weight_decay, w, g) * meet(r, g)
    return torch_momentum(w, g, state, lr, momentum, ways)


def timm(trust_clip=False, always_adapt=False):
    """timm Lars."""

    def update(w, g, state, *, lr, momentum, weight_decay, trust_coefficient, eps, ways, **_):
        if weight_decay != 0 or always_adapt:
            nw, ng = norm(w, ways), norm(g, ways)
            r = trust(nw, ng, trust_coefficient, weight_decay, eps, ways) if nw > 0 < ng else 1.0
            if trust_clip:
                r = np.minimum(r / np.float64(lr), 1)
            g = ways.axpy(weight_decay, w, g) * meet(r, g)
        return torch_momentum(w, g, state, lr, momentum, ways)

    return update


def torchlars(w, g, state, *, lr, momentum, weight_decay, trust_coefficient, eps, ways, **_):
    """kakaobrain torchlars around SGD."""
    nw, ng = norm(w, ways), norm(g, ways)
    r = 1.0
    if nw > 0 and ng > 0:
        r = trust(nw, ng, trust_coefficient, weight_decay, eps, ways)
    d = ways.axpy(weight_decay, w, g)
    d = ways.pick("scaled", lambda: d * meet(r, d), lambda: meet(r, g) * g + meet(r, g) * (d - g))
    return torch_momentum(w, d, state, lr, momentum, ways)


def lars_tf(classic):
    """TensorFlow model garden, with its two kinds of momentum; it has no eps."""

    def update(w, g, state, *, lr, momentum, weight_decay, trust_coefficient, ways, **_):
        d = ways.axpy(weight_decay, w, g)
        old = state.get("momentum", w * 0)
        update = d if classic else ways.axpy(momentum, old, d)
        nw, ng = norm(w, ways), norm(update, ways)
        r = trust_coefficient * nw / ng if nw > 0 and ng > 0 else 1.0
        if classic:
            return inner_momentum(w, lr * r, d, state, momentum, ways)
        return ways.axpy(-(lr * r), update, w), {"momentum": update}

    return update


def mlperf_tf1(
    w, g, state, *, lr, momentum, weight_decay, trust_coefficient, eps, name, ways, **_
):  # fmt: skip
    """MLPerf, tf.contrib: biases take the raw rate and no decay."""
    r, d = 1.0, g
    if name != "bias":
        nw, ng = norm(w, ways), norm(g, ways)
        if nw > 0 and ng > 0:
            r = trust(nw, ng, trust_coefficient, weight_decay, eps, ways)
        d = ways.axpy(weight_decay, w, g)
    return inner_momentum(w, lr * r, d, state, momentum, ways)


def mlperf_tf2(
    w, g, state, *, lr, momentum, weight_decay, trust_coefficient, eps, name, ways, **_
):  # fmt: skip
    """MLPerf for TensorFlow 2: a negative velocity, and an epsilon of 1e-7 where 0 is asked."""
    r, d = 1.0, g
    if name != "bias":
        nw, ng = norm(w, ways), norm(g, ways)
        if nw > 0 and ng > 0:
            r = trust(nw, ng, trust_coefficient, weight_decay, eps or 1e-7, ways)
        d = ways.axpy(weight_decay, w, g)
    v = ways.axpy(momentum, state.get("momentum", w * 0), meet(-lr * r, d) * d)
    return w + v, {"momentum": v}


# --- right and plain, to plant mistakes in -------------------------------------------------------


def plain_sgd(w, g, state, *, lr, momentum, dampening, nesterov, weight_decay, **_):
    t = state.get("step", 0) + 1
    d = g + weight_decay * w
    k = 1 - dampening if t > 1 else 1
    v = momentum * state.get("momentum", w * 0) + k * d
    u = d + momentum * v if nesterov else v
    w = w - lr * u
    return w, {"momentum": v, "step": t}


def plain_adam(w, g, state, *, lr, betas, eps, weight_decay, decoupled=False, **_):
    t = state.get("step", 0) + 1
    b1, b2 = betas
    if decoupled:
        w = w * (1 - lr * weight_decay)
    else:
        g = g + weight_decay * w
    old, squares = state.get("exp_avg", w * 0), state.get("exp_avg_sq", w * 0)
    m = b1 * old + (1 - b1) * g
    v = b2 * squares + (1 - b2) * g**2
    c1, c2 = 1 - b1**t, 1 - b2**t
    root = np.sqrt(v / c2) + eps
    w = w - lr * (m / c1) / root
    return w, {"exp_avg": m, "exp_avg_sq": v, "step": t}


def size_of(x):
    return np.sqrt(np.sum(x.astype(np.float64) ** 2))


def plain_lars(
    w, g, state, *, lr, momentum, weight_decay, trust_coefficient, eps, name, **_
):  # fmt: skip
    old = state.get("momentum", w * 0)
    d = g + weight_decay * w
    nw, ng = size_of(w), size_of(g)
    r = 1.0
    if nw > 0 and ng > 0:
        r = trust_coefficient * nw / (ng + weight_decay * nw + eps)
    k = lr * r if lr * r <= np.finfo(w.dtype).max else lr
    v = momentum * old + meet(k, w) * d
    w = w - v
    return w, {"momentum": v}


def plain_fromage(w, g, state, *, lr, norm_bound=None, **_):
    nw, ng = size_of(w), size_of(g)
    most = state.get("max", np.inf if norm_bound is None else norm_bound * nw)
    s = lr
    if nw > 0 and ng > 0:
        s = lr * nw / ng
    s = meet(s if s <= np.finfo(w.dtype).max else lr, w)
    p = meet(np.sqrt(1 + lr**2), w)
    w = (w - s * g) / p
    after = size_of(w)
    if after > most:
        w = w * meet(most / after, w)
    return w, {"max": most}


PLAIN_ONES = {
    "sgd": plain_sgd, "adam": plain_adam, "lars": plain_lars, "fromage": plain_fromage,
}  # fmt: skip


def changed(rule: str, edits: dict[str, str]) -> Standin:
    """The plain implementation of a rule with lines replaced: {a line, or its start: other
    lines}."""
    rows = inspect.getsource(PLAIN_ONES[rule]).splitlines()
    for start, other in edits.items():
        whole = [k for k, row in enumerate(rows) if row.strip() == start]
        (at,) = whole or [k for k, row in enumerate(rows) if row.strip().startswith(start)]
        indent = rows[at][: -len(rows[at].lstrip())]
        rows[at : at + 1] = [indent + row for row in other.splitlines()]
    space = dict(globals())
    exec("\n".join(rows), space)
    return Standin("changed", rule, space[f"plain_{rule}"], "", OFFERS[rule])


def by_rows(rule: str, axis: int) -> Standin:
    """The plain implementation of a rule on every row (0) or column (-1) of an array by itself."""

    def update(w, g, state, **settings):
        if w.ndim < 2:
            return PLAIN_ONES[rule](w, g, state, **settings)
        split = {k: np.moveaxis(v, axis, 0) for k, v in state.items() if k in SLOTS}
        halves = [
            PLAIN_ONES[rule](a, b, state["rows"][k] if "rows" in state
                             else {name: v[k] for name, v in split.items()}, **settings)
            for k, (a, b) in enumerate(zip(np.moveaxis(w, axis, 0), np.moveaxis(g, axis, 0),
                                           strict=True))
        ]  # fmt: skip
        new = [a for a, _ in halves]
        return (
            np.moveaxis(np.stack(new), 0, axis) if new else w.copy(),
            {"rows": [state for _, state in halves]},
        )

    return Standin("by rows", rule, update, "", OFFERS[rule])


# --- the table ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Standin:
    """An implementation of `rule`, which is `dialect` by npdrt's name.

    offers: the settings it takes. precise: whether Adam's bias correction is in float64.
    """

    name: str
    rule: str
    update: Update
    dialect: str = "published"
    offers: frozenset[str] = frozenset()
    precise: bool = True

    def without(self, setting: str) -> Standin:
        """The same, not offering a setting."""
        return replace(self, offers=self.offers - {setting})


def offering(text: str) -> frozenset[str]:
    """Names in a text."""
    return frozenset(text.split())


OFFERS = {
    "sgd": offering("momentum dampening nesterov weight_decay"),
    "adam": offering("betas eps weight_decay decoupled"),
    "lars": offering("momentum weight_decay trust_coefficient eps"),
    "lars_lesion": offering(""),
    "fromage": offering("norm_bound"),
}
_SGD, _DECAY, _LARS = (OFFERS[rule] for rule in ("sgd", "adam", "lars"))
_ADAM = offering("betas eps")
STANDINS = [
    Standin("torch SGD", "sgd", sgd_torch, "published", _SGD),
    Standin("Keras SGD", "sgd", sgd_keras, "tensorflow", offering("momentum nesterov")),
    Standin("Caffe SGD", "sgd", sgd_caffe, "caffe", offering("momentum nesterov weight_decay")),
    Standin("SGDW", "sgd", sgdw, "decoupled", _SGD),
    Standin("torch Adam", "adam", adam_torch, "published", _DECAY),
    Standin("optax adam", "adam", adam_optax, "published", _DECAY, precise=False),
    Standin("AdamW", "adam", adamw, "AdamW", _ADAM | {"weight_decay"}),
    Standin("Keras Adam", "adam", adam_keras, "epsilon-hat", _ADAM, precise=False),
    Standin("ONNX Adam", "adam", adam_onnx, "epsilon-hat", _ADAM | {"weight_decay"}),
    Standin("torch AMSGrad", "adam", amsgrad_torch, "AMSGrad", _DECAY),
    Standin("optax amsgrad", "adam", amsgrad_optax, "AMSGrad, corrected", _ADAM, precise=False),
    Standin("Adamax", "adam", adamax, "Adamax", _ADAM),
    Standin("AdaBelief", "adam", adabelief, "AdaBelief", _ADAM),
    Standin("official Fromage", "fromage", fromage_official, offers=offering("norm_bound")),
    Standin("imaginaire Fromage", "fromage", fromage_imaginaire),
    Standin("optax fromage", "fromage", fromage_optax, "optax"),
    Standin("old optax fromage", "fromage", fromage_old_optax, "optax"),
    Standin("nfnets Fromage", "fromage", fromage_nfnets, "nfnets"),
    Standin("lars lesion", "lars_lesion", lesion),
    Standin("LARS paper", "lars", lars_paper, "published", _LARS),
    Standin("optax lars", "lars", lars_optax, "optax", _LARS),
    Standin("kozistr LARS", "lars", lars_kozistr, "kozistr", _LARS),
    Standin("apex LARC", "lars", larc(True), "apex LARC", _LARS),
    Standin("apex LARC, clip=False", "lars", larc(False), "apex LARC, clip=False", _LARS),
    Standin("lightning-bolts LARS", "lars", lars_bolts, "lightning-bolts", _LARS),
    Standin("timm Lars", "lars", timm(), "timm", _LARS),
    Standin("timm Lars, trust_clip", "lars", timm(trust_clip=True), "timm, trust_clip", _LARS),
    Standin("timm Lars, always_adapt", "lars", timm(always_adapt=True), "torchlars", _LARS),
    Standin("torchlars", "lars", torchlars, "torchlars", _LARS),
    Standin("TF garden LARS", "lars", lars_tf(True), "TF model garden", _LARS),
    Standin(
        "TF garden LARS, new momentum", "lars", lars_tf(False),
        "TF model garden, classic_momentum=False", _LARS,
    ),
    Standin("MLPerf TF1 LARS", "lars", mlperf_tf1, "MLPerf TF1", _LARS),
    Standin("MLPerf TF2 LARS", "lars", mlperf_tf2, "MLPerf TF2", _LARS),
]  # fmt: skip
RIGHT = {
    "sgd": sgd_torch, "adam": adam_torch, "lars": lars_paper, "lars_lesion": lesion,
    "fromage": fromage_official,
}  # fmt: skip

# rule -> the settings that a stand-in may lack: their defaults switch something off
OPTIONAL = {
    "sgd": {"momentum", "dampening", "nesterov", "weight_decay"},
    "adam": {"weight_decay", "decoupled"},
    "lars": {"weight_decay", "eps"},
    "fromage": {"norm_bound"},
    "lion": {"weight_decay"},
    "rmsprop": {"momentum", "centered", "weight_decay"},
    "lamb": {"weight_decay"},
    "muon": {"weight_decay"},
}


# --- running them -------------------------------------------------------------------------------


def outcomes(
    standin: Standin, cases: Iterable[Case], ways: Ways = PLAIN, *, known: bool = True
) -> list[Outcome]:
    """What a stand-in makes of cases, in this process; "not offered" as `npdrt audit` has it.

    known: whether it is told by what rule it goes.
    """
    rule = standin.rule if known else None
    needed = standin.offers - OPTIONAL.get(standin.rule, set())  # they have no default
    target = Target("", "", "file", rule, standin.offers, tuple(WIDER), {}, required=needed)
    return [lacks(target, case) or answers(standin.update, case, ways) for case in cases]


def answers(update: Update, case: Case, ways: Ways = PLAIN) -> tuple[Answer, ...] | Failure:
    """The answers of an update to a case."""
    kind = np.dtype(case.format).type
    inner = WIDER[case.format] if ways.wide else kind
    w = np.asarray(case.w, kind)
    state = {k: np.asarray(v, inner) if k in SLOTS else v for k, v in (case.state or {}).items()}
    found = []
    with np.errstate(all="ignore"):
        for k, step in enumerate(case.steps):
            w, g = np.asarray(w, inner), np.asarray(np.asarray(step.g, kind), inner)
            w.flags.writeable = g.flags.writeable = False
            given = {**case.settings, "lr": step.lr, "name": case.kind, "ways": ways}
            if case.neighbour is not None:
                given["beside"] = np.asarray(np.asarray(case.neighbour.g[k], kind), inner)
            w, state = update(w, g, state, **given)
            if np.asarray(w).dtype != inner or np.shape(w) != case.w.shape:
                return Failure("dtype", f"{np.asarray(w).dtype} of {np.shape(w)}")
            w = np.asarray(w, kind)
            slots = {k: np.asarray(state[k], float) for k in SLOTS if k in state}
            found.append(Answer(np.asarray(w, np.float64), slots))
    return tuple(found)
