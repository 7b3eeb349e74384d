"""Stand-ins for public implementations of lamb, nero and muon, as in tests/standins.py."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from standins import (
    NARROW,
    NORMS,
    Standin,
    Ways,
    kept,
    meet,
    moments,
    narrow_corrections,
    norm,
    offering,
    size_of,
)

from npdrt.conform.formats import FORMATS

# --- LAMB -----------------------------------------------------------------------------------------


def ratio(nw: Any, nu: Any) -> Any:
    """|w| / |u|, or 1 where one of them is zero."""
    return nw / nu if nw > 0 and nu > 0 else 1.0


def adam_direction(m, v, state, w, betas, eps, ways):
    """m_hat / (sqrt(v_hat) + eps), with scalars in float64 or, as in optax and TensorFlow, in the
    dtype."""
    t = state.get("step", 0) + 1
    wide = [meet(1 - b**t, w) for b in betas]
    c1, c2 = ways.pick("scalars", lambda: wide, lambda: narrow_corrections(w, state, betas))
    return ways.pick(
        "direction",
        lambda: (m / c1) / (np.sqrt(v / c2) + meet(eps, v)),
        lambda: (m / c1) / (np.sqrt(v) / np.sqrt(c2) + meet(eps, v)),
    )


def scaled_step(w, k, u, lr, ways):
    """w - k u; norms in float64 go with the plain rate where k is too large for the dtype."""
    usable = ways.norm in NARROW or k <= np.finfo(w.dtype).max
    return ways.axpy(-(k if usable else lr), u, w)


def lamb_paper(w, g, state, *, lr, betas, eps, weight_decay, ways, **_):
    """Algorithm 2 of You et al.; optax; TensorFlow Addons."""
    m, v = moments(g, state, betas, ways)
    u = ways.axpy(weight_decay, w, adam_direction(m, v, state, w, betas, eps, ways))
    r = ratio(norm(w, ways), norm(u, ways))
    return scaled_step(w, lr * np.float64(r), u, lr, ways), kept(state, m, v)


def whole_clip(g, beside, ways):
    """g over the norm of all gradients, if that is above 1."""
    most = max(1.0, math.hypot(size_of(g), 0.0 if beside is None else size_of(beside)))
    return ways.pick("clip", lambda: g / meet(most, g), lambda: g * meet(1 / most, g))


def fused(nvlamb=False, l2=False, averaging=True, trust_clip=False, decoupled=False):
    """NVIDIA apex FusedLAMB, with timm's trust_clip and decoupled_decay."""

    def update(w, g, state, *, lr, betas, eps, weight_decay, ways, beside=None, **_):
        g = whole_clip(g, beside, ways)
        g = ways.axpy(weight_decay, w, g) if l2 else g
        m, v = moments(g, state, betas, ways)
        if not averaging:
            m = ways.axpy(betas[0], state.get("exp_avg", g * 0), g)
        u = adam_direction(m, v, state, w, betas, eps, ways)
        if decoupled:
            w = ways.axpy(-lr * weight_decay, w, w)
        elif not l2:
            u = ways.axpy(weight_decay, w, u)
        r = 1.0
        if weight_decay != 0 or nvlamb:
            r = ratio(norm(w, ways), norm(u, ways))
            r = min(r, 1.0) if trust_clip else r
        return scaled_step(w, lr * np.float64(r), u, lr, ways), kept(state, m, v)

    return update


def lamb_keras(w, g, state, *, lr, betas, eps, weight_decay, ways, **_):
    """keras/src/optimizers/lamb.py: the parameter decays first."""
    m, v = moments(g, state, betas, ways)
    w = ways.axpy(-lr * weight_decay, w, w)
    c1, c2 = narrow_corrections(w, state, betas)
    u = (m / c1) / (np.sqrt(v / c2) + meet(eps, v))
    r = ratio(norm(w, ways), norm(u, ways))
    return scaled_step(w, lr * np.float64(r), u, lr, ways), kept(state, m, v)


def lamb_jettify(debias=False, guarded=True):
    """torch_optimizer, and cybertronai's of before, which does not look for zeros."""

    def update(w, g, state, *, lr, betas, eps, weight_decay, ways, **_):
        m, v = moments(g, state, betas, ways)
        t = state.get("step", 0) + 1
        rate = lr * np.sqrt(1 - betas[1] ** t) / (1 - betas[0] ** t) if debias else lr
        u = ways.axpy(weight_decay, w, m / (np.sqrt(v) + meet(eps, v)))
        nw, nu = min(norm(w, ways), 10), norm(u, ways)
        if not guarded:
            return ways.axpy(-(rate * (np.float64(nw) / nu)), u, w), kept(state, m, v)
        return scaled_step(w, rate * np.float64(ratio(nw, nu)), u, rate, ways), kept(state, m, v)

    return update


def lamb_kozistr(adam_debias=False):
    """pytorch_optimizer: decoupled decay, and epsilon in the ratio."""

    def update(w, g, state, *, lr, betas, eps, weight_decay, ways, **_):
        m, v = moments(g, state, betas, ways)
        rate = lr if adam_debias else lr / (1 - betas[0] ** (state.get("step", 0) + 1))
        w = w * meet(1 - lr * weight_decay, w)
        u = m / (np.sqrt(v) + meet(eps, v))
        nw, nu = min(norm(w, ways), 10), norm(u, ways)
        r = np.float64(nw) / (nu + eps) if nw > 0 < nu else 1.0
        return scaled_step(w, rate * r, u, rate, ways), kept(state, m, v)

    return update


# --- Nero -----------------------------------------------------------------------------------------


def rows(x: Any) -> Any:
    """A row for every neuron."""
    return x.reshape(len(x), -1) if x.ndim > 1 else x.reshape(-1, 1)


def row_norms(x: Any, ways: Ways) -> Any:
    """|x| of every row, (rows, 1), in the dtype of the way."""
    found = [NORMS[ways.norm](row) for row in x]
    return np.asarray(found).reshape(-1, 1)


def centred(x: Any, ways: Ways) -> Any:
    """Rows with mean 0."""
    wide = np.mean(x, axis=1, keepdims=True, dtype=np.float64).astype(x.dtype)
    return ways.pick("mean", lambda: x - wide, lambda: x - np.mean(x, axis=1, keepdims=True))


def divided(x: Any, sizes: Any, ways: Ways) -> Any:
    """Rows over their sizes."""
    sizes = sizes.astype(x.dtype)
    return ways.pick("whole", lambda: x / sizes, lambda: x / sizes)


def mean_square(y, state, shape, beta, ways):
    """v after the step, (rows, 1), and the same corrected."""
    squares = (row_norms(y, ways) ** 2).astype(y.dtype)
    old = rows(state["exp_avg_sq"].astype(y.dtype))[:, :1] if "exp_avg_sq" in state else 0 * squares
    v = ways.mean("v", beta, old, squares)
    return v, v / meet(1 - beta ** (state.get("step", 0) + 1), v)


def nero(first=False, fixed=False, projects=True, eps=0.0, guarded=True):
    """Algorithm 1 of Liu et al.; the authors' code (first, fixed, not guarded), without its
    constraints (projects=False), and pytorch_optimizer's (eps)."""

    def whole(x, ways):
        x = centred(x, ways)
        sizes = row_norms(x, ways) + eps
        return divided(x, np.where(sizes > 0, sizes, 1) if guarded else sizes, ways)

    def update(w, g, state, *, lr, beta, ways, **_):
        if not w.size:
            return w.copy(), state
        x, y, matrix = rows(w), rows(g), w.ndim > 1
        if first and matrix and not state.get("step", 0):
            x = whole(x, ways)
        s = np.mean(row_norms(x, ways), dtype=np.float64)
        s = state.get("scale", s if s != 0 else 0.01)
        v, v_hat = mean_square(y, state, w.shape, beta, ways)
        root = np.sqrt(v_hat) + meet(eps, v)
        root = np.where(v_hat == 0, meet(1, v), root) if guarded and not eps else root
        u = y / root
        u = u if guarded else np.where(np.isnan(u) & ~np.isnan(y), meet(0, u), u)
        sizes = row_norms(x, ways)
        size = np.where(sizes > 0, sizes, s) if matrix and not fixed else s
        x = x - (lr * size * np.ones_like(v, np.float64)).astype(w.dtype) * u
        x = whole(x, ways) if matrix and projects else x
        v = np.broadcast_to(v, x.shape).reshape(w.shape)
        return x.reshape(w.shape), {"exp_avg_sq": v, "scale": s, "step": state.get("step", 0) + 1}

    return update


# --- Muon -----------------------------------------------------------------------------------------

JORDAN = 5 * ((3.4445, -4.7750, 2.0315),)
OF_EACH_STEP = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)
SCALES = {
    "original": lambda out, inner: max(1, out / inner) ** 0.5,
    "transposed": lambda out, inner: max(1, inner / out) ** 0.5,
    "rms": lambda out, inner: 0.2 * max(out, inner) ** 0.5,
    "spectral": lambda out, inner: max(out, inner) ** 0.5,
    "ratio": lambda out, inner: (out / inner) ** 0.5,
}


def to_bfloat16(x: Any) -> Any:
    """x with the values of bfloat16, in float32."""
    return FORMATS["bfloat16"].round(np.asarray(x, np.float64)).astype(np.float32)


def newton_schulz(x, series, ways):
    """The iteration in the dtype of x."""
    turned = x.shape[0] > x.shape[1]
    x = x.T if turned else x
    for a, b, c in (map(x.dtype.type, triple) for triple in series):
        gram = x @ x.T
        x = ways.pick(
            "iteration",
            lambda a=a, b=b, c=c, x=x, gram=gram: a * x + (b * gram + c * (gram @ gram)) @ x,
            lambda a=a, b=b, c=c, x=x, gram=gram: a * x + gram @ (b * x + c * (gram @ x)),
        )
    return x.T if turned else x


def newton_schulz_in_bfloat16(x, series):
    """The iteration of PyTorch: every product is rounded once, after sums in float32."""
    turned = x.shape[0] > x.shape[1]
    x = to_bfloat16(x.T if turned else x)
    for a, b, c in (map(np.float32, triple) for triple in series):
        gram = to_bfloat16(x @ x.T)
        bracket = to_bfloat16(b * gram + c * (gram @ gram))
        x = to_bfloat16(a * x + bracket @ x)
    return x.T if turned else x


def averaged(m, g, momentum, nesterov, t, ways):
    """The momentum after a step as a mean, and what is orthogonalised."""
    m = ways.mean("m", momentum, m, g)
    return m, ways.mean("d", momentum, m, g) if nesterov else m


def summed(m, g, momentum, nesterov, t, ways):
    """The same as a sum."""
    m = ways.axpy(momentum, m, g)
    return m, ways.axpy(momentum, m, g) if nesterov else m


def corrected(m, g, momentum, nesterov, t, ways):
    """optax: bias-corrected, as in NAdam."""
    m = ways.mean("m", momentum, m, g)
    if not nesterov:
        return m, m / meet(1 - momentum**t, m)
    after, now = 1 - momentum ** (t + 1), 1 - momentum**t
    return m, meet(momentum / after, m) * m + meet((1 - momentum) / now, m) * g


def muon(scale="original", keep=averaged, series=JORDAN, floor=lambda n: n + 1e-7, bfloat16=False,
         last_sizes=False):  # fmt: skip
    """KellerJordan/Muon, and its relatives: their scale, momentum, coefficients, normaliser."""

    def update(w, g, state, *, lr, momentum, nesterov, weight_decay, ways, **_):
        t = state.get("step", 0) + 1
        m, d = keep(state.get("momentum", g * 0), g, momentum, nesterov, t, ways)
        if not w.size:
            return w.copy(), {"momentum": m, "step": t}
        matrix = d.reshape(len(d) if d.ndim > 1 else 1, -1)
        x = matrix / meet(floor(norm(matrix, ways)), matrix)
        o = newton_schulz_in_bfloat16(x, series) if bfloat16 else newton_schulz(x, series, ways)
        sizes = w.shape[-2:] if last_sizes and w.ndim > 2 else matrix.shape
        w = ways.pick(
            "decay",
            lambda: w * meet(1 - lr * weight_decay, w),
            lambda: ways.axpy(-lr * weight_decay, w, w),
        )
        o = o.astype(w.dtype).reshape(w.shape)
        return ways.axpy(-(lr * SCALES[scale](*sizes)), o, w), {"momentum": m, "step": t}

    return update


# --- the table ----------------------------------------------------------------------------------

_LAMB, _MUON = offering("betas eps weight_decay"), offering("momentum nesterov weight_decay")
_NERO = offering("beta")


def clamped(n: Any) -> Any:
    """At least 1e-7, as in PyTorch."""
    return max(n, 1e-7)


STANDINS = [
    Standin("LAMB paper", "lamb", lamb_paper, "published", _LAMB),
    Standin("apex FusedLAMB", "lamb", fused(), "apex", _LAMB),
    Standin("apex, use_nvlamb", "lamb", fused(nvlamb=True), "NVLAMB", _LAMB),
    Standin("apex, adam_w_mode=False", "lamb", fused(l2=True), "apex, adam_w_mode=False", _LAMB),
    Standin(
        "apex, grad_averaging=False", "lamb", fused(averaging=False),
        "apex, grad_averaging=False", _LAMB,
    ),
    Standin("timm Lamb, trust_clip", "lamb", fused(trust_clip=True), "timm, trust_clip", _LAMB),
    Standin(
        "timm Lamb, decoupled_decay", "lamb", fused(decoupled=True), "timm, decoupled_decay", _LAMB
    ),
    Standin("Keras Lamb", "lamb", lamb_keras, "Keras", _LAMB),
    Standin("jettify Lamb", "lamb", lamb_jettify(), "jettify", _LAMB),
    Standin("jettify Lamb, debias", "lamb", lamb_jettify(True), "jettify, debias=True", _LAMB),
    Standin("cybertronai Lamb", "lamb", lamb_jettify(guarded=False), "cybertronai", _LAMB),
    Standin("kozistr Lamb", "lamb", lamb_kozistr(), "kozistr", _LAMB),
    Standin(
        "kozistr Lamb, adam_debias", "lamb", lamb_kozistr(True), "kozistr, adam_debias=True", _LAMB
    ),
    Standin("Nero paper", "nero", nero(), "published", _NERO),
    Standin("jxbz Nero", "nero", nero(True, True, guarded=False), "jxbz/nero", _NERO),
    Standin(
        "jxbz Nero, constraints=False", "nero", nero(fixed=True, projects=False, guarded=False),
        "constraints=False", _NERO,
    ),
    Standin("kozistr Nero", "nero", nero(True, True, eps=1e-8), "kozistr", _NERO),
    Standin("Keller Jordan Muon", "muon", muon(), "published", _MUON),
    Standin(
        "torch Muon", "muon", muon(floor=clamped, bfloat16=True), "PyTorch", _MUON, precise=False
    ),
    Standin(
        "torch Muon, match_rms_adamw", "muon", muon("rms", floor=clamped, bfloat16=True),
        "PyTorch, match_rms_adamw", _MUON, precise=False,
    ),
    Standin(
        "timm Muon", "muon", muon("rms", series=OF_EACH_STEP, floor=clamped, bfloat16=True),
        "timm", _MUON, precise=False,
    ),
    Standin("Muon, RMS of Adam", "muon", muon("rms"), "RMS of Adam", _MUON),
    Standin("Keras Muon", "muon", muon("rms", summed), "Moonlight", _MUON),
    Standin(
        "Keras Muon, at first", "muon", muon(keep=summed, series=JORDAN + JORDAN[:1]),
        "Keras, at first", _MUON,
    ),
    Standin(
        "optax muon", "muon", muon("transposed", corrected, floor=lambda n: n + 1e-8), "optax",
        _MUON,
    ),
    Standin("Megatron Muon", "muon", muon("spectral"), "spectral", _MUON),
    Standin("Muon, sqrt(out/in)", "muon", muon("ratio"), "square root of the ratio", _MUON),
    Standin(
        "Keller Jordan Muon, at first", "muon", muon(last_sizes=True),
        "kernels by their last sizes", _MUON,
    ),
]  # fmt: skip
RIGHT = {"lamb": lamb_paper, "nero": nero(), "muon": muon()}
