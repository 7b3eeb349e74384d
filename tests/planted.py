"""Faults that can be planted in any stand-in, from outside: in its arguments, its state, its norms.

None is made from npdrt.conform.rules. Each says the clause that it breaks, by rule.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import standins
from standins import Standin, Update, Ways

from npdrt.conform.case import FILLER, Case, Failure, laid_out
from npdrt.conform.formats import FORMATS

SIGNED = ("sgd", "adam", "adamw", "lars", "lion", "rmsprop", "lamb", "muon")  # a mean of gradients
STATEFUL = (*SIGNED, "nero")
NORMED = ("fromage", "lars", "lars_lesion", "lamb")
ALL = (*STATEFUL, "fromage", "lars_lesion")
STEP = "steps of the fault"  # what a fault keeps in the state

NORMS = {  # wrong ones
    "1-norm": lambda x: np.sum(np.abs(x), dtype=np.float64),
    "float16": lambda x: float(np.sqrt(np.sum(np.square(x.astype(np.float16))))),
    "float16, at the end": lambda x: float(np.float16(standins.size_of(x))),
}
standins.NORMS.update(NORMS)


@dataclass(frozen=True)
class Fault:
    """A fault. breaks: rule -> (clause, alternative), or nothing if no clause has it.

    plant: makes of an update another. needs: the settings that must be offered for it to show.
    norm: the norm that it takes, a key of `standins.NORMS`. whole: it shows in cases of two tensors
    or other layouts, which are answered by `answers`.
    """

    name: str
    breaks: Mapping[str, tuple[str, str] | None]
    plant: Callable[[Update], Update] = lambda update: update
    needs: tuple[str, ...] = ()
    norm: str = ""
    shared: bool = False
    contiguous: bool = False
    among: tuple[str, ...] = ()  # the dialects in which it is that clause, if not all
    never: tuple[str, ...] = ()  # dialects in which it changes nothing

    def shows_in(self, rule: str, dialect: str, offers: frozenset[str]) -> bool:
        """Whether it can be planted in an implementation and changes something there."""
        fits = dialect in self.among if self.among else dialect not in self.never
        return rule in self.breaks and fits and set(self.needs) <= offers


def given(**changes: Callable[[Mapping[str, Any]], Any]) -> Callable[[Update], Update]:
    """Settings replaced: name -> what is made of all settings."""

    def plant(update: Update) -> Update:
        def faulty(w, g, state, **h):
            made = {k: make(h) for k, make in changes.items() if k in h}
            return update(w, g, state, **{**h, **made})

        return faulty

    return plant


def negated(update: Update) -> Update:
    """The gradient with its sign turned."""
    return lambda w, g, state, **h: update(w, -g, state, **h)


def clipped(update: Update) -> Update:
    """The gradient's elements are at most 1."""
    return lambda w, g, state, **h: update(w, np.clip(g, -1, 1), state, **h)


def remembering(pick: Callable[[Any, float], float]) -> Callable[[Update], Update]:
    """The rate that `pick` makes of the rate kept and the rate given; it keeps the rate."""

    def plant(update: Update) -> Update:
        def faulty(w, g, state, *, lr, **h):
            used, kept = pick(state.get("rate"), lr)
            w, new = update(w, g, state, lr=used, **h)
            return w, {**new, "rate": kept}

        return faulty

    return plant


def reset(every: int) -> Callable[[Update], Update]:
    """The state is forgotten every so many steps."""

    def plant(update: Update) -> Update:
        def faulty(w, g, state, **h):
            t = state.get(STEP, state.get("step", 0))
            w, new = update(w, g, {} if t % every == 0 else state, **h)
            return w, {**new, STEP: t + 1}

        return faulty

    return plant


def turned(update: Update) -> Update:
    """Matrices are taken for (in, out)."""

    def faulty(w, g, state, **h):
        if w.ndim != 2:
            return update(w, g, state, **h)
        state = {k: v.T if np.ndim(v) == 2 else v for k, v in state.items()}
        w, new = update(w.T, g.T, state, **h)
        return w.T, {k: v.T if np.ndim(v) == 2 else v for k, v in new.items()}

    return faulty


def unscaled(update: Update) -> Update:
    """The scale is that of the parameter before each step."""

    def faulty(w, g, state, **h):
        return update(w, g, {k: v for k, v in state.items() if k != "scale"}, **h)

    return faulty


def shifted(update: Update) -> Update:
    """Steps count from 2."""

    def faulty(w, g, state, **h):
        w, new = update(w, g, {**state, "step": state.get("step", 0) + 1}, **h)
        return w, {**new, "step": new["step"] - 1}

    return faulty


def late_bound(update: Update) -> Update:
    """The norm bound is that of the first result."""

    def faulty(w, g, state, *, norm_bound=None, **h):
        w, new = update(w, g, state, norm_bound=None, **h)
        if norm_bound is None:
            return w, new
        size = standins.size_of(w)
        limit = state.get("limit", norm_bound * size)
        w = w * w.dtype.type(limit / size) if size > limit else w
        return w, {**new, "limit": limit}

    return faulty


def everywhere(rules: tuple[str, ...], clause: str, how: str) -> dict[str, tuple[str, str]]:
    """The same clause for several rules."""
    return dict.fromkeys(rules, (clause, how))


def nowhere(*rules: str) -> dict[str, None]:
    """No clause of these rules."""
    return dict.fromkeys(rules)


# dialects of lamb and muon
FUSED = (
    "apex",
    "apex, adam_w_mode=False",
    "apex, grad_averaging=False",
    "timm, trust_clip",
    "timm, decoupled_decay",
)
UNCORRECTED = ("jettify", "jettify, debias=True", "cybertronai")
KOZISTR = ("kozistr", "kozistr, adam_debias=True")
MUONS = ("PyTorch", "PyTorch, match_rms_adamw", "timm", "RMS of Adam", "Moonlight",
         "Keras, at first", "optax", "spectral", "square root of the ratio",
         "kernels by their last sizes")  # fmt: skip
NEGATED = "of the negated gradient"
DECAYED = ("sgd", "rmsprop")
FAULTS = [
    Fault(
        "negated gradient",
        {
            **everywhere(("fromage", "lars_lesion", "nero"), "direction", "ascent"),
            **everywhere(SIGNED, "direction", NEGATED),
        },
        negated,
    ),
    *(
        Fault(
            f"rate in {form}",
            everywhere(ALL, "learning rate precision", form),
            given(lr=lambda h, form=form: float(FORMATS[form].round(np.float64(h["lr"])))),
        )
        for form in ("float16", "bfloat16")
    ),
    Fault(
        "rate of the step before",
        everywhere(ALL, "learning rate of", "the step before"),
        remembering(lambda old, lr: (lr if old is None else old, lr)),
    ),
    Fault(
        "rate of the first step",
        everywhere(ALL, "learning rate of", "the first step"),
        remembering(lambda old, lr: (lr if old is None else old,) * 2),
    ),
    Fault(
        "state lost",
        everywhere(STATEFUL, "state", "lost"),
        lambda update: lambda *a, **h: (update(*a, **h)[0], {}),
    ),
    *(
        Fault(
            f"state reset every {n} steps",
            everywhere(STATEFUL, "state", f"reset every {n} steps"),
            reset(n),
        )
        for n in (2, 3, 7, 30)
    ),
    Fault("state shared", everywhere(STATEFUL, "state", "shared"), shared=True),
    Fault(
        "limit of the norm shared",
        everywhere(("fromage",), "state", "shared"),
        shared=True,
        needs=("norm_bound",),
    ),
    Fault(
        "strides ignored", everywhere(ALL, "operands", "as if contiguous"), contiguous=True
    ),
    Fault("1-norm", everywhere(NORMED, "norm of", "1-norm"), norm="1-norm"),
    Fault("norms in float16", everywhere(NORMED, "norm format", "float16"), norm="float16"),
    Fault(
        "norms rounded to float16",
        everywhere(NORMED, "norm format", "float16, at the end"),
        norm="float16, at the end",
    ),
    Fault(
        "decay left out",
        everywhere(
            ("sgd", "adam", "adamw", "lion", "rmsprop", "lamb", "muon"), "weight decay", "ignored"
        ),
        given(weight_decay=lambda h: 0.0),
        needs=("weight_decay",),
        never=FUSED,  # they do not adapt without decay
    ),
    Fault(
        "decay subtracted",
        {
            **everywhere(("sgd", "rmsprop", "lamb"), "weight decay", "subtracted"),
            **everywhere(("adamw", "lion", "muon"), "weight decay", "opposite sign"),
        },
        given(weight_decay=lambda h: -h["weight_decay"]),
        needs=("weight_decay",),
        among=("published", "tensorflow", "caffe", "BERT", "epsilon-hat", "cautious", "AMSGrad",
               "Signum", "Adagrad", *UNCORRECTED, "NVLAMB", "apex", "apex, grad_averaging=False",
               "timm, trust_clip", *MUONS),
    ),
    Fault(
        "epsilon left out",
        everywhere(("adam", "adamw", "lars", "rmsprop", "lamb"), "epsilon", "ignored"),
        given(eps=lambda h: 0.0),
        needs=("eps",),
        never=("TF model garden", "TF model garden, classic_momentum=False", *KOZISTR),
    ),
    Fault(
        "dampening ignored", {"sgd": ("dampening", "ignored")},
        given(dampening=lambda h: 0.0), needs=("dampening",),
    ),
    Fault(
        "dampening of the other sign", {"sgd": ("dampening", "1 + dampening")},
        given(dampening=lambda h: -h["dampening"]), needs=("dampening",),
    ),
    Fault(
        "Nesterov ignored", everywhere(("sgd", "muon"), "nesterov", "ignored"),
        given(nesterov=lambda h: False), needs=("nesterov",), never=("optax",),  # it corrects still
    ),
    Fault(
        "Nesterov always", {"muon": ("nesterov", "always")},
        given(nesterov=lambda h: True), never=("optax",),
    ),
    Fault(
        "betas exchanged", {"lion": ("betas", "exchanged")},
        given(betas=lambda h: h["betas"][::-1]), never=("Signum",),  # it has one beta
    ),
    Fault("never centred", {"rmsprop": ("centered", "never")}, given(centered=lambda h: False)),
    Fault("always centred", {"rmsprop": ("centered", "always")}, given(centered=lambda h: True)),
    Fault(
        "no trust coefficient", {"lars": ("trust ratio", "without trust coefficient")},
        given(trust_coefficient=lambda h: 1.0),
    ),
    Fault(
        "no bound", {"fromage": ("norm bound", "ignored")},
        given(norm_bound=lambda h: None), needs=("norm_bound",),
    ),
    Fault(
        "late bound", {"fromage": ("norm bound", "of the first result")}, late_bound,
        needs=("norm_bound",),
    ),
    Fault(
        "t counts from 2", everywhere(("adam", "adamw", "lamb"), "bias correction", "t too large"),
        shifted, never=("BERT", *UNCORRECTED, *KOZISTR),
    ),
    # those that no clause describes
    Fault("rate 1 % too large", nowhere(*ALL), given(lr=lambda h: 1.01 * h["lr"])),
    Fault("rate squared", nowhere(*ALL), given(lr=lambda h: h["lr"] * abs(h["lr"]))),
    Fault(
        "gradient clipped at 1",
        nowhere("sgd", "adam", "adamw", "lars", "rmsprop", "lamb", "nero", "muon"), clipped,
    ),
    Fault("rows and columns exchanged", nowhere("nero"), turned),
    Fault("scale forgotten", nowhere("nero"), unscaled, among=("jxbz/nero", "constraints=False")),
    Fault(
        "momentum 2 % too small", nowhere("muon"),
        given(momentum=lambda h: 0.98 * h["momentum"]), needs=("momentum",),
    ),
    Fault(
        "epsilon doubled", nowhere("adam", "adamw", "rmsprop", "lamb"),
        given(eps=lambda h: 2 * h["eps"]), needs=("eps",),
    ),
    Fault(
        "decay 10 % too large",
        nowhere("sgd", "adam", "adamw", "lars", "lion", "rmsprop", "lamb", "muon"),
        given(weight_decay=lambda h: 1.1 * h["weight_decay"]), needs=("weight_decay",),
    ),
]  # fmt: skip


def contiguous(values: Any, layout: str) -> Any:
    """What is read from the base of an array whose strides are ignored."""
    view = laid_out(values, layout)
    base = view
    while base.base is not None:
        base = base.base
    start = view.__array_interface__["data"][0] - base.__array_interface__["data"][0]
    flat = base.reshape(-1, order="A") if base.flags.f_contiguous else base.reshape(-1)
    line = flat[start // view.itemsize :][: view.size]
    rest = np.full(view.size - line.size, FILLER).astype(view.dtype)
    return np.append(line, rest).astype(view.dtype).reshape(view.shape)


def outcomes(standin: Standin, cases: Any, ways: Ways, fault: Fault | None) -> list[Any]:
    """What a stand-in with a fault makes of cases."""
    if fault is None:
        return standins.outcomes(standin, cases, ways)
    ways = replace(ways, norm=fault.norm or ways.norm)
    faulty = replace(standin, update=fault.plant(standin.update))
    found = []
    for case in cases:
        own = case
        if fault.contiguous and case.layout != "C":
            found += [_strided(faulty, case, ways)]
        elif fault.shared and case.neighbour is not None:
            found += [_shared(faulty, case, ways)]
        else:
            found += standins.outcomes(faulty, [own], ways)
    return found


def _strided(standin: Standin, case: Case, ways: Ways) -> Any:
    """The answers where each step reads its operands as if they were contiguous."""
    answers, w, update = [], case.w, standin.update
    layout_of_w = "C" if case.layout == "fortran gradient" else case.layout
    state: list[Any] = [None]

    def kept(w, g, state_, **h):
        new, state[0] = update(w, g, state_ if state[0] is None else state[0], **h)
        return new, state[0]

    for step in case.steps:
        read = replace(
            case,
            w=contiguous(w, layout_of_w),
            layout="C",
            steps=(replace(step, g=contiguous(step.g, case.layout)),),
        )
        (found,) = standins.outcomes(replace(standin, update=kept), [read], ways)
        if isinstance(found, Failure):
            return found
        answers.append(found[0])
        w = found[0].w
    return tuple(answers)


def _shared(standin: Standin, case: Case, ways: Ways) -> Any:
    """The answers where a neighbour moves the same state."""
    kind, other = np.dtype(case.format).type, [np.asarray(case.neighbour.w, case.format)]
    beside, k = ({"weight": "bias", "bias": "weight"}[case.kind], [0])

    def both(w, g, state, *, name, **h):
        h = {k: v for k, v in h.items() if k != "beside"}
        its = np.asarray(case.neighbour.g[k[0]], kind)
        its = np.asarray(its, w.dtype)
        before = np.asarray(other[0], w.dtype)
        new, state = standin.update(before, its, state, name=beside, beside=g, **h)
        other[0] = np.asarray(new, kind)
        k[0] += 1
        return standin.update(w, g, state, name=name, beside=its, **h)

    (found,) = standins.outcomes(replace(standin, update=both), [case], ways)
    return found
