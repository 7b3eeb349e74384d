"""Stand-ins for public implementations of adamw, lion and rmsprop, as in tests/standins.py."""

from __future__ import annotations

from typing import Any

import numpy as np
from standins import (
    Standin,
    Ways,
    adam_step,
    kept,
    meet,
    moments,
    narrow_corrections,
    offering,
)


def decayed(w: Any, rate: Any, ways: Ways) -> Any:
    """w (1 - rate)."""
    return ways.pick("decay", lambda: w * meet(1 - rate, w), lambda: ways.axpy(-rate, w, w))


def hat_step(w: Any, m: Any, v: Any, rate: Any, eps: Any, ways: Ways) -> Any:
    """w - rate m / (sqrt(v) + eps)."""
    return ways.pick(
        "step",
        lambda: ways.axpy(-rate, m / (np.sqrt(v) + meet(eps, v)), w),
        lambda: w - (meet(rate, m) * m) / (np.sqrt(v) + meet(eps, v)),
    )


def share(kept_: Any, floor: float = 1e-3) -> Any:
    """The share of elements that are kept, in their dtype."""
    return kept_.dtype.type(max(np.mean(kept_, dtype=np.float64) if kept_.size else 0.0, floor))


# --- AdamW ----------------------------------------------------------------------------------------


def adamw_torch(w, g, state, *, lr, betas, eps, weight_decay, ways, **_):
    """torch/optim/adamw.py, scalars in float64."""
    m, v = moments(g, state, betas, ways)
    t, w = state.get("step", 0) + 1, decayed(w, lr * weight_decay, ways)
    return adam_step(w, m, v, t, lr, betas, eps, ways), kept(state, m, v)


def adamw_optax(w, g, state, *, lr, betas, eps, weight_decay, ways, **_):
    """optax adamw: wd w is added to the step, and the bias correction has the dtype of w."""
    m, v = moments(g, state, betas, ways)
    c1, c2 = narrow_corrections(w, state, betas)
    u = ways.axpy(weight_decay, w, (m / c1) / (np.sqrt(v / c2) + meet(eps, v)))
    return ways.axpy(-lr, u, w), kept(state, m, v)


def adamw_scheduled(power):
    """The decay follows the schedule: lr^power / the first rate. 1: the paper; 2: timm."""

    def update(w, g, state, *, lr, betas, eps, weight_decay, ways, **_):
        first = state.get("first", lr)
        schedule = lr**power / first if first else 0.0
        m, v = moments(g, state, betas, ways)
        t, w = state.get("step", 0) + 1, decayed(w, schedule * weight_decay, ways)
        return adam_step(w, m, v, t, lr, betas, eps, ways), kept(state, m, v, first=first)

    return update


def adamw_bitsandbytes(w, g, state, *, lr, betas, eps, weight_decay, ways, **_):
    """bitsandbytes' CUDA kernel: the new parameter decays."""
    m, v = moments(g, state, betas, ways)
    new = adam_step(w, m, v, state.get("step", 0) + 1, lr, betas, eps, ways)
    return decayed(new, lr * weight_decay, ways), kept(state, m, v)


def adamw_transformers(w, g, state, *, lr, betas, eps, weight_decay, ways, **_):
    """Hugging Face transformers: epsilon-hat, and the new parameter decays."""
    m, v = moments(g, state, betas, ways)
    t = state.get("step", 0) + 1
    rate = lr * np.sqrt(1 - betas[1] ** t) / (1 - betas[0] ** t)
    new = hat_step(w, m, v, rate, eps, ways)
    return decayed(new, lr * weight_decay, ways), kept(state, m, v)


def adamw_hat(by_rate, narrow):
    """Epsilon-hat after decay: Keras (by the rate) and TensorFlow Addons (not by the rate)."""

    def update(w, g, state, *, lr, betas, eps, weight_decay, ways, **_):
        w = decayed(w, weight_decay * (lr if by_rate else 1), ways)
        m, v = moments(g, state, betas, ways)
        t = state.get("step", 0) + 1
        c1, c2 = narrow_corrections(w, state, betas) if narrow else (1 - b**t for b in betas)
        rate = (meet(lr, w) if narrow else lr) * np.sqrt(c2) / c1
        return hat_step(w, m, v, rate, eps, ways), kept(state, m, v)

    return update


def adamw_l2(w, g, state, *, lr, betas, eps, weight_decay, ways, **_):
    """Adam sold as AdamW."""
    m, v = moments(ways.axpy(weight_decay, w, g), state, betas, ways)
    return adam_step(w, m, v, state.get("step", 0) + 1, lr, betas, eps, ways), kept(state, m, v)


def adamw_bert(w, g, state, *, lr, betas, eps, weight_decay, ways, **_):
    """google-research/bert: no bias correction, wd w is added to the step."""
    m, v = moments(g, state, betas, ways)
    u = ways.axpy(weight_decay, w, m / (np.sqrt(v) + meet(eps, v)))
    return ways.axpy(-lr, u, w), kept(state, m, v)


def adamw_cautious(w, g, state, *, lr, betas, eps, weight_decay, ways, **_):
    """timm, caution=True."""
    w = decayed(w, lr * weight_decay, ways)
    m, v = moments(g, state, betas, ways)
    t = state.get("step", 0) + 1
    mask = (m * g > 0).astype(g.dtype)
    hat = m * (mask / share(mask))
    return adam_step(w, hat, v, t, lr, betas, eps, ways), kept(state, m, v)


def adamw_amsgrad(w, g, state, *, lr, betas, eps, weight_decay, ways, **_):
    """torch.optim.AdamW(amsgrad=True)."""
    w = decayed(w, lr * weight_decay, ways)
    m, v = moments(g, state, betas, ways)
    most = np.maximum(state.get("largest", v * 0), v)
    t = state.get("step", 0) + 1
    return adam_step(w, m, most, t, lr, betas, eps, ways), kept(state, m, v, largest=most)


# --- Lion -----------------------------------------------------------------------------------------


def lion(coupled=False, signum=False, cautious=False):
    """google/automl; kozistr's coupled decay, Signum, and timm's caution=True."""

    def update(w, g, state, *, lr, betas, weight_decay, ways, **_):
        if coupled:
            g = ways.axpy(weight_decay, w, g)
        else:
            w = decayed(w, lr * weight_decay, ways)
        old = state.get("exp_avg", g * 0)
        m = ways.mean("m", betas[1], old, g)
        u = np.sign(m if signum else ways.mean("u", betas[0], old, g))
        if cautious:
            mask = (u * g > 0).astype(g.dtype)
            u = u * (mask / share(mask))
        return ways.axpy(-lr, u, w), {"exp_avg": m}

    return update


# --- RMSprop --------------------------------------------------------------------------------------


def rmsprop(inside_root=False, inside_velocity=False, start=0.0, adagrad=False):
    """torch/optim/rmsprop.py; optax and TensorFlow 1 with epsilon inside the root, the rate inside
    the velocity, and a mean of squares that starts at one; Adagrad."""

    def update(
        w, g, state, *, lr, alpha, eps, ways, momentum=0.0, centered=False, weight_decay=0.0, **_
    ):  # fmt: skip
        g = ways.axpy(weight_decay, w, g) if weight_decay else g
        old = state.get("square_avg", g * 0 + g.dtype.type(start))
        v = old + g * g if adagrad else ways.mean("v", alpha, old, g * g)
        m = ways.mean("m", alpha, state.get("grad_avg", g * 0), g)
        x = v - m * m if centered else v
        root = np.sqrt(x + meet(eps, x)) if inside_root else np.sqrt(x) + meet(eps, x)
        new = {"square_avg": v, "grad_avg": m, "momentum": state.get("momentum", g * 0)}
        if not momentum:
            step = ways.pick(
                "step", lambda: ways.axpy(-lr, g / root, w), lambda: w - meet(lr, g) * g / root
            )
            return step, new
        u = meet(lr, g) * (g / root) if inside_velocity else g / root
        b = ways.axpy(momentum, new["momentum"], u)
        return ways.axpy(-1.0 if inside_velocity else -lr, b, w), {**new, "momentum": b}

    return update


_ADAMW, _LION = offering("betas eps weight_decay"), offering("betas weight_decay")
_RMSPROP = offering("alpha eps momentum centered weight_decay")
STANDINS = [
    Standin("torch AdamW", "adamw", adamw_torch, "published", _ADAMW),
    Standin("optax adamw", "adamw", adamw_optax, "published", _ADAMW, precise=False),
    Standin("big_vision AdamW", "adamw", adamw_scheduled(1), "paper", _ADAMW),
    Standin(
        "timm AdamW", "adamw", adamw_scheduled(2), "timm, corrected_weight_decay", _ADAMW
    ),
    Standin("bitsandbytes AdamW", "adamw", adamw_bitsandbytes, "bitsandbytes", _ADAMW),
    Standin("transformers AdamW", "adamw", adamw_transformers, "transformers", _ADAMW),
    Standin("addons AdamW", "adamw", adamw_hat(False, False), "TensorFlow Addons", _ADAMW),
    Standin("nntrainer AdamW", "adamw", adamw_l2, "L2", _ADAMW),
    Standin("BERT AdamW", "adamw", adamw_bert, "BERT", _ADAMW),
    Standin("Keras AdamW", "adamw", adamw_hat(True, True), "epsilon-hat", _ADAMW, precise=False),
    Standin("timm AdamW, caution", "adamw", adamw_cautious, "cautious", _ADAMW),
    Standin("torch AdamW, amsgrad", "adamw", adamw_amsgrad, "AMSGrad", _ADAMW),
    Standin("automl Lion", "lion", lion(), "published", _LION),
    Standin("kozistr Lion, L2", "lion", lion(coupled=True), "L2", _LION),
    Standin("timm Lion, caution", "lion", lion(cautious=True), "cautious", _LION),
    Standin("Signum", "lion", lion(signum=True), "Signum", _LION),
    Standin("torch RMSprop", "rmsprop", rmsprop(), "published", _RMSPROP),
    Standin(
        "optax rmsprop", "rmsprop", rmsprop(inside_root=True, inside_velocity=True), "optax",
        _RMSPROP - {"weight_decay"},
    ),
    Standin(
        "optax rmsprop, eps outside", "rmsprop", rmsprop(inside_velocity=True),
        "optax, eps_in_sqrt=False", _RMSPROP - {"weight_decay"},
    ),
    Standin(
        "TensorFlow 1 RMSProp", "rmsprop",
        rmsprop(inside_root=True, inside_velocity=True, start=1.0), "TensorFlow 1",
        _RMSPROP - {"weight_decay"},
    ),
    Standin("torch Adagrad", "rmsprop", rmsprop(adagrad=True), "Adagrad", _RMSPROP),
]  # fmt: skip
RIGHT = {"adamw": adamw_torch, "lion": lion(), "rmsprop": rmsprop()}
