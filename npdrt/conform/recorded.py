"""Recorded trajectories: weights, gradients and learning rates that some training has written.

A file is npz, safetensors or HDF5, and has for one tensor the arrays

    weights    (steps + 1, ...)  before the first step and after every step
    gradients  (steps, ...), or (steps, parts, ...) where a step adds up the gradients of its parts
    lr         (steps,) or one number; if it is absent the caller gives it

or `before` and `after`, both (steps, ...), in place of `weights`. Several tensors have them as
"<name>/weights", "<name>/gradients"; a plain `lr` then holds for all of them. Arrays of other
names are ignored. float16, float32 and float64; bfloat16 in safetensors. Gradients may be of a
narrower format than the weights, as those of a network in bfloat16 are beside its float32 weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from npdrt.conform.case import Answer, Case, Step
from npdrt.conform.formats import FORMATS, Format, Values
from npdrt.conform.rules import RULES
from npdrt.errors import Error, FileRefused
from npdrt.store import foreign

FIELDS = ("weights", "gradients", "before", "after", "lr")
FLOATS = ("float16", "bfloat16", "float32", "float64")
WIDER = {  # format -> those that have all its numbers
    "float16": ("float32", "float64"), "bfloat16": ("float32", "float64"), "float32": ("float64",),
}  # fmt: skip
LAYOUT = "expected weights (steps + 1, ...) or before and after, with gradients (steps, ...)"

Numbers = tuple[str, Values]  # the dtype's name, and the values as float64
Arrays = dict[str, Numbers]


@dataclass(frozen=True)
class Recording:
    """The steps of one tensor.

    name: "" if the file has one tensor without a name. format: a name in
    `npdrt.conform.formats.FORMATS`. before, gradients, after: (steps, ...), numbers of the format.
    lr: (steps,), finite.
    """

    name: str
    format: str
    before: Values
    gradients: Values
    after: Values
    lr: Values

    @property
    def gaps(self) -> list[int]:
        """The steps, from 0, that do not begin where the step before them ended."""
        return [
            k
            for k in range(1, len(self.after))
            if not np.array_equal(self.before[k], self.after[k - 1], equal_nan=True)
        ]


# --- as cases -----------------------------------------------------------------------------------


def cases(
    recording: Recording, rule: str, settings: Mapping[str, Any], *, first: int = 1
) -> list[tuple[Case, tuple[Answer, ...]]]:
    """The recording as cases of a rule, numbered from `first`, with the recorded answers.

    One case, or one for every stretch of steps that begin where the step before them ended. The
    state before the first step is a fresh state. Raises Error if there are several
    stretches and the rule has a state, which is not recorded.
    """
    starts = [0, *recording.gaps]
    if len(starts) > 1 and (what := RULES[rule].remembers(settings)):
        raise Error(
            f"{_label(recording.name)}step {starts[1] + 1} does not begin where step {starts[1]} "
            f"ended, and {rule} keeps {what}, which is not recorded; give the weights of a run "
            "without gaps, from its first step on"
        )
    ends = [*starts[1:], len(recording.after)]
    return [
        _case(recording, range(a, b), rule, settings, first + k)
        for k, (a, b) in enumerate(zip(starts, ends, strict=True))
    ]


def _case(
    r: Recording, part: range, rule: str, settings: Mapping[str, Any], case_id: int
) -> tuple[Case, tuple[Answer, ...]]:
    steps = tuple(Step(r.gradients[k], float(r.lr[k])) for k in part)
    kind = "bias" if r.name.rpartition("/")[2].rpartition(".")[2] == "bias" else "weight"
    comment = f"{_label(r.name)}recorded steps {part.start + 1} to {part.stop}"
    given = dict(settings)
    case = Case(
        case_id, comment, ("RECORDED",), rule, r.format, given, r.before[part.start], steps, None,
        kind,
    )  # fmt: skip
    return case, tuple(Answer(r.after[k]) for k in part)


def _label(name: str) -> str:
    return f"{name}: " if name else ""


# --- reading ------------------------------------------------------------------------------------


def load(
    path: Path | str, *, lr: float | None = None, parameter: str | None = None
) -> list[Recording]:
    """The recordings of a file, in the order of their names.

    lr: the learning rate of every step, if the file has none. parameter: the one tensor to
    read. The first bytes of the file tell its kind, not its name.

    Raises FileRefused if the file cannot be read, is of an unknown kind or is damaged, and if
    arrays are missing, do not fit each other or are not of a float format; Error if lr or
    parameter do not fit the file; Unavailable if safetensors is not installed.
    """
    path = Path(path)
    if lr is not None and not (math.isfinite(lr) and lr >= 0):
        raise Error(f"lr: expected a finite number >= 0; got {lr}")
    found = foreign.read(path, FIELDS)
    try:
        return _recordings({n: _numbers(n, *v) for n, v in found.items()}, lr, parameter)
    except Error as error:
        raise type(error)(f"{path}: {error}") from error


def _recordings(arrays: Arrays, lr: float | None, parameter: str | None) -> list[Recording]:
    tensors = _tensors(arrays)
    if parameter is not None:
        if parameter not in tensors:
            known = ", ".join(name or "one without a name" for name in tensors)
            raise Error(f"no tensor {parameter!r}; it has {known}")
        tensors = {parameter: tensors[parameter]}
    shared_lr = arrays.get("lr")
    return [_recording(name, fields, shared_lr, lr) for name, fields in sorted(tensors.items())]


def _numbers(name: str, kind: str, array: Any) -> Numbers:
    """An array of one of the float formats as float64; a learning rate may be an integer."""
    integer_lr = name.rpartition("/")[2] == "lr" and array.dtype.kind in "iu"
    if kind not in FLOATS and not integer_lr:
        raise FileRefused(f"{name} is {kind}; expected {', '.join(FLOATS)}")
    with np.errstate(invalid="ignore"):  # a signalling NaN becomes a quiet one
        return kind, np.asarray(array, dtype=np.float64, order="C")


# --- from arrays to recordings --------------------------------------------------------------------


def _tensors(arrays: Arrays) -> dict[str, Arrays]:
    """Tensor -> field -> array; an `lr` on its own is not a tensor."""
    tensors: dict[str, Arrays] = {}
    for key, value in arrays.items():
        name, _, field = key.rpartition("/")
        tensors.setdefault(name, {})[field] = value
    tensors = {name: fields for name, fields in tensors.items() if set(fields) != {"lr"}}
    if not tensors:
        raise FileRefused(f"{LAYOUT}, or <name>/weights ...; found none of them")
    return tensors


def _recording(name: str, fields: Arrays, shared_lr: Numbers | None, lr: float | None) -> Recording:
    """One tensor's arrays by field, if they fit each other."""
    where = _label(name)
    has_before_after = "weights" not in fields
    needed = ("before", "after", "gradients") if has_before_after else ("weights", "gradients")
    if not fields.keys() >= set(needed):
        raise FileRefused(f"{where}{LAYOUT}; found {', '.join(sorted(fields))}")
    if not has_before_after and {"before", "after"} & fields.keys():
        raise FileRefused(f"{where}has weights and before or after; keep one form")
    shapes = {field: fields[field][1].shape for field in needed}
    steps = shapes["gradients"][0] if shapes["gradients"] else 0
    apart = len(shapes["gradients"]) - len(shapes[needed[0]]) == 1  # the gradients of parts
    inner = shapes["gradients"][1 + apart :]
    if apart:
        shapes["gradients"] = (steps * bool(shapes["gradients"][1]), *inner)
    expected = {field: (steps + (field == "weights"), *inner) for field in needed}
    if not steps or shapes != expected:
        found = ", ".join(f"{field} {fields[field][1].shape}" for field in needed)
        raise FileRefused(f"{where}shapes do not fit: {found}; {LAYOUT}, of one step at least")
    kinds = {field: fields[field][0] for field in needed}
    form = kinds[needed[0]]
    fit = (form, *(narrow for narrow, wider in WIDER.items() if form in wider))
    if kinds["gradients"] not in fit or {kinds[f] for f in needed if f != "gradients"} != {form}:
        found = ", ".join(f"{field} {kind}" for field, kind in kinds.items())
        raise FileRefused(f"{where}expected arrays of one dtype, or gradients of a narrower one; "
                          f"found {found}")  # fmt: skip
    gradients = fields["gradients"][1]
    gradients = added(gradients, FORMATS[form]) if apart else gradients
    if has_before_after:
        before, after = fields["before"][1], fields["after"][1]
    else:
        before, after = fields["weights"][1][:-1], fields["weights"][1][1:]
    rates = _rates(where, fields.get("lr", shared_lr), lr, steps)
    return Recording(name, form, before, gradients, after, rates)


def added(parts: Values, number: Format) -> Values:
    """The sums over the second axis, in its order, each rounded to the format."""
    total = parts[:, 0]
    for k in range(1, parts.shape[1]):
        total = number.round(total + parts[:, k])
    return total


def _rates(where: str, given: Numbers | None, lr: float | None, steps: int) -> Values:
    """The learning rate of every step."""
    if given is None and lr is None:
        raise Error(f"{where}has no lr; give the learning rate of the steps (--lr)")
    if given is not None and lr is not None:
        raise Error(f"{where}has lr itself; leave out the one given")
    rates = np.asarray(lr, dtype=np.float64) if given is None else given[1]
    if rates.shape not in ((), (steps,)):
        raise FileRefused(f"{where}lr is {rates.shape}; expected {(steps,)}, or one number")
    if not np.isfinite(rates).all():
        bad = int(np.argmin(np.isfinite(rates.reshape(-1)))) + 1
        raise FileRefused(f"{where}lr of step {bad} is {rates.reshape(-1)[bad - 1]}")
    return np.broadcast_to(rates, (steps,))
