"""Recorded trajectories: weights, gradients and learning rates that some training has written.

A file is npz, safetensors or HDF5, and has for one tensor the arrays

    weights    (steps + 1, ...)  before the first step and after every step
    gradients  (steps, ...)
    lr         (steps,) or one number; where it is absent the caller gives it

or `before` and `after`, both (steps, ...), in place of `weights`. Several tensors have them as
"<name>/weights", "<name>/gradients"; a plain `lr` then holds for all of them. Arrays of other
names are left alone. float16, float32 and float64; bfloat16 in safetensors.
"""

from __future__ import annotations

import importlib
import io
import math
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from npdrt.conform.case import Answer, Case, Step
from npdrt.conform.formats import Values
from npdrt.errors import Error, FileRefused, Unavailable

MAX_BYTES = 1 << 30  # of a file, and of the arrays in it
MAX_MEMBERS = 10_000
MAX_DEPTH = 8  # groups in groups
FIELDS = ("weights", "gradients", "before", "after", "lr")
FLOATS = ("float16", "float32", "float64")
LAYOUT = "expected weights (steps + 1, ...) or before and after, with gradients (steps, ...)"
_FILTERS = {1, 2, 3}  # of HDF5: deflate, shuffle, checksum; others may load code

Numbers = tuple[str, Values]  # the dtype's name, and the values as float64
Arrays = dict[str, Numbers]


@dataclass(frozen=True)
class Recording:
    """The steps of one tensor.

    name: "" where the file has one tensor without a name. format: a name in
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
    def breaks(self) -> list[int]:
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
    state before the first step is the rule's own start. Raises Error where there are several
    stretches and the rule has a state, which is not recorded.
    """
    starts = [0, *recording.breaks]
    if len(starts) > 1 and (what := _state(rule, settings)):
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


def _state(rule: str, settings: Mapping[str, Any]) -> str:
    """What a rule remembers from step to step, or ""."""
    if rule == "adam":
        return "moments"
    if rule in ("sgd", "lars"):
        return "a velocity" if settings.get("momentum") else ""
    return "a bound" if settings.get("norm_bound") is not None else ""


def _case(
    r: Recording, part: range, rule: str, settings: Mapping[str, Any], number: int
) -> tuple[Case, tuple[Answer, ...]]:
    steps = tuple(Step(r.gradients[k], float(r.lr[k])) for k in part)
    kind = "bias" if r.name.rpartition("/")[2].rpartition(".")[2] == "bias" else "weight"
    comment = f"{_label(r.name)}recorded steps {part.start + 1} to {part.stop}"
    given = dict(settings)
    case = Case(
        number, comment, ("RECORDED",), rule, r.format, given, r.before[part.start], steps, None,
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

    lr: the learning rate of every step, where the file has none. parameter: the one tensor to
    read. The kind of file is told by its first bytes, not by its name.

    Raises FileRefused where the file cannot be read, is of no known kind or is damaged, and where
    arrays are missing, do not fit each other or are not of a float format; Error where lr or
    parameter do not fit the file; Unavailable where safetensors is not installed.
    """
    path = Path(path)
    if lr is not None and not (math.isfinite(lr) and lr >= 0):
        raise Error(f"lr: expected a finite number >= 0; got {lr}")
    try:
        return _recordings(_contents(path), lr, parameter)
    except Unavailable:
        raise
    except Error as error:
        raise type(error)(f"{path}: {error}") from error


def _recordings(data: bytes, lr: float | None, parameter: str | None) -> list[Recording]:
    arrays = _reader(data)(data)
    tensors = _tensors(arrays)
    if parameter is not None:
        if parameter not in tensors:
            known = ", ".join(name or "one without a name" for name in tensors)
            raise Error(f"no tensor {parameter!r}; it has {known}")
        tensors = {parameter: tensors[parameter]}
    common = arrays.get("lr")
    return [_recording(name, own, common, lr) for name, own in sorted(tensors.items())]


def _contents(path: Path) -> bytes:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise FileRefused(f"{path.stat().st_size} bytes; at most {MAX_BYTES} are read")
        return path.read_bytes()
    except OSError as error:
        raise FileRefused(f"cannot be read: {error.strerror}") from error


def _reader(data: bytes) -> Callable[[bytes], Arrays]:
    """What reads a file that begins so."""
    if data[:2] == b"PK":
        return _npz
    if data[:8] == b"\x89HDF\r\n\x1a\n":
        return _hdf5
    if data[8:9] == b"{" and int.from_bytes(data[:8], "little") <= len(data):
        return _safetensors
    raise FileRefused(f"expected an npz, safetensors or HDF5 file; it begins {data[:8]!r}")


def _npz(data: bytes) -> Arrays:
    """Arrays by NumPy's reader, without pickles; sizes are looked at first."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            _bounded([info.file_size for info in archive.infolist()])
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            return {k: _numbers(k, file[k]) for k in file.files if _wanted(k)}
    except FileRefused:
        raise
    except ValueError as error:
        if "pickle" in str(error).lower():
            raise FileRefused("holds pickled objects, which are not read") from error
        raise FileRefused(f"damaged npz file: {error}") from error
    except Exception as error:  # zipfile, zlib and the parser of headers raise many things
        raise FileRefused(f"damaged npz file: {_line(error)}") from error


def _safetensors(data: bytes) -> Arrays:
    """Arrays by the library's parser of headers."""
    try:
        deserialize: Any = importlib.import_module("safetensors").deserialize
    except ImportError as error:
        raise Unavailable(
            'safetensors is not installed; install it with pip install "npdrt[text]"'
        ) from error
    try:
        found = {name: view for name, view in deserialize(data) if _wanted(name)}
    except Exception as error:  # its exception is not in its interface
        raise FileRefused(f"damaged safetensors file: {_line(error)}") from error
    codes = {"F16": "<f2", "F32": "<f4", "F64": "<f8", "I32": "<i4", "I64": "<i8"}
    arrays = {}
    for name, view in found.items():
        kind, shape, raw = view["dtype"], view["shape"], bytes(view["data"])
        if kind == "BF16":
            bits = np.frombuffer(raw, "<u2").astype(np.uint32) << 16  # the upper half of a float32
            single = bits.view(np.float32).reshape(shape)
            arrays[name] = ("bfloat16", _numbers(name, single)[1])
        elif kind in codes:
            arrays[name] = _numbers(name, np.frombuffer(raw, codes[kind]).reshape(shape))
        else:
            raise FileRefused(f"{name} is {kind}; expected F16, BF16, F32 or F64")
    return arrays


def _hdf5(data: bytes) -> Arrays:
    """Datasets of a plain HDF5 file: hard links, floats, stored in the file itself.

    libhdf5 is not built for hostile files; the bytes are given to it without a path, and what
    would lead to other files or load code is refused before data are read.
    """
    import h5py

    try:
        with h5py.File(io.BytesIO(data), "r") as file:
            sets = dict(_datasets(file, "", [0]))
            _bounded([math.prod(s.shape) * s.dtype.itemsize for s in sets.values()])
            return {name: _numbers(name, s[()]) for name, s in sets.items()}
    except FileRefused:
        raise
    except Exception as error:
        raise FileRefused(f"damaged HDF5 file: {_line(error)}") from error


def _datasets(group: Any, prefix: str, count: list[int]) -> Iterator[tuple[str, Any]]:
    """The datasets that are wanted, by name, through hard links only."""
    import h5py

    for key in group:
        name = f"{prefix}{key}"
        count[0] += 1
        if count[0] > MAX_MEMBERS or name.count("/") > MAX_DEPTH:
            raise FileRefused("too many groups and datasets, or too deep")
        hard = isinstance(group.get(key, getlink=True), h5py.HardLink)
        member = group[key] if hard else None
        if isinstance(member, h5py.Group):
            yield from _datasets(member, f"{name}/", count)
        elif _wanted(name):
            yield name, _plain(name, member)


def _plain(name: str, dataset: Any) -> Any:
    """A dataset whose numbers are in the file."""
    plist = None if dataset is None else dataset.id.get_create_plist()
    if plist is None or dataset.is_virtual or dataset.external or dataset.shape is None:
        raise FileRefused(f"{name} is not in the file itself; copy it into one file")
    filters = {plist.get_filter(k)[0] for k in range(plist.get_nfilters())}
    if not filters <= _FILTERS:
        raise FileRefused(f"{name} is compressed other than by gzip")
    _bounded([math.prod(dataset.chunks or ()) * dataset.dtype.itemsize])
    if dataset.dtype.kind not in "fiu" or dataset.dtype.itemsize > 8:
        raise FileRefused(_not_float(name, dataset.dtype))
    return dataset


def _bounded(sizes: list[int]) -> None:
    if len(sizes) > MAX_MEMBERS or sum(sizes) > MAX_BYTES:
        found = f"{len(sizes)} arrays of {sum(sizes)} bytes"
        raise FileRefused(f"{found}; at most {MAX_MEMBERS} of {MAX_BYTES} bytes are read")


def _wanted(name: str) -> bool:
    return name.rpartition("/")[2] in FIELDS


def _numbers(name: str, array: Any) -> Numbers:
    """An array of one of the float formats as float64; a learning rate may be an integer."""
    whole = name.rpartition("/")[2] == "lr" and array.dtype.kind in "iu"
    if array.dtype.name not in FLOATS and not whole:
        raise FileRefused(_not_float(name, array.dtype))
    with np.errstate(invalid="ignore"):  # a signalling NaN becomes a quiet one
        return array.dtype.name, np.asarray(array, dtype=np.float64, order="C")


def _not_float(name: str, dtype: Any) -> str:
    hint = "; keep bfloat16 in safetensors" if dtype.kind == "V" else ""
    return f"{name} is {dtype}; expected {', '.join(FLOATS)}{hint}"


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


# --- from arrays to recordings --------------------------------------------------------------------


def _tensors(arrays: Arrays) -> dict[str, Arrays]:
    """Tensor -> field -> array; an `lr` on its own is no tensor."""
    tensors: dict[str, Arrays] = {}
    for key, value in arrays.items():
        name, _, field = key.rpartition("/")
        tensors.setdefault(name, {})[field] = value
    tensors = {name: own for name, own in tensors.items() if set(own) != {"lr"}}
    if not tensors:
        raise FileRefused(f"{LAYOUT}, or <name>/weights ...; found none of them")
    return tensors


def _recording(name: str, own: Arrays, common: Numbers | None, lr: float | None) -> Recording:
    """One tensor's arrays, held against each other."""
    where = _label(name)
    triple = "weights" not in own
    needed = ("before", "after", "gradients") if triple else ("weights", "gradients")
    if not own.keys() >= set(needed):
        raise FileRefused(f"{where}{LAYOUT}; found {', '.join(sorted(own))}")
    if not triple and {"before", "after"} & own.keys():
        raise FileRefused(f"{where}has weights and before or after; keep one form")
    shapes = {field: own[field][1].shape for field in needed}
    steps = shapes["gradients"][0] if shapes["gradients"] else 0
    inner = shapes["gradients"][1:]
    expected = {field: (steps + (field == "weights"), *inner) for field in needed}
    if not steps or shapes != expected:
        found = ", ".join(f"{field} {shape}" for field, shape in shapes.items())
        raise FileRefused(f"{where}shapes do not fit: {found}; {LAYOUT}, of one step at least")
    kinds = {field: own[field][0] for field in needed}
    if len(set(kinds.values())) > 1:
        found = ", ".join(f"{field} {kind}" for field, kind in kinds.items())
        raise FileRefused(f"{where}expected arrays of one dtype; found {found}")
    weights = own[needed[0]][1]
    before, after = (weights, own["after"][1]) if triple else (weights[:-1], weights[1:])
    rates = _rates(where, own.get("lr", common), lr, steps)
    return Recording(name, kinds["gradients"], before, own["gradients"][1], after, rates)


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
