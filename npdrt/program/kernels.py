"""The sources of the GPU's kernels: a chain of exact calls as one loop, many chains as one launch,
and the norms of many arrays.

They are written in PTX operations that round once (`add.rn.f32`), so that no compiler flag changes
them: CuPy passes `-ftz=true` to its compiler after any other option, and so CuPy's own float32
functions take subnormal numbers for zero; these do not, as NumPy does not. Compiled by a C++
compiler they have the same bits, which is how they are tested without a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from npdrt.optim.norm import LANES
from npdrt.program.calls import Call, Ref, Value
from npdrt.program.chain import Language, computed_in, expression, read_by
from npdrt.program.fused import FUSABLE

OPTIONS = ("--fmad=false", "--prec-div=true", "--prec-sqrt=true")
THREADS = 256  # of a block
TYPES = {"bool": "bool", "int64": "long long", "float32": "float", "float64": "double"}
_OF_INTEGERS = ("add", "subtract", "multiply", "equal", "not_equal", "less", "less_equal",
                "greater", "greater_equal")  # fmt: skip
COMPILED = (*FUSABLE, "maximum", "minimum", "copy")
_BITWISE = {"bitwise_and": "&", "bitwise_or": "|", "bitwise_xor": "^"}

# On the device each operation is the PTX instruction that rounds once and keeps subnormals,
# whatever the compiler was told; elsewhere, in the tests, the operator of C.
ARITHMETIC = r"""
#ifdef __CUDA_ARCH__
#define NPDRT_TWO(name, ptx, sign) \
  __device__ inline float npdrt_##name(float a, float b) { \
    float r; asm(ptx ".f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b)); return r; } \
  __device__ inline double npdrt_##name(double a, double b) { \
    double r; asm(ptx ".f64 %0, %1, %2;" : "=d"(r) : "d"(a), "d"(b)); return r; }
#define NPDRT_ONE(name, ptx, c) \
  __device__ inline float npdrt_##name(float a) { \
    float r; asm(ptx ".f32 %0, %1;" : "=f"(r) : "f"(a)); return r; } \
  __device__ inline double npdrt_##name(double a) { \
    double r; asm(ptx ".f64 %0, %1;" : "=d"(r) : "d"(a)); return r; }
#define NPDRT_IS(name, ptx, sign) \
  __device__ inline bool npdrt_##name(float a, float b) { int r; \
    asm("{.reg .pred p; setp." ptx ".f32 p, %1, %2; selp.s32 %0, 1, 0, p;}" \
        : "=r"(r) : "f"(a), "f"(b)); return r != 0; } \
  __device__ inline bool npdrt_##name(double a, double b) { int r; \
    asm("{.reg .pred p; setp." ptx ".f64 p, %1, %2; selp.s32 %0, 1, 0, p;}" \
        : "=r"(r) : "d"(a), "d"(b)); return r != 0; }
__device__ inline double npdrt_double(float a) {
  double r; asm("cvt.f64.f32 %0, %1;" : "=d"(r) : "f"(a)); return r; }
__device__ inline float npdrt_float(double a) {
  float r; asm("cvt.rn.f32.f64 %0, %1;" : "=f"(r) : "d"(a)); return r; }
__device__ inline float npdrt_bits(unsigned int a) { return __uint_as_float(a); }
__device__ inline double npdrt_bits(unsigned long long a) {
  return __longlong_as_double((long long)a); }
#else
#define NPDRT_TWO(name, ptx, sign) \
  __device__ inline float npdrt_##name(float a, float b) { return a sign b; } \
  __device__ inline double npdrt_##name(double a, double b) { return a sign b; }
#define NPDRT_ONE(name, ptx, c) \
  __device__ inline float npdrt_##name(float a) { return c(a); } \
  __device__ inline double npdrt_##name(double a) { return c(a); }
#define NPDRT_IS(name, ptx, sign) \
  __device__ inline bool npdrt_##name(float a, float b) { return a sign b; } \
  __device__ inline bool npdrt_##name(double a, double b) { return a sign b; }
__device__ inline double npdrt_double(float a) { return (double)a; }
__device__ inline float npdrt_float(double a) { return (float)a; }
__device__ inline float npdrt_bits(unsigned int a) {
  union { unsigned int i; float f; } u; u.i = a; return u.f; }
__device__ inline double npdrt_bits(unsigned long long a) {
  union { unsigned long long i; double f; } u; u.i = a; return u.f; }
#endif
__device__ inline double npdrt_double(double a) { return a; }
NPDRT_TWO(add, "add.rn", +)
NPDRT_TWO(subtract, "sub.rn", -)
NPDRT_TWO(multiply, "mul.rn", *)
NPDRT_TWO(divide, "div.rn", /)
NPDRT_ONE(sqrt, "sqrt.rn", sqrt)
NPDRT_ONE(negative, "neg", -)
NPDRT_ONE(abs, "abs", fabs)
NPDRT_IS(equal, "eq", ==)
NPDRT_IS(not_equal, "neu", !=)
NPDRT_IS(less, "lt", <)
NPDRT_IS(less_equal, "le", <=)
NPDRT_IS(greater, "gt", >)
NPDRT_IS(greater_equal, "ge", >=)
#define NPDRT_WHOLE(name, sign) \
  __device__ inline long long npdrt_##name(long long a, long long b) { \
    return (long long)((unsigned long long)a sign (unsigned long long)b); }
#define NPDRT_WHOLE_IS(name, sign) \
  __device__ inline bool npdrt_##name(long long a, long long b) { return a sign b; }
NPDRT_WHOLE(add, +)
NPDRT_WHOLE(subtract, -)
NPDRT_WHOLE(multiply, *)
NPDRT_WHOLE_IS(equal, ==)
NPDRT_WHOLE_IS(not_equal, !=)
NPDRT_WHOLE_IS(less, <)
NPDRT_WHOLE_IS(less_equal, <=)
NPDRT_WHOLE_IS(greater, >)
NPDRT_WHOLE_IS(greater_equal, >=)
#define NPDRT_CHOICE(name, test, T) \
  __device__ inline T npdrt_##name(T a, T b) { \
    return npdrt_##test(a, b) || npdrt_not_equal(a, a) ? a : b; }
NPDRT_CHOICE(maximum, greater, float)
NPDRT_CHOICE(maximum, greater, double)
NPDRT_CHOICE(minimum, less, float)
NPDRT_CHOICE(minimum, less, double)
"""

# A launch reads a row of `work` in every block of threads: a chunk of one of its arrays. Rows of
# zeros are no work. The addresses are in the tables because they lie in memory that lasts.
NORM_LANES = f"""
template <typename T> __device__ inline double npdrt_lane(
    const T* __restrict__ x, long long start, long long end) {{
  double total = 0.0;
  #pragma unroll 16
  for (long long i = start + threadIdx.x; i < end; i += {LANES}) {{
    const double v = npdrt_double(x[i]);
    total = npdrt_add(total, npdrt_multiply(v, v));
  }}
  return total;
}}
extern "C" __global__ void npdrt_norm_lanes(
    const long long* __restrict__ work, double* __restrict__ lanes) {{
  const long long* row = work + 4 * (long long)blockIdx.x;  // wide, address, start, end
  lanes[(long long)blockIdx.x * {LANES} + threadIdx.x] =
    row[0] ? npdrt_lane((const double*)row[1], row[2], row[3])
           : npdrt_lane((const float*)row[1], row[2], row[3]);
}}
"""
NORM_FOLD = f"""
extern "C" __global__ void npdrt_norm_fold(
    const long long* __restrict__ work, const double* __restrict__ lanes) {{
  __shared__ double folded[{LANES}];
  const long long* row = work + 3 * (long long)blockIdx.x;  // address, first chunk, end
  const int k = threadIdx.x;
  double total = lanes[row[1] * {LANES} + k];
  #pragma unroll 16
  for (long long c = row[1] + 1; c < row[2]; ++c)
    total = npdrt_add(total, lanes[c * {LANES} + k]);
  folded[k] = total;
  __syncthreads();
  for (int half = {LANES // 2}; half; half /= 2) {{
    if (k < half) folded[k] = npdrt_add(folded[k], folded[k + half]);
    __syncthreads();
  }}
  if (k == 0 && row[0]) *(double*)row[0] = npdrt_sqrt(folded[0]);
}}
"""


class Loop(NamedTuple):
    """The source of an elementwise kernel, and the values its parameters are, in their order."""

    reads: str
    writes: str
    body: str
    read: tuple[int, ...]
    written: tuple[int, ...]


def can_compile(call: Call, values: list[Value]) -> bool:
    """Whether a call can be in a kernel: on float32, float64, int64 and bool, with NumPy's bits."""
    dtypes = {values[i].dtype for i in (*call.refs, call.result)}
    if call.function not in COMPILED or not dtypes <= TYPES.keys():
        return False
    if call.function in ("astype", "copy", "where"):
        cut = values[call.result].dtype == "int64" and dtypes & {"float32", "float64"}
        return not cut and all(isinstance(x, Ref | float | int | bool | str) for x in call.args)
    dtype = computed_in(call, values)
    if dtype == "int64":
        return call.function in _OF_INTEGERS
    return (dtype == "bool") == (call.function in _BITWISE)


def loop_source(
    calls: list[Call], values: list[Value], kept: list[int], place: Callable[[int], Any]
) -> Loop:
    """Elementwise calls as the body of a kernel for one element.

    kept: the results it writes. place(i): equal for values that are the same array. Everything is
    read before anything is written, and an array that is also written is a parameter once, so a
    result may replace an argument. 0-d arrays are read where they are, on the device. Names count
    from 0: the same calls of another layer have the same source.
    """
    shape = values[calls[0].result].shape
    read: dict[Any, tuple[str, int]] = {}
    written = {place(i): (f"o{k}", i) for k, i in enumerate(kept)}
    names: dict[int, str] = {}
    reads, body = [], []
    for i in read_by(calls):
        key, value, scalar = place(i), values[i], values[i].shape == () != shape
        if key not in written and key not in read:
            read[key] = (f"a{len(read)}", i)
            reads.append(f"{'raw ' if scalar else ''}{value.dtype} {read[key][0]}")
        source = (written.get(key) or read[key])[0] + ("[0]" if scalar else "")
        names[i] = f"x{len(names)}"
        body.append(f"const {TYPES[value.dtype]} {names[i]} = {source};")
    for call in calls:
        names[call.result] = f"x{len(names)}"
        kind = TYPES[values[call.result].dtype]
        body.append(f"const {kind} {names[call.result]} = {expression(call, values, names, CUDA)};")
    body += [f"{written[place(i)][0]} = {names[i]};" for i in kept]
    writes = ", ".join(f"{values[i].dtype} {name}" for name, i in written.values())
    order = (tuple(i for _, i in read.values()), tuple(i for _, i in written.values()))
    return Loop(", ".join(reads), writes, "\n".join(body), *order)


def batch_source(loops: list[Loop]) -> str:
    """Elementwise kernels as one. A row of `work` in every block of threads says which loop it
    runs, where in `places` the addresses of its arrays are, and on which elements. Rows of zeros
    are no work."""
    cases = "".join(f"  case {k}: {{\n{_case(loop)}  break; }}\n" for k, loop in enumerate(loops))
    return f"""
extern "C" __global__ void npdrt_batch(
    const long long* __restrict__ work, const long long* __restrict__ places) {{
  const long long* row = work + 4 * (long long)blockIdx.x;  // loop, first place, start, end
  const long long* place = places + row[1];
  const long long first = row[2] + threadIdx.x, end = row[3];
  switch ((int)row[0]) {{
{cases}  }}
}}
"""


def _case(loop: Loop) -> str:
    """The loop of a block of threads over its elements."""
    before, inside = [], []
    read, written = parameters(loop.reads), parameters(loop.writes)
    for k, (raw, kind, name) in enumerate([*read, *written]):
        constant = "const " if k < len(read) else ""
        pointer = name if raw else f"p{k}"
        before.append(f"{constant}{kind}* {pointer} = ({constant}{kind}*)place[{k}];")
        if not raw:
            inside.append(f"{constant}{kind}& {name} = {pointer}[i];")
    body = "\n".join([*inside, loop.body])
    return (
        "\n".join(before) + f"\nfor (long long i = first; i < end; i += {THREADS}) {{\n{body}\n}}\n"
    )


def parameters(text: str) -> list[tuple[bool, str, str]]:
    """(raw, C type, name) of the parameters of an elementwise kernel."""
    found = [part.split() for part in text.split(", ") if part]
    return [(p[0] == "raw", TYPES[p[-2]], p[-1]) for p in found]


def _cast(name: str, given: str, wanted: str) -> str:
    if given == wanted:
        return name
    if wanted == "bool":
        return f"npdrt_not_equal({name}, {_literal(0.0, given)})"
    return (
        f"({TYPES[wanted]}){name}"
        if given in ("bool", "int64")
        else f"npdrt_{TYPES[wanted]}({name})"
    )


def _literal(x: float, dtype: str) -> str:
    """A Python number rounded to a dtype, in C; by its bits if a compiler might lose some."""
    if dtype == "bool":
        return "true" if x else "false"
    if dtype == "int64":
        return f"(long long)({int(x) % (1 << 64)}ull)"
    with np.errstate(all="ignore"):
        value = np.dtype(dtype).type(x)
    if np.isfinite(value) and (value == 0 or abs(value) >= np.finfo(dtype).tiny):
        return f"({TYPES[dtype]})({float(value)!r})"
    bits, suffix = ("uint32", "u") if dtype == "float32" else ("uint64", "ull")
    return f"npdrt_bits({int(value.view(bits)):#x}{suffix})"


def _apply(function: str, operands: list[str], dtype: str) -> str:
    if function == "where":
        return f"{operands[0]} ? {operands[1]} : {operands[2]}"
    if function in _BITWISE:
        return f"{operands[0]} {_BITWISE[function]} {operands[1]}"
    if function == "isfinite":
        return f"npdrt_less(npdrt_abs({operands[0]}), {_literal(math.inf, dtype)})"
    return f"npdrt_{function}({', '.join(operands)})"


CUDA = Language(cast=_cast, literal=_literal, apply=_apply)
