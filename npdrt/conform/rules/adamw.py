"""What the referee knows of AdamW."""

from __future__ import annotations

from typing import Any

from npdrt.conform.case import Slots
from npdrt.conform.page import Norms, Numbers
from npdrt.conform.rules import adam
from npdrt.conform.rules.adam import page as page_adam
from npdrt.conform.rules.evaluate import Arithmetic, largest
from npdrt.conform.rules.moments import KERAS, OPTAX, TORCH, powers, start, two_betas
from npdrt.conform.rules.rule import (
    Dialect,
    Generated,
    LibraryOptimizer,
    Rule,
    Settings,
)


# the section "adamw" of docs/updates.md
def page(
    w: Numbers, g: Numbers, state: dict[str, Any], lr: float, dtype: str, norms: Norms = None, *,
    betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.01,
) -> Numbers:  # fmt: skip
    """The sequence."""
    return page_adam(
        w, g, state, lr, dtype, betas=betas, eps=eps, weight_decay=weight_decay, decoupled=True
    )


# --- how implementations differ -------------------------------------------------------------------

CLAUSES: dict[str, dict[str, str]] = {
    **adam.CLAUSES,
    "weight decay": {
        "times lr": "w (1 - lr wd) before the step, or wd w added to it",
        "times the schedule": "w (1 - wd lr / lr of the first step)",
        "times lr, by the schedule": "w (1 - wd lr^2 / lr of the first step)",
        "without lr": "w (1 - wd)",
        "after the step": "(1 - lr wd) times the new parameter",
        "in the gradient": "g + wd w",
        "after the moments": "m / c1 + wd w over the root",
        "opposite sign": "w (1 + lr wd)",
        "ignored": "none",
    },
    "mask": {
        "none": "every element makes its step",
        "cautious": "elements with m g > 0 alone, over their share of the tensor, at least 1e-3",
        "cautious, unscaled": "elements with m g > 0 alone",
    },
}
# "weight decay" -> the alternative of Adam's clause that gives it
BY_ADAM = {
    "without lr": "decoupled, without lr",
    "after the step": "decoupled, after the step",
    "in the gradient": "always in the gradient",
    "opposite sign": "opposite sign, decoupled",
    "after the moments": "after the moments",
    "ignored": "ignored",
}


def step(
    c: dict[str, str], w: Any, g: Any, slots: Slots, h: dict[str, Any], a: Arithmetic
) -> tuple[Any, Slots, Any]:
    """Algorithm 2 of Loshchilov and Hutter under the choices c."""
    kind, wd, lr = c["weight decay"], h["weight_decay"], h["lr"]
    first = slots.get("first lr", lr)
    scheduled = kind in ("times the schedule", "times lr, by the schedule")
    if scheduled:
        schedule = lr / first if first else lr * 0  # 0 / 0 leaves no decay
        wd, kind = schedule * (wd if "lr" in kind else wd / lr if lr else wd), "times lr"
    chosen = {**c, "weight decay": BY_ADAM.get(kind, "always decoupled")}
    given = {**h, "decoupled": True, "weight_decay": wd}
    new, slots, scale = adam.step(chosen, w, g, slots, given, a)
    scale = largest(scale, new) if scheduled else scale  # a schedule that rises makes w larger
    return new, {**slots, "first lr": first}, scale


DIALECTS = (
    Dialect(
        "published",
        "Loshchilov and Hutter 2019, Algorithm 2, with lr for the schedule (torch/optim/adamw.py; "
        "optax adamw)",
        {},
    ),
    Dialect(
        "paper",
        "Loshchilov and Hutter 2019, Algorithm 2; google-research/big_vision",
        {"weight decay": "times the schedule"},
        "the decay follows the schedule of the rate, not the rate",
    ),
    Dialect(
        "timm, corrected_weight_decay",
        "timm, optim/adamw.py, corrected_weight_decay=True",
        {"weight decay": "times lr, by the schedule"},
    ),
    Dialect(
        "bitsandbytes", "bitsandbytes issue 2010, CUDA kernel", {"weight decay": "after the step"}
    ),
    Dialect(
        "transformers",
        "Hugging Face transformers AdamW, before its removal",
        {"weight decay": "after the step", "epsilon": "epsilon-hat"},
    ),
    Dialect(
        "TensorFlow Addons",
        "tensorflow_addons/optimizers/weight_decay_optimizers.py AdamW",
        {"weight decay": "without lr", "epsilon": "epsilon-hat"},
    ),
    Dialect(
        "L2",
        "Adam sold as AdamW: nntrainer issue 3527; tribuo issue 401",
        {"weight decay": "in the gradient"},
    ),
    Dialect(
        "BERT",
        "google-research/bert, optimization.py AdamWeightDecayOptimizer",
        {"bias correction": "none"},
    ),
    Dialect(
        "epsilon-hat",
        "Kingma and Ba 2015, end of section 2, with decoupled decay; Keras AdamW",
        {"epsilon": "epsilon-hat"},
    ),
    Dialect(
        "cautious",
        "Liang et al. 2024; timm, optim/adamw.py, caution=True",
        {"mask": "cautious"},
        scope=False,
    ),
    Dialect(
        "AMSGrad",
        "torch/optim/adamw.py amsgrad=True",
        {"second moment": "largest mean of squares"},
        scope=False,
    ),
)

# --- what is asked --------------------------------------------------------------------------------

SETTINGS: tuple[Settings, ...] = (
    {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01},
    {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1},
    {"betas": (0.5, 0.9), "eps": 1e-3, "weight_decay": 0.0},
)
OFFERS = ("betas", "eps", "weight_decay")

RULE = Rule(
    name="adamw",
    added=3,
    page=page,
    clauses=CLAUSES,
    step=step,
    dialects=DIALECTS,
    ulps=16.0,
    slots=("exp_avg", "exp_avg_sq"),
    remembers=lambda settings: "moments",
    scales_by_operands=("float64",),
    asked=SETTINGS,
    start=start,
    scalars=powers,
    edges=adam.edges,
    later=adam.later,
    generated=(Generated(SETTINGS[1]), Generated(SETTINGS[0], plainer=True)),
    optimizers=(
        LibraryOptimizer("torch.optim.AdamW", OFFERS, slots=TORCH),
        LibraryOptimizer("optax.adamw", OFFERS, arguments=two_betas, slots=OPTAX, mask="mask"),
        LibraryOptimizer("keras.optimizers.AdamW", slots=KERAS),
        LibraryOptimizer("keras.optimizers.Adam", slots=KERAS),  # its decay is decoupled, too
        LibraryOptimizer("timm.optim.AdamWLegacy"),
    ),
)
